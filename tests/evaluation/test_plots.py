"""The images are drawn, and the numbers behind them are right."""

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from figures import assert_is_image, figures_of
from hivilt.evaluation.plots import (
    AnsweredQuestion,
    GeneratedCaption,
    GroundedExpression,
    RetrievedImages,
    plot_captions,
    plot_grounding,
    plot_predictions,
    plot_retrieved,
    plot_training,
)
from tiny import make_image

GREEN = (44, 160, 44)  # of the frame round right images

LOG_HISTORY = [
    {"epoch": 0.5, "step": 1, "loss": 2.0},
    {"epoch": 1.0, "step": 2, "loss": 1.0},
    {"epoch": 1.0, "step": 2, "eval_loss": 1.2, "eval_accuracy": 0.5},
    {"epoch": 1.0, "step": 2, "train_loss": 1.5},
]


def answered(answer="red"):
    predictions = [{"answer": "red", "score": 0.9}, {"answer": "blue", "score": 0.1}]
    return AnsweredQuestion(make_image(), "what color is the shape?", predictions, answer)


def retrieved(query, number, matches=None):
    return RetrievedImages(query, [make_image("red")] * number, [f"0.{place}" for place in range(number)], matches)


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_training_curves(tmp_path):
    plot_training(LOG_HISTORY, tmp_path / "training.png")
    assert_is_image(tmp_path / "training.png")


def test_training_without_evaluation(tmp_path):
    plot_training(LOG_HISTORY[:2], tmp_path / "training.png")
    assert_is_image(tmp_path / "training.png")


@pytest.mark.parametrize(
    ("metric", "ylabel", "title"),
    [({}, "accuracy (%)", "Accuracy"), ({"metric": "mean_recall"}, "mean recall (%)", "Mean recall")],
)
def test_training_draws_the_metric_that_was_asked_for(tmp_path, monkeypatch, metric, ylabel, title):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: drawn.append(figure))
    plot_training([*LOG_HISTORY, {"epoch": 1.0, "eval_mean_recall": 0.25}], tmp_path / "training.png", **metric)
    axes = drawn[0].axes[1]
    assert (axes.get_ylabel(), axes.get_title()) == (ylabel, title)
    assert axes.lines[0].get_ydata() == [25 if metric else 50]


@pytest.mark.parametrize(("loss", "scale"), [(0.5, "log"), (-0.5, "linear")])
def test_a_negative_loss_is_drawn(tmp_path, monkeypatch, loss, scale):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: drawn.append(figure))
    plot_training([*LOG_HISTORY, {"epoch": 1.0, "loss": loss}], tmp_path / "training.png")
    assert drawn[0].axes[0].get_yscale() == scale


@pytest.mark.parametrize("number", [1, 3, 5])
def test_predictions_of_any_number(tmp_path, number):
    cells = [answered(answer) for answer in ("red", "blue", None, "red", "red")][:number]
    plot_predictions(cells, tmp_path / "predictions.png")
    assert_is_image(tmp_path / "predictions.png")


@pytest.mark.parametrize(("size", "least"), [((64, 64), 0.35), ((640, 64), 0.25), ((120, 64), 0.3)])
def test_wide_images_do_not_leave_the_page_white(size, least, tmp_path):
    cells = [answered()._replace(image=Image.new("RGB", size, "navy")) for _ in range(8)]
    plot_predictions(cells, tmp_path / "predictions.png")
    shown = (pixels_of(tmp_path / "predictions.png").min(axis=-1) < 200).mean()
    assert shown > least


def test_no_predictions_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no question to draw"):
        plot_predictions([], tmp_path / "predictions.png")


def test_captions_above_and_references_below(tmp_path, monkeypatch):
    drawn = figures_of(monkeypatch)
    long = "a dog costs $5 and a cat $6 " * 9
    cells = [
        GeneratedCaption(make_image(), "a red circle", "a circle that is red"),
        GeneratedCaption(make_image(), long, None),
        GeneratedCaption(make_image(), "", long),
        *[GeneratedCaption(make_image(), "a", "b")] * 2,
    ]
    plot_captions(cells, tmp_path / "captions.png")
    assert_is_image(tmp_path / "captions.png")
    first, second, third, *_ = drawn[0].axes
    assert (first.get_title(), first.get_xlabel()) == ("a red circle", "(a circle that is red)")
    assert second.get_title().startswith("a dog costs $5") and second.get_title().endswith("...")
    assert second.get_xlabel() == third.get_title() == ""
    with pytest.raises(ValueError, match="captions: there is no image to draw"):
        plot_captions([], tmp_path / "captions.png")


LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)


def test_boxes_are_drawn_on_their_image(tmp_path, monkeypatch):
    drawn = figures_of(monkeypatch)
    image = Image.new("RGB", (80, 40), "navy")
    cells = [
        GroundedExpression(image, "the left of $5 or $6 " * 9, [(0, 0, 0.5, 0.75), RIGHT], [LEFT]),
        GroundedExpression(image, "both", [RIGHT, LEFT], [LEFT, RIGHT]),
        GroundedExpression(image, "a dog", [], []),
        GroundedExpression(image, "the right", np.zeros((0, 4)), np.array([RIGHT])),
        GroundedExpression(image, "unknown", [LEFT], None),
    ]
    plot_grounding(cells, tmp_path / "grounding.png")
    assert_is_image(tmp_path / "grounding.png")
    found = []
    for axes in drawn[0].axes[:5]:
        assert (axes.get_xlim(), axes.get_ylim()) == ((-0.5, 79.5), (39.5, -0.5))
        outlines = [
            (patch.get_bbox().extents.tolist(), to_hex(patch.get_edgecolor()), patch.get_linestyle())
            for patch in axes.patches
        ]
        found.append((axes.get_xlabel(), to_hex(axes.xaxis.label.get_color()), outlines))
    green, red, black = to_hex("tab:green"), to_hex("tab:red"), to_hex("black")
    left, right = [-0.5, -0.5, 39.5, 39.5], [39.5, -0.5, 79.5, 39.5]
    dashed = lambda box: (box, black, "dashed")
    less = [-0.5, -0.5, 39.5, 29.5]
    assert found == [
        ("2 predicted, 1 true, 1 matched", red, [(less, green, "solid"), (right, red, "solid"), dashed(left)]),
        (
            "2 predicted, 2 true, 2 matched",
            green,
            [(right, green, "solid"), (left, green, "solid"), dashed(left), dashed(right)],
        ),
        ("0 predicted, 0 true, 0 matched", green, []),
        ("0 predicted, 1 true, 0 matched", red, [dashed(right)]),
        ("1 predicted", black, [(left, black, "solid")]),
    ]
    assert drawn[0].axes[0].get_title().startswith("the left of $5") and drawn[0].axes[1].get_title() == "both"


def test_grounding_refuses_what_it_cannot_draw(tmp_path):
    with pytest.raises(ValueError, match="cells: there is no expression to draw"):
        plot_grounding([], tmp_path / "grounding.png")
    cell = GroundedExpression(make_image(), "a dog", [LEFT], None)
    for wrong in (cell._replace(boxes=[(10, 10, 30, 30)]), cell._replace(references=[LEFT, (0, 10, 1, 30)])):
        with pytest.raises(ValueError, match=r"cells: box \(.*\) of cell 1 lies outside the image; expected .* divide"):
            plot_grounding([cell, wrong], tmp_path / "grounding.png")
    assert not (tmp_path / "grounding.png").exists()


def test_retrieved_of_any_number(tmp_path):
    plot_retrieved([retrieved("a red circle", 1)], tmp_path / "one.png")
    assert_is_image(tmp_path / "one.png")
    plot_retrieved([retrieved("red", 10), retrieved(make_image(), 2), retrieved("nothing", 0)], tmp_path / "many.png")
    assert_is_image(tmp_path / "many.png")
    one, many = pixels_of(tmp_path / "one.png"), pixels_of(tmp_path / "many.png")
    assert many.shape[0] > 2 * one.shape[0]
    assert many.shape[1] > 4 * one.shape[1]


def test_only_right_images_have_a_green_frame(tmp_path):
    columns = {}
    for name, matches in {"unknown": None, "none": [False] * 3, "last": [False, False, True]}.items():
        plot_retrieved([retrieved("red", 3, matches)], tmp_path / "retrieved.png")
        green = (pixels_of(tmp_path / "retrieved.png") == GREEN).all(axis=-1)
        columns[name] = np.flatnonzero(green.any(axis=0)) / green.shape[1]
    assert columns["unknown"].size == columns["none"].size == 0
    assert columns["last"].min() > 2 / 3


def test_retrieved_takes_texts_as_they_are(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: drawn.append(figure))
    row = RetrievedImages("from $5 to $6 " * 20, [make_image()], ["from $5_ to $^6"], None)
    plot_retrieved([row], tmp_path / "retrieved.png", title="$x_$")
    drawn[0].draw_without_rendering()  # a bad formula would be an error here
    query, found = drawn[0].axes
    assert query.texts[0].get_text().startswith("from $5 to $6")
    assert query.texts[0].get_text().endswith("...")
    assert found.get_xlabel() == "from $5_ to $^6"


def test_retrieved_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="no query to draw"):
        plot_retrieved([], tmp_path / "retrieved.png")
    for row in (retrieved("red", 2, [True]), retrieved("red", 2)._replace(captions=["0.9"])):
        with pytest.raises(ValueError, match="row 1 has 2 images"):
            plot_retrieved([retrieved("red", 1), row], tmp_path / "retrieved.png")


def test_drawing_opens_no_figure_of_pyplot(tmp_path):
    plot_training(LOG_HISTORY, tmp_path / "training.png")
    plot_retrieved([retrieved("red", 1)], tmp_path / "retrieved.png")
    assert pyplot.get_fignums() == []


WILD = [
    "from $5 to $6_^",
    "a\x00b\x07c\u200b",
    "👩\u200d👧 red?",
    "ما لون الصورة؟",
    "图片是什么颜色",
    "\\frac{1}{",
    "word " * 10_000,
]


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("text", WILD, ids=ascii)
def test_texts_from_the_wild_are_drawn_as_they_are(tmp_path, text):
    predictions = [{"answer": text, "score": 0.9}]
    one = AnsweredQuestion(make_image(), text, predictions, "red " + text)
    plot_predictions([one], tmp_path / "predictions.png")
    assert_is_image(tmp_path / "predictions.png")
    with Image.open(tmp_path / "predictions.png") as image:
        assert max(image.size) < 1000
