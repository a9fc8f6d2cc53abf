"""Checkpoints that a run goes on from: which is the last whole one, and whether it is of the model that the run trains."""

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME

from hivilt.configuration_hivilt import HiViLTConfig
from hivilt.processing_hivilt import HiViLTProcessor
from hivilt.training.arguments import HiViLTTrainingArguments

logger = logging.getLogger(__name__)


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The last checkpoint of a run that was written to its end; `None` if there is none, or no `folder`. Those that were
    cut off are named in a warning and left where they are."""
    for path in reversed(checkpoints(folder)):
        if is_whole(path):
            return str(path)
        logger.warning(f"{path} was not written to its end, so training does not go on from it; it can be deleted.")
    return None


def checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The checkpoints of a run, whole or not, in the order of their steps."""
    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if re.search(r"-\d+$", path.name)]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: Trainer writes its state last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def checkpoint_to_resume(training_args: HiViLTTrainingArguments) -> str | None:
    """The folder of the checkpoint that training goes on from; `None` where it begins, `ValueError` if it is not whole."""
    named = training_args.resume_from_checkpoint if training_args.do_train else None
    if named is True:
        return last_checkpoint(training_args.output_dir)
    if named is not None:
        _check_whole(Path(named))
    return named


def _check_whole(checkpoint: Path) -> None:
    if not is_whole(checkpoint):
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} is no checkpoint that was written to its end; name another, or 'last' "
            "for the last whole one of output_dir."
        )


# What a config or an image processor says of how it was saved and how it runs, not of what weights mean; and answers,
# which are compared by themselves.
_NOT_WEIGHTS = {"_attn_implementation", "_name_or_path", "architectures", "auto_map", "dtype", "id2label", "label2id"}
_NOT_WEIGHTS |= {"num_hard_negatives", "return_loss", "transformers_version", "use_cache"}
_NOT_WEIGHTS |= {"image_processor_type", "processor_class", "_processor_class"}
# The flag that makes each part of a config.
_FLAGS = {"vision_config": "--vision_model", "text_config": "--text_model", "problem_type": "answers a question"}


def check_resumable(checkpoint: str | os.PathLike, model: PreTrainedModel, processor: Any = None) -> None:
    """Refuses to lay the weights of a checkpoint over a model whose answers, tokens or layers mean something else. Only of
    a `HiViLTProcessor` anything is compared.

    Raises:
        ValueError: the checkpoint was cut off, has no state of the optimizer, or does not fit; names what differs.
    """
    checkpoint = Path(checkpoint)
    _check_whole(checkpoint)
    if not (checkpoint / SCHEDULER_NAME).exists():
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} holds the model only (save_only_model), so that optimizer and learning "
            f"rate would start over half-way; begin anew from its weights with --model_name_or_path {checkpoint} and "
            "another --output_dir."
        )
    differences = []
    if (checkpoint / CONFIG_NAME).exists():  # of adapters alone there is none
        differences += _config_differences(HiViLTConfig.from_pretrained(checkpoint), model.config)
    if isinstance(processor, HiViLTProcessor) and (checkpoint / PROCESSOR_NAME).exists():
        differences += _processor_differences(HiViLTProcessor.from_pretrained(checkpoint), processor)
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} is of another model than this run would train: "
            f"{'; '.join(differences[:3])}{more}. Give the flags and data that it was trained with, or begin anew in another "
            "--output_dir."
        )


def _config_differences(saved: HiViLTConfig, own: HiViLTConfig) -> Iterator[str]:
    # Encoders of another kind have other fields, and `model_type` in common.
    differences = sorted(_differences(saved, own), key=lambda found: not found[0].endswith("model_type"))
    for name, before, now in differences:
        # A new model learns its kind of labels from the first batch.
        if name != "problem_type" or None not in (before, now):
            yield f"{name} ({_FLAGS.get(name.split('.')[0], '--fusion')}) was {before!r} and is {now!r}"
    if saved.id2label != own.id2label:
        before, now = saved.id2label, own.id2label
        label = next(label for label in before | now if before.get(label) != now.get(label))
        was = f"answer {label} was {before.get(label)!r} and is {now.get(label)!r}"
        yield f"its {len(before)} answers are not the {len(now)} of this run: {was}"


def _processor_differences(saved: HiViLTProcessor, own: HiViLTProcessor) -> Iterator[str]:
    saved_ids, own_ids = saved.tokenizer.get_vocab(), own.tokenizer.get_vocab()
    token = next((token for token in sorted(saved_ids | own_ids) if saved_ids.get(token) != own_ids.get(token)), None)
    if token is not None:
        was = f"{token!r} was token {saved_ids.get(token)} and is {own_ids.get(token)}"
        yield f"its tokenizer is another one (--text_model): {was}"
    elif _rules(saved.tokenizer) != _rules(own.tokenizer):
        yield "its tokenizer (--text_model) cuts texts otherwise"
    for name, before, now in _differences(saved.image_processor, own.image_processor):
        yield f"{name} of its image processor (--image_size, --vision_model) was {before!r} and is {now!r}"


def _rules(tokenizer: Any) -> dict[str, Any]:
    """How a tokenizer cuts and marks texts; a call changes its padding and truncation."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    return {name: value for name, value in rules.items() if name not in ("padding", "truncation")}


def _differences(saved: Any, own: Any) -> Iterator[tuple[str, Any, Any]]:
    """Fields that both have with another value, in the order of their names."""
    before, now = dict(_flat(saved.to_dict())), dict(_flat(own.to_dict()))
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            yield name, before[name], now[name]


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if name in _NOT_WEIGHTS:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", list(value) if isinstance(value, tuple) else value
