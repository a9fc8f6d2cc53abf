"""How a script ends."""

import json
import math
import subprocess
import sys
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from datasets.exceptions import DatasetNotFoundError
from torch.nn.parallel import DistributedDataParallel

from hivilt import run_retrieval, run_vqa
from hivilt.training.command import end_with, run_command


@pytest.mark.parametrize("status", [None, 143])
def test_a_script_that_ends_leaves_the_other_processes(status, tmp_path):
    """Gloo's threads would abort it now and then, after all is done; and first frees the model, in whose end they would
    wait for each other."""
    models = weakref.WeakSet()

    def main():
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        model = DistributedDataParallel(torch.nn.Linear(2, 2))
        model.trainer = [model]
        models.add(model)
        if status:
            sys.exit(status)

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == status
    assert not dist.is_initialized() and not models


# Each takes a third of a second or more to import, and lists no flags.
NOT_FOR_HELP = {
    "datasets",
    "evaluate",
    "faiss",
    "hivilt.modeling_hivilt",
    "hivilt.training.main",
    "matplotlib",
    "scipy",
}
NOT_FOR_HELP |= {"sklearn", "torch._dynamo", "transformers.modeling_utils", "transformers.trainer"}
HELP = """
import runpy, sys
scripts = sys.argv[1:]
for script in scripts:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        print("ended with", stop.code)
print("imported", *sys.modules)
"""


def test_help_lists_all_flags_without_models_data_sets_and_trainer():
    scripts = [run_vqa.__file__, run_retrieval.__file__]
    done = subprocess.run([sys.executable, "-c", HELP, *scripts], capture_output=True, text=True, check=True)
    for_vqa, for_retrieval, rest = done.stdout.split("ended with 0\n")
    for text, own in ((for_vqa, "--question_column"), (for_retrieval, "--caption_column")):
        assert {own, "--train_file", "--learning_rate"} <= set(text.split())
    assert not NOT_FOR_HELP & set(rest.split()), NOT_FOR_HELP & set(rest.split())


MISTAKES = [
    (ValueError("image_size: expected at least 1, got 0"), "image_size: expected at least 1, got 0"),
    (TypeError("id2label: expected a dict"), "id2label: expected a dict"),
    (FileNotFoundError("train_file: there is no file 'x'"), "train_file: there is no file 'x'"),
    (FileNotFoundError(2, "No such file or directory", "settings.yaml"), "settings.yaml: No such file or directory"),
    (OSError("many\n\n  lines\nof a library"), "many lines of a library"),
    (
        ModuleNotFoundError("No module named 'peft.x'", name="peft.x"),
        "the package peft is missing: install it with pip",
    ),
    (ImportError("X needs the Y library:\n`pip install y`"), "X needs the Y library: `pip install y`"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "can't decode byte"),
    (json.JSONDecodeError("Expecting value", "", 0), "Expecting value"),
    (DatasetNotFoundError("Dataset 'x/y' doesn't exist"), "Dataset 'x/y' doesn't exist"),
    (ValueError(), "ValueError"),
]


@pytest.mark.parametrize(("mistake", "said"), MISTAKES)
def test_a_mistake_ends_a_script_in_one_line_and_status_2(mistake, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/run_vqa.py"])

    def main():
        raise mistake

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("run_vqa.py: error: ") and printed.err.endswith("\n") and printed.err.count("\n") == 1
    assert said in printed.err and "Traceback" not in printed.err


def test_a_mistake_that_another_library_found_says_how_to_see_where(capsys):
    for main, hinted in ((lambda: math.sqrt(-1), False), (lambda: json.loads("{"), True), (lambda: None + 1, True)):
        with pytest.raises(SystemExit):
            run_command(main)
        assert ("HIVILT_DEBUG=1" in capsys.readouterr().err) is (hinted or not __name__.startswith("hivilt"))


@pytest.mark.parametrize(("debug", "shown"), [("1", True), ("0", False), ("", False)])
def test_for_debugging_a_mistake_keeps_its_traceback(debug, shown, capsys, monkeypatch):
    monkeypatch.setenv("HIVILT_DEBUG", debug)

    def main():
        raise ValueError("image_size: wrong")

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert "image_size: wrong" in printed
    assert ("Traceback" in printed and "in main" in printed) is shown


@pytest.mark.parametrize(
    "fault", [RuntimeError, AssertionError, KeyError, IndexError, AttributeError, ZeroDivisionError]
)
def test_a_fault_of_ours_keeps_its_traceback(fault, capsys):
    def main():
        raise fault("ours")

    with pytest.raises(fault, match="ours"):
        run_command(main)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("script", [run_vqa, run_retrieval])
def test_who_calls_a_script_from_python_gets_the_exception(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="^train_file: there is no file 'nosuch.jsonl'"):
        script.main(["--train_file", "nosuch.jsonl", "--use_cpu"])
    with pytest.raises(ValueError, match="^--learning_rat is no flag; did you mean --learning_rate"):
        script.main(["--learning_rat", "1"])


def test_of_processes_that_fail_alike_the_first_says_it(capsys, monkeypatch):
    order = []
    monkeypatch.setattr(time, "sleep", lambda seconds: order.append((seconds, capsys.readouterr().err)))
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            end_with(ValueError("wrong"))
    # The second waited, and was not ended meanwhile, so it says it too.
    assert order == [(10, "")]
    assert capsys.readouterr().err.count("wrong") == 2


def test_ctrl_c_ends_a_script_in_one_line(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 130
    assert capsys.readouterr().err == (
        "Ctrl-C: ended; a training goes on from its last checkpoint, if there is one, with --resume_from_checkpoint last, an "
        "index with the same command.\n"
    )
