"""The noun of the workshop: what a head learns from, how a batch of it is made, what is measured, drawn and reported."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils.data import Dataset

from hivilt.data.augmentation import Augmentation
from hivilt.data.benchmarks import Benchmark
from hivilt.modeling_hivilt import HiViLTPreTrainedModel
from hivilt.processing_hivilt import HiViLTProcessor
from hivilt.training.arguments import HiViLTTrainingArguments, TaskArguments
from hivilt.training.models import load_or_build
from hivilt.training.resuming import checkpoint_to_resume
from hivilt.training.trainer import HiViLTTrainer


class Task:
    """What a head learns. A new head is a subclass of this, a reader of its data and a metric; `hivilt.training.main.main`
    runs it, and calls the methods in the order in which they stand here.

    Args:
        args: the flags of the task.
        training_args: those of training; unset, the task reads data and makes batches, and does not run.
    """

    name: ClassVar[str]  # for people: "question answering"
    script: ClassVar[str]  # the file that runs it
    pipeline_tag: ClassVar[str]  # the Hub's name of it
    card_template: ClassVar[str]  # in this folder: what the model card says of this task alone
    arguments: ClassVar[type[TaskArguments]]  # of `hivilt.tasks.arguments`
    benchmarks: ClassVar[Mapping[str, Benchmark]]
    model_class: ClassVar[type[HiViLTPreTrainedModel]]
    trainer_class: ClassVar[type[HiViLTTrainer]]

    def __init__(self, args: TaskArguments, training_args: HiViLTTrainingArguments | None = None):
        self.args = args
        self.training_args = training_args
        self.benchmark = self.benchmarks.get(args.benchmark)

    @cached_property
    def resumed(self) -> str | None:
        """The checkpoint that training goes on from; `None` where it begins."""
        return checkpoint_to_resume(self.training_args)

    @property
    def metric(self) -> str:
        """The metric that is printed first, and that checkpoints are chosen by unless that is the loss."""
        metric = self.training_args.metric_for_best_model.removeprefix("eval_")
        return self.args.defaults["metric_for_best_model"] if metric == "loss" else metric

    def instead(self) -> Any:
        """Does what the flags ask for in place of training and measuring, and returns what came of it; `None`: nothing."""

    def read(self, splits: Collection[str]) -> tuple[str, dict[str, list]]:
        """The name of the data that the arguments name, and those of these splits that there are."""
        raise NotImplementedError

    def hold_out_by(self, example: Any) -> Sequence[str]:
        """What stays on one side when examples are held out of training: the images, unless the benchmark says otherwise."""
        return example.image_ids if self.benchmark is None else self.benchmark.hold_out_by(example)

    def prepare(self, splits: dict[str, list]) -> dict[str, list]:
        """The splits as they are used, training examples drawn or worded anew."""
        return splits

    def make_model(self, train: list | None, **config: Any) -> tuple[HiViLTPreTrainedModel, HiViLTProcessor]:
        """The model and its processor, to be measured alone if there are no training examples; `config` is of a new one."""
        if train is None and not self.args.model_name_or_path:
            raise ValueError("There is nothing to evaluate: give --model_name_or_path a checkpoint, or --do_train.")
        texts = [text for example in train or () for text in self.texts_of(example)]
        return load_or_build(self.args, self.model_class, texts, train is not None, self.resumed, **config)

    def texts_of(self, example: Any) -> Sequence[str]:
        """What a new tokenizer learns from of a training example."""
        raise NotImplementedError

    def make_dataset(self, split: str, examples: list) -> tuple[Dataset, dict[str, Any]]:
        """The data set of a split, and what it holds, as `results.json` has it: at least how many `images` and how many of what
        `HiViLTTrainer.unit` names."""
        raise NotImplementedError

    def collator(self, processor: HiViLTProcessor, augmentation: Augmentation | None) -> Any:
        """What makes a batch of examples."""
        raise NotImplementedError

    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments of `trainer_class` beside those that all trainers take."""
        return {}

    def measure_more(self, trainer: HiViLTTrainer, metrics: dict[str, dict], datasets: Mapping[str, Dataset]) -> None:
        """Adds to the metrics of the splits, as `hivilt.training.main.run` gives them, what is asked for beside them."""

    def write(self, folder: Path, dataset: Dataset, predictions: Any) -> None:
        """Writes and draws the predictions of the test split, on the main process."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What else `results.json` holds."""
        return {}

    def compare(
        self, trainer: HiViLTTrainer, results: dict[str, Any], datasets: Mapping[str, Dataset]
    ) -> tuple[str, float, float, int] | None:
        """Adds baselines to the results of a training. Returns the metric that counts with its value on validation, what
        one without the images would reach, and what it was measured on, so that chance is told; `None`: no validation."""

    def card(self, trainer: HiViLTTrainer, results: Mapping[str, Any], splits: Mapping[str, list]) -> dict[str, Any]:
        """What the model card says of this task: arguments of `hivilt.training.cards.write_model_card`."""
        raise NotImplementedError

    def summary(self, results: Mapping[str, Any], split: str) -> str:
        """What is printed of a split that was measured."""
        raise NotImplementedError

    def try_next(self, folder: Path) -> str:
        """The command to try a trained checkpoint with."""
        raise NotImplementedError


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes predictions, one JSON object a line."""
    # A file's name may be no Unicode; written so, it is an escape of JSON.
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def spread(length: int, most: int) -> list[int]:
    """Places from all over a split of this length, to be drawn."""
    return torch.linspace(0, length - 1, min(most, length)).int().tolist()
