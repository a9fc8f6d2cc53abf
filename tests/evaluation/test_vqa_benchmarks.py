"""The official metrics against tables worked out by hand."""

import pytest

from hivilt.evaluation.vqa import accuracy_by_type
from hivilt.evaluation.vqa_benchmarks import (
    clevr_metrics,
    daquar_metrics,
    gqa_metrics,
    textvqa_metrics,
    vizwiz_metrics,
    vqa_rad_metrics,
    vqav2_metrics,
)


def test_accuracy_by_type():
    by_type = accuracy_by_type([1, 0, 0.3, 0.5, 1], ["yes/no", "yes/no", "number", None, "a"])
    assert list(by_type.items()) == [("a", 1), ("number", 0.3), ("yes/no", 0.5)]
    assert accuracy_by_type([1], [None]) == {}
    with pytest.raises(ValueError, match="types: expected one per question, got 1 for 2"):
        accuracy_by_type([1, 0], ["yes/no"])


def test_vqav2():
    predictions = ["Yes", "2", "red", "red"]
    answers = [["yes"] * 10, ["two"] * 5 + ["2"] * 5, ["red"] * 2 + ["blue"] * 8, ["red"] * 3 + ["Red."] * 7]
    # The first question is unanimous, so that the official tool minds the capital.
    assert vqav2_metrics(predictions, answers) == {"vqa_accuracy": pytest.approx((0 + 1 + 0.6 + 1) / 4)}
    metrics = vqav2_metrics(
        predictions,
        answers,
        "always",
        answer_types=["yes/no", "number", "other", "other"],
        question_types=["is the", "how many", "what color", None],
    )
    assert metrics == {
        "vqa_accuracy": pytest.approx(0.9),
        "by_answer_type": {"number": 1, "other": 0.8, "yes/no": 1},
        "by_question_type": {"how many": 1, "is the": 1, "what color": 0.6},
    }


def test_gqa():
    predictions, answers = ["yes", "Left", "table", "no", "red"], ["yes", "left", "table", "yes", "red"]
    assert gqa_metrics(predictions, answers) == {"accuracy": 0.6}
    metrics = gqa_metrics(
        predictions,
        answers,
        structural=["verify", "choose", "query", "logical", None],
        semantic=["obj", "rel", "cat", "obj", "attr"],
        detailed=["existC", "relChooser", "categoryThat", "existAnd", "existC"],
    )
    assert metrics == {
        "accuracy": 0.6,
        "by_structural": {"choose": 0, "logical": 0, "query": 1, "verify": 1},
        "by_semantic": {"attr": 1, "cat": 1, "obj": 0.5, "rel": 0},
        "by_detailed": {"categoryThat": 1, "existAnd": 0, "existC": 1, "relChooser": 0},
        "open_accuracy": 1,
        "binary_accuracy": pytest.approx(1 / 3),
    }
    assert "open_accuracy" not in gqa_metrics(["yes"], ["yes"], structural=["verify"])
    with pytest.raises(TypeError, match=r"answers: expected one string per question, got \['yes'\]"):
        gqa_metrics(["yes"], [["yes"]])


VIZWIZ = {
    "predictions": ["a can", "Unanswerable.", "soda", "unanswerable"],
    "answers": [
        ["can"] * 3 + ["a can"] * 7,
        ["unanswerable"] * 10,
        ["unanswerable"] * 8 + ["soda"] * 2,
        ["Unanswerable"] * 8 + ["pepsi"] * 2,
    ],
}


def test_vizwiz():
    # The answers are not normalized: "a can" is not "can", and "Unanswerable" not "unanswerable".
    assert vizwiz_metrics(**VIZWIZ) == {"vqa_accuracy": pytest.approx((0.9 + 1 + 0.6 + 0) / 4)}
    types = ["other", "unanswerable", "unanswerable", "other"]
    metrics = vizwiz_metrics(**VIZWIZ, answer_types=types)
    assert metrics["by_answer_type"] == {"other": 0.45, "unanswerable": 0.8}
    assert metrics["answerable_vqa_accuracy"] == 0.45
    # The flags say something else than the types, and they win.
    assert vizwiz_metrics(**VIZWIZ, answer_types=types, answerable=[1, 0, 0, 0])["answerable_vqa_accuracy"] == 0.9
    assert "answerable_vqa_accuracy" not in vizwiz_metrics(**VIZWIZ, answerable=[False] * 4)
    assert "answerable_vqa_accuracy" not in vizwiz_metrics(**VIZWIZ, answer_types=[*types[:3], None])


def test_vizwiz_answerability():
    """Worked by hand: by falling score, the second and the fourth of four questions are unanswerable."""
    metrics = vizwiz_metrics(**VIZWIZ, unanswerable_scores=[0.9, 0.6, 0.5, 0.4], answerable=[1, 0, 1, 0])
    assert metrics["answerability_average_precision"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    # 0.9 and 0.6 are above the threshold, 0.5 is not: precision 1/2, recall 1/2.
    assert metrics["answerability_f1"] == pytest.approx(0.5)
    types = ["other", "unanswerable", "yes/no", "unanswerable"]
    by_types = vizwiz_metrics(**VIZWIZ, unanswerable_scores=[0.9, 0.6, 0.5, 0.4], answer_types=types)
    assert {name: by_types[name] for name in metrics} == metrics
    # Average precision is of the unanswerable questions; there are none.
    answerable = vizwiz_metrics(**VIZWIZ, unanswerable_scores=[0.9, 0.6, 0.5, 0.4], answerable=[1] * 4)
    assert set(answerable) == {"vqa_accuracy", "answerable_vqa_accuracy"}


def test_vizwiz_refuses_what_means_nothing():
    with pytest.raises(ValueError, match="unanswerable_scores: nothing to compare them with"):
        vizwiz_metrics(**VIZWIZ, unanswerable_scores=[0.5] * 4)
    with pytest.raises(ValueError, match=r"unanswerable_scores: expected probabilities in \[0, 1\], got 3.2"):
        vizwiz_metrics(**VIZWIZ, unanswerable_scores=[0.5, 3.2, 0, 0], answerable=[1, 0, 1, 0])
    with pytest.raises(ValueError, match="answerable: expected 1 or 0 for each question, got 2"):
        vizwiz_metrics(**VIZWIZ, answerable=[1, 0, 1, 2])


def test_textvqa():
    answers = [["levi's", "levi 's"] + ["cat"] * 8, ["10,000"] * 10]
    # MMF splits off the 's, so that the first two people agree; "official" would give 0.3 and, for ten equal ones, 0.
    assert textvqa_metrics(["Levi's", "10000"], answers) == {"vqa_accuracy": pytest.approx((0.6 + 1) / 2)}


def test_vqa_rad():
    metrics = vqa_rad_metrics(
        ["Yes", "no", "left  lobe", "the left lobe"],
        ["yes", "yes", "Left lobe ", "left lobe"],
        ["CLOSED", "CLOSED ", "OPEN", "OPEN"],
    )
    assert metrics == {
        "accuracy": 0.5,
        "open_accuracy": 0.5,
        "closed_accuracy": 0.5,
        "num_open": 2,
        "num_closed": 2,
    }
    only_open = vqa_rad_metrics(["chest"], ["chest"], ["OPEN"])
    assert only_open == {"accuracy": 1, "open_accuracy": 1, "num_open": 1, "num_closed": 0}
    with pytest.raises(ValueError, match="answer_types: expected 'OPEN' or 'CLOSED' for each question, got 'other'"):
        vqa_rad_metrics(["chest"], ["chest"], ["other"])
    with pytest.raises(TypeError, match="answer_types: expected one string per question, got None"):
        vqa_rad_metrics(["chest"], ["chest"], [None])


def test_clevr():
    predictions, answers = ["2", "yes", "cube", "Cube"], ["2", "no", "cube", "cube"]
    assert clevr_metrics(predictions, answers) == {"accuracy": 0.5}
    families = ["count", "exist", "query_attribute", "query_attribute"]
    assert clevr_metrics(predictions, answers, families) == {
        "accuracy": 0.5,
        "by_family": {"count": 1, "exist": 0, "query_attribute": 0.5},
    }


def test_daquar():
    predictions = ["table, chair", "chair", "garbage_bin", "book", "Chair"]
    answers = ["chair,table", "chair, table", "garbage_bin", "book, book", "chair"]
    # Lists are sets, and nothing else is forgiven.
    assert daquar_metrics(predictions, answers) == {"accuracy": 0.6}
    similarity = {("chair", "table"): 0.8, ("table", "chair"): 0.8, ("Chair", "chair"): 0.95, ("chair", "Chair"): 0.95}
    metrics = daquar_metrics(predictions, answers, lambda one, other: similarity[one, other])
    # 1, 0.08 or 0.8, 1, 1, 0.95
    assert metrics == {
        "accuracy": 0.6,
        "wups_0.9": pytest.approx((3 + 0.08 + 0.95) / 5),
        "wups_0.0": pytest.approx((3 + 0.8 + 0.95) / 5),
    }
    with pytest.raises(TypeError, match="answers: expected one string per question, got None"):
        daquar_metrics(["chair"], [None])


TYPES = [
    *[(vqav2_metrics, name) for name in ("answers", "answer_types", "question_types")],
    *[(gqa_metrics, name) for name in ("answers", "structural", "semantic", "detailed")],
    *[(vizwiz_metrics, name) for name in ("answers", "answer_types", "unanswerable_scores", "answerable")],
    (textvqa_metrics, "answers"),
    *[(vqa_rad_metrics, name) for name in ("answers", "answer_types")],
    *[(clevr_metrics, name) for name in ("answers", "families")],
    (daquar_metrics, "answers"),
]


@pytest.mark.parametrize(("metrics", "name"), TYPES, ids=lambda value: getattr(value, "__name__", value))
def test_every_list_has_one_entry_a_question(metrics, name):
    lists = metrics not in (gqa_metrics, vqa_rad_metrics, clevr_metrics, daquar_metrics)
    given = {"predictions": ["yes"] * 2, "answers": [["yes"] if lists else "yes"] * 2}
    given |= {"answer_types": ["OPEN"] * 2} if metrics is vqa_rad_metrics else {}
    one = given[name][:1] if name in given else ["OPEN"]
    with pytest.raises(ValueError, match=f"^{name}: expected one per question, got 1 for 2 questions"):
        metrics(**{**given, name: one})
    with pytest.raises(ValueError, match="^predictions: got an empty list"):
        metrics(**{key: [] for key in given})
