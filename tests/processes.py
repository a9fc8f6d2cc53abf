"""Starting several processes that train or evaluate together, with the launcher that users have."""

import contextlib
import importlib
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from hivilt.training import run_command


def free_port() -> int:
    """A port of this machine that nobody listens on, and that the system gives to nobody who asks for any."""
    while True:
        # Systems take theirs from 32768 on. One of those could be gone by the time that a launcher listens on it.
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def launch(module: str, num_processes: int, arguments: list[str], status: int = 0) -> str:
    """Runs a module on several processes and returns what they printed; with --use_cpu they train together on the CPU.

    `status` is what the launcher is to end with: 1 if its processes end with anything but 0.
    """
    # Not --cpu, with which accelerate starts one process, whatever their number.
    return _accelerate("--multi_gpu", "--num_processes", str(num_processes), "-m", module, *arguments, status=status)


def launch_sharded(config_file: Path, runs: list[tuple[str, list[str]]]) -> str:
    """Runs modules one after another on two processes that share the weights as an FSDP file says, but in float32."""
    sharded = ("--config_file", str(config_file), "--num_processes", "2", "--mixed_precision", "no")
    return _accelerate(*sharded, "-m", Path(__file__).stem, json.dumps(runs), ACCELERATE_TORCH_DEVICE="cpu")


def _accelerate(*arguments: str, status: int = 0, **environment: str) -> str:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--main_process_port", str(free_port()), *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == status, done.stderr[-6000:]
    return done.stdout


if __name__ == "__main__":  # one of the processes of `launch_sharded`
    # accelerate shards on accelerators alone; to it these processes have one each.
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    runs = json.loads(sys.argv[1])
    run_command(lambda: [importlib.import_module(module).main(arguments) for module, arguments in runs])
