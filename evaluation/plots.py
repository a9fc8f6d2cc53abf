"""What a run draws: the course of training, and what a model answered or found.

Pure functions over lists and arrays that write a PNG file to `path`; they need no display and leave matplotlib's global
state alone. A `ValueError` says that there is nothing to draw.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

from hivilt.evaluation.grounding import match_boxes

RIGHT, WRONG, NEUTRAL, FRAME = "tab:green", "tab:red", "black", "lightgray"


class AnsweredQuestion(NamedTuple):
    """One cell of `plot_predictions`."""

    image: Image.Image
    question: str
    predictions: Sequence[Mapping[str, Any]]  # `{"answer": str, "score": float}`, best first; `None`: no probability
    answer: str | None  # the right answer; `None` where it is not known


class GeneratedCaption(NamedTuple):
    """One cell of `plot_captions`."""

    image: Image.Image
    prediction: str
    reference: str | None  # what a person wrote of the image; `None` where nothing is known


class GroundedExpression(NamedTuple):
    """One cell of `plot_grounding`."""

    image: Image.Image
    expression: str
    boxes: Sequence[
        Sequence[float]
    ]  # those that the model answers with: (left, top, right, bottom), relative, in [0, 1]
    references: Sequence[Sequence[float]] | None  # the true boxes, if any; `None` where they are not known


class RetrievedImages(NamedTuple):
    """One row of `plot_retrieved`."""

    query: str | Image.Image
    images: Sequence[Image.Image]  # best first
    captions: Sequence[str]  # one short line under each image, such as its score or name
    matches: Sequence[bool] | None  # which of the images are right; `None` where it is not known


def plot_training(
    log_history: Sequence[Mapping[str, float]], path: str | os.PathLike, metric: str = "accuracy"
) -> None:
    """Loss and a held-out metric over the epochs.

    Args:
        log_history: `trainer.state.log_history`; reads `epoch`, `loss`, `eval_loss`, `eval_{metric}` where they occur.
        metric: name of a metric in [0, 1], drawn in percent.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, metric_axes = figure.subplots(1, 2)
    name = metric.replace("_", " ")
    # Rewards may make a loss negative.
    losses = [entry[key] for entry in log_history for key in ("loss", "eval_loss") if key in entry]
    loss_axes.set(ylabel="loss", title="Loss", yscale="log" if min(losses, default=1) > 0 else "linear")
    metric_axes.set(ylabel=f"{name} (%)", title=name[:1].upper() + name[1:])
    for axes, key, label, scale in (
        (loss_axes, "loss", "training", 1),
        (loss_axes, "eval_loss", "held out", 1),
        (metric_axes, f"eval_{metric}", "held out", 100),
    ):
        entries = [entry for entry in log_history if key in entry]
        epochs, values = [entry["epoch"] for entry in entries], [scale * entry[key] for entry in entries]
        axes.plot(epochs, values, label=label, marker="o" if len(epochs) < 30 else None, markersize=3)
    for axes in (loss_axes, metric_axes):
        axes.set_xlabel("epoch")
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_predictions(
    answered: Sequence[AnsweredQuestion],
    path: str | os.PathLike,
    title: str = "Question and best answers with their probabilities",
) -> None:
    """A grid of images, row by row, with their question and the model's best answers."""
    if len(answered) == 0:
        raise ValueError("answered: there is no question to draw.")
    cells = []
    for image, question, predictions, answer in answered:
        lines = [
            textwrap.shorten(best["answer"], 42) + ("" if best["score"] is None else f"  {best['score']:.1%}")
            for best in predictions
        ]
        right = predictions[0]["answer"] == answer
        if answer is not None and not right:
            lines.append(f"(right: {textwrap.shorten(answer, 42)})")
        color = NEUTRAL if answer is None else RIGHT if right else WRONG
        cells.append(_Cell(image, _wrapped(question, 42, 3), "\n".join(lines), color))
    _plot_grid(cells, title, path)


def plot_captions(captions: Sequence[GeneratedCaption], path: str | os.PathLike) -> None:
    """A grid of images, row by row, with the caption that the model generated above and a person's below."""
    if len(captions) == 0:
        raise ValueError("captions: there is no image to draw.")
    cells = [
        _Cell(
            image, _wrapped(prediction, 42, 3), "" if reference is None else _wrapped(f"({reference})", 48, 3), NEUTRAL
        )
        for image, prediction, reference in captions
    ]
    _plot_grid(cells, "Generated caption, and below each image (what a person wrote)", path)


def plot_grounding(cells: Sequence[GroundedExpression], path: str | os.PathLike) -> None:
    """A grid of images, row by row, with the predicted boxes of the expression above each, and dashed the true ones.

    A box that matches a true one by `match_boxes` is green, any other red; where the true ones are not known it is black. The
    line below is green if all boxes, predicted and true, match, and red otherwise. A `ValueError` refuses a box with its
    centre outside the image.
    """
    if len(cells) == 0:
        raise ValueError("cells: there is no expression to draw.")
    drawn = []
    for number, (image, expression, boxes, references) in enumerate(cells):
        for left, top, right, bottom in (*boxes, *(() if references is None else references)):
            if not (0 <= left + right <= 2 and 0 <= top + bottom <= 2):
                raise ValueError(
                    f"cells: box {(left, top, right, bottom)} of cell {number} lies outside the image; expected (left, "
                    "top, right, bottom) in [0, 1]: divide pixels by the image's width and height."
                )
        below = f"{len(boxes)} predicted"
        if references is None:
            color, outlines = NEUTRAL, [(box, NEUTRAL, "solid") for box in boxes]
        else:
            hits = match_boxes(boxes, references) >= 0
            below += f", {len(references)} true, {hits.sum()} matched"
            color = RIGHT if hits.sum() == len(boxes) == len(references) else WRONG
            outlines = [(box, RIGHT if hit else WRONG, "solid") for box, hit in zip(boxes, hits, strict=True)]
            outlines += [(box, NEUTRAL, "dashed") for box in references]
        drawn.append(_Cell(image, _wrapped(expression, 42, 3), below, color, outlines))
    _plot_grid(drawn, "Expression and predicted boxes, dashed the true ones", path)


class _Cell(NamedTuple):
    """One cell of `_plot_grid`."""

    image: Image.Image
    above: str
    below: str
    color: str  # of the text below
    outlines: Sequence[tuple[Sequence[float], str, str]] = ()  # relative boxes, each with a color and a line style


def _plot_grid(cells: Sequence[_Cell], title: str, path: str | os.PathLike) -> None:
    heights = []
    for image, above, below, *_ in cells:
        image_height = max(0.3, min(4.0 * image.height / image.width, 2.5))
        heights.append(image_height + 0.17 * (above.count("\n") + below.count("\n") + 2) + 0.3)
    # A row is as high as the highest of its cells: wide images would leave most of a square one white.
    columns = min(4, len(cells))
    heights = [max(heights[start : start + columns]) for start in range(0, len(cells), columns)]
    figure = Figure(figsize=(4.2 * columns, sum(heights) + 0.6), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights).ravel()
    for axes, (image, above, below, color, outlines) in zip(grid, cells, strict=False):
        draw_image(axes, image, below, fontsize=9, color=color)
        axes.set_title(above, fontsize=10, parse_math=False)
        for (left, top, right, bottom), edge, style in outlines:
            # Pixels are drawn around their numbers, so the image starts at -0.5.
            corner = (left * image.width - 0.5, top * image.height - 0.5)
            sides = ((right - left) * image.width, (bottom - top) * image.height)
            outline = Rectangle(corner, *sides, fill=False, edgecolor=edge, linestyle=style, linewidth=2)
            outline.set_path_effects([withStroke(linewidth=4, foreground="white")])
            axes.add_patch(outline)
    for axes in grid[len(cells) :]:
        axes.set_axis_off()
    figure.draw_without_rendering()  # a first layout does not know yet how the images' shapes shrink their axes
    figure.savefig(path, dpi=100)


def plot_retrieved(
    rows: Sequence[RetrievedImages],
    path: str | os.PathLike,
    title: str = "Each query and what was found for it, best first",
) -> None:
    """One row a query: the query at the left, then the images found for it, right ones in a green frame.

    Args:
        rows: up to ten images each stay readable, and their numbers may differ; a `ValueError` refuses captions or matches
            that are not one each an image.
    """
    if len(rows) == 0:
        raise ValueError("rows: there is no query to draw.")
    for number, row in enumerate(rows):
        known = len(row.images) if row.matches is None else len(row.matches)
        if not len(row.images) == len(row.captions) == known:
            raise ValueError(
                f"rows: row {number} has {len(row.images)} images, {len(row.captions)} captions and {known} "
                "matches; expected one each an image (matches may be None)."
            )
    columns = max(len(row.images) for row in rows)
    width = 2.2 + 1.5 * columns
    figure = Figure(figsize=(width, 1.8 * len(rows) + 0.5), layout="constrained")
    # Texts stay plain: two "$" would make a formula.
    figure.suptitle(textwrap.fill(title, int(11 * width)), parse_math=False)
    cells = figure.subplots(len(rows), 1 + columns, squeeze=False, width_ratios=[1.4] + [1] * columns)
    for (first, *others), row in zip(cells, rows, strict=True):
        if isinstance(row.query, str):
            query = _wrapped(row.query, 24, 7)
            first.text(0, 0.5, query, transform=first.transAxes, va="center", fontsize=10, parse_math=False)
            first.set_axis_off()
        else:
            draw_image(first, row.query, "query", frame=(NEUTRAL, 1))
        matches = row.matches or [False] * len(row.images)
        for axes, image, caption, right in zip(others, row.images, row.captions, matches, strict=False):
            draw_image(axes, image, _wrapped(caption, 22, 2), (RIGHT, 4) if right else (FRAME, 0.8))
        for axes in others[len(row.images) :]:
            axes.set_axis_off()
    figure.savefig(path, dpi=100)


def _wrapped(text: str, width: int, max_lines: int) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=max_lines, placeholder=" ..."))


def draw_image(
    axes: Axes, image: Image.Image, caption: str = "", frame: tuple[str, float] = (FRAME, 0), fontsize: int = 8, **style
) -> None:
    """An image without ticks, in RGB, with a caption below and a frame of a color and width in points."""
    axes.imshow(image.convert("RGB"))
    axes.set(xticks=[], yticks=[])
    color, width = frame
    axes.spines[:].set(edgecolor=color, linewidth=width)
    axes.set_xlabel(caption, fontsize=fontsize, parse_math=False, **style)
