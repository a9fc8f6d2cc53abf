"""The model of this repository with fewer vision tokens, on a few questions, and a run of one step."""

import json

import pytest


@pytest.mark.slow
def test_tells_what_fewer_vision_tokens_cost(benchmark, tmp_path, capsys):
    few = ["--max_eval_samples", "40", "--max_train_samples", "40", "--max_steps", "1", "--use_cpu"]
    results = benchmark.main(["--top_k", "2", "--output_dir", str(tmp_path), *few])
    (path,) = tmp_path.glob("sparse_accuracy-*.json")
    assert json.loads(path.read_text(encoding="utf-8")) == results
    assert str(tmp_path) not in path.read_text(encoding="utf-8")  # the file is shared
    dense = results["trained_dense"]
    assert dense["None"]["fused_rows"] == [64, 16, 4] and dense["None"]["accuracy"] > 0.95
    # As many tokens of the finest level as the text tokens chose between them.
    rows = [dense[k]["fused_rows"][0] for k in ("16", "8", "4", "2", "1")]
    assert rows == sorted(rows, reverse=True) and 1 <= rows[-1] < rows[0] < 64
    assert results["trained_sparse"]["fusion_top_k"] == 2 and 2 <= results["trained_sparse"]["fused_rows"][0] < 64
    assert {row["num_questions"] for row in dense.values()} == {results["trained_sparse"]["num_questions"]}
    assert benchmark.table(results) in capsys.readouterr().out
    assert benchmark.table(results).splitlines()[-1].startswith("| k = 2 | 2 | ")
