"""Fused similarities of many pairs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hivilt import HiViLTForRetrieval
from hivilt.fusion_hivilt import map_states
from hivilt.search.scoring import score_pairs, take_texts
from tiny import IMAGE_SIZE, make_model, make_processor

TEXTS = ["red circle", "is there a blue square in the image?", "what color is the shape?", "two", "a red and blue"]
MODEL = make_model(HiViLTForRetrieval, weight_scale=8.0)


def encode_texts(model, texts):
    with torch.no_grad():
        return model.encode_texts(**make_processor()(text=texts, return_tensors="pt"))


def encode_images(model, pixel_values):
    with torch.no_grad():
        return model.encode_images(pixel_values)


def pixels(number, seed=0):
    return torch.randn(number, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


# One big batch of each, and the same rows in batches of their own; texts then are of different lengths.
IMAGES, TEXT_STATES = encode_images(MODEL, pixels(6)), encode_texts(MODEL, TEXTS)
IMAGE_BATCHES = [encode_images(MODEL, part) for part in pixels(6).split([1, 3, 2])]
TEXT_BATCHES = [encode_texts(MODEL, TEXTS[:2]), encode_texts(MODEL, TEXTS[2:4]), encode_texts(MODEL, TEXTS[4:])]


def assert_same_states(states, expected):
    for name in ("global_state", "pooled_state", "level_states", "projections", "attention_mask"):
        value, wanted = states.get(name), expected.get(name)
        assert (value is None) == (wanted is None)
        for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (value, wanted)), strict=True):
            assert one is other or torch.allclose(one.float(), other.float(), atol=1e-4), name


class TestTakeTexts:
    @given(st.lists(st.integers(0, 4), min_size=1, max_size=9))
    @settings(max_examples=30, deadline=None)
    def test_they_equal_rows_of_one_batch_but_for_padding(self, index):
        index = torch.tensor(index, dtype=torch.long)
        taken, wanted = take_texts(TEXT_BATCHES, index), map_states(lambda x: x[index], TEXT_STATES)
        length = taken.attention_mask.shape[1]
        assert not wanted.attention_mask[:, length:].any()
        assert torch.equal(taken.attention_mask, wanted.attention_mask[:, :length])
        mask = taken.attention_mask[:, :, None]

        def unpadded(x):
            return x[:, :length] * mask if x.dim() == 3 else x[:, :length] if x.dtype == torch.bool else x

        assert_same_states(map_states(unpadded, taken), map_states(unpadded, wanted))

    def test_they_are_padded_no_further_than_needed_and_with_zeros(self):
        lengths = [batch.attention_mask.shape[1] for batch in TEXT_BATCHES]
        assert len(set(lengths)) == 3
        assert take_texts(TEXT_BATCHES, torch.tensor([3])).attention_mask.shape[1] == lengths[1]
        both = take_texts(TEXT_BATCHES, torch.tensor([0, 4]))
        assert both.attention_mask.shape[1] == lengths[0] > lengths[2]
        assert not both.attention_mask[1, lengths[2] :].any()
        assert not both.level_states[0][1, lengths[2] :].any()


class TestScorePairs:
    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=25), st.integers(1, 8))
    @settings(max_examples=20, deadline=None)
    def test_equals_the_scores_of_one_batch(self, pairs, batch_size):
        images, texts = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
        scores = score_pairs(MODEL, IMAGE_BATCHES, TEXT_BATCHES, images, texts, batch_size)
        assert scores.shape == (len(pairs),) and scores.dtype == torch.float32
        if pairs:
            with torch.no_grad():
                wanted = MODEL.score(IMAGES, TEXT_STATES, images, texts)
            torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=0)

    def test_a_pair_is_fused_once(self, monkeypatch):
        fused = []
        score = MODEL.score
        monkeypatch.setattr(MODEL, "score", lambda *a: fused.append(len(a[2])) or score(*a))
        index = torch.tensor([4, 0, 4, 4, 0])
        scores = score_pairs(MODEL, IMAGE_BATCHES, TEXT_BATCHES, index, index.clamp(max=3))
        assert sum(fused) == 2
        assert scores[0] == scores[2] == scores[3] != scores[1] == scores[4]

    @pytest.mark.parametrize("fusion", [{"use_local_fusion": False}, {"use_global_fusion": False}, {"fusion_top_k": 2}])
    def test_ablations(self, fusion):
        model = make_model(HiViLTForRetrieval, weight_scale=8.0, **fusion)
        images, texts = [encode_images(model, pixels(3))], [encode_texts(model, [text]) for text in TEXTS]
        image_index, text_index = torch.cartesian_prod(torch.arange(3), torch.arange(5)).unbind(1)
        scores = score_pairs(model, images, texts, image_index, text_index)
        with torch.no_grad():
            wanted = model.score(images[0], encode_texts(model, TEXTS), image_index, text_index)
        torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=0)

    def test_bad_arguments(self):
        none, two = torch.tensor([], dtype=torch.long), torch.tensor([0, 1])
        for batches, index, message in [
            ([], two, "image_batches: is empty"),
            (IMAGE_BATCHES, torch.tensor([6, 6]), r"`image_index` must lie in 0..5 for 6 images; got \[6, 6\]"),
            (IMAGE_BATCHES, torch.tensor([-1, 0]), "must lie in 0..5"),
            (IMAGE_BATCHES, torch.tensor([[0]]), "must be a vector of integers"),
            (IMAGE_BATCHES, torch.tensor([0.5, 1]), "must be a vector of integers"),
        ]:
            with pytest.raises(ValueError, match=message):
                score_pairs(MODEL, batches, TEXT_BATCHES, index, two)
        with pytest.raises(ValueError, match="got 0 images and 2 texts"):
            score_pairs(MODEL, IMAGE_BATCHES, TEXT_BATCHES, none, two)
        with pytest.raises(ValueError, match="`text_index` must lie in 0.."):
            score_pairs(MODEL, IMAGE_BATCHES, TEXT_BATCHES, two, torch.tensor([0, 5]))
        with pytest.raises(ValueError, match="batch_size: got 0"):
            score_pairs(MODEL, IMAGE_BATCHES, TEXT_BATCHES, two, two, batch_size=0)
        with pytest.raises(ValueError, match=r"call model.eval\(\)"):
            score_pairs(make_model(HiViLTForRetrieval).train(), IMAGE_BATCHES, TEXT_BATCHES, two, two)
