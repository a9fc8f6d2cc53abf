"""What evaluating and searching a collection costs as it grows, beside fusing all pairs as a single-stream model must.

    python benchmarks/retrieval_scaling.py                         100, 1,000 and 5,000 images with five captions each
    python benchmarks/retrieval_scaling.py --images 100 --output_dir /tmp/quick

The models have the design note's base sizes cut down (`SIZES`), with random weights, which speed does not depend on:
HiViLT as `run_retrieval.py` evaluates it, from image files to R@K; fusion of every pair from states encoded once, and
transformers' ViLT, which encodes both again for every pair, both measured on a slice and extrapolated. Every collection
is evaluated in a process of its own, whose peak memory is that of the whole evaluation. Then searches by words among up
to a million random embeddings, exact and by lists (`NUM_PROBES` of which are looked through); they say nothing about how
many of the best an index of lists misses, which depends on the images. One thread.

It prints the table of searches, and leaves a JSON file and an image, with the processor in their names, in
benchmarks/results.
"""

import multiprocessing
import random
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import datasets
import faiss
import numpy as np
import torch
from PIL import Image
from transformers import BertConfig, ViltConfig, ViltForImageAndTextRetrieval, ViTConfig, ViTImageProcessorPil

from common import alternate, make_parser, markdown, seconds
from hivilt import HiViLTConfig, HiViLTForRetrieval, HiViLTProcessor
from hivilt.data.captions import CaptionCollator, CaptionDataset, CaptionedImage
from hivilt.search import ImageIndex
from hivilt.tasks.retrieval import RetrievalTrainer
from hivilt.training.arguments import COMMON_DEFAULTS, HiViLTTrainingArguments
from hivilt.training.models import train_tokenizer
from hivilt.training.results import environment, peak_memory_bytes, write_result_file
from plots import plot_scaling

# ViT-B/16 at 224 and BERT-base, cut down: a twelfth of the width, half of the layers, a third of the image's side.
SIZES = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 256}
IMAGE_SIZE, PATCH_SIZE, NUM_TOKENS = 80, 16, 16
WORDS = [f"word{number}" for number in range(500)]
NUM_PROBES = 16


def make_model() -> HiViLTForRetrieval:
    """A retrieval model in evaluation mode."""
    torch.manual_seed(0)
    config = HiViLTConfig.from_vision_text_configs(
        ViTConfig(**SIZES, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE),
        BertConfig(**SIZES, vocab_size=len(WORDS) + 100),
        hidden_size=64,
        num_attention_heads=8,
        projection_dim=256,
    )
    return HiViLTForRetrieval(config).eval()


def make_processor() -> HiViLTProcessor:
    """Images of `IMAGE_SIZE`, and a word to a token."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return HiViLTProcessor(ViTImageProcessorPil(size=size), train_tokenizer(WORDS, max_length=NUM_TOKENS))


def make_collection(folder: Path, num_images: int, captions_per_image: int) -> list[CaptionedImage]:
    """Images of noise and captions of `NUM_TOKENS` tokens, two of them special."""
    draw, pixels = random.Random(0), np.random.default_rng(0)
    examples = []
    for number in range(num_images):
        path = folder / f"{number}.png"
        Image.fromarray(pixels.integers(0, 255, (14, 14, 3), dtype=np.uint8)).resize((128, 96)).save(path)
        captions = [" ".join(draw.choices(WORDS, k=NUM_TOKENS - 2)) for _ in range(captions_per_image)]
        examples.append(CaptionedImage(str(number), str(path), tuple(captions)))
    return examples


def evaluate(num_images: int, captions_per_image: int, rerank_k: int) -> dict:
    """Seconds of each stage and peak memory of the evaluation of a whole collection."""
    torch.set_num_threads(1)
    model, processor = make_model(), make_processor()
    before = peak_memory_bytes()
    with tempfile.TemporaryDirectory() as folder:
        dataset = CaptionDataset(make_collection(Path(folder), num_images, captions_per_image))
        arguments = {**COMMON_DEFAULTS, "eval_strategy": "no", "load_best_model_at_end": False, "use_cpu": True}
        trainer = RetrievalTrainer(
            model=model,
            args=HiViLTTrainingArguments(output_dir=folder, per_device_eval_batch_size=32, **arguments),
            eval_dataset=dataset,
            data_collator=CaptionCollator(processor),
            processing_class=processor,
            rerank_k=rerank_k,
        )
        encoded = {"images": [], "captions": []}
        for name, encoder in (("images", model.base_model.vision_model), ("captions", model.base_model.text_model)):
            count = lambda *given, sizes=encoded[name]: sizes.append(len(given[-1].last_hidden_state))
            encoder.register_forward_hook(count)
        metrics = trainer.evaluate()
    found = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    kept = ("num_images", "num_captions", "num_fused_pairs", "encode_seconds", "search_seconds", "rerank_seconds")
    return {
        **{name: found[name] for name in kept},
        "seconds": found["runtime"],
        **{f"{name}_encoded": sum(sizes) for name, sizes in encoded.items()},
        "peak_memory_bytes": peak_memory_bytes(),
        "memory_bytes_before": before,
    }


@torch.inference_mode()
def pairs_per_second(num_pairs: int, batch_size: int = 64) -> dict[str, float]:
    """Pairs a second of fusion from cached states, and of a ViLT of the same size; medians over batches, alternating."""
    torch.manual_seed(0)
    hivilt = make_model()
    sizes = {**SIZES, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "vocab_size": len(WORDS) + 100}
    longest = {"max_position_embeddings": NUM_TOKENS, "max_image_length": (IMAGE_SIZE // PATCH_SIZE) ** 2}
    vilt = ViltForImageAndTextRetrieval(ViltConfig(**sizes, **longest)).eval()
    pixel_values = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)
    input_ids = torch.randint(5, len(WORDS), (batch_size, NUM_TOKENS))
    images, texts = hivilt.encode_images(pixel_values), hivilt.encode_texts(input_ids)
    runs = {
        "hivilt": lambda: hivilt.score(images, texts),
        "vilt": lambda: vilt(input_ids=input_ids, pixel_values=pixel_values),
    }
    found = alternate(runs, max(3, num_pairs // batch_size))
    return {name: batch_size / time for name, time in found.items()}


def time_searches(num_embeddings: int, factories: list[str], num_queries: int) -> list[dict]:
    """Milliseconds of a search by words among random embeddings, text encoder and look-up of the files included."""
    model, processor = make_model(), make_processor()
    embeddings = np.random.default_rng(0).standard_normal((num_embeddings, model.config.projection_dim), np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    images = [f"{number}.png" for number in range(num_embeddings)]
    dataset = datasets.Dataset.from_dict({"image": images, "embedding": embeddings})
    found = []
    for factory in factories:
        add_index = partial(
            dataset.add_faiss_index_from_external_arrays,
            embeddings,
            "embedding",
            string_factory=factory,
            metric_type=faiss.METRIC_INNER_PRODUCT,
            train_size=num_embeddings,
        )
        took = seconds(add_index)
        faiss_index = dataset.get_index("embedding").faiss_index
        if isinstance(faiss_index, faiss.IndexIVF):
            faiss_index.nprobe = NUM_PROBES
        index = ImageIndex(dataset, Path(), model, processor)
        queries = [" ".join(WORDS[query : query + 5]) for query in range(num_queries)]
        times = [1000 * seconds(partial(index.search, query)) for query in queries]
        row = {"num_embeddings": num_embeddings, "index_factory": factory, "index_seconds": took}
        row |= {"index_bytes": faiss.serialize_index(faiss_index).nbytes}
        found.append({**row, "median_milliseconds": median(times), "most_milliseconds": max(times[1:])})
    return found


def table(results: dict) -> str:
    """Markdown: a kind of index and a number of embeddings a row."""
    times = ("index_seconds", "median_milliseconds", "most_milliseconds")
    rows = [
        [f"{row['num_embeddings']:,}", f"`{row['index_factory']}`", f"{row['index_bytes']:,}"]
        + [f"{row[time]:.1f}" for time in times]
        for row in results["searches"]
    ]
    return markdown("| embeddings | index | bytes | seconds to make it | ms a search | at most |", rows, left=(1,))


def main(argv: list[str] | None = None) -> dict:
    """Measures, writes and draws; returns what the JSON file holds."""
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--captions", type=int, default=5, help="captions an image")
    parser.add_argument("--rerank_k", type=int, default=16)
    parser.add_argument("--slice", type=int, default=1280, help="pairs to measure all-pairs fusion on")
    parser.add_argument("--embeddings", type=int, nargs="+", default=[100_000, 1_000_000], help="embeddings to search")
    parser.add_argument("--index_factories", nargs="+", default=["Flat", "IVF1024,Flat"], help="FAISS indexes to try")
    parser.add_argument("--queries", type=int, default=200, help="searches to time")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)

    rates = pairs_per_second(args.slice)
    results = {
        "environment": environment(),
        "captions_per_image": args.captions,
        "rerank_k": args.rerank_k,
        "pairs_per_second": rates,
        "num_probes": NUM_PROBES,
        "searches": [
            found for number in args.embeddings for found in time_searches(number, args.index_factories, args.queries)
        ],
        "collections": [],
    }
    # Spawned, so that no collection inherits another's memory.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for num_images in args.images:
            found = pool.submit(evaluate, num_images, args.captions, args.rerank_k).result()
            all_pairs = found["num_images"] * found["num_captions"]
            found["all_pairs_seconds"] = {
                # With every image and caption encoded once before.
                "hivilt": all_pairs / rates["hivilt"] + found["encode_seconds"],
                "vilt": all_pairs / rates["vilt"],
            }
            results["collections"].append(found)
            print(
                f"{num_images:6,} images: {found['seconds']:8.1f} s "
                f"(encode {found['encode_seconds']:.1f}, search {found['search_seconds']:.2f}, "
                f"re-rank {found['rerank_seconds']:.1f}), {found['peak_memory_bytes'] / 2**30:.2f} GiB; all pairs: "
                f"{found['all_pairs_seconds']['hivilt']:,.0f} s by HiViLT, {found['all_pairs_seconds']['vilt']:,.0f} s by ViLT"
            )
    print(table(results))

    path = write_result_file(args.output_dir, "retrieval_scaling", results)
    plot_scaling(results["collections"], path.with_suffix(".png"))
    return results


if __name__ == "__main__":
    main()
