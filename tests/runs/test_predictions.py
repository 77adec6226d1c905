"""Predictions with groups are written and read back; without, the column is not there."""

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
