"""What HiViLT reaches on photographs: retrieval on Flickr8k and questions on DAQUAR, on their test splits, three seeds.

    python runs/encoders_without_hub.py                            MobileNetV2 and MiniLM, in outputs/encoders
    python benchmarks/photographs.py --data_dir flickr8k=flickr8k daquar=daquar
    python benchmarks/photographs.py --tasks flickr8k --data_dir flickr8k=flickr8k --seeds 1

Each step of a recipe is a run of run_retrieval.py or run_vqa.py, on one thread, for each seed. On Flickr8k the encoders'
last layers are trained first, for the embeddings alone; then the encoders are frozen, and fusion is trained on what they
give, encoded once. Settings are chosen on validation images and, for DAQUAR, on a tenth of the training images; the last
step of each seed reads the test split, once. The model of the root is the best on validation (`make weights`).

A run that came to its end in --output_dir is not done again, so that a stopped benchmark goes on, and seeds can be run
side by side. At the end it prints the tables and leaves a JSON file with the processor in its name in benchmarks/results.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from fusion_study import directories

from common import markdown
from hivilt.evaluation.retrieval import recall_table
from hivilt.training.results import write_result_file

ROOT = Path(__file__).parents[1]
EMBEDDINGS = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_fusion_stages": 2,
    "fusion_intermediate_size": 128,
    "vision_levels": [15, 16],
    "projection_dim": 512,
    "embed_encoder_states": True,
    "embedding_dropout": 0.3,
    "auxiliary_loss_weight": 0.0,
}
# Embeddings stay as they are.
MATCHING = {"contrastive_loss_weight": 0.0, "auxiliary_loss_weight": 1.0, "dropout": 0.3}
QUESTIONS = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_fusion_stages": 1,
    "fusion_intermediate_size": 64,
    "vision_levels": [16],
}
NEW = ("--vision_model", "{vision_model}", "--text_model", "{text_model}")
# Of each task: its script, and the steps of its recipe, of which each starts from the one before it.
RECIPES = {
    "flickr8k": (
        "run_retrieval.py",
        {
            "embeddings": (
                *NEW,
                *("--freeze", "vision:13", "text:3", "--fusion", json.dumps(EMBEDDINGS)),
                *("--learning_rate", "1e-3", "--vision_learning_rate", "4e-4", "--text_learning_rate", "2e-4"),
                *("--num_train_epochs", "18", "--per_device_train_batch_size", "128", "--bf16"),
                *("--random_crop", "0.6", "--random_flip", "skip", "--similar_per_batch", "1", "--rerank_k", "0"),
            ),
            "fusion": (
                *("--model_name_or_path", "{before}", "--freeze", "vision", "text", "--cache_dtype", "float16"),
                *("--fusion", json.dumps(MATCHING)),
                *("--learning_rate", "1e-3", "--num_train_epochs", "5", "--per_device_train_batch_size", "64"),
                *("--similar_per_batch", "1", "--num_hard_negatives", "2", "--rerank_k", "16"),
                *("--bf16", "--calibrate", "--do_predict"),
            ),
        },
    ),
    "daquar": (
        "run_vqa.py",
        {
            "questions": (
                *NEW,
                *("--freeze", "vision", "text", "--fusion", json.dumps(QUESTIONS)),
                *("--image_processor", '{"size": {"height": 256, "width": 320}, "do_center_crop": false}'),
                *("--learning_rate", "1e-3", "--num_train_epochs", "10", "--per_device_train_batch_size", "16"),
                *("--blank_images", "--do_predict"),
            ),
        },
    ),
}
COMMON = (
    *("--weight_decay", "0.05", "--warmup_steps", "0.1", "--lr_scheduler_type", "cosine", "--use_cpu"),
    *("--num_threads", "1", "--eval_strategy", "no", "--load_best_model_at_end", "false", "--do_train", "--do_eval"),
)

# R@1, 5 and 10 of images to texts and of texts to images, in percent, with CNN features.
PUBLISHED = {
    "DVSA (Karpathy and Fei-Fei, 2015)": (16.5, 40.6, 54.2, 11.8, 32.1, 44.7),
    "VSE (Kiros et al., 2014)": (18.0, 40.9, 55.0, 12.5, 37.0, 51.5),
    "m-CNN, ensemble (Ma et al., 2015)": (24.8, 53.7, 67.1, 20.3, 47.6, 61.7),
    "HGLMM Fisher vectors (Klein et al., 2015)": (31.0, 59.3, 73.7, 21.3, 50.0, 64.8),
}
PUBLISHED_ANSWERS = {"exact match": "29.3"}
RECALLS = [f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
STAGES = {"HiViLT, embeddings": "embedding_", "HiViLT, re-ranked": ""}


def retrieval_table(results: dict, split: str = "test") -> str:
    """Recall on Flickr8k in percent, mean of the seeds, beside what is published, as Markdown."""
    runs = [run["fusion"] for run in results["flickr8k"].values()]
    rows = {"chance": runs[0]["data"][split]["chance"]}
    if split == "test":
        for name, values in PUBLISHED.items():
            rows[name] = {key: value / 100 for key, value in zip(RECALLS, values, strict=True)}
    for name, prefix in STAGES.items():
        rows[name] = {key: mean(run[split][f"{prefix}{key}"] for run in runs) for key in RECALLS}
    return recall_table({name: {**row, "mean_recall": mean(row[key] for key in RECALLS)} for name, row in rows.items()})


def validation_table(results: dict) -> str:
    """Likewise on the validation split."""
    return retrieval_table(results, "validation")


def questions_table(results: dict) -> str:
    """DAQUAR's measures on the test split in percent, mean and standard deviation of the seeds, as Markdown."""
    tests = [run["questions"]["test"] for run in results["daquar"].values()]
    measures = {
        "exact match": "accuracy",
        "exact match, blank images": "accuracy_of_blank_images",
        "exact match of the most frequent answer": "accuracy_of_majority_answer",
        "WUPS at 0.9": "wups_0.9",
        "WUPS at 0.0": "wups_0.0",
    }
    rows = [
        [name, percent([100 * test[key] for test in tests]), PUBLISHED_ANSWERS.get(name, "")]
        for name, key in measures.items()
        if all(key in test for test in tests)
    ]
    return markdown("| | HiViLT | SAN (Yang et al., 2016) |", rows)


def percent(values: Sequence[float]) -> str:
    """Mean and standard deviation of the seeds."""
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{mean(values):.1f}"


def goals_table(results: dict) -> str:
    """What was to be reached on the test splits, and by which mean and standard deviation over the seeds."""
    rows = []

    def add(name: str, goal: float, values: Sequence[float]) -> None:
        rows.append((name, f"{goal:.1f}", percent(values), "met" if mean(values) >= goal else "missed"))

    tests = [run["fusion"]["test"] for run in results.get("flickr8k", {}).values()]
    for way, goal in {"image to text": 31.0, "text to image": 21.3}.items() if tests else ():
        for stage, prefix in STAGES.items():
            key = f"{prefix}{way.replace(' ', '_')}_recall@1"
            add(f"Flickr8k, {way} R@1, {stage}", goal, [100 * test[key] for test in tests])
    tests = [run["questions"]["test"] for run in results.get("daquar", {}).values()]
    if tests:
        add("DAQUAR, accuracy", 27.0, [100 * test["accuracy"] for test in tests])
        beside = [100 * (test["accuracy"] - test["accuracy_of_blank_images"]) for test in tests]
        add("DAQUAR, accuracy above that on blank images", 3.0, beside)
    return markdown("| test split | goal | measured | |", rows, left=(0, 3))


def run(script: str, folder: Path, flags: Sequence[object]) -> dict:
    """Runs a script on one thread with these flags and `COMMON`, unless it came to its end in `folder`; its results."""
    if not (folder / "results.json").exists():
        where = ["--cache_dir", folder.parent / "cache", "--output_dir", folder]
        command = [sys.executable, ROOT / script, *where, *COMMON, *flags]
        subprocess.run([str(word) for word in command], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> dict:
    """Runs what is not done yet, for each task and seed; returns what the JSON file holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--data_dir", nargs="+", required=True, metavar="BENCHMARK=FOLDER")
    parser.add_argument("--vision_model", default="outputs/encoders/mobilenet_v2")
    parser.add_argument("--text_model", default="outputs/encoders/minilm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/photographs"), help="of the runs")
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args, flags = parser.parse_known_args(argv)
    args.data_dir = directories(parser, args.data_dir)
    if missing := [task for task in args.tasks if task not in args.data_dir]:
        parser.error(f"data_dir: give {missing[0]}=FOLDER, or leave {missing[0]} out of --tasks")

    results: dict = {}
    for task in args.tasks:
        for seed in args.seeds:
            before, found, (script, steps) = None, {}, RECIPES[task]
            for step, recipe in steps.items():
                folder = args.output_dir / f"{task}-{step}-{seed}"
                names = {"vision_model": args.vision_model, "text_model": args.text_model, "before": before}
                given = [names.get(flag[1:-1], flag) for flag in recipe]
                where = ["--benchmark", task, "--data_dir", args.data_dir[task]]
                found[step], before = run(script, folder, [*where, *given, "--seed", seed, *flags]), folder
                found[step].pop("familiarity", None)  # long lists, of use to the checkpoint alone
            results.setdefault(task, {})[str(seed)] = found
            results["environment"] = found[step]["environment"]
    if "flickr8k" in results:
        print(validation_table(results), retrieval_table(results), sep="\n\n", end="\n\n")
    if "daquar" in results:
        print(questions_table(results), end="\n\n")
    print(goals_table(results))
    write_result_file(args.results_dir, "photographs", results)
    return results


if __name__ == "__main__":
    main()
