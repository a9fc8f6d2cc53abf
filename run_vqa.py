"""Trains and evaluates HiViLT on questions about pictures.

    python run_vqa.py                                              easy-VQA, everything with defaults
    python run_vqa.py --train_file train.jsonl --test_file test.jsonl --output_dir outputs/mine
    python run_vqa.py --model_name_or_path outputs/vqa --test_file test.csv --do_predict --output_dir outputs/test
    python run_vqa.py settings.yaml                                the same flags in one file
    accelerate launch --num_processes 2 run_vqa.py                 several devices

It leaves in --output_dir: the checkpoint with its code, processor and pipeline, README.md, results.json,
predictions.jsonl, training.png and predictions.png.
"""

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import EvalResult

from hivilt.data.vqa import (
    Columns,
    VQACollator,
    VQADataset,
    VQAExample,
    build_answer_vocabulary,
    drop_unknown_answers,
    read_easy_vqa,
    read_file,
    read_table,
)
from hivilt.evaluation.plots import plot_predictions
from hivilt.evaluation.vqa import answer_coverage, canonical_answer, exact_match
from hivilt.modeling_hivilt import HiViLTForQuestionAnswering
from hivilt.trainers import QuestionAnsweringTrainer, answer_and_look
from hivilt.training import (
    HiViLTTrainingArguments,
    TaskArguments,
    begin_run,
    collect_results,
    load_or_build,
    parameter_table,
    prepare_splits,
    read_splits,
    run,
    shared_name,
    write_model_card,
)

logger = logging.getLogger("hivilt")

DEFAULTS = {
    "output_dir": "outputs/vqa",
    "num_train_epochs": 10,
    "per_device_train_batch_size": 8,  # pictures, of about ten questions each in easy-VQA
    "per_device_eval_batch_size": 32,
    "learning_rate": 1.5e-3,
    "adam_beta2": 0.98,  # what colours taught the gradients' scale is soon forgotten, so shapes are learned next
    "weight_decay": 0.05,
    "warmup_steps": 0.1,  # a share of all steps
    "metric_for_best_model": "accuracy",
}


@dataclass
class VQAArguments(TaskArguments):
    """What only question answering has."""

    question_column: str = field(default="question", metadata={"help": "Column of questions."})
    question_id_column: str | None = field(default=None, metadata={"help": "Column copied to predictions.jsonl."})
    answer_column: str = field(default="answer", metadata={"help": "Column of an answer, or of a list of them."})
    min_answer_count: int = field(default=1, metadata={"help": "Leave rarer training answers out of the vocabulary."})
    max_answers: int | None = field(default=None, metadata={"help": "Keep only this many most frequent answers."})


def read_data(args: VQAArguments) -> tuple[str, dict[str, list[VQAExample]]]:
    """The name of the data and its splits: what the arguments name, or easy-VQA."""
    columns = Columns(
        args.image_column, args.question_column, args.answer_column, args.image_id_column, args.question_id_column
    )
    named = read_splits(
        args,
        lambda path, split: read_file(path, columns, answers_needed=split != "test"),
        lambda table, source, split: read_table(table, columns, source, answers_needed=split != "test"),
    )
    return named or ("easy-VQA", {"train": read_easy_vqa("train"), "test": read_easy_vqa("test")})


def prepare_model(args: VQAArguments, training_args: HiViLTTrainingArguments, train: list[VQAExample] | None):
    """The model and its processor; if it trains, its classes are the answers of the training data."""
    if train is None:
        if not args.model_name_or_path:
            raise ValueError("There is nothing to evaluate: give --model_name_or_path a checkpoint, or --do_train.")
        return load_or_build(args, HiViLTForQuestionAnswering)

    vocabulary = build_answer_vocabulary([one.answers for one in train], args.min_answer_count, args.max_answers)
    questions = [one.question for one in train]
    model, processor = load_or_build(args, HiViLTForQuestionAnswering, questions, id2label=dict(enumerate(vocabulary)))
    known = set(model.config.id2label.values())
    if known != set(vocabulary):
        logger.info(f"Of {len(vocabulary)} answers the checkpoint knows {len(known & set(vocabulary))}.")
        model.resize_answer_head(vocabulary)
    soft = any(len(one.answers) > 1 for one in train)
    model.config.problem_type = "multi_label_classification" if soft else "single_label_classification"
    for part in args.freeze:
        model.freeze(part)
    return model, processor


def describe(examples: list[VQAExample], label2id: dict[str, int], bad_pictures: list[str]) -> dict:
    """What a split holds, for the log and for `results.json`."""
    return {
        "pictures": len({one.image_id for one in examples}),
        "questions": len(examples),
        "answer_coverage": answer_coverage([one.answers for one in examples], label2id),
        "bad_pictures": bad_pictures,
    }


def write_predictions(path: Path, examples: list[VQAExample], predictions: list[list[dict]]) -> None:
    """One JSON object a question, in the order of the data."""
    with path.open("w", encoding="utf-8") as file:
        for one, best in zip(examples, predictions, strict=True):
            row = {
                "question_id": one.question_id,
                "image": one.image_id,
                "question": one.question,
                "answer": one.answers[0] if len(one.answers) == 1 else list(one.answers),
                "predictions": best,
                "correct": exact_match(best[0]["answer"], one.answers) if one.answers else None,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_card(trainer: QuestionAnsweringTrainer, args: VQAArguments, results: dict) -> None:
    """`README.md` of the checkpoint."""
    question = trainer.eval_dataset.examples[0].question
    name, train = results["data"]["name"], results["data"]["train"]
    measured = [split for split in ("test", "validation") if "accuracy" in results.get(split, {})]
    accuracy = [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type=name,
            dataset_name=name,
            dataset_split=split,
            metric_type="accuracy",
            metric_value=round(results[split]["accuracy"], 6),
        )
        for split in measured[:1]
    ]
    write_model_card(
        trainer,
        args,
        results,
        task="question answering",
        data={"pipeline_tag": "visual-question-answering", "eval_results": accuracy or None},
        summary=(
            f"A hierarchical vision-language transformer with {results['parameters']['all']:,} parameters. It answers "
            f"questions about pictures with one of {results['num_answers']} answers, and was trained on "
            f"{train['questions'] - train['dropped_questions']:,} questions about {train['pictures']:,} pictures of {name}."
        ),
        usage=(
            "from transformers import pipeline\n\n"
            "# A folder or a name on the Hub.\n"
            f'vqa = pipeline("visual-question-answering", model="{shared_name(trainer.args)}", trust_remote_code=True)\n'
            f'vqa("picture.png", {json.dumps(question)}, top_k=3)'
        ),
        limits=(
            f"- It chooses from the {results['num_answers']} answers of its training data (`config.id2label`) and "
            "cannot give another.\n"
            f"- It was {'measured' if measured else 'trained'} on {name} alone; other pictures or wordings may get a "
            "wrong answer with a high probability."
        ),
        picture="![Questions, answers and where the model looked](predictions.png)",
    )


def main(argv: list[str] | None = None) -> dict:
    """Runs as the flags ask (`argv`; unset, the command line) and returns what `results.json` holds."""
    start = time.perf_counter()
    args, training_args = begin_run(argv, VQAArguments, DEFAULTS)

    name, splits, bad_pictures = prepare_splits(args, training_args, lambda: read_data(args))
    model, processor = prepare_model(args, training_args, splits.get("train"))
    logger.info(parameter_table(model))
    label2id = {canonical_answer(answer): label for answer, label in model.config.label2id.items()}
    data = {split: describe(examples, label2id, bad_pictures[split]) for split, examples in splits.items()}
    for split, found in data.items():
        logger.info(
            f"{split}: {found['questions']:,} questions about {found['pictures']:,} pictures; the {len(label2id)} answers "
            f"cover {found['answer_coverage']:.2%}" + (", which no accuracy can pass" if split != "train" else "")
        )
    if training_args.do_train:
        kept = drop_unknown_answers(splits["train"], label2id)
        data["train"]["dropped_questions"] = len(splits["train"]) - len(kept)
        if len(kept) < len(splits["train"]):
            logger.info(f"train: dropped {len(splits['train']) - len(kept):,} questions with no answer among them")
        splits["train"] = kept

    datasets = {split: VQADataset(examples) for split, examples in splits.items()}
    trainer = QuestionAnsweringTrainer(
        model=model,
        args=training_args,
        train_dataset=datasets.get("train"),
        eval_dataset=datasets.get("validation"),
        data_collator=VQACollator(processor, label2id, model.config.problem_type == "multi_label_classification"),
        processing_class=processor,
    )
    metrics, predictions = run(trainer, datasets.get("test"))

    if trainer.is_world_process_zero():
        folder = Path(training_args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if predictions is not None:
            test = datasets["test"]
            write_predictions(folder / "predictions.jsonl", test.examples, predictions)
            # Pictures from all over the split, and of each another question.
            shown = [
                test.groups[place] for place in torch.linspace(0, len(test) - 1, min(12, len(test))).int().tolist()
            ]
            shown = [test.examples[group[place % len(group)]] for place, group in enumerate(shown)]
            plot_predictions(answer_and_look(trainer.model, processor, shown), folder / "predictions.png")
        results = collect_results(trainer, args, metrics, data={"name": name, **data}, num_answers=len(label2id))
        results["wall_seconds"] = time.perf_counter() - start
        if training_args.do_train:
            write_card(trainer, args, results)
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        for split in ("validation", "test"):
            if "accuracy" in results.get(split, {}):
                print(
                    f"{split} accuracy: {results[split]['accuracy']:.4f} on {results[split]['num_questions']:,} questions"
                )
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return results if trainer.is_world_process_zero() else {}


if __name__ == "__main__":
    main()
