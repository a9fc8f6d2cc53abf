"""The benchmark runs as its docstring says, on few images and a miniature of easy-VQA."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from miniatures import make_vqa_miniature


@pytest.mark.slow
def test_leaves_rates_work_and_the_parts_of_a_step(benchmark, tmp_path, capsys):
    make_vqa_miniature("easy-vqa", tmp_path / "data")
    flags = ["--images", "2", "--rounds", "1", "--workers", "0", "1", "--steps", "3"]
    results = benchmark.main([*flags, "--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")])

    (path,) = (tmp_path / "out").glob("input_pipeline-*.json")
    assert json.loads(path.read_text(encoding="utf-8")) == results
    assert str(tmp_path) not in path.read_text(encoding="utf-8")  # the file is shared
    cases = [(row["files"], row["questions_an_image"], row["num_workers"]) for row in results["rows"]]
    per_drawing = 12 / results["files"]["drawings"]["images"]
    questions = [("photographs", 1), ("photographs", 5.5), ("drawings", 1), ("drawings", per_drawing)]
    assert cases == [(files, number, workers) for files, number in questions for workers in (0, 1)]
    assert all(min(row["images_per_second"].values()) > 0 for row in results["rows"])
    # Outputs of the same number of pixels, but for the two percent that the docstring tells of.
    sizes = results["files"]["photographs"]["output_size"]
    assert sizes == {"hivilt": [224, 224], "vilt": [192, 256], "clip": [224, 224]}

    step = results["step"]
    assert step["steps"] == 3 and step["num_workers"] == 0
    assert list(step["milliseconds"]) == ["waiting for data", "forward", "backward", "optimizer", "rest"]
    assert min(step["milliseconds"].values()) > 0
    assert sum(step["share"].values()) == pytest.approx(1)
    printed = capsys.readouterr().out
    for table in (benchmark.table, benchmark.table_of_work, benchmark.table_of_step):
        assert table(results) in printed


def test_photographs_weigh_as_those_of_coco(benchmark, tmp_path):
    examples = benchmark.make_photographs(tmp_path, 5)
    assert len(examples) == 27  # VQAv2's 5.4 an image
    files = list(dict.fromkeys(one.image for one in examples))
    sizes = [Path(file).stat().st_size for file in files]
    assert min(sizes) > 140_000 and max(sizes) < 180_000
    assert {Image.open(file).size for file in files} == {(640, 480)}
    assert [one.question_id for one in benchmark.first_questions(examples)] == [f"{number}-0" for number in range(5)]


def test_all_read_the_same_pairs(benchmark, tmp_path):
    """Peers open an image for each of its questions, HiViLT once."""
    examples = benchmark.make_photographs(tmp_path, 2)
    loaders = benchmark.make_loaders(examples, {"hivilt": 32, "vilt": 32, "clip": 32}, 0)
    batches = {name: list(loader) for name, loader in loaders.items()}
    images = {name: sum(len(batch["pixel_values"]) for batch in found) for name, found in batches.items()}
    assert images == {"hivilt": 2, "vilt": 11, "clip": 11}
    texts = {name: torch.cat([batch["input_ids"] for batch in found]) for name, found in batches.items()}
    assert torch.equal(texts["vilt"], texts["hivilt"]) and torch.equal(texts["clip"], texts["hivilt"])
