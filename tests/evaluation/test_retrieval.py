"""Rankings against plain sorting, recall against a literal count and tables worked by hand, chance against drawing."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hivilt.evaluation import retrieval
from hivilt.evaluation.retrieval import best_first, chance_recall, recall_at_k, rerank, retrieval_metrics

INF = math.inf


@st.composite
def score_lists(draw, smallest=0):
    """(queries, candidates) scores of few values, so that most of them tie."""
    candidates = draw(st.integers(smallest, 9))
    value = st.sampled_from([-INF, -1.0, -0.0, 0.0, 0.5, INF])
    return draw(st.lists(st.lists(value, min_size=candidates, max_size=candidates), min_size=1, max_size=5))


def plainly_ranked(row, k):
    return sorted(range(len(row)), key=lambda j: (-row[j], j))[:k]


@given(score_lists(), st.integers(1, 12), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.half]))
def test_best_first_is_a_stable_sort(rows, k, dtype):
    ranked = best_first(torch.tensor(rows, dtype=dtype), k)
    assert ranked.dtype == torch.long
    assert ranked.tolist() == [plainly_ranked(row, k) for row in rows]


@given(st.integers(0, 2**16), st.integers(1, 400))
def test_best_first_of_long_rows(seed, k):
    generator = torch.Generator().manual_seed(seed)
    # The first row hardly ties, the second has some forty values, the third one.
    scores = torch.randn(3, 300, generator=generator) * torch.tensor([[1.0], [0.01], [0.0]])
    scores[1] = scores[1].round(decimals=3)
    assert best_first(scores, k).tolist() == [plainly_ranked(row, k) for row in scores.tolist()]


def test_best_first_takes_many_rows_in_blocks(monkeypatch):
    scores = torch.randint(0, 3, (7, 5), generator=torch.Generator().manual_seed(0)).float()
    at_once = best_first(scores, 3)
    monkeypatch.setattr(retrieval, "_ROWS", 2)
    assert best_first(scores, 3).tolist() == at_once.tolist()
    assert best_first(scores[:0], 3).shape == (0, 3)


def test_best_first_leaves_the_scores_alone():
    scores = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]], requires_grad=True)
    before = scores.tolist()
    best_first(scores, 1)
    assert scores.tolist() == before


@given(score_lists(), st.data())
def test_rerank_sorts_what_it_has_scores_for(rows, data):
    scored = len(rows[0])
    k = data.draw(st.integers(scored, scored + 3))
    candidates = [data.draw(st.permutations(range(k))) for _ in rows]
    expected = [
        [found[place] for place in plainly_ranked(row, scored)] + found[scored:]
        for found, row in zip(candidates, rows, strict=True)
    ]
    assert rerank(torch.tensor(candidates).long().view(len(rows), k), torch.tensor(rows)).tolist() == expected


@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (6,)])
def test_rerank_refuses_what_does_not_fit(shape):
    with pytest.raises(ValueError, match="scores: got shape"):
        rerank(torch.zeros(2, 3, dtype=torch.long), torch.zeros(shape))


def test_nan_and_odd_sizes_are_refused():
    broken = torch.tensor([[0.0, math.nan]])
    with pytest.raises(ValueError, match="NaN"):
        best_first(broken, 1)
    with pytest.raises(ValueError, match="NaN"):
        rerank(torch.tensor([[0, 1]]), broken)
    with pytest.raises(ValueError, match="k: got 0"):
        best_first(torch.zeros(1, 2), 0)
    with pytest.raises(ValueError, match=r"got shape \(2,\)"):
        best_first(torch.zeros(2), 1)


@pytest.mark.checklist("9")
def test_recall_worked_by_hand():
    ranked = torch.tensor([[4, 0, 2], [1, 3, 0], [2, 4, 3], [0, 1, 2]])
    matches = [{0, 2}, {1}, {0}, [2]]  # found second (and third), first, never, third
    assert recall_at_k(ranked, matches, ks=(1, 2, 3)) == {"recall@1": 0.25, "recall@2": 0.5, "recall@3": 0.75}
    assert recall_at_k(ranked, matches) == {"recall@1": 0.25, "recall@5": 0.75, "recall@10": 0.75}


def test_one_match_of_five_is_a_whole_hit():
    assert recall_at_k([[3, 9, 8]], [range(5)], ks=(1,)) == {"recall@1": 1}


def test_recall_of_lists_that_differ_in_length():
    assert recall_at_k([[1], [], [0, 2, 1]], [[1], [1], [1]], ks=(1, 3)) == {"recall@1": 1 / 3, "recall@3": 2 / 3}


@given(st.data())
def test_recall_is_the_literal_count(data):
    candidates = data.draw(st.integers(1, 6))
    ranked = data.draw(st.lists(st.permutations(range(candidates)), min_size=1, max_size=6))
    some = st.sets(st.integers(0, candidates - 1), min_size=1)
    matches = [data.draw(some) for _ in ranked]
    ks = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=3))
    hits = {k: sum(bool(right & set(row[:k])) for row, right in zip(ranked, matches, strict=True)) for k in ks}
    assert recall_at_k(torch.tensor(ranked), matches, ks) == {f"recall@{k}": hits[k] / len(ranked) for k in ks}


def test_recall_refuses_what_has_no_answer():
    with pytest.raises(ValueError, match="got 2, 1"):
        recall_at_k([[0], [1]], [[0]])
    with pytest.raises(ValueError, match="got 0, 0"):
        recall_at_k([], [])
    with pytest.raises(ValueError, match="query 1 has none"):
        recall_at_k([[0], [1]], [[0], []])
    for ks in ([1, 0], []):
        with pytest.raises(ValueError, match="ks: got"):
            recall_at_k([[0]], [[0]], ks)


@pytest.mark.checklist("9")
def test_both_directions_worked_by_hand():
    # Three images with 2, 1 and 3 texts.
    image_of_text = [0, 0, 1, 2, 2, 2]
    image_to_text = torch.tensor([[1, 0, 2], [0, 2, 1], [0, 1, 2]])  # found first, second, not among three
    text_to_image = torch.tensor([[0, 1, 2], [1, 0, 2], [1, 2, 0], [0, 1, 2], [0, 2, 1], [2, 0, 1]])
    # found first, second, first, third, second, first
    assert retrieval_metrics(image_to_text, text_to_image, image_of_text, ks=(1, 2, 3)) == {
        "image_to_text_recall@1": 1 / 3,
        "image_to_text_recall@2": 2 / 3,
        "image_to_text_recall@3": 2 / 3,
        "text_to_image_recall@1": 3 / 6,
        "text_to_image_recall@2": 5 / 6,
        "text_to_image_recall@3": 1,
        "mean_recall": pytest.approx((1 / 3 + 2 / 3 + 2 / 3 + 3 / 6 + 5 / 6 + 1) / 6),
    }


def test_metrics_of_scores_of_both_directions():
    scores = torch.tensor([[0.9, 0.1, 0.8], [0.2, 0.3, 0.7]])  # (images, texts), image 1 has texts 1 and 2
    metrics = retrieval_metrics(best_first(scores, 10), best_first(scores.T, 10), [0, 1, 1])
    assert metrics["image_to_text_recall@1"] == 1
    assert metrics["text_to_image_recall@1"] == 2 / 3
    assert metrics["text_to_image_recall@10"] == 1


def test_metrics_refuse_a_map_that_does_not_fit():
    image_to_text, text_to_image = torch.tensor([[0, 1, 2], [0, 1, 2]]), torch.tensor([[0, 1], [0, 1], [0, 1]])
    with pytest.raises(ValueError, match="got 2 entries.*3 rows"):
        retrieval_metrics(image_to_text, text_to_image, [0, 1])
    for image in (-1, 2):
        with pytest.raises(ValueError, match=f"text 1 has image {image}, expected 0 to 1"):
            retrieval_metrics(image_to_text, text_to_image, [0, image, 1])
    with pytest.raises(ValueError, match="no text belongs to image 1"):
        retrieval_metrics(image_to_text, text_to_image, [0, 0, 0])


def test_metrics_refuse_rankings_that_end_early():
    ranked = torch.arange(20).repeat(20, 1)
    for cut in ((ranked[:, :9], ranked), (ranked, ranked[:, :9])):
        with pytest.raises(ValueError, match="n at least 10 for recall@10 among 20"):
            retrieval_metrics(*cut, range(20))
    assert retrieval_metrics(ranked[:, :10], ranked[:, :10], range(20))["mean_recall"] == pytest.approx(16 / 60)


@pytest.mark.parametrize("captions", [[1], [2, 2], [1, 3], [1, 2, 2]])
def test_chance_is_the_mean_over_all_rankings(captions):
    image_of_text = [image for image, number in enumerate(captions) for _ in range(number)]
    texts_of_image = [[t for t, owner in enumerate(image_of_text) if owner == image] for image in range(len(captions))]
    ks = (1, 2, 4, 9)
    chance = chance_recall(captions, ks)
    for direction, candidates, matches in (
        ("image_to_text", sum(captions), texts_of_image),
        ("text_to_image", len(captions), [[image] for image in image_of_text]),
    ):
        rankings = list(itertools.permutations(range(candidates)))
        every = [recall_at_k([ranking] * len(matches), matches, ks) for ranking in rankings]
        for k in ks:
            mean = sum(recall[f"recall@{k}"] for recall in every) / len(every)
            assert chance[f"{direction}_recall@{k}"] == pytest.approx(mean)


def test_chance_of_a_benchmark():
    chance = chance_recall([5] * 1000)
    everything = torch.arange(10).repeat(10, 1)
    assert list(chance) == list(retrieval_metrics(everything, everything, range(10)))
    assert chance["image_to_text_recall@1"] == pytest.approx(0.001)
    assert chance["text_to_image_recall@10"] == 0.01
    assert chance["mean_recall"] == pytest.approx(sum(list(chance.values())[:6]) / 6)
    assert chance_recall([1, 1, 1])["mean_recall"] == pytest.approx((1 / 3 + 1 + 1) / 3)


def test_chance_refuses_what_has_no_answer():
    for captions in ([], [1, 0]):
        with pytest.raises(ValueError, match="captions_per_image: expected one image at least"):
            chance_recall(captions)
    with pytest.raises(ValueError, match="ks: got"):
        chance_recall([1], ks=[0])
