"""All heads and a peer on this machine's device, small; the tables and goals by hand."""

import json

import pytest


@pytest.mark.slow
def test_every_head_trains_and_answers(benchmark, tmp_path, capsys, monkeypatch):
    few = {name: benchmark.CONTESTANTS[name] for name in ("HiViLT", "ViLT, 384")}
    monkeypatch.setattr(benchmark, "CONTESTANTS", few)
    size = ["--width", "192", "--num_layers", "3", "--images", "2", "--repeats", "1"]
    results = benchmark.main([*size, "--output_dir", str(tmp_path)])
    (path,) = tmp_path.glob("accelerator-*.json")
    assert json.loads(path.read_text()) == json.loads(json.dumps(results))
    assert list(results["heads"]) == list(benchmark.HEADS) and list(results["peers"]) == list(few)
    for found in results["heads"].values():
        assert found["texts"] == 11 and found["training"]["flops"] > 1e9
        assert min(found[kind]["seconds"] for kind in ("training", "inference")) > 0
    printed = capsys.readouterr().out
    assert all(shown(results) in printed for shown in (benchmark.table, benchmark.peers_table, benchmark.goals_table))


def test_tables_by_hand(benchmark):
    one = {"images": 64, "texts": 320}
    one["training"] = {"seconds": 2.0, "flops": 989e12, "waits": 3, "peak_memory_bytes": 3 * 2**30}
    one["inference"] = {"seconds": 0.5, "waits": 0, "peak_memory_bytes": 2**30}
    times = {"5.4": 0.01, "10.0": 0.01}
    slower = {"5.4": 0.02, "10.0": 0.04}
    peers = {"HiViLT": dict.fromkeys(("inference", "training"), times)}
    peers["ViLT, 384"] = dict.fromkeys(("inference", "training"), slower)
    results = {"heads": {"answering": one}, "peers": peers}
    results["environment"] = {"device": "cuda", "device_name": "NVIDIA H200"}
    assert (
        benchmark.table(results).splitlines()[-1] == "| answering | 32 | 160 | 3.0 | 3 | 128 | 640 | 1.0 | 0 | 50 % |"
    )
    assert "| ViLT, 384 | 50 | 2.00x | 25 | 4.00x |" in benchmark.peers_table(results)
    assert [(goal["measured"], goal["met"]) for goal in benchmark.judge(results)] == [("4.00x", True), ("50 %", True)]
    results["environment"]["device_name"] = "Some other card"
    assert [goal["measured"] for goal in benchmark.judge(results)] == ["4.00x", "not measured"]
    assert benchmark.table(results).endswith("|  |")
    results["environment"] = {"device": "cpu", "device_name": "AMD EPYC"}
    results["goals"] = benchmark.judge(results)
    assert benchmark.goals_table(results).count("| not measured | missed: no GPU could be had |") == 2
