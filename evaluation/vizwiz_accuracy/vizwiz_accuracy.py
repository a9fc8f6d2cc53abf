from hivilt.evaluation.modules import ANSWERS, FunctionMetric
from hivilt.evaluation.vqa_benchmarks import vizwiz_metrics


class VizwizAccuracy(FunctionMetric):
    """VQA accuracy on VizWiz-VQA, and average precision and F1 of telling which questions cannot be answered.

    >>> accuracy = evaluate.load("evaluation/vizwiz_accuracy")
    >>> accuracy.compute(predictions=["a can", "soda"], references=[10 * ["can"], 9 * ["unanswerable"] + ["soda"]])
    {'vqa_accuracy': 0.65}
    """

    function = staticmethod(vizwiz_metrics)
    features = ANSWERS
    reference_urls = ["https://arxiv.org/abs/1802.08218"]
    citation = """@inproceedings{gurari2018vizwiz,
    title = {{VizWiz} Grand Challenge: Answering Visual Questions from Blind People},
    author = {Gurari, Danna and Li, Qing and Stangl, Abigale J. and Guo, Anhong and Lin, Chi and Grauman, Kristen and
        Luo, Jiebo and Bigham, Jeffrey P.},
    booktitle = {Conference on Computer Vision and Pattern Recognition}, year = {2018},
}"""
