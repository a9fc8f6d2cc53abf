from hivilt.evaluation.modules import ANSWERS, FunctionMetric
from hivilt.evaluation.vqa_benchmarks import vizwiz_metrics


class VizwizAccuracy(FunctionMetric):
    """VQA accuracy on VizWiz-VQA, and average precision and F1 of telling which questions cannot be answered.

    >>> accuracy = evaluate.load("evaluation/vizwiz_accuracy")
    >>> accuracy.compute(predictions=["a can", "soda"], references=[10 * ["can"], 9 * ["unanswerable"] + ["soda"]])
    {'vqa_accuracy': 0.65}
    """

    function = staticmethod(vizwiz_metrics)
    features = ANSWERS
    citation = "Gurari et al. 2018, VizWiz Grand Challenge: Answering Visual Questions from Blind People, https://arxiv.org/abs/1802.08218"
