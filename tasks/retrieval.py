"""Retrieval: its data, its trainer, what it measures and reports; and the search of folders of images."""

import json
import logging
import math
import os
import random
import re
import time
from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from PIL import Image
from transformers.utils import ModelOutput

from hivilt.data.augmentation import Augmentation
from hivilt.data.caption_benchmarks import CAPTION_BENCHMARKS
from hivilt.data.captions import (
    CaptionCollator,
    CaptionColumns,
    CaptionDataset,
    CaptionedImage,
    SimilarCaptionsSampler,
    read_caption_file,
    read_caption_table,
    read_karpathy,
    read_openmoji,
)
from hivilt.data.tables import HEIF_ENDINGS, open_image
from hivilt.evaluation.calibration import calibrate, draw_candidates
from hivilt.evaluation.plots import RetrievedImages, plot_retrieved
from hivilt.evaluation.retrieval import best_first, chance_recall, recall_table, rerank, retrieval_metrics
from hivilt.fusion_hivilt import map_states
from hivilt.losses_hivilt import MAX_LOGIT_SCALE
from hivilt.modeling_hivilt import HiViLTForRetrieval
from hivilt.processing_hivilt import HiViLTProcessor
from hivilt.search import ImageIndex
from hivilt.search.scoring import score_pairs
from hivilt.tasks.task import Task
from hivilt.training.arguments import HiViLTTrainingArguments, TaskArguments
from hivilt.training.cards import python_literal
from hivilt.training.models import load_or_build, set_threads
from hivilt.training.results import warn_of_few
from hivilt.training.resuming import checkpoint_to_resume
from hivilt.training.splits import read_splits
from hivilt.training.trainer import CALIBRATION_IMAGES, HiViLTTrainer

logger = logging.getLogger("hivilt")


@dataclass
class RetrievalArguments(TaskArguments):
    """What only retrieval has."""

    benchmark: str | None = field(
        default=None,
        metadata={
            "help": "Data set of the field: of data_dir, of dataset_name, or as the Hub has it. Unset: openmoji, unless "
            "other data is named.",
            "choices": list(CAPTION_BENCHMARKS),
        },
    )
    caption_column: str = field(
        default="caption", metadata={"help": "Column of a caption or of a list of them; or columns, comma between."}
    )
    karpathy_file: str | None = field(
        default=None, metadata={"help": "JSON in Karpathy's layout, which names its splits; images in image_dir."}
    )
    captions_per_image: int = field(
        default=1, metadata={"help": "Captions of an image in one training batch, drawn anew in every epoch."}
    )
    similar_per_batch: int = field(
        default=4,
        metadata={"help": "Images with similar captions that share a training batch, as hard negatives; 1: none do."},
    )
    num_hard_negatives: int = field(
        default=3, metadata={"help": "Other images of the batch to match a caption against, and captions an image."}
    )
    rerank_k: int = field(
        default=16, metadata={"help": "Candidates of each query that fusion re-ranks; 0 ranks by embeddings alone."}
    )
    contrastive_chunk_size: int | None = field(
        default=None,
        metadata={"help": "Train in chunks of this many images and captions, for batches larger than the memory."},
    )
    index: str | None = field(default=None, metadata={"help": "Folder of images to embed for searching."})
    index_factory: str = field(
        default="Flat", metadata={"help": "FAISS index to search with; Flat is exact, 'IVF256,Flat' faster."}
    )
    query: list[str] | None = field(
        default=None,
        metadata={"help": "Words to search for, quoted, or the path of an image; several are several searches."},
    )
    top_k: int = field(default=10, metadata={"help": "Images that a search prints."})
    rerank: bool = field(default=False, metadata={"help": "Let fusion re-rank the best rerank_k of a search."})

    at_least_one = (
        *TaskArguments.at_least_one,
        "captions_per_image",
        "contrastive_chunk_size",
        "similar_per_batch",
        "top_k",
    )
    places = (*TaskArguments.places, "karpathy_file", "index")

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.query, str):
            self.query = [self.query]
        if (self.index or self.query is not None) and (self.karpathy_file or self.names_data()):
            raise ValueError("index, query: a search reads no data to train or measure on; drop one or the other.")
        if self.karpathy_file and self.names_data():
            raise ValueError("Data can come from one source, got karpathy_file and another; drop all but one.")
        if not (self.names_data() or self.karpathy_file):
            self.benchmark = "openmoji"
        if self.image_dir and not (self.karpathy_file or self.benchmark):
            raise ValueError(
                "image_dir goes with karpathy_file or a benchmark; an image folder with its own metadata is data_dir."
            )
        if self.rerank_k < 0:
            raise ValueError(f"rerank_k: expected 0 or more candidates, got {self.rerank_k}.")
        if self.num_hard_negatives < 1:
            raise ValueError(f"num_hard_negatives: expected at least 1, got {self.num_hard_negatives}.")


# Training


class RetrievalTrainer(HiViLTTrainer):
    """Trains `HiViLTForRetrieval` on a `CaptionDataset` and evaluates retrieval over a whole split.

    Evaluation encodes every image and every caption once, ranks by their embeddings, and re-ranks the best `rerank_k`
    of each query from the encoded states, by `HiViLTForRetrieval.ranking_score`. A pair that is on the shortlist of its
    image and of its caption is fused once.

    Args:
        rerank_k: candidates of each query to re-rank; 0 ranks by the embeddings alone.
        similar_per_batch: images with similar captions to train on together, see `SimilarCaptionsSampler`.
        contrastive_chunk_size: `chunk_size` of `HiViLTForRetrieval.forward` in training.
        fold_size: also report recall as the mean over consecutive folds of so many images with their captions, each
            ranked and re-ranked by itself, of splits with at least two; what is left after the last whole one counts in
            none. MS-COCO's "1K test" is five folds of 1,000 (Karpathy and Fei-Fei 2015; VSE++). Evaluations within
            training do without.
        **kwargs: as `HiViLTTrainer`.
    """

    unit = "captions"

    def __init__(
        self,
        *args,
        rerank_k: int = 16,
        similar_per_batch: int = 1,
        contrastive_chunk_size: int | None = None,
        fold_size: int | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if fold_size is not None and fold_size < 1:
            raise ValueError(f"fold_size: expected at least 1 image, or None for no folds, got {fold_size}.")
        if contrastive_chunk_size is not None and self.is_fsdp_enabled:
            # Weights are gathered for each chunk, and a process with fewer captions has fewer chunks: others would wait.
            raise ValueError(
                f"contrastive_chunk_size: got {contrastive_chunk_size}, expected None under FSDP; save memory by "
                "gradient_checkpointing instead."
            )
        for name, usual in (("label_smoothing_factor", 0.0), ("train_sampling_strategy", "random")):
            if (value := getattr(self.args, name)) != usual:
                raise ValueError(
                    f"{name}: got {value!r}, expected {usual!r}: retrieval has no classes to smooth, and its sampler puts "
                    "similar captions together (similar_per_batch). Leave it out."
                )
        self.rerank_k = rerank_k
        self.similar_per_batch = similar_per_batch
        self.contrastive_chunk_size = contrastive_chunk_size
        self.fold_size = fold_size
        self._losses: dict[str, list[torch.Tensor]] = {}

    def _get_train_sampler(self, train_dataset=None):
        return SimilarCaptionsSampler(train_dataset or self.train_dataset, self.similar_per_batch)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one step; counts their captions."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_captions = torch.tensor([sum(len(batch["input_ids"]) for batch in batches)], device=device)
        self.num_examples_trained += int(self.accelerator.gather(num_captions).sum())
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss; its parts go to the log."""
        inputs = {name: value for name, value in inputs.items() if name != "caption_index"}
        loss, outputs = super().compute_loss(
            model, {**inputs, "chunk_size": self.contrastive_chunk_size}, return_outputs=True
        )
        for name in ("contrastive_loss", "auxiliary_loss"):
            if outputs.get(name) is not None:
                self._losses.setdefault(name, []).append(outputs[name])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the parts of the training loss, mean since the last time."""
        if "loss" in logs:
            logs = {**logs, **{name: torch.stack(values).mean().item() for name, values in self._losses.items()}}
            self._losses = {}
        super().log(logs, *args, **kwargs)

    def metric_names(self, dataset: CaptionDataset) -> set[str]:
        only = torch.zeros(1, 1, dtype=torch.long)
        stages = ("embedding_", "fused_", "") if self.rerank_k else ("embedding_", "")
        return {"loss", *(f"{stage}{name}" for stage in stages for name in retrieval_metrics(only, only, [0]))}

    def measure(self, model, dataloader, description):
        """Ranks all captions for every image and all images for every caption of a `CaptionDataset`.

        Returns:
            `{"image_to_text": LongTensor (B_i, n), "text_to_image": LongTensor (B_t, n)}`, places in the split, best
            first; metrics: those of `retrieval_metrics` for the final ranking, the same with `embedding_` and `fused_` in
            front for the ranking by embeddings alone and by fused similarity alone, `loss`, seconds of each stage and how
            many pairs were fused; with folds their number, and the means of all recalls over them with `fold_` in front,
            while seconds and pairs are those of the split and its folds together; the number of captions.
        """
        start = time.perf_counter()
        images, texts, losses = _Encoded(), _Encoded(), []
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            pairs = {name: inputs.pop(name, None) for name in ("image_index", "image_ids")}
            flags = {"return_loss": True, "gather_negatives": model.config.gather_negatives}
            caption_index = inputs.pop("caption_index")
            shown = {name: inputs.pop(name) for name in ("pixel_values", "feature_maps") if name in inputs}
            image_states, text_states = model.encode_images(**shown), model.encode_texts(**inputs)
            outputs = model(image_states=image_states, text_states=text_states, **pairs, **flags)
            losses.append((outputs.loss.item(), len(caption_index)))
            images.add(pairs["image_ids"], outputs.image_embeds, image_states if self.rerank_k else None)
            texts.add(caption_index, outputs.text_embeds, text_states if self.rerank_k else None)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        dataset, losses = dataloader.dataset, gather_object(losses)
        self._captions = dataset.captions
        images.gather(len(dataset), f"{description}: images")
        texts.gather(len(dataset.captions), f"{description}: captions")
        encoded = time.perf_counter()

        rankings, recalls, costs = self._rank(model, images, texts, dataset.image_of_caption)
        metrics = {"loss": sum(loss * count for loss, count in losses) / sum(count for _, count in losses), **recalls}
        if self.fold_size is not None and not self.is_in_train and len(dataset) >= 2 * self.fold_size:
            folds = []
            for fold in self._folds(images, texts, dataset.image_of_caption):
                _, found, more = self._rank(model, *fold)
                folds.append(found)
                costs = {name: cost + more[name] for name, cost in costs.items()}
            metrics |= {f"fold_{name}": sum(found[name] for found in folds) / len(folds) for name in recalls}
            metrics |= {"num_folds": len(folds), "fold_size": self.fold_size}
        metrics |= {
            "num_images": len(dataset),
            "num_captions": len(dataset.captions),
            "encode_seconds": encoded - start,
            **costs,
        }
        return rankings, metrics, len(dataset.captions)

    def _calibration_split(self, dataset: CaptionDataset) -> CaptionDataset:
        examples = dataset.examples
        if len(examples) > CALIBRATION_IMAGES:
            examples = random.Random(0).sample(examples, CALIBRATION_IMAGES)
        return CaptionDataset(examples)

    def _scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inverse temperatures of `logits_per_image` and of fused matching, as the model bounds them."""
        parameters = (self.model.logit_scale, self.model.matching_logit_scale)
        return tuple(one.detach().double().clamp(0.0, MAX_LOGIT_SCALE).exp().cpu() for one in parameters)

    def _find_temperature(self, model, dataloader):
        """That of `logits_per_image`: of an image, a caption of its own and nine of other images, drawn at random."""
        images, texts = _Encoded(), _Encoded()
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            image_ids, caption_index = inputs.pop("image_ids"), inputs.pop("caption_index")
            inputs.pop("image_index", None)
            outputs = model(**inputs, return_loss=False)
            images.add(image_ids, outputs.image_embeds, None)
            texts.add(caption_index, outputs.text_embeds, None)
        dataset = dataloader.dataset
        images.gather(len(dataset), "calibrate: images")
        texts.gather(len(dataset.captions), "calibrate: captions")
        candidates = draw_candidates(dataset.captions, dataset.image_of_caption)
        if candidates is None:
            return None
        # (B_t, 1, d), (B_t, candidates, d) -> (B_t, candidates)
        similarity = (images.embeds[dataset.image_of_caption][:, None] * texts.embeds[candidates]).sum(dim=-1)
        scale, matching = map(float, self._scales())
        # Both are divided, which leaves the ranking by their weighted mean as it is, and both stay within their bounds.
        least, most = max(scale, matching) / math.exp(MAX_LOGIT_SCALE), min(scale, matching)
        labels = torch.zeros(len(similarity), dtype=torch.long)
        found = calibrate(scale * similarity, labels, least=min(least, 1.0), most=max(most, 1.0))
        return {**found, "num_candidates": candidates.shape[1]}

    def _divide_scores(self, temperature: float) -> None:
        for parameter, scale in zip(
            (self.model.logit_scale, self.model.matching_logit_scale), self._scales(), strict=True
        ):
            parameter.fill_((scale / temperature).log().item())

    def _folds(self, images, texts, image_of_caption):
        """Consecutive `fold_size` images, their captions, and for each of these its image's place in the fold."""
        owners = torch.tensor(image_of_caption)
        for start in range(0, len(images.places) - self.fold_size + 1, self.fold_size):
            stop = start + self.fold_size
            places = ((owners >= start) & (owners < stop)).nonzero().squeeze(1)
            yield images.take(torch.arange(start, stop)), texts.take(places), (owners[places] - start).tolist()

    def _rank(self, model, images, texts, image_of_caption):
        """Ranks all texts for every image and all images for every text, from what was encoded.

        Returns:
            The final rankings, as `measure` gives them; the recalls of every stage; pairs that were fused and seconds.
        """
        start = time.perf_counter()
        # (B_i, projection_dim), (B_t, projection_dim) -> (B_i, B_t)
        similarity = images.embeds.to(self.args.device) @ texts.embeds.to(self.args.device).t()
        shortlist = max(10, self.rerank_k)
        rankings = {
            "embedding_": (best_first(similarity, shortlist).cpu(), best_first(similarity.t(), shortlist).cpu())
        }
        searched = time.perf_counter()

        num_pairs = 0
        if self.rerank_k:
            candidates = rankings["embedding_"]
            *fused, num_pairs = self._fuse_shortlists(model, images, texts, *candidates)
            cosines = [
                scores.gather(1, best[:, : self.rerank_k].to(scores.device)).cpu()
                for scores, best in zip((similarity, similarity.t()), candidates, strict=True)
            ]
            combined = map(model.ranking_score, cosines, fused)
            rankings["fused_"] = tuple(map(rerank, candidates, fused))
            rankings[""] = tuple(map(rerank, candidates, combined))
        else:
            rankings[""] = rankings["embedding_"]

        recalls = {}
        for name, (image_to_text, text_to_image) in rankings.items():
            found = retrieval_metrics(image_to_text, text_to_image, image_of_caption)
            recalls |= {f"{name}{metric}": value for metric, value in found.items()}
        costs = {
            "num_fused_pairs": num_pairs,
            "search_seconds": searched - start,
            "rerank_seconds": time.perf_counter() - searched,
        }
        return dict(zip(("image_to_text", "text_to_image"), rankings[""], strict=True)), recalls, costs

    def _fuse_shortlists(self, model, images, texts, image_to_text, text_to_image):
        """Fused similarities of the first `rerank_k` of both rankings, (B_i, k) and (B_t, k), and how many were computed.

        A pair on both shortlists is fused once; processes share the pairs between them.
        """
        image_to_text, text_to_image = image_to_text[:, : self.rerank_k], text_to_image[:, : self.rerank_k]
        image_index = torch.arange(len(image_to_text))[:, None].expand_as(image_to_text)
        text_index = torch.arange(len(text_to_image))[:, None].expand_as(text_to_image)
        keys = torch.cat(
            [
                (image_index * len(text_to_image) + image_to_text).flatten(),
                (text_to_image * len(text_to_image) + text_index).flatten(),
            ]
        )
        keys, places = keys.unique(return_inverse=True)
        image_places, text_places = keys // len(text_to_image), keys % len(text_to_image)
        # Each process fuses the images that it encoded.
        own = (images.owners[image_places] == self.args.process_index).nonzero().squeeze(1)
        fused = torch.zeros(0)
        if len(own):
            text_states, text_rows = self._text_states(model, texts, text_places[own])
            fused = score_pairs(
                model,
                images.states,
                text_states,
                images.rows[image_places[own]],
                text_rows,
                progress=not self.args.disable_tqdm,
            )
        scores = torch.zeros(len(keys))
        for pairs, part in gather_object([(own, fused)]):
            scores[pairs] = part
        scores = scores[places]
        by_image, by_text = scores.tensor_split([image_to_text.numel()])
        return by_image.view_as(image_to_text), by_text.view_as(text_to_image), len(keys)

    def _text_states(self, model, texts: "_Encoded", places: torch.LongTensor):
        """States of the captions at these places, batch by batch, and the row of each; those of others are encoded here."""
        states, rows = list(texts.states), texts.rows.clone()
        missing = places[rows[places] < 0].unique()
        if len(missing):
            first = sum(len(batch.global_state) for batch in states)
            rows[missing] = first + torch.arange(len(missing))
            captions = self._captions
            for part in texts.places[missing].split(self.args.per_device_eval_batch_size):
                inputs = self._prepare_inputs(self.data_collator.texts([captions[place] for place in part.tolist()]))
                states.append(map_states(torch.Tensor.cpu, model.encode_texts(**inputs)))
        return states, rows[places]


class _Encoded:
    """
    Embeddings and states of one modality, as evaluation finds them batch by batch. On several processes embeddings are
    gathered, and states, which are far larger, stay with the process that encoded them.
    """

    def __init__(self):
        self.numbers: list[torch.Tensor] = []
        self.batches: list[torch.Tensor] = []
        self.states: list[ModelOutput] = []

    def add(self, numbers: torch.Tensor, embeds: torch.Tensor, states: ModelOutput | None) -> None:
        """A batch: places in the split (B,), embeddings (B, projection_dim) and, if they are to be fused, states."""
        self.numbers.append(numbers.cpu())
        self.batches.append(embeds.float().cpu())
        if states is not None:
            self.states.append(map_states(torch.Tensor.cpu, states))

    def gather(self, length: int, what: str) -> None:
        """
        Sets, for all items of the split in its order, `embeds` (length, projection_dim) and `owners` (length,), the
        process that has an item's states; and `rows` (length,), where they lie in this process's batches, -1 elsewhere.
        The last batches of several processes repeat items from the front.
        """
        own = torch.cat(self.numbers) if self.numbers else torch.zeros(0, dtype=torch.long)
        gathered = gather_object([(own, torch.cat(self.batches) if self.batches else None)])
        self.owners = torch.full((length,), -1)
        self.embeds = torch.zeros(length, next(embeds.shape[1] for _, embeds in gathered if embeds is not None))
        for process, (numbers, embeds) in reversed(list(enumerate(gathered))):
            if embeds is not None:
                self.owners[numbers], self.embeds[numbers] = process, embeds
        if (self.owners < 0).any():
            raise RuntimeError(f"{what}: {int((self.owners >= 0).sum())} of {length} were encoded.")
        self.rows = torch.full((length,), -1)
        self.rows[own] = torch.arange(len(own))
        self.places = torch.arange(length)

    def take(self, places: torch.LongTensor) -> "_Encoded":
        """The items at these places of the split; they share their states."""
        taken = copy(self)
        for name in ("embeds", "owners", "rows", "places"):
            setattr(taken, name, getattr(self, name)[places])
        return taken


# The task


class Retrieval(Task):
    """Finds images by texts and texts by images; searches folders of images."""

    name = "retrieval"
    script = "run_retrieval.py"
    pipeline_tag = "zero-shot-image-classification"
    arguments = RetrievalArguments
    defaults = {
        "output_dir": "outputs/retrieval",
        "num_train_epochs": 12,
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 64,
        "learning_rate": 1.5e-3,
        "adam_beta2": 0.98,
        "weight_decay": 0.05,
        "warmup_steps": 0.1,  # a share of all steps
        "metric_for_best_model": "mean_recall",
    }
    benchmarks = CAPTION_BENCHMARKS
    model_class = HiViLTForRetrieval
    trainer_class = RetrievalTrainer

    @classmethod
    def benchmark_defaults(cls) -> dict[str, dict[str, Any]]:
        return {
            name: {"rerank_k": benchmark.rerank_k}
            for name, benchmark in cls.benchmarks.items()
            if benchmark.rerank_k is not None
        }

    def instead(self) -> list | None:
        if self.args.index is None and self.args.query is None:
            return None
        return search(self.args, self.training_args)

    def read(self, splits: Collection[str]) -> tuple[str, dict[str, list[CaptionedImage]]]:
        args, benchmark = self.args, self.benchmark
        if args.karpathy_file:
            path = Path(args.karpathy_file)
            return path.stem, {split: read_karpathy(path, split, args.image_dir) for split in splits}
        if args.benchmark == "openmoji":
            # Drawn at the size that they are looked at.
            benchmark = replace(benchmark, read_package=partial(read_openmoji, size=args.image_size))
        columns = CaptionColumns(args.image_column, args.caption_column, args.image_id_column)
        return read_splits(
            args,
            splits,
            lambda path, split: read_caption_file(path, columns),
            lambda table, source, split, folder: read_caption_table(table, columns, source, folder),
            benchmark,
        )

    def make_model(self, train: list[CaptionedImage] | None) -> tuple[HiViLTForRetrieval, HiViLTProcessor]:
        if train is None and not self.args.model_name_or_path:
            raise ValueError("There is nothing to evaluate: give --model_name_or_path a checkpoint, or --do_train.")
        captions = [caption for example in train or () for caption in example.captions]
        resumed = checkpoint_to_resume(self.training_args)
        model, processor = load_or_build(self.args, self.model_class, captions, train is not None, resumed)
        model.config.num_hard_negatives = self.args.num_hard_negatives
        # Without fused matching nothing trains the fusion.
        self.training_args.ddp_find_unused_parameters |= model.config.auxiliary_loss_weight == 0
        return model, processor

    def make_datasets(
        self, splits: Mapping[str, list[CaptionedImage]], model: HiViLTForRetrieval
    ) -> tuple[dict[str, CaptionDataset], dict[str, dict[str, Any]]]:
        datasets, data = {}, {}
        for split, examples in splits.items():
            drawn = {"captions_per_image": self.args.captions_per_image, "seed": self.training_args.draw_seed}
            datasets[split] = dataset = CaptionDataset(examples, **(drawn if split == "train" else {}))
            counts = [len(example.captions) for example in examples]
            data[split] = {
                "images": len(dataset),
                "captions": len(dataset.captions),
                "chance": chance_recall(len(dataset), counts),  # of a random ranking
            }
            logger.info(f"{split}: {len(dataset.captions):,} captions of {len(dataset):,} images")
            if split != "train":
                warn_of_few(split, len(dataset), "images")
        return datasets, data

    def collator(self, processor: HiViLTProcessor, augmentation: Augmentation | None) -> CaptionCollator:
        return CaptionCollator(processor, augmentation)

    def trainer_arguments(self) -> dict[str, Any]:
        args = self.args
        return {
            "fold_size": self.benchmark and self.benchmark.fold_size,
            "rerank_k": args.rerank_k,
            "similar_per_batch": args.similar_per_batch,
            "contrastive_chunk_size": args.contrastive_chunk_size,
        }

    def write(
        self, trainer: RetrievalTrainer, folder: Path, dataset: CaptionDataset, predictions: dict[str, torch.Tensor]
    ) -> None:
        if trainer.is_world_process_zero():
            write_predictions(folder / "predictions.jsonl", dataset, predictions)
            draw_retrieval(folder / "retrieval.png", dataset, predictions)

    def compare(
        self, trainer: RetrievalTrainer, results: dict[str, Any], datasets: Mapping[str, CaptionDataset]
    ) -> tuple[str, float, float, int] | None:
        if "validation" not in results:
            return None
        found = results["data"]["validation"]
        return "mean recall", results["validation"]["mean_recall"], found["chance"]["mean_recall"], found["images"]

    def summary(self, results: Mapping[str, Any], split: str) -> str:
        found = results["data"][split]
        return (
            f"{split}: R@K in percent, {found['images']:,} images and {found['captions']:,} captions\n"
            f"{tables_of(results)[split]}"
        )

    def card(
        self, trainer: RetrievalTrainer, results: Mapping[str, Any], splits: Mapping[str, list[CaptionedImage]]
    ) -> dict[str, Any]:
        reranked = f", the best {self.args.rerank_k} of each query re-ranked" if self.args.rerank_k else ""
        tables = [
            f"{split}: {results['data'][split]['images']:,} images, {results['data'][split]['captions']:,} captions"
            f"{reranked}. In percent.\n\n{table}"
            for split, table in tables_of(results).items()
        ]
        captions = dict.fromkeys(caption for example in splits["validation"] for caption in example.captions)
        return {
            "metrics": {
                f"{direction}_recall@{k}": f"{direction.replace('_', ' ')} R@{k}"
                for direction in ("image_to_text", "text_to_image")
                for k in (1, 5, 10)
            },
            "metric_ids": ["recall"],
            "tags": ["image-text-retrieval"],
            "image": "![Captions and the images found for them](retrieval.png)",
            "measured": "\n\n".join(tables),
            "captions": python_literal(list(captions)[:3]),
        }

    def try_next(self, folder: Path) -> str:
        return f"python run_retrieval.py --index IMAGES --model_name_or_path {folder} --output_dir {folder}/index"


# What is written and said


def write_predictions(path: Path, dataset: CaptionDataset, rankings: dict[str, torch.Tensor], top_k: int = 10) -> None:
    """One JSON object a query: every caption with its best images, then every image with its best captions."""
    ids = [one.image_id for one in dataset.examples]
    # A file's name may be no Unicode; written so, it is an escape of JSON.
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for caption, best in enumerate(rankings["text_to_image"][:, :top_k].tolist()):
            own = dataset.image_of_caption[caption]
            row = {"caption": dataset.captions[caption], "image": ids[own], "images": [ids[place] for place in best]}
            file.write(json.dumps({**row, "correct": own in best[:1]}, ensure_ascii=False) + "\n")
        for image, best in enumerate(rankings["image_to_text"][:, :top_k].tolist()):
            row = {"image": ids[image], "captions": [dataset.captions[place] for place in best]}
            correct = dataset.image_of_caption[best[0]] == image
            file.write(json.dumps({**row, "correct": correct}, ensure_ascii=False) + "\n")


def draw_retrieval(
    path: Path, dataset: CaptionDataset, rankings: dict[str, torch.Tensor], num_queries: int = 8
) -> None:
    """A grid of captions from all over the split with the images found for them."""
    places = torch.linspace(0, len(dataset.captions) - 1, min(num_queries, len(dataset.captions))).int().tolist()
    rows = []
    for place in places:
        best = rankings["text_to_image"][place, :8].tolist()
        rows.append(
            RetrievedImages(
                query=dataset.captions[place],
                images=[open_image(dataset.examples[image].image) for image in best],
                captions=[dataset.examples[image].captions[0] for image in best],
                matches=[image == dataset.image_of_caption[place] for image in best],
            )
        )
    plot_retrieved(rows, path, title="Captions and the images found for them, best first; the right one is framed")


def tables_of(results: dict) -> dict[str, str]:
    """Markdown table of recall for each split that was evaluated."""
    tables = {}
    for split in ("validation", "test"):
        if split in results:
            found = results[split]
            chance = results["data"][split]["chance"]
            stages = {"embeddings": "embedding_"}
            if "fused_mean_recall" in found:
                stages |= {"fusion alone": "fused_", "re-ranked": ""}
            rows = {name: {key: found[f"{prefix}{key}"] for key in chance} for name, prefix in stages.items()}
            tables[split] = recall_table({"chance": chance, **rows})
            if "num_folds" in found:
                rows = {name: {key: found[f"fold_{prefix}{key}"] for key in chance} for name, prefix in stages.items()}
                tables[split] += (
                    f"\n\nMean over {found['num_folds']} folds of {found['fold_size']:,} images:\n\n{recall_table(rows)}"
                )
    return tables


# Searching folders


def read_query(query: str) -> str | Path:
    """Words as they are, an image as a path. One word is a word, though a folder here may have its name.

    Raises:
        ValueError: it is empty, a web address or the path of a folder.
    """
    if not query.strip():
        raise ValueError("query: the text is empty; say what to look for.")
    if re.match(r"[A-Za-z][\w+.-]+://", query):
        raise ValueError(f"query: {query!r} is a web address, and images are not fetched; give words or a file.")
    if os.path.isdir(query) and len(Path(query).parts) > 1:
        raise ValueError(f"query: {query!r} is a folder; give words or an image, or embed the folder with --index.")
    is_image = os.path.isfile(query) or Path(query).suffix.lower() in {*Image.registered_extensions(), *HEIF_ENDINGS}
    return Path(query) if is_image else query


def search(args: RetrievalArguments, training_args: HiViLTTrainingArguments) -> list:
    """Embeds the images of a folder, or finds some among those embedded before; gives what each query found."""
    if training_args.world_size > 1:
        raise ValueError(f"A search runs on one process, got {training_args.world_size}; start it without a launcher.")
    folder = Path(training_args.output_dir)
    if args.model_name_or_path is None:
        args.model_name_or_path = ImageIndex.made_by(folder) if args.index is None else Retrieval.defaults["output_dir"]
    model, processor = load_or_build(args, HiViLTForRetrieval)
    set_threads(args, model)
    model = model.to(training_args.device).eval()
    if args.index is not None:
        index = ImageIndex.build(
            args.index,
            model,
            processor,
            folder,
            batch_size=training_args.per_device_eval_batch_size,
            on_bad_image=args.on_bad_image,
            index_factory=args.index_factory,
        )
        print(f"{len(index):,} images of {args.index} in {folder}")
        if args.query is None:
            return []
    else:
        index = ImageIndex.load(folder, model, processor)
    queries = [read_query(query) for query in args.query]
    found, rows = [], []
    for query in queries:
        hits = index.search(query, top_k=args.top_k, rerank_k=args.rerank_k if args.rerank else 0)
        if len(queries) > 1:
            print(query)
        for rank, hit in enumerate(hits, 1):
            print(f"{rank:3}  {hit.score:7.4f}  {hit.path}")
        shown = [hit for hit in hits if hit.path.is_file()]  # the search has told what is gone
        rows.append(
            RetrievedImages(
                query=open_image(str(query)) if isinstance(query, Path) else query,
                images=[open_image(str(hit.path)) for hit in shown],
                captions=[f"{hit.score:.3f}" for hit in shown],
                matches=None,
            )
        )
        found.append(hits)
    plot_retrieved(rows, folder / "search.png", title="Nearest images with their scores")
    return found
