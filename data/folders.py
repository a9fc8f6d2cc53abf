"""Data sets in a folder, or on the Hub, whose splits `datasets` finds; their text files are read as they are written.

`datasets` would have pandas and Arrow guess what cells mean: nothing for "None", 7 for "007", a time for "2026-11-28".
"""

import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from hivilt.data.tables import CSV_ENDINGS, JSON_ENDINGS, column_names, iterate_rows, read_rows

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
TEXT_ENDINGS = (*CSV_ENDINGS, *JSON_ENDINGS)


def read_folder(
    name: str | None, config: str | None = None, data_dir: str | None = None, splits: Collection[str] | None = None
) -> dict[str, tuple[datasets.Dataset | list[dict[str, Any]], Path]]:
    """The splits of a data set with this name, config and `data_dir`, as `datasets.load_dataset` takes them: rows, and the
    folder where their relative image paths start.

    Args:
        name: a folder, or a name on the Hub; `None`: `data_dir` is an image folder, whose metadata.csv, metadata.jsonl or
            metadata.parquet, one a split or one a folder of it, has a column `file_name` (which becomes `image`) or
            `<column>_file_name`.
        splits: which to read, of those that there are; default: all.

    Raises:
        ValueError: a file is not as expected; names it.
    """
    builder = datasets.load_dataset_builder(name or "imagefolder", config, data_dir=data_dir)
    files = {str(split): [Path(file) for file in paths] for split, paths in (builder.config.data_files or {}).items()}
    every = [file for paths in files.values() for file in paths]
    wanted = [split for split in files if splits is None or split in splits]
    folder = Path(data_dir or name)
    is_local = folder.is_dir() and all(map(Path.is_file, every))

    if isinstance(builder, ImageFolder):
        metadata = {split: [file for file in paths if file.name in METADATA_FILES] for split, paths in files.items()}
        if is_local:
            _check_image_folder(folder, every, metadata)
        elif any(file.name == "metadata.csv" for file in every):
            raise ValueError(
                f"dataset_name: {name} is an image folder with metadata.csv, which is read from a local folder alone: hf "
                f"download {name} --repo-type dataset --local-dir FOLDER, then --data_dir FOLDER."
            )
        if is_local and any(metadata.values()):
            return {split: (_metadata_rows(metadata[split]), folder) for split in wanted}
    elif is_local and every and all(file.suffix.lower() in TEXT_ENDINGS for file in every):
        return {split: _text_rows(files[split]) for split in wanted}
    as_written = {"keep_default_na": False, "dtype": str} if isinstance(builder, Csv) else {}
    tables = datasets.load_dataset(name or "imagefolder", config, data_dir=data_dir, **as_written)
    return {split: (tables[split], folder) for split in tables if splits is None or split in splits}


def _check_image_folder(folder: Path, files: list[Path], metadata: dict[str, list[Path]]) -> None:
    """Refuses metadata of which `datasets` would have its cells guessed or its rows lost."""
    paths = [file for of_split in metadata.values() for file in of_split]
    for archive in (file for file in files if file.suffix.lower() == ".zip"):
        raise ValueError(f"data_dir: {archive} is an archive; unpack it into its folder.")
    for above in (folder / name for name in METADATA_FILES if (folder / name).is_file()):
        # The same file by another path: `datasets` has absolute ones.
        if not any(map(above.samefile, paths)):
            raise ValueError(
                f"data_dir: {above} lies above the folders of the splits ({', '.join(metadata)}); put a file of its own "
                "into each, with paths that start there."
            )
    for place, count in Counter(file.parent for file in paths).items():
        if count > 1:
            raise ValueError(f"data_dir: {place} has several of {', '.join(METADATA_FILES)}; drop all but one.")


def _metadata_rows(paths: list[Path]) -> list[dict[str, Any]]:
    """The rows of an image folder's metadata, with their images as paths."""
    rows = []
    for path in paths:
        table = read_rows(path)
        if not any(name == "file_name" or name.endswith("_file_name") for name in column_names(table, str(path))):
            raise ValueError(f"{path}: has no column 'file_name', nor one whose name ends in '_file_name'.")
        for number, row in enumerate(iterate_rows(table), 1):
            where = f"{path}, row {number}"
            rows.append(dict(_with_image(column, cell, path.parent, where) for column, cell in row.items()))
    return rows


def _with_image(column: str, cell: Any, folder: Path, where: str) -> tuple[str, Any]:
    if column != "file_name" and not column.endswith("_file_name") or not cell:
        return column, cell
    below = os.path.normpath(str(cell).replace("\\", "/"))
    # As `datasets` has it: what somebody else made may not read files from all over the machine.
    if "://" in str(cell) or os.path.isabs(below) or below.split(os.sep)[0] == os.pardir:
        raise ValueError(f"{where}: column {column!r} should hold a path below the folder of its file, got {cell!r}.")
    return column.removesuffix("file_name").removesuffix("_") or "image", str(folder / str(cell))


def _text_rows(paths: list[Path]) -> tuple[list[dict[str, Any]], Path]:
    folders = sorted({path.parent for path in paths})
    if len(folders) > 1:
        raise ValueError(
            f"dataset_name: the files of one split lie in {len(folders)} folders, {folders[0]} and {folders[1]} first; put "
            "them into one, where their image paths start."
        )
    rows = []
    for path in paths:
        table = read_rows(path)
        column_names(table, str(path))  # refuses what is no table
        rows += table
    return (rows, folders[0])
