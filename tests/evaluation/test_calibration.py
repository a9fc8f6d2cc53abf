"""Temperatures and calibration errors against plain float64 references."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hivilt.evaluation.calibration import (
    calibrate,
    draw_candidates,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
)

GRID = np.exp(np.linspace(np.log(0.05), np.log(20), 4001))


def softmax_nll(logits, labels):
    shifted = logits - logits.max(1, keepdims=True)
    return float(np.mean(np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]))


def sigmoid_nll(logits, labels):
    return float((np.logaddexp(0, logits) - labels * logits).sum(1).mean())


def draw(seed, soft, n=60, classes=4):
    random = np.random.default_rng(seed)
    logits = random.normal(0, random.uniform(0.3, 9), (n, classes))
    # Labels that the scores know something of, and err about.
    noisy = logits / random.uniform(0.5, 6) + random.gumbel(0, 1, (n, classes))
    labels = (random.integers(0, 4, (n, classes)) / 3.0) * (noisy > 0) if soft else noisy.argmax(1)
    return logits, labels


@given(st.integers(0, 2**20), st.booleans())
@settings(max_examples=10)
def test_the_temperature_has_the_least_likelihood_loss_of_a_fine_grid(seed, soft):
    logits, labels = draw(seed, soft)
    reference = sigmoid_nll if soft else softmax_nll
    found = fit_temperature(torch.tensor(logits), torch.tensor(labels))
    best = min(reference(logits / t, labels) for t in GRID)
    assert reference(logits / found, labels) <= best + 1e-9
    assert negative_log_likelihood(torch.tensor(logits), torch.tensor(labels)) == pytest.approx(
        reference(logits, labels)
    )


def test_scores_that_were_blown_up_are_brought_back():
    """Labels drawn from the softmax itself: the temperature of the scores times 3 is 3."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (20_000, 5))
    labels = torch.tensor((logits + random.gumbel(0, 1, logits.shape)).argmax(1))
    assert fit_temperature(torch.tensor(3 * logits), labels) == pytest.approx(3, rel=0.03)
    found = calibrate(torch.tensor(3 * logits), labels)
    assert found["ece_before"] > 0.1 and found["ece_after"] < 0.015 and found["nll_after"] < found["nll_before"]
    assert found["num"] == 20_000


@pytest.mark.parametrize("soft", [False, True])
def test_scores_with_nothing_wrong_are_not_blown_up(soft):
    labels = torch.tensor([0, 2, 1])
    logits = 4 * torch.eye(3)[labels] - 1
    assert fit_temperature(logits, torch.eye(3)[labels] if soft else labels) == 1
    assert fit_temperature(logits, torch.eye(3)[labels] if soft else labels, least=1.5) == 1.5


def test_scores_that_know_nothing_are_flattened_no_further_than_allowed():
    logits, labels = torch.tensor([[5.0, 0.0], [5.0, 0.0]]), torch.tensor([1, 1])
    assert fit_temperature(logits, labels) == pytest.approx(20)
    assert fit_temperature(logits, labels, most=7) == pytest.approx(7)


def test_calibration_error_of_a_table_worked_by_hand():
    # Bins of a half: (0, 0.5] holds 0.5 right and 0.2 wrong, gap 0.3 of 2; (0.5, 1] holds 0.9 and 1.0, one right, gap 0.9 of 2.
    assert expected_calibration_error([0.5, 0.2, 0.9, 1.0], [1, 0, 1, 0], num_bins=2) == pytest.approx((0.3 + 0.9) / 4)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=40), st.integers(1, 20))
def test_calibration_error_is_that_of_a_plain_reference(pairs, num_bins):
    expected = 0.0
    for number in range(num_bins):
        inside = [(c, s) for c, s in pairs if number < c * num_bins <= number + 1 or (number == 0 and c == 0)]
        if inside:
            gap = np.mean([c for c, _ in inside]) - np.mean([s for _, s in inside])
            expected += abs(gap) * len(inside) / len(pairs)
    found = expected_calibration_error(*zip(*pairs, strict=True), num_bins=num_bins)
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_question_whose_answer_is_no_class_counts_in_the_error_alone():
    logits, labels = map(torch.tensor, draw(3, soft=False))
    unknown = torch.cat([labels, torch.full((10,), -100)])
    found, alone = calibrate(torch.cat([logits, logits[:10]]), unknown), calibrate(logits, labels)
    assert found["temperature"] == alone["temperature"] and found["nll_after"] == alone["nll_after"]
    assert found["num"] == len(labels) + 10
    confidences = (torch.cat([logits, logits[:10]]) / found["temperature"]).softmax(-1)
    right = confidences.argmax(-1) == unknown
    assert found["ece_after"] == pytest.approx(expected_calibration_error(confidences.amax(-1), right.double()))


def test_candidates_are_other_images_captions_in_other_words():
    captions = ["a dog", "a cat", "a dog", "a cow", "a hen", "a cat"]
    image_of_caption = [0, 1, 2, 3, 4, 4]
    rows = draw_candidates(captions, image_of_caption, num_candidates=3)
    assert rows[:, 0].tolist() == list(range(6)) and rows.shape == (6, 3)
    own = {0: {"a dog"}, 1: {"a cat"}, 2: {"a dog"}, 3: {"a cow"}, 4: {"a hen", "a cat"}}
    for row in rows.tolist():
        words = [captions[place] for place in row[1:]]
        assert len(set(words)) == 2 and not set(words) & own[image_of_caption[row[0]]]
    # An image has but two captions of others in other words, so nobody gets more.
    assert draw_candidates(captions, image_of_caption, num_candidates=10).shape == (6, 3)
    assert draw_candidates(["a dog", "a dog"], [0, 1]) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expected_calibration_error([], []), "one at least, got 0 and 0"),
        (lambda: expected_calibration_error([0.5], [1, 0]), "as many of both"),
        (lambda: fit_temperature(torch.tensor([[float("nan"), 0]]), torch.tensor([0])), "logits: expected finite"),
        (lambda: fit_temperature(torch.zeros(1, 2), torch.tensor([0]), least=3, most=2), "least, most"),
        (lambda: calibrate(torch.zeros(2, 2), torch.tensor([-100, -100])), "labels: expected one of a class"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
