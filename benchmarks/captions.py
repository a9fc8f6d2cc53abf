"""What HiViLT writes of photographs: captions of Flickr8k on its test split.

    python benchmarks/captions.py --data_dir flickr8k              about two hours on one thread
    python benchmarks/captions.py --data_dir flickr8k --contestants HiViLT --num_train_epochs 2

A run of run_captioning.py for each contestant: HiViLT; the same with the finest stage of fusion alone; the same with a
prompt that says nothing. The vision encoder is the root's, which saw the training split, frozen; all else is new. Settings
were chosen on the validation split; the test split is read once, by HiViLT alone. Beside it stand what is published with the features of a
CNN, one sentence for all images, and a person: the first caption of each image against the other four.

A run that came to its end in --output_dir is not done again. It prints the tables and leaves a JSON file with the processor
in its name in benchmarks/results. METEOR is measured where Java and the package pycocoevalcap are.
"""

import argparse
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from photographs import run

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
RECIPE = [
    *("--vision_model", ".", "--freeze", "vision", "--cache_dtype", "float16", "--bf16", "--save_strategy", "no"),
    *("--learning_rate", "1e-3", "--label_smoothing_factor", "0.1", "--num_train_epochs", "12"),
    *("--per_device_train_batch_size", "64", "--captions_per_image", "5", "--num_beams", "3"),
]
CONTESTANTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "HiViLT": ({}, ["--do_predict"]),
    "finest stage alone": ({"num_fusion_stages": 1, "vision_levels": [15]}, []),
    "a prompt that says nothing": ({}, ["--prompt", "."]),
}
SCORES = {"bleu_1": "BLEU-1", "bleu_4": "BLEU-4", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider_d": "CIDEr-D"}
PUBLISHED = {
    "soft attention, VGG (Xu et al., 2015)": {"bleu_1": 0.67, "bleu_4": 0.195, "meteor": 0.1893},
    "hard attention, VGG (Xu et al., 2015)": {"bleu_1": 0.67, "bleu_4": 0.213, "meteor": 0.203},
}
SENTENCE = "a man in a red shirt is standing in the grass"
GOALS = {"bleu_4": 0.213, "cider_d": 0.55}


def table(results: dict) -> str:
    """Scores on the test split, as Markdown."""
    rows = {f"“{SENTENCE}”, always": results["sentence"], **PUBLISHED, "HiViLT": results["test"]}
    rows["a person, against the other four"] = results["person"]
    return _table("| Flickr8k, test |", rows)


def ablations_table(results: dict) -> str:
    """Scores on the validation split, as Markdown."""
    return _table("| Flickr8k, validation |", results["validation"])


def _table(head: str, rows: dict[str, dict[str, float]]) -> str:
    names = [name for name in SCORES if any(name in row for row in rows.values())]
    cells = [[row, *(f"{found[name]:.3f}" if name in found else "" for name in names)] for row, found in rows.items()]
    return markdown(f"{head} {' | '.join(SCORES[name] for name in names)} |", cells)


def goals_table(results: dict) -> str:
    """What was to be reached on the test split."""
    goals = [
        judge_goal(SCORES[name], results["test"][name], bound, "", ".3f", False, "see docs/captioning.md")
        for name, bound in GOALS.items()
    ]
    rows = [[goal["goal"], goal["wanted"], goal["measured"], "met" if goal["met"] else "missed"] for goal in goals]
    return markdown("| Flickr8k, test | goal | measured | |", rows, left=(0, 3))


def main(argv: list[str] | None = None) -> dict:
    """Runs what is not done yet; returns what the JSON file holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", required=True, help="Flickr8k, see docs/data.md")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/captions"), help="of the runs")
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args, flags = parser.parse_known_args(argv)

    results: dict = {"validation": {}}
    data = ["--benchmark", "flickr8k", "--data_dir", args.data_dir, "--seed", args.seed]
    for name in args.contestants:
        changed, more = CONTESTANTS[name]
        fusion = ["--fusion", json.dumps({**FUSION, **changed})]
        folder = args.output_dir / f"{name.replace(' ', '_')}-{args.seed}"
        found = run("run_captioning.py", folder, [*data, *RECIPE, *fusion, *more, *flags])
        results["validation"][name] = found["validation"]
        if name == "HiViLT":
            rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]
            results |= score(rows)
            results |= {key: found[key] for key in ("train", "parameters", "settings", "environment")}
    if "test" in results:
        print(table(results), goals_table(results), sep="\n\n", end="\n\n")
    print(ablations_table(results))
    write_result_file(args.results_dir, "captions", results)
    return results


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
