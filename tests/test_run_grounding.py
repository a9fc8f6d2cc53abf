"""`run_grounding.py` from the command line to its output folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, ViTImageProcessorPil, ViTModel, pipeline

from grounding_miniatures import SIZES, make_grounding_miniature
from hivilt.data.grounding_benchmarks import GROUNDING_BENCHMARKS
from hivilt.data.scenes import NUM_IMAGES
from hivilt.data.tables import open_image
from hivilt.evaluation.grounding import grounding_scores
from hivilt.run_grounding import main
from hivilt.tasks.grounding import Grounding
from processes import launch
from tiny import CODE, VISION_CONFIGS, make_image, read_lines

TINY = {"hidden_size": 16, "num_attention_heads": 2, "fusion_intermediate_size": 16, "dropout": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The flags that name train, validation and test files of 10, 5 and 7 images, with one to three expressions each."""
    folder, given = tmp_path_factory.mktemp("data"), []
    for split, num_images in (("train", 10), ("validation", 5), ("test", 7)):
        rows = []
        for number in range(num_images):
            name = f"{split}/{number}.png"
            (folder / split).mkdir(exist_ok=True)
            make_image(("red", "blue", "green")[number % 3], size=(31 + number, 23)).save(folder / name)
            meant = {"the dark corner": [[0, 0, 10, 7]], "two halves": [[0, 0, 15, 23], [15, 0, 30, 23]], "a dog": []}
            for expression in list(meant)[: 1 + number % 3]:
                rows.append({"image": name, "expression": expression, "boxes": meant[expression]})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        given += [f"--{split}_file", str(folder / f"{split}.jsonl")]
    return given


def flags(out, *more):
    return [
        *("--output_dir", str(out), "--fusion", json.dumps(TINY), "--image_size", "64", "--use_cpu"),
        *("--disable_tqdm", "true", "--max_steps", "2", "--logging_steps", "1"),
        *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "2"),
        *("--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "2", "--save_steps", "2", *more),
    ]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run of two steps: its folder, and what it gave."""
    out = tmp_path_factory.mktemp("outputs") / "grounding"
    return out, main([*data, *flags(out, "--threshold", "0.01", "--random_crop", "0.5", "--random_flip", "swap")])


def test_leaves_all_it_promises(data, tmp_path, capsys, drawn):
    out = tmp_path / "out"
    results = main([*data, *flags(out)])
    promised = ["config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "README.md", *CODE]
    promised += ["results.json", "predictions.jsonl", "training.png", "grounding.png"]
    assert set(promised) <= {path.name for path in out.iterdir()}
    for name in ("training.png", "grounding.png"):
        Image.open(out / name).verify()

    # Each expression once, in order, in pixels, and the scores that are reported follow from the boxes.
    given, found = read_lines(data[-1]), read_lines(out / "predictions.jsonl")
    assert [(row["image"], row["expression"]) for row in found] == [(row["image"], row["expression"]) for row in given]
    for row, asked in zip(found, given, strict=True):
        assert sum(row["true_boxes"], []) == pytest.approx(sum(asked["boxes"], []))
        assert row["scores"] == sorted(row["scores"], reverse=True) and len(row["scores"]) == len(row["boxes"]) > 0
        width = 31 + int(Path(row["image"]).stem)
        assert all(0 <= box[0] <= box[2] <= width + 1e-3 and 0 <= box[1] <= box[3] <= 23.001 for box in row["boxes"])
    expected = grounding_scores(found, [row["true_boxes"] for row in found])
    assert {name: results["test"][name] for name in expected} == pytest.approx(expected)
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["data"]["test"] == {"images": 7, "expressions": 13, "bad_images": []}
    assert results["test"]["loss"] > 0 and "accuracy@0.5_of_mean_box" in results["test"]
    assert results["train"]["expressions"] > 8
    printed = capsys.readouterr().out
    for split, count in (("validation", 9), ("test", 13)):
        assert (
            f"{split}: Acc@0.5 {results[split]['accuracy@0.5']:.4f}, " in printed
            and f"on {count} expressions" in printed
        )

    card = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == "zero-shot-object-detection" and "visual-grounding" in card.data.tags
    assert {one.metric_name: one.metric_value for one in card.data.eval_results}["mean IoU"] == round(
        results["test"]["mean_iou"], 6
    )
    assert "![Expressions and the boxes that were found](grounding.png)" in card.text


def test_the_checkpoint_opens_with_auto_class_and_pipeline_and_finds_the_same(trained, data):
    out, _ = trained
    model = AutoModelForZeroShotObjectDetection.from_pretrained(out, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(out, trust_remote_code=True)
    find = pipeline("zero-shot-object-detection", model=str(out), trust_remote_code=True)
    for row in read_lines(out / "predictions.jsonl")[:3]:
        image = open_image(str(Path(data[-1]).parent / row["image"]))
        with torch.no_grad():
            outputs = model(**processor(images=image, text=[row["expression"]], return_tensors="pt"))
        size = [(image.height, image.width)]
        (found,) = processor.post_process_grounding(outputs, size, threshold=0.0, top_k=len(row["boxes"]))
        torch.testing.assert_close(found["boxes"], torch.tensor(row["boxes"]), atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(found["scores"], torch.tensor(row["scores"]), atol=1e-5, rtol=1e-4)
        best, *_ = find(image, candidate_labels=[row["expression"]], threshold=0.0)
        assert best["score"] == pytest.approx(row["scores"][0], rel=1e-4)
        assert list(best["box"].values()) == pytest.approx(row["boxes"][0], abs=1.01)  # cut to whole pixels


def test_a_checkpoint_is_measured_again_with_its_expressions_one_by_one(trained, data, tmp_path):
    out, before = trained
    base = ["--model_name_or_path", str(out), "--use_cpu", "--disable_tqdm", "true", "--do_predict", *data]
    base += ["--output_dir", str(tmp_path / "again"), "--threshold", "0.01"]
    again = main([*base, "--per_device_eval_batch_size", "1"])
    assert "train" not in again and not (tmp_path / "again/README.md").exists()
    for row, other in zip(
        read_lines(tmp_path / "again/predictions.jsonl"), read_lines(out / "predictions.jsonl"), strict=True
    ):
        assert row["scores"] == pytest.approx(other["scores"], rel=1e-4)
    for name in ("loss", "mean_iou", "target_accuracy"):
        assert again["test"][name] == pytest.approx(before["test"][name], rel=1e-4)


def test_expressions_without_boxes_are_looked_for(trained, data, tmp_path, capsys):
    out, _ = trained
    bare = Path(data[-1]).parent / "bare.jsonl"
    bare.write_text("\n".join(json.dumps({**row, "boxes": None}) for row in read_lines(data[-1])))
    base = ["--model_name_or_path", str(out), "--use_cpu", "--disable_tqdm", "true", "--test_file", str(bare)]
    results = main([*base, "--do_predict", "--output_dir", str(tmp_path / "out"), "--threshold", "0.01"])
    expected = [{**row, "true_boxes": None} for row in read_lines(out / "predictions.jsonl")]
    found = read_lines(tmp_path / "out/predictions.jsonl")
    assert [row["expression"] for row in found] == [row["expression"] for row in expected]
    assert found[0]["scores"] == pytest.approx(expected[0]["scores"], rel=1e-4) and found[0]["true_boxes"] is None
    assert {"loss", "accuracy@0.5"}.isdisjoint(results["test"]) and "Acc@0.5" not in capsys.readouterr().out


def test_boxes_of_other_forms_are_the_same(data):
    """Rows with middles and sizes in parts of the image, in columns of other names."""
    renamed, files = [], data[1::2]
    for flag, file in zip(data[::2], files, strict=True):
        rows = []
        for row in read_lines(file):
            width, height = 31 + int(Path(row["image"]).stem), 23
            boxes = [
                [
                    (left + right) / 2 / width,
                    (top + bottom) / 2 / height,
                    (right - left) / width,
                    (bottom - top) / height,
                ]
                for left, top, right, bottom in row["boxes"]
            ]
            rows.append({"image": row["image"], "said": row["expression"], "where": boxes})
        path = Path(file).with_name(f"other_{Path(file).name}")
        path.write_text("\n".join(map(json.dumps, rows)))
        renamed += [flag, str(path)]
    form = ("--box_form", "cxcywh", "--box_unit", "relative", "--expression_column", "said", "--boxes_column", "where")
    (_, expected), (_, found) = (
        Grounding(Grounding.arguments.parse([*given, "--use_cpu"])[0]).read(["train", "validation", "test"])
        for given in (data, [*renamed, *form])
    )
    assert list(found) == ["train", "validation", "test"]
    for split in found:
        for one, other in zip(found[split], expected[split], strict=True):
            assert one.expressions == other.expressions
            assert [sum(boxes, ()) for boxes in one.boxes] == [pytest.approx(sum(boxes, ())) for boxes in other.boxes]


@pytest.mark.slow  # as test_run_vqa.py and test_run_retrieval.py hold
def test_resuming_continues_exactly(data, tmp_path):
    more = ("--max_steps", "4", "--expressions_per_image", "2", "--save_total_limit", "3", "--random_crop", "0.5")
    first = main([*data, *flags(tmp_path / "out", *more)])
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    second = main([*data, *flags(tmp_path / "out", *more, "--resume_from_checkpoint", "last")])
    assert second["train"]["resumed_at_step"] == 2
    assert second["test"]["loss"] == pytest.approx(first["test"]["loss"], rel=1e-6)


def test_without_data_scenes_are_drawn(tmp_path):
    few = [f"--max_{name}_samples" for name in ("train", "eval", "predict")]
    more = ["--max_steps", "1", "--eval_steps", "1", "--save_steps", "1", few[0], "6", few[1], "3", few[2], "2"]
    results = main(flags(tmp_path / "out", *more))
    assert (results["data"]["name"], results["settings"]["benchmark"]) == ("drawn scenes", "scenes")
    assert {split: results["data"][split]["expressions"] for split in NUM_IMAGES} == {
        "train": 48,
        "validation": 24,
        "test": 16,
    }
    rows = read_lines(tmp_path / "out/predictions.jsonl")
    assert len(rows) == 16 and {row["kind"] for row in rows} == set(results["test"]["by_kind"])


@pytest.mark.parametrize(
    "name",
    [pytest.param("grefcoco", marks=pytest.mark.slow), "flickr30k-entities"],  # the other has more of its own
)
def test_named_benchmarks_train_evaluate_and_predict(name, tmp_path):
    make_grounding_miniature(name, tmp_path / "data")
    results = main(["--benchmark", name, "--data_dir", str(tmp_path / "data"), *flags(tmp_path / "out")])
    assert results["data"]["name"] == GROUNDING_BENCHMARKS[name].title
    assert results["data"]["train"]["images"] == SIZES[name]["train"]
    assert results["test"]["num_expressions"] == len(read_lines(tmp_path / "out/predictions.jsonl"))
    if name == "grefcoco":
        assert set(results["test"]["by_kind"]) == {"testA", "testB"}
    else:
        assert 0 <= results["test"]["recall@1"] <= results["test"]["recall@10"] <= 1
        assert results["settings"]["metric_for_best_model"] == "recall@1"


@pytest.mark.slow
def test_two_processes_do_what_one_does(data, tmp_path):
    """Two processes with batches of two images train as one with four, and look for every expression once, in order. With
    an encoder that treats each image by itself."""
    ViTModel(VISION_CONFIGS["vit"]()).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 20, "width": 20}).save_pretrained(tmp_path / "vit")
    more = ("--vision_model", str(tmp_path / "vit"), "--warmup_steps", "0", "--max_steps", "1", "--eval_steps", "1")
    alone = main([*data, *flags(tmp_path / "one", *more, "--save_steps", "1")])
    command = [*data, *flags(tmp_path / "two", *more, "--save_steps", "1", "--per_device_train_batch_size", "2")]
    printed = launch("hivilt.run_grounding", 2, command)
    assert printed.count("test: Acc@0.5") == 1
    together = json.loads((tmp_path / "two/results.json").read_text())
    assert together["settings"]["world_size"] == 2
    assert together["train"]["expressions"] == alone["train"]["expressions"]
    first, second = (
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"][0] for name in ("one", "two")
    )
    assert [second[name] for name in ("loss", "grad_norm")] == pytest.approx(
        [first["loss"], first["grad_norm"]], rel=1e-4
    )
    for split in ("validation", "test"):
        for name in ("loss", "mean_iou", "num_expressions"):
            assert together[split][name] == pytest.approx(alone[split][name], rel=1e-4), (split, name)
    pairs = zip(
        read_lines(tmp_path / "two/predictions.jsonl"), read_lines(tmp_path / "one/predictions.jsonl"), strict=True
    )
    for row, other in pairs:
        assert row["expression"] == other["expression"]
        assert row["scores"] == pytest.approx(other["scores"], rel=1e-3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--threshold", "1.5"], "threshold: expected a score from 0 to 1, got 1.5"),
        (["--calibrate"], "calibrate: scores of boxes are not calibrated"),
        (["--expressions_per_image", "0"], "expressions_per_image: expected at least 1"),
        (["--box_form", "xywh"], "which reaches .* beyond an image"),
        (["--box_form", "yolo"], "box_form"),
        (["--box_unit", "relative"], "these are probably pixels"),
        (["--expression_column", "caption"], "no column 'caption'.*--expression_column"),
        (["--boxes_column", "bbox"], "no column 'bbox'.*--boxes_column"),
        (["--metric_for_best_model", "cider_d"], "metric_for_best_model: got 'cider_d'.*accuracy@0.5.*mean_iou"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor: got 0.1, but boxes"),
        (["--image_dir", "."], "image_dir goes with a benchmark"),
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
        (["--box_unit", "relative"], "box_form, box_unit: got 'xyxy' and 'relative', but a benchmark's boxes"),
        (["--image_size", "32", "--max_train_samples", "1"], "image_size: expected at least 64"),
        (["--train_split", "all"], "official splits 'train', 'validation', 'test', got 'all'"),
    ],
)
def test_arguments_that_scenes_cannot_work_with_are_named(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        main([*flags(tmp_path / "out"), "--benchmark", "scenes", *more])
