"""HiViLT beside ViLT: what it costs to judge a sentence about two images, in one run on one machine.

    python benchmarks/reasoning_speed.py                           about a minute
    python benchmarks/reasoning_speed.py --tiny --repeats 1 --output_dir /tmp/quick

Both have random weights, which speed does not depend on. ViLT is `dandelin/vilt-b32-finetuned-nlvr2`, patches of 32 pixels of
images of 384 x 384: it runs once for each image of a pair, whatever that image was asked before. HiViLT encodes an image once for
all its pairs. It has BERT, and ViT-B/32 at 384 pixels, which cuts images into ViLT's patches, or ViT-B/16 at 224. Four images make two pairs, each image in one of them, or
ten pairs, each image in five. Sentences have `NUM_TOKENS` tokens, as those of NLVR2 have on average. Images are prepared by
none. Runs of all alternate, figures are medians, one thread. It prints the table and the goals, and leaves a JSON file with the
processor in its name in benchmarks/results.
"""

from functools import partial
from typing import Any

import torch
from transformers import ViltConfig, ViltForImagesAndTextClassification
from transformers.utils import logging

from common import alternate, goals_table, judge_goal, make_parser, markdown
from contestants import make_hivilt
from hivilt import HiViLTForImagesAndTextClassification
from hivilt.training.results import environment, write_result_file

NUM_IMAGES = 4
PAIRS = {1: 2, 5: 10}  # by how many pairs an image is in, how many there are
NUM_TOKENS = 18
VILT, VILT_SIDE = "ViLT", 384
VISION = {"HiViLT, ViT-B/32": (384, 32), "HiViLT, ViT-B/16": (224, 16)}  # side and patches, in pixels
GOAL = 4.0


def make_vilt(tiny: bool) -> ViltForImagesAndTextClassification:
    """That of NLVR2, or something for tests."""
    small = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 64}
    images = {"num_images": 2, "modality_type_vocab_size": 3, "image_size": 64 if tiny else VILT_SIDE}
    return ViltForImagesAndTextClassification(ViltConfig(**images, **(small if tiny else {}))).eval()


@torch.inference_mode()
def judge(model: torch.nn.Module, num_pairs: int, side: int) -> None:
    """Runs a model on sentences about so many pairs of `NUM_IMAGES` images with this side."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(NUM_IMAGES, 3, side, side, generator=generator)
    words = torch.randint(2000, 3000, (num_pairs, NUM_TOKENS), generator=generator)
    inputs: dict[str, Any] = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    image_index = (torch.arange(2 * num_pairs) % NUM_IMAGES).view(num_pairs, 2)
    if isinstance(model, ViltForImagesAndTextClassification):
        model(pixel_values=images[image_index], **inputs)
    else:
        model(pixel_values=images, image_index=image_index, **inputs)


def table(results: dict) -> str:
    """Markdown: a model a row, pairs a second, and how many times as many as ViLT."""
    rows, speeds = [], results["pairs_per_second"]
    for name, found in speeds.items():
        side = results["side"][name]
        cells = [name, f"{results['parameters'][name] / 1e6:.0f} M", f"{side} x {side}"]
        cells += [f"{found[str(uses)]:.2f}" for uses in PAIRS]
        rows.append(cells + [f"{found[str(uses)] / speeds[VILT][str(uses)]:.1f}" for uses in PAIRS])
    heads = [f"{what} in {uses}" for what in ("pairs/s, each image", "times ViLT's, each image") for uses in PAIRS]
    return markdown(f"| | parameters | images | {' | '.join(heads)} |", rows)


def main(argv: list[str] | None = None) -> dict:
    """Measures and writes; returns what the JSON file holds."""
    parser = make_parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="try it on models and images of next to no size")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.set_verbosity_error()

    make_judge = partial(make_hivilt, head=HiViLTForImagesAndTextClassification, num_labels=2)
    models = {VILT: (make_vilt(args.tiny), 64 if args.tiny else VILT_SIDE)}
    for name, (side, patch_size) in VISION.items():
        large = partial(make_judge, side=side, patch_size=patch_size)
        models[name] = (make_judge(64, 4, 64), 64) if args.tiny else (large(), side)
    runs = {
        (name, uses): partial(judge, model, num_pairs, side)
        for name, (model, side) in models.items()
        for uses, num_pairs in PAIRS.items()
    }
    alternate({name: run for name, run in runs.items() if name[1] == 1}, 1)
    found = alternate(runs, args.repeats)
    results: dict[str, Any] = {
        "parameters": {name: model.num_parameters() for name, (model, _) in models.items()},
        "side": {name: side for name, (_, side) in models.items()},
        "pairs_per_second": {
            name: {str(uses): num_pairs / found[name, uses] for uses, num_pairs in PAIRS.items()} for name in models
        },
        "goals": [],
        "environment": environment(),
    }
    speeds = results["pairs_per_second"]
    for ours in VISION:
        goal = f"{ours}: pairs/s beside ViLT, each image in 5"
        ratio = speeds[ours]["5"] / speeds[VILT]["5"]
        results["goals"].append(judge_goal(goal, ratio, GOAL, "x", ".1f", False, "see docs/reasoning.md"))
    print(table(results), goals_table(results), sep="\n\n")
    write_result_file(args.output_dir, "reasoning_speed", results)
    return results


if __name__ == "__main__":
    main()
