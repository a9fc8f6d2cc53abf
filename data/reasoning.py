"""Where statements about images come from, and how they become batches.

Every reader, also of `hivilt.data.reasoning_benchmarks`, gives a list of `Statement`: a sentence about some images, mostly two, of
which it is true or not. Statements that share images are one item of a `ReasoningDataset`, as far as that goes, and
`ReasoningCollator` opens the images of a batch once each, however many statements they are in.
"""

import logging
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import torch

from hivilt.data.augmentation import says_left_or_right, swap_left_and_right
from hivilt.data.cells import scalar_text
from hivilt.data.tables import (
    Collator,
    EpochDataset,
    TableImage,
    check_columns,
    check_items,
    check_spelling,
    column_names,
    linked,
    open_table,
    rows_with_images,
)
from hivilt.evaluation.reasoning import TRUTH_VALUES, are_truth_values, plain_label

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100

# What one item of a data set holds of statements that are linked by their images.
MOST_IMAGES, MOST_STATEMENTS = 16, 64

# How a sentence counts or names images without saying left or right, or tells what changed from one to the next.
_IMAGE = "(?:image|img|photo|photograph|pic|picture)s?"
_NUMBER = r"(?:\d+|one|two|three|four|five|six|ii|iii|iv)"
_NAMES_AN_IMAGE = re.compile(
    r"\b(?:before|after|removed|added|missing|(?:dis)?appeared|moved|changed|no\s+longer"
    r"|first|second|third|fourth|fifth|sixth|last|former|latter|\d+(?:st|nd|rd|th)"
    rf"|(?:next|previous|preceding|following|subsequent|earlier|later|initial|final|primary|secondary)\s+(?:{_IMAGE}|one)"
    rf"|{_IMAGE}[^\w.,;!?]*_?(?:(?:no\b\.?|number)[^\w.,;!?]*)?(?:{_NUMBER}|(?<![a-z])[a-f]|(?-i:[A-F]))"
    rf"|(?:no\.|number)\s*{_NUMBER}"
    # A letter by itself; "A" also begins sentences.
    r"|(?-i:[B-F]|A(?!\s+\w)|(?<=[a-z] )A|A(?=\s+(?:is|has|shows|contains|depicts|and|or)\b)))\b",
    re.IGNORECASE,
)


class Statement(NamedTuple):
    """A sentence about images, in their order.

    Attributes:
        label: as it is written, "True" or "entailment"; `None`: not known.
        kind: by which metrics are told apart, where the data tells.
        group: what statements share that are right or wrong as one, as consistency counts them.
        stage: 0 if it is learned in the first epochs alone, 1 if in those after them alone; `None`: in all. See
            `ReasoningDataset`.
    """

    statement_id: str
    images: tuple[str | TableImage, ...]
    image_ids: tuple[str, ...]
    sentence: str
    label: str | None = None
    kind: str | None = None
    group: str | None = None
    stage: int | None = None


class StatementColumns(NamedTuple):
    """Names of the columns of a table. `images`: one that holds lists, or several with commas between, an image each;
    `statement_id` may be absent."""

    images: str = "images"
    sentence: str = "sentence"
    label: str = "label"
    statement_id: str | None = None


DEFAULT_COLUMNS = StatementColumns()


def read_statements(
    rows: str | os.PathLike | datasets.Dataset | Sequence[Mapping[str, Any]],
    columns: StatementColumns = DEFAULT_COLUMNS,
    source: str | None = None,
    folder: str | os.PathLike | None = None,
    labels_needed: bool = True,
    num_images: int | None = None,
) -> list[Statement]:
    """Statements of a JSON, JSONL, CSV or Parquet file, or of a table, one a row; see `open_table` for its name and folder,
    and `rows_with_images` for its images.

    Args:
        labels_needed: `False` lets labels be not known, and their column absent, for statements that are only to be judged.
        num_images: of each row; default: as many as the first has.

    Raises:
        FileNotFoundError, ValueError, TypeError: the file, a column or a value is not as expected, or a row has another number
            of images; names which.
    """
    rows, source, folder = open_table(rows, source, folder)
    present = column_names(rows, source)
    listed = [columns.images] if columns.images in present else [name.strip() for name in columns.images.split(",")]
    names = {"sentence": columns.sentence, "label": columns.label, "statement_id": columns.statement_id}
    if columns.label not in present and not labels_needed:
        logger.warning(
            f"{source} has no column {columns.label!r}: its statements are judged, accuracy is not measured."
        )
        del names["label"]
    for name in listed:
        check_columns({"images": name}, present, source)
    check_columns(names, present, source)

    statements = []
    expected, by = num_images, f"num_images is {num_images}"
    for index, row in enumerate(rows_with_images(rows, listed, None, source, folder)):
        if expected is None:
            expected, by = len(row.images), f"{row.where}, has {len(row.images)}"
        if len(row.images) != expected:
            raise ValueError(f"{row.where}: has {len(row.images)} images in {', '.join(map(repr, listed))}, but {by}.")
        statement_id = index if columns.statement_id is None else row.values.get(columns.statement_id)
        statement_id = scalar_text(statement_id, f"{row.where}: column {columns.statement_id!r}")
        if not statement_id:
            raise ValueError(f"{row.where}: the statement's id in column {columns.statement_id!r} is empty; write one.")
        sentence = read_sentence(row.values.get(columns.sentence), columns.sentence, row.where)
        if "label" in names:
            check_spelling(row, columns.label, [*listed, *filter(None, names.values())])
        label = read_label(row.values.get(columns.label), columns.label, row.where)
        if label is None and labels_needed:
            raise ValueError(
                f"{row.where}: the label in column {columns.label!r} is empty or missing; write true or false, or another word, "
                "or drop the row."
            )
        statements.append(Statement(statement_id, row.images, row.image_ids, sentence, label))
    return statements


def read_sentence(value: Any, column: str, where: str) -> str:
    """A sentence as a row has it, without blanks around it; one that is no text, or empty, is refused."""
    sentence = scalar_text(value, f"{where}: column {column!r}", "a sentence as text", numbers=False)
    if not sentence:
        raise ValueError(f"{where}: the sentence in column {column!r} is empty; write one or drop the row.")
    return sentence


def read_label(value: Any, column: str, where: str) -> str | None:
    """The label of a cell: text, a truth value or a number, as it is written; `None`: not known. Anything else is refused."""
    return scalar_text(value, f"{where}: column {column!r}", "a label as text, or true or false") or None


def label_words(statements: Iterable[Statement]) -> list[str]:
    """The classes of a head that learns from these: "False" and "True" where all labels are truth values, in any spelling, else
    the labels in alphabetical order. Those that differ only in case or spaces are one, spelled as most of them are.

    Returns:
        Distinct words; the index is the label. Fewer than two labels to learn from are a `ValueError`.
    """
    spellings: dict[str, Counter[str]] = {}
    for statement in statements:
        if statement.label is not None:
            spelled = " ".join(statement.label.split())
            spellings.setdefault(plain_label(statement.label), Counter())[spelled] += 1
    are_true_or_false = are_truth_values(spellings)
    distinct = {TRUTH_VALUES[label] for label in spellings} if are_true_or_false else spellings.keys()
    if len(distinct) < 2:
        there = f"all are {next(iter(spellings))!r}" if spellings else "there is none"
        raise ValueError(f"label: expected statements with different labels to learn from, but {there}.")
    if are_true_or_false:
        return ["False", "True"]
    return [spellings[label].most_common(1)[0][0] for label in sorted(spellings)]


def labels_by_spelling(label2id: Mapping[str, int]) -> dict[str, int]:
    """The label of every spelling, as `plain_label` writes it: of truth values all spellings, else that of each word.

    Raises:
        ValueError: `label2id` is empty or the other way round, or two of its words differ in their spelling alone.
    """
    pairs = label2id.items() if isinstance(label2id, Mapping) else ()
    if not pairs or not all(isinstance(word, str) and isinstance(label, int) and label >= 0 for word, label in pairs):
        raise ValueError(
            "label2id: expected a dict of words and their labels, as `model.config.label2id` is ({'False': 0, 'True': 1}), "
            f"got {label2id!r}."
        )
    labels: dict[Any, int] = {}
    are_true_or_false = are_truth_values(map(plain_label, label2id))
    for word, label in pairs:
        key = TRUTH_VALUES[plain_label(word)] if are_true_or_false else plain_label(word)
        if labels.setdefault(key, label) != label:
            raise ValueError(f"label2id: {word!r} is there in another spelling too, with another label; keep one.")
    if are_true_or_false:
        return {spelling: labels[value] for spelling, value in TRUTH_VALUES.items() if value in labels}
    return labels


def label_ids(statements: Iterable[Statement], label2id: Mapping[str, int], source: str = "the data") -> list[int]:
    """The label of each statement of a split, called `source` in messages, in any spelling; -100 for one that is not known.

    Raises:
        ValueError: `label2id` is none, see `labels_by_spelling`, or a statement has another label; names the first.
    """
    statements, known, labels = list(statements), labels_by_spelling(label2id), []
    words = {plain_label(one.label) for one in statements if one.label is not None}
    if words <= TRUTH_VALUES.keys() and not are_truth_values(words):
        known = {plain_label(word): label for word, label in label2id.items()}  # the N of T, F and N is no "no"
    for statement in statements:
        label = IGNORED_LABEL if statement.label is None else known.get(plain_label(statement.label))
        if label is None:
            raise ValueError(
                f"{source}: statement {statement.statement_id!r} has the label {statement.label!r}, but the model knows "
                f"{', '.join(map(repr, known))}; write one of these, or give statements with that label to train on."
            )
        labels.append(label)
    return labels


class ReasoningDataset(EpochDataset):
    """One item is some statements that share images, with these: a dict of `images` (by id what `Collator.images` takes of
    each), `statements`, and `statement_index` (the places of these in the split). With a seed it is a training split, see
    `EpochDataset`, and an item has a `draw` of its own. It is evaluated on by `ReasoningTrainer`; a plain `Trainer` may train, and
    is refused by the model else, as it would keep as many statements of the last batch as that has items.

    Statements that are linked by their images, directly or through others, are one item as long as these are no more than
    `MOST_IMAGES` and they no more than `MOST_STATEMENTS`; all statements about the same images are in one item.

    Args:
        first_epochs: so many epochs leave out the statements of stage 1, and those after them the statements of stage 0: a
            curriculum (Bengio et al. 2009). An item of one stage has all of its statements.

    Attributes:
        texts: the sentences, in order.
        groups: for each item the places of its statements, items in the order of their first ones.
        num_images: of each statement.

    Raises:
        ValueError: there is no statement, they have different numbers of images, or in training one has no label.
    """

    def __init__(self, examples: Sequence[Statement], seed: int | None = None, first_epochs: int = 0):
        super().__init__(examples, seed)
        self.first_epochs = first_epochs
        self.texts = [statement.sentence for statement in self.examples]
        self.num_images = len(self.examples[0].images)
        about: dict[tuple[str, ...], list[int]] = {}
        for place, statement in enumerate(self.examples):
            if len(statement.images) != self.num_images or len(statement.image_ids) != self.num_images:
                raise ValueError(
                    f"examples: statement {statement.statement_id!r} has {len(statement.images)} images and "
                    f"{len(statement.image_ids)} ids of them, the first statement {self.num_images}; give all of them as many."
                )
            if seed is not None and statement.label is None:
                raise ValueError(
                    f"examples: statement {statement.statement_id!r} has no label, so nothing is learned from it."
                )
            about.setdefault(statement.image_ids, []).append(place)

        first_of = linked(about)
        self.groups: list[list[int]] = []
        filled: dict[
            str, tuple[set[str], list[int]]
        ] = {}  # by linked images those of the item that takes more, and its places
        for image_ids, places in about.items():
            images, group = filled.get(first_of[image_ids[0]], (set(), []))
            if not group or len(images.union(image_ids)) > MOST_IMAGES or len(group) + len(places) > MOST_STATEMENTS:
                images, group = filled[first_of[image_ids[0]]] = (set(), [])
                self.groups.append(group)
            images.update(image_ids)
            group += places

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        places = self.groups[index]
        if self.first_epochs:
            left_out = int(self.epoch < self.first_epochs)
            places = [place for place in places if self.examples[place].stage != left_out] or places
        statements = [self.examples[place] for place in places]
        images: dict[str, str | TableImage] = {}
        for statement in statements:
            images |= zip(statement.image_ids, statement.images, strict=True)
        return {
            "images": {name: {"image": image} | self.augmentation_draw(name) for name, image in images.items()},
            "statements": statements,
            "statement_index": list(places),
            **self.augmentation_draw(""),
        }


class ReasoningCollator(Collator):
    """Makes a batch of statements and of their images, once each; see `Collator` for the other arguments.

    Images of a statement are mirrored together or not at all, as their order and its words say which is on the left: side by
    side they are one scene. Mirrored, what was on the left of it is on the right, within each image and among them. So where
    a sentence says left or right, all three turn: the pixels of each image, the order of the images, and the words. Where it
    does not, the order stays, which "the first image" may ask for. A sentence that says both is left alone, as nothing tells
    which of them counts images. Each image has a crop of its own. One that is mirrored for one statement and not for another is
    there twice.

    Args:
        label2id: the classes, `model.config.label2id`; labels are looked up in any spelling, see `labels_by_spelling`.

    Returns:
        `input_ids` and `attention_mask` (B_t, N_t) long, `pixel_values` (B_i, 3, H, W) float or from the cache `feature_maps`,
        `image_index` (B_t, n) long, the rows of the n images of each statement in order, `statement_index` (B_t,) long, the
        place in `ReasoningDataset.texts`; and, unless no label of the batch is known, `labels` (B_t,) long, -100 for one that is
        not.

    Raises:
        ValueError: a label is none of `label2id`; see `label_ids`.
    """

    def __init__(self, processor, label2id: Mapping[str, int], *args, **kwargs):
        super().__init__(processor, *args, **kwargs)
        labels_by_spelling(label2id)  # refuses what is none
        self.label2id = dict(label2id)

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        check_items(items, "statements", "ReasoningCollator", "ReasoningDataset")
        shown: dict[tuple[str, bool], Mapping[str, Any]] = {}  # images, as they are or mirrored
        statements: list[Statement] = []
        image_keys: list[list[tuple[str, bool]]] = []
        for item in items:
            for statement in item["statements"]:
                turned = self._mirrored(statement, item.get("draw"))
                statements.append(turned or statement)
                image_keys.append([(image_id, turned is not None) for image_id in statements[-1].image_ids])
                shown |= {key: item["images"][key[0]] for key in image_keys[-1]}

        places = {key: place for place, key in enumerate(shown)}
        images, _ = self.images(list(shown.values()), [()] * len(shown), mirrored=[mirrored for _, mirrored in shown])
        image_index = [[places[key] for key in keys] for keys in image_keys]
        batch = self.pair([statement.sentence for statement in statements], images, image_index)
        batch["statement_index"] = torch.tensor([index for item in items for index in item["statement_index"]])
        labels = label_ids(statements, self.label2id)
        return batch if set(labels) == {IGNORED_LABEL} else {**batch, "labels": torch.tensor(labels)}

    def _mirrored(self, statement: Statement, draw: str | None) -> Statement | None:
        """What is said of the mirrored images, in an order that fits; `None` where these stay as they are."""
        if self.augmentation is None or draw is None:
            return None
        # The same for all statements about the same images, but for what they say.
        drawn = random.Random(f"{draw} {statement.image_ids}")
        if not self.augmentation.mirrors([statement.sentence], drawn):
            return None
        return mirrored(statement)


def mirrored(statement: Statement) -> Statement | None:
    """The statement about the same images, each of them mirrored, that has the same label; `None` where that is not certain. See
    `ReasoningCollator`."""
    if not says_left_or_right(statement.sentence):
        return statement
    if _NAMES_AN_IMAGE.search(statement.sentence):
        return None
    return statement._replace(
        images=statement.images[::-1],
        image_ids=statement.image_ids[::-1],
        sentence=swap_left_and_right(statement.sentence),
    )
