"""Every image this repository draws: the course of training, what a model answered or found, its attention.

Pure functions over lists and arrays that write a PNG; they need no display and leave matplotlib's global state alone.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

RIGHT, WRONG, NEUTRAL, FRAME = "tab:green", "tab:red", "black", "lightgray"


class AnsweredQuestion(NamedTuple):
    """One cell of `plot_predictions`.

    Args:
        image: what was asked about.
        question: what was asked.
        predictions: `{"answer": str, "score": float}`, best first.
        answer: the right answer; `None` where it is not known.
    """

    image: Image.Image
    question: str
    predictions: Sequence[Mapping[str, Any]]
    answer: str | None


class RetrievedImages(NamedTuple):
    """One row of `plot_retrieved`.

    Args:
        query: the text, or the image, that was searched with.
        images: what was found, best first.
        captions: one short line under each image, such as its score or name.
        matches: which of the images are right; `None` where it is not known.
    """

    query: str | Image.Image
    images: Sequence[Image.Image]
    captions: Sequence[str]
    matches: Sequence[bool] | None


# matplotlib is imported where something is drawn: it costs a script that only prints its flags a third of a second.
def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plot_training(
    log_history: Sequence[Mapping[str, float]], path: str | os.PathLike, metric: str = "accuracy"
) -> None:
    """Loss and a held-out metric over the epochs.

    Args:
        log_history: `trainer.state.log_history`; reads `epoch`, `loss`, `eval_loss`, `eval_{metric}` where they occur.
        path: the PNG file to write.
        metric: name of a metric in [0, 1], drawn in percent.
    """
    figure = _figure(10, 4)
    loss_axes, metric_axes = figure.subplots(1, 2)

    for key, label in (("loss", "training"), ("eval_loss", "held out")):
        epochs, values = _curve(log_history, key)
        loss_axes.plot(epochs, values, label=label, marker="o" if len(epochs) < 30 else None, markersize=3)
    loss_axes.set(xlabel="epoch", ylabel="loss", title="Loss", yscale="log")
    loss_axes.legend()

    epochs, values = _curve(log_history, f"eval_{metric}")
    metric_axes.plot(epochs, [100 * value for value in values], label="held out", marker="o", markersize=3)
    name = metric.replace("_", " ")
    metric_axes.set(xlabel="epoch", ylabel=f"{name} (%)", title=name[:1].upper() + name[1:])
    metric_axes.legend()

    for axes in (loss_axes, metric_axes):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _curve(log_history: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    points = [(entry["epoch"], entry[key]) for entry in log_history if key in entry]
    return [epoch for epoch, _ in points], [value for _, value in points]


def draw_attention(image: Image.Image, attention: np.ndarray) -> Image.Image:
    """An image under the colors of where the model looked: bright where most, dark where least.

    Args:
        image: in RGB.
        attention: (rows, columns), not negative. It covers the image whatever its grid.

    Returns:
        As large as `image`, in RGB.
    """
    scaled = Image.fromarray((255 * attention / attention.max()).astype(np.uint8))
    # Smoothly between the centers of the cells.
    from matplotlib import colormaps

    colors = colormaps["inferno"](np.asarray(scaled.resize(image.size, Image.Resampling.BILINEAR)), bytes=True)
    return Image.blend(image, Image.fromarray(colors).convert("RGB"), 0.75)


def plot_attention(
    image: Image.Image,
    words: Sequence[str],
    stages: Sequence[tuple[str, np.ndarray]],
    looks: Mapping[str, Mapping[str, float]],
    title: str,
    path: str | os.PathLike,
) -> None:
    """Where each word of a question looked in the image, stage by stage, and what global fusion looked at.

    Args:
        image: in RGB.
        words: the tokens of the question, a column each.
        stages: a row each, its name and (words, rows, columns), where each word looked, not negative.
        looks: bars: what one side of global fusion gave to each thing that it could look at, shares that sum to 1.
        title: the line above.
        path: the PNG file to write.
    """
    num_words = len(words)
    figure = _figure(1.3 * max(num_words, 4), 1.5 * (len(stages) + 1) + 0.8)
    figure.suptitle(title)
    grid = figure.add_gridspec(len(stages) + 1, num_words)
    for row, (name, maps) in enumerate(stages):
        for column, (word, attention) in enumerate(zip(words, maps, strict=True)):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(draw_attention(image, attention))
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(word, fontsize=10)
            if column == 0:
                axes.set_ylabel(name, fontsize=9)
    last = grid[-1, :].subgridspec(1, 2, width_ratios=(1, 2))
    axes = figure.add_subplot(last[0])
    axes.imshow(image)
    axes.set_axis_off()
    axes = figure.add_subplot(last[1])
    for place, shares in enumerate(looks.values()):
        start = 0.0
        for seen, share in shares.items():
            axes.barh(place, share, left=start, color=f"C{len(axes.patches) % 2}", alpha=0.5)
            if share >= 0.1:  # it has room for its name
                axes.text(start + share / 2, place, f"{seen} {share:.0%}", ha="center", va="center", fontsize=8)
            start += share
    axes.set(yticks=range(len(looks)), yticklabels=list(looks), xticks=[], xlim=(0, 1))
    axes.set_title("global fusion", fontsize=10)
    figure.savefig(path, dpi=80)


def plot_predictions(answered: Sequence[AnsweredQuestion], path: str | os.PathLike, columns: int = 4) -> None:
    """A grid of images with their question and the model's best answers.

    Args:
        answered: the cells, row by row.
        path: the PNG file to write.
        columns: cells in a row.

    Raises:
        ValueError: `answered` is empty.
    """
    if len(answered) == 0:
        raise ValueError("answered: there is no question to draw.")
    columns = min(columns, len(answered))
    rows = -(-len(answered) // columns)
    # A row is as high as the highest of its cells: wide images would leave most of a square one white.
    shapes = [_height(one) for one in answered]
    heights = [max(shapes[start : start + columns]) for start in range(0, rows * columns, columns)]
    figure = _figure(4.2 * columns, sum(heights) + 0.6)
    figure.suptitle("Question and best answers with their probabilities")
    cells = np.atleast_1d(figure.subfigures(rows, columns, squeeze=False, height_ratios=heights)).ravel()
    for cell, one in zip(cells, answered, strict=False):
        _draw_answer(cell, one)
    figure.savefig(path, dpi=100)


def _height(one: AnsweredQuestion) -> float:
    """How high its cell is, in inches."""
    width, most = 4.0, 2.5
    lines = len(_question_lines(one)) + len(_answer_lines(one))
    return max(0.3, min(width * one.image.height / one.image.width, most)) + 0.17 * lines + 0.3


def _question_lines(one: AnsweredQuestion) -> list[str]:
    return textwrap.wrap(one.question, 42, max_lines=3, placeholder=" ...")


def _answer_lines(one: AnsweredQuestion) -> list[str]:
    lines = [f"{textwrap.shorten(answer['answer'], 42)}  {answer['score']:.1%}" for answer in one.predictions]
    if one.answer is not None and one.predictions[0]["answer"] != one.answer:
        lines.append(f"(right: {textwrap.shorten(one.answer, 42)})")
    return lines


def _draw_answer(cell: Any, one: AnsweredQuestion) -> None:
    axes = cell.subplots()
    axes.imshow(one.image.convert("RGB"))
    axes.set_axis_off()

    color = NEUTRAL if one.answer is None else RIGHT if one.predictions[0]["answer"] == one.answer else WRONG
    cell.suptitle("\n".join(_question_lines(one)), fontsize=10, parse_math=False)
    cell.supxlabel("\n".join(_answer_lines(one)), fontsize=9, color=color, parse_math=False)


def plot_retrieved(
    rows: Sequence[RetrievedImages],
    path: str | os.PathLike,
    title: str = "Each query and what was found for it, best first",
) -> None:
    """One row a query: the query at the left, then the images found for it, right ones in a green frame.

    Args:
        rows: the queries with what was found; up to ten images each stay readable, and their numbers may differ.
        path: the PNG file to write.
        title: a line over the whole.

    Raises:
        ValueError: `rows` is empty, or a row's captions or matches are not one each an image.
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
    figure = _figure(width, 1.8 * len(rows) + 0.5)
    # Texts stay plain: two "$" would make a formula.
    figure.suptitle(textwrap.fill(title, int(11 * width)), parse_math=False)
    cells = figure.subplots(len(rows), 1 + columns, squeeze=False, width_ratios=[1.4] + [1] * columns)
    for line, row in zip(cells, rows, strict=True):
        for axes in line:
            axes.set_axis_off()
        if isinstance(row.query, str):
            query = "\n".join(textwrap.wrap(row.query, 24, max_lines=7, placeholder=" ..."))
            line[0].text(0, 0.5, query, transform=line[0].transAxes, va="center", fontsize=10, parse_math=False)
        else:
            _draw_image(line[0], row.query, "query", NEUTRAL, 1)
        matches = [False] * len(row.images) if row.matches is None else row.matches
        for axes, image, caption, right in zip(line[1:], row.images, row.captions, matches, strict=False):
            _draw_image(axes, image, caption, RIGHT if right else FRAME, 4 if right else 0.8)
    figure.savefig(path, dpi=100)


def _draw_image(axes: Any, image: Image.Image, caption: str, frame: str, linewidth: float) -> None:
    axes.set_axis_on()
    axes.imshow(image.convert("RGB"))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(edgecolor=frame, linewidth=linewidth)
    caption = "\n".join(textwrap.wrap(caption, 22, max_lines=2, placeholder=" ..."))
    axes.set_xlabel(caption, fontsize=8, parse_math=False)


def plot_scaling(collections: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Seconds of evaluating collections of different sizes, in two stages and by fusing all pairs.

    Args:
        collections: `num_images`, `seconds` of the two stages together, and `all_pairs_seconds` by model.
        path: the PNG file to write.
    """
    figure = _figure(6, 4.5)
    axes = figure.subplots()
    sizes = [one["num_images"] for one in collections]
    axes.plot(sizes, [one["seconds"] for one in collections], marker="o", label="HiViLT, two stages (measured)")
    for model, label in (("hivilt", "HiViLT, all pairs (from a slice)"), ("vilt", "ViLT, all pairs (from a slice)")):
        times = [one["all_pairs_seconds"][model] for one in collections]
        axes.plot(sizes, times, marker="o", linestyle="--", label=label)
    for seconds, unit in ((60, "a minute"), (3600, "an hour"), (86400, "a day")):
        axes.axhline(seconds, color="0.85", linewidth=1, zorder=0)
        axes.annotate(unit, (sizes[0], seconds), color="0.6", fontsize=8, va="bottom")
    axes.set(xscale="log", yscale="log", xlabel="images, five captions each", ylabel="seconds, one thread")
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_peers(models: Mapping[str, Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Questions a second of several models against how many questions each image meets, in inference and training.

    Args:
        models: by name, `inference_seconds_per_question` and `training_seconds_per_question`, each by setting, named
            `"<images> x <questions an image>"`; those with the most images are drawn.
        path: the PNG file to write.
    """
    figure = _figure(11, 4.5)
    for axes, kind in zip(figure.subplots(1, 2), ("inference", "training"), strict=True):
        for name, row in models.items():
            settings = {
                tuple(map(float, key.split(" x "))): s for key, s in row[f"{kind}_seconds_per_question"].items()
            }
            most = max(images for images, _ in settings)
            points = sorted((per, 1 / s) for (images, per), s in settings.items() if images == most)
            style = {"linewidth": 3, "color": "black", "zorder": 3} if name == "HiViLT" else {"linewidth": 1.5}
            axes.plot(*zip(*points, strict=True), marker="o", label=name, **style)
        axes.set(title=kind, xlabel="questions about each image", ylabel="questions a second, one thread")
        axes.set(ylim=(0, None))
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def plot_study(panels: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], path: str | os.PathLike) -> None:
    """What is reached against what training has cost so far, a panel for each task and a line for each contestant.

    Args:
        panels: trainings by task and contestant: `flops` of all of the training, and `curve`, pairs of the share of it
            and the accuracy or recall in [0, 1] on held-out training images. Lines are means over trainings.
        path: the PNG file to write.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    # A contestant looks the same in every panel; there are fewer colors than contestants.
    names = list(dict.fromkeys(name for contestants in panels.values() for name in contestants))
    styles = {name: {"color": f"C{place}", "linestyle": "--" if place > 6 else "-"} for place, name in enumerate(names)}
    styles |= {name: {"color": "black", "linestyle": ":", "zorder": 3} for name in names if name.startswith("HiViLT")}
    styles["HiViLT"] = {"linewidth": 3, "color": "black", "zorder": 3}
    columns = min(3, max(1, len(panels)))
    rows = -(-max(1, len(panels)) // columns)
    figure = _figure(4.5 * columns + 2.5, 4 * rows)
    panes = figure.subplots(rows, columns, squeeze=False).ravel()
    drawn = {}
    for axes, (task, contestants) in zip(panes, panels.items(), strict=False):
        for contestant, lines in contestants.items():
            curves = np.array([line["curve"] for line in lines])  # (seeds, evaluations, 2)
            share, accuracy = curves.mean(axis=0).T
            cost = share * lines[0]["flops"] / 1e12
            (drawn[contestant],) = axes.plot(cost, 100 * accuracy, marker=".", label=contestant, **styles[contestant])
        axes.set(title=task, xlabel="training, TFLOP", ylabel="on held-out training images, %", xscale="log")
        # Powers of ten alone name too few places on some panels, and the usual ticks between them run into each other.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    for axes in panes[len(panels) :]:
        axes.set_axis_off()
    figure.legend([drawn[name] for name in names], names, loc="outside right upper")
    figure.savefig(path, dpi=120)
