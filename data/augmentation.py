"""Random changes of training images, of the words that a mirrored image makes wrong, and of boxes, which move along.

All choices come from a `random.Random` that the caller seeds: torchvision is optional, and its transforms draw from a
global generator, which depends on the number of workers. Images are RGB and keep their resolution.
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from PIL import Image, ImageEnhance, ImageOps
from PIL.Image import Resampling, Transform

MAX_MAGNITUDE = 10
GRAY = (128, 128, 128)


# Left, top, right and bottom, each in [0, 1] of the width or height of an image as it is shown.
Box = tuple[float, float, float, float]


class Frame(NamedTuple):
    """The part of an image that is shown, as a `Box` of the whole, and whether that is mirrored; by default all of it, as it
    is."""

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0
    mirrored: bool = False

    def place(self, box: Box) -> Box:
        """A box of the whole image as one of what is shown, cut at its edges."""
        width, height = self.right - self.left, self.bottom - self.top
        left, right = (min(max((x - self.left) / width, 0.0), 1.0) for x in (box[0], box[2]))
        top, bottom = (min(max((y - self.top) / height, 0.0), 1.0) for y in (box[1], box[3]))
        return (1 - right, top, 1 - left, bottom) if self.mirrored else (left, top, right, bottom)


def random_resized_crop(
    size: tuple[int, int], draw: random.Random, min_scale: float, boxes: Sequence[Box] = ()
) -> tuple[int, int, int, int]:
    """A random part of an image of this width and height, as torchvision's `RandomResizedCrop` chooses it (Szegedy et al. 2015,
    section 6): its left, top, right and bottom in pixels.

    Its share of the area is uniform in [`min_scale`, 1], its aspect ratio log-uniform in [3/4, 4/3]. If ten draws do
    not fit into the image, it is the largest centred part with an aspect ratio in that range.

    Of the places where it may lie it has one in which it holds the centre of each of the `boxes`: of each side of a box at
    least half is seen, or the side fills the crop. A draw that is too small for that does not fit either, and after ten it is
    the whole image. TransVG (Deng et al. 2021) means to ask for centres too, MDETR (Kamath et al. 2021) for some part of each
    box; both can lose one, the first to the right or below, the second after its last try.
    """
    width, height = size
    centres = [((box[0] + box[2]) / 2 * width, (box[1] + box[3]) / 2 * height) for box in boxes]
    for _ in range(10):
        area = width * height * draw.uniform(min_scale, 1)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w == 0 or h == 0:
            continue
        lefts = _places(w, width, [x for x, _ in centres])
        tops = _places(h, height, [y for _, y in centres])
        if lefts and tops:
            left, top = draw.choice(lefts), draw.choice(tops)
            return left, top, left + w, top + h
    if boxes:
        return 0, 0, width, height
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _places(length: int, side: int, centres: Sequence[float]) -> range:
    """Where a piece of a side may begin and have all of these within."""
    first = max([0, *(math.floor(centre) - length + 1 for centre in centres)])
    last = min([side - length, *(math.ceil(centre) - 1 for centre in centres)])
    return range(first, last + 1)


def rand_augment(
    image: Image.Image, draw: random.Random, num_ops: int = 2, magnitude: int = 7, moves: bool = True
) -> Image.Image:
    """RandAugment (Cubuk et al. 2020) with ALBEF's operations, ranges and probability.

    `num_ops` operations are drawn with replacement, and each is carried out with probability 1/2. Those made to change
    colours or to hide parts (colour, invert, posterize, solarize, cutout) are left out, since answers name colours and
    things; auto-contrast and equalize stretch each channel by itself, so they can still tint an image.

    At magnitude 10 images are sheared by 0.3, rotated by 30 degrees and translated by 10/384 of their side, to either
    side with equal probability, in proportion below; what is uncovered becomes gray (128, 128, 128). Brightness and
    sharpness go from 0.1 at magnitude 0 over 1, no change, at 5 to 1.9 at 10. Without `moves` the operations are those that
    leave every pixel where it is.
    """
    names = [name for name in _OPERATIONS if moves or name not in _MOVING]
    for operation in map(_OPERATIONS.get, draw.choices(names, k=num_ops)):
        if draw.random() < 0.5:
            image = operation(image, magnitude / MAX_MAGNITUDE, draw.choice((-1, 1)))
    return image


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Transform.AFFINE, matrix, Resampling.BILINEAR, fillcolor=GRAY)


# Each takes the image, the strength in [0, 1] and a sign.
_OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "identity": lambda image, strength, sign: image,
    "auto_contrast": lambda image, strength, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, sign: ImageOps.equalize(image),
    "brightness": lambda image, strength, sign: ImageEnhance.Brightness(image).enhance(0.1 + 1.8 * strength),
    "sharpness": lambda image, strength, sign: ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * strength),
    "shear_x": lambda image, strength, sign: _affine(image, 1, sign * 0.3 * strength, 0, 0, 1, 0),
    "shear_y": lambda image, strength, sign: _affine(image, 1, 0, 0, sign * 0.3 * strength, 1, 0),
    "translate_x": lambda image, strength, sign: _affine(
        image, 1, 0, sign * strength * image.width * 10 / 384, 0, 1, 0
    ),
    "translate_y": lambda image, strength, sign: _affine(
        image, 1, 0, 0, 0, 1, sign * strength * image.height * 10 / 384
    ),
    "rotate": lambda image, strength, sign: image.rotate(sign * 30 * strength, Resampling.BILINEAR, fillcolor=GRAY),
}
_MOVING = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")

# Whole words, so neither "bright" nor "upright", "leftover" or "rights"; an underscore ends a word as a hyphen does.
_SIDE = re.compile(
    r"(?<![^\W_])((?:top|bottom|upper|lower|far|mid|middle|center)?)(left|right)"
    r"(?=(?:most|est|hand|handed|side|wards?|y)?(?![^\W_]))",
    re.IGNORECASE,
)


def says_left_or_right(text: str) -> bool:
    """Whether an English text has a word for one side: left, right, or a compound such as left-hand, rightmost,
    leftward or topleft. "Right" for correct and "left" for remaining count too: a word does not tell."""
    return _SIDE.search(text) is not None


def swap_left_and_right(text: str) -> str:
    """The text with left and right exchanged in the words of `says_left_or_right`, small and capital as they were.

    >>> swap_left_and_right("Left of the rightmost cup")
    'Right of the leftmost cup'
    """
    return _SIDE.sub(_other_side, text)


def _other_side(match: re.Match) -> str:
    place, side = match.groups()
    other = "right" if side.lower() == "left" else "left"
    return place + (other.upper() if side.isupper() else other.capitalize() if side[0].isupper() else other)


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image, in this order; by default nothing.

    Where there are boxes, a crop keeps the centre of each, see `random_resized_crop`, and `rand_augment` only changes colors:
    the box around a box that was turned is wider than the thing in it. What else an expression names than its boxes may
    be cut off, and "the man on the left" may be on the right of a crop: TransVG does not crop where a text tells a place.

    Published recipes: ALBEF and BLIP crop from 0.5 and flip whatever the text says, with `rand_augment` (2, 7) and
    (2, 5); BridgeTower does not flip for VQA; X-VLM skips the flip where the text says left or right.

    Images of one text that side by side are one scene, its left image and its right one, are mirrored together or not at all:
    the caller asks `mirrors` once for all of them.

    Attributes:
        random_crop: the `min_scale` of `random_resized_crop`; `None`: no crop.
        random_flip: mirrors half of the images. `"skip"` leaves those alone whose texts say left or right, `"swap"` mirrors
            them too, and the caller exchanges the words. Neither knows what else turns with an image, such as writing,
            clocks and arrows. `None`: no flip.
        rand_augment: `num_ops` and `magnitude` of the function of that name; `None`: not used.

    Raises:
        ValueError: a field is out of range; names it.
    """

    random_crop: float | None = None
    random_flip: Literal["skip", "swap"] | None = None
    rand_augment: tuple[int, int] | None = None

    def __post_init__(self):
        scale, operations = self.random_crop, self.rand_augment
        if scale is not None and (not isinstance(scale, int | float) or not 0 < scale <= 1):
            expected = "the least share of an image to keep, above 0 and at most 1"
            raise ValueError(f"random_crop: expected {expected}, got {scale!r}.")
        if self.random_flip not in (None, "skip", "swap"):
            raise ValueError(f"random_flip: expected 'skip', 'swap' or None for no flip, got {self.random_flip!r}.")
        if operations is not None:
            parts = operations if isinstance(operations, tuple | list) and len(operations) == 2 else (None, None)
            if not all(isinstance(part, int) for part in parts) or parts[0] < 1 or not 0 <= parts[1] <= MAX_MAGNITUDE:
                expected = f"(num_ops, magnitude), at least 1 and from 0 to {MAX_MAGNITUDE}, such as (2, 7)"
                raise ValueError(f"rand_augment: expected {expected}, got {operations!r}.")

    def mirrors(self, texts: Sequence[str], draw: random.Random) -> bool:
        """Draws whether images are mirrored of which `texts` are all that is said."""
        # Drawn whatever the texts say, so that they do not change the draws that follow.
        flipped = self.random_flip is not None and draw.random() < 0.5
        return flipped and not (self.random_flip == "skip" and any(map(says_left_or_right, texts)))

    def __call__(
        self,
        image: Image.Image,
        texts: Sequence[str],
        draw: random.Random,
        boxes: Sequence[Box] | None = None,
        mirrored: bool | None = None,
    ) -> tuple[Image.Image, Frame]:
        """A changed RGB image, of which `texts` are all that is said (questions and answers, captions, or expressions), and what
        it shows of the image: where that is mirrored, `texts` need `swap_left_and_right`. In the same state `draw` gives the
        same image.

        Args:
            boxes: those that texts mean; `None` for a task without boxes, where nothing is held back. They may be none.
            mirrored: whether to mirror it, if that was decided with others; default: what `mirrors` draws for `texts`.
        """
        frame = Frame()
        if self.random_crop is not None:
            width, height = image.size
            part = random_resized_crop(image.size, draw, self.random_crop, boxes or ())
            image = image.crop(part)
            frame = Frame(part[0] / width, part[1] / height, part[2] / width, part[3] / height)
        if mirrored is None:
            mirrored = self.mirrors(texts, draw)
        if mirrored:
            image = ImageOps.mirror(image)
        if self.rand_augment is not None:
            image = rand_augment(image, draw, *self.rand_augment, moves=boxes is None)
        return image, frame._replace(mirrored=mirrored)
