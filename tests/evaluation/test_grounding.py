"""IoU against counted pixels, matching against all permutations, and the measures against tables worked by hand."""

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hivilt.evaluation.grounding import grounding_scores, iou, match_boxes, phrase_recall

# Two boxes (left, top, width, height), and their IoU.
PAIRS = [
    ((0, 0, 10, 10), (0, 0, 10, 10), 1),
    ((0, 0, 10, 10), (5, 0, 10, 10), 0.333333),
    ((0, 0, 10, 10), (0, 0, 10, 5), 0.5),
    ((0, 0, 10, 10), (2, 2, 8, 8), 0.64),
    ((0, 0, 10, 10), (3, 1, 10, 10), 0.459854),
    ((0, 0, 10, 20), (0, 5, 10, 20), 0.6),
    ((0, 0, 100, 50), (33, 0, 100, 50), 0.503759),
    ((0, 0, 4, 4), (10, 10, 4, 4), 0),
]
SIDE = 8


def corners(box):
    left, top, width, height = box
    return (left, top, left + width, top + height)


def predicted(*boxes, scores=None):
    return {"boxes": list(boxes), "scores": [0.9] * len(boxes) if scores is None else scores}


@st.composite
def boxes(draw):
    left, top = draw(st.integers(0, SIDE - 1)), draw(st.integers(0, SIDE - 1))
    return (left, top, draw(st.integers(left + 1, SIDE)), draw(st.integers(top + 1, SIDE)))


@st.composite
def expressions(draw, smallest=0):
    """A prediction and its true boxes; most predicted boxes are true ones, moved a little."""
    true = draw(st.lists(boxes(), min_size=smallest, max_size=4))
    found = []
    for box in draw(st.permutations(true)) + draw(st.lists(boxes(), max_size=1)):
        left, top, right, bottom = (place + draw(st.sampled_from([0, 0, 0, 1])) for place in box)
        if left < right and top < bottom and draw(st.integers(0, 9)):
            found.append((left, top, right, bottom))
    scores = draw(st.lists(st.sampled_from([0.2, 0.5, 0.9]), min_size=len(found), max_size=len(found)))
    return predicted(*found, scores=sorted(scores, reverse=True)), true


def splits(smallest=0):
    return st.lists(expressions(smallest), min_size=1, max_size=5)


def pixels(box):
    left, top, right, bottom = box
    return {(x, y) for x in range(left, right) for y in range(top, bottom)}


@pytest.mark.parametrize(("a", "b", "overlap"), PAIRS)
def test_iou_worked_by_hand(a, b, overlap):
    a, b = corners(a), corners(b)
    assert iou(a, b) == pytest.approx(overlap, abs=1e-6)
    scores = grounding_scores([predicted(b)], [[a]])
    assert scores["mean_iou"] == iou(a, b)
    assert scores["accuracy@0.5"] == (overlap >= 0.5)


@given(boxes(), boxes())
def test_iou_counts_pixels(a, b):
    both, either = pixels(a) & pixels(b), pixels(a) | pixels(b)
    assert iou(a, b) == pytest.approx(len(both) / len(either)) and iou(b, a) == iou(a, b)


def test_boxes_broadcast():
    a, b = np.array([corners(pair[0]) for pair in PAIRS]), np.array([corners(pair[1]) for pair in PAIRS])
    assert iou(a, b) == pytest.approx(np.array([pair[2] for pair in PAIRS]), abs=1e-6)
    table = iou(a[:, None], b)
    assert table.shape == (8, 8) and table.dtype == np.float64
    assert table.diagonal() == pytest.approx(iou(a, b)) and table[0, 7] == iou(a[0], b[7])
    assert iou(np.float32(a), np.float32(b)).dtype == np.float64
    assert iou(np.zeros((0, 1, 4)), b).shape == (0, 8)


def test_boxes_without_area():
    point, line, box = (3, 3, 3, 3), (0, 3, 9, 3), (0, 0, 10, 10)
    assert [float(iou(point, other)) for other in (point, line, box)] == [0, 0, 0]


@pytest.mark.parametrize("wrong", [(5, 5, 2, 9), (5, 5, 9, 2), (math.nan, 0, 1, 1), (0, 0, math.inf, 1)])
def test_what_is_no_box_is_refused(wrong):
    with pytest.raises(ValueError, match=r"^b: expected boxes \(left, top, right, bottom\), all finite, got \["):
        iou((0, 0, 1, 1), [(0, 0, 1, 1), wrong])
    with pytest.raises(ValueError, match="^boxes: expected boxes .* turn"):
        match_boxes([wrong], [])
    with pytest.raises(ValueError, match="^predictions: expected boxes .* for expression 1; turn"):
        grounding_scores([predicted(), predicted(wrong)], [[], []])
    with pytest.raises(ValueError, match="^references: expected boxes .* for expression 1; turn"):
        phrase_recall([predicted()] * 2, [[], [wrong]])


def best_permutation(found, true):
    """The IoUs, best first, of the way to pair all of the fewer with some of the more that is lexicographically greatest:
    what a greedy matching finds where no two IoUs are equal."""
    few, many = sorted((found, true), key=len)
    return max(
        sorted((float(iou(*pair)) for pair in zip(few, order, strict=False)), reverse=True)
        for order in permutations(many)
    )


@given(expressions())
def test_matching_is_the_best_of_all_permutations(expression):
    prediction, true = expression
    found = prediction["boxes"]
    overlaps = [float(iou(one, other)) for one in found for other in true]
    assume(len({overlap for overlap in overlaps if overlap}) == sum(map(bool, overlaps)))
    matches = match_boxes(found, true)
    matched = [float(iou(box, true[place])) for box, place in zip(found, matches, strict=True) if place >= 0]
    expected = [overlap for overlap in best_permutation(found, true) if overlap >= 0.5]
    assert sorted(matched, reverse=True) == pytest.approx(expected)


@given(expressions())
def test_matching_is_one_to_one_and_of_hits(expression):
    prediction, true = expression
    matches = match_boxes(prediction["boxes"], true)
    assert matches.shape == (len(prediction["boxes"]),)
    matched = [place for place in matches.tolist() if place >= 0]
    assert len(set(matched)) == len(matched) and all(place < len(true) for place in matched)
    for box, place in zip(prediction["boxes"], matches, strict=True):
        free = [other for number, other in enumerate(true) if number not in matched]
        assert iou(box, true[place]) >= 0.5 if place >= 0 else not any(iou(box, other) >= 0.5 for other in free)


def test_greedy_matching_is_not_the_largest():
    # The best pair is taken, though the boxes would both match the other way round.
    found, true = [(0, 0, 10, 1), (0, 0, 14, 1)], [(0, 0, 11, 1), (0, 0, 6, 1)]
    assert iou(found[0], true[1]) == 0.6 and iou(found[1], true[0]) == pytest.approx(11 / 14)
    assert match_boxes(found, true).tolist() == [0, -1]


def test_equal_overlaps_match_the_first():
    assert match_boxes([(0, 0, 2, 2)] * 2, [(0, 0, 2, 2)] * 3).tolist() == [0, 1]
    assert match_boxes([], [(0, 0, 2, 2)]).shape == (0,)
    assert match_boxes([(0, 0, 2, 2)], []).tolist() == [-1]


A, B, C = (0, 0, 10, 10), (20, 0, 30, 10), (0, 20, 10, 30)
HALF, LESS = (0, 0, 10, 5), (0, 0, 10, 4.999)


def test_one_target():
    predictions = [
        predicted(HALF, A, scores=[0.1, 0.1]),  # a hit, whatever the score; its centre is inside
        predicted(LESS, A),  # the second best does not count
        predicted((0, 0, 30, 10), scores=[0.5]),  # the centre is in the gap
        predicted(),
    ]
    scores = grounding_scores(predictions, [[A], [A], [A], [A]])
    assert scores == {
        "num_expressions": 4,
        "num_single_target": 4,
        "num_multi_target": 0,
        "num_no_target": 0,
        "accuracy@0.5": 0.25,
        "mean_iou": pytest.approx((0.5 + 0.4999 + 1 / 3) / 4),
        "pointing_game": 0.5,
        "target_accuracy": 0.5,
    }


def test_no_target():
    scores = grounding_scores([predicted(A, scores=[0.4]), predicted(A, scores=[0.5]), predicted()], [[], [], []])
    counts = {"num_expressions": 3, "num_single_target": 0, "num_multi_target": 0, "num_no_target": 3}
    assert scores == counts | {"no_target_accuracy": pytest.approx(2 / 3)}


def test_several_targets():
    predictions = [
        predicted(B, HALF, A, scores=[0.9, 0.6, 0.4]),  # the third is not kept
        predicted(A, B, C),  # one too many
        predicted(A, scores=[0.9]),  # one too few
        predicted(A, A),  # one twice
        predicted(A, B, scores=[0.4, 0.3]),  # none kept
    ]
    scores = grounding_scores(predictions, [[A, B]] * 5)
    counts = {"num_expressions": 5, "num_single_target": 0, "num_multi_target": 5, "num_no_target": 0}
    assert scores == counts | {"multi_target_accuracy": 0.2, "pointing_game": 1, "target_accuracy": 0.8}


def test_threshold_says_which_boxes_are_kept():
    predictions = [predicted(A, B, scores=[0.9, 0.7]), predicted(A, scores=[0.7])]
    for threshold, several, none in ((0.7, 1, 0), (0.71, 0, 1), (0, 1, 0), (1, 0, 1)):
        scores = grounding_scores(predictions, [[A, B], []], threshold=threshold)
        assert (scores["multi_target_accuracy"], scores["no_target_accuracy"]) == (several, none)
    for wrong in (-0.1, 50, math.nan):
        with pytest.raises(ValueError, match=r"threshold: expected a number in \[0, 1\], got"):
            grounding_scores(predictions, [[A, B], []], threshold=wrong)


def test_pointing_game_takes_points():
    # On an edge of B, just outside A, in the gap, and None for the centre of the best box, which is C's or A's.
    cases = [(C, (25, 10), 1), (A, (10.001, 5), 0), (A, (15, 5), 0), (C, None, 0), (A, None, 1)]
    for box, point, inside in cases:
        assert grounding_scores([predicted(box)], [[A, B]], points=[point])["pointing_game"] == inside
    found, points, insides = zip(*cases, strict=True)
    scores = grounding_scores([*map(predicted, found), predicted()], [[A, B]] * 5 + [[]], points=[*points, (5, 5)])
    assert scores["pointing_game"] == sum(insides) / 5
    assert grounding_scores([predicted()], [[A]], points=[(1, 1)])["pointing_game"] == 1
    for wrong, error in (((1, 2, 3), ValueError), ((math.nan, 1), ValueError), ("left", TypeError)):
        with pytest.raises(error, match=r"points: expected \(x, y\).* for expression 0"):
            grounding_scores([predicted(A)], [[A]], points=[wrong])


def test_by_kind():
    predictions, references = [predicted(A), predicted(B), predicted(A), predicted()], [[A], [A], [], [A, B]]
    kinds = ["size", "relation", "relation", None]
    scores = grounding_scores(predictions, references, kinds=kinds)
    assert list(scores["by_kind"]) == ["relation", "size"]
    for kind, places in {"relation": (1, 2), "size": (0,)}.items():
        alone = grounding_scores([predictions[place] for place in places], [references[place] for place in places])
        assert scores["by_kind"][kind] == alone
    assert scores == grounding_scores(predictions, references) | {"by_kind": scores["by_kind"]}
    recall = phrase_recall(predictions, references, kinds=kinds)
    assert recall["by_kind"] == {
        "relation": {"num_phrases": 1, "recall@1": 0, "recall@5": 0, "recall@10": 0},
        "size": {"num_phrases": 1, "recall@1": 1, "recall@5": 1, "recall@10": 1},
    }


def test_phrase_recall_worked_by_hand():
    far = (50, 50, 60, 60)
    found = [[HALF, far], [far] * 4 + [B], [far] * 5 + [A], [far] * 10 + [A], [], [A]]
    references = [[A, B], [A, B], [A], [A], [A], []]
    scores = phrase_recall([{"boxes": one} for one in found], references)
    assert scores == {"num_phrases": 5, "recall@1": 0.2, "recall@5": 0.4, "recall@10": 0.6}
    assert phrase_recall([{"boxes": [A]}], [[]], ks=(2,)) == {"num_phrases": 0}
    assert phrase_recall([{"boxes": [far, A]}], [[A]], ks=(2,)) == {"num_phrases": 1, "recall@2": 1}
    with pytest.raises(ValueError, match=r"ks: got \[0\]"):
        phrase_recall([{"boxes": [A]}], [[A]], ks=[0])


@given(splits())
def test_measures_in_plain_loops(split):
    expected = {}
    for prediction, true in split:
        found, scores = prediction["boxes"], prediction["scores"]
        kept = [box for box, score in zip(found, scores, strict=True) if score >= 0.5]
        hit = lambda one, other: len(pixels(one) & pixels(other)) * 2 >= len(pixels(one) | pixels(other))
        if not true:
            expected.setdefault("no_target_accuracy", []).append(not kept)
            continue
        expected.setdefault("target_accuracy", []).append(bool(kept))
        centres = [(sum(box[::2]) / 2, sum(box[1::2]) / 2) for box in found[:1]]
        pointed = any(x0 <= x <= x1 and y0 <= y <= y1 for x, y in centres for x0, y0, x1, y1 in true)
        expected.setdefault("pointing_game", []).append(pointed)
        if len(true) == 1:
            expected.setdefault("accuracy@0.5", []).append(any(hit(box, true[0]) for box in found[:1]))
        else:
            complete = len(kept) == len(true) and -1 not in match_boxes(kept, true)
            expected.setdefault("multi_target_accuracy", []).append(complete)
    scores = grounding_scores(*zip(*split, strict=True))
    scores = {name: score for name, score in scores.items() if not name.startswith("num_") and name != "mean_iou"}
    assert scores == pytest.approx({name: sum(values) / len(values) for name, values in expected.items()})


@given(splits(), st.randoms())
def test_order_of_expressions_does_not_matter(split, order):
    rows = [(*pair, f"{len(pair[1])} boxes") for pair in split]
    predictions, references, kinds = zip(*rows, strict=True)
    others, targets, other_kinds = zip(*order.sample(rows, len(rows)), strict=True)
    scores = grounding_scores(predictions, references, kinds=kinds)
    assert grounding_scores(others, targets, kinds=other_kinds) == scores
    assert phrase_recall(others, targets) == phrase_recall(predictions, references)


@given(splits(), st.sampled_from([0, 1]), st.integers(1, 9999))
def test_stretching_one_axis_changes_nothing(split, axis, size):
    """As from pixels to relative coordinates, whose rounding must not lose an exact half."""

    def stretched(box):
        return [place / size if number % 2 == axis else place for number, place in enumerate(box)]

    predictions, references = zip(*split, strict=True)
    others = [one | {"boxes": [stretched(box) for box in one["boxes"]]} for one in predictions]
    targets = [[stretched(box) for box in one] for one in references]
    assert grounding_scores(others, targets) == pytest.approx(grounding_scores(predictions, references), abs=1e-12)
    assert phrase_recall(others, targets) == phrase_recall(predictions, references)


def test_arrays_are_lists_too():
    predictions = [{"boxes": np.array([A, B], np.float32), "scores": np.array([0.9, 0.25], np.float32)}]
    scores = grounding_scores(predictions, [np.array([A])])
    assert scores == grounding_scores([predicted(A, B, scores=[0.9, 0.25])], [[A]])
    assert all(type(value) in (int, float) for value in scores.values())
    nothing = {"boxes": np.zeros((0, 4)), "scores": np.zeros(0)}
    assert grounding_scores([nothing], [np.zeros((0, 4))])["no_target_accuracy"] == 1


@pytest.mark.parametrize(
    ("prediction", "error", "message"),
    [
        ([A], TypeError, r"expected a dict with 'boxes', got \[\(0, 0, 10, 10\)\] for expression 1"),
        ({"boxes": [A]}, TypeError, r"expected a dict with 'scores', got one of \['boxes'\] for expression 1"),
        ({"boxes": None, "scores": []}, TypeError, r"expected boxes \(.*\), got None for expression 1"),
        ({"boxes": [A, (1, 2)], "scores": []}, TypeError, "expected boxes .* for expression 1"),
        ({"boxes": A, "scores": [0.5]}, ValueError, r"expected a list of boxes, got shape \(4,\) for expression 1"),
        ({"boxes": [[]], "scores": []}, ValueError, r"boxes of four numbers, got shape \(1, 0\) for expression 1"),
        (predicted(A, scores=[]), ValueError, r"one score per box, got scores of shape \(0,\) for 1 boxes of expr"),
        (
            predicted(A, scores=[1.5]),
            ValueError,
            r"scores in \[0, 1\], got 1.5 for expression 1; logits need a sigmoid",
        ),
        (predicted(A, scores=[math.nan]), ValueError, r"scores in \[0, 1\], got nan for expression 1"),
        (predicted(A, B, scores=[0.1, 0.2]), ValueError, "the best box first, but scores rise for expression 1"),
    ],
)
def test_wrong_predictions_are_named(prediction, error, message):
    with pytest.raises(error, match="^predictions: .*" + message):
        grounding_scores([predicted(A), prediction], [[A], [A]])


@pytest.mark.parametrize("measure", [grounding_scores, phrase_recall])
def test_wrong_arguments_are_named(measure):
    with pytest.raises(ValueError, match="predictions: got an empty list"):
        measure([], [])
    with pytest.raises(ValueError, match="references: expected one per expression, got 2 for 1 expressions"):
        measure([predicted(A)], [[A], [A]])
    with pytest.raises(ValueError, match="kinds: expected one per expression, got 2 for 1 expressions"):
        measure([predicted(A)], [[A]], kinds=["a", "b"])
    with pytest.raises(TypeError, match="references: expected boxes .*, got None for expression 0; leave out"):
        measure([predicted(A)], [None])
    with pytest.raises(ValueError, match=r"references: box \[0.0, 0.0, 0.0, 9.0\] of expression 0 has no area"):
        measure([predicted(A)], [[A, (0, 0, 0, 9)]])
