"""Answers in words: their probabilities, their loss, and the metrics of question answering."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from trainers import make_open_ended_trainer

from hivilt.data.tables import open_image
from hivilt.data.vqa import VQADataset
from hivilt.evaluation.vqa import vqa_metrics
from hivilt.tasks.open_ended_answering import spelled


def log_probabilities(trainer, example, labels):
    """Of the tokens `labels` of an answer, one by one and in float64."""
    model, processor = trainer.model.eval(), trainer.processing_class
    inputs = processor(images=[open_image(example.image)], text=[example.question], return_tensors="pt")
    with torch.no_grad():
        (scores,) = model(**inputs, labels=labels).logits.double().log_softmax(-1)
    return [row[token].item() for row, token in zip(scores, labels[0].tolist(), strict=True)]


@given(st.lists(st.sampled_from(["red", "7", "30"]), min_size=1, max_size=5), st.sampled_from("_-/:'"))
def test_signs_within_words_stand_as_they_were_asked_for(parts, sign):
    vocab = {word: number for number, word in enumerate(["[UNK]", "red", "7", "30", *"_-/:',"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, "[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    for text in (sign.join(parts), ", ".join(parts), " ".join(parts)):
        assert spelled(tokenizer.decode(tokenizer.encode(text).ids)) == text


@pytest.mark.parametrize(
    ("decoded", "text"),
    [("3. 5", "3.5"), ("50 %", "50%"), ("$ 5", "$5"), ("2, 3", "2, 3"), ("black & white", "black & white")],
)
def test_signs_beside_numbers_are_joined_where_they_belong(decoded, text):
    assert spelled(decoded) == text


@pytest.mark.parametrize(("top_k", "batch_size"), [(1, 2), (3, 7)])
def test_answers_come_best_first_with_the_probability_of_all_their_tokens(tmp_path, dataset, top_k, batch_size):
    trainer = make_open_ended_trainer(tmp_path, dataset, top_k, per_device_eval_batch_size=batch_size)
    predictions = trainer.predict(dataset).predictions
    assert len(predictions) == 17
    lengths = set()
    for example, best in zip(dataset.examples, predictions, strict=True):
        assert len({one["answer"] for one in best}) == len(best) == top_k
        scores = [one["score"] for one in best]
        assert scores == sorted(scores, reverse=True)
        for one in best:
            labels = trainer.processing_class.tokenize_targets([one["answer"]])[:, :4]  # cut off where it is too long
            lengths.add(labels.shape[1])
            expected = torch.tensor(sum(log_probabilities(trainer, example, labels))).exp().item()
            assert one["score"] == pytest.approx(expected, rel=1e-3)
    assert len({best[0]["answer"] for best in predictions}) > 1
    assert len(lengths) > 1 or top_k == 1


def test_no_answer_is_empty_or_of_tokens_that_are_no_words(tmp_path, dataset):
    trainer = make_open_ended_trainer(tmp_path, dataset, top_k=4)
    tokenizer = trainer.processing_class.tokenizer
    with torch.no_grad():
        # A model that would rather say nothing.
        trainer.model.decoder.get_output_embeddings().weight[tokenizer.all_special_ids] *= 20
    answers = [one["answer"] for best in trainer.predict(dataset).predictions for one in best]
    assert len(answers) == 68
    for answer in answers:
        assert answer.split() and set(answer.split()) <= set(tokenizer.get_vocab())
        assert not set(answer.split()) & set(tokenizer.all_special_tokens)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_loss_is_a_mean_over_tokens_and_metrics_are_those_of_question_answering(tmp_path, dataset, batch_size):
    """Some questions have several answers, and some none."""
    said = [("red", "red", "three red circle"), ("yes",), (), ("no", "two")]
    examples = [one._replace(answers=said[place % 4]) for place, one in enumerate(dataset.examples)]
    trainer = make_open_ended_trainer(tmp_path, VQADataset(examples), per_device_eval_batch_size=batch_size)
    output = trainer.predict(trainer.eval_dataset)
    losses = [
        -log_probability
        for example in examples
        for answer in example.answers
        for log_probability in log_probabilities(trainer, example, trainer.processing_class.tokenize_targets([answer]))
    ]
    assert output.metrics["test_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    given = [[one["answer"] for one in best] for best in output.predictions]
    for name, value in vqa_metrics(given, [one.answers for one in examples]).items():
        assert output.metrics[f"test_{name}"] == value


def test_training_counts_answers_and_does_not_depend_on_accumulation(tmp_path, dataset):
    examples = [
        one._replace(answers=("red", "three red circle")[: 1 + place % 2]) for place, one in enumerate(dataset.examples)
    ]
    weights, counts = [], []
    for size, turns in ((4, 1), (1, 4)):
        step = {"per_device_train_batch_size": size, "gradient_accumulation_steps": turns, "max_steps": 1}
        step |= {"optim": "sgd", "learning_rate": 1e-2, "warmup_steps": 0, "eval_strategy": "no"}
        trainer = make_open_ended_trainer(tmp_path, VQADataset(examples, seed=0), **step)
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        counts.append(trainer.num_examples_trained)
    assert counts[0] == counts[1] > 4
    for name, parameter in weights[0].items():
        torch.testing.assert_close(weights[1][name], parameter, atol=1e-5, rtol=1e-4)
