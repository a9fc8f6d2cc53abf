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
from transformers.utils.generic import flatten_dict

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


# What a config or an image processor says of how it was saved and how it runs, not of what weights mean; of encoders answers.
_NOT_WEIGHTS = {"_attn_implementation", "_name_or_path", "architectures", "auto_map", "dtype", "id2label", "label2id"}
_NOT_WEIGHTS |= {"num_hard_negatives", "return_loss", "transformers_version", "use_cache"}
_NOT_WEIGHTS |= {"image_processor_type", "processor_class", "_processor_class"}
# What makes each part of a model; of others the flag --fusion.
_MADE_BY = {"vision_config": "--vision_model", "text_config": "--text_model", "id2label": "answers"}
_MADE_BY |= {"image_processor": "--image_size, --vision_model", "problem_type": "answers a question"}


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
        differences += _differences(HiViLTConfig.from_pretrained(checkpoint).to_dict(), model.config.to_dict())
    if isinstance(processor, HiViLTProcessor) and (checkpoint / PROCESSOR_NAME).exists():
        both = HiViLTProcessor.from_pretrained(checkpoint), processor
        before, now = (_rules(one.tokenizer) for one in both)
        if before != now:
            differences.append("its tokenizer (--text_model) is another one")
        differences += _differences(*({"image_processor": one.image_processor.to_dict()} for one in both))
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} is of another model than this run would train: "
            f"{'; '.join(differences[:3])}{more}. Give the flags and data that it was trained with, or begin anew in another "
            "--output_dir."
        )


def _rules(tokenizer: Any) -> dict[str, Any]:
    """How a tokenizer cuts, numbers and marks texts; a call changes its padding and truncation."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"vocab": tokenizer.get_vocab()}
    return {name: value for name, value in rules.items() if name not in ("padding", "truncation")}


def _differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    """Says of answers, and of fields that both have, what differs; what kind an encoder is comes first."""
    # As JSON has them: lists, no tuples.
    before, now = (flatten_dict(json.loads(json.dumps(fields, default=str))) for fields in (saved, own))
    for name in sorted(before | now, key=lambda name: (not name.endswith("model_type"), name)):
        part, *_ = parts = name.split(".")
        compared = part == "id2label" or (name in before and name in now and _NOT_WEIGHTS.isdisjoint(parts))
        was, is_now = before.get(name), now.get(name)
        # A new model learns its kind of labels from the first batch.
        if compared and was != is_now and not (name == "problem_type" and None in (was, is_now)):
            yield f"{name} ({_MADE_BY.get(part, '--fusion')}) was {was!r} and is {is_now!r}"
