"""Arguments, models and trainers that every run uses; what counts questions where Trainer counts rows."""

import ast
import json
import math
import os
import pickle
import subprocess
import sys
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import get_token
from huggingface_hub.errors import StrictDataclassError
from torch.nn.parallel import DistributedDataParallel
from transformers import BertModel, ViTImageProcessorPil, ViTModel, set_seed

from hivilt import HiViLTForQuestionAnswering, HiViLTForRetrieval, HiViLTProcessor, run_retrieval, run_vqa
from hivilt.configuration_hivilt import HiViLTConfig
from hivilt.data.augmentation import Augmentation
from hivilt.training import (
    HiViLTTrainingArguments,
    TaskArguments,
    augmentation_of,
    begin_run,
    end_with,
    environment,
    freeze_parts,
    load_or_build,
    parameter_table,
    parse_arguments,
    peak_memory_bytes,
    run_command,
    set_threads,
    train_tokenizer,
    warn_of_chance,
    warn_of_few,
    without_place,
    write_json,
)
from tiny import TEXT_CONFIGS, VISION_CONFIGS, make_config, make_image, make_processor, make_tokenizer

ANSWERS = ["yes", "no", "red", "blue"]

# Arguments


def test_without_flags_everything_is_done():
    task, training = parse_arguments([], TaskArguments, {"output_dir": "outputs/x", "learning_rate": 0.5})
    assert (training.do_train, training.do_eval, training.do_predict) == (True, True, True)
    assert (training.output_dir, training.learning_rate) == ("outputs/x", 0.5)
    assert training.remove_unused_columns is False
    assert training.accelerator_config.dispatch_batches is False
    assert training.report_to == []
    assert task.trust_remote_code is False


@pytest.mark.parametrize("asked", ["do_train", "do_eval", "do_predict"])
def test_asking_for_one_does_no_other(asked):
    _, training = parse_arguments([f"--{asked}"], TaskArguments, {})
    # Training evaluates as it goes, and Trainer calls that do_eval.
    expected = {"do_train", "do_eval"} if asked == "do_train" else {asked}
    assert {name for name in ("do_train", "do_eval", "do_predict") if getattr(training, name)} == expected


def test_a_benchmark_brings_its_defaults_and_flags_win(tmp_path):
    defaults, of_benchmarks = {"learning_rate": 0.5, "seed": 7}, {"gqa": {"learning_rate": 0.1, "num_threads": 2}}
    parse = lambda *argv: parse_arguments(argv, TaskArguments, defaults, of_benchmarks)
    for argv in (["--benchmark", "gqa"], ["--benchmark=gqa", "--seed", "7"]):
        task, training = parse(*argv)
        assert (task.benchmark, task.num_threads, training.learning_rate, training.seed) == ("gqa", 2, 0.1, 7)
    assert parse("--benchmark", "gqa", "--learning_rate", "0.3")[1].learning_rate == 0.3
    assert parse("--benchmark", "clevr")[1].learning_rate == parse()[1].learning_rate == 0.5
    (tmp_path / "settings.yaml").write_text("benchmark: gqa\n")
    assert parse(str(tmp_path / "settings.yaml"))[1].learning_rate == 0.1


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


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_a_file_says_what_flags_say(tmp_path, kind):
    settings = {"do_train": True, "freeze": ["vision", "text"], "learning_rate": 0.01, "fusion": {"fusion_top_k": 4}}
    path = tmp_path / f"settings.{kind}"
    text = json.dumps(settings)
    if kind == "yaml":
        text = "do_train: true\nfreeze: [vision, text]\nlearning_rate: 1e-2\nfusion:\n  fusion_top_k: 4\n"
    path.write_text(text)
    flags = ["--do_train", "--freeze", "vision", "text", "--learning_rate", "0.01", "--fusion", '{"fusion_top_k": 4}']
    defaults = {"output_dir": "outputs/x", "seed": 7}
    from_file, from_flags = (parse_arguments(argv, TaskArguments, defaults) for argv in ([str(path)], flags))
    assert from_file[0] == from_flags[0]
    for name in ("do_train", "do_predict", "learning_rate", "output_dir", "seed", "lr_scheduler_type"):
        assert getattr(from_file[1], name) == getattr(from_flags[1], name)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "settings.yaml").write_text("")
    assert parse_arguments([str(tmp_path / "settings.yaml")], TaskArguments, {})[1].do_train
    (tmp_path / "settings.yaml").write_text("- do_train")
    with pytest.raises(ValueError, match="settings.yaml: expected names of flags with their values, got a list"):
        parse_arguments([str(tmp_path / "settings.yaml")], TaskArguments, {})


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one of 2 processes, each of which would train by itself.*--use_cpu"):
        begin_run(["--output_dir", str(tmp_path)], TaskArguments, {})


@pytest.mark.parametrize("status", [None, 143])
def test_a_script_that_ends_leaves_the_other_processes(status, tmp_path):
    """Gloo's threads would abort it now and then, after all is done; and first frees the model, in whose end they would
    wait for each other."""
    models = weakref.WeakSet()

    def main():
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        model = DistributedDataParallel(torch.nn.Linear(2, 2))
        model.trainer = [model]
        models.add(model)
        if status:
            sys.exit(status)

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == status
    assert not dist.is_initialized() and not models


# Mistakes


MISTAKES = [
    (ValueError("image_size: expected at least 1, got 0"), "image_size: expected at least 1, got 0"),
    (TypeError("id2label: expected a dict"), "id2label: expected a dict"),
    (FileNotFoundError("train_file: there is no file 'x'"), "train_file: there is no file 'x'"),
    (FileNotFoundError(2, "No such file or directory", "settings.yaml"), "settings.yaml: No such file or directory"),
    (OSError("many\n\n  lines\nof a library"), "many lines of a library"),
    (
        ModuleNotFoundError("No module named 'peft.x'", name="peft.x"),
        "the package peft is missing: install it with pip",
    ),
    (ImportError("X needs the Y library:\n`pip install y`"), "X needs the Y library: `pip install y`"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "can't decode byte"),
    (json.JSONDecodeError("Expecting value", "", 0), "Expecting value"),
    (DatasetNotFoundError("Dataset 'x/y' doesn't exist"), "Dataset 'x/y' doesn't exist"),
    (ValueError(), "ValueError"),
]


def test_a_field_of_the_fusion_that_cannot_work_is_told_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: HiViLTConfig(hidden_size=63, num_attention_heads=4))
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "error: `hidden_size` (63) must be a multiple of `num_attention_heads` (4)" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(("mistake", "said"), MISTAKES)
def test_a_mistake_ends_a_script_in_one_line_and_status_2(mistake, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/run_vqa.py"])

    def main():
        raise mistake

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("run_vqa.py: error: ") and printed.err.endswith("\n") and printed.err.count("\n") == 1
    assert said in printed.err and "Traceback" not in printed.err


def test_a_mistake_that_another_library_found_says_how_to_see_where(capsys):
    for main, hinted in ((lambda: math.sqrt(-1), False), (lambda: json.loads("{"), True), (lambda: None + 1, True)):
        with pytest.raises(SystemExit):
            run_command(main)
        assert ("HIVILT_DEBUG=1" in capsys.readouterr().err) is (hinted or not __name__.startswith("hivilt"))


@pytest.mark.parametrize(("debug", "shown"), [("1", True), ("0", False), ("", False)])
def test_for_debugging_a_mistake_keeps_its_traceback(debug, shown, capsys, monkeypatch):
    monkeypatch.setenv("HIVILT_DEBUG", debug)

    def main():
        raise ValueError("image_size: wrong")

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert "image_size: wrong" in printed
    assert ("Traceback" in printed and "in main" in printed) is shown


@pytest.mark.parametrize(
    "fault", [RuntimeError, AssertionError, KeyError, IndexError, AttributeError, ZeroDivisionError]
)
def test_a_fault_of_ours_keeps_its_traceback(fault, capsys):
    def main():
        raise fault("ours")

    with pytest.raises(fault, match="ours"):
        run_command(main)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("script", [run_vqa, run_retrieval])
def test_who_calls_a_script_from_python_gets_the_exception(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="^train_file: there is no file 'nosuch.jsonl'"):
        script.main(["--train_file", "nosuch.jsonl", "--use_cpu"])
    with pytest.raises(ValueError, match="^--learning_rat is no flag; did you mean --learning_rate"):
        script.main(["--learning_rat", "1"])


def test_of_processes_that_fail_alike_the_first_says_it(capsys, monkeypatch):
    order = []
    monkeypatch.setattr(time, "sleep", lambda seconds: order.append((seconds, capsys.readouterr().err)))
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            end_with(ValueError("wrong"))
    # The second waited, and was not ended meanwhile, so it says it too.
    assert order == [(10, "")]
    assert capsys.readouterr().err.count("wrong") == 2


# Places


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Begins a run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *flags: begin_run(["--use_cpu", *flags], TaskArguments, {"output_dir": "outputs/x"})


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


def test_a_model_of_another_kind_is_told_so(tmp_path):
    BertModel(TEXT_CONFIGS["bert"]()).save_pretrained(tmp_path / "bert")
    for trains in (False, True):
        with pytest.raises(ValueError, match="^model_name_or_path: .* is a checkpoint of BertModel, expected "):
            load_or_build(
                TaskArguments(model_name_or_path=str(tmp_path / "bert")), HiViLTForQuestionAnswering, trains=trains
            )


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


def test_a_settings_file_may_say_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert TaskArguments(train_file="~/rows.csv").train_file == "/home/me/rows.csv"


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


# Threads


@pytest.mark.parametrize(("asked", "processes", "share"), [(3, "1", 3), (None, "1", "cores"), (None, "2", "half")])
def test_a_large_model_has_the_process_s_share_of_the_machine(asked, processes, share, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)), raising=False)
    with torch.device("meta"):
        large = torch.nn.Linear(4000, 4000)
    try:
        set_threads(TaskArguments(num_threads=asked), large)
        assert torch.get_num_threads() == {"cores": 4, "half": 2}.get(share, share)
        set_threads(TaskArguments(), torch.nn.Linear(2, 2))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


def test_misspelt_arguments_are_refused(tmp_path):
    (tmp_path / "settings.json").write_text('{"learning_rat": 0.1}')
    with pytest.raises(ValueError, match="learning_rat"):
        parse_arguments([str(tmp_path / "settings.json")], TaskArguments, {})
    with pytest.raises(ValueError, match="--learning_rat"):
        parse_arguments(["--learning_rat", "1"], TaskArguments, {})


def test_data_comes_from_one_source():
    with pytest.raises(ValueError, match="dataset_name and train_file"):
        TaskArguments(dataset_name="a/b", train_file="c.json")
    with pytest.raises(ValueError, match="model_name_or_path names a whole HiViLT"):
        TaskArguments(model_name_or_path="a", text_model="b")


@pytest.mark.parametrize(("given", "read"), [("true", True), ("last", True), ("outputs/x/checkpoint-2",) * 2])
def test_resuming_by_name_or_from_the_last(given, read):
    _, training = parse_arguments(["--resume_from_checkpoint", given], TaskArguments, {})
    assert training.resume_from_checkpoint == read


# Models


TEXTS = ["What color is the shape?", "is there a CIRCLE?", "is there a square in the image?"] * 3


@pytest.fixture(scope="module")
def elsewhere() -> tuple[dict, int]:
    """The vocabulary of `TEXTS` in another process, and the most memory that it had, while this one had 300 MiB more."""
    block = bytearray(300 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    program = "from hivilt.training import peak_memory_bytes, train_tokenizer\n"
    program += f"print((train_tokenizer({TEXTS!r}).get_vocab(), peak_memory_bytes()))"
    started = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=600)
    return ast.literal_eval(started.stdout)


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


def test_environment_and_memory():
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["num_threads"] == torch.get_num_threads()
    assert all(value not in (None, "") for value in found.values())
    assert math.log2(peak_memory_bytes()) > 26


def test_peak_memory_is_of_this_process_alone(elsewhere):
    assert elsewhere[1] < peak_memory_bytes() - 150 * 2**20


def test_a_token_is_kept_out_of_the_arguments_and_found_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    arguments = HiViLTTrainingArguments(output_dir=str(tmp_path), hub_token="hf_secret")
    assert "hf_secret" not in f"{arguments}" and b"hf_secret" not in pickle.dumps(arguments)
    assert get_token() == "hf_secret"


# Runs


def test_json_is_whole_or_what_it_was_and_never_holds_nan(tmp_path):
    write_json(tmp_path / "results.json", {"accuracy": 0.5})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "results.json", {"accuracy": [math.nan]})
    assert json.loads((tmp_path / "results.json").read_text()) == {"accuracy": 0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_run_that_was_not_finished_is_asked_about(tmp_path):
    """As transformers' `overwrite_output_dir` did; a finished one has left its state beside its checkpoints."""
    begin = lambda *more: begin_run(["--output_dir", str(tmp_path), "--use_cpu", *more], TaskArguments, {})
    begin()
    (tmp_path / "checkpoint-7").mkdir()
    begin()  # one that was cut off is none
    (tmp_path / "checkpoint-7/trainer_state.json").write_text("{}")
    with pytest.raises(
        ValueError,
        match="^output_dir: .* not finished, up to checkpoint-7.*--resume_from_checkpoint last.*--overwrite_outp",
    ):
        begin()
    for more in (["--overwrite_output_dir"], ["--resume_from_checkpoint", "last"], ["--do_predict"]):
        begin(*more)
    (tmp_path / "trainer_state.json").write_text("{}")
    begin()


def test_ctrl_c_ends_a_script_in_one_line(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 130
    assert capsys.readouterr().err == (
        "Ctrl-C: ended; --resume_from_checkpoint last goes on from the last checkpoint, if there is one.\n"
    )


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
