"""Trainers and data that tests of trainers share."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainerCallback, set_seed

from hivilt import (
    HiViLTForImagesAndTextClassification,
    HiViLTForQuestionAnswering,
    HiViLTForRetrieval,
    HiViLTForVisualGrounding,
)
from hivilt.data.captions import CaptionCollator, CaptionDataset, CaptionedImage, CaptioningCollator
from hivilt.data.grounding import GroundedImage, GroundingCollator, GroundingDataset
from hivilt.data.reasoning import ReasoningCollator, ReasoningDataset, Statement
from hivilt.data.vqa import VQACollator, VQADataset, VQAExample, WrittenAnswersCollator
from hivilt.evaluation.captioning import cider_d, document_frequencies
from hivilt.tasks.arguments import CaptioningArguments, GenerationArguments, VQAArguments
from hivilt.tasks.captioning import CaptioningTrainer
from hivilt.tasks.generation import prepare_to_write
from hivilt.tasks.grounding import GroundingTrainer
from hivilt.tasks.open_ended_answering import OpenEndedTrainer
from hivilt.tasks.question_answering import QuestionAnsweringTrainer
from hivilt.tasks.reasoning import ReasoningTrainer
from hivilt.tasks.retrieval import RetrievalTrainer
from hivilt.training.arguments import COMMON_DEFAULTS, HiViLTTrainingArguments
from hivilt.training.command import run_command
from tiny import (
    DECODER_CONFIGS,
    make_captioner,
    make_config,
    make_image,
    make_model,
    make_processor,
    with_dropout,
)

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


class Recorder(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


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


PROMPT = "what is in the image"


def make_writer(args: GenerationArguments):
    """A model that writes words of the tokenizer alone, without dropout, to be trained as these flags say; its processor."""
    processor, decoder = make_processor(), DECODER_CONFIGS["gpt2"]()
    decoder.vocab_size = len(processor.tokenizer)
    model = with_dropout(make_captioner(decoder_config=decoder), 0.0)
    model.config.text_config.attention_probs_dropout_prob = 0.0
    prepare_to_write(model, processor, args, trains=True)
    return model, processor


def make_captioning_trainer(
    tmp_path,
    captioned,
    captions_per_image=None,
    callbacks=None,
    train=None,
    num_beams=2,
    self_critical=False,
    **arguments,
):
    model, processor = make_writer(CaptioningArguments(num_beams=num_beams, max_new_tokens=5))
    return CaptioningTrainer(
        model=model,
        args=make_arguments(tmp_path, **arguments),
        train_dataset=CaptionDataset(train or captioned, captions_per_image, seed=0, prompt=PROMPT),
        eval_dataset=CaptionDataset(captioned, prompt=PROMPT),
        data_collator=CaptioningCollator(processor, PROMPT),
        processing_class=processor,
        callbacks=callbacks,
        self_critical=self_critical,
    )


def note_rewards(trainer) -> list[float]:
    """The CIDEr-D of each caption that the trainer samples from now on."""
    rewards, places, frequencies = [], [], document_frequencies(CAPTIONS)
    learn, decode = trainer.compute_loss, trainer.processing_class.batch_decode

    def noted_learn(model, inputs, *args, **kwargs):
        places[:] = [place for place in inputs["image_number"].tolist() for _ in range(5)]
        loss = learn(model, inputs, *args, **kwargs)
        places.clear()
        return loss

    def noted_decode(*args, **kwargs):
        texts = decode(*args, **kwargs)
        if places:  # else it is evaluation
            rewards.extend(cider_d(texts, [CAPTIONS[place] for place in places], frequencies))
        return texts

    trainer.compute_loss, trainer.processing_class.batch_decode = noted_learn, noted_decode
    return rewards


def reward_on_two(folder, captioned):
    """What each process rewards, and what is logged of it."""
    usual = {"eval_strategy": "no", "max_steps": 2, "logging_steps": 2, "per_device_train_batch_size": 1}
    trainer = make_captioning_trainer(folder, captioned, self_critical=True, **usual)
    rewards = note_rewards(trainer)
    trainer.train()
    logged = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    (folder / f"{trainer.args.process_index}.json").write_text(json.dumps([rewards, logged]))


# By image, what is said and how many boxes it means; few and many, so that a mean over batches is not the mean over texts.
MEANT = [
    {"the red circle": 1, "two circle": 2, "a blue square": 0},
    {"no red": 1},
    {"the square": 1, "three square": 3, "not blue": 1, "what is there": 0},
    {"yes": 2},
    {"the shape in the image": 1, "red and blue": 1},
]
_BOXES = ((0.1, 0.2, 0.5, 0.6), (0.55, 0.3, 0.95, 0.9), (0.0, 0.65, 0.4, 1.0))


@pytest.fixture
def grounded(tmp_path):
    """Five images with eleven expressions, `MEANT`."""
    examples = []
    for number, said in enumerate(MEANT):
        path = tmp_path / f"{number}.png"
        make_image(["red", "blue", "green", "white", "yellow"][number], size=(31 - number, 23 + 2 * number)).save(path)
        boxes = tuple((_BOXES[number % 3 :] + _BOXES[: number % 3])[:count] for count in said.values())
        examples.append(GroundedImage(str(path), str(number), tuple(said), boxes))
    return examples


def make_grounding_trainer(
    tmp_path, grounded, expressions_per_image=None, callbacks=None, threshold=0.1, measures_phrases=False, **arguments
):
    model = with_dropout(make_model(HiViLTForVisualGrounding, weight_scale=6.0), 0.0)
    model.config.text_config.attention_probs_dropout_prob = 0.0
    processor = make_processor()
    return GroundingTrainer(
        model=model,
        args=make_arguments(tmp_path, **arguments),
        train_dataset=GroundingDataset(grounded, expressions_per_image, seed=0),
        eval_dataset=GroundingDataset(grounded),
        data_collator=GroundingCollator(processor),
        processing_class=processor,
        callbacks=callbacks,
        threshold=threshold,
        measures_phrases=measures_phrases,
    )


# What is said of two of four images each; four items, of different numbers of statements, as no item shares an image.
SAID = [[(0, 1), (1, 0), (1, 1)], [(2, 3)], [(4, 5), (5, 4)], [(6, 7), (7, 6), (6, 6), (7, 7), (7, 6)]]


@pytest.fixture
def stated(tmp_path):
    """Eleven statements about pairs of eight images, `SAID`; those of an item are not next to each other."""
    colors, said = ["red", "blue", "green", "yellow", "white", "black", "purple", "gray"], []
    for number, color in enumerate(colors):
        make_image(color, size=(31 - number, 23 + number)).save(tmp_path / f"{number}.png")
    for turn in range(5):
        for item, pairs in enumerate(SAID):
            if turn < len(pairs):
                names = tuple(map(str, pairs[turn]))
                paths = tuple(str(tmp_path / f"{name}.png") for name in names)
                sentence = ("the red circle", "two circle", "a blue square", "no red", "not blue")[turn]
                label, group = ("True", "yes", "false")[(turn + item) % 3], str(item // 2)
                said.append(Statement(f"{item}-{turn}", paths, names, sentence, label, ("a", "b")[turn % 2], group))
    return said


def make_reasoning_trainer(tmp_path, stated, callbacks=None, first_epochs=0, **arguments):
    model = make_model(HiViLTForImagesAndTextClassification, weight_scale=6.0, id2label={0: "False", 1: "True"})
    model.config.text_config.attention_probs_dropout_prob = 0.0
    processor = make_processor()
    return ReasoningTrainer(
        model=with_dropout(model, 0.0),
        args=make_arguments(tmp_path, **arguments),
        train_dataset=ReasoningDataset(stated, 0, first_epochs),
        eval_dataset=ReasoningDataset(stated),
        data_collator=ReasoningCollator(processor, {"False": 0, "True": 1}),
        processing_class=processor,
        callbacks=callbacks,
    )


def make_open_ended_trainer(tmp_path, dataset, top_k=3, **arguments):
    model, processor = make_writer(VQAArguments(generate=True, num_beams=2, max_new_tokens=4))
    return OpenEndedTrainer(
        model=model,
        args=make_arguments(tmp_path, **arguments),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=WrittenAnswersCollator(processor),
        processing_class=processor,
        top_k=top_k,
    )


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


def evaluate_in_folds(tmp_path, captioned):
    """Metrics with folds of one image, some of which are one pair, and of two."""
    trainers = [make_retrieval_trainer(tmp_path, captioned, fold_size=fold_size) for fold_size in (1, 2)]
    return [trainer.evaluate() for trainer in trainers]


def assert_a_plain_trainer_is_refused_to_evaluate(tmp_path, ours, name):
    """A Trainer may train on what `ours` does, and is refused to evaluate, as it would cut texts without a word: by a message that
    has the `name` of ours."""
    arguments = make_arguments(tmp_path, max_steps=1, eval_strategy="no")
    plain = Trainer(ours.model, arguments, ours.data_collator, ours.train_dataset, ours.eval_dataset)
    assert plain.train().training_loss > 0
    for evaluate in (plain.evaluate, lambda: plain.predict(ours.eval_dataset)):
        with pytest.raises(ValueError, match=name):
            evaluate()


def assert_a_step_is_one_mean(make, mean, count):
    """That a step over four images learns from the mean over its `count` texts, accumulated or not: `make` gives a trainer
    of arguments, `mean` the loss before."""
    weights, losses = [], []
    for size, turns in ((4, 1), (2, 2), (1, 4)):
        recorder = Recorder()
        step = {"per_device_train_batch_size": size, "gradient_accumulation_steps": turns, "max_steps": 1}
        step |= {"optim": "sgd", "learning_rate": 1e-2, "warmup_steps": 0, "eval_strategy": "no"}
        trainer = make(callbacks=[recorder], **step)
        before = mean(trainer)
        trainer.train()
        assert trainer.num_examples_trained == count
        losses.append(recorder.logs[0]["loss"])
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    assert losses == pytest.approx([before] * 3, rel=1e-4)
    for other in weights[1:]:
        for name, parameter in weights[0].items():
            torch.testing.assert_close(other[name], parameter, atol=1e-5, rtol=1e-4)


def main():
    folder = Path(sys.argv[1])
    if sys.argv[2:] == ["diverge"]:
        examples = [
            VQAExample(str(number), str(number), str(folder / f"{number}.png"), "what color", ("red",))
            for number in range(len(COUNTS))
        ]
        return diverge_on_one_of_two(folder, VQADataset(examples))
    captioned = [CaptionedImage(str(n), str(folder / f"{n}.png"), captions) for n, captions in enumerate(CAPTIONS)]
    if sys.argv[2:] == ["reward"]:
        return reward_on_two(folder, captioned)
    metrics = evaluate_in_folds(folder, captioned)
    if os.environ["RANK"] == "0":
        (folder / "metrics.json").write_text(json.dumps(metrics))


if __name__ == "__main__":  # one of several processes of a test
    run_command(main)
