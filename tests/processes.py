"""Starting several processes that train or evaluate together."""

import contextlib
import functools
import importlib
import json
import math
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from hivilt.training.command import run_command
from tiny import draw_blank, draw_with


def free_port() -> int:
    """A port of this machine that nobody listens on, and that the system gives to nobody who asks for any."""
    while True:
        # Systems take theirs from 32768 on. One of those could be gone by the time that a launcher listens on it.
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


# With the launcher that users have: the processes of `accelerate launch`, each of which imports everything


def launch_accelerate(module: str, num_processes: int, arguments: list[str]) -> str:
    """Runs a module on several processes and returns what they printed; with --use_cpu they train together on the CPU."""
    # Not --cpu, with which accelerate starts one process, whatever their number.
    return _accelerate("--multi_gpu", "--num_processes", str(num_processes), "-m", module, *arguments)


def launch_sharded(config_file: Path, runs: list[tuple[str, list[str]]]) -> str:
    """Runs modules one after another on two processes that share the weights as an FSDP file says, but in float32."""
    sharded = ("--config_file", str(config_file), "--num_processes", "2", "--mixed_precision", "no")
    return _accelerate(*sharded, "-m", Path(__file__).stem, json.dumps(runs), ACCELERATE_TORCH_DEVICE="cpu")


def _accelerate(*arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--main_process_port", str(free_port()), *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


# The same in seconds: copies of one process that has imported everything, and computed nothing yet


def launch(module: str, num_processes: int, arguments: list[str], status: int = 0) -> str:
    """Runs a module on several processes and returns what they printed; with --use_cpu they train together on the CPU.

    `status` is 0 if all are to end well, 1 if one of them is not to.
    """
    statuses, printed, errors = run_copies(module, num_processes, arguments)
    assert any(statuses) == bool(status), errors[-6000:]
    return printed


def run_copies(module: str, num_processes: int, arguments: list[str]) -> tuple[list[int], str, str]:
    """Runs a module to its end: exit statuses, negative for a signal, as `subprocess` has them, standard output, errors.

    Several processes know of each other, one by itself is like any other that nobody launched.
    """
    server = _server()
    server.stdin.write(json.dumps([module, num_processes, arguments]) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


@functools.cache
def _server() -> subprocess.Popen:
    """What those processes are copies of. It ends with this one, when nothing more can come."""
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _serve() -> None:
    draw_with(pytest.MonkeyPatch(), lambda name: draw_blank)
    for line in sys.stdin:
        module, num_processes, arguments = json.loads(line)
        together = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        with (
            tempfile.TemporaryFile("w+", errors="replace") as printed,
            tempfile.TemporaryFile("w+", errors="replace") as errors,
        ):
            children = []
            for rank in map(str, range(num_processes)):
                child = os.fork()
                if child == 0:
                    if num_processes > 1:
                        os.environ |= together | {"RANK": rank, "LOCAL_RANK": rank}
                    for number, file in enumerate(
                        (os.open(os.devnull, os.O_RDONLY), printed.fileno(), errors.fileno())
                    ):
                        os.dup2(file, number)
                    os._exit(_run(module, arguments))
                children.append(child)
            statuses = _wait(children)
            texts = [(file.seek(0), file.read())[1] for file in (printed, errors)]
        print(json.dumps([[statuses[child] for child in children], *texts]), flush=True)


def _run(module: str, arguments: list[str]) -> int:
    """As `python -m` does; gives the exit status."""
    sys.argv[1:] = arguments
    status = None
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else int(status is not None)


def _wait(children: list[int]) -> dict[int, int]:
    """The exit status of each; after one has failed the others have a minute."""
    statuses, last = {}, math.inf
    while len(statuses) < len(children):
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            time.sleep(0.02)
            if time.monotonic() > last:
                for left in set(children) - statuses.keys():
                    os.kill(left, signal.SIGKILL)
        else:
            statuses[child] = os.waitstatus_to_exitcode(status)
            last = min(last, time.monotonic() + 60) if status else last
    return statuses


if __name__ == "__main__":
    if len(sys.argv) == 1:
        _serve()
    else:  # one of the processes of `launch_sharded`
        # accelerate shards on accelerators alone; to it these processes have one each.
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
        runs = json.loads(sys.argv[1])
        run_command(lambda: [importlib.import_module(module).main(arguments) for module, arguments in runs])
