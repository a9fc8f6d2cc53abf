"""HiViLT that writes: captions, and answers in words, by a borrowed decoder that attends to what fusion gives.

    images, prompts -> HiViLTModel -> HiViLTMemory -> (B_t, N, decoder's width)      once for each pair, whatever it says
                                                           |
    tokens so far -> decoder (any causal language model with cross-attention) -> scores of the next token

The prompt or question goes into the text encoder, never before the answer in the decoder. Letters in shapes are those of
`fusion_hivilt.py`; `B_c` captions, `N_d` tokens of a caption.
"""

import inspect
import os
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging

from .configuration_hivilt import HiViLTConfig
from .encoders_hivilt import build_decoder, end_token, new_in_decoder, word_embeddings
from .fusion_hivilt import (
    HiViLTImageStates,
    HiViLTMemory,
    HiViLTMemoryOutput,
    HiViLTTextStates,
    attention_weights,
    select,
)
from .inputs_hivilt import check_captions, check_decoder_length, check_index, complete_flags, described, is_integers
from .losses_hivilt import token_loss
from .modeling_hivilt import HiViLTModel, HiViLTPreTrainedModel
from .upstream_hivilt import RecordingMixin, SubfolderMixin

logger = logging.get_logger(__name__)


class HiViLTFusedEncoder(nn.Module):
    """The encoder of [`HiViLTForConditionalGeneration`]: images and texts in, what the decoder attends to out. Made
    anew for each call, so that no weight has two names. Give what it returns as `encoder_outputs`.
    """

    main_input_name = "input_ids"

    def __init__(self, model: HiViLTModel, memory: HiViLTMemory):
        super().__init__()
        self.model, self.memory = model, memory

    # It names its arguments, since `generate` hands over those that it names.
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
    ) -> HiViLTMemoryOutput:
        """Arguments as in [`HiViLTModel.forward`]. Without a text, `config.prompt_ids` is that of every image, or of
        every entry of `image_index`, and is encoded once.

        Raises:
            ValueError: as there, or there is neither a text nor `config.prompt_ids`.
        """
        if all(images is None for images in (pixel_values, image_states, feature_maps)):
            raise ValueError(
                "There is no image: give `pixel_values`. A pipeline reads a path that is given alone as the text: call it "
                "with both, `images=` and `text=`."
            )
        flags, text_index = {"output_attentions": False, "output_hidden_states": False}, None
        is_prompted = all(text is None for text in (input_ids, inputs_embeds, text_states, token_states))
        if is_prompted:
            prompt = self.model.config.prompt_ids
            if prompt is None:
                raise ValueError(
                    "There is no text: give `input_ids`, or a prompt for all images, "
                    "`model.config.prompt_ids = tokenizer(prompt).input_ids`."
                )
            input_ids = torch.tensor([list(prompt)], device=self.model.device)
            attention_mask = torch.ones_like(input_ids)
        images = (pixel_values, interpolate_pos_encoding, feature_maps)
        texts = (input_ids, attention_mask, token_type_ids, inputs_embeds, token_states)
        image_states, text_states = self.model.encode(images, texts, image_states, text_states, image_index, **flags)
        if is_prompted:
            rows = image_states.global_state if image_index is None else image_index
            text_index = torch.zeros(rows.shape[0], dtype=torch.long, device=input_ids.device)
        flags["output_hidden_states"] = True
        fused = self.model.fuse(image_states, text_states, image_index, text_index, **flags)
        return self.memory(fused, select(text_states.attention_mask, text_index))


# What an encoder is given; `encoder_outputs` stands in for all of it.
_INPUTS = tuple(inspect.signature(HiViLTFusedEncoder.forward).parameters)[1:]

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


class HiViLTForConditionalGeneration(RecordingMixin, SubfolderMixin, HiViLTPreTrainedModel, GenerationMixin):
    """HiViLT with a decoder over the fused rows of all stages: captions of images, and answers in words. An image is
    encoded once, and a pair of image and prompt fused once, however many captions, beams or samples it has. Without
    `config.decoder_config` the decoder is that of [`HiViLTConfig.with_decoder`].

    ```python
    model = HiViLTForConditionalGeneration.from_vision_text_pretrained(vision, text)
    model.set_decoder_tokens(processor.tokenizer)
    model.config.prompt_ids = processor.tokenizer("what does the image show?").input_ids
    tokens = model.generate(**processor(images=images, return_tensors="pt"), num_beams=3, max_new_tokens=30)
    captions = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    ```
    """

    accepts_loss_kwargs = True
    _has_answers = False
    _recorded_models = ("decoder",)

    def __init__(self, config: HiViLTConfig):
        if config.decoder_config is None:
            config = config.with_decoder()
        super().__init__(config)
        # Not what a decoder's own config says, which is of another model (BART's forced tokens, Blenderbot's n-grams).
        self.generation_config = GenerationConfig(**{name: getattr(config, name) for name in _TOKENS})
        self.model = HiViLTModel(config, add_global_mlp=False)
        self.memory = HiViLTMemory(config)
        self.decoder = build_decoder(config.decoder_config)
        self.install_capturing_hooks()
        self.post_init()

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """What `generate` encodes with, see [`HiViLTFusedEncoder`]; with `modality`, that borrowed encoder."""
        return HiViLTFusedEncoder(self.model, self.memory) if modality is None else super().get_encoder(modality)

    def borrowed_models(self) -> dict[str, PreTrainedModel]:
        return {**super().borrowed_models(), "decoder_config": self.decoder}

    def get_output_embeddings(self) -> nn.Module:
        """The decoder's layer that scores tokens."""
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.decoder.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """As [`PreTrainedModel.resize_token_embeddings`], of text encoder and decoder, which share a vocabulary.

        Raises:
            ValueError: their vocabularies differ in size.
        """
        text_model, decoder = self.model.text_model, self.decoder
        sizes = [one.get_input_embeddings().weight.shape[0] for one in (text_model, decoder)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"The text encoder has {sizes[0]} tokens and the decoder {sizes[1]}, so that one tokenizer is not both's: "
                "resize `model.model.text_model` or `model.decoder`, each by its own `resize_token_embeddings`."
            )
        for config, one in ((self.config.text_config, text_model), (self.config.decoder_config, decoder)):
            embeddings = one.resize_token_embeddings(new_num_tokens, *args, **kwargs)
            config.vocab_size = embeddings.weight.shape[0]
        return self.get_input_embeddings()

    def set_decoder_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Sets what the decoder's texts begin with, end with and are padded with, in `config` and `generation_config`:
        the tokenizer's `bos`, else `cls`, else `pad` token (as T5 begins); [`end_token`]; its `pad`, else the end.

        Raises:
            ValueError: the tokenizer has no token to begin or to end with, has more tokens than the decoder, or pads with
                another token than the decoder was made for.
        """
        starts = (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.pad_token_id)
        start, end = next((token for token in starts if token is not None), None), end_token(tokenizer)
        for token, what in (
            (start, "begin (`bos_token`, `cls_token` or `pad_token`)"),
            (end, "end (`eos_token` or `sep_token`)"),
        ):
            if token is None:
                raise ValueError(f"The {type(tokenizer).__name__} has no token that texts {what} with; name one.")
        if len(tokenizer) > (known := self.config.decoder_config.vocab_size):
            raise ValueError(
                f"The {type(tokenizer).__name__} has {len(tokenizer)} tokens, but the decoder {known}: take the decoder's own, "
                f"or `model.decoder.resize_token_embeddings({len(tokenizer)})`."
            )
        pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        made_for = self.decoder.get_input_embeddings().padding_idx
        if made_for is not None and pad != made_for:
            raise ValueError(
                f"The {type(tokenizer).__name__} pads with {pad}, but the decoder was made for {made_for}, whose embedding does "
                f"not train: give the decoder's own tokenizer, or a `decoder_config` with `pad_token_id={pad}`."
            )
        for name, token in zip(_TOKENS, (start, end, pad, start), strict=True):
            for one in (self.config, self.generation_config):
                setattr(one, name, token)

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str | os.PathLike | PreTrainedConfig,
        text: str | os.PathLike | PreTrainedConfig,
        decoder: str | os.PathLike | PreTrainedConfig | None = None,
        **fusion,
    ) -> "HiViLTForConditionalGeneration":
        """As [`HiViLTPreTrainedModel.from_vision_text_pretrained`], with a decoder.

        Args:
            decoder: name or folder of a causal language model, see [`HiViLTForConditionalGeneration.load_decoder`]; or a config,
                for a new one. Unset, that of [`HiViLTConfig.with_decoder`]. Where its word embeddings are of the size of a
                pretrained `text`'s, it begins with these, at its own scale.

        Raises:
            ValueError: a checkpoint lacks weights that its encoder or decoder needs, or has no cross-attention.
        """
        if decoder is not None:
            is_config = isinstance(decoder, PreTrainedConfig)
            fusion["decoder_config"] = decoder if is_config else AutoConfig.from_pretrained(decoder)
        model = super().from_vision_text_pretrained(vision, text, **fusion)
        if decoder is None and not isinstance(text, PreTrainedConfig):
            new, known = model.decoder.get_input_embeddings().weight, word_embeddings(model.model.text_model).weight
            if new.shape == known.shape:
                with torch.no_grad():
                    new.copy_(known * (new.std() / known.std()))
        elif decoder is not None and not is_config:
            model.load_decoder(decoder)
        return model

    def load_decoder(self, source: str | os.PathLike) -> None:
        """Gives the decoder the weights of a pretrained causal language model, by its name or folder. Its
        cross-attention is new, unless the checkpoint has it (BART's).

        Raises:
            ValueError: the checkpoint lacks other weights that the decoder needs.
        """
        config = self.config.decoder_config
        pretrained, loading = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=self.decoder.dtype, output_loading_info=True
        )
        missing = sorted(loading["missing_keys"] - new_in_decoder(config))
        if missing:
            raise ValueError(
                f"{source} has no weights for {len(missing)} parameters of the decoder, a {type(pretrained).__name__}, the "
                f"first being {missing[0]!r}; is it a checkpoint of that language model?"
            )
        self.decoder.load_state_dict(pretrained.state_dict())

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor) -> torch.LongTensor:
        """What the decoder reads to predict `labels` `(B_c, N_d)`: the begin token, then all but the last, -100 padded.

        Raises:
            ValueError: the model does not know its begin and padding tokens yet.
        """
        self._check_tokens()
        start = labels.new_full((labels.shape[0], 1), self.config.decoder_start_token_id)
        shifted = torch.cat([start, labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    def _check_tokens(self) -> None:
        if self.config.decoder_start_token_id is None or self.config.pad_token_id is None:
            raise ValueError(
                "The decoder does not know what its texts begin, end and are padded with: call "
                "`model.set_decoder_tokens(tokenizer)` once, before training or generating; checkpoints keep it."
            )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_index: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        text_index: torch.LongTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: HiViLTMemoryOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_states: HiViLTImageStates | None = None,
        text_states: HiViLTTextStates | None = None,
        interpolate_pos_encoding: bool = False,
        feature_maps: Sequence[torch.FloatTensor] | None = None,
        token_states: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput | tuple:
        """
        Args:
            input_ids, attention_mask: the prompts or questions, `(B_t, N_t)`. Without them, and without any other text,
                `config.prompt_ids` is that of every image, or of every entry of `image_index`.
            labels: the captions or answers, `(B_c, N_d)`: tokens from the first word to the end token, without a begin token,
                -100 after them. The loss is [`token_loss`], with `config.label_smoothing`.
            text_index: the text (the pair of image and prompt) that each caption is of, integers `(B_c,)`; unset, row by row.
            decoder_input_ids, decoder_attention_mask: what the decoder reads, `(B_c, N_d)`; unset, `labels` shifted right.
            encoder_outputs: of `get_encoder()`, in place of images and texts.
            past_key_values, use_cache: as in every decoder; with `labels` nothing is cached.
            num_items_in_batch: tokens that one step of the optimizer learns from, which Trainer counts.
            others: see [`HiViLTModel.forward`]; attentions and hidden states are the decoder's.

        Returns:
            `loss`, `logits` `(B_c, N_d, vocab)`, `past_key_values`, `encoder_last_hidden_state` `(B_t, N, decoder's width)`,
            and on request `decoder_hidden_states`, `decoder_attentions` and `cross_attentions`.

        Raises:
            ValueError: inputs are missing or do not fit together, or `labels` are not tokens of the decoder.
        """
        complete_flags(kwargs, self.config)
        given = (input_ids, attention_mask, pixel_values, image_index, token_type_ids, inputs_embeds, image_states)
        given += (text_states, interpolate_pos_encoding, feature_maps, token_states)
        inputs = dict(zip(_INPUTS, given, strict=True))
        if labels is not None:
            check_captions(labels, self.config)
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError(
                    "Give the captions as `labels` to learn from them, or `decoder_input_ids`; to write, call `generate`. "
                    "Trainer's `label_smoothing_factor` takes the labels away: set `model.config.label_smoothing`."
                )
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)

        encoder_outputs = self._encode(encoder_outputs, inputs)
        memory, memory_mask = encoder_outputs.last_hidden_state, encoder_outputs.attention_mask
        text_index = check_index("text_index", text_index, memory.shape[0], "texts")
        # Contiguous, since GPT-2 views it; of a text alone the rows are one and the same.
        memory, memory_mask = select(memory, text_index).contiguous(), select(memory_mask, text_index)
        if memory.shape[0] != decoder_input_ids.shape[0]:
            raise ValueError(
                f"{decoder_input_ids.shape[0]} captions cannot be paired with {memory.shape[0]} texts: give `text_index`, of shape "
                "(captions,), which says for each caption the text that it is of."
            )

        outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=memory,
            encoder_attention_mask=memory_mask,
            past_key_values=past_key_values,
            use_cache=False if labels is not None else use_cache,
            output_attentions=kwargs["output_attentions"],
            output_hidden_states=kwargs["output_hidden_states"],
            return_dict=True,
        )
        loss = None
        if labels is not None:
            loss = token_loss(outputs.logits, labels, self.config.label_smoothing, num_items_in_batch)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=attention_weights(outputs.attentions or None),
            cross_attentions=attention_weights(outputs.cross_attentions or None),
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
        )

    def _encode(self, encoder_outputs: ModelOutput | tuple | None, inputs: dict) -> HiViLTMemoryOutput:
        """What the decoder attends to, from whichever of both is given; a copy, which beams may enlarge."""
        if encoder_outputs is None:
            return self.get_encoder()(**inputs)
        twice = [name for name, value in inputs.items() if isinstance(value, (torch.Tensor, ModelOutput, list, tuple))]
        if twice := [name for name in twice if name != "attention_mask"]:
            raise ValueError(f"Give either `encoder_outputs` or `{twice[0]}`, which they were computed from, not both.")
        fields = encoder_outputs if isinstance(encoder_outputs, tuple) else encoder_outputs.to_tuple()
        if len(fields) != 2:
            raise ValueError(
                "`encoder_outputs` must be what `model.get_encoder()` gives, `last_hidden_state` and `attention_mask`; "
                f"got {len(fields)} fields."
            )
        return HiViLTMemoryOutput(*fields)

    @torch.no_grad()
    def generate(
        self, inputs: torch.LongTensor | None = None, generation_config: GenerationConfig | None = None, **kwargs
    ) -> ModelOutput | torch.LongTensor:
        """Writes a text for each prompt or question. Images are encoded once, whatever the number of beams and samples. Of a
        model in training mode it is told once what that does.

        Args:
            inputs: `input_ids`, of which a batch of the model may have any form, see [`HiViLTForConditionalGeneration.forward`];
                `labels` and `text_index` of a batch are left out.
            generation_config, kwargs: as in [`GenerationMixin.generate`], `max_new_tokens`, `num_beams` and others, but for
                `assistant_model`. `past_key_values` of an earlier call go with what it wrote as `decoder_input_ids`.

        Returns:
            Tokens `(B_t * num_return_sequences, length)`, which begin with the begin token, or what
            `return_dict_in_generate=True` asks for.

        Raises:
            ValueError: as in the forward pass, the decoder has no positions for so many tokens, there is an `assistant_model`,
                `decoder_attention_mask` masks something, or `past_key_values` come without the tokens that they hold.
        """
        if kwargs.get("assistant_model") is not None:
            raise ValueError(
                "`assistant_model` cannot be used: it would have to encode the images, which `generate` gives to this model "
                "alone. Leave it out; `prompt_lookup_num_tokens` needs no assistant."
            )
        if inputs is not None:
            if not is_integers(inputs, 2):
                raise ValueError(
                    f"The first argument of `generate` are `input_ids`, integers (texts, tokens), {described(inputs)}; "
                    "images are `pixel_values=`."
                )
            if kwargs.get("input_ids") is not None:
                raise ValueError("`input_ids` are given twice, as the first argument and by their name.")
            kwargs["input_ids"] = inputs
        begun = kwargs.get("decoder_attention_mask")
        if begun is not None and not begun.all():
            raise ValueError(
                "`decoder_attention_mask` has zeros, but decoders count positions from the first token, padding or not: texts to "
                "go on with must be of one length; call `generate` once for each length."
            )
        self._check_tokens()
        if self.training:
            logger.warning_once(
                "`generate` of a model in training mode: dropout acts, and batch norms of an encoder take up the statistics of "
                "these images, for good. Call `model.eval()` first."
            )
        self._check_generated_length(generation_config, kwargs)
        self._complete_cached(kwargs)
        # Those of a batch of captions to learn from, of which a prompt may have several.
        for name in ("labels", "text_index"):
            kwargs.pop(name, None)
        given = {name: kwargs.pop(name) for name in _INPUTS if name in kwargs}
        # Before transformers would invent `input_ids`, where the texts are states or the prompt.
        encoder_outputs = self._encode(kwargs.pop("encoder_outputs", None), given)
        return super().generate(generation_config=generation_config, encoder_outputs=encoder_outputs, **kwargs)

    def _check_generated_length(self, generation_config: GenerationConfig | None, kwargs: dict) -> None:
        """Refuses a length that the decoder has no positions for, before anything is encoded."""

        def asked(name: str) -> int | None:
            own = (getattr(config, name, None) for config in (generation_config, self.generation_config))
            return next((value for value in (kwargs.get(name), *own) if value is not None), None)

        if (beams := asked("num_beams")) is not None and beams < 1:
            raise ValueError(f"`num_beams` must be at least 1, got {beams}.")
        prefix, new = kwargs.get("decoder_input_ids"), asked("max_new_tokens")
        if new is not None:
            if new < 1:
                raise ValueError(f"`max_new_tokens` must be at least 1, got {new}.")
            # The last token is never read.
            check_decoder_length("max_new_tokens", new + (0 if prefix is None else prefix.shape[1] - 1), self.config)
        elif asked("max_length") is not None:
            check_decoder_length("max_length", asked("max_length") - 1, self.config)

    def _complete_cached(self, kwargs: dict) -> None:
        """Gives a mask to the tokens before the answer where a cache holds them, and refuses the cache without them."""
        past, prefix = kwargs.get("past_key_values"), kwargs.get("decoder_input_ids")
        held = int(past.get_seq_length()) if isinstance(past, Cache) else 0
        if not held:
            return
        if prefix is None or prefix.shape[1] <= held:
            got = "none" if prefix is None else prefix.shape[1]
            raise ValueError(
                f"`past_key_values` hold {held} tokens of each text: give all that is written so far as `decoder_input_ids`, "
                f"those tokens and at least one more; got {got}."
            )
        # Without a mask transformers has an encoder-decoder read again what its cache holds.
        if kwargs.get("decoder_attention_mask") is None:
            kwargs["decoder_attention_mask"] = torch.ones_like(prefix)


# So that a saved checkpoint brings this file along.
HiViLTForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["HiViLTForConditionalGeneration"]
