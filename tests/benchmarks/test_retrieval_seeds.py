"""Two seeds of a run that is small enough for a test."""

import json

import pytest


@pytest.mark.slow
def test_tells_what_re_ranking_adds(benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few = ["--max_train_samples", "8", "--max_eval_samples", "4", "--max_predict_samples", "6", "--max_steps", "1"]
    more = ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false", "--use_cpu"]
    results = benchmark.main(["--seeds", "3", "4", "--output_dir", str(tmp_path), *few, *more])
    assert [run["seed"] for run in results["runs"]] == [3, 4]
    found = results["runs"][0]["test"]
    both = (found["image_to_text_recall@1"] + found["text_to_image_recall@1"]) / 2
    assert results["runs"][0]["recall@1"]["re-ranked"] == pytest.approx(100 * both)
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text()) == results
    assert "re-ranking adds" in capsys.readouterr().out
