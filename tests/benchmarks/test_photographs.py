"""The recipes' flags are read by their scripts; tables are made of runs that were done, which are not done again."""

import json

import pytest

from tiny import HEAD_FACTS

ARGUMENTS = {facts.task.script: facts.task.arguments for facts in HEAD_FACTS.values() if facts.task}


@pytest.fixture
def done(benchmark, tmp_path):
    """A folder in which the runs of seeds 1 and 2 have left what they measured."""
    recalls = {f"{stage}{name}": 0.5 for stage in ("embedding_", "") for name in benchmark.RECALLS}
    for task, (_, steps) in benchmark.RECIPES.items():
        for step in steps:
            for seed in (1, 2):
                retrieval = {**recalls, "image_to_text_recall@1": 0.30 + 0.01 * seed, "text_to_image_recall@1": 0.2}
                answering = {"accuracy": 0.25 + 0.01 * seed, "accuracy_of_blank_images": 0.2}
                found = retrieval if task == "flickr8k" else answering
                split = {"chance": {**recalls, "mean_recall": 0.5}}
                results = {"data": {"validation": split, "test": split}, "validation": found, "test": found}
                folder = tmp_path / "runs" / f"{task}-{step}-{seed}"
                folder.mkdir(parents=True)
                (folder / "results.json").write_text(json.dumps(results | {"environment": {"device_name": "a CPU"}}))
    return tmp_path


def test_what_was_done_is_shown_and_not_done_again(benchmark, done, capsys):
    results = benchmark.main(
        [
            *("--data_dir", "flickr8k=nowhere", "daquar=nowhere", "--seeds", "1", "2"),
            *("--output_dir", str(done / "runs"), "--results_dir", str(done / "results")),
        ]
    )
    (path,) = (done / "results").glob("photographs-*.json")
    assert json.loads(path.read_text()) == results
    printed = capsys.readouterr().out
    assert "| Flickr8k, image to text R@1, HiViLT, re-ranked | 31.0 | 31.5 ± 0.7 | met |" in printed
    assert "| Flickr8k, text to image R@1, HiViLT, re-ranked | 21.3 | 20.0 ± 0.0 | missed |" in printed
    assert "| DAQUAR, accuracy | 27.0 | 26.5 ± 0.7 | missed |" in printed
    assert "| DAQUAR, accuracy above that on blank images | 3.0 | 6.5 ± 0.7 | met |" in printed
    table = benchmark.retrieval_table(results).splitlines()
    assert [line.split("|")[2].strip() for line in table if "HGLMM" in line or "re-ranked" in line] == ["31.0", "31.5"]
    assert "HGLMM" not in benchmark.validation_table(results)


def test_data_that_is_not_named_ends_it_before_it_trains(benchmark, tmp_path, capsys):
    for data, message in (("flickr8k=data", "data_dir: give daquar=FOLDER"), ("flickr8k", "expected BENCHMARK=FOLDER")):
        with pytest.raises(SystemExit):
            benchmark.main(["--data_dir", data, "--output_dir", str(tmp_path / "runs")])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_scripts_read_the_flags_of_their_steps(benchmark):
    for script, steps in benchmark.RECIPES.values():
        for flags in steps.values():
            args, training = ARGUMENTS[script].parse([*benchmark.COMMON, *flags])
            assert training.do_train and args.freeze
        # The test split is read by the last step alone.
        assert training.do_predict and all("--do_predict" not in flags for flags in list(steps.values())[:-1])
