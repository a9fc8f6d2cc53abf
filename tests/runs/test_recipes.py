"""The recipes in runs/: each is run with a `python` and an `accelerate` that only write down how they were called, and
what they were to run is then run in this process, on a miniature of its benchmark with tiny encoders."""

import functools
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTImageProcessorPil,
)

from caption_miniatures import make_caption_miniature
from grounding_miniatures import make_grounding_miniature
from hivilt import (
    HiViLTConfig,
    HiViLTForQuestionAnswering,
    HiViLTForVisualGrounding,
    run_retrieval,
    run_vqa,
)
from hivilt.data.caption_benchmarks import CAPTION_BENCHMARKS
from hivilt.data.grounding_benchmarks import GROUNDING_BENCHMARKS
from hivilt.data.vqa_benchmarks import VQA_BENCHMARKS
from hivilt.training.main import main
from hivilt.training.models import SMALL_FUSION, small_text_config, small_vision_config
from miniatures import make_vqa_miniature
from processes import launch_sharded
from reasoning_miniatures import make_reasoning_miniature
from tiny import HEAD_FACTS, IMAGE_SIZE, TEXT_CONFIGS, VISION_CONFIGS, make_batch, make_model, make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {path.stem: path for path in sorted((ROOT / "runs").glob("*.sh")) if path.name != "launch.sh"}
PHOTOGRAPHS = set(RECIPES) - {"easy_vqa", "openmoji", "clevr", "sort_of_clevr"}
QUICK = {"vqav2", "openmoji"}
TASKS = {facts.task.script: facts.task for facts in HEAD_FACTS.values() if facts.task}
TINY = {"hidden_size": 16, "num_attention_heads": 2, "fusion_intermediate_size": 16}
# Padded length of the texts that an estimate assumes, and how many pairs a caption is in: its own, hard ones each way.
TOKENS = {"textvqa": 120, "easy_vqa": 8, "openmoji": 8, "sort_of_clevr": 13, "refcoco": 8, "flickr30k_entities": 8}
# Others are like one of these, which says so, or small.
GROUNDING_RECIPES = ("refcoco", "flickr30k-entities")
REASONING_RECIPES = ("nlvr2",)
ESTIMATE = re.compile(
    r"# Estimate, not measured, of training alone.*\n"
    r"#   images +(?P<images>[\d,]+) x (?P<image_gflop>[\d.]+) GFLOP\n"
    r"#   (?P<unit>questions|captions|expressions|statements) +(?P<texts>[\d,]+) x (?P<text_gflop>[\d.]+) GFLOP\n"
    r"#   training +x (?P<passes>\d) x (?P<epochs>\d+) epochs = (?P<flop>\S+) FLOP\n"
    r"#   time +(?P<hours>\S+) hours at (?P<tflops>\S+) TFLOP/s.*\n"
    r"#   memory +\d+ GB, a guess.*\n"
)

every_recipe = pytest.mark.parametrize("name", RECIPES)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Runs a recipe from another folder: where it started what, as a list of words."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("python", "accelerate"):
        (folder / name).write_text('#!/bin/sh\nprintf "%s\\0" "$PWD" "${0##*/}" "$@" > "$STARTED"\n')
        (folder / name).chmod(0o755)

    def run(name: str, *flags: str, **environment: str) -> list[str]:
        started = folder / "started"
        started.unlink(missing_ok=True)
        environment |= {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "STARTED": str(started)}
        subprocess.run([RECIPES[name], *flags], env=environment, cwd=folder, check=True, capture_output=True, text=True)
        where, *words = started.read_text().rstrip("\0").split("\0")
        assert Path(where).samefile(ROOT)
        return words

    return run


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> list[str]:
    """Flags that put tiny saved encoders, with image processor and tokenizer, in place of a recipe's."""
    vision, text = tmp_path_factory.mktemp("vision"), tmp_path_factory.mktemp("text")
    SiglipVisionModel(VISION_CONFIGS["siglip"]()).save_pretrained(vision)
    ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(vision)
    config = TEXT_CONFIGS["bert"]()
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0  # so that runs can be compared
    BertModel(config).save_pretrained(text)
    make_tokenizer().save_pretrained(text)
    return ["--vision_model", str(vision), "--text_model", str(text), "--fusion", json.dumps(TINY)]


def parsed(script: str, flags: list[str]):
    """What the script makes of these flags, without a GPU."""
    return TASKS[script].arguments.parse([*flags, "--use_cpu", "--bf16", "false"])


def test_every_benchmark_has_its_recipe_and_every_recipe_its_benchmark(start):
    benchmarks = {name: parsed(*split(start(name)))[0].benchmark for name in RECIPES}
    assert sorted(benchmarks.values()) == sorted(
        [*VQA_BENCHMARKS, *CAPTION_BENCHMARKS, *GROUNDING_RECIPES, *REASONING_RECIPES]
    )
    assert benchmarks == {name: name.replace("_", "-") for name in RECIPES}


def split(words: list[str]) -> tuple[str, list[str]]:
    """The script that was started, and its flags."""
    place = next(place for place, word in enumerate(words) if word in TASKS)
    return words[place], words[place + 1 :]


@every_recipe
def test_bash_reads_it(name):
    for path in (RECIPES[name], ROOT / "runs/launch.sh"):
        subprocess.run(["bash", "-n", path], check=True)


@every_recipe
def test_the_launcher_depends_on_the_processes_and_the_step_does_not(name, start):
    words = start(name)
    script, flags = split(words)
    assert words[:2] == ["python", script]
    assert flags[0] == "--per_device_train_batch_size"
    step = int(flags[1])
    # The comment above the command names it too.
    assert re.search(rf"^# {step} (pairs of )?images with ", RECIPES[name].read_text(), re.MULTILINE)

    words = start(name, NUM_PROCESSES="2")
    assert words[: -len(flags)] == ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", script]
    assert words[-len(flags) :] == [flags[0], str(step // 2), *flags[2:]]
    for wrong in ("7", "0", "two"):
        with pytest.raises(subprocess.CalledProcessError) as error:
            start(name, NUM_PROCESSES=wrong)
        assert f"NUM_PROCESSES: {wrong} processes" in error.value.stderr or f"got '{wrong}'" in error.value.stderr


@every_recipe
def test_fsdp_takes_its_file(name, start):
    script, flags = split(start(name))
    words = start(name, FSDP="1", NUM_PROCESSES="2")
    assert words[:7] == ["accelerate", "launch", "--config_file", "runs/fsdp.yaml", "--num_processes", "2", script]
    if "--contrastive_chunk_size" in flags:
        place = flags.index("--contrastive_chunk_size")
        flags[place : place + 2] = ["--gradient_checkpointing"]
    assert words[7:] == [flags[0], str(int(flags[1]) // 2), *flags[2:]]


@every_recipe
def test_flags_and_a_checkpoint_override(name, start):
    given = ["--learning_rate", "7", "--data_dir", "a folder with blanks"]
    script, flags = split(start(name, *given))
    assert flags[-4:] == given
    assert parsed(script, flags)[1].learning_rate == 7
    if name in PHOTOGRAPHS:
        script, flags = split(start(name, CHECKPOINT="outputs/vqav2"))
        args, _ = parsed(script, flags)
        assert (args.model_name_or_path, args.vision_model, args.text_model) == ("outputs/vqav2", None, None)


# The others' benchmarks are trained on by the tests of the scripts.
@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES],
)
def test_it_trains_evaluates_and_predicts(name, start, encoders, tmp_path):
    script, flags = split(start(name))
    benchmark = name.replace("_", "-")
    make = make_vqa_miniature if benchmark in VQA_BENCHMARKS else make_caption_miniature
    make = make_grounding_miniature if benchmark in GROUNDING_BENCHMARKS else make
    make = make_reasoning_miniature if benchmark in REASONING_RECIPES else make
    make(benchmark, tmp_path / "data")
    flags += ["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--max_train_samples", "8"]
    flags += ["--use_cpu", "--bf16", "false", "--max_steps", "1", "--dataloader_num_workers", "0"]
    flags += ["--disable_tqdm", "true", *(encoders if name in PHOTOGRAPHS else [])]
    results = main(TASKS[script], flags)
    assert results["train"]["steps"] == 1
    assert results["settings"]["metric_for_best_model"] in results["validation"]
    assert "test" in results
    assert (tmp_path / "out/predictions.jsonl").read_text()
    assert (tmp_path / "out/model.safetensors").is_file()


@every_recipe
def test_its_encoders_are_of_families_that_the_docs_name(name, start):
    args, _ = parsed(*split(start(name)))
    families = re.search(r"\bViT, .*? are taken and tested", (ROOT / "docs/training.md").read_text(), re.DOTALL)[
        0
    ].lower()
    named = [args.vision_model, args.text_model]
    assert (named == [None, None]) == (name not in PHOTOGRAPHS)
    for encoder in filter(None, named):
        assert re.search(rf"\b{encoder.split('/')[1].split('-')[0]}\b", families)


@pytest.mark.parametrize("name", ["easy_vqa", "openmoji"])
def test_it_spells_out_the_defaults(name, start):
    script, flags = split(start(name))
    (args, training_args), (defaults, training_defaults) = parsed(script, flags), parsed(script, [])
    assert args == defaults
    assert training_args.to_dict() == training_defaults.to_dict()


# Estimates


@functools.cache
def forward_gflop(image_size: int, num_tokens: int, small: bool, grounds: bool = False) -> tuple[float, float, float]:
    """Of an image, a text, and a pair of them, with the head that finds boxes: base encoders as the recipes name, or the
    scripts' small ones."""
    if small:
        vision, text, fusion, device = small_vision_config(), small_text_config(100), SMALL_FUSION, "cpu"
    else:
        sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        vision = SiglipVisionConfig(**sizes, image_size=image_size, patch_size=16)
        text, fusion, device = BertConfig(), {}, "meta"
    config = HiViLTConfig.from_vision_text_configs(vision, text, id2label={0: "yes"}, **fusion)
    config._attn_implementation = "eager"
    with torch.device(device):
        head = (HiViLTForVisualGrounding if grounds else HiViLTForQuestionAnswering)(config).eval()
        model = head.model
        pixel_values = torch.zeros(1, 3, image_size, image_size)
        hidden_states = torch.zeros(1, num_tokens, config.text_config.hidden_size)
        mask = torch.ones(1, num_tokens, dtype=torch.bool)
    counts = []
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            images = model.encode_images(pixel_values)
        counts.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            texts = model.fusion("encode_texts", hidden_states, mask)
        layers = model.text_model.encoder
        # The formula of runs/README.md: masks of texts need values, which the meta device does not have.
        width, depth = config.text_config.hidden_size, config.text_config.num_hidden_layers
        weights = sum(parameter.numel() for parameter in layers.parameters())
        attention = 4 * num_tokens**2 * width * depth
        counts.append(counter.get_total_flops() + 2 * weights * num_tokens + attention)
        with FlopCounterMode(display=False) as counter:
            (head if grounds else model.fuse)(image_states=images, text_states=texts)
        counts.append(counter.get_total_flops())
    return tuple(count / 1e9 for count in counts)


@every_recipe
def test_its_estimate_follows_from_its_numbers_and_these_from_its_model(name, start):
    found = ESTIMATE.search(RECIPES[name].read_text())
    assert found, "no estimate, or not as in the other recipes"
    images, texts = (int(found[key].replace(",", "")) for key in ("images", "texts"))
    image_gflop, text_gflop = float(found["image_gflop"]), float(found["text_gflop"])
    flop = (images * image_gflop + texts * text_gflop) * 1e9 * int(found["passes"]) * int(found["epochs"])
    assert found["flop"] == f"{flop:.2g}"
    assert found["hours"] == f"{flop / (float(found['tflops']) * 1e12) / 3600:.2g}"

    script, flags = split(start(name))
    args, training_args = parsed(script, flags)
    assert int(found["epochs"]) == training_args.num_train_epochs
    pairs = 1
    if script == "run_retrieval.py":
        assert texts == images * args.captions_per_image
        assert found["passes"] == ("3" if args.contrastive_chunk_size is None else "4")
        pairs += 2 * args.num_hard_negatives
    if script == "run_reasoning.py":
        pairs = 2
    small = name not in PHOTOGRAPHS
    size, grounds = args.image_size if small else 384, script == "run_grounding.py"
    image, text, pair = forward_gflop(size, TOKENS.get(name, 24), small, grounds)
    assert image_gflop == pytest.approx(image, rel=0.03)
    assert text_gflop == pytest.approx(text + pairs * pair, rel=0.03)


# FSDP


def test_accelerate_reads_the_fsdp_file():
    config = load_config_from_file(str(ROOT / "runs/fsdp.yaml"))
    assert config.distributed_type == "FSDP"
    assert config.mixed_precision == "bf16"
    assert config.fsdp_config["fsdp_version"] == 2
    assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"


def test_what_the_fsdp_file_names_can_be_sharded(tmp_path):
    """On one process: the loss stays what it was, and every weight has its gradient."""
    named = load_config_from_file(str(ROOT / "runs/fsdp.yaml")).fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
    model = make_model(HiViLTForQuestionAnswering, vision="siglip", text="bert")
    batch = make_batch() | {"labels": torch.tensor([0, 1, 2, 3, 4])}
    loss = model(**batch).loss.item()
    layers = [module for module in model.modules() if type(module).__name__ in named.split(",")]
    assert {type(layer).__name__ for layer in layers} == set(named.split(","))
    assert not [layer for layer in layers if isinstance(layer, PreTrainedModel)]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for module in [*layers, model]:
            fully_shard(module)
        sharded = model(**batch).loss
        sharded.backward()
        assert sharded.item() == pytest.approx(loss, rel=1e-6)
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_that_share_the_weights_do_what_one_does(encoders, tmp_path):
    """Whole runs of both scripts, from training to predictions, beside one process with twice the images a batch."""
    make_vqa_miniature("gqa", tmp_path / "gqa")
    make_caption_miniature("flickr8k", tmp_path / "flickr8k")
    more = [*encoders, "--fusion", json.dumps({**TINY, "dropout": 0.0}), "--max_steps", "2", "--warmup_steps", "0"]
    more += ["--logging_steps", "1", "--disable_tqdm", "true"]
    # All negatives, of which each process would draw its own.
    runs = {
        "gqa": (run_vqa, more),
        "flickr8k": (run_retrieval, [*more, "--num_hard_negatives", "20", "--rerank_k", "2"]),
    }

    def flags(name: str, processes: int) -> list[str]:
        given = ["--benchmark", name, "--data_dir", str(tmp_path / name)]
        given += ["--output_dir", str(tmp_path / f"{name}-{processes}")]
        size = str(4 // processes)
        return [*given, *runs[name][1], "--per_device_train_batch_size", size, "--per_device_eval_batch_size", size]

    launch_sharded(ROOT / "runs/fsdp.yaml", [(script.__name__, flags(name, 2)) for name, (script, _) in runs.items()])
    for name, (script, _) in runs.items():
        script.main([*flags(name, 1), "--use_cpu"])
        folders = [tmp_path / f"{name}-{processes}" for processes in (1, 2)]
        assert list(folders[1].glob("checkpoint-*/pytorch_model_fsdp.bin"))  # sharded they were
        results = [json.loads((folder / "results.json").read_text()) for folder in folders]
        assert results[1]["settings"]["world_size"] == 2
        histories = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in folders]
        steps = [[entry for entry in history if "loss" in entry] for history in histories]
        assert len(steps[0]) == len(steps[1]) == 2
        for alone, together in zip(*steps, strict=True):
            for measured in ("loss", "grad_norm"):
                assert together[measured] == pytest.approx(alone[measured], rel=1e-4), (name, measured)
        for part in ("validation", "test"):
            assert results[1][part]["loss"] == pytest.approx(results[0][part]["loss"], rel=1e-4), (name, part)
        alone, together = (load_file(folder / "model.safetensors") for folder in folders)
        assert alone.keys() == together.keys()
        # The temperatures are not sharded. Of the rest Adam makes much of gradients that are zero but for rounding.
        for key in [key for key in alone if key.endswith("logit_scale")]:
            assert together[key].item() == pytest.approx(alone[key].item(), abs=2e-6), key
        drawn = {"gqa": "predictions.png", "flickr8k": "retrieval.png"}[name]
        assert (folders[1] / "predictions.jsonl").is_file() and (folders[1] / drawn).is_file()
