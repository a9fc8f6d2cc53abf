"""The metrics against outputs of the official tools, a slow version from the formula, and tables worked out by hand."""

import json
import random
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hivilt.evaluation.vqa import (
    CONTRACTIONS,
    Normalization,
    answer_ceiling,
    answer_coverage,
    answer_label,
    canonical_answer,
    exact_match,
    majority_answer,
    normalize_answer,
    normalize_answer_mmf,
    soft_scores,
    vqa_accuracies,
    vqa_accuracy,
    vqa_metrics,
)

FOLDER = Path(__file__).parent
# What the official VQA tool and MMF make of each answer, from running both, and the table that both look words up in.
VECTORS = json.loads((FOLDER / "vqa_norm_vectors.json").read_text(encoding="utf-8"))
OFFICIAL_CONTRACTIONS = json.loads((FOLDER / "vqa_contractions.json").read_text(encoding="utf-8"))
NORMALIZATIONS = get_args(Normalization)

# Prediction, answers of ten people, and its score with each normalization.
WHOLE_METRIC = [
    # official, legacy, always, mmf, vizwiz
    ("Yes", ["yes"] * 10, 0, 1, 1, 1, 1),
    ("yes.", ["yes"] * 10, 0, 1, 1, 1, 1),
    ("none", ["none"] * 10, 1, 0, 1, 1, 0),
    ("none", ["none"] * 9 + ["0"], 1, 0.3, 1, 1, 0.3),
    ("0", ["none"] * 9 + ["0"], 1, 0.3, 1, 1, 0.3),
    ("1:30 pm.", ["1:30 pm."] * 10, 1, 0, 1, 1, 0),
    ("two", ["two"] * 5 + ["2"] * 5, 1, 1, 1, 1, 1),
    ("dog", ["the dog"] * 3 + ["dog"] * 2 + ["cat"] * 5, 1, 0.6, 1, 1, 0.6),
    ("dont", ["dont"] * 5 + ["don't"] * 5, 1, 1, 1, 1, 1),
    ("dog's", ["dog's"] * 10, 1, 1, 1, 1, 1),
    # Only MMF splits off the 's and joins words at a comma; only the VizWiz tool leaves the ends of answers alone.
    ("dog 's", ["dog's"] * 4 + ["cat"] * 6, 0, 0, 0, 1, 0),
    ("yes,no", ["yesno"] * 4 + ["cat"] * 6, 0, 0, 0, 1, 0),
    ("red", [" red\n"] * 10, 1, 1, 1, 1, 0),
]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["input"])
def test_normalizers_equal_the_official_ones(vector):
    assert normalize_answer(vector["input"]) == vector["official"]
    assert normalize_answer_mmf(vector["input"]) == vector["mmf"]


def test_contractions_are_the_official_ones():
    assert len(OFFICIAL_CONTRACTIONS) == 120
    assert CONTRACTIONS == OFFICIAL_CONTRACTIONS


def test_at_most_32_full_stops_go():
    # The official code passes a flag, worth 32, where the count belongs.
    assert normalize_answer("." * 40 + "x") == "." * 8 + "x"


@pytest.mark.checklist("9")
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(("equal", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_of_ten_answers(equal, score, normalization):
    assert vqa_accuracy("red", ["red"] * equal + ["blue"] * (10 - equal), normalization) == score


@pytest.mark.parametrize(("prediction", "answers", "official", "legacy", "always", "mmf", "vizwiz"), WHOLE_METRIC)
def test_whole_metric(prediction, answers, official, legacy, always, mmf, vizwiz):
    scores = {name: vqa_accuracy(prediction, answers, name) for name in NORMALIZATIONS}
    assert scores == {"official": official, "legacy": legacy, "always": always, "mmf": mmf, "vizwiz": vizwiz}


# ---------------------------------------------------------------------------------------------------------------------
# A slow version, from the description, that shares no code
# ---------------------------------------------------------------------------------------------------------------------

SLOW_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
SLOW_NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
DIGITS = "0123456789"


def slow_ends(text):
    return "".join(" " if char in "\n\t" else char for char in text).strip()


def slow_punctuation(text):
    pairs = list(zip(text, text[1:], strict=False))
    beside_space = {one for one, after in pairs if after == " "} | {one for before, one in pairs if before == " "}
    comma_in_number = any(
        text[place] == "," and text[place - 1] in DIGITS and text[place + 1] in DIGITS
        for place in range(1, len(text) - 1)
    )
    without_marks = []
    for char in text:
        if char not in ';/[]"{}()=+\\_-><@`,?!':
            without_marks.append(char)
        elif not comma_in_number and char not in beside_space:
            without_marks.append(" ")
    left, deleted = [], 0
    for char, after in zip(without_marks, [*without_marks[1:], " "], strict=True):
        if char == "." and after not in DIGITS and deleted < 32:
            deleted += 1
        else:
            left.append(char)
    return "".join(left)


def slow_words(text):
    words = []
    for word in text.lower().split():
        if word in SLOW_NUMBERS:
            word = SLOW_NUMBERS[word]
        if word == "a" or word == "an" or word == "the":
            continue
        if word in OFFICIAL_CONTRACTIONS:
            word = OFFICIAL_CONTRACTIONS[word]
        words.append(word)
    return " ".join(words)


@cache
def slow_full(text):
    return slow_words(slow_punctuation(slow_ends(text)))


@cache
def slow_mmf(text):
    kept = "".join(char for char in text.lower() if char not in ",?")
    return slow_full(" 's".join(kept.split("'s")))


def slow_sides(prediction, answers, normalization):
    if normalization == "mmf":
        return slow_mmf(prediction), [slow_mmf(answer) for answer in answers]
    if normalization == "vizwiz":
        return slow_full(prediction), answers
    if normalization == "always":
        return slow_full(prediction), [slow_full(answer) for answer in answers]
    answers = [slow_ends(answer) for answer in answers]
    differ = any(answer != answers[0] for answer in answers)
    if normalization == "legacy":
        return slow_full(prediction), [slow_punctuation(answer) for answer in answers] if differ else answers
    if differ:
        return slow_full(prediction), [slow_full(answer) for answer in answers]
    return slow_ends(prediction), answers


def slow_accuracy(prediction, answers, normalization):
    prediction, answers = slow_sides(prediction, answers, normalization)
    while len(answers) < 10:
        answers = answers * (10 // len(answers))
    total = 0
    for left_out in range(len(answers)):
        others = answers[:left_out] + answers[left_out + 1 :]
        matching = 0
        for other in others:
            matching += other == prediction
        total += min(1, matching / 3)
    return total / len(answers)


WORDS = ["yes", "No", "two", "2", "none", "ten", "Seven", "a", "The", "dog", "dont", "don't", "Im", "theres", "dog's"]
WORDS += ["let's", "somebody'd", "10", "3.5", "1,000", "3,4-5", "u.s.", "50-50"]
MARKS = [*';/()-,?!_"+', ".", "'s", "&", " -", "- ", " ,", ".5"]


def random_cases(number, seed=0):
    """Questions whose answers are often the same but for punctuation, articles, case and spaces."""
    draw = random.Random(seed)
    ways = [
        lambda text: text,
        lambda text: text,
        str.upper,
        lambda text: f"the {text}",
        lambda text: f"{text}.",
        lambda text: f" {text}\n",
        lambda text: text.replace(" ", "\t"),
        lambda text: draw.choice(MARKS).join([text, draw.choice(WORDS)]),
        lambda text: text + draw.choice(MARKS),
    ]
    texts = []
    for _ in range(300):
        parts = [draw.choice(WORDS) + draw.choice(["", "", "", draw.choice(MARKS)]) for _ in range(draw.randint(1, 3))]
        text = draw.choice(["", " ", " "]).join(parts)
        texts.append([way(text) for way in ways])
    for _ in range(number):
        pool = draw.choices(draw.choice(texts), k=draw.randint(1, 4)) + draw.choices(draw.choice(texts), k=2)
        said = draw.choice([pool, pool[:-2], pool[:1]])
        yield draw.choice(pool), draw.choices(said, k=draw.choice([1, 2, 5, 10, 10, 10, 10, 10, 11, 13]))


def test_equals_the_slow_version():
    cases = list(random_cases(10_000))
    predictions, answers = zip(*cases, strict=True)
    scores = {}
    for normalization in NORMALIZATIONS:
        scores[normalization] = vqa_accuracies(predictions, answers, normalization)
        slow = [slow_accuracy(prediction, said, normalization) for prediction, said in cases]
        assert scores[normalization] == pytest.approx(slow, abs=1e-9)
        assert {0, 0.3, 0.6, 0.9, 1} < set(scores[normalization])
    # The cases are of a kind that tells every normalization from every other.
    assert len({tuple(one) for one in scores.values()}) == 5


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


def test_many_questions_at_once_are_scored_one_by_one():
    answers = [["red"] * 3 + ["blue"] * 7, ["Yes"] * 10, ("two", "2", "3")]
    assert vqa_accuracies(["red", "yes", "2"], answers) == [0.9, 1, 1]
    assert vqa_accuracies(["red", "yes", "2"], answers, "official") == [0.9, 0, 1]
    assert vqa_accuracies([], []) == []


@pytest.mark.parametrize("score", [vqa_accuracy, exact_match])
def test_answers_must_be_a_list_that_holds_some(score):
    with pytest.raises(TypeError, match="answers: expected a list"):
        score("yes", "yes")
    with pytest.raises(ValueError, match="answers: got an empty list"):
        score("yes", [])


def test_a_bad_question_of_a_split_is_named():
    with pytest.raises(TypeError, match="answers: expected a list of strings for question 1, got the string 'no'"):
        vqa_accuracies(["yes", "no"], [["yes"], "no"])
    with pytest.raises(ValueError, match="answers: got an empty list for question 1"):
        vqa_accuracies(["yes", "no"], [["yes"], []])
    with pytest.raises(TypeError, match="predictions: expected one string per question, got None for question 1"):
        vqa_accuracies(["yes", None], [["yes"], ["no"]])
    with pytest.raises(TypeError, match="predictions: expected a list"):
        vqa_accuracies("yes", [["yes"]] * 3)
    with pytest.raises(ValueError, match="answers: expected one per question, got 1 for 2 questions"):
        vqa_accuracies(["yes", "no"], [["yes"]])


def test_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match="'official', 'legacy', 'always', 'mmf', 'vizwiz'"):
        vqa_accuracy("yes", ["yes"], "none")
    with pytest.raises(ValueError, match="normalization: expected one of"):
        vqa_accuracies(["yes"], [["yes"]], "none")


# ---------------------------------------------------------------------------------------------------------------------
# Exact match
# ---------------------------------------------------------------------------------------------------------------------


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
    assert vqa_metrics([["Red"]], [["red"] * 10], "official")["vqa_accuracy"] == 0
    with pytest.raises(ValueError, match="answers: expected one per question, got 1 for 4 questions"):
        vqa_metrics(predictions, [["yes"]])


# ---------------------------------------------------------------------------------------------------------------------
# Labels
# ---------------------------------------------------------------------------------------------------------------------


def test_label_of_an_answer():
    label2id = {"2": 0, "dark red": 1, "none": 2, "t shirt": 3}
    assert answer_label("Two", label2id) == 0
    assert answer_label(" Dark  RED", label2id) == 1
    # As it stands before normalized: that would make a 0 of it.
    assert answer_label("None", label2id) == 2
    assert answer_label("a t-shirt.", label2id) == 3
    assert answer_label("blue", label2id) is None


def test_soft_scores_are_the_metric():
    label2id = {"red": 0, "dark red": 1, "maroon": 2, "brown": 3, "blue": 4}
    answers = ["red"] * 4 + ["Dark  Red"] * 3 + ["maroon"] * 2 + ["brown"]
    assert soft_scores(answers, label2id) == {0: 1, 1: 0.9, 2: 0.6, 3: 0.3}
    # Answers that the metric takes for one another share what they earn.
    assert soft_scores(["two"] * 2 + ["2"] + ["The 2."] + ["3"] * 6, {"2": 0, "4": 1}) == {0: 1}
    assert soft_scores(["two"] * 2 + ["2"] + ["3"] * 7, {"2": 0, "two": 1, "3": 2}) == {0: 0.9, 1: 0.9, 2: 1}
    assert soft_scores(["yes"], {"yes": 5}) == {5: 1}
    assert soft_scores(["yes"], {"no": 0}) == soft_scores([], {"no": 0}) == {}
    with pytest.raises(TypeError, match="answers: expected a list of strings"):
        soft_scores("yes", {"yes": 0})


def test_ceiling_by_hand():
    label2id = {"yes": 0, "2": 1}
    answers = [["Yes"] * 10, ["two"] + ["red"] * 9, ["blue"] * 10, [], ["two", "2"] + ["yes"] * 8]
    assert answer_ceiling(answers, label2id) == pytest.approx((1 + 0.3 + 0 + 1) / 4)
    # A label in other words than the answers earns as much.
    assert answer_ceiling([["2"] * 10], {"two": 0}) == vqa_accuracy("two", ["2"] * 10) == 1
    assert answer_ceiling([["yes"]], {}) == 0
    assert answer_ceiling([[]], label2id) == answer_ceiling([], label2id) == 1
    with pytest.raises(TypeError, match="expected a list of strings for question 1"):
        answer_ceiling([["yes"], "yes"], label2id)


SAID = st.sampled_from(["two", "2", "Two.", "none", "0", "a dog", "dog", "the", "", "yes", "yes!", "t-shirt", "dont"])


@given(st.lists(SAID, unique=True), st.lists(st.lists(SAID, max_size=11), max_size=4))
def test_no_classifier_passes_the_ceiling_and_one_reaches_it(vocabulary, answers):
    label2id = {text: label for label, text in enumerate(vocabulary)}
    known = [said for said in answers if said]
    best = [max((vqa_accuracy(text, said) for text in vocabulary), default=0) for said in known]
    ceiling = answer_ceiling(answers, label2id)
    assert ceiling == pytest.approx(sum(best) / len(best) if best else 1)
    for said, reachable in zip(known, best, strict=True):
        scores = soft_scores(said, label2id)
        assert set(scores) == {answer_label(answer, label2id) for answer in said} - {None}
        assert all(score == vqa_accuracy(vocabulary[label], said) for label, score in scores.items())
        assert max(scores.values(), default=0) <= reachable


def test_coverage_counts_what_a_classifier_can_be_taught():
    label2id = {"yes": 0, "red": 1, "2": 2}
    answers = [["Yes"], ["blue"], ["red", "red", "blue"], ["blue", "blue", "red"], [], ["two"]]
    assert answer_coverage(answers, label2id) == 0.6
    assert answer_coverage([[]], label2id) == 1
