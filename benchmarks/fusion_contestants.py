"""Ways to join an image and a question, all under one trainer and of one size: HiViLT's, its ablations, and the field's.

All but ViLT sit in the place of HiViLT's fusion, on the same encoders, levels and head as it: they read the tokens of
every vision level and of the text, and give the state that the head classifies, and for visual grounding the vision
tokens that it finds boxes in. Late fusion, whose vision tokens have not met the text, is a dual encoder there. In reasoning
over pairs of images there are also a HiViLT that sees none of them and one that sees the left one alone. ViLT has no encoders;
it is transformers' own, and its layers take the parameters that encoders take elsewhere. On pretrained encoders, which are
frozen, there is no ViLT, and contestants are of one size in what trains.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    ViltConfig,
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForQuestionAnswering,
    ViltModel,
)

from hivilt import (
    HiViLTConfig,
    HiViLTForImagesAndTextClassification,
    HiViLTForRetrieval,
    HiViLTForVisualGrounding,
)
from hivilt.fusion_hivilt import (
    HiViLTImageStates,
    HiViLTLevel,
    HiViLTMLP,
    HiViLTModelOutput,
    HiViLTTextStates,
    masked_mean,
    select,
)
from hivilt.losses_hivilt import PairBatch, classification_loss, retrieval_losses
from hivilt.modeling_hivilt import HiViLTPreTrainedModel, HiViLTQuestionAnsweringOutput, HiViLTRetrievalOutput
from hivilt.training.models import SMALL_FUSION, small_text_config, small_vision_config


@dataclass(frozen=True)
class Encoders:
    """What HiViLT and all but ViLT are built on: configs of new encoders, or names or folders of pretrained ones."""

    vision: str | PreTrainedConfig
    text: str | PreTrainedConfig
    fusion: Mapping[str, Any] = field(hash=False)  # fields of `HiViLTConfig`
    frozen: bool = True  # whether they do not train
    cache_dir: Path | None = None  # folder of the `EncoderCache` of frozen ones; `None` is its default

    def untrained(self) -> "Encoders":
        """The same without weights."""
        given = {"vision": self.vision, "text": self.text}
        configs = {name: AutoConfig.from_pretrained(one) for name, one in given.items() if isinstance(one, str)}
        return replace(self, **configs)


def small_encoders(vocab_size: int) -> Encoders:
    """Those of the scripts, new and trained with the rest."""
    return Encoders(small_vision_config(), small_text_config(vocab_size), SMALL_FUSION, frozen=False)


class OtherFusion(nn.Module):
    """What stands in the place of `HiViLTFusion`: its levels, and a `join` instead of its stages."""

    def __init__(self, config: HiViLTConfig):
        super().__init__()
        channels = [channels for _, _, channels in config.vision_level_layout]
        self.vision_levels = nn.ModuleList(HiViLTLevel(config, width, on_grid=True) for width in channels)
        self.text_level = HiViLTLevel(config, config.text_config.hidden_size)
        # Of which level a token is; the last is the text.
        self.kinds = nn.Parameter(torch.zeros(len(channels) + 1, config.hidden_size))

    def encode_images(self, maps: list[torch.Tensor]) -> HiViLTImageStates:
        levels = [
            level(states) + kind for level, states, kind in zip(self.vision_levels, maps, self.kinds, strict=False)
        ]
        summary = torch.stack([level.mean(dim=(1, 2)) for level in levels]).mean(dim=0)
        return HiViLTImageStates(global_state=summary, level_states=tuple(levels))

    def encode_texts(self, hidden_states: torch.Tensor, attention_mask: torch.BoolTensor) -> HiViLTTextStates:
        level = self.text_level(hidden_states) + self.kinds[-1]
        return HiViLTTextStates(
            global_state=masked_mean(level, attention_mask), level_states=(level,), attention_mask=attention_mask
        )

    def forward(self, step: str, *args, **kwargs):
        return getattr(self, step)(*args, **kwargs)

    def fuse(self, images, texts, image_index=None, text_index=None, **kwargs) -> HiViLTModelOutput:
        levels = [level.flatten(1, 2) for level in images.level_states]
        vision, vision_global = select(torch.cat(levels, dim=1), image_index), select(images.global_state, image_index)
        words = (texts.level_states[0], texts.global_state, texts.attention_mask)
        text, text_global, text_mask = (select(one, text_index) for one in words)
        fused, vision, text = self.join(vision, vision_global, text, text_global, text_mask)
        # Retrieval compares what both became together with the text, in the space of the embeddings.
        outputs = {"global_fusion_state": fused, "vision_global_state": fused, "text_global_state": text_global}
        if kwargs.get("output_hidden_states"):  # the levels, each with the words, as visual grounding reads them
            vision = vision.split([level.shape[1] for level in levels], dim=1)
            outputs["hidden_states"] = tuple(torch.cat([level, text], dim=1) for level in vision)
        return HiViLTModelOutput(**outputs)

    def join(
        self, vision, vision_global, text, text_global, text_mask
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What both say together, `(B_t, d)`, and what vision and text tokens became, `(B_t, N_v, d)` and `(B_t, N_t, d)`.

        Args:
            vision: `(B_t, N_v, d)`, the tokens of all levels of each text's image.
            vision_global, text_global: `(B_t, d)`, means of the levels' means, and of the text.
            text: `(B_t, N_t, d)`, with `text_mask` `(B_t, N_t)`, `False` at padding.
        """
        raise NotImplementedError


class LateFusion(OtherFusion):
    """CLIP-style: each side is summed up in one vector, and an MLP reads both (and their product, as CLIP compares)."""

    def __init__(self, config: HiViLTConfig, width: int):
        super().__init__(config)
        between = (nn.GELU(), nn.Dropout(config.dropout))
        first, last = nn.Linear(3 * config.hidden_size, width), nn.Linear(width, config.hidden_size)
        self.mlp = nn.Sequential(first, *between, nn.Linear(width, width), *between, last)

    def join(self, vision, vision_global, text, text_global, text_mask):
        return self.mlp(torch.cat([vision_global, text_global, vision_global * text_global], dim=-1)), vision, text


class SingleStream(OtherFusion):
    """VisualBERT-style (Li et al. 2019, arXiv:1908.03557): one transformer over the tokens of both, read at its first."""

    def __init__(self, config: HiViLTConfig, width: int):
        super().__init__(config)
        self.first = nn.Parameter(torch.zeros(config.hidden_size))
        make = partial(_layer, nn.TransformerEncoderLayer, config, width)
        # As many as HiViLT's stages have sides.
        self.layers = nn.ModuleList(make() for _ in range(2 * config.num_fusion_stages))
        self.norm = nn.LayerNorm(config.hidden_size)

    def join(self, vision, vision_global, text, text_global, text_mask):
        tokens = torch.cat([self.first.expand(len(text), 1, -1), text, vision], dim=1)
        padding = F.pad(~text_mask, (1, vision.shape[1]), value=False)
        for layer in self.layers:
            tokens = layer(tokens, src_key_padding_mask=padding)
        tokens = self.norm(tokens)
        return tokens[:, 0], tokens[:, -vision.shape[1] :], tokens[:, 1 : 1 + text.shape[1]]


class CoAttention(OtherFusion):
    """
    METER- and BridgeTower-style (Dou et al. 2022, arXiv:2111.02387): a transformer of each side, whose every layer also
    attends to the other side's; their means are read together.
    """

    def __init__(self, config: HiViLTConfig, width: int):
        super().__init__(config)
        make = partial(_layer, nn.TransformerDecoderLayer, config, width)
        self.vision_layers = nn.ModuleList(make() for _ in range(config.num_fusion_stages))
        self.text_layers = nn.ModuleList(make() for _ in range(config.num_fusion_stages))
        self.norms = nn.ModuleList(nn.LayerNorm(config.hidden_size) for _ in range(2))
        self.output = nn.Linear(2 * config.hidden_size, config.hidden_size)

    def join(self, vision, vision_global, text, text_global, text_mask):
        for vision_layer, text_layer in zip(self.vision_layers, self.text_layers, strict=True):
            vision, text = (
                vision_layer(vision, text, memory_key_padding_mask=~text_mask),
                text_layer(text, vision, tgt_key_padding_mask=~text_mask),
            )
        vision, text = (norm(tokens) for norm, tokens in zip(self.norms, (vision, text), strict=True))
        seen, read = vision.mean(dim=1), masked_mean(text, text_mask)
        return self.output(torch.cat([seen, read], dim=-1)), vision, text


def _layer(kind: type[nn.Module], config: HiViLTConfig, width: int) -> nn.Module:
    return kind(
        config.hidden_size, config.num_attention_heads, width, config.dropout, F.gelu, batch_first=True, norm_first=True
    )


def vilt_patches(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """What ViLT makes of images before it meets words, `(B_i, 1 + patches, hidden_size)`.

    All images are of the config's size, so that none is padded, and ViLT's own loops over them, which wait for the GPU,
    are not needed.
    """
    embeddings = model.vilt.embeddings
    patches = embeddings.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)
    patches = torch.cat([embeddings.cls_token.expand(len(patches), -1, -1), patches], dim=1)
    return patches + embeddings.position_embeddings


class ViltOnGroups(ViltForQuestionAnswering):
    """ViLT that takes HiViLT's batches: an image for several questions, integer labels."""

    accepts_loss_kwargs = False

    def forward(self, input_ids, attention_mask, pixel_values, image_index=None, labels=None):
        patches = select(vilt_patches(self, pixel_values), image_index)
        seen = attention_mask.new_ones(patches.shape[:2])
        logits = super().forward(input_ids, attention_mask, image_embeds=patches, pixel_mask=seen).logits
        loss = None if labels is None else classification_loss(logits, labels)
        return HiViLTQuestionAnsweringOutput(loss=loss, logits=logits)


class ViltOnPairs(ViltForImagesAndTextClassification):
    """ViLT that takes HiViLT's batches of statements about several images each, with integer labels."""

    accepts_loss_kwargs = False

    def forward(self, input_ids, attention_mask, pixel_values, image_index, labels=None):
        patches = vilt_patches(self, pixel_values)[image_index]  # (B_i, N, d) -> (B_t, n, N, d)
        seen = attention_mask.new_ones(*patches.shape[:3], 1)
        logits = super().forward(input_ids, attention_mask, image_embeds=patches, pixel_mask=seen).logits
        loss = None if labels is None else classification_loss(logits, labels)
        return HiViLTQuestionAnsweringOutput(loss=loss, logits=logits)


class OfText(HiViLTForImagesAndTextClassification):
    """HiViLT that sees zeros in place of every image: one image, encoded once."""

    def forward(self, *args, image_index, pixel_values=None, feature_maps=None, **kwargs):
        if pixel_values is not None:
            pixel_values = torch.zeros_like(pixel_values[:1])
        if feature_maps is not None:
            feature_maps = [torch.zeros_like(maps[:1]) for maps in feature_maps]
        blank = torch.zeros_like(image_index)
        return super().forward(*args, image_index=blank, pixel_values=pixel_values, feature_maps=feature_maps, **kwargs)


class OfOneImage(HiViLTForImagesAndTextClassification):
    """HiViLT that sees the first image of a statement in place of all of them."""

    def forward(self, *args, image_index, **kwargs):
        return super().forward(*args, image_index=image_index[:, :1].expand_as(image_index), **kwargs)


class ViltForPairs(ViltForImageAndTextRetrieval):
    """
    ViLT that takes the batches of retrieval and learns by HiViLT's fused matching. It has no embeddings: nothing but the
    scores of all pairs orders anything, and the negatives, as many as HiViLT's, are drawn evenly from the batch.
    """

    accepts_loss_kwargs = False

    def encode_images(self, pixel_values: torch.Tensor) -> HiViLTImageStates:
        patches = vilt_patches(self, pixel_values)
        return HiViLTImageStates(global_state=patches[:, 0], level_states=(patches,))

    def encode_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> HiViLTTextStates:
        words = input_ids.unsqueeze(-1)  # as wide as states are, to be padded as they are
        return HiViLTTextStates(global_state=words[:, 0], level_states=(words,), attention_mask=attention_mask.bool())

    def score(self, image_states, text_states, image_index=None, text_index=None) -> torch.Tensor:
        patches = select(image_states.level_states[0], image_index)
        words = select(text_states.level_states[0], text_index).squeeze(-1)
        mask = select(text_states.attention_mask, text_index).long()
        seen = mask.new_ones(patches.shape[:2])
        return super().forward(words, mask, image_embeds=patches, pixel_mask=seen).logits.squeeze(-1)

    def ranking_score(self, similarity: torch.Tensor, fused_similarity: torch.Tensor) -> torch.Tensor:
        return fused_similarity

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        pixel_values=None,
        image_index=None,
        image_ids=None,
        image_states=None,
        text_states=None,
        chunk_size=None,
    ):
        images = self.encode_images(pixel_values) if image_states is None else image_states
        texts = self.encode_texts(input_ids, attention_mask) if text_states is None else text_states
        sizes = [len(images.global_state), len(texts.global_state)]
        image_embeds, text_embeds = images.level_states[0].new_zeros(sum(sizes), 1).split(sizes)
        batch = PairBatch(image_embeds, text_embeds, image_index, image_ids, None, images, texts)
        unscaled = image_embeds.new_zeros(())
        losses = retrieval_losses(batch, self.config, unscaled, unscaled, self.score, self.training, gather=False)
        return HiViLTRetrievalOutput(loss=losses["loss"], image_embeds=image_embeds, text_embeds=text_embeds)


class ViltOnGrid(nn.Module):
    """ViLT in the place of `HiViLTModel` under the head of visual grounding: its patches are a grid of one level, and its
    states of the image's and of the text's first token are the global ones.
    """

    def __init__(self, config: ViltConfig):
        super().__init__()
        self.vilt = ViltModel(config, add_pooling_layer=False)

    def encode_images(self, pixel_values: torch.Tensor, **kwargs) -> HiViLTImageStates:
        patches = vilt_patches(self, pixel_values)
        grid = [length // self.vilt.config.patch_size for length in pixel_values.shape[2:]]
        return HiViLTImageStates(global_state=patches[:, 0], level_states=(patches[:, 1:].unflatten(1, grid),))

    def encode(self, images, texts, image_states=None, text_states=None, image_index=None, **kwargs):
        input_ids, attention_mask = texts[:2]
        words = HiViLTTextStates(level_states=(input_ids,), attention_mask=attention_mask.bool())
        return self.encode_images(images[0]) if image_states is None else image_states, words

    def fuse(self, images, texts, image_index=None, **kwargs) -> HiViLTModelOutput:
        words, mask = texts.level_states[0], texts.attention_mask.long()
        patches = torch.cat([images.global_state[:, None], images.level_states[0].flatten(1, 2)], dim=1)
        patches = select(patches, image_index)
        seen = mask.new_ones(patches.shape[:2])
        states = self.vilt(words, mask, image_embeds=patches, pixel_mask=seen).last_hidden_state
        text, vision = states.split([words.shape[1], patches.shape[1]], dim=1)
        return HiViLTModelOutput(
            local_fusion_state=torch.cat([vision[:, 1:], text], dim=1),
            vision_global_state=vision[:, 0],
            text_global_state=text[:, 0],
        )


# The class of HiViLT whose task a contestant is for.
Head = type[HiViLTPreTrainedModel]


# As all that makes a contestant, it is given the number of word pieces, the side of the images in pixels, a width, the
# encoders (unset: those of the scripts, which are small and train), and fields of the config.
def make_hivilt(head: Head, vocab_size: int, image_size: int, width: int, encoders: Encoders | None = None, **fields):
    """HiViLT on these encoders; `width` is that inside the MLPs of local fusion."""
    encoders = encoders or small_encoders(vocab_size)
    config = {**encoders.fusion, "fusion_intermediate_size": width, **fields}
    model = head.from_vision_text_pretrained(encoders.vision, encoders.text, **config)
    if encoders.frozen:
        model.freeze("vision")
        model.freeze("text")
    return model


def one_stage(*args, encoders: Encoders | None = None, **fields):
    """The coarsest level alone."""
    levels = {} if encoders is None else encoders.fusion
    last = {name: levels[name][-1:] for name in ("vision_levels", "vision_strides") if name in levels}
    return make_hivilt(*args, encoders=encoders, num_fusion_stages=1, **last, **fields)


def without_local(head: Head, vocab_size: int, image_size: int, width: int, encoders: Encoders | None = None, **fields):
    """
    The parameters of local fusion go to the last stage of the vision encoder, which is `width` wide; where encoders are
    frozen, to an MLP of that width on the tokens of each side, which sees nothing of the other.
    """
    fields["use_local_fusion"] = False
    if encoders is not None:
        model = make_hivilt(head, vocab_size, image_size, width, encoders, **fields)
        for levels in (model.base_model.fusion.vision_levels, model.base_model.fusion.text_levels):
            levels[-1] = nn.Sequential(levels[-1], OwnMLP(model.config, model.config.hidden_size, width))
        return _initialized(model)
    small = small_encoders(vocab_size)
    small.vision.hidden_sizes = [*small.vision.hidden_sizes[:-1], width]
    return make_hivilt(head, vocab_size, image_size, SMALL_FUSION["fusion_intermediate_size"], small, **fields)


class OwnMLP(HiViLTMLP):
    """What a token finds in itself, added to it."""

    def forward(self, hidden_states):
        return hidden_states + super().forward(hidden_states)


def without_product(*args, width: int, **fields):
    """Local fusion whose MLPs read a token and what it attended to, not their product."""
    model = make_hivilt(*args, width=width, **fields)
    for stage in model.base_model.fusion.stages:
        stage.vision_mlp, stage.text_mlp = (
            WithoutProductMLP(model.config, 2 * model.config.hidden_size, width) for _ in range(2)
        )
    return _initialized(model)


class WithoutProductMLP(HiViLTMLP):
    """Reads the first two of the three parts of its input."""

    def forward(self, hidden_states):
        return super().forward(hidden_states[..., : self.fc1.in_features])


def with_fusion(
    fusion: Callable[[HiViLTConfig, int], OtherFusion],
    head: Head,
    *args,
    width: int,
    encoders: Encoders | None = None,
    **fields,
):
    """HiViLT with another fusion in its place."""
    # The head of visual grounding is as wide as local fusion, and the same for all.
    own = usual_width(encoders) if head is HiViLTForVisualGrounding else width
    model = make_hivilt(head, *args, width=own, encoders=encoders, **fields)
    model.base_model.fusion = fusion(model.config, width)
    return _initialized(model)


def _initialized(model: HiViLTPreTrainedModel) -> HiViLTPreTrainedModel:
    # As HiViLT's own layers are; the attention of torch keeps its own.
    model.base_model.fusion.apply(model._init_weights)
    return model


def make_vilt(head: Head, vocab_size: int, image_size: int, width: int, **fields):
    """Patches of 8 pixels, about as many as HiViLT has tokens on its finest level, and weights initialised as its are."""
    if "id2label" in fields:
        fields["label2id"] = {label: place for place, label in fields["id2label"].items()}
    config = ViltConfig(
        vocab_size=vocab_size,
        image_size=image_size,
        patch_size=8,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=64,
        modality_type_vocab_size=1 + fields.get("num_images", 1),  # the text, and each image
        initializer_range=128**-0.5,
        contrastive_loss_weight=0.0,
        auxiliary_loss_weight=1.0,
        **fields,
    )
    if head is HiViLTForVisualGrounding:
        # Pyramid, rows and loss are HiViLT's, on one level of ViLT's width.
        size = {"hidden_size": config.hidden_size, "num_fusion_stages": 1}
        model = make_hivilt(head, vocab_size, image_size, usual_width(), **size)
        model.model = ViltOnGrid(config)
        return model
    own = {HiViLTForRetrieval: ViltForPairs, HiViLTForImagesAndTextClassification: ViltOnPairs}
    return own.get(head, ViltOnGroups)(config)


def of_some_images(kind: Head, head: Head, *args, **fields):
    """A HiViLT that is not shown all images of a statement."""
    return make_hivilt(kind, *args, **fields)


CONTESTANTS: dict[str, Callable[..., nn.Module]] = {
    "HiViLT": make_hivilt,
    "HiViLT, co-attention's FLOPs": make_hivilt,
    "ViLT": make_vilt,
    "ViLT, HiViLT's FLOPs": make_vilt,
    "single stream (VisualBERT)": partial(with_fusion, SingleStream),
    "single stream (VisualBERT), HiViLT's FLOPs": partial(with_fusion, SingleStream),
    "co-attention (METER)": partial(with_fusion, CoAttention),
    "late fusion (CLIP)": partial(with_fusion, LateFusion),
    "late fusion (CLIP), HiViLT's FLOPs": partial(with_fusion, LateFusion),
    "without local fusion": without_local,
    "without global fusion": partial(make_hivilt, use_global_fusion=False),
    "one stage": one_stage,
    "without the product": without_product,
    "without positions": partial(make_hivilt, use_position_embeddings=False),
    "sparse, k = 4": partial(make_hivilt, fusion_top_k=4),
    "text only": partial(of_some_images, OfText),
    "one image only": partial(of_some_images, OfOneImage),
}

# Trained for as many FLOPs as another, and so for fewer or more steps than all others.
AT_EQUAL_FLOPS = {
    "ViLT, HiViLT's FLOPs": "HiViLT",
    "HiViLT, co-attention's FLOPs": "co-attention (METER)",
    "single stream (VisualBERT), HiViLT's FLOPs": "HiViLT",
    "late fusion (CLIP), HiViLT's FLOPs": "HiViLT",
}

# ViLT has no encoders to be given the states of: it embeds pixels and words itself. One transformer over the states of
# both, as ViLT's is over pixels and words, is the single stream, which stands for it there at HiViLT's FLOPs, too.
FROM_PIXELS_ALONE = ("ViLT", "ViLT, HiViLT's FLOPs")
ON_FROZEN_ALONE = ("single stream (VisualBERT), HiViLT's FLOPs",)
ON_PAIRS_ALONE = ("text only", "one image only")


def contestants_of(frozen: bool, pairs: bool) -> list[str]:
    """Those of `CONTESTANTS` that there are on frozen encoders, or on encoders that train, and for pairs of images or not."""
    left_out = (FROM_PIXELS_ALONE if frozen else ON_FROZEN_ALONE) + (() if pairs else ON_PAIRS_ALONE)
    return [name for name in CONTESTANTS if name not in left_out]


def make(name: str, head: Head, vocab_size: int, image_size: int, encoders: Encoders | None = None, **fields):
    """A contestant, as wide as makes it train as many parameters as HiViLT with its usual width, as nearly as it can."""
    if encoders is not None and name in FROM_PIXELS_ALONE:
        raise ValueError(f"encoders: {name} reads pixels and words and has no encoders; got {encoders.vision}.")
    given = {} if encoders is None else {"encoders": encoders}
    make_one = partial(CONTESTANTS[name], head, vocab_size, image_size, **fields)
    with torch.device("meta"):
        sized = {} if encoders is None else {"encoders": encoders.untrained()}
        usual = usual_width(encoders)
        target = num_parameters(make_hivilt(head, vocab_size, image_size, usual, **sized, **fields))
        first, second, third = (num_parameters(make_one(width=width, **sized)) for width in (1, 2, 3))
    if first > target:
        raise ValueError(
            f"fusion_intermediate_size: got {usual}, with which HiViLT trains {target:,} parameters, but {name} has "
            f"{first:,} at least; make it larger."
        )

    def size(width: int) -> int:
        """A polynomial of the second degree, for all."""
        return first + (width - 1) * (second - first) + (width - 1) * (width - 2) // 2 * (third - 2 * second + first)

    width = min(range(1, 4096), key=lambda width: abs(size(width) - target))
    return make_one(width=width, **given)


def usual_width(encoders: Encoders | None = None) -> int:
    """That inside the MLPs of HiViLT's local fusion, on these encoders or those of the scripts."""
    return (SMALL_FUSION if encoders is None else encoders.fusion)["fusion_intermediate_size"]


def num_parameters(model: nn.Module) -> int:
    """All that train."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
