"""Readers against a miniature of each real layout, and the way from records to batches."""

import csv
import json

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hivilt.data.augmentation import Augmentation
from hivilt.data.cells import clean
from hivilt.data.tables import TableImage, open_image
from hivilt.data.vqa import (
    Columns,
    VQACollator,
    VQADataset,
    VQAExample,
    WrittenAnswersCollator,
    build_answer_vocabulary,
    drop_unknown_answers,
    read_answers_file,
    read_table,
)
from hivilt.evaluation.vqa import exact_match
from tiny import IMAGE_SIZE, make_image, make_processor

ROWS = [
    {"image": "images/red.png", "question": "what color is the shape?", "answer": "red"},
    {"image": "images/blue.png", "question": "is there a circle?", "answer": "no"},
    {"image": "images/red.png", "question": "is there a square?", "answer": "yes"},
]


@pytest.fixture
def folder(tmp_path):
    """Two images, and nothing else yet."""
    (tmp_path / "images").mkdir()
    for color in ("red", "blue"):
        make_image(color).save(tmp_path / "images" / f"{color}.png")
    return tmp_path


def write(folder, kind, rows=ROWS):
    path = folder / f"train{kind}"
    if kind == ".json":
        path.write_text(json.dumps(rows))
    elif kind == ".data.json":
        path.write_text(json.dumps({"version": 1, "data": rows}))
    elif kind == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    elif kind == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def table_of_images(colors, **columns):
    """A `datasets.Dataset` with images in it, as on the Hub."""
    table = datasets.Dataset.from_dict({"image": [make_image(color) for color in colors], **columns})
    return table.cast_column("image", datasets.Image())


# Readers


@pytest.mark.parametrize("kind", [".json", ".data.json", ".jsonl", ".csv", ".parquet"])
def test_local_files(folder, kind):
    examples = read_table(write(folder, kind))
    red = str(folder / "images/red.png")
    # Relative paths start at the data file, wherever the program runs.
    assert examples[0] == VQAExample("0", "images/red.png", red, "what color is the shape?", ("red",))
    assert [one.image_id for one in examples] == [row["image"] for row in ROWS]
    assert open_image(examples[1].image).getpixel((30, 22)) == (0, 0, 255)


def test_parquet_with_images_inside(folder):
    path = folder / "train.parquet"
    table_of_images(["red", "blue", "red"], question=["q1", "q2", "q3"], answer=["1", "2", "3"]).to_parquet(str(path))
    examples = read_table(path)
    assert examples[0].image_id == examples[2].image_id != examples[1].image_id
    assert open_image(examples[1].image).getpixel((30, 22)) == (0, 0, 255)


def test_image_folder(folder):
    split = folder / "train"
    (folder / "images").rename(split)
    lines = [
        {"file_name": "red.png", "question": "what color?", "answer": "red"},
        {"file_name": "blue.png", "question": "what color?", "answer": "blue"},
        {"file_name": "red.png", "question": "is it red?", "answer": "yes"},
    ]
    (split / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(folder / "cache"))["train"]
    by_answer = {one.answers[0]: one for one in read_table(table)}
    assert set(by_answer) == {"red", "blue", "yes"}
    assert by_answer["red"].image_id == by_answer["yes"].image_id != by_answer["blue"].image_id
    assert open_image(by_answer["blue"].image).getpixel((30, 22)) == (0, 0, 255)


def test_hub_table_groups_equal_images_and_reads_them_late():
    table = table_of_images(["red", "blue", "red"], question=["q1", "q2", "q3"], answer=["1", "2", "3"])
    examples = read_table(table, source="toy")
    assert examples[2].image == TableImage(examples[0].image.table, 0, "image")
    assert VQADataset(examples).groups == [[0, 2], [1]]


def test_named_image_ids_need_no_reading_of_images():
    columns = {"question": ["q"] * 3, "answer": ["a"] * 3, "id": [7, 8, 7], "qid": [70, 80, 71]}
    table = table_of_images(["red", "blue", "red"], **columns)
    examples = read_table(table, Columns(image_id="id", question_id="qid"))
    assert [one.image_id for one in examples] == ["7", "8", "7"]
    assert [one.question_id for one in examples] == ["70", "80", "71"]
    assert VQADataset(examples).groups == [[0, 2], [1]]


def test_answers_in_every_form(folder):
    forms = [
        ("red", ("red",)),
        (2, ("2",)),
        (2.0, ("2",)),
        (2.5, ("2.5",)),
        (float("nan"), ()),
        ([None, 3, " red "], ("3", "red")),
        ("half \ud800 a pair", ("half \N{REPLACEMENT CHARACTER} a pair",)),
        (["red", "dark red"], ("red", "dark red")),
        ([{"answer": "red", "answer_id": 1}, {"answer": "pink", "answer_id": 2}], ("red", "pink")),
        (True, ("true",)),
        ({"text": "red"}, ("red",)),
        ({"answers": [{"answer": "red", "answer_confidence": "yes"}]}, ("red",)),
        ({"answer": ["red", "pink"], "answer_id": [1, 2]}, ("red", "pink")),
        ("['red', 'dark red']", ("red", "dark red")),
        (None, ()),
        ("  ", ()),
        ([], ()),
    ]
    rows = [{"image": "images/red.png", "question": "q", "answer": form} for form, _ in forms]
    assert [one.answers for one in read_table(write(folder, ".json", rows))] == [answers for _, answers in forms]


def test_csv_cells_stay_as_they_are_written(folder):
    rows = [{"image": "images/red.png", "question": "q", "answer": answer} for answer in ("None", "007", "NA", "")]
    assert [one.answers for one in read_table(write(folder, ".csv", rows))] == [("None",), ("007",), ("NA",), ()]


def test_answers_as_class_labels_are_the_names_of_their_classes(folder):
    names, labels = ["yes", "no", "007"], [1, 2, -1]
    table = table_of_images(["red"] * 3, question=["q"] * 3, answer=labels, several=[[one, 0] for one in labels])
    classes = datasets.ClassLabel(names=names)
    table = table.cast_column("answer", classes).cast_column("several", datasets.List(classes))
    table.to_parquet(folder / "train.parquet")
    for read in (
        lambda columns: read_table(table, columns),
        lambda columns: read_table(folder / "train.parquet", columns),
    ):
        assert [one.answers for one in read(Columns())] == [("no",), ("007",), ()]
        assert [one.answers for one in read(Columns(answer="several"))] == [("no", "yes"), ("007", "yes"), ("yes",)]


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv", ".parquet"])
def test_composed_and_decomposed_texts_are_one(folder, kind):
    rows = [ROWS[0] | {"question": f"un {text}?", "answer": text} for text in ("caf\u00e9", "cafe\u0301", "Caf\u00e9")]
    examples = read_table(write(folder, kind, rows))
    assert {one.question for one in examples} == {"un caf\u00e9?", "un Caf\u00e9?"}
    assert build_answer_vocabulary([one.answers for one in examples]) == ["caf\u00e9"]
    assert exact_match("CAFE\u0301", ["caf\u00e9"])


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0[]{}()")), min_size=1))
def test_answers_of_all_kinds_of_files_are_those_that_were_written(tmp_path_factory, answers):
    folder = tmp_path_factory.getbasetemp()
    rows = [{"image": "a.png", "question": "what?", "answer": answer} for answer in answers]
    wanted = [(clean(answer),) if clean(answer) else () for answer in answers]
    for kind in (".json", ".jsonl", ".csv"):
        assert [one.answers for one in read_table(write(folder, kind, rows))] == wanted


def test_question_ids_are_read_as_other_cells_are(folder):
    rows = [row | {"id": number} for row, number in zip(ROWS, (7.0, "007", 3), strict=True)]
    examples = read_table(write(folder, ".json", rows), Columns(question_id="id"))
    assert [one.question_id for one in examples] == ["7", "007", "3"]
    with pytest.raises(ValueError, match="row 2: the question's id in column 'id' is empty"):
        read_table(write(folder, ".json", [rows[0], rows[1] | {"id": float("nan")}]), Columns(question_id="id"))


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"question": ""}, ValueError, "train.json, row 2: the question in column 'question' is empty"),
        ({"question": None}, ValueError, "row 2: the question in column 'question' is empty"),
        ({"question": 3}, TypeError, "row 2: column 'question' should hold a question as text, got int"),
        (
            {"answer": {"ids": [1]}},
            TypeError,
            "row 2: column 'answer' should hold an answer as text or a list of them, .*got dict {'ids'",
        ),
        ({"image": None}, TypeError, "row 2: column 'image' should hold an image or its path, got None"),
    ],
)
def test_bad_values_name_row_and_column(folder, change, error, message):
    with pytest.raises(error, match=message):
        read_table(write(folder, ".json", [ROWS[0], ROWS[1] | change]))


@pytest.mark.parametrize("key", ["question", "image", "id"])
def test_a_row_that_lacks_a_key_is_named(folder, key):
    rows = [row | {"id": str(place)} for place, row in enumerate(ROWS[:2])]
    del rows[1][key]
    with pytest.raises((ValueError, TypeError), match=f"row 2: .*column '{key}'"):
        read_table(write(folder, ".json", rows), Columns(question_id="id"))


@pytest.mark.parametrize("kind", [".json", ".csv", ".parquet"])
def test_unknown_column_lists_those_present(folder, kind):
    path = write(folder, kind)
    message = "answer_column: .* has no column 'answers'; it has 'image', 'question', 'answer'.*--answer_column"
    with pytest.raises(ValueError, match=message):
        read_table(path, Columns(answer="answers"))
    with pytest.raises(ValueError, match="image_id_column: .* has no column 'id'"):
        read_table(path, Columns(image_id="id"))


def test_an_answer_under_another_name_in_some_rows_is_refused(folder):
    rows = [{"image": "red.png", "question": "what?", "answer": "red"}, {"image": "red.png", "question": "who?"}]
    assert [one.answers for one in read_table(rows, folder=folder)] == [("red",), ()]
    rows[1]["answers"] = ["blue"]
    with pytest.raises(ValueError, match="the table, row 2: has 'answers' where other rows have 'answer'"):
        read_table(rows, folder=folder)


def test_answers_may_be_absent_where_only_predictions_are_wanted(folder, caplog):
    rows = [{key: row[key] for key in ("image", "question")} for row in ROWS]
    examples = read_table(write(folder, ".json", rows), answers_needed=False)
    assert {one.answers for one in examples} == {()}
    assert "has no column 'answer': its questions are answered, accuracy is not measured" in caplog.text


@pytest.mark.parametrize(("content", "error"), [("[]", ValueError), ('["a"]', TypeError)])
def test_a_file_without_examples_is_named(tmp_path, content, error):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(error, match="rows.json: "):
        read_table(tmp_path / "rows.json")


# Answers


def test_a_normalized_vocabulary_joins_what_the_metric_joins():
    answers = [["Two dogs"] * 3, ["2 dogs"], ["a cat."], ["the cat", "dog"]]
    assert build_answer_vocabulary(answers, normalize=True) == ["2 dogs", "cat"]
    assert build_answer_vocabulary(answers, min_count=2, normalize=True, max_size=1) == ["2 dogs"]
    assert build_answer_vocabulary(answers) == ["2 dogs", "a cat.", "the cat", "Two dogs"]


def test_labels_find_answers_as_the_metric_writes_them(folder):
    """VQAv2's 3,129 answers are normalized, what people said is not."""
    ten = ["Two"] * 4 + ["2"] * 3 + ["a few"] * 3
    examples = [VQAExample("1", "red", str(folder / "images/red.png"), "how many?", tuple(ten))]
    label2id = {"": 0, "2": 1, "few": 2, "red": 3}
    assert drop_unknown_answers(examples, label2id) == examples
    assert drop_unknown_answers(examples, {"red": 0}) == []
    soft = VQACollator(make_processor(), label2id, soft_labels=True)([VQADataset(examples)[0]])["labels"]
    assert soft.tolist() == [[0, 1, pytest.approx(0.9), 0]]
    hard = VQACollator(make_processor(), label2id)([VQADataset(examples)[0]])["labels"]
    assert hard.tolist() == [1]


def test_lists_of_answers_are_read_line_by_line(tmp_path):
    (tmp_path / "answers.txt").write_text("\nyes\nred hat\n")
    assert read_answers_file(tmp_path / "answers.txt") == ["", "yes", "red hat"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lists_of_answers_are_read_as_editors_save_them(tmp_path, end, mark):
    (tmp_path / "answers.txt").write_bytes(f"{mark}yes {end}caf\u00e9{end}USA{end}{end}".encode())
    assert read_answers_file(tmp_path / "answers.txt") == ["yes", "caf\u00e9", "USA"]


@pytest.mark.parametrize("name", ["answers.json", "answers.txt"])
def test_a_json_list_of_answers_is_read(tmp_path, name):
    (tmp_path / name).write_text('\ufeff["yes", "no", 3, true]\n', encoding="utf-8")
    assert read_answers_file(tmp_path / name) == ["yes", "no", "3", "true"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("answers.txt", "yes\nno\n Yes\n", "answer_file: answers.txt has 'yes' more than once .answers 1 and 3."),
        ("answers.txt", "caf\u00e9\ncafe\u0301\n", "answer_file: answers.txt has 'caf\u00e9' more than once"),
        ("answers.txt", "yes\n\nno\n\nred", "answer_file: answers.txt has '' more than once .answers 2 and 4."),
        ("answers.txt", "\n\n", "answer_file: answers.txt holds no answer"),
        ("answers.json", '{"yes": 0}', "answer_file: answers.json holds no list of texts"),
        ("answers.json", '[["yes"]]', "answer_file: answers.json holds no list of texts"),
        ("answers.json", "yes\nno\n", "answer_file: answers.json: is not JSON"),
        ("answers.csv", "answer,count\nyes,3\n", "answer_file: answers.csv is a table; give a text file"),
    ],
)
def test_a_list_of_answers_that_is_none_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_answers_file(tmp_path / name)


def test_a_class_is_spelled_as_most_of_its_answers_are():
    answers = [["USA"], ["usa"], ["USA"], ["Berlin"], ["new  york"], ["New York"], ["New York"]]
    assert build_answer_vocabulary(answers) == ["New York", "USA", "Berlin"]
    several = [["USA", "USA", "usa"], ["U.S.A.", "USA", "USA"], ["two dogs", "2 dogs", "Two dogs"], ["The Cat"] * 3]
    assert build_answer_vocabulary(several, normalize=True) == ["USA", "2 dogs", "cat"]
    assert build_answer_vocabulary([["red"], ["blue"], ["red"]]) == ["red", "blue"]


def test_vocabulary_counts_the_majority_answer():
    answers = [["yes"], ["Yes"], ["no"], ["red", "blue", "red"], ["no"], ["blue"], []]
    assert build_answer_vocabulary(answers) == ["no", "yes", "blue", "red"]
    assert build_answer_vocabulary(answers, min_count=2) == ["no", "yes"]
    assert build_answer_vocabulary(answers, max_size=3) == ["no", "yes", "blue"]
    with pytest.raises(ValueError, match="The answer vocabulary is empty: none of 4 distinct training answers"):
        build_answer_vocabulary(answers, min_count=3)


def test_questions_without_a_known_answer_cannot_be_trained_on():
    examples = [
        VQAExample(str(n), "a", "a", "q", answers) for n, answers in enumerate([("Yes",), ("no",), ("x", "yes"), ()])
    ]
    assert [one.question_id for one in drop_unknown_answers(examples, {"yes": 0})] == ["0", "2"]


# Batches


def test_a_batch_ships_each_image_once(folder):
    dataset = VQADataset(read_table(write(folder, ".json"))).by_image()
    assert len(dataset) == 2
    batch = VQACollator(make_processor(), {"yes": 0, "no": 1})([dataset[0], dataset[1]])
    assert next(iter(batch)) == "input_ids"
    assert batch["pixel_values"].shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert batch["image_index"].tolist() == [0, 0, 1]
    assert batch["question_index"].tolist() == [0, 2, 1]
    assert batch["labels"].tolist() == [-100, 0, 1]  # "red" is no class
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 8)
    assert all(isinstance(value, torch.Tensor) for value in batch.values())


def test_one_item_is_one_question_and_a_batch_keeps_their_order(folder):
    dataset = VQADataset(read_table(write(folder, ".json")), seed=0)
    assert len(dataset) == 3 and dataset[-1]["question_index"] == [2]
    with pytest.raises(IndexError):
        dataset[3]
    batch = VQACollator(make_processor(), {"yes": 0, "no": 1, "red": 2})([dataset[0], dataset[1], dataset[2]])
    assert batch["question_index"].tolist() == [0, 1, 2] and batch["image_index"].tolist() == [0, 1, 0]
    assert batch["labels"].tolist() == [2, 1, 0] and batch["pixel_values"].shape[0] == 2
    texts = make_processor().batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert texts == make_processor().batch_decode(
        make_processor()(text=[row["question"] for row in ROWS])["input_ids"], skip_special_tokens=True
    )
    # Row by row where each question has an image of its own.
    pair = VQACollator(make_processor(), {"yes": 0})([dataset[1], dataset[2]])
    assert "image_index" not in pair and pair["pixel_values"].shape[0] == pair["input_ids"].shape[0] == 2


def test_by_image_has_all_questions_of_an_image_and_shares_the_epoch(folder):
    dataset = VQADataset(read_table(write(folder, ".json")), seed=0)
    images = dataset.by_image()
    assert [item["question_index"] for item in images] == dataset.groups == [[0, 2], [1]]
    images.set_epoch(3)
    assert dataset.epoch == 3 and dataset[2]["draw"] == images[0]["draw"] == dataset[0]["draw"] != dataset[1]["draw"]


@pytest.mark.parametrize("spelling", ["Red", "RED", "  red ", "red"])
def test_labels_are_found_whatever_the_spelling_in_the_config(folder, spelling):
    label2id = {"Yes": 0, "NO": 1, spelling: 2}
    examples = read_table(write(folder, ".json"))
    assert drop_unknown_answers(examples, label2id) == examples
    dataset = VQADataset(examples)
    batch = VQACollator(make_processor(), label2id)([dataset[place] for place in range(3)])
    assert batch["labels"].tolist() == [2, 1, 0]


def test_an_accent_may_be_composed_or_not(folder):
    examples = beside(folder, ("where", ["cafe\u0301"]), ("where", ["CAF\u00c9"]))
    for spelled in ("caf\u00e9", "cafe\u0301"):
        (labels,) = [VQACollator(make_processor(), {spelled: 0})([VQADataset(examples).by_image()[0]])["labels"]]
        assert labels.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("label2id", "came"),
    [
        ({}, r"got \{\}"),
        ({0: "yes", 1: "no"}, r"got \{0: 'yes', 1: 'no'\}"),
        ({"yes": -1}, r"got \{'yes': -1\}"),
        (None, "got None"),
    ],
)
def test_what_is_no_label2id_is_refused(label2id, came):
    with pytest.raises(ValueError, match=f"label2id: expected a dict of answers and their labels.*{came}"):
        VQACollator(make_processor(), label2id)


def test_two_spellings_of_one_answer_are_no_two_labels():
    with pytest.raises(ValueError, match="label2id: 'yes' is there in another spelling too"):
        VQACollator(make_processor(), {"Yes": 0, "yes": 1})


def test_soft_labels_are_the_metric():
    table = table_of_images(["red", "red"], question=["what?", "who?"], answer=[["red"] * 8 + ["pink"] * 2, ["x"] * 10])
    dataset = VQADataset(read_table(table)).by_image()
    batch = VQACollator(make_processor(), {"pink": 0, "blue": 1, "red": 2}, soft_labels=True)([dataset[0]])
    assert batch["labels"].dtype == torch.float32
    torch.testing.assert_close(batch["labels"], torch.tensor([[0.6, 0, 1], [0, 0, 0]]))


def test_questions_without_answers_have_no_labels(folder):
    rows = [row | {"answer": None} for row in ROWS]
    dataset = VQADataset(read_table(write(folder, ".json", rows))).by_image()
    assert "labels" not in VQACollator(make_processor(), {"yes": 0})([dataset[0]])


def test_all_answers_of_a_question_are_to_be_written(folder):
    answers = [["red", "red", "a red square"], [], ["no"]]
    rows = [row | {"answer": answer} for row, answer in zip(ROWS, answers, strict=True)]
    dataset = VQADataset(read_table(write(folder, ".json", rows), answers_needed=False)).by_image()
    processor = make_processor()
    batch = WrittenAnswersCollator(processor)([dataset[0], dataset[1]])
    assert batch["image_index"].tolist() == [0, 0, 1] and batch["question_index"].tolist() == [0, 2, 1]
    said = [processor.decode(row[row >= 0]) for row in batch["labels"]]
    assert said == ["red [SEP]", "red [SEP]", "a red square [SEP]", "no [SEP]"]
    assert batch["text_index"].tolist() == [0, 0, 0, 1]
    assert not {"labels", "text_index"} & set(WrittenAnswersCollator(processor)([dataset[1]]))


FULL = Augmentation(random_crop=0.5, random_flip="swap", rand_augment=(2, 7))
SIDES = {"right": 0, "left": 1, "red": 2}


class Heard:
    """A processor that keeps the texts it was given."""

    def __init__(self):
        self.processor = make_processor()
        self.resize = self.processor.resize
        self.texts = None

    def __call__(self, images=None, text=None, **options):
        self.texts = text if text is not None else self.texts
        return self.processor(images=images, text=text, **options)


def beside(folder, *questions):
    """Questions and answers about an image of the size that the processor gives, so that no pixel is computed."""
    make_image("red", (IMAGE_SIZE, IMAGE_SIZE)).save(folder / "square.png")
    return [
        VQAExample(str(number), "square", str(folder / "square.png"), question, tuple(answers))
        for number, (question, answers) in enumerate(questions)
    ]


def collated_epochs(examples, augmentation, soft_labels=False, epochs=range(20)):
    """Whether the image of these questions is mirrored in an epoch, the texts that the processor got, and labels."""
    dataset, processor = VQADataset(examples, seed=0).by_image(), Heard()
    plain = VQACollator(processor, SIDES)([dataset[0]])["pixel_values"]
    collator = VQACollator(processor, SIDES, soft_labels, augmentation)
    for epoch in epochs:
        dataset.set_epoch(epoch)
        batch = collator([dataset[0]])
        mirrored = not torch.equal(batch["pixel_values"], plain)
        assert torch.equal(batch["pixel_values"], plain.flip(-1) if mirrored else plain)
        yield mirrored, processor.texts, batch["labels"].tolist()


def test_a_mirrored_image_has_left_and_right_swapped_in_questions_and_labels(folder):
    examples = beside(folder, ("Is the corner Left or right?", ["left"] * 10), ("what color", ["red"]))
    found = list(collated_epochs(examples, Augmentation(random_flip="swap")))
    assert {mirrored for mirrored, _, _ in found} == {False, True}
    for mirrored, texts, labels in found:
        assert texts == ["Is the corner Right or left?" if mirrored else "Is the corner Left or right?", "what color"]
        assert labels == ([0, 2] if mirrored else [1, 2])
    assert examples[0].answers == ("left",) * 10


def test_soft_labels_of_a_mirrored_image_are_swapped(folder):
    examples = beside(folder, ("which side", ["left"] * 8 + ["right"] * 2))
    found = list(collated_epochs(examples, Augmentation(random_flip="swap"), soft_labels=True))
    assert {mirrored for mirrored, _, _ in found} == {False, True}
    for mirrored, _, labels in found:
        torch.testing.assert_close(labels, [[1.0, 0.6, 0.0]] if mirrored else [[0.6, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("questions", "may_be_mirrored"),
    [
        ([("what color", ["red"]), ("is it bright", ["red"])], True),
        ([("what color", ["red"]), ("what is left of it", ["red"])], False),
        ([("what color", ["red"]), ("which side", ["red"] * 9 + ["Left"])], False),
    ],
)
def test_all_questions_and_answers_decide_whether_their_image_is_mirrored(folder, questions, may_be_mirrored):
    examples = beside(folder, *questions)
    found = list(collated_epochs(examples, Augmentation(random_flip="skip")))
    assert {mirrored for mirrored, _, _ in found} == ({False, True} if may_be_mirrored else {False})
    assert all(texts == [example.question for example in examples] for _, texts, _ in found)


def test_augmentation_is_off_unless_asked_for_and_never_of_a_split_to_evaluate_on(folder):
    examples = read_table(write(folder, ".json"))
    train, test = VQADataset(examples, seed=0).by_image(), VQADataset(examples).by_image()
    assert "draw" in train[0] and "draw" not in test[0]
    labels = {"yes": 0, "no": 1}
    plain = VQACollator(make_processor(), labels)([test[0], test[1]])
    same = [
        VQACollator(make_processor(), labels)([train[0], train[1]]),
        VQACollator(make_processor(), labels, augmentation=Augmentation())([train[0], train[1]]),
        VQACollator(make_processor(), labels, augmentation=FULL)([test[0], test[1]]),
    ]
    for batch in same:
        assert batch.keys() == plain.keys()
        assert all(torch.equal(batch[name], plain[name]) for name in plain)
    changed = VQACollator(make_processor(), labels, augmentation=FULL)([train[0], train[1]])
    assert changed.keys() == plain.keys()
    assert all((changed["pixel_values"][row] != plain["pixel_values"][row]).any() for row in range(2))
    assert all(torch.equal(changed[name], plain[name]) for name in plain if name != "pixel_values")


def test_augmentation_is_the_same_with_workers_and_another_in_the_next_epoch(folder):
    dataset, epochs = VQADataset(read_table(write(folder, ".json")), seed=0).by_image(), []
    collator = VQACollator(make_processor(), {"yes": 0, "no": 1}, augmentation=FULL)
    loaders = [
        torch.utils.data.DataLoader(dataset, collate_fn=collator, **workers)
        for workers in ({"num_workers": 0}, {"num_workers": 2, "persistent_workers": True})
    ]
    for epoch in range(3):
        dataset.set_epoch(epoch)
        batches = [list(loader) for loader in loaders]
        for own, foreign in zip(*batches, strict=True):
            assert own.keys() == foreign.keys()
            assert all(torch.equal(own[name], foreign[name]) for name in own)
        epochs.append(torch.cat([batch["pixel_values"] for batch in batches[0]]))
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
