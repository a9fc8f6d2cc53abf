"""Captioned images as the flags of a task name them."""

import json

import pytest

from caption_miniatures import make_caption_files, make_caption_miniature
from hivilt.data.caption_benchmarks import CAPTION_BENCHMARKS
from hivilt.tasks.arguments import CaptionArguments
from hivilt.tasks.captioned import read_captioned

SPLITS = ("train", "validation", "test")


def sizes(found):
    name, splits = found
    return name, {split: len(examples) for split, examples in splits.items()}


def test_files_a_benchmark_and_karpathys_layout(tmp_path):
    make_caption_files(tmp_path / "mine")
    files = {f"{split}_file": str(tmp_path / f"mine/{split}.jsonl") for split in SPLITS}
    found = read_captioned(CaptionArguments(**files), SPLITS, None)
    assert sizes(found) == ("mine", {"train": 10, "validation": 5, "test": 7})

    make_caption_miniature("coco", tmp_path / "coco")
    expected = {"train": 10, "validation": 4, "test": 4}
    args = CaptionArguments(benchmark="coco", data_dir=str(tmp_path / "coco"))
    assert sizes(read_captioned(args, SPLITS, CAPTION_BENCHMARKS["coco"])) == ("MS-COCO", expected)
    args = CaptionArguments(karpathy_file=str(tmp_path / "coco/dataset_coco.json"), image_dir=str(tmp_path / "coco"))
    assert sizes(read_captioned(args, SPLITS, None)) == ("dataset_coco", expected)


def test_only_images_of_the_test_split_may_lack_captions_and_only_where_they_are_captioned(tmp_path):
    make_caption_files(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    (tmp_path / "bare.jsonl").write_text("\n".join(json.dumps({"image": row["image"]}) for row in rows))
    bare = CaptionArguments(test_file=str(tmp_path / "bare.jsonl"))
    _, splits = read_captioned(bare, ["test"], None, captions_needed=False)
    assert [one.captions for one in splits["test"]] == [()] * 7
    with pytest.raises(ValueError, match="no column 'caption'"):
        read_captioned(bare, ["test"], None)
    for split in ("train", "validation"):
        args = CaptionArguments(**{f"{split}_file": str(tmp_path / "bare.jsonl")})
        with pytest.raises(ValueError, match="no column 'caption'"):
            read_captioned(args, [split], None, captions_needed=False)
