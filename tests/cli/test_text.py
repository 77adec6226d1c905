"""What a command prints is text: whatever a class, file, run or configuration is called."""

import csv
import io
import json
import re
import shutil

import pytest
import typer
from hostile_names import KNOWN, hostile_names
from PIL import Image
from rich.console import Console
from small_runs import BASELINE, SMALL
from typer.testing import CliRunner

from kd_lrp_plugin.cli import console
from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.plots.text import one_line, plain_text

NAME = r"[left] [/] $a$ $_$ x^_|\{y} :smile: <b>"  # as a file system takes it


@pytest.mark.parametrize("name", hostile_names(60))
def test_say_prints_every_name_as_it_is(name, capsys):
    console.say(f"written to {name}", "red")
    printed = capsys.readouterr().out
    assert printed == f"written to {plain_text(name, lines=True)}\n"
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", printed)


def test_a_terminal_without_unicode_gets_escapes(capsys, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console.say("gliome é 腫", to=Console(file=stream))
    stream.flush()
    assert stream.buffer.getvalue() == b"gliome \\xe9 \\u816b\n"


@pytest.mark.parametrize("name", KNOWN)
def test_progress_takes_any_name(name, capsys):
    metrics = {"epoch": 1, "train_loss": 1.0, "train_accuracy": 0.5, "val_accuracy": 0.5}
    metrics |= {"images_per_second": 10.0, f"train_{name}": 2.0}
    with console.RichProgress() as progress:
        assert list(progress.track([1], name, 1)) == [1]
        progress.note(name)
        progress.epoch(metrics)
    assert f"{plain_text(name, lines=True)} 2  10 images/s" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ValueError, OSError, KeyError, FloatingPointError, ImportError])
def test_errors_take_any_name(error, capsys):
    for name in KNOWN:
        with pytest.raises(console.typer.Exit), console.errors_in_words():
            raise error(name)
        assert capsys.readouterr().err == f"Error: {plain_text(name, lines=True)}\n"
    with pytest.raises(console.typer.Exit), console.errors_in_words("kept in [/] [left]"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "Stopped. kept in [/] [left]\n"


def test_every_command_prints_a_run_its_classes_and_files_by_their_names(tmp_path, monkeypatch):
    """From training to page, with names that rich, matplotlib and Markdown would read."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / NAME / "0"

    def call(*words: object) -> str:
        result = CliRunner().invoke(app, list(map(str, words)))
        assert result.exit_code == 0, result.output
        return result.output

    sets = [word for change in SMALL for word in ("--set", change)]
    out = call("distill", BASELINE, *sets, "--out", run, "--device", "cpu")
    assert f"written to {run}" in out
    # The classes of the phantom have harmless names: put others in their place, as in a run of an
    # older version, whose files are not known by their bytes.
    about = json.loads((run / "environment.json").read_text())
    about.pop("outputs", None)
    (run / "environment.json").write_text(json.dumps(about))
    summary = json.loads((run / "summary.json").read_text())
    names = ["[/]", "$a$ $_$", "_|^", "<b>\n\x1b[31m"]
    renamed = dict(zip(summary["classes"], names, strict=True))
    (run / "summary.json").write_text(json.dumps({**summary, "classes": names}))
    (head, *rows) = csv.reader(io.StringIO((run / "predictions.csv").read_text()))
    head = [f"student: {renamed[t[9:]]}" if t.startswith("student: ") else t for t in head]
    with (run / "predictions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *([a, renamed[b], *rest] for a, b, *rest in rows)])

    out = call("evaluate", run, "--resamples", 100)
    assert f"written: {run}/evaluation.json" in out
    assert all(one_line(name).replace("|", r"\|") in out for name in names)
    image = tmp_path / f"{NAME}.png"
    Image.new("RGB", (40, 40), "red").save(image)
    out = call("predict", run, image)
    assert str(image).replace(r"_|\{", r"_\|\{") in out
    out = call(
        "explain", run, "--n", 2, "--samples", 2, "--method", "grad_cam", "--out", run.parent
    )
    assert f"written to {run.parent}" in out
    page = tmp_path / f"{NAME}.html"
    out = call("report", run, "--out", page, "--maps", run.parent)
    assert f"written: {page}" in out
    text = page.read_text()
    assert "<b>\n" not in text
    assert "&lt;b&gt;" in text


def test_check_data_prints_classes_and_files_by_their_names(tmp_path):
    root = tmp_path / "images"
    for split in ("Training", "Testing"):
        for place, name in enumerate(("[left]", "$a$ $_$", r"_|^\x")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for n in range(2):
                picture = Image.effect_noise((32, 32), 30 + 20 * place + 7 * n)
                picture.save(folder / f"{n} [left] $x$ $.png")
    shutil.copy(root / "Training/[left]/0 [left] $x$ $.png", root / "Testing/[left]/copy $_$.png")
    (root / "Training/[left]/broken [left].png").write_bytes(b"no image")
    words = ["check-data", str(root), "--out", str(tmp_path / "out [/left] $")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "[left]/broken [left].png" in result.output
    assert "$a$ $_$" in result.output
    assert f"written to {tmp_path}/out [/left] $" in result.output


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (NotADirectoryError(20, "Not a directory", "a/b"), "a/b: expected a path that can be used"),
        (ModuleNotFoundError("No module named 'm.n'", name="m.n"), "module m.n: expected one"),
    ],
)
def test_errors_of_the_system_are_words(raised, said, capsys):
    with pytest.raises(typer.Exit), console.errors_in_words():
        raise raised
    assert said in capsys.readouterr().err


def test_a_name_that_a_module_lacks_is_said_and_other_attributes_are_not(capsys):
    with pytest.raises(typer.Exit), console.errors_in_words():
        csv.raeder  # noqa: B018
    assert "got 'raeder'. Did you mean 'reader'" in capsys.readouterr().err
    with pytest.raises(AttributeError), console.errors_in_words():
        "".raeder  # noqa: B018


def test_a_device_that_nobody_knows_is_refused():
    result = CliRunner().invoke(app, ["distill", str(BASELINE), "--device", "toaster"])
    assert result.exit_code == 1
    assert "device: expected one that PyTorch knows, got 'toaster'" in result.output
