"""Flags of transformers' `TrainingArguments` that have no meaning with HiViLT; docs/training_arguments.md lists all."""

from dataclasses import fields

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

# Refused at a value other than the default: why, and what to do instead.
REFUSED = {
    "average_tokens_across_devices": "the loss of a step is always the mean over the questions, or tokens, of all processes; leave it out",
    "batch_eval_metrics": "metrics are of whole splits; leave it out",
    "deepspeed": "evaluation needs whole weights on each process; shard with FSDP instead, see runs/fsdp.yaml",
    "enable_jit_checkpoint": "a run saves on SIGTERM and Ctrl-C as it is; leave it out",
    "eval_accumulation_steps": "evaluation keeps the best answers or the embeddings, and never all scores; leave it out",
    "eval_do_concat_batches": "evaluation gives one prediction a question; leave it out",
    "eval_use_gather_object": "evaluation always gathers objects; leave it out",
    "hub_always_push": "there is one push, at the end of a run; leave it out",
    "include_for_metrics": "compute_metrics is not called; compute others from predictions.jsonl",
    "label_names": "labels are called labels here; leave it out",
    "length_column_name": "batches are not grouped by length; leave it out",
    "liger_kernel_config": "Liger has no kernels for HiViLT; leave it out, --torch_compile fuses kernels",
    "logging_nan_inf_filter": "a loss that is not finite stops training; leave it out",
    "parallelism_config": "no tensor, context or sequence of HiViLT is split over devices; use FSDP, see runs/fsdp.yaml",
    "prediction_loss_only": "evaluation always measures; leave out --do_eval and --do_predict to do without it",
    "remove_unused_columns": "Trainer would drop images and texts before the collator sees them; leave it out, or False",
    "use_cache": "no keys are kept in training, and always in writing; leave it out",
    "use_liger_kernel": "Liger has no kernels for HiViLT; leave it out, --torch_compile fuses kernels",
}


def check_training_arguments(args: TrainingArguments) -> None:
    """Refuses what has no effect here, or would break a run later than at its start.

    Raises:
        ValueError: names the flag, what came, why not, and what to do instead.
    """
    wrong = {}
    if args.push_to_hub and HubStrategy(args.hub_strategy) != HubStrategy.END:
        wrong["hub_strategy"] = "checkpoints are pushed without the model's code, which nobody can load; expected 'end'"
    if args.train_sampling_strategy not in ("random", "sequential"):
        wrong["train_sampling_strategy"] = "lengths are not known when batches are made; expected random or sequential"
    if getattr(args.accelerator_config, "dispatch_batches", None):
        wrong["accelerator_config"] = (
            "dispatch_batches cuts images and texts, which differ in number, alike; leave it out"
        )
    # transformers' default of one suits rows whose columns are the model's inputs.
    usual = {field.name: field.default for field in fields(TrainingArguments)} | {"remove_unused_columns": False}
    for name, why in REFUSED.items():
        if getattr(args, name, None) not in (usual.get(name), None, "", []):
            wrong[name] = why
    if wrong:
        name, why = next(iter(wrong.items()))
        raise ValueError(f"{name}: got {getattr(args, name)!r}, but {why}.")
