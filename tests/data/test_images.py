"""One reader of images: every mode against numpy, and the same values from every way to ask."""

import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from torchvision.datasets import ImageFolder

from kd_lrp_plugin.data.folder import FolderImages
from kd_lrp_plugin.data.images import decode_image, read_image, read_mask
from kd_lrp_plugin.data.leakage.images import fingerprint
from kd_lrp_plugin.data.transforms import make_transforms, preparation, preprocessing
from kd_lrp_plugin.data.validation import unreadable_images
from kd_lrp_plugin.evaluation import explain_pictures, predict, predictors
from kd_lrp_plugin.runs.record import RunRecord

PILLOW = int(PIL.__version__.partition(".")[0])
SHAPE = (9, 13)
RNG = np.random.default_rng(0)


def draw(*channels: int, top: int = 256) -> np.ndarray:
    kind = np.uint8 if top == 256 else np.uint16
    return RNG.integers(0, top, (*SHAPE, *channels), kind)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def over_black(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.rint(colours.astype(float) * alpha[..., None] / 255)


def make_palette() -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """An image with a palette, its indices and its palette."""
    indices, colours = draw(top=256) % 7, RNG.integers(0, 256, (256, 3), np.uint8)
    image = Image.fromarray(indices).convert("L")
    image = Image.frombytes("P", image.size, indices.astype(np.uint8).tobytes())
    image.putpalette(colours.tobytes())
    return image, indices, colours


def case_1() -> tuple[Image.Image, np.ndarray, dict]:
    values = draw() > 127
    return Image.fromarray(values), grey(255 * values), {}


def case_l() -> tuple[Image.Image, np.ndarray, dict]:
    values = draw()
    return Image.fromarray(values), grey(values), {}


def case_la() -> tuple[Image.Image, np.ndarray, dict]:
    values = draw(2)
    return Image.fromarray(values, "LA"), over_black(grey(values[..., 0]), values[..., 1]), {}


def case_p() -> tuple[Image.Image, np.ndarray, dict]:
    image, indices, colours = make_palette()
    return image, colours[indices], {}


def case_p_with_a_transparent_colour() -> tuple[Image.Image, np.ndarray, dict]:
    image, indices, colours = make_palette()
    shown = np.where((indices == 3)[..., None], 0, colours[indices])
    return image, shown, {"transparency": 3}


def case_p_with_an_opacity_for_each_colour() -> tuple[Image.Image, np.ndarray, dict]:
    image, indices, colours = make_palette()
    alpha = RNG.integers(0, 256, 256, np.uint8)
    return image, over_black(colours[indices], alpha[indices]), {"transparency": alpha.tobytes()}


def case_pa() -> tuple[Image.Image, np.ndarray, dict]:
    image, indices, colours = make_palette()
    alpha = draw()
    both = Image.frombytes(
        "PA", image.size, np.stack([indices, alpha], 2).astype(np.uint8).tobytes()
    )
    both.putpalette(colours.tobytes())
    return both, over_black(colours[indices], alpha), {}


def case_rgb() -> tuple[Image.Image, np.ndarray, dict]:
    values = draw(3)
    return Image.fromarray(values), values, {}


def case_rgb_with_a_transparent_colour() -> tuple[Image.Image, np.ndarray, dict]:
    values = draw(3)
    values[2:5] = (200, 10, 30)
    shown = np.where((values == (200, 10, 30)).all(2)[..., None], 0, values)
    return Image.fromarray(values), shown, {"transparency": (200, 10, 30)}


def case_l_with_a_transparent_value() -> tuple[Image.Image, np.ndarray, dict]:
    values = draw()
    values[2:5] = 200
    return Image.fromarray(values), grey(np.where(values == 200, 0, values)), {"transparency": 200}


def case_rgba() -> tuple[Image.Image, np.ndarray, dict]:
    values = draw(4)
    return Image.fromarray(values), over_black(values[..., :3], values[..., 3]), {}


def case_cmyk() -> tuple[Image.Image, np.ndarray, dict]:
    values = draw(4)
    ink = values.astype(float) / 255
    shown = 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])
    return Image.fromarray(values, "CMYK"), shown, {}


def case_ycbcr() -> tuple[Image.Image, np.ndarray, dict]:
    """By the equations of JFIF."""
    values = draw(3)
    y, cb, cr = np.moveaxis(values.astype(float), 2, 0) - np.array([0, 128, 128])[:, None, None]
    shown = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], 2)
    return Image.fromarray(values, "YCbCr"), shown.clip(0, 255), {}


def case_16_bits() -> tuple[Image.Image, np.ndarray, dict]:
    values = draw(top=65536)
    return Image.fromarray(values), grey(np.rint(values / 257)), {}


# How images are made, and the formats that can hold their mode.
CASES: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "1": (case_1, ("png", "tif", "bmp", "ppm")),
    "L": (case_l, ("png", "tif", "bmp", "ppm", "webp")),
    "L, one value transparent": (case_l_with_a_transparent_value, ("png",)),
    "LA": (case_la, ("png", "tif")),
    "P": (case_p, ("png", "tif", "bmp")),
    "P, one colour transparent": (case_p_with_a_transparent_colour, ("png",)),
    "P, an opacity for each": (case_p_with_an_opacity_for_each_colour, ("png",)),
    "PA": (case_pa, ("tif",)),
    "RGB": (case_rgb, ("png", "tif", "bmp", "ppm", "webp")),
    "RGB, one colour transparent": (case_rgb_with_a_transparent_colour, ("png",)),
    "RGBA": (case_rgba, ("png", "tif")),
    "CMYK": (case_cmyk, ("tif",)),
    "YCbCr": (case_ycbcr, ("tif",) if PILLOW >= 13 else ()),  # older ones cannot read their own
    "I;16": (case_16_bits, ("png", "tif", "ppm")),
}
SPACE = [(name, ending) for name, (_, endings) in CASES.items() for ending in endings]


@pytest.mark.parametrize(("name", "ending"), SPACE)
def test_each_mode_in_each_format_is_what_numpy_says_whoever_asks(name, ending, tmp_path):
    image, expected, options = CASES[name][0]()
    root = tmp_path / "set"
    for label in ("cat", "dog"):
        (root / "Training" / label).mkdir(parents=True)
        lossless = {"lossless": True} if ending == "webp" else {}
        image.save(root / "Training" / label / f"1.{ending}", **options, **lossless)
    file = root / "Training" / "cat" / f"1.{ending}"
    seen = np.asarray(read_image(file)).astype(float)
    assert seen.shape == (*SHAPE, 3)
    # Pillow rounds down in some conversions of colour.
    assert np.abs(seen - expected).max() <= (2 if name in ("CMYK", "YCbCr") else 0.501)
    data = FolderImages(str(root), image_size=13)
    bits, prepare = preparation(preprocessing(data))
    assert np.array_equal(data[0][0], prepare(read_image(file, bits, "predict")))
    assert np.array_equal(data[0][0], make_transforms(13)(read_image(file)))
    assert np.array_equal(data.loader(str(file)), seen)
    assert unreadable_images(data) == {}
    content = hashlib.blake2b(str(SHAPE[::-1]).encode(), digest_size=16)
    content.update(seen.astype(np.uint8).tobytes())
    assert fingerprint(file).digest == content.hexdigest()


@pytest.mark.parametrize(("name", "ending"), SPACE)
def test_predict_and_explain_see_what_training_sees(name, ending, tmp_path, monkeypatch):
    image, _, options = CASES[name][0]()
    for label in ("cat", "dog"):
        (tmp_path / "Training" / label).mkdir(parents=True)
        image.save(tmp_path / "Training" / label / f"1.{ending}", **options)
    data = FolderImages(str(tmp_path), image_size=9)
    summary = {"preprocessing": preprocessing(data), "classes": ["cat", "dog"]}
    monkeypatch.setattr(RunRecord, "summary", lambda _: {**summary, "image_shape": [3, 9, 9]})
    given = []

    def model(images: torch.Tensor) -> torch.Tensor:
        given.append(images)
        return torch.zeros(1, 2)

    monkeypatch.setattr(predictors, "load_run", lambda *_, **__: (model, summary))
    predict.predict(tmp_path, [data.samples[0][0]])
    assert torch.equal(given[0][0], data[0][0])
    run = SimpleNamespace(name="run", summary=summary, folder=SimpleNamespace(path=tmp_path))
    (shown,) = explain_pictures.read_images([run], [data.samples[0][0]])(run)
    assert torch.equal(shown.image, data[0][0])
    assert np.array_equal(shown.picture, np.asarray(data.loader(data.samples[0][0])))


def test_names_that_are_not_utf8_are_found_in_any_data_set_of_files(tmp_path):
    for file in (b"a/1.png", b"b/n\xff.png"):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + file))
        path.parent.mkdir()
        Image.fromarray(draw()).save(tmp_path / "1.png")
        path.write_bytes((tmp_path / "1.png").read_bytes())
    found = unreadable_images(ImageFolder(str(tmp_path)))
    assert list(found.values()) == ["a name that is not UTF-8; rename it"]


def test_ordinary_images_are_as_pillow_converts_them(tmp_path):
    for name in ("L", "RGB"):
        image, _, _ = CASES[name][0]()
        for ending in ("png", "jpg", "bmp"):
            image.save(tmp_path / f"1.{ending}")
            with Image.open(tmp_path / f"1.{ending}") as opened:
                expected = opened.convert("RGB").tobytes()
            assert read_image(tmp_path / f"1.{ending}").tobytes() == expected


def lab_to_rgb(values: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of white D50 by its definition, and sRGB by the Bradford-adapted matrix."""
    lightness, a, b = np.moveaxis(values.astype(float), 2, 0)
    y = (lightness * 100 / 255 + 16) / 116
    x, z = y + (a - 256 * (a > 127)) / 500, y - (b - 256 * (b > 127)) / 200
    f = np.stack([x, y, z], 2)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.96422, 1, 0.82521]
    matrix = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = (xyz @ np.array(matrix).T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_lab_is_what_its_definition_says(tmp_path):
    values = np.random.default_rng(0).integers(0, 40, (*SHAPE, 3), np.uint8)
    values[..., 0] += 110
    Image.frombytes("LAB", SHAPE[::-1], values.tobytes()).save(tmp_path / "1.tif")
    seen = np.asarray(read_image(tmp_path / "1.tif")).astype(float)
    assert np.abs(seen - lab_to_rgb(values)).max() <= 3


@pytest.mark.parametrize(
    ("order", "white_is_zero"), [("<u2", False), (">u2", False), ("<u2", True)]
)
def test_tiffs_of_16_bits_in_both_byte_orders_and_senses(tmp_path, order, white_is_zero):
    values = draw(top=65536)
    tags = ImageFileDirectory_v2()
    tags[262] = 0 if white_is_zero else 1
    mode = "I;16" if order == "<u2" else "I;16B"
    image = Image.frombytes(mode, SHAPE[::-1], values.astype(order).tobytes())
    image.save(tmp_path / "1.tif", tiffinfo=tags)
    with Image.open(tmp_path / "1.tif") as opened:
        assert opened.tag_v2[262] == tags[262]
    expected = grey(np.rint((65535 - values if white_is_zero else values) / 257))
    assert np.array_equal(np.asarray(read_image(tmp_path / "1.tif")), expected)


@pytest.mark.parametrize(("bits", "top"), [(10, 1023), (12, 4095), (14, 16383), (16, 65535)])
def test_stated_bits_are_the_range(tmp_path, bits, top):
    values = draw(top=top + 1)
    values[0, 0] = top
    Image.fromarray(values).save(tmp_path / "1.png")
    expected = grey(np.rint(values * (255 / top)))
    assert np.abs(np.asarray(read_image(tmp_path / "1.png", bits)) - expected).max() <= 1
    if bits == 12:
        for file in ("signed.tif", "long.tif"):
            kind = np.int32 if file == "long.tif" else np.uint16
            Image.fromarray(values.astype(kind)).save(tmp_path / file)
            assert np.abs(np.asarray(read_image(tmp_path / file, bits)) - expected).max() <= 1
    if bits > 10:
        with pytest.raises(ValueError, match=r"values from .* beyond \[0, 1,023\]; set bits"):
            read_image(tmp_path / "1.png", 10)


def test_stated_bits_reach_training_check_prediction_and_the_check_of_data(tmp_path):
    values = draw(top=4096)
    values[0, 0] = 4000
    for label in ("cat", "dog"):
        (tmp_path / "Training" / label).mkdir(parents=True)
        Image.fromarray(values).save(tmp_path / "Training" / label / "1.png")
    file = tmp_path / "Training" / "cat" / "1.png"
    plain, stated = FolderImages(str(tmp_path)), FolderImages(str(tmp_path), bits=12, image_size=9)
    assert "might be 12 bits" in unreadable_images(plain)[str(file)]
    with pytest.raises(ValueError, match=r"image .*1\.png: expected an image, got 16-bit values"):
        plain[0]
    assert "might be 12 bits" in fingerprint(file).unreadable
    assert unreadable_images(stated) == {}
    assert fingerprint(file, 12).unreadable == ""
    known = json.loads(json.dumps(preprocessing(stated)))  # as the summary of a run keeps it
    bits, prepare = preparation(known)
    assert bits == 12
    assert np.array_equal(prepare(read_image(file, bits)), stated[0][0])
    with pytest.raises(ValueError, match="integer bits of 9 or more, got 8"):
        FolderImages(str(tmp_path), bits=8)


def test_black_16_bit_images_are_black(tmp_path):
    Image.fromarray(np.zeros(SHAPE, np.uint16)).save(tmp_path / "1.png")
    assert not np.asarray(read_image(tmp_path / "1.png")).any()


def save_float(file: Path) -> None:
    Image.fromarray(RNG.random(SHAPE, np.float32)).save(file)


def save_integers(file: Path) -> None:
    Image.fromarray(draw(top=65536).astype(np.int32)).save(file)


def save_transparent(file: Path) -> None:
    values = draw(4)
    values[..., 3] = 0
    Image.fromarray(values).save(file)


def save_pages(file: Path) -> None:
    pages = [Image.fromarray(draw()) for _ in range(3)]
    pages[0].save(file, save_all=True, append_images=pages[1:])


def save_dark(file: Path) -> None:
    Image.fromarray(draw(top=65536) % 4096).save(file)


def cut_off(file: Path) -> None:
    Image.fromarray(draw(3)).save(file)
    file.write_bytes(file.read_bytes()[:-120])


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("float.tif", save_float, "floating-point values"),
        ("integers.tif", save_integers, "nothing says what is white; set bits"),
        ("transparent.png", save_transparent, "wholly transparent"),
        ("pages.tif", save_pages, "3 frames or pages"),
        ("pages.png", save_pages, "3 frames or pages"),
        ("pages.webp", save_pages, "3 frames or pages"),
        ("dark.png", save_dark, "might be 12 bits"),
        ("cut.png", cut_off, "truncated"),
        ("empty.png", Path.touch, "an empty file"),
        ("text.png", lambda file: file.write_text("x"), "not an image"),
        ("folder.png", Path.mkdir, "a folder"),
        ("fifo.png", os.mkfifo, "no regular file"),
        ("n\udcff.png", lambda file: Image.fromarray(draw()).save(file), "not UTF-8"),
    ],
)
def test_what_cannot_be_told_is_refused_by_name_whoever_asks(tmp_path, name, make, reason):
    for label in ("cat", "dog"):
        (tmp_path / "Training" / label).mkdir(parents=True)
        Image.fromarray(draw()).save(tmp_path / "Training" / label / "1.png")
    data = FolderImages(str(tmp_path))
    file = tmp_path / "Training" / "cat" / name
    make(file)
    data.samples.append((str(file), 0))
    words = rf"predict .*: expected an image, got .*{reason}"
    with pytest.raises(ValueError, match=words) as caught:
        read_image(file, None, "predict")
    str(caught.value).encode()
    with pytest.raises(ValueError, match=reason):
        data[len(data) - 1]
    assert list(unreadable_images(data)) == [str(file)]
    assert reason in unreadable_images(data)[str(file)]
    assert reason in fingerprint(file).unreadable


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"predict: expected an image, got none at .*no\.png"
    ):
        read_image(tmp_path / "no.png", None, "predict")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("factor", [1.5, 2.5])
def test_images_beyond_pillows_limit_are_refused_in_words(tmp_path, monkeypatch, factor):
    Image.fromarray(draw()).save(tmp_path / "1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(SHAPE[0] * SHAPE[1] / factor))
    with pytest.raises(ValueError, match=r"pixels, where at most .* are read"):
        read_image(tmp_path / "1.png")
    assert "pixels, where at most" in fingerprint(tmp_path / "1.png").unreadable
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(tmp_path / "1.png").size == SHAPE[::-1]


def upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """By the table of EXIF 2.3: where the stored image's first row and column are."""
    swapped = values.swapaxes(0, 1) if orientation > 4 else values
    rows = {3: -1, 4: -1, 7: -1, 8: -1}.get(orientation, 1)
    columns = {2: -1, 3: -1, 6: -1, 7: -1}.get(orientation, 1)
    return swapped[::rows, ::columns]


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif", "jpg", "webp"])
def test_exif_orientation_is_applied(tmp_path, orientation, ending):
    corners = np.zeros((24, 40), np.uint8)
    corners[:12, :20], corners[:12, 20:], corners[12:, :20] = 250, 170, 90
    file = tmp_path / f"1.{ending}"
    Image.fromarray(corners).convert("RGB").save(file, exif=oriented(orientation))
    expected = upright(corners, orientation)
    seen = np.asarray(read_image(file))[..., 0].astype(int)
    assert seen.shape == expected.shape
    assert np.abs(seen - expected).mean() < 6
    assert (decode_image(file).changes != ()) == (orientation > 1 and ending != "tif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif", "jpg"])
@pytest.mark.parametrize("how", ["stored", "upright", "oriented"])
def test_masks_lie_on_their_images_or_are_refused(tmp_path, orientation, ending, how):
    inside = np.zeros((24, 40), bool)
    inside[:7, :11] = True
    image, mask = tmp_path / f"1.{ending}", tmp_path / "mask.png"
    Image.fromarray(255 * inside.astype(np.uint8)).save(image, exif=oriented(orientation))
    expected = upright(inside, orientation)
    drawn = Image.fromarray(expected if how == "upright" else inside)
    drawn.save(mask, **({"exif": oriented(orientation)} if how == "oriented" else {}))
    if orientation in (2, 3, 4) and how != "oriented":  # the sizes do not tell
        with pytest.raises(ValueError, match="leaves open how the mask lies on it"):
            read_mask(mask, image)
    else:
        assert np.array_equal(read_mask(mask, image), expected)


def test_masks_of_any_mode_are_what_is_not_black(tmp_path):
    inside = draw() > 127
    Image.fromarray(draw()).save(tmp_path / "1.png")
    opaque = np.full((*SHAPE, 4), 255, np.uint8)
    palette = Image.frombytes("P", SHAPE[::-1], inside.astype(np.uint8).tobytes())
    palette.putpalette([0, 0, 0, 0, 0, 1])
    masks = {
        "1": Image.fromarray(inside),
        "L": Image.fromarray(inside.astype(np.uint8)),
        "I;16": Image.fromarray(inside.astype(np.uint16)),
        "RGB": Image.fromarray((inside[..., None] * [0, 0, 1]).astype(np.uint8)),
        "P": palette,
        "RGBA, on a clear ground": Image.fromarray(opaque * inside[..., None]),
        "RGBA": Image.fromarray(np.where(inside[..., None], opaque, [0, 0, 0, 255]).astype("u1")),
        "RGBA, all white": Image.fromarray(
            np.concatenate([opaque[..., :3], 255 * inside[..., None].astype(np.uint8)], 2)
        ),
    }
    for name, mask in masks.items():
        mask.save(tmp_path / "mask.png")
        assert np.array_equal(read_mask(tmp_path / "mask.png", tmp_path / "1.png"), inside), name
    (tmp_path / "mask.png").write_text("x")
    with pytest.raises(ValueError, match=r"mask .*mask\.png: expected a readable mask"):
        read_mask(tmp_path / "mask.png", tmp_path / "1.png")


def test_nothing_waits_for_a_socket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths of sockets are short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("1.png")
        with pytest.raises(ValueError, match="no regular file"):
            read_image("1.png")
