"""The pictures are drawn, and the numbers behind them are right."""

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image

from hivilt.evaluation.plots import AnsweredQuestion, attention_map, plot_predictions, plot_training
from tiny import make_picture

LOG_HISTORY = [
    {"epoch": 0.5, "step": 1, "loss": 2.0},
    {"epoch": 1.0, "step": 2, "loss": 1.0},
    {"epoch": 1.0, "step": 2, "eval_loss": 1.2, "eval_accuracy": 0.5},
    {"epoch": 1.0, "step": 2, "train_loss": 1.5},
]


def answered(attention, answer="red"):
    predictions = [{"answer": "red", "score": 0.9}, {"answer": "blue", "score": 0.1}]
    return AnsweredQuestion(make_picture(), "what color is the shape?", predictions, answer, attention)


def assert_is_picture(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.std() > 10, "an empty sheet"


def test_training_curves(tmp_path):
    plot_training(LOG_HISTORY, tmp_path / "training.png")
    assert_is_picture(tmp_path / "training.png")


def test_training_without_evaluation(tmp_path):
    plot_training(LOG_HISTORY[:2], tmp_path / "training.png")
    assert_is_picture(tmp_path / "training.png")


@pytest.mark.parametrize("number", [1, 3, 5])
def test_predictions_of_any_number(tmp_path, number):
    cells = [answered(np.eye(2, 3), answer) for answer in ("red", "blue", None, "red", "red")][:number]
    plot_predictions(cells, tmp_path / "predictions.png")
    assert_is_picture(tmp_path / "predictions.png")


def test_predictions_without_attention(tmp_path):
    plot_predictions([answered(None)], tmp_path / "predictions.png")
    assert_is_picture(tmp_path / "predictions.png")


def test_no_predictions_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no question to draw"):
        plot_predictions([], tmp_path / "predictions.png")


def test_drawing_opens_no_figure_of_pyplot(tmp_path):
    plot_training(LOG_HISTORY, tmp_path / "training.png")
    assert pyplot.get_fignums() == []


def test_attention_map_is_the_mean_over_heads_and_words():
    attention = np.zeros((2, 3, 6))
    attention[0, 0] = [1, 0, 0, 0, 0, 0]
    attention[1, 0] = [0, 1, 0, 0, 0, 0]
    attention[:, 1] = [0, 0, 0, 0, 0, 1]
    attention[:, 2] = 100  # padding
    looked = attention_map(attention, np.array([1, 1, 0]), (2, 3))
    assert looked.tolist() == [[0.25, 0.25, 0], [0, 0, 0.5]]


def test_attention_map_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="grid of 2 x 2"):
        attention_map(np.zeros((2, 3, 6)), np.ones(3), (2, 2))
    with pytest.raises(ValueError, match="grid of 2 x 3"):
        attention_map(np.zeros((2, 3, 6)), np.ones(4), (2, 3))
    with pytest.raises(ValueError, match="every token is padding"):
        attention_map(np.zeros((2, 3, 6)), np.zeros(3), (2, 3))
