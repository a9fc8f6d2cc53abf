"""What training costs at base size, plain, with gradient checkpointing and in bfloat16, and what a second process adds.

    python benchmarks/training_cost.py                             about ten minutes, 7 GiB
    python benchmarks/training_cost.py --width 192 --num_layers 2 --steps 1 --output_dir /tmp/quick

A step is forward, backward and AdamW's update, with `IMAGES` images of 5.4 questions each, as in VQAv2, on ViT-B/16
at 224 pixels, BERT-base and the fusion of `HiViLTConfig()`, with random weights, which cost does not depend on. Each way
of training runs in a process of its own, whose peak memory it is; figures are medians over steps after a first one. The
two precisions also tell what encoding an image, encoding a question and fusing the two take without gradients. Where a
processor has no bfloat16 arithmetic, so that torch emulates it, a step of it would take hours and is left out. Then the
small model of `make vqa`, on one process and on two that average their gradients, as `accelerate launch` starts them. One
thread a process.

It prints the tables of docs/scaling.md, and leaves a JSON file with the processor in its name in benchmarks/results.
"""

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import make_parser, markdown, seconds
from contestants import NUM_TOKENS, make_batch, make_hivilt
from hivilt import HiViLTForQuestionAnswering
from hivilt.fusion_hivilt import map_states
from hivilt.training.command import leave_processes
from hivilt.training.models import SMALL_FUSION, small_text_config, small_vision_config
from hivilt.training.results import environment, peak_memory_bytes, write_result_file
from hivilt.training.trainer import flushed_denormals

IMAGES, QUESTIONS = 8, 43
# Gradient checkpointing, bfloat16.
WAYS = {
    "float32": (False, False),
    "float32, gradient checkpointing": (True, False),
    "bfloat16": (False, True),
    "bfloat16, gradient checkpointing": (True, True),
}
# Processes, and images on each, of about ten questions of eight tokens, as easy-VQA's.
TOGETHER = [(1, 8), (2, 4), (2, 8)]
MANY = 1_000_000
# Emulated, a layer takes tens of times as long; bfloat16 that is arithmetic takes less time than float32.
SLOWEST_BF16 = 4


def with_labels(pixel_values: torch.Tensor, input_ids: torch.Tensor, image_index: torch.Tensor) -> dict:
    """What the model trains on; the first answer is right for all."""
    labels = torch.zeros(len(input_ids), dtype=torch.long)
    return {"input_ids": input_ids, "pixel_values": pixel_values, "image_index": image_index, "labels": labels}


def median_seconds(run: Callable[[], object], times: int) -> float:
    """Of a call, after a first one."""
    run()
    return median(seconds(run) for _ in range(times))


def bf16_slowdown() -> float:
    """How many times as long as in float32 a linear layer's forward and backward pass takes in bfloat16."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = (torch.randn(128, 768, dtype=dtype, requires_grad=True) for _ in range(2))
        found.append(median_seconds(lambda x=x, weight=weight: F.linear(x, weight).sum().backward(), 3))
    return found[1] / found[0]


def training_seconds(model: nn.Module, batch: dict[str, torch.Tensor], steps: int, bf16: bool = False) -> float:
    """Median seconds of a training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    with flushed_denormals():  # as the trainer does
        return median_seconds(step, steps)


def measure_way(width: int, num_layers: int, checkpointing: bool, bf16: bool, steps: int) -> dict:
    """Seconds and memory of a way of training and, without checkpointing, seconds of the model's parts without gradients."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = make_hivilt(width, num_layers)
    if checkpointing:
        model.gradient_checkpointing_enable()
    batch = with_labels(*make_batch(224, IMAGES, QUESTIONS))
    found = {
        "gradient_checkpointing": checkpointing,
        "bf16": bf16,
        "seconds": training_seconds(model, batch, steps, bf16),
    }
    found |= {"peak_memory_bytes": peak_memory_bytes(), "parameters": model.num_parameters()}
    if not checkpointing:
        model.eval()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            images, texts = model.encode_images(batch["pixel_values"]), model.encode_texts(batch["input_ids"])
            parts = {
                "image": (partial(model.encode_images, batch["pixel_values"]), IMAGES),
                "question": (partial(model.encode_texts, batch["input_ids"]), QUESTIONS),
                "fusion": (partial(model.model.fuse, images, texts, batch["image_index"]), QUESTIONS),
            }
            found["parts"] = {name: median_seconds(run, steps) / rows for name, (run, rows) in parts.items()}
        found["state_bytes"] = {"image": state_bytes(images) // IMAGES, "question": state_bytes(texts) // QUESTIONS}
    return found


def state_bytes(states) -> int:
    """Of all tensors that fusion reads."""
    sizes = []
    map_states(lambda x: sizes.append(x.nbytes), states)
    return sum(sizes)


def measure_together(rank: int, num_processes: int, images: int, steps: int, store: str) -> float:
    """Median seconds of a step of the small model on one of several processes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = HiViLTForQuestionAnswering.from_vision_text_pretrained(
        small_vision_config(), small_text_config(100), num_labels=13, **SMALL_FUSION
    )
    if num_processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_processes)
        model = DistributedDataParallel(model)
    batch = make_batch(64, images, 10 * images, num_tokens=8, vocab_size=100)
    seconds_a_step = training_seconds(model, with_labels(*batch), steps)
    del model
    leave_processes()
    return seconds_a_step


def table(results: dict) -> str:
    """Markdown: what a training step costs, a way of training a row."""
    rows = []
    for name, row in results["ways"].items():
        if "skipped" in row:
            rows.append([name, row["skipped"], *[""] * 5])
            continue
        cells = [f"{row['seconds']:.1f}", f"{IMAGES / row['seconds']:.2f}", f"{row['peak_memory_bytes'] / 2**30:.1f}"]
        parts = [f"{1000 * seconds:.0f} ms" for seconds in row.get("parts", {}).values()]
        rows.append([name, *cells, *(parts or ["", "", ""])])
    return markdown("| | seconds a step | images/s | peak GiB | an image | a question | fusing both |", rows)


def processes_table(results: dict) -> str:
    """Markdown: what a second process adds."""
    rates = [10 * row["processes"] * row["images"] / row["seconds"] for row in results["together"]]
    rows = []
    for row, rate in zip(results["together"], rates, strict=True):
        cells = [str(row["processes"]), str(row["images"]), f"{1000 * row['seconds']:.0f}"]
        rows.append([*cells, f"{rate:.0f}", f"{rate / rates[0]:.2f}"])
    return markdown("| processes | images on each | ms a step | questions/s | beside one |", rows, left=())


def many_table(results: dict) -> str:
    """Markdown: what `MANY` images cost, computed from what was measured on `IMAGES`."""
    bytes_each = {"float32": 4, "bfloat16": 2}
    ways = {name: results["ways"][name] for name in bytes_each if "skipped" not in results["ways"][name]}
    epoch = [MANY / IMAGES * row["seconds"] for row in ways.values()]
    image = [row["parts"]["image"] for row in ways.values()]
    fusion = [row["parts"]["fusion"] for row in ways.values()]
    rows = [
        ["training, an epoch with 5.4 questions each", *(f"{time / 3600:,.0f} hours" for time in epoch)],
        ["encoding each once, to search or to evaluate", *(f"{MANY * time / 3600:,.0f} hours" for time in image)],
    ]
    for kind in ("image", "question"):
        numbers = MANY * ways["float32"]["state_bytes"][kind] / bytes_each["float32"]
        terabytes = (f"{numbers * bytes_each[name] / 1e12:.2f} TB" for name in ways)
        rows.append([f"keeping the states of as many {kind}s", *terabytes])
    for k in (16, 128):
        again = (f"{k * (one + other):.1f} s" for one, other in zip(image, fusion, strict=True))
        rows.append([f"re-ranking the best {k} of a query, no states kept", *again])
        rows.append([f"re-ranking the best {k} of a query, states kept", *(f"{k * time:.1f} s" for time in fusion)])
    return markdown(f"| {MANY:,} images, one thread, computed | {' | '.join(ways)} |", rows)


def main(argv: list[str] | None = None) -> dict:
    """Measures and writes; returns what the JSON file holds."""
    parser = make_parser(__doc__)
    parser.add_argument("--width", type=int, default=768, help="hidden size, a multiple of 64")
    parser.add_argument("--num_layers", type=int, default=12, help="layers of each encoder")
    parser.add_argument("--steps", type=int, default=3, help="steps to time; ten times as many of the small model")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    results = {"environment": environment(), "width": args.width, "num_layers": args.num_layers, "steps": args.steps}
    results |= {"images": IMAGES, "questions": QUESTIONS, "tokens": NUM_TOKENS, "ways": {}, "together": []}
    slowdown = results["bf16_slowdown"] = bf16_slowdown()
    context = multiprocessing.get_context("spawn")
    # Spawned, so that none inherits another's memory.
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for name, way in WAYS.items():
            if way[1] and slowdown > SLOWEST_BF16:
                reason = f"left out: emulated here, a layer takes {slowdown:.0f} times as long"
                results["ways"][name] = {"gradient_checkpointing": way[0], "bf16": True, "skipped": reason}
                print(f"{name}: {reason}", flush=True)
                continue
            results["ways"][name] = pool.submit(measure_way, args.width, args.num_layers, *way, args.steps).result()
            print(f"{name}: {results['ways'][name]['seconds']:.1f} s a step", flush=True)
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2, context) as pool:
        for processes, images in TOGETHER:
            given = (processes, images, 10 * args.steps, f"{folder}/{processes} x {images}")
            # Each waits for the other, so that no process takes both parts.
            ranks = [pool.submit(measure_together, rank, *given) for rank in range(processes)]
            slowest = max(rank.result() for rank in ranks)
            results["together"].append({"processes": processes, "images": images, "seconds": slowest})
    print(f"{table(results)}\n\n{processes_table(results)}\n\n{many_table(results)}")
    write_result_file(args.output_dir, "training_cost", results)
    return results


if __name__ == "__main__":
    main()
