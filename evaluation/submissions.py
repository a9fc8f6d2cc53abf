"""What the evaluation servers of hidden test splits take: the content of a JSON file to upload."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from hivilt.evaluation.vqa import check_lengths, check_probabilities, check_strings


def _whole_number(official_id: str) -> int:
    if not (official_id.isascii() and official_id.isdecimal()):
        raise ValueError(
            f"ids: the server wants whole numbers, got {official_id!r}; read the split with its official ids."
        )
    return int(official_id)


def _image_file(question_id: str) -> str:
    return question_id.removesuffix(".jpg") + ".jpg"


# Of each server what it calls the id of a question, or an image, how that is written, and what it calls the answer.
_FORMATS = {
    "coco": ("image_id", _whole_number, "caption"),
    "vqa": ("question_id", _whole_number, "answer"),
    "gqa": ("questionId", str, "prediction"),
    "vizwiz": ("image", _image_file, "answer"),
    "vizwiz_answerability": ("image", _image_file, "answerable"),
}


def submission(
    server: Literal["coco", "vqa", "gqa", "vizwiz", "vizwiz_answerability"],
    ids: Sequence[str],
    predictions: Sequence[str] | Sequence[float],
) -> list[dict[str, Any]]:
    """A row a question, or an image, in the format of a challenge.

    Args:
        server: "vqa" is that of VQAv2 and TextVQA, which wants an answer to each question of test2015, even where only
            test-dev is scored; "coco" that of captions, in a file `captions_<split>_<name>_results.json`.
        ids: the official ones: digits for "vqa" and "coco", texts that may begin with a zero for "gqa", the images' file names
            with or without ".jpg" for VizWiz.
        predictions: an answer, or a caption, each; for "vizwiz_answerability" the probability, in [0, 1], that it can be answered.

    Raises:
        ValueError, TypeError: an argument is empty, has another length or values of another kind, or a question comes twice.

    >>> submission("vqa", ["262148000"], ["down"])
    [{'question_id': 262148000, 'answer': 'down'}]
    >>> submission("vizwiz_answerability", ["VizWiz_test_00000000"], [0.75])
    [{'image': 'VizWiz_test_00000000.jpg', 'answerable': 0.75}]
    """
    id_name, write_id, value_name = _FORMATS[server]
    unit = "image" if server == "coco" else "question"
    check_strings("ids", ids, unit)
    if len(ids) == 0:
        raise ValueError("ids: got an empty list; there is nothing to submit.")
    if server == "vizwiz_answerability":
        check_probabilities("predictions", predictions)
    else:
        check_strings("predictions", predictions, unit)
    check_lengths(len(ids), unit, predictions=predictions)
    written = [write_id(one) for one in ids]
    repeated, times = Counter(written).most_common(1)[0]
    if times > 1:
        raise ValueError(f"ids: {repeated!r} comes {times} times; the server takes each {unit} once.")
    return [{id_name: one, value_name: value} for one, value in zip(written, predictions, strict=True)]
