"""What benchmarks draw, and the numbers behind it."""

import numpy as np
import pytest
from PIL import Image

from figures import assert_is_image, figures_of
from tiny import make_image


@pytest.mark.parametrize("size", [(64, 96), (400, 100)])
def test_attention_is_bright_where_it_is_most_whatever_its_scale(benchmark, size):
    looked = np.array([[0, 0, 0.1], [0, 0, 0]])
    shown = benchmark.draw_attention(Image.new("RGB", size, "gray"), looked)
    assert (shown.mode, shown.size) == ("RGB", size)
    brightness = np.asarray(shown.convert("L"), dtype=float)
    row, column = np.unravel_index(brightness.argmax(), brightness.shape)
    assert (row * 2 // size[1], column * 3 // size[0]) == (0, 2)
    # Where nothing looked the image is dimmed, and still to be seen.
    assert 20 < brightness.min() < 60
    # Between the centers of the cells it goes over smoothly.
    assert np.abs(np.diff(brightness, axis=1)).max() < 40
    assert np.array_equal(
        np.asarray(benchmark.draw_attention(Image.new("RGB", size, "gray"), 7 * looked)), np.asarray(shown)
    )


@pytest.mark.parametrize("words", [1, 7])
def test_attention_of_every_word_in_every_stage(benchmark, tmp_path, monkeypatch, words):
    drawn = figures_of(monkeypatch)
    stages = [
        (name, np.random.default_rng(0).random((words, *grid))) for name, grid in (("fine", (3, 2)), ("whole", (1, 1)))
    ]
    looks = {"image": {"question": 0.25, "local fusion": 0.75}, "question": {"image": 1.0, "local fusion": 0.0}}
    benchmark.plot_attention(
        make_image(), [f"word {n}" for n in range(words)], stages, looks, "a title", tmp_path / "a.png"
    )
    assert_is_image(tmp_path / "a.png")
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes[:words]] == [f"word {n}" for n in range(words)]
    assert len(figure.axes) == 2 * words + 2 and figure.get_suptitle() == "a title"
    assert [text.get_text() for text in figure.axes[-1].texts][:2] == ["question 25%", "local fusion 75%"]


def test_a_study_has_a_panel_a_task_and_a_line_a_contestant(benchmark, tmp_path, monkeypatch):
    drawn = figures_of(monkeypatch)

    def run(flops, *values):
        return {"flops": flops, "curve": [[share, value] for share, value in zip((0.5, 1.0), values, strict=True)]}

    panels = {
        "one": {"HiViLT": [run(2e12, 0.5, 0.7), run(2e12, 0.6, 0.9)], "ViLT": [run(8e12, 0.1, 0.2)]},
        "two": {"HiViLT": [run(1e12, 0.3, 0.4)]},
    }
    benchmark.plot_study(panels, tmp_path / "study.png")
    assert_is_image(tmp_path / "study.png")
    one, two = drawn[0].axes
    assert (one.get_title(), two.get_title()) == ("one", "two")
    lines = {line.get_label(): line.get_xydata() for line in one.lines}
    np.testing.assert_allclose(lines["HiViLT"], [[1, 55], [2, 80]])
    np.testing.assert_allclose(lines["ViLT"], [[4, 10], [8, 20]])


def test_scaling_is_drawn_for_one_collection_and_several(benchmark, tmp_path):
    rows = [
        {
            "num_images": 10**n,
            "seconds": 3.0 * 10**n,
            "all_pairs_seconds": {"hivilt": 5.0 * 100**n, "vilt": 9.0 * 100**n},
        }
        for n in (1, 2, 3)
    ]
    for number in (1, 3):
        benchmark.plot_scaling(rows[:number], tmp_path / "scaling.png")
        assert np.asarray(Image.open(tmp_path / "scaling.png").convert("L")).std() > 10
