"""Which checkpoints training goes on from, and which are of another model."""

from types import SimpleNamespace

import pytest
from transformers import ViTImageProcessor

from hivilt import HiViLTProcessor
from hivilt.training.resuming import check_resumable, last_checkpoint
from tiny import IMAGE_SIZE, make_config, make_processor, make_tokenizer


def save(folder, config, processor):
    """What a checkpoint says of itself; weights and optimizer are not looked at."""
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    for name in ("scheduler.pt", "trainer_state.json"):
        (folder / name).write_text("{}")
    return folder


def model_of(**fusion):
    return SimpleNamespace(config=make_config(**fusion))


@pytest.mark.parametrize(("vision", "text"), [("vit", "bert"), ("swin", "t5"), ("convnext", "clip")])
def test_a_checkpoint_is_of_the_model_that_wrote_it(vision, text, tmp_path):
    config, processor = make_config(vision, text), make_processor()
    save(tmp_path, config, processor)
    processor(text=["what color is the image", "a"], padding=True)  # which leaves its mark in the tokenizer
    config.note, config.use_cache = "set by somebody", False
    check_resumable(tmp_path, SimpleNamespace(config=config), processor)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"id2label": {0: "yes", 1: "no"}},
            r"id2label.1 \(answers\) was 'red' and is 'no'; id2label.2 .* 'no' and is None",
        ),
        ({"num_fusion_stages": 3}, r"num_fusion_stages \(--fusion\) was 2 and is 3"),
        ({"fusion_top_k": 2}, r"fusion_top_k \(--fusion\) was None and is 2"),
        ({"vision": "swin"}, r"vision_config.model_type \(--vision_model\) was 'vit' and is 'swin'"),
        ({"text": "t5"}, r"text_config.model_type \(--text_model\) was 'bert' and is 't5'"),
        (
            {"problem_type": "multi_label_classification"},
            r"problem_type \(answers a question\) was 'single_label_.*' and is 'multi_label",
        ),
    ],
    ids=str,
)
def test_another_model_is_refused_by_name(other, message, tmp_path):
    usual = {"id2label": {0: "yes", 1: "red", 2: "no"}, "problem_type": "single_label_classification"}
    save(tmp_path, make_config(**usual), make_processor())
    with pytest.raises(ValueError, match=f"^resume_from_checkpoint: .*{message}"):
        check_resumable(tmp_path, model_of(**{**usual, **other}), make_processor())


def test_other_tokens_and_other_images_are_refused_by_name(tmp_path):
    save(tmp_path, make_config(), make_processor())
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["zebra"])
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    other = HiViLTProcessor(ViTImageProcessor(size=size), tokenizer)
    with pytest.raises(ValueError, match=r"its tokenizer \(--text_model\) is another one"):
        check_resumable(tmp_path, model_of(), other)
    for changed in ({"size": {"height": 8, "width": 9}}, {"image_mean": [0.1, 0.2, 0.3]}, {"do_rescale": False}):
        other = HiViLTProcessor(ViTImageProcessor(**{"size": size, **changed}), make_tokenizer())
        with pytest.raises(ValueError, match=f"image_processor.{next(iter(changed))}.* was .* and is"):
            check_resumable(tmp_path, model_of(), other)


def test_a_checkpoint_of_the_model_only_is_no_place_to_go_on_from(tmp_path):
    save(tmp_path, make_config(), make_processor())
    (tmp_path / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match="holds the model only .*--model_name_or_path"):
        check_resumable(tmp_path, model_of())


def test_the_last_is_that_of_the_highest_step_and_whole(tmp_path):
    for name, state in (
        ("checkpoint-9", "{}"),
        ("checkpoint-10", "{}"),
        ("checkpoint-11", '{"cut'),
        ("checkpoint-x", "{}"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path / "nowhere") is None
