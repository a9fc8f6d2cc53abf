"""VizWiz's metrics for the `evaluate` library, a thin layer over `hivilt.evaluation.vqa_benchmarks.vizwiz_metrics`.

`evaluate.load` copies this file alone into its cache, so the function itself stays in the installed package.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from hivilt.evaluation.vqa_benchmarks import vizwiz_metrics

_DESCRIPTION = """
The metrics of both tasks of VizWiz-VQA, as its tool counts them: VQA accuracy, with the predictions normalized and the
people's answers as they are, and average precision and F1 of telling which questions cannot be answered.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each question the answer to judge.
    references: for each question what people said, with repetitions.
    answer_types: for each question "yes/no", "number", "other" or "unanswerable"; None where it is not known. Optional.
    unanswerable_scores: for each question the probability, in [0, 1], that it cannot be answered. Optional.
    answerable: for each question 1 or 0, whether it can be answered; left out, `answer_types` tell. Optional.

Returns:
    vqa_accuracy: a float in [0, 1], the mean over the questions.
    by_answer_type: where types are given, a dict of the mean of each.
    answerable_vqa_accuracy: the mean without unanswerable questions, where it is known which these are.
    answerability_average_precision, answerability_f1: where `unanswerable_scores` are given and some question is
        unanswerable, the positive class; F1 is at a threshold of 0.5.

Raises:
    ValueError: there is no question, lengths differ, a question has no answer, a score or a flag is out of its range,
        or there are scores but neither `answerable` nor `answer_types`.

Examples:

    >>> accuracy = evaluate.load("evaluation/vizwiz_accuracy")
    >>> accuracy.compute(predictions=["a can", "soda"], references=[10 * ["can"], 9 * ["unanswerable"] + ["soda"]])
    {'vqa_accuracy': 0.65}
"""

_CITATION = """
@inproceedings{gurari2018vizwiz,
    title = {{VizWiz} Grand Challenge: Answering Visual Questions from Blind People},
    author = {Gurari, Danna and Li, Qing and Stangl, Abigale J. and Guo, Anhong and Lin, Chi and Grauman, Kristen and
        Luo, Jiebo and Bigham, Jeffrey P.},
    booktitle = {Conference on Computer Vision and Pattern Recognition},
    year = {2018},
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class VizwizAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
            reference_urls=["https://arxiv.org/abs/1802.08218"],
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[list[str]],
        answer_types: Sequence[str | None] | None = None,
        unanswerable_scores: Sequence[float] | None = None,
        answerable: Sequence[bool | int] | None = None,
    ) -> dict[str, Any]:
        return vizwiz_metrics(predictions, references, answer_types, unanswerable_scores, answerable)
