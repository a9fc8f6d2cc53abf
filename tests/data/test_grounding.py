"""Boxes: how files say them, that they stay on what they are around, and the way to batches."""

import json
import math
from functools import lru_cache

import datasets
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps
from transformers import CLIPImageProcessor, ConvNextImageProcessor, DetrImageProcessor, ViTImageProcessor

from hivilt import HiViLTProcessor
from hivilt.data.augmentation import Augmentation
from hivilt.data.grounding import (
    GroundedImage,
    GroundingCollator,
    GroundingColumns,
    GroundingDataset,
    read_grounding_table,
    to_relative,
)
from hivilt.data.tables import check_images
from tiny import IMAGE_SIZE, make_image, make_processor, make_tokenizer

SIZE = (40, 20)
ROWS = [
    {"image": "red.png", "expression": "the corner", "boxes": [[0, 0, 13, 7]]},
    {"image": "blue.png", "expression": "all cups", "boxes": [[10, 5, 20, 10], [30, 0, 40, 20]]},
    {"image": "red.png", "expression": "a cup", "boxes": []},
]


@pytest.fixture
def folder(tmp_path):
    """Two images, and nothing else yet."""
    make_image("red", SIZE).save(tmp_path / "red.png")
    make_image("blue", SIZE).save(tmp_path / "blue.png")
    return tmp_path


def write(folder, rows=ROWS, name="data.jsonl"):
    path = folder / name
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def read(folder, *boxes, **options):
    """The boxes of rows about one image, as many as these cells."""
    rows = [{"image": "red.png", "expression": f"cup {n}", "boxes": cell} for n, cell in enumerate(boxes)]
    return read_grounding_table(write(folder, rows), **options)[0].boxes


# Files


def test_rows_about_an_image_are_one_example(folder):
    red, blue = read_grounding_table(write(folder))
    assert red.image == str(folder / "red.png") and red.image_id == "red.png"
    assert red.expressions == ("the corner", "a cup") and red.kinds == ()
    assert red.boxes == (((0, 0, 13 / 40, 7 / 20),), ())
    assert blue.expressions == ("all cups",)
    assert blue.boxes == (((0.25, 0.25, 0.5, 0.5), (0.75, 0, 1, 1)),)


def test_csv_and_tables_say_the_same(folder):
    path = folder / "data.csv"
    lines = [f'{row["image"]},{row["expression"]},"{json.dumps(row["boxes"])}"' for row in ROWS]
    path.write_text("\n".join(["image,expression,boxes", *lines]) + "\n", encoding="utf-8")
    expected = read_grounding_table(write(folder))
    assert read_grounding_table(path) == expected
    assert read_grounding_table(datasets.Dataset.from_list(ROWS), folder=folder) == expected
    arrays = [row | {"boxes": np.array(row["boxes"], dtype=np.float32)} for row in ROWS]
    assert read_grounding_table(arrays, folder=folder) == expected
    table = datasets.Dataset.from_list(ROWS).map(lambda row: {"image": Image.open(folder / row["image"])})
    inside = read_grounding_table(table.cast_column("image", datasets.Image()))
    assert [(one.expressions, one.boxes) for one in inside] == [(one.expressions, one.boxes) for one in expected]


def test_columns_may_have_other_names_and_an_expression_other_words(folder):
    rows = [{"file": "red.png", "id": 7, "captions": ["the corner", "dark", "dark"], "bbox": [0, 0, 13, 7]}]
    (found,) = read_grounding_table(write(folder, rows), GroundingColumns("file", "captions", "bbox", "id"))
    assert (found.image_id, found.expressions) == ("7", ("the corner", "dark"))
    assert found.boxes == (((0, 0, 13 / 40, 7 / 20),),) * 2


@pytest.mark.parametrize(
    ("form", "unit", "box"),
    [
        ("xyxy", "pixel", [10, 5, 30, 15]),
        ("xywh", "pixel", [10, 5, 20, 10]),
        ("cxcywh", "pixel", [20, 10, 20, 10]),
        ("xyxy", "relative", [0.25, 0.25, 0.75, 0.75]),
        ("xywh", "relative", [0.25, 0.25, 0.5, 0.5]),
        ("cxcywh", "relative", [0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_every_form_and_unit(folder, form, unit, box):
    expected = ((0.25, 0.25, 0.75, 0.75),)
    assert to_relative([box], form, unit, SIZE) == expected
    assert read(folder, [box], box_form=form, box_unit=unit) == (expected,)


def test_relative_boxes_need_no_image(tmp_path):
    rows = [{"image": "missing.png", "expression": "a cup", "boxes": [[0, 0, 0.5, 0.5]]}]
    (found,) = read_grounding_table(write(tmp_path, rows), box_unit="relative")
    assert found.boxes == (((0, 0, 0.5, 0.5),),)


def test_pixels_count_in_the_image_as_it_is_shown(tmp_path):
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=turned)
    rows = [{"image": "a.jpg", "expression": "a cup", "boxes": [[0, 0, 20, 40]]}]
    assert read_grounding_table(write(tmp_path, rows))[0].boxes == (((0, 0, 1, 1),),)


@pytest.mark.parametrize(
    ("box", "unit", "expected"),
    [
        ([-1, 0, 41, 20.5], "pixel", (0, 0, 1, 1)),
        ([-0.001, 0.5, 0.5, 1.0009], "relative", (0, 0.5, 0.5, 1)),
    ],
)
def test_what_reaches_a_pixel_beyond_the_image_is_cut(box, unit, expected):
    assert to_relative([box], unit=unit, size=SIZE) == (expected,)


@pytest.mark.parametrize(
    ("box", "options", "message"),
    [
        ([10, 5, 30], {}, r"expected the four numbers of xyxy, got \[10, 5, 30\]; write \[\[12, 8, 40, 31\]\]"),
        ([10, 5, 30, 15, 1], {"box_form": "xywh"}, "expected the four numbers of xywh, got"),
        ([10, 5, "30", 15], {}, "expected the four numbers of xyxy"),
        ([10, 5, True, 15], {}, "expected the four numbers of xyxy"),
        ([], {}, r"expected the four numbers of xyxy, got \[\]"),
        (None, {}, "expected the four numbers of xyxy, got None"),
        ([math.nan, 5, 30, 15], {}, r"got \[nan, 5.0, 30.0, 15.0\] .*, which is not finite; .* or drop the row"),
        ([10, 5, math.inf, 15], {"box_unit": "relative"}, "which is not finite"),
        ([10, 5, 10**400, 15], {}, "which is not finite"),
        ([30, 5, 10, 15], {}, "ends where it begins or before it; if its last two .*: box_form='xywh'"),
        ([10, 5, 10, 15], {}, "ends where it begins or before it"),
        ([10, 15, 30, 15], {}, "ends where it begins or before it"),
        ([10, 5, 0, 15], {"box_form": "xywh"}, "which is empty; give a width and a height above 0"),
        ([10, 5, 4, -1], {"box_form": "cxcywh"}, "which is empty; give a width and a height above 0"),
        ([30, 5, 42, 15], {}, "which reaches 2 beyond an image of 40 x 20 pixels; cut it at the edge, or look whether"),
        ([-3, 5, 10, 15], {}, "which reaches 3 beyond"),
        ([40.5, 5, 41, 15], {}, "which reaches 1 beyond"),  # nothing is left of it
        ([30, 5, 35, 15], {"box_form": "xywh"}, "reaches 25 beyond .*; if its last two .*: box_form='xyxy'; else cut"),
        ([1, 5, 10, 8], {"box_form": "cxcywh"}, "reaches 4 beyond .*; if its last two .*: box_form='xyxy'"),
        ([10, 5, 30, 15], {"box_unit": "relative"}, "above 1: these are probably pixels, box_unit='pixel'"),
        ([0.5, 0.5, 1.02, 1], {"box_unit": "relative"}, "probably pixels, box_unit='pixel'; else cut it at the edge"),
        ([0.9, 0.5, 0.5, 0.1], {"box_unit": "relative", "box_form": "xywh"}, "reaches 0.4 beyond an image; if its"),
        ([0, 0.1, 0.5, 0.9], {}, "at most a pixel in the corner of an .* 40 x 20 .* relative: box_unit='relative'"),
    ],
)
def test_a_box_that_cannot_be_is_refused_with_file_row_and_way_out(folder, box, options, message):
    with pytest.raises(ValueError, match=rf"data.jsonl, row 2: column 'boxes', box 2: .*{message}"):
        read(folder, [], [[10, 5, 11, 6] if "box_unit" not in options else [0, 0, 0.1, 0.1], box], **options)


def test_corners_that_are_read_as_sizes_are_warned_of(folder, caplog):
    corners = [[[2, 2, 12, 8]]] * 9
    read(folder, *corners, box_form="xywh")
    read(folder, *corners, [[10, 5, 30, 15]])
    read(folder, *corners, [[10, 5, 4, 6]], box_form="xywh")
    assert not caplog.records
    read(folder, *corners, [[0, 0, 12, 8]], [], box_form="xywh")
    assert "last two numbers of all 10 boxes are above the first two" in caplog.text
    assert "as box_form='xywh' says, or take 'xyxy'" in caplog.text


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (12, "should hold a list of boxes, each of four numbers, got int 12; write"),
        ("12 8 40 31", "should hold a list of boxes.*got str '12 8 40 31'"),
        ({"x": 1}, "should hold a list of boxes.*got dict"),
        ("[[1, 2, 3", r"should hold a list of boxes.*got str '\[\[1, 2, 3'"),
    ],
)
def test_a_cell_that_holds_no_boxes_is_refused(folder, cell, message):
    with pytest.raises(TypeError, match=f"data.jsonl, row 1: column 'boxes' {message}"):
        read(folder, cell)


@pytest.mark.parametrize("cell", [None, "", "  ", math.nan, "left out"])
def test_boxes_that_are_missing_are_not_known_and_none_are_none(folder, cell):
    rows = [dict(ROWS[0]), ROWS[2] | {"boxes": cell}]
    if cell == "left out":
        del rows[1]["boxes"]
    path = write(folder, rows)
    with pytest.raises(
        ValueError, match=r"row 2: column 'boxes' is empty, null or missing, so it is not known what 'a cup'"
    ):
        read_grounding_table(path)
    (found,) = read_grounding_table(path, boxes_needed=False)
    assert found.boxes == (((0, 0, 13 / 40, 7 / 20),), None)
    with pytest.raises(ValueError, match=r"boxes of 'a cup' in image 'red.png' are not known: .* give them, or \(\)"):
        GroundingDataset([found], seed=0)
    batch = GroundingCollator(make_processor())([GroundingDataset([found])[0]])
    assert "labels" not in batch and batch["expression_index"].tolist() == [0, 1]


def test_a_file_without_boxes_can_only_be_looked_for(folder, caplog):
    path = write(folder, [{"image": "red.png", "expression": "a cup"}])
    with pytest.raises(ValueError, match="boxes_column: data.jsonl has no column 'boxes'"):
        read_grounding_table(path)
    (found,) = read_grounding_table(path, boxes_needed=False)
    assert found.boxes == (None,) and "expressions are looked for, accuracy is not measured" in caplog.text


def test_a_misspelled_column_is_not_a_missing_one(folder):
    rows = [ROWS[0], {"image": "red.png", "expression": "a cup", "boxs": []}]
    with pytest.raises(ValueError, match="row 2: has 'boxs' where other rows have 'boxes'"):
        read_grounding_table(write(folder, rows), boxes_needed=False)


def test_an_expression_has_the_same_boxes_in_every_row(folder):
    rows = [ROWS[0], ROWS[0]]
    assert read_grounding_table(write(folder, rows))[0].expressions == ("the corner",)
    rows[1] = ROWS[0] | {"boxes": [[20, 10, 30, 20]]}
    with pytest.raises(
        ValueError, match="row 2: 'the corner' has other boxes than in data.jsonl, row 1, .* put all boxes"
    ):
        read_grounding_table(write(folder, rows))


@pytest.mark.parametrize(
    ("expression", "error", "message"),
    [
        ("", ValueError, "the expression is empty; write one or drop the row"),
        ([], ValueError, "the expression is empty"),
        (3, TypeError, "should hold an expression as text, or a list of them, got int 3"),
    ],
)
def test_an_expression_is_a_text(folder, expression, error, message):
    with pytest.raises(error, match=f"row 1: column 'expression'.* {message}"):
        read_grounding_table(write(folder, [ROWS[0] | {"expression": expression}]))


def test_unknown_forms_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="box_form: expected one of 'xyxy', 'xywh', 'cxcywh', got 'yxyx'"):
        read_grounding_table(tmp_path / "missing.jsonl", box_form="yxyx")
    with pytest.raises(ValueError, match="box_unit: expected one of 'pixel', 'relative', got 'pixels'"):
        read_grounding_table(tmp_path / "missing.jsonl", box_unit="pixels")
    with pytest.raises(ValueError, match="size: boxes in pixels need the image's width and height"):
        to_relative([[0, 0, 2, 2]])


def test_an_image_that_cannot_be_read_is_left_to_the_check_of_images(folder):
    (folder / "blue.png").write_bytes(b"no image")
    examples = read_grounding_table(write(folder))
    assert [one.boxes for one in examples] == [(((0, 0, 13 / 40, 7 / 20),), ()), (None,)]
    with pytest.raises(ValueError, match="1 of 2 images are missing or unreadable: .*blue.png"):
        check_images(examples)
    assert check_images(examples, "skip")[0] == examples[:1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expressions": ("a", "b")}, "expected one of each for the 2 expressions of image 'x' .*, got 1 and 0"),
        ({"kinds": ("relation", "none")}, "for the 1 expressions .* got 1 and 2"),
        ({"boxes": (((0, 0, 10, 10),),)}, r"expected \(left, top, right, bottom\) within \[0, 1\] .*`to_relative`"),
        ({"boxes": (((0.5, 0, 0.5, 1),),)}, "within"),
        ({"boxes": (((0, 0, math.nan, 1),),)}, "within"),
        ({"boxes": (((0, 0, 1),),)}, "within"),
        ({"boxes": ((0.1, 0.2, 0.3, 0.4),)}, "within .* got 0.1;"),
        ({"boxes": ((("0.1", "0.2", "0.3", "0.4"),),)}, "within"),
    ],
)
def test_an_example_holds_relative_boxes_of_each_expression(fields, message):
    with pytest.raises(ValueError, match=message):
        GroundedImage(**({"image": "", "image_id": "x", "expressions": ("a",), "boxes": ((),)} | fields))


# Data set


def many(num_images, num_expressions=5):
    """Images that are never opened."""
    texts = tuple(f"cup {number}" for number in range(num_expressions))
    boxes = tuple(((0, 0, 1, (number + 1) / num_expressions),) for number in range(num_expressions))
    return [GroundedImage("", str(number), texts, boxes) for number in range(num_images)]


def test_items_hold_an_image_and_its_expressions():
    dataset = GroundingDataset(many(2, 3))
    assert dataset.texts == ["cup 0", "cup 1", "cup 2"] * 2 and dataset.image_of_expression == [0, 0, 0, 1, 1, 1]
    item = dataset[1]
    assert item["expression_index"] == [3, 4, 5] and "draw" not in item
    assert item["boxes"] == [((0, 0, 1, 1 / 3),), ((0, 0, 1, 2 / 3),), ((0, 0, 1, 1),)]


def test_expressions_are_drawn_anew_in_every_epoch_with_their_boxes():
    dataset, seen = GroundingDataset(many(4), expressions_per_image=2, seed=0), set()
    for epoch in range(20):
        dataset.set_epoch(epoch)
        for number in range(4):
            item = dataset[number]
            assert len(set(item["expression_index"])) == 2
            for text, boxes, index in zip(item["expressions"], item["boxes"], item["expression_index"], strict=True):
                assert dataset.texts[index] == text and dataset.image_of_expression[index] == number
                assert boxes == dataset.examples[number].boxes[index - 5 * number]
            seen.add((number, *item["expression_index"]))
    assert len(seen) > 50
    assert [GroundingDataset(many(1, 2), 5, seed=0)[0]["expression_index"]] == [[0, 1]]


@pytest.mark.parametrize("options", [{"expressions_per_image": 0, "seed": 0}, {"expressions_per_image": 2}])
def test_draws_need_a_number_and_a_seed(options):
    with pytest.raises(ValueError, match="expressions_per_image: expected at least 1, with a seed"):
        GroundingDataset(many(1), **options)


def test_no_example_and_none_without_expression():
    with pytest.raises(ValueError, match="a dataset needs at least one"):
        GroundingDataset([])
    with pytest.raises(ValueError, match="image '1' has no expression"):
        GroundingDataset([many(1)[0], GroundedImage("", "1")])


def test_training_is_told_where_all_expressions_mean_something_and_refused_where_none_does(caplog):
    nothing = GroundedImage("", "1", ("a cup",), ((),))
    GroundingDataset(many(2))
    GroundingDataset([*many(2), nothing], seed=0)
    assert not caplog.records
    GroundingDataset(many(2), seed=0)
    assert "Each of the 10 expressions to train on means something in its image" in caplog.text
    assert "whatever it is asked" in caplog.text and r"their boxes []" in caplog.text
    GroundingDataset([nothing])
    with pytest.raises(ValueError, match="none of the 1 expressions means anything in its image"):
        GroundingDataset([nothing], seed=0)


# Batches


def test_a_batch_holds_each_image_once_and_the_boxes_of_each_expression(folder):
    dataset = GroundingDataset(read_grounding_table(write(folder)))
    processor = make_processor()
    batch = GroundingCollator(processor)([dataset[1], dataset[0]])
    assert list(batch)[0] == "input_ids"
    assert [processor.decode(row, skip_special_tokens=True) for row in batch["input_ids"]] == [
        processor.decode(processor(text=text)["input_ids"], skip_special_tokens=True)
        for text in ("all cups", "the corner", "a cup")
    ]
    assert batch["pixel_values"].shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert batch["image_index"].tolist() == [0, 1, 1] and batch["expression_index"].tolist() == [2, 0, 1]
    found = [label["boxes"] for label in batch["labels"]]
    assert {boxes.dtype for boxes in found} == {torch.float32} and [boxes.shape for boxes in found] == [
        (2, 4),
        (1, 4),
        (0, 4),
    ]
    torch.testing.assert_close(found[0], torch.tensor([[0.375, 0.375, 0.25, 0.25], [0.875, 0.5, 0.25, 1]]))
    torch.testing.assert_close(found[1], torch.tensor([[13 / 80, 7 / 40, 13 / 40, 7 / 20]]))


def test_one_expression_an_image_needs_no_index(folder):
    dataset = GroundingDataset(read_grounding_table(write(folder, ROWS[:2])))
    assert "image_index" not in GroundingCollator(make_processor())([dataset[0], dataset[1]])


@pytest.mark.parametrize("mode", ["swap", "skip"])
def test_words_turn_with_a_mirrored_image_and_its_boxes(folder, mode):
    rows = [{"image": "red.png", "expression": "corner on the left", "boxes": [[0, 0, 13, 6]]}]
    rows += [{"image": "red.png", "expression": "what", "boxes": [[0, 0, 40, 20]]}]
    dataset, said = GroundingDataset(read_grounding_table(write(folder, rows)), seed=0), []

    class Heard(HiViLTProcessor):
        def __call__(self, images=None, text=None, **options):
            said.append(text)
            return super().__call__(images=images, text=text, **options)

    parts = make_processor()
    collator = GroundingCollator(Heard(parts.image_processor, parts.tokenizer), Augmentation(random_flip=mode))
    places = {}
    for epoch in range(20):
        dataset.set_epoch(epoch)
        batch = collator([dataset[0]])
        boxes = torch.cat([label["boxes"] for label in batch["labels"]])
        places[said[-1][0]] = boxes[0, 0].item()
        torch.testing.assert_close(boxes[1], torch.tensor([0.5, 0.5, 1, 1]))
        dark = batch["pixel_values"][0, 0, 0, : IMAGE_SIZE // 2].mean() < batch["pixel_values"][0, 0, 0].mean()
        assert dark == (said[-1] == ["corner on the left", "what"])
    expected = {"corner on the left": 13 / 80} | ({"corner on the right": 67 / 80} if mode == "swap" else {})
    assert places == pytest.approx(expected)


def test_only_items_of_its_data_set():
    with pytest.raises(TypeError, match="GroundingCollator takes the items of a GroundingDataset"):
        GroundingCollator(make_processor())([{"image": "", "captions": []}])


# What the model sees

RED, BLUE = (255, 0, 0), (0, 0, 255)
TO_STORED = {  # what undoes the turn that the EXIF data asks for
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("painted")


@lru_cache
def collator_of(height, width):
    options = {"size": {"height": height, "width": width}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return GroundingCollator(HiViLTProcessor(ViTImageProcessor(**options), make_tokenizer()))


@given(
    sides=st.tuples(st.integers(20, 90), st.integers(20, 90)),
    start=st.tuples(st.floats(0, 0.8), st.floats(0, 0.8)),
    extent=st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)),
    orientation=st.sampled_from([*TO_STORED]),
    ending=st.sampled_from(["png", "tif", "webp"]),
    form=st.sampled_from(["xyxy", "xywh", "cxcywh"]),
    unit=st.sampled_from(["pixel", "relative"]),
    crop=st.sampled_from([None, 0.2, 0.6]),
    flip=st.sampled_from([None, "swap"]),
    operations=st.sampled_from([None, (2, 9)]),
    squash=st.sampled_from([(24, 33), (40, 40), (70, 16)]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=100, deadline=None)
def test_a_painted_box_is_found_in_pixel_values(
    place, sides, start, extent, orientation, ending, form, unit, crop, flip, operations, squash, seed
):
    left, top = (int(part * side) for part, side in zip(start, sides, strict=True))
    right, bottom = (
        min(side, begin + max(3, round(part * side)))
        for begin, part, side in zip((left, top), extent, sides, strict=True)
    )
    shown = Image.new("RGB", sides, BLUE)
    shown.paste(RED, (left, top, right, bottom))
    stored = shown if orientation == 1 else shown.transpose(TO_STORED[orientation])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    name = f"image.{ending}"
    stored.save(place / name, exif=exif, **({"lossless": True} if ending == "webp" else {}))
    assert np.array_equal(ImageOps.exif_transpose(Image.open(place / name)).convert("RGB"), shown)

    box = np.array([left, top, right, bottom], dtype=float)
    if form != "xyxy":
        box[2:] -= box[:2]
    if form == "cxcywh":
        box[:2] += box[2:] / 2
    box = box / (1 if unit == "pixel" else np.array([*sides, *sides]))
    rows = [{"image": name, "expression": "the red thing", "boxes": [box.tolist()]}]
    dataset = GroundingDataset(read_grounding_table(rows, folder=place, box_form=form, box_unit=unit), seed=seed)
    height, width = squash
    collator = collator_of(height, width)
    collator.augmentation = Augmentation(crop, flip, operations)
    batch = collator([dataset[0]])

    red = (batch["pixel_values"][0, 0] > batch["pixel_values"][0, 2]).numpy()
    cx, cy, w, h = batch["labels"][0]["boxes"][0].tolist()
    expected = [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
    assert w > 0 and h > 0 and min(expected) > -1e-3 and expected[2] < width + 1e-3 and expected[3] < height + 1e-3
    assume(min(w * width, h * height) > 1.5)  # less than that need not outweigh what is around it
    y, x = np.nonzero(red)
    found = [x.min(), y.min(), x.max() + 1, y.max() + 1]
    assert found == pytest.approx(expected, abs=1)
    assert red[y.min() + 1 : y.max(), x.min() + 1 : x.max()].all()


@pytest.mark.parametrize(
    ("image_processor", "told"),
    [
        (
            CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=28),
            "by do_center_crop, .*{.*false, .*: 28, .*: 28}",
        ),
        (DetrImageProcessor(size={"height": 32, "width": 32}), 'by do_pad, .*{"do_pad": false}'),
        (ConvNextImageProcessor(size={"shortest_edge": 32}), "so boxes .* Take one that squashes them"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_image_processor_that_does_not_show_the_whole_is_refused(image_processor, told):
    with pytest.raises(
        ValueError, match=f"image_processor: {type(image_processor).__name__} crops or pads images.*{told}"
    ):
        GroundingCollator(HiViLTProcessor(image_processor, make_tokenizer()))


@pytest.mark.parametrize(
    "image_processor",
    [
        ViTImageProcessor(size={"height": 9, "width": 30}),
        CLIPImageProcessor(size={"height": 28, "width": 28}, do_center_crop=False),
        CLIPImageProcessor(size={"height": 28, "width": 20}, crop_size={"height": 28, "width": 20}),  # cuts nothing off
        CLIPImageProcessor(size={"shortest_edge": 28}, do_center_crop=False),
        ConvNextImageProcessor(size={"shortest_edge": 384}),
        DetrImageProcessor(size={"height": 32, "width": 32}, do_pad=False),
        ViTImageProcessor(size={"height": 20, "width": 20}, do_normalize=False, do_rescale=False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_image_processor_that_shows_the_whole_is_taken(image_processor):
    HiViLTProcessor(image_processor, make_tokenizer()).check_whole_images()


def test_augmentation_is_of_training_alone_and_the_same_with_workers(folder):
    examples = read_grounding_table(write(folder))
    collator = GroundingCollator(make_processor(), Augmentation(0.3, "swap", (2, 7)))
    plain = GroundingCollator(make_processor())
    test = GroundingDataset(examples)
    for one, other in zip(collator([test[0]])["labels"], plain([test[0]])["labels"], strict=True):
        assert torch.equal(one["boxes"], other["boxes"])
    dataset = GroundingDataset(examples, seed=0)
    loaders = [
        torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=collator, num_workers=workers)
        for workers in (0, 1)
    ]
    seen = set()
    for epoch in range(3):
        dataset.set_epoch(epoch)
        (own,), (foreign,) = map(list, loaders)
        assert torch.equal(own["pixel_values"], foreign["pixel_values"])
        for one, other in zip(own["labels"], foreign["labels"], strict=True):
            assert torch.equal(one["boxes"], other["boxes"])
        seen.add(tuple(own["labels"][0]["boxes"].flatten().tolist()))
    assert len(seen) == 3
