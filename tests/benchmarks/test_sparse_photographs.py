"""Two trainings of one step on tiny encoders and a few made-up photographs."""

import json

import pytest
import torch
from transformers import BertModel, ViTImageProcessorPil, ViTModel

from miniatures import make_vqa_miniature
from tiny import IMAGE_SIZE, TEXT_CONFIGS, VISION_CONFIGS, make_tokenizer


@pytest.mark.slow
def test_tells_accuracy_rows_and_time_for_each_number_of_tokens(benchmark, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    make_vqa_miniature("daquar", tmp_path / "daquar")
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ViTModel(VISION_CONFIGS["vit"]()).save_pretrained(tmp_path / "vision")
    ViTImageProcessorPil(size=size).save_pretrained(tmp_path / "vision")
    BertModel(TEXT_CONFIGS["bert"]()).save_pretrained(tmp_path / "text")
    make_tokenizer().save_pretrained(tmp_path / "text")
    tiny = {"hidden_size": 16, "num_attention_heads": 2, "num_fusion_stages": 2, "fusion_intermediate_size": 16}
    monkeypatch.setattr(benchmark, "FUSION", tiny)
    monkeypatch.setattr(benchmark, "TOP_KS", (None, 4, 1))
    monkeypatch.setattr(benchmark, "TOP_K", 4)
    flags = ["--data_dir", str(tmp_path / "daquar"), "--runs_dir", str(tmp_path / "runs"), "--max_steps", "1"]
    flags += ["--vision_model", str(tmp_path / "vision"), "--text_model", str(tmp_path / "text")]
    flags += ["--image_processor", json.dumps({"size": size})]
    results = benchmark.main([*flags, "--output_dir", str(tmp_path / "out")])
    (path,) = (tmp_path / "out").glob("sparse_photographs-*.json")
    assert json.loads(path.read_text(encoding="utf-8")) == results
    assert str(tmp_path) not in path.read_text(encoding="utf-8")  # the file is shared
    assert list(results["trained"]) == ["dense", "k = 4"]
    for found in results["trained"].values():
        rows = [one["fused_rows"][0] for one in found["by_top_k"].values()]
        assert rows[0] == 25 and 25 > rows[1] > rows[2] >= 1
    printed = capsys.readouterr().out
    assert benchmark.table(results) in printed and len(results["goals"]) == 2
