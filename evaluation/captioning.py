"""What a number means in image captioning: BLEU, ROUGE-L, CIDEr-D and, where Java is, METEOR, as coco-caption computes them
(Chen et al. 2015, https://arxiv.org/abs/1504.00325).

All are pure functions. `predictions` are the captions to judge, one an image; `references` are what people wrote of each
image, one caption or more. Both are plain text, which `tokenize` splits. All scores are in [0, 1], but CIDEr-D in [0, 10]: papers
print it, and all the others, times 100. Tests hold them to the official code's numbers. SPICE is not here: it needs Java
and Stanford's parsers, and `pycocoevalcap` has it.
"""

import functools
import importlib.util
import logging
import math
import operator
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hivilt.evaluation.vqa import check_lengths, check_strings

logger = logging.getLogger(__name__)

MAX_N = 4
BETA = 1.2
SIGMA = 6.0
# Idf says little over fewer images: over one, all CIDEr-D are 0.
FEW_IMAGES = 10

# Quotes and dashes of all kinds are dropped; PTB writes other currencies so.
_MARKS = str.maketrans(
    dict.fromkeys('"“”`–—…', " ")
    | {"’": "'", "‘": "'", "£": "#", "€": "$", "¢": " cents ", "½": "1/2", "¼": "1/4", "¾": "3/4", "\xad": ""}
)
_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"})
_DROPPED = re.compile(r"-+|\.+|['?!,:;]")
_ABBREVIATIONS = """mr mrs ms dr st jr sr co inc ltd corp bros gov gen sen rep capt prof rev sgt lt col mt ft ave rd blvd ct
    sq vs etc dept univ assn jan feb mar apr jun jul aug sept sep oct nov dec mon tue tues wed thu thurs fri calif fla"""
_TOKEN = re.compile(
    rf"""https?://\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+             # addresses
    | </?[a-z][^<>\s]*> | [\#@][a-z]\w*                          # <b> #tag @name
    | [:;=][-o*']?[()\[\]dp](?!\w)                               # :-)
    | '[2-9]0s\b | 'n' | 'n\b | 'em\b | 'till?\b | 'cause\b | ol'(?!\w) | [dlo]'[a-z]{{2,}} | [jy]'(?=[a-z]) | ma'am\b
    | '(?:[smd]|re|ve|ll)(?!\w) | n't(?!\w)                      # 's n't
    | [a-z]+(?=n't(?!\w)|'n'[a-z])                               # do|n't rock|'n'|roll
    | (?:can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b))
    | (?:{"|".join(_ABBREVIATIONS.split())})\.(?!\w) | no\.(?=\ ?\d)
    | [^\W_][\w.,]*(?:-[^\W_]+)+ | (?:[a-z]\.)+(?!\w)            # t-shirt 1,000-year-old u.s.
    | [+-]?\d+(?:[,.:]\d+)+ | [+-]\d+\b | \.\d+                  # 1,000 10:30 -5 .5
    | [^\W_]+(?:[_/]+[^\W_]+|[.!?][a-z][^\W_]*)*                 # dog man/woman 3/4 sentence.next
    | -+ | \.+ | \*+ | _+ | [?!]+ | [^\s\U00010000-\U0010ffff]   # emoji are dropped""",
    re.VERBOSE,
)


@functools.lru_cache(2**17)  # the references of a split are the same in every evaluation of a run
def tokenize(caption: str) -> tuple[str, ...]:
    """The tokens by which captions are compared: those of the Penn Treebank in lower case, without punctuation.

    Equal to coco-caption's `PTBTokenizer` (CoreNLP 3.4.1, then 17 marks dropped) on all captions of Flickr8k. Its
    slips are kept: brackets stay as `-lrb-` and `-rrb-`, so do "??" and "!!"; one "?" is dropped. Rare abbreviations and
    phone numbers may differ. A caption of punctuation alone has no token.

    >>> " ".join(tokenize("The dog's T-shirt (left) isn't red."))
    "the dog 's t-shirt -lrb- left -rrb- is n't red"
    """
    found = _TOKEN.findall(caption.lower().translate(_MARKS).replace("''", " "))
    return tuple(token.translate(_BRACKETS) for token in found if not _DROPPED.fullmatch(token))


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """BLEU-1 to BLEU-4 of a whole split (Papineni et al. 2002), (4,) float64.

    BLEU-n = min(1, e^(1 - r/c)) (p_1 ... p_n)^(1/n): p_n is the share of the predictions' n-grams that a reference has, each
    at most as often as in one reference; c is the number of tokens of the predictions, r that of the references closest to
    them in length, of two the shorter. Counts are summed over images, so it is not the mean of images' scores.
    """
    _check(predictions, references)
    matched, total = np.zeros(MAX_N), np.zeros(MAX_N)
    length = closest = 0
    for prediction, captions in zip(predictions, references, strict=True):
        tokens, written = tokenize(prediction), [tokenize(caption) for caption in captions]
        length += len(tokens)
        closest += min((len(other) for other in written), key=lambda other: (abs(other - len(tokens)), other))
        for n in range(1, MAX_N + 1):
            ngrams = _ngrams(tokens, n)
            most = functools.reduce(operator.or_, (_ngrams(other, n) for other in written))
            matched[n - 1] += (ngrams & most).total()
            total[n - 1] += ngrams.total()
    # The official code's two small numbers, by which nothing is divided by 0.
    precisions = (matched + 1e-15) / (total + 1e-9)
    brevity = min(1.0, math.exp(1 - (closest + 1e-9) / (length + 1e-15)))
    return brevity * np.cumprod(precisions) ** (1 / np.arange(1, MAX_N + 1))


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """ROUGE-L of each image (Lin 2004), (images,) float64; the score of a split is the mean.

    F = (1 + b²) P R / (R + b² P) with b = 1.2, where P and R are the longest common subsequence over the length of the
    prediction and of the reference, each the best over the references: not always of the same one.
    """
    _check(predictions, references)
    scores = []
    for prediction, captions in zip(predictions, references, strict=True):
        tokens = tokenize(prediction) or ("",)  # as the official code splits an empty text
        written = [tokenize(caption) or ("",) for caption in captions]
        common = [_longest_common_subsequence(tokens, other) for other in written]
        precision = max(common) / len(tokens)
        recall = max(shared / len(other) for shared, other in zip(common, written, strict=True))
        f = (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if precision else 0.0
        scores.append(f)
    return np.array(scores)


class DocumentFrequencies(NamedTuple):
    """In how many of `num_images` images' references each n-gram stands."""

    counts: Counter[tuple[str, ...]]
    num_images: int


def document_frequencies(references: Sequence[Sequence[str]]) -> DocumentFrequencies:
    """What `cider_d` weighs n-grams by."""
    _check_references(references)
    counts = Counter()
    for captions in references:
        tokens = [tokenize(caption) for caption in captions]
        counts.update({ngram for one in tokens for n in range(1, MAX_N + 1) for ngram in _ngrams(one, n)})
    return DocumentFrequencies(counts, len(references))


def cider_d(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    frequencies: DocumentFrequencies | None = None,
) -> np.ndarray:
    """CIDEr-D of each image (Vedantam et al. 2015, https://arxiv.org/abs/1411.5726), (images,) float64 in [0, 10]; the
    score of a split is the mean. It is what papers call CIDEr.

    CIDEr-D_n(c, s) = 10 e^(-(l_c - l_s)² / 2σ²) Σ_g min(c_g, s_g) s_g / (|c| |s|), with σ = 6 and lengths l in bigrams, then
    the mean over n = 1 to 4 and over references s. c_g and s_g are the counts of the n-gram g times its idf,
    ln N - ln max(1, images whose references have g). A caption shorter than four tokens cannot reach 10.

    Args:
        frequencies: of the images that idf is taken from, by default these `references`. So scores over other images, or
            over a part of them, do not compare; fewer than ten images are a warning. As a reward in training: those of
            all training images.
    """
    _check(predictions, references)
    if frequencies is None:
        frequencies = document_frequencies(references)
    if frequencies.num_images < FEW_IMAGES:
        logger.warning(
            f"CIDEr-D over the references of {frequencies.num_images} images says little: its weights come from how many "
            f"images an n-gram stands in. Measure on {FEW_IMAGES} or more, or pass `frequencies` of a larger set."
        )

    def vector(tokens: tuple[str, ...], n: int) -> dict[tuple[str, ...], float]:
        idf = lambda ngram: math.log(frequencies.num_images / max(1, frequencies.counts[ngram]))
        return {ngram: count * idf(ngram) for ngram, count in _ngrams(tokens, n).items()}

    def similarity(candidate: tuple[str, ...], reference: tuple[str, ...]) -> float:
        gap = max(0, len(candidate) - 1) - max(0, len(reference) - 1)
        cosines = []
        for n in range(1, MAX_N + 1):
            c, s = vector(candidate, n), vector(reference, n)
            norms = math.hypot(*c.values()) * math.hypot(*s.values())
            shared = sum(min(weight, s[ngram]) * s[ngram] for ngram, weight in c.items() if ngram in s)
            cosines.append(shared / norms if norms else 0.0)
        return 10 * math.exp(-(gap**2) / (2 * SIGMA**2)) * float(np.mean(cosines))

    return np.array(
        [
            np.mean([similarity(tokenize(prediction), tokenize(caption)) for caption in captions])
            for prediction, captions in zip(predictions, references, strict=True)
        ]
    )


def caption_scores(
    predictions: Mapping[Hashable, str] | Sequence[str],
    references: Mapping[Hashable, Sequence[str]] | Sequence[Sequence[str]],
    meteor: bool = False,
) -> dict[str, float]:
    """The scores of a whole split.

    Args:
        predictions: one caption an image, by image id, or a list in the order of `references`.
        references: one caption or more for each of the same images.
        meteor: METEOR 1.5 too, by the official code: see `check_meteor`, by which it is an error before any work.

    Returns:
        `num_images`; `bleu_1` to `bleu_4` and `rouge_l` in [0, 1], `cider_d` in [0, 10], `meteor` in [0, 1] if asked for;
        `distinct`, the share of different captions among the predictions: near 0, a model says the same of every image.

    Raises:
        TypeError: a caption is no string, or a string stands where a list must.
        ValueError: an image lacks its prediction or its references; there is no image.

    >>> scores = caption_scores({7: "A dog runs.", 9: "a dog runs"}, {7: ["a dog runs", "a dog"], 9: ["two dogs run"]})
    >>> round(scores["bleu_1"], 3), scores["distinct"]
    (0.5, 0.5)
    """
    if isinstance(predictions, Mapping) and isinstance(references, Mapping):
        for name, missing in (
            ("references", predictions.keys() - references.keys()),
            ("predictions", references.keys() - predictions.keys()),
        ):
            if missing:
                some = ", ".join(sorted(map(repr, missing))[:3])
                raise ValueError(
                    f"{name}: nothing for {len(missing)} of {len(predictions.keys() | references.keys())} images, "
                    f"such as {some}; expected both for each image."
                )
        references = [references[image] for image in predictions]
        predictions = list(predictions.values())
    _check(predictions, references)
    if meteor:
        check_meteor()
    scores = {"num_images": len(predictions)}
    scores |= {f"bleu_{n}": float(score) for n, score in enumerate(bleu(predictions, references), start=1)}
    scores["rouge_l"] = float(rouge_l(predictions, references).mean())
    scores["cider_d"] = float(cider_d(predictions, references).mean())
    if meteor:
        scores["meteor"] = _meteor(predictions, references)
    return scores | {"distinct": len(set(map(tokenize, predictions))) / len(predictions)}


def check_meteor() -> None:
    """Refuses METEOR (Denkowski and Lavie 2014) where it cannot be computed, with a `ValueError` that says what is missing:
    Java or the package `pycocoevalcap`, which is no part of HiViLT."""
    java = shutil.which("java")
    lacking = []
    if java is None or subprocess.run([java, "-version"], capture_output=True).returncode != 0:
        lacking.append("Java (`java -version` fails; 8 or newer)")
    if importlib.util.find_spec("pycocoevalcap") is None:
        lacking.append("the package pycocoevalcap (pip install pycocoevalcap)")
    if lacking:
        raise ValueError(f"meteor: METEOR needs {' and '.join(lacking)}; the other scores need neither.")


def _meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    written = {
        image: [" ".join(tokenize(caption)) for caption in captions] for image, captions in enumerate(references)
    }
    given = {image: [" ".join(tokenize(prediction))] for image, prediction in enumerate(predictions)}
    scorer = Meteor()
    try:
        return scorer.compute_score(written, given)[0]
    except (OSError, ValueError) as error:  # a broken pipe, or nothing where a number should be
        raise RuntimeError("meteor: Java stopped before it had answered; METEOR takes 2 GB of memory.") from error
    finally:
        if scorer.lock.locked():  # interrupted, and its `__del__` would wait for the lock forever
            scorer.lock.release()


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(n)), strict=False))


def _longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Its length, row by row of the usual table."""
    above = [0] * (len(other) + 1)
    for token in one:
        row = [0]
        for place, against in enumerate(other):
            row.append(above[place] + 1 if token == against else max(row[-1], above[place + 1]))
        above = row
    return above[-1]


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    for name, values in {"predictions": predictions, "references": references}.items():
        if isinstance(values, str | Mapping):
            raise TypeError(
                f"{name}: expected a list, got {type(values).__name__}; dicts by image id, both of them, are for "
                "caption_scores."
            )
    check_strings("predictions", predictions, "image")
    check_lengths(len(predictions), "image", references=references)
    _check_references(references)


def _check_references(references: Sequence[Sequence[str]]) -> None:
    if len(references) == 0:
        raise ValueError("references: got an empty list; there is no score without an image.")
    for image, captions in enumerate(references):
        is_list = isinstance(captions, Sequence) and not isinstance(captions, str)
        if not is_list or not all(isinstance(caption, str) for caption in captions):
            raise TypeError(f"references: expected a list of strings per image, got {captions!r} for image {image}.")
        if len(captions) == 0:
            raise ValueError(f"references: got an empty list for image {image}; leave out images without a caption.")
