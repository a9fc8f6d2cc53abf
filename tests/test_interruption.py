"""Training that is killed, told to end or out of disk: it goes on to the weights of a run that nothing interrupted."""

import json
import signal
import subprocess
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from hivilt.training.resuming import last_checkpoint
from interruptions import Run, execute
from processes import launch
from tiny import make_image

COLORS = ["red", "blue", "green", "white"]
# With dropout and mirrored images, so that what is drawn has to go on as well.
TINY = {"hidden_size": 16, "num_attention_heads": 2, "fusion_intermediate_size": 16, "dropout": 0.1}
# Both scripts run the same `main`.
each_script = pytest.mark.parametrize("script", ["run_vqa", pytest.param("run_retrieval", marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A table of images with questions and captions: 10 to train on, 4 to choose by."""
    folder = tmp_path_factory.mktemp("data")
    for split, number in (("train", 10), ("validation", 4)):
        rows = []
        for place in range(number):
            color, name = COLORS[place % 4], f"{split}-{place}.png"
            make_image(color, size=(31, 23 + place)).save(folder / name)
            rows.append({"image": name, "question": "which color?", "answer": color, "caption": f"{color}, {place}"})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def flags(data, out, *more):
    return [
        *("--train_file", str(data / "train.jsonl"), "--validation_file", str(data / "validation.jsonl")),
        *("--output_dir", str(out), "--fusion", json.dumps(TINY), "--image_size", "32", "--use_cpu", "--do_train"),
        *("--disable_tqdm", "true", "--random_flip", "skip", "--max_steps", "8", "--logging_steps", "1"),
        *("--per_device_train_batch_size", "4", "--eval_strategy", "steps", "--eval_steps", "2"),
        *("--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "2", *more),
    ]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Gives for a script what nothing interrupted left."""

    @cache
    def run(script):
        folder = tmp_path_factory.mktemp(script)
        status, output = execute(Run(script, flags(data, folder)))
        assert status == 0, output
        return folder

    return run


def again(data, out, *more):
    return flags(data, out, "--resume_from_checkpoint", "last", *more)


def assert_same_weights(first, second):
    first, second = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.slow
@each_script
def test_killed_training_goes_on_to_the_same_weights(script, data, whole, tmp_path):
    out = tmp_path / "out"
    moments = [
        ("step", 1),  # before there is any checkpoint
        ("weights are half written", 2),  # of step 4
        ("state is half written", 1),  # of step 4, again
        ("old checkpoints go", 2),  # step 6 is whole, nothing is deleted yet
        ("evaluation", 1),  # of step 8
    ]
    killed = [execute(Run(script, again(data, out), moment, call)) for moment, call in moments]
    assert [status for status, _ in killed] == [-signal.SIGKILL] * len(moments), killed
    assert "has no checkpoint to go on from: training begins" in killed[0][1]
    for _, output in killed[2:4]:
        assert "checkpoint-4 was not written to its end" in output
    assert last_checkpoint(out) == str(out / "checkpoint-6")

    status, output = execute(Run(script, again(data, out)))
    assert status == 0, output
    assert_same_weights(whole(script), out)


@each_script
def test_told_to_end_it_saves_and_goes_on_to_the_same_weights(script, data, whole, tmp_path):
    out = tmp_path / "out"
    runs = [
        Run(script, flags(data, out), "step", 3, signal.SIGTERM),
        Run(script, again(data, out), "evaluation", 3, signal.SIGINT),  # of step 8, the last
        Run(script, again(data, out)),
    ]
    first, second, last = map(execute, runs)
    assert last[0] == 0, last[1]
    for (status, output), step, sent in ((first, 3, signal.SIGTERM), (second, 8, signal.SIGINT)):
        assert status == 128 + sent, output
        assert f"{sent.name}: saved step {step} of 8" in output and "Traceback" not in output
    assert_same_weights(whole(script), out)


@pytest.mark.slow
def test_of_two_processes_one_is_told_to_end_and_both_save(data, tmp_path):
    """At the end of the epoch, where they look after each other; both go on to the weights of an unbroken run."""
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    rarely = ("--eval_steps", "8", "--save_steps", "8")  # not at step 4, where the second epoch of two steps ends
    first = [Run("run_vqa", flags(data, broken, *rarely), "step", 3, signal.SIGTERM)]
    launch("interruptions", 2, [json.dumps(first)], status=1)
    assert last_checkpoint(broken) == str(broken / "checkpoint-4")
    assert not (broken / "model.safetensors").exists()

    rest = [Run("run_vqa", again(data, broken, *rarely)), Run("run_vqa", flags(data, unbroken, *rarely))]
    launch("interruptions", 2, [json.dumps(rest)])
    assert_same_weights(unbroken, broken)


@pytest.mark.slow
@each_script
def test_workers_train_to_the_same_weights(script, data, whole, tmp_path):
    for number in ("0", "2"):
        out = tmp_path / number
        status, output = execute(Run(script, flags(data, out, "--dataloader_num_workers", number)))
        assert status == 0, output
        assert_same_weights(whole(script), out)


@pytest.fixture
def disk(tmp_path):
    """A folder that is a disk of its own, as large as its `resize` says."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no small disk can be had here: {done.stderr.strip()}")

    mount("-t", "tmpfs", "-o", "size=64m", "tmpfs")
    yield folder, lambda size: mount("-o", f"remount,size={size}")
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_and_loses_nothing(data, disk, whole):
    folder, resize = disk
    size = sum(path.stat().st_size for path in (whole("run_vqa") / "checkpoint-8").rglob("*"))
    resize(int(1.5 * size))
    status, output = execute(Run("run_vqa", flags(data, folder / "out")))
    assert status == 1
    assert "OSError: output_dir: checkpoint-4 could not be written to" in output
    assert "MiB free" in output and "go on with --resume_from_checkpoint last" in output
    # What was written of it does not fill the disk.
    assert last_checkpoint(folder / "out") == str(folder / "out/checkpoint-2")
    assert not (folder / "out/checkpoint-4").exists()

    resize(10 * size)
    status, output = execute(Run("run_vqa", again(data, folder / "out")))
    assert status == 0, output
    assert_same_weights(whole("run_vqa"), folder / "out")


def test_an_unfinished_checkpoint_is_refused_by_name(data, tmp_path):
    unfinished = tmp_path / "checkpoint-2"
    unfinished.mkdir()
    status, output = execute(Run("run_vqa", flags(data, tmp_path, "--resume_from_checkpoint", str(unfinished))))
    assert status == 1 and f"ValueError: resume_from_checkpoint: {unfinished} is no checkpoint" in output
