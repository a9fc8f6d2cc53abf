from hivilt.evaluation.modules import FunctionMetric
from hivilt.evaluation.vqa_benchmarks import gqa_metrics


class GQAAccuracy(FunctionMetric):
    """Accuracy as GQA's tool counts it, by type of question, and of open and binary questions.

    >>> accuracy = evaluate.load("evaluation/gqa_accuracy")
    >>> accuracy.compute(predictions=["yes", "Left"], references=["yes", "left"])
    {'accuracy': 0.5}
    """

    function = staticmethod(gqa_metrics)
    citation = (
        "Hudson and Manning 2019, GQA: A New Dataset for Real-World Visual Reasoning, https://arxiv.org/abs/1902.09506"
    )
