"""Predictions with groups or subclasses are written and read back; without, no column is there."""

import numpy as np
import pytest

from kd_lrp_plugin.runs.folder import RunFolder
from kd_lrp_plugin.runs.predictions import predictions_csv, read_predictions

ROWS = [{"label": k % 2, "student": [0.25, 0.75], "teacher": None} for k in range(3)]


@pytest.mark.parametrize("groups", [None, ["random", "none", "a, b"]])
def test_groups_are_read_as_they_were_written(tmp_path, groups):
    text = predictions_csv(ROWS, ["no", "yes"], None, groups)
    (tmp_path / "predictions.csv").write_text(text)
    found = read_predictions(RunFolder(tmp_path))
    assert found.groups == (groups or [])
    assert found.labels.tolist() == [0, 1, 0]
    assert found.probabilities["student"].tolist() == [[0.25, 0.75]] * 3
    assert ("group" in text.splitlines()[0].split(",")) == bool(groups)


INNER = [
    {"label": 0, "student": [0.6, 0.4], "teacher": [0.3, 0.7], "subclass": 1,
     "student subclass": [0.1, 0.5, 0.4], "teacher subclass": [0.0, 0.3, 0.7]},
    {"label": 1, "student": [0.2, 0.8], "teacher": [0.5, 0.5], "subclass": None,
     "student subclass": [0.1, 0.1, 0.8], "teacher subclass": [0.25, 0.25, 0.5]},
]  # fmt: skip


@pytest.mark.parametrize("groups", [None, ["here", "there"]])
@pytest.mark.parametrize("taught", [True, False])
def test_subclasses_are_read_as_they_were_written(taught, groups, tmp_path):
    rows = [dict(row, **({} if taught else {"teacher": None})) for row in INNER]
    names = ["no: a", "no: b", "group"]
    text = predictions_csv(rows, ["no", "yes"], None, groups, names)
    (tmp_path / "predictions.csv").write_text(text)
    found = read_predictions(RunFolder(tmp_path))
    roles = ["student", "teacher"] if taught else ["student"]
    assert list(found.probabilities) == list(found.subclass_probabilities) == roles
    for role in roles:
        of_subclasses = found.subclass_probabilities[role]
        assert of_subclasses.tolist() == [row[f"{role} subclass"] for row in INNER]
        folded = [of_subclasses[:, :2].sum(1), of_subclasses[:, 2]]
        np.testing.assert_allclose(found.probabilities[role].T, folded)
    assert (found.subclasses, found.subclass_labels) == (names, [1, -1])
    assert (found.outputs, found.groups) == (["no", "yes"], groups or [])


def test_a_subclass_that_is_none_of_theirs_is_damage(tmp_path):
    text = predictions_csv(INNER, ["no", "yes"], None, None, ["a", "b", "c"])
    (tmp_path / "predictions.csv").write_text(text.replace("0,no,b,", "0,no,d,"))
    with pytest.raises(ValueError, match=r"subclasses among \['a', 'b', 'c'\], got \['d'\]"):
        read_predictions(RunFolder(tmp_path))
