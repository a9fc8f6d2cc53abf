import datasets

from hivilt.evaluation.grounding import grounding_scores
from hivilt.evaluation.modules import FunctionMetric

BOXES = datasets.Sequence(datasets.Sequence(datasets.Value("float64")))


class GroundingAccuracy(FunctionMetric):
    """What the boxes predicted for expressions are worth: Acc@0.5 and mean IoU as on RefCOCO, the pointing game, and as on
    gRefCOCO whether a model answers with no box, or with all of several.

    >>> grounding = evaluate.load("evaluation/grounding_accuracy")
    >>> grounding.compute(
    ...     predictions=[{"boxes": [[0, 0, 10, 10]], "scores": [0.9]}, {"boxes": [], "scores": []}],
    ...     references=[[[0, 0, 10, 8]], []],
    ... )["mean_iou"]
    0.8
    """

    function = staticmethod(grounding_scores)
    features = datasets.Features(
        predictions={"boxes": BOXES, "scores": datasets.Sequence(datasets.Value("float64"))}, references=BOXES
    )
    citation = "Yu et al. 2016, Modeling Context in Referring Expressions, https://arxiv.org/abs/1608.00272"
