from hivilt.evaluation.modules import ANSWERS, FunctionMetric
from hivilt.evaluation.vqa_benchmarks import textvqa_metrics


class TextvqaAccuracy(FunctionMetric):
    """VQA accuracy as TextVQA's evaluator (in MMF) counts it.

    >>> accuracy = evaluate.load("evaluation/textvqa_accuracy")
    >>> accuracy.compute(predictions=["Levi's"], references=[["levi's", "levis"] + 8 * ["levi 's"]])
    {'vqa_accuracy': 1.0}
    """

    function = staticmethod(textvqa_metrics)
    features = ANSWERS
    citation = "Singh et al. 2019, Towards VQA Models That Can Read, https://arxiv.org/abs/1904.08920"
