"""The synthetic look-alike of MHIST: its counts, what is drawn, and a run that reads its table."""

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr
from small_runs import BASELINE

from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.data.csv_images import CsvImages
from kd_lrp_plugin.evaluation import evaluate
from kd_lrp_plugin.training import trainer

SCRIPT = Path(__file__).parents[2] / "examples" / "make_mhist_lookalike.py"
VOTES = "Number of Annotators who Selected SSA (Out of 7)"
GROUPS = "{clear_hp: [0, 1], hp: [2, 3], ssa: [4, 5], clear_ssa: [6, 7]}"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_mhist_lookalike", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def root(script, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lookalike") / "mhist"
    assert script.make_lookalike(folder, 0.02, 32) == len(list(folder.glob("images/*.png")))
    return folder


def read(root: Path) -> list[dict[str, str]]:
    with (root / "annotations.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_whole_has_the_published_counts(script):
    counts = script.count_images(1.0)
    of = {
        (part, ssa): sum(n for (p, v), n in counts.items() if p == part and (v >= 4) == ssa)
        for part in ("train", "test")
        for ssa in (False, True)
    }
    assert list(of.values()) == [1545, 630, 617, 360]
    assert counts["train", 0] == 537
    assert counts["test", 7] == 137


def test_a_share_keeps_the_columns_and_every_number_of_votes(root):
    rows = read(root)
    assert list(rows[0]) == ["Image Name", "Majority Vote Label", VOTES, "Partition"]
    for part, hp in {"train": 537, "test": 186}.items():
        votes = [int(row[VOTES]) for row in rows if row["Partition"] == part]
        assert set(votes) == set(range(8))
        assert votes.count(0) == round(0.02 * hp)
    assert {(row["Majority Vote Label"], int(row[VOTES]) >= 4) for row in rows} == {
        ("HP", False),
        ("SSA", True),
    }


def test_it_says_everywhere_that_it_is_synthetic(root):
    assert "SYNTHETIC" in (root / "SYNTHETIC.txt").read_text()
    for row in read(root):
        assert row["Image Name"].startswith("SYNTHETIC_")
        with Image.open(root / "images" / row["Image Name"]) as image:
            assert "SYNTHETIC" in image.text["Description"]
            assert image.size == (32, 32)


def test_the_doubt_of_the_annotators_is_visible(script):
    """The open part of the crypts, which is white, grows with their votes."""
    votes = [v for v in range(8) for _ in range(6)]
    drawn = [script.draw_crypts(v, 64, np.random.default_rng(i)) for i, v in enumerate(votes)]
    white = [(np.asarray(image).min(2) > 222).mean() for image in drawn]
    assert spearmanr(votes, white).statistic > 0.9


def test_the_same_seed_draws_the_same(script, root, tmp_path):
    script.make_lookalike(tmp_path / "again", 0.02, 32)
    script.make_lookalike(tmp_path / "other", 0.004, 32, seed=1)
    name = f"images/{read(root)[0]['Image Name']}"
    assert (tmp_path / "again" / name).read_bytes() == (root / name).read_bytes()
    assert (tmp_path / "other" / name).read_bytes() != (root / name).read_bytes()


def test_neither_a_table_that_is_there_nor_a_wrong_share_is_taken(script, root, tmp_path):
    with pytest.raises(FileExistsError, match="a new folder"):
        script.make_lookalike(root, 0.02, 32)
    for share, side in ((0, 32), (1.5, 32), (0.1, 16)):
        with pytest.raises(ValueError, match="expected"):
            script.make_lookalike(tmp_path, share, side)


def test_a_run_reads_its_table_and_reports_by_group(root, tmp_path):
    kwargs = (
        f"root: {root}, csv: annotations.csv, folder: images, file: Image Name, "
        f"label: Majority Vote Label, image_size: 32, groups: '{VOTES}', "
        f"subclasses: {{column: '{VOTES}', groups: {GROUPS}}}"
    )
    overrides = ["batch_size=8", "num_workers=0", "train.num_epochs=1"]
    for name, more in {
        "train": "split: {Partition: train}, part: train",
        "val": "split: {Partition: train}, part: validation",
        "test": "split: {Partition: test}",
    }.items():
        overrides.append(
            f"datasets.phantom/{name}=!import_call {{key: kd_lrp_plugin.torchdistill.csv_images, "
            f"init: {{kwargs: {{{kwargs}, {more}}}}}}}"
        )
    overrides.append("models.model.kwargs.num_classes=2")
    run = tmp_path / "run"
    trainer.distill(RunSpec(BASELINE, overrides, run, device="cpu"))
    found = evaluate.evaluate(run, 100)["student"]["groups"]["by_group"]
    test = [row for row in read(root) if row["Partition"] == "test"]
    votes = [row[VOTES] for row in test]
    assert {name: group["n"] for name, group in found.items()} == {
        vote: votes.count(vote) for vote in map(str, range(8))
    }
    header, first, *_ = (run / "predictions.csv").read_text().splitlines()
    assert header == "image,label,group,student: HP,student: SSA"
    assert first.split(",")[0] == min(row["Image Name"] for row in test)


def test_subclasses_are_those_of_the_table(root):
    data = CsvImages(
        "annotations.csv",
        "Image Name",
        "Majority Vote Label",
        root=str(root),
        folder="images",
        split={"Partition": "test"},
        subclasses={"column": VOTES, "groups": {"hp": [0, 1, 2, 3], "4": [4], "more": [5, 6, 7]}},
    )
    votes = {row["Image Name"]: int(row[VOTES]) for row in read(root)}
    seen = [votes[Path(file).name] for file, _ in data.samples]
    assert data.subclass_targets == [0 if v < 4 else 1 if v == 4 else 2 for v in seen]
    assert data.subclass_of == [0, 1, 1]
