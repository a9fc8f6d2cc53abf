"""The benchmark runs as its docstring says, on few questions."""

import json


def test_leaves_the_seconds_of_each_normalization(benchmark, tmp_path, capsys):
    results = benchmark.main(["--questions", "20", "--output_dir", str(tmp_path)])
    (path,) = tmp_path.glob("vqa_accuracy_speed-*.json")
    assert json.loads(path.read_text(encoding="utf-8")) == results
    printed = capsys.readouterr().out
    for case in ("repeated", "distinct"):
        assert set(results["seconds"][case]) == {"official", "legacy", "always", "mmf", "vizwiz"}
        assert min(results["seconds"][case].values()) > 0
        assert f"20 questions, {case} answers" in printed


def test_answers_are_as_said(benchmark):
    distinct, repeated = benchmark.make_answers(True, 5000), benchmark.make_answers(False, 5000)
    assert len(set(distinct)) == len(distinct) == len(repeated) == 5000
    assert len(set(repeated)) < 2500
    assert repeated == benchmark.make_answers(False, 5000)
    for part in (".", "-", ",", "'s", "a ", "two "):
        assert any(part in answer for answer in distinct)
