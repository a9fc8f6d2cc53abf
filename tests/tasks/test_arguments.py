"""The flags of tasks: which task they are of, and what their benchmarks set."""

import pkgutil

import pytest

from hivilt.tasks.arguments import RetrievalArguments, VQAArguments


@pytest.mark.parametrize("kind", [VQAArguments, RetrievalArguments])
def test_flags_and_their_task_name_each_other_and_the_same_benchmarks(kind):
    task = pkgutil.resolve_name(kind.task)
    assert task.arguments is kind
    assert list(kind.benchmark_defaults) == list(task.benchmarks)


@pytest.mark.parametrize("kind", [VQAArguments, RetrievalArguments])
def test_what_a_benchmark_sets_are_flags_and_hold_unless_others_are_given(kind):
    for name, values in kind.benchmark_defaults.items():
        args, training = kind.parse(["--benchmark", name, "--use_cpu"])
        for flag, value in values.items():
            assert getattr(args, flag, None) == value or getattr(training, flag) == value
