"""The official metrics of the benchmarks of question answering, as pure functions over strings and lists.

All numbers are in [0, 1]:

| benchmark | function | counts |
|---|---|---|
| VQAv2, OK-VQA | `vqav2_metrics` | VQA accuracy, by type of answer and of question |
| GQA | `gqa_metrics` | equal strings, by type of question, open and binary |
| VizWiz | `vizwiz_metrics` | VQA accuracy, and how well unanswerable questions are told apart |
| TextVQA | `textvqa_metrics` | VQA accuracy as MMF normalizes |
| VQA-RAD | `vqa_rad_metrics` | exact match, open and closed |
| CLEVR, Sort-of-CLEVR | `clevr_metrics` | equal strings, by family of question |
| DAQUAR | `daquar_metrics` | equal sets of items, WUPS at 0.9 and 0.0 |

A mean over no questions is left out of what they give.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from hivilt.evaluation.vqa import (
    Normalization,
    accuracy_by_type,
    canonical_answer,
    check_split,
    check_strings,
    vqa_accuracies,
)
from hivilt.evaluation.wups import Similarity, answer_items, wups


def vqav2_metrics(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    normalization: Normalization = "official",
    answer_types: Sequence[str | None] | None = None,
    question_types: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """What the VQAv2 tool reports (GT-Vision-Lab/VQA), as fractions and not rounded; OK-VQA is scored by it too.

    Args:
        predictions: one a question.
        answers: for each question what people said.
        normalization: see `hivilt.evaluation.vqa`.
        answer_types: "yes/no", "number" or "other" for each question; `None` where it is not known.
        question_types: how each question begins, "what color is the"; `None` where it is not known.

    Returns:
        `vqa_accuracy`, and where types are given `by_answer_type` and `by_question_type`, see `accuracy_by_type`.

    Raises:
        TypeError, ValueError: as `vqa_accuracies`, or there is no question, or the lengths differ; names the argument.
    """
    check_split(predictions, answers, answer_types=answer_types, question_types=question_types)
    scores = vqa_accuracies(predictions, answers, normalization)
    return {
        "vqa_accuracy": fmean(scores),
        **_by_types(scores, by_answer_type=answer_types, by_question_type=question_types),
    }


def gqa_metrics(
    predictions: Sequence[str],
    answers: Sequence[str],
    structural: Sequence[str | None] | None = None,
    semantic: Sequence[str | None] | None = None,
    detailed: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """What GQA's tool (Hudson and Manning 2019) reports of answers alone, for the questions of a balanced split.

    A prediction counts if it is the answer letter by letter: nothing is normalized, not even case. Consistency,
    validity, plausibility, grounding and distribution need more than answers and are not measured.

    Args:
        predictions, answers: one a question.
        structural: "verify", "query", "choose", "logical" or "compare" for each question; `None`: not known.
        semantic: "obj", "attr", "cat", "rel" or "global" for each question; `None`: not known.
        detailed: the detailed type of each question; `None`: not known.

    Returns:
        `accuracy`; `by_structural`, `by_semantic`, `by_detailed` where these are given; with `structural` also
        `open_accuracy`, of "query" questions, and `binary_accuracy`, of all others, each where there are any.

    Raises:
        TypeError, ValueError: the lengths differ, there is no question, or one has no string; names the argument.
    """
    check_split(predictions, answers, structural=structural, semantic=semantic, detailed=detailed)
    check_strings("answers", answers)
    scores = _equal(predictions, answers)
    metrics = {
        "accuracy": fmean(scores),
        **_by_types(scores, by_structural=structural, by_semantic=semantic, by_detailed=detailed),
    }
    if structural is not None:
        # Open or binary is what the question asks for, not what its answer looks like.
        names = {
            kind: "open_accuracy" if kind == "query" else "binary_accuracy" for kind in structural if kind is not None
        }
        metrics |= accuracy_by_type(scores, [names.get(kind) for kind in structural])
    return metrics


def vizwiz_metrics(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    answer_types: Sequence[str | None] | None = None,
    unanswerable_scores: Sequence[float] | None = None,
    answerable: Sequence[bool | int] | None = None,
) -> dict[str, Any]:
    """What the VizWiz tool (Gurari et al. 2018) reports of both tasks, answering and telling what cannot be answered.

    Args:
        predictions: one a question.
        answers: for each question what people said.
        answer_types: "yes/no", "number", "other" or "unanswerable" for each question; `None` where it is not known.
        unanswerable_scores: for each question the probability, in [0, 1], that it cannot be answered.
        answerable: for each question whether it can be answered, 1 or 0; left out, `answer_types` tell.

    Returns:
        `vqa_accuracy`, with VizWiz's normalization; `by_answer_type` where types are given;
        `answerable_vqa_accuracy`, without the unanswerable questions, where these are known and do not make up all.
        With `unanswerable_scores` also `answerability_average_precision` and, at a threshold of 0.5,
        `answerability_f1`; unanswerable is the positive class, and without one in the split both are left out.

    Raises:
        TypeError, ValueError: as `vqa_accuracies`, or there is no question, the lengths differ, a score or a flag is
            out of its range, or nothing tells which questions can be answered; names the argument.
    """
    check_split(
        predictions,
        answers,
        answer_types=answer_types,
        unanswerable_scores=unanswerable_scores,
        answerable=answerable,
    )
    scores = vqa_accuracies(predictions, answers, "vizwiz")
    metrics = {"vqa_accuracy": fmean(scores), **_by_types(scores, by_answer_type=answer_types)}
    unanswerable = _unanswerable(answer_types, answerable)
    if unanswerable is not None and not all(unanswerable):
        metrics["answerable_vqa_accuracy"] = fmean(
            score for score, without in zip(scores, unanswerable, strict=True) if not without
        )
    if unanswerable_scores is None:
        return metrics

    if unanswerable is None:
        raise ValueError(
            "unanswerable_scores: nothing to compare them with; give `answerable`, or `answer_types` without None."
        )
    wrong = next((score for score in unanswerable_scores if not 0 <= score <= 1), None)
    if wrong is not None:
        raise ValueError(f"unanswerable_scores: expected probabilities in [0, 1], got {wrong}.")
    if any(unanswerable):
        # Here, since it takes most of a second, and no other benchmark needs it.
        from sklearn.metrics import average_precision_score, f1_score

        metrics["answerability_average_precision"] = float(average_precision_score(unanswerable, unanswerable_scores))
        metrics["answerability_f1"] = float(f1_score(unanswerable, [score > 0.5 for score in unanswerable_scores]))
    return metrics


def _unanswerable(
    answer_types: Sequence[str | None] | None, answerable: Sequence[bool | int] | None
) -> list[bool] | None:
    """Which questions cannot be answered; `None` if not known of all."""
    if answerable is not None:
        wrong = next((flag for flag in answerable if flag not in (0, 1)), None)
        if wrong is not None:
            raise ValueError(f"answerable: expected 1 or 0 for each question, got {wrong!r}.")
        return [not flag for flag in answerable]
    if answer_types is None or None in answer_types:
        return None
    return [kind == "unanswerable" for kind in answer_types]


def textvqa_metrics(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """What TextVQA's evaluator (Singh et al. 2019; in MMF) reports.

    Args:
        predictions: one a question.
        answers: for each question what people said.

    Returns:
        `vqa_accuracy`, with MMF's normalization.

    Raises:
        TypeError, ValueError: as `vqa_accuracies`, or there is no question; names the argument.
    """
    check_split(predictions, answers)
    return {"vqa_accuracy": fmean(vqa_accuracies(predictions, answers, "mmf"))}


def vqa_rad_metrics(
    predictions: Sequence[str], answers: Sequence[str], answer_types: Sequence[str]
) -> dict[str, float]:
    """Accuracy on VQA-RAD as papers report it: exact match but for case and spaces, open and closed questions apart.

    Args:
        predictions, answers: one a question.
        answer_types: "OPEN" or "CLOSED" for each question; spaces around it, as in the released file, do no harm.

    Returns:
        `accuracy`; `open_accuracy` and `closed_accuracy`, where there are such questions; `num_open`, `num_closed`.

    Raises:
        TypeError, ValueError: the lengths differ, there is no question, one has no string, or a type is another one;
            names the argument.
    """
    check_split(predictions, answers, answer_types=answer_types)
    check_strings("answers", answers)
    check_strings("answer_types", answer_types)
    kinds = [kind.strip() for kind in answer_types]
    wrong = next((kind for kind in kinds if kind not in ("OPEN", "CLOSED")), None)
    if wrong is not None:
        raise ValueError(f"answer_types: expected 'OPEN' or 'CLOSED' for each question, got {wrong!r}.")
    scores = _equal([canonical_answer(one) for one in predictions], [canonical_answer(one) for one in answers])
    by_type = accuracy_by_type(scores, kinds)
    return {
        "accuracy": fmean(scores),
        **{f"{kind.lower()}_accuracy": by_type[kind] for kind in ("OPEN", "CLOSED") if kind in by_type},
        "num_open": kinds.count("OPEN"),
        "num_closed": kinds.count("CLOSED"),
    }


def clevr_metrics(
    predictions: Sequence[str], answers: Sequence[str], families: Sequence[str | None] | None = None
) -> dict[str, Any]:
    """Accuracy on CLEVR: a prediction counts if it is the answer letter by letter.

    Args:
        predictions, answers: one a question.
        families: "exist", "count", "compare_integer", "query_attribute" or "compare_attribute" for each question;
            `None` where it is not known.

    Returns:
        `accuracy`, and `by_family` where families are given.

    Raises:
        TypeError, ValueError: the lengths differ, there is no question, or one has no string; names the argument.
    """
    check_split(predictions, answers, families=families)
    check_strings("answers", answers)
    scores = _equal(predictions, answers)
    return {"accuracy": fmean(scores), **_by_types(scores, by_family=families)}


def daquar_metrics(
    predictions: Sequence[str], answers: Sequence[str], similarity: Similarity | None = None
) -> dict[str, float]:
    """What DAQUAR's script (Malinowski and Fritz 2014) reports. An answer is a set of items, "chair, table".

    Args:
        predictions, answers: one a question, as the files write them: "garbage_bin".
        similarity: of two words, see `hivilt.evaluation.wups.wordnet_similarity`; `None`: WUPS is left out.

    Returns:
        `accuracy`, the share of predictions with the items of the answer, in any order; with `similarity` also `wups_0.9`
        and `wups_0.0`.

    Raises:
        TypeError, ValueError: the lengths differ, there is no question, or one has no string; names the argument.
    """
    check_split(predictions, answers)
    check_strings("answers", answers)
    pairs = list(zip(predictions, answers, strict=True))
    metrics = {"accuracy": fmean(set(answer_items(given)) == set(answer_items(true)) for given, true in pairs)}
    if similarity is not None:
        for threshold in (0.9, 0.0):
            metrics[f"wups_{threshold}"] = fmean(wups(given, true, threshold, similarity) for given, true in pairs)
    return metrics


def _equal(predictions: Sequence[str], answers: Sequence[str]) -> list[float]:
    return [float(prediction == answer) for prediction, answer in zip(predictions, answers, strict=True)]


def _by_types(scores: Sequence[float], **types: Sequence[str | None] | None) -> dict[str, dict[str, float]]:
    return {name: accuracy_by_type(scores, given) for name, given in types.items() if given is not None}
