"""`run_retrieval.py` from the command line to its output folder, on a miniature of every layout it reads."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import ViTImageProcessorPil, ViTModel, pipeline

from caption_miniatures import make_caption_files, make_caption_miniature, short_caption
from hivilt import HiViLTForRetrieval
from hivilt.data.caption_benchmarks import CAPTION_BENCHMARKS
from hivilt.run_retrieval import main
from hivilt.search import ImageIndex
from hivilt.tasks.arguments import RetrievalArguments
from processes import launch
from tiny import CODE, VISION_CONFIGS, make_image, make_model, make_processor, read_lines

COLORS = ["red", "blue", "green", "white", "yellow", "black"]
TINY = {"hidden_size": 16, "num_attention_heads": 2, "fusion_intermediate_size": 16, "dropout": 0.0}


@pytest.fixture
def data(tmp_path):
    """The folder of `make_caption_files`."""
    make_caption_files(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def karpathy(tmp_path):
    """Karpathy's layout of COCO over invented images: 6 to train on, 2 of restval, 3 to choose by, 5 to test."""
    splits = ["train"] * 6 + ["restval"] * 2 + ["val"] * 3 + ["test"] * 5
    images = []
    for number, split in enumerate(splits):
        name, folder = f"COCO_{number:012d}.jpg", "train2014" if split == "train" else "val2014"
        (tmp_path / "coco" / folder).mkdir(parents=True, exist_ok=True)
        make_image(COLORS[number % 6]).save(tmp_path / "coco" / folder / name)
        said = [short_caption(number, turn) for turn in range(3)][: 3 if number % 2 else 2]
        sentences = [
            {"raw": raw, "tokens": raw.split(), "imgid": number, "sentid": turn} for turn, raw in enumerate(said)
        ]
        images.append(
            {"filename": name, "filepath": folder, "split": split, "imgid": number, "cocoid": 900 + number}
            | {"sentences": sentences, "sentids": list(range(len(said)))}
        )
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return ["--karpathy_file", str(tmp_path / "dataset_coco.json"), "--image_dir", str(tmp_path / "coco")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A saved retrieval model that has learned nothing."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model(HiViLTForRetrieval, weight_scale=8.0).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return str(folder)


def files(data, splits=("train", "validation", "test")):
    return [part for split in splits for part in (f"--{split}_file", str(data / f"{split}.jsonl"))]


def flags(out, *more):
    return [
        *("--output_dir", str(out), "--fusion", json.dumps(TINY), "--image_size", "32", "--use_cpu"),
        *("--disable_tqdm", "true", "--rerank_k", "3", "--max_steps", "2", "--logging_steps", "1"),
        *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "2"),
        *("--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "2", "--save_steps", "2", *more),
    ]


def test_leaves_all_it_promises(data, tmp_path, monkeypatch, capsys, drawn):
    out = tmp_path / "outputs/tiny"
    monkeypatch.chdir(tmp_path)
    results = main([*files(data), *flags(Path("outputs/tiny"))])
    promised = ["config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "README.md"]
    promised += CODE
    promised += ["results.json", "predictions.jsonl", "training.png", "retrieval.png", "trainer_state.json"]
    assert set(promised) <= {path.name for path in out.iterdir()}
    for name in ("training.png", "retrieval.png"):
        Image.open(out / name).verify()

    # predictions.jsonl: each query once, in order, and the recalls that are reported follow from it.
    given, found = read_lines(data / "test.jsonl"), read_lines(out / "predictions.jsonl")
    captions = [(row["image"], said) for row in given for said in row["caption"]]
    assert [(row["image"], row["caption"]) for row in found[:-7]] == captions
    assert [row["image"] for row in found[-7:]] == [row["image"] for row in given]
    assert all(sorted(row["images"]) == sorted(one["image"] for one in given) for row in found[:-7])
    recall = sum(row["images"][0] == row["image"] for row in found[:-7]) / len(captions)
    assert results["test"]["text_to_image_recall@1"] == recall == sum(row["correct"] for row in found[:-7]) / 13
    own = {row["image"]: row["caption"] for row in given}
    recall = sum(row["captions"][0] in own[row["image"]] for row in found[-7:]) / 7
    assert results["test"]["image_to_text_recall@1"] == recall

    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["data"]["test"]["images"] == results["test"]["num_images"] == 7
    assert results["data"]["test"]["captions"] == results["test"]["num_captions"] == 13
    assert results["data"]["test"]["chance"]["text_to_image_recall@1"] == pytest.approx(1 / 7)
    assert results["train"]["captions"] == 8
    for stage in ("encode", "search", "rerank"):
        assert results["test"][f"{stage}_seconds"] > 0
    printed = capsys.readouterr().out
    for split in ("validation", "test"):
        assert f"{split}: R@K in percent" in printed
    assert re.search(r"\| re-ranked +\|( +\d+\.\d \|){7}", printed)


def test_zero_shot_scores_are_those_of_the_embeddings(checkpoint):
    labels = ["red circle", "blue square", "image"]
    image = make_image("blue")
    classify = pipeline("zero-shot-image-classification", model=checkpoint, trust_remote_code=True)
    said = {one["label"]: one["score"] for one in classify(image, candidate_labels=labels, hypothesis_template="{}")}
    model = HiViLTForRetrieval.from_pretrained(checkpoint).eval()
    inputs = make_processor()(images=[image], text=labels, return_tensors="pt")
    del inputs["image_index"]
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.softmax(-1)[0]
    assert [said[label] for label in labels] == pytest.approx(expected.tolist(), abs=1e-5)


def test_karpathy_files_run_through_the_same_command(karpathy, tmp_path):
    results = main([*karpathy, *flags(tmp_path / "out")])
    assert {split: results["data"][split]["images"] for split in ("train", "validation", "test")} == {
        "train": 8,
        "validation": 3,
        "test": 5,
    }
    assert results["data"]["name"] == "dataset_coco"
    assert results["test"]["num_captions"] == 13
    assert [row["image"] for row in read_lines(tmp_path / "out/predictions.jsonl")[-5:]] == [
        str(911 + number) for number in range(5)
    ]


@pytest.mark.parametrize(
    "name",
    [name if name == "flickr8k" else pytest.param(name, marks=pytest.mark.slow) for name in CAPTION_BENCHMARKS],
)
def test_named_benchmarks_train_evaluate_and_predict(name, tmp_path, capsys):
    make_caption_miniature(name, tmp_path / "data")
    asked = ["--benchmark", name, "--data_dir", str(tmp_path / "data"), "--do_train", "--do_eval", "--do_predict"]
    results = main([*asked, *flags(tmp_path / "out")])
    assert results["data"]["name"] == CAPTION_BENCHMARKS[name].title
    for split in ("validation", "test"):
        least = 3 if split in CAPTION_BENCHMARKS[name].splits else 1  # of those held out
        assert results["data"][split]["images"] == results[split]["num_images"] >= least
        assert results["data"][split]["captions"] == results[split]["num_captions"]
        assert 0 <= results[split]["mean_recall"] <= 1
    assert "num_folds" not in results["test"]  # the miniature has fewer than two thousand images
    assert f"test: R@K in percent, {results['test']['num_images']} images" in capsys.readouterr().out


def test_folds_have_a_table_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(CAPTION_BENCHMARKS, "coco", replace(CAPTION_BENCHMARKS["coco"], fold_size=2))
    make_caption_miniature("coco", tmp_path / "data")
    asked = ["--benchmark", "coco", "--data_dir", str(tmp_path / "data")]
    results = main([*asked, *flags(tmp_path / "out")])
    assert results["data"]["train"]["images"] == 10  # restval among them
    assert results["test"]["num_folds"] == 2
    printed = capsys.readouterr().out
    assert "Mean over 2 folds of 2 images" in printed
    shown = f"{100 * results['test']['fold_text_to_image_recall@1']:.1f}"
    assert shown in printed.split("test: R@K")[1].split("Mean over")[1]
    assert "Mean over 2 folds" in ModelCard.load(tmp_path / "out/README.md").text


def test_a_benchmark_has_the_shortlist_of_its_field(tmp_path):
    asked = ["--benchmark", "flickr30k", "--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    args, _ = RetrievalArguments.parse(asked)
    assert args.rerank_k == 128


def test_image_folder_with_metadata(data, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for split in ("train", "test"):
        rows = read_lines(data / f"{split}.jsonl")
        lines = [
            json.dumps({"file_name": Path(row["image"]).name, "text": said})
            for row in rows
            for said in row["caption"][:1]
        ]
        (data / split / "metadata.jsonl").write_text("\n".join(lines))
    for name in ("validation",):
        shutil.rmtree(data / name)
    results = main(["--data_dir", str(data), "--caption_column", "text", *flags(tmp_path / "out")])
    assert {split: results["data"][split]["images"] for split in ("train", "validation", "test")} == {
        "train": 9,
        "validation": 1,
        "test": 7,
    }


@pytest.mark.slow  # which draws all of it; training/test_cards.py reads its miniature
def test_without_arguments_it_reads_openmoji(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few = ("--max_train_samples", "8", "--max_eval_samples", "4", "--max_predict_samples", "6")
    results = main(flags(tmp_path / "out", *few))
    assert results["data"]["name"] == "OpenMoji"
    assert results["data"]["test"]["images"] == 6


@pytest.mark.parametrize("more", [(), ("--rerank_k", "0")], ids=["re-ranked", "embeddings alone"])
def test_a_checkpoint_can_be_measured(data, tmp_path, checkpoint, more, capsys):
    base = ["--model_name_or_path", checkpoint, "--use_cpu", "--disable_tqdm", "true", "--rerank_k", "3"]
    results = main([*base, *files(data), "--do_eval", "--do_predict", "--output_dir", str(tmp_path / "out"), *more])
    assert "train" not in results and not (tmp_path / "out/README.md").exists()
    printed = capsys.readouterr().out
    assert ("re-ranked" in printed) == (more == ())
    assert results["test"]["embedding_mean_recall"] > 0
    assert ("fused_mean_recall" in results["test"]) == (more == ())


def test_resuming_continues_exactly(data, tmp_path):
    more = ("--max_steps", "4", "--captions_per_image", "2", "--save_total_limit", "3")
    first = main([*files(data), *flags(tmp_path / "again", *more)])
    shutil.rmtree(tmp_path / "again/checkpoint-4")
    second = main([*files(data), *flags(tmp_path / "again", *more, "--resume_from_checkpoint", "last")])
    assert second["test"]["loss"] == pytest.approx(first["test"]["loss"], rel=1e-6)


def test_resuming_on_changed_captions_keeps_the_tokens(data, tmp_path):
    """A tokenizer is trained on the captions: with others, words would have other numbers, over the old embeddings."""
    main([*files(data), *flags(tmp_path / "out")])
    before = read_lines(tmp_path / "out/predictions.jsonl")
    rows = read_lines(data / "train.jsonl")
    rows[0]["caption"] = ["a zebra crossing in white snow, white snow, white snow"]
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main([*files(data), *flags(tmp_path / "again", "--resume_from_checkpoint", str(tmp_path / "out/checkpoint-2"))])
    assert read_lines(tmp_path / "again/predictions.jsonl") == before
    tokens = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("out", "again")]
    assert tokens[0] == tokens[1]


def test_batches_of_one_train(data, tmp_path):
    more = ("--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "1", "--contrastive_chunk_size", "1")
    more += ("--image_size", "64")  # batch norm needs more than one value
    results = main([*files(data), *flags(tmp_path / "out", *more)])
    assert results["train"]["captions"] == 2


def test_one_image_with_all_captions(data, tmp_path):
    few = ("--max_eval_samples", "1", "--max_predict_samples", "1", "--max_train_samples", "3")
    results = main([*files(data), *flags(tmp_path / "out", *few, "--captions_per_image", "3")])
    assert results["test"]["image_to_text_recall@1"] == results["test"]["text_to_image_recall@1"] == 1


# Search


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for color in COLORS:
        make_image(color).save(folder / f"{color}.png")
    return folder


def search_flags(checkpoint, out):
    return ["--model_name_or_path", checkpoint, "--output_dir", str(out), "--use_cpu"]


def test_index_then_query_by_words_and_by_image(images, checkpoint, tmp_path, capsys, drawn):
    main(["--index", str(images), *search_flags(checkpoint, tmp_path / "index")])
    assert "6 images" in capsys.readouterr().out
    index = ImageIndex.load(tmp_path / "index", HiViLTForRetrieval.from_pretrained(checkpoint).eval(), make_processor())

    # The index knows its checkpoint.
    (hits,) = main(["--query", "red circle", "--output_dir", str(tmp_path / "index"), "--use_cpu", "--top_k", "4"])
    assert hits == index.search("red circle", top_k=4)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4
    for rank, (line, hit) in enumerate(zip(printed, hits, strict=True), 1):
        assert line.split() == [str(rank), f"{hit.score:.4f}", str(hit.path)]
    Image.open(tmp_path / "index/search.png").verify()

    image = ["--query", str(images / "blue.png"), "--output_dir", str(tmp_path / "index"), "--use_cpu"]
    assert main(image)[0][0].path.name == "blue.png"
    (reranked,) = main(["--query", "red circle", "--output_dir", str(tmp_path / "index"), "--use_cpu", "--rerank"])
    assert reranked == index.search("red circle", rerank_k=16)

    capsys.readouterr()
    assert RetrievalArguments(query="red circle").query == ["red circle"]
    several = main(["--query", "red circle", "blue", "--output_dir", str(tmp_path / "index"), "--use_cpu"])
    assert several == [index.search("red circle"), index.search("blue")]
    assert [line for line in capsys.readouterr().out.splitlines() if line in ("red circle", "blue")] == [
        "red circle",
        "blue",
    ]


def test_an_index_is_named_as_its_folder_or_as_output_dir_and_states_stay(images, checkpoint, tmp_path):
    index, out = tmp_path / "index", tmp_path / "out"
    main(["--index", str(images), "--keep_states", *search_flags(checkpoint, index)])
    asked = ["--query", "red circle", "--rerank", "--use_cpu", "--output_dir"]
    assert main([*asked, str(index)]) == main(["--index", str(index), *asked, str(out)])
    assert [path.name for path in out.iterdir()] == ["search.png"]
    main(["--index", str(images), *search_flags(checkpoint, index)])
    assert json.loads((index / "index.json").read_text())["level_shapes"]
    with pytest.raises(ValueError, match="states of 6 images take .*--states_gb"):
        main(["--index", str(images), "--states_gb", "1e-9", *search_flags(checkpoint, index)])


def test_images_found_that_are_gone_are_told_and_not_drawn(images, checkpoint, tmp_path, caplog, drawn):
    main(["--index", str(images), *search_flags(checkpoint, tmp_path / "index")])
    (images / "red.png").unlink()
    (hits,) = main(["--query", "red circle", *search_flags(checkpoint, tmp_path / "index")])
    assert len(hits) == 6
    assert "1 of the 6 images found, red.png first, are gone or have changed" in caplog.text
    Image.open(tmp_path / "index/search.png").verify()


def test_an_index_of_another_checkpoint_is_refused(images, checkpoint, tmp_path):
    main(["--index", str(images), *search_flags(checkpoint, tmp_path / "index")])
    make_model(HiViLTForRetrieval, seed=1).save_pretrained(tmp_path / "other")
    make_processor().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="made by another checkpoint.*load the checkpoint that made it"):
        main(["--query", "red", *search_flags(str(tmp_path / "other"), tmp_path / "index")])


def test_bad_images_stop_the_index_or_are_listed(images, checkpoint, tmp_path):
    (images / "broken.png").write_bytes(b"no image")
    command = ["--index", str(images), *search_flags(checkpoint, tmp_path / "index")]
    with pytest.raises(ValueError, match="broken.png.*--on_bad_image skip"):
        main(command)
    main([*command, "--on_bad_image", "skip"])
    info = json.loads((tmp_path / "index/index.json").read_text())
    assert info["num_images"] == 6 and [one["image"] for one in info["skipped"]] == ["broken.png"]


def test_queries_that_are_neither_words_nor_an_image(images, checkpoint, tmp_path):
    (images / "notes.txt").write_text("words")
    main(["--index", str(images), *search_flags(checkpoint, tmp_path / "index")])
    for query, error, message in [
        ("  ", ValueError, "the text is empty"),
        ("nowhere/image.png", FileNotFoundError, "There is no image file 'nowhere/image.png'"),
        ("nowhere/IMG_1.HEIC", FileNotFoundError, "There is no image file 'nowhere/IMG_1.HEIC'"),
        (str(images), ValueError, "is a folder.*--index"),
        ("https://example.org/cat.jpg", ValueError, "'https://example.org/cat.jpg' is a web address"),
        (f"{images}/notes.txt", ValueError, "not a readable image"),
    ]:
        with pytest.raises(error, match=message):
            main(["--query", query, *search_flags(checkpoint, tmp_path / "index")])


def test_there_is_no_index_to_search(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not hold an index"):
        main(["--query", "red", *search_flags(checkpoint, tmp_path)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no image file"):
        main(["--index", str(tmp_path / "empty"), *search_flags(checkpoint, tmp_path / "index")])


# Two processes


@pytest.mark.slow  # test_losses_hivilt.py and test_run_vqa.py have two as well
def test_two_processes_do_what_one_does(data, tmp_path):
    """Two processes with batches of two images train as one with four, and rank every query once, in order.

    With an encoder that treats each image by itself, with all negatives, of which each process would draw its own, and
    with as many images to choose by as fill the batches, since negatives come from all processes there, too.
    """
    ViTModel(VISION_CONFIGS["vit"]()).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 20, "width": 20}).save_pretrained(tmp_path / "vit")
    more = ("--vision_model", str(tmp_path / "vit"), "--captions_per_image", "2", "--num_hard_negatives", "20")
    more += ("--max_eval_samples", "4", "--warmup_steps", "0")
    alone = main([*files(data), *flags(tmp_path / "one", *more, "--per_device_eval_batch_size", "4")])
    command = [*files(data), *flags(tmp_path / "two", *more, "--per_device_train_batch_size", "2")]
    printed = launch("hivilt.run_retrieval", 2, command)
    assert printed.count("test: R@K") == 1
    together = json.loads((tmp_path / "two/results.json").read_text())
    assert together["settings"]["world_size"] == 2
    assert together["train"]["captions"] == alone["train"]["captions"]
    histories = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("one", "two")
    ]
    for step in (0, 1):
        for name in ("loss", "contrastive_loss", "auxiliary_loss", "grad_norm"):
            assert histories[1][step][name] == pytest.approx(histories[0][step][name], rel=1e-4), (step, name)
    assert together["validation"]["loss"] == pytest.approx(alone["validation"]["loss"], rel=1e-4)
    for split in ("validation", "test"):
        for name, value in alone[split].items():
            if "recall" in name or name.startswith("num_"):
                assert together[split][name] == pytest.approx(value), (split, name)
    rankings = [read_lines(tmp_path / name / "predictions.jsonl") for name in ("one", "two")]
    assert rankings[0] == rankings[1]


# Bad input


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--caption_column", "description"], "no column 'description'.*--caption_column"),
        (["--karpathy_file", "x.json"], "one source, got karpathy_file and another"),
        (["--image_dir", "x"], "image_dir goes with karpathy_file"),
        (["--rerank_k", "-1"], "rerank_k: expected 0 or more"),
        (["--num_hard_negatives", "0"], "num_hard_negatives: expected at least 1"),
        (["--similar_per_batch", "0"], "similar_per_batch: expected at least 1"),
        (["--contrastive_chunk_size", "0"], "contrastive_chunk_size: expected at least 1"),
        (["--captions_per_image", "0"], "captions_per_image: expected at least 1"),
        (["--index", "x"], "index, query: images of an index are no data to train"),
        (["--query", "red"], "index, query: images of an index are no data to train"),
        (["--states_gb", "0"], "states_gb: expected more than 0"),
    ],
)
def test_arguments_that_cannot_work_are_named(data, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        main([*files(data), *flags(tmp_path / "out", *more)])


def test_nothing_to_evaluate(data, tmp_path):
    with pytest.raises(ValueError, match="give --model_name_or_path a checkpoint, or --do_train"):
        main(["--do_predict", *files(data, ["test"]), "--output_dir", str(tmp_path / "out")])


def test_missing_images_are_named_before_training(karpathy, tmp_path):
    shutil.rmtree(tmp_path / "coco/val2014")
    with pytest.raises(ValueError, match="of .* images are missing or unreadable"):
        main([*karpathy, *flags(tmp_path / "out")])


def test_calibrating_divides_both_scales_and_moves_no_image(data, tmp_path):
    """Of an image the softmax over a caption of its own and those of others, before and after."""
    more = [*files(data), "--max_steps", "2"]
    plain = main(flags(tmp_path / "plain", *more))
    found = main(flags(tmp_path / "found", *more, "--calibrate"))
    temperature = found["calibration"]["temperature"]
    before, after = (HiViLTForRetrieval.from_pretrained(tmp_path / name) for name in ("plain", "found"))
    for name in ("logit_scale", "matching_logit_scale"):
        scales = getattr(before, name).exp().item(), getattr(after, name).exp().item()
        assert scales[1] == pytest.approx(scales[0] / temperature, rel=1e-4)
    assert abs(temperature - 1) > 0.01 and found["calibration"]["num_candidates"] >= 2
    assert found["calibration"]["nll_after"] < found["calibration"]["nll_before"]
    recalls = [{name: value for name, value in run["test"].items() if "recall" in name} for run in (plain, found)]
    assert recalls[0] == recalls[1]
    assert (tmp_path / "found/predictions.jsonl").read_text() == (tmp_path / "plain/predictions.jsonl").read_text()
    card = " ".join((tmp_path / "found/README.md").read_text().split())
    assert f"divided by one temperature, {temperature:.4g}" in card
