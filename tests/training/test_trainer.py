"""What all trainers do."""

import math

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from trainers import Recorder, make_trainer
from transformers import TrainerCallback, TrainingArguments

from hivilt import HiViLTForQuestionAnswering
from hivilt.data.vqa import VQADataset
from hivilt.training.arguments import HiViLTTrainingArguments
from hivilt.training.resuming import last_checkpoint
from hivilt.training.trainer import HiViLTTrainer
from processes import launch
from tiny import CODE, make_config, make_model


@pytest.mark.parametrize("soft", [pytest.param(False, marks=pytest.mark.slow), True])
def test_loss_and_gradient_do_not_depend_on_accumulation(tmp_path, dataset, soft):
    """One step over the first four images, which have 3, 1, 4 and 1 questions, in one batch, two and four."""
    first = VQADataset([example for example in dataset.examples if int(example.image_id) < 4])
    found = []
    for batch_size, accumulation in [(4, 1), (2, 2), (1, 4)]:
        recorder = Recorder()
        make_trainer(
            tmp_path,
            first,
            callbacks=[recorder],
            soft=soft,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            eval_strategy="no",
        ).train()
        found.append((recorder.logs[0]["loss"], recorder.logs[0]["grad_norm"]))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_encoders_learn_at_their_own_rates(tmp_path, dataset, frozen):
    trainer = make_trainer(
        tmp_path, dataset, learning_rate=1e-2, vision_learning_rate=1e-4, text_learning_rate=0.0, weight_decay=0.1
    )
    if frozen:
        trainer.model.freeze("vision")
    optimizer = trainer.create_optimizer()
    plain = make_trainer(tmp_path, dataset, model=trainer.model, weight_decay=0.1).create_optimizer()
    rate_of = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    decay_of = {parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}

    rates = {"vision_model": 1e-4, "text_model": 0.0}
    for name, parameter in trainer.model.named_parameters():
        expected = next((rate for part, rate in rates.items() if f".{part}." in f".{name}"), 1e-2)
        assert rate_of.get(parameter) == (expected if parameter.requires_grad else None), name
    assert decay_of == {
        parameter: group["weight_decay"] for group in plain.param_groups for parameter in group["params"]
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(rate_of)


def test_rates_of_encoders_follow_the_schedule_and_survive_resuming(tmp_path, dataset):
    """A text encoder with rate 0 stays as it was; the rest learns, in a run that is resumed too."""
    rates = {"vision_learning_rate": 1e-3, "text_learning_rate": 0.0}
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    arguments["eval_strategy"] = "no"
    trainer = make_trainer(tmp_path, dataset, learning_rate=1e-2, **rates, **arguments)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert "vision_model" in changed
    assert "text_model" not in changed

    again = make_trainer(tmp_path, dataset, learning_rate=1e-2, **rates, **arguments)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert all(torch.equal(value, after[name]) for name, value in again.model.state_dict().items())


def test_numbers_too_small_to_be_fast_are_zero_while_it_trains(tmp_path, dataset):
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor has no such mode")
    small, found = torch.full((8,), 1e-30), []

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            found.append(bool((small * 1e-10).any()))

    trainer = make_trainer(tmp_path, dataset, max_steps=1)
    trainer.add_callback(Watch())
    trainer.train()
    assert found == [False] and (small * 1e-10).all()


def test_a_sharded_model_is_saved_with_its_code(tmp_path, dataset):
    trainer = make_trainer(tmp_path, dataset)
    kind = type(trainer.model)
    # What torch's fully_shard does to the class of a model.
    trainer.model.__class__ = type(f"FSDP{kind.__name__}", (FSDPModule, kind), {"__module__": FSDPModule.__module__})
    trainer._save(str(tmp_path / "saved"), state_dict=trainer.model.state_dict())
    code = {path.name for path in (tmp_path / "saved").glob("*.py")}
    assert code == set(CODE)


def test_a_checkpoint_is_whole_before_an_older_one_that_cannot_be_deleted(tmp_path, dataset, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("old")

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", refuse)
    trainer = make_trainer(tmp_path, dataset, max_steps=1, save_strategy="steps", save_steps=1, eval_strategy="no")
    with pytest.raises(OSError, match="checkpoint-1 could not be written .*old"):
        trainer.train()
    assert last_checkpoint(tmp_path / "out") == str(tmp_path / "out/checkpoint-1")


def test_model_card_is_left_alone(tmp_path, dataset):
    trainer = make_trainer(tmp_path, dataset)
    card = "---\nlicense: apache-2.0\npipeline_tag: visual-question-answering\n---\n\n# Mine\n"
    (tmp_path / "out/README.md").write_text(card)
    trainer.create_model_card(model_name="other", license="mit")
    assert (tmp_path / "out/README.md").read_text() == card


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_nothing_is_pushed_while_training(strategy, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), push_to_hub=True, hub_strategy=strategy, report_to="none", use_cpu=True
    )
    with pytest.raises(ValueError, match=f"hub_strategy: got .*'{strategy}'.*, but .*'end'"):
        HiViLTTrainer(make_model(HiViLTForQuestionAnswering), arguments)


def test_several_devices_in_one_process_are_refused(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(HiViLTTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="sees 2 devices.*accelerate launch"):
        HiViLTTrainer(
            model=HiViLTForQuestionAnswering(make_config()),
            args=HiViLTTrainingArguments(output_dir=str(tmp_path), use_cpu=True),
        )


def test_removed_columns_are_explained(tmp_path, dataset):
    trainer = make_trainer(tmp_path, dataset)
    trainer.args.remove_unused_columns = True
    rows = Dataset.from_list([{"image": "a.png", "question": "q", "labels": 0}])
    with pytest.raises(TypeError, match="remove_unused_columns=False"):
        trainer.evaluate(rows)


def finite_weights(folder):
    return all(one.isfinite().all() for path in folder.rglob("*.safetensors") for one in load_file(path).values())


def test_a_run_that_diverges_stops_and_says_what_to_lower(tmp_path, dataset):
    trainer = make_trainer(
        tmp_path,
        dataset,
        learning_rate=1e30,
        max_steps=6,
        save_strategy="steps",
        save_steps=1,
        lr_scheduler_type="constant",
    )
    with pytest.raises(
        ValueError, match=r"^learning_rate: with 1e\+30 training diverged at step \d.*Lower --learning_rate"
    ):
        trainer.train()
    assert trainer.state.global_step < 6
    assert finite_weights(tmp_path)


@pytest.mark.parametrize(("place", "accumulation"), [("loss", 1), ("loss", 2), ("gradients", 2)])
def test_the_step_at_which_it_diverged_is_named(place, accumulation, tmp_path, dataset):
    """At its third step; in the first batch of two, where batches are accumulated."""
    trainer = make_trainer(
        tmp_path,
        dataset,
        max_steps=6,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=2,
        eval_strategy="no",
    )
    forward, calls, before = trainer.model.forward, [], {}

    def diverging(**inputs):
        output = forward(**inputs)
        calls.append(None)
        if len(calls) == 2 * accumulation + 1:
            before.update({name: value.clone() for name, value in trainer.model.state_dict().items()})
            if place == "loss":
                output.loss = output.loss * math.nan
            else:
                output.loss.register_hook(lambda gradient: gradient * math.inf)
        return output

    trainer.model.forward = diverging
    what = "loss is nan" if place == "loss" else "gradients are (nan|inf)"
    with pytest.raises(ValueError, match=f"diverged at step 3 of 6, its {what}"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_a_step_that_the_scaler_leaves_out_is_no_divergence(tmp_path, dataset):
    """Float16 overflows at the first steps, until the scale fits."""

    class Scaler:
        scale = 2.0

        def get_scale(self):
            return self.scale

    trainer = make_trainer(tmp_path, dataset)
    trainer.accelerator.scaler = Scaler()
    for parameter in trainer.model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    trainer._get_grad_norm(trainer.model)
    trainer.accelerator.scaler.scale = 1e-5
    with pytest.raises(ValueError, match=r"diverged at step 1 .*the scale of the loss fell below 0\.0001"):
        trainer._get_grad_norm(trainer.model)


@pytest.mark.parametrize("known", [True, False])
def test_weights_that_are_not_finite_are_not_measured_and_not_saved(known, tmp_path, dataset):
    trainer = make_trainer(tmp_path, dataset)
    trainer.save_model()
    with torch.no_grad():
        trainer.model.classifier.bias[1] = math.nan
    asked = dataset.examples if known else [one._replace(answers=()) for one in dataset.examples]
    with pytest.raises(ValueError, match="evaluation gives loss nan"):
        trainer.predict(VQADataset(asked))
    with pytest.raises(ValueError, match="1 of its weights are not finite, such as classifier.bias"):
        trainer.save_model()
    assert finite_weights(tmp_path / "out")


@pytest.mark.slow
def test_of_two_processes_one_diverges_and_both_stop(tmp_path, dataset):
    launch("trainers", 2, [str(tmp_path), "diverge"])
    messages = [(tmp_path / f"{process}.txt").read_text() for process in (0, 1)]
    assert messages[0] == messages[1]
    assert "diverged at step 2 of 4, its loss is nan" in messages[0]
