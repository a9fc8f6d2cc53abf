"""What counts questions where Trainer counts rows."""

import weakref

import pytest
import torch
from PIL import Image
from trainers import ANSWERS, COUNTS, Recorder, make_trainer

from hivilt.data.vqa import VQADataset
from hivilt.evaluation.vqa import majority_answer
from hivilt.losses_hivilt import classification_loss
from hivilt.tasks.question_answering import drawn, question_losses


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


def test_answers_to_be_drawn_are_the_three_best_predictions(tmp_path, dataset):
    predictions = make_trainer(tmp_path, dataset, top_k=4).predict(dataset).predictions
    for example, best in zip(dataset.examples, predictions, strict=True):
        image, *texts = drawn(example, best)
        assert texts == [example.question, best[:3], majority_answer(example.answers)]
        assert image.size == Image.open(example.image).size
    assert drawn(dataset.examples[0]._replace(answers=()), predictions[0])[-1] is None
