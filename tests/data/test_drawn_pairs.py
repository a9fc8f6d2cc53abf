"""Drawn pairs: that labels are what a reader of text and pixels finds, and that half of what is said cannot tell them."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageOps

from hivilt.data.drawn_pairs import drawn_pairs, read_drawn_pairs
from hivilt.data.reasoning import ReasoningDataset, mirrored
from hivilt.data.tables import check_images, open_image
from scene_reader import seen

# What someone who sees the sentence and one image can reach: on the left and on the right on average, by kind.
ONE_IMAGE = {"one": 0.5, "same": 0.5, "both": 0.75, "neither": 0.75, "more": 0.625}
SHARES = {"one": 8, "more": 8, "same": 4, "both": 4, "neither": 4}


def count(phrase, things):
    """How many of the things a phrase, in the singular or plural, describes."""
    words = phrase.removeprefix("a ").replace("crosses", "cross")
    words = {re.sub("^(circle|square|triangle|shape)s$", r"\1", word) for word in words.split()} - {"shape"}
    assert words
    return sum(words <= own for own, _ in things)


def reading(sentence, left, right):
    """Whether a sentence is true of what is in two images, by the rules of the module, in words of this test."""
    images = {"left": left, "right": right}
    if match := re.fullmatch("(exactly one image shows|both images show|neither image shows) (a .+)", sentence):
        shown = sum(count(match[2], image) > 0 for image in (left, right))
        return shown == {"exactly": 1, "both": 2, "neither": 0}[match[1].split()[0]]
    if match := re.fullmatch("both images have the same number of (.+)", sentence):
        return count(match[1], left) == count(match[1], right)
    if match := re.fullmatch("the (left|right) image shows (a .+)", sentence):
        return count(match[2], images[match[1]]) > 0
    match = re.fullmatch("the (left|right) image has more (.+) than the (left|right) one", sentence)
    assert match[1] != match[3]
    return count(match[2], images[match[1]]) > count(match[2], images[match[3]])


def scene_of(image, known={}):  # noqa: B006, images are read once
    if image not in known:
        known[image] = seen(open_image(image))
    return known[image]


@pytest.fixture(scope="module")
def many():
    return drawn_pairs("test", 60)


@pytest.mark.parametrize("image_size", [64, 100])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=6, deadline=None)
def test_labels_are_what_a_reader_of_text_and_pixels_finds(seed, image_size):
    statements = drawn_pairs("train", 2, seed, image_size)
    assert len(statements) == 52 and {len(one.images) for one in statements} == {2}
    for one in statements:
        assert one.label == str(reading(one.sentence, *map(scene_of, one.images))), one
    assert {open_image(image).size for one in statements for image in one.images} == {(image_size, image_size)}


@given(seed=st.integers(0, 2**32))
@settings(max_examples=6, deadline=None)
def test_a_mirrored_pair_keeps_its_label_with_its_words_exchanged(seed):
    changed = 0
    for one in drawn_pairs("train", 2, seed):
        turned = mirrored(one)
        left, right = (seen(ImageOps.mirror(open_image(image))) for image in turned.images)
        assert str(reading(turned.sentence, left, right)) == turned.label == one.label
        says_side = re.search("left|right", one.sentence) is not None
        assert (turned.image_ids == one.image_ids[::-1]) == (turned.sentence != one.sentence) == says_side
        changed += says_side
        if says_side and one.kind == "more":  # with the words or the order alone it would be another statement
            assert str(reading(turned.sentence, right, left)) != one.label
            assert str(reading(one.sentence, left, right)) != one.label
    assert changed == 32  # eight that say more, and of the kind side all


def test_images_hold_four_to_six_things_however_many_are_counted(many):
    totals = {image: len(scene_of(image)) for one in many for image in one.images}
    assert set(totals.values()) == {4, 5, 6}
    by_count = {}
    for one in many:
        if one.kind == "more":
            phrase = re.search("more (.+) than", one.sentence)[1]
            for image in one.images:
                by_count.setdefault(count(phrase, scene_of(image)), {})[image] = totals[image]
    assert sorted(by_count) == [0, 1, 2, 3, 4]
    means = [sum(found.values()) / len(found) for found in by_count.values()]
    assert max(means) - min(means) < 0.7


def best_guess(statements, seen_of):
    """How often the best guess by what is seen of a statement is right on these very statements, by kind: no predictor from that
    alone, whatever it has learned, can be right more often."""
    labels = {}
    for one in statements:
        labels.setdefault((one.kind, seen_of(one)), Counter())[one.label] += 1
    right, all_of = Counter(), Counter()
    for (kind, _), counts in labels.items():
        right[kind] += max(counts.values())
        all_of[kind] += counts.total()
    return {kind: right[kind] / all_of[kind] for kind in all_of} | {"all": right.total() / all_of.total()}


def test_neither_the_sentence_nor_one_image_tells_the_label(many):
    assert set(best_guess(many, lambda one: one.sentence).values()) == {0.5}
    assert set(best_guess(many, lambda one: one.group).values()) == {0.5}
    left, right = (best_guess(many, lambda one, side=side: (one.sentence, one.image_ids[side])) for side in (0, 1))
    for kind, share in ONE_IMAGE.items():
        assert (left[kind] + right[kind]) / 2 == pytest.approx(share)
        assert abs(left[kind] - right[kind]) < 0.2 and (left[kind] == share or kind in ("both", "neither"))
    assert max(left["all"], right["all"]) < 0.63


def test_what_one_image_holds_tells_no_more_than_the_image(many):
    """With the sentence's form and how much of what it names is in one image, which holds for images that were never seen."""
    for side in (0, 1):

        def facts(one, side=side):
            (phrase,) = re.findall("(?:a |of |more )([a-z ]+?)(?= than|$)", one.sentence)
            return count(phrase, scene_of(one.images[side])), *re.findall("left|right", one.sentence)

        found = best_guess(many, facts)
        for kind, share in ONE_IMAGE.items():
            # Some facts are seen in few statements, of which most may have one label by chance.
            assert found[kind] <= share + 0.1, kind


def test_sets_to_train_on_say_more_of_one_image_of_a_pair():
    """As often truly as falsely, and nothing of it by the sentence, nor by the other image."""
    train = drawn_pairs("train", 20)
    side = [one for one in train if one.kind == "side"]
    assert (len(train), len(side)) == (20 * 26, 20 * 12)
    of_test = [one.sentence for one in drawn_pairs("test", 20)]
    assert not {one.sentence for one in side} & {*of_test}
    named, other = [], []
    for one in side:
        place = 0 if one.sentence.startswith("the left") else 1
        named.append((one.sentence, one.image_ids[place], one.label))
        other.append((one.sentence, one.image_ids[1 - place]))
    assert len({fact[:2] for fact in named}) == len(set(named))  # the named image tells all
    assert best_guess(side, lambda one: one.sentence)["side"] == 0.5
    assert best_guess(side, dict(zip(side, other, strict=True)).__getitem__)["side"] == 0.5


def test_what_is_learned_first_adds_up():
    """Of "one", "both" and "neither" a sum over the images tells the label in the first stage, which it cannot in the whole."""
    of_stage = {stage: [one for one in drawn_pairs("train", 20) if one.stage == stage] for stage in (0, 1, None)}
    assert {one.kind for one in of_stage[0]} == {"side"}
    assert {one.kind for one in of_stage[None]} == {"one", "both", "neither"}
    sums = {}
    for one in [*of_stage[None], *of_stage[1]]:
        if one.kind in ("one", "both", "neither"):
            phrase = one.sentence[one.sentence.index(" a ") + 1 :]
            shown = sum(count(phrase, scene_of(image)) > 0 for image in one.images)
            sums.setdefault((one.kind, one.stage), set()).add((shown, one.label))
    assert sums == {
        ("one", None): {(1, "True"), (2, "False")},
        ("one", 1): {(0, "False")},
        ("both", None): {(2, "True"), (1, "False")},
        ("neither", None): {(0, "True"), (1, "False")},
    }
    assert Counter(one.kind for one in of_stage[1]) == {"one": 20, "same": 40, "more": 80}


def test_order_tells_where_sides_are_named_and_nowhere_else(many):
    unordered = best_guess(many, lambda one: (one.sentence, tuple(sorted(one.image_ids))))
    assert {kind for kind, share in unordered.items() if share == 0.5} == {"more"}
    assert {share for kind, share in unordered.items() if kind not in ("more", "all")} == {1}


def test_kinds_labels_and_words(many):
    kinds = Counter(one.kind for one in many)
    assert kinds == {kind: 30 * share for kind, share in SHARES.items()}
    assert Counter(one.label for one in many) == {"True": 420, "False": 420}
    words = Counter(word for one in many for word in one.sentence.split())
    for plural in ("circles", "squares", "triangles", "crosses", "shapes"):
        assert words[plural] > 3
    for word in ("red", "green", "blue", "yellow", "purple", "gray", "circle", "square", "triangle", "cross", "shape"):
        assert words[word] > 10
    groups = {}
    for one in many:
        groups.setdefault(one.group, []).append(one)
    for group in groups.values():
        assert len({one.sentence for one in group}) == len({one.kind for one in group}) == 1
        assert len({one.image_ids for one in group}) == len(group)
        assert len(group) == {"both": 2, "neither": 2, "more": 8}.get(group[0].kind, 4)


def test_sets_share_no_image_and_use_each_several_times(many):
    by_set = {}
    for one in many:
        by_set.setdefault(one.group.rpartition("_")[0], set()).update(one.image_ids)
    images = [image for ids in by_set.values() for image in ids]
    assert len(images) == len(set(images)) == 330
    pairs = {image: set() for image in images}
    for one in many:
        for image in one.image_ids:
            pairs[image].add(one.image_ids)
    assert min(map(len, pairs.values())) >= 2
    # One item each, so that every image is encoded once.
    assert len(ReasoningDataset(many)) == 60


def test_the_same_seed_gives_the_same_and_fewer_are_the_first():
    content = lambda statements: [
        (*one._replace(images=()), *(open_image(image).tobytes() for image in one.images)) for one in statements
    ]
    three = content(drawn_pairs("train", 3, seed=1))
    assert content(drawn_pairs("train", 2, seed=1)) == three[:52]
    pixels = lambda statements: {one[-1] for one in statements}
    for other in (
        drawn_pairs("train", 3, seed=2),
        drawn_pairs("test", 3, seed=1),
        drawn_pairs("train", 3, 1, image_size=128),
    ):
        assert not pixels(content(other)) & pixels(three)


def test_a_run_draws_as_many_as_it_uses():
    few = read_drawn_pairs("validation", image_size=72, most=21)
    assert len(few) == 21 and few[0].statement_id == "validation_00000_00"
    assert {open_image(image).size for image in few[0].images} == {(72, 72)}
    assert [one.sentence for one in few] == [one.sentence for one in drawn_pairs("validation", 2, image_size=72)[:21]]
    assert len({one.statement_id for one in few}) == 21
    whole = read_drawn_pairs("validation")
    assert len(whole) == 1008 and check_images(whole) == (whole, [])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": "val"}, "split: drawn pairs have 'train', 'validation', 'test', got 'val'"),
        ({"num_sets": 0}, "num_sets: expected at least 1, got 0"),
        ({"image_size": 32}, "image_size: expected at least 64, got 32"),
    ],
)
def test_errors_name_the_argument(wrong, message):
    with pytest.raises(ValueError, match=message):
        drawn_pairs(**({"split": "train", "num_sets": 1} | wrong))
