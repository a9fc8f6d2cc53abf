"""Images and texts to be matched: items of shared images, and batches that hold all once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hivilt.data.matching import Matching, MatchingCollator, MatchingDataset
from tiny import make_image, make_processor

COLORS = ("red", "blue", "green")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for color in COLORS:
        make_image(color).save(folder / f"{color}.png")
    return {color: str(folder / f"{color}.png") for color in COLORS}


def matching(paths, colors, texts):
    return Matching(tuple(paths[color] for color in colors), tuple(colors), tuple(texts))


@given(data=st.data(), num_images=st.integers(1, 2))
def test_each_image_and_text_is_there_once_and_pairs_name_them(paths, data, num_images):
    texts = st.sampled_from(["a red circle", "two blue", "the square", "not a shape"])
    one = st.tuples(
        st.lists(st.sampled_from(COLORS), min_size=num_images, max_size=num_images, unique=True),
        st.lists(texts, min_size=2, max_size=2),
    )
    examples = [matching(paths, *drawn) for drawn in data.draw(st.lists(one, min_size=1, max_size=5))]
    dataset, processor = MatchingDataset(examples), make_processor()
    items = [dataset[place] for place in range(len(dataset))]
    assert len({example.image_ids for example in examples}) == len(items)
    batch = MatchingCollator(processor)(items)

    assert sorted(batch["matching_index"].tolist()) == list(range(len(examples)))
    assert len(batch["pixel_values"]) == len({name for example in examples for name in example.image_ids})
    assert len(batch["input_ids"]) == len({text for example in examples for text in example.texts})
    pairs = zip(batch["image_index"], batch["text_index"], strict=True)
    for place in batch["matching_index"].tolist():
        for image in examples[place].images:
            for text in examples[place].texts:
                image_row, text_row = next(pairs)
                alone = processor(images=[image], text=[text], return_tensors="pt")
                assert batch["pixel_values"][image_row].equal(alone["pixel_values"][0])
                tokens = batch["input_ids"][text_row][batch["attention_mask"][text_row].bool()]
                assert tokens.equal(alone["input_ids"][0])
    assert next(pairs, None) is None


def test_examples_of_different_forms_are_refused(paths):
    with pytest.raises(ValueError, match="example 1 has 1 images and 2 texts, the first one 2 and 2"):
        MatchingDataset([matching(paths, colors, ["a", "b"]) for colors in (("red", "blue"), ("red",))])
