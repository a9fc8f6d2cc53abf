"""The splits of a run: read, limited, checked, and held out where there are none to choose by."""

import json
import logging
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from hivilt.data.benchmarks import Benchmark
from hivilt.data.folders import read_folder
from hivilt.data.tables import TableImage, check_images, content_hash, hold_out, image_bytes
from hivilt.training.arguments import HiViLTTrainingArguments, TaskArguments
from hivilt.training.resuming import checkpoint_to_resume

logger = logging.getLogger(__name__)

# What a run held out of its training data, beside its checkpoints.
HELD_OUT = "held_out.json"


def read_splits(
    args: TaskArguments,
    splits: Collection[str],
    read_table: Callable[[Any, str | None, str, Path | None], list],
    benchmark: Benchmark | None = None,
) -> tuple[str, dict[str, list]]:
    """The data that the arguments name, or a `benchmark` whose copy they may name: its name, and those of the `splits`
    "train", "validation" and "test" that there are.

    Args:
        read_table: gives the examples of a file, a table of `datasets` or a list of rows, by what to call it, the split, and
            the folder where relative image paths start; `None` for a file's own.
    """
    if benchmark is not None:
        return benchmark.title, _read_benchmark(args, splits, benchmark)
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    files = {split: Path(file) for split, file in files.items() if file}
    if files:
        # Files are called train or test; it is their folder that has a name.
        name = next(iter(files.values())).resolve().parent.name
        return name, {split: read_table(file, None, split, None) for split, file in files.items() if split in splits}
    name = args.dataset_name or args.data_dir
    # A folder goes by its own name, wherever it lies.
    name = Path(name).name if Path(name).exists() else name
    named = {split: official or split for split, official in _named_splits(args).items() if split in splits}
    tables = read_folder(args.dataset_name, args.dataset_config_name, args.data_dir, set(named.values()))
    return name, {
        split: read_table(tables[table][0], f"{name}, {table}", split, tables[table][1])
        for split, table in named.items()
        if table in tables
    }


def _named_splits(args: TaskArguments) -> dict[str, str | None]:
    return {"train": args.train_split, "validation": args.validation_split, "test": args.test_split}


def _read_benchmark(args: TaskArguments, splits: Collection[str], benchmark: Benchmark) -> dict[str, list]:
    official = {split: named or benchmark.splits.get(split) for split, named in _named_splits(args).items()}
    if args.validation_split is None and (official["validation"] or "") in (official["train"] or "").split("+"):
        # What is trained on cannot be chosen by: images are held out instead.
        official["validation"] = None
    where = (args.data_dir, args.image_dir, args.dataset_name, args.dataset_config_name)
    return {split: benchmark.read(name, *where) for split, name in official.items() if name and split in splits}


def read_drawn(args: TaskArguments, splits: Collection[str], benchmark: Benchmark) -> tuple[str, dict[str, list]]:
    """As `read_splits`, of a benchmark that is drawn: at the size that the model sees, and no more than are used."""
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_predict_samples}
    drawn = {}
    for split in splits:
        read = partial(benchmark.read_package, image_size=args.image_size, most=limits[split])
        drawn |= _read_benchmark(args, [split], replace(benchmark, read_package=read))
    return benchmark.title, drawn


def prepare_splits(
    args: TaskArguments,
    training_args: HiViLTTrainingArguments,
    read: Callable[[Collection[str]], tuple[str, dict[str, list]]],
    hold_out_by: Callable[[Any], Sequence[str]] = attrgetter("image_ids"),
) -> tuple[str, dict[str, list], dict[str, list[str]], list[str] | None]:
    """The splits that this run needs, with examples held out of training where there is nothing else to choose by. A run
    that goes on holds out what it held out before, whatever rows came or went since.

    Args:
        read: gives the name of the data and, of the splits it is asked for, those that there are.
        hold_out_by: what stays on one side when examples are held out, see `hold_out`; default: images.

    Returns:
        The name of the data, its splits, which of their images are bad, and what was held out (`None`: nothing was).

    Raises:
        ValueError: a split that is needed is not there, nothing is left of what was held out, or images are missing.
    """
    needed = {
        "train": training_args.do_train,
        "validation": training_args.do_train or training_args.do_eval,
        "test": training_args.do_predict,
    }
    if args.calibrate and not needed["validation"]:
        raise ValueError("calibrate: a temperature is fitted on validation data; give --do_eval, or leave it out.")
    # A checkpoint that is calibrated learns what is familiar to it, too, where its training data is.
    wanted = [split for split in needed if needed[split] or (split == "train" and args.calibrate)]
    held_out = None
    # The main process writes what is cached; the others find it there.
    with training_args.main_process_first(desc="reading the data"):
        name, splits = read(wanted)
        if needed["validation"] and "validation" not in splits and "train" not in splits:
            splits |= read(["train"])[1]
    if needed["validation"] and "validation" not in splits and "train" in splits:
        checkpoint = checkpoint_to_resume(training_args)
        before = checkpoint and Path(checkpoint).parent / HELD_OUT
        drawn = json.loads(before.read_text(encoding="utf-8")) if before and before.is_file() else None
        splits["train"], splits["validation"] = hold_out(
            splits["train"], seed=training_args.seed, by=hold_out_by, chosen=drawn
        )
        sides = (side for example in splits["validation"] for side in hold_out_by(example))
        held_out = list(dict.fromkeys(sides)) if drawn is None else drawn
    missing = [split for split in needed if needed[split] and split not in splits]
    if missing == ["test"] and training_args.do_train:
        logger.warning(f"{name}: no test data (--test_file or --test_split), so nothing is predicted.")
    elif missing:
        flags = " and ".join(f"--{split}_file (or --{split}_split of a dataset)" for split in missing)
        there = f"there is only {', '.join(splits)}" if splits else "there is none of it"
        raise ValueError(f"{name}: this run needs {', '.join(missing)} data, {there}: give {flags}.")

    known: dict[str, str] = {}  # what tells each image, and the split that it came in first
    for split in ("train", "validation", "test") if args.benchmark is None else ():
        ids = {
            image: image_id
            for one in splits.get(split, ())
            for image_id, image in zip(one.image_ids, one.images, strict=True)
        }
        images = {_told_by(image, None if args.image_id_column else own): image for image, own in ids.items()}
        if both := sorted(images.keys() & known.keys(), key=lambda one: str(images[one])):
            logger.warning(
                f"{split}: {len(both)} of its {len(images)} images, {images[both[0]]} first, are in {known[both[0]]} data, too, so "
                "what is measured on it says little of other images. Give images that are in one file alone."
            )
        known = dict.fromkeys(images, split) | known
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_predict_samples}
    used, bad_images = {}, {}
    for split in [split for split in splits if split in wanted]:
        examples = splits[split][: limits[split]]
        used[split], bad_images[split] = check_images(examples, args.on_bad_image, f"{name}, {split}")
    return name, used, bad_images, held_out


def _told_by(image: str | TableImage, known_hash: str | None) -> str:
    """What tells an image from others, in whatever table: the real path of its file; of one inside a table the hash of its
    bytes, which is its id unless the data gives ids."""
    if isinstance(image, str):
        return os.path.realpath(image)
    return known_hash or content_hash(image_bytes(image))
