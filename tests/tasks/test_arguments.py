"""The flags of tasks: which task they are of, and what their benchmarks set."""

import pkgutil
from pathlib import Path

import pytest

import hivilt
from hivilt.tasks.arguments import CaptioningArguments, ReasoningArguments
from hivilt.tasks.open_ended_answering import OpenEndedAnswering
from hivilt.tasks.question_answering import QuestionAnswering
from tiny import HEAD_FACTS

TASKS = [facts.task for facts in HEAD_FACTS.values() if facts.task]


@pytest.mark.parametrize("task", TASKS)
def test_flags_and_their_task_name_each_other_and_the_same_benchmarks(task):
    assert pkgutil.resolve_name(task.arguments.parse(["--use_cpu"])[0].task) is task
    named = lambda name: ["--benchmark", name, "--model_name_or_path", "vqa", "--use_cpu"]
    tasks = {name: task.arguments.parse(named(name))[0].task for name in task.arguments.benchmark_defaults}
    # Some benchmarks of a script may be another task's.
    assert [name for name, of in tasks.items() if pkgutil.resolve_name(of) is task] == list(task.benchmarks)
    assert all(name in pkgutil.resolve_name(of).benchmarks for name, of in tasks.items())


def test_questions_are_answered_from_a_list_unless_told_to_write():
    args, _ = QuestionAnswering.arguments.parse(["--generate", "--num_beams", "2", "--use_cpu"])
    assert pkgutil.resolve_name(args.task) is OpenEndedAnswering
    for flag, value in (("num_beams", "2"), ("max_new_tokens", "5"), ("decoder_model", "gpt2")):
        with pytest.raises(ValueError, match=f"{flag}: got .*, but answers come from a list.*--generate"):
            QuestionAnswering.arguments.parse([f"--{flag}", value, "--use_cpu"])


def test_rewards_are_not_for_mirrored_words():
    flags = ["--self_critical", "--model_name_or_path", "folder", "--use_cpu", "--random_flip"]
    assert CaptioningArguments.parse([*flags, "skip"])[0].self_critical
    with pytest.raises(ValueError, match="self_critical: captions keep their left and right.*'skip'"):
        CaptioningArguments.parse([*flags, "swap"])


@pytest.mark.parametrize("task", TASKS)
def test_what_a_benchmark_sets_are_flags(task):
    kind = task.arguments
    for name, values in kind.benchmark_defaults.items():
        args, training = kind.parse(["--benchmark", name, "--model_name_or_path", "vqa", "--use_cpu"])
        for flag, value in values.items():
            assert getattr(args, flag, None) == value or getattr(training, flag) == value


def test_a_new_model_of_drawn_pairs_starts_from_the_weights_of_grounding():
    """And any other model, or other data, from what it is given."""
    named = lambda *flags: ReasoningArguments.parse(["--use_cpu", *flags])[0].model_name_or_path
    assert Path(named()) == Path(hivilt.__file__).parent / "grounding"
    assert named("--benchmark", "pairs", "--model_name_or_path", "vqa") == "vqa"
    assert named("--fusion", '{"hidden_size": 32}') is None
    assert named("--train_file", "train.jsonl") is None


def test_without_data_named_the_tasks_own_benchmark_brings_its_flags():
    parse = lambda *flags: QuestionAnswering.arguments.parse(["--use_cpu", *flags])[1].dataloader_num_workers
    own = QuestionAnswering.arguments.benchmark_defaults["easy-vqa"]["dataloader_num_workers"]
    assert parse() == parse("--benchmark", "easy-vqa") == own == 1
    assert parse("--dataloader_num_workers", "2") == 2
    assert parse("--train_file", "train.jsonl") == parse("--data_dir", "mine") == 0
