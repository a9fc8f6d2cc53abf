"""Whatever the data, the batches, the collator, the workers and the processes: one prediction a question, in order, equal to
that of the question by itself."""

import functools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

from hivilt import HiViLTForQuestionAnswering
from hivilt.data.vqa import VQACollator, VQADataset, VQAExample
from hivilt.tasks.question_answering import QuestionAnsweringTrainer
from hivilt.training.command import run_command
from processes import launch
from tiny import NUM_ANSWERS, make_image, make_model, make_processor

COLORS = ["red", "blue", "lime", "white"]
QUESTIONS = ["what color", "is there a red circle in the image", "is it blue", "what shape is the square"]
HOW = ["QuestionAnsweringTrainer", "Trainer, VQACollator", "Trainer, its own collator"]

CASES = st.fixed_dictionaries(
    {
        # Pairs of an image and a question, in any order, some more than once.
        "pairs": st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=9),
        "batch_size": st.integers(1, 5),
        "workers": st.sampled_from([0, 0, 0, 2]),
        "how": st.sampled_from(HOW),
    }
)


@functools.cache
def parts():
    """A model whose large weights let image and question decide, its processor, and a folder of images."""
    folder = tempfile.TemporaryDirectory()
    for number, color in enumerate(COLORS):
        make_image(color).save(Path(folder.name, f"{number}.png"))
    return make_model(HiViLTForQuestionAnswering, weight_scale=6), make_processor(), folder


@functools.cache
@torch.no_grad()
def alone(image: int, question: int) -> np.ndarray:
    """The probabilities of a question by itself."""
    model, processor, folder = parts()
    inputs = processor(images=f"{folder.name}/{image}.png", text=QUESTIONS[question], return_tensors="pt")
    return model(**inputs).logits[0].softmax(dim=-1).numpy()


def answered(case: dict) -> tuple[list, list]:
    """The probabilities of a case's questions and their labels, as its trainer gives them."""
    model, processor, folder = parts()
    answers = list(model.config.id2label.values())
    examples = [
        VQAExample(str(place), str(image), f"{folder.name}/{image}.png", QUESTIONS[question], (answers[place % 5],))
        for place, (image, question) in enumerate(case["pairs"])
    ]
    arguments = TrainingArguments(
        folder.name,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        per_device_eval_batch_size=case["batch_size"],
        dataloader_num_workers=case["workers"],
    )
    collator = VQACollator(processor, model.config.label2id)
    if case["how"] == "QuestionAnsweringTrainer":
        trainer = QuestionAnsweringTrainer(model, arguments, collator, processing_class=processor, top_k=NUM_ANSWERS)
        predicted = trainer.predict(VQADataset(examples)).predictions
        scores = [{one["answer"]: one["score"] for one in best} for best in predicted]
        return [[found[answer] for answer in answers] for found in scores], [
            place % 5 for place in range(len(examples))
        ]

    if case["how"] == "Trainer, VQACollator":
        found = Trainer(model, arguments, collator).predict(VQADataset(examples))
    else:
        rows = Dataset.from_list(
            [{"image": one.image, "text": one.question, "answer": one.answers[0]} for one in examples]
        )

        def encode(rows):
            alike = {"padding": "max_length", "max_length": 12}
            inputs = processor(images=rows["image"], text=rows["text"], return_tensors="pt", **alike)
            return {**inputs, "labels": [model.config.label2id[answer] for answer in rows["answer"]]}

        found = Trainer(model, arguments).predict(rows.with_transform(encode))
    return torch.tensor(found.predictions).softmax(dim=-1).tolist(), found.label_ids.tolist()


def assert_are_those_of_each_alone(case: dict, probabilities: list, labels: list) -> None:
    assert len(probabilities) == len(labels) == len(case["pairs"])
    np.testing.assert_allclose(probabilities, [alone(*pair) for pair in case["pairs"]], atol=1e-5)
    assert labels == [place % 5 for place in range(len(labels))]


def test_no_two_pairs_are_answered_alike():
    """Or no mix-up below could be seen."""
    rows = torch.tensor(np.stack([alone(image, question) for image in range(4) for question in range(4)]))
    assert torch.pdist(rows, p=torch.inf).min() > 1e-3


@settings(max_examples=6)
@given(CASES)
def test_predictions_are_those_of_each_question_alone(case):
    assert_are_those_of_each_alone(case, *answered(case))


@pytest.mark.slow
@settings(max_examples=2)
@given(st.tuples(*[CASES] * 6))
def test_predictions_on_two_processes_are_those_of_each_question_alone(drawn):
    cases = [{**case, "how": how} for case, how in zip(drawn, HOW * 2, strict=True)]
    for case, found in zip(cases, json.loads(launch(Path(__file__).stem, 2, [json.dumps(cases)])), strict=True):
        assert_are_those_of_each_alone(case, *found)


def main() -> None:
    found = [answered(case) for case in json.loads(sys.argv[1])]
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    run_command(main)
