"""HiViLT that compares: what a text says of several images together, such as whether it is true of a pair.

    images, texts -> HiViLTModel: each image and each text encoded once
                                        |
    each text fused with each of its n images -> F_global of every pair, `(B_t, n, d)`
                                        |
    joined in the order of the images, and multiplied, `(B_t, 2 n d)` -> a hidden layer, linear -> the answers of
    `config.id2label`

Letters in shapes are those of `fusion_hivilt.py`; `n` is `config.num_images`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_hivilt import HiViLTConfig
from .fusion_hivilt import HiViLTImageStates, HiViLTTextStates
from .inputs_hivilt import batched_lists, check_lists, check_no_places, complete_flags
from .modeling_hivilt import (
    RECORDED,
    HiViLTAnsweringModel,
    HiViLTModel,
    HiViLTQuestionAnsweringOutput,
    of_encoders,
)


@dataclass
class HiViLTImagesAndTextClassificationOutput(HiViLTQuestionAnsweringOutput):
    """Output of [`HiViLTForImagesAndTextClassification`]: with `labels` the loss, and each answer's score before softmax
    (integer labels) or sigmoid (soft ones), `(B_t, num_labels)`. What fusion records has `B_t n` rows, text by text, as
    [`HiViLTModelOutput`] describes them.
    """


class HiViLTJointProjection(nn.Module):
    """What the fused states of a text with each of its images say together: a projection of all of them side by side, and the
    product of one projection of each (low-rank bilinear pooling, Kim et al. 2017, arXiv 1610.04325); then a hidden layer, added
    to what it reads. "Exactly one" and "as many" are linear in products of what each image shows, and in nothing that an image
    shows alone; which of these is asked is the hidden layer's to tell.
    """

    def __init__(self, config: HiViLTConfig):
        super().__init__()
        width = config.num_images * config.hidden_size
        self.state_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.together = nn.Linear(width, width)
        self.each = nn.ModuleList(nn.Linear(config.hidden_size, width) for _ in range(config.num_images))
        self.norm = nn.LayerNorm(2 * width, eps=config.layer_norm_eps)
        self.hidden = nn.Linear(2 * width, 2 * width)
        self.hidden_norm = nn.LayerNorm(2 * width, eps=config.layer_norm_eps)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`(B_t, n, d)` -> `(B_t, 2 n d)`."""
        states = self.state_norm(states)
        factors = [project(states[:, place]) for place, project in enumerate(self.each)]
        product = torch.stack(factors).prod(dim=0)
        joint = self.activation(self.norm(torch.cat([self.together(states.flatten(1)), product], dim=-1)))
        return self.activation(self.hidden_norm(joint + self.hidden(joint)))


class HiViLTForImagesAndTextClassification(HiViLTAnsweringModel):
    """HiViLT with a classifier over what a text says of `config.num_images` images together, in their order: "the left image
    has more dogs than the right one". Each text is fused with each of its images, and the classifier reads all `F_global`
    side by side, as that of ViLT (arXiv 2102.03334) reads the pooled states of one pass an image, and a product of them.
    Here an image is encoded once, however many texts and lists it is part of.

    ```python
    inputs = processor(images=[[a, b], [a, c]], text=["both are dogs", "one is a cat"], return_tensors="pt")
    scores = model(**inputs).logits  # (2, num_labels); a was encoded once
    processor.post_process_question_answering(scores, config=model.config)  # [[{"answer": "True", "score": 0.9}], ...]
    ```
    """

    _classifier = "joint_classifier"
    _custom_pipelines = {
        "images-and-text-classification": {
            "impl": "pipeline_hivilt.HiViLTImagesAndTextClassificationPipeline",
            "pt": ["AutoModelForSequenceClassification"],
            "type": "multimodal",
        }
    }

    def __init__(self, config: HiViLTConfig):
        super().__init__(config)
        self.model = HiViLTModel(config)
        self.joint_projection = HiViLTJointProjection(config)
        self.joint_classifier = nn.Linear(2 * config.num_images * config.hidden_size, config.num_labels)
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
    ) -> HiViLTImagesAndTextClassificationOutput | tuple:
        """
        Args:
            pixel_values: the images, each once, `(B_i, channels, height, width)`; or those of each text,
                `(B_t, n, channels, height, width)`, as the processor and collators stack them.
            image_index: the `n` images of each text in their order, integers `(B_t, n)`, or `(B_t,)` where `n` is 1. Unset,
                there must be `B_t n` images, text by text.
            labels: the answer of each text, integers `(B_t,)`, -100 for none, or soft scores of all answers, floats
                `(B_t, num_labels)`, as in [`HiViLTForQuestionAnswering`].
            others: see [`HiViLTModel.forward`].

        Raises:
            ValueError: inputs are missing or do not fit together, a text has another number of images than
                `config.num_images`, a label names no answer, or labels are not of the kind that `config.problem_type` says.
        """
        complete_flags(kwargs, self.config)
        check_no_places(kwargs, "statement_index", "reasoning.ReasoningTrainer", self.training)
        num_images = self.config.num_images
        pixel_values, image_index = batched_lists(pixel_values, image_index, num_images)
        images = (pixel_values, interpolate_pos_encoding, feature_maps)
        texts = (input_ids, attention_mask, token_type_ids, inputs_embeds, token_states)
        image_states, text_states = self.model.encode(images, texts, image_states, text_states, image_index, **kwargs)
        num_texts = text_states.global_state.shape[0]
        check_lists(image_index, image_states.global_state.shape[0], num_texts, num_images)

        text_index = torch.arange(num_texts, device=text_states.global_state.device).repeat_interleave(num_images)
        outputs = self.model.fuse(image_states, text_states, image_index, text_index, **kwargs)
        # (B_t n, d) -> (B_t, n, d)
        states = outputs.global_fusion_state.unflatten(0, (num_texts, num_images))
        logits = self.joint_classifier(self.joint_projection(states))

        return HiViLTImagesAndTextClassificationOutput(
            loss=None if labels is None else self._classification_loss(logits, labels),
            logits=logits,
            **{name: outputs.get(name) for name in RECORDED},
            **of_encoders(image_states, text_states, kwargs),
        )


# So that a saved checkpoint brings this file along.
HiViLTForImagesAndTextClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = ["HiViLTForImagesAndTextClassification"]
