"""The benchmark runs as its docstring says, on collections small enough for a test."""

import json

from PIL import Image


def test_leaves_figures_and_a_picture(benchmark, tmp_path, capsys):
    flags = ["--pictures", "3", "6", "--captions", "2", "--rerank_k", "2", "--slice", "1", "--embeddings", "50"]
    results = benchmark.main([*flags, "--queries", "3", "--output_dir", str(tmp_path)])
    for number, found in zip((3, 6), results["collections"], strict=True):
        assert found["pictures_encoded"] == number and found["captions_encoded"] == 2 * number
        assert found["num_fused_pairs"] <= 2 * (number + 2 * number)
        assert found["all_pairs_seconds"]["vilt"] > 0
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text()) == json.loads(json.dumps(results))
    Image.open(path.with_suffix(".png")).verify()
    assert "search among 50 embeddings" in capsys.readouterr().out
