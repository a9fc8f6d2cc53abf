"""Arithmetic for pretraining on 100 million images with a caption each on 64 GPUs: nothing of it was run.

    python benchmarks/many_gpus.py                                 about a minute, 3 GiB
    python benchmarks/many_gpus.py --width 64 --num_layers 2 --output_dir /tmp/quick

Counted: what a pair costs `HiViLTForRetrieval` of base size (ViT-B/16 at 224 pixels, BERT-base, captions of 24 tokens,
contrastive and matching loss) in a forward and a backward pass. Measured: how many photographs of 640 by 480 a core of this
machine opens and prepares (as in input_pipeline.py). Assumed: what a GPU and its network do, `ASSUMED`, from an H200's data
sheet; its share that is reached is the goal of this project and no measurement.

It prints the table and leaves a JSON file with the processor in its name in benchmarks/results.
"""

import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from common import make_parser, markdown
from contestants import make_batch, make_hivilt
from hivilt import HiViLTForRetrieval
from hivilt.data.vqa import VQADataset
from hivilt.training.results import environment, write_result_file
from input_pipeline import BATCH_SIZE, epoch_seconds, first_questions, make_collator, make_photographs
from peers import count_flops

PAIRS, GPUS = 100_000_000, 64
COUNTED, PHOTOGRAPHS = 16, 64
# bfloat16 FLOP/s of an H200 without sparsity, the share of it, and bytes a second between GPUs, each way.
ASSUMED = {"peak": 989e12, "reached": 0.45, "network": 50e9}


def count(width: int, num_layers: int) -> dict[str, float]:
    """FLOPs of training on a pair, and parameters."""
    model = make_hivilt(width, num_layers, head=HiViLTForRetrieval).train()
    pixel_values, input_ids, image_index = make_batch(224, COUNTED, COUNTED)
    inputs = {"input_ids": input_ids, "pixel_values": pixel_values, "image_index": image_index, "return_loss": True}
    flops = count_flops(lambda: model(**inputs).loss.backward(), gradients=True)
    return {"flops": flops / COUNTED, "parameters": model.num_parameters()}


def prepare() -> dict[str, float]:
    """Photographs a second that one core opens and prepares, and the mean size of a file in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        examples = first_questions(make_photographs(Path(folder), PHOTOGRAPHS))
        images = VQADataset(examples).by_image()
        ours = {"hivilt": DataLoader(images, BATCH_SIZE, collate_fn=make_collator(examples, 224))}
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) / PHOTOGRAPHS
        return {"photographs_per_second": PHOTOGRAPHS / epoch_seconds(ours, 3)["hivilt"], "bytes": size}


def table(results: dict) -> str:
    """Markdown: what it takes, and what that was computed from."""
    assumed, flops, parameters = results["assumed"], results["flops"], results["parameters"]
    rate = assumed["peak"] * assumed["reached"] / flops  # pairs a second, of a GPU
    # A ring: each GPU sends and gets nearly all gradients twice, float32.
    exchanged = 2 * 4 * parameters * (GPUS - 1) / GPUS
    seconds = exchanged / assumed["network"]
    gpu = f"{assumed['peak'] / 1e12:.0f} TFLOP/s, {100 * assumed['reached']:.0f} % of them reached (assumed)"
    network = f"{assumed['network'] / 1e9:.0f} GB/s (assumed)"
    cores = rate / results["photographs_per_second"]
    rows = [
        ["training on a pair", f"{flops / 1e12:.2f} TFLOP", "counted"],
        ["pairs a second, a GPU", f"{rate:,.0f}", gpu],
        ["an epoch", f"{PAIRS / GPUS / rate / 60:,.0f} minutes", "the same"],
        [
            "cores that prepare the images of a GPU",
            f"{cores:.1f}",
            f"{results['photographs_per_second']:.0f} images/s a core, measured",
        ],
        [
            "files read by all",
            f"{GPUS * rate * results['bytes'] / 1e9:.1f} GB/s",
            f"{results['bytes'] / 1e3:.0f} KB each",
        ],
        ["files, once", f"{PAIRS * results['bytes'] / 1e12:.0f} TB", "the same"],
        [
            "gradients through each GPU's network, a step",
            f"{exchanged / 1e9:.1f} GB",
            f"{parameters / 1e6:.0f} M, float32",
        ],
        ["their exchange, a step", f"{1000 * seconds:.0f} ms", network],
        [
            "pairs on a GPU with which a step computes ten times as long",
            f"{10 * seconds * rate:,.0f}",
            "both assumptions",
        ],
        ["weights, gradients and AdamW on a GPU", f"{16 * parameters / 1e9:.1f} GB", "float32, not sharded"],
    ]
    return markdown(f"| {PAIRS:,} pairs, {GPUS} GPUs, computed | | from |", rows, left=(0, 2))


def main(argv: list[str] | None = None) -> dict:
    """Counts, measures and writes; returns what the JSON file holds."""
    parser = make_parser(__doc__)
    parser.add_argument("--width", type=int, default=768, help="hidden size, a multiple of 64")
    parser.add_argument("--num_layers", type=int, default=12, help="layers of each encoder")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = {**count(args.width, args.num_layers), **prepare(), "assumed": ASSUMED}
    results["environment"] = environment()
    print(table(results))
    write_result_file(args.output_dir, "many_gpus", results)
    return results


if __name__ == "__main__":
    main()
