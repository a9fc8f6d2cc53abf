from hivilt.evaluation.modules import ANSWERS, FunctionMetric
from hivilt.evaluation.vqa_benchmarks import textvqa_metrics


class TextvqaAccuracy(FunctionMetric):
    """VQA accuracy as TextVQA's evaluator (in MMF) counts it.

    >>> accuracy = evaluate.load("evaluation/textvqa_accuracy")
    >>> accuracy.compute(predictions=["Levi's"], references=[["levi's", "levis"] + 8 * ["levi 's"]])
    {'vqa_accuracy': 1.0}
    """

    function = staticmethod(textvqa_metrics)
    features = ANSWERS
    reference_urls = ["https://arxiv.org/abs/1904.08920"]
    citation = """@inproceedings{singh2019textvqa,
    title = {Towards {VQA} Models That Can Read},
    author = {Singh, Amanpreet and Natarajan, Vivek and Shah, Meet and Jiang, Yu and Chen, Xinlei and Batra, Dhruv and
        Parikh, Devi and Rohrbach, Marcus},
    booktitle = {Conference on Computer Vision and Pattern Recognition}, year = {2019},
}"""
