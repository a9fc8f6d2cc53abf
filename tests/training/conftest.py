import pytest
from trainers import captioned, dataset, opened  # noqa: F401

from hivilt.training.arguments import TaskArguments, parse_arguments
from hivilt.training.main import begin_run


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Begins a run in an empty folder, with the flags that all tasks have."""
    monkeypatch.chdir(tmp_path)

    def begin(*flags):
        parsed = parse_arguments(["--use_cpu", *flags], TaskArguments, {"output_dir": "outputs/x"})
        begin_run(*parsed)
        return parsed

    return begin
