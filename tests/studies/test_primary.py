"""A primary comparison is registered, judged when it is complete, and gets no further seeds."""

import json
from pathlib import Path

import pytest
import yaml
from small_runs import BASELINE, KD

from kd_lrp_plugin.metrics.statistics import paired_difference
from kd_lrp_plugin.studies.markdown import study_markdown
from kd_lrp_plugin.studies.parser import read_plan
from kd_lrp_plugin.studies.primary import Primary, judge_primary
from kd_lrp_plugin.studies.results import collect_results
from kd_lrp_plugin.studies.status import check_output_folder

STUDY = {
    "question": "Does KD help?",
    "seeds": [5, 6, 7],
    "configurations": {
        "CE": {"config": str(BASELINE)},
        "KD": {"config": str(KD), "set": ["models.teacher_model.src_ckpt=null"], "axes": ["rate"]},
        "other": {"config": str(BASELINE), "set": ["batch_size=4"], "axes": []},
    },
    "grid": {"rate": {"key": "train.optimizer.kwargs.lr", "values": [0.1, 0.01]}},
    "measures": ["test_accuracy"],
    "primary": {
        "measure": "test_accuracy",
        "configuration": "KD",
        "minus": ["CE", "other"],
        "where": {"rate": 0.1},
    },
}


@pytest.fixture
def write(tmp_path):
    def write_study(**changes) -> Path:
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
        return file

    return write_study


def make_row(name: str, seed: int, accuracy: float | None, **point) -> dict:
    return {
        "configuration": name,
        "point": point,
        "seed": seed,
        "measures": {"test_accuracy": accuracy},
    }


KD_VALUES, CE_VALUES, OTHERS = [0.8, 0.9, 0.7], [0.7, 0.75, 0.68], [0.8, 0.85, 0.7]
ROWS = [
    *(make_row("KD", 5 + i, value, rate=0.1) for i, value in enumerate(KD_VALUES)),
    *(make_row("KD", 5 + i, 0.1, rate=0.01) for i in range(3)),
    *(make_row("CE", 5 + i, value, rate=0.1) for i, value in enumerate(CE_VALUES)),
    *(make_row("CE", 5 + i, 0.2, rate=0.01) for i in range(3)),
    *(make_row("other", 5 + i, value) for i, value in enumerate(OTHERS)),
]
PRIMARY = Primary("test_accuracy", "KD", ("CE", "other"), {"rate": 0.1}, (5, 6, 7))


def test_it_is_read_with_the_seeds_of_the_file(write):
    assert read_plan(write()).primary == PRIMARY
    assert read_plan(write(), seeds=[6]).primary == PRIMARY
    assert read_plan(write(), seeds=2).seeds == (5, 6)
    assert read_plan(write(primary=None)).primary is None


def test_a_study_that_is_changed_from_outside_is_not_the_registered_one(write):
    plan = read_plan(write(), ["batch_size=8"], seeds=[5, 99])
    assert (plan.primary, plan.seeds) == (None, (5, 99))
    with pytest.raises(ValueError, match="primary: measure"):
        read_plan(write(primary={**STUDY["primary"], "measure": "macro_f1"}), ["batch_size=8"])


@pytest.mark.parametrize("seeds", [8, [5, 6, 7, 8]])
def test_further_seeds_are_refused(write, seeds):
    words = r"study\.yaml: seeds: expected the seeds of its primary comparison, \[5, 6, 7\]"
    with pytest.raises(ValueError, match=words):
        read_plan(write(), seeds=seeds)
    assert read_plan(write(primary=None), seeds=seeds).seeds


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"measure": "macro_f1"}, "primary: measure"),
        ({"configuration": "KT"}, "primary: configuration.*Did you mean 'KD'"),
        ({"minus": ["KD"]}, "primary: minus"),
        ({"minus": []}, "primary: expected a mapping with measure, configuration, minus"),
        ({"where": {}}, r"primary: where: expected a value of each of \['rate'\], got \[\]"),
        ({"where": {"rate": 0.2}}, "primary: where: rate"),
        ({"seeds": 9}, "primary: key"),
        (
            {"configuration": "other", "minus": ["CE"], "where": {}},
            r"primary: minus: expected axes among \[\], got 'CE', which has \['rate'\] too",
        ),
    ],
)
def test_a_comparison_that_the_study_cannot_make_is_refused(write, changes, words):
    with pytest.raises(ValueError, match=words):
        read_plan(write(primary={**STUDY["primary"], **changes}))


@pytest.mark.parametrize(
    ("values", "given", "meant"),
    [([0.1, 0.01], "0.1", 0.1), (["1e-3", "1e-4"], "1e-3", "1e-3"), ([1, 2], 2.0, 2)],
)
def test_a_value_may_be_spelt_as_in_yaml_or_as_text(write, values, given, meant):
    grid = {"rate": {"key": "train.optimizer.kwargs.lr", "values": values}}
    plan = read_plan(write(grid=grid, primary={**STUDY["primary"], "where": {"rate": given}}))
    assert plan.primary.where == {"rate": meant}
    rows = [make_row(run.name, run.seed, 0.5 + run.seed, **run.point) for run in plan.runs]
    assert judge_primary(plan.primary, rows)["complete"]


def test_a_value_may_be_a_list(write):
    grid = {"rate": {"key": "train.optimizer.kwargs.lr", "values": [[0.1, 0.2], [0.3]]}}
    plan = read_plan(write(grid=grid, primary={**STUDY["primary"], "where": {"rate": [0.1, 0.2]}}))
    rows = [make_row(run.name, run.seed, 0.5 + run.seed, **run.point) for run in plan.runs]
    assert judge_primary(plan.primary, rows)["complete"]


def test_it_is_judged_at_its_point_of_the_grid_by_pairs_and_corrected_for_itself_alone():
    found = judge_primary(PRIMARY, ROWS)
    seeds = (5, 6, 7)
    expected = [
        paired_difference(
            dict(zip(seeds, KD_VALUES, strict=True)), dict(zip(seeds, v, strict=True))
        )
        for v in (CE_VALUES, OTHERS)
    ]
    assert found["complete"]
    for record, of in zip(found["differences"], expected, strict=True):
        assert {key: record[key] for key in of} == of
    low, high = sorted(record["p"] for record in expected)
    assert sorted(r["p_holm"] for r in found["differences"]) == [2 * low, max(2 * low, high)]
    assert [record["reference"] for record in found["differences"]] == ["CE", "other"]


def test_it_is_not_complete_without_a_run():
    assert not judge_primary(PRIMARY, [row for row in ROWS if row["seed"] != 7])["complete"]
    absent = [*ROWS[:-1], make_row("other", 7, None)]
    assert not judge_primary(PRIMARY, absent)["complete"]
    assert judge_primary(None, ROWS) is None


def test_the_table_says_what_was_registered_first(write):
    content = collect_results(read_plan(write()))
    text = study_markdown({**content, "primary": judge_primary(PRIMARY, ROWS)})
    assert "test_accuracy, rate 0.1; seeds 5, 6, 7. All are in." in text
    assert text.index("## Primary comparison") < text.index("## test_accuracy")
    assert "| CE       | +0.0900" in text
    assert "nothing is to be judged yet" in study_markdown(content)


def test_results_of_another_registration_are_not_overwritten(write, tmp_path):
    content = collect_results(read_plan(write()))
    (tmp_path / "study.json").write_text(json.dumps(content))
    check_output_folder(tmp_path, read_plan(write()))
    others = {
        "seeds": [5, 6, 7, 8],
        "primary": {**STUDY["primary"], "minus": ["CE"]},
    }
    for key, value in {**others, "none": None}.items():
        changes = {"primary": None} if key == "none" else {key: value}
        with pytest.raises(FileExistsError, match="another primary comparison, measure test_acc"):
            check_output_folder(tmp_path, read_plan(write(**changes)))
