"""Does a model answer easy-VQA's questions when they are asked in other words?

    python benchmarks/rewordings.py                                the model in vqa/
    python benchmarks/rewordings.py --model outputs/vqa

Asks about the test images in wordings of data/easy_vqa.py that nothing was trained on, one for each test question, and
prints accuracy by what is asked. It leaves benchmarks/results/rewordings.json.
"""

import tempfile
from pathlib import Path

from transformers import TrainingArguments

from common import make_parser
from hivilt import HiViLTForQuestionAnswering
from hivilt.data.easy_vqa import reword
from hivilt.data.vqa import VQACollator, VQADataset
from hivilt.data.vqa_benchmarks import VQA_BENCHMARKS
from hivilt.tasks.question_answering import QuestionAnsweringTrainer
from hivilt.training.models import load_checkpoint
from hivilt.training.results import environment, write_json

SEED = 0


def main(argv: list[str] | None = None) -> dict:
    """Asks and returns what the JSON file holds."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=str(Path(__file__).parents[1] / "vqa"), help="a checkpoint of easy-VQA")
    parser.add_argument("--max_questions", type=int, help="the first of the test split alone")
    args = parser.parse_args(argv)

    model, processor = load_checkpoint("--model", args.model, HiViLTForQuestionAnswering)
    test = VQA_BENCHMARKS["easy-vqa"].read_package("test")
    asked = [one for one in reword(test, 1.0, SEED, held_out=True)[: args.max_questions] if one.types]
    with tempfile.TemporaryDirectory() as folder:
        trainer = QuestionAnsweringTrainer(
            model,
            TrainingArguments(folder, remove_unused_columns=False, report_to="none"),
            VQACollator(processor, model.config.label2id),
            processing_class=processor,
        )
        found = trainer.predict(VQADataset(asked))
    kinds: dict[str, list[bool]] = {}
    for one, best in zip(asked, found.predictions, strict=True):
        kinds.setdefault(one.types["wording"], []).append(best[0]["answer"] in one.answers)
    accuracy = {kind: sum(right) / len(right) for kind, right in sorted(kinds.items())}
    overall = sum(map(sum, kinds.values())) / len(asked)
    results = {"questions": len(asked), "accuracy": overall, "by_kind": accuracy, "environment": environment()}
    print(f"{overall:.4f} of {len(asked):,} questions in wordings that were not trained on")
    for kind, one in accuracy.items():
        print(f"  {kind}: {one:.4f} of {len(kinds[kind]):,}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "rewordings.json", results)
    return results


if __name__ == "__main__":
    main()
