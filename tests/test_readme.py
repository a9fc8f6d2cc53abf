"""What README promises of this folder as it is cloned: the first example, the weights, their measured numbers."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from transformers import TrainingArguments

import hivilt
from elsewhere import run_code, run_elsewhere
from hivilt import HiViLTForQuestionAnswering, HiViLTForRetrieval, HiViLTProcessor, run_retrieval, run_vqa
from tiny import make_model

ROOT = Path(hivilt.__file__).resolve().parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = {name: json.loads((ROOT / name / "results.json").read_text(encoding="utf-8")) for name in (".", "retrieval")}
AUTO_CLASSES = """
import torch
from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor

model = AutoModelForVisualQuestionAnswering.from_pretrained(".", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(".", trust_remote_code=True)
inputs = processor(images="docs/picture.png", text="what shape is in the image?", return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
print(processor.post_process_question_answering(logits)[0][0]["answer"])
"""


def blocks(language: str) -> list[str]:
    """The fenced blocks of README in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> list[str]:
    """What the first example, that of searching and that of ONNX print, one after another in a process of their own."""
    folder = tmp_path_factory.mktemp("examples")
    (search,) = (block for block in blocks("python") if 'subfolder="retrieval"' in block)
    (onnx,) = (block for block in blocks("python") if "torch.onnx.export" in block)
    onnx = onnx.replace('"hivilt.onnx"', repr(str(folder / "hivilt.onnx")))
    examples = [blocks("python")[0] + AUTO_CLASSES, search, onnx]
    code = f"for example in {examples!r}: exec(example, {{'__name__': '__main__'}}); print('-' * 80)"
    said = run_elsewhere(run_code, folder, folder=ROOT, code=code)
    # Remote code calls nobody and leaves the folder that it came from as it was.
    assert said["called"] == [] and said["written"] == []
    return said["printed"].split("-" * 80 + "\n")


def test_first_example_prints_what_is_shown_below_it(printed):
    assert printed[0] == blocks("text")[0] + "triangle\n"


def test_first_example_is_what_a_reader_sees_first():
    body = ModelCard(README).content.split("\n---\n", 1)[1]
    lines = [line for line in body.splitlines() if line.strip()]
    shown = (blocks("python")[0] + blocks("text")[0]).splitlines()
    assert len([line for line in shown if line.strip()]) <= 10
    assert "docs/picture.png" in lines[1] and lines[3] == "```python"


def test_search_example_prints_what_is_shown_below_it(printed):
    assert printed[1] == blocks("text")[1]


def test_onnx_example_answers_as_the_model_does(printed):
    assert printed[2].splitlines()[-1] == "red"


def run_blocks(names: dict, *openings: str) -> dict:
    """Runs the blocks that begin so, one after another, with these names; gives all names that there are at the end."""
    for opening in openings:
        (block,) = (block for block in blocks("python") if opening in block)
        exec(
            block.replace('"outputs/', f'"{names["outputs"]}/').replace('"Pictures"', repr(names.get("pictures"))),
            names,
        )
    return names


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the blocks have from the blocks before them."""
    monkeypatch.chdir(ROOT)
    model, processor = HiViLTForQuestionAnswering.from_pretrained(ROOT), HiViLTProcessor.from_pretrained(ROOT)
    return {"model": model, "processor": processor, "torch": torch, "outputs": str(tmp_path), "__name__": "readme"}


@pytest.fixture
def quiet(monkeypatch):
    """What a person's machine may have, and a test may not: an accelerator, services to report to."""
    monkeypatch.setattr(
        transformers, "TrainingArguments", partial(TrainingArguments, use_cpu=True, report_to="none", disable_tqdm=True)
    )


def test_ones_own_trainer_predicts_one_row_a_question(names, quiet):
    untrained = names["model"].classifier.weight.detach().clone()
    found = run_blocks(names, "from transformers import Trainer, TrainingArguments")
    predictions = found["trainer"].predict(found["rows"].with_transform(found["encode"])).predictions
    assert predictions.shape == (2, 13) and not torch.equal(found["model"].classifier.weight, untrained)
    # Several questions an image, of images with more and fewer of them, in any order: with the next block's collator, by
    # a plain Trainer, and by the trainer that the block shows.
    order = [0, 1, 1, 0, 1, 0, 0]
    images = [str(ROOT / "docs" / name) for name in ("picture.png", "red_heart.png")]
    asked = [{"image": images[image], "question": f"what color is the {place}?"} for place, image in enumerate(order)]
    found = run_blocks(found, "from hivilt.trainers import QuestionAnsweringTrainer")
    dataset = found["VQADataset"](found["read_table"](asked, answers_needed=False))
    assert len(found["trainer"].predict(dataset).predictions) == len(order)
    plain = found["Trainer"](found["model"], found["args"], found["collator"])
    assert len(plain.predict(dataset).predictions) == len(order)
    found["model"].zero_grad()
    found = run_blocks(found, "cache = EncoderCache(")
    assert "pixel_values" not in found["batch"] and found["model"].classifier.weight.grad.any()


def test_a_block_of_several_questions_and_that_of_states_run(names):
    names["AutoModelForVisualQuestionAnswering"], names["AutoProcessor"] = HiViLTForQuestionAnswering, HiViLTProcessor
    (block,) = (block for block in blocks("python") if 'folder = "."' in block)
    for name in ("a.png", "b.png"):
        block = block.replace(f'"{name}"', repr(str(ROOT / "docs" / "picture.png")))
    exec(block.replace(", trust_remote_code=True", ""), names)
    assert names["outputs"].logits.shape == (3, 13)
    (block,) = (block for block in blocks("python") if "states = model.encode_images" in block)
    exec(block, names)


def test_a_loop_of_ones_own_keeps_what_encoders_gave(names):
    found = run_blocks(names, "maps = model.get_feature_maps(")
    asked = names["processor"](images="docs/picture.png", text="what color is the triangle?", return_tensors="pt")
    kept = {"feature_maps": found["maps"], "token_states": found["states"], "attention_mask": asked["attention_mask"]}
    torch.testing.assert_close(names["model"](**kept).logits, names["model"](**asked).logits)


def test_a_folder_is_indexed_and_searched(names, tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("picture.png", "red_heart.png"):
        shutil.copy(ROOT / "docs" / name, tmp_path / "pictures")
    names["pictures"] = str(tmp_path / "pictures")
    index = run_blocks(names, "ImageIndex.build(")["index"]
    assert index.search("red heart", top_k=1)[0].path.name == "red_heart.png"


@pytest.mark.parametrize("folder", [".", "retrieval"])
def test_weights_are_safetensors_of_a_few_megabytes_and_nothing_is_pickled(folder):
    assert (ROOT / folder / "model.safetensors").stat().st_size < 15e6
    model_class = HiViLTForQuestionAnswering if folder == "." else HiViLTForRetrieval
    parameters = model_class.from_pretrained(ROOT / folder).parameters()
    assert sum(parameter.numel() for parameter in parameters) == RESULTS[folder]["parameters"]["all"]
    assert not [path for path in (ROOT / folder).iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]


def test_weights_answer_the_test_questions_as_often_as_is_said(tmp_path):
    flags = ["--model_name_or_path", str(ROOT), "--do_predict", "--output_dir", str(tmp_path)]
    found, said = run_vqa.main(flags)["test"], RESULTS["."]["test"]
    assert found["num_questions"] == said["num_questions"]
    # Another processor may round otherwise, and turn an answer that hung in the balance.
    assert found["accuracy"] == pytest.approx(said["accuracy"], abs=3e-4)


def test_numbers_are_those_of_the_committed_results():
    vqa, retrieval = RESULTS["."], RESULTS["retrieval"]
    assert run_vqa.summary_of(vqa, "test", "accuracy").splitlines()[0] in README
    assert f"{vqa['parameters']['all']:,} parameters" in README
    assert run_retrieval.tables_of(retrieval)["test"] in README
    assert f"{retrieval['parameters']['all']:,} parameters" in README
    for found in RESULTS.values():
        assert f"{found['wall_seconds'] / 60:.1f} minutes" in README
        assert f"{found['peak_memory_bytes'] / 2**30:.1f} GiB" in README
    (result,) = ModelCard(README).data.eval_results
    assert result.metric_value == round(vqa["test"]["accuracy"], 6)


def test_settings_are_the_defaults_of_the_scripts():
    for folder, script in ((".", run_vqa), ("retrieval", run_retrieval)):
        settings = RESULTS[folder]["settings"]
        assert settings["seed"] == 42 and settings["max_train_samples"] is None
        for name in ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "weight_decay"):
            assert settings[name] == script.DEFAULTS[name]


@pytest.mark.parametrize(
    "encoders",
    [("vit", "bert"), ("clip", "t5"), ("swin", "clip"), ("siglip", "roberta"), ("vit", "distilbert")],
    ids="-".join,
)
def test_expressions_for_lora_pick_the_linear_layers_of_their_part(encoders):
    model = make_model(HiViLTForQuestionAnswering, vision=encoders[0], text=encoders[1])
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    expressions = re.findall(r'r"(model\\[^"]+)"', README)
    parts = ["model.fusion.", "model.vision_model.", "model.text_model."]
    assert len(expressions) == len(parts)
    for part, expression in zip(parts, expressions, strict=True):
        picked = {name for name, _ in model.named_modules() if re.fullmatch(expression, name)}
        assert picked and picked <= {name for name in linear if name.startswith(part)}
