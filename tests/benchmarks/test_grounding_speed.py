"""benchmarks/grounding_speed.py on models of a few thousand parameters."""

import json

import pytest
import torch


def test_it_measures_each_model_at_both_numbers(benchmark, tmp_path):
    results = benchmark.main(["--tiny", "--repeats", "1", "--output_dir", str(tmp_path)])
    (path,) = tmp_path.glob("grounding_speed-*.json")
    assert json.loads(path.read_text()) == results
    speeds = results["expressions_per_second"]
    assert list(speeds) == [*benchmark.SIDES, benchmark.OWL, benchmark.DINO, benchmark.DINO_EACH]
    assert all(set(found) == {"1", "10"} for found in speeds.values()) and len(results["goals"]) == 2
    assert benchmark.table(results).count("\n") == 6
    # A pass for each expression costs ten times one, a prompt of all less than that.
    assert speeds[benchmark.DINO]["10"] > 2 * speeds[benchmark.DINO_EACH]["10"]


@torch.no_grad()
def test_grounding_dino_is_prompted_once_or_for_each(benchmark):
    model, prompts = benchmark.make_grounding_dino(tiny=True), []
    model.register_forward_pre_hook(lambda _, args, given: prompts.append(given["input_ids"]), with_kwargs=True)
    benchmark.find(model, 3, (96, 128))
    (prompt,) = prompts
    assert prompt[0, 0] == benchmark.CLS and prompt[0, -1] == benchmark.SEP
    assert (prompt == benchmark.FULL_STOP).sum() == 3 and prompt.shape == (1, 2 + 3 * (benchmark.NUM_WORDS + 1))
    benchmark.find(model, 3, (96, 128), each=True)
    parts = [one[0, 1:-1] for one in prompts[1:]]
    assert torch.equal(torch.cat(parts), prompt[0, 1:-1]) and len(parts) == 3


@pytest.mark.parametrize("name", ["HiViLT, 224 pixels", "OWL-ViT"])
def test_others_take_all_expressions_with_one_image(benchmark, name):
    made = {"OWL-ViT": benchmark.make_owl_vit(tiny=True)}
    head = benchmark.HiViLTForVisualGrounding
    model = made.get(name) or benchmark.make_hivilt(64, 4, 96, head)
    images = []
    model.register_forward_pre_hook(lambda _, args, given: images.append(given["pixel_values"]), with_kwargs=True)
    outputs = []
    model.register_forward_hook(lambda *call: outputs.append(call[-1].logits))
    benchmark.find(model, 3, (96, 96))
    assert images[0].shape == (1, 3, 96, 96) and len(images) == 1 and 3 in outputs[0].shape
