"""Every family of encoders that is taken is right, and every other one is refused when the config is made."""

import copy
import logging
import pickle
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from encoders import TEXT, VISION, text_config, vision_config
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import is_timm_available

from hivilt import HiViLTConfig, HiViLTForQuestionAnswering, HiViLTModel
from hivilt.encoders_hivilt import (
    MOST_LOOKS,
    REFUSED_FAMILIES,
    TEXT_FAMILIES,
    VISION_FAMILIES,
    has_values,
    image_size,
    layers_of,
    max_text_length,
    vision_states,
)

FUSION = {
    "hidden_size": 20,
    "num_attention_heads": 4,
    "num_fusion_stages": 2,
    "fusion_intermediate_size": 22,
    "id2label": {0: "no", 1: "yes", 2: "two"},
}
# Needs timm and torchvision, which are not among the requirements; each of its models is run when its config is made.
TIMM = {"timm_wrapper"}
# Of those that compute alike, or nearly so, one; the others are tested by `make test-all`.
VISION_SAMPLE = {"beit", "clip_vision_model", "convnext", "cvt", "dinov2_with_registers", "dinov3_vit", "efficientnet"}
VISION_SAMPLE |= {"hiera", "levit", "mobilenet_v2", "pvt_v2", "resnet", "siglip_vision_model", "swin", "vit"}
TEXT_SAMPLE = {"albert", "bert", "bloom", "clip_text_model", "deberta-v2", "distilbert", "gpt2", "llama", "modernbert"}
TEXT_SAMPLE |= {"mpnet", "opt", "roberta", "siglip_text_model", "t5", "xlm"}


def sampled(families: dict, sample: set[str]) -> list:
    """All families, of which those in the sample are quick tests."""
    assert sample <= set(families)
    return [family if family in sample else pytest.param(family, marks=pytest.mark.slow) for family in families]


def plain_vision() -> PreTrainedConfig:
    return vision_config("vit", num_hidden_layers=1)


def plain_text() -> PreTrainedConfig:
    return text_config("bert", num_hidden_layers=1)


def make_model(vision: PreTrainedConfig, text: PreTrainedConfig, **fusion) -> HiViLTForQuestionAnswering:
    """Seeded, in evaluation mode, with weights so large that attention is not uniform, and batch norms that have run."""
    torch.manual_seed(0)
    config = HiViLTConfig.from_vision_text_configs(vision, text, **FUSION | fusion)
    model = HiViLTForQuestionAnswering(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and parameter.std() < 0.1:
                parameter.mul_(4)
            elif parameter.dim() == 4:
                nn.init.kaiming_normal_(parameter)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.momentum = None  # the mean over the batches seen
        if norms:
            model.train().encode_images(make_images(config, 6))
    return model.eval()


@cache
def vision_model(family: str) -> HiViLTForQuestionAnswering:
    return make_model(vision_config(family), plain_text())


@cache
def text_model(family: str) -> HiViLTForQuestionAnswering:
    return make_model(plain_vision(), text_config(family))


def make_images(config: HiViLTConfig, count: int = 2) -> torch.Tensor:
    size = image_size(config.vision_config) or (64, 64)
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def make_texts() -> dict[str, torch.Tensor]:
    """Two texts, of 9 and of 5 tokens, padded on the right."""
    input_ids = torch.randint(5, 61, (2, 9), generator=torch.Generator().manual_seed(2))
    attention_mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}


def untrained(model: HiViLTForQuestionAnswering) -> list[str]:
    """Parameters without a gradient after a step in training mode."""
    model = copy.deepcopy(model).train()
    images = make_images(model.config)
    torch.manual_seed(3)
    model(**make_texts(), pixel_values=images, labels=torch.tensor([0, 2])).loss.backward()
    trains = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    return [name for name, grad in trains if grad is None or not grad.isfinite().all()]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# Vision


def test_every_vision_family_that_is_taken_is_tested():
    assert set(VISION) == set(VISION_FAMILIES) - TIMM


@pytest.mark.parametrize("family", sampled(VISION, VISION_SAMPLE))
def test_every_parameter_of_a_vision_encoder_trains(family):
    assert untrained(vision_model(family)) == []


@pytest.mark.parametrize("family", sampled(VISION, VISION_SAMPLE))
def test_images_in_a_batch_are_seen_as_each_alone(family):
    model = vision_model(family)
    images = make_images(model.config, 3)
    with torch.no_grad():
        together = model.encode_images(images).level_states
        for index in range(3):
            alone = model.encode_images(images[index : index + 1]).level_states
            for level, expected in zip(together, alone, strict=True):
                torch.testing.assert_close(level[index : index + 1], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", sampled(VISION, VISION_SAMPLE))
def test_each_part_of_an_image_moves_its_place_on_every_map(family):
    # LeViT loses places where it halves its grid, until it has learned its attention biases.
    model = (
        make_model(vision_config(family), plain_text(), vision_levels=[0, 0])
        if family == "levit"
        else vision_model(family)
    )
    image = make_images(model.config, 1)
    height, width = (size // 2 for size in image.shape[2:])
    changed = image.repeat(24, 1, 1, 1).unflatten(0, (4, 6))
    noise = torch.randn(6, 3, height, width, generator=torch.Generator().manual_seed(4))
    for part, (y, x) in zip(changed, [(0, 0), (0, width), (height, 0), (height, width)], strict=True):
        part[:, :, y : y + height, x : x + width] += noise
    with torch.no_grad():
        maps = levels_of(model.base_model, torch.cat([image, changed.flatten(0, 1)]))
    assert len(maps) == 2 and min(maps[0].shape[1:3]) > 2
    for level in maps:
        moved = (level[1:] - level[:1]).square().mean(dim=-1).unflatten(0, (4, 6)).mean(dim=1)
        moved = moved / moved.sum(dim=(1, 2), keepdim=True)  # (parts, rows, columns)
        rows, columns = moved.shape[1:]
        # Where the middle of all that moved lies, for the upper and lower, the left and right parts.
        y = (moved.sum(dim=2) * torch.arange(rows)).sum(dim=1)
        x = (moved.sum(dim=1) * torch.arange(columns)).sum(dim=1)
        if rows > 2:  # a cell of a coarser one has seen the whole image
            assert y[:2].mean() < y[2:].mean() and x[0::2].mean() < x[1::2].mean(), (moved, level.shape)
        if VISION_FAMILIES[family].states == "patches":
            quarters = nn.functional.adaptive_avg_pool2d(moved, 2).flatten(1) * rows * columns / 4
            assert quarters.argmax(dim=1).tolist() == [0, 1, 2, 3] and quarters.diagonal().min() > 0.4


def levels_of(model: HiViLTModel, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """The maps that the levels are made of, fine to coarse."""
    maps = []
    levels = model.fusion.vision_levels
    hooks = [level.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0])) for level in levels]
    model.encode_images(pixel_values)
    for hook in hooks:
        hook.remove()
    return maps


@pytest.mark.parametrize("family", sampled(VISION, VISION_SAMPLE))
def test_first_layers_freeze_in_the_order_of_computation(family):
    model = copy.deepcopy(vision_model(family))
    encoder = model.base_model.vision_model
    layers = layers_of(encoder)
    order = []
    hooks = [layer.register_forward_pre_hook(lambda layer, _: order.append(layer)) for layer in layers]
    model.encode_images(make_images(model.config))
    for hook in hooks:
        hook.remove()
    assert order == layers and len(layers) > 2

    model.freeze("vision", num_layers=2)
    model.train()
    frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    names = {id(p): name for name, p in encoder.named_parameters()}
    first, later = ({names[id(p)] for layer in part for p in layer.parameters()} for part in (layers[:2], layers[2:]))
    assert first <= frozen and not later & frozen
    assert not any(module.training for layer in layers[:2] for module in layer.modules())
    assert all(layer.training for layer in layers[2:])
    still = {name: value.clone() for name, value in encoder.state_dict().items() if name in frozen or "running" in name}
    model(**make_texts(), pixel_values=make_images(model.config), labels=torch.tensor([0, 2])).loss.backward()
    assert {name for name, p in encoder.named_parameters() if p.grad is None} == frozen
    moved = {name for name, value in still.items() if not torch.equal(value, encoder.state_dict()[name])}
    # The statistics of all batch norms stand still, those of the layers that train too.
    assert not moved


# Text


def test_every_text_family_that_is_taken_is_tested():
    assert set(TEXT) == set(TEXT_FAMILIES)


@pytest.mark.parametrize("family", sampled(TEXT, TEXT_SAMPLE))
def test_every_parameter_of_a_text_encoder_trains(family):
    assert untrained(text_model(family)) == []


@pytest.mark.parametrize("family", sampled(TEXT, TEXT_SAMPLE))
def test_padding_on_either_side_changes_nothing_of_a_text(family):
    model = text_model(family)
    texts = make_texts()
    short = {name: value[1:, :5] for name, value in texts.items()}
    left = {name: value[1:].roll(4, dims=1) for name, value in texts.items()}
    other = texts["input_ids"] + 7 * (1 - texts["attention_mask"])
    with torch.no_grad():
        expected = model.encode_texts(**short)
        for padded, kept in (
            (model.encode_texts(**texts), slice(0, 5)),
            (model.encode_texts(other, texts["attention_mask"]), slice(0, 5)),
            (model.encode_texts(**left), slice(4, 9)),
        ):
            close(padded.last_hidden_state[-1:, kept], expected.last_hidden_state)
            close(padded.global_state[-1:], expected.global_state)
        together = model.encode_texts(**texts).last_hidden_state[:1]
        close(together, model.encode_texts(texts["input_ids"][:1]).last_hidden_state)
    assert expected.last_hidden_state.std() > 0.1


@pytest.mark.parametrize("family", sampled(TEXT, TEXT_SAMPLE))
def test_every_word_of_a_text_matters(family):
    model = text_model(family)
    texts = make_texts()
    with torch.no_grad():
        expected = model.encode_texts(**texts).global_state
        for position in range(9):
            changed = texts["input_ids"].clone()
            changed[0, position] = 60 if changed[0, position] != 60 else 59
            assert not torch.allclose(model.encode_texts(changed, texts["attention_mask"]).global_state[0], expected[0])


# Checkpoints


DUAL = {
    "altclip": {"text": {"project_dim": 14}},
    "blip": {"text": {"encoder_hidden_size": 24}},
    "chinese_clip": {},
    "clip": {},
    "clipseg": {},
    "metaclip_2": {},
    "siglip": {},
    "siglip2": {},
}


@pytest.mark.parametrize("family", sampled(DUAL, {"blip", "clip", "siglip", "siglip2"}))
def test_a_dual_encoder_lends_both_its_towers(family, tmp_path):
    vision, text = (
        copy.deepcopy(config.to_dict())
        for config in (
            vision_config(f"{family}_vision_model", num_hidden_layers=2),
            text_config(f"{family}_text_model"),
        )
    )
    torch.manual_seed(0)
    whole = AutoModel.from_config(CONFIG_MAPPING[family](vision_config=vision, text_config=text, projection_dim=12))
    whole.save_pretrained(tmp_path)
    model = HiViLTForQuestionAnswering.from_vision_text_pretrained(tmp_path, tmp_path, **FUSION)
    assert model.config.vision_config.model_type == f"{family}_vision_model"
    assert model.config.text_config.model_type == f"{family}_text_model"
    for ours, theirs in (
        (model.base_model.vision_model, whole.vision_model),
        (model.base_model.text_model, whole.text_model),
    ):
        weights = theirs.state_dict()
        for name, value in ours.state_dict().items():
            assert torch.equal(value, weights[name]), name
    assert untrained(model) == []


@pytest.mark.parametrize("family", ["swin", "resnet", "mobilenet_v2", "hiera", "dinov2"])
def test_a_classifier_lends_its_encoder(family, tmp_path):
    config = vision_config(family)
    torch.manual_seed(0)
    classifier = transformers.AutoModelForImageClassification.from_config(config)
    classifier.save_pretrained(tmp_path)
    model = HiViLTModel.from_vision_text_pretrained(tmp_path, plain_text(), **FUSION)
    weights = classifier.base_model.state_dict()
    for name, value in model.vision_model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_mobilenet_has_the_maps_of_its_paper():
    # Sandler et al., arXiv 1801.04381, table 2; what torchvision's weights open in.
    fields = {"num_labels": 1000, "image_size": 224, "tf_padding": False, "layer_norm_eps": 1e-5}
    config = CONFIG_MAPPING["mobilenet_v2"](**fields, hidden_act="relu6", finegrained_output=True)
    maps = {(state.channels, state.side) for state in vision_states(config)}
    assert maps == {(24, 56), (32, 28), (64, 14), (96, 14), (160, 7), (320, 7), (1280, 7)}
    layout = HiViLTConfig.from_vision_text_configs(config, plain_text(), num_fusion_stages=4).vision_level_layout
    assert [channels for _, _, channels in layout] == [24, 32, 96, 1280]


# Attention, embeddings, pickling, weights that are not there


def implementations(model: HiViLTForQuestionAnswering) -> tuple[str, str, str]:
    config = model.config
    return tuple(part._attn_implementation for part in (config, config.vision_config, config.text_config))


def test_an_encoder_without_sdpa_keeps_its_own_and_the_others_come_back_to_it(tmp_path, caplog):
    make_model(vision_config("resnet"), plain_text()).save_pretrained(tmp_path)
    logging.Logger.warning_once.cache_clear()
    model = HiViLTForQuestionAnswering.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert implementations(model) == ("sdpa", "eager", "sdpa")
    expected = model(**make_texts(), pixel_values=make_images(model.config)).logits
    model.set_attn_implementation("eager")
    assert implementations(model) == ("eager", "eager", "eager")
    close(model(**make_texts(), pixel_values=make_images(model.config)).logits, expected)
    model.set_attn_implementation("sdpa")
    assert implementations(model) == ("sdpa", "eager", "sdpa")
    model.set_attn_implementation({"text_config": "eager"})
    assert implementations(model) == ("sdpa", "eager", "eager")
    told = [record.message for record in caplog.records if "attn_implementation" in record.message]
    assert told == ["ResNetModel has no `attn_implementation='sdpa'`; it keeps 'eager', its own."]


def test_a_gpu_is_waited_for_in_the_first_steps_of_training_alone():
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    for _ in range(2):  # of each model
        make_model(plain_vision(), plain_text())
        looks = [has_values(on_gpu) for _ in range(3 * MOST_LOOKS)]
        assert looks == sorted(looks, reverse=True) and sum(looks) == MOST_LOOKS
        make_model(plain_vision(), plain_text())
        # What a checkpoint computes twice must be the same both times.
        assert not any(has_values(on_gpu, always_alike=True) for _ in range(3))
    with torch.no_grad():
        assert has_values(on_gpu) and has_values(on_gpu, always_alike=True)
    assert has_values(torch.zeros(1))


@pytest.mark.parametrize("family", ["t5", "umt5", "bert", "gpt2", "clip_text_model", "altclip_text_model"])
def test_input_embeddings_are_the_module_that_runs(family):
    model = copy.deepcopy(text_model(family))
    ran = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: ran.append(inputs[0].shape))
    model.encode_texts(**make_texts())
    assert ran == [(2, 9)]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["t5", "bert"])
def test_a_frozen_text_encoder_passes_gradients_to_its_inputs(family, use_reentrant):
    model = copy.deepcopy(text_model(family)).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model.requires_grad_(False)
    states = model.encode_texts(**make_texts())
    assert states.last_hidden_state.requires_grad
    states.last_hidden_state.sum().backward()


@pytest.mark.parametrize(("vision", "text"), [("swin", "t5"), ("vit", "clip_text_model"), ("mobilenet_v2", "gpt2")])
def test_models_can_be_pickled_and_copied_before_and_after_their_first_call(vision, text, tmp_path):
    model = make_model(vision_config(vision), text_config(text))
    inputs = make_texts() | {"pixel_values": make_images(model.config)}
    untouched = pickle.loads(pickle.dumps(model))
    model.enable_input_require_grads()
    expected = model(**inputs, output_hidden_states=True)
    torch.save(model, tmp_path / "model.pt")
    copies = [
        untouched,
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
        copy.deepcopy(model),
    ]
    for other in copies:
        outputs = other(**inputs, output_hidden_states=True)
        torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=0)
        assert len(outputs.vision_hidden_states) == len(expected.vision_hidden_states)
        assert other.model.vision_model.config is other.config.vision_config
    # What it was made from works on.
    assert model(**inputs, output_hidden_states=True).vision_hidden_states is not None


@pytest.mark.parametrize(("family", "lost"), [("t5", ".q.weight"), ("clip_text_model", ".q_proj.weight")])
def test_weights_that_a_checkpoint_lacks_are_drawn_as_the_encoder_draws_them(family, lost, tmp_path):
    torch.manual_seed(0)
    config = HiViLTConfig.from_vision_text_configs(plain_vision(), text_config(family), **FUSION)
    model = HiViLTForQuestionAnswering(config)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not (".text_model." in name and name.endswith(lost))}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = HiViLTForQuestionAnswering.from_pretrained(tmp_path).state_dict()
    missing = [name for name in model.state_dict() if ".text_model." in name and name.endswith(lost)]
    assert len(missing) == 2
    for name, value in model.state_dict().items():
        if name in missing:
            assert not torch.equal(loaded[name], value)
            assert loaded[name].std() == pytest.approx(value.std().item(), rel=0.2)
        else:
            assert torch.equal(loaded[name], value), name


# What is refused


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_a_family_that_cannot_be_right_is_refused_by_name_and_reason(family):
    config = CONFIG_MAPPING[family]()
    for given in (config, config.to_dict()):
        with pytest.raises(ValueError, match=f"`vision_config`: a `{family}` cannot be the") as refusal:
            HiViLTConfig(vision_config=given)
        assert REFUSED_FAMILIES[family] in str(refusal.value) and "vit," in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("vision_config", "bert"),
        ("vision_config", "detr"),
        ("vision_config", "wav2vec2"),
        ("vision_config", "yolos"),
        ("text_config", "bart"),
        ("text_config", "fnet"),
        ("text_config", "longformer"),
        ("text_config", "vit"),
        ("text_config", "xlnet"),
    ],
)
def test_what_nobody_has_tested_is_refused_by_name(name, family):
    with pytest.raises(ValueError, match=f"`{name}`: a `{family}` cannot .* not among the .* that are tested"):
        HiViLTConfig(**{name: {"model_type": family}})


@pytest.mark.skipif(is_timm_available(), reason="is about timm not being installed")
def test_timm_that_is_not_installed_is_named_with_the_way_out():
    with pytest.raises(
        ValueError, match=r"`vision_config`: a `timm_wrapper` cannot.*\n.*requires the timm.*\n.*pip install timm"
    ):
        HiViLTConfig(vision_config=CONFIG_MAPPING["timm_wrapper"](architecture="resnet18"))


@pytest.mark.parametrize("name", ["vision_config", "text_config"])
def test_the_config_of_a_whole_model_in_place_of_a_tower_says_what_to_give(name):
    with pytest.raises(ValueError, match=f"of a whole model: give its `{name}`"):
        HiViLTConfig(**{name: CONFIG_MAPPING["clip"]()})


class OwnConfig(PreTrainedConfig):
    model_type = "own_vision"
    fault: str | None = None


class OwnVision(transformers.PreTrainedModel):
    """Convolves to 8 by 8 cells; wrong in one way at a time."""

    config_class = OwnConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.patches = nn.Conv2d(3, 6, 28, 28)
        self.unused = nn.Linear(2, 2) if config.fault == "unused" else None
        self.post_init()

    def forward(self, pixel_values, **kwargs):
        states = self.patches(pixel_values)
        if self.config.fault == "scrambled":
            states = states[:, :, :, :3]
        hidden_states = None if self.config.fault == "silent" else (states, states)
        return BaseModelOutput(last_hidden_state=states, hidden_states=hidden_states)


@pytest.fixture
def own_vision():
    AutoConfig.register("own_vision", OwnConfig, exist_ok=True)
    AutoModel.register(OwnConfig, OwnVision, exist_ok=True)


def test_an_encoder_of_ones_own_is_taken_as_it_is_run(own_vision):
    model = make_model(OwnConfig(), plain_text(), num_fusion_stages=1)
    assert model.config.vision_level_layout == [(1, 1, 6)]
    assert model(**make_texts(), pixel_values=torch.randn(2, 3, 224, 224)).logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("silent", "gives no hidden states"),
        ("scrambled", r"gives a hidden state of shape \(2, 8, 3, 6\), which is no map"),
        ("unused", "2 parameters get no gradient, the first being 'unused.weight'"),
    ],
)
def test_an_encoder_of_ones_own_that_cannot_be_right_is_refused_by_what_it_does(own_vision, fault, told):
    with pytest.raises(ValueError, match=f"`vision_config`: a `own_vision` cannot be the vision encoder: .*{told}"):
        HiViLTConfig(vision_config=OwnConfig(fault=fault))


def test_images_of_another_size_than_an_encoder_takes_are_refused():
    model = vision_model("levit")
    with pytest.raises(ValueError, match="`levit`.*64 by 64.*96 by 64"):
        model.encode_images(torch.randn(1, 3, 96, 64))


# The table


def test_encoders_md_says_what_is_tested():
    lie = {
        "patches": "layers, on one grid of patches",
        "stages": "stages",
        "merging": "stages, after merging",
        "run": "the last state of each grid",
    }
    rows = ["| vision encoder (`model_type`) | levels come from |", "|---|---|"]
    rows += [f"| `{name}` | {lie[VISION_FAMILIES[name].states]} |" for name in sorted(VISION)]
    rows += ["", "| text encoder (`model_type`) | longest text |", "|---|---|"]
    for name in sorted(TEXT):
        limit = max_text_length(text_config(name))
        offset = "`max_position_embeddings` less `pad_token_id` + 1"
        limits = {None: "any", 40: "`max_position_embeddings`"}
        rows.append(f"| `{name}` | {limits.get(limit, offset)} |")
    rows += ["", "| refused | why |", "|---|---|"]
    rows += [f"| `{name}` | {why} |" for name, why in REFUSED_FAMILIES.items()]
    text = (Path(__file__).resolve().parents[1] / "docs" / "encoders.md").read_text(encoding="utf-8")
    assert text.split("<!-- table -->\n")[1] == "\n".join([*rows, ""])  # what a failing test's report shows goes there
