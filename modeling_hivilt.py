"""HiViLT: a hierarchical vision-language transformer.

Two borrowed encoders never see the other modality, so an image is encoded once however many questions it meets, and a
text once however many images. What they give is cut into levels, fine to coarse, and fused level by level:

    pixel_values -> vision_model -> level 1 ... level S (grids, fine to coarse)  \\
                                                                                   encode_images / encode_texts
    input_ids    -> text_model   -> level 1 ... level S (words, phrases, clauses) /
                        |
    stage s:   X = level s + F_(s-1), on the grid of s;  F_s = X + MLP([X; X~; X * X~])     local, both directions
                        |
    V_g, T_g, Pool(F_S) -> global cross-attention, both directions -> F_global         global
                        |
    answers: W F_global + b            retrieval: cos(P_v V~_g, P_t T~_g)
    captions: generation_hivilt.py     boxes: grounding_hivilt.py     several images: reasoning_hivilt.py

Letters in shapes and "Equation L, P, G" are those of `fusion_hivilt.py`.
"""

import inspect
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_hivilt import AUTO_MAP, HiViLTConfig
from .encoders_hivilt import (
    build_encoder,
    fetch_tokens,
    first_layers,
    image_inputs,
    image_maps,
    is_hierarchical,
    layers_of,
    look_anew,
    move_tokens,
    places_without_gaps,
    text_width,
    vision_states,
    word_embeddings,
)
from .fusion_hivilt import (
    HiViLTFusion,
    HiViLTImageStates,
    HiViLTModelOutput,
    HiViLTTextStates,
    attention_weights,
    cat_states,
    map_states,
    pool,
    select,
    selected_states,
)
from .inputs_hivilt import (
    batched_images,
    batched_texts,
    check_feature_maps,
    check_given_once,
    check_ids,
    check_index,
    check_labels,
    check_no_places,
    check_pairs,
    check_texts,
    check_token_states,
    complete_flags,
    text_mask,
    warn_of_joined,
)
from .losses_hivilt import (
    PairBatch,
    classification_loss,
    contrastive_floor,
    contrastive_loss,
    in_chunks,
    inverse_temperature,
    retrieval_losses,
    similarity,
)
from .upstream_hivilt import RecordingMixin, UpstreamMixin

if TYPE_CHECKING:
    # Never run: saving and loading copy the files that this one is seen to import, and these belong to the weights.
    from .generation_hivilt import HiViLTForConditionalGeneration  # noqa: F401
    from .grounding_hivilt import HiViLTForVisualGrounding  # noqa: F401
    from .pipeline_hivilt import HiViLTVisualQuestionAnsweringPipeline  # noqa: F401
    from .processing_hivilt import HiViLTProcessor  # noqa: F401
    from .reasoning_hivilt import HiViLTForImagesAndTextClassification  # noqa: F401

# A CPU fuses as many pairs at a time as have finest levels of this many bytes: larger pieces leave its caches, and their
# memory is asked of the system anew each time.
_BYTES_AT_ONCE = 2**23
# What fusion records on request, under the names that outputs of heads have for it.
RECORDED = ("hidden_states", "cross_attentions", "vision_cross_attentions", "global_cross_attentions")


@dataclass
class HiViLTQuestionAnsweringOutput(ModelOutput):
    """Output of [`HiViLTForQuestionAnswering`]: with `labels` the weighted sum of the losses, and each answer's score
    before softmax (integer labels) or sigmoid (soft ones), `(B_t, num_labels)`. The others as in [`HiViLTModelOutput`].
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
    """Output of [`HiViLTForRetrieval`].

    Args:
        loss: in training and with `return_loss=True`, the weighted sum of the losses, 0 at best.
        logits_per_image, logits_per_text: `exp(logit_scale)` times the cosine of the embeddings, `(B_i, B_t)`, `(B_t, B_i)`.
        image_embeds, text_embeds: of each modality alone, L2-normalised, `(B_i, projection_dim)`, `(B_t, projection_dim)`.
        contrastive_loss, auxiliary_loss: the terms of `loss` before weighting; the former less [`contrastive_floor`].
        num_dropped_anchors: how many took no part in fused matching, since every candidate of the batch matched them.
        vision_hidden_states, text_hidden_states, vision_attentions, text_attentions: the encoders' own.
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


class HiViLTPreTrainedModel(UpstreamMixin, PreTrainedModel):
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
    # Whether a head answers by `config.id2label`; others leave out of what they save the answers of a checkpoint that they
    # were made from.
    _has_answers = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and self.config.initializer_range is None:
            init.normal_(module.weight, std=module.in_features**-0.5)
        for name in ("logit_scale", "matching_logit_scale"):
            if name in module._parameters:
                init.constant_(getattr(module, name), self.config.logit_scale_init_value)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """As [`PreTrainedModel.save_pretrained`], with all the code that opens the model."""
        if self._has_answers:
            super().save_pretrained(save_directory, **kwargs)
            return
        config = self.config
        answers = config.id2label, config.label2id, config.problem_type
        config.id2label = config.problem_type = None
        config.num_labels = 2  # transformers' default, which is not written
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            config.id2label, config.label2id, config.problem_type = answers

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights, and not of the temperatures, which come first and stay in float32."""
        return next(parameter.dtype for parameter in self.base_model.parameters() if parameter.is_floating_point())

    def get_input_embeddings(self) -> nn.Module:
        """The text encoder's word embeddings, the module that runs."""
        return word_embeddings(self.base_model.text_model)

    def set_input_embeddings(self, value: nn.Module):
        self.base_model.text_model.set_input_embeddings(value)

    def borrowed_models(self) -> dict[str, PreTrainedModel]:
        """The models that come from elsewhere, by the names of their configs."""
        return {"vision_config": self.base_model.vision_model, "text_config": self.base_model.text_model}

    def get_feature_maps(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, ...]:
        """What fusion reads of the vision encoder, and what [`HiViLTModel.encode_images`] takes as `feature_maps`: for
        each level, fine to coarse, a hidden state averaged over squares of the level's stride,
        `(B_i, height, width, channels)`. A frozen encoder gives the same in every epoch: keep it, and train at the cost
        of fusion alone. Arguments and errors as there.
        """
        return self.base_model._run_vision_encoder(pixel_values, interpolate_pos_encoding, **kwargs)[0]

    def get_token_states(
        self, input_ids=None, attention_mask=None, token_type_ids=None, inputs_embeds=None, **kwargs
    ) -> torch.Tensor:
        """What fusion reads of the text encoder, and what [`HiViLTModel.encode_texts`] takes as `token_states`: its
        last hidden state `(B_t, N_t, text width)`. Arguments and errors as there.
        """
        texts = (input_ids, attention_mask, token_type_ids, inputs_embeds)
        return self.base_model._run_text_encoder(*texts, **kwargs)[0]

    # These two name their arguments, since torch.export reads them from the signature.
    def encode_images(
        self, pixel_values=None, interpolate_pos_encoding=False, feature_maps=None, **kwargs
    ) -> HiViLTImageStates:
        """See [`HiViLTModel.encode_images`]."""
        kwargs |= {"interpolate_pos_encoding": interpolate_pos_encoding, "feature_maps": feature_maps}
        return self.base_model.encode_images(pixel_values, **kwargs)

    def encode_texts(self, input_ids=None, attention_mask=None, **kwargs) -> HiViLTTextStates:
        """See [`HiViLTModel.encode_texts`]."""
        return self.base_model.encode_texts(input_ids, attention_mask, **kwargs)

    def freeze(self, part: str, num_layers: int | None = None) -> None:
        """Stops the training of a part: its parameters get no gradient, an encoder runs without recording one, and the part
        stays in evaluation mode (no dropout) until the model is made anew.

        Args:
            part: `"vision"` or `"text"` (the encoders) or `"fusion"`.
            num_layers: of an encoder, only its embeddings and this many first layers in the order of computation, see
                [`layers_of`]. What lies between two stages freezes with the blocks before it. The batch norms of the other
                layers train, but by the statistics that they have: those of a batch differ.

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
            raise ValueError(f"`num_layers` must lie in 0..{len(layers)}, layers of an encoder, got {num_layers}.")
        parameters, through = first_layers(module, num_layers)
        for parameter in parameters:
            parameter.requires_grad_(False)
        kept = [name for name, one in module.named_modules() if isinstance(one, nn.modules.batchnorm._NormBase)]
        self.base_model.frozen_modules += [f"{parts[part]}.{name}" for name in dict.fromkeys([*through, *kept])]
        self.base_model.train(self.base_model.training)

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: str | os.PathLike | PreTrainedConfig, text: str | os.PathLike | PreTrainedConfig, **fusion
    ) -> "HiViLTPreTrainedModel":
        """A model whose encoders come from two pretrained checkpoints, and whose fusion is new. It is self-contained:
        once saved, it never asks for those checkpoints again.

        Args:
            vision, text: name or folder of an encoder, or of a CLIP-like model that has one; or a config, for a new encoder.
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
        return model.float().eval()  # an encoder's config may name the precision it was saved in


class HiViLTModel(RecordingMixin, HiViLTPreTrainedModel):
    """The two encoders and their hierarchical fusion, without a head (design note, sections 2-4). `add_global_mlp` says
    whether to compute `global_fusion_state`.
    """

    _recorded_models = ("vision_model", "text_model")

    def __init__(self, config: HiViLTConfig, add_global_mlp: bool = True):
        super().__init__(config)
        look_anew()
        self.vision_model = build_encoder(config.vision_config)
        self.text_model = build_encoder(config.text_config)
        self.fusion = HiViLTFusion(config, add_global_mlp=add_global_mlp)
        self.frozen_modules = []
        # Read once, since a compiled or exported call must not.
        self._vision_states = vision_states(config.vision_config)
        # (index of the encoder's hidden state, stride, channels) of each level
        self._vision_levels = config.vision_level_layout[-len(self.fusion.vision_levels) :]
        self._vision_arguments = set(inspect.signature(self.vision_model.forward).parameters)
        # Isotropic encoders with learned positions take another size than their own where these are interpolated.
        takes_flag = "interpolate_pos_encoding" in self._vision_arguments
        self._interpolates = takes_flag and not is_hierarchical(self._vision_states)
        self._text_arguments = set(inspect.signature(self.text_model.forward).parameters)
        self.install_capturing_hooks()
        self.post_init()

    def train(self, mode: bool = True) -> "HiViLTModel":
        super().train(mode)
        for name in self.frozen_modules:
            self.get_submodule(name).eval()
        return self

    def encode_images(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        feature_maps: Sequence[torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HiViLTImageStates:
        """All that depends on images alone, to be used for any number of texts.

        Args:
            pixel_values: images as the processor gives them, `(B_i, channels, height, width)`.
            interpolate_pos_encoding: let an encoder with learned positions take images of another size than it was made
                for. Encoders without them take any size.
            feature_maps: what [`HiViLTModel.get_feature_maps`] gave, in place of `pixel_values`, of any float dtype: the
                vision encoder does not run, and `last_hidden_state` and what else it records are `None`.

        Raises:
            ValueError: images are not floats or not of the encoder's size; maps are not those of this model's levels, or
                come without a gradient in training although the encoder is not frozen; or neither or both are given.
        """
        if (pixel_values is None) == (feature_maps is None):
            raise ValueError("Give the images as either `pixel_values` or `feature_maps`, exactly one of them.")
        complete_flags(kwargs, self.config)
        if feature_maps is not None:
            check_feature_maps(feature_maps, [channels for _, _, channels in self._vision_levels])
            self._check_not_trained("vision", "feature_maps", "pixel_values", feature_maps)
            return self.fusion("encode_images", [states.to(self.dtype) for states in feature_maps])
        maps, outputs = self._run_vision_encoder(pixel_values, interpolate_pos_encoding, **kwargs)
        states = self.fusion("encode_images", maps)
        states.last_hidden_state = outputs.last_hidden_state
        states.hidden_states = selected_states(outputs.hidden_states, kwargs["output_hidden_states"])
        states.attentions = attention_weights(outputs.get("attentions") or None)
        return states

    def _run_vision_encoder(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool, **kwargs
    ) -> tuple[tuple[torch.Tensor, ...], ModelOutput]:
        """The maps of `get_feature_maps`, and all that the encoder gave."""
        complete_flags(kwargs, self.config)
        any_size = interpolate_pos_encoding or not self._interpolates
        pixel_values = batched_images(pixel_values, self.config, any_size)
        if interpolate_pos_encoding and "interpolate_pos_encoding" in self._vision_arguments:
            kwargs["interpolate_pos_encoding"] = True
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._trains("vision_model")):
            # Convolutions take channels last as they compute, and ViTs do not mind.
            pixel_values = pixel_values.to(self.vision_model.dtype, memory_format=torch.channels_last)
            inputs = image_inputs(self.config.vision_config, pixel_values)
            flags = self._taken(self._vision_arguments, {**kwargs, "output_hidden_states": True})
            outputs = self.vision_model(**inputs, **flags)
            indices, strides, _ = zip(*self._vision_levels, strict=True)
            maps = image_maps(self.vision_model, outputs, pixel_values, self._vision_states, indices)
            return tuple(map(pool, maps, strides)), outputs

    def encode_texts(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        token_states: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HiViLTTextStates:
        """All that depends on texts alone, to be used for any number of images.

        Args:
            input_ids: tokens, `(B_t, N_t)`.
            attention_mask: 0 at padding, `(B_t, N_t)`; unset, nothing is padding.
            token_type_ids: `(B_t, N_t)`, used where the encoder has types.
            inputs_embeds: in place of `input_ids`, `(B_t, N_t, text width)`.
            token_states: what [`HiViLTModel.get_token_states`] gave, of any float dtype: the text encoder does not run.
                `input_ids` may be given beside them, by which losses know equal texts.

        Raises:
            ValueError: texts longer than the encoder takes, a mask of another shape, `token_states` without a gradient in
                training although the encoder is not frozen, or neither or both kinds of input.
        """
        complete_flags(kwargs, self.config)
        if token_states is not None:
            check_token_states(token_states, input_ids, inputs_embeds, self.config)
            self._check_not_trained("text", "token_states", "input_ids", [token_states])
            attention_mask = text_mask(attention_mask, token_states, input_ids, self.config)
            read, outputs, places = token_states.to(self.dtype), {}, None
        else:
            token_states, attention_mask, outputs, places = self._run_text_encoder(
                input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs
            )
            read = token_states
        states = self.fusion("encode_texts", read, attention_mask.bool())
        (states.input_ids,) = batched_texts(input_ids)
        states.last_hidden_state = token_states
        hidden_states = tuple(fetch_tokens(state, places) for state in outputs.get("hidden_states") or ())
        states.hidden_states = selected_states(hidden_states or None, kwargs["output_hidden_states"])
        attentions = attention_weights(outputs.get("attentions") or None)
        if attentions is not None:
            attentions = tuple(fetch_tokens(fetch_tokens(weights, places, 2), places, 3) for weights in attentions)
        states.attentions = attentions
        return states

    def _run_text_encoder(
        self, input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor, ModelOutput, torch.LongTensor | None]:
        """The states of `get_token_states`, the texts' mask, all that the encoder gave, and where it has each token."""
        complete_flags(kwargs, self.config)
        input_ids, attention_mask, token_type_ids = batched_texts(input_ids, attention_mask, token_type_ids)
        check_texts(input_ids, inputs_embeds, self.config)
        if inputs_embeds is not None and "inputs_embeds" not in self._text_arguments:
            raise ValueError(f"{type(self.text_model).__name__} takes no `inputs_embeds`; give `input_ids`.")
        tokens = input_ids if input_ids is not None else inputs_embeds
        attention_mask = text_mask(attention_mask, tokens, input_ids, self.config)

        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        if "token_type_ids" in self._text_arguments:
            inputs["token_type_ids"] = token_type_ids
        if "position_ids" in kwargs:
            inputs["position_ids"] = kwargs.pop("position_ids").expand(tokens.shape[:2])
        if "use_cache" in self._text_arguments:
            kwargs["use_cache"] = False
        places = places_without_gaps(attention_mask)
        inputs = {name: move_tokens(value, places) for name, value in inputs.items() if value is not None}
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._trains("text_model")):
            flags = {**kwargs, "output_hidden_states": bool(kwargs["output_hidden_states"])}
            outputs = self.text_model(**inputs, **self._taken(self._text_arguments, flags))
            last_hidden_state = fetch_tokens(outputs.last_hidden_state, places)
        return last_hidden_state, attention_mask, outputs, places

    @staticmethod
    def _taken(arguments: set[str], kwargs: dict) -> dict:
        """Of a call's keyword arguments those that an encoder takes."""
        kwargs = {**kwargs, "return_dict": True}
        return kwargs if "kwargs" in arguments else {name: v for name, v in kwargs.items() if name in arguments}

    def _trains(self, name: str) -> bool:
        # An adapter inside a frozen encoder trains, so ask the parameters, but only where something was frozen.
        return name not in self.frozen_modules or any(p.requires_grad for p in getattr(self, name).parameters())

    def _check_not_trained(self, part: str, name: str, inputs: str, states: Sequence[torch.Tensor]) -> None:
        """Refuses states without a gradient in place of an encoder that trains: it would stay as it is without a word."""
        if not (self.training and torch.is_grad_enabled()) or any(one.requires_grad for one in states):
            return
        if any(p.requires_grad for p in getattr(self, f"{part}_model").parameters()):
            raise ValueError(
                f"`{name}` carry no gradient, but the {part} encoder trains and would learn nothing: freeze it, "
                f'`model.freeze("{part}")`, or give `{inputs}` in their place.'
            )

    def encode(
        self,
        images: tuple,
        texts: tuple,
        image_states: HiViLTImageStates | None = None,
        text_states: HiViLTTextStates | None = None,
        image_index: torch.Tensor | None = None,
        chunk_size: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[HiViLTImageStates, HiViLTTextStates]:
        """The states of a call's images and texts, whichever way these were given: what every head begins with.
        `images` and `texts` are the arguments of `encode_images` and of `encode_texts`, in their order; the others are
        those of [`HiViLTModel.forward`]. With `chunk_size` so many rows are encoded at a time, see [`in_chunks`].
        """
        (pixel_values, _, feature_maps), (input_ids, _, _, inputs_embeds, token_states) = images, texts
        check_given_once(pixel_values, feature_maps, image_states, input_ids, inputs_embeds, token_states, text_states)
        if image_states is None:
            image_states = cat_states(in_chunks(partial(self.encode_images, **kwargs), chunk_size, *images))
        if text_states is None:
            text_states = cat_states(in_chunks(partial(self.encode_texts, **kwargs), chunk_size, *texts))
            (text_states.input_ids,) = batched_texts(input_ids)
        if pixel_values is not None:
            num_images = image_states.global_state.shape[0]
            warn_of_joined(check_index("image_index", image_index, num_images, "images"), num_images)
        return image_states, text_states

    def fuse(
        self,
        image_states: HiViLTImageStates,
        text_states: HiViLTTextStates,
        image_index: torch.Tensor | None = None,
        text_index: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HiViLTModelOutput:
        """Fuses pairs of encoded images and texts: what `encode_images` and `encode_texts` returned. `image_index` and
        `text_index`, both `(pairs,)`, say which image and text a pair is of; unset, row by row.

        Raises:
            ValueError: an index out of range, or images and texts that do not pair up.
        """
        complete_flags(kwargs, self.config)
        images, texts = image_states.global_state, text_states.global_state
        image_index = check_index("image_index", image_index, images.shape[0], "images")
        text_index = check_index("text_index", text_index, texts.shape[0], "texts")
        num_pairs = (images if image_index is None else image_index).shape[0]
        check_pairs(num_pairs, (texts if text_index is None else text_index).shape[0])

        def fuse_rows(rows: slice) -> HiViLTModelOutput:
            texts = text_index[rows] if text_index is not None else None
            texts = map_states(lambda x: x[rows] if texts is None else select(x, texts), text_states)
            if image_index is None:
                return self.fusion("fuse", map_states(lambda x: x[rows], image_states), texts, **kwargs)
            return self.fusion("fuse", image_states, texts, image_index[rows], **kwargs)

        finest, at_once = image_states.level_states[0], num_pairs
        is_plain = not (kwargs["output_hidden_states"] or kwargs["output_attentions"] or torch.compiler.is_compiling())
        if is_plain and finest.device.type == "cpu":
            at_once = max(1, _BYTES_AT_ONCE // finest[:1].nbytes)
        if num_pairs <= at_once:
            return fuse_rows(slice(None))
        parts = [fuse_rows(slice(start, start + at_once)) for start in range(0, num_pairs, at_once)]
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
            input_ids, attention_mask, token_type_ids, inputs_embeds, token_states: the texts, see
                [`HiViLTModel.encode_texts`].
            pixel_values, interpolate_pos_encoding, feature_maps: the images, each once, see [`HiViLTModel.encode_images`].
            image_index: the image that each text belongs to, integers `(B_t,)`; unset, there must be as many images as texts.
            image_states: of `encode_images`, in place of the images.
            text_states: of `encode_texts`, in place of the texts.
            output_attentions, output_hidden_states, return_dict: as in every transformers model. Attention weights need
                `attn_implementation="eager"`, else transformers warns once and they are `None`. `output_hidden_states`
                may also name the indices to keep, of the encoders' states and of the stages'.

        Raises:
            ValueError: inputs are missing, given twice, or do not fit together.
        """
        complete_flags(kwargs, self.config)
        images = (pixel_values, interpolate_pos_encoding, feature_maps)
        texts = (input_ids, attention_mask, token_type_ids, inputs_embeds, token_states)
        image_states, text_states = self.encode(images, texts, image_states, text_states, image_index, **kwargs)
        outputs = self.fuse(image_states, text_states, image_index, **kwargs)
        return HiViLTModelOutput(
            **outputs,
            vision_last_hidden_state=image_states.last_hidden_state,
            text_last_hidden_state=text_states.last_hidden_state,
            **of_encoders(image_states, text_states, kwargs),
        )


def of_encoders(image_states: HiViLTImageStates, text_states: HiViLTTextStates, kwargs: dict) -> dict[str, tuple]:
    """What the encoders recorded, under the names that model outputs have for it, as far as the call asks for it."""
    wanted = [name for name in ("hidden_states", "attentions") if kwargs[f"output_{name}"]]
    both = {"vision": image_states, "text": text_states}
    return {f"{prefix}_{name}": states.get(name) for name in wanted for prefix, states in both.items()}


def embed(projection: nn.Module, state: torch.Tensor) -> torch.Tensor:
    """L2-normalised projection, in float32, as [`similarity`] is computed."""
    return F.normalize(projection(state).float(), dim=-1)


class HiViLTAnsweringModel(HiViLTPreTrainedModel):
    """What heads share that choose among the answers of `config.id2label`."""

    _classifier = "classifier"  # the name of the linear layer whose rows are the answers

    def __init__(self, config: HiViLTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels

    @property
    def answer_head(self) -> nn.Linear:
        """The linear layer whose rows are the answers, of `config.id2label`."""
        return getattr(self, self._classifier)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args, **kwargs):
        """As [`PreTrainedModel.from_pretrained`]; of another head's checkpoint `problem_type`, which says how that one learnt its
        answers, is left out.
        """
        opened = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        config = (opened[0] if isinstance(opened, tuple) else opened).config
        others = {path.split(".")[1] for path in AUTO_MAP.values()} - {kind.__name__ for kind in cls.__mro__}
        if "problem_type" not in kwargs and others & set(config.architectures or ()):
            config.problem_type = None
        return opened

    def _classification_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.FloatTensor:
        """`L_cls` of checked labels, weighted; the first ones say what the config says of all."""
        check_labels(labels, *logits.shape)
        self._follow_labels(labels)
        return self.config.classification_loss_weight * classification_loss(logits, labels)

    def _follow_labels(self, labels: torch.Tensor) -> None:
        """Writes into the config what labels say of the scores, softmax or sigmoid; refuses them if it says otherwise."""
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
        """Gives the classifier new answers, in the order of their labels; those it already knew keep their weights.

        Raises:
            ValueError: the list is empty or names an answer twice.
        """
        if not answers or len(set(answers)) != len(answers):
            raise ValueError(f"`answers` must be a list of different answers, got {len(answers)} of them.")
        known = {answer: index for index, answer in self.config.id2label.items()}
        old = self.answer_head
        new = nn.Linear(old.in_features, len(answers)).to(old.weight.device, old.weight.dtype)
        self._init_weights(new)
        with torch.no_grad():
            for index, answer in enumerate(answers):
                if answer in known:
                    new.weight[index] = old.weight[known[answer]]
                    new.bias[index] = old.bias[known[answer]]
        setattr(self, self._classifier, new)
        self.config.id2label = dict(enumerate(answers))
        self.config.label2id = {answer: index for index, answer in enumerate(answers)}
        self.num_labels = len(answers)


class HiViLTForQuestionAnswering(HiViLTAnsweringModel):
    """HiViLT with a classifier over the answers of `config.id2label`: `W F_global + b` (design note, section 3.4). With
    `config.auxiliary_loss_weight` it also learns to match unfused images and questions.
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
            labels: the answer of each question, integers `(B_t,)`, or soft scores of all answers, floats
                `(B_t, num_labels)`; see [`classification_loss`]. The first ones set `config.problem_type`, where it is
                `None`, to `"single_label_classification"` (softmax) or `"multi_label_classification"` (sigmoid).
            others: see [`HiViLTModel.forward`].

        Raises:
            ValueError: inputs are missing or do not fit together, a label names no answer, or labels are not of the
                kind that `config.problem_type` says.
        """
        complete_flags(kwargs, self.config)
        images = (pixel_values, interpolate_pos_encoding, feature_maps)
        texts = (input_ids, attention_mask, token_type_ids, inputs_embeds, token_states)
        image_states, text_states = self.model.encode(images, texts, image_states, text_states, image_index, **kwargs)
        outputs = self.model.fuse(image_states, text_states, image_index, **kwargs)
        logits = self.classifier(outputs.global_fusion_state)

        loss = None
        if labels is not None:
            loss = self._classification_loss(logits, labels)
            if self.config.auxiliary_loss_weight:
                auxiliary_loss = self._auxiliary_loss(image_states, text_states, image_index)
                loss = loss + (self.config.auxiliary_loss_weight * auxiliary_loss).to(loss.device)
        return HiViLTQuestionAnsweringOutput(
            loss=loss,
            logits=logits,
            **{name: outputs.get(name) for name in RECORDED},
            **of_encoders(image_states, text_states, kwargs),
        )

    def _auxiliary_loss(self, image_states, text_states, image_index: torch.Tensor | None) -> torch.Tensor:
        """Contrast of images and questions before they are fused."""
        image_embeds = embed(self.visual_projection, image_states.global_state)
        text_embeds = embed(self.text_projection, text_states.global_state).to(image_embeds.device)
        positives = PairBatch(image_embeds, text_embeds, image_index, text_states=text_states).positives()
        scores = similarity(inverse_temperature(self.logit_scale).to(image_embeds.device), image_embeds, text_embeds)
        return contrastive_loss(scores, positives) - contrastive_floor(positives)


def encoder_embedding(config: HiViLTConfig, in_features: int) -> nn.Sequential:
    """What embeds an encoder's pooled states `(B, in_features)`."""
    norm, dropout = nn.LayerNorm(in_features, eps=config.layer_norm_eps), nn.Dropout(config.embedding_dropout)
    projection = nn.Linear(in_features, config.projection_dim)
    return nn.Sequential(OrderedDict(norm=norm, dropout=dropout, projection=projection))


class HiViLTForRetrieval(HiViLTPreTrainedModel):
    """HiViLT for retrieving images by texts and texts by images, in two steps: `image_embeds` and `text_embeds` of each
    modality alone, to search by, and [`HiViLTForRetrieval.score`], the fused similarity of a pair, to re-rank the best
    by (design note, sections 3.4 and 3.5). Both project by the same two matrices, so that fused states start from what
    the embeddings know; with `config.embed_encoder_states` embeddings have matrices of their own.
    """

    _keep_in_fp32_modules_strict = ["logit_scale", "matching_logit_scale"]
    _has_answers = False

    def __init__(self, config: HiViLTConfig):
        super().__init__(config)
        self.model = HiViLTModel(config, add_global_mlp=False)
        if config.embed_encoder_states:
            self.visual_embedding = encoder_embedding(config, config.vision_level_layout[-1][2])
            self.text_embedding = encoder_embedding(config, text_width(config.text_config))
        else:
            self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.matching_logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

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
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """Embeds images. `pooler_output` of the result is `image_embeds`, `(B_i, projection_dim)`, L2-normalised;
        `last_hidden_state` is the vision encoder's. Arguments as in [`HiViLTModel.encode_images`].
        """
        states = self.encode_images(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        return BaseModelOutputWithPooling(
            states.last_hidden_state, self.embed_images(states), states.hidden_states, states.attentions
        )

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """As `get_image_features`, of texts: `text_embeds`, `(B_t, projection_dim)`; see [`HiViLTModel.encode_texts`]."""
        states = self.encode_texts(input_ids, attention_mask, **kwargs)
        return BaseModelOutputWithPooling(
            states.last_hidden_state, self.embed_texts(states), states.hidden_states, states.attentions
        )

    def score(
        self,
        image_states: HiViLTImageStates,
        text_states: HiViLTTextStates,
        image_index: torch.LongTensor | None = None,
        text_index: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.FloatTensor:
        """Fused similarity `s(I, T) = cos(P_v V~_g, P_t T~_g)` of pairs of encoded images and texts, `(pairs,)`, float32
        in [-1, 1]. Runs fusion alone. Arguments and errors as in [`HiViLTModel.fuse`].
        """
        fused = self.model.fuse(image_states, text_states, image_index, text_index, **kwargs)
        vision = embed(self.visual_projection, fused.vision_global_state)
        text = embed(self.text_projection, fused.text_global_state).to(vision.device)
        return (vision * text).sum(dim=-1)

    def ranking_score(self, similarity: torch.Tensor, fused_similarity: torch.Tensor) -> torch.FloatTensor:
        """What to order a shortlist by: the mean, weighted by their inverse temperatures, of cosines of `image_embeds`
        and `text_embeds` and of what [`HiViLTForRetrieval.score`] gives for these pairs, of any one shape, in [-1, 1].
        Hard negatives are drawn by the embeddings' softmax, so what fused matching learns is what to add to their
        logits (noise-contrastive estimation); BLIP, arXiv 2201.12086, ranks by a sum, too.
        """
        weight = torch.stack([inverse_temperature(self.logit_scale), inverse_temperature(self.matching_logit_scale)])
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
            image_ids: integers `(B_i,)`, the same for rows of `pixel_values` that show the same image; the texts of one match
                the other. Unset, all differ.
            text_ids: integers `(B_t,)`, the same for equal texts; the image of one matches the other. Unset, texts of the
                same tokens are equal, whatever their padding; `inputs_embeds` all differ.
            return_loss: compute the losses. Unset, in training, and wherever `config.return_loss` says so. Without
                `image_index` texts pair row by row. A plain `Trainer` gets an `eval_loss` if its collator adds it.
            gather_negatives: compute the losses over the batches of all processes, each of which has to call this. Unset, in
                training if `config.gather_negatives`, and never in evaluation mode.
            chunk_size: encode and match this many images, texts and pairs at a time, see [`in_chunks`]: the loss and
                gradients of the whole batch in the memory of a chunk, for one more forward pass. Encoders with batch
                norm see the statistics of a chunk. Leaves out what encoders record.
            others: see [`HiViLTModel.forward`]; of attentions and hidden states those of the encoders are returned.

        Raises:
            ValueError: inputs are missing or do not fit together, or a loss is asked for and the pairs are not known.
        """
        complete_flags(kwargs, self.config)
        check_no_places(kwargs, "caption_index", "retrieval.RetrievalTrainer", self.training)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"`chunk_size` must be at least 1 (or `None`, the whole batch at once), got {chunk_size}.")
        images = (pixel_values, interpolate_pos_encoding, feature_maps)
        texts = (input_ids, attention_mask, token_type_ids, inputs_embeds, token_states)
        image_states, text_states = self.model.encode(
            images, texts, image_states, text_states, image_index, chunk_size=chunk_size, **kwargs
        )
        image_embeds = self.embed_images(image_states)
        text_embeds = self.embed_texts(text_states).to(image_embeds.device)
        logit_scale = inverse_temperature(self.logit_scale).to(image_embeds.device)
        logits_per_image = similarity(logit_scale, image_embeds, text_embeds)

        num_images, num_texts = image_embeds.shape[0], text_embeds.shape[0]
        image_index = check_index("image_index", image_index, num_images, "images")
        num_paired = num_images if image_index is None else image_index.shape[0]
        asked = self.training if return_loss is None else return_loss
        # Compared only where it matters, so that an exported graph takes any number of images and texts.
        if asked or image_index is not None:
            check_pairs(num_paired, num_texts)
        if return_loss is None and self.config.return_loss:
            # One image with many captions to choose from is no batch of pairs, and has no loss.
            asked = num_paired == num_texts

        def score(image_states, text_states, *pairs):
            return torch.cat(in_chunks(partial(self.score, image_states, text_states, **kwargs), chunk_size, *pairs))

        losses = {}
        if asked:
            device = text_embeds.device
            image_ids = check_ids("image_ids", image_ids, num_images, "images", device)
            text_ids = check_ids("text_ids", text_ids, num_texts, "texts", device)
            tokens = None if text_ids is None else text_ids[:, None]
            losses = retrieval_losses(
                PairBatch(image_embeds, text_embeds, image_index, image_ids, tokens, image_states, text_states),
                self.config,
                self.logit_scale,
                self.matching_logit_scale,
                score,
                sample=self.training,
                gather=self.training and self.config.gather_negatives if gather_negatives is None else gather_negatives,
            )
        return HiViLTRetrievalOutput(
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.t(),
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            **losses,
            **of_encoders(image_states, text_states, kwargs),
        )


# So that a saved checkpoint brings this file along.
for _auto, _path in AUTO_MAP.items():
    if (_class := globals().get(_path.split(".")[1])) and issubclass(_class, HiViLTPreTrainedModel):
        _class.register_for_auto_class(_auto)

__all__ = ["HiViLTForQuestionAnswering", "HiViLTForRetrieval", "HiViLTModel"]
