"""How fast images with their questions come out of files, and what a training step of `make vqa` waits for.

    pip install easy-vqa                                           its drawings, or --data_dir
    python benchmarks/input_pipeline.py                            about ten minutes on one thread
    python benchmarks/input_pipeline.py --images 16 --rounds 1 --steps 5 --output_dir /tmp/quick

A DataLoader with no worker, one and two gives batches of eight images: HiViLT's by `VQADataset` and `VQACollator`, as
`run_vqa.py` trains on; ViLT's and CLIP's by the processors of transformers, whose users open an image once for each
question. All have the image processors that need no torchvision, one tokenizer, and outputs of nearly as many pixels.
Images are JPEG photographs of 640 by 480, of noise that takes as many bytes as a photograph of MS-COCO (about 160 KB),
prepared for a model of 224; and the drawings of easy-VQA, 64 by 64, as `make vqa` has them. Files are read more than
once, so they come from memory. Medians of whole epochs that alternate, with the workers kept; one thread a process.

The parts of a training step are those of `run_vqa.py` with its own data and model, medians over the steps. It prints the
tables and leaves a JSON file with the processor in its name in benchmarks/results.
"""

import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from functools import partial, partialmethod
from itertools import cycle, pairwise, product
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    CLIPImageProcessorPil,
    CLIPProcessor,
    ProcessorMixin,
    TrainerCallback,
    ViltImageProcessorPil,
    ViltProcessor,
    ViTImageProcessorPil,
)

from common import alternate, make_parser, markdown, run_quietly
from hivilt import HiViLTProcessor
from hivilt.data.tables import open_image
from hivilt.data.vqa import VQACollator, VQADataset, VQAExample
from hivilt.data.vqa_benchmarks import VQA_BENCHMARKS
from hivilt.tasks.question_answering import QuestionAnswering
from hivilt.training.models import train_tokenizer
from hivilt.training.results import environment, write_result_file

BATCH_SIZE = 8  # images, as in `make vqa`
PHOTOGRAPH = (640, 480)
# Sides of what the models get. ViLT keeps the shape: its 256 by 192 are as many pixels as 224 by 224, but for 2 %.
SIDES = {"photographs": {"hivilt": 224, "vilt": 192, "clip": 224}, "drawings": {"hivilt": 64, "vilt": 64, "clip": 64}}
# 27 questions about five images, VQAv2's 5.4 an image.
QUESTIONS_AN_IMAGE = (5, 6, 5, 6, 5)
QUESTIONS = (
    "what is the man holding in his hand?",
    "how many people are there?",
    "is the dog on the left asleep?",
    "what color is the car?",
    "what is on the table?",
    "is it raining?",
)
NAMES = {"hivilt": "HiViLT", "vilt": "ViLT's processor", "clip": "CLIP's processor"}
PARTS = ("waiting for data", "forward", "backward", "optimizer", "rest")

# ---------------------------------------------------------------------------------------------------------------------
# Images and questions
# ---------------------------------------------------------------------------------------------------------------------


def make_photographs(folder: Path, num_images: int) -> list[VQAExample]:
    """JPEG files of noise at all scales, coarse more than fine, each with five or six questions."""
    width, height = PHOTOGRAPH
    examples = []
    for number, num_questions in zip(range(num_images), cycle(QUESTIONS_AN_IMAGE), strict=False):
        draw = np.random.default_rng(number)
        pixels = np.zeros((height, width, 3), np.float32)
        for octave in range(8):
            columns, rows = 5 * 2**octave, height * 5 * 2**octave // width
            for channel in range(3):
                noise = Image.fromarray(draw.standard_normal((rows, columns), np.float32))
                pixels[..., channel] += 0.88**octave * np.asarray(noise.resize(PHOTOGRAPH, Image.Resampling.BICUBIC))
        low, high = np.percentile(pixels, [1, 99])
        path = folder / f"{number}.jpg"
        Image.fromarray((255 * (pixels - low) / (high - low)).clip(0, 255).astype(np.uint8)).save(path, quality=90)
        examples += [
            VQAExample(f"{number}-{place}", str(number), str(path), question, ("yes",))
            for place, question in enumerate(QUESTIONS[:num_questions])
        ]
    return examples


def read_drawings(num_images: int, data_dir: Path | None) -> list[VQAExample]:
    """The first images of easy-VQA's training split with all their questions."""
    examples = VQA_BENCHMARKS["easy-vqa"].read("train", data_dir)
    chosen = set(list(dict.fromkeys(one.image_id for one in examples))[:num_images])
    return [one for one in examples if one.image_id in chosen]


def first_questions(examples: list[VQAExample]) -> list[VQAExample]:
    """One question about each image."""
    return list({one.image_id: one for one in reversed(examples)}.values())[::-1]


# ---------------------------------------------------------------------------------------------------------------------
# Processors
# ---------------------------------------------------------------------------------------------------------------------


def collate_pairs(processor: ProcessorMixin, pairs: list[VQAExample]) -> Mapping[str, torch.Tensor]:
    """A batch as users of ViLT and CLIP make it: every pair of an image and a question opens the image."""
    images = [Image.open(pair.image).convert("RGB") for pair in pairs]
    questions = [pair.question for pair in pairs]
    return processor(images=images, text=questions, padding=True, return_tensors="pt")


def make_collator(examples: list[VQAExample], side: int) -> VQACollator:
    """HiViLT's, with the image processor of `run_vqa.py`."""
    size = {"height": side, "width": side}
    processor = HiViLTProcessor(ViTImageProcessorPil(size=size), train_tokenizer(one.question for one in examples))
    return VQACollator(processor, {"yes": 0, "no": 1})


def make_loaders(examples: list[VQAExample], sides: Mapping[str, int], num_workers: int) -> dict[str, DataLoader]:
    """The three that are compared, on the same files."""
    dataset, ours = VQADataset(examples).by_image(), make_collator(examples, sides["hivilt"])
    vilt = ViltImageProcessorPil(size={"shortest_edge": sides["vilt"]})
    clip = CLIPImageProcessorPil(size={"shortest_edge": sides["clip"]}, crop_size=sides["clip"])
    pairs = max(1, round(BATCH_SIZE * len(examples) / len(dataset)))
    tokenizer, options = ours.processor.tokenizer, {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    loaders = {"hivilt": DataLoader(dataset, BATCH_SIZE, collate_fn=ours, **options)}
    for name, processor in (("vilt", ViltProcessor(vilt, tokenizer)), ("clip", CLIPProcessor(clip, tokenizer))):
        loaders[name] = DataLoader(examples, pairs, collate_fn=partial(collate_pairs, processor), **options)
    return loaders


def epoch_seconds(loaders: Mapping[str, DataLoader], rounds: int) -> dict[str, float]:
    """Of whole epochs; workers have started before."""
    # A deque that keeps nothing reads to the end.
    epochs = {name: partial(deque, loader, maxlen=0) for name, loader in loaders.items()}
    alternate(epochs, 1)
    return alternate(epochs, rounds)


def output_sizes(examples: list[VQAExample], sides: Mapping[str, int]) -> dict[str, list[int]]:
    """Height and width of what each gives."""
    loaders = make_loaders(examples, sides, 0)
    batches = {name: loader.collate_fn([loader.dataset[0]]) for name, loader in loaders.items()}
    return {name: list(batch["pixel_values"].shape[-2:]) for name, batch in batches.items()}


def copy_batch(batch: Mapping[str, torch.Tensor], items: object) -> dict[str, torch.Tensor]:
    """A collator that has nothing to do, whatever the items; what a worker sends is new each time, or it is not moved."""
    return {name: value.clone() for name, value in batch.items()}


def milliseconds_an_image(examples: list[VQAExample], side: int, rounds: int) -> dict[str, float]:
    """Of the steps on the way to a batch of HiViLT, and of what transformers' image processor takes by itself."""
    dataset, collator = VQADataset(examples).by_image(), make_collator(examples, side)
    items = [dataset[place] for place in range(min(BATCH_SIZE, len(dataset)))]
    processor = collator.processor
    images = [open_image(item["image"]) for item in items]
    resized = [processor.resize(image) for image in images]
    questions = [[example.question for example in item["examples"]] for item in items]
    batch = collator(items)

    work = alternate(
        {
            "open and decode": lambda: [open_image(item["image"]) for item in items],
            "resize": lambda: [processor.resize(image) for image in images],
            "normalize": lambda: processor(images=resized, return_tensors="pt"),
            "questions": lambda: processor(text=questions, padding=True, return_tensors="pt"),
            "all of it, with labels": lambda: collator(items),
            "resize and normalize, transformers": lambda: processor.image_processor(images, return_tensors="pt"),
        },
        5 * rounds,  # they take little time
    )

    # Long enough to outlast the start of an epoch.
    num_batches, options = 32, {"num_workers": 1, "persistent_workers": True}
    sent = {
        "from a worker to the trainer": batch,
        "from a worker to the trainer, if uint8": {**batch, "pixel_values": batch["pixel_values"].to(torch.uint8)},
    }
    loaders = {
        name: DataLoader(range(num_batches), collate_fn=partial(copy_batch, one), **options)
        for name, one in sent.items()
    }
    work |= {name: seconds / num_batches for name, seconds in epoch_seconds(loaders, rounds).items()}
    return {name: 1000 * seconds / len(items) for name, seconds in work.items()}


# ---------------------------------------------------------------------------------------------------------------------
# A training step
# ---------------------------------------------------------------------------------------------------------------------


class Clock(TrainerCallback):
    """Notes when each part of a training step ends."""

    def __init__(self):
        self.ends: list[tuple[str, float]] = []

    def end(self, part: str, *args, **kwargs) -> None:
        self.ends.append((part, time.perf_counter()))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.register_forward_hook(lambda *_: self.end("forward"))
        self.end("rest")

    on_step_begin = partialmethod(end, "waiting for data")
    on_pre_optimizer_step = partialmethod(end, "backward")
    on_optimizer_step = partialmethod(end, "optimizer")
    on_step_end = partialmethod(end, "rest")


def split_step(num_steps: int, data_dir: Path | None) -> dict:
    """Median milliseconds of the parts of a step of `run_vqa.py`, and their shares."""
    clock = Clock()
    flags = ["--do_train", "--max_steps", str(num_steps), "--use_cpu", "true"]
    flags += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    flags += ["--benchmark", "easy-vqa", *(["--data_dir", str(data_dir)] if data_dir else [])]
    found = run_quietly(QuestionAnswering, flags, clock)
    seconds = defaultdict(list)
    for (_, start), (part, end) in pairwise(clock.ends):
        seconds[part].append(end - start)
    milliseconds = {part: 1000 * median(seconds[part]) for part in PARTS}
    return {
        "steps": found["train"]["steps"],
        "num_workers": found["settings"]["dataloader_num_workers"],
        "images_a_step": found["settings"]["per_device_train_batch_size"],
        "questions_a_step": found["train"]["questions"] / found["train"]["steps"],
        "milliseconds": milliseconds,
        "share": {part: value / sum(milliseconds.values()) for part, value in milliseconds.items()},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def table(results: dict) -> str:
    """Markdown: images a second, and how many times those of a peer HiViLT's are."""
    rows = []
    for row in results["rows"]:
        rates = row["images_per_second"]
        questions = f"{row['questions_an_image']:.1f}".removesuffix(".0")
        cells = [f"{rates['hivilt']:,.0f}"]
        cells += [f"{rates[peer]:,.0f} ({rates['hivilt'] / rates[peer]:.1f}×)" for peer in ("vilt", "clip")]
        what = f"{row['files']}, {questions} question{'s' if questions != '1' else ''} an image"
        rows.append([what, str(row["num_workers"]), *cells])
    return markdown(f"| | workers | {' | '.join(NAMES.values())} |", rows)


def table_of_work(results: dict) -> str:
    """Markdown: milliseconds an image of each step on the way to a batch."""
    found = results["milliseconds_an_image"]
    rows = [[name, *(f"{found[files][name]:.2f}" for files in found)] for name in next(iter(found.values()))]
    return markdown(f"| ms an image | {' | '.join(found)} |", rows)


def table_of_step(results: dict) -> str:
    """Markdown: the parts of a training step of `make vqa`."""
    step = results["step"]
    rows = [(part, f"{step['milliseconds'][part]:.1f}", f"{step['share'][part]:.1%}") for part in PARTS]
    return markdown("| part of a step | ms | share |", rows)


def main(argv: list[str] | None = None) -> dict:
    """Measures, prints and writes; returns what the JSON file holds."""
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=64, help="photographs; drawings are four times as many")
    parser.add_argument("--rounds", type=int, default=7, help="epochs to take the median of")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60, help="training steps to take the median of")
    parser.add_argument("--data_dir", type=Path, help="easy-VQA's files; unset: those of the package easy-vqa")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    results = {"batch_size": BATCH_SIZE, "rounds": args.rounds, "files": {}, "rows": [], "milliseconds_an_image": {}}
    with tempfile.TemporaryDirectory() as folder:
        data = {
            "photographs": make_photographs(Path(folder), args.images),
            "drawings": read_drawings(4 * args.images, args.data_dir),
        }
        for files, examples in data.items():
            sides, single = SIDES[files], first_questions(examples)
            results["files"][files] = {
                "images": len(single),
                "mean_bytes": mean(Path(one.image).stat().st_size for one in single),
                "output_size": output_sizes(examples, sides),
            }
            for some, num_workers in product((single, examples), args.workers):
                took = epoch_seconds(make_loaders(some, sides, num_workers), args.rounds)
                row = {"files": files, "questions_an_image": len(some) / len(single), "num_workers": num_workers}
                rates = {name: len(single) / seconds for name, seconds in took.items()}
                results["rows"].append({**row, "images_per_second": rates})
            work = milliseconds_an_image(examples, sides["hivilt"], args.rounds)
            results["milliseconds_an_image"][files] = work
    results["step"] = split_step(args.steps, args.data_dir)
    results["environment"] = environment()
    print(table(results), table_of_work(results), table_of_step(results), sep="\n\n")
    write_result_file(args.output_dir, "input_pipeline", results)
    return results


if __name__ == "__main__":
    main()
