"""The config: what it holds by default, derives, refuses and saves."""

import importlib
import json
import math
import runpy
import sys
from dataclasses import fields
from importlib import metadata

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    BertConfig,
    CLIPConfig,
    ConvNextConfig,
    Dinov2Config,
    MobileNetV2Config,
    ResNetConfig,
    RobertaConfig,
    SiglipConfig,
    SiglipVisionConfig,
    SwinConfig,
    T5Config,
    ViTConfig,
)

from hivilt import HiViLTConfig, HiViLTForQuestionAnswering, HiViLTForRetrieval, configuration_hivilt
from hivilt.configuration_hivilt import AUTO_MAP
from hivilt.fusion_hivilt import HiViLTModelOutput
from hivilt.grounding_hivilt import HiViLTGroundingOutput
from hivilt.modeling_hivilt import HiViLTQuestionAnsweringOutput, HiViLTRetrievalOutput
from hivilt.reasoning_hivilt import HiViLTImagesAndTextClassificationOutput
from tiny import AUTO_CLASSES, HEAD_FACTS, TEXT_CONFIGS, VISION_CONFIGS, make_batch, make_config


def saved(config: HiViLTConfig, folder) -> dict:
    """What `save_pretrained` wrote."""
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


# Defaults


def test_defaults_are_the_base_model_of_the_design_note():
    config = HiViLTConfig()
    vision, text = config.vision_config, config.text_config
    assert (vision.model_type, vision.image_size, vision.patch_size) == ("vit", 224, 16)
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (768, 12, 12)
    assert (text.model_type, text.vocab_size, text.max_position_embeddings) == ("bert", 30522, 512)
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (768, 12, 12)
    assert (config.hidden_size, config.num_attention_heads, config.num_fusion_stages) == (768, 8, 3)
    assert (config.dropout, config.projection_dim, config.logit_scale_init_value) == (0.1, 256, 2.6592)
    assert config.use_local_fusion and config.use_global_fusion and config.fusion_top_k is None
    assert (config.classification_loss_weight, config.contrastive_loss_weight) == (1.0, 1.0)
    assert config.auxiliary_loss_weight is None


def test_fields_go_by_keyword():
    with pytest.raises(ValueError, match="only keyword arguments"):
        HiViLTConfig(ViTConfig(), BertConfig())


# Versions


@pytest.mark.parametrize(
    "package, version", [("transformers", "4.57.6"), ("transformers", "6.0.0"), ("huggingface_hub", "1.15.0")]
)
def test_other_versions_are_refused_before_anything_else_is_imported(package, version, monkeypatch):
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == package else installed(name))
    # Nothing of what an old transformers lacks may be reached first.
    monkeypatch.setitem(sys.modules, "huggingface_hub.dataclasses", None)
    monkeypatch.setitem(sys.modules, "transformers.configuration_utils", None)
    with pytest.raises(ImportError, match=rf'found {package}=={version}.*\n.*pip install "{package}>='):
        runpy.run_path(configuration_hivilt.__file__)


# Encoders


@pytest.mark.parametrize("name", VISION_CONFIGS)
def test_vision_config_is_taken_as_object_or_dict(name):
    vision = make_config(vision=name).vision_config
    assert type(vision) is type(VISION_CONFIGS[name]())
    assert HiViLTConfig(vision_config=vision.to_dict(), num_fusion_stages=2).vision_config.to_dict() == vision.to_dict()


@pytest.mark.parametrize("name", TEXT_CONFIGS)
def test_text_config_is_taken_as_object_or_dict(name):
    text = make_config(text=name).text_config
    assert type(text) is type(TEXT_CONFIGS[name]())
    assert HiViLTConfig(text_config=text.to_dict()).text_config.to_dict() == text.to_dict()


@pytest.mark.parametrize("name", ["vision_config", "text_config"])
def test_an_encoder_that_transformers_does_not_know_is_named(name):
    with pytest.raises(ValueError, match=f"`{name}` has the `model_type` 'vitt', which transformers does not know"):
        HiViLTConfig(**{name: {"model_type": "vitt"}})


def test_dict_without_model_type_is_vit_or_bert():
    config = HiViLTConfig(vision_config={"image_size": 96}, text_config={"vocab_size": 7})
    assert isinstance(config.vision_config, ViTConfig) and config.vision_config.image_size == 96
    assert isinstance(config.text_config, BertConfig) and config.text_config.vocab_size == 7


@pytest.mark.parametrize("whole", [CLIPConfig, SiglipConfig])
def test_config_of_a_dual_encoder_lends_its_towers(whole):
    whole = whole(vision_config={"image_size": 64}, text_config={"vocab_size": 77})
    config = HiViLTConfig.from_vision_text_configs(whole, whole, hidden_size=64)
    assert type(config.vision_config) is type(whole.vision_config) and config.vision_config.image_size == 64
    assert type(config.text_config) is type(whole.text_config) and config.text_config.vocab_size == 77
    assert config.hidden_size == 64


@pytest.mark.parametrize(
    ("vision", "unread"),
    [(SiglipVisionConfig(), "vision_use_head"), (Dinov2Config(), "use_mask_token")],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_heads_that_nothing_reads_are_switched_off_in_a_copy(vision, unread):
    before = vision.to_dict()
    config = HiViLTConfig(vision_config=vision)
    assert getattr(config.vision_config, unread) is False
    assert vision.to_dict() == before and before.get(unread, True) is True


def test_classes_of_a_pretrained_encoder_do_not_travel(tmp_path):
    text = BertConfig(id2label={0: "not relevant", 1: "relevant"}, label2id={"not relevant": 0, "relevant": 1})
    vision = MobileNetV2Config(num_labels=1000)
    config = HiViLTConfig(vision_config=vision, text_config=text, id2label=dict(enumerate(["red", "blue", "green"])))
    found = saved(config, tmp_path)
    for name in ("vision_config", "text_config"):
        assert found[name]["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
        assert found[name]["label2id"] == {"LABEL_0": 0, "LABEL_1": 1}
    assert found["id2label"] == {"0": "red", "1": "blue", "2": "green"}
    assert vision.num_labels == 1000 and text.id2label[1] == "relevant"
    assert HiViLTConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("origin", ["google/vit-base-patch16-224", "encoders/vit", ""])
def test_of_an_encoders_folder_its_name_is_saved_and_of_a_hub_id_all(origin, tmp_path):
    vision, text = ViTConfig(name_or_path=str(tmp_path / "my_vit")), BertConfig(name_or_path=origin)
    found = saved(HiViLTConfig(vision_config=vision, text_config=text), tmp_path / "saved")
    assert found["vision_config"]["_name_or_path"] == "my_vit"
    assert found["text_config"]["_name_or_path"] == origin
    assert str(tmp_path) not in json.dumps(found) and vision._name_or_path == str(tmp_path / "my_vit")


# Levels: for each stage the index into the encoder's hidden states, the pooling stride and the channels there


@pytest.mark.parametrize(
    ("vision", "fusion", "layout"),
    [
        # Isotropic: evenly spaced layers that end with the last, pooled by 1, 2, 4.
        (ViTConfig(), {}, [(4, 1, 768), (8, 2, 768), (12, 4, 768)]),
        (ViTConfig(), {"num_fusion_stages": 1}, [(12, 1, 768)]),
        (ViTConfig(), {"num_fusion_stages": 5}, [(2, 1, 768), (4, 2, 768), (7, 4, 768), (9, 8, 768), (12, 16, 768)]),
        (ViTConfig(num_hidden_layers=24, hidden_size=1024), {}, [(8, 1, 1024), (16, 2, 1024), (24, 4, 1024)]),
        (SiglipVisionConfig(), {}, [(4, 1, 768), (8, 2, 768), (12, 4, 768)]),
        (Dinov2Config(), {"vision_levels": [12, 12, 12]}, [(12, 1, 768), (12, 2, 768), (12, 4, 768)]),
        (ViTConfig(), {"vision_strides": [2, 2, 7]}, [(4, 2, 768), (8, 2, 768), (12, 7, 768)]),
        # Hierarchical: the last stages, which coarsen by themselves. Swin merges after a stage, so its last two states
        # share a resolution and the former is left out.
        (SwinConfig(), {}, [(1, 1, 192), (2, 1, 384), (4, 1, 768)]),
        (SwinConfig(), {"num_fusion_stages": 4}, [(0, 1, 96), (1, 1, 192), (2, 1, 384), (4, 1, 768)]),
        (SwinConfig(embed_dim=128), {"num_fusion_stages": 1}, [(4, 1, 1024)]),
        (SwinConfig(), {"vision_levels": [0, 3, 4]}, [(0, 1, 96), (3, 1, 768), (4, 1, 768)]),
        (ConvNextConfig(), {}, [(2, 1, 192), (3, 1, 384), (4, 1, 768)]),
        (ConvNextConfig(), {"num_fusion_stages": 4}, [(1, 1, 96), (2, 1, 192), (3, 1, 384), (4, 1, 768)]),
        (ConvNextConfig(), {"vision_levels": [0, 2, 4]}, [(0, 1, 96), (2, 1, 192), (4, 1, 768)]),
        (ConvNextConfig(), {"vision_strides": [4, 2, 1]}, [(2, 4, 192), (3, 2, 384), (4, 1, 768)]),
        (ResNetConfig(), {"vision_levels": [0, 1, 4]}, [(0, 1, 64), (1, 1, 256), (4, 1, 2048)]),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_vision_level_layout(vision, fusion, layout):
    assert HiViLTConfig(vision_config=vision, **fusion).vision_level_layout == layout


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        (BertConfig(), 512),
        (RobertaConfig(max_position_embeddings=514), 512),  # positions start behind pad_token_id, which is 1
        (RobertaConfig(max_position_embeddings=514, pad_token_id=0), 513),
        (CLIPConfig(), 77),
        (T5Config(), None),
    ],
    ids=["bert", "roberta", "roberta, other padding", "clip", "t5"],
)
def test_max_text_length(text, limit):
    assert HiViLTConfig.from_vision_text_configs(ViTConfig(), text).max_text_length == limit


# Answers


@pytest.mark.parametrize("make", [HiViLTConfig, lambda **labels: HiViLTConfig.from_dict({}, **labels)])
def test_a_list_of_answers_as_id2label_is_refused_with_the_way_out(make):
    with pytest.raises(
        ValueError, match=r"`id2label` must map .* got \['no', 'yes'\]; write .*dict\(enumerate\(answers"
    ):
        make(id2label=["no", "yes"])


def test_label2id_follows_from_id2label():
    config = HiViLTConfig(id2label={"0": "red", "1": "blue", "2": "yes"})
    assert config.id2label == {0: "red", 1: "blue", 2: "yes"}
    assert config.label2id == {"red": 0, "blue": 1, "yes": 2}
    assert config.num_labels == 3
    # A second opinion on the numbers does not count.
    assert HiViLTConfig(id2label={0: "red"}, label2id={"red": 5}).label2id == {"red": 0}


@pytest.mark.parametrize("make", [HiViLTConfig, lambda **labels: HiViLTConfig.from_dict({}, **labels)])
def test_label2id_alone_is_as_good(make):
    config = make(label2id={"red": 0, "yes": 2, "blue": 1})
    assert config.id2label == {0: "red", 2: "yes", 1: "blue"} and config.num_labels == 3
    with pytest.raises(
        ValueError, match=r"`label2id` must map each answer to a number of its own, got {'a': 0, 'b': 0}"
    ):
        make(label2id={"a": 0, "b": 0})
    with pytest.raises(StrictDataclassError, match="`id2label` must number its 2 answers from 0.*got 1..2"):
        make(label2id={"a": 1, "b": 2})


def test_num_labels_alone_makes_nameless_answers():
    config = HiViLTConfig(num_labels=3)
    assert config.num_labels == 3 and config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


# Refusals


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("hidden_size", 0),
        ("hidden_size", "20"),
        ("hidden_size", 22),  # not a multiple of the 4 heads
        ("num_attention_heads", 0),
        ("num_attention_heads", 3),
        ("num_fusion_stages", 0),
        ("num_fusion_stages", 10**9),
        ("hidden_act", "gleu"),
        ("layer_norm_eps", 0.0),
        ("layer_norm_eps", math.nan),
        ("initializer_range", -0.02),
        ("initializer_range", math.inf),
        ("logit_scale_init_value", math.nan),
        ("auxiliary_loss_weight", math.nan),
        ("num_fusion_stages", 2.0),
        ("num_images", 0),
        ("num_images", 1.5),
        ("fusion_intermediate_size", 0),
        ("projection_dim", -1),
        ("fusion_top_k", 0),
        ("fusion_top_k", 0.5),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("embedding_dropout", 1.0),
        ("embedding_dropout", -0.1),
        ("classification_loss_weight", -1.0),
        ("contrastive_loss_weight", -1.0),
        ("auxiliary_loss_weight", -1.0),
        ("auxiliary_loss_weight", "no"),
        ("use_local_fusion", "no"),
        ("use_global_fusion", 1),
        ("gather_negatives", None),
        ("logit_scale_init_value", "ln 14"),
        ("vision_levels", [3]),
        ("vision_levels", []),
        ("vision_levels", [1, 4]),  # three layers and the embeddings: 0..3
        ("vision_levels", [-1, 3]),
        ("vision_levels", 3),
        ("vision_strides", [1, 2, 4]),
        ("vision_strides", [0, 1]),
        ("vision_strides", "12"),
        ("id2label", {0: "red", 1: "red"}),
        ("id2label", {1: "red", 2: "blue"}),
        ("id2label", {0: "red", 2: "blue"}),
    ],
)
def test_refuses_a_wrong_value_by_the_name_of_its_field(field, wrong):
    with pytest.raises(StrictDataclassError, match=rf"['`]{field}['`]"):
        make_config(**{field: wrong})


OWN_FIELDS = sorted(field.name for field in fields(HiViLTConfig) if field.name in HiViLTConfig.__annotations__)
NUMBERS = st.integers(-3, 9) | st.floats(width=16) | st.sampled_from([10**6, -1.0, 0.5, 1e-6])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.sampled_from(["", "gelu", "relu", "vit", "x"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["model_type", "0", "1", "x"]), inner),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([*OWN_FIELDS, "id2label", "num_labels", "problem_type"]), JSON)
def test_any_json_is_refused_by_name_or_makes_a_model_that_computes(field, value):
    written = make_config().to_dict()
    if field == "num_labels":
        del written["id2label"], written["label2id"]
    try:
        config = HiViLTConfig.from_dict({**written, field: value})
    except (ValueError, StrictDataclassError) as error:
        assert field in str(error), error
        return
    if field.endswith("_config") or value == 10**6:  # another encoder takes other inputs; others are too large to run
        return
    batch = make_batch()
    for model_class in (HiViLTForQuestionAnswering, HiViLTForRetrieval):
        with torch.no_grad():
            output = model_class(config)(**batch)
        scores = output.logits if model_class is HiViLTForQuestionAnswering else output.logits_per_text
        assert scores.isfinite().all()


@pytest.mark.parametrize("vision", ["swin", "convnext"])
def test_refuses_more_stages_than_a_hierarchical_encoder_has(vision):
    with pytest.raises(StrictDataclassError, match="`num_fusion_stages` .4. is more than"):
        make_config(vision=vision, num_fusion_stages=4)


def test_refuses_an_encoder_that_is_neither_config_nor_dict():
    with pytest.raises((StrictDataclassError, TypeError), match="vision_config"):
        HiViLTConfig(vision_config="vit")


def test_refuses_to_save_what_was_broken_after_construction(tmp_path):
    config = make_config()
    config.num_attention_heads = 3
    with pytest.raises(StrictDataclassError, match="`num_attention_heads`"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("hidden_sizes", "hidden_size"),
        ("num_fusion_stage", "num_fusion_stages"),
        ("fusion_topk", "fusion_top_k"),
        ("drop_out", "dropout"),
        ("use_localfusion", "use_local_fusion"),
        ("vision_confg", "vision_config"),
    ],
)
def test_notices_a_misspelt_field(misspelt, meant):
    with pytest.raises(ValueError, match=f"no `{misspelt}`; did you mean `{meant}`"):
        make_config(**{misspelt: 1})


def test_notices_a_misspelt_or_empty_field_of_an_encoder(tmp_path):
    with pytest.raises(ValueError, match="`vision_config` has no `hiden_size`; did you mean `hidden_size`"):
        HiViLTConfig(vision_config={"hiden_size": 32})
    with pytest.raises(StrictDataclassError, match="`image_size` of `vision_config` must be at least 1"):
        HiViLTConfig(vision_config={"image_size": 0})
    # Another version of transformers may know it.
    config = make_config()
    config.vision_config.hiden_size = 32
    saved(config, tmp_path)
    assert HiViLTConfig.from_pretrained(tmp_path).vision_config.hiden_size == 32


def test_keeps_a_field_that_resembles_none_of_its_own_and_says_so(tmp_path, caplog):
    config = make_config(trained_on="easy-vqa", num_labels=5)
    assert "HiViLTConfig has no `trained_on`: it is kept, and changes nothing" in caplog.text
    caplog.clear()
    assert saved(config, tmp_path)["trained_on"] == "easy-vqa"
    assert HiViLTConfig.from_pretrained(tmp_path).trained_on == "easy-vqa"
    assert not caplog.records


@pytest.mark.parametrize("name", ["layer_norm_epsilon", "fusion_top_ks"])
def test_opens_what_a_later_version_saved_or_someone_set(name, tmp_path):
    config = make_config()
    setattr(config, name, 3)
    assert saved(config, tmp_path)[name] == 3
    opened = [
        HiViLTConfig.from_pretrained(tmp_path),
        HiViLTConfig.from_pretrained(tmp_path, return_unused_kwargs=True)[0],
        HiViLTConfig.from_json_file(str(tmp_path / "config.json")),
        HiViLTConfig.from_dict(config.to_dict()),
    ]
    assert [getattr(one, name) for one in opened] == [3] * 4
    assert all(one.layer_norm_eps == config.layer_norm_eps and one.fusion_top_k is None for one in opened)
    with pytest.raises(ValueError, match=f"no `{name}`; did you mean"):
        make_config(**{name: 3})


# Saving and loading


@pytest.mark.parametrize("vision", VISION_CONFIGS)
@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_round_trip_gives_an_equal_config(vision, text, tmp_path):
    config = make_config(
        vision, text, vision_levels=(1, 3), vision_strides=[1, 2], fusion_top_k=3, dropout=0, auxiliary_loss_weight=0.5
    )
    first = saved(config, tmp_path)
    loaded = HiViLTConfig.from_pretrained(tmp_path)
    # Equal but for what only a saved config knows: the version that wrote it.
    assert loaded.to_dict() == {**config.to_dict(), "vision_levels": [1, 3]}
    assert type(loaded.vision_config) is type(config.vision_config)
    assert type(loaded.text_config) is type(config.text_config)
    assert saved(loaded, tmp_path / "again") == first
    assert HiViLTConfig.from_pretrained(tmp_path / "again") == loaded


@pytest.mark.parametrize("answers", [{0: "yes", 1: "no"}, {"0": "yes", "1": "no", "2": "two"}])
def test_answers_given_on_loading_or_set_later_name_both_maps(answers, tmp_path):
    make_config(id2label={0: "red", 1: "blue"}).save_pretrained(tmp_path)
    wanted = {int(index): answer for index, answer in answers.items()}
    loaded = HiViLTConfig.from_pretrained(tmp_path, id2label=answers)
    assert loaded.id2label == wanted and loaded.label2id == {answer: index for index, answer in wanted.items()}
    changed = HiViLTConfig.from_pretrained(tmp_path)
    changed.id2label = wanted
    assert saved(changed, tmp_path)["label2id"] == loaded.label2id == saved(loaded, tmp_path)["label2id"]


def test_auto_config_knows_the_model_type(tmp_path):
    make_config().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is HiViLTConfig
    assert type(AutoConfig.for_model("hivilt")) is HiViLTConfig


def test_auto_map_names_all_the_code():
    assert set(AUTO_MAP) == {"AutoConfig", "AutoProcessor", *(auto.__name__ for auto in AUTO_CLASSES.values())}
    for model_class, facts in HEAD_FACTS.items():
        home = model_class.__module__.removeprefix("hivilt.")
        assert AUTO_MAP[facts.auto_class.__name__] == f"{home}.{model_class.__name__}"
    for reference in AUTO_MAP.values():
        module, name = reference.split(".")
        assert getattr(importlib.import_module(f"hivilt.{module}"), name).__name__ == name


@pytest.mark.checklist("2")
def test_saved_config_refers_to_the_code_beside_it_wherever_it_was_loaded_from(tmp_path):
    from_hub = {auto_class: f"someone/somewhere--{reference}" for auto_class, reference in AUTO_MAP.items()}
    config = make_config(auto_map=dict(from_hub))
    assert saved(config, tmp_path)["auto_map"] == AUTO_MAP
    assert config.auto_map == from_hub
    # A config from before the full map, or from a class that wrote only its own entry, is completed.
    config = make_config(auto_map={"AutoConfig": AUTO_MAP["AutoConfig"]})
    assert saved(config, tmp_path)["auto_map"] == AUTO_MAP
    assert (tmp_path / "configuration_hivilt.py").is_file()


def test_two_configs_share_nothing():
    first, second = make_config(), make_config()
    first.auto_map["AutoModel"] = "elsewhere.Model"
    first.id2label[0] = "changed"
    assert second.auto_map == AUTO_MAP and second.id2label[0] == "answer 0"


# What Trainer reads


@pytest.mark.parametrize(
    ("output", "kept"),
    [
        (HiViLTModelOutput, set()),
        (HiViLTQuestionAnsweringOutput, {"loss", "logits"}),
        (HiViLTRetrievalOutput, {"loss", "image_embeds", "text_embeds"}),
        (HiViLTGroundingOutput, {"loss", "logits", "pred_boxes"}),
        (HiViLTImagesAndTextClassificationOutput, {"loss", "logits"}),
    ],
)
def test_evaluation_keeps_only_what_metrics_need(output, kept):
    assert {field.name for field in fields(output)} - set(HiViLTConfig.keys_to_ignore_at_inference) == kept


def test_class_attributes_stay_out_of_the_file(tmp_path):
    names = saved(make_config(), tmp_path)
    assert "keys_to_ignore_at_inference" not in names and "sub_configs_defaults" not in names
    assert names["model_type"] == "hivilt"
