"""What HiViLT does in the place of transformers, safetensors and PEFT."""

import pickle

import pytest
import torch
from safetensors.torch import load_file

from hivilt import HiViLTForQuestionAnswering, HiViLTModel
from tiny import make_batch, make_model


def test_a_model_is_pickled_with_its_hooks_and_records_as_before():
    model = make_model(HiViLTModel)
    copy = pickle.loads(pickle.dumps(model))
    expected, outputs = (one(**make_batch(), output_hidden_states=True) for one in (model, copy))
    for name in ("vision_hidden_states", "text_hidden_states"):
        assert len(outputs[name]) == len(expected[name]) > 1
        torch.testing.assert_close(outputs[name], expected[name])
    assert pickle.loads(pickle.dumps(copy)) is not None


def test_weights_that_were_cut_off_are_told_by_their_folder(tmp_path):
    make_model(HiViLTModel).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(OSError, match=f"{tmp_path}: its weights are cut off or damaged"):
        HiViLTModel.from_pretrained(tmp_path)


def test_weights_under_their_names_in_a_file_are_taken(tmp_path):
    """Trainer hands the file's names over as they are; those of ViT are older than the model's."""
    model = make_model(HiViLTForQuestionAnswering, vision="vit")
    model.save_pretrained(tmp_path)
    other = make_model(HiViLTForQuestionAnswering, vision="vit", weight_scale=8.0)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value)


def test_an_encoder_without_the_attention_asked_for_keeps_its_own():
    model = make_model(HiViLTModel, vision="convnext")
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    assert model(**make_batch(), output_attentions=True).cross_attentions is not None
