"""HiViLT that finds: where in an image what a text means is, in none, one or several boxes.

    images, texts -> HiViLTModel -> fused vision rows of every stage
                                        |
    HiViLTFeaturePyramid: coarse to fine, each stage resampled to the next finer grid and added; then the global rows
                                        |
    each row of the finest grid -> whether it is of what the text means, and the box that it sees

Letters in shapes are those of `fusion_hivilt.py`; here `N_v` counts the rows of the finest grid alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .boxes_hivilt import grid_cells
from .configuration_hivilt import HiViLTConfig
from .fusion_hivilt import (
    HiViLTAttention,
    HiViLTImageStates,
    HiViLTMLP,
    HiViLTTextStates,
    resample_grid,
    selected_states,
)
from .inputs_hivilt import batched_boxes, check_no_places, complete_flags
from .losses_hivilt import grounding_loss
from .modeling_hivilt import RECORDED, HiViLTModel, HiViLTPreTrainedModel, of_encoders

# The probability that a row is of what the text means, before anything is learnt (arXiv 1708.02002, section 4.1).
_PRIOR = 0.01


@dataclass
class HiViLTGroundingOutput(ModelOutput):
    """Output of [`HiViLTForVisualGrounding`].

    Args:
        loss: with `labels`, see [`grounding_loss`].
        logits: whether each row of the finest grid, row-major, is of what the text means, before sigmoid, `(B_t, N_v)`.
        pred_boxes: the box that each row sees, `(B_t, N_v, 4)`, float32: centre x, centre y, width and height in parts of the
            image.
        others: as in [`HiViLTModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    pred_boxes: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    vision_cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    global_cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    vision_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    text_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    vision_attentions: tuple[torch.FloatTensor, ...] | None = None
    text_attentions: tuple[torch.FloatTensor, ...] | None = None


class HiViLTFeaturePyramid(nn.Module):
    """Fused vision rows of all stages on the finest grid, which by itself has met the text only once: of each stage
    normalised and projected, coarse to fine, the coarser resampled to the finer grid and added (FPN, Lin et al., arXiv
    1612.03144). Each row then attends to the words of the last stage, which know by now what the image holds, and to the
    global states of image and text, and after that to all other rows, since what a text means may depend on where another
    thing is. Both times it is joined with what it attended to, `F = x + MLP([x; x~; x * x~])`, as in equation L. Without local
    fusion, the coarsest level is all.
    """

    def __init__(self, config: HiViLTConfig):
        super().__init__()
        stages = range(config.num_fusion_stages if config.use_local_fusion else 1)
        width, eps = config.hidden_size, config.layer_norm_eps
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=eps) for _ in stages)
        self.laterals = nn.ModuleList(nn.Linear(width, width) for _ in stages)
        self.smoothing = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.global_norm, self.global_projection = nn.LayerNorm(2 * width, eps=eps), nn.Linear(2 * width, width)
        self.context_norm = nn.LayerNorm(width, eps=eps)
        self.cross_attention, self.self_attention = HiViLTAttention(config), HiViLTAttention(config)
        self.cross_mlp, self.self_mlp = (
            HiViLTMLP(config, 3 * width, config.fusion_intermediate_size) for _ in range(2)
        )
        self.row_norm, self.norm = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)

    def forward(
        self,
        stages: Sequence[torch.Tensor],
        grids: Sequence[tuple[int, int]],
        words: torch.Tensor,
        word_mask: torch.BoolTensor,
        global_states: torch.Tensor,
    ) -> torch.Tensor:
        """`(B_t, N_v, d)` from each stage's vision rows `(B_t, height * width, d)`, fine to coarse, their grids, the last
        stage's text rows `(B_t, N_t, d)`, `False` in `word_mask` `(B_t, N_t)` at padding, and `[V~_g; T~_g]`, `(B_t, 2 d)`.
        """
        layers = zip(stages, self.norms, self.laterals, strict=True)
        *finer, rows = [lateral(norm(rows)) for rows, norm, lateral in layers]
        for place in reversed(range(len(finer))):
            rows = finer[place] + resample_grid(rows, grids[place + 1], grids[place])
        # (B_t, N_v, d) -> (B_t, d, height, width) -> (B_t, N_v, d)
        rows = rows + self.smoothing(rows.transpose(1, 2).unflatten(2, grids[0])).flatten(2).transpose(1, 2)
        whole = self.global_projection(self.global_norm(global_states))[:, None]
        context = self.context_norm(torch.cat([whole, words], dim=1))
        allowed = torch.cat([word_mask.new_ones(words.shape[0], 1), word_mask], dim=1)[:, None, None]
        attended, _ = self.cross_attention(rows, context, allowed=allowed)
        rows = self.row_norm(rows + self.cross_mlp(torch.cat([rows, attended, rows * attended], dim=-1)))
        attended, _ = self.self_attention(rows, rows)
        return self.norm(rows + self.self_mlp(torch.cat([rows, attended, rows * attended], dim=-1)))


class HiViLTRowHead(nn.Module):
    """What each row of a grid says: whether it is of what the text means, and the box that it sees, which at first is its own
    cell (as in OWL-ViT, arXiv 2205.06230).
    """

    def __init__(self, config: HiViLTConfig):
        super().__init__()
        self.classifier = nn.Linear(config.hidden_size, 1)
        # Without dropout, which would shake the coordinates.
        self.box_regressor = nn.Sequential(
            nn.Linear(config.hidden_size, config.fusion_intermediate_size),
            ACT2FN[config.hidden_act],
            nn.Linear(config.fusion_intermediate_size, 4),
        )

    def forward(self, rows: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.FloatTensor]:
        """`(B_t, height * width, d)` -> scores before sigmoid `(B_t, height * width)` and boxes, float32,
        `(B_t, height * width, 4)`.
        """
        centres, sizes = grid_cells(*grid, rows.device).split(2, dim=-1)
        # Of a single row or column the logit would be infinite.
        cells = torch.logit(torch.cat([centres, sizes.clamp(max=0.9)], dim=-1))
        return self.classifier(rows).squeeze(-1), (cells + self.box_regressor(rows).float()).sigmoid()


class HiViLTForVisualGrounding(HiViLTPreTrainedModel):
    """HiViLT that gives the boxes of what a text means in an image. Each row of the finest grid says whether it is of that,
    and which box it sees, so that an expression may mean nothing, one thing or several. An image is encoded once, however
    many expressions are about it.

    ```python
    inputs = processor(images=image, text=["the dog on the left", "a red cup"], return_tensors="pt")
    found = processor.post_process_grounding(model(**inputs), target_sizes=[(image.height, image.width)] * 2)
    found[0]["boxes"]  # (left, top, right, bottom) in pixels, best first
    ```
    """

    accepts_loss_kwargs = True
    _no_split_modules = [*HiViLTPreTrainedModel._no_split_modules, "HiViLTFeaturePyramid", "HiViLTRowHead"]
    _has_answers = False
    _custom_pipelines = {
        "zero-shot-object-detection": {
            "impl": "pipeline_hivilt.HiViLTZeroShotObjectDetectionPipeline",
            "pt": ["AutoModelForZeroShotObjectDetection"],
            "type": "multimodal",
        }
    }

    def __init__(self, config: HiViLTConfig):
        super().__init__(config)
        self.model = HiViLTModel(config, add_global_mlp=False)
        self.feature_pyramid = HiViLTFeaturePyramid(config)
        self.row_head = HiViLTRowHead(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, HiViLTRowHead):
            init.constant_(module.classifier.bias, math.log(_PRIOR / (1 - _PRIOR)))
            init.zeros_(module.box_regressor[-1].weight)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_index: torch.LongTensor | None = None,
        labels: Sequence[Mapping[str, torch.Tensor]] | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_states: HiViLTImageStates | None = None,
        text_states: HiViLTTextStates | None = None,
        interpolate_pos_encoding: bool = False,
        feature_maps: Sequence[torch.FloatTensor] | None = None,
        token_states: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HiViLTGroundingOutput | tuple:
        """
        Args:
            labels: what the texts mean, for each of the `B_t` a dict with `boxes`, floats `(n, 4)`: centre x, centre y, width
                and height in parts of the image; `n` is 0 where nothing in the image is meant. Other keys are not read. The
                loss is [`grounding_loss`].
            num_items_in_batch: texts that one step of the optimizer learns from.
            others: see [`HiViLTModel.forward`].

        Raises:
            ValueError: inputs are missing or do not fit together, or `labels` hold no such boxes.
        """
        complete_flags(kwargs, self.config)
        check_no_places(kwargs, "expression_index", "grounding.GroundingTrainer", self.training)
        images = (pixel_values, interpolate_pos_encoding, feature_maps)
        texts = (input_ids, attention_mask, token_type_ids, inputs_embeds, token_states)
        image_states, text_states = self.model.encode(images, texts, image_states, text_states, image_index, **kwargs)
        outputs = self.model.fuse(image_states, text_states, image_index, **{**kwargs, "output_hidden_states": True})

        grids = [tuple(level.shape[1:3]) for level in image_states.level_states]
        stages = outputs.hidden_states or (outputs.local_fusion_state,)
        words = stages[-1][:, math.prod(grids[-1]) :]
        stages = [rows[:, : math.prod(grid)] for rows, grid in zip(stages, grids, strict=True)]
        whole = torch.cat([outputs.vision_global_state, outputs.text_global_state], dim=-1)
        logits, pred_boxes = self.row_head(
            self.feature_pyramid(stages, grids, words, text_states.attention_mask, whole), grids[0]
        )

        loss = None
        if labels is not None:
            boxes = batched_boxes(labels, len(logits))
            loss = grounding_loss(logits, pred_boxes, boxes, grids[0], num_items_in_batch)
        recorded = {name: outputs.get(name) for name in RECORDED}
        recorded["hidden_states"] = selected_states(outputs.hidden_states, kwargs["output_hidden_states"])
        return HiViLTGroundingOutput(
            loss=loss,
            logits=logits,
            pred_boxes=pred_boxes,
            **recorded,
            **of_encoders(image_states, text_states, kwargs),
        )


# So that a saved checkpoint brings this file along.
HiViLTForVisualGrounding.register_for_auto_class("AutoModelForZeroShotObjectDetection")

__all__ = ["HiViLTForVisualGrounding"]
