"""Whether an image is anything like those that a model was trained on, by what its vision encoder sees at the finest level.

Features of an image are the mean and standard deviation of each channel of the finest feature map: colors, edges and
textures, which tell drawings from photographs. Coarser levels keep what training asked for and drop the rest, so there both
look alike. Each feature has its usual range in training; an image is as far out as its feature that is farthest out of its range.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from hivilt.modeling_hivilt import HiViLTPreTrainedModel
from hivilt.processing_hivilt import HiViLTProcessor

# Shares of the training images below and above a feature's usual range, and of held-out images below the limit.
_OUTSIDE, _INSIDE = 0.005, 0.999
_RANGE = ("low", "middle", "high")
# With fewer held-out images one in `n + 1` of those like them would pass for unfamiliar.
MIN_IMAGES = 30
# A channel that is the same in all training images still has a range: this share of the others' mean.
_LEAST_SPREAD = 0.01


def image_features(feature_maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """What familiarity is judged by, `(B_i, 2 * channels)` float32: means of channels, then their standard deviations.

    `feature_maps` are what `get_feature_maps` of a model gave, tensors `(B_i, height, width, channels)`, fine to coarse.
    """
    positions = feature_maps[0].flatten(1, 2).float()
    return torch.cat([positions.mean(dim=1), positions.std(dim=1, correction=0)], dim=1)


def measure_familiarity(
    train: torch.Tensor, held_out: torch.Tensor, strange: torch.Tensor | None = None
) -> dict[str, Any] | None:
    """What training images look like to a model, as `results.json` keeps it.

    Args:
        train, held_out: `image_features` of images that it was trained on, and of others of the same kind, `(n, F)`.
        strange: likewise of images that must not pass, such as `noise`.

    Returns:
        `low`, `middle` and `high`: lists of `F` numbers, between the first and the last of which 99 % of the training
        images lie; `limit`, below which 99.9 % of the held-out images' distances lie; `num_train` and `num_held_out`.
        `None` where one of these is below 30, too few to tell, where all images are the same, or where half of the strange
        ones pass: then these features do not tell what is familiar to this model, and nothing is better than that.
    """
    if min(len(train), len(held_out)) < MIN_IMAGES:
        return None
    shares = torch.tensor([_OUTSIDE, 0.5, 1 - _OUTSIDE], dtype=torch.float64)
    rows = train.double().cpu().quantile(shares, dim=0)
    ranges = {name: [_rounded(one) for one in row.tolist()] for name, row in zip(_RANGE, rows, strict=True)}
    limit = _distances(ranges, held_out).quantile(_INSIDE).item()
    if not 0 < limit < math.inf:
        return None
    if strange is not None and _distances(ranges, strange).median() <= limit:
        return None
    return {**ranges, "limit": _rounded(limit), "num_train": len(train), "num_held_out": len(held_out)}


def unfamiliarity(familiarity: Mapping[str, Any], feature_maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """How far images are from those of training, `(B_i,)` float64: 1 where an image is just as far out as those that were
    held out, more where it is farther, NaN where its features are.

    `familiarity` is what `measure_familiarity` gave; a `ValueError` refuses maps of a model with other channels.
    """
    return _distances(familiarity, image_features(feature_maps)) / familiarity["limit"]


def is_familiar(familiarity: Mapping[str, Any], feature_maps: Sequence[torch.Tensor]) -> torch.BoolTensor:
    """Whether `unfamiliarity` is at most 1, `(B_i,)`: of images like those of training, for all but one in a thousand."""
    return unfamiliarity(familiarity, feature_maps) <= 1


def noise() -> list[Image.Image]:
    """Images like none that anybody trains on: each pixel a color of its own, the same at every call."""
    return [Image.fromarray(pixels) for pixels in np.random.default_rng(0).integers(0, 256, (8, 256, 256, 3), np.uint8)]


@torch.no_grad()
def features_of_images(
    model: HiViLTPreTrainedModel, processor: HiViLTProcessor, images: Sequence[Any], batch_size: int = 32
) -> torch.Tensor:
    """`image_features` of images, as the processor takes them, `(n, F)` on the CPU; the model is in evaluation mode."""
    model.eval()
    found = []
    for start in range(0, len(images), batch_size):
        inputs = processor(images=list(images[start : start + batch_size]), return_tensors="pt")
        found.append(image_features(model.get_feature_maps(inputs["pixel_values"].to(model.device))).cpu())
    return torch.cat(found)


def _distances(familiarity: Mapping[str, Any], features: torch.Tensor) -> torch.Tensor:
    low, middle, high = (torch.tensor(familiarity[name], dtype=torch.float64) for name in _RANGE)
    if features.shape[1] != len(middle):
        raise ValueError(
            f"feature_maps: expected the {len(middle) // 2} channels that familiarity was measured on, got "
            f"{features.shape[1] // 2}; measure it on this model."
        )
    features = features.double().cpu()
    least = _LEAST_SPREAD * (high - low).mean() / 2
    above = (features - middle) / (high - middle).clamp(min=least)
    below = (middle - features) / (middle - low).clamp(min=least)
    return torch.maximum(above, below).amax(dim=1)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
