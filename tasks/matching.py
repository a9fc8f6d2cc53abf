"""Matching of images with texts: what a model of retrieval makes of Winoground and SugarCrepe."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hivilt.data.augmentation import Augmentation
from hivilt.data.matching import Matching, MatchingCollator, MatchingDataset
from hivilt.data.reasoning_benchmarks import MATCHING_BENCHMARKS
from hivilt.data.tables import open_image
from hivilt.evaluation.plots import AnsweredQuestion, plot_predictions
from hivilt.evaluation.reasoning import sugarcrepe_scores, winoground_scores
from hivilt.modeling_hivilt import HiViLTForRetrieval
from hivilt.processing_hivilt import HiViLTProcessor
from hivilt.tasks.arguments import ReasoningArguments
from hivilt.tasks.task import Task, spread, write_rows
from hivilt.training.splits import read_splits
from hivilt.training.trainer import HiViLTTrainer

logger = logging.getLogger("hivilt")

# What pairs are scored by, as a search does: embeddings, fusion, and the two together, by which it re-ranks.
STAGES = {"embedding_": "embeddings", "fused_": "fusion alone", "": "both"}
HEADLINES = ("text_score", "image_score", "group_score", "accuracy")


class MatchingTrainer(HiViLTTrainer):
    """Measures `HiViLTForRetrieval` on a `MatchingDataset`. A batch is of images with all their examples, and
    `per_device_eval_batch_size` counts items of the data set, while metrics count examples."""

    unit = "examples"
    place_name = "matching_index"

    def measure(self, model, batches, dataset):
        """Scores every image of an example with every text of it.

        Returns:
            For each example, in the dataset's order, the scores (images, texts) of each of `STAGES`, in [-1, 1]; of each the
            metrics, with its name in front; the number of examples.
        """
        shape = (-1, len(dataset.examples[0].images), len(dataset.examples[0].texts))
        predictions = self.measure_each(batches, partial(self.scores, model, shape), dataset)
        metrics: dict[str, Any] = {}
        for stage in STAGES:
            scores = np.stack([prediction[stage] for prediction in predictions])
            metrics |= {f"{stage}{name}": value for name, value in matching_scores(scores, dataset.examples).items()}
        return predictions, metrics, len(predictions)

    def scores(self, model, shape: tuple[int, int, int], inputs: dict[str, Any]) -> Iterable[dict[str, np.ndarray]]:
        """The scores of each example of a batch, as `measure` gives them; all of the batch are of this shape."""
        pairs = image_index, text_index = [inputs.pop(name) for name in ("image_index", "text_index")]
        images = {name: inputs.pop(name) for name in ("pixel_values", "feature_maps") if name in inputs}
        image_states, text_states = model.encode_images(**images), model.encode_texts(**inputs)
        embeds = model.embed_images(image_states)[image_index], model.embed_texts(text_states)[text_index]
        cosines = (embeds[0].float() * embeds[1].float()).sum(dim=-1)
        fused = model.score(image_states, text_states, *pairs)
        found = [one.cpu().numpy().reshape(shape) for one in (cosines, fused, model.ranking_score(cosines, fused))]
        return [dict(zip(STAGES, own, strict=True)) for own in zip(*found, strict=True)]


class ImageTextMatching(Task):
    """Tells which of some texts goes with which of some images; trains nothing."""

    name = "image-text matching"
    script = "run_reasoning.py"
    pipeline_tag = "zero-shot-image-classification"
    arguments = ReasoningArguments
    benchmarks = MATCHING_BENCHMARKS
    model_class = HiViLTForRetrieval
    trainer_class = MatchingTrainer

    def read(self, splits: Collection[str]) -> tuple[str, dict[str, list[Matching]]]:
        return read_splits(self.args, splits, None, self.benchmark)

    def make_dataset(self, split: str, examples: list[Matching]) -> tuple[MatchingDataset, dict[str, Any]]:
        dataset = MatchingDataset(examples)
        num_images = len({image_id for one in examples for image_id in one.image_ids})
        logger.info(f"{split}: {len(examples):,} examples about {num_images:,} images")
        return dataset, {"images": num_images, "examples": len(examples)}

    def collator(self, processor: HiViLTProcessor, augmentation: Augmentation | None) -> MatchingCollator:
        return MatchingCollator(processor)

    def write(self, folder: Path, dataset: MatchingDataset, predictions: Sequence[Mapping[str, np.ndarray]]) -> None:
        write_rows(folder / "predictions.jsonl", map(prediction_row, dataset.examples, predictions))
        cells = [drawn(dataset.examples[place], predictions[place][""]) for place in spread(len(dataset.examples), 12)]
        plot_predictions(cells, folder / "predictions.png", "Images and the text that goes best with each")

    def summary(self, results: Mapping[str, Any], split: str) -> str:
        measured = results[split]
        names = [name for name in HEADLINES if name in measured]
        lines = [f"{split}: {measured['num_examples']:,} examples"]
        for stage, title in STAGES.items():
            told = ", ".join(f"{name.replace('_', ' ')} {measured[f'{stage}{name}']:.4f}" for name in names)
            lines.append(f"  {title}: {told}")
        return "\n".join(lines)


def matching_scores(scores: np.ndarray, examples: Sequence[Matching]) -> dict[str, Any]:
    """The metrics of a data set, by its form: those of Winoground of scores (N, 2, 2), of SugarCrepe of (N, 1, 2)."""
    kinds = [one.kind for one in examples]
    if scores.shape[1] == 1:
        return sugarcrepe_scores(scores[:, 0], kinds)
    return winoground_scores(scores, kinds if any(kinds) else None)


def drawn(example: Matching, scores: np.ndarray) -> AnsweredQuestion:
    """The first image of an example, with its texts, the best first."""
    best = [{"answer": example.texts[place], "score": None} for place in np.argsort(-scores[0], kind="stable")]
    return AnsweredQuestion(open_image(example.images[0]), example.kind or "", best, example.texts[0])


def prediction_row(example: Matching, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """An example of predictions.jsonl; scores are image by image, a score a text."""
    measured = matching_scores(scores[""][None], [example])
    right = {name: bool(measured[name]) for name in HEADLINES if name in measured}
    return {
        "images": list(example.image_ids),
        "texts": list(example.texts),
        **({} if example.kind is None else {"kind": example.kind}),
        **{f"{stage}scores": scores[stage].tolist() for stage in STAGES},
        "correct": right.get("group_score", right.get("accuracy")),
        **{name: value for name, value in right.items() if name != "accuracy"},
    }
