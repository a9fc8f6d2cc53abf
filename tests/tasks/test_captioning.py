"""What writes a caption for each image, and measures tokens where Trainer counts rows."""

import json
from functools import partial

import pytest
import torch
from trainers import CAPTIONS, PROMPT, Recorder, assert_a_step_is_one_mean, make_captioning_trainer, note_rewards

from hivilt.data.captions import CaptionDataset
from hivilt.data.tables import open_image
from hivilt.evaluation.captioning import caption_scores, cider_d, document_frequencies
from hivilt.tasks.captioning import prediction_row
from processes import launch


def alone(trainer, example):
    """What the processor makes of an image by itself."""
    return trainer.processing_class(images=[open_image(example.image)], text=[PROMPT], return_tensors="pt")


def token_losses(trainer, example, caption, smoothing=0.0):
    """The losses of a caption's tokens, one by one and in float64."""
    model, processor = trainer.model.eval(), trainer.processing_class
    labels = processor.tokenize_targets([caption])
    with torch.no_grad():
        (scores,) = model(**alone(trainer, example), labels=labels).logits.double().log_softmax(-1)
    return [
        -(1 - smoothing) * row[token].item() - smoothing * row.mean().item()
        for row, token in zip(scores, labels[0].tolist(), strict=True)
    ]


def mean_over_tokens(trainer, examples, smoothing=0.0):
    losses = [token_losses(trainer, one, caption, smoothing) for one in examples for caption in one.captions]
    return sum(map(sum, losses)) / sum(map(len, losses))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_image_gets_one_caption_in_order(tmp_path, captioned, batch_size):
    trainer = make_captioning_trainer(tmp_path, captioned, per_device_eval_batch_size=batch_size)
    output = trainer.predict(trainer.eval_dataset)
    model, processor = trainer.model, trainer.processing_class
    written = [model.generate(**alone(trainer, one))[0] for one in captioned]
    expected = [processor.decode(tokens, skip_special_tokens=True).strip() for tokens in written]
    assert output.predictions == expected
    assert len(set(expected)) > 1 and all(expected)

    metrics = output.metrics
    assert metrics["test_loss"] == pytest.approx(mean_over_tokens(trainer, captioned), rel=1e-5)
    for name, score in caption_scores(expected, CAPTIONS).items():
        assert metrics[f"test_{name}"] == pytest.approx(score)
    assert trainer.metric_names(trainer.eval_dataset) | {"num_images"} == {
        name.removeprefix("test_") for name in metrics if "per_second" not in name and "runtime" not in name
    } - {"model_preparation_time"}


@pytest.mark.checklist("5")
def test_the_loss_of_a_step_is_the_mean_over_its_tokens_however_it_is_accumulated(tmp_path, captioned):
    """Images have captions of 2 to 5 tokens, and one to three of them, so that a mean over batches is another number."""
    make, mean = (
        partial(make_captioning_trainer, tmp_path, captioned[:4]),
        lambda trainer: mean_over_tokens(trainer, captioned[:4]),
    )
    assert_a_step_is_one_mean(make, mean, 7)


@pytest.mark.checklist("10")
def test_evaluation_encodes_each_image_once_for_its_caption_and_all_losses(tmp_path, captioned):
    trainer = make_captioning_trainer(tmp_path, captioned, num_beams=3)
    encoded = []
    trainer.model.base_model.vision_model.register_forward_hook(
        lambda module, args, output: encoded.append(len(output.last_hidden_state))
    )
    metrics = trainer.evaluate()
    assert encoded == [2, 2, 1] and metrics["eval_loss"] > 0


@pytest.mark.parametrize(("captions_per_image", "count"), [(None, 9), (1, 5), (2, 8)])
def test_an_epoch_trains_the_captions_that_are_drawn(tmp_path, captioned, captions_per_image, count):
    usual = {"eval_strategy": "no", "num_train_epochs": 1, "per_device_train_batch_size": 5}
    trainer = make_captioning_trainer(tmp_path, captioned, captions_per_image, **usual)
    trainer.train()
    assert trainer.num_examples_trained == count


def test_labels_are_smoothed_in_training_alone(tmp_path, captioned):
    recorder = Recorder()
    usual = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "per_device_train_batch_size": 5}
    usual |= {"learning_rate": 0.0, "per_device_eval_batch_size": 1}
    trainer = make_captioning_trainer(tmp_path, captioned, callbacks=[recorder], label_smoothing_factor=0.9, **usual)
    trainer.train()
    (trained,) = [log["loss"] for log in recorder.logs if "loss" in log]
    assert trained == pytest.approx(mean_over_tokens(trainer, captioned, 0.9), rel=1e-4)
    (evaluated,) = [log["eval_loss"] for log in recorder.logs if "eval_loss" in log]
    assert evaluated == pytest.approx(mean_over_tokens(trainer, captioned), rel=1e-4)
    assert abs(trained - evaluated) > 0.005


def test_training_reads_no_more_of_a_caption_than_the_model_may_write(tmp_path, captioned):
    recorder = Recorder()
    usual = {"eval_strategy": "no", "max_steps": 1, "per_device_train_batch_size": 5, "learning_rate": 0.0}
    trainer = make_captioning_trainer(tmp_path, captioned, callbacks=[recorder], **usual)
    trainer.model.generation_config.max_new_tokens = 2
    trainer.train()
    losses = [token_losses(trainer, one, caption)[:2] for one in captioned for caption in one.captions]
    assert recorder.logs[0]["loss"] == pytest.approx(sum(map(sum, losses)) / sum(map(len, losses)), rel=1e-4)


def test_samples_are_rewarded_beside_each_other(tmp_path, captioned):
    """The formula, in float64, for one step's samples, of which some end early."""
    trainer = make_captioning_trainer(tmp_path, captioned, self_critical=True)
    model, processor = trainer.model, trainer.processing_class
    frequencies = document_frequencies(CAPTIONS)
    batch = trainer.data_collator([trainer.train_dataset[place] for place in (0, 2, 3)])
    torch.manual_seed(0)
    images = {"pixel_values": batch["pixel_values"], "input_ids": batch["input_ids"]}
    images["attention_mask"] = batch["attention_mask"]
    samples = model.eval().generate(**images, do_sample=True, num_beams=1, top_k=0, num_return_sequences=5)
    texts = processor.batch_decode(samples, skip_special_tokens=True)
    assert len({(row == processor.tokenizer.sep_token_id).sum().item() for row in samples}) > 1 and len(set(texts)) > 5

    expected = 0.0
    for image, place in enumerate((0, 2, 3)):
        rows = range(5 * image, 5 * image + 5)
        rewards = [cider_d([texts[row]], [CAPTIONS[place]], frequencies)[0] for row in rows]
        for row, reward in zip(rows, rewards, strict=True):
            tokens = samples[row, 1:].tolist()
            end = (
                tokens.index(processor.tokenizer.sep_token_id) + 1 if processor.tokenizer.sep_token_id in tokens else 99
            )
            labels = torch.tensor([tokens[:end]])
            one = {name: value[image : image + 1] for name, value in images.items()}
            with torch.no_grad():
                (scores,) = model(**one, labels=labels).logits.double().log_softmax(-1)
            log_probability = scores[range(len(labels[0])), labels[0]].sum().item()
            others = (sum(rewards) - reward) / 4
            expected -= (reward - others) * log_probability / 15
    torch.manual_seed(0)
    assert trainer.compute_loss(model, batch).item() == pytest.approx(expected, rel=1e-4)
    assert abs(expected) > 1e-3


def test_the_log_has_the_mean_reward_of_all_samples_since_the_last(tmp_path, captioned):
    usual = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 5, "logging_steps": 3}
    trainer = make_captioning_trainer(tmp_path, captioned, self_critical=True, per_device_train_batch_size=2, **usual)
    rewards = note_rewards(trainer)
    trainer.train()
    # Batches of two, two and one image in an epoch; five samples of each image.
    assert len(rewards) == 45 and max(rewards) > min(rewards)
    logged = [(log["step"], log["reward"]) for log in trainer.state.log_history if "reward" in log]
    assert logged == [(3, pytest.approx(sum(rewards[:25]) / 25))]
    assert {"loss", "reward"} <= trainer.state.log_history[2].keys()


@pytest.mark.slow  # one process holds the mean
def test_the_log_has_the_mean_reward_of_both_processes(tmp_path, captioned):
    launch("trainers", 2, [str(tmp_path), "reward"])
    (first, (logged,)), (second, _) = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (0, 1))
    assert len(first) == len(second) == 10 and first != second
    assert logged == pytest.approx(sum(first + second) / 20)


def test_images_without_captions_are_captioned_and_not_measured(tmp_path, captioned):
    trainer = make_captioning_trainer(tmp_path, captioned, per_device_eval_batch_size=1)
    measured = trainer.predict(trainer.eval_dataset)

    bare = [one._replace(captions=()) for one in captioned]
    output = trainer.predict(CaptionDataset(bare, prompt=PROMPT))
    assert output.predictions == measured.predictions
    assert not {"test_loss", "test_cider_d", "test_distinct"} & output.metrics.keys()

    # Where some have captions these are measured; with batches of one others have none at all.
    some = [captioned[0], *bare[1:4], captioned[4]]
    for batch_size in (1, 5):
        other = make_captioning_trainer(tmp_path, some, train=captioned, per_device_eval_batch_size=batch_size)
        found = other.predict(other.eval_dataset)
        assert found.predictions == measured.predictions
        assert found.metrics["test_num_images"] == 2
        assert found.metrics["test_loss"] == pytest.approx(mean_over_tokens(other, [some[0], some[4]]), rel=1e-5)


def test_a_row_of_predictions(captioned):
    assert prediction_row(captioned[0], "red") == {
        "image": "0",
        "caption": "red",
        "captions": ["a red circle", "circle in the image"],
    }
