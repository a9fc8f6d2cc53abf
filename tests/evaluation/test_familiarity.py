"""Images of training pass for familiar, others do not."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hivilt import HiViLTForQuestionAnswering, HiViLTForRetrieval
from hivilt.evaluation.familiarity import (
    features_of_images,
    image_features,
    is_familiar,
    measure_familiarity,
    unfamiliarity,
)
from tiny import VISION_CONFIGS, make_image, make_model, make_processor


def make_maps(count, channels=3, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(count, 5, 4, channels, generator=generator), torch.zeros(count, 2, 2, 7))


def test_features_are_mean_and_spread_of_each_channel_of_the_finest_map():
    maps = make_maps(6)
    finest = maps[0].double().numpy()
    expected = np.concatenate([finest.mean((1, 2)), finest.std((1, 2))], axis=1)
    np.testing.assert_allclose(image_features(maps).numpy(), expected, atol=1e-6)


@given(st.integers(30, 80), st.integers(30, 80), st.integers(0, 2**16))
def test_distances_are_those_of_a_plain_reference(num_train, num_held_out, seed):
    train, held_out = (
        image_features(make_maps(num_train, seed=seed)),
        image_features(make_maps(num_held_out, seed=seed + 1)),
    )
    found = json.loads(json.dumps(measure_familiarity(train, held_out)))
    low, middle, high = np.quantile(train.double().numpy(), [0.005, 0.5, 0.995], axis=0)
    assert np.allclose([found["low"], found["middle"], found["high"]], [low, middle, high], rtol=1e-4)

    def distance(row):
        out = [
            (v - m) / (h - m) if v > m else (m - v) / (m - lo)
            for v, lo, m, h in zip(row, low, middle, high, strict=True)
        ]
        return max(out)

    limit = np.quantile([distance(row) for row in held_out.double().numpy()], 0.999)
    assert found["limit"] == pytest.approx(limit, rel=1e-3)
    other = make_maps(5, seed=seed + 2, scale=1.5)
    expected = [distance(row) / limit for row in image_features(other).double().numpy()]
    np.testing.assert_allclose(unfamiliarity(found, other), expected, rtol=2e-3)
    assert is_familiar(found, other).tolist() == (unfamiliarity(found, other) <= 1).tolist()


def test_a_channel_that_training_never_moves_tells_an_image_that_moves_it():
    train, held_out = make_maps(200), make_maps(200, seed=1)
    for maps in (train, held_out):
        maps[0][..., 1] = 0.25
    found = measure_familiarity(image_features(train), image_features(held_out))
    lit = make_maps(4, seed=2)
    assert not is_familiar(found, lit).any()
    lit[0][..., 1] = 0.25 + 1e-6  # another machine's last bits
    assert is_familiar(found, lit).all()


def test_an_image_whose_features_are_not_finite_is_not_familiar():
    found = measure_familiarity(image_features(make_maps(40)), image_features(make_maps(40, seed=1)))
    broken = make_maps(2, seed=2)
    broken[0][0, 0, 0, 0] = float("nan")
    assert is_familiar(found, broken).tolist() == [False, True]


@pytest.mark.parametrize(("num_train", "num_held_out"), [(29, 500), (500, 29), (0, 0)])
def test_too_few_images_tell_nothing(num_train, num_held_out):
    assert measure_familiarity(torch.zeros(num_train, 6), torch.zeros(num_held_out, 6)) is None


def test_images_that_are_all_the_same_tell_nothing():
    one = image_features(make_maps(1)).expand(40, -1)
    assert measure_familiarity(one, one) is None
    assert measure_familiarity(image_features(make_maps(40)), one) is not None


def test_another_models_maps_are_refused():
    found = measure_familiarity(image_features(make_maps(40)), image_features(make_maps(40, seed=1)))
    with pytest.raises(ValueError, match="feature_maps: expected the 3 channels .* got 4"):
        is_familiar(found, make_maps(2, channels=4))


def noisy(seed):
    return np.random.default_rng(seed).integers(0, 256, (23, 31, 3), dtype=np.uint8)


def test_nothing_is_kept_where_noise_passes_for_familiar():
    train, held_out = image_features(make_maps(40)), image_features(make_maps(40, seed=1))
    assert measure_familiarity(train, held_out, strange=held_out[:9]) is None
    assert measure_familiarity(train, held_out, strange=held_out[:9] + 100) == measure_familiarity(train, held_out)


@pytest.mark.parametrize(
    ("vision", "model_class"),
    [*((vision, HiViLTForQuestionAnswering) for vision in VISION_CONFIGS), ("clip", HiViLTForRetrieval)],
)
def test_every_encoder_tells_noise_from_plain_drawings(vision, model_class):
    """Reddish rectangles with a dark corner against noise of all colors, with untrained weights."""
    model, processor = make_model(model_class, vision=vision), make_processor()
    draws = np.random.default_rng(0).integers((150, 0, 0), (256, 60, 60), (130, 3))
    drawings = [make_image(tuple(map(int, color))) for color in draws]
    features = features_of_images(model, processor, drawings)
    found = measure_familiarity(features[:60], features[60:120])
    pixels = processor(images=[*drawings[120:], *map(noisy, range(10))], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        said = is_familiar(found, model.get_feature_maps(pixels))
    assert said[:10].sum() >= 9 and not said[10:].any()
