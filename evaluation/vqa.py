"""What a number means in visual question answering: the official answer normaliser, VQA accuracy and exact match.

Everything here is a pure function over strings and lists, so it needs no network and can be called twice on the same
answers with the same result (the official tool rewrites its ground truths in place).

VQA accuracy of a prediction p against the answers a_1..a_n of n people (https://visualqa.org/evaluation):

    acc(p) = 1/n * sum_i min(1, |{j != i : a_j = p}| / 3)

With ten answers and k of them equal to p this is 0, 0.3, 0.6, 0.9, 1 for k = 0, 1, 2, 3, 4 or more. Both sides are
normalised first; which sides and when is the `normalisation` argument:

| normalisation | prediction | answers | used by |
|---|---|---|---|
| `"always"` | punctuation and words | punctuation and words | MMF and lmms-eval; the default here |
| `"official"` | as the answers | untouched if all are identical, else punctuation and words | VQA tool since 2021 |
| `"legacy"` | punctuation and words | punctuation only, and only if they differ | VQA tool until 2021; ALBEF, LAVIS |
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

Normalisation = Literal["official", "legacy", "always"]

PUNCTUATION = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")

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

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")


def strip_punctuation(text: str) -> str:
    """The official punctuation pass: each mark is deleted or replaced by a space, full stops go unless a digit follows.

    A mark is deleted where it touches a space anywhere in `text`, or where `text` has a comma between digits; otherwise
    it becomes a space: "yes,no" -> "yes no", "yes, it is" -> "yes it is", "10,000" -> "10000".
    """
    comma_in_number = _COMMA_IN_NUMBER.search(text) is not None
    stripped = text
    for mark in PUNCTUATION:
        delete = comma_in_number or f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if delete else " ")
    # The official code passes a regex flag where the count belongs (re.UNICODE == 32); kept for equality.
    return _FULL_STOP.sub("", stripped, count=32)


def normalise_words(text: str) -> str:
    """The official word pass: lower case, number words to digits, no articles, contractions with their apostrophes."""
    words = (NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def clean_whitespace(text: str) -> str:
    """Newlines and tabs to spaces, none at the ends: the only step that is never skipped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise_answer(text: str) -> str:
    """The official normaliser in full.

    Args:
        text: an answer as a person typed it or a model gave it.

    Returns:
        The answer to compare; may be empty, since articles are dropped ("a" -> "").

    >>> normalise_answer("Two t-shirts.")
    '2 t shirts'
    """
    return normalise_words(strip_punctuation(clean_whitespace(text)))


def _check_answers(answers: Sequence[str]) -> None:
    if isinstance(answers, str):
        raise TypeError(f"answers: expected a list of strings, got the string {answers!r}; wrap it in a list.")
    if len(answers) == 0:
        raise ValueError("answers: got an empty list; a question without a known answer has no accuracy, leave it out.")


def vqa_accuracy(prediction: str, answers: Sequence[str], normalisation: Normalisation = "always") -> float:
    """VQA accuracy of one prediction, leaving out one answer at a time by its index.

    Args:
        prediction: the answer to judge.
        answers: what people said, with repetitions. Fewer than ten stand for ten in the same proportions, as OK-VQA
            doubles its five: a single answer gives 1 on a match and 0 otherwise.
        normalisation: see the table at the top of this file.

    Returns:
        A float in [0, 1].

    Raises:
        TypeError: `answers` is a single string.
        ValueError: `answers` is empty, or `normalisation` is unknown.

    >>> vqa_accuracy("two", ["2", "two", "three", "3", "3", "3", "3", "3", "3", "3"])
    0.6
    """
    _check_answers(answers)
    prediction, answers = clean_whitespace(prediction), [clean_whitespace(answer) for answer in answers]
    unanimous = len(set(answers)) == 1
    if normalisation == "always" or (normalisation == "official" and not unanimous):
        prediction, answers = normalise_answer(prediction), [normalise_answer(answer) for answer in answers]
    elif normalisation == "legacy":
        prediction = normalise_answer(prediction)
        answers = answers if unanimous else [strip_punctuation(answer) for answer in answers]
    elif normalisation != "official":
        raise ValueError(f"normalisation: expected one of {get_args(Normalisation)}, got {normalisation!r}.")

    total = max(len(answers), 10)
    equal = answers.count(prediction) * total / len(answers)
    # `equal` of the turns leave out one that agrees, the other turns leave out one that does not.
    score = (equal * min(1.0, (equal - 1) / 3) + (total - equal) * min(1.0, equal / 3)) / total if equal else 0.0
    return round(score, 12)


def answer_scores(answers: Sequence[str]) -> dict[str, float]:
    """Soft target of each distinct answer: the VQA accuracy that predicting it would earn.

    Training on these is training on the metric: with ten answers, counts 1, 2, 3, 4+ give 0.3, 0.6, 0.9, 1.

    Args:
        answers: what people said, with repetitions.

    Returns:
        Each distinct answer, as `canonical_answer` writes it, with a score in (0, 1].
    """
    return {canonical_answer(answer): vqa_accuracy(answer, answers) for answer in dict.fromkeys(answers)}


def canonical_answer(answer: str) -> str:
    """How an answer is written in the vocabulary and compared for exact match: lower case, single spaces."""
    return " ".join(answer.lower().split())


def majority_answer(answers: Sequence[str]) -> str:
    """The answer most people gave, as `canonical_answer` writes it; of equally frequent ones the first.

    Raises:
        TypeError: `answers` is a single string.
        ValueError: `answers` is empty.
    """
    _check_answers(answers)
    return Counter(canonical_answer(answer) for answer in answers).most_common(1)[0][0]


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction is the answer (of several: the one most people gave), but for case and spaces.

    Raises:
        TypeError: `answers` is a single string.
        ValueError: `answers` is empty.
    """
    return canonical_answer(prediction) == majority_answer(answers)


def vqa_metrics(
    predictions: Sequence[Sequence[str]],
    answers: Sequence[Sequence[str]],
    normalisation: Normalisation = "always",
) -> dict[str, float]:
    """Metrics of a whole split.

    Args:
        predictions: for each question its answers in falling order of probability; the first one counts.
        answers: for each question what people said; an empty list where it is not known, which leaves it out.
        normalisation: see the table at the top of this file.

    Returns:
        `accuracy` (exact match of the first prediction), `top3_accuracy` (the answer is among the first three) and,
        where some question has more than one answer, `vqa_accuracy`, all in [0, 1]; `num_questions` that were counted.
        Without a known answer `num_questions` is 0 and stands alone.

    Raises:
        ValueError: `predictions` and `answers` differ in length.
    """
    if len(predictions) != len(answers):
        raise ValueError(f"predictions, answers: expected one each a question, got {len(predictions)}, {len(answers)}.")
    known = [(given, said) for given, said in zip(predictions, answers, strict=True) if len(said) > 0]
    metrics: dict[str, float] = {"num_questions": len(known)}
    if not known:
        return metrics

    metrics["accuracy"] = sum(exact_match(given[0], said) for given, said in known) / len(known)
    metrics["top3_accuracy"] = sum(any(exact_match(one, said) for one in given[:3]) for given, said in known) / len(
        known
    )
    if any(len(said) > 1 for _, said in known):
        metrics["vqa_accuracy"] = sum(vqa_accuracy(given[0], said, normalisation) for given, said in known) / len(known)
    return metrics


def answer_coverage(answers: Sequence[Sequence[str]], label2id: Mapping[str, int]) -> float:
    """Share of the questions whose answer is in the vocabulary: the accuracy no classifier over it can pass.

    Args:
        answers: for each question what people said; empty lists are left out.
        label2id: the vocabulary, written as `canonical_answer` does.

    Returns:
        A float in [0, 1]; 1 if no answer is known.
    """
    known = [said for said in answers if len(said) > 0]
    return sum(majority_answer(said) in label2id for said in known) / len(known) if known else 1.0
