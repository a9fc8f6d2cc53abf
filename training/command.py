"""A script as a command: its flags, a user's mistakes in one line, and the end of a process that trains with others."""

import gc
import os
import pkgutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub.errors import StrictDataclassError


def run_task(arguments: str, argv: list[str] | None = None) -> Any:
    """`hivilt.training.main.main` of the task that has the flags `arguments`, a subclass of `TaskArguments` by its place,
    "module:class". The flags are read first: `--help` and a mistake in them wait neither for models nor for Trainer."""
    kind = pkgutil.resolve_name(arguments)
    parsed = kind.parse(sys.argv[1:] if argv is None else argv)
    from hivilt.training.main import main

    return main(pkgutil.resolve_name(parsed[0].task), argv, parsed)


def _mistakes() -> tuple[type[Exception], ...]:
    """What a person gave and can mend; all else is a fault of ours, and keeps its traceback."""
    from datasets.exceptions import DatasetsError  # a second, which --help does without

    return (ValueError, TypeError, OSError, ImportError, DatasetsError, StrictDataclassError)


def run_command(main: Callable[[], Any]) -> None:
    """A script's `main`; then ends the process, having left those that it trained with. What `_mistakes` lists ends it with
    status 2 and one line on stderr; `HIVILT_DEBUG=1` in the environment shows the traceback instead."""
    status, mistake = None, None
    if {"-h", "--help"} & set(sys.argv[1:]):
        # transformers.training_args imports peft, and peft all of transformers: more than half of the time that listing
        # flags would take. Nothing else is done in this process.
        sys.modules.setdefault("peft", None)
    try:
        main()
    except SystemExit as stop:  # of all processes together: told to stop by SIGTERM or Ctrl-C
        status = stop.code
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
        mistake = (
            "Ctrl-C: ended; a training goes on from its last checkpoint, if there is one, with --resume_from_checkpoint last, an "
            "index with the same command."
        )
    except _mistakes() as error:  # called only once there is an error
        status, mistake = 2, _describe(error)
    if mistake is not None:
        if int(os.environ.get("RANK", 0)) > 0:
            # Mostly all processes meet it: the first says so, in which time the launcher ends the others.
            time.sleep(10)
        print(mistake, file=sys.stderr, flush=True)
        if _is_grouped() and torch.distributed.get_world_size() > 1:
            # Others may wait for this process, and leaving them could wait for them: its launcher ends them.
            sys.stdout.flush()
            os._exit(status)
    # Not after another error, for the same reason.
    leave_processes()
    sys.exit(status)


def end_with(mistake: Exception) -> NoReturn:
    """Ends the script as `run_command` does on a mistake."""

    def main():
        raise mistake

    run_command(main)


def _describe(error: BaseException) -> str:
    """An error as one line, or as a traceback where `HIVILT_DEBUG` asks for it."""
    if os.environ.get("HIVILT_DEBUG", "0") not in ("", "0"):
        return "".join(traceback.format_exception(error)).rstrip()
    if isinstance(error, OSError) and error.strerror and error.filename:
        said = f"{error.filename}: {error.strerror}"
    elif isinstance(error, ModuleNotFoundError) and error.name:
        said = f"the package {error.name.partition('.')[0]} is missing: install it with pip"
    elif isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        said = str(error.__cause__)  # which names the field; the rest is about how a config checks itself
    else:
        from datasets.exceptions import DatasetsError  # as above

        said = str(error) or type(error).__name__
        if isinstance(error, DatasetsError) and error.__cause__ is not None:
            said = f"{said}: {error.__cause__}"
    said = " ".join(line.strip() for line in said.splitlines() if line.strip())
    raised_in = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    is_ours = raised_in and raised_in[-1].partition(".")[0] in ("hivilt", "__main__")
    if isinstance(error, TypeError) or (isinstance(error, ValueError) and not is_ours):
        # Perhaps a fault of ours after all.
        said += f" ({type(error).__name__}; HIVILT_DEBUG=1 shows where)"
    return f"{Path(sys.argv[0]).name}: error: {said}"


def _is_grouped() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def leave_processes() -> None:
    """Leaves the group of processes, if this is in one: its Gloo threads would abort a Python that ends under them
    (pytorch/pytorch#190489). The caller lets go of its model first, whose DistributedDataParallel holds the group."""
    if _is_grouped():
        gc.collect()  # a model is in a cycle with its trainer
        torch.distributed.destroy_process_group()
