"""Scenes: what their images show, and that expressions mean what their boxes say, read anew from the text and the pixels."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hivilt.data.grounding import GroundingDataset
from hivilt.data.scenes import COLORS, read_scenes, scenes
from hivilt.data.tables import check_images, open_image
from scene_reader import seen

SHAPES = ("circle", "square", "triangle", "cross")


def reading(text, things, margin):
    """What an expression means by the rules of the module, in words of this test; fails where they leave it open."""
    words = text.replace("crosses", "cross")
    words = re.sub(r"(circle|square|triangle|shape)s\b", r"\1", words)
    article, words = words.split(" ", 1)
    middle = lambda box, axis: (box[axis] + box[axis + 2]) / 2
    fit = lambda phrase: [one for one in things if set(phrase.split()) - {"shape"} <= one[0]]
    side = re.search(r" (left of|right of|above|below) the ", words)
    superlative = re.match(r"(left|right|top|bottom)most ", words)
    axis = 0 if re.search("left|right", words) else 1
    if side:
        first, landmark = fit(words[: side.start()]), fit(words[side.end() :])
        if not landmark:
            return []
        (landmark,) = landmark
        first = [one for one in first if one is not landmark]
        gaps = [middle(one[1], axis) - middle(landmark[1], axis) for one in first]
        assert all(abs(gap) >= margin for gap in gaps)
        before = side[1] in ("left of", "above")
        found = [one for one, gap in zip(first, gaps, strict=True) if (gap < 0) == before]
    elif superlative:
        first = fit(words[superlative.end() :])
        first.sort(key=lambda one: middle(one[1], axis), reverse=superlative[1] in ("right", "bottom"))
        if first:
            assert len(first) > 1 and abs(middle(first[0][1], axis) - middle(first[1][1], axis)) >= margin
        found = first[:1]
    else:
        found = fit(words)
    assert not found or (len(found) > 1) == (article == "all")
    return [box for _, box in found]


def kind_of(text, boxes):
    if not boxes:
        return "none"
    if text.startswith("all "):
        return "several"
    return "relation" if "most " in text or text.count("the ") == 2 else "attribute"


@pytest.mark.parametrize(("image_size", "count"), [(64, 8), (128, 8), (100, 3)])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_expressions_mean_what_a_reader_of_text_and_pixels_finds(seed, image_size, count):
    (example,) = scenes("train", 1, seed, image_size, count)
    image = open_image(example.image)
    assert image.size == (image_size, image_size)
    things = seen(image)
    assert len(things) in range(4, 8)
    assert len(set(example.expressions)) == len(example.boxes) == len(example.kinds) == count
    for text, boxes, kind in zip(example.expressions, example.boxes, example.kinds, strict=True):
        pixels = [tuple(round(edge * image_size, 6) for edge in box) for box in boxes]
        assert sorted(pixels) == sorted(reading(text, things, image_size / 16))
        assert kind == kind_of(text, boxes)


def test_things_do_not_touch():
    for example in scenes("test", 25):
        covered = np.zeros((66, 66), dtype=int)
        for _, (left, top, right, bottom) in seen(open_image(example.image)):
            covered[top : bottom + 2, left : right + 2] += 1  # with two pixels of air
        assert covered.max() == 1


@pytest.fixture(scope="module")
def many():
    return scenes("train", 400)


def test_kinds_are_balanced_and_everything_is_seen(many):
    kinds = Counter(kind for one in many for kind in one.kinds)
    shares = {kind: count / kinds.total() for kind, count in kinds.items()}
    assert shares == pytest.approx(
        {"relation": 5 / 17, "several": 5 / 17, "none": 4 / 17, "attribute": 3 / 17}, abs=0.02
    )
    words = Counter(word for one in many for text in one.expressions for word in text.split())
    assert min(words[word] for word in (*COLORS, *SHAPES, "small", "large")) > 100
    assert min(words[word] for word in ("left", "right", "above", "below")) > 300
    assert min(words[f"{side}most"] for side in ("left", "right", "top", "bottom")) > 80


def test_nothing_is_meant_only_where_one_word_makes_the_difference(many):
    for example in many[:60]:
        things = seen(open_image(example.image))
        for text, kind in zip(example.expressions, example.kinds, strict=True):
            if kind == "none":
                assert any(true_beside(text, things)), text


def true_beside(text, things):
    """Whether each expression that differs from this one in a word, or in the side, means something."""
    sides = ("left of", "right of", "above", "below")
    plurals = [f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES]
    for words in (sides, ("small", "large"), COLORS, SHAPES, plurals):
        for word in words:
            for match in re.finditer(rf"\b{word}\b", text):
                for other in set(words) - {word}:
                    changed = text[: match.start()] + other + text[match.end() :]
                    try:
                        yield len(reading(changed, things, 4)) > 0
                    except (AssertionError, ValueError):  # the rules leave it open
                        yield False


def test_which_it_is_cannot_be_told_from_the_text_alone(many):
    # Every form of expression, and every number of words, is there with and without a meaning.
    forms = Counter()
    for example in many:
        for text, kind in zip(example.expressions, example.kinds, strict=True):
            form = re.sub(rf"\b({'|'.join((*COLORS, *SHAPES, 'shape', 'small', 'large'))})(e?s)?\b ?", "", text)
            forms[re.sub("left of|right of|above|below", "beside", form).strip(), kind == "none"] += 1
    shares = {
        form: forms[form, True] / (count + forms[form, True]) for (form, none), count in forms.items() if not none
    }
    assert set(shares) == {"the", "all", "the beside the", "all beside the"} | {
        f"the {side}most" for side in ("left", "right", "top", "bottom")
    }
    assert 0.04 < min(shares.values()) < max(shares.values()) < 0.4


def test_two_of_three_sides_decide(many):
    decides, of_one_kind = [], 0
    for example in many[:150]:
        things = seen(open_image(example.image))
        for text, kind in zip(example.expressions, example.kinds, strict=True):
            side = re.search(" (left of|right of|above|below) the ", text)
            if kind == "relation" and side:
                alone = set(text[len("the ") : side.start()].split()) - {"shape"}
                landmark = set(text[side.end() :].split()) - {"shape"}
                of_one_kind += any(
                    alone | landmark <= words for words, _ in things
                )  # "the circle left of the red circle"
                decides.append(sum(alone <= words and not landmark <= words for words, _ in things) > 1)
    assert len(decides) > 200 and sum(decides) / len(decides) == pytest.approx(2 / 3, abs=0.07)
    assert of_one_kind > 30


def test_the_same_seed_gives_the_same_scenes_and_fewer_are_the_first():
    content = lambda examples: [(e.image_id, e.expressions, e.boxes, open_image(e.image).tobytes()) for e in examples]
    three = content(scenes("train", 3, seed=1))
    assert content(scenes("train", 2, seed=1)) == three[:2]
    for other in (scenes("train", 3, seed=2), scenes("test", 3, seed=1), scenes("train", 3, 1, image_size=128)):
        assert not {one[1:] for one in content(other)} & {one[1:] for one in three}


def test_they_are_a_data_set():
    examples = scenes("validation", 5)
    assert check_images(examples) == (examples, [])
    dataset = GroundingDataset(examples)
    assert len(dataset) == 5 and len(dataset.texts) == 40
    assert [one.image_id for one in examples] == [f"validation_{number:06d}" for number in range(5)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": "val"}, "split: scenes have 'train', 'validation', 'test', got 'val'"),
        ({"num_images": 0}, "num_images: expected at least 1 .*, got 0"),
        ({"image_size": 32}, "image_size: expected at least 64 .*, got 32"),
        ({"expressions_per_image": 17}, "expressions_per_image: expected at least 1 and at most 16, got 17"),
    ],
)
def test_errors_name_the_argument(wrong, message):
    with pytest.raises(ValueError, match=message):
        scenes(**({"split": "train", "num_images": 1} | wrong))


def test_as_many_expressions_as_are_allowed():
    assert {len(one.expressions) for one in scenes("train", 5, expressions_per_image=16)} == {16}


def test_a_run_draws_as_many_as_it_uses():
    few = read_scenes("validation", image_size=72, most=2)
    assert [one.image_id for one in few] == ["validation_000000", "validation_000001"]
    assert {open_image(one.image).size for one in few} == {(72, 72)}
    assert few[0].expressions == scenes("validation", 1, image_size=72)[0].expressions
