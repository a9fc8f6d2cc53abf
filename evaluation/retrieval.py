"""What a number means in image-text retrieval: rankings from scores, recall@K, and what chance would give.

All are pure functions over tensors and lists. A ranking is a tensor of indices of candidates, one row a query, best
first; B_i images and B_t texts are ranked in two directions:

| direction | queries (the denominator) | candidates | a hit at K |
|---|---|---|---|
| image to text | B_i images | B_t texts | any text of the image is among the K best |
| text to image | B_t texts | B_i images | the image of the text is among the K best |

This recall@K is the hit rate of the papers (VSE++, Faghri et al. 2018; CLIP, ALBEF, BLIP; CLIP_benchmark), from
Karpathy and Fei-Fei 2015. Libraries for document retrieval (torchmetrics `RetrievalRecall`) divide each query's hits
by its number of matches instead, which for the five captions of an image gives at most 0.2 at K = 1.

`ks` are the cut-offs, one or more, each at least 1. A `ValueError` names the argument that cannot be measured by.
"""

import math
from collections.abc import Collection, Mapping, Sequence

import torch

# Rows that are ranked at a time: full-size temporaries of a whole benchmark (5,000 x 25,000) would take gigabytes.
_ROWS = 1024


def best_first(scores: torch.Tensor, k: int) -> torch.LongTensor:
    """The k best candidates of each query, best first; equal scores keep the order of the candidates, also at the cut.

    Scores in half precision tie often, and `torch.topk` breaks ties as it likes, differently on each device.

    Args:
        scores: (queries, candidates), any float dtype and device; infinities are fine.
        k: how many to keep, at least 1.

    Returns:
        (queries, min(k, candidates)), on the device of `scores`.

    >>> best_first(torch.tensor([[0.1, 0.7, 0.7, 0.9, 0.7]]), k=3)
    tensor([[3, 1, 2]])
    """
    _check_scores(scores)
    if k < 1:
        raise ValueError(f"k: got {k}, expected at least 1.")
    k = min(k, scores.shape[1])
    ranked = []
    for rows in scores.split(_ROWS):
        values, kept = rows.topk(k, dim=1)
        # Where more scores reach the k-th best than there is room for, topk kept any of those equal to it: sort them all.
        cut_through_tie = (rows >= values[:, -1:]).sum(dim=1) > k
        kept[cut_through_tie] = rows[cut_through_tie].sort(dim=1, descending=True, stable=True).indices[:, :k]
        kept = kept.sort(dim=1).values
        ranked.append(rerank(kept, rows.gather(1, kept)))
    return torch.cat(ranked)


def rerank(candidates: torch.LongTensor, scores: torch.Tensor) -> torch.LongTensor:
    """The same candidates by falling score, as a slow model scored them after a fast one had found them.

    Args:
        candidates: (queries, k), best first.
        scores: (queries, m) with m <= k, new scores of the first m candidates. The others follow as they were.

    Returns:
        (queries, k); of equal scores the one that came first stays first.

    >>> rerank(torch.tensor([[3, 1, 2, 0]]), torch.tensor([[0.1, 0.5, 0.5]]))
    tensor([[1, 2, 3, 0]])
    """
    _check_scores(scores)
    if candidates.ndim != 2 or len(candidates) != len(scores) or candidates.shape[1] < scores.shape[1]:
        raise ValueError(
            f"scores: got shape {tuple(scores.shape)} for candidates of shape {tuple(candidates.shape)}; "
            "expected (queries, m) for (queries, k) with m <= k."
        )
    head, tail = candidates.tensor_split([scores.shape[1]], dim=1)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return torch.cat([head.gather(1, order), tail], dim=1)


def _check_scores(scores: torch.Tensor) -> None:
    if scores.ndim != 2:
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, expected one row a query, one column a candidate.")
    if scores.isnan().any():
        raise ValueError("scores: NaN has no place in a ranking; look for the embeds or logits that it comes from.")


def recall_at_k(
    ranked: torch.LongTensor | Sequence[Sequence[int]],
    matches: Sequence[Collection[int]],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Share of the queries with any of their matches among their k first candidates.

    Args:
        ranked: (queries, n), or lists, which may differ in length. What was not ranked counts as not found, so n must
            reach the largest k unless there are no more candidates: that cannot be seen from here.
        matches: for each query the candidates that are right, one or more, in any order.

    Returns:
        `recall@k` for each k, in [0, 1]; all queries are the denominator.

    >>> recall_at_k([[2, 0, 1], [1, 2, 0]], matches=[{0, 1}, {1}], ks=(1, 2))
    {'recall@1': 0.5, 'recall@2': 1.0}
    """
    check_ks(ks)
    rows = ranked[:, : max(ks)].tolist() if isinstance(ranked, torch.Tensor) else ranked
    if len(rows) != len(matches) or len(rows) == 0:
        raise ValueError(f"ranked, matches: expected one each a query, got {len(rows)}, {len(matches)}.")
    for query, right in enumerate(matches):
        if len(right) == 0:
            raise ValueError(f"matches: query {query} has none, so nothing could be found for it; leave it out.")

    places = [
        next((place for place, candidate in enumerate(row[: max(ks)]) if candidate in right), math.inf)
        for row, right in zip(rows, matches, strict=True)
    ]
    return {f"recall@{k}": sum(place < k for place in places) / len(places) for k in ks}


def retrieval_metrics(
    image_to_text: torch.LongTensor,
    text_to_image: torch.LongTensor,
    image_of_text: Sequence[int],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall in both directions, from the rankings of all images and all texts.

    Args:
        image_to_text, text_to_image: (B_i, n) and (B_t, n), see `best_first`.
        image_of_text: (B_t,), which image each text belongs to; no image goes without.

    Returns:
        `image_to_text_recall@k` and `text_to_image_recall@k` for each k, and `mean_recall`, the mean of them all
        (of six by default: r_mean of ALBEF and BLIP). All in [0, 1].

    Two images with two texts each. Image 0 finds one of its texts (0 and 1) first, image 1 finds text 0 before its own;
    texts 0, 1 and 3 find their image first, text 2 finds it second:

    >>> image_to_text = torch.tensor([[1, 2], [0, 3]])
    >>> text_to_image = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 0]])
    >>> retrieval_metrics(image_to_text, text_to_image, [0, 0, 1, 1], ks=(1,))
    {'image_to_text_recall@1': 0.5, 'text_to_image_recall@1': 0.75, 'mean_recall': 0.625}
    """
    check_ks(ks)
    num_images, num_texts = len(image_to_text), len(text_to_image)
    if len(image_of_text) != num_texts:
        raise ValueError(f"image_of_text: got {len(image_of_text)} entries for {num_texts} rows of text_to_image.")
    rankings = (("image_to_text", image_to_text, num_texts), ("text_to_image", text_to_image, num_images))
    for name, ranked, candidates in rankings:
        needed = min(max(ks), candidates)
        if ranked.ndim != 2 or ranked.shape[1] < needed:
            raise ValueError(
                f"{name}: got shape {tuple(ranked.shape)}, expected (queries, n) with n at least {needed} for "
                f"recall@{max(ks)} among {candidates} candidates; rank more of them."
            )
    texts_of_image: list[list[int]] = [[] for _ in range(num_images)]
    for text, image in enumerate(image_of_text):
        if not 0 <= image < num_images:
            raise ValueError(f"image_of_text: text {text} has image {image}, expected 0 to {num_images - 1}.")
        texts_of_image[image].append(text)
    if [] in texts_of_image:
        raise ValueError(f"image_of_text: no text belongs to image {texts_of_image.index([])}; leave such images out.")

    return _both_directions(
        recall_at_k(image_to_text, texts_of_image, ks),
        recall_at_k(text_to_image, [[image] for image in image_of_text], ks),
    )


def chance_recall(captions_per_image: Sequence[int], ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """`retrieval_metrics` of a random ranking on average, exactly: the line that a model has to pass.

    With N images, which have `captions_per_image` (N,) of the T texts, text to image: min(k, N) / N. Image to text, for an
    image with m of the texts: 1 - C(T - m, k) / C(T, k), where all k drawn texts belong to other images; then the mean over
    the images.

    >>> chance_recall([2, 2], ks=(1,))
    {'image_to_text_recall@1': 0.5, 'text_to_image_recall@1': 0.5, 'mean_recall': 0.5}
    """
    check_ks(ks)
    if len(captions_per_image) == 0 or min(captions_per_image) < 1:
        raise ValueError("captions_per_image: expected one image at least, and a number from 1 on for each.")
    num_images = len(captions_per_image)
    num_texts = sum(captions_per_image)
    image_to_text = {}
    for k in ks:
        drawn = min(k, num_texts)
        missed = sum(math.comb(num_texts - m, drawn) for m in captions_per_image)
        image_to_text[f"recall@{k}"] = 1 - missed / (num_images * math.comb(num_texts, drawn))
    return _both_directions(image_to_text, {f"recall@{k}": min(k, num_images) / num_images for k in ks})


def recall_table(rows: Mapping[str, Mapping[str, float]], ks: Sequence[int] = (1, 5, 10)) -> str:
    """A Markdown table, in percent, of `retrieval_metrics` or `chance_recall` by what ranked.

    >>> print(recall_table({"chance": chance_recall([2, 2], ks=(1,))}, ks=(1,)))
    |        | image to text R@1 | text to image R@1 | mean |
    | :----- | ----------------: | ----------------: | ---: |
    | chance |              50.0 |              50.0 | 50.0 |
    """
    keys = [f"{direction}_recall@{k}" for direction in ("image_to_text", "text_to_image") for k in ks]
    names = [key.replace("_recall@", " R@").replace("_", " ") for key in keys]
    head = ["", *(f"R@{k}" if k != ks[0] else name for name, k in zip(names, (*ks, *ks), strict=True)), "mean"]
    body = [[name, *(f"{100 * row[key]:.1f}" for key in (*keys, "mean_recall"))] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in (head, rule, *body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def check_ks(ks: Sequence[int]) -> None:
    """Refuses cut-offs that nothing can be measured by, with a `ValueError`."""
    if len(ks) == 0 or min(ks) < 1:
        raise ValueError(f"ks: got {list(ks)}, expected one or more cut-offs, each at least 1.")


def _both_directions(image_to_text: dict[str, float], text_to_image: dict[str, float]) -> dict[str, float]:
    metrics = {f"image_to_text_{name}": value for name, value in image_to_text.items()}
    metrics |= {f"text_to_image_{name}": value for name, value in text_to_image.items()}
    return metrics | {"mean_recall": sum(metrics.values()) / len(metrics)}
