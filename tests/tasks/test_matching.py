"""What scores images with texts, and measures these scores."""

import numpy as np
import pytest
import torch
from trainers import make_arguments

from hivilt import HiViLTForRetrieval
from hivilt.data.matching import Matching, MatchingCollator, MatchingDataset
from hivilt.data.tables import open_image
from hivilt.evaluation.reasoning import sugarcrepe_scores, winoground_scores
from hivilt.tasks.matching import MatchingTrainer, drawn, prediction_row
from tiny import make_image, make_model, make_processor

TEXTS = ["the red circle", "two circle", "a blue square", "no red", "not blue"]


@pytest.fixture
def examples(tmp_path):
    """Four examples of two images and two texts each; two of them are about the same images."""
    made = []
    for number, (left, right) in enumerate([("red", "blue"), ("green", "white"), ("red", "blue"), ("yellow", "black")]):
        for color in (left, right):
            make_image(color).save(tmp_path / f"{color}.png")
        files = tuple(str(tmp_path / f"{color}.png") for color in (left, right))
        made.append(Matching(files, (left, right), (TEXTS[number], TEXTS[number + 1]), "swap_obj"))
    return made


def make_trainer(tmp_path, examples, **arguments):
    processor = make_processor()
    return MatchingTrainer(
        model=make_model(HiViLTForRetrieval, weight_scale=6.0),
        args=make_arguments(tmp_path, **arguments),
        eval_dataset=MatchingDataset(examples),
        data_collator=MatchingCollator(processor),
        processing_class=processor,
    )


def scores_alone(trainer, image, text):
    """Cosine of the embeddings, fused similarity and what a search ranks by, of one image and one text by themselves."""
    inputs = trainer.processing_class(images=[open_image(image)], text=[text], return_tensors="pt")
    model = trainer.model.eval()
    with torch.no_grad():
        outputs = model(**inputs)
        cosine = (outputs.image_embeds * outputs.text_embeds).sum()
        states = model.encode_images(inputs["pixel_values"])
        fused = model.score(states, model.encode_texts(inputs["input_ids"], inputs["attention_mask"]))[0]
        return [cosine.item(), fused.item(), model.ranking_score(cosine, fused).item()]


@pytest.mark.parametrize(("num_images", "metrics_of"), [(2, winoground_scores), (1, sugarcrepe_scores)])
def test_every_example_gets_the_scores_of_its_pairs_in_order(tmp_path, examples, num_images, metrics_of):
    shown = [one._replace(images=one.images[:num_images], image_ids=one.image_ids[:num_images]) for one in examples]
    trainer = make_trainer(tmp_path, shown)
    output = trainer.predict(trainer.eval_dataset)
    apart = np.array(
        [[[scores_alone(trainer, image, text) for text in one.texts] for image in one.images] for one in shown]
    )
    for place, stage in enumerate(("embedding_", "fused_", "")):
        found = np.stack([prediction[stage] for prediction in output.predictions])
        np.testing.assert_allclose(found, apart[..., place], atol=1e-5)
        scores = apart[..., place] if num_images == 2 else apart[:, 0, :, place]
        for name, value in metrics_of(scores, ["swap_obj"] * 4).items():
            assert output.metrics[f"test_{stage}{name}"] == value


def test_an_image_is_encoded_once_for_all_examples_about_it(tmp_path, examples):
    trainer = make_trainer(tmp_path, examples, per_device_eval_batch_size=1)
    encoded = []
    trainer.model.base_model.vision_model.register_forward_hook(
        lambda module, args, output: encoded.append(len(output.last_hidden_state))
    )
    trainer.evaluate()
    assert encoded == [2, 2, 2]


def test_a_row_of_predictions_and_what_is_drawn(examples):
    scores = {"embedding_": np.zeros((2, 2)), "fused_": np.ones((2, 2)), "": np.array([[0.75, 0.25], [0.5, 0.625]])}
    row = prediction_row(examples[0], scores)
    assert row == {
        "images": ["red", "blue"],
        "texts": ["the red circle", "two circle"],
        "kind": "swap_obj",
        "embedding_scores": [[0.0, 0.0], [0.0, 0.0]],
        "fused_scores": [[1.0, 1.0], [1.0, 1.0]],
        "scores": [[0.75, 0.25], [0.5, 0.625]],
        "correct": True,
        "text_score": True,
        "image_score": True,
        "group_score": True,
    }
    wrong = prediction_row(examples[0], scores | {"": np.array([[0.75, 0.7], [0.5, 0.625]])})
    assert [wrong[name] for name in ("text_score", "image_score", "correct")] == [True, False, False]
    one = examples[0]._replace(images=examples[0].images[:1], image_ids=("red",))
    row = prediction_row(one, {stage: values[:1] for stage, values in scores.items()})
    assert row["correct"] is True and "text_score" not in row
    assert drawn(one, np.array([[0.25, 0.75]])).predictions[0]["answer"] == "two circle"
    assert drawn(one, np.array([[0.25, 0.75]])).answer == "the red circle"
