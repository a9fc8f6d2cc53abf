"""What judges each statement, and measures statements where Trainer counts items."""

from functools import partial

import pytest
import torch
from PIL import Image
from trainers import (
    SAID,
    assert_a_plain_trainer_is_refused_to_evaluate,
    assert_a_step_is_one_mean,
    make_reasoning_trainer,
)

from hivilt.data.reasoning import ReasoningDataset, labels_by_spelling
from hivilt.data.tables import open_image
from hivilt.evaluation.reasoning import statement_scores
from hivilt.tasks.reasoning import drawn, prediction_row, side_by_side, summary_of
from tiny import make_image

TRUTH = labels_by_spelling({"False": 0, "True": 1})


def alone(trainer, statement):
    """What the model gives of a statement by itself, with its loss."""
    images = [[open_image(image) for image in statement.images]]
    inputs = trainer.processing_class(images=images, text=[statement.sentence], return_tensors="pt")
    label = {"True": 1, "yes": 1, "false": 0}[statement.label]
    with torch.no_grad():
        return trainer.model.eval()(**inputs, labels=torch.tensor([label]))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_statement_gets_its_labels_in_order(tmp_path, stated, batch_size):
    trainer = make_reasoning_trainer(tmp_path, stated, per_device_eval_batch_size=batch_size)
    output = trainer.predict(trainer.eval_dataset)
    apart = [alone(trainer, statement) for statement in stated]
    for found, expected in zip(output.predictions, apart, strict=True):
        probabilities = dict(zip(("False", "True"), expected.logits[0].softmax(dim=-1).tolist(), strict=True))
        assert {best["answer"]: best["score"] for best in found} == pytest.approx(probabilities, abs=1e-5)
        assert found[0]["score"] >= found[1]["score"]
    assert len({found[0]["score"] for found in output.predictions}) == 11

    metrics = {name.removeprefix("test_"): value for name, value in output.metrics.items()}
    assert metrics["loss"] == pytest.approx(sum(one.loss.item() for one in apart) / 11, rel=1e-5)
    given = [found[0]["answer"] for found in output.predictions]
    fields = {name: [getattr(one, name[:-1]) for one in stated] for name in ("labels", "groups", "kinds")}
    expected = statement_scores(given, fields["labels"], fields["groups"], fields["kinds"])
    assert {name: metrics[name] for name in expected} == expected and metrics["num_groups"] == 2
    assert trainer.metric_names(trainer.eval_dataset) == {"loss", "accuracy", "consistency"}


@pytest.mark.checklist("5")
def test_the_loss_of_a_step_is_the_mean_over_its_statements_however_it_is_accumulated(tmp_path, stated):
    make = partial(make_reasoning_trainer, tmp_path, stated)
    mean = lambda trainer: sum(alone(trainer, statement).loss.item() for statement in stated) / 11
    assert_a_step_is_one_mean(make, mean, 11)


@pytest.mark.checklist("10")
def test_evaluation_encodes_each_image_once_for_all_statements(tmp_path, stated):
    trainer = make_reasoning_trainer(tmp_path, stated)
    encoded = []
    trainer.model.base_model.vision_model.register_forward_hook(
        lambda module, args, output: encoded.append(len(output.last_hidden_state))
    )
    trainer.evaluate()
    assert encoded == [4, 4] and sum(map(len, SAID)) == 11


@pytest.mark.parametrize("schedule", ["cosine", "constant_with_warmup"])
def test_the_learning_rate_warms_up_once_more_when_other_statements_begin(tmp_path, stated, schedule, caplog):
    how = {"num_train_epochs": 6, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    how |= {"warmup_steps": 3, "lr_scheduler_type": schedule}
    rates = {}
    for first_epochs in (0, 2):
        trainer = make_reasoning_trainer(tmp_path, stated, first_epochs=first_epochs, logging_steps=1, **how)
        trainer.train()
        logs = trainer.state.log_history
        rates[first_epochs] = [log["learning_rate"] for log in logs if "learning_rate" in log]
    # Four items, two a step: two epochs are four steps.
    assert len(rates[0]) == len(rates[2]) == 12
    how = {"per_device_train_batch_size": 3, "dataloader_drop_last": True, "num_train_epochs": 6, "warmup_steps": 3}
    trainer = make_reasoning_trainer(tmp_path, stated, first_epochs=2, **how)
    scheduler = trainer.create_scheduler(6, trainer.create_optimizer())
    assert [rate(2) == 0 for rate in scheduler.lr_lambdas] == [True, True]  # one batch an epoch
    # Without a warm-up the second is none, either, and a plateau has none.
    how |= {"warmup_steps": 0}
    trainer = make_reasoning_trainer(tmp_path, stated, first_epochs=2, **how)
    scheduler = trainer.create_scheduler(6, trainer.create_optimizer())
    assert all(rate(2) > 0 for rate in scheduler.lr_lambdas)
    trainer = make_reasoning_trainer(tmp_path, stated, first_epochs=2, **how, lr_scheduler_type="reduce_lr_on_plateau")
    trainer.create_scheduler(6, trainer.create_optimizer())
    assert "the learning rate does not warm up once more" in caplog.text
    expected = [rate * min(1, (step - 4) / 3) if step >= 4 else rate for step, rate in enumerate(rates[0])]
    assert rates[2] == pytest.approx(expected) and rates[2][4] == 0 < rates[0][4]


def test_other_statements_begin_after_the_first_epochs_of_the_batches_that_fit_in_memory(tmp_path, stated):
    """`auto_find_batch_size` takes fewer items a step, so that an epoch has more steps."""
    how = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 1}
    how |= {"auto_find_batch_size": True, "warmup_steps": 1}
    trainer = make_reasoning_trainer(tmp_path, stated, first_epochs=1, logging_steps=1, **how)
    collate = trainer.data_collator

    def fits(items):
        if len(items) > 1:
            raise RuntimeError("CUDA out of memory.")
        return collate(items)

    trainer.data_collator = fits
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert len(rates) == 12 and [step for step, rate in enumerate(rates) if rate == 0] == [0, 4]


def test_a_plain_trainer_trains_on_statements_and_is_refused_to_evaluate_on_them(tmp_path, stated):
    ours = make_reasoning_trainer(tmp_path, stated)
    assert_a_plain_trainer_is_refused_to_evaluate(tmp_path, ours, "`hivilt.tasks.reasoning.ReasoningTrainer`")


def test_statements_without_a_label_are_judged_and_not_measured(tmp_path, stated):
    trainer = make_reasoning_trainer(tmp_path, stated)
    whole = trainer.predict(trainer.eval_dataset)
    output = trainer.predict(ReasoningDataset([one._replace(label=None) for one in stated]))
    assert output.predictions == whole.predictions
    assert not {"test_loss", "test_accuracy", "test_num_statements"} & output.metrics.keys()
    some = trainer.predict(ReasoningDataset([stated[0]._replace(label=None), *stated[1:]]))
    assert some.predictions == whole.predictions and some.metrics["test_num_statements"] == 10


def test_calibration_divides_the_scores_of_the_last_layer(tmp_path, stated):
    trainer = make_reasoning_trainer(tmp_path, stated)
    before = alone(trainer, stated[0]).logits
    trainer.calibrate()
    torch.testing.assert_close(alone(trainer, stated[0]).logits, before / trainer.calibration["temperature"])


def test_a_row_of_predictions(stated):
    best = [{"answer": "True", "score": 0.75}, {"answer": "False", "score": 0.25}]
    row = prediction_row(TRUTH, stated[4], best)
    assert row == {
        "statement_id": "0-1",
        "images": ["1", "0"],
        "sentence": "two circle",
        "kind": "b",
        "group": "0",
        "label": "yes",
        "predictions": best,
        "correct": True,
    }
    assert prediction_row(TRUTH, stated[4]._replace(label="no"), best)["correct"] is False
    letters = labels_by_spelling({"F": 0, "N": 1, "T": 2})
    neutral = prediction_row(letters, stated[4]._replace(label="N"), [{"answer": "F", "score": 1.0}])
    assert neutral["correct"] is False
    bare = prediction_row(TRUTH, stated[4]._replace(label=None, kind=None, group=None), best)
    assert bare["label"] is bare["correct"] is None and not {"kind", "group"} & bare.keys()


def test_images_of_a_statement_are_drawn_in_order_side_by_side(stated):
    row = side_by_side([make_image("red", (20, 10)), make_image("blue", (30, 20)), make_image("green", (2, 40))])
    assert row.size == (20 + 1 + 15 + 1 + 1, 10)
    pixels = [row.getpixel((x, 5)) for x in (10, 20, 28, 36, 37)]
    assert pixels[1] == pixels[3] == (255, 255, 255)
    assert [max(range(3), key=pixels[x].__getitem__) for x in (0, 2, 4)] == [0, 2, 1]

    cell = drawn(TRUTH, stated[4], [{"answer": "True", "score": 0.75}])
    assert (cell.question, cell.answer) == ("two circle", "True")  # which "yes" is another spelling of
    assert isinstance(cell.image, Image.Image)
    # However large and wide images are, what is drawn is not.
    assert side_by_side([make_image("red", (512, 512)), make_image("blue", (4000, 2))]).size == (256 + 13 + 768, 256)
    assert drawn(TRUTH, stated[4], [{"answer": "False", "score": 0.75}]).answer == "yes"


def test_a_summary_tells_what_was_measured():
    measured = {"num_statements": 1234, "accuracy": 0.5, "consistency": 0.25}
    measured |= {"accuracy_of_majority_label": 0.5, "majority_label": "True"}
    measured["by_kind"] = {"one": {"num_statements": 4, "accuracy": 1.0}}
    assert summary_of(measured, "test", "accuracy").splitlines() == [
        "test: accuracy 0.5000, consistency 0.2500 on 1,234 statements",
        "  always 'True', the most frequent training label: accuracy 0.5000",
        "  one: accuracy 1.0000 on 4",
    ]
