"""The recipe's flags are read by the script; tables are made of runs that were done, which are not done again."""

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
    for name in benchmark.CONTESTANTS:
        folder = tmp_path / "runs" / f"{name.replace(' ', '_')}-1"
        folder.mkdir(parents=True)
        found = {"validation": {"bleu_4": 0.2, "cider_d": 0.5}, "train": {}, "parameters": {}, "settings": {}}
        (folder / "results.json").write_text(json.dumps(found | {"environment": {"device_name": "a CPU"}}))
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def test_what_was_done_is_shown_and_not_done_again(benchmark, done, capsys):
    flags = ["--data_dir", "nowhere", "--output_dir", str(done / "runs"), "--results_dir", str(done / "results")]
    results = benchmark.main(flags)
    (path,) = (done / "results").glob("captions-*.json")
    assert json.loads(path.read_text()) == results
    assert set(results["validation"]) == set(benchmark.CONTESTANTS)
    assert all(results[of]["cider_d"] > 0 for of in ("test", "person")) and results["sentence"]["bleu_1"] > 0
    printed = capsys.readouterr().out
    assert "hard attention" in printed and "| BLEU-4 | at least 0.213 |" in printed
    assert "| finest stage alone | 0.200 | 0.500 |" in printed


def test_the_test_split_is_read_by_one_run_alone(benchmark):
    reads = {name: "--do_predict" in more for name, (_, more) in benchmark.CONTESTANTS.items()}
    assert [name for name, does in reads.items() if does] == ["HiViLT"]
    args, training = CaptioningArguments.parse(["--use_cpu", *benchmark.RECIPE, *benchmark.CONTESTANTS["HiViLT"][1]])
    assert training.do_predict and args.freeze == ["vision"]
