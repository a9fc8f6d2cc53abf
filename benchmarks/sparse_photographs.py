"""What sparse fusion costs in accuracy and saves in time on photographs, on DAQUAR's training questions that are held out.

    python runs/encoders_without_hub.py                            MobileNetV2 and MiniLM, in outputs/encoders
    python benchmarks/sparse_photographs.py --data_dir daquar

On the two encoders, frozen, a fusion is trained dense and another with `TOP_K` vision tokens a text token. At 384 pixels the
maps of MobileNetV2 have 576 and 144 tokens, as ViT-B/16 has them. The dense one is measured with fewer tokens, too. Beside
the accuracy stands how many vision tokens each stage fused for a question, on average: as many as its text tokens chose
between them. And the time of fusion beside dense, from kept states: one question, and `QUESTIONS` in a batch, which takes
as many rows of each as the one that chose most. Calls alternate, medians, one thread.

The test split is not read. A training that came to its end in --runs_dir is not done again. It prints the table and the
goal, and leaves a JSON file with the processor in its name in benchmarks/results.
"""

import json
from functools import partial
from pathlib import Path

import torch
from photographs import run
from sparse_accuracy import validate

from common import alternate, goals_table, judge_goal, make_parser, markdown
from hivilt import HiViLTForQuestionAnswering, HiViLTProcessor
from hivilt.data.tables import hold_out, open_image
from hivilt.tasks.arguments import VQAArguments
from hivilt.tasks.question_answering import QuestionAnswering
from hivilt.training.results import environment, write_result_file

FUSION = {"hidden_size": 256, "num_attention_heads": 8, "num_fusion_stages": 2, "fusion_intermediate_size": 128}
FUSION |= {"vision_levels": [11, 16], "dropout": 0.2}
RECIPE = (
    *("--freeze", "vision", "text", "--save_strategy", "no"),
    *("--image_processor", '{"size": {"height": 384, "width": 384}, "do_center_crop": false}'),
    *("--learning_rate", "1e-3", "--num_train_epochs", "5", "--per_device_train_batch_size", "8"),
)
TOP_K = 32
TOP_KS = (None, 128, 64, 32, 16, 8)
QUESTIONS = 8
ROUNDS = 15


@torch.inference_mode()
def time_fusion(folder: Path, data: list[str], number: int) -> dict[str, float]:
    """Seconds of fusing the first held-out questions with their images, for each of `TOP_KS`, with the model in `folder`."""
    task = QuestionAnswering(VQAArguments.parse([*data, "--output_dir", str(folder)])[0])
    asked = hold_out(task.read(["train"])[1]["train"], by=task.hold_out_by)[1][:number]
    model, processor = HiViLTForQuestionAnswering.from_pretrained(folder), HiViLTProcessor.from_pretrained(folder)
    pixel_values = processor(images=[open_image(one.image) for one in asked], return_tensors="pt").pixel_values
    texts = model.encode_texts(**processor(text=[one.question for one in asked], return_tensors="pt"))
    images = model.encode_images(pixel_values)

    def fuse(top_k: int | None) -> None:
        model.config.fusion_top_k = top_k
        model.model.fuse(images, texts)

    torch.set_num_threads(1)
    runs = {str(top_k): partial(fuse, top_k) for top_k in TOP_KS}
    alternate(runs, 1)
    return alternate(runs, ROUNDS)


def table(results: dict) -> str:
    """Markdown: a number of vision tokens a row."""
    rows = []
    for trained, found in results["trained"].items():
        for top_k, one in found["by_top_k"].items():
            fused = " / ".join(f"{number:.1f}" for number in one["fused_rows"])
            times = [
                f"{one[f'seconds_of_{n}'] / found['by_top_k']['None'][f'seconds_of_{n}']:.2f}x" for n in (1, QUESTIONS)
            ]
            rows.append([trained, top_k, f"{100 * one['accuracy']:.1f}", fused, *times])
    head = (
        "| trained | `fusion_top_k` | accuracy | vision tokens fused a question, by stage | time of one beside dense |"
    )
    return markdown(f"{head} time of {QUESTIONS} in a batch |", rows)


def main(argv: list[str] | None = None) -> dict:
    """Measures, prints and writes; returns what the JSON file holds."""
    parser = make_parser(__doc__)
    parser.add_argument("--data_dir", required=True, help="of DAQUAR")
    parser.add_argument("--vision_model", default="outputs/encoders/mobilenet_v2", help="folder")
    parser.add_argument("--text_model", default="outputs/encoders/minilm", help="that of the text encoder")
    parser.add_argument("--runs_dir", type=Path, default=Path("outputs/sparse"), help="of the trainings")
    args, flags = parser.parse_known_args(argv)
    data = ["--benchmark", "daquar", "--data_dir", args.data_dir]
    encoders = ["--vision_model", args.vision_model, "--text_model", args.text_model]

    results: dict = {"trained": {}}
    for name, trained in (("dense", None), (f"k = {TOP_K}", TOP_K)):
        folder = args.runs_dir / name.replace(" = ", "_")
        fusion = json.dumps({**FUSION, "fusion_top_k": trained})
        found = run("run_vqa.py", folder, [*data, *encoders, *RECIPE, "--fusion", fusion, *flags])
        results["trained"][name] = {**{key: found[key] for key in ("parameters", "train")}, "by_top_k": {}}
        times = {number: time_fusion(folder, data, number) for number in (1, QUESTIONS)}
        for top_k in TOP_KS:
            start = ["--model_name_or_path", str(folder), "--fusion", json.dumps({"fusion_top_k": top_k})]
            measured = validate([*start, *data, "--use_cpu"])
            measured |= {f"seconds_of_{number}": seconds[str(top_k)] for number, seconds in times.items()}
            results["trained"][name]["by_top_k"][str(top_k)] = measured
            print(f"trained {name}, fusion_top_k={top_k}: {measured}", flush=True)
    sparse = results["trained"][f"k = {TOP_K}"]["by_top_k"]
    results["goals"] = [
        judge_goal(
            f"time of sparse fusion beside dense, trained weights, k = {TOP_K}, 384 pixels, {number} at once",
            sparse[str(TOP_K)][f"seconds_of_{number}"] / sparse["None"][f"seconds_of_{number}"],
            0.5,
            "x",
            ".2f",
            at_most=True,
            reason="see docs/scaling.md",
        )
        for number in (1, QUESTIONS)
    ]
    results["environment"] = environment()
    print(table(results), goals_table(results), sep="\n\n")
    write_result_file(args.output_dir, "sparse_photographs", results)
    return results


if __name__ == "__main__":
    main()
