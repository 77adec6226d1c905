"""What a student makes of new images: files, folders, tables; as a table, and as maps."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kd_lrp_plugin.attribution.methods import ATTRIBUTIONS, INPUT, attribute
from kd_lrp_plugin.data.images import ascii_name, read_image
from kd_lrp_plugin.data.layout import is_image, walk
from kd_lrp_plugin.data.splits import find_column, read_table
from kd_lrp_plugin.evaluation.explain_pictures import picture_tensor, shrink_picture
from kd_lrp_plugin.evaluation.explain_trials import choose_layer
from kd_lrp_plugin.evaluation.predictors import Predictor, open_predictor
from kd_lrp_plugin.losses import fold_logits
from kd_lrp_plugin.plots.maps import MapRow, map_figure
from kd_lrp_plugin.runs.predictions import name_outputs
from kd_lrp_plugin.utils.files import get_command, put, to_csv, write_json, write_text
from kd_lrp_plugin.utils.progress import current_progress
from kd_lrp_plugin.utils.validation import check_known, message

STEM = 40  # signs of a map's name that are of its image: file systems take 255 bytes
TABLES = (".csv", ".tsv", ".txt")


def predict(
    source: str | Path | Predictor, images: Sequence[str | Path], safe: bool = False
) -> list[dict[str, Any]]:
    """What a model makes of image files.

    Args:
        source: a run, an exported folder or an ONNX file, see
            :func:`~kd_lrp_plugin.evaluation.predictors.open_predictor`.
        images: files.
        safe: see :func:`kd_lrp_plugin.runs.loading.load_run`.

    Returns:
        One record per image: file, class and its probability, and all probabilities by class; an
        output beyond the classes has a name of its own. Of a run with subclasses also ``subclass``,
        the likeliest of all, and under ``subclasses`` all of theirs, which add up to the classes'.
        Of an image that cannot be read, or
        whose outputs are not finite: file and problem.

    Raises:
        FileNotFoundError: if there is no run or no image.
        ValueError: if no file is an image with finite outputs, or a run's files are damaged.
    """
    return list(predict_each(source, images, safe=safe))


def predict_each(
    source: str | Path | Predictor,
    images: Sequence[str | Path],
    maps: "MapWriter | None" = None,
    safe: bool = False,
) -> Iterator[dict[str, Any]]:
    """As :func:`predict`, one after another, with a map of each where ``maps`` is given.

    The record then has the name of the map's file, under "map".
    """
    model = source if isinstance(source, Predictor) else open_predictor(source, safe)
    if absent := [file for file in images if not Path(file).exists()]:
        got = f"none at {', '.join(ascii_name(file) for file in absent[:3])}"
        got += f" and {len(absent) - 3:,} more" if len(absent) > 3 else ""
        raise FileNotFoundError(message("predict", "an image", got, "Check the path."))
    problem: ValueError | None = None
    good = 0
    for number, file in enumerate(current_progress().track(images, "predicting", len(images))):
        try:
            picture = read_image(file, model.bits, "predict")
            record, prepared = _classify(model, file, picture)
        except ValueError as error:
            problem = error
            yield {"file": str(file), "problem": str(error)}
            continue
        good += 1
        if maps is not None:
            record["map"] = maps.draw(number, file, picture, prepared, record)
        yield record
    if problem is not None and not good:
        raise problem


def _classify(
    model: Predictor, file: str | Path, picture: Image.Image
) -> tuple[dict[str, Any], Tensor]:
    prepared = model.prepare(picture)
    logits = model.score(prepared[None])[0]
    if not logits.isfinite().all():
        fix = "The student cannot handle this image: train it again, or leave the image out."
        got = logits.tolist()
        raise ValueError(message(f"predict {ascii_name(file)}", "finite outputs", got, fix))
    subclass_of = model.subclass_of
    of_classes = fold_logits(logits[None], subclass_of)[0] if subclass_of else logits
    names = name_outputs(model.classes, len(of_classes))
    by_class = dict(zip(names, of_classes.softmax(0).tolist(), strict=True))
    best = max(by_class, key=by_class.__getitem__)
    record = {"file": str(file), "class": best, "probability": by_class[best], "all": by_class}
    if subclass_of:
        found = dict(zip(model.subclasses, logits.softmax(0).tolist(), strict=True))
        record |= {"subclass": max(found, key=found.__getitem__), "subclasses": found}
    return record, prepared


# --- what to predict ----------------------------------------------------------------------------


def list_images(inputs: Iterable[str | Path], column: str = "file") -> list[Path]:
    """The image files that are meant by files, folders and tables, each once.

    Of a folder, all that lie in it at any depth and end like an image, but for hidden ones; how
    many others there are is noted. Of a table (.csv, .tsv, .txt), the values of a column, which
    count from the table's folder.

    Args:
        inputs: paths.
        column: of the tables.

    Raises:
        FileNotFoundError: if there is no such path.
        ValueError: for a folder or a table without images, or one without the column.
    """
    found: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found += _list_folder(path)
        elif path.suffix.lower() in TABLES and path.is_file():
            found += _list_table(path, column)
        elif path.exists():
            found.append(path)
        else:
            got = f"none at {ascii_name(path)}"
            raise FileNotFoundError(message("predict", "an image", got, "Check the path."))
    return list(dict.fromkeys(found))


def _list_folder(folder: Path) -> list[Path]:
    tree = walk(folder)
    images = [Path(folder, *parts) for parts in tree.files if is_image(parts[-1])]
    others = len(tree.files) - len(images) + len(tree.ignored)
    if others:
        words = "not read, hidden or without the ending of an image"
        current_progress().note(f"{ascii_name(folder)}: {len(images):,} images; {others:,} {words}")
    if not images:
        fix = "Give a folder with images, such as .png or .jpg."
        raise ValueError(message(f"predict {ascii_name(folder)}", "images", "none", fix))
    return images


def _list_table(table: Path, column: str) -> list[Path]:
    columns, rows = read_table(table, words=(column,))
    named = find_column("predict --column", table, column, columns)
    files = [row[named] for _, row in rows]
    if not files or not all(files):
        got = f"{len(files)} rows, {files.count('')} of them without a file"
        raise ValueError(message(f"predict {table}", "a file in each row", got, ""))
    return [table.parent / file for file in files]


# --- what comes of it ---------------------------------------------------------------------------


def check_new(out: Path | None) -> None:
    """Raise an error unless ``out`` can become a table and its record, with nothing overwritten.

    Raises:
        FileExistsError: if one of them is there.
        NotADirectoryError: if it would lie in a file.
        ValueError: for a name that does not end in .csv.
    """
    if out is None:
        return
    if out.suffix.lower() != ".csv":
        fix = "Such as predictions.csv."
        raise ValueError(message("predict --out", "a name that ends in .csv", out, fix))
    if found := [file for file in (out, out.with_suffix(".json")) if os.path.lexists(file)]:
        fix = "Choose another --out, or delete it."
        got = f"one that is there, {found[0]}"
        raise FileExistsError(message("predict --out", "a new file", got, fix))
    _check_above("predict --out", out)


def _check_above(where: str, path: Path) -> None:
    """Raise ``NotADirectoryError`` for a path that is to lie in what is no folder."""
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        fix = "Choose another place."
        raise NotADirectoryError(message(where, "a path in a folder", f"{path} in a file", fix))


def write_predictions(
    file: Path, records: Sequence[dict[str, Any]], model: Predictor, column_of_maps: bool = False
) -> None:
    """A CSV of the records, and beside it, ending in .json, the command, model and calibration.

    Args:
        file: to write.
        records: of :func:`predict`.
        model: that made them.
        column_of_maps: whether there are maps.
    """
    names = list(dict.fromkeys(name for row in records for name in row.get("all", {})))
    titles = ["file", "class", "probability", *(f"probability: {name}" for name in names)]
    titles += [f"probability of subclass: {name}" for name in model.subclasses]
    titles += ["map"] if column_of_maps else []
    rows = []
    for row in records:
        known = row.get("all", {})
        below = row.get("subclasses", {})
        values = [_digits(row.get("probability")), *(_digits(known.get(name)) for name in names)]
        values += [_digits(below.get(name)) for name in model.subclasses]
        maps = [row.get("map", "")] if column_of_maps else []
        name = ascii_name(row["file"])
        rows.append([name, row.get("class", ""), *values, *maps, row.get("problem", "")])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, to_csv([*titles, "problem"], rows))
    about = {"command": get_command(), "model": model.name, "images": len(records)}
    write_json(file.with_suffix(".json"), {**about, "calibration": model.calibration})


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.9g}"


class MapWriter:
    """Writes a figure of the relevance of the predicted class, for one image after another.

    Args:
        folder: for the figures; made with the first.
        model: must have a PyTorch module.
        method: of :data:`~kd_lrp_plugin.attribution.methods.ATTRIBUTIONS`.

    Raises:
        ValueError: for a model without a module, or a method that does not fit it.
        FileExistsError: if there is something at ``folder``.
        NotADirectoryError: if it would lie in a file.
    """

    def __init__(self, folder: Path, model: Predictor, method: str = "grad_cam") -> None:
        check_known("predict --method", method, ATTRIBUTIONS)
        if os.path.lexists(folder):
            fix = "Choose another --maps, or delete it."
            raise FileExistsError(message("predict --maps", "a new folder", folder, fix))
        _check_above("predict --maps", folder)
        if model.module is None:
            fix = "Give the run, or a folder that kd-lrp export --format timm has written."
            got = f"{model.name}, which has no gradients"
            raise ValueError(message("predict --maps", "a PyTorch model", got, fix))
        self.folder, self.model, self.method = folder, model, method
        self.module = model.module
        layered = ATTRIBUTIONS[method].layered
        self.layer = choose_layer(self.module)[0] if layered else INPUT

    def draw(
        self, number: int, file: str | Path, picture: Image.Image, image: Tensor, record: Any
    ) -> str:
        """The name of the figure's file."""
        target = list(record["all"]).index(record["class"])
        target_of_image = torch.tensor([target])
        (found,) = attribute(
            self.module, image[None], target_of_image, self.method, self.layer
        ).cpu()
        row = MapRow(
            Path(ascii_name(file)).stem,
            np.asarray(shrink_picture(picture)) if self.model.whole else picture_tensor(image),
            {self.method.replace("_", " "): found.numpy()},
            {"image": (record["class"], record["probability"])},
            known=False,
        )
        figure = map_figure([row], f"Relevance of the predicted class at {self.layer}")
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{number:05d}-{Path(ascii_name(file)).stem[:STEM]}.png"
        put(self.folder / name, lambda draft: figure.savefig(draft, format="png"))
        return name
