"""Run and study folders become one HTML page, which needs no network, no script, no other file."""

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_lrp_plugin import __version__
from kd_lrp_plugin.report.content import classify_folder, gather
from kd_lrp_plugin.report.images import picture
from kd_lrp_plugin.report.sections import quote_command, shorten_path
from kd_lrp_plugin.utils.extras import imports_of_an_extra
from kd_lrp_plugin.utils.files import write_text
from kd_lrp_plugin.utils.validation import message

with imports_of_an_extra():
    from jinja2 import Environment, StrictUndefined, UndefinedError

MARK = "<!-- made by kd-lrp report -->"
LIMIT = 5_000_000  # bytes of a page
PICTURES = (600_000, 250_000, 100_000, 40_000)  # bytes of a picture; the first that keeps the limit


def write(
    folders: Sequence[str | Path],
    out: str | Path,
    data_check: str | Path | None = None,
    selection: str | Path | None = None,
    maps: str | Path | None = None,
) -> int:
    """One page about runs and studies, with all that lies in their folders.

    Files are read, and nothing is run: no config is constructed, no model built. What is missing
    is said on the page, with the command that makes it.

    Args:
        folders: finished runs, and studies.
        out: the page; one that this function has written before is replaced.
        data_check: folder that ``kd-lrp check-data`` has written.
        selection: record of a chosen student; by default that of the first run which has one.
        maps: folder that ``kd-lrp explain`` has written for several runs.

    Returns:
        Size of the page in bytes, below :data:`LIMIT`.

    Raises:
        FileNotFoundError: for a folder that is neither a finished run nor a study.
        FileExistsError: if ``out`` is something else than such a page.
        ValueError: if there is nothing to show, a file cannot be read, or the page is too large.
    """
    out, paths = Path(out), list(dict.fromkeys(Path(folder) for folder in folders))
    if not paths:
        raise ValueError(message("report", "a run or a study at least", "none", ""))
    for path in paths:
        classify_folder(path)
    _refuse_others(out)
    content = gather(paths, data_check, selection, maps)
    options = {"--data-check": data_check, "--selection": selection, "--maps": maps, "--out": out}
    given = {option: shorten_path(value) for option, value in options.items() if value}
    words = [word for pair in given.items() for word in pair]
    content["page_command"] = quote_command("kd-lrp report", *map(shorten_path, paths), *words)
    for most in PICTURES:
        text = render(content, most)
        if (size := len(text.encode())) < LIMIT:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_text(out, text)
            return size
    fix = "Give fewer runs: a study's own table takes the place of its runs."
    raise ValueError(message("report", f"a page below {LIMIT:,} bytes", f"{size:,}", fix))


def render(content: Mapping[str, Any], most: int = PICTURES[0]) -> str:
    """The page's text. Whatever the content holds becomes text, never markup.

    Args:
        content: of :func:`kd_lrp_plugin.report.content.gather`, and as ``page_command`` the
            command that makes the page.
        most: bytes of a picture.

    Raises:
        ValueError: if a record lacks what the page shows of it.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": lambda value: "-" if value is None else f"{100 * value:.1f} %",
        "probability": lambda p: "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
        "number": _number,
        "in_words": _in_words,
        "duration": _duration,
        "numeric": lambda rows, column: any(
            isinstance(row.get(column), float | int) for row in rows
        ),
        "quoted": shlex.quote,
        "picture": lambda file: picture(file, most),
    }
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    about = {"mark": MARK, "version": __version__}
    about["made"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    try:
        return environment.from_string(template).render({**content, **about})
    except UndefinedError as error:
        fix = "Give the commands again that made the folders."
        raise ValueError(message("report", "whole records", str(error), fix)) from error


def _refuse_others(out: Path) -> None:
    """Raise unless there is no file yet, or a page of ours."""
    if not os.path.lexists(out):
        return
    if out.is_file():
        with out.open("rb") as file:
            if MARK.encode() in file.read(400):
                return
    fix = "Choose another --out, or delete it."
    got = f"{out}, which is something else"
    raise FileExistsError(message("report --out", "a new file or a page of kd-lrp", got, fix))


# --- numbers -----------------------------------------------------------------------------------


def _number(value: Any, digits: int = 3) -> str:
    if value is None or value != value:
        return "-"
    if isinstance(value, float) and not (value.is_integer() and abs(value) >= 1000):
        return f"{value:,.{digits}f}"
    return f"{int(value):,}" if isinstance(value, int | float) else str(value)


def _in_words(n: int) -> str:
    """Three digits of a large count, in words.

    Example:
        >>> _in_words(3_702_730_752), _in_words(97_737_328), _in_words(999_999)
        ('3.70 billion', '97.7 million', '999,999')
    """
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if n >= size:
            digits = max(0, 3 - len(str(int(n / size))))
            return f"{n / size:,.{digits}f} {name}"
    return f"{n:,}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
