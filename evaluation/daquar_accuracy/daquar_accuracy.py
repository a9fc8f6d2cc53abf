from hivilt.evaluation.modules import ANSWER, FunctionMetric
from hivilt.evaluation.vqa_benchmarks import daquar_metrics
from hivilt.evaluation.wups import wordnet_similarity


class DaquarAccuracy(FunctionMetric):
    """Accuracy on DAQUAR: the share of the predictions that have the items of the answer, in any order. Where NLTK's
    WordNet is installed also WUPS at 0.9 and at 0.0, by which an answer that means nearly the same counts in part.

    >>> accuracy = evaluate.load("evaluation/daquar_accuracy")
    >>> accuracy.compute(predictions=["table, chair"], references=["chair, table"])["accuracy"]
    1.0
    """

    function = staticmethod(daquar_metrics)
    features = ANSWER
    reference_urls = ["https://arxiv.org/abs/1410.0210"]
    citation = """@inproceedings{malinowski2014daquar,
    title = {A Multi-World Approach to Question Answering about Real-World Scenes based on Uncertain Input},
    author = {Malinowski, Mateusz and Fritz, Mario},
    booktitle = {Advances in Neural Information Processing Systems 27}, year = {2014},
}"""

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return super()._compute(predictions, references, similarity=wordnet_similarity())
