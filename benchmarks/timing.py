"""How benchmarks time what they compare."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from statistics import median
from typing import TypeVar

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
