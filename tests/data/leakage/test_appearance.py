"""What tiny thumbnails tell of classes."""

import numpy as np
import pytest
from PIL import Image

from kd_lrp_plugin.data.leakage.appearance import judge_by_look
from kd_lrp_plugin.data.leakage.check import check_data
from kd_lrp_plugin.data.leakage.images import SIDE, Fingerprint


def make(count: int, brighter: int, seed: int = 0) -> tuple[list[dict], list[Fingerprint]]:
    """Noise of two classes, one of them brighter; every fourth image is for the test."""
    generator = np.random.default_rng(seed)
    rows, prints = [], []
    for number in range(count):
        label = number % 2
        pixels = generator.integers(0, 156, (SIDE, SIDE)) + brighter * label
        rows.append({"split": ["test", "train"][number % 8 > 1], "class": "ab"[label], "kept": 1})
        prints.append(Fingerprint(thumbnail=pixels.astype(np.uint8).tobytes()))
    return rows, prints


def test_brightness_tells_classes_that_differ_in_it_and_no_others():
    told, noise = (judge_by_look(*make(800, brighter), "train") for brighter in (9, 0))
    assert told == {"accuracy": 1.0, "most_frequent": 0.5, "images": 200, "side": 8}
    assert 0.35 < noise["accuracy"] < 0.65


def test_the_thumbnails_are_averages_of_blocks(monkeypatch):
    rows, prints = make(160, 3)
    given = {}

    class Watched:
        def fit(self, pixels, labels):
            given["learned"] = (pixels, labels)

        def predict(self, pixels):
            given["tested"] = pixels
            return np.full(len(pixels), "a")

    monkeypatch.setattr(f"{judge_by_look.__module__}.make_pipeline", lambda *_: Watched())
    found = judge_by_look(rows, prints, "train")
    expected = [
        np.asarray(Image.frombytes("L", (SIDE, SIDE), one.thumbnail).convert("F").reduce(7)).ravel()
        for one in prints
    ]
    kinds = [row["split"] for row in rows]
    for part, pixels in (("train", given["learned"][0]), ("test", given["tested"])):
        wanted = [e for e, kind in zip(expected, kinds, strict=True) if kind == part]
        np.testing.assert_allclose(pixels, wanted, rtol=1e-5)
    assert given["learned"][1] == ["a", "b"] * 60
    assert found["accuracy"] == 0.5


@pytest.mark.parametrize("change", ["left out", "another class", "few", "one class"])
def test_what_cannot_be_learned_or_tested_does_not_count(change):
    rows, prints = make(800, 9)
    tested = [row for row in rows if row["split"] == "test"]
    if change == "few":
        rows, prints = make(72, 9)  # 18 for the test
        assert judge_by_look(rows, prints, "train") is None
    elif change == "one class":
        assert judge_by_look([{**row, "class": "a"} for row in rows], prints, "train") is None
    else:
        changed = {"kept": 0} if change == "left out" else {"class": "c"}
        for row in tested[:50]:
            row |= changed
        assert judge_by_look(rows, prints, "train")["images"] == 150


def test_the_check_says_it_of_clean_test_images(tmp_path):
    generator = np.random.default_rng(0)
    for split, count in {"train": 40, "test": 12}.items():
        for label, brighter in {"a": 0, "b": 60}.items():
            for number in range(count):
                pixels = generator.integers(0, 150, (32, 32), np.uint8) + np.uint8(brighter)
                file = tmp_path / "set" / split / label / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)
    found = check_data(tmp_path / "set", tmp_path / "out")
    assert found["look"] == {"accuracy": 1.0, "most_frequent": 0.5, "images": 24, "side": 8}
    words = "is right on 100.0 % of 24 clean test images, always saying one class on 50.0 %"
    assert words in found["summary"]
