"""The uploads in the formats of the evaluation servers, and what would be refused there."""

import json

import pytest

from hivilt.evaluation.submissions import submission

IMAGES = ["VizWiz_test_00000000.jpg", "VizWiz_test_00000001"]


def test_vqav2_and_textvqa():
    content = submission("vqa", ["262148000", "9"], ["down", ""])
    assert json.dumps(content) == '[{"question_id": 262148000, "answer": "down"}, {"question_id": 9, "answer": ""}]'


def test_gqa_keeps_the_text_of_its_ids():
    assert submission("gqa", ["02930152", "20"], ["yes", "left"]) == [
        {"questionId": "02930152", "prediction": "yes"},
        {"questionId": "20", "prediction": "left"},
    ]


def test_vizwiz_names_files():
    for server, name, values in (("vizwiz", "answer", ["a", "b"]), ("vizwiz_answerability", "answerable", [0.75, 0.0])):
        assert submission(server, IMAGES, values) == [
            {"image": "VizWiz_test_00000000.jpg", name: values[0]},
            {"image": "VizWiz_test_00000001.jpg", name: values[1]},
        ]
    with pytest.raises(ValueError, match=r"predictions: expected probabilities in \[0, 1\], got -2.5"):
        submission("vizwiz_answerability", IMAGES, [0.5, -2.5])


def test_coco_captions():
    content = submission("coco", ["391895", "9"], ["a man, riding", ""])
    assert json.dumps(content) == '[{"image_id": 391895, "caption": "a man, riding"}, {"image_id": 9, "caption": ""}]'
    with pytest.raises(ValueError, match="ids: the server wants whole numbers, got 'COCO_9.jpg'"):
        submission("coco", ["391895", "COCO_9.jpg"], ["a man", "a dog"])
    with pytest.raises(ValueError, match="ids: 7 comes 2 times; the server takes each image once"):
        submission("coco", ["7", "07"], ["a man", "a dog"])
    with pytest.raises(TypeError, match="predictions: expected one string per image, got None for image 1"):
        submission("coco", ["7", "8"], ["a man", None])


@pytest.mark.parametrize("wrong", ["test_3", "", "-1", "1.0", " 7", "1_000", "²"])
def test_vqa_ids_are_whole_numbers(wrong):
    with pytest.raises(ValueError, match=f"ids: the server wants whole numbers, got {wrong!r}"):
        submission("vqa", ["7", wrong], ["yes", "no"])


@pytest.mark.parametrize(
    ("server", "ids"),
    [("vqa", ["7", "8", "7"]), ("vqa", ["7", "8", "07"]), ("gqa", ["7", "8", "7"]), ("vizwiz", ["7.jpg", "8", "7"])],
)
def test_a_question_that_comes_twice_is_named(server, ids):
    with pytest.raises(ValueError, match="ids: .*7.* comes 2 times"):
        submission(server, ids, ["yes"] * 3)


@pytest.mark.parametrize(
    ("server", "ids", "predictions", "error", "message"),
    [
        ("vqa", ["7", "8"], ["yes"], ValueError, "predictions: expected one per question, got 1 for 2 questions"),
        ("vizwiz_answerability", IMAGES, [0.5], ValueError, "predictions: expected one per question, got 1 for 2"),
        (
            "gqa",
            ["7", "8"],
            ["yes", None],
            TypeError,
            "predictions: expected one string per question, got None for question",
        ),
        (
            "vizwiz",
            ["7", 8],
            ["yes", "no"],
            TypeError,
            "ids: expected one string per question, got 8 for question 1",
        ),
        ("vqa", [], [], ValueError, "ids: got an empty list"),
    ],
)
def test_answers_are_one_a_question(server, ids, predictions, error, message):
    with pytest.raises(error, match=message):
        submission(server, ids, predictions)
