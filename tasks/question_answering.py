"""Question answering: its data, its trainer, what it measures and reports."""

import json
import logging
import math
import random
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from PIL import Image

from hivilt.configuration_hivilt import HiViLTConfig
from hivilt.data.augmentation import GRAY, Augmentation
from hivilt.data.tables import open_image
from hivilt.data.vqa import (
    IGNORED_LABEL,
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
from hivilt.evaluation.calibration import calibrate
from hivilt.evaluation.plots import AnsweredQuestion, plot_predictions
from hivilt.evaluation.vqa import (
    answer_ceiling,
    answer_coverage,
    canonical_answer,
    exact_match,
    majority_answer,
    vqa_metrics,
)
from hivilt.modeling_hivilt import HiViLTForQuestionAnswering, HiViLTPreTrainedModel
from hivilt.processing_hivilt import HiViLTProcessor
from hivilt.tasks.task import Task
from hivilt.training.arguments import HiViLTTrainingArguments, TaskArguments
from hivilt.training.cards import python_literal
from hivilt.training.models import load_or_build
from hivilt.training.results import warn_of_few
from hivilt.training.resuming import checkpoint_to_resume
from hivilt.training.splits import read_splits
from hivilt.training.trainer import CALIBRATION_QUESTIONS, HiViLTTrainer

logger = logging.getLogger("hivilt")


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


# Training


class QuestionAnsweringTrainer(HiViLTTrainer):
    """Trains and evaluates on a `VQADataset`. A batch is of images with all their questions, and
    `per_device_train_batch_size` counts images, while losses and metrics count questions.

    The loss of a step is the mean over all its questions: over images with few and many of them, over accumulated
    batches and over processes. Evaluation keeps the best few answers of each question, not the scores of all answers,
    and gives exactly one prediction a question, in order, on any number of processes.

    Args:
        top_k: how many answers to keep for each question.
        watched_answer: an answer to keep with its probability for every question, after the best ones if it is not
            among them.
        official_metrics: the metrics of a benchmark, given the answers that were kept and the examples; they go beside
            those of `vqa_metrics`, or in their place. Accuracies by type are left out of evaluations within training.
        **kwargs: as `HiViLTTrainer`.
    """

    unit = "questions"

    def __init__(
        self,
        *args,
        top_k: int = 3,
        watched_answer: str | None = None,
        official_metrics: Callable[[list[list[dict]], list[VQAExample]], Mapping[str, Any]] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        # Not by Trainer's smoother, which is NaN where no question of a batch has an answer.
        self.label_smoother = None
        if self.args.label_smoothing_factor and self.model.config.problem_type == "multi_label_classification":
            raise ValueError(
                f"label_smoothing_factor: got {self.args.label_smoothing_factor}, but questions with several answers have "
                "soft labels as they are; leave it out."
            )
        self.top_k = top_k
        self.watched_answer = watched_answer
        self.official_metrics = official_metrics

    def _get_dataloader(self, dataset, *args, is_training: bool = False, **kwargs):
        """Batches of a `VQADataset` by image; refuses to train where no question has an answer of the vocabulary."""
        if isinstance(dataset, VQADataset):
            if is_training:
                self._check_answers(dataset)
            dataset = dataset.by_image()
        return super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)

    def _check_answers(self, dataset: VQADataset) -> None:
        label2id = getattr(self.data_collator, "label2id", None)
        if label2id and not drop_unknown_answers(dataset.examples, label2id):
            answers = [answer for example in dataset.examples for answer in example.answers]
            raise ValueError(
                f"train_dataset: none of its {len(dataset)} questions has an answer of the collator's label2id, so there is "
                f"nothing to learn. Their answers are {reprlib.repr(answers)}, those of label2id "
                f"{reprlib.repr(list(label2id))}."
            )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one step, and how many questions with an answer they hold, on all processes together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_questions = torch.tensor([sum(int(_answered(batch["labels"]).sum()) for batch in batches)], device=device)
        num_questions = self.accelerator.gather(num_questions).sum()
        self.num_examples_trained += int(num_questions)
        return batches, num_questions

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss, weighted by the share of this batch in the questions of the step."""
        num_questions = int(_answered(inputs["labels"]).sum())
        inputs = {name: value for name, value in inputs.items() if name != "question_index"}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if self.args.label_smoothing_factor and model.training:
            if inputs["labels"].is_floating_point():
                raise ValueError("label_smoothing_factor: expected integer labels, got soft ones; leave it out.")
            ways = {"ignore_index": IGNORED_LABEL, "reduction": "sum"}
            plain = F.cross_entropy(outputs.logits.float(), inputs["labels"], **ways)
            smooth = F.cross_entropy(
                outputs.logits.float(), inputs["labels"], label_smoothing=self.args.label_smoothing_factor, **ways
            )
            loss = loss + self.model.config.classification_loss_weight * (smooth - plain) / max(num_questions, 1)
        if num_items_in_batch is not None:
            # Trainer goes on to divide by the number of batches, and gradients are averaged over processes.
            share = num_questions / num_items_in_batch.clamp(min=1)
            loss = loss * share * self.current_gradient_accumulation_steps * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def measure(self, model, dataloader, description):
        """Answers every question of a `VQADataset`.

        Returns:
            For each question, in the dataset's order, `{"answer": str, "score": float}` of the `top_k` best; the metrics
            of `vqa_metrics` (`top3_accuracy` where there are more than three answers to choose from) and
            `official_metrics`, and `loss`, the mean classification loss of the questions whose answer is in the
            vocabulary; the number of questions.
        """
        records = []
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            question_index = inputs.pop("question_index").tolist()
            labels = inputs.pop("labels", None)
            logits = model(**inputs).logits
            losses = [None] * len(logits) if labels is None else question_losses(logits, labels)
            records += zip(question_index, losses, self._best_answers(logits), strict=True)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        # The last batches of several processes are filled up with images from the front: keep one of each question.
        by_index = {index: (loss, answers) for index, loss, answers in gather_object(records)}
        examples = dataloader.dataset.examples
        if sorted(by_index) != list(range(len(examples))):
            raise RuntimeError(f"{description}: {len(by_index)} of {len(examples)} questions were answered.")
        predictions = [by_index[index][1] for index in range(len(examples))]

        metrics = self._metrics(predictions, examples)
        losses = [loss for loss, _ in by_index.values() if loss is not None]
        if losses:
            metrics["loss"] = sum(losses) / len(losses)
        elif not all(math.isfinite(answer["score"]) for answers in predictions for answer in answers):
            metrics["loss"] = math.nan
        return predictions, metrics, len(examples)

    def _calibration_split(self, dataset: VQADataset) -> VQADataset:
        examples = [example for example in dataset.examples if example.answers]
        if len(examples) > CALIBRATION_QUESTIONS:
            examples = random.Random(0).sample(examples, CALIBRATION_QUESTIONS)
        return VQADataset(examples) if examples else dataset

    def _find_temperature(self, model, dataloader):
        """That of the classifier's scores. A question whose answer is not to choose from counts as wrong in the errors."""
        records = []
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            question_index, labels = inputs.pop("question_index").tolist(), inputs.pop("labels", None)
            if labels is not None:
                records += zip(question_index, model(**inputs).logits.float().cpu(), labels.cpu(), strict=True)
        by_index = {index: (logits, labels) for index, logits, labels in gather_object(records)}
        if not by_index:
            return None
        logits, labels = (torch.stack([by_index[index][part] for index in sorted(by_index)]) for part in (0, 1))
        return calibrate(logits, labels) if _answered(labels).any() else None

    def _divide_scores(self, temperature: float) -> None:
        for parameter in self.model.classifier.parameters():
            parameter.div_(temperature)

    def _metrics(self, predictions: list[list[dict]], examples: list[VQAExample]) -> dict[str, Any]:
        metrics = vqa_metrics(
            [[answer["answer"] for answer in answers] for answers in predictions],
            [example.answers for example in examples],
        )
        if self.model.config.num_labels <= 3:
            metrics.pop("top3_accuracy", None)  # 1 whatever is answered
        if self.official_metrics is not None:
            official = self.official_metrics(predictions, examples)
            metrics |= {
                name: value for name, value in official.items() if not (self.is_in_train and isinstance(value, dict))
            }
        return metrics

    def metrics_of_answer(self, answer: str, dataset: VQADataset) -> dict[str, float]:
        """The metrics, as `measure` gives them and as far as they are one number each, of this answer to every question."""
        found = self._metrics([[{"answer": answer, "score": 1.0}]] * len(dataset.examples), dataset.examples)
        return {name: value for name, value in found.items() if isinstance(value, float)}

    def metric_names(self, dataset: VQADataset) -> set[str]:
        answer = {"answer": self.watched_answer or "", "score": 0.0}
        found = self._metrics([[answer]] * len(dataset.examples), dataset.examples)
        return {"loss", *(name for name, value in found.items() if isinstance(value, float))}

    def _best_answers(self, logits: torch.Tensor) -> list[list[dict[str, Any]]]:
        config = self.model.config
        multi_label = config.problem_type == "multi_label_classification"
        best = self.processing_class.post_process_question_answering(logits, self.top_k, config=config)
        if self.watched_answer in config.label2id:
            scores = logits.float().sigmoid() if multi_label else logits.float().softmax(dim=-1)
            for answers, score in zip(best, scores[:, config.label2id[self.watched_answer]].tolist(), strict=True):
                if all(answer["answer"] != self.watched_answer for answer in answers):
                    answers.append({"answer": self.watched_answer, "score": score})
        return best


def _answered(labels: torch.Tensor) -> torch.BoolTensor:
    """Rows with an answer in the vocabulary, (B_t,), of integer labels (B_t,) or soft ones (B_t, num_labels)."""
    return (labels > 0).any(dim=-1) if labels.is_floating_point() else labels != IGNORED_LABEL


def question_losses(logits: torch.Tensor, labels: torch.Tensor) -> list[float | None]:
    """The classification loss of each question by itself; their mean is the loss of the batch.

    Args:
        logits: (B_t, num_labels).
        labels: (B_t,) integers with -100 for no answer, or (B_t, num_labels) soft scores, all zero for none.

    Returns:
        One number a question; `None` for those without an answer.
    """
    if labels.is_floating_point():
        losses = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none").sum(dim=-1)
    else:
        losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="none")
    return [loss if answered else None for loss, answered in zip(losses.tolist(), _answered(labels), strict=True)]


@torch.no_grad()
def answer_examples(
    model: HiViLTPreTrainedModel, processor: HiViLTProcessor, examples: Sequence[VQAExample], top_k: int = 3
) -> list[AnsweredQuestion]:
    """Answers questions, to be drawn beside their images.

    Args:
        model: a `HiViLTForQuestionAnswering`.
        processor: its processor.
        examples: the questions, few enough for one batch.
        top_k: how many answers to keep for each.
    """
    model.eval()
    images = [open_image(example.image) for example in examples]
    texts = [[example.question] for example in examples]
    logits = model(**processor(images=images, text=texts, return_tensors="pt").to(model.device)).logits
    answers = processor.post_process_question_answering(
        logits,
        top_k=top_k,
        id2label=model.config.id2label,
        multi_label=model.config.problem_type == "multi_label_classification",
    )
    return [
        AnsweredQuestion(
            image=image,
            question=example.question,
            predictions=predictions,
            answer=majority_answer(example.answers) if example.answers else None,
        )
        for image, example, predictions in zip(images, examples, answers, strict=True)
    ]


# The task


class QuestionAnswering(Task):
    """Answers questions about images from a list of answers, `config.id2label`."""

    name = "question answering"
    script = "run_vqa.py"
    pipeline_tag = "visual-question-answering"
    arguments = VQAArguments
    defaults = {
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
    benchmarks = VQA_BENCHMARKS
    model_class = HiViLTForQuestionAnswering
    trainer_class = QuestionAnsweringTrainer

    def __init__(self, args: VQAArguments, training_args: HiViLTTrainingArguments | None = None):
        super().__init__(args, training_args)
        self.label2id: dict[str, int] = {}  # canonical answers, known once there is a model
        self.soft_labels = False

    @property
    def metric(self) -> str:
        """The metric that is printed, and that checkpoints are chosen by unless that is the loss."""
        metric = self.training_args.metric_for_best_model.removeprefix("eval_")
        return self.defaults["metric_for_best_model"] if metric == "loss" else metric

    @classmethod
    def benchmark_defaults(cls) -> dict[str, dict[str, Any]]:
        return {
            name: {"metric_for_best_model": benchmark.metric, "min_answer_count": benchmark.min_answer_count}
            for name, benchmark in cls.benchmarks.items()
        }

    def read(self, splits: Collection[str]) -> tuple[str, dict[str, list[VQAExample]]]:
        args = self.args
        columns = Columns(
            args.image_column, args.question_column, args.answer_column, args.image_id_column, args.question_id_column
        )
        return read_splits(
            args,
            splits,
            lambda path, split: read_file(path, columns, answers_needed=split != "test"),
            lambda table, source, split, folder: read_table(table, columns, source, folder, split != "test"),
            self.benchmark,
        )

    def hold_out_by(self, example: VQAExample) -> str:
        return example.image_id if self.benchmark is None else self.benchmark.hold_out_by(example)

    def prepare(self, splits: dict[str, list[VQAExample]]) -> dict[str, list[VQAExample]]:
        """Asks some of the training questions in other words, where the benchmark has them."""
        if not self.args.reword or "train" not in splits:
            return splits
        return {
            **splits,
            "train": self.benchmark.reword(splits["train"], self.args.reword, self.training_args.draw_seed),
        }

    def make_model(self, train: list[VQAExample] | None) -> tuple[HiViLTForQuestionAnswering, HiViLTProcessor]:
        """The model and its processor; if it trains, with the answers to choose from as its classes."""
        if train is None:
            if not self.args.model_name_or_path:
                raise ValueError("There is nothing to evaluate: give --model_name_or_path a checkpoint, or --do_train.")
            return load_or_build(self.args, self.model_class)

        resumed = checkpoint_to_resume(self.training_args)
        vocabulary = answers_to_choose_from(self.args, train)
        if resumed is not None:
            vocabulary = answers_of_checkpoint(self.args, resumed, vocabulary)
        questions = [example.question for example in train]
        labels = dict(enumerate(vocabulary))
        model, processor = load_or_build(self.args, self.model_class, questions, True, resumed, id2label=labels)
        spell_alike(model.config, vocabulary)
        known = list(model.config.id2label.values())
        if set(known) != set(vocabulary) or (resumed is not None and known != vocabulary):
            logger.info(f"Of {len(vocabulary)} answers the checkpoint knows {len(set(known) & set(vocabulary))}.")
            model.resize_answer_head(vocabulary)
        soft = several_answers(train)
        model.config.problem_type = "multi_label_classification" if soft else "single_label_classification"
        return model, processor

    def make_datasets(
        self, splits: Mapping[str, list[VQAExample]], model: HiViLTForQuestionAnswering
    ) -> tuple[dict[str, VQADataset], dict[str, dict[str, Any]]]:
        self.label2id = {canonical_answer(answer): label for answer, label in model.config.label2id.items()}
        self.soft_labels = model.config.problem_type == "multi_label_classification"
        datasets, data = {}, {}
        for split, examples in splits.items():
            data[split] = found = describe(examples, self.label2id)
            logger.info(
                f"{split}: {found['questions']:,} questions about {found['images']:,} images; "
                f"{describe_coverage(found, split)} ({len(self.label2id):,} answers)"
            )
            if split == "train":
                # A checkpoint that is calibrated reads what it was trained on, and does not train.
                kept = self._with_known_answers(examples) if self.training_args.do_train else examples
                if self.training_args.do_train:
                    found["dropped_questions"] = len(examples) - len(kept)
                datasets[split] = VQADataset(kept, seed=self.training_args.draw_seed)
            else:
                warn_of_few(split, sum(1 for example in examples if example.answers), "questions with a known answer")
                datasets[split] = VQADataset(examples)
        return datasets, data

    def _with_known_answers(self, train: list[VQAExample]) -> list[VQAExample]:
        kept = drop_unknown_answers(train, self.label2id)
        if not kept:
            raise ValueError(
                f"answer_file: none of the {len(train):,} training questions has an answer among the "
                f"{len(self.label2id):,} to choose from, the first being {next(iter(self.label2id))!r}; name the right file."
            )
        if len(kept) < len(train):
            logger.info(f"train: dropped {len(train) - len(kept):,} questions with no answer among them")
        return kept

    def collator(self, processor: HiViLTProcessor, augmentation: Augmentation | None) -> VQACollator:
        return VQACollator(processor, self.label2id, self.soft_labels, augmentation)

    def trainer_arguments(self) -> dict[str, Any]:
        benchmark = self.benchmark
        return {
            "watched_answer": benchmark and benchmark.watched_answer,
            "official_metrics": benchmark and benchmark.official_metrics,
        }

    def measure_more(
        self, trainer: QuestionAnsweringTrainer, metrics: dict[str, dict[str, Any]], datasets: Mapping[str, VQADataset]
    ) -> None:
        """With gray in place of every image, where the flags ask for it."""
        for split, prefix in (("validation", "eval"), ("test", "test")) if self.args.blank_images else ():
            if split in metrics:
                blank = measure_blank_images(trainer, datasets[split], self.metric)
                metrics[split] |= {f"{prefix}_{name}": value for name, value in blank.items()}

    def write(
        self, trainer: QuestionAnsweringTrainer, folder: Path, dataset: VQADataset, predictions: list[list[dict]]
    ) -> None:
        draw_answers(folder / "predictions.png", trainer, dataset)
        if trainer.is_world_process_zero():
            write_predictions(folder / "predictions.jsonl", dataset.examples, predictions)
            if self.benchmark is not None and self.benchmark.submissions is not None:
                write_submission(folder, self.benchmark, dataset, predictions)

    def facts(self) -> dict[str, Any]:
        return {"num_answers": len(self.label2id)}

    def compare(
        self, trainer: QuestionAnsweringTrainer, results: dict[str, Any], datasets: Mapping[str, VQADataset]
    ) -> tuple[str, float, float, int] | None:
        """Beside the training questions' most frequent answer, given to every question."""
        measure_majority(trainer, results, datasets, self.metric)
        found = results.get("validation", {})
        chance = found.get(f"{self.metric}_of_majority_answer")
        if chance is None:
            return None
        return self.metric.replace("_", " "), found[self.metric], chance, found["num_questions"]

    def summary(self, results: Mapping[str, Any], split: str) -> str:
        return summary_of(results, split, self.metric) if self.metric in results[split] else ""

    def card(
        self, trainer: QuestionAnsweringTrainer, results: Mapping[str, Any], splits: Mapping[str, list[VQAExample]]
    ) -> dict[str, Any]:
        measured = [
            name for split in ("test", "validation") for name in headline_numbers(results.get(split, {}), self.metric)
        ]
        return {
            "metrics": {name: name.replace("_", " ") for name in measured},
            "metric_ids": [self.metric],
            "image": "![Questions and answers](predictions.png)",
            "num_answers": f"{results['num_answers']:,}",
            "question": python_literal(splits["validation"][0].question),
            "multi_label": self.soft_labels,
        }

    def try_next(self, folder: Path) -> str:
        return f"python app.py --model {folder}"


# Answers to choose from


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


def spell_alike(config: HiViLTConfig, vocabulary: list[str]) -> None:
    """Gives the classes of a checkpoint that the vocabulary has too the vocabulary's spelling: "USA" for "usa"."""
    spelling = {canonical_answer(answer): answer for answer in vocabulary}
    labels = {label: spelling.get(canonical_answer(answer), answer) for label, answer in config.id2label.items()}
    # Classes that differ in nothing but spelling stay as they are.
    if len(set(labels.values())) == len(labels):
        config.id2label, config.label2id = labels, {answer: label for label, answer in labels.items()}


# What is written and said


def describe(examples: list[VQAExample], label2id: dict[str, int]) -> dict:
    """What a split holds, for the log and for `results.json`."""
    answers = [one.answers for one in examples]
    found = {
        "images": len({one.image_id for one in examples}),
        "questions": len(examples),
        "answer_coverage": answer_coverage(answers, label2id) if any(answers) else None,
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
