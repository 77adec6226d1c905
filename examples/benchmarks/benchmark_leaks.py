"""What kd-lrp check-data costs as the images grow in number, and what it finds of what was planted.

    python examples/benchmarks/benchmark_leaks.py --sizes 2000 20000
    python examples/benchmarks/benchmark_leaks.py --sizes 200000 --folder /tmp/leaks

Phantoms of 96 pixels, drawn and saved by as many processes as there are processors; one image in
twenty is a copy of another, in the other split, made in one of the ways of the second table. The
check runs in a process of its own, with what it would read and write for anybody. Seconds are of
the check alone, those of each part by its progress; memory is the largest resident set of its
process. Lost are planted pairs that pairs.csv does not have; others are pairs that nobody planted.

The copies marked as not promised are cut or turned by more than a near-duplicate may be: they show
where the definition ends, and do not count as lost.
"""

import argparse
import csv
import io
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track

from kd_lrp_plugin.data.leakage.check import check_data
from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.plots.tables import table
from kd_lrp_plugin.utils.progress import NullProgress

SIDE = 96
EVERY = 20  # one image in so many is a copy


def crop(pixels: int, image: Image.Image) -> Image.Image:
    return ImageOps.crop(image, pixels).resize(image.size, Image.Resampling.BILINEAR)


def recode(quality: int, image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("L")


def brighten(image: Image.Image) -> Image.Image:
    return image.point(lambda grey: min(255, round(1.15 * grey + 8)))


WAYS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "same pixels": lambda image: image,
    "mirrored": ImageOps.mirror,
    "JPEG of quality 40": partial(recode, 40),
    "mirrored, JPEG of quality 40": lambda image: recode(40, ImageOps.mirror(image)),
    "brighter": brighten,
    "smaller": lambda image: image.resize((72, 72)),
    "a quarter of a pixel of 96 cut off": lambda image: image.transform(
        image.size, Image.Transform.EXTENT, (0.25, 0.25, SIDE - 0.25, SIDE - 0.25), 2
    ),
    "not promised: 1 pixel of 96 cut off": partial(crop, 1),
    "not promised: 3 pixels of 96 cut off": partial(crop, 3),
}


def describe(number: int) -> tuple[str, str, int]:
    """File, way and original of an image; of one that is no copy the way is empty."""
    if number % EVERY == EVERY - 1:
        way = list(WAYS)[number // EVERY % len(WAYS)]
        return f"Testing/phantom/{number:07}.png", way, number - 1
    return f"Training/phantom/{number:07}.png", "", number


# --- drawing --------------------------------------------------------------------------------------


def draw_all(root: Path, size: int) -> None:
    for split in ("Training", "Testing"):
        (root / split / "phantom").mkdir(parents=True, exist_ok=True)
    tasks = range(0, size, EVERY)
    with multiprocessing.Pool(os.cpu_count(), prepare, (root, size)) as pool:
        drawn = pool.imap_unordered(draw, tasks)
        for _ in track(drawn, f"drawing {size:,}", len(tasks), console=Console(stderr=True)):
            pass


def prepare(root: Path, size: int) -> None:
    global ROOT, IMAGES
    ROOT, IMAGES = root, Phantom(size=size, image_size=SIDE)


def draw(first: int) -> None:
    for number in range(first, min(first + EVERY, len(IMAGES))):
        file, way, original = describe(number)
        image = IMAGES.image(original).convert("L")
        (WAYS[way](image) if way else image).save(ROOT / file, compress_level=1)


# --- measuring ------------------------------------------------------------------------------------


class Clock(NullProgress):
    """Seconds of each part of the check that tells its progress."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def track(self, items: Iterable, what: str, total: int) -> Iterable:
        started = time.monotonic()
        yield from items
        self.seconds[what] += time.monotonic() - started


def measure(root: Path, out: Path, sender) -> None:
    """In a process of its own: seconds and largest memory of the check."""
    started = time.monotonic()
    with Clock() as clock:
        check_data(root, out)
    seconds = time.monotonic() - started
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    parts = {name: clock.seconds[name] for name in ("reading images", "comparing")}
    sender.send({"seconds": seconds, **parts, "GiB": memory})


def compare(out: Path, size: int) -> tuple[dict[str, list[int]], int]:
    """By way, how many were planted and found; and how many pairs nobody planted."""
    with (out / "pairs.csv").open(newline="", encoding="utf-8") as lines:
        found = {frozenset((row["file_a"], row["file_b"])) for row in csv.DictReader(lines)}
    counts: dict[str, list[int]] = {}
    for number in range(EVERY - 1, size, EVERY):
        file, way, original = describe(number)
        pair = frozenset((file, describe(original)[0]))
        count = counts.setdefault(way, [0, 0])
        count[0] += 1
        count[1] += pair in found
        found.discard(pair)
    return counts, len(found)


def main() -> None:
    args = parse()
    rows, ways = [], {}
    spawn = multiprocessing.get_context("spawn")  # memory of its own
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            root, out = Path(folder, "images"), Path(folder, "out")
            draw_all(root, size)
            receiver, sender = spawn.Pipe(duplex=False)
            process = spawn.Process(target=measure, args=(root, out, sender))
            process.start()
            sender.close()
            measured = receiver.recv()
            process.join()
            counts, others = compare(out, size)
        promised = [count for way, count in counts.items() if not way.startswith("not promised")]
        planted, found = map(sum, zip(*promised, strict=True))
        row = {"images": size, **{k: round(v, 2) for k, v in measured.items()}}
        rows.append(row | {"planted": planted, "lost": planted - found, "others": others})
        ways[size] = counts
        print(json.dumps(rows[-1]), file=sys.stderr)
    print(table(rows))
    print("\nfound, of those that were planted\n")
    shown = [
        {"way": way} | {f"{size:,}": "{1} of {0}".format(*ways[size][way]) for size in args.sizes}
        for way in WAYS
    ]
    print(table(shown))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = partial(parser.add_argument, help="default: %(default)s")
    add("--sizes", type=int, nargs="+", default=[2_000, 20_000])
    add("--folder", type=Path, help="where images are drawn, and deleted; default: as for all")
    add("--short", action="store_true", help="a few hundred images: a trial, not a measurement")
    args = parser.parse_args()
    if args.short:
        args.sizes = [EVERY * len(WAYS)]
    return args


if __name__ == "__main__":
    main()
