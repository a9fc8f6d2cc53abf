"""Every flag of transformers' `TrainingArguments`: whether it works with HiViLT, is refused, or is left to transformers.

Arguments are checked by these tables, and docs/training_arguments.md is written from them.
"""

import dataclasses

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.training_args import OptimizerNames


def _without_note(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "")


# HiViLT has a part in what these do, or changes nothing that it has not been tried with: each has a test.
WORKS = {
    "output_dir": "A run is not begun anew over an earlier one unasked (--overwrite_output_dir).",
    "do_train": "With none of the three, a script does all of them.",
    "do_eval": "Also implied by eval_strategy.",
    "resume_from_checkpoint": "A folder, or `last`. What the checkpoint says of answers, tokens and layers holds.",
    "per_device_train_batch_size": "Questions, or images with their captions.",
    "per_device_eval_batch_size": "Changes no prediction.",
    "gradient_accumulation_steps": "The loss is the mean over the questions of a step. Retrieval: adds no negatives.",
    "learning_rate": "Of encoders: --vision_learning_rate, --text_learning_rate.",
    "label_smoothing_factor": "One answer a question; in the training loss alone. Refused for several answers and retrieval.",
    "bf16_full_eval": "Training, saving and pushing go on with the weights as they were.",
    "activation_checkpointing": "Changes no gradient.",
    "gradient_checkpointing": "Its older name.",
    "neftune_noise_alpha": "Noise on the text encoder's word embeddings, in training.",
    "auto_find_batch_size": "What is counted is counted anew.",
    "include_num_input_tokens_seen": "Counts tokens of texts.",
    "save_total_limit": "By default 2: the best and the last.",
    "save_only_model": "Such a checkpoint is no place to resume from, and is refused there.",
    "metric_for_best_model": "One that is measured here, or refused before training.",
    "data_seed": "Order, drawn captions and augmentation.",
    "dataloader_drop_last": "In training alone: evaluation counts every example.",
    "dataloader_num_workers": "Changes no weight.",
    "dataloader_persistent_workers": "Changes no weight.",
    "train_sampling_strategy": "`random`; question answering also `sequential`. Others group by lengths that are not known yet.",
    "push_to_hub": "One commit at the end, with card and results.",
    "hub_strategy": "`end`: checkpoints that Trainer pushes while it trains lack the model's code.",
    "hub_token": "Kept out of what is printed and saved.",
}
WORKS |= _without_note("""
    do_predict num_train_epochs max_steps weight_decay max_grad_norm bf16 torch_compile torch_compile_backend
    eval_strategy eval_steps eval_delay eval_on_start save_strategy save_steps load_best_model_at_end
    greater_is_better ignore_data_skip seed full_determinism use_cpu dataloader_prefetch_factor hub_model_id
    disable_tqdm
""")

# Without a meaning here, so that a value other than the default is refused: why, and what to do instead.
REFUSED = {
    "average_tokens_across_devices": "the loss of a step is always the mean over the questions of all processes; leave it out",
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
    "use_cache": "there is no decoder whose keys could be kept; leave it out",
    "use_liger_kernel": "Liger has no kernels for HiViLT; leave it out, --torch_compile fuses kernels",
}

# Trainer's own affair: HiViLT neither reads nor changes them.
LEFT = {
    "accelerator_config": "`dispatch_batches` is refused: it would cut images and texts, which differ in number, alike.",
    "dataloader_multiprocessing_context": "Datasets and collators pickle.",
    "dataloader_pin_memory": "Off where there is no accelerator.",
    "ddp_find_unused_parameters": "By default off; on where fused matching is, without which nothing trains the fusion.",
    "fp16": "Needs a GPU, and is refused without one. A step that the scaler leaves out is no divergence.",
    "fp16_full_eval": "As bf16_full_eval.",
    "fsdp": "Version 2 is what is tested, by `accelerate launch --config_file runs/fsdp.yaml`.",
    "log_level": "Of transformers.",
    "optim_target_modules": "Refused where `optim` does not read it.",
}
LEFT |= _without_note("""
    activation_checkpointing_kwargs adam_beta1 adam_beta2 adam_epsilon dataloader_in_order ddp_backend
    ddp_broadcast_buffers ddp_bucket_cap_mb ddp_static_graph ddp_timeout debug fsdp_config
    gradient_checkpointing_kwargs hub_private_repo hub_revision local_rank log_level_replica log_on_each_node
    logging_first_step logging_steps logging_strategy lr_scheduler_kwargs lr_scheduler_type optim optim_args project
    report_to restore_callback_states_from_checkpoint run_name save_on_each_node skip_memory_metrics tf32
    torch_compile_mode torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id
    warmup_steps
""")


def check_training_arguments(args: TrainingArguments) -> None:
    """Refuses what has no effect here, or would break a run later than at its start.

    Raises:
        ValueError: names the flag, what came, why not, and what to do instead.
    """
    if args.push_to_hub and HubStrategy(args.hub_strategy) != HubStrategy.END:
        raise ValueError(
            f"hub_strategy: got {HubStrategy(args.hub_strategy).value!r}, expected 'end'. While it trains, Trainer pushes "
            "checkpoints without the model's code, which nobody can load, and pickles of its arguments."
        )
    for field in dataclasses.fields(TrainingArguments):
        value = getattr(args, field.name)
        # transformers' default of one suits rows whose columns are the model's inputs.
        usual = False if field.name == "remove_unused_columns" else field.default
        if field.name in REFUSED and value not in (usual, None, "", []):
            raise ValueError(f"{field.name}: got {value!r}, but {REFUSED[field.name]}.")
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy: got {args.train_sampling_strategy!r}, expected 'random' or 'sequential': how long a "
            "text is, is not known before the collator encodes it."
        )
    if getattr(args.accelerator_config, "dispatch_batches", None):
        raise ValueError(
            "accelerator_config: got dispatch_batches=True, which would cut images and texts, that differ in number, "
            "alike; leave it out."
        )
    optim = OptimizerNames(args.optim).value
    if args.optim_target_modules is not None and not optim.startswith(("galore", "apollo", "lomo", "adalomo")):
        raise ValueError(
            f"optim_target_modules: got {args.optim_target_modules!r}, which {optim} does not read; leave it out, or name "
            "an --optim that does, such as galore_adamw."
        )


def page() -> str:
    """The text of docs/training_arguments.md."""
    lines = [
        "# Flags of `TrainingArguments`",
        "",
        "What becomes of each flag of transformers' `TrainingArguments` in `run_vqa.py`, `run_retrieval.py` and the trainers",
        "of `hivilt.tasks`. Written by `python -m hivilt.training.check_arguments > docs/training_arguments.md` from the table that",
        "arguments are checked by.",
    ]
    parts = [
        ("Works, and is tested", WORKS, "note"),
        ("Has no meaning here, and is refused before training", REFUSED, "why, and what to do instead"),
        ("Left to transformers", LEFT, "note"),
    ]
    for title, flags, heading in parts:
        lines += ["", f"## {title}", "", f"| flag | {heading} |", "|---|---|"]
        lines += [f"| `{name}` | {flags[name]} |" for name in sorted(flags)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
