"""From nothing to a report: a teacher, a ranking of students, two of them distilled, and a page.

Trains a ResNet teacher on the built-in brain-MRI phantom, ranks untrained students for it by
DisWOT, distils a student thirteen times smaller from it, once by plain KD and once with relevance
maps (LRP + cosine), and compares them: a table on the terminal and in OUT/table.md, maps in
OUT/maps.png, and everything in OUT/report.html. Stopped and started again it goes on, and uses the
runs that are finished.

    python examples/demo.py --out demo
"""

import argparse
import time
from pathlib import Path

from kd_lrp_plugin.cli import console
from kd_lrp_plugin.config.build import construct
from kd_lrp_plugin.config.document import resolve_config
from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.evaluation import evaluate
from kd_lrp_plugin.evaluation.explain import explain
from kd_lrp_plugin.evaluation.explain_inputs import ExplainOptions
from kd_lrp_plugin.plots import tables
from kd_lrp_plugin.report import page
from kd_lrp_plugin.selection import select
from kd_lrp_plugin.selection.spec import SelectionSpec
from kd_lrp_plugin.torchdistill.models import make_builder
from kd_lrp_plugin.training.trainer import distill

CONFIGS = Path(__file__).resolve().parent.parent / "torchdistill_configs" / "phantom"
PAIR = "test_resnet_from_resnet10t.yaml"
RUNS = {
    "teacher": "ce/resnet10t.yaml",
    "KD": f"kd/{PAIR}",
    "LRP + cosine": f"lrp_cosine/{PAIR}",
}
LAYER = "layer2"  # an eighth of the image's size; at the last map, methods agree


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder (default: demo)")
    parser.add_argument("--seed", type=int, default=0, help="of every random number generator")
    parser.add_argument("--short", action="store_true", help="tiny data, one epoch: a trial")
    args = parser.parse_args()
    started = time.time()
    sizes, epochs, image_size = ((32, 16, 16), 1, 32) if args.short else ((1200, 200, 300), 6, 64)
    changes = [f"image_size={image_size}", f"train.num_epochs={epochs}", "num_workers=0"]
    for split, size in zip(("train", "val", "test"), sizes, strict=True):
        changes.append(f"datasets.phantom/{split}.init.kwargs.size={size}")
    of_teacher = f"models.teacher_model.src_ckpt={args.out}/runs/teacher/best.pt"

    folders = {}
    for name, config in RUNS.items():
        folders[name] = args.out / "runs" / name.replace(" + ", "_").lower()
        print(f"\n{name}: {config}")
        extra = [] if name == "teacher" else [of_teacher]
        with console.RichProgress():
            distill(RunSpec(CONFIGS / config, changes + extra, folders[name], args.seed))
        if name == "teacher":
            choice = rank([*changes, of_teacher], args.out / "selection.json", args.short)

    with console.RichProgress():
        evaluations = {name: evaluate.evaluate(folder) for name, folder in folders.items()}
        explained = explain(
            list(folders.values()),
            ExplainOptions(
                methods=["gradient_activation"],
                layers=[LAYER],
                n=4,
                samples=8 if args.short else None,
                out=args.out,
            ),
        )
        page_file = args.out / "report.html"
        page.write(list(folders.values()), page_file, selection=choice, maps=args.out)

    figures = {row["run"]: row["figures"] for row in explained if row["model"] == "student"}
    rows = []
    for (name, found), of_maps in zip(evaluations.items(), figures.values(), strict=True):
        student = found["student"]
        low, high = student["accuracy_interval"]
        rows.append(
            {
                "model": name,
                "accuracy": student["accuracy"],
                "95 % interval": f"{low:.3f}-{high:.3f}",
                "parameters": student["cost"]["parameters"],
                "MACs": student["cost"]["macs"],
                "attribution similarity": of_maps.get("attribution_similarity", {}).get("mean"),
                "relevance mass accuracy": of_maps["relevance_mass_accuracy"]["mean"],
            }
        )
    table = tables.table(rows)
    chance = next(iter(figures.values()))["relevance_mass_accuracy"]["chance"]
    note = f"Chance level of the relevance mass accuracy: {chance:.3f}, the tumour's share."
    (args.out / "table.md").write_text(f"{table}\n\n{note}\n", encoding="utf-8")
    print(f"\n{table}\n{note}")
    print(f"\nwrote {args.out}/table.md and {args.out}/maps.png in {time.time() - started:.0f} s")
    print(f"everything on one page: {page_file}")


def rank(changes: list[str], record: Path, short: bool) -> Path:
    """Untrained students, ranked for the trained teacher by DisWOT; the record of it."""
    kwargs = "models.student_model.kwargs"
    changes = [*changes, f"{kwargs}.record={record}"]
    if short:
        changes += [f"{kwargs}.batch_size=8", f"{kwargs}.seeds=[0]"]
    config = resolve_config(CONFIGS / "diswot" / "chosen_from_resnet10t.yaml", changes)
    models = construct(config.only("dependencies", "datasets", "models"))["models"]
    spec = SelectionSpec.from_kwargs(**models["student_model"]["kwargs"])
    if not record.exists():
        with console.RichProgress():
            select.save_choice(spec, select.Selection(spec, make_builder).rank())
    first = select.load_choice(spec)["kwargs"]["name"]
    print(f"\nof the untrained students, DisWOT puts {first} first")
    return record


if __name__ == "__main__":
    main()
