"""Losses against loops over anchors, equal images and captions, chunks, and several processes."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

from hivilt import (
    HiViLTForQuestionAnswering,
    HiViLTForRetrieval,
)
from hivilt.losses_hivilt import (
    classification_loss,
    contrastive_loss,
    first_equal,
    grounding_loss,
    hard_negatives,
    left_aligned,
)
from hivilt.training.command import run_command
from processes import launch
from tiny import FUSIONS, losses_and_gradients, make_batch, make_model, with_dropout


def test_integer_labels_give_the_mean_cross_entropy_of_the_answered_rows():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([2, -100, 0, 1])
    rows = [0, 2, 3]
    expected = -sum(torch.log_softmax(logits[r], -1)[labels[r]] for r in rows) / 3
    torch.testing.assert_close(classification_loss(logits, labels), expected)
    assert classification_loss(logits, torch.full((4,), -100)) == 0


def test_soft_labels_give_binary_cross_entropy_times_classes_over_the_answered_rows():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0.3, 0, 1, 0], [0, 0, 0, 0], [0, 0.6, 0, 0]])
    expected = F.binary_cross_entropy_with_logits(logits[[0, 2]], labels[[0, 2]]) * 4
    torch.testing.assert_close(classification_loss(logits, labels), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_integer_labels_of_any_width_are_answers(dtype):
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([2, 1, 0, 1])
    assert classification_loss(logits, labels.to(dtype)) == classification_loss(logits, labels)


def test_scores_that_are_no_numbers_make_a_loss_that_is_none():
    logits = torch.tensor([[0.0, math.nan, 0.0], [0.0, 0.0, 0.0]])
    assert classification_loss(logits, torch.tensor([0, 1])).isnan()
    assert classification_loss(logits, torch.eye(2, 3)).isnan()


def test_loss_of_boxes_equals_a_loop_over_rows():
    """In plain numbers, of three texts on a grid of 2 by 3: one box, two of which one is smaller than a cell, none."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 6, generator=generator)
    pred_boxes = torch.rand(3, 6, 4, generator=generator) * 0.8 + 0.1
    texts = [[[0.4, 0.5, 0.7, 0.9]], [[0.6, 0.6, 0.6, 0.8], [0.9, 0.1, 0.05, 0.1]], []]
    total, num_positive = 0.0, []
    for text, boxes in enumerate(texts):
        own, positives = 0.0, 0
        for row in range(6):
            x, y = (row % 3 + 0.5) / 3, (row // 3 + 0.5) / 2
            claims = [
                (w * h, [cx, cy, w, h])
                for cx, cy, w, h in boxes
                if (abs(x - cx) < w / 2 and abs(y - cy) < h / 2) or (int(cx * 3), int(cy * 2)) == (row % 3, row // 3)
            ]
            probability = 1 / (1 + math.exp(-logits[text, row].item()))
            if not claims:
                own -= 2 * math.log(1 - probability)
                continue
            positives += 1
            own -= 2 * math.log(probability)
            target, predicted = min(claims)[1], pred_boxes[text, row].double().tolist()
            own += 5 * sum(abs(a - b) for a, b in zip(target, predicted, strict=True))
            shared = hull = 1.0
            for axis in (0, 1):
                starts = [box[axis] - box[axis + 2] / 2 for box in (target, predicted)]
                ends = [box[axis] + box[axis + 2] / 2 for box in (target, predicted)]
                shared *= max(min(ends) - max(starts), 0)
                hull *= max(ends) - min(starts)
            union = target[2] * target[3] + predicted[2] * predicted[3] - shared
            own += 2 * (1 - shared / union + (hull - union) / hull)
        total += own / max(positives, 1)
        num_positive.append(positives)
    assert num_positive == [4, 4, 0]
    padded = torch.zeros(3, 2, 4)
    for text, boxes in enumerate(texts):
        padded[text, : len(boxes)] = torch.tensor(boxes).view(-1, 4)
    found = grounding_loss(logits, pred_boxes, padded, (2, 3))
    torch.testing.assert_close(found, torch.tensor(total / 3))
    torch.testing.assert_close(grounding_loss(logits, pred_boxes, padded, (2, 3), torch.tensor(7)), found * 3 / 7)


def test_loss_of_boxes_is_finite_and_pulls_where_nothing_overlaps():
    """Scores and boxes of any size, as the first steps may give them; a box far away is drawn nearer by its hull."""
    logits = torch.tensor([[-90.0, 90.0, 0.0, 90.0]]).half().requires_grad_()
    pred_boxes = torch.tensor(
        [[[0.9, 0.9, 1e-9, 1e-9], [0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 1.0, 1.0], [1.0, 1.0, 0.1, 0.1]]]
    )
    pred_boxes.requires_grad_()
    boxes = torch.tensor([[[0.1, 0.1, 0.1, 0.1], [0.9, 0.2, 0.2, 0.3]]])
    loss = grounding_loss(logits, pred_boxes, boxes, (2, 2))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and pred_boxes.grad.isfinite().all()
    assert (pred_boxes.grad[0, 0, :2] > 0).all()
    assert (pred_boxes.grad[0, 2:] == 0).all()  # rows of no box


def test_contrastive_loss_equals_a_loop_over_anchors():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    positives = torch.tensor([[1, 0, 0, 0, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    losses = []
    for matrix, matches in ((logits, positives), (logits.t(), positives.t())):
        rows = [
            -torch.stack([torch.log_softmax(row, -1)[i] for i in torch.where(match)[0]]).mean()
            for row, match in zip(matrix, matches, strict=True)
            if match.any()
        ]
        losses.append(torch.stack(rows).mean())
    torch.testing.assert_close(contrastive_loss(logits, positives), sum(losses) / 2)


def test_texts_of_the_same_image_do_not_repel_each_other():
    """Two rows of one image: swapping their texts changes nothing, and neither is pushed from the other's text."""
    logits = torch.tensor([[3.0, 3.0, -9.0], [3.0, 3.0, -9.0], [-9.0, -9.0, 3.0]], requires_grad=True)
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    contrastive_loss(logits, same).backward()
    assert logits.grad[0, 1].abs() < 1e-5 and logits.grad[1, 0].abs() < 1e-5
    logits.grad = None
    contrastive_loss(logits, torch.eye(3).bool()).backward()
    assert logits.grad[0, 1] > 0.1


@pytest.mark.checklist("8")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_hard_negatives_never_match_and_survive_extremes(dtype):
    logits = torch.tensor([[9e4, 1.0, 0.0], [-9e4, -9e4, 9e4], [0.0, 0.0, 0.0]]).to(dtype)
    positives = torch.tensor([[1, 0, 0], [0, 0, 1], [1, 1, 1]]).bool()
    chosen, valid = hard_negatives(logits, positives, sample=False)
    assert valid.tolist() == [[True], [True], [False]]
    assert chosen[0] == 1 and chosen[1] in (0, 1)
    torch.manual_seed(0)
    for count in (1, 2, 5):
        for _ in range(20):
            sampled, valid = hard_negatives(logits, positives, sample=True, count=count)
            assert sampled.shape == (3, min(count, 3))
            assert valid.sum(1).tolist() == [min(count, 2), min(count, 2), 0]
            assert not positives.gather(1, sampled)[valid].any()
            assert all(len(set(row)) == len(row) for row in sampled.tolist())


def test_hard_negatives_are_drawn_by_their_probability():
    logits = torch.tensor([[9.0, 2.0, 1.0, 0.0]]).expand(4000, 4)
    positives = torch.tensor([[True, False, False, False]]).expand(4000, 4)
    torch.manual_seed(0)
    chosen, _ = hard_negatives(logits, positives, sample=True, count=2)
    expected = torch.tensor([2.0, 1.0, 0.0]).softmax(0)
    shares = torch.bincount(chosen[:, 0], minlength=4)[1:] / 4000
    torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)
    # After the first is gone, the second is drawn from the others.
    second = chosen[chosen[:, 0] == 1, 1]
    assert (second == 2).float().mean() == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)


@pytest.mark.parametrize("count", [1, 2, 9])
def test_fused_matching_equals_a_loop_over_pairs(count, batch):
    model = make_model(HiViLTForRetrieval, weight_scale=8.0, num_hard_negatives=count)
    with torch.no_grad():
        outputs = model(**batch, return_loss=True)
        image_states = model.encode_images(batch["pixel_values"])
        text_states = model.encode_texts(batch["input_ids"], batch["attention_mask"])
        score = lambda i, t: model.score(image_states, text_states, torch.tensor([i]), torch.tensor([t]))[0].double()
        scale = model.matching_logit_scale.exp().double()
        losses = []
        owner = batch["image_index"].tolist()
        for text, image in enumerate(owner):
            match = torch.exp(scale * score(image, text))
            others = sorted({0, 1, 2} - {image}, key=lambda i: -outputs.logits_per_image[i, text])[:count]
            losses.append(-torch.log(match / (match + sum(torch.exp(scale * score(i, text)) for i in others))))
            others = [t for t in range(5) if owner[t] != image]
            others = sorted(others, key=lambda t: -outputs.logits_per_image[image, t])[:count]
            losses.append(-torch.log(match / (match + sum(torch.exp(scale * score(image, t)) for t in others))))
    expected = torch.stack(losses).mean().float()
    torch.testing.assert_close(outputs.auxiliary_loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.loss, outputs.contrastive_loss + outputs.auxiliary_loss)
    assert outputs.num_dropped_anchors == 0


@pytest.mark.checklist("8")
@pytest.mark.parametrize(("rows", "image_ids"), [(1, None), (3, [7, 7, 7])], ids=["one pair", "all the same image"])
@pytest.mark.parametrize("training", [True, False])
def test_batches_without_negatives_still_train(rows, image_ids, training, batch):
    model = make_model(HiViLTForRetrieval).train(training)
    outputs = model(
        input_ids=batch["input_ids"][:rows],
        attention_mask=batch["attention_mask"][:rows],
        pixel_values=batch["pixel_values"][:rows],
        image_ids=None if image_ids is None else torch.tensor(image_ids),
        return_loss=True,
    )
    outputs.loss.backward()
    assert outputs.num_dropped_anchors == 2 * rows and outputs.auxiliary_loss == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("text", "chunk_size"), [("bert", 1), ("bert", 3), ("bert", 8), ("t5", 2)])
def test_chunks_give_the_loss_and_gradients_of_the_whole_batch(chunk_size, text, batch):
    model = make_model(HiViLTForRetrieval, text=text, weight_scale=8.0 if text == "bert" else 1.0, num_hard_negatives=2)
    # In float64, where the order of sums is too small to see.
    model, batch = model.double(), {**batch, "pixel_values": batch["pixel_values"].double()}
    loss, gradients = losses_and_gradients(model, **batch, image_ids=torch.tensor([4, 9, 4]))
    chunked_loss, chunked = losses_and_gradients(
        model, **batch, image_ids=torch.tensor([4, 9, 4]), chunk_size=chunk_size
    )
    torch.testing.assert_close(chunked_loss, loss)
    assert chunked.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked[name], gradient, msg=lambda m, name=name: f"{name}: {m}")


def test_chunks_draw_dropout_once_and_leave_frozen_encoders_alone(batch):
    """The second pass over a chunk must see the units that the first one dropped, or the gradient is another model's."""
    model = make_model(HiViLTForRetrieval, weight_scale=8.0, dropout=0.5).train()
    model.freeze("vision")
    whole = {**batch, "chunk_size": 8}
    torch.manual_seed(3)
    loss, gradients = losses_and_gradients(model, **whole)
    torch.manual_seed(3)
    again = model(**whole).loss
    torch.testing.assert_close(again, loss)
    # A step of a size epsilon along one direction changes the loss, under the same units, as the gradient says.
    name, epsilon = "visual_projection.weight", 1e-3
    parameter = dict(model.named_parameters())[name]
    direction = gradients[name] / gradients[name].norm()
    moved = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(sign * epsilon * direction)
            torch.manual_seed(3)
            moved.append(model(**whole).loss)
            parameter.sub_(sign * epsilon * direction)
    assert (moved[0] - moved[1]).item() / (2 * epsilon) == pytest.approx(gradients[name].norm().item(), rel=2e-2)
    assert not any(name.startswith("model.vision_model") for name in gradients)


def test_memory_for_the_backward_pass_follows_the_chunk():
    """What autograd keeps between the passes, for 12 images and texts."""
    model = make_model(HiViLTForRetrieval)
    inputs = {
        "pixel_values": torch.randn(12, 3, 20, 20),
        "input_ids": torch.randint(5, 61, (12, 7)),
        "attention_mask": torch.ones(12, 7, dtype=torch.long),
    }

    def kept(**flags):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = model(**inputs, return_loss=True, **flags)
        del outputs
        return sum(storages.values()) - sum(p.numel() * p.element_size() for p in model.parameters())

    assert kept(chunk_size=2) < kept() / 4


def test_loss_weights_are_applied(batch):
    labels = torch.tensor([0, 1, 2, 3, 4])
    plain = make_model(HiViLTForQuestionAnswering)(**batch, labels=labels).loss
    torch.testing.assert_close(
        make_model(HiViLTForQuestionAnswering, classification_loss_weight=3.0)(**batch, labels=labels).loss, 3 * plain
    )
    model = make_model(HiViLTForQuestionAnswering, auxiliary_loss_weight=0.5)
    outputs = model(**batch, labels=labels)
    assert outputs.loss > classification_loss(outputs.logits, labels)
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    retrieval = {"contrastive_loss_weight": 0.25, "auxiliary_loss_weight": 4.0}
    outputs = make_model(HiViLTForRetrieval, **retrieval)(**batch, return_loss=True)
    torch.testing.assert_close(outputs.loss, 0.25 * outputs.contrastive_loss + 4 * outputs.auxiliary_loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_similarities_are_not_rounded_by_autocast(batch, dtype):
    model = make_model(HiViLTForRetrieval)
    with torch.no_grad():
        model.logit_scale.fill_(4.6)
        with torch.autocast("cpu", dtype=dtype):
            outputs = model(**batch, return_loss=True)
    exact = math.exp(4.6) * (outputs.image_embeds.double() @ outputs.text_embeds.double().t())
    torch.testing.assert_close(outputs.logits_per_image.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_temperature_stays_finite_and_at_most_one_hundred_under_bf16(batch):
    model = make_model(HiViLTForRetrieval).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with torch.no_grad():
        model.logit_scale.fill_(50.0)
    for _ in range(50):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(**batch)
        optimizer.zero_grad()
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        assert outputs.loss.isfinite()
        assert outputs.logits_per_image.abs().max() <= 100.01
    assert outputs.image_embeds.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_class", "dtype"),
    [
        (HiViLTForQuestionAnswering, torch.bfloat16),
        (HiViLTForRetrieval, torch.float16),
    ],
)
def test_eighty_steps_in_half_precision_are_finite_and_learn(model_class, dtype):
    model = make_model(model_class, dropout=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    batch = make_batch() | {"attention_mask": make_batch()["attention_mask"].clone()}
    batch["attention_mask"][3] = 0  # a text of nothing but padding
    if model_class is HiViLTForQuestionAnswering:
        batch["labels"] = torch.arange(5)
    losses = []
    for _ in range(80):
        with torch.autocast("cpu", dtype=dtype):
            outputs = model(**batch)
        optimizer.zero_grad()
        scaler.scale(outputs.loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(outputs.loss.item())
    assert all(math.isfinite(loss) for loss in losses) and sum(losses[-10:]) < sum(losses[:10]) / 2
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("fusion", FUSIONS.values(), ids=FUSIONS.keys())
def test_a_text_of_nothing_but_padding_is_finite_and_touches_no_other(fusion, batch):
    model = make_model(HiViLTForQuestionAnswering, weight_scale=8.0, **fusion)
    expected = model(**batch).logits
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][2] = 0
    logits = model(**batch).logits
    assert logits.isfinite().all()
    others = [0, 1, 3, 4]
    torch.testing.assert_close(logits[others], expected[others], atol=1e-5, rtol=1e-5)
    logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@given(st.permutations(range(5)), st.integers(1, 5), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_what_else_is_in_a_batch_changes_nothing(order, number, padding):
    model, batch = make_model(HiViLTForQuestionAnswering, weight_scale=8.0, fusion_top_k=4), make_batch()
    some = torch.tensor(order[:number])
    with torch.no_grad():
        expected = model(**batch).logits[some]
        part = {name: F.pad(batch[name][some], (0, padding)) for name in ("input_ids", "attention_mask")}
        logits = model(**part, pixel_values=batch["pixel_values"], image_index=batch["image_index"][some]).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_retrieval_without_known_pairs_scores_but_has_no_loss(batch):
    """One image and several candidate texts, as zero-shot classification calls it."""
    model = make_model(HiViLTForRetrieval)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")} | {
        "pixel_values": batch["pixel_values"][:1]
    }
    outputs = model(**inputs)
    assert outputs.logits_per_image.shape == (1, 5) and outputs.loss is None
    for asked in (lambda: model(**inputs, return_loss=True), lambda: model.train()(**inputs)):
        with pytest.raises(ValueError, match="1 images cannot be paired with 5 texts"):
            asked()


LOSSES = ("loss", "contrastive_loss", "auxiliary_loss", "num_dropped_anchors")


def test_a_loss_comes_where_it_is_asked_for_or_trained_and_nowhere_else(batch):
    one_by_one = {name: value[:3] for name, value in batch.items() if name != "image_index"}
    for inputs in (batch, one_by_one):
        model = make_model(HiViLTForRetrieval)
        plain = model(**inputs)
        assert [plain[name] for name in plain if name in LOSSES] == []
        asked = model(**inputs, return_loss=True)
        assert all(asked[name].isfinite() for name in LOSSES)
        model.config.return_loss = True
        assert model(**inputs).loss == asked.loss
        assert model(**inputs, return_loss=False).loss is None
        model.config.return_loss = False
        assert model.train()(**inputs).loss.requires_grad
        assert model(**inputs, return_loss=False).loss is None


def test_a_model_that_always_has_a_loss_still_chooses_among_captions(batch):
    model = make_model(HiViLTForRetrieval, return_loss=True)
    inputs = {**batch, "pixel_values": batch["pixel_values"][:1], "image_index": None}
    assert model(**inputs).loss is None
    with pytest.raises(ValueError, match="1 images cannot be paired with 5 texts.*`image_index`"):
        model(**inputs, return_loss=True)


def as_one_caption(batch, *rows: int) -> dict[str, torch.Tensor]:
    """These texts are the first of them, each under padding of its own: to the right, to the left, and in between."""
    length = int(batch["attention_mask"][rows[0]].sum())
    tokens = batch["input_ids"][rows[0], :length]
    ids, mask = F.pad(batch["input_ids"], (0, 4)), F.pad(batch["attention_mask"], (0, 4))
    wide = ids.shape[1]
    places = [torch.arange(length), torch.arange(wide - length, wide), torch.arange(length) + torch.arange(length) // 3]
    for row, place in zip(rows, places, strict=False):
        ids[row], mask[row] = 7, 0
        ids[row, place], mask[row, place] = tokens, 1
    return {**batch, "input_ids": ids, "attention_mask": mask}


def test_images_with_the_same_caption_are_no_negatives_of_each_other(batch):
    """Texts 0, 2 and 3 are one caption, of images 0, 1 and 2."""
    model = make_model(HiViLTForRetrieval, weight_scale=8.0, num_hard_negatives=9)
    expected = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 0, 1, 1, 0]]).bool()
    inputs = as_one_caption(batch, 0, 2, 3)
    outputs = model(**inputs, return_loss=True)
    floor = (math.log(4) + math.log(4) + math.log(3)) / 3 / 2 + 3 * math.log(3) / 5 / 2
    contrastive = contrastive_loss(outputs.logits_per_image, expected) - floor
    torch.testing.assert_close(outputs.contrastive_loss, contrastive)
    # Texts 0, 2 and 3 have no image left that is not theirs; every image has a text that is not its own.
    assert outputs.num_dropped_anchors == 3

    ids = {"text_ids": torch.tensor([8, 3, 8, 8, 4])}
    states = model.encode_texts(inputs["input_ids"], inputs["attention_mask"])
    embeds = model.model.text_model.get_input_embeddings()(inputs["input_ids"])
    pairs = {"pixel_values": batch["pixel_values"], "image_index": batch["image_index"], "return_loss": True}
    for texts in (
        {"text_states": states},
        {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], **ids},
        {**{name: inputs[name] for name in ("input_ids", "attention_mask")}, "chunk_size": 2},
    ):
        torch.testing.assert_close(model(**pairs, **texts).loss, outputs.loss)
    # By `text_ids` alone, too, whatever the tokens.
    assert model(**{**batch, **ids}, return_loss=True).num_dropped_anchors == 3


def test_captions_that_begin_alike_are_not_the_same(batch):
    model = make_model(HiViLTForRetrieval, weight_scale=8.0)
    inputs = as_one_caption(batch, 0, 2)
    inputs["attention_mask"][2, -1] = 0  # its last token
    assert model(**inputs, return_loss=True).num_dropped_anchors == 0


def test_two_images_with_one_caption_can_be_learned_to_the_end(batch):
    """As two captions of two images, the loss could not fall under ln 2."""
    model = make_model(HiViLTForRetrieval)
    inputs = {name: batch[name][[0, 0]] for name in ("input_ids", "attention_mask", "pixel_values")}
    outputs = model(**inputs, return_loss=True)
    assert outputs.num_dropped_anchors == 4 and outputs.loss.abs() < 1e-6


def test_questions_asked_of_several_images_are_no_negatives_either(batch):
    model = make_model(HiViLTForQuestionAnswering, weight_scale=8.0, auxiliary_loss_weight=1.0)
    inputs = as_one_caption(batch, 0, 2, 3) | {"labels": torch.tensor([0, 1, 2, 3, 4])}
    outputs = model(**inputs)
    states = (
        model.encode_images(inputs["pixel_values"]),
        model.encode_texts(inputs["input_ids"], inputs["attention_mask"]),
    )
    images = F.normalize(model.visual_projection(states[0].global_state), dim=-1)
    texts = F.normalize(model.text_projection(states[1].global_state), dim=-1)
    positives = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 0, 1, 1, 0]]).bool()
    floor = (2 * math.log(4) + math.log(3)) / 3 / 2 + 3 * math.log(3) / 5 / 2
    auxiliary = contrastive_loss(model.logit_scale.exp() * images @ texts.t(), positives) - floor
    torch.testing.assert_close(outputs.loss, classification_loss(outputs.logits, inputs["labels"]) + auxiliary)


@given(st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=1, max_size=6), st.randoms())
@settings(max_examples=40, deadline=None)
def test_texts_are_the_same_where_their_tokens_are(texts, random):
    ids, mask = torch.randint(0, 3, (len(texts), 7)), torch.zeros(len(texts), 7, dtype=torch.long)
    for row, tokens in enumerate(texts):
        places = torch.tensor(sorted(random.sample(range(7), len(tokens))), dtype=torch.long)
        ids[row, places], mask[row, places] = torch.tensor(tokens, dtype=torch.long), 1
    assert first_equal(left_aligned(ids, mask)).tolist() == [texts.index(tokens) for tokens in texts]


CASES = {
    "images differ": {},
    "images repeat": {"image_ids": [5, 5, 6]},
    "in chunks": {"chunk_size": 2},
    "captions repeat": {"texts": [0, 1, 2, 0, 4]},
}


def make_matching_model(**fields) -> HiViLTForRetrieval:
    """In training, but without chance: no dropout, and all negatives, of which each process would draw its own."""
    return with_dropout(make_model(HiViLTForRetrieval, weight_scale=8.0, num_hard_negatives=9, **fields), 0.0).train()


def batch_of(case: str) -> dict[str, torch.Tensor]:
    """The batch that two processes share."""
    batch = make_batch()
    texts = CASES[case].get("texts", range(5))
    return batch | {name: batch[name][list(texts)] for name in ("input_ids", "attention_mask")}


def main():
    """One of the processes of `test_two_processes_give_the_loss_and_gradients_of_one`."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    # uneven: two images with three texts here, one image with two texts there; texts cut to their own longest
    images = [[0, 1], [2]][rank]
    texts = [t for t, image in enumerate(make_batch()["image_index"].tolist()) if image in images]
    results = {}
    for case, more in CASES.items():
        batch = batch_of(case)
        length = int(batch["attention_mask"][texts].sum(1).max())
        own = {
            "input_ids": batch["input_ids"][texts, :length],
            "attention_mask": batch["attention_mask"][texts, :length],
            "pixel_values": batch["pixel_values"][images],
            "image_index": batch["image_index"][texts] - images[0],
        }
        if "image_ids" in more:
            own["image_ids"] = torch.tensor(more["image_ids"])[images]
        if rank == 0 and not results:
            # The other process makes no such calls.
            model = make_model(HiViLTForRetrieval, weight_scale=8.0)
            assert model(**own).loss is None
            results["evaluated alone"] = model(**own, return_loss=True).loss.item()
        model = make_matching_model()
        parallel = DistributedDataParallel(model)  # named, since it must outlive the backward pass
        outputs = parallel(**own, chunk_size=more.get("chunk_size"))
        outputs.loss.backward()
        gradients = {name: p.grad.double().sum().item() for name, p in model.named_parameters()}
        norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
        results[case] = [outputs.loss.item(), outputs.num_dropped_anchors.item(), gradients, norms]
        del outputs, parallel
    results["embeddings alone"] = make_matching_model(auxiliary_loss_weight=0.0)(**own).loss.item()
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory) -> list[dict]:
    """What each of two processes found in each case."""
    folder = tmp_path_factory.mktemp("two")
    launch(Path(__file__).stem, 2, [str(folder)])
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.checklist("5")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_loss_and_gradients_of_one(of_two_processes, case):
    model = make_matching_model()
    image_ids = CASES[case].get("image_ids")
    outputs = model(**batch_of(case), image_ids=None if image_ids is None else torch.tensor(image_ids))
    outputs.loss.backward()
    for loss, dropped, gradients, norms in (found[case] for found in of_two_processes):
        assert loss == pytest.approx(outputs.loss.item(), rel=1e-5)
        assert dropped == outputs.num_dropped_anchors.item()
        for name, parameter in model.named_parameters():
            assert norms[name] == pytest.approx(parameter.grad.norm().item(), rel=1e-3, abs=1e-5), name
            assert gradients[name] == pytest.approx(parameter.grad.double().sum().item(), rel=1e-3, abs=1e-4), name


def test_two_processes_share_embeddings_where_no_pair_is_fused(of_two_processes):
    last = list(CASES)[-1]  # whose batch they have in hand
    expected = make_matching_model(auxiliary_loss_weight=0.0)(**batch_of(last)).loss.item()
    for found in of_two_processes:
        assert found["embeddings alone"] == pytest.approx(expected, rel=1e-5)


def test_one_process_evaluates_without_waiting_for_the_others(of_two_processes, batch):
    texts = [text for text, image in enumerate(batch["image_index"].tolist()) if image < 2]
    own = {name: batch[name][texts] for name in ("input_ids", "attention_mask", "image_index")}
    model = make_model(HiViLTForRetrieval, weight_scale=8.0)
    expected = model(**own, pixel_values=batch["pixel_values"][:2], return_loss=True).loss.item()
    assert of_two_processes[0]["evaluated alone"] == pytest.approx(expected, rel=1e-5)


if __name__ == "__main__":
    run_command(main)
