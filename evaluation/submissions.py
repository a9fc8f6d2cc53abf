"""What the evaluation servers of hidden test splits take: the content of a JSON file to upload."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from hivilt.evaluation.vqa import check_lengths, check_probabilities, check_strings


def _whole_number(question_id: str) -> int:
    if not (question_id.isascii() and question_id.isdecimal()):
        raise ValueError(
            f"question_ids: the server wants whole numbers, got {question_id!r}; read the split with its official ids."
        )
    return int(question_id)


def _image_file(question_id: str) -> str:
    return question_id.removesuffix(".jpg") + ".jpg"


# Of each server what it calls a question's id, how that is written, and what it calls the answer.
_FORMATS = {
    "vqa": ("question_id", _whole_number, "answer"),
    "gqa": ("questionId", str, "prediction"),
    "vizwiz": ("image", _image_file, "answer"),
    "vizwiz_answerability": ("image", _image_file, "answerable"),
}


def submission(
    server: Literal["vqa", "gqa", "vizwiz", "vizwiz_answerability"],
    question_ids: Sequence[str],
    predictions: Sequence[str] | Sequence[float],
) -> list[dict[str, Any]]:
    """A row a question in the format of a challenge.

    Args:
        server: "vqa" is that of VQAv2 and TextVQA, which wants an answer to each question of test2015, even where only
            test-dev is scored.
        question_ids: the official ones: digits for "vqa", texts that may begin with a zero for "gqa", the images' file names
            with or without ".jpg" for VizWiz.
        predictions: an answer each; for "vizwiz_answerability" the probability, in [0, 1], that it can be answered.

    Raises:
        ValueError, TypeError: an argument is empty, has another length or values of another kind, or a question comes twice.

    >>> submission("vqa", ["262148000"], ["down"])
    [{'question_id': 262148000, 'answer': 'down'}]
    >>> submission("vizwiz_answerability", ["VizWiz_test_00000000"], [0.75])
    [{'image': 'VizWiz_test_00000000.jpg', 'answerable': 0.75}]
    """
    id_name, write_id, value_name = _FORMATS[server]
    check_strings("question_ids", question_ids)
    if len(question_ids) == 0:
        raise ValueError("question_ids: got an empty list; there is nothing to submit.")
    (check_probabilities if server == "vizwiz_answerability" else check_strings)("predictions", predictions)
    check_lengths(len(question_ids), predictions=predictions)
    ids = [write_id(question_id) for question_id in question_ids]
    repeated, times = Counter(ids).most_common(1)[0]
    if times > 1:
        raise ValueError(f"question_ids: {repeated!r} comes {times} times; the server takes one answer a question.")
    return [{id_name: written, value_name: value} for written, value in zip(ids, predictions, strict=True)]
