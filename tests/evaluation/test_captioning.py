"""Captioning metrics against what the official code (coco-caption on CoreNLP 3.4.1) gives, and the formulas in plain loops."""

import importlib.util
import math
import shutil
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hivilt.evaluation.captioning import (
    bleu,
    caption_scores,
    check_meteor,
    cider_d,
    document_frequencies,
    rouge_l,
    tokenize,
)

# The official tokens of each text.
TOKENS = {
    "A man (left) rides a horse.": "a man -lrb- left -rrb- rides a horse",
    "Two dogs -- one black, one white -- play!": "two dogs one black one white play",
    "a T-shirt and a 3-year-old's toy": "a t-shirt and a 3-year-old 's toy",
    "The cat's on the mat; it isn't happy?": "the cat 's on the mat it is n't happy",
    'A sign reads "STOP".': "a sign reads stop",
    "A sign reads 'STOP'.": "a sign reads stop",
    "$5 and 50% off & more": "$ 5 and 50 % off & more",
    "10:30 a.m. on the U.S. coast...": "10:30 a.m. on the u.s. coast",
    "wanna gotta cannot": "wan na got ta can not",
    "can't won't I'm they've": "ca n't wo n't i 'm they 've",
    "an e-mail: foo@bar.com / http://x.y": "an e-mail foo@bar.com / http://x.y",
    "A [red] {blue} car": "a -lsb- red -rsb- -lcb- blue -rcb- car",
    "crème brûlée at a café": "crème brûlée at a café",
    "1,000 people": "1,000 people",
    "3/4 cup": "3/4 cup",
    "man/woman": "man/woman",
    "*star* #tag ~tilde^ _under_ a+b=c": "* star * #tag ~ tilde ^ _ under _ a + b = c",
    "“curly” ‘quotes’ – dash — long …": "curly quotes dash long",
    "end of sentence.Next": "end of sentence.next",
    "a...b": "a. b",
    "A.B.C. corp.": "a.b.c. corp.",
    "Mr. Smith's dog.": "mr. smith 's dog",
    "half ½ cup £5 €6": "half 1/2 cup # 5 $ 6",
    "o'clock 'til rock'n'roll": "o'clock 'til rock 'n' roll",
    "<b>bold</b>": "<b> bold </b>",
    "smile :) ;-)": "smile :-rrb- ;--rrb-",
    "dogs' toys": "dogs toys",
    "the 1990s 5'10\"": "the 1990s 5 10",
    "no.1 vs. no. 2": "no. 1 vs. no. 2",
    "..": "",
    "": "",
    "wow!!! really?! yes?": "wow !!! really ?! yes",
    "black--white white- -blue -5": "black white white blue -5",
    "rock 'n roll for 'em y'all ma'am": "rock 'n roll for 'em y' all ma'am",
    "shouldn't've i'd've let's": "should n't 've i 'd 've let 's",
    "12:30pm 20ft 4x4 '90s 90's": "12:30 pm 20ft 4x4 '90s 90 's",
    "a black-and-white dog,black-and-white cat": "a black-and-white dog,black-and-white cat",
    "b&w a_b x|y 5° “it’s”": "b & w a_b x | y 5 ° it 's",
    "a dog 😀 runs": "a dog runs",
}


@pytest.mark.parametrize("text", TOKENS)
def test_tokens_are_the_official_ones(text):
    assert " ".join(tokenize(text)) == TOKENS[text]


@given(st.text(max_size=30))
def test_every_text_has_tokens_without_blanks_and_line_breaks_move_nothing(text):
    assert all(token and not any(map(str.isspace, token)) for token in tokenize(text))
    assert tokenize(f"a dog\u2028runs\v{text}") == ("a", "dog", "runs", *tokenize(text))


V1 = [
    [
        "A brown dog runs across the green grass.",
        "A dog is running on a lawn.",
        "The brown dog races through a grassy field.",
        "A dog runs outside in the sun.",
        "Brown dog running in the park.",
    ],
    [
        "Two children build a sandcastle on the beach.",
        "A boy and a girl play in the sand.",
        "Kids making a sand castle near the ocean.",
        "Two kids are playing at the seaside.",
        "Children dig in wet sand by the water.",
    ],
    [
        "A man in a red jacket skis down a snowy hill.",
        "A skier wearing red goes down the slope.",
        "The man is skiing fast on fresh snow.",
        "Someone skis downhill in a red coat.",
        "A person on skis descends a mountain.",
    ],
    [
        "A bowl of soup sits next to a wooden spoon.",
        "A spoon lies beside a bowl of tomato soup.",
        "Red soup in a white bowl on a table.",
        "The bowl on the table is full of soup.",
        "Soup and a spoon on a wooden table.",
    ],
    [
        "A train waits at an empty station at night.",
        "A long train stopped at the platform.",
        "The station platform is empty beside a train.",
        "An old train stands in a dark station.",
        "A night view of a train in the station.",
    ],
]
V1_PREDICTIONS = [
    "A brown dog is running on the grass.",
    "Two kids play in the sand on the beach.",
    "A man skiing down a hill in a red jacket.",
    "A bowl of soup on a wooden table.",
    "A train at the station.",
]

# Predictions, references, then the official BLEU-1 to BLEU-4, METEOR, ROUGE-L and CIDEr-D.
OFFICIAL = {
    "V1": (V1_PREDICTIONS, V1, [0.904550, 0.774223, 0.605908, 0.450733, 0.345366, 0.607002, 1.902356]),
    "V2": ([captions[0] for captions in V1], V1, [1, 1, 1, 1, 1, 1, 2.757666]),
    "V3": (
        [prediction.upper().rstrip(".") for prediction in V1_PREDICTIONS],
        V1,
        [0.904550, 0.774223, 0.605908, 0.450733, 0.345366, 0.607002, 1.902356],
    ),
    "V4": (
        ["a cat on a mat"],
        [["A cat sits on a mat."]],
        [0.818731, 0.709042, 0.515768, 0.000087, 0.389975, 0.894428, 0],
    ),
    "V5": (
        ["the the the the the the the", "a dog barks"],
        [["the cat is on the mat", "there is a cat on the mat"], ["a dog barks"]],
        [0.500000, 0.353553, 0.275161, 0.000048, 0.272158, 0.656010, 3.910978],
    ),
    "V6": (
        ["", "a blue car parked outside"],
        [["a red bus"], ["a blue car parked outside"]],
        [0.548812, 0.548812, 0.548812, 0.548812, 0.686016, 0.500000, 5.000000],
    ),
    "V7": (
        ["a b c d e", "g h i j k"],
        [["a b c d", "a b c d e f"], ["g h i j k"]],
        [1, 1, 1, 1, 0.601593, 1, 9.175278],
    ),
    "V8": (
        ["red bus", "blue", "tall tree"],
        [["red bus"], ["blue car"], ["green tree"]],
        [0.654985, 0.517811, 0.006032, 0.000651, 0.326612, 0.709622, 2.664461],
    ),
    "V9": (V1_PREDICTIONS[:2], V1[:2], [0.941176, 0.830780, 0.682957, 0.490574, 0.328025, 0.575206, 1.809693]),
    "V10": (
        [*V1_PREDICTIONS[:4], "A train" + " at the station" * 4],
        V1,
        [0.816327, 0.694532, 0.529461, 0.384369, 0.336293, 0.569289, 1.654109],
    ),
    "V11": (
        ["a man left rides", "a cat sleeps"],
        [["a man (left) rides"], ["a cat sleeps"]],
        [0.751477, 0.582092, 0.439467, 0.000089, 0.448661, 0.886076, 4.971228],
    ),
}


@pytest.mark.parametrize("case", OFFICIAL)
def test_scores_are_the_official_ones(case):
    predictions, references, (*bleus, _, rouge, cider) = OFFICIAL[case]
    scores = caption_scores(predictions, references)
    given = [scores[name] for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")]
    assert given == pytest.approx([*bleus, rouge, cider], abs=1e-6)
    assert scores["num_images"] == len(predictions)


def test_scores_of_each_image_are_the_official_ones():
    def ciders(case):
        return cider_d(*OFFICIAL[case][:2])

    assert ciders("V1") == pytest.approx([2.217466, 1.514647, 1.260494, 2.826101, 1.693073], abs=1e-6)
    assert ciders("V2") == pytest.approx([2.918788, 2.186501, 2.484016, 3.198462, 3.000562], abs=1e-6)
    assert ciders("V5") == pytest.approx([0.321956, 7.5], abs=1e-6)
    assert ciders("V7") == pytest.approx([8.350556, 10], abs=1e-6)
    assert ciders("V8") == pytest.approx([5, 1.743384, 1.25], abs=1e-6)
    assert ciders("V9") == pytest.approx([2.120349, 1.499037], abs=1e-6)
    assert ciders("V10")[4] == pytest.approx(0.451835, abs=1e-6)
    assert ciders("V11") == pytest.approx([2.442457, 7.5], abs=1e-6)
    rouges = rouge_l(*OFFICIAL["V1"][:2])
    assert rouges == pytest.approx([0.674779, 0.475634, 0.566563, 0.670821, 0.647215], abs=1e-6)
    assert rouge_l(*OFFICIAL["V10"][:2])[4] == pytest.approx(0.458647, abs=1e-6)
    each = [bleu([prediction], [captions])[[0, 3]] for prediction, captions in zip(V1_PREDICTIONS, V1, strict=True)]
    assert np.transpose(each) == pytest.approx(
        np.array([[1, 0.888889, 0.904837, 1, 0.670320], [0.516973, 0.467138, 0.339596, 0.691442, 0]]), abs=1e-6
    )


captions = st.lists(st.sampled_from("abcde"), min_size=1, max_size=8).map(" ".join)
splits = st.lists(st.tuples(captions, st.lists(captions, min_size=1, max_size=3)), min_size=2, max_size=6)


@given(splits)
def test_cider_d_is_the_formula_in_plain_loops(split):
    def ngrams(text, n):
        words = text.split()
        return [" ".join(words[start : start + n]) for start in range(len(words) - n + 1)]

    def weight(text, n, ngram):
        df = sum(any(ngram in ngrams(other, n) for other in others) for _, others in split)
        return ngrams(text, n).count(ngram) * (math.log(len(split)) - math.log(max(1, df)))

    expected = []
    for prediction, references in split:
        score = 0.0
        for n in (1, 2, 3, 4):
            for reference in references:
                both = set(ngrams(prediction, n) + ngrams(reference, n))
                c = {g: weight(prediction, n, g) for g in both}
                s = {g: weight(reference, n, g) for g in both}
                norms = math.sqrt(sum(v * v for v in c.values())) * math.sqrt(sum(v * v for v in s.values()))
                if norms > 0:
                    gap = len(prediction.split()) - len(reference.split())
                    product = sum(min(c[g], s[g]) * s[g] for g in both) / norms
                    score += 10 / 4 / len(references) * math.exp(-(gap**2) / 72) * product
        expected.append(score)
    predictions, references = zip(*split, strict=True)
    assert cider_d(predictions, references) == pytest.approx(expected, abs=1e-9)


@given(splits, st.randoms())
def test_order_of_images_and_of_references_does_not_matter(split, order):
    mixed = [(prediction, order.sample(references, len(references))) for prediction, references in split]
    order.shuffle(mixed)
    one, other = (caption_scores(*zip(*rows, strict=True)) for rows in (split, mixed))
    assert one == pytest.approx(other)


@given(st.lists(captions, min_size=1, max_size=6))
def test_the_only_reference_itself_is_right(texts):
    references = [[text] for text in texts]
    longest = max(len(text.split()) for text in texts)
    assert bleu(texts, references)[: min(4, longest)] == pytest.approx(1)
    assert rouge_l(texts, references) == pytest.approx(1)


def test_frequencies_of_other_images():
    predictions, references = V1_PREDICTIONS, V1
    frequencies = document_frequencies(references)
    assert frequencies.num_images == 5 and frequencies.counts[("a", "dog")] == 1 and frequencies.counts[("a",)] == 5
    assert cider_d(predictions, references, frequencies) == pytest.approx(cider_d(predictions, references))
    # Of one image there is an idf now, the same as among all five.
    (alone,) = cider_d(predictions[2:3], references[2:3], frequencies)
    assert alone == pytest.approx(1.260494, abs=1e-6)


def test_few_images_are_a_warning(caplog):
    caption_scores(V1_PREDICTIONS * 2, V1 * 2)
    assert not caplog.records
    caption_scores(V1_PREDICTIONS, V1)
    assert [record.getMessage()[:48] for record in caplog.records] == [
        "CIDEr-D over the references of 5 images says lit"
    ]


def test_images_are_joined_by_their_ids():
    predictions = dict(zip("vwxyz", V1_PREDICTIONS, strict=True))
    references = dict(zip("vwxyz", V1, strict=True))
    backwards = dict(reversed(references.items()))
    assert caption_scores(predictions, backwards) == caption_scores(V1_PREDICTIONS, V1)
    with pytest.raises(ValueError, match="references: nothing for 2 of 5 images, such as 'w', 'z'"):
        caption_scores(predictions, {image: references[image] for image in "vxy"})
    with pytest.raises(ValueError, match="predictions: nothing for 1 of 5 images, such as 'y'"):
        caption_scores({image: predictions[image] for image in "vwxz"}, references)


def test_distinct_predictions():
    assert caption_scores(["A dog.", "a dog", "a cat"], [["a dog"]] * 3)["distinct"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("measure", [bleu, rouge_l, cider_d, caption_scores])
def test_wrong_arguments_are_named(measure):
    with pytest.raises(ValueError, match="references: got an empty list; there is no score without an image"):
        measure([], [])
    with pytest.raises(ValueError, match="references: expected one per image, got 2 for 1 images"):
        measure(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="references: got an empty list for image 1"):
        measure(["a", "b"], [["a"], []])
    with pytest.raises(TypeError, match="predictions: expected one string per image, got None for image 1"):
        measure(["a", None], [["a"], ["b"]])
    for wrong in ("a dog", [7], None):
        with pytest.raises(TypeError, match="references: expected a list of strings per image, got .* for image 0"):
            measure(["a dog"], [wrong])
    with pytest.raises(TypeError, match="predictions: expected a list, got str"):
        measure("a", [["a"]])
    with pytest.raises(TypeError, match="predictions: expected a list, got dict; dicts by image id, both of them,"):
        measure({1: "a"}, [["a"]])


def test_meteor_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(ValueError, match=r"needs Java .* and the package pycocoevalcap \(pip install pycocoevalcap\)"):
        check_meteor()
    with pytest.raises(ValueError, match="meteor: METEOR needs Java"):
        caption_scores(V1_PREDICTIONS, V1, meteor=True)
    # A `java` that does not run, as macOS has one, is none.
    stub = tmp_path / "java"
    stub.write_text("#!/bin/sh\nexit 1\n")
    stub.chmod(0o755)
    with pytest.raises(ValueError, match="needs Java"):
        check_meteor()
    stub.write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(ValueError, match="METEOR needs the package pycocoevalcap"):
        check_meteor()


needs_meteor = pytest.mark.skipif(
    shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None,
    reason="METEOR needs Java and pycocoevalcap",
)


@needs_meteor
@pytest.mark.slow
@pytest.mark.parametrize("case", ["V1", "V6"])
def test_meteor_is_the_official_one(case):
    predictions, references, numbers = OFFICIAL[case]
    assert caption_scores(predictions, references, meteor=True)["meteor"] == pytest.approx(numbers[4], abs=1e-6)


@needs_meteor
def test_a_java_that_stops_is_named(monkeypatch, tmp_path):
    stub = tmp_path / "java"
    stub.write_text("#!/bin/sh\nexit 0\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="meteor: Java stopped before it had answered"):
        caption_scores(V1_PREDICTIONS, V1, meteor=True)
