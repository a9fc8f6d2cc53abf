"""The collection of images that a script searches or asks."""

import math
import time
from pathlib import Path
from typing import Any

from hivilt.modeling_hivilt import HiViLTPreTrainedModel
from hivilt.search import ImageIndex
from hivilt.tasks.arguments import IndexArguments
from hivilt.training.arguments import HiViLTTrainingArguments
from hivilt.training.models import load_or_build, set_threads


def open_index(
    args: IndexArguments, training_args: HiViLTTrainingArguments, model_class: type[HiViLTPreTrainedModel], **more: Any
) -> ImageIndex | None:
    """The index that the flags name, as it is, or of the images that they name, built in `output_dir` as far as it is not there
    yet. Several processes build together; then one reads, and the others get `None`.

    Args:
        model_class: of the checkpoint; one that is not named is that of the index, or where images are to be encoded what the
            script leaves by default.
        **more: arguments of `ImageIndex.build`.
    """
    given = [name for name in ("do_train", "do_eval", "do_predict") if getattr(training_args, name)]
    if len(given) < 3:  # without any of them it is all three
        raise ValueError(
            f"{given[0]}: images of an index are searched or asked, no data to train or measure on; leave it out."
        )
    is_index = args.index is None or ImageIndex.is_at(args.index)
    place = Path(args.index if args.index is not None and is_index else training_args.output_dir)
    if args.model_name_or_path is None:
        args.model_name_or_path = ImageIndex.made_by(place) if is_index else args.defaults["output_dir"]
    model, processor = load_or_build(args, model_class)
    set_threads(args, model)
    model = model.to(training_args.device).eval()
    if is_index:
        if training_args.process_index > 0:
            return None
        index = ImageIndex.load(place, model, processor)
        if all(getattr(args, name) is None for name in args.reads_index):
            print(f"{len(index):,} images of {index.folder} in {place}")
        return index
    start = time.perf_counter()
    index = ImageIndex.build(
        args.index,
        model,
        processor,
        place,
        batch_size=training_args.per_device_eval_batch_size,
        on_bad_image=args.on_bad_image,
        max_states_bytes=None if args.states_gb in (None, math.inf) else int(args.states_gb * 1e9),
        **more,
    )
    if training_args.process_index > 0:
        return None
    took = time.perf_counter() - start
    encoded = f", {index.num_encoded:,} of them encoded now in {took:.1f} s" if index.num_encoded else ""
    print(f"{len(index):,} images of {args.index} in {place}{encoded}")
    return index
