"""The recipe's flags are read by the scripts; tables are made of runs that were done, which are not done again."""

import importlib
import json

import pytest

from hivilt.tasks.arguments import CaptioningArguments

ROWS = [
    {"image": "1", "caption": "a dog runs", "captions": ["a dog runs", "a brown dog is running"]},
    {"image": "2", "caption": "a man", "captions": ["a man in a red shirt", "a man stands in the grass"]},
]


@pytest.fixture
def done(benchmark, tmp_path):
    """A folder in which runs have left what they measured and wrote."""
    captioners = ["words", "rewards", *(name.replace(" ", "_") for name in benchmark.ABLATIONS)]
    answerers = [f"{name.replace(' ', '_')}-1" for name in benchmark.ANSWERS]
    for name in [*captioners, *answerers]:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        found = {"validation": {"bleu_4": 0.2, "cider_d": 0.5}, "train": {}, "parameters": {}, "settings": {}}
        found["test"] = {"accuracy": 0.25, "wups_0.9": 0.3, "wups_0.0": 0.6}
        (folder / "results.json").write_text(json.dumps(found | {"environment": {"device_name": "a CPU"}}))
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def test_what_was_done_is_shown_and_not_done_again(benchmark, done, capsys):
    flags = ["--data_dir", "flickr8k=nowhere", "daquar=nowhere", "--seeds", "1"]
    results = benchmark.main([*flags, "--output_dir", str(done / "runs"), "--results_dir", str(done / "results")])
    (path,) = (done / "results").glob("captions-*.json")
    assert json.loads(path.read_text()) == results
    assert set(results["ablations"]) == set(benchmark.ABLATIONS)
    assert all(results[of]["cider_d"] > 0 for of in ("test", "person")) and results["sentence"]["bleu_1"] > 0
    printed = capsys.readouterr().out
    assert "hard attention" in printed and "| Flickr8k, BLEU-4 | at least 0.213 |" in printed
    assert "| finest stage alone | 0.200 | 0.500 |" in printed
    assert "| in words | 25.0 | 30.0 | 60.0 |" in printed
    assert "| DAQUAR, accuracy in words less that from a list | at least -1 points | 0.0 points | met |" in printed


def test_missing_data_are_named(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--data_dir", "flickr8k=nowhere"])
    assert "data_dir: give daquar=FOLDER, or other --tasks" in capsys.readouterr().err


def test_the_test_split_is_read_by_the_last_step_alone(benchmark):
    recipes = {
        "words": [*benchmark.RECIPE, *benchmark.WORDS],
        "brief": [*benchmark.RECIPE, *benchmark.BRIEF],
        "rewards": [*benchmark.RECIPE, "--model_name_or_path", "words", *benchmark.REWARDS],
    }
    reads = {}
    for name, recipe in recipes.items():
        args, training = CaptioningArguments.parse([*importlib.import_module("photographs").COMMON, *recipe])
        reads[name] = training.do_predict
        assert args.freeze == ["vision"] and args.self_critical == (name == "rewards")
    assert reads == {"words": False, "brief": False, "rewards": True}
