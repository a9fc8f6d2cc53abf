"""Runs the scripts in processes that are killed at chosen moments, or at any: what tests and `make stress` share."""

import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hivilt.training.command import run_command
from processes import run_copies


class Run(NamedTuple):
    """A run of a script.

    Args:
        script: "run_vqa" or "run_retrieval".
        flags: its command line.
        moment: when it is sent `signal`: one of `MOMENTS`, seconds after it began, or never.
        call: at which call of that moment, from 1.
        signal: SIGKILL, or SIGTERM.
    """

    script: str
    flags: Sequence[str]
    moment: str | float | None = None
    call: int = 1
    signal: int = signal.SIGKILL


# Where the signal comes: when this method begins, or half-way through what it writes.
MOMENTS = {
    "step": ("hivilt.training.trainer", "HiViLTTrainer", "training_step"),
    "evaluation": ("hivilt.training.trainer", "HiViLTTrainer", "evaluation_loop"),
    "save begins": ("hivilt.training.trainer", "HiViLTTrainer", "_save_checkpoint"),
    "weights are half written": ("hivilt.training.trainer", "HiViLTTrainer", "_save_optimizer_and_scheduler"),
    "optimizer is written": ("hivilt.training.trainer", "HiViLTTrainer", "_save_rng_state"),
    "state is half written": ("transformers.trainer_callback", "TrainerState", "save_to_json"),
    "old checkpoints go": ("transformers.trainer", None, "rotate_checkpoints"),
    "model is written": ("hivilt.training.trainer", "HiViLTTrainer", "save_state"),
}


def execute(run: Run) -> tuple[int, str]:
    """Runs it to its end: its exit status, negative for a signal that ended it, and what it wrote."""
    (status,), printed, errors = run_copies(Path(__file__).stem, 1, [json.dumps([run])])
    return status, (printed + errors)[-4000:]


def _arrange(moment: str, call: int, number: int) -> None:
    """Makes this process send itself the signal at the moment's `call`."""
    module, owner, name = MOMENTS[moment]
    owner = importlib.import_module(module) if owner is None else getattr(importlib.import_module(module), owner)
    usual: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def instead(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            if moment == "weights are half written":
                _cut(next(Path(args[1]).glob("*.safetensors")))
            elif moment == "state is half written":
                usual(*args, **kwargs)
                _cut(Path(args[1]))
            os.kill(os.getpid(), number)
        return usual(*args, **kwargs)

    setattr(owner, name, instead)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _execute(runs: Sequence[Run]) -> None:
    """Runs in this process; if it is one of several, the signals go to the second of them."""
    for run in runs:
        if os.environ.get("RANK", "1") == "1":
            if isinstance(run.moment, str):
                _arrange(run.moment, run.call, run.signal)
            elif run.moment is not None:
                threading.Timer(run.moment, os.kill, (os.getpid(), run.signal)).start()
        importlib.import_module(f"hivilt.{run.script}").main(run.flags)


if __name__ == "__main__":
    runs = [Run(*run) for run in json.loads(sys.argv[1])]
    if "RANK" in os.environ:
        run_command(lambda: _execute(runs))
    else:
        _execute(runs)
