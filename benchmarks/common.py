"""What benchmarks share: their flags, how they time what they compare, and how they show it."""

import argparse
import io
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from tqdm import tqdm
from transformers import TrainerCallback

from hivilt.tasks.task import Task
from hivilt.training.main import main

Name = TypeVar("Name")


def make_parser(docstring: str) -> argparse.ArgumentParser:
    """The parser of a script with this docstring, with the folder of its result file."""
    parser = argparse.ArgumentParser(description=docstring.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results", help="of the result file")
    return parser


def seconds(run: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def alternate(runs: Mapping[Name, Callable[[], object]], rounds: int) -> dict[Name, float]:
    """Median seconds of each call, one after the other in turns, so that what slows the machine down slows all of them."""
    found = defaultdict(list)
    turns = [turn for _ in range(rounds) for turn in runs.items()]
    # On a terminal alone.
    for name, run in tqdm(turns, desc="Timing", unit="runs", leave=False, disable=None):
        found[name].append(seconds(run))
    return {name: median(times) for name, times in found.items()}


def run_quietly(task_class: type[Task], flags: list[str], callback: TrainerCallback | None = None) -> dict[str, Any]:
    """What a run of a task leaves in results.json; nothing else is kept or printed. Its trainer may have one more callback."""

    class Watched(task_class):
        def trainer_arguments(self) -> dict[str, Any]:
            return {**super().trainer_arguments(), **({} if callback is None else {"callbacks": [callback]})}

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        return main(Watched, ["--output_dir", folder, "--disable_tqdm", "true", *flags])


def markdown(head: str, rows: Iterable[Iterable[str]], left: Iterable[int] = (0,)) -> str:
    """A table under the line `head`; the columns of `left` are aligned on the left, all others on the right."""
    rule = [":--" if column in left else "--:" for column in range(head.count("|") - 1)]
    return "\n".join([head, *(f"| {' | '.join(row)} |" for row in (rule, *rows))])


def judge_goal(
    goal: str, measured: float | None, bound: float, unit: str, digits: str, at_most: bool, reason: str
) -> dict[str, Any]:
    """What was wanted, what was measured, if it could be, and whether it was met or for which reason not; " %" is of
    fractions."""
    met = measured is not None and (measured <= bound if at_most else measured >= bound)
    scale = 100 if unit == " %" else 1
    return {
        "goal": goal,
        "wanted": f"at {'most' if at_most else 'least'} {scale * bound:g}{unit}",
        "measured": "not measured" if measured is None else f"{scale * measured:{digits}}{unit}",
        "met": met,
        **({} if met else {"reason": reason}),
    }


def goals_table(results: dict) -> str:
    """Markdown: a goal a row."""
    rows = []
    for goal in results["goals"]:
        verdict = "met" if goal["met"] else f"missed: {goal['reason']}"
        rows.append([goal["goal"], goal["wanted"], goal["measured"], verdict])
    return markdown("| goal | wanted | measured | |", rows, left=(0, 3))
