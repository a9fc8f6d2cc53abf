"""Which index a script opens, and by which checkpoint."""

import pytest

from hivilt import HiViLTForQuestionAnswering, HiViLTForRetrieval
from hivilt.tasks.arguments import VQAArguments
from hivilt.tasks.indexing import open_index
from tiny import make_image, make_model, make_processor


@pytest.fixture
def place(tmp_path):
    """A folder of images, and checkpoints to index them by."""
    for name, model_class in (("answering", HiViLTForQuestionAnswering), ("retrieval", HiViLTForRetrieval)):
        make_model(model_class).save_pretrained(tmp_path / name)
        make_processor().save_pretrained(tmp_path / name)
    (tmp_path / "images").mkdir()
    for color in ("red", "blue", "green"):
        make_image(color).save(tmp_path / "images" / f"{color}.png")
    return tmp_path


def opened(place, *flags):
    args, training_args = VQAArguments.parse([*flags, "--use_cpu", "--output_dir", str(place / "index")])
    return open_index(args, training_args, HiViLTForQuestionAnswering)


def test_images_are_encoded_where_they_are_new_and_an_index_is_read_as_it_is(place):
    named = ["--model_name_or_path", str(place / "answering")]
    assert opened(place, "--index", str(place / "images"), *named).num_encoded == 3
    make_image("white").save(place / "images" / "white.png")
    assert len(opened(place)) == len(opened(place, "--index", str(place / "index"))) == 3
    index = opened(place, "--index", str(place / "images"), *named)
    assert index.num_encoded == 1 and len(index) == 4
    assert not index.model.training
    before = {path: path.stat().st_mtime_ns for path in (place / "index").rglob("*")}
    assert opened(place, "--index", str(place / "images"), *named).num_encoded == 0
    assert {path: path.stat().st_mtime_ns for path in (place / "index").rglob("*")} == before


def test_what_is_no_index_or_of_another_head_is_told(place):
    with pytest.raises(FileNotFoundError, match="does not hold an index: build one there"):
        opened(place)
    with pytest.raises(ValueError, match="is a checkpoint of HiViLTForRetrieval, expected HiViLTForQuestionAnswering"):
        opened(place, "--index", str(place / "images"), "--model_name_or_path", str(place / "retrieval"))
