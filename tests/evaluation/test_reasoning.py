"""Statements, Winoground and SugarCrepe: the measures against slow loops, and against what the official programs do."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hivilt.evaluation.reasoning import plain_label, statement_scores, sugarcrepe_scores, winoground_scores

SPELLINGS = {
    True: ["True", "true", "yes", "YES", "1", 1, True, " true ", np.True_],
    False: ["False", "no", "0", 0, False],
}


def official_nlvr2(predictions, examples):
    """As `eval/metrics.py` of NLVR2 counts: a group is an identifier without its third part."""
    right, consistent = 0, {}
    for identifier, label in examples:
        split, one, _, sentence = identifier.split("-")
        group = f"{split}-{one}--{sentence}"
        consistent.setdefault(group, True)
        if predictions[identifier].lower() == label.lower():
            right += 1
        else:
            consistent[group] = False
    return right / len(examples), sum(consistent.values()) / len(consistent)


@st.composite
def statements(draw):
    """Predictions, references and groups of some statements as NLVR2 names them."""
    names = draw(st.sets(st.tuples(*(st.integers(0, 2) for _ in range(3))), min_size=1, max_size=12))
    identifiers = [f"dev-{one}-{pair}-{sentence}" for one, pair, sentence in names]
    labels = [draw(st.sampled_from(["True", "False"])) for _ in identifiers]
    said = [draw(st.sampled_from([label] * 3 + ["true", "FALSE"])) for label in labels]
    return identifiers, said, labels


@given(statements())
def test_statements_are_measured_as_by_the_official_program(given_):
    identifiers, said, labels = given_
    groups = ["-".join((*one.split("-")[:2], one.split("-")[3])) for one in identifiers]
    scores = statement_scores(said, labels, groups)
    examples = list(zip(identifiers, labels, strict=True))
    expected = official_nlvr2(dict(zip(identifiers, said, strict=True)), examples)
    assert (scores["accuracy"], scores["consistency"]) == pytest.approx(expected)
    assert (scores["num_statements"], scores["num_groups"]) == (len(said), len(set(groups)))


@given(
    st.lists(
        st.tuples(
            st.sampled_from([None, "a", "A ", "b", "c"]),
            st.sampled_from(["a", "b", "c"]),
            st.sampled_from([None, "g", "h"]),
            st.sampled_from([None, "k", "l"]),
        ),
        min_size=1,
    )
)
def test_statements_are_measured_as_by_a_slow_loop(rows):
    predictions, references, groups, kinds = map(list, zip(*rows, strict=True))
    scores = statement_scores(predictions, references, groups, kinds)

    def slow(rows):
        right = [one is not None and one.strip().lower() == other for one, other, _, _ in rows]
        found = {"num_statements": len(rows), "accuracy": sum(right) / len(rows)}
        names = {row[2] for row in rows} - {None}
        if names:
            whole = [
                all(is_right for is_right, row in zip(right, rows, strict=True) if row[2] == name) for name in names
            ]
            found |= {"num_groups": len(names), "consistency": sum(whole) / len(names)}
        return found

    by_kind = scores.pop("by_kind")
    assert scores == pytest.approx(slow(rows))
    assert list(by_kind) == sorted({row[3] for row in rows} - {None})
    for kind, found in by_kind.items():
        assert found == pytest.approx(slow([row for row in rows if row[3] == kind]))


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_truth_values_compare_in_any_spelling(rows):
    spelled = lambda value, place: SPELLINGS[value][place % len(SPELLINGS[value])]
    predictions = [spelled(one, place) for one, _, place, _ in rows]
    references = [spelled(other, place) for _, other, _, place in rows]
    expected = sum(one == other for one, other, _, _ in rows) / len(rows)
    assert statement_scores(predictions, references)["accuracy"] == pytest.approx(expected)


def test_other_labels_are_compared_as_words():
    assert statement_scores(["1", "yes", "No "], ["2", "Yes", "no"])["accuracy"] == pytest.approx(2 / 3)
    assert statement_scores(["yes"], ["maybe"]) == {"num_statements": 1, "accuracy": 0}
    # Of three classes with numbers 1 is none but 1, and of truth values another word is wrong.
    assert statement_scores(["true", "1", "2"], ["1", "1", "2"])["accuracy"] == pytest.approx(2 / 3)
    assert statement_scores(["perhaps", "yes"], [True, 1])["accuracy"] == 0.5
    assert plain_label("  Not  ENTAILED ") == "not entailed"


def test_what_is_missing_is_wrong():
    scores = statement_scores(["True", None], ["True", "True"], groups=["a", "a"])
    assert (scores["accuracy"], scores["consistency"]) == (0.5, 0)


TABLES = st.lists(st.lists(st.integers(0, 4), min_size=4, max_size=4), min_size=1, max_size=8)


@given(TABLES, st.data())
def test_winoground_is_measured_as_by_a_slow_loop(rows, data):
    table = np.array(rows).reshape(-1, 2, 2)
    kinds = data.draw(st.lists(st.sampled_from([None, "Object", "Both"]), min_size=len(rows), max_size=len(rows)))
    text = image = group = 0
    for (c0_i0, c1_i0), (c0_i1, c1_i1) in table.tolist():
        text_right = c0_i0 > c1_i0 and c1_i1 > c0_i1
        image_right = c0_i0 > c0_i1 and c1_i1 > c1_i0
        text, image, group = text + text_right, image + image_right, group + (text_right and image_right)
    found = winoground_scores(table, kinds)
    by_kind = found.pop("by_kind")
    share = {name: count / len(rows) for name, count in (("text", text), ("image", image), ("group", group))}
    assert found == pytest.approx(
        {"num_examples": len(rows)} | {f"{name}_score": value for name, value in share.items()}
    )
    for kind, scores in by_kind.items():
        of_kind = [one for one, its in zip(rows, kinds, strict=True) if its == kind]
        assert scores == winoground_scores(np.array(of_kind).reshape(-1, 2, 2))


def test_winoground_worked_by_hand():
    # The right caption for each image, but the first image for both captions.
    only_text = [[0.9, 0.8], [0.1, 0.2]]
    only_image = [[0.9, 0.1], [0.8, 0.2]]
    names = ("text_score", "image_score", "group_score")
    measured = lambda table: tuple(winoground_scores([table])[name] for name in names)
    assert measured(only_text) == (1, 0, 0) and measured(only_image) == (0, 1, 0)
    assert measured([[0.9, 0.1], [0.2, 0.8]]) == (1, 1, 1)
    assert measured([[0.5, 0.5], [0.5, 0.5]]) == (0, 0, 0)


def test_winoground_by_chance():
    table = np.random.default_rng(0).random((40_000, 2, 2))
    found = winoground_scores(table)
    chance = {"text_score": 1 / 4, "image_score": 1 / 4, "group_score": 1 / 6}
    assert {name: found[name] for name in chance} == pytest.approx(chance, abs=0.01)


KINDS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.sampled_from(KINDS)), min_size=1))
def test_sugarcrepe_is_measured_as_by_a_slow_loop(rows):
    found = sugarcrepe_scores([row[:2] for row in rows], [kind for *_, kind in rows])
    files = {}
    for caption, negative, kind in rows:
        files.setdefault(kind, []).append(1 if caption > negative else 0)
    metrics = {kind: sum(right) / len(right) for kind, right in files.items()}
    categories = {}
    for kind, accuracy in metrics.items():
        categories.setdefault(kind.split("_")[0], []).append(accuracy)
    means = {category: sum(values) / len(values) for category, values in categories.items()}
    assert found["by_kind"] == pytest.approx(metrics) and list(found["by_kind"]) == sorted(metrics)
    assert found["by_category"] == pytest.approx(means)
    assert found["accuracy"] == pytest.approx(sum(means.values()) / len(means))
    assert found["num_examples"] == len(rows)


@pytest.mark.parametrize(
    ("measure", "error", "message"),
    [
        (lambda: statement_scores([], []), ValueError, "predictions: got an empty list"),
        (lambda: statement_scores(["a"], []), ValueError, "references: expected one per statement, got 0 for 1"),
        (lambda: statement_scores(["a"], ["a"], groups=[]), ValueError, "groups: expected one per statement, got 0"),
        (lambda: statement_scores(["a"], ["a"], kinds=[1, 2]), ValueError, "kinds: expected one per statement, got 2"),
        (
            lambda: statement_scores(["a"], [None]),
            TypeError,
            "references: expected a label .* got None for statement 0",
        ),
        (lambda: statement_scores(["a", 0.7], ["a"] * 2), TypeError, "predictions: .* got 0.7 for statement 1"),
        (lambda: statement_scores(["a"], [" "]), ValueError, "references: got an empty label for statement 0"),
        (
            lambda: statement_scores(["a"] * 2, ["a"] * 2, groups=["g", math.nan]),
            ValueError,
            "groups: got NaN for statement 1; give None where there is none",
        ),
        (lambda: statement_scores(["a"], ["a"], kinds=[math.nan]), ValueError, "kinds: got NaN for statement 0"),
        (lambda: sugarcrepe_scores([[1, 2]], [math.nan]), ValueError, "kinds: got NaN for example 0"),
        (lambda: winoground_scores([[0.1, 0.2]]), ValueError, r"scores: expected shape \(N, 2, 2\).*, got \(1, 2\)"),
        (lambda: winoground_scores([]), ValueError, r"scores: expected shape \(N, 2, 2\)"),
        (lambda: winoground_scores([[[1, 2], [3]]]), TypeError, "scores: expected a score for each of two images"),
        (lambda: winoground_scores([[[1] * 2] * 2, [[1, math.nan]] * 2]), ValueError, "scores: NaN .* of example 1"),
        (lambda: winoground_scores([[[1] * 2] * 2], [None] * 2), ValueError, "kinds: expected one per example, got 2"),
        (lambda: sugarcrepe_scores([[1, 2, 3]], ["a"]), ValueError, r"scores: expected shape \(N, 2\)"),
        (lambda: sugarcrepe_scores([[1, 2]], []), ValueError, "kinds: expected one per example, got 0 for 1"),
    ],
)
def test_errors_name_the_argument_and_the_item(measure, error, message):
    with pytest.raises(error, match=message):
        measure()
