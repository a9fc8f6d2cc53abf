"""The whole table on a miniature of the data, one step a run."""

import json
from pathlib import Path

import pytest
from transformers import BertModel

from miniatures import make_vqa_miniature
from tiny import TEXT_CONFIGS, make_tokenizer


@pytest.mark.slow
def test_every_variant_stands_in_the_table(benchmark, tmp_path, capsys):
    make_vqa_miniature("vqa-rad", tmp_path / "data")
    BertModel(TEXT_CONFIGS["bert"]()).save_pretrained(tmp_path / "text")
    make_tokenizer().save_pretrained(tmp_path / "text")
    quick = ["--max_steps", "1", "--image_size", "32", "--eval_strategy", "no", "--save_strategy", "no"]
    quick += ["--load_best_model_at_end", "false", "--use_cpu", "--per_device_train_batch_size", "4"]
    named = ["--data_dir", str(tmp_path / "data"), "--text_model", str(tmp_path / "text"), "--seeds", "3"]
    results = benchmark.main([*named, "--output_dir", str(tmp_path / "out"), *quick])

    variants = [run["variant"] for run in results["runs"]]
    assert variants == [f"{text}{how}" for text in ("text from scratch", "MiniLM") for how in ("", ", blank images")]
    assert len({run["parameters"]["all"] for run in results["runs"]}) == 2
    for run in results["runs"]:
        assert run["overall"] == run["test"]["accuracy"]
        assert run["test"]["num_questions"] == run["test"]["num_open"] + run["test"]["num_closed"] == 6
    (path,) = (tmp_path / "out").glob("vqa_rad-*.json")
    assert json.loads(path.read_text()) == json.loads(json.dumps(results))
    assert str(tmp_path) not in path.read_text()  # the file is shared
    printed = capsys.readouterr().out
    assert f"| HiViLT, MiniLM, blank images | {100 * results['runs'][3]['open']:.1f} ± 0.0 |" in printed
    assert "MEVF + BAN (published)" in printed


def test_blank_images_leave_only_the_question(benchmark, tmp_path):
    make_vqa_miniature("vqa-rad", tmp_path / "data")
    reader = benchmark.VQA_BENCHMARKS["vqa-rad"]
    blank = benchmark.blank_copy(tmp_path / "data", tmp_path / "blank")
    for split in ("train", "test"):
        ours, theirs = reader.read(split, tmp_path / "data"), reader.read(split, blank)
        assert [one._replace(image="") for one in theirs] == [one._replace(image="") for one in ours]
        assert len({benchmark.Image.open(one.image).tobytes() for one in theirs}) == 1


def test_majority_answer_by_hand(benchmark, tmp_path):
    make_vqa_miniature("vqa-rad", tmp_path / "data")
    found = benchmark.majority_baseline(tmp_path / "data")
    # Of the twelve training answers three are "no"; of the six test answers, two closed ones, one is.
    assert found == {
        "answer": "no",
        "accuracy": pytest.approx(1 / 6),
        "open_accuracy": 0,
        "closed_accuracy": 0.5,
        "num_open": 4,
        "num_closed": 2,
    }


def test_the_page_of_benchmarks_shows_the_table_of_the_result_file(benchmark):
    root = Path(benchmark.__file__).parents[1]
    (path,) = root.glob("benchmarks/results/vqa_rad-*.json")
    assert benchmark.table(json.loads(path.read_text(encoding="utf-8"))) in (root / "docs/benchmarks.md").read_text(
        "utf-8"
    )
