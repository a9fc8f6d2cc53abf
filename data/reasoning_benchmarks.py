"""The benchmarks of reasoning over images by their names, with their official splits.

`docs/data.md` has a table of their files, copies, sizes and licences. Those that ask which of some texts goes with which of some
images, `MATCHING_BENCHMARKS`, are for models of retrieval: they score pairs, and `hivilt.evaluation.reasoning` measures these.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from hivilt.data.benchmarks import Benchmark, HubTable, find_file, find_folder, lmms_copies, read_json
from hivilt.data.cells import read_json_rows
from hivilt.data.drawn_pairs import read_drawn_pairs
from hivilt.data.flickr8k_pairs import flickr8k_rows
from hivilt.data.matching import Matching
from hivilt.data.reasoning import Statement, read_label, read_sentence
from hivilt.data.tables import TableRow

logger = logging.getLogger(__name__)

# "The dogs run." of what the copy with options asks: "Here is a statement describing 2 images: The dogs run. Is it true or ..."
_ASKED = re.compile(r"statement describing [^:]*: *(?P<sentence>.+?) *Is it true or false\?", re.DOTALL)
# Before each of its options: "(A) True".
_LETTER = re.compile(r"^\(?[A-Z](?:\)|\.|:)\s*")

SUGARCREPE_FILES = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


@dataclass(frozen=True, kw_only=True)
class ReasoningBenchmark(Benchmark[Statement]):
    """A data set of statements about images, with its official splits.

    Attributes:
        other_splits: official splits that neither train, choose nor test by default.
        num_statements: of official splits, as far as they are published; other numbers are warned of.
    """

    columns: tuple[str, ...] = ("sentence",)
    other_columns: tuple[str, ...] = ("identifier", "question_id", "options")
    images_columns: tuple[str, ...] = ("images", "left_image", "right_image")
    image_id_column: str | None = "image_ids"
    answer_column: str | None = "label"
    other_splits: tuple[str, ...] = ()
    num_statements: Mapping[str, int] = field(default_factory=dict)

    @property
    def official_splits(self) -> list[str]:
        return list(dict.fromkeys([*super().official_splits, *self.other_splits]))

    def _completed(self, examples: list[Statement], split: str, is_joined: bool) -> list[Statement]:
        if len(examples) != self.num_statements.get(split, len(examples)):
            logger.warning(
                f"{self.title}, {split}: has {len(examples):,} statements, officially {self.num_statements[split]:,}; results do "
                "not compare with published ones."
            )
        return examples


# Official files. Each row has `images` (paths), `image_ids`, `sentence`, `label` and `identifier`.


def _nlvr2_rows(folder: Path, split: str, image_dir: Path | None) -> list[dict[str, Any]]:
    part = split.rpartition("_")[0]  # balanced and unbalanced ones lie in folders of their own
    names = [f"{split}.json", f"data/{split}.json", *([f"{part}/{split}.json"] if part else [])]
    content = read_json_rows(find_file(folder, *names))
    for identifier in (row["identifier"] for row in content):
        if identifier.count("-") != 3:
            raise ValueError(
                f"data_dir: the file of {split} has the identifier {identifier!r}; NLVR2's are such as 'dev-12-0-1' (of NLVR, "
                "the data set before it: --benchmark nlvr)."
            )
    # Left and right, below the folder of the split: those to train on in a hundred folders, or, as they are downloaded, in one.
    files = [[f"{row['identifier'].rpartition('-')[0]}-img{side}.png" for side in (0, 1)] for row in content]
    named = [
        [f"{row['directory']}/{file}" if "directory" in row else file for file in pair]
        for row, pair in zip(content, files, strict=True)
    ]
    kind = content[0]["identifier"].partition("-")[0]
    homes = (f"images/{kind}", kind, f"{kind}_img", "images", ".")
    lefts = [(pair[0], bare[0]) for pair, bare in zip(named, files, strict=True)]
    home, layout = _find_home(image_dir or folder, homes, lefts)
    return [
        {
            "images": [home / path for path in pairs[layout]],
            "image_ids": [path.removesuffix(".png") for path in pairs[0]],
            **{name: row[name] for name in ("sentence", "label", "identifier")},
        }
        for row, *pairs in zip(content, named, files, strict=True)
    ]


def _nlvr_rows(folder: Path, split: str, image_dir: Path | None) -> list[dict[str, Any]]:
    """Each example is six images that show the same three boxes in every order."""
    path = find_file(folder, f"{split}.json", f"{split}/{split}.json")
    rows = []
    for row in read_json_rows(path):
        identifier = row["identifier"]
        if identifier.count("-") != 1:
            raise ValueError(
                f"data_dir: {path.name} has the identifier {identifier!r}; NLVR's are such as '12-0' (of NLVR2, the data set "
                "after it: --benchmark nlvr2)."
            )
        for order in range(6):
            image_id = f"{row['directory']}/{split}-{identifier}-{order}"
            its = {"image_ids": [image_id], "identifier": f"{identifier}-{order}"}
            rows.append({**its, "sentence": row["sentence"], "label": row["label"]})
    files = [[f"{row['image_ids'][0]}.png"] for row in rows]
    home, _ = _find_home(image_dir or path.parent, ("images", f"{split}/images", "."), files)
    return [{**row, "images": [home / file for file in own]} for row, own in zip(rows, files, strict=True)]


def _find_home(folder: Path, homes: Sequence[str], files: Iterable[Sequence[str]]) -> tuple[Path, int]:
    """The first of these folders that holds one of the files by any of its names, and which name that is; the first folder and
    name, where none does. Some images may be missing, even all."""
    there = [path for home in homes for path in (folder / home, *sorted(folder.glob(f"*/{home}"))) if path.is_dir()]
    found = (
        (home, place)
        for names in files
        for home in there
        for place, name in enumerate(names)
        if (home / name).is_file()
    )
    return next(found, (folder / homes[0], 0))


def _nlvr2_group(identifier: str) -> str | None:
    """The sentence that a statement has: all of "split-set-pair-sentence" but the pair."""
    parts = identifier.split("-")
    return "-".join((*parts[:2], parts[3])) if len(parts) == 4 else None


def _nlvr_group(identifier: str) -> str:
    """The sentence of "set-place-order"."""
    return identifier.partition("-")[0]


def _statements(rows: Iterable[TableRow], group_of: Callable[[str], str | None], num_images: int) -> list[Statement]:
    statements = []
    for place, row in enumerate(rows):
        if len(row.images) != num_images:
            raise ValueError(f"{row.where}: has {len(row.images)} images, but each statement is about {num_images}.")
        identifier = str(row.values.get("identifier") or row.values.get("question_id") or place)
        sentence = read_sentence(row.values.get("sentence"), "sentence", row.where)
        label = read_label(row.values.get("label"), "label", row.where)
        if options := row.values.get("options"):
            sentence, label = _answered(sentence, label, options, row.where)
        kind, group = row.values.get("kind"), row.values.get("group") or group_of(identifier)
        told = (sentence, label, kind, group, row.values.get("stage"))
        statements.append(Statement(identifier, row.images, row.image_ids, *told))
    return statements


def _answered(question: str, answer: str | None, options: Sequence[str], where: str) -> tuple[str, str]:
    """The statement in a question about it, and its label, which is the option of a letter."""
    asked, letters = _ASKED.search(question), [chr(ord("A") + place) for place in range(len(options))]
    if asked is None or answer not in letters:
        raise ValueError(
            f"{where}: expected a question such as 'Here is a statement describing 2 images: ... Is it true or false?' with the "
            f"letter of one of its options as answer, got {question!r}, {answer!r} of {list(options)}."
        )
    return asked["sentence"], _LETTER.sub("", options[letters.index(answer)])


def _directory(statement: Statement) -> tuple[str, ...]:
    """What the authors hold out by: the folder of the images, as the images of a set lie in one. Of a copy without folders, the
    images and their set, as far as it is told."""
    directory = statement.image_ids[0].rpartition("/")[0]
    if directory:
        return (directory,)
    told = statement.statement_id.split("-")
    return (*statement.image_ids, *(["-".join(told[:2])] if len(told) == 4 else []))


# Matching


def _winoground_rows(folder: Path, split: str, image_dir: Path | None) -> list[dict[str, Any]]:
    content = read_json_rows(find_file(folder, "examples.jsonl", "data/examples.jsonl"))
    images = find_folder(image_dir or folder, "images", "data/images", ".")
    return [
        {
            **{name: images / f"{row[name]}.png" for name in ("image_0", "image_1")},
            "image_ids": [row["image_0"], row["image_1"]],
            **{name: row[name] for name in ("caption_0", "caption_1")},
            "collapsed_tag": row.get("collapsed_tag"),
        }
        for row in content
    ]


def _sugarcrepe_rows(folder: Path, split: str, image_dir: Path | None) -> list[dict[str, Any]]:
    images = find_folder(image_dir or folder, "val2017", "images/val2017", "images", ".")
    return [
        {
            "image_0": images / row["filename"],
            "image_ids": [row["filename"]],
            "caption_0": row["caption"],
            "caption_1": row["negative_caption"],
            "collapsed_tag": kind,
        }
        for kind in SUGARCREPE_FILES
        for row in read_json(find_file(folder, f"{kind}.json", f"data/{kind}.json")).values()
    ]


def _matchings(rows: Iterable[TableRow], num_images: int) -> list[Matching]:
    matchings = []
    for row in rows:
        if len(row.images) != num_images:
            raise ValueError(f"{row.where}: has {len(row.images)} images, expected {num_images}.")
        texts = tuple(read_sentence(row.values.get(name), name, row.where) for name in ("caption_0", "caption_1"))
        matchings.append(Matching(row.images, row.image_ids, texts, row.values.get("collapsed_tag")))
    return matchings


def _no_files(folder: Path, split: str, image_dir: Path | None) -> NoReturn:
    raise ValueError("data_dir: pairs are drawn, there are no files of them; leave it out.")


def _copies(split: str) -> list[HubTable]:
    return lmms_copies("NLVR2", split, columns={"sentence": "question", "label": "answer", "image_ids": None})


_NLVR2_COPIES = {"dev": "dev", "test1": "test_public", "test2": "test_unseen"}

REASONING_BENCHMARKS: dict[str, ReasoningBenchmark] = {
    "pairs": ReasoningBenchmark(
        title="drawn pairs",
        splits={"train": "train", "validation": "validation", "test": "test"},
        read_folder=_no_files,
        read_rows=partial(_statements, group_of=lambda identifier: None, num_images=2),
        read_package=read_drawn_pairs,
    ),
    "flickr8k-pairs": ReasoningBenchmark(
        title="pairs of Flickr8k's photographs",
        splits={"train": "train", "validation": "val", "test": "test"},
        read_folder=flickr8k_rows,
        read_rows=partial(_statements, group_of=lambda identifier: None, num_images=2),
        other_columns=("identifier", "kind", "group", "stage"),
    ),
    "nlvr2": ReasoningBenchmark(
        title="NLVR2",
        splits={"train": "train", "validation": "dev", "test": "test1"},
        other_splits=("test2",),
        read_folder=_nlvr2_rows,
        read_rows=partial(_statements, group_of=_nlvr2_group, num_images=2),
        num_statements={
            **{"train": 86_373, "dev": 6_982, "test1": 6_967, "test2": 6_970},
            **{"balanced_dev": 2_300, "unbalanced_dev": 3_562, "balanced_test1": 2_316, "unbalanced_test1": 3_536},
        },
        hub={
            "test1": [
                HubTable(
                    "TIGER-Lab/NLVR2",
                    "test",
                    "nlvr2",
                    columns={"sentence": "question", "label": "answer", "identifier": "id", "image_ids": None},
                )
            ],
            **{
                f"{kind}_{ours}": _copies(f"{kind}_{theirs}")
                for kind in ("balanced", "unbalanced")
                for ours, theirs in _NLVR2_COPIES.items()
            },
        },
        hold_out_by=_directory,
    ),
    "nlvr": ReasoningBenchmark(
        title="NLVR",
        splits={"train": "train", "validation": "dev", "test": "test"},
        read_folder=_nlvr_rows,
        read_rows=partial(_statements, group_of=_nlvr_group, num_images=1),
        num_statements={"train": 74_460, "dev": 5_934, "test": 5_940},
        hold_out_by=_directory,
    ),
}

_MATCHING = {
    "columns": ("caption_0", "caption_1"),
    "other_columns": ("collapsed_tag",),
    "images_columns": ("image_0", "image_1"),
    "image_id_column": "image_ids",
    "splits": {"test": "test"},
}
MATCHING_BENCHMARKS: dict[str, Benchmark[Matching]] = {
    "winoground": Benchmark(
        title="Winoground",
        read_folder=_winoground_rows,
        read_rows=partial(_matchings, num_images=2),
        # The one that the Hub made of it is there where the data set is a loading script still.
        hub={
            "test": [
                HubTable("facebook/winoground", "test", columns={"image_ids": None}),
                HubTable("facebook/winoground", "test", revision="refs/convert/parquet", columns={"image_ids": None}),
            ]
        },
        **_MATCHING,
    ),
    "sugarcrepe": Benchmark(
        title="SugarCrepe", read_folder=_sugarcrepe_rows, read_rows=partial(_matchings, num_images=1), **_MATCHING
    ),
}
