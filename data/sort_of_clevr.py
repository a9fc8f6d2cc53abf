"""Sort-of-CLEVR (Santoro et al. 2017, arXiv:1706.01427, section 4.2), drawn and asked anew: the paper published no files.

    python -m hivilt.data.sort_of_clevr sort_of_clevr              9,800 and 200 images, 200,000 questions

An image of 75 x 75 pixels holds six objects, squares and circles, one of each color, none touching another. Ten questions
about it are not relational, about one object alone: its shape, whether it is on the left, whether it is at the top. Ten
are relational: the shape of the object that is nearest to one, of that which is farthest from it, and how many objects
have its shape, itself among them. They are English sentences here, not the paper's bits, no question comes twice about
an image, and no two objects are equally near or far. The answers are yes, no, square, circle, and 1 to 6.

It leaves `images/` and a JSON file of questions for each split, the same for the same seed, as
`run_vqa.py --benchmark sort-of-clevr` reads them.
"""

import argparse
import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw
from tqdm import tqdm

SIDE, HALF = 75, 5  # of the image, and from an object's middle to its edge, in pixels
COLORS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "orange": (255, 156, 0),
    "yellow": (255, 255, 0),
    "gray": (128, 128, 128),
}
SHAPES = ("square", "circle")
# By family each question, and its answer from the object it is about and the others, the nearest first.
QUESTIONS = {
    "non-relational": {
        "what shape is the {} object?": lambda thing, others: thing.shape,
        "is the {} object on the left?": lambda thing, others: "yes" if thing.x < SIDE / 2 else "no",
        "is the {} object at the top?": lambda thing, others: "yes" if thing.y < SIDE / 2 else "no",
    },
    "relational": {
        "what shape is the object nearest to the {} object?": lambda thing, others: others[0].shape,
        "what shape is the object farthest from the {} object?": lambda thing, others: others[-1].shape,
        "how many objects have the shape of the {} object?": lambda thing, others: str(
            1 + sum(other.shape == thing.shape for other in others)
        ),
    },
}
QUESTIONS_EACH = 10
IMAGES = {"train": 9_800, "test": 200}


class Thing(NamedTuple):
    """An object of an image: its color, its shape, and its middle in pixels from the left and from the top."""

    color: str
    shape: str
    x: int
    y: int


def make_scene(rng: random.Random) -> list[Thing]:
    """Six objects, one of each color in the order of `COLORS`, that do not touch, each at its own distance to each."""
    while True:
        things: list[Thing] = []
        while len(things) < len(COLORS):
            x, y = (rng.randrange(HALF, SIDE - HALF) for _ in range(2))
            if all(max(abs(x - one.x), abs(y - one.y)) > 2 * HALF + 1 for one in things):
                things.append(Thing(list(COLORS)[len(things)], rng.choice(SHAPES), x, y))
        distances = [[math.dist(one[2:], other[2:]) for other in things] for one in things]
        if all(len(set(row)) == len(row) for row in distances):
            return things


def ask(things: list[Thing], rng: random.Random) -> list[dict[str, str]]:
    """Ten different questions of each family, with their answers."""
    asked = []
    for family, questions in QUESTIONS.items():
        choices = [(question, thing) for question in questions for thing in things]
        for question, thing in rng.sample(choices, QUESTIONS_EACH):
            others = sorted((t for t in things if t is not thing), key=lambda other: math.dist(other[2:], thing[2:]))
            answer = questions[question](thing, others)
            asked.append({"question": question.format(thing.color), "answer": answer, "family": family})
    return asked


def draw(things: list[Thing]) -> Image.Image:
    """The image, RGB, on white."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    brush = ImageDraw.Draw(image)
    for thing in things:
        shape = brush.rectangle if thing.shape == "square" else brush.ellipse
        shape((thing.x - HALF, thing.y - HALF, thing.x + HALF, thing.y + HALF), fill=COLORS[thing.color])
    return image


def write(folder: Path, images: Mapping[str, int] = IMAGES, seed: int = 0) -> None:
    """Writes the data set with so many images by split into a folder, which is made if need be.

    Each image has its own random numbers, of seed, split and number, so that fewer images are the first of more.
    """
    image_dir = folder / "images"
    image_dir.mkdir(parents=True, exist_ok=True)
    for split, count in images.items():
        rows = []
        for number in tqdm(range(count), desc=split, unit="image"):
            rng, name = random.Random(f"{seed}, {split}, {number}"), f"{split}_{number:05d}.png"
            things = make_scene(rng)
            draw(things).save(image_dir / name)
            rows += [{"image_filename": name, **one} for one in ask(things, rng)]
        (folder / f"sort_of_clevr_{split}.json").write_text(json.dumps(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.folder, seed=args.seed)
