"""Files, tables and images as every reader takes them, whatever the task."""

import csv
import importlib.util
import json
from collections import Counter
from typing import NamedTuple

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hivilt.data.tables import (
    ONLY_IMAGE,
    ONLY_IMAGE_ID,
    Collator,
    TableImage,
    check_columns,
    check_images,
    check_items,
    column_names,
    hold_out,
    image_size,
    linked,
    open_image,
    read_rows,
    rows_with_images,
)
from tiny import make_image, make_processor


class Record(NamedTuple):
    image_id: str
    image: str | TableImage
    number: int = 0

    image_ids, images = ONLY_IMAGE_ID, ONLY_IMAGE


class Several(NamedTuple):
    image_ids: tuple[str, ...]
    images: tuple[str | TableImage, ...] = ()
    number: int = 0


@pytest.fixture
def images(tmp_path):
    """Records of three texts about two image files."""
    for color in ("red", "blue"):
        make_image(color).save(tmp_path / f"{color}.png")
    return [Record(f"{color}.png", str(tmp_path / f"{color}.png"), n) for n, color in enumerate(("red", "blue", "red"))]


def images_of(rows, image_id_column=None):
    return list(rows_with_images(rows, "image", image_id_column, "toy", "folder"))


# Rows


@pytest.mark.parametrize("kind", [".json", ".data.json", ".jsonl", ".csv", ".parquet", ".JSON"])
def test_rows_of_local_files(tmp_path, kind):
    rows = [{"image": "a.png", "text": "é"}, {"image": "b.png", "text": "007"}]
    path = tmp_path / f"rows{kind}"
    if kind == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif kind == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets write it
            writer = csv.DictWriter(file, fieldnames=["image", "text"])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        path.write_text(json.dumps({"version": 1, "data": rows} if kind == ".data.json" else rows))
    read = read_rows(path)
    assert list(read) == rows
    assert column_names(read, "toy") == ["image", "text"]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("none.json", None, FileNotFoundError, "none.json: there is no such file"),
        ("rows.txt", "[]", ValueError, r"expected .json, .jsonl, .csv or .parquet, got '.txt'"),
        ("rows", "[]", ValueError, r"expected .json, .jsonl, .csv or .parquet, got 'no ending'"),
        ("rows.json", "[]", ValueError, "rows.json: has no rows"),
        ("rows.csv", "image,question,answer\n", ValueError, "rows.csv: has no rows"),
        ("rows.json", "{", ValueError, "rows.json: is not JSON"),
        ("rows.jsonl", "\n", ValueError, "rows.jsonl: is empty"),
        ("rows.jsonl", '{"a": 1}\n{"a": ', ValueError, "rows.jsonl, line 2: is not JSON"),
        ("rows.json", '{"image": "a"}', TypeError, "rows.json: expected a list of objects"),
        ("rows.json", '["a"]', TypeError, "rows.json: expected a list of objects"),
        ("rows.csv", "image,question\na.png,gr\xfc\xdfe?\n", ValueError, "rows.csv: is not UTF-8 .*save it as UTF-8"),
        ("rows.json", "3", TypeError, "rows.json: expected a list of objects with the same keys, got int"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(error, match=message):
        column_names(read_rows(tmp_path / name), name)


def test_a_missing_column_is_an_error_with_its_flag():
    check_columns({"image": "a", "image_id": None}, ["a", "b"], "toy")
    with pytest.raises(
        ValueError, match="image_column: toy has no column 'c'; it has 'a', 'b'. .* with --image_column.$"
    ):
        check_columns({"image": "c"}, ["a", "b"], "toy")


def test_rows_with_paths():
    rows = [{"image": "a.png", "id": 7}, {"image": "b.png", "id": 8}, {"image": "a.png", "id": 7}]
    assert [row.image_id for row in images_of(rows)] == ["a.png", "b.png", "a.png"]
    assert [row.image_id for row in images_of(rows, "id")] == ["7", "8", "7"]
    assert images_of(rows)[1] == ("toy, row 2", ("b.png",), ("folder/b.png",), rows[1])
    assert images_of(datasets.Dataset.from_list(rows)) == images_of(rows)


@pytest.mark.parametrize("id_column", [None, "id"])
@pytest.mark.parametrize("decoded", [True, False])
def test_rows_with_images_inside(id_column, decoded):
    table = datasets.Dataset.from_dict(
        {"image": [make_image(color) for color in ("red", "blue", "red")], "id": ["r", "b", "r"]}
    ).cast_column("image", datasets.Image(decode=decoded))
    rows = images_of(table, id_column)
    assert rows[0].image_id == rows[2].image_id != rows[1].image_id
    assert [row.image.row for row in rows] == [0, 1, 0]
    assert open_image(rows[1].image).getpixel((30, 22)) == (0, 0, 255)


@pytest.mark.parametrize("image", [None, "", 3])
@pytest.mark.parametrize("id_column", [None, "id"])
def test_a_row_without_an_image_is_named(image, id_column):
    rows = [{"image": "a.png", "id": 1}, {"image": image, "id": 2}]
    with pytest.raises(TypeError, match=f"toy, row 2: column 'image' should hold an image or its path, got {image!r}"):
        images_of(rows, id_column)


def test_a_row_without_an_image_id_is_named():
    with pytest.raises(ValueError, match="toy, row 2: the image id in column 'id' is empty"):
        images_of([{"image": "a.png", "id": 1}, {"image": "a.png"}], "id")


def test_a_column_that_holds_no_images():
    with pytest.raises(TypeError, match="image_column: 'image' holds .*int64"):
        images_of(datasets.Dataset.from_dict({"image": [1, 2]}))


@pytest.mark.parametrize(
    ("present", "likely"),
    [(["image", "Question"], "Question"), (["image", "questions"], "questions"), (["image", "QUESTION "], "QUESTION ")],
)
def test_a_column_that_is_called_alike_is_named(present, likely):
    with pytest.raises(ValueError, match=f"has no column 'question'; .*--question_column, probably '{likely}'.$"):
        check_columns({"question": "question"}, present, "toy")


def test_class_labels_are_read_by_name_wherever_they_stand():
    classes = datasets.ClassLabel(names=["red", "blue"])
    features = {
        "image": datasets.Value("string"),
        "answer": classes,
        "several": datasets.List(classes),
        "objects": datasets.List({"answer": classes, "answer_id": datasets.Value("int64")}),
        "object": {"answers": datasets.List(classes)},
        "score": datasets.Value("float32"),
    }
    rows = [
        {
            "image": f"{name}.png",
            "answer": label,
            "several": [label, 0],
            "objects": [{"answer": label, "answer_id": 7}],
            "object": {"answers": [1, label]},
            "score": 0.1,
        }
        for name, label in (("a", 1), ("b", -1))
    ]
    rows.append(dict.fromkeys(features) | {"image": "c.png"})
    first, second, third = (
        row.values for row in images_of(datasets.Dataset.from_list(rows, datasets.Features(features)))
    )
    assert first["answer"] == "blue" and second["answer"] is None and third["answer"] is None
    assert (first["several"], second["several"], third["several"]) == (["blue", "red"], [None, "red"], None)
    assert first["objects"] == [{"answer": "blue", "answer_id": 7}]
    assert first["object"] == {"answers": ["blue", "blue"]}
    assert str(first["score"]) == "0.1"


@pytest.mark.parametrize("format", ["numpy", "torch", "pandas", "arrow"])
def test_a_table_in_another_format_is_read_as_it_is(format):
    table = datasets.Dataset.from_dict({"image": ["a.png"], "answer": [["red", "blue"]], "id": [7]})
    (row,) = images_of(table.with_format(format), "id")
    assert (row.image_id, row.values["answer"]) == ("7", ["red", "blue"])


@pytest.mark.parametrize("id_column", [None, "id"])
def test_a_file_is_one_image_however_it_is_written(tmp_path, id_column):
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    make_image("red").save(tmp_path / "a.png")
    (tmp_path / "other.png").symlink_to(tmp_path / "a.png")
    written = ["a.png", "./a.png", "x/../a.png", "x//..//a.png", str(tmp_path / "a.png"), ".\\a.png", " a.png "]
    written += ["link/a.png", "other.png"]
    rows = [{"image": one, "id": "one"} for one in written]
    found = list(rows_with_images(rows, "image", id_column, "toy", tmp_path))
    assert {row.image_id for row in found} == {"a.png" if id_column is None else "one"}
    assert {open_image(row.image).getpixel((30, 22)) for row in found} == {(255, 0, 0)}


def test_a_file_goes_by_its_path_below_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    make_image("red").save(tmp_path / "home" / "a.png")
    written = ["b/a.png", str(tmp_path / "data" / "c.png"), "../data/d.png", "../e.png", "~/a.png", "/elsewhere/f.png"]
    rows = list(rows_with_images([{"image": one} for one in written], "image", None, "toy", tmp_path / "data"))
    home = str(tmp_path / "home" / "a.png")
    assert [row.image_id for row in rows][:4] == ["b/a.png", "c.png", "d.png", "../e.png"]
    assert [row.image_id for row in rows][5] == "/elsewhere/f.png"
    assert rows[4].image == home


def test_links_that_only_read_alike_are_two_images(tmp_path):
    (tmp_path / "far" / "below").mkdir(parents=True)
    (tmp_path / "x").symlink_to(tmp_path / "far" / "below")
    for place in (tmp_path, tmp_path / "far"):
        make_image("red").save(place / "a.png")
    rows = [{"image": one} for one in ("a.png", "x/../a.png", "far/a.png")]
    first, second, third = (row.image_id for row in rows_with_images(rows, "image", None, "toy", tmp_path))
    assert first == "a.png" != second == third


def test_two_files_under_one_id_are_refused(tmp_path):
    rows = [{"image": "a.png", "id": 7}, {"image": "./a.png", "id": 7}, {"image": "b.png", "id": 7.0}]
    message = "toy, row 3: column 'id' gives 'b.png' the id '7', which is that of 'a.png' in an earlier row"
    with pytest.raises(ValueError, match=message):
        images_of(rows, "id")


def test_two_images_in_a_table_under_one_id_are_refused():
    images = [make_image(color) for color in ("red", "red", "blue")]
    table = datasets.Dataset.from_dict({"image": images, "id": [7, 7, 7]}).cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match="toy, row 3: column 'id' gives 'the image of row 3' the id '7'.*of row 1"):
        images_of(table, "id")
    assert len(images_of(table.select([0, 1]), "id")) == 2


def test_a_benchmark_is_trusted_with_its_ids():
    images = [make_image(color) for color in ("red", "blue")]
    table = datasets.Dataset.from_dict({"image": images, "id": [7, 7]}).cast_column("image", datasets.Image())
    rows = list(rows_with_images(table, "image", "id", "toy", ".", trust_ids=True))
    assert [row.image.row for row in rows] == [0, 0] and "image" not in rows[0].values


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("https://example.org/a.png", "toy, row 1, column 'image': holds the address .*download it"),
        ("s3://bucket/a.png", "toy, row 1, column 'image': holds the address"),
        ("file:///a.png", "toy, row 1, column 'image': holds the address"),
        ("data:image/png;base64,iVBORw0KGgo=", "toy, row 1, column 'image': holds an image as base64"),
        ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=", "as base64"),
        ("/9j/4AAQSkZJRgABAQEAYABgAAD/2wBDAAIBAQIBAQICAgICAgICAwUDAwMDAwYEBAMFBwYHBwcG", "as base64"),
        ("qk" * 200, "as base64"),
    ],
)
def test_what_is_no_path_is_refused_before_training(image, message):
    with pytest.raises(ValueError, match=message):
        images_of([{"image": image}])


@pytest.mark.parametrize(
    "image", ["red images/a.png", "C:\\images\\a.png", "~me/a.png", "x" * 300 + ".png", "/9j/a.png"]
)
def test_paths_of_all_kinds_are_looked_for_and_named(image):
    (row,) = images_of([{"image": image}])
    with pytest.raises(ValueError, match="toy: 1 of 1 images are missing or unreadable: folder|toy: .*: /9j"):
        check_images([Record(row.image_id, row.image)], source="toy")


def test_a_path_in_a_table_of_images_starts_at_the_folder(tmp_path):
    (tmp_path / "images").mkdir()
    make_image("red").save(tmp_path / "images" / "a.png")
    stored = [{"bytes": None, "path": "images/a.png"}, {"bytes": None, "path": "./images/a.png"}]
    table = datasets.Dataset.from_dict({"image": stored}).cast_column("image", datasets.Image())
    first, second = rows_with_images(table, "image", None, "toy", tmp_path)
    assert first.image_id == second.image_id == "images/a.png"
    assert open_image(second.image).getpixel((30, 22)) == (255, 0, 0)


def test_a_column_of_bytes_holds_images(tmp_path):
    make_image("red").save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    rows = images_of(datasets.Dataset.from_dict({"image": [content, content]}))
    assert rows[0].image_id == rows[1].image_id
    assert open_image(rows[1].image).getpixel((30, 22)) == (255, 0, 0)
    # A file of that name would be read in its place.
    with pytest.raises(TypeError, match="holds the bytes of an image.*Dataset.from_list"):
        images_of([{"image": {"bytes": content, "path": "a.png"}}])


# Rows of several images


@pytest.mark.parametrize(
    ("columns", "rows"),
    [
        (["images"], [{"images": ["a.png", "b.png"]}, {"images": ("b.png", "./a.png")}]),
        (["left", "right"], [{"left": "a.png", "right": "b.png"}, {"left": "b.png", "right": "a.png"}]),
        (["images"], [{"images": '["a.png", "b.png"]'}, {"images": "['b.png', 'a.png']"}]),
        (["images"], [{"images": np.array(["a.png", "b.png"])}, {"images": np.array(["b.png", "a.png"])}]),
        (["left", "more"], [{"left": "a.png", "more": ["b.png"]}, {"left": "b.png", "more": "a.png"}]),
    ],
)
def test_paths_of_several_images(columns, rows):
    first, second = rows_with_images(rows, columns, None, "toy", "folder")
    assert first[:3] == ("toy, row 1", ("a.png", "b.png"), ("folder/a.png", "folder/b.png"))
    assert second.image_ids == first.image_ids[::-1] and second.images == first.images[::-1]
    if not isinstance(rows[0][columns[0]], np.ndarray) and columns != ["left", "more"]:
        table = datasets.Dataset.from_list(rows)
        assert [row[:3] for row in rows_with_images(table, columns, None, "toy", "folder")] == [first[:3], second[:3]]


def png(folder, color):
    make_image(color).save(folder / f"{color}.png")
    return (folder / f"{color}.png").read_bytes()


IMAGE_LISTS = {
    "decoded": datasets.List(datasets.Image()),
    "stored": datasets.List(datasets.Image(decode=False)),
    "of two": datasets.List(datasets.Image(), length=2),
    "large": datasets.LargeList(datasets.Image()),
    "bytes": datasets.List(datasets.Value("binary")),
    "objects": datasets.List({"bytes": datasets.Value("binary"), "path": datasets.Value("string")}),
}


@pytest.mark.parametrize("kind", [*IMAGE_LISTS, "columns", "mixed"])
def test_images_inside_of_a_table_are_one_wherever_they_come_again(tmp_path, kind):
    red, blue = ({"bytes": png(tmp_path, color), "path": None} for color in ("red", "blue"))
    pairs = [[red, blue], [blue, red], [red, red]]
    if kind in ("columns", "mixed"):
        sides = [[pair[side] for pair in pairs] for side in (0, 1)]
        features = {"left": datasets.Image(), "right": datasets.Image()}
        if kind == "mixed":  # paths beside images
            sides[1] = [str(tmp_path / f"{color}.png") for color in ("blue", "red", "red")]
            features["right"] = datasets.Value("string")
        columns = list(features)
        table = datasets.Dataset.from_dict(dict(zip(columns, sides, strict=True)), datasets.Features(features))
    else:
        columns, content = ["images"], pairs
        if kind == "bytes":
            content = [[image["bytes"] for image in pair] for pair in pairs]
        table = datasets.Dataset.from_dict({"images": content}, datasets.Features({"images": IMAGE_LISTS[kind]}))
    first, second, third = rows_with_images(table, columns, None, "toy", ".")
    color = lambda image: open_image(image).getpixel((30, 22))
    assert [[color(image) for image in row.images] for row in (first, second, third)] == [
        [(255, 0, 0), (0, 0, 255)],
        [(0, 0, 255), (255, 0, 0)],
        [(255, 0, 0), (255, 0, 0)],
    ]
    assert first.image_id == first.image_ids[0] and first.image == first.images[0]
    if kind != "mixed":
        assert second.image_ids == first.image_ids[::-1] and second.images == first.images[::-1]
        assert set(third.images) == {first.images[0]}
        place = "row 1 of column 'right'" if kind == "columns" else "image 2 in row 1 of column 'images'"
        assert str(first.images[1]) == place


def test_ids_of_several_images():
    rows = [{"images": ["a.png", "b.png"], "ids": ["x", 7]}, {"images": ["b.png", "c.png"], "ids": [7.0, "z"]}]
    read = lambda rows: [row.image_ids for row in rows_with_images(rows, ["images"], "ids", "toy", ".")]
    assert read(rows) == [("x", "7"), ("7", "z")]
    for ids, message in (
        (["7"], "column 'ids' has 1 ids for 2 images"),
        (["7", None], "the image id in column 'ids' is empty"),
        (["z", "7"], "column 'ids' gives 'b.png' the id 'z', which is that of 'c.png' in an earlier row"),
        (["7", "x"], "column 'ids' gives 'c.png' the id 'x', which is that of 'a.png'"),
    ):
        with pytest.raises(ValueError, match=f"toy, row 3: {message}"):
            read([*rows, {"images": ["b.png", "c.png"], "ids": ids}])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "column 'images' is an empty list; name its images"),
        ("[]", "column 'images' is an empty list"),
        (["a.png", None], "image 2 in column 'images' should hold an image or its path, got None"),
        (["a.png", ""], "image 2 in column 'images' should hold an image or its path, got ''"),
        (["https://x.org/a.png"], "image 1 in column 'images': holds the address"),
        (None, "column 'images' should hold an image or its path, got None"),
        ([["a.png"]], "image 1 in column 'images' should hold an image or its path"),
        ("['a.png' 'b.png']", "looks like a list, but cannot be read as one"),
    ],
)
def test_a_row_with_a_bad_image_among_several_is_named(images, message):
    rows = [{"images": ["a.png", "b.png"]}, {"images": images}]
    with pytest.raises((TypeError, ValueError), match=f"toy, row 2.*{message}"):
        list(rows_with_images(rows, ["images"], None, "toy", "."))


def test_a_list_where_one_image_is_expected_is_refused():
    with pytest.raises(
        TypeError, match=r"toy, row 1: column 'image' should hold an image or its path, got \['a.png'\]"
    ):
        images_of([{"image": ["a.png"]}])
    with pytest.raises(TypeError, match="image_column: 'images' holds List.*int64"):
        list(rows_with_images(datasets.Dataset.from_dict({"images": [[1, 2]]}), ["images"], None, "toy", "."))


# Splits


def test_holding_out_is_by_image_and_seeded():
    examples = [Record(str(n % 20), "", n) for n in range(100)]
    train, held_out = hold_out(examples, seed=3)
    assert len({one.image_id for one in held_out}) == 2
    assert len(held_out) == 10
    assert hold_out(examples, seed=3)[1] == held_out != hold_out(examples, seed=4)[1]
    with pytest.raises(ValueError, match="only 1.*--validation_file"):
        hold_out(examples[:1])


def test_holding_out_by_something_else_keeps_that_together():
    examples = [Record("one image", "", n) for n in range(100)]
    train, held_out = hold_out(examples, seed=3, by=lambda one: (str(one.number // 2),))
    assert len(held_out) == 10
    assert not {one.number // 2 for one in train} & {one.number // 2 for one in held_out}


@given(st.lists(st.integers(0, 9), min_size=2), st.floats(0, 1), st.integers(0, 5))
def test_nothing_is_lost_or_shared_by_holding_out(ids, fraction, seed):
    examples = [Record(str(one), "", n) for n, one in enumerate(ids + [10, 11])]
    train, held_out = hold_out(examples, fraction, seed)
    assert Counter(train + held_out) == Counter(examples)
    assert held_out
    assert not {one.image_id for one in train} & {one.image_id for one in held_out}
    assert [train, held_out] == [sorted(part, key=lambda one: one.number) for part in (train, held_out)]


PAIRS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=30)


def in_groups(pairs):
    """What is linked, each time by looking at all of it again."""
    groups = [set(pair) for pair in pairs]
    while any(one is not other and one & other for one in groups for other in groups):
        one, other = next((one, other) for one in groups for other in groups if one is not other and one & other)
        groups = [group for group in groups if group is not one and group is not other] + [one | other]
    return groups


@given(PAIRS)
def test_what_stands_together_is_linked(pairs):
    first_of = linked([tuple(map(str, pair)) for pair in pairs])
    order = [str(one) for pair in pairs for one in pair]
    assert list(first_of) == list(dict.fromkeys(order))
    for group in in_groups(pairs):
        group = set(map(str, group))
        assert {first_of[one] for one in group} == {min(group, key=order.index)}
    assert linked([]) == {}


@given(PAIRS, st.floats(0, 0.9), st.integers(0, 5))
def test_no_image_is_on_two_sides_however_examples_link_them(pairs, fraction, seed):
    examples = [Several(tuple(map(str, pair)), number=n) for n, pair in enumerate([*pairs, (31, 32), (33, 33)])]
    train, held_out = hold_out(examples, fraction, seed)
    assert Counter(train + held_out) == Counter(examples) and train and held_out
    images = [{image for one in part for image in one.image_ids} for part in (train, held_out)]
    assert not images[0] & images[1]
    assert [train, held_out] == [sorted(part, key=lambda one: one.number) for part in (train, held_out)]
    assert hold_out(examples, fraction, seed)[1] == held_out
    # As it was drawn before, also where examples came that link what is held out with what is not.
    chosen = list(dict.fromkeys(image for one in held_out for image in one.image_ids))
    link = Several((train[0].image_ids[0], held_out[0].image_ids[1]), number=99)
    assert hold_out([link, *examples], seed=seed + 1, chosen=chosen) == (train, held_out)


def test_what_is_left_out_since_it_links_both_sides_is_told(caplog):
    examples = [Several(("a", "b")), Several(("c", "d")), Several(("b", "c"))]
    assert hold_out(examples, chosen=["c", "d", "gone"]) == (examples[:1], examples[1:2])
    assert "Left out 1 of 3 examples" in caplog.text and "about others: b and c." in caplog.text
    for chosen in (["gone"], ["a", "b", "c", "d"], ["b", "d"]):
        with pytest.raises(ValueError, match="none of the training data, or all"):
            hold_out(examples, chosen=chosen)


def test_most_of_the_data_is_never_held_out_since_it_is_linked():
    large = [Several((str(n), str(n + 1)), number=n) for n in range(80)]
    small = [Several((f"{n} left", f"{n} right"), number=100 + n) for n in range(10)]
    sizes = {len(hold_out(large + small, seed=seed)[1]) for seed in range(20)}
    assert sizes == {1}
    assert {len(hold_out(large + small[:1], seed=seed)[1]) for seed in range(5)} == {1}
    with pytest.raises(ValueError, match="has 81, all linked by examples of several. Give a --validation_file"):
        hold_out(large)


# Images


def test_an_example_goes_with_any_of_its_images(images, tmp_path, caplog):
    red, blue, gone = (str(tmp_path / f"{name}.png") for name in ("red", "blue", "gone"))
    pairs = [(red, blue), (blue, gone), (red, red), (gone, red)]
    examples = [Several(pair, pair, number) for number, pair in enumerate(pairs)]
    message = f"toy: 1 of 3 images are missing or unreadable: {gone}. They are in 2 of 4 examples, number 2, 4. "
    with pytest.raises(ValueError, match=message):
        check_images(examples, source="toy")
    kept, bad = check_images(examples, "skip", "toy")
    assert [one.number for one in kept] == [0, 2] and bad == [gone]
    assert "toy: left out 1 of 3 images, and with them 2 of 4 examples, number 2, 4: " in caplog.text


def test_missing_images_are_found_before_training(images, tmp_path):
    (tmp_path / "blue.png").unlink()
    message = r"toy: 1 of 2 images are missing or unreadable: .*blue.png.*--on_bad_image skip"
    with pytest.raises(ValueError, match=message):
        check_images(images, source="toy")
    kept, bad = check_images(images, "skip", "toy")
    assert bad == ["blue.png"]
    assert [one.number for one in kept] == [0, 2]


def test_unreadable_images_are_skipped_with_names_and_counts(images, tmp_path, caplog):
    content = (tmp_path / "red.png").read_bytes()
    (tmp_path / "red.png").write_bytes(content[: len(content) // 2])
    assert check_images(images) == (images, [])  # the file begins as an image; opening it is the error
    kept, bad = check_images(images, "skip", "toy")
    assert bad == ["red.png"]
    assert [one.number for one in kept] == [1]
    assert "toy: left out 1 of 2 images, and with them 2 of 3 examples, number 1, 3: " in caplog.text
    assert "red.png" in caplog.text
    (tmp_path / "blue.png").write_text("no image")
    with pytest.raises(ValueError, match="none of its 2 images can be read"):
        check_images(images, "skip", "toy")
    with pytest.raises(ValueError, match="on_bad_image: expected 'error' or 'skip', got 'blank'"):
        check_images(images, "blank")


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><p>404", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_files_that_are_no_images_are_found_before_training(images, tmp_path, content):
    (tmp_path / "red.png").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"toy: 1 of 2 images are missing or unreadable: .*red\.png.*--on_bad_image skip"
    ):
        check_images(images, source="toy")


@pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is not None, reason="pillow-heif opens HEIC")
def test_heic_images_that_cannot_be_opened_name_what_opens_them(tmp_path):
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(ValueError, match=r'IMG_1.HEIC.* HEIC opens after pip install "hivilt\[heif\]".$'):
        check_images([Record("1", str(tmp_path / "IMG_1.HEIC"))])


def test_a_long_list_of_missing_images_is_cut():
    with pytest.raises(ValueError, match="7 of 7 .*: 0, 1, 2, 3, 4 and 2 more. "):
        check_images([Record(str(n), str(n)) for n in range(7)])


def test_unreadable_image_in_a_table():
    stored = [{"bytes": b"no image", "path": "x.png"}, {"bytes": b"no image either", "path": None}]
    first, second = images_of(datasets.Dataset.from_dict({"image": stored}))
    with pytest.raises(ValueError, match=r"row 1 of column 'image' \(x.png\) is not a readable image"):
        open_image(first.image)
    with pytest.raises(ValueError, match="row 2 of column 'image' is not a readable image"):
        open_image(second.image)


def test_images_in_tables_are_checked_before_training(tmp_path):
    make_image("red").save(tmp_path / "a.png")
    good = (tmp_path / "a.png").read_bytes()
    stored = [{"bytes": good, "path": None}, {"bytes": b"<html>", "path": None}, {"bytes": b"404", "path": "c.png"}]
    rows = images_of(datasets.Dataset.from_dict({"image": stored}))
    records = [Record(row.image_id, row.image, number) for number, row in enumerate(rows)]
    message = (
        r"toy: 2 of 3 images are missing or unreadable: row 2 of column 'image', row 3 of column 'image' \(c.png\)"
    )
    with pytest.raises(ValueError, match=message):
        check_images(records, source="toy")
    kept, bad = check_images(records, "skip", source="toy")
    assert [one.number for one in kept] == [0] and len(bad) == 2


def test_table_that_holds_paths_of_images(images):
    table = datasets.Dataset.from_dict({"image": [one.image for one in images]})
    (first, *_) = images_of(table.cast_column("image", datasets.Image()))
    assert first.image_id == images[0].image
    assert open_image(first.image).getpixel((30, 22)) == (255, 0, 0)


def test_images_are_turned_upright_and_closed(tmp_path, recwarn):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    make_image("red", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    image = open_image(str(tmp_path / "turned.jpg"))
    assert image.size == (20, 30)
    assert np.asarray(image)[2, 17].max() < 60  # the dark corner, turned to the right
    del image
    assert not [warning for warning in recwarn if issubclass(warning.category, ResourceWarning)]


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp", "bmp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_the_size_of_an_image_is_that_of_the_opened_one(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{kind}"
    make_image("red", (30, 20)).save(path, exif=exif)
    assert image_size(str(path)) == open_image(str(path)).size
    assert image_size(str(path)) == ((20, 30) if orientation > 4 and kind != "bmp" else (30, 20))
    table = datasets.Dataset.from_dict({"image": [{"bytes": path.read_bytes(), "path": None}]})
    assert image_size(TableImage(table, 0, "image")) == image_size(str(path))


# Batches


def test_foreign_items_name_the_setting_that_spoils_them():
    check_items([{"captions": []}], "captions", "Collator", "Dataset")
    for item in ({"image": "x"}, "captions"):
        with pytest.raises(TypeError, match="Collator takes the items of a Dataset.*remove_unused_columns=False"):
            check_items([{"captions": []}, item], "captions", "Collator", "Dataset")


def test_targets_are_the_texts_of_all_rows_with_the_row_of_each():
    collator = Collator(make_processor())
    tokens = collator.processor.tokenizer.get_vocab()
    red, blue = [tokens["red"], 3, -100, -100], [tokens["blue"], 3, -100, -100]
    several = collator.targets([["red"], [], ["a red square", "blue"]])
    assert several["text_index"].tolist() == [0, 2, 2]
    assert several["labels"].tolist() == [red, [tokens["a"], tokens["red"], tokens["square"], 3], blue]
    assert collator.targets([["red"], ["blue"]]).keys() == {"labels"}
    # Rows in another order, or not all of them, are no pairs.
    assert collator.targets([[], ["blue"]])["text_index"].tolist() == [1]
    assert collator.targets([[], []]) == {}
