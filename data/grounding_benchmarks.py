"""The benchmarks of visual grounding by their names, with their official splits.

`docs/data.md` has a table of their files, copies, sizes and licences. Every expression is kept, repeated ones too, as
accuracy is counted over expressions. Images of COCO have COCO's id in every set: what is an image to test with in one set
may be one to train on in another.
"""

import hashlib
import io
import logging
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

from PIL import ExifTags, Image

from hivilt.data.benchmarks import Benchmark, HubTable, find_file, find_folder, has_file, lmms_copies, read_json
from hivilt.data.cells import read_json_rows, read_text
from hivilt.data.grounding import Box, GroundedImage, to_relative
from hivilt.data.scenes import read_scenes
from hivilt.data.tables import TableImage, TableRow, image_bytes

logger = logging.getLogger(__name__)

# Where COCO's images of 2014 are, as the authors' programs want them.
_COCO_IMAGES = ("train2014", "images/train2014", "images/mscoco/images/train2014", "images", ".")
_COCO_NAME = re.compile(r"COCO_train2014_0*(\d+)")
_SOURCES = {
    "grefcoco": "github.com/henghuiding/gRefCOCO says where it is.",
    "": "Its authors' server is gone; issues 14, 23 and 26 of github.com/lichengunc/refer name copies.",
}

# A phrase of Flickr30k Entities ends where a word ends with the bracket.
_PHRASE = re.compile(r"\[/EN#(?P<chain>[^/\s]+)/(?P<types>\S+)[ \t]+(?P<phrase>[^\]\s].*?)\](?=\s|$)", re.MULTILINE)
_NOT_VISUAL = "0"

# Boxes of the file are in pixels of images of this size; larger ones show the same.
_DAQUAR_SIZE = (337, 256)
_ROOM = 4

# Boxes are cut at the edge of their image, over which polygons of COCO reach by fractions of a pixel. What reaches over it by
# more than this, in pixels, is warned of, and refused where more than this share do: then numbers mean something else.
_OVER_THE_EDGE, _MOST_OVER = 1.0, 0.01
# By the tag of EXIF where a box of the image as it is stored lies in the image as it is shown.
_TURNS: dict[int, Callable[[float, float, float, float], Box]] = {
    2: lambda left, top, right, bottom: (1 - right, top, 1 - left, bottom),
    3: lambda left, top, right, bottom: (1 - right, 1 - bottom, 1 - left, 1 - top),
    4: lambda left, top, right, bottom: (left, 1 - bottom, right, 1 - top),
    5: lambda left, top, right, bottom: (top, left, bottom, right),
    6: lambda left, top, right, bottom: (1 - bottom, left, 1 - top, right),
    7: lambda left, top, right, bottom: (1 - bottom, 1 - right, 1 - top, 1 - left),
    8: lambda left, top, right, bottom: (top, 1 - right, bottom, 1 - left),
}


@dataclass(frozen=True, kw_only=True)
class GroundingBenchmark(Benchmark[GroundedImage]):
    """A data set of expressions and the boxes of what they mean, with its official splits.

    Attributes:
        other_splits: official splits that neither train, choose nor test by default, and are not on the Hub.
        num_expressions: of official splits, as far as they are published; other numbers are warned of.
    """

    columns: tuple[str, ...] = ("image",)
    answer_column: str | None = "refs"
    other_columns: tuple[str, ...] = ("size", "bbox", "file_name")
    image_id_column: str | None = "image_id"
    other_splits: tuple[str, ...] = ()
    num_expressions: Mapping[str, int] = field(default_factory=dict)

    @property
    def official_splits(self) -> list[str]:
        return list(dict.fromkeys([*super().official_splits, *self.other_splits]))

    def _completed(self, examples: list[GroundedImage], split: str, is_joined: bool) -> list[GroundedImage]:
        """Where splits are joined, "testA+testB", expressions without a kind have their split as kind."""
        count = sum(len(example.expressions) for example in examples)
        if count != self.num_expressions.get(split, count):
            logger.warning(
                f"{self.title}, {split}: has {count:,} expressions, officially {self.num_expressions[split]:,}; results do not "
                "compare with published ones."
            )
        if is_joined:
            examples = [replace(one, kinds=one.kinds or (split,) * len(one.expressions)) for one in examples]
        return examples


# Official files. Each row is an image, with its `size` (width, height) and what is said of it in `refs`: {"expression":
# text, "boxes": [[left, top, width, height], ...] in pixels, "kind": text or absent}.


def _refer_rows(folder: Path, split: str, image_dir: Path | None, name: str, by: str) -> list[dict[str, Any]]:
    """RefCOCO and those made like it: who refers to which annotations of COCO, beside the annotations."""
    if split.startswith("google-"):
        by = "google"
    part = split.removeprefix("google-")
    path = _find_refs(folder, name, f"{'g' if name == 'grefcoco' else ''}refs({by})")
    refs = read_json_rows(path) if path.suffix == ".json" else _read_pickle(path)
    there = dict.fromkeys(ref["split"] for ref in refs)
    if part not in there:
        raise ValueError(f"split: {path.name} has no {part!r}; its splits are {', '.join(map(repr, there))}.")
    # COCO's own annotations have the same ids.
    sources = ("instances.json", "instances_train2014.json")
    source = find_file(path.parent if has_file(path.parent, *sources) else folder, *sources)
    instances = read_json(source, _without_masks)
    annotations = {row["id"]: row for row in instances["annotations"]}
    sizes = {row["id"]: (row["width"], row["height"]) for row in instances["images"]}
    files = {row["id"]: row["file_name"] for row in instances["images"]}
    _warn_of_shared_images(f"{path.name}, {part}", refs, part)

    images = find_folder(image_dir or folder, *_COCO_IMAGES)
    said: dict[int, list[dict[str, Any]]] = {}
    unknown = []
    for ref in (ref for ref in refs if ref["split"] == part):
        image, ids = ref["image_id"], _annotation_ids(ref["ann_id"])
        if image not in sizes or any(annotations.get(one, {}).get("image_id") != image for one in ids):
            unknown.append(ref)
            continue
        boxes = [annotations[one]["bbox"] for one in ids]
        said.setdefault(image, []).extend(
            {"expression": _sentence(sentence), "boxes": boxes} for sentence in ref["sentences"]
        )
    if unknown:
        raise ValueError(
            f"data_dir: {source} lacks the image or the annotation of {len(unknown):,} references of {path.name}, first of "
            f"image {unknown[0]['image_id']}, annotation {unknown[0]['ann_id']}; are both of the same data set?"
        )
    return [
        {"image": images / files[image], "image_id": image, "size": sizes[image], "refs": its}
        for image, its in said.items()
    ]


def _find_refs(folder: Path, name: str, stem: str) -> Path:
    """The file in the folder, which may hold folders of several sets: their files have the same names."""
    home = folder / name if (folder / name).is_dir() else folder
    try:
        path = find_file(home, f"{stem}.json", f"{stem}.p")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} {_SOURCES.get(name, _SOURCES[''])}") from error
    other = path.parent.name.lower()
    if other != name and other in GROUNDING_BENCHMARKS:
        raise FileNotFoundError(
            f"data_dir: {path} is in the folder of {other!r}, whose files have the same names as those of {name!r}; give the "
            f"folder of {name}."
        )
    return path


class _DataUnpickler(pickle.Unpickler):
    """Reads lists, dicts, texts and numbers, and calls nothing."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which could run as a program")


def _read_pickle(path: Path) -> Any:
    """What a pickle of Python 2 holds, if that is nothing but data."""
    try:
        return _DataUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:  # of any type, in a file that is damaged or no pickle
        raise ValueError(
            f"{path.name}: is not read as a pickle of lists, dicts, texts and numbers, which the official one is ({error}). "
            f"Get it from another source, or write what it should hold as JSON, {path.stem}.json."
        ) from error


def _without_masks(row: dict[str, Any]) -> dict[str, Any]:
    """An `object_hook`: masks are most of the file."""
    return {key: value for key, value in row.items() if key != "segmentation"}


def _annotation_ids(value: int | list[int]) -> list[int]:
    """Those of one or several things; -1 stands for none."""
    ids = value if isinstance(value, list) else [value]
    return [] if ids == [-1] else ids


def _sentence(sentence: Mapping[str, Any]) -> str:
    """In lower case and without punctuation; as it was written where nothing of it is left."""
    return sentence["sent"].strip() or sentence["raw"].strip()


def _warn_of_shared_images(source: str, refs: Sequence[Mapping[str, Any]], part: str) -> None:
    ours = {ref["image_id"] for ref in refs if ref["split"] == part}
    shared = ours & {ref["image_id"] for ref in refs if ref["split"] == "train"}
    if part != "train" and shared:
        logger.warning(
            f"{source}: {len(shared):,} of its {len(ours):,} images are images to train on, too, of which other things are "
            "said there: this split does not measure what a model does with new images."
        )


def _entities_rows(folder: Path, split: str, image_dir: Path | None) -> list[dict[str, Any]]:
    names = read_text(find_file(folder, f"{split}.txt")).split()
    sentences = find_file(folder, f"Sentences/{names[0]}.txt").parent
    annotations = find_file(folder, f"Annotations/{names[0]}.xml").parent
    files = [(sentences / f"{name}.txt", annotations / f"{name}.xml") for name in names]
    if missing := [path for pair in files for path in pair if not path.is_file()]:
        raise FileNotFoundError(
            f"data_dir: {len(missing):,} of the files of the {len(names):,} images in {split}.txt are missing, {missing[0]} "
            "first; unpack annotations.zip anew."
        )
    images = find_folder(image_dir or folder, "flickr30k-images", "flickr30k_images", "Images", "images", ".")
    rows = []
    for name, (sentence, annotation) in zip(names, files, strict=True):
        size, boxes = _read_entities(annotation)
        refs = [
            # The first of several types; papers that report by type count such a phrase with each.
            {
                "expression": " ".join(said["phrase"].split()),
                "boxes": boxes[said["chain"]],
                "kind": said["types"].split("/")[0],
            }
            for said in _PHRASE.finditer(read_text(sentence))
            # The others are of the whole scene, cannot be seen, or are no things.
            if said["chain"] != _NOT_VISUAL and said["chain"] in boxes
        ]
        if refs:
            rows.append({"image": images / f"{name}.jpg", "image_id": name, "size": size, "refs": refs})
    return rows


def _read_entities(path: Path) -> tuple[tuple[int, int], dict[str, list[tuple[int, int, int, int]]]]:
    """Size of an image, and by chain the boxes of its things: left, top, width and height."""
    text = read_text(path)
    if "<!DOCTYPE" in text:  # what it declares could grow without bound
        raise ValueError(f"{path.name}: declares a document type, which the official files do not; get it anew.")
    boxes: dict[str, list[tuple[int, int, int, int]]] = {}
    try:
        root = ElementTree.fromstring(text)
        size = int(root.findtext("size/width")), int(root.findtext("size/height"))
        for thing in root.iterfind("object"):
            for box in thing.iterfind("bndbox"):
                # The first pixel is 1, and the last is inside: 1 to 500 is all of 500 pixels.
                left, top = int(box.findtext("xmin")) - 1, int(box.findtext("ymin")) - 1
                right, bottom = int(box.findtext("xmax")), int(box.findtext("ymax"))
                for chain in thing.iterfind("name"):
                    boxes.setdefault(chain.text, []).append((left, top, right - left, bottom - top))
    except (ElementTree.ParseError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name}: is not XML with a size and boxes as in PASCAL VOC ({error}).") from error
    return size, boxes


def _daquar_rows(folder: Path, split: str, image_dir: Path | None) -> list[dict[str, Any]]:
    content = read_json(find_file(folder, "grounding_nyu13.json"))["expressions_templated"]
    images = find_folder(image_dir or folder, "images", "nyu_depth_images", ".")
    # The release has PNG files.
    files = {path.stem: path for path in images.glob("image*.*") if path.suffix.lower() in (".png", ".jpg", ".jpeg")}
    parts = _split_by_room({row["image"] for row in content})
    said: dict[str, list[dict[str, Any]]] = {}
    for row in content:
        if parts[row["image"]] == split:
            template = re.match(r"the (leftmost|rightmost|largest) ", row["expression"])
            ref = {"expression": row["expression"], "boxes": [row["box"]], "kind": template[1] if template else "only"}
            said.setdefault(row["image"], []).append(ref)
    return [
        {
            "image": files.get(Path(name).stem, images / name),
            "image_id": Path(name).stem,
            "size": _DAQUAR_SIZE,
            "refs": refs,
        }
        for name, refs in said.items()
    ]


def _split_by_room(names: Iterable[str]) -> dict[str, str]:
    """The split of each image. Neighbouring numbers show the same room, so images whose numbers are at most 4 apart stay
    together. The SHA-256 of the first one's name, modulo 100, decides: below 20 test, below 30 val, else train."""
    number = lambda name: int(re.search(r"\d+", name)[0])
    ranked = sorted(names, key=number)
    parts = {}
    for before, name in pairwise(["", *ranked]):
        if not before or number(name) - number(before) > _ROOM:
            place = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
            part = "test" if place < 20 else "val" if place < 30 else "train"
        parts[name] = part
    return parts


# Rows of official files and of the Hub


def _grounded_images(rows: Iterable[TableRow]) -> list[GroundedImage]:
    """One example an image, where its first row stood, with what all its rows say."""
    images: dict[str, str | TableImage] = {}
    said: dict[str, list[tuple[str, tuple[Box, ...], str | None]]] = {}
    count, over = 0, []
    for row in rows:
        refs, image_id = list(_said(row.values)), _image_id(row)
        image = images.setdefault(image_id, row.image)
        stored, turn = _stored(image)
        size = tuple(row.values.get("size") or stored or ())
        if not size:
            raise ValueError(
                f"{row.where}: the image cannot be read, so the size that its boxes refer to is not known."
            )
        # Of a size that only fits the image as it is shown, boxes are there already.
        turn = _TURNS.get(turn) if stored is not None and not (stored != size == stored[::-1]) else None
        for expression, boxes, kind in refs:
            where = f"{row.where}, image {image_id}, {expression!r}"
            count += len(boxes)
            over += [f"{where}, {list(box)} of {size[0]} x {size[1]}" for box in boxes if _reaches_over(box, size)]
            relative = to_relative([_cut(box, size) for box in boxes], "xyxy", "pixel", size, where)
            its = relative if turn is None else tuple(turn(*box) for box in relative)
            said.setdefault(image_id, []).append((expression, its, kind))
    if over:
        told = (
            f"{len(over):,} of {count:,} boxes reach over the edge of their image by more than a pixel, first {over[0]}"
        )
        if len(over) > _MOST_OVER * count:
            raise ValueError(f"{told}; are they left, top, width and height in pixels of that image?")
        logger.warning(f"{told}; they are cut there.")
    examples = []
    for image_id, image in images.items():
        expressions, boxes, kinds = zip(*said[image_id], strict=True)
        examples.append(GroundedImage(image, image_id, expressions, boxes, () if None in kinds else kinds))
    return examples


def _said(values: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[Sequence[float]], str | None]]:
    """Expressions, boxes (left, top, width and height in pixels) and kinds of a row of any of three forms."""
    for ref in values["refs"]:
        if isinstance(ref, str):  # lmms-lab: all are of the row's box
            yield ref.strip(), [values["bbox"]], None
        elif "ref_info" in ref:  # jxu124
            for sentence in ref["ref_info"]["sentences"]:
                yield _sentence(sentence), [ref["ann_info"]["bbox"]], None
        else:
            yield ref["expression"], ref["boxes"], ref.get("kind")


def _image_id(row: TableRow) -> str:
    """COCO's id where a copy on the Hub has it inside of other columns, else that of the row."""
    first = row.values["refs"][0]
    if isinstance(first, Mapping) and "ref_info" in first:
        return str(first["ref_info"]["image_id"])
    name = _COCO_NAME.match(row.values.get("file_name") or "")
    return name[1] if name else row.image_id


def _stored(image: str | TableImage) -> tuple[tuple[int, int] | None, int]:
    """Width and height of an image as it is stored, and its tag of EXIF; `None` of what is missing or damaged, which
    `check_images` counts and names."""
    try:
        with Image.open(image if isinstance(image, str) else io.BytesIO(image_bytes(image))) as opened:
            return opened.size, opened.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # see `unreadable`
        return None, 1


def _reaches_over(box: Sequence[float], size: tuple[int, int]) -> bool:
    return any(
        start < -_OVER_THE_EDGE or start + length > end + _OVER_THE_EDGE
        for start, length, end in zip(box[:2], box[2:], size, strict=True)
    )


def _cut(box: Sequence[float], size: tuple[int, int]) -> list[float]:
    """Left, top, right and bottom, inside the image, of a box that is left, top, width and height."""
    starts = [max(0.0, float(start)) for start in box[:2]]
    ends = [min(start + length, end) for start, length, end in zip(box[:2], box[2:], size, strict=True)]
    return [*starts, *map(float, ends)]


def _on_the_hub(
    name: str, splits: Mapping[str, str], lmms: str = "", clean: Sequence[str] = ()
) -> dict[str, list[HubTable]]:
    """Copies of the splits that measure. Of the copy for lmms-eval only those that are `clean`: others mix two splits."""
    return {
        ours: [
            HubTable("jxu124/refcoco-benchmark", f"{name}_{theirs}", columns={"refs": "ref_list", "image_id": None}),
            *(lmms_copies(lmms, ours, columns={"refs": "answer", "image_id": None}) if ours in clean else ()),
        ]
        for ours, theirs in splits.items()
    }


def _no_files(folder: Path, split: str, image_dir: Path | None) -> NoReturn:
    raise ValueError("data_dir: scenes are drawn, there are no files of them; leave it out.")


_TESTS_OF_TWO_KINDS = {"train": "train", "validation": "val", "test": "testA+testB"}
_UNC = {name: name for name in ("val", "testA", "testB")}

GROUNDING_BENCHMARKS: dict[str, GroundingBenchmark] = {
    "scenes": GroundingBenchmark(
        title="drawn scenes",
        splits={"train": "train", "validation": "validation", "test": "test"},
        read_folder=_no_files,
        read_rows=_grounded_images,
        read_package=read_scenes,
    ),
    "refcoco": GroundingBenchmark(
        title="RefCOCO",
        splits=_TESTS_OF_TWO_KINDS,
        other_splits=("google-train",),
        read_folder=partial(_refer_rows, name="refcoco", by="unc"),
        read_rows=_grounded_images,
        num_expressions={"train": 120_624, "val": 10_834, "testA": 5_657, "testB": 5_095},
        hub={
            **_on_the_hub("refcoco_unc", _UNC, "RefCOCO", clean=("testA", "testB")),
            **_on_the_hub("refcoco_google", {"google-val": "val", "google-test": "test"}),
        },
    ),
    "refcoco+": GroundingBenchmark(
        title="RefCOCO+",
        splits=_TESTS_OF_TWO_KINDS,
        read_folder=partial(_refer_rows, name="refcoco+", by="unc"),
        read_rows=_grounded_images,
        num_expressions={"train": 120_191, "val": 10_758, "testA": 5_726, "testB": 4_889},
        hub=_on_the_hub("refcoco_plus_unc", _UNC, "RefCOCOplus", clean=tuple(_UNC)),
    ),
    "refcocog": GroundingBenchmark(
        title="RefCOCOg",
        other_splits=("google-train",),
        read_folder=partial(_refer_rows, name="refcocog", by="umd"),
        read_rows=_grounded_images,
        num_expressions={
            **{"train": 80_512, "val": 4_896, "test": 9_602},
            **{"google-train": 85_474, "google-val": 9_536},
        },
        hub={
            **_on_the_hub("refcocog_umd", {"val": "val", "test": "test"}, "RefCOCOg", clean=("test",)),
            **_on_the_hub("refcocog_google", {"google-val": "val"}),
        },
    ),
    "grefcoco": GroundingBenchmark(
        title="gRefCOCO",
        splits=_TESTS_OF_TWO_KINDS,
        read_folder=partial(_refer_rows, name="grefcoco", by="unc"),
        read_rows=_grounded_images,
    ),
    "flickr30k-entities": GroundingBenchmark(
        title="Flickr30k Entities",
        read_folder=_entities_rows,
        read_rows=_grounded_images,
        num_expressions={"train": 427_193, "val": 14_433, "test": 14_481},
    ),
    "daquar-grounding": GroundingBenchmark(
        title="DAQUAR, templated expressions",
        read_folder=_daquar_rows,
        read_rows=_grounded_images,
    ),
}
