"""Pipelines on a checkpoint's folder, and their classes by themselves: questions answered, expressions found, images judged."""

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from PIL import Image
from transformers import ViTImageProcessorPil, ZeroShotObjectDetectionPipeline, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from elsewhere import answer_everywhere
from fresh import run_elsewhere
from hivilt import (
    HiViLTForImagesAndTextClassification,
    HiViLTForQuestionAnswering,
    HiViLTForRetrieval,
    HiViLTForVisualGrounding,
    HiViLTImagesAndTextClassificationPipeline,
    HiViLTModel,
    HiViLTVisualQuestionAnsweringPipeline,
    HiViLTZeroShotObjectDetectionPipeline,
)
from tiny import MODEL_CLASSES, NUM_ANSWERS, make_image, make_model, make_processor

QUESTIONS = ["what color is the circle", "is there a square"]
IMAGES = {"red": make_image("red"), "blue": make_image("blue", (23, 31)), "lime": make_image("lime")}
REQUESTS = [
    {"image": IMAGES["red"], "question": QUESTIONS[0]},
    {"image": IMAGES["blue"], "question": QUESTIONS},
    {"image": IMAGES["lime"], "question": "what shape is it"},
    {"image": IMAGES["red"], "question": ["is it red", "is it blue", "two"]},
    {"image": IMAGES["blue"], "question": [QUESTIONS[1]]},
]


@pytest.fixture(scope="module")
def vqa() -> HiViLTVisualQuestionAnsweringPipeline:
    # Large weights, so that images and questions decide the answer.
    model = make_model(HiViLTForQuestionAnswering, weight_scale=6)
    return HiViLTVisualQuestionAnsweringPipeline(model=model, processor=make_processor(), device="cpu")


@pytest.fixture(scope="module")
def find() -> HiViLTZeroShotObjectDetectionPipeline:
    model = make_model(HiViLTForVisualGrounding, weight_scale=6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = model.row_head.box_regressor[-1].weight
        weight.copy_(torch.randn(weight.shape, generator=generator))
        model.row_head.classifier.bias.zero_()
    return HiViLTZeroShotObjectDetectionPipeline(model=model, processor=make_processor(), device="cpu")


@pytest.fixture(scope="module")
def judge() -> HiViLTImagesAndTextClassificationPipeline:
    model = make_model(HiViLTForImagesAndTextClassification, weight_scale=6)
    return HiViLTImagesAndTextClassificationPipeline(model=model, processor=make_processor(), device="cpu")


@pytest.fixture
def encoded(vqa, find, judge) -> list[int]:
    """How many images each pass of the vision encoders had."""
    counts = []
    hooks = [
        one.model.model.vision_model.register_forward_hook(
            lambda module, args, kwargs, output: counts.append(len((*args, *kwargs.values())[0])), with_kwargs=True
        )
        for one in (vqa, find, judge)
    ]
    yield counts
    for hook in hooks:
        hook.remove()


def answers_by_hand(vqa, image, question: str) -> list[dict]:
    """All answers, best first, without the pipeline."""
    inputs = vqa.processor(images=image, text=question, return_tensors="pt")
    with torch.no_grad():
        scores = vqa.model(**inputs).logits[0].softmax(dim=-1)
    return [{"answer": f"answer {label}", "score": float(scores[label])} for label in scores.argsort(descending=True)]


def assert_same_answers(found, expected):
    """Of one question, or of as many as there are in nested lists."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, list):
            assert_same_answers(one, other)
        else:
            assert set(one) == {"answer", "score"} and one["answer"] == other["answer"]
            assert one["score"] == pytest.approx(other["score"], abs=1e-5)


# Answers


def test_one_question(vqa):
    answers = vqa(IMAGES["red"], QUESTIONS[0])
    assert_same_answers(answers, answers_by_hand(vqa, IMAGES["red"], QUESTIONS[0]))
    assert len(answers) == NUM_ANSWERS and sum(answer["score"] for answer in answers) == pytest.approx(1)
    # Not the same whatever is shown and asked, or no mix-up below could be seen.
    for other in vqa(IMAGES["red"], QUESTIONS[1]), vqa(IMAGES["blue"], QUESTIONS[0]):
        assert abs(other[0]["score"] - answers[0]["score"]) > 1e-3


def test_scores_that_are_not_numbers_are_no_answer(vqa):
    bias = vqa.model.classifier.bias.detach().clone()
    try:
        vqa.model.classifier.bias.data[0] = float("nan")
        with pytest.raises(ValueError, match="scores are not numbers"):
            vqa(make_image(), "is it red?")
    finally:
        vqa.model.classifier.bias.data.copy_(bias)


def test_several_questions_encode_their_image_once(vqa, encoded):
    answers = vqa(IMAGES["red"], QUESTIONS)
    assert encoded == [1]
    assert_same_answers(answers, [answers_by_hand(vqa, IMAGES["red"], question) for question in QUESTIONS])


def test_list_of_one_question_gives_a_list_of_answers(vqa):
    assert_same_answers(vqa(IMAGES["red"], QUESTIONS[:1]), [answers_by_hand(vqa, IMAGES["red"], QUESTIONS[0])])


def test_dict_is_a_request(vqa):
    for request in REQUESTS[:2]:
        assert_same_answers(vqa(request), vqa(request["image"], request["question"]))


@pytest.mark.parametrize(("batch_size", "passes"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (None, [5])])
def test_list_of_requests_is_answered_in_batches(vqa, encoded, batch_size, passes):
    answers = vqa(REQUESTS, batch_size=batch_size)
    assert encoded == passes
    assert isinstance(answers, list)
    assert_same_answers(answers, [vqa(request) for request in REQUESTS])


def test_generator_is_answered_as_it_comes(vqa):
    asked = []

    def requests():
        for request in REQUESTS:
            asked.append(request)
            yield request

    answers = vqa(requests(), batch_size=2)
    assert asked == []
    assert_same_answers(next(answers), vqa(REQUESTS[0]))
    assert len(asked) == 2
    assert_same_answers(list(answers), [vqa(request) for request in REQUESTS[1:]])
    with pytest.raises(StopIteration):
        next(answers)


def test_empty_list_has_no_answers(vqa):
    assert vqa([]) == []


def test_images_may_be_files_pil_images_or_arrays(vqa, tmp_path):
    expected = vqa(IMAGES["blue"], QUESTIONS[0])
    file = tmp_path / "image.png"
    IMAGES["blue"].save(file)
    for image in (file, str(file), np.asarray(IMAGES["blue"]), IMAGES["blue"].convert("RGBA")):
        assert_same_answers(vqa(image, QUESTIONS[0]), expected)


@pytest.mark.parametrize("many", [list, tuple, iter], ids=lambda many: many.__name__)
def test_one_question_about_many_images(vqa, encoded, many):
    expected = [answers_by_hand(vqa, image, QUESTIONS[0]) for image in IMAGES.values()]
    encoded.clear()
    answers = vqa(many(IMAGES.values()), QUESTIONS[0], batch_size=2)
    assert isinstance(answers, list) == (many is not iter)
    assert_same_answers(list(answers), expected)
    assert encoded == [2, 1]


def test_four_dimensions_are_many_images(vqa):
    images = [image.resize((20, 20)) for image in IMAGES.values()]
    expected = [answers_by_hand(vqa, image, QUESTIONS[0]) for image in images]
    batch = np.stack([np.asarray(image) for image in images])
    assert_same_answers(vqa(batch, QUESTIONS[0]), expected)
    assert_same_answers(vqa(torch.tensor(batch).permute(0, 3, 1, 2) / 255, QUESTIONS[0]), expected)


@pytest.fixture(scope="module")
def rows():
    rows = [{**request, "question": QUESTIONS[place % 2]} for place, request in enumerate(REQUESTS)]
    return Dataset.from_list(rows, features=Features(image=datasets.Image(), question=Value("string")))


def test_rows_of_a_dataset_are_requests(vqa, rows):
    expected = [answers_by_hand(vqa, row["image"], row["question"]) for row in rows]
    answers = vqa(rows, batch_size=2)
    assert_same_answers(next(answers), expected[0])
    assert_same_answers([expected[0], *answers], expected)
    assert_same_answers(list(vqa(rows.to_iterable_dataset())), expected)


def test_one_question_about_the_images_of_a_dataset(vqa, rows):
    expected = [answers_by_hand(vqa, row["image"], QUESTIONS[0]) for row in rows]
    for images in (KeyDataset(rows, "image"), rows.remove_columns("question"), rows["image"]):
        assert_same_answers(list(vqa(images, question=QUESTIONS[0])), expected)
    asked_twice = vqa(rows, question=QUESTIONS[0])
    with pytest.raises(ValueError, match="question is given twice"):
        next(asked_twice)


def test_a_model_in_memory(vqa, tmp_path):
    expected = vqa(IMAGES["red"], QUESTIONS)
    vqa.model.save_pretrained(tmp_path)
    for model in (vqa.model, HiViLTForQuestionAnswering.from_pretrained(tmp_path)):
        made = pipeline("visual-question-answering", model=model, processor=vqa.processor, device="cpu")
        assert type(made) is HiViLTVisualQuestionAnsweringPipeline
        assert_same_answers(made(IMAGES["red"], QUESTIONS), expected)
    made.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "pipeline_hivilt.py").is_file()


def test_top_k_of_the_call_or_of_the_pipeline(vqa):
    best = answers_by_hand(vqa, IMAGES["red"], QUESTIONS[0])
    assert_same_answers(vqa(IMAGES["red"], QUESTIONS[0], top_k=2), best[:2])
    assert_same_answers(vqa(IMAGES["red"], QUESTIONS[0], top_k=99), best)
    short = HiViLTVisualQuestionAnsweringPipeline(model=vqa.model, processor=vqa.processor, device="cpu", top_k=1)
    assert_same_answers(short(IMAGES["red"], QUESTIONS[0]), best[:1])
    assert_same_answers(short(IMAGES["red"], QUESTIONS[0], top_k=3), best[:3])
    assert [len(answers) for answers in short(REQUESTS[:1] + REQUESTS[2:3])] == [1, 1]


def test_batch_size_of_the_pipeline(vqa, encoded):
    pairs = HiViLTVisualQuestionAnsweringPipeline(model=vqa.model, processor=vqa.processor, device="cpu", batch_size=2)
    pairs(REQUESTS)
    assert encoded == [2, 2, 1]


def test_soft_labels_give_independent_probabilities():
    model = make_model(HiViLTForQuestionAnswering, weight_scale=6, problem_type="multi_label_classification")
    vqa = HiViLTVisualQuestionAnsweringPipeline(model=model, processor=make_processor(), device="cpu")
    inputs = vqa.processor(images=IMAGES["red"], text=QUESTIONS[0], return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits[0].sigmoid().sort(descending=True).values.tolist()
    assert [answer["score"] for answer in vqa(IMAGES["red"], QUESTIONS[0])] == pytest.approx(expected, abs=1e-5)
    assert sum(expected) != pytest.approx(1, abs=0.05)


def test_half_precision_model_answers(vqa):
    model = make_model(HiViLTForQuestionAnswering, weight_scale=6).to(torch.bfloat16)
    half = HiViLTVisualQuestionAnsweringPipeline(model=model, processor=make_processor(), device="cpu")
    expected = {answer["answer"]: answer["score"] for answer in vqa(IMAGES["red"], QUESTIONS[0])}
    found = {answer["answer"]: answer["score"] for answer in half(IMAGES["red"], QUESTIONS[0])}
    assert found == pytest.approx(expected, abs=0.1)


# Boxes

EXPRESSIONS = ["the red square", "a circle in the image", "blue"]


def boxes_by_hand(find, image, labels: list[str], threshold: float = 0.1) -> list[dict]:
    """What is found, best first, each expression by itself and without the pipeline."""
    found = []
    for label in labels:
        inputs = find.processor(images=image, text=label, return_tensors="pt")
        with torch.no_grad():
            outputs = find.model(**inputs)
        (one,) = find.processor.post_process_grounding(outputs, [(image.height, image.width)], threshold)
        for score, box in zip(one["scores"].tolist(), one["boxes"].int().tolist(), strict=True):
            found.append(
                {"score": score, "label": label, "box": dict(zip(["xmin", "ymin", "xmax", "ymax"], box, strict=True))}
            )
    return sorted(found, key=lambda one: -one["score"])


def assert_same_boxes(found: list[dict], expected: list[dict]):
    assert [one["label"] for one in found] == [one["label"] for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert set(one) == {"score", "label", "box"} and one["score"] == pytest.approx(other["score"], abs=1e-5)
        # Whole pixels are cut off from numbers that rounding may move over them.
        assert list(one["box"]) == list(other["box"])
        assert list(one["box"].values()) == pytest.approx(list(other["box"].values()), abs=1)


def test_expressions_encode_their_image_once_and_are_found_best_first(find, encoded):
    found = find(IMAGES["blue"], candidate_labels=EXPRESSIONS)
    assert encoded == [1]
    expected = boxes_by_hand(find, IMAGES["blue"], EXPRESSIONS)
    assert_same_boxes(found, expected)
    assert {one["label"] for one in found} == set(EXPRESSIONS)
    assert_same_boxes(find(IMAGES["blue"], EXPRESSIONS, top_k=2), expected[:2])
    sure = find(IMAGES["blue"], EXPRESSIONS, threshold=expected[3]["score"] - 1e-4)
    assert_same_boxes(sure, boxes_by_hand(find, IMAGES["blue"], EXPRESSIONS, expected[3]["score"] - 1e-4))
    assert 0 < len(sure) < len(expected)
    assert find(IMAGES["blue"], EXPRESSIONS, threshold=1.0) == []
    # Not the same whatever is shown and asked, or no mix-up could be seen.
    assert find(IMAGES["red"], EXPRESSIONS)[0]["score"] != pytest.approx(found[0]["score"], abs=1e-3)


def test_boxes_are_those_of_transformers_own_pipeline(find):
    """Which wants an image processor that knows boxes, and encodes the image for each label."""

    class ImageProcessor(ViTImageProcessorPil):
        def post_process_object_detection(self, outputs, threshold, target_sizes):
            return find.processor.post_process_grounding((outputs.logits, outputs.pred_boxes), target_sizes, threshold)

    image_processor = ImageProcessor(size={"height": 20, "width": 20})
    theirs = ZeroShotObjectDetectionPipeline(
        model=find.model, tokenizer=find.processor.tokenizer, image_processor=image_processor, device="cpu"
    )
    images = list(IMAGES.values())
    each = [EXPRESSIONS, EXPRESSIONS[:1], EXPRESSIONS[1:]]
    for labels in (EXPRESSIONS, each):
        for found, expected in zip(find(images, labels), theirs(images, candidate_labels=labels), strict=True):
            assert_same_boxes(found, expected)
    requests = [{"image": image, "candidate_labels": labels} for image, labels in zip(images, each, strict=True)]
    for found, expected in zip(find(requests), theirs(requests), strict=True):
        assert_same_boxes(found, expected)
    assert_same_boxes(find(requests[1]), theirs(requests[1]))
    assert_same_boxes(find(images[0], "blue"), theirs(images[0], candidate_labels="blue"))


@pytest.mark.parametrize(("batch_size", "passes"), [(2, [2, 1]), (None, [3])])
def test_images_are_looked_through_in_batches(find, encoded, batch_size, passes):
    found = find(iter(IMAGES.values()), EXPRESSIONS, batch_size=batch_size)
    assert encoded == []
    for one, image in zip(list(found), IMAGES.values(), strict=True):
        assert_same_boxes(one, boxes_by_hand(find, image, EXPRESSIONS))
    assert encoded[: len(passes)] == passes


def test_boxes_are_in_pixels_of_the_image_as_people_see_it(find, tmp_path):
    image, file = IMAGES["red"], tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    image.rotate(90, expand=True).save(file, exif=exif, quality=100, subsampling=0)
    seen, expected = find(file, EXPRESSIONS)[0], find(image, EXPRESSIONS)[0]
    assert seen["label"] == expected["label"] and image.size == (31, 23)
    assert list(seen["box"].values()) == pytest.approx(list(expected["box"].values()), abs=1)


@pytest.mark.parametrize(
    ("image", "labels", "message"),
    [
        (IMAGES["red"], None, "no expression: call the pipeline with `image` and `candidate_labels`"),
        (IMAGES["red"], "the dog, left", "one string with a comma, 'the dog, left': give a list"),
        (IMAGES["red"], [], "at least one text"),
        (IMAGES["red"], ["dog", " "], "position 1 is empty"),
        ([IMAGES["red"]], [["dog"], ["cat"]], "2 lists of expressions cannot be paired with 1 images"),
        ([IMAGES["red"]], None, 'dict with "image" and "candidate_labels", got Image'),
        ({"image": IMAGES["red"]}, None, r"""got \['image'\]"""),
        ([{"image": IMAGES["red"], "candidate_labels": ["dog"]}], ["dog"], "expression is given twice"),
        ("https://example.com/image.png", ["dog"], "not fetched from the web"),
    ],
)
def test_refuses_to_look_for_nothing(find, image, labels, message):
    with pytest.raises(ValueError, match=message):
        find(image, labels)


def test_refuses_arguments_that_finding_does_not_have(find):
    with pytest.raises(ValueError, match="Unknown arguments: timeout.*`threshold`, `top_k`, `batch_size`"):
        find(IMAGES["red"], EXPRESSIONS, timeout=3)
    with pytest.raises(ValueError, match=r"`threshold` must be a number in \[0, 1\]"):
        find(IMAGES["red"], EXPRESSIONS, threshold=7)


def test_a_checkpoint_of_another_head_finds_nothing(vqa, tmp_path):
    vqa.save_pretrained(tmp_path)
    model = HiViLTForVisualGrounding.from_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="a checkpoint of HiViLTForQuestionAnswering: the head that finds boxes is unt"
    ):
        HiViLTZeroShotObjectDetectionPipeline(model=model, processor=vqa.processor)


@pytest.mark.slow
@pytest.mark.checklist("13")
def test_grounding_folder_finds_without_hivilt(said, find):
    assert said["class of boxes"] == ["HiViLTZeroShotObjectDetectionPipeline", "transformers_modules"]
    expected = find(IMAGES["red"], ["red", "blue circle", "three"])
    assert_same_boxes(said["boxes"], expected)
    assert_same_boxes(said["boxes, inferred"], expected[:2])


# Several images

TEXTS = ["is it red", "two blue circle", "a square"]
JUDGED = [
    {"images": [IMAGES["red"], IMAGES["blue"]], "text": TEXTS[0]},
    {"images": [IMAGES["blue"], IMAGES["red"]], "text": TEXTS},
    {"images": (IMAGES["red"], IMAGES["lime"]), "text": TEXTS[1]},
    {"images": [IMAGES["lime"]] * 2, "text": TEXTS[2:]},
]


def labels_by_hand(judge, images, text: str) -> list[dict]:
    """All labels, best first, of one text and without the pipeline."""
    inputs = judge.processor(images=[list(images)], text=text, return_tensors="pt")
    with torch.no_grad():
        scores = judge.model(**inputs).logits[0].softmax(dim=-1)
    return [{"label": f"answer {label}", "score": float(scores[label])} for label in scores.argsort(descending=True)]


def assert_same_labels(found, expected):
    """Of one text, or of as many as there are in nested lists."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, list):
            assert_same_labels(one, other)
        else:
            assert set(one) == {"label", "score"} and one["label"] == other["label"]
            assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def judged_by_hand(judge, request):
    images, text = request["images"], request["text"]
    one_each = [labels_by_hand(judge, images, one) for one in ([text] if isinstance(text, str) else text)]
    return one_each[0] if isinstance(text, str) else one_each


def test_a_text_is_judged_about_a_list_of_images(judge, encoded):
    images = JUDGED[0]["images"]
    found = judge(images, TEXTS[0])
    assert encoded == [2]
    expected = labels_by_hand(judge, images, TEXTS[0])
    assert len(found) == NUM_ANSWERS and sum(one["score"] for one in found) == pytest.approx(1)
    for asked in (found, judge(JUDGED[0]), judge(images=images, text=TEXTS[0]), judge([JUDGED[0]])[0]):
        assert_same_labels(asked, expected)
    assert_same_labels(judge(JUDGED[0], top_k=2), expected[:2])
    # Not the same whatever is shown, said and in which order, or no mix-up could be seen.
    for other in judge(images[::-1], TEXTS[0]), judge(images, TEXTS[1]), judge([images[0]] * 2, TEXTS[0]):
        assert abs(other[0]["score"] - expected[0]["score"]) > 1e-3


@pytest.mark.parametrize(("batch_size", "passes"), [(None, [3]), (2, [2, 2]), (3, [3, 2])])
def test_images_that_requests_share_are_encoded_once_in_a_pass(judge, encoded, batch_size, passes):
    found = judge(JUDGED, batch_size=batch_size)
    assert encoded == passes
    assert_same_labels(found, [judged_by_hand(judge, request) for request in JUDGED])


def test_an_image_of_a_file_is_read_and_encoded_once(judge, encoded, tmp_path):
    for name, image in IMAGES.items():
        image.save(tmp_path / f"{name}.png")
    pairs = [("red", "blue"), ("blue", "red"), ("red", "red")]
    found = judge([{"images": [tmp_path / f"{a}.png", str(tmp_path / f"{b}.png")], "text": TEXTS} for a, b in pairs])
    assert encoded == [2]
    assert_same_labels(
        found, [[labels_by_hand(judge, [IMAGES[one] for one in pair], t) for t in TEXTS] for pair in pairs]
    )


def test_rows_of_a_dataset_or_a_generator_are_judged_as_they_come(judge):
    rows = [
        {**request, "images": list(request["images"]), "text": TEXTS[0], "label": "no column"} for request in JUDGED
    ]
    expected = [labels_by_hand(judge, request["images"], TEXTS[0]) for request in JUDGED]
    dataset = Dataset.from_list(
        rows, features=Features(images=[datasets.Image()], text=Value("string"), label=Value("string"))
    )
    for many in (dataset, iter(rows), dataset.to_iterable_dataset()):
        found = judge(many, batch_size=3)
        assert not isinstance(found, list)
        assert_same_labels(list(found), expected)
    assert judge([]) == []


@pytest.mark.parametrize("num_images", [1, 3])
def test_as_many_images_as_the_config_says_are_judged_together(num_images):
    model = make_model(HiViLTForImagesAndTextClassification, weight_scale=6, num_images=num_images)
    judge = HiViLTImagesAndTextClassificationPipeline(model=model, processor=make_processor(), device="cpu")
    images = list(IMAGES.values())
    requests = [{"images": images[place:][:num_images] or images[:1], "text": TEXTS} for place in range(4 - num_images)]
    assert_same_labels(judge(requests), [judged_by_hand(judge, request) for request in requests])
    with pytest.raises(ValueError, match=f"must be a list of {num_images} images, .*`config.num_images`.*, got 2"):
        judge(JUDGED[0])


@pytest.mark.parametrize(
    ("images", "text", "error", "message"),
    [
        (JUDGED[0]["images"], None, ValueError, '"images" and "text", got Image'),
        (["a.png", "b.png"], None, ValueError, '"images" and "text", got str'),
        ("a.png", None, ValueError, "no text: call the pipeline with `images` and `text`"),
        (IMAGES["red"], TEXTS[0], ValueError, "must be a list of 2 images, .*, got a Image"),
        ([IMAGES["red"]], TEXTS[0], ValueError, "must be a list of 2 images, .*, got 1"),
        ([{"images": [IMAGES["red"]] * 3, "text": "yes"}], None, ValueError, "must be a list of 2 images, .*, got 3"),
        (JUDGED[0], TEXTS[0], ValueError, "must be a list of 2 images, .*, got a dict"),
        ({"images": JUDGED[0]["images"]}, None, ValueError, r"got \['images'\]"),
        (JUDGED[0]["images"], " ", ValueError, "position 0 is empty"),
        (JUDGED[0]["images"], [], ValueError, "at least one text"),
        (JUDGED[0]["images"], 3, TypeError, "must hold strings, got int"),
        ([IMAGES["red"], "nowhere.png"], TEXTS[0], FileNotFoundError, "nowhere.png"),
        ([IMAGES["red"], __file__], TEXTS[0], ValueError, "not a readable image"),
    ],
)
def test_refuses_what_cannot_be_judged(judge, images, text, error, message):
    with pytest.raises(error, match=message):
        judge(images, text)


def test_a_checkpoint_of_another_head_judges_nothing_before_it_has_learned(vqa, tmp_path):
    vqa.model.config.problem_type = "multi_label_classification"
    vqa.save_pretrained(tmp_path)
    vqa.model.config.problem_type = None
    model = HiViLTForImagesAndTextClassification.from_pretrained(tmp_path)
    make = lambda model: HiViLTImagesAndTextClassificationPipeline(model=model, processor=vqa.processor, device="cpu")
    message = "of HiViLTForQuestionAnswering: the head that judges images is untrained. Name a checkpoint of HiViLTForImagesAnd"
    with pytest.raises(ValueError, match=message):
        make(model)
    inputs = vqa.processor(images=[JUDGED[0]["images"]], text="red", return_tensors="pt")
    model.train()(**inputs, labels=torch.tensor([1])).loss.backward()
    assert sum(one["score"] for one in make(model.eval())(JUDGED[0])) == pytest.approx(1)  # no sigmoids


def test_a_model_in_memory_is_judged_with(judge):
    made = pipeline("images-and-text-classification", model=judge.model, processor=judge.processor, device="cpu")
    assert type(made) is HiViLTImagesAndTextClassificationPipeline
    assert_same_labels(made(JUDGED), judge(JUDGED))


@pytest.mark.slow
@pytest.mark.checklist("13")
def test_reasoning_folder_judges_without_hivilt(said, judge):
    assert said["class of labels"] == ["HiViLTImagesAndTextClassificationPipeline", "transformers_modules"]
    images = [IMAGES["red"], Image.new("RGB", (31, 23), "blue")]
    expected = [labels_by_hand(judge, images, text) for text in ("is it red", "two")]
    assert_same_labels(said["labels"], [expected])
    assert_same_labels(said["labels, inferred"], [[best[:1] for best in expected]])


# Refusals


@pytest.mark.parametrize(
    ("image", "question", "error", "message"),
    [
        (IMAGES["red"], None, ValueError, "no question"),
        ("image.png", None, ValueError, "no question"),
        (Path("image.png"), None, ValueError, "no question"),
        (np.asarray(IMAGES["red"]), None, ValueError, "no question"),
        (None, None, ValueError, "no question"),
        (IMAGES["red"], "", ValueError, "position 0 is empty"),
        (IMAGES["red"], ["is it red", "  "], ValueError, "position 1 is empty"),
        (IMAGES["red"], [], ValueError, "at least one text"),
        (IMAGES["red"], 3, TypeError, "must hold strings, got int"),
        ("https://example.com/image.png", "is it red", ValueError, "not fetched from the web"),
        ("nowhere.png", "is it red", FileNotFoundError, "nowhere.png"),
        (__file__, "is it red", ValueError, "not a readable image"),
        (3, "is it red", TypeError, "An image must be .* got int"),
        (None, "is it red", TypeError, "An image must be .* got NoneType"),
        ({"image": IMAGES["red"]}, "is it red", TypeError, "An image must be .* got dict"),
        ({"image": IMAGES["red"]}, None, ValueError, r'"image" and "question", got \[\'image\'\]'),
        ({"question": "is it red"}, None, ValueError, r'"image" and "question", got \[\'question\'\]'),
        ([REQUESTS[0], "is it red"], None, ValueError, '"image" and "question", got str'),
        ([IMAGES["red"]], None, ValueError, '"image" and "question", got Image'),
        ([IMAGES["red"], IMAGES["blue"]], QUESTIONS, ValueError, "Many images take one question, got a list"),
        (iter([IMAGES["red"]]), QUESTIONS, ValueError, "Many images take one question"),
        (REQUESTS, QUESTIONS[0], ValueError, "question is given twice"),
        (b"\x89PNG", "is it red", TypeError, "got bytes; give PIL.Image.open"),
        ("data:image/png;base64,iVBO", "is it red", FileNotFoundError, r"give PIL\.Image\.open\(io\.BytesIO"),
        (np.zeros((2, 4, 4, 3), np.uint8), None, ValueError, '"image" and "question", got ndarray'),
    ],
)
def test_refuses_a_request_that_it_cannot_answer(vqa, image, question, error, message):
    with pytest.raises(error, match=message):
        vqa(image, question)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topk": 3}, "Unknown arguments: topk.*`top_k`"),
        ({"top_k": 0}, "`top_k` must be a whole number from 1 on, got 0"),
    ],
)
def test_refuses_an_argument_that_it_does_not_have(vqa, arguments, message):
    with pytest.raises(ValueError, match=message):
        vqa(IMAGES["red"], QUESTIONS[0], **arguments)
    with pytest.raises(ValueError, match=message):
        HiViLTVisualQuestionAnsweringPipeline(model=vqa.model, processor=vqa.processor, device="cpu", **arguments)


# From a folder


@pytest.fixture(scope="module")
def folders(vqa, find, judge, tmp_path_factory) -> Path:
    folders = tmp_path_factory.mktemp("pipelines")
    vqa.save_pretrained(folders / "qa")
    find.save_pretrained(folders / "grounding")
    judge.save_pretrained(folders / "reasoning")
    make_model(HiViLTForRetrieval, weight_scale=3).save_pretrained(folders / "retrieval")
    make_processor().save_pretrained(folders / "retrieval")
    IMAGES["red"].save(folders / "image.png")
    return folders


@pytest.fixture(scope="module")
def said(folders) -> dict:
    """What a process without hivilt and network got to hear."""
    return run_elsewhere(
        answer_everywhere,
        folders / "home",
        qa=folders / "qa",
        retrieval=folders / "retrieval",
        image=folders / "image.png",
        again=folders / "again",
        grounding=folders / "grounding",
        reasoning=folders / "reasoning",
    )


@pytest.mark.slow
@pytest.mark.checklist("13")
@pytest.mark.parametrize("how", ["task", "inferred", "saved again"])
def test_folder_answers_without_hivilt(said, vqa, how):
    assert said["class"] == ["HiViLTVisualQuestionAnsweringPipeline", "HiViLTProcessor", "transformers_modules"]
    assert_same_answers(said[how], vqa(IMAGES["red"], QUESTIONS))


@pytest.mark.slow
@pytest.mark.checklist("2")
@pytest.mark.parametrize("folder", ["qa", "again"])
def test_saved_pipeline_is_all_there(said, folders, folder):
    # "qa" was saved by the imported class, "again" by the one that came with it.
    for file in ("processor_config.json", "tokenizer.json", "processing_hivilt.py", "pipeline_hivilt.py"):
        assert (folders / folder / file).is_file()


@pytest.mark.slow
@pytest.mark.checklist("13")
def test_folder_answers_in_half_precision(said, vqa):
    is_half, answers = said["half"]
    assert is_half
    for question, (answer,) in zip(QUESTIONS, answers, strict=True):
        expected = {answer["answer"]: answer["score"] for answer in vqa(IMAGES["red"], question)}
        assert answer["score"] == pytest.approx(expected[answer["answer"]], abs=0.1)


@pytest.mark.slow
@pytest.mark.checklist("13")
def test_retrieval_folder_classifies_without_hivilt(said):
    model, processor = make_model(HiViLTForRetrieval, weight_scale=3), make_processor()
    labels = ["red", "blue circle", "three"]
    inputs = processor(images=IMAGES["red"], text=[labels], return_tensors="pt")
    inputs.pop("image_index")
    with torch.no_grad():
        scores = model(**inputs).logits_per_image.softmax(dim=-1)[0].tolist()
    expected = sorted(zip(scores, labels, strict=True), reverse=True)
    assert [answer["label"] for answer in said["zero-shot"]] == [label for _, label in expected]
    assert [answer["score"] for answer in said["zero-shot"]] == pytest.approx(
        [score for score, _ in expected], abs=1e-5
    )
    assert expected[0][0] - expected[-1][0] > 1e-3


def test_folder_answers_with_hivilt_imported(folders, vqa, tmp_path, monkeypatch):
    # The pipeline's code is still taken from the folder; keep the copy out of the user's cache.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    loaded = pipeline("visual-question-answering", model=str(folders / "qa"), trust_remote_code=True, device="cpu")
    assert type(loaded.model) is HiViLTForQuestionAnswering and type(loaded.processor) is type(vqa.processor)
    assert_same_answers(loaded(IMAGES["red"], QUESTIONS), vqa(IMAGES["red"], QUESTIONS))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


def saved_config(model, folder: Path) -> dict:
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_a_head_brings_its_own_pipeline_and_no_other(model_class, tmp_path):
    pipelines = saved_config(make_model(model_class), tmp_path)["custom_pipelines"]
    own = {
        HiViLTForQuestionAnswering: ["visual-question-answering"],
        HiViLTForVisualGrounding: ["zero-shot-object-detection"],
        HiViLTForImagesAndTextClassification: ["images-and-text-classification"],
    }
    assert list(pipelines) == own.get(model_class, [])


def test_pipeline_goes_and_comes_back_with_the_head(folders, tmp_path):
    with_pipeline = json.loads((folders / "qa" / "config.json").read_text(encoding="utf-8"))
    assert with_pipeline["custom_pipelines"]["visual-question-answering"] == {
        "impl": "pipeline_hivilt.HiViLTVisualQuestionAnsweringPipeline",
        "pt": ["AutoModelForVisualQuestionAnswering"],
        "type": "multimodal",
    }
    for model_class in (HiViLTForRetrieval, HiViLTModel):
        other = model_class.from_pretrained(folders / "qa")
        assert saved_config(other, tmp_path / "other")["custom_pipelines"] == {}
        back = saved_config(HiViLTForQuestionAnswering.from_pretrained(tmp_path / "other"), tmp_path / "back")
        assert back["custom_pipelines"] == with_pipeline["custom_pipelines"]
        assert back["auto_map"] == with_pipeline["auto_map"]
