import importlib.util
from pathlib import Path

import pytest
import torch

import hivilt
from hivilt import HiViLTForRetrieval
from tiny import make_batch, make_model

SPEC = importlib.util.spec_from_file_location("halve", Path(hivilt.__file__).parent / "runs/halve.py")
halve = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(halve)


def test_half_the_bytes_are_float32_when_loaded_and_score_nearly_alike(tmp_path, capsys):
    model = make_model(HiViLTForRetrieval, weight_scale=2.0).eval()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").stat().st_size
    halve.main([str(tmp_path)])
    assert (tmp_path / "model.safetensors").stat().st_size < 0.6 * before
    assert "MB before" in capsys.readouterr().out
    halved = HiViLTForRetrieval.from_pretrained(tmp_path).eval()
    floats = {value.dtype for value in halved.state_dict().values() if value.is_floating_point()}
    assert floats == {torch.float32} and halved.config.dtype == torch.float32
    batch = {name: value for name, value in make_batch().items() if name != "labels"}
    for name in ("image_embeds", "text_embeds"):
        expected, found = model(**batch)[name], halved(**batch)[name]
        torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)
        assert not torch.equal(found, expected)


def test_what_float16_cannot_hold_is_refused_and_nothing_written(tmp_path):
    model = make_model(HiViLTForRetrieval)
    with torch.no_grad():
        model.model.vision_model.layernorm.weight[0] = 1e5
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="vision_model.layernorm.weight has numbers up to 100000"):
        halve.main([str(tmp_path)])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        halve.main([str(tmp_path)])
