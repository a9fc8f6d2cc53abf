"""
Starting a process that begins anew: no cache, a home folder and an environment of its own, and hivilt only if asked for.

It is a copy of one that has imported torch and what else transformers takes seconds to import, and nothing of Hugging
Face, which reads the environment as it is imported. So this file imports neither.
"""

import json
import multiprocessing
import os
import runpy
import sys
import uuid
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

PRELOADED = ["torch", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint", "scipy.optimize"]
PRELOADED += ["sklearn.metrics", "pandas", "PIL.Image"]


class Started(NamedTuple):
    """A process, and the files of what it prints and of what its function gives."""

    process: BaseProcess
    output: Path
    result: Path


def start_elsewhere(
    function: Callable[..., dict],
    home: Path,
    environment: dict[str, str] | None = None,
    has_hivilt: bool = False,
    **arguments: Any,
) -> Started:
    """Starts a function in a process of its own, whose caches and working directory are in `home`.

    Args:
        function: of a module that ends with `answer_request`, as elsewhere.py does; gives what JSON can hold.
        home: a new one holds empty caches.
        environment: variables, beside those of this process that are not about Python or Hugging Face; unset: offline.
        has_hivilt: whether the process can import hivilt.
        **arguments: what JSON can hold, and paths.
    """
    home.mkdir(parents=True, exist_ok=True)
    request, result, output = (home / f"{kind} {uuid.uuid4()}" for kind in ("request", "result", "output"))
    request.write_text(json.dumps(arguments, default=str), encoding="utf-8")
    foreign = ("HF_", "TRANSFORMERS_", "HUGGINGFACE_", "XDG_") + (() if has_hivilt else ("PYTHON",))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    ours = {
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_MODULES_CACHE": str(home / "modules"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment = kept | ours | ({"HF_HUB_OFFLINE": "1"} if environment is None else environment)
    command = [sys.modules[function.__module__].__file__, function.__name__, str(request), str(result)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run, args=(command, environment, home, output, has_hivilt))
    process.start()
    return Started(process, output, result)


def finish_elsewhere(started: Started) -> dict:
    """Waits for it; gives what the function returned."""
    started.process.join(timeout=900)
    started.process.kill()
    output = started.output.read_text(encoding="utf-8", errors="replace")
    assert started.process.exitcode == 0, output
    return {**json.loads(started.result.read_text(encoding="utf-8")), "output": output}


def run_elsewhere(function, home: Path, **arguments) -> dict:
    return finish_elsewhere(start_elsewhere(function, home, **arguments))


def _run(command: list[str], environment: dict[str, str], home: Path, output: Path, has_hivilt: bool) -> None:
    """Becomes `python command` in that folder; without hivilt `python -I`."""
    printed = os.open(output, os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(printed, number)
    os.environ.clear()
    os.environ |= environment
    os.chdir(home)
    if not has_hivilt:
        sys.path[:] = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
        # An installed one, editable or not, must be as good as absent.
        sys.modules["hivilt"] = None
    sys.argv[:] = command
    runpy.run_path(command[0], run_name="__main__")
