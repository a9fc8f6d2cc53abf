"""Fusion against its equations in plain loops, its pieces, and what saves time and must change nothing."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hivilt import (
    HiViLTForQuestionAnswering,
    HiViLTForRetrieval,
    HiViLTModel,
    modeling_hivilt,
)
from hivilt.fusion_hivilt import HiViLTMLP, map_states, masked_mean, pool, resample_grid, smooth_tokens
from tiny import FUSIONS, IMAGE_SIZE, make_batch, make_model


def _reference_maps(model: HiViLTModel, pixel_values: torch.Tensor) -> list[np.ndarray]:
    """The chosen hidden states of one image, taken from the encoder itself: class token dropped, on the grid."""
    outputs = model.vision_model(pixel_values, output_hidden_states=True)
    states = [*outputs.hidden_states[:-1], outputs.last_hidden_state]
    side = IMAGE_SIZE // 4
    return [states[index][0, 1:].reshape(side, side, -1).numpy() for index, _, _ in model.config.vision_level_layout]


@pytest.mark.parametrize("fusion", FUSIONS.values(), ids=FUSIONS.keys())
def test_model_equals_the_equations_in_plain_loops(fusion):
    model = make_model(HiViLTModel, weight_scale=8.0, **fusion).double()
    batch = make_batch()
    batch["pixel_values"] = batch["pixel_values"].double()
    weights = {name: parameter.numpy() for name, parameter in model.state_dict().items()}
    with torch.no_grad():
        outputs = model(**batch)
        for row, image in enumerate(batch["image_index"].tolist()):
            length = int(batch["attention_mask"][row].sum())
            tokens = outputs.text_last_hidden_state[row, :length].numpy()
            maps = _reference_maps(model, batch["pixel_values"][image : image + 1])
            expected = reference.fuse(weights, model.config, maps, tokens)

            num_vision = outputs.local_fusion_state.shape[1] - batch["input_ids"].shape[1]
            local = outputs.local_fusion_state[row, : num_vision + length]
            np.testing.assert_allclose(local.numpy(), expected["local_fusion_state"], atol=1e-6, rtol=1e-6)
            for name in ("vision_global_state", "text_global_state", "global_fusion_state"):
                np.testing.assert_allclose(outputs[name][row].numpy(), expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("fusion", FUSIONS.values(), ids=FUSIONS.keys())
def test_levels_are_all_that_fusion_needs_of_images(fusion):
    model, batch = make_model(HiViLTForQuestionAnswering, weight_scale=8.0, **fusion), make_batch()
    texts = {name: batch[name] for name in ("input_ids", "attention_mask", "image_index")}
    with torch.no_grad():
        levels = model.encode_images(batch["pixel_values"]).level_states
        logits = model(image_states=model.model.fusion("states_of_levels", levels), **texts).logits
        torch.testing.assert_close(logits, model(**batch).logits, atol=0, rtol=0)


def test_the_reference_would_notice_a_swapped_modality():
    """The comparison above can fail: swap the two MLPs of a stage and it does."""
    model = make_model(HiViLTModel, weight_scale=8.0).double()
    batch = make_batch()
    weights = {name: parameter.numpy() for name, parameter in model.state_dict().items()}
    stage = model.fusion.stages[0]
    stage.vision_mlp, stage.text_mlp = stage.text_mlp, stage.vision_mlp
    with torch.no_grad():
        outputs = model(**batch | {"pixel_values": batch["pixel_values"].double()})
        tokens = outputs.text_last_hidden_state[0].numpy()
        expected = reference.fuse(
            weights, model.config, _reference_maps(model, batch["pixel_values"][:1].double()), tokens
        )
    assert np.abs(outputs.global_fusion_state[0].numpy() - expected["global_fusion_state"]).max() > 1e-3


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_any_grid_mask_and_pairing_equals_the_equations_in_plain_loops(data):
    stages = data.draw(st.integers(1, 3), "stages")
    fusion = {
        "num_fusion_stages": stages,
        "vision_levels": [1] * stages,
        "vision_strides": data.draw(st.lists(st.integers(1, 3), min_size=stages, max_size=stages), "strides"),
        "fusion_top_k": data.draw(st.none() | st.integers(1, 30), "top_k"),
        "use_local_fusion": data.draw(st.integers(0, 4), "local") > 0,
        "use_global_fusion": data.draw(st.integers(0, 4), "global") > 0,
        "use_position_embeddings": data.draw(st.booleans(), "positions"),
    }
    height, width = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)), "grid")
    index = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4), "image_index")
    longest = data.draw(st.integers(1, 6), "longest")
    # Texts lie anywhere between padding, as left or right padding puts them.
    spans = [data.draw(st.tuples(st.integers(0, longest - 1), st.integers(1, longest)), "span") for _ in index]

    model = make_model(HiViLTModel, weight_scale=8.0, **fusion).double()
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    maps = [make(3, height, width, 24) for _ in model.fusion.vision_levels]
    mask = torch.zeros(len(index), longest, dtype=torch.bool)
    for row, (start, length) in enumerate(spans):
        mask[row, start : start + length] = True
    tokens = make(len(index), longest, 18)
    weights = {name: parameter.numpy() for name, parameter in model.state_dict().items()}
    with torch.no_grad():
        strides = fusion["vision_strides"][-len(maps) :]
        pooled = [pool(states, stride) for states, stride in zip(maps, strides, strict=True)]
        images = model.encode_images(feature_maps=pooled)
        texts = model.encode_texts(token_states=tokens, attention_mask=mask)
        outputs = model.fuse(images, texts, torch.tensor(index))
    # Without local fusion the reference, too, reads the last level alone.
    maps = [maps[0]] * stages if len(maps) < stages else maps
    for row, image in enumerate(index):
        expected = reference.fuse(
            weights, model.config, [level[image].numpy() for level in maps], tokens[row, mask[row]].numpy()
        )
        for name in ("vision_global_state", "text_global_state", "global_fusion_state"):
            np.testing.assert_allclose(outputs[name][row].numpy(), expected[name], atol=1e-6, rtol=1e-6)
        num_vision = outputs.local_fusion_state.shape[1] - longest
        kept = torch.cat([torch.ones(num_vision, dtype=torch.bool), mask[row]])
        np.testing.assert_allclose(
            outputs.local_fusion_state[row, kept].numpy(), expected["local_fusion_state"], atol=1e-6, rtol=1e-6
        )


# Shapes


@pytest.mark.parametrize("fusion", [FUSIONS["dense"], FUSIONS["three stages"], FUSIONS["sparse"]])
def test_shapes_of_everything_returned(fusion, batch):
    model = make_model(HiViLTModel, attn_implementation="eager", **fusion)
    outputs = model(**batch, output_attentions=True, output_hidden_states=True)
    stages, d, heads, texts, tokens = model.config.num_fusion_stages, 20, 4, 5, 7
    vision_tokens = [25, 9, 4][:stages]  # a grid of 5 x 5, its squares of 2 and of 4
    assert outputs.local_fusion_state.shape == (texts, vision_tokens[-1] + tokens, d)
    for name in ("global_fusion_state", "vision_global_state", "text_global_state"):
        assert outputs[name].shape == (texts, d)
    assert outputs.vision_last_hidden_state.shape == (3, 26, 24)
    assert outputs.text_last_hidden_state.shape == (texts, tokens, 18)
    assert [state.shape for state in outputs.hidden_states] == [(texts, n + tokens, d) for n in vision_tokens]
    assert [a.shape for a in outputs.cross_attentions] == [(texts, heads, tokens, n) for n in vision_tokens]
    assert [a.shape for a in outputs.vision_cross_attentions] == [(texts, heads, n, tokens) for n in vision_tokens]
    assert [a.shape for a in outputs.global_cross_attentions] == [(texts, heads, 1, 2)] * 2
    assert len(outputs.vision_hidden_states) == 4 and len(outputs.text_hidden_states) == 3
    assert len(outputs.vision_attentions) == 3 and len(outputs.text_attentions) == 2


def test_attention_weights_sum_to_one_and_never_fall_on_padding(batch):
    model = make_model(HiViLTModel, weight_scale=8.0, attn_implementation="eager", fusion_top_k=3)
    outputs = model(**batch, output_attentions=True)
    real = batch["attention_mask"].bool()
    for text_to_image, image_to_text in zip(outputs.cross_attentions, outputs.vision_cross_attentions, strict=True):
        sums = text_to_image.sum(-1).transpose(1, 2)  # (texts, tokens, heads)
        torch.testing.assert_close(sums[real], torch.ones_like(sums[real]))
        assert (sums[~real] == 0).all()
        assert (image_to_text.sum(2).transpose(1, 2)[~real] == 0).all()
        # sparse: no text token looked at more than three places
        assert int((text_to_image > 0).sum(-1).max()) == 3


@pytest.mark.parametrize("fusion", [{}, {"fusion_top_k": 3}, {"use_local_fusion": False}], ids=str)
@pytest.mark.parametrize("with_index", [True, False])
def test_pairs_fused_a_few_at_a_time_are_those_of_one_batch(fusion, with_index, monkeypatch):
    model = make_model(HiViLTForRetrieval, weight_scale=8.0, num_fusion_stages=3, **fusion)
    batch, runs = make_batch(), []
    model.model.fusion.register_forward_pre_hook(lambda module, args: runs.append(args[0]))
    with torch.no_grad():
        images = model.encode_images(batch["pixel_values"])
        texts = model.encode_texts(batch["input_ids"], batch["attention_mask"])
        pairs = {"image_index": torch.tensor([1, 0, 1, 1]), "text_index": torch.tensor([0, 2, 1, 0])}
        if not with_index:
            images, texts = (map_states(lambda x: x[:2], states) for states in (images, texts))
            pairs = {}
        together = model.model.fuse(images, texts, **pairs)
        runs.clear()
        monkeypatch.setattr(modeling_hivilt, "_BYTES_AT_ONCE", 1)
        apart = model.model.fuse(images, texts, **pairs)
        assert runs == ["fuse"] * (4 if with_index else 2)
    assert apart.keys() == together.keys()
    for name, expected in together.items():
        torch.testing.assert_close(apart[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fusion", [{}, {"fusion_top_k": 3}], ids=str)
def test_pairs_fused_a_few_at_a_time_have_the_gradients_of_one_batch(fusion, checkpointing, monkeypatch):
    model = make_model(HiViLTForQuestionAnswering, weight_scale=8.0, num_fusion_stages=3, dropout=0.0, **fusion)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    batch = make_batch() | {"labels": torch.tensor([0, 1, 2, 3, 4])}

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        model(**batch).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    together = gradients()
    monkeypatch.setattr(modeling_hivilt, "_BYTES_AT_ONCE", 1)
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, together[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("fusion", [{}, {"fusion_top_k": 3}, {"vision_strides": [1, 3, 2]}], ids=str)
def test_states_asked_for_are_those_that_fusion_goes_through(fusion):
    """A stage whose rows nobody asks for averages them before its last layer."""
    model = make_model(HiViLTModel, weight_scale=8.0, num_fusion_stages=3, **fusion)
    with torch.no_grad():
        plain, asked = model(**make_batch()), model(**make_batch(), output_hidden_states=True)
    for name in ("local_fusion_state", "global_fusion_state", "vision_global_state"):
        torch.testing.assert_close(plain[name], asked[name], rtol=1e-5, atol=1e-6)


def test_a_layer_in_place_of_a_fusion_layer_gets_its_input_in_one_piece():
    model = make_model(HiViLTModel, weight_scale=8.0)
    with torch.no_grad():
        expected = model(**make_batch())
        for mlp in [module for module in model.modules() if isinstance(module, HiViLTMLP)]:
            plain = torch.nn.Linear(mlp.fc1.in_features, mlp.fc1.out_features)
            plain.load_state_dict(mlp.fc1.state_dict())
            mlp.fc1 = plain
        found = model(**make_batch())
    torch.testing.assert_close(found.global_fusion_state, expected.global_fusion_state, rtol=1e-5, atol=1e-6)


# Sparse fusion


@given(st.integers(1, 30), st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_sparse_fusion_over_all_tokens_is_dense_fusion_and_fewer_rows_change(top_k, seed):
    dense = make_model(HiViLTModel, weight_scale=6.0, num_fusion_stages=1, seed=seed)
    sparse = make_model(HiViLTModel, weight_scale=6.0, num_fusion_stages=1, seed=seed, fusion_top_k=top_k)
    batch = make_batch(seed)
    with torch.no_grad():
        full, part = dense(**batch), sparse(**batch)
        level = sparse.encode_images(batch["pixel_values"]).level_states[0].flatten(1, 2)[batch["image_index"]]
    if top_k >= 25:
        torch.testing.assert_close(part.local_fusion_state, full.local_fusion_state, atol=0, rtol=0)
        return
    untouched = (part.local_fusion_state[:, :25] == level).all(-1).sum(-1)
    lengths = batch["attention_mask"].sum(-1)
    assert (untouched >= 25 - top_k * lengths).all() and (untouched <= 25 - top_k).all()


def test_sparse_fusion_saves_the_work():
    """The MLP of the vision rows runs over the rows that text tokens chose, not over all nor over those that fill up."""
    rows = []
    batch = make_batch()
    for top_k in (None, 2):
        model = make_model(HiViLTModel, num_fusion_stages=1, fusion_top_k=top_k, attn_implementation="eager")
        model.fusion.stages[0].vision_mlp.register_forward_hook(
            lambda m, args, out: rows.append(args[0].shape[:-1].numel())
        )
        with torch.no_grad():
            outputs = model(**batch, output_attentions=True)
    looked_at = (outputs.cross_attentions[0] > 0).any(dim=(1, 2)).sum(dim=-1)  # rows, for each text
    # Those of the text that chose most, for each text.
    assert rows == [25 * len(batch["input_ids"]), looked_at.max() * len(batch["input_ids"])]
    assert looked_at.max() > looked_at.min()


# The pieces


@given(st.integers(1, 9), st.sampled_from([1, 3, 9, 27]), st.data())
@settings(max_examples=30, deadline=None)
def test_smoothing_averages_the_tokens_in_reach_and_no_padding(length, window, data):
    total = data.draw(st.integers(length, 12))
    tokens = torch.randn(1, total, 3, generator=torch.Generator().manual_seed(total))
    mask = (torch.arange(total) < length)[None]
    smoothed = smooth_tokens(tokens, mask, window)
    assert smoothed.isfinite().all()
    for i in range(length):
        expected = tokens[0, max(0, i - window // 2) : min(length, i + window // 2 + 1)].mean(0)
        torch.testing.assert_close(smoothed[0, i], expected)


@given(st.tuples(st.integers(1, 7), st.integers(1, 7)), st.tuples(st.integers(1, 7), st.integers(1, 7)))
@settings(max_examples=30, deadline=None)
def test_resampling_averages_the_cells_covered(old, new):
    rows = torch.randn(1, old[0] * old[1], 2, generator=torch.Generator().manual_seed(old[0] * 8 + new[1]))
    grid = rows[0].view(*old, 2).numpy()
    expected = np.array(reference.resample([list(row) for row in grid], *new)).reshape(-1, 2)
    np.testing.assert_allclose(resample_grid(rows, old, new)[0].numpy(), expected, atol=1e-6)


def test_mean_of_nothing_is_zero():
    assert masked_mean(torch.ones(2, 3, 4), torch.tensor([[True, False, True], [False] * 3])).tolist() == [
        [1.0] * 4,
        [0.0] * 4,
    ]
