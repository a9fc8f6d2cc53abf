import datasets

from hivilt.evaluation.modules import FunctionMetric
from hivilt.evaluation.retrieval import recall_at_k


class RetrievalRecall(FunctionMetric):
    """Recall@K as papers on image-text retrieval count it: the share of the queries with any of their right candidates
    among their K best. It is a hit rate; a query's hits are not divided by the number of its right candidates.

    >>> recall = evaluate.load("evaluation/retrieval_recall")
    >>> recall.compute(predictions=[[2, 0, 1], [1, 2, 0]], references=[[0, 1], [1]], ks=[1, 2])
    {'recall@1': 0.5, 'recall@2': 1.0}
    """

    function = staticmethod(recall_at_k)
    features = datasets.Features(
        predictions=datasets.Sequence(datasets.Value("int64")), references=datasets.Sequence(datasets.Value("int64"))
    )
    citation = "Faghri et al. 2018, VSE++: Improving Visual-Semantic Embeddings with Hard Negatives, https://arxiv.org/abs/1707.05612"
