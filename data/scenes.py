"""Expressions about drawn scenes, with the boxes of what they mean: for visual grounding where no data set is at hand.

    scenes("train", 5_000)             5,000 images of 64 x 64 pixels, 40,000 expressions

A scene holds four to seven things on white, of a shape, a color and one of two sizes, none overlapping another. Its
expressions are English, by these rules; a test reads them back from the text and the pixels alone.

1. A phrase is `[small|large] [color] noun`; the noun is a shape or "shape". It describes the things that have all its words.
2. "the <phrase>" means the only thing that the phrase describes.
3. "the leftmost <phrase>", rightmost, topmost and bottommost, means the one of at least two things described whose middle is
   farthest to that side, by at least `margin` before the next.
4. "the <phrase> left of the <landmark>", right of, above and below, means the only thing that the phrase describes and whose
   middle is on that side of the middle of the landmark, however far it is in the other direction. The landmark is the only
   thing that its own phrase describes, and is not meant itself; every other thing that the first phrase describes is at least
   `margin` away from it in that direction, to either side. Two of three times there are several of these, so that the
   side decides.
5. "all <phrases>" and "all <phrases> left of the <landmark>" mean two or more things, as in 2 and 4. Three of four times the
   latter is about "all shapes", so that the landmark alone decides.
6. Nothing is meant where rules 2 to 5 leave no thing, or no landmark is there. Such an expression is made of one about the same
   scene that means something: one word of a phrase, or the side, is exchanged.

An expression is of the kind `relation` (3 and 4: five of seventeen), `several` (5: five), `none` (6: four) or `attribute` (2:
three). The middle of a thing is that of its box. `margin` is a sixteenth of the image's side. A thing that is alone on its side
of a landmark is also the farthest to that side, so that only `several` and `none` tell whether a model looks for landmarks.
"""

import io
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple, get_args

import datasets
from PIL import Image, ImageDraw

from hivilt.data.augmentation import Box
from hivilt.data.captions import Split
from hivilt.data.grounding import GroundedImage
from hivilt.data.tables import TableImage

COLORS = {
    "red": (230, 25, 25),
    "green": (30, 160, 40),
    "blue": (40, 70, 230),
    "yellow": (250, 210, 20),
    "purple": (150, 40, 180),
    "gray": (128, 128, 128),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
NOUN = "shape"
WORDS = {"size": SIZES, "color": tuple(COLORS), "shape": SHAPES}

# How far along a side or a superlative a middle is, from its place from the left and from the top.
SIDES: dict[str, Callable[[float, float], float]] = {
    "left of": lambda x, y: -x,
    "right of": lambda x, y: x,
    "above": lambda x, y: -y,
    "below": lambda x, y: y,
}
SUPERLATIVES = dict(zip(("leftmost", "rightmost", "topmost", "bottommost"), SIDES.values(), strict=True))

# Forms of expressions: their kind, and their weight. The last is made of one of the others.
FORMS = {
    "attribute": ("attribute", 3),
    "superlative": ("relation", 2),
    "side that decides": ("relation", 2),
    "side": ("relation", 1),
    "all": ("several", 1),
    "all on a side": ("several", 1),
    "everything on a side": ("several", 3),
    "none": ("none", 4),
}
# How many images each split of `read_scenes` has.
NUM_IMAGES = {"train": 5_000, "validation": 500, "test": 1_000}
# How often an expression, or the place of a thing, is drawn anew before its scene is.
TRIES = 200


class Thing(NamedTuple):
    """A thing in a scene: its words, its left and top edge and the side of its box, in pixels."""

    size: str
    color: str
    shape: str
    left: int
    top: int
    side: int

    @property
    def middle(self) -> tuple[float, float]:
        return self.left + self.side / 2, self.top + self.side / 2


class Phrase(NamedTuple):
    """Words that describe things; what is `None` is not said."""

    size: str | None = None
    color: str | None = None
    shape: str | None = None

    def describes(self, thing: Thing) -> bool:
        size, color, shape = self
        return size in (None, thing.size) and color in (None, thing.color) and shape in (None, thing.shape)

    def text(self, plural: bool = False) -> str:
        noun = self.shape or NOUN
        if plural:
            noun += "es" if noun.endswith("s") else "s"
        return " ".join(word for word in (self.size, self.color, noun) if word)


class Expression(NamedTuple):
    """What is said: "the" or, with `every`, "all", and at most one of a superlative and a side of a landmark."""

    phrase: Phrase
    every: bool = False
    superlative: str | None = None
    side: str | None = None
    landmark: Phrase | None = None

    def text(self) -> str:
        words = ["all" if self.every else "the", self.superlative, self.phrase.text(self.every)]
        words += [self.side, "the", self.landmark.text()] if self.landmark else []
        return " ".join(filter(None, words))

    def meant(self, things: list[Thing], margin: float) -> list[Thing] | None:
        """What is meant by the rules above, in the order of the scene; `None` where they do not say."""
        described = [thing for thing in things if self.phrase.describes(thing)]
        if self.landmark:
            landmarks = [thing for thing in things if self.landmark.describes(thing)]
            if len(landmarks) != 1:
                return None if landmarks else []
            along = SIDES[self.side]
            described = [thing for thing in described if thing is not landmarks[0]]
            ahead = [along(*thing.middle) - along(*landmarks[0].middle) for thing in described]
            if any(abs(distance) < margin for distance in ahead):
                return None
            described = [thing for thing, distance in zip(described, ahead, strict=True) if distance > 0]
        elif self.superlative and described:
            along = SUPERLATIVES[self.superlative]
            *_, second, first = sorted([described[0], *described], key=lambda thing: along(*thing.middle))
            if len(described) == 1 or along(*first.middle) - along(*second.middle) < margin:
                return None
            described = [first]
        is_said_so = len(described) != 1 if self.every else len(described) <= 1
        return described if is_said_so else None


def make_scene(draw: random.Random, image_size: int) -> list[Thing]:
    """Four to seven things of any words, see `place_things`."""
    words = [tuple(draw.choice(kind) for kind in WORDS.values()) for _ in range(draw.randint(4, 7))]
    return place_things(words, draw, image_size)


def place_things(words: Sequence[tuple[str, str, str]], draw: random.Random, image_size: int) -> list[Thing]:
    """Things of these sizes, colors and shapes that lie within the image, at least a thirty-second of its side apart."""
    gap = image_size // 32
    sides = dict(zip(SIZES, (image_size // 8, image_size * 7 // 32), strict=True))
    things: list[Thing] = []
    while len(things) < len(words):
        things = []
        for size, color, shape in words:
            side = sides[size]
            for _ in range(TRIES):
                left, top = draw.randint(0, image_size - side), draw.randint(0, image_size - side)
                if all(
                    max(
                        left - one.left - one.side,
                        one.left - left - side,
                        top - one.top - one.side,
                        one.top - top - side,
                    )
                    >= gap
                    for one in things
                ):
                    things.append(Thing(size, color, shape, left, top, side))
                    break
    return things


@lru_cache
def _stencil(shape: str, side: int) -> Image.Image:
    """A shape as black and white, that touches each edge of a square."""
    stencil, last = Image.new("1", (side, side)), side - 1
    brush = ImageDraw.Draw(stencil)
    if shape == "circle":
        brush.ellipse((0, 0, last, last), fill=1)
    elif shape == "triangle":
        brush.polygon([(0, last), (last // 2, 0), (side // 2, 0), (last, last)], fill=1)
    elif shape == "cross":
        arm = side * 3 // 8
        brush.rectangle((arm, 0, last - arm, last), fill=1)
        brush.rectangle((0, arm, last, last - arm), fill=1)
    else:
        brush.rectangle((0, 0, last, last), fill=1)
    return stencil


def draw_scene(things: list[Thing], image_size: int) -> Image.Image:
    """The image, RGB, on white; a thing's box is what its color covers."""
    image = Image.new("RGB", (image_size, image_size), "white")
    for thing in things:
        image.paste(COLORS[thing.color], (thing.left, thing.top), _stencil(thing.shape, thing.side))
    return image


def draw_scenes(scenes: Iterable[list[Thing]], image_size: int) -> list[TableImage]:
    """Their images, kept in memory as PNG files."""
    files = []
    for things in scenes:
        file = io.BytesIO()
        draw_scene(things, image_size).save(file, "PNG", compress_level=1)
        files.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(decode=False)})
    table = datasets.Dataset.from_dict({"image": files}, features=features)
    return [TableImage(table, number, "image") for number in range(len(files))]


def describe(
    things: list[Thing], draw: random.Random, margin: float, count: int
) -> list[tuple[str, str, list[Thing]]] | None:
    """`count` different expressions about a scene with their kinds and what they mean; `None` where it does not offer them."""
    phrases = Counter(Phrase(*words) for one in things for words in product(*((None, word) for word in one[:3])))
    alone = [phrase for phrase, number in phrases.items() if number == 1]
    shared = [phrase for phrase, number in phrases.items() if number > 1]
    if not alone:
        return None
    said: dict[str, tuple[str, str, list[Thing]]] = {}
    for form in draw.choices([*FORMS], [weight for _, weight in FORMS.values()], k=count):
        kind, exchanged = FORMS[form][0], None
        if kind == "none":
            form = draw.choices([*FORMS][:-1], [weight for _, weight in FORMS.values()][:-1])[0]
            exchanged = draw.choice(("phrase", "landmark", "side") if "side" in form else ("phrase",))
        for _ in range(TRIES):
            expression = _propose(form, things, alone, shared, draw)
            meant = expression and expression.meant(things, margin)
            if exchanged and meant:
                expression = _exchange(expression, exchanged, draw)
                meant = expression and expression.meant(things, margin)
            elif not meant:
                continue
            if meant is not None and (kind == "none") == (not meant) and (text := expression.text()) not in said:
                said[text] = text, kind, meant
                break
        else:
            return None
    return list(said.values())


def _propose(
    form: str, things: list[Thing], alone: list[Phrase], shared: list[Phrase], draw: random.Random
) -> Expression | None:
    """What may be an expression of this form, of phrases that describe one thing alone or several."""
    if form == "attribute":
        return Expression(draw.choice(alone))
    if form == "superlative":
        return Expression(draw.choice(shared), superlative=draw.choice([*SUPERLATIVES]))
    if form == "all":
        phrase = draw.choice(shared)
        return Expression(phrase, every=True) if any(phrase) else None
    phrase, landmark = draw.choice(alone if form == "side" else shared), draw.choice(alone)
    if form == "everything on a side":
        phrase = Phrase()
    others = sum(phrase.describes(thing) and not landmark.describes(thing) for thing in things)
    if form == "side that decides" and others < 2:
        return None
    return Expression(phrase, FORMS[form][0] == "several", None, draw.choice([*SIDES]), landmark)


def _exchange(expression: Expression, what: str, draw: random.Random) -> Expression | None:
    """The expression with another side, or with another word in its phrase or its landmark, if there is one."""
    if what == "side":
        return expression._replace(side=draw.choice([side for side in SIDES if side != expression.side]))
    words = getattr(expression, what)._asdict()
    said = [part for part, word in words.items() if word]
    if not said:
        return None
    part = draw.choice(said)
    other = draw.choice([word for word in WORDS[part] if word != words[part]])
    return expression._replace(**{what: Phrase(**(words | {part: other}))})


def scenes(
    split: Split, num_images: int, seed: int = 0, image_size: int = 64, expressions_per_image: int = 8
) -> list[GroundedImage]:
    """So many scenes of a split, each with so many expressions of the kinds above, none twice.

    Each image has its own random numbers, of seed, split and number, so fewer images are the first of more. They are kept in
    memory as PNG files, less than a kilobyte each.

    Args:
        image_size: side of the images in pixels, at least 64.
        expressions_per_image: at most 16; few scenes offer more.

    Raises:
        ValueError: an argument is out of its range.
    """
    if split not in get_args(Split):
        raise ValueError(f"split: scenes have {', '.join(map(repr, get_args(Split)))}, got {split!r}.")
    for name, value, least, most in (
        ("num_images", num_images, 1, float("inf")),
        ("image_size", image_size, 64, float("inf")),
        ("expressions_per_image", expressions_per_image, 1, 16),
    ):
        if not least <= value <= most:
            raise ValueError(f"{name}: expected at least {least} and at most {most}, got {value}.")
    drawn, described = [], []
    for number in range(num_images):
        draw, said = random.Random(f"scenes {seed} {split} {number}"), None
        while said is None:
            things = make_scene(draw, image_size)
            said = describe(things, draw, image_size / 16, expressions_per_image)
        drawn.append(things)
        described.append(said)
    return [
        GroundedImage(
            image,
            f"{split}_{number:06d}",
            expressions=tuple(text for text, _, _ in said),
            boxes=tuple(tuple(_box(thing, image_size) for thing in meant) for _, _, meant in said),
            kinds=tuple(kind for _, kind, _ in said),
        )
        for number, (image, said) in enumerate(zip(draw_scenes(drawn, image_size), described, strict=True))
    ]


def _box(thing: Thing, image_size: int) -> Box:
    edges = thing.left, thing.top, thing.left + thing.side, thing.top + thing.side
    return tuple(edge / image_size for edge in edges)


def read_scenes(split: Split, image_size: int = 64, most: int | None = None) -> list[GroundedImage]:
    """The scenes of a split that a run draws by itself, as many as `NUM_IMAGES` says, or the first of them, `most`."""
    return scenes(split, min(NUM_IMAGES[split], most or NUM_IMAGES[split]), image_size=image_size)
