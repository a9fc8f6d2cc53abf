"""Calibration: one temperature by which scores are divided, so that of answers given with 80 % about 80 % are right.

Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv 1706.04599): the temperature has the least negative log
likelihood on held-out data. It moves no answer before another.

`logits` are scores `(n, classes)`. `labels` are `(n,)` integers, of a softmax, or soft ones: `(n, classes)` floats in [0, 1],
each of a sigmoid.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

# A temperature lies between these: of scores with nothing wrong among them the best would be 0.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0


def probabilities(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`(n, classes)`: the softmax of the scores with integer labels, their sigmoid with soft ones."""
    return logits.sigmoid() if labels.is_floating_point() else logits.softmax(dim=-1)


def negative_log_likelihood(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean negative log likelihood of labels, see the top of this file; of soft ones, the sum over the classes."""
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(dim=-1).mean().item()
    return F.cross_entropy(logits, labels).item()


def fit_temperature(
    logits: torch.Tensor, labels: torch.Tensor, least: float = MIN_TEMPERATURE, most: float = MAX_TEMPERATURE
) -> float:
    """The temperature by which to divide scores, that of the least negative log likelihood between `least` and `most`.

    It is 1, or the nearest to it, where the scores have every label right: the likelihood would blow them up without end.
    A `ValueError` names scores that are not finite, and a `least` above `most`.
    """
    if not 0 < least <= most:
        raise ValueError(f"least, most: expected 0 < least <= most, got {least} and {most}.")
    if not logits.isfinite().all():
        raise ValueError("logits: expected finite scores, got some that are not.")
    logits = logits.double()
    if labels.is_floating_point():
        right = labels == (logits > 0)
        earned = (labels * logits).sum()
    else:
        right = logits.argmax(dim=-1) == labels
        earned = logits.gather(1, labels[:, None]).sum()
    if right.all():
        return min(max(1.0, least), most)
    low, high = 1 / most, 1 / least
    # The likelihood is concave in the inverse temperature, with `earned - expected` for its slope: halving finds its 0.
    for _ in range(50):
        inverse = math.sqrt(low * high)
        expected = (probabilities(inverse * logits, labels) * logits).sum()
        low, high = (low, inverse) if expected > earned else (inverse, high)
    return min(max(1 / math.sqrt(low * high), least), most)


def expected_calibration_error(
    confidences: torch.Tensor | Sequence[float], scores: torch.Tensor | Sequence[float], num_bins: int = 15
) -> float:
    """Expected calibration error, in [0, 1]: the mean distance of what was promised from what was right, over bins.

    Args:
        confidences: `(n,)` probabilities of what was answered, in [0, 1].
        scores: `(n,)` what the answers earned: 1 for a right and 0 for a wrong one, or between.
        num_bins: how many bins of equal width; a confidence between two belongs to the lower one.
    """
    confidences, scores = (torch.as_tensor(one, dtype=torch.float64).flatten() for one in (confidences, scores))
    if len(confidences) == 0 or len(confidences) != len(scores):
        raise ValueError(
            f"confidences, scores: expected as many of both and one at least, got {len(confidences)} and {len(scores)}."
        )
    bins = ((confidences * num_bins).ceil().long() - 1).clamp(0, num_bins - 1)
    gaps = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins, confidences - scores)
    return (gaps.abs().sum() / len(confidences)).item()


def calibrate(
    logits: torch.Tensor, labels: torch.Tensor, least: float = MIN_TEMPERATURE, most: float = MAX_TEMPERATURE
) -> dict[str, Any]:
    """What `results.json` says of a calibration; arguments and errors as in `fit_temperature`.

    Integer labels below 0 and soft ones that are all zeros are no class: an answer that cannot be right. They count in
    the errors and not in the likelihood; a `ValueError` says that there are no others.

    Returns:
        `temperature`; `ece_before` and `ece_after`, see `expected_calibration_error`, of the best class; `nll_before` and
        `nll_after`; `num`, how many rows there are.
    """
    soft = labels.is_floating_point()
    logits = logits.double().cpu()
    labels = (labels.double() if soft else labels).cpu()
    known = (labels > 0).any(dim=-1) if soft else labels >= 0
    if not known.any():
        raise ValueError(f"labels: expected one of a class at least, got none among {len(labels)}.")
    temperature = fit_temperature(logits[known], labels[known], least, most)
    best = logits.argmax(dim=-1)
    earned = labels.gather(1, best[:, None]).squeeze(1) if soft else best == labels
    found = {"temperature": temperature}
    for name, scaled in (("before", logits), ("after", logits / temperature)):
        confidences = probabilities(scaled, labels).amax(dim=-1)
        found[f"ece_{name}"] = expected_calibration_error(confidences, earned)
        found[f"nll_{name}"] = negative_log_likelihood(scaled[known], labels[known])
    return {**found, "num": len(logits)}


def draw_candidates(
    captions: Sequence[str], image_of_caption: Sequence[int], num_candidates: int = 10
) -> torch.LongTensor | None:
    """For each caption, candidates to tell it from, as a user of zero-shot classification gives an image some texts.

    They are captions of other images, drawn at random and alike at every call, none with the words of a caption of its own
    image: `num_candidates` with the true one, fewer where there are not so many. `image_of_caption` is each one's image.

    Returns:
        `(captions, candidates)` places of captions, the true one first; `None` where a caption has no other.
    """
    own: dict[int, set[str]] = {}
    for caption, image in zip(captions, image_of_caption, strict=True):
        own.setdefault(image, set()).add(caption)
    distinct = list({caption: place for place, caption in enumerate(captions)}.items())
    others = {image: [place for caption, place in distinct if caption not in texts] for image, texts in own.items()}
    count = min([num_candidates - 1, *map(len, others.values())])
    if count < 1:
        return None
    draw = random.Random(0)
    rows = [[place, *draw.sample(others[image], count)] for place, image in enumerate(image_of_caption)]
    return torch.tensor(rows)
