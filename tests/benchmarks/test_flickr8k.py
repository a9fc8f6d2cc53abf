"""Two seeds on a miniature with tiny encoders."""

import json

from transformers import BertModel, ViTImageProcessorPil, ViTModel

from caption_miniatures import make_caption_miniature
from tiny import TEXT_CONFIGS, VISION_CONFIGS, make_tokenizer


def test_the_first_seed_encodes_and_the_second_does_not(benchmark, tmp_path, capsys):
    make_caption_miniature("flickr8k", tmp_path / "data")
    ViTModel(VISION_CONFIGS["vit"]()).save_pretrained(tmp_path / "vision")
    ViTImageProcessorPil(size={"height": 20, "width": 20}).save_pretrained(tmp_path / "vision")
    BertModel(TEXT_CONFIGS["bert"]()).save_pretrained(tmp_path / "text")
    make_tokenizer().save_pretrained(tmp_path / "text")
    tiny = {"hidden_size": 16, "num_attention_heads": 2, "fusion_intermediate_size": 16}
    results = benchmark.main(
        [
            *("--data_dir", str(tmp_path / "data"), "--seeds", "3", "4", "--output_dir", str(tmp_path / "results")),
            *("--vision_model", str(tmp_path / "vision"), "--text_model", str(tmp_path / "text")),
            *("--fusion", json.dumps(tiny), "--max_steps", "1", "--use_cpu"),
        ]
    )
    encoded = [{part: one["encoded"] for part, one in run["encoder_cache"].items()} for run in results["runs"]]
    assert encoded[0]["vision"] == 12 and encoded[0]["text"] > 16 and encoded[1] == {"vision": 0, "text": 0}
    (path,) = (tmp_path / "results").glob("*.json")
    assert json.loads(path.read_text()) == results
    printed = capsys.readouterr().out
    assert "vision: 12 of 12 encoded" in printed and "| re-ranked" in printed
