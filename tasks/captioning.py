"""Captioning: its data, its trainer, what it measures and reports."""

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from hivilt.data.augmentation import Augmentation
from hivilt.data.caption_benchmarks import CAPTION_BENCHMARKS
from hivilt.data.captions import CaptionDataset, CaptionedImage, CaptioningCollator
from hivilt.data.tables import open_image
from hivilt.evaluation.captioning import caption_scores, cider_d, document_frequencies
from hivilt.evaluation.plots import GeneratedCaption, plot_captions
from hivilt.evaluation.submissions import submission
from hivilt.generation_hivilt import HiViLTForConditionalGeneration
from hivilt.processing_hivilt import HiViLTProcessor
from hivilt.tasks.arguments import CaptioningArguments
from hivilt.tasks.captioned import read_captioned
from hivilt.tasks.generation import GenerationTrainer, prepare_to_write
from hivilt.tasks.task import Task, spread, write_rows
from hivilt.training.cards import python_literal
from hivilt.training.results import warn_of_few

logger = logging.getLogger("hivilt")

PROMPT = "an image of"  # of a new model, unless another is named
SCORES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")
NUM_SAMPLES = 5  # captions of an image that are rewarded beside each other


class CaptioningTrainer(GenerationTrainer):
    """
    Trains and evaluates on a `CaptionDataset(prompt=...)`.

    With `self_critical` the model learns from captions that it samples: the loss of an image is the mean over `NUM_SAMPLES` of
    `-(CIDEr-D - mean CIDEr-D of the others) * log p(caption)` (Rennie et al., arXiv 1612.00563, with the baseline of Luo,
    arXiv 2003.09971). Logged beside the loss is `reward`, the mean CIDEr-D of all samples since the last log, of all processes.
    """

    unit = "captions"
    place_name = "image_number"

    def __init__(self, *args, self_critical: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.self_critical = self_critical
        if self_critical:
            self.frequencies = document_frequencies([one.captions for one in self.train_dataset.examples])
            self._rewards: list[float] = []  # since the last log

    def weigh(self, inputs: Mapping[str, Any]) -> int:
        """The tokens of the captions, or the images whose samples are rewarded."""
        return len(inputs[self.place_name]) if self.self_critical else super().weigh(inputs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.self_critical:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        apart = ("labels", "text_index", self.place_name)
        given = {name: value for name, value in inputs.items() if name not in apart}
        writer = self.accelerator.unwrap_model(model).eval()
        sampling = {"do_sample": True, "num_beams": 1, "top_k": 0, "num_return_sequences": NUM_SAMPLES}
        with torch.no_grad():
            tokens = writer.generate(encoder_outputs=writer.get_encoder()(**given), **sampling)[:, 1:]
        writer.train()
        captions = self.processing_class.batch_decode(tokens, skip_special_tokens=True)
        references = [self.train_dataset.examples[image].captions for image in inputs[self.place_name].tolist()]
        images = torch.arange(len(references), device=tokens.device).repeat_interleave(NUM_SAMPLES)
        rewards = cider_d(captions, [references[image] for image in images], self.frequencies)
        self._rewards += rewards.tolist()
        rewards = torch.tensor(rewards, dtype=torch.float, device=tokens.device).view(-1, NUM_SAMPLES)
        advantages = (rewards - rewards.mean(dim=1, keepdim=True)) * NUM_SAMPLES / (NUM_SAMPLES - 1)

        is_end = tokens == writer.generation_config.eos_token_id
        labels = tokens.masked_fill(is_end.cumsum(dim=1) > is_end.long(), -100)  # nothing after the first end
        losses, outputs = self.token_losses(model, labels, text_index=images, **given)
        loss = (advantages.flatten() * losses.sum(dim=1)).mean()
        loss = self.step_share(loss, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As Trainer's, which all processes call; see `reward` above."""
        if self.self_critical and "loss" in logs:
            sums = torch.tensor([sum(self._rewards), len(self._rewards)], device=self.args.device)
            total, count = self.accelerator.reduce(sums).tolist()
            logs["reward"], self._rewards = total / count, []
        super().log(logs, *args, **kwargs)

    def metric_names(self, dataset: CaptionDataset) -> set[str]:
        return {"loss", "distinct", *SCORES}

    def measure(self, model, batches, dataset):
        """Captions every image of a `CaptionDataset`.

        Returns:
            The captions, in the dataset's order; `loss` and what `caption_scores` gives, where the images have captions; how
            many captions were written.
        """

        def captions_and_losses(inputs):
            written, losses = self.write(model, inputs)
            captions = self.processing_class.batch_decode(written, skip_special_tokens=True)
            return zip(map(str.strip, captions), losses, strict=True)

        measured = self.measure_each(batches, captions_and_losses, len(dataset.examples))
        captions, losses = zip(*measured, strict=True)
        known = [place for place, example in enumerate(dataset.examples) if example.captions]
        metrics = {}
        if known:
            metrics["loss"] = self.mean_loss(losses)
            references = [dataset.examples[place].captions for place in known]
            metrics |= caption_scores([captions[place] for place in known], references)
        return list(captions), metrics, len(captions)


class Captioning(Task):
    """Writes captions of images."""

    name = "captioning"
    script = "run_captioning.py"
    pipeline_tag = "image-text-to-text"
    card_template = "captioning.md"
    arguments = CaptioningArguments
    benchmarks = CAPTION_BENCHMARKS
    model_class = HiViLTForConditionalGeneration
    trainer_class = CaptioningTrainer

    def read(self, splits: Collection[str]) -> tuple[str, dict[str, list[CaptionedImage]]]:
        return read_captioned(self.args, splits, self.benchmark, captions_needed=False)

    def texts_of(self, example: CaptionedImage) -> tuple[str, ...]:
        return (self.args.prompt or PROMPT, *example.captions)

    def make_model(self, train: list[CaptionedImage] | None) -> tuple[HiViLTForConditionalGeneration, HiViLTProcessor]:
        model, processor = super().make_model(train, decoder=self.args.decoder_model)
        prepare_to_write(model, processor, self.args, train is not None)
        tokenizer, known = processor.tokenizer, model.config.prompt_ids
        if self.args.prompt is not None and len(tokenizer(self.args.prompt)["input_ids"]) > tokenizer.model_max_length:
            raise ValueError(f"prompt: the text encoder reads {tokenizer.model_max_length} tokens; give fewer words.")
        if self.args.prompt is None:
            self.args.prompt = PROMPT if known is None else tokenizer.decode(known, skip_special_tokens=True)
            if known is not None and tokenizer(self.args.prompt)["input_ids"] != list(known):
                raise ValueError(
                    f"prompt: that of {self.args.model_name_or_path} cannot be told from its tokens, which read "
                    f"{self.args.prompt!r}; give --prompt."
                )
        if train is not None:
            model.config.prompt_ids = tokenizer(self.args.prompt)["input_ids"]
        return model, processor

    def make_dataset(self, split: str, examples: list[CaptionedImage]) -> tuple[CaptionDataset, dict[str, Any]]:
        if split == "train":
            drawn = {"captions_per_image": self.args.captions_per_image, "seed": self.training_args.draw_seed}
            dataset = CaptionDataset(examples, prompt=self.args.prompt, **drawn)
        else:
            dataset = CaptionDataset(examples, prompt=self.args.prompt)
            warn_of_few(split, sum(bool(example.captions) for example in examples), "captioned images")
        logger.info(f"{split}: {len(dataset.captions):,} captions of {len(dataset):,} images")
        return dataset, {"images": len(dataset), "captions": len(dataset.captions)}

    def collator(self, processor: HiViLTProcessor, augmentation: Augmentation | None) -> CaptioningCollator:
        return CaptioningCollator(processor, self.args.prompt, augmentation=augmentation)

    def trainer_arguments(self) -> dict[str, Any]:
        return {"self_critical": self.args.self_critical}

    def write(self, folder: Path, dataset: CaptionDataset, predictions: list[str]) -> None:
        write_rows(folder / "predictions.jsonl", map(prediction_row, dataset.examples, predictions))
        if self.args.benchmark == "coco":
            path = folder / f"captions_{self.args.test_split or self.benchmark.splits['test']}_hivilt_results.json"
            path.write_text(json.dumps(submission("coco", [e.image_id for e in dataset.examples], predictions)) + "\n")
            logger.info(f"{path.name}: {len(predictions):,} captions for the server of {self.benchmark.title}")
        shown = spread(len(dataset), 12)
        examples = [dataset.examples[place] for place in shown]
        cells = [
            GeneratedCaption(open_image(example.image), predictions[place], next(iter(example.captions), None))
            for place, example in zip(shown, examples, strict=True)
        ]
        plot_captions(cells, folder / "captions.png")

    def summary(self, results: Mapping[str, Any], split: str) -> str:
        measured = results[split]
        if "cider_d" not in measured:
            return ""
        scores = ", ".join(f"{NAMES[name]} {measured[name]:.3f}" for name in SCORES)
        return f"{split}: {scores} on {results['data'][split]['images']:,} images"

    def card(
        self, trainer: CaptioningTrainer, results: Mapping[str, Any], splits: Mapping[str, list[CaptionedImage]]
    ) -> dict[str, Any]:
        return {
            "metrics": {name: NAMES[name] for name in SCORES},
            "metric_ids": ["cider"],
            "tags": ["image-captioning"],
            "image": "![Images and the captions written about them](captions.png)",
            "prompt": python_literal(self.args.prompt),
        }

    def try_next(self, folder: Path) -> str:
        return f"python app.py --captioning {folder}"


NAMES = {name: f"BLEU-{name[-1]}" for name in SCORES[:4]} | {"rouge_l": "ROUGE-L", "cider_d": "CIDEr-D"}


def prediction_row(example: CaptionedImage, caption: str) -> dict[str, Any]:
    """An image of predictions.jsonl."""
    return {"image": example.image_id, "caption": caption, "captions": list(example.captions)}
