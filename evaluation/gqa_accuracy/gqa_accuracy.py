"""GQA's accuracy for the `evaluate` library, a thin layer over `hivilt.evaluation.vqa_benchmarks.gqa_metrics`.

`evaluate.load` copies this file alone into its cache, so the function itself stays in the installed package.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from hivilt.evaluation.vqa_benchmarks import gqa_metrics

_DESCRIPTION = """
Accuracy as GQA's tool counts it: the share of the predictions that are the answer letter by letter, case included, of
the questions of a balanced split; by type of question, and of open and binary questions.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each question the answer to judge.
    references: for each question its answer.
    structural: for each question "verify", "query", "choose", "logical" or "compare"; None where it is not known.
        Optional.
    semantic: for each question "obj", "attr", "cat", "rel" or "global"; None where it is not known. Optional.
    detailed: for each question its detailed type; None where it is not known. Optional.

Returns:
    accuracy: a float in [0, 1].
    by_structural, by_semantic, by_detailed: where types are given, a dict of the accuracy of each.
    open_accuracy, binary_accuracy: where structural types are given, of "query" questions and of all others.

Raises:
    ValueError: there is no question, or lengths differ.

Examples:

    >>> accuracy = evaluate.load("evaluation/gqa_accuracy")
    >>> accuracy.compute(predictions=["yes", "Left"], references=["yes", "left"])
    {'accuracy': 0.5}
"""

_CITATION = """
@inproceedings{hudson2019gqa,
    title = {{GQA}: A New Dataset for Real-World Visual Reasoning and Compositional Question Answering},
    author = {Hudson, Drew A. and Manning, Christopher D.},
    booktitle = {Conference on Computer Vision and Pattern Recognition},
    year = {2019},
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class GQAAccuracy(evaluate.Metric):
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
            reference_urls=["https://arxiv.org/abs/1902.09506"],
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        structural: Sequence[str | None] | None = None,
        semantic: Sequence[str | None] | None = None,
        detailed: Sequence[str | None] | None = None,
    ) -> dict[str, Any]:
        return gqa_metrics(predictions, references, structural, semantic, detailed)
