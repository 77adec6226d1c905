"""SYNTHETIC pictures under a table like MHIST's, to try a config before the real ones arrive.

    python examples/make_mhist_lookalike.py synthetic_mhist --share 0.1 --image-size 96

MHIST (Wei et al., AIME 2021) is given out on request. This draws something else: rows of crypts,
plain and even where no annotator would see a sessile serrated adenoma (SSA), wide and serrated
where all seven would. The table has MHIST's columns and, with --share 1, its counts; every file
says that it is synthetic. Nothing learnt here says anything of histology.
"""

import argparse
import csv
import string
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

COLUMNS = (
    "Image Name",
    "Majority Vote Label",
    "Number of Annotators who Selected SSA (Out of 7)",
    "Partition",
)
# Images of MHIST by the annotators, 0 to 7, who saw an SSA.
COUNTS = {
    "train": (537, 497, 302, 209, 151, 106, 154, 219),
    "test": (186, 208, 124, 99, 65, 62, 96, 137),
}
MAJORITY = 4
NOTICE = "SYNTHETIC: drawn by make_mhist_lookalike.py; no image of MHIST, and of no patient."
CELLS = 5  # crypts along a side


def count_images(share: float) -> dict[tuple[str, int], int]:
    """By partition and number of annotators, how many images; one at least.

    Raises:
        ValueError: for a share out of (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"count_images: expected a share in (0, 1], got {share}. Use 0.1.")
    return {
        (part, votes): max(1, round(count * share))
        for part, counts in COUNTS.items()
        for votes, count in enumerate(counts)
    }


def draw_crypts(votes: int, side: int, rng: np.random.Generator) -> Image.Image:
    """A picture whose crypts are the more serrated, the more annotators saw an SSA.

    Args:
        votes: 0 to 7.
        side: of the picture, in pixels.
        rng: of all else: stain, positions, noise.
    """
    stain = np.array([226, 178, 206]) + rng.normal(0, 8, 3)
    wide = 2 * side  # drawn twice as large, for smooth edges
    picture = Image.new("RGB", (wide, wide), tuple(stain.astype(int)))
    pen, step = ImageDraw.Draw(picture), wide / CELLS
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    for row in range(-1, CELLS + 1):
        for column in range(-1, CELLS + 1):
            serrated = np.clip(rng.normal(votes / 7, 0.12), 0, 1)
            x = (column + 0.5 * (row % 2) + 0.5 + rng.normal(0, 0.07)) * step
            y = (row + 0.5 + rng.normal(0, 0.07)) * step
            teeth, turn = rng.integers(6, 10), rng.uniform(0, 2 * np.pi)
            wave = 1 + 0.32 * serrated * np.sign(np.sin(teeth * angles + turn))
            radius = step * (0.27 + 0.12 * serrated) * wave * rng.uniform(0.9, 1.1)
            stretch = 1 + 0.5 * serrated * rng.uniform()
            for scale, colour in ((1.0, stain * (0.55, 0.45, 0.7)), (0.6, (245, 238, 244))):
                points = np.stack(
                    [
                        x + scale * radius * np.cos(angles) * stretch,
                        y + scale * radius * np.sin(angles),
                    ]
                )
                pen.polygon([*map(tuple, points.T)], fill=tuple(np.asarray(colour).astype(int)))
    small = np.asarray(picture.resize((side, side), Image.Resampling.BOX)).astype(float)
    noisy = small + rng.normal(0, 6, small.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def make_lookalike(out: Path, share: float, side: int, seed: int = 0) -> int:
    """Write ``images/``, ``annotations.csv`` and a notice; returns the number of images.

    Raises:
        FileExistsError: if there is a table already.
        ValueError: for a share out of (0, 1], or pictures of fewer than 32 pixels.
    """
    if side < 32:
        raise ValueError(f"make_lookalike: expected 32 pixels or more, got {side}. Use 96.")
    counts = count_images(share)
    table = out / "annotations.csv"
    if table.exists():
        raise FileExistsError(f"make_lookalike: expected a new folder, got {table}. Delete it.")
    (out / "images").mkdir(parents=True, exist_ok=True)
    made = f"Of its counts a share of {share:g}, {side} pixels wide, seed {seed}."
    (out / "SYNTHETIC.txt").write_text(f"{NOTICE}\n{made}\n")
    about = PngImagePlugin.PngInfo()
    about.add_text("Description", NOTICE)
    drawn = [key for key, count in counts.items() for _ in range(count)]
    order = np.random.default_rng(seed).permutation(len(drawn))  # names tell nothing
    rows = []
    for number, (part, votes) in enumerate(drawn[index] for index in order):
        letters = [string.ascii_lowercase[number // 26**power % 26] for power in (2, 1, 0)]
        name = f"SYNTHETIC_{''.join(letters)}.png"
        picture = draw_crypts(votes, side, np.random.default_rng([seed, number]))
        picture.save(out / "images" / name, pnginfo=about)
        rows.append((name, "SSA" if votes >= MAJORITY else "HP", votes, part))
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return len(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--share", type=float, default=1.0, help="of the counts (%(default)s)")
    parser.add_argument("--image-size", type=int, default=224, help="in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawings (%(default)s)")
    args = parser.parse_args()
    n = make_lookalike(args.out, args.share, args.image_size, args.seed)
    print(
        f"{n} SYNTHETIC images, none of MHIST: {args.out}/annotations.csv, {args.out}/SYNTHETIC.txt"
    )
