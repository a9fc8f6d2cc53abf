"""Metrics as `evaluate` users meet them: loaded from their folders, offline, anywhere."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hivilt.evaluation.captioning import caption_scores
from hivilt.evaluation.grounding import grounding_scores
from hivilt.evaluation.reasoning import statement_scores

EVALUATION = Path(__file__).resolve().parents[2] / "evaluation"
# `evaluate` makes the name of a metric from that of its class.
CLASSES = {
    "vqa_accuracy": "VQAAccuracy",
    "gqa_accuracy": "GQAAccuracy",
    "vizwiz_accuracy": "VizwizAccuracy",
    "textvqa_accuracy": "TextvqaAccuracy",
    "vqa_rad_accuracy": "VqaRadAccuracy",
    "clevr_accuracy": "CLEVRAccuracy",
    "daquar_accuracy": "DaquarAccuracy",
    "caption_scores": "CaptionScores",
    "grounding_accuracy": "GroundingAccuracy",
    "statement_accuracy": "StatementAccuracy",
    "retrieval_recall": "RetrievalRecall",
}

# Each metric loaded, and the examples of its own documentation run: [name, examples, failures].
LOAD = """
import doctest, json, sys, evaluate
found = []
for name in sys.argv[1:]:
    metric = evaluate.load(f"evaluation/{name}")
    test = doctest.DocTestParser().get_doctest(metric.inputs_description, {"evaluate": evaluate}, name, None, None)
    result = doctest.DocTestRunner().run(test, out=sys.stderr.write)
    found.append([metric.name, result.attempted, result.failed])
print(json.dumps(found))
"""


@pytest.fixture
def load(tmp_path):
    """Straight from the files: `evaluate.load` would fix the modules cache of this process."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EVALUATION / name / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.__dict__[CLASSES[name]](cache_dir=str(tmp_path))

    return load


@pytest.mark.slow
def test_load_by_their_folders_in_a_new_process(tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf")}
    (tmp_path / "evaluation").symlink_to(EVALUATION)
    process = subprocess.run(
        [sys.executable, "-c", LOAD, *CLASSES],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == [[name, 2, 0] for name in CLASSES], process.stderr


@pytest.mark.parametrize(("normalization", "score"), [("official", 0), ("legacy", 1), ("always", 1), ("vizwiz", 1)])
def test_vqa_accuracy_takes_a_normalization(load, normalization, score):
    metric = load("vqa_accuracy")
    result = metric.compute(predictions=["Yes"], references=[["yes"] * 10], normalization=normalization)
    assert result == {"vqa_accuracy": score}
    assert load("vqa_accuracy").compute(predictions=["Yes"], references=[["yes"] * 10]) == {"vqa_accuracy": 0}


def test_vqa_accuracy_by_types(load):
    metric = load("vqa_accuracy")
    metric.add_batch(predictions=["no", "2"], references=[["no"] * 3 + ["yes"] * 7, ["two", "3"] * 5])
    metric.add(prediction="red", reference=["red"])
    result = metric.compute(answer_types=["yes/no", "number", None], question_types=["is the", "how many", "how many"])
    assert result == {
        "vqa_accuracy": pytest.approx(2.9 / 3),
        "by_answer_type": {"number": 1, "yes/no": 0.9},
        "by_question_type": {"how many": 1, "is the": 0.9},
    }


def test_gqa_accuracy(load):
    given = {"predictions": ["yes", "left", "No"], "references": ["yes", "right", "no"]}
    result = load("gqa_accuracy").compute(
        **given, structural=["verify", "query", "verify"], semantic=["obj"] * 3, detailed=["existC", None, None]
    )
    assert result == {
        "accuracy": pytest.approx(1 / 3),
        "by_structural": {"query": 0, "verify": 0.5},
        "by_semantic": {"obj": pytest.approx(1 / 3)},
        "by_detailed": {"existC": 1},
        "open_accuracy": 0,
        "binary_accuracy": 0.5,
    }


def test_vizwiz_accuracy(load):
    given = {"predictions": ["soda", "unanswerable"], "references": [["soda"] * 10, ["unanswerable"] * 10]}
    result = load("vizwiz_accuracy").compute(
        **given, answer_types=["other", "unanswerable"], unanswerable_scores=[0.2, 0.7], answerable=[1, 0]
    )
    assert result == {
        "vqa_accuracy": 1,
        "by_answer_type": {"other": 1, "unanswerable": 1},
        "answerable_vqa_accuracy": 1,
        "answerability_average_precision": 1,
        "answerability_f1": 1,
    }


def test_caption_scores(load):
    given = {"predictions": ["A dog.", "a cat"], "references": [["a dog"], ["a red cat", "the cat"]]}
    result = load("caption_scores").compute(**given)
    assert result == caption_scores(**given)
    metric = load("caption_scores")
    metric.add_batch(predictions=["A dog."], references=[["a dog"]])
    metric.add(prediction="a cat", reference=["a red cat", "the cat"])
    assert metric.compute() == result


def test_grounding_accuracy(load):
    third = 1 / 3  # not the same in float32
    predictions = [
        {"boxes": [(0, 0, third, 1), (0, 0, 1, 1)], "scores": [0.9, 0.2]},
        {"boxes": [], "scores": []},
        {"boxes": [(0, 0, 9, 9), (20, 0, 30, 10)], "scores": [0.8, 0.7]},
    ]
    references = [[(0, 0, 1, 1)], [], [(20, 0, 30, 10), (0, 0, 10, 10)]]
    options = {"points": [(0.5, 2), None, None], "kinds": ["one", "none", None], "threshold": 0.75}
    expected = grounding_scores(predictions, references, **options)
    assert (expected["mean_iou"], expected["pointing_game"], expected["multi_target_accuracy"]) == (third, 0.5, 0)
    metric = load("grounding_accuracy")
    assert metric.compute(predictions=predictions, references=references, **options) == expected
    metric.add_batch(predictions=predictions[:2], references=references[:2])
    metric.add(prediction=predictions[2], reference=references[2])
    assert metric.compute(**options) == expected
    assert load("grounding_accuracy").compute(predictions=predictions[1:2], references=[[]])["no_target_accuracy"] == 1


def test_statement_accuracy(load):
    predictions, references = ["True", "false", "yes", "False"], ["True", "True", "true", "False"]
    options = {"groups": ["a", "a", "b", None], "kinds": ["one", "two", "one", None]}
    expected = statement_scores(predictions, references, **options)
    assert (expected["accuracy"], expected["consistency"]) == (0.75, 0.5)
    metric = load("statement_accuracy")
    assert metric.compute(predictions=predictions, references=references, **options) == expected
    metric.add_batch(predictions=predictions[:3], references=references[:3])
    metric.add(prediction=predictions[3], reference=references[3])
    assert metric.compute(**options) == expected
    missing = load("statement_accuracy").compute(predictions=["True", None], references=["True", "True"])
    assert missing == {"num_statements": 2, "accuracy": 0.5}


def test_errors_reach_the_user(load):
    with pytest.raises(ValueError, match="groups: expected one per statement, got 1 for 2"):
        load("statement_accuracy").compute(predictions=["a", "b"], references=["a", "b"], groups=["x"])
    with pytest.raises(ValueError, match="^predictions: expected boxes .* for expression 0; turn"):
        predictions = [{"boxes": [(5, 5, 2, 2)], "scores": [0.5]}]
        load("grounding_accuracy").compute(predictions=predictions, references=[[]])
    with pytest.raises(ValueError, match="references: got an empty list for image 1"):
        load("caption_scores").compute(predictions=["a", "b"], references=[["a"], []])
    with pytest.raises(ValueError, match="normalization: expected one of"):
        load("vqa_accuracy").compute(predictions=["a"], references=[["a"]], normalization="none")
    with pytest.raises(ValueError, match="^references: got an empty list for question 1"):
        load("textvqa_accuracy").compute(predictions=["a", "b"], references=[["a"], []])
    with pytest.raises(ValueError, match="families: expected one per question, got 1 for 2"):
        load("clevr_accuracy").compute(predictions=["2", "3"], references=["2", "3"], families=["count"])
    with pytest.raises(ValueError, match="answer_types: expected 'OPEN' or 'CLOSED'"):
        load("vqa_rad_accuracy").compute(predictions=["a"], references=["a"], answer_types=["yes/no"])
    assert load("vqa_rad_accuracy").compute(predictions=["a"], references=["A"]) == {"accuracy": 1}


def test_help_names_the_arguments_of_compute(load):
    with pytest.raises(ValueError, match="^predictions, references: expected one each a query"):
        load("retrieval_recall").compute(predictions=[], references=[])


def test_daquar_takes_another_similarity(load):
    given = {"predictions": ["chair"], "references": ["table"]}
    result = load("daquar_accuracy").compute(**given, similarity=lambda one, other: 0.95)
    assert result == {"accuracy": 0, "wups_0.9": 0.95, "wups_0.0": 0.95}
