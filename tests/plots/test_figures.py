"""Tables read back cell by cell, figures read back pixel by pixel."""

import itertools
import math

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from kd_lrp_plugin.plots.figures import (
    CAPTION,
    confusion_figure,
    curves_figure,
    list_quantities,
    reliability_figure,
    roc_figure,
    selection_figure,
)
from kd_lrp_plugin.plots.maps import MapRow, map_figure
from kd_lrp_plugin.plots.tables import table
from kd_lrp_plugin.relevance.methods import METHODS


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
    def test_a_long_name_stays_above_its_own_column(self):
        name = "lrp_cosine\nmobilenetv2_035_from_mobilenetv2_100_flatten-bc88cb2b31"
        figure = map_figure([row(maps={name: np.ones((4, 4)), name + "4": np.ones((4, 4))})])
        figure.draw_without_rendering()
        first, second = (ax.title.get_window_extent() for ax in figure.get_axes()[1:3])
        assert first.x1 < second.x0

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


def drawn(figure: Figure) -> list[list[float]]:
    """Boxes (x0, y0, x1, y1) of all words of a figure, tick labels without text left out."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    words = list(figure.texts)
    for ax in figure.get_axes():
        words += [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        words += [*ax.get_xticklabels(), *ax.get_yticklabels()]
    boxes = [t.get_window_extent(canvas.get_renderer()) for t in words if t.get_text()]
    return [list(box.extents) for box in boxes]


def line(ax: Axes, label: str) -> tuple[list[float], list[float]]:
    (found,) = [one for one in ax.get_lines() if one.get_label() == label]
    return list(found.get_xdata()), list(found.get_ydata())


def upright(ax: Axes) -> list[float]:
    """Where the lines of two points at one x stand."""
    ends = [list(one.get_xdata()) for one in ax.get_lines()]
    return [x[0] for x in ends if len(x) == 2 and x[0] == x[1]]


class TestCurvesFigure:
    def test_a_term_of_later_records_gets_its_panel_and_a_gap_before(self):
        records = [{"epoch": 1, "train_loss": 3.0}, {"epoch": 2, "train_loss": 2.0}]
        records.append({"epoch": 3, "train_loss": 1.0, "train_lrp": 0.5, "val_accuracy": 0.9})
        axes = curves_figure(records).get_axes()
        assert [ax.get_title() for ax in axes if ax.get_visible()] == ["accuracy", "loss", "lrp"]
        np.testing.assert_equal(line(axes[2], "train"), ([1, 2, 3], [math.nan, math.nan, 0.5]))
        assert len({ax.get_xlim() for ax in axes[:3]}) == 1

    def test_none_is_a_gap(self):
        records = [{"epoch": n, "train_loss": v} for n, v in ((1, 2.0), (2, None), (3, 1.0))]
        (ax,) = curves_figure(records).get_axes()
        np.testing.assert_equal(line(ax, "train")[1], [2.0, math.nan, 1.0])

    def test_a_thin_line_stands_between_two_stages_and_the_caption_says_so(self):
        stages = ["stage1", "stage1", "stage2", "stage2", "stage3"]
        records = [{"epoch": n + 1, "stage": s, "val_x": 0.1} for n, s in enumerate(stages)]
        figure = curves_figure(records)
        assert upright(figure.get_axes()[0]) == [2.5, 4.5]
        assert "new stage" in figure.get_supxlabel()

    def test_without_stages_there_is_no_line_and_no_word_of_one(self):
        figure = curves_figure([{"epoch": n, "val_x": 0.1} for n in (1, 2, 3)])
        assert upright(figure.get_axes()[0]) == []
        assert figure.get_supxlabel() == "epoch"

    def test_nothing_to_draw_is_refused(self):
        for records in ([], [{"epoch": 1, "lr": 0.1}]):
            with pytest.raises(ValueError, match="expected values train_x or val_x"):
                curves_figure(records)


class TestConfusionFigure:
    def test_shows_counts_shares_of_the_true_class_and_accuracy(self):
        matrices = {"teacher": [[6, 2], [1, 1]], "student": [[8, 0], [2, 0]]}
        axes = confusion_figure(matrices, ["no", "yes"]).get_axes()
        titles = [ax.get_title() for ax in axes[:2]]
        assert titles == ["teacher\naccuracy 0.700", "student\naccuracy 0.800"]
        assert [text.get_text() for text in axes[0].texts] == ["6", "2", "1", "1"]
        assert [text.get_position() for text in axes[0].texts][1] == (1, 0)  # predicted yes, is no
        np.testing.assert_allclose(axes[0].get_images()[0].get_array(), [[0.75, 0.25], [0.5, 0.5]])

    def test_a_class_without_images_is_blank_and_further_outputs_have_numbers(self):
        matrix = [[3, 0, 1], [0, 4, 0], [0, 0, 0]]
        ax = confusion_figure({"student": matrix}, ["cat", "dog"]).get_axes()[0]
        assert [label.get_text() for label in ax.get_yticklabels()] == ["cat", "dog", "2"]
        np.testing.assert_array_equal(ax.get_images()[0].get_array()[2], 0)

    def test_only_long_names_are_turned(self):
        for names, turn in ((["no", "yes"], 0), (["glioma", "notumor"], 45)):
            ax = confusion_figure({"student": [[1, 0], [0, 1]]}, names).get_axes()[0]
            assert [label.get_rotation() for label in ax.get_xticklabels()] == [turn, turn]

    @pytest.mark.parametrize("classes", [2, 4, 10])
    @pytest.mark.parametrize("models", [1, 2])
    def test_no_words_are_clipped_and_no_counts_overlap(self, classes, models):
        names = [f"meningioma {i}" for i in range(classes)]
        matrix = np.full((classes, classes), 1234)
        figure = confusion_figure({f"model {i}": matrix for i in range(models)}, names, "A title")
        for x0, y0, x1, y1 in drawn(figure):
            assert x0 >= 0
            assert y0 >= 0
            assert x1 <= figure.bbox.x1
            assert y1 <= figure.bbox.y1
        boxes = [text.get_window_extent() for text in figure.get_axes()[0].texts]
        assert len(boxes) == classes**2
        for place, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:place])

    @pytest.mark.parametrize("matrices", [{}, {"a": [[1, 2]]}, {"a": [[1]]}, {"a": [1, 2]}])
    def test_what_is_no_square_matrix_of_the_classes_is_refused(self, matrices):
        with pytest.raises(ValueError, match="at least 2 classes"):
            confusion_figure(matrices, ["no", "yes"])


class TestReliabilityFigure:
    def test_points_are_mean_confidence_and_accuracy_of_each_bin_in_use(self):
        generator = np.random.default_rng(0)
        confidences = np.append(generator.uniform(0.3, 1, 200), [1.0, 1.0])  # 1 is in the last bin
        correct = generator.random(202) < confidences
        upper, lower = reliability_figure({"student": (confidences, correct)}).get_axes()
        expected, counts = [], []
        for i in range(15):
            inside = [
                (c, right)
                for c, right in zip(confidences, correct, strict=True)
                if min(int(c * 15), 14) == i
            ]
            counts.append(len(inside))
            if inside:
                expected.append([sum(values) / len(inside) for values in zip(*inside, strict=True)])
        np.testing.assert_allclose(np.transpose(line(upper, "student")), expected)
        assert lower.patches[0].get_data().values.tolist() == counts
        assert line(upper, "calibrated") == ([0, 1], [0, 1])

    def test_models_have_one_colour_in_both_panels_and_a_name(self):
        curve = ([0.9, 0.5], [True, False])
        upper, lower = reliability_figure({"teacher": curve, "student": curve}).get_axes()
        words = [text.get_text() for text in upper.get_legend().get_texts()]
        assert words == ["calibrated", "teacher (2 images)", "student (2 images)"]
        colours = [to_hex(one.get_color()) for one in upper.get_lines()[1:]]
        assert [to_hex(patch.get_edgecolor()) for patch in lower.patches] == colours
        assert colours[0] != colours[1]

    @pytest.mark.parametrize(
        "curve", [([], []), ([0.5], [True, False]), ([1.5], [True]), ([math.nan], [True])]
    )
    def test_what_are_no_confidences_is_refused_and_the_model_named(self, curve):
        with pytest.raises(ValueError, match="student"):
            reliability_figure({"student": curve})

    def test_nothing_to_draw_is_refused(self):
        with pytest.raises(ValueError, match="one curve at least"):
            reliability_figure({})

    def test_all_figures_are_saved_and_pyplot_never_hears_of_them(self, tmp_path):
        curve = ([0.9, 0.5], [True, False])
        figures = [reliability_figure({"a": curve}, "A title"), confusion_figure({"a": [[1]]}, "a")]
        figures.append(curves_figure([{"epoch": 1, "val_x": 1.0}], "A title"))
        for number, figure in enumerate(figures):
            figure.savefig(tmp_path / f"{number}.png")
            assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")
        assert pyplot.get_fignums() == []


class TestRoc:
    LABELS = (0, 1, 2, 0, 1, 2, 0, 0)

    @pytest.mark.parametrize("ties", [False, True])
    def test_area_is_the_share_of_pairs_in_the_right_order(self, ties):
        scores = np.random.default_rng(0).dirichlet(np.ones(3), 8)
        scores = scores.round(1) if ties else scores
        figure = roc_figure({"a": scores}, self.LABELS, ["x", "y", "z"])
        for k, ax in enumerate(figure.get_axes()):
            ours = [s for s, label in zip(scores[:, k], self.LABELS, strict=True) if label == k]
            others = [s for s, label in zip(scores[:, k], self.LABELS, strict=True) if label != k]
            pairs = [(o > t) + (o == t) / 2 for o in ours for t in others]
            assert f"area {np.mean(pairs):.3f}" in ax.get_legend().get_texts()[0].get_text()
            curve = ax.get_lines()[1].get_xydata()
            assert curve[0].tolist() == [0, 0]
            assert curve[-1].tolist() == [1, 1]

    def test_says_how_many_images_and_draws_no_class_without_them(self):
        figure = roc_figure({"a": np.full((8, 4), 0.25)}, self.LABELS, ["x", "y", "z", "none"])
        titles = [ax.get_title() for ax in figure.get_axes()[:3]]
        assert titles == ["x\n4 of 8 images", "y\n2 of 8 images", "z\n2 of 8 images"]
        assert not any(ax.get_title() for ax in figure.get_axes()[3:])

    @pytest.mark.parametrize(
        ("scores", "labels"),
        [({}, [0, 1]), ({"a": [[1, 0], [0, 1]]}, [0, 0]), ({"a": [[1, 0]]}, [0, 1])],
    )
    def test_nothing_to_draw_is_refused(self, scores, labels):
        with pytest.raises(ValueError, match=r"^roc_figure: expected probabilities"):
            roc_figure(scores, labels, ["x", "y"])


def test_a_term_that_is_the_loss_has_no_curve_of_its_own():
    records = [
        {"epoch": 1, "train_loss": 1.5, "val_loss": 2.0, "train_ce": 1.5000001, "train_kd": 1.4},
        {"epoch": 2, "train_loss": 1.0, "val_loss": 1.5, "train_ce": 1.0, "train_kd": 1.0},
    ]
    assert list_quantities(records) == ["loss", "kd"]
    records[1]["val_ce"] = 1.4
    assert list_quantities(records) == ["loss", "ce", "kd"]


def test_reliability_says_how_many_images_are_behind_it():
    figure = reliability_figure({"student": ([0.9, 0.8, 0.6], [True, True, False])})
    texts = [text.get_text() for text in figure.get_axes()[0].get_legend().get_texts()]
    assert "student (3 images)" in texts


def test_names_of_candidates_lie_inside_the_axes():
    names = ["a_candidate_with_a_name_of_some_length", "b" * 30, "c" * 30]
    records = [
        {"candidate": n, "score": s, "std": 0.1, "parameters": p, "front": False}
        for n, s, p in zip(names, (1.0, 3.0, 2.0), (1e5, 4e6, 5e6), strict=True)
    ]
    figure = selection_figure(records)
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.get_axes()
    frame = axes.get_window_extent()
    for text in axes.texts:
        extent = text.get_window_extent()
        assert frame.x0 <= extent.x0
        assert extent.x1 <= frame.x1
        assert frame.y0 <= extent.y0
        assert extent.y1 <= frame.y1


def test_long_class_names_do_not_run_into_the_next_map():
    name = "a class of a very long name, such as an adenoma"
    maps = {column: np.eye(4) for column in ("one", "two", "three")}
    said = dict.fromkeys(["image", *maps], (name, 0.9))
    figure = map_figure([MapRow(name, np.zeros((8, 8)), maps, said)] * 2)
    FigureCanvasAgg(figure).draw()
    axes = figure.get_axes()[:8]
    boxes = [ax.xaxis.label.get_window_extent() for ax in axes]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    assert (
        not axes[0]
        .yaxis.label.get_window_extent()
        .overlaps(axes[4].yaxis.label.get_window_extent())
    )
