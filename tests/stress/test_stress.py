"""Hours of what may go wrong, in minutes: kills at random moments, images and texts by the thousand, long evaluations."""

import io
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hivilt import HiViLTForQuestionAnswering, HiViLTForRetrieval
from hivilt.data.vqa import VQACollator, VQADataset, VQAExample
from hivilt.processing_hivilt import load_image
from hivilt.run_vqa import main
from hivilt.search import ImageIndex
from hivilt.tasks.question_answering import QuestionAnsweringTrainer
from hivilt.training.arguments import COMMON_DEFAULTS, HiViLTTrainingArguments
from hivilt.training.results import peak_memory_bytes
from hivilt.training.resuming import last_checkpoint
from interruptions import MOMENTS, Run, execute
from tiny import make_image, make_model, make_processor

COLORS = ["red", "blue", "green", "white"]
TINY = {"hidden_size": 16, "num_attention_heads": 2, "fusion_intermediate_size": 16, "dropout": 0.1}
SMALL = ("--fusion", json.dumps(TINY), "--image_size", "32", "--use_cpu", "--disable_tqdm", "true")
NUM_KILLS = 24
MIB = 2**20


def forget_peak() -> int:
    """Begins anew what `peak_memory_bytes` says, and gives what is held now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory_bytes()


@pytest.mark.parametrize("script", ["run_vqa", "run_retrieval"])
def test_kills_at_random_moments(script, tmp_path, record):
    rows = []
    for place in range(24):
        make_image(COLORS[place % 4], size=(31, 23 + place)).save(tmp_path / f"{place}.png")
        color = COLORS[place % 4]
        rows.append({"image": f"{place}.png", "question": "color?", "answer": color, "caption": f"{color}, {place}"})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    usual = ["--train_file", str(tmp_path / "train.jsonl"), *SMALL, "--do_train", "--random_flip", "skip"]
    usual += [
        "--per_device_train_batch_size",
        "4",
        "--max_steps",
        "24",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "3",
    ]
    usual += ["--save_strategy", "steps", "--save_steps", "3", "--resume_from_checkpoint", "last", "--output_dir"]

    draw = random.Random(script)
    start = time.perf_counter()
    status, output = execute(Run(script, [*usual, str(tmp_path / "whole")]))
    longest = time.perf_counter() - start
    assert status == 0, output
    expected = load_file(tmp_path / "whole/model.safetensors")

    kills, finished, moments = 0, 0, Counter()
    while kills < NUM_KILLS or finished == 0:
        out, step = tmp_path / f"killed-{finished}", 0
        while True:
            moment = draw.choice([*MOMENTS, *[draw.uniform(0, longest)] * len(MOMENTS)]) if kills < NUM_KILLS else None
            status, output = execute(Run(script, [*usual, str(out)], moment, draw.randint(1, 4)))
            whole = last_checkpoint(out)
            reached = int(whole.rsplit("-", 1)[1]) if whole else 0
            assert reached >= step, f"step {step} was lost"
            step = reached
            if status == 0:
                break
            assert status == -signal.SIGKILL, output
            kills += 1
            moments[moment if isinstance(moment, str) else "any"] += 1
        finished += 1
        found = load_file(out / "model.safetensors")
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    record(f"{script}, SIGKILL", {"kills": kills, "runs that finished with equal weights": finished, "when": moments})


def bad_images():
    """What a folder from the web holds beside images."""
    png = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(png, "PNG")
    return [
        b"",
        b"<!DOCTYPE html>",
        png.getvalue()[:999],
        png.getvalue()[:20],
        b"\x00" * 99,
        b"GIF89a",
        b"\xff\xd8\xff\xe0",
    ]


def test_ten_thousand_images_of_which_one_in_a_hundred_is_bad(tmp_path, record):
    bad, rows = bad_images(), []
    for place in range(10_000):
        color = COLORS[place % 4]
        if place % 100 == 99:
            (tmp_path / f"{place}.png").write_bytes(bad[place // 100 % len(bad)])
        else:
            make_image(color, size=(20 + place % 30, 20 + place % 23)).save(tmp_path / f"{place}.png")
        rows.append({"image": f"{place}.png", "question": "color?", "answer": color})
    for split, part in (("train", rows[:8000]), ("validation", rows[8000:9000]), ("test", rows[9000:])):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    files = [
        part
        for split in ("train", "validation", "test")
        for part in (f"--{split}_file", str(tmp_path / f"{split}.jsonl"))
    ]

    memory, descriptors = [], []
    forget_peak()
    for run in range(3):
        flags = [*files, *SMALL, "--on_bad_image", "skip", "--num_train_epochs", "1"]
        flags += ["--per_device_train_batch_size", "64", "--per_device_eval_batch_size", "64"]
        results = main([*flags, "--output_dir", str(tmp_path / f"out-{run}")])
        memory.append(peak_memory_bytes())
        descriptors.append(len(os.listdir("/proc/self/fd")))
        left_out = {split: len(results["data"][split]["bad_images"]) for split in ("train", "validation", "test")}
        assert left_out == {"train": 80, "validation": 10, "test": 10}, left_out
    assert descriptors[2] == descriptors[1] and memory[2] < memory[1] + 64 * MIB, (descriptors, memory)
    counted = {"images": 10_000, "left out": 100, "file descriptors after each run": descriptors}
    record("10,000 images", counted | {"peak memory after each run, MiB": [size // MIB for size in memory]})


@pytest.mark.filterwarnings("ignore")
def test_damaged_images(tmp_path, record):
    Image.init()
    draw, seeds = random.Random(0), []
    image = Image.effect_mandelbrot((40, 30), (-2, -1.5, 1, 1.5), 20)
    for kind in sorted(Image.SAVE):
        for mode in ("RGB", "L", "P", "RGBA", "1", "CMYK", "LA", "F", "I"):
            content = io.BytesIO()
            try:
                image.convert(mode).save(content, kind)
            except (OSError, ValueError, KeyError, RuntimeError, AttributeError):  # PIL does not write these
                continue
            seeds.append(content.getvalue())
    path, tried = tmp_path / "image", Counter()
    for _ in range(20_000):
        content = bytearray(draw.choice(seeds))
        if draw.random() < 0.25:
            del content[draw.randrange(len(content) + 1) :]
        else:
            reach = len(content) if draw.random() < 0.4 else min(len(content), 120)
            for _ in range(draw.randint(1, 8)):
                content[draw.randrange(reach)] = draw.choice([0, 127, 128, 255, draw.randrange(256)])
        path.write_bytes(content)
        start = time.perf_counter()
        try:
            assert load_image(path).mode == "RGB"
            tried["read"] += 1
        except ValueError as error:
            assert str(path) in str(error)
            tried["refused by name"] += 1
        assert time.perf_counter() - start < 10
    record("damaged images", {"kinds of files": len(seeds), **tried})


def test_an_evaluation_of_a_hundred_thousand_questions(tmp_path, record):
    for place in range(100):
        make_image(COLORS[place % 4]).save(tmp_path / f"{place}.png")
    processor, model = make_processor(), make_model(HiViLTForQuestionAnswering)
    answers = {f"answer {label}": label for label in range(model.config.num_labels)}
    quiet = {"use_cpu": True, "disable_tqdm": True, "output_dir": str(tmp_path), "per_device_eval_batch_size": 1}
    grown = {}
    for number in (1_000, 10_000, 100_000):
        questions = [
            VQAExample(
                str(n), str(n % 100 + n // 1000 * 100), str(tmp_path / f"{n % 100}.png"), "what color", ("answer 1",)
            )
            for n in range(number)
        ]
        trainer = QuestionAnsweringTrainer(
            model=model,
            args=HiViLTTrainingArguments(**{**COMMON_DEFAULTS, **quiet}),
            eval_dataset=VQADataset(questions),
            data_collator=VQACollator(processor, answers),
            processing_class=processor,
        )
        before = forget_peak()
        metrics = trainer.evaluate()
        assert metrics["eval_num_questions"] == number
        grown[number] = peak_memory_bytes() - before
    # The best answers of a question are dictionaries of two or three hundred bytes each.
    assert grown[100_000] < 2_500 * 100_000, grown
    record("100,000 questions", {"memory that evaluating took, MiB": {n: size // MIB for n, size in grown.items()}})


def test_an_index_of_ten_thousand_images(tmp_path, record):
    folder = tmp_path / "images"
    folder.mkdir()
    grown = []
    for place in range(10_000):
        make_image(COLORS[place % 4], size=(20 + place % 9, 20)).save(folder / f"{place}.png")
    model, processor = make_model(HiViLTForRetrieval), make_processor()
    for number in (1_000, 10_000):
        some = tmp_path / str(number)
        some.mkdir()
        for place in range(number):
            os.link(folder / f"{place}.png", some / f"{place}.png")
        before = forget_peak()
        assert len(ImageIndex.build(some, model, processor, tmp_path / f"index-{number}")) == number
        grown.append(peak_memory_bytes() - before)
    assert grown[1] < 64 * MIB, grown
    record("an index of 10,000 images", {"memory that building took, MiB": grown[1] // MIB})
