"""The official metrics of the benchmarks of question answering, as pure functions over strings and lists.

All arguments are lists of one entry a question: `answers` is the answer, or what people said, with repetitions (ten of them,
or fewer that stand for ten); lists of types name its kinds in the data set's words, `None` where it is not known. A
`ValueError` names an argument of another length, or with a value that means nothing; a `TypeError` one without a string where
there must be one. All numbers are in [0, 1]; `by_...` are means of each type; a mean over no questions is left out, and so is
what needs an argument that was not given.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from hivilt.evaluation.vqa import (
    Normalization,
    accuracy_by_type,
    canonical_answer,
    check_probabilities,
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

    `normalization` is as in `hivilt.evaluation.vqa`; `answer_types` are "yes/no", "number" or "other", `question_types` how
    each question begins, "what color is the". Returns `vqa_accuracy`, `by_answer_type` and `by_question_type`.
    """
    check_split(predictions, answers, answer_types=answer_types, question_types=question_types)
    scores = vqa_accuracies(predictions, answers, normalization)
    types = _by_types(scores, by_answer_type=answer_types, by_question_type=question_types)
    return {"vqa_accuracy": fmean(scores), **types}


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

    Returns:
        `accuracy`, `by_structural`, `by_semantic` and `by_detailed`; with `structural` ("verify", "query", "choose",
        "logical" or "compare") also `open_accuracy`, of "query" questions, and `binary_accuracy`, of all others.
    """
    scores = _exact(predictions, answers, structural=structural, semantic=semantic, detailed=detailed)
    by_type = _by_types(scores, by_structural=structural, by_semantic=semantic, by_detailed=detailed)
    metrics = {"accuracy": fmean(scores), **by_type}
    if structural is not None:
        # Open or binary is what the question asks for, not what its answer looks like.
        names = {None: None, "query": "open_accuracy"}
        metrics |= accuracy_by_type(scores, [names.get(kind, "binary_accuracy") for kind in structural])
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
        answer_types: "yes/no", "number", "other" or "unanswerable".
        unanswerable_scores: the probability, in [0, 1], that a question cannot be answered; needs one of the other two.
        answerable: whether a question can be answered, 1 or 0; left out, `answer_types` tell.

    Returns:
        `vqa_accuracy`, with VizWiz's normalization, and `by_answer_type`; `answerable_vqa_accuracy`, without the
        unanswerable questions, where it is known of all which these are; `answerability_average_precision` and, at a
        threshold of 0.5, `answerability_f1`, where some question is unanswerable, the positive class.
    """
    check_split(
        predictions, answers, answer_types=answer_types, unanswerable_scores=unanswerable_scores, answerable=answerable
    )
    scores = vqa_accuracies(predictions, answers, "vizwiz")
    metrics = {"vqa_accuracy": fmean(scores), **_by_types(scores, by_answer_type=answer_types)}
    unanswerable = None
    if answerable is not None:
        wrong = next((flag for flag in answerable if flag not in (0, 1)), None)
        if wrong is not None:
            raise ValueError(f"answerable: expected 1 or 0 for each question, got {wrong!r}.")
        unanswerable = [not flag for flag in answerable]
    elif answer_types is not None and None not in answer_types:
        unanswerable = [kind == "unanswerable" for kind in answer_types]
    elif unanswerable_scores is not None:
        raise ValueError("unanswerable_scores: nothing to compare them with; give `answerable` or all `answer_types`.")
    if unanswerable is not None:
        names = [None if cannot else "answerable_vqa_accuracy" for cannot in unanswerable]
        metrics |= accuracy_by_type(scores, names)
    if unanswerable_scores is not None:
        check_probabilities("unanswerable_scores", unanswerable_scores)
        if any(unanswerable):
            # Here, since it takes most of a second, and no other benchmark needs it.
            from sklearn.metrics import average_precision_score, f1_score

            precision = average_precision_score(unanswerable, unanswerable_scores)
            metrics["answerability_average_precision"] = float(precision)
            metrics["answerability_f1"] = float(f1_score(unanswerable, [score > 0.5 for score in unanswerable_scores]))
    return metrics


def textvqa_metrics(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """What TextVQA's evaluator (Singh et al. 2019; in MMF) reports: `vqa_accuracy`, with MMF's normalization."""
    return vqav2_metrics(predictions, answers, "mmf")


def vqa_rad_metrics(
    predictions: Sequence[str], answers: Sequence[str], answer_types: Sequence[str] | None = None
) -> dict[str, float]:
    """Accuracy on VQA-RAD as papers report it: exact match but for case and spaces, open and closed questions apart.

    `answer_types` are "OPEN" or "CLOSED", with or without spaces around, as in the released file. Returns `accuracy`; with
    `answer_types` also `open_accuracy` and `closed_accuracy`; `num_open` and `num_closed` questions.
    """
    check_split(predictions, answers, answer_types=answer_types)
    check_strings("answers", answers)
    scores = _exact(list(map(canonical_answer, predictions)), list(map(canonical_answer, answers)))
    if answer_types is None:
        return {"accuracy": fmean(scores)}
    check_strings("answer_types", answer_types)
    kinds = [kind.strip() for kind in answer_types]
    wrong = next((kind for kind in kinds if kind not in ("OPEN", "CLOSED")), None)
    if wrong is not None:
        raise ValueError(f"answer_types: expected 'OPEN' or 'CLOSED' for each question, got {wrong!r}.")
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
    """Accuracy on CLEVR: a prediction counts if it is the answer letter by letter. Returns `accuracy` and `by_family`."""
    scores = _exact(predictions, answers, families=families)
    return {"accuracy": fmean(scores), **_by_types(scores, by_family=families)}


def daquar_metrics(
    predictions: Sequence[str], answers: Sequence[str], similarity: Similarity | None = None
) -> dict[str, float]:
    """What DAQUAR's script (Malinowski and Fritz 2014) reports. An answer is a set of items, "chair, table".

    `similarity` is of two words, see `hivilt.evaluation.wups.wordnet_similarity`; `None` leaves WUPS out. Returns
    `accuracy`, the share of predictions with the items of the answer, in any order; `wups_0.9` and `wups_0.0`.
    """
    check_split(predictions, answers)
    check_strings("answers", answers)
    pairs = list(zip(predictions, answers, strict=True))
    metrics = {"accuracy": fmean(set(answer_items(given)) == set(answer_items(true)) for given, true in pairs)}
    if similarity is not None:
        for threshold in (0.9, 0.0):
            metrics[f"wups_{threshold}"] = fmean(wups(given, true, threshold, similarity) for given, true in pairs)
    return metrics


def _exact(predictions: Sequence[str], answers: Sequence[str], **types: Sequence | None) -> list[float]:
    check_split(predictions, answers, **types)
    check_strings("answers", answers)
    return [float(prediction == answer) for prediction, answer in zip(predictions, answers, strict=True)]


def _by_types(scores: Sequence[float], **types: Sequence[str | None] | None) -> dict[str, dict[str, float]]:
    return {name: accuracy_by_type(scores, given) for name, given in types.items() if given is not None}
