"""What stops a run before it begins, and whole runs of a task."""

import pytest

from hivilt.data.augmentation import Augmentation
from hivilt.training.arguments import TaskArguments, parse_arguments
from hivilt.training.main import augmentation_of


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], None),
        (["--random_crop", "0.5"], Augmentation(random_crop=0.5)),
        (["--random_flip", "swap"], Augmentation(random_flip="swap")),
        (["--rand_augment", "2", "7"], Augmentation(rand_augment=(2, 7))),
    ],
)
def test_augmentation_is_off_unless_asked_for(flags, expected):
    assert augmentation_of(parse_arguments(flags, TaskArguments, {})[0]) == expected


@pytest.mark.parametrize("flags", [["--random_crop", "0"], ["--rand_augment", "2"], ["--rand_augment", "0", "7"]])
def test_augmentation_out_of_range_names_the_flag(flags):
    with pytest.raises(ValueError, match=f"^{flags[0][2:]}: expected"):
        augmentation_of(parse_arguments(flags, TaskArguments, {})[0])


def test_processes_that_do_not_know_of_each_other_are_refused(begin, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one of 2 processes, each of which would train by itself.*--use_cpu"):
        begin("--use_cpu", "false")


@pytest.mark.parametrize("name", ["train_file", "validation_file", "test_file", "data_dir", "image_dir"])
def test_data_that_is_not_there_stops_before_the_run(name, begin, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"^{name}: there is no (file|folder) 'nosuch' in {tmp_path}"):
        begin(f"--{name}", "nosuch")
    with pytest.raises(FileNotFoundError, match=rf"^{name}: there is no (file|folder) '{tmp_path}/no/such'\."):
        begin(f"--{name}", str(tmp_path / "no/such"))
    (tmp_path / "nosuhc").mkdir()
    with pytest.raises(FileNotFoundError, match="did you mean nosuhc?"):
        begin(f"--{name}", "nosuch")
    assert not (tmp_path / "outputs").exists()


def test_a_file_for_a_folder_and_a_folder_for_a_file_are_told(begin, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "train.csv").write_text("image")
    with pytest.raises(ValueError, match="^train_file: images is a folder; name a file"):
        begin("--train_file", "images")
    with pytest.raises(ValueError, match="^data_dir: train.csv is a file; name a folder"):
        begin("--data_dir", "train.csv")


def test_an_output_dir_that_is_a_file_stops_before_the_run(begin, tmp_path):
    (tmp_path / "taken").write_text("")
    for place in ("taken", "taken/inside"):
        with pytest.raises(
            NotADirectoryError, match=f"^output_dir: {place} cannot be a folder, since .*taken is a file"
        ):
            begin("--output_dir", place)
    begin("--output_dir", "free/inside")
    assert not (tmp_path / "free").exists()


def test_an_output_dir_that_cannot_be_written_stops_before_the_run(begin):
    with pytest.raises(PermissionError, match="^output_dir: nothing can be written in /proc"):
        begin("--output_dir", "/proc/outputs")


def test_a_run_is_not_begun_anew_over_an_earlier_one_unasked(begin, tmp_path):
    """As transformers' `overwrite_output_dir` did; a finished one has left its state beside its checkpoints."""
    start = lambda *more: begin("--output_dir", str(tmp_path), *more)
    start()
    (tmp_path / "checkpoint-7").mkdir()
    start()  # one that was cut off is none
    (tmp_path / "checkpoint-7/trainer_state.json").write_text("{}")
    with pytest.raises(
        ValueError,
        match="^output_dir: .* not finished, up to checkpoint-7.*--resume_from_checkpoint last.*--overwrite_outp",
    ):
        start()
    for more in (["--overwrite_output_dir"], ["--resume_from_checkpoint", "last"], ["--do_predict"]):
        start(*more)
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="^output_dir: .* a run that was finished. .*--overwrite_output_dir"):
        start()
    start("--overwrite_output_dir")


def test_a_checkpoint_is_not_trained_on_in_its_own_folder_unasked(begin, tmp_path):
    """Its weights would be written over."""
    (tmp_path / "config.json").write_text("{}")
    start = lambda *more: begin("--output_dir", str(tmp_path), "--model_name_or_path", f"{tmp_path}/.", *more)
    with pytest.raises(ValueError, match="^output_dir: .* is what model_name_or_path names.*--overwrite_output_dir"):
        start()
    for more in (["--overwrite_output_dir"], ["--do_predict"], ["--output_dir", str(tmp_path / "other")]):
        start(*more)
