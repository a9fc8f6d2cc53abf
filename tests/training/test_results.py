"""What a run writes down and warns of."""

import json
import math

import pytest
import torch

from hivilt.training.arguments import TaskArguments, parse_arguments
from hivilt.training.results import (
    environment,
    peak_memory_bytes,
    warn_of_chance,
    warn_of_few,
    without_place,
    write_json,
)


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("/data/pets/train.jsonl", "pets/train.jsonl"),
        ("../pets/train.CSV", "pets/train.CSV"),
        ("~/pets/train.json", "pets/train.json"),
        ("pets/train.jsonl", "pets/train.jsonl"),
        ("/home/me/train.jsonl", "train.jsonl"),
        ("~/train.jsonl", "train.jsonl"),
        ("../train.jsonl", "train.jsonl"),
        ("/data/pets", "pets"),
        ("red heart", "red heart"),
    ],
)
def test_a_data_file_keeps_its_folder_and_no_more(place, shown, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert without_place(place) == shown


def test_environment_and_memory():
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["num_threads"] == torch.get_num_threads()
    assert all(value not in (None, "") for value in found.values())
    assert math.log2(peak_memory_bytes()) > 26


def test_json_is_whole_or_what_it_was_and_never_holds_nan(tmp_path):
    write_json(tmp_path / "results.json", {"accuracy": 0.5})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "results.json", {"accuracy": [math.nan]})
    assert json.loads((tmp_path / "results.json").read_text()) == {"accuracy": 0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(("count", "error"), [(1, "50"), (3, "29"), (99, "5")])
def test_a_split_of_few_questions_is_told_with_its_standard_error(count, error, caplog):
    warn_of_few("validation", count, "questions")
    assert (
        f"validation: {count} questions are few; a share of them has a standard error of up to {error} percent"
        in caplog.text
    )


@pytest.mark.parametrize("count", [0, 100])
def test_a_split_that_is_large_enough_or_not_there_is_not_told(count, caplog):
    warn_of_few("validation", count, "questions")
    assert not caplog.records


@pytest.mark.parametrize(
    ("value", "chance", "count", "flags", "told"),
    [
        (0.01, 0.02, 216, [], "--vision_model google/mobilenet_v2_1.0_224 --text_model sentence-transformers/"),
        (0.04, 0.02, 216, [], "--freeze vision text"),  # three standard errors are 0.0286
        (0.05, 0.02, 216, [], None),
        (0.5, 0.5, 1000, ["--text_model", "mine"], "--vision_model google/mobilenet_v2_1.0_224 --freeze vision."),
        (0.01, 0.02, 216, ["--vision_model", "mine"], None),
        (0.01, 0.02, 216, ["--model_name_or_path", "mine"], None),
        (1.0, 1.0, 216, [], None),
        (0.0, 0.0, 0, [], None),
    ],
)
def test_a_run_from_scratch_that_ends_at_chance_is_told_how_to_start(value, chance, count, flags, told, caplog):
    task, _ = parse_arguments(flags, TaskArguments, {})
    warn_of_chance(task, "mean recall", value, chance, count, 216)
    if told is None:
        assert not caplog.records
    else:
        assert told in caplog.text and "216 images were too few to learn to see from scratch" in caplog.text
