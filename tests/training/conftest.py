import pytest
from trainers import captioned, dataset, opened  # noqa: F401

from hivilt.tasks.task import Task
from hivilt.training.arguments import TaskArguments
from hivilt.training.main import begin_run


class Nothing(Task):
    """A task with the flags that all have, and no data."""

    arguments = TaskArguments
    defaults = {"output_dir": "outputs/x"}
    benchmarks = {}


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Begins a run in an empty folder, of a task that has no data."""
    monkeypatch.chdir(tmp_path)
    return lambda *flags: begin_run(["--use_cpu", *flags], Nothing)
