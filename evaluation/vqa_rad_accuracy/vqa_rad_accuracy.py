"""VQA-RAD's accuracy for the `evaluate` library, a thin layer over `hivilt.evaluation.vqa_benchmarks.vqa_rad_metrics`.

`evaluate.load` copies this file alone into its cache, so the function itself stays in the installed package.
"""

from collections.abc import Sequence

import datasets
import evaluate

from hivilt.evaluation.vqa_benchmarks import vqa_rad_metrics

_DESCRIPTION = """
Accuracy on VQA-RAD as papers report it: the share of the predictions that are the answer but for case and spaces, of
all questions, of open and of closed ones.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each question the answer to judge.
    references: for each question its answer.
    answer_types: for each question "OPEN" or "CLOSED".

Returns:
    accuracy, open_accuracy, closed_accuracy: floats in [0, 1], the last two where there are such questions.
    num_open, num_closed: how many there are.

Raises:
    ValueError: there is no question, lengths differ, or a type is another one.

Examples:

    >>> accuracy = evaluate.load("evaluation/vqa_rad_accuracy")
    >>> accuracy.compute(predictions=["Yes"], references=["yes"], answer_types=["CLOSED"])
    {'accuracy': 1.0, 'closed_accuracy': 1.0, 'num_open': 0, 'num_closed': 1}
"""

_CITATION = """
@article{lau2018vqarad,
    title = {A Dataset of Clinically Generated Visual Questions and Answers about Radiology Images},
    author = {Lau, Jason J. and Gayen, Soumya and Ben Abacha, Asma and Demner-Fushman, Dina},
    journal = {Scientific Data},
    year = {2018},
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class VqaRadAccuracy(evaluate.Metric):
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
            reference_urls=["https://doi.org/10.1038/sdata.2018.251"],
        )

    def _compute(self, predictions: list[str], references: list[str], answer_types: Sequence[str]) -> dict[str, float]:
        return vqa_rad_metrics(predictions, references, answer_types)
