"""
What transformers holds every one of its own models to, held for all of ours: initialisation, saving and ties, config,
attention, outputs, numerics, embeddings, training, adapters, offloading; over every family of encoders.
"""

import copy
import inspect
from itertools import cycle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, disk_offload
from accelerate.utils import send_to_device
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hivilt import (
    HiViLTConfig,
    HiViLTForConditionalGeneration,
    HiViLTForImagesAndTextClassification,
    HiViLTForQuestionAnswering,
    HiViLTForRetrieval,
    HiViLTForVisualGrounding,
    HiViLTModel,
)
from hivilt.fusion_hivilt import cross_attend, eager_attention_forward
from tiny import (
    HEAD_FACTS,
    MODEL_CLASSES,
    NUM_ANSWERS,
    OF_A_BATCH,
    TEXT_CONFIGS,
    VISION_CONFIGS,
    make_batch,
    make_config,
    make_model,
    with_dropout,
)

HEADS = MODEL_CLASSES[1:]
ENCODERS = [(vision, "bert") for vision in VISION_CONFIGS] + [("vit", text) for text in TEXT_CONFIGS if text != "bert"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Regular expressions for LoRA's `target_modules`, one for each part of the model.
PARTS = {
    "vision": r".*\.vision_model\..*\.(q_proj|v_proj|fc1)",
    "text": r".*\.text_model\..*\.(query|value)",
    "fusion": r".*\.fusion\..*\.(q_proj|v_proj|fc1)",
}


@pytest.fixture(params=MODEL_CLASSES, ids=lambda model_class: model_class.__name__)
def model_class(request) -> type:
    return request.param


@pytest.fixture(params=HEADS, ids=lambda model_class: model_class.__name__)
def head(request) -> type:
    return request.param


@pytest.fixture
def dirty_memory():
    """Memory that nobody has written to yet holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(model_class: type) -> dict[str, torch.Tensor]:
    """Five texts of three images, and what a head takes to give a loss."""
    return make_batch() | HEAD_FACTS[model_class].wishes


def make_rows(model_class: type) -> list[dict[str, torch.Tensor]]:
    """Four examples of one text each and its image or images, as a Trainer's own collator takes them."""
    inputs = make_inputs(model_class)
    index, _ = inputs.pop("image_index"), inputs.pop("return_loss", None)
    pixel_values = inputs["pixel_values"][index]
    inputs["pixel_values"] = pixel_values + torch.randn(*pixel_values.shape[:-2], 1, 1)
    return [{name: value[row] for name, value in inputs.items()} for row in range(4)]


def collated(rows: list[dict]) -> dict:
    """Such rows as a batch, as transformers' examples for detection do it, whose labels are dicts."""
    labels = [row["labels"] for row in rows if isinstance(row.get("labels"), dict)]
    batch = default_data_collator([{name: row[name] for name in row if not labels or name != "labels"} for row in rows])
    return batch | {"labels": labels} if labels else batch


def training_loss(outputs) -> torch.Tensor:
    """The loss of a head; of the base model a number that everything it computes has a part in."""
    return outputs.loss if "loss" in outputs else outputs.global_fusion_state.square().sum()


def gradients(model: nn.Module, inputs: dict[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    training_loss(model(**inputs)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def without_gradient(model: nn.Module, inputs: dict[str, torch.Tensor]) -> set[str]:
    seen = gradients(model, inputs)
    assert all(gradient.isfinite().all() for gradient in seen.values())
    return {name for name, p in model.named_parameters() if p.requires_grad} - set(seen)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def close(actual, expected, **tolerance) -> None:
    """`torch.testing.assert_close` for model outputs too."""
    plain = lambda x: dict(x) if isinstance(x, dict) else x
    torch.testing.assert_close(plain(actual), plain(expected), **tolerance)


# Initialisation


def test_every_class_ran_post_init(model_class):
    model = make_model(model_class)
    assert len(model.all_tied_weights_keys) == (model_class is HiViLTForConditionalGeneration)
    assert model._no_split_modules


@pytest.mark.checklist("4")
def test_builds_on_the_meta_device(model_class):
    with torch.device("meta"):
        model = model_class(make_config(fusion_top_k=3, auxiliary_loss_weight=0.5))
    assert {tensor.device.type for tensor in tensors_of(model).values()} == {"meta"}


@pytest.mark.parametrize("model_class", [one for one in MODEL_CLASSES if one is not HiViLTForConditionalGeneration])
def test_a_step_asks_for_no_value(model_class):
    # As on the meta device there is none, so a GPU is not waited for. What transformers' text encoders and decoders ask for
    # themselves is left out.
    model, inputs = make_model(model_class).train(), make_inputs(model_class)
    model.freeze("text")
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    inputs["token_states"] = model.get_token_states(**texts)
    loss = training_loss(model.to("meta")(**send_to_device(inputs, "meta")))
    loss.backward()
    assert loss.is_meta


def test_config_without_arguments_is_enough(model_class):
    with torch.device("meta"):
        model = model_class(HiViLTConfig())
    assert model.base_model.vision_model.config.image_size == 224


@pytest.mark.parametrize(("model_class", "vision"), zip(HEADS, cycle(["vit", "dinov3", "swin"])))
def test_missing_weights_are_initialised_as_new_ones_are(model_class, vision, dirty_memory, monkeypatch):
    initialize = PreTrainedModel._initialize_weights

    def seeded(*args, **kwargs):
        torch.manual_seed(7)
        initialize(*args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_initialize_weights", seeded)
    config = make_config(vision, auxiliary_loss_weight=1.0)
    built = model_class(copy.deepcopy(config))
    loaded = model_class.from_pretrained(None, config=copy.deepcopy(config), state_dict={})
    close(tensors_of(loaded), tensors_of(built), rtol=0, atol=0)


@pytest.mark.parametrize(("vision", "text"), ENCODERS)
def test_a_model_moved_from_meta_initialises_all_it_has(vision, text, dirty_memory):
    with torch.device("meta"):
        model = HiViLTModel(make_config(vision, text)).eval()
    model.to_empty(device="cpu")
    model.init_weights()
    close(dict(model.named_buffers()), dict(make_model(HiViLTModel, vision=vision, text=text).named_buffers()))
    # Runs, so no tensor stayed behind on meta.
    assert model(**make_batch()).global_fusion_state.isfinite().all()


def test_every_tensor_is_a_parameter_or_a_buffer(model_class):
    plain = {
        (name, attribute)
        for name, module in make_model(model_class).named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }
    assert not plain


# Saving, loading, ties


@pytest.mark.checklist("3")
@pytest.mark.parametrize(
    ("model_class", "how"), zip(MODEL_CLASSES, cycle([{"device_map": "cpu"}, {}, {"dtype": torch.bfloat16}]))
)
def test_sentinel_weights_and_all_buffers_come_back(model_class, how, tmp_path, dirty_memory):
    model = make_model(model_class, vision="swin", text="roberta", auxiliary_loss_weight=1.0)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.linspace(number, number + 1, parameter.numel()).view_as(parameter))
    model.save_pretrained(tmp_path)

    for _ in range(2):
        loaded = model_class.from_pretrained(tmp_path, **how)
        torch.empty(10_000).fill_(3.0)
        in_float32 = {name for name, tensor in tensors_of(loaded).items() if tensor.dtype == torch.float32}
        expected = tensors_of(model)
        if "dtype" in how:
            # A temperature in half precision would move by whole percents.
            scales = {name for name in expected if name.endswith("logit_scale")}
            assert in_float32 == scales
            half = set(dict(model.named_parameters())) - scales
            expected = {name: tensor.bfloat16() if name in half else tensor for name, tensor in expected.items()}
        close(tensors_of(loaded), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model_class", "text"), [*((head, "bert") for head in HEADS), (HiViLTForConditionalGeneration, "t5")]
)
def test_safetensors_holds_every_weight_once(model_class, text, tmp_path):
    model = make_model(model_class, text=text)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = set(file.keys())
    # T5 lets its encoder's embeddings be those of the model, and a decoder scores by its own; nothing else has two names.
    tied = (text == "t5") + (model_class is HiViLTForConditionalGeneration)
    assert len(model.all_tied_weights_keys) == tied
    assert len(saved) == len(model.state_dict()) - len(model.all_tied_weights_keys)
    assert len(saved) == len({tensor.data_ptr() for tensor in model.state_dict().values()})

    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    for tied, source in loaded.all_tied_weights_keys.items():
        assert loaded.get_parameter(tied) is loaded.get_parameter(source)


def test_base_and_head_open_each_others_weights(head, tmp_path):
    base = make_model(HiViLTModel, seed=1)
    base.save_pretrained(tmp_path / "base")
    model, info = head.from_pretrained(tmp_path / "base", output_loading_info=True)
    own = {name for name in model.state_dict() if not name.startswith("model.")}
    assert set(info["missing_keys"]) == own and own
    shared = model.model.state_dict()
    close(shared, {name: base.state_dict()[name] for name in shared}, rtol=0, atol=0)

    model.save_pretrained(tmp_path / "head")
    base, info = HiViLTModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    # Only question answering has a use for F_global; a base model made from another head brings that MLP new.
    assert {name.rsplit(".", 2)[0] for name in info["missing_keys"]} == (
        set() if HEAD_FACTS[head].reads_fusion else {"fusion.global_fusion.mlp"}
    )
    close({name: base.state_dict()[name] for name in shared}, shared, rtol=0, atol=0)


def test_another_number_of_answers_needs_to_be_asked_for(tmp_path):
    model = make_model(HiViLTForQuestionAnswering)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        HiViLTForQuestionAnswering.from_pretrained(tmp_path, num_labels=42)
    wider = HiViLTForQuestionAnswering.from_pretrained(tmp_path, num_labels=42, ignore_mismatched_sizes=True)
    assert isinstance(wider.classifier, nn.Linear) and wider(**make_batch()).logits.shape == (5, 42)
    assert len(wider.config.id2label) == len(wider.config.label2id) == wider.num_labels == 42
    assert wider.classifier.weight.isfinite().all() and wider.classifier.weight.abs().max() < 1
    close(wider.model.state_dict(), model.model.state_dict(), rtol=0, atol=0)


def test_weights_are_contiguous_however_they_were_saved(tmp_path):
    model = make_model(HiViLTForRetrieval)
    level = model.base_model.fusion.vision_levels[0].projection
    level.weight = nn.Parameter(level.weight.detach().t().contiguous().t())
    assert not level.weight.is_contiguous()
    model.save_pretrained(tmp_path)
    loaded = HiViLTForRetrieval.from_pretrained(tmp_path)
    assert all(tensor.is_contiguous() for tensor in tensors_of(loaded).values())
    close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_missing_weights_are_reported(tmp_path):
    model = make_model(HiViLTForQuestionAnswering)
    model.save_pretrained(tmp_path)
    save_file({"stranger": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, info = HiViLTForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(model.state_dict())
    assert set(info["unexpected_keys"]) == {"stranger"}


# Config


def test_encoders_hold_the_config_object_itself(model_class):
    base = make_model(model_class).base_model
    assert base.vision_model.config is base.config.vision_config
    assert base.text_model.config is base.config.text_config


def test_part_of_a_sub_config_can_be_overridden_on_loading(tmp_path):
    model = make_model(HiViLTForQuestionAnswering)
    model.save_pretrained(tmp_path)
    config = HiViLTConfig.from_pretrained(tmp_path, text_config={"vocab_size": 20})
    assert config.text_config.to_dict() == model.config.text_config.to_dict() | {"vocab_size": 20}
    assert config.vision_config.to_dict() == model.config.vision_config.to_dict()

    loaded = HiViLTForQuestionAnswering.from_pretrained(tmp_path, text_config={"hidden_dropout_prob": 0.4})
    assert loaded.base_model.text_model.embeddings.dropout.p == 0.4
    assert loaded.config.text_config.vocab_size == 61
    close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


# Attention


def implementations(model: PreTrainedModel) -> list[str]:
    config = model.base_model.config
    return [part._attn_implementation for part in (config, config.vision_config, config.text_config)]


@pytest.mark.checklist("7")
def test_attention_implementation_can_be_switched(model_class):
    model = make_model(model_class, weight_scale=4.0)
    inputs = make_inputs(model_class)
    assert implementations(model) == ["sdpa"] * 3
    expected = model(**inputs)
    for switch, now in [
        ("eager", ["eager", "eager", "eager"]),
        ({"": "sdpa"}, ["sdpa", "eager", "eager"]),
        ({"vision_config": "sdpa"}, ["sdpa", "sdpa", "eager"]),
        ({"": "eager", "text_config": "sdpa"}, ["eager", "sdpa", "sdpa"]),
        ("sdpa", ["sdpa", "sdpa", "sdpa"]),
    ]:
        model.set_attn_implementation(switch)
        assert implementations(model) == now
        close(model(**inputs), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="nonsense"):
        model.set_attn_implementation("nonsense")
    assert implementations(model) == ["sdpa"] * 3


@pytest.mark.parametrize("model_class", [HiViLTModel, HiViLTForQuestionAnswering])
def test_attention_implementation_can_be_chosen_on_loading(model_class, tmp_path):
    make_model(model_class).save_pretrained(tmp_path)
    chosen = {"": "eager", "vision_config": "sdpa", "text_config": "eager"}
    assert implementations(model_class.from_pretrained(tmp_path, attn_implementation=chosen)) == [*chosen.values()]
    assert implementations(model_class.from_pretrained(tmp_path, attn_implementation="eager")) == ["eager"] * 3
    # Nothing of it is written down.
    assert "attn_implementation" not in (tmp_path / "config.json").read_text(encoding="utf-8")


def test_own_attention_goes_through_the_interface_at_call_time(monkeypatch):
    calls = []

    def counting(module, query, key, value, mask, **kwargs):
        calls.append((kwargs["scaling"], kwargs["is_causal"], kwargs["dropout"], kwargs["marker"]))
        return eager_attention_forward(module, query, key, value, mask, scaling=kwargs["scaling"])

    model = make_model(HiViLTModel)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "counting", counting)
    model.set_attn_implementation({"": "counting"})
    images, texts = model.encode_images(make_batch()["pixel_values"]), model.encode_texts(make_batch()["input_ids"])
    model.fuse(images, texts, make_batch()["image_index"], marker="passed down")
    # Two stages and global fusion, both directions each.
    assert calls == [(5**-0.5, False, 0.0, "passed down")] * 6


def ragged(padding: str) -> dict[str, torch.Tensor]:
    """The tiny batch with its texts padded on that side, not at all, or with one that is nothing but padding."""
    inputs = make_batch()
    if padding == "none":
        del inputs["attention_mask"]
    elif padding == "left":
        for name in ("input_ids", "attention_mask"):
            inputs[name] = inputs[name].flip(1)
    elif padding == "a whole row":
        inputs["attention_mask"][3] = 0
    return inputs


@pytest.mark.checklist("7")
@pytest.mark.parametrize("top_k", [None, 3], ids=["dense", "sparse"])
@pytest.mark.parametrize("padding", ["right", "left", "none", "a whole row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eager_equals_sdpa(dtype, padding, top_k):
    model = make_model(HiViLTModel, weight_scale=4.0, fusion_top_k=top_k).to(dtype)
    inputs = ragged(padding)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    # The encoders once: what their own implementations differ by would choose other tokens in sparse fusion.
    images = model.encode_images(inputs["pixel_values"])
    texts = model.encode_texts(inputs["input_ids"], inputs.get("attention_mask"))
    outputs = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation({"": implementation})
        outputs[implementation] = model.fuse(images, texts, inputs["image_index"])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    close(outputs["eager"], outputs["sdpa"], rtol=tolerance, atol=tolerance)
    assert all(value.dtype == dtype and value.isfinite().all() for value in outputs["sdpa"].values())


@pytest.mark.checklist("7")
@pytest.mark.parametrize("head_class", HEADS, ids=lambda head_class: head_class.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_score_alike_with_eager_and_sdpa(head_class, dtype):
    model = make_model(head_class).to(dtype)
    inputs = make_inputs(head_class)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    name = HEAD_FACTS[head_class].scores
    expected = model(**inputs)[name].float()
    model.set_attn_implementation("eager")
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    close(model(**inputs)[name].float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.checklist("7")
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_who_may_look_nowhere_finds_zeros(dtype, implementation, autocast):
    model = make_model(HiViLTModel)
    model.set_attn_implementation({"": implementation})
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 20, generator=generator).to(dtype) for n in (3, 4, 4))
    # Scores of -40, to which the mask's minimum is added: in half precision that sum must not become -inf.
    query, key = query.abs() * 4, -key.abs() * 4
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    allowed = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]]).bool()[:, None, None, :]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        attended, attention = cross_attend(model.fusion.stages[0], *leaves, allowed)
    attended.float().square().sum().backward()
    assert attended[1].eq(0).all() and attended[0].ne(0).all() and attended.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert (attention is None) == (implementation == "sdpa")
    if attention is not None:
        assert attention[1].eq(0).all() and attention[0, :, :, 2].eq(0).all()
        close(attention[0].float().sum(dim=-1), torch.ones(4, 3), rtol=0, atol=1e-2)


def test_a_text_of_padding_alone_harms_nobody(head):
    model = make_model(head)
    inputs = make_inputs(head)
    expected = model(**inputs)
    inputs["attention_mask"][3] = 0
    outputs = model(**inputs)
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    others = [0, 1, 2, 4]
    name = HEAD_FACTS[head].scores
    close(outputs[name][others], expected[name][others])


# Outputs


def flat(value) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [tensor for part in value for tensor in flat(part)]


@pytest.mark.parametrize("extras", [(), ("output_hidden_states", "output_attentions")])
def test_tuples_hold_what_outputs_hold_in_the_order_of_their_fields(model_class, extras):
    model = make_model(model_class)
    model.set_attn_implementation("eager")
    inputs = make_inputs(model_class) | dict.fromkeys(extras, True)
    outputs = model(**inputs)
    fields = [name for name in type(outputs).__dataclass_fields__ if outputs.get(name) is not None]
    assert fields == list(outputs)
    by_argument = model(**inputs, return_dict=False)
    model.config.return_dict = False
    by_config = model(**inputs)
    model.config.return_dict = True
    for tuples in (by_argument, by_config):
        assert type(tuples) is tuple and len(tuples) == len(fields)
        close(flat(tuples), flat(list(outputs.values())))


def test_encoders_may_have_been_saved_as_returning_tuples():
    model = make_model(HiViLTModel)
    expected = model(**make_batch())
    model.config.vision_config.return_dict = model.config.text_config.return_dict = False
    close(model(**make_batch()), expected)


RECORDED = {
    "output_hidden_states": {"vision_hidden_states": 4, "text_hidden_states": 3},
    "output_attentions": {"vision_attentions": 3, "text_attentions": 2},
}
RECORDED_BY_FUSION = {
    "output_hidden_states": {"hidden_states": 2},
    "output_attentions": {"cross_attentions": 2, "vision_cross_attentions": 2, "global_cross_attentions": 2},
}
RECORDED_BY_DECODER = {
    "output_hidden_states": {"decoder_hidden_states": 4},
    "output_attentions": {"decoder_attentions": 3, "cross_attentions": 3},
}


@pytest.mark.parametrize("flag", RECORDED)
def test_hidden_states_and_attentions_on_request_only(model_class, flag):
    model = make_model(model_class, attn_implementation="eager")
    inputs = make_inputs(model_class)
    # Retrieval fuses nothing but the pairs of its losses, and of captions the decoder's are of interest.
    expected = RECORDED[flag] | (RECORDED_BY_FUSION[flag] if HEAD_FACTS[model_class].records_fusion else {})
    if model_class is HiViLTForConditionalGeneration:
        expected = RECORDED_BY_DECODER[flag]
    recorded = lambda outputs: {name: len(value) for name, value in outputs.items() if isinstance(value, tuple)}
    assert recorded(model(**inputs)) == {}
    assert recorded(model(**inputs, **{flag: True})) == expected
    setattr(model.config, flag, True)
    assert recorded(model(**inputs)) == expected
    assert recorded(model(**inputs, **{flag: False})) == {}


@pytest.mark.parametrize("flag", RECORDED)
def test_features_give_what_their_encoder_recorded(flag):
    model = make_model(HiViLTForRetrieval, attn_implementation="eager")
    inputs = make_batch()
    name = flag.removeprefix("output_")
    for features, arguments, prefix in [
        (model.get_image_features, {"pixel_values": inputs["pixel_values"]}, "vision"),
        (model.get_text_features, {"input_ids": inputs["input_ids"]}, "text"),
    ]:
        model.config.output_attentions = model.config.output_hidden_states = False
        assert name not in features(**arguments)
        assert len(features(**arguments, **{flag: True})[name]) == RECORDED[flag][f"{prefix}_{name}"]
        assert type(features(**arguments, return_dict=False)) is tuple
        setattr(model.config, flag, True)
        assert len(features(**arguments)[name]) == RECORDED[flag][f"{prefix}_{name}"]


def test_attentions_asked_of_sdpa_are_none_and_change_nothing(model_class):
    """As of transformers' own models, which warn once and go on."""
    model, eager = make_model(model_class), make_model(model_class, attn_implementation="eager")
    inputs = make_inputs(model_class)
    expected, seen = model(**inputs), eager(**inputs, output_attentions=True)
    outputs = model(**inputs, output_attentions=True)
    assert outputs.keys() == expected.keys() and not [name for name in outputs if name.endswith("attentions")]
    writes = model_class is HiViLTForConditionalGeneration
    assert seen["decoder_attentions" if writes else "text_attentions"] is not None
    close(outputs, expected, rtol=0, atol=0)
    images = model.encode_images(inputs["pixel_values"], output_attentions=True)
    texts = model.encode_texts(inputs["input_ids"], inputs["attention_mask"], output_attentions=True)
    assert "attentions" not in images and "attentions" not in texts
    states = {"image_states": images, "text_states": texts, "output_attentions": True}
    fused = {
        name: value for name, value in inputs.items() if name not in ("pixel_values", "input_ids", "attention_mask")
    }
    close(model(**fused, **states), expected)


@pytest.mark.parametrize(("wanted", "kept"), [([0], {0}), (-1, {-1}), ([1, -1, 99], {1, -1})], ids=str)
def test_hidden_states_named_by_index_are_the_only_ones_kept(model_class, wanted, kept):
    model = make_model(model_class)
    every, some = (model(**make_inputs(model_class), output_hidden_states=flag) for flag in (True, wanted))
    names = [name for name in every if name.endswith("hidden_states")]
    writes = model_class is HiViLTForConditionalGeneration
    assert ({"decoder_hidden_states"} if writes else {"vision_hidden_states", "text_hidden_states"}) <= set(names)
    for name in names:
        places = {index % len(every[name]) for index in kept}
        assert [state is not None for state in some[name]] == [i in places for i in range(len(every[name]))], name
        for place in places:
            close(some[name][place], every[name][place], rtol=0, atol=0)


@pytest.mark.parametrize("weight", [None, 1.0])
def test_what_stays_in_float32_exists(model_class, weight):
    model = make_model(model_class, auxiliary_loss_weight=weight)
    names = [name for name, _ in model.named_parameters()]
    assert all(any(kept in name for name in names) for kept in model._keep_in_fp32_modules_strict)
    scales = [name for name in names if name.endswith("logit_scale")]
    assert set(scales) == set(model._keep_in_fp32_modules_strict)


def test_gradients_of_recorded_states_and_attentions_can_be_kept():
    model = make_model(HiViLTModel, attn_implementation="eager", weight_scale=4.0)
    outputs = model(**make_batch(), output_hidden_states=True, output_attentions=True)
    kept = {
        (name, number): tensor
        for flag in RECORDED
        for name in RECORDED[flag] | RECORDED_BY_FUSION[flag]
        for number, tensor in enumerate(outputs[name])
    }
    for tensor in kept.values():
        tensor.retain_grad()
    outputs.global_fusion_state.square().sum().backward()
    assert not {key for key, tensor in kept.items() if tensor.grad is None or not tensor.grad.any()}


def test_asking_for_more_changes_nothing_else(model_class):
    model = make_model(model_class, attn_implementation="eager")
    inputs = make_inputs(model_class)
    expected = model(**inputs)
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    close({name: outputs[name] for name in expected}, expected)


def test_main_input_is_the_first_argument(model_class):
    arguments = list(inspect.signature(model_class.forward).parameters)
    assert arguments[:2] == ["self", model_class.main_input_name]


# Numerics


def test_evaluation_is_deterministic(model_class):
    model = make_model(model_class)
    inputs = make_inputs(model_class)
    close(model(**inputs), model(**inputs), rtol=0, atol=0)


def of_one_pair(outputs, text: int, image: int, padding: int) -> dict[str, torch.Tensor]:
    """What of a batch's output belongs to one text and its image, without the padding."""
    own_text, own_image = (lambda x: x[text]), (lambda x: x[image])
    unpadded = lambda x: x[text, : x.shape[1] - padding]
    picked = {
        "logits": own_text,
        "pred_boxes": own_text,
        "hidden_states": lambda x: unpadded(x[0]),
        "local_fusion_state": unpadded,
        "global_fusion_state": own_text,
        "vision_global_state": own_text,
        "text_global_state": own_text,
        "text_last_hidden_state": unpadded,
        "vision_last_hidden_state": own_image,
        "text_embeds": own_text,
        "image_embeds": own_image,
        "logits_per_image": lambda x: x[image, text],
        "logits_per_text": lambda x: x[text, image],
    }
    return {name: pick(outputs[name]) for name, pick in picked.items() if name in outputs}


@pytest.mark.parametrize("model_class", OF_A_BATCH)
@pytest.mark.parametrize("top_k", [None, 3], ids=["dense", "sparse"])
def test_a_batch_is_its_rows_one_by_one_without_padding(model_class, top_k):
    model = make_model(model_class, weight_scale=2.0, fusion_top_k=top_k)
    inputs = make_batch()
    together = model(**inputs, output_hidden_states=True)
    for text, image in enumerate(inputs["image_index"].tolist()):
        length = int(inputs["attention_mask"][text].sum())
        alone = model(
            input_ids=inputs["input_ids"][text : text + 1, :length],
            pixel_values=inputs["pixel_values"][image : image + 1],
            output_hidden_states=True,
        )
        compared = of_one_pair(alone, 0, 0, 0)
        expected = {HiViLTModel: 7, HiViLTForQuestionAnswering: 2, HiViLTForRetrieval: 4, HiViLTForVisualGrounding: 3}
        assert len(compared) == expected[model_class]
        close(compared, of_one_pair(together, text, image, 7 - length), rtol=1e-4, atol=1e-5)


def test_feed_forward_chunks_change_nothing(model_class):
    model = make_model(model_class)
    inputs = make_inputs(model_class)
    expected = model(**inputs)
    chunked = 0
    for module in model.modules():
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 1
            chunked += 1
    assert chunked
    close(model(**inputs), expected)


# Embeddings


@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_vocabulary_can_grow_and_shrink(text, tmp_path):
    model = make_model(HiViLTForQuestionAnswering, text=text)
    inputs = make_inputs(HiViLTForQuestionAnswering)
    expected = model(**inputs).logits.detach()
    old = model.get_input_embeddings().weight.detach().clone()

    model.resize_token_embeddings(70)
    assert model.config.text_config.vocab_size == 70
    assert model.get_input_embeddings().weight.shape == (70, 18)
    # No other table was as long as the vocabulary, and none still is.
    assert not [name for name, p in model.named_parameters() if 61 in p.shape]
    close(model(**inputs).logits, expected)
    inputs["input_ids"][0, 1] = 69
    model(**inputs).loss.backward()
    assert model.get_input_embeddings().weight.grad[69].any()

    model.save_pretrained(tmp_path)
    loaded = HiViLTForQuestionAnswering.from_pretrained(tmp_path)
    close(loaded(**inputs).logits, model(**inputs).logits)
    loaded.resize_token_embeddings(40)
    assert loaded.config.text_config.vocab_size == 40
    close(loaded.get_input_embeddings().weight, old[:40])


def test_input_embeddings_are_the_text_encoders(model_class):
    model = make_model(model_class)
    words = model.get_input_embeddings()
    assert words is model.base_model.text_model.embeddings.word_embeddings
    assert (model.get_output_embeddings() is None) == (model_class is not HiViLTForConditionalGeneration)
    other = nn.Embedding(61, 18)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other is model.base_model.text_model.embeddings.word_embeddings


@pytest.mark.parametrize("text", [text for text in TEXT_CONFIGS if text != "clip"])
def test_embeddings_in_place_of_ids_give_the_same(text):
    model = make_model(HiViLTForQuestionAnswering, text=text)
    inputs = make_inputs(HiViLTForQuestionAnswering)
    if text == "roberta":
        # From embeddings it cannot know what is padding, and counts positions over it; all else being equal.
        inputs["input_ids"][inputs["attention_mask"] == 0] = 7
    expected = model(**inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    close(model(**inputs, inputs_embeds=embeds), expected)


def test_an_encoder_without_embeddings_as_input_says_so():
    model = make_model(HiViLTModel, text="clip")
    inputs = make_batch()
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match="takes no `inputs_embeds`; give `input_ids`"):
        model(**inputs, inputs_embeds=embeds)


# Training


@pytest.mark.parametrize(
    "fusion",
    [
        {"auxiliary_loss_weight": 0.5},
        {"num_fusion_stages": 3, "fusion_top_k": 2},
        {"num_fusion_stages": 1},
        {"use_local_fusion": False},
        {"use_global_fusion": False},
        {"use_local_fusion": False, "use_global_fusion": False},
    ],
    ids=str,
)
def test_no_parameter_without_a_gradient(model_class, fusion):
    model = make_model(model_class, **fusion).train()
    assert without_gradient(model, make_inputs(model_class)) == set()


def checkpointed(model: PreTrainedModel) -> set[bool]:
    return {m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing")}


def test_gradient_checkpointing_can_be_turned_on_and_off(model_class):
    model = make_model(model_class)
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing and checkpointed(model) == {True}
    assert all(isinstance(stage, GradientCheckpointingLayer) for stage in model.base_model.fusion.stages)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing and checkpointed(model) == {False}


@pytest.mark.checklist("7")
@pytest.mark.parametrize(
    ("model_class", "use_reentrant", "frozen"),
    [
        *((model_class, False, None) for model_class in MODEL_CLASSES),
        (HiViLTForQuestionAnswering, True, None),
        (HiViLTForQuestionAnswering, False, "vision"),
        (HiViLTForQuestionAnswering, True, "text"),
    ],
)
def test_gradient_checkpointing_changes_no_gradient(model_class, use_reentrant, frozen):
    model = make_model(model_class).train()
    inputs = make_inputs(model_class)
    if frozen:
        model.freeze(frozen)
    expected = gradients(model, inputs)

    runs = []
    for stage in model.base_model.fusion.stages:
        stage.vision_mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    gradients(model, inputs)
    plain_runs = len(runs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    close(gradients(model, inputs), expected, rtol=1e-4, atol=1e-6)
    # The fusion's own stages were left and run again, not the encoders' layers alone.
    assert len(runs) == 3 * plain_runs


@pytest.mark.checklist("7")
@pytest.mark.parametrize(
    ("head", "use_reentrant"), [*((head, False) for head in HEADS), (HiViLTForQuestionAnswering, True)]
)
def test_gradient_checkpointing_changes_no_gradient_of_an_adapter(head, use_reentrant):
    inputs = make_inputs(head)
    seen = []
    for checkpointing in (False, True):
        model = make_model(head)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(3)
        adapted = get_peft_model(
            model, LoraConfig(target_modules=PARTS["fusion"], r=2, lora_dropout=0.0, init_lora_weights=False)
        )
        seen.append(gradients(adapted.train(), inputs))
    plain, with_checkpointing = seen
    assert plain and all("lora_" in name for name in plain)
    close(with_checkpointing, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("vision", "text"), [("swin", "bert"), ("dinov3", "roberta"), ("convnext", "t5"), ("clip", "clip")]
)
def test_gradient_checkpointing_works_in_any_encoder(vision, text):
    model = with_dropout(make_model(HiViLTForQuestionAnswering, vision=vision, text=text), 0.0).train()
    inputs = make_inputs(HiViLTForQuestionAnswering)
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable()
    close(gradients(model, inputs), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_adapters_of_a_frozen_encoder_learn_under_gradient_checkpointing(use_reentrant):
    model = make_model(HiViLTForQuestionAnswering, vision="swin")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*\.vision_model\..*\.(query|q_proj)", r=2))
    seen = gradients(adapted.train(), make_inputs(HiViLTForQuestionAnswering))
    assert seen and all("vision_model" in name for name in seen)
    assert all(gradient.any() for name, gradient in seen.items() if "lora_B" in name)


def test_inputs_can_be_made_to_require_gradients(model_class):
    model = make_model(model_class).train()
    model.enable_input_require_grads()
    model.requires_grad_(False)
    assert training_loss(model(**make_inputs(model_class))).requires_grad
    model.disable_input_require_grads()
    assert not training_loss(model(**make_inputs(model_class))).requires_grad


# Boxes are learned by heart in the file of their head.
@pytest.mark.parametrize(
    "head",
    [
        HiViLTForQuestionAnswering,
        *(
            pytest.param(head, marks=pytest.mark.slow)
            for head in (HiViLTForRetrieval, HiViLTForConditionalGeneration, HiViLTForImagesAndTextClassification)
        ),
    ],
)
def test_one_batch_can_be_learned_by_heart(head):
    model = with_dropout(make_model(head, text="distilbert"), 0.0).train()
    rows = make_rows(head)
    inputs = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=100)
    losses, norms = [], []
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        schedule.step()
    assert losses[-1] < 0.1 * losses[0]
    assert norms[-1] < 0.1 * norms[0]


# Sizes


@pytest.mark.checklist("11")
@pytest.mark.parametrize("vision", VISION_CONFIGS)
@pytest.mark.parametrize("size", [(28, 24), (25, 38)], ids=str)
def test_images_of_any_size_and_texts_of_any_length(vision, size):
    model = make_model(HiViLTForQuestionAnswering, vision=vision)
    patch = model.config.vision_config.patch_size
    inputs = make_inputs(HiViLTForQuestionAnswering)
    inputs["pixel_values"] = F.interpolate(inputs["pixel_values"], size)
    for length in (1, 7, 24):
        inputs["input_ids"] = torch.full((5, length), 9)
        inputs["attention_mask"] = torch.ones(5, length, dtype=torch.long)
        outputs = model(**inputs, interpolate_pos_encoding=True, output_hidden_states=True)
        rows = [state.shape[1] - length for state in outputs.hidden_states]
        if vision in ("vit", "dinov2", "dinov3", "clip", "siglip"):
            height, width = size[0] // patch, size[1] // patch
            # The second level averages squares of two by two, those at the border cut off.
            assert rows == [height * width, -(-height // 2) * -(-width // 2)]
        assert rows[0] >= rows[1] > 0 and outputs.logits.isfinite().all()
    model.zero_grad()
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.checklist("11")
@pytest.mark.parametrize("vision", ["vit", "clip", "siglip"])
def test_another_size_without_interpolation_is_an_error(vision):
    inputs = make_batch()
    inputs["pixel_values"] = F.interpolate(inputs["pixel_values"], (28, 20))
    with pytest.raises(ValueError, match="20 by 20 .* 28 by 20.*`interpolate_pos_encoding=True`"):
        make_model(HiViLTModel, vision=vision)(**inputs)


# Encoders


@pytest.mark.parametrize(("vision", "text"), ENCODERS)
def test_any_encoders_train_save_and_ignore_padding(vision, text, tmp_path):
    model = make_model(HiViLTForQuestionAnswering, vision=vision, text=text)
    inputs = make_inputs(HiViLTForQuestionAnswering)
    assert without_gradient(model, inputs) == set()
    expected = model(**inputs).logits

    model.save_pretrained(tmp_path)
    loaded, info = HiViLTForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    close(loaded(**inputs).logits, expected, rtol=0, atol=0)

    loaded.set_attn_implementation("eager")
    close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-6)

    # Other tokens under the padding, and more of it.
    padding = inputs["attention_mask"] == 0
    inputs["input_ids"][padding] = torch.randint(
        5, 61, (int(padding.sum()),), generator=torch.Generator().manual_seed(1)
    )
    close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-6)
    inputs["input_ids"] = F.pad(inputs["input_ids"], (0, 5), value=8)
    inputs["attention_mask"] = F.pad(inputs["attention_mask"], (0, 5))
    close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-6)


# Offloading


@pytest.mark.parametrize(
    ("model_class", "where", "text"),
    [*((head, "disk", "t5") for head in HEADS), (HiViLTForQuestionAnswering, "cpu", "bert")],
)
def test_offloaded_models_compute_the_same(model_class, where, text, tmp_path):
    model = make_model(model_class, text=text)
    inputs = make_inputs(model_class)
    expected = model(**inputs)
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert next(model.base_model.fusion.parameters()).device.type == "meta"
    close(model(**inputs), expected)
    states = model.encode_images(inputs["pixel_values"])
    close(model(**{**inputs, "pixel_values": None, "image_states": states}), expected)


@pytest.mark.parametrize("model_class", [HiViLTModel, HiViLTForRetrieval, HiViLTForConditionalGeneration])
def test_parts_can_be_placed_by_name_on_loading(model_class, tmp_path):
    model = make_model(model_class)
    inputs = make_inputs(model_class)
    model.save_pretrained(tmp_path / "model")
    prefix = "" if model_class is HiViLTModel else "model."
    parts = {f"{prefix}vision_model": "cpu", f"{prefix}text_model": "disk", f"{prefix}fusion": "disk"}
    parts |= {name: "cpu" for name, _ in model.named_children() if name != "model" and name not in parts}
    parts |= dict.fromkeys(model._parameters, "cpu")
    placed = model_class.from_pretrained(tmp_path / "model", device_map=parts, offload_folder=tmp_path / "offload")
    assert placed.base_model.text_model.get_input_embeddings().weight.device.type == "meta"
    close(placed(**inputs), model(**inputs))


@pytest.mark.parametrize("model_class", [*OF_A_BATCH, HiViLTForImagesAndTextClassification])
def test_parts_may_live_on_different_devices(model_class):
    # Meta stands for a second accelerator: nothing comes out of it, but it refuses to be mixed with another device.
    model = make_model(model_class)
    elsewhere = [model.base_model.fusion, *map(model.get_submodule, HEAD_FACTS[model_class].layers)]
    for part in elsewhere:
        part.to("meta").register_forward_pre_hook(lambda _, *inputs: send_to_device(inputs, "meta"), with_kwargs=True)
    assert set(model._no_split_modules) >= {"HiViLTFusion"}
    inputs = make_inputs(model_class)
    outputs = model(**{name: inputs[name] for name in make_batch()})
    on_meta = {name for name, value in outputs.items() if value.device.type == "meta"}
    assert on_meta == set(outputs) - {"vision_last_hidden_state", "text_last_hidden_state"}


# Adapters


@pytest.mark.checklist("12")
@pytest.mark.parametrize(
    ("head", "part"),
    [
        *((head, "fusion") for head in HEADS),
        *((HiViLTForQuestionAnswering, part) for part in ("vision", "text")),
        *(
            pytest.param(head, part, marks=pytest.mark.slow)
            for head in HEADS
            if head is not HiViLTForQuestionAnswering
            for part in ("vision", "text")
        ),
    ],
)
def test_adapters_train_save_load_and_merge(head, part, tmp_path):
    model = make_model(head)
    inputs = make_inputs(head)
    model.save_pretrained(tmp_path / "base")
    own_head = list(HEAD_FACTS[head].layers)
    adapted = get_peft_model(
        head.from_pretrained(tmp_path / "base"),
        LoraConfig(target_modules=PARTS[part], r=2, modules_to_save=own_head),
    )
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert {"lora_" in name for name in trained} == {True, False}
    assert not [name for name in trained if "lora_" in name and f".{PARTS[part].split('.')[2][:-1]}." not in name]

    before = adapted.eval()(**inputs)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        adapted(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = adapted(**inputs)
    assert after.loss < before.loss
    untouched = dict(model.named_parameters())
    for name, parameter in adapted.get_base_model().named_parameters():
        if not parameter.requires_grad and name in untouched:
            close(parameter, untouched[name], rtol=0, atol=0)

    adapted.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(head.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    close(reloaded(**inputs), after)
    merged = reloaded.merge_and_unload()
    close(merged(**inputs), after, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    close(head.from_pretrained(tmp_path / "merged")(**inputs), after, rtol=1e-4, atol=1e-5)


# Trainer


def with_the_wish_for_a_loss(rows: list) -> dict:
    """What retrieval is trained and evaluated on by a plain Trainer, as transformers' example for CLIP does it."""
    return collated(rows) | {"return_loss": True}


def make_trainer(model: PreTrainedModel, rows: list, folder, **arguments) -> Trainer:
    defaults = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    training = TrainingArguments(output_dir=str(folder), **(defaults | arguments))
    collator = with_the_wish_for_a_loss if isinstance(model, HiViLTForRetrieval) else collated
    return Trainer(model, training, train_dataset=rows, eval_dataset=rows, data_collator=collator)


@pytest.mark.checklist("6")
def test_trainer_evaluates_without_being_told_how(head, tmp_path):
    rows = make_rows(head)
    trainer = make_trainer(make_model(head), rows, tmp_path, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    assert np.isfinite(metrics["eval_loss"]) and metrics["eval_loss"] > 0
    predictions = trainer.predict(rows).predictions
    if head in (HiViLTForQuestionAnswering, HiViLTForImagesAndTextClassification):
        assert predictions.shape == (4, NUM_ANSWERS)
    elif head is HiViLTForConditionalGeneration:
        assert predictions.shape == (4, 4, 61)
    elif head is HiViLTForVisualGrounding:
        assert [array.shape for array in predictions] == [(4, 25), (4, 25, 4)]
    else:
        # What recall is computed from; the matrices of single batches are left out.
        assert [array.shape for array in predictions] == [(4, 9), (4, 9)]


@pytest.mark.checklist("5")
@pytest.mark.parametrize(
    ("head_class", "batches"),
    [
        (HiViLTForQuestionAnswering, [(4, 1), (2, 2), (1, 4)]),
        (HiViLTForRetrieval, [(2, 2), (1, 4)]),
    ],
    ids=["question answering", "retrieval"],
)
def test_gradient_accumulation_multiplies_neither_loss_nor_gradient(head_class, batches, tmp_path):
    rows = make_rows(head_class)
    seen, expected = [], []
    for size, steps in batches:
        model = with_dropout(make_model(head_class), 0.0)
        trainer = make_trainer(
            model,
            rows,
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            logging_steps=1,
            learning_rate=0.0,
        )
        # In the order of the rows: what a contrastive loss repels depends on who shares a batch.
        trainer._get_train_sampler = lambda dataset: SequentialSampler(dataset)
        trainer.train()
        seen.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])

        model.zero_grad()
        slices = [rows[start : start + size] for start in range(0, 4, size)]
        model.train()
        losses = [model(**collated(part)).loss for part in slices]
        loss = sum(losses) / len(losses)
        loss.backward()
        expected.append([loss.item(), nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()])
    np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-6)
    if head_class is not HiViLTForRetrieval:
        np.testing.assert_allclose(seen, [seen[0]] * 3, rtol=1e-4)
