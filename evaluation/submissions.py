"""What the evaluation servers of hidden test splits take: the content of a JSON file to upload.

| benchmark | function | content |
|---|---|---|
| VQAv2, TextVQA | `vqa_submission` | `[{"question_id": 262148000, "answer": "down"}, ...]` |
| GQA | `gqa_submission` | `[{"questionId": "201307251", "prediction": "yes"}, ...]` |
| VizWiz, answers | `vizwiz_submission` | `[{"image": "VizWiz_test_00000000.jpg", "answer": "soda"}, ...]` |
| VizWiz, answerability | `vizwiz_answerability_submission` | `[{"image": as above, "answerable": 0.9}, ...]` |

Everything here is a pure function over lists. Every function refuses, with a `ValueError` or `TypeError` that names the
argument, lists that are empty or differ in length, a question that comes twice, and values of another kind.
"""

from collections import Counter
from collections.abc import Sequence


def vqa_submission(question_ids: Sequence[str], predictions: Sequence[str]) -> list[dict[str, int | str]]:
    """Answers in the format of the VQAv2 and TextVQA challenges.

    VQAv2's server wants an answer to each question of test2015, even where only test-dev is scored.

    Args:
        question_ids: the official ids, written in digits.
        predictions: one answer a question.

    Raises:
        ValueError, TypeError: see the top of this file; or an id is no number.

    >>> vqa_submission(["262148000"], ["down"])
    [{'question_id': 262148000, 'answer': 'down'}]
    """
    _check(question_ids, predictions=predictions)
    wrong = next((one for one in question_ids if not (one.isascii() and one.isdecimal())), None)
    if wrong is not None:
        raise ValueError(
            f"question_ids: the server wants whole numbers, got {wrong!r}; read the split with its official ids."
        )
    numbers = [int(one) for one in question_ids]
    _check_unique(numbers)
    _check_answers(predictions)
    return [{"question_id": number, "answer": answer} for number, answer in zip(numbers, predictions, strict=True)]


def gqa_submission(question_ids: Sequence[str], predictions: Sequence[str]) -> list[dict[str, str]]:
    """Answers in the format of the GQA challenge; its ids are texts, and may begin with a zero.

    Args:
        question_ids: the official ids.
        predictions: one answer a question.

    Raises:
        ValueError, TypeError: see the top of this file.

    >>> gqa_submission(["02930152"], ["yes"])
    [{'questionId': '02930152', 'prediction': 'yes'}]
    """
    _check(question_ids, predictions=predictions)
    _check_answers(predictions)
    return [{"questionId": one, "prediction": answer} for one, answer in zip(question_ids, predictions, strict=True)]


def vizwiz_submission(question_ids: Sequence[str], predictions: Sequence[str]) -> list[dict[str, str]]:
    """Answers in the format of the VizWiz challenge, which knows a question by the file name of its image.

    Args:
        question_ids: the file names, with or without ".jpg".
        predictions: one answer a question.

    Raises:
        ValueError, TypeError: see the top of this file.

    >>> vizwiz_submission(["VizWiz_test_00000000"], ["soda"])
    [{'image': 'VizWiz_test_00000000.jpg', 'answer': 'soda'}]
    """
    _check(question_ids, predictions=predictions)
    _check_answers(predictions)
    return [
        {"image": image, "answer": answer}
        for image, answer in zip(_vizwiz_images(question_ids), predictions, strict=True)
    ]


def vizwiz_answerability_submission(
    question_ids: Sequence[str], unanswerable_scores: Sequence[float]
) -> list[dict[str, str | float]]:
    """How sure the model is that each question can be answered, in the format of the VizWiz challenge.

    Args:
        question_ids: the file names of the images, with or without ".jpg".
        unanswerable_scores: for each question the probability, in [0, 1], of the answer "unanswerable".

    Returns:
        A list with `answerable`, one minus that probability.

    Raises:
        ValueError, TypeError: see the top of this file; or a score is no probability.

    >>> vizwiz_answerability_submission(["VizWiz_test_00000000"], [0.25])
    [{'image': 'VizWiz_test_00000000.jpg', 'answerable': 0.75}]
    """
    _check(question_ids, unanswerable_scores=unanswerable_scores)
    wrong = next((score for score in unanswerable_scores if not 0 <= score <= 1), None)
    if wrong is not None:
        raise ValueError(f"unanswerable_scores: expected probabilities in [0, 1], got {wrong}.")
    return [
        {"image": image, "answerable": 1 - float(score)}
        for image, score in zip(_vizwiz_images(question_ids), unanswerable_scores, strict=True)
    ]


def _vizwiz_images(question_ids: Sequence[str]) -> list[str]:
    images = [one.removesuffix(".jpg") + ".jpg" for one in question_ids]
    _check_unique(images)
    return images


def _check(question_ids: Sequence[str], **values: Sequence) -> None:
    if len(question_ids) == 0:
        raise ValueError("question_ids: got an empty list; there is nothing to submit.")
    wrong = next((one for one in question_ids if not isinstance(one, str)), None)
    if wrong is not None:
        raise TypeError(f"question_ids: expected strings, got {wrong!r}, a {type(wrong).__name__}.")
    for name, given in values.items():
        if len(given) != len(question_ids):
            raise ValueError(f"{name}: expected one a question, got {len(given)} for {len(question_ids)} question_ids.")
    _check_unique(question_ids)


def _check_unique(ids: Sequence[int | str]) -> None:
    one, times = Counter(ids).most_common(1)[0]
    if times > 1:
        raise ValueError(f"question_ids: {one!r} comes {times} times; the server takes one answer a question.")


def _check_answers(predictions: Sequence[str]) -> None:
    wrong = next((place for place, one in enumerate(predictions) if not isinstance(one, str)), None)
    if wrong is not None:
        raise TypeError(f"predictions: expected strings, got {predictions[wrong]!r} for question {wrong}.")
