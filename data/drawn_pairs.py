"""Statements about pairs of drawn images: for reasoning over images where no data set is at hand.

    drawn_pairs("train", 1_500)          39,000 statements about 8,250 images of 64 x 64 pixels

An image holds four to six things on white, as those of `hivilt.data.scenes`. A phrase is `[color] noun`, the noun is a shape or
"shape"; an image shows it if at least one thing has all its words. Statements are English, of five kinds; P is a phrase, and a
test reads all back from the text and the pixels alone:

    one      exactly one image shows a P
    both     both images show a P
    neither  neither image shows a P
    same     both images have the same number of Ps
    more     the left image has more Ps than the right one; or the right image than the left one

Images and statements come in sets, which share no image, of two forms by turns. Every sentence of a set is said of several pairs
of its images, as often truly as falsely: of the sentence alone, nothing can be told. In a set of four images A and A' show P
and not Q, B and B' show Q and not P; no thing is both. In a set of seven, X0 to X4 have so many Ps as the number says; A and B
are two of these, whose numbers differ by one or two, and A' and B' have as many as A and B. How many things an image has in
all is drawn apart from that.

    one           (A, B') (B, A') true     (A, A') (B, B') false      said of P and once more of Q
    both          (A, A') true             (A, B') or (B, A') false   the same, of Q with B and B' for A and A'
    neither       (B, B') true             (A, B') or (B, A') false   the same
    same          (A, A') (B, B') true     (A, B') (B, A') false
    more          (X1, X0) (X2, X1) ...    (X0, X1) (X1, X2) ...      the same pairs the other way round

Sets to train on have one kind more, of which one image tells all:

    side     the left image shows a P, or the right one

It is of stage 0, to be learned first (see `ReasoningDataset`). Of stage 1, to be learned later, are "same", "more", and what is
false of "one" as neither image shows it: what is left is a matter of more or less, to the parts of which each image adds.

Of "one" and "same" the sentence and one image tell nothing either: each image on the left, and each on the right, is in one true
statement and in one false statement of the sentence. For the others no data can be so. Where not both images show a P, one of
them says so alone: if half of the statements are true, who sees the left images and who sees the right ones are right on at least
75 % on average, which is what they are here. Of two numbers from 0 to 4, 0 is never more and 4 never less than the other, so one
image gives 62.5 %. Over all kinds it is 61 %.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, islice
from typing import NamedTuple, get_args

from hivilt.data.captions import Split
from hivilt.data.reasoning import Statement
from hivilt.data.scenes import COLORS, SHAPES, WORDS, Phrase, Thing, draw_scenes, place_things
from hivilt.data.tables import TableImage

# How many sets each split of `read_drawn_pairs` has: 39,000, 1,008 and 2,016 statements.
NUM_SETS = {"train": 1_500, "validation": 72, "test": 144}
# The most Ps that are counted in one image.
MOST_COUNTED = 4

# The names of two images of a set, left and right.
Pair = tuple[str, str]


class Said(NamedTuple):
    """A sentence, the pairs of which it is true, and those of which it is false."""

    kind: str
    sentence: str
    true: Sequence[Pair]
    false: Sequence[Pair]
    later: Sequence[Pair] = ()  # those of both that are of stage 1

    def turned(self, draw: random.Random) -> "Said":
        """All pairs the other way round, or none."""
        if draw.random() < 0.5:
            return self
        turned = {name: [pair[::-1] for pair in getattr(self, name)] for name in ("true", "false", "later")}
        return self._replace(**turned)


class _Set(NamedTuple):
    """Images by their names, as what is in them, what is said of pairs of them, and of one of a pair."""

    images: dict[str, list[Thing]]
    said: list[Said]
    said_of_one: list[Said]


_SAME = (("A", "A'"), ("B", "B'"))
_DIFFERENT = (("A", "B'"), ("B", "A'"))
_ANYTHING = Phrase()
_PHRASES = [Phrase(None, color, shape) for color in (None, *COLORS) for shape in (None, *SHAPES) if color or shape]


def drawn_pairs(split: Split, num_sets: int, seed: int = 0, image_size: int = 64) -> list[Statement]:
    """The statements of so many sets of a split; a set has sixteen statements about four images or twelve about seven, by turns,
    and of "train" sixteen and eight more, of the kind "side".

    Labels are "True" and "False". Statements of a set with the same sentence have the same `group`. Each set has its own random
    numbers, of seed, split and number, so fewer sets are the first of more. Images are kept in memory as PNG files, less than a
    kilobyte each.

    Args:
        image_size: side of the images in pixels, at least 64.

    Raises:
        ValueError: an argument is out of its range.
    """
    if split not in get_args(Split):
        raise ValueError(f"split: drawn pairs have {', '.join(map(repr, get_args(Split)))}, got {split!r}.")
    for name, value, least in (("num_sets", num_sets, 1), ("image_size", image_size, 64)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}.")
    sets = []
    for number, make in enumerate(islice(cycle((_set_of_shown, _set_of_counted)), num_sets)):
        draw = random.Random(f"drawn pairs {seed} {split} {number}")
        sets.append((make(draw, image_size), draw))

    images = iter(draw_scenes([things for made, _ in sets for things in made.images.values()], image_size))
    statements, num_images = [], 0
    for number, (made, draw) in enumerate(sets):
        shown = {}
        for name in made.images:
            shown[name] = (f"{split}_{num_images:06d}", next(images))
            num_images += 1
        statements += statements_of_set(draw, split, number, shown, made.said, made.said_of_one)
    return statements


def statements_of_set(
    draw: random.Random,
    split: str,
    number: int,
    images: Mapping[str, tuple[str, str | TableImage]],
    said: Iterable[Said],
    said_of_one: Iterable[Said],
) -> list[Statement]:
    """What is said of the set of this number, to train on also of one image alone, in an order that is drawn. `images` has the id
    and the file of each."""
    name, labelled = f"{split}_{number:05d}", []
    for place, one in enumerate([*said, *(said_of_one if split == "train" else ())]):
        for label, pairs in (("True", one.true), ("False", one.false)):
            labelled += [(one, f"{name}_{place}", label, pair) for pair in pairs]
    draw.shuffle(labelled)
    statements = []
    for place, (one, group, label, pair) in enumerate(labelled):
        image_ids, files = zip(*(images[image] for image in pair), strict=True)
        stage = 0 if one.kind == "side" else 1 if pair in one.later else None
        told = (one.sentence, label, one.kind, group, stage)
        statements.append(Statement(f"{name}_{place:02d}", files, image_ids, *told))
    return statements


def read_drawn_pairs(split: Split, image_size: int = 64, most: int | None = None) -> list[Statement]:
    """The statements of a split that a run draws by itself, as many as `NUM_SETS` says, or the first of them, `most`."""
    num_sets = NUM_SETS[split] if most is None else min(NUM_SETS[split], most // 12 + 1)
    return drawn_pairs(split, num_sets, image_size=image_size)[:most]


def _set_of_shown(draw: random.Random, image_size: int) -> _Set:
    """Four images that show P or Q, and what is said of that."""
    p, q = _phrases(draw)
    images = {name: _image(draw, image_size, {p: draw.randint(1, 2), q: 0}) for name in ("A", "A'")}
    images |= {name: _image(draw, image_size, {p: 0, q: draw.randint(1, 2)}) for name in ("B", "B'")}
    return _Set(images, *said_of_shown(draw, *(f"a {phrase.text()}" for phrase in (p, q))))


def said_of_shown(draw: random.Random, p: str, q: str) -> tuple[list[Said], list[Said]]:
    """What is said of a set of four images, A and A' that show what the text `p` names, and B and B' that show `q`: of pairs of
    them, and of one of a pair."""
    said = []
    for text, shown, without in ((p, *_SAME), (q, *_SAME[::-1])):
        said.append(Said("one", f"exactly one image shows {text}", _DIFFERENT, _SAME, later=[without]))
        said.append(Said("both", f"both images show {text}", [shown], [draw.choice(_DIFFERENT)]))
        said.append(Said("neither", f"neither image shows {text}", [without], [draw.choice(_DIFFERENT)]))
    of_one = [*_said_of_one(f"shows {p}", "A", "B"), *_said_of_one(f"shows {q}", "B", "A")]
    return [one.turned(draw) for one in said], of_one


def _set_of_counted(draw: random.Random, image_size: int) -> _Set:
    """Seven images with different numbers of P, and what is said of these."""
    p, _ = _phrases(draw)
    fewer, more = draw.choice([(a, b) for b in range(MOST_COUNTED + 1) for a in (b - 2, b - 1) if a >= 0])
    # A and B are among those that are named by their numbers.
    numbers = {str(number): number for number in range(MOST_COUNTED + 1)} | {"A'": fewer, "B'": more}
    images = {name: _image(draw, image_size, {p: number}) for name, number in numbers.items()}
    named, things = {"A": str(fewer), "B": str(more)}, p.text(plural=True)
    same, different = ([(named[left], right) for left, right in pairs] for pairs in (_SAME, _DIFFERENT))
    rising = [(str(number), str(number + 1)) for number in range(MOST_COUNTED)]
    falling = [pair[::-1] for pair in rising]
    side, other, true, false = draw.choice((("left", "right", falling, rising), ("right", "left", rising, falling)))
    said = [
        Said(
            "same", f"both images have the same number of {things}", same, different, later=[*same, *different]
        ).turned(draw),
        Said("more", f"the {side} image has more {things} than the {other} one", true, false, later=[*true, *false]),
    ]
    return _Set(images, said, _said_of_one(f"shows a {p.text()}", str(draw.randint(1, MOST_COUNTED)), "0"))


def _said_of_one(text: str, own: str, other: str) -> list[Said]:
    """What is true of one image and not of the other, beside one that is like it and beside one that is not: said of the left
    image, and of the right one."""
    said = []
    for side, turn in (("left", 1), ("right", -1)):
        true, false = ([(name, beside)[::turn] for beside in ("A'", "B'")] for name in (own, other))
        said.append(Said("side", f"the {side} image {text}", true, false))
    return said


def _phrases(draw: random.Random) -> tuple[Phrase, Phrase]:
    """Two phrases that no thing has both, each with a color, a shape or both."""
    while True:
        p, q = (draw.choice(_PHRASES) for _ in range(2))
        if any(one and other and one != other for one, other in zip(p, q, strict=True)):
            return p, q


def _image(draw: random.Random, image_size: int, counts: Mapping[Phrase, int]) -> list[Thing]:
    """Four to six things, of which so many are of each phrase, and the others of none."""
    words = [_words(draw, phrase) for phrase, count in counts.items() for _ in range(count)]
    for _ in range(draw.randint(4, 6) - len(words)):
        other = _words(draw)
        while any(phrase.describes(Thing(*other, 0, 0, 0)) for phrase in counts):
            other = _words(draw)
        words.append(other)
    draw.shuffle(words)
    return place_things(words, draw, image_size)


def _words(draw: random.Random, phrase: Phrase = _ANYTHING) -> tuple[str, str, str]:
    """Size, color and shape of a thing that a phrase describes."""
    return tuple(word or draw.choice(kind) for word, kind in zip(phrase, WORDS.values(), strict=True))
