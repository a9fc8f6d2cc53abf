"""easy-VQA's questions in other words: what a person asks about a drawn shape, beyond the 24 sentences of the data set.

Each answer follows from what the data set says of the image: its shape, its color. Of every kind the last wordings are
never trained on; `benchmarks/rewordings.py` asks them.
"""

import random
import re
from collections import defaultdict
from collections.abc import Sequence

from hivilt.data.vqa import VQAExample

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
_FACT = re.compile(rf"\b({'|'.join(COLORS + SHAPES)})\b")
_NEGATION = re.compile(r"\b(not|no)\b")

# kind: what is asked by wordings that are trained on, and by others that are not.
_WORDINGS = {
    "color": (
        "what color is it? which color is it? what color is this? what is its color? what colour is it? "
        "which color does it have? what is the color? what color is the {shape} in the picture? color? "
        "what color does the {shape} have? which color is the {shape}? what color do you see?",
        "which color is this? what color does it have? what colour is the {shape}? which color do you see?",
    ),
    "shape": (
        "what shape is it? which shape is it? what shape is this? what is it? what is this? shape? what do you see? "
        "what is in the image? what is in the picture? which shape do you see? what shape is in the picture? "
        "what is its shape? what shape is the {color} one?",
        "which shape is this? what shape do you see? which shape is in the picture? which shape is the {color} one?",
    ),
    "is color": (
        "is it {color}? is this {color}? is the shape {color}? is there something {color}? "
        "is there anything {color} in the image? do you see something {color}? can you see a {color} shape? "
        "is its color {color}? is there a {color} shape in the picture? does the picture contain a {color} shape?",
        "is this shape {color}? do you see a {color} shape? is there something {color} in the picture?",
    ),
    "is shape": (
        "is it a {shape}? is this a {shape}? is the shape a {shape}? do you see a {shape}? can you see a {shape}? "
        "is there a {shape} in the picture? does the picture contain a {shape}?",
        "is this shape a {shape}? can you see a {shape} in the picture? do you see a {shape} in the image?",
    ),
    "is both": (
        "is it a {color} {shape}? is this a {color} {shape}? is there a {color} {shape}? "
        "is there a {color} {shape} in the image? do you see a {color} {shape}? is the {shape} {color}?",
        "can you see a {color} {shape}? does the image contain a {color} {shape}? is a {color} {shape} present?",
    ),
}
WORDINGS: dict[str, tuple[tuple[str, ...], ...]] = {
    kind: tuple(tuple(re.findall(r"\w[^?]*\?", questions)) for questions in both) for kind, both in _WORDINGS.items()
}


def facts(examples: Sequence[VQAExample]) -> dict[str, tuple[str, str]]:
    """The color and the shape of each image whose questions tell both, by `image_id`."""
    told: dict[str, dict[str, str]] = defaultdict(dict)
    for example in examples:
        answer, named = example.answers[0], _FACT.search(example.question)
        words = [named[1]] if named else []  # "what color is the circle?"
        if answer not in ("yes", "no"):
            words.insert(0, answer)
        # "is there a blue shape?" yes; "is no circle present?" no
        elif (answer == "yes") == bool(_NEGATION.search(example.question)):
            words = []
        told[example.image_id] |= {"color" if word in COLORS else "shape": word for word in words}
    return {image: (words["color"], words["shape"]) for image, words in told.items() if len(words) == 2}


def reword(examples: Sequence[VQAExample], share: float, seed: int, held_out: bool = False) -> list[VQAExample]:
    """The questions, a share of them exchanged for others about the same image, with their answers.

    Args:
        share: of the questions that are exchanged, from 0 to 1; those about images of which they tell not both color and
            shape stay.
        held_out: whether in the wordings that are not trained on.
    """
    known, draw = facts(examples), random.Random(seed)
    reworded = []
    for example in examples:
        if example.image_id not in known or draw.random() >= share:
            reworded.append(example)
            continue
        color, shape = known[example.image_id]
        kind = draw.choice([*WORDINGS])
        answer = {"color": color, "shape": shape}.get(kind)
        if answer is None:
            # As often right as wrong.
            answer = draw.choice(["yes", "no"])
            if answer == "no":
                wrong = draw.choice(["color", "shape"]) if kind == "is both" else kind.removeprefix("is ")
                if wrong == "color":
                    color = draw.choice([other for other in COLORS if other != color])
                else:
                    shape = draw.choice([other for other in SHAPES if other != shape])
        question = draw.choice(WORDINGS[kind][held_out]).format(color=color, shape=shape)
        reworded.append(example._replace(question=question, answers=(answer,), types={"wording": kind}))
    return reworded
