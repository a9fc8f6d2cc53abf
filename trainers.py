"""What counts as one example, one batch and one prediction, for each head: `Trainer` counts rows, HiViLT's data has
images with several texts."""

import logging
import math
import os
import random
import reprlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput
from transformers.training_args import OptimizerNames
from transformers.utils import ModelOutput

from hivilt.data.captions import CaptionDataset, SimilarCaptionsSampler
from hivilt.data.tables import EpochDataset, open_image
from hivilt.data.vqa import IGNORED_LABEL, VQADataset, VQAExample, drop_unknown_answers
from hivilt.encoder_cache import EncoderCache
from hivilt.evaluation.calibration import calibrate, draw_candidates
from hivilt.evaluation.familiarity import MIN_IMAGES, features_of_images, image_features, measure_familiarity, noise
from hivilt.evaluation.plots import AnsweredQuestion
from hivilt.evaluation.retrieval import best_first, rerank, retrieval_metrics
from hivilt.evaluation.vqa import majority_answer, vqa_metrics
from hivilt.fusion_hivilt import map_states
from hivilt.losses_hivilt import MAX_LOGIT_SCALE
from hivilt.modeling_hivilt import HiViLTPreTrainedModel
from hivilt.processing_hivilt import HiViLTProcessor
from hivilt.resuming import check_resumable, checkpoints, is_whole, last_checkpoint
from hivilt.search import score_pairs
from hivilt.training_arguments import check_training_arguments

logger = logging.getLogger(__name__)

# A float16 run whose scaler comes this far down leaves out every step. fairseq's bound.
SMALLEST_LOSS_SCALE = 1e-4
# Of a validation split, what a temperature is fitted on at most; and images of a split that familiarity looks at.
CALIBRATION_QUESTIONS, CALIBRATION_IMAGES, FAMILIARITY_IMAGES = 10_000, 1_000, 1_000


class _SaveOnSignal(TrainerCallback):
    """On SIGTERM, which batch systems send some time before they kill, and on Ctrl-C, saves after the step at hand and
    exits; on a second Ctrl-C, at once.

    At the end of an epoch, or where an evaluation is due, that comes first: the run that goes on would not make up for it.
    """

    def __init__(self):
        self.asked: signal.Signals | None = None
        self._usual: dict[signal.Signals, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # Python lets no other thread set handlers
            return
        self.asked = None
        # A run in the background of a script is told to ignore Ctrl-C.
        numbers = [one for one in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(one) is not signal.SIG_IGN]
        self._usual = {number: signal.signal(number, self.ask) for number in numbers}
        try:
            yield
        finally:
            for number, handler in self._usual.items():
                signal.signal(number, handler)
            self._usual = {}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it signals end the run at once, as they do outside training: what is at hand is no step."""
        listening = {number: signal.signal(number, handler) for number, handler in self._usual.items()}
        try:
            yield
        finally:
            for number, handler in listening.items():
                signal.signal(number, handler)

    def ask(self, signum, frame) -> None:
        self.asked = self.asked or signal.Signals(signum)
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # Not by logging, which the signal may have come into the midst of.
            os.write(2, b"\nCtrl-C: saves after this step and ends; once more ends at once, without saving.\n")

    def asked_anywhere(self, args) -> signal.Signals | None:
        """What one of the processes was asked by, if one was; to be called by all."""
        asked = [self.asked] if args.world_size == 1 else gather_object([self.asked])
        return next((one for one in asked if one is not None), None)

    def on_step_end(self, args, state, control, **kwargs):
        ends_epoch = state.global_step >= state.max_steps or state.epoch == int(state.epoch)
        # To ask other processes is to wait for them.
        if not ends_epoch and (args.world_size == 1 or state.global_step % 10 == 0) and self.asked_anywhere(args):
            control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.asked_anywhere(args):
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if asked := self.asked_anywhere(args):
            logger.warning(
                f"{asked.name}: saved step {state.global_step} of {state.max_steps} in {args.output_dir}; the same command "
                "with --resume_from_checkpoint last goes on from there."
            )
            # Not by ending training as usual: Trainer would delete the checkpoint if another one was better.
            raise SystemExit(128 + asked)


class _TrainingBegins(TrainerCallback):
    """What a trainer has to know when training begins, which `auto_find_batch_size` may do more than once."""

    def __init__(self, trainer: "HiViLTTrainer"):
        self.trainer = trainer
        self.resumed: Path | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.num_examples_trained, self.trainer.seconds_evaluating, self.trainer._step_loss = 0, 0.0, 0.0
        if self.resumed is not None and state.best_global_step:
            # Where the run's folder was moved, the path that was written down may lead to another run.
            best = self.resumed.parent / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            state.best_model_checkpoint = str(best) if is_whole(best) else None
            if state.best_model_checkpoint is None:
                logger.warning(f"{best}, the best so far, is not there; one that is better than it will be kept.")


class _NewDraws(TrainerCallback):
    """Tells the training data of each epoch before it begins, also when it is resumed half-way; on several processes
    accelerate tells only the sampler."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if isinstance(train_dataloader.dataset, EpochDataset):
            train_dataloader.dataset.set_epoch(int(state.epoch))


class HiViLTTrainer(Trainer):
    """What both heads ask of `Trainer`. It leaves the model card alone: the scripts write their own, from measured values.

    The trainer of a head has a method `measure(model, dataloader, description)` that gives the predictions, metrics and
    number of examples of a split. `num_examples_trained` counts what the head is trained on, on all processes together;
    `seconds_evaluating` is the part of training that went into evaluation.

    Args:
        vision_learning_rate, text_learning_rate: of an encoder; default: that of everything else, `learning_rate`. A
            pretrained encoder wants a smaller one than new layers do (METER: fusion 5 times, head 50 times as much).
        encoder_cache: where what frozen encoders give of the data sets is kept, and read from then on; the collator's
            batches come from it. Default: the collator's own, and where that has none, encoders run in every epoch. FSDP and
            DeepSpeed, whose weights lie in pieces, and `bf16_full_eval` or `fp16_full_eval` do without.
        **kwargs: as `Trainer`; `processing_class` is the `HiViLTProcessor`.

    Raises:
        ValueError: the process sees several devices, or `args` have a flag that has no meaning here, see
            docs/training_arguments.md.
    """

    unit: str  # what the head is trained and measured on, in the plural

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
        if self.args.bf16 or self.args.fp16:
            # Convolutions of half precision are made for it, on CPUs and GPUs.
            self.model.to(memory_format=torch.channels_last)
        if self.compute_metrics is not None or self.preprocess_logits_for_metrics is not None:
            raise ValueError(
                f"compute_metrics, preprocess_logits_for_metrics: expected None; {type(self).__name__} measures whole "
                "splits by itself. Compute others from what predict() returns."
            )
        rates = {"vision_model": vision_learning_rate, "text_model": text_learning_rate}
        self.encoder_learning_rates = {name: rate for name, rate in rates.items() if rate is not None}
        in_pieces = self.is_fsdp_enabled or self.is_deepspeed_enabled
        # States are of the model that trains, and not of one that evaluation casts.
        casts = self.args.bf16_full_eval or self.args.fp16_full_eval
        if encoder_cache is None:
            encoder_cache = getattr(self.data_collator, "encoder_cache", None)
        self.encoder_cache = None if in_pieces or casts else encoder_cache
        if encoder_cache is not None:
            # A copy: the states are of this trainer's model, and the collator may go to another one.
            self.data_collator = copy(self.data_collator)
            self.data_collator.encoder_cache = self.encoder_cache
        self.num_examples_trained = 0
        self.seconds_evaluating = 0.0
        self.calibration: dict[str, Any] | None = None
        self.familiarity: dict[str, Any] | None = None
        self._step_loss: torch.Tensor | float = 0.0
        self.add_callback(_NewDraws)
        self._begins = _TrainingBegins(self)
        self.add_callback(self._begins)
        self._signals = _SaveOnSignal()
        self.add_callback(self._signals)
        if self.is_fsdp_enabled:
            # FSDP2 shards no scalars: the temperatures are left whole on every process, and their gradients averaged here.
            whole = nn.ParameterList(p for p in self.model.parameters() if p.dim() == 0).to(self.args.device)
            self.accelerator.state.fsdp_plugin.ignored_modules = [whole]
            for scalar in whole:
                if scalar.requires_grad:
                    scalar.register_hook(partial(self.accelerator.reduce, reduction="mean"))
        if self.args.n_gpu > 1:
            # nn.DataParallel cuts every tensor into as many pieces, but images and texts differ in number.
            raise ValueError(
                f"This process sees {self.args.n_gpu} devices. Start one process for each (accelerate launch or "
                "torchrun), or show it one: CUDA_VISIBLE_DEVICES=0."
            )

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Trainer's optimizer; an encoder that has a learning rate of its own is a group of its own."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.encoder_learning_rates:
            rates = {}
            for name, parameter in (self.model if model is None else model).named_parameters():
                # "base_model.model.hivilt.vision_model.encoder.weight", whatever wraps it
                encoder = next((part for part in name.split(".") if part in self.encoder_learning_rates), None)
                rates[id(parameter)] = self.encoder_learning_rates.get(encoder, self.args.learning_rate)
            optimizer.param_groups[:] = [
                {**group, "params": params, "lr": rate}
                for group in optimizer.param_groups
                for rate in sorted(set(rates.values()))
                if (params := [parameter for parameter in group["params"] if rates[id(parameter)] == rate])
            ]
        return optimizer

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

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """As Trainer's; `resume_from_checkpoint=True` goes on from `last_checkpoint`, and without one begins.

        Raises:
            ValueError: the checkpoint was not written to its end, or its answers, tokenizer, image processor, layers or
                optimizer are not those of this trainer; evaluation does not measure `metric_for_best_model`; training
                diverged, and nothing was saved after it did.
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
        with self._signals.listening():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def metric_names(self, dataset: Dataset) -> set[str]:
        """The metrics that an evaluation of `dataset` within training gives and that are one number each."""
        raise NotImplementedError

    def _check_metric_for_best_model(self) -> None:
        if self.args.metric_for_best_model is None or self.eval_dataset is None:
            return
        splits = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        names = {
            f"{split}_{name}" if split else name
            for split, dataset in splits.items()
            for name in self.metric_names(dataset)
        }
        if self.args.metric_for_best_model.removeprefix("eval_") not in names:
            raise ValueError(
                f"metric_for_best_model: got {self.args.metric_for_best_model!r}, but what evaluation measures here is "
                f"{', '.join(sorted(names))}."
            )

    def _expect_noise(self) -> None:
        """Stops the first step if the embeddings that `neftune_noise_alpha` makes noisy are not those that run."""
        self._runs_embeddings = False

        def note(*_) -> None:
            self._runs_embeddings = True
            hook.remove()

        hook = self.model.get_input_embeddings().register_forward_hook(note)

    def _get_dataloader(self, dataset, *args, **kwargs):
        """As Trainer's; encodes first what is not in the cache. Training has loaded the weights it goes on from by now."""
        split = getattr(dataset, "dataset", dataset)  # of a split by image, the split itself
        # Each time, since weights may have changed.
        if self.encoder_cache is not None and isinstance(split, EpochDataset):
            parts = ["vision", "text"]
            if self.args.neftune_noise_alpha is not None:
                # Noise at the embeddings changes what the encoder gives.
                parts.remove("text")
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
        return super()._get_dataloader(dataset, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer's.

        Raises:
            ValueError: with `dataloader_drop_last` nothing is left to train on.
        """
        loader = super().get_train_dataloader()
        if self.args.dataloader_drop_last and len(loader) == 0:
            raise ValueError(
                f"dataloader_drop_last: the training data does not fill one batch of {self._train_batch_size} on each of "
                f"{self.args.world_size} processes; leave it out, or lower per_device_train_batch_size."
            )
        return loader

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """As Trainer's; `dataloader_drop_last` is of training alone, since evaluation counts every example."""
        with self._evaluating():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """As `get_eval_dataloader`."""
        with self._evaluating():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        names = ["dataloader_drop_last"]
        if self.encoder_cache is not None:
            # A loader that is kept has workers that know nothing of weights that changed since.
            names.append("dataloader_persistent_workers")
        usual = {name: getattr(self.args, name) for name in names}
        vars(self.args).update(dict.fromkeys(names, False))
        try:
            yield
        finally:
            vars(self.args).update(usual)

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Of a run that was finished; Trainer would look whether it is after one more step.
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

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
                "its get_input_embeddings() gives, so no noise would come in; leave it out, or take another --text_model."
            )
        whole = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        found = torch.tensor([float(self._step_loss), float(whole)], device=self.args.device)
        self._step_loss = 0.0
        if self.args.world_size > 1:
            found = self.accelerator.reduce(found)
        scaler, step = self.accelerator.scaler, self.state.global_step + 1
        if scaler is not None:
            # Where float16 overflows, the scaler leaves out the step and halves its scale: usual, but not time after time.
            if scaler.get_scale() < SMALLEST_LOSS_SCALE:
                self._stop_diverged(step, f"the scale of the loss fell below {SMALLEST_LOSS_SCALE:g}")
        elif not found.isfinite().all():
            what = "gradients are" if found[0].isfinite() else "loss is"
            self._stop_diverged(step, f"its {what} {next(float(one) for one in found if not one.isfinite())}")
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's, but not over good weights: to be called by all processes.

        Raises:
            ValueError: a weight is not finite.
        """
        local = (
            (name, one.to_local() if isinstance(one, DTensor) else one) for name, one in self.model.named_parameters()
        )
        bad = [name for name, one in local if not one.isfinite().all()]
        if self.is_fsdp_enabled:  # each process has a part of them
            bad = sum(gather_object([bad]), [])
        if bad:
            self._stop_diverged(
                self.state.global_step, f"{len(set(bad))} of its weights are not finite, such as {bad[0]}"
            )
        super().save_model(output_dir, _internal_call)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        names = {"initial_lr": "learning_rate", "weight_decay": "weight_decay", "eps": "adam_epsilon"}
        names |= {"betas": "adam_beta1, adam_beta2"}
        asked = [{name: group.get(name) for name in names} for group in self.optimizer.param_groups]
        settings = {name for group in self.optimizer.param_groups for name in group}
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:  # of torch, where the parameters that train are others
            raise ValueError(
                f"resume_from_checkpoint: the optimizer in {checkpoint} trains other parameters ({error}). Give the same "
                "--freeze, --optim and learning rates of encoders as it was trained with."
            ) from error
        if lost := sorted(settings - {name for group in self.optimizer.param_groups for name in group}):
            raise ValueError(
                f"resume_from_checkpoint: the optimizer in {checkpoint} is another than --optim "
                f"{OptimizerNames(self.args.optim).value}, whose {lost[0]} it does not have. Give the same --optim as it was trained with."
            )
        # What torch loads takes the place of what was asked for, without a word.
        for before, group in zip(asked, self.optimizer.param_groups, strict=True):
            for name, flag in names.items():
                if before[name] is not None and before[name] != group[name]:
                    logger.warning(
                        f"{flag}: goes on with {group[name]} as in {checkpoint}, not with {before[name]}; to train with "
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

    def evaluation_loop(self, dataloader, description: str, *args, metric_key_prefix: str = "eval", **kwargs):
        """Evaluates a whole split; replaces the loop of `Trainer`, whose gathering counts batch rows in the dataset's
        units and would cut the last batch to a number of images.

        Returns:
            What `measure` found, as an `EvalLoopOutput`.
        """
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
            predictions, metrics, num_samples = self.measure(model, dataloader, description)
        if whole:
            for name, one in (*model.named_parameters(), *model.named_buffers()):
                one.data = whole[name].to(self.args.device)
        self._check_finite(metrics)
        if self.is_in_train:
            self.seconds_evaluating += time.perf_counter() - start
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions, None, metrics, num_samples)

    def calibrate(self, dataset: Dataset | None = None) -> dict[str, Any] | None:
        """Divides the model's scores by one temperature, that of the least negative log likelihood on a split that was not
        trained on, and keeps what was found as `calibration`. No answer or image moves before another. To be called by all
        processes, before the model is saved.

        Args:
            dataset: default: `eval_dataset`.

        Returns:
            What `hivilt.evaluation.calibration.calibrate` gives; `None` where the split has nothing to fit on.

        Raises:
            ValueError: under DeepSpeed, which keeps the weights in pieces.
        """
        if self.is_deepspeed_enabled:
            raise ValueError(
                "calibrate: expected weights that are whole, got DeepSpeed's; calibrate the checkpoint after it."
            )
        dataset = self._calibration_split(self.eval_dataset if dataset is None else dataset)
        dataloader = self.get_eval_dataloader(dataset)
        model = self.model.eval()
        with self.whole_weights(), torch.no_grad(), self.compute_loss_context_manager():
            self.calibration = self._find_temperature(model, dataloader)
        if self.calibration is None:
            logger.warning("calibrate: validation has nothing to fit a temperature on; scores stay as they are.")
        else:
            with torch.no_grad():
                self._divide_scores(self.calibration["temperature"])
            told = {name: self.calibration[name] for name in ("temperature", "ece_before", "ece_after")}
            logger.info(
                "calibration: " + ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in told.items())
            )
        return self.calibration

    def measure_familiarity(self) -> dict[str, Any] | None:
        """What `hivilt.evaluation.familiarity.measure_familiarity` finds of images of `train_dataset` and `eval_dataset`, which
        is kept as `familiarity`. To be called by all processes; the main one looks, and gets it."""
        splits = [getattr(self.train_dataset, "examples", ()), getattr(self.eval_dataset, "examples", ())]
        images = [list(dict.fromkeys(example.image for example in examples)) for examples in splits]
        if min(map(len, images)) < MIN_IMAGES or self.is_deepspeed_enabled:
            return None
        draw = random.Random(0)
        images = [draw.sample(some, min(len(some), FAMILIARITY_IMAGES)) for some in images]
        with self.whole_weights():
            if self.is_world_process_zero():
                size = self.args.per_device_eval_batch_size
                strange = features_of_images(self.model, self.processing_class, noise(), size)
                self.familiarity = measure_familiarity(*map(self._image_features, images), strange)
        return self.familiarity

    def _image_features(self, images: list[Any]) -> torch.Tensor:
        found, size = [], self.args.per_device_eval_batch_size
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            maps = None if self.encoder_cache is None else self.encoder_cache.feature_maps(batch)
            if maps is None:
                opened = [self.processing_class.resize(open_image(image)) for image in batch]
                found.append(features_of_images(self.model, self.processing_class, opened, size))
            else:
                found.append(image_features(maps).cpu())
        return torch.cat(found)

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


class QuestionAnsweringTrainer(HiViLTTrainer):
    """Trains and evaluates on a `VQADataset`. A batch is of images with all their questions, and
    `per_device_train_batch_size` counts images, while losses and metrics count questions.

    The loss of a step is the mean over all its questions: over images with few and many of them, over accumulated
    batches and over processes. Evaluation keeps the best few answers of each question, not the scores of all answers,
    and gives exactly one prediction a question, in order, on any number of processes.

    Args:
        top_k: how many answers to keep for each question.
        watched_answer: an answer to keep with its probability for every question, after the best ones if it is not
            among them.
        official_metrics: the metrics of a benchmark, given the answers that were kept and the examples; they go beside
            those of `vqa_metrics`, or in their place. Accuracies by type are left out of evaluations within training.
        **kwargs: as `HiViLTTrainer`.
    """

    unit = "questions"

    def __init__(
        self,
        *args,
        top_k: int = 3,
        watched_answer: str | None = None,
        official_metrics: Callable[[list[list[dict]], list[VQAExample]], Mapping[str, Any]] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        # Not by Trainer's smoother, which is NaN where no question of a batch has an answer.
        self.label_smoother = None
        if self.args.label_smoothing_factor and self.model.config.problem_type == "multi_label_classification":
            raise ValueError(
                f"label_smoothing_factor: got {self.args.label_smoothing_factor}, but questions with several answers have "
                "soft labels as they are; leave it out."
            )
        self.top_k = top_k
        self.watched_answer = watched_answer
        self.official_metrics = official_metrics

    def _get_dataloader(self, dataset, *args, is_training: bool = False, **kwargs):
        """Batches of a `VQADataset` by image; refuses to train where no question has an answer of the vocabulary."""
        if isinstance(dataset, VQADataset):
            if is_training:
                self._check_answers(dataset)
            dataset = dataset.by_image()
        return super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)

    def _check_answers(self, dataset: VQADataset) -> None:
        label2id = getattr(self.data_collator, "label2id", None)
        if label2id and not drop_unknown_answers(dataset.examples, label2id):
            answers = [answer for example in dataset.examples for answer in example.answers]
            raise ValueError(
                f"train_dataset: none of its {len(dataset)} questions has an answer of the collator's label2id, so there is "
                f"nothing to learn. Their answers are {reprlib.repr(answers)}, those of label2id "
                f"{reprlib.repr(list(label2id))}."
            )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one step, and how many questions with an answer they hold, on all processes together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_questions = torch.tensor([sum(int(_answered(batch["labels"]).sum()) for batch in batches)], device=device)
        num_questions = self.accelerator.gather(num_questions).sum()
        self.num_examples_trained += int(num_questions)
        return batches, num_questions

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss, weighted by the share of this batch in the questions of the step."""
        num_questions = int(_answered(inputs["labels"]).sum())
        inputs = {name: value for name, value in inputs.items() if name != "question_index"}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if self.args.label_smoothing_factor and model.training:
            if inputs["labels"].is_floating_point():
                raise ValueError("label_smoothing_factor: expected integer labels, got soft ones; leave it out.")
            ways = {"ignore_index": IGNORED_LABEL, "reduction": "sum"}
            plain = F.cross_entropy(outputs.logits.float(), inputs["labels"], **ways)
            smooth = F.cross_entropy(
                outputs.logits.float(), inputs["labels"], label_smoothing=self.args.label_smoothing_factor, **ways
            )
            loss = loss + self.model.config.classification_loss_weight * (smooth - plain) / max(num_questions, 1)
        if num_items_in_batch is not None:
            # Trainer goes on to divide by the number of batches, and gradients are averaged over processes.
            share = num_questions / num_items_in_batch.clamp(min=1)
            loss = loss * share * self.current_gradient_accumulation_steps * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def measure(self, model, dataloader, description):
        """Answers every question of a `VQADataset`.

        Returns:
            For each question, in the dataset's order, `{"answer": str, "score": float}` of the `top_k` best; the metrics
            of `vqa_metrics` (`top3_accuracy` where there are more than three answers to choose from) and
            `official_metrics`, and `loss`, the mean classification loss of the questions whose answer is in the
            vocabulary; the number of questions.
        """
        records = []
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            question_index = inputs.pop("question_index").tolist()
            labels = inputs.pop("labels", None)
            logits = model(**inputs).logits
            losses = [None] * len(logits) if labels is None else question_losses(logits, labels)
            records += zip(question_index, losses, self._best_answers(logits), strict=True)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        # The last batches of several processes are filled up with images from the front: keep one of each question.
        by_index = {index: (loss, answers) for index, loss, answers in gather_object(records)}
        examples = dataloader.dataset.examples
        if sorted(by_index) != list(range(len(examples))):
            raise RuntimeError(f"{description}: {len(by_index)} of {len(examples)} questions were answered.")
        predictions = [by_index[index][1] for index in range(len(examples))]

        metrics = self._metrics(predictions, examples)
        losses = [loss for loss, _ in by_index.values() if loss is not None]
        if losses:
            metrics["loss"] = sum(losses) / len(losses)
        elif not all(math.isfinite(answer["score"]) for answers in predictions for answer in answers):
            metrics["loss"] = math.nan
        return predictions, metrics, len(examples)

    def _calibration_split(self, dataset: VQADataset) -> VQADataset:
        examples = [example for example in dataset.examples if example.answers]
        if len(examples) > CALIBRATION_QUESTIONS:
            examples = random.Random(0).sample(examples, CALIBRATION_QUESTIONS)
        return VQADataset(examples) if examples else dataset

    def _find_temperature(self, model, dataloader):
        """That of the classifier's scores. A question whose answer is not to choose from counts as wrong in the errors."""
        records = []
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            question_index, labels = inputs.pop("question_index").tolist(), inputs.pop("labels", None)
            if labels is not None:
                records += zip(question_index, model(**inputs).logits.float().cpu(), labels.cpu(), strict=True)
        by_index = {index: (logits, labels) for index, logits, labels in gather_object(records)}
        if not by_index:
            return None
        logits, labels = (torch.stack([by_index[index][part] for index in sorted(by_index)]) for part in (0, 1))
        return calibrate(logits, labels) if _answered(labels).any() else None

    def _divide_scores(self, temperature: float) -> None:
        for parameter in self.model.classifier.parameters():
            parameter.div_(temperature)

    def _metrics(self, predictions: list[list[dict]], examples: list[VQAExample]) -> dict[str, Any]:
        metrics = vqa_metrics(
            [[answer["answer"] for answer in answers] for answers in predictions],
            [example.answers for example in examples],
        )
        if self.model.config.num_labels <= 3:
            metrics.pop("top3_accuracy", None)  # 1 whatever is answered
        if self.official_metrics is not None:
            official = self.official_metrics(predictions, examples)
            metrics |= {
                name: value for name, value in official.items() if not (self.is_in_train and isinstance(value, dict))
            }
        return metrics

    def metrics_of_answer(self, answer: str, dataset: VQADataset) -> dict[str, float]:
        """The metrics, as `measure` gives them and as far as they are one number each, of this answer to every question."""
        found = self._metrics([[{"answer": answer, "score": 1.0}]] * len(dataset.examples), dataset.examples)
        return {name: value for name, value in found.items() if isinstance(value, float)}

    def metric_names(self, dataset: VQADataset) -> set[str]:
        answer = {"answer": self.watched_answer or "", "score": 0.0}
        found = self._metrics([[answer]] * len(dataset.examples), dataset.examples)
        return {"loss", *(name for name, value in found.items() if isinstance(value, float))}

    def _best_answers(self, logits: torch.Tensor) -> list[list[dict[str, Any]]]:
        config = self.model.config
        multi_label = config.problem_type == "multi_label_classification"
        best = self.processing_class.post_process_question_answering(
            logits, top_k=self.top_k, id2label=config.id2label, multi_label=multi_label
        )
        if self.watched_answer in config.label2id:
            scores = logits.float().sigmoid() if multi_label else logits.float().softmax(dim=-1)
            for answers, score in zip(best, scores[:, config.label2id[self.watched_answer]].tolist(), strict=True):
                if all(answer["answer"] != self.watched_answer for answer in answers):
                    answers.append({"answer": self.watched_answer, "score": score})
        return best


def _answered(labels: torch.Tensor) -> torch.BoolTensor:
    """Rows with an answer in the vocabulary, (B_t,), of integer labels (B_t,) or soft ones (B_t, num_labels)."""
    return (labels > 0).any(dim=-1) if labels.is_floating_point() else labels != IGNORED_LABEL


def question_losses(logits: torch.Tensor, labels: torch.Tensor) -> list[float | None]:
    """The classification loss of each question by itself; their mean is the loss of the batch.

    Args:
        logits: (B_t, num_labels).
        labels: (B_t,) integers with -100 for no answer, or (B_t, num_labels) soft scores, all zero for none.

    Returns:
        One number a question; `None` for those without an answer.
    """
    if labels.is_floating_point():
        losses = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none").sum(dim=-1)
    else:
        losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="none")
    return [loss if answered else None for loss, answered in zip(losses.tolist(), _answered(labels), strict=True)]


@torch.no_grad()
def answer_examples(
    model: HiViLTPreTrainedModel, processor: HiViLTProcessor, examples: Sequence[VQAExample], top_k: int = 3
) -> list[AnsweredQuestion]:
    """Answers questions, to be drawn beside their images.

    Args:
        model: a `HiViLTForQuestionAnswering`.
        processor: its processor.
        examples: the questions, few enough for one batch.
        top_k: how many answers to keep for each.
    """
    model.eval()
    images = [open_image(example.image) for example in examples]
    texts = [[example.question] for example in examples]
    logits = model(**processor(images=images, text=texts, return_tensors="pt").to(model.device)).logits
    answers = processor.post_process_question_answering(
        logits,
        top_k=top_k,
        id2label=model.config.id2label,
        multi_label=model.config.problem_type == "multi_label_classification",
    )
    return [
        AnsweredQuestion(
            image=image,
            question=example.question,
            predictions=predictions,
            answer=majority_answer(example.answers) if example.answers else None,
        )
        for image, example, predictions in zip(images, examples, answers, strict=True)
    ]


class RetrievalTrainer(HiViLTTrainer):
    """Trains `HiViLTForRetrieval` on a `CaptionDataset` and evaluates retrieval over a whole split.

    Evaluation encodes every image and every caption once, ranks by their embeddings, and re-ranks the best `rerank_k`
    of each query from the encoded states, by `HiViLTForRetrieval.ranking_score`. A pair that is on the shortlist of its
    image and of its caption is fused once.

    Args:
        rerank_k: candidates of each query to re-rank; 0 ranks by the embeddings alone.
        similar_per_batch: images with similar captions to train on together, see `SimilarCaptionsSampler`.
        contrastive_chunk_size: `chunk_size` of `HiViLTForRetrieval.forward` in training.
        fold_size: also report recall as the mean over consecutive folds of so many images with their captions, each
            ranked and re-ranked by itself, of splits with at least two; what is left after the last whole one counts in
            none. MS-COCO's "1K test" is five folds of 1,000 (Karpathy and Fei-Fei 2015; VSE++). Evaluations within
            training do without.
        **kwargs: as `HiViLTTrainer`.
    """

    unit = "captions"

    def __init__(
        self,
        *args,
        rerank_k: int = 16,
        similar_per_batch: int = 1,
        contrastive_chunk_size: int | None = None,
        fold_size: int | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if fold_size is not None and fold_size < 1:
            raise ValueError(f"fold_size: expected at least 1 image, or None for no folds, got {fold_size}.")
        if contrastive_chunk_size is not None and self.is_fsdp_enabled:
            # Weights are gathered for each chunk, and a process with fewer captions has fewer chunks: others would wait.
            raise ValueError(
                f"contrastive_chunk_size: got {contrastive_chunk_size}, expected None under FSDP; save memory by "
                "gradient_checkpointing instead."
            )
        for name, usual in (("label_smoothing_factor", 0.0), ("train_sampling_strategy", "random")):
            if (value := getattr(self.args, name)) != usual:
                raise ValueError(
                    f"{name}: got {value!r}, expected {usual!r}: retrieval has no classes to smooth, and its sampler puts "
                    "similar captions together (similar_per_batch). Leave it out."
                )
        self.rerank_k = rerank_k
        self.similar_per_batch = similar_per_batch
        self.contrastive_chunk_size = contrastive_chunk_size
        self.fold_size = fold_size
        self._losses: dict[str, list[torch.Tensor]] = {}

    def _get_train_sampler(self, train_dataset=None):
        return SimilarCaptionsSampler(train_dataset or self.train_dataset, self.similar_per_batch)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one step; counts their captions."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_captions = torch.tensor([sum(len(batch["input_ids"]) for batch in batches)], device=device)
        self.num_examples_trained += int(self.accelerator.gather(num_captions).sum())
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss; its parts go to the log."""
        inputs = {name: value for name, value in inputs.items() if name != "caption_index"}
        loss, outputs = super().compute_loss(
            model, {**inputs, "chunk_size": self.contrastive_chunk_size}, return_outputs=True
        )
        for name in ("contrastive_loss", "auxiliary_loss"):
            if outputs.get(name) is not None:
                self._losses.setdefault(name, []).append(outputs[name])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the parts of the training loss, mean since the last time."""
        if "loss" in logs:
            logs = {**logs, **{name: torch.stack(values).mean().item() for name, values in self._losses.items()}}
            self._losses = {}
        super().log(logs, *args, **kwargs)

    def metric_names(self, dataset: CaptionDataset) -> set[str]:
        only = torch.zeros(1, 1, dtype=torch.long)
        stages = ("embedding_", "fused_", "") if self.rerank_k else ("embedding_", "")
        return {"loss", *(f"{stage}{name}" for stage in stages for name in retrieval_metrics(only, only, [0]))}

    def measure(self, model, dataloader, description):
        """Ranks all captions for every image and all images for every caption of a `CaptionDataset`.

        Returns:
            `{"image_to_text": LongTensor (B_i, n), "text_to_image": LongTensor (B_t, n)}`, places in the split, best
            first; metrics: those of `retrieval_metrics` for the final ranking, the same with `embedding_` and `fused_` in
            front for the ranking by embeddings alone and by fused similarity alone, `loss`, seconds of each stage and how
            many pairs were fused; with folds their number, and the means of all recalls over them with `fold_` in front,
            while seconds and pairs are those of the split and its folds together; the number of captions.
        """
        start = time.perf_counter()
        images, texts, losses = _Encoded(), _Encoded(), []
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            pairs = {name: inputs.pop(name, None) for name in ("image_index", "image_ids")}
            flags = {"return_loss": True, "gather_negatives": model.config.gather_negatives}
            caption_index = inputs.pop("caption_index")
            shown = {name: inputs.pop(name) for name in ("pixel_values", "feature_maps") if name in inputs}
            image_states, text_states = model.encode_images(**shown), model.encode_texts(**inputs)
            outputs = model(image_states=image_states, text_states=text_states, **pairs, **flags)
            losses.append((outputs.loss.item(), len(caption_index)))
            images.add(pairs["image_ids"], outputs.image_embeds, image_states if self.rerank_k else None)
            texts.add(caption_index, outputs.text_embeds, text_states if self.rerank_k else None)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        dataset, losses = dataloader.dataset, gather_object(losses)
        images.gather(len(dataset), f"{description}: images")
        texts.gather(len(dataset.captions), f"{description}: captions")
        encoded = time.perf_counter()

        rankings, recalls, costs = self._rank(model, images, texts, dataset.image_of_caption)
        metrics = {"loss": sum(loss * count for loss, count in losses) / sum(count for _, count in losses), **recalls}
        if self.fold_size is not None and not self.is_in_train and len(dataset) >= 2 * self.fold_size:
            folds = []
            for fold in self._folds(images, texts, dataset.image_of_caption):
                _, found, more = self._rank(model, *fold)
                folds.append(found)
                costs = {name: cost + more[name] for name, cost in costs.items()}
            metrics |= {f"fold_{name}": sum(found[name] for found in folds) / len(folds) for name in recalls}
            metrics |= {"num_folds": len(folds), "fold_size": self.fold_size}
        metrics |= {
            "num_images": len(dataset),
            "num_captions": len(dataset.captions),
            "encode_seconds": encoded - start,
            **costs,
        }
        return rankings, metrics, len(dataset.captions)

    def _calibration_split(self, dataset: CaptionDataset) -> CaptionDataset:
        examples = dataset.examples
        if len(examples) > CALIBRATION_IMAGES:
            examples = random.Random(0).sample(examples, CALIBRATION_IMAGES)
        return CaptionDataset(examples)

    def _scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inverse temperatures of `logits_per_image` and of fused matching, as the model bounds them."""
        parameters = (self.model.logit_scale, self.model.matching_logit_scale)
        return tuple(one.detach().double().clamp(0.0, MAX_LOGIT_SCALE).exp().cpu() for one in parameters)

    def _find_temperature(self, model, dataloader):
        """That of `logits_per_image`: of an image, a caption of its own and nine of other images, drawn at random."""
        images, texts = _Encoded(), _Encoded()
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            image_ids, caption_index = inputs.pop("image_ids"), inputs.pop("caption_index")
            inputs.pop("image_index", None)
            outputs = model(**inputs, return_loss=False)
            images.add(image_ids, outputs.image_embeds, None)
            texts.add(caption_index, outputs.text_embeds, None)
        dataset = dataloader.dataset
        images.gather(len(dataset), "calibrate: images")
        texts.gather(len(dataset.captions), "calibrate: captions")
        candidates = draw_candidates(dataset.captions, dataset.image_of_caption)
        if candidates is None:
            return None
        # (B_t, 1, d), (B_t, candidates, d) -> (B_t, candidates)
        similarity = (images.embeds[dataset.image_of_caption][:, None] * texts.embeds[candidates]).sum(dim=-1)
        scale, matching = map(float, self._scales())
        # Both are divided, which leaves the ranking by their weighted mean as it is, and both stay within their bounds.
        least, most = max(scale, matching) / math.exp(MAX_LOGIT_SCALE), min(scale, matching)
        labels = torch.zeros(len(similarity), dtype=torch.long)
        found = calibrate(scale * similarity, labels, least=min(least, 1.0), most=max(most, 1.0))
        return {**found, "num_candidates": candidates.shape[1]}

    def _divide_scores(self, temperature: float) -> None:
        for parameter, scale in zip(
            (self.model.logit_scale, self.model.matching_logit_scale), self._scales(), strict=True
        ):
            parameter.fill_((scale / temperature).log().item())

    def _folds(self, images, texts, image_of_caption):
        """Consecutive `fold_size` images, their captions, and for each of these its image's place in the fold."""
        owners = torch.tensor(image_of_caption)
        for start in range(0, len(images.rows) - self.fold_size + 1, self.fold_size):
            stop = start + self.fold_size
            places = ((owners >= start) & (owners < stop)).nonzero().squeeze(1)
            yield images.take(torch.arange(start, stop)), texts.take(places), (owners[places] - start).tolist()

    def _rank(self, model, images, texts, image_of_caption):
        """Ranks all texts for every image and all images for every text, from what was encoded.

        Returns:
            The final rankings, as `measure` gives them; the recalls of every stage; pairs that were fused and seconds.
        """
        start = time.perf_counter()
        # (B_i, projection_dim), (B_t, projection_dim) -> (B_i, B_t)
        similarity = images.embeds.to(self.args.device) @ texts.embeds.to(self.args.device).t()
        shortlist = max(10, self.rerank_k)
        rankings = {
            "embedding_": (best_first(similarity, shortlist).cpu(), best_first(similarity.t(), shortlist).cpu())
        }
        searched = time.perf_counter()

        num_pairs = 0
        if self.rerank_k:
            candidates = rankings["embedding_"]
            *fused, num_pairs = self._fuse_shortlists(model, images, texts, *candidates)
            cosines = [
                scores.gather(1, best[:, : self.rerank_k].to(scores.device)).cpu()
                for scores, best in zip((similarity, similarity.t()), candidates, strict=True)
            ]
            combined = map(model.ranking_score, cosines, fused)
            rankings["fused_"] = tuple(map(rerank, candidates, fused))
            rankings[""] = tuple(map(rerank, candidates, combined))
        else:
            rankings[""] = rankings["embedding_"]

        recalls = {}
        for name, (image_to_text, text_to_image) in rankings.items():
            found = retrieval_metrics(image_to_text, text_to_image, image_of_caption)
            recalls |= {f"{name}{metric}": value for metric, value in found.items()}
        costs = {
            "num_fused_pairs": num_pairs,
            "search_seconds": searched - start,
            "rerank_seconds": time.perf_counter() - searched,
        }
        return dict(zip(("image_to_text", "text_to_image"), rankings[""], strict=True)), recalls, costs

    def _fuse_shortlists(self, model, images, texts, image_to_text, text_to_image):
        """Fused similarities of the first `rerank_k` of both rankings, (B_i, k) and (B_t, k), and how many were computed.

        A pair on both shortlists is fused once; processes share the pairs between them.
        """
        image_to_text, text_to_image = image_to_text[:, : self.rerank_k], text_to_image[:, : self.rerank_k]
        image_index = torch.arange(len(image_to_text))[:, None].expand_as(image_to_text)
        text_index = torch.arange(len(text_to_image))[:, None].expand_as(text_to_image)
        keys = torch.cat(
            [
                (image_index * len(text_to_image) + image_to_text).flatten(),
                (text_to_image * len(text_to_image) + text_index).flatten(),
            ]
        )
        keys, places = keys.unique(return_inverse=True)
        own = keys.tensor_split(self.args.world_size)[self.args.process_index]
        scores = score_pairs(
            model,
            images.states,
            texts.states,
            images.rows[own // len(text_to_image)],
            texts.rows[own % len(text_to_image)],
            progress=not self.args.disable_tqdm,
        )
        scores = torch.cat(gather_object([scores]))[places]
        by_image, by_text = scores.tensor_split([image_to_text.numel()])
        return by_image.view_as(image_to_text), by_text.view_as(text_to_image), len(keys)


class _Encoded:
    """Embeddings and states of one modality, as evaluation finds them batch by batch, on one process or several."""

    def __init__(self):
        self.batches = []

    def add(self, numbers: torch.Tensor, embeds: torch.Tensor, states: ModelOutput | None) -> None:
        """A batch: places in the split (B,), embeddings (B, projection_dim) and, if they are to be fused, states."""
        states = None if states is None else map_states(torch.Tensor.cpu, states)
        self.batches.append((numbers.cpu(), embeds.float().cpu(), states))

    def gather(self, length: int, what: str) -> None:
        """Sets `embeds` (length, projection_dim) in the split's order, `states` batch by batch, and `rows` (length,):
        where each item lies in the batches. The last batches of several processes repeat items from the front."""
        numbers, embeds, self.states = zip(*gather_object(self.batches), strict=True)
        rows: dict[int, int] = {}
        for row, number in enumerate(torch.cat(numbers).tolist()):
            rows.setdefault(number, row)
        if sorted(rows) != list(range(length)):
            raise RuntimeError(f"{what}: {len(rows)} of {length} were encoded.")
        self.rows = torch.tensor([rows[number] for number in range(length)])
        self.embeds = torch.cat(embeds)[self.rows]

    def take(self, places: torch.LongTensor) -> "_Encoded":
        """The items at these places of the split; they share their states."""
        taken = _Encoded()
        taken.embeds, taken.rows, taken.states = self.embeds[places], self.rows[places], self.states
        return taken
