"""VQA accuracy for the `evaluate` library, a thin layer over `hivilt.evaluation.vqa_benchmarks.vqav2_metrics`.

`evaluate.load` copies this file alone into its cache, so the function itself stays in the installed package.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from hivilt.evaluation.vqa import Normalization
from hivilt.evaluation.vqa_benchmarks import vqav2_metrics

_DESCRIPTION = """
VQA accuracy: a prediction that k of ten people gave earns 0, 0.3, 0.6, 0.9 or 1 for k = 0, 1, 2, 3, 4 or more, the
mean over the ten ways to leave one of them out of min(k / 3, 1). Both sides are normalized as the official tool does.
VQAv2 and OK-VQA are scored by it.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each question the answer to judge.
    references: for each question what people said, with repetitions; ten of them, or fewer that stand for ten.
    normalization: "official", the VQA tool since 2021, which compares unanimous answers untouched; "legacy", the tool
        until then; "always", both sides in full; "mmf" or "vizwiz", these tools' own. Defaults to "official".
    answer_types: for each question "yes/no", "number" or "other"; None where it is not known. Optional.
    question_types: for each question how it begins; None where it is not known. Optional.

Returns:
    vqa_accuracy: a float in [0, 1], the mean over the questions.
    by_answer_type, by_question_type: where types are given, a dict of the mean of each.

Raises:
    ValueError: there is no question, lengths differ, a question has no answer, or `normalization` is unknown.

Examples:

    >>> accuracy = evaluate.load("evaluation/vqa_accuracy")
    >>> accuracy.compute(predictions=["A dog."], references=[["dog", "dog", "puppy"] + 7 * ["cat"]])
    {'vqa_accuracy': 0.6}
"""

_CITATION = """
@inproceedings{antol2015vqa,
    title = {{VQA}: Visual Question Answering},
    author = {Antol, Stanislaw and Agrawal, Aishwarya and Lu, Jiasen and Mitchell, Margaret and Batra, Dhruv and
        Zitnick, C. Lawrence and Parikh, Devi},
    booktitle = {International Conference on Computer Vision},
    year = {2015},
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class VQAAccuracy(evaluate.Metric):
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
            reference_urls=["https://arxiv.org/abs/1505.00468", "https://visualqa.org/evaluation"],
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[list[str]],
        normalization: Normalization = "official",
        answer_types: Sequence[str | None] | None = None,
        question_types: Sequence[str | None] | None = None,
    ) -> dict[str, Any]:
        return vqav2_metrics(predictions, references, normalization, answer_types, question_types)
