"""Reasoning over images: its data, its trainer, what it measures and reports."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from hivilt.configuration_hivilt import HiViLTConfig
from hivilt.data.augmentation import Augmentation
from hivilt.data.reasoning import (
    ReasoningCollator,
    ReasoningDataset,
    Statement,
    StatementColumns,
    label_ids,
    label_words,
    labels_by_spelling,
    read_statements,
)
from hivilt.data.reasoning_benchmarks import REASONING_BENCHMARKS
from hivilt.data.tables import open_image
from hivilt.evaluation.plots import AnsweredQuestion, plot_predictions
from hivilt.evaluation.reasoning import plain_label, statement_scores
from hivilt.processing_hivilt import HiViLTProcessor
from hivilt.reasoning_hivilt import HiViLTForImagesAndTextClassification
from hivilt.tasks.arguments import ReasoningArguments
from hivilt.tasks.question_answering import QuestionAnsweringTrainer
from hivilt.tasks.task import Task, spread, write_rows
from hivilt.training.cards import python_literal
from hivilt.training.names import loading
from hivilt.training.results import warn_of_few
from hivilt.training.splits import read_drawn, read_splits

logger = logging.getLogger("hivilt")

GAP = 0.05  # between the images of a statement as they are drawn, of the height of the first
TALLEST, WIDEST = 256, 3  # of an image as it is drawn, in pixels, and as often as it is high


class ReasoningTrainer(QuestionAnsweringTrainer):
    """Trains and evaluates on a `ReasoningDataset`, in all else as question answering does. A batch is of statements with
    their images; `per_device_train_batch_size` counts items of the data set, each of statements that share images, while losses
    and metrics count statements.
    """

    unit = "statements"
    place_name = "statement_index"

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> LRScheduler:
        """Trainer's; after the `first_epochs` of the data the rate warms up once more, as gradients are others then."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        # Another data set than ours, or a part of one, has none.
        if not (first_epochs := getattr(self.train_dataset, "first_epochs", 0)):
            return scheduler
        if isinstance(scheduler, LambdaLR):
            # As `auto_find_batch_size` has it by now.
            batches = len(self.train_dataset) / (self._train_batch_size * self.args.world_size)
            batches = math.floor(batches) if self.args.dataloader_drop_last else math.ceil(batches)
            begin = first_epochs * math.ceil(batches / self.args.gradient_accumulation_steps)
            if begin >= num_training_steps:
                logger.warning(
                    f"first_epochs: all {num_training_steps:,} steps have what is to be learned first, and the rest is not learned; "
                    f"train for more than {begin:,}."
                )
            steps = self.args.get_warmup_steps(num_training_steps)
            scheduler.lr_lambdas = [partial(warmed_up_again, rate, begin, steps) for rate in scheduler.lr_lambdas]
        else:
            logger.warning(
                f"first_epochs: with {self.args.lr_scheduler_type} the learning rate does not warm up once more."
            )
        return scheduler

    def is_labelled(self, example: Statement) -> bool:
        return example.label is not None

    def _metrics(self, predictions: list[list[dict]], examples: list[Statement]) -> dict[str, Any]:
        known = [
            (best[0]["answer"], one) for best, one in zip(predictions, examples, strict=True) if one.label is not None
        ]
        if not known:
            return {}
        given, said = zip(*known, strict=True)
        # By their numbers, as predictions.jsonl tells what is right: it is the model that says which spellings are one.
        label2id = self.accelerator.unwrap_model(self.model).config.label2id
        true = label_ids(said, label2id)
        groups, kinds = ([getattr(one, name) for one in said] for name in ("group", "kind"))
        return statement_scores([label2id.get(answer) for answer in given], true, groups, kinds if any(kinds) else None)


class Reasoning(Task):
    """Tells which of some labels, mostly true or false, a sentence has of several images together."""

    name = "reasoning over images"
    script = "run_reasoning.py"
    pipeline_tag = "visual-question-answering"  # the nearest of the Hub's
    card_template = "reasoning.md"
    arguments = ReasoningArguments
    benchmarks = REASONING_BENCHMARKS
    model_class = HiViLTForImagesAndTextClassification
    trainer_class = ReasoningTrainer
    label2id: dict[str, int] = {}  # once there is a model
    num_images = 0  # the same

    def read(self, splits: Collection[str]) -> tuple[str, dict[str, list[Statement]]]:
        args = self.args
        if args.benchmark == "pairs":
            return read_drawn(args, splits, self.benchmark)
        columns = StatementColumns(
            args.images_column, args.sentence_column, args.label_column, args.statement_id_column
        )
        of_table = lambda table, source, split, folder: read_statements(table, columns, source, folder, split != "test")
        return read_splits(args, splits, of_table, self.benchmark)

    def texts_of(self, example: Statement) -> tuple[str]:
        return (example.sentence,)

    def make_model(self, train: list[Statement] | None) -> tuple[HiViLTForImagesAndTextClassification, HiViLTProcessor]:
        """The model and its processor; if it trains, with the labels of the data as its classes."""
        if train is None:
            model, processor = super().make_model(None)
        else:
            labels, num_images, knows = self._labels(train), len(train[0].images), self._knows_labels()
            if self.args.model_name_or_path and not knows:
                # Another head's weights, which do not depend on it.
                self.args.fusion = {**(self.args.fusion or {}), "num_images": num_images}
            model, processor = super().make_model(train, id2label=dict(enumerate(labels)), num_images=num_images)
            if knows and are_known(train, model.config):
                if len(labels) < (number := model.config.num_labels):
                    logger.info(
                        f"Of the {number} labels that the checkpoint knows the training data has {len(labels)}; all are kept."
                    )
            elif list(model.config.id2label.values()) != labels:
                if knows:
                    spell_alike(model.config, labels)
                model.resize_answer_head(labels)
            model.config.problem_type = "single_label_classification"
        self.label2id, self.num_images = dict(model.config.label2id), model.config.num_images
        return model, processor

    def _labels(self, train: list[Statement]) -> list[str]:
        """The classes: the labels of the training data, in the order of the checkpoint that training goes on from."""
        labels = label_words(train)
        if self.resumed is None:
            return labels
        config = HiViLTConfig.from_pretrained(self.resumed)
        if not are_known(train, config):
            known, new = (", ".join(map(repr, words)) for words in (config.label2id, labels))
            raise ValueError(
                f"resume_from_checkpoint: {self.resumed} knows the labels {known}, but this run's are {new}; give the data that it "
                "was trained with."
            )
        return [config.id2label[label] for label in sorted(config.id2label)]

    def _knows_labels(self) -> bool:
        """Whether the checkpoint that is trained on has this head; another's answers are none of its labels."""
        name = self.args.model_name_or_path
        if name is None:
            return False
        with loading("model_name_or_path", name):
            return self.model_class.__name__ in (HiViLTConfig.get_config_dict(name)[0].get("architectures") or ())

    def make_dataset(self, split: str, examples: list[Statement]) -> tuple[ReasoningDataset, dict[str, Any]]:
        if (num_images := len(examples[0].images)) != self.num_images:
            raise ValueError(
                f"{split}: its statements are about {num_images} images each, but the model looks at {self.num_images} together "
                "(config.num_images); train one on statements about as many."
            )
        facts = {
            "images": len({image_id for statement in examples for image_id in statement.image_ids}),
            "statements": len(examples),
            "images_of_a_statement": num_images,
        }
        logger.info(f"{split}: {len(examples):,} statements about {facts['images']:,} images, {num_images} each")
        label_ids(examples, self.label2id, split)  # before anything is trained
        if split != "train":
            known = sum(statement.label is not None for statement in examples)
            warn_of_few(split, known, "statements with a known label")
            return ReasoningDataset(examples), facts
        first_epochs = self.args.first_epochs
        if first_epochs and not any(statement.stage == 0 for statement in examples):
            raise ValueError(
                f"first_epochs: got {first_epochs}, but the training data does not say what is to be learned first; leave it out."
            )
        return ReasoningDataset(examples, self.training_args.draw_seed, first_epochs), facts

    def collator(self, processor: HiViLTProcessor, augmentation: Augmentation | None) -> ReasoningCollator:
        return ReasoningCollator(processor, self.label2id, augmentation)

    def write(self, folder: Path, dataset: ReasoningDataset, predictions: list[list[dict]]) -> None:
        known = labels_by_spelling(self.label2id)
        write_rows(folder / "predictions.jsonl", map(partial(prediction_row, known), dataset.examples, predictions))
        # From all over the split, of each item another statement.
        groups = [dataset.groups[place] for place in spread(len(dataset.groups), 12)]
        shown = [group[number % len(group)] for number, group in enumerate(groups)]
        cells = [drawn(known, dataset.examples[place], predictions[place]) for place in shown]
        plot_predictions(cells, folder / "predictions.png")

    def facts(self) -> dict[str, Any]:
        return {"labels": list(self.label2id)} if self.label2id else {}

    def compare(
        self, trainer: ReasoningTrainer, results: dict[str, Any], datasets: Mapping[str, ReasoningDataset]
    ) -> tuple[str, float, float, int] | None:
        """Beside the training statements' most frequent label, given to every statement."""
        counts = Counter(label_ids(datasets["train"].examples, self.label2id))
        label = max(self.label2id, key=lambda word: counts[self.label2id[word]])
        for split in [split for split in ("validation", "test") if self.metric in results.get(split, {})]:
            always = trainer.metrics_of_answer(label, datasets[split])
            results[split] |= {f"{self.metric}_of_majority_label": always[self.metric], "majority_label": label}
        validation = results.get("validation", {})
        if (chance := validation.get(f"{self.metric}_of_majority_label")) is None:
            return None
        return self.metric, validation[self.metric], chance, validation["num_statements"]

    def summary(self, results: Mapping[str, Any], split: str) -> str:
        return summary_of(results[split], split, self.metric) if self.metric in results[split] else ""

    def card(
        self, trainer: ReasoningTrainer, results: Mapping[str, Any], splits: Mapping[str, list[Statement]]
    ) -> dict[str, Any]:
        names = dict.fromkeys([self.metric, "accuracy", "consistency"])
        return {
            "metrics": {name: name for name in names},
            "metric_ids": ["accuracy"],
            "tags": ["visual-reasoning"],
            "image": "![Statements and what the model makes of them](predictions.png)",
            "num_images": self.num_images,
            "files": python_literal(self._files()),
            "labels": ", ".join(self.label2id),
            "sentence": python_literal(splits["validation"][0].sentence),
        }

    def try_next(self, folder: Path) -> str:
        judge = f"pipeline('images-and-text-classification', {str(folder)!r}, trust_remote_code=True)"
        asked = f"{self._files()}, 'both images show a circle'"
        return f'python -c "from transformers import pipeline; print({judge}({asked}))"'

    def _files(self) -> list[str]:
        """Names of the images of a statement, to show how the model is asked."""
        if self.num_images == 2:
            return ["left.png", "right.png"]
        return [f"image{number}.png" for number in range(1, self.num_images + 1)]


def warmed_up_again(rate: Callable[[int], float], begin: int, warmup_steps: int, step: int) -> float:
    """The factor of a schedule of the learning rate that rises from 0 once more, over so many steps after `begin`."""
    return rate(step) * (min(1.0, (step - begin) / warmup_steps) if warmup_steps and step >= begin else 1.0)


def are_known(statements: Sequence[Statement], config: HiViLTConfig) -> bool:
    """Whether their labels, in any spelling, are of those that a model tells apart."""
    try:
        label_ids(statements, config.label2id)
    except ValueError:
        return False
    return True


def spell_alike(config: HiViLTConfig, labels: list[str]) -> None:
    """Gives the classes of a checkpoint that are among the labels, too, the spelling that they have there: "yes" for "True".
    A class that two labels may mean stays as it is, so that neither is taken for it, unless one is it word for word.
    """
    known = labels_by_spelling(config.label2id)
    meant = {word: known[plain_label(word)] for word in labels if plain_label(word) in known}
    claims, words = Counter(meant.values()), {plain_label(word) for word in config.label2id}
    spelling = {label: word for word, label in meant.items() if claims[label] == 1 or plain_label(word) in words}
    config.id2label = {label: spelling.get(label, word) for label, word in config.id2label.items()}
    config.label2id = {word: label for label, word in config.id2label.items()}


def is_right(known: Mapping[str, int], answer: str, label: str) -> bool:
    """Whether an answer is the label, by the label that each spelling of `known` has, see `labels_by_spelling`."""
    return known[plain_label(answer)] == known[plain_label(label)]


def prediction_row(known: Mapping[str, int], statement: Statement, best: list[dict]) -> dict[str, Any]:
    """A statement of predictions.jsonl; `known` as in `is_right`."""
    optional = {name: value for name in ("kind", "group") if (value := getattr(statement, name)) is not None}
    label = statement.label
    return {
        "statement_id": statement.statement_id,
        "images": list(statement.image_ids),
        "sentence": statement.sentence,
        **optional,
        "label": label,
        "predictions": best,
        "correct": None if label is None else is_right(known, best[0]["answer"], label),
    }


def drawn(known: Mapping[str, int], statement: Statement, best: list[dict]) -> AnsweredQuestion:
    """A statement of predictions.png, its images side by side; `known` as in `is_right`."""
    label = statement.label
    if label is not None and is_right(known, best[0]["answer"], label):
        label = best[0]["answer"]  # right, however it is spelled
    return AnsweredQuestion(
        side_by_side([open_image(image) for image in statement.images]), statement.sentence, best, label
    )


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """Images of one height, the first one's, from left to right, with white between them; one that is very wide is less high."""
    height = min(images[0].height, TALLEST)
    scales = [min(height / image.height, WIDEST * height / image.width) for image in images]
    sizes = [[max(1, round(scale * side)) for side in image.size] for scale, image in zip(scales, images, strict=True)]
    resized = [image.resize(size) for image, size in zip(images, sizes, strict=True)]
    gap = max(1, round(GAP * height))
    row = Image.new("RGB", (sum(image.width + gap for image in resized) - gap, height), "white")
    left = 0
    for image in resized:
        row.paste(image, (left, 0))
        left += image.width + gap
    return row


def summary_of(measured: Mapping[str, Any], split: str, metric: str) -> str:
    """The metric that counts, the others, and these by kind of statement where the data tells kinds, as lines."""
    names = [name for name in dict.fromkeys([metric, "accuracy", "consistency"]) if name in measured]
    told = lambda measures: ", ".join(f"{name} {measures[name]:.4f}" for name in names if name in measures)
    lines = [f"{split}: {told(measured)} on {measured['num_statements']:,} statements"]
    if (always := measured.get(f"{metric}_of_majority_label")) is not None:
        frequent = f"always {measured['majority_label']!r}, the most frequent training label"
        lines.append(f"  {frequent}: {metric} {always:.4f}")
    for kind, measures in measured.get("by_kind", {}).items():
        lines.append(f"  {kind}: {told(measures)} on {measures['num_statements']:,}")
    return "\n".join(lines)
