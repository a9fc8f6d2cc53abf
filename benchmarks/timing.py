"""How benchmarks time what they compare."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, TypeVar

from transformers import TrainerCallback

from hivilt.tasks.task import Task

Name = TypeVar("Name")


def seconds(run: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def alternate(runs: Mapping[Name, Callable[[], object]], rounds: int) -> dict[Name, float]:
    """Median seconds of each call, one after the other in turns, so that what slows the machine down slows all of them."""
    found = defaultdict(list)
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(seconds(run))
    return {name: median(times) for name, times in found.items()}


def watched(task_class: type[Task], callback: TrainerCallback) -> type[Task]:
    """The same task, whose trainer has one more callback."""

    class Watched(task_class):
        def trainer_arguments(self) -> dict[str, Any]:
            return {**super().trainer_arguments(), "callbacks": [callback]}

    return Watched
