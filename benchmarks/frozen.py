"""What training costs where both encoders are frozen and encoded once, beside no cache and beside fine-tuning ViLT.

    pip install easy-vqa                                           its drawings, or --data_dir
    python benchmarks/frozen.py                                    about ten minutes on one thread
    python benchmarks/frozen.py --width 64 --num_layers 2 --num_steps 1 --num_epochs 1 --output_dir /tmp/quick

Training steps alternate, part by part: reading a batch, forward, backward and AdamW's update; figures are medians, on one
thread. A step has `IMAGES` images of 5.4 questions each, VQAv2's, of 24 tokens. HiViLT is ViT-B/16 at 224 pixels, BERT-base
and the fusion of `HiViLTConfig()`, with random weights, which cost does not depend on. It reads what `EncoderCache` kept,
through `VQACollator`, or else the images' JPEG files (of 640 by 480 and 160 KB), and encodes them in every step. ViLT reads
pairs at 384 pixels and trains all of itself; its pairs are ready in memory, which favours it, and come `PAIRS` at a time,
with one update for as many questions as HiViLT's step has. Over ten epochs, filling the cache is counted: opening images,
encoding, writing; and apart, what a second run takes to find it filled, which grows with the encoders' weights and little
with the data. The cache is read from memory, and once from the disk.

What storing half the bits costs in accuracy is measured on drawings of easy-VQA: the encoders of the model in
vqa/ are frozen, a new fusion and head train on them, and all test questions are answered.

It prints the tables and the goals, met or missed, and leaves a JSON file with the processor in its name in
benchmarks/results.
"""

import os
import random
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from transformers import ViTImageProcessorPil
from transformers.utils import logging

from common import alternate, goals_table, judge_goal, make_parser, markdown, seconds
from contestants import CONTESTANTS, NUM_ANSWERS, NUM_TOKENS, make_batch, make_hivilt
from hivilt import HiViLTForQuestionAnswering, HiViLTProcessor
from hivilt.data.vqa import VQACollator, VQADataset, VQAExample
from hivilt.data.vqa_benchmarks import VQA_BENCHMARKS
from hivilt.training.encoder_cache import DTYPES, EncoderCache
from hivilt.training.models import train_tokenizer
from hivilt.training.results import environment, write_result_file
from input_pipeline import make_photographs, read_drawings
from peers import count_flops

IMAGES, QUESTIONS, PAIRS = 10, 54, 8
EPOCHS = 10
# Cached states by their precision.
CACHED = {f"from the cache, {name}": name for name in ("float32", "float16")}
NO_CACHE, VILT = "without a cache", "ViLT, 384"
# What is cached, and by which encoder.
KINDS = {"image": "vision", "question": "text"}
PARTS = ("reading", "forward", "backward", "update")

# ---------------------------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------------------------


class Training:
    """A model in training, whose steps are taken part by part, on batches without end."""

    def __init__(self, model: nn.Module, batches: Iterator[dict]):
        self.model = model.train()
        self.batches = batches
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Few batches are soon known by heart: gradients of next to nothing are denormal numbers, which take times as long.
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def reading(self) -> None:
        self.batch = next(self.batches)

    def forward(self) -> None:
        self.loss = self.model(**self.batch).loss

    def backward(self) -> None:
        self.loss.backward()

    def compute(self) -> None:
        """Loss and gradients of the batch that was read last."""
        self.forward()
        self.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def make_examples(folder: Path, num_images: int) -> list[VQAExample]:
    """Photographs, and distinct questions of `NUM_TOKENS` tokens about them, five or six each."""
    draw = random.Random(0)
    words = [first + second for first in "bdfgkmnprstvz" for second in "aeiou"]
    examples = []
    for example in make_photographs(folder, num_images):
        question, answer = " ".join(draw.choices(words, k=NUM_TOKENS - 2)), f"LABEL_{draw.randrange(NUM_ANSWERS)}"
        examples.append(example._replace(question=question, answers=(answer,)))
    return examples


def without_end(dataset: VQADataset, collator: VQACollator) -> Iterator[dict]:
    """Batches of epoch after epoch."""
    loader = DataLoader(dataset.by_image(), IMAGES, shuffle=True, collate_fn=collator)
    for batch in chain.from_iterable(repeat(loader)):
        batch.pop("question_index")
        yield batch


def forget_files(folder: Path) -> None:
    """Has the system read the files of a folder from the disk when they are read next."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_speed(width: int, num_layers: int, num_images: int, num_steps: int) -> dict:
    """Seconds of the parts of a step of each way to train, by `num_steps` after a first one, and what encoding and reading the
    cache take; `num_images` is a multiple of `IMAGES`."""
    torch.manual_seed(0)
    model = make_hivilt(width, num_layers)
    for part in ("vision", "text"):
        model.freeze(part)
    found = {"encoding": {}, "ways": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        examples = make_examples(folder, num_images)
        dataset = VQADataset(examples)
        tokenizer = train_tokenizer(example.question for example in examples)
        image_processor = ViTImageProcessorPil(size={"height": 224, "width": 224})
        make_collator = partial(VQACollator, HiViLTProcessor(image_processor, tokenizer), model.config.label2id)

        trainings = {}
        for way, dtype in CACHED.items():
            cache = EncoderCache(folder / dtype, dtype=dtype)
            collator = make_collator(encoder_cache=cache)
            fill = partial(cache.add, dataset, model, collator.processor, progress=False)
            took = {kind: seconds(partial(fill, parts=(part,))) for kind, part in KINDS.items()}
            held = cache.summary()
            again = {kind: seconds(partial(fill, parts=(part,))) for kind, part in KINDS.items()}
            forget_files(cache.folder)
            batches = without_end(dataset, collator)
            from_disk = median(seconds(partial(next, batches)) for _ in range(num_images // IMAGES))
            found["encoding"][dtype] = {
                kind: {
                    "number": held[part]["encoded"],
                    "seconds": (took[kind] - again[kind]) / held[part]["encoded"],
                    "seconds_when_all_is_there": again[kind],
                    "bytes": held[part]["bytes"] / held[part]["cached"],
                }
                for kind, part in KINDS.items()
            }
            found["encoding"][dtype]["seconds_from_disk"] = from_disk
            trainings[way] = Training(model, batches)
        trainings[NO_CACHE] = Training(model, without_end(dataset, make_collator()))
        vilt = CONTESTANTS[VILT](width, num_layers).model
        pixel_values, input_ids, _ = make_batch(384, PAIRS, PAIRS)
        labels = F.one_hot(torch.arange(PAIRS), NUM_ANSWERS).float()
        pairs = {"pixel_values": pixel_values, "input_ids": input_ids, "labels": labels}
        trainings[VILT] = Training(vilt, repeat(pairs))

        runs = {(way, part): getattr(one, part) for way, one in trainings.items() for part in PARTS}
        alternate(runs, 1)
        times = alternate(runs, num_steps)
    for way in trainings:
        # As many of ViLT's pairs as questions of the others, and one update.
        times_as_many = {part: QUESTIONS / PAIRS if way == VILT and part != "update" else 1 for part in PARTS}
        parts = {part: times[way, part] * times_as_many[part] for part in PARTS}
        trained = [parameter.numel() for parameter in trainings[way].model.parameters() if parameter.requires_grad]
        flops = count_flops(trainings[way].compute, gradients=True) / (PAIRS if way == VILT else QUESTIONS)
        found["ways"][way] = {"seconds": parts, "trained_parameters": sum(trained), "flops_per_question": flops}
    return found


def seconds_a_question(results: dict, way: str, epochs: int | None = None) -> float:
    """Of training from the cache in an epoch, or over some with the encoding counted; else of training in any epoch."""
    step = sum(results["ways"][way]["seconds"].values())
    if epochs is not None and way in CACHED:
        encoding = results["encoding"][CACHED[way]]
        step += (IMAGES * encoding["image"]["seconds"] + QUESTIONS * encoding["question"]["seconds"]) / epochs
    return step / QUESTIONS


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy
# ---------------------------------------------------------------------------------------------------------------------


def measure_accuracy(num_images: int, num_epochs: int, seeds: int, data_dir: Path | None) -> dict[str, dict[str, list]]:
    """Test accuracy and loss of fusion and head trained on the frozen encoders of the checkpoint, a number for each of so many
    seeds, which new weights and the order of images are drawn from; without `data_dir`, on the drawings of easy-vqa."""
    root = Path(__file__).parents[1] / "vqa"
    trained, processor = HiViLTForQuestionAnswering.from_pretrained(root), HiViLTProcessor.from_pretrained(root)
    train = VQADataset(read_drawings(num_images, data_dir))
    test = VQADataset(VQA_BENCHMARKS["easy-vqa"].read("test", data_dir))

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in (None, *DTYPES):
            name = NO_CACHE if way is None else f"from the cache, {way}"
            found[name] = {"accuracy": [], "loss": []}
            for seed in range(seeds):
                torch.manual_seed(seed)
                model = HiViLTForQuestionAnswering(trained.config)
                for part in ("vision", "text"):
                    encoder = getattr(trained.model, f"{part}_model")
                    getattr(model.model, f"{part}_model").load_state_dict(encoder.state_dict())
                    model.freeze(part)
                cache = None if way is None else EncoderCache(Path(folder, way), dtype=way)
                for split in () if cache is None else (train, test):
                    cache.add(split, model, processor, progress=False)
                collator = VQACollator(processor, model.config.label2id, encoder_cache=cache)
                train_head(model, train, collator, num_epochs)
                for measure, value in answer(model, test, collator).items():
                    found[name][measure].append(value)
            print(f"accuracy {name}: {found[name]['accuracy']}", flush=True)
    return found


def train_head(model: HiViLTForQuestionAnswering, split: VQADataset, collator: VQACollator, num_epochs: int) -> None:
    """Trains what is not frozen, on eight images at a time, in an order drawn anew in each epoch."""
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    loader = DataLoader(split.by_image(), 8, shuffle=True, collate_fn=collator)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, num_epochs * len(loader))
    for batch in chain.from_iterable(repeat(loader, num_epochs)):
        batch.pop("question_index")
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.inference_mode()
def answer(model: HiViLTForQuestionAnswering, split: VQADataset, collator: VQACollator) -> dict[str, float]:
    """Accuracy and mean loss over a split."""
    model.eval()
    right, losses = [], []
    for batch in DataLoader(split.by_image(), 32, collate_fn=collator):
        batch.pop("question_index")
        labels = batch.pop("labels")
        logits = model(**batch).logits
        right += (logits.argmax(dim=-1) == labels).tolist()
        losses += F.cross_entropy(logits, labels, reduction="none").tolist()
    return {"accuracy": mean(right), "loss": mean(losses)}


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def judge(results: dict) -> list[dict]:
    """The goals at base size, each with what was wanted, what was measured, and whether it was met."""
    goals, ways = [], results["ways"]
    for peer, bound, spans in ((VILT, 10, (EPOCHS,)), (NO_CACHE, 4, (None, EPOCHS))):
        for span in spans:
            for way in CACHED:
                faster = seconds_a_question(results, peer, span) / seconds_a_question(results, way, span)
                own = ways[way]["flops_per_question"]
                encoding = ways[NO_CACHE]["flops_per_question"] - own
                flops = ways[peer]["flops_per_question"] / (own + (encoding / span if span else 0))
                reason = f"the encoders and fusion as configured leave {flops:.1f}x by FLOPs"
                when = "an epoch" if span is None else f"{span} epochs with the encoding"
                name = f"{when}, {way}: questions/s beside {peer}"
                goals.append(judge_goal(name, faster, bound, "x", ".1f", at_most=False, reason=reason))
    for way, dtype in CACHED.items():
        parts = ways[way]["seconds"]
        rest = sum(parts.values()) - parts["reading"]
        reading = {"in memory": parts["reading"], "on disk": results["encoding"][dtype]["seconds_from_disk"]}
        for where, time in reading.items():
            name, reason = f"reading's share of a step {way}, files {where}", f"{1000 * time:.0f} ms a step"
            goals.append(judge_goal(name, time / (time + rest), 0.1, " %", ".2f", at_most=True, reason=reason))
    whole, half = (mean(results["accuracy"][way]["accuracy"]) for way in CACHED)
    name, reason = "accuracy that float16 loses beside float32", f"{half:.4f} beside {whole:.4f}"
    return [*goals, judge_goal(name, whole - half, 0.0, " %", ".2f", at_most=True, reason=reason)]


def table(results: dict) -> str:
    """Markdown: a way of training a row, with questions a second of an epoch and over ten."""
    rows = []
    for way, row in results["ways"].items():
        cells = [f"{row['trained_parameters'] / 1e6:.0f} M", f"{row['flops_per_question'] / 1e9:.1f}"]
        cells += [f"{1000 * row['seconds'][part]:,.0f} ms" for part in PARTS]
        cells += [f"{1 / seconds_a_question(results, way, epochs):.2f}" for epochs in (None, EPOCHS)]
        many = seconds_a_question(results, way, EPOCHS)
        cells += [f"{seconds_a_question(results, peer, EPOCHS) / many:.1f}×" for peer in (NO_CACHE, VILT)]
        rows.append([way, *cells])
    speed = f"questions/s | over {EPOCHS} epochs | beside no cache | beside ViLT"
    return markdown(f"| | trained | GFLOP a question | {' | '.join(PARTS)} | {speed} |", rows)


def cache_table(results: dict) -> str:
    """Markdown: what filling the cache takes, finding it filled, and what it holds, a precision a row."""
    rows = []
    for dtype, row in results["encoding"].items():
        kinds = [row[kind] for kind in KINDS]
        cells = [f"{1 / kind['seconds']:.1f}" for kind in kinds]
        cells.append(f"{sum(kind['seconds_when_all_is_there'] for kind in kinds):.1f}")
        cells += [f"{kind['bytes'] / 1e3:.0f}" for kind in kinds]
        rows.append([dtype, *cells, f"{1000 * row['seconds_from_disk']:.0f}"])
    sizes = "KB an image | KB a question | ms to read a step's from disk"
    return markdown(f"| stored in | images/s | questions/s | seconds when all is there | {sizes} |", rows)


def accuracy_table(results: dict) -> str:
    """Markdown: test accuracy and loss, means over seeds, and the seeds' lowest and highest accuracy."""
    rows = []
    for way, row in results["accuracy"].items():
        lowest, highest = min(row["accuracy"]), max(row["accuracy"])
        rows.append([way, f"{mean(row['accuracy']):.4f}", f"{lowest:.4f} to {highest:.4f}", f"{mean(row['loss']):.4f}"])
    return markdown("| encoders' states | accuracy | of the seeds | loss |", rows)


def main(argv: list[str] | None = None) -> dict:
    """Measures, prints and writes; returns what the JSON file holds."""
    parser = make_parser(__doc__)
    parser.add_argument("--width", type=int, default=768, help="hidden size of all models, a multiple of 64")
    parser.add_argument("--num_layers", type=int, default=12, help="layers of each encoder")
    parser.add_argument("--num_batches", type=int, default=3, help=f"of {IMAGES} images each, in the data set")
    parser.add_argument("--num_steps", type=int, default=6, help="steps of each way to take medians of")
    parser.add_argument("--drawings", type=int, default=300, help="training images of easy-VQA")
    parser.add_argument("--num_epochs", type=int, default=3, help="of training on them")
    parser.add_argument("--seeds", type=int, default=3, help="of that training")
    parser.add_argument("--data_dir", type=Path, help="easy-VQA's files; unset: those of the package easy-vqa")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.set_verbosity_error()

    results = {"environment": environment(), "accelerator": "none: no figure here says anything about GPUs"}
    results |= {"width": args.width, "num_layers": args.num_layers, "steps": args.num_steps, "tokens": NUM_TOKENS}
    results |= {"images_a_step": IMAGES, "questions_a_step": QUESTIONS, "vilt_pairs": PAIRS}
    results |= measure_speed(args.width, args.num_layers, IMAGES * args.num_batches, args.num_steps)
    print(f"{table(results)}\n\n{cache_table(results)}\n", flush=True)
    results |= {"drawings": args.drawings, "epochs_on_drawings": args.num_epochs}
    results["accuracy"] = measure_accuracy(args.drawings, args.num_epochs, args.seeds, args.data_dir)
    results["goals"] = judge(results)
    print(f"{accuracy_table(results)}\n\n{goals_table(results)}")
    write_result_file(args.output_dir, "frozen", results)
    return results


if __name__ == "__main__":
    main()
