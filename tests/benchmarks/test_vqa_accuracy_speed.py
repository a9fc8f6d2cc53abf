"""The benchmark runs as its docstring says, on few questions."""

import importlib.util
import json
from pathlib import Path

PATH = Path(__file__).parents[2] / "benchmarks/vqa_accuracy_speed.py"


def load():
    # benchmarks/ is no part of the package.
    spec = importlib.util.spec_from_file_location("vqa_accuracy_speed", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_leaves_the_seconds_of_each_normalization(tmp_path, capsys):
    results = load().main(["--questions", "20", "--output_dir", str(tmp_path)])
    (path,) = tmp_path.glob("vqa_accuracy_speed-*.json")
    assert json.loads(path.read_text(encoding="utf-8")) == results
    printed = capsys.readouterr().out
    for case in ("repeated", "distinct"):
        assert set(results["seconds"][case]) == {"official", "legacy", "always", "mmf", "vizwiz"}
        assert min(results["seconds"][case].values()) > 0
        assert f"20 questions, {case} answers" in printed


def test_answers_are_as_said():
    module = load()
    distinct, repeated = module.make_answers(True, 5000), module.make_answers(False, 5000)
    assert len(set(distinct)) == len(distinct) == len(repeated) == 5000
    assert len(set(repeated)) < 2500
    assert repeated == module.make_answers(False, 5000)
    for part in (".", "-", ",", "'s", "a ", "two "):
        assert any(part in answer for answer in distinct)
