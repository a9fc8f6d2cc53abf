"""`pipeline("visual-question-answering")` for HiViLT; transformers 5 has none of its own."""

import os
from collections.abc import Iterable, Iterator
from itertools import islice

from transformers import Pipeline
from transformers.utils import ModelOutput


class HiViLTVisualQuestionAnsweringPipeline(Pipeline):
    """
    Answers questions about pictures. Each picture is encoded once, however many questions it is asked.

    ```python
    vqa = pipeline("visual-question-answering", model=folder, trust_remote_code=True)
    vqa("picture.png", "what color is the square?")                      # [{"answer": ..., "score": ...}]
    vqa("picture.png", ["what shape is it?", "is it red?"], top_k=3)     # one list of answers for each question
    vqa([{"image": "a.png", "question": "what?"}, {"image": "b.png", "question": ["who?", "where?"]}])
    ```
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(self, image=None, question: str | list[str] | None = None, **kwargs):
        """
        Args:
            image: a picture (file path, PIL image, `uint8` array); or a dict with `image` and `question`; or a list or
                generator of such dicts.
            question (`str` or `list[str]`, *optional*): what to ask of the picture, unless `image` brings it.
            top_k (`int`, defaults to 5): answers for each question, best first.
            batch_size (`int`, defaults to 8): pictures in one pass of the model, where several are given.

        Returns:
            For one question a list of `{"answer": str, "score": float}`; for a list of questions a list of these; for
            several requests a list (for a generator, a generator) with one of either for each.

        Raises:
            ValueError, TypeError, FileNotFoundError: no question, an empty one, or no readable picture.
        """
        batch_size = kwargs.pop("batch_size", None) or self._batch_size or 8
        if question is not None:
            image = {"image": image, "question": question}
        if isinstance(image, dict):
            return super().__call__({"requests": [image]}, **kwargs)[0]
        if isinstance(image, (str, os.PathLike)) or hasattr(image, "shape") or not isinstance(image, Iterable):
            raise ValueError("There is no question: call the pipeline as `vqa(image, question)`.")
        answers = self._answer_all(iter(image), batch_size, kwargs)
        return list(answers) if isinstance(image, (list, tuple)) else answers

    def _answer_all(self, requests: Iterator[dict], batch_size: int, kwargs: dict) -> Iterator[list]:
        while batch := list(islice(requests, batch_size)):
            # One input: the processor batches requests, for it pairs questions with pictures; padding could not.
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
            if not isinstance(request, dict) or not {"image", "question"} <= set(request):
                raise ValueError(
                    'Each request must be a dict with "image" and "question", got '
                    f"{sorted(request) if isinstance(request, dict) else type(request).__name__}."
                )
        questions = [request["question"] for request in requests]
        nested = [list(group) if isinstance(group, (list, tuple)) else [group] for group in questions]
        inputs = self.processor(images=[request["image"] for request in requests], text=nested, return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return {"inputs": inputs, "questions": questions}

    def _forward(self, model_inputs: dict) -> dict:
        outputs: ModelOutput = self.model(**model_inputs["inputs"])
        return {"logits": outputs.logits, "questions": model_inputs["questions"]}

    def postprocess(self, model_outputs: dict, top_k: int = 5) -> list:
        config = self.model.config
        answers = iter(
            self.processor.post_process_question_answering(
                model_outputs["logits"],
                top_k=top_k,
                id2label=config.id2label,
                multi_label=config.problem_type == "multi_label_classification",
            )
        )
        return [
            [next(answers) for _ in group] if isinstance(group, (list, tuple)) else next(answers)
            for group in model_outputs["questions"]
        ]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Saves the model with its code, and the processor."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


__all__ = ["HiViLTVisualQuestionAnsweringPipeline"]
