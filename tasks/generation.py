"""What the tasks share whose model writes, captioning and open-ended question answering."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import Seq2SeqLMOutput

from hivilt.generation_hivilt import HiViLTForConditionalGeneration
from hivilt.inputs_hivilt import check_decoder_length
from hivilt.processing_hivilt import HiViLTProcessor
from hivilt.tasks.arguments import GenerationArguments
from hivilt.training.trainer import HiViLTTrainer


def prepare_to_write(
    model: HiViLTForConditionalGeneration, processor: HiViLTProcessor, args: GenerationArguments, trains: bool
) -> None:
    """Tells a model that is to be trained the tokens that its texts begin and end with, and any how it searches for them; what
    the flags leave open is the checkpoint's, and is noted in them."""
    config, tokenizer = model.generation_config, processor.tokenizer
    if trains:
        model.set_decoder_tokens(tokenizer)
        # An empty text is none, and decoding leaves these out.
        config.update(min_new_tokens=1, suppress_tokens=sorted({*tokenizer.all_special_ids} - {config.eos_token_id}))
    for name, usual in args.written.items():
        value = getattr(args, name)
        if value is None:
            value = getattr(config, name) or usual
        setattr(config, name, value)
        setattr(args, name, value)
    check_decoder_length("max_new_tokens", args.max_new_tokens, model.config)


class GenerationTrainer(HiViLTTrainer):
    """Trains `HiViLTForConditionalGeneration`. The loss of a step is the mean over all tokens that are to be written, whatever
    the accumulated batches and processes, and that of evaluation the mean over those of the split, without
    `label_smoothing_factor`; evaluation writes by the model's `generation_config`. Training reads no more tokens of a text
    than that lets the model write."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Not by Trainer's smoother, which takes the labels out of the batch; and the share of a batch is taken here.
        self.label_smoother, self.model_accepts_loss_kwargs = None, False
        self.model.config.label_smoothing = self.args.label_smoothing_factor
        if self.args.bf16 and self.args.device.type == "cpu":
            # Of torch's fused attention on a CPU the backward pass takes several times as long in bfloat16.
            self.model.decoder.set_attn_implementation("eager")

    def count(self, inputs: Mapping[str, Any]) -> int:
        """The texts of a batch that are to be written."""
        return len(inputs["labels"])

    def weigh(self, inputs: Mapping[str, Any]) -> int:
        """Their tokens."""
        return int((self._cut(inputs["labels"]) >= 0).sum())

    def _cut(self, labels: torch.LongTensor) -> torch.LongTensor:
        return labels[:, : self.model.generation_config.max_new_tokens]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss as its share in the mean over the tokens of the step."""
        inputs = {**inputs, "labels": self._cut(inputs["labels"])}
        loss, outputs = HiViLTTrainer.compute_loss(self, model, inputs, return_outputs=True)
        loss = self.step_share(loss, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def token_losses(self, model, labels: torch.LongTensor, **inputs) -> tuple[torch.Tensor, Seq2SeqLMOutput]:
        """The loss of each token of `labels` `(B_c, N_d)`, 0 where there is none, of a model in whatever wraps it; its outputs."""
        read = self.model.prepare_decoder_input_ids_from_labels(labels)
        outputs = model(**inputs, decoder_input_ids=read, use_cache=False)
        losses = F.cross_entropy(outputs.logits.flatten(0, 1).float(), labels.flatten(), reduction="none")  # 0 for -100
        return losses.view(labels.shape), outputs

    def write(self, model, inputs: dict[str, Any], **options) -> tuple[Any, list[tuple[float, int]]]:
        """What `generate` gives for a batch with these `options`, and of each row the loss of its labels, summed over their
        tokens, with the number of these. Images and texts are encoded and fused once."""
        labels, text_index = inputs.pop("labels", None), inputs.pop("text_index", None)
        encoded = model.get_encoder()(**inputs)
        written = model.generate(encoder_outputs=encoded, **options)
        num_rows = len(encoded.last_hidden_state)
        if labels is None:
            return written, [(0.0, 0)] * num_rows
        losses, _ = self.token_losses(model, labels, encoder_outputs=encoded, text_index=text_index)
        rows = torch.arange(num_rows, device=labels.device) if text_index is None else text_index
        sums = losses.new_zeros(num_rows).index_add(0, rows, losses.sum(1))
        counts = rows.new_zeros(num_rows).index_add(0, rows, (labels >= 0).sum(1))
        return written, list(zip(sums.tolist(), counts.tolist(), strict=True))

    def mean_loss(self, losses: Sequence[tuple[float, int]]) -> float | None:
        """The mean over all tokens of a split, from what `write` gives of its rows."""
        tokens = sum(count for _, count in losses)
        return sum(loss for loss, _ in losses) / tokens if tokens else None
