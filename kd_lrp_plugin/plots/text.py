"""Names of people's own as text: in figures, tables and on the terminal they are never markup.

A class, file, run or configuration may be called anything: ``$x$``, ``[/]``, ``_a``, ``a|b``, or
hold control characters, which would move a terminal's cursor or make an SVG file invalid.
"""

import unicodedata
from collections.abc import Iterable
from typing import Any

# For every text in a figure: neither ``$`` nor, where a style asks for LaTeX, ``_`` has a meaning.
PLAIN: dict[str, Any] = {"parse_math": False, "usetex": False}
# They turn the order of the letters behind them, or end a line where nobody sees it.
_HIDDEN = "\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def plain_text(value: object, lines: bool = False) -> str:
    r"""A value as text that can be printed, drawn and stored anywhere.

    Args:
        value: such as a name; bytes of a file name that are not UTF-8 come as surrogates.
        lines: whether ends of lines stay; otherwise they are shown like other control characters.

    Example:
        >>> plain_text("\x1b[2Jglioma\n"), plain_text("a\nb", lines=True), plain_text("caf\udce9")
        ('\\x1b[2Jglioma\\n', 'a\nb', 'caf\\udce9')
    """
    text = str(value)
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if not (lines and character == "\n")
        and (character in _HIDDEN or unicodedata.category(character) in ("Cc", "Cs", "Cn"))
        else character
        for character in text
    )


def one_line(value: object) -> str:
    r"""A value as plain text of one line, for a heading, an item of a list or a cell.

    Example:
        >>> one_line("does it\nhelp?")
        'does it help?'
    """
    return plain_text(" ".join(str(value).splitlines()))


def plain_legend(target: Any, handles: Iterable[Any], labels: Iterable[str], **options: Any) -> Any:
    """A legend whose labels are plain text: matplotlib itself hides those that begin with ``_``.

    Args:
        target: axes or a figure.
        handles: what is drawn, in order.
        labels: their names.
        **options: of ``legend``.
    """
    names = [plain_text(label) for label in labels]
    legend = target.legend(list(handles), list(map(str, range(len(names)))), **options)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, **PLAIN)
    return legend
