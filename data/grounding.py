"""Where expressions with boxes come from, and how they become batches.

Every reader gives a list of `GroundedImage`. One item of `GroundingDataset` is one image with its expressions, all or some of
them, and `GroundingCollator` opens the images of a batch once each.
"""

import logging
import math
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

import datasets
import numpy as np
import torch

from hivilt.data.augmentation import Augmentation, Box, swap_left_and_right
from hivilt.data.cells import CellError, as_list, cell_values, scalar_text
from hivilt.data.tables import (
    ONLY_IMAGE,
    ONLY_IMAGE_ID,
    Collator,
    EpochDataset,
    TableImage,
    check_columns,
    check_drawn,
    check_items,
    check_spelling,
    column_names,
    image_size,
    open_table,
    rows_with_images,
)

logger = logging.getLogger(__name__)

BoxForm = Literal["xyxy", "xywh", "cxcywh"]
BoxUnit = Literal["pixel", "relative"]

# How far a box may reach beyond its image to be cut there: a pixel, or this share of a side where pixels are not known.
RELATIVE_TOLERANCE = 1e-3

# Fewer boxes may lie near the left and the top by chance.
_FEW_BOXES = 10

# An empty cell, as Python and pandas have it.
_NOT_KNOWN = ("None", "nan", "NaT", "<NA>")


@dataclass(frozen=True)
class GroundedImage:
    """An image and what is said of things in it.

    Attributes:
        expressions: texts that mean something in the image.
        boxes: for each expression those of what it means: none where nothing in the image is meant, and `None` in place of
            them where they are not known. They are relative to the image as it is shown, turned as its EXIF data says.
        kinds: for each expression the kind it is of, such as "relation", by which metrics are told apart; empty: not known.

    Raises:
        ValueError: these are not equally many, or a box is empty or not within [0, 1].
    """

    image: str | TableImage
    image_id: str
    expressions: tuple[str, ...] = ()
    boxes: tuple[tuple[Box, ...] | None, ...] = ()
    kinds: tuple[str, ...] = ()

    image_ids, images = ONLY_IMAGE_ID, ONLY_IMAGE

    def __post_init__(self):
        counts = len(self.expressions), len(self.boxes), len(self.kinds)
        if counts[1] != counts[0] or counts[2] not in (0, counts[0]):
            raise ValueError(
                f"boxes, kinds: expected one of each for the {counts[0]} expressions of image {self.image_id!r} (or no kinds), "
                f"got {counts[1]} and {counts[2]}; None stands for boxes that are not known."
            )
        for box in (box for own in self.boxes for box in own or ()):
            if not _is_box(box) or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
                raise ValueError(
                    f"boxes: expected (left, top, right, bottom) within [0, 1] of image {self.image_id!r}, got {box}; "
                    "`to_relative` makes such of others."
                )


class GroundingColumns(NamedTuple):
    """Names of the columns of a table; `image_id` may be absent."""

    image: str = "image"
    expression: str = "expression"
    boxes: str = "boxes"
    image_id: str | None = None


DEFAULT_COLUMNS = GroundingColumns()


def read_grounding_table(
    rows: str | os.PathLike | datasets.Dataset | Sequence[Mapping[str, Any]],
    columns: GroundingColumns = DEFAULT_COLUMNS,
    source: str | None = None,
    folder: str | os.PathLike | None = None,
    box_form: BoxForm = "xyxy",
    box_unit: BoxUnit = "pixel",
    boxes_needed: bool = True,
) -> list[GroundedImage]:
    """Examples of a JSON, JSONL, CSV or Parquet file, or of a table; see `open_table` for its name and folder,
    `rows_with_images` for its images and `read_boxes` for its boxes.

    A row is an image, an expression (or a list of them that mean the same) and its boxes: `[[12, 8, 40, 31]]`, `[]` where
    nothing in the image is meant, nothing (or null) where that is not known. Rows about the same image become one example,
    where the first of them stood; a row that comes again counts once.

    Boxes of an image whose size cannot be read are left as not known: `check_images` refuses such an image, or leaves it out.

    Args:
        box_form, box_unit: of all boxes, see `to_relative`. Pixels count in the image as it is shown, turned as its EXIF data
            says; their number is read from its header, once an image.
        boxes_needed: `False` lets boxes be not known, and their column absent, for expressions that are only to be looked for.

    Raises:
        FileNotFoundError, ValueError, TypeError: the file, a column or a value is not as expected, or an expression has other
            boxes in another row about the same image; names which.
    """
    _check_form(box_form, box_unit)
    rows, source, folder = open_table(rows, source, folder)
    names = columns._asdict()
    present = column_names(rows, source)
    if columns.boxes not in present and not boxes_needed:
        logger.warning(
            f"{source} has no column {columns.boxes!r}: its expressions are looked for, accuracy is not measured."
        )
        del names["boxes"]
    check_columns(names, present, source)

    images: dict[str, str | TableImage] = {}
    sizes: dict[str, tuple[int, int] | None] = {}
    # By image and expression its boxes, and the row that has them.
    meant: dict[str, dict[str, tuple[tuple[Box, ...] | None, str]]] = {}
    corners: list[bool] = []  # whether each box could be one of xyxy as well
    for row in rows_with_images(rows, columns.image, columns.image_id, source, folder):
        image_id, where = row.image_id, f"{row.where}: column {columns.boxes!r}"
        images.setdefault(image_id, row.image)
        expressions = _read_expressions(row.values.get(columns.expression), columns.expression, row.where)
        if "boxes" in names:
            check_spelling(row, columns.boxes, names.values())
        boxes = read_boxes(row.values.get(columns.boxes), where)
        if boxes is None and boxes_needed:
            raise ValueError(
                f"{where} is empty, null or missing, so it is not known what {expressions[0]!r} means, and nothing can be "
                "learned or measured by it. Write its boxes, or [] if nothing in the image is meant, or drop the row."
            )
        if boxes and box_unit == "pixel" and image_id not in sizes:
            sizes[image_id] = _size_or_none(row.image)
        size = sizes.get(image_id)
        is_known = boxes is not None and (size is not None or not boxes or box_unit == "relative")
        written, boxes = boxes, to_relative(boxes, box_form, box_unit, size, where) if is_known else None
        if boxes:
            corners += [box[0] < box[2] and box[1] < box[3] for box in written]
        for expression in expressions:
            before, earlier = meant.setdefault(image_id, {}).setdefault(expression, (boxes, row.where))
            if before != boxes:
                raise ValueError(
                    f"{row.where}: {expression!r} has other boxes than in {earlier}, about the same image; put all boxes that it "
                    "means in one row, [[...], [...]], or say what is meant in other words, or drop one of the rows."
                )
    if box_form != "xyxy" and len(corners) >= _FEW_BOXES and all(corners):
        logger.warning(
            f"{source}: the last two numbers of all {len(corners)} boxes are above the first two, as if they were the right and the "
            f"bottom: look whether they are the width and the height, as box_form={box_form!r} says, or take 'xyxy'."
        )
    return [
        GroundedImage(image, image_id, tuple(meant[image_id]), tuple(boxes for boxes, _ in meant[image_id].values()))
        for image_id, image in images.items()
    ]


def _read_expressions(value: Any, column: str, where: str) -> list[str]:
    where, expected = f"{where}: column {column!r}", "an expression as text, or a list of them"
    expressions = [scalar_text(one, where, expected, numbers=False) for one in cell_values(value, where, ())]
    if not expressions or not all(expressions):
        raise ValueError(f"{where}: the expression is empty; write one or drop the row.")
    return expressions


def _size_or_none(image: str | TableImage) -> tuple[int, int] | None:
    try:
        return image_size(image)
    except Exception:  # of any type, see `unreadable`; whoever opens the image says so
        return None


def read_boxes(value: Any, where: str) -> list[Any] | None:
    """The boxes of a cell, as they are written there: a list of them, one alone, or what pandas or `json` makes of these as
    text; `None`, where it is empty, null or NaN: they are not known.

    Raises:
        CellError, ValueError: it is anything else; names `where`.
    """
    value = as_list(value, where) if isinstance(value, str) else value
    if hasattr(value, "tolist") and not isinstance(value, np.generic):
        value = value.tolist()  # an array of any library
    if isinstance(value, list | tuple):
        is_one_box = len(value) > 0 and all(isinstance(part, Real) for part in value)
        return [list(value)] if is_one_box else list(value)
    if not value.strip() if isinstance(value, str) else str(value) in _NOT_KNOWN:
        return None
    raise CellError(
        f"{where} should hold a list of boxes, each of four numbers, got {type(value).__name__} {reprlib.repr(value)}; write "
        "[[12, 8, 40, 31]], [] where nothing in the image is meant, or leave it empty where that is not known."
    )


def to_relative(
    boxes: Sequence[Sequence[float]],
    form: BoxForm = "xyxy",
    unit: BoxUnit = "pixel",
    size: tuple[int, int] | None = None,
    where: str = "boxes",
) -> tuple[Box, ...]:
    """Boxes as (left, top, right, bottom), each in [0, 1] of the image.

    Pixels are counted between, not at their middles: the whole of an image of 640 x 480 is (0, 0, 640, 480). What reaches beyond
    the image by at most a pixel (of relative boxes, a thousandth of the side) is cut off.

    Args:
        form: what the four numbers are: `"xyxy"` left, top, right, bottom; `"xywh"` left, top, width, height, as COCO has them;
            `"cxcywh"` the middle from the left and the top, width, height, as YOLO has them.
        unit: `"pixel"`, or `"relative"` to width and height.
        size: the image's width and height in pixels, as it is shown; unused for relative boxes.
        where: what messages call the boxes.

    Raises:
        ValueError: a box is not four finite numbers, is empty or inverted, lies outside of the image, or is of the other unit
            by all appearance: relative numbers above 1, or pixels none of which is above 1; or `form`, `unit` or `size` is
            unknown. Names the box and the way out.
    """
    _check_form(form, unit)
    if unit == "pixel" and size is None and len(boxes) > 0:
        raise ValueError("size: boxes in pixels need the image's width and height; got None.")
    sides = (1, 1) if unit == "relative" else size
    return tuple(_relative(box, form, unit, sides, f"{where}, box {number}") for number, box in enumerate(boxes, 1))


def _check_form(form: str, unit: str) -> None:
    for name, value, kinds in (("box_form", form, BoxForm), ("box_unit", unit, BoxUnit)):
        if value not in get_args(kinds):
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, get_args(kinds)))}, got {value!r}.")


def _is_box(box: Any) -> bool:
    """Whether it is four numbers."""
    is_list = isinstance(box, list | tuple) and len(box) == 4
    return is_list and all(isinstance(part, Real) and not isinstance(part, bool) for part in box)


def _relative(box: Any, form: str, unit: str, sides: tuple[int, int], where: str) -> Box:
    if not _is_box(box):
        raise CellError(
            f"{where}: expected the four numbers of {form}, got {reprlib.repr(box)}; write [[12, 8, 40, 31]]."
        )
    try:
        first, second, third, fourth = box = [float(part) for part in box]
    except OverflowError:  # of a whole number that is larger than any float
        first, second, third, fourth = box = [math.inf] * 4
    told = f"{where}: got {box} (box_form {form}, box_unit {unit})"
    if not all(map(math.isfinite, box)):
        raise ValueError(f"{told}, which is not finite; write its numbers, or drop the row.")
    if unit == "relative" and max(box) > 1 + RELATIVE_TOLERANCE:
        raise ValueError(
            f"{told}, but nothing in an image is above 1: these are probably pixels, box_unit='pixel'; "
            "else cut it at the edge."
        )
    if unit == "pixel" and max(box) <= 1 < min(sides):
        raise ValueError(
            f"{told}, so at most a pixel in the corner of {_shown(sides, unit)}; these are probably relative: box_unit="
            "'relative'."
        )
    if form == "xyxy":
        edges = box
        hint = "if its last two numbers are width and height: box_form='xywh'"
    else:
        left, top = (first, second) if form == "xywh" else (first - third / 2, second - fourth / 2)
        edges = [left, top, left + third, top + fourth]
        hint = "give a width and a height above 0"
    if edges[2] <= edges[0] or edges[3] <= edges[1]:
        what = "ends where it begins or before it" if form == "xyxy" else "is empty"
        raise ValueError(f"{told}, which {what}; {hint}, else mend it or drop the row.")
    tolerance = 1 if unit == "pixel" else RELATIVE_TOLERANCE
    beyond = max(-min(edges), edges[2] - sides[0], edges[3] - sides[1])
    inside = [min(max(edge, 0.0), side) for edge, side in zip(edges, (*sides, *sides), strict=True)]
    if beyond > tolerance or inside[2] <= inside[0] or inside[3] <= inside[1]:
        hint = "" if form == "xyxy" else "if its last two numbers are the right and the bottom: box_form='xyxy'; else "
        raise ValueError(
            f"{told}, which reaches {beyond:g} beyond {_shown(sides, unit)}; {hint}cut it at the edge, or look whether it is of "
            "this image, and of the image as it is shown, turned as its EXIF data says."
        )
    return inside[0] / sides[0], inside[1] / sides[1], inside[2] / sides[0], inside[3] / sides[1]


def _shown(sides: tuple[int, int], unit: str) -> str:
    return "an image" if unit == "relative" else f"an image of {sides[0]} x {sides[1]} pixels"


class GroundingDataset(EpochDataset):
    """One item is one image: a dict of `image`, `image_id`, `expressions` (texts), `boxes` (of each, see `GroundedImage`),
    `expression_index` (their places among all expressions of the split), and `augmentation_draw`.

    Args:
        expressions_per_image: draw this many expressions of each image, or all if it has fewer, anew in every epoch; a
            `ValueError` if it is not positive or comes without `seed`. Default: all of them, in order.
        seed: makes it a training split, see `EpochDataset`; all boxes must be known then. Default: a split to evaluate on.

    Attributes:
        texts: all expressions of the split, in order.
        image_of_expression: for each of them the place of its image in `examples`.

    Raises:
        ValueError: there is no example, one has no expression, or in training boxes that are not known or none at all.
    """

    def __init__(
        self, examples: Sequence[GroundedImage], expressions_per_image: int | None = None, seed: int | None = None
    ):
        super().__init__(examples, seed)
        check_drawn("expressions_per_image", expressions_per_image, seed)
        self.expressions_per_image = expressions_per_image
        for example in self.examples:
            if not example.expressions:
                raise ValueError(f"examples: image {example.image_id!r} has no expression.")
            if seed is not None and None in example.boxes:
                expression = example.expressions[example.boxes.index(None)]
                raise ValueError(
                    f"examples: the boxes of {expression!r} in image {example.image_id!r} are not known: they are not given, or "
                    "the size of the image could not be read. To train, give them, or () where nothing in it is meant."
                )
        if seed is not None:
            counts = [len(boxes) for example in self.examples for boxes in example.boxes]
            if not any(counts):
                raise ValueError(
                    f"examples: none of the {len(counts)} expressions means anything in its image, so there is no box to learn "
                    "from. Give the boxes of some, or look whether they are read from the right column."
                )
            if all(counts):
                logger.warning(
                    f"Each of the {len(counts):,} expressions to train on means something in its image: the model will learn to "
                    "answer with a box whatever it is asked. If that is not wanted, add expressions that mean nothing, "
                    "their boxes []."
                )
        self.texts = [expression for example in self.examples for expression in example.expressions]
        self.image_of_expression = [place for place, one in enumerate(self.examples) for _ in one.expressions]
        self._first_expression = [0, *accumulate(len(example.expressions) for example in self.examples)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        places = self.draw_places(example.image_id, len(example.expressions), self.expressions_per_image)
        return {
            "image": example.image,
            "image_id": example.image_id,
            "expressions": [example.expressions[place] for place in places],
            "boxes": [example.boxes[place] for place in places],
            "expression_index": [self._first_expression[index] + place for place in places],
            **self.augmentation_draw(example.image_id),
        }


class GroundingCollator(Collator):
    """Makes a batch of expressions and of their images, once each; see `Collator` for its arguments.

    Boxes go where an augmentation takes what they are around, which cuts none of them off.

    Returns:
        What `Collator.pair` gives of `B_i` images and `B_t` expressions, with `expression_index` (B_t,) long, the place in
        `GroundingDataset.texts`; and, unless the boxes of one are not known, `labels`: for each expression a dict of `boxes`
        (n, 4) float, (cx, cy, w, h) in [0, 1] of the image as it is in `pixel_values`, n = 0 where nothing in it is meant.

    Raises:
        ValueError: the image processor does not show the whole of an image, see `HiViLTProcessor.check_whole_images`.
    """

    def __init__(self, processor, augmentation: Augmentation | None = None, *args, **kwargs):
        processor.check_whole_images()
        super().__init__(processor, augmentation, *args, **kwargs)

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        check_items(items, "expressions", type(self).__name__, "GroundingDataset")
        said = [item["expressions"] for item in items]
        images, frames = self.images(
            items, said, [[box for own in item["boxes"] for box in own or ()] for item in items]
        )
        texts, image_index, boxes = [], [], []
        for number, (item, frame) in enumerate(zip(items, frames, strict=True)):
            texts += map(swap_left_and_right, item["expressions"]) if frame.mirrored else item["expressions"]
            image_index += [number] * len(item["expressions"])
            boxes += [None if own is None else [frame.place(box) for box in own] for own in item["boxes"]]
        batch = self.pair(texts, images, image_index)
        batch["expression_index"] = torch.tensor([index for item in items for index in item["expression_index"]])
        if None not in boxes:
            batch["labels"] = [{"boxes": _centres_and_sizes(own)} for own in boxes]
        return batch


def _centres_and_sizes(boxes: Sequence[Box]) -> torch.Tensor:
    """(left, top, right, bottom) -> (n, 4) of (cx, cy, w, h)"""
    values = [
        ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top) for left, top, right, bottom in boxes
    ]
    return torch.tensor(values, dtype=torch.float).reshape(-1, 4)
