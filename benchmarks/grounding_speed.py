"""HiViLT beside GroundingDINO and OWL-ViT: what it costs to find what an expression means, in one run on one machine.

    python benchmarks/grounding_speed.py                           about 10 minutes, 6 GiB
    python benchmarks/grounding_speed.py --tiny --repeats 1 --output_dir /tmp/quick

All have random weights, which speed does not depend on, and one image at the size that each is published with:
GroundingDINO (tiny) a photograph of 4 : 3 with 800 pixels on its shorter side, OWL-ViT (base, patches of 32) 768 x 768.
HiViLT has ViT-B/16 and BERT, at 224 and at 384 pixels. Expressions have `NUM_WORDS` tokens, and 1 and 10 of them are about
the image. OWL-ViT and HiViLT take them as they are and encode the image once. GroundingDINO is measured both ways that
there are: all in one prompt, each with " . " after it, and a prompt and a pass for each. The first is the cheaper one, and
the goal is judged by it; but its published use of it is names of things, and a prompt has 256 tokens at most.

Images are prepared and boxes are post-processed by none. Runs of all alternate, figures are medians, one thread. It prints
the table and the goals, and leaves a JSON file with the processor in its name in benchmarks/results.
"""

from functools import partial
from typing import Any

import torch
from transformers import (
    BertConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    OwlViTConfig,
    OwlViTForObjectDetection,
    SwinConfig,
)
from transformers.utils import logging

from common import alternate, goals_table, judge_goal, make_parser, markdown
from contestants import make_hivilt
from hivilt import HiViLTForVisualGrounding
from hivilt.training.results import environment, write_result_file

EXPRESSIONS = (1, 10)
NUM_WORDS = 6  # "the red chair left of it"
CLS, SEP, FULL_STOP = 101, 102, 1012  # of BERT
SIDES = {"HiViLT, 224 pixels": 224, "HiViLT, 384 pixels": 384}
DINO, DINO_EACH, OWL = "GroundingDINO, one prompt", "GroundingDINO, a prompt each", "OWL-ViT"
GOAL = 5.0


def make_grounding_dino(tiny: bool) -> GroundingDinoForObjectDetection:
    """`IDEA-Research/grounding-dino-tiny`, whose config is the default one, or something for tests."""
    small = {"backbone_config": SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, out_indices=[2, 3, 4])}
    small["text_config"] = BertConfig(hidden_size=64, num_attention_heads=1, num_hidden_layers=1, intermediate_size=64)
    small |= {"d_model": 64, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 10}
    return GroundingDinoForObjectDetection(GroundingDinoConfig(**(small if tiny else {}))).eval()


def make_owl_vit(tiny: bool) -> OwlViTForObjectDetection:
    """`google/owlvit-base-patch32`, whose config is the default one, or something for tests."""
    size = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 64}
    small = {"vision_config": {**size, "image_size": 96}, "text_config": size, "projection_dim": 64}
    return OwlViTForObjectDetection(OwlViTConfig(**(small if tiny else {}))).eval()


@torch.inference_mode()
def find(model: torch.nn.Module, number: int, size: tuple[int, int], each: bool = False) -> None:
    """Runs a model on an image of this height and width and so many expressions, with `each` by a pass for each."""
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(1, 3, *size, generator=generator)
    words = torch.randint(2000, 3000, (number, NUM_WORDS), generator=generator)
    if isinstance(model, GroundingDinoForObjectDetection):
        phrases = torch.cat([words, torch.full((number, 1), FULL_STOP)], dim=1)
        for some in phrases.unsqueeze(1) if each else [phrases]:
            prompt = torch.tensor([[CLS, *some.flatten().tolist(), SEP]])
            model(pixel_values=pixel_values, input_ids=prompt, attention_mask=torch.ones_like(prompt))
        return
    words = torch.cat([torch.full((number, 1), CLS), words, torch.full((number, 1), SEP)], dim=1)
    inputs: dict[str, Any] = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    if isinstance(model, HiViLTForVisualGrounding):
        inputs["image_index"] = torch.zeros(number, dtype=torch.long)
    model(pixel_values=pixel_values, **inputs)


def table(results: dict) -> str:
    """Markdown: a model a row, expressions a second, and how many times as many HiViLT finds at each size."""
    rows, speeds = [], results["expressions_per_second"]
    for name, found in speeds.items():
        height, width = results["size"][name]
        cells = [name, f"{results['parameters'][name] / 1e6:.0f} M", f"{width} x {height}"]
        cells += [f"{found[str(number)]:.2f}" for number in EXPRESSIONS]
        cells += [f"{speeds[ours]['10'] / found['10']:.1f}" for ours in SIDES]
        rows.append(cells)
    beside = [f"{name}: times as many at 10" for name in SIDES]
    speed = [f"expressions/s, {number} an image" for number in EXPRESSIONS]
    return markdown(f"| | parameters | image | {' | '.join([*speed, *beside])} |", rows)


def main(argv: list[str] | None = None) -> dict:
    """Measures and writes; returns what the JSON file holds."""
    parser = make_parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="try it on models and images of next to no size")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.set_verbosity_error()

    make_finder = partial(make_hivilt, head=HiViLTForVisualGrounding)
    # Height and width; a photograph of 640 x 480 as the image processor of GroundingDINO resizes it.
    photograph, square = ((96, 128), (96, 96)) if args.tiny else ((800, 1066), (768, 768))
    models: dict[str, tuple[torch.nn.Module, tuple[int, int]]] = {
        name: (make_finder(64, 4, 64), (64, 64)) if args.tiny else (make_finder(side=side), (side, side))
        for name, side in SIDES.items()
    }
    models[OWL] = make_owl_vit(args.tiny), square
    models[DINO] = models[DINO_EACH] = make_grounding_dino(args.tiny), photograph
    runs = {
        (name, number): partial(find, model, number, size, each=name == DINO_EACH)
        for name, (model, size) in models.items()
        for number in EXPRESSIONS
        if (name, number) != (DINO_EACH, 1)  # the same as one prompt
    }
    alternate({name: run for name, run in runs.items() if name[1] == 1}, 1)
    found = alternate(runs, args.repeats)
    found[DINO_EACH, 1] = found[DINO, 1]
    results: dict[str, Any] = {
        "parameters": {name: model.num_parameters() for name, (model, _) in models.items()},
        "size": {name: list(size) for name, (_, size) in models.items()},
        "expressions_per_second": {
            name: {str(number): number / found[name, number] for number in EXPRESSIONS} for name in models
        },
        "goals": [],
        "environment": environment(),
    }
    speeds = results["expressions_per_second"]
    for ours in SIDES:
        ratio = speeds[ours]["10"] / speeds[DINO]["10"]
        goal = f"{ours}: expressions/s beside {DINO}, 10 expressions"
        results["goals"].append(judge_goal(goal, ratio, GOAL, "x", ".1f", False, "see docs/grounding.md"))
    print(table(results), goals_table(results), sep="\n\n")
    write_result_file(args.output_dir, "grounding_speed", results)
    return results


if __name__ == "__main__":
    main()
