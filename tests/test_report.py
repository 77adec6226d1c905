"""Tables read back cell by cell, figures read back pixel by pixel."""

import math

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kd_lrp_plugin.report import CAPTION, MapRow, map_figure, table
from kd_lrp_plugin.rules import METHODS


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


class TestTable:
    def test_shows_every_value_in_the_columns_asked_for(self):
        records = [{"a": 1, "b": 0.5, "c": "x"}, {"a": 2, "b": 1.25, "c": "y"}]
        head, _, *body = cells(table(records, ["c", "b"], digits=2))
        assert [head, *body] == [["c", "b"], ["x", "0.50"], ["y", "1.25"]]

    def test_lines_are_of_one_length_and_numbers_stand_at_the_right(self):
        lines = table([{"name": "long name", "n": 5}, {"name": "x", "n": 12345}]).splitlines()
        assert len({len(line) for line in lines}) == 1
        assert lines[1].endswith("-:|")
        assert lines[2].endswith("     5 |")
        assert lines[3].endswith("12,345 |")

    def test_nothing_and_nan_are_dashes(self):
        records = [{"a": None, "b": math.nan, "c": 1.0}, {"c": 2.0}]
        assert cells(table(records, ["a", "b", "c"]))[2:] == [
            ["-", "-", "1.000"],
            ["-", "-", "2.000"],
        ]

    def test_text_cannot_break_the_table(self):
        (line,) = table([{"a": "x|y\nz", "b": 1}]).splitlines()[2:]
        assert line.startswith(r"| x\|y z |")

    def test_a_misspelled_column_is_refused_and_the_known_ones_named(self):
        with pytest.raises(ValueError, match=r"\['accuracy'\], got 'acuracy'"):
            table([{"accuracy": 1.0}], ["acuracy"])


def row(label: str = "glioma", **changes: object) -> MapRow:
    """A grey image of 40 × 40 with one hot corner."""
    heat = np.zeros((4, 4))
    heat[0, 0] = 2.5
    fields = {"image": np.full((40, 40), 128, np.uint8), "maps": {"teacher": heat, "KD": heat}}
    return MapRow(label, **{**fields, **changes})


def picture(figure: Figure, place: int) -> np.ndarray:
    return figure.get_axes()[place].get_images()[0].get_array()


class TestMapFigure:
    def test_has_a_column_per_map_and_a_line_per_image(self):
        axes = map_figure([row("glioma"), row("notumor")]).get_axes()
        assert [ax.get_title() for ax in axes[:3]] == ["image", "teacher", "KD"]
        assert [axes[place].get_ylabel() for place in (0, 3)] == ["glioma", "notumor"]

    def test_image_and_places_without_relevance_stay_as_they_are(self):
        figure = map_figure([row()])
        np.testing.assert_allclose(picture(figure, 0), 128 / 255)
        np.testing.assert_allclose(picture(figure, 1)[20:, 20:], 128 / 255)
        assert np.abs(picture(figure, 1)[:5, :5] - 128 / 255).max() > 0.3

    def test_colours_do_not_depend_on_the_scale_of_a_map(self):
        heat = np.random.default_rng(0).random((4, 4))
        figure = map_figure([row(maps={"small": 1e-6 * heat, "large": 1e6 * heat})])
        np.testing.assert_allclose(picture(figure, 1), picture(figure, 2), atol=1e-5)

    def test_a_map_without_relevance_is_said_to_be_one(self):
        figure = map_figure([row(maps={"zero": np.zeros((4, 4)), "negative": -np.ones((4, 4))})])
        for place in (1, 2):
            assert [text.get_text() for text in figure.get_axes()[place].texts] == ["no relevance"]
            np.testing.assert_allclose(picture(figure, place), 128 / 255)

    def test_wrong_predictions_are_marked_by_more_than_colour(self):
        said = {"teacher": ("glioma", 0.876), "KD": ("notumor", 0.6)}
        axes = map_figure([row("glioma\nblocks.4", predictions=said)]).get_axes()
        assert [ax.get_xlabel() for ax in axes[:3]] == ["", "glioma 0.88", "notumor 0.60 ✗"]

    def test_the_outline_is_drawn_where_there_is_a_mask_and_the_caption_says_so(self):
        mask = np.zeros((40, 40), bool)
        mask[10:20, 10:20] = True
        figure = map_figure([row(mask=mask), row(mask=mask & False), row()])
        outlines = [len(ax.collections) for ax in figure.get_axes()[:9]]
        assert outlines == [1, 1, 1, 0, 0, 0, 0, 0, 0]
        assert figure.get_supxlabel() == f"{CAPTION} Outline: tumour."
        assert map_figure([row()]).get_supxlabel() == CAPTION

    @pytest.mark.parametrize("lines", [1, 5])
    @pytest.mark.parametrize("columns", [1, 6])
    def test_no_words_are_clipped_and_none_overlap(self, lines, columns):
        names = list(METHODS)[-columns:]  # the longest headings that we ship
        maps, said = dict.fromkeys(names, np.eye(4)), dict.fromkeys(names, ("meningioma", 0.5))
        rows = [row("glioma\nlayer", maps=maps, predictions=said)] * lines
        figure = map_figure(rows, title="A title")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        axes = figure.get_axes()
        texts = [text for ax in axes for text in (ax.title, ax.xaxis.label, ax.yaxis.label)]
        texts += figure.texts
        boxes = [t.get_window_extent(canvas.get_renderer()) for t in texts if t.get_text()]
        assert len(boxes) == 1 + columns + lines * (1 + columns) + 3
        for box in boxes:
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= figure.bbox.x1
            assert box.y1 <= figure.bbox.y1
        for place, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:place])

    def test_colour_images_and_fractions_are_taken_too(self):
        image = np.random.default_rng(0).random((40, 40, 3))
        np.testing.assert_allclose(picture(map_figure([row(image=image)]), 0), image)

    def test_rows_with_different_columns_are_refused(self):
        with pytest.raises(ValueError, match="for every column"):
            map_figure([row(), row(maps={"teacher": np.eye(4)})])

    def test_is_saved_and_pyplot_never_hears_of_it(self, tmp_path):
        file = tmp_path / "maps.png"
        map_figure([row()]).savefig(file)
        assert file.read_bytes().startswith(b"\x89PNG")
        assert pyplot.get_fignums() == []
