"""What a run writes down: what it measured, at what cost, on which machine."""

import json
import logging
import math
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers

import hivilt
from hivilt.training.arguments import TaskArguments
from hivilt.training.trainer import HiViLTTrainer

logger = logging.getLogger(__name__)

# Benchmarks whose images are drawn at the size of `image_size`.
_DRAWN = ("openmoji", "scenes", "pairs")

# What `results.json` tells of TrainingArguments.
SETTINGS = ("seed", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
SETTINGS += ("per_device_eval_batch_size", "learning_rate", "weight_decay", "warmup_steps", "lr_scheduler_type")
SETTINGS += ("optim", "max_grad_norm", "bf16", "fp16", "dataloader_num_workers", "world_size", "metric_for_best_model")


def warn_of_few(split: str, count: int, unit: str) -> None:
    """Warns where a split is so small that what is measured on it says little, with the standard error of a share."""
    if 0 < count < 100:
        error = 50 / math.sqrt(count)
        logger.warning(
            f"{split}: {count} {unit} are few; a share of them has a standard error of up to {error:.0f} percentage points, so "
            f"do not trust smaller differences. Give a larger --{split}_file, or more data to hold out of."
        )


def warn_of_chance(args: TaskArguments, metric: str, value: float, chance: float, count: int, num_images: int) -> None:
    """Warns where a vision encoder that began from scratch learned nothing: the `value` of a metric on validation, a share
    of `count`, is less than three standard errors above `chance`, that of a model without the images."""
    if args.model_name_or_path or args.vision_model or count == 0 or chance == 1:
        return
    if value <= chance + 3 * math.sqrt(chance * (1 - chance) / count):
        texts = "" if args.text_model else "--text_model sentence-transformers/all-MiniLM-L6-v2 "
        parts = "vision" if args.text_model else "vision text"
        logger.warning(
            f"{metric} on validation is {value:.4f}, not told from chance ({chance:.4f}): {num_images:,} images were too few to "
            "learn to see from scratch. Start from pretrained encoders: --vision_model google/mobilenet_v2_1.0_224 "
            f"{texts}--freeze {parts}. Without the Hub, python runs/encoders_without_hub.py makes folders of both to name."
        )


def environment() -> dict[str, Any]:
    """Versions and hardware of this process, for `results.json`."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else _processor_name()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "hivilt": hivilt.__version__,
        "device": device.type,
        "device_name": name,
        "cpu_count": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
    }


def write_result_file(folder: Path, name: str, results: Mapping[str, Any]) -> Path:
    """Writes what a benchmark measured, `environment` included, to `<name>-<hardware>.json`; returns that path."""
    hardware = re.sub(r"\W+", "-", results["environment"]["device_name"]).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{hardware}.json"
    write_json(path, results)
    return path


def write_json(path: Path, value: Any) -> None:
    """Writes a file as a whole or not at all; `ValueError` for a number that JSON has no word for, NaN or infinite."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def peak_memory_bytes() -> int:
    """Most memory this process has held so far (resident set), in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: what it says begins with the peak of the process that started this one.
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text(encoding="utf-8"))[1]) * 1024
    if sys.platform == "win32":
        import psutil  # which accelerate needs anyway

        return psutil.Process().memory_info().peak_wset
    import resource  # Windows has none

    # macOS counts in bytes, others in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def without_place(value: str) -> str:
    """A path of this machine by its last name, a data file's with its folder's, which tells it apart; all else as it is."""
    path = Path(value)
    if not path.is_absolute() and not {"..", "~"} & set(path.parts):
        return value
    folder, is_data = path.parent, path.suffix.lower() in (".json", ".jsonl", ".csv", ".parquet")
    # The home folder's name may be a person's.
    if is_data and folder.name not in ("", "..", "~") and folder.expanduser() != Path.home():
        return f"{folder.name}/{path.name}"
    return path.name or value


def collect_results(
    trainer: HiViLTTrainer, args: TaskArguments, metrics: Mapping[str, Mapping[str, float]], **more: Any
) -> dict[str, Any]:
    """What `results.json` holds: `metrics` of each split, as `run` returns them, size, memory, settings, and `more`."""
    results = dict(more)
    for split in [split for split in ("validation", "test") if split in metrics]:
        measured = {name.split("_", 1)[1]: value for name, value in metrics[split].items() if "_" in name}
        measured.pop("steps_per_second", None)
        measured["seconds"] = measured.pop("runtime")
        measured[f"{trainer.unit}_per_second"] = measured.pop("samples_per_second")
        results[split] = measured
    if "train" in metrics:
        # Evaluations within training are counted apart; saving is not.
        seconds = metrics["train"]["train_runtime"] - trainer.seconds_evaluating
        results["train"] = {
            # Trainer's is of the steps since a run was resumed, in some versions divided by all.
            "loss": None if trainer.resumed_at_step else metrics["train"]["train_loss"],
            "epochs": trainer.state.epoch,
            "steps": trainer.state.global_step,
            "resumed_at_step": trainer.resumed_at_step or None,  # what follows is of the steps since
            trainer.unit: trainer.num_examples_trained,
            "seconds": seconds,
            f"{trainer.unit}_per_second": trainer.num_examples_trained / seconds,
        }
    model = trainer.model
    results["parameters"] = {"all": model.num_parameters(), "training": model.num_parameters(only_trainable=True)}
    cached = trainer.encoder_cache.summary() if trainer.encoder_cache is not None else None
    more = {"calibration": trainer.calibration, "familiarity": trainer.familiarity, "encoder_cache": cached or None}
    results |= {name: value for name, value in more.items() if value is not None}
    results["peak_memory_bytes"] = peak_memory_bytes()
    if torch.cuda.is_available():
        results["peak_cuda_memory_bytes"] = torch.cuda.max_memory_allocated()
    settings = {**asdict(args), **{name: getattr(trainer.args, name) for name in SETTINGS}}
    if (args.vision_model or args.model_name_or_path) and args.benchmark not in _DRAWN:
        del settings["image_size"]  # of a small new encoder; others have an image processor of their own
    results["settings"] = {
        name: without_place(value) if isinstance(value, str) else value for name, value in settings.items()
    }
    results["environment"] = environment()
    return results
