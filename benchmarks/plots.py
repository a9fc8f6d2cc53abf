"""What benchmarks draw: costs, curves, and the attention of a model. As `hivilt.evaluation.plots`, into a PNG file each."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from PIL import Image

from hivilt.evaluation.plots import draw_image


def draw_attention(image: Image.Image, attention: np.ndarray) -> Image.Image:
    """An image, in RGB, under the colors of the attention to it: bright where most, dark where least.

    Args:
        attention: (rows, columns), not negative. It covers the image whatever its grid.
    """
    scaled = Image.fromarray((255 * attention / attention.max()).astype(np.uint8))
    # Smoothly between the centers of the cells.
    colors = colormaps["inferno"](np.asarray(scaled.resize(image.size, Image.Resampling.BILINEAR)), bytes=True)
    return Image.blend(image, Image.fromarray(colors).convert("RGB"), 0.75)


def plot_attention(
    image: Image.Image,
    words: Sequence[str],
    stages: Sequence[tuple[str, np.ndarray]],
    bars: Mapping[str, Mapping[str, float]],
    title: str,
    path: str | os.PathLike,
) -> None:
    """What each word of a question attended to in the image, stage by stage, and what global fusion attended to.

    Args:
        image: in RGB.
        words: the tokens of the question, a column each.
        stages: a row each, its name and the attention of each word, (words, rows, columns), not negative.
        bars: for each side of global fusion the share of its attention that each thing got; shares sum to 1.
    """
    num_words = len(words)
    figure = Figure(figsize=(1.3 * max(num_words, 4), 1.5 * (len(stages) + 1) + 0.8), layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(len(stages) + 1, num_words)
    for row, (name, maps) in enumerate(stages):
        for column, (word, attention) in enumerate(zip(words, maps, strict=True)):
            axes = figure.add_subplot(grid[row, column])
            draw_image(axes, draw_attention(image, attention))
            if row == 0:
                axes.set_title(word, fontsize=10)
            if column == 0:
                axes.set_ylabel(name, fontsize=9)
    last = grid[-1, :].subgridspec(1, 2, width_ratios=(1, 2))
    draw_image(figure.add_subplot(last[0]), image)
    axes = figure.add_subplot(last[1])
    for place, shares in enumerate(bars.values()):
        start = 0.0
        for seen, share in shares.items():
            axes.barh(place, share, left=start, color=f"C{len(axes.patches) % 2}", alpha=0.5)
            if share >= 0.1:  # it has room for its name
                axes.text(start + share / 2, place, f"{seen} {share:.0%}", ha="center", va="center", fontsize=8)
            start += share
    axes.set(yticks=range(len(bars)), yticklabels=list(bars), xticks=[], xlim=(0, 1))
    axes.set_title("global fusion", fontsize=10)
    figure.savefig(path, dpi=80)


def plot_scaling(collections: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Seconds of evaluating collections of different sizes, in two stages and by fusing all pairs.

    Args:
        collections: `num_images`, `seconds` of the two stages together, and `all_pairs_seconds` by model.
    """
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    sizes = [row["num_images"] for row in collections]
    axes.plot(sizes, [row["seconds"] for row in collections], marker="o", label="HiViLT, two stages (measured)")
    for model, name in {"hivilt": "HiViLT", "vilt": "ViLT"}.items():
        times = [row["all_pairs_seconds"][model] for row in collections]
        axes.plot(sizes, times, marker="o", linestyle="--", label=f"{name}, all pairs (from a slice)")
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
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("inference", "training"), strict=True):
        for name, row in models.items():
            settings = [(*map(float, key.split(" x ")), s) for key, s in row[f"{kind}_seconds_per_question"].items()]
            most = max(images for images, _, _ in settings)
            points = sorted((per, 1 / seconds) for images, per, seconds in settings if images == most)
            style = {"linewidth": 3, "color": "black", "zorder": 3} if name == "HiViLT" else {"linewidth": 1.5}
            axes.plot(*zip(*points, strict=True), marker="o", label=name, **style)
        axes.set(
            title=kind, xlabel="questions about each image", ylabel="questions a second, one thread", ylim=(0, None)
        )
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def plot_study(panels: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], path: str | os.PathLike) -> None:
    """What is reached against what training has cost so far, a panel for each task and a line for each contestant.

    Args:
        panels: trainings by task and contestant: `flops` of all of the training, and `curve`, pairs of the share of it
            and the accuracy or recall in [0, 1] on held-out training images. Lines are means over trainings.
    """
    # A contestant looks the same in every panel; there are fewer colors than contestants.
    names = list(dict.fromkeys(name for contestants in panels.values() for name in contestants))
    styles = {name: {"color": f"C{place}", "linestyle": "--" if place > 6 else "-"} for place, name in enumerate(names)}
    styles |= {name: {"color": "black", "linestyle": ":", "zorder": 3} for name in names if name.startswith("HiViLT")}
    styles["HiViLT"] = {"linewidth": 3, "color": "black", "zorder": 3}
    columns = min(3, max(1, len(panels)))
    rows = -(-max(1, len(panels)) // columns)
    figure = Figure(figsize=(4.5 * columns + 2.5, 4 * rows), layout="constrained")
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
