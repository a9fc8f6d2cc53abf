"""`run_captioning.py` from the command line to its output folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    ViTImageProcessorPil,
    ViTModel,
    pipeline,
)

from caption_miniatures import SIZES, make_caption_files, make_caption_miniature
from hivilt import HiViLTForConditionalGeneration, HiViLTForRetrieval
from hivilt.data.caption_benchmarks import CAPTION_BENCHMARKS
from hivilt.evaluation.captioning import caption_scores
from hivilt.run_captioning import main
from processes import launch
from tiny import CODE, TEXT_CONFIGS, VISION_CONFIGS, make_image, make_model, make_processor, make_tokenizer, read_lines

TINY = {"hidden_size": 16, "num_attention_heads": 2, "fusion_intermediate_size": 16, "dropout": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The flags that name the files of `make_caption_files`."""
    return make_caption_files(tmp_path_factory.mktemp("data"))


def flags(out, *more):
    return [
        *("--output_dir", str(out), "--fusion", json.dumps(TINY), "--image_size", "32", "--use_cpu"),
        *("--disable_tqdm", "true", "--max_steps", "2", "--logging_steps", "1", "--max_new_tokens", "6"),
        *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "2"),
        *("--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "2", "--save_steps", "2", *more),
    ]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run of two steps with a frozen text encoder: its folder, and what it gave."""
    out = tmp_path_factory.mktemp("outputs") / "captioning"
    return out, main([*data, *flags(out, "--num_beams", "2", "--prompt", "the image shows", "--freeze", "text")])


def test_leaves_all_it_promises(data, tmp_path, capsys, drawn):
    out = tmp_path / "out"
    results = main([*data, *flags(out, "--num_beams", "2")])
    promised = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md", *CODE]
    promised += ["processor_config.json", "results.json", "predictions.jsonl", "training.png", "captions.png"]
    assert set(promised) <= {path.name for path in out.iterdir()}
    for name in ("training.png", "captions.png"):
        Image.open(out / name).verify()

    # Each image once, in order, and the scores that are reported follow from the captions.
    given, found = read_lines(data[-1]), read_lines(out / "predictions.jsonl")
    assert [(row["image"], row["captions"]) for row in found] == [(row["image"], row["caption"]) for row in given]
    assert all(row["caption"] for row in found)
    for name, score in caption_scores([r["caption"] for r in found], [r["captions"] for r in found]).items():
        assert results["test"][name] == pytest.approx(score)
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["data"]["test"]["images"] == results["test"]["num_images"] == 7
    assert results["data"]["test"]["captions"] == 13 and results["test"]["loss"] > 0
    assert results["train"]["captions"] == 8
    assert (results["settings"]["num_beams"], results["settings"]["prompt"]) == (2, "an image of")
    printed = capsys.readouterr().out
    for split, images in (("validation", 5), ("test", 7)):
        assert f"{split}: BLEU-1 " in printed and f"on {images} images" in printed
        assert f"CIDEr-D {results[split]['cider_d']:.3f}" in printed

    card = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text" and "image-captioning" in card.data.tags
    assert {one.metric_name: one.metric_value for one in card.data.eval_results}["CIDEr-D"] == round(
        results["test"]["cider_d"], 6
    )
    assert "![Images and the captions written about them](captions.png)" in card.text


def test_the_checkpoint_opens_with_auto_class_and_pipeline_and_writes_the_same(trained, data):
    out, _ = trained
    model = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(out, trust_remote_code=True)
    config = model.generation_config
    assert (config.num_beams, config.max_new_tokens, config.min_new_tokens) == (2, 6, 1)
    assert processor.decode(model.config.prompt_ids, skip_special_tokens=True) == "the image shows"
    write = pipeline("image-text-to-text", model=str(out), trust_remote_code=True)
    for row in read_lines(out / "predictions.jsonl")[:3]:
        image = str(Path(data[-1]).parent / row["image"])
        written = model.generate(**processor(images=image, return_tensors="pt"))  # without a text: the prompt
        assert processor.batch_decode(written, skip_special_tokens=True) == [row["caption"]]
        (said,) = write(images=image, text="the image shows", return_full_text=False)
        assert said["generated_text"] == row["caption"]
    with pytest.raises(ValueError, match="There is no image.* given alone as the text: .*`images=` and `text=`"):
        write(image)


def test_a_checkpoint_keeps_its_prompt_and_its_search_unless_told_otherwise(trained, data, tmp_path, caplog):
    out, before = trained
    base = ["--model_name_or_path", str(out), "--use_cpu", "--disable_tqdm", "true", "--do_predict", *data]
    again = main([*base, "--output_dir", str(tmp_path / "again")])
    assert "train" not in again and not (tmp_path / "again/README.md").exists() and "trains now" not in caplog.text
    assert read_lines(tmp_path / "again/predictions.jsonl") == read_lines(out / "predictions.jsonl")
    assert again["test"]["cider_d"] == pytest.approx(before["test"]["cider_d"])
    kept = {"prompt": "the image shows", "num_beams": 2, "max_new_tokens": 6}
    assert {name: again["settings"][name] for name in kept} == kept and "image_size" not in again["settings"]
    other = main([*base, "--output_dir", str(tmp_path / "other"), "--num_beams", "1", "--max_new_tokens", "1"])
    assert (other["settings"]["num_beams"], other["settings"]["max_new_tokens"]) == (1, 1)
    shorter = [row["caption"] for row in read_lines(tmp_path / "other/predictions.jsonl")]
    assert max(map(len, shorter)) < max(len(row["caption"]) for row in read_lines(out / "predictions.jsonl"))


def test_a_checkpoint_goes_on_by_rewards(trained, data, tmp_path, caplog):
    more = ["--model_name_or_path", str(trained[0]), "--self_critical", "--freeze", "vision"]
    results = main([*data, *flags(tmp_path / "out")[4:], *more, "--output_dir", str(tmp_path / "out")])
    assert results["settings"]["self_critical"] and results["train"]["steps"] == 2
    assert f"text: frozen in the run that made {trained[0]}, and trains now; --freeze vision text" in caplog.text
    assert (results["settings"]["num_beams"], results["settings"]["prompt"]) == (2, "the image shows")
    Image.open(tmp_path / "out/training.png").verify()


def test_images_without_captions_are_captioned(trained, data, tmp_path, capsys, caplog):
    out, _ = trained
    rows = [{"image": row["image"]} for row in read_lines(data[-1])]
    bare = Path(data[-1]).parent / "bare.jsonl"
    bare.write_text("\n".join(map(json.dumps, rows)))
    base = ["--model_name_or_path", str(out), "--use_cpu", "--disable_tqdm", "true", "--test_file", str(bare)]
    results = main([*base, "--do_predict", "--output_dir", str(tmp_path / "out")])
    assert [(row["image"], row["caption"]) for row in read_lines(tmp_path / "out/predictions.jsonl")] == [
        (row["image"], row["caption"]) for row in read_lines(out / "predictions.jsonl")
    ]
    assert {"loss", "cider_d"}.isdisjoint(results["test"]) and "BLEU" not in capsys.readouterr().out
    assert "are few" not in caplog.text  # nothing is measured on them


@pytest.mark.slow  # as test_run_vqa.py and test_run_retrieval.py hold
def test_resuming_continues_exactly(data, tmp_path):
    more = ("--max_steps", "4", "--captions_per_image", "2", "--save_total_limit", "3", "--num_beams", "1")
    first = main([*data, *flags(tmp_path / "out", *more)])
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    second = main([*data, *flags(tmp_path / "out", *more, "--resume_from_checkpoint", "last")])
    assert second["test"]["loss"] == pytest.approx(first["test"]["loss"], rel=1e-6)


def test_a_pretrained_decoder_is_taken(data, tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "text")
    BertModel(TEXT_CONFIGS["bert"]()).save_pretrained(tmp_path / "text")
    decoder = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, n_positions=24, pad_token_id=0))
    decoder.save_pretrained(tmp_path / "decoder")
    named = ("--text_model", str(tmp_path / "text"), "--decoder_model", str(tmp_path / "decoder"))
    main([*data, *flags(tmp_path / "out", *named, "--learning_rate", "0", "--num_beams", "1")])
    model = HiViLTForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.decoder.transformer.wte.weight.equal(decoder.transformer.wte.weight)


@pytest.mark.parametrize("name", [pytest.param("textcaps", marks=pytest.mark.slow), "vizwiz-captions", "coco"])
def test_named_benchmarks_train_evaluate_and_predict(name, tmp_path):
    make_caption_miniature(name, tmp_path / "data")
    asked = ["--benchmark", name, "--data_dir", str(tmp_path / "data"), "--num_beams", "1"]
    results = main([*asked, *flags(tmp_path / "out")])
    assert results["data"]["name"] == CAPTION_BENCHMARKS[name].title
    assert results["data"]["test"]["captions"] == 5 * results["test"]["num_images"] == 5 * SIZES["val"]
    served = list((tmp_path / "out").glob("captions_*_hivilt_results.json"))
    rows = read_lines(tmp_path / "out/predictions.jsonl")
    if name == "coco":
        (path,) = served
        assert path.name == "captions_test_hivilt_results.json"
        expected = [{"image_id": int(row["image"]), "caption": row["caption"]} for row in rows]
        assert json.loads(path.read_text()) == expected
    else:
        assert served == []
        # The hidden split: captions to hand in.
        base = ["--model_name_or_path", str(tmp_path / "out"), "--use_cpu", "--disable_tqdm", "true", *asked]
        hidden = main([*base, "--test_split", "test", "--do_predict", "--output_dir", str(tmp_path / "hidden")])
        assert hidden["data"]["test"] == {"images": 4, "captions": 0, "bad_images": []}
        assert "cider_d" not in hidden["test"]
        assert all(row["caption"] for row in read_lines(tmp_path / "hidden/predictions.jsonl"))


@pytest.mark.slow  # the test of Auto class and pipeline holds what they call
def test_snippets_of_the_card_write_the_same_caption_elsewhere(trained, tmp_path):
    """In a new process, with nothing but the folder and an image."""
    out, _ = trained
    shutil.copytree(out, tmp_path / out.name, ignore=shutil.ignore_patterns("checkpoint-*"))
    make_image().save(tmp_path / "image.png")
    codes = ModelCard.load(out / "README.md").text.split("```python\n")[1:]
    codes = [code.split("```")[0] for code in codes]
    assert len(codes) == 2 and '"the image shows"' in codes[1]
    (tmp_path / "codes.json").write_text(json.dumps(codes))
    program = "import json, sys; sys.modules['hivilt'] = None\n"
    program += "for code in json.load(open('codes.json')): exec(code, {})"
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = done.stdout.splitlines()
    assert first == second != ""


@pytest.mark.slow
def test_two_processes_do_what_one_does(data, tmp_path):
    """Two processes with batches of two images train as one with four, and caption every image once, in order; five and
    seven images do not fill the batches. With an encoder that treats each image by itself."""
    ViTModel(VISION_CONFIGS["vit"]()).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 20, "width": 20}).save_pretrained(tmp_path / "vit")
    more = (
        "--captions_per_image",
        "2",
        "--num_beams",
        "1",
        "--warmup_steps",
        "0",
        "--max_steps",
        "1",
        "--eval_steps",
        "1",
    )
    more += ("--vision_model", str(tmp_path / "vit"))
    alone = main([*data, *flags(tmp_path / "one", *more, "--save_steps", "1")])
    command = [*data, *flags(tmp_path / "two", *more, "--save_steps", "1", "--per_device_train_batch_size", "2")]
    printed = launch("hivilt.run_captioning", 2, command)
    assert printed.count("test: BLEU-1") == 1
    together = json.loads((tmp_path / "two/results.json").read_text())
    assert together["settings"]["world_size"] == 2
    assert together["train"]["captions"] == alone["train"]["captions"]
    first, second = (
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"][0] for name in ("one", "two")
    )
    assert [second[name] for name in ("loss", "grad_norm")] == pytest.approx(
        [first["loss"], first["grad_norm"]], rel=1e-4
    )
    for split in ("validation", "test"):
        for name in ("loss", "cider_d", "bleu_4", "num_images", "distinct"):
            assert together[split][name] == pytest.approx(alone[split][name], rel=1e-4), (split, name)
    assert read_lines(tmp_path / "two/predictions.jsonl") == read_lines(tmp_path / "one/predictions.jsonl")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt", "  "], "prompt: expected some words"),
        (["--self_critical"], "self_critical: a model that cannot write yet"),
        (["--prompt", "a dog runs " * 200], "prompt: the text encoder reads 64 tokens; give fewer words"),
        (["--num_beams", "0"], "num_beams: expected at least 1"),
        (["--no_repeat_ngram_size", "-3"], "no_repeat_ngram_size: expected at least 0"),
        (
            ["--min_word_count", "2", "--text_model", "x"],
            "min_word_count: it is of a new tokenizer, and x brings its own",
        ),
        (["--max_new_tokens", "0"], "max_new_tokens: expected at least 1"),
        (["--captions_per_image", "0"], "captions_per_image: expected at least 1"),
        (["--calibrate"], "calibrate: captions have no scores to calibrate"),
        (["--caption_column", "description"], "no column 'description'.*--caption_column"),
        (["--metric_for_best_model", "accuracy"], "metric_for_best_model: got 'accuracy'.*bleu_1.*cider_d"),
        (["--max_new_tokens", "100000"], "max_new_tokens"),
    ],
)
def test_arguments_that_cannot_work_are_named(data, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        main([*data, *flags(tmp_path / "out"), *more])
    assert not list(tmp_path.glob("out/checkpoint-*"))


def test_a_checkpoint_of_another_head_goes_on_and_is_not_measured(data, tmp_path):
    make_model(HiViLTForRetrieval).save_pretrained(tmp_path / "retrieval")
    make_processor().save_pretrained(tmp_path / "retrieval")
    base = ["--model_name_or_path", str(tmp_path / "retrieval"), "--use_cpu", "--disable_tqdm", "true", *data]
    with pytest.raises(ValueError, match="a checkpoint of HiViLTForRetrieval, expected HiViLTForConditionalG"):
        main([*base, "--do_predict", "--output_dir", str(tmp_path / "out")])
    few = [
        "--max_steps",
        "1",
        "--num_beams",
        "1",
        "--max_new_tokens",
        "4",
        "--eval_strategy",
        "no",
        "--save_strategy",
        "no",
    ]
    few += ["--load_best_model_at_end", "false", "--do_train", "--do_predict"]
    results = main([*base, *few, "--output_dir", str(tmp_path / "out")])
    assert results["settings"]["prompt"] == "an image of" and results["test"]["num_images"] == 7
    HiViLTForConditionalGeneration.from_pretrained(tmp_path / "out")
