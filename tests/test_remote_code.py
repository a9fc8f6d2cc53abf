"""
Checkpoints that carry their code: opened in processes that have no hivilt, saved there again, trained there, opened
again. What runs in those processes is in elsewhere.py; here is what must have come of it.
"""

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, BertModel, ViTModel

import hivilt
from elsewhere import (
    classes_to_open,
    collate_in_a_spawned_worker,
    first_process,
    open_from_folder_and_hub,
    outputs,
    second_process,
    tensors,
)
from fresh import finish_elsewhere, run_elsewhere, start_elsewhere
from hivilt import HiViLTForQuestionAnswering, HiViLTForRetrieval
from hivilt.configuration_hivilt import AUTO_MAP
from tiny import (
    AUTO_CLASSES,
    CODE,
    HEAD_FACTS,
    MODEL_CLASSES,
    VISION_CONFIGS,
    make_batch,
    make_config,
    make_model,
    make_processor,
)

ROOT = Path(hivilt.__file__).resolve().parent
PROCESSOR_FILES = ["processor_config.json", "tokenizer.json", "tokenizer_config.json"]
NAMES = [model_class.__name__ for model_class in MODEL_CLASSES]
CARD = "---\nlicense: apache-2.0\ntags: [mine]\n---\nWritten by hand.\n"


def make_sentinel_model(model_class: type):
    """No weight as it was initialised, so that none can be initialised again unseen."""
    model = make_model(model_class, **HEAD_FACTS[model_class].encoders)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert set(found) == set(expected)
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def assert_same_outputs(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    return {model_class.__name__: make_sentinel_model(model_class) for model_class in MODEL_CLASSES}


@pytest.fixture(scope="module")
def borrowing(tmp_path_factory) -> HiViLTForQuestionAnswering:
    """A model whose encoders came from two checkpoints that are gone."""
    folder = tmp_path_factory.mktemp("borrowed")
    config = make_config()
    ViTModel(config.vision_config).save_pretrained(folder / "vision")
    BertModel(config.text_config).save_pretrained(folder / "text")
    model = HiViLTForQuestionAnswering.from_vision_text_pretrained(
        folder / "vision", folder / "text", hidden_size=20, num_attention_heads=4, num_fusion_stages=2, num_labels=5
    )
    shutil.rmtree(folder)
    return model


@pytest.fixture(scope="module")
def work(tmp_path_factory, models, borrowing) -> Path:
    """The folder of it all: checkpoints of each class, and the places where other processes leave theirs."""
    work = tmp_path_factory.mktemp("remote")
    for name in ("checkpoints", "place", "results", "results2", "again", "again2", "trained"):
        (work / name).mkdir()
    save_file(make_batch(), work / "checkpoints" / "batch.safetensors")
    for name, model in {**models, "borrowing": borrowing}.items():
        model.save_pretrained(work / "checkpoints" / name)
        make_processor().save_pretrained(work / "checkpoints" / name)
    # The repository itself with a checkpoint in it, which is what a clone from the Hub is.
    shutil.copytree(work / "checkpoints" / "HiViLTForQuestionAnswering", work / "place", dirs_exist_ok=True)
    for file in CODE:
        shutil.copyfile(ROOT / file, work / "place" / file)
    (work / "trained" / "README.md").write_text(CARD, encoding="utf-8")
    return work


@pytest.fixture(scope="module")
def first(work) -> dict:
    return run_elsewhere(
        first_process,
        work / "first",
        checkpoints=work / "checkpoints",
        place=work / "place",
        results=work / "results",
        again=work / "again",
        trained=work / "trained",
    )


@pytest.fixture(scope="module")
def second(work, first) -> dict:
    return run_elsewhere(
        second_process,
        work / "second",
        checkpoints=work / "again",
        trained=work / "trained",
        results=work / "results2",
        again=work / "again2",
    )


@pytest.fixture(params=["first process", "second process"])
def loaded(request, work) -> tuple[dict, Path, Path]:
    """What a process found in the checkpoints, where it left tensors and what it saved: the second had the first's."""
    if request.param == "first process":
        return request.getfixturevalue("first")["loaded"], work / "results", work / "again"
    return request.getfixturevalue("second")["loaded"], work / "results2", work / "again2"


# In processes without hivilt


def test_processes_have_no_hivilt(first, second):
    assert first["hivilt"] == second["hivilt"] == "ModuleNotFoundError"


@pytest.mark.checklist("1")
@pytest.mark.parametrize("saved_by", [*NAMES, "borrowing"])
def test_every_auto_class_opens_every_checkpoint(first, second, saved_by):
    """As its own class, the base model's and another; the second process as its own alone."""
    own = "HiViLTForQuestionAnswering" if saved_by == "borrowing" else saved_by
    several = classes_to_open(own, AUTO_CLASSES)
    for facts, names in ((first["loaded"][saved_by], several), (second["loaded"][saved_by], [own])):
        assert facts["AutoConfig"] == "HiViLTConfig" and facts["AutoProcessor"] == "HiViLTProcessor"
        for name in names:
            assert facts[AUTO_CLASSES[name].__name__]["class"] == name
            assert facts[AUTO_CLASSES[name].__name__]["mismatched_keys"] == []
        assert all(module.startswith("transformers_modules.") for module in facts["modules"])


def without_prefix(keys: list[str]) -> list[str]:
    """Names inside the base model: `model.fusion.x` in a head is `fusion.x` in the base model."""
    return [key.removeprefix("model.") for key in keys]


@pytest.mark.checklist("2")
@pytest.mark.parametrize(
    ("saved_by", "opened_as"),
    [(saved, opened) for saved in NAMES for opened in classes_to_open(saved, NAMES)],
)
def test_classes_exchange_all_that_they_share(first, saved_by, opened_as):
    by_name = {model_class.__name__: facts for model_class, facts in HEAD_FACTS.items()}
    there, here = by_name[saved_by], by_name[opened_as]
    loading = first["loaded"][saved_by][here.auto_class.__name__]
    missing, unexpected = without_prefix(loading["missing_keys"]), without_prefix(loading["unexpected_keys"])
    if saved_by == opened_as:
        assert missing == unexpected == []
    # Retrieval compares two sides, a decoder attends to both, and neither has an MLP that joins them; all else but the heads
    # is common.
    joins = ("fusion.global_fusion.mlp.",)
    assert all(key.startswith(here.parameters + joins) for key in missing)
    assert all(key.startswith(there.parameters + joins) for key in unexpected)
    assert any(key.startswith(joins) for key in missing) == (here.reads_fusion and not there.reads_fusion)


@pytest.mark.checklist("1")
@pytest.mark.parametrize("name", [*NAMES, "borrowing"])
def test_outputs_are_those_of_the_process_that_saved(loaded, name, models, borrowing):
    model = {**models, "borrowing": borrowing}[name]
    found = load_file(loaded[1] / f"{name}.outputs.safetensors")
    assert_same_outputs(found, outputs(model, make_batch()))


@pytest.mark.checklist("3")
@pytest.mark.parametrize("name", [*NAMES, "borrowing"])
def test_weights_and_buffers_are_those_of_the_process_that_saved(loaded, name, models, borrowing):
    model = {**models, "borrowing": borrowing}[name]
    assert_same_tensors(load_file(loaded[1] / f"{name}.tensors.safetensors"), tensors(model))


@pytest.mark.checklist("3")
def test_half_precision_rounds_all_but_the_temperatures(first, work, models):
    expected = {
        name: tensor if not tensor.is_floating_point() or "logit_scale" in name else tensor.bfloat16()
        for name, tensor in tensors(models["HiViLTForRetrieval"]).items()
    }
    found = load_file(work / "results" / "bfloat16.safetensors")
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    assert_same_tensors(found, expected)


@pytest.mark.checklist("3")
def test_device_map_places_the_same_weights(first, work, models):
    model = models["HiViLTForRetrieval"]
    assert_same_tensors(load_file(work / "results" / "device_map.safetensors"), tensors(model))
    assert first["offloaded"]
    assert_same_outputs(load_file(work / "results" / "offloaded.safetensors"), outputs(model, make_batch()))


@pytest.mark.checklist("4")
@pytest.mark.parametrize("name", NAMES)
def test_remote_class_builds_on_meta(first, name):
    assert first["loaded"][name]["on meta"]


@pytest.mark.checklist("2")
@pytest.mark.parametrize("name", NAMES)
def test_every_save_brings_all_code(loaded, work, name):
    for folder in (work / "checkpoints" / name, loaded[2] / name):
        for file in CODE:
            assert (folder / file).read_bytes() == (ROOT / file).read_bytes()
        assert all((folder / file).is_file() for file in PROCESSOR_FILES)
        assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"] == AUTO_MAP
        processor = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
        assert processor["auto_map"] == {"AutoProcessor": AUTO_MAP["AutoProcessor"]}


@pytest.mark.checklist("2")
@pytest.mark.parametrize("name", NAMES)
def test_saving_what_was_opened_writes_the_same_files(second, work, name):
    for file in ("model.safetensors", "processor_config.json", "tokenizer.json"):
        assert (work / "again" / name / file).read_bytes() == (work / "checkpoints" / name / file).read_bytes()
    # Loading notes the encoders' precision and that the tokenizer is local; then nothing changes any more.
    for file in ("config.json", "model.safetensors", *PROCESSOR_FILES):
        assert (work / "again2" / name / file).read_bytes() == (work / "again" / name / file).read_bytes()


@pytest.mark.checklist("2")
def test_saves_into_the_folder_that_it_was_opened_from(first, work, models):
    found = load_file(work / "results" / "place.safetensors")
    assert_same_outputs(found, outputs(models["HiViLTForQuestionAnswering"], make_batch()))
    for file in CODE:
        assert (work / "place" / file).read_bytes() == (ROOT / file).read_bytes()


@pytest.mark.slow
def test_processor_travels_to_a_spawned_worker(work):
    found = run_elsewhere(collate_in_a_spawned_worker, work / "spawning", place=work / "place")
    assert found["spawned"] == found["not spawned"]


# Training there


@pytest.mark.checklist("6")
def test_training_resumes_exactly(first, work):
    assert first["losses, resumed"][-2:] == first["losses"][-2:] and len(first["losses"]) == 4
    assert_same_tensors(
        load_file(work / "trained" / "resumed" / "model.safetensors"),
        load_file(work / "trained" / "model.safetensors"),
    )


@pytest.mark.checklist("6")
def test_training_leaves_a_card_that_is_there(first, work):
    assert (work / "trained" / "README.md").read_text(encoding="utf-8") == CARD


@pytest.mark.checklist("6")
@pytest.mark.parametrize("folder", ["trained", "checkpoint-2", "resumed"])
def test_what_was_trained_opens_as_model_and_pipeline(second, folder):
    assert second[f"AutoModel {folder}"] == "HiViLTModel"
    answers = second[f"pipeline {folder}"]
    assert len(answers) == 2 and answers[0]["score"] >= answers[1]["score"]
    assert all(answer["answer"].startswith("answer ") for answer in answers)
    if folder == "resumed":
        assert answers == second["pipeline trained"]


# From the Hub's cache, and two at once


REPOSITORY = "someone/some-where"


@pytest.fixture(scope="module")
def both(work, first) -> list[dict]:
    """Two processes that open the same things at the same time, with one module cache, empty at first."""
    home = work / "both"
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = home / "hf" / "hub" / "models--someone--some-where"
    shutil.copytree(work / "checkpoints" / "HiViLTForQuestionAnswering", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    checkpoint = work / "checkpoints" / "HiViLTForQuestionAnswering"
    processes = [
        start_elsewhere(
            open_from_folder_and_hub,
            home,
            checkpoint=checkpoint,
            repository=REPOSITORY,
            results=work / "results" / f"from the Hub {number}",
        )
        for number in (1, 2)
    ]
    return [finish_elsewhere(process) for process in processes]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoint", REPOSITORY])
def test_two_processes_open_with_one_empty_cache(both, work, models, name):
    expected = outputs(models["HiViLTForQuestionAnswering"], make_batch())
    if name == "checkpoint":
        name = str(work / "checkpoints" / "HiViLTForQuestionAnswering")
    for facts in both:
        assert facts[name] == ["HiViLTForQuestionAnswering", "HiViLTProcessor"]
        assert_same_outputs({"logits": torch.tensor(facts[f"logits {name}"])}, expected)


@pytest.mark.slow
@pytest.mark.checklist("2")
def test_what_came_from_the_hub_is_saved_complete(both, work):
    for number in (1, 2):
        folder = work / "results" / f"from the Hub {number}"
        assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"] == AUTO_MAP
        assert all((folder / file).read_bytes() == (ROOT / file).read_bytes() for file in CODE)


# With the package imported


@pytest.mark.checklist("2")
@pytest.mark.parametrize(
    ("saved_by", "opened_as"),
    # Of pairs of two heads transformers makes no more than of each with the base model.
    [
        (saved_by, opened_as)
        for saved_by in NAMES
        for opened_as in MODEL_CLASSES
        if saved_by == opened_as.__name__ or opened_as is MODEL_CLASSES[0] or saved_by == NAMES[0]
    ],
)
def test_imported_classes_open_every_checkpoint(work, models, saved_by, opened_as):
    folder = work / "checkpoints" / saved_by
    model = AUTO_CLASSES[opened_as.__name__].from_pretrained(folder)
    assert type(model) is opened_as
    if saved_by == opened_as.__name__:
        assert_same_tensors(tensors(model), tensors(models[saved_by]))
    found, expected = tensors(model.base_model), tensors(models[saved_by].base_model)
    shared = found.keys() & expected.keys()
    assert all(name.startswith("fusion.global_fusion.mlp.") for name in found.keys() ^ expected.keys())
    assert not [name for name in shared if not torch.equal(found[name], expected[name])]
    assert type(AutoProcessor.from_pretrained(folder)) is hivilt.HiViLTProcessor


@pytest.mark.checklist("2")
def test_saves_into_the_folder_that_imported_code_runs_from(tmp_path, monkeypatch):
    # A copy under another name: the repository itself is not to be written to.
    package = tmp_path / "hivilt_copied"
    package.mkdir()
    for file in CODE:
        shutil.copyfile(ROOT / file, package / file)
    monkeypatch.syspath_prepend(tmp_path)
    modeling = importlib.import_module("hivilt_copied.modeling_hivilt")
    processing = importlib.import_module("hivilt_copied.processing_hivilt")
    monkeypatch.chdir(package)

    model = modeling.HiViLTForQuestionAnswering(make_config()).eval()
    parts = make_processor()
    for folder in (".", package, package / "outputs"):
        model.save_pretrained(folder)
        processing.HiViLTProcessor(parts.image_processor, parts.tokenizer).save_pretrained(folder)
    for folder in (package, package / "outputs"):
        for file in CODE:
            assert (folder / file).read_bytes() == (ROOT / file).read_bytes()
        assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"] == AUTO_MAP
        assert all((folder / file).is_file() for file in PROCESSOR_FILES)
    assert type(model)._auto_class == "AutoModelForVisualQuestionAnswering"
    assert_same_tensors(tensors(HiViLTForQuestionAnswering.from_pretrained(package)), tensors(model))
    for name in [name for name in sys.modules if name.startswith("hivilt_copied")]:
        monkeypatch.delitem(sys.modules, name)


def test_saves_a_class_of_a_notebook(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    in_notebook = type("MyHiViLT", (HiViLTForQuestionAnswering,), {"__module__": "__main__"})
    model = make_model(in_notebook)
    model.save_pretrained(tmp_path)
    assert_same_tensors(tensors(HiViLTForQuestionAnswering.from_pretrained(tmp_path)), tensors(model))


@pytest.mark.checklist("6")
@pytest.mark.parametrize("vision", VISION_CONFIGS)
def test_takes_weights_under_the_names_that_they_have_in_a_file(vision, tmp_path):
    # Trainer gives them so when it resumes or returns to the best checkpoint; some encoders have other names in memory.
    model = make_model(HiViLTForRetrieval, vision=vision, seed=0)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    other = make_model(HiViLTForRetrieval, vision=vision, seed=1)
    other.load_state_dict(weights)
    assert_same_tensors(tensors(other), tensors(model))

    weights["stray"] = weights.pop("logit_scale")
    result = other.load_state_dict(weights, strict=False)
    assert result.missing_keys == ["logit_scale"] and result.unexpected_keys == ["stray"]
    with pytest.raises(RuntimeError, match="stray"):
        other.load_state_dict(weights)
