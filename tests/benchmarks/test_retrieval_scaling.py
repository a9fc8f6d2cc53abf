"""The benchmark runs as its docstring says, on collections small enough for a test."""

import json
from concurrent.futures import ThreadPoolExecutor

from PIL import Image


def test_leaves_figures_and_an_image(benchmark, tmp_path, capsys, monkeypatch):
    # A process of its own for each collection is there for its peak memory alone.
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda *args, **kwargs: ThreadPoolExecutor(1))
    flags = ["--images", "3", "6", "--captions", "2", "--rerank_k", "2", "--slice", "1", "--embeddings", "50", "80"]
    flags += ["--index_factories", "Flat", "IVF2,Flat", "--queries", "3", "--output_dir", str(tmp_path)]
    results = benchmark.main(flags)
    for number, found in zip((3, 6), results["collections"], strict=True):
        assert found["images_encoded"] == number and found["captions_encoded"] == 2 * number
        assert found["num_fused_pairs"] <= 2 * (number + 2 * number)
        assert found["all_pairs_seconds"]["vilt"] > 0
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text()) == json.loads(json.dumps(results))
    Image.open(path.with_suffix(".png")).verify()
    searches = [(found["num_embeddings"], found["index_factory"]) for found in results["searches"]]
    assert searches == [(50, "Flat"), (50, "IVF2,Flat"), (80, "Flat"), (80, "IVF2,Flat")]
    for found in results["searches"]:
        # The embeddings, and what each kind of index has beside them.
        assert 0 < found["index_bytes"] - found["num_embeddings"] * 256 * 4 < 4000
        assert 0 < found["median_milliseconds"] <= found["most_milliseconds"]
    shown = benchmark.table(results)
    assert len(shown.splitlines()) == 6
    assert shown in capsys.readouterr().out
