from hivilt.evaluation.modules import FunctionMetric
from hivilt.evaluation.vqa_benchmarks import vqa_rad_metrics


class VqaRadAccuracy(FunctionMetric):
    """Accuracy on VQA-RAD as papers report it, of all questions, of open and of closed ones.

    >>> accuracy = evaluate.load("evaluation/vqa_rad_accuracy")
    >>> accuracy.compute(predictions=["Yes"], references=["yes"], answer_types=["CLOSED"])
    {'accuracy': 1.0, 'closed_accuracy': 1.0, 'num_open': 0, 'num_closed': 1}
    """

    function = staticmethod(vqa_rad_metrics)
    citation = "Lau et al. 2018, A Dataset of Clinically Generated Visual Questions and Answers about Radiology Images, https://doi.org/10.1038/sdata.2018.251"
