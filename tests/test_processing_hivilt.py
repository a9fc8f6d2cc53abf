"""The processor: what it pairs, how it takes keywords, which images and texts it reads, and what it refuses."""

import inspect
import io
import json
import logging
import math
import os
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader, default_collate
from transformers import (
    AutoProcessor,
    BertTokenizerFast,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    DataCollatorWithPadding,
    Owlv2ImageProcessorPil,
    SiglipImageProcessorPil,
    Trainer,
    TrainingArguments,
    ViltImageProcessorPil,
    ViTImageProcessor,
    ViTImageProcessorPil,
    default_data_collator,
)

from hivilt import HiViLTForQuestionAnswering, HiViLTForVisualGrounding, HiViLTProcessor, processing_hivilt
from hivilt.processing_hivilt import load_image, well_formed
from tiny import IMAGE_SIZE, MODEL_CLASSES, WORDS, make_image, make_model, make_processor, make_tokenizer

QUESTION = "what color is the square"
PROCESSOR = make_processor()
IMAGE = make_image()
ORIENTATION = 0x0112  # the EXIF tag


@pytest.fixture
def told(monkeypatch):
    """Everything the library says, with the truncation warning not yet given."""
    monkeypatch.setattr(HiViLTProcessor, "_told_of_truncation", False)
    monkeypatch.setattr(HiViLTProcessor, "_told_of_unknown", False)
    records = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    handler = Keep()
    logger = logging.getLogger("hivilt.processing_hivilt")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def ids_of(text: str) -> list[int]:
    return PROCESSOR.tokenizer(text)["input_ids"]


# Pairing


def test_one_text_for_each_image():
    images = [make_image("red"), make_image("blue")]
    inputs = PROCESSOR(images=images, text=[QUESTION, "is there a circle"], return_tensors="pt")
    assert "image_index" not in inputs
    assert inputs["pixel_values"].shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert inputs["input_ids"].tolist() == [ids_of(QUESTION), ids_of("is there a circle") + [0]]
    assert inputs["attention_mask"].tolist() == [[1] * 7, [1] * 6 + [0]]
    # A turned or repainted image gives other pixels, in its own place.
    assert inputs["pixel_values"][0, 0].mean() > inputs["pixel_values"][0, 2].mean()
    assert inputs["pixel_values"][1, 0].mean() < inputs["pixel_values"][1, 2].mean()


@pytest.mark.parametrize("images", [make_image(), [make_image()]], ids=["image", "list of one"])
def test_several_questions_about_one_image(images):
    inputs = PROCESSOR(images=images, text=["is the square red", "is it blue", "yes"], return_tensors="pt")
    assert inputs["image_index"].tolist() == [0, 0, 0] and inputs["image_index"].dtype == torch.long
    assert inputs["pixel_values"].shape[0] == 1 and inputs["input_ids"].shape[0] == 3


def test_lists_of_one_image_each_pair_as_the_images():
    images = [make_image("red"), make_image("blue")]
    for text in (["yes", "no"], [["yes"], ["no"]], [["yes", "no"], ["red"]]):
        expected = PROCESSOR(images=images, text=text, return_tensors="pt")
        found = PROCESSOR(images=[[one] for one in images], text=text, return_tensors="pt")
        torch.testing.assert_close(dict(found), dict(expected))
        assert ("image_index" in found) == (len(text[0]) == 2 and text[0] != "no")
    assert PROCESSOR(images=[[images[0]]], text=["yes", "no"])["image_index"] == [0, 0]


# One image and one text, encoded alone

COLORS = ["red", "blue", "lime", "white", "navy"]
ASKED = ["what color", "is there a red circle in the image", "is it blue", "what shape is the square", "yes"]
ALIKE = {"padding": "max_length", "max_length": 12}


@pytest.fixture(scope="module")
def model():
    """Large weights, so that image and question decide what comes out."""
    return make_model(HiViLTForQuestionAnswering, weight_scale=6)


@pytest.fixture(scope="module")
def alone(model):
    """The logits of each question by itself."""
    with torch.no_grad():
        rows = [
            model(**PROCESSOR(images=make_image(color), text=text, return_tensors="pt")).logits[0]
            for color, text in zip(COLORS, ASKED, strict=True)
        ]
    # Not the same whatever is shown and asked, or no mix-up could be seen.
    shown = model(**PROCESSOR(images=[make_image(color) for color in COLORS], text=[ASKED[1]] * 5, return_tensors="pt"))
    assert torch.pdist(torch.stack(rows)).min() > 1e-2 and torch.pdist(shown.logits).min() > 1e-2
    return torch.stack(rows)


def rows_of_images():
    return [{"image": make_image(color), "text": text} for color, text in zip(COLORS, ASKED, strict=True)]


@torch.no_grad()
def assert_answers_are(model, batches, expected):
    found = torch.cat([model(**batch).logits for batch in batches])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("squeezed", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
@pytest.mark.parametrize("collate", [default_collate, default_data_collator])
def test_encodings_stacked_by_the_default_collator_answer_as_each_alone(model, alone, collate, batch_size, squeezed):
    items = [
        dict(PROCESSOR(images=row["image"], text=row["text"], return_tensors="pt", **ALIKE)) for row in rows_of_images()
    ]
    if squeezed:
        items = [{name: value.squeeze() for name, value in item.items()} for item in items]
    assert_answers_are(model, DataLoader(items, batch_size, collate_fn=collate), alone)


def test_encodings_of_several_lengths_are_padded_by_the_tokenizers_collator(model, alone):
    items = []
    for row in rows_of_images():
        encoded = PROCESSOR(images=row["image"], text=[row["text"]], return_tensors="np")
        items.append({name: value[0] for name, value in encoded.items()})
    collate = DataCollatorWithPadding(PROCESSOR.tokenizer)
    assert_answers_are(model, DataLoader(items, 2, collate_fn=collate), alone)


@pytest.mark.parametrize("how", ["map", "map, batched", "set_transform", "with_transform"])
def test_a_dataset_encoded_row_by_row_or_in_batches_answers_as_each_alone(model, alone, how):
    def encode(rows):
        return PROCESSOR(images=rows["image"], text=rows["text"], **ALIKE)

    rows = Dataset.from_list(rows_of_images(), features=Features(image=ImageFeature(), text=Value("string")))
    if how.startswith("map"):
        batches = {"batched": True, "batch_size": 2} if "batched" in how else {}
        rows = rows.map(encode, remove_columns=rows.column_names, keep_in_memory=True, **batches).with_format("torch")
    elif how == "set_transform":
        rows.set_transform(encode)
    else:
        rows = rows.with_transform(encode)
    for batch_size in (1, 2, 5):
        assert_answers_are(model, DataLoader(rows, batch_size, collate_fn=default_data_collator), alone)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_plain_trainer_predicts_as_each_alone_with_its_own_collator(model, alone, batch_size, tmp_path):
    def encode(rows):
        labels = torch.arange(len(rows["text"])) % 5
        return {**PROCESSOR(images=rows["image"], text=rows["text"], return_tensors="pt", **ALIKE), "labels": labels}

    rows = Dataset.from_list(rows_of_images(), features=Features(image=ImageFeature(), text=Value("string")))
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "remove_unused_columns": False}
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=batch_size, **quiet)
    found = Trainer(model, arguments).predict(rows.with_transform(encode))
    torch.testing.assert_close(torch.tensor(found.predictions), alone, atol=1e-5, rtol=1e-4)


def test_encodings_that_are_lists_are_refused_by_name_where_they_do_not_stack(model):
    items = [dict(PROCESSOR(images=IMAGE, text="yes", **ALIKE)) for _ in range(2)]
    with pytest.raises(ValueError, match='`input_ids` must be a tensor, got a list.*return_tensors="pt"'):
        model(**default_collate(items))


def test_stacked_encodings_of_several_questions_an_image_are_refused(model):
    items = [dict(PROCESSOR(images=IMAGE, text=["yes", "no"], return_tensors="pt", **ALIKE)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"\(texts, tokens\), got .*\(2, 2, 12\).*`image_index`"):
        model(**default_collate(items))


def test_either_alone():
    texts = PROCESSOR(text=[QUESTION, "yes"], return_tensors="pt")
    assert set(texts) == {"input_ids", "attention_mask"} and texts["input_ids"].shape == (2, 7)
    images = PROCESSOR(images=[make_image()] * 3, return_tensors="pt")
    assert set(images) == {"pixel_values"} and images["pixel_values"].shape[0] == 3


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    groups=st.lists(
        st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join), max_size=3),
        min_size=1,
        max_size=4,
    ).filter(any)
)
def test_nested_texts_keep_their_order_and_their_images(groups):
    images = [np.full((3, 4, 3), 20 * number, np.uint8) for number in range(len(groups))]
    inputs = PROCESSOR(images=images, text=groups, return_tensors="pt")
    expected = [(number, text) for number, group in enumerate(groups) for text in group]
    owners = [number for number, _ in expected]
    row_by_row = owners == list(range(len(groups)))
    assert "image_index" not in inputs if row_by_row else inputs["image_index"].tolist() == owners
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    assert rows == [ids_of(text) for _, text in expected]
    # Each image once and in order, those without a text too: they grow lighter.
    means = inputs["pixel_values"].mean(dim=(1, 2, 3))
    assert len(means) == len(groups) and (means.diff() > 0).all()


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> list[tuple[Image.Image, Path, torch.Tensor]]:
    """Images, their files, and the pixels of each encoded by itself."""
    folder, images = tmp_path_factory.mktemp("shown"), [make_image(color) for color in COLORS]
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    pixels = [PROCESSOR(images=image, return_tensors="pt")["pixel_values"][0] for image in images]
    return [(image, folder / f"{number}.png", pixels[number]) for number, image in enumerate(images)]


@given(st.data(), st.integers(2, 3), st.sampled_from(["one each", "nested", "several of one list", "one", "no text"]))
def test_lists_of_images_give_each_text_its_own_in_order_and_each_image_once(shown, data, length, how):
    """However texts are nested, and whatever images lists share, as objects, as paths or as copies."""
    image = st.tuples(st.integers(0, 4), st.sampled_from(["object", "path", "text of a path", "copy"]))
    row = st.lists(image, min_size=length, max_size=length)
    texts = st.lists(st.sampled_from(["red", "is it blue", "two circle"]), min_size=how != "nested", max_size=3)
    rows = data.draw(
        st.lists(st.tuples(row, texts), min_size=1, max_size=4).filter(lambda rows: any(r[1] for r in rows))
    )
    if how in ("several of one list", "one"):
        rows = rows[:1]
    if how in ("one each", "one", "no text"):
        rows = [(images, texts[:1]) for images, texts in rows]
    nested = [texts for _, texts in rows]
    asked = [(images, text) for images, texts in rows for text in texts]
    flat = [text for _, text in asked]
    text = {"nested": nested, "one": flat[0], "no text": None}.get(how, flat)

    lists, known = [], set()
    for number, (images, _) in enumerate(rows):
        lists.append([])
        for place, (n, form) in enumerate(images):
            opened, file, _ = shown[n]
            given = {"object": opened, "path": file, "text of a path": str(file), "copy": opened.copy()}[form]
            lists[-1].append(given)
            known.add(("copy", number, place) if form == "copy" else (form == "object", n))
    inputs = PROCESSOR(images=lists, text=text, return_tensors="pt")

    if text is not None:
        masked = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        assert [ids[mask.bool()].tolist() for ids, mask in masked] == [ids_of(one) for one in flat]
    pixels = inputs["pixel_values"]
    if "image_index" in inputs:
        assert len(pixels) == len(known)
        pixels = pixels[inputs["image_index"]]
    elif isinstance(text, list):
        assert pixels.shape[:2] == (len(asked), length)
    pixels = pixels.view(len(asked), length, 3, IMAGE_SIZE, IMAGE_SIZE)
    for found, (images, _) in zip(pixels, asked, strict=True):
        assert torch.equal(found, torch.stack([shown[n][2] for n, _ in images]))


def test_what_it_returns_is_what_the_model_takes():
    model = make_model(HiViLTForQuestionAnswering)
    nested = [["is the square red", "no"], ["yes"]]
    inputs = PROCESSOR(images=[make_image("red"), make_image("blue")], text=nested, return_tensors="pt")
    assert list(inputs) == [*PROCESSOR.model_input_names, "image_index"]
    for model_class in MODEL_CLASSES:
        assert set(inputs) <= set(inspect.signature(model_class.forward).parameters)
    assert model(**inputs).logits.shape == (3, 5)


def test_what_a_tokenizer_gives_besides_is_named_and_taken():
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red"])})
    processor = HiViLTProcessor(PROCESSOR.image_processor, tokenizer)
    inputs = processor(images=make_image(), text="red", return_tensors="pt")
    assert "token_type_ids" in inputs and set(inputs) == set(processor.model_input_names)
    assert make_model(HiViLTForQuestionAnswering)(**inputs).logits.shape == (1, 5)


# Keywords


@pytest.mark.parametrize(
    "keywords",
    [
        {"padding": "max_length", "max_length": 11, "do_rescale": True, "rescale_factor": -1.0},
        {
            "text_kwargs": {"padding": "max_length", "max_length": 11},
            "images_kwargs": {"do_rescale": True, "rescale_factor": -1.0},
        },
    ],
    ids=["flat", "nested"],
)
def test_keywords_reach_their_part_flat_or_nested(keywords):
    inputs = PROCESSOR(images=make_image(), text=QUESTION, return_tensors="pt", **keywords)
    assert inputs["input_ids"].shape == (1, 11)
    assert inputs["pixel_values"].mean() < -10


def test_common_keywords_and_those_missing_from_a_group():
    nested = {"text_kwargs": {"padding": "max_length", "max_length": 9}, "common_kwargs": {"return_tensors": "pt"}}
    assert PROCESSOR(images=make_image(), text=QUESTION, **nested)["input_ids"].shape == (1, 9)
    inputs = PROCESSOR(images=make_image(), text=QUESTION, text_kwargs={}, return_tensors="pt")
    assert all(isinstance(value, torch.Tensor) for value in inputs.values())


def test_defaults_of_the_parts_are_preserved_and_overridden():
    tokenizer = make_tokenizer()
    tokenizer.init_kwargs |= {"padding": "max_length", "max_length": 13}
    image_processor = ViTImageProcessor(size={"height": 8, "width": 8}, do_rescale=True, rescale_factor=-1.0)
    processor = HiViLTProcessor(image_processor, tokenizer)
    inputs = processor(images=make_image(), text=QUESTION, return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 13)
    assert inputs["pixel_values"].shape == (1, 3, 8, 8) and inputs["pixel_values"].mean() < -10

    inputs = processor(images=make_image(), text=QUESTION, return_tensors="pt", max_length=10, rescale_factor=1.0)
    assert inputs["input_ids"].shape == (1, 10) and inputs["pixel_values"].mean() > 10


@pytest.mark.parametrize(
    "keywords",
    [
        {"padding": "max_length", "text_kwargs": {"padding": "do_not_pad"}},
        {"do_rescale": True, "images_kwargs": {"do_rescale": False}},
    ],
    ids=["text", "images"],
)
def test_a_keyword_given_twice_is_refused(keywords):
    with pytest.raises(ValueError, match="passed two times"):
        PROCESSOR(images=make_image(), text=QUESTION, **keywords)


def test_decoding_is_the_tokenizers():
    rows = [ids_of("red square"), ids_of("yes")]
    assert PROCESSOR.batch_decode(rows, skip_special_tokens=True) == ["red square", "yes"]
    assert PROCESSOR.decode(rows[1]) == "[CLS] yes [SEP]"


# What is to be written


def test_targets_end_with_the_end_token_and_are_padded_with_what_costs_nothing():
    labels = PROCESSOR.tokenize_targets(["red square", "yes"])
    assert labels.dtype == torch.long
    assert labels.tolist() == [[*ids_of("red square")[1:-1], 3], [*ids_of("yes")[1:-1], 3, -100]]
    assert PROCESSOR.tokenize_targets("yes").tolist() == PROCESSOR.tokenize_targets(["yes"]).tolist()
    assert PROCESSOR.tokenize_targets(["\ud83d"]).tolist() == [[1, 3]]  # half of a surrogate pair


def test_a_target_that_is_too_long_is_cut_before_its_end_token():
    (labels,) = PROCESSOR.tokenize_targets(["red " * 40]).tolist()
    assert labels == [ids_of("red")[1]] * 23 + [3]


def test_targets_of_a_tokenizer_like_t5s_end_once():
    """It ends texts itself, and begins them with nothing."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)])
    tokenizer.cls_token, tokenizer.sep_token, tokenizer.eos_token = None, None, "[SEP]"
    processor = HiViLTProcessor(PROCESSOR.image_processor, tokenizer)
    assert processor.tokenizer("yes").input_ids == [*ids_of("yes")[1:-1], 3]
    assert processor.tokenize_targets(["yes"]).tolist() == [[*ids_of("yes")[1:-1], 3]]


def test_targets_without_an_end_token_are_refused():
    tokenizer = make_tokenizer()
    tokenizer.sep_token = None
    with pytest.raises(ValueError, match="TokenizersBackend has no `eos_token` or `sep_token` to end texts with"):
        HiViLTProcessor(PROCESSOR.image_processor, tokenizer).tokenize_targets(["red"])


# Images


def assert_looks_like(image, expected: Image.Image, tolerance: int = 0):
    seen = load_image(image)
    assert seen.mode == "RGB" and seen.size == expected.size
    assert np.abs(np.asarray(seen).astype(int) - np.asarray(expected).astype(int)).max() <= tolerance


def test_an_image_may_be_a_file_a_pil_image_or_an_array(tmp_path):
    image = make_image("green")
    image.save(tmp_path / "image.png")
    for same in (image, np.asarray(image), tmp_path / "image.png", str(tmp_path / "image.png")):
        assert_looks_like(same, image)
        inputs = PROCESSOR(images=same, return_tensors="pt")
        torch.testing.assert_close(inputs["pixel_values"], PROCESSOR(images=image, return_tensors="pt")["pixel_values"])
    grey = np.asarray(image.convert("L"))
    assert_looks_like(grey, image.convert("L").convert("RGB"))


@pytest.mark.checklist("11")
@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_images_of_other_modes_are_shown_in_rgb(mode, tmp_path):
    image = make_image("red").convert(mode)
    assert_looks_like(image, image.convert("RGB"))
    if mode in ("L", "P", "CMYK"):
        image.save(tmp_path / "image.tiff")
        assert_looks_like(tmp_path / "image.tiff", image.convert("RGB"))


@pytest.mark.checklist("11")
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P with a transparent colour", "RGB with a transparent colour"])
def test_what_is_transparent_is_white(mode, tmp_path):
    # A black image whose left half cannot be seen.
    expected = Image.new("RGB", (8, 6), "black")
    expected.paste("white", (0, 0, 4, 6))
    if mode == "P with a transparent colour":
        image = Image.new("P", (8, 6), 0)
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.paste(1, (0, 0, 4, 6))
        image.info["transparency"] = 1
        image.save(tmp_path / "image.png")
    elif mode == "RGB with a transparent colour":
        image = Image.new("RGB", (8, 6), "black")
        image.paste((0, 0, 9), (0, 0, 4, 6))
        image.save(tmp_path / "image.png", transparency=(0, 0, 9))
    else:
        alpha = Image.new("L", (8, 6), 255)
        alpha.paste(0, (0, 0, 4, 6))
        image = Image.new("RGB", (8, 6), "black").convert(mode[:-1])
        image.putalpha(alpha)
        assert image.mode == mode
        assert_looks_like(image, expected)
        if mode == "LA":
            assert_looks_like(image.convert("La"), expected)
        image.convert("RGBA").save(tmp_path / "image.png")
    assert_looks_like(tmp_path / "image.png", expected)


@pytest.mark.checklist("11")
@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4"])
def test_sixteen_bits_are_brought_to_eight(dtype, tmp_path):
    levels = np.array([[0, 255, 256], [32896, 65279, 65535]]).astype(dtype)
    expected = Image.fromarray(np.array([[0, 0, 1], [128, 254, 255]], np.uint8)).convert("RGB")
    image = Image.fromarray(levels)
    assert_looks_like(image, expected)
    image.save(tmp_path / "image.tiff")
    assert_looks_like(tmp_path / "image.tiff", expected)


@pytest.mark.checklist("11")
@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, None),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_90),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_an_image_is_turned_as_its_camera_was_held(orientation, turn, tmp_path):
    upright = make_image("blue")
    # What the camera's chip saw; the tag says how to turn it upright again.
    image = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image.save(tmp_path / "image.png", exif=exif)
    assert_looks_like(tmp_path / "image.png", upright)
    with Image.open(tmp_path / "image.png") as opened:
        assert_looks_like(opened, upright)


@pytest.mark.checklist("11")
@pytest.mark.parametrize("size", [(1, 1), (300, 2), (2, 300)], ids=str)
def test_tiny_and_narrow_images_are_read(size):
    inputs = PROCESSOR(images=make_image("red", size), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert inputs["pixel_values"].isfinite().all()


# What they do to images: size and crop; those that resize, order their steps or pad in a way of their own.
IMAGE_PROCESSORS = {
    "ViT": lambda: ViTImageProcessorPil(size={"height": 13, "width": 17}),
    "ViT, bytes": lambda: ViTImageProcessorPil(size={"height": 13, "width": 17}, do_rescale=False, do_normalize=False),
    "ViT, not resized": lambda: ViTImageProcessorPil(do_resize=False),
    "SigLIP": lambda: SiglipImageProcessorPil(size={"height": 19, "width": 19}),
    "CLIP": lambda: CLIPImageProcessorPil(size={"shortest_edge": 15}, crop_size=14),
    "CLIP, larger crop": lambda: CLIPImageProcessorPil(size={"shortest_edge": 9}, crop_size=14),
    "DINOv2": lambda: BitImageProcessorPil(size={"shortest_edge": 18}, crop_size={"height": 14, "width": 12}),
    "ConvNeXt": lambda: ConvNextImageProcessorPil(size={"shortest_edge": 14}),
    "ViLT": lambda: ViltImageProcessorPil(size={"shortest_edge": 32}),
    "ViT, padded": lambda: ViTImageProcessorPil(
        size={"height": 13, "width": 17}, do_pad=True, pad_size={"height": 20, "width": 20}
    ),
}


@pytest.mark.checklist("11")
@pytest.mark.parametrize("size", [(1, 4000), (4001, 1), (2, 90), (120, 3)], ids=str)
@pytest.mark.parametrize("name", ["ViT", "CLIP", "DINOv2"])
def test_strips_are_resized_without_what_is_cut_off(name, size):
    image_processor = IMAGE_PROCESSORS[name]()
    processor = HiViLTProcessor(image_processor, make_tokenizer())
    image = Image.fromarray(np.linspace(0, 255, size[0] * size[1]).astype(np.uint8).reshape(size[::-1])).convert("RGB")
    found = processor(images=image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, image_processor(image, return_tensors="pt")["pixel_values"], atol=0.05, rtol=0)
    longest = max(processor.resize(image).size)
    assert longest <= 34 * 18


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_a_moving_image_the_first_is_taken(kind, tmp_path):
    first, second = (make_image(color) for color in ("white", "black"))
    first.save(tmp_path / "moving", kind, save_all=True, append_images=[second], duration=100, lossless=True)
    assert_looks_like(tmp_path / "moving", first)


@pytest.mark.parametrize(
    "name", ["\N{SNOWMAN} \N{CJK UNIFIED IDEOGRAPH-56FE}.png", "a\nb.png", "\udcff.png"], ids=ascii
)
def test_a_file_may_be_called_anything(name, tmp_path):
    make_image().save(tmp_path / "image.png")
    (tmp_path / "image.png").rename(tmp_path / name)
    assert_looks_like(tmp_path / name, make_image())
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError) as caught:
        load_image(tmp_path / name)
    str(caught.value).encode()  # it can be written


def test_an_image_that_is_upright_and_in_rgb_is_not_copied(tmp_path):
    image = make_image()
    assert load_image(image) is image
    image.save(tmp_path / "image.jpg")
    opened = load_image(tmp_path / "image.jpg")
    assert load_image(opened) is opened
    (tmp_path / "image.jpg").unlink()
    assert opened.getpixel((30, 22))[0] > 200  # nothing of it is left in the file


@pytest.mark.parametrize("size", [(31, 23), (23, 31), (14, 14)], ids=str)
@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
def test_pixels_are_to_the_last_bit_those_of_the_image_processor(name, size):
    image_processor = IMAGE_PROCESSORS[name]()
    processor = HiViLTProcessor(image_processor, make_tokenizer())
    draw = np.random.default_rng(0)
    originals = [Image.fromarray(draw.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for _ in range(2)]
    expected = image_processor(originals, return_tensors="pt")
    resized = [processor.resize(image) for image in originals]
    for images in (originals, resized):
        found = processor(images=images, return_tensors="pt")
        assert set(found) == set(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert found["pixel_values"].dtype == expected["pixel_values"].dtype
    if name == "ViT":
        # Where they are resized in the usual way, that has been done; another size may still be asked for.
        assert [image.size for image in resized] == [(17, 13)] * 2
        found = processor(images=originals, size={"height": 8, "width": 9}, return_tensors="pt")
        assert torch.equal(
            found["pixel_values"],
            image_processor(originals, size={"height": 8, "width": 9}, return_tensors="pt")["pixel_values"],
        )


def test_images_that_come_out_in_different_sizes_are_no_batch():
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 15}, do_center_crop=False)
    processor = HiViLTProcessor(image_processor, make_tokenizer())
    images = [make_image(size=(31, 23)), make_image(size=(40, 23))]
    found = processor(images=images)["pixel_values"]
    for one, expected in zip(found, image_processor(images)["pixel_values"], strict=True):
        np.testing.assert_array_equal(one, expected)
    with pytest.raises(ValueError, match="pixel_values"):
        processor(images=images, return_tensors="pt")


# Arrays and tensors


def noise(channels: int, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (23, 31, channels)).astype(dtype)


def pixels_of(images, **keywords) -> torch.Tensor:
    return PROCESSOR(images=images, return_tensors="pt", **keywords)["pixel_values"]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("make", [np.ascontiguousarray, torch.tensor], ids=["array", "tensor"])
def test_an_array_or_tensor_with_channels_at_either_end_is_the_image(make, first, channels):
    levels = noise(channels)
    expected = pixels_of(Image.fromarray(levels.squeeze()))
    one = make(np.moveaxis(levels, 2, 0) if first else levels)
    for images in (one, [one], one[None], [one[None]]):
        assert torch.equal(pixels_of(images), expected)
    if channels == 1:
        assert torch.equal(pixels_of(make(levels[:, :, 0])), expected)


@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("make", [np.ascontiguousarray, torch.tensor], ids=["array", "tensor"])
def test_four_dimensions_are_a_batch_of_images(make, first):
    levels = np.stack([noise(3), noise(3)[::-1]])
    batch = make(np.moveaxis(levels, 3, 1) if first else levels)
    pil_images = [Image.fromarray(one) for one in levels]
    for text in (["yes", "no"], [["yes"], ["no", "red"]]):
        expected = dict(PROCESSOR(images=pil_images, text=text, return_tensors="pt"))
        for images in (batch, list(batch), [batch], [batch[:1], batch[1:]], [[batch[0]], [batch[1]]]):
            torch.testing.assert_close(dict(PROCESSOR(images=images, text=text, return_tensors="pt")), expected)


def test_where_both_ends_could_be_channels_the_library_decides_or_the_keyword():
    levels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    first, last = Image.fromarray(np.moveaxis(levels, 0, 2)), Image.fromarray(levels)
    assert_looks_like(levels, last)
    assert_looks_like(torch.tensor(levels), first)
    assert torch.equal(pixels_of(levels, input_data_format="channels_first"), pixels_of(first))
    assert torch.equal(pixels_of(torch.tensor(levels), input_data_format="channels_last"), pixels_of(last))
    # Three channels before four.
    levels = np.random.default_rng(0).integers(0, 256, (3, 5, 4), np.uint8)
    assert_looks_like(levels, Image.fromarray(np.ascontiguousarray(np.moveaxis(levels, 0, 2))))


FLOATS = [np.float16, np.float32, np.float64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [np.uint16, np.int16, np.int32, np.int64, np.uint64, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats_from_zero_to_one_are_what_totensor_made_of_the_image(dtype):
    levels = noise(3)
    scaled = torch.tensor(levels).permute(2, 0, 1) / 255
    scaled = scaled.to(dtype) if isinstance(dtype, torch.dtype) else scaled.numpy().astype(dtype)
    assert_looks_like(scaled, Image.fromarray(levels), tolerance=dtype == torch.bfloat16)
    # Rounding may have moved them a little out of range.
    assert_looks_like(scaled * 1.0005 - 0.0002, Image.fromarray(levels), tolerance=1)
    # Of a dark image too: it is the kind of its values that says what they are.
    assert_looks_like(scaled * 0 + 0.5, Image.new("RGB", (31, 23), (128, 128, 128)))


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS], ids=str)
def test_whole_numbers_up_to_255_are_eight_bits_in_any_dtype(dtype):
    levels = noise(3)
    values = torch.tensor(levels).to(dtype) if isinstance(dtype, torch.dtype) else levels.astype(dtype)
    assert_looks_like(values, Image.fromarray(levels))


def test_a_mask_of_booleans_is_black_and_white():
    mask = noise(1)[:, :, 0] > 127
    assert_looks_like(mask, Image.fromarray(mask).convert("RGB"))
    assert_looks_like(torch.tensor(mask)[None], Image.fromarray(mask).convert("RGB"))


@pytest.mark.parametrize(
    ("values", "came"),
    [
        (np.float32([[-1, 1], [0, 0.5]]), "float32 from -1 to 1"),
        (np.float32([[0, 1.02], [0, 0.5]]), "float32 from 0 to 1.02"),
        (np.float32([[0, 254.5], [0, 1]]), "float32 from 0 to 254.5"),
        (np.float64([[0, np.nan], [0, 1]]), "float(32|64) from nan to nan"),
        (np.float64([[0, np.inf], [0, 1]]), "float(32|64) from 0 to inf"),
        (np.int32([[-1, 255], [0, 1]]), "int32 from -1 to 255"),
        (np.int32([[0, 65536], [0, 1]]), "int32 from 0 to 65536"),
        (np.int32([[0, 260], [0, 1]]), "int32 from 0 to 260"),  # 8 bits, made brighter: not 16 bits, all but black
        (np.float32([[0, 511], [0, 1]]), "float32 from 0 to 511"),
    ],
)
def test_values_that_are_no_images_are_refused(values, came):
    for image in (values, torch.tensor(values)[None]):
        with pytest.raises(ValueError, match=f"integers from 0 to 255 .*got {came}.*(do_rescale=False|as uint16)"):
            pixels_of([image])


@pytest.mark.parametrize("mode", ["I", "I;16", "F"])
def test_eight_bits_in_a_mode_with_more_are_not_black(mode, tmp_path):
    grey = Image.fromarray(noise(1)[:, :, 0])
    image = Image.fromarray(np.asarray(grey).astype({"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode]))
    assert image.mode == mode
    assert_looks_like(image, grey.convert("RGB"))
    image.save(tmp_path / "image.tiff")
    assert_looks_like(tmp_path / "image.tiff", grey.convert("RGB"))


def test_an_image_of_twelve_bits_is_told(caplog):
    processing_hivilt.logger.warning_once.cache_clear()
    for high, told in ((255, 0), (65_535, 0), (4_095, 1)):
        load_image(np.linspace(0, high, 64).astype(np.uint16).reshape(8, 8))
        assert sum("10 or 12 bits" in record.message for record in caplog.records) == told


def test_an_image_of_floats_goes_by_its_own_range():
    grey = noise(1)[:, :, 0]
    assert_looks_like(Image.fromarray(grey / np.float32(255)), Image.fromarray(grey).convert("RGB"))
    assert_looks_like(make_image("red").convert("F"), make_image("red").convert("L").convert("RGB"), tolerance=1)
    assert_looks_like(Image.fromarray(grey * np.float32(256)), Image.fromarray(grey).convert("RGB"))
    for low, high in [(-1, 1), (0, 1.5), (0, 1e6), (0, np.nan)]:
        with pytest.raises(ValueError, match="'a PIL image' is not a readable image .*float32 from"):
            load_image(Image.fromarray(np.float32([[low, high]])))


def test_prepared_floats_must_be_finite_and_of_three_channels():
    for prepared, came in [
        (torch.full((3, 4, 4), torch.nan), r"\(3, 4, 4\) from nan"),
        (torch.rand(1, 4, 4), r"\(1, 4, 4\)"),
    ]:
        with pytest.raises(ValueError, match=f"do_rescale=False.*got shape {came}"):
            pixels_of([prepared], do_rescale=False)


def test_prepared_tensors_are_taken_as_they_are():
    prepared = torch.rand(3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    inputs = PROCESSOR(images=[prepared], do_rescale=False, do_normalize=False, do_resize=False, return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"][0], prepared)


def test_prepared_tensors_that_pil_would_have_to_resize_are_refused_with_the_way_out():
    normalized = torch.full((3, IMAGE_SIZE, IMAGE_SIZE), -1.0)
    with pytest.raises(ValueError, match=r"from -1 to -1\. .*do_resize=False"):
        PROCESSOR(images=[normalized], do_rescale=False, do_normalize=False)


def test_an_image_processor_that_does_not_rescale_takes_floats_as_they_are():
    processor = make_processor()
    tensor = torch.from_numpy(np.array(IMAGE.resize((IMAGE_SIZE, IMAGE_SIZE)))).permute(2, 0, 1)
    expected = processor(images=tensor, return_tensors="pt")["pixel_values"]
    processor.image_processor.do_rescale = False
    torch.testing.assert_close(processor(images=tensor / 255, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("size", [{"height": 11, "width": 11}, 11])
def test_a_size_set_on_the_image_processor_is_the_size(size):
    processor = make_processor()
    processor.image_processor.size = size
    pixel_values = processor(images=IMAGE, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 11, 11)
    torch.testing.assert_close(pixel_values, processor.image_processor(IMAGE, return_tensors="pt")["pixel_values"])


# Texts from the wild


def test_a_tokenizer_that_names_no_mask_gives_one(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids"]  # as SigLIP's
    processor = HiViLTProcessor(PROCESSOR.image_processor, tokenizer)
    assert tokenizer.model_input_names == ["input_ids"]
    processor.save_pretrained(tmp_path)
    for ours in (processor, HiViLTProcessor.from_pretrained(tmp_path)):
        assert ours(text=["red", QUESTION])["attention_mask"][0][-3:] == [0, 0, 0]
        assert ours.model_input_names == PROCESSOR.model_input_names


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=())), min_size=1, max_size=3))
def test_any_text_is_taken_or_refused_as_empty(texts):
    if any(not text.strip() for text in texts):
        with pytest.raises(ValueError, match="is empty; there is nothing to ask"):
            PROCESSOR(text=texts)
        return
    inputs = PROCESSOR(text=texts, return_tensors="pt")
    assert inputs["input_ids"].shape[0] == len(texts) and inputs["attention_mask"].sum(1).min() >= 2
    for number, text in enumerate(texts):
        alone = PROCESSOR(text=text, return_tensors="pt")["input_ids"][0]
        assert torch.equal(inputs["input_ids"][number, : len(alone)], alone)


def test_half_of_a_surrogate_pair_reads_as_a_replacement_character():
    for text in ("red \ud800", ["red \ud800"], [["red \ud800"]]):
        assert PROCESSOR(text=text).input_ids in (ids_of("red \ufffd"), [ids_of("red \ufffd")])
    assert well_formed("a \ud800 b \udc00") == "a \ufffd b \ufffd"
    assert well_formed("\ud83d\ude00 \ufeff\U0001f600 \x00é") == "\U0001f600 \ufeff\U0001f600 \x00é"


# Long texts


@pytest.mark.checklist("11")
def test_long_texts_are_cut_with_one_warning(told):
    long = " ".join(["red"] * 40)
    inputs = PROCESSOR(text=[long, QUESTION, long], return_tensors="pt")
    assert inputs["input_ids"].shape == (3, 24)
    # The end that says that this is the end stays.
    assert inputs["input_ids"][0, -1] == PROCESSOR.tokenizer.sep_token_id
    PROCESSOR(text=long)
    (warning,) = told
    assert "2 of 3 texts were cut to 24 tokens" in warning and "`model_max_length`" in warning


def test_a_warning_names_the_length_that_was_asked_for(told):
    inputs = PROCESSOR(text=[QUESTION, "yes"], max_length=5, return_tensors="pt")
    assert inputs["input_ids"].shape == (2, 5)
    assert "1 of 2 texts were cut to the 5 tokens of `max_length`" in told[0]


def test_what_the_tokenizer_does_not_know_is_told_once(told):
    PROCESSOR(text=[QUESTION, "red"])
    assert not told
    unknown = f"{QUESTION} ☃ ☂"
    assert PROCESSOR.tokenizer.unk_token_id in PROCESSOR(text=[QUESTION, unknown]).input_ids[1]
    PROCESSOR(text=unknown, return_tensors="pt")
    (warning,) = told
    assert f"does not know '☃' in {unknown!r}" in warning


# Bad input


def a_text_file(folder):
    (folder / "notes.png").write_text("not an image", encoding="utf-8")
    return folder / "notes.png"


def a_truncated_file(folder):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "whole.png")
    (folder / "half.png").write_bytes((folder / "whole.png").read_bytes()[:2000])
    return folder / "half.png"


def a_loop(folder):
    (folder / "loop.png").symlink_to(folder / "loop.png")
    return folder / "loop.png"


def a_pipe(folder):
    os.mkfifo(folder / "pipe.png")
    return folder / "pipe.png"


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (a_loop, FileNotFoundError, r"There is no image file .*loop.png"),
        (a_pipe, FileNotFoundError, r"There is no image file .*pipe.png"),
        (lambda _: "https://example.org/cat.png", ValueError, r"download https://example.org/cat.png and give"),
        (lambda folder: folder / "gone.png", FileNotFoundError, r"gone.png.*check the path"),
        (lambda folder: folder, FileNotFoundError, r"There is no image file"),
        (lambda folder: folder / ("x" * 300), FileNotFoundError, r"There is no image file"),
        (a_text_file, ValueError, r"notes.png' is not a readable image .*; replace or remove it"),
        (a_truncated_file, ValueError, r"half.png' is not a readable image .*truncated.*; replace or remove it"),
        (lambda _: 7, TypeError, r"a PIL image, or an array or tensor of numbers, got int"),
        (lambda _: None, TypeError, r"got NoneType"),
        (lambda _: [[[1, 2], [3, 4]]], TypeError, r"got list"),
        (lambda _: b"\x89PNG", TypeError, r"got bytes; give PIL.Image.open\(io.BytesIO\(content\)\)"),
        (lambda _: {"bytes": b"", "path": None}, TypeError, r"got dict"),
        (lambda _: "s3://bucket/cat.png", ValueError, r"download s3://bucket/cat.png and give"),
        (lambda _: "data:image/png;base64,iVBO", FileNotFoundError, r"content give PIL.Image.open"),
        (lambda _: "iVBORw0KGgo" * 2000 + "==", FileNotFoundError, r"'iVBO.{40,60}; check the path"),
        (lambda _: "~/cat.png", FileNotFoundError, r"'~/cat.png'.*`~` is not expanded"),
        (lambda _: np.zeros((5, 4, 5), np.uint8), ValueError, r"\(height, width, channels\).*got \(5, 4, 5\)"),
        (lambda _: np.zeros((2, 5, 5), np.uint8), ValueError, r"1, 3 or 4 channels, got \(2, 5, 5\)"),
        (lambda _: np.zeros((1, 1, 4, 4, 3), np.uint8), ValueError, r"\(height, width\).*got \(1, 1, 4, 4, 3\)"),
        (lambda _: torch.zeros(3, 0, 4), ValueError, r"\(height, width\).*got \(3, 0, 4\)"),
        (lambda _: np.zeros((4, 4), complex), TypeError, r"must hold numbers, got complex128"),
        (lambda _: np.full((4, 4), "x"), TypeError, r"must hold numbers, got <U1"),
    ],
)
def test_what_is_no_image_is_refused_by_name(image, error, message, tmp_path):
    with pytest.raises(error, match=message):
        PROCESSOR(images=[image(tmp_path)], text=QUESTION)


@pytest.fixture
def no_root():
    """Root may read everything."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


def test_what_may_not_be_read_is_refused_by_name(no_root):
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "closed.png")
        Image.new("RGB", (4, 4)).save(image)
        image.chmod(0)
        with pytest.raises(ValueError, match=r"closed.png' is not a readable image .*Permission denied"):
            load_image(image)
        Path(folder).chmod(0)
        with pytest.raises(FileNotFoundError, match=r"no image file .*closed.png"):
            load_image(image)
        Path(folder).chmod(0o700)


Image.init()
# Pillow's own; older ones write fewer.
FORMATS = {
    "PNG",
    "JPEG",
    "GIF",
    "WEBP",
    "TIFF",
    "BMP",
    "ICO",
    "PPM",
    "TGA",
    "PCX",
    "SGI",
    "QOI",
    "ICNS",
    "SPIDER",
    "IM",
}
FORMATS = sorted(FORMATS & Image.SAVE.keys())


@cache
def as_file(kind):
    content = io.BytesIO()
    make_image("red", size=(32, 32)).convert("F" if kind == "SPIDER" else "RGB").save(content, kind)
    return content.getvalue()


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    st.floats(0, 2),
)
def test_damaged_files_are_read_or_refused_by_name(kind, changes, share):
    content = bytearray(as_file(kind))
    for place, value in changes:
        content[int(place * len(content))] = value
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        file.write(content[: round(share * len(content))])
        file.flush()
        try:
            assert load_image(file.name).mode == "RGB"
        except ValueError as error:
            assert file.name in str(error) and "is not a readable image" in str(error)


def test_an_image_that_is_a_program_is_not_run(tmp_path, monkeypatch):
    make_image().save(tmp_path / "program.eps")
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(ValueError, match="program.eps' is not a readable image .EPS is not read"):
        load_image(tmp_path / "program.eps")
    assert not (tmp_path / "ran").exists()


ANYTHING = st.recursive(
    st.sampled_from([None, True, 0, -1.5, "", "x", QUESTION, b"x", {"a": 1}, np.zeros(0), np.zeros((2, 2), np.uint8)])
    | st.builds(make_image)
    | st.builds(lambda shape: np.zeros(shape, np.uint8), st.lists(st.integers(0, 4), max_size=4)),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.just("images"), inner),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(ANYTHING, ANYTHING)
def test_anything_in_place_of_images_and_texts_is_taken_or_refused(images, text):
    try:
        inputs = PROCESSOR(images=images, text=text, return_tensors="pt")
    except (ValueError, TypeError, FileNotFoundError) as error:
        assert str(error)
        return
    assert "image_index" not in inputs or int(inputs["image_index"].max()) < len(inputs["pixel_values"])


def test_a_damaged_image_in_memory_is_refused(tmp_path):
    with (
        Image.open(a_truncated_file(tmp_path)) as image,
        pytest.raises(ValueError, match="half.png' is not a readable"),
    ):
        load_image(image)


def test_an_image_too_large_to_be_honest_is_refused(tmp_path, monkeypatch):
    make_image().save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="bomb.png' is not a readable image .*713 pixels"):
        load_image(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("given", "text", "error", "message"),
    [
        (None, None, ValueError, r"Give the processor `images`, `text`, or both"),
        ([], "yes", ValueError, r"`images` is an empty list"),
        (1, [], ValueError, r"`text` is an empty list"),
        (1, [[]], ValueError, r"`text` is an empty list"),
        (None, [], ValueError, r"`text` is an empty list"),
        (1, "", ValueError, r"text at position 0 is empty"),
        (1, ["yes", "  "], ValueError, r"text at position 1 is empty"),
        (2, [["yes"], [""]], ValueError, r"text at position 1 is empty"),
        (1, 5, TypeError, r"`text` must be a string, a list of strings, .*got int"),
        (1, ["yes", 5], TypeError, r"`text` must hold strings, got int at position 1"),
        (2, [["yes"], [None]], TypeError, r"`text` must hold strings, got NoneType at position 1"),
        (2, [["yes"], "no"], TypeError, r"`text` must hold strings, got list at position 0"),
        (2, "yes", ValueError, r"1 texts cannot be paired with 2 images.*a list of its texts"),
        (2, ["yes", "no", "red"], ValueError, r"3 texts cannot be paired with 2 images"),
        (3, [["yes"], ["no", "red"]], ValueError, r"2 lists of texts cannot be paired with 3 images"),
        (1, {"yes": 1}, TypeError, r"`text` must be a string, .*got dict"),
        (1, {"yes"}, TypeError, r"`text` must be a string, .*got set"),
        (
            [[IMAGE], [IMAGE, IMAGE]],
            ["yes", "no"],
            ValueError,
            r"as many images each, but has 1 at position 0 and 2 at pos",
        ),
        (
            [[IMAGE] * 3] * 2 + [IMAGE],
            ["yes"] * 3,
            ValueError,
            r"has 3 at position 0 and 1 at position 2. Give each text all",
        ),
        ([[IMAGE], []], ["yes", "no"], ValueError, r"has 1 at position 0 and 0 at position 1"),
        ([[], []], ["yes", "no"], ValueError, r"`images` is an empty list"),
        ([[IMAGE] * 2] * 2, "yes", ValueError, r"1 texts cannot be paired with 2 lists of images.*a list of its texts"),
        ([[IMAGE] * 2] * 2, [["yes"]], ValueError, r"1 lists of texts cannot be paired with 2 lists of images"),
        ([[IMAGE] * 2], "", ValueError, r"text at position 0 is empty"),
        (np.zeros((2, 4, 4, 3), np.uint8), "yes", ValueError, r"1 texts cannot be paired with 2 images"),
        ([np.zeros((2, 4, 4, 3), np.uint8)], "yes", ValueError, r"1 texts cannot be paired with 2 images"),
    ],
)
def test_what_does_not_pair_up_is_refused_with_its_remedy(given, text, error, message):
    images = [make_image()] * given if isinstance(given, int) else given
    with pytest.raises(error, match=message):
        PROCESSOR(images=images, text=text)


# Saving


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.checklist("2")
def test_saved_loaded_and_saved_again_not_a_byte_differs(tmp_path):
    processor = make_processor()
    processor.save_pretrained(tmp_path / "first")
    HiViLTProcessor.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    AutoProcessor.from_pretrained(tmp_path / "second").save_pretrained(tmp_path / "third")
    first, second, third = (contents(tmp_path / name) for name in ("first", "second", "third"))
    assert second == third
    assert {"processor_config.json", "tokenizer.json", "processing_hivilt.py"} <= set(first)
    # Once loaded, a tokenizer of transformers writes down that it was; from then on it does so every time.
    before, after = (json.loads(files.pop("tokenizer_config.json")) for files in (first, second))
    assert first == second
    assert before == {key: value for key, value in after.items() if key not in ("is_local", "local_files_only")}


def test_loaded_it_computes_the_same(tmp_path):
    processor = make_processor()
    processor.save_pretrained(tmp_path)
    loaded = HiViLTProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() | {"auto_map": processor.auto_map} == processor.to_dict()
    inputs = {"images": make_image(), "text": [QUESTION, "yes"], "return_tensors": "pt"}
    torch.testing.assert_close(dict(loaded(**inputs)), dict(processor(**inputs)))


def test_keywords_on_loading_reach_the_parts(tmp_path):
    make_processor().save_pretrained(tmp_path)
    loaded = HiViLTProcessor.from_pretrained(tmp_path, do_normalize=False, cls_token="(CLS)")
    assert loaded.image_processor.do_normalize is False and loaded.tokenizer.cls_token == "(CLS)"


# Answers


LOGITS = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 0.5]])
ANSWERS = {0: "red", 1: "blue", 2: "green"}


def test_answers_come_best_first_with_their_probabilities():
    answers = PROCESSOR.post_process_question_answering(LOGITS, top_k=2, id2label=ANSWERS)
    assert [[a["answer"] for a in row] for row in answers] == [["blue", "green"], ["red", "green"]]
    assert answers[0][0]["score"] == pytest.approx(LOGITS[0].softmax(-1)[1].item())
    assert answers[1][1]["score"] == pytest.approx(LOGITS[1].softmax(-1)[2].item())
    assert [len(row) for row in PROCESSOR.post_process_question_answering(LOGITS, id2label=ANSWERS)] == [1, 1]


def test_answers_alone_do_not_tell_how_scores_are_read(caplog):
    processing_hivilt.logger.warning_once.cache_clear()
    for told in ({"multi_label": False}, {"config": make_model(HiViLTForQuestionAnswering).config}):
        PROCESSOR.post_process_question_answering(LOGITS, id2label=ANSWERS, **told)
    assert not caplog.records
    for _ in range(2):
        PROCESSOR.post_process_question_answering(LOGITS, id2label=ANSWERS)
    (record,) = caplog.records
    assert record.message.startswith("`id2label` does not tell whether several answers may be right")


def test_soft_labels_give_each_answer_a_probability_of_its_own():
    answers = PROCESSOR.post_process_question_answering(LOGITS, top_k=3, id2label=ANSWERS, multi_label=True)
    assert [a["score"] for a in answers[0]] == pytest.approx(sorted(LOGITS[0].sigmoid().tolist(), reverse=True))


@pytest.mark.parametrize("multi_label", [False, True])
def test_answers_whose_probabilities_are_rounded_alike_are_in_order(multi_label):
    logits = torch.tensor([[-300.0, 100.0, -200.0, 200.0, -100.0]])
    answers = PROCESSOR.post_process_question_answering(logits, 4, dict(enumerate("abcde")), multi_label)
    assert [answer["answer"] for answer in answers[0]] == ["d", "b", "e", "c"]


def test_scores_as_trainer_predicts_them_are_taken_too():
    logits = torch.tensor([[0.0, 3.0], [2.0, 0.0]])
    answers = {0: "no", 1: "yes"}
    expected = PROCESSOR.post_process_question_answering(logits, id2label=answers)
    assert PROCESSOR.post_process_question_answering(logits.numpy(), id2label=answers) == expected
    with pytest.raises(ValueError, match=r"shape \(texts, 2\).*got list"):
        PROCESSOR.post_process_question_answering(logits.tolist(), id2label=answers)


def test_a_model_output_in_half_precision_is_taken_too():
    outputs = make_model(HiViLTForQuestionAnswering).bfloat16()(
        **PROCESSOR(images=make_image(), text=QUESTION, return_tensors="pt")
    )
    (answers,) = PROCESSOR.post_process_question_answering(outputs, top_k=5, id2label={i: str(i) for i in range(5)})
    assert sum(a["score"] for a in answers) == pytest.approx(1.0, abs=1e-5)


def test_soft_labels_are_told_by_the_config_saved_beside_it(tmp_path):
    make_processor().save_pretrained(tmp_path)
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0, 3.0]])
    for problem, scores in ((None, logits.softmax(-1)), ("multi_label_classification", logits.sigmoid())):
        model = make_model(HiViLTForQuestionAnswering, problem_type=problem)
        model.save_pretrained(tmp_path)
        loaded = HiViLTProcessor.from_pretrained(tmp_path)
        assert loaded.post_process_question_answering(logits, 5) == PROCESSOR.post_process_question_answering(
            logits, 5, config=model.config
        )
        expected = {False: logits.softmax(-1), True: logits.sigmoid(), None: scores}
        for multi_label, wanted in expected.items():
            (answers,) = loaded.post_process_question_answering(logits, top_k=5, multi_label=multi_label)
            assert [one["score"] for one in answers] == pytest.approx(sorted(wanted[0].tolist(), reverse=True))


def test_answers_are_those_of_the_config_saved_beside_it(tmp_path):
    make_processor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="give `config=model.config`"):
        HiViLTProcessor.from_pretrained(tmp_path).post_process_question_answering(LOGITS)

    model = make_model(HiViLTForQuestionAnswering)
    model.save_pretrained(tmp_path)
    loaded = HiViLTProcessor.from_pretrained(tmp_path)
    logits = torch.eye(5)
    answers = loaded.post_process_question_answering(logits)
    assert [row[0]["answer"] for row in answers] == list(model.config.id2label.values())
    # They are written down in one place only.
    loaded.save_pretrained(tmp_path / "again")
    assert "answer" not in (tmp_path / "again" / "processor_config.json").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"\(texts, 5\), one score for each answer.*got \(2, 3\)"):
        loaded.post_process_question_answering(LOGITS)


# Boxes out

# Four rows of two texts: two of one thing, one elsewhere, one that is unlikely; and nothing.
ROWS = torch.tensor([[2.0, 3.0, 1.0, -1.0], [-5.0, -4.0, -6.0, -3.0]])
SEEN = torch.tensor([[0.5, 0.5, 0.4, 0.2], [0.52, 0.5, 0.4, 0.2], [0.1, 0.9, 0.4, 0.4], [0.8, 0.1, 0.1, 0.1]])
OUTPUTS = {"logits": ROWS, "pred_boxes": SEEN.expand(2, 4, 4)}


def test_boxes_come_best_first_once_each_and_inside_the_image():
    first, second = PROCESSOR.post_process_grounding(OUTPUTS)
    torch.testing.assert_close(first["scores"], torch.tensor([3.0, 1.0]).sigmoid())
    torch.testing.assert_close(first["boxes"], torch.tensor([[0.32, 0.4, 0.72, 0.6], [0.0, 0.7, 0.3, 1.0]]))
    assert second["scores"].shape == (0,) and second["boxes"].shape == (0, 4)
    for sizes in ([(100, 200), (1, 1)], torch.tensor([[100, 200], [1, 1]])):
        in_pixels, _ = PROCESSOR.post_process_grounding(OUTPUTS, target_sizes=sizes)
        torch.testing.assert_close(in_pixels["boxes"], torch.tensor([[64.0, 40, 144, 60], [0.0, 70, 60, 100]]))
    assert [len(one["scores"]) for one in PROCESSOR.post_process_grounding(OUTPUTS, threshold=0.0)] == [3, 3]
    assert [len(one["scores"]) for one in PROCESSOR.post_process_grounding(OUTPUTS, threshold=0.0, top_k=2)] == [2, 2]
    # A score at the threshold is left out.
    at = {**OUTPUTS, "logits": torch.zeros(2, 4)}
    assert [len(one["scores"]) for one in PROCESSOR.post_process_grounding(at)] == [0, 0]


def test_boxes_whose_scores_are_rounded_alike_are_in_order():
    outputs = {"logits": torch.tensor([[40.0, 90.0, 50.0, 30.0]]), "pred_boxes": SEEN[None]}
    (found,) = PROCESSOR.post_process_grounding(outputs)
    assert found["scores"].tolist() == [1.0] * 3
    torch.testing.assert_close(found["boxes"][:, 0], torch.tensor([0.32, 0.0, 0.75]))


def test_boxes_of_a_model_and_as_trainer_predicts_them_are_the_same():
    model = make_model(HiViLTForVisualGrounding, weight_scale=6.0).bfloat16()
    with torch.no_grad():
        outputs = model(
            **PROCESSOR(images=make_image(), text=[QUESTION, "red"], return_tensors="pt").to(torch.bfloat16)
        )
    found = PROCESSOR.post_process_grounding(outputs, threshold=0.0)
    as_predicted = (outputs.logits.float().numpy(), outputs.pred_boxes.numpy())
    for one, other in zip(found, PROCESSOR.post_process_grounding(as_predicted, threshold=0.0), strict=True):
        assert len(one["scores"]) and torch.equal(one["boxes"], other["boxes"])


@pytest.mark.parametrize(
    ("outputs", "arguments", "message"),
    [
        (OUTPUTS, {"target_sizes": [(4, 5)]}, "each of the 2 texts, got 1. An image that several texts are about"),
        (
            OUTPUTS,
            {"target_sizes": [(4, 5), (4, 0)]},
            r"\(height, width\) in pixels, both above 0, got \(4, 0\); of a PIL",
        ),
        (OUTPUTS, {"target_sizes": [(4, 5), (4,)]}, r"\(height, width\) in pixels, both above 0, got \(4,\)"),
        (OUTPUTS, {"target_sizes": [make_image(), None]}, "both above 0, got <PIL.Image.Image"),
        (OUTPUTS, {"target_sizes": [{"height": 4, "width": 5}] * 2}, "both above 0, got {'height': 4, 'width': 5}"),
        (OUTPUTS, {"threshold": 50}, r"`threshold` must be a number in \[0, 1\], got 50"),
        (OUTPUTS, {"threshold": "0.5"}, r"`threshold` must be a number in \[0, 1\], got '0.5'"),
        (OUTPUTS, {"top_k": 0}, "`top_k` must be a whole number from 1 on, or None for all boxes, got 0"),
        (OUTPUTS, {"top_k": 1.5}, "`top_k` must be a whole number from 1 on, or None for all boxes, got 1.5"),
        ({"logits": ROWS}, {}, r"`pred_boxes` \(texts, rows, 4\), as .*got shapes \(2, 4\), \(0,\)"),
        ((torch.zeros(()), ROWS, OUTPUTS["pred_boxes"]), {}, r"got shapes \(\), \(2, 4\), \(2, 4, 4\)"),
        ({**OUTPUTS, "logits": ROWS * math.nan}, {}, "`outputs` are not finite"),
    ],
)
def test_outputs_that_give_no_boxes_are_refused(outputs, arguments, message):
    with pytest.raises(ValueError, match=message):
        PROCESSOR.post_process_grounding(outputs, **arguments)


@pytest.mark.parametrize(
    ("image_processor", "is_whole"),
    [
        (ViTImageProcessorPil(size={"height": 24, "width": 40}), True),
        (CLIPImageProcessorPil(size={"shortest_edge": 24}, do_center_crop=False), True),
        (CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}), False),
        (ConvNextImageProcessorPil(size={"shortest_edge": 32}), False),
        (Owlv2ImageProcessorPil(size={"height": 32, "width": 32}), False),  # pads to a square
    ],
    ids=["squashes", "keeps its shape", "crops", "crops as it resizes", "pads"],
)
def test_boxes_of_parts_of_images_are_refused(image_processor, is_whole):
    processor = HiViLTProcessor(image_processor, make_tokenizer())
    for _ in range(2):
        if is_whole:
            assert len(processor.post_process_grounding(OUTPUTS)) == 2
        else:
            with pytest.raises(ValueError, match="crops or pads images"):
                processor.post_process_grounding(OUTPUTS)
    if image_processor.do_center_crop is False:
        processor.image_processor.crop_size, processor.image_processor.do_center_crop = {"height": 9, "width": 9}, True
        with pytest.raises(ValueError, match="crops or pads images"):
            processor.check_whole_images()
