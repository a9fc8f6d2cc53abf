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
from hivilt import HiViLTForQuestionAnswering, HiViLTForRetrieval, HiViLTProcessor
from hivilt.tasks.question_answering import QuestionAnswering, summary_of
from hivilt.tasks.retrieval import tables_of
from hivilt.training.main import main
from tiny import make_model

ROOT = Path(hivilt.__file__).resolve().parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = {name: json.loads((ROOT / name / "results.json").read_text(encoding="utf-8")) for name in (".", "vqa")}


def blocks(language: str) -> list[str]:
    """The fenced blocks of README in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> list[str]:
    """What the examples of the two models and that of ONNX print, one after another, in a process without hivilt."""
    folder = tmp_path_factory.mktemp("examples")
    (onnx,) = (block for block in blocks("python") if "torch.onnx.export" in block)
    onnx = onnx.replace('"hivilt.onnx"', repr(str(folder / "hivilt.onnx")))
    examples = [*blocks("python")[1:3], onnx]
    code = f"for example in {examples!r}: exec(example, {{'__name__': '__main__'}}); print('-' * 80)"
    said = run_elsewhere(run_code, folder, folder=ROOT, code=code)
    # Remote code calls nobody and leaves the folder that it came from as it was.
    assert said["called"] == [] and said["written"] == []
    return said["printed"].split("-" * 80 + "\n")


def test_first_example_finds_the_photographs_that_are_shown_below_it(names, capsys):
    capsys.readouterr()
    run_blocks(names, 'ImageIndex.build("docs/photographs"')
    assert capsys.readouterr().out == blocks("text")[0]
    # The photographs go by what they show.
    for words, file in (line.split(" -> ") for line in blocks("text")[0].splitlines()):
        assert Path(file).stem[:8] in words and (ROOT / "docs/photographs" / file).is_file()


def test_first_example_is_what_a_reader_sees_first():
    body = ModelCard(README).content.split("\n---\n", 1)[1]
    first = "\n".join([line for line in body.splitlines() if line.strip()][:10])
    assert "make install" in first and "docs/photographs" in first
    assert first.endswith("```") and [line for line in blocks("python")[0].splitlines() if line.strip()][-1] in first


def test_examples_of_either_model_print_what_is_shown_below_them(printed):
    assert printed[:2] == blocks("text")[1:3]
    # Zero-shot classification is right about the photograph, which goes by what it shows.
    assert blocks("text")[1].startswith("a cat ")


def test_questions_that_are_shown_are_answered_right():
    # docs/picture.png is a red triangle.
    right = [
        "what shape is it? triangle",
        "what color is the triangle? red",
        "is it red? yes",
        "is there a blue circle? no",
    ]
    assert [line.rsplit(" ", 1)[0] for line in blocks("text")[2].splitlines()] == right


def test_onnx_example_answers_as_the_model_does(printed):
    assert printed[2].splitlines()[-1] == "red"


def run_blocks(names: dict, *openings: str) -> dict:
    """Runs the blocks that begin so, one after another, with these names; gives all names that there are at the end."""
    for opening in openings:
        (block,) = (block for block in blocks("python") if opening in block)
        exec(
            block.replace('"outputs/', f'"{names["outputs"]}/').replace('"Pictures"', repr(names.get("images"))),
            names,
        )
    return names


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the blocks have from the blocks before them."""
    monkeypatch.chdir(ROOT)
    folder = ROOT / "vqa"
    model, processor = HiViLTForQuestionAnswering.from_pretrained(folder), HiViLTProcessor.from_pretrained(folder)
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
    images = [str(ROOT / "docs" / name) for name in ("picture.png", "photographs/cat.jpg")]
    asked = [{"image": images[image], "question": f"what color is the {place}?"} for place, image in enumerate(order)]
    found = run_blocks(found, "from hivilt.tasks.question_answering import QuestionAnsweringTrainer")
    dataset = found["VQADataset"](found["read_table"](asked, answers_needed=False))
    assert len(found["trainer"].predict(dataset).predictions) == len(order)
    plain = found["Trainer"](found["model"], found["args"], found["collator"])
    assert len(plain.predict(dataset).predictions) == len(order)
    found["model"].zero_grad()
    found = run_blocks(found, "cache = EncoderCache(")
    assert "pixel_values" not in found["batch"] and found["model"].classifier.weight.grad.any()


def test_a_block_of_several_questions_and_that_of_states_run(names):
    names["AutoModelForVisualQuestionAnswering"], names["AutoProcessor"] = HiViLTForQuestionAnswering, HiViLTProcessor
    (block,) = (block for block in blocks("python") if '"b.png"], text=[[' in block)
    for name in ("a.png", "b.png"):
        block = block.replace(f'"{name}"', repr(str(ROOT / "docs" / "picture.png")))
    exec(block.replace(', "trust_remote_code": True', ""), names)
    assert names["outputs"].logits.shape == (3, 13)
    (block,) = (block for block in blocks("python") if "states = model.encode_images" in block)
    exec(block, names)


def test_a_loop_of_ones_own_keeps_what_encoders_gave(names):
    found = run_blocks(names, "maps = model.get_feature_maps(")
    asked = names["processor"](images="docs/picture.png", text="what color is the triangle?", return_tensors="pt")
    kept = {"feature_maps": found["maps"], "token_states": found["states"], "attention_mask": asked["attention_mask"]}
    torch.testing.assert_close(names["model"](**kept).logits, names["model"](**asked).logits)


def test_a_folder_is_indexed_and_searched(names, tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("cat", "coffee", "boats"):
        shutil.copy(ROOT / "docs" / "photographs" / f"{name}.jpg", tmp_path / "images")
    names["images"] = str(tmp_path / "images")
    index = run_blocks(names, 'ImageIndex.build("Pictures"')["index"]
    assert sorted(hit.path.stem for hit in index.search("a cat", top_k=3, rerank_k=3)) == ["boats", "cat", "coffee"]


@pytest.mark.parametrize("folder", [".", "vqa"])
def test_weights_are_safetensors_of_at_most_64_megabytes_float32_on_loading_and_nothing_is_pickled(folder):
    assert (ROOT / folder / "model.safetensors").stat().st_size < {".": 64e6, "vqa": 15e6}[folder]
    model_class = HiViLTForRetrieval if folder == "." else HiViLTForQuestionAnswering
    model = model_class.from_pretrained(ROOT / folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == RESULTS[folder]["parameters"]["all"]
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.float32}
    assert not [path for path in (ROOT / folder).iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]


def test_weights_answer_the_test_questions_as_often_as_is_said(tmp_path):
    flags = ["--model_name_or_path", str(ROOT / "vqa"), "--do_predict", "--output_dir", str(tmp_path)]
    found, said = main(QuestionAnswering, flags)["test"], RESULTS["vqa"]["test"]
    assert found["num_questions"] == said["num_questions"]
    # Another processor may round otherwise, and turn an answer that hung in the balance.
    assert found["accuracy"] == pytest.approx(said["accuracy"], abs=3e-4)


def test_numbers_are_those_of_the_committed_results():
    vqa, retrieval = RESULTS["vqa"], RESULTS["."]
    assert summary_of(vqa, "test", "accuracy").splitlines()[0] in README
    assert f"{vqa['parameters']['all']:,} parameters" in README
    assert tables_of(retrieval)["test"] in README
    assert f"{retrieval['parameters']['all']:,} parameters" in README
    for found in RESULTS.values():
        assert f"{found['wall_seconds'] / 60:.1f} minutes" in README
        assert f"{found['peak_memory_bytes'] / 2**30:.1f} GiB" in README
    assert len(results := ModelCard(README).data.eval_results) == 6
    for result in results:
        assert result.metric_value == round(retrieval["test"][result.metric_type.replace("_at_", "@")], 6)
    (seeds,) = (ROOT / "benchmarks/results").glob("retrieval_seeds-*.json")
    emoji = json.loads(seeds.read_text(encoding="utf-8"))["runs"][0]
    ways = [f"{way}_recall@1" for way in ("image_to_text", "text_to_image")]
    alone, fused = ([100 * emoji["test"][f"{stage}{way}"] for way in ways] for stage in ("embedding_", ""))
    said = " ".join(README.split())
    assert f"{alone[0]:.1f} % (image to text) and {alone[1]:.1f} % (text to image) first" in said
    assert f"{fused[0]:.1f} and {fused[1]:.1f} % re-ranked" in said
    assert f"twelve epochs in {emoji['wall_seconds'] / 60:.1f} minutes" in said


def test_what_the_root_model_knows_is_what_its_results_say():
    results, said = RESULTS["."], " ".join(README.split())
    data, test = results["data"], results["test"]
    assert (
        f"trained on {data['name']}, {data['train']['images']:,} images with {data['train']['captions']:,} captions"
        in said
    )
    shares = [100 * test[f"{stage}text_to_image_recall@{k}"] for stage, k in (("embedding_", 1), ("", 1), ("", 10))]
    assert f"Of {data['test']['images']:,} test images it found a caption's own first in {shares[0]:.1f} %" in said
    assert f"{shares[1]:.1f} % re-ranked, and among the first ten in {shares[2]:.1f} %" in said
    found = results["calibration"]
    assert (
        f"divided by one temperature, {found['temperature']:.4g}, fitted on {found['num']:,} validation captions"
        in said
    )
    assert "trained on images for non-commercial research" in said


def test_settings_are_the_defaults_of_the_scripts():
    settings = RESULTS["vqa"]["settings"]
    assert settings["seed"] == 42 and settings["max_train_samples"] is None
    for name in ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "weight_decay"):
        assert settings[name] == QuestionAnswering.defaults[name]


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
