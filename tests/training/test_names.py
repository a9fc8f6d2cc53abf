"""How a name behind which there is nothing is told."""

import pytest

from hivilt import HiViLTForQuestionAnswering
from hivilt.training.models import load_or_build


@pytest.mark.parametrize("name", ["model_name_or_path", "vision_model", "text_model", "dataset_name"])
@pytest.mark.parametrize(
    "place", ["outputs/nosuch", "./nosuch", "../nosuch", "/nosuch", "a/b/c", "here/nosuch", "nosuch/"]
)
def test_a_mistyped_folder_is_told_as_a_missing_folder(name, place, begin, tmp_path):
    (tmp_path / "here").mkdir()
    with pytest.raises(FileNotFoundError, match=f"^{name}: there is no folder '{place}'"):
        begin(f"--{name}", place)


@pytest.mark.parametrize("name", ["model_name_or_path", "vision_model", "text_model"])
def test_a_folder_without_a_model_is_told_so(name, begin, tmp_path):
    (tmp_path / "run/checkpoint-2").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"^{name}: the folder run has no config.json"):
        begin(f"--{name}", "run")
    (tmp_path / "run/checkpoint-2/config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="did you mean run/checkpoint-2?"):
        begin(f"--{name}", "run")
    with pytest.raises(NotADirectoryError, match=f"^{name}: run/checkpoint-2/config.json is a file"):
        begin(f"--{name}", "run/checkpoint-2/config.json")
    begin(f"--{name}", "run/checkpoint-2")


def test_a_name_that_the_hub_does_not_give_either_is_told_as_both(begin):
    for name in ("outptus", "me/nosuch"):
        args, _ = begin("--model_name_or_path", name)
        with pytest.raises(
            FileNotFoundError, match=f"^model_name_or_path: there is no folder '{name}' .* and the Hub gave"
        ):
            load_or_build(args, HiViLTForQuestionAnswering)
