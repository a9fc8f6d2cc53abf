"""What every run does: reads its arguments and data, builds a model, trains, saves, draws, evaluates, reports."""

import ctypes
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from hivilt.data.augmentation import Augmentation
from hivilt.evaluation.plots import plot_training
from hivilt.tasks.task import Task
from hivilt.training.arguments import HiViLTTrainingArguments, TaskArguments
from hivilt.training.cards import write_model_card
from hivilt.training.encoder_cache import EncoderCache
from hivilt.training.models import freeze_parts, parameter_table, set_threads, tell_of_thawed
from hivilt.training.results import collect_results, warn_of_chance, write_json
from hivilt.training.resuming import checkpoints, is_whole
from hivilt.training.splits import HELD_OUT, prepare_splits
from hivilt.training.trainer import HiViLTTrainer

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


class _BeginsAnew(TrainerCallback):
    """Removes the checkpoints of an earlier run, from which this one could not be told when it is resumed, and the state
    that says that the run was finished: not before the first step is due, since until then arguments may be refused."""

    def __init__(self, trainer: HiViLTTrainer, held_out: list[str] | None):
        self.trainer = trainer
        self.held_out = held_out

    def on_train_begin(self, args, state, control, **kwargs):
        if args.should_save:
            folder = Path(args.output_dir)
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
            if old := checkpoints(folder):
                said = f"the {len(old)} checkpoints of an earlier run are removed"
                logger.warning(f"{folder}: training begins anew; {said}.")
            for path in old:
                shutil.rmtree(path)
            (folder / HELD_OUT).unlink(missing_ok=True)
            if self.held_out is not None:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / HELD_OUT, self.held_out)
        self.trainer.accelerator.wait_for_everyone()


def begin_run(args: TaskArguments, training_args: HiViLTTrainingArguments) -> None:
    """Looks whether what the arguments name is there, and sets logging, threads and seed as they say.

    Raises:
        ValueError: also where the launcher started several processes that do not know of each other.
        OSError, ValueError: see `check_output_dir`.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > training_args.world_size:
        raise ValueError(
            f"This is one of {started} processes, each of which would train by itself, since it sees no GPU: start one, or "
            "give --use_cpu to train together on the CPU."
        )
    args.check_places()
    check_output_dir(args, training_args)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hivilt").setLevel(logging.INFO if training_args.process_index == 0 else logging.ERROR)
    torch.set_num_threads(args.num_threads or 1)
    keep_memory()
    set_seed(training_args.seed)


def keep_memory() -> None:
    """Lets glibc keep the memory that a step frees, since the next step needs as much. Large tensors would go back to the
    system each time, and their pages be filled with zeros anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none
        for setting, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(setting, value)


def check_output_dir(args: TaskArguments, training_args: HiViLTTrainingArguments) -> None:
    """Refuses an `output_dir` in which a run cannot write what it makes, by an `OSError`, or would begin anew over an
    earlier one unasked, by a `ValueError`; leaves nothing there."""
    folder = Path(training_args.output_dir)
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"output_dir: {folder} cannot be a folder, since {place} is a file; name another.")
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        reason = error.strerror
        raise PermissionError(f"output_dir: nothing can be written in {place} ({reason}); name another.") from error
    if not training_args.do_train or training_args.resume_from_checkpoint or args.overwrite_output_dir:
        return
    begins = Path(args.model_name_or_path or "")
    if args.model_name_or_path and begins.is_dir() and folder.is_dir() and folder.samefile(begins):
        raise ValueError(
            f"output_dir: {folder} is what model_name_or_path names, and training would write over it. Name another "
            "--output_dir, or do so with --overwrite_output_dir."
        )
    whole = [path for path in checkpoints(folder) if is_whole(path)]
    finished = (folder / TRAINER_STATE_NAME).exists()  # which a run writes last
    if finished or whole:
        goes_on = "" if finished else f", up to {whole[-1].name}: go on with --resume_from_checkpoint last"
        raise ValueError(
            f"output_dir: {folder} holds a run that was {'' if finished else 'not '}finished{goes_on}. Name another "
            "--output_dir, or begin anew over it with --overwrite_output_dir."
        )


def augmentation_of(args: TaskArguments) -> Augmentation | None:
    """What the arguments say to do to training images; `None` for nothing."""
    rand_augment = None if args.rand_augment is None else tuple(args.rand_augment)
    asked = {"random_crop": args.random_crop, "random_flip": args.random_flip, "rand_augment": rand_augment}
    return None if all(value is None for value in asked.values()) else Augmentation(**asked)


def run(
    trainer: HiViLTTrainer, test_dataset: torch.utils.data.Dataset | None, held_out: list[str] | None, calibrate: bool
) -> tuple[dict[str, dict], Any]:
    """Trains, calibrates, saves, draws the curves, evaluates and predicts, as the flags of `trainer.args` ask; gives metrics
    by split ("train", "validation", "test") and the predictions for `test_dataset`. What was `held_out` of training is noted
    for when this run is resumed."""
    args, metrics, predictions = trainer.args, {}, None
    if args.do_train:
        if not args.resume_from_checkpoint:
            trainer.add_callback(_BeginsAnew(trainer, held_out))
        metrics["train"] = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
    if calibrate:
        trainer.calibrate()
    if args.do_train or calibrate:
        trainer.save_model(_internal_call=True)  # without pushing: card and results are yet to come
        trainer.measure_familiarity()
    if args.do_train and trainer.is_world_process_zero():
        plot_training(trainer.state.log_history, Path(args.output_dir, "training.png"), args.metric_for_best_model)
    if args.do_eval and trainer.eval_dataset is not None:
        metrics["validation"] = trainer.evaluate()
    if args.do_predict and test_dataset is not None:
        output = trainer.predict(test_dataset)
        metrics["test"], predictions = output.metrics, output.predictions
    if args.do_train:
        trainer.save_state()  # last: where it is, the run came to its end
    return metrics, predictions


def main(
    task_class: type[Task],
    argv: list[str] | None = None,
    parsed: tuple[TaskArguments, HiViLTTrainingArguments] | None = None,
) -> Any:
    """Runs a task as the flags in `argv` ask; unset, those of the command line. Gives what `results.json` holds, on the main
    process, or what `Task.instead` gave where the flags ask for that. `parsed`: these flags, where they are read already."""
    start = time.perf_counter()
    args, training_args = parsed or task_class.arguments.parse(sys.argv[1:] if argv is None else argv)
    begin_run(args, training_args)
    task = task_class(args, training_args)
    if (done := task.instead()) is not None:
        return done

    name, splits, bad_images, held_out = prepare_splits(args, training_args, task.read, task.hold_out_by)
    splits = task.prepare(splits)
    model, processor = task.make_model(splits["train"] if training_args.do_train else None)
    freeze_parts(model, args.freeze)
    if training_args.do_train:
        tell_of_thawed(args)
    logger.info(parameter_table(model))
    set_threads(args, model)
    datasets, data = {}, {}
    for split, examples in splits.items():
        datasets[split], facts = task.make_dataset(split, examples)
        data[split] = {**facts, "bad_images": bad_images[split]}

    cache_bytes = None if args.cache_gb is None else int(args.cache_gb * 1e9)
    trainer = task.trainer_class(
        model=model,
        args=training_args,
        train_dataset=datasets.get("train"),
        eval_dataset=datasets.get("validation"),
        data_collator=task.collator(processor, augmentation_of(args)),
        processing_class=processor,
        vision_learning_rate=args.vision_learning_rate,
        text_learning_rate=args.text_learning_rate,
        encoder_cache=EncoderCache(args.cache_dir, cache_bytes, args.cache_dtype) if args.encoder_cache else None,
        **task.trainer_arguments(),
    )
    metrics, predictions = run(trainer, datasets.get("test"), held_out, args.calibrate)
    task.measure_more(trainer, metrics, datasets)

    results: dict[str, Any] = {}
    if trainer.is_world_process_zero():
        folder = Path(training_args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if predictions is not None:
            task.write(folder, datasets["test"], predictions)
        results = collect_results(trainer, args, metrics, data={"name": name, **data}, **task.facts())
        if training_args.do_train and (compared := task.compare(trainer, results, datasets)) is not None:
            warn_of_chance(args, *compared, num_images=data["train"]["images"])
        results["wall_seconds"] = time.perf_counter() - start
        if training_args.do_train:
            card = task.card(trainer, results, splits)
            write_model_card(trainer, args, results, splits, task=task, argv=argv, **card)
        path = folder / "results.json"
        in_place = args.model_name_or_path is not None and Path(args.model_name_or_path).resolve() == folder.resolve()
        if in_place and not training_args.do_train and path.exists():
            # Of this very checkpoint: what is not measured anew holds.
            earlier = json.loads(path.read_text(encoding="utf-8"))
            if args.calibrate:
                earlier.get("test", {}).pop("loss", None)  # of other scores
            results = {**earlier, **results, "data": {**earlier.get("data", {}), **results["data"]}}
        write_json(path, results)
        for split in ("validation", "test"):
            if split in metrics and (told := task.summary(results, split)):
                print(told)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        print(f"Wrote {folder}" + (f"; try it: {task.try_next(folder)}" if training_args.do_train else ""))
    return results
