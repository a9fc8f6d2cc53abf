"""Retrieval of real photographs on a laptop: Flickr8k with two frozen pretrained encoders, at the cost of fusion.

    python runs/encoders_without_hub.py                            MobileNetV2 and MiniLM, in outputs/encoders
    python benchmarks/flickr8k.py --data_dir flickr8k              seeds 42 and 1, about ten minutes each on two cores
    python benchmarks/flickr8k.py --data_dir flickr8k --seeds 42 --num_train_epochs 1

Flags that are not its own go to run_retrieval.py, whose --vision_model and --text_model may name others. The first seed
encodes every photograph and caption that it needs, all others encode nothing. It measures on the validation split; the
test split is not read. It leaves a JSON file with the processor in its name in benchmarks/results, and prints for each
seed the minutes of the whole run and how many seconds of them went into encoding, and recall.
"""

import json
import tempfile
import time
from statistics import mean, stdev

from common import make_parser, run_quietly
from hivilt.evaluation.retrieval import recall_table
from hivilt.tasks.retrieval import Retrieval
from hivilt.training.results import write_result_file

# A size that ten epochs take a few minutes with; no other was tried to its end.
FUSION = {"hidden_size": 128, "num_attention_heads": 4, "num_fusion_stages": 2}
FUSION |= {"vision_levels": [11, 16], "vision_strides": [2, 1]}
RECIPE = [
    *("--benchmark", "flickr8k", "--freeze", "vision", "text", "--do_train", "--do_eval"),
    *("--vision_model", "outputs/encoders/mobilenet_v2", "--text_model", "outputs/encoders/minilm"),
    *("--fusion", json.dumps(FUSION), "--num_hard_negatives", "1", "--rerank_k", "16"),
    *("--num_train_epochs", "10", "--per_device_train_batch_size", "64", "--learning_rate", "1e-3"),
    *("--eval_strategy", "no", "--load_best_model_at_end", "false"),
]
STAGES = {"embeddings": "embedding_", "re-ranked": ""}
RECALLS = [f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)] + ["mean_recall"]


def table(results: dict) -> str:
    """Recall on the validation split in percent, mean of the seeds, as Markdown."""
    rows = {
        name: {key: mean(run["validation"][f"{prefix}{key}"] for run in results["runs"]) for key in RECALLS}
        for name, prefix in STAGES.items()
    }
    return recall_table({"chance": results["chance"], **rows})


def main(argv: list[str] | None = None) -> dict:
    """Trains and evaluates with each seed; returns what the JSON file holds."""
    parser = make_parser(__doc__)
    parser.add_argument("--data_dir", required=True, help="Flickr8k, see data/caption_benchmarks.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1])
    args, flags = parser.parse_known_args(argv)

    results = {"runs": []}
    with tempfile.TemporaryDirectory() as cache:
        for seed in args.seeds:
            given = ["--data_dir", args.data_dir, "--cache_dir", cache, "--seed", str(seed)]
            start = time.perf_counter()
            found = run_quietly(Retrieval, [*RECIPE, *given, *flags])
            seconds = time.perf_counter() - start
            names = ("train", "validation", "encoder_cache", "peak_memory_bytes")
            results["runs"].append({"seed": seed, "seconds": seconds, **{name: found[name] for name in names}})
            results |= {name: found[name] for name in ("parameters", "settings", "environment")}
            results["chance"] = found["data"]["validation"]["chance"]
            cached = ", ".join(
                f"{part}: {one['encoded']:,} of {one['cached']:,} encoded in {one['seconds']:.0f} s, "
                f"{one['bytes'] / 1e6:,.0f} MB"
                for part, one in found["encoder_cache"].items()
            )
            print(f"seed {seed}: {seconds / 60:.1f} minutes; {cached}", flush=True)
    spread = [100 * run["validation"]["mean_recall"] for run in results["runs"]]
    if len(spread) > 1:
        print(f"mean recall {mean(spread):.1f}, standard deviation {stdev(spread):.2f}")
    print(table(results))
    write_result_file(args.output_dir, "flickr8k", results)
    return results


if __name__ == "__main__":
    main()
