"""What a number means in visual grounding: IoU, Acc@0.5, the pointing game, gRefCOCO's measures and recall of phrases.

All are pure functions over lists or numpy arrays and compute in float64. A box is (left, top, right, bottom), in pixels or
relative to its image: stretching an image changes no measure, as long as its predictions and references stretch alike.
Boxes are measured as they are; clip them to the image before. `predictions` are dicts, one an expression, of `boxes` (n, 4),
best first, and `scores` (n,), their probabilities, of *all* boxes: `threshold` is applied here. `references` are the true
boxes of each expression, (m, 4); none where nothing in the image is meant. A hit is an IoU of at least 0.5, with continuous
coordinates.

A `TypeError` or `ValueError` names the argument and the expression that cannot be measured.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from hivilt.evaluation.retrieval import check_ks
from hivilt.evaluation.vqa import check_lengths, check_no_nan

HIT_IOU = 0.5
# A half, or an edge, in pixels is one in relative coordinates too, which are rounded.
ROUNDING = 1e-9

# In the order of the results.
MEASURES = (
    "accuracy@0.5",
    "mean_iou",
    "multi_target_accuracy",
    "pointing_game",
    "target_accuracy",
    "no_target_accuracy",
)
# What is counted, and the measure whose rows these are.
COUNTS = {
    "num_single_target": "accuracy@0.5",
    "num_multi_target": "multi_target_accuracy",
    "num_no_target": "no_target_accuracy",
}

Boxes = Sequence[Sequence[float]] | np.ndarray


def iou(a: Boxes | Sequence[float], b: Boxes | Sequence[float]) -> np.ndarray:
    """Intersection over union of boxes, (...) float64 in [0, 1]; 0 for two boxes without area.

    Args:
        a, b: (..., 4), which broadcast: `iou(a[:, None], b)` is the table (n, m) of all pairs. A `ValueError` refuses NaN
            and boxes whose right or bottom is below their left or top, as (left, top, width, height) often looks.

    >>> iou([0, 0, 10, 10], [[5, 0, 15, 10], [0, 0, 10, 5]]).round(3).tolist()
    [0.333, 0.5]
    """
    return _iou(_checked("a", a), _checked("b", b))


def match_boxes(boxes: Boxes, references: Boxes) -> np.ndarray:
    """Matches boxes one to one, greedily: of all pairs left the one that overlaps most, while its IoU is at least 0.5.

    It is gRefCOCO's matching (He et al. 2023, https://arxiv.org/abs/2308.16182) by IoU, as the paper says; the code
    published with it takes GIoU, which is stricter. Of equal overlaps, the first box and then its first reference match.

    Args:
        boxes: (n, 4).
        references: (m, 4).

    Returns:
        (n,) int64: the reference of each box, -1 where it has none.

    >>> match_boxes([[0, 0, 9, 10], [0, 0, 10, 10]], [[20, 0, 30, 10], [0, 0, 10, 10]]).tolist()
    [-1, 1]
    """
    return _match(_box_list("boxes", boxes), _box_list("references", references))


def grounding_scores(
    predictions: Sequence[Mapping[str, Any]],
    references: Sequence[Boxes],
    points: Sequence[Sequence[float] | None] | None = None,
    kinds: Sequence[str | None] | None = None,
    threshold: float = 0.5,
) -> dict[str, Any]:
    """The measures of a whole split, each over the expressions that it is defined for.

    Args:
        points: where the model points, (x, y) in the frame of the boxes, such as the best place of a heat map; `None`, for
            an expression or for all, is the centre of the best box.
        kinds: the kind of each expression, by which everything is measured once more; `None`, one that is not known.
        threshold: the lowest score, in [0, 1], of a box that is *kept*. gRefCOCO's own code takes 0.7.

    Returns:
        How many expressions there are, `num_expressions`, and how many of them have one true box, `num_single_target`,
        several, `num_multi_target`, and none, `num_no_target`. Then, in [0, 1] and left out where there are no such
        expressions:

        - one true box: `accuracy@0.5`, the Acc@0.5 of RefCOCO (Yu et al. 2016, https://arxiv.org/abs/1608.00272), the share
          whose best box is a hit, whatever its score; `mean_iou` of the same boxes, 0 where there is no box;
        - several: `multi_target_accuracy`, the share whose kept boxes match the true ones one to one, none left on either
          side: an F1 of 1 by `match_boxes`;
        - one or several: `pointing_game`, the share whose point is in a true box or on its edge (Zhang et al. 2016,
          https://arxiv.org/abs/1608.00507, without its margin of 15 pixels); `target_accuracy`, the share with a box kept,
          gRefCOCO's T-acc;
        - none: `no_target_accuracy`, the share without a box kept, gRefCOCO's N-acc. It is 1 for a model that never answers,
          so it is read beside `target_accuracy`.

        With `kinds` also `by_kind`, such a dict for each kind, in alphabetical order.

    >>> predictions = [{"boxes": [[0, 0, 10, 10], [20, 20, 30, 30]], "scores": [0.9, 0.2]}] * 2
    >>> scores = grounding_scores(predictions, references=[[[0, 0, 10, 8]], []])
    >>> scores["accuracy@0.5"], scores["mean_iou"], scores["no_target_accuracy"]
    (1.0, 0.8, 0.0)
    """
    _check_split(predictions, references=references, points=points, kinds=kinds)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a number in [0, 1], got {threshold}.")
    rows = []
    for expression, (prediction, true) in enumerate(zip(predictions, references, strict=True)):
        boxes = _predicted_boxes(prediction, expression)
        scores = _predicted_scores(prediction, len(boxes), expression)
        point = None if points is None else _point(points[expression], expression)
        rows.append(_judge(boxes, boxes[scores >= threshold], _true(true, expression), point))
    return by_kind(rows, kinds, _scores_of)


def phrase_recall(
    predictions: Sequence[Mapping[str, Any]],
    references: Sequence[Boxes],
    ks: Sequence[int] = (1, 5, 10),
    kinds: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """Recall@k of Flickr30k Entities (Plummer et al. 2015, https://arxiv.org/abs/1505.04870) by its any-box protocol: the
    share of the phrases with *any* of their true boxes hit by any of their k best boxes.

    The other protocol, merged boxes, is the same with the box around all true ones as the only reference.

    Args:
        predictions: as everywhere here, but `scores` are not read.
        references: phrases without a true box are left out, as the protocol does.
        ks: the cut-offs, each at least 1. Boxes that were not predicted count as not found.
        kinds: as in `grounding_scores`.

    Returns:
        `num_phrases`, those that have a true box; `recall@k` for each k, in [0, 1], left out where there is no such
        phrase; with `kinds` also `by_kind`. `recall@1` is the any-box accuracy.

    >>> predictions = [{"boxes": [[5, 5, 6, 6], [0, 0, 10, 10]]}]
    >>> phrase_recall(predictions, references=[[[20, 20, 30, 30], [0, 0, 10, 8]]], ks=(1, 5))
    {'num_phrases': 1, 'recall@1': 0.0, 'recall@5': 1.0}
    """
    check_ks(ks)
    _check_split(predictions, references=references, kinds=kinds)
    names, rows = {f"recall@{k}": k for k in ks}, []
    for expression, (prediction, true) in enumerate(zip(predictions, references, strict=True)):
        targets = _true(true, expression)
        hits = _is_hit(_iou(_predicted_boxes(prediction, expression)[:, None], targets)).any(axis=1)
        rows.append({name: float(hits[:k].any()) for name, k in names.items()} if len(targets) else {})
    return by_kind(rows, kinds, lambda rows: {"num_phrases": sum(map(bool, rows)), **_means(rows, names)})


def _judge(boxes: np.ndarray, kept: np.ndarray, targets: np.ndarray, point: np.ndarray | None) -> dict[str, float]:
    """The measures that an expression has a row of."""
    if len(targets) == 0:
        return {"no_target_accuracy": float(len(kept) == 0)}
    if len(targets) == 1:
        overlap = float(_iou(boxes[:1], targets).max(initial=0.0))
        row = {"accuracy@0.5": float(_is_hit(overlap)), "mean_iou": overlap}
    else:
        complete = len(kept) == len(targets) and bool((_match(kept, targets) >= 0).all())
        row = {"multi_target_accuracy": float(complete)}
    if point is None and len(boxes) > 0:
        point = (boxes[0, :2] + boxes[0, 2:]) / 2
    pointed = point is not None and _is_inside(point, targets)
    return row | {"pointing_game": float(pointed), "target_accuracy": float(len(kept) > 0)}


def _scores_of(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    counts = {name: sum(measure in row for row in rows) for name, measure in COUNTS.items()}
    return {"num_expressions": len(rows), **counts, **_means(rows, MEASURES)}


def _means(rows: Sequence[Mapping[str, float]], names: Iterable[str]) -> dict[str, float]:
    return {name: fmean(values) for name in names if (values := [row[name] for row in rows if name in row])}


def by_kind(
    rows: Sequence[Mapping[str, float]],
    kinds: Sequence[str | None] | None,
    measure: Callable[[Sequence[Mapping[str, float]]], dict[str, Any]],
) -> dict[str, Any]:
    """What `measure` gives of all rows, and of those of each kind."""
    metrics = measure(rows)
    if kinds is not None:
        rows_of: dict[str, list[Mapping[str, float]]] = {}
        for row, kind in zip(rows, kinds, strict=True):
            if kind is not None:
                rows_of.setdefault(kind, []).append(row)
        metrics["by_kind"] = {kind: measure(rows_of[kind]) for kind in sorted(rows_of)}
    return metrics


def _area(left_top: np.ndarray, right_bottom: np.ndarray) -> np.ndarray:
    return np.prod((right_bottom - left_top).clip(min=0), axis=-1)


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    intersection = _area(np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:]))
    union = _area(a[..., :2], a[..., 2:]) + _area(b[..., :2], b[..., 2:]) - intersection
    return intersection / np.where(union > 0, union, 1)


def _is_hit(overlap: np.ndarray | float) -> np.ndarray | bool:
    return overlap >= HIT_IOU - ROUNDING


def _is_inside(point: np.ndarray, boxes: np.ndarray) -> bool:
    from_centre = np.abs(point - (boxes[:, :2] + boxes[:, 2:]) / 2)
    return bool((from_centre <= (0.5 + ROUNDING) * (boxes[:, 2:] - boxes[:, :2])).all(axis=1).any())


def _match(boxes: np.ndarray, references: np.ndarray) -> np.ndarray:
    overlaps = _iou(boxes[:, None], references)  # (n, m)
    matches = np.full(len(boxes), -1)
    for _ in range(min(overlaps.shape)):
        box, reference = np.unravel_index(overlaps.argmax(), overlaps.shape)
        if not _is_hit(overlaps[box, reference]):
            break
        matches[box] = reference
        overlaps[box], overlaps[:, reference] = 0, 0
    return matches


def _check_split(predictions: Sequence[Mapping[str, Any]], **given: Sequence | None) -> None:
    check_lengths(len(predictions), "expression", **given)
    check_no_nan("expression", kinds=given.get("kinds"))
    if len(predictions) == 0:
        raise ValueError("predictions: got an empty list; there is no score without an expression.")


def _field(prediction: Mapping[str, Any], name: str, expression: int) -> Any:
    if not isinstance(prediction, Mapping) or name not in prediction:
        got = f"one of {list(prediction)}" if isinstance(prediction, Mapping) else repr(prediction)
        raise TypeError(f"predictions: expected a dict with {name!r}, got {got} for expression {expression}.")
    return prediction[name]


def _predicted_boxes(prediction: Mapping[str, Any], expression: int) -> np.ndarray:
    return _box_list("predictions", _field(prediction, "boxes", expression), expression)


def _predicted_scores(prediction: Mapping[str, Any], num_boxes: int, expression: int) -> np.ndarray:
    scores = _floats("predictions", _field(prediction, "scores", expression), "scores", expression)
    if scores.shape != (num_boxes,):
        raise ValueError(
            f"predictions: expected one score per box, got scores of shape {scores.shape} for {num_boxes} boxes of "
            f"expression {expression}."
        )
    if not ((scores >= 0) & (scores <= 1)).all():
        wrong = scores[~((scores >= 0) & (scores <= 1))][0]
        raise ValueError(
            f"predictions: expected scores in [0, 1], got {wrong} for expression {expression}; logits need a sigmoid."
        )
    if (np.diff(scores) > 0).any():
        raise ValueError(f"predictions: expected the best box first, but scores rise for expression {expression}.")
    return scores


def _true(boxes: Boxes, expression: int) -> np.ndarray:
    targets = _box_list("references", boxes, expression)
    empty = (targets[:, 2:] <= targets[:, :2]).any(axis=1)
    if empty.any():
        raise ValueError(
            f"references: box {targets[empty][0].tolist()} of expression {expression} has no area; an expression that "
            "means nothing has no box at all."
        )
    return targets


def _point(point: Sequence[float] | None, expression: int) -> np.ndarray | None:
    if point is None:
        return None
    place = _floats("points", point, "(x, y)", expression)
    if place.shape != (2,) or not np.isfinite(place).all():
        raise ValueError(f"points: expected (x, y) or None per expression, got {point!r} for expression {expression}.")
    return place


def _box_list(name: str, boxes: Boxes, expression: int | None = None) -> np.ndarray:
    """(n, 4) float64, also for an empty list."""
    array = _floats(name, boxes, "boxes (left, top, right, bottom)", expression)
    if array.shape == (0,):
        return array.reshape(0, 4)
    if array.ndim != 2:
        raise ValueError(f"{name}: expected a list of boxes, got shape {array.shape}{_of(expression)}.")
    return _checked(name, array, expression)


def _checked(name: str, boxes: Boxes | Sequence[float], expression: int | None = None) -> np.ndarray:
    """(..., 4) float64."""
    array = _floats(name, boxes, "boxes (left, top, right, bottom)", expression)
    if array.shape[-1:] != (4,):
        raise ValueError(f"{name}: expected boxes of four numbers, got shape {array.shape}{_of(expression)}.")
    wrong = ~np.isfinite(array).all(axis=-1) | (array[..., 2:] < array[..., :2]).any(axis=-1)
    if wrong.any():
        raise ValueError(
            f"{name}: expected boxes (left, top, right, bottom), all finite, got {array[wrong][0].tolist()}"
            f"{_of(expression)}; turn (left, top, width, height) and (center x, center y, width, height) into corners first."
        )
    return array


def _floats(name: str, values: Any, what: str, expression: int | None) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:  # ragged, or no numbers
        raise TypeError(f"{name}: expected {what}, got {values!r}{_of(expression)}.") from error
    if values is None:  # NaN, to numpy
        raise TypeError(f"{name}: expected {what}, got None{_of(expression)}; leave out what is not known.")
    return array


def _of(expression: int | None) -> str:
    return "" if expression is None else f" for expression {expression}"
