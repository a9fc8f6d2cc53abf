"""WUPS, DAQUAR's measure of answers that mean nearly the same (Malinowski and Fritz 2014), over Wu and Palmer's similarity.

WordNet is no part of HiViLT and comes with no wheel: `wordnet_similarity` takes NLTK's where it is installed.
"""

import functools
import importlib.util
import logging
import math
import zipfile
from collections.abc import Callable
from typing import Any

from hivilt.evaluation.vqa import check_strings

logger = logging.getLogger(__name__)

# How alike two words are, in [0, 1].
Similarity = Callable[[str, str], float]

# Below the threshold a similarity counts a tenth.
DOWNWEIGHT = 0.1


def answer_items(answer: str) -> list[str]:
    """The items of an answer that is a list.

    >>> answer_items("chair,  table")
    ['chair', 'table']
    """
    return [item.strip() for item in answer.split(",")]


def wups(prediction: str, answer: str, threshold: float, similarity: Similarity) -> float:
    """WUPS of one prediction, in [0, 1], as Malinowski's script computes it: a measure of two sets of items.

    Every item of one side goes by the most similar of the other; the product of these over the side that fares worse counts.

    Args:
        prediction, answer: items with commas between; a `TypeError` refuses what is no string.
        threshold: a similarity below it counts a tenth. Papers report 0.9 and 0.0; out of [0, 1] is a `ValueError`.
        similarity: of two words that are not the same; see `wordnet_similarity`.
    """
    check_strings("prediction, answer", [prediction, answer])
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a number in [0, 1], got {threshold}.")
    if not callable(similarity):  # wordnet_similarity() gives None without WordNet
        raise ValueError(f"similarity: expected a function of two words, got {similarity!r}; see wordnet_similarity.")

    def measure(one: str, other: str) -> float:
        if one == other:
            return 1.0
        found = similarity(one, other)
        return found if found >= threshold else DOWNWEIGHT * found

    given, true = answer_items(prediction), answer_items(answer)
    return min(
        math.prod(max(measure(item, other) for other in true) for item in given),
        math.prod(max(measure(item, other) for other in given) for item in true),
    )


@functools.cache
def wordnet_similarity() -> Similarity | None:
    """Wu and Palmer's similarity of two words by NLTK's WordNet: of all meanings that they have as nouns, of the two most
    alike; 0 if one is no noun of WordNet, as "garbage_bin". It remembers the pairs that it was asked.

    It is `None`, with one warning, where NLTK is not installed, its WordNet is missing or damaged, or is of another version
    than 3.0, which gives other numbers.
    """
    why = "NLTK is not installed"
    if importlib.util.find_spec("nltk") is not None:
        from nltk.corpus import wordnet

        try:
            wordnet.ensure_loaded()
            if (version := wordnet.get_version()) == "3.0":
                return functools.cache(functools.partial(_wu_palmer, wordnet))
            why = f"NLTK's WordNet is version {version}, and published numbers are by 3.0"
        except (LookupError, OSError, ValueError, zipfile.BadZipFile) as error:
            why = f"NLTK's WordNet is missing or damaged ({type(error).__name__})"
    logger.warning(
        f"WUPS is left out: {why}. It needs pip install nltk, and once python -m nltk.downloader wordnet (where there is no "
        "network, its folder corpora/wordnet below one that NLTK_DATA names)."
    )
    return None


def _wu_palmer(wordnet: Any, one: str, other: str) -> float:
    pairs = ((a, b) for a in wordnet.synsets(one, pos="n") for b in wordnet.synsets(other, pos="n"))
    return max((a.wup_similarity(b) or 0.0 for a, b in pairs), default=0.0)
