"""Images and what is said of things in them, and how boxes are written."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# (left, top, right, bottom), relative to the image as it is shown: each from 0 to 1.
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class GroundedImage:
    """An image and what is said of things in it.

    Attributes:
        expressions: texts, each of which means some things in the image.
        boxes: those of each expression; none: nothing in the image is meant. `None` in place of boxes: not known.
        kinds: of each expression, for metrics that are told by kind; empty: of none.
    """

    image: Any
    image_id: str
    expressions: tuple[str, ...] = ()
    boxes: tuple[tuple[Box, ...] | None, ...] = ()
    kinds: tuple[str, ...] = ()


def to_relative(
    boxes: Iterable[Sequence[float]],
    form: Literal["xyxy", "xywh", "cxcywh"],
    unit: Literal["pixel", "relative"],
    size: tuple[int, int] | None,
    where: str = "boxes",
) -> tuple[Box, ...]:
    """Boxes in the form that is used inside.

    Args:
        size: (width, height) of the image in pixels, where `unit` is "pixel".
        where: what messages call the boxes.

    Raises:
        ValueError: a box has no area, or is not inside the image.
    """
    width, height = (1, 1) if unit == "relative" else size
    relative = []
    for number, box in enumerate(boxes, 1):
        x, y, w, h = box
        left, top = (x - w / 2, y - h / 2) if form == "cxcywh" else (x, y)
        right, bottom = (w, h) if form == "xyxy" else (left + w, top + h)
        if not all(map(math.isfinite, box)) or not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(
                f"{where}, box {number}: {list(box)} ({form}, {unit}) is empty or not inside the image, which is {width} x {height}."
            )
        relative.append((left / width, top / height, right / width, bottom / height))
    return tuple(relative)
