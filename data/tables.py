"""What the readers of every task share: local files and tables, the pictures in them, and splits by picture."""

import csv
import hashlib
import io
import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import datasets
import torch
from datasets.utils import tqdm
from PIL import Image

from hivilt.processing_hivilt import load_picture, unreadable

logger = logging.getLogger(__name__)


class TablePicture(NamedTuple):
    """A picture that stays in its table (memory-mapped by `datasets`) until it is opened."""

    table: datasets.Dataset
    row: int
    column: str


class PictureRecord(Protocol):
    """What every example has, whatever its task."""

    @property
    def image_id(self) -> str: ...

    @property
    def image(self) -> str | TablePicture: ...


Record = TypeVar("Record", bound=PictureRecord)


class TableRow(NamedTuple):
    """A row and its picture. `where` names the row in error messages."""

    where: str
    image_id: str
    image: str | TablePicture
    values: Mapping[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


def read_rows(path: str | os.PathLike) -> datasets.Dataset | Any:
    """The rows of a local JSON (a list of objects, alone or under "data"), JSONL, CSV or Parquet file.

    CSV cells stay text as it is written. JSON may hold anything else; `column_names` refuses what is no table.

    Raises:
        FileNotFoundError, ValueError: there is no such file, its ending is another, it is not JSON or not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data file {path}: there is no such file.")
    try:
        return _read_rows(path, path.suffix.lower())
    except UnicodeDecodeError as error:
        raise ValueError(f"data file {path}: is not UTF-8 ({error}); save it as UTF-8.") from error


def _read_rows(path: Path, kind: str) -> datasets.Dataset | Any:
    if kind == ".parquet":
        return datasets.Dataset.from_parquet(str(path))
    if kind == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    if kind == ".jsonl":
        with path.open(encoding="utf-8") as file:
            return [_parse_json(line, f"{path.name}, line {n}") for n, line in enumerate(file, 1) if line.strip()]
    if kind == ".json":
        rows = _parse_json(path.read_text(encoding="utf-8"), path.name)
        return rows["data"] if isinstance(rows, dict) and "data" in rows else rows
    raise ValueError(f"data file {path}: expected .json, .jsonl, .csv or .parquet, got {kind or 'no ending'!r}.")


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: is not JSON ({error}).") from error


def column_names(rows: Any, source: str) -> list[str]:
    """The columns of a `datasets.Dataset`, or the keys of a list of dicts.

    Raises:
        TypeError: `rows` is neither.
        ValueError: it has no rows.
    """
    if not isinstance(rows, datasets.Dataset) and not (
        isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows)
    ):
        raise TypeError(f"{source}: expected a list of objects with the same keys, got {type(rows).__name__}.")
    if len(rows) == 0:
        raise ValueError(f"{source}: has no rows, so there is nothing to train or to evaluate on.")
    if isinstance(rows, datasets.Dataset):
        return rows.column_names
    return list(dict.fromkeys(key for row in rows for key in row))


def check_columns(
    columns: Mapping[str, str | None], present: Sequence[str], source: str, likely: str | None = None
) -> None:
    """Looks whether a table has the columns that it is said to have.

    Args:
        columns: kinds and their names, such as `{"image": "picture"}`, whose flag is `--image_column`; `None`: unused.
        present: what `column_names` gives.
        source: what to call the table in messages.
        likely: the column that was probably meant, for the message.

    Raises:
        ValueError: one is missing.
    """
    for kind, name in columns.items():
        if name is not None and name not in present:
            raise ValueError(
                f"{kind}_column: {source} has no column {name!r}; it has {', '.join(map(repr, present))}. "
                f"Name the right one with --{kind}_column{f', probably {likely!r}' if likely else ''}."
            )


def rows_with_pictures(
    rows: datasets.Dataset | Sequence[Mapping[str, Any]],
    image_column: str,
    image_id_column: str | None,
    source: str,
    folder: str | os.PathLike,
) -> Iterator[TableRow]:
    """The rows of a table, each with its picture, which is not decoded.

    Rows about the same picture have the same `image_id`: the named one, else the picture's path, else a hash of its
    bytes. In a table with pictures inside, all of them point to the first such row.

    Args:
        rows: a table with these columns; a picture is a path, what `datasets.Image` stores, or a `TablePicture`.
        image_column: the column of pictures.
        image_id_column: the column of their ids, if there is one. It spares reading every picture to tell them apart.
        source: what to call the table in messages.
        folder: where relative picture paths start.

    Raises:
        TypeError: the column, or a row, holds no picture.
        ValueError: a row has no picture id.
    """
    table = _undecoded(rows, image_column)
    light = rows
    if table is not None:
        light = table.remove_columns(image_column) if image_id_column else table

    first_row: dict[str, int] = {}
    for index, row in enumerate(light):
        where = f"{source}, row {index + 1}"
        image_id = _image_id(row, image_column, image_id_column, where)
        image = row.get(image_column)
        if isinstance(image, TablePicture):
            yield TableRow(where, image_id, image, row)
        elif table is not None and not isinstance(image, str):
            yield TableRow(
                where, image_id, TablePicture(table, first_row.setdefault(image_id, index), image_column), row
            )
        elif isinstance(image, str) and image:
            yield TableRow(where, image_id, str(Path(folder, image)), row)
        else:
            raise _no_picture(image, image_column, where)


def _undecoded(rows: Any, image_column: str) -> datasets.Dataset | None:
    """The table with its pictures as stored bytes or paths; `None` for rows that hold paths as text."""
    if not isinstance(rows, datasets.Dataset):
        return None
    feature = rows.features[image_column]
    if isinstance(feature, datasets.Image):
        return rows.cast_column(image_column, datasets.Image(decode=False))
    if isinstance(feature, dict) and set(feature) == {"bytes", "path"}:
        return rows
    if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        return None
    raise TypeError(
        f"image_column: {image_column!r} holds {feature}; expected pictures (datasets.Image) or their paths as text."
    )


def _image_id(row: Mapping[str, Any], image_column: str, image_id_column: str | None, where: str) -> str:
    if image_id_column is not None:
        if row.get(image_id_column) in (None, ""):
            raise ValueError(f"{where}: the picture id in column {image_id_column!r} is empty; write one.")
        return str(row[image_id_column])
    image = row.get(image_column)
    if isinstance(image, str) and image:
        return image
    if isinstance(image, Mapping) and image.get("bytes"):
        return hashlib.blake2b(image["bytes"], digest_size=16).hexdigest()
    if isinstance(image, Mapping) and image.get("path"):
        return image["path"]
    raise _no_picture(image, image_column, where)


def _no_picture(image: Any, image_column: str, where: str) -> TypeError:
    return TypeError(f"{where}: column {image_column!r} should hold a picture or its path, got {image!r}.")


# ---------------------------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------------------------


def hold_out(
    examples: Sequence[Record],
    fraction: float = 0.1,
    seed: int = 0,
    by: Callable[[Record], str] = attrgetter("image_id"),
) -> tuple[list[Record], list[Record]]:
    """Splits by picture, so that nothing held out is about a picture that was trained on.

    Args:
        examples: a training split.
        fraction: share of the pictures to hold out, rounded, at least one.
        seed: which ones.
        by: what stays on one side instead of a picture, for data whose test split asks about training pictures.

    Returns:
        What is left to train on, and what is held out, both in their order.

    Raises:
        ValueError: fewer than two pictures.
    """
    groups = list(dict.fromkeys(map(by, examples)))
    if len(groups) < 2:
        raise ValueError(
            f"Cannot hold out pictures for choosing: the training data has only {len(groups)}. "
            "Give a --validation_file, or more pictures."
        )
    held_out = set(random.Random(seed).sample(groups, max(1, round(fraction * len(groups)))))
    train = [one for one in examples if by(one) not in held_out]
    return train, [one for one in examples if by(one) in held_out]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def open_picture(image: str | TablePicture) -> Image.Image:
    """Reads a picture into memory (upright, RGB) and closes its file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read as a picture.
    """
    if isinstance(image, str):
        return load_picture(image)
    stored = image.table[image.row][image.column]
    if not stored["bytes"]:
        return load_picture(stored["path"])
    try:
        with Image.open(io.BytesIO(stored["bytes"])) as picture:
            return load_picture(picture)
    except Exception as error:
        name = repr(stored["path"] or f"row {image.row + 1} of column {image.column!r}")
        raise unreadable(name, error.__cause__ or error) from error


def check_pictures(
    examples: Sequence[Record], on_bad_image: Literal["error", "skip"] = "error", source: str = "the data"
) -> tuple[list[Record], list[str]]:
    """Finds bad pictures before training rather than in the middle of it.

    Args:
        examples: the examples of a split.
        on_bad_image: `"error"` looks whether every file is there and begins as a picture does (one that is damaged further
            on is an error when it is opened); `"skip"` opens every picture once and leaves out the examples with bad ones.
        source: what to call the split in messages.

    Returns:
        The examples to use, and the ids of the pictures left out.

    Raises:
        FileNotFoundError: files are missing and `on_bad_image` is `"error"`.
        ValueError: files are no pictures, likewise; no picture is left, or `on_bad_image` is unknown.
    """
    images = {one.image_id: one.image for one in examples}
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image: expected 'error' or 'skip', got {on_bad_image!r}.")
    if on_bad_image == "error":
        files = [image for image in images.values() if isinstance(image, str)]
        missing = [image for image in files if not os.path.isfile(image)]
        if missing:
            raise FileNotFoundError(
                f"{source}: {len(missing)} of {len(images)} picture files are missing: {_some(missing)}. Paths are "
                "relative to the data file; put the files there, or leave them out with --on_bad_image skip."
            )
        foreign = [
            image for image in tqdm(files, desc=f"Checking pictures, {source}", unit="pictures") if _is_foreign(image)
        ]
        if foreign:
            raise ValueError(
                f"{source}: {len(foreign)} of {len(images)} files are no readable pictures: {_some(foreign)}. Replace them, "
                "or leave them out with --on_bad_image skip."
            )
        return list(examples), []

    bad = {}
    for image_id, image in tqdm(images.items(), desc=f"Opening pictures, {source}", unit="pictures"):
        try:
            open_picture(image)
        except (FileNotFoundError, ValueError) as error:
            bad[image_id] = str(error)
    kept = [one for one in examples if one.image_id not in bad]
    if bad:
        logger.warning(
            f"{source}: left out {len(bad)} of {len(images)} pictures, and with them {len(examples) - len(kept)} of "
            f"{len(examples)} examples: {_some(list(bad.values()))}"
        )
    if not kept:
        raise ValueError(f"{source}: none of its {len(images)} pictures can be read: {_some(list(bad.values()))}")
    return kept, list(bad)


def _is_foreign(path: str) -> bool:
    """Whether a file does not even begin as a picture: it is empty, a web page, or may not be read."""
    try:
        with Image.open(path):
            return False
    except Exception:  # see `unreadable`
        return True


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


class EpochDataset(torch.utils.data.Dataset):
    """A split from which something is drawn anew in every epoch, if it is one to train on.

    A draw depends on the seed, the epoch and the picture alone, so it is the same with any number of workers or
    processes and in a resumed run.

    Args:
        seed: of the draws; `None`: a split to evaluate on, of which nothing is drawn and no picture is augmented.
    """

    def __init__(self, seed: int | None):
        self.seed = seed
        # Shared, so that workers that outlive an epoch hear of the next.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draws anew; to be called before a pass over the data begins, as workers read ahead.

        accelerate does so on one process. On several, and in an epoch that is resumed half-way, its sampler takes the
        epoch instead, and the trainer has to.
        """
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def augmentation_draw(self, image_id: str) -> dict[str, str]:
        """What a training item carries for its collator, `{"draw": seed of the augmentation}`; otherwise nothing."""
        # Not the same text as for the captions of a picture: which are drawn would go with how it is cropped.
        return {} if self.seed is None else {"draw": f"augmentation {self.seed} {self.epoch} {image_id}"}


def check_items(items: Sequence[Any], key: str, collator: str, dataset: str) -> None:
    """Refuses a batch whose items are not those of the collator's dataset.

    Raises:
        TypeError: an item lacks `key`.
    """
    if not all(isinstance(item, Mapping) and key in item for item in items):
        raise TypeError(
            f"{collator} takes the items of a {dataset}. If a Trainer made this batch, set "
            "TrainingArguments(remove_unused_columns=False): it drops what the model's forward does not name."
        )


def open_item(item: Mapping[str, Any]) -> Image.Image:
    """The picture of an item, from its `image`.

    Raises:
        FileNotFoundError, ValueError: as `open_picture`, and says how to leave the picture out.
    """
    try:
        return open_picture(item["image"])
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{error} Or leave it out with --on_bad_image skip.") from error
