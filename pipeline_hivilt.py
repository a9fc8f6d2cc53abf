"""Pipelines that encode each image once: `pipeline("visual-question-answering")`, which transformers 5 has no more,
`pipeline("images-and-text-classification")`, which it never had, and `pipeline("zero-shot-object-detection")`, in place of
transformers' own, which encodes the image anew for each label.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from numbers import Integral
from operator import itemgetter

from transformers import Pipeline

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def _are_many(given) -> bool:
    """Whether it is a list, data set or generator, rather than an image or a request."""
    if isinstance(given, (str, bytes, os.PathLike, Mapping)) or hasattr(given, "__array__"):
        return False
    return isinstance(given, Iterable) or (hasattr(given, "__getitem__") and hasattr(given, "__len__"))


def _rows(many) -> Iterator:
    return iter(many) if hasattr(many, "__iter__") else (many[place] for place in range(len(many)))


class _RequestPipeline(Pipeline):
    """What the pipelines share: requests, each of what is shown and of what is asked of it, answered in batches."""

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    # The names that a request has for what is shown and what is asked, and what messages call the latter and the head's work.
    _shown, _asked, _called, _does = "image", "", "", ""
    _parameters = ()  # of a call or of the pipeline

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not self._is_trained():
            config = self.model.config
            raise ValueError(
                f"{config._name_or_path} is a checkpoint of {', '.join(config.architectures or [])}: the head that {self._does} "
                f"is untrained. Name a checkpoint of {type(self.model).__name__}, or train one from this."
            )

    def _is_trained(self) -> bool:
        """Not if it was made from another head's checkpoint, and has seen no labels since: these set `problem_type`."""
        config, name = self.model.config, type(self.model).__name__
        return name in (config.architectures or [name]) or config.problem_type is not None

    def _with(self, image, asked):
        """Requests of an image or of many, which may be in rows of a data set, that ask the same; unless they ask themselves."""
        if getattr(image, "ndim", 0) in (1, 4):
            image = list(image)
        if asked is None:
            return image
        if not _are_many(image):
            return {self._shown: image, self._asked: asked}
        requests = (self._request(row, asked) for row in _rows(image))
        return list(requests) if isinstance(image, (list, tuple)) else requests

    def _request(self, image, asked) -> dict:
        row = image if isinstance(image, Mapping) else {self._shown: image}
        if self._asked in row:
            raise ValueError(f"The {self._called} is given twice: as an argument, and beside the image.")
        return {**row, self._asked: asked}

    def _answer(self, requests, batch_size: int | None = None, **kwargs):
        """The answer to a request, or of many a list or a generator of them."""
        if isinstance(requests, Mapping):
            return super().__call__({"requests": [requests]}, **kwargs)[0]
        if not _are_many(requests):
            raise ValueError(f"There is no {self._called}: call the pipeline with `{self._shown}` and `{self._asked}`.")
        answers = self._answer_all(_rows(requests), batch_size or self._batch_size or 8, kwargs)
        return list(answers) if isinstance(requests, (list, tuple)) else answers

    def _answer_all(self, requests: Iterator[dict], batch_size: int, kwargs: dict) -> Iterator[list]:
        while batch := list(islice(requests, batch_size)):
            # One input: the processor batches requests, for it pairs texts with images; padding could not.
            yield from super().__call__({"requests": batch}, **kwargs)

    def _sanitize_parameters(self, **kwargs):
        if unknown := [name for name in kwargs if name not in self._parameters]:
            known = "`, `".join([*self._parameters, "batch_size"])
            raise ValueError(f"Unknown arguments: {', '.join(unknown)}. This pipeline takes `{known}`.")
        if (top_k := kwargs.get("top_k")) is not None and not (isinstance(top_k, Integral) and top_k >= 1):
            raise ValueError(f"`top_k` must be a whole number from 1 on, got {top_k!r}.")
        return {}, {}, {name: value for name, value in kwargs.items() if value is not None}

    def _asked_of(self, requests: list[dict]) -> list:
        """What is asked, request by request."""
        for request in requests:
            if not isinstance(request, Mapping) or not {self._shown, self._asked} <= set(request):
                came = sorted(request) if isinstance(request, Mapping) else type(request).__name__
                raise ValueError(f'Each request must be a dict with "{self._shown}" and "{self._asked}", got {came}.')
        return [request[self._asked] for request in requests]

    def _encoded(self, images: list, texts: list[list[str]]) -> dict:
        return self.processor(images=images, text=texts, return_tensors="pt").to(self.model.dtype)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Saves the model with its code, and the processor."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


class _AnswerPipeline(_RequestPipeline):
    """Chooses among the answers of `config.id2label`."""

    _parameters = ("top_k",)
    _label = "answer"  # what a result calls its answer

    def preprocess(self, batch: dict) -> dict:
        asked = self._asked_of(batch["requests"])
        nested = [list(group) if isinstance(group, (list, tuple)) else [group] for group in asked]
        return {"inputs": self._encoded([one[self._shown] for one in batch["requests"]], nested), "asked": asked}

    def _forward(self, model_inputs: dict) -> dict:
        return {"logits": self.model(**model_inputs["inputs"]).logits, "asked": model_inputs["asked"]}

    def postprocess(self, model_outputs: dict, top_k: int = 5) -> list:
        logits, config = model_outputs["logits"], self.model.config
        if logits.isnan().any():
            raise ValueError("The scores are not numbers (NaN): look for such values in the weights of the checkpoint.")
        best = self.processor.post_process_question_answering(logits, top_k, config=config)
        answers = iter([[{self._label: one["answer"], "score": one["score"]} for one in row] for row in best])
        return [
            [next(answers) for _ in group] if isinstance(group, (list, tuple)) else next(answers)
            for group in model_outputs["asked"]
        ]


class HiViLTVisualQuestionAnsweringPipeline(_AnswerPipeline):
    """Answers questions about images. Each image is encoded once, however many questions it is asked.

    ```python
    vqa = pipeline("visual-question-answering", model=folder, trust_remote_code=True)
    vqa("image.png", "what color is the square?")                      # [{"answer": ..., "score": ...}]
    vqa("image.png", ["what shape is it?", "is it red?"], top_k=3)     # one list of answers for each question
    vqa(["a.png", "b.png"], "what shape is it?")                         # one list of answers for each image
    vqa([{"image": "a.png", "question": "what?"}, {"image": "b.png", "question": ["who?", "where?"]}])
    vqa(dataset)                                                         # of rows with an image and a question
    vqa = HiViLTVisualQuestionAnsweringPipeline(model=model, processor=processor)   # of a model in memory
    ```
    """

    _asked, _called, _does = "question", "question", "answers questions"

    def __call__(self, image=None, question: str | list[str] | None = None, **kwargs):
        """
        Args:
            image: an image (file path, PIL image, array or tensor); or a dict with `image` and `question`; or many of
                either: a list, a `datasets.Dataset`, a `KeyDataset` (a column of it) or a generator. An array or tensor
                with 4 dimensions is many images.
            question: what to ask of the image, unless `image` has it. Many images share a single question.
            top_k (`int`, defaults to 5): answers for each question, best first.
            batch_size (`int`, defaults to 8): images in one pass of the model, where several are given.

        Returns:
            For one question a list of `{"answer": str, "score": float}`; for a list of questions a list of these; for
            many images a list (of a data set or a generator, a generator) of either.

        Raises:
            ValueError, TypeError, FileNotFoundError: no question, an empty one, two, or no readable image.
        """
        if question is not None and not isinstance(question, str) and _are_many(image):
            raise ValueError(
                f"Many images take one question, got a {type(question).__name__}. Several, or each its own: "
                '`vqa([{"image": image, "question": ["first", "second"]}, ...])`.'
            )
        return self._answer(self._with(image, question), **kwargs)


class HiViLTImagesAndTextClassificationPipeline(_AnswerPipeline):
    """Judges what texts say of several images together. Each image of a batch is encoded once, however many texts and lists of
    images it is part of: the same object, or the same path.

    ```python
    judge = pipeline("images-and-text-classification", model=folder, trust_remote_code=True)
    judge(["left.png", "right.png"], "both show a dog")          # [{"label": "True", "score": 0.9}, ...]
    judge({"images": ["left.png", "right.png"], "text": ["both show a dog", "one shows a cat"]})   # a list of these a text
    judge([{"images": [a, b], "text": "both show a dog"}, {"images": [a, c], "text": "one shows a cat"}])
    judge(dataset)                                                # of rows with images and a text
    judge = HiViLTImagesAndTextClassificationPipeline(model=model, processor=processor)   # of a model in memory
    ```
    """

    _shown, _asked, _called, _does = "images", "text", "text", "judges images"
    _label = "label"

    def __call__(self, images=None, text: str | list[str] | None = None, **kwargs):
        """
        Args:
            images: with `text` a list of `config.num_images` images in their order (file paths, PIL images, arrays or tensors);
                without it a dict with such `images` and a `text`, or many of these: a list, a `datasets.Dataset` or a generator.
            text: what to judge of the images, or several of that.
            top_k (`int`, defaults to 5): labels for each text, the most probable first.
            batch_size (`int`, defaults to 8): lists of images in one pass of the model, where several are given.

        Returns:
            For one text a list of `{"label": str, "score": float}`; for a list of texts a list of these; for many requests a list
            (of a data set or a generator, a generator) of either.

        Raises:
            ValueError, TypeError, FileNotFoundError: no text, an empty one, another number of images than the model's, or no
                readable image.
        """
        return self._answer(images if text is None else {"images": images, "text": text}, **kwargs)

    def _asked_of(self, requests: list[dict]) -> list:
        asked, num_images = super()._asked_of(requests), self.model.config.num_images
        for images in (request["images"] for request in requests):
            came = f"{len(images)}" if isinstance(images, (list, tuple)) else f"a {type(images).__name__}"
            if came != f"{num_images}":
                raise ValueError(
                    f"`images` must be a list of {num_images} images, as many as this model looks at together "
                    f"(`config.num_images`), got {came}."
                )
        return asked


class HiViLTZeroShotObjectDetectionPipeline(_RequestPipeline):
    """Finds in images what expressions mean, with the calls and the results of transformers' own pipeline of that task. Each
    image is encoded once, however many expressions are looked for. Of boxes that overlap the best is kept, see
    [`HiViLTProcessor.post_process_grounding`].

    ```python
    find = pipeline("zero-shot-object-detection", model=folder, trust_remote_code=True)
    find("image.png", candidate_labels=["the dog on the left", "a red cup"])
    # [{"score": 0.9, "label": "a red cup", "box": {"xmin": 3, "ymin": 12, "xmax": 40, "ymax": 55}}, ...]
    find(["a.png", "b.png"], candidate_labels=["a dog", "a cat"])              # a list of these for each image
    find([{"image": "a.png", "candidate_labels": ["a dog"]}, {"image": "b.png", "candidate_labels": ["a cat"]}])
    find = HiViLTZeroShotObjectDetectionPipeline(model=model, processor=processor)   # of a model in memory
    ```
    """

    _asked, _called, _does = "candidate_labels", "expression", "finds boxes"
    _parameters = ("threshold", "top_k")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.processor.check_whole_images()

    def _is_trained(self) -> bool:
        last = self.model.row_head.box_regressor[-1].weight
        return last.is_meta or bool(last.any())

    def __call__(self, image=None, candidate_labels: str | list[str] | list[list[str]] | None = None, **kwargs):
        """
        Args:
            image: an image (file path, PIL image, array or tensor); or a dict with `image` and `candidate_labels`; or many of
                either: a list, a `datasets.Dataset`, a `KeyDataset` (a column of it) or a generator. An array or tensor
                with 4 dimensions is many images.
            candidate_labels: expressions to look for in the image or in each of the images, or for each of a list of images a
                list of its own, unless `image` has them.
            threshold (`float`, defaults to 0.1): what is found with a score that is not above it is left out.
            top_k (`int`, defaults to all): most that is found in an image, of all its expressions.
            batch_size (`int`, defaults to 8): images in one pass of the model, where several are given.

        Returns:
            For an image a list of `{"score": float, "label": str, "box": {"xmin": int, "ymin": int, "xmax": int, "ymax": int}}`,
            the best first, in pixels of the image as people see it; for many images a list (of a data set or a generator, a
            generator) of these.

        Raises:
            ValueError, TypeError, FileNotFoundError: no expression, an empty one, one string that could be several, or no
                readable image.
        """
        many = isinstance(image, (list, tuple)) and isinstance(candidate_labels, (list, tuple))
        if many and candidate_labels and all(isinstance(group, (list, tuple)) for group in candidate_labels):
            if len(candidate_labels) != len(image):
                raise ValueError(
                    f"{len(candidate_labels)} lists of expressions cannot be paired with {len(image)} images."
                )
            image = [self._request(*pair) for pair in zip(image, candidate_labels, strict=True)]
            candidate_labels = None
        return self._answer(self._with(image, candidate_labels), **kwargs)

    def preprocess(self, batch: dict) -> dict:
        nested = []
        for labels in self._asked_of(batch["requests"]):
            if isinstance(labels, str) and "," in labels:
                raise ValueError(
                    f"`candidate_labels` is one string with a comma, {labels!r}: give a list, of this alone if it is one "
                    "expression."
                )
            nested.append([labels] if isinstance(labels, str) else list(labels))
        images, sizes = [], []
        for request, labels in zip(batch["requests"], nested, strict=True):
            image = self.processor.load_image(request["image"])
            sizes += [(image.height, image.width)] * len(labels)
            images.append(self.processor.resize(image))  # at once, so that only one is in memory at its full size
        return {"inputs": self._encoded(images, nested), "labels": nested, "sizes": sizes}

    def _forward(self, model_inputs: dict) -> dict:
        inputs = model_inputs.pop("inputs")
        return {**model_inputs, "outputs": self.model(**inputs)}

    def postprocess(self, model_outputs: dict, threshold: float = 0.1, top_k: int | None = None) -> list:
        found = iter(self.processor.post_process_grounding(model_outputs["outputs"], model_outputs["sizes"], threshold))
        answers = []
        for labels in model_outputs["labels"]:
            answer = []
            for label, boxes in zip(labels, islice(found, len(labels)), strict=True):
                answer += [
                    # Cut to whole pixels, as transformers' pipeline does.
                    {"score": score, "label": label, "box": dict(zip(_CORNERS, map(int, box), strict=True))}
                    for score, box in zip(boxes["scores"].tolist(), boxes["boxes"].tolist(), strict=True)
                ]
            answers.append(sorted(answer, key=itemgetter("score"), reverse=True)[:top_k])
        return answers


__all__ = [
    "HiViLTImagesAndTextClassificationPipeline",
    "HiViLTVisualQuestionAnsweringPipeline",
    "HiViLTZeroShotObjectDetectionPipeline",
]
