"""The metrics against the outputs of the official tool, and against tables worked out by hand."""

import pytest

from hivilt.evaluation.vqa import (
    CONTRACTIONS,
    answer_coverage,
    answer_scores,
    canonical_answer,
    exact_match,
    majority_answer,
    normalise_answer,
    vqa_accuracy,
    vqa_metrics,
)

# What the official VQA tool and MMF's variant of it make of each answer, from running both.
VECTORS = [
    # answer, official, MMF
    ("A dog.", "dog", "dog"),
    ("the Dog", "dog", "dog"),
    ("an  apple", "apple", "apple"),
    ("Two", "2", "2"),
    ("none", "0", "0"),
    ("10,000", "10000", "10000"),
    ("1,000 people", "1000 people", "1000 people"),
    ("yes, it is", "yes it is", "yes it is"),
    ("yes,no", "yes no", "yesno"),
    ("left/right", "left right", "left right"),
    ("left / right", "left right", "left right"),
    ("black-and-white", "black and white", "black and white"),
    ("t-shirt", "t shirt", "t shirt"),
    ("t - shirt", "t shirt", "t shirt"),
    ("3.5", "3.5", "3.5"),
    ("3.", "3", "3"),
    ("U.S.A.", "usa", "usa"),
    ("u.s. flag", "us flag", "us flag"),
    ("10:30", "10:30", "10:30"),
    ("2:50 pm", "2:50 pm", "2:50 pm"),
    ("dont know", "don't know", "don't know"),
    ("don't know", "don't know", "don't know"),
    ("Im", "im", "im"),
    ("im", "im", "im"),
    ("Id've", "id've", "id've"),
    ("what's this", "what's this", "what 's this"),
    ("dog's", "dog's", "dog 's"),
    ("hello!", "hello", "hello"),
    ("$5", "$5", "$5"),
    ("50%", "50%", "50%"),
    ("#1", "#1", "#1"),
    ("a", "", ""),
    ("the", "", ""),
    ("", "", ""),
    ("one hundred", "1 hundred", "1 hundred"),
    ("ten", "10", "10"),
    ("(red)", "red", "red"),
    ("red (dark)", "red dark", "red dark"),
    ("red_blue", "red blue", "red blue"),
    ('"stop"', "stop", "stop"),
    ("stop sign; tree", "stop sign tree", "stop sign tree"),
    ("1,2", "12", "12"),
    ("1, 2", "1 2", "1 2"),
    ("no.", "no", "no"),
    ("mr. smith", "mr smith", "mr smith"),
    ("a.m.", "am", "am"),
    ("theres a cat", "there's cat", "there's cat"),
    ("youre", "you're", "you're"),
    ("rock & roll", "rock & roll", "rock & roll"),
    ("5'10\"", "5'10", "5'10"),
    ("somebody'd", "somebodyd", "somebodyd"),
    ("let's", "let's", "let 's"),
    ("7 up", "7 up", "7 up"),
    ("zero", "0", "0"),
    ("50-50", "50 50", "50 50"),
    ("yes\nno", "yes no", "yes no"),
]

# Prediction, answers of ten people, and its score: official since 2021, legacy until then, always normalised.
WHOLE_METRIC = [
    ("Yes", ["yes"] * 10, 0, 1, 1),
    ("yes.", ["yes"] * 10, 0, 1, 1),
    ("none", ["none"] * 10, 1, 0, 1),
    ("none", ["none"] * 9 + ["0"], 1, 0.3, 1),
    ("0", ["none"] * 9 + ["0"], 1, 0.3, 1),
    ("1:30 pm.", ["1:30 pm."] * 10, 1, 0, 1),
    ("two", ["two"] * 5 + ["2"] * 5, 1, 1, 1),
    ("dog", ["the dog"] * 3 + ["dog"] * 2 + ["cat"] * 5, 1, 0.6, 1),
    ("dont", ["dont"] * 5 + ["don't"] * 5, 1, 1, 1),
    ("dog's", ["dog's"] * 10, 1, 1, 1),
]


@pytest.mark.parametrize(("answer", "official", "mmf"), VECTORS)
def test_normaliser_equals_the_official_one(answer, official, mmf):
    assert normalise_answer(answer) == official


@pytest.mark.parametrize(("answer", "official", "mmf"), [row for row in VECTORS if row[1] == row[2]])
def test_normalised_answers_stay_as_they_are_in_both_variants(answer, official, mmf):
    assert normalise_answer(normalise_answer(answer)) == normalise_answer(mmf)


def test_mmf_differs_only_by_its_tokenizer():
    """It splits off possessives and joins words at a comma; nothing else tells the two apart."""
    assert {row[0] for row in VECTORS if row[1] != row[2]} == {"yes,no", "what's this", "dog's", "let's"}


def test_contractions_are_the_official_ones():
    assert len(CONTRACTIONS) == 120
    assert CONTRACTIONS["dont"] == "don't"
    assert CONTRACTIONS["somebody'd"] == "somebodyd"  # a slip of the official table
    assert CONTRACTIONS["y'alld've"] == "y'all'd've"


@pytest.mark.checklist("9")
@pytest.mark.parametrize("normalisation", ["official", "legacy", "always"])
@pytest.mark.parametrize(("equal", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_of_ten_answers(equal, score, normalisation):
    assert vqa_accuracy("red", ["red"] * equal + ["blue"] * (10 - equal), normalisation) == score


@pytest.mark.parametrize(("prediction", "answers", "official", "legacy", "always"), WHOLE_METRIC)
def test_whole_metric(prediction, answers, official, legacy, always):
    assert vqa_accuracy(prediction, answers, "official") == official
    assert vqa_accuracy(prediction, answers, "legacy") == legacy
    assert vqa_accuracy(prediction, answers, "always") == always


def test_one_answer_is_left_out_at_a_time_by_its_place():
    """The literal definition, on answers that repeat: leaving out by value would drop all equal ones at once."""
    for answers in (["a1", "b1", "a1", "c1", "b1", "a1", "d1", "b1", "e1", "b1"], ["x1"] * 2 + ["y1"] * 10):
        for prediction in set(answers):
            turns = [answers[:place] + answers[place + 1 :] for place in range(len(answers))]
            literal = sum(min(1, turn.count(prediction) / 3) for turn in turns) / len(answers)
            assert vqa_accuracy(prediction, answers) == pytest.approx(literal, abs=1e-9)


def test_fewer_than_ten_answers_stand_for_ten():
    assert vqa_accuracy("red", ["red"]) == 1
    assert vqa_accuracy("red", ["blue"]) == 0
    # OK-VQA: five people, each counted twice, so one of them is two of ten.
    for equal, score in [(0, 0), (1, 0.6), (2, 1), (5, 1)]:
        assert vqa_accuracy("red", ["red"] * equal + ["blue"] * (5 - equal)) == score


def test_calling_twice_gives_the_same():
    """The official object rewrites its ground truths, so that unanimous ones are compared raw the second time."""
    answers = ["Yes", "yes", "yes."] + ["YES"] * 7
    assert vqa_accuracy("yes", answers, "official") == vqa_accuracy("yes", answers, "official") == 1
    assert answers == ["Yes", "yes", "yes."] + ["YES"] * 7


@pytest.mark.parametrize("score", [vqa_accuracy, exact_match])
def test_answers_must_be_a_list_that_holds_some(score):
    with pytest.raises(TypeError, match="answers: expected a list"):
        score("yes", "yes")
    with pytest.raises(ValueError, match="answers: got an empty list"):
        score("yes", [])


def test_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="'official', 'legacy', 'always'"):
        vqa_accuracy("yes", ["yes"], "none")


def test_soft_targets_are_the_metric():
    answers = ["red"] * 4 + ["Dark  Red"] * 3 + ["maroon"] * 2 + ["brown"]
    assert answer_scores(answers) == {"red": 1, "dark red": 0.9, "maroon": 0.6, "brown": 0.3}
    assert answer_scores(["yes"]) == {"yes": 1}


def test_exact_match_and_majority():
    assert canonical_answer("  Dark\tRED ") == "dark red"
    assert majority_answer(["cat", "Dog", "dog"]) == "dog"
    assert majority_answer(["cat", "dog"]) == "cat"
    assert exact_match("DOG ", ["dog"])
    assert not exact_match("a dog", ["dog"])


def test_metrics_of_a_split():
    predictions = [["yes", "no", "red"], ["blue", "red", "no"], ["no", "red", "blue"], ["red", "no", "yes"]]
    metrics = vqa_metrics(predictions, [["Yes"], ["red"], ["yes"], []])
    # The last answer is not known: it counts neither for nor against.
    assert metrics == {"num_questions": 3, "accuracy": 1 / 3, "top3_accuracy": 2 / 3}
    assert vqa_metrics(predictions, [[]] * 4) == {"num_questions": 0}
    several = vqa_metrics([["red"], ["blue"]], [["red"] * 10, ["blue"] * 2 + ["red"] * 8])
    assert several["accuracy"] == 0.5
    assert several["vqa_accuracy"] == pytest.approx(0.8)
    with pytest.raises(ValueError, match="got 4, 1"):
        vqa_metrics(predictions, [["yes"]])


def test_coverage_counts_what_a_classifier_can_reach():
    label2id = {"yes": 0, "red": 1}
    assert answer_coverage([["Yes"], ["blue"], ["red", "red", "blue"], ["blue", "blue", "red"], []], label2id) == 0.5
    assert answer_coverage([[]], label2id) == 1
