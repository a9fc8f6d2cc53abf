"""HiViLT configuration: two encoders, described by their own configs, and the hierarchical fusion between them."""

import copy
import difflib
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from transformers.utils.versions import require_version

# Before anything else is imported, which outside these versions fails without saying why.
for _requirement in ("transformers>=5.18.0,<6", "huggingface_hub>=1.31.0,<3"):
    require_version(_requirement, f'HiViLT works with: pip install "{_requirement}"')

import transformers
from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .encoders_hivilt import (
    as_decoder,
    check_encoder,
    default_levels,
    image_size,
    is_hierarchical,
    max_text_length,
    vision_states,
    without_unread_parts,
)

logger = logging.get_logger(__name__)

# Every save names the code of every Auto class, whichever class was saved, so that any head opens through any of them.
AUTO_MAP = {
    "AutoConfig": "configuration_hivilt.HiViLTConfig",
    "AutoModel": "modeling_hivilt.HiViLTModel",
    "AutoModelForVisualQuestionAnswering": "modeling_hivilt.HiViLTForQuestionAnswering",
    "AutoModelForZeroShotImageClassification": "modeling_hivilt.HiViLTForRetrieval",
    "AutoModelForImageTextToText": "generation_hivilt.HiViLTForConditionalGeneration",
    "AutoModelForZeroShotObjectDetection": "grounding_hivilt.HiViLTForVisualGrounding",
    "AutoModelForSequenceClassification": "reasoning_hivilt.HiViLTForImagesAndTextClassification",
    "AutoProcessor": "processing_hivilt.HiViLTProcessor",
}


@contextmanager
def code_in_place(saved, save_directory: str | os.PathLike) -> Iterator[None]:
    """While `saved` (config, model or processor) is written to the folder that its own code runs from, keeps
    transformers from copying that code onto itself, which is an error (`shutil.SameFileError`).
    """
    code_file = getattr(sys.modules[type(saved).__module__], "__file__", None)  # a notebook has none
    # Of the class and not of the object: transformers asks either.
    auto_class = type(saved)._auto_class
    folder = Path(save_directory)
    if code_file is not None and folder.is_dir() and folder.samefile(Path(code_file).parent):
        type(saved)._auto_class = None
    try:
        yield
    finally:
        type(saved)._auto_class = auto_class


def _check_spelling(name: str, config_class: type[PreTrainedConfig], keys: Iterable[str]) -> None:
    """Refuses what is no field of a config and much like one, which transformers would keep, and do nothing with."""
    own = [field.name for field in fields(config_class) if not field.name.startswith("_")]
    known = {*own, *config_class.attribute_map, *dir(PreTrainedConfig)}
    for key in keys:
        if key not in known and (close := difflib.get_close_matches(key, own, n=1, cutoff=0.85)):
            raise ValueError(f"{name} has no `{key}`; did you mean `{close[0]}`?")


def _part_config(name: str, config: PreTrainedConfig | dict | None, default_type: str, saved: bool) -> PreTrainedConfig:
    """The config of a part from what stands for it: itself, its fields, or nothing for that of the base model."""
    if isinstance(config, PreTrainedConfig):
        return config
    if config is not None and not isinstance(config, dict):
        raise ValueError(f"`{name}` must be a config or a dict of its fields, got {type(config).__name__}.")
    values = {"model_type": default_type, **(config or {})}
    if not isinstance(values["model_type"], str) or values["model_type"] not in CONFIG_MAPPING:
        raise ValueError(f"`{name}` has the `model_type` {values['model_type']!r}, which transformers does not know.")
    if not saved and "transformers_version" not in values:
        _check_spelling(f"`{name}`", CONFIG_MAPPING[values["model_type"]], values)
    return AutoConfig.for_model(**values)


@strict
class HiViLTConfig(PreTrainedConfig):
    """Configuration of [`HiViLTModel`] and of its heads. `HiViLTConfig()` is the base model of the design note:
    ViT-B/16 at 224 pixels, BERT-base, hidden size 768, 8 heads, three fusion stages. `benchmarks/fusion_study.py`
    compares these defaults with their ablations, and `docs/fusion.md` has its tables. Arguments go by keyword.

    Args:
        vision_config: config of a transformers vision encoder, isotropic (ViT, CLIP's) or hierarchical (Swin, MobileNet), or a
            `dict` of its fields with its `model_type`; `docs/encoders.md` lists all. Unset: ViT-B/16 at 224 pixels.
        text_config: of a text encoder, likewise. Unset: BERT-base.
        hidden_size: width *d* that every level of both modalities is projected to.
        num_attention_heads: of local and of global cross-attention; divides `hidden_size`.
        num_fusion_stages: levels, fine to coarse, each fused by a stage of its own; 1 is single-level fusion.
        vision_levels: for each stage the index into the vision encoder's hidden states (0 is the embeddings' output). Unset:
            evenly spaced layers that end with the last one, or the last state of each grid of a hierarchical encoder. Layers
            past the last one named are computed for nothing and never train: give the encoder fewer of them.
        vision_strides: for each stage the side, in grid cells, of the squares that are averaged into one token. Unset: 1, 2,
            4, ... for an isotropic encoder, all 1 for a hierarchical one, which coarsens by itself.
        fusion_top_k: sparse fusion: vision tokens, the most similar, that each text token meets. Unset: all.
        fusion_intermediate_size: width inside the MLPs of local fusion. They read `3 * hidden_size` features of every token, so
            it decides what fusion costs: 256 is a few percent of the base model's encoders.
        use_local_fusion: ablation: without the stages, global fusion pools the unfused levels.
        use_global_fusion: ablation: without it, the pooled local states stand for global cross-attention.
        use_position_embeddings: adds to the vision tokens of every level a linear map of their place on its grid (as CoordConv,
            arXiv 1807.03247). Encoders that convolve know places from their padding alone.
        hidden_act: of the fusion's MLPs.
        dropout: on the fusion's attention weights and inside its MLPs; the encoders keep their own.
        embedding_dropout: retrieval: before embedding; with frozen encoders and few images, 0.3.
        embed_encoder_states: retrieval: embeds the pooled last states of the encoders, normalised, in place of `V_g` and `T_g`,
            so that embeddings are as wide as `projection_dim` says, however narrow the fusion is.
        layer_norm_eps: of the level norms.
        initializer_range: standard deviation of the fusion's and the heads' initial weights; the encoders keep their own. Unset,
            each linear layer's is 1/sqrt(in_features) (LeCun et al., 1998), so that signals and gradients keep their size at any
            width: with a fixed 0.02 a narrow model stays on its first plateau for epochs.
        projection_dim: of `image_embeds`, `text_embeds` and the space in which fused similarity is measured.
        logit_scale_init_value: natural logarithm of the first inverse temperature, ln(1/0.07) as in CLIP (arXiv 2103.00020).
        classification_loss_weight, contrastive_loss_weight: lambda_1 and lambda_2.
        auxiliary_loss_weight: lambda_3, of fused matching in retrieval, where unset means 1.0, and of a contrastive term on the
            unfused embeddings in question answering, where unset means none.
        num_hard_negatives: retrieval: images that each text, and texts that each image, is matched against besides its own, drawn
            from the batch. Fused matching costs as many pairs.
        gather_negatives: retrieval: negatives in training come from all processes, with gradient.
        return_loss: retrieval: compute the losses in evaluation mode, too, where a call does not say; in training always.
        num_images: reasoning: images that each text is about, in order; two in NLVR2 (arXiv 1811.00491).
        decoder_config: generation: config of a causal language model with cross-attention (GPT-2, BERT, BART), or a `dict` of its
            fields with its `model_type`, whose vocabulary is the text encoder's unless it says otherwise. Unset: no decoder;
            [`HiViLTForConditionalGeneration`] then makes [`HiViLTConfig.with_decoder`].
        prompt_ids: generation: tokens of the text, special ones included, that an image without a text meets.
        label_smoothing: generation: probability that is spread over the whole vocabulary (arXiv 1512.00567).
        bos_token_id, eos_token_id, pad_token_id, decoder_start_token_id: generation: the decoder's special tokens, which
            [`HiViLTForConditionalGeneration.set_decoder_tokens`] sets.

    Raises:
        StrictDataclassError: a field is of the wrong type or out of range; the message names it.
        ValueError: a keyword, or a key of an encoder's `dict`, is a misspelt field, or an encoder is of a family that
            cannot be one.
    """

    model_type = "hivilt"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig, "decoder_config": AutoConfig}
    # Trainer would otherwise gather and keep all of these for every evaluation batch.
    keys_to_ignore_at_inference = [
        *("local_fusion_state", "global_fusion_state", "vision_global_state", "text_global_state"),
        *("vision_last_hidden_state", "text_last_hidden_state", "hidden_states"),
        *("cross_attentions", "vision_cross_attentions", "global_cross_attentions"),
        *("vision_hidden_states", "text_hidden_states", "vision_attentions", "text_attentions"),
        *("contrastive_loss", "auxiliary_loss", "num_dropped_anchors"),
        # Square matrices of one batch; stacking them over batches means nothing. Recall comes from the embeddings.
        *("logits_per_image", "logits_per_text"),
        *("past_key_values", "encoder_last_hidden_state", "decoder_hidden_states", "decoder_attentions"),
    ]

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    hidden_size: int = 768
    num_attention_heads: int = 8
    num_fusion_stages: int = 3
    vision_levels: list[int] | tuple[int, ...] | None = None
    vision_strides: list[int] | tuple[int, ...] | None = None
    fusion_top_k: int | None = None
    fusion_intermediate_size: int = 256
    use_local_fusion: bool = True
    use_global_fusion: bool = True
    use_position_embeddings: bool = True
    hidden_act: str = "gelu"
    dropout: float | int = 0.1
    embedding_dropout: float | int = 0.0
    embed_encoder_states: bool = False
    layer_norm_eps: float = 1e-6
    initializer_range: float | None = None
    projection_dim: int = 256
    logit_scale_init_value: float | int = 2.6592
    classification_loss_weight: float | int = 1.0
    contrastive_loss_weight: float | int = 1.0
    auxiliary_loss_weight: float | int | None = None
    num_hard_negatives: int = 1
    gather_negatives: bool = True
    return_loss: bool = False
    num_images: int = 2
    decoder_config: dict | PreTrainedConfig | None = None
    prompt_ids: list[int] | tuple[int, ...] | None = None
    label_smoothing: float | int = 0.0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs):
        # What a saved config holds is kept, however it is spelt: another version may know it.
        saved = self.transformers_version is not None
        if not saved:
            _check_spelling("HiViLTConfig", HiViLTConfig, kwargs)
        self._number_labels(kwargs.get("num_labels", 0))
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        self.vision_config = _part_config("vision_config", self.vision_config, "vit", saved)
        self.text_config = _part_config("text_config", self.text_config, "bert", saved)
        if self.decoder_config is not None:
            if isinstance(self.decoder_config, dict):
                self.decoder_config = {"vocab_size": self.text_config.vocab_size, **self.decoder_config}
            self.decoder_config = as_decoder(_part_config("decoder_config", self.decoder_config, "gpt2", saved))
            self.is_encoder_decoder = True
        super().__post_init__(**kwargs)
        unknown = [key for key in kwargs if key in vars(self) and key != "auto_map" and key[0] != "_"]
        if unknown and not saved:
            logger.warning(f"HiViLTConfig has no `{'`, `'.join(unknown)}`: it is kept, and changes nothing.")
        for name in ("vision_config", "text_config"):
            check_encoder(name, getattr(self, name))
            setattr(self, name, without_unread_parts(getattr(self, name)))
        self._name_labels()

    def _name_labels(self):
        """One map from the other, so that they cannot disagree."""
        if self.id2label is not None:
            self.label2id = {label: index for index, label in self.id2label.items()}

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As [`PreTrainedConfig.from_dict`]; `id2label`, or else `label2id`, given on loading replaces both maps of the
        file, and `decoder_config` the file's.
        """
        # transformers would set them after the config is made and checked.
        labels = {name: kwargs.pop(name) for name in ("id2label", "label2id") if kwargs.get(name) is not None}
        if labels:
            config_dict = {**config_dict, "id2label": None, "label2id": None, **labels}
        if kwargs.get("decoder_config") is not None:
            config_dict = {**config_dict, "decoder_config": kwargs.pop("decoder_config")}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_vision_text_configs(
        cls, vision_config: PreTrainedConfig | dict, text_config: PreTrainedConfig | dict, **fusion
    ) -> "HiViLTConfig":
        """Config for two encoders, of which a CLIP-like config lends its own; `fusion` are other arguments of this class."""
        return cls(
            vision_config=getattr(vision_config, "vision_config", vision_config),
            text_config=getattr(text_config, "text_config", text_config),
            **fusion,
        )

    @property
    def vision_level_layout(self) -> list[tuple[int, int, int]]:
        """For each stage, fine to coarse: index into the vision hidden states, pooling stride, channels."""
        states = vision_states(self.vision_config)
        indices = self.vision_levels or default_levels(states, self.num_fusion_stages)
        strides = self.vision_strides or [1 if is_hierarchical(states) else 2**stage for stage in range(len(indices))]
        return [(index, stride, states[index].channels) for index, stride in zip(indices, strides, strict=True)]

    @property
    def max_text_length(self) -> int | None:
        """Most tokens that the text encoder takes; `None` where there is no limit (T5)."""
        return max_text_length(self.text_config)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """As [`PreTrainedConfig.get_text_config`]; with `decoder=True`, from which `generate` makes its cache, the decoder's."""
        if decoder and not encoder and self.decoder_config is not None:
            return self.decoder_config
        return super().get_text_config(decoder=decoder, encoder=encoder)

    def with_decoder(self) -> "HiViLTConfig":
        """This config with a decoder: its own, or a GPT-2 of three layers as wide as the fusion, over the text encoder's
        vocabulary. Its embeddings, which also score the tokens, start at 1/sqrt(hidden_size), as the fusion's layers do.
        """
        config = copy.deepcopy(self)
        if config.decoder_config is None:
            # None of attention, with which the fused kernels cannot run.
            drop = {"resid_pdrop": self.dropout, "embd_pdrop": self.dropout, "attn_pdrop": 0.0}
            tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
            size = {"n_embd": self.hidden_size, "n_head": self.num_attention_heads, "n_layer": 3, "n_positions": 512}
            fields = {"model_type": "gpt2", "vocab_size": self.text_config.vocab_size, **size, **drop, **tokens}
            fields["initializer_range"] = self.hidden_size**-0.5
            config.decoder_config = as_decoder(AutoConfig.for_model(**fields))
            config.decoder_config._attn_implementation = config._attn_implementation
            config.is_encoder_decoder = True
        return config

    def _number_labels(self, num_labels) -> None:
        """Makes `id2label` of a `label2id` that stands alone; refuses what transformers would count before it validates."""
        if self.id2label is None and self.label2id is not None:
            numbers = self.label2id.values() if isinstance(self.label2id, dict) else ()
            if not numbers or len(set(numbers)) != len(numbers):
                raise ValueError(f"`label2id` must map each answer to a number of its own, got {self.label2id!r:.200}.")
            self.id2label = {number: answer for answer, number in self.label2id.items()}
        labels = self.id2label
        if labels is not None:
            numbered = isinstance(labels, dict) and all(str(label).isdecimal() for label in labels)
            if not numbered or not all(isinstance(answer, str) for answer in labels.values()):
                way_out = "; write id2label=dict(enumerate(answers))" if isinstance(labels, (list, tuple)) else ""
                raise ValueError(
                    f"`id2label` must map numbers from 0 on to answers as text, got {labels!r:.200}{way_out}."
                )
        if type(num_labels) is not int or num_labels < 0:
            raise ValueError(f"`num_labels` must be a whole number from 0 on, got {num_labels!r}.")

    def validate_fusion(self):
        """Checks the fusion's fields; as all `validate_...`, in alphabetical order, on construction and on save."""
        counts = ("hidden_size", "num_attention_heads", "num_fusion_stages", "fusion_intermediate_size")
        for name in (*counts, "projection_dim", "num_hard_negatives", "num_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        width, heads = self.hidden_size, self.num_attention_heads
        if width % heads:
            raise ValueError(f"`hidden_size` ({width}) must be a multiple of `num_attention_heads` ({heads}).")
        if self.fusion_top_k is not None and self.fusion_top_k < 1:
            raise ValueError(f"`fusion_top_k` must be at least 1, or None for dense fusion, got {self.fusion_top_k}.")
        for name in ("dropout", "embedding_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")
        weights = ("classification_loss_weight", "contrastive_loss_weight", "auxiliary_loss_weight")
        for name in (*weights, "initializer_range"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise ValueError(f"`{name}` must be finite and not negative, got {getattr(self, name)}.")
        if not 0 < self.layer_norm_eps < math.inf:
            raise ValueError(f"`layer_norm_eps` must be finite and above 0, got {self.layer_norm_eps}.")
        if not math.isfinite(self.logit_scale_init_value):
            raise ValueError(f"`logit_scale_init_value` must be finite, got {self.logit_scale_init_value}.")
        known = transformers.activations.ACT2FN  # by its module, which takes a second to import, and only here
        if self.hidden_act not in known:
            raise ValueError(f"`hidden_act` must be one of {', '.join(known)}, got {self.hidden_act!r}.")
        labels = self.id2label or {}
        if sorted(labels) != list(range(len(labels))):
            got = f"{min(labels)}..{max(labels)}"
            raise ValueError(f"`id2label` must number its {len(labels)} answers from 0, without gaps; got {got}.")
        if len(self.label2id or {}) != len(labels):
            raise ValueError("`id2label` must not name the same answer twice.")

    def validate_prompt(self):
        if self.prompt_ids is None:
            return
        known, limit = getattr(self.text_config, "vocab_size", math.inf), self.max_text_length
        if not self.prompt_ids or not all(0 <= token < known for token in self.prompt_ids):
            raise ValueError(
                f"`prompt_ids` must be tokens of the text encoder, 0..{known - 1}, got {list(self.prompt_ids)}."
            )
        if limit is not None and len(self.prompt_ids) > limit:
            raise ValueError(f"`prompt_ids` has {len(self.prompt_ids)} tokens, but the text encoder takes {limit}.")

    def validate_levels(self):
        if min(size := image_size(self.vision_config) or (1, 1)) < 1:
            raise ValueError(f"`image_size` of `vision_config` must be at least 1, got {size}.")
        states, levels, stages = vision_states(self.vision_config), self.vision_levels, self.num_fusion_stages
        encoder = f"this `{self.vision_config.model_type}` encoder"
        for name in ("vision_levels", "vision_strides"):
            values = getattr(self, name)
            if values is not None and len(values) != stages:
                raise ValueError(f"`{name}` must have {stages} entries (`num_fusion_stages`), got {list(values)}.")
        last, most = len(states) - 1, len(default_levels(states, len(states)))
        if levels is not None and not all(0 <= index <= last for index in levels):
            raise ValueError(f"`vision_levels` must lie in 0..{last}, the states of {encoder}, got {list(levels)}.")
        if self.vision_strides is not None and min(self.vision_strides) < 1:
            raise ValueError(f"`vision_strides` must be at least 1, got {list(self.vision_strides)}.")
        if levels is None and stages > most:
            raise ValueError(
                f"`num_fusion_stages` ({stages}) is more than the {most} levels that {encoder} has; lower it or name "
                "`vision_levels`."
            )

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Saves as [`PreTrainedConfig.save_pretrained`] does; `auto_map` then names the code beside it, all of it."""
        self._name_labels()  # id2label may have been set since
        loaded_from, self.auto_map = self.auto_map, dict(AUTO_MAP)
        try:
            with code_in_place(self, save_directory):
                super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        finally:
            self.auto_map = loaded_from


HiViLTConfig.register_for_auto_class()

__all__ = ["HiViLTConfig"]
