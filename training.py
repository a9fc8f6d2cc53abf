"""What every run does: read its arguments, build a model, train, save, draw, evaluate, and write down what it measured."""

import json
import logging
import os
import platform
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.nn.functional as F
import transformers
import yaml
from accelerate.utils import gather_object
from huggingface_hub import ModelCard, ModelCardData
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    ResNetConfig,
    T5Config,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
)
from transformers.trainer_utils import EvalLoopOutput

import hivilt
from hivilt.data.vqa import IGNORED_LABEL, VQAExample, open_picture
from hivilt.evaluation.plots import AnsweredQuestion, attention_map, plot_training
from hivilt.evaluation.vqa import majority_answer, vqa_metrics
from hivilt.modeling_hivilt import HiViLTPreTrainedModel
from hivilt.processing_hivilt import HiViLTProcessor

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


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
        default=None, metadata={"help": "HiViLTConfig fields of a new HiViLT as JSON: '{\"fusion_top_k\": 8}'."}
    )
    image_size: int = field(default=64, metadata={"help": "Side in pixels that a small vision encoder works at."})
    freeze: list[str] = field(default_factory=list, metadata={"help": "Parts not to train: vision, text, fusion."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with a tokenizer or image processor from the Hub."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the Hub, or a folder of one."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    data_dir: str | None = field(default=None, metadata={"help": "Image folder with metadata.jsonl or metadata.csv."})
    train_file: str | None = field(default=None, metadata={"help": "Training data: JSON, JSONL, CSV or Parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Data for choosing, likewise."})
    test_file: str | None = field(default=None, metadata={"help": "Data for the final measurement, likewise."})
    train_split: str = field(default="train", metadata={"help": "Name of the split in a dataset or image folder."})
    validation_split: str = field(
        default="validation", metadata={"help": "Likewise; if absent, pictures are held out."}
    )
    test_split: str = field(default="test", metadata={"help": "Likewise."})
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
    num_threads: int = field(default=1, metadata={"help": "CPU threads of one process; small tensors want few."})

    def __post_init__(self):
        if isinstance(self.fusion, str):
            self.fusion = json.loads(self.fusion)
        sources = {
            "dataset_name": self.dataset_name,
            "data_dir": self.data_dir,
            "train_file, validation_file, test_file": self.train_file or self.validation_file or self.test_file,
        }
        given = [name for name, value in sources.items() if value]
        if len(given) > 1:
            raise ValueError(f"Data can come from one source, got {' and '.join(given)}; drop all but one.")
        if self.model_name_or_path and (self.vision_model or self.text_model or self.fusion):
            raise ValueError(
                "model_name_or_path names a whole HiViLT; drop vision_model, text_model and fusion, which build a new one."
            )


@dataclass
class HiViLTTrainingArguments(TrainingArguments):
    """`TrainingArguments` that do all three of training, evaluation and prediction unless told which."""

    def __post_init__(self):
        # Before the parent, which sets do_eval by itself wherever there is an eval_strategy.
        if not (self.do_train or self.do_eval or self.do_predict):
            self.do_train = self.do_eval = self.do_predict = True
        if not self.do_train:
            self.eval_strategy, self.load_best_model_at_end = "no", False
        super().__post_init__()
        # Without an accelerator there is nothing to pin for, and torch warns.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        if self.resume_from_checkpoint is not None and self.resume_from_checkpoint.lower() in ("true", "last"):
            self.resume_from_checkpoint = True


# What grouping asks of Trainer, and what suits runs that people wait for; flags and files override all of it.
COMMON_DEFAULTS = {
    # Trainer would drop the columns that `forward` does not name, pictures and questions among them.
    "remove_unused_columns": False,
    # Dispatching slices every tensor of a batch alike, but pictures and texts differ in number.
    "accelerator_config": {"dispatch_batches": False},
    # Every parameter that trains has a gradient in every step.
    "ddp_find_unused_parameters": False,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "lr_scheduler_type": "cosine",
    "logging_steps": 50,
    "report_to": "none",
}


def parse_arguments(
    argv: Sequence[str], task_class: type[TaskArguments], defaults: Mapping[str, Any]
) -> tuple[TaskArguments, HiViLTTrainingArguments]:
    """Arguments from flags, or from one JSON or YAML file.

    Args:
        argv: the command line without the program's name.
        task_class: the script's own arguments.
        defaults: the script's defaults for `TrainingArguments`, over `COMMON_DEFAULTS`.

    Raises:
        ValueError: an argument is unknown.
    """
    parser = HfArgumentParser((task_class, HiViLTTrainingArguments), allow_abbrev=False)
    defaults = {**COMMON_DEFAULTS, **defaults}
    parser.set_defaults(**defaults)
    if len(argv) == 1 and argv[0].endswith((".json", ".yaml", ".yml")):
        argv = _flags_in_file(Path(argv[0]))
    return parser.parse_args_into_dataclasses(args=list(argv), look_for_args_file=False)


def _flags_in_file(path: Path) -> list[str]:
    """The flags that a JSON or YAML file stands for, so that its values are read as those of flags: YAML's 1e-3 too."""
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}  # YAML reads JSON too
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected names of flags with their values, got a {type(settings).__name__}.")
    flags = []
    for name, value in settings.items():
        if value is not None:
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            flags += [f"--{name}", *map(str, values)]
    return flags


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------

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


def load_or_build(
    args: TaskArguments, model_class: type, texts: Iterable[str] = (), **config: Any
) -> tuple[HiViLTPreTrainedModel, HiViLTProcessor]:
    """A model with its processor: the checkpoint that is named, or a new one on the encoders that are.

    Args:
        args: `model_name_or_path`, or `vision_model` and `text_model`; an encoder that is not named is small and new,
            and so is its tokenizer, trained on `texts`.
        model_class: a HiViLT class with a head.
        texts: the training texts.
        **config: fields of `HiViLTConfig` for a new model.

    Returns:
        The model in float32, and its processor.
    """
    if args.model_name_or_path:
        model = model_class.from_pretrained(args.model_name_or_path, dtype=torch.float32)
        return model, HiViLTProcessor.from_pretrained(args.model_name_or_path)

    remote = {"trust_remote_code": args.trust_remote_code}
    if args.vision_model:
        image_processor = AutoImageProcessor.from_pretrained(args.vision_model, **remote)
    else:
        size = {"height": args.image_size, "width": args.image_size}
        # Not the torchvision one, which differs a little: a checkpoint gives the same numbers wherever it is made.
        image_processor = ViTImageProcessorPil(size=size)
    tokenizer = AutoTokenizer.from_pretrained(args.text_model, **remote) if args.text_model else train_tokenizer(texts)

    small = {} if args.vision_model and args.text_model else SMALL_FUSION
    model = model_class.from_vision_text_pretrained(
        args.vision_model or small_vision_config(),
        args.text_model or small_text_config(len(tokenizer)),
        **{**small, **config, **(args.fusion or {})},
    )
    if model.config.max_text_length is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.max_text_length)
    return model, HiViLTProcessor(image_processor, tokenizer)


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
# Trainers
# ---------------------------------------------------------------------------------------------------------------------


class HiViLTTrainer(Trainer):
    """`Trainer` that leaves the model card alone: the scripts write their own, from measured values."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            # nn.DataParallel cuts every tensor into as many pieces, but pictures and texts differ in number.
            raise ValueError(
                f"This process sees {self.args.n_gpu} devices. Start one process for each (accelerate launch or "
                "torchrun), or show it one: CUDA_VISIBLE_DEVICES=0."
            )

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes nothing; Trainer's own would replace README.md, front matter and all, on every push."""


class QuestionAnsweringTrainer(HiViLTTrainer):
    """Trains and evaluates on a `VQADataset`, whose unit is a picture while losses and metrics count questions.

    The loss of a step is the mean over all its questions: over pictures with few and many of them, over accumulated
    batches and over processes. Evaluation keeps the best few answers of each question, not the scores of all answers,
    and gives exactly one prediction a question, in order, on any number of processes.

    Args:
        top_k: how many answers to keep for each question.
        **kwargs: as `Trainer`; `processing_class` is the `HiViLTProcessor`.
    """

    def __init__(self, *args, top_k: int = 3, **kwargs):
        super().__init__(*args, **kwargs)
        self.top_k = top_k
        self.num_questions_trained = 0
        self.seconds_evaluating = 0.0

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one step, and how many questions with an answer they hold, on all processes together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_questions = torch.tensor([sum(int(_answered(batch["labels"]).sum()) for batch in batches)], device=device)
        num_questions = self.accelerator.gather(num_questions).sum()
        self.num_questions_trained += int(num_questions)
        return batches, num_questions

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss, weighted by the share of this batch in the questions of the step."""
        num_questions = int(_answered(inputs["labels"]).sum())
        inputs = {name: value for name, value in inputs.items() if name != "question_index"}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if num_items_in_batch is not None:
            # Trainer goes on to divide by the number of batches, and gradients are averaged over processes.
            share = num_questions / num_items_in_batch.clamp(min=1)
            loss = loss * share * self.current_gradient_accumulation_steps * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Answers every question of a `VQADataset`; replaces the loop of `Trainer`, whose gathering counts batch rows
        in the dataset's units and would cut the last batch to a number of pictures.

        Returns:
            `predictions`: for each question, in the dataset's order, `{"answer": str, "score": float}` of the `top_k`
            best. `metrics`: those of `vqa_metrics`, and `loss`, the mean classification loss of the questions whose
            answer is in the vocabulary. `num_samples`: the number of questions.
        """
        start = time.perf_counter()
        model = self.model.eval()
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()  # schedule-free optimizers evaluate at other weights than they train at
        if not self.is_in_train and (self.args.fp16_full_eval or self.args.bf16_full_eval):
            model = model.to(self.args.device, torch.float16 if self.args.fp16_full_eval else torch.bfloat16)
        if self.args.world_size > 1:
            # Batch norms of each process have seen other pictures; those of the main process are what is saved.
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)
        self.callback_handler.eval_dataloader = dataloader

        records = []
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            question_index = inputs.pop("question_index").tolist()
            labels = inputs.pop("labels", None)
            with torch.no_grad(), self.compute_loss_context_manager():
                logits = model(**inputs).logits
            losses = [None] * len(logits) if labels is None else question_losses(logits, labels)
            records += zip(question_index, losses, self._best_answers(logits), strict=True)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        # The last batches of several processes are filled up with pictures from the front: keep one of each question.
        by_index = {index: (loss, answers) for index, loss, answers in gather_object(records)}
        examples = dataloader.dataset.examples
        if sorted(by_index) != list(range(len(examples))):
            raise RuntimeError(f"{description}: {len(by_index)} of {len(examples)} questions were answered.")
        predictions = [by_index[index][1] for index in range(len(examples))]

        metrics = vqa_metrics(
            [[answer["answer"] for answer in answers] for answers in predictions],
            [example.answers for example in examples],
        )
        losses = [loss for loss, _ in by_index.values() if loss is not None]
        if losses:
            metrics["loss"] = sum(losses) / len(losses)
        if self.is_in_train:
            self.seconds_evaluating += time.perf_counter() - start
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions, None, metrics, len(examples))

    def _best_answers(self, logits: torch.Tensor) -> list[list[dict[str, Any]]]:
        config = self.model.config
        return self.processing_class.post_process_question_answering(
            logits,
            top_k=self.top_k,
            id2label=config.id2label,
            multi_label=config.problem_type == "multi_label_classification",
        )


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
def answer_and_look(
    model: HiViLTPreTrainedModel, processor: HiViLTProcessor, examples: Sequence[VQAExample], top_k: int = 3
) -> list[AnsweredQuestion]:
    """Answers questions and keeps where their words looked in the picture, at the finest fusion stage.

    Args:
        model: a `HiViLTForQuestionAnswering`; switched to eager attention, which alone shows its weights, meanwhile.
        processor: its processor.
        examples: the questions, few enough for one batch.
        top_k: how many answers to keep for each.
    """
    model.eval()
    pictures = [open_picture(example.image) for example in examples]
    texts = [[example.question] for example in examples]
    inputs = processor(images=pictures, text=texts, return_tensors="pt").to(model.device)
    # Each part goes back to its own: not every encoder has the implementation of the whole.
    config = model.config
    parts = {"": config, "vision_config": config.vision_config, "text_config": config.text_config}
    usual = {name: part._attn_implementation for name, part in parts.items()}
    model.set_attn_implementation("eager")
    try:
        image_states = model.encode_images(inputs.pop("pixel_values"))
        outputs = model(**inputs, image_states=image_states, output_attentions=True)
    finally:
        model.set_attn_implementation(usual)

    # Without local fusion there are no stages, and nothing to see.
    attentions = outputs.cross_attentions[0].float().cpu().numpy() if outputs.cross_attentions else [None] * len(texts)
    grid = tuple(image_states.level_states[0].shape[1:3])
    masks = inputs["attention_mask"].cpu().numpy()
    answers = processor.post_process_question_answering(
        outputs.logits,
        top_k=top_k,
        id2label=config.id2label,
        multi_label=config.problem_type == "multi_label_classification",
    )
    return [
        AnsweredQuestion(
            image=picture,
            question=example.question,
            predictions=predictions,
            answer=majority_answer(example.answers) if example.answers else None,
            attention=None if attention is None else attention_map(attention, mask, grid),
        )
        for picture, example, predictions, attention, mask in zip(
            pictures, examples, answers, attentions, masks, strict=True
        )
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def run(trainer: Trainer, test_dataset: torch.utils.data.Dataset | None = None) -> tuple[dict[str, dict], list | None]:
    """Trains, saves, draws the curves, evaluates and predicts, as the flags of `trainer.args` ask.

    Args:
        trainer: with its datasets.
        test_dataset: for `do_predict`.

    Returns:
        Metrics by split ("train", "validation", "test"), and the predictions for `test_dataset`.
    """
    args, metrics, predictions = trainer.args, {}, None
    folder = Path(args.output_dir)
    if args.do_train:
        metrics["train"] = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
        trainer.save_model()
        trainer.save_state()
        if trainer.is_world_process_zero():
            plot_training(trainer.state.log_history, folder / "training.png")
    if args.do_eval and trainer.eval_dataset is not None:
        metrics["validation"] = trainer.evaluate()
    if args.do_predict and test_dataset is not None:
        output = trainer.predict(test_dataset)
        metrics["test"], predictions = output.metrics, output.predictions
    return metrics, predictions


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


def _processor_name() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def peak_memory_bytes() -> int:
    """Most memory this process has held so far (resident set), in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def write_model_card(
    folder: str | os.PathLike,
    data: ModelCardData,
    summary: str,
    usage: str,
    limits: str,
    results: Mapping[str, Any],
    log_history: Sequence[Mapping[str, Any]],
) -> None:
    """Writes `README.md`: front matter, use, results, course of training, limits, settings. All numbers are measured.

    Args:
        folder: the checkpoint's.
        data: the front matter.
        summary: what the model is, a paragraph.
        usage: Python code that works as it stands, beside the folder.
        limits: what it cannot do, a list.
        results: as `results.json` has it; `train`, `validation` and `test` where they were measured.
        log_history: `trainer.state.log_history`.
    """
    measured = [f"| {split} | {name} | {_number(value)} |" for split, name, value in _metrics(results)]
    # A card is shared: the names of files here, without where this machine keeps them.
    settings = {
        name: Path(value).name if isinstance(value, str) and os.path.isabs(value) else value
        for name, value in results["settings"].items()
        if value not in (None, [])
    }
    # By step: the last line may repeat an earlier one, when the best checkpoint is evaluated once more.
    evaluated = {
        entry["step"]: entry for entry in reversed(log_history) if {"eval_loss", "eval_accuracy"} <= set(entry)
    }
    epochs = [
        f"| {entry['epoch']:.2f} | {step} | {_number(entry['eval_loss'])} | {_number(entry['eval_accuracy'])} |"
        for step, entry in sorted(evaluated.items())
    ]
    content = f"""---
{data.to_yaml()}
---

# {data.model_name}

{summary}

## Use

```python
{usage.strip()}
```

## Results

| split | metric | value |
|---|---|---|
{chr(10).join(measured)}

![Questions, answers and where the model looked](predictions.png)

## Training

![Loss and accuracy](training.png)

| epoch | step | held-out loss | held-out accuracy |
|---|---|---|---|
{chr(10).join(epochs)}

```json
{json.dumps(settings, indent=2)}
```

Measured on:

```json
{json.dumps(results["environment"], indent=2)}
```

## Limits

{limits.strip()}
"""
    if not measured:
        content = content.replace("| split | metric | value |\n|---|---|---|\n\n", "None was measured.\n\n")
    if not epochs:
        content = content.replace("| epoch | step | held-out loss | held-out accuracy |\n|---|---|---|---|\n\n", "")
    if not Path(folder, "predictions.png").exists():
        content = content.replace("![Questions, answers and where the model looked](predictions.png)\n\n", "")
    ModelCard(content).save(Path(folder, "README.md"))


def _metrics(results: Mapping[str, Any]) -> Iterable[tuple[str, str, float]]:
    for split in ("validation", "test"):
        for name, value in results.get(split, {}).items():
            if isinstance(value, int | float):
                yield split, name.replace("_", " "), value


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


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
        names["seconds"], names["questions_per_second"] = names.pop("runtime"), names.pop("samples_per_second")
        results[split] = {name: value for name, value in names.items() if name != "steps_per_second"}
    if "train" in metrics:
        # Evaluations within training are counted apart; saving is not.
        seconds = metrics["train"]["train_runtime"] - trainer.seconds_evaluating
        results["train"] = {
            "loss": metrics["train"]["train_loss"],
            "epochs": trainer.state.epoch,
            "steps": trainer.state.global_step,
            "questions": trainer.num_questions_trained,
            "seconds": seconds,
            "questions_per_second": trainer.num_questions_trained / seconds,
        }
    parameters = list(trainer.model.parameters())
    results["parameters"] = {
        "all": sum(parameter.numel() for parameter in parameters),
        "training": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    }
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
    named += ("max_grad_norm", "bf16", "fp16", "dataloader_num_workers", "world_size")
    results["settings"] = {**asdict(args), **{name: getattr(trainer.args, name) for name in named}}
    results["environment"] = environment()
    return results
