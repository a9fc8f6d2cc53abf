"""The table by hand, and what it is computed from on a model small enough for a test."""

import json

import pytest


def test_table_by_hand(benchmark):
    results = {"flops": 1e12, "parameters": 64_000_000, "photographs_per_second": 50.0, "bytes": 100_000}
    results["assumed"] = {"peak": 1000e12, "reached": 0.5, "network": 50e9}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in benchmark.table(results).splitlines()]
    # 500 pairs a second on each of 64; 2 * 4 * 64 M * 63 / 64 bytes are 504 MB, of which 50 GB/s need 10 ms.
    values = ["1.00 TFLOP", "500", "52 minutes", "10.0", "3.2 GB/s", "10 TB", "0.5 GB", "10 ms", "50", "1.0 GB"]
    assert [row[1] for row in rows[2:]] == values
    assert rows[0][0] == "100,000,000 pairs, 64 GPUs, computed" and "assumed" in rows[3][2]


def test_counts_and_measures(benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "PHOTOGRAPHS", 2)
    results = benchmark.main(["--width", "64", "--num_layers", "2", "--output_dir", str(tmp_path)])
    (path,) = tmp_path.glob("many_gpus-*.json")
    assert json.loads(path.read_text()) == results
    assert results["photographs_per_second"] > 0 and results["bytes"] == pytest.approx(160_000, rel=0.3)
    # Forward and backward passes of 197 patches through two layers of 12 * 64 * 64 weights, at least.
    assert results["flops"] > 6 * 197 * 2 * 12 * 64 * 64
    assert benchmark.table(results) in capsys.readouterr().out
