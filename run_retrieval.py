"""Trains and evaluates HiViLT on finding images by words and words by images, and searches folders of images.

    python run_retrieval.py                                        OpenMoji, everything with defaults
    python run_retrieval.py --benchmark flickr30k --data_dir F30K   a data set of the field, its official files or the Hub's
    python run_retrieval.py --train_file train.jsonl --test_file test.jsonl --output_dir outputs/mine
    python run_retrieval.py --karpathy_file dataset_flickr30k.json --image_dir flickr30k-images --output_dir outputs/f30k
    python run_retrieval.py --index ~/Pictures --output_dir outputs/index
    python run_retrieval.py --query "red heart" --output_dir outputs/index
    accelerate launch --num_processes 2 run_retrieval.py           several devices

Training leaves in --output_dir: the checkpoint with its code and processor, README.md, results.json, predictions.jsonl,
training.png and retrieval.png. A search prints the best images and leaves search.png.
"""

import json
import logging
import os
import re
import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from hivilt.cards import python_literal, write_model_card
from hivilt.data.caption_benchmarks import CAPTION_BENCHMARKS
from hivilt.data.captions import (
    CaptionCollator,
    CaptionColumns,
    CaptionDataset,
    CaptionedImage,
    read_caption_file,
    read_caption_table,
    read_karpathy,
    read_openmoji,
)
from hivilt.data.tables import HEIF_ENDINGS, open_image
from hivilt.evaluation.plots import RetrievedImages, plot_retrieved
from hivilt.evaluation.retrieval import chance_recall, recall_table
from hivilt.modeling_hivilt import HiViLTForRetrieval
from hivilt.search import ImageIndex
from hivilt.trainers import RetrievalTrainer
from hivilt.training import (
    HiViLTTrainingArguments,
    TaskArguments,
    augmentation_of,
    begin_run,
    checkpoint_to_resume,
    collect_results,
    encoder_cache_of,
    freeze_parts,
    load_or_build,
    parameter_table,
    prepare_splits,
    read_splits,
    run,
    run_command,
    set_threads,
    warn_of_chance,
    warn_of_few,
    write_json,
)

logger = logging.getLogger("hivilt")

DEFAULTS = {
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
# What a benchmark does by itself; its resolution, learning rates and epochs are in runs/.
BENCHMARK_DEFAULTS = {
    name: {"rerank_k": benchmark.rerank_k}
    for name, benchmark in CAPTION_BENCHMARKS.items()
    if benchmark.rerank_k is not None
}


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


def read_data(args: RetrievalArguments, splits: Collection[str]) -> tuple[str, dict[str, list[CaptionedImage]]]:
    """The name of the data that the arguments name, and those of these splits that there are."""
    if args.karpathy_file:
        path = Path(args.karpathy_file)
        return path.stem, {split: read_karpathy(path, split, args.image_dir) for split in splits}
    benchmark = CAPTION_BENCHMARKS.get(args.benchmark)
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


def prepare_model(args: RetrievalArguments, training_args: HiViLTTrainingArguments, train: list[CaptionedImage] | None):
    """The model and its processor."""
    if train is None and not args.model_name_or_path:
        raise ValueError("There is nothing to evaluate: give --model_name_or_path a checkpoint, or --do_train.")
    captions = [caption for one in train or () for caption in one.captions]
    resumed = checkpoint_to_resume(training_args)
    model, processor = load_or_build(args, HiViLTForRetrieval, captions, train is not None, resumed)
    model.config.num_hard_negatives = args.num_hard_negatives
    freeze_parts(model, args.freeze)
    # Without fused matching nothing trains the fusion.
    training_args.ddp_find_unused_parameters |= model.config.auxiliary_loss_weight == 0
    return model, processor


def describe(dataset: CaptionDataset, bad_images: list[str]) -> dict:
    """What a split holds, for the log and for `results.json`, with what a random ranking would score on it."""
    counts = [len(one.captions) for one in dataset.examples]
    return {
        "images": len(dataset),
        "captions": len(dataset.captions),
        "chance": chance_recall(len(dataset), counts),
        "bad_images": bad_images,
    }


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


def write_card(
    trainer: RetrievalTrainer,
    args: RetrievalArguments,
    results: dict,
    splits: dict[str, list[CaptionedImage]],
    argv: list[str] | None,
) -> None:
    """`README.md` of the checkpoint."""
    reranked = f", the best {args.rerank_k} of each query re-ranked" if args.rerank_k else ""
    tables = [
        f"{split}: {results['data'][split]['images']:,} images, {results['data'][split]['captions']:,} captions"
        f"{reranked}. In percent.\n\n{table}"
        for split, table in tables_of(results).items()
    ]
    captions = dict.fromkeys(caption for one in splits["validation"] for caption in one.captions)
    write_model_card(
        trainer,
        args,
        results,
        splits,
        task="retrieval",
        script=Path(__file__).name,
        argv=argv,
        metrics={
            f"{direction}_recall@{k}": f"{direction.replace('_', ' ')} R@{k}"
            for direction in ("image_to_text", "text_to_image")
            for k in (1, 5, 10)
        },
        pipeline_tag="zero-shot-image-classification",
        metric_ids=["recall"],
        tags=["image-text-retrieval"],
        image="![Captions and the images found for them](retrieval.png)",
        measured="\n\n".join(tables),
        captions=python_literal(list(captions)[:3]),
    )


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
        args.model_name_or_path = ImageIndex.made_by(folder) if args.index is None else DEFAULTS["output_dir"]
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


def main(argv: list[str] | None = None) -> dict | list:
    """Runs as the flags ask (`argv`; unset, the command line); returns what `results.json` holds, or what was found."""
    start = time.perf_counter()
    args, training_args = begin_run(argv, RetrievalArguments, DEFAULTS, BENCHMARK_DEFAULTS)
    if args.index is not None or args.query is not None:
        return search(args, training_args)

    name, splits, bad_images, held_out = prepare_splits(args, training_args, lambda wanted: read_data(args, wanted))
    model, processor = prepare_model(args, training_args, splits["train"] if training_args.do_train else None)
    logger.info(parameter_table(model))
    set_threads(args, model)
    datasets = {
        split: CaptionDataset(
            examples,
            captions_per_image=args.captions_per_image if split == "train" else None,
            seed=training_args.draw_seed if split == "train" else None,
        )
        for split, examples in splits.items()
    }
    benchmark = CAPTION_BENCHMARKS.get(args.benchmark)
    data = {split: describe(dataset, bad_images[split]) for split, dataset in datasets.items()}
    for split, found in data.items():
        logger.info(f"{split}: {found['captions']:,} captions of {found['images']:,} images")
        if split != "train":
            warn_of_few(split, found["images"], "images")
    trainer = RetrievalTrainer(
        model=model,
        args=training_args,
        train_dataset=datasets.get("train"),
        eval_dataset=datasets.get("validation"),
        data_collator=CaptionCollator(processor, augmentation_of(args)),
        processing_class=processor,
        vision_learning_rate=args.vision_learning_rate,
        text_learning_rate=args.text_learning_rate,
        encoder_cache=encoder_cache_of(args),
        fold_size=benchmark and benchmark.fold_size,
        rerank_k=args.rerank_k,
        similar_per_batch=args.similar_per_batch,
        contrastive_chunk_size=args.contrastive_chunk_size,
    )
    metrics, rankings = run(trainer, datasets.get("test"), held_out, args.calibrate)

    if trainer.is_world_process_zero():
        folder = Path(training_args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if rankings is not None:
            write_predictions(folder / "predictions.jsonl", datasets["test"], rankings)
            draw_retrieval(folder / "retrieval.png", datasets["test"], rankings)
        results = collect_results(trainer, args, metrics, data={"name": name, **data})
        if training_args.do_train and "validation" in results:
            found, reached = data["validation"], results["validation"]["mean_recall"]
            sizes = found["images"], data["train"]["images"]
            warn_of_chance(args, "mean recall", reached, found["chance"]["mean_recall"], *sizes)
        results["wall_seconds"] = time.perf_counter() - start
        if training_args.do_train:
            write_card(trainer, args, results, splits, argv)
        write_json(folder / "results.json", results)
        for split, table in tables_of(results).items():
            found = data[split]
            print(f"{split}: R@K in percent, {found['images']:,} images and {found['captions']:,} captions\n{table}")
    if training_args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        flags = f"--index IMAGES --model_name_or_path {folder} --output_dir {folder}/index"
        print(f"Wrote {folder}" + (f"; try it: python run_retrieval.py {flags}" if training_args.do_train else ""))
    return results if trainer.is_world_process_zero() else {}


if __name__ == "__main__":
    run_command(main)
