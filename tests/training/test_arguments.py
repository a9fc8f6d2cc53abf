"""Flags and settings files."""

import json
import pickle

import pytest
from huggingface_hub import get_token

from hivilt.configuration_hivilt import HiViLTConfig
from hivilt.training.arguments import HiViLTTrainingArguments, TaskArguments, parse_arguments
from hivilt.training.command import run_command


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


def test_a_field_of_the_fusion_that_cannot_work_is_told_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: HiViLTConfig(hidden_size=63, num_attention_heads=4))
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "error: `hidden_size` (63) must be a multiple of `num_attention_heads` (4)" in printed
    assert printed.count("\n") == 1


def test_a_settings_file_may_say_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert TaskArguments(train_file="~/rows.csv").train_file == "/home/me/rows.csv"


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


def test_a_token_is_kept_out_of_the_arguments_and_found_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    arguments = HiViLTTrainingArguments(output_dir=str(tmp_path), hub_token="hf_secret")
    assert "hf_secret" not in f"{arguments}" and b"hf_secret" not in pickle.dumps(arguments)
    assert get_token() == "hf_secret"
