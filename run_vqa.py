"""Trains and evaluates HiViLT on questions about images.

    python run_vqa.py                                              easy-VQA, everything with defaults
    python run_vqa.py --benchmark gqa --data_dir GQA               a data set of the field, its official files or the Hub's
    python run_vqa.py --train_file train.jsonl --test_file test.jsonl --output_dir outputs/mine
    python run_vqa.py --model_name_or_path outputs/vqa --test_file test.csv --do_predict --output_dir outputs/test
    python run_vqa.py settings.yaml                                the same flags in one file
    accelerate launch --num_processes 2 run_vqa.py                 several devices

It leaves in --output_dir: the checkpoint with its code, processor and pipeline, README.md, results.json,
predictions.jsonl, training.png and predictions.png; for a benchmark with a server also submission.json.
"""

import json
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from hivilt.cards import python_literal, write_model_card
from hivilt.configuration_hivilt import HiViLTConfig
from hivilt.data.augmentation import GRAY
from hivilt.data.vqa import (
    Columns,
    VQACollator,
    VQADataset,
    VQAExample,
    build_answer_vocabulary,
    drop_unknown_answers,
    read_answers_file,
    read_file,
    read_table,
)
from hivilt.data.vqa_benchmarks import VQA_BENCHMARKS, VQABenchmark
from hivilt.evaluation.plots import plot_predictions
from hivilt.evaluation.vqa import answer_ceiling, answer_coverage, canonical_answer, exact_match
from hivilt.modeling_hivilt import HiViLTForQuestionAnswering
from hivilt.trainers import QuestionAnsweringTrainer, answer_examples
from hivilt.training import (
    HiViLTTrainingArguments,
    TaskArguments,
    augmentation_of,
    begin_run,
    checkpoint_to_resume,
    collect_results,
    encoder_cache_of,
    freeze_parts,
    load_or_build,
    parameter_table,
    prepare_splits,
    read_splits,
    run,
    run_command,
    set_threads,
    warn_of_chance,
    warn_of_few,
    write_json,
)

logger = logging.getLogger("hivilt")

DEFAULTS = {
    "output_dir": "outputs/vqa",
    "num_train_epochs": 10,
    "per_device_train_batch_size": 8,  # images, of about ten questions each in easy-VQA
    "per_device_eval_batch_size": 32,
    "learning_rate": 1.5e-3,
    "adam_beta2": 0.98,  # what colours taught the gradients' scale is soon forgotten, so shapes are learned next
    "weight_decay": 0.05,
    "warmup_steps": 0.1,  # a share of all steps
    "metric_for_best_model": "accuracy",
}
# What a benchmark does by itself; its resolution, learning rates and epochs are in runs/.
BENCHMARK_DEFAULTS = {
    name: {"metric_for_best_model": benchmark.metric, "min_answer_count": benchmark.min_answer_count}
    for name, benchmark in VQA_BENCHMARKS.items()
}


@dataclass
class VQAArguments(TaskArguments):
    """What only question answering has."""

    benchmark: str | None = field(
        default=None,
        metadata={
            "help": "Data set of the field: of data_dir, of dataset_name, or as the Hub has it. Unset: easy-vqa, unless "
            "other data is named.",
            "choices": list(VQA_BENCHMARKS),
        },
    )
    question_column: str = field(default="question", metadata={"help": "Column of questions."})
    question_id_column: str | None = field(default=None, metadata={"help": "Column copied to predictions.jsonl."})
    answer_column: str = field(default="answer", metadata={"help": "Column of an answer, or of a list of them."})
    answer_file: str | None = field(
        default=None,
        metadata={
            "help": "Answers to choose from, one a line or a JSON list. Unset: the benchmark's, or those of the training data."
        },
    )
    min_answer_count: int = field(default=1, metadata={"help": "Leave rarer training answers out of the vocabulary."})
    max_answers: int | None = field(default=None, metadata={"help": "Keep only this many most frequent answers."})
    blank_images: bool = field(
        default=False,
        metadata={"help": "Measure once more with gray in place of every image: what is right by the question alone."},
    )
    reword: float | None = field(
        default=None,
        metadata={"help": "Share of easy-vqa's training questions that are asked in other words. Default: 0.3."},
    )

    at_least_one = (*TaskArguments.at_least_one, "min_answer_count", "max_answers")

    def __post_init__(self):
        super().__post_init__()
        if not self.names_data():
            self.benchmark = "easy-vqa"
        benchmark = VQA_BENCHMARKS.get(self.benchmark)
        if self.reword is None:
            self.reword = 0.0 if benchmark is None else benchmark.reworded
        if not 0 <= self.reword <= 1 or (self.reword and (benchmark is None or benchmark.reword is None)):
            raise ValueError(f"reword: expected a share from 0 to 1 of the questions of easy-vqa, got {self.reword}.")
        if self.image_dir and not self.benchmark:
            raise ValueError("image_dir goes with a benchmark; paths in files of your own start at their folder.")


def read_data(args: VQAArguments, splits: Collection[str]) -> tuple[str, dict[str, list[VQAExample]]]:
    """The name of the data that the arguments name, and those of these splits that there are."""
    columns = Columns(
        args.image_column, args.question_column, args.answer_column, args.image_id_column, args.question_id_column
    )
    return read_splits(
        args,
        splits,
        lambda path, split: read_file(path, columns, answers_needed=split != "test"),
        lambda table, source, split, folder: read_table(table, columns, source, folder, split != "test"),
        VQA_BENCHMARKS.get(args.benchmark),
    )


def answers_file(args: VQAArguments) -> str | Path | None:
    """The file of answers that is named, or that of the benchmark, if any."""
    benchmark = VQA_BENCHMARKS.get(args.benchmark)
    return args.answer_file or (benchmark and benchmark.answer_file)


def answers_to_choose_from(args: VQAArguments, train: list[VQAExample]) -> list[str]:
    """The classes: a list that is named, that of the benchmark, or the answers of the training data."""
    if (file := answers_file(args)) is not None:
        return read_answers_file(file)
    answers = [one.answers for one in train]
    return build_answer_vocabulary(answers, args.min_answer_count, args.max_answers, normalize=several_answers(train))


def answers_of_checkpoint(args: VQAArguments, checkpoint: str, vocabulary: list[str]) -> list[str]:
    """The classes of the checkpoint that training goes on from, which hold: those of the data come in another order where
    rows were added or removed.

    Raises:
        ValueError: the run has answers that the checkpoint does not know, or is to choose from a list that is not its.
    """
    own = list(HiViLTConfig.from_pretrained(checkpoint).id2label.values())
    known, wanted = ({canonical_answer(answer) for answer in answers} for answers in (own, vocabulary))
    begin = f"begin anew from its weights with --model_name_or_path {checkpoint} and another --output_dir"
    if new := [answer for answer in vocabulary if canonical_answer(answer) not in known]:
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} does not know {len(new):,} of this run's {len(vocabulary):,} answers: "
            f"{', '.join(map(repr, new[:5]))}. Leave out their rows (--min_answer_count, --max_answers), or {begin}."
        )
    if answers_file(args) is not None and (
        lost := [answer for answer in own if canonical_answer(answer) not in wanted]
    ):
        raise ValueError(
            f"answer_file: the checkpoint to resume, {checkpoint}, chooses from {len(lost):,} answers that are not in "
            f"{answers_file(args)}: {', '.join(map(repr, lost[:5]))}. Name the file it was trained with, or {begin}."
        )
    return own


def several_answers(examples: list[VQAExample]) -> bool:
    """Whether questions have several answers each, so that labels are soft and VQA accuracy is what counts."""
    return any(len(one.answers) > 1 for one in examples)


def prepare_model(args: VQAArguments, training_args: HiViLTTrainingArguments, train: list[VQAExample] | None):
    """The model and its processor; if it trains, with the answers to choose from as its classes."""
    if train is None:
        if not args.model_name_or_path:
            raise ValueError("There is nothing to evaluate: give --model_name_or_path a checkpoint, or --do_train.")
        return load_or_build(args, HiViLTForQuestionAnswering)

    resumed = checkpoint_to_resume(training_args)
    vocabulary = answers_to_choose_from(args, train)
    if resumed is not None:
        vocabulary = answers_of_checkpoint(args, resumed, vocabulary)
    questions = [one.question for one in train]
    labels = dict(enumerate(vocabulary))
    model, processor = load_or_build(args, HiViLTForQuestionAnswering, questions, True, resumed, id2label=labels)
    spell_alike(model.config, vocabulary)
    known = list(model.config.id2label.values())
    if set(known) != set(vocabulary) or (resumed is not None and known != vocabulary):
        logger.info(f"Of {len(vocabulary)} answers the checkpoint knows {len(set(known) & set(vocabulary))}.")
        model.resize_answer_head(vocabulary)
    soft = several_answers(train)
    model.config.problem_type = "multi_label_classification" if soft else "single_label_classification"
    freeze_parts(model, args.freeze)
    return model, processor


def spell_alike(config: HiViLTConfig, vocabulary: list[str]) -> None:
    """Gives the classes of a checkpoint that the vocabulary has too the vocabulary's spelling: "USA" for "usa"."""
    spelling = {canonical_answer(answer): answer for answer in vocabulary}
    labels = {label: spelling.get(canonical_answer(answer), answer) for label, answer in config.id2label.items()}
    # Classes that differ in nothing but spelling stay as they are.
    if len(set(labels.values())) == len(labels):
        config.id2label, config.label2id = labels, {answer: label for label, answer in labels.items()}


def describe(examples: list[VQAExample], label2id: dict[str, int], bad_images: list[str]) -> dict:
    """What a split holds, for the log and for `results.json`."""
    answers = [one.answers for one in examples]
    found = {
        "images": len({one.image_id for one in examples}),
        "questions": len(examples),
        "answer_coverage": answer_coverage(answers, label2id) if any(answers) else None,
        "bad_images": bad_images,
    }
    return found | ({"answer_ceiling": answer_ceiling(answers, label2id)} if several_answers(examples) else {})


def describe_coverage(found: dict, split: str) -> str:
    """What `describe` found about the answers, in words."""
    if found["answer_coverage"] is None:
        return "their answers are not known"
    text = f"the answers to choose from cover {found['answer_coverage']:.2%} of the questions"
    if "answer_ceiling" in found:
        return f"{text}, for {found['answer_ceiling']:.2%} VQA accuracy at most"
    return text if split == "train" else f"{text}, which no accuracy can pass"


def headline(training_args: HiViLTTrainingArguments) -> str:
    """The metric that is printed, and that checkpoints are chosen by unless that is the loss."""
    metric = training_args.metric_for_best_model.removeprefix("eval_")
    return DEFAULTS["metric_for_best_model"] if metric == "loss" else metric


def write_predictions(path: Path, examples: list[VQAExample], predictions: list[list[dict]]) -> None:
    """One JSON object a question, in the order of the data."""
    # A file's name may be no Unicode; written so, it is an escape of JSON.
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
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


def draw_answers(path: Path, trainer: QuestionAnsweringTrainer, test: VQADataset) -> None:
    """A grid of images from all over the split, of each another question with its answers.

    All processes call it, for their shares of the weights; the main one draws.
    """
    num_images = len(test.groups)
    shown = [test.groups[place] for place in torch.linspace(0, num_images - 1, min(12, num_images)).int().tolist()]
    shown = [test.examples[group[place % len(group)]] for place, group in enumerate(shown)]
    with trainer.whole_weights():
        if trainer.is_world_process_zero():
            plot_predictions(answer_examples(trainer.model, trainer.processing_class, shown), path)


def write_submission(folder: Path, benchmark: VQABenchmark, test: VQADataset, predictions: list[list[dict]]) -> None:
    """The files that the benchmark's server takes."""
    for name, rows in benchmark.submissions(predictions, test.examples).items():
        (folder / name).write_text(json.dumps(rows, allow_nan=False) + "\n", encoding="utf-8")
        logger.info(f"{name}: {len(rows):,} answers for the server of {benchmark.title}; it wants all of its split")


def headline_numbers(found: dict, metric: str) -> list[str]:
    """The metric that counts and the others beside it that are one number each, of those that were measured."""
    others = (name for name in found if name.endswith(("accuracy", "precision", "f1")) or name.startswith("wups"))
    return [name for name in dict.fromkeys([metric, *others]) if name in found]


def measure_majority(
    trainer: QuestionAnsweringTrainer, results: dict, datasets: dict[str, VQADataset], metric: str
) -> None:
    """Writes beside what was measured what the training questions' most frequent answer would reach, given to every question."""
    train = datasets["train"].examples
    answer = build_answer_vocabulary([one.answers for one in train], max_size=1, normalize=several_answers(train))[0]
    for split in ("validation", "test"):
        if metric in results.get(split, {}):
            found = trainer.metrics_of_answer(answer, datasets[split])
            names = [name for name in dict.fromkeys([metric, "accuracy"]) if name in found and name in results[split]]
            results[split] |= {f"{name}_of_majority_answer": found[name] for name in names}
            results[split]["majority_answer"] = answer


def measure_blank_images(trainer: QuestionAnsweringTrainer, dataset: VQADataset, metric: str) -> dict[str, float]:
    """The headline numbers of a split whose images are all the same gray, each by its name with `_of_blank_images`."""
    with TemporaryDirectory() as folder:
        gray = Path(folder) / "gray.png"
        Image.new("RGB", (256, 256), GRAY).save(gray)
        blank = VQADataset([one._replace(image=str(gray)) for one in dataset.examples])
        found = trainer.predict(blank, metric_key_prefix="blank").metrics
    found = {name.removeprefix("blank_"): value for name, value in found.items()}
    return {f"{name}_of_blank_images": found[name] for name in headline_numbers(found, metric)}


def summary_of(results: dict, split: str, metric: str) -> str:
    """The number that counts, the others, and accuracy by type of question where the data tells types, as lines."""
    found = results[split]
    lines = [f"{split} {metric.replace('_', ' ')}: {found[metric]:.4f} on {found['num_questions']:,} questions"]
    if (baseline := found.get(f"{metric}_of_majority_answer")) is not None:
        lines.append(f"  always {found['majority_answer']!r}, the most frequent training answer: {baseline:.4f}")
    if (baseline := found.get(f"{metric}_of_blank_images")) is not None:
        lines.append(f"  with gray in place of every image: {baseline:.4f}")
    if others := headline_numbers(found, metric)[1:]:
        lines.append("  " + ", ".join(f"{name.replace('_', ' ')} {found[name]:.4f}" for name in others))
    for name, accuracies in found.items():
        if isinstance(accuracies, dict):
            shown = ", ".join(f"{kind} {accuracy:.4f}" for kind, accuracy in accuracies.items())
            lines.append(f"  {name.replace('_', ' ')}: {shown}")
    return "\n".join(lines)


def write_card(
    trainer: QuestionAnsweringTrainer,
    args: VQAArguments,
    results: dict,
    splits: dict[str, list[VQAExample]],
    argv: list[str] | None,
) -> None:
    """`README.md` of the checkpoint."""
    metric = headline(trainer.args)
    measured = [name for split in ("test", "validation") for name in headline_numbers(results.get(split, {}), metric)]
    write_model_card(
        trainer,
        args,
        results,
        splits,
        task="question answering",
        script=Path(__file__).name,
        argv=argv,
        metrics={name: name.replace("_", " ") for name in measured},
        pipeline_tag="visual-question-answering",
        metric_ids=[metric],
        image="![Questions and answers](predictions.png)",
        num_answers=f"{results['num_answers']:,}",
        question=python_literal(splits["validation"][0].question),
        multi_label=trainer.model.config.problem_type == "multi_label_classification",
    )


def main(argv: list[str] | None = None) -> dict:
    """Runs as the flags ask (`argv`; unset, the command line) and returns what `results.json` holds."""
    start = time.perf_counter()
    args, training_args = begin_run(argv, VQAArguments, DEFAULTS, BENCHMARK_DEFAULTS)
    benchmark, metric = VQA_BENCHMARKS.get(args.benchmark), headline(training_args)

    by = benchmark.hold_out_by if benchmark is not None else attrgetter("image_id")
    name, splits, bad_images, held_out = prepare_splits(args, training_args, lambda wanted: read_data(args, wanted), by)
    if args.reword and "train" in splits:
        splits["train"] = benchmark.reword(splits["train"], args.reword, training_args.draw_seed)
    model, processor = prepare_model(args, training_args, splits["train"] if training_args.do_train else None)
    logger.info(parameter_table(model))
    set_threads(args, model)
    label2id = {canonical_answer(answer): label for answer, label in model.config.label2id.items()}
    data = {split: describe(examples, label2id, bad_images[split]) for split, examples in splits.items()}
    for split, found in data.items():
        logger.info(
            f"{split}: {found['questions']:,} questions about {found['images']:,} images; "
            f"{describe_coverage(found, split)} ({len(label2id):,} answers)"
        )
        if split != "train":
            warn_of_few(split, sum(1 for one in splits[split] if one.answers), "questions with a known answer")
    if training_args.do_train:
        kept = drop_unknown_answers(splits["train"], label2id)
        data["train"]["dropped_questions"] = len(splits["train"]) - len(kept)
        if not kept:
            raise ValueError(
                f"answer_file: none of the {len(splits['train']):,} training questions has an answer among the "
                f"{len(label2id):,} to choose from, the first being {next(iter(model.config.label2id))!r}; name the right file."
            )
        if len(kept) < len(splits["train"]):
            logger.info(f"train: dropped {len(splits['train']) - len(kept):,} questions with no answer among them")
        splits["train"] = kept

    datasets = {
        split: VQADataset(examples, seed=training_args.draw_seed if split == "train" else None)
        for split, examples in splits.items()
    }
    soft = model.config.problem_type == "multi_label_classification"
    trainer = QuestionAnsweringTrainer(
        model=model,
        args=training_args,
        train_dataset=datasets.get("train"),
        eval_dataset=datasets.get("validation"),
        data_collator=VQACollator(processor, label2id, soft, augmentation_of(args)),
        processing_class=processor,
        vision_learning_rate=args.vision_learning_rate,
        text_learning_rate=args.text_learning_rate,
        encoder_cache=encoder_cache_of(args),
        watched_answer=benchmark and benchmark.watched_answer,
        official_metrics=benchmark and benchmark.official_metrics,
    )
    metrics, predictions = run(trainer, datasets.get("test"), held_out, args.calibrate)
    for split, prefix in (("validation", "eval"), ("test", "test")) if args.blank_images else ():
        if split in metrics:
            blank = measure_blank_images(trainer, datasets[split], metric)
            metrics[split] |= {f"{prefix}_{name}": value for name, value in blank.items()}

    folder = Path(training_args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if predictions is not None:
        draw_answers(folder / "predictions.png", trainer, datasets["test"])
    if trainer.is_world_process_zero():
        if predictions is not None:
            test = datasets["test"]
            write_predictions(folder / "predictions.jsonl", test.examples, predictions)
            if benchmark is not None and benchmark.submissions is not None:
                write_submission(folder, benchmark, test, predictions)
        results = collect_results(trainer, args, metrics, data={"name": name, **data}, num_answers=len(label2id))
        if training_args.do_train:
            measure_majority(trainer, results, datasets, metric)
            if (chance := results.get("validation", {}).get(f"{metric}_of_majority_answer")) is not None:
                found = results["validation"]
                sizes = found["num_questions"], data["train"]["images"]
                warn_of_chance(args, metric.replace("_", " "), found[metric], chance, *sizes)
        results["wall_seconds"] = time.perf_counter() - start
        if training_args.do_train:
            write_card(trainer, args, results, splits, argv)
        write_json(folder / "results.json", results)
        for split in ("validation", "test"):
            if metric in results.get(split, {}):
                print(summary_of(results, split, metric))
    if training_args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        print(f"Wrote {folder}" + (f"; try it: python app.py --model {folder}" if training_args.do_train else ""))
    return results if trainer.is_world_process_zero() else {}


if __name__ == "__main__":
    run_command(main)
