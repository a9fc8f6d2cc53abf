"""What HiViLT finds in photographs: things that templated expressions name in DAQUAR's images, beside two fixed answers.

    python runs/encoders_without_hub.py                            MobileNetV2 and MiniLM, in outputs/encoders
    python benchmarks/grounding.py --data_dir daquar
    python benchmarks/grounding.py --data_dir daquar --seeds 1

The expressions were not written by people: templates made them of the annotated boxes of the 13 classes of NYU Depth, "the
table", "the leftmost chair", "the largest sofa" (`daquar-grounding` in docs/data.md). Images are split by room. Each training
is a run of run_grounding.py on one thread, on two frozen encoders. Every one of `CHOICES` is trained once, and the best
Acc@0.5 on the validation split is taken; then three other seeds train anew and read the test split once each.

Beside it are answers that read no expression. The centre box is in the middle of the image, of the width and height, in
twentieths of the image's, that hit most training boxes. The largest box is the largest of those that the expressions about
an image mean: it is given true boxes, which HiViLT is not.

A run that came to its end in --output_dir is not done again. It prints the tables and leaves a JSON file with the processor
in its name in benchmarks/results.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from photographs import percent, run

from common import goals_table, judge_goal, markdown
from hivilt.data.grounding import Box, GroundedImage
from hivilt.data.grounding_benchmarks import GROUNDING_BENCHMARKS
from hivilt.evaluation.grounding import HIT_IOU, grounding_scores, iou
from hivilt.tasks.grounding import kinds_of, references_of
from hivilt.training.results import write_result_file

NAME = "daquar-grounding"
# Of MobileNetV2 at 320 x 256 the last map of 20 x 16, where boxes are found, and the last one, of 10 x 8.
FUSION = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_fusion_stages": 2,
    "fusion_intermediate_size": 128,
    "vision_levels": [11, 16],
    "dropout": 0.2,
}
RECIPE = (
    *("--benchmark", NAME, "--freeze", "vision", "text", "--fusion", json.dumps(FUSION), "--save_strategy", "no"),
    *("--image_processor", '{"size": {"height": 256, "width": 320}, "do_center_crop": false}'),
    *("--num_train_epochs", "12", "--per_device_train_batch_size", "8", "--learning_rate", "1e-3"),
)
CHOICES: dict[str, tuple[str, ...]] = {
    "images as they are": (),
    "mirrored": ("--random_flip", "swap"),
    "mirrored and cropped": ("--random_flip", "swap", "--random_crop", "0.5"),
}
SEARCH_SEED = 0
HIVILT, CENTRE, LARGEST = "HiViLT", "centre box", "largest box (true boxes given)"
METRIC = "accuracy@0.5"
MEASURES = {METRIC: "Acc@0.5", "mean_iou": "mean IoU", "pointing_game": "pointing game"}


def table(results: dict) -> str:
    """Measures on the test split in percent, mean and standard deviation of the seeds, and Acc@0.5 by kind, as Markdown."""
    kinds = list(results["baselines"][CENTRE]["by_kind"])
    rows = []
    for name, found in {**results["baselines"], HIVILT: results["runs"]}.items():
        tests = [one["test"] for one in found] if name == HIVILT else [found]
        cells = [percent([100 * test[measure] for test in tests]) for measure in MEASURES]
        cells += [percent([100 * test["by_kind"][kind][METRIC] for test in tests]) for kind in kinds]
        rows.append([name, *cells])
    number = results["baselines"][CENTRE]["num_expressions"]
    heads = [*MEASURES.values(), *(f"Acc@0.5, {kind}" for kind in kinds)]
    return markdown(f"| {number:,} test expressions | {' | '.join(heads)} |", rows)


def choices_table(results: dict) -> str:
    """Acc@0.5 on the validation split in percent, a choice a row, as Markdown."""
    return markdown(
        "| validation | Acc@0.5 |", [[name, f"{100 * found:.1f}"] for name, found in results["searched"].items()]
    )


def baselines(train: Sequence[GroundedImage], test: Sequence[GroundedImage]) -> dict[str, dict[str, Any]]:
    """The measures of both fixed answers on `test`."""
    centre = centre_box([box for own in references_of(train) for box in own])
    answers = {
        CENTRE: [centre for example in test for _ in example.expressions],
        LARGEST: [
            max((box for own in example.boxes for box in own), key=area)
            for example in test
            for _ in example.expressions
        ],
    }
    return {
        name: grounding_scores(
            [{"boxes": [box], "scores": [1.0]} for box in given], references_of(test), kinds=kinds_of(test)
        )
        for name, given in answers.items()
    }


def centre_box(boxes: Sequence[Box]) -> Box:
    """The box in the middle of the image that hits most of these; of equals, the one that overlaps them most."""
    halves = np.arange(1, 21) / 40
    sizes = np.array(list(product(halves, halves)))
    centred = np.concatenate([0.5 - sizes, 0.5 + sizes], axis=1)
    overlaps = iou(centred[:, None], np.array(boxes))  # (sizes, boxes)
    hits = (overlaps >= HIT_IOU).sum(axis=1) + overlaps.mean(axis=1) / 2
    return tuple(centred[hits.argmax()].tolist())


def area(box: Box) -> float:
    """In parts of the image's."""
    left, top, right, bottom = box
    return (right - left) * (bottom - top)


def main(argv: list[str] | None = None) -> dict:
    """Runs what is not done yet; returns what the JSON file holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", type=Path, required=True, help="DAQUAR with grounding_nyu13.json and images/")
    parser.add_argument("--vision_model", default="outputs/encoders/mobilenet_v2")
    parser.add_argument("--text_model", default="outputs/encoders/minilm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/grounding_daquar"), help="of the runs")
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args, flags = parser.parse_known_args(argv)
    train, test = (GROUNDING_BENCHMARKS[NAME].read(split, args.data_dir) for split in ("train", "test"))

    def find(folder: str, choice: str, seed: int, *more: str) -> dict:
        where = ["--data_dir", args.data_dir, "--vision_model", args.vision_model, "--text_model", args.text_model]
        given = [*RECIPE, *CHOICES[choice], "--seed", seed, *more]
        return run("run_grounding.py", args.output_dir / folder, [*where, *given, *flags])

    searched = {name: find(name.replace(" ", "_"), name, SEARCH_SEED)["validation"][METRIC] for name in CHOICES}
    # Of equals the first.
    chosen = max(CHOICES, key=searched.__getitem__)
    results: dict[str, Any] = {"baselines": baselines(train, test), "searched": searched, "chosen": chosen}
    runs = [find(f"seed-{seed}", chosen, seed, "--do_predict") for seed in args.seeds]
    results["runs"] = [{key: one[key] for key in ("parameters", "train", "validation", "test")} for one in runs]
    results["environment"] = runs[0]["environment"]

    reached, why = mean(one["test"][METRIC] for one in runs), "see docs/grounding.md"
    results["goals"] = [
        judge_goal(f"Acc@0.5 less that of the {name}", reached - found[METRIC], 0.0, " %", ".1f", False, why)
        for name, found in results["baselines"].items()
    ]
    print(choices_table(results), table(results), goals_table(results), sep="\n\n")
    write_result_file(args.results_dir, "grounding", results)
    return results


if __name__ == "__main__":
    main()
