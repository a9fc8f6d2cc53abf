"""Runs the scripts in processes that are killed at chosen moments, or at any: what tests and `make stress` share."""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


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
    "step": ("hivilt.trainers", "HiViLTTrainer", "training_step"),
    "evaluation": ("hivilt.trainers", "HiViLTTrainer", "evaluation_loop"),
    "save begins": ("hivilt.trainers", "HiViLTTrainer", "_save_checkpoint"),
    "weights are half written": ("hivilt.trainers", "HiViLTTrainer", "_save_optimizer_and_scheduler"),
    "optimizer is written": ("hivilt.trainers", "HiViLTTrainer", "_save_rng_state"),
    "state is half written": ("transformers.trainer_callback", "TrainerState", "save_to_json"),
    "old checkpoints go": ("transformers.trainer", None, "rotate_checkpoints"),
    "model is written": ("hivilt.trainers", "HiViLTTrainer", "save_state"),
}


class Scripts:
    """A process that has imported the scripts; each run is a copy of it, which has computed nothing yet."""

    def __init__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, __file__], **pipes)

    def __call__(self, run: Run) -> tuple[int, str]:
        """Runs it to its end: its exit status, negative for a signal that ended it, as `subprocess` has it, and what it
        wrote."""
        self._process.stdin.write(json.dumps(run) + "\n")
        self._process.stdin.flush()
        status, output = json.loads(self._process.stdout.readline())
        return status, output

    def close(self) -> None:
        self._process.communicate()


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


def _serve() -> None:
    import hivilt.run_retrieval
    import hivilt.run_vqa

    scripts = {"run_vqa": hivilt.run_vqa.main, "run_retrieval": hivilt.run_retrieval.main}
    for line in sys.stdin:
        run = Run(*json.loads(line))
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            os.close(reading)
            os.close(writing)
            os._exit(_run(scripts[run.script], run))
        os.close(writing)
        with os.fdopen(reading, errors="replace") as output:
            text = output.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps((status, text[-4000:])), flush=True)


def _run(main: Callable[[Sequence[str]], Any], run: Run) -> int:
    if isinstance(run.moment, str):
        _arrange(run.moment, run.call, run.signal)
    elif run.moment is not None:
        threading.Timer(run.moment, os.kill, (os.getpid(), run.signal)).start()
    status = 1
    try:
        main(run.flags)
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _together(runs: Sequence[Run]) -> None:
    """Runs in this process, which is one of several; the signals go to the second of them."""
    for run in runs:
        if run.moment is not None and os.environ["RANK"] == "1":
            _arrange(run.moment, run.call, run.signal)
        importlib.import_module(f"hivilt.{run.script}").main(run.flags)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        from hivilt.training import run_command

        run_command(lambda: _together([Run(*run) for run in json.loads(sys.argv[1])]))
    else:
        _serve()
