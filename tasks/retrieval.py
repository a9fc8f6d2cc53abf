"""Retrieval: its data, its trainer, what it measures and reports; and the search of folders of images."""

import logging
import math
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from transformers.utils import ModelOutput

from hivilt.data.augmentation import Augmentation
from hivilt.data.caption_benchmarks import CAPTION_BENCHMARKS
from hivilt.data.captions import CaptionCollator, CaptionDataset, CaptionedImage, SimilarCaptionsSampler
from hivilt.data.tables import HEIF_ENDINGS, open_image
from hivilt.evaluation.calibration import calibrate, draw_candidates
from hivilt.evaluation.plots import RetrievedImages, plot_retrieved
from hivilt.evaluation.retrieval import best_first, chance_recall, recall_table, rerank, retrieval_metrics
from hivilt.fusion_hivilt import map_states
from hivilt.losses_hivilt import MAX_LOGIT_SCALE, inverse_temperature
from hivilt.modeling_hivilt import HiViLTForRetrieval
from hivilt.processing_hivilt import HiViLTProcessor
from hivilt.search.scoring import score_pairs
from hivilt.tasks.arguments import RetrievalArguments
from hivilt.tasks.captioned import read_captioned
from hivilt.tasks.indexing import open_index
from hivilt.tasks.task import Task, spread, write_rows
from hivilt.training.arguments import HiViLTTrainingArguments
from hivilt.training.cards import python_literal
from hivilt.training.results import warn_of_few
from hivilt.training.trainer import HiViLTTrainer, in_order

logger = logging.getLogger("hivilt")

DIRECTIONS = ("image_to_text", "text_to_image")


class RetrievalTrainer(HiViLTTrainer):
    """Trains `HiViLTForRetrieval` on a `CaptionDataset` and evaluates retrieval over a whole split.

    Evaluation encodes every image and every caption once, ranks by their embeddings, and re-ranks the best `rerank_k`
    of each query from the encoded states, by `HiViLTForRetrieval.ranking_score`.

    Args:
        rerank_k: candidates of each query to re-rank; 0 ranks by the embeddings alone.
        similar_per_batch: images with similar captions to train on together, see `SimilarCaptionsSampler`.
        contrastive_chunk_size: `chunk_size` of `HiViLTForRetrieval.forward` in training.
        fold_size: also report recall as the mean over consecutive whole folds of so many images with their captions, each
            ranked and re-ranked by itself, of splits with at least two. MS-COCO's "1K test" is five folds of 1,000
            (Karpathy and Fei-Fei 2015; VSE++). Evaluations within training do without.
    """

    unit = "captions"
    place_name = "caption_index"

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
                f"contrastive_chunk_size: got {contrastive_chunk_size}, expected None under FSDP; use gradient_checkpointing."
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
        self._losses: dict[str, list[torch.Tensor]] = {}  # parts of the loss since the last log

    def _get_train_sampler(self, train_dataset=None):
        return SimilarCaptionsSampler(train_dataset or self.train_dataset, self.similar_per_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss; its parts go to the log."""
        inputs = {**inputs, "chunk_size": self.contrastive_chunk_size}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        for name in ("contrastive_loss", "auxiliary_loss"):
            if outputs.get(name) is not None:
                self._losses.setdefault(name, []).append(outputs[name])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the means of the parts of the training loss."""
        if "loss" in logs:
            logs = {**logs, **{name: torch.stack(values).mean().item() for name, values in self._losses.items()}}
            self._losses = {}
        super().log(logs, *args, **kwargs)

    def metric_names(self, dataset: CaptionDataset) -> set[str]:
        only = torch.zeros(1, 1, dtype=torch.long)
        stages = ("embedding_", "fused_", "") if self.rerank_k else ("embedding_", "")
        return {"loss", *(f"{stage}{name}" for stage in stages for name in retrieval_metrics(only, only, [0]))}

    def measure(self, model, batches, dataset):
        """Ranks all captions for every image and all images for every caption of a `CaptionDataset`.

        Returns:
            `{"image_to_text": LongTensor (B_i, n), "text_to_image": LongTensor (B_t, n)}`, places in the split, best
            first; metrics; the number of captions. Metrics are those of `retrieval_metrics` for the final ranking, with
            `embedding_` and `fused_` in front for the rankings by embeddings and by fused similarity alone, and with
            `fold_` for means over folds; seconds of each stage and fused pairs are of the split and its folds together.
        """
        start = time.perf_counter()
        images, texts, loss = self._encode(model, batches, dataset, keep_states=self.rerank_k > 0)
        encoded = time.perf_counter()
        rankings, recalls, costs = self._rank(model, images, texts, dataset)
        metrics = {"loss": loss, **recalls}
        if self.fold_size is not None and not self.is_in_train and len(dataset) >= 2 * self.fold_size:
            fold_of_image, folds = torch.arange(len(dataset)) // self.fold_size, []
            fold_of_text = fold_of_image[dataset.image_of_caption]
            for fold in range(len(dataset) // self.fold_size):
                parts = images.take(fold_of_image == fold), texts.take(fold_of_text == fold)
                _, fold_recalls, more = self._rank(model, *parts, dataset)
                folds.append(fold_recalls)
                costs = {name: cost + more[name] for name, cost in costs.items()}
            metrics |= {f"fold_{name}": sum(fold[name] for fold in folds) / len(folds) for name in recalls}
            metrics |= {"num_folds": len(folds), "fold_size": self.fold_size}
        counts = {"num_images": len(dataset), "num_captions": len(dataset.captions)}
        return rankings, {**metrics, **counts, "encode_seconds": encoded - start, **costs}, len(dataset.captions)

    def _encode(self, model, batches, dataset, keep_states: bool) -> tuple["_Encoded", "_Encoded", float]:
        """Images and captions of a split, encoded once each, and its loss."""
        images, texts, losses = [], [], []
        for inputs in batches:
            pairs = {name: inputs.pop(name, None) for name in ("image_index", "image_ids")}
            caption_index = inputs.pop(self.place_name)
            shown = {name: inputs.pop(name) for name in ("pixel_values", "feature_maps") if name in inputs}
            image_states, text_states = model.encode_images(**shown), model.encode_texts(**inputs)
            flags = {"return_loss": True, "gather_negatives": model.config.gather_negatives}
            outputs = model(image_states=image_states, text_states=text_states, **pairs, **flags)
            losses.append((outputs.loss.item(), len(caption_index)))
            states = [map_states(torch.Tensor.cpu, one) if keep_states else None for one in (image_states, text_states)]
            images.append((pairs["image_ids"], outputs.image_embeds, states[0]))
            texts.append((caption_index, outputs.text_embeds, states[1]))
        losses = gather_object(losses)
        loss = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
        process = self.args.process_index
        images = _Encoded.gather(images, len(dataset), process)
        return images, _Encoded.gather(texts, len(dataset.captions), process), loss

    def _find_temperature(self, model, batches, dataset):
        """That of `logits_per_image`: of an image, a caption of its own and nine of other images, drawn at random."""
        images, texts, _ = self._encode(model, batches, dataset, keep_states=False)
        candidates = draw_candidates(dataset.captions, dataset.image_of_caption)
        if candidates is None:
            return None
        # (B_t, 1, d), (B_t, candidates, d) -> (B_t, candidates)
        similarity = (images.embeds[dataset.image_of_caption][:, None] * texts.embeds[candidates]).sum(dim=-1)
        scale = inverse_temperature(self.model.logit_scale).item()
        matching = inverse_temperature(self.model.matching_logit_scale).item()
        # Both are divided, which leaves the ranking by their weighted mean as it is, and both stay within their bounds.
        least, most = max(scale, matching) / math.exp(MAX_LOGIT_SCALE), min(scale, matching)
        labels = torch.zeros(len(similarity), dtype=torch.long)
        fitted = calibrate(scale * similarity, labels, least=min(least, 1.0), most=max(most, 1.0))
        return {**fitted, "num_candidates": candidates.shape[1]}

    def _divide_scores(self, temperature: float) -> None:
        for parameter in (self.model.logit_scale, self.model.matching_logit_scale):
            parameter.copy_((inverse_temperature(parameter) / temperature).log())

    def _rank(self, model, images: "_Encoded", texts: "_Encoded", dataset):
        """Ranks all these texts for every image and all these images, consecutive ones, for every text: the final rankings,
        the recalls of every stage, and what they cost."""
        start = time.perf_counter()
        # (B_i, projection_dim), (B_t, projection_dim) -> (B_i, B_t)
        similarity = images.embeds.to(self.args.device) @ texts.embeds.to(self.args.device).t()
        similarities = similarity, similarity.t()
        candidates = [best_first(scores, max(10, self.rerank_k)).cpu() for scores in similarities]
        searched = time.perf_counter()

        rankings, num_pairs = {"embedding_": candidates}, 0
        if self.rerank_k:
            shortlists = [ranked[:, : self.rerank_k] for ranked in candidates]
            *fused, num_pairs = self._fuse(model, images, texts, dataset.captions, *shortlists)
            pairs = zip(similarities, shortlists, strict=True)
            cosines = [scores.gather(1, best.to(scores.device)).cpu() for scores, best in pairs]
            rankings["fused_"] = list(map(rerank, candidates, fused))
            rankings[""] = list(map(rerank, candidates, map(model.ranking_score, cosines, fused)))
        else:
            rankings[""] = candidates

        image_of_text = (torch.tensor(dataset.image_of_caption)[texts.places] - images.places[0]).tolist()
        recalls = {}
        for stage, ranked in rankings.items():
            recalls |= {f"{stage}{name}": value for name, value in retrieval_metrics(*ranked, image_of_text).items()}
        costs = {"num_fused_pairs": num_pairs, "search_seconds": searched - start}
        costs["rerank_seconds"] = time.perf_counter() - searched
        return dict(zip(DIRECTIONS, rankings[""], strict=True)), recalls, costs

    def _fuse(self, model, images: "_Encoded", texts: "_Encoded", captions, image_to_text, text_to_image):
        """Fused similarities of both shortlists, (B_i, k) and (B_t, k), and how many were computed: a pair on both is fused
        once."""
        num_images, num_texts = len(image_to_text), len(text_to_image)
        # Pairs by their number, counted row by row of a matrix of all images and all texts.
        of_images = torch.arange(num_images)[:, None] * num_texts + image_to_text
        of_texts = text_to_image * num_texts + torch.arange(num_texts)[:, None]
        pairs, places = torch.cat([of_images.flatten(), of_texts.flatten()]).unique(return_inverse=True)
        image_places, text_places = pairs // num_texts, pairs % num_texts
        # Each process fuses the images that it encoded.
        own = (images.owners[image_places] == self.args.process_index).nonzero().squeeze(1)
        fused = torch.zeros(0)
        if len(own):
            text_states, text_rows = self._text_states(model, texts, text_places[own], captions)
            rows = images.rows[image_places[own]], text_rows[text_places[own]]
            fused = score_pairs(model, images.states, text_states, *rows, progress=not self.args.disable_tqdm)
        scores = torch.zeros(len(pairs))
        for numbers, part in gather_object([(own, fused)]):
            scores[numbers] = part
        by_image, by_text = scores[places].tensor_split([image_to_text.numel()])
        return by_image.view_as(image_to_text), by_text.view_as(text_to_image), len(pairs)

    def _text_states(self, model, texts: "_Encoded", needed: torch.LongTensor, captions: Sequence[str]):
        """States of texts, batch by batch, and the row of each; those that other processes have are encoded here, if needed."""
        states, rows = list(texts.states), texts.rows.clone()
        missing = needed[rows[needed] < 0].unique()
        rows[missing] = sum(len(batch.global_state) for batch in states) + torch.arange(len(missing))
        for part in texts.places[missing].split(self.args.per_device_eval_batch_size) if len(missing) else ():
            inputs = self._prepare_inputs(self.data_collator.texts([captions[place] for place in part.tolist()]))
            states.append(map_states(torch.Tensor.cpu, model.encode_texts(**inputs)))
        return states, rows


@dataclass
class _Encoded:
    """Images or texts of a split, on the CPU. Embeddings are of all processes; states, which are far larger, stay with the
    process that encoded them."""

    places: torch.LongTensor  # (n,) in the split
    embeds: torch.Tensor  # (n, projection_dim)
    owners: torch.LongTensor  # (n,) the process that has an item's states
    rows: torch.LongTensor  # (n,) where they are in this process's batches, -1 elsewhere
    states: list[ModelOutput]  # batches of them; none where nothing is fused

    @classmethod
    def gather(cls, batches: Sequence[tuple], length: int, process: int) -> "_Encoded":
        """All items of a split of this length, from places, embeddings and states of this process's batches."""
        own = torch.cat([places for places, _, _ in batches]).cpu()
        embeds = torch.cat([embeds.float() for _, embeds, _ in batches]).cpu()
        items = in_order(zip(own.tolist(), ((process, row) for row in embeds.numpy()), strict=True), length)
        owners, embeds = zip(*items, strict=True)
        rows = torch.full((length,), -1)
        rows[own] = torch.arange(len(own))
        states = [states for _, _, states in batches if states is not None]
        return cls(torch.arange(length), torch.from_numpy(np.stack(embeds)), torch.tensor(owners), rows, states)

    def take(self, chosen: torch.BoolTensor) -> "_Encoded":
        """Some of the items; they share their states."""
        columns = (self.places, self.embeds, self.owners, self.rows)
        return _Encoded(*(column[chosen] for column in columns), self.states)


class Retrieval(Task):
    """Finds images by texts and texts by images; searches folders of images."""

    name = "retrieval"
    script = "run_retrieval.py"
    pipeline_tag = "zero-shot-image-classification"
    card_template = "retrieval.md"
    arguments = RetrievalArguments
    benchmarks = CAPTION_BENCHMARKS
    model_class = HiViLTForRetrieval
    trainer_class = RetrievalTrainer

    def instead(self) -> list | None:
        is_search = self.args.index is not None or self.args.query is not None
        return search(self.args, self.training_args) if is_search else None

    def read(self, splits: Collection[str]) -> tuple[str, dict[str, list[CaptionedImage]]]:
        return read_captioned(self.args, splits, self.benchmark)

    def texts_of(self, example: CaptionedImage) -> tuple[str, ...]:
        return example.captions

    def make_model(self, train: list[CaptionedImage] | None) -> tuple[HiViLTForRetrieval, HiViLTProcessor]:
        model, processor = super().make_model(train)
        model.config.num_hard_negatives = self.args.num_hard_negatives
        # Without fused matching nothing trains the fusion.
        self.training_args.ddp_find_unused_parameters |= model.config.auxiliary_loss_weight == 0
        return model, processor

    def make_dataset(self, split: str, examples: list[CaptionedImage]) -> tuple[CaptionDataset, dict[str, Any]]:
        if split == "train":
            dataset = CaptionDataset(examples, self.args.captions_per_image, seed=self.training_args.draw_seed)
        else:
            dataset = CaptionDataset(examples)
            warn_of_few(split, len(dataset), "images")
        logger.info(f"{split}: {len(dataset.captions):,} captions of {len(dataset):,} images")
        chance = chance_recall([len(example.captions) for example in examples])
        return dataset, {"images": len(dataset), "captions": len(dataset.captions), "chance": chance}

    def collator(self, processor: HiViLTProcessor, augmentation: Augmentation | None) -> CaptionCollator:
        return CaptionCollator(processor, augmentation)

    def trainer_arguments(self) -> dict[str, Any]:
        names = ("rerank_k", "similar_per_batch", "contrastive_chunk_size")
        given = {name: getattr(self.args, name) for name in names}
        return {**given, "fold_size": self.benchmark and self.benchmark.fold_size}

    def write(self, folder: Path, dataset: CaptionDataset, predictions: dict[str, torch.Tensor]) -> None:
        write_rows(folder / "predictions.jsonl", prediction_rows(dataset, predictions))
        rows = []
        for place in spread(len(dataset.captions), 8):
            best = predictions["text_to_image"][place, :8].tolist()
            examples = [dataset.examples[image] for image in best]
            images, captions = [open_image(one.image) for one in examples], [one.captions[0] for one in examples]
            matches = [image == dataset.image_of_caption[place] for image in best]
            rows.append(RetrievedImages(dataset.captions[place], images, captions, matches))
        title = "Captions and the images found for them, best first; the right one is framed"
        plot_retrieved(rows, folder / "retrieval.png", title=title)

    def compare(
        self, trainer: RetrievalTrainer, results: dict[str, Any], datasets: Mapping[str, CaptionDataset]
    ) -> tuple[str, float, float, int] | None:
        if "validation" not in results:
            return None
        data = results["data"]["validation"]
        return "mean recall", results["validation"]["mean_recall"], data["chance"]["mean_recall"], data["images"]

    def summary(self, results: Mapping[str, Any], split: str) -> str:
        data = results["data"][split]
        size = f"{data['images']:,} images and {data['captions']:,} captions"
        return f"{split}: R@K in percent, {size}\n{tables_of(results)[split]}"

    def card(self, trainer: RetrievalTrainer, results: Mapping, splits: Mapping[str, list[CaptionedImage]]) -> dict:
        reranked = f", the best {self.args.rerank_k} of each query re-ranked" if self.args.rerank_k else ""
        tables = []
        for split, table in tables_of(results).items():
            data = results["data"][split]
            size = f"{data['images']:,} images, {data['captions']:,} captions"
            tables.append(f"{split}: {size}{reranked}. In percent.\n\n{table}")
        recalls = {f"{way}_recall@{k}": f"{way.replace('_', ' ')} R@{k}" for way in DIRECTIONS for k in (1, 5, 10)}
        captions = dict.fromkeys(caption for example in splits["validation"] for caption in example.captions)
        return {
            "metrics": recalls,
            "metric_ids": ["recall"],
            "tags": ["image-text-retrieval"],
            "image": "![Captions and the images found for them](retrieval.png)",
            "measured": "\n\n".join(tables),
            "captions": python_literal(list(captions)[:3]),
        }

    def try_next(self, folder: Path) -> str:
        return f"python run_retrieval.py --index IMAGES --model_name_or_path {folder} --output_dir {folder}/index"


def prediction_rows(dataset: CaptionDataset, rankings: dict[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
    """The rows of predictions.jsonl: every caption with its ten best images, then every image with its ten best captions."""
    ids = [example.image_id for example in dataset.examples]
    for caption, best in enumerate(rankings["text_to_image"][:, :10].tolist()):
        own = dataset.image_of_caption[caption]
        row = {"caption": dataset.captions[caption], "image": ids[own], "images": [ids[place] for place in best]}
        yield {**row, "correct": best[0] == own}
    for image, best in enumerate(rankings["image_to_text"][:, :10].tolist()):
        row = {"image": ids[image], "captions": [dataset.captions[place] for place in best]}
        yield {**row, "correct": dataset.image_of_caption[best[0]] == image}


def tables_of(results: dict) -> dict[str, str]:
    """Markdown table of recall for each split that was evaluated."""
    tables = {}
    for split in [split for split in ("validation", "test") if split in results]:
        measured, chance = results[split], results["data"][split]["chance"]
        stages = {"embeddings": "embedding_"}
        if "fused_mean_recall" in measured:
            stages |= {"fusion alone": "fused_", "re-ranked": ""}
        rows = {name: {key: measured[f"{prefix}{key}"] for key in chance} for name, prefix in stages.items()}
        tables[split] = recall_table({"chance": chance, **rows})
        if "num_folds" in measured:
            rows = {name: {key: measured[f"fold_{prefix}{key}"] for key in chance} for name, prefix in stages.items()}
            folds = f"{measured['num_folds']} folds of {measured['fold_size']:,} images"
            tables[split] += f"\n\nMean over {folds}:\n\n{recall_table(rows)}"
    return tables


def read_query(query: str) -> str | Path:
    """Words as they are, an image as a path; a `ValueError` for a web address or the path of a folder. A single word is a
    word, though a folder here may have its name."""
    if re.match(r"[A-Za-z][\w+.-]+://", query):
        raise ValueError(f"query: {query!r} is a web address, and images are not fetched; give words or a file.")
    if os.path.isdir(query) and len(Path(query).parts) > 1:
        raise ValueError(f"query: {query!r} is a folder; give words or an image, or embed the folder with --index.")
    is_image = os.path.isfile(query) or Path(query).suffix.lower() in {*Image.registered_extensions(), *HEIF_ENDINGS}
    return Path(query) if is_image else query


def search(args: RetrievalArguments, training_args: HiViLTTrainingArguments) -> list:
    """Embeds the images of a folder, or searches those embedded before; gives the hits of each query."""
    queries = [read_query(query) for query in args.query or ()]
    more = {"index_factory": args.index_factory, "keep_states": args.keep_states or None}
    index = open_index(args, training_args, HiViLTForRetrieval, **more)
    if index is None or args.query is None:
        return []
    folder = Path(training_args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    all_hits, rows = [], []
    for query in queries:
        hits = index.search(query, top_k=args.top_k, rerank_k=args.rerank_k if args.rerank else 0)
        all_hits.append(hits)
        if len(queries) > 1:
            print(query)
        for rank, hit in enumerate(hits, 1):
            print(f"{rank:3}  {hit.score:7.4f}  {hit.path}")
        hits = [hit for hit in hits if hit.path.is_file()]  # the search has told what is gone
        images, scores = [open_image(str(hit.path)) for hit in hits], [f"{hit.score:.3f}" for hit in hits]
        shown = open_image(str(query)) if isinstance(query, Path) else query
        rows.append(RetrievedImages(shown, images, scores, matches=None))
    plot_retrieved(rows, folder / "search.png", title="Nearest images with their scores")
    return all_hits
