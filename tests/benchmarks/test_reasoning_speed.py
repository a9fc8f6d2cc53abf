"""benchmarks/reasoning_speed.py on models of a few thousand parameters."""

import json

import pytest
import torch


def test_it_measures_each_model_at_both_numbers(benchmark, tmp_path):
    results = benchmark.main(["--tiny", "--repeats", "1", "--output_dir", str(tmp_path)])
    (path,) = tmp_path.glob("reasoning_speed-*.json")
    assert json.loads(path.read_text()) == results
    speeds = results["pairs_per_second"]
    assert list(speeds) == [benchmark.VILT, *benchmark.VISION]
    assert all(set(found) == {"1", "5"} for found in speeds.values()) and len(results["goals"]) == 2
    assert benchmark.table(results).count("\n") == 4


@pytest.mark.parametrize("name", ["ViLT", "HiViLT"])
def test_each_image_is_in_as_many_pairs_as_it_says(benchmark, name):
    head = benchmark.HiViLTForImagesAndTextClassification
    model = benchmark.make_vilt(tiny=True) if name == "ViLT" else benchmark.make_hivilt(64, 4, 64, head)
    given = []
    model.register_forward_pre_hook(lambda _, args, inputs: given.append(inputs), with_kwargs=True)
    for uses, num_pairs in benchmark.PAIRS.items():
        benchmark.judge(model, num_pairs, 64)
        images = given[-1]["pixel_values"]
        if name == "HiViLT":
            assert images.shape == (4, 3, 64, 64)
            images = images[given[-1]["image_index"]]
        assert images.shape == (num_pairs, 2, 3, 64, 64) and given[-1]["input_ids"].shape[0] == num_pairs
        # Each of the four occurs so often, and no pair is of one image twice.
        _, counts = images.flatten(0, 1).flatten(1).unique(dim=0, return_counts=True)
        assert counts.tolist() == [uses] * 4
        assert not torch.equal(images[:, 0], images[:, 1])
