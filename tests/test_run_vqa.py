"""`run_vqa.py` from the command line to its output folder, on a miniature of every layout it reads."""

import json
import math
import os
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertModel, ViTImageProcessorPil, ViTModel, pipeline

from hivilt import HiViLTForQuestionAnswering
from hivilt.data.vqa_benchmarks import VQA_BENCHMARKS
from hivilt.evaluation.calibration import expected_calibration_error, fit_temperature
from hivilt.evaluation.familiarity import is_familiar
from hivilt.evaluation.vqa import exact_match
from hivilt.processing_hivilt import HiViLTProcessor, well_formed
from hivilt.run_vqa import main
from hivilt.search import ImageIndex
from hivilt.tasks.arguments import VQAArguments
from hivilt.tasks.question_answering import QuestionAnswering, spell_alike
from hivilt.training.arguments import parse_arguments
from hivilt.training.splits import prepare_splits
from miniatures import make_hub_copy, make_vqa_miniature
from processes import launch, launch_accelerate
from tiny import CODE, TEXT_CONFIGS, VISION_CONFIGS, make_config, make_image, make_processor, make_tokenizer, read_lines

COLORS = ["red", "blue", "green", "white"]
# Small enough for a second a run, and without dropout so that runs can be compared.
TINY = {"hidden_size": 16, "num_attention_heads": 2, "fusion_intermediate_size": 16, "dropout": 0.0}


def make_rows(split, num_images, folder):
    """Questions about images of one colour, few and many an image, mixed."""
    (folder / split).mkdir()
    for number in range(num_images):
        make_image(COLORS[number % 4]).save(folder / split / f"{number}.png")
    asked = [
        ("what color is the image?", lambda color: color),
        ("is the image red?", lambda color: "yes" if color == "red" else "no"),
        ("is the image blue?", lambda color: "yes" if color == "blue" else "no"),
    ]
    return [
        {"image": f"{split}/{number}.png", "question": question, "answer": answer(COLORS[number % 4])}
        for turn, (question, answer) in enumerate(asked)
        for number in range(num_images)
        if turn <= number % 3
    ]


def make_data(folder):
    """A folder with train, validation and test files of JSON lines: 19, 9 and 13 questions."""
    folder.mkdir()
    for split, num_images in (("train", 10), ("validation", 5), ("test", 7)):
        rows = make_rows(split, num_images, folder)
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def data(tmp_path):
    """What `make_data` makes, to change."""
    return make_data(tmp_path / "data")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A saved model that has learned nothing."""
    folder = tmp_path_factory.mktemp("checkpoint")
    HiViLTForQuestionAnswering(make_config()).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return str(folder)


def flags(data, out, *more, splits=("train", "validation", "test")):
    files = [part for split in splits for part in (f"--{split}_file", str(data / f"{split}.jsonl"))]
    return [
        *files,
        *("--output_dir", str(out), "--fusion", json.dumps(TINY), "--image_size", "32", "--use_cpu"),
        *("--disable_tqdm", "true"),
        *("--max_steps", "2", "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "2"),
        *("--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "2", "--save_steps", "2"),
        *("--logging_steps", "1", *more),
    ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of two steps: its data, its folder and what it gave."""
    place = tmp_path_factory.mktemp("plain")
    data = make_data(place / "data")
    return SimpleNamespace(data=data, out=place / "out", results=main(flags(data, place / "out")))


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: (entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry}


def test_leaves_all_it_promises(data, tmp_path, monkeypatch, capsys, drawn):
    out = tmp_path / "outputs/tiny"
    monkeypatch.chdir(tmp_path)
    results = main(flags(data, Path("outputs/tiny")))
    promised = ["config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "README.md"]
    promised += CODE
    promised += ["results.json", "predictions.jsonl", "training.png", "predictions.png", "trainer_state.json"]
    assert set(promised) <= {path.name for path in out.iterdir()}
    for checkpoint in out.glob("checkpoint-*"):
        assert {*promised[:4], *CODE} <= {path.name for path in checkpoint.iterdir()}
    for name in ("training.png", "predictions.png"):
        Image.open(out / name).verify()

    # predictions.jsonl: each question once, in order, and the accuracy that is reported follows from it.
    asked, predictions = read_lines(data / "test.jsonl"), read_lines(out / "predictions.jsonl")
    assert [(one["image"], one["question"], one["answer"]) for one in predictions] == [
        (row["image"], row["question"], row["answer"]) for row in asked
    ]
    for one in predictions:
        scores = [answer["score"] for answer in one["predictions"]]
        assert len(scores) == 3
        assert scores == sorted(scores, reverse=True)
        assert one["correct"] == exact_match(one["predictions"][0]["answer"], [one["answer"]])
    accuracy = sum(one["correct"] for one in predictions) / len(predictions)

    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["test"]["accuracy"] == accuracy
    assert results["test"]["num_questions"] == len(asked) == 13
    assert results["data"]["train"] == {
        "images": 10,
        "questions": 19,
        "answer_coverage": 1.0,
        "bad_images": [],
        "dropped_questions": 0,
    }
    assert results["train"]["questions"] > 0
    saved = HiViLTForQuestionAnswering.from_pretrained(out)
    assert results["parameters"]["all"] == sum(parameter.numel() for parameter in saved.parameters())
    for measured in (
        results["wall_seconds"],
        results["peak_memory_bytes"],
        results["train"]["questions_per_second"],
        results["validation"]["questions_per_second"],
        results["test"]["questions_per_second"],
        results["test"]["loss"],
    ):
        assert math.isfinite(measured)
        assert measured > 0
    assert results["settings"]["seed"] == 42
    assert results["environment"]["device"] == "cpu"
    *_, measured, last = capsys.readouterr().out.splitlines()
    assert measured.startswith("  ") or measured == f"test accuracy: {accuracy:.4f} on 13 questions"
    assert last == "Wrote outputs/tiny; try it: python app.py --model outputs/tiny"


def test_the_pipeline_gives_the_written_predictions(plain):
    vqa = pipeline("visual-question-answering", model=str(plain.out), trust_remote_code=True)
    for one in read_lines(plain.out / "predictions.jsonl")[:3]:
        answers = vqa(str(plain.data / one["image"]), one["question"], top_k=3)
        assert [answer["answer"] for answer in answers] == [answer["answer"] for answer in one["predictions"]]
        torch.testing.assert_close(
            [answer["score"] for answer in answers],
            [answer["score"] for answer in one["predictions"]],
            rtol=1e-5,  # one question at a time here, many there
            atol=1e-6,
        )


def test_resuming_continues_exactly(data, tmp_path):
    more = ("--max_steps", "4", "--save_total_limit", "5", "--eval_steps", "2", "--save_steps", "2")
    first = main(flags(data, tmp_path / "whole", *more))["train"]
    more = (*more, "--resume_from_checkpoint", str(tmp_path / "whole/checkpoint-2"))
    second = main(flags(data, tmp_path / "again", *more))["train"]
    whole, again = losses(tmp_path / "whole"), losses(tmp_path / "again")
    assert first["loss"] == pytest.approx(sum(loss for loss, _ in whole.values()) / 4, abs=1e-4)
    assert (first["resumed_at_step"], second["resumed_at_step"], second["loss"]) == (None, 2, None)
    assert 0 < second["questions"] < first["questions"] and second["steps"] == first["steps"]
    assert set(whole) == {1, 2, 3, 4}
    assert (again[3], again[4]) == (whole[3], whole[4])
    first, second = (load_file(tmp_path / name / "checkpoint-4/model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A run of two steps: what runs it with other flags, its folder and the rows it was trained on."""
    folder = tmp_path_factory.mktemp("started")
    rows = {split: make_rows(split, number, folder) for split, number in (("train", 10), ("test", 7))}
    for split in rows:
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows[split])))
    chosen = ("--validation_file", str(folder / "test.jsonl"))
    run = lambda out, *more: main([*flags(folder, out, *chosen, splits=("train", "test")), *more])
    run(folder / "out")
    return run, folder, rows["train"]


def resume(started, out, rows, *more):
    """Goes on with other rows, by default for no step, so that whatever answers otherwise was put together otherwise;
    gives the answers to the test questions, before and after."""
    run, folder, usual = started
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    try:
        run(out, "--resume_from_checkpoint", str(folder / "out/checkpoint-2"), *more)
    finally:
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, usual)))
    return [[one["predictions"] for one in read_lines(place / "predictions.jsonl")] for place in (folder / "out", out)]


def test_resuming_on_changed_rows_keeps_answers_and_tokens(started, tmp_path):
    # Without "no", the most frequent answer, with words that are counted anew, and in another order.
    rows = [row for row in started[2] if row["answer"] not in ("yes", "no")][::-1]
    rows += [{**started[2][3], "question": "a zebra crossing or white snow, white snow?"}] * 9
    before, after = resume(started, tmp_path / "out", rows)
    assert after == before
    first, second = (
        json.loads((place / "config.json").read_text()) for place in (started[1] / "out", tmp_path / "out")
    )
    assert second["id2label"] == first["id2label"]
    tokens = [(place / "tokenizer.json").read_bytes() for place in (started[1] / "out", tmp_path / "out")]
    assert tokens[0] == tokens[1]
    # And it does go on: the labels are those of the checkpoint's answers.
    resume(started, tmp_path / "further", rows, "--max_steps", "3")
    assert json.loads((tmp_path / "further/trainer_state.json").read_text())["global_step"] == 3


def test_resuming_on_changed_rows_holds_out_what_was_held_out(tmp_path):
    """Else the run would choose by images that it was trained on."""
    rows = make_rows("all", 12, tmp_path)
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    given = ["--train_file", str(file), "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--use_cpu"]
    given += ["--image_size", "32", "--fusion", json.dumps(TINY), "--do_train"]
    main(given)
    drawn = json.loads((tmp_path / "out/held_out.json").read_text())
    assert len(drawn) == 1

    def held_out():
        file.write_text("\n".join(map(json.dumps, rows)))
        args, training_args = parse_arguments([*given, "--resume_from_checkpoint", "last"], VQAArguments, {})
        _, splits, _, again = prepare_splits(args, training_args, QuestionAnswering(args).read)
        assert again == drawn
        return {one.image_id for one in splits["validation"]}

    more = make_rows("more", 9, tmp_path)
    rows = [*more, *rows[::-1]]
    assert held_out() == set(drawn)
    rows = more
    with pytest.raises(ValueError, match="held out .* none of the training data.*--validation_file"):
        held_out()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("a new answer", "checkpoint-2 does not know 1 of this run's 7 answers: 'teal'.*--model_name_or_path"),
        ("several answers", "problem_type .* was 'single_label_classification' and is 'multi_label_classification'"),
        (["--fusion", json.dumps({**TINY, "hidden_size": 20})], r"hidden_size \(--fusion\) was 16 and is 20"),
        (["--image_size", "48"], r"image_processor.size.height \(--image_size.*\) was 32 and is 48"),
        (["--vision_model", "vision"], r"vision_config.*\(--vision_model\)"),
        (["--text_model", "text"], r"text_config.*\(--text_model\)"),
        (["--answer_file", "answers.txt"], "answer_file: .* 2 answers that are not in .*answers.txt: 'blue', 'white'"),
        (
            ["--optim", "sgd"],
            "optimizer in .*checkpoint-2 is another than --optim sgd, whose dampening it does not have",
        ),
        (["--freeze", "text"], "optimizer in .*checkpoint-2 trains other parameters.*--freeze"),
    ],
)
def test_resuming_as_another_model_is_refused_by_name(change, message, started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ViTModel(VISION_CONFIGS["vit"]()).save_pretrained("vision")
    ViTImageProcessorPil(size={"height": 20, "width": 20}).save_pretrained("vision")
    BertModel(TEXT_CONFIGS["bert"]()).save_pretrained("text")
    make_tokenizer().save_pretrained("text")
    Path("answers.txt").write_text("red\ngreen\nyes\nno\n")
    rows, more = started[2], change if isinstance(change, list) else []
    if change == "a new answer":
        rows = [*rows, {**rows[0], "answer": "teal"}]
    elif change == "several answers":
        rows = [{**row, "answer": [row["answer"], "red"]} for row in rows]
    elif "--answer_file" in more:
        rows = [row for row in rows if row["answer"] in ("red", "green", "yes", "no")]
    with pytest.raises(ValueError, match=message):
        resume(started, tmp_path / "out", rows, *more)
    assert not (tmp_path / "out/model.safetensors").exists()


def test_what_the_optimizer_of_a_checkpoint_holds_is_said(started, tmp_path, caplog):
    before = {"learning_rate": "0.0015", "weight_decay": "0.05"}
    resume(started, tmp_path / "out", started[2], *(part for flag in before for part in (f"--{flag}", "0.5")))
    for flag, value in before.items():
        assert re.search(rf"{flag}: goes on with {value} as in .*checkpoint-2, not with 0.5", caplog.text)


def test_a_run_that_was_moved_ends_with_its_own_best(started, tmp_path):
    """Where it was, another run has left another best."""
    _, folder, rows = started
    shutil.copytree(folder / "out", tmp_path / "moved")
    state = json.loads((tmp_path / "moved/checkpoint-2/trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(folder / "out/checkpoint-2")
    elsewhere = shutil.copytree(folder / "out/checkpoint-2", tmp_path / "elsewhere/checkpoint-2")
    weights = load_file(elsewhere / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, elsewhere / "model.safetensors", {"format": "pt"})
    state["best_model_checkpoint"] = str(elsewhere)
    (tmp_path / "moved/checkpoint-2/trainer_state.json").write_text(json.dumps(state))
    started[0](tmp_path / "moved", "--resume_from_checkpoint", str(tmp_path / "moved/checkpoint-2"))
    final = load_file(tmp_path / "moved/model.safetensors")
    assert all(torch.equal(final[name], value) for name, value in weights.items())


def test_a_run_that_begins_anew_says_so(started, tmp_path, caplog):
    shutil.copytree(started[1] / "out", tmp_path / "out")
    shutil.copytree(
        tmp_path / "out/checkpoint-2", tmp_path / "out/checkpoint-9"
    )  # --resume_from_checkpoint would take it
    more = ["--max_steps", "1", "--eval_steps", "1", "--save_steps", "1", "--overwrite_output_dir"]
    started[0](tmp_path / "out", *more)
    assert "training begins anew; the 2 checkpoints of an earlier run are removed" in caplog.text
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]


def test_arguments_that_are_refused_remove_nothing_of_an_earlier_run(started, tmp_path):
    shutil.copytree(started[1] / "out", tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert "checkpoint-2" in before and "trainer_state.json" in before
    with pytest.raises(ValueError, match="^metric_for_best_model: got 'acc'"):
        started[0](tmp_path / "out", "--metric_for_best_model", "acc", "--overwrite_output_dir")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_a_run_that_diverges_publishes_nothing_over_what_was_good(started, tmp_path):
    out = shutil.copytree(started[1] / "out", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=r"^learning_rate: with 1e\+30 training diverged at step \d of 6"):
        more = ["--learning_rate", "1e30", "--warmup_steps", "0", "--max_steps", "6"]
        started[0](out, *more, "--overwrite_output_dir")
    del before["trainer_state.json"]  # of a run that was finished, which this one was not
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    for path in out.rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values())


def test_a_checkpoint_can_be_measured_and_trained_on(plain, data, tmp_path):
    trained = plain.results
    files = ["--test_file", str(data / "test.jsonl"), "--use_cpu", "--output_dir", str(tmp_path / "second")]
    measured = main(["--model_name_or_path", str(plain.out), "--do_predict", *files])
    assert measured["test"]["accuracy"] == trained["test"]["accuracy"]
    assert measured["test"]["loss"] == pytest.approx(trained["test"]["loss"], rel=1e-5)
    assert "train" not in measured
    assert "validation" not in measured
    # No training, no checkpoint, so no card that describes one.
    assert not (tmp_path / "second/README.md").exists()

    # Going on with fewer answers: the shared ones keep their weights.
    rows = [row for row in read_lines(data / "train.jsonl") if row["answer"] in ("yes", "no")]
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = [part for part in flags(data, tmp_path / "third") if part not in ("--fusion", json.dumps(TINY))]
    results = main([*more, "--model_name_or_path", str(plain.out), "--learning_rate", "0"])
    assert results["num_answers"] == 2
    # Of two answers the right one is always among the first three.
    assert "top3_accuracy" in trained["test"] and "top3_accuracy" not in results["test"]
    assert results["data"]["test"]["answer_coverage"] == 6 / 13
    config = [json.loads((out / "config.json").read_text()) for out in (plain.out, tmp_path / "third")]
    old, new = (load_file(out / "model.safetensors")["classifier.weight"] for out in (plain.out, tmp_path / "third"))
    for answer in ("yes", "no"):
        assert torch.equal(new[config[1]["label2id"][answer]], old[config[0]["label2id"][answer]])


def test_freezing_leaves_a_part_as_it_was(data, tmp_path):
    model = HiViLTForQuestionAnswering(make_config())
    model.save_pretrained(tmp_path / "start")
    make_processor().save_pretrained(tmp_path / "start")
    more = [part for part in flags(data, tmp_path / "out") if part not in ("--fusion", json.dumps(TINY))]
    results = main([*more, "--model_name_or_path", str(tmp_path / "start"), "--freeze", "vision", "text"])
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "out"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert not [name for name in changed if "vision_model" in name or "text_model" in name]
    assert 0 < results["parameters"]["training"] < results["parameters"]["all"]


def test_answers_outside_the_vocabulary_count_as_wrong(data, tmp_path, caplog):
    results = main(flags(data, tmp_path / "out", "--max_answers", "2"))
    assert results["num_answers"] == 2
    # "no" and "yes" are 9 of 19 training answers; the others cannot be trained on, but are asked at the end.
    assert results["data"]["train"]["dropped_questions"] == 10
    assert results["data"]["test"]["answer_coverage"] == 6 / 13
    assert results["test"]["num_questions"] == 13
    assert results["test"]["accuracy"] <= 6 / 13
    assert "train: dropped 10 questions with no answer among them" in caplog.text
    assert "cover 46.15% of the questions, which no accuracy can pass" in caplog.text


def test_several_answers_a_question_train_on_soft_labels(data, tmp_path):
    for split in ("train", "validation", "test"):
        rows = [row | {"answer": [row["answer"]] * 7 + ["maybe"] * 3} for row in read_lines(data / f"{split}.jsonl")]
        rows += [rows[0] | {"answer": [answer] * 3} for answer in ("a", "2020-01-02")]
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = main(flags(data, tmp_path / "out"))
    assert 0 <= results["test"]["vqa_accuracy"] <= 1
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    # As written, though VQA accuracy would drop the article and the hyphens.
    assert set(config["label2id"]) >= {"yes", "a", "2020-01-02"} and "" not in config["label2id"]
    # Each answer by itself: probabilities need not sum to one.
    assert sum(one["score"] for one in read_lines(tmp_path / "out/predictions.jsonl")[0]["predictions"]) > 1


def test_without_validation_data_images_are_held_out_and_no_test_data_is_said(data, tmp_path, caplog):
    results = main(flags(data, tmp_path / "out", splits=("train",)))
    assert results["data"]["train"]["images"] == 9
    assert results["data"]["validation"]["images"] == 1
    assert "test" not in results
    assert "no test data (--test_file or --test_split), so nothing is predicted" in caplog.text


def test_questions_without_answers_are_answered(data, tmp_path, caplog):
    rows = [{key: row[key] for key in ("image", "question")} for row in read_lines(data / "test.jsonl")]
    (data / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = main(flags(data, tmp_path / "out"))
    assert results["test"]["num_questions"] == 0
    assert "accuracy" not in results["test"]
    assert "accuracy is not measured" in caplog.text
    predictions = read_lines(tmp_path / "out/predictions.jsonl")
    assert len(predictions) == 13
    assert {(one["correct"], str(one["answer"])) for one in predictions} == {(None, "[]")}
    # The card falls back to what was measured.
    measured = ModelCard.load(tmp_path / "out/README.md").data.eval_results
    assert {one.dataset_split for one in measured} == {"validation"}


@pytest.mark.parametrize("kind", ["--data_dir", "--dataset_name", "--train_file"])
def test_cells_of_a_csv_are_read_as_written_by_every_path(data, kind):
    cells = ["None", "n/a", "NA", "007", "1.50", "TRUE", "2026-11-28"]
    header = "file_name,question,answer" if kind == "--data_dir" else "image,question,answer"
    rows = [f"0.png,what is {number}?,{cell}" for number, cell in enumerate(cells)]
    path = data / "train" / ("metadata.csv" if kind == "--data_dir" else "train.csv")
    path.write_text("\n".join([header, *rows]), encoding="utf-8-sig")
    where = {"--data_dir": data / "train", "--dataset_name": data / "train", "--train_file": path}[kind]
    if kind == "--dataset_name":
        where = data / "folder"
        where.mkdir()
        shutil.move(path, where / "train.csv")
        shutil.copy(data / "train" / "0.png", where)
    args, _ = parse_arguments([kind, str(where), "--output_dir", "out"], VQAArguments, {})
    (examples,) = QuestionAnswering(args).read(["train"])[1].values()
    assert [one.answers for one in examples] == [(cell,) for cell in cells]
    assert {(one.image_id, Path(one.image).is_file()) for one in examples} == {("0.png", True)}


def test_hub_layout_and_image_folder(data, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shutil.rmtree(data / "validation")
    for split in ("train", "test"):
        rows = [row | {"file_name": Path(row["image"]).name} for row in read_lines(data / f"{split}.jsonl")]
        lines = [json.dumps({key: row[key] for key in ("file_name", "question", "answer")}) for row in rows]
        (data / split / "metadata.jsonl").write_text("\n".join(lines))
    more = flags(data, tmp_path / "folder", splits=())
    results = main(["--data_dir", str(data), *more])
    assert results["data"]["train"]["images"] == 9
    assert results["test"]["num_questions"] == 13

    # A folder of Parquet files is what a dataset on the Hub is; other names for its columns and splits.
    hub = tmp_path / "hub"
    (hub / "data").mkdir(parents=True)
    for split, name in (("train", "train"), ("test", "validation")):
        rows = [
            {
                "photo": {"bytes": (data / row["image"]).read_bytes(), "path": None},
                "ask": row["question"],
                "say": row["answer"],
            }
            for row in read_lines(data / f"{split}.jsonl")
        ]
        datasets.Dataset.from_list(rows).to_parquet(str(hub / "data" / f"{name}-00000-of-00001.parquet"))
    columns = ["--image_column", "photo", "--question_column", "ask", "--answer_column", "say"]
    named = ["--validation_split", "none", "--test_split", "validation"]
    results = main(["--dataset_name", str(hub), *flags(data, tmp_path / "out", splits=()), *columns, *named])
    assert results["data"]["train"]["images"] + results["data"]["validation"]["images"] == 4  # equal ones are one
    assert results["test"]["num_questions"] == 13


def test_defaults_read_easy_vqa(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    limits = ["--max_train_samples", "40", "--max_eval_samples", "20", "--max_predict_samples", "33"]
    results = main([*limits, "--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no", "--use_cpu"])
    assert results["data"]["name"] == "easy-VQA"
    assert results["test"]["num_questions"] == 33
    assert len(read_lines(tmp_path / "outputs/vqa/predictions.jsonl")) == 33
    assert results["parameters"]["all"] <= 3_000_000


OFFICIAL = {
    "easy-vqa": {"accuracy"},
    "vqav2": {"vqa_accuracy", "by_answer_type", "by_question_type"},
    "gqa": {"accuracy", "open_accuracy", "binary_accuracy", "by_structural", "by_semantic", "by_detailed"},
    "vizwiz": {"vqa_accuracy", "by_answer_type", "answerable_vqa_accuracy"},
    "textvqa": {"vqa_accuracy"},
    "ok-vqa": {"vqa_accuracy", "by_answer_type", "by_question_type"},
    "vqa-rad": {"accuracy", "open_accuracy", "closed_accuracy", "num_open", "num_closed"},
    "clevr": {"accuracy", "by_family"},
    "sort-of-clevr": {"accuracy", "by_family"},
    "daquar": {"accuracy"},
}
SUBMISSIONS = {"vqav2": ("question_id", "answer"), "textvqa": ("question_id", "answer")}
SUBMISSIONS |= {"gqa": ("questionId", "prediction"), "vizwiz": ("image", "answer")}


# Each stands for those that are measured or handed in alike.
SAMPLE = {"vqav2", "gqa", "vizwiz", "vqa-rad", "clevr"}


@pytest.mark.parametrize(
    "name", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in VQA_BENCHMARKS]
)
def test_named_benchmarks_train_evaluate_and_predict(name, tmp_path, capsys, caplog):
    make_vqa_miniature(name, tmp_path / "data")
    asked = ["--benchmark", name, "--data_dir", str(tmp_path / "data"), "--do_train", "--do_eval", "--do_predict"]
    results = main([*asked, *flags(tmp_path, tmp_path / "out", splits=())])
    benchmark, printed = VQA_BENCHMARKS[name], capsys.readouterr().out
    metric = VQAArguments.benchmark_defaults[name].get("metric_for_best_model", "accuracy")
    assert results["data"]["name"] == benchmark.title
    assert results["settings"]["metric_for_best_model"] == metric

    # The official number, of validation where there is one with answers, and of test where its answers are public.
    hidden = benchmark.splits["test"] in benchmark.hidden
    for split in ("validation",) if hidden else ("validation", "test"):
        assert OFFICIAL[name] <= set(results[split])
        assert 0 <= results[split][metric] <= 1
        words = f"{split} {metric.replace('_', ' ')}: {results[split][metric]:.4f} on"
        assert words in printed
        for part in OFFICIAL[name] & {"open_accuracy", "closed_accuracy", "answerable_vqa_accuracy"}:
            assert f"{part.replace('_', ' ')} {results[split][part]:.4f}" in printed
        for kind, accuracy in results[split].get("by_answer_type", {}).items():
            assert f"{kind} {accuracy:.4f}" in printed
    if hidden:
        assert results["test"]["num_questions"] == 0
        assert "test: " in caplog.text and "their answers are not known" in caplog.text
        measured = ModelCard.load(tmp_path / "out/README.md").data.eval_results[0]
        assert (measured.dataset_split, measured.metric_type) == ("validation", metric)

    # Every question of the test split is answered; where there is a server, in its format.
    predictions = read_lines(tmp_path / "out/predictions.jsonl")
    assert len(predictions) == results["data"]["test"]["questions"]
    submission = tmp_path / "out/submission.json"
    assert submission.exists() == (name in SUBMISSIONS)
    if name in SUBMISSIONS:
        question, answer = SUBMISSIONS[name]
        rows = json.loads(submission.read_text())
        assert [row[answer] for row in rows] == [one["predictions"][0]["answer"] for one in predictions]
        assert [str(row[question]) for row in rows] == [one["question_id"] for one in predictions]
    num_answers = {"vqav2": 3129, "gqa": 1842}
    assert results["num_answers"] == num_answers.get(name, results["num_answers"])


def test_vizwiz_measures_answerability(tmp_path):
    make_vqa_miniature("vizwiz", tmp_path / "data")
    train = json.loads((tmp_path / "data/Annotations/train.json").read_text())
    for row in train[:2]:
        row["answers"] = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10
    (tmp_path / "data/Annotations/train.json").write_text(json.dumps(train))
    validation = json.loads((tmp_path / "data/Annotations/val.json").read_text())
    validation[0] |= {"answerable": 0, "answer_type": "unanswerable"}
    (tmp_path / "data/Annotations/val.json").write_text(json.dumps(validation))
    asked = ["--benchmark", "vizwiz", "--data_dir", str(tmp_path / "data")]
    results = main([*asked, *flags(tmp_path, tmp_path / "out", splits=())])
    assert 0 < results["validation"]["answerability_average_precision"] <= 1
    rows = json.loads((tmp_path / "out/submission_answerability.json").read_text())
    predictions = read_lines(tmp_path / "out/predictions.jsonl")
    for row, one in zip(rows, predictions, strict=True):
        score = next(given["score"] for given in one["predictions"] if given["answer"] == "unanswerable")
        assert row == {"image": one["question_id"], "answerable": pytest.approx(1 - score)}


def test_a_checkpoint_answers_a_split_without_answers(tmp_path, checkpoint, caplog):
    make_vqa_miniature("vqav2", tmp_path / "data")
    asked = ["--benchmark", "vqav2", "--data_dir", str(tmp_path / "data"), "--test_split", "test-dev", "--do_predict"]
    results = main([*asked, "--model_name_or_path", checkpoint, "--use_cpu", "--output_dir", str(tmp_path / "out")])
    assert set(results["data"]) == {"name", "test"}
    assert "vqa_accuracy" not in results["test"]
    questions = json.loads((tmp_path / "data/v2_OpenEnded_mscoco_test-dev2015_questions.json").read_text())["questions"]
    rows = json.loads((tmp_path / "out/submission.json").read_text())
    assert [row["question_id"] for row in rows] == [one["question_id"] for one in questions]
    assert f"submission.json: {len(questions)} answers for the server of VQAv2" in caplog.text


def test_a_copy_on_the_hub_stands_for_the_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    make_hub_copy("gqa", tmp_path / "copy")
    asked = ["--benchmark", "gqa", "--dataset_name", str(tmp_path / "copy")]
    results = main([*asked, *flags(tmp_path, tmp_path / "out", splits=())])
    assert results["test"]["num_questions"] == results["data"]["test"]["questions"] > 0
    assert "by_structural" in results["test"]


def test_answers_are_given_as_most_of_the_training_data_spells_them(data, tmp_path):
    spelling = {"red": "USA", "blue": "Berlin", "yes": "Yes"}
    for split in ("train", "validation", "test"):
        rows = [
            row | {"answer": spelling.get(row["answer"], row["answer"])} for row in read_lines(data / f"{split}.jsonl")
        ]
        if split == "train":
            rows.append(rows[0] | {"answer": "usa"})
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = main(flags(data, tmp_path / "out"))
    model = HiViLTForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert {"USA", "Berlin", "Yes", "no", "green", "white"} == set(model.config.id2label.values())
    assert results["data"]["test"]["answer_coverage"] == 1
    given = {best["answer"] for row in read_lines(tmp_path / "out/predictions.jsonl") for best in row["predictions"]}
    assert given <= set(model.config.label2id)


def test_a_checkpoint_keeps_what_it_learned_of_an_answer_in_another_spelling():
    model = HiViLTForQuestionAnswering(make_config(id2label={0: "usa", 1: "berlin", 2: "no"}))
    learned = model.classifier.weight.detach().clone()
    spell_alike(model.config, ["Berlin", "new", "USA"])
    assert model.config.id2label == {0: "USA", 1: "Berlin", 2: "no"}
    assert model.config.label2id == {"USA": 0, "Berlin": 1, "no": 2}
    model.resize_answer_head(["Berlin", "new", "USA"])
    assert torch.equal(model.classifier.weight[[0, 2]], learned[[1, 0]])


def test_classes_that_differ_in_nothing_but_spelling_stay():
    config = make_config(id2label={0: "usa", 1: "USA"})
    spell_alike(config, ["Usa"])
    assert config.id2label == {0: "usa", 1: "USA"}


def test_a_file_of_answers_to_something_else_is_refused(data, tmp_path):
    (tmp_path / "answers.txt").write_text("cat\ndog\n")
    message = "^answer_file: none of the .* training questions has an answer among the 2 to choose from, .* 'cat'"
    with pytest.raises(ValueError, match=message):
        main(flags(data, tmp_path / "out", "--answer_file", str(tmp_path / "answers.txt")))


def test_a_batch_of_one_small_image_says_what_to_do(data, tmp_path):
    with pytest.raises(
        ValueError, match="^per_device_train_batch_size: a batch of one image.*--image_size .64.*drop_last"
    ):
        main(flags(data, tmp_path / "out", "--per_device_train_batch_size", "1"))


def test_answers_from_a_file(data, tmp_path):
    (tmp_path / "answers.txt").write_text("yes\nno\nmauve\n")
    results = main(flags(data, tmp_path / "out", "--answer_file", str(tmp_path / "answers.txt")))
    assert results["num_answers"] == 3
    assert json.loads((tmp_path / "out/config.json").read_text())["id2label"] == {"0": "yes", "1": "no", "2": "mauve"}
    (tmp_path / "answers.txt").write_text("yes\nYes\n")
    with pytest.raises(ValueError, match="answer_file: answers.txt has 'yes' more than once"):
        main(flags(data, tmp_path / "again", "--answer_file", str(tmp_path / "answers.txt")))
    with pytest.raises(FileNotFoundError, match="answer_file: .*none.txt is not a file"):
        main(flags(data, tmp_path / "again", "--answer_file", str(tmp_path / "none.txt")))


def test_augmentation_changes_training_and_nothing_else(data, tmp_path):
    plain = main(flags(data, tmp_path / "plain", "--learning_rate", "0"))
    more = ("--random_crop", "0.5", "--random_flip", "skip", "--rand_augment", "2", "7")
    results = main(flags(data, tmp_path / "augmented", "--learning_rate", "0", *more))
    assert losses(tmp_path / "augmented") != losses(tmp_path / "plain")
    again = main(flags(data, tmp_path / "again", "--learning_rate", "0", *more, "--dataloader_num_workers", "1"))
    assert losses(tmp_path / "again") == losses(tmp_path / "augmented")
    assert again["data"] == results["data"] == plain["data"]
    # Batch norms have seen other images; the images that are measured on are the same.
    assert results["test"]["num_questions"] == plain["test"]["num_questions"]


# Two processes


@pytest.mark.slow
@pytest.mark.parametrize("start", [launch, launch_accelerate])
def test_two_processes_do_what_one_does(start, data, tmp_path):
    """Two processes with batches of two images train as one with four, and answer every question once, in order.

    With an encoder that treats each image by itself: the small one's batch norms see the images of one process.
    """
    ViTModel(VISION_CONFIGS["vit"]()).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 20, "width": 20}).save_pretrained(tmp_path / "vit")
    encoder = ("--vision_model", str(tmp_path / "vit"), "--warmup_steps", "0")
    main(flags(data, tmp_path / "one", *encoder))
    more = (*encoder, "--per_device_train_batch_size", "2")
    printed = start("hivilt.run_vqa", 2, flags(data, tmp_path / "two", *more))
    assert printed.count("test accuracy") == 1
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    for step in (1, 2):
        assert two[step] == pytest.approx(one[step], rel=1e-3)
    alone, together = (read_lines(tmp_path / name / "predictions.jsonl") for name in ("one", "two"))
    assert [row["question_id"] for row in together] == [row["question_id"] for row in alone]
    for first, second in zip(alone, together, strict=True):
        assert [row["answer"] for row in second["predictions"]] == [row["answer"] for row in first["predictions"]]
        for left, right in zip(first["predictions"], second["predictions"], strict=True):
            assert right["score"] == pytest.approx(left["score"], abs=1e-5)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert results[1]["settings"]["world_size"] == 2
    assert results[1]["train"]["questions"] == results[0]["train"]["questions"]
    for split in ("validation", "test"):
        assert results[1][split]["num_questions"] == results[0][split]["num_questions"]
        assert results[1][split]["loss"] == pytest.approx(results[0][split]["loss"], rel=1e-4)


def test_two_processes_answer_with_the_model_they_save(data, tmp_path):
    """Batch norms of each process have seen other images; what is measured must be what is saved."""
    more = ("--max_steps", "1", "--load_best_model_at_end", "false", "--per_device_train_batch_size", "2")
    launch("hivilt.run_vqa", 2, flags(data, tmp_path / "two", *more))
    files = ["--test_file", str(data / "test.jsonl"), "--use_cpu", "--output_dir", str(tmp_path / "again")]
    main(["--model_name_or_path", str(tmp_path / "two"), "--do_predict", *files])
    together, alone = (read_lines(tmp_path / name / "predictions.jsonl") for name in ("two", "again"))
    for first, second in zip(together, alone, strict=True):
        assert [row["answer"] for row in second["predictions"]] == [row["answer"] for row in first["predictions"]]
        for left, right in zip(first["predictions"], second["predictions"], strict=True):
            assert right["score"] == pytest.approx(left["score"], abs=1e-5)


# Bad input


def test_blank_images_measure_what_questions_alone_answer(data, tmp_path, capsys):
    results = main([*flags(data, tmp_path / "out"), "--blank_images"])
    printed, card = capsys.readouterr().out, ModelCard.load(tmp_path / "out/README.md")
    for split in ("validation", "test"):
        assert f"with gray in place of every image: {results[split]['accuracy_of_blank_images']:.4f}" in printed
    assert "| accuracy of blank images |" in card.text

    # As if all images of the file were gray.
    rows = read_lines(data / "test.jsonl")
    Image.new("RGB", (50, 30), (128, 128, 128)).save(data / "gray.png")
    (data / "gray.jsonl").write_text("".join(json.dumps(row | {"image": "gray.png"}) + "\n" for row in rows))
    model = ["--model_name_or_path", str(tmp_path / "out"), "--test_file", str(data / "gray.jsonl"), "--do_predict"]
    gray = main([*model, "--output_dir", str(tmp_path / "gray")])
    assert gray["test"]["accuracy"] == results["test"]["accuracy_of_blank_images"]
    assert gray["test"]["num_questions"] == results["test"]["num_questions"]


def test_nothing_to_evaluate(data, tmp_path):
    with pytest.raises(ValueError, match="give --model_name_or_path a checkpoint, or --do_train"):
        main(["--do_predict", "--test_file", str(data / "test.jsonl"), "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--benchmark", "gqa", "--test_file", "x.json"], "drop benchmark, or train_file"),
        (["--image_dir", "images", "--test_file", "x.json"], "image_dir goes with a benchmark"),
        (["--benchmark", "gqa", "--data_dir", "a", "--dataset_name", "b"], "one source, got dataset_name and data_dir"),
        (["--benchmark", "gqa", "--data_dir", "nowhere", "--test_split", "minival"], "'challenge'.*got 'minival'"),
    ],
)
def test_arguments_that_cannot_work_are_named(more, message, tmp_path, checkpoint):
    with pytest.raises(ValueError, match=message):
        main(["--output_dir", str(tmp_path), "--use_cpu", "--do_predict", "--model_name_or_path", checkpoint, *more])


def test_augmentation_that_cannot_work_is_named(data, tmp_path):
    with pytest.raises(ValueError, match="random_crop: expected .* got 2.0"):
        main(flags(data, tmp_path / "out", "--random_crop", "2"))


def test_missing_official_files_are_named(tmp_path, checkpoint):
    asked = ["--benchmark", "gqa", "--data_dir", str(tmp_path), "--do_predict", "--model_name_or_path", checkpoint]
    with pytest.raises(FileNotFoundError, match="testdev_balanced_questions.json"):
        main([*asked, "--output_dir", str(tmp_path), "--use_cpu"])


def test_joined_splits_hold_images_out(tmp_path):
    make_vqa_miniature("vqav2", tmp_path / "data")
    asked = ["--benchmark", "vqav2", "--data_dir", str(tmp_path / "data"), "--train_split", "train+val"]
    asked += ["--do_train", "--test_split", "test-dev"]
    results = main([*asked, *flags(tmp_path, tmp_path / "out", splits=()), "--per_device_train_batch_size", "5"])
    assert results["data"]["train"]["images"] + results["data"]["validation"]["images"] == 6
    assert results["data"]["validation"]["images"] == 1
    assert "test" not in results["data"]


def test_missing_split_names_the_flag(data, tmp_path):
    with pytest.raises(ValueError, match="this run needs train, validation data.*--train_file"):
        main(["--do_train", "--test_file", str(data / "test.jsonl"), "--output_dir", str(tmp_path / "out")])


def test_unknown_column_stops_the_run(data, tmp_path):
    with pytest.raises(
        ValueError, match="answer_column: train.jsonl has no column 'reply'; it has 'image', 'question'"
    ):
        main(flags(data, tmp_path / "out", "--answer_column", "reply"))


def test_bad_images_stop_the_run_or_are_left_out(data, tmp_path):
    (data / "test/2.png").write_text("no image")
    (data / "train/3.png").unlink()
    with pytest.raises(ValueError, match="1 of 10 images are missing or unreadable: .*3.png.*--on_bad_image skip"):
        main(flags(data, tmp_path / "out"))
    results = main(flags(data, tmp_path / "out", "--on_bad_image", "skip"))
    assert results["data"]["train"]["bad_images"] == ["train/3.png"]
    assert results["data"]["test"]["bad_images"] == ["test/2.png"]
    assert results["test"]["num_questions"] == 10


WILD = [
    *(
        "from $5 to $6_^ and \\frac{1}{",
        "a\x00b\x07c\u200b",
        "\N{WOMAN}\u200d\N{GIRL}?",
        "ما لون الصورة؟",
        "图片是什么颜色",
    ),
    *("half \ud800 a pair", "word " * 10_000, "\ufeffred"),
]


def test_texts_from_the_wild(data, tmp_path, drawn):
    rows = read_lines(data / "train.jsonl")
    os.rename(data / rows[0]["image"], data / "train/\N{SNOWMAN} \udcff.png")  # a name that is no UTF-8
    answers = [7, 2.0, None, ["red", "dark red"], *WILD]
    for row, question, answer in zip(rows, WILD * 3, answers * 2, strict=False):
        row.update(question=question, answer=answer)
        if row["image"] == rows[0]["image"]:
            row["image"] = "train/\N{SNOWMAN} \udcff.png"
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main([*flags(data, tmp_path / "out", splits=("train", "test")), "--per_device_eval_batch_size", "1"])
    predictions = read_lines(tmp_path / "out/predictions.jsonl")
    expected = [well_formed(row["question"].strip()) for row in rows]
    assert [row["question"] for row in predictions] == expected
    assert predictions[0]["image"].endswith("train/\N{SNOWMAN} \udcff.png")
    assert [row["answer"] for row in predictions[:4]] == ["7", "2", [], ["red", "dark red"]]
    Image.open(tmp_path / "out/predictions.png").verify()


def logits_of(folder, data):
    model, processor = (
        HiViLTForQuestionAnswering.from_pretrained(folder).eval(),
        HiViLTProcessor.from_pretrained(folder),
    )
    rows = [json.loads(line) for line in (data / "validation.jsonl").read_text().splitlines()]
    images = [Image.open(data / row["image"]) for row in rows]
    inputs = processor(images=images, text=[row["question"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    return logits, torch.tensor([model.config.label2id[row["answer"]] for row in rows])


def test_calibrating_divides_scores_by_the_best_temperature_and_moves_no_answer(plain, tmp_path):
    calibrated = flags(plain.data, tmp_path / "found", "--calibrate")
    found = main(calibrated)
    (before, labels), (after, _) = logits_of(plain.out, plain.data), logits_of(tmp_path / "found", plain.data)
    temperature = found["calibration"]["temperature"]
    assert temperature == pytest.approx(fit_temperature(before, labels), rel=1e-3) and abs(temperature - 1) > 0.01
    torch.testing.assert_close(after, before / temperature, rtol=1e-4, atol=1e-5)
    assert found["calibration"]["num"] == len(labels)
    error = expected_calibration_error(after.softmax(-1).amax(-1), after.argmax(-1) == labels)
    assert found["calibration"]["ece_after"] == pytest.approx(error, abs=1e-4)
    assert found["test"]["accuracy"] == plain.results["test"]["accuracy"] and "calibration" not in plain.results
    assert found["validation"]["loss"] < plain.results["validation"]["loss"]
    card = (tmp_path / "found/README.md").read_text()
    assert f"divided by one temperature, {temperature:.4g}" in " ".join(card.split())
    assert "not calibrated" in " ".join((plain.out / "README.md").read_text().split())
    # The temperature is in what the run leaves, not in its checkpoints: going on, for no step, it is fitted again.
    assert main([*calibrated, "--resume_from_checkpoint", "last"])["calibration"] == found["calibration"]


def test_a_checkpoint_is_calibrated_after_training(plain, tmp_path):
    data, measured = plain.data, plain.results
    shutil.copytree(plain.out, tmp_path / "plain")
    more = ["--model_name_or_path", str(tmp_path / "plain"), "--do_eval", "--calibrate", "--use_cpu"]
    files = ["--train_file", str(data / "train.jsonl"), "--validation_file", str(data / "validation.jsonl")]
    found = main([*files, *more, "--disable_tqdm", "true", "--output_dir", str(tmp_path / "found")])
    (before, _), (after, _) = logits_of(tmp_path / "plain", data), logits_of(tmp_path / "found", data)
    torch.testing.assert_close(after, before / found["calibration"]["temperature"], rtol=1e-4, atol=1e-5)
    assert "train" not in found and "validation" in found
    # In its own folder what was measured before stays, but for the loss, which is of scores before.
    main([*files, *more, "--disable_tqdm", "true", "--output_dir", str(tmp_path / "plain")])
    kept = json.loads((tmp_path / "plain/results.json").read_text())
    assert kept["train"] == measured["train"] and kept["calibration"] == found["calibration"]
    assert kept["test"] == {name: value for name, value in measured["test"].items() if name != "loss"}
    assert kept["data"].keys() == measured["data"].keys()


def test_calibrating_without_validation_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="calibrate: a temperature is fitted on validation data; give --do_eval"):
        main(flags(data, tmp_path, "--calibrate", "--do_predict"))


def test_what_is_familiar_is_written_down(tmp_path):
    """Training on reddish images: blue noise is nothing like it."""
    draw = random.Random(0)
    for split, count in (("train", 60), ("validation", 45)):
        rows = []
        for number in range(count):
            color = (draw.randrange(150, 256), draw.randrange(60), draw.randrange(60))
            make_image(color).save(tmp_path / f"{split}{number}.png")
            rows.append(
                {"image": f"{split}{number}.png", "question": "is it red?", "answer": "yes" if number % 2 else "no"}
            )
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    found = main(flags(tmp_path, out, "--do_train", splits=("train", "validation")))["familiarity"]
    assert (found["num_train"], found["num_held_out"]) == (60, 45)
    assert json.loads((out / "results.json").read_text())["familiarity"] == found
    model, processor = HiViLTForQuestionAnswering.from_pretrained(out), HiViLTProcessor.from_pretrained(out)
    strange = [Image.effect_noise((31, 23), 200).convert("RGB"), make_image("blue")]
    images = [*(Image.open(tmp_path / f"validation{number}.png") for number in range(9)), *strange]
    maps = model.eval().get_feature_maps(processor(images=images, return_tensors="pt")["pixel_values"])
    said = is_familiar(found, maps).tolist()
    assert sum(said[:9]) >= 8 and said[9:] == [False, False]
    assert "is_familiar" in (out / "README.md").read_text()


def test_a_baseline_stands_beside_the_accuracy_and_few_questions_are_told(data, tmp_path, caplog, capsys):
    """Most training questions have the answer "no", as have 5 of 13 test questions."""
    trained = [json.loads(line)["answer"] for line in (data / "train.jsonl").read_text().splitlines()]
    answers = [json.loads(line)["answer"] for line in (data / "test.jsonl").read_text().splitlines()]
    assert max(trained, key=trained.count) == "no"
    results = main(flags(data, tmp_path / "out"))
    assert results["test"]["majority_answer"] == "no"
    assert results["test"]["accuracy_of_majority_answer"] == answers.count("no") / len(answers)
    assert f"always 'no', the most frequent training answer: {answers.count('no') / 13:.4f}" in capsys.readouterr().out
    assert "| accuracy of majority answer |" in (tmp_path / "out/README.md").read_text()
    told = [record.message for record in caplog.records if "are few" in record.message]
    assert [one.partition(" are few")[0] for one in told] == [
        "validation: 9 questions with a known answer",
        "test: 13 questions with a known answer",
    ]
    assert "standard error of up to 17 percentage points" in told[0]
    # Two steps teach nothing.
    assert any("not told from chance" in record.message and "10 images" in record.message for record in caplog.records)


# A collection


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, color in enumerate(COLORS * 2):
        make_image(color, (20 + number, 25)).save(folder / f"{number}.png")
    return folder


def test_a_folder_is_indexed_once_and_asked(images, checkpoint, tmp_path, capsys):
    out, asked = tmp_path / "index", ["--ask", "what color is the image?", "is it red?"]
    named = ["--model_name_or_path", checkpoint, "--output_dir", str(out), "--use_cpu"]
    (first, second) = main(["--index", str(images), *asked, *named, "--top_k", "3", "--states_gb", "inf"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"8 images of {images} in {out}, 8 of them encoded now in ")
    index = ImageIndex.load(out, HiViLTForQuestionAnswering.from_pretrained(checkpoint).eval(), make_processor())
    assert [first, second] == index.ask(asked[1:])
    assert [printed[place] for place in (1, 5)] == asked[1:] and len(printed) == 10
    for answers, lines in ((first, printed[2:5]), (second, printed[6:9])):
        for rank, (one, line) in enumerate(zip(answers, lines, strict=False), 1):
            assert line == f"{rank:3}  {one.score:7.4f}  {one.answer}  {one.path}"
    rows = read_lines(out / "answers.jsonl")
    assert rows == [
        {"question": question, "path": str(one.path), "answer": one.answer, "score": one.score}
        for question, answers in zip(asked[1:], (first, second), strict=True)
        for one in answers
    ]

    # The index knows its checkpoint, and is named as such or by output_dir.
    (again,) = main([*asked[:2], "--output_dir", str(out), "--use_cpu"])
    (named,) = main(["--index", str(out), *asked[:2], "--output_dir", str(tmp_path / "out"), "--use_cpu"])
    assert again == named == first
    capsys.readouterr()
    assert main(["--index", str(out), "--output_dir", str(tmp_path / "out"), "--use_cpu"]) == []
    assert capsys.readouterr().out == f"8 images of {images.resolve()} in {out}\n"
    (sorted_by,) = main([*asked[:2], "--answer", "answer 2", "--output_dir", str(out), "--use_cpu"])
    assert {one.answer for one in sorted_by} == {"answer 2"} and VQAArguments(ask="red?").ask == ["red?"]

    HiViLTForQuestionAnswering(make_config(num_labels=3)).save_pretrained(tmp_path / "other")
    make_processor().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was made by another checkpoint"):
        main([*asked, "--model_name_or_path", str(tmp_path / "other"), "--output_dir", str(out), "--use_cpu"])


def test_two_processes_index_what_one_does(images, checkpoint, tmp_path):
    """And go on where one was stopped: each encodes its share of what is left, and tells of its own bad files."""
    for name in ("3bad.png", "5bad.png"):
        (images / name).write_text("no image")
    command = ["--index", str(images), "--model_name_or_path", checkpoint, "--use_cpu", "--ask", "is it red?"]
    command += ["--per_device_eval_batch_size", "2", "--output_dir"]
    skipping = ["--on_bad_image", "skip"]
    (alone,) = main([*command, str(tmp_path / "one"), *skipping])
    with pytest.raises(ValueError, match="3bad.png.*--on_bad_image skip"):
        main([*command, str(tmp_path / "two")])
    printed = launch("hivilt.run_vqa", 2, [*command, str(tmp_path / "two"), *skipping])
    assert printed.count("8 images of") == printed.count(", 4 of them encoded now in ") == 1
    infos = [json.loads((tmp_path / name / "index.json").read_text()) for name in ("one", "two")]
    assert infos[0] == infos[1] and [one["image"] for one in infos[0]["skipped"]] == ["3bad.png", "5bad.png"]
    tables = [datasets.load_from_disk(tmp_path / name / "embeddings") for name in ("one", "two")]
    assert tables[0]["image"][:] == tables[1]["image"][:]
    for one, two in zip(*tables, strict=True):
        assert one["level_0"] == pytest.approx(two["level_0"], abs=2e-3)
    together = read_lines(tmp_path / "two/answers.jsonl")
    assert [row["path"] for row in together] == [str(one.path) for one in alone]
    assert not (tmp_path / "two/shards").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ask", "red?", "--train_file", "x.jsonl"], "index, ask: images of an index are no data to train"),
        (["--ask", "red?", "--do_predict"], "do_predict: images of an index are searched or asked"),
        (["--index", "x", "--generate"], "generate: answers come from no list.*leave out index"),
        (["--answer", "yes"], "answer: got 'yes', but nothing is asked; give --ask"),
        (["--ask", "red?", "--top_k", "0"], "top_k: expected at least 1"),
    ],
)
def test_flags_of_a_collection_that_cannot_work_are_named(more, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main([*more, "--use_cpu", "--output_dir", str(tmp_path / "out")])


# Answers in words


def test_answers_are_written_in_words(data, tmp_path, capsys):
    out = tmp_path / "out"
    results = main(flags(data, out, "--generate", "--num_beams", "2", "--max_new_tokens", "4"))
    promised = ["config.json", "generation_config.json", "README.md", "results.json", "predictions.jsonl", *CODE]
    assert {*promised, "training.png", "predictions.png"} <= {path.name for path in out.iterdir()}
    assert "num_answers" not in results
    rows = read_lines(out / "predictions.jsonl")
    assert [row["question"] for row in rows] == [row["question"] for row in read_lines(data / "test.jsonl")]
    assert all(len(row["predictions"]) == 3 and all(one["answer"] for one in row["predictions"]) for row in rows)
    assert results["test"]["accuracy"] == sum(row["correct"] for row in rows) / len(rows)
    assert results["test"]["loss"] > 0 and results["test"]["majority_answer"]
    assert "test accuracy: " in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "in words, from no list" in card

    write = pipeline("image-text-to-text", model=str(out), trust_remote_code=True)
    for row in rows[:3]:
        (said,) = write(images=str(data / row["image"]), text=row["question"], return_full_text=False)
        assert said["generated_text"]

    # It is measured as it is, and is no classifier.
    base = ["--model_name_or_path", str(out), "--do_predict", "--use_cpu", "--test_file", str(data / "test.jsonl")]
    again = main([*base, "--generate", "--output_dir", str(tmp_path / "again")])
    first = lambda row: [one["answer"] for one in row["predictions"]]
    assert [first(row) for row in read_lines(tmp_path / "again/predictions.jsonl")] == [first(row) for row in rows]
    assert again["settings"]["max_new_tokens"] == 4
    with pytest.raises(ValueError, match="a checkpoint of HiViLTForConditionalGeneration, expected HiViLTForQuestionA"):
        main([*base, "--output_dir", str(tmp_path / "none")])


@pytest.mark.parametrize(
    "more", [["--answer_file", "answers.txt"], ["--max_answers", "5"], ["--calibrate"]], ids=lambda more: more[0]
)
def test_what_needs_a_list_of_answers_does_not_go_with_writing(data, tmp_path, more):
    with pytest.raises(ValueError, match=f"^generate: answers come from no list.*leave out {more[0][2:]}"):
        main(flags(data, tmp_path / "out", "--generate", *more))
