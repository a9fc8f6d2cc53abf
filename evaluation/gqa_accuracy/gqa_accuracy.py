from hivilt.evaluation.modules import ANSWER, FunctionMetric
from hivilt.evaluation.vqa_benchmarks import gqa_metrics


class GQAAccuracy(FunctionMetric):
    """Accuracy as GQA's tool counts it, by type of question, and of open and binary questions.

    >>> accuracy = evaluate.load("evaluation/gqa_accuracy")
    >>> accuracy.compute(predictions=["yes", "Left"], references=["yes", "left"])
    {'accuracy': 0.5}
    """

    function = staticmethod(gqa_metrics)
    features = ANSWER
    reference_urls = ["https://arxiv.org/abs/1902.09506"]
    citation = """@inproceedings{hudson2019gqa,
    title = {{GQA}: A New Dataset for Real-World Visual Reasoning and Compositional Question Answering},
    author = {Hudson, Drew A. and Manning, Christopher D.},
    booktitle = {Conference on Computer Vision and Pattern Recognition}, year = {2019},
}"""
