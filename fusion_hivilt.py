"""How images and texts fuse: plain `nn.Module`s over tensors, level by level, local then global, in both directions.

    level s of each modality    HiViLTLevel, smooth_tokens, pool    fine to coarse, of one modality alone
    stage s (equations P, L)    HiViLTFusionStage                   X = level s + F_(s-1), resampled to the grid of s
                                                                    F_s = X + MLP([X; X~; X * X~]), X~ by cross-attention
    global (equation G)         HiViLTGlobalFusion                  V_g and T_g each attend to the other and to Pool(F_S)

Letters in shapes: `B_i` images, `B_t` texts, `N_v` vision tokens of a level, `N_t` text tokens, `d` hidden size,
`S` fusion stages, `H` heads. "Equation L, P, G" are those of the design note, sections 3.2, 7.2 and 3.3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs

from .configuration_hivilt import HiViLTConfig
from .encoders_hivilt import decoder_width, text_width


@dataclass
class HiViLTStates(ModelOutput):
    """All that depends on `B` images or texts alone. Means leave out padding.

    Args:
        global_state: `V_g` or `T_g`, the mean of the coarsest level, `(B, d)`.
        pooled_state: the mean of the encoder's states that this level is of, `(B, channels)`.
        level_states: the `S` levels, fine to coarse: of images `(B_i, height, width, d)`, of texts `(B_t, N_t, d)`.
        projections: query, key and value of level 1 in the first stage, each `(B, N, d)`; `None` without local fusion.
        attention_mask: of texts, `False` at padding, `(B_t, N_t)`.
        input_ids: of texts, the tokens `(B_t, N_t)`, by which losses know equal ones; `None` for `inputs_embeds`.
        last_hidden_state: the encoder's own.
        hidden_states, attentions: the encoder's own, on request.
    """

    global_state: torch.FloatTensor | None = None
    pooled_state: torch.FloatTensor | None = None
    level_states: tuple[torch.FloatTensor, ...] | None = None
    projections: tuple[torch.FloatTensor, ...] | None = None
    attention_mask: torch.BoolTensor | None = None
    input_ids: torch.LongTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class HiViLTImageStates(HiViLTStates):
    """What [`HiViLTModel.encode_images`] gives."""


@dataclass
class HiViLTTextStates(HiViLTStates):
    """What [`HiViLTModel.encode_texts`] gives."""


@dataclass
class HiViLTModelOutput(ModelOutput):
    """Output of [`HiViLTModel`].

    Args:
        local_fusion_state: `F_local`, the last stage's vision rows (row-major over its grid), then its text rows,
            `(B_t, N_v + N_t, d)`.
        global_fusion_state: `F_global`, what a classifier reads, `(B_t, d)`.
        vision_global_state, text_global_state: the fused `V~_g` and `T~_g`, `(B_t, d)`.
        vision_last_hidden_state, text_last_hidden_state: the encoders' own, of `B_i` images and `B_t` texts.
        hidden_states: with `output_hidden_states=True`, each of the `S` stages' result, `(B_t, N_v + N_t, d)`; with a list
            of indices, `None` in place of the others.
        cross_attentions: with `output_attentions=True`, what each stage's text tokens attended to in the image,
            `(B_t, H, N_t, N_v)`.
        vision_cross_attentions: the other direction, `(B_t, H, N_v, N_t)`.
        global_cross_attentions: weights of `V_g` on `[T_g; Pool(F_local)]` and of `T_g` on `[V_g; Pool(F_local)]`, both
            `(B_t, H, 1, 2)`.
        vision_hidden_states, text_hidden_states, vision_attentions, text_attentions: the encoders' own.
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
class HiViLTMemoryOutput(ModelOutput):
    """What a decoder attends to, and nothing else: beam search repeats each of these tensors by rows.

    Args:
        last_hidden_state: `(B_t, N, decoder's width)`, see [`HiViLTMemory`].
        attention_mask: 0 at padding of the texts, 1 elsewhere, `(B_t, N)`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    attention_mask: torch.LongTensor | None = None


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
        # Softmax of equal scores would attend to everything where nothing may be attended to.
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
    """Multi-head `softmax(Q K^T / sqrt(d_k)) V` through transformers' attention interface: the attended values
    `(B, N_q, d)` and the weights `(B, H, N_q, N_k)`, `None` unless eager.

    Args:
        module: the caller; its `config` names the implementation, heads and dropout.
        query, key, value: already projected, `(B, N_q, d)` and twice `(B, N_k, d)`.
        allowed: `False` where a query may not attend, broadcastable to `(B, 1, N_q, N_k)`. A query that may attend to
            nothing gets zeros.
    """
    config = module.config
    head_dim = config.hidden_size // config.num_attention_heads
    # (B, N, d) -> (B, H, N, d_k)
    query, key, value = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (query, key, value))
    mask = attends = None
    if allowed is not None:
        attends = allowed.any(dim=-1, keepdim=True)  # (B, 1, N_q or 1, 1)
        if attends.shape[2] == 1:
            # All queries may attend to the same tokens: zero values are what they get where there are none.
            value, attends = value * attends, None
        # Made here, in the query's own precision: under autocast the minimum of float32 would overflow to -inf. Half the
        # minimum, since a score is added to it, and a row of nothing but -inf would be NaN.
        mask = torch.zeros(allowed.shape, dtype=query.dtype, device=query.device)
        mask = mask.masked_fill(~allowed, torch.finfo(query.dtype).min / 2)

    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention_forward)
    dropout = config.dropout if module.training else 0.0
    attended, attention = attend(
        module, query, key, value, mask, scaling=head_dim**-0.5, dropout=dropout, is_causal=False, **kwargs
    )
    # (B, N_q, H, d_k) -> (B, N_q, d)
    attended = attended.flatten(2)
    if attends is not None:
        attended = attended * attends.squeeze(1)
    return attended, attention


class HiViLTMLP(nn.Module):
    """Two linear layers with an activation and dropout between them: `(..., in_features)` -> `(..., d)`."""

    def __init__(self, config: HiViLTConfig, in_features: int, intermediate_features: int):
        super().__init__()
        self.fc1 = nn.Linear(in_features, intermediate_features)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.dropout)
        self.fc2 = nn.Linear(intermediate_features, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.dropout(self.activation(self.fc1(hidden_states))))


class HiViLTProjections(nn.Module):
    """Queries, keys and values of tokens `(B, N, d)`."""

    def __init__(self, config: HiViLTConfig):
        super().__init__()
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)


class HiViLTAttention(HiViLTProjections):
    """Cross-attention with an output projection: `CrossAttn` of equation G."""

    def __init__(self, config: HiViLTConfig):
        super().__init__(config)
        self.config = config
        self.is_causal = False
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, context: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.q_proj(hidden_states), self.k_proj(context), self.v_proj(context)
        attended, attention = cross_attend(self, query, key, value, **kwargs)
        return self.o_proj(attended), attention


# Levels: what one modality gives, before it meets the other


def smooth_tokens(hidden_states: torch.Tensor, attention_mask: torch.BoolTensor, window: int) -> torch.Tensor:
    """Mean of every token `(B_t, N_t, width)` with its neighbours, `(window - 1) / 2` to each side, never counting
    padding, where `attention_mask` `(B_t, N_t)` is `False`. The window is odd; 1 leaves the tokens as they are.
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
    # In float32 at least: the sum of many tokens may be too large for float16, and their mean is not.
    precise = torch.promote_types(hidden_states.dtype, torch.float32)
    total = (hidden_states * weights).sum(dim=1, dtype=precise)
    return (total / weights.sum(dim=1, dtype=precise).clamp(min=1)).to(hidden_states.dtype)


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


def select(states: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """`states[index]` along the first dimension; all of them without an index. One state alone is never copied."""
    if index is None:
        return states
    if states.shape[0] == 1 and not torch.compiler.is_compiling():
        return states.expand(index.shape[0], *states.shape[1:])
    return states.index_select(0, index.to(states.device))


def grid_positions(height: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Where the cells of a grid have their middle, `(height, width, 2)`: y and x, 0 in the image's middle and
    `-sqrt(3)` and `sqrt(3)` at its borders: on a fine grid their variance is 1. Of `like`'s dtype, on its device.
    """
    axes = [(torch.arange(size, device=like.device) + 0.5) / size * 2 - 1 for size in (height, width)]
    return (torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1) * 3**0.5).to(like.dtype)


class HiViLTLevel(nn.Module):
    """One level of one modality: projected to the common width and normalised before it meets the other. Tokens
    `on_grid`, `(B, height, width, in_features)`, learn their place on it.
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


class HiViLTFusionStage(GradientCheckpointingLayer):
    """Local fusion (equation L): each token is joined with what it attended to in the other modality and with their
    product, `F_x = x + MLP([x; x~; x * x~])`.
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
        words: torch.BoolTensor,
        regions: torch.BoolTensor | None,
        v_query: torch.Tensor,
        v_key: torch.Tensor,
        v_value: torch.Tensor,
        t_query: torch.Tensor,
        t_key: torch.Tensor,
        t_value: torch.Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            vision: vision tokens of each text's image, `(B_t, N_v, d)`.
            text: the text tokens, `(B_t, N_t, d)`.
            words, regions: the text and vision tokens that those of the other side may attend to, as in [`cross_attend`];
                without `regions` all.
            v_query, v_key, v_value, t_query, t_key, t_value: projections of `vision` and `text`, of the same shapes. One by
                one, since reentrant checkpointing sees no tensor inside a tuple.

        Returns:
            Fused vision tokens, fused text tokens, text-to-image weights `(B_t, H, N_t, N_v)`, image-to-text weights
            `(B_t, H, N_v, N_t)`; weights are `None` unless eager.
        """
        vision_attended, image_to_text = cross_attend(self, v_query, t_key, t_value, words, **kwargs)
        text_attended, text_to_image = cross_attend(self, t_query, v_key, v_value, regions, **kwargs)

        vision = vision + self.vision_mlp(torch.cat([vision, vision_attended, vision * vision_attended], dim=-1))
        text = text + self.text_mlp(torch.cat([text, text_attended, text * text_attended], dim=-1))
        return vision, text, text_to_image, image_to_text


def most_similar(
    text_query: torch.Tensor, vision_key: torch.Tensor, text_mask: torch.BoolTensor, top_k: int
) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """The vision rows that are among the `top_k` most similar ones of any text token: rows `(B_t, R)`, filled up where
    an example has fewer, and which text token chose which, `(B_t, N_t, R)`. Similarity is the attention score
    `Q_T K_V^T`, summed over the heads; padding, where `text_mask` `(B_t, N_t)` is `False`, chooses none.
    """
    similarity = torch.matmul(text_query, vision_key.transpose(1, 2))  # (B_t, N_t, N_v)
    pairs = torch.zeros_like(similarity, dtype=torch.bool)
    pairs = pairs.scatter(2, similarity.topk(top_k, dim=-1).indices, True) & text_mask[:, :, None]
    chosen = pairs.any(dim=1)  # (B_t, N_v)
    if torch.compiler.is_compiling():
        # Compiled and exported graphs need a static shape: at most top_k rows for each text token.
        num_rows = min(chosen.shape[1], top_k * pairs.shape[1])
    else:
        num_rows = max(1, int(chosen.sum(dim=1).max()))
    rows = chosen.to(similarity.dtype).topk(num_rows, dim=-1).indices
    return rows, near_rows(pairs.transpose(1, 2), rows).transpose(1, 2)


def near_rows(states: torch.Tensor, rows: torch.LongTensor) -> torch.Tensor:
    """Of `(B_t, N_v, d)` those that `rows` `(B_t, R)` names, `(B_t, R, d)`."""
    # Copies whole rows; `gather` and `scatter` go number by number.
    return states[batch_index(rows), rows]


def batch_index(rows: torch.LongTensor) -> torch.LongTensor:
    """The index of the batch that goes with `rows` `(B, R)`, `(B, 1)`."""
    return torch.arange(rows.shape[0], device=rows.device)[:, None]


class HiViLTGlobalFusion(nn.Module):
    """Global fusion (equation G): the pooled image and the pooled text each attend to the other and to the pooled local
    fusion. With `use_global_fusion=False` the pooled tokens of local fusion stand for them. Without `add_mlp` there is no
    `F_global`: retrieval compares the two sides.
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
        """`V~_g`, `T~_g`, `F_global` and the attention weights of both directions, from `V_g` and `T_g` `(B_t, d)` and
        the two parts of `F_local`, `(B_t, N_v, d)` and `(B_t, N_t, d)`; `text_mask` `(B_t, N_t)` is `False` at padding.
        """
        if self.vision_attention is None:
            vision, text, attentions = fused_vision.mean(dim=1), masked_mean(fused_text, text_mask), ()
        else:
            # Pool(F_local): vision tokens are never padding.
            vision_mask = text_mask.new_ones(fused_vision.shape[:2])
            pooled = masked_mean(torch.cat([fused_vision, fused_text], 1), torch.cat([vision_mask, text_mask], 1))
            vision_attended, vision_attention = self.vision_attention(
                vision_global.unsqueeze(1), torch.stack([text_global, pooled], dim=1), **kwargs
            )
            text_attended, text_attention = self.text_attention(
                text_global.unsqueeze(1), torch.stack([vision_global, pooled], dim=1), **kwargs
            )
            vision = vision_global + vision_attended.squeeze(1)
            text = text_global + text_attended.squeeze(1)
            attentions = (vision_attention, text_attention)
        fused = self.mlp(torch.cat([vision, text], dim=-1)) if self.mlp is not None else None
        return vision, text, fused, attentions


class HiViLTFusion(nn.Module):
    """Levels of both modalities, the local stages and global fusion: all of HiViLT but its two encoders."""

    def __init__(self, config: HiViLTConfig, add_global_mlp: bool = True):
        super().__init__()
        self.config = config
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
        return self.states_of_levels(levels, maps[-1].mean(dim=(1, 2)))

    def states_of_levels(
        self, levels: Sequence[torch.Tensor], pooled_state: torch.Tensor | None = None
    ) -> HiViLTImageStates:
        """All that fusion reads of images, from their `level_states` alone: these are enough to be kept."""
        return HiViLTImageStates(
            global_state=levels[-1].mean(dim=(1, 2)),
            pooled_state=pooled_state,
            level_states=tuple(levels),
            projections=self.vision_projections[0](levels[0].flatten(1, 2)) if self.stages else None,
        )

    def encode_texts(self, hidden_states: torch.Tensor, attention_mask: torch.BoolTensor) -> HiViLTTextStates:
        """Levels, `T_g` and first projections of token states `(B_t, N_t, text width)`."""
        levels = [
            level(smooth_tokens(hidden_states, attention_mask, window))
            for level, window in zip(self.text_levels, self.text_windows, strict=True)
        ]
        return HiViLTTextStates(
            global_state=masked_mean(levels[-1], attention_mask),
            pooled_state=masked_mean(hidden_states, attention_mask),
            level_states=tuple(levels),
            projections=self.text_projections[0](levels[0]) if self.stages else None,
            attention_mask=attention_mask,
        )

    def forward(self, step: str, *args, **kwargs) -> HiViLTStates | HiViLTModelOutput:
        """Runs `encode_images`, `states_of_levels`, `encode_texts` or `fuse`. Through here, because it is a module's call that accelerate
        and FSDP hook: there they bring the inputs to where the fusion's weights are, or the weights to the inputs.
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
        text_mask = texts.attention_mask
        states, text_to_image, image_to_text = (), (), ()
        grids = [tuple(level.shape[1:3]) for level in images.level_states]
        if not self.stages:
            vision, text = select(images.level_states[-1], image_index).flatten(1, 2), texts.level_states[-1]
        for index, stage in enumerate(self.stages):
            level = select(images.level_states[index], image_index).flatten(1, 2)
            if index == 0:
                vision, text = level, texts.level_states[0]
                # Projected once for each image and each text, when these were encoded.
                projected, of_text = [select(rows, image_index) for rows in images.projections], texts.projections
            else:
                # Equation P: each stage adds to the result of the stage before it, one residual through all of them.
                vision = level + resample_grid(vision, grids[index - 1], grids[index])
                text = texts.level_states[index] + text
                projected, of_text = None, self.text_projections[index](text)
            top_k = self.config.fusion_top_k
            if top_k is None or top_k >= vision.shape[1]:
                projections = *(projected or self.vision_projections[index](vision)), *of_text
                vision, text, *attentions = stage(vision, text, text_mask[:, None, None], None, *projections, **kwargs)
            else:
                vision, text, *attentions = self._fuse_sparsely(
                    index, vision, text, text_mask, projected, of_text, **kwargs
                )
            text_to_image += (attentions[0],)
            image_to_text += (attentions[1],)
            if kwargs.get("output_hidden_states"):
                # Computed on from what is recorded, so that it can keep its gradient.
                states += (torch.cat([vision, text], dim=1),)
                vision, text = states[-1].split([vision.shape[1], text.shape[1]], dim=1)

        vision_global, text_global, fused, global_attentions = self.global_fusion(
            select(images.global_state, image_index), texts.global_state, vision, text, text_mask, **kwargs
        )
        output_attentions = kwargs.get("output_attentions")
        return HiViLTModelOutput(
            local_fusion_state=states[-1] if states else torch.cat([vision, text], dim=1),
            global_fusion_state=fused,
            vision_global_state=vision_global,
            text_global_state=text_global,
            hidden_states=selected_states(states, kwargs.get("output_hidden_states")),
            cross_attentions=attention_weights(text_to_image) if output_attentions else None,
            vision_cross_attentions=attention_weights(image_to_text) if output_attentions else None,
            global_cross_attentions=attention_weights(global_attentions) if output_attentions else None,
        )

    def _fuse_sparsely(
        self,
        index: int,
        vision: torch.Tensor,
        text: torch.Tensor,
        text_mask: torch.BoolTensor,
        projected: Sequence[torch.Tensor] | None,
        of_text: Sequence[torch.Tensor],
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """A stage in which each text token and only the `fusion_top_k` vision tokens most similar to it attend to each other.
        Those that no text token chose pass through unchanged; of them only the key is computed. `projected` are query, key
        and value of all vision tokens, `None` where they are not computed yet; `of_text` those of the text tokens.
        """
        layers = self.vision_projections[index]
        key = layers.k_proj(vision) if projected is None else projected[1]
        rows, pairs = most_similar(of_text[0], key, text_mask, self.config.fusion_top_k)
        near, near_key = near_rows(vision, rows), near_rows(key, rows)
        if projected is None:
            query, value = layers.q_proj(near), layers.v_proj(near)
        else:
            query, value = near_rows(projected[0], rows), near_rows(projected[2], rows)
        words, regions = pairs.transpose(1, 2)[:, None], pairs[:, None]
        fused, text, text_to_image, image_to_text = self.stages[index](
            near, text, words, regions, query, near_key, value, *of_text, **kwargs
        )
        # Rows that only fill the batch up to its largest example stay as they are.
        fused = torch.where(pairs.any(dim=1)[:, :, None], fused, near)
        vision = vision.index_put((batch_index(rows), rows), fused.to(vision.dtype))
        if text_to_image is not None:
            # (B_t, H, N_t, R) -> (B_t, H, N_t, N_v), zero for the others; the other direction alike
            place = rows[:, None, None, :].expand_as(text_to_image)
            zeros = text_to_image.new_zeros(*text_to_image.shape[:3], vision.shape[1])
            image_to_text = zeros.transpose(2, 3).scatter(2, place.transpose(2, 3), image_to_text)
            text_to_image = zeros.scatter(3, place, text_to_image)
        return vision, text, text_to_image, image_to_text


class HiViLTMemory(nn.Module):
    """What a decoder attends to: the fused rows of every stage, vision then text, and last the two rows of global
    fusion, each kind normalised and projected to the decoder's width. Without local fusion, the coarsest level is all.
    """

    def __init__(self, config: HiViLTConfig):
        super().__init__()
        kinds = range((config.num_fusion_stages if config.use_local_fusion else 1) + 1)
        width = decoder_width(config.decoder_config)
        self.norms = nn.ModuleList(nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in kinds)
        self.projections = nn.ModuleList(nn.Linear(config.hidden_size, width) for _ in kinds)

    def forward(self, fused: HiViLTModelOutput, text_mask: torch.BoolTensor) -> HiViLTMemoryOutput:
        """From `fused` with its `hidden_states`, and the texts' mask `(B_t, N_t)`, `False` at padding."""
        stages = fused.hidden_states or (fused.local_fusion_state,)
        kinds = [*stages, torch.stack([fused.vision_global_state, fused.text_global_state], dim=1)]
        layers = zip(kinds, self.norms, self.projections, strict=True)
        masks = []
        for rows in stages:
            masks += [text_mask.new_ones(rows.shape[0], rows.shape[1] - text_mask.shape[1]), text_mask]
        masks.append(text_mask.new_ones(text_mask.shape[0], 2))
        return HiViLTMemoryOutput(
            last_hidden_state=torch.cat([projection(norm(rows)) for rows, norm, projection in layers], dim=1),
            attention_mask=torch.cat(masks, dim=1).long(),
        )


# States of several images or texts

_READ = ("level_states", "projections", "global_state", "pooled_state", "attention_mask")


def _read(states: HiViLTStates) -> dict[str, torch.Tensor | tuple[torch.Tensor, ...]]:
    return {name: states[name] for name in _READ if name in states}


def tensors_of(states: HiViLTStates) -> list[torch.Tensor]:
    """The tensors of states that fusion reads; those that the encoders recorded are left out."""
    return tree_leaves(_read(states))


def with_tensors(states: HiViLTStates, tensors: Sequence[torch.Tensor]) -> HiViLTStates:
    """States of the same kind from other tensors, in the order of [`tensors_of`]."""
    return type(states)(**tree_unflatten(tensors, tree_structure(_read(states))))


def map_states(function: Callable, states: HiViLTStates) -> HiViLTStates:
    """States of the same kind with `function` applied to each of [`tensors_of`]."""
    return with_tensors(states, [function(tensor) for tensor in tensors_of(states)])


def cat_states(batches: list[HiViLTStates]) -> HiViLTStates:
    """States of batches of one shape, as those of one batch; of several, the tensors that fusion reads alone."""
    if len(batches) == 1:
        return batches[0]
    return with_tensors(batches[0], [torch.cat(parts) for parts in zip(*map(tensors_of, batches), strict=True)])


# What a call records


def selected_states(states: tuple | None, wanted: bool | int | list[int] | None) -> tuple | None:
    """Recorded states, as far as `output_hidden_states` wants them: all, or those of the indices that it names, with
    `None` in place of the others, as transformers' models give them.
    """
    if not wanted or states is None or wanted is True:
        return states if wanted else None
    count = len(states)
    indices = {i % count for i in ([wanted] if isinstance(wanted, int) else wanted) if -count <= i < count}
    return tuple(state if place in indices else None for place, state in enumerate(states))


def attention_weights(attentions: tuple | None) -> tuple | None:
    """Recorded attention weights; `None` where the implementation (sdpa, flash) computes none, which it warns of."""
    return None if attentions is None or any(weights is None for weights in attentions) else attentions
