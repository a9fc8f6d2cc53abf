"""The benchmark runs as its docstring says, on models small enough for a test, and judges its goals by their bounds."""

import json
from pathlib import Path

import pytest
import torch

from miniatures import make_vqa_miniature

# What a cache takes and holds for an image and for a question.
KINDS = {
    "image": {"number": 10, "seconds": 0.2, "seconds_when_all_is_there": 0.4, "bytes": 8e5},
    "question": {"number": 54, "seconds": 0.05, "seconds_when_all_is_there": 0.6, "bytes": 7e4},
}


def make_results(cached: float, reading: float, float16_accuracy: float) -> dict:
    """What a run might find, where a step from the cache takes `cached` seconds, and `reading` to read."""

    def way(seconds, flops):
        parts = {"reading": reading, "forward": seconds - reading - 0.2, "backward": 0.1, "update": 0.1}
        return {"seconds": parts, "trained_parameters": 28e6, "flops_per_question": flops}

    ways = {"from the cache, float32": way(cached, 4e9), "from the cache, float16": way(cached, 4e9)}
    ways |= {"without a cache": way(9.0, 15e9), "ViLT, 384": way(40.0, 90e9)}
    accuracy = {name: {"accuracy": [0.98, 0.96], "loss": [0.1, 0.2]} for name in ways}
    accuracy["from the cache, float16"] = {"accuracy": [float16_accuracy], "loss": [0.1]}
    encoding = {dtype: {**KINDS, "seconds_from_disk": 2 * reading} for dtype in ("float32", "float16")}
    return {"ways": ways, "encoding": encoding, "accuracy": accuracy}


@pytest.mark.slow
def test_every_way_of_training_stands_in_the_tables(benchmark, tmp_path, capsys):
    make_vqa_miniature("easy-vqa", tmp_path / "data")
    flags = ["--width", "64", "--num_layers", "2", "--num_batches", "1", "--num_steps", "1", "--num_epochs", "1"]
    flags += ["--seeds", "1", "--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    results = benchmark.main(flags)
    (path,) = (tmp_path / "out").glob("frozen-*.json")
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(results)) and benchmark.judge(written) == written["goals"]
    assert str(tmp_path) not in path.read_text(encoding="utf-8")  # the file is shared

    cached, half, without, vilt = results["ways"].values()
    for way in results["ways"].values():
        assert list(way["seconds"]) == ["reading", "forward", "backward", "update"]
        assert min(way["seconds"].values()) > 0
    assert cached["trained_parameters"] == half["trained_parameters"] == without["trained_parameters"]
    # What the cache saves is encoders' forward passes; ViLT trains all of itself on every pair.
    assert cached["flops_per_question"] == half["flops_per_question"] < without["flops_per_question"]
    assert without["flops_per_question"] < vilt["flops_per_question"]

    for dtype, size in (("float32", 4), ("float16", 2)):
        held = results["encoding"][dtype]
        assert held["image"]["number"] == 10 and held["question"]["number"] == 54
        # Levels of 14 x 14, 7 x 7 and 4 x 4, and 24 tokens; what is more says which image or question it is.
        for kind, rows in (("image", 196 + 49 + 16), ("question", 24)):
            assert 0 < held[kind]["bytes"] - rows * 64 * size < 320
    answers = results["accuracy"]
    assert answers["from the cache, float32"]["loss"] == pytest.approx(answers["without a cache"]["loss"], abs=1e-5)
    assert len(answers) == 4 and len(results["goals"]) == 11

    printed = capsys.readouterr().out
    for shown in (benchmark.table, benchmark.cache_table, benchmark.accuracy_table, benchmark.goals_table):
        assert shown(results) in printed


def test_steps_have_the_questions_that_figures_are_for(benchmark, tmp_path):
    examples = benchmark.make_examples(tmp_path, 10)
    assert len(examples) == benchmark.QUESTIONS == len({one.question for one in examples})
    assert len({one.image for one in examples}) == benchmark.IMAGES
    # Two special tokens beside the words, each of which is one.
    assert {len(one.question.split()) + 2 for one in examples} == {benchmark.NUM_TOKENS}


def test_the_optimizer_holds_nothing_that_is_frozen(benchmark):
    model = torch.nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    (group,) = benchmark.Training(model, iter([])).optimizer.param_groups
    assert len(group["params"]) == 1 and group["params"][0] is model.bias


def test_encoding_is_shared_by_ten_epochs(benchmark):
    results = make_results(cached=2.0, reading=0.02, float16_accuracy=0.97)
    an_epoch = benchmark.seconds_a_question(results, "from the cache, float32")
    ten = benchmark.seconds_a_question(results, "from the cache, float32", 10)
    assert an_epoch == pytest.approx(2.0 / 54)
    assert ten == pytest.approx((2.0 + (10 * 0.2 + 54 * 0.05) / 10) / 54)
    assert benchmark.seconds_a_question(results, "ViLT, 384", 10) == pytest.approx(40.0 / 54)


def test_goals_are_judged_by_their_bounds(benchmark):
    met = benchmark.judge(make_results(cached=1.5, reading=0.07, float16_accuracy=0.97))
    assert [goal["met"] for goal in met] == [True] * 11
    missed = benchmark.judge(make_results(cached=4.0, reading=0.3, float16_accuracy=0.9))
    assert [goal["met"] for goal in missed] == [False] * 6 + [True, False, True, False, False]
    assert missed[0]["measured"] == "8.9x" and missed[0]["wanted"] == "at least 10x"
    assert missed[2]["reason"] == "the encoders and fusion as configured leave 3.8x by FLOPs"
    # Ten epochs of 4 GFLOP, and once the encoders' 11.
    assert missed[4]["reason"] == "the encoders and fusion as configured leave 2.9x by FLOPs"
    assert missed[-1]["wanted"] == "at most 0 %" and missed[-1]["measured"] == "7.00 %"


def test_tables_by_hand(benchmark):
    results = make_results(cached=2.0, reading=0.02, float16_accuracy=0.97)
    rows = benchmark.table(results).splitlines()[2:]
    assert rows[0] == (
        "| from the cache, float32 | 28 M | 4.0 | 20 ms | 1,780 ms | 100 ms | 100 ms | 27.00 | 21.86 | 3.6× | 16.2× |"
    )
    assert benchmark.cache_table(results).splitlines()[2] == "| float32 | 5.0 | 20.0 | 1.0 | 800 | 70 | 40 |"
    accuracy = benchmark.accuracy_table(results).splitlines()[2:]
    assert accuracy[0] == "| from the cache, float32 | 0.9700 | 0.9600 to 0.9800 | 0.1500 |"


def test_files_are_forgotten_and_left_whole(benchmark, tmp_path):
    path = tmp_path / "vision" / "one.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"kept" * 5000)
    benchmark.forget_files(Path(tmp_path))
    assert path.read_bytes() == b"kept" * 5000
