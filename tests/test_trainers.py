"""What counts questions and captions where Trainer counts rows."""

import json
import math
import os
import signal
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from hivilt import HiViLTForQuestionAnswering, HiViLTForRetrieval
from hivilt.data.captions import CaptionCollator, CaptionDataset, CaptionedImage
from hivilt.data.vqa import VQACollator, VQADataset, VQAExample
from hivilt.evaluation.vqa import majority_answer
from hivilt.losses_hivilt import classification_loss
from hivilt.trainers import (
    HiViLTTrainer,
    QuestionAnsweringTrainer,
    RetrievalTrainer,
    answer_examples,
    last_checkpoint,
    question_losses,
)
from hivilt.training import COMMON_DEFAULTS, HiViLTTrainingArguments, run_command
from processes import launch
from tiny import make_config, make_image, make_model, make_processor

ANSWERS = ["yes", "no", "red", "blue"]
# Questions an image: few and many, so that a mean over batches is not the mean over questions.
COUNTS = [3, 1, 4, 1, 2, 1, 5]


@pytest.fixture
def dataset(tmp_path):
    """Seven images with 17 questions; the image of a question is not next to it in the data."""
    examples = []
    for turn in range(max(COUNTS)):
        for number, count in enumerate(COUNTS):
            if turn < count:
                path = tmp_path / f"{number}.png"
                make_image("red" if number % 2 else "blue").save(path)
                question = "is there a red circle in the image" if turn % 2 else "what color"
                answer = ANSWERS[(turn + number) % 4] if (turn, number) != (0, 1) else "green"
                examples.append(VQAExample(f"{number}-{turn}", str(number), str(path), question, (answer,)))
    return VQADataset(examples)


def make_arguments(tmp_path, **arguments):
    quiet = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "per_device_eval_batch_size": 2}
    unsaved = {"save_strategy": "no", "load_best_model_at_end": False, "output_dir": str(tmp_path / "out")}
    return HiViLTTrainingArguments(**{**COMMON_DEFAULTS, **quiet, **unsaved, **arguments})


@pytest.fixture
def opened(monkeypatch):
    """The image files that were opened, one entry each time."""
    names, open_file = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file, *args: names.append(Path(file).name) or open_file(file, *args))
    return names


OURS = ("vision_learning_rate", "text_learning_rate", "top_k", "watched_answer", "official_metrics")


def make_trainer(tmp_path, dataset, model=None, callbacks=None, soft=False, **arguments):
    if model is None:
        set_seed(0)
        model = HiViLTForQuestionAnswering(
            make_config(id2label=dict(enumerate(ANSWERS)), dropout=0.0, initializer_range=0.3)
        )
        model.config.vision_config.hidden_dropout_prob = 0.0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.text_config.attention_probs_dropout_prob = 0.0
    processor = make_processor()
    ours = {name: arguments.pop(name) for name in OURS if name in arguments}
    return QuestionAnsweringTrainer(
        **ours,
        model=model,
        args=make_arguments(tmp_path, **arguments),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=VQACollator(processor, {answer: label for label, answer in enumerate(ANSWERS)}, soft),
        processing_class=processor,
        callbacks=callbacks,
    )


# Training


@pytest.mark.parametrize("soft", [False, True])
def test_question_losses_average_to_the_loss_of_the_model(soft):
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4), torch.tensor([0, 3, -100, 1, 1, -100])
    if soft:
        labels = torch.rand(6, 4) * torch.tensor([1, 1, 0, 1, 1, 0])[:, None]
    losses = question_losses(logits, labels)
    assert [place for place, loss in enumerate(losses) if loss is None] == [2, 5]
    known = [loss for loss in losses if loss is not None]
    assert sum(known) / len(known) == pytest.approx(classification_loss(logits, labels).item())


class Recorder(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("soft", [False, True])
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


def test_a_sharded_model_is_saved_with_its_code(tmp_path, dataset):
    trainer = make_trainer(tmp_path, dataset)
    kind = type(trainer.model)
    # What torch's fully_shard does to the class of a model.
    trainer.model.__class__ = type(f"FSDP{kind.__name__}", (FSDPModule, kind), {"__module__": FSDPModule.__module__})
    trainer._save(str(tmp_path / "saved"), state_dict=trainer.model.state_dict())
    code = {path.name for path in (tmp_path / "saved").glob("*.py")}
    assert code == {f"{name}_hivilt.py" for name in ("configuration", "encoders", "modeling", "processing", "pipeline")}


def test_a_checkpoint_is_whole_before_an_older_one_that_cannot_be_deleted(tmp_path, dataset, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("old")

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", refuse)
    trainer = make_trainer(tmp_path, dataset, max_steps=1, save_strategy="steps", save_steps=1, eval_strategy="no")
    with pytest.raises(OSError, match="checkpoint-1 could not be written .*old"):
        trainer.train()
    assert last_checkpoint(tmp_path / "out") == str(tmp_path / "out/checkpoint-1")


def test_after_training_signals_are_what_they_were(tmp_path, dataset, monkeypatch):
    numbers = (signal.SIGTERM, signal.SIGINT)
    usual = list(map(signal.getsignal, numbers))
    trainer = make_trainer(tmp_path, dataset, max_steps=1, eval_strategy="no")
    monkeypatch.setattr(trainer, "training_step", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert list(map(signal.getsignal, numbers)) == usual


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_saves_and_a_second_one_ends_at_once(times, tmp_path, dataset, capfd):
    trainer = make_trainer(tmp_path, dataset, max_steps=3, eval_strategy="no", per_device_train_batch_size=2)
    step = trainer.training_step

    def interrupted(*args):
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    trainer.training_step = interrupted
    with pytest.raises(SystemExit if times == 1 else KeyboardInterrupt) as stop:
        trainer.train()
    assert "Ctrl-C: saves after this step and ends; once more ends at once" in capfd.readouterr().err
    last = last_checkpoint(tmp_path / "out")
    assert (last and Path(last).name) == ("checkpoint-1" if times == 1 else None)
    assert times == 2 or stop.value.code == 130


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
    with pytest.raises(ValueError, match=f"hub_strategy: got '{strategy}', expected 'end'"):
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


def test_training_on_unknown_answers_alone_is_refused(tmp_path, dataset):
    strange = VQADataset([example._replace(answers=("purple",)) for example in dataset.examples])
    with pytest.raises(
        ValueError, match=r"none of its 17 questions has an answer.*'purple'.*\['yes', 'no', 'red', 'blue'\]"
    ):
        make_trainer(tmp_path, strange).train()


def test_questions_without_an_answer_are_no_obstacle_to_training(tmp_path, dataset):
    """Those about image 2 are a batch of their own, which has no answer at all."""
    examples = [one._replace(answers=()) if one.image_id == "2" else one for one in dataset.examples]
    trainer = make_trainer(
        tmp_path, VQADataset(examples, seed=0), per_device_train_batch_size=1, num_train_epochs=1, eval_strategy="no"
    )
    trainer.train()
    assert trainer.state.global_step == 7 and trainer.num_examples_trained == 17 - 4 - 1


# Divergence


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


@pytest.mark.parametrize("place", ["loss", "gradients"])
@pytest.mark.parametrize("accumulation", [1, 2])
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


def diverge_on_one_of_two(folder, dataset):
    """The loss of the second process is NaN in its second step."""
    trainer = make_trainer(folder, dataset, max_steps=4, eval_strategy="no", per_device_train_batch_size=1)
    forward = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: (
        forward(*args, **kwargs)
        * (math.nan if trainer.args.process_index == 1 and trainer.state.global_step == 1 else 1)
    )
    try:
        trainer.train()
    except ValueError as error:
        (folder / f"{trainer.args.process_index}.txt").write_text(str(error))


def test_of_two_processes_one_diverges_and_both_stop(tmp_path, dataset):
    launch(Path(__file__).stem, 2, [str(tmp_path), "diverge"])
    messages = [(tmp_path / f"{process}.txt").read_text() for process in (0, 1)]
    assert messages[0] == messages[1]
    assert "diverged at step 2 of 4, its loss is nan" in messages[0]


# Evaluation


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_every_question_gets_one_prediction_in_order(tmp_path, dataset, batch_size):
    """Seven images with 17 questions: gathering by rows would cut the last batch to `7 % batch_size` questions."""
    trainer = make_trainer(tmp_path, dataset, per_device_eval_batch_size=batch_size)
    output = trainer.predict(dataset)
    assert len(output.predictions) == len(dataset.examples) == 17
    model, processor = trainer.model.eval(), trainer.processing_class
    for example, best in zip(dataset.examples, output.predictions, strict=True):
        inputs = processor(images=[example.image], text=[example.question], return_tensors="pt")
        probabilities = model(**inputs).logits.softmax(-1)[0]
        top = probabilities.topk(3)
        assert [one["answer"] for one in best] == [ANSWERS[label] for label in top.indices]
        torch.testing.assert_close(torch.tensor([one["score"] for one in best]), top.values)


def test_evaluation_loss_and_accuracy(tmp_path, dataset):
    trainer = make_trainer(tmp_path, dataset)
    metrics = trainer.evaluate()
    model, processor = trainer.model.eval(), trainer.processing_class
    losses, right = [], 0
    for example in dataset.examples:
        inputs = processor(images=[example.image], text=[example.question], return_tensors="pt")
        scores = model(**inputs).logits[0].log_softmax(-1)
        if example.answers[0] in ANSWERS:  # "green" is no class: no loss, but a wrong answer
            losses.append(-scores[ANSWERS.index(example.answers[0])].item())
            right += int(ANSWERS[scores.argmax()] == example.answers[0])
    assert len(losses) == 16
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 16, rel=1e-5)
    assert metrics["eval_accuracy"] == right / 17
    assert metrics["eval_num_questions"] == 17
    assert metrics["eval_samples_per_second"] > 0


@pytest.mark.parametrize("soft", [False, True])
def test_a_watched_answer_is_kept_with_its_probability(tmp_path, dataset, soft):
    trainer = make_trainer(tmp_path, dataset, soft=soft, top_k=4)
    trainer.model.config.problem_type = "multi_label_classification" if soft else "single_label_classification"
    all_answers = trainer.predict(dataset).predictions
    watching = make_trainer(tmp_path, dataset, trainer.model, soft=soft, top_k=1, watched_answer="no")
    for given, every in zip(watching.predict(dataset).predictions, all_answers, strict=True):
        score = next(answer["score"] for answer in every if answer["answer"] == "no")
        assert given[0] == every[0]
        assert given[-1] == {"answer": "no", "score": pytest.approx(score)}
        assert len(given) == (1 if every[0]["answer"] == "no" else 2)
    # A vocabulary without it has nothing to watch.
    other = make_trainer(tmp_path, dataset, trainer.model, soft=soft, top_k=1, watched_answer="unanswerable")
    assert {len(given) for given in other.predict(dataset).predictions} == {1}


def test_official_metrics_take_the_place_of_ours_and_types_wait_for_the_end(tmp_path, dataset):
    seen = []

    def official(predictions, examples):
        seen.append((len(predictions), examples))
        return {"accuracy": 0.25, "by_family": {"exist": 0.5}}

    recorder = Recorder()
    trainer = make_trainer(
        tmp_path, dataset, official_metrics=official, callbacks=[recorder], num_train_epochs=1, eval_strategy="epoch"
    )
    trainer.train()
    assert [log["eval_accuracy"] for log in recorder.logs if "eval_accuracy" in log] == [0.25]
    assert not [log for log in recorder.logs if "eval_by_family" in log]
    assert trainer.evaluate()["eval_by_family"] == {"exist": 0.5}
    assert seen == [(17, dataset.examples)] * 2


def test_evaluation_without_answers(tmp_path, dataset):
    unanswered = VQADataset([example._replace(answers=()) for example in dataset.examples])
    output = make_trainer(tmp_path, dataset).predict(unanswered)
    assert len(output.predictions) == 17
    assert output.metrics["test_num_questions"] == 0
    assert "test_accuracy" not in output.metrics
    assert "test_loss" not in output.metrics


def test_evaluation_encodes_each_image_once(tmp_path, dataset):
    trainer = make_trainer(tmp_path, dataset)
    encoded = []
    trainer.model.base_model.vision_model.register_forward_hook(
        lambda module, args, kwargs, output: encoded.append(len(kwargs.get("pixel_values", args[0] if args else None))),
        with_kwargs=True,
    )
    trainer.evaluate()
    assert sum(encoded) == 7


@pytest.mark.checklist("10")
def test_each_image_is_decoded_once_an_epoch_however_many_questions_it_has(tmp_path, dataset, opened):
    trainer = make_trainer(tmp_path, dataset, per_device_train_batch_size=3, num_train_epochs=2, eval_strategy="no")
    files = [f"{number}.png" for number in range(7)]
    trainer.train()
    assert sorted(opened) == sorted(2 * files)
    opened.clear()
    trainer.evaluate()
    assert sorted(opened) == files


def test_evaluation_holds_one_batch_at_a_time(tmp_path, dataset):
    trainer = make_trainer(tmp_path, dataset, per_device_eval_batch_size=1)
    collate, batches, alive = trainer.data_collator, [], []

    def watched(items):
        alive.append(sum(batch() is not None for batch in batches))
        inputs = collate(items)
        batches.append(weakref.ref(inputs["pixel_values"]))
        return inputs

    trainer.data_collator = watched
    trainer.evaluate()
    # The one at hand, and the one that the loader reads ahead to know which is the last.
    assert len(batches) == len(COUNTS) and max(alive) <= 2


def test_answers_to_be_drawn_are_those_of_each_question_alone(tmp_path, dataset):
    trainer = make_trainer(tmp_path, dataset)
    model, processor = trainer.model, trainer.processing_class
    shown = answer_examples(model, processor, dataset.examples[:3], top_k=2)
    for one, example in zip(shown, dataset.examples[:3], strict=True):
        assert (one.question, one.answer) == (example.question, majority_answer(example.answers))
        (alone,) = answer_examples(model, processor, [example], top_k=2)
        assert [best["answer"] for best in one.predictions] == [best["answer"] for best in alone.predictions]
        scores = [best["score"] for best in one.predictions]
        assert scores == pytest.approx([best["score"] for best in alone.predictions], abs=1e-5)


# Retrieval

# Captions an image; the third and the fifth share one, so that scores tie.
CAPTIONS = [
    ("a red circle", "circle in the image"),
    ("two blue",),
    ("the square", "a square", "three red and blue"),
    ("no yes",),
    ("the square", "what is there"),
]


@pytest.fixture
def captioned(tmp_path):
    """Five images with nine captions."""
    examples = []
    for number, captions in enumerate(CAPTIONS):
        path = tmp_path / f"{number}.png"
        make_image(["red", "blue", "green", "white", "yellow"][number], size=(31 - number, 23 + 2 * number)).save(path)
        examples.append(CaptionedImage(str(number), str(path), captions))
    return examples


def make_retrieval_trainer(
    tmp_path,
    captioned,
    rerank_k=2,
    captions_per_image=None,
    callbacks=None,
    fold_size=None,
    contrastive_chunk_size=None,
    **arguments,
):
    processor = make_processor()
    return RetrievalTrainer(
        model=make_model(HiViLTForRetrieval, weight_scale=8.0),
        args=make_arguments(tmp_path, **arguments),
        train_dataset=CaptionDataset(captioned, captions_per_image, seed=0),
        eval_dataset=CaptionDataset(captioned),
        data_collator=CaptionCollator(processor),
        processing_class=processor,
        rerank_k=rerank_k,
        fold_size=fold_size,
        contrastive_chunk_size=contrastive_chunk_size,
        callbacks=callbacks,
    )


def all_similarities(trainer, captioned):
    """Cosines of embeddings and fused similarities of all pairs, (5, 9) each, pair by pair from the raw inputs."""
    model, processor = trainer.model.eval(), trainer.processing_class
    cosines, fused = torch.zeros(5, 9), torch.zeros(5, 9)
    captions = [caption for one in captioned for caption in one.captions]
    with torch.no_grad():
        for i, one in enumerate(captioned):
            for t, caption in enumerate(captions):
                inputs = processor(images=[one.image], text=[caption], return_tensors="pt")
                outputs = model(**inputs)
                cosines[i, t] = outputs.image_embeds[0] @ outputs.text_embeds[0]
                texts = model.encode_texts(inputs["input_ids"], inputs["attention_mask"])
                fused[i, t] = model.score(model.encode_images(inputs["pixel_values"]), texts)[0]
    return cosines, fused


@pytest.mark.checklist("10")
@pytest.mark.parametrize("rerank_k", [0, 1, 2, 20])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_rankings_are_those_of_all_pairs_scored_one_by_one(tmp_path, captioned, rerank_k, batch_size):
    trainer = make_retrieval_trainer(tmp_path, captioned, rerank_k, per_device_eval_batch_size=batch_size)
    found = trainer.predict(trainer.eval_dataset)
    cosines, fused = all_similarities(trainer, captioned)
    # The same caption of two images gives the same scores but for the last bits, which must not decide.
    cosines, fused = cosines.double().round(decimals=5), fused.double().round(decimals=5)
    scores = trainer.model.ranking_score(cosines, fused)
    for name, cosine, score in (("image_to_text", cosines, scores), ("text_to_image", cosines.t(), scores.t())):
        for query, ranked in enumerate(found.predictions[name].tolist()):
            first = sorted(range(cosine.shape[1]), key=lambda c, q=query, m=cosine: (-m[q, c], c))
            head = sorted(first[:rerank_k], key=lambda c, q=query, m=score: (-m[q, c], first.index(c)))
            assert ranked == head + first[rerank_k:], (name, query)
    assert "test_fused_mean_recall" in found.metrics or rerank_k == 0


def test_metrics_tell_the_stages_apart(tmp_path, captioned):
    trainer = make_retrieval_trainer(tmp_path, captioned, rerank_k=20)
    metrics = trainer.evaluate()
    cosines, fused = all_similarities(trainer, captioned)
    owner = torch.tensor(trainer.eval_dataset.image_of_caption)
    stages = {"embedding_": cosines, "fused_": fused, "": trainer.model.ranking_score(cosines, fused)}
    for name, scores in stages.items():
        hits = (scores.argmax(1)[:, None] == torch.arange(9)) & (owner == torch.arange(5)[:, None])
        assert metrics[f"eval_{name}image_to_text_recall@1"] == pytest.approx(hits.any(1).float().mean().item())
        hits = scores.argmax(0) == owner
        assert metrics[f"eval_{name}text_to_image_recall@1"] == pytest.approx(hits.float().mean().item())
        assert metrics[f"eval_{name}text_to_image_recall@5"] == 1
    assert metrics["eval_num_images"] == 5 and metrics["eval_num_captions"] == 9
    assert metrics["eval_num_fused_pairs"] == 45
    assert metrics["eval_loss"] > 0


@pytest.mark.checklist("10")
@pytest.mark.parametrize("fold_size", [None, 2])
def test_evaluation_encodes_images_and_captions_once_and_fuses_shortlists_only(tmp_path, captioned, fold_size):
    trainer = make_retrieval_trainer(tmp_path, captioned, rerank_k=2, fold_size=fold_size)
    counts = {"vision_model": 0, "text_model": 0}
    for name in counts:
        getattr(trainer.model.base_model, name).register_forward_hook(
            lambda module, args, kwargs, output, name=name: counts.update(
                {name: counts[name] + len(output.last_hidden_state)}
            ),
            with_kwargs=True,
        )
    metrics = trainer.evaluate()
    assert counts == {"vision_model": 5, "text_model": 9}
    # Folds of 2 images with 3 and 4 captions fuse at most all their pairs.
    assert 9 <= metrics["eval_num_fused_pairs"] <= 2 * 5 + 2 * 9 + (0 if fold_size is None else 2 * 3 + 2 * 4)


@pytest.mark.checklist("10")
def test_each_image_is_decoded_once_an_epoch_however_many_captions_it_has(tmp_path, captioned, opened):
    trainer = make_retrieval_trainer(
        tmp_path, captioned, per_device_train_batch_size=2, num_train_epochs=2, eval_strategy="no"
    )
    files = [f"{number}.png" for number in range(5)]
    trainer.train()
    assert sorted(opened) == sorted(2 * files)
    opened.clear()
    trainer.evaluate()  # with re-ranking
    assert sorted(opened) == files


@pytest.mark.parametrize("rerank_k", [0, 1, 20])
def test_folds_are_evaluated_each_by_itself(tmp_path, captioned, rerank_k):
    """Two folds of two images; the fifth image is in none."""
    trainer = make_retrieval_trainer(tmp_path, captioned, rerank_k, fold_size=2, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    alone = make_retrieval_trainer(tmp_path, captioned, rerank_k)
    folds = [alone.evaluate(CaptionDataset(captioned[start : start + 2])) for start in (0, 2)]
    whole = alone.evaluate()
    recalls = [name for name in whole if "recall" in name]
    assert len(recalls) == (14 if rerank_k == 0 else 21)
    for name in recalls:
        assert metrics[name] == whole[name]
        mean = (folds[0][name] + folds[1][name]) / 2
        assert metrics[name.replace("eval_", "eval_fold_")] == pytest.approx(mean), name
    assert metrics["eval_fold_text_to_image_recall@1"] != metrics["eval_text_to_image_recall@1"]
    assert metrics["eval_num_folds"] == 2 and metrics["eval_num_images"] == 5
    pairs = [one["eval_num_fused_pairs"] for one in (whole, *folds)]
    assert metrics["eval_num_fused_pairs"] == sum(pairs)
    assert {name for name in metrics if name not in whole} == {
        "eval_num_folds",
        "eval_fold_size",
        *(name.replace("eval_", "eval_fold_") for name in recalls),
    }


def test_folds_need_two_and_are_left_out_while_training(tmp_path, captioned):
    recorder = Recorder()
    trainer = make_retrieval_trainer(
        tmp_path, captioned, callbacks=[recorder], fold_size=2, max_steps=1, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    (found,) = [log for log in recorder.logs if "eval_mean_recall" in log]
    assert not [name for name in found if "fold" in name]
    assert "eval_fold_mean_recall" in trainer.evaluate()
    trainer.fold_size = 3
    assert not [name for name in trainer.evaluate() if "fold" in name]
    with pytest.raises(ValueError, match="fold_size: expected at least 1 image, or None for no folds, got 0"):
        make_retrieval_trainer(tmp_path, captioned, fold_size=0)


def evaluate_in_folds(tmp_path, captioned):
    """Metrics with folds of one image, some of which are one pair, and of two."""
    trainers = [make_retrieval_trainer(tmp_path, captioned, fold_size=fold_size) for fold_size in (1, 2)]
    return [trainer.evaluate() for trainer in trainers]


def test_a_plain_trainer_trains_on_captions_and_is_refused_to_evaluate_on_them(tmp_path, captioned):
    """It would cut captions without a word."""
    ours = make_retrieval_trainer(tmp_path, captioned)
    arguments = make_arguments(tmp_path, max_steps=1, eval_strategy="no")
    plain = Trainer(ours.model, arguments, ours.data_collator, ours.train_dataset, ours.eval_dataset)
    assert plain.train().training_loss > 0
    for evaluate in (plain.evaluate, lambda: plain.predict(ours.eval_dataset)):
        with pytest.raises(ValueError, match="`hivilt.trainers.RetrievalTrainer`"):
            evaluate()


def test_folds_on_two_processes(tmp_path, captioned):
    launch(Path(__file__).stem, 2, [str(tmp_path)])
    together = json.loads((tmp_path / "metrics.json").read_text())
    for found, expected in zip(together, evaluate_in_folds(tmp_path, captioned), strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if "recall" in name or "num_" in name:
                assert found[name] == pytest.approx(value), name


def test_training_logs_both_losses_and_counts_captions(tmp_path, captioned):
    recorder = Recorder()
    trainer = make_retrieval_trainer(
        tmp_path, captioned, callbacks=[recorder], eval_strategy="no", max_steps=2, per_device_train_batch_size=5
    )
    trainer.train()
    assert trainer.num_examples_trained == 18
    for entry in recorder.logs[:2]:
        assert entry["loss"] == pytest.approx(entry["contrastive_loss"] + entry["auxiliary_loss"], abs=2e-4)


def test_chunks_train_to_the_same_weights(tmp_path, captioned):
    trained = []
    for chunk_size in (None, 2):
        trainer = make_retrieval_trainer(
            tmp_path,
            captioned,
            eval_strategy="no",
            max_steps=1,
            per_device_train_batch_size=5,
            optim="sgd",
            learning_rate=1e-3,
        )
        # Units to drop and negatives to match are drawn, and chunks draw in another order.
        trainer.model.config.auxiliary_loss_weight = 0.0
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.model.config.text_config.attention_probs_dropout_prob = 0.0
        trainer.contrastive_chunk_size = chunk_size
        trainer.train()
        trained.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    for name, parameter in trained[0].items():
        torch.testing.assert_close(trained[1][name], parameter, atol=1e-5, rtol=1e-5)


def test_temperatures_are_not_sharded_and_chunks_refused(tmp_path, captioned, monkeypatch):
    """With a stand-in for accelerate's plugin; tests/runs/test_recipes.py trains with the real one."""
    plugin = SimpleNamespace(fsdp_version=2, activation_checkpointing=False, state_dict_type="FULL_STATE_DICT")
    monkeypatch.setattr(AcceleratorState, "fsdp_plugin", plugin, raising=False)
    trainer = make_retrieval_trainer(tmp_path, captioned)
    (whole,) = plugin.ignored_modules
    temperatures = {trainer.model.logit_scale, trainer.model.matching_logit_scale}
    assert set(whole.parameters()) == temperatures
    with pytest.raises(
        ValueError, match="contrastive_chunk_size: got 2, expected None under FSDP.*gradient_checkpoint"
    ):
        make_retrieval_trainer(tmp_path, captioned, contrastive_chunk_size=2)


def test_every_epoch_draws_other_captions(tmp_path, captioned):
    trainer = make_retrieval_trainer(
        tmp_path,
        captioned,
        captions_per_image=1,
        eval_strategy="no",
        num_train_epochs=12,
        per_device_train_batch_size=5,
    )
    drawn, collate = [], trainer.data_collator

    def recording(items):
        drawn.append(tuple(sorted(place for item in items for place in item["caption_index"])))
        return collate(items)

    trainer.data_collator = recording
    trainer.train()
    assert len(drawn) == 12 and all(len(places) == 5 for places in drawn)
    assert len(set(drawn)) > 4
    assert set().union(*drawn) == set(range(9))


def main():
    folder = Path(sys.argv[1])
    if sys.argv[2:] == ["diverge"]:
        examples = [
            VQAExample(str(number), str(number), str(folder / f"{number}.png"), "what color", ("red",))
            for number in range(len(COUNTS))
        ]
        return diverge_on_one_of_two(folder, VQADataset(examples))
    metrics = evaluate_in_folds(
        folder, [CaptionedImage(str(n), str(folder / f"{n}.png"), captions) for n, captions in enumerate(CAPTIONS)]
    )
    if os.environ["RANK"] == "0":
        (folder / "metrics.json").write_text(json.dumps(metrics))


if __name__ == "__main__":  # one of several processes of a test
    run_command(main)
