"""Statements about images: files, labels, items, and batches that hold each image once."""

import csv
import json
from collections import Counter

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers import ViTImageProcessor

from hivilt import HiViLTProcessor
from hivilt.data.augmentation import Augmentation
from hivilt.data.reasoning import (
    MOST_IMAGES,
    MOST_STATEMENTS,
    ReasoningCollator,
    ReasoningDataset,
    Statement,
    StatementColumns,
    label_ids,
    label_words,
    labels_by_spelling,
    mirrored,
    read_statements,
)
from hivilt.data.tables import check_images, hold_out, open_image
from tiny import IMAGE_SIZE, make_image, make_processor, make_tokenizer

COLORS = ("red", "blue", "green", "yellow")
TRUTH = {"False": 0, "True": 1}
ROWS = [
    {"images": ["red.png", "blue.png"], "sentence": "the red image is blue", "label": True},
    {"images": ["blue.png", "red.png"], "sentence": "there is a red circle", "label": "false"},
    {"images": ["red.png", "green.png"], "sentence": "two red images", "label": 1},
]


@pytest.fixture
def folder(tmp_path):
    for color in COLORS:
        make_image(color).save(tmp_path / f"{color}.png")
    return tmp_path


def write(folder, rows=ROWS, name="pairs.jsonl"):
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return folder / name


def made(*pairs, **more):
    """Statements about images of these names, which are no files."""
    return [
        Statement(str(n), tuple(f"{name}.png" for name in pair), tuple(pair), f"said {n}", "True", **more)
        for n, pair in enumerate(pairs)
    ]


# Files


def test_a_file_of_statements(folder):
    first, second, third = read_statements(write(folder))
    paths = tuple(str(folder / f"{color}.png") for color in ("red", "blue"))
    assert first == Statement("0", paths, ("red.png", "blue.png"), "the red image is blue", "true")
    assert (second.images, second.image_ids) == (first.images[::-1], first.image_ids[::-1])
    assert [one.label for one in (first, second, third)] == ["true", "false", "1"]
    assert check_images([first, second, third]) == ([first, second, third], [])


@pytest.mark.parametrize("kind", ["list", "csv", "csv columns", "parquet", "table", "inside", "class labels"])
def test_the_same_statements_in_other_files(folder, kind):
    usual, columns, where = read_statements(write(folder)), StatementColumns(), {}
    in_columns = [
        {"left": left, "right": right, "said": row["sentence"], "label": row["label"]}
        for row in ROWS
        for left, right in [row["images"]]
    ]
    if kind == "list":
        rows, where = ROWS, {"folder": folder}
    elif kind.startswith("csv"):
        rows = folder / "pairs.csv"
        if kind == "csv columns":
            columns = StatementColumns("left, right", "said")
        content = (
            in_columns if kind == "csv columns" else [{**row, "images": json.dumps(row["images"])} for row in ROWS]
        )
        with rows.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(content[0]))
            writer.writeheader()
            writer.writerows(content)
    else:
        content = [{**row, "label": str(row["label"])} for row in ROWS]
        if kind == "inside":
            content = [{**row, "images": [str(folder / name) for name in row["images"]]} for row in content]
        if kind == "class labels":
            content = [{**row, "label": int(row["label"] not in ("false", "False"))} for row in content]
        rows, where = datasets.Dataset.from_list(content), {"folder": folder}
        if kind == "inside":
            rows = rows.cast_column("images", datasets.List(datasets.Image()))
            rows = rows.map(lambda row: row, batched=True)  # the images, not their paths
        if kind == "class labels":
            rows = rows.cast_column("label", datasets.ClassLabel(names=["False", "True"]))
        if kind == "parquet":
            rows.to_parquet(str(folder / "pairs.parquet"))
            rows, where = folder / "pairs.parquet", {}
    read = read_statements(rows, columns, **where)
    assert [(one.statement_id, one.sentence) for one in read] == [(one.statement_id, one.sentence) for one in usual]
    assert label_ids(read, TRUTH) == label_ids(usual, TRUTH) == [1, 0, 1]
    pixels = lambda one: [open_image(image).tobytes() for image in one.images]
    assert list(map(pixels, read)) == list(map(pixels, usual))
    assert read[1].image_ids == read[0].image_ids[::-1] and read[2].image_ids[0] == read[0].image_ids[0]
    if kind != "inside":
        assert [one.image_ids for one in read] == [one.image_ids for one in usual]


@pytest.mark.parametrize("count", [1, 3])
def test_one_image_or_three(folder, count):
    rows = [{"images": [f"{color}.png" for color in COLORS[:count]], "sentence": "s", "label": "yes"}]
    (one,) = read_statements(write(folder, rows))
    assert len(one.images) == count
    if count == 1:
        (same,) = read_statements(
            write(folder, [{"image": "red.png", "sentence": "s", "label": "yes"}]), StatementColumns("image")
        )
        assert same == one


def test_ids_and_other_labels(folder):
    rows = [{**row, "label": " Not  sure ", "key": f"k{place}"} for place, row in enumerate(ROWS)]
    read = read_statements(write(folder, rows), StatementColumns(statement_id="key"))
    assert [(one.statement_id, one.label) for one in read] == [(f"k{n}", "Not  sure") for n in range(3)]


def test_labels_may_be_unknown_where_statements_are_only_judged(folder, caplog):
    rows = [{name: value for name, value in row.items() if name != "label"} for row in ROWS]
    read = read_statements(write(folder, rows), labels_needed=False)
    assert {one.label for one in read} == {None}
    assert "pairs.jsonl has no column 'label': its statements are judged" in caplog.text
    rows[0]["label"] = "true"
    assert [one.label for one in read_statements(write(folder, rows), labels_needed=False)] == ["true", None, None]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sentence": " "}, ValueError, "the sentence in column 'sentence' is empty; write one or drop the row"),
        ({"sentence": None}, ValueError, "the sentence in column 'sentence' is empty"),
        ({"sentence": 3}, TypeError, "column 'sentence' should hold a sentence as text, got int 3"),
        ({"label": None}, ValueError, "the label in column 'label' is empty or missing; write true or false"),
        ({"label": ""}, ValueError, "the label in column 'label' is empty or missing"),
        ({"label": float("nan")}, ValueError, "the label in column 'label' is empty or missing"),
        ({"label": ["true"]}, TypeError, "column 'label' should hold a label as text, or true or false, got list"),
        ({"images": ["red.png"]}, ValueError, "has 1 images in 'images', but toy, row 1, has 2"),
        ({"images": ["red.png", "blue.png", "red.png"]}, ValueError, "has 3 images in 'images', but toy, row 1, has 2"),
        ({"images": []}, ValueError, "column 'images' is an empty list"),
        ({"images": ["red.png", None]}, TypeError, "image 2 in column 'images' should hold an image or its path"),
        ({"images": "red.png"}, ValueError, "has 1 images in 'images', but toy, row 1, has 2"),
    ],
)
def test_bad_rows_are_named(folder, change, error, message):
    with pytest.raises(error, match=f"toy, row 2.*{message}"):
        read_statements([ROWS[0], ROWS[1] | change], source="toy", folder=folder)


def test_other_bad_input_is_named(folder):
    with pytest.raises(ValueError, match="toy, row 1: has 2 images in 'images', but num_images is 3"):
        read_statements(ROWS, source="toy", folder=folder, num_images=3)
    with pytest.raises(ValueError, match="images_column: toy has no column 'left'; .* --images_column"):
        read_statements(ROWS, StatementColumns("left,images"), source="toy")
    with pytest.raises(ValueError, match="sentence_column: toy has no column 'text'"):
        read_statements(ROWS, StatementColumns(sentence="text"), source="toy")
    with pytest.raises(ValueError, match="label_column: toy has no column 'Label'; .*probably 'label'"):
        read_statements(ROWS, StatementColumns(label="Label"), source="toy")
    with pytest.raises(ValueError, match="toy, row 1: the statement's id in column 'id' is empty"):
        read_statements([{**ROWS[0], "id": None}], StatementColumns(statement_id="id"), source="toy")
    with pytest.raises(ValueError, match="toy, row 2: has 'lable' where other rows have 'label'"):
        rows = [ROWS[0], {"images": ["red.png", "blue.png"], "sentence": "s", "lable": "true"}]
        read_statements(rows, source="toy", labels_needed=False)


def test_a_row_with_a_missing_image_is_left_out_whole(folder, caplog):
    (folder / "blue.png").unlink()
    (folder / "green.png").write_bytes(b"no image")
    statements = read_statements(write(folder))
    message = r"pairs: 2 of 3 images are missing or unreadable: .*blue.png, .*green.png. They are in 3 of 3 examples"
    with pytest.raises(ValueError, match=message):
        check_images(statements, source="pairs")
    more = [*statements, *read_statements([ROWS[0] | {"images": ["red.png", "yellow.png"]}], folder=folder)]
    kept, bad = check_images(more, "skip", "pairs")
    assert kept == more[3:] and bad == ["blue.png", "green.png"]
    assert "pairs: left out 2 of 4 images, and with them 3 of 4 examples, number 1, 2, 3: " in caplog.text


def test_statements_that_share_an_image_are_held_out_together():
    statements = made("ab", "bc", "de", "ca", "fg", "gh", "ij")
    for seed in range(10):
        train, held_out = hold_out(statements, seed=seed)
        names = [{image for one in part for image in one.image_ids} for part in (train, held_out)]
        assert held_out and train and not names[0] & names[1]


# Labels


@given(st.lists(st.sampled_from(["True", "true", "yes", "1", "No", "FALSE", "0"])))
def test_truth_values_are_two_classes_in_any_spelling(said):
    statements = [Statement(str(n), (), (), "s", label) for n, label in enumerate(said)]
    values = {label.lower() in ("true", "yes", "1") for label in said}
    if len(values) < 2:
        with pytest.raises(ValueError, match="label: expected statements with different labels to learn from"):
            label_words(statements)
        return
    assert label_words(statements) == ["False", "True"]
    assert label_ids(statements, TRUTH) == [int(label.lower() in ("true", "yes", "1")) for label in said]
    assert label_ids(statements, {"yes": 4, "no": 2}) == [4 if n else 2 for n in label_ids(statements, TRUTH)]


def test_other_words_are_classes_as_most_spell_them():
    said = ["Entailment", "entailment ", "entailment", "neutral", "Contradiction", "1", "0", None]
    statements = [Statement(str(n), (), (), "s", label) for n, label in enumerate(said)]
    words = label_words(statements)
    assert words == ["0", "1", "Contradiction", "entailment", "neutral"]
    label2id = {word: label for label, word in enumerate(words)}
    assert label_ids(statements, label2id) == [3, 3, 3, 4, 2, 1, 0, -100]


def test_a_letter_is_a_truth_value_only_beside_its_own_opposite():
    made_of = lambda said: [Statement(str(n), (), (), "s", label) for n, label in enumerate(said)]
    assert label_words(made_of("TFFT")) == label_words(made_of("ynyn")) == ["False", "True"]
    assert label_words(made_of(["t", "F", "yes"])) == ["False", "True"]
    for three in (["True", "False", "N"], ["1", "0", "n"], ["yes", "t", "N"]):  # neither
        assert len(label_words(made_of(three))) == 3
    assert label_words(made_of(["Y", "no", "N"])) == ["False", "True"]
    words = label_words(made_of("TFNT"))  # true, false, neutral
    assert words == ["F", "N", "T"]
    assert label_ids(made_of("NtfT"), {word: label for label, word in enumerate(words)}) == [1, 2, 0, 2]
    with pytest.raises(ValueError, match="statement '0' has the label 'T', but the model knows 'false', 'true'"):
        label_ids(made_of("TFN"), TRUTH)


@pytest.mark.parametrize(
    ("label2id", "message"),
    [
        ({}, "label2id: expected a dict of words and their labels"),
        ({0: "False"}, "label2id: expected a dict of words and their labels"),
        ({"yes": 0, "True": 1}, "label2id: 'True' is there in another spelling too"),
        ({"a": 0, "A ": 1, "b": 2}, "label2id: 'A ' is there in another spelling too"),
    ],
)
def test_a_vocabulary_that_is_none(label2id, message):
    with pytest.raises(ValueError, match=message):
        labels_by_spelling(label2id)
    with pytest.raises(ValueError, match=message):
        ReasoningCollator(make_processor(), label2id)


def test_a_label_that_the_model_does_not_know_is_named():
    statements = [Statement("7", (), (), "s", "true"), Statement("8", (), (), "s", "perhaps")]
    with pytest.raises(
        ValueError, match="test: statement '8' has the label 'perhaps', but the model knows 'true', 't', 'yes',"
    ):
        label_ids(statements, TRUTH, "test")


# Items


def test_an_item_holds_statements_that_share_images():
    statements = made("ab", "cd", "bc", "ef", "ab", "fe", "gh")
    dataset = ReasoningDataset(statements)
    assert dataset.groups == [[0, 4, 1, 2], [3, 5], [6]] and len(dataset) == 3 and dataset.num_images == 2
    assert dataset.texts == [f"said {n}" for n in range(7)]
    item = dataset[0]
    assert list(item) == ["images", "statements", "statement_index"] and item["statement_index"] == [0, 4, 1, 2]
    assert [one.statement_id for one in item["statements"]] == ["0", "4", "1", "2"]
    assert item["images"] == {name: {"image": f"{name}.png"} for name in "abcd"}
    assert dataset[-1]["statement_index"] == [6]


def test_items_are_bounded_and_hold_every_statement_once():
    chain = made(*((f"{n}", f"{n + 1}") for n in range(50)))
    many = made(*[("x", "y")] * 100, *[("y", "z")] * 3)
    for statements in (chain, many):
        dataset = ReasoningDataset(statements)
        assert sorted(place for group in dataset.groups for place in group) == list(range(len(statements)))
        pairs = [{statements[place].image_ids for place in group} for group in dataset.groups]
        assert sum(map(len, pairs)) == len(set.union(*pairs))  # those about the same images are together
        for item, its in zip(map(dataset.__getitem__, range(len(dataset))), pairs, strict=True):
            assert len(item["images"]) <= MOST_IMAGES
            assert len(item["statements"]) <= MOST_STATEMENTS or len(its) == 1
    assert len(ReasoningDataset(chain)) == 4 and len(ReasoningDataset(many)) == 2


def test_what_one_image_shows_is_learned_first_and_then_the_others():
    stages = (0, 1, 1, 0, None, 0)
    statements = [
        one._replace(stage=stage, label="True")
        for one, stage in zip(made("ab", "ab", "cd", "ba", "ef", "gh"), stages, strict=True)
    ]
    dataset = ReasoningDataset(statements, seed=0, first_epochs=2)
    seen = lambda: [item["statement_index"] for item in map(dataset.__getitem__, range(len(dataset)))]
    # Items of one stage have all of their statements: none is empty.
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        assert seen() == [[0, 3], [2], [4], [5]]
    for epoch in (2, 7):
        dataset.set_epoch(epoch)
        assert seen() == [[1], [2], [4], [5]]
    usual = ReasoningDataset(statements, seed=0)
    assert [item["statement_index"] for item in map(usual.__getitem__, range(4))] == [[0, 1, 3], [2], [4], [5]]


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=12))
def test_no_image_is_in_two_items_of_a_few(pairs):
    dataset = ReasoningDataset(made(*(tuple(map(str, pair)) for pair in pairs)))
    images = [image for item in map(dataset.__getitem__, range(len(dataset))) for image in item["images"]]
    assert len(images) == len(set(images))


def test_statements_that_make_no_data_set():
    with pytest.raises(ValueError, match="examples: a dataset needs at least one"):
        ReasoningDataset([])
    with pytest.raises(ValueError, match="statement '1' has 3 images and 3 ids of them, the first statement 2"):
        ReasoningDataset(made("ab", "abc"))
    unknown = [*made("ab"), made("cd")[0]._replace(statement_id="x", label=None)]
    ReasoningDataset(unknown)
    with pytest.raises(ValueError, match="statement 'x' has no label"):
        ReasoningDataset(unknown, seed=0)


# Batches


def test_a_batch_holds_each_image_once_in_the_order_of_each_statement(folder):
    processor, statements = make_processor(), read_statements(write(folder))
    more = read_statements([ROWS[0] | {"images": ["yellow.png", "yellow.png"], "label": "no"}], folder=folder)
    dataset = ReasoningDataset([*statements, more[0]._replace(statement_id="3")])
    batch = ReasoningCollator(processor, TRUTH)([dataset[1], dataset[0]])
    assert list(batch)[0] == "input_ids" and len(batch["input_ids"]) == 4
    assert batch["statement_index"].tolist() == [3, 0, 1, 2] and batch["labels"].tolist() == [0, 1, 0, 1]
    assert batch["image_index"].tolist() == [[0, 0], [1, 2], [2, 1], [1, 3]]
    assert batch["image_index"].dtype == batch["labels"].dtype == torch.long
    shown = processor(images=[make_image(color) for color in ("yellow", "red", "blue", "green")], return_tensors="pt")
    torch.testing.assert_close(batch["pixel_values"], shown["pixel_values"])
    said = processor(text=[dataset.texts[place] for place in (3, 0, 1, 2)], padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], said["input_ids"])
    assert torch.equal(batch["attention_mask"], said["attention_mask"])


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_of_one_image_or_three_a_statement(folder, count):
    names = [f"{color}.png" for color in COLORS]
    rows = [{"images": names[start : start + count], "sentence": "red", "label": start} for start in (0, 1)]
    dataset = ReasoningDataset(read_statements(write(folder, rows)))
    batch = ReasoningCollator(make_processor(), TRUTH)([dataset[n] for n in range(len(dataset))])
    assert batch["image_index"].tolist() == ([[0], [1]] if count == 1 else [[0, 1, 2], [1, 2, 3]])
    assert len(batch["pixel_values"]) == (2 if count == 1 else 4)


def test_labels_of_a_split_to_judge(folder):
    unknown = [one._replace(label=None) for one in read_statements(write(folder))]
    collator = ReasoningCollator(make_processor(), TRUTH)
    assert "labels" not in collator([ReasoningDataset(unknown)[0]])
    some = [unknown[0], unknown[1]._replace(label="yes"), unknown[2]]
    assert collator([ReasoningDataset(some)[0]])["labels"].tolist() == [-100, 1, -100]
    with pytest.raises(ValueError, match="statement '1' has the label 'perhaps'"):
        collator([ReasoningDataset([some[0], some[1]._replace(label="perhaps")])[0]])


def test_only_items_of_its_data_set():
    with pytest.raises(TypeError, match="ReasoningCollator takes the items of a ReasoningDataset"):
        ReasoningCollator(make_processor(), TRUTH)([{"image": "", "captions": []}])


# Augmentation


@pytest.mark.parametrize(
    ("sentence", "turned"),
    [
        ("both images show a cup", "both images show a cup"),
        ("the left image shows a cup", "the right image shows a cup"),
        ("A cup is left of a dog in the rightmost image", "A cup is right of a dog in the leftmost image"),
        ("the first image shows a cup", "the first image shows a cup"),
        ("the first image shows a cup left of a dog", None),
        ("Image 2 has the cup on the right", None),
        ("a dog is on the left in image two", None),
        ("the 2nd cup from the left is red", None),
        ("photo #2 shows a left shoe", None),
        ("photograph 1 has a dog on the right", None),
        ("Image no. 2 has its cup on the left", None),
        ("in image B a cup is on the left", None),
        ("pic one: left", None),
        ("the image fades on the left", "the image fades on the right"),
        ("image-1 has more cups on the left than image-2", None),
        ("Image_1 shows a cup left of a dog", None),
        ("the left cup was removed", None),
        ("the picture (1) has a cup on the left", None),
        ("photo: 1, a cup left of a dog", None),
        ("image №2: a cup on the left", None),
        ("in images 1 and 2 a cup is on the left", None),
        ("the next image shows a cup left of a dog", None),
        ("B has a cup on the left", None),
        ("A has a cup on the left", None),
        ("the left cup in A is red", None),
        ("image II has a cup on the left", None),
        ("a cup is pictured on the left", "a cup is pictured on the right"),
        ("a cup left of a dog, as in A", None),
        ("A cup next to a dog is on the left", "A cup next to a dog is on the right"),
    ],
)
def test_what_is_said_of_mirrored_images(sentence, turned):
    (one,) = made("ab")
    one = one._replace(sentence=sentence)
    expected = None
    if turned is not None:
        order = 1 if turned == sentence else -1
        expected = one._replace(sentence=turned, images=one.images[::order], image_ids=one.image_ids[::order])
    assert mirrored(one) == expected
    if expected is not None:
        assert mirrored(expected) == one


SIDE = 24


def square_collator(**augmentation):
    options = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0] * 3, "image_std": [1] * 3}
    processor = HiViLTProcessor(ViTImageProcessor(**options), make_tokenizer())
    return ReasoningCollator(processor, TRUTH, Augmentation(**augmentation))


@pytest.fixture
def marked(tmp_path):
    """Statements about squares, each of another color with a dark left half."""
    names = []
    for color in COLORS:
        image = Image.new("RGB", (SIDE, SIDE), color)
        image.paste((0, 0, 0), (0, 0, SIDE // 2, SIDE))
        image.save(tmp_path / f"{color}.png")
        names.append(str(tmp_path / f"{color}.png"))
    sentences = (
        "there is a red circle",
        "left of the circle is a square",
        "two in the first image",
        "the first one left",
    )
    pairs = ((0, 1), (0, 1), (0, 1), (1, 2), (2, 3), (3, 0))
    return [
        Statement(f"{n}{m}", (names[a], names[b]), (COLORS[a], COLORS[b]), sentence, "True")
        for n, (a, b) in enumerate(pairs)
        for m, sentence in enumerate(sentences)
    ]


@pytest.mark.parametrize("mode", ["skip", "swap", None])
def test_pixels_order_and_words_turn_together(marked, mode):
    dataset, collator = ReasoningDataset(marked, seed=0), square_collator(random_flip=mode)
    words = collator.processor.tokenizer.get_vocab()
    counts = Counter()
    for epoch in range(30):
        dataset.set_epoch(epoch)
        batch = collator([dataset[0]])
        colors = (batch["pixel_values"] > 0.4).flatten(2).any(-1).tolist()
        dark = batch["pixel_values"][..., : SIDE // 2].flatten(1).sum(-1) == 0
        names = [next(name for name in COLORS if color == pixel_of(name)) for color in colors]
        shown = [(name, bool(plain)) for name, plain in zip(names, dark, strict=True)]
        assert len(set(shown)) == len(shown)  # each image once, or once more mirrored
        for row, place in enumerate(batch["statement_index"].tolist()):
            statement, (left, right) = marked[place], (shown[index] for index in batch["image_index"][row])
            assert left[1] == right[1]
            said = statement.sentence
            is_mirrored, says = not left[1], "left" in said
            order = -1 if is_mirrored and says else 1
            assert (left[0], right[0]) == statement.image_ids[::order]
            expected = mirrored(statement).sentence if is_mirrored else said
            tokens = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
            assert tokens == collator.processor(text=expected)["input_ids"]
            counts[said, is_mirrored] += 1
            counts["pair", statement.image_ids, epoch, is_mirrored] += 1
    assert words["red"]
    for sentence in {one.sentence for one in marked}:
        may = mode is not None and not ("left" in sentence and (mode == "skip" or "first" in sentence))
        assert counts[sentence, True] == pytest.approx(90 if may else 0, abs=25), sentence


def pixel_of(name):
    return [value > 100 for value in Image.new("RGB", (1, 1), name).getpixel((0, 0))]


def test_a_crop_of_its_own_for_each_image_in_all_its_statements(marked):
    dataset, collator = ReasoningDataset(marked, seed=0), square_collator(random_crop=0.3)
    batch = collator([dataset[0]])
    assert len(batch["pixel_values"]) == 4
    dark = [int((image.sum(0) == 0).sum()) for image in batch["pixel_values"]]
    assert len(set(dark)) == 4
    dataset.set_epoch(1)
    assert dark != [int((image.sum(0) == 0).sum()) for image in collator([dataset[0]])["pixel_values"]]


def test_augmentation_is_of_training_alone_and_the_same_with_workers(marked):
    collator = square_collator(random_crop=0.5, random_flip="swap", rand_augment=(2, 7))
    plain = square_collator()
    test = ReasoningDataset(marked)
    assert torch.equal(collator([test[0]])["pixel_values"], plain([test[0]])["pixel_values"])
    dataset = ReasoningDataset(marked, seed=0)
    loaders = [
        torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=collator, num_workers=workers)
        for workers in (0, 1)
    ]
    seen = set()
    for epoch in range(3):
        dataset.set_epoch(epoch)
        (own,), (foreign,) = map(list, loaders)
        assert own.keys() == foreign.keys() and all(torch.equal(own[name], foreign[name]) for name in own)
        seen.add(own["pixel_values"].numpy().tobytes())
    assert len(seen) == 3


def test_a_statement_is_mirrored_whatever_else_is_in_its_batch(marked):
    collator = square_collator(random_flip="swap")
    for seed in range(8):
        whole = ReasoningDataset(marked, seed=seed)
        alone = ReasoningDataset(marked[1:2], seed=seed)
        batch, single = collator([whole[0]]), collator([alone[0]])
        row = batch["statement_index"].tolist().index(1)
        images = batch["pixel_values"][batch["image_index"][row]]
        assert torch.equal(images, single["pixel_values"][single["image_index"][0]])


def test_a_mirrored_image_is_the_stored_one_turned(folder):
    rows = [{"images": ["red.png", "blue.png"], "sentence": "red", "label": "yes"}]
    dataset = ReasoningDataset(read_statements(write(folder, rows)), seed=0)
    collator, processor = ReasoningCollator(make_processor(), TRUTH, Augmentation(random_flip="swap")), make_processor()
    turned, found = [ImageOps.mirror(make_image(color)) for color in ("red", "blue")], set()
    usual = [make_image(color) for color in ("red", "blue")]
    expected = [processor(images=images, return_tensors="pt")["pixel_values"] for images in (usual, turned)]
    for epoch in range(12):
        dataset.set_epoch(epoch)
        shown = collator([dataset[0]])["pixel_values"]
        found.add(next(place for place in (0, 1) if torch.allclose(shown, expected[place])))
    assert found == {0, 1}
    assert expected[0].shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE) and expected[0].isfinite().all()
