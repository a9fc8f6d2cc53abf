"""Question answering in words, from no list: the questions, data and metrics of question answering, and a model that writes."""

import logging
import re
from pathlib import Path
from typing import Any

from hivilt.data.augmentation import Augmentation
from hivilt.data.vqa import VQADataset, VQAExample, WrittenAnswersCollator
from hivilt.generation_hivilt import HiViLTForConditionalGeneration
from hivilt.processing_hivilt import HiViLTProcessor
from hivilt.tasks.generation import GenerationTrainer, prepare_to_write
from hivilt.tasks.question_answering import QuestionAnswering, QuestionAnsweringTrainer
from hivilt.tasks.task import Task
from hivilt.training.results import warn_of_few

logger = logging.getLogger("hivilt")

# BERT's tokenizer sets a blank on either side of a sign, wherever there was none: t - shirt, 7 : 30, 3. 5, 50 %.
_SIGN_IN_A_WORD = re.compile(r"(?<=\w) ?([_\-/:'’]) ?(?=\w)|(?<=\d)(\.) (?=\d)|(?<=\d) (%)|(\$) (?=\d)")


def spelled(text: str) -> str:
    """An answer as people write it, from what a tokenizer's `decode` makes of its tokens.

    >>> spelled("garbage _ bin, t - shirt"), spelled("7 : 30"), spelled("3. 5 %")
    ('garbage_bin, t-shirt', '7:30', '3.5%')
    """
    return _SIGN_IN_A_WORD.sub(lambda match: match[match.lastindex], text).strip()


class OpenEndedTrainer(GenerationTrainer, QuestionAnsweringTrainer):
    """Trains and evaluates on a `VQADataset` a model that writes; metrics are those of `QuestionAnsweringTrainer`, and the loss
    is a mean over tokens. A score is the probability of an answer, token by token."""

    def answer(self, model, inputs: dict[str, Any]):
        beams = max(model.generation_config.num_beams or 1, self.top_k)
        options = {"num_beams": beams, "num_return_sequences": self.top_k, "length_penalty": 0.0}
        written, losses = self.write(model, inputs, output_scores=True, return_dict_in_generate=True, **options)
        texts = self.processing_class.batch_decode(written.sequences, skip_special_tokens=True)
        # Without a penalty for length a beam's score is the log probability of all of it.
        answers = [
            {"answer": spelled(text), "score": score}
            for text, score in zip(texts, written.sequences_scores.exp().tolist(), strict=True)
        ]
        rows = [answers[start : start + self.top_k] for start in range(0, len(answers), self.top_k)]
        return zip(rows, losses, strict=True)


class OpenEndedAnswering(QuestionAnswering):
    """Answers questions about images in words."""

    name = "open-ended question answering"
    pipeline_tag = "image-text-to-text"
    card_template = "open_ended_answering.md"
    model_class = HiViLTForConditionalGeneration
    trainer_class = OpenEndedTrainer

    def texts_of(self, example: VQAExample) -> tuple[str, ...]:
        return (example.question, *example.answers)

    def make_model(self, train: list[VQAExample] | None) -> tuple[HiViLTForConditionalGeneration, HiViLTProcessor]:
        model, processor = Task.make_model(self, train, decoder=self.args.decoder_model)
        prepare_to_write(model, processor, self.args, train is not None)
        return model, processor

    def make_dataset(self, split: str, examples: list[VQAExample]) -> tuple[VQADataset, dict[str, Any]]:
        answered = [example for example in examples if example.answers]
        facts = {"images": len({example.image_id for example in examples}), "questions": len(examples)}
        if split != "train":
            warn_of_few(split, len(answered), "questions with a known answer")
            return VQADataset(examples), facts
        facts["dropped_questions"] = dropped = len(examples) - len(answered)
        if dropped:
            logger.info(f"train: dropped {dropped:,} questions without an answer")
        return VQADataset(answered, seed=self.training_args.draw_seed), facts

    def collator(self, processor: HiViLTProcessor, augmentation: Augmentation | None) -> WrittenAnswersCollator:
        return WrittenAnswersCollator(processor, augmentation=augmentation)

    def try_next(self, folder: Path) -> str:
        return f"python run_vqa.py --generate --model_name_or_path {folder} --do_predict --test_file FILE --output_dir {folder}/answers"
