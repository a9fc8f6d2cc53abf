"""Question answering: its data, its trainer, what it measures and reports."""

import json
import logging
import math
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
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
    read_table,
)
from hivilt.data.vqa_benchmarks import VQA_BENCHMARKS
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
from hivilt.losses_hivilt import classification_loss
from hivilt.modeling_hivilt import HiViLTForQuestionAnswering
from hivilt.processing_hivilt import HiViLTProcessor
from hivilt.search import ImageAnswer
from hivilt.tasks.arguments import VQAArguments
from hivilt.tasks.indexing import open_index
from hivilt.tasks.task import Task, spread, write_rows
from hivilt.training.arguments import HiViLTTrainingArguments
from hivilt.training.cards import python_literal
from hivilt.training.results import warn_of_few
from hivilt.training.splits import read_splits
from hivilt.training.trainer import HiViLTTrainer

logger = logging.getLogger("hivilt")


class QuestionAnsweringTrainer(HiViLTTrainer):
    """Trains and evaluates on a `VQADataset`. A batch is of images with all their questions, and
    `per_device_train_batch_size` counts images, while losses and metrics count questions.

    The loss of a step is the mean over all its questions, whatever the images, accumulated batches and processes. Evaluation
    keeps the best few answers of each question, in order, and not the scores of all answers.

    Args:
        top_k: how many answers to keep for each question.
        watched_answer: an answer to keep with its probability for every question, after the best ones if it is not
            among them.
        official_metrics: the metrics of a benchmark, given the answers that were kept and the examples; they go beside
            those of `vqa_metrics`, or in their place. Accuracies by type are left out of evaluations within training.
    """

    unit = "questions"
    place_name = "question_index"
    most_calibrated = 10_000

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
            label2id = getattr(self.data_collator, "label2id", None)
            if is_training and label2id and not drop_unknown_answers(dataset.examples, label2id):
                answers = [answer for example in dataset.examples for answer in example.answers]
                raise ValueError(
                    f"train_dataset: none of its {len(dataset)} questions has an answer of the collator's label2id, so there "
                    f"is nothing to learn. Their answers are {reprlib.repr(answers)}, those of label2id "
                    f"{reprlib.repr(list(label2id))}."
                )
            dataset = dataset.by_image()
        return super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)

    def count(self, inputs: Mapping[str, Any]) -> int:
        """The questions of a batch that have an answer in the vocabulary."""
        return int(_answered(inputs["labels"]).sum())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss, smoothed, as its share in the mean over the questions of the step."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if self.args.label_smoothing_factor and model.training:
            if inputs["labels"].is_floating_point():
                raise ValueError("label_smoothing_factor: expected integer labels, got soft ones; leave it out.")
            ways = {"ignore_index": IGNORED_LABEL, "reduction": "sum"}
            entropy = partial(F.cross_entropy, outputs.logits.float(), inputs["labels"], **ways)
            more = entropy(label_smoothing=self.args.label_smoothing_factor) - entropy()
            loss = loss + self.model.config.classification_loss_weight * more / max(self.count(inputs), 1)
        loss = self.step_share(loss, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def measure(self, model, batches, dataset):
        """Answers every question of a `VQADataset`.

        Returns:
            For each question, in the dataset's order, `{"answer": str, "score": float}` of the `top_k` best; the metrics
            of `vqa_metrics` (`top3_accuracy` of more than three answers to choose from) and `official_metrics`, and `loss`,
            the mean over questions whose answer is in the vocabulary; the number of questions.
        """
        measured = self.measure_each(batches, partial(self.answer, model), dataset)
        predictions, losses = map(list, zip(*measured, strict=True))

        metrics = self._metrics(predictions, dataset.examples)
        if self.is_in_train:
            metrics = {name: value for name, value in metrics.items() if not isinstance(value, dict)}
        if (loss := self.mean_loss(losses)) is not None:
            metrics["loss"] = loss
        elif not all(math.isfinite(answer["score"]) for answers in predictions for answer in answers):
            metrics["loss"] = math.nan
        return predictions, metrics, len(predictions)

    def answer(self, model, inputs: dict[str, Any]) -> Iterable[tuple[list[dict[str, Any]], float | None]]:
        """The best answers of each question of a batch, and its loss where one is known."""
        labels = inputs.pop("labels", None)
        logits = model(**inputs).logits
        losses = [None] * len(logits) if labels is None else question_losses(logits, labels)
        return zip(self._best_answers(logits), losses, strict=True)

    def mean_loss(self, losses: list[float | None]) -> float | None:
        """The mean over questions, from what `answer` gives of each; `None` where no loss is known."""
        known = [loss for loss in losses if loss is not None]
        return sum(known) / len(known) if known else None

    def is_labelled(self, example: VQAExample) -> bool:
        return bool(example.answers)

    def _find_temperature(self, model, batches, dataset):
        """That of the classifier's scores. A question whose answer is not to choose from counts as wrong in the errors."""

        def scores_and_labels(inputs):
            labels = inputs.pop("labels").cpu().numpy()
            return zip(model(**inputs).logits.float().cpu().numpy(), labels, strict=True)

        measured = zip(*self.measure_each(batches, scores_and_labels, dataset), strict=True)
        logits, labels = (torch.from_numpy(np.stack(rows)) for rows in measured)
        return calibrate(logits, labels) if _answered(labels).any() else None

    def _divide_scores(self, temperature: float) -> None:
        for parameter in self.model.answer_head.parameters():
            parameter.div_(temperature)

    def _metrics(self, predictions: list[list[dict]], examples: list[VQAExample]) -> dict[str, Any]:
        given = [[answer["answer"] for answer in answers] for answers in predictions]
        metrics = vqa_metrics(given, [example.answers for example in examples])
        if self.model.config.num_labels <= 3:
            metrics.pop("top3_accuracy", None)  # 1 whatever is answered
        if self.official_metrics is not None:
            metrics |= self.official_metrics(predictions, examples)
        return metrics

    def metrics_of_answer(self, answer: str, dataset: VQADataset) -> dict[str, float]:
        """The metrics of `measure` that are one number each, of this answer to every question."""
        metrics = self._metrics([[{"answer": answer, "score": 1.0}]] * len(dataset.examples), dataset.examples)
        return {name: value for name, value in metrics.items() if isinstance(value, float)}

    def metric_names(self, dataset: VQADataset) -> set[str]:
        return {"loss", *self.metrics_of_answer(self.watched_answer or "", dataset)}

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
    """The model's loss of each question, `None` for those without an answer; arguments as `classification_loss`."""
    losses = torch.vmap(classification_loss)(logits[:, None], labels[:, None]).tolist()
    return [loss if answered else None for loss, answered in zip(losses, _answered(labels), strict=True)]


class QuestionAnswering(Task):
    """Answers questions about images from a list of answers, `config.id2label`."""

    name = "question answering"
    script = "run_vqa.py"
    pipeline_tag = "visual-question-answering"
    card_template = "question_answering.md"
    arguments = VQAArguments
    benchmarks = VQA_BENCHMARKS
    model_class = HiViLTForQuestionAnswering
    trainer_class = QuestionAnsweringTrainer
    label2id: dict[str, int] = {}  # canonical answers, once there is a model; of one that writes none
    soft_labels = False

    def instead(self) -> list | None:
        is_asked = self.args.index is not None or self.args.ask is not None
        return ask(self.args, self.training_args) if is_asked else None

    def read(self, splits: Collection[str]) -> tuple[str, dict[str, list[VQAExample]]]:
        args = self.args
        texts, ids = (args.question_column, args.answer_column), (args.image_id_column, args.question_id_column)
        columns = Columns(args.image_column, *texts, *ids)
        of_table = lambda table, source, split, folder: read_table(table, columns, source, folder, split != "test")
        return read_splits(args, splits, of_table, self.benchmark)

    def prepare(self, splits: dict[str, list[VQAExample]]) -> dict[str, list[VQAExample]]:
        """Asks some of the training questions in other words, where the benchmark has them."""
        if self.args.reword and "train" in splits:
            reworded = self.benchmark.reword(splits["train"], self.args.reword, self.training_args.draw_seed)
            return {**splits, "train": reworded}
        return splits

    def texts_of(self, example: VQAExample) -> tuple[str]:
        return (example.question,)

    def make_model(self, train: list[VQAExample] | None) -> tuple[HiViLTForQuestionAnswering, HiViLTProcessor]:
        """The model and its processor; if it trains, with the answers to choose from as its classes."""
        if train is None:
            model, processor = super().make_model(None)
        else:
            vocabulary = self._answers_to_choose_from(train)
            model, processor = super().make_model(train, id2label=dict(enumerate(vocabulary)))
            spell_alike(model.config, vocabulary)
            known = list(model.config.id2label.values())
            if set(known) != set(vocabulary) or (self.resumed is not None and known != vocabulary):
                logger.info(f"Of {len(vocabulary)} answers the checkpoint knows {len(set(known) & set(vocabulary))}.")
                model.resize_answer_head(vocabulary)
            kind = "multi_label" if several_answers(train) else "single_label"
            model.config.problem_type = f"{kind}_classification"
        self.label2id = {canonical_answer(answer): label for answer, label in model.config.label2id.items()}
        self.soft_labels = model.config.problem_type == "multi_label_classification"
        return model, processor

    def _answers_to_choose_from(self, train: list[VQAExample]) -> list[str]:
        """The classes: a list that is named, that of the benchmark, or the answers of the training data. Those of a checkpoint
        that training goes on from hold: the data's come in another order where rows were added or removed."""
        file = self.args.answer_file or (self.benchmark and self.benchmark.answer_file)
        if file is not None:
            vocabulary = read_answers_file(file)
        else:
            vocabulary = self._most_frequent(train, self.args.min_answer_count, self.args.max_answers)
        if self.resumed is None:
            return vocabulary
        own = list(HiViLTConfig.from_pretrained(self.resumed).id2label.values())
        known, wanted = ({canonical_answer(answer) for answer in answers} for answers in (own, vocabulary))
        begin = f"begin anew from its weights with --model_name_or_path {self.resumed} and another --output_dir"
        if new := [answer for answer in vocabulary if canonical_answer(answer) not in known]:
            raise ValueError(
                f"resume_from_checkpoint: {self.resumed} does not know {len(new):,} of this run's {len(vocabulary):,} answers: "
                f"{', '.join(map(repr, new[:5]))}. Leave out their rows (--min_answer_count, --max_answers), or {begin}."
            )
        lost = [answer for answer in own if canonical_answer(answer) not in wanted]
        if lost and file is not None:
            raise ValueError(
                f"answer_file: the checkpoint to resume, {self.resumed}, chooses from {len(lost):,} answers that are not in "
                f"{file}: {', '.join(map(repr, lost[:5]))}. Name the file it was trained with, or {begin}."
            )
        return own

    def _most_frequent(self, train: list[VQAExample], min_count: int, max_size: int | None) -> list[str]:
        # One's own answers as they are written; a benchmark's as its official recipe writes them.
        normalize = self.benchmark is not None and several_answers(train)
        return build_answer_vocabulary([example.answers for example in train], min_count, max_size, normalize)

    def make_dataset(self, split: str, examples: list[VQAExample]) -> tuple[VQADataset, dict[str, Any]]:
        answers = [example.answers for example in examples]
        facts = {
            "images": len({example.image_id for example in examples}),
            "questions": len(examples),
            "answer_coverage": answer_coverage(answers, self.label2id) if any(answers) else None,
        }
        if several_answers(examples):
            facts["answer_ceiling"] = answer_ceiling(answers, self.label2id)
        logger.info(
            f"{split}: {facts['questions']:,} questions about {facts['images']:,} images; "
            f"{describe_coverage(facts, split)} ({len(self.label2id):,} answers)"
        )
        if split != "train":
            warn_of_few(split, sum(map(bool, answers)), "questions with a known answer")
            return VQADataset(examples), facts
        # A checkpoint that is calibrated reads what it was trained on, and does not train.
        if self.training_args.do_train:
            known = drop_unknown_answers(examples, self.label2id)
            if not known:
                raise ValueError(
                    f"answer_file: none of the {len(examples):,} training questions has an answer among the "
                    f"{len(self.label2id):,} to choose from, the first being {next(iter(self.label2id))!r}; name the right file."
                )
            facts["dropped_questions"] = dropped = len(examples) - len(known)
            if dropped:
                logger.info(f"train: dropped {dropped:,} questions with no answer among them")
            examples = known
        return VQADataset(examples, seed=self.training_args.draw_seed), facts

    def collator(self, processor: HiViLTProcessor, augmentation: Augmentation | None) -> VQACollator:
        return VQACollator(processor, self.label2id, self.soft_labels, augmentation)

    def trainer_arguments(self) -> dict[str, Any]:
        names = ("watched_answer", "official_metrics")
        return {name: self.benchmark and getattr(self.benchmark, name) for name in names}

    def measure_more(
        self, trainer: QuestionAnsweringTrainer, metrics: dict[str, dict[str, Any]], datasets: Mapping[str, VQADataset]
    ) -> None:
        """The headline numbers with the same gray in place of every image, where the flags ask for it."""
        prefixes = {"validation": "eval", "test": "test"} if self.args.blank_images else {}
        for split in [split for split in prefixes if split in metrics]:
            with TemporaryDirectory() as folder:
                gray = Path(folder) / "gray.png"
                Image.new("RGB", (256, 256), GRAY).save(gray)
                blank = VQADataset([one._replace(image=str(gray)) for one in datasets[split].examples])
                measured = trainer.predict(blank, metric_key_prefix="blank").metrics
            measured = {name.removeprefix("blank_"): value for name, value in measured.items()}
            for name in headline_numbers(measured, self.metric):
                metrics[split][f"{prefixes[split]}_{name}_of_blank_images"] = measured[name]

    def write(self, folder: Path, dataset: VQADataset, predictions: list[list[dict]]) -> None:
        write_rows(folder / "predictions.jsonl", map(prediction_row, dataset.examples, predictions))
        # Images from all over the split, of each another question.
        groups = [dataset.groups[place] for place in spread(len(dataset.groups), 12)]
        shown = [group[number % len(group)] for number, group in enumerate(groups)]
        cells = [AnsweredQuestion(*drawn(dataset.examples[place], predictions[place])) for place in shown]
        plot_predictions(cells, folder / "predictions.png")
        if self.benchmark is not None and self.benchmark.submissions is not None:
            for name, rows in self.benchmark.submissions(predictions, dataset.examples).items():
                (folder / name).write_text(json.dumps(rows, allow_nan=False) + "\n", encoding="utf-8")
                server = f"the server of {self.benchmark.title}; it wants all of its split"
                logger.info(f"{name}: {len(rows):,} answers for {server}")

    def facts(self) -> dict[str, Any]:
        return {"num_answers": len(self.label2id)} if self.label2id else {}

    def compare(
        self, trainer: QuestionAnsweringTrainer, results: dict[str, Any], datasets: Mapping[str, VQADataset]
    ) -> tuple[str, float, float, int] | None:
        """Beside the training questions' most frequent answer, given to every question."""
        train = datasets["train"].examples
        (answer,) = self._most_frequent(train, 1, 1)
        for split in [split for split in ("validation", "test") if self.metric in results.get(split, {})]:
            measured, always = results[split], trainer.metrics_of_answer(answer, datasets[split])
            for name in dict.fromkeys([self.metric, "accuracy"]):
                if name in always and name in measured:
                    measured[f"{name}_of_majority_answer"] = always[name]
            measured["majority_answer"] = answer
        validation = results.get("validation", {})
        if (chance := validation.get(f"{self.metric}_of_majority_answer")) is None:
            return None
        return self.metric.replace("_", " "), validation[self.metric], chance, validation["num_questions"]

    def summary(self, results: Mapping[str, Any], split: str) -> str:
        return summary_of(results, split, self.metric) if self.metric in results[split] else ""

    def card(self, trainer: QuestionAnsweringTrainer, results: Mapping, splits: Mapping[str, list[VQAExample]]) -> dict:
        measured = {**results.get("test", {}), **results.get("validation", {})}
        return {
            "metrics": {name: name.replace("_", " ") for name in headline_numbers(measured, self.metric)},
            "metric_ids": [self.metric],
            "image": "![Questions and answers](predictions.png)",
            "num_answers": f"{len(self.label2id):,}",
            "question": python_literal(splits["validation"][0].question),
            "multi_label": self.soft_labels,
        }

    def try_next(self, folder: Path) -> str:
        return f"python app.py --model {folder}"


def ask(args: VQAArguments, training_args: HiViLTTrainingArguments) -> list[list[ImageAnswer]]:
    """Encodes the images of a folder, or asks those encoded before; gives the answers to each question about all of them."""
    index = open_index(args, training_args, HiViLTForQuestionAnswering)
    if index is None or args.ask is None:
        return []
    given = index.ask(args.ask, answer=args.answer, progress=not training_args.disable_tqdm)
    rows = []
    for question, answers in zip(args.ask, given, strict=True):
        if len(given) > 1:
            print(question)
        width = max(len(one.answer) for one in answers[: args.top_k])
        for rank, one in enumerate(answers[: args.top_k], 1):
            print(f"{rank:3}  {one.score:7.4f}  {one.answer:{width}}  {one.path}")
        rows += [{"question": question, **one._asdict(), "path": str(one.path)} for one in answers]
    folder = Path(training_args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "answers.jsonl", rows)
    print(f"Wrote all {len(rows):,} answers to {folder / 'answers.jsonl'}")
    return given


def several_answers(examples: list[VQAExample]) -> bool:
    """Whether questions have several answers each, so that labels are soft and VQA accuracy is what counts."""
    return any(len(example.answers) > 1 for example in examples)


def spell_alike(config: HiViLTConfig, vocabulary: list[str]) -> None:
    """Gives the classes of a checkpoint that the vocabulary has too the vocabulary's spelling: "USA" for "usa"."""
    spelling = {canonical_answer(answer): answer for answer in vocabulary}
    labels = {label: spelling.get(canonical_answer(answer), answer) for label, answer in config.id2label.items()}
    # Classes that differ in nothing but spelling stay as they are.
    if len(set(labels.values())) == len(labels):
        config.id2label, config.label2id = labels, {answer: label for label, answer in labels.items()}


def describe_coverage(facts: dict, split: str) -> str:
    """How many questions the answers to choose from cover, in words."""
    if facts["answer_coverage"] is None:
        return "their answers are not known"
    text = f"the answers to choose from cover {facts['answer_coverage']:.2%} of the questions"
    if "answer_ceiling" in facts:
        return f"{text}, for {facts['answer_ceiling']:.2%} VQA accuracy at most"
    return text if split == "train" else f"{text}, which no accuracy can pass"


def prediction_row(example: VQAExample, best: list[dict]) -> dict[str, Any]:
    """A question of predictions.jsonl."""
    return {
        "question_id": example.question_id,
        "image": example.image_id,
        "question": example.question,
        "answer": example.answers[0] if len(example.answers) == 1 else list(example.answers),
        "predictions": best,
        "correct": exact_match(best[0]["answer"], example.answers) if example.answers else None,
    }


def drawn(example: VQAExample, best: list[dict]) -> tuple[Image.Image, str, list[dict], str | None]:
    """A question of predictions.png, as `hivilt.evaluation.plots.AnsweredQuestion`."""
    answer = majority_answer(example.answers) if example.answers else None
    return open_image(example.image), example.question, best[:3], answer


def headline_numbers(measured: dict, metric: str) -> list[str]:
    """The metric that counts and the others beside it that are one number each, of those that were measured."""
    others = (name for name in measured if name.endswith(("accuracy", "precision", "f1")) or name.startswith("wups"))
    return [name for name in dict.fromkeys([metric, *others]) if name in measured]


def summary_of(results: dict, split: str, metric: str) -> str:
    """The number that counts, the others, and accuracy by type of question where the data tells types, as lines."""
    measured = results[split]
    lines = [f"{split} {metric.replace('_', ' ')}: {measured[metric]:.4f} on {measured['num_questions']:,} questions"]
    always = f"always {measured.get('majority_answer')!r}, the most frequent training answer"
    for name, told in {"majority_answer": always, "blank_images": "with gray in place of every image"}.items():
        if f"{metric}_of_{name}" in measured:
            lines.append(f"  {told}: {measured[f'{metric}_of_{name}']:.4f}")
    if others := headline_numbers(measured, metric)[1:]:
        lines.append("  " + ", ".join(f"{name.replace('_', ' ')} {measured[name]:.4f}" for name in others))
    for name, accuracies in measured.items():
        if isinstance(accuracies, dict):
            shown = ", ".join(f"{kind} {accuracy:.4f}" for kind, accuracy in accuracies.items())
            lines.append(f"  {name.replace('_', ' ')}: {shown}")
    return "\n".join(lines)
