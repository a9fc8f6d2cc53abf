"""What every run does: read its arguments and data, build a model, train, save, draw, evaluate, write down what it measured."""

import difflib
import gc
import json
import logging
import math
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

import accelerate
import torch
import transformers
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ResNetConfig,
    T5Config,
    TrainerCallback,
    TrainingArguments,
    ViTImageProcessorPil,
    set_seed,
)
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

# From its module: until transformers 5.18 the name above it asks for torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

import hivilt
from hivilt.configuration_hivilt import HiViLTConfig
from hivilt.data.augmentation import Augmentation
from hivilt.data.benchmarks import Benchmark
from hivilt.data.folders import read_folder
from hivilt.data.tables import check_pictures, hold_out
from hivilt.encoder_cache import EncoderCache
from hivilt.evaluation.plots import plot_training
from hivilt.flags import Parser, flags_in_file, is_settings_file, read_mapping
from hivilt.modeling_hivilt import HiViLTPreTrainedModel
from hivilt.processing_hivilt import HiViLTProcessor
from hivilt.resuming import checkpoints, is_whole, last_checkpoint
from hivilt.trainers import HiViLTTrainer
from hivilt.training_arguments import check_training_arguments

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------

# What --freeze can name.
PARTS = ("vision", "text", "fusion")


# Fields of HiViLTConfig that fit whatever weights a checkpoint has.
CHANGEABLE = (
    "fusion_top_k",
    "dropout",
    "embedding_dropout",
    "classification_loss_weight",
    "contrastive_loss_weight",
    "auxiliary_loss_weight",
    "gather_negatives",
)


@dataclass
class TaskArguments:
    """Which model and which data; what question answering and retrieval have in common."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "HiViLT checkpoint to go on from, a folder or a name on the Hub."}
    )
    vision_model: str | None = field(
        default=None, metadata={"help": "Pretrained vision encoder for a new HiViLT. Unset: a small one from scratch."}
    )
    text_model: str | None = field(
        default=None, metadata={"help": "Pretrained text encoder for a new HiViLT. Unset: a small one from scratch."}
    )
    fusion: dict | str | None = field(
        default=None,
        metadata={
            "help": "HiViLTConfig fields of a new HiViLT as JSON: '{\"fusion_top_k\": 8}'. Of a checkpoint those that its "
            "weights do not depend on, such as dropout and the weights of losses."
        },
    )
    image_size: int = field(default=64, metadata={"help": "Side in pixels that a small vision encoder works at."})
    image_processor: dict | str | None = field(
        default=None,
        metadata={
            "help": "What a new HiViLT's image processor does otherwise than vision_model's own, as JSON: "
            '\'{"size": {"height": 256, "width": 320}, "do_center_crop": false}\'.'
        },
    )
    freeze: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Parts not to train: vision, text, fusion; of an encoder with ':' and a number its embeddings and so "
            "many first layers, as in vision:12 text:4."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with a tokenizer or image processor from the Hub."}
    )
    benchmark: str | None = field(default=None, metadata={"help": "Data set of the field, by name."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset on the Hub, or a folder of one; of a benchmark, another copy of it."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Image folder with metadata.jsonl or metadata.csv; of a benchmark, its official files."},
    )
    image_dir: str | None = field(
        default=None, metadata={"help": "Folder of the pictures of a benchmark, if they do not lie in data_dir."}
    )
    train_file: str | None = field(default=None, metadata={"help": "Training data: JSON, JSONL, CSV or Parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Data for choosing, likewise."})
    test_file: str | None = field(default=None, metadata={"help": "Data for the final measurement, likewise."})
    train_split: str | None = field(
        default=None,
        metadata={"help": "Name of the training split: 'train', or the benchmark's; 'train+val' joins two of it."},
    )
    validation_split: str | None = field(
        default=None,
        metadata={"help": "Likewise: 'validation', or the benchmark's; if absent, pictures are held out."},
    )
    test_split: str | None = field(default=None, metadata={"help": "Likewise: 'test', or the benchmark's."})
    image_column: str = field(default="image", metadata={"help": "Column of pictures or of their paths."})
    image_id_column: str | None = field(default=None, metadata={"help": "Column that tells pictures apart, if any."})
    on_bad_image: str = field(
        default="error",
        metadata={
            "help": "A missing or unreadable picture stops the run, or is left out.",
            "choices": ["error", "skip"],
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Choose by this many at most."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Measure on this many at most."})
    random_crop: float | None = field(
        default=None, metadata={"help": "Train on random crops of at least this share of a picture's area, say 0.5."}
    )
    random_flip: str | None = field(
        default=None,
        metadata={
            "help": "Mirror half of the training pictures: never where a text says left or right ('skip'), or with these "
            "words swapped ('swap').",
            "choices": ["skip", "swap"],
        },
    )
    rand_augment: list[int] | None = field(
        default=None, metadata={"help": "RandAugment of training pictures: how many operations, and how strong: 2 7."}
    )
    encoder_cache: bool = field(
        default=True,
        metadata={"help": "Encode images and texts once for all epochs and runs, where their encoder is frozen."},
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder that keeps what was encoded. Unset: hivilt in Hugging Face's cache."}
    )
    cache_gb: float | None = field(
        default=50.0, metadata={"help": "Gigabytes that cache_dir may hold; what is more is encoded in every epoch."}
    )
    cache_dtype: str | None = field(
        default=None,
        metadata={
            "help": "What it is stored in. Unset: as the encoders give it, so that losses are the same; float16 takes half of "
            "float32.",
            "choices": ["float32", "float16", "bfloat16"],
        },
    )
    calibrate: bool = field(
        default=False,
        metadata={
            "help": "Divide scores by one temperature, fitted on validation, so that of answers given with 80 %% about 80 %% are "
            "right; after training, or with --do_eval of the checkpoint that model_name_or_path names, which is saved anew."
        },
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision encoder, if it is to differ from learning_rate."}
    )
    text_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the text encoder, likewise."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Begin anew where output_dir holds a run that was not finished."}
    )
    num_threads: int | None = field(
        default=None,
        metadata={
            "help": "CPU threads of one process. Unset: one for a small model, whose tensors want few, and the process's "
            "share of the machine for one of 10 million parameters or more."
        },
    )
    license: str = field(
        default="apache-2.0", metadata={"help": "Of the weights, for the model card: the Hub's name of a license."}
    )
    language: list[str] = field(
        default_factory=lambda: ["en"], metadata={"help": "Of the texts, for the model card: codes such as en, de."}
    )

    def __post_init__(self):
        # The Hub refuses a card with others, and with it the whole push at the end of a run.
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise ValueError(
                f"license: expected the Hub's name of one, such as apache-2.0 or mit, got {self.license!r}."
            )
        wrong = [one for one in self.language if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", one)]
        if wrong:
            raise ValueError(f"language: expected ISO 639 codes of two or three letters, such as en, got {wrong[0]!r}.")
        if isinstance(self.image_processor, str):
            self.image_processor = read_mapping("image_processor", self.image_processor)
        if not isinstance(self.image_processor, dict | None):
            raise ValueError(
                f"image_processor: expected fields of an image processor with their values, got {self.image_processor!r}."
            )
        if self.image_processor and not self.vision_model:
            raise ValueError(
                "image_processor: changes that of vision_model, which is not given; a checkpoint keeps its own, and a small "
                "new encoder takes image_size."
            )
        if isinstance(self.fusion, str):
            self.fusion = read_mapping("fusion", self.fusion)
        if not isinstance(self.fusion, dict | None):
            raise ValueError(f"fusion: expected fields of HiViLTConfig with their values, got {self.fusion!r}.")
        known = [one.name for one in fields(HiViLTConfig)]
        for name in self.fusion or ():
            if name not in known:  # HiViLTConfig would keep it, and do nothing with it
                raise ValueError(f"fusion: HiViLTConfig has no field {name}{_did_you_mean(name, known)}")
        wrong = [one for one in self.freeze if not re.fullmatch(rf"{'|'.join(PARTS)}|(vision|text):\d+", one, re.ASCII)]
        if wrong:
            raise ValueError(
                f"freeze: expected any of {', '.join(PARTS)}, or an encoder and a number of layers such as vision:12, with "
                f"blanks between, got {wrong[0]!r}."
            )
        parts = [one.partition(":")[0] for one in self.freeze]
        if len(set(parts)) < len(parts):
            raise ValueError(f"freeze: expected each part once, got {' '.join(self.freeze)}.")
        for name in self.at_least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}; leave it out for the default.")
        for name in ("vision_learning_rate", "text_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name}: expected a number from 0 on, got {value}.")
        if self.cache_gb is not None and not self.cache_gb > 0:
            raise ValueError(
                f"cache_gb: expected a number above 0, got {self.cache_gb}; --no_encoder_cache turns the cache off."
            )
        for name in (*self.places, "cache_dir"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, os.path.expanduser(value))  # a settings file passes no shell
        sources = {
            "dataset_name": self.dataset_name,
            "data_dir": self.data_dir,
            "train_file, validation_file, test_file": self.train_file or self.validation_file or self.test_file,
        }
        given = [name for name, value in sources.items() if value]
        if len(given) > 1:
            raise ValueError(f"Data can come from one source, got {' and '.join(given)}; drop all but one.")
        if self.benchmark and given == ["train_file, validation_file, test_file"]:
            raise ValueError(
                "A benchmark has its own files: drop benchmark, or train_file, validation_file, test_file."
            )
        if self.model_name_or_path and (self.vision_model or self.text_model):
            raise ValueError(
                "model_name_or_path names a whole HiViLT; drop vision_model and text_model, which build a new one."
            )
        built = [name for name in self.fusion or () if name not in CHANGEABLE]
        if self.model_name_or_path and built:
            raise ValueError(
                f"fusion: {built[0]} decides what weights a HiViLT has, and model_name_or_path names one that has them; of a "
                f"checkpoint these can be changed: {', '.join(CHANGEABLE)}."
            )

    # Those of its fields that are numbers from one on, and files and folders to read.
    at_least_one = ("image_size", "num_threads", "max_train_samples", "max_eval_samples", "max_predict_samples")
    places = ("data_dir", "image_dir", "train_file", "validation_file", "test_file")

    def check_places(self) -> None:
        """Looks whether the files and folders to read are there.

        Raises:
            FileNotFoundError: one is not; names its flag.
        """
        for name in self.places:
            value = getattr(self, name)
            # The folders of a benchmark it looks through itself, and says which of its files they lack.
            own = self.benchmark is None or name not in ("data_dir", "image_dir")
            if own and value is not None and not os.path.exists(value):
                raise missing_place(name, value)
            if own and value is not None and os.path.isdir(value) == name.endswith("_file"):
                here, wanted = ("folder", "file") if name.endswith("_file") else ("file", "folder")
                raise ValueError(f"{name}: {value} is a {here}; name a {wanted}.")
        for name in ("model_name_or_path", "vision_model", "text_model"):
            if (value := getattr(self, name)) is not None:
                check_name(name, value)
        if self.dataset_name is not None and _is_path(self.dataset_name) and not os.path.exists(self.dataset_name):
            raise missing_place("dataset_name", self.dataset_name)

    def names_data(self) -> bool:
        """Whether any data is named; else the script has its own."""
        files = self.train_file or self.validation_file or self.test_file
        return bool(self.benchmark or self.dataset_name or self.data_dir or files)


def _is_path(name: str) -> bool:
    """Whether a name is that of a file or folder and not one on the Hub, which has one slash at most: `runs/x` is a path
    where there is a folder `runs`, and `outputs/x` always, since the scripts write there."""
    path = Path(name)
    marked = path.is_absolute() or name.startswith((".", "~", "outputs/")) or name.endswith("/") or "\\" in name
    return marked or len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir())


def _did_you_mean(name: str, known: Iterable[str], below: Path = Path()) -> str:
    """The end of a sentence that tells of an unknown name: the nearest that there is, if one is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {below / near[0]}?" if near else "."


def missing_place(argument: str, place: str) -> FileNotFoundError:
    """The error for a file or folder that is not there: where it was looked for, and what is there of almost its name."""
    path = Path(place)
    while not path.parent.exists():
        path = path.parent
    names = sorted(one.name for one in path.parent.iterdir()) if path.parent.is_dir() else []
    where = "" if path.is_absolute() else f" in {Path.cwd()}"
    hint = _did_you_mean(path.name, names, path.parent)
    kind = "file" if argument.endswith("_file") else "folder"
    return FileNotFoundError(f"{argument}: there is no {kind} {place!r}{where}{hint}")


def check_name(argument: str, name: str) -> None:
    """Looks whether what names a model can be one: a folder that has a config, or a name on the Hub.

    Raises:
        FileNotFoundError: it is a path and nothing is there, or a folder without a config.
        NotADirectoryError: it is a file.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").exists():
            inner = sorted(str(one.parent) for one in path.glob("*/config.json"))
            hint = f"did you mean {inner[-1]}?" if inner else "give the folder that a model was saved to."
            raise FileNotFoundError(f"{argument}: the folder {name} has no config.json, so no model is in it; {hint}")
    elif path.exists():
        raise NotADirectoryError(f"{argument}: {name} is a file; give the folder that it lies in.")
    elif _is_path(name):
        raise missing_place(argument, name)


@contextmanager
def _loading(argument: str, name: str) -> Iterator[None]:
    """Within it a model or what goes with it is loaded by its name; what fails names the argument.

    transformers tells a folder that is not there as a failure of the network.
    """
    check_name(argument, name)
    try:
        yield
    except OSError as error:
        if os.path.exists(name):
            raise
        raise FileNotFoundError(
            f"{argument}: there is no folder {name!r} in {Path.cwd()}, and the Hub gave nothing of that name: {error}"
        ) from error


# What numbers of TrainingArguments are at least, which itself takes any; not one of them may be "nan" or "inf".
AT_LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("num_train_epochs", "learning_rate", "weight_decay", "max_grad_norm"), 0),
    **dict.fromkeys(("dataloader_num_workers", "seed", "data_seed", "adam_epsilon"), 0),
}
# And from 0 to below 1.
SHARES = ("adam_beta1", "adam_beta2", "label_smoothing_factor")


@dataclass
class HiViLTTrainingArguments(TrainingArguments):
    """`TrainingArguments` that do all three of training, evaluation and prediction unless told which; flags without a
    meaning here are refused (docs/training_arguments.md)."""

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Not here: Trainer would drop the columns that `forward` does not name."}
    )

    def __post_init__(self):
        for name, least in AT_LEAST.items():
            value = getattr(self, name)
            if isinstance(value, int | float) and not least <= value < float("inf"):
                raise ValueError(f"{name}: expected at least {least}, got {value}; leave it out for the default.")
        for name in SHARES:
            value = getattr(self, name)
            if isinstance(value, int | float) and not 0 <= value < 1:
                raise ValueError(
                    f"{name}: expected a number from 0 to below 1, got {value}; leave it out for the default."
                )
        if self.max_steps == 0:  # transformers would take it for as many as num_train_epochs has
            raise ValueError("max_steps: expected at least 1, got 0; leave it out to train for num_train_epochs.")
        # Before the parent, which makes of some what cannot be made here, and after it, when all have their types.
        check_training_arguments(self)
        # Before the parent, which sets do_eval by itself wherever there is an eval_strategy.
        if not (self.do_train or self.do_eval or self.do_predict):
            self.do_train = self.do_eval = self.do_predict = True
        if self.do_train and self.num_train_epochs <= 0 and self.max_steps < 0:
            raise ValueError(
                f"num_train_epochs: expected more than 0, got {self.num_train_epochs}; --do_eval and --do_predict without "
                "--do_train measure a checkpoint as it is."
            )
        if not self.do_train:
            self.eval_strategy, self.load_best_model_at_end = "no", False
        lowered = [name for name in ("bf16", "bf16_full_eval") if getattr(self, name)]
        if lowered and not self.use_cpu and not is_torch_bf16_gpu_available() and not is_torch_xla_available():
            raise ValueError(
                f"{lowered[0]}: no device of this machine computes in bfloat16; give --{lowered[0]} false, here and after "
                "the name of a recipe, or --use_cpu to compute in it on the CPU."
            )
        if self.fp16 and (self.use_cpu or not torch.accelerator.is_available()):
            # accelerate would leave it out without a word, and results.json say that it was on.
            raise ValueError("fp16: there is no GPU, and nothing else trains in float16; give --fp16 false.")
        super().__post_init__()
        check_training_arguments(self)
        for name in self.report_to:
            if name not in INTEGRATION_TO_CALLBACK:
                raise ValueError(
                    f"report_to: expected any of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}, got {name!r}."
                )
            # Two that transformers does not always count among those that there are.
            if name not in (*get_available_reporting_integrations(), "azure_ml", "flyte"):
                raise ValueError(f"report_to: {name} is not installed; install it with pip, or leave it out.")
        if self.resume_from_checkpoint is not None and not self.do_train:
            raise ValueError(
                f"resume_from_checkpoint: got {self.resume_from_checkpoint!r} without do_train; to evaluate a checkpoint, "
                "name it as --model_name_or_path."
            )
        if self.hub_token is not None:
            # Arguments are printed and pickled; a token is found here all the same, by all that talks to the Hub.
            os.environ["HF_TOKEN"], self.hub_token = self.hub_token, None
        # Without an accelerator there is nothing to pin for, and torch warns.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        if self.resume_from_checkpoint is not None and self.resume_from_checkpoint.lower() in ("true", "last"):
            self.resume_from_checkpoint = True

    @property
    def draw_seed(self) -> int:
        """The seed of what is drawn of the training data: `data_seed`, unless it is not set."""
        return self.seed if self.data_seed is None else self.data_seed


# What grouping asks of Trainer, and what suits runs that people wait for; flags and files override all of it.
COMMON_DEFAULTS = {
    # Dispatching slices every tensor of a batch alike, but pictures and texts differ in number.
    "accelerator_config": {"dispatch_batches": False},
    # Every parameter that trains has a gradient in every step.
    "ddp_find_unused_parameters": False,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    # The best and the last; of one, Trainer deletes the last when it ends, and a run cut off then would train again.
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "lr_scheduler_type": "cosine",
    "logging_steps": 50,
    # With --push_to_hub one commit, of the whole: the others would be checkpoints without card and results.
    "hub_strategy": "end",
    "report_to": "none",
}


def parse_arguments(
    argv: Sequence[str],
    task_class: type[TaskArguments],
    defaults: Mapping[str, Any],
    benchmark_defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[TaskArguments, HiViLTTrainingArguments]:
    """Arguments from flags, or from one JSON or YAML file.

    Args:
        argv: the command line without the program's name.
        task_class: the script's own arguments.
        defaults: the script's defaults for any of the flags, over `COMMON_DEFAULTS`.
        benchmark_defaults: what is otherwise where `--benchmark` names one, by its name.

    Raises:
        ValueError: an argument is unknown or wrong; names it.
        OSError: the file cannot be read.
    """
    parser = Parser((task_class, HiViLTTrainingArguments), allow_abbrev=False)
    if len(argv) == 1 and is_settings_file(argv[0]):
        argv = flags_in_file(Path(argv[0]), parser)
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--benchmark")
    benchmark = first.parse_known_args(argv)[0].benchmark
    parser.set_defaults(**{**COMMON_DEFAULTS, **defaults, **(benchmark_defaults or {}).get(benchmark, {})})
    parser.parse_args(argv)
    return parser.parse_args_into_dataclasses(args=list(argv), look_for_args_file=False)


def checkpoint_to_resume(training_args: HiViLTTrainingArguments) -> str | None:
    """The folder of the checkpoint that training goes on from; `None` where it begins.

    Raises:
        ValueError: what is named is no checkpoint that was written to its end.
    """
    named = training_args.resume_from_checkpoint if training_args.do_train else None
    if named is True:
        return last_checkpoint(training_args.output_dir)
    if named is not None and not is_whole(Path(named)):
        raise ValueError(
            f"resume_from_checkpoint: {named} is no checkpoint that was written to its end; name another, or 'last' for "
            "the last whole one of output_dir."
        )
    return named


def check_unfinished(args: TaskArguments, training_args: HiViLTTrainingArguments) -> None:
    """Asks before a training begins anew over one that was not finished.

    Raises:
        ValueError: `output_dir` holds checkpoints of a run that did not come to its end, which writes its state.
    """
    folder = Path(training_args.output_dir)
    if not training_args.do_train or training_args.resume_from_checkpoint or args.overwrite_output_dir:
        return
    whole = [path for path in checkpoints(folder) if is_whole(path)]
    if whole and not (folder / TRAINER_STATE_NAME).exists():
        raise ValueError(
            f"output_dir: {folder} holds a run that was not finished, up to {whole[-1].name}. Go on with "
            "--resume_from_checkpoint last, name another --output_dir, or begin anew with --overwrite_output_dir."
        )


# What a run held out of its training data, beside its checkpoints.
HELD_OUT = "held_out.json"


class _BeginsAnew(TrainerCallback):
    """Removes the checkpoints of an earlier run, from which this one could not be told when it is resumed, and the state
    that says that the run was finished: not before the first step is due, since until then arguments may be refused."""

    def __init__(self, trainer: HiViLTTrainer, held_out: list[str] | None):
        self.trainer = trainer
        self.held_out = held_out

    def on_train_begin(self, args, state, control, **kwargs):
        if args.should_save:
            folder = Path(args.output_dir)
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
            if old := checkpoints(folder):
                logger.warning(
                    f"{folder}: training begins anew; the {len(old)} checkpoints of an earlier run are removed."
                )
            for path in old:
                shutil.rmtree(path)
            (folder / HELD_OUT).unlink(missing_ok=True)
            if self.held_out is not None:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / HELD_OUT, self.held_out)
        self.trainer.accelerator.wait_for_everyone()


def begin_run(
    argv: Sequence[str] | None,
    task_class: type[TaskArguments],
    defaults: Mapping[str, Any],
    benchmark_defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[TaskArguments, HiViLTTrainingArguments]:
    """`parse_arguments` (`argv` unset: of the command line), with logging, threads and seed set as they say.

    Raises:
        ValueError: an argument is unknown, or the launcher started several processes that do not know of each other.
    """
    argv = sys.argv[1:] if argv is None else argv
    args, training_args = parse_arguments(argv, task_class, defaults, benchmark_defaults)
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > training_args.world_size:
        raise ValueError(
            f"This is one of {started} processes, each of which would train by itself, since it sees no GPU: start one, or "
            "give --use_cpu to train together on the CPU."
        )
    args.check_places()
    check_output_dir(training_args.output_dir)
    check_unfinished(args, training_args)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hivilt").setLevel(logging.INFO if training_args.process_index == 0 else logging.ERROR)
    torch.set_num_threads(args.num_threads or 1)
    set_seed(training_args.seed)
    return args, training_args


def check_output_dir(folder: str) -> None:
    """Looks whether a run can write what it makes, before it makes it; leaves nothing there.

    Raises:
        NotADirectoryError: it is a file, or in one.
        PermissionError: nothing can be written there.
    """
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"output_dir: {folder} cannot be a folder, since {place} is a file; name another.")
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise PermissionError(
            f"output_dir: nothing can be written in {place} ({error.strerror}); name another."
        ) from error


# What a person gave and can mend; all else is a fault of ours, and keeps its traceback.
MISTAKES = (ValueError, TypeError, OSError, ImportError, DatasetsError, StrictDataclassError)


def run_command(main: Callable[[], Any]) -> None:
    """A script's `main`; then ends the process, having left those that it trained with.

    What `MISTAKES` lists ends it with status 2 and one line on stderr; `HIVILT_DEBUG=1` in the environment shows the
    traceback instead.
    """
    status, mistake = None, None
    try:
        main()
    except SystemExit as stop:  # of all processes together: told to stop by SIGTERM or Ctrl-C
        status = stop.code
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
        mistake = "Ctrl-C: ended; --resume_from_checkpoint last goes on from the last checkpoint, if there is one."
    except MISTAKES as error:
        status, mistake = 2, _describe(error)
    if mistake is not None:
        _tell_once(mistake)
        if _is_grouped() and torch.distributed.get_world_size() > 1:
            # Others may wait for this process, and leaving them could wait for them: its launcher ends them.
            sys.stdout.flush()
            os._exit(status)
    # Not after another error, for the same reason.
    leave_processes()
    sys.exit(status)


def end_with(mistake: Exception) -> NoReturn:
    """Ends the script as `run_command` does on a mistake."""

    def main():
        raise mistake

    run_command(main)


def _describe(error: BaseException) -> str:
    """An error as one line, or as a traceback where `HIVILT_DEBUG` asks for it."""
    if os.environ.get("HIVILT_DEBUG", "0") not in ("", "0"):
        return "".join(traceback.format_exception(error)).rstrip()
    if isinstance(error, OSError) and error.strerror and error.filename:
        said = f"{error.filename}: {error.strerror}"
    elif isinstance(error, ModuleNotFoundError) and error.name:
        said = f"the package {error.name.partition('.')[0]} is missing: install it with pip"
    elif isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        said = str(error.__cause__)  # which names the field; the rest is about how a config checks itself
    else:
        said = str(error) or type(error).__name__
        if isinstance(error, DatasetsError) and error.__cause__ is not None:
            said = f"{said}: {error.__cause__}"
    said = " ".join(line.strip() for line in said.splitlines() if line.strip())
    last = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)][-1:]
    ours = [name for name in last if name.partition(".")[0] in ("hivilt", "__main__")]
    if isinstance(error, TypeError) or (isinstance(error, ValueError) and not ours):
        # Perhaps a fault of ours after all.
        said += f" ({type(error).__name__}; HIVILT_DEBUG=1 shows where)"
    return f"{Path(sys.argv[0]).name}: error: {said}"


def _tell_once(mistake: str) -> None:
    """Writes to stderr what is wrong, of the processes that train together by one: mostly all of them find it.

    The first says it. The others give it the time to, in which the launcher ends them, and say what it does not find.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(10)
    print(mistake, file=sys.stderr, flush=True)


def _is_grouped() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def leave_processes() -> None:
    """Leaves the group of processes, if this is in one: its Gloo threads would abort a Python that ends under them
    (pytorch/pytorch#190489).

    The caller lets go of its model first, whose DistributedDataParallel holds the group. Were it the last to, Python would
    wait for a thread of Gloo that waits for Python.
    """
    if _is_grouped():
        gc.collect()  # a model is in a cycle with its trainer
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def read_splits(
    args: TaskArguments,
    splits: Collection[str],
    read_file: Callable[[Path, str], list],
    read_table: Callable[[Any, str, str, Path], list],
    benchmark: Benchmark | None = None,
) -> tuple[str, dict[str, list]]:
    """The data that the arguments name: its name and those of the splits that there are.

    Args:
        args: where the data is: of a benchmark, in files, or in tables of `datasets`.
        splits: which to read of "train", "validation" and "test".
        read_file: examples of a file, given its path and the split.
        read_table: examples of a table of `datasets` or a list of rows, given what to call it, the split, and the folder
            where relative picture paths start.
        benchmark: the one to read if the arguments name no files and no tables of their own.
    """
    if benchmark is not None:
        return benchmark.title, _read_benchmark(args, splits, benchmark)
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    files = {split: Path(file) for split, file in files.items() if file}
    if files:
        # Files are called train or test; it is their folder that has a name.
        name = next(iter(files.values())).resolve().parent.name
        return name, {split: read_file(file, split) for split, file in files.items() if split in splits}
    name = args.dataset_name or args.data_dir
    # A folder goes by its own name, wherever it lies.
    name = Path(name).name if Path(name).exists() else name
    named = {split: official or split for split, official in _named_splits(args).items() if split in splits}
    tables = read_folder(args.dataset_name, args.dataset_config_name, args.data_dir, set(named.values()))
    return name, {
        split: read_table(tables[table].rows, f"{name}, {table}", split, tables[table].folder)
        for split, table in named.items()
        if table in tables
    }


def _named_splits(args: TaskArguments) -> dict[str, str | None]:
    return {"train": args.train_split, "validation": args.validation_split, "test": args.test_split}


def _read_benchmark(args: TaskArguments, splits: Collection[str], benchmark: Benchmark) -> dict[str, list]:
    official = {split: named or benchmark.splits.get(split) for split, named in _named_splits(args).items()}
    if args.validation_split is None and (official["validation"] or "") in official["train"].split("+"):
        # What is trained on cannot be chosen by: pictures are held out instead.
        official["validation"] = None
    where = (args.data_dir, args.image_dir, args.dataset_name, args.dataset_config_name)
    return {split: benchmark.read(name, *where) for split, name in official.items() if name and split in splits}


def prepare_splits(
    args: TaskArguments,
    training_args: HiViLTTrainingArguments,
    read: Callable[[Collection[str]], tuple[str, dict[str, list]]],
    hold_out_by: Callable[[Any], str] = attrgetter("image_id"),
) -> tuple[str, dict[str, list], dict[str, list[str]], list[str] | None]:
    """The splits that this run needs, with examples held out of training where there is nothing else to choose by. A run
    that goes on holds out what it held out before, whatever rows came or went since.

    Args:
        args: how many examples to use, and what to do about bad pictures.
        training_args: what is asked for: training, evaluation, prediction.
        read: gives the name of the data and, of the splits it is asked for, those that there are.
        hold_out_by: what stays on one side when examples are held out; default: pictures.

    Returns:
        The name of the data, its splits, which of their pictures are bad, and what was held out (`None`: nothing was).

    Raises:
        ValueError: a split that is needed is not there, or nothing is left of what was held out.
        FileNotFoundError: pictures are missing.
    """
    needed = {
        "train": training_args.do_train,
        "validation": training_args.do_train or training_args.do_eval,
        "test": training_args.do_predict,
    }
    if args.calibrate and not needed["validation"]:
        raise ValueError("calibrate: a temperature is fitted on validation data; give --do_eval, or leave it out.")
    # Of a checkpoint that is calibrated after training, what is familiar is measured, too, if there is what it was trained on.
    wanted = [split for split in needed if needed[split] or (split == "train" and args.calibrate)]
    held_out = None
    # The main process writes what is cached; the others find it there.
    with training_args.main_process_first(desc="reading the data"):
        name, splits = read(wanted)
        if needed["validation"] and "validation" not in splits and "train" not in splits:
            splits |= read(["train"])[1]
    if needed["validation"] and "validation" not in splits and "train" in splits:
        checkpoint = checkpoint_to_resume(training_args)
        before = checkpoint and Path(checkpoint).parent / HELD_OUT
        drawn = json.loads(before.read_text(encoding="utf-8")) if before and before.is_file() else None
        splits["train"], splits["validation"] = hold_out(
            splits["train"], seed=training_args.seed, by=hold_out_by, chosen=drawn
        )
        held_out = list(dict.fromkeys(map(hold_out_by, splits["validation"]))) if drawn is None else drawn
    missing = [split for split in needed if needed[split] and split not in splits]
    if missing == ["test"] and training_args.do_train:
        logger.warning(f"{name}: no test data (--test_file or --test_split), so nothing is predicted.")
    elif missing:
        flags = " and ".join(f"--{split}_file (or --{split}_split of a dataset)" for split in missing)
        there = f"there is only {', '.join(splits)}" if splits else "there is none of it"
        raise ValueError(f"{name}: this run needs {', '.join(missing)} data, {there}: give {flags}.")

    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_predict_samples}
    used, bad_pictures = {}, {}
    for split in [split for split in splits if split in wanted]:
        examples = splits[split][: limits[split]]
        used[split], bad_pictures[split] = check_pictures(examples, args.on_bad_image, f"{name}, {split}")
    return name, used, bad_pictures, held_out


def encoder_cache_of(args: TaskArguments) -> EncoderCache | None:
    """Where the arguments say that what frozen encoders give is kept; `None` for nowhere."""
    if not args.encoder_cache:
        return None
    max_bytes = None if args.cache_gb is None else int(args.cache_gb * 1e9)
    return EncoderCache(args.cache_dir, max_bytes, args.cache_dtype)


def augmentation_of(args: TaskArguments) -> Augmentation | None:
    """What the arguments say to do to training pictures; `None` for nothing.

    Raises:
        ValueError: a value is out of range; names its flag.
    """
    if args.random_crop is None and args.random_flip is None and args.rand_augment is None:
        return None
    rand_augment = None if args.rand_augment is None else tuple(args.rand_augment)
    return Augmentation(random_crop=args.random_crop, random_flip=args.random_flip, rand_augment=rand_augment)


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------

# Parameters from which a model is not small: its tensors keep several CPU threads busy.
SMALL = 10_000_000

# The fusion of the small model; with two pretrained encoders HiViLTConfig's own defaults apply.
SMALL_FUSION = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_fusion_stages": 3,
    "fusion_intermediate_size": 128,
    "dropout": 0.0,
}


def small_vision_config() -> ResNetConfig:
    """A ResNet of 0.6 M parameters, for training from scratch on a processor; 8, 16 and 32 pixels to a token.

    From a few thousand pictures it learns shapes in fewer epochs than a ConvNeXtV2 or a ViT of its size. Its batch norms
    see the pictures of one step on one process, so its loss is not quite the same when a batch is cut otherwise.
    """
    return ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1], layer_type="basic")


def small_text_config(vocab_size: int) -> T5Config:
    """A T5 encoder of two layers, for training from scratch.

    It normalises first, is initialised for its width and adds no positions to its words, so that it tells words apart
    from the first steps on, where a BERT of its size needs epochs.
    """
    return T5Config(vocab_size=vocab_size, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 8192, max_length: int = 64) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer for one's own questions, lower case, with BERT's special tokens.

    Its pieces are the most frequent words, and all characters to spell the others with. They depend on nothing but the
    texts, not even on their order: the trainer of `tokenizers` draws its pieces anew in every process, and processes
    that train together must agree.

    Args:
        texts: what to learn it from.
        vocab_size: most entries.
        max_length: longer texts are cut.
    """
    normalizer, pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    counts = Counter(
        word for text in texts for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text))
    )
    characters = sorted(set("".join(counts)))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *characters, *(f"##{character}" for character in characters)]
    pieces += sorted(counts, key=lambda word: (-counts[word], word))
    pieces = list(dict.fromkeys(pieces))[:vocab_size]

    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def load_checkpoint(
    argument: str, name: str, model_class: type, any_head: bool = False, **config: Any
) -> tuple[HiViLTPreTrainedModel, HiViLTProcessor]:
    """A checkpoint's model, in float32, and its processor.

    Args:
        argument: what the caller calls it, for errors.
        name: folder or name on the Hub.
        model_class: a HiViLT class with a head.
        any_head: whether a checkpoint with another head will do; the new one is as it was initialized.
        **config: fields of its config to change.

    Raises:
        ValueError: it has another head.
        OSError: there is none of this name.
    """
    with _loading(argument, name):
        saved = HiViLTConfig.get_config_dict(name)[0]
        saved_as = saved.get("architectures") or ["an unknown class"]
        if not any_head and model_class.__name__ not in saved_as:
            raise ValueError(
                f"{argument}: {name} is a checkpoint of {', '.join(saved_as)}, expected {model_class.__name__}, whose head "
                "would be untrained: train it first, or name another checkpoint."
            )
        if saved.get("model_type") != HiViLTConfig.model_type:
            raise ValueError(
                f"{argument}: {name} is a checkpoint of {', '.join(saved_as)}, expected a HiViLT; an encoder alone goes "
                "into --vision_model or --text_model."
            )
        changed = {"config": HiViLTConfig.from_dict({**saved, **config})} if config else {}
        model = model_class.from_pretrained(name, dtype=torch.float32, **changed)
        processor = HiViLTProcessor.from_pretrained(name)
    check_tokens(argument, name, model, processor.tokenizer)
    return model, processor


def check_tokens(argument: str, name: str, model: HiViLTPreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Looks whether a tokenizer can be that of a model.

    Args:
        argument: what named them, for errors.
        name: what it named.

    Raises:
        ValueError: the text encoder has no embedding for one of its tokens.
    """
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    known = getattr(model.config.text_config, "vocab_size", None)
    if known is not None and number >= known:
        raise ValueError(
            f"{argument}: the tokenizer in {name} has the token {token!r} of number {number:,}, but the text encoder knows "
            f"{known:,}; it is of another model. Put back the one that the model was trained with."
        )


def load_or_build(
    args: TaskArguments,
    model_class: type,
    texts: Iterable[str] = (),
    trains: bool = False,
    resumed: str | os.PathLike | None = None,
    **config: Any,
) -> tuple[HiViLTPreTrainedModel, HiViLTProcessor]:
    """A model with its processor: the checkpoint that is named, or a new one on the encoders that are.

    Args:
        args: `model_name_or_path`, or `vision_model` and `text_model`; an encoder that is not named is small and new,
            and so is its tokenizer, trained on `texts`.
        model_class: a HiViLT class with a head.
        texts: the training texts.
        trains: whether the model is to be trained, so that a checkpoint with another head will do.
        resumed: the checkpoint that training goes on from; its tokens hold, and none is trained on `texts`.
        **config: fields of `HiViLTConfig` for a new model.

    Returns:
        The model in float32, and its processor.
    """
    if args.model_name_or_path:
        return load_checkpoint(
            "model_name_or_path", args.model_name_or_path, model_class, any_head=trains, **(args.fusion or {})
        )

    remote = {"trust_remote_code": args.trust_remote_code}
    if args.vision_model:
        with _loading("vision_model", args.vision_model):
            image_processor = AutoImageProcessor.from_pretrained(args.vision_model, **remote)
        if args.image_processor:
            image_processor = change_image_processor(image_processor, args.image_processor)
    else:
        size = {"height": args.image_size, "width": args.image_size}
        # Not the torchvision one, which differs a little: a checkpoint gives the same numbers wherever it is made.
        image_processor = ViTImageProcessorPil(size=size)
    if args.text_model:
        with _loading("text_model", args.text_model):
            tokenizer = AutoTokenizer.from_pretrained(args.text_model, **remote)
    elif resumed is not None:
        tokenizer = HiViLTProcessor.from_pretrained(resumed).tokenizer
    else:
        tokenizer = train_tokenizer(texts)

    small = {} if args.vision_model and args.text_model else SMALL_FUSION
    model = model_class.from_vision_text_pretrained(
        args.vision_model or small_vision_config(),
        args.text_model or small_text_config(len(tokenizer)),
        **{**small, **config, **(args.fusion or {})},
    )
    if args.text_model:
        check_tokens("text_model", args.text_model, model, tokenizer)
    if model.config.max_text_length is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.max_text_length)
    return model, HiViLTProcessor(image_processor, tokenizer)


def change_image_processor(image_processor: BaseImageProcessor, changes: Mapping[str, Any]) -> BaseImageProcessor:
    """An image processor like this one but for some fields.

    Raises:
        ValueError: it has no such field, or takes no such value.
    """
    fields_of = image_processor.to_dict()
    for name in changes:
        if name not in fields_of:  # transformers would drop it without a word
            kind = type(image_processor).__name__
            raise ValueError(f"image_processor: {kind} has no field {name}{_did_you_mean(name, fields_of)}")
        if isinstance(fields_of[name], bool) and not isinstance(changes[name], bool):
            raise ValueError(f"image_processor: {name} is true or false, got {changes[name]!r}.")
    try:
        return type(image_processor).from_dict({**fields_of, **changes})
    except (ValueError, TypeError) as error:
        raise ValueError(f"image_processor: {error}") from error


def freeze_parts(model: HiViLTPreTrainedModel, freeze: list[str]) -> None:
    """Freezes what `--freeze` names: parts of a HiViLT, or of an encoder the first layers, as `text:4`.

    Raises:
        ValueError: an encoder has fewer layers.
    """
    for one in freeze:
        part, _, num_layers = one.partition(":")
        try:
            model.freeze(part, int(num_layers) if num_layers else None)
        except ValueError as error:
            raise ValueError(f"freeze: got {one!r}. {error}") from error


def parameter_table(model: HiViLTPreTrainedModel) -> str:
    """Parameters of each part of a HiViLT, and how many of them train."""
    base = model.base_model
    parts = {"vision": base.vision_model, "text": base.text_model, "fusion": base.fusion}
    counted = {id(parameter) for part in parts.values() for parameter in part.parameters()}
    rows = {name: list(part.parameters()) for name, part in parts.items()}
    rows["head"] = [parameter for parameter in model.parameters() if id(parameter) not in counted]
    rows["all"] = list(model.parameters())
    lines = [f"{'part':8}{'parameters':>14}{'training':>14}"]
    for name, parameters in rows.items():
        training = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        lines.append(f"{name:8}{sum(parameter.numel() for parameter in parameters):14,}{training:14,}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def run(
    trainer: HiViLTTrainer,
    test_dataset: torch.utils.data.Dataset | None = None,
    held_out: list[str] | None = None,
    calibrate: bool = False,
) -> tuple[dict[str, dict], list | None]:
    """Trains, calibrates, saves, draws the curves, evaluates and predicts, as the flags of `trainer.args` ask.

    Args:
        trainer: with its datasets.
        test_dataset: for `do_predict`.
        held_out: what was held out of training, for when this run is resumed.
        calibrate: whether to divide scores by a temperature fitted on validation; without `do_train`, too.

    Returns:
        Metrics by split ("train", "validation", "test"), and the predictions for `test_dataset`.
    """
    args, metrics, predictions = trainer.args, {}, None
    folder = Path(args.output_dir)
    if args.do_train:
        if not args.resume_from_checkpoint:
            trainer.add_callback(_BeginsAnew(trainer, held_out))
        metrics["train"] = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
    if calibrate:
        trainer.calibrate()
    if args.do_train or calibrate:
        trainer.save_model(_internal_call=True)  # without pushing: card and results are yet to come
        trainer.measure_familiarity()
    if args.do_train and trainer.is_world_process_zero():
        plot_training(trainer.state.log_history, folder / "training.png", args.metric_for_best_model)
    if args.do_eval and trainer.eval_dataset is not None:
        metrics["validation"] = trainer.evaluate()
    if args.do_predict and test_dataset is not None:
        output = trainer.predict(test_dataset)
        metrics["test"], predictions = output.metrics, output.predictions
    if args.do_train:
        trainer.save_state()  # last: where it is, the run came to its end
    return metrics, predictions


# Below it a share that was measured says little.
FEW = 100


def warn_of_few(split: str, count: int, unit: str) -> None:
    """Warns where a split is so small that what is measured on it says little, with the standard error of a share."""
    if 0 < count < FEW:
        error = 50 / math.sqrt(count)
        logger.warning(
            f"{split}: {count} {unit} are few; a share of them has a standard error of up to {error:.0f} percentage points, so "
            f"do not trust smaller differences. Give a larger --{split}_file, or more data to hold out of."
        )


def warn_of_chance(args: TaskArguments, metric: str, value: float, chance: float, count: int, num_images: int) -> None:
    """Warns where a run from scratch ends where it might as well not have looked, and says how to start instead.

    Args:
        args: the script's; a run from a checkpoint or on a pretrained vision encoder is left alone.
        metric: what it is called.
        value, chance: what the model reaches on validation, and what one without the images would; shares.
        count: what was measured on; `value` is told from chance where it is three standard errors above.
        num_images: that it was trained on.
    """
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


def set_threads(args: TaskArguments, model: HiViLTPreTrainedModel) -> None:
    """Lets torch use as many CPU threads as `num_threads` says; unset, as many as suit the model's size."""
    threads = args.num_threads
    if threads is None:
        small = sum(parameter.numel() for parameter in model.parameters()) < SMALL
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = 1 if small else max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.set_num_threads(threads)


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
    """Writes what a benchmark measured to `<name>-<hardware>.json`.

    Args:
        folder: where; made if need be.
        name: of the benchmark.
        results: with what `environment` gives under "environment".

    Returns:
        The file's path; a picture of the results goes beside it, with another ending.
    """
    hardware = re.sub(r"\W+", "-", results["environment"]["device_name"]).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{hardware}.json"
    write_json(path, results)
    return path


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is there as a whole or not at all, and what it was before until then.

    Raises:
        ValueError: a number is NaN or infinite, which JSON has no word for.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def _processor_name() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def peak_memory_bytes() -> int:
    """Most memory this process has held so far (resident set), in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: what it says begins with the peak of the process that started this one.
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil  # which accelerate needs anyway

        return psutil.Process().memory_info().peak_wset
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, others in KiB.
    return peak if sys.platform == "darwin" else peak * 1024


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
    """What `results.json` holds: metrics and speed of each split, size, memory, settings, versions and hardware.

    Args:
        trainer: after `run`.
        args: the script's arguments.
        metrics: by split, as `run` returns them.
        **more: what else to write.
    """
    results = dict(more)
    for split, found in metrics.items():
        if split == "train":
            continue
        names = {name.split("_", 1)[1]: value for name, value in found.items() if "_" in name}
        names["seconds"], names[f"{trainer.unit}_per_second"] = names.pop("runtime"), names.pop("samples_per_second")
        results[split] = {name: value for name, value in names.items() if name != "steps_per_second"}
    if "train" in metrics:
        # Evaluations within training are counted apart; saving is not.
        seconds = metrics["train"]["train_runtime"] - trainer.seconds_evaluating
        results["train"] = {
            # Of a run that was resumed at its end there is none.
            "loss": metrics["train"]["train_loss"] if trainer.num_examples_trained else None,
            "epochs": trainer.state.epoch,
            "steps": trainer.state.global_step,
            trainer.unit: trainer.num_examples_trained,
            "seconds": seconds,
            f"{trainer.unit}_per_second": trainer.num_examples_trained / seconds,
        }
    parameters = list(trainer.model.parameters())
    results["parameters"] = {
        "all": sum(parameter.numel() for parameter in parameters),
        "training": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    }
    results |= {name: found for name in ("calibration", "familiarity") if (found := getattr(trainer, name)) is not None}
    if trainer.encoder_cache is not None and (cached := trainer.encoder_cache.summary()):
        results["encoder_cache"] = cached
    results["peak_memory_bytes"] = peak_memory_bytes()
    if torch.cuda.is_available():
        results["peak_cuda_memory_bytes"] = torch.cuda.max_memory_allocated()
    named = ("seed", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
    named += (
        "per_device_eval_batch_size",
        "learning_rate",
        "weight_decay",
        "warmup_steps",
        "lr_scheduler_type",
        "optim",
    )
    named += ("max_grad_norm", "bf16", "fp16", "dataloader_num_workers", "world_size", "metric_for_best_model")
    settings = {**asdict(args), **{name: getattr(trainer.args, name) for name in named}}
    results["settings"] = {
        name: without_place(value) if isinstance(value, str) else value for name, value in settings.items()
    }
    results["environment"] = environment()
    return results
