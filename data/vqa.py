"""Where question answering examples come from, and how they become batches.

| source | reader | answers a question | licence |
|---|---|---|---|
| easy-VQA, PyPI `easy-vqa` | `read_easy_vqa` | 1 | MIT |
| JSON, JSONL, CSV, Parquet | `read_file` | any | the user's |
| image folder with metadata, or a dataset on the Hub | `read_table` | any | the user's |
| VQAv2, https://visualqa.org/download.html | `convert_vqav2`, then `read_file` | 10 | CC BY 4.0 |

Every reader gives a list of `VQAExample`. `VQADataset` groups them, so that one item is one picture with all its
questions, and `VQACollator` opens the pictures of a batch once each: no picture is ever decoded, shipped or encoded
twice for the questions it carries.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import torch

from hivilt.data.tables import (
    TablePicture,
    check_columns,
    check_items,
    column_names,
    open_batch,
    read_rows,
    rows_with_pictures,
)
from hivilt.evaluation.vqa import answer_scores, canonical_answer, majority_answer

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100


class VQAExample(NamedTuple):
    """One question about one picture. `answers` holds what people said, with repetitions; empty: not known."""

    question_id: str
    image_id: str
    image: str | TablePicture
    question: str
    answers: tuple[str, ...]


class Columns(NamedTuple):
    """Names of the columns of a table; `image_id` and `question_id` may be absent."""

    image: str = "image"
    question: str = "question"
    answer: str = "answer"
    image_id: str | None = None
    question_id: str | None = None


DEFAULT_COLUMNS = Columns()

# ---------------------------------------------------------------------------------------------------------------------
# Readers
# ---------------------------------------------------------------------------------------------------------------------


def read_easy_vqa(split: Literal["train", "test"]) -> list[VQAExample]:
    """The official split of easy-VQA, from the installed package `easy-vqa` (no network).

    Raises:
        ImportError: the package is not installed.
        ValueError: `split` is unknown.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: easy-VQA has 'train' and 'test', got {split!r}.")
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("The default data needs the package easy-vqa: pip install easy-vqa") from error

    if split == "train":
        (questions, answers, image_ids), paths = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    else:
        (questions, answers, image_ids), paths = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    return [
        VQAExample(f"{split}-{number}", f"{split}/{Path(paths[image_id]).name}", paths[image_id], question, (answer,))
        for number, (question, answer, image_id) in enumerate(zip(questions, answers, image_ids, strict=True))
    ]


def read_file(
    path: str | os.PathLike, columns: Columns = DEFAULT_COLUMNS, answers_needed: bool = True
) -> list[VQAExample]:
    """Examples of a local JSON (a list of objects, alone or under "data"), JSONL, CSV or Parquet file.

    Text stays as it is written: a CSV cell "007" or "None" is an answer like any other, an empty one is not known.

    Args:
        path: the file; its ending says what it is.
        columns: names of the columns. Relative picture paths are looked up from the file's folder.
        answers_needed: `False` lets the answer column be absent, for questions that are only to be answered.

    Raises:
        FileNotFoundError, ValueError, TypeError: the file, a column or a value is not as expected; names which.
    """
    path = Path(path)
    return read_table(read_rows(path), columns, path.name, path.parent, answers_needed)


def read_table(
    rows: datasets.Dataset | Sequence[Mapping[str, Any]],
    columns: Columns = DEFAULT_COLUMNS,
    source: str = "the table",
    folder: str | os.PathLike = ".",
    answers_needed: bool = True,
) -> list[VQAExample]:
    """Examples of a `datasets.Dataset`, or of a list of dicts.

    Rows about the same picture are found by `columns.image_id` if named, else by the picture's path, else by its bytes.

    Args:
        rows: a picture is a path, or what `datasets.Image` stores. An answer is text or a number, a list of these, or
            a list of dicts with a key "answer" (VQAv2); `None` or an empty text: not known.
        columns: names of the columns.
        source: what to call the table in error messages.
        folder: where relative picture paths start.
        answers_needed: `False` lets the answer column be absent.

    Raises:
        ValueError, TypeError: a column or a value is not as expected; names which.
    """
    names = columns._asdict()
    present = column_names(rows, source)
    if columns.answer not in present and not answers_needed:
        logger.warning(
            f"{source} has no column {columns.answer!r}: its questions are answered, accuracy is not measured."
        )
        del names["answer"]
    check_columns(names, present, source)

    examples = []
    for index, row in enumerate(rows_with_pictures(rows, columns.image, columns.image_id, source, folder)):
        question_id = index if columns.question_id is None else row.values[columns.question_id]
        question = _read_question(row.values[columns.question], columns.question, row.where)
        answers = _read_answers(row.values.get(columns.answer), columns.answer, row.where)
        examples.append(VQAExample(str(question_id), row.image_id, row.image, question, answers))
    return examples


def convert_vqav2(
    questions_file: str | os.PathLike,
    annotations_file: str | os.PathLike | None,
    image_pattern: str,
    output_file: str | os.PathLike,
) -> int:
    """Joins the official VQAv2 question and annotation files into a JSONL file for `--train_file`.

        convert_vqav2("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json",
                      "val2014/COCO_val2014_{:012d}.jpg", "val.jsonl")

    Args:
        questions_file: the `v2_OpenEnded_mscoco_*_questions.json` file.
        annotations_file: the `v2_mscoco_*_annotations.json` file; `None` for a test split, whose answers are hidden.
        image_pattern: path of a picture given its `image_id`, as `str.format` takes it, from the output file's folder.
        output_file: the JSONL file to write: image, image_id, question_id, question, answer (a list of ten).

    Returns:
        The number of questions written.

    Raises:
        ValueError: a question has no annotation.
    """
    questions = json.loads(Path(questions_file).read_text(encoding="utf-8"))["questions"]
    answers = {}
    if annotations_file is not None:
        annotations = json.loads(Path(annotations_file).read_text(encoding="utf-8"))["annotations"]
        answers = {one["question_id"]: [said["answer"] for said in one["answers"]] for one in annotations}
        unanswered = [one["question_id"] for one in questions if one["question_id"] not in answers]
        if unanswered:
            raise ValueError(
                f"{annotations_file}: {len(unanswered)} of {len(questions)} questions have no annotation, question_id "
                f"{unanswered[0]} first; are both files of the same split?"
            )
    with Path(output_file).open("w", encoding="utf-8") as file:
        for one in questions:
            row = {
                "image": image_pattern.format(one["image_id"]),
                "image_id": one["image_id"],
                "question_id": one["question_id"],
                "question": one["question"],
                "answer": answers.get(one["question_id"], []),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return len(questions)


def _read_question(value: Any, column: str, where: str) -> str:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{where}: column {column!r} should hold a question as text, got {type(value).__name__}.")
    if value is None or not value.strip():
        raise ValueError(f"{where}: the question in column {column!r} is empty; write one or drop the row.")
    return value.strip()


def _read_answers(value: Any, column: str, where: str) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        value = value.get("answer")
    if isinstance(value, (list, tuple)):
        return tuple(answer for one in value for answer in _read_answers(one, column, where))
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise TypeError(
            f"{where}: column {column!r} should hold an answer as text or a list of them, got {type(value).__name__} "
            f"{value!r}."
        )
    text = "" if value is None else str(value).strip()
    return (text,) if text else ()


# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------


def build_answer_vocabulary(
    answers: Iterable[Sequence[str]], min_count: int = 1, max_size: int | None = None
) -> list[str]:
    """The classes of a question answering head: the most frequent answers first, ties in alphabetical order.

    Args:
        answers: for each training question what people said; the answer most of them gave is counted.
        min_count: leave out answers that fewer questions have (VQAv2's 3,129 classes use 9).
        max_size: keep at most this many; `None` keeps all.

    Returns:
        Distinct answers, as `hivilt.evaluation.vqa.canonical_answer` writes them; the index is the label.

    Raises:
        ValueError: no answer is left.
    """
    counts = Counter(majority_answer(said) for said in answers if len(said) > 0)
    vocabulary = [a for a, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= min_count]
    if not vocabulary:
        raise ValueError(
            f"The answer vocabulary is empty: none of {len(counts)} distinct training answers occurs min_count="
            f"{min_count} times. Lower it, or check the answer column."
        )
    return vocabulary[:max_size]


def drop_unknown_answers(examples: Sequence[VQAExample], label2id: Mapping[str, int]) -> list[VQAExample]:
    """The examples with at least one answer in the vocabulary: only these can be trained on."""
    return [one for one in examples if any(canonical_answer(answer) in label2id for answer in one.answers)]


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


class VQADataset(torch.utils.data.Dataset):
    """One item is one picture with all its questions: a dict of `image`, `examples` and their `question_index`.

    Args:
        examples: a split; `question_index` counts its questions in this order.

    Raises:
        ValueError: `examples` is empty.
    """

    def __init__(self, examples: Sequence[VQAExample]):
        if len(examples) == 0:
            raise ValueError("examples: a dataset needs at least one question.")
        self.examples = list(examples)
        groups: dict[str, list[int]] = {}
        for index, example in enumerate(self.examples):
            groups.setdefault(example.image_id, []).append(index)
        self.groups = list(groups.values())

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        questions = self.groups[index]
        return {
            "image": self.examples[questions[0]].image,
            "examples": [self.examples[question] for question in questions],
            "question_index": questions,
        }


class VQACollator:
    """Opens the pictures of a batch, once each, and flattens their questions.

    Pictures are decoded here, so in the worker processes of a `DataLoader`; the state pickles for spawned ones.

    Args:
        processor: a `HiViLTProcessor`.
        label2id: the answer vocabulary, written as `hivilt.evaluation.vqa.canonical_answer` does.
        soft_labels: `True` gives each answer the VQA accuracy it would earn, for questions with several answers.

    Returns:
        A batch of `B_i` pictures and `B_t` questions, the texts first (Trainer takes the batch size from there):
        `input_ids`, `attention_mask` (B_t, N_t) long, `pixel_values` (B_i, 3, H, W) float, `image_index` (B_t,) long,
        `question_index` (B_t,) long (the place in `VQADataset.examples`), and `labels`: (B_t,) long with -100 for an
        answer outside the vocabulary, or (B_t, num_labels) float, all zero for one. `labels` is left out if no answer
        of the batch is known.
    """

    def __init__(self, processor, label2id: Mapping[str, int], soft_labels: bool = False):
        self.processor = processor
        self.label2id = dict(label2id)
        self.soft_labels = soft_labels

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        check_items(items, "examples", "VQACollator", "VQADataset")
        batch = self.processor(
            images=open_batch(items),
            text=[[example.question for example in item["examples"]] for item in items],
            return_tensors="pt",
            padding=True,
        )
        examples = [example for item in items for example in item["examples"]]
        # input_ids first: Trainer counts the rows of the first tensor.
        batch = {"input_ids": batch["input_ids"], **batch}
        batch["question_index"] = torch.tensor([index for item in items for index in item["question_index"]])
        if any(example.answers for example in examples):
            batch["labels"] = self._soft(examples) if self.soft_labels else self._hard(examples)
        return batch

    def _hard(self, examples: Sequence[VQAExample]) -> torch.Tensor:
        return torch.tensor(
            [
                self.label2id.get(majority_answer(example.answers), IGNORED_LABEL) if example.answers else IGNORED_LABEL
                for example in examples
            ]
        )

    def _soft(self, examples: Sequence[VQAExample]) -> torch.Tensor:
        labels = torch.zeros(len(examples), len(self.label2id))
        for row, example in enumerate(examples):
            for answer, score in answer_scores(example.answers).items():
                if answer in self.label2id:
                    labels[row, self.label2id[answer]] = score
        return labels
