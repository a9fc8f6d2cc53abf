"""The uploads in the formats of the evaluation servers, and what would be refused there."""

import json

import pytest

from hivilt.evaluation.submissions import (
    gqa_submission,
    vizwiz_answerability_submission,
    vizwiz_submission,
    vqa_submission,
)

IMAGES = ["VizWiz_test_00000000.jpg", "VizWiz_test_00000001"]


def test_vqav2_and_textvqa():
    content = vqa_submission(["262148000", "9"], ["down", ""])
    assert json.dumps(content) == '[{"question_id": 262148000, "answer": "down"}, {"question_id": 9, "answer": ""}]'


def test_gqa_keeps_the_text_of_its_ids():
    assert gqa_submission(["02930152", "20"], ["yes", "left"]) == [
        {"questionId": "02930152", "prediction": "yes"},
        {"questionId": "20", "prediction": "left"},
    ]


def test_vizwiz_names_files():
    assert vizwiz_submission(IMAGES, ["soda", "unanswerable"]) == [
        {"image": "VizWiz_test_00000000.jpg", "answer": "soda"},
        {"image": "VizWiz_test_00000001.jpg", "answer": "unanswerable"},
    ]


def test_vizwiz_answerability_is_the_other_way_round():
    content = vizwiz_answerability_submission(IMAGES, [0.25, 1])
    assert content == [
        {"image": "VizWiz_test_00000000.jpg", "answerable": 0.75},
        {"image": "VizWiz_test_00000001.jpg", "answerable": 0.0},
    ]
    with pytest.raises(ValueError, match=r"unanswerable_scores: expected probabilities in \[0, 1\], got -2.5"):
        vizwiz_answerability_submission(IMAGES, [0.5, -2.5])


@pytest.mark.parametrize("wrong", ["test_3", "", "-1", "1.0", " 7", "1_000", "²"])
def test_vqa_ids_are_whole_numbers(wrong):
    with pytest.raises(ValueError, match=f"question_ids: the server wants whole numbers, got {wrong!r}"):
        vqa_submission(["7", wrong], ["yes", "no"])


@pytest.mark.parametrize(
    ("submission", "ids"),
    [
        (vqa_submission, ["7", "8", "7"]),
        (vqa_submission, ["7", "8", "07"]),
        (gqa_submission, ["7", "8", "7"]),
        (vizwiz_submission, ["7.jpg", "8", "7"]),
    ],
)
def test_a_question_that_comes_twice_is_named(submission, ids):
    with pytest.raises(ValueError, match="question_ids: .*7.* comes 2 times"):
        submission(ids, ["yes"] * 3)


@pytest.mark.parametrize("submission", [vqa_submission, gqa_submission, vizwiz_submission])
def test_answers_are_one_string_a_question(submission):
    with pytest.raises(ValueError, match="predictions: expected one a question, got 1 for 2 questions"):
        submission(["7", "8"], ["yes"])
    with pytest.raises(TypeError, match="predictions: expected one string a question, got None for question 1"):
        submission(["7", "8"], ["yes", None])
    with pytest.raises(TypeError, match="question_ids: expected one string a question, got 8 for question 1"):
        submission(["7", 8], ["yes", "no"])
    with pytest.raises(ValueError, match="question_ids: got an empty list"):
        submission([], [])


def test_answerability_needs_one_score_a_question():
    with pytest.raises(ValueError, match="unanswerable_scores: expected one a question, got 1 for 2"):
        vizwiz_answerability_submission(IMAGES, [0.5])
