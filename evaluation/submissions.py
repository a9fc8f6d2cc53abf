"""What the evaluation servers of hidden test splits take: the content of a JSON file to upload.

| benchmark | function | content |
|---|---|---|
| VQAv2, TextVQA | `vqa_submission` | `[{"question_id": 262148000, "answer": "down"}, ...]` |
| GQA | `gqa_submission` | `[{"questionId": "201307251", "prediction": "yes"}, ...]` |
| VizWiz, answers | `vizwiz_submission` | `[{"image": "VizWiz_test_00000000.jpg", "answer": "soda"}, ...]` |
| VizWiz, answerability | `vizwiz_answerability_submission` | `[{"image": as above, "answerable": 0.9}, ...]` |

All are pure functions over lists of one entry a question. A `ValueError` or `TypeError` names an argument that is empty,
has another length or values of another kind, or a question that comes twice.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hivilt.evaluation.vqa import check_lengths, check_probabilities, check_strings


def vqa_submission(question_ids: Sequence[str], predictions: Sequence[str]) -> list[dict[str, int | str]]:
    """Answers in the format of the VQAv2 and TextVQA challenges, whose official ids are written in digits.

    VQAv2's server wants an answer to each question of test2015, even where only test-dev is scored.

    >>> vqa_submission(["262148000"], ["down"])
    [{'question_id': 262148000, 'answer': 'down'}]
    """
    _check(question_ids, predictions)
    wrong = next((one for one in question_ids if not (one.isascii() and one.isdecimal())), None)
    if wrong is not None:
        raise ValueError(
            f"question_ids: the server wants whole numbers, got {wrong!r}; read the split with its official ids."
        )
    return _rows("question_id", [int(one) for one in question_ids], "answer", predictions)


def gqa_submission(question_ids: Sequence[str], predictions: Sequence[str]) -> list[dict[str, str]]:
    """Answers in the format of the GQA challenge; its official ids are texts, and may begin with a zero.

    >>> gqa_submission(["02930152"], ["yes"])
    [{'questionId': '02930152', 'prediction': 'yes'}]
    """
    _check(question_ids, predictions)
    return _rows("questionId", question_ids, "prediction", predictions)


def vizwiz_submission(question_ids: Sequence[str], predictions: Sequence[str]) -> list[dict[str, str]]:
    """Answers in the format of the VizWiz challenge; its ids are the images' file names, with or without ".jpg".

    >>> vizwiz_submission(["VizWiz_test_00000000"], ["soda"])
    [{'image': 'VizWiz_test_00000000.jpg', 'answer': 'soda'}]
    """
    _check(question_ids, predictions)
    return _rows("image", _vizwiz_images(question_ids), "answer", predictions)


def vizwiz_answerability_submission(
    question_ids: Sequence[str], unanswerable_scores: Sequence[float]
) -> list[dict[str, str | float]]:
    """How sure the model is that each question can be answered: one minus the probability of the answer "unanswerable".

    The ids are those of `vizwiz_submission`, the scores in [0, 1].

    >>> vizwiz_answerability_submission(["VizWiz_test_00000000"], [0.25])
    [{'image': 'VizWiz_test_00000000.jpg', 'answerable': 0.75}]
    """
    _check_ids(question_ids, unanswerable_scores=unanswerable_scores)
    check_probabilities("unanswerable_scores", unanswerable_scores)
    return _rows("image", _vizwiz_images(question_ids), "answerable", [1 - float(one) for one in unanswerable_scores])


def _vizwiz_images(question_ids: Sequence[str]) -> list[str]:
    return [one.removesuffix(".jpg") + ".jpg" for one in question_ids]


def _check(question_ids: Sequence[str], predictions: Sequence[str]) -> None:
    _check_ids(question_ids, predictions=predictions)
    check_strings("predictions", predictions)


def _check_ids(question_ids: Sequence[str], **values: Sequence) -> None:
    check_strings("question_ids", question_ids)
    if len(question_ids) == 0:
        raise ValueError("question_ids: got an empty list; there is nothing to submit.")
    check_lengths(len(question_ids), **values)


def _rows(id_name: str, ids: Sequence[int | str], value_name: str, values: Sequence[Any]) -> list[dict[str, Any]]:
    one, times = Counter(ids).most_common(1)[0]
    if times > 1:
        raise ValueError(f"question_ids: {one!r} comes {times} times; the server takes one answer a question.")
    return [{id_name: one, value_name: value} for one, value in zip(ids, values, strict=True)]
