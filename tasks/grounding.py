"""Visual grounding: its data, its trainer, what it measures and reports."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from hivilt.data.augmentation import Augmentation
from hivilt.data.grounding import (
    Box,
    GroundedImage,
    GroundingCollator,
    GroundingColumns,
    GroundingDataset,
    read_grounding_table,
)
from hivilt.data.grounding_benchmarks import GROUNDING_BENCHMARKS
from hivilt.data.tables import image_size, open_image
from hivilt.evaluation.grounding import COUNTS, grounding_scores, phrase_recall
from hivilt.evaluation.plots import GroundedExpression, plot_grounding
from hivilt.grounding_hivilt import HiViLTForVisualGrounding
from hivilt.inputs_hivilt import batched_boxes
from hivilt.losses_hivilt import grounding_loss
from hivilt.processing_hivilt import HiViLTProcessor
from hivilt.tasks.arguments import GroundingArguments
from hivilt.tasks.task import Task, spread, write_rows
from hivilt.training.cards import python_literal
from hivilt.training.results import warn_of_few
from hivilt.training.splits import read_drawn, read_splits
from hivilt.training.trainer import HiViLTTrainer

logger = logging.getLogger("hivilt")

MOST_BOXES = 100  # of an expression that are measured, as COCO counts detections
SHOWN_BOXES = 10  # that predictions.jsonl has of it, and those that are kept besides
RECALL_AT = (1, 5, 10)

NAMES = {
    "accuracy@0.5": "Acc@0.5",
    "mean_iou": "mean IoU",
    "multi_target_accuracy": "accuracy of several",
    "pointing_game": "pointing game",
    "target_accuracy": "T-acc",
    "no_target_accuracy": "N-acc",
    **{f"recall@{k}": f"R@{k}" for k in RECALL_AT},
}


class GroundingTrainer(HiViLTTrainer):
    """
    Trains and evaluates on a `GroundingDataset`. A batch is of images with their expressions, and `per_device_train_batch_size`
    counts images, while losses and metrics count expressions: the loss of a step is the mean over all of them, whatever
    the images, accumulated batches and processes.

    Args:
        threshold: lowest score of a box that is kept, see `grounding_scores`.
        measures_phrases: whether `phrase_recall` is measured too, as Flickr30k Entities wants.

    Raises:
        ValueError: `label_smoothing_factor` is set; boxes are not smoothed.
    """

    unit = "expressions"
    place_name = "expression_index"
    placed = "texts"

    def __init__(self, *args, threshold: float = 0.5, measures_phrases: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: got {self.args.label_smoothing_factor}, but boxes are not smoothed; leave it out."
            )
        self.threshold = threshold
        self.measures_phrases = measures_phrases

    def measure(self, model, batches, dataset):
        """Looks for every expression of a `GroundingDataset`.

        Returns:
            For each expression, in the dataset's order, a dict of `boxes` [[left, top, right, bottom], ...], relative to the
            image, within it and the best first, and of their `scores`, the best `MOST_BOXES`; where boxes are known what
            `grounding_scores` and `phrase_recall` give, without what they tell by kind in training; `loss`, where all are
            known; the number of expressions.
        """
        measured = self.measure_each(batches, partial(self.find, model), dataset)
        predictions, losses = map(list, zip(*measured, strict=True))

        metrics = self.scores(predictions, dataset)
        if None not in losses:
            metrics["loss"] = fmean(losses)
        if self.is_in_train:
            metrics = {name: value for name, value in metrics.items() if not isinstance(value, dict)}
        return predictions, metrics, len(predictions)

    def find(self, model, inputs: dict[str, Any]) -> Iterable[tuple[dict[str, list], float | None]]:
        """The boxes of each expression of a batch, as `measure` gives them, and its loss if all boxes of the batch are known."""
        labels = inputs.pop("labels", None)
        images = {name: inputs.pop(name) for name in ("pixel_values", "feature_maps") if name in inputs}
        image_states = model.encode_images(**images)
        outputs = model(**inputs, image_states=image_states)
        found = self.processing_class.post_process_grounding(outputs, threshold=0.0, top_k=MOST_BOXES)
        predictions = [{name: values.tolist() for name, values in one.items()} for one in found]
        if labels is None:
            return zip(predictions, [None] * len(predictions), strict=True)
        grid = tuple(image_states.level_states[0].shape[1:3])
        rows = (outputs.logits, outputs.pred_boxes, batched_boxes(labels, len(predictions)))
        losses = torch.vmap(lambda *row: grounding_loss(*(tensor[None] for tensor in row), grid))(*rows)
        return zip(predictions, losses.tolist(), strict=True)

    def scores(self, predictions: Sequence[Mapping[str, Any]], dataset: GroundingDataset) -> dict[str, Any]:
        """The metrics of `measure` beside the loss, over the expressions whose boxes are known."""
        references, kinds = references_of(dataset.examples), kinds_of(dataset.examples)
        known = [place for place, boxes in enumerate(references) if boxes is not None]
        if not known:
            return {}
        given = [[values[place] for place in known] for values in (predictions, references)]
        by = {"kinds": kinds and [kinds[place] for place in known]}
        metrics = grounding_scores(*given, **by, threshold=self.threshold)
        if self.measures_phrases:
            recalls = phrase_recall(*given, ks=RECALL_AT, **by)
            for kind, measured in recalls.pop("by_kind", {}).items():
                metrics["by_kind"][kind] |= measured
            metrics |= recalls
        return metrics

    def metrics_of_box(self, box: Box, dataset: GroundingDataset) -> dict[str, float]:
        """The metrics of `measure` that are one number each, of this box for every expression."""
        metrics = self.scores([{"boxes": [box], "scores": [1.0]}] * len(dataset.texts), dataset)
        return {name: value for name, value in metrics.items() if isinstance(value, float)}

    def metric_names(self, dataset: GroundingDataset) -> set[str]:
        return {"loss", *self.metrics_of_box((0.0, 0.0, 1.0, 1.0), dataset)}


class Grounding(Task):
    """Finds in images what expressions mean."""

    name = "visual grounding"
    script = "run_grounding.py"
    pipeline_tag = "zero-shot-object-detection"
    card_template = "grounding.md"
    arguments = GroundingArguments
    benchmarks = GROUNDING_BENCHMARKS
    model_class = HiViLTForVisualGrounding
    trainer_class = GroundingTrainer

    def read(self, splits: Collection[str]) -> tuple[str, dict[str, list[GroundedImage]]]:
        args = self.args
        if args.benchmark == "scenes":
            return read_drawn(args, splits, self.benchmark)
        columns = GroundingColumns(args.image_column, args.expression_column, args.boxes_column, args.image_id_column)

        def of_table(table, source, split, folder):
            form = {"box_form": args.box_form, "box_unit": args.box_unit, "boxes_needed": split != "test"}
            return read_grounding_table(table, columns, source, folder, **form)

        return read_splits(args, splits, of_table, self.benchmark)

    def texts_of(self, example: GroundedImage) -> tuple[str, ...]:
        return example.expressions

    def make_dataset(self, split: str, examples: list[GroundedImage]) -> tuple[GroundingDataset, dict[str, Any]]:
        if split == "train":
            drawn = {"expressions_per_image": self.args.expressions_per_image, "seed": self.training_args.draw_seed}
            dataset = GroundingDataset(examples, **drawn)
        else:
            dataset = GroundingDataset(examples)
            known = sum(boxes is not None for boxes in references_of(examples))
            warn_of_few(split, known, "expressions whose boxes are known")
        logger.info(f"{split}: {len(dataset.texts):,} expressions about {len(dataset):,} images")
        return dataset, {"images": len(dataset), "expressions": len(dataset.texts)}

    def collator(self, processor: HiViLTProcessor, augmentation: Augmentation | None) -> GroundingCollator:
        return GroundingCollator(processor, augmentation)

    def trainer_arguments(self) -> dict[str, Any]:
        return {
            "threshold": self.args.threshold,
            "measures_phrases": self.args.benchmark == "flickr30k-entities",
        }

    def write(self, folder: Path, dataset: GroundingDataset, predictions: list[dict[str, list]]) -> None:
        threshold, rows, found = self.args.threshold, [], iter(predictions)
        for example in dataset.examples:
            size = image_size(example.image)
            rows += [
                prediction_row(example, place, next(found), size, threshold)
                for place in range(len(example.expressions))
            ]
        write_rows(folder / "predictions.jsonl", rows)
        # Images from all over the split, of each another expression.
        first = {}
        for place, image in enumerate(dataset.image_of_expression):
            first.setdefault(image, place)
        cells = []
        for number, image in enumerate(spread(len(dataset), 12)):
            example = dataset.examples[image]
            place = number % len(example.expressions)
            kept = kept_boxes(predictions[first[image] + place], threshold)
            shown = (example.expressions[place], kept, example.boxes[place])
            cells.append(GroundedExpression(open_image(example.image), *shown))
        plot_grounding(cells, folder / "grounding.png")

    def compare(
        self, trainer: GroundingTrainer, results: dict[str, Any], datasets: Mapping[str, GroundingDataset]
    ) -> tuple[str, float, float, int] | None:
        """Beside the mean of all training boxes, given to every expression."""
        boxes = [box for own in references_of(datasets["train"].examples) for box in own]
        if not boxes:
            return None
        box = tuple(map(fmean, zip(*boxes, strict=True)))
        for split in [split for split in ("validation", "test") if self.metric in results.get(split, {})]:
            always = trainer.metrics_of_box(box, datasets[split])
            results[split][f"{self.metric}_of_mean_box"] = always[self.metric]
        validation = results.get("validation", {})
        if (chance := validation.get(f"{self.metric}_of_mean_box")) is None:
            return None
        count = next((name for name, measure in COUNTS.items() if measure == self.metric), "num_expressions")
        return NAMES[self.metric], validation[self.metric], chance, validation[count]

    def summary(self, results: Mapping[str, Any], split: str) -> str:
        return summary_of(results[split], split, self.metric)

    def card(
        self, trainer: GroundingTrainer, results: Mapping[str, Any], splits: Mapping[str, list[GroundedImage]]
    ) -> dict[str, Any]:
        return {
            "metrics": {name: NAMES[name] for name in dict.fromkeys([self.metric, *NAMES])},
            "metric_ids": ["accuracy"],
            "tags": ["visual-grounding", "referring-expression-comprehension"],
            "image": "![Expressions and the boxes that were found](grounding.png)",
            "expressions": python_literal(list(splits["validation"][0].expressions[:2])),
            "threshold": self.args.threshold,
        }

    def try_next(self, folder: Path) -> str:
        find = f"pipeline('zero-shot-object-detection', {str(folder)!r}, trust_remote_code=True)"
        asked = "'image.png', candidate_labels=['the red circle']"
        return f'python -c "from transformers import pipeline; print({find}({asked}))"'


def references_of(examples: Iterable[GroundedImage]) -> list[tuple[Box, ...] | None]:
    """The boxes of all expressions, in order."""
    return [boxes for example in examples for boxes in example.boxes]


def kinds_of(examples: Sequence[GroundedImage]) -> list[str | None] | None:
    """The kinds of all expressions, in order; `None` where none is known."""
    if not any(example.kinds for example in examples):
        return None
    return [kind for example in examples for kind in example.kinds or [None] * len(example.expressions)]


def kept_boxes(found: Mapping[str, list], threshold: float) -> list[list[float]]:
    """The boxes of an expression that the model answers with."""
    return [box for box, score in zip(found["boxes"], found["scores"], strict=True) if score >= threshold]


def prediction_row(
    example: GroundedImage, place: int, found: Mapping[str, list], size: tuple[int, int], threshold: float
) -> dict[str, Any]:
    """An expression of predictions.jsonl, by its place among those of its image, which has this width and height."""
    in_pixels = lambda boxes: [[edge * side for edge, side in zip(box, size * 2, strict=True)] for box in boxes]
    count, true = max(SHOWN_BOXES, len(kept_boxes(found, threshold))), example.boxes[place]
    return {
        "image": example.image_id,
        "expression": example.expressions[place],
        **({"kind": example.kinds[place]} if example.kinds else {}),
        "boxes": in_pixels(found["boxes"][:count]),
        "scores": found["scores"][:count],
        "true_boxes": None if true is None else in_pixels(true),
    }


def summary_of(measured: Mapping[str, Any], split: str, metric: str) -> str:
    """The metric that counts, the others, and these by kind of expression where the data tells kinds, as lines."""
    names = [name for name in dict.fromkeys([metric, *NAMES]) if name in measured]
    if not names:
        return ""
    told = lambda measures, names: ", ".join(
        f"{NAMES[name]} {measures[name]:.4f}" for name in names if name in measures
    )
    lines = [f"{split}: {told(measured, names)} on {measured['num_expressions']:,} expressions"]
    if (always := measured.get(f"{metric}_of_mean_box")) is not None:
        lines.append(f"  always the mean of all training boxes: {NAMES[metric]} {always:.4f}")
    for kind, measures in measured.get("by_kind", {}).items():
        # Of the mean overlap and the rate of answers, only the whole is told.
        shown = [name for name in names if name not in ("mean_iou", "pointing_game", "target_accuracy")]
        if line := told(measures, shown):
            lines.append(f"  {kind}: {line} on {measures['num_expressions']:,}")
    return "\n".join(lines)
