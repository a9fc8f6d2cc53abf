"""What finds boxes for each expression, and measures expressions where Trainer counts images."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from trainers import (
    MEANT,
    assert_a_plain_trainer_is_refused_to_evaluate,
    assert_a_step_is_one_mean,
    make_grounding_trainer,
)

from hivilt.data.grounding import GroundingDataset
from hivilt.data.tables import open_image
from hivilt.evaluation.grounding import grounding_scores, phrase_recall
from hivilt.tasks.grounding import prediction_row, references_of, summary_of

COUNTS = {"num_expressions", "num_single_target", "num_multi_target", "num_no_target"}


def alone(trainer, example, place):
    """What the model gives of an expression by itself, with its loss."""
    inputs = trainer.processing_class(
        images=[open_image(example.image)], text=[example.expressions[place]], return_tensors="pt"
    )
    boxes = [
        [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
        for left, top, right, bottom in example.boxes[place]
    ]
    with torch.no_grad():
        return trainer.model.eval()(**inputs, labels=[{"boxes": torch.tensor(boxes).view(-1, 4)}])


def each_alone(trainer, examples):
    return [alone(trainer, example, place) for example in examples for place in range(len(example.expressions))]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_expression_gets_its_boxes_in_order(tmp_path, grounded, batch_size):
    trainer = make_grounding_trainer(tmp_path, grounded, per_device_eval_batch_size=batch_size)
    output = trainer.predict(trainer.eval_dataset)
    apart = each_alone(trainer, grounded)
    assert len(output.predictions) == len(apart) == 11
    for found, expected in zip(output.predictions, apart, strict=True):
        (expected,) = trainer.processing_class.post_process_grounding(expected, threshold=0.0)
        torch.testing.assert_close(torch.tensor(found["boxes"]), expected["boxes"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(torch.tensor(found["scores"]), expected["scores"], atol=1e-5, rtol=1e-4)
    assert len({found["scores"][0] for found in output.predictions}) == 11

    metrics = {name.removeprefix("test_"): value for name, value in output.metrics.items()}
    assert metrics["loss"] == pytest.approx(sum(one.loss.item() for one in apart) / 11, rel=1e-5)
    expected = grounding_scores(output.predictions, references_of(grounded), threshold=0.1)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert trainer.metric_names(trainer.eval_dataset) | COUNTS == {"loss", *expected}


@pytest.mark.checklist("5")
def test_the_loss_of_a_step_is_the_mean_over_its_expressions_however_it_is_accumulated(tmp_path, grounded):
    make, mean = (
        partial(make_grounding_trainer, tmp_path, grounded[:4]),
        lambda trainer: sum(one.loss.item() for one in each_alone(trainer, grounded[:4])) / 9,
    )
    assert_a_step_is_one_mean(make, mean, 9)


@pytest.mark.checklist("10")
def test_evaluation_encodes_each_image_once_for_all_its_expressions(tmp_path, grounded):
    trainer = make_grounding_trainer(tmp_path, grounded)
    encoded = []
    trainer.model.base_model.vision_model.register_forward_hook(
        lambda module, args, output: encoded.append(len(output.last_hidden_state))
    )
    trainer.evaluate()
    assert encoded == [2, 2, 1]


def test_a_plain_trainer_trains_on_expressions_and_is_refused_to_evaluate_on_them(tmp_path, grounded):
    ours = make_grounding_trainer(tmp_path, grounded)
    assert_a_plain_trainer_is_refused_to_evaluate(tmp_path, ours, "`hivilt.tasks.grounding.GroundingTrainer`")


def test_an_epoch_trains_the_expressions_that_are_drawn(tmp_path, grounded):
    usual = {"eval_strategy": "no", "num_train_epochs": 1, "per_device_train_batch_size": 5}
    trainer = make_grounding_trainer(tmp_path, grounded, expressions_per_image=2, **usual)
    trainer.train()
    assert trainer.num_examples_trained == sum(min(len(said), 2) for said in MEANT)


def test_expressions_whose_boxes_are_not_known_are_looked_for_and_not_measured(tmp_path, grounded):
    trainer = make_grounding_trainer(tmp_path, grounded)
    whole = trainer.predict(trainer.eval_dataset)
    bare = [replace(one, boxes=(None,) * len(one.boxes)) for one in grounded]
    output = trainer.predict(GroundingDataset(bare))
    assert output.predictions == whole.predictions
    assert not {"test_loss", "test_num_expressions", "test_accuracy@0.5"} & output.metrics.keys()

    some = trainer.predict(GroundingDataset([*bare[:2], *grounded[2:]]))
    assert some.predictions == whole.predictions and "test_loss" not in some.metrics
    expected = grounding_scores(whole.predictions[4:], references_of(grounded[2:]), threshold=0.1)
    assert {name: some.metrics[f"test_{name}"] for name in expected} == pytest.approx(expected)


def test_what_is_kept_follows_the_threshold_and_phrases_are_measured_where_asked(tmp_path, grounded):
    kinds = [replace(one, kinds=("people", *("other",) * (len(one.boxes) - 1))) for one in grounded]
    rates = []
    for threshold in (0.0, 1.0):
        trainer = make_grounding_trainer(tmp_path, kinds, threshold=threshold, measures_phrases=True)
        output = trainer.predict(trainer.eval_dataset)
        rates.append([output.metrics[f"test_{name}"] for name in ("target_accuracy", "no_target_accuracy")])
    assert rates == [[1, 0], [0, 1]]
    labels = [kind for one in kinds for kind in one.kinds]
    expected = phrase_recall(output.predictions, references_of(kinds), kinds=labels)
    assert {name: output.metrics[f"test_{name}"] for name in ("recall@1", "recall@10", "num_phrases")} == {
        name: expected[name] for name in ("recall@1", "recall@10", "num_phrases")
    }
    people = output.metrics["test_by_kind"]["people"]
    assert people["recall@5"] == expected["by_kind"]["people"]["recall@5"] and people["num_expressions"] == 5


def test_boxes_are_not_smoothed(tmp_path, grounded):
    with pytest.raises(ValueError, match="label_smoothing_factor: got 0.1, but boxes"):
        make_grounding_trainer(tmp_path, grounded, label_smoothing_factor=0.1)


def test_a_row_of_predictions(grounded):
    found = {"boxes": [[0.5, 0.0, 1.0, 0.5]] * 12, "scores": [0.9] * 11 + [0.2]}
    row = prediction_row(grounded[0], 1, found, (10, 20), threshold=0.5)
    assert row == {
        "image": "0",
        "expression": "two circle",
        "boxes": [[5.0, 0.0, 10.0, 10.0]] * 11,  # all that are kept
        "scores": [0.9] * 11,
        "true_boxes": [pytest.approx([1, 4, 5, 12]), pytest.approx([5.5, 6, 9.5, 18])],
    }
    assert len(prediction_row(grounded[0], 1, found, (10, 20), threshold=0.95)["boxes"]) == 10
    bare = replace(grounded[0], boxes=(None,) * 3, kinds=("a", "b", "c"))
    row = prediction_row(bare, 1, found, (10, 20), threshold=0.5)
    assert row["true_boxes"] is None and row["kind"] == "b"


def test_a_summary_tells_what_was_measured():
    measured = {"num_expressions": 1234, "accuracy@0.5": 0.5, "mean_iou": 0.25, "accuracy@0.5_of_mean_box": 0.125}
    measured["by_kind"] = {"none": {"num_expressions": 4, "no_target_accuracy": 1.0}}
    measured |= {"no_target_accuracy": 1.0}
    assert summary_of(measured, "test", "accuracy@0.5").splitlines() == [
        "test: Acc@0.5 0.5000, mean IoU 0.2500, N-acc 1.0000 on 1,234 expressions",
        "  always the mean of all training boxes: Acc@0.5 0.1250",
        "  none: N-acc 1.0000 on 4",
    ]
    assert summary_of({"seconds": 1.0}, "test", "accuracy@0.5") == ""
