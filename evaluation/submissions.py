"""What the evaluation servers of hidden test splits take: the content of a JSON file to upload.

All are pure functions over lists of one entry a question. A `ValueError` or `TypeError` names an argument that is empty,
has another length or values of another kind, or a question that comes twice.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from hivilt.evaluation.vqa import check_lengths, check_probabilities, check_strings


def vqa_submission(question_ids: Sequence[str], predictions: Sequence[str]) -> list[dict[str, int | str]]:
    """Answers in the format of the VQAv2 and TextVQA challenges, whose official ids are written in digits.

    VQAv2's server wants an answer to each question of test2015, even where only test-dev is scored.

    >>> vqa_submission(["262148000"], ["down"])
    [{'question_id': 262148000, 'answer': 'down'}]
    """
    check_strings("predictions", predictions)
    return _rows("question_id", question_ids, _whole_number, "answer", predictions=predictions)


def gqa_submission(question_ids: Sequence[str], predictions: Sequence[str]) -> list[dict[str, str]]:
    """Answers in the format of the GQA challenge; its official ids are texts, and may begin with a zero.

    >>> gqa_submission(["02930152"], ["yes"])
    [{'questionId': '02930152', 'prediction': 'yes'}]
    """
    check_strings("predictions", predictions)
    return _rows("questionId", question_ids, str, "prediction", predictions=predictions)


def vizwiz_submission(question_ids: Sequence[str], predictions: Sequence[str]) -> list[dict[str, str]]:
    """Answers in the format of the VizWiz challenge; its ids are the images' file names, with or without ".jpg".

    >>> vizwiz_submission(["VizWiz_test_00000000"], ["soda"])
    [{'image': 'VizWiz_test_00000000.jpg', 'answer': 'soda'}]
    """
    check_strings("predictions", predictions)
    return _rows("image", question_ids, _image_file, "answer", predictions=predictions)


def vizwiz_answerability_submission(
    question_ids: Sequence[str], unanswerable_scores: Sequence[float]
) -> list[dict[str, str | float]]:
    """How sure the model is that each question can be answered: one minus the probability of the answer "unanswerable".

    The ids are those of `vizwiz_submission`, the scores in [0, 1].

    >>> vizwiz_answerability_submission(["VizWiz_test_00000000"], [0.25])
    [{'image': 'VizWiz_test_00000000.jpg', 'answerable': 0.75}]
    """
    check_probabilities("unanswerable_scores", unanswerable_scores)
    answerable = [1 - float(score) for score in unanswerable_scores]
    return _rows("image", question_ids, _image_file, "answerable", unanswerable_scores=answerable)


def _whole_number(question_id: str) -> int:
    if not (question_id.isascii() and question_id.isdecimal()):
        raise ValueError(
            f"question_ids: the server wants whole numbers, got {question_id!r}; read the split with its official ids."
        )
    return int(question_id)


def _image_file(question_id: str) -> str:
    return question_id.removesuffix(".jpg") + ".jpg"


def _rows(
    id_name: str, question_ids: Sequence[str], write_id: Callable[[str], Any], value_name: str, **argument: Sequence
) -> list[dict[str, Any]]:
    check_strings("question_ids", question_ids)
    if len(question_ids) == 0:
        raise ValueError("question_ids: got an empty list; there is nothing to submit.")
    check_lengths(len(question_ids), **argument)
    (values,) = argument.values()
    ids = [write_id(question_id) for question_id in question_ids]
    repeated, times = Counter(ids).most_common(1)[0]
    if times > 1:
        raise ValueError(f"question_ids: {repeated!r} comes {times} times; the server takes one answer a question.")
    return [{id_name: written, value_name: value} for written, value in zip(ids, values, strict=True)]
