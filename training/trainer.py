"""transformers' Trainer for images with several texts, with what all heads ask of it."""

import logging
import math
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput
from transformers.training_args import OptimizerNames

from hivilt.data.tables import EpochDataset, open_image
from hivilt.evaluation.familiarity import MIN_IMAGES, features_of_images, image_features, measure_familiarity, noise
from hivilt.training.callbacks import Beginnings, BreakTies, SaveOnSignal, ShortPrinter, ShortProgress
from hivilt.training.check_arguments import check_training_arguments
from hivilt.training.encoder_cache import EncoderCache
from hivilt.training.resuming import check_resumable, checkpoints, is_whole, last_checkpoint

logger = logging.getLogger(__name__)

SMALLEST_LOSS_SCALE = 1e-4  # fairseq's bound: below it float16 leaves out every step
FAMILIARITY_IMAGES = 1_000  # of a split, on which familiarity is measured at most


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Within it the CPU takes denormal numbers for zero. Gradients of what is learned well are such, and it computes with them
    at a fraction of its speed."""
    flushed = not (torch.full((1,), 1e-30) * 1e-10).any()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed)


class HiViLTTrainer(Trainer):
    """What all heads ask of `Trainer`. It writes no model card: `hivilt.training.cards` does, from measured values.

    A head's trainer has `measure` and `metric_names`, and to be calibrated `_find_temperature` and `_divide_scores`.

    Args:
        vision_learning_rate, text_learning_rate: of an encoder; default: that of everything else, `learning_rate`. A
            pretrained encoder wants a smaller one than new layers do (METER: fusion 5 times, head 50 times as much).
        encoder_cache: what frozen encoders gave of the data sets, in place of running them in every epoch; default: the
            collator's own. FSDP, DeepSpeed, `bf16_full_eval` and `fp16_full_eval` do without.
        **kwargs: as `Trainer`; `processing_class` is the `HiViLTProcessor`.

    Raises:
        ValueError: the process sees several devices, or `args` have a flag that has no meaning here, see
            docs/training_arguments.md.
    """

    unit: ClassVar[str]  # what the head is trained and measured on, in the plural
    place_name: ClassVar[str] = ""  # what a batch calls the places of its texts in their split; no input of the model
    placed: ClassVar[str] = "examples"  # the attribute of a data set that these are places in
    most_calibrated: ClassVar[int] = 1_000  # examples that a temperature is fitted on at most

    def __init__(
        self,
        *args,
        vision_learning_rate: float | None = None,
        text_learning_rate: float | None = None,
        encoder_cache: EncoderCache | None = None,
        **kwargs,
    ):
        # Before Trainer makes a repository to push to.
        if (arguments := kwargs.get("args", args[1] if len(args) > 1 else None)) is not None:
            check_training_arguments(arguments)
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            # nn.DataParallel cuts every tensor into as many pieces, but images and texts differ in number.
            raise ValueError(
                f"This process sees {self.args.n_gpu} devices. Start one process for each (accelerate launch or "
                "torchrun), or show it one: CUDA_VISIBLE_DEVICES=0."
            )
        if self.compute_metrics is not None or self.preprocess_logits_for_metrics is not None:
            raise ValueError(
                f"compute_metrics, preprocess_logits_for_metrics: expected None; {type(self).__name__} measures whole "
                "splits by itself. Compute others from what predict() returns."
            )
        if self.args.bf16 or self.args.fp16:
            # Convolutions of half precision are made for it, on CPUs and GPUs.
            self.model.to(memory_format=torch.channels_last)
        rates = {"vision_model": vision_learning_rate, "text_model": text_learning_rate}
        self.encoder_learning_rates = {name: rate for name, rate in rates.items() if rate is not None}
        if encoder_cache is None:
            encoder_cache = getattr(self.data_collator, "encoder_cache", None)
        in_pieces = self.is_fsdp_enabled or self.is_deepspeed_enabled  # the weights of encoders
        # States are of the model that trains, and not of one that evaluation casts.
        casts = self.args.bf16_full_eval or self.args.fp16_full_eval
        self.encoder_cache = None if in_pieces or casts else encoder_cache
        if encoder_cache is not None:
            # A copy: the states are of this trainer's model, and the collator may go to another one.
            self.data_collator = copy(self.data_collator)
            self.data_collator.encoder_cache = self.encoder_cache
        self.num_examples_trained = 0  # what `count` counts, on all processes together
        self.seconds_evaluating = 0.0  # of training
        self.resumed_at_step = 0
        self.calibration: dict[str, Any] | None = None
        self.familiarity: dict[str, Any] | None = None
        self._step_loss: torch.Tensor | float = 0.0
        for usual, short in ((ProgressCallback, ShortProgress), (PrinterCallback, ShortPrinter)):
            if self.pop_callback(usual) is not None:
                self.add_callback(short)
        self._begins, self._signals = Beginnings(self), SaveOnSignal()
        self.add_callback(self._begins)
        self.add_callback(BreakTies())
        self.add_callback(self._signals)
        if self.is_fsdp_enabled:
            # FSDP2 shards no scalars: the temperatures are left whole on every process, and their gradients averaged here.
            whole = nn.ParameterList(p for p in self.model.parameters() if p.dim() == 0).to(self.args.device)
            self.accelerator.state.fsdp_plugin.ignored_modules = [whole]
            for scalar in whole:
                if scalar.requires_grad:
                    scalar.register_hook(partial(self.accelerator.reduce, reduction="mean"))

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Within it each process has all weights, also of a model that FSDP shards: parts of it can be called, and by one
        process alone. To be entered by all processes."""
        sharded = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for module in sharded:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in sharded:
                # As accelerate set it.
                reshards = self.accelerator.state.fsdp_plugin.reshard_after_forward and module is not self.model
                module.set_reshard_after_forward(reshards, recurse=False)
                module.reshard()

    # Batches

    def _get_dataloader(self, dataset, *args, is_training: bool = False, **kwargs) -> DataLoader:
        """As Trainer's; encodes first what is not in the cache: each time, since weights may have changed."""
        split = getattr(dataset, "dataset", dataset)  # of a split by image, the split itself
        if self.encoder_cache is not None and isinstance(split, EpochDataset):
            parts = ["vision", "text"] if self.args.neftune_noise_alpha is None else ["vision"]
            if "text" not in parts:  # noise at the embeddings changes what the encoder gives
                self.encoder_cache.stores.pop("text", None)
            with self._signals.paused():
                self.encoder_cache.add(
                    split,
                    self.model,
                    self.data_collator.processor,
                    parts=parts,
                    augmentation=getattr(self.data_collator, "augmentation", None),
                    batch_size=self.args.per_device_eval_batch_size,
                    num_workers=self.args.dataloader_num_workers,
                    progress=not self.args.disable_tqdm and self.is_local_process_zero(),
                )
        usual = self.args
        if not is_training:
            self.args = copy(usual)
            self.args.dataloader_drop_last = False  # evaluation counts every example
            # A loader that is kept has workers that know nothing of weights that changed since.
            self.args.dataloader_persistent_workers &= self.encoder_cache is None
        try:
            loader = super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        finally:
            self.args = usual
        if is_training and self.args.dataloader_drop_last and len(loader) == 0:
            raise ValueError(
                f"dataloader_drop_last: the training data does not fill one batch of {self._train_batch_size} on each of "
                f"{self.args.world_size} processes; leave it out, or lower per_device_train_batch_size."
            )
        return loader

    def count(self, inputs: Mapping[str, Any]) -> int:
        """How many of what `unit` names a batch trains: its texts."""
        return len(inputs["input_ids"])

    def weigh(self, inputs: Mapping[str, Any]) -> int:
        """How many terms the loss of a batch is the mean of."""
        return self.count(inputs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one step, and what they `weigh` on all processes together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        sums = torch.tensor([[sum(map(of, batches)) for of in (self.count, self.weigh)]], device=device)
        count, weight = self.accelerator.gather(sums).sum(dim=0)
        self.num_examples_trained += int(count)
        return batches, weight

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """As Trainer's; `resume_from_checkpoint=True` goes on from `last_checkpoint`, and without one begins.

        Raises:
            ValueError: the checkpoint is cut off or of another model or optimizer; evaluation does not measure
                `metric_for_best_model`; training diverged, and nothing was saved after it did.
            OSError: a checkpoint cannot be written; those before it are intact.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                logger.warning(f"{self.args.output_dir} has no checkpoint to go on from: training begins.")
        self._check_metric_for_best_model()
        if self.args.neftune_noise_alpha is not None:
            self._expect_noise()
        if resume_from_checkpoint:
            check_resumable(resume_from_checkpoint, self.model, self.processing_class)
        self._begins.resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        with self._signals.listening(), flushed_denormals():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_metric_for_best_model(self) -> None:
        metric, dataset = self.args.metric_for_best_model, self.eval_dataset
        if metric is None or dataset is None:
            return
        splits = dataset.items() if isinstance(dataset, dict) else [("", dataset)]
        names = {f"{split}_{name}".removeprefix("_") for split, one in splits for name in self.metric_names(one)}
        if metric.removeprefix("eval_") not in names:
            raise ValueError(
                f"metric_for_best_model: got {metric!r}, but what evaluation measures here is {', '.join(sorted(names))}. "
                "Name one of these; what is not among them has nothing in this data to be measured on."
            )

    def _expect_noise(self) -> None:
        """Notes whether the embeddings that `neftune_noise_alpha` makes noisy are those that run."""
        self._runs_embeddings = False

        def note(*_) -> None:
            self._runs_embeddings = True
            hook.remove()

        hook = self.model.get_input_embeddings().register_forward_hook(note)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Trainer's optimizer; an encoder that has a learning rate of its own is a group of its own."""
        is_new, rates = self.optimizer is None, self.encoder_learning_rates
        optimizer = super().create_optimizer(model)
        if is_new and rates:
            rate_of = {}
            for name, parameter in (self.model if model is None else model).named_parameters():
                # "base_model.model.hivilt.vision_model.encoder.weight", whatever wraps it
                encoder = next((part for part in name.split(".") if part in rates), None)
                rate_of[parameter] = rates.get(encoder, self.args.learning_rate)
            optimizer.param_groups[:] = [
                {**group, "params": params, "lr": rate}
                for group in optimizer.param_groups
                for rate in sorted(set(rate_of.values()))
                if (params := [parameter for parameter in group["params"] if rate_of[parameter] == rate])
            ]
        return optimizer

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Of a run that was finished; Trainer would look whether it is after one more step.
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def floating_point_ops(self, inputs) -> int:
        """Zero: Trainer's own count knows nothing of images, and walks through all modules in every step."""
        return 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        """As Trainer's, without what is no input of the model."""
        inputs = {name: value for name, value in inputs.items() if name != self.place_name}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def step_share(self, loss: torch.Tensor, inputs: Mapping[str, Any], num_items: torch.Tensor | None) -> torch.Tensor:
        """The share of a batch's mean loss in the mean over all terms of a step, on all processes."""
        if num_items is None:
            return loss
        # Trainer goes on to divide by the number of batches, and gradients are averaged over processes.
        share = self.weigh(inputs) / num_items.clamp(min=1)
        return loss * share * self.current_gradient_accumulation_steps * self.args.world_size

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        try:
            loss = super().training_step(*args, **kwargs)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                "per_device_train_batch_size: a batch of one image, perhaps the last of the epoch, leaves batch norm nothing "
                "to compare its coarsest level with. Give a larger --image_size (64), another batch size, or "
                "--dataloader_drop_last."
            ) from error
        self._step_loss = self._step_loss + loss
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Called by all processes once a step, between backward pass and optimizer: where a step can still be stopped."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if self.args.neftune_noise_alpha is not None and not self._runs_embeddings:
            raise ValueError(
                f"neftune_noise_alpha: got {self.args.neftune_noise_alpha}, but {type(self.model).__name__} does not run what "
                "its get_input_embeddings() gives, so no noise would come in; leave it out, or name another --text_model."
            )
        whole = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        sums = torch.tensor([float(self._step_loss), float(whole)], device=self.args.device)
        self._step_loss = 0.0
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums)
        scaler, step = self.accelerator.scaler, self.state.global_step + 1
        if scaler is not None:
            # Where float16 overflows, the scaler leaves out the step and halves its scale: usual, but not time after time.
            if scaler.get_scale() < SMALLEST_LOSS_SCALE:
                self._stop_diverged(step, f"the scale of the loss fell below {SMALLEST_LOSS_SCALE:g}")
        elif not sums.isfinite().all():
            what = "gradients are" if sums[0].isfinite() else "loss is"
            self._stop_diverged(step, f"its {what} {next(float(one) for one in sums if not one.isfinite())}")
        return grad_norm

    def _stop_diverged(self, step: int, what: str) -> NoReturn:
        args = self.args
        precision = " or drop --fp16," if args.fp16 else " or drop --bf16," if args.bf16 else ""
        out = f"Lower --learning_rate{precision} or raise --warmup_steps"
        if self.state.global_step == 0:
            out = f"No step was made before it: look for values that are not finite in weights and images,{precision} or lower it"
        last = checkpoints(args.output_dir)
        kept = f"; {last[-1]} and what was saved before it are as they were" if last else ""
        raise ValueError(
            f"learning_rate: with {args.learning_rate:g} training diverged at step {step} of {self.state.max_steps}, {what}. "
            f"{out}. Nothing was saved after it{kept}."
        )

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's, to be called by all processes; a `ValueError` where a weight is not finite, before it is written."""
        weights = self.model.named_parameters()
        local = ((name, one.to_local() if isinstance(one, DTensor) else one) for name, one in weights)
        bad = [name for name, one in local if not one.isfinite().all()]
        if self.is_fsdp_enabled:  # each process has a part of them
            bad = sum(gather_object([bad]), [])
        if bad:
            what = f"{len(set(bad))} of its weights are not finite, such as {bad[0]}"
            self._stop_diverged(self.state.global_step, what)
        super().save_model(output_dir, _internal_call)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        before = [dict(group) for group in self.optimizer.param_groups]
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:  # of torch, where the parameters that train are others
            raise ValueError(
                f"resume_from_checkpoint: the optimizer in {checkpoint} trains other parameters ({error}). Give the same "
                "--freeze, --optim and learning rates of encoders as it was trained with."
            ) from error
        after = self.optimizer.param_groups
        if lost := sorted(set().union(*before) - set().union(*after)):
            raise ValueError(
                f"resume_from_checkpoint: the optimizer in {checkpoint} is another than --optim "
                f"{OptimizerNames(self.args.optim).value}, whose {lost[0]} it does not have. Give the same --optim as it was trained with."
            )
        # What torch loads replaces what was asked for, without a word.
        flags = {"initial_lr": "learning_rate", "weight_decay": "weight_decay"}
        flags |= {"eps": "adam_epsilon", "betas": "adam_beta1, adam_beta2"}
        for asked, loaded in zip(before, after, strict=True):
            for name, flag in flags.items():
                if asked.get(name) is not None and asked[name] != loaded[name]:
                    logger.warning(
                        f"{flag}: goes on with {loaded[name]} as in {checkpoint}, not with {asked[name]}; to train with "
                        f"that, begin anew from its weights with --model_name_or_path {checkpoint} and another --output_dir."
                    )

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            # Of an earlier run; with it this checkpoint would pass for whole from the start.
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        # torch and safetensors have errors of their own for a disk that is full.
        except (OSError, RuntimeError, SafetensorError) as error:
            free = shutil.disk_usage(folder.parent).free
            if self.args.should_save and not is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"output_dir: {folder.name} could not be written to {folder.parent}, which has {free / 2**20:,.0f} MiB "
                f"free ({error}). Checkpoints before it are intact: make room, and go on with --resume_from_checkpoint last."
            ) from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Each process writes its own; all are there before the state, which says that the checkpoint is whole.
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model_class = type(self.model)
        if issubclass(model_class, FSDPModule):
            # FSDP2 makes a class of its own out of the model's, and the code to save is found by the class's module.
            model_class.__module__ = model_class.__mro__[2].__module__
        super()._save(output_dir, state_dict)
        # A pickle of the arguments, which nothing reads, in a folder that is shared.
        Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes nothing; Trainer's own would replace README.md, front matter and all, on every push."""

    # Evaluation

    def measure(self, model: nn.Module, batches: Iterable[dict], dataset: Dataset) -> tuple[Any, dict[str, Any], int]:
        """Predictions of a split, its metrics and its number of examples, by a model in evaluation mode and this process's
        batches of it, on its device."""
        raise NotImplementedError

    def metric_names(self, dataset: Dataset) -> set[str]:
        """The metrics that `measure` gives within training and that are one number each."""
        raise NotImplementedError

    def measure_each(self, batches: Iterable[dict], kept: Callable[[dict], Iterable], dataset: Dataset) -> list[Any]:
        """What `kept` gives of each example of a batch, for all examples of the split, in its order; see `in_order`."""
        rows = []
        for inputs in batches:
            places = inputs.pop(self.place_name).tolist()
            rows += zip(places, kept(inputs), strict=True)
        return in_order(rows, len(getattr(dataset, self.placed)))

    def evaluation_loop(self, dataloader, description: str, *args, metric_key_prefix: str = "eval", **kwargs):
        """What `measure` gives of a whole split. The gathering of `Trainer`'s loop counts batch rows in the dataset's units
        and would cut the last batch to a number of images."""
        start = time.perf_counter()
        model = self.model.eval()
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()  # schedule-free optimizers evaluate at other weights than they train at
        whole = {}
        if not self.is_in_train and (self.args.fp16_full_eval or self.args.bf16_full_eval):
            if not self.is_fsdp_enabled:
                # What is pushed or trained on after it are the weights as they were.
                whole = {name: one.data for name, one in (*model.named_parameters(), *model.named_buffers())}
            model = model.to(self.args.device, torch.float16 if self.args.fp16_full_eval else torch.bfloat16)
        if self.args.world_size > 1:
            # Batch norms of each process have seen other images; those of the main process are what is saved.
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)
        self.callback_handler.eval_dataloader = dataloader
        with self.whole_weights(), torch.no_grad(), self.compute_loss_context_manager():
            batches = self._prepared(dataloader, shows_progress=True)
            predictions, metrics, num_samples = self.measure(model, batches, dataloader.dataset)
        if whole:
            for name, one in (*model.named_parameters(), *model.named_buffers()):
                one.data = whole[name].to(self.args.device)
        self._check_finite(metrics)
        if self.is_in_train:
            self.seconds_evaluating += time.perf_counter() - start
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions, None, metrics, num_samples)

    def _prepared(self, dataloader: DataLoader, shows_progress: bool = False) -> Iterator[dict[str, Any]]:
        for inputs in dataloader:
            yield self._prepare_inputs(inputs)
            if shows_progress:
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def _check_finite(self, metrics: Mapping[str, Any]) -> None:
        bad = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
        if not bad:
            return
        what = f"evaluation gives {bad[0]} {metrics[bad[0]]}"
        if self.is_in_train:
            self._stop_diverged(self.state.global_step, what)
        half = next((name for name in ("fp16_full_eval", "bf16_full_eval") if getattr(self.args, name)), None)
        out = f"drop --{half}" if half else "its weights are broken, or an image holds values that are not finite"
        raise ValueError(f"{what}: {out}.")

    # After training

    def is_labelled(self, example: Any) -> bool:
        """Whether its answer is known, so that a temperature can be fitted on it."""
        return True

    def calibrate(self) -> None:
        """Divides the model's scores by one temperature, that of the least negative log likelihood on `eval_dataset`, and
        keeps what `hivilt.evaluation.calibration.calibrate` gives as `calibration`. Scores stay where nothing can be fitted.
        To be called by all processes, before the model is saved; a `ValueError` under DeepSpeed."""
        if self.is_deepspeed_enabled:
            raise ValueError("calibrate: DeepSpeed keeps weights in pieces; calibrate the checkpoint after it.")
        self.calibration = None
        examples = list(filter(self.is_labelled, self.eval_dataset.examples))
        if len(examples) > self.most_calibrated:
            examples = random.Random(0).sample(examples, self.most_calibrated)
        if examples:
            dataset = type(self.eval_dataset)(examples)
            batches = self._prepared(self.get_eval_dataloader(dataset))
            with self.whole_weights(), torch.no_grad(), self.compute_loss_context_manager():
                self.calibration = self._find_temperature(self.model.eval(), batches, dataset)
        if self.calibration is None:
            logger.warning("calibrate: validation has nothing to fit a temperature on; scores stay as they are.")
            return
        with torch.no_grad():
            self._divide_scores(self.calibration["temperature"])
        told = "calibration: temperature {temperature:.4f}, ece before {ece_before:.4f}, ece after {ece_after:.4f}"
        logger.info(told.format_map(self.calibration))

    def measure_familiarity(self) -> None:
        """Keeps what `hivilt.evaluation.familiarity.measure_familiarity` gives for images of `train_dataset` and
        `eval_dataset` as `familiarity`, on the main process. To be called by all."""
        splits = [getattr(self.train_dataset, "examples", ()), getattr(self.eval_dataset, "examples", ())]
        images = [list(dict.fromkeys(image for one in examples for image in one.images)) for examples in splits]
        if min(map(len, images)) < MIN_IMAGES or self.is_deepspeed_enabled:
            return
        draw = random.Random(0)
        images = [draw.sample(some, min(len(some), FAMILIARITY_IMAGES)) for some in images]
        with self.whole_weights():
            if self.is_world_process_zero():
                size = self.args.per_device_eval_batch_size
                strange = features_of_images(self.model, self.processing_class, noise(), size)
                self.familiarity = measure_familiarity(*map(self._image_features, images), strange)

    def _image_features(self, images: list[Any]) -> torch.Tensor:
        features, size = [], self.args.per_device_eval_batch_size
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            maps = None if self.encoder_cache is None else self.encoder_cache.feature_maps(batch)
            if maps is None:
                opened = [self.processing_class.resize(open_image(image)) for image in batch]
                features.append(features_of_images(self.model, self.processing_class, opened, size))
            else:
                features.append(image_features(maps).cpu())
        return torch.cat(features)


def in_order(pairs: Iterable[tuple[int, Any]], length: int) -> list[Any]:
    """What all processes measured of the items of a split, in its order, from this one's pairs of a place in the split and
    what was measured: no row of a tensor, which is sent with the whole of it. The last batches of several processes repeat
    items from the front; one of each is kept."""
    measured = dict(gather_object(list(pairs)))
    if len(measured) != length:
        raise RuntimeError(f"{len(measured)} of the {length} items of a split were measured.")
    return [measured[place] for place in range(length)]
