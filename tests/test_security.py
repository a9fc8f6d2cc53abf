"""Checkpoints that somebody tampered with: nothing of them runs, nothing is allocated for them, and they are refused."""

import io
import json
import os
import pickle
import shutil
import struct
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForVisualQuestionAnswering, Trainer, TrainingArguments

from hivilt import HiViLTForQuestionAnswering, HiViLTProcessor
from hivilt.configuration_hivilt import AUTO_MAP
from hivilt.training.results import peak_memory_bytes
from tiny import make_batch, make_model, make_processor


class Trap:
    """What makes a folder when it is unpickled."""

    def __init__(self, sprung):
        self.sprung = sprung

    def __reduce__(self):
        return os.mkdir, (str(self.sprung),)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    make_model(HiViLTForQuestionAnswering).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def trap(tmp_path):
    """Fails the test if it was sprung."""
    yield Trap(tmp_path / "sprung")
    assert not (tmp_path / "sprung").exists()


def rewrite(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | changes))


def test_the_trap_works(trap):
    pickle.loads(pickle.dumps(trap))
    trap.sprung.rmdir()


def test_a_pickle_beside_the_weights_is_not_read(checkpoint, trap):
    expected = HiViLTForQuestionAnswering.from_pretrained(checkpoint)(**make_batch()).logits
    torch.save({"classifier.weight": trap}, checkpoint / "pytorch_model.bin")
    logits = HiViLTForQuestionAnswering.from_pretrained(checkpoint)(**make_batch()).logits
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("write", [torch.save, pickle.dump], ids=["torch", "pickle"])
def test_a_pickle_in_place_of_the_weights_is_refused(checkpoint, trap, write):
    (checkpoint / "model.safetensors").unlink()
    content = io.BytesIO()
    write({"classifier.weight": trap}, content)
    (checkpoint / "pytorch_model.bin").write_bytes(content.getvalue())
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        HiViLTForQuestionAnswering.from_pretrained(checkpoint)


def test_a_trap_in_the_state_of_training_is_refused(checkpoint, trap, tmp_path):
    model = HiViLTForQuestionAnswering.from_pretrained(checkpoint)
    items = [{name: value[0] for name, value in make_batch().items() if name != "image_index"}] * 2
    for item in items:
        item["labels"] = torch.tensor(1)
    usual = {"max_steps": 2, "save_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(tmp_path / "run", per_device_train_batch_size=1, **usual)
    Trainer(model, args, train_dataset=items).train()
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        trapped = tmp_path / file
        shutil.copytree(tmp_path / "run/checkpoint-1", trapped)
        torch.save(trap, trapped / file)
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            Trainer(model, args, train_dataset=items).train(resume_from_checkpoint=str(trapped))


def header(**tensor):
    """A safetensors file of one tensor, whose header says what it likes."""
    content = {"classifier.bias": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]} | tensor}
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + bytes(20)


@pytest.mark.parametrize(
    "content",
    [
        header(shape=[10**12, 10**6]),
        header(shape=[10**14], data_offsets=[0, 4 * 10**14]),
        header(data_offsets=[-8, 12]),
        struct.pack("<Q", 10**15) + b"{}",
        struct.pack("<Q", 2**63) + b"{}",
        b"",
        header()[:-1],
        pickle.dumps({"classifier.bias": 1}),
    ],
    ids=["shape", "size", "offset", "header", "header size", "empty", "cut off", "pickle"],
)
def test_damaged_weights_are_refused_by_name_before_memory_is_taken(checkpoint, content):
    (checkpoint / "model.safetensors").write_bytes(content)
    before = peak_memory_bytes()
    with pytest.raises(OSError, match=rf"^{checkpoint}: its weights are cut off or damaged .*copy or download"):
        HiViLTForQuestionAnswering.from_pretrained(checkpoint)
    assert peak_memory_bytes() < before + 2**27


def test_an_index_that_points_out_of_the_folder_is_refused(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").rename(tmp_path / "secret.bin")
    index = {"metadata": {}, "weight_map": {"classifier.bias": "../secret.bin"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(pickle.UnpicklingError):  # by its ending it would be a pickle, of which only weights are read
        HiViLTForQuestionAnswering.from_pretrained(checkpoint)


@pytest.mark.parametrize("module", ["../trap", "trap", "os"])
def test_code_that_a_config_names_runs_for_nobody_who_did_not_ask(checkpoint, trap, module):
    for folder in (checkpoint, checkpoint.parent):
        (folder / "trap.py").write_text(f"import os\nos.mkdir({str(trap.sprung)!r})\nclass HiViLTConfig: pass\n")
    auto_map = {name: f"{module}.{where.split('.')[1]}" for name, where in AUTO_MAP.items()}
    rewrite(checkpoint / "config.json", auto_map=auto_map)
    rewrite(checkpoint / "processor_config.json", auto_map=auto_map)
    rewrite(checkpoint / "tokenizer_config.json", auto_map={"AutoTokenizer": [f"{module}.Tokenizer", None]})
    model = HiViLTForQuestionAnswering.from_pretrained(checkpoint)
    HiViLTProcessor.from_pretrained(checkpoint)
    assert type(AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)) is type(model.config)
    AutoModelForVisualQuestionAnswering.from_pretrained(checkpoint, trust_remote_code=False)
    # And it is not passed on.
    model.save_pretrained(checkpoint.parent / "saved")
    assert json.loads((checkpoint.parent / "saved/config.json").read_text())["auto_map"] == AUTO_MAP
    assert "trap" not in sys.modules
