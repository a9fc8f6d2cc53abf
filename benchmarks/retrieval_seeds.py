"""How much of what re-ranking adds on OpenMoji is chance: the default run of `run_retrieval.py` with several seeds.

    python benchmarks/retrieval_seeds.py                           seeds 42, 1 and 2, about seven minutes each
    python benchmarks/retrieval_seeds.py --seeds 0 1 --num_train_epochs 1

Flags that are not its own go to run_retrieval.py. It leaves a JSON file, with the processor in its name, in
benchmarks/results, and prints for each seed R@1, the mean of both directions, by embeddings, by fusion alone and
re-ranked, with the difference that re-ranking makes.
"""

from statistics import mean, stdev

from common import make_parser, run_quietly
from hivilt.tasks.retrieval import Retrieval
from hivilt.training.results import write_result_file


def recall_at_1(metrics: dict, stage: str) -> float:
    """R@1 in percent, the mean of both directions."""
    return 50 * sum(metrics[f"{stage}{direction}_recall@1"] for direction in ("image_to_text", "text_to_image"))


def main(argv: list[str] | None = None) -> dict:
    """Trains and evaluates with each seed; returns what the JSON file holds."""
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    args, flags = parser.parse_known_args(argv)

    results = {"runs": []}
    for seed in args.seeds:
        # Split and drawing of the data follow the emoji alone; what differs is where training starts and what it draws.
        found = run_quietly(Retrieval, ["--seed", str(seed), *flags])
        stages = {"embeddings": "embedding_", "fusion alone": "fused_", "re-ranked": ""}
        recalls = {name: recall_at_1(found["test"], stage) for name, stage in stages.items()}
        kept = {name: found[name] for name in ("test", "wall_seconds")}
        results["runs"].append({"seed": seed, "recall@1": recalls, **kept})
        results |= {"settings": found["settings"], "environment": found["environment"]}
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.1f}" for name, value in recalls.items()), flush=True)

    differences = [run["recall@1"]["re-ranked"] - run["recall@1"]["embeddings"] for run in results["runs"]]
    results["difference"] = {"mean": mean(differences), "standard_deviation": stdev(differences)}
    print(f"re-ranking adds {mean(differences):.2f} points of R@1, standard deviation {stdev(differences):.2f}")
    write_result_file(args.output_dir, "retrieval_seeds", results)
    return results


if __name__ == "__main__":
    main()
