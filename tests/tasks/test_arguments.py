"""The flags of tasks: which task they are of, and what their benchmarks set."""

import pkgutil

import pytest

from tiny import HEAD_FACTS

TASKS = [facts.task for facts in HEAD_FACTS.values() if facts.task]


@pytest.mark.parametrize("task", TASKS)
def test_flags_and_their_task_name_each_other_and_the_same_benchmarks(task):
    assert pkgutil.resolve_name(task.arguments.task) is task
    assert list(task.arguments.benchmark_defaults) == list(task.benchmarks)


@pytest.mark.parametrize("task", TASKS)
def test_what_a_benchmark_sets_are_flags(task):
    kind = task.arguments
    for name, values in kind.benchmark_defaults.items():
        args, training = kind.parse(["--benchmark", name, "--use_cpu"])
        for flag, value in values.items():
            assert getattr(args, flag, None) == value or getattr(training, flag) == value
