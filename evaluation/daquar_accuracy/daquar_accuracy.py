"""DAQUAR's accuracy and WUPS for the `evaluate` library, a thin layer over `hivilt.evaluation.vqa_benchmarks.daquar_metrics`.

`evaluate.load` copies this file alone into its cache, so the function itself stays in the installed package.
"""

import datasets
import evaluate

from hivilt.evaluation.vqa_benchmarks import daquar_metrics
from hivilt.evaluation.wups import wordnet_similarity

_DESCRIPTION = """
Accuracy on DAQUAR: the share of the predictions that have the items of the answer, in any order. Where NLTK's WordNet is
installed also WUPS at 0.9 and at 0.0, by which an answer that means nearly the same counts in part.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each question the answer to judge, the items of a list with commas between.
    references: for each question its answer.

Returns:
    accuracy: float in [0, 1].
    wups_0.9, wups_0.0: floats in [0, 1], where NLTK's WordNet is installed.

Raises:
    ValueError: there is no question, or lengths differ.

Examples:

    >>> accuracy = evaluate.load("evaluation/daquar_accuracy")
    >>> accuracy.compute(predictions=["table, chair"], references=["chair, table"])["accuracy"]
    1.0
"""

_CITATION = """
@inproceedings{malinowski2014daquar,
    title = {A Multi-World Approach to Question Answering about Real-World Scenes based on Uncertain Input},
    author = {Malinowski, Mateusz and Fritz, Mario},
    booktitle = {Advances in Neural Information Processing Systems 27},
    year = {2014},
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class DaquarAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Value("string"),
                }
            ),
            reference_urls=["https://arxiv.org/abs/1410.0210"],
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return daquar_metrics(predictions, references, wordnet_similarity())
