"""benchmarks/ask_collection.py on a few images."""

import json


def test_it_measures_both_models_and_encodes_nothing_that_it_asks(benchmark, tmp_path, monkeypatch):
    folder, _ = benchmark.MODELS["drawings, 64 pixels"]
    monkeypatch.setattr(benchmark, "MODELS", {"drawings, 64 pixels": (folder, 64), "again": (folder, 64)})
    monkeypatch.setattr(benchmark, "index", lambda name, place, processes: build(benchmark, folder, place, processes))
    results = benchmark.main(["--images", "20", "--encoded", "6", "--rounds", "1", "--output_dir", str(tmp_path)])
    (path,) = tmp_path.glob("ask_collection-*.json")
    assert json.loads(path.read_text()) == results
    for found in results["models"].values():
        assert found["num_images"] == 20 and found["encoder_passes"] == 0
        assert set(found["images_asked_per_second"]) == set(found["images_indexed_per_second"]) == {"1", "2"}
        assert found["bytes_per_image"] > 2 * 64 * 84
    assert benchmark.table(results).count("\n") == 3 and len(results["goals"]) == 3
    assert results["goals"][2]["met"] is True


def build(benchmark, folder, place, processes):
    """In place of processes that are started: the same index, made by this one."""
    return benchmark.seconds(
        lambda: benchmark.ImageIndex.build(place / "images", *benchmark.load(folder), place / f"index-{processes}")
    )
