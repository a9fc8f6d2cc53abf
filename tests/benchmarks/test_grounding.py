"""The recipe's flags are read by the script; fixed answers by hand; tables are made of runs that were done."""

import importlib
import json

import pytest

from grounding_miniatures import LEFT, RIGHT, make_grounding_miniature
from hivilt.data.grounding import GroundedImage
from hivilt.tasks.arguments import GroundingArguments


@pytest.fixture
def done(benchmark, tmp_path):
    """A folder of data, and one in which runs of seeds 1 and 2 and of the search have left what they measured."""
    make_grounding_miniature("daquar-grounding", tmp_path / "daquar")
    test = benchmark.GROUNDING_BENCHMARKS[benchmark.NAME].read("test", tmp_path / "daquar")
    kinds = set(benchmark.kinds_of(test))
    folders = {choice.replace(" ", "_"): 0.4 if choice == "mirrored" else 0.1 for choice in benchmark.CHOICES}
    for name, value in {**folders, "seed-1": 0.5, "seed-2": 0.7}.items():
        measured = dict.fromkeys(benchmark.MEASURES, value)
        found = {"validation": measured, "parameters": {}, "train": {}, "environment": {"device_name": "a CPU"}}
        if name.startswith("seed"):
            found["test"] = measured | {"by_kind": dict.fromkeys(kinds, measured)}
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "results.json").write_text(json.dumps(found))
    return tmp_path


def test_what_was_done_is_shown_and_the_best_on_validation_is_taken(benchmark, done, capsys):
    flags = ["--data_dir", str(done / "daquar"), "--output_dir", str(done / "runs"), "--seeds", "1", "2"]
    results = benchmark.main([*flags, "--results_dir", str(done / "results")])
    (path,) = (done / "results").glob("grounding-*.json")
    assert json.loads(path.read_text()) == results
    assert results["chosen"] == "mirrored"
    printed = capsys.readouterr().out
    assert "| mirrored | 40.0 |" in printed and "| HiViLT | 60.0 ± 14.1 |" in printed
    assert benchmark.table(results) in printed and [goal["met"] for goal in results["goals"]].count(True) >= 1


def test_fixed_answers_by_hand(benchmark):
    images = [GroundedImage(None, "1", ("the left one", "the right one"), ((LEFT,), (RIGHT,)), ("a", "b"))]
    middle = (0.4, 0.3, 0.6, 0.7)
    train = [GroundedImage(None, "2", ("it", "that"), ((middle,), ((0.0, 0.0, 0.1, 0.1),)))]
    assert benchmark.centre_box([middle, (0.0, 0.0, 0.1, 0.1)]) == pytest.approx(middle)
    found = benchmark.baselines(train, images)
    # The left one is 0.3 x 0.6 of the image, the right one 0.4 x 0.4.
    by_kind = found[benchmark.LARGEST]["by_kind"]
    assert by_kind["a"]["accuracy@0.5"] == 1 and by_kind["b"]["accuracy@0.5"] == 0
    assert found[benchmark.LARGEST]["accuracy@0.5"] == 0.5 and found[benchmark.CENTRE]["accuracy@0.5"] == 0


def test_the_script_reads_the_recipe_and_the_search_does_not_read_the_test_split(benchmark):
    common = importlib.import_module("photographs").COMMON
    encoders = ["--vision_model", "mobilenet_v2", "--text_model", "minilm", "--data_dir", "daquar"]
    for flags in benchmark.CHOICES.values():
        args, training = GroundingArguments.parse([*common, *benchmark.RECIPE, *encoders, *flags])
        assert training.do_train and args.freeze == ["vision", "text"] and not training.do_predict
        assert args.benchmark == "daquar-grounding"
