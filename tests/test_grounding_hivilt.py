"""Where in an image what a text means is, what the head learns it by, and that an image is encoded once for it."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForZeroShotObjectDetection

import hivilt
from hivilt import HiViLTForVisualGrounding, HiViLTProcessor
from hivilt.boxes_hivilt import grid_cells, overlap, to_corners
from hivilt.fusion_hivilt import resample_grid
from hivilt.losses_hivilt import grounding_loss
from tiny import BOXES, FUSIONS, HEAD_FACTS, make_model, make_processor, with_dropout

ROOT = Path(hivilt.__file__).resolve().parent
LABELS = HEAD_FACTS[HiViLTForVisualGrounding].wishes["labels"]


@pytest.fixture(scope="module")
def model() -> HiViLTForVisualGrounding:
    """One with weights so large that text and image decide. Not to be changed."""
    model = make_model(HiViLTForVisualGrounding, weight_scale=6.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = model.row_head.box_regressor[-1].weight
        weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture
def encoded(model) -> list[int]:
    """How many images each pass of the vision encoder had."""
    counts = []
    hook = model.model.vision_model.register_forward_hook(lambda *call: counts.append(len(call[2].last_hidden_state)))
    yield counts
    hook.remove()


# What it computes


def resampled(rows: torch.Tensor, grid: tuple[int, int], finer: tuple[int, int]) -> torch.Tensor:
    """Rows of one image, `(height * width, d)`, cell by cell: the mean of the cells that a finer one lies in."""
    (height, width), cells = grid, []
    for y in range(finer[0]):
        for x in range(finer[1]):
            # From the first to the last cell that shares some of it, in whole numbers.
            ys = range(y * height // finer[0], -(-(y + 1) * height // finer[0]))
            xs = range(x * width // finer[1], -(-(x + 1) * width // finer[1]))
            cells.append(torch.stack([rows[i * width + j] for i in ys for j in xs]).mean(dim=0))
    return torch.stack(cells)


def test_fine_rows_are_resampled_by_cells_not_by_pixels():
    """Upwards, too, where a fine cell may lie in several."""
    rows = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    for finer in ((2, 3), (5, 7), (4, 6), (3, 3)):
        torch.testing.assert_close(resample_grid(rows, (2, 3), finer)[0], resampled(rows[0], (2, 3), finer))


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["dense", "three stages", "one stage", "sparse", "without local", "without global"])
def test_rows_are_those_of_all_stages_on_the_finest_grid_joined_with_words_and_the_whole(fusion, batch):
    """Of images that are wider than high, in float64 and in plain sums."""
    model = make_model(HiViLTForVisualGrounding, weight_scale=6.0, **FUSIONS[fusion]).double()
    batch["pixel_values"] = F.interpolate(batch["pixel_values"], (12, 28)).double()  # a grid of 3 by 7
    outputs = model.model(**batch, output_hidden_states=True, interpolate_pos_encoding=True)
    grids = [(3, 7), (2, 4), (1, 2)][: model.config.num_fusion_stages]
    stages = outputs.hidden_states
    if fusion == "without local":
        grids, stages = grids[-1:], [outputs.local_fusion_state]
    pyramid, head, text = model.feature_pyramid, model.row_head, 3
    norm = lambda x, layer: F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, 1e-6)
    mlp = lambda x, layers: F.gelu(x @ layers[0].weight.t() + layers[0].bias) @ layers[1].weight.t() + layers[1].bias

    of_stages = [
        norm(stage[text, : grid[0] * grid[1]], layer) @ lateral.weight.t() + lateral.bias
        for stage, grid, layer, lateral in zip(stages, grids, pyramid.norms, pyramid.laterals, strict=True)
    ]
    rows = of_stages[-1]
    for place in reversed(range(len(grids) - 1)):
        rows = of_stages[place] + resampled(rows, grids[place + 1], grids[place])
    (height, width), kernel = grids[0], pyramid.smoothing.weight[:, 0]  # (d, 3, 3)
    smoothed = []
    for y in range(height):
        for x in range(width):
            smoothed.append(rows[y * width + x] + pyramid.smoothing.bias)
            for i in range(max(y - 1, 0), min(y + 2, height)):
                for j in range(max(x - 1, 0), min(x + 2, width)):
                    smoothed[-1] = smoothed[-1] + kernel[:, i - y + 1, j - x + 1] * rows[i * width + j]
    rows = torch.stack(smoothed)
    linear = lambda x, layer: x @ layer.weight.t() + layer.bias
    whole = torch.cat([outputs.vision_global_state[text], outputs.text_global_state[text]])
    words = stages[-1][text, math.prod(grids[-1]) :][batch["attention_mask"][text].bool()]
    context = norm(
        torch.stack([linear(norm(whole, pyramid.global_norm), pyramid.global_projection), *words]), pyramid.context_norm
    )

    def joined(rows, context, attention, layers):
        query, key, value = (
            linear(x, layer).chunk(model.config.num_attention_heads, dim=-1)
            for x, layer in ((rows, attention.q_proj), (context, attention.k_proj), (context, attention.v_proj))
        )
        heads = [(q @ k.t() / k.shape[1] ** 0.5).softmax(dim=1) @ v for q, k, v in zip(query, key, value, strict=True)]
        attended = linear(torch.cat(heads, dim=-1), attention.o_proj)
        return rows + mlp(torch.cat([rows, attended, rows * attended], dim=-1), (layers.fc1, layers.fc2))

    rows = norm(joined(rows, context, pyramid.cross_attention, pyramid.cross_mlp), pyramid.row_norm)
    rows = norm(joined(rows, rows, pyramid.self_attention, pyramid.self_mlp), pyramid.norm)

    found = model(**batch, interpolate_pos_encoding=True)
    assert found.logits.shape == (5, height * width)
    torch.testing.assert_close(found.logits[text], rows @ head.classifier.weight[0] + head.classifier.bias)
    moved = mlp(rows, (head.box_regressor[0], head.box_regressor[2])).float()
    cells = torch.logit(grid_cells(height, width))
    torch.testing.assert_close(found.pred_boxes[text], (moved + cells).sigmoid())


@pytest.mark.parametrize("size", [(12, 28), (28, 12), (4, 20)])
def test_before_it_learns_each_row_sees_its_own_cell_and_little_else(size, batch):
    model = make_model(HiViLTForVisualGrounding)
    batch["pixel_values"] = F.interpolate(batch["pixel_values"], size)
    outputs = model(**batch, interpolate_pos_encoding=True)
    cells = grid_cells(size[0] // 4, size[1] // 4)
    cells[:, 2:].clamp_(max=0.9)  # one row alone is as high as the image
    torch.testing.assert_close(outputs.pred_boxes, cells.expand(5, -1, -1))
    torch.testing.assert_close(outputs.logits.sigmoid().mean(), torch.tensor(0.01), atol=0.005, rtol=0)
    assert outputs.loss is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boxes_are_of_float32_in_half_precision_too(dtype, batch):
    model = make_model(HiViLTForVisualGrounding).to(dtype)
    outputs = model(**batch | {"pixel_values": batch["pixel_values"].to(dtype)}, labels=LABELS)
    assert (outputs.logits.dtype, outputs.pred_boxes.dtype, outputs.loss.dtype) == (dtype, *[torch.float32] * 2)
    assert outputs.loss.isfinite()


@pytest.mark.checklist("10")
def test_each_expression_is_as_alone_and_an_image_is_encoded_once_for_all(model, encoded, batch):
    with torch.no_grad():
        together = model(**batch)
        assert encoded == [3]
        states = (
            model.encode_images(batch["pixel_values"]),
            model.encode_texts(batch["input_ids"], batch["attention_mask"]),
        )
        encoded.clear()
        from_states = model(image_states=states[0], text_states=states[1], image_index=batch["image_index"])
        assert encoded == []
        for text, image in enumerate(batch["image_index"].tolist()):
            length = int(batch["attention_mask"][text].sum())
            alone = model(
                input_ids=batch["input_ids"][text, None, :length], pixel_values=batch["pixel_values"][image, None]
            )
            for name in ("logits", "pred_boxes"):
                torch.testing.assert_close(together[name][text], alone[name][0], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(from_states[name][text], together[name][text], atol=1e-5, rtol=1e-5)
    # Or no mix-up could be seen: expressions about one image differ.
    assert (together.logits[1] - together.logits[2]).abs().max() > 1e-2
    assert (together.pred_boxes[1] - together.pred_boxes[2]).abs().max() > 1e-2


# What it learns by


def test_loss_is_that_of_its_own_rows(model, batch):
    outputs = model(**batch, labels=LABELS)
    boxes = torch.zeros(5, 2, 4)
    for text, own in enumerate(BOXES):
        boxes[text, : len(own)] = torch.tensor(own).view(-1, 4)
    torch.testing.assert_close(outputs.loss, grounding_loss(outputs.logits, outputs.pred_boxes, boxes, (5, 5)))
    shared = model(**batch, labels=LABELS, num_items_in_batch=torch.tensor(9)).loss
    torch.testing.assert_close(shared, outputs.loss * 5 / 9)


@pytest.mark.checklist("5")
def test_gradients_do_not_depend_on_how_a_batch_is_divided(batch):
    model = with_dropout(make_model(HiViLTForVisualGrounding, weight_scale=4.0), 0.0).train()
    assert model.accepts_loss_kwargs
    model(**batch, labels=LABELS).loss.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for part in (slice(0, 1), slice(1, 5)):
        own = {name: batch[name][part] for name in ("input_ids", "attention_mask", "image_index")}
        own |= {"pixel_values": batch["pixel_values"], "labels": LABELS[part]}
        model(**own, num_items_in_batch=5).loss.backward()
    for name, parameter in model.named_parameters():
        scale = float(whole[name].abs().max())
        torch.testing.assert_close(parameter.grad, whole[name], atol=1e-4 * scale + 1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("fusion", [name for name in FUSIONS if name != "own levels"])  # where some layers are not read
def test_every_parameter_learns(fusion, batch):
    model = make_model(HiViLTForVisualGrounding, **FUSIONS[fusion]).train()
    nn.init.normal_(model.row_head.box_regressor[-1].weight)  # at first 0, so that nothing before it has a gradient
    model(**batch, labels=LABELS).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    own = ("feature_pyramid.", "row_head.")
    assert [name for name, p in model.named_parameters() if name.startswith(own) and not p.grad.any()] == []


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["dense", "without local"])
def test_it_learns_a_batch_by_heart(fusion, batch):
    """Of five expressions about three images where each is, both of two things, and that one is of nothing."""
    model = with_dropout(make_model(HiViLTForVisualGrounding, initializer_range=None, **FUSIONS[fusion]), 0.0).train()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=150)
    for _ in range(150):
        optimizer.zero_grad()
        model(**batch, labels=LABELS).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = make_processor().post_process_grounding(model.eval()(**batch), threshold=0.0)
    nothing = BOXES.index([])
    for text, (boxes, own) in enumerate(zip(found, BOXES, strict=True)):
        if own:
            iou, _ = overlap(to_corners(torch.tensor(own))[:, None], boxes["boxes"][: len(own)])
            assert iou.max(dim=1).values.min() > 0.7, text
            assert boxes["scores"][len(own) - 1] > 2 * found[nothing]["scores"][0], text


# Its checkpoints


@pytest.mark.checklist("2")
def test_its_auto_class_opens_it(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    opened = AutoModelForZeroShotObjectDetection.from_pretrained(tmp_path)
    assert type(opened) is HiViLTForVisualGrounding
    with torch.no_grad():
        torch.testing.assert_close(opened(**batch).pred_boxes, model(**batch).pred_boxes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_shipped_weights_find_the_same_in_half_precision(dtype):
    """Their states are large: sums of them overflow float16."""
    processor = HiViLTProcessor.from_pretrained(ROOT / "grounding")
    given = {"images": ROOT / "docs/scene.png", "text": [["the small shape right of the red cross", "the square"]]}
    inputs, found = processor(**given, return_tensors="pt"), []
    for precision in (torch.float32, dtype):
        model = HiViLTForVisualGrounding.from_pretrained(ROOT / "grounding", dtype=precision)
        with torch.no_grad():
            found.append(processor.post_process_grounding(model(**inputs.to(precision))))
    assert [len(one["boxes"]) for one in found[0]] == [len(one["boxes"]) for one in found[1]] == [1, 0]
    torch.testing.assert_close(found[1][0]["boxes"], found[0][0]["boxes"], atol=0.01, rtol=0)
