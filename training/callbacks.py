"""What happens around steps: signals, resumed runs, new draws of the training data."""

import logging
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hivilt.data.tables import EpochDataset
from hivilt.training.resuming import is_whole

if TYPE_CHECKING:
    from hivilt.training.trainer import HiViLTTrainer

logger = logging.getLogger(__name__)


@contextmanager
def handling(handlers: Mapping[signal.Signals, Any]) -> Iterator[dict[signal.Signals, Any]]:
    """Within it these handlers of signals are set; gives those that come back after it."""
    usual = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield usual
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


class SaveOnSignal(TrainerCallback):
    """On SIGTERM, which batch systems send some time before they kill, and on Ctrl-C, saves after the step at hand and
    exits; on a second Ctrl-C, at once. At the end of an epoch, or where an evaluation is due, that comes first: the run
    that goes on would not make up for it."""

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
        with handling(dict.fromkeys(numbers, self.ask)) as self._usual:
            try:
                yield
            finally:
                self._usual = {}

    def paused(self) -> AbstractContextManager:
        """Within it signals end the run at once, as they do outside training: what is at hand is no step."""
        return handling(self._usual)

    def ask(self, signum, frame) -> None:
        self.asked = self.asked or signal.Signals(signum)
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # Not by logging, which the signal may have come into the midst of.
            os.write(2, b"\nCtrl-C: saves after this step and ends; once more ends at once, without saving.\n")

    def asked_anywhere(self) -> signal.Signals | None:
        """The signal that any process got; to be called by all."""
        return next(filter(None, gather_object([self.asked])), None)

    def on_step_end(self, args, state, control, **kwargs):
        ends_epoch = state.global_step >= state.max_steps or state.epoch == int(state.epoch)
        # To ask other processes is to wait for them.
        if not ends_epoch and (args.world_size == 1 or state.global_step % 10 == 0) and self.asked_anywhere():
            control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.asked_anywhere():
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if asked := self.asked_anywhere():
            logger.warning(
                f"{asked.name}: saved step {state.global_step} of {state.max_steps} in {args.output_dir}; the same command "
                "with --resume_from_checkpoint last goes on from there."
            )
            # Not by ending training as usual: Trainer would delete the checkpoint if another one was better.
            raise SystemExit(128 + asked)


class Beginnings(TrainerCallback):
    """Resets a trainer when training begins, which `auto_find_batch_size` may do more than once. Tells the training data of
    each epoch before it begins, also when it is resumed half-way; on several processes accelerate tells only the sampler."""

    def __init__(self, trainer: "HiViLTTrainer"):
        self.trainer = trainer
        self.resumed: Path | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.num_examples_trained, self.trainer.seconds_evaluating, self.trainer._step_loss = 0, 0.0, 0.0
        self.trainer.resumed_at_step = state.global_step
        if self.resumed is not None and state.best_global_step:
            # Where the run's folder was moved, the path that was written down may lead to another run.
            best = self.resumed.parent / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            state.best_model_checkpoint = str(best) if is_whole(best) else None
            if state.best_model_checkpoint is None:
                logger.warning(f"{best}, the best so far, is not there; one that is better than it will be kept.")

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if isinstance(train_dataloader.dataset, EpochDataset):
            train_dataloader.dataset.set_epoch(int(state.epoch))


class BreakTies(TrainerCallback):
    """Of checkpoints that are equal by the metric that counts, the one with the smaller loss is the best. Trainer would keep
    the first, which has learnt nothing where the metric stays 0 for long."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        name = (args.metric_for_best_model or "loss").removeprefix("eval_")
        value, loss = metrics.get(f"eval_{name}"), metrics.get("eval_loss")
        if None in (value, loss, state.best_metric) or value != state.best_metric:
            return
        best = next(
            (
                log["eval_loss"]
                for log in state.log_history
                if log["step"] == state.best_global_step and "eval_loss" in log
            ),
            loss,
        )
        if loss < best:
            # Trainer compares next, and takes over what is better.
            state.best_metric = math.nextafter(value, -math.inf if args.greater_is_better else math.inf)


class _ShortLog:
    """Prints of an evaluation its loss and the metric that counts; the others are in `trainer_state.json` and `results.json`."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        counts = (args.metric_for_best_model or "loss").removeprefix("eval_")
        kept = {"eval_loss", f"eval_{counts}", "eval_runtime"}
        logs = {name: value for name, value in (logs or {}).items() if not name.startswith("eval_") or name in kept}
        super().on_log(args, state, control, logs=logs, **kwargs)


class ShortProgress(_ShortLog, ProgressCallback):
    """Trainer's bars, with short logs."""


class ShortPrinter(_ShortLog, PrinterCallback):
    """Trainer's logs where there are no bars, shortened."""
