"""What a run holds out of its training data."""

import json
import logging
import re

import datasets
import pytest

from hivilt.data.reasoning import Statement
from hivilt.data.vqa_benchmarks import VQA_BENCHMARKS
from hivilt.tasks.arguments import VQAArguments
from hivilt.tasks.question_answering import QuestionAnswering
from hivilt.training.arguments import parse_arguments
from hivilt.training.splits import HELD_OUT, prepare_splits
from miniatures import make_vqa_miniature
from tiny import make_image


def test_vqa_rad_holds_out_questions_with_their_rewordings(tmp_path):
    """Its test split asks about training images, but never what training asks in other words."""
    make_vqa_miniature("vqa-rad", tmp_path / "data")
    args, training_args = parse_arguments(
        ["--benchmark", "vqa-rad", "--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path), "--use_cpu"],
        VQAArguments,
        {},
    )
    benchmark = VQA_BENCHMARKS["vqa-rad"]
    _, splits, _, _ = prepare_splits(args, training_args, QuestionAnswering(args).read, benchmark.hold_out_by)
    train, held_out = ({one.group for one in splits[split]} for split in ("train", "validation"))
    assert held_out and not train & held_out
    assert {one.image_id for one in splits["validation"]} <= {one.image_id for one in splits["train"]}


def statements(*pairs):
    return [Statement(str(n), pair, pair, "s", "true") for n, pair in enumerate(pairs)]


def test_a_run_that_goes_on_holds_out_the_same_images_of_statements(tmp_path):
    for name in "abcdefgh":
        make_image("red").save(tmp_path / f"{name}.png")
    path = lambda names: tuple(str(tmp_path / f"{name}.png") for name in names)
    rows = statements(*map(path, ("ab", "ba", "bc", "de", "fg", "gf")))
    files = ["--train_file", str(tmp_path / "train.jsonl"), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    args, training_args = VQAArguments.parse(files)
    _, splits, _, held_out = prepare_splits(args, training_args, lambda splits: ("toy", {"train": rows}))
    sides = [{image for one in splits[split] for image in one.image_ids} for split in ("train", "validation")]
    assert not sides[0] & sides[1] and set(held_out) == sides[1]
    assert splits["train"] + splits["validation"] != rows and len(splits["train"] + splits["validation"]) == 6

    checkpoint = tmp_path / "out" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    (tmp_path / "out" / HELD_OUT).write_text(json.dumps(held_out))
    training_args.resume_from_checkpoint = str(checkpoint)
    new = statements((held_out[0], path("h")[0]), *(one.images for one in rows))
    _, again, _, noted = prepare_splits(args, training_args, lambda splits: ("toy", {"train": new}))
    assert noted == held_out
    for split in ("train", "validation"):
        assert [one.images for one in again[split]] == [one.images for one in splits[split]]


@pytest.mark.parametrize("kind", ["paths", "inside", "inside, with ids"])
def test_images_that_are_trained_on_and_tested_with_are_told(tmp_path, caplog, kind):
    files, first = [], r"\S+2\.png" if kind == "paths" else r"row 1 of column 'image' \(2\.png\)"
    for number, color in enumerate(("red", "blue", "green", "white")):
        make_image(color).save(tmp_path / f"{number}.png")
    for split, images in (("train", "012"), ("test", "23")):
        rows = [{"image": f"./{image}.png", "question": "what color", "answer": "red"} for image in images]
        file = tmp_path / f"{split}.{'jsonl' if kind == 'paths' else 'parquet'}"
        if kind == "paths":
            file.write_text("\n".join(map(json.dumps, rows)))
        else:
            # Ids of another split's own, of which the same ones are of other images.
            stored = [{"bytes": (tmp_path / row["image"]).read_bytes(), "path": row["image"][2:]} for row in rows]
            rows = [
                {**row, "image": image, "id": str(n)} for n, (row, image) in enumerate(zip(rows, stored, strict=True))
            ]
            datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(file)
        files += [f"--{split}_file", str(file)]
    ids = ["--image_id_column", "id"] if kind == "inside, with ids" else []
    args, training_args = VQAArguments.parse([*files, *ids, "--output_dir", str(tmp_path / "out"), "--use_cpu"])
    with caplog.at_level(logging.WARNING, "hivilt"):
        prepare_splits(args, training_args, QuestionAnswering(args).read)
    (said,) = (one.getMessage() for one in caplog.records if "images," in one.getMessage())
    assert re.match(rf"test: 1 of its 2 images, {first} first, are in (train|validation) data, too", said)
