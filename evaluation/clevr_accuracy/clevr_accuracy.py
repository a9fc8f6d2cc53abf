from hivilt.evaluation.modules import FunctionMetric
from hivilt.evaluation.vqa_benchmarks import clevr_metrics


class CLEVRAccuracy(FunctionMetric):
    """Accuracy on CLEVR: the share of the predictions that are the answer letter by letter, by family of question.

    >>> accuracy = evaluate.load("evaluation/clevr_accuracy")
    >>> accuracy.compute(predictions=["2", "cube"], references=["2", "sphere"], families=["count", "query_attribute"])
    {'accuracy': 0.5, 'by_family': {'count': 1.0, 'query_attribute': 0.0}}
    """

    function = staticmethod(clevr_metrics)
    citation = (
        "Johnson et al. 2017, CLEVR: A Diagnostic Dataset for Compositional Language and Elementary Visual Reasoning"
    )
