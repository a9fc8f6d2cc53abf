"""Sort-of-CLEVR: what its images show, and that the answers are right, worked out from their pixels."""

import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hivilt.data import sort_of_clevr
from hivilt.data.sort_of_clevr import COLORS, HALF, SIDE, ask, draw, make_scene, write
from hivilt.data.vqa_benchmarks import VQA_BENCHMARKS


def seen(image: Image.Image) -> dict[str, tuple[str, float, float]]:
    """Shape and middle of each object, by color, from the pixels alone."""
    pixels = np.asarray(image)
    found = {}
    for color, rgb in COLORS.items():
        y, x = np.nonzero((pixels == rgb).all(-1))
        found[color] = ("square" if len(x) == (2 * HALF + 1) ** 2 else "circle", x.mean(), y.mean())
    return found


def expected(objects: dict[str, tuple[str, float, float]], question: str) -> str:
    """The answer in words of this test, not of the generator."""
    (color,) = set(question.rstrip("?").split()) & set(COLORS)
    shape, x, y = objects[color]
    apart = {name: math.hypot(x - a, y - b) for name, (_, a, b) in objects.items() if name != color}
    if "nearest" in question:
        return objects[min(apart, key=apart.get)][0]
    if "farthest" in question:
        return objects[max(apart, key=apart.get)][0]
    if question.startswith("how many"):
        return str(Counter(kind for kind, _, _ in objects.values())[shape])
    if "left" in question:
        return "yes" if x <= (SIDE - 1) / 2 else "no"
    if "top" in question:
        return "yes" if y <= (SIDE - 1) / 2 else "no"
    return shape


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32))
def test_answers_are_right_by_the_pixels(seed):
    rng = random.Random(seed)
    things = make_scene(rng)
    objects, questions = seen(draw(things)), ask(things, rng)
    assert set(objects) == set(COLORS)
    assert [one["answer"] for one in questions] == [expected(objects, one["question"]) for one in questions]
    assert Counter(one["family"] for one in questions) == {"non-relational": 10, "relational": 10}
    assert len({one["question"] for one in questions}) == 20


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32))
def test_objects_are_whole_and_apart(seed):
    things = make_scene(random.Random(seed))
    boxes = [(one.x - HALF, one.y - HALF, one.x + HALF, one.y + HALF) for one in things]
    assert all(min(box) >= 0 and max(box) < SIDE for box in boxes)
    covered = np.zeros((SIDE + 1, SIDE + 1), dtype=int)
    for left, top, right, bottom in boxes:
        covered[top : bottom + 2, left : right + 2] += 1  # with a pixel of air
    assert covered.max() == 1


def test_the_same_seed_gives_the_same_files_and_fewer_are_the_first(tmp_path):
    write(tmp_path / "one", {"train": 3, "test": 1}, seed=1)
    write(tmp_path / "same", {"train": 2, "test": 1}, seed=1)
    write(tmp_path / "other", {"train": 2, "test": 1}, seed=2)
    files = {path.relative_to(tmp_path / "same") for path in (tmp_path / "same").rglob("*.*")}
    assert len(files) == 2 + 3
    for file in files:
        one, same, other = ((tmp_path / folder / file).read_bytes() for folder in ("one", "same", "other"))
        assert (one == same) == ("train.json" not in file.name) and same != other


def test_run_vqa_reads_it(tmp_path):
    write(tmp_path, {"train": 2, "test": 1})
    train, test = (VQA_BENCHMARKS["sort-of-clevr"].read(split, tmp_path) for split in ("train", "test"))
    assert len(train) == 40 and len(test) == 20
    assert {one.image_id for one in train} == {"train_00000.png", "train_00001.png"}
    with Image.open(test[0].image) as image:
        assert expected(seen(image.convert("RGB")), test[0].question) == test[0].answers[0]
    assert {one.types["family"] for one in train} == {"relational", "non-relational"}


@pytest.mark.parametrize("family", ["relational", "non-relational"])
def test_answers_are_as_many_as_the_paper_has(family):
    rng = random.Random(0)
    answers = {one["answer"] for _ in range(200) for one in ask(make_scene(rng), rng) if one["family"] == family}
    counts = {str(number) for number in range(1, len(COLORS) + 1)}
    assert answers == {"square", "circle"} | (counts if family == "relational" else {"yes", "no"})
    assert sort_of_clevr.IMAGES == {"train": 9_800, "test": 200}
