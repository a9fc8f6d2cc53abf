"""HiViLT's heads and its peers on one GPU in bfloat16: speed, memory, share of the peak, and how often the host waits.

    python benchmarks/accelerator.py                               a GPU of 40 GiB and more
    python benchmarks/accelerator.py --compile                     HiViLT's heads compiled
    python benchmarks/accelerator.py --width 192 --num_layers 3 --images 2 --repeats 1 --output_dir /tmp/quick

The last line tries it, on a CPU too. The models are those of peers.py, at base size and with random weights, under autocast
with scaled dot product attention. `--images` images a batch have 5.4 and 10 questions each: a model that encodes an image
once takes these as they are, another every pair, so many at a time as there are images. All heads of HiViLT train on and read
5.4 texts an image: captions are written with `NUM_TOKENS` tokens, and statements are about two images. A training step is
forward, backward and AdamW; its share of the peak is what FLOPs counted without compiling are of `PEAKS`, for a card that
stands there. Waits are what CUDA reports of a forward pass that is neither the first nor compiled.

It prints the tables and the goals, and leaves a JSON file with the GPU in its name in benchmarks/results. It has not been
run on a GPU yet, as none could be had where this was built: the file that is there is of the last line, and says so.
"""

import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from captioning_speed import NUM_TOKENS, make_writer
from transformers.utils import logging

from common import goals_table, judge_goal, make_parser, markdown, seconds
from contestants import CONTESTANTS, NUM_ANSWERS, make_batch, make_hivilt
from hivilt import (
    HiViLTForConditionalGeneration,
    HiViLTForImagesAndTextClassification,
    HiViLTForQuestionAnswering,
    HiViLTForRetrieval,
    HiViLTForVisualGrounding,
)
from hivilt.training.results import environment, write_result_file
from peers import count_flops

HEADS = {
    "answering": HiViLTForQuestionAnswering,
    "retrieval": HiViLTForRetrieval,
    "captioning": HiViLTForConditionalGeneration,
    "grounding": HiViLTForVisualGrounding,
    "pairs": HiViLTForImagesAndTextClassification,
}
QUESTIONS_PER_IMAGE = (5.4, 10.0)
# bfloat16 FLOP/s without sparsity, from NVIDIA's data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
SHARE, RATIO = 0.45, 3.3  # wanted: of the peak in training, and questions a second beside ViLT at 10 an image


def on(device: torch.device, run: Callable[[], object]) -> Callable[[], None]:
    """The call under autocast, up to when the device has done it."""

    def whole() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    return whole


def inputs_of(head: str, images: int, texts: int, device: torch.device) -> dict[str, Any]:
    """What the head trains on."""
    pixel_values, input_ids, image_index = (rows.to(device) for rows in make_batch(224, images, texts))
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    inputs |= {"pixel_values": pixel_values, "image_index": image_index}
    if head == "answering":
        return inputs | {"labels": torch.arange(texts, device=device) % NUM_ANSWERS}
    if head == "retrieval":
        return inputs | {"return_loss": True}
    if head == "captioning":
        return inputs | {"labels": input_ids[:, :NUM_TOKENS]}
    if head == "grounding":
        return inputs | {"labels": [{"boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]], device=device)}] * texts}
    both = torch.stack([image_index, (image_index + 1) % images], dim=1)
    return inputs | {"image_index": both, "labels": torch.arange(texts, device=device) % 2}


def make_head(head: str, width: int, num_layers: int) -> torch.nn.Module:
    """HiViLT with the head."""
    if head == "captioning":
        return make_writer(width, num_layers, 224)
    return make_hivilt(width, num_layers, head=HEADS[head], **({"num_labels": 2} if head == "pairs" else {}))


def training(model: torch.nn.Module, loss: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], None]:
    """A training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        found = loss()
        # Backward passes run in the precision of the forward one.
        with torch.autocast(device.type, enabled=False):
            found.backward()
            optimizer.step()
            optimizer.zero_grad()

    return on(device, step)


def measure(run: Callable[[], None], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds after three calls, and on a GPU the most bytes that were held."""
    for _ in range(3):
        run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    found = {"seconds": median(seconds(run) for _ in range(repeats))}
    if device.type == "cuda":
        found["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return found


def waits(run: Callable[[], object], device: torch.device) -> int | None:
    """How often the host waits for the GPU in a call; `None` without one."""
    if device.type != "cuda":
        return None
    run()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


def measure_head(
    head: str, size: tuple[int, int], images: int, repeats: int, compiles: bool, device: torch.device
) -> dict:
    """A head in training and in inference."""
    texts = round(QUESTIONS_PER_IMAGE[0] * images)
    model, inputs = make_head(head, *size).to(device), inputs_of(head, images, texts, device)
    asked = {name: rows for name, rows in inputs.items() if name not in ("labels", "return_loss")}
    run = torch.compile(model) if compiles else model

    @torch.inference_mode()
    def infer() -> None:
        if head == "captioning":
            model.generate(**asked, min_new_tokens=NUM_TOKENS, max_new_tokens=NUM_TOKENS)
        else:
            run(**asked)

    def loss() -> torch.Tensor:
        return run(**inputs).loss

    found: dict[str, Any] = {"images": images, "texts": texts, "parameters": model.num_parameters()}
    found["inference"] = measure(on(device, infer), repeats, device)
    found["inference"]["waits"] = waits(infer, device)
    model.train()
    found["training"] = measure(training(model, loss, device), repeats, device)
    found["training"]["waits"] = waits(lambda: model(**inputs), device)
    found["training"]["flops"] = count_flops(lambda: model(**inputs).loss.backward(), gradients=True)
    return found


def measure_peer(name: str, size: tuple[int, int], images: int, repeats: int, device: torch.device) -> dict:
    """Seconds a question of a model that answers or matches, by questions an image."""
    contestant = CONTESTANTS[name](*size)
    model, found = contestant.model.to(device), {"inference": {}, "training": {}}
    for per_image in QUESTIONS_PER_IMAGE:
        texts = round(per_image * images)
        rows = (images, texts) if contestant.encodes_once else (images, images)
        batch = [rows.to(device) for rows in make_batch(contestant.side, *rows)]
        model.eval()
        infer = torch.inference_mode()(partial(contestant.answer, model, *batch))
        key = str(per_image)
        found["inference"][key] = measure(on(device, infer), repeats, device)["seconds"] / rows[1]
        model.train()
        step = training(model, partial(contestant.loss, *batch), device)
        found["training"][key] = measure(step, repeats, device)["seconds"] / rows[1]
    return found


def peak_of(device_name: str) -> float | None:
    """FLOP/s of the card, if it is known."""
    return next((peak for card, peak in PEAKS.items() if card in device_name), None)


def share_of(peak: float, training: dict) -> float:
    """What a head's training takes of the card's FLOP/s."""
    return training["flops"] / training["seconds"] / peak


def table(results: dict) -> str:
    """Markdown: a head a row."""
    peak, rows = peak_of(results["environment"]["device_name"]), []
    for head, found in results["heads"].items():
        cells = [head]
        for kind in ("training", "inference"):
            one = found[kind]
            cells += [f"{found[rows_of] / one['seconds']:,.0f}" for rows_of in ("images", "texts")]
            cells.append(f"{one['peak_memory_bytes'] / 2**30:.1f}" if "peak_memory_bytes" in one else "")
            cells.append("" if one["waits"] is None else str(one["waits"]))
        rows.append([*cells, f"{100 * share_of(peak, found['training']):.0f} %" if peak else ""])
    heads = [
        f"{kind}, {what}" for kind in ("training", "inference") for what in ("images/s", "texts/s", "GiB", "waits")
    ]
    return markdown(f"| | {' | '.join(heads)} | share of the peak |", rows)


def peers_table(results: dict) -> str:
    """Markdown: a model a row; questions a second, and how many times as many HiViLT takes."""
    ours, rows = results["peers"]["HiViLT"], []
    for name, found in results["peers"].items():
        cells = [name]
        for kind in ("inference", "training"):
            for key, each in found[kind].items():
                cells += [f"{1 / each:,.0f}", f"{each / ours[kind][key]:.2f}x"]
        rows.append(cells)
    heads = [
        f"{kind}, {n:g} an image | HiViLT's ratio" for kind in ("inference", "training") for n in QUESTIONS_PER_IMAGE
    ]
    return markdown(f"| questions/s | {' | '.join(heads)} |", rows)


def judge(results: dict) -> list[dict]:
    """What was wanted of a GPU; without one nothing was measured of it."""
    here, ratio, share = results["environment"], None, None
    why = no_peak = "no GPU could be had"
    if here["device"] != "cpu":
        why, no_peak = "see docs/scaling.md", f"the peak of {here['device_name']} is not known"
        vilt, ours = (results["peers"][name]["training"]["10.0"] for name in ("ViLT, 384", "HiViLT"))
        ratio = vilt / ours
    if peak := peak_of(here["device_name"]):
        share = share_of(peak, results["heads"]["answering"]["training"])
    beside = "training, 10 questions an image: questions a second beside ViLT, 384"
    of_peak = f"training, 5.4 questions an image: share of {f'{peak / 1e12:.0f} TFLOP/s' if peak else 'the peak'}"
    return [
        judge_goal(beside, ratio, RATIO, "x", ".2f", False, why),
        judge_goal(of_peak, share, SHARE, " %", ".0f", False, why if peak else no_peak),
    ]


def main(argv: list[str] | None = None) -> dict:
    """Measures and writes; returns what the JSON file holds."""
    parser = make_parser(__doc__)
    parser.add_argument("--width", type=int, default=768, help="hidden size of all models, a multiple of 192")
    parser.add_argument("--num_layers", type=int, default=12, help="layers of each encoder")
    parser.add_argument("--images", type=int, default=64, help="a batch")
    parser.add_argument("--repeats", type=int, default=20, help="calls that are timed")
    parser.add_argument("--compile", action="store_true", help="HiViLT's heads by torch.compile")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    size, rest = (args.width, args.num_layers), (args.repeats, device)
    results: dict[str, Any] = {"environment": environment(), "compiled": args.compile, "heads": {}, "peers": {}}
    results |= {"width": args.width, "num_layers": args.num_layers, "images": args.images}
    for head in HEADS:
        results["heads"][head] = measure_head(head, size, args.images, args.repeats, args.compile, device)
        print(f"{head}: {results['heads'][head]}", flush=True)
    for name in CONTESTANTS:
        results["peers"][name] = measure_peer(name, size, args.images, *rest)
        print(f"{name}: {results['peers'][name]}", flush=True)
    results["goals"] = judge(results)
    print(table(results), peers_table(results), goals_table(results), sep="\n\n")
    write_result_file(args.output_dir, "accelerator", results)
    return results


if __name__ == "__main__":
    main()
