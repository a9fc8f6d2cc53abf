"""TextVQA's accuracy for the `evaluate` library, a thin layer over `hivilt.evaluation.vqa_benchmarks.textvqa_metrics`.

`evaluate.load` copies this file alone into its cache, so the function itself stays in the installed package.
"""

import datasets
import evaluate

from hivilt.evaluation.vqa_benchmarks import textvqa_metrics

_DESCRIPTION = """
VQA accuracy as TextVQA's evaluator (in MMF) counts it: both sides are always normalized, after a tokenizer that deletes
commas and question marks and splits off "'s".
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each question the answer to judge.
    references: for each question what people said, with repetitions; ten of them, or fewer that stand for ten.

Returns:
    vqa_accuracy: a float in [0, 1], the mean over the questions.

Raises:
    ValueError: there is no question, lengths differ, or a question has no answer.

Examples:

    >>> accuracy = evaluate.load("evaluation/textvqa_accuracy")
    >>> accuracy.compute(predictions=["Levi's"], references=[["levi's", "levis"] + 8 * ["levi 's"]])
    {'vqa_accuracy': 1.0}
"""

_CITATION = """
@inproceedings{singh2019textvqa,
    title = {Towards {VQA} Models That Can Read},
    author = {Singh, Amanpreet and Natarajan, Vivek and Shah, Meet and Jiang, Yu and Chen, Xinlei and Batra, Dhruv and
        Parikh, Devi and Rohrbach, Marcus},
    booktitle = {Conference on Computer Vision and Pattern Recognition},
    year = {2019},
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class TextvqaAccuracy(evaluate.Metric):
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
            reference_urls=["https://arxiv.org/abs/1904.08920"],
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        return textvqa_metrics(predictions, references)
