"""The model card that each script leaves, and this repository's own: what the Hub asks of one, and that it is true."""

import ast
import copy
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import datasets
import pytest
import transformers.trainer
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, ViTImageProcessorPil, ViTModel

from caption_miniatures import make_caption_miniature
from hivilt.data.caption_benchmarks import CAPTION_BENCHMARKS
from hivilt.data.grounding_benchmarks import GROUNDING_BENCHMARKS
from hivilt.data.reasoning_benchmarks import REASONING_BENCHMARKS
from hivilt.data.tables import TableImage
from hivilt.data.vqa_benchmarks import VQA_BENCHMARKS
from hivilt.tasks.question_answering import QuestionAnswering
from hivilt.tasks.retrieval import Retrieval, tables_of
from hivilt.tasks.task import Task
from hivilt.training.arguments import TaskArguments
from hivilt.training.cards import CREDITS, write_model_card
from hivilt.training.main import main
from miniatures import TWO_STEPS, make_vqa_miniature
from tiny import VISION_CONFIGS, make_image

ROOT = Path(__file__).resolve().parents[2]
PIPELINE_TAGS = {"visual-question-answering", "zero-shot-image-classification", "image-text-to-text"}


def check_card(path: Path, has_braces: bool = False) -> ModelCard:
    """Fails if the Hub, a program or a reader would stumble over this README.md.

    Args:
        path: of the file.
        has_braces: braces are words of the data, not of a template.
    """
    card, data = ModelCard.load(path), metadata_load(path)
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] in PIPELINE_TAGS
    assert re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", data["license"])
    languages = data["language"] if isinstance(data["language"], list) else [data["language"]]
    assert languages and all(re.fullmatch(r"[a-z]{2,3}|code|multilingual", language) for language in languages)
    assert data["tags"] == list(dict.fromkeys(data["tags"])) and "custom_code" in data["tags"]
    for name in (*data.get("datasets", ()), *data.get("base_model", ())):
        validate_repo_id(name)
        assert not Path(name).exists()
    assert ("base_model_relation" in data) == ("base_model" in data)

    if "model-index" in data:
        name, found = model_index_to_eval_results(data["model-index"])
        assert name.strip()
        assert eval_results_to_model_index(name, found) == data["model-index"]
        for one in found:
            assert re.fullmatch(r"[a-z0-9_.-]+", one.dataset_type) or one.dataset_type in data["datasets"]
            assert one.dataset_name.strip()
            assert re.fullmatch(r"[a-z][a-z0-9_]*", one.metric_type)
            assert math.isfinite(one.metric_value)
            assert one.verified is None and one.verify_token is None
        measured = [(one.dataset_type, one.dataset_split, one.metric_type) for one in found]
        assert len(set(measured)) == len(measured) > 0

    assert has_braces or not re.search(r"\{\{|\}\}|\{%|%\}", card.content)
    for code in snippets(card):
        ast.parse(code)
    # A heading is followed by its text, or by a heading below it.
    prose = re.sub(r"^```.*?^```$", "code", card.text, flags=re.DOTALL | re.MULTILINE)
    parts = re.split(r"^(#+) .*$", prose, flags=re.MULTILINE)
    levels, bodies = [len(signs) for signs in parts[1::2]], parts[2::2]
    for level, below, body in zip(levels, [*levels[1:], 0], bodies, strict=True):
        assert body.strip() or below > level
    for table in re.findall(r"(?:^\|.*\n?)+", prose, re.MULTILINE):
        head, line, *rows = [re.split(r"(?<!\\)\|", row.strip())[1:-1] for row in table.splitlines()]
        assert rows and all(re.fullmatch(r" ?:?-+:? ?", cell) for cell in line)
        assert {len(row) for row in (line, *rows)} == {len(head)}
        assert "None" not in {cell.strip() for row in rows for cell in row}
    return card


def snippets(card: ModelCard) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card.text, re.DOTALL | re.MULTILINE)


class Run(NamedTuple):
    """A run of a task that left a card in `folder`, and what the card was written from."""

    folder: Path
    task: Task
    argv: list[str]
    trainer: Trainer
    results: dict[str, Any]
    splits: dict[str, list]

    @property
    def args(self) -> TaskArguments:
        return self.task.args

    def card(self, folder: Path, has_braces: bool = False, **changes: Any) -> ModelCard:
        """The card that it leaves in another folder, had some of this been otherwise."""
        task = copy.copy(self.task)
        task.args = changes.pop("args", task.args)
        given = self._replace(task=task, **changes)
        said = task.card(given.trainer, given.results, given.splits)
        with mock.patch.object(given.trainer.args, "output_dir", str(folder)):
            write_model_card(given.trainer, task.args, given.results, given.splits, task=task, argv=given.argv, **said)
        return check_card(folder / "README.md", has_braces)


def make_run(task_class: type[Task], folder: Path, *flags: str) -> Run:
    argv, runs = ["--output_dir", str(folder), *TWO_STEPS, *flags], []

    class Recorded(task_class):
        def card(self, *given):
            said = super().card(*given)
            runs.append(Run(folder, self, argv, *given))
            return said

    main(Recorded, argv)
    return runs[0]


@pytest.fixture(scope="module")
def vqa(tmp_path_factory) -> Run:
    """GQA, on a vision encoder out of a folder."""
    place = tmp_path_factory.mktemp("place")
    make_vqa_miniature("gqa", place / "data")
    ViTModel(VISION_CONFIGS["vit"]()).save_pretrained(place / "encoder")
    ViTImageProcessorPil(size={"height": 20, "width": 20}).save_pretrained(place / "encoder")
    flags = ("--benchmark", "gqa", f"--data_dir={place / 'data'}", "--vision_model", str(place / "encoder"))
    return make_run(QuestionAnswering, place / "answers", *flags)


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory) -> Run:
    """OpenMoji, everything new."""
    place = tmp_path_factory.mktemp("place")
    make_caption_miniature("openmoji", place / "data")
    flags = ("--data_dir", str(place / "data"), "--license", "cc-by-sa-4.0", "--language", "en", "de")
    return make_run(Retrieval, place / "images", "--benchmark", "openmoji", *flags, "--rerank_k", "3")


@pytest.fixture(params=["vqa", "retrieval"])
def run(request) -> Run:
    return request.getfixturevalue(request.param)


# What the scripts leave


def test_front_matter_of_question_answering(vqa):
    card = check_card(vqa.folder / "README.md")
    assert card.data.pipeline_tag == "visual-question-answering"
    assert (card.data.license, card.data.language) == ("apache-2.0", ["en"])
    # Folders of this machine are no names on the Hub.
    assert card.data.datasets is card.data.base_model is None
    found = {one.metric_type: one.metric_value for one in card.data.eval_results}
    names = ["accuracy", "top3_accuracy", "open_accuracy", "binary_accuracy"]
    assert found == {name: round(vqa.results["test"][name], 6) for name in names}
    assert {(one.dataset_type, one.dataset_name, one.dataset_split) for one in card.data.eval_results} == {
        ("gqa", "GQA", "testdev")
    }
    assert card.data.metrics == ["accuracy"]


def test_front_matter_of_retrieval(retrieval):
    card = check_card(retrieval.folder / "README.md")
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert (card.data.license, card.data.language) == ("cc-by-sa-4.0", ["en", "de"])
    assert {one.metric_name: one.metric_value for one in card.data.eval_results} == {
        f"{words} R@{k}": round(retrieval.results["test"][f"{words.replace(' ', '_')}_recall@{k}"], 6)
        for words in ("image to text", "text to image")
        for k in (1, 5, 10)
    }
    assert card.data.eval_results[-1].metric_type == "text_to_image_recall_at_10"
    assert "image-text-retrieval" in card.data.tags


def test_what_the_reader_sees_was_measured(vqa, retrieval):
    card, test = check_card(vqa.folder / "README.md").text, vqa.results["test"]
    validation = vqa.results["validation"]
    assert f"| loss | {validation['loss']:.4g} | {test['loss']:.4g} |" in card
    train = vqa.results["data"]["train"]
    assert f"trained on {train['questions'] - train['dropped_questions']} questions about 4 images of GQA" in card
    assert f"{vqa.results['parameters']['all']:,} parameters" in card and "one of 1,842\nanswers" in card
    evaluated = [entry for entry in vqa.trainer.state.log_history if "eval_accuracy" in entry]
    for one in evaluated[:2]:
        assert f"| {one['epoch']:.2f} | {one['step']} | {one['eval_loss']:.4g} | {one['eval_accuracy']:.4g} |" in card
    assert "(predictions.png)" in card and (vqa.folder / "predictions.png").exists()
    assert "| learning_rate | 0.0015 |" in card and "| vision_model | encoder |" in card
    # Of the small encoder, which this run had none of.
    assert "image_size |" not in card and "image_size" not in vqa.results["settings"]
    assert f"| torch | {vqa.results['environment']['torch']} |" in card
    assert CREDITS["gqa"] in card

    card = check_card(retrieval.folder / "README.md").text
    assert all(table in card for table in tables_of(retrieval.results).values())
    assert "the best 3 of each query re-ranked" in card and "(retrieval.png)" in card
    assert "| image_size | 32 |" in card and retrieval.results["settings"]["image_size"] == 32
    assert "OpenMoji's (https://openmoji.org), CC BY-SA 4.0" in card


def test_nothing_of_this_machine_is_told(run):
    content = (run.folder / "README.md").read_text(encoding="utf-8")
    for place in (run.folder.parent, ROOT, Path.home(), Path(sys.prefix)):
        assert str(place) not in content
    assert not re.search(r"\bNone\b|\| (null|False|\[\]|\{\}|-1)? \|", content)
    assert f'"{run.folder.name}", trust_remote_code=True' in content


def test_the_command_can_be_typed_again(vqa, retrieval, tmp_path):
    command = re.search(r"```bash\n(.*?)```", check_card(vqa.folder / "README.md").text, re.DOTALL)[1]
    parts = [part for line in command.replace("\\\n", " ").splitlines() for part in run_of_shell(line)]
    expected = [
        "--output_dir",
        "answers",
        *TWO_STEPS,
        "--benchmark",
        "gqa",
        "--data_dir=data",
        "--vision_model",
        "encoder",
    ]
    assert parts == ["python", "run_vqa.py", *expected]

    # Flags out of a file, secrets, and several processes.
    (tmp_path / "settings.yaml").write_text("learning_rate: 1e-2\nhub_token: hf_secret\ntrain_file: ~/me/rows.csv\n")
    results = copy.deepcopy(retrieval.results)
    results["settings"]["world_size"] = 2
    text = retrieval.card(tmp_path, argv=[str(tmp_path / "settings.yaml")], results=results).text
    command = re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1].replace("\\\n", " ")
    launched = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "run_retrieval.py"]
    assert run_of_shell(command) == [*launched, "--learning_rate=1e-2", "--train_file=me/rows.csv"]
    secret = ["--push_to_hub", "--hub_token=hf_secret", "--hub-model-id", "me/it", "--seed", "7"]
    text = retrieval.card(tmp_path, argv=secret).text
    assert "hf_secret" not in text and "me/it" not in text and "--seed 7" in text


def run_of_shell(line: str) -> list[str]:
    """The arguments as a shell hands them over."""
    program = [sys.executable, "-I", "-c", "import json, sys; print(json.dumps(sys.argv[1:]))"]
    done = subprocess.run(
        ["sh", "-c", f'"$@" {line}', "sh", *program], capture_output=True, text=True, check=True
    ).stdout
    return json.loads(done)


@pytest.mark.slow
def test_snippets_print_answers_elsewhere(vqa, retrieval, tmp_path):
    """In a new process, with nothing but the folders and an image, and each snippet by itself."""
    codes = []
    for run in (vqa, retrieval):
        shutil.copytree(run.folder, tmp_path / run.folder.name, ignore=shutil.ignore_patterns("checkpoint-*"))
        codes += snippets(check_card(run.folder / "README.md"))
    make_image().save(tmp_path / "image.png")
    program = "import json, sys; sys.modules['hivilt'] = None\n"
    program += "for code in json.load(open('codes.json')): exec(code, {}); print('---')"
    (tmp_path / "codes.json").write_text(json.dumps(codes))
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-6000:]
    vqa_pipeline, vqa_auto, zero_shot, retrieval_auto = done.stdout.split("---\n")[:4]
    (answers,) = ast.literal_eval(vqa_auto)
    assert [one["answer"] for one in answers] == [one["answer"] for one in ast.literal_eval(vqa_pipeline)]
    assert {one["answer"] for one in answers} <= set(vqa.trainer.model.config.id2label.values())
    scores = {one["label"]: one["score"] for one in ast.literal_eval(zero_shot)}
    assert sum(scores.values()) == pytest.approx(1, abs=1e-4)
    similar, ranked = map(ast.literal_eval, retrieval_auto.splitlines())
    assert similar == pytest.approx(scores, abs=1e-4)
    assert ranked.keys() == scores.keys() and all(-1 <= score <= 1 for score in ranked.values())


def test_a_run_that_measured_nothing_claims_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_vqa_miniature("easy-vqa", tmp_path / "data")
    flags = ("--benchmark", "easy-vqa", "--data_dir", "data", "--do_train", "--eval_strategy", "no")
    make_run(QuestionAnswering, Path("outputs/it"), *flags, "--load_best_model_at_end", "false")
    card = check_card(tmp_path / "outputs/it/README.md")
    assert card.data.eval_results is card.data.metrics is None
    assert "Nothing was measured." in card.text and "It was trained on easy-VQA alone" in card.text
    assert "held-out" not in card.text and "predictions.png" not in card.text
    assert 'model="outputs/it"' in card.text  # which works from here
    assert str(tmp_path) not in card.content and "None" not in card.content


def test_pushing_keeps_the_card(tmp_path, monkeypatch):
    make_vqa_miniature("easy-vqa", tmp_path / "data")
    uploaded = []

    class Api:
        def upload_folder(self, folder_path, **kwargs):
            uploaded.append({path.name: path.read_bytes() for path in Path(folder_path).glob("*.*") if path.is_file()})
            return SimpleNamespace(is_done=lambda: True, done=lambda: True)

    def init_hf_repo(self, *args, **kwargs):
        self.hub_model_id, self.push_in_progress = "me/tiny", None

    monkeypatch.setattr(transformers.trainer, "hf_api", Api)
    monkeypatch.setattr(Trainer, "init_hf_repo", init_hf_repo)
    flags = ("--benchmark", "easy-vqa", "--data_dir", str(tmp_path / "data"), "--hub_strategy", "end", "--push_to_hub")
    run = make_run(QuestionAnswering, tmp_path / "out", *flags, "--hub_token", "hf_secret", "--hub_model_id", "tiny")
    assert {"README.md", "model.safetensors", "modeling_hivilt.py", "results.json"} <= set(uploaded[-1])
    content = (run.folder / "README.md").read_text(encoding="utf-8")
    assert uploaded[-1]["README.md"].decode() == content
    # The name as the Hub completed it.
    assert 'model="me/tiny"' in check_card(run.folder / "README.md").text
    assert "hf_secret" not in content + (run.folder / "results.json").read_text(encoding="utf-8")

    run.trainer.create_model_card(model_name="other", license="mit")
    assert (run.folder / "README.md").read_text(encoding="utf-8") == content


# Names on the Hub


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"vision_model": "google/vit-base-patch16-224"}, ["google/vit-base-patch16-224"]),
        ({"vision_model": "google/vit", "text_model": "bert-base-uncased"}, ["google/vit", "bert-base-uncased"]),
        ({"vision_model": None, "fusion": None, "model_name_or_path": "me/hivilt"}, ["me/hivilt"]),
        ({"text_model": "models/text/bert"}, None),
        ({"text_model": "my/folder"}, None),
    ],
)
def test_base_models_are_those_on_the_hub(vqa, tmp_path, monkeypatch, named, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my/folder").mkdir(parents=True)
    card = vqa.card(tmp_path, args=dataclasses.replace(vqa.args, **named))
    assert card.data.base_model == expected
    assert card.data.get("base_model_relation") == ("finetune" if expected else None)


def test_a_dataset_on_the_hub_is_named(vqa, tmp_path):
    named = {"benchmark": None, "data_dir": None, "dataset_name": "Me/My_Images", "dataset_config_name": "small"}
    card = vqa.card(tmp_path, args=dataclasses.replace(vqa.args, **named, max_predict_samples=6))
    assert card.data.datasets == ["Me/My_Images"]
    first = card.data.eval_results[0]
    assert (first.dataset_type, first.dataset_config) == ("Me/My_Images", "small")
    assert first.dataset_args == {"max_samples": 6}


def test_a_benchmark_names_the_copy_that_was_read(vqa, tmp_path):
    def read_from(name: str | None) -> list:
        table = datasets.Dataset.from_dict({"image": ["a.png"]})
        table.info.homepage = name and f"https://huggingface.co/datasets/{name}"
        return [vqa.splits["train"][0]._replace(image=TableImage(table, 0, "image"))]

    args = dataclasses.replace(vqa.args, data_dir=None)
    splits = {"train": read_from("one/GQA") + read_from("two/gqa"), "test": read_from("one/GQA")}
    card = vqa.card(tmp_path, args=args, splits={**vqa.splits, **splits})
    assert card.data.datasets == ["one/GQA", "two/gqa"]
    assert {one.dataset_type for one in card.data.eval_results} == {"one/GQA"}
    for nameless in (read_from(None), read_from(str(tmp_path)), vqa.splits["train"]):
        card = vqa.card(tmp_path, args=args, splits={**vqa.splits, "train": nameless, "test": nameless})
        assert card.data.datasets is None and card.data.eval_results[0].dataset_type == "gqa"


def test_every_data_set_is_credited():
    assert set(CREDITS) == {*VQA_BENCHMARKS, *CAPTION_BENCHMARKS, *GROUNDING_BENCHMARKS, *REASONING_BENCHMARKS}


# Odd words

NASTY = st.sampled_from(
    [
        "a: b",
        "- x",
        "'",
        '"',
        "|",
        "\\|",
        "`x`",
        "a\n---\nb",
        "{{ x }}",
        "{% if %}",
        "# a",
        "```\n# b",
        "*",
        "<b>",
        "no",
    ]
    + ["🐈", "\ud7ff", "\x07", "\u2028", "|\n|---|\n", "\\", "[x](y)", "%}", "&amp;", "\r\n", "--", "null", "é"]
)
WORDS = st.lists(NASTY | st.text(st.characters(exclude_categories=["Cs"]), max_size=5), min_size=1).map(" ".join)


@given(name=WORDS, text=WORDS, setting=WORDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_odd_words_break_neither_yaml_nor_tables_nor_code(task, request, tmp_path_factory, name, text, setting):
    run = request.getfixturevalue(task)
    results = copy.deepcopy(run.results)
    results["data"]["name"], results["settings"]["test_split"] = name, setting
    first = run.splits["validation"][0]
    first = first._replace(question=text) if task == "vqa" else first._replace(captions=(text,))
    folder = tmp_path_factory.getbasetemp() / "odd"
    changes = {"args": dataclasses.replace(run.args, benchmark=None), "results": results}
    card = run.card(folder, has_braces=True, **changes, splits={**run.splits, "validation": [first]})
    words = "".join(char for char in " ".join(name.split()) if char.isprintable()) or "unnamed data"
    assert card.data.eval_results[0].dataset_name == words
    assert card.data.model_name.endswith(f"trained on {words}")
    for code in snippets(card):
        said = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
        assert text in said
    assert card.text.count("\n## ") == 4


# This repository


def test_the_card_of_this_repository():
    check_card(ROOT / "README.md")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("library_name: transformers\n", ""),
        ("license: apache-2.0", "license: Apache 2.0"),
        ("type: gqa", "type: GQA of 2019"),
        ("type: open_accuracy", "type: accuracy"),
        ("name: accuracy", "name: accuracy\n      verified: true"),
        ("- custom_code", f"- custom_code\ndatasets:\n- {ROOT}"),
        ("| loss |", "| loss | loss |"),
        ("### Settings", "### Empty\n\n### Settings"),
        ("| train |", "| None |"),
        ("# HiViLT", "# {{ title }} HiViLT"),
    ],
)
def test_the_check_finds_what_is_wrong(vqa, tmp_path, right, wrong):
    content = (vqa.folder / "README.md").read_text(encoding="utf-8")
    assert right in content
    (tmp_path / "README.md").write_text(content.replace(right, wrong, 1), encoding="utf-8")
    with pytest.raises((AssertionError, KeyError, ValueError)):
        check_card(tmp_path / "README.md")
