"""
The life of a checkpoint: opened and trained on again and again, in shards, in half precision, with adapters, under
another head and back; and what a process that has no hivilt makes of it in the end.
"""

import json
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, pipeline, set_seed

import hivilt
from elsewhere import open_and_answer, outputs, tensors
from fresh import run_elsewhere
from hivilt import (
    HiViLTForQuestionAnswering,
    HiViLTForRetrieval,
    HiViLTModel,
    HiViLTProcessor,
    HiViLTVisualQuestionAnsweringPipeline,
    run_retrieval,
    run_vqa,
)
from hivilt.configuration_hivilt import AUTO_MAP
from hivilt.data.captions import CaptionCollator, CaptionDataset, CaptionedImage
from hivilt.data.vqa import VQACollator, VQADataset, VQAExample
from hivilt.tasks.question_answering import QuestionAnsweringTrainer
from hivilt.tasks.retrieval import RetrievalTrainer
from hivilt.training.arguments import COMMON_DEFAULTS, HiViLTTrainingArguments, TaskArguments
from hivilt.training.models import load_or_build
from hivilt.training.trainer import HiViLTTrainer
from tiny import AUTO_CLASSES, CODE, make_batch, make_image, make_model, make_processor

ROOT = Path(hivilt.__file__).resolve().parent
COLORS = ["red", "blue", "lime", "white"]
ANSWERS = ["no", "yes", *COLORS]
INDEX = "model.safetensors.index.json"
BASE_ONLY = "model.fusion.global_fusion.mlp."  # what retrieval, which compares two sides, does without


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Where all lives are lived; those that end in `checkpoints` are opened elsewhere."""
    work = tmp_path_factory.mktemp("lives")
    (work / "checkpoints").mkdir()
    save_file(make_batch(), work / "checkpoints" / "batch.safetensors")
    return work


@pytest.fixture(scope="module")
def data(work) -> Path:
    """Four images, with questions and captions as files of rows."""
    data = work / "data"
    data.mkdir()
    questions, captions = [], []
    for color in COLORS:
        make_image(color).save(data / f"{color}.png")
        for question, answer in (("what color is it", color), ("is it red", "yes" if color == "red" else "no")):
            questions.append({"image": f"{color}.png", "question": question, "answer": answer})
        captions.append({"image": f"{color}.png", "caption": f"a {color} image"})
    (data / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    (data / "captions.jsonl").write_text("\n".join(map(json.dumps, captions)), encoding="utf-8")
    return data


def make_trainer(model, data: Path, folder: Path, **arguments) -> HiViLTTrainer:
    """Twelve steps, with an evaluation and a checkpoint after six; the best of both is what stays."""
    set_seed(0)
    processor = make_processor()
    quiet = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "output_dir": str(folder)}
    steps = {"max_steps": 12, "eval_strategy": "steps", "eval_steps": 6, "save_strategy": "steps", "save_steps": 6}
    chosen = {"save_total_limit": 2, "metric_for_best_model": "loss", "learning_rate": 1e-2, "warmup_steps": 2}
    args = HiViLTTrainingArguments(
        **{**COMMON_DEFAULTS, **quiet, **steps, **chosen, "per_device_train_batch_size": 2, **arguments}
    )
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(inner, HiViLTForRetrieval):
        rows = map(json.loads, (data / "captions.jsonl").read_text(encoding="utf-8").splitlines())
        pairs = [CaptionedImage(row["image"], str(data / row["image"]), (row["caption"],)) for row in rows]
        sets = {"train_dataset": CaptionDataset(pairs, seed=0), "eval_dataset": CaptionDataset(pairs)}
        collator = CaptionCollator(processor)
        return RetrievalTrainer(
            model=model, args=args, **sets, data_collator=collator, processing_class=processor, rerank_k=2
        )
    rows = map(json.loads, (data / "questions.jsonl").read_text(encoding="utf-8").splitlines())
    asked = VQADataset(
        [
            VQAExample(f"{number}", row["image"], str(data / row["image"]), row["question"], (row["answer"],))
            for number, row in enumerate(rows)
        ]
    )
    collator = VQACollator(processor, inner.config.label2id)
    return QuestionAnsweringTrainer(
        model=model,
        args=args,
        train_dataset=asked,
        eval_dataset=asked,
        data_collator=collator,
        processing_class=processor,
    )


def make_checkpoint(head: type, folder: Path, **config):
    """An untrained checkpoint with its processor."""
    model = make_model(head, weight_scale=4.0, **{"id2label": dict(enumerate(ANSWERS)), **config})
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return model


def saved_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def assert_identical(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    """Tensors by name, to the last bit."""
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


# Trained on, twice


def live(head: type, work: Path, data: Path) -> SimpleNamespace:
    """Saved, then twice opened by its Auto class, trained and saved."""
    folder = work / "lives" / head.__name__
    make_checkpoint(head, folder)
    life, processor_files, losses = folder, [], []
    for end in (work / "lives" / f"{head.__name__} trained", work / "checkpoints" / head.__name__):
        model, loading = AUTO_CLASSES[head.__name__].from_pretrained(life, output_loading_info=True)
        before = tensors(model)
        trainer = make_trainer(model, data, end)
        trainer.processing_class = AutoProcessor.from_pretrained(life)
        losses.append(trainer.evaluate()["eval_loss"])
        trainer.train()
        trainer.save_model()
        losses.append(trainer.evaluate()["eval_loss"])
        processor_files += [(end / name).read_bytes() for name in ("processor_config.json", "tokenizer.json")]
        life = end
    return SimpleNamespace(
        folder=end,
        start=folder,
        model=trainer.model.eval(),
        before=before,
        losses=losses,
        loading=loading,
        processor_files=processor_files,
    )


@pytest.fixture(scope="module")
def question_answering(work, data) -> SimpleNamespace:
    return live(HiViLTForQuestionAnswering, work, data)


@pytest.fixture(scope="module")
def retrieval(work, data) -> SimpleNamespace:
    return live(HiViLTForRetrieval, work, data)


@pytest.fixture(params=["question_answering", "retrieval"])
def life(request) -> SimpleNamespace:
    return request.getfixturevalue(request.param)


def test_training_goes_on_where_it_ended(life):
    first, saved, opened, last = life.losses
    assert last < opened < first
    assert opened == pytest.approx(saved, rel=1e-6)
    assert not any(life.loading.values())
    parts = ("vision_model.", "text_model.", "fusion.", "classifier." if "classifier.bias" in life.before else "_proj")
    moved = [name for name, tensor in tensors(life.model).items() if not torch.equal(tensor, life.before[name])]
    for part in parts:
        assert any(part in name for name in moved), part


@pytest.mark.checklist("2")
def test_what_was_trained_is_what_is_saved(life, batch):
    name = type(life.model).__name__
    for opened in (AUTO_CLASSES[name].from_pretrained(life.folder), type(life.model).from_pretrained(life.folder)):
        assert_identical(tensors(opened), tensors(life.model))
        assert_identical(outputs(opened, batch), outputs(life.model, batch))
    config = saved_config(life.folder)
    assert config["architectures"] == [name] and config["dtype"] == "float32" and config["auto_map"] == AUTO_MAP
    assert {path.name for path in life.folder.glob("*.py")} == set(CODE)
    # The processor of every generation is the first one.
    start = [(life.start / name).read_bytes() for name in ("processor_config.json", "tokenizer.json")]
    assert life.processor_files == start * 2
    assert AutoProcessor.from_pretrained(life.folder).id2label == (
        dict(enumerate(ANSWERS)) if name == "HiViLTForQuestionAnswering" else None
    )


@pytest.mark.checklist("2")
def test_base_model_is_taken_out_trained_under_a_head_and_taken_out_again(question_answering, work, data, tmp_path):
    base = AutoModel.from_pretrained(question_answering.folder)
    assert type(base) is HiViLTModel
    base.save_pretrained(tmp_path / "base")
    assert saved_config(tmp_path / "base")["architectures"] == ["HiViLTModel"]

    model, loading = HiViLTForQuestionAnswering.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert loading["missing_keys"] == {"classifier.weight", "classifier.bias"} and not loading["unexpected_keys"]
    assert_identical(tensors(model.model), tensors(question_answering.model.model))
    assert model.config.id2label == dict(enumerate(ANSWERS))
    trainer = make_trainer(model, data, tmp_path / "head")
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    trainer.save_model()
    assert trainer.evaluate()["eval_loss"] < before
    base, loading = AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not loading["missing_keys"]
    assert_identical(tensors(base), tensors(trainer.model.model))


# In shards


@pytest.fixture(scope="module")
def sharded(work, question_answering) -> Path:
    folder = work / "checkpoints" / "sharded"
    question_answering.model.save_pretrained(folder, max_shard_size="60KB")
    make_processor().save_pretrained(folder)
    return folder


def weight_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "safetensors" in path.name)


def test_shards_hold_what_one_file_holds(sharded, question_answering, data, tmp_path):
    assert weight_files(sharded) == [*(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)), INDEX]
    model, processor = load_or_build(TaskArguments(model_name_or_path=str(sharded)), HiViLTForQuestionAnswering)
    assert_identical(tensors(model), tensors(question_answering.model))

    trainer = make_trainer(model, data, tmp_path, max_steps=1, save_steps=1, eval_steps=1)
    trainer.train()
    trainer.save_model()
    assert weight_files(tmp_path) == ["model.safetensors"]
    assert_identical(tensors(HiViLTForQuestionAnswering.from_pretrained(tmp_path)), tensors(trainer.model))


@pytest.mark.parametrize("sizes", [("1GB", "60KB"), ("60KB", "1GB"), ("30KB", "60KB")], ids=" then ".join)
def test_saving_over_another_save_leaves_nothing_of_it(sizes, tmp_path):
    for seed, size in enumerate(sizes):
        model = make_model(HiViLTForQuestionAnswering, seed=seed)
        model.save_pretrained(tmp_path, max_shard_size=size)
    alone = tmp_path / "alone"
    model.save_pretrained(alone, max_shard_size=size)
    assert weight_files(tmp_path) == weight_files(alone)
    for opened in (AutoModel.from_pretrained(tmp_path), HiViLTForQuestionAnswering.from_pretrained(tmp_path)):
        assert_identical(tensors(opened.base_model), tensors(model.base_model))


# In half precision


@pytest.fixture(scope="module")
def half(work, retrieval) -> SimpleNamespace:
    """A retrieval checkpoint that was opened in half precision and saved so."""
    folder = work / "checkpoints" / "bfloat16"
    model = HiViLTForRetrieval.from_pretrained(retrieval.folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return SimpleNamespace(folder=folder, model=model)


def test_half_precision_is_written_down_and_read(half, batch):
    # The temperatures stay in float32, and the model is nevertheless one of bfloat16.
    assert half.model.dtype == torch.bfloat16 and half.model.logit_scale.dtype == torch.float32
    assert saved_config(half.folder)["dtype"] == "bfloat16"
    for how in ({}, {"dtype": "auto"}):
        opened = HiViLTForRetrieval.from_pretrained(half.folder, **how)
        assert opened.dtype == opened.config.dtype == torch.bfloat16
        assert_identical(tensors(opened), tensors(half.model))
        assert_identical(outputs(opened, batch), outputs(half.model, batch))


def test_half_precision_is_trained_on_in_float32(half, retrieval, batch, data, tmp_path):
    model, _ = load_or_build(TaskArguments(model_name_or_path=str(half.folder)), HiViLTForRetrieval)
    assert {tensor.dtype for tensor in model.parameters()} == {model.dtype} == {torch.float32}
    # What bfloat16 rounded away is all that is lost.
    assert_identical(
        tensors(model), {name: x.to(tensors(model)[name].dtype) for name, x in tensors(half.model).items()}
    )
    expected = outputs(retrieval.model, batch)
    for name, value in outputs(model, batch).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0.02 * expected[name].abs().max().item())

    trainer = make_trainer(model, data, tmp_path, max_steps=1, save_steps=1, eval_steps=1)
    trainer.train()
    trainer.save_model()
    config = saved_config(tmp_path)
    assert config["dtype"] == config["vision_config"]["dtype"] == config["text_config"]["dtype"] == "float32"
    weights = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert HiViLTForRetrieval.from_pretrained(tmp_path).dtype == torch.float32


# With adapters


def fusion_layers() -> str:
    """The regular expression for LoRA on the fusion, as docs/usage.md gives it."""
    (given,) = re.findall(r'target_modules=r"([^"]+)"', (ROOT / "docs/usage.md").read_text(encoding="utf-8"))
    return given


ADAPTED = {
    "dense": (HiViLTForQuestionAnswering, {}, {}, None),
    "sparse": (HiViLTForQuestionAnswering, {"fusion_top_k": 3}, {}, None),
    "bfloat16": (HiViLTForQuestionAnswering, {}, {"dtype": torch.bfloat16}, None),
    "new head": (HiViLTForQuestionAnswering, {}, {}, ["classifier"]),
    "retrieval": (HiViLTForRetrieval, {}, {}, None),
    "retrieval, new head": (HiViLTForRetrieval, {}, {}, ["visual_projection", "text_projection"]),
}


QUICK = ("retrieval, new head",)  # `adapter` below is the dense one


@pytest.fixture(
    scope="module", params=[case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in ADAPTED]
)
def adapted(request, work, data) -> SimpleNamespace:
    return adapt(request.param, work, data)


@pytest.fixture(scope="module")
def adapter(work, data) -> SimpleNamespace:
    return adapt("dense", work / "again", data)


def adapt(case: str, work: Path, data: Path) -> SimpleNamespace:
    """A checkpoint and an adapter of its fusion, trained through our Trainer, which returned to the first it saved."""
    head, config, loading, new_head = ADAPTED[case]
    base, folder = work / "adapted" / f"{case}, base", work / "adapted" / case
    make_checkpoint(head, base, **config)
    lora = LoraConfig(target_modules=fusion_layers(), r=2, modules_to_save=new_head)
    set_seed(0)
    model = get_peft_model(head.from_pretrained(base, **loading), lora)
    before = tensors(model)
    # The worst is taken for the best: it is not the last, since slow steps only get better.
    trainer = make_trainer(model, data, folder, greater_is_better=True, learning_rate=1e-3)
    loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    trainer.save_model()
    logged = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    return SimpleNamespace(
        head=head,
        new_head=new_head or [],
        open=lambda: head.from_pretrained(base, **loading),
        open_adapter=lambda: AUTO_CLASSES[head.__name__].from_pretrained(folder, **loading),
        folder=folder,
        base=base,
        before=before,
        model=model.eval(),
        losses=[loss, *logged],
        last=trainer.evaluate()["eval_loss"],
        half=bool(loading),
    )


@pytest.mark.checklist("12")
def test_adapters_of_the_fusion_learn_and_nothing_else(adapted):
    first, middle, last = adapted.losses
    assert last < middle < first
    trains = {name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad}
    heads = {name for name in trains if "modules_to_save" in name}
    assert {name.split(".modules_to_save")[0].rsplit(".", 1)[-1] for name in heads} == set(adapted.new_head)
    assert all("lora_" in name and ".fusion." in name for name in trains - heads)
    linear = {
        name.removesuffix(".base_layer")
        for name, module in adapted.model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".fusion." in name and "lora_" not in name and "_levels." not in name
    }
    assert {name.split(".lora_")[0] for name in trains - heads} == linear
    after = tensors(adapted.model)
    assert {name for name in after if not torch.equal(after[name], adapted.before[name])} <= trains
    assert any(not torch.equal(after[name], adapted.before[name]) for name in trains if "lora_B" in name)


@pytest.mark.checklist("12")
def test_trainer_returns_to_the_best_adapter(adapted):
    _, middle, _ = adapted.losses
    assert adapted.last == pytest.approx(middle, rel=1e-6)
    saved, best, last = (
        load_file(adapted.folder / folder / "adapter_model.safetensors")
        for folder in ("", "checkpoint-6", "checkpoint-12")
    )
    assert_identical(saved, best)
    assert any(not torch.equal(saved[name], last[name]) for name in saved)


@pytest.mark.checklist("12")
def test_base_and_adapter_open_to_what_was_trained(adapted, batch):
    files = {path.name for path in adapted.folder.iterdir() if path.is_file()}
    assert {"adapter_config.json", "adapter_model.safetensors", "processor_config.json"} <= files
    assert not files & {"config.json", "model.safetensors"}
    assert all(
        ("lora_" in name and ".fusion." in name) or any(f".{part}." in name for part in adapted.new_head)
        for name in load_file(adapted.folder / "adapter_model.safetensors")
    )
    expected = outputs(adapted.model.get_base_model(), batch)
    by_peft = PeftModel.from_pretrained(adapted.open(), adapted.folder).get_base_model().eval()
    assert type(by_peft) is adapted.head
    assert_identical(outputs(by_peft, batch), expected)
    if not adapted.new_head:  # which transformers takes from an adapter only in its latest versions
        by_transformers, opened = adapted.open(), adapted.open_adapter()
        by_transformers.load_adapter(str(adapted.folder))
        assert type(opened) is adapted.head
        found = outputs(by_transformers.eval(), batch)
        assert_identical(found, outputs(opened.eval(), batch))
        # On a base in half precision PEFT keeps adapters in float32 and transformers does not.
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0.05 if adapted.half else 0)
    plain = outputs(adapted.open(), batch)
    assert any((plain[name] - expected[name]).abs().max() > 1e-3 for name in expected)


@pytest.mark.checklist("12")
def test_merged_adapter_is_a_plain_checkpoint(adapted, batch, tmp_path):
    merged = PeftModel.from_pretrained(adapted.open(), adapted.folder).merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(adapted.base / "model.safetensors").keys()
    opened, loading = AUTO_CLASSES[adapted.head.__name__].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert_identical(tensors(opened), tensors(merged))
    assert opened.dtype == (torch.bfloat16 if adapted.half else torch.float32)
    expected, found = outputs(adapted.model.get_base_model(), batch), outputs(opened, batch)
    # A weight with its adapter is rounded once more than both apart.
    tolerance = {"rtol": 0, "atol": 0.1} if adapted.half else {"rtol": 1e-5, "atol": 1e-5}
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **tolerance)


def test_adapters_resume_exactly(adapter, data, tmp_path):
    shutil.copytree(adapter.folder / "checkpoint-6", tmp_path / "checkpoint-6")
    set_seed(0)
    model = get_peft_model(adapter.open(), LoraConfig(target_modules=fusion_layers(), r=2))
    make_trainer(model, data, tmp_path, load_best_model_at_end=False).train(str(tmp_path / "checkpoint-6"))
    resumed, whole = (load_file(Path(p, "checkpoint-12/adapter_model.safetensors")) for p in (tmp_path, adapter.folder))
    assert_identical(resumed, whole)


def test_adapter_for_other_answers_goes_with_a_base_that_has_them(adapter, data, batch, tmp_path):
    model = adapter.open()
    model.resize_answer_head(["blue", "red", "lime", "white", "yes", "no", "two"])
    model.save_pretrained(tmp_path / "base")
    lora = LoraConfig(target_modules=fusion_layers(), r=2, modules_to_save=["classifier"])
    trainer = make_trainer(get_peft_model(model, lora), data, tmp_path / "adapter", max_steps=6)
    trainer.train()
    trainer.save_model()
    expected = outputs(model.eval(), batch)
    base = HiViLTForQuestionAnswering.from_pretrained(tmp_path / "base")
    opened = PeftModel.from_pretrained(base, tmp_path / "adapter").get_base_model()
    assert_identical(outputs(opened, batch), expected)
    assert opened.config.id2label[6] == "two"
    with pytest.raises(RuntimeError, match="size mismatch for .*classifier"):
        PeftModel.from_pretrained(adapter.open(), tmp_path / "adapter")


@pytest.fixture(scope="module")
def merged(work, adapter) -> SimpleNamespace:
    folder = work / "checkpoints" / "merged"
    model = PeftModel.from_pretrained(adapter.open(), adapter.folder).merge_and_unload()
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return SimpleNamespace(folder=folder, model=model)


# Under another head, and back


def script_flags(start: Path, rows: Path, folder: Path) -> list[str]:
    files = [part for split in ("train", "validation", "test") for part in (f"--{split}_file", str(rows))]
    quiet = ["--use_cpu", "--disable_tqdm", "true", "--logging_steps", "1", "--per_device_train_batch_size", "2"]
    steps = ["--max_steps", "4", "--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "4"]
    steps += ["--save_steps", "4", "--learning_rate", "0.01"]
    return [*files, *quiet, *steps, "--model_name_or_path", str(start), "--output_dir", str(folder)]


@pytest.fixture(scope="module")
def answering(work) -> Path:
    """A question answering checkpoint that was trained on soft labels, with weights that nobody would initialise so."""
    folder = work / "lives" / "soft"
    make_checkpoint(HiViLTForQuestionAnswering, folder, problem_type="multi_label_classification")
    return folder


@pytest.fixture(scope="module")
def turned(work, data, answering) -> Path:
    """That checkpoint, turned into one of retrieval by the script."""
    folder = work / "checkpoints" / "turned"
    run_retrieval.main([*script_flags(answering, data / "captions.jsonl", folder), "--rerank_k", "2"])
    return folder


@pytest.fixture(scope="module")
def turned_back(work, data, turned) -> Path:
    """And back, for other answers: no white image is asked about."""
    folder = work / "checkpoints" / "turned back"
    rows = (data / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    (data / "fewer.jsonl").write_text("\n".join(row for row in rows if "white" not in row), encoding="utf-8")
    run_vqa.main(script_flags(turned, data / "fewer.jsonl", folder))
    return folder


@pytest.mark.checklist("2")
def test_retrieval_takes_all_but_the_head_from_question_answering(answering):
    given = HiViLTForQuestionAnswering.from_pretrained(answering)
    torch.full((100_000,), torch.nan)  # memory that loading may get, and must not leave as it is
    model, loading = HiViLTForRetrieval.from_pretrained(answering, output_loading_info=True)
    head = {"logit_scale", "matching_logit_scale", "visual_projection.weight", "text_projection.weight"}
    assert loading["missing_keys"] == head and not loading["mismatched_keys"]
    assert all(name.startswith(("classifier.", BASE_ONLY)) for name in loading["unexpected_keys"])
    shared = tensors(given.model)
    assert_identical(tensors(model.model), {name: shared[name] for name in tensors(model.model)})

    fresh = make_model(HiViLTForRetrieval)
    for name in head:
        new, usual = model.get_parameter(name), fresh.get_parameter(name)
        assert new.isfinite().all()
        if new.dim() == 0:
            assert new == usual
        else:
            assert 0.7 < new.std() / model.config.initializer_range < 1.3


@pytest.mark.checklist("2")
def test_retrieval_forgets_the_answers(answering, turned, work):
    assert saved_config(answering)["problem_type"] == "multi_label_classification"
    config = saved_config(turned)
    assert config["architectures"] == ["HiViLTForRetrieval"] and config["auto_map"] == AUTO_MAP
    assert not config["custom_pipelines"]
    assert not {"id2label", "label2id", "problem_type"} & config.keys()
    assert AutoProcessor.from_pretrained(turned).id2label is None
    # Only the file: the config may be that of other models too.
    model = HiViLTForRetrieval.from_pretrained(answering)
    model.save_pretrained(work / "lives" / "forgetful")
    assert list(model.config.label2id) == ANSWERS and model.config.problem_type == "multi_label_classification"
    assert "label2id" not in saved_config(work / "lives" / "forgetful")


@pytest.mark.checklist("2")
def test_question_answering_comes_back_with_other_answers(turned, turned_back):
    model, loading = HiViLTForQuestionAnswering.from_pretrained(turned, output_loading_info=True)
    assert all(name.startswith(("classifier.", BASE_ONLY)) for name in loading["missing_keys"])
    assert all(parameter.isfinite().all() for parameter in model.parameters())

    config, answers = saved_config(turned_back), {"no", "yes", "red", "blue", "lime"}
    assert config["architectures"] == ["HiViLTForQuestionAnswering"]
    assert list(config["custom_pipelines"]) == ["visual-question-answering"]
    assert config["problem_type"] == "single_label_classification"
    assert set(config["label2id"]) == answers
    assert config["id2label"] == {str(label): answer for answer, label in config["label2id"].items()}
    processor = AutoProcessor.from_pretrained(turned_back)
    assert processor.id2label == {label: answer for answer, label in config["label2id"].items()}


def test_pipeline_follows_the_head(turned, turned_back, data, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    vqa = pipeline(model=str(turned_back), trust_remote_code=True)
    assert {one["answer"] for one in vqa(str(data / "red.png"), "is it red")} == {"no", "yes", "red", "blue", "lime"}
    with pytest.raises(ValueError, match="a checkpoint of HiViLTForRetrieval: the head that answers .* untrained"):
        pipeline("visual-question-answering", model=str(turned), trust_remote_code=True)


# From the Hub's cache


def test_what_came_from_the_hub_becomes_a_checkpoint_of_its_own(question_answering, data, batch, tmp_path):
    """Older versions of transformers write the repository's name before each module, for it holds the code."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--me--hivilt"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(question_answering.folder, snapshot, ignore=shutil.ignore_patterns("checkpoint-*"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        named = re.sub(r'"(\w+_hivilt\.)', r'"me/hivilt--\1', (snapshot / name).read_text(encoding="utf-8"))
        (snapshot / name).write_text(named, encoding="utf-8")
    assert "me/hivilt--" in (snapshot / "config.json").read_text(encoding="utf-8")

    hub = {"cache_dir": tmp_path / "cache", "trust_remote_code": True}
    model = AUTO_CLASSES["HiViLTForQuestionAnswering"].from_pretrained("me/hivilt", **hub)
    assert model.config.auto_map["AutoModel"] == "me/hivilt--modeling_hivilt.HiViLTModel"
    trainer = make_trainer(model, data, tmp_path / "mine", max_steps=1, save_steps=1, eval_steps=1)
    trainer.processing_class = AutoProcessor.from_pretrained("me/hivilt", **hub)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "mine", tmp_path / "mine" / "checkpoint-1"):
        assert {path.name for path in folder.glob("*.py")} == set(CODE)
        assert saved_config(folder)["auto_map"] == AUTO_MAP
        for file in set(folder.glob("*.json")) - {folder / "trainer_state.json"}:
            text = file.read_text(encoding="utf-8")
            assert "me/hivilt" not in text and str(tmp_path) not in text, file.name
    opened = HiViLTForQuestionAnswering.from_pretrained(tmp_path / "mine")
    assert_identical(outputs(opened, batch), outputs(trainer.model.eval(), batch))


# Files


def holds_a_pickle(file: Path) -> bool:
    """What torch.save wrote, now (an archive) or long ago, or Python's own pickle."""
    return zipfile.is_zipfile(file) or file.read_bytes()[:1] == b"\x80"


@pytest.mark.checklist("14")
def test_nothing_but_the_state_of_training_is_a_pickle(question_answering, adapter, half, turned, turned_back):
    folders = [question_answering.folder, adapter.folder, half.folder, turned, turned_back]
    found = {file for folder in folders for file in folder.rglob("*") if file.is_file() and holds_a_pickle(file)}
    assert {file.name for file in found} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert all(file.parent.name.startswith("checkpoint-") for file in found)


# Elsewhere


@pytest.fixture(scope="module")
def elsewhere(work, data, question_answering, retrieval, sharded, half, adapter, merged, turned, turned_back) -> dict:
    """What a process without hivilt finds in all of them, and what its pipelines answer from an adapter."""
    for name in ("results", "saved again"):
        (work / name).mkdir()
    places = {"checkpoints": work / "checkpoints", "results": work / "results", "again": work / "saved again"}
    asked = {
        "qa": adapter.folder,
        "retrieval": turned,
        "image": data / "red.png",
        "again": work / "adapter saved again",
    }
    return run_elsewhere(open_and_answer, work / "elsewhere", opening=places, answering=asked)


@pytest.mark.checklist("1")
@pytest.mark.parametrize(
    "name",
    ["HiViLTForQuestionAnswering", "HiViLTForRetrieval", "sharded", "bfloat16", "merged", "turned", "turned back"],
)
def test_its_auto_class_opens_the_end_of_every_life(elsewhere, work, batch, name):
    folder = work / "checkpoints" / name
    (architecture,) = saved_config(folder)["architectures"]
    facts = elsewhere["opened"][name]
    assert facts["AutoProcessor"] == "HiViLTProcessor"
    assert all(module.startswith("transformers_modules.") for module in facts["modules"])
    own = facts[AUTO_CLASSES[architecture].__name__]
    assert own["class"] == architecture
    assert own["missing_keys"] == own["unexpected_keys"] == own["mismatched_keys"] == []

    expected = outputs(AUTO_CLASSES[architecture].from_pretrained(folder), batch)
    found = load_file(work / "results" / f"{name}.outputs.safetensors")
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-6)
    # And saved from there it is whole again, in one file.
    again = work / "saved again" / name
    assert weight_files(again) == ["model.safetensors"] and {path.name for path in again.glob("*.py")} == set(CODE)
    assert saved_config(again)["dtype"] == saved_config(folder)["dtype"]


@pytest.mark.checklist("13")
def test_pipelines_answer_from_an_adapter_and_from_a_turned_checkpoint(elsewhere, adapter, turned, data):
    said = elsewhere["answered"]
    assert said["class"] == ["HiViLTVisualQuestionAnsweringPipeline", "HiViLTProcessor", "transformers_modules"]
    vqa = HiViLTVisualQuestionAnsweringPipeline(model=adapter.model.get_base_model(), processor=make_processor())
    expected = vqa(str(data / "red.png"), ["what color is the circle", "is there a square"])
    for how in ("task", "inferred", "saved again"):
        for found, answers in zip(said[how], expected, strict=True):
            assert [one["answer"] for one in found] == [one["answer"] for one in answers]
            assert [one["score"] for one in found] == pytest.approx([one["score"] for one in answers], abs=1e-5)

    processor, model = HiViLTProcessor.from_pretrained(turned), HiViLTForRetrieval.from_pretrained(turned)
    labels = ["red", "blue circle", "three"]
    inputs = processor(images=str(data / "red.png"), text=[labels], return_tensors="pt")
    del inputs["image_index"]
    scores = dict(zip(labels, model(**inputs).logits_per_image.softmax(dim=-1)[0].tolist(), strict=True))
    assert {one["label"]: one["score"] for one in said["zero-shot"]} == pytest.approx(scores, abs=1e-5)
