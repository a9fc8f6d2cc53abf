"""benchmarks/captioning_speed.py on models of a few thousand parameters."""

import pytest


@pytest.mark.slow
def test_it_measures_each_setting_of_both_models(benchmark, tmp_path):
    size = ["--width", "64", "--num_layers", "4", "--side", "64", "--repeats", "1"]
    results = benchmark.main([*size, "--output_dir", str(tmp_path)])
    settings = results["captions_per_second"]
    assert len(settings) == 10 and all(set(found) == {"HiViLT", "BLIP"} for found in settings.values())
    assert len(results["goals"]) == 8 and all("met" in goal for goal in results["goals"])
    assert benchmark.table(results).count("\n") == 11
    assert len(list(tmp_path.iterdir())) == 1
