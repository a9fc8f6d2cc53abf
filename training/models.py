"""The model of a run: a checkpoint, or a new one on encoders that are pretrained or small."""

import json
import logging
import os
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ResNetConfig,
    T5Config,
    ViTImageProcessorPil,
)

from hivilt.configuration_hivilt import HiViLTConfig
from hivilt.modeling_hivilt import HiViLTPreTrainedModel
from hivilt.processing_hivilt import HiViLTProcessor
from hivilt.training.arguments import TaskArguments
from hivilt.training.names import did_you_mean, loading

logger = logging.getLogger(__name__)

# Parameters from which a model is not small: its tensors keep several CPU threads busy.
SMALL = 10_000_000

# Of a tokenizer that is made here.
MOST_PIECES = 8192

# The fusion of the small model; with two pretrained encoders HiViLTConfig's own defaults apply.
SMALL_FUSION = {"hidden_size": 64, "fusion_intermediate_size": 128, "num_attention_heads": 4}
SMALL_FUSION |= {"num_fusion_stages": 3, "dropout": 0.0}


def small_vision_config() -> ResNetConfig:
    """A ResNet of 0.6 M parameters, for training from scratch on a CPU; 8, 16 and 32 pixels to a token.

    From a few thousand images it learns shapes in fewer epochs than a ConvNeXtV2 or a ViT of its size. Its batch norms see
    the images of one step on one process, so its loss depends a little on how a batch is cut.
    """
    return ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1], layer_type="basic")


def small_text_config(vocab_size: int) -> T5Config:
    """A T5 encoder of two layers, for training from scratch.

    It normalises first, is initialised for its width and adds no positions to its words, so that it tells words apart
    from the first steps on, where a BERT of its size needs epochs.
    """
    return T5Config(vocab_size=vocab_size, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = MOST_PIECES, max_length: int = 64, min_count: int = 1
) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of `vocab_size` pieces at most, lower case, with BERT's special tokens; texts of more than
    `max_length` tokens are cut.

    Its pieces are the most frequent of the words that occur `min_count` times, and all characters to spell the others
    with. `tokenizers` has a trainer, too, but it draws pieces anew in every process, and processes that train together must
    agree.
    """
    normalizer, pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    learned = _pieces(texts, normalizer, pre_tokenizer, min_count)
    pieces = list(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *learned]))[:vocab_size]

    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    reads = {"model_max_length": max_length, "model_input_names": ["input_ids", "attention_mask"]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **reads)


def _pieces(texts: Iterable[str], normalizer, pre_tokenizer, min_count: int) -> list[str]:
    """The characters of these texts, and their words, the most frequent first; some may be there twice."""
    counts = Counter(
        word for text in texts for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text))
    )
    characters = sorted(set("".join(counts)))
    words = [word for word in counts if counts[word] >= min_count]
    words.sort(key=lambda word: (-counts[word], word))
    return [*characters, *(f"##{character}" for character in characters), *words]


def learn_words(model: HiViLTPreTrainedModel, processor: HiViLTProcessor, texts: Iterable[str]) -> list[str]:
    """Makes room for the words of these texts that the model's tokenizer would spell, or not know, if it is one of
    `train_tokenizer`, up to `MOST_PIECES`; returns them. Pieces that there were keep their numbers and their embeddings. A model that writes is left
    as it is, as its decoder has words of its own.
    """
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast or model.can_generate():
        return []
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    vocabulary = state["model"].get("vocab")
    # A pretrained one knows parts of words, and not single characters alone.
    if state["model"].get("type") != "WordPiece" or any(
        piece.startswith("##") and len(piece) > 3 for piece in vocabulary
    ):
        return []
    found = dict.fromkeys(_pieces(texts, backend.normalizer, backend.pre_tokenizer, min_count=1))
    new = [piece for piece in found if piece not in vocabulary][: max(0, MOST_PIECES - len(vocabulary))]
    if new:
        vocabulary |= {piece: len(vocabulary) + place for place, piece in enumerate(new)}
        special = {name: getattr(tokenizer, name) for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
        reads = {name: getattr(tokenizer, name) for name in ("model_max_length", "model_input_names")}
        backend = Tokenizer.from_str(json.dumps(state))
        processor.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special, **reads)
        model.resize_token_embeddings(len(vocabulary), mean_resizing=False)
    return [piece for piece in new if len(piece.removeprefix("##")) > 1]


def load_checkpoint(
    argument: str, name: str, model_class: type, any_head: bool = False, **config: Any
) -> tuple[HiViLTPreTrainedModel, HiViLTProcessor]:
    """A checkpoint's model, in float32, and its processor.

    Args:
        argument: what the caller calls the `name`, for errors.
        any_head: whether a checkpoint with another head will do; the new one is as it was initialized.
        **config: fields of its config to change.

    Raises:
        ValueError: it has another head, is no HiViLT, or its tokenizer is of another model.
        OSError: there is none of this name.
    """
    with loading(argument, name):
        saved = HiViLTConfig.get_config_dict(name)[0]
        saved_as = saved.get("architectures") or ["an unknown class"]
        if not any_head and model_class.__name__ not in saved_as:
            raise ValueError(
                f"{argument}: {name} is a checkpoint of {', '.join(saved_as)}, expected {model_class.__name__}, whose head "
                "would be untrained: train it first, or name another checkpoint."
            )
        if saved.get("model_type") != HiViLTConfig.model_type:
            raise ValueError(
                f"{argument}: {name} is a checkpoint of {', '.join(saved_as)}, expected a HiViLT; an encoder alone goes "
                "into --vision_model or --text_model."
            )
        changed = {"config": HiViLTConfig.from_dict({**saved, **config})} if config else {}
        model = model_class.from_pretrained(name, dtype=torch.float32, **changed)
        processor = HiViLTProcessor.from_pretrained(name)
    _check_tokens(argument, name, model, processor.tokenizer)
    return model, processor


def _check_tokens(argument: str, name: str, model: HiViLTPreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer with a token for which the text encoder has no embedding."""
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    known = getattr(model.config.text_config, "vocab_size", None)
    if known is not None and number >= known:
        raise ValueError(
            f"{argument}: the tokenizer in {name} has the token {token!r} of number {number:,}, but the text encoder knows "
            f"{known:,}; it is of another model. Put back the one that the model was trained with."
        )


def load_or_build(
    args: TaskArguments,
    model_class: type,
    texts: Iterable[str] = (),
    trains: bool = False,
    resumed: str | os.PathLike | None = None,
    **config: Any,
) -> tuple[HiViLTPreTrainedModel, HiViLTProcessor]:
    """A model in float32 and its processor: the checkpoint that is named, or a new one on the encoders that are.

    Args:
        args: an encoder that they do not name is small and new, and so is its tokenizer, trained on `texts`. A checkpoint that
            has such a tokenizer learns their words, see `learn_words`, unless its text encoder is frozen.
        trains: whether the model is to be trained, so that a checkpoint with another head will do.
        resumed: the checkpoint that training goes on from, whose tokenizer is used in place of a trained one.
        **config: fields of `HiViLTConfig` for a new model.
    """
    changes = args.fusion or {}
    if args.model_name_or_path:
        name = args.model_name_or_path
        model, processor = load_checkpoint("model_name_or_path", name, model_class, trains, **changes)
        size = getattr(processor.image_processor, "size", None)
        if args.image_size != TaskArguments.image_size and size != {
            "height": args.image_size,
            "width": args.image_size,
        }:
            logger.warning(f"image_size: got {args.image_size}, but {name} sees images as it was trained with: {size}.")
        reads_on = trains and not any(part.partition(":")[0] == "text" for part in args.freeze)
        if resumed is not None:
            processor = HiViLTProcessor.from_pretrained(resumed)
            number = len(processor.tokenizer)
            if number > getattr(model.config.text_config, "vocab_size", number):
                model.resize_token_embeddings(number, mean_resizing=False)
        elif reads_on and (words := learn_words(model, processor, texts)):
            logger.info(
                f"{len(words):,} words of the training texts are new to {name}, and are learned: {reprlib.repr(words)}"
            )
        return model, processor

    remote = {"trust_remote_code": args.trust_remote_code}
    if args.vision_model:
        with loading("vision_model", args.vision_model):
            image_processor = AutoImageProcessor.from_pretrained(args.vision_model, **remote)
        if args.image_processor:
            image_processor = change_image_processor(image_processor, args.image_processor)
    else:
        size = {"height": args.image_size, "width": args.image_size}
        # Not the torchvision one, which differs a little: a checkpoint gives the same numbers wherever it is made.
        image_processor = ViTImageProcessorPil(size=size)
    if args.text_model:
        with loading("text_model", args.text_model):
            tokenizer = AutoTokenizer.from_pretrained(args.text_model, **remote)
    elif resumed is not None:
        tokenizer = HiViLTProcessor.from_pretrained(resumed).tokenizer
    else:
        tokenizer = train_tokenizer(texts, min_count=args.min_word_count)

    fusion = {} if args.vision_model and args.text_model else SMALL_FUSION
    model = model_class.from_vision_text_pretrained(
        args.vision_model or small_vision_config(),
        args.text_model or small_text_config(len(tokenizer)),
        **{**fusion, **config, **changes},
    )
    if args.text_model:
        _check_tokens("text_model", args.text_model, model, tokenizer)
    if model.config.max_text_length is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.max_text_length)
    return model, HiViLTProcessor(image_processor, tokenizer)


def change_image_processor(image_processor: BaseImageProcessor, changes: Mapping[str, Any]) -> BaseImageProcessor:
    """An image processor like this one but for some fields; `ValueError` for fields and values that it does not take."""
    fields_of = image_processor.to_dict()
    for name in changes:
        if name not in fields_of:  # transformers would drop it without a word
            kind = type(image_processor).__name__
            raise ValueError(f"image_processor: {kind} has no field {name}{did_you_mean(name, fields_of)}")
        if isinstance(fields_of[name], bool) and not isinstance(changes[name], bool):
            raise ValueError(f"image_processor: {name} is true or false, got {changes[name]!r}.")
    try:
        return type(image_processor).from_dict({**fields_of, **changes})
    except (ValueError, TypeError) as error:
        raise ValueError(f"image_processor: {error}") from error


def freeze_parts(model: HiViLTPreTrainedModel, freeze: list[str]) -> None:
    """Freezes what `--freeze` names: parts of a HiViLT, or of an encoder the first layers, as `text:4`; `ValueError` where
    it has fewer."""
    for one in freeze:
        part, _, num_layers = one.partition(":")
        try:
            model.freeze(part, int(num_layers) if num_layers else None)
        except ValueError as error:
            raise ValueError(f"freeze: got {one!r}. {error}") from error


def tell_of_thawed(args: TaskArguments) -> None:
    """Says which parts of the checkpoint that is trained on were frozen in the run that made it, as the `results.json` in its
    folder has it, and are not now."""
    if args.model_name_or_path is None:
        return
    try:
        results = json.loads(Path(args.model_name_or_path, "results.json").read_text(encoding="utf-8"))
        before = list(results["settings"]["freeze"])
    except (OSError, ValueError, KeyError, TypeError):  # a name on the Hub, or a file of something else
        return
    now = {one.partition(":")[0] for one in args.freeze}
    if thawed := " ".join(one for one in before if one.partition(":")[0] not in now):
        kept = " ".join([*args.freeze, thawed])
        logger.info(
            f"{thawed}: frozen in the run that made {args.model_name_or_path}, and trains now; --freeze {kept} leaves it so."
        )


def parameter_table(model: HiViLTPreTrainedModel) -> str:
    """Parameters of each part of a HiViLT, and how many of them train."""
    base = model.base_model
    parts = {"vision": base.vision_model, "text": base.text_model, "fusion": base.fusion}
    rows = {name: set(part.parameters()) for name, part in parts.items()}
    rows["head"] = set(model.parameters()).difference(*rows.values())
    rows["all"] = set(model.parameters())
    lines = [f"{'part':8}{'parameters':>14}{'training':>14}"]
    for name, parameters in rows.items():
        training = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        lines.append(f"{name:8}{sum(parameter.numel() for parameter in parameters):14,}{training:14,}")
    return "\n".join(lines)


def set_threads(args: TaskArguments, model: HiViLTPreTrainedModel) -> None:
    """Lets torch use as many CPU threads as `num_threads` says; unset, the process's share of the machine, and of a small
    model no more than keep busy."""
    threads = args.num_threads
    if threads is None:
        small = sum(parameter.numel() for parameter in model.parameters()) < SMALL
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        threads = min(threads, args.threads_of_small) if small else threads
    torch.set_num_threads(threads)
