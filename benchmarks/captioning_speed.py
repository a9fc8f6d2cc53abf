"""HiViLT beside BLIP: what a caption costs, in one run on one machine.

    python benchmarks/captioning_speed.py                          about 20 minutes, 6 GiB
    python benchmarks/captioning_speed.py --width 64 --num_layers 2 --repeats 1 --output_dir /tmp/quick

Both have ViT-B/16 at 384 pixels and random weights, which speed does not depend on; BLIP's decoder is its own, HiViLT's
the default one. Captions have `NUM_TOKENS` tokens, each after a prompt of its own: for 1 and 5 of them about each of 1 and
8 images, greedily and by beams. BLIP takes a pair of image and prompt a caption, HiViLT each image once. Several samples of one prompt,
for which BLIP encodes an image once, too, are a row of their own. Runs of both alternate, figures are medians, one thread.

It prints the table and the goals, and leaves a JSON file with the processor in its name in benchmarks/results.
"""

from functools import partial
from itertools import product

import torch
from transformers import BlipConfig, BlipForConditionalGeneration
from transformers.utils import logging

from common import alternate, goals_table, judge_goal, make_parser, markdown
from contestants import make_hivilt
from hivilt import HiViLTForConditionalGeneration
from hivilt.training.results import environment, write_result_file

IMAGES, PER_IMAGE, BEAMS = (1, 8), (1, 5), (1, 3)
NUM_TOKENS = 10
GOALS = {1: 1.5, 5: 3.0}


def make_blip(width: int, num_layers: int, side: int) -> BlipForConditionalGeneration:
    """`Salesforce/blip-image-captioning-base` with random weights, if `width` is 768 and `num_layers` 12."""
    size = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": num_layers}
    heads = {"num_attention_heads": max(1, width // 64)}
    config = BlipConfig(
        vision_config={**size, **heads, "image_size": side},
        text_config={**size, **heads, "encoder_hidden_size": width},
    )
    return BlipForConditionalGeneration(config).eval()


def make_writer(width: int, num_layers: int, side: int) -> HiViLTForConditionalGeneration:
    """HiViLT of the same size, with its default decoder."""
    model = make_hivilt(width, num_layers, side, HiViLTForConditionalGeneration)
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id, config.decoder_start_token_id = 101, 102, 0, 101
    return model


@torch.inference_mode()
def write(model, encode_once: bool, images: int, per_image: int, side: int, samples: bool = False, **options) -> None:
    """Generates so many captions of each of some images."""
    number = images * (1 if samples else per_image)
    prompts = torch.randint(1000, 2000, (number, 4), generator=torch.Generator().manual_seed(0))
    pixel_values = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(0))
    image_index = torch.arange(images).repeat_interleave(number // images)
    inputs = {"image_index": image_index} if encode_once else {}
    if not encode_once:
        pixel_values = pixel_values[image_index]
    if samples:
        options |= {"num_return_sequences": per_image, "do_sample": True}
    length = {"min_new_tokens": NUM_TOKENS, "max_new_tokens": NUM_TOKENS}
    model.generate(pixel_values=pixel_values, input_ids=prompts, **inputs, **length, **options)


def table(results: dict) -> str:
    """Markdown: a setting a row, captions a second of each model and their ratio."""
    rows = []
    for setting, found in results["captions_per_second"].items():
        ours, peer = found["HiViLT"], found["BLIP"]
        rows.append([setting, f"{ours:.2f}", f"{peer:.2f}", f"{ours / peer:.2f}"])
    return markdown("| images x captions an image, beams | HiViLT, captions/s | BLIP, captions/s | ratio |", rows)


def main(argv: list[str] | None = None) -> dict:
    """Measures and writes; returns what the JSON file holds."""
    parser = make_parser(__doc__)
    parser.add_argument("--width", type=int, default=768, help="hidden size of both, a multiple of 64")
    parser.add_argument("--num_layers", type=int, default=12, help="layers of each encoder and of BLIP's decoder")
    parser.add_argument("--side", type=int, default=384, help="of the images, in pixels")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    size = (args.width, args.num_layers, args.side)
    models = {"HiViLT": make_writer(*size), "BLIP": make_blip(*size)}

    results = {
        "parameters": {name: model.num_parameters() for name, model in models.items()},
        "captions_per_second": {},
    }
    settings = {
        f"{images} x {per_image}, {beams}": {"images": images, "per_image": per_image, "num_beams": beams}
        for images, per_image, beams in product(IMAGES, PER_IMAGE, BEAMS)
    }
    settings |= {f"{n} x 5 samples of one prompt": {"images": n, "per_image": 5, "samples": True} for n in IMAGES}
    for setting, given in settings.items():
        runs = {
            name: partial(write, model, name == "HiViLT", side=args.side, **given) for name, model in models.items()
        }
        found = alternate(runs, args.repeats)
        written = given["images"] * given["per_image"]
        results["captions_per_second"][setting] = {name: written / seconds for name, seconds in found.items()}
    results["goals"] = []
    for images, per_image, beams in product(IMAGES, PER_IMAGE, BEAMS):
        found = results["captions_per_second"][f"{images} x {per_image}, {beams}"]
        goal = f"captions/s beside BLIP: {images} images, {per_image} captions of each, {beams} beams"
        measured, reason = found["HiViLT"] / found["BLIP"], "see docs/captioning.md"
        results["goals"].append(judge_goal(goal, measured, GOALS[per_image], "x", ".2f", False, reason))
    results["environment"] = environment()
    print(table(results), goals_table(results), sep="\n\n")
    write_result_file(args.output_dir, "captioning_speed", results)
    return results


if __name__ == "__main__":
    main()
