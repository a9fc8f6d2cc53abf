"""Names of models and folders that a user gives: whether there is anything behind them."""

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def is_path(name: str) -> bool:
    """Whether a name is that of a file or folder and not one on the Hub, which has one slash at most: `runs/x` is a path
    where there is a folder `runs`, and `outputs/x` always, since the scripts write there."""
    path = Path(name)
    marked = path.is_absolute() or name.startswith((".", "~", "outputs/")) or name.endswith("/") or "\\" in name
    return marked or len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir())


def did_you_mean(name: str, known: Iterable[str], below: Path = Path()) -> str:
    """The end of a sentence that tells of an unknown name: the nearest that there is, if one is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {below / near[0]}?" if near else "."


def missing_place(argument: str, place: str) -> FileNotFoundError:
    """The error for a file or folder that is not there: where it was looked for, and what is there of almost its name."""
    path = Path(place)
    while not path.parent.exists():
        path = path.parent
    names = sorted(os.listdir(path.parent)) if path.parent.is_dir() else []
    where = "" if path.is_absolute() else f" in {Path.cwd()}"
    hint = did_you_mean(path.name, names, path.parent)
    kind = "file" if argument.endswith("_file") else "folder"
    return FileNotFoundError(f"{argument}: there is no {kind} {place!r}{where}{hint}")


def check_name(argument: str, name: str) -> None:
    """Refuses what cannot name a model: a file, a path where nothing is, or a folder without a config; `OSError`."""
    path = Path(name)
    if path.is_file():
        raise NotADirectoryError(f"{argument}: {name} is a file; give the folder that it lies in.")
    if path.is_dir() and not (path / "config.json").exists():
        inner = sorted(str(one.parent) for one in path.glob("*/config.json"))
        hint = f"did you mean {inner[-1]}?" if inner else "give the folder that a model was saved to."
        raise FileNotFoundError(f"{argument}: the folder {name} has no config.json, so no model is in it; {hint}")
    if not path.exists() and is_path(name):
        raise missing_place(argument, name)


@contextmanager
def loading(argument: str, name: str) -> Iterator[None]:
    """What fails within names the argument; transformers tells a folder that is not there as a failure of the network."""
    check_name(argument, name)
    try:
        yield
    except OSError as error:
        if os.path.exists(name):
            raise
        raise FileNotFoundError(
            f"{argument}: there is no folder {name!r} in {Path.cwd()}, and the Hub gave nothing of that name: {error}"
        ) from error
