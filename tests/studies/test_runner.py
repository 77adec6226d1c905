"""Studies plan what they say, run it once whatever happens, and compare what belongs together."""

import csv
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib import image as pictures
from matplotlib.figure import Figure
from small_runs import BASELINE, CONFIGS, KD, SMALL
from typer.testing import CliRunner

from kd_lrp_plugin.cli.console import parse_seeds
from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.evaluation.evaluate import evaluate
from kd_lrp_plugin.metrics.statistics import describe, holm, paired_difference
from kd_lrp_plugin.studies import executors, results, runner
from kd_lrp_plugin.studies.comparison import compare, summarise, value_at
from kd_lrp_plugin.studies.figure import study_figure
from kd_lrp_plugin.studies.markdown import study_markdown
from kd_lrp_plugin.studies.parser import read_plan
from kd_lrp_plugin.studies.plan import StudyOptions
from kd_lrp_plugin.studies.status import list_status
from kd_lrp_plugin.training.trainer import distill
from kd_lrp_plugin.utils import files
from kd_lrp_plugin.utils.progress import NullProgress
from kd_lrp_plugin.utils.workers import local_processes

TEACHER = CONFIGS / "phantom/ce/resnet10t.yaml"
TAUGHT = "models.teacher_model.src_ckpt={teacher}"
RATE = "train.optimizer.kwargs.lr"
STUDY = {
    "question": "Does KD help?",
    "seeds": 2,
    "prepare": {"teacher": {"config": str(TEACHER)}},
    "configurations": {
        "CE": {"config": str(BASELINE)},
        "KD": {"config": str(KD), "set": [TAUGHT]},
    },
    "compare_to": "CE",
    "measures": ["test_accuracy", "macro_f1"],
}
ALONE = {**STUDY, "prepare": {}, "configurations": {"CE": STUDY["configurations"]["CE"]}}


class Notes(NullProgress):
    """Remembers the notes, and counts what is tracked."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.counts: dict[str, tuple[int, int]] = {}

    def track(self, items, what, total):
        for done, item in enumerate(items, start=1):
            yield item
            self.counts[what] = done, total

    def note(self, text: str) -> None:
        self.notes.append(text)


def run_study(file: Path, overrides=(), **options) -> dict:
    return runner.run_study(file, StudyOptions(overrides, **options))


@pytest.fixture
def written(tmp_path: Path):
    """Writes a study, and gives its file."""

    def write(**changes) -> Path:
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
        return file

    return write


class TestPlan:
    def test_every_configuration_meets_every_seed_after_what_it_needs(self, written):
        plan = read_plan(written())
        assert [run.label for run in plan.trainings()] == [
            "teacher, seed 0",
            *(f"{name}, seed {seed}" for name in ("CE", "KD") for seed in (0, 1)),
        ]
        teacher = plan.prepared[0].folder
        assert [run.needs for run in plan.runs] == [(), (), (teacher,), (teacher,)]
        assert f"models.teacher_model.src_ckpt={teacher}/best.pt" in plan.runs[2].overrides

    def test_a_grid_is_crossed_with_the_configurations_of_its_axes(self, written):
        grid = {
            "rate": {"key": RATE, "values": [0.1, 0.2]},
            "schedule": {"short": ["train.num_epochs=3"], "long": [["train.num_epochs=5"]]},
        }
        configurations = {
            "one": {"config": str(BASELINE)},
            "two": {"config": str(BASELINE), "axes": ["schedule"]},
            "none": {"config": str(BASELINE), "axes": []},
        }
        file = written(grid=grid, configurations=configurations, compare_to="none", seeds=[4])
        plan = read_plan(file)
        assert [(run.cell, run.epochs) for run in plan.runs] == [
            ("one, rate 0.1, schedule short", 3),
            ("one, rate 0.1, schedule long", 5),
            ("one, rate 0.2, schedule short", 3),
            ("one, rate 0.2, schedule long", 5),
            ("two, schedule short", 3),
            ("two, schedule long", 5),
            ("none", 8),
        ]
        assert plan.runs[2].overrides == (f"{RATE}=0.2", "train.num_epochs=3")
        assert len({run.folder for run in plan.runs}) == 7

    def test_each_seed_may_have_a_teacher_of_its_own(self, written):
        prepare = {
            "teacher": {"config": str(TEACHER), "seed": "each"},
            "assistant": {"config": str(KD), "set": [TAUGHT], "seed": "each"},
        }
        student = {
            "config": str(KD),
            "set": [TAUGHT.replace("teacher}", "assistant}"), "batch_size=4"],
        }
        file = written(prepare=prepare, configurations={"KD": student}, compare_to=None)
        plan = read_plan(file)
        teachers, assistants = plan.prepared[:2], plan.prepared[2:]
        assert [run.seed for run in plan.prepared] == [0, 1, 0, 1]
        assert [run.needs for run in assistants] == [(run.folder,) for run in teachers]
        assert [run.needs for run in plan.runs] == [(run.folder,) for run in assistants]
        assert len({run.folder for run in plan.trainings()}) == 6
        assert read_plan(file, seeds=[1]).trainings()[-1] == plan.runs[1]
        once = {"teacher": {"config": str(TEACHER)}, "assistant": prepare["assistant"]}
        shared = read_plan(written(prepare=once, configurations={"KD": student}, compare_to=None))
        assert [run.needs for run in shared.prepared[1:]] == [(shared.prepared[0].folder,)] * 2
        for seed in (0, 7):  # 0 is one of the study's, so that there is such a teacher
            fixed = {**prepare, "assistant": {**prepare["assistant"], "seed": seed}}
            with pytest.raises(ValueError, match=r"'assistant': seed: expected each.*'teacher'"):
                read_plan(written(prepare=fixed))

    def test_a_part_of_a_study_is_the_same_runs(self, written):
        grid = {"rate": {"key": "train.optimizer.kwargs.lr", "values": [0.1, 0.01]}}
        full = read_plan(written(grid=grid))
        part = read_plan(written(grid=grid), only=["configuration=CE", "rate=0.01"])
        assert [(run.name, run.point, run.seed) for run in part.runs] == [
            *(("CE", {"rate": 0.01}, 0), ("CE", {"rate": 0.01}, 1))
        ]
        assert {run.folder for run in part.runs} < {run.folder for run in full.runs}
        assert (part.axes, part.prepared) == ({"rate": (0.01,)}, ())
        taught = read_plan(written(grid=grid), only=["configuration=KD", "configuration=CE"])
        assert taught.trainings() == full.trainings()
        assert read_plan(written(), only=["configuration=KD"]).compare_to is None

    def test_a_part_that_is_not_there_is_refused(self, written):
        with pytest.raises(ValueError, match=r"--only configuration: .*got 'KE'.*'KD'"):
            read_plan(written(), only=["configuration=KE"])
        with pytest.raises(ValueError, match=r"--only: .*got 'rate'"):
            read_plan(written(), only=["rate=1"])

    def test_later_overrides_win_all_the_way_to_the_command_line(self, written):
        configurations = {"CE": {"config": str(BASELINE), "set": [f"{RATE}=2"]}}
        grid = {"rate": {"key": RATE, "values": [3]}}
        file = written(set=[f"{RATE}=1"], configurations=configurations, grid=grid)
        overrides = read_plan(file, [f"{RATE}=4"]).runs[0].overrides
        assert overrides == tuple(f"{RATE}={value}" for value in (1, 2, 3, 4))

    def test_studies_with_the_same_run_share_its_folder(self, written):
        one = read_plan(written())
        renamed = {"my baseline": STUDY["configurations"]["CE"]}
        other = read_plan(written(configurations=renamed, compare_to=None, question="?"))
        assert [r.folder for r in other.runs] == [r.folder for r in one.runs if r.name == "CE"]

    def test_another_value_or_teacher_is_another_run(self, written):
        runs = read_plan(written()).runs
        changed = read_plan(written(), [f"{RATE}=0.001"]).runs
        taught = {"teacher": {"config": str(TEACHER), "seed": 5}}
        other_teacher = read_plan(written(prepare=taught)).runs
        assert not {r.folder for r in runs} & {r.folder for r in changed}
        assert [a.folder == b.folder for a, b in zip(runs, other_teacher, strict=True)] == [
            *(True, True),
            *(False, False),
        ]

    def test_runs_stay_known_where_their_root_is_moved(self, written):
        here, there = read_plan(written(), root="runs"), read_plan(written(), root="/else/where")
        for one, other in zip(here.trainings(), there.trainings(), strict=True):
            assert one.folder.relative_to("runs") == other.folder.relative_to("/else/where")

    def test_the_seed_can_stand_in_an_override(self, written):
        key = "datasets.phantom/train.init.kwargs.seed"
        configurations = {"CE": {"config": str(BASELINE), "set": [f"+{key}={{seed}}"]}}
        runs = read_plan(written(configurations=configurations, seeds=[0, 7])).runs
        assert [run.overrides for run in runs] == [(f"+{key}=0",), (f"+{key}=7",)]
        assert runs[0].folder.parent != runs[1].folder.parent

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"sedes": 3}, "study.yaml: key.*Did you mean 'seeds'"),
            ({"question": ""}, "expected a 'question'"),
            ({"seeds": [0, -1]}, "study.yaml: seeds.*integers of 0 or more"),
            ({"seeds": []}, "one seed or more"),
            ({"compare_to": "KT"}, "compare_to.*Did you mean 'KD'"),
            ({"grid": {"rate": {"key": RATE}}}, "grid 'rate'.*a 'values'"),
            ({"set": {"a": 1}}, "set: expected a list"),
            ({"measures": "test_accuracy"}, "measures: expected a list"),
            ({"measures": ["macro_f2"]}, "measures: expected one of.*Did you mean 'macro_f1'"),
            ({"measures": ["last.val_acuracy"]}, r"measures: last\..*mean 'val_accuracy'"),
            ({"measures": ["student.cost.mac"]}, r"measures: student\.cost\..*mean 'macs'"),
            (
                {"configurations": {n: {"config": str(BASELINE)} for n in ("CE", "also")}},
                "'CE' and 'also' with the same config",
            ),
            (
                {"grid": {"rate": {"a": [f"{RATE}=1"], "b": [f"{RATE}=1"]}}},
                "'CE, rate a' and 'CE, rate b' with the same config",
            ),
            ({"prepare": {"a b": {"config": str(TEACHER)}}}, "a name of letters"),
        ],
    )
    def test_a_wrong_study_is_refused_with_its_location(self, written, changes, words):
        with pytest.raises(ValueError, match=words):
            read_plan(written(**changes))

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"set": ["train.num_epoch=3"]}, "'CE': --set train.num_epoch.*mean 'num_epochs'"),
            ({"set": ["src_ckpt"]}, "'CE': set: expected overrides key=value"),
            ({"set": ["train.num_epochs={tacher}"]}, "'CE': set: in braces.*mean 'teacher'"),
            ({"axes": ["tau"]}, "'CE': axes: expected one of"),
            ({"conifg": 1}, "'CE': key.*Did you mean 'config'"),
            ({"config": None}, "'CE': expected a mapping with a config"),
        ],
    )
    def test_a_wrong_configuration_is_named_with_its_study(self, written, changes, words):
        entry = {**STUDY["configurations"]["CE"], **changes}
        with pytest.raises(ValueError, match=f"study.yaml: configuration.*{words}"):
            read_plan(written(configurations={"CE": entry}, compare_to=None))

    def test_files_that_are_not_there_are_named(self, written):
        with pytest.raises(FileNotFoundError, match="'CE': config: expected a file, got none at"):
            read_plan(written(configurations={"CE": {"config": "no.yaml"}}))
        untaught = {"KD": {"config": str(KD)}}
        with pytest.raises(
            FileNotFoundError, match=r"'KD': models\.teacher_model: src_ckpt.*braces"
        ):
            read_plan(written(configurations=untaught))
        with pytest.raises(FileNotFoundError, match="study: expected a YAML file"):
            read_plan("no_study.yaml")

    @pytest.mark.parametrize("axis", ["configuration", "seed", "macro_f1"])
    def test_an_axis_has_a_name_of_its_own(self, written, axis):
        with pytest.raises(ValueError, match=f"a name of its own for an axis, got '{axis}'"):
            read_plan(written(grid={axis: {"key": RATE, "values": [0.1]}}))

    def test_a_teacher_that_is_also_a_configuration_is_trained_once_and_first(self, written):
        teacher = {"teacher": {"config": str(TEACHER)}}
        plan = read_plan(written(configurations={**STUDY["configurations"], **teacher}, seeds=1))
        labels = [run.label for run in plan.trainings()]
        assert labels == ["teacher, seed 0", "CE, seed 0", "KD, seed 0"]

    def test_text_that_is_not_yaml_is_refused(self, tmp_path):
        (tmp_path / "broken.yaml").write_text("question: [")
        with pytest.raises(ValueError, match=r"broken\.yaml: expected YAML"):
            read_plan(tmp_path / "broken.yaml")

    def test_a_configuration_that_is_there_twice_is_refused(self, written):
        file = written()
        text = file.read_text()
        again = text.replace("configurations:\n", f"configurations:\n  CE: {{config: {KD}}}\n")
        assert again != text
        file.write_text(again)
        with pytest.raises(ValueError, match=r"each key once in a mapping, got 'CE' at .*yaml:"):
            read_plan(file)

    @pytest.mark.parametrize(
        ("measure", "example"),
        [
            ("groups.random.accuracy", "groups.by_group.random.accuracy"),
            ("groups.by_group.random.acuracy", "groups.by_group.random.accuracy"),
            ("teacher.groups.worst_group", "teacher.groups.by_group.random.accuracy"),
            ("per_class.recall", "per_class.0.recall"),
            ("accuracy_interval", "accuracy_interval.0"),
            ("student.confusion_matrix", "student.confusion_matrix.0.1"),
            ("test_accuracy.mean", "test_accuracy"),
            ("last.val_accuracy.x", "last.val_accuracy"),
            ("student.insertion", "student.gradient.layer2.insertion"),
            ("audit.relevance.student.marker", "audit.relevance.student.border.mean"),
            ("audit.replaced.student.corners.flips", "audit.replaced.student.border.blur.flips"),
            ("audit.most_flips.student", "audit.most_flips"),
        ],
    )
    def test_a_measure_that_can_be_no_number_is_refused(self, written, measure, example):
        words = f"measures: expected a number such as {re.escape(example)}, got '{measure}'"
        with pytest.raises(ValueError, match=words):
            read_plan(written(measures=[measure]))

    @pytest.mark.parametrize(
        "measure",
        [
            "groups.by_group.site 1.5.accuracy",
            "groups.by_group.random.accuracy_interval.1",
            "student.groups.worst_group_accuracy",
            "confusion_matrix.0.3",
            "per_class.11.f1",
            "teacher.gradient_activation.blocks.4.insertion",
            "audit.replaced.teacher.most relevant outside.swap.accuracy",
            "audit.object_removed.student.accuracy",
            "student_and_teacher.p_value",
        ],
    )
    def test_a_measure_may_be_a_number_anywhere(self, written, measure):
        assert read_plan(written(measures=[measure])).measures == (measure,)

    @pytest.mark.parametrize("values", [[0.1, 0.1], [0, False], [2, True, 1]])
    def test_a_value_that_is_there_twice_is_refused(self, written, values):
        with pytest.raises(ValueError, match=r"grid 'lr': values: expected each value once"):
            read_plan(written(grid={"lr": {"key": RATE, "values": values}}))

    def test_seeds_are_typed_as_a_number_of_them_or_one_by_one(self):
        assert [parse_seeds(text) for text in ("3", "3,", "0 2", None)] == [3, [3], [0, 2], None]
        with pytest.raises(ValueError, match="--seeds: expected numbers, got 'a'"):
            parse_seeds("a")

    def test_a_number_of_seeds_begins_with_those_of_the_file(self, written):
        file = written(**{**ALONE, "seeds": [7, 1]})
        found = {n: read_plan(file, seeds=n).seeds for n in (1, 2, 4)}
        assert found == {1: (7,), 2: (7, 1), 4: (7, 1, 0, 2)}

    @pytest.mark.parametrize("file", sorted((CONFIGS / "studies").glob("*.yaml")), ids=str)
    def test_every_study_of_the_repository_can_be_planned(self, file):
        if (
            file.stem != "phantom"
            and not Path(os.environ.get("KD_LRP_DATA", ""), "weights").is_dir()
        ):
            pytest.skip("KD_LRP_DATA names no folder with weights")
        plan = read_plan(file, seeds=1)
        assert len({(run.name, *run.point.items()) for run in plan.runs}) == len(plan.runs)
        heads = [line.partition(":")[0] for line in file.read_text().splitlines()[:2]]
        assert heads == ["# Question", "# Row"]
        assert f"# Run: kd-lrp study torchdistill_configs/studies/{file.name}" in file.read_text()


# --- comparing ------------------------------------------------------------------------------------


def make_rows(values: dict[tuple, list[float | None]]) -> list[dict]:
    """Rows of cells (configuration, then axis and value in turn) with one value per seed."""
    return [
        {
            "configuration": name,
            "point": dict(zip(point[::2], point[1::2], strict=True)),
            "seed": seed,
            "measures": {"accuracy": value},
        }
        for (name, *point), numbers in values.items()
        for seed, value in enumerate(numbers)
    ]


class TestComparing:
    ROWS = make_rows(
        {
            ("CE",): [0.80, 0.82, 0.84],
            ("KD", "tau", 1): [0.82, 0.85, None],
            ("KD", "tau", 4): [0.86, 0.89, 0.87],
        }
    )

    def test_cells_are_described_by_the_runs_that_have_the_measure(self):
        found = summarise(self.ROWS, ["accuracy"])
        assert [(r["configuration"], r["point"], r["n"]) for r in found] == [
            ("CE", {}, 3),
            ("KD", {"tau": 1}, 2),
            ("KD", {"tau": 4}, 3),
        ]
        assert found[1]["low"] == describe([0.82, 0.85])["low"]

    def test_each_place_of_the_grid_is_paired_with_the_reference_seed_by_seed(self):
        one, two = compare(self.ROWS, ["accuracy"], "CE")
        expected = paired_difference({0: 0.82, 1: 0.85}, {0: 0.80, 1: 0.82})
        assert one["p"] == expected["p"]
        assert (one["n"], two["n"]) == (2, 3)
        assert [one["p_holm"], two["p_holm"]] == holm([one["p"], two["p"]])
        assert two["p"] < one["p"]
        assert two["p_holm"] == pytest.approx(2 * two["p"])

    def test_a_reference_on_the_grid_is_compared_at_the_same_place_of_it(self):
        rows = make_rows(
            {
                ("KD", "images", 5): [0.5, 0.6],
                ("KD", "images", 20): [0.7, 0.8],
                ("LRP", "images", 5): [0.6, 0.8],
                ("LRP", "images", 20): [0.7, 0.9],
                ("CE",): [0.1, 0.2],
            }
        )
        found = {tuple(r["point"].items()): r for r in compare(rows, ["accuracy"], "KD")}
        assert [found[("images", n),]["mean"] for n in (5, 20)] == pytest.approx([0.15, 0.05])
        assert len(found) == 2

    def content(self, rows, **changes) -> dict:
        return {
            "question": "Q?",
            "final": True,
            "state": "All are finished.",
            "failed": {},
            "axes": {"tau": [1, 4]},
            "compare_to": "CE",
            "measures": ["accuracy"],
            "runs": rows,
            "table": summarise(rows, ["accuracy"]),
            "comparisons": compare(rows, ["accuracy"], "CE"),
            **changes,
        }

    def test_the_page_shows_means_intervals_and_differences(self):
        text = study_markdown(self.content(self.ROWS))
        row = next(line for line in text.splitlines() if re.match(r"\| KD +\| +4", line))
        assert "0.8733 ± 0.0153" in row
        assert "+0.0533" in row
        assert "0.8354 to 0.9113" in row

    def test_teachers_with_seeds_have_an_interval(self):
        rows = make_rows({("teacher",): [0.9, 0.94, 0.95], ("assistant",): [0.8]})
        text = study_markdown(self.content(self.ROWS, prepared_table=summarise(rows, ["accuracy"])))
        found = describe([0.9, 0.94, 0.95])
        row = next(line for line in text.splitlines() if line.startswith("| teacher "))
        assert f"{found['mean']:.4f} ± {found['std']:.4f}" in row
        assert f"{found['low']:.4f} to {found['high']:.4f}" in row
        assert "| assistant" not in text

    def test_one_seed_is_called_an_anecdote(self):
        rows = [row for row in self.ROWS if row["seed"] == 0]
        text = study_markdown(self.content(rows))
        assert "no interval and no test" in text
        assert "0.8200" in text
        assert "0.8200 ±" not in text

    def test_a_measure_that_no_run_has_is_said_to_be_absent(self):
        rows = [{**row, "measures": {"accuracy": None}} for row in self.ROWS]
        assert "Nothing to show: no finished run has it" in study_markdown(self.content(rows))

    def test_what_no_seed_changes_is_one_table_without_tests_and_is_not_drawn(self):
        size = {"CE": 9.5, "KD": 410_208.0}
        rows = [
            {**row, "measures": row["measures"] | {"parameters": size[row["configuration"]]}}
            for row in self.ROWS
        ]
        names = ["parameters", "accuracy"]
        changes = {"table": summarise(rows, names), "comparisons": compare(rows, names, "CE")}
        content = self.content(rows, measures=names, **changes)
        text = study_markdown(content)
        assert "## parameters" not in text
        found = text.partition("## The same at every seed")[2].partition("##")[0]
        cells = [[cell.strip() for cell in line.split("|")] for line in found.splitlines()]
        assert ["", "KD", "4", "410,208", ""] in cells
        assert ["", "CE", "-", "9.5000", ""] in cells
        assert [ax.get_title() for ax in study_figure(content).get_axes()] == ["accuracy"]

        rows[-1]["measures"]["parameters"] += 1
        content |= {"runs": rows, "table": summarise(rows, names)}
        assert "## parameters" in study_markdown(content)
        assert "The same at every seed" not in study_markdown(content)

    def test_the_best_place_of_a_grid_is_chosen_by_validation_alone(self):
        rows = [{**r, "measures": {"val_accuracy": r["measures"]["accuracy"]}} for r in self.ROWS]
        names = ["val_accuracy"]
        changes = {"measures": names, "table": summarise(rows, names), "comparisons": []}
        assert "Highest val_accuracy: KD, tau 4 (0.8733)" in study_markdown(
            self.content(rows, **changes)
        )
        assert "Highest" not in study_markdown(self.content(self.ROWS))

    def test_a_grid_is_drawn_over_its_first_axis_and_others_as_dots(self):
        (over,) = study_figure(self.content(self.ROWS)).get_axes()
        (dots,) = study_figure(self.content(self.ROWS, axes={})).get_axes()
        assert over.get_xlabel() == "tau"
        rows = make_rows({("KD", "tau", value): [0.8, 0.9] for value in ("low", "high")})
        (names,) = study_figure(self.content(rows, axes={"tau": ["low", "high"]})).get_axes()
        assert [ax.get_lines()[-1].get_linestyle() for ax in (over, names)] == ["-", "None"]
        assert [label.get_text() for label in over.get_xticklabels()] == ["1", "4"]
        assert [label.get_text() for label in dots.get_yticklabels()] == [
            *("CE", "KD, tau 1", "KD, tau 4")
        ]

    @pytest.mark.parametrize(
        "values",
        [["patch", "patch 0.98", "patch 0.9", "glyph", "frame", "diffuse"], ["a_" * 16, 2]],
    )
    def test_words_below_a_plot_do_not_touch(self, values):
        rows = make_rows({("KD", "marker", value): [0.8, 0.9] for value in values})
        content = self.content(rows, axes={"marker": values})
        measures = ["test_accuracy", "macro_f1", "test_accuracy"]  # plots as narrow as they get
        figure = study_figure({**content, "measures": measures})
        figure.canvas.draw()
        labels = figure.get_axes()[0].get_xticklabels()
        boxes = [label.get_window_extent() for label in labels]
        upright = all(label.get_rotation() == 0 for label in labels)
        apart = all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
        assert apart if upright else len({label.get_rotation() for label in labels}) == 1
        assert upright is (max(map(len, map(str, values))) < 20)

    def test_lines_that_are_too_many_to_be_told_apart_become_dots(self):
        rows = make_rows({("KD", "tau", 1, "alpha", a): [0.8, 0.9] for a in range(9)})
        (ax,) = study_figure(self.content(rows, axes={"tau": [1], "alpha": [*range(9)]})).get_axes()
        assert ax.get_yticklabels()[8].get_text() == "KD, tau 1, alpha 8"

    def test_the_path_of_a_measure_is_broken_above_its_plot(self):
        measure = "student.gradient_activation.blocks.4.attribution_similarity"
        rows = [{**row, "measures": {measure: 0.5}} for row in self.ROWS]
        content = self.content(rows, measures=[measure], table=summarise(rows, [measure]))
        title = study_figure(content).get_axes()[0].get_title()
        assert title == "student.gradient_activation.\nblocks.4.\nattribution_similarity"


# --- running, with processes that only pretend ----------------------------------------------------

PRETEND = """
import json, os, sys, time
from pathlib import Path
job = json.loads(sys.argv[1])
out, how = Path(job["out"]), {o.partition("=")[0]: o.partition("=")[2] for o in job["overrides"]}
out.mkdir(parents=True, exist_ok=True)
starts = out.with_name(f"{job['seed']}.starts")
with starts.open("a") as file:
    file.write(f"{os.getpid()}\\n")
first = len(starts.read_text().split()) == 1
if how.get("+note") == "fails":
    sys.exit("Error: of before\\nThe run has failed: Error: it is broken")
if how.get("+note") == "hangs" and first:
    while os.read(0, 1):
        pass
    sys.exit(130)
if how.get("+note") == "busy" and first:
    sys.exit(75)
accuracy = (0.7 if how.get("+note") else 0.5) + job["seed"] / 100
"""
FINISH = """
for name in ("best.pt", "student.safetensors", "predictions.csv"):
    (out / name).touch()
(out / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "val_accuracy": 0.5}) + "\\n")
(out / "evaluation.json").write_text(json.dumps({"student": {"macro_f1": f1}}))
summary = {"test_accuracy": accuracy, "seconds": 1, "epochs": 1, "parameters": 9, "classes": []}
summary |= {"preprocessing": None, "image_shape": [3, 8, 8]}
(out / "summary.json").write_text(json.dumps(summary))
"""


def finish(out: Path, accuracy: float, f1: float) -> None:
    """Leave in a folder what a finished run leaves."""
    exec(FINISH, {"json": json, "out": out, "accuracy": accuracy, "f1": f1})


@pytest.fixture
def pretending(tmp_path, monkeypatch):
    """Runs are pretended, and nothing is checked before."""
    (tmp_path / "pretend.py").write_text(f"{PRETEND}f1 = 0.6\n{FINISH}")
    monkeypatch.setattr(executors, "COMMAND", (str(tmp_path / "pretend.py"),))
    monkeypatch.setattr(runner, "_refuse_problems", lambda *_: None)
    monkeypatch.setattr(results, "study_figure", lambda _: Figure(figsize=(0.1, 0.1)))
    monkeypatch.chdir(tmp_path)


def starts(tmp_path: Path) -> dict[str, int]:
    """How often each run was begun, by folder."""
    files = (tmp_path / "runs").rglob("*.starts")
    return {str(file.with_suffix("")): len(file.read_text().split()) for file in files}


def noted(how: str) -> dict:
    """CE as it is, and CE whose pretended process fails, hangs or is busy, or does well."""
    return {
        "CE": {"config": str(BASELINE)},
        "other": {"config": str(BASELINE), "set": [f"+note={how}"]},
    }


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    if not state.exists():
        return False
    return state.read_text().rpartition(")")[2].split()[0] != "Z"


def job_that_fails(monkeypatch, distill) -> int:
    """Exit status of a study's job whose training is this function."""
    monkeypatch.setattr(executors, "distill", distill)
    monkeypatch.setattr(executors, "end_with_parent", lambda interrupt: None)
    monkeypatch.setattr(sys, "argv", ["-c", json.dumps({"config": "my.yaml", "out": "nowhere"})])
    with pytest.raises(SystemExit) as stopped:
        executors.run_job()
    return stopped.value.code


@pytest.mark.usefixtures("pretending")
class TestRunning:
    def test_results_are_one_row_per_run_and_paired_by_seed(self, written, tmp_path, monkeypatch):
        monkeypatch.setattr(results, "study_figure", study_figure)
        file = written(configurations=noted("well"), prepare={}, seeds=3)
        content = run_study(file, out="out", jobs=3)
        assert content["final"]
        assert json.loads((tmp_path / "out/study.json").read_text()) == content
        with (tmp_path / "out/study.csv").open() as lines:
            rows = list(csv.DictReader(lines))
        assert [float(row["test_accuracy"]) for row in rows] == [0.5, 0.51, 0.52, 0.7, 0.71, 0.72]
        first = content["comparisons"][0]
        assert (first["n"], first["mean"]) == (3, pytest.approx(0.2))
        assert "All 6 runs are finished" in (tmp_path / "out/table.md").read_text()
        assert pictures.imread(tmp_path / "out/study.png").std() > 0.05

    def test_nothing_runs_twice_in_this_study_or_another(self, written, tmp_path):
        run_study(written(), out="out", jobs=2)
        before, notes = starts(tmp_path), Notes()
        assert set(before.values()) == {1}
        assert len(before) == 5
        with notes:
            run_study(written(), out="out")
        assert notes.notes == ["all 5 runs are finished already"]
        run_study(written(**{**ALONE, "seeds": 3}), out="other")
        after = starts(tmp_path)
        assert {name: after[name] for name in before} == before
        assert len(after) == 6

    def test_every_configuration_has_a_seed_before_one_has_two(self, written):
        notes = Notes()
        with notes:
            run_study(written(configurations=noted("well"), prepare={}), out="out")
        ended = [note.partition(":")[0] for note in notes.notes]
        assert ended == ["CE, seed 0", "other, seed 0", "CE, seed 1", "other, seed 1"]

    def test_a_failing_run_is_named_with_its_words_and_the_others_go_on(self, written):
        notes = Notes()
        file = written(configurations=noted("fails"), prepare={})
        with notes:
            content = run_study(file, out="out")
        assert list(content["failed"]) == ["other, seed 0", "other, seed 1"]
        assert content["failed"]["other, seed 0"] == "Error: it is broken"
        assert content["state"] == "Not final: 2 of 4 runs are finished."
        assert any(
            re.match(r"other, seed 0: failed: Error: it is broken \(log: .*0\.log\)", n)
            for n in notes.notes
        )
        assert notes.counts["epochs"] == (32, 32)
        assert "Not final: 2 of 4" in Path("out/table.md").read_text()

    def test_what_needs_a_failed_run_is_not_begun(self, written, tmp_path):
        prepare = {"teacher": {"config": str(TEACHER), "set": ["+note=fails"]}}
        content = run_study(written(prepare=prepare), out="out", jobs=2)
        assert list(content["failed"]) == ["teacher, seed 0", "KD, seed 0", "KD, seed 1"]
        assert "not begun" in content["failed"]["KD, seed 0"]
        assert sorted(Path(run).parent.name.split("-")[0] for run in starts(tmp_path)) == [
            *("resnet10t", "test_resnet", "test_resnet")
        ]

    def test_a_killed_study_goes_on_and_begins_nothing_twice_that_was_finished(
        self, written, tmp_path
    ):
        file = written(configurations=noted("hangs"), prepare={}, seeds=1)
        process = multiprocessing.get_context("fork").Process(
            target=run_study, args=(file,), kwargs={"out": "out", "jobs": 2}
        )
        process.start()
        runs = {run.name: run.folder for run in read_plan(file).runs}
        hanging = runs["other"].with_name("0.starts")
        until(lambda: hanging.exists() and (runs["CE"] / "summary.json").exists())
        pid = int(until(hanging.read_text))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        until(lambda: not alive(pid))  # the run ends with the study
        assert run_study(file, out="out")["final"]
        assert len(runs["CE"].with_name("0.starts").read_text().split()) == 1
        assert len(hanging.read_text().split()) == 2

    def test_a_stop_ends_the_runs_and_leaves_the_results_so_far(self, written):
        class Stops(NullProgress):
            def note(self, text: str) -> None:
                raise KeyboardInterrupt

        file = written(configurations=noted("hangs"), prepare={}, seeds=1)
        quick, hangs = (run.folder for run in read_plan(file).runs)
        hanging, results = hangs.with_name("0.starts"), Path("out/study.json")
        with pytest.raises(KeyboardInterrupt), Stops():
            run_study(file, out="out", jobs=2)
        assert not hanging.exists() or not alive(int(hanging.read_text() or -1))
        found = {
            row["folder"]: row["state"] for row in json.loads(until(results.read_text))["runs"]
        }
        assert found == {str(quick): "finished", str(hangs): "not begun"}

    def test_a_run_with_another_process_is_left_to_it_and_collected(self, written, tmp_path):
        file = written(**{**ALONE, "seeds": 1})
        folder, notes = read_plan(file).runs[0].folder, Notes()
        folder.mkdir(parents=True)
        lock = ExitStack()
        lock.enter_context(files.locked(folder / ".lock"))

        def other() -> None:
            finish(folder, 0.9, 0.1)
            lock.close()

        timer = threading.Timer(0.6, other)
        timer.start()
        assert list_status(read_plan(file))[0]["state"] == "not begun, running"
        with notes:
            content = run_study(file, out="out")
        assert notes.notes == ["CE, seed 0: another process is running it; waiting"]
        assert content["runs"][0]["measures"]["test_accuracy"] == 0.9
        assert starts(tmp_path) == {}

    def test_a_process_that_finds_another_one_at_work_is_tried_again(self, written, tmp_path):
        file = written(configurations=noted("busy"), prepare={}, seeds=1)
        assert run_study(file, out="out")["final"]
        assert sorted(starts(tmp_path).values()) == [1, 2]

    def test_results_of_another_study_or_of_more_seeds_are_not_overwritten(self, written):
        file = written(**ALONE)
        run_study(file, out="out")
        with pytest.raises(FileExistsError, match=r"further seeds \[1\]"):
            run_study(file, seeds=1, out="out")
        with pytest.raises(FileExistsError, match=r"which holds --set \[\]"):
            run_study(file, ["batch_size=4"], out="out")
        with pytest.raises(FileExistsError, match="which holds all of the study"):
            run_study(file, out="out", only=["configuration=CE"])
        other = written(**{**ALONE, "question": "Else?"})
        with pytest.raises(FileExistsError, match=r"which holds the study .*\(Does KD help\?\)"):
            run_study(other, out="out")
        with pytest.raises(FileExistsError, match=r"which holds the study .*study\.yaml"):
            run_study(written(**ALONE).rename(file.with_name("b.yaml")), out="out")
        b = file.with_name("b.yaml")
        assert run_study(b, out="b", only=["configuration=CE"])["final"]
        assert run_study(b, out="b")["only"] == []

    def test_two_studies_at_once_do_not_write_into_one_folder(self, written):
        """The other one begins while this one is running."""

        class Meanwhile(Notes):
            def note(self, text: str) -> None:
                super().note(text)
                if len(self.notes) == 1:
                    run_study(file, out="out")

        file = written(configurations=noted("well"), prepare={}, seeds=1)
        with pytest.raises(FileExistsError, match="all of the study"), Meanwhile():
            run_study(file, out="out", only=["configuration=CE"])
        assert json.loads(Path("out/study.json").read_text())["only"] == []

    def test_a_process_that_cannot_be_started_is_no_busy_one(self, monkeypatch):
        """BlockingIOError is also what a fork raises where no more processes are allowed."""

        def no_fork(_):
            raise BlockingIOError(11, "Resource temporarily unavailable")

        assert job_that_fails(monkeypatch, no_fork) == 1

    def test_a_run_of_other_weights_is_not_taken_over(self, written):
        file = written(seeds=1)
        run_study(file, out="out")
        (teacher,), (_, student) = (read_plan(file).prepared, read_plan(file).runs)
        (teacher.folder / "best.pt").write_bytes(b"as it was")
        key = "models.teacher_model.src_ckpt"
        about = {"seed": 0, "files": {key: "0123456789abcdef"}, "sessions": []}
        (student.folder / "environment.json").write_text(json.dumps(about))
        with pytest.raises(FileExistsError, match=rf"KD, seed 0 .*{key} '0123456789abcdef', now '"):
            run_study(file, out="out")

    def test_more_seeds_are_added_to_the_results(self, written):
        file = written(**ALONE)
        run_study(file, seeds=1, out="out")
        assert run_study(file, seeds=[0, 3], out="out")["seeds"] == [0, 3]

    def test_the_command_prints_the_table_and_fails_where_a_run_does(self, written):
        file = written(configurations=noted("fails"), prepare={}, seeds=1)
        shown = CliRunner().invoke(app, ["study", str(file), "--dry-run"])
        assert shown.exit_code == 0
        assert shown.output.count("not begun") == 2
        done = CliRunner().invoke(app, ["study", str(file), "--jobs", "2"])
        assert done.exit_code == 1
        assert "Not final: 1 of 2" in done.output
        assert Path("runs/studies/study/study.csv").exists()
        again = CliRunner().invoke(app, ["study", str(file), "--dry-run"])
        assert again.output.count("finished") == 1


def until(found, seconds: float = 600):
    """What ``found`` returns, as soon as that is something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.05)
    raise TimeoutError(found)


class TestMeasures:
    def test_a_dotted_path_is_followed_through_keys_with_dots_and_lists(self):
        node = {"map": {"blocks.4": [{"mass": 0.25}], "n": 3}, "blocks": None, "nan": float("nan")}
        paths = ("map.blocks.4.0.mass", "map.n", "map.blocks.5", "map", "nan", "blocks.4")
        assert [value_at(node, p) for p in paths] == [0.25, 3.0, *[None] * 4]

    def test_what_an_audit_has_found_is_a_measure(self, written, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        measure = "audit.replaced.student.corners.blur.flips"
        file = written(**{**ALONE, "measures": [measure, "test_accuracy"], "seeds": 1})
        (run,) = read_plan(file).runs
        run.folder.mkdir(parents=True)
        finish(run.folder, 0.5, 0.6)
        assert results.collect_results(read_plan(file))["runs"][0]["measures"][measure] is None
        found = {"relevance": {}, "replaced": {"student": {"corners": {"blur": {"flips": 0.25}}}}}
        (run.folder / "audit.json").write_text(json.dumps(found))
        assert results.collect_results(read_plan(file))["runs"][0]["measures"][measure] == 0.25
        with pytest.raises(ValueError, match=r"measures: audit\..*Did you mean 'replaced'"):
            read_plan(written(**{**ALONE, "measures": ["audit.replace.x"]}))

    def test_figures_of_maps_are_found_by_model_method_and_layer(self):
        rows = [
            {"model": "student", "method": "grad_cam", "layer": "blocks.6", "samples": samples}
            | {"metrics": {"relevance_mass_accuracy": {"mean": mean, "n": n, "undefined": 4}}}
            for samples, n, mean in ((None, 32, 0.1), (400, 400, 0.4), (8, 8, 0.2))
        ]
        found = results.average_maps({"rows": rows})
        assert value_at(found, "student.grad_cam.blocks.6.relevance_mass_accuracy") == 0.4


# --- running in earnest ---------------------------------------------------------------------------


# The command of a run that waits in its second epoch until it is stopped.
WAITING = """
import time
from kd_lrp_plugin.studies.executors import run_job
from kd_lrp_plugin.training.trainer import Trainer
train_epoch = Trainer._train_epoch
def wait(self):
    while self.epoch == 1:
        time.sleep(0.05)
    return train_epoch(self)
Trainer._train_epoch = wait
run_job()
"""


@pytest.mark.slow
class TestRealRuns:
    """A student is stopped after an epoch as a kill of the study would, then all resumes."""

    @pytest.fixture(scope="class")
    @classmethod
    def done(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("study")
        longer = ["train.num_epochs=4", "train.scheduler.kwargs.total_steps=4", "num_workers=1"]
        longer += ["datasets.phantom/train.init.kwargs.size=96", TAUGHT]
        taught = {"KD": {"config": str(KD), "set": longer}}
        content = {**STUDY, "configurations": taught, "compare_to": None, "seeds": 1}
        content["set"] = [*SMALL, "train.scheduler.kwargs.total_steps=1"]
        file = folder / "study.yaml"
        file.write_text(yaml.safe_dump(content))
        plan = read_plan(file, root=folder / "runs")
        (teacher,), (student,) = plan.prepared, plan.runs
        distill(teacher.spec(StudyOptions(device="cpu")))
        evaluate(teacher.folder, resamples=100)
        begun = student.folder / "metrics.jsonl"
        with pytest.MonkeyPatch.context() as patch, local_processes() as pool:
            patch.setattr(executors, "COMMAND", ("-c", WAITING))
            options = StudyOptions(device="cpu", safe=True)
            future = executors.StudyExecutor([], options, 1, {}, print, pool).start(student)
            until(lambda: begun.exists() or future.done())
        code, before = future.result(), begun.read_text()
        found = run_study(file, out=folder / "out", root=folder / "runs", device="cpu", safe=True)
        return {"found": found, "plan": plan, "code": code, "before": before}

    def test_a_run_ends_with_its_study_and_goes_on_with_the_next(self, done):
        folder = done["plan"].runs[0].folder
        sessions = json.loads((folder / "environment.json").read_text())["sessions"]
        after = (folder / "metrics.jsonl").read_text()
        assert done["code"] == 130
        assert (done["before"].count("\n"), after.count("\n")) == (1, 4)
        assert after.startswith(done["before"])  # times included: not trained again
        assert len(sessions) == 2

    def test_a_student_is_taught_by_what_was_prepared(self, done):
        (row,), (teacher,) = done["found"]["runs"], done["plan"].prepared
        config = Path(row["folder"], "config.yaml").read_text()
        assert f"src_ckpt: {teacher.folder}/best.pt" in config
        assert done["found"]["final"]
        accuracies = np.linspace(0, 1, 9)
        assert np.abs(accuracies - row["measures"]["test_accuracy"]).min() < 1e-9
        assert 0 <= row["measures"]["macro_f1"] <= 1

    def test_every_configuration_is_checked_before_any_is_trained(self, written, tmp_path):
        wrong = {
            "CE": {"config": str(BASELINE), "set": ["+train.optimizer.kwargs.weight_decy=1"]},
            "KD": {
                "config": str(KD),
                "set": [TAUGHT, "models.teacher_model.kwargs.name=test_resnet"],
            },
        }
        wrong |= {"teacher": {"config": str(TEACHER)}}  # is prepared as well
        file = written(configurations=wrong, seeds=2, set=SMALL)
        with pytest.raises(ValueError, match="the weights of this model") as error:
            run_study(file, out=tmp_path / "out", root=tmp_path / "runs", device="cpu")
        assert re.search(r"study\.yaml: CE: .*Did you mean 'weight_decay'", str(error.value))
        assert not list(tmp_path.rglob("*.pt"))
        assert not (tmp_path / "out").exists()

    def test_an_error_of_a_run_is_the_last_thing_in_its_log(self, monkeypatch, capfd):
        def broken(_):
            raise ValueError("loss: expected a finite loss, got nan.")

        assert job_that_fails(monkeypatch, broken) == 1
        assert capfd.readouterr().err.endswith("failed: loss: expected a finite loss, got nan.\n")


def test_a_run_killed_for_memory_is_said_to_be(tmp_path):
    log = tmp_path / "0.log"
    log.write_text("INFO Error: a damaged checkpoint; the one before it is used\n")
    killed = subprocess.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    assert "signal 9" in executors._read_failure(log, killed.returncode)
