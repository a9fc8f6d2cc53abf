"""Starting several processes that train or evaluate together."""

import os
import socket
import subprocess
import sys


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(module: str, num_processes: int, arguments: list[str]) -> str:
    """Runs a module on several processes, as torchrun and accelerate do, and returns what they printed."""
    distributed = ["-m", "torch.distributed.run", f"--nproc_per_node={num_processes}", "--master_addr=127.0.0.1"]
    command = [sys.executable, *distributed, f"--master_port={free_port()}", "-m", module, *arguments]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout
