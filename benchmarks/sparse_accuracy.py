"""What sparse fusion costs in accuracy, on the training questions of easy-VQA that are held out to choose by.

    python benchmarks/sparse_accuracy.py                           trains once with fusion_top_k=4, about 15 minutes
    python benchmarks/sparse_accuracy.py --top_k 2

The model in vqa/ was trained dense, on 64, 16 and 4 vision tokens. Its accuracy is measured as it is, with
fewer and fewer of them for each text token, and that of the same recipe trained with `--top_k`; a sixteenth of the finest
level is as much as 32 tokens of an image with 576. Beside the accuracy stands how many vision tokens each stage fused
for a question, on average: as many as its text tokens chose between them. Flags that are not its own go to run_vqa.py.
The test split is not read. It leaves a JSON file, with the processor in its name, in benchmarks/results.
"""

import json
from functools import partial
from pathlib import Path

from transformers import TrainerCallback

from common import make_parser, markdown, run_quietly
from hivilt.tasks.question_answering import QuestionAnswering
from hivilt.training.results import environment, write_result_file

ROOT = Path(__file__).parents[1]


class FusedRows(TrainerCallback):
    """Counts the vision rows that each stage fuses in the last evaluation."""

    def on_init_end(self, args, state, control, model=None, **kwargs):
        stages = model.base_model.fusion.stages
        self.rows, self.questions = [0] * len(stages), 0
        stages[0].register_forward_pre_hook(self.count_questions)
        for number, stage in enumerate(stages):
            stage.vision_mlp.register_forward_pre_hook(partial(self.count_rows, number))

    def count_questions(self, stage, args):
        self.questions += args[1].shape[0]

    def count_rows(self, number, mlp, args):
        self.rows[number] += args[0].shape[:-1].numel()

    def on_train_end(self, *args, **kwargs):
        self.rows, self.questions = [0] * len(self.rows), 0

    def means(self) -> list[float]:
        """Rows a question, for each stage."""
        return [rows / self.questions for rows in self.rows]


def validate(flags: list[str]) -> dict:
    """Of a run of run_vqa.py, on its validation questions: accuracy in [0, 1], their number, and rows that were fused."""
    rows = FusedRows()
    found = run_quietly(QuestionAnswering, ["--do_eval", *flags], rows)
    return {**{name: found["validation"][name] for name in ("accuracy", "num_questions")}, "fused_rows": rows.means()}


def table(results: dict) -> str:
    """Markdown: a number of vision tokens a row."""
    rows = [("dense", top_k, found) for top_k, found in results["trained_dense"].items()]
    sparse = results["trained_sparse"]
    rows.append((f"k = {sparse['fusion_top_k']}", str(sparse["fusion_top_k"]), sparse))
    cells = [
        (trained, top_k, f"{found['accuracy']:.4f}", " / ".join(f"{number:.1f}" for number in found["fused_rows"]))
        for trained, top_k, found in rows
    ]
    return markdown("| trained | `fusion_top_k` | accuracy | vision tokens fused a question, by stage |", cells)


def main(argv: list[str] | None = None) -> dict:
    """Measures, prints and writes; returns what the JSON file holds."""
    parser = make_parser(__doc__)
    parser.add_argument("--top_k", type=int, default=4, help="vision tokens a text token, of the run that trains")
    args, flags = parser.parse_known_args(argv)

    results = {"environment": environment(), "trained_dense": {}}
    for top_k in (None, 16, 8, 4, 2, 1):
        fusion = json.dumps({"fusion_top_k": top_k})
        found = validate(["--model_name_or_path", str(ROOT / "vqa"), "--fusion", fusion, *flags])
        results["trained_dense"][str(top_k)] = found
        print(f"trained dense, fusion_top_k={top_k}: {found}", flush=True)
    fusion = json.dumps({"fusion_top_k": args.top_k})
    found = validate(["--do_train", "--fusion", fusion, *flags])
    results["trained_sparse"] = {"fusion_top_k": args.top_k, **found}
    print(f"trained with fusion_top_k={args.top_k}: {found}\n{table(results)}")
    write_result_file(args.output_dir, "sparse_accuracy", results)
    return results


if __name__ == "__main__":
    main()
