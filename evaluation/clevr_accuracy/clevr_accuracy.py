"""CLEVR's accuracy for the `evaluate` library, a thin layer over `hivilt.evaluation.vqa_benchmarks.clevr_metrics`.

`evaluate.load` copies this file alone into its cache, so the function itself stays in the installed package.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from hivilt.evaluation.vqa_benchmarks import clevr_metrics

_DESCRIPTION = """
Accuracy on CLEVR: the share of the predictions that are the answer letter by letter, by family of question.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each question the answer to judge.
    references: for each question its answer.
    families: for each question "exist", "count", "compare_integer", "query_attribute" or "compare_attribute"; None
        where it is not known. Optional.

Returns:
    accuracy: a float in [0, 1].
    by_family: where families are given, a dict of the accuracy of each.

Raises:
    ValueError: there is no question, or lengths differ.

Examples:

    >>> accuracy = evaluate.load("evaluation/clevr_accuracy")
    >>> accuracy.compute(predictions=["2", "cube"], references=["2", "sphere"], families=["count", "query_attribute"])
    {'accuracy': 0.5, 'by_family': {'count': 1.0, 'query_attribute': 0.0}}
"""

_CITATION = """
@inproceedings{johnson2017clevr,
    title = {{CLEVR}: A Diagnostic Dataset for Compositional Language and Elementary Visual Reasoning},
    author = {Johnson, Justin and Hariharan, Bharath and van der Maaten, Laurens and Fei-Fei, Li and
        Zitnick, C. Lawrence and Girshick, Ross},
    booktitle = {Conference on Computer Vision and Pattern Recognition},
    year = {2017},
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class CLEVRAccuracy(evaluate.Metric):
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
            reference_urls=["https://arxiv.org/abs/1612.06890"],
        )

    def _compute(
        self, predictions: list[str], references: list[str], families: Sequence[str | None] | None = None
    ) -> dict[str, Any]:
        return clevr_metrics(predictions, references, families)
