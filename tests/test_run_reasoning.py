"""`run_reasoning.py` from the command line to its output folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForSequenceClassification, AutoProcessor, ViTImageProcessorPil, ViTModel, pipeline

from hivilt import HiViLTForImagesAndTextClassification, HiViLTForQuestionAnswering, HiViLTForRetrieval
from hivilt.data.reasoning_benchmarks import REASONING_BENCHMARKS
from hivilt.evaluation.reasoning import statement_scores, winoground_scores
from hivilt.run_reasoning import main
from processes import launch
from reasoning_miniatures import KINDS, make_reasoning_miniature, nlvr2_rows
from tiny import CODE, VISION_CONFIGS, make_image, make_model, make_processor, read_lines

TINY = {"hidden_size": 16, "num_attention_heads": 2, "fusion_intermediate_size": 16, "dropout": 0.0}
COLORS = ("red", "blue", "green", "yellow", "white")


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The flags that name train, validation and test files of 20, 8 and 10 statements about pairs of five images."""
    folder, given = tmp_path_factory.mktemp("data"), []
    for split, count in (("train", 20), ("validation", 8), ("test", 10)):
        (folder / split).mkdir()
        rows = []
        for number in range(count):
            pair = [(number + turn * (1 + number // 5)) % 5 for turn in (0, 1)]
            for place in pair:
                # Images of their own, as those of the test split are not to be seen in training.
                size = (31 + place, 23 + len(split))
                make_image(COLORS[place], size=size).save(folder / split / f"{place}.png")
            names = [f"{split}/{place}.png" for place in pair]
            said = ("both images are red", "one image is blue", "the left image is not the right one")[number % 3]
            rows.append({"images": names, "sentence": said, "label": (True, "false", "yes", 0)[number % 4]})
        given += [f"--{split}_file", write(folder / f"{split}.jsonl", rows)]
    return given


def flags(out, *more):
    return [
        *("--output_dir", str(out), "--fusion", json.dumps(TINY), "--image_size", "64", "--use_cpu"),
        *("--disable_tqdm", "true", "--max_steps", "2", "--logging_steps", "1"),
        *("--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "2"),
        *("--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "2", "--save_steps", "2", *more),
    ]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run of two steps: its folder, and what it gave."""
    out = tmp_path_factory.mktemp("outputs") / "reasoning"
    return out, main([*data, *flags(out, "--random_crop", "0.5", "--random_flip", "swap")])


def test_leaves_all_it_promises(data, tmp_path, capsys, drawn):
    out = tmp_path / "out"
    results = main([*data, *flags(out, "--calibrate")])
    promised = ["config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "README.md", *CODE]
    promised += ["results.json", "predictions.jsonl", "training.png", "predictions.png"]
    assert set(promised) <= {path.name for path in out.iterdir()}
    for name in ("training.png", "predictions.png"):
        Image.open(out / name).verify()

    # Each statement once, in order, and the scores that are reported follow from the labels.
    given, found = read_lines(data[-1]), read_lines(out / "predictions.jsonl")
    assert [(row["images"], row["sentence"]) for row in found] == [(row["images"], row["sentence"]) for row in given]
    assert [row["label"] for row in found] == [str(row["label"]).lower() for row in given]
    best = [row["predictions"][0]["answer"] for row in found]
    assert results["test"]["accuracy"] == statement_scores(best, [row["label"] for row in given])["accuracy"]
    assert [row["correct"] for row in found] == [
        (answer == "True") == (row["label"] in (True, "yes")) for answer, row in zip(best, given, strict=True)
    ]
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    facts = {"images": 5, "statements": 10, "images_of_a_statement": 2, "bad_images": []}
    assert results["data"]["test"] == facts and results["labels"] == ["False", "True"]
    assert results["test"]["accuracy_of_majority_label"] == 0.5
    printed = capsys.readouterr().out
    for split, count in (("validation", 8), ("test", 10)):
        assert f"{split}: accuracy {results[split]['accuracy']:.4f} on {count} statements" in printed

    card = ModelCard.load(out / "README.md")
    assert {one.metric_name: one.metric_value for one in card.data.eval_results} == {
        "accuracy": round(results["test"]["accuracy"], 6)
    }
    assert "![Statements and what the model makes of them](predictions.png)" in card.text
    assert (
        "which of False, True a sentence is of 2\nimages" in card.text and "Probabilities are calibrated" in card.text
    )


def test_the_checkpoint_opens_with_auto_class_and_pipeline_and_judges_the_same(trained, data):
    out, _ = trained
    model = AutoModelForSequenceClassification.from_pretrained(out, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(out, trust_remote_code=True)
    judge = pipeline("images-and-text-classification", model=str(out), trust_remote_code=True)
    for row in read_lines(out / "predictions.jsonl")[:3]:
        images = [str(Path(data[-1]).parent / name) for name in row["images"]]
        with torch.no_grad():
            outputs = model(**processor(images=[images], text=[row["sentence"]], return_tensors="pt"))
        (found,) = processor.post_process_question_answering(outputs.logits, top_k=2, config=model.config)
        expected = {best["answer"]: best["score"] for best in row["predictions"]}
        assert {best["answer"]: best["score"] for best in found} == pytest.approx(expected, abs=1e-5)
        found = judge(images, row["sentence"])
        assert {best["label"]: best["score"] for best in found} == pytest.approx(expected, abs=1e-5)


def test_a_checkpoint_is_measured_again_with_its_items_one_by_one(trained, data, tmp_path):
    out, before = trained
    base = ["--model_name_or_path", str(out), "--use_cpu", "--disable_tqdm", "true", "--do_predict", *data]
    again = main([*base, "--output_dir", str(tmp_path / "again"), "--per_device_eval_batch_size", "1"])
    assert "train" not in again and not (tmp_path / "again/README.md").exists()
    assert again["test"]["loss"] == pytest.approx(before["test"]["loss"], rel=1e-4)
    assert [row["predictions"] for row in read_lines(tmp_path / "again/predictions.jsonl")] == [
        [{**best, "score": pytest.approx(best["score"], rel=1e-4)} for best in row["predictions"]]
        for row in read_lines(out / "predictions.jsonl")
    ]


def test_statements_without_labels_are_judged(trained, data, tmp_path, capsys):
    out, _ = trained
    rows = [{name: row[name] for name in ("images", "sentence")} for row in read_lines(data[-1])]
    bare = write(Path(data[-1]).parent / "bare.jsonl", rows)
    base = ["--model_name_or_path", str(out), "--use_cpu", "--disable_tqdm", "true", "--test_file", bare]
    results = main([*base, "--do_predict", "--output_dir", str(tmp_path / "out")])
    found = read_lines(tmp_path / "out/predictions.jsonl")
    assert [row["predictions"][0]["answer"] for row in found] == [
        row["predictions"][0]["answer"] for row in read_lines(out / "predictions.jsonl")
    ]
    assert found[0]["label"] is None and {"loss", "accuracy"}.isdisjoint(results["test"])
    assert "accuracy" not in capsys.readouterr().out


def test_a_bad_image_is_named_and_its_whole_row_left_out_where_asked(data, tmp_path, caplog):
    rows, broken = read_lines(data[1]), str(tmp_path / "broken.png")
    Path(broken).write_text("no image")
    for row in rows:
        row["images"] = [str(Path(data[1]).parent / name) for name in row["images"]]
    rows[3]["images"][1], rows[5]["images"][0] = broken, str(tmp_path / "missing.png")
    given = ["--train_file", write(tmp_path / "train.jsonl", rows), *data[2:]]
    with pytest.raises(ValueError, match="broken.png.*on_bad_image skip"):
        main([*given, *flags(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    results = main([*given, *flags(tmp_path / "out", "--on_bad_image", "skip")])
    assert results["data"]["train"]["statements"] == 18 and len(results["data"]["train"]["bad_images"]) == 2
    assert "2 of 20" in caplog.text


def test_another_number_of_images_and_other_labels(data, tmp_path):
    """Three images, words for labels, and where it starts from a head that knows none of either."""
    rows = [
        {**row, "images": [*row["images"], row["images"][0]], "label": ("Neutral", "entails", "neutral ")[number % 3]}
        for number, row in enumerate(read_lines(data[1]))
    ]
    file = write(Path(data[1]).parent / "three.jsonl", rows)
    folder = tmp_path / "answering"
    make_model(HiViLTForQuestionAnswering).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    given = ["--train_file", file, "--validation_file", file, "--model_name_or_path", str(folder)]
    few = ["--max_steps", "1", "--eval_steps", "1", "--save_steps", "1"]
    usual = [flag for flag in flags(tmp_path / "out", *few) if flag not in ("--fusion", json.dumps(TINY))]
    results = main([*given, *usual])
    assert results["labels"] == ["entails", "Neutral"] and results["validation"]["num_statements"] == 20
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.config.num_images == 3
    with pytest.raises(ValueError, match="about 2 images each, but the model looks at 3 together"):
        main(
            [
                "--do_predict",
                "--model_name_or_path",
                str(tmp_path / "out"),
                *data[4:],
                "--output_dir",
                str(tmp_path / "x"),
            ]
        )
    with pytest.raises(
        ValueError, match="test: statement '0' has the label 'true', but the model knows 'entails', 'neutral'"
    ):
        pairs = [{**row, "images": [*row["images"], row["images"][0]]} for row in read_lines(data[-1])]
        file = write(Path(data[1]).parent / "pairs.jsonl", pairs)
        main(
            [
                *("--do_predict", "--model_name_or_path", str(tmp_path / "out"), "--test_file", file, "--use_cpu"),
                *("--output_dir", str(tmp_path / "x"), "--disable_tqdm", "true"),
            ]
        )


def test_of_some_of_its_labels_a_checkpoint_keeps_all(data, tmp_path, caplog):
    labels = ["contradicts", "entails", "neutral"]
    make_model(HiViLTForImagesAndTextClassification, id2label=dict(enumerate(labels))).save_pretrained(
        tmp_path / "three"
    )
    make_processor().save_pretrained(tmp_path / "three")
    rows = [{**row, "label": labels[1 + number % 2]} for number, row in enumerate(read_lines(data[1]))]
    file = write(Path(data[1]).parent / "two_of_three.jsonl", rows)
    usual = flags(tmp_path / "out", "--max_steps", "1", "--eval_steps", "1", "--save_steps", "1")
    usual = [flag for flag in usual if flag not in ("--fusion", json.dumps(TINY))]
    given = ["--model_name_or_path", str(tmp_path / "three"), "--train_file", file, "--validation_file", file]
    assert main([*given, *usual])["labels"] == labels
    assert "Of the 3 labels that the checkpoint knows the training data has 2; all are kept." in caplog.text


def test_beside_a_new_label_a_checkpoint_keeps_what_it_knows_of_the_others(data, tmp_path):
    start = make_model(HiViLTForImagesAndTextClassification, id2label={0: "True", 1: "False"})
    start.save_pretrained(tmp_path / "two")
    make_processor().save_pretrained(tmp_path / "two")
    said = ("true", "unsure", "no")
    rows = [{**row, "label": said[number % 3]} for number, row in enumerate(read_lines(data[1]))]
    file = write(Path(data[1]).parent / "unsure.jsonl", rows)
    usual = flags(
        tmp_path / "out", "--max_steps", "1", "--eval_steps", "1", "--save_steps", "1", "--learning_rate", "0"
    )
    usual = [flag for flag in usual if flag not in ("--fusion", json.dumps(TINY))]
    given = ["--model_name_or_path", str(tmp_path / "two"), "--train_file", file, "--validation_file", file]
    assert main([*given, *usual])["labels"] == ["no", "true", "unsure"]
    model = HiViLTForImagesAndTextClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(model.answer_head.weight[:2], start.answer_head.weight.flip(0))


def test_letters_that_are_no_truth_values_are_new_labels(data, tmp_path):
    """N beside T and F is not the "no" of a checkpoint that knows true and false."""
    make_model(HiViLTForImagesAndTextClassification, id2label={0: "False", 1: "True"}).save_pretrained(tmp_path / "two")
    make_processor().save_pretrained(tmp_path / "two")
    rows = [{**row, "label": "TFN"[number % 3]} for number, row in enumerate(read_lines(data[1]))]
    file = write(Path(data[1]).parent / "letters.jsonl", rows)
    usual = flags(tmp_path / "out", "--max_steps", "1", "--eval_steps", "1", "--save_steps", "1")
    usual = [flag for flag in usual if flag not in ("--fusion", json.dumps(TINY))]
    given = ["--model_name_or_path", str(tmp_path / "two"), "--train_file", file, "--validation_file", file]
    assert main([*given, *usual])["labels"] == ["F", "N", "T"]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_label_that_is_not_learned_stops_a_run_before_it_trains(data, tmp_path, split):
    place = data.index(f"--{split}_file") + 1
    rows = [
        {**row, "label": "maybe" if number == 3 else row["label"]} for number, row in enumerate(read_lines(data[place]))
    ]
    file = write(Path(data[place]).parent / "maybe.jsonl", rows)
    with pytest.raises(ValueError, match=f"{split}: statement '3' has the label 'maybe', but the model knows"):
        main([*data[:place], file, *data[place + 1 :], *flags(tmp_path / "out")])
    assert not list(tmp_path.glob("out/*.safetensors")) and not list(tmp_path.glob("out/checkpoint-*"))


@pytest.mark.slow  # as test_run_vqa.py and test_run_retrieval.py hold
def test_resuming_continues_exactly(data, tmp_path):
    more = ("--max_steps", "4", "--save_total_limit", "3", "--random_crop", "0.5")
    first = main([*data, *flags(tmp_path / "out", *more)])
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    again = [*data, *flags(tmp_path / "out", *more, "--resume_from_checkpoint", "last")]
    second = main(again)
    assert second["train"]["resumed_at_step"] == 2
    assert second["test"]["loss"] == pytest.approx(first["test"]["loss"], rel=1e-6)


def test_labels_of_a_run_that_goes_on_are_those_of_before(trained, data, tmp_path):
    out, _ = trained
    rows = [{**row, "label": ("a", "b")[number % 2]} for number, row in enumerate(read_lines(data[1]))]
    file = write(Path(data[1]).parent / "other.jsonl", rows)
    given = ["--train_file", file, "--validation_file", file, "--resume_from_checkpoint", str(out / "checkpoint-2")]
    with pytest.raises(ValueError, match="knows the labels 'False', 'True', but this run's are 'a', 'b'"):
        main([*given, *flags(tmp_path / "out")])


def test_without_data_pairs_are_drawn(tmp_path):
    few = [f"--max_{name}_samples" for name in ("train", "eval", "predict")]
    more = [
        "--num_train_epochs",
        "3",
        "--max_steps",
        "1",
        "--eval_steps",
        "1",
        "--save_steps",
        "1",
        few[0],
        "30",
        few[1],
        "20",
        few[2],
        "36",
    ]
    results = main(flags(tmp_path / "out", *more))
    assert (results["data"]["name"], results["settings"]["benchmark"]) == ("drawn pairs", "pairs")
    assert [results["data"][split]["statements"] for split in ("train", "validation", "test")] == [30, 20, 36]
    rows = read_lines(tmp_path / "out/predictions.jsonl")
    assert len(rows) == 36 and {row["kind"] for row in rows} == set(results["test"]["by_kind"])
    assert results["test"]["num_groups"] == len({row["group"] for row in rows})


def test_a_run_that_learns_only_what_comes_first_says_so(tmp_path, caplog):
    few = ["--max_train_samples", "30", "--max_eval_samples", "20", "--do_train"]
    main(flags(tmp_path / "out", "--num_train_epochs", "1", "--max_steps", "-1", *few))
    assert "steps have what is to be learned first" in caplog.text


@pytest.mark.parametrize("name", ["nlvr2", pytest.param("nlvr", marks=pytest.mark.slow)])
def test_named_benchmarks_train_evaluate_and_predict(name, tmp_path):
    make_reasoning_miniature(name, tmp_path / "data")
    results = main(["--benchmark", name, "--data_dir", str(tmp_path / "data"), *flags(tmp_path / "out")])
    assert results["data"]["name"] == REASONING_BENCHMARKS[name].title
    assert results["data"]["train"]["images_of_a_statement"] == {"nlvr2": 2, "nlvr": 1}[name]
    rows = read_lines(tmp_path / "out/predictions.jsonl")
    assert results["test"]["num_statements"] == len(rows) and 0 <= results["test"]["consistency"] <= 1
    if name == "nlvr2":
        assert [row["statement_id"] for row in rows] == [row["identifier"] for row in nlvr2_rows("test1")]


@pytest.mark.parametrize("name", ["winoground", "sugarcrepe"])
def test_a_checkpoint_of_retrieval_is_measured_on_what_asks_for_matches(name, tmp_path, capsys, drawn):
    make_reasoning_miniature(name, tmp_path / "data")
    make_model(HiViLTForRetrieval, weight_scale=6.0).save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    given = ["--benchmark", name, "--data_dir", str(tmp_path / "data"), "--model_name_or_path", str(tmp_path / "model")]
    results = main([*given, "--output_dir", str(tmp_path / "out"), "--use_cpu", "--disable_tqdm", "true"])
    rows, printed = read_lines(tmp_path / "out/predictions.jsonl"), capsys.readouterr().out
    assert len(rows) == results["test"]["num_examples"] == results["data"]["test"]["examples"]
    assert {"train", "validation"}.isdisjoint(results)
    Image.open(tmp_path / "out/predictions.png").verify()
    for stage, title in (("embedding_", "embeddings"), ("fused_", "fusion alone"), ("", "both")):
        scores = [row[f"{stage}scores"] for row in rows]
        if name == "winoground":
            expected = winoground_scores(scores)
            told = f"{title}: text score {expected['text_score']:.4f}, image score {expected['image_score']:.4f}, "
            assert f"{told}group score {expected['group_score']:.4f}" in printed
            assert {key: results["test"][f"{stage}{key}"] for key in expected} == expected
        else:
            assert set(results["test"][f"{stage}by_kind"]) == set(KINDS)
            assert f"{title}: accuracy {results['test'][f'{stage}accuracy']:.4f}" in printed
    for more, message in (("--do_train", "needs train"), ("--calibrate", f"calibrate: {name} has no validation data")):
        with pytest.raises(ValueError, match=message):
            main([*given, "--output_dir", str(tmp_path / "other"), more])


@pytest.mark.slow
def test_two_processes_do_what_one_does(data, tmp_path):
    """Two processes with batches of an item train as one with two, and judge every statement once, in order. With an encoder
    that treats each image by itself, of items that are as large."""
    ViTModel(VISION_CONFIGS["vit"]()).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 20, "width": 20}).save_pretrained(tmp_path / "vit")
    rows = []
    for row in read_lines(data[1])[:4]:
        for copy in range(3):
            names = [f"{copy}-{Path(name).name}" for name in row["images"]]
            for name in names:
                if not (Path(data[1]).parent / name).exists():
                    source = Path(data[1]).parent / "train" / name.partition("-")[2]
                    shutil.copy(source, Path(data[1]).parent / name)
            rows.append({**row, "images": names})
    train = write(Path(data[1]).parent / "copies.jsonl", rows)
    given = ["--train_file", train, *data[2:]]
    more = ("--vision_model", str(tmp_path / "vit"), "--warmup_steps", "0", "--max_steps", "1", "--eval_steps", "1")
    more += ("--save_steps", "1")
    alone = main([*given, *flags(tmp_path / "one", *more, "--per_device_train_batch_size", "2")])
    printed = launch("hivilt.run_reasoning", 2, [*given, *flags(tmp_path / "two", *more)])
    assert printed.count("test: accuracy") == 1
    together = json.loads((tmp_path / "two/results.json").read_text())
    assert together["settings"]["world_size"] == 2
    assert together["train"]["statements"] == alone["train"]["statements"]
    for split in ("validation", "test"):
        for name in ("loss", "accuracy", "num_statements"):
            assert together[split][name] == pytest.approx(alone[split][name], rel=1e-4), (split, name)
    pairs = zip(*(read_lines(tmp_path / name / "predictions.jsonl") for name in ("one", "two")), strict=True)
    for row, other in pairs:
        assert (row["images"], row["sentence"]) == (other["images"], other["sentence"])
        assert row["predictions"][0]["score"] == pytest.approx(other["predictions"][0]["score"], rel=1e-3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--images_column", "pictures"], "no column 'pictures'.*--images_column"),
        (["--sentence_column", "caption"], "no column 'caption'.*--sentence_column"),
        (["--label_column", "answer"], "no column 'answer'.*--label_column"),
        (["--metric_for_best_model", "cider_d"], "metric_for_best_model: got 'cider_d'.*accuracy"),
        (["--image_dir", "."], "image_dir goes with a benchmark"),
        (
            ["--first_epochs", "1"],
            "first_epochs: got 1, but the training data does not say what is to be learned first",
        ),
        (["--first_epochs", "-1"], "first_epochs: expected at least 0, got -1"),
    ],
)
def test_arguments_that_cannot_work_are_named(data, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        main([*data, *flags(tmp_path / "out"), *more])
    assert not list(tmp_path.glob("out/checkpoint-*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data_dir", "."], "leave out '.'"),
        (["--image_size", "32", "--max_train_samples", "1"], "image_size: expected at least 64"),
        (["--benchmark", "winoground"], "winoground measures a checkpoint of run_retrieval.py; name one"),
    ],
)
def test_arguments_that_benchmarks_cannot_work_with_are_named(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        main([*flags(tmp_path / "out"), "--benchmark", "pairs", *more])
