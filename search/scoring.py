"""Fused similarities of many pairs, from states that were encoded once."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from datasets.utils import tqdm

from hivilt import HiViLTForRetrieval
from hivilt.fusion_hivilt import HiViLTImageStates, HiViLTTextStates, cat_states, map_states, select
from hivilt.inputs_hivilt import check_index


def take_texts(batches: Sequence[HiViLTTextStates], index: torch.LongTensor) -> HiViLTTextStates:
    """Texts that were encoded in several batches, as one batch, padded to the longest batch that one comes from.

    `index` (texts,), not empty, counts over all batches, in any order, repetitions too. Only the tensors that fusion reads
    are kept.
    """
    ends = _ends("batches", batches)
    owners = torch.searchsorted(ends, index, right=True)
    numbers = owners.unique().tolist()
    length = max(batches[number].attention_mask.shape[1] for number in numbers)
    parts = []
    for number in numbers:
        batch = batches[number]
        rows = index[owners == number] - (ends[number] - len(batch.global_state))
        missing = length - batch.attention_mask.shape[1]
        parts.append(map_states(partial(_padded_rows, rows=rows, missing=missing), batch))

    # The parts stand in the order of the batches; each row goes back to where `index` has it.
    order = owners.argsort(stable=True).argsort()
    return map_states(partial(select, index=order), cat_states(parts))


def _padded_rows(x: torch.Tensor, rows: torch.LongTensor, missing: int) -> torch.Tensor:
    x = select(x, rows)
    if x.dim() == 3:
        return F.pad(x, (0, 0, 0, missing))  # (B_t, N_t, d) -> (B_t, N_t + missing, d)
    # The mask (B_t, N_t); what is pooled (B_t, d) has no tokens.
    return F.pad(x, (0, missing)) if x.dtype == torch.bool else x


@torch.inference_mode()
def score_pairs(
    model: HiViLTForRetrieval,
    image_batches: Sequence[HiViLTImageStates],
    text_batches: Sequence[HiViLTTextStates],
    image_index: torch.LongTensor,
    text_index: torch.LongTensor,
    batch_size: int = 256,
    progress: bool = False,
) -> torch.FloatTensor:
    """`model.score` of pairs of images and texts that were encoded in batches: fusion alone, each pair once.

    Args:
        model: in evaluation mode.
        image_batches, text_batches: what `encode_images` and `encode_texts` gave, on any device: an image batch, and the
            texts of `batch_size` pairs, are moved to `model.device` at a time.
        image_index, text_index: (pairs,), row numbers counted over all batches.
        batch_size: pairs that are fused at a time.

    Returns:
        (pairs,) float32 on the CPU, in the order of the pairs.

    Raises:
        ValueError: an index does not fit the batches or the other one, there is no batch, or `model` is in training mode.
    """
    check_evaluates(model)
    check_at_least("batch_size", batch_size, 1)
    ends = _ends("image_batches", image_batches)
    num_images, num_texts = int(ends[-1]), int(_ends("text_batches", text_batches)[-1])
    images = check_index("image_index", image_index, num_images, "images").cpu()
    texts = check_index("text_index", text_index, num_texts, "texts").cpu()
    if images.shape != texts.shape:
        raise ValueError(f"image_index and text_index: got {len(images)} images and {len(texts)} texts; one of each.")

    keys, places = (images * num_texts + texts).unique(return_inverse=True)
    images, texts = keys // num_texts, keys % num_texts
    owners = torch.searchsorted(ends, images, right=True)
    scores = torch.empty(len(keys))
    with tqdm(total=len(keys), unit="pair", desc="Scoring pairs", disable=not progress) as bar:
        for number in owners.unique().tolist():
            batch = image_batches[number]
            first = ends[number] - len(batch.global_state)
            image_states = map_states(lambda x: x.to(model.device), batch)
            pairs = (owners == number).nonzero().squeeze(1)
            # By text, so that pairs fused together share theirs.
            for chunk in pairs[texts[pairs].argsort(stable=True)].split(batch_size):
                text_rows, text_places = texts[chunk].unique(return_inverse=True)
                text_states = map_states(lambda x: x.to(model.device), take_texts(text_batches, text_rows))
                scores[chunk] = model.score(image_states, text_states, images[chunk] - first, text_places).float().cpu()
                bar.update(len(chunk))
    return scores[places]


def _ends(name: str, batches: Sequence[HiViLTImageStates] | Sequence[HiViLTTextStates]) -> torch.LongTensor:
    """For each batch the number of rows up to its end."""
    if not batches:
        raise ValueError(f"{name}: is empty; give the states of at least one encoded batch.")
    return torch.tensor([len(batch.global_state) for batch in batches]).cumsum(0)


def check_evaluates(model: HiViLTForRetrieval) -> None:
    if model.training:
        raise ValueError("model: is in training mode, where dropout makes every score random; call model.eval() first.")


def check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}.")
