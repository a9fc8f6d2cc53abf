"""The model of a run."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, models
from trainers import ANSWERS
from transformers import BertModel, PreTrainedTokenizerFast, ViTImageProcessorPil, ViTModel, set_seed

from hivilt import (
    HiViLTForConditionalGeneration,
    HiViLTForQuestionAnswering,
    HiViLTForRetrieval,
    HiViLTProcessor,
)
from hivilt.tasks.arguments import GroundingArguments
from hivilt.training.arguments import TaskArguments
from hivilt.training.models import (
    freeze_parts,
    learn_words,
    load_or_build,
    parameter_table,
    set_threads,
    tell_of_thawed,
    train_tokenizer,
)
from hivilt.training.results import peak_memory_bytes
from tiny import TEXT_CONFIGS, VISION_CONFIGS, make_config, make_image, make_model, make_processor, make_tokenizer


def test_a_model_of_another_kind_is_told_so(tmp_path):
    BertModel(TEXT_CONFIGS["bert"]()).save_pretrained(tmp_path / "bert")
    for trains in (False, True):
        with pytest.raises(ValueError, match="^model_name_or_path: .* is a checkpoint of BertModel, expected "):
            load_or_build(
                TaskArguments(model_name_or_path=str(tmp_path / "bert")), HiViLTForQuestionAnswering, trains=trains
            )


@pytest.mark.parametrize(("asked", "processes", "share"), [(3, "1", 3), (None, "1", "cores"), (None, "2", "half")])
def test_a_large_model_has_the_process_s_share_of_the_machine(asked, processes, share, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)), raising=False)
    with torch.device("meta"):
        large = torch.nn.Linear(4000, 4000)
    try:
        set_threads(TaskArguments(num_threads=asked), large)
        assert torch.get_num_threads() == {"cores": 4, "half": 2}.get(share, share)
        for arguments, of_small in ((TaskArguments, 1), (GroundingArguments, 2)):
            set_threads(arguments(), torch.nn.Linear(2, 2))
            assert torch.get_num_threads() == of_small
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("results", "freeze", "told"),
    [
        ({"settings": {"freeze": ["vision", "text:2"]}}, [], "vision text:2: .*; --freeze vision text:2 leaves"),
        ({"settings": {"freeze": ["vision", "text:2"]}}, ["fusion", "text"], "vision: .*; --freeze fusion text vision"),
        ({"settings": {"freeze": ["vision"]}}, ["vision:1"], ""),  # as asked
        ({"settings": {"freeze": []}}, [], ""),
        ({"recall": 1.0}, [], ""),
        ([1.0], [], ""),
        (None, [], ""),
    ],
)
def test_what_an_earlier_run_froze_and_this_one_trains_is_told(results, freeze, told, tmp_path, caplog):
    caplog.set_level("INFO")
    if results is not None:
        (tmp_path / "results.json").write_text(json.dumps(results))
    for name in (str(tmp_path), None, "someone/model"):
        tell_of_thawed(TaskArguments(model_name_or_path=name, freeze=freeze))
    assert len(caplog.messages) == bool(told) and re.match(told, "".join(caplog.messages))


TEXTS = ["What color is the shape?", "is there a CIRCLE?", "is there a square in the image?"] * 3


@pytest.fixture(scope="module")
def elsewhere() -> tuple[dict, int]:
    """The vocabulary of `TEXTS` in another process, and the most memory that it had, while this one had 300 MiB more."""
    block = bytearray(300 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    program = "from hivilt.training.models import train_tokenizer\n"
    program += "from hivilt.training.results import peak_memory_bytes\n"
    program += f"print((train_tokenizer({TEXTS!r}).get_vocab(), peak_memory_bytes()))"
    started = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=600)
    return ast.literal_eval(started.stdout)


@pytest.mark.slow
def test_tokenizer_depends_on_nothing_but_the_texts(elsewhere):
    """Processes that train together each make their own, and must agree."""
    assert train_tokenizer(sorted(TEXTS, reverse=True)).get_vocab() == elsewhere[0]


def test_tokenizer_spells_what_it_does_not_know():
    tokenizer = train_tokenizer(["What color is the shape?", "is there a CIRCLE?", "is there a square in the image?"])
    inputs = tokenizer("Is the colors square?", padding="max_length", max_length=10)
    tokens = ["[CLS]", "is", "the", "color", "##s", "square", "?", "[SEP]", "[PAD]", "[PAD]"]
    assert tokenizer.convert_ids_to_tokens(inputs["input_ids"]) == tokens
    assert inputs["attention_mask"] == [1] * 8 + [0] * 2
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert tokenizer.decode(inputs["input_ids"], skip_special_tokens=True) == "is the colors square?"
    assert tokenizer("x7")["input_ids"] == [2, tokenizer.unk_token_id, 3]
    assert len(train_tokenizer(["a b c d e f g"], vocab_size=9)) == 9
    assert train_tokenizer(["ab ab cd"], min_count=2).tokenize("ab cd") == ["ab", "c", "##d"]


NEW = ["Exactly one shape is a hexagon", "what is blue?", "one hexagon, exactly"]


@pytest.fixture
def small(tmp_path):
    """The folder of a small model that learned from `TEXTS`, with its tokenizer."""
    model, processor = load_or_build(
        TaskArguments(), HiViLTForQuestionAnswering, TEXTS, id2label=dict(enumerate(ANSWERS))
    )
    for one in (model, processor):
        one.save_pretrained(tmp_path / "small")
    return str(tmp_path / "small")


def test_a_checkpoint_that_is_trained_on_learns_words_and_forgets_none(small, tmp_path):
    before, processor = load_or_build(TaskArguments(model_name_or_path=small), HiViLTForQuestionAnswering)
    model, reads = load_or_build(TaskArguments(model_name_or_path=small), HiViLTForQuestionAnswering, NEW, trains=True)
    old, new = processor.tokenizer, reads.tokenizer
    assert old.tokenize("hexagon") != ["hexagon"] and old.unk_token in old.tokenize("exactly")
    assert new.tokenize("exactly a hexagon") == ["exactly", "a", "hexagon"]
    assert new.tokenize("x ngy") == ["x", "n", "##g", "##y"]  # and the characters, to spell others with
    size, vocabulary = len(old), new.get_vocab()
    assert {piece: vocabulary[piece] for piece in old.get_vocab()} == old.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(new))) and len(new) > size
    assert model.config.text_config.vocab_size == len(model.get_input_embeddings().weight) == len(new)
    torch.testing.assert_close(model.get_input_embeddings().weight[:size], before.get_input_embeddings().weight)
    for text in TEXTS:
        inputs = [one(images=[make_image()], text=[text], return_tensors="pt") for one in (processor, reads)]
        assert inputs[0].input_ids.equal(inputs[1].input_ids)
        torch.testing.assert_close(model.eval()(**inputs[1]).logits, before.eval()(**inputs[0]).logits)

    for one in (model, reads):
        one.save_pretrained(tmp_path / "more")
    again, processor = load_or_build(
        TaskArguments(model_name_or_path=str(tmp_path / "more")), HiViLTForQuestionAnswering, NEW, trains=True
    )
    assert processor.tokenizer.get_vocab() == vocabulary
    # A run that is resumed has the words that it learned, whatever its data has now.
    args, resumed = TaskArguments(model_name_or_path=small), tmp_path / "more"
    empty, reads = load_or_build(args, HiViLTForQuestionAnswering, ["another word"], trains=True, resumed=resumed)
    assert reads.tokenizer.get_vocab() == vocabulary and len(empty.get_input_embeddings().weight) == len(vocabulary)
    inputs = processor(images=[make_image()], text=NEW[:1], return_tensors="pt")
    torch.testing.assert_close(again.eval()(**inputs).logits, model(**inputs).logits)


def test_a_size_that_a_checkpoint_does_not_take_is_told(small, caplog):
    for size, told in ((64, False), (96, True)):
        load_or_build(TaskArguments(model_name_or_path=small, image_size=size), HiViLTForQuestionAnswering)
        assert ("image_size: got 96, but" in caplog.text) == told


@pytest.mark.parametrize("freeze", [["text"], ["vision", "text:1"], None])
def test_no_word_is_learned_where_the_text_encoder_is_frozen_or_does_not_train(small, freeze):
    args = TaskArguments(model_name_or_path=small, freeze=freeze or [])
    _, processor = load_or_build(args, HiViLTForQuestionAnswering, NEW, trains=freeze is not None)
    assert processor.tokenizer.get_vocab() == train_tokenizer(TEXTS).get_vocab()


def test_pretrained_tokenizers_keep_their_pieces():
    """Those that know parts of words, byte pairs and what is no word piece at all."""
    texts = ["red circle", "redcircle"]
    trained = train_tokenizer(texts)
    state = json.loads(trained.backend_tokenizer.to_str())
    state["model"]["vocab"] |= {"##circle": len(trained)}
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    pieces = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **special)
    byte_pairs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"[PAD]": 0}, [])), pad_token="[PAD]")
    model = make_model(HiViLTForQuestionAnswering)
    for tokenizer in (pieces, byte_pairs):
        processor, size = HiViLTProcessor(make_processor().image_processor, tokenizer), len(tokenizer)
        assert learn_words(model, processor, NEW) == [] and len(processor.tokenizer) == size
    writes = make_model(HiViLTForConditionalGeneration)
    assert learn_words(writes, HiViLTProcessor(make_processor().image_processor, trained), NEW) == []


def test_small_model_is_small():
    model, _ = load_or_build(TaskArguments(), HiViLTForQuestionAnswering, ["what?"], id2label=dict(enumerate(ANSWERS)))
    assert sum(parameter.numel() for parameter in model.parameters()) < 3_000_000


@pytest.fixture
def towers(tmp_path):
    """Folders of a tiny pretrained vision encoder and text encoder, with their processors."""
    set_seed(1)
    ViTModel(VISION_CONFIGS["vit"]()).save_pretrained(tmp_path / "vision")
    ViTImageProcessorPil(size={"height": 20, "width": 20}).save_pretrained(tmp_path / "vision")
    BertModel(TEXT_CONFIGS["bert"]()).save_pretrained(tmp_path / "text")
    make_tokenizer().save_pretrained(tmp_path / "text")
    return {"vision_model": str(tmp_path / "vision"), "text_model": str(tmp_path / "text")}


@pytest.mark.parametrize("named", [(), ("vision_model",), ("text_model",), ("vision_model", "text_model")])
def test_encoders_are_the_named_ones_or_small_new_ones(towers, named, tmp_path):
    args = TaskArguments(**{name: towers[name] for name in named}, fusion={"hidden_size": 20, "num_attention_heads": 4})
    texts = ["what color is the image", "is there a red circle"]
    model, processor = load_or_build(args, HiViLTForQuestionAnswering, texts, id2label=dict(enumerate(ANSWERS)))
    assert model.config.vision_config.model_type == ("vit" if "vision_model" in named else "resnet")
    assert model.config.text_config.hidden_size == (18 if "text_model" in named else 64)
    assert list(model.config.id2label.values()) == ANSWERS
    assert model.config.hidden_size == 20
    if "vision_model" in named:
        pretrained = ViTModel.from_pretrained(towers["vision_model"]).state_dict()
        own = model.base_model.vision_model.state_dict()
        assert all(torch.equal(own[name], pretrained[name]) for name in own)
    # The small text encoder takes texts of any length; its tokenizer cuts them at 64 tokens.
    assert model.config.max_text_length == (24 if "text_model" in named else None)
    assert processor.tokenizer.model_max_length == (24 if "text_model" in named else 64)

    # And whatever it is made of, it answers, and opens again from its folder alone.
    inputs = processor(images=[make_image()], text=["what color " * 50], return_tensors="pt")
    logits = model.eval()(**inputs).logits
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    again, processor = load_or_build(
        TaskArguments(model_name_or_path=str(tmp_path / "whole")), HiViLTForQuestionAnswering
    )
    inputs = processor(images=[make_image()], text=["what color " * 50], return_tensors="pt")
    torch.testing.assert_close(again(**inputs).logits, logits)


def test_checkpoints_are_trained_on_in_float32(tmp_path):
    model = HiViLTForQuestionAnswering(make_config()).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    model, _ = load_or_build(TaskArguments(model_name_or_path=str(tmp_path)), HiViLTForQuestionAnswering)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_checkpoint_takes_other_losses_and_dropout_and_keeps_its_weights(tmp_path):
    saved = HiViLTForRetrieval(make_config(auxiliary_loss_weight=0.0))
    saved.save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    fusion = '{"auxiliary_loss_weight": 1.0, "embedding_dropout": 0.25, "dropout": 0.5}'
    args = TaskArguments(model_name_or_path=str(tmp_path), fusion=fusion)
    model, _ = load_or_build(args, HiViLTForRetrieval, trains=True)
    assert model.config.auxiliary_loss_weight == 1.0
    assert model.embedding_dropout.p == 0.25
    assert {module.p for module in model.model.fusion.modules() if isinstance(module, torch.nn.Dropout)} == {0.5}
    for name, weights in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], weights), name
    with pytest.raises(StrictDataclassError, match="`dropout` must lie in"):
        load_or_build(TaskArguments(model_name_or_path=str(tmp_path), fusion={"dropout": 2.0}), HiViLTForRetrieval)
    with pytest.raises(
        ValueError, match="^fusion: hidden_size decides what weights.* be changed: fusion_top_k, dropout"
    ):
        TaskArguments(model_name_or_path=str(tmp_path), fusion={"hidden_size": 8})


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    model, tokenizer = HiViLTForQuestionAnswering(make_config()), make_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.add_tokens([f"word{number}" for number in range(61 - len(tokenizer))])
    processor = HiViLTProcessor(make_processor().image_processor, tokenizer)
    processor.save_pretrained(tmp_path)
    args = TaskArguments(model_name_or_path=str(tmp_path))
    load_or_build(args, HiViLTForQuestionAnswering)
    tokenizer.add_tokens(["more"])
    processor.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="^model_name_or_path: .* token 'more' of number 61, but the text encoder knows 61"
    ):
        load_or_build(args, HiViLTForQuestionAnswering)


@pytest.mark.parametrize("other", [HiViLTForQuestionAnswering, HiViLTForRetrieval])
def test_another_head_is_refused_unless_it_is_to_be_trained(other, tmp_path):
    wanted = HiViLTForRetrieval if other is HiViLTForQuestionAnswering else HiViLTForQuestionAnswering
    other(make_config()).save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    args = TaskArguments(model_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match=f"model_name_or_path: .* of {other.__name__}, expected {wanted.__name__}"):
        load_or_build(args, wanted)
    model, _ = load_or_build(args, wanted, trains=True)
    assert type(model) is wanted


@pytest.mark.parametrize("model_class", [HiViLTForQuestionAnswering, HiViLTForRetrieval])
def test_parameter_table_adds_up(model_class):
    model = model_class(make_config())
    model.freeze("vision")
    rows = [line.replace(",", "").split() for line in parameter_table(model).splitlines()[1:]]
    counts = {name: (int(total), int(training)) for name, total, training in rows}
    assert counts["vision"][1] == 0 < counts["vision"][0]
    assert counts["text"][0] == counts["text"][1]
    parts = ("vision", "text", "fusion", "head")
    assert counts["all"] == tuple(sum(counts[part][column] for part in parts) for column in (0, 1))
    assert counts["all"][0] == sum(parameter.numel() for parameter in model.parameters())


def test_freeze_names_the_first_layers_of_an_encoder():
    model = HiViLTForRetrieval(make_config())
    freeze_parts(model, ["vision:2", "text:0", "fusion"])
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = ("fusion.", "vision_model.embeddings.", "vision_model.layers.0.", "vision_model.layers.1.")
    assert not any(
        name.startswith(tuple(f"model.{part}" for part in (*frozen, "text_model.embeddings."))) for name in trains
    )
    assert any(name.startswith("model.vision_model.layers.2.") for name in trains)
    assert any(name.startswith("model.text_model.encoder.layer.0.") for name in trains)
    with pytest.raises(ValueError, match=r"^freeze: got 'vision:99'\. .*0\.\.3"):
        freeze_parts(model, ["vision:99"])


def test_image_processor_sees_whole_images_at_another_size(towers, tmp_path):
    size = {"height": 20, "width": 40}
    changes = {"size": size, "resample": 3}
    fusion = {"hidden_size": 20, "num_attention_heads": 4}
    args = TaskArguments(**towers, image_processor=json.dumps(changes), fusion=fusion)
    model, processor = load_or_build(args, HiViLTForQuestionAnswering, id2label=dict(enumerate(ANSWERS)))
    assert processor(images=[make_image()], return_tensors="pt")["pixel_values"].shape == (1, 3, 20, 40)
    assert processor.image_processor.image_mean == ViTImageProcessorPil().image_mean  # all else is the encoder's

    # A checkpoint keeps it.
    processor.save_pretrained(tmp_path / "whole")
    again = HiViLTProcessor.from_pretrained(tmp_path / "whole").image_processor
    assert (again.size.height, again.size.width, again.resample) == (20, 40, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_centre_crop": False}, "ViTImageProcessor.* has no field do_centre_crop"),
        ({"sise": 64}, "has no field sise; did you mean size?"),
        ({"do_resize": "no"}, "do_resize is true or false, got 'no'"),
        ({"size": {"height": 20}}, "size must have one of"),
        ({"size": "large"}, "'large'|large"),
    ],
)
def test_a_field_of_the_image_processor_that_cannot_work_is_named(towers, changes, message):
    args = TaskArguments(**towers, image_processor=changes)
    with pytest.raises(ValueError, match=f"^image_processor: .*{message}"):
        load_or_build(args, HiViLTForQuestionAnswering, id2label=dict(enumerate(ANSWERS)))


@pytest.mark.slow
def test_peak_memory_is_of_this_process_alone(elsewhere):
    assert elsewhere[1] < peak_memory_bytes() - 150 * 2**20
