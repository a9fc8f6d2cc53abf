"""What a call is refused for, and how it is told."""

import math

import pytest
import torch

from hivilt import (
    HiViLTForImagesAndTextClassification,
    HiViLTForQuestionAnswering,
    HiViLTForRetrieval,
    HiViLTForVisualGrounding,
    HiViLTModel,
    inputs_hivilt,
)
from hivilt.inputs_hivilt import batched_boxes, check_labels
from hivilt.losses_hivilt import classification_loss
from tiny import OF_A_BATCH, PAIRS, make_batch, make_model


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0.0, 1.0]), r"floats of shape \(2, 3\).*`labels.long\(\)`.*got torch.float32 of shape \(2,\)"),
        (torch.tensor([True, False]), r"`labels.float\(\)`; got torch.bool of shape \(2,\)"),
        (torch.ones(2, 3).long(), r"`labels.float\(\)`; got torch.int64 of shape \(2, 3\)"),
        (torch.tensor([[0]]), r"integers of shape \(2,\), an answer for each text"),
        (torch.tensor([0, 3]), r"0\.\.2.*got 0\.\.3.*resize_answer_head"),
        (torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]]), r"in \[0, 1\], .* got 0.0..2.0"),
        (torch.tensor([[0.0, -100.0, 1.0], [0.0, 0.0, 0.0]]), r"all 0 for a row without; got -100.0..1.0"),
        ([0, 1], r"`labels` must be a tensor, got a list"),
        (torch.full((2, 3), math.nan), r"in \[0, 1\], .* got nan"),
    ],
)
def test_labels_that_would_be_misread_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels(labels, 2, 3)


@pytest.mark.parametrize("labels", [torch.full((2,), -100), torch.zeros(2, 3)], ids=["answers", "scores"])
def test_a_batch_without_any_answer_is_told_once(labels, caplog):
    inputs_hivilt.logger.warning_once.cache_clear()
    for _ in range(2):
        check_labels(labels, 2, 3)
    assert classification_loss(torch.zeros(2, 3), labels) == 0
    assert [record.message[:54] for record in caplog.records] == [
        "None of the 2 texts of a batch has an answer among the"
    ]


def test_chunks_of_nothing_are_refused(batch):
    with pytest.raises(ValueError, match="`chunk_size` must be at least 1.*got 0"):
        make_model(HiViLTForRetrieval)(**batch, chunk_size=0)


def test_an_image_index_for_other_texts_is_refused(batch):
    for model_class in OF_A_BATCH:
        with pytest.raises(ValueError, match="2 images cannot be paired with 5 texts"):
            make_model(model_class)(**{**batch, "image_index": torch.tensor([0, 1])})


def _wrong(batch, **changes):
    return {**batch, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_index": torch.tensor([0, 1, 1, 2, 3])}, r"`image_index` must lie in 0..2.*\[0, 1, 1, 2, 3\]"),
        ({"image_index": torch.tensor([0, -1, 1, 2, 2])}, "`image_index` must lie in 0..2"),
        ({"image_index": torch.tensor([0.0, 1, 1, 2, 2])}, "`image_index` must be a vector of integers"),
        ({"image_index": None}, "3 images cannot be paired with 5 texts. Give `image_index`"),
        ({"image_index": torch.tensor([0, 1])}, "2 images cannot be paired with 5 texts"),
        ({"pixel_values": None}, "either `pixel_values` or `image_states`"),
        ({"pixel_values": torch.zeros(3, 3, 20, 20, dtype=torch.uint8)}, "`pixel_values` must be a float tensor"),
        ({"pixel_values": torch.zeros(3, 20, 20)}, "`pixel_values` must be a float tensor of shape"),
        ({"input_ids": None}, "either `input_ids` or `inputs_embeds`"),
        ({"attention_mask": torch.ones(5, 6)}, r"`attention_mask` must have the texts' shape \(5, 7\), got \(5, 6\)"),
        (
            {"input_ids": torch.ones(5, 25, dtype=torch.long), "attention_mask": None},
            "texts have 25 tokens.*takes 24; tokenize with `truncation=True, max_length=24`",
        ),
        (
            {"input_ids": torch.full((5, 7), 9999)},
            r"`input_ids` must lie in 0\.\.\d+.*got 9999\.\.9999. Take the processor",
        ),
        ({"labels": torch.tensor([0, 1, 2, 3, 5])}, r"`labels` must lie in 0..4.*resize_answer_head"),
        ({"labels": torch.tensor([0, 1])}, r"integers of shape \(5,\), an answer for each text"),
        ({"labels": torch.zeros(5, 6)}, r"floats of shape \(5, 5\), .*got torch.float32 of shape \(5, 6\)"),
    ],
)
def test_bad_input_is_named_with_its_remedy(changes, message, batch):
    model = make_model(HiViLTForQuestionAnswering)
    with pytest.raises(ValueError, match=message):
        model(**_wrong(batch, **changes))


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_losses_from_what_encoders_gave_know_equal_texts_and_come_in_chunks(chunk_size, batch):
    model = make_model(HiViLTForRetrieval, weight_scale=4.0)
    batch["input_ids"][3] = batch["input_ids"][0]
    batch["attention_mask"][3] = batch["attention_mask"][0]
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "image_index")} | {"return_loss": True}
    kept = {
        "feature_maps": model.get_feature_maps(batch["pixel_values"]),
        "token_states": model.get_token_states(batch["input_ids"], batch["attention_mask"]),
    }
    found = model(**given, **kept, chunk_size=chunk_size)
    torch.testing.assert_close(found.loss, model(**given, pixel_values=batch["pixel_values"]).loss)
    assert not torch.isclose(found.loss, model(**given | {"input_ids": None}, **kept).loss)


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"feature_maps": torch.zeros(2, 3, 5, 5)},
            "`feature_maps` must be float tensors of shapes .*get_feature_maps",
        ),
        ({"feature_maps": [torch.zeros(3, 5, 5, 24)]}, r"\(B_i, height, width, 24\), \(B_i, height, width, 24\)"),
        ({"feature_maps": [torch.zeros(3, 24, 5, 5)] * 2}, r"got torch.float32 of shape \(3, 24, 5, 5\)"),
        ({"feature_maps": [torch.zeros(3, 5, 5, 24), torch.zeros(2, 5, 5, 24)]}, "`feature_maps` must be"),
        ({"feature_maps": ()}, "`feature_maps` must be .*got none"),
        (
            {"token_states": torch.zeros(5, 7, 17)},
            r"`token_states` must be .*\(texts, tokens, 18\).*got .*\(5, 7, 17\)",
        ),
        ({"token_states": torch.zeros(5, 7, 18).long()}, "`token_states` must be a float tensor"),
        ({"token_states": torch.zeros(5, 6, 18)}, r"`token_states` must be .*\(5, 6, 18\)"),
        ({"token_states": torch.zeros(5, 7, 18), "attention_mask": torch.ones(5, 6)}, "`attention_mask` must have"),
        (
            {"token_states": torch.zeros(5, 7, 18), "inputs_embeds": torch.zeros(5, 7, 18), "input_ids": None},
            "not both",
        ),
    ],
)
def test_states_that_are_none_of_these_encoders_are_named(given, message, batch):
    model = make_model(HiViLTModel)
    images = "pixel_values" if "feature_maps" in given else "labels"
    inputs = {name: value for name, value in batch.items() if name not in (images, "labels", "image_ids")}
    with pytest.raises(ValueError, match=message):
        model(**inputs | given)


def test_states_and_inputs_together_are_refused(batch):
    model = make_model(HiViLTForQuestionAnswering)
    with pytest.raises(ValueError, match="not both|exactly one"):
        model(**batch, text_states=model.encode_texts(batch["input_ids"]))
    with pytest.raises(ValueError, match="exactly one"):
        model(**batch, image_states=model.encode_images(batch["pixel_values"]))
    with pytest.raises(ValueError, match="exactly one"):
        model(**batch, feature_maps=model.get_feature_maps(batch["pixel_values"]))
    with pytest.raises(ValueError, match="exactly one"):
        model.encode_images()


@pytest.mark.parametrize("model_class", OF_A_BATCH)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_an_image_index_of_any_width_counts_images(model_class, dtype, batch):
    model = make_model(model_class)
    wish = {"return_loss": True} if model_class is HiViLTForRetrieval else {}
    expected = model(**batch, **wish)
    outputs = model(**{**batch, "image_index": batch["image_index"].to(dtype)}, **wish)
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(outputs[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("model_class", OF_A_BATCH)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_index": torch.tensor([True] * 5)}, "`image_index` must be a vector of integers, got torch.bool"),
        ({"image_index": torch.zeros(5)}, "`image_index` must be a vector of integers, got torch.float32"),
        ({"image_index": torch.zeros(5, 1).long()}, r"vector of integers, got torch.int64 of shape \(5, 1\)"),
        ({"image_index": [0, 1, 1, 2, 0]}, "`image_index` must be a vector of integers, got a list"),
        ({"image_index": torch.tensor([0])}, "1 images cannot be paired with 5 texts"),
        ({"input_ids": torch.arange(7)}, r"`input_ids` must be .*\(texts, tokens\).*got torch.int64 of shape \(7,\)"),
        ({"input_ids": torch.ones(5, 7)}, "`input_ids` must be integers"),
        ({"pixel_values": torch.zeros(3, 20, 20)}, r"\(images, channels, height, width\).*got .* \(3, 20, 20\)"),
        ({"attention_mask": torch.full((5, 7), -1e4)}, "`attention_mask` must be 1 at tokens and 0 at padding"),
        (
            {"attention_mask": make_batch()["attention_mask"] - 1},
            "`attention_mask` must be 1 at tokens and 0 at padding",
        ),
        ({"pixel_values": [torch.zeros(3, 20, 20)] * 3}, "`pixel_values` must be a float tensor.*got a list"),
        ({"image_idx": torch.tensor([0, 1, 1, 2, 0])}, "no argument `image_idx`; did you mean `image_index`"),
        ({"pixel_mask": torch.tensor([[[1, 0]]] * 3)}, "`pixel_mask` has zeros, .* images of one size"),
        ({"attention_masks": torch.ones(5, 7)}, "no argument `attention_masks`; did you mean `attention_mask`"),
    ],
)
def test_inputs_that_would_be_misread_are_refused(model_class, change, message, batch):
    with pytest.raises(ValueError, match=message):
        make_model(model_class)(**batch | change)


def test_columns_of_a_dataset_beside_the_inputs_change_nothing(batch):
    model = make_model(HiViLTForQuestionAnswering)
    columns = {"image_id": [7] * 3, "question_id": [1] * 5, "label": torch.zeros(5)}
    columns["pixel_mask"] = torch.ones(3, 20, 20)
    torch.testing.assert_close(model(**batch, **columns).logits, model(**batch).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        ({"attention_mask": None}, ["`input_ids` end in the padding token 0, but there is no `attention_mask`"]),
        ({"image_index": torch.tensor([0, 1, 0, 1, 0])}, ["`image_index` names no text of some images"]),
    ],
)
def test_padding_without_a_mask_and_encodings_that_were_joined_are_told_once(change, told, batch, caplog):
    inputs_hivilt.logger.warning_once.cache_clear()
    model = make_model(HiViLTForQuestionAnswering)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 0)
    for _ in range(2):
        model(**batch | change)
    assert [record.message.split(".")[0].split(":")[0] for record in caplog.records] == told


def test_encodings_that_were_joined_are_told_by_retrieval_too(batch, caplog):
    inputs_hivilt.logger.warning_once.cache_clear()
    make_model(HiViLTForRetrieval)(**batch | {"image_index": torch.tensor([0, 1, 0, 1, 0])}, return_loss=True)
    assert [record.message.split(".")[0] for record in caplog.records] == ["`image_index` names no text of some images"]


@pytest.mark.parametrize("name", ["image_ids", "text_ids"])
def test_numbers_that_are_none_or_of_other_rows_are_refused(name, batch):
    model = make_model(HiViLTForRetrieval)
    rows = {"image_ids": 3, "text_ids": 5}[name]
    for value in (torch.zeros(rows), torch.zeros(rows).bool(), torch.zeros(2).long(), [0] * rows):
        with pytest.raises(ValueError, match=f"`{name}` must hold an integer for each of the {rows} "):
            model(**batch, **{name: value}, return_loss=True)


PIXELS = torch.zeros(5, 2, 3, 20, 20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            r"`image_index` must be integers of shape \(texts, 2\), .*`config.num_images`; got torch.int64 of shape \(5,\)",
        ),
        (
            {"image_index": PAIRS[:, [0, 1, 1]]},
            r"`image_index` must be .* \(texts, 2\).* got torch.int64 of shape \(5, 3\)",
        ),
        ({"image_index": PAIRS.float()}, r"`image_index` must be integers .*got torch.float32"),
        ({"image_index": PAIRS.tolist()}, "`image_index` must be integers .*got a list"),
        ({"image_index": PAIRS + 1}, r"`image_index` must lie in 0..2 for 3 images; got \[1, 2, 2, 1, 2, 3"),
        ({"image_index": PAIRS[:4]}, "`image_index` names the images of 4 texts, got 5 texts: give a row for each"),
        (
            {"image_index": None},
            r"3 images are not 2 \(`config.num_images`\) for each of 5 texts. Give `image_index`, of",
        ),
        (
            {"pixel_values": PIXELS, "image_index": PAIRS},
            r"\(5, 2, 3, 20, 20\) say by themselves .*leave out `image_index`",
        ),
        ({"pixel_values": PIXELS[:, :1], "image_index": None}, "have 1 images for each text, but this model takes 2"),
        ({"pixel_values": PIXELS[:4], "image_index": None}, "8 images are not 2 .* for each of 5 texts"),
        ({"image_idx": PAIRS}, "no argument `image_idx`; did you mean `image_index`"),
        (
            {"image_index": PAIRS, "labels": PAIRS},
            r"`labels` must be integers of shape \(5,\), an answer for each text",
        ),
        ({"image_index": PAIRS, "labels": PAIRS[:, 0] + 9}, r"`labels` must lie in 0..4"),
    ],
)
def test_other_images_than_as_many_as_the_config_says_are_refused(changes, message, batch):
    model = make_model(HiViLTForImagesAndTextClassification)
    with pytest.raises(ValueError, match=message):
        model(**batch | changes)


BOX = [0.5, 0.4, 0.2, 0.3]


def test_boxes_of_all_texts_are_filled_up_with_zeros():
    labels = [{"boxes": torch.tensor([BOX, BOX]).double(), "image_id": 3}, {"boxes": torch.zeros(0, 4)}]
    boxes = batched_boxes(labels, 2)
    torch.testing.assert_close(boxes, torch.tensor([[BOX, BOX], [[0.0] * 4] * 2]))
    assert batched_boxes(labels[1:], 1).tolist() == [[[0.0] * 4]]
    # The whole image, and what rounding takes out of it.
    batched_boxes([{"boxes": torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.1, 0.9, 0.21, 0.2]])}], 1)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([BOX], "got a list"),
        (torch.tensor(BOX), r"floats \(n, 4\).*`torch.zeros\(0, 4\)` where nothing.*got torch.float32 of shape \(4,\)"),
        (torch.tensor([]), r"`labels\[1\]` must be .*got torch.float32 of shape \(0,\)"),
        (torch.tensor([[12, 40, 30, 20]]), "got torch.int64"),
        (torch.tensor([BOX, [0.5, math.nan, 0.1, 0.1]]), r"`labels\[1\]`: box 1 is not .*nan.*is not finite"),
        (torch.tensor([[0.5, 0.5, math.inf, 0.1]]), "is not finite"),
        (torch.tensor([[120.0, 40.0, 30.0, 20.0]]), r"\[120.0, 40.0, 30.0, 20.0\]; they look like pixels: divide"),
        (torch.tensor([[0.5, 0.5, 0.0, 0.2]]), "with an area; .*leave out those without area"),
        (torch.tensor([[0.5, 0.5, 0.2, -0.2]]), "leave out those without area"),
        (torch.tensor([[0.1, 0.5, 0.4, 0.2]]), "cut boxes at the borders"),
        (torch.tensor([[1.2, 0.5, 0.1, 0.1]]), "cut boxes at the borders"),
        (torch.tensor([[0.6, 0.5, 0.9, 0.7]]), r"look like \(left, top, right, bottom\): give centre"),
        (torch.tensor([[0.4, 0.4, 0.5, 0.6], [0.0, 0.1, 0.9, 1.0]]), "box 1 .* look like .left, top, right, bottom"),
    ],
)
def test_boxes_that_would_be_misread_are_refused(boxes, message):
    with pytest.raises(ValueError, match=message):
        batched_boxes([{"boxes": torch.zeros(0, 4)}, {"boxes": boxes}], 2)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([{"boxes": torch.zeros(0, 4)}] * 3, "`labels` must be a list of 5, a dict for each text.*got 3"),
        (torch.rand(5, 4), "`labels` must be a list of 5.*got torch.float32 of shape"),
        ([torch.rand(1, 4)] * 5, r"`labels\[0\]` must be a dict for each text"),
        ([{"box": torch.rand(1, 4)}] * 5, r"`labels\[0\]` must be .*got a dict of \['box'\]"),
    ],
)
def test_labels_that_are_no_boxes_are_refused(labels, message, batch):
    with pytest.raises(ValueError, match=message):
        make_model(HiViLTForVisualGrounding)(**batch, labels=labels)
