"""Recall@K of image-text retrieval for the `evaluate` library, a thin layer over `hivilt.evaluation.retrieval`.

`evaluate.load` copies this file alone into its cache, so the function itself stays in the installed package.
"""

from collections.abc import Sequence

import datasets
import evaluate

from hivilt.evaluation.retrieval import recall_at_k

_DESCRIPTION = """
Recall@K as papers on image-text retrieval count it: the share of the queries with any of their right candidates among
their K best ones. It is a hit rate; a query's hits are not divided by the number of its right candidates.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each query the ids of candidates that were found, best first. Lists may differ in length; what is
        not in a list was not found, so list at least the largest of `ks`, or all candidates.
    references: for each query the ids of the candidates that are right, one or more, in any order.
    ks: the cut-offs, each at least 1. Defaults to 1, 5 and 10.

Returns:
    recall@k for each of `ks`: a float in [0, 1], out of all queries.

Raises:
    ValueError: there is no query, predictions and references differ in length, a query has no right candidate, or
        `ks` is empty or holds one below 1.

Examples:

    >>> recall = evaluate.load("evaluation/retrieval_recall")
    >>> recall.compute(predictions=[[2, 0, 1], [1, 2, 0]], references=[[0, 1], [1]], ks=[1, 2])
    {'recall@1': 0.5, 'recall@2': 1.0}
"""

_CITATION = """
@inproceedings{faghri2018vsepp,
    title = {{VSE++}: Improving Visual-Semantic Embeddings with Hard Negatives},
    author = {Faghri, Fartash and Fleet, David J. and Kiros, Jamie Ryan and Fidler, Sanja},
    booktitle = {British Machine Vision Conference},
    year = {2018},
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RetrievalRecall(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
            reference_urls=["https://arxiv.org/abs/1707.05612"],
        )

    def _compute(
        self, predictions: list[list[int]], references: list[list[int]], ks: Sequence[int] = (1, 5, 10)
    ) -> dict[str, float]:
        return recall_at_k(predictions, references, ks)
