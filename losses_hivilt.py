"""What HiViLT learns by: losses as pure functions of scores, and the batch that retrieval's are computed over, which
several processes may share.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from .boxes_hivilt import assign_cells, overlap, to_corners
from .configuration_hivilt import HiViLTConfig
from .fusion_hivilt import HiViLTImageStates, HiViLTTextStates, tensors_of, with_tensors

MAX_LOGIT_SCALE = 4.6052  # ln 100, as CLIP clamps it


def classification_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`L_cls` of scores `(B_t, num_labels)` in float32, over the rows that have an answer; zero where none has.

    Integer labels `(B_t,)` give the cross-entropy; -100 marks a row without an answer. Soft labels in [0, 1],
    `(B_t, num_labels)`, give the binary cross-entropy times the number of classes as in ViLT (arXiv 2102.03334); a row of
    zeros is one without a known answer.
    """
    logits, labels = logits.float(), labels.to(logits.device)
    if labels.is_floating_point():
        answered = (labels > 0).any(dim=-1)
        losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").sum(dim=-1)
    else:
        labels = labels.long()
        answered = labels != -100
        losses = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    return (losses * answered).sum() / answered.sum().clamp(min=1)


def token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross-entropy of the tokens `labels` `(B, N_d)`, -100 where there is none, by scores `(B, N_d, vocab)` of the
    same places, in float32: their sum divided by `num_items`, the tokens of all batches that one step learns from;
    unset, by those of this one. With `label_smoothing` `e` a token costs
    `(1 - e) * -log p(token) + e * mean over the vocabulary of -log p` (Szegedy et al., arXiv 1512.00567, section 7).
    """
    labels = labels.to(logits.device).long()
    total = F.cross_entropy(
        logits.flatten(0, 1).float(),
        labels.flatten(),
        ignore_index=-100,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    if num_items is None:
        num_items = (labels != -100).sum()
    # Of no token at all the sum is 0.
    return total / torch.as_tensor(num_items, device=total.device).clamp(min=1)


def grounding_loss(
    logits: torch.Tensor,
    pred_boxes: torch.Tensor,
    boxes: torch.Tensor,
    grid: tuple[int, int],
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """The loss of scores `(B_t, height * width)` and boxes `(B_t, height * width, 4)` of the rows of a grid, whose texts mean
    `boxes` `(B_t, n, 4)`, in float32. All boxes are `(cx, cy, width, height)` in parts of the image; zeros fill a batch up.

    Of a text it is the sum of twice the binary cross-entropy over all rows and of `5 L1 + 2 (1 - GIoU)` (DETR, arXiv
    2005.12872, section A.4) over the positives, which [`assign_cells`] gives a box, divided by the number of positives: a
    large thing weighs as much as a small one. The cross-entropy is not focal, which made so little of it beside the boxes
    that what a text means was learnt late. What is counted are texts: their sum is divided by `num_items`, the texts of
    all batches that one step learns from; unset, by those of this one.
    """
    boxes = boxes.to(logits.device).float()
    owner = assign_cells(boxes, grid)
    positive = owner >= 0
    targets = boxes.gather(1, owner.clamp(min=0)[:, :, None].expand(-1, -1, 4))  # (B_t, height * width, 4)
    pred_boxes = pred_boxes.float()
    _, generalized = overlap(to_corners(pred_boxes), to_corners(targets))
    box_losses = 5 * (pred_boxes - targets).abs().sum(dim=-1) + 2 * (1 - generalized)

    row_losses = 2 * F.binary_cross_entropy_with_logits(logits.float(), positive.float(), reduction="none")
    losses = row_losses + torch.where(positive, box_losses, 0.0)
    total = (losses.sum(dim=1) / positive.sum(dim=1).clamp(min=1)).sum()
    if num_items is None:
        num_items = len(logits)
    return total / (num_items.to(total.device) if isinstance(num_items, torch.Tensor) else num_items)


def contrastive_loss(logits_per_image: torch.Tensor, positives: torch.BoolTensor) -> torch.Tensor:
    """`L_contrast` of scaled similarities `(B_i, B_t)`: symmetric InfoNCE with a uniform target over every match (CLIP,
    arXiv 2103.00020; several positives as in ALBEF, arXiv 2107.07651), over the rows that have one.
    """

    def one_way(logits, positives):
        matches = positives.sum(dim=-1)
        matching = torch.where(positives, F.log_softmax(logits.float(), dim=-1), 0.0).sum(dim=-1)
        return -(matching / matches.clamp(min=1)).sum() / (matches > 0).sum().clamp(min=1)

    return (one_way(logits_per_image, positives) + one_way(logits_per_image.t(), positives.t())) / 2


def contrastive_floor(positives: torch.BoolTensor) -> torch.FloatTensor:
    """The least that [`contrastive_loss`] can be: a row of `m` matches shares its probability between them, which costs
    `ln m`. Less this the loss is 0 at best, however many matches there are, and its gradient is the same.
    """
    return contrastive_loss(positives.float().log(), positives)


def left_aligned(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.LongTensor:
    """Tokens without their padding, each 1 higher, and zeros after them, `(B_t, N_t)`: equal for equal texts alone."""
    is_padding = attention_mask.to(input_ids.device) == 0
    order = is_padding.to(torch.uint8).argsort(dim=1, stable=True)
    return (input_ids + 1).masked_fill(is_padding, 0).gather(1, order)


def first_equal(rows: torch.Tensor) -> torch.LongTensor:
    """For each row of integers the first that equals it, `(B, N)` -> `(B,)`; itself, if it is new."""
    # How many tokens differ: exact to 16 million of them, and of a static shape, as a compiled graph needs it. Single
    # numbers are compared as they are, of any size.
    equal = rows == rows.t() if rows.shape[1] == 1 else torch.cdist(rows.float(), rows.float(), p=0.0) == 0
    return equal.to(torch.uint8).argmax(dim=1)


def matching_pairs(
    image_ids: torch.Tensor, text_image_ids: torch.Tensor, first_equal_text: torch.Tensor
) -> torch.BoolTensor:
    """Which images and texts match, `(B_i, B_t)`: a text its own image, and every image that has an equal text. From
    numbers of the images `(B_i,)`, those of each text's image `(B_t,)`, and what [`first_equal`] gives of the texts.
    """
    own = image_ids[:, None] == text_image_ids[None, :]
    of_first = torch.zeros(own.shape, device=own.device).index_add(1, first_equal_text, own.float())
    return of_first[:, first_equal_text] > 0


def hard_negatives(
    logits: torch.Tensor, positives: torch.BoolTensor, sample: bool, count: int = 1
) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """For each row of similarities `(rows, columns)` different columns that do not match it, the more similar the
    likelier (ALBEF, arXiv 2107.07651, section 3.2).

    Args:
        sample: draw with probability softmax(logits), without replacement; otherwise choose the most similar.
        count: columns to choose, as far as there are so many.

    Returns:
        The chosen columns, `(rows, min(count, columns))`, and which of these are negatives: a row may have fewer.
    """
    # float32, and finite where half precision overflowed.
    limit = torch.finfo(torch.float32).max / 2
    scores = logits.detach().float().clamp(-limit, limit)
    if sample:
        # The largest of logits with Gumbel noise are a draw by their softmax.
        scores = scores - torch.empty_like(scores).exponential_().log()
    scores, chosen = scores.masked_fill(positives, float("-inf")).topk(min(count, scores.shape[1]), dim=-1)
    return chosen, scores.isfinite()


def matching_loss(match: torch.Tensor, others: torch.Tensor, valid: torch.BoolTensor) -> torch.Tensor:
    """Cross-entropy of choosing the match among others, `(rows,)`; 0 for rows without any other. From scaled
    similarities of the pair that matches, `(rows,)`, and of others, `(rows, count)`; `valid` says which of these count.
    """
    candidates = torch.cat([match[:, None], others.masked_fill(~valid, float("-inf"))], dim=1)
    return candidates.logsumexp(dim=1) - match


# Retrieval


def inverse_temperature(logit_scale: torch.Tensor) -> torch.Tensor:
    """What similarities are multiplied by: `exp(logit_scale)` in float32, at most 100."""
    return logit_scale.float().clamp(0.0, MAX_LOGIT_SCALE).exp()


def similarity(scale: torch.Tensor, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """`scale` times the products of all embeddings `(B_i, n)` and `(B_t, n)`, `(B_i, B_t)`; in float32 under autocast, too,
    whose precision would round them by quarters."""
    device = image_embeds.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if casts else nullcontext():
        return scale * image_embeds @ text_embeds.t()


@dataclass
class PairBatch:
    """What the losses of retrieval compare: the images and texts of one process, or of all ([`gather_batches`])."""

    image_embeds: torch.Tensor  # (B_i, projection_dim), L2-normalised
    text_embeds: torch.Tensor  # (B_t, projection_dim), L2-normalised
    image_index: torch.Tensor | None  # (B_t,), each text's image; unset, row by row
    image_ids: torch.Tensor | None = None  # (B_i,), the same for rows that show one image; unset, all differ
    tokens: torch.Tensor | None = None  # (B_t, N), equal rows for equal texts; unset, those of `text_states`
    image_states: HiViLTImageStates | None = None  # what pairs are fused from, as the texts'; unset where none are
    text_states: HiViLTTextStates | None = None
    first_image: int = 0  # where the images of this process begin in a batch of all, as the texts
    first_text: int = 0

    def __post_init__(self):
        device, texts = self.text_embeds.device, self.text_states
        rows = torch.arange(len(self.text_embeds), device=device) if self.image_index is None else self.image_index
        self.image_index = rows.to(device)
        if self.tokens is None and texts is not None and texts.input_ids is not None:
            self.tokens = left_aligned(texts.input_ids, texts.attention_mask).to(device)

    def numbered(self) -> "PairBatch":
        """With numbers for the images and texts that nothing is known of."""
        device = self.text_embeds.device
        image_ids, tokens = self.image_ids, self.tokens
        if image_ids is None:
            image_ids = self.first_image + torch.arange(len(self.image_embeds), device=device)
        if tokens is None:
            tokens = self.first_text + torch.arange(len(self.text_embeds), device=device)[:, None]
        return replace(self, image_ids=image_ids, tokens=tokens)

    def positives(self) -> torch.BoolTensor:
        """Which images and texts match, `(B_i, B_t)`; see [`matching_pairs`]."""
        batch = self.numbered()
        return matching_pairs(batch.image_ids, batch.image_ids[batch.image_index], first_equal(batch.tokens))


def retrieval_losses(
    batch: PairBatch,
    config: HiViLTConfig,
    logit_scale: torch.Tensor,
    matching_logit_scale: torch.Tensor,
    score: Callable[..., torch.Tensor],
    sample: bool,
    gather: bool,
) -> dict[str, torch.Tensor]:
    """`L = lambda_2 L_contrast + lambda_3 L_aux` (design note, section 4): all pairs are contrasted by their
    embeddings, and each matching pair is told by its fused similarity from the same text with hard images and the same
    image with hard texts. The result has fields of [`HiViLTRetrievalOutput`].

    Args:
        batch: of this process.
        logit_scale, matching_logit_scale: logarithms of the inverse temperatures.
        score: fused similarity of pairs, from image states, text states, image index and text index.
        sample: see [`hard_negatives`].
        gather: whether to compute it over the batches of all processes, each of which has to call this.
    """
    auxiliary_weight = 1.0 if config.auxiliary_loss_weight is None else config.auxiliary_loss_weight
    if not auxiliary_weight:
        batch = replace(batch, image_states=None, text_states=None)  # not to be gathered: no pair is fused
    gather = gather and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    num_texts, device = len(batch.text_embeds), batch.text_embeds.device
    if gather:
        batch, counts = gather_batches(batch)
    own_texts = torch.arange(batch.first_text, batch.first_text + num_texts, device=device)
    own_images = batch.image_index[own_texts]

    positives = batch.positives()
    logits = similarity(inverse_temperature(logit_scale).to(device), batch.image_embeds, batch.text_embeds)
    contrastive = contrastive_loss(logits, positives) - contrastive_floor(positives)
    loss = config.contrastive_loss_weight * contrastive
    losses = {"contrastive_loss": contrastive.detach()}

    if auxiliary_weight:
        negatives = partial(hard_negatives, sample=sample, count=config.num_hard_negatives)
        hard_images, image_valid = negatives(logits.t()[own_texts], positives.t()[own_texts])
        hard_texts, text_valid = negatives(logits[own_images], positives[own_images])
        # Each text with its image, with hard images, and its image with hard texts.
        image_index = [own_images, hard_images.flatten(), own_images.repeat_interleave(hard_texts.shape[1])]
        text_index = [own_texts, own_texts.repeat_interleave(hard_images.shape[1]), hard_texts.flatten()]
        scores = score(batch.image_states, batch.text_states, torch.cat(image_index), torch.cat(text_index))
        scores = inverse_temperature(matching_logit_scale).to(device) * scores.to(device)
        match, with_images, with_texts = scores.split([len(rows) for rows in text_index])
        anchors = [
            matching_loss(match, with_images.view(hard_images.shape), image_valid),
            matching_loss(match, with_texts.view(hard_texts.shape), text_valid),
        ]
        # (B_t, 4): both losses of an anchor, and whether each has any negative
        anchors = torch.stack([*anchors, image_valid.any(dim=1).float(), text_valid.any(dim=1).float()], dim=1)
        if gather:
            (anchors,) = gather_rows([anchors], [[(count,) for count in counts]])
        values, valid = anchors.split(2, dim=1)
        auxiliary = (values * valid).sum() / valid.sum().clamp(min=1)
        loss = loss + auxiliary_weight * auxiliary
        losses["auxiliary_loss"] = auxiliary.detach()
        losses["num_dropped_anchors"] = (valid == 0).sum()
    return {"loss": loss, **losses}


def in_chunks(function: Callable, chunk_size: int | None, *inputs) -> list:
    """What `function` gives for `chunk_size` rows of its inputs at a time, or for all without. Nothing is kept for the
    backward pass, which computes each chunk once more, under the same random state, just before it uses it: gradients are
    those of one large batch, memory is that of one chunk (GradCache, arXiv 2101.06983, as checkpoints of torch's autograd).
    Inputs are tensors of shape `(rows, ...)` or sequences of them; others go to each call as they are.
    """
    if chunk_size is None:
        return [function(*inputs)]
    rows = next(len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor))
    parts = [slice(start, start + chunk_size) for start in range(0, rows, chunk_size)]
    chunks = [tree_map_only(torch.Tensor, itemgetter(part), inputs) for part in parts]
    return [checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks]


# Several processes


class _AllGather(torch.autograd.Function):
    """All processes' tensors of one shape, with gradient; torch's own is deprecated in favour of private functions."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, tensor.contiguous())
        return tuple(gathered)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> torch.Tensor:
        total = torch.stack(gradients)
        dist.all_reduce(total)
        return total[dist.get_rank()]


def gather_rows(tensors: Sequence[torch.Tensor], shapes: Sequence[Sequence[tuple[int, ...]]]) -> list[torch.Tensor]:
    """Of each tensor the rows of all processes in rank order, with gradient, in one collective for each dtype. `shapes`
    are for each tensor the first sizes of every process's: `(rows,)`, or `(rows, tokens)` to pad shorter texts by zeros.
    """
    shaped = []
    for tensor, sizes in zip(tensors, shapes, strict=True):
        largest = [max(size) for size in zip(*sizes, strict=True)]
        padded = tensor.new_zeros(*largest, *tensor.shape[len(largest) :])
        padded[tuple(slice(size) for size in tensor.shape[: len(largest)])] = tensor
        shaped.append(padded)
    gathered: list[torch.Tensor] = [None] * len(shaped)
    for dtype in {padded.dtype: None for padded in shaped}:
        places = [place for place, padded in enumerate(shaped) if padded.dtype == dtype]
        everyone = _AllGather.apply(torch.cat([shaped[place].flatten() for place in places]))
        parts = [vector.split([shaped[place].numel() for place in places]) for vector in everyone]
        for place, vectors in zip(places, zip(*parts, strict=True), strict=True):
            rows = [size[0] for size in shapes[place]]
            gathered[place] = torch.cat(
                [x.view(shaped[place].shape)[:count] for x, count in zip(vectors, rows, strict=True)]
            )
    return gathered


def gather_batches(batch: PairBatch) -> tuple[PairBatch, list[int]]:
    """The batch of all processes in rank order, with gradient, and how many texts each has. Every process then computes
    the loss of the whole batch, so that averaged gradients are those of one process with the whole batch. Three
    collectives, and one more where states have two dtypes, as under autocast.

    Raises:
        ValueError: the processes' images lie on different grids, which one process could not batch either.
    """
    device, rank = batch.text_embeds.device, dist.get_rank()
    image_states, text_states, grids = [], [], []
    mask = batch.image_index.new_zeros(len(batch.text_embeds), 0)
    if batch.image_states is not None:
        image_states, (*text_states, mask) = tensors_of(batch.image_states), tensors_of(batch.text_states)
        grids = [size for level in batch.image_states.level_states for size in level.shape[1:3]]
    own_tokens = 1 if batch.tokens is None else batch.tokens.shape[1]
    sizes = [len(batch.image_embeds), len(batch.text_embeds), own_tokens, mask.shape[1], *grids]
    sizes = [one.tolist() for one in _AllGather.apply(torch.tensor(sizes, device=device))]
    if any(one[4:] != grids for one in sizes):
        raise ValueError(
            "`pixel_values`: the images of the processes differ in size, so that their levels cannot be batched together. "
            "Give all the same size, or `gather_negatives=False`."
        )
    num_images, num_texts, num_tokens, num_words = zip(*(one[:4] for one in sizes), strict=True)
    images, texts = [(count,) for count in num_images], [(count,) for count in num_texts]
    rows, words = list(zip(num_texts, num_tokens, strict=True)), list(zip(num_texts, num_words, strict=True))
    first_image, first_text = sum(num_images[:rank]), sum(num_texts[:rank])
    batch = replace(batch, first_image=first_image, first_text=first_text).numbered()

    tensors = [batch.image_index + first_image, batch.image_ids, batch.tokens, mask.long(), batch.image_embeds]
    shapes = [texts, images, rows, words, images, texts] + [images] * len(image_states)
    # Of a text's states those of its tokens have three dimensions.
    shapes += [words if states.dim() == 3 else texts for states in text_states]
    image_index, image_ids, all_tokens, mask, image_embeds, text_embeds, *states = gather_rows(
        [*tensors, batch.text_embeds, *image_states, *text_states], shapes
    )
    gathered = {"image_embeds": image_embeds, "text_embeds": text_embeds, "image_index": image_index}
    gathered |= {"image_ids": image_ids, "tokens": all_tokens}
    if image_states:
        gathered["image_states"] = with_tensors(batch.image_states, states[: len(image_states)])
        gathered["text_states"] = with_tensors(batch.text_states, [*states[len(image_states) :], mask.bool()])
    return replace(batch, **gathered), list(num_texts)
