"""What a named benchmark is: its splits, its official files, and its copies on the Hub.

Both forms are read into rows with the same columns, and one function makes examples of these. The tables of benchmarks
are in `hivilt.data.vqa_benchmarks` and `hivilt.data.caption_benchmarks`.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, NamedTuple

import datasets

from hivilt.data.cells import parse_json, read_text
from hivilt.data.tables import Record, TableImage, TableRow, column_names, iterate_rows, rows_with_images

logger = logging.getLogger(__name__)

Rows = datasets.Dataset | Sequence[Mapping[str, Any]]

HUB_DATASETS = "https://huggingface.co/datasets/"


class HubTable(NamedTuple):
    """A split as the Hub has it, in tables: `datasets` runs no loading scripts any more.

    Attributes:
        dataset, split, config, revision: as `datasets.load_dataset` takes them.
        columns: the benchmark's columns that are called otherwise there, `{ours: theirs}`; `None`: it has none such.
        where: a column and the value that its rows must have, for a table that holds several splits.
        images_config: the config that holds the images, in columns `id` and `image`, for the `image_id` of the rows.
    """

    dataset: str
    split: str
    config: str | None = None
    revision: str | None = None
    columns: Mapping[str, str | None] = {}
    where: tuple[str, str] | None = None
    images_config: str | None = None


def lmms_copies(name: str, split: str, **layout: Any) -> list[HubTable]:
    """Copies made for lmms-eval, which moved them in 2026."""
    return [HubTable(f"{owner}/{name}", split, **layout) for owner in ("lmms-lab-encoder", "lmms-lab")]


@dataclass(frozen=True, kw_only=True)
class Benchmark(Generic[Record]):
    """A data set of the field with its official splits.

    Attributes:
        title: its name, as papers write it.
        splits: which official split, or several with "+", is "train", "validation" and "test"; default: "train", "val" and
            "test". Without "validation", images are held out.
        read_folder: rows of the official files, given their folder, an official split, and the folder of the images
            if they lie elsewhere. The image in the column `image` is a path.
        read_rows: makes the examples.
        columns: the columns that the rows of every split have, `image` among them if each row has one image.
        other_columns: those that they may have besides; all others of a copy on the Hub are left out.
        images_columns: those of the images of a row, if it has several, see `rows_with_images`; as many of them as are there.
        image_id_column: the column that tells images apart, if there is one.
        answer_column: a column that is needed too, and filled, but in the splits named in `hidden`.
        hidden: official splits whose answers are not public.
        hub: copies of the official splits on the Hub, the best first.
        read_package: the examples of an official split, where a package on PyPI holds the data.
        hold_out_by: what stays on one side when examples are held out to choose by, see `hold_out`: as in the test split.
    """

    title: str
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "validation": "val", "test": "test"})
    read_folder: Callable[[Path, str, Path | None], Sequence[Mapping[str, Any]]]
    read_rows: Callable[[Iterable[TableRow]], list[Record]]
    columns: tuple[str, ...]
    other_columns: tuple[str, ...] = ()
    images_columns: tuple[str, ...] = ()
    image_id_column: str | None = None
    answer_column: str | None = None
    hidden: tuple[str, ...] = ()
    hub: Mapping[str, Sequence[HubTable]] = field(default_factory=dict)
    read_package: Callable[[str], list[Record]] | None = None
    hold_out_by: Callable[[Record], Sequence[str]] = attrgetter("image_ids")

    def read(
        self,
        split: str,
        data_dir: Path | None = None,
        image_dir: Path | None = None,
        dataset_name: str | None = None,
        dataset_config_name: str | None = None,
    ) -> list[Record]:
        """The examples of an official split, or of several: "train+val".

        Args:
            data_dir: folder of the official files; `image_dir` that of the images, if they do not lie there.
            dataset_name: a copy on the Hub, or a folder of one, instead of those in `hub`, and its `dataset_config_name`.

        Raises:
            FileNotFoundError, ValueError: a file, a split, a copy, a column or a value is not there or not as expected.
        """
        examples = []
        for name in split.split("+"):
            if name not in self.official_splits:
                official = ", ".join(map(repr, self.official_splits))
                raise ValueError(f"split: {self.title} has the official splits {official}, got {name!r}.")
            if data_dir is not None:
                rows, source = self._read_files(name, Path(data_dir), image_dir), f"{self.title}, {name}"
            elif dataset_name is not None or self.read_package is None:
                rows, source = self._read_hub(name, dataset_name, dataset_config_name)
            else:
                examples += self._completed(self.read_package(name), name, is_joined=name != split)
                continue
            present = column_names(rows, source)
            image_id = self.image_id_column if self.image_id_column in present else None
            images = [column for column in self.images_columns if column in present] or "image"
            with_images = rows_with_images(rows, images, image_id, source, ".", trust_ids=True)
            own = self.read_rows(with_images if name in self.hidden else self._answered(with_images))
            examples += self._completed(own, name, is_joined=name != split)
        return examples

    def _completed(self, examples: list[Record], split: str, is_joined: bool) -> list[Record]:
        """The examples of an official split as `read` gives them, alone or joined with those of others."""
        return examples

    @property
    def official_splits(self) -> list[str]:
        """Names of all splits, also of those that neither train, choose nor test by default."""
        joined = (name for names in self.splits.values() for name in names.split("+"))
        return list(dict.fromkeys([*joined, *self.hidden, *self.hub]))

    def _answered(self, rows: Iterable[TableRow]) -> Iterator[TableRow]:
        for row in rows:
            if self.answer_column is not None and row.values.get(self.answer_column) in (None, "", [], ()):
                raise ValueError(
                    f"{row.where}: {self.answer_column!r} is empty or missing; splits without public answers are "
                    f"{', '.join(map(repr, self.hidden)) or 'none'}."
                )
            yield row

    def _read_files(self, split: str, folder: Path, image_dir: Path | None) -> Rows:
        try:
            return self.read_folder(folder, split, None if image_dir is None else Path(image_dir))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"data_dir: an official file of {self.title}, {split}, is not laid out as expected ({error!r}); "
                "is it of this data set and version?"
            ) from error

    def _read_hub(self, split: str, dataset: str | None, config: str | None) -> tuple[Rows, str]:
        tables = list(self.hub.get(split, ()))
        if dataset is not None:
            # A name that is not known may be laid out like any known one, or have our columns.
            known = [table for table in tables if table.dataset == dataset]
            alike = [table._replace(dataset=dataset, revision=None) for table in tables]
            tables = known or [*alike, HubTable(dataset, split, columns={self.image_id_column: None})]
        if config is not None:
            tables = [table._replace(config=config) for table in tables]
        tables = [table for place, table in enumerate(tables) if table not in tables[:place]]
        if not tables:
            raise ValueError(
                f"{self.title} has no {split!r} split with images on the Hub; those that have are "
                f"{', '.join(map(repr, self.hub)) or 'none'}. Give its official files with --data_dir, or name a copy "
                "with --dataset_name."
            )
        failures = []
        for table in tables:
            try:
                return self._load(table, split)
            # What `datasets` says where a name, config or split is not there, is a script, or cannot be reached.
            except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
                failures.append(f"{table.dataset}{f', {table.config}' if table.config else ''}, {table.split}: {error}")
                logger.warning(f"{self.title}, {split}: cannot read {failures[-1]}")
        raise ValueError(
            "\n- ".join([f"{self.title}, {split}: no copy on the Hub could be read.", *failures])
            + "\nName another one with --dataset_name, or give the official files with --data_dir."
        )

    def _load(self, table: HubTable, split: str) -> tuple[Rows, str]:
        rows = _load_table(table, table.config)
        if table.where is not None:
            column, value = table.where
            _check(rows, [column])
            values = [row[column] for row in iterate_rows(rows.select_columns(column))]
            if value not in values:
                there = ", ".join(map(repr, sorted(set(values))))
                raise ValueError(f"no row has {value!r} in column {column!r}, there are {there}.")
            rows = rows.select([place for place, part in enumerate(values) if part == value])
        answers = () if split in self.hidden else (self.answer_column,)
        needed = [name for name in (*self.columns, self.image_id_column, *answers) if name is not None]
        # What each column is called there, if it is not called as ours is.
        optional = (*self.other_columns, *self.images_columns, self.answer_column)
        there = {name: table.columns.get(name, name) for name in (*needed, *optional)}
        names = {theirs if theirs in rows.column_names else ours: ours for ours, theirs in there.items()}
        missing = [there[ours] for name, ours in names.items() if ours in needed and name not in rows.column_names]
        elsewhere = None if table.images_config is None else "image"
        _check(rows, [name for name in missing if name not in (None, elsewhere)])
        names = {name: ours for name, ours in names.items() if name in rows.column_names}
        rows = rows.select_columns(list(names)).rename_columns(names)
        if self.images_columns and not set(self.images_columns) & set(rows.column_names):
            _check(rows, self.images_columns[:1])
        if table.images_config is not None:
            rows = self._join(rows, table)
        return rows, f"{table.dataset}, {table.split}"

    def _join(self, rows: datasets.Dataset, table: HubTable) -> list[dict[str, Any]]:
        """Rows with their images out of another config."""
        images = _load_table(table, table.images_config)
        _check(images, ["id", "image"])
        images = images.cast_column("image", datasets.Image(decode=False))
        places = {name: place for place, name in enumerate(images["id"])}
        unknown = [name for name in rows[self.image_id_column] if name not in places]
        if unknown:
            raise ValueError(f"{table.images_config} lacks {len(unknown)} images, {unknown[0]!r} first.")
        return [{**row, "image": TableImage(images, places[row[self.image_id_column]], "image")} for row in rows]


def _load_table(table: HubTable, config: str | None) -> datasets.Dataset:
    rows = datasets.load_dataset(table.dataset, config, split=table.split, revision=table.revision)
    # `datasets` forgets which of several copies this is; the model card names it.
    rows.info.homepage = f"{HUB_DATASETS}{table.dataset}"
    return rows


def _check(rows: datasets.Dataset, columns: Sequence[str]) -> None:
    if not set(columns) <= set(rows.column_names):
        raise ValueError(
            f"expected columns {', '.join(map(repr, columns))}, it has {', '.join(map(repr, rows.column_names))}."
        )


def find_file(folder: Path, *names: str) -> Path:
    """The first of these files in a folder, or in a folder of it; `FileNotFoundError` where none is there."""
    path = _first(folder, names, Path.is_file)
    if path is None:
        raise FileNotFoundError(
            f"data_dir: {folder} lacks {' or '.join(names)}; is it the folder of the official files?"
        )
    return path


def has_file(folder: Path, *names: str) -> bool:
    """Whether one of these files is where `find_file` looks."""
    return _first(folder, names, Path.is_file) is not None


def find_folder(folder: Path, *names: str) -> Path:
    """The first of these folders, in a folder or in a folder of it, that holds images: what was unpacked may hold another
    folder of the same name. If none does, the first that is there, else where the first should be: whether all images
    are there is looked at later."""
    return _first(folder, names, _holds_images) or _first(folder, names, Path.is_dir) or folder / names[0]


def _holds_images(path: Path) -> bool:
    return path.is_dir() and any(file.suffix.lower() in (".jpg", ".jpeg", ".png") for file in path.iterdir())


def _first(folder: Path, names: Iterable[str], there: Callable[[Path], bool]) -> Path | None:
    for name in names:
        # "." is the folder itself.
        for path in (folder / name, *(() if name == "." else sorted(folder.glob(f"*/{name}")))):
            # What macOS packs beside a folder has the names of its files, but not what is in them.
            if path.parent.name != "__MACOSX" and there(path):
                return path
    return None


def read_json(path: Path, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """What a JSON file holds; `object_hook` may shorten its objects, as `json.loads` does, where memory is short."""
    return parse_json(read_text(path), path.name, object_hook)
