"""Each flag of `TrainingArguments`: in the table, refused where it says so, and doing what it says where it works."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import ParallelismConfig
from transformers import TrainerCallback, TrainingArguments, set_seed

from hivilt import HiViLTForQuestionAnswering, HiViLTForRetrieval
from hivilt.data.vqa import VQACollator, VQADataset, VQAExample
from hivilt.tasks.arguments import VQAArguments
from hivilt.tasks.question_answering import QuestionAnsweringTrainer
from hivilt.tasks.retrieval import RetrievalTrainer
from hivilt.training.arguments import COMMON_DEFAULTS, HiViLTTrainingArguments, parse_arguments
from hivilt.training.check_arguments import REFUSED
from tiny import make_config, make_image, make_processor

ANSWERS = ["red", "blue", "yes", "no"]


# An older transformers lacks some.
INSTALLED = {field.name for field in dataclasses.fields(TrainingArguments)}


PAGE = (Path(__file__).parents[2] / "docs/training_arguments.md").read_text(encoding="utf-8")
WORKS, IN_PAGE, LEFT = (dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", part, re.M)) for part in PAGE.split("\n## ")[1:])


def test_the_page_lists_every_flag_of_the_installed_transformers_once():
    """A new one has to be decided: works and is tested, refused, or left to transformers."""
    listed = [*WORKS, *IN_PAGE, *LEFT]
    assert len(set(listed)) == len(listed) == PAGE.count("\n| `")
    assert set(listed) >= INSTALLED
    assert IN_PAGE == REFUSED


def test_every_flag_that_works_is_in_a_test():
    texts = [path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].rglob("*.py")]
    assert [name for name in WORKS if not any(re.search(rf"\b{name}\b", text) for text in texts)] == []


# Refused


@pytest.mark.parametrize("name", sorted(REFUSED.keys() & INSTALLED))
def test_a_flag_without_a_meaning_is_refused_by_name_and_by_the_trainers_of_plain_arguments(name, tmp_path):
    usual = {field.name: field.default for field in dataclasses.fields(HiViLTTrainingArguments)}[name]
    values = {"liger_kernel_config": {"rope": True}, "parallelism_config": ParallelismConfig()}
    value = values.get(name, (not usual) if isinstance(usual, bool) else ["x"])
    with pytest.raises(ValueError, match=f"(?s)^{name}: got .*, but .*[;:] .*"):
        HiViLTTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: value})
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, remove_unused_columns=False, report_to="none")
    setattr(plain, name, value)
    with pytest.raises(ValueError, match=f"^{name}: "):
        QuestionAnsweringTrainer(HiViLTForQuestionAnswering(make_config()), plain)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_sampling_strategy", "group_by_length"], "^train_sampling_strategy: got 'group_by_length', but"),
        (["--accelerator_config", '{"dispatch_batches": true}'], "^accelerator_config: got .*, but dispatch_batches"),
        (["--push_to_hub", "--hub_strategy", "checkpoint"], "^hub_strategy: got 'checkpoint', but .*'end'"),
        (["--eval_accumulation_steps", "2"], "^eval_accumulation_steps: got 2, but"),
        (["--do_predict", "--resume_from_checkpoint", "last"], "^resume_from_checkpoint: .*without do_train"),
        (["--label_smoothing_factor", "2"], "^label_smoothing_factor: expected at least 0 and less than 1, got 2.0"),
        (["--adam_beta2", "1.5"], "^adam_beta2: expected at least 0 and less than 1, got 1.5"),
        (["--adam_epsilon", "-1"], "^adam_epsilon: expected at least 0"),
        (["--max_steps", "0"], "^max_steps: expected at least 1, got 0"),
        (["--report_to", "clearml"], "^report_to: clearml is not installed"),
        (["--report_to", "tensorbord"], "^report_to: expected any of .*tensorboard.*, got 'tensorbord'"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(flags, VQAArguments, {})


# Works


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Six images with eight questions."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(6):
        make_image("red" if number % 2 else "blue").save(folder / f"{number}.png")
    asked = [("what color", number) for number in range(6)] + [("is there a red circle", 0), ("is there", 3)]
    return [
        VQAExample(f"{place}", str(number), str(folder / f"{number}.png"), question, (ANSWERS[place % 4],))
        for place, (question, number) in enumerate(asked)
    ]


class Recorder(TrainerCallback):
    """Losses, and at which steps was evaluated and saved."""

    def __init__(self):
        self.losses, self.evaluated, self.saved = [], [], []

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated.append(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        self.saved.append(state.global_step)


@pytest.fixture
def make(tmp_path, examples):
    """Makes a trainer of a tiny model without dropout, always the same, of two steps of four questions unless told
    otherwise; `recorder` is its callback."""

    def make(model=None, **arguments):
        set_seed(0)
        if model is None:
            config = make_config(dropout=0.0, id2label=dict(enumerate(ANSWERS)), initializer_range=0.3)
            model = HiViLTForQuestionAnswering(config)
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        usual = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True}
        usual |= {"output_dir": str(tmp_path / "out"), "disable_tqdm": True, "learning_rate": 1e-3}
        usual |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
        args = HiViLTTrainingArguments(**{**COMMON_DEFAULTS, **usual, **arguments})
        recorder = Recorder()
        trainer = QuestionAnsweringTrainer(
            model=model,
            args=args,
            train_dataset=VQADataset(examples, seed=args.draw_seed),
            eval_dataset=VQADataset(examples),
            data_collator=VQACollator(make_processor(), {answer: label for label, answer in enumerate(ANSWERS)}),
            processing_class=make_processor(),
            callbacks=[recorder],
        )
        trainer.recorder = recorder
        return trainer

    return make


@pytest.fixture(scope="module")
def usual():
    """What two steps with every flag unset come to; filled by the first test that asks."""
    return {}


@pytest.fixture
def plain(make, usual):
    """Losses and weights of two steps with every flag unset."""
    if not usual:
        trainer = make()
        trainer.train()
        usual["losses"] = trainer.recorder.losses
        usual["weights"] = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return usual["losses"], usual["weights"]


def same(trainer, weights, rtol=0.0, atol=0.0):
    found = trainer.model.state_dict()
    return all(torch.allclose(found[name], weights[name], rtol=rtol, atol=atol) for name in weights)


@pytest.mark.parametrize(
    "arguments",
    [
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1}
        | {"include_num_input_tokens_seen": "all", "torch_empty_cache_steps": 1},
        # torch waits five seconds when it lets such workers go.
        pytest.param(
            {"dataloader_persistent_workers": True, "dataloader_num_workers": 1, "dataloader_prefetch_factor": 1},
            marks=pytest.mark.slow,
        ),
        {"per_device_eval_batch_size": 3, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
        | {"greater_is_better": False, "metric_for_best_model": "loss"},
        {"activation_checkpointing" if "activation_checkpointing" in INSTALLED else "gradient_checkpointing": True},
        # Most of a minute, of which torch takes all; test_conformance.py compiles the model itself.
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow),
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_should_change_no_weight_changes_none(arguments, make, plain):
    trainer = make(**arguments)
    trainer.train()
    assert trainer.state.global_step == 2
    assert same(trainer, plain[1], rtol=1e-3, atol=1e-5)
    if "include_num_input_tokens_seen" in arguments:
        assert trainer.state.num_input_tokens_seen > 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"neftune_noise_alpha": 50.0},
        {"label_smoothing_factor": 0.3},
        {"bf16": True},
        {"seed": 3},
        {"data_seed": 3},
        {"train_sampling_strategy": "sequential"},
        # What only transformers and torch read.
        pytest.param({"max_grad_norm": 1e-3}, marks=pytest.mark.slow),
        pytest.param({"weight_decay": 0.5, "learning_rate": 0.1}, marks=pytest.mark.slow),
        pytest.param({"per_device_train_batch_size": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_should_change_training_changes_it(arguments, make, plain):
    trainer = make(**arguments)
    trainer.train()
    assert trainer.state.global_step == 2
    assert not same(trainer, plain[1], rtol=1e-3, atol=1e-5)
    assert all(math.isfinite(loss) for loss in trainer.recorder.losses)


@pytest.mark.parametrize("text", ["t5", pytest.param("clip", marks=pytest.mark.slow)])
def test_noise_comes_into_whatever_embeds_the_words(text, make):
    """T5 has an embedding of its own that never runs."""
    losses = {}
    for alpha in (None, 50.0):
        set_seed(0)
        config = make_config(text=text, dropout=0.0, id2label=dict(enumerate(ANSWERS)), initializer_range=0.3)
        trainer = make(HiViLTForQuestionAnswering(config), max_steps=1, neftune_noise_alpha=alpha)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.train()
        losses[alpha] = trainer.recorder.losses[0]
    assert losses[50.0] != pytest.approx(losses[None], rel=1e-3)


def test_noise_that_would_not_come_in_is_refused_at_the_first_step(make, monkeypatch):
    unused = torch.nn.Embedding(3, 3)
    monkeypatch.setattr(HiViLTForQuestionAnswering, "get_input_embeddings", lambda model: unused)
    trainer = make(neftune_noise_alpha=5.0)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match="^neftune_noise_alpha: got 5.0, but .* no noise would come in"):
        trainer.train()
    assert same(trainer, before)


def test_label_smoothing_is_that_of_torch(make, examples):
    trainer = make(label_smoothing_factor=0.3, max_steps=1, per_device_train_batch_size=8)
    items = [VQADataset(examples)[place] for place in range(len(VQADataset(examples)))]
    batch = trainer.data_collator(items)
    with torch.no_grad():
        logits = trainer.model(
            **{name: one for name, one in batch.items() if name not in ("labels", "question_index")}
        ).logits
    expected = F.cross_entropy(logits, batch["labels"], label_smoothing=0.3).item()
    trainer.train()
    assert trainer.recorder.losses == [pytest.approx(expected, rel=1e-4)]
    # Evaluation says how likely the answers are, as without it.
    make().model.load_state_dict(trainer.model.state_dict())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(make(model=trainer.model).evaluate()["eval_loss"])


def test_label_smoothing_of_several_answers_is_refused(make):
    model = make().model
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="^label_smoothing_factor: got 0.1, but questions with several answers"):
        make(model=model, label_smoothing_factor=0.1)


@pytest.mark.parametrize(
    ("name", "value"), [("label_smoothing_factor", 0.1), ("train_sampling_strategy", "sequential")]
)
def test_retrieval_refuses_what_has_no_effect_on_it(name, value, tmp_path):
    args = HiViLTTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **{name: value})
    with pytest.raises(ValueError, match=f"^{name}: got {value!r}"):
        RetrievalTrainer(HiViLTForRetrieval(make_config()), args)


def test_full_determinism_is_asked_of_torch(make):
    try:
        make(full_determinism=True).train()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_batch_that_fits_is_found_and_counted_anew(make, examples):
    """A batch of more than two images exhausts the memory."""
    trainer = make(auto_find_batch_size=True, per_device_train_batch_size=3, max_steps=-1, num_train_epochs=1)
    forward = trainer.model.forward

    def of_two(**inputs):
        if trainer.model.training and len(inputs["pixel_values"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(**inputs)

    trainer.model.forward = of_two
    trainer.train()
    assert trainer.num_examples_trained == len(examples)
    assert trainer._train_batch_size == 2
    assert trainer.state.global_step == 3


@pytest.mark.parametrize(
    ("arguments", "evaluated", "saved"),
    [
        ({"eval_strategy": "epoch", "eval_on_start": True, "save_strategy": "epoch"}, [0, 2, 4], [2, 4]),
        (
            {"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 3}
            | {"save_strategy": "steps", "save_steps": 3, "save_only_model": True},
            [3, 4],
            [3, 4],
        ),
        (
            {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best", "metric_for_best_model": "loss"},
            [2, 4],
            None,
        ),
    ],
    ids=str,
)
def test_evaluates_and_saves_when_told(arguments, evaluated, saved, make):
    trainer = make(max_steps=-1, num_train_epochs=2, **arguments)
    trainer.train()
    assert trainer.recorder.evaluated == evaluated
    assert saved is None or trainer.recorder.saved == saved
    if arguments.get("save_only_model"):
        last = Path(trainer.args.output_dir, "checkpoint-4")
        assert not (last / "optimizer.pt").exists()
        with pytest.raises(ValueError, match="^resume_from_checkpoint: .*checkpoint-4 holds the model only"):
            make(max_steps=5).train(str(last))


def test_the_best_is_loaded_and_old_checkpoints_go(make, tmp_path):
    """Of three, by the loss; at this rate it only grows, so that the first is the best."""
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 2}
    trainer = make(max_steps=3, greater_is_better=True, lr_scheduler_type="constant", **every, **best)
    trainer.train()
    history = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    step = max(range(3), key=history.__getitem__) + 1
    assert trainer.state.best_global_step == step
    assert trainer.evaluate()["eval_loss"] == pytest.approx(history[step - 1])
    kept = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{step}", "checkpoint-3" if step != 3 else "checkpoint-2"}


def test_a_metric_that_is_not_measured_is_refused_before_training(make):
    trainer = make(metric_for_best_model="vqa_accuracy")  # of questions with several answers
    with pytest.raises(ValueError, match=r"^metric_for_best_model: got 'vqa_accuracy', but .* is accuracy, loss"):
        trainer.train()
    assert trainer.state.global_step == 0
    for name in ("eval_accuracy", "loss"):
        make(metric_for_best_model=name, max_steps=1, eval_strategy="steps", eval_steps=1).train()


def test_ignoring_skipped_data_begins_the_epoch_again(make):
    every = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9, "per_device_train_batch_size": 2}
    whole = make(max_steps=2, **every)
    whole.train()
    checkpoint = f"{whole.args.output_dir}/checkpoint-1"
    again = make(max_steps=2, **every)
    again.train(checkpoint)
    assert again.recorder.losses == pytest.approx(whole.recorder.losses[1:])
    other = make(max_steps=2, ignore_data_skip=True, **every)
    other.train(checkpoint)
    assert other.recorder.losses != pytest.approx(whole.recorder.losses[1:])


@pytest.mark.parametrize("half", ["bf16_full_eval", "fp16_full_eval"])
def test_half_precision_of_evaluation_is_not_what_is_saved(half, make):
    trainer = make(**{half: True})
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    seen = []
    trainer.model.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.evaluate()
    assert set(seen) == {torch.bfloat16 if half.startswith("bf16") else torch.float16}
    assert same(trainer, before)
    assert {value.dtype for value in trainer.model.state_dict().values() if value.is_floating_point()} == {
        torch.float32
    }


def test_dropping_the_last_batch_is_of_training_alone(make, examples):
    trainer = make(
        dataloader_drop_last=True,
        per_device_train_batch_size=5,
        per_device_eval_batch_size=5,
        max_steps=-1,
        num_train_epochs=1,
        eval_strategy="epoch",
    )
    trainer.train()
    assert trainer.state.global_step == len(trainer.train_dataset) // 5
    assert trainer.evaluate()["eval_num_questions"] == len(examples)
    assert len(trainer.predict(VQADataset(examples)).predictions) == len(examples)
    with pytest.raises(ValueError, match="^dataloader_drop_last: .* does not fill one batch of 50"):
        make(dataloader_drop_last=True, per_device_train_batch_size=50).train()


def test_metrics_of_ones_own_are_refused_since_nothing_calls_them(make):
    with pytest.raises(ValueError, match="^compute_metrics"):
        QuestionAnsweringTrainer(make().model, make().args, compute_metrics=lambda predictions: {})
