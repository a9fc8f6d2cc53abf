"""`make stress`: what each long test counted goes to benchmarks/results/stress.json."""

import json
from pathlib import Path

import pytest

from hivilt.training.results import environment

RESULTS = Path(__file__).parents[2] / "benchmarks/results/stress.json"
_measured: dict[str, dict] = {}


@pytest.fixture
def record():
    """Takes a name and what was counted under it."""
    return _measured.__setitem__


def pytest_sessionfinish(session, exitstatus):
    # All of it or nothing: a file that says that nothing was lost is of a run in which nothing was.
    if exitstatus == 0 and len(_measured) == len(session.items):
        results = {"measured": dict(sorted(_measured.items())), "environment": environment()}
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
