"""The metric as `evaluate` users meet it; test_vqa_modules.py loads it by its folder."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "evaluation" / "retrieval_recall"


@pytest.fixture
def metric(tmp_path):
    """Straight from the file: `evaluate.load` would fix the modules cache of this process."""
    spec = importlib.util.spec_from_file_location("retrieval_recall", FOLDER / "retrieval_recall.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RetrievalRecall(cache_dir=str(tmp_path))


def test_queries_come_in_batches_and_one_by_one(metric):
    metric.add_batch(predictions=[[2, 0, 1]], references=[[0, 1]])
    metric.add(prediction=[1, 2, 0], reference=[1])
    assert metric.compute(ks=[1, 2]) == {"recall@1": 0.5, "recall@2": 1.0}


def test_defaults_and_lists_that_differ_in_length(metric):
    result = metric.compute(predictions=[[1], [], [0, 2, 1], [5, 4, 3]], references=[[1, 7], [1], [1], [9]])
    assert result == {"recall@1": 0.25, "recall@5": 0.5, "recall@10": 0.5}


def test_errors_reach_the_user(metric):
    with pytest.raises(ValueError, match="query 1 has none"):
        metric.compute(predictions=[[0], [1]], references=[[0], []])
    with pytest.raises(ValueError, match="ks: got"):
        metric.compute(predictions=[[0]], references=[[0]], ks=[0])
    assert metric.compute(predictions=[[0]], references=[[0]], ks=[1]) == {"recall@1": 1}
