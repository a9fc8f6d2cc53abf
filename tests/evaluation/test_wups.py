"""WUPS against what Malinowski's script gives over WordNet 3.0, and over a WordNet that has but a few words."""

import sys
from types import ModuleType, SimpleNamespace
from zipfile import BadZipFile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hivilt.evaluation.vqa_benchmarks import daquar_metrics
from hivilt.evaluation.wups import answer_items, wordnet_similarity, wups

# NLTK's Wu-Palmer similarity over WordNet 3.0, of the two most alike nouns; a pair that is not here has no noun.
RAW = {
    ("chair", "table"): 16 / 19,
    ("chair", "armchair"): 20 / 21,
    ("sofa", "couch"): 1.0,
    ("red", "blue"): 0.875,
    ("2", "3"): 0.875,
    ("dog", "cat"): 6 / 7,
    ("cup", "mug"): 5 / 6,
    ("computer", "laptop"): 9 / 11,
    ("lamp", "light"): 8 / 9,
    ("white", "gray"): 0.875,
    ("door", "window"): 0.75,
    ("picture", "photo"): 1.0,
    ("man", "person"): 0.8,
    ("cabinet", "drawer"): 14 / 19,
    ("couch", "table"): 16 / 19,
    ("cup", "light"): 0.75,
    ("lamp", "mug"): 12 / 19,
    ("sofa", "table"): 16 / 19,
}
WORDS = sorted({word for pair in RAW for word in pair} | {"garbage_bin"})


def similarity(one: str, other: str) -> float:
    return RAW.get((one, other)) or RAW.get((other, one)) or 0.0


@pytest.mark.parametrize(
    ("truth", "answer", "strict", "loose"),
    [
        ("chair", "table", 0.084211, 0.842105),
        ("chair", "armchair", 0.952381, 0.952381),
        ("sofa", "couch", 1, 1),
        ("red", "blue", 0.0875, 0.875),
        ("2", "3", 0.0875, 0.875),
        ("garbage_bin", "table", 0, 0),
        ("garbage_bin", "garbage_bin", 1, 1),
        ("dog", "cat", 0.085714, 0.857143),
        ("cup", "mug", 0.083333, 0.833333),
        ("computer", "laptop", 0.081818, 0.818182),
        ("lamp", "light", 0.088889, 0.888889),
        ("white", "gray", 0.0875, 0.875),
        ("door", "window", 0.075, 0.75),
        ("picture", "photo", 1, 1),
        ("man", "person", 0.08, 0.8),
        ("cabinet", "drawer", 0.073684, 0.736842),
        # Lists
        ("chair, table", "chair", 0.084211, 0.842105),
        ("chair, table", "table, chair", 1, 1),
        ("cup, lamp", "mug, light", 0.007407, 0.740741),
        ("sofa", "couch, table", 0.084211, 0.842105),
        ("book", "book,book", 1, 1),
    ],
)
def test_what_malinowskis_script_gives(truth, answer, strict, loose):
    assert wups(answer, truth, 0.9, similarity) == pytest.approx(strict, abs=5e-7)
    assert wups(answer, truth, 0.0, similarity) == pytest.approx(loose, abs=5e-7)


answers = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4)


@given(one=answers, other=answers, threshold=st.floats(0, 1), order=st.randoms())
def test_lists_are_sets_and_the_threshold_only_takes_away(one, other, threshold, order):
    score = wups(",".join(one), ", ".join(other), threshold, similarity)
    assert 0 <= score <= wups(",".join(one), ",".join(other), 0.0, similarity) <= 1
    assert score == pytest.approx(wups(",".join(other), ",".join(one), threshold, similarity))
    assert wups(" , ".join(order.sample(one, len(one))), ",".join(one), threshold, similarity) == 1
    assert wups(",".join(order.sample(one, len(one))), ",".join(other), threshold, similarity) == pytest.approx(score)


def test_items_of_an_answer():
    assert answer_items(" night_stand ,lamp ") == ["night_stand", "lamp"]
    assert answer_items("2") == ["2"]
    assert wups("", "lamp", 0.0, similarity) == 0


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"threshold: expected a number in \[0, 1\], got 90"):
        wups("chair", "table", 90, similarity)
    with pytest.raises(TypeError, match="expected one string per question, got None"):
        wups(None, "table", 0.9, similarity)


class Synset:
    """A meaning: its path from the root, "entity.furniture.seat"; similarity by the depth of what two paths share."""

    def __init__(self, path: str):
        self.path = path.split(".")

    def wup_similarity(self, other: "Synset") -> float | None:
        shared = sum(a == b for a, b in zip(self.path, other.path, strict=False))
        return 2 * shared / (len(self.path) + len(other.path)) if shared else None


@pytest.fixture
def nltk(monkeypatch):
    """`nltk(version, error)` makes an NLTK whose WordNet has three words, or fails to load; the words that it was asked."""
    nouns = {"chair": ["entity.furniture.seat", "person"], "table": ["entity.furniture"], "man": ["person"]}

    def install(version: str = "3.0", error: Exception | None = None) -> list[str]:
        asked = []

        def synsets(word, pos):
            assert pos == "n"
            asked.append(word)
            return [Synset(path) for path in nouns.get(word, [])]

        def ensure_loaded():
            if error is not None:
                raise error

        package, corpus = ModuleType("nltk"), ModuleType("nltk.corpus")
        package.__spec__ = SimpleNamespace(name="nltk")
        corpus.wordnet = SimpleNamespace(synsets=synsets, ensure_loaded=ensure_loaded, get_version=lambda: version)
        monkeypatch.setitem(sys.modules, "nltk", package)
        monkeypatch.setitem(sys.modules, "nltk.corpus", corpus)
        return asked

    wordnet_similarity.cache_clear()
    yield install
    wordnet_similarity.cache_clear()


def test_similarity_is_that_of_the_two_most_alike_meanings(nltk):
    asked = nltk()
    similarity = wordnet_similarity()
    assert similarity("chair", "table") == pytest.approx(0.8)
    assert similarity("chair", "man") == 1
    # Nothing in common, and no noun.
    assert similarity("table", "man") == 0
    assert similarity("garbage_bin", "table") == 0
    # What was asked is remembered, in every evaluation of a run.
    before = len(asked)
    assert wordnet_similarity()("chair", "table") == pytest.approx(0.8)
    assert len(asked) == before


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, "NLTK is not installed"),
        ({"error": LookupError("Resource wordnet not found.")}, "NLTK's WordNet is missing or damaged (LookupError)"),
        ({"error": BadZipFile("File is not a zip file")}, "NLTK's WordNet is missing or damaged (BadZipFile)"),
        ({"version": "3.1"}, "NLTK's WordNet is version 3.1, and published numbers are by 3.0"),
    ],
    ids=["package", "data", "zip", "version"],
)
def test_without_wordnet_it_is_said_once_and_wups_is_left_out(nltk, monkeypatch, caplog, given, reason):
    if given is None:
        monkeypatch.setitem(sys.modules, "nltk", None)
    else:
        nltk(**given)
    assert wordnet_similarity() is wordnet_similarity() is None
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"WUPS is left out: {reason}. It needs pip install nltk, and once python -m nltk"
    )
    with pytest.raises(ValueError, match="^similarity: expected a function of two words, got None"):
        wups("table", "chair", 0.9, wordnet_similarity())
    # Nor does it stop what can be measured.
    assert daquar_metrics(["table, chair"], ["chair,table"], wordnet_similarity()) == {"accuracy": 1.0}
