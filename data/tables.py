"""What the readers of every task share: local files and tables, the images in them, splits by image, and batches."""

import difflib
import hashlib
import importlib.util
import io
import logging
import os
import random
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import datasets
import numpy as np
import torch
from datasets.utils import tqdm
from PIL import ExifTags, Image

from hivilt.data.augmentation import Augmentation, Box, Frame
from hivilt.data.cells import as_list, read_csv, read_json_rows, scalar_text
from hivilt.processing_hivilt import load_image, unreadable

if TYPE_CHECKING:
    from hivilt.training.encoder_cache import EncoderCache

logger = logging.getLogger(__name__)

# Pillow opens HEIC, the format of many phones, where the extra `heif` is installed.
if importlib.util.find_spec("pillow_heif") is not None:
    importlib.import_module("pillow_heif").register_heif_opener()

HEIF_ENDINGS = (".heic", ".heics", ".heif", ".heifs", ".hif")
# What Pillow tells from other files, but cannot open without a program beside it; EPS is one.
_NOT_OPENED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

CSV_ENDINGS = (".csv", ".tsv")
JSON_ENDINGS = (".json", ".jsonl", ".ndjson")
# An image's first bytes in base64 (PNG, JPEG, GIF, WebP), or what is too long for the name of a file.
_BASE64 = re.compile(r"\s*(?:(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR)[\w+/\s-]{8,}|[\w+/\s-]{256,})=*\s*", re.ASCII)


class TableImage(NamedTuple):
    """An image that stays in its table (memory-mapped by `datasets`) until it is opened; `place` is where it stands in a cell
    that holds a list of images."""

    table: datasets.Dataset
    row: int
    column: str
    place: int | None = None

    @property
    def stored(self) -> Mapping[str, Any]:
        """Its `bytes`, or the `path` of its file."""
        cell = self.table[self.row][self.column]
        return cell if self.place is None else cell[self.place]

    def __str__(self) -> str:
        path, among = self.stored["path"], "" if self.place is None else f"image {self.place + 1} in "
        return f"{among}row {self.row + 1} of column {self.column!r}{f' ({path})' if path else ''}"


class ImageRecord(Protocol):
    """What every example has, whatever its task: its images, mostly one, in order."""

    @property
    def image_ids(self) -> tuple[str, ...]: ...

    @property
    def images(self) -> tuple[str | TableImage, ...]: ...


# Those of a record that has one image, as `image_id` and `image`.
ONLY_IMAGE_ID = property(lambda record: (record.image_id,))
ONLY_IMAGE = property(lambda record: (record.image,))

Record = TypeVar("Record", bound=ImageRecord)


class TableRow(NamedTuple):
    """A row and its images, mostly one, which `image_id` and `image` are of. `where` names the row in error messages."""

    where: str
    image_ids: tuple[str, ...]
    images: tuple[str | TableImage, ...]
    values: Mapping[str, Any]

    @property
    def image_id(self) -> str:
        return self.image_ids[0]

    @property
    def image(self) -> str | TableImage:
        return self.images[0]


def read_rows(path: str | os.PathLike) -> datasets.Dataset | Any:
    """The rows of a local JSON, JSONL, CSV or Parquet file, see `hivilt.data.cells`. JSON may hold anything else;
    `column_names` refuses what is no table.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its ending is another, or its content is not what the ending says; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data file {path}: there is no such file.")
    kind = path.suffix.lower()
    if kind == ".parquet":
        try:
            return datasets.Dataset.from_parquet(str(path))
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"data file {path}: is not Parquet ({error.__cause__ or error}).") from error
    if kind in CSV_ENDINGS:
        return read_csv(path)
    if kind in JSON_ENDINGS:
        return read_json_rows(path)
    raise ValueError(f"data file {path}: expected .json, .jsonl, .csv or .parquet, got {kind or 'no ending'!r}.")


def open_table(rows: Any, source: str | None, folder: str | os.PathLike | None) -> tuple[Any, str, str | os.PathLike]:
    """Rows, what to call them, and where their relative image paths start: of a path the rows of that file, its name and its
    folder; rows as they are, "the table" and the working directory."""
    if not isinstance(rows, (str, os.PathLike)):
        return rows, source or "the table", folder or "."
    return read_rows(rows), source or Path(rows).name, folder or Path(rows).parent


def column_names(rows: Any, source: str) -> list[str]:
    """The columns of a `datasets.Dataset`, or the keys of a list of dicts.

    Raises:
        TypeError, ValueError: `rows` is neither, or has no rows.
    """
    is_table = isinstance(rows, datasets.Dataset)
    if not is_table and not (isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows)):
        raise TypeError(
            f"{source}: expected a list of objects with the same keys, got {type(rows).__name__}. (pandas writes one with "
            'to_json(..., orient="records").)'
        )
    if len(rows) == 0:
        raise ValueError(f"{source}: has no rows, so there is nothing to train or to evaluate on.")
    return rows.column_names if is_table else list(dict.fromkeys(key for row in rows for key in row))


def check_columns(columns: Mapping[str, str | None], present: Sequence[str], source: str) -> None:
    """Refuses a table, called `source` in messages, that lacks a column that it is said to have.

    Args:
        columns: kinds and their names, such as `{"image": "photo"}`, whose flag is `--image_column`; `None`: unused.
        present: what `column_names` gives.
    """
    for kind, name in columns.items():
        if name is not None and name not in present:
            alike = {column.casefold(): column for column in present}
            likely = [alike[close] for close in difflib.get_close_matches(name.casefold(), alike, n=1, cutoff=0.75)]
            raise ValueError(
                f"{kind}_column: {source} has no column {name!r}; it has {', '.join(map(repr, present))}. "
                f"Name the right one with --{kind}_column{f', probably {likely[0]!r}' if likely else ''}."
            )


def rows_with_images(
    rows: datasets.Dataset | Sequence[Mapping[str, Any]],
    image_column: str | Sequence[str],
    image_id_column: str | None,
    source: str,
    folder: str | os.PathLike,
    trust_ids: bool = False,
) -> Iterator[TableRow]:
    """The rows of a table, each with its images, which are not decoded.

    Rows about the same image have the same `image_id`: the named one, else the image's path below `folder`, however
    the rows spell it, else a hash of its bytes. In a table with images inside, all of them point to the first such image.

    Args:
        rows: a `datasets.Dataset` or a list of dicts, called `source` in messages; an image is a path, which starts at
            `folder` if it is relative, what `datasets.Image` stores, its bytes, or a `TableImage`.
        image_column: where a row has one image; or the columns where it has one or several, in order: each may hold a list
            of them, also as pandas or JSON writes one into a cell.
        image_id_column: where it has the id of its image, or a list of those of its images, in their order.
        trust_ids: do not read the images of a table to see whether those with one id are one; as for a benchmark. Of rows with
            several images they are read all the same.

    Raises:
        TypeError, ValueError: the column, or a row, holds no image or no id of one, two images have the same id, or a path is
            a web address or base64.
    """
    if isinstance(rows, datasets.Dataset) and rows.format["type"] != "custom":
        rows = rows.with_format(None)  # cells as Python's own values
    columns = [image_column] if isinstance(image_column, str) else list(image_column)
    table = _undecoded(rows, columns)
    trusted = table is not None and image_id_column is not None and trust_ids and isinstance(image_column, str)
    if table is not None:
        rows = table.remove_columns(columns) if trusted else table
    # By a path as it is written the file, which one it is, and its id: many rows are about few images.
    files: dict[str, tuple[str, str, str]] = {}
    first: dict[str, TableImage] = {}
    # What tells images apart, the id that its first row gave it, and for each id its image and that one's name.
    ids: dict[str, str] = {}
    owners: dict[str, tuple[str, str]] = {}

    def identified(image: Any, inside: TableImage, given_id: str | None, where: str) -> tuple[str, str | TableImage]:
        """The id of an image, and the image; `inside` is its place in the rows."""
        among = "" if inside.place is None else f"image {inside.place + 1} in "
        if isinstance(image, TableImage):
            key = f"{id(image.table)} {image.row} {image.column} {image.place}"
            name = own_id = f"row {image.row + 1} of column {image.column!r}"
        elif trusted:
            key = name = own_id = ""
        elif isinstance(image, Mapping) and image.get("bytes") and table is not None:
            key = own_id = content_hash(image["bytes"])
            name = image.get("path") or f"{among or 'the image of '}row {inside.row + 1}"
        elif isinstance(image, Mapping) and image.get("bytes"):
            raise TypeError(
                f"{where}: {among}column {inside.column!r} holds the bytes of an image, which a list of rows cannot give again "
                "later; make a data set of the rows: `datasets.Dataset.from_list(rows)`."
            )
        else:
            name = image.get("path") if isinstance(image, Mapping) else image
            name = os.fspath(name) if isinstance(name, os.PathLike) else name
            if not isinstance(name, str) or not name.strip():
                raise TypeError(
                    f"{where}: {among}column {inside.column!r} should hold an image or its path, got {reprlib.repr(image)}."
                )
            if name not in files:
                image = _locate(name, folder, f"{where}, {among}column {inside.column!r}")
                files[name] = image, os.path.realpath(image), _path_as_id(name, image, folder)
            image, key, own_id = files[name]

        # Only a link to a folder makes two files of what reads as one.
        image_id = ids.setdefault(key, own_id if own_id not in owners else key) if given_id is None else given_id
        known, known_name = owners.setdefault(image_id, (key, name))
        if known != key:
            raise ValueError(
                f"{where}: column {image_id_column!r} gives {name!r} the id {image_id!r}, which is that of "
                f"{known_name!r} in an earlier row; give each image an id of its own."
            )
        return image_id, image if isinstance(image, str | TableImage) else first.setdefault(image_id, inside)

    for index, row in enumerate(iterate_rows(rows)):
        where = f"{source}, row {index + 1}"
        cells = [(row.get(column), TableImage(table, index, column)) for column in columns]
        if not isinstance(image_column, str):
            cells = [part for cell, place in cells for part in _parts(cell, place, where)]
        given: list[str | None] = [None] * len(cells)
        if image_id_column is not None:
            given = _ids(row.get(image_id_column), image_id_column, len(cells), where)
        found = [identified(*cell, image_id, where) for cell, image_id in zip(cells, given, strict=True)]
        yield TableRow(where, tuple(image_id for image_id, _ in found), tuple(image for _, image in found), row)


def _parts(cell: Any, place: TableImage, where: str) -> list[tuple[Any, TableImage]]:
    """The images of a cell that may hold a list, each with its place in the rows."""
    parts = as_list(cell, f"{where}: column {place.column!r}") if isinstance(cell, str) else cell
    if hasattr(parts, "tolist"):
        parts = parts.tolist()  # an array of any library
    if not isinstance(parts, list | tuple):
        return [(cell, place)]
    if len(parts) == 0:
        raise ValueError(f"{where}: column {place.column!r} is an empty list; name its images, or drop the row.")
    return [(part, place._replace(place=number)) for number, part in enumerate(parts)]


def _ids(cell: Any, column: str, count: int, where: str) -> list[str]:
    """The ids of so many images, as a row gives them."""
    cells = cell if isinstance(cell, list | tuple) else [cell]
    if len(cells) != count:
        raise ValueError(f"{where}: column {column!r} has {len(cells)} ids for {count} images; give each image one.")
    ids = [scalar_text(one, f"{where}: column {column!r}") for one in cells]
    if not all(ids):
        raise ValueError(f"{where}: the image id in column {column!r} is empty; write one.")
    return ids


def _undecoded(rows: Any, columns: Sequence[str]) -> datasets.Dataset | None:
    """The table with its images as stored bytes or paths; `None` for rows that hold paths as text."""
    if not isinstance(rows, datasets.Dataset):
        return None
    table, stored, of_paths = rows, datasets.Image(decode=False), True
    for column in columns:
        feature = rows.features[column]
        is_list = isinstance(feature, datasets.List | datasets.LargeList)
        part = feature.feature if is_list else feature
        kind = part.dtype if isinstance(part, datasets.Value) else None
        if kind in ("string", "large_string"):
            continue
        of_paths = False
        if isinstance(part, datasets.Image) or kind in ("binary", "large_binary"):
            table = table.cast_column(column, type(feature)(stored) if is_list else stored)
        elif not isinstance(part, dict) or set(part) != {"bytes", "path"}:
            raise TypeError(
                f"image_column: {column!r} holds {feature}; expected images (datasets.Image) or their paths as text."
            )
    return None if of_paths else table


def iterate_rows(rows: datasets.Dataset | Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Rows whose cells of `datasets.ClassLabel`, in lists and objects too, are the names of their classes; -1 is `None`."""
    features = dict(rows.features) if isinstance(rows, datasets.Dataset) else {}
    return (_named(row, features) for row in rows)


def _named(value: Any, feature: Any) -> Any:
    """A cell with the names of classes, and with floats as short as they were written: 0.1 is another number in float32."""
    if isinstance(feature, datasets.ClassLabel) and isinstance(value, int):  # a transform may have given its name
        return feature.int2str(value) if value >= 0 else None
    if isinstance(feature, datasets.Value) and feature.dtype in ("float16", "float32") and value is not None:
        return np.dtype(feature.dtype).type(value)
    if isinstance(feature, (datasets.List, datasets.LargeList)) and value is not None:
        return [_named(part, feature.feature) for part in value]
    if isinstance(feature, dict) and feature and value is not None:  # a transform may have added columns
        return {name: _named(part, feature[name]) if name in feature else part for name, part in value.items()}
    return value


def _path_as_id(written: str, image: str, folder: str | os.PathLike) -> str:
    """What a file goes by: its path below `folder`, else as a row has it, in its shortest form."""
    start, path = os.path.abspath(folder), os.path.abspath(image)
    if Path(path).is_relative_to(start):
        path = os.path.relpath(path, start)
    elif not os.path.isabs(written):
        path = os.path.normpath(written)
    return Path(path).as_posix()


def _locate(image: str, folder: str | os.PathLike, where: str) -> str:
    """The file that a cell means: as it is written, else without blanks around it, with slashes and with ~ as home."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", image):
        raise ValueError(f"{where}: holds the address {image!r}; download it and give the path of the file.")
    if image.startswith("data:") or _BASE64.fullmatch(image):
        raise ValueError(
            f"{where}: holds an image as base64, {reprlib.repr(image)}; write it to a file and give its path, or make a "
            "Parquet file with a column of datasets.Image."
        )
    tidy = os.path.expanduser(image.strip().replace("\\", "/"))
    is_as_written = tidy == image or os.path.isfile(Path(folder, image))
    return str(Path(folder, image if is_as_written else tidy))


def hold_out(
    examples: Sequence[Record],
    fraction: float = 0.1,
    seed: int = 0,
    by: Callable[[Record], Sequence[str]] = attrgetter("image_ids"),
    chosen: Sequence[str] | None = None,
) -> tuple[list[Record], list[Record]]:
    """Splits by image, so that nothing held out is about an image that was trained on. Examples of several images link
    these: what is linked, by one example or through others, stays on one side.

    Args:
        fraction: share of the images to hold out, rounded, at least one. Of linked images, whose groups are drawn as a whole, it
            is the share of the groups; those that have more than this share of the images stay in training, if not all do.
        by: what stays on one side instead of the images, one or several, for data whose test split asks about training images.
        chosen: hold out these, as far as they are there, as an earlier draw from other rows did; default: draw by `seed`. An
            example that is in part about these, and in part about others, is left out with a warning.

    Returns:
        What is left to train on, and what is held out, both in their order; a `ValueError` refuses an empty one.
    """
    keys = list(map(by, examples))
    group_of = linked(keys)
    if chosen is None:
        sizes = Counter(group_of.values())
        if len(sizes) < 2:
            few = "only 1" if len(group_of) < 2 else f"{len(group_of)}, all linked by examples of several"
            raise ValueError(
                f"Cannot hold out images for choosing: the training data has {few}. Give a --validation_file, or more images."
            )
        most = max(1, round(fraction * len(group_of)))
        small = [group for group, size in sizes.items() if size <= most] or [min(sizes, key=sizes.get)]
        count = min(len(small), len(sizes) - 1, max(1, round(fraction * len(sizes))))
        drawn = set(random.Random(seed).sample(small, count))
        held_out = {key for key, group in group_of.items() if group in drawn}
    else:
        held_out = set(chosen)
    parts: tuple[list[Record], list[Record], list[Record]] = [], [], []
    for example, own in zip(examples, keys, strict=True):
        shares = len(held_out.intersection(own))
        parts[0 if not shares else 1 if held_out.issuperset(own) else 2].append(example)
    train, validation, both = parts
    if chosen is not None and not (train and validation):
        raise ValueError(
            "The images that this run held out to choose by are none of the training data, or all. Give a "
            "--validation_file, or begin anew in another --output_dir."
        )
    if both:
        logger.warning(
            f"Left out {len(both)} of {len(examples)} examples, which are about images that this run held out to choose by and "
            f"about others: {_some([' and '.join(by(example)) for example in both])}."
        )
    return train, validation


def linked(keys: Iterable[Sequence[str]]) -> dict[str, str]:
    """For each of the keys the first of all that it is linked to: those that stand together are, directly or through others.

    >>> linked([["a", "b"], ["c"], ["d", "b"]])
    {'a': 'a', 'b': 'a', 'c': 'c', 'd': 'a'}
    """
    before: dict[str, str] = {}  # an earlier key of the same group, the first's its own
    number: dict[str, int] = {}

    def first(key: str) -> str:
        while before[key] != key:
            before[key] = key = before[before[key]]
        return key

    for together in keys:
        for key in together:
            before.setdefault(key, key)
            number.setdefault(key, len(number))
        firsts = sorted({first(key) for key in together}, key=number.get)
        before.update(dict.fromkeys(firsts, firsts[0]) if firsts else {})
    return {key: first(key) for key in before}


def image_endings() -> set[str]:
    """Endings of the files that are opened as images, in lower case with their dot."""
    endings = Image.registered_extensions().items()
    return {ending for ending, kind in endings if ending and kind in Image.OPEN and kind not in _NOT_OPENED}


def heif_hint(images: Iterable[str]) -> str:
    """What opens HEIC, if it is among these files and does not open; else nothing."""
    closed = set(HEIF_ENDINGS) - image_endings()
    there = any(Path(image).suffix.lower() in closed for image in images)
    return ' HEIC opens after pip install "hivilt[heif]".' if there else ""


def open_image(image: str | TableImage) -> Image.Image:
    """Reads an image into memory (upright, RGB) and closes its file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read as an image.
    """
    stored = _stored_file(image)
    if isinstance(stored, str):
        return load_image(stored)
    try:
        with Image.open(stored) as opened:
            return load_image(opened)
    except Exception as error:
        raise unreadable(str(image), error.__cause__ or error) from error


def image_size(image: str | TableImage) -> tuple[int, int]:
    """Width and height in pixels of what `open_image` gives, from the image's header where its format has all of it there.

    Raises:
        Exception: as `Image.open`, of any type; who opens the image is told more.
    """
    with Image.open(_stored_file(image)) as opened:
        if opened.format == "TIFF":
            opened.load()  # what its header gives is turned already, or is not yet, by the version of Pillow
        sides_change = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return opened.size[::-1] if sides_change else opened.size


def check_images(
    examples: Sequence[Record], on_bad_image: Literal["error", "skip"] = "error", source: str = "the data"
) -> tuple[list[Record], list[str]]:
    """Finds bad images of a split, called `source` in messages, before training rather than in the middle of it.

    `"error"` looks whether every file is there and begins as an image does (one that is damaged further on is an error when
    it is opened); `"skip"` opens every image once and leaves out the examples with bad ones, whole, whatever others they have.

    Returns:
        The examples to use, and the ids of the images left out.

    Raises:
        ValueError: with `"error"` files are missing or no images; with `"skip"` no image is left.
    """
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image: expected 'error' or 'skip', got {on_bad_image!r}.")
    images = {}
    for example in examples:
        images |= zip(example.image_ids, example.images, strict=True)
    look, bad = _begin if on_bad_image == "error" else open_image, {}
    for image_id, image in tqdm(images.items(), desc=f"Checking images, {source}", unit="images"):
        try:
            look(image)
        except Exception as error:  # see `unreadable`
            bad[image_id] = str(error)
    spoiled = [place for place, example in enumerate(examples, 1) if not bad.keys().isdisjoint(example.image_ids)]
    if bad and on_bad_image == "error":
        named = [str(images[image_id]) for image_id in bad]
        raise ValueError(
            f"{source}: {len(bad)} of {len(images)} images are missing or unreadable: {_some(named)}. They are in "
            f"{len(spoiled)} of {len(examples)} examples, number {_some(list(map(str, spoiled)))}. Relative paths start at "
            "the data file; put the files there, replace them, or leave them out with --on_bad_image skip."
            f"{heif_hint(named)}"
        )
    kept = [example for example in examples if bad.keys().isdisjoint(example.image_ids)]
    if bad:
        logger.warning(
            f"{source}: left out {len(bad)} of {len(images)} images, and with them {len(spoiled)} of {len(examples)} examples, "
            f"number {_some(list(map(str, spoiled)))}: {_some(list(bad.values()))}"
        )
    if not kept:
        raise ValueError(f"{source}: none of its {len(images)} images can be read: {_some(list(bad.values()))}")
    return kept, list(bad)


def _begin(image: str | TableImage) -> None:
    """Fails where what should be an image does not even begin as one: it is missing, empty, or a web page."""
    with Image.open(_stored_file(image)):
        pass


def _stored_file(image: str | TableImage) -> str | io.BytesIO:
    """The path of an image, or the bytes that are in its table instead."""
    if isinstance(image, str):
        return image
    stored = image.stored
    return io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]


# The stamp of what is no file, or of one that is gone.
NO_FILE = (0, 0)


def file_stamp(path: str | os.PathLike) -> tuple[int, int]:
    """By which a changed file is known: its size in bytes and time of change in ns; `NO_FILE` where none is there."""
    try:
        stat = os.stat(path)
    except OSError:  # a dead link, too; opening it says so
        return NO_FILE
    return stat.st_size, min(stat.st_mtime_ns, 2**63 - 1)  # after 2262 no 64 bits hold it


def image_bytes(image: str | TableImage) -> bytes:
    """The bytes of an image's file, as it is stored."""
    stored = _stored_file(image)
    return Path(stored).read_bytes() if isinstance(stored, str) else stored.getvalue()


def content_hash(data: bytes) -> str:
    """What tells one image's bytes from another's, and the id of one inside a table: 32 hexadecimal digits (BLAKE2b)."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


class EpochDataset(torch.utils.data.Dataset):
    """Examples, at least one, from which something is drawn anew in every epoch, if there is a `seed`: a split to train on.

    A draw depends on the seed, the epoch and the image alone, so it is the same with any number of workers or
    processes and in a resumed run. Without a seed nothing is drawn and no image is augmented.
    """

    def __init__(self, examples: Sequence[ImageRecord], seed: int | None):
        if len(examples) == 0:
            raise ValueError("examples: a dataset needs at least one.")
        self.examples = list(examples)
        self.seed = seed
        # Shared, so that workers that outlive an epoch hear of the next.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def __len__(self) -> int:
        return len(self.examples)

    def set_epoch(self, epoch: int) -> None:
        """Draws anew; to be called before a pass over the data begins, as workers read ahead.

        accelerate does so on one process. On several, and in an epoch that is resumed half-way, its sampler takes the
        epoch instead, and the trainer has to.
        """
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def draw_places(self, image_id: str, count: int, wanted: int | None) -> Sequence[int]:
        """Which `wanted` of the `count` texts of an image this epoch has, or all of them, in order."""
        if wanted is None or wanted >= count:
            return range(count)
        return random.Random(f"{self.seed} {self.epoch} {image_id}").sample(range(count), wanted)

    def augmentation_draw(self, image_id: str) -> dict[str, str]:
        """What a training item carries for its collator, `{"draw": seed of the augmentation}`; otherwise nothing."""
        # Not the same text as for the captions of an image: which are drawn would go with how it is cropped.
        return {} if self.seed is None else {"draw": f"augmentation {self.seed} {self.epoch} {image_id}"}


class Collator:
    """Opens the images of a batch, once each, and tokenizes its texts: what the collators of all tasks share.

    Images are decoded here, so in the worker processes of a `DataLoader`; the state pickles for spawned ones.

    Args:
        processor: a `HiViLTProcessor`.
        augmentation: changes the images of training splits, those of a dataset with a seed; default: none does. All texts
            of the batch about an image decide whether it may be mirrored; where it was, left and right are exchanged in
            them.
        encoder_cache: what frozen encoders gave of the images and texts, an `hivilt.training.encoder_cache.EncoderCache`.
    """

    def __init__(
        self, processor, augmentation: Augmentation | None = None, encoder_cache: "EncoderCache | None" = None
    ):
        self.processor = processor
        self.augmentation = augmentation
        self.encoder_cache = encoder_cache

    def images(
        self,
        items: Sequence[Mapping[str, Any]],
        texts: Sequence[Sequence[str]],
        boxes: Sequence[Sequence[Box]] | None = None,
        mirrored: Sequence[bool] | None = None,
    ) -> tuple[dict[str, torch.Tensor], list[Frame]]:
        """The images of these items, of which `texts` say all that is said about each, as `pixel_values` or, from the cache,
        `feature_maps`; and what is shown of each. `boxes` are those of each that are not to be cut off, if there are any in
        the task; `mirrored` says which are to be mirrored, if that is decided of several together."""
        augmented = [self.augmentation is not None and "draw" in item for item in items]
        if self.encoder_cache is not None and not any(augmented):
            maps = self.encoder_cache.feature_maps([item["image"] for item in items])
            if maps is not None:
                return {"feature_maps": maps}, [Frame()] * len(items)
        resized, frames = [], []
        kept, flips = ([None] * len(items) if given is None else given for given in (boxes, mirrored))
        for item, said, own_boxes, flip, is_augmented in zip(items, texts, kept, flips, augmented, strict=True):
            image, frame = open_image(item["image"]), Frame()
            if is_augmented:
                image, frame = self.augmentation(image, said, random.Random(item["draw"]), own_boxes, flip)
            # At once, so that only one image is in memory at its full size.
            resized.append(self.processor.resize(image))
            frames.append(frame)
        return self.processor(images=resized, return_tensors="pt"), frames

    def texts(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """What `HiViLTModel.encode_texts` takes of texts alone: `input_ids`, `attention_mask`, and from the cache
        `token_states`."""
        tokens = self.processor(text=list(texts), return_tensors="pt", padding=True)
        states = None if self.encoder_cache is None else self.encoder_cache.token_states(tokens)
        # input_ids first: Trainer counts the rows of the first tensor.
        return {"input_ids": tokens["input_ids"], **tokens, **({} if states is None else {"token_states": states})}

    def targets(self, groups: Sequence[Sequence[str]]) -> dict[str, torch.Tensor]:
        """What a model is to write, some texts about each row of a batch: `labels` (B_c, N_d) long, -100 at padding, and unless
        each row has one text `text_index` (B_c,) long, the row of each; nothing where there is no text."""
        texts = [text for group in groups for text in group]
        if not texts:
            return {}
        index = [row for row, group in enumerate(groups) for _ in group]
        labels = {"labels": self.processor.tokenize_targets(texts)}
        return labels if index == list(range(len(groups))) else {**labels, "text_index": torch.tensor(index)}

    def pair(
        self, texts: Sequence[str], images: Mapping[str, torch.Tensor], image_index: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """A batch of `B_i` images and `B_t` texts, see `HiViLTModel.forward`.

        Returns:
            The texts first (Trainer takes the batch size from there): `input_ids`, `attention_mask` (B_t, N_t) long,
            `pixel_values` (B_i, 3, H, W) float, or from the cache `feature_maps`, and `token_states` beside the tokens;
            unless each image has one text `image_index` (B_t,) long, the row of `pixel_values` that a text belongs to.
        """
        index = {"image_index": torch.tensor(image_index)} if list(image_index) != list(range(len(texts))) else {}
        return {**self.texts(texts), **images, **index}


def check_drawn(name: str, wanted: int | None, seed: int | None) -> None:
    """Refuses a number of texts to draw of each image, the argument `name` of a dataset, that none can be drawn by."""
    if wanted is not None and (wanted < 1 or seed is None):
        raise ValueError(
            f"{name}: expected at least 1, with a seed to draw them by (seed=0), or None for all, to evaluate; got {wanted} "
            f"and seed={seed}."
        )


def check_spelling(row: TableRow, column: str, used: Collection[str]) -> None:
    """Refuses a row that lacks an optional column and has one of nearly that name, which is not `used`: what it says would
    count as not known, without a word."""
    others = [name for name in row.values if name not in used]
    if column not in row.values and (close := difflib.get_close_matches(column, others, n=1, cutoff=0.75)):
        raise ValueError(f"{row.where}: has {close[0]!r} where other rows have {column!r}; name it so.")


def check_items(items: Sequence[Any], key: str, collator: str, dataset: str) -> None:
    """Refuses a batch whose items lack `key`, so are not those of the collator's dataset."""
    if not all(isinstance(item, Mapping) and key in item for item in items):
        raise TypeError(
            f"{collator} takes the items of a {dataset}. If a Trainer made this batch, set "
            "TrainingArguments(remove_unused_columns=False): it drops what the model's forward does not name."
        )
