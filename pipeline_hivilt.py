"""`pipeline("visual-question-answering")` for HiViLT; transformers 5 has none of its own."""

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from transformers import Pipeline


def _are_many(image) -> bool:
    """Whether it is a list, data set or generator, rather than an image or a request."""
    if isinstance(image, (str, bytes, os.PathLike, Mapping)) or hasattr(image, "__array__"):
        return False
    return isinstance(image, Iterable) or (hasattr(image, "__getitem__") and hasattr(image, "__len__"))


def _asked(image, question: str) -> dict:
    """A request of an image, which may be in the row of a data set."""
    row = image if isinstance(image, Mapping) else {"image": image}
    if "question" in row:
        raise ValueError("The question is given twice: as an argument, and beside the image.")
    return {**row, "question": question}


class HiViLTVisualQuestionAnsweringPipeline(Pipeline):
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

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config = self.model.config
        saved_as = config.architectures or [type(self.model).__name__]
        # A head that was trained since has set `problem_type`.
        if type(self.model).__name__ not in saved_as and config.problem_type is None:
            raise ValueError(
                f"{config._name_or_path} is a checkpoint of {', '.join(saved_as)}: the head that answers questions is "
                f"untrained, its answers chance. Name a checkpoint of {type(self.model).__name__}, or train one from this."
            )

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
        batch_size = kwargs.pop("batch_size", None) or self._batch_size or 8
        if getattr(image, "ndim", 0) in (1, 4):
            image = list(image)
        if not _are_many(image):
            if question is not None:
                image = {"image": image, "question": question}
            if not isinstance(image, Mapping):
                raise ValueError("There is no question: call the pipeline as `vqa(image, question)`.")
            return super().__call__({"requests": [image]}, **kwargs)[0]
        if question is not None and not isinstance(question, str):
            raise ValueError(
                f"Many images take one question, got a {type(question).__name__}. Several, or each its own: "
                '`vqa([{"image": image, "question": ["first", "second"]}, ...])`.'
            )
        requests = iter(image) if hasattr(image, "__iter__") else (image[place] for place in range(len(image)))
        if question is not None:
            requests = (_asked(row, question) for row in requests)
        answers = self._answer_all(requests, batch_size, kwargs)
        return list(answers) if isinstance(image, (list, tuple)) else answers

    def _answer_all(self, requests: Iterator[dict], batch_size: int, kwargs: dict) -> Iterator[list]:
        while batch := list(islice(requests, batch_size)):
            # One input: the processor batches requests, for it pairs questions with images; padding could not.
            yield from super().__call__({"requests": batch}, **kwargs)

    def _sanitize_parameters(self, top_k: int | None = None, **kwargs):
        if kwargs:
            raise ValueError(f"Unknown arguments: {', '.join(kwargs)}. This pipeline takes `top_k` and `batch_size`.")
        if top_k is not None and top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
        return {}, {}, {} if top_k is None else {"top_k": top_k}

    def preprocess(self, batch: dict) -> dict:
        requests = batch["requests"]
        for request in requests:
            if not isinstance(request, Mapping) or not {"image", "question"} <= set(request):
                came = sorted(request) if isinstance(request, Mapping) else type(request).__name__
                raise ValueError(f'Each request must be a dict with "image" and "question", got {came}.')
        questions = [request["question"] for request in requests]
        nested = [list(group) if isinstance(group, (list, tuple)) else [group] for group in questions]
        inputs = self.processor(images=[request["image"] for request in requests], text=nested, return_tensors="pt")
        return {"inputs": inputs.to(self.model.dtype), "questions": questions}

    def _forward(self, model_inputs: dict) -> dict:
        return {"logits": self.model(**model_inputs["inputs"]).logits, "questions": model_inputs["questions"]}

    def postprocess(self, model_outputs: dict, top_k: int = 5) -> list:
        logits, config = model_outputs["logits"], self.model.config
        answers = iter(self.processor.post_process_question_answering(logits, top_k, config=config))
        return [
            [next(answers) for _ in group] if isinstance(group, (list, tuple)) else next(answers)
            for group in model_outputs["questions"]
        ]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Saves the model with its code, and the processor."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


__all__ = ["HiViLTVisualQuestionAnsweringPipeline"]
