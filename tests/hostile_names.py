"""Names that mean something to rich, matplotlib, Markdown, HTML or a terminal."""

import random

PIECES = (
    *("[left]", "[/]", "[bold red]", ":smile:", "$", "$$", "_", "^", "\\", "{", "}", "%s", "|"),
    *("`", "*", "<b>", "</td>", "&amp;", '"', "'", "#", "\n", "\r", "\t", "\x1b[31m", "\x07"),
    *("\u202e", "\u2028", "\ud800", "é", "腫", " ", "a", "-", "--help"),
)
KNOWN = (
    *("[left]", "[/]", "$x$", "$_$ and $^$", r"a\$b$c$", "_hidden", "a|b", r"a\|b", "a\nb"),
    *("<script>alert(1)</script>", "100 % {x} %s", "\x1b[2Jgone", "caf\udce9", "\u202etxt.exe"),
)


def hostile_names(n: int, seed: int = 0) -> list[str]:
    """Those that have done harm, and random ones out of the same pieces."""
    draw = random.Random(seed)
    drawn = ["".join(draw.choices(PIECES, k=draw.randint(1, 6))) for _ in range(n)]
    return [*KNOWN, *drawn]
