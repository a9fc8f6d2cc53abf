from hivilt.evaluation.captioning import caption_scores
from hivilt.evaluation.modules import ANSWERS, FunctionMetric


class CaptionScores(FunctionMetric):
    """BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D of image captions, equal to coco-caption's and without Java.

    >>> captions = evaluate.load("evaluation/caption_scores")
    >>> round(captions.compute(predictions=["A dog.", "a cat"], references=[["a dog"], ["the cat"]])["cider_d"], 3)
    3.125
    """

    function = staticmethod(caption_scores)
    features = ANSWERS
    citation = "Chen et al. 2015, Microsoft COCO Captions: Data Collection and Evaluation Server, https://arxiv.org/abs/1504.00325"
