"""
HiViLT: a hierarchical vision-language transformer.

Two borrowed encoders never see the other modality, so a picture is encoded once however many questions it meets, and a
text once however many pictures. What they give is cut into levels, fine to coarse, and fused level by level:

    pixel_values -> vision_model -> level 1 ... level S (grids, fine to coarse)  \\
                                                                                   encode_images / encode_texts
    input_ids    -> text_model   -> level 1 ... level S (words, phrases, clauses) /
                        |
    stage s:   X = level s + what stage s-1 found;  F_s = X + MLP([X; X~; X * X~])     local, both directions
                        |
    V_g, T_g, Pool(F_S) -> global cross-attention, both directions -> F_global         global
                        |
    answers: W F_global + b            retrieval: cos(P_v V~_g, P_t T~_g)

Letters in shapes: `B_i` images, `B_t` texts, `N_v` vision tokens of a level, `N_t` text tokens, `d` hidden size,
`S` fusion stages, `H` heads. "Equation L, P, G" are those of the design note, sections 3.2, 7.2 and 3.3.
"""

import copy
import difflib
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    ModelOutput,
    TransformersKwargs,
    can_return_tuple,
    logging,
)
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .configuration_hivilt import HiViLTConfig, code_in_place
from .encoders_hivilt import (
    attention_for,
    build_encoder,
    fetch_tokens,
    first_layers,
    image_inputs,
    image_maps,
    image_size,
    layers_of,
    move_tokens,
    places_without_gaps,
    takes_one_size,
    text_width,
    vision_norm,
    vision_states,
    word_embeddings,
)

if TYPE_CHECKING:
    # Never run: saving and loading copy the files that this one is seen to import, and these two belong to the weights.
    from .pipeline_hivilt import HiViLTVisualQuestionAnsweringPipeline  # noqa: F401
    from .processing_hivilt import HiViLTProcessor  # noqa: F401

logger = logging.get_logger(__name__)

# A CPU fuses as many pairs at a time as have finest levels of this many bytes: what is computed of them stays near the
# processor, and pieces so small are not asked of the system anew each time.
_BYTES_AT_ONCE = 2**23

MAX_LOGIT_SCALE = 4.6052  # ln 100, as CLIP clamps it


@dataclass
class HiViLTImageStates(ModelOutput):
    """
    What [`HiViLTModel.encode_images`] leaves of `B_i` images: all that depends on the images alone.

    Args:
        global_state (`torch.FloatTensor` of shape `(B_i, d)`): `V_g`, the mean of the coarsest level.
        pooled_state (`torch.FloatTensor` of shape `(B_i, channels)`): the mean of the encoder's map that this level is of.
        level_states (`tuple` of `S` tensors of shape `(B_i, height, width, d)`): the levels, fine to coarse.
        query, key, value (`torch.FloatTensor` of shape `(B_i, N_v, d)`): the first stage's projections of level 1;
            `None` without local fusion.
        last_hidden_state (`torch.FloatTensor`): the vision encoder's own.
        hidden_states, attentions (`tuple` of `torch.FloatTensor`, *optional*): the vision encoder's own, on request.
    """

    global_state: torch.FloatTensor | None = None
    pooled_state: torch.FloatTensor | None = None
    level_states: tuple[torch.FloatTensor, ...] | None = None
    query: torch.FloatTensor | None = None
    key: torch.FloatTensor | None = None
    value: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class HiViLTTextStates(ModelOutput):
    """
    What [`HiViLTModel.encode_texts`] leaves of `B_t` texts: all that depends on the texts alone.

    Args:
        global_state (`torch.FloatTensor` of shape `(B_t, d)`): `T_g`, the mean of the coarsest level without padding.
        pooled_state (`torch.FloatTensor` of shape `(B_t, text width)`): the mean of the encoder's states without padding.
        level_states (`tuple` of `S` tensors of shape `(B_t, N_t, d)`): the levels, words to clauses.
        query, key, value (`torch.FloatTensor` of shape `(B_t, N_t, d)`): the first stage's projections of level 1;
            `None` without local fusion.
        attention_mask (`torch.BoolTensor` of shape `(B_t, N_t)`): `False` at padding.
        input_ids (`torch.LongTensor` of shape `(B_t, N_t)`): the tokens, by which losses know equal texts; `None` where
            the texts came as `inputs_embeds`.
        last_hidden_state (`torch.FloatTensor`): the text encoder's own.
        hidden_states, attentions (`tuple` of `torch.FloatTensor`, *optional*): the text encoder's own, on request.
    """

    global_state: torch.FloatTensor | None = None
    pooled_state: torch.FloatTensor | None = None
    level_states: tuple[torch.FloatTensor, ...] | None = None
    query: torch.FloatTensor | None = None
    key: torch.FloatTensor | None = None
    value: torch.FloatTensor | None = None
    attention_mask: torch.BoolTensor | None = None
    input_ids: torch.LongTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class HiViLTModelOutput(ModelOutput):
    """
    Output of [`HiViLTModel`].

    Args:
        local_fusion_state (`torch.FloatTensor` of shape `(B_t, N_v + N_t, d)`): `F_local`, the last stage's vision
            rows (row-major over its grid), then its text rows.
        global_fusion_state (`torch.FloatTensor` of shape `(B_t, d)`): `F_global`, what a classifier reads.
        vision_global_state, text_global_state (`torch.FloatTensor` of shape `(B_t, d)`): the fused `V~_g` and `T~_g`.
        vision_last_hidden_state (`torch.FloatTensor`): of the vision encoder, `B_i` rows.
        text_last_hidden_state (`torch.FloatTensor` of shape `(B_t, N_t, text width)`): of the text encoder.
        hidden_states (`tuple` of `S` tensors of shape `(B_t, N_v + N_t, d)`): each stage's result, with
            `output_hidden_states=True`; with a list of indices, `None` in place of the others.
        cross_attentions (`tuple` of `S` tensors of shape `(B_t, H, N_t, N_v)`): where each stage's text tokens looked
            in the image, with `output_attentions=True`.
        vision_cross_attentions (`tuple` of `S` tensors of shape `(B_t, H, N_v, N_t)`): the other direction.
        global_cross_attentions (`tuple` of 2 tensors of shape `(B_t, H, 1, 2)`): weights of `V_g` on
            `[T_g; Pool(F_local)]` and of `T_g` on `[V_g; Pool(F_local)]`.
        vision_hidden_states, text_hidden_states, vision_attentions, text_attentions (`tuple`): the encoders' own.
    """

    local_fusion_state: torch.FloatTensor | None = None
    global_fusion_state: torch.FloatTensor | None = None
    vision_global_state: torch.FloatTensor | None = None
    text_global_state: torch.FloatTensor | None = None
    vision_last_hidden_state: torch.FloatTensor | None = None
    text_last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    vision_cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    global_cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    vision_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    text_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    vision_attentions: tuple[torch.FloatTensor, ...] | None = None
    text_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class HiViLTQuestionAnsweringOutput(ModelOutput):
    """
    Output of [`HiViLTForQuestionAnswering`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, returned with `labels`): weighted sum of the losses.
        logits (`torch.FloatTensor` of shape `(B_t, num_labels)`): one score for each answer, before softmax (integer
            labels) or sigmoid (soft labels).
        hidden_states, cross_attentions, vision_cross_attentions, global_cross_attentions, vision_hidden_states,
            text_hidden_states, vision_attentions, text_attentions: as in [`HiViLTModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    vision_cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    global_cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    vision_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    text_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    vision_attentions: tuple[torch.FloatTensor, ...] | None = None
    text_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class HiViLTRetrievalOutput(ModelOutput):
    """
    Output of [`HiViLTForRetrieval`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, returned in training and with `return_loss=True`): weighted sum, 0 at best.
        logits_per_image (`torch.FloatTensor` of shape `(B_i, B_t)`): `exp(logit_scale)` times the cosine of the
            embeddings; `logits_per_text` is its transpose.
        image_embeds (`torch.FloatTensor` of shape `(B_i, projection_dim)`): L2-normalised, of the images alone.
        text_embeds (`torch.FloatTensor` of shape `(B_t, projection_dim)`): L2-normalised, of the texts alone.
        contrastive_loss, auxiliary_loss (`torch.FloatTensor` of shape `()`): the terms of `loss` before weighting; the
            former less [`contrastive_floor`].
        num_dropped_anchors (`torch.LongTensor` of shape `()`): anchors that took no part in fused matching, since
            every candidate of the batch matched them.
        vision_hidden_states, text_hidden_states, vision_attentions, text_attentions (`tuple`): the encoders' own.
    """

    loss: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    contrastive_loss: torch.FloatTensor | None = None
    auxiliary_loss: torch.FloatTensor | None = None
    num_dropped_anchors: torch.LongTensor | None = None
    vision_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    text_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    vision_attentions: tuple[torch.FloatTensor, ...] | None = None
    text_attentions: tuple[torch.FloatTensor, ...] | None = None


# Attention


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as written: the reference that the other implementations must equal, and the one that shows weights."""
    attention = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        attention = attention + attention_mask
    # In float32 at least, since half precision loses small weights.
    attention = F.softmax(attention, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    if attention_mask is not None:
        # Where nothing may be looked at, softmax of equal scores would look at everything.
        attention = attention * (attention_mask == 0).any(dim=-1, keepdim=True)
    attention = F.dropout(attention, p=dropout, training=module.training)
    return torch.matmul(attention, value).transpose(1, 2).contiguous(), attention


def cross_attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.BoolTensor | None = None,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Multi-head `softmax(Q K^T / sqrt(d_k)) V` through transformers' attention interface.

    Args:
        module (`nn.Module`): the caller; its `config` names the implementation, heads and dropout.
        query (`torch.Tensor` of shape `(B, N_q, d)`), key, value (of shape `(B, N_k, d)`): already projected.
        allowed (`torch.BoolTensor` broadcastable to `(B, 1, N_q, N_k)`, *optional*): `False` where a query may not
            look. A query that may look nowhere gets zeros.

    Returns:
        The attended values `(B, N_q, d)` and the weights `(B, H, N_q, N_k)`, `None` unless eager.
    """
    config = module.config
    head_dim = config.hidden_size // config.num_attention_heads
    # (B, N, d) -> (B, H, N, d_k)
    query, key, value = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (query, key, value))
    mask = looks = None
    if allowed is not None:
        looks = allowed.any(dim=-1, keepdim=True)  # (B, 1, N_q or 1, 1)
        if looks.shape[2] == 1:
            # All queries may look at the same tokens: none is left to be seen where they may look nowhere.
            value, looks = value * looks, None
        # Made here, in the query's own precision: under autocast the minimum of float32 would overflow to -inf. Half the
        # minimum, since a score is added to it, and a row of nothing but -inf would be NaN.
        mask = torch.zeros(allowed.shape, dtype=query.dtype, device=query.device)
        mask = mask.masked_fill(~allowed, torch.finfo(query.dtype).min / 2)

    attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
        config._attn_implementation, eager_attention_forward
    )
    attended, attention = attention_interface(
        module,
        query,
        key,
        value,
        mask,
        scaling=head_dim**-0.5,
        dropout=config.dropout if module.training else 0.0,
        is_causal=False,
        **kwargs,
    )
    # (B, N_q, H, d_k) -> (B, N_q, d)
    attended = attended.flatten(2)
    if looks is not None:
        attended = attended * looks.squeeze(1)
    return attended, attention


class HiViLTConcatLinear(nn.Linear):
    """A linear layer over the concatenation of its inputs, which is never made: to write it would cost as much time."""

    def forward(self, *parts: torch.Tensor) -> torch.Tensor:
        weights = self.weight.split([part.shape[-1] for part in parts], dim=1)
        output = F.linear(parts[0], weights[0], self.bias)
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            output = output + F.linear(part, weight)
        return output


class HiViLTMLP(nn.Module):
    """Two linear layers with an activation and dropout between them, over the concatenation of its inputs."""

    def __init__(self, config: HiViLTConfig, in_features: int, intermediate_features: int):
        super().__init__()
        self.fc1 = HiViLTConcatLinear(in_features, intermediate_features)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.dropout)
        self.fc2 = nn.Linear(intermediate_features, config.hidden_size)

    def forward(self, *parts: torch.Tensor, resample: Callable | None = None) -> torch.Tensor:
        """
        Args:
            *parts (`torch.Tensor` of shape `(B, N, features)`): what is concatenated.
            resample (*optional*): averages rows to those of another grid, before the second layer, which has less to
                do then: the mean of a linear layer's outputs is its output of the mean.
        """
        # An adapter or a quantized layer that took its place wants its input in one piece.
        is_own = isinstance(self.fc1, HiViLTConcatLinear)
        hidden_states = self.fc1(*parts) if is_own else self.fc1(torch.cat(parts, dim=-1))
        hidden_states = self.dropout(self.activation(hidden_states))
        if resample is not None:
            hidden_states = resample(hidden_states)
        return self.fc2(hidden_states)


class HiViLTAttention(nn.Module):
    """Cross-attention with an output projection: `CrossAttn` of equation G."""

    def __init__(self, config: HiViLTConfig):
        super().__init__()
        self.config = config
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, context: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, attention = cross_attend(
            self, self.q_proj(hidden_states), self.k_proj(context), self.v_proj(context), **kwargs
        )
        return self.o_proj(attended), attention


# Levels: what one modality gives, before it meets the other


def smooth_tokens(hidden_states: torch.Tensor, attention_mask: torch.BoolTensor, window: int) -> torch.Tensor:
    """
    Mean of every token with its neighbours, `(window - 1) / 2` to each side, never counting padding.

    Args:
        hidden_states (`torch.Tensor` of shape `(B_t, N_t, width)`): the tokens.
        attention_mask (`torch.BoolTensor` of shape `(B_t, N_t)`): `False` at padding.
        window (`int`): odd; 1 leaves the tokens as they are.
    """
    if window == 1:
        return hidden_states
    weights = attention_mask.to(hidden_states.dtype).unsqueeze(1)  # (B_t, 1, N_t)
    total = F.avg_pool1d(hidden_states.transpose(1, 2) * weights, window, stride=1, padding=window // 2)
    count = F.avg_pool1d(weights, window, stride=1, padding=window // 2)
    # A padding token with nothing but padding around it divides nothing by nothing: keep it finite.
    return (total / count.clamp(min=0.5 / window)).transpose(1, 2)


def masked_mean(hidden_states: torch.Tensor, mask: torch.BoolTensor) -> torch.Tensor:
    """Mean over the tokens that `mask` keeps: `(B, N, d)`, `(B, N)` -> `(B, d)`; zeros where it keeps none."""
    weights = mask.to(hidden_states.dtype).unsqueeze(-1)
    return (hidden_states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def pool(states: torch.Tensor, stride: int) -> torch.Tensor:
    """Means over squares of `stride` of `(B_i, height, width, channels)`; one that the border cuts, of what it holds."""
    if stride == 1:
        return states
    states = F.avg_pool2d(states.permute(0, 3, 1, 2), stride, ceil_mode=True, count_include_pad=False)
    return states.permute(0, 2, 3, 1)


def resample_grid(rows: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Area-averages rows on one grid to another: `(B, height * width, d)` -> `(B, new_height * new_width, d)`."""
    if grid == new_grid:
        return rows
    # (B, N, d) -> (B, d, height, width) -> (B, d, new_height, new_width) -> (B, N_new, d)
    return F.adaptive_avg_pool2d(rows.transpose(1, 2).unflatten(2, grid), new_grid).flatten(2).transpose(1, 2)


def take(states: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """`states[index]` along the first dimension; all of them without an index. One state alone is never copied."""
    if index is None:
        return states
    if states.shape[0] == 1 and not torch.compiler.is_compiling():
        return states.expand(index.shape[0], *states.shape[1:])
    return states.index_select(0, index.to(states.device))


def take_tokens(states: torch.Tensor, rows: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
    """Of `take(states, index)`, `(B, N, d)`, the rows `(B, R)` of each: `(B, R, d)`, and no copy of the others."""
    index = torch.arange(rows.shape[0], device=rows.device) if index is None else index.to(rows.device)
    flat = rows + index[:, None] * states.shape[1]
    return states.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, rows.shape)


def grid_positions(height: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """
    Where the cells of a grid have their middle, `(height, width, 2)`: y and x, 0 in the picture's middle and `-sqrt(3)`
    and `sqrt(3)` at its borders, so that positions on a fine grid have variance 1. Of `like`'s dtype, on its device.
    """
    axes = [(torch.arange(size, device=like.device) + 0.5) / size * 2 - 1 for size in (height, width)]
    return (torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1) * 3**0.5).to(like.dtype)


class HiViLTLevel(nn.Module):
    """
    One level of one modality: projected to the common width and normalised before it meets the other.

    Args:
        on_grid (`bool`): whether the tokens lie on a grid, `(B, height, width, in_features)`, and learn their place on it.
    """

    def __init__(self, config: HiViLTConfig, in_features: int, on_grid: bool = False):
        super().__init__()
        self.projection = nn.Linear(in_features, config.hidden_size)
        has_positions = on_grid and config.use_position_embeddings
        self.position_projection = nn.Linear(2, config.hidden_size, bias=False) if has_positions else None
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        projected = self.projection(hidden_states)
        if self.position_projection is not None:
            projected = projected + self.position_projection(grid_positions(*hidden_states.shape[1:3], projected))
        return self.norm(projected)


class HiViLTProjections(nn.Module):
    """Queries, keys and values of one modality in one stage."""

    def __init__(self, config: HiViLTConfig):
        super().__init__()
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)


# Fusion


class HiViLTFusionStage(GradientCheckpointingLayer):
    """
    Local fusion (equation L), dense or sparse: every token sees itself, what it attended to in the other modality, and
    their product, `F_x = x + MLP([x; x~; x * x~])`.
    """

    def __init__(self, config: HiViLTConfig):
        super().__init__()
        self.config = config
        self.is_causal = False
        self.vision_mlp = HiViLTMLP(config, 3 * config.hidden_size, config.fusion_intermediate_size)
        self.text_mlp = HiViLTMLP(config, 3 * config.hidden_size, config.fusion_intermediate_size)

    def forward(
        self,
        vision: torch.Tensor,
        text: torch.Tensor,
        vision_query: torch.Tensor | nn.Linear,
        vision_key: torch.Tensor,
        vision_value: torch.Tensor | nn.Linear,
        text_query: torch.Tensor,
        text_key: torch.Tensor,
        text_value: torch.Tensor,
        text_mask: torch.BoolTensor,
        resample: Callable,
        image_index: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            vision, vision_query, vision_key, vision_value (`torch.Tensor` of shape `(B_t, N_v, d)`): the vision rows;
                with `image_index`, those of `B_i` images. Sparse fusion also takes the projections of query and value,
                to apply them to the chosen rows alone.
            text, text_query, text_key, text_value (`torch.Tensor` of shape `(B_t, N_t, d)`): the text rows.
            text_mask (`torch.BoolTensor` of shape `(B_t, N_t)`): `False` at padding.
            image_index (`torch.LongTensor` of shape `(B_t,)`, *optional*): each text's image; unset, row by row.
            resample (`Callable`): averages vision rows, of whatever width, to the grid that the fused ones shall have.

        Returns:
            Fused vision rows, fused text rows, text-to-image weights `(B_t, H, N_t, N_v)`, image-to-text weights
            `(B_t, H, N_v, N_t)`; weights are `None` unless eager.
        """
        # What the stage adds to, once for each image.
        residual = take(resample(vision), image_index)
        if self.is_sparse(vision):
            found, fused_text, *attentions = self._fuse_sparse(
                vision,
                text,
                (vision_query, vision_key, vision_value),
                (text_query, text_key, text_value),
                text_mask,
                image_index,
                **kwargs,
            )
            return residual + resample(found), fused_text, *attentions
        vision, vision_query, vision_key, vision_value = (
            take(states, image_index) for states in (vision, vision_query, vision_key, vision_value)
        )
        seen_text, image_to_text = cross_attend(
            self, vision_query, text_key, text_value, text_mask[:, None, None, :], **kwargs
        )
        seen_image, text_to_image = cross_attend(self, text_query, vision_key, vision_value, **kwargs)
        fused_vision = residual + self._combine(self.vision_mlp, vision, seen_text, resample)
        fused_text = text + self._combine(self.text_mlp, text, seen_image)
        return fused_vision, fused_text, text_to_image, image_to_text

    def is_sparse(self, vision: torch.Tensor) -> bool:
        """Whether each text token meets only some of these vision rows."""
        return self.config.fusion_top_k is not None and self.config.fusion_top_k < vision.shape[1]

    @staticmethod
    def _combine(mlp: HiViLTMLP, own: torch.Tensor, seen: torch.Tensor, resample=None) -> torch.Tensor:
        return mlp(own, seen, own * seen, resample=resample)

    def _fuse_sparse(self, vision, text, vision_projections, text_projections, text_mask, image_index, **kwargs):
        """
        The same over the pairs that matter: for each text token its `top_k` most similar vision tokens, similarity
        being the attention score `Q_T K_V^T` summed over the heads. The chosen vision rows are gathered first, so that
        attention and MLP run over them alone. Returns what it found for all vision rows, zeros for those
        that no text token chose.
        """
        top_k = self.config.fusion_top_k
        vision_query, vision_key, vision_value = vision_projections
        text_query, text_key, text_value = text_projections
        # (B_t, N_t, N_v)
        similarity = torch.matmul(text_query, take(vision_key, image_index).transpose(1, 2))
        pairs = torch.zeros_like(similarity, dtype=torch.bool)
        pairs = pairs.scatter(2, similarity.topk(top_k, dim=-1).indices, True) & text_mask.unsqueeze(-1)
        chosen = pairs.any(dim=1)  # (B_t, N_v)

        # Compiled and exported graphs need a size that no data decides: at most top_k rows for each text token.
        if torch.compiler.is_compiling():
            num_rows = min(vision.shape[1], top_k * text.shape[1])
        else:
            num_rows = max(1, int(chosen.sum(dim=1).max()))
        rows = chosen.to(similarity.dtype).topk(num_rows, dim=-1).indices  # (B_t, R)
        near, near_key = take_tokens(vision, rows, image_index), take_tokens(vision_key, rows, image_index)
        near_query, near_value = (
            take_tokens(projected, rows, image_index) if isinstance(projected, torch.Tensor) else projected(near)
            for projected in (vision_query, vision_value)
        )
        pairs = pairs.gather(2, rows.unsqueeze(1).expand(-1, text.shape[1], -1))  # (B_t, N_t, R)

        seen_text, image_to_text = cross_attend(
            self, near_query, text_key, text_value, pairs.transpose(1, 2).unsqueeze(1), **kwargs
        )
        seen_image, text_to_image = cross_attend(self, text_query, near_key, near_value, pairs.unsqueeze(1), **kwargs)
        # Rows beyond those chosen only fill the batch up to its largest example. They are left out, or in a graph, whose
        # sizes no data decides, made zero.
        kept = chosen.gather(1, rows)
        position = rows + vision.shape[1] * torch.arange(rows.shape[0], device=rows.device)[:, None]
        if torch.compiler.is_compiling():
            update = self._combine(self.vision_mlp, near, seen_text) * kept.unsqueeze(-1)
        else:
            update, position = self._combine(self.vision_mlp, near[kept], seen_text[kept]), position[kept]
        found = vision.new_zeros(rows.shape[0] * vision.shape[1], vision.shape[2])
        found = found.index_add_(0, position.flatten(), update.flatten(0, -2).to(found.dtype))
        found = found.unflatten(0, (rows.shape[0], vision.shape[1]))
        fused_text = text + self._combine(self.text_mlp, text, seen_image)

        if text_to_image is not None:
            # (B_t, H, N_t, R) -> (B_t, H, N_t, N_v), and the other direction alike
            index = rows[:, None, None, :].expand_as(text_to_image)
            full = text_to_image.new_zeros(*text_to_image.shape[:3], vision.shape[1])
            image_to_text = full.transpose(2, 3).scatter(2, index.transpose(2, 3), image_to_text)
            text_to_image = full.scatter(3, index, text_to_image)
        return found, fused_text, text_to_image, image_to_text


class HiViLTGlobalFusion(nn.Module):
    """
    Global fusion (equation G): the pooled image and the pooled text each look at the other and at the pooled local
    fusion. With `use_global_fusion=False` the pooled rows of local fusion stand in for what they would find.

    Args:
        add_mlp (`bool`): whether to compute `F_global`; retrieval compares the two sides and does without.
    """

    def __init__(self, config: HiViLTConfig, add_mlp: bool):
        super().__init__()
        self.vision_attention = HiViLTAttention(config) if config.use_global_fusion else None
        self.text_attention = HiViLTAttention(config) if config.use_global_fusion else None
        self.mlp = HiViLTMLP(config, 2 * config.hidden_size, config.hidden_size) if add_mlp else None

    def forward(
        self,
        vision_global: torch.Tensor,
        text_global: torch.Tensor,
        fused_vision: torch.Tensor,
        fused_text: torch.Tensor,
        text_mask: torch.BoolTensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, tuple[torch.Tensor | None, ...]]:
        """
        Args:
            vision_global, text_global (`torch.Tensor` of shape `(B_t, d)`): `V_g` and `T_g`.
            fused_vision (`torch.Tensor` of shape `(B_t, N_v, d)`), fused_text (of shape `(B_t, N_t, d)`): `F_local`.
            text_mask (`torch.BoolTensor` of shape `(B_t, N_t)`): `False` at padding.

        Returns:
            `V~_g`, `T~_g`, `F_global` and the attention weights of both directions.
        """
        attentions = ()
        if self.vision_attention is None:
            seen_vision, seen_text = fused_vision.mean(dim=1), masked_mean(fused_text, text_mask)
        else:
            # Pool(F_local): vision rows are never padding.
            vision_mask = text_mask.new_ones(fused_vision.shape[:2])
            pooled = masked_mean(torch.cat([fused_vision, fused_text], 1), torch.cat([vision_mask, text_mask], 1))
            by_vision, vision_attention = self.vision_attention(
                vision_global.unsqueeze(1), torch.stack([text_global, pooled], dim=1), **kwargs
            )
            by_text, text_attention = self.text_attention(
                text_global.unsqueeze(1), torch.stack([vision_global, pooled], dim=1), **kwargs
            )
            seen_vision = vision_global + by_vision.squeeze(1)
            seen_text = text_global + by_text.squeeze(1)
            attentions = (vision_attention, text_attention)
        fused = self.mlp(seen_vision, seen_text) if self.mlp is not None else None
        return seen_vision, seen_text, fused, attentions


class HiViLTFusion(nn.Module):
    """Levels of both modalities, the local stages and global fusion: all of HiViLT but its two encoders."""

    def __init__(self, config: HiViLTConfig, add_global_mlp: bool = True):
        super().__init__()
        # Without local fusion only the coarsest level is ever read.
        layout = config.vision_level_layout if config.use_local_fusion else config.vision_level_layout[-1:]
        stages = range(len(layout) if config.use_local_fusion else 0)
        # Words, phrases, clauses: windows of 1, 3, 9, ... tokens, no wider than 81.
        self.text_windows = [3 ** min(s, 4) for s in range(config.num_fusion_stages)][-len(layout) :]
        self.vision_levels = nn.ModuleList(HiViLTLevel(config, channels, on_grid=True) for _, _, channels in layout)
        self.text_levels = nn.ModuleList(HiViLTLevel(config, text_width(config.text_config)) for _ in layout)
        self.vision_projections = nn.ModuleList(HiViLTProjections(config) for _ in stages)
        self.text_projections = nn.ModuleList(HiViLTProjections(config) for _ in stages)
        self.stages = nn.ModuleList(HiViLTFusionStage(config) for _ in stages)
        self.global_fusion = HiViLTGlobalFusion(config, add_mlp=add_global_mlp)

    def encode_images(self, maps: list[torch.Tensor]) -> HiViLTImageStates:
        """Levels, `V_g` and first projections of maps `(B_i, height, width, channels)`, fine to coarse."""
        levels = [level(states) for level, states in zip(self.vision_levels, maps, strict=True)]
        query, key, value = self.vision_projections[0](levels[0].flatten(1, 2)) if self.stages else (None,) * 3
        return HiViLTImageStates(
            global_state=levels[-1].mean(dim=(1, 2)),
            pooled_state=maps[-1].mean(dim=(1, 2)),
            level_states=tuple(levels),
            query=query,
            key=key,
            value=value,
        )

    def encode_texts(self, hidden_states: torch.Tensor, attention_mask: torch.BoolTensor) -> HiViLTTextStates:
        """Levels, `T_g` and first projections of token states `(B_t, N_t, text width)`."""
        levels = [
            level(smooth_tokens(hidden_states, attention_mask, window))
            for level, window in zip(self.text_levels, self.text_windows, strict=True)
        ]
        query, key, value = self.text_projections[0](levels[0]) if self.stages else (None,) * 3
        return HiViLTTextStates(
            global_state=masked_mean(levels[-1], attention_mask),
            pooled_state=masked_mean(hidden_states, attention_mask),
            level_states=tuple(levels),
            query=query,
            key=key,
            value=value,
            attention_mask=attention_mask,
        )

    def forward(self, step: str, *args, **kwargs) -> HiViLTImageStates | HiViLTTextStates | HiViLTModelOutput:
        """
        Runs `encode_images`, `encode_texts` or `fuse`. Through here, because it is a module's call that accelerate and
        FSDP hook: there they bring the inputs to where the fusion's weights are, or the weights to the inputs.
        """
        return getattr(self, step)(*args, **kwargs)

    def fuse(
        self,
        images: HiViLTImageStates,
        texts: HiViLTTextStates,
        image_index: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HiViLTModelOutput:
        """Fuses each text with its image, row by row without `image_index`: equations L, P and G."""
        vision, text = None, texts.level_states[-1]
        states, text_to_image, image_to_text = (), (), ()
        grids = [(level.shape[1], level.shape[2]) for level in images.level_states]
        # A stage's result is wanted on the next one's grid, unless it is itself asked for.
        next_grids = grids if kwargs.get("output_hidden_states") else [*grids[1:], grids[-1]]
        for index, stage in enumerate(self.stages):
            if index == 0:
                # Of images, not of pairs: the stage itself takes what it needs of them.
                vision, text = images.level_states[0].flatten(1, 2), texts.level_states[0]
                projections = (images.query, images.key, images.value, texts.query, texts.key, texts.value)
            else:
                # Equation P: the stage adds what the stage before it found, so the residual runs through all of them.
                vision = resample_grid(vision, next_grids[index - 1], grids[index])
                vision = take(images.level_states[index], image_index).flatten(1, 2) + vision
                text = texts.level_states[index] + text
                project = self.vision_projections[index]
                if stage.is_sparse(vision):
                    projections = (project.q_proj, project.k_proj(vision), project.v_proj)
                else:
                    projections = project(vision)
                projections = (*projections, *self.text_projections[index](text))
            resample = partial(resample_grid, grid=grids[index], new_grid=next_grids[index])
            vision, text, text_looks, image_looks = stage(
                vision, text, *projections, texts.attention_mask, resample, None if index else image_index, **kwargs
            )
            text_to_image += (text_looks,)
            image_to_text += (image_looks,)
            if kwargs.get("output_hidden_states"):
                # Computed on from what is recorded, so that it can keep its gradient.
                states += (torch.cat([vision, text], dim=1),)
                vision, text = states[-1].split([vision.shape[1], text.shape[1]], dim=1)

        if vision is None:
            vision = take(images.level_states[-1], image_index).flatten(1, 2)
        vision_global, text_global, fused, global_attentions = self.global_fusion(
            take(images.global_state, image_index), texts.global_state, vision, text, texts.attention_mask, **kwargs
        )
        output_attentions = kwargs.get("output_attentions")
        return HiViLTModelOutput(
            local_fusion_state=states[-1] if states else torch.cat([vision, text], dim=1),
            global_fusion_state=fused,
            vision_global_state=vision_global,
            text_global_state=text_global,
            hidden_states=_selected(states, kwargs.get("output_hidden_states")),
            cross_attentions=_weights(text_to_image) if output_attentions else None,
            vision_cross_attentions=_weights(image_to_text) if output_attentions else None,
            global_cross_attentions=_weights(global_attentions) if output_attentions else None,
        )


# Losses


def classification_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    `L_cls` in float32, over the rows that have an answer; zero where none has.

    Args:
        logits (`torch.Tensor` of shape `(B_t, num_labels)`): scores.
        labels (`torch.LongTensor` of shape `(B_t,)`): cross-entropy; -100 marks a row without an answer. Or
            (`torch.FloatTensor` of shape `(B_t, num_labels)`): soft scores in [0, 1], binary cross-entropy times the
            number of classes as in ViLT (arXiv 2102.03334); a row of zeros is one without a known answer.

    Raises:
        ValueError: the labels' type, shape or values do not fit the logits.
    """
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"`labels` must be a tensor, {_described(labels)}: `torch.tensor(labels)`.")
    logits = logits.float()
    labels = labels.to(logits.device)
    num_texts, num_labels = logits.shape
    # Values are looked at only where that does not break a graph.
    seen = _may_look(labels)
    if labels.is_floating_point():
        if labels.shape != logits.shape:
            raise ValueError(
                f"Soft `labels` must have shape (texts, num_labels) = {tuple(logits.shape)}, got {tuple(labels.shape)}. "
                "Answers by their numbers are integers: `labels.long()`."
            )
        if seen and not ((labels >= 0) & (labels <= 1)).all():
            raise ValueError(
                f"Soft `labels` must lie in [0, 1], got {labels.min().item()}..{labels.max().item()}. A row of zeros is "
                "one without a known answer."
            )
        answered = (labels > 0).any(dim=-1)
        losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").sum(dim=-1)
    else:
        if labels.shape != (num_texts,) or not _is_integer(labels):
            raise ValueError(
                f"Integer `labels` must hold one answer for each of the {num_texts} texts, {_described(labels)}. Scores of "
                f"all answers, of shape {tuple(logits.shape)}, are floats: `labels.float()`."
            )
        labels = labels.long()
        answered = labels != -100
        if seen and (answered & ((labels < 0) | (labels >= num_labels))).any():
            raise ValueError(
                f"`labels` must lie in 0..{num_labels - 1}, the answers of `config.id2label`, or be -100 for a row "
                f"without one; got {labels.min().item()}..{labels.max().item()}. Build the head for your answers with "
                "`id2label=...` or `resize_answer_head(answers)`."
            )
        losses = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    if seen and not answered.any():
        logger.warning_once(
            f"None of the {num_texts} questions of a batch has an answer among the {num_labels} of `config.id2label`: its "
            "loss is 0, and nothing is learned from it. Compare the answers of your data with `config.label2id`."
        )
    return (losses * answered).sum() / answered.sum().clamp(min=1)


def contrastive_loss(logits_per_image: torch.Tensor, positives: torch.BoolTensor) -> torch.Tensor:
    """
    `L_contrast`: symmetric InfoNCE with a uniform target over every match (CLIP, arXiv 2103.00020; several positives
    as in ALBEF, arXiv 2107.07651), over the rows that have one.

    Args:
        logits_per_image (`torch.FloatTensor` of shape `(B_i, B_t)`): scaled similarities.
        positives (`torch.BoolTensor` of shape `(B_i, B_t)`): which pairs match.
    """

    def one_way(logits, positives):
        matches = positives.sum(dim=-1)
        matching = torch.where(positives, F.log_softmax(logits.float(), dim=-1), 0.0).sum(dim=-1)
        return -(matching / matches.clamp(min=1)).sum() / (matches > 0).sum().clamp(min=1)

    return (one_way(logits_per_image, positives) + one_way(logits_per_image.t(), positives.t())) / 2


def contrastive_floor(positives: torch.BoolTensor) -> torch.FloatTensor:
    """
    The least that [`contrastive_loss`] can be: a row of `m` matches shares its probability between them, which costs
    `ln m`. Without it the loss is 0 at best, however many matches there are, and its gradient is the same.

    Args:
        positives (`torch.BoolTensor` of shape `(B_i, B_t)`): which pairs match.
    """

    def one_way(positives):
        matches = positives.sum(dim=-1)
        return matches.clamp(min=1).log().sum() / (matches > 0).sum().clamp(min=1)

    return (one_way(positives) + one_way(positives.t())) / 2


def left_aligned(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.LongTensor:
    """Tokens without their padding, each 1 higher, and zeros after them, `(B_t, N_t)`: equal for equal texts alone."""
    is_padding = attention_mask.to(input_ids.device) == 0
    order = is_padding.to(torch.uint8).argsort(dim=1, stable=True)
    return (input_ids + 1).masked_fill(is_padding, 0).gather(1, order)


def first_equal(rows: torch.Tensor) -> torch.LongTensor:
    """For each row of integers the first that equals it, `(B, N)` -> `(B,)`; itself, if it is new."""
    # A distance is how many tokens differ: exact to 16 million tokens, and of a size that no data decides, as a compiled
    # graph needs it. Numbers of any size are compared as they are.
    equal = rows == rows.t() if rows.shape[1] == 1 else torch.cdist(rows.float(), rows.float(), p=0.0) == 0
    return equal.to(torch.uint8).argmax(dim=1)


def matching_pairs(
    image_ids: torch.Tensor, text_image_ids: torch.Tensor, first_equal_text: torch.Tensor
) -> torch.BoolTensor:
    """
    Which images and texts match, `(B_i, B_t)`: a text its own image, and every image that has an equal text.

    Args:
        image_ids (`torch.LongTensor` of shape `(B_i,)`): numbers of the images.
        text_image_ids (`torch.LongTensor` of shape `(B_t,)`): number of each text's image.
        first_equal_text (`torch.LongTensor` of shape `(B_t,)`): see [`first_equal`].
    """
    own = image_ids[:, None] == text_image_ids[None, :]
    of_first = torch.zeros(own.shape, device=own.device).index_add(1, first_equal_text, own.float())
    return of_first[:, first_equal_text] > 0


def hard_negatives(
    logits: torch.Tensor, positives: torch.BoolTensor, sample: bool, count: int = 1
) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """
    For each row different columns that do not match it, the more similar the likelier (ALBEF, arXiv 2107.07651, section
    3.2).

    Args:
        logits (`torch.Tensor` of shape `(rows, columns)`): similarities.
        positives (`torch.BoolTensor` of the same shape): matches, never chosen.
        sample (`bool`): draw with probability softmax(logits), without replacement; otherwise take the most similar,
            which is deterministic.
        count (`int`, defaults to 1): columns to choose, as far as there are so many.

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
    """
    Cross-entropy of choosing the match among others, `(rows,)`; 0 for rows without any other.

    Args:
        match (`torch.FloatTensor` of shape `(rows,)`): scaled similarity of the pair that matches.
        others (`torch.FloatTensor` of shape `(rows, count)`): of pairs that do not.
        valid (`torch.BoolTensor` of the same shape): which of these to choose from.
    """
    candidates = torch.cat([match[:, None], others.masked_fill(~valid, float("-inf"))], dim=1)
    return candidates.logsumexp(dim=1) - match


class _AllGather(torch.autograd.Function):
    """All processes' tensors of one shape; the gradient of each is the sum of what every process found for it."""

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


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """
    The rows of every process in rank order, with gradient: `(B, ...)` -> `(sum of B, ...)`. Processes may hold
    different numbers of rows and, in the second dimension, of tokens, which is padded with zeros.
    """
    shape = torch.tensor(rows.shape[:2], device=rows.device)
    shapes = torch.stack(_AllGather.apply(shape))
    largest = shapes.max(dim=0).values.tolist()
    padded = rows.new_zeros(*largest, *rows.shape[2:])
    padded[tuple(slice(size) for size in rows.shape[:2])] = rows
    counts = shapes[:, 0].tolist()
    return torch.cat([part[:count] for part, count in zip(_AllGather.apply(padded), counts, strict=True)])


def map_states(function: Callable, states: HiViLTImageStates | HiViLTTextStates):
    """The same kind of states with `function` applied to each tensor that fusion reads; the encoders' own are left."""
    fields = ("global_state", "pooled_state", "level_states", "query", "key", "value", "attention_mask")
    mapped = {}
    for name in fields:
        value = states.get(name)
        if value is not None:
            mapped[name] = tuple(map(function, value)) if isinstance(value, tuple) else function(value)
    return type(states)(**mapped)


def cat_states(batches: list[HiViLTImageStates] | list[HiViLTTextStates]) -> HiViLTImageStates | HiViLTTextStates:
    """States of batches of one shape, as those of one batch; of the tensors that fusion reads, as [`map_states`]."""
    joined = {}
    for name, value in map_states(lambda x: x, batches[0]).items():
        parts = [batch[name] for batch in batches]
        joined[name] = tuple(map(torch.cat, zip(*parts, strict=True))) if isinstance(value, tuple) else torch.cat(parts)
    return type(batches[0])(**joined)


def in_chunks(function: Callable, chunk_size: int, *inputs: torch.Tensor | None) -> list:
    """
    What `function` gives for `chunk_size` rows of its inputs at a time. Nothing is kept for the backward pass, which
    computes each chunk once more, under the same random state, just before it uses it: gradients are those of one large
    batch, memory is that of one chunk (GradCache, arXiv 2101.06983, as checkpoints of torch's autograd).

    Args:
        function: takes rows of the inputs.
        chunk_size (`int`): rows at a time.
        *inputs (`torch.Tensor` of shape `(rows, ...)`): `None` stays `None`.
    """
    rows = next(len(rows) for rows in inputs if rows is not None)
    return [
        checkpoint(
            function,
            *(None if x is None else x[start : start + chunk_size] for x in inputs),
            use_reentrant=False,
        )
        for start in range(0, rows, chunk_size)
    ]


# Models


class HiViLTPreTrainedModel(PreTrainedModel):
    """What all HiViLT classes share: initial weights, saving with code, encoding, freezing, borrowing encoders."""

    config_class = HiViLTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["HiViLTFusion"]
    # Trainer takes `**kwargs` in forward for a promise to divide the loss by `num_items_in_batch`; ours is a mean.
    accepts_loss_kwargs = False
    # Task -> pipeline that a saved checkpoint brings along.
    _custom_pipelines = {}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and self.config.initializer_range is None:
            init.normal_(module.weight, std=module.in_features**-0.5)
        for name in ("logit_scale", "matching_logit_scale"):
            if name in module._parameters:
                init.constant_(getattr(module, name), self.config.logit_scale_init_value)

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights, and not of the temperatures, which come first and stay in float32."""
        return next(parameter.dtype for parameter in self.base_model.parameters() if parameter.is_floating_point())

    def get_input_embeddings(self) -> nn.Module:
        """The text encoder's word embeddings, the module that runs."""
        return word_embeddings(self.base_model.text_model)

    def set_input_embeddings(self, value: nn.Module):
        self.base_model.text_model.set_input_embeddings(value)

    def enable_input_require_grads(self):
        """
        Lets gradients begin at the encoders' embeddings even where these are frozen, as adapters under gradient
        checkpointing need it. As in transformers, but for embeddings that return more than a tensor (Swin's).
        """

        embeddings = [self.get_input_embeddings()]
        with suppress(NotImplementedError):  # ConvNeXt names no embeddings
            embeddings.append(self.base_model.vision_model.get_input_embeddings())
        # timm's are None
        self._require_grads_hooks = [e.register_forward_hook(_require_grad) for e in embeddings if e is not None]

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs):
        """
        As [`PreTrainedModel.set_attn_implementation`]; an encoder that does not have the one asked for keeps its own,
        with one warning.
        """
        parts = attn_implementation if isinstance(attn_implementation, dict) else {"": attn_implementation}
        parts = dict(parts)
        encoders = {"vision_config": self.base_model.vision_model, "text_config": self.base_model.text_model}
        for name, encoder in encoders.items():
            wanted = parts.get(name, None if isinstance(attn_implementation, dict) else attn_implementation)
            if isinstance(wanted, str):
                parts[name] = attention_for(encoder, wanted)
        super().set_attn_implementation(parts, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """
        `False`, so that weights that a checkpoint lacks are drawn as each encoder draws them: of custom code transformers
        takes a module that has no parameters of its own for drawn, and T5 and CLIP draw their layers' from above. Our
        `_init_weights` leaves what was loaded alone, as transformers' own do.
        """
        return False

    def get_feature_maps(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, ...]:
        """See [`HiViLTModel.get_feature_maps`]."""
        return self.base_model.get_feature_maps(pixel_values, interpolate_pos_encoding, **kwargs)

    def get_token_states(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """See [`HiViLTModel.get_token_states`]."""
        return self.base_model.get_token_states(input_ids, attention_mask, **kwargs)

    def encode_images(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        feature_maps: Sequence[torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HiViLTImageStates:
        """See [`HiViLTModel.encode_images`]."""
        return self.base_model.encode_images(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, feature_maps=feature_maps, **kwargs
        )

    def encode_texts(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HiViLTTextStates:
        """See [`HiViLTModel.encode_texts`]."""
        return self.base_model.encode_texts(input_ids, attention_mask, **kwargs)

    def freeze(self, part: str, num_layers: int | None = None) -> None:
        """
        Stops the training of a part: its parameters get no gradient, it runs without recording one, and stays in
        evaluation mode (no dropout) until the model is made anew.

        Args:
            part (`str`): `"vision"` or `"text"` (the encoders) or `"fusion"`.
            num_layers (`int`, *optional*): of an encoder, only its embeddings and this many first layers, in the order
                of computation: of one in stages (Swin, ConvNeXt, ResNet) the blocks of all stages are counted through,
                and what lies between two stages freezes with the blocks before it. The batch norms of the other layers
                train, but by the statistics that they have: those of a batch differ from what the encoder has learned.

        Raises:
            ValueError: an unknown part, or `num_layers` where there are no such layers.
        """
        parts = {"vision": "vision_model", "text": "text_model", "fusion": "fusion"}
        if part not in parts:
            raise ValueError(f"`part` must be one of {', '.join(parts)}, got {part!r}.")
        module = getattr(self.base_model, parts[part])
        if num_layers is None:
            module.requires_grad_(False)
            self.base_model.frozen_modules.append(parts[part])
            module.eval()
            return
        layers = layers_of(module) if part != "fusion" else []
        if part == "fusion" or not 0 <= num_layers <= len(layers):
            raise ValueError(
                f"`num_layers` must lie in 0..{len(layers)} and name layers of an encoder, got {num_layers}."
            )
        parameters, through = first_layers(module, num_layers)
        for parameter in parameters:
            parameter.requires_grad_(False)
        kept = [name for name, one in module.named_modules() if isinstance(one, nn.modules.batchnorm._NormBase)]
        self.base_model.frozen_modules += [f"{parts[part]}.{name}" for name in dict.fromkeys([*through, *kept])]
        self.base_model.train(self.base_model.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args, **kwargs):
        """As [`PreTrainedModel.from_pretrained`]; weights that were cut off or tampered with are refused by the name of
        their folder (`OSError`)."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"{pretrained_model_name_or_path}: its weights are cut off or damaged ({error}); copy or download them again."
            ) from error

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """
        Saves weights, config and all the code that opens them: modeling, configuration, processing, pipeline. Also
        into the folder that this very code runs from.
        """
        self.config.custom_pipelines = dict(self._custom_pipelines)
        with code_in_place(self, save_directory):
            super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True) and not self._hf_peft_config_loaded:
            _remove_stale_weights(Path(save_directory))

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """
        Takes the weights of a checkpoint's file, too. Some encoders (ViT, DINOv2, Swin) go by older names there, which
        `from_pretrained` translates, and tied weights by one name only; Trainer, when it resumes or returns to the best
        checkpoint, leaves both as they are.
        """
        if not state_dict.keys() <= self.state_dict().keys():
            translated, loading = type(self).from_pretrained(
                None, config=self.config, state_dict=state_dict, dtype=self.dtype, output_loading_info=True
            )
            found = {k: v for k, v in translated.state_dict().items() if k not in loading["missing_keys"]}
            state_dict = found | {name: state_dict[name] for name in loading["unexpected_keys"]}
        # Tied weights are saved under one of their names (T5), which Trainer would report as missing under the other.
        tied = {name: state_dict[kept] for name, kept in self.all_tied_weights_keys.items() if kept in state_dict}
        state_dict = tied | dict(state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str | os.PathLike | PreTrainedConfig,
        text: str | os.PathLike | PreTrainedConfig,
        **fusion,
    ) -> "HiViLTPreTrainedModel":
        """
        A model whose encoders come from two pretrained checkpoints, and whose fusion is new. It is self-contained: once
        saved, it never asks for those checkpoints again.

        Args:
            vision (`str`, `os.PathLike` or `PreTrainedConfig`): name or folder of a vision encoder, or of a CLIP-like
                model, whose vision tower is taken; or a config, for a new encoder.
            text (`str`, `os.PathLike` or `PreTrainedConfig`): name or folder of a text encoder, or of a CLIP-like
                model, whose text tower is taken; or a config, for a new encoder.
            **fusion: any argument of [`HiViLTConfig`] but the encoders' configs.

        Returns:
            The model in float32 and in evaluation mode.

        Raises:
            ValueError: a checkpoint lacks weights that its encoder needs.
        """
        configs = [s if isinstance(s, PreTrainedConfig) else AutoConfig.from_pretrained(s) for s in (vision, text)]
        model = cls(cls.config_class.from_vision_text_configs(*configs, **fusion))
        for name, source, config in zip(("vision", "text"), (vision, text), configs, strict=True):
            if isinstance(source, PreTrainedConfig):
                continue
            tower = getattr(model.base_model, f"{name}_model")
            load = {"dtype": torch.float32, "output_loading_info": True}
            pretrained, loading = type(tower).from_pretrained(source, config=tower.config, **load)
            missing, prefix = loading["missing_keys"], ""
            if missing and hasattr(config, f"{name}_config"):
                # Not all towers know where they stand in the whole model (BLIP's, AltCLIP's).
                pretrained, loading = AutoModel.from_pretrained(source, **load)
                missing, prefix = loading["missing_keys"], f"{name}_model."
                pretrained = getattr(pretrained, f"{name}_model")
            # Poolers and the like are not taken over, so they need not be there.
            missing = sorted(key for key in tower.state_dict() if prefix + key in missing)
            if missing:
                raise ValueError(
                    f"{source} has no weights for {len(missing)} parameters of its {type(tower).__name__}, the first "
                    f"being {missing[0]!r}; is it a checkpoint of that encoder?"
                )
            weights = pretrained.state_dict()
            tower.load_state_dict({name: weights[name] for name in tower.state_dict()})
        return model.eval()


def _remove_stale_weights(folder: Path) -> None:
    """
    Of weights in one file and weights in shards, removes those of an earlier save: transformers opens the one file
    wherever there is one, and leaves it when it writes shards; when it writes the file, it removes old shards.
    """
    whole, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if whole.exists() and index.exists():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        stale = whole if all((folder / shard).exists() for shard in shards) else index
        stale.unlink()


class HiViLTModel(HiViLTPreTrainedModel):
    """
    The two encoders and their hierarchical fusion, without a head (design note, sections 2-4).

    Args:
        config ([`HiViLTConfig`]): the architecture.
        add_global_mlp (`bool`, defaults to `True`): whether to compute `global_fusion_state`.
    """

    def __init__(self, config: HiViLTConfig, add_global_mlp: bool = True):
        super().__init__(config)
        self.vision_model = build_encoder(config.vision_config)
        self.text_model = build_encoder(config.text_config)
        self.fusion = HiViLTFusion(config, add_global_mlp=add_global_mlp)
        self.frozen_modules = []
        # Read once, since a compiled or exported call must not.
        self._vision_states = vision_states(config.vision_config)
        # (index of the encoder's hidden state, stride, channels) of each level
        self._vision_levels = config.vision_level_layout[-len(self.fusion.vision_levels) :]
        self._vision_arguments = set(inspect.signature(self.vision_model.forward).parameters)
        self._text_arguments = set(inspect.signature(self.text_model.forward).parameters)
        self._install_capturing_hooks()
        self.post_init()

    def _install_capturing_hooks(self):
        for encoder in (self.vision_model, self.text_model):
            # transformers would do it in the first call, which cannot be compiled or exported then.
            maybe_install_capturing_hooks(encoder)

    def __getstate__(self) -> dict:
        """What pickle and `torch.save` take: all but those hooks of the encoders, which are functions without a name."""
        state = {**self.__dict__, "_modules": dict(self._modules)}
        # Tensors and configs are not copied, only the modules around them.
        shared = (*self.parameters(), *self.buffers(), self.config.vision_config, self.config.text_config)
        memo = {id(value): value for value in shared}
        for name in ("vision_model", "text_model"):
            encoder = state["_modules"][name] = copy.deepcopy(self._modules[name], memo)
            for module in encoder.modules():
                hooks = module._forward_hooks
                for key in [
                    key
                    for key, hook in hooks.items()
                    if getattr(hook, "__module__", None) == maybe_install_capturing_hooks.__module__
                ]:
                    del hooks[key]
                module.__dict__.pop("_output_capturing_hooks_installed", None)
        return state

    def __setstate__(self, state: dict):
        super().__setstate__(state)
        self._install_capturing_hooks()

    def train(self, mode: bool = True) -> "HiViLTModel":
        super().train(mode)
        for name in self.frozen_modules:
            self.get_submodule(name).eval()
        return self

    def get_feature_maps(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, ...]:
        """
        What fusion reads of the vision encoder, and what [`HiViLTModel.encode_images`] takes as `feature_maps`. A frozen
        encoder gives the same in every epoch: keep it, and train at the cost of fusion alone.

        Args:
            pixel_values, interpolate_pos_encoding: see [`HiViLTModel.encode_images`].

        Returns:
            A tensor `(B_i, height, width, channels)` for each level, fine to coarse: a hidden state of the encoder,
            averaged over squares of the level's stride.

        Raises:
            ValueError: as [`HiViLTModel.encode_images`].
        """
        return self._run_vision_encoder(pixel_values, interpolate_pos_encoding, **kwargs)[0]

    def get_token_states(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        What fusion reads of the text encoder, and what [`HiViLTModel.encode_texts`] takes as `token_states`: its last
        hidden state `(B_t, N_t, text width)`. Arguments and errors as in [`HiViLTModel.encode_texts`].
        """
        return self._run_text_encoder(input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs)[0]

    def encode_images(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        feature_maps: Sequence[torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HiViLTImageStates:
        """
        All that depends on images alone, to be used for any number of texts.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B_i, channels, height, width)`): as the processor gives them.
            interpolate_pos_encoding (`bool`, defaults to `False`): let an encoder with learned positions take images
                of another size than it was made for. Encoders without them take any size.
            feature_maps (*optional*): what [`HiViLTModel.get_feature_maps`] gave, in place of `pixel_values`: the vision
                encoder does not run, and `last_hidden_state` and what else it records are `None`. Of any float dtype.

        Raises:
            ValueError: `pixel_values` is not a batch of float images, or they are not of the encoder's size; maps are not
                those of this model's levels, or come without a gradient in training although the encoder is not frozen; or
                neither or both are given.
        """
        if (pixel_values is None) == (feature_maps is None):
            raise ValueError("Give the images as either `pixel_values` or `feature_maps`, exactly one of them.")
        _follow_config(kwargs, self.config)
        if feature_maps is not None:
            self._check_feature_maps(feature_maps)
            self._check_not_trained("vision", "feature_maps", "pixel_values", feature_maps)
            return self.fusion("encode_images", [states.to(self.dtype) for states in feature_maps])
        maps, outputs = self._run_vision_encoder(pixel_values, interpolate_pos_encoding, **kwargs)
        states = self.fusion("encode_images", maps)
        states.last_hidden_state = outputs.last_hidden_state
        states.hidden_states = _selected(outputs.hidden_states, kwargs["output_hidden_states"])
        states.attentions = _weights(outputs.get("attentions") or None)
        return states

    def _run_vision_encoder(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool, **kwargs
    ) -> tuple[tuple[torch.Tensor, ...], ModelOutput]:
        """The maps of [`HiViLTModel.get_feature_maps`], and all that the encoder gave."""
        is_tensor = isinstance(pixel_values, torch.Tensor)
        if is_tensor and pixel_values.dim() == 5 and pixel_values.shape[1] == 1:
            # Encodings of one image each, (1, channels, height, width), that a collator stacked.
            pixel_values = pixel_values.flatten(0, 1)
        if not is_tensor or pixel_values.dim() != 4 or not pixel_values.is_floating_point():
            raise ValueError(
                "`pixel_values` must be a float tensor of shape (images, channels, height, width), as the processor gives "
                f"it, of one image alone, too; {_described(pixel_values)}."
            )
        _follow_config(kwargs, self.config)
        self._check_image_size(pixel_values, interpolate_pos_encoding)
        if interpolate_pos_encoding and "interpolate_pos_encoding" in self._vision_arguments:
            kwargs["interpolate_pos_encoding"] = True
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._trains("vision_model")):
            inputs = image_inputs(self.config.vision_config, pixel_values.to(self.vision_model.dtype))
            outputs = self.vision_model(
                **inputs, **self._taken(self._vision_arguments, {**kwargs, "output_hidden_states": True})
            )
            return self._vision_maps(outputs, pixel_values), outputs

    def _check_feature_maps(self, feature_maps: Sequence[torch.Tensor]) -> None:
        wanted = ", ".join(f"(B_i, height, width, {channels})" for _, _, channels in self._vision_levels)
        fit = (
            isinstance(feature_maps, (list, tuple))
            and len(feature_maps) == len(self._vision_levels)
            and all(isinstance(states, torch.Tensor) and states.is_floating_point() for states in feature_maps)
            and all(
                states.dim() == 4 and states.shape[0] == feature_maps[0].shape[0] and states.shape[3] == channels
                for states, (_, _, channels) in zip(feature_maps, self._vision_levels, strict=True)
            )
        )
        if not fit:
            is_list = isinstance(feature_maps, (list, tuple))
            got = ", ".join(map(_described, feature_maps)) if is_list else _described(feature_maps)
            raise ValueError(
                f"`feature_maps` must be float tensors of shapes {wanted}, as `get_feature_maps` of this model gives them; "
                f"{got or 'got none'}."
            )

    def encode_texts(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        token_states: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HiViLTTextStates:
        """
        All that depends on texts alone, to be used for any number of images.

        Args:
            input_ids (`torch.LongTensor` of shape `(B_t, N_t)`): tokens.
            attention_mask (`torch.Tensor` of shape `(B_t, N_t)`, *optional*): 0 at padding; unset, nothing is padding.
            token_type_ids (`torch.LongTensor` of shape `(B_t, N_t)`, *optional*): used where the encoder has types.
            inputs_embeds (`torch.FloatTensor` of shape `(B_t, N_t, text width)`, *optional*): in place of `input_ids`.
            token_states (`torch.FloatTensor` of shape `(B_t, N_t, text width)`, *optional*): what
                [`HiViLTModel.get_token_states`] gave: the text encoder does not run. Of any float dtype. `input_ids` may be
                given beside them, by which losses know equal texts.

        Raises:
            ValueError: texts longer than the encoder takes, a mask of another shape, `token_states` without a gradient in
                training although the encoder is not frozen, or neither or both kinds of input.
        """
        _follow_config(kwargs, self.config)
        if token_states is not None:
            self._check_token_states(token_states, input_ids, inputs_embeds)
            self._check_not_trained("text", "token_states", "input_ids", [token_states])
            attention_mask = self._text_mask(attention_mask, token_states, input_ids)
            states = self.fusion("encode_texts", token_states.to(self.dtype), attention_mask.bool())
            states.input_ids, states.last_hidden_state = input_ids, token_states
            return states
        last_hidden_state, attention_mask, outputs, places = self._run_text_encoder(
            input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs
        )
        states = self.fusion("encode_texts", last_hidden_state, attention_mask.bool())
        states.input_ids = None if input_ids is None else input_ids.flatten(0, -2)  # as a collator stacked
        states.last_hidden_state = last_hidden_state
        hidden_states = tuple(fetch_tokens(state, places) for state in outputs.get("hidden_states") or ())
        states.hidden_states = _selected(hidden_states or None, kwargs["output_hidden_states"])
        attentions = _weights(outputs.get("attentions") or None)
        if attentions is not None:
            attentions = tuple(fetch_tokens(fetch_tokens(weights, places, 2), places, 3) for weights in attentions)
        states.attentions = attentions
        return states

    def _run_text_encoder(
        self, input_ids, attention_mask=None, token_type_ids=None, inputs_embeds=None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor, ModelOutput, torch.LongTensor | None]:
        """
        The states of [`HiViLTModel.get_token_states`], the mask of their texts, all that the encoder gave, and where it
        has each token.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give the texts as either `input_ids` or `inputs_embeds`, exactly one of them.")
        if isinstance(input_ids, (list, tuple)):
            # As torch's collator leaves lists of numbers: one tensor a token.
            raise ValueError('`input_ids` must be a tensor, got a list; call the processor with `return_tensors="pt"`.')
        if input_ids is not None and input_ids.dim() == 3 and input_ids.shape[1] == 1:
            # Encodings of one text each, (1, N_t), that a collator stacked.
            stacked = (input_ids, attention_mask, token_type_ids)
            input_ids, attention_mask, token_type_ids = (x if x is None else x.flatten(0, 1) for x in stacked)
        tokens = input_ids if input_ids is not None else inputs_embeds
        if input_ids is not None and (input_ids.dim() != 2 or not _is_integer(input_ids)):
            raise ValueError(
                f"`input_ids` must be integers of shape (texts, tokens), {_described(input_ids)}. Several texts about an "
                "image are rows of their own, and `image_index` says which image each belongs to."
            )
        if inputs_embeds is not None and (inputs_embeds.dim() != 3 or not inputs_embeds.is_floating_point()):
            raise ValueError(
                f"`inputs_embeds` must be floats of shape (texts, tokens, text width), {_described(inputs_embeds)}."
            )
        limit = self.config.max_text_length
        if limit is not None and tokens.shape[1] > limit:
            raise ValueError(
                f"The texts have {tokens.shape[1]} tokens, but this `{self.config.text_config.model_type}` encoder "
                f"takes {limit}; tokenize with `truncation=True, max_length={limit}`."
            )
        attention_mask = self._text_mask(attention_mask, tokens, input_ids)
        _follow_config(kwargs, self.config)
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if inputs_embeds is not None and "inputs_embeds" not in self._text_arguments:
            raise ValueError(f"{type(self.text_model).__name__} takes no `inputs_embeds`; give `input_ids`.")
        if "token_type_ids" not in self._text_arguments:
            inputs.pop("token_type_ids", None)
        if "position_ids" in kwargs:
            inputs["position_ids"] = kwargs.pop("position_ids").expand(tokens.shape[:2])
        if "use_cache" in self._text_arguments:
            kwargs["use_cache"] = False
        places = places_without_gaps(attention_mask)
        inputs = {name: move_tokens(value, places) for name, value in inputs.items()}
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._trains("text_model")):
            flags = {"output_hidden_states": bool(kwargs["output_hidden_states"])}
            outputs = self.text_model(
                **inputs,
                attention_mask=move_tokens(attention_mask, places),
                **self._taken(self._text_arguments, {**kwargs, **flags}),
            )
            last_hidden_state = fetch_tokens(outputs.last_hidden_state, places)
        return last_hidden_state, attention_mask, outputs, places

    def _text_mask(self, attention_mask: torch.Tensor | None, tokens: torch.Tensor, input_ids: torch.Tensor | None):
        """The mask of tokens `(B_t, N_t)` or states `(B_t, N_t, width)`; unset, nothing is padding."""
        if attention_mask is None:
            self._warn_of_padding(input_ids)
            attention_mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        if attention_mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"`attention_mask` must have the texts' shape {tuple(tokens.shape[:2])}, got "
                f"{tuple(attention_mask.shape)}."
            )
        may_be_added = attention_mask.dtype != torch.bool and _may_look(attention_mask)
        if may_be_added and not ((attention_mask == 0) | (attention_mask == 1)).all():
            raise ValueError(
                "`attention_mask` must be 1 at tokens and 0 at padding, got other numbers; one that is to be added to "
                "attention scores is `(mask == 0).long()` here."
            )
        return attention_mask

    def _check_not_trained(self, part: str, name: str, inputs: str, states: Sequence[torch.Tensor]) -> None:
        """Refuses states without a gradient in place of an encoder that trains: it would stay as it is without a word."""
        if not (self.training and torch.is_grad_enabled()) or any(one.requires_grad for one in states):
            return
        if any(p.requires_grad for p in getattr(self, f"{part}_model").parameters()):
            raise ValueError(
                f"`{name}` carry no gradient, but the {part} encoder trains and would learn nothing: freeze it, "
                f'`model.freeze("{part}")`, or give `{inputs}` in their place.'
            )

    def _check_token_states(self, token_states, input_ids, inputs_embeds) -> None:
        if inputs_embeds is not None:
            raise ValueError("Give the texts as either `inputs_embeds` or `token_states`, not both.")
        width = text_width(self.config.text_config)
        is_float = isinstance(token_states, torch.Tensor) and token_states.is_floating_point()
        if not is_float or token_states.dim() != 3 or token_states.shape[2] != width:
            raise ValueError(
                f"`token_states` must be a float tensor of shape (texts, tokens, {width}), as `get_token_states` of this "
                f"model gives it; {_described(token_states)}."
            )
        if input_ids is not None and input_ids.shape != token_states.shape[:2]:
            raise ValueError(
                f"`input_ids` beside `token_states` must have their shape {tuple(token_states.shape[:2])}, got "
                f"{tuple(input_ids.shape)}."
            )

    def fuse(
        self,
        image_states: HiViLTImageStates,
        text_states: HiViLTTextStates,
        image_index: torch.Tensor | None = None,
        text_index: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HiViLTModelOutput:
        """
        Fuses pairs of encoded images and texts.

        Args:
            image_states, text_states: what `encode_images` and `encode_texts` returned.
            image_index (`torch.LongTensor` of shape `(pairs,)`, *optional*): each pair's image; unset, row by row.
            text_index (`torch.LongTensor` of shape `(pairs,)`, *optional*): each pair's text; unset, row by row.

        Raises:
            ValueError: an index out of range, or images and texts that do not pair up.
        """
        _follow_config(kwargs, self.config)
        num_images, num_texts = image_states.global_state.shape[0], text_states.global_state.shape[0]
        image_index = _check_index("image_index", image_index, num_images, "images")
        text_index = _check_index("text_index", text_index, num_texts, "texts")
        num_left = num_images if image_index is None else image_index.shape[0]
        num_right = num_texts if text_index is None else text_index.shape[0]
        if num_left != num_right:
            raise ValueError(
                f"{num_left} images cannot be paired with {num_right} texts. Give `image_index`, of shape (texts,), "
                "which says for each text the image it belongs to."
            )

        def fuse_rows(rows: slice) -> HiViLTModelOutput:
            texts = text_index[rows] if text_index is not None else None
            texts = map_states(lambda x: x[rows] if texts is None else take(x, texts), text_states)
            if image_index is None:
                return self.fusion("fuse", map_states(lambda x: x[rows], image_states), texts, **kwargs)
            return self.fusion("fuse", image_states, texts, image_index[rows], **kwargs)

        finest, at_once = image_states.level_states[0], num_left
        is_plain = not (kwargs["output_hidden_states"] or kwargs["output_attentions"] or torch.compiler.is_compiling())
        if is_plain and finest.device.type == "cpu":
            at_once = max(1, _BYTES_AT_ONCE // finest[:1].nbytes)
        if num_left <= at_once:
            return fuse_rows(slice(None))
        parts = [fuse_rows(slice(start, start + at_once)) for start in range(0, num_left, at_once)]
        return HiViLTModelOutput(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_index: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_states: HiViLTImageStates | None = None,
        text_states: HiViLTTextStates | None = None,
        interpolate_pos_encoding: bool = False,
        feature_maps: Sequence[torch.FloatTensor] | None = None,
        token_states: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HiViLTModelOutput | tuple:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(B_t, N_t)`): the texts.
            attention_mask (`torch.Tensor` of shape `(B_t, N_t)`, *optional*): 0 at padding.
            pixel_values (`torch.FloatTensor` of shape `(B_i, channels, height, width)`): the images, each once.
            image_index (`torch.LongTensor` of shape `(B_t,)`, *optional*): the image that each text belongs to; unset,
                there must be as many images as texts.
            token_type_ids, inputs_embeds: see [`HiViLTModel.encode_texts`].
            image_states ([`HiViLTImageStates`], *optional*): of `encode_images`, in place of `pixel_values`.
            text_states ([`HiViLTTextStates`], *optional*): of `encode_texts`, in place of the texts.
            interpolate_pos_encoding (`bool`, defaults to `False`): see [`HiViLTModel.encode_images`].
            feature_maps (`tuple` of tensors of shape `(B_i, height, width, channels)`, *optional*): what
                [`HiViLTModel.get_feature_maps`] gave, in place of `pixel_values`; see [`HiViLTModel.encode_images`].
            token_states (`torch.FloatTensor` of shape `(B_t, N_t, text width)`, *optional*): what
                [`HiViLTModel.get_token_states`] gave, so that the texts are not encoded; goes with `attention_mask`, and
                with `input_ids` where a loss is to know equal texts. See [`HiViLTModel.encode_texts`].
            output_attentions, output_hidden_states, return_dict (`bool`, *optional*): as in every transformers model;
                attention weights need `attn_implementation="eager"`, else transformers warns once and they are `None`.
                `output_hidden_states` may also name the indices to keep, of the encoders' states and of the stages'.

        Raises:
            ValueError: inputs are missing, given twice, or do not fit together.
        """
        _follow_config(kwargs, self.config)
        _check_given_once(pixel_values, feature_maps, image_states, input_ids, inputs_embeds, token_states, text_states)

        if image_states is None:
            image_states = self.encode_images(
                pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, feature_maps=feature_maps, **kwargs
            )
        if text_states is None:
            text_states = self.encode_texts(
                input_ids, attention_mask, token_type_ids, inputs_embeds, token_states, **kwargs
            )
        outputs = self.fuse(image_states, text_states, image_index, **kwargs)
        if pixel_values is not None and image_index is not None and _may_look(image_index):
            self._warn_of_joined(image_index.tolist(), image_states.global_state.shape[0])
        return HiViLTModelOutput(
            **outputs,
            vision_last_hidden_state=image_states.last_hidden_state,
            text_last_hidden_state=text_states.last_hidden_state,
            **_of_encoders(image_states, text_states, kwargs),
        )

    @staticmethod
    def _taken(arguments: set[str], kwargs: dict) -> dict:
        """Of a call's keyword arguments those that an encoder takes."""
        kwargs = {**kwargs, "return_dict": True}
        return kwargs if "kwargs" in arguments else {name: v for name, v in kwargs.items() if name in arguments}

    def _trains(self, name: str) -> bool:
        # An adapter inside a frozen encoder trains, so ask the parameters, but only where something was frozen.
        return name not in self.frozen_modules or any(p.requires_grad for p in getattr(self, name).parameters())

    def _warn_of_padding(self, input_ids: torch.Tensor | None) -> None:
        config = self.config.text_config
        padding, end = (getattr(config, name, None) for name in ("pad_token_id", "eos_token_id"))
        if input_ids is None or padding in (None, end) or not _may_look(input_ids):
            return
        if input_ids.shape[1] and (input_ids[:, -1] == padding).any():
            logger.warning_once(
                f"`input_ids` end in the padding token {padding}, but there is no `attention_mask`: padding is read as "
                "words. Give the mask, too, as the processor does."
            )

    @staticmethod
    def _warn_of_joined(image_index: list[int], num_images: int) -> None:
        without = num_images - len(set(image_index))
        if without > 0:
            logger.warning_once(
                f"`image_index` names no text of {without} of the {num_images} images. If encodings of several calls of the "
                "processor were joined, each counts its own images from 0: call it once for the batch, or add to each "
                "the number of images before it."
            )

    def _check_image_size(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> None:
        config = self.config.vision_config
        size, one_size = image_size(config), takes_one_size(config)
        is_hierarchical = len({state.side for state in self._vision_states}) > 1
        learned_positions = "interpolate_pos_encoding" in self._vision_arguments and not is_hierarchical
        if size is None or not (one_size or (learned_positions and not interpolate_pos_encoding)):
            return
        if pixel_values.shape[2:] != size:
            way_out = "resize them" if one_size else "resize them, or give `interpolate_pos_encoding=True`"
            raise ValueError(
                f"This `{config.model_type}` encoder was made for images of {size[0]} by {size[1]} pixels, got "
                f"{pixel_values.shape[2]} by {pixel_values.shape[3]}; {way_out}."
            )

    def _vision_maps(self, outputs: ModelOutput, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The encoder's hidden states that the levels are made of, as maps `(B_i, height, width, channels)`."""
        indices = [index for index, _, _ in self._vision_levels]
        maps = image_maps(self.config.vision_config, outputs, pixel_values, self._vision_states, indices)
        norm = vision_norm(self.vision_model)
        if norm is not None:
            maps[-1] = norm(maps[-1])
        return tuple(pool(states, stride) for states, (_, stride, _) in zip(maps, self._vision_levels, strict=True))


def _require_grad(module: nn.Module, inputs: tuple, output) -> None:
    """A hook, and not a closure: a model that has it can be pickled."""
    (output[0] if isinstance(output, tuple) else output).requires_grad_(True)


# What a call does without, unseen, where it is misspelt.
_UNSEEN = (
    *("image_index", "text_index", "attention_mask", "token_type_ids", "interpolate_pos_encoding"),
    *("return_loss", "gather_negatives", "chunk_size", "output_attentions", "output_hidden_states"),
)


def _follow_config(kwargs: dict, config: HiViLTConfig) -> None:
    """
    Completes the flags of a call by the config's, so that the encoders and the fusion follow them too.

    Raises:
        ValueError: `pixel_mask` masks something, or a keyword is a misspelt argument, without which texts would be paired
            or padded otherwise. Any other that is not ours may be an encoder's, or a column of a data set.
    """
    for name in kwargs.keys() - {*_UNSEEN, "image_id"}:  # that column is not `image_index`
        meant = () if torch.compiler.is_compiling() else difflib.get_close_matches(name, _UNSEEN, n=1, cutoff=0.83)
        if meant:
            raise ValueError(f"There is no argument `{name}`; did you mean `{meant[0]}`?")
    pixel_mask = kwargs.get("pixel_mask")
    if pixel_mask is not None and not torch.compiler.is_compiling() and not torch.as_tensor(pixel_mask).all():
        raise ValueError(
            "`pixel_mask` has zeros, but padding of images is not masked here: give images of one size, as the processor "
            "makes them, without `pixel_mask`."
        )
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name) is None:
            kwargs[name] = getattr(config, name)


def _selected(states: tuple | None, wanted: bool | int | list[int] | None) -> tuple | None:
    """
    Recorded states, as far as `output_hidden_states` wants them: all, or those of the indices that it names, with `None`
    in place of the others, as transformers' models give them.
    """
    if not wanted or states is None:
        return None
    if wanted is True:
        return states
    count = len(states)
    indices = {i % count for i in ([wanted] if isinstance(wanted, int) else wanted) if -count <= i < count}
    return tuple(state if place in indices else None for place, state in enumerate(states))


def _weights(attentions: tuple | None) -> tuple | None:
    """Recorded attention weights; `None` where the implementation (sdpa, flash) computes none, which it warns of."""
    return None if attentions is None or any(weights is None for weights in attentions) else attentions


def _of_encoders(image_states: HiViLTImageStates, text_states: HiViLTTextStates, kwargs: dict) -> dict[str, tuple]:
    """What the encoders recorded, under the names that model outputs have for it, as far as the call asks for it."""
    wanted = [name for name in ("hidden_states", "attentions") if kwargs[f"output_{name}"]]
    both = {"vision": image_states, "text": text_states}
    return {f"{prefix}_{name}": states.get(name) for name in wanted for prefix, states in both.items()}


def _check_given_once(
    pixel_values, feature_maps, image_states, input_ids, inputs_embeds, token_states, text_states
) -> None:
    """Refuses images or texts that are missing or come in two forms."""
    if sum(value is not None for value in (pixel_values, feature_maps, image_states)) != 1:
        raise ValueError(
            "Give the images as either `pixel_values` or `image_states` (or `feature_maps`), exactly one of them."
        )
    if text_states is not None and any(value is not None for value in (input_ids, inputs_embeds, token_states)):
        raise ValueError("Give the texts as either `input_ids` or `text_states` (or `token_states`), not both.")


def _may_look(tensor: torch.Tensor) -> bool:
    """Whether its values can be asked for: not in a graph, nor on the meta device, where it has none."""
    return not torch.compiler.is_compiling() and tensor.device.type != "meta"


def _is_integer(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _check_index(name: str, index: torch.Tensor | None, length: int, what: str) -> torch.LongTensor | None:
    """The index; refuses one that points outside, with which a gather would fail far from the mistake."""
    if index is None:
        return None
    if not isinstance(index, torch.Tensor) or index.dim() != 1 or not _is_integer(index):
        raise ValueError(f"`{name}` must be a vector of integers, {_described(index)}.")
    if _may_look(index) and len(index) and not 0 <= int(index.min()) <= int(index.max()) < length:
        raise ValueError(
            f"`{name}` must lie in 0..{length - 1}, since there are {length} {what}; got {index.tolist()}."
        )
    return index.long()


def _check_ids(name: str, ids: torch.Tensor | None, length: int, what: str, device) -> torch.LongTensor | None:
    """Numbers by which rows are the same; refuses those that number others or that are none."""
    if ids is None:
        return None
    if not isinstance(ids, torch.Tensor) or ids.shape != (length,) or not _is_integer(ids):
        raise ValueError(f"`{name}` must hold an integer for each of the {length} {what}, {_described(ids)}.")
    return ids.to(device).long()


def _described(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"got {value.dtype} of shape {tuple(value.shape)}"
    return f"got a {type(value).__name__}"


def _logit_scale(parameter: nn.Parameter) -> torch.Tensor:
    """Inverse temperature in float32, at most 100."""
    return parameter.float().clamp(0.0, MAX_LOGIT_SCALE).exp()


def embed(projection: nn.Module, state: torch.Tensor) -> torch.Tensor:
    """L2-normalised projection, in float32 so that similarities do not depend on autocast."""
    return F.normalize(projection(state).float(), dim=-1)


class HiViLTForQuestionAnswering(HiViLTPreTrainedModel):
    """
    HiViLT with a classifier over the answers of `config.id2label`: `W F_global + b` (design note, section 3.4).

    With `config.auxiliary_loss_weight` it also learns to match unfused images and questions.
    """

    _custom_pipelines = {
        "visual-question-answering": {
            "impl": "pipeline_hivilt.HiViLTVisualQuestionAnsweringPipeline",
            "pt": ["AutoModelForVisualQuestionAnswering"],
            "type": "multimodal",
        }
    }

    def __init__(self, config: HiViLTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = HiViLTModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        if config.auxiliary_loss_weight:
            self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
            self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
            self._keep_in_fp32_modules_strict = ["logit_scale"]
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_index: torch.LongTensor | None = None,
        labels: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_states: HiViLTImageStates | None = None,
        text_states: HiViLTTextStates | None = None,
        interpolate_pos_encoding: bool = False,
        feature_maps: Sequence[torch.FloatTensor] | None = None,
        token_states: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HiViLTQuestionAnsweringOutput | tuple:
        """
        Args:
            labels (`torch.LongTensor` of shape `(B_t,)` or `torch.FloatTensor` of shape `(B_t, num_labels)`,
                *optional*): the answer of each question, or soft scores of all answers; see
                [`classification_loss`]. The first ones set `config.problem_type`, where it is `None`, to
                `"single_label_classification"` (softmax) or `"multi_label_classification"` (sigmoid).
            input_ids, attention_mask, pixel_values, image_index, token_type_ids, inputs_embeds, image_states,
                text_states, interpolate_pos_encoding, feature_maps, token_states, output_attentions, output_hidden_states, return_dict: see
                [`HiViLTModel.forward`].

        Raises:
            ValueError: inputs are missing or do not fit together, a label names no answer, or labels are not of the
                kind that `config.problem_type` says.
        """
        auxiliary = labels is not None and self.config.auxiliary_loss_weight
        if auxiliary:
            _check_given_once(
                pixel_values, feature_maps, image_states, input_ids, inputs_embeds, token_states, text_states
            )
            if image_states is None:
                image_states = self.encode_images(
                    pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, feature_maps=feature_maps, **kwargs
                )
                pixel_values = feature_maps = None
            if text_states is None:
                texts = (input_ids, attention_mask, token_type_ids, inputs_embeds, token_states)
                text_states = self.model.encode_texts(*texts, **kwargs)
                input_ids = inputs_embeds = token_states = None

        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_index=image_index,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            image_states=image_states,
            text_states=text_states,
            interpolate_pos_encoding=interpolate_pos_encoding,
            feature_maps=feature_maps,
            token_states=token_states,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(outputs.global_fusion_state)

        loss = None
        if labels is not None:
            loss = self.config.classification_loss_weight * classification_loss(logits, labels)
            self._follow_labels(labels)  # once they have passed
        if auxiliary:
            image_embeds = embed(self.visual_projection, image_states.global_state)
            text_embeds = embed(self.text_projection, text_states.global_state).to(image_embeds.device)
            device = image_embeds.device
            images = torch.arange(len(image_embeds), device=device)
            texts = torch.arange(len(text_embeds), device=device)
            if text_states.input_ids is not None:
                texts = first_equal(left_aligned(text_states.input_ids, text_states.attention_mask).to(device))
            positives = matching_pairs(images, images if image_index is None else image_index.to(device), texts)
            similarity = _logit_scale(self.logit_scale).to(device) * image_embeds @ text_embeds.t()
            auxiliary_loss = contrastive_loss(similarity, positives) - contrastive_floor(positives)
            loss = loss + (self.config.auxiliary_loss_weight * auxiliary_loss).to(loss.device)
        return HiViLTQuestionAnsweringOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            cross_attentions=outputs.cross_attentions,
            vision_cross_attentions=outputs.vision_cross_attentions,
            global_cross_attentions=outputs.global_cross_attentions,
            vision_hidden_states=outputs.vision_hidden_states,
            text_hidden_states=outputs.text_hidden_states,
            vision_attentions=outputs.vision_attentions,
            text_attentions=outputs.text_attentions,
        )

    def _follow_labels(self, labels: torch.Tensor) -> None:
        """
        Writes into the config what labels say of the scores, as transformers' heads do: softmax or sigmoid.

        Raises:
            ValueError: the config says otherwise.
        """
        soft = labels.is_floating_point()
        problem_type = "multi_label_classification" if soft else "single_label_classification"
        if self.config.problem_type is None:
            self.config.problem_type = problem_type
        elif self.config.problem_type != problem_type:
            raise ValueError(
                f"`labels` are {labels.dtype}, but `config.problem_type` is {self.config.problem_type!r}: integers of shape "
                "(texts,) are for 'single_label_classification', floats in [0, 1] of shape (texts, num_labels) for "
                f"'multi_label_classification'. Give the others, or set `model.config.problem_type = {problem_type!r}` to "
                "train the answers anew for these."
            )

    def resize_answer_head(self, answers: list[str]) -> None:
        """
        Gives the classifier a new list of answers; those it already knew keep their weights.

        Args:
            answers (`list[str]`): the new answers, in the order of their labels.

        Raises:
            ValueError: the list is empty or names an answer twice.
        """
        if not answers or len(set(answers)) != len(answers):
            raise ValueError(f"`answers` must be a list of different answers, got {len(answers)} of them.")
        known = {answer: index for index, answer in self.config.id2label.items()}
        old = self.classifier
        self.classifier = nn.Linear(self.config.hidden_size, len(answers)).to(old.weight.device, old.weight.dtype)
        self._init_weights(self.classifier)
        with torch.no_grad():
            for index, answer in enumerate(answers):
                if answer in known:
                    self.classifier.weight[index] = old.weight[known[answer]]
                    self.classifier.bias[index] = old.bias[known[answer]]
        self.config.id2label = dict(enumerate(answers))
        self.config.label2id = {answer: index for index, answer in enumerate(answers)}
        self.num_labels = len(answers)


class HiViLTEmbedding(nn.Module):
    """What embeds an encoder's pooled states: a norm, dropout and a projection."""

    def __init__(self, config: HiViLTConfig, in_features: int):
        super().__init__()
        self.norm = nn.LayerNorm(in_features, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.projection = nn.Linear(in_features, config.projection_dim)

    def forward(self, pooled_state: torch.Tensor) -> torch.Tensor:
        return self.projection(self.dropout(self.norm(pooled_state)))


class HiViLTForRetrieval(HiViLTPreTrainedModel):
    """
    HiViLT for finding images by texts and texts by images, in two steps: `image_embeds` and `text_embeds` of each
    modality alone, to search by, and [`HiViLTForRetrieval.score`], the fused similarity of a pair, to re-rank the best
    by (design note, sections 3.4 and 3.5). Both project by the same two matrices, so that fused states start from what
    the embeddings know; with `config.embed_encoder_states` embeddings have matrices of their own.
    """

    _keep_in_fp32_modules_strict = ["logit_scale", "matching_logit_scale"]

    def __init__(self, config: HiViLTConfig):
        super().__init__(config)
        self.model = HiViLTModel(config, add_global_mlp=False)
        if config.embed_encoder_states:
            self.visual_embedding = HiViLTEmbedding(config, config.vision_level_layout[-1][2])
            self.text_embedding = HiViLTEmbedding(config, text_width(config.text_config))
        else:
            self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.matching_logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Saves as every HiViLT; the answers of a question answering checkpoint that it was made from are left out."""
        config = self.config
        answers = config.id2label, config.label2id, config.problem_type
        config.id2label = config.problem_type = None
        config.num_labels = 2  # transformers' default, which is not written
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            config.id2label, config.label2id, config.problem_type = answers

    def embed_images(self, states: HiViLTImageStates) -> torch.FloatTensor:
        """`image_embeds`, `(B_i, projection_dim)`, of what [`HiViLTModel.encode_images`] gave."""
        if self.config.embed_encoder_states:
            return embed(self.visual_embedding, states.pooled_state)
        return embed(self.visual_projection, self.embedding_dropout(states.global_state))

    def embed_texts(self, states: HiViLTTextStates) -> torch.FloatTensor:
        """`text_embeds`, `(B_t, projection_dim)`, of what [`HiViLTModel.encode_texts`] gave."""
        if self.config.embed_encoder_states:
            return embed(self.text_embedding, states.pooled_state)
        return embed(self.text_projection, self.embedding_dropout(states.global_state))

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Embeds images. `pooler_output` of the result is `image_embeds`, `(B_i, projection_dim)`, L2-normalised;
        `last_hidden_state` is the vision encoder's. Arguments as in [`HiViLTModel.encode_images`].
        """
        states = self.encode_images(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=states.last_hidden_state,
            pooler_output=self.embed_images(states),
            hidden_states=states.hidden_states,
            attentions=states.attentions,
        )

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Embeds texts. `pooler_output` of the result is `text_embeds`, `(B_t, projection_dim)`, L2-normalised;
        `last_hidden_state` is the text encoder's. Arguments as in [`HiViLTModel.encode_texts`].
        """
        states = self.encode_texts(input_ids, attention_mask, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=states.last_hidden_state,
            pooler_output=self.embed_texts(states),
            hidden_states=states.hidden_states,
            attentions=states.attentions,
        )

    def score(
        self,
        image_states: HiViLTImageStates,
        text_states: HiViLTTextStates,
        image_index: torch.LongTensor | None = None,
        text_index: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.FloatTensor:
        """
        Fused similarity `s(I, T) = cos(P_v V~_g, P_t T~_g)` of pairs of encoded images and texts, float32 in [-1, 1],
        of shape `(pairs,)`. Runs fusion alone. Arguments and errors as in [`HiViLTModel.fuse`].
        """
        fused = self.model.fuse(image_states, text_states, image_index, text_index, **kwargs)
        vision = embed(self.visual_projection, fused.vision_global_state)
        text = embed(self.text_projection, fused.text_global_state).to(vision.device)
        return (vision * text).sum(dim=-1)

    def ranking_score(self, similarity: torch.Tensor, fused_similarity: torch.Tensor) -> torch.FloatTensor:
        """
        What to order a shortlist by: the mean of both similarities, weighted by their inverse temperatures, in [-1, 1].
        Hard negatives are drawn by the embeddings' softmax, so what fused matching learns is what to add to their
        logits (noise-contrastive estimation); BLIP, arXiv 2201.12086, ranks by a sum, too.

        Args:
            similarity (`torch.Tensor` of any shape): cosines of `image_embeds` and `text_embeds`.
            fused_similarity (`torch.Tensor` of the same shape): what [`HiViLTForRetrieval.score`] gives for these pairs.
        """
        weight = torch.stack([_logit_scale(self.logit_scale), _logit_scale(self.matching_logit_scale)])
        weight = (weight / weight.sum()).to(similarity.device)
        return weight[0] * similarity + weight[1] * fused_similarity

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_index: torch.LongTensor | None = None,
        image_ids: torch.LongTensor | None = None,
        text_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_states: HiViLTImageStates | None = None,
        text_states: HiViLTTextStates | None = None,
        interpolate_pos_encoding: bool = False,
        return_loss: bool | None = None,
        gather_negatives: bool | None = None,
        chunk_size: int | None = None,
        feature_maps: Sequence[torch.FloatTensor] | None = None,
        token_states: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HiViLTRetrievalOutput | tuple:
        """
        Args:
            image_ids (`torch.LongTensor` of shape `(B_i,)`, *optional*): which rows of `pixel_values` show the same
                image; the texts of one are positives of the other, never negatives. Unset, all differ.
            text_ids (`torch.LongTensor` of shape `(B_t,)`, *optional*): which texts are the same; the image of one is a
                positive of the other, never a negative. Unset, texts of the same tokens are, whatever their padding;
                those given as `inputs_embeds` all differ.
            return_loss (`bool`, *optional*): compute the losses. Unset, in training, and wherever
                `config.return_loss` says so. Which image each text belongs to is known from `image_index`, or row by
                row where there are as many images as texts. A plain `Trainer` finds an `eval_loss` where the batch
                holds `return_loss=True`, which its collator adds, as in transformers' example for CLIP.
            gather_negatives (`bool`, *optional*): compute the losses over the batches of all processes, each of which
                has to call this. Unset, in training if `config.gather_negatives`, and never in evaluation mode.
            chunk_size (`int`, *optional*): encode and match this many images, texts and pairs at a time, see
                [`in_chunks`]: the loss and gradients of the whole batch in the memory of a chunk, for one more forward
                pass. Encoders with batch norm see the statistics of a chunk. Leaves out what encoders record.
            input_ids, attention_mask, pixel_values, image_index, token_type_ids, inputs_embeds, image_states,
                text_states, interpolate_pos_encoding, feature_maps, token_states, output_attentions, output_hidden_states, return_dict: see
                [`HiViLTModel.forward`]; of attentions and hidden states those of the encoders are returned.

        Raises:
            ValueError: inputs are missing or do not fit together, or a loss is asked for and the pairs are not known.
        """
        _follow_config(kwargs, self.config)
        _check_given_once(pixel_values, feature_maps, image_states, input_ids, inputs_embeds, token_states, text_states)
        if "caption_index" in kwargs and not self.training:
            # A batch of `CaptionCollator` as it is. Trainer would keep as many texts of the last one as it has images.
            raise ValueError(
                "A batch of captions to evaluate has `caption_index`: take it out in a loop of your own, and evaluate with "
                "`hivilt.trainers.RetrievalTrainer` where a Trainer is to, which itself counts images alone."
            )
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"`chunk_size` must be at least 1 (or `None`, the whole batch at once), got {chunk_size}.")
        if image_states is None:

            def encode_images(pixel_values: torch.Tensor | None, *feature_maps: torch.Tensor) -> HiViLTImageStates:
                return self.encode_images(
                    pixel_values,
                    interpolate_pos_encoding=interpolate_pos_encoding,
                    feature_maps=feature_maps or None,
                    **kwargs,
                )

            images = (pixel_values, *(feature_maps or ()))
            if chunk_size is None:
                image_states = encode_images(*images)
            else:
                image_states = cat_states(in_chunks(encode_images, chunk_size, *images))
        if text_states is None:
            texts = (input_ids, attention_mask, token_type_ids, inputs_embeds, token_states)
            encode_texts = partial(self.model.encode_texts, **kwargs)
            if chunk_size is None:
                text_states = encode_texts(*texts)
            else:
                text_states = cat_states(in_chunks(encode_texts, chunk_size, *texts))
                text_states.input_ids = None if input_ids is None else input_ids.flatten(0, -2)  # as a collator stacked
        image_embeds = self.embed_images(image_states)
        text_embeds = self.embed_texts(text_states).to(image_embeds.device)
        logits_per_image = _logit_scale(self.logit_scale).to(image_embeds.device) * image_embeds @ text_embeds.t()

        num_images, num_texts = image_embeds.shape[0], text_embeds.shape[0]
        image_index = _check_index("image_index", image_index, num_images, "images")
        asked = self.training if return_loss is None else return_loss
        num_paired = num_images if image_index is None else image_index.shape[0]
        # Compared only where it matters, so that an exported graph takes any number of images and texts.
        if (asked or image_index is not None) and num_paired != num_texts:
            raise ValueError(
                f"{num_paired} images cannot be paired with {num_texts} texts. Give `image_index`, of shape (texts,), "
                "which says for each text the image it belongs to."
            )
        if return_loss is None and self.config.return_loss:
            # One image with many captions to choose from is no batch of pairs, and has no loss.
            asked = num_paired == num_texts
        losses = {}
        if asked:
            if gather_negatives is None:
                gather_negatives = self.training and self.config.gather_negatives
            losses = self._losses(
                image_states,
                text_states,
                image_embeds,
                text_embeds,
                image_index,
                image_ids,
                text_ids,
                gather_negatives,
                chunk_size,
                **kwargs,
            )
        return HiViLTRetrievalOutput(
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.t(),
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            **losses,
            **_of_encoders(image_states, text_states, kwargs),
        )

    def _losses(
        self,
        image_states,
        text_states,
        image_embeds,
        text_embeds,
        image_index,
        image_ids,
        text_ids,
        gather_negatives,
        chunk_size,
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        """
        `L = lambda_2 L_contrast + lambda_3 L_aux`. With `gather_negatives` over the batches of all processes: every
        process computes the whole loss from gathered rows, so that averaged gradients are those of one process with the
        whole batch.
        """
        config = self.config
        num_images, num_texts = image_embeds.shape[0], text_embeds.shape[0]
        device = text_embeds.device
        image_index = torch.arange(num_texts, device=device) if image_index is None else image_index.to(device)
        gather = gather_negatives and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        everywhere = gather_rows if gather else lambda rows: rows
        # Position of this process' rows among those of all.
        owner = torch.full((num_images,), dist.get_rank() if gather else 0, device=device)
        first_image = int((everywhere(owner) < owner[0]).sum()) if gather else 0
        text_owner = torch.full((num_texts,), dist.get_rank() if gather else 0, device=device)
        first_text = int((everywhere(text_owner) < text_owner[0]).sum()) if gather else 0

        ids = _check_ids("image_ids", image_ids, num_images, "images", device)
        ids = torch.arange(num_images, device=device) + first_image if ids is None else ids
        text_ids = _check_ids("text_ids", text_ids, num_texts, "texts", device)
        if text_ids is not None:
            tokens = text_ids[:, None]
        elif text_states.input_ids is not None:
            tokens = left_aligned(text_states.input_ids, text_states.attention_mask).to(device)
        else:
            tokens = torch.arange(num_texts, device=device)[:, None] + first_text
        positives = matching_pairs(everywhere(ids), everywhere(ids[image_index]), first_equal(everywhere(tokens)))
        logits = _logit_scale(self.logit_scale).to(device) * everywhere(image_embeds) @ everywhere(text_embeds).t()
        contrastive = contrastive_loss(logits, positives) - contrastive_floor(positives)
        loss = config.contrastive_loss_weight * contrastive
        losses = {"contrastive_loss": contrastive.detach()}

        auxiliary_weight = 1.0 if config.auxiliary_loss_weight is None else config.auxiliary_loss_weight
        if auxiliary_weight:
            # Each matching pair against the same text with hard images, and the same image with hard texts.
            own_texts = torch.arange(num_texts, device=device) + first_text
            own_images = image_index + first_image
            mine = partial(hard_negatives, sample=self.training, count=config.num_hard_negatives)
            hard_images, image_valid = mine(logits.t()[own_texts], positives.t()[own_texts])
            hard_texts, text_valid = mine(logits[own_images], positives[own_images])
            pair_images = [own_images, hard_images.flatten(), own_images.repeat_interleave(hard_texts.shape[1])]
            pair_texts = [own_texts, own_texts.repeat_interleave(hard_images.shape[1]), hard_texts.flatten()]
            score = partial(
                self.score, map_states(everywhere, image_states), map_states(everywhere, text_states), **kwargs
            )
            pairs = (torch.cat(pair_images), torch.cat(pair_texts))
            scores = score(*pairs) if chunk_size is None else torch.cat(in_chunks(score, chunk_size, *pairs))
            scores = _logit_scale(self.matching_logit_scale).to(device) * scores.to(device)
            match, with_images, with_texts = scores.split([len(rows) for rows in pair_texts])
            rows = torch.stack(
                [
                    matching_loss(match, with_images.view(hard_images.shape), image_valid),
                    matching_loss(match, with_texts.view(hard_texts.shape), text_valid),
                ],
                dim=1,
            )
            counts = torch.stack([image_valid.any(dim=1), text_valid.any(dim=1)], dim=1)
            counts = everywhere(counts.to(rows.dtype))
            auxiliary = (everywhere(rows) * counts).sum() / counts.sum().clamp(min=1)
            loss = loss + auxiliary_weight * auxiliary
            losses["auxiliary_loss"] = auxiliary.detach()
            losses["num_dropped_anchors"] = (counts == 0).sum()
        return {"loss": loss, **losses}


HiViLTModel.register_for_auto_class("AutoModel")
HiViLTForQuestionAnswering.register_for_auto_class("AutoModelForVisualQuestionAnswering")
HiViLTForRetrieval.register_for_auto_class("AutoModelForZeroShotImageClassification")

__all__ = ["HiViLTForQuestionAnswering", "HiViLTForRetrieval", "HiViLTModel", "HiViLTPreTrainedModel"]
