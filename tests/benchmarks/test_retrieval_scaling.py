"""The benchmark runs as its docstring says, on collections small enough for a test."""

import importlib.util
import json
import sys
from pathlib import Path

from PIL import Image

PATH = Path(__file__).parents[2] / "benchmarks/retrieval_scaling.py"


def load():
    # benchmarks/ is no part of the package; spawned processes import the file by its name again.
    spec = importlib.util.spec_from_file_location("retrieval_scaling", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_leaves_figures_and_a_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(PATH.parent))
    module = load()
    monkeypatch.setitem(sys.modules, "retrieval_scaling", module)
    flags = ["--pictures", "3", "6", "--captions", "2", "--rerank_k", "2", "--slice", "1", "--embeddings", "50"]
    results = module.main([*flags, "--queries", "3", "--output_dir", str(tmp_path)])
    for number, found in zip((3, 6), results["collections"], strict=True):
        assert found["pictures_encoded"] == number and found["captions_encoded"] == 2 * number
        assert found["num_fused_pairs"] <= 2 * (number + 2 * number)
        assert found["all_pairs_seconds"]["vilt"] > 0
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text()) == json.loads(json.dumps(results))
    Image.open(path.with_suffix(".png")).verify()
    assert "search among 50 embeddings" in capsys.readouterr().out
