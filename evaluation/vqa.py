"""What a number means in visual question answering: answer normalizers, VQA accuracy, exact match, soft labels.

All are pure functions over strings and lists. `predictions` are the answers to judge, one a question; `answers` are what
people said of a question, with repetitions, or for each question such a list; `label2id` is the vocabulary; scores are in
[0, 1]. A string in place of a list raises a `TypeError`, no answer where there must be one and lists that differ in length
a `ValueError`; both name the argument and the question.

VQA accuracy of a prediction p against the answers a_1..a_n of n people (https://visualqa.org/evaluation):

    acc(p) = 1/n * sum_i min(1, |{j != i : a_j = p}| / 3)

With ten answers and k of them equal to p this is 0, 0.3, 0.6, 0.9, 1 for k = 0, 1, 2, 3, 4 or more. Before they are
compared, both sides are normalized; how is the `normalization` argument:

| normalization | prediction | answers | used by |
|---|---|---|---|
| `"always"` | punctuation and words | punctuation and words | lmms-eval on VQAv2; the default here |
| `"official"` | as the answers | untouched if all are identical, else punctuation and words | VQA tool since 2021 |
| `"legacy"` | punctuation and words | punctuation only, and only if they differ | VQA tool until 2021; ALBEF, LAVIS |
| `"mmf"` | MMF's tokenizer, punctuation, words | as the prediction | TextVQA; lmms-eval on VizWiz, OK-VQA |
| `"vizwiz"` | punctuation and words | untouched, ends included | VizWiz tool |
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from statistics import fmean
from typing import Literal, get_args

Normalization = Literal["official", "legacy", "always", "mmf", "vizwiz"]

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))

# The official table, slips included ("somebody'd", and capitals that lower-casing has made unreachable).
_CONTRACTIONS = """
    aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've
    couldnt've:couldn't've didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've
    hasnt:hasn't havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's
    Id've:I'd've I'dve:I'd've Im:I'm Ive:I've isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll
    let's:let's maam:ma'am mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've
    mustnt:mustn't mustve:must've neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at
    'ows'at:'ow's'at 'ow'sat:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've she's:she's shouldve:should've
    shouldnt:shouldn't shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd
    somebodyd've:somebody'd've somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's
    someoned:someone'd someoned've:someone'd've someone'dve:someone'd've someonell:someone'll someones:someone's
    somethingd:something'd somethingd've:something'd've something'dve:something'd've somethingll:something'll
    thats:that's thered:there'd thered've:there'd've there'dve:there'd've therere:there're theres:there's
    theyd:they'd theyd've:they'd've they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas
    wasnt:wasn't wed've:we'd've we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's
    whatve:what've whens:when's whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've
    who'dve:who'd've wholl:who'll whos:who's whove:who've whyll:why'll whyre:why're whys:why's wont:won't
    wouldve:would've wouldnt:wouldn't wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll
    y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've
    you'dve:you'd've youll:you'll youre:you're youve:you've
"""
CONTRACTIONS = dict(pair.split(":") for pair in _CONTRACTIONS.split())

# No number is an article or a contraction, so one look-up does for both.
_WORDS = CONTRACTIONS | NUMBER_WORDS

_MARK = re.compile(r"""[;/[\]"{}()=+\\_\-><@`,?!]""")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")

# A split repeats its answers; this many distinct ones are remembered, some 15 MB.
_REMEMBERED = 2**16


def strip_punctuation(text: str) -> str:
    """The official punctuation pass: marks are deleted or become a space, full stops go unless a digit follows.

    A mark is deleted where it touches a space anywhere in `text`, or where `text` has a comma between digits; otherwise
    it becomes a space: "yes,no" -> "yes no", "yes, it is" -> "yes it is", "10,000" -> "10000".
    """
    text = stripped = clean_whitespace(text)
    marks = _MARK.findall(text)
    if marks:
        comma_in_number = "," in marks and _COMMA_IN_NUMBER.search(text) is not None
        for mark in set(marks):
            delete = comma_in_number or f"{mark} " in text or f" {mark}" in text
            stripped = stripped.replace(mark, "" if delete else " ")
    # The official code passes a regex flag where the count belongs (re.UNICODE == 32); kept for equality.
    return _FULL_STOP.sub("", stripped, count=32) if "." in stripped else stripped


def normalize_words(text: str) -> str:
    """The official word pass: lower case, number words to digits, no articles, contractions with their apostrophes."""
    return " ".join([_WORDS.get(word, word) for word in text.lower().split() if word not in ARTICLES])


def clean_whitespace(text: str) -> str:
    """Newlines and tabs to spaces, none at the ends: the step that only the VizWiz tool skips, and only for answers."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(_REMEMBERED)
def normalize_answer(text: str) -> str:
    """The official normalizer in full; what it gives may be empty, since articles are dropped ("a" -> "").

    >>> normalize_answer("Two t-shirts.")
    '2 t shirts'
    """
    return normalize_words(strip_punctuation(text))


@lru_cache(_REMEMBERED)
def normalize_answer_mmf(text: str) -> str:
    """MMF's normalizer (`EvalAIAnswerProcessor`), by which TextVQA is scored: the official one after a tokenizer.

    The tokenizer lower-cases, deletes commas and question marks, and splits off "'s", so that "yes,no" is one word and
    "dog's" two.

    >>> normalize_answer_mmf("The dog's, yes?")
    "dog 's yes"
    """
    tokens = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalize_words(strip_punctuation(tokens))


def canonical_answer(answer: str) -> str:
    """How answers are compared for exact match: in lower case, with single spaces, in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", " ".join(answer.lower().split()))


def vqa_accuracy(prediction: str, answers: Sequence[str], normalization: Normalization = "always") -> float:
    """VQA accuracy of one prediction; a `ValueError` names a `normalization` that is unknown.

    Fewer than ten answers stand for ten in the same proportions, as OK-VQA doubles its five: a single answer gives 1 on
    a match and 0 otherwise.

    >>> vqa_accuracy("two", ["2", "two", "three", "3", "3", "3", "3", "3", "3", "3"])
    0.6
    """
    _check_answers(answers)
    write_prediction, write_answer = _forms(normalization, answers)
    count = [write_answer(answer) for answer in answers].count(write_prediction(prediction))
    return _score_of(count, len(answers))


def vqa_accuracies(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], normalization: Normalization = "always"
) -> list[float]:
    """`vqa_accuracy` of each question of a split."""
    check_strings("predictions", predictions)
    check_lengths(len(predictions), answers=answers)
    for question, said in enumerate(answers):
        _check_answers(said, question)
    return [
        vqa_accuracy(prediction, said, normalization) for prediction, said in zip(predictions, answers, strict=True)
    ]


def _forms(normalization: Normalization, answers: Sequence[str]) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """How the prediction, and how each answer, is written before they are compared."""
    if normalization == "always":
        return normalize_answer, normalize_answer
    if normalization == "mmf":
        return normalize_answer_mmf, normalize_answer_mmf
    if normalization == "vizwiz":
        return normalize_answer, str
    first = clean_whitespace(answers[0])
    unanimous = all(clean_whitespace(answer) == first for answer in answers)
    if normalization == "official":
        return (clean_whitespace, clean_whitespace) if unanimous else (normalize_answer, normalize_answer)
    if normalization == "legacy":
        return normalize_answer, clean_whitespace if unanimous else strip_punctuation
    raise ValueError(f"normalization: expected one of {get_args(Normalization)}, got {normalization!r}.")


@cache
def _score_of(count: int, num_answers: int) -> float:
    """VQA accuracy of a prediction that equals `count` of the answers."""
    total = max(num_answers, 10)
    equal = count * total / num_answers
    # `equal` of the turns leave out one that agrees, the other turns leave out one that does not.
    score = (equal * min(1.0, (equal - 1) / 3) + (total - equal) * min(1.0, equal / 3)) / total if equal else 0.0
    return round(score, 12)


def accuracy_by_type(scores: Sequence[float], types: Sequence[str | None]) -> dict[str, float]:
    """The mean score of each type of question, in alphabetical order; `None`, a type that is not known, is left out.

    >>> accuracy_by_type([1.0, 0.3, 0.0], ["yes/no", "number", "yes/no"])
    {'number': 0.3, 'yes/no': 0.5}
    """
    check_lengths(len(scores), types=types)
    by_type: dict[str, list[float]] = {}
    for score, kind in zip(scores, types, strict=True):
        if kind is not None:
            by_type.setdefault(kind, []).append(score)
    return {kind: fmean(by_type[kind]) for kind in sorted(by_type)}


def majority_answer(answers: Sequence[str]) -> str:
    """The answer most people gave, as `canonical_answer` writes it; of equally frequent ones the first."""
    _check_answers(answers)
    return Counter(canonical_answer(answer) for answer in answers).most_common(1)[0][0]


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction is the answer (of several: the one most people gave), but for case and spaces."""
    return canonical_answer(prediction) == majority_answer(answers)


def vqa_metrics(
    predictions: Sequence[Sequence[str]], answers: Sequence[Sequence[str]], normalization: Normalization = "always"
) -> dict[str, float]:
    """Metrics of a whole split.

    Args:
        predictions: for each question its answers in falling order of probability.
        answers: for each question what people said; an empty list where it is not known, which leaves it out.
        normalization: of `vqa_accuracy`.

    Returns:
        `accuracy` (exact match of the first prediction), `top3_accuracy` (the answer is among the first three) and,
        where some question has more than one answer, `vqa_accuracy`; `num_questions` that were counted, which stands
        alone if there is none.
    """
    check_lengths(len(predictions), answers=answers)
    known = [(given, said) for given, said in zip(predictions, answers, strict=True) if len(said) > 0]
    if not known:
        return {"num_questions": 0}
    right = [majority_answer(said) for _, said in known]
    best = [[canonical_answer(one) for one in given[:3]] for given, _ in known]
    metrics = {
        "num_questions": len(known),
        "accuracy": fmean(three[0] == answer for three, answer in zip(best, right, strict=True)),
        "top3_accuracy": fmean(answer in three for three, answer in zip(best, right, strict=True)),
    }
    if any(len(said) > 1 for _, said in known):
        scores = vqa_accuracies([given[0] for given, _ in known], [said for _, said in known], normalization)
        metrics["vqa_accuracy"] = fmean(scores)
    return metrics


def answer_label(answer: str, label2id: Mapping[str, int]) -> int | None:
    """The label of an answer as `canonical_answer` writes it, else as `normalize_answer` does; `None` if it has none.

    >>> answer_label("Two", {"2": 7})
    7
    """
    return label2id.get(_label_text(answer, label2id))


def _label_text(answer: str, label2id: Mapping[str, int]) -> str | None:
    return next((text for text in (canonical_answer(answer), normalize_answer(answer)) if text in label2id), None)


def soft_scores(answers: Sequence[str], label2id: Mapping[str, int]) -> dict[int, float]:
    """Soft target of a question: the labels of its answers, which may be none, each with its VQA accuracy ("always").

    Training on these is training on the metric: with ten answers, counts 1, 2, 3, 4+ give 0.3, 0.6, 0.9, 1.

    >>> soft_scores(["two", "2", "three"], {"2": 0, "red": 1})
    {0: 1.0}
    """
    _check_answers(answers, at_least=0)
    texts = dict.fromkeys(_label_text(answer, label2id) for answer in answers)
    return {label2id[text]: vqa_accuracy(text, answers, "always") for text in texts if text is not None}


def answer_ceiling(answers: Sequence[Sequence[str]], label2id: Mapping[str, int]) -> float:
    """The VQA accuracy ("always") that no classifier over the vocabulary can pass: the mean of what the best label earns.

    Questions without answers are left out; if there are no others, it is 1.
    """
    # A label is judged as any prediction, so it earns what people said in other words too.
    reachable = {normalize_answer(label) for label in label2id}
    best = []
    for question, said in enumerate(answers):
        _check_answers(said, question, at_least=0)
        if len(said) > 0:
            counts = Counter(normalize_answer(answer) for answer in said)
            most = max((count for text, count in counts.items() if text in reachable), default=0)
            best.append(_score_of(most, len(said)))
    return fmean(best) if best else 1.0


def answer_coverage(answers: Sequence[Sequence[str]], label2id: Mapping[str, int]) -> float:
    """Share of the questions, as in `answer_ceiling`, whose majority answer has a label: a classifier can be taught these."""
    known = [answer_label(majority_answer(said), label2id) is not None for said in answers if len(said) > 0]
    return fmean(known) if known else 1.0


def _check_answers(answers: Sequence[str], question: int | None = None, at_least: int = 1) -> None:
    where = "" if question is None else f" for question {question}"
    if isinstance(answers, str):
        raise TypeError(f"answers: expected a list of strings{where}, got the string {answers!r}; wrap it in a list.")
    if len(answers) < at_least:
        raise ValueError(f"answers: got an empty list{where}; leave out a question without a known answer.")


def check_strings(name: str, values: Sequence[str], unit: str = "question") -> None:
    """Refuses anything but a list of strings with a `TypeError` that names the argument and the question (`unit`)."""
    if isinstance(values, str):
        raise TypeError(f"{name}: expected a list, one string per {unit}, got the string {values!r}.")
    for place, value in enumerate(values):
        if not isinstance(value, str):
            raise TypeError(f"{name}: expected one string per {unit}, got {value!r} for {unit} {place}.")


def check_lengths(number: int, /, unit: str = "question", **given: Sequence | None) -> None:
    """Refuses lists of another length with a `ValueError` that names them; `None` was not given."""
    for name, values in given.items():
        if values is not None and len(values) != number:
            raise ValueError(f"{name}: expected one per {unit}, got {len(values)} for {number} {unit}s.")


def check_no_nan(unit: str, **given: Sequence | None) -> None:
    """Refuses NaN, by which tables say that there is none, with a `ValueError`: it would be a name unlike itself."""
    for name, values in given.items():
        for place, value in enumerate(() if values is None else values):
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{name}: got NaN for {unit} {place}; give None where there is none.")


def check_probabilities(name: str, values: Sequence[float]) -> None:
    """Refuses numbers out of [0, 1] with a `ValueError` that names the argument."""
    wrong = next((value for value in values if not 0 <= value <= 1), None)
    if wrong is not None:
        raise ValueError(f"{name}: expected probabilities in [0, 1], got {wrong}.")


def check_split(predictions: Sequence[str], answers: Sequence, **types: Sequence | None) -> None:
    """What every metric of a split asks of its lists: predictions are strings, there is one, and lengths are equal."""
    check_strings("predictions", predictions)
    check_lengths(len(predictions), answers=answers, **types)
    if len(predictions) == 0:
        raise ValueError("predictions: got an empty list; there is no accuracy without a question.")
