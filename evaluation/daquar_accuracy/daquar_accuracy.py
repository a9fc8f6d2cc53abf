from hivilt.evaluation.modules import FunctionMetric
from hivilt.evaluation.vqa_benchmarks import daquar_metrics
from hivilt.evaluation.wups import wordnet_similarity


class DaquarAccuracy(FunctionMetric):
    """Accuracy on DAQUAR, and, where NLTK's WordNet is installed, WUPS at 0.9 and at 0.0.

    >>> accuracy = evaluate.load("evaluation/daquar_accuracy")
    >>> accuracy.compute(predictions=["table, chair"], references=["chair, table"])["accuracy"]
    1.0
    """

    function = staticmethod(daquar_metrics)
    citation = "Malinowski and Fritz 2014, A Multi-World Approach to Question Answering about Real-World Scenes, https://arxiv.org/abs/1410.0210"

    def _compute(self, predictions: list[str], references: list[str], similarity=None) -> dict[str, float]:
        return super()._compute(predictions, references, similarity=similarity or wordnet_similarity())
