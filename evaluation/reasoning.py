"""What a number means in reasoning over images: accuracy and consistency of statements, the scores of Winoground and SugarCrepe.

All are pure functions over lists or numpy arrays; scores are in [0, 1]. A `TypeError` or `ValueError` names the argument and
the item that cannot be measured.
"""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from hivilt.evaluation.grounding import by_kind
from hivilt.evaluation.vqa import check_lengths, check_no_nan

# The spellings of truth values, as `plain_label` writes them.
TRUTH_VALUES = {
    **dict.fromkeys(("true", "t", "yes", "y", "1", "1.0"), True),
    **dict.fromkeys(("false", "f", "no", "n", "0", "0.0"), False),
}

Label = str | bool | int


def plain_label(label: Label) -> str:
    """A label as labels compare: in lower case, in Unicode's composed form (NFC), without spaces around it, several between words
    being one."""
    return " ".join(unicodedata.normalize("NFC", str(label)).split()).casefold()


def are_truth_values(labels: Iterable[str]) -> bool:
    """Whether plain labels are truth values, in any spelling. The letters y and n are so by themselves or beside yes and no
    alone: beside true and false, n is not "no"."""
    labels = set(labels)
    return labels <= TRUTH_VALUES.keys() and (not labels & {"y", "n"} or labels <= {"yes", "no", "y", "n"})


def statement_scores(
    predictions: Sequence[Label | None],
    references: Sequence[Label],
    groups: Sequence[str | None] | None = None,
    kinds: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """Accuracy, and consistency as NLVR2 measures it (Suhr et al. 2019, https://arxiv.org/abs/1811.00491).

    Args:
        predictions: a label a statement; `None`, one that is missing, is wrong.
        references: the true labels. Labels compare whatever their case and spaces; if all true ones are truth values, these
            do in any spelling: True, "true", "yes" and 1 are one.
        groups: for each statement the group that it is right or wrong with, such as that of NLVR2's statements that say the
            same of several pairs of images; `None`, one that is in none.
        kinds: the kind of each statement, by which everything is measured once more; `None`, one that is not known.

    Returns:
        `num_statements` and `accuracy`; where there are groups `num_groups` and `consistency`, the share of those all of whose
        statements are right; with `kinds` also `by_kind`, such a dict for each kind, in alphabetical order.

    >>> statement_scores(["True", "true", "False"], ["True", "False", "False"], groups=["a", "a", "b"])
    {'num_statements': 3, 'accuracy': 0.6666666666666666, 'num_groups': 2, 'consistency': 0.5}
    """
    check_lengths(len(predictions), "statement", references=references, groups=groups, kinds=kinds)
    if len(predictions) == 0:
        raise ValueError("predictions: got an empty list; there is no score without a statement.")
    for name, labels in (("predictions", predictions), ("references", references)):
        for statement, label in enumerate(labels):
            is_label = isinstance(label, Label | np.bool_ | np.integer)
            if not is_label and not (label is None and name == "predictions"):
                raise TypeError(
                    f"{name}: expected a label as text, truth value or number, got {label!r} for statement {statement}."
                )
            if name == "references" and not plain_label(label):
                raise ValueError(
                    f"references: got an empty label for statement {statement}; leave out what is not known."
                )
    check_no_nan("statement", groups=groups, kinds=kinds)
    true = list(map(plain_label, references))
    said = [None if label is None else plain_label(label) for label in predictions]
    if are_truth_values([*true, *TRUTH_VALUES.keys() & said]):
        true, said = ([TRUTH_VALUES.get(label, label) for label in labels] for labels in (true, said))
    groups = [None] * len(true) if groups is None else groups
    rows = [(one == other, group) for one, other, group in zip(said, true, groups, strict=True)]
    return by_kind(rows, kinds, _statement_scores)


def _statement_scores(rows: Sequence[tuple[bool, str | None]]) -> dict[str, Any]:
    scores = {"num_statements": len(rows), "accuracy": fmean(right for right, _ in rows)}
    consistent: dict[str, bool] = {}
    for right, group in rows:
        if group is not None:
            consistent[group] = consistent.get(group, True) and right
    if consistent:
        scores |= {"num_groups": len(consistent), "consistency": fmean(consistent.values())}
    return scores


def winoground_scores(scores: Sequence | np.ndarray, kinds: Sequence[str | None] | None = None) -> dict[str, Any]:
    """The three scores of Winoground (Thrush et al. 2022, https://arxiv.org/abs/2204.03162, equations 1 to 3).

    Args:
        scores: (N, 2, 2), how well image i of an example, a row, goes with caption j, a column; those of the same number belong
            together. Chance is 0.25, 0.25 and 1/6.
        kinds: as in `statement_scores`.

    Returns:
        `num_examples`; `text_score`, the share of examples where each image scores higher with its own caption than with the
        other; `image_score`, where each caption does with its own image; `group_score`, where both do. Ties lose.

    >>> winoground_scores([[[0.9, 0.2], [0.8, 0.7]], [[0.9, 0.2], [0.3, 0.8]]])
    {'num_examples': 2, 'text_score': 0.5, 'image_score': 1.0, 'group_score': 0.5}
    """
    table = _table(scores, (2, 2), "a score for each of two images with each of two captions", kinds)
    own_0, own_1, other_caption_0, other_caption_1 = table[:, 0, 0], table[:, 1, 1], table[:, 0, 1], table[:, 1, 0]
    text = (own_0 > other_caption_0) & (own_1 > other_caption_1)
    # What is the other caption to the one image is the other image to the one caption.
    image = (own_0 > other_caption_1) & (own_1 > other_caption_0)
    rows = [dict(zip(_WINOGROUND, map(float, row), strict=True)) for row in zip(text, image, text & image, strict=True)]
    return by_kind(rows, kinds, _winoground_scores)


_WINOGROUND = ("text_score", "image_score", "group_score")


def _winoground_scores(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {"num_examples": len(rows), **{name: fmean(row[name] for row in rows) for name in _WINOGROUND}}


def sugarcrepe_scores(scores: Sequence | np.ndarray, kinds: Sequence[str]) -> dict[str, Any]:
    """Accuracy on SugarCrepe (Hsieh et al. 2023, https://arxiv.org/abs/2306.14610).

    Args:
        scores: (N, 2), how well an image goes with its caption and with the negative one. Ties lose.
        kinds: the file of each example: its category, "add", "replace" or "swap", and after an underscore what of, as "swap_obj".

    Returns:
        `num_examples`; `accuracy`, the mean over the categories; `by_category`, the mean over the kinds of each; `by_kind`, the
        share of examples with the higher score for the caption.

    >>> sugarcrepe_scores([[0.9, 0.2], [0.9, 0.9], [0.9, 0.2]], ["swap_att", "swap_obj", "add_obj"])["by_category"]
    {'add': 1.0, 'swap': 0.5}
    """
    table = _table(scores, (2,), "the scores of a caption and of its negative", kinds)
    rights: dict[str, list[bool]] = {}
    for kind, right in zip(kinds, table[:, 0] > table[:, 1], strict=True):
        rights.setdefault(kind, []).append(bool(right))
    of_kind = {kind: fmean(rights[kind]) for kind in sorted(rights)}
    categories: dict[str, list[float]] = {}
    for kind, accuracy in of_kind.items():
        categories.setdefault(kind.partition("_")[0], []).append(accuracy)
    of_category = {category: fmean(accuracies) for category, accuracies in categories.items()}
    return {
        "num_examples": len(table),
        "accuracy": fmean(of_category.values()),
        "by_category": of_category,
        "by_kind": of_kind,
    }


def _table(scores: Any, shape: tuple[int, ...], what: str, kinds: Sequence[str | None] | None) -> np.ndarray:
    """(N, *shape) float64."""
    try:
        table = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:  # ragged, or no numbers
        raise TypeError(f"scores: expected {what} an example, got {scores!r}.") from error
    if table.shape[1:] != shape or len(table) == 0:
        expected = ", ".join(map(str, ("N", *shape)))
        raise ValueError(f"scores: expected shape ({expected}), {what} an example, got {table.shape}.")
    if np.isnan(table).any():
        example = int(np.isnan(table).reshape(len(table), -1).any(axis=1).argmax())
        raise ValueError(f"scores: NaN compares with nothing; it stands in those of example {example}.")
    check_lengths(len(table), "example", kinds=kinds)
    check_no_nan("example", kinds=kinds)
    return table
