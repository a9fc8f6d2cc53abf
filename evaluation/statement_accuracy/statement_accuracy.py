from hivilt.evaluation.modules import FunctionMetric
from hivilt.evaluation.reasoning import statement_scores


class StatementAccuracy(FunctionMetric):
    """Accuracy of labels of statements about images, and consistency as NLVR2 measures it: the share of groups of statements,
    such as the same sentence about several pairs of images, that are all right.

    >>> statements = evaluate.load("evaluation/statement_accuracy")
    >>> statements.compute(predictions=["True", "true"], references=["True", "False"], groups=["a", "a"])["consistency"]
    0.0
    """

    function = staticmethod(statement_scores)
    citation = (
        "Suhr et al. 2019, A Corpus for Reasoning About Natural Language Grounded in Photographs, "
        "https://arxiv.org/abs/1811.00491"
    )
