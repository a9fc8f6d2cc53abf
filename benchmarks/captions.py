"""What HiViLT writes of photographs: captions of Flickr8k, and answers to DAQUAR's questions that are in no list.

    python runs/encoders_without_hub.py                            MobileNetV2 and MiniLM, in outputs/encoders
    python benchmarks/captions.py --data_dir flickr8k=flickr8k daquar=daquar
    python benchmarks/captions.py --data_dir flickr8k=flickr8k --tasks captions

Each is a run of run_captioning.py or run_vqa.py on one thread. A captioner's vision encoder is the root's, which saw the
training split, frozen; all else is new. It learns the captions word by word, from other crops in each epoch. From there
two trainings go on, one word by word and one by the rewards of what it samples (`--self_critical`), and the mean of their
weights is the model of `captioning/` (Wortsman et al., arXiv 2203.05482). Settings were chosen on the validation split; the
mean alone reads the test split, once. Beside it stand what is published with the features of a CNN, one sentence for all
images, and a person: the first caption of each image against the other four. `ablations` are shorter trainings without
crops and rewards, measured on the validation split. `answers` are of the recipe that benchmarks/photographs.py has for
DAQUAR, once as it is and once with `--generate`, three seeds.

A run that came to its end in --output_dir is not done again. It prints the tables and leaves a JSON file with the processor
in its name in benchmarks/results. METEOR is measured where Java and the package pycocoevalcap are.
"""

import argparse
import json
import shutil
from contextlib import suppress
from pathlib import Path
from statistics import mean
from typing import Any

from fusion_study import directories
from photographs import QUESTIONS, RECIPES, percent, run
from safetensors.torch import load_file, save_file

from common import judge_goal, markdown
from hivilt.evaluation.captioning import caption_scores, check_meteor
from hivilt.training.results import write_result_file

FUSION = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_fusion_stages": 2,
    "fusion_intermediate_size": 128,
    "vision_levels": [15, 16],
    "dropout": 0.2,
}
RECIPE = (
    *("--freeze", "vision", "--bf16", "--save_strategy", "no", "--cache_dtype", "float16"),
    *("--per_device_train_batch_size", "16", "--captions_per_image", "5"),
    *("--num_beams", "5", "--max_new_tokens", "24", "--no_repeat_ngram_size", "2"),
)
NEW = ("--vision_model", ".", "--learning_rate", "7e-4", "--label_smoothing_factor", "0.1", "--min_word_count", "5")
CROPS = ("--random_crop", "0.7", "--random_flip", "skip")
WORDS = (*NEW, *CROPS, "--num_train_epochs", "10")
# What goes on from there.
BRANCHES = {
    "more words": (
        *(*CROPS, "--learning_rate", "4e-4", "--num_train_epochs", "5", "--label_smoothing_factor", "0.1"),
        *("--fusion", '{"dropout": 0.3}'),
    ),
    "rewards": (*CROPS, "--learning_rate", "5e-5", "--num_train_epochs", "2", "--self_critical"),
}
MEASURED = ("--do_predict", "--do_train", "false")
BRIEF = (*NEW, "--num_train_epochs", "2")
ABLATIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "HiViLT": ({}, []),
    "finest stage alone": ({"num_fusion_stages": 1, "vision_levels": [15]}, []),
    "a prompt that says nothing": ({}, ["--prompt", "."]),
}
# Of one layer, as wide as MiniLM, whose words it begins with.
DECODER = {"model_type": "gpt2", "n_layer": 1, "n_embd": 384, "n_head": 8, "initializer_range": 0.05}
DECODER |= {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.0}
ANSWERS: dict[str, list[str]] = {
    "from a list": [],
    "in words": [
        *("--generate", "--fusion", json.dumps({**QUESTIONS, "dropout": 0.3, "decoder_config": DECODER})),
        *("--per_device_train_batch_size", "8", "--num_train_epochs", "5", "--label_smoothing_factor", "0.1"),
        *("--max_new_tokens", "8", "--blank_images", "false"),
    ],
}
TASKS = {"captions": "flickr8k", "ablations": "flickr8k", "answers": "daquar"}
SCORES = {"bleu_1": "BLEU-1", "bleu_4": "BLEU-4", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider_d": "CIDEr-D"}
PUBLISHED = {
    "soft attention, VGG (Xu et al., 2015)": {"bleu_1": 0.67, "bleu_4": 0.195, "meteor": 0.1893},
    "hard attention, VGG (Xu et al., 2015)": {"bleu_1": 0.67, "bleu_4": 0.213, "meteor": 0.203},
}
SENTENCE = "a man in a red shirt is standing in the grass"
GOALS = {"bleu_4": 0.213, "cider_d": 0.55}


def table(results: dict) -> str:
    """Scores on the test split of Flickr8k, as Markdown."""
    rows = {f"“{SENTENCE}”, always": results["sentence"], **PUBLISHED, "HiViLT": results["test"]}
    rows["a person, against the other four"] = results["person"]
    return _table("| Flickr8k, test |", rows)


def steps_table(results: dict) -> str:
    """Scores on the validation split after each step of the training, as Markdown."""
    return _table("| Flickr8k, validation |", results["validation"])


def ablations_table(results: dict) -> str:
    """Likewise of shorter trainings."""
    return _table("| Flickr8k, validation, two epochs |", results["ablations"])


def _table(head: str, rows: dict[str, dict[str, float]]) -> str:
    names = [name for name in SCORES if any(name in row for row in rows.values())]
    cells = [[row, *(f"{found[name]:.3f}" if name in found else "" for name in names)] for row, found in rows.items()]
    return markdown(f"{head} {' | '.join(SCORES[name] for name in names)} |", cells)


def answers_table(results: dict) -> str:
    """DAQUAR's measures on the test split in percent, mean and standard deviation of the seeds, as Markdown."""
    tests = [run["test"] for runs in results["answers"].values() for run in runs]
    measures = {"accuracy": "exact match", "wups_0.9": "WUPS at 0.9", "wups_0.0": "WUPS at 0.0"}
    measures = {measure: title for measure, title in measures.items() if all(measure in test for test in tests)}
    rows = [
        [name, *(percent([100 * run["test"][measure] for run in runs]) for measure in measures)]
        for name, runs in results["answers"].items()
    ]
    return markdown(f"| DAQUAR, test | {' | '.join(measures.values())} |", rows)


def goals_table(results: dict) -> str:
    """What was to be reached on the test splits."""
    goals, why = [], "see docs/captioning.md"
    if "test" in results:
        for name, bound in GOALS.items():
            goal = f"Flickr8k, {SCORES[name]}"
            goals.append(judge_goal(goal, results["test"][name], bound, "", ".3f", False, why))
    if "answers" in results:
        listed, worded = ([100 * run["test"]["accuracy"] for run in results["answers"][name]] for name in ANSWERS)
        goal = "DAQUAR, accuracy in words less that from a list"
        goals.append(judge_goal(goal, mean(worded) - mean(listed), -1.0, " points", ".1f", False, why))
    rows = [[goal["goal"], goal["wanted"], goal["measured"], "met" if goal["met"] else "missed"] for goal in goals]
    return markdown("| test split | goal | measured | |", rows, left=(0, 3))


def main(argv: list[str] | None = None) -> dict:
    """Runs what is not done yet; returns what the JSON file holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--data_dir", nargs="+", required=True, metavar="BENCHMARK=FOLDER")
    parser.add_argument("--vision_model", default="outputs/encoders/mobilenet_v2", help="of the answers")
    parser.add_argument("--text_model", default="outputs/encoders/minilm", help="of the answers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the answers")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/captions"), help="of the runs")
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args, flags = parser.parse_known_args(argv)
    folders = directories(parser, args.data_dir)
    if missing := [TASKS[task] for task in args.tasks if TASKS[task] not in folders]:
        parser.error(f"data_dir: give {missing[0]}=FOLDER, or other --tasks")

    def caption(name: str, fusion: dict | None, *more: object) -> dict:
        where = ["--benchmark", "flickr8k", "--data_dir", folders["flickr8k"]]
        given = [] if fusion is None else ["--fusion", json.dumps({**FUSION, **fusion})]
        found = run("run_captioning.py", args.output_dir / name, [*where, *RECIPE, *given, *more, *flags])
        results["environment"] = found["environment"]
        return found

    results: dict = {}
    if "captions" in args.tasks:
        steps = {"words": caption("words", {}, *WORDS)}
        folders_of = {name: args.output_dir / name.replace(" ", "_") for name in BRANCHES}
        for name, folder in folders_of.items():
            words = ("--model_name_or_path", args.output_dir / "words")
            steps[name] = caption(folder.name, None, *words, *BRANCHES[name])
        average(list(folders_of.values()), args.output_dir / "mean")
        mean_of_both = caption("measured", None, "--model_name_or_path", args.output_dir / "mean", *MEASURED)
        results["train"] = {name: found["train"] for name, found in steps.items()}
        steps["mean of both"] = mean_of_both
        results["validation"] = {name: found["validation"] for name, found in steps.items()}
        results |= {key: steps["words"][key] for key in ("parameters", "settings")}
        lines = (args.output_dir / "measured/predictions.jsonl").read_text("utf-8").splitlines()
        results |= score(list(map(json.loads, lines)))
        shipped = steps["words"] | {split: mean_of_both[split] for split in ("validation", "test")}
        shipped["data"] = steps["words"]["data"] | mean_of_both["data"]
        (args.output_dir / "mean/results.json").write_text(json.dumps(shipped, indent=2) + "\n", encoding="utf-8")
        print(table(results), steps_table(results), sep="\n\n", end="\n\n")
    if "ablations" in args.tasks:
        results["ablations"] = {
            name: caption(name.replace(" ", "_"), fusion, *BRIEF, *more)["validation"]
            for name, (fusion, more) in ABLATIONS.items()
        }
        print(ablations_table(results), end="\n\n")
    if "answers" in args.tasks:
        script, steps = RECIPES["daquar"]
        encoders = {"{vision_model}": args.vision_model, "{text_model}": args.text_model}
        recipe = [encoders.get(flag, flag) for flag in steps["questions"]]
        recipe = ["--benchmark", "daquar", "--data_dir", folders["daquar"], *recipe]
        answers: dict[str, list[dict]] = {}
        for name, more in ANSWERS.items():
            stem, given = name.replace(" ", "_"), [*recipe, *more, *flags, "--seed"]
            answers[name] = [run(script, args.output_dir / f"{stem}-{seed}", [*given, seed]) for seed in args.seeds]
        results["environment"] = answers["in words"][0]["environment"]
        kept = ("parameters", "train", "validation", "test")
        results["answers"] = {name: [{key: one[key] for key in kept} for one in runs] for name, runs in answers.items()}
        print(answers_table(results), end="\n\n")
    print(goals_table(results))
    write_result_file(args.results_dir, "captions", results)
    return results


def average(folders: list[Path], output: Path) -> None:
    """Makes a checkpoint of the mean of others' weights, which began from the same ones; all else is the first one's."""
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    mean_of = {name: sum(each[name] for each in weights) / len(weights) for name in weights[0]}
    shutil.copytree(folders[0], output, dirs_exist_ok=True)
    kept = {name: value.to(weights[0][name].dtype) for name, value in mean_of.items()}
    save_file(kept, output / "model.safetensors", metadata={"format": "pt"})


def score(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Scores of a run's predictions.jsonl, of one sentence, and of a person."""
    meteor = False
    with suppress(ValueError):
        check_meteor()
        meteor = True
    references = [row["captions"] for row in rows]
    return {
        "test": caption_scores([row["caption"] for row in rows], references, meteor),
        "sentence": caption_scores([SENTENCE] * len(rows), references, meteor),
        "person": caption_scores([first for first, *_ in references], [others for _, *others in references], meteor),
    }


if __name__ == "__main__":
    main()
