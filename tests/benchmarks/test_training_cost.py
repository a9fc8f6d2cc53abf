"""The benchmark runs as its docstring says, on models small enough for a test, and its page shows what it found."""

import json
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest


@pytest.mark.slow
def test_every_way_of_training_stands_in_the_tables(benchmark, tmp_path, capsys, monkeypatch):
    # A process of its own for each way is there for its peak memory alone.
    def executor(processes, *args, **kwargs):
        return ThreadPoolExecutor(1) if processes == 1 else ProcessPoolExecutor(processes, *args, **kwargs)

    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", executor)
    monkeypatch.setattr(benchmark, "bf16_slowdown", lambda: 1.0)
    size = ["--width", "64", "--num_layers", "2", "--steps", "1"]
    results = benchmark.main([*size, "--output_dir", str(tmp_path)])
    (path,) = tmp_path.glob("training_cost-*.json")
    assert json.loads(path.read_text()) == json.loads(json.dumps(results))

    assert {(way["gradient_checkpointing"], way["bf16"]) for way in results["ways"].values()} == {
        (checkpointing, bf16) for checkpointing in (False, True) for bf16 in (False, True)
    }
    for way in results["ways"].values():
        assert way["seconds"] > 0 and way["peak_memory_bytes"] > 0
        assert ("parts" in way) == (not way["gradient_checkpointing"])
    # Levels of 14 x 14, 7 x 7 and 4 x 4, the mean of the last and of its map, and three projections of the finest, 64
    # float32 numbers each.
    assert results["ways"]["float32"]["state_bytes"]["image"] == (196 + 49 + 16 + 2 + 3 * 196) * 64 * 4
    assert [(row["processes"], row["images"]) for row in results["together"]] == [(1, 8), (2, 4), (2, 8)]

    printed = capsys.readouterr().out
    for shown in (benchmark.table(results), benchmark.processes_table(results), benchmark.many_table(results)):
        assert shown in printed


def test_bfloat16_that_is_emulated_is_left_out_with_the_reason(benchmark, tmp_path, monkeypatch):
    measured = {"seconds": 8.0, "peak_memory_bytes": 2**30, "state_bytes": {"image": 4e6, "question": 4e5}}
    measured["parts"] = {"image": 0.2, "question": 0.1, "fusion": 0.01}
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda *args, **kwargs: ThreadPoolExecutor(2))
    monkeypatch.setattr(benchmark, "measure_way", lambda *args: measured)
    monkeypatch.setattr(benchmark, "measure_together", lambda *args: 1.0)
    monkeypatch.setattr(benchmark, "bf16_slowdown", lambda: 60.2)
    results = benchmark.main(["--output_dir", str(tmp_path)])
    rows = benchmark.table(results).splitlines()[2:]
    assert rows[2] == "| bfloat16 | left out: emulated here, a layer takes 60 times as long |  |  |  |  |  |"
    assert rows[0].startswith("| float32 | 8.0 | 1.00 | 1.0 |") and "left out" in rows[3]
    many = benchmark.many_table(results).splitlines()
    assert many[0] == "| 1,000,000 images, one thread, computed | float32 |"
    assert "| keeping the states of as many images | 4.00 TB |" in many


def test_tables_by_hand(benchmark):
    parts = {"image": 0.18, "question": 0.036, "fusion": 0.01}
    sizes = {"image": 2_600_000, "question": 370_000}
    plain = {"seconds": 20.0, "peak_memory_bytes": 6 * 2**30, "parts": parts, "state_bytes": sizes}
    saving = {"seconds": 25.0, "peak_memory_bytes": 4 * 2**30}
    results = {
        "ways": {"float32": plain, "gradient checkpointing": saving, "bfloat16": {**plain, "seconds": 10.0}},
        "together": [
            {"processes": 1, "images": 8, "seconds": 0.1},
            {"processes": 2, "images": 4, "seconds": 0.08},
        ],
    }
    ways = benchmark.table(results).splitlines()[2:]
    assert ways[0] == "| float32 | 20.0 | 0.40 | 6.0 | 180 ms | 36 ms | 10 ms |"
    assert ways[1] == "| gradient checkpointing | 25.0 | 0.32 | 4.0 |  |  |  |"
    assert benchmark.processes_table(results).splitlines()[2:] == [
        "| 1 | 8 | 100 | 800 | 1.00 |",
        "| 2 | 4 | 80 | 1000 | 1.25 |",
    ]
    many = benchmark.many_table(results)
    assert "| training, an epoch with 5.4 questions each | 694 hours | 347 hours |" in many
    assert "| encoding each once, to search or to evaluate | 50 hours | 50 hours |" in many
    assert "| keeping the states of as many images | 2.60 TB | 1.30 TB |" in many
    assert "| re-ranking the best 16 of a query, no states kept | 3.0 s | 3.0 s |" in many
    assert "| re-ranking the best 128 of a query, states kept | 1.3 s | 1.3 s |" in many
