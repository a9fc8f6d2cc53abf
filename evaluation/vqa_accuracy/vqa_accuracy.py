from hivilt.evaluation.modules import ANSWERS, FunctionMetric
from hivilt.evaluation.vqa_benchmarks import vqav2_metrics


class VQAAccuracy(FunctionMetric):
    """VQA accuracy: a prediction that k of ten people gave earns 0, 0.3, 0.6, 0.9 or 1 for k = 0, 1, 2, 3, 4 or more,
    normalized as the official tool does.

    >>> accuracy = evaluate.load("evaluation/vqa_accuracy")
    >>> accuracy.compute(predictions=["A dog."], references=[["dog", "dog", "puppy"] + 7 * ["cat"]])
    {'vqa_accuracy': 0.6}
    """

    function = staticmethod(vqav2_metrics)
    features = ANSWERS
    citation = "Antol et al. 2015, VQA: Visual Question Answering, https://arxiv.org/abs/1505.00468"
