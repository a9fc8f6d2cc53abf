"""The models that HiViLT is measured beside: transformers' own, of one size, with random weights, behind one signature.

Images of 224 pixels in patches of 16, but for ViLT's usual 384 in patches of 32; `width` and `num_layers` scale all of
them alike. Everyone but CLIP reads texts with BERT's vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BridgeTowerConfig,
    BridgeTowerForImageAndTextRetrieval,
    CLIPConfig,
    CLIPModel,
    ViltConfig,
    ViltForQuestionAnswering,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
)

from hivilt import HiViLTConfig, HiViLTForQuestionAnswering
from hivilt.modeling_hivilt import HiViLTPreTrainedModel

NUM_ANSWERS = 3129  # of VQAv2, as the field counts them
NUM_TOKENS, ANSWER_TOKENS = 24, 4


def make_batch(
    side: int, images: int, questions: int, num_tokens: int = NUM_TOKENS, vocab_size: int = 20_000
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`pixel_values`, `input_ids` and `image_index` of noise, the questions dealt out evenly."""
    pixel_values = torch.randn(images, 3, side, side)
    input_ids = torch.randint(5, vocab_size, (questions, num_tokens))
    return pixel_values, input_ids, torch.arange(questions) * images // questions


@dataclass(frozen=True)
class Contestant:
    """A model in evaluation mode, and how it takes `B_t` questions about `B_i` images."""

    model: nn.Module
    # Gives scores `(B_t, classes)`, or a loss, from the model, `pixel_values` `(B_i, 3, side, side)`, `input_ids` `(B_t, N_t)`
    # and `image_index` `(B_t,)`.
    answer: Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    side: int = 224  # of its images, in pixels
    encodes_once: bool = False  # whether an image costs the same however many questions it meets; else each pair does

    def loss(self, pixel_values: torch.Tensor, input_ids: torch.Tensor, image_index: torch.Tensor) -> torch.Tensor:
        """Something to train on, of shape `()`: the same first answer for all, or each text's own image."""
        scores = self.answer(self.model, pixel_values, input_ids, image_index)
        if scores.dim() == 0:
            return scores
        is_contrastive = isinstance(self.model, (CLIPModel, VisionTextDualEncoderModel))
        return F.cross_entropy(scores, image_index if is_contrastive else torch.zeros_like(image_index))


def _hivilt(model, pixel_values, input_ids, image_index):
    return model(input_ids, torch.ones_like(input_ids), pixel_values, image_index).logits


def _score_pairs(model, pixel_values, input_ids, image_index):
    mask = torch.ones_like(input_ids)
    outputs = model(input_ids=input_ids, attention_mask=mask, pixel_values=pixel_values[image_index])
    return outputs.itm_score if isinstance(model, BlipForImageTextRetrieval) else outputs.logits


def _match_once(model, pixel_values, input_ids, image_index):
    # BLIP's forward does not offer it, its parts do: encode each image once, read every text in its sight.
    seen = model.vision_model(pixel_values=pixel_values).last_hidden_state[image_index]
    mask = torch.ones_like(input_ids)
    read = model.text_encoder(input_ids=input_ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
    return model.itm_head(read[:, 0])


def _generate_answers(model, pixel_values, input_ids, image_index):
    # Answers of four tokens in one teacher-forced pass; generating them takes BLIP a pass for each token.
    mask = torch.ones_like(input_ids)
    labels = input_ids[:, :ANSWER_TOKENS]
    return model(input_ids, pixel_values[image_index], attention_mask=mask, labels=labels).loss


def _compare(model, pixel_values, input_ids, image_index):
    mask = torch.ones_like(input_ids)
    return model(input_ids=input_ids, attention_mask=mask, pixel_values=pixel_values).logits_per_text


def _sizes(width: int, num_layers: int) -> dict[str, int]:
    sizes = {"hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width}
    return {**sizes, "num_hidden_layers": num_layers}


def make_hivilt(
    width: int = 768,
    num_layers: int = 12,
    side: int = 224,
    head: type = HiViLTForQuestionAnswering,
    patch_size: int = 16,
    **fusion,
) -> HiViLTPreTrainedModel:
    """HiViLT at `HiViLTConfig()`'s size, or another, in evaluation mode."""
    sizes, fields = _sizes(width, num_layers), {"hidden_size": width, "num_labels": NUM_ANSWERS, **fusion}
    encoders = ViTConfig(**sizes, image_size=side, patch_size=patch_size), BertConfig(**sizes)
    config = HiViLTConfig.from_vision_text_configs(*encoders, **fields)
    return head(config).eval()


def _vilt(sizes: dict, side: int, patch_size: int) -> Contestant:
    config = ViltConfig(**sizes, image_size=side, patch_size=patch_size, num_labels=NUM_ANSWERS)
    return Contestant(ViltForQuestionAnswering(config).eval(), _score_pairs, side)


def _blip(model_class: type[nn.Module], sizes: dict, answer: Callable, **options) -> Contestant:
    text = {**sizes, "encoder_hidden_size": sizes["hidden_size"]}
    config = BlipConfig(text_config=text, vision_config={**sizes, "image_size": 224})
    return Contestant(model_class(config).eval(), answer, **options)


def _bridgetower(sizes: dict) -> Contestant:
    towers = {key: sizes[key] for key in ("hidden_size", "num_hidden_layers")}
    text = {**sizes, "vocab_size": BertConfig().vocab_size}
    config = BridgeTowerConfig(
        hidden_size=sizes["hidden_size"],
        num_attention_heads=sizes["num_attention_heads"],
        # Its usual six layers of fusion on twelve of each encoder.
        num_hidden_layers=(sizes["num_hidden_layers"] + 1) // 2,
        vision_config={**towers, "image_size": 224},
        text_config=text,
    )
    return Contestant(BridgeTowerForImageAndTextRetrieval(config).eval(), _score_pairs)


def _clip(sizes: dict) -> Contestant:
    # Its text encoder is narrower, as published.
    text = _sizes(2 * sizes["hidden_size"] // 3, sizes["num_hidden_layers"])
    config = CLIPConfig(vision_config={**sizes, "image_size": 224, "patch_size": 16}, text_config=text)
    return Contestant(CLIPModel(config).eval(), _compare, encodes_once=True)


def _dual_encoder(sizes: dict) -> Contestant:
    configs = ViTConfig(**sizes, image_size=224), BertConfig(**sizes)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(*configs)
    return Contestant(VisionTextDualEncoderModel(config).eval(), _compare, encodes_once=True)


# Name -> what makes it of `width` and `num_layers`. ViLT, BLIP and BridgeTower answer or match pairs; the last two only
# compare an image with a text and fuse nothing.
CONTESTANTS: dict[str, Callable[[int, int], Contestant]] = {
    "HiViLT": lambda *size: Contestant(make_hivilt(*size), _hivilt, encodes_once=True),
    "ViLT, 384": lambda *size: _vilt(_sizes(*size), 384, 32),
    "ViLT, 224/16": lambda *size: _vilt(_sizes(*size), 224, 16),
    "BLIP, matching": lambda *size: _blip(BlipForImageTextRetrieval, _sizes(*size), _score_pairs),
    "BLIP, matching, images once by hand": lambda *size: _blip(
        BlipForImageTextRetrieval, _sizes(*size), _match_once, encodes_once=True
    ),
    "BLIP, answering": lambda *size: _blip(BlipForQuestionAnswering, _sizes(*size), _generate_answers),
    "BridgeTower": lambda *size: _bridgetower(_sizes(*size)),
    "CLIP": lambda *size: _clip(_sizes(*size)),
    "VisionTextDualEncoder": lambda *size: _dual_encoder(_sizes(*size)),
}
