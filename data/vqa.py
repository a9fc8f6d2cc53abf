"""Where question answering examples come from, and how they become batches.

Every reader, also of `hivilt.data.vqa_benchmarks`, gives a list of `VQAExample`. One item of `VQADataset` is one question, and
`VQACollator` opens the images of a batch once each. `VQADataset.by_image` puts all questions about an image into one item,
so that no image is decoded, shipped or encoded twice in a pass over the data.
"""

import logging
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch

from hivilt.data.augmentation import swap_left_and_right
from hivilt.data.cells import cell_values, clean, parse_json, read_text, scalar_text, split_lines
from hivilt.data.tables import (
    CSV_ENDINGS,
    ONLY_IMAGE,
    ONLY_IMAGE_ID,
    Collator,
    EpochDataset,
    TableImage,
    check_columns,
    check_items,
    check_spelling,
    column_names,
    open_table,
    rows_with_images,
)
from hivilt.evaluation.vqa import answer_label, canonical_answer, majority_answer, normalize_answer, soft_scores

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100

# Where the Hub's data sets have the answers of an object.
ANSWER_KEYS = ("answer", "answers", "text")


class VQAExample(NamedTuple):
    """One question about one image.

    Attributes:
        answers: what people said, with repetitions; empty: not known.
        types: kinds that the question is of, by the data set's own names: `{"answer_type": "yes/no"}`.
        group: what questions share that ask the same in other words, where the data tells.
    """

    question_id: str
    image_id: str
    image: str | TableImage
    question: str
    answers: tuple[str, ...]
    types: Mapping[str, str] = {}
    group: str | None = None

    image_ids, images = ONLY_IMAGE_ID, ONLY_IMAGE


class Columns(NamedTuple):
    """Names of the columns of a table; `image_id` and `question_id` may be absent."""

    image: str = "image"
    question: str = "question"
    answer: str = "answer"
    image_id: str | None = None
    question_id: str | None = None


DEFAULT_COLUMNS = Columns()


def read_table(
    rows: str | os.PathLike | datasets.Dataset | Sequence[Mapping[str, Any]],
    columns: Columns = DEFAULT_COLUMNS,
    source: str | None = None,
    folder: str | os.PathLike | None = None,
    answers_needed: bool = True,
) -> list[VQAExample]:
    """Examples of a JSON, JSONL, CSV or Parquet file, or of a table; see `open_table` for its name and folder,
    `rows_with_images` for its images and `read_answers` for its answers.

    `answers_needed=False` lets the answer column be absent, for questions that are only to be answered.

    Raises:
        FileNotFoundError, ValueError, TypeError: the file, a column or a value is not as expected; names which.
    """
    rows, source, folder = open_table(rows, source, folder)
    names = columns._asdict()
    present = column_names(rows, source)
    if columns.answer not in present and not answers_needed:
        logger.warning(
            f"{source} has no column {columns.answer!r}: its questions are answered, accuracy is not measured."
        )
        del names["answer"]
    check_columns(names, present, source)

    examples = []
    for index, row in enumerate(rows_with_images(rows, columns.image, columns.image_id, source, folder)):
        question_id = index if columns.question_id is None else row.values.get(columns.question_id)
        question_id = scalar_text(question_id, f"{row.where}, column {columns.question_id!r}")
        if not question_id:
            raise ValueError(f"{row.where}: the question's id in column {columns.question_id!r} is empty; write one.")
        question = read_question(row.values.get(columns.question), columns.question, row.where)
        if "answer" in names:
            check_spelling(row, columns.answer, names.values())
        answers = tuple(filter(None, read_answers(row.values.get(columns.answer), columns.answer, row.where)))
        examples.append(VQAExample(question_id, row.image_id, row.image, question, answers))
    return examples


def read_question(value: Any, column: str, where: str) -> str:
    """A question as a row has it, without blanks around it; one that is no text, or empty, is refused."""
    question = scalar_text(value, f"{where}: column {column!r}", "a question as text", numbers=False)
    if not question:
        raise ValueError(f"{where}: the question in column {column!r} is empty; write one or drop the row.")
    return question


def read_answers(value: Any, column: str, where: str) -> tuple[str, ...]:
    """The answers of a cell: text, a number or a truth value, a list of these, or objects with a key "answer", "answers" or
    "text", as the Hub's data sets have them. One that is not known, such as NaN, is an empty text.

    Raises:
        CellError, ValueError: it is anything else; names `column` and `where`.
    """
    where = f"{where}: column {column!r}"
    expected = "an answer as text or a list of them, or objects with a key 'answer', 'answers' or 'text'"
    return tuple(scalar_text(answer, where, expected) for answer in cell_values(value, where, ANSWER_KEYS))


def build_answer_vocabulary(
    answers: Iterable[Sequence[str]], min_count: int = 1, max_size: int | None = None, normalize: bool = False
) -> list[str]:
    """The classes of a question answering head: the most frequent answers first, ties in alphabetical order.

    Answers that differ only in case or spaces are one class. It is spelled as most of them are, or as the first of those.

    Args:
        answers: for each training question what people said; the answer most of them gave is counted.
        min_count: leave out answers that fewer questions have (VQAv2's 3,129 classes use 9).
        max_size: keep at most this many; `None` keeps all.
        normalize: one class is what VQA accuracy takes for one (`normalize_answer`: "two dogs" and "2 dogs"), written so
            but for capitals; default: what `canonical_answer` does.

    Returns:
        Distinct answers; the index is the label. No answer at all is a `ValueError`.
    """
    write = normalize_answer if normalize else canonical_answer
    counts, spellings = Counter(), {}
    for said in answers:
        if len(said) > 0:
            counts[write(majority_answer(said))] += 1
        for answer in said:
            spellings.setdefault(canonical_answer(answer), Counter())[" ".join(answer.split())] += 1
    vocabulary = [a for a, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= min_count]
    if not vocabulary:
        raise ValueError(
            f"The answer vocabulary is empty: none of {len(counts)} distinct training answers occurs min_count="
            f"{min_count} times. Lower it, or check the answer column."
        )
    return [spellings[a].most_common(1)[0][0] if a in spellings else a for a in vocabulary[:max_size]]


def drop_unknown_answers(examples: Sequence[VQAExample], label2id: Mapping[str, int]) -> list[VQAExample]:
    """The examples with at least one answer in the vocabulary, however it is spelled: only these can be trained on."""
    label2id = labels_by_answer(label2id)
    return [e for e in examples if any(answer_label(answer, label2id) is not None for answer in e.answers)]


def labels_by_answer(label2id: Mapping[str, int]) -> dict[str, int]:
    """A vocabulary, answers in any spelling and their labels, as `answer_label` looks answers up: written as
    `canonical_answer` does.

    Raises:
        ValueError: it is empty or the other way round, or two of its answers differ in their spelling alone.
    """
    pairs = label2id.items() if isinstance(label2id, Mapping) else ()
    if not pairs or not all(isinstance(a, str) and isinstance(label, int) and label >= 0 for a, label in pairs):
        raise ValueError(
            "label2id: expected a dict of answers and their labels, as `model.config.label2id` is ({'yes': 0, 'no': 1}), "
            f"got {reprlib.repr(label2id)}."
        )
    labels: dict[str, int] = {}
    for answer, label in pairs:
        if labels.setdefault(canonical_answer(answer), label) != label:
            raise ValueError(f"label2id: {answer!r} is there in another spelling too, with another label; keep one.")
    return labels


def read_answers_file(path: str | os.PathLike) -> list[str]:
    """A list of answers to choose from: a text file with one a line, or a JSON list.

    An empty line is an answer, as one of VQAv2's 3,129 is; empty lines at the end are not.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no answer, one stands there twice but for case and spaces, or it is another kind of file.
    """
    path = Path(path)
    what = f"answer_file: {path.name}"
    if not path.is_file():
        raise FileNotFoundError(f"answer_file: {path} is not a file; give a text file with one answer a line.")
    if path.suffix.lower() in (*CSV_ENDINGS, ".jsonl", ".ndjson", ".parquet"):
        raise ValueError(f"{what} is a table; give a text file with one answer a line, or a JSON list.")
    text = read_text(path, what)
    if path.suffix.lower() == ".json" or re.match(r"\s*\[\s*\"", text):
        listed = parse_json(text, what)
        if not isinstance(listed, list) or any(isinstance(answer, (list, dict)) for answer in listed):
            raise ValueError(f'{what} holds no list of texts; write one: ["yes", "no"], or one answer a line.')
        answers = [scalar_text(answer, what) for answer in listed]
    else:
        answers = [clean(line) for line in split_lines(text.rstrip())]
    if not any(answers):
        raise ValueError(f"{what} holds no answer; write one a line.")
    places: dict[str, int] = {}
    for place, answer in enumerate(map(canonical_answer, answers), 1):
        if (first := places.setdefault(answer, place)) != place:
            raise ValueError(
                f"{what} has {answer!r} more than once (answers {first} and {place}); every answer is one class."
            )
    return answers


class VQADataset(EpochDataset):
    """One item is one question: a dict of `image`, `examples` (the question, alone in a list), `question_index` (its place in
    the split, alone in a list) and `augmentation_draw`. With a seed it is a training split, see `EpochDataset`. No question
    at all is a `ValueError`.

    Attributes:
        texts: the questions, in order.
        groups: for each image the places of its questions, images in the order of their first ones.
    """

    def __init__(self, examples: Sequence[VQAExample], seed: int | None = None):
        super().__init__(examples, seed)
        self.texts = [example.question for example in self.examples]
        groups: dict[str, list[int]] = {}
        for index, example in enumerate(self.examples):
            groups.setdefault(example.image_id, []).append(index)
        self.groups = list(groups.values())

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Counted from the front: question_index is a place in the split.
        return self.questions([range(len(self))[index]])

    def questions(self, places: Sequence[int]) -> dict[str, Any]:
        """An item of some questions about one image."""
        examples = [self.examples[place] for place in places]
        item = {"image": examples[0].image, "examples": examples, "question_index": list(places)}
        return item | self.augmentation_draw(examples[0].image_id)

    def by_image(self) -> "VQAImages":
        """The same split with one item an image, as `QuestionAnsweringTrainer` takes it in batches."""
        return VQAImages(self)


class VQAImages(EpochDataset):
    """A `VQADataset`, one item of which is an image with all its questions. Both are always in the same epoch.

    A loop that counts items, as Trainer's own does, must not count these for questions.
    """

    def __init__(self, dataset: VQADataset):
        super().__init__(dataset.examples, dataset.seed)
        self._epoch, self.dataset = dataset._epoch, dataset

    def __len__(self) -> int:
        return len(self.dataset.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset.questions(self.dataset.groups[index])


class VQACollator(Collator):
    """Makes a batch of questions, in their order, and of their images, once each; see `Collator` for the other arguments.

    Where an image is mirrored, left and right are exchanged before labels are looked up.

    Args:
        label2id: the answer vocabulary, `model.config.label2id`; see `labels_by_answer`, also for errors.
        soft_labels: `True` gives each answer the VQA accuracy it would earn, for questions with several answers.

    Returns:
        What `Collator.pair` gives of `B_i` images and `B_t` questions, with `question_index` (B_t,) long (the place in
        `VQADataset.examples`), and `labels`: (B_t,) long with -100 for an answer outside the vocabulary, or
        (B_t, num_labels) float, all zero for one. Of a split to evaluate on, `labels` are left out where no question of
        the batch has an answer.
    """

    def __init__(self, processor, label2id: Mapping[str, int], soft_labels: bool = False, *args, **kwargs):
        super().__init__(processor, *args, **kwargs)
        self.label2id = labels_by_answer(label2id)
        self.soft_labels = soft_labels

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        check_items(items, "examples", "VQACollator", "VQADataset")
        examples = [example for item in items for example in item["examples"]]
        item_of_image: dict[str, Mapping[str, Any]] = {}
        for item in items:
            item_of_image.setdefault(item["examples"][0].image_id, item)
        number = {image_id: place for place, image_id in enumerate(item_of_image)}
        image_index = [number[example.image_id] for example in examples]
        said: list[list[str]] = [[] for _ in number]
        for place, example in zip(image_index, examples, strict=True):
            said[place] += (example.question, *example.answers)

        images, frames = self.images(list(item_of_image.values()), said)
        examples = [_mirror(e) if frames[place].mirrored else e for place, e in zip(image_index, examples, strict=True)]
        batch = self.pair([example.question for example in examples], images, image_index)
        batch["question_index"] = torch.tensor([index for item in items for index in item["question_index"]])
        if any(example.answers for example in examples) or any("draw" in item for item in items):
            batch |= self.labels(examples)
        return batch

    def labels(self, examples: Sequence[VQAExample]) -> dict[str, torch.Tensor]:
        """What a batch of these questions holds beside them."""
        if not self.soft_labels:
            labels = [answer_label(majority_answer(e.answers), self.label2id) if e.answers else None for e in examples]
            return {"labels": torch.tensor([IGNORED_LABEL if label is None else label for label in labels])}
        scores = torch.zeros(len(examples), max(self.label2id.values()) + 1)
        for row, example in enumerate(examples):
            for label, score in soft_scores(example.answers, self.label2id).items():
                scores[row, label] = score
        return {"labels": scores}


class WrittenAnswersCollator(VQACollator):
    """As `VQACollator`, for a model that writes answers: in place of `labels` of a vocabulary what `Collator.targets` gives of
    all answers of each question, so that what more people said weighs more."""

    def __init__(self, processor, **kwargs):
        super(VQACollator, self).__init__(processor, **kwargs)

    def labels(self, examples: Sequence[VQAExample]) -> dict[str, torch.Tensor]:
        return self.targets([example.answers for example in examples])


def _mirror(example: VQAExample) -> VQAExample:
    answers = tuple(map(swap_left_and_right, example.answers))
    return example._replace(question=swap_left_and_right(example.question), answers=answers)
