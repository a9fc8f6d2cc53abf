"""Statements made of captions: true and false by the rule, and balanced as those about drawn pairs are."""

from collections import Counter

import pytest

from caption_miniatures import make_caption_miniature
from hivilt.data.captions import CaptionedImage
from hivilt.data.flickr8k_pairs import CONCEPTS, flickr8k_rows, pairs_of_captioned, shows
from hivilt.data.reasoning import ReasoningDataset

DOG, MAN = (next(concept for concept in CONCEPTS if concept.text == text) for text in ("a dog", "a man"))


@pytest.mark.parametrize(
    ("captions", "dog", "man"),
    [
        (["A dog runs .", "Two Dogs", "the dog", "it runs", "a man"], True, None),
        (
            ["A dog runs .", "Two dogs", "it", "it runs", "grass"],
            None,
            False,
        ),  # two are too few to say, one too many to deny
        (["an animal", "grass", "grass", "grass", "grass"], None, False),  # left open
        (
            ["A man", "men", "a man walks", "a player", "hotdogs"],
            False,
            True,
        ),  # said, whatever else is; and no part of a word
        (["a player", "grass", "grass", "grass", "grass"], False, None),
    ],
)
def test_the_rule(captions, dog, man):
    assert [shows(captions, concept) for concept in (DOG, MAN)] == [dog, man]


def captioned(text, count, start):
    return [CaptionedImage(f"{start + n}.jpg", f"{start + n}.jpg", (text,) * 5) for n in range(count)]


@pytest.fixture
def images():
    """Enough for three sets of dogs and water."""
    parts = {"a dog on a road": 7, "water in a bucket": 6, "a dog in the water": 2, "an empty room": 5}
    found = []
    for text, count in parts.items():
        found += captioned(text, count, len(found))
    return found


def test_statements_are_what_the_captions_say(images):
    statements = pairs_of_captioned("test", images)
    shown = {image.image_id: image.captions[0] for image in images}
    assert len(statements) == 3 * 16 and {one.label for one in statements} == {"True", "False"}
    for one in statements:
        left, right = ([word in shown[image_id] for image_id in one.image_ids] for word in ("dog", "water"))
        has = {"a dog": left, "water": right}
        (text,) = [text for text in ("a dog", "water") if text in one.sentence]
        expected = {
            "one": sum(has[text]) == 1,
            "both": all(has[text]),
            "neither": not any(has[text]),
        }
        assert one.label == str(expected[one.kind]), one


def test_no_image_is_in_two_sets_and_each_sentence_is_as_often_true(images):
    statements = pairs_of_captioned("train", images)
    assert Counter(one.kind for one in statements)["side"] == 3 * 16
    groups = {}
    for one in statements:
        groups.setdefault(one.group, []).append(one)
    assert all(len({one.sentence for one in own}) == 1 for own in groups.values())
    assert all(
        Counter(one.label for one in own) == {"True": len(own) / 2, "False": len(own) / 2} for own in groups.values()
    )
    assert len(ReasoningDataset(statements)) == 3  # sets share no image
    assert pairs_of_captioned("train", images) == statements != pairs_of_captioned("train", images, seed=1)


def test_as_a_benchmark_it_reads_the_files_of_flickr8k(tmp_path):
    make_caption_miniature("flickr8k", tmp_path)
    for split in ("train", "val", "test"):
        assert flickr8k_rows(tmp_path, split) == []  # too few images for a set
