"""The recipe's flags are read by the scripts; tables are made of runs that were done, which are not done again."""

import importlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hivilt.tasks.arguments import CaptioningArguments

ROWS = [
    {"image": "1", "caption": "a dog runs", "captions": ["a dog runs", "a brown dog is running"]},
    {"image": "2", "caption": "a man", "captions": ["a man in a red shirt", "a man stands in the grass"]},
]


@pytest.fixture
def done(benchmark, tmp_path):
    """A folder in which runs have left what they measured and wrote."""
    captioners = [
        "words",
        "more_words",
        "rewards",
        "measured",
        *(name.replace(" ", "_") for name in benchmark.ABLATIONS),
    ]
    answerers = [f"{name.replace(' ', '_')}-1" for name in benchmark.ANSWERS]
    for number, name in enumerate([*captioners, *answerers]):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        found = {"validation": {"bleu_4": 0.2, "cider_d": 0.5}, "train": {}, "parameters": {}, "settings": {}}
        found |= {"test": {"accuracy": 0.25, "wups_0.9": 0.3, "wups_0.0": 0.6}, "data": {name: number}}
        (folder / "results.json").write_text(json.dumps(found | {"environment": {"device_name": "a CPU"}}))
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        save_file(
            {"weight": torch.full((2,), number), "scale": torch.full((2,), number / 2)}, folder / "model.safetensors"
        )
    return tmp_path


def test_what_was_done_is_shown_and_not_done_again(benchmark, done, capsys):
    flags = ["--data_dir", "flickr8k=nowhere", "daquar=nowhere", "--seeds", "1"]
    results = benchmark.main([*flags, "--output_dir", str(done / "runs"), "--results_dir", str(done / "results")])
    (path,) = (done / "results").glob("captions-*.json")
    assert json.loads(path.read_text()) == results
    assert set(results["ablations"]) == set(benchmark.ABLATIONS)
    assert list(results["validation"]) == ["words", *benchmark.BRANCHES, "mean of both"]
    assert all(results[of]["cider_d"] > 0 for of in ("test", "person")) and results["sentence"]["bleu_1"] > 0
    printed = capsys.readouterr().out
    assert "hard attention" in printed and "| Flickr8k, BLEU-4 | at least 0.213 |" in printed
    assert "| finest stage alone | 0.200 | 0.500 |" in printed
    assert "| in words | 25.0 | 30.0 | 60.0 |" in printed
    assert "| DAQUAR, accuracy in words less that from a list | at least -1 points | 0.0 points | met |" in printed


def test_the_mean_of_both_is_a_checkpoint_with_its_own_results(benchmark, done):
    flags = ["--tasks", "captions", "--data_dir", "flickr8k=nowhere", "--results_dir", str(done / "results")]
    benchmark.main([*flags, "--output_dir", str(done / "runs")])
    weights = load_file(done / "runs/mean/model.safetensors")
    assert weights["scale"].tolist() == [0.75, 0.75] and weights["weight"].dtype == torch.int64
    kept = json.loads((done / "runs/mean/results.json").read_text())
    assert kept["data"] == {"words": 0, "measured": 3} and kept["test"]["accuracy"] == 0.25


def test_missing_data_are_named(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--data_dir", "flickr8k=nowhere"])
    assert "data_dir: give daquar=FOLDER, or other --tasks" in capsys.readouterr().err


def test_the_test_split_is_read_by_the_last_step_alone(benchmark):
    checkpoint = ["--model_name_or_path", "words"]
    recipes = {"words": benchmark.WORDS, "brief": benchmark.BRIEF, "measured": [*checkpoint, *benchmark.MEASURED]}
    recipes |= {name: [*checkpoint, *flags] for name, flags in benchmark.BRANCHES.items()}
    reads = {}
    for name, recipe in recipes.items():
        common = importlib.import_module("photographs").COMMON
        args, training = CaptioningArguments.parse([*common, *benchmark.RECIPE, *recipe])
        reads[name] = (training.do_train, training.do_predict)
        assert args.freeze == ["vision"] and args.self_critical == (name == "rewards")
    assert reads.pop("measured") == (False, True)
    assert set(reads.values()) == {(True, False)}
