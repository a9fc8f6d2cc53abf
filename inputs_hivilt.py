"""What a call is given, checked once, at the border: each function names the argument, what came and the way out."""

import difflib
from collections.abc import Mapping, Sequence

import torch
from transformers.utils import logging

from .boxes_hivilt import to_corners
from .configuration_hivilt import HiViLTConfig
from .encoders_hivilt import has_values, image_size, max_text_length, takes_one_size, text_width

logger = logging.get_logger(__name__)

BORDER = 1e-2  # how far rounding may take a box out of the image, in parts of it

# A call would go on without one of these where it is misspelt.
_ARGUMENTS = (
    *("image_index", "text_index", "attention_mask", "token_type_ids", "interpolate_pos_encoding"),
    *("return_loss", "gather_negatives", "chunk_size", "output_attentions", "output_hidden_states"),
    *("decoder_input_ids", "decoder_attention_mask", "encoder_outputs", "past_key_values", "num_items_in_batch"),
)


def complete_flags(kwargs: dict, config: HiViLTConfig) -> None:
    """Completes the flags of a call by the config's, so that the encoders and the fusion follow them too. Refuses a
    `pixel_mask` that masks something, and misspelt arguments, without which texts would be paired or padded otherwise: any
    other keyword may be an encoder's, or a column of a data set.
    """
    for name in kwargs.keys() - {*_ARGUMENTS, "image_id"}:  # that column is not `image_index`
        meant = () if torch.compiler.is_compiling() else difflib.get_close_matches(name, _ARGUMENTS, n=1, cutoff=0.83)
        if meant:
            raise ValueError(f"There is no argument `{name}`; did you mean `{meant[0]}`?")
    pixel_mask = kwargs.get("pixel_mask")
    if pixel_mask is not None and not torch.compiler.is_compiling() and not torch.as_tensor(pixel_mask).all():
        raise ValueError("`pixel_mask` has zeros, but padding is not masked here: give images of one size, without it.")
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name) is None:
            kwargs[name] = getattr(config, name)


def check_no_places(kwargs: dict, name: str, trainer: str, training: bool) -> None:
    """Refuses to evaluate a batch of one of our collators as it is: Trainer counts items, and would keep as many texts of the
    last batch as it has of these."""
    if name in kwargs and not training:
        raise ValueError(
            f"A batch to evaluate has `{name}`: take it out in a loop of your own, and evaluate with `hivilt.tasks.{trainer}` "
            "where a Trainer is to, which itself counts items and not texts."
        )


def check_given_once(pixel_values, feature_maps, image_states, input_ids, inputs_embeds, token_states, text_states):
    """Refuses images or texts that are missing or come in two forms."""
    if sum(value is not None for value in (pixel_values, feature_maps, image_states)) != 1:
        raise ValueError("Give images as either `pixel_values` or `image_states` (or `feature_maps`), exactly one.")
    if text_states is not None and any(value is not None for value in (input_ids, inputs_embeds, token_states)):
        raise ValueError("Give the texts as either `input_ids` or `text_states` (or `token_states`), not both.")


def is_integers(value, num_dims: int) -> bool:
    is_tensor = isinstance(value, torch.Tensor) and value.dim() == num_dims
    return is_tensor and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def is_floats(value, num_dims: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == num_dims and value.is_floating_point()


def lies_below(numbers: torch.Tensor, limit: int) -> bool:
    """Whether all numbers lie in 0..limit - 1."""
    return not numbers.numel() or 0 <= int(numbers.min()) <= int(numbers.max()) < limit


def check_index(name: str, index: torch.Tensor | None, length: int, what: str) -> torch.LongTensor | None:
    """The index; refuses one that points outside, with which a gather would fail far from the mistake."""
    if index is None:
        return None
    if not is_integers(index, 1):
        raise ValueError(f"`{name}` must be a vector of integers, {described(index)}.")
    if has_values(index) and not lies_below(index, length):
        raise ValueError(f"`{name}` must lie in 0..{length - 1} for {length} {what}; got {index.tolist()}.")
    return index.long()


def check_ids(name: str, ids: torch.Tensor | None, length: int, what: str, device) -> torch.LongTensor | None:
    """Numbers by which rows are the same; refuses those that number others or that are none."""
    if ids is None:
        return None
    if not is_integers(ids, 1) or ids.shape[0] != length:
        raise ValueError(f"`{name}` must hold an integer for each of the {length} {what}, {described(ids)}.")
    return ids.to(device).long()


def described(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"got {value.dtype} of shape {tuple(value.shape)}"
    return f"got a {type(value).__name__}"


def batched_images(pixel_values: torch.Tensor, config: HiViLTConfig, any_size: bool) -> torch.Tensor:
    """`(B_i, channels, height, width)`; encodings of one image each, which a collator stacked, are joined. Refuses
    images of a size that the encoder was not made for; `any_size` where its positions are interpolated.
    """
    if is_floats(pixel_values, 5) and pixel_values.shape[1] == 1:
        pixel_values = pixel_values.flatten(0, 1)
    if not is_floats(pixel_values, 4):
        raise ValueError(
            "`pixel_values` must be a float tensor of shape (images, channels, height, width), as the processor gives "
            f"it, of one image alone, too; {described(pixel_values)}."
        )
    size, one_size = image_size(config.vision_config), takes_one_size(config.vision_config)
    if size is not None and (one_size or not any_size) and tuple(pixel_values.shape[2:]) != size:
        way_out = "resize them" if one_size else "resize them, or give `interpolate_pos_encoding=True`"
        raise ValueError(
            f"This `{config.vision_config.model_type}` encoder was made for images of {size[0]} by {size[1]} pixels, got "
            f"{pixel_values.shape[2]} by {pixel_values.shape[3]}; {way_out}."
        )
    return pixel_values


def check_feature_maps(feature_maps: Sequence[torch.Tensor], widths: Sequence[int]) -> None:
    """Refuses maps that are not those of levels of so many channels each."""
    maps = feature_maps if isinstance(feature_maps, (list, tuple)) else [feature_maps]
    fit = all(is_floats(states, 4) and states.shape[0] == maps[0].shape[0] for states in maps)
    if not fit or [states.shape[3] for states in maps] != list(widths):
        shapes = ", ".join(f"(B_i, height, width, {channels})" for channels in widths)
        raise ValueError(
            f"`feature_maps` must be float tensors of shapes {shapes}, as `get_feature_maps` of this model gives them; "
            f"{', '.join(map(described, maps)) or 'got none'}."
        )


def check_texts(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, config: HiViLTConfig) -> None:
    """Refuses tokens or embeddings that are missing, of another shape or dtype, or longer than the encoder takes."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give the texts as either `input_ids` or `inputs_embeds`, exactly one of them.")
    if input_ids is not None and not is_integers(input_ids, 2):
        raise ValueError(
            f"`input_ids` must be integers of shape (texts, tokens), {described(input_ids)}. Several texts about an "
            "image are rows of their own, and `image_index` says which image each belongs to."
        )
    if inputs_embeds is not None and not is_floats(inputs_embeds, 3):
        raise ValueError(f"`inputs_embeds` must be floats (texts, tokens, text width), {described(inputs_embeds)}.")
    known = getattr(config.text_config, "vocab_size", None)
    if input_ids is not None and known and has_values(input_ids) and not lies_below(input_ids, known):
        raise ValueError(
            f"`input_ids` must lie in 0..{known - 1}, the tokens of this `{config.text_config.model_type}` encoder; got "
            f"{int(input_ids.min())}..{int(input_ids.max())}. Take the processor that was saved beside the model."
        )
    length, limit = (input_ids if inputs_embeds is None else inputs_embeds).shape[1], config.max_text_length
    if limit is not None and length > limit:
        raise ValueError(
            f"The texts have {length} tokens, but this `{config.text_config.model_type}` encoder takes {limit}; tokenize "
            f"with `truncation=True, max_length={limit}`."
        )


def batched_texts(input_ids, *others: torch.Tensor | None) -> list[torch.Tensor | None]:
    """`input_ids` and what comes with it as `(B_t, N_t)`; encodings of one text each, which a collator stacked, are joined."""
    if isinstance(input_ids, (list, tuple)):
        # As torch's collator leaves lists of numbers: one tensor a token.
        raise ValueError('`input_ids` must be a tensor, got a list; call the processor with `return_tensors="pt"`.')
    stacked = input_ids is not None and input_ids.dim() == 3 and input_ids.shape[1] == 1
    return [x.flatten(0, 1) if stacked and x is not None else x for x in (input_ids, *others)]


def text_mask(
    attention_mask: torch.Tensor | None, tokens: torch.Tensor, input_ids: torch.Tensor | None, config: HiViLTConfig
) -> torch.Tensor:
    """The mask of tokens `(B_t, N_t)` or states `(B_t, N_t, width)`; unset, nothing is padding."""
    shape = tuple(tokens.shape[:2])
    if attention_mask is None:
        warn_of_padding(input_ids, config)
        attention_mask = torch.ones(shape, dtype=torch.long, device=tokens.device)
    if attention_mask.shape != shape:
        raise ValueError(f"`attention_mask` must have the texts' shape {shape}, got {tuple(attention_mask.shape)}.")
    may_be_added = attention_mask.dtype != torch.bool and has_values(attention_mask)
    if may_be_added and not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise ValueError("`attention_mask` must be 1 at tokens and 0 at padding; of an additive one give `mask == 0`.")
    return attention_mask


def warn_of_padding(input_ids: torch.Tensor | None, config: HiViLTConfig) -> None:
    padding, end = (getattr(config.text_config, name, None) for name in ("pad_token_id", "eos_token_id"))
    if input_ids is None or padding in (None, end) or not has_values(input_ids):
        return
    if input_ids.shape[1] and (input_ids[:, -1] == padding).any():
        logger.warning_once(
            f"`input_ids` end in the padding token {padding}, but there is no `attention_mask`: padding is read as "
            "words. Give the mask, too, as the processor does."
        )


def check_token_states(token_states, input_ids, inputs_embeds, config: HiViLTConfig) -> None:
    """Refuses states that are not those of this model's text encoder, or not of the tokens beside them."""
    if inputs_embeds is not None:
        raise ValueError("Give the texts as either `inputs_embeds` or `token_states`, not both.")
    width = text_width(config.text_config)
    fits = is_floats(token_states, 3) and token_states.shape[2] == width
    if not fits or (input_ids is not None and input_ids.shape != token_states.shape[:2]):
        raise ValueError(
            f"`token_states` must be a float tensor of shape (texts, tokens, {width}), as `get_token_states` of this model "
            f"gives it, of the `input_ids` beside it; {described(token_states)}."
        )


def check_pairs(num_images: int, num_texts: int) -> None:
    """Refuses as many images as texts that pair row by row, where they are not as many."""
    if num_images != num_texts:
        raise ValueError(
            f"{num_images} images cannot be paired with {num_texts} texts. Give `image_index`, of shape (texts,), "
            "which says for each text the image it belongs to."
        )


def batched_lists(
    pixel_values: torch.Tensor | None, image_index: torch.Tensor | None, num_images: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Images in one row, `(B_i, channels, height, width)`, and those of all texts, text by text, `(B_t num_images,)`. Encodings
    of one list of images each, which a collator stacked, are joined. Refuses lists of another length than `num_images`.
    """
    if is_floats(pixel_values, 6) and pixel_values.shape[1] == 1:
        pixel_values = pixel_values.flatten(0, 1)
    if is_floats(pixel_values, 5):
        if pixel_values.shape[1] != num_images:
            raise ValueError(
                f"`pixel_values` of shape {tuple(pixel_values.shape)} have {pixel_values.shape[1]} images for each text, but "
                f"this model takes {num_images}, its `config.num_images`."
            )
        if image_index is not None:
            raise ValueError(
                f"`pixel_values` of shape {tuple(pixel_values.shape)} say by themselves which images each text is about: leave "
                "out `image_index`, or give each image once, as (images, channels, height, width)."
            )
        pixel_values = pixel_values.flatten(0, 1)
    if image_index is not None:
        one_each = num_images == 1 and is_integers(image_index, 1)
        if not one_each and not (is_integers(image_index, 2) and image_index.shape[1] == num_images):
            raise ValueError(
                f"`image_index` must be integers of shape (texts, {num_images}), the images of each text in their order, as many "
                f"as `config.num_images`; {described(image_index)}."
            )
        image_index = image_index.flatten()
    return pixel_values, image_index


def check_lists(image_index: torch.Tensor | None, num_all: int, num_texts: int, num_images: int) -> None:
    """Refuses images that are not `num_images` for each text, of an index as of `batched_lists` or of `num_all` images."""
    if image_index is None and num_all != num_images * num_texts:
        raise ValueError(
            f"{num_all} images are not {num_images} (`config.num_images`) for each of {num_texts} texts. Give `image_index`, of "
            f"shape (texts, {num_images}), which says for each text the images it is about."
        )
    if image_index is not None and image_index.shape[0] != num_images * num_texts:
        raise ValueError(
            f"`image_index` names the images of {image_index.shape[0] // num_images} texts, got {num_texts} texts: give a row "
            "for each."
        )


def warn_of_joined(image_index: torch.Tensor | None, num_images: int) -> None:
    """Tells, once, of images that no text belongs to."""
    if image_index is None or not has_values(image_index):
        return
    if len(set(image_index.tolist())) < num_images:
        logger.warning_once(
            "`image_index` names no text of some images. If encodings of several calls of the processor were joined, each "
            "counts its own images from 0: call it once for the batch, or add to each the number of images before it."
        )


def check_labels(labels: torch.Tensor, num_texts: int, num_labels: int) -> None:
    """Refuses labels whose type, shape or values do not fit scores `(num_texts, num_labels)`; see
    [`classification_loss`]. Tells, once, of a batch without any answer.
    """
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"`labels` must be a tensor, {described(labels)}: `torch.tensor(labels)`.")
    soft = labels.is_floating_point()
    if labels.shape != ((num_texts, num_labels) if soft else (num_texts,)) or not (soft or is_integers(labels, 1)):
        raise ValueError(
            f"`labels` must be integers of shape ({num_texts},), an answer for each text, or floats of shape "
            f"{(num_texts, num_labels)}, a score for each answer: `labels.long()`, `labels.float()`; {described(labels)}."
        )
    labels = labels if soft else labels.long()
    answered = labels > 0 if soft else labels != -100
    valid = (labels >= 0) & (labels <= 1) if soft else ~answered | (labels >= 0) & (labels < num_labels)
    if not has_values(labels):
        return
    if not valid.all():
        raise ValueError(
            f"`labels` must lie in 0..{num_labels - 1}, the answers of `config.id2label`, or be -100 for a row without one; "
            f"soft ones in [0, 1], all 0 for a row without; got {labels.min().item()}..{labels.max().item()}. Build the head "
            "for your answers with `id2label=...` or `resize_answer_head(answers)`."
        )
    if not answered.any():
        logger.warning_once(
            f"None of the {num_texts} texts of a batch has an answer among the {num_labels} of `config.id2label`: its "
            "loss is 0, and nothing is learned from it. Compare the answers of your data with `config.label2id`."
        )


def check_captions(labels: torch.Tensor, config: HiViLTConfig) -> None:
    """Refuses `labels` that are not tokens of the decoder, or that have a begin token, which the model puts before them."""
    if not is_integers(labels, 2) or 0 in labels.shape:
        raise ValueError(
            f"`labels` must be integers (captions, tokens), -100 after the end of each, {described(labels)}."
        )
    check_decoder_length("labels", labels.shape[1], config)
    if not has_values(labels):
        return
    answered, known = labels != -100, config.decoder_config.vocab_size
    if not answered.any():
        logger.warning_once("`labels` are -100 everywhere: the loss of a batch without any caption is 0.")
        return
    if not lies_below(labels[answered], known):
        raise ValueError(
            f"`labels` must lie in 0..{known - 1}, the tokens of the decoder, or be -100 where there is none; got "
            f"{int(labels.min())}..{int(labels.max())}."
        )
    start = config.decoder_start_token_id
    begun = labels[:, 0] == start
    if start == config.eos_token_id:
        begun = begun & answered[:, 1:].any(dim=1)  # alone it ends an empty caption
    if begun.all():
        raise ValueError(
            f"`labels` begin with the begin token ({start}), which the model itself puts before them: give each caption's "
            "tokens from the first word to the end token, `labels[:, 1:]`."
        )


def batched_boxes(labels: Sequence[Mapping[str, torch.Tensor]], num_texts: int) -> torch.FloatTensor:
    """The boxes of all texts, `(B_t, n, 4)` in float32, filled up with zeros, `n` at least 1. Refuses what are no boxes
    `(cx, cy, width, height)` inside the image, in parts of it, for each text.
    """
    form = 'a dict for each text, {"boxes": floats (n, 4)}: centre x, centre y, width and height in parts of the image'
    if not isinstance(labels, (list, tuple)) or len(labels) != num_texts:
        came = f"got {len(labels)}" if isinstance(labels, (list, tuple)) else described(labels)
        raise ValueError(f"`labels` must be a list of {num_texts}, {form}; {came}.")
    for place, label in enumerate(labels):
        boxes = label.get("boxes") if isinstance(label, Mapping) else None
        if not is_floats(boxes, 2) or boxes.shape[1] != 4:
            came = described(label if boxes is None else boxes)
            if isinstance(label, Mapping) and boxes is None:
                came = f"got a dict of {sorted(label)}"
            raise ValueError(
                f"`labels[{place}]` must be {form}; `torch.zeros(0, 4)` where nothing in the image is meant; {came}."
            )
    boxes = torch.nn.utils.rnn.pad_sequence([label["boxes"].float() for label in labels], batch_first=True)
    boxes = boxes if boxes.shape[1] else boxes.new_zeros(num_texts, 1, 4)
    given = torch.tensor([len(label["boxes"]) for label in labels], device=boxes.device)
    given = torch.arange(boxes.shape[1], device=boxes.device) < given[:, None]
    _check_boxes(boxes, given)
    return boxes


def _check_boxes(boxes: torch.FloatTensor, given: torch.BoolTensor) -> None:
    """Refuses those of `boxes` `(B_t, n, 4)` that are `given` and do not lie inside the image."""
    corners = to_corners(boxes)
    inside = (corners >= -BORDER) & (corners <= 1 + BORDER)
    # NaN is neither.
    wrong = given & ~(inside.all(dim=-1) & (boxes[..., 2:] > 0).all(dim=-1))
    if not has_values(boxes) or not wrong.any():
        return
    place, number = wrong.nonzero()[0].tolist()
    box, others = boxes[place, number], boxes[given]
    way_out = "cut boxes at the borders of the image, and leave out those without area"
    if not others.isfinite().all():
        way_out = "a box is not finite"
    elif others.abs().max() > 2:
        way_out = "they look like pixels: divide by the width and the height of the image"
    elif ((others >= -BORDER) & (others <= 1 + BORDER)).all() and (others[:, :2] < others[:, 2:]).all():
        way_out = "they look like (left, top, right, bottom): give centre, width and height"
    raise ValueError(
        f"`labels[{place}]`: box {number} is not (centre x, centre y, width, height) inside the image, in parts of it, with "
        f"an area; got {[round(value, 4) for value in box.tolist()]}; {way_out}."
    )


def check_decoder_length(name: str, length: int, config: HiViLTConfig) -> None:
    """Refuses more tokens than the decoder has positions for."""
    limit = max_text_length(config.decoder_config)
    if limit is not None and length > limit:
        raise ValueError(
            f"`{name}` asks for {length} tokens, but this `{config.decoder_config.model_type}` decoder has positions for "
            f"{limit}; give fewer, or a `decoder_config` with more."
        )
