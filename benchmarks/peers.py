"""HiViLT beside the models a user would pick instead: what a question costs, in one run on one machine.

    python benchmarks/peers.py                                     about 40 minutes, 14 GiB
    python benchmarks/peers.py --width 128 --num_layers 4 --repeats 1 --output_dir /tmp/quick

Models of base size with random weights, which speed does not depend on (benchmarks/contestants.py). For 1, 5.4 (VQAv2's)
and 10 questions about each of 1 and 8 images: a question's share of the time of inference and of a training step
(forward and backward; the optimizer's update depends on the number of parameters alone), FLOPs, and peak memory in a
process of its own. Questions have 24 tokens. Models that take pairs get `PAIRS_AT_ONCE` of them at most, so that memory
does not decide; those that encode an image once get all its questions. Runs of all models alternate, figures are
medians, one thread. Then what HiViLT promises of itself: sparse fusion, states kept between calls, compiled, exported.

It prints the table and the goals, met or missed, and leaves a JSON file, written anew after each part, and an image,
with the processor in their names, in benchmarks/results.
"""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers.utils import logging

from common import alternate, goals_table, judge_goal, make_parser, markdown, seconds
from contestants import CONTESTANTS, NUM_TOKENS, Contestant, make_batch, make_hivilt
from hivilt import HiViLTForQuestionAnswering, HiViLTProcessor
from hivilt.fusion_hivilt import map_states
from hivilt.training.results import environment, peak_memory_bytes, write_result_file
from plots import plot_peers

QUESTIONS_PER_IMAGE = [1, 5.4, 10]
IMAGES = [1, 8]
PAIRS_AT_ONCE = 8
TOP_K = 32
KINDS_OF_TOKENS = {"sparse, two kinds of tokens": 2, "sparse, tokens alike": 1}


def count_flops(run: Callable[[], object], gradients: bool = False) -> int:
    """Floating point operations of a call, attention among them; with `gradients`, of one that computes some."""
    # torch knows how to count attention, but not under the names it has on the CPU.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    count_attention = {
        attention: lambda query, key, value, *args, **kwargs: sdpa_flop_count(query, key, value),
        backward: lambda grad, query, key, value, *args, **kwargs: sdpa_backward_flop_count(grad, query, key, value),
    }
    with torch.set_grad_enabled(gradients), FlopCounterMode(display=False, custom_mapping=count_attention) as counter:
        run()
    return counter.get_total_flops()


def infer(contestant: Contestant, batch: tuple[torch.Tensor, ...]) -> None:
    """Answers a batch."""
    with torch.inference_mode():
        contestant.answer(contestant.model, *batch)


def train(contestant: Contestant, batch: tuple[torch.Tensor, ...]) -> None:
    """A training step without the optimizer's update; gradients are given back, so that all models fit in memory."""
    contestant.model.train()
    contestant.loss(*batch).backward()
    contestant.model.zero_grad(set_to_none=True)
    contestant.model.eval()


def batch_size(contestant: Contestant, images: int, questions: int) -> tuple[int, int]:
    """Images and questions that stand for so many: a pair costs a model of pairs the same, whatever the image."""
    pairs = min(questions, PAIRS_AT_ONCE)
    return (images, questions) if contestant.encodes_once else (pairs, pairs)


def time_questions(contestants: dict[str, Contestant], step: Callable, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds a question takes, for each model and each number of images and questions."""
    sizes, runs = {name: {} for name in contestants}, {}
    for name, contestant in contestants.items():
        for images, per_image in product(IMAGES, QUESTIONS_PER_IMAGE):
            size = sizes[name][f"{images} x {per_image}"] = batch_size(contestant, images, round(images * per_image))
            if (name, size) not in runs:
                runs[name, size] = partial(step, contestant, make_batch(contestant.side, *size))
    found = alternate(runs, repeats)
    return {
        name: {setting: found[name, size] / size[1] for setting, size in settings.items()}
        for name, settings in sizes.items()
    }


def peak_memory(name: str, width: int, num_layers: int) -> dict[str, int]:
    """Peak resident bytes of inference, then of training, with 8 images of 5.4 questions each; in a fresh process."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    contestant = CONTESTANTS[name](width, num_layers)
    batch = make_batch(contestant.side, *batch_size(contestant, 8, 43))
    infer(contestant, batch)
    inference = peak_memory_bytes()
    train(contestant, batch)
    return {"inference": inference, "training": peak_memory_bytes()}


def measure_peers(width: int, num_layers: int, repeats: int) -> dict[str, dict]:
    """The table's rows."""
    rows = {}
    # Spawned, so that none inherits another's memory.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in CONTESTANTS:
            rows[name] = {"peak_memory_bytes": pool.submit(peak_memory, name, width, num_layers).result()}
            print(f"memory: {name}", flush=True)

    torch.manual_seed(0)
    contestants = {name: make(width, num_layers) for name, make in CONTESTANTS.items()}
    for name, contestant in contestants.items():
        batches = [make_batch(contestant.side, 1, questions) for questions in (1, 2)]
        one, two = (count_flops(partial(contestant.answer, contestant.model, *batch)) for batch in batches)
        a_question = two - one if contestant.encodes_once else one
        rows[name] |= {
            "encodes_once": contestant.encodes_once,
            "parameters": contestant.model.num_parameters(),
            "flops_per_question": {str(per): (one - a_question) / per + a_question for per in QUESTIONS_PER_IMAGE},
        }
    for kind, step, turns in (("inference", infer, repeats), ("training", train, max(1, repeats * 3 // 5))):
        print(f"{kind}: {turns} rounds", flush=True)
        for name, found in time_questions(contestants, step, turns).items():
            rows[name][f"{kind}_seconds_per_question"] = found
    return rows


def measure_fusion(width: int, num_layers: int, repeats: int) -> dict[str, float]:
    """What fusion adds to its two encoders, for as many questions as images: FLOPs and time of the same calls."""
    model = make_hivilt(width, num_layers)
    encoders = {"vision_model": 0.0, "text_model": 0.0}
    for name in encoders:
        module = getattr(model.model, name)
        module.register_forward_pre_hook(lambda *_, name=name: encoders.update({name: -time.perf_counter()}))
        module.register_forward_hook(
            lambda *_, name=name: encoders.update({name: encoders[name] + time.perf_counter()})
        )

    @torch.inference_mode()
    def share(batch) -> float:
        total = seconds(lambda: model(batch[1], torch.ones_like(batch[1]), batch[0]))
        return total / sum(encoders.values()) - 1

    found = {}
    for images in IMAGES:
        batch = make_batch(224, images, images)
        found[f"time, {images} x 1"] = median([share(batch) for _ in range(2 * repeats + 1)][1:])
    all_of_it = count_flops(partial(model, batch[1], torch.ones_like(batch[1]), batch[0]))
    alone = count_flops(lambda: (model.model.vision_model(batch[0]), model.model.text_model(batch[1])))
    return {"flops": all_of_it / alone - 1, **found}


@torch.inference_mode()
def measure_sparse(width: int, num_layers: int, repeats: int) -> dict:
    """Fusion of 8 questions with an image of 384 pixels, from kept states: dense, and with `TOP_K` vision tokens a text token.

    Tokens of noise choose apart from each other, a trained model's much alike (sparse_accuracy.py), so that it is also
    timed where a text has but one kind of token, or two.
    """
    model = make_hivilt(width, num_layers, side=384)
    pixel_values, input_ids, image_index = make_batch(384, 1, 8)
    images, texts = model.encode_images(pixel_values), model.encode_texts(input_ids)

    def of_kinds(number):
        kinds = torch.arange(NUM_TOKENS) % number
        return map_states(lambda x: x if x.shape[1:] == texts.global_state.shape[1:] else x[:, kinds], texts)

    fused = [[] for _ in model.model.fusion.stages]  # vision rows that each stage fuses, by call
    for stage, rows in zip(model.model.fusion.stages, fused, strict=True):
        count = lambda module, args, rows=rows: rows.append(args[0].shape[:-1].numel())
        stage.vision_mlp.register_forward_pre_hook(count)

    def fuse(top_k, texts):
        for rows in fused:
            rows.clear()
        model.config.fusion_top_k = top_k
        model.model.fuse(images, texts, image_index)

    runs = {"dense": partial(fuse, None, texts), "sparse": partial(fuse, TOP_K, texts)}
    runs |= {name: partial(fuse, TOP_K, of_kinds(number)) for name, number in KINDS_OF_TOKENS.items()}
    found = {"flops": {}, "fused_rows": {}}
    for name, run in runs.items():
        found["flops"][name] = count_flops(run)
        found["fused_rows"][name] = [sum(rows) / len(input_ids) for rows in fused]
    found["seconds"] = alternate(runs, 3 * repeats)
    return found


@torch.inference_mode()
def measure_reuse(width: int, num_layers: int, repeats: int) -> dict[str, float]:
    """Seconds of one image, of questions from its states, and of both in one call, for several numbers of questions."""
    model = make_hivilt(width, num_layers)
    pixel_values, input_ids, image_index = make_batch(224, 1, 20)
    states = model.encode_images(pixel_values)
    runs = {"an image": partial(model.encode_images, pixel_values)}
    for number in (5, 10, 20):
        texts = {"input_ids": input_ids[:number], "image_index": image_index[:number]}
        runs[f"{number} questions"] = partial(model, **texts, image_states=states)
        runs[f"both, {number}"] = partial(model, **texts, pixel_values=pixel_values)
    return alternate(runs, 2 * repeats)


@torch.inference_mode()
def measure_compiled(width: int, num_layers: int, repeats: int) -> dict[str, float]:
    """Seconds of 2 images with 10 questions, as written and compiled as one graph."""
    model = make_hivilt(width, num_layers)
    pixel_values, input_ids, image_index = make_batch(224, 2, 10)
    inputs = {"input_ids": input_ids, "pixel_values": pixel_values, "image_index": image_index}
    compiled = torch.compile(model, fullgraph=True)
    difference = (compiled(**inputs).logits - model(**inputs).logits).abs().max().item()
    found = alternate({"eager": partial(model, **inputs), "compiled": partial(compiled, **inputs)}, 3 * repeats)
    return {**found, "largest_difference": difference}


@torch.inference_mode()
def measure_exported() -> dict[str, float]:
    """Largest difference of logits between the model in `vqa/` and its exported programs, at several sizes."""
    root = Path(__file__).parents[1] / "vqa"
    model, processor = HiViLTForQuestionAnswering.from_pretrained(root), HiViLTProcessor.from_pretrained(root)
    side = processor.image_processor.size["height"]

    def make_inputs(images, questions, length):
        return {
            "input_ids": torch.randint(5, model.config.text_config.vocab_size, (questions, length)),
            "attention_mask": torch.ones(questions, length, dtype=torch.long),
            "pixel_values": torch.randn(images, 3, side, side),
            "image_index": torch.arange(questions) % images,
        }

    auto = torch.export.Dim.DYNAMIC
    sizes = {0: auto, 1: auto}
    shapes = {"input_ids": sizes, "attention_mask": sizes, "pixel_values": {0: auto}, "image_index": {0: auto}}
    program = torch.export.export(model, (), make_inputs(2, 3, 7), dynamic_shapes=shapes)
    exported = program.module()
    onnx = torch.onnx.export(program, dynamo=True)
    found = {"torch.export": 0.0, "onnxruntime": 0.0}
    for size in ((2, 3, 7), (3, 8, 5), (5, 16, 12)):
        inputs = make_inputs(*size)
        expected = model(**inputs).logits
        outputs = {"torch.export": exported(**inputs).logits, "onnxruntime": onnx(**inputs)[0]}
        for name, logits in outputs.items():
            found[name] = max(found[name], (torch.as_tensor(logits) - expected).abs().max().item())
    return found


def judge(results: dict) -> list[dict]:
    """The goals at base size, each with what was wanted, what was measured, and whether it was met."""
    goals = []

    def add(goal: str, measured: float, bound: float, unit: str, at_most: bool = True, reason: str = "") -> None:
        digits = {"": ".1e", "x": ".2f", " %": ".1f"}[unit]
        goals.append(judge_goal(goal, measured, bound, unit, digits, at_most, reason))

    fusion, sparse, reuse = results["fusion"], results["sparse"], results["reuse"]
    add("FLOPs that fusion adds to the two encoders", fusion["flops"], 0.06, " %")
    reason = "most of it is many small operations, which take longer than their FLOPs say"
    for images in IMAGES:
        add(f"time that fusion adds, batch of {images}", fusion[f"time, {images} x 1"], 0.08, " %", reason=reason)
    for kind in ("inference", "training"):
        for peer, bounds in {"ViLT, 384": {5.4: 2.5, 10: 3.5}, "BridgeTower": {5.4: 4, 10: 6}}.items():
            for per_image, bound in bounds.items():
                goal = f"{kind}, {per_image} questions an image: questions a second beside {peer}"
                measured = ratio(results, kind, peer, f"{IMAGES[-1]} x {per_image}")
                flops = [results["models"][name]["flops_per_question"][str(per_image)] for name in (peer, "HiViLT")]
                reason = f"the encoders and fusion as configured leave {flops[0] / flops[1]:.2f}x by FLOPs"
                add(goal, measured, bound, "x", at_most=False, reason=reason)
    beside_dense = {name: time / sparse["seconds"]["dense"] for name, time in sparse["seconds"].items()}
    rows = {name: found[0] for name, found in sparse["fused_rows"].items()}
    others = [f"{beside_dense[name]:.2f}x where they choose {rows[name]:.0f}" for name in KINDS_OF_TOKENS]
    add(
        f"time of sparse fusion beside dense, k = {TOP_K}, 384 pixels",
        beside_dense["sparse"],
        0.5,
        "x",
        reason=f"with random weights {NUM_TOKENS} text tokens choose {rows['sparse']:.0f} of {rows['dense']:.0f} vision "
        f"tokens between them, {sparse['flops']['sparse'] / sparse['flops']['dense']:.2f}x by FLOPs; it is "
        f"{' and '.join(others)}, and trained ones choose two to five times k (docs/scaling.md)",
    )

    def beside_one_call(questions: Callable[[int], float]) -> float:
        """How far an image and its questions, in seconds by their number, are from both in one call, at most."""
        return max(abs((reuse["an image"] + questions(k)) / reuse[f"both, {k}"] - 1) for k in (5, 10, 20))

    apart = beside_one_call(lambda k: reuse[f"{k} questions"])
    reason = "nothing is computed twice, so that what is left is the spread of the machine's times"
    add("an image and its questions apart beside both in one call", apart, 0.05, " %", reason=reason)
    line = beside_one_call(lambda k: k * reuse["20 questions"] / 20)
    few, many = (1000 * reuse[f"{number} questions"] / number for number in (5, 20))
    reason = f"five questions at a time take {few:.0f} ms each, twenty {many:.0f}"
    add("time beside one image + k questions, k = 5, 10, 20", line, 0.05, " %", reason=reason)
    compiled = results["compiled"]["compiled"] / results["compiled"]["eager"]
    reason = f"{100 * (compiled - 1):.1f} % more: matrix products, the same in both, take most of the time"
    add("time compiled beside eager", compiled, 1, "x", reason=reason)
    add("logits compiled beside eager", results["compiled"]["largest_difference"], 1e-4, "")
    add("logits of torch.export beside eager", results["exported"]["torch.export"], 1e-4, "")
    add("logits of onnxruntime beside eager", results["exported"]["onnxruntime"], 1e-4, "")
    return goals


def ratio(results: dict, kind: str, peer: str, setting: str) -> float:
    """How many questions HiViLT takes in the time that the peer takes one."""
    per_question = {name: row[f"{kind}_seconds_per_question"][setting] for name, row in results["models"].items()}
    return per_question[peer] / per_question["HiViLT"]


def table(results: dict) -> str:
    """Markdown: a model a row; speeds beside HiViLT's are ratios, larger where HiViLT is faster."""
    settings = [f"{IMAGES[-1]} x {per_image}" for per_image in QUESTIONS_PER_IMAGE]
    head = (
        "| | parameters | GFLOP a question at 1 / 5.4 / 10 an image | questions/s at 1 / 5.4 / 10 | HiViLT's ratio | "
        "in training, questions/s | HiViLT's ratio | GiB, inference / training |"
    )
    rows = []
    for name, row in results["models"].items():
        cells = [[f"{flops / 1e9:.1f}" for flops in row["flops_per_question"].values()]]
        for kind in ("inference", "training"):
            per_question = row[f"{kind}_seconds_per_question"]
            cells.append([f"{1 / per_question[setting]:.2f}" for setting in settings])
            cells.append([f"{ratio(results, kind, name, setting):.2f}" for setting in settings])
        cells.append([f"{row['peak_memory_bytes'][kind] / 2**30:.1f}" for kind in ("inference", "training")])
        rows.append([name, f"{row['parameters'] / 1e6:.0f} M", *map(" / ".join, cells)])
    return markdown(head, rows)


def beside_vilt(results: dict) -> str:
    """Markdown: of ViLT's questions a second HiViLT takes so many times as many."""
    rows = []
    for what, kind in (("answered", "inference"), ("trained on", "training")):
        ratios = (ratio(results, kind, "ViLT, 384", f"{IMAGES[-1]} x {n}") for n in QUESTIONS_PER_IMAGE)
        rows.append([what, *(f"{one:.2f}x" for one in ratios)])
    return markdown(f"| questions an image | {' | '.join(map(str, QUESTIONS_PER_IMAGE))} |", rows)


def main(argv: list[str] | None = None) -> dict:
    """Measures, writes and draws; returns what the JSON file holds."""
    parser = make_parser(__doc__)
    parser.add_argument("--width", type=int, default=768, help="hidden size of all models, a multiple of 192")
    parser.add_argument("--num_layers", type=int, default=12, help="layers of each encoder")
    parser.add_argument("--repeats", type=int, default=4, help="rounds of inference; three fifths as many of training")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    size = (args.width, args.num_layers, args.repeats)

    torch.manual_seed(0)
    results = {"environment": environment(), "accelerator": "none: no figure here says anything about GPUs"}
    results |= {"width": args.width, "num_layers": args.num_layers, "pairs_at_once": PAIRS_AT_ONCE}
    parts = {
        "fusion": partial(measure_fusion, *size),
        "sparse": partial(measure_sparse, *size),
        "reuse": partial(measure_reuse, *size),
        "compiled": partial(measure_compiled, *size),
        "exported": measure_exported,
        "models": partial(measure_peers, *size),
        "goals": partial(judge, results),
    }
    for name, measure in parts.items():
        results[name] = measure()
        path = write_result_file(args.output_dir, "peers", results)
        print(f"{name}: done", flush=True)
    print(f"{table(results)}\n\n{goals_table(results)}")
    plot_peers(results["models"], path.with_suffix(".png"))
    return results


if __name__ == "__main__":
    main()
