"""What a run is told: which model, which data, how to train; flags and settings files."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from hivilt.configuration_hivilt import HiViLTConfig
from hivilt.training.check_arguments import check_training_arguments
from hivilt.training.flags import Parser, flags_in_file, is_settings_file, read_mapping
from hivilt.training.names import check_name, did_you_mean, is_path, missing_place

# Fields of HiViLTConfig that fit whatever weights a checkpoint has.
CHANGEABLE = ("fusion_top_k", "dropout", "embedding_dropout", "classification_loss_weight", "contrastive_loss_weight")
CHANGEABLE += ("auxiliary_loss_weight", "gather_negatives")


def _check_numbers(args: Any, names: Sequence[str], least: float, below: float = float("inf")) -> None:
    for name in names:
        value = getattr(args, name)
        if isinstance(value, int | float) and not least <= value < below:
            end = "" if below == float("inf") else f" and less than {below}"
            raise ValueError(f"{name}: expected at least {least}{end}, got {value}; leave it out for the default.")


@dataclass
class TaskArguments:
    """Which model and which data; what question answering and retrieval have in common."""

    model_name_or_path: str | None = HfArg(default=None, help="Checkpoint to go on from: a folder or a Hub name.")
    vision_model: str | None = HfArg(default=None, help="Pretrained vision encoder. Unset: a small one from scratch.")
    text_model: str | None = HfArg(default=None, help="Pretrained text encoder. Unset: a small one from scratch.")
    min_word_count: int = HfArg(
        default=1,
        help="Spell rarer words of the training texts letter by letter, where the text encoder is from scratch.",
    )
    fusion: dict | str | None = HfArg(
        default=None,
        help="HiViLTConfig fields of a new HiViLT as JSON: '{\"fusion_top_k\": 8}'; of a checkpoint those that its weights "
        "do not depend on, such as dropout.",
    )
    image_size: int = HfArg(default=64, help="Side in pixels that a small vision encoder works at.")
    image_processor: dict | str | None = HfArg(
        default=None,
        help="What a new HiViLT's image processor does otherwise than vision_model's own, as JSON: "
        '\'{"size": {"height": 256, "width": 320}, "do_center_crop": false}\'.',
    )
    freeze: list[str] = HfArg(
        default_factory=list,
        help="Parts not to train: vision, text, fusion; vision:12 or text:4 are embeddings and so many first layers.",
    )
    trust_remote_code: bool = HfArg(default=False, help="Run the Hub's code of a tokenizer or image processor.")
    benchmark: str | None = HfArg(default=None, help="Data set of the field, by name.")
    dataset_name: str | None = HfArg(default=None, help="Dataset on the Hub, or its folder; a benchmark's other copy.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of that dataset.")
    data_dir: str | None = HfArg(default=None, help="Image folder with metadata.jsonl or .csv; a benchmark's files.")
    image_dir: str | None = HfArg(default=None, help="Folder of a benchmark's images, if they do not lie in data_dir.")
    train_file: str | None = HfArg(default=None, help="Training data: JSON, JSONL, CSV or Parquet.")
    validation_file: str | None = HfArg(default=None, help="Data for choosing, likewise.")
    test_file: str | None = HfArg(default=None, help="Data for the final measurement, likewise.")
    train_split: str | None = HfArg(default=None, help="'train', or the benchmark's; 'train+val' joins two of it.")
    validation_split: str | None = HfArg(default=None, help="'validation', or the benchmark's; else images held out.")
    test_split: str | None = HfArg(default=None, help="'test', or the benchmark's.")
    image_column: str = HfArg(default="image", help="Column of images or of their paths.")
    image_id_column: str | None = HfArg(default=None, help="Column that tells images apart, if any.")
    on_bad_image: Literal["error", "skip"] = HfArg(
        default="error", help="A missing or unreadable image stops the run, or is left out."
    )
    max_train_samples: int | None = HfArg(default=None, help="Train on this many at most.")
    max_eval_samples: int | None = HfArg(default=None, help="Choose by this many at most.")
    max_predict_samples: int | None = HfArg(default=None, help="Measure on this many at most.")
    random_crop: float | None = HfArg(default=None, help="Train on crops of at least this share of an image: 0.5.")
    random_flip: Literal["skip", "swap"] | None = HfArg(
        default=None,
        help="Mirror half of the training images: never where a text says left or right ('skip'), or with these words "
        "swapped ('swap').",
    )
    rand_augment: list[int] | None = HfArg(default=None, help="RandAugment: number of operations and strength: 2 7.")
    encoder_cache: bool = HfArg(default=True, help="Encode once for all epochs and runs, where the encoder is frozen.")
    cache_dir: str | None = HfArg(default=None, help="Folder of what was encoded. Unset: $HF_HOME/hivilt.")
    cache_gb: float | None = HfArg(default=50.0, help="Gigabytes that cache_dir may hold; the rest is encoded anew.")
    cache_dtype: Literal["float32", "float16", "bfloat16"] | None = HfArg(
        default=None, help="What it is stored in. Unset: as the encoders give it, so that losses are the same."
    )
    calibrate: bool = HfArg(
        default=False,
        help="Divide scores by one temperature, fitted on validation, so that of answers given with 80 %% about 80 %% are "
        "right; after training, or with --do_eval of the checkpoint that model_name_or_path names, which is saved anew.",
    )
    vision_learning_rate: float | None = HfArg(default=None, help="Of the vision encoder. Unset: learning_rate.")
    text_learning_rate: float | None = HfArg(default=None, help="Of the text encoder. Unset: learning_rate.")
    overwrite_output_dir: bool = HfArg(default=False, help="Begin anew over the run that output_dir holds.")
    num_threads: int | None = HfArg(
        default=None,
        help="CPU threads of a process. Unset: its share of all; below 10 million parameters one, for grounding two.",
    )
    license: str = HfArg(default="apache-2.0", help="Of the weights, for the model card: the Hub's name of a license.")
    language: list[str] = HfArg(default_factory=lambda: ["en"], help="Of the texts, for the model card, such as en de.")

    task = ""  # of those of a task: where its class is, as `pkgutil.resolve_name` takes it
    defaults = {  # of any flag
        "learning_rate": 1.5e-3,
        "adam_beta2": 0.98,  # what colours taught the gradients' scale is soon forgotten, so shapes are learned next
        "weight_decay": 0.05,
        "warmup_steps": 0.1,  # a share of all steps
    }
    threads_of_small = 1  # CPU threads that a small model keeps busy
    own_benchmark = None  # that is read where no data is named
    benchmark_defaults = {}  # of each benchmark, by its name, the flags that it sets by itself
    # Those of its fields that are numbers from one on, and files and folders to read.
    at_least_one = (
        "image_size",
        "num_threads",
        "min_word_count",
        "max_train_samples",
        "max_eval_samples",
        "max_predict_samples",
    )
    at_least_zero = ()
    places = ("data_dir", "image_dir", "train_file", "validation_file", "test_file")

    @classmethod
    def parse(cls, argv: Sequence[str]) -> "tuple[TaskArguments, HiViLTTrainingArguments]":
        """`parse_arguments` with the defaults of this task."""
        return parse_arguments(argv, cls, cls.defaults, cls.benchmark_defaults)

    def __post_init__(self):
        # The Hub refuses a card with others, and with it the whole push at the end of a run.
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise ValueError(f"license: expected the Hub's name of one, such as apache-2.0, got {self.license!r}.")
        for code in self.language:
            if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", code):
                raise ValueError(f"language: expected ISO 639 codes of two or three letters, such as en, got {code!r}.")
        for name, kind in (("image_processor", "an image processor"), ("fusion", "HiViLTConfig")):
            value = getattr(self, name)
            value = read_mapping(name, value) if isinstance(value, str) else value
            if not isinstance(value, dict | None):
                raise ValueError(f"{name}: expected fields of {kind} with their values, got {value!r}.")
            setattr(self, name, value)
        known = [field.name for field in fields(HiViLTConfig)]
        for name in self.fusion or ():
            if name not in known:  # HiViLTConfig would keep it, and do nothing with it
                raise ValueError(f"fusion: HiViLTConfig has no field {name}{did_you_mean(name, known)}")
        for part in self.freeze:
            if not re.fullmatch(r"vision|text|fusion|(vision|text):\d+", part, re.ASCII):
                raise ValueError(
                    "freeze: expected any of vision, text, fusion, or an encoder and a number of layers such as vision:12, "
                    f"with blanks between, got {part!r}."
                )
        if len({part.partition(":")[0] for part in self.freeze}) < len(self.freeze):
            raise ValueError(f"freeze: expected each part once, got {' '.join(self.freeze)}.")
        _check_numbers(self, self.at_least_one, least=1)
        _check_numbers(self, self.at_least_zero, least=0)
        _check_numbers(self, ("vision_learning_rate", "text_learning_rate"), least=0)
        if self.cache_gb is not None and not self.cache_gb > 0:
            raise ValueError(f"cache_gb: expected more than 0, got {self.cache_gb}; --no_encoder_cache caches nothing.")
        for name in (*self.places, "cache_dir"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, os.path.expanduser(value))  # a settings file passes no shell
        self._check_sources()
        if not self.names_data():
            self.benchmark = self.own_benchmark

    def _check_sources(self) -> None:
        files = self.train_file or self.validation_file or self.test_file
        given = [name for name in ("dataset_name", "data_dir") if getattr(self, name)]
        given += ["train_file, validation_file, test_file"] if files else []
        if len(given) > 1:
            raise ValueError(f"Data can come from one source, got {' and '.join(given)}; drop all but one.")
        if self.benchmark and files:
            raise ValueError(f"A benchmark has its own files: drop benchmark, or {given[0]}.")
        if self.image_processor and not self.vision_model:
            raise ValueError(
                "image_processor: changes that of vision_model, which is not given; a checkpoint keeps its own, and a small "
                "new encoder takes image_size."
            )
        if self.min_word_count != 1 and (brings := self.model_name_or_path or self.text_model):
            raise ValueError(f"min_word_count: it is of a new tokenizer, and {brings} brings its own; leave it out.")
        if self.model_name_or_path and (self.vision_model or self.text_model):
            raise ValueError(
                "model_name_or_path names a whole HiViLT; drop vision_model and text_model, which build one."
            )
        built = [name for name in self.fusion or () if name not in CHANGEABLE]
        if self.model_name_or_path and built:
            raise ValueError(
                f"fusion: {built[0]} decides what weights a HiViLT has, and model_name_or_path names one that has them; of a "
                f"checkpoint these can be changed: {', '.join(CHANGEABLE)}."
            )

    def check_places(self) -> None:
        """Looks whether the files and folders to read are there.

        Raises:
            FileNotFoundError: one is not; names its flag.
            ValueError: it is a folder and not a file, or the other way round.
        """
        for name in self.places:
            place, is_file = getattr(self, name), name.endswith("_file")
            # A benchmark looks through its own folders, and says which of its files they lack.
            if place is None or (self.benchmark is not None and name in ("data_dir", "image_dir")):
                continue
            if not os.path.exists(place):
                raise missing_place(name, place)
            if os.path.isdir(place) == is_file:
                here, wanted = ("folder", "file") if is_file else ("file", "folder")
                raise ValueError(f"{name}: {place} is a {here}; name a {wanted}.")
        for name in ("model_name_or_path", "vision_model", "text_model"):
            if (value := getattr(self, name)) is not None:
                check_name(name, value)
        if self.dataset_name is not None and is_path(self.dataset_name) and not os.path.exists(self.dataset_name):
            raise missing_place("dataset_name", self.dataset_name)

    def names_data(self) -> bool:
        """Whether any data is named; else the script has its own."""
        names = ("benchmark", "dataset_name", "data_dir", "train_file", "validation_file", "test_file")
        return any(getattr(self, name) for name in names)


# Numbers of TrainingArguments, by the values that have a meaning.
AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
NOT_NEGATIVE = ("num_train_epochs", "learning_rate", "weight_decay", "max_grad_norm", "dataloader_num_workers")
NOT_NEGATIVE += ("seed", "data_seed", "adam_epsilon")
SHARES = ("adam_beta1", "adam_beta2", "label_smoothing_factor")


@dataclass
class HiViLTTrainingArguments(TrainingArguments):
    """`TrainingArguments` that do all three of training, evaluation and prediction unless told which; flags without a
    meaning here are refused (docs/training_arguments.md)."""

    remove_unused_columns: bool = HfArg(default=False, help="Not here: Trainer would drop images and texts.")
    resume_from_checkpoint: str | None = HfArg(
        default=None, help="Folder of a checkpoint to go on from, or last: the last whole one of output_dir."
    )

    def __post_init__(self):
        # TrainingArguments takes any numbers itself.
        _check_numbers(self, AT_LEAST_ONE, least=1)
        _check_numbers(self, NOT_NEGATIVE, least=0)
        _check_numbers(self, SHARES, least=0, below=1)
        if self.max_steps == 0:  # transformers would take it for as many as num_train_epochs has
            raise ValueError("max_steps: expected at least 1, got 0; leave it out to train for num_train_epochs.")
        # Before the parent, which builds what some name, and after it, when all have their types.
        check_training_arguments(self)
        # Before the parent, which sets do_eval wherever there is an eval_strategy.
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
        if self.report_to:
            # Here, for it imports all that models are made of, which --help does without.
            from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
        for name in self.report_to:
            if name not in INTEGRATION_TO_CALLBACK:
                known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
                raise ValueError(f"report_to: expected any of {known}, got {name!r}.")
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
        self.dataloader_pin_memory &= torch.accelerator.is_available()
        if (self.resume_from_checkpoint or "").lower() in ("true", "last"):
            self.resume_from_checkpoint = True

    @property
    def draw_seed(self) -> int:
        """The seed of what is drawn of the training data: `data_seed`, unless it is not set."""
        return self.seed if self.data_seed is None else self.data_seed


# What grouping asks of Trainer, and what suits runs that people wait for; flags and files override all of it.
COMMON_DEFAULTS = {
    # Dispatching slices every tensor of a batch alike, but images and texts differ in number.
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
    """Arguments from flags `argv`, or from one JSON or YAML file. Over `COMMON_DEFAULTS` the script's `defaults` hold, and
    over those the `benchmark_defaults` of what `--benchmark` names; without any data named, of the task's own.

    Raises:
        ValueError: an argument is unknown or wrong; names it.
        OSError: the file cannot be read.
    """
    parser = Parser((task_class, HiViLTTrainingArguments), allow_abbrev=False)
    if len(argv) == 1 and is_settings_file(argv[0]):
        argv = flags_in_file(Path(argv[0]), parser)
    parser.set_defaults(**{**COMMON_DEFAULTS, **defaults})
    given = parser.parse_args(argv)
    benchmark = given.benchmark if task_class.names_data(given) else task_class.own_benchmark
    parser.set_defaults(**(benchmark_defaults or {}).get(benchmark, {}))
    return parser.parse_args_into_dataclasses(args=list(argv), look_for_args_file=False)
