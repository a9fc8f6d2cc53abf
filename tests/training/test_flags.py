"""Flags as people write them, on the command line and in files: read as they are written, or refused by name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hivilt.tasks.arguments import RetrievalArguments, VQAArguments
from hivilt.training.arguments import HiViLTTrainingArguments, parse_arguments
from hivilt.training.flags import Parser, flags_in_file


@pytest.fixture
def settings(tmp_path):
    """What the script makes of a settings file of this text."""

    def read(text, name="settings.yaml", kind=VQAArguments):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return parse_arguments([str(path)], kind, {"output_dir": "outputs/x"})

    return read


def parse(*argv, kind=VQAArguments):
    return parse_arguments(argv, kind, {"output_dir": "outputs/x"})


# Words


@pytest.mark.parametrize("language", ["no", "en", "de"])
def test_norwegian_is_a_language(settings, language):
    assert settings(f"language: {language}")[0].language == [language]
    assert settings(f"language: [en, {language}]")[0].language == ["en", language]
    assert settings(json.dumps({"language": language}), "settings.json")[0].language == [language]


@pytest.mark.parametrize(
    "word",
    ["yes", "on", "off", "Yes", "NO", "2020-01-01", "010", "0o17", "0x1F", "1_000", "12:30", "1e3", "1.0", ".5", "="],
)
def test_a_word_of_yaml_stays_as_it_is_written(settings, word):
    assert settings(f"query: {word}\nindex: photos", kind=RetrievalArguments)[0].query == [word]
    assert settings(f"query: '{word}'\nindex: photos", kind=RetrievalArguments)[0].query == [word]


@pytest.mark.parametrize(("word", "meant"), [("yes", True), ("no", False), ("true", True)])
def test_a_switch_is_on_or_off(settings, word, meant):
    assert settings(f"load_best_model_at_end: {word}")[1].load_best_model_at_end is meant
    assert parse("--load_best_model_at_end", word)[1].load_best_model_at_end is meant


def test_no_is_a_strategy(settings):
    training = settings("eval_strategy: no\nsave_strategy: no\nload_best_model_at_end: no")[1]
    assert (training.eval_strategy, training.save_strategy) == ("no", "no")


def test_numbers_within_fusion_are_numbers(settings):
    text = "fusion: {layer_norm_eps: 1e-6, fusion_top_k: 8, use_local_fusion: False, vision_levels: [1, 2]}"
    fusion = settings(text)[0].fusion
    expected = {"layer_norm_eps": 1e-6, "fusion_top_k": 8, "use_local_fusion": False, "vision_levels": [1, 2]}
    assert fusion == expected and type(fusion["layer_norm_eps"]) is float


def test_null_and_nothing_are_no_flag(settings):
    task, training = settings(
        "vision_model: null\ntext_model: ~\nimage_dir: None\nseed:\nfreeze: []\noutput_dir: outputs/y"
    )
    assert (task.vision_model, task.text_model, task.image_dir, task.freeze) == (None, None, None, [])
    assert (training.seed, training.output_dir) == (42, "outputs/y")


def test_a_value_may_begin_with_a_dash(settings):
    assert settings("query: -red heart\nindex: photos", kind=RetrievalArguments)[0].query == ["-red heart"]


WORDS = st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="\x85\u2028\u2029\ufeff"), min_size=1)
WORDS = WORDS.filter(lambda text: text != "--")


@given(WORDS)
def test_json_and_quoted_yaml_give_any_text_back(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("settings")
    for name in ("settings.json", "settings.yaml"):
        (folder / name).write_text(json.dumps({"query": text, "index": "photos"}), encoding="utf-8-sig")
    for name in ("settings.json", "settings.yaml")[: 2 if text.isascii() else 1]:  # JSON's \\ud83d is none of YAML's
        task, _ = parse_arguments([str(folder / name)], RetrievalArguments, {"output_dir": "outputs/x"})
        assert task.query == [text]


# Files


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_changes_nothing(settings, mark):
    assert settings(mark + b"seed: 7")[1].seed == 7
    assert settings(mark + b'{\n\t"seed": 7}', "settings.json")[1].seed == 7


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("settings.yaml", "seed: 7\nfreeze: [vision\nimage_size: 32", "settings.yaml: while .* line 3"),
        ("settings.yml", "seed: 7\nimage_size: 32\nseed: 8", "settings.yml: seed stands there twice"),
        ("settings.yaml", "seed: 7\nfusion:\n  dropout: 0\n  dropout: 1", "settings.yaml: dropout stands there twice"),
        ("settings.yaml", "? [a, b]\n: 1", "settings.yaml: expected a scalar .* line 1"),
        ("settings.json", '{"seed": 7,\n"image_size": }', "settings.json: .* line 2"),
        ("settings.json", '{"seed": 7, "seed": 8}', "settings.json: seed stands there twice"),
        ("settings.json", "[1]", "settings.json: expected names of flags with their values, got a list"),
        ("settings.yaml", b"query: caf\xe9", "settings.yaml: 'utf-8'"),
    ],
)
def test_an_ill_formed_file_is_refused_with_its_line(settings, name, text, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        settings(text, name)


def test_an_empty_file_is_no_flag(settings):
    assert settings("")[1].seed == settings("{}", "settings.json")[1].seed == 42


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="settings.yaml"):
        parse(str(tmp_path / "settings.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "settings.yaml: --learning_rat is no flag; did you mean --learning_rate"),
        ("Seed: 3", "settings.yaml: --Seed is no flag; did you mean --seed"),
        ("no_remove_unused_columns: true", "settings.yaml: .*no_remove_unused_columns"),
        ("<<: {seed: 1}", "settings.yaml: --<< is no flag"),
        ("seed: false", "settings.yaml: --seed: invalid int value: 'false'"),
        ("learning_rate: [0.1, 0.2]", "settings.yaml: '0.2': expected a flag"),
        ("learning_rate: {a: b}", "settings.yaml: --learning_rate: invalid float value"),
        ("freeze: [[vision]]", "freeze: expected any of"),
        ("query: [a, -b]", "settings.yaml: -b is no flag"),
        ("lr_scheduler_kwargs: '{a'", "settings.yaml: lr_scheduler_kwargs: expected JSON"),
        ("do_train: maybe", "settings.yaml: --do_train: .*maybe"),
        ('query: ["a", "--"]', "settings.yaml: query: `--` is no value"),
    ],
)
def test_a_setting_that_is_none_is_refused_by_name(settings, text, message):
    with pytest.raises(ValueError, match=message):
        settings(text, kind=RetrievalArguments)


def test_the_flags_of_a_file_are_those_of_a_command_line(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("learning_rate: 1e-2\nfreeze: [vision, text]\ndo-train: yes\nquery: -x\nfusion: {dropout: 0.5}")
    expected = ["--learning_rate=1e-2", "--freeze", "vision", "text", "--do-train=yes", "--query=-x"]
    assert flags_in_file(path) == [*expected, '--fusion={"dropout": 0.5}']


# Command lines


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rat", "1"], "^--learning_rat is no flag; did you mean --learning_rate?"),
        (["--learning_rat=1"], "^--learning_rat is no flag; did you mean --learning_rate?"),
        (
            ["--output_dri", "x", "--trian_file=y"],
            r"did you mean --output_dir\?; --trian_file .*did you mean --train_file",
        ),
        (["-seed", "1"], "^-seed is no flag; did you mean --seed?"),
        (["--train-flie", "x"], "did you mean --train_file"),
        (["--batch_size", "8"], "did you mean --per_device_train_batch_size"),
        (["--qwertz"], "^--qwertz is no flag; --help lists all"),
        (["train.jsonl"], "^'train.jsonl': expected a flag"),
        (["settings.yaml", "--seed", "1"], "^'settings.yaml': .* a settings file stands alone"),
        (["--learning_rate", "fast"], "^--learning_rate: invalid float value: 'fast'"),
        (["--learning_rate"], "^--learning_rate: got no value, expected one. .*learning rate"),
        (["--resume_from_checkpoint"], "^--resume_from_checkpoint: got no value, expected one. Folder .* or last: .*"),
        (["--freeze", "--seed", "1"], "^--freeze: got no value, expected one. Parts not to train: vision, text"),
        (["--benchmark"], "^--benchmark: got no value, expected one"),
        (["--benchmark", "gqq"], "^--benchmark: invalid choice: 'gqq'"),
        (["--eval_strategy", "often"], "^--eval_strategy: invalid choice: 'often' .*epoch"),
        (["--do_train", "maybe"], "^--do_train: got 'maybe', but it is a switch: .* or true or false.$"),
    ],
)
def test_a_wrong_flag_is_refused_by_name(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(*argv)


def test_a_number_after_a_switch_names_the_flag_that_takes_one():
    with pytest.raises(ValueError, match="^--rerank: got '5', but it is a switch: .*; did you mean --rerank_k?"):
        parse("--rerank", "5", kind=RetrievalArguments)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--fusion", "{fusion_top_k: 8}"], "^fusion: expected JSON such as .*got '{fusion_top_k: 8}'"),
        (["--fusion", "8"], "^fusion: expected fields of HiViLTConfig with their values.* got 8"),
        (["--lr_scheduler_kwargs", "{a: 8}"], "^lr_scheduler_kwargs: expected JSON such as .*got '{a: 8}'"),
        (["--fusion", "[8]"], "^fusion: expected fields"),
        (
            ["--fusion", '{"fusion_topk": 8}'],
            "^fusion: HiViLTConfig has no field fusion_topk; did you mean fusion_top_k",
        ),
        (["--fusion", '{"bogus": 8}'], r"^fusion: HiViLTConfig has no field bogus\."),
        (["--image_processor", "256"], "^image_processor: expected fields of an image processor.* got 256"),
        (
            ["--image_processor", '{"do_center_crop": false}'],
            "^image_processor: changes that of vision_model, which is not",
        ),
        (["--freeze", "vision", "head"], "^freeze: expected any of vision, text, fusion, .*got 'head'"),
        (["--freeze", "vision,text"], "^freeze: expected any of .*got 'vision,text'"),
        (["--freeze", "vision:"], "^freeze: expected any of .* such as vision:12.*got 'vision:'"),
        (["--freeze", "text:-1"], "^freeze: expected any of .*got 'text:-1'"),
        (["--freeze", "fusion:2"], "^freeze: expected any of .*got 'fusion:2'"),
        (["--freeze", "vision", "vision:2"], "^freeze: expected each part once, got vision vision:2"),
        (["--license", "Apache 2"], "^license: .*got 'Apache 2'"),
        (["--language", "english"], "^language: .*got 'english'"),
        (["--max_train_samples", "0"], "^max_train_samples: expected at least 1, got 0"),
        (["--max_eval_samples", "-1"], "^max_eval_samples: expected at least 1, got -1"),
        (["--max_predict_samples", "0"], "^max_predict_samples: expected at least 1"),
        (["--image_size", "0"], "^image_size: expected at least 1, got 0"),
        (["--num_threads", "0"], "^num_threads: expected at least 1, got 0"),
        (["--min_answer_count", "0"], "^min_answer_count: expected at least 1"),
        (["--max_answers", "0"], "^max_answers: expected at least 1"),
        (["--vision_learning_rate", "-1"], "^vision_learning_rate: expected at least 0, got -1.0"),
        (["--text_learning_rate", "nan"], "^text_learning_rate: expected at least 0, got nan"),
        (["--per_device_train_batch_size", "0"], "^per_device_train_batch_size: expected at least 1, got 0"),
        (["--gradient_accumulation_steps", "-2"], "^gradient_accumulation_steps: expected at least 1, got -2"),
        (["--num_train_epochs", "-1"], "^num_train_epochs: expected at least 0, got -1.0"),
        (["--learning_rate", "nan"], "^learning_rate: expected at least 0, got nan"),
        (["--weight_decay", "inf"], "^weight_decay: expected at least 0, got inf"),
        (["--dataloader_num_workers", "-1"], "^dataloader_num_workers: expected at least 0, got -1"),
        (["--seed", "-1"], "^seed: expected at least 0, got -1"),
        (["--bf16"], "^bf16: no device of this machine .*--bf16 false.*--use_cpu"),
        (["--bf16_full_eval"], "^bf16_full_eval: no device"),
        (["--fp16"], "^fp16: there is no GPU.*--fp16 false"),
        (["--num_train_epochs", "0"], "^num_train_epochs: expected more than 0, got 0.*without --do_train"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(*argv)


@pytest.mark.parametrize("name", ["captions_per_image", "top_k"])
def test_retrieval_counts_from_one(name):
    for value in ("0", "-3"):
        with pytest.raises(ValueError, match=f"^{name}: expected at least 1, got {value}"):
            parse(f"--{name}", value, kind=RetrievalArguments)
    parse(f"--{name}", "1", kind=RetrievalArguments)


def test_on_a_cpu_recipes_run_without_bfloat16_and_where_asked_with_it():
    assert parse("--bf16", "--bf16", "false")[1].bf16 is False
    assert parse("--bf16", "--use_cpu")[1].bf16 is True


@pytest.mark.parametrize("kind", [VQAArguments, RetrievalArguments])
def test_help_lists_every_flag(kind):
    """A percent sign in a help text is written twice, or argparse takes it for a format."""
    told = Parser((kind, HiViLTTrainingArguments)).format_help()
    assert "--calibrate" in told and "80 % about 80 % are" in " ".join(told.split()) and "--learning_rate" in told
