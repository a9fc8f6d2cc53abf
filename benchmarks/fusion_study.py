"""Does hierarchical fusion earn its place? HiViLT, its ablations and other ways to fuse, on the same data and budget.

    python -m hivilt.data.sort_of_clevr sort_of_clevr
    python runs/encoders_without_hub.py
    python benchmarks/fusion_study.py --data_dir sort-of-clevr=sort_of_clevr vqa-rad=vqa_rad flickr8k=flickr8k daquar=daquar
    python benchmarks/fusion_study.py --tasks Flickr8k DAQUAR --data_dir flickr8k=flickr8k daquar=daquar
    python benchmarks/fusion_study.py --tasks "easy-VQA, 5 %" --contestants HiViLT ViLT --seeds 1
    python benchmarks/fusion_study.py --tasks Scenes --contestants HiViLT "co-attention (METER)"
    python benchmarks/fusion_study.py --tasks "Flickr8k pairs" --data_dir flickr8k-pairs=flickr8k

For each task and each contestant (benchmarks/fusion_contestants.py) every learning rate of one small grid is tried, on
VQA-RAD and OpenMoji for two fifths of the epochs, and the best on questions held out of training is taken; then each
seed trains anew and answers the test questions once. Data, word pieces, epochs, batches, optimizer and held-out
questions are the same for all, so that all take the same number of steps; what these cost in FLOPs, three times a
forward pass, is given beside. Those of `AT_EQUAL_FLOPS` take as many FLOPs as another instead, and so fewer or more
steps.

On the photographs of Flickr8k and DAQUAR all stand on two pretrained encoders, which are frozen. What these give is
encoded once, by the first training that needs it, and kept in --cache_dir: a training costs fusion and head alone, in
time, in FLOPs and in parameters. ViLT, which reads pixels, is left out there. Flickr8k's test split is not read: each seed
is measured on its validation split, and learning rates are chosen on training images that are held out, as elsewhere.

Scenes are drawn, and expressions about them are found: all have HiViLT's pyramid, rows and loss. Accuracy is Acc@0.5 of
expressions that mean one thing, told by kind too; of `several` it is the share with all boxes found and none besides, of
`none` the share without a box, to be read beside the share of the others that have one, the target accuracy.

Statements about pairs of images, drawn or of Flickr8k's photographs, are true or false, by kind too. Beside the others are a HiViLT that sees
zeros in place of the images, and one that sees the left image in place of both. On drawn pairs all begin with the encoders of
grounding/, and train them on; all else is new. ViLT, which has no encoders, begins from nothing.

benchmarks/results/fusion_study.json is written after every training; what it has is not trained again, so that the study
goes on where it was stopped, on another machine too: each training says on what it ran. At the end it prints the tables
and draws an image. One GPU if there is one, in float32 as on a CPU; `--processes` many trainings at once, of one thread
each.
"""

import argparse
import json
import math
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from fusion_contestants import (
    AT_EQUAL_FLOPS,
    CONTESTANTS,
    FROM_PIXELS_ALONE,
    Encoders,
    ViltForPairs,
    contestants_of,
    make,
    num_parameters,
)
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import AutoImageProcessor, AutoTokenizer, PrinterCallback, ViTImageProcessorPil, set_seed
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from common import make_parser, markdown
from hivilt import HiViLTForRetrieval, HiViLTModel, HiViLTProcessor
from hivilt.data.caption_benchmarks import CAPTION_BENCHMARKS
from hivilt.data.captions import CaptionDataset
from hivilt.data.grounding import GroundingDataset
from hivilt.data.grounding_benchmarks import GROUNDING_BENCHMARKS
from hivilt.data.reasoning import ReasoningDataset, label_words
from hivilt.data.reasoning_benchmarks import REASONING_BENCHMARKS
from hivilt.data.tables import hold_out
from hivilt.data.vqa import (
    VQACollator,
    VQADataset,
    VQAExample,
    VQAImages,
    build_answer_vocabulary,
    drop_unknown_answers,
)
from hivilt.data.vqa_benchmarks import VQA_BENCHMARKS
from hivilt.evaluation.vqa import canonical_answer
from hivilt.tasks.grounding import Grounding
from hivilt.tasks.question_answering import QuestionAnswering
from hivilt.tasks.reasoning import Reasoning
from hivilt.tasks.retrieval import Retrieval
from hivilt.tasks.task import Task
from hivilt.training.arguments import COMMON_DEFAULTS, HiViLTTrainingArguments
from hivilt.training.encoder_cache import EncoderCache
from hivilt.training.models import learn_words, train_tokenizer
from hivilt.training.names import check_name
from hivilt.training.results import environment
from peers import count_flops
from plots import plot_study

BENCHMARKS = {**VQA_BENCHMARKS, **CAPTION_BENCHMARKS, **GROUNDING_BENCHMARKS, **REASONING_BENCHMARKS}
ROOT = Path(__file__).resolve().parents[1]
SEARCH_SEED = 0
# On photographs; a size that a training of HiViLT takes minutes with. Of MobileNetV2 the last map of 14 x 14, averaged to
# 7 x 7, and the last one.
FUSION = {"hidden_size": 128, "num_attention_heads": 4, "num_fusion_stages": 2, "fusion_intermediate_size": 128}
FUSION |= {"vision_levels": [11, 16], "vision_strides": [2, 1]}
# Of statements about drawn pairs.
KINDS = ("one", "both", "neither", "same", "more")
# Two-sided 95 % quantiles of Student's t for one degree of freedom and more: three seeds have two.
T_95 = [12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]


@dataclass(frozen=True)
class Trial:
    """A task on a benchmark, and how long and how fast it is learned."""

    benchmark: str
    image_size: int  # side, in pixels
    epochs: float
    images: int  # a step, each with its questions or captions
    share: float = 1.0  # of the training images
    search_share: float = 0.4  # of the epochs, for a learning rate to be judged by
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)  # of the script, by which it reads its data
    families: tuple[str, ...] = ()  # kinds of questions whose accuracy is shown; without, that of all questions
    learning_rates: tuple[float, ...] = (7e-4, 1.4e-3, 2.8e-3)
    # Share of the steps, the last ones, in which the learning rate falls, after it was held; without, it falls along a
    # cosine from the end of the warm-up on, as in the scripts.
    decay: float | None = None
    frozen: bool = False  # whether the encoders are pretrained and frozen
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)  # of the config
    measured: str = "test"  # the split that each seed is measured on, once
    measures: tuple[str, ...] = ()  # shown beside the one that learning rates are chosen by
    kinds: Mapping[str, str] = field(default_factory=dict, hash=False)  # of expressions, and the measure of each
    evaluations: int = 5  # on held-out questions, in each training
    begins: str | None = None  # a model of this repository whose encoders and words all begin with

    def schedule(self, steps: int) -> dict[str, Any]:
        """How the learning rate goes over so many steps, as arguments of training."""
        if self.decay is None:
            return {}
        kwargs = {"num_decay_steps": round(self.decay * steps)}
        return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": kwargs}


TRIALS = {
    # Most are on their first plateau for long; on a shorter search all would look alike. The same holds for easy-VQA. Small
    # batches, since it takes a number of steps to leave it, whatever their size, and a rate that is held: one that falls
    # from the beginning is too low for those that leave it late.
    "Sort-of-CLEVR": Trial(
        "sort-of-clevr",
        75,
        2,
        4,
        search_share=1.0,
        families=("relational", "non-relational"),
        learning_rates=(3.5e-4, 7e-4, 1.4e-3),
        decay=0.25,
    ),
    "easy-VQA, 5 %": Trial("easy-vqa", 64, 16, 8, share=0.05, search_share=1.0),
    "easy-VQA": Trial("easy-vqa", 64, 3, 8, search_share=1.0),
    "VQA-RAD": Trial("vqa-rad", 96, 10, 16),
    "OpenMoji": Trial("openmoji", 64, 6, 64),
    # Evaluated at the end alone: to re-rank costs more than an epoch.
    "Flickr8k": Trial(
        "flickr8k",
        224,
        3,
        64,
        search_share=0.5,
        learning_rates=(1e-3, 2e-3),
        frozen=True,
        fields={"num_hard_negatives": 1, "embedding_dropout": 0.3},
        measured="validation",
        measures=("image_to_text_recall@1", "text_to_image_recall@1"),
        evaluations=1,
    ),
    "DAQUAR": Trial("daquar", 224, 5, 8, search_share=0.5, learning_rates=(5e-4, 1e-3), frozen=True),
    # Of 2,700 images, with eight expressions each, 1,352 steps: HiViLT takes about eight minutes on one thread.
    "Scenes": Trial(
        "scenes",
        64,
        8,
        16,
        learning_rates=(1.5e-3, 3e-3),
        arguments={"max_train_samples": 3_000},
        measures=("target_accuracy",),
        kinds={
            "relation": "accuracy@0.5",
            "attribute": "accuracy@0.5",
            "several": "multi_target_accuracy",
            "none": "no_target_accuracy",
        },
    ),
    # Of 1,350 sets of images, five a step, 2,430 steps: HiViLT takes about eight minutes on one thread.
    "Pairs": Trial(
        "pairs",
        64,
        9,
        5,
        search_share=0.6,
        learning_rates=(7e-4, 1.4e-3),
        arguments={"first_epochs": 3},
        kinds=dict.fromkeys(KINDS, "accuracy"),
        begins="grounding",
    ),
    # Of 970 sets of photographs, four a step, 972 steps: HiViLT takes about seven minutes on one thread.
    "Flickr8k pairs": Trial(
        "flickr8k-pairs",
        224,
        4,
        4,
        search_share=0.5,
        learning_rates=(5e-4, 1e-3),
        arguments={"first_epochs": 1},
        kinds=dict.fromkeys(KINDS[:3], "accuracy"),
        frozen=True,
    ),
}


@dataclass(frozen=True)
class Data:
    """A trial's splits, and what else all contestants share; `test` is the split that a seed is measured on."""

    task: Task
    train: Dataset
    validation: Dataset
    test: Dataset
    collator: Callable[[Sequence[Any]], dict[str, torch.Tensor]]
    processor: HiViLTProcessor
    fields: dict[str, Any]  # of the config


@cache
def read(trial: Trial, data_dir: Path | None, encoders: Encoders | None = None) -> Data:
    """The same at every call: which images are taken and held out does not depend on the seed of a training."""
    makers = {Retrieval: captions, Grounding: expressions, Reasoning: statements, QuestionAnswering: questions}
    task_class = next(one for one in makers if trial.benchmark in one.benchmarks)
    folder = None if data_dir is None else str(data_dir)
    arguments = {"benchmark": trial.benchmark, "data_dir": folder, "image_size": trial.image_size, **trial.arguments}
    task = task_class(task_class.arguments(**arguments))
    found = task.read(["train", trial.measured])[1]
    splits = {"train": found["train"], "test": found[trial.measured]}
    if trial.share < 1:
        images = list(dict.fromkeys(example.image_id for example in splits["train"]))
        kept = set(random.Random(0).sample(images, round(trial.share * len(images))))
        splits["train"] = [example for example in splits["train"] if example.image_id in kept]
    splits["train"], splits["validation"] = hold_out(splits["train"], by=task.hold_out_by)
    return makers[task_class](task, trial, splits, encoders)


def questions(task: QuestionAnswering, trial: Trial, splits: dict[str, list], encoders: Encoders | None) -> Data:
    answers = build_answer_vocabulary([example.answers for example in splits["train"]])
    task.label2id = {canonical_answer(answer): place for place, answer in enumerate(answers)}
    splits["train"] = drop_unknown_answers(splits["train"], task.label2id)
    processor = make_processor(trial, [example.question for example in splits["train"]], encoders)
    collator = task.collator(processor, None)
    if encoders is None:
        datasets = {split: ReadOnce(examples, collator) for split, examples in splits.items()}
        collator = join
    else:
        # Encoders' states come from the cache as fast.
        datasets = {split: VQADataset(rows, seed=0 if split == "train" else None) for split, rows in splits.items()}
    fields = {"id2label": dict(enumerate(answers)), "problem_type": "single_label_classification", **trial.fields}
    return Data(task, **datasets, collator=collator, processor=processor, fields=fields)


def captions(task: Retrieval, trial: Trial, splits: dict[str, list], encoders: Encoders | None) -> Data:
    processor = make_processor(trial, [text for example in splits["train"] for text in example.captions], encoders)
    drawn = {"captions_per_image": task.args.captions_per_image, "seed": 0}
    datasets = {split: CaptionDataset(rows, **(drawn if split == "train" else {})) for split, rows in splits.items()}
    fields = {"num_hard_negatives": task.args.num_hard_negatives, **trial.fields}
    return Data(task, **datasets, collator=task.collator(processor, None), processor=processor, fields=fields)


def expressions(task: Grounding, trial: Trial, splits: dict[str, list], encoders: Encoders | None) -> Data:
    processor = make_processor(trial, [text for example in splits["train"] for text in example.expressions], encoders)
    datasets = {split: GroundingDataset(rows, seed=0 if split == "train" else None) for split, rows in splits.items()}
    return Data(task, **datasets, collator=task.collator(processor, None), processor=processor, fields={**trial.fields})


def statements(task: Reasoning, trial: Trial, splits: dict[str, list], encoders: Encoders | None) -> Data:
    labels = label_words(splits["train"])
    task.label2id = {label: place for place, label in enumerate(labels)}
    processor = make_processor(trial, [example.sentence for example in splits["train"]], encoders)
    drawn = {"seed": 0, "first_epochs": task.args.first_epochs}
    datasets = {split: ReasoningDataset(rows, **(drawn if split == "train" else {})) for split, rows in splits.items()}
    fields = {"id2label": dict(enumerate(labels)), "num_images": datasets["train"].num_images}
    fields |= {"problem_type": "single_label_classification", **trial.fields}
    return Data(task, **datasets, collator=task.collator(processor, None), processor=processor, fields=fields)


def make_processor(trial: Trial, texts: list[str], encoders: Encoders | None) -> HiViLTProcessor:
    """For images of the trial's size and words of its training texts; that of encoders which have learned is their own."""
    if trial.begins is not None:
        processor = HiViLTProcessor.from_pretrained(ROOT / trial.begins)
        learn_words(HiViLTModel.from_pretrained(ROOT / trial.begins), processor, texts)
        return processor
    if encoders is not None:
        image_processor = AutoImageProcessor.from_pretrained(encoders.vision)
        return HiViLTProcessor(image_processor, AutoTokenizer.from_pretrained(encoders.text))
    image_processor = ViTImageProcessorPil(size={"height": trial.image_size, "width": trial.image_size})
    return HiViLTProcessor(image_processor, train_tokenizer(texts))


class ReadOnce(VQAImages):
    """Opens each image once, and keeps what the collator makes of it and its questions."""

    def __init__(self, examples: Sequence[VQAExample], collator: VQACollator):
        super().__init__(VQADataset(examples))
        self.collator = collator
        self.kept: dict[int, dict[str, torch.Tensor]] = {}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index not in self.kept:
            self.kept[index] = dict(self.collator([super().__getitem__(index)]))
        return self.kept[index]


def join(images: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One batch of several images of `ReadOnce`; padding is 0, as in `train_tokenizer`."""
    batch = {
        name: pad_sequence([row for one in images for row in one[name]], batch_first=True)
        for name in ("input_ids", "attention_mask")
    }
    batch |= {name: torch.cat([one[name] for one in images]) for name in ("pixel_values", "question_index", "labels")}
    number = torch.tensor([len(one["input_ids"]) for one in images])
    return {**batch, "image_index": torch.arange(len(images)).repeat_interleave(number)}


def train(
    trial_name: str,
    data_dir: Path | None,
    contestant: str,
    learning_rate: float,
    seed: int,
    epochs: float,
    tests: bool,
    encoders: Encoders | None = None,
) -> dict[str, Any]:
    """Trains once; with `tests`, if it is no search for a learning rate, measures on the trial's `measured` split at the end.

    `data_dir` is the benchmark's folder, `None` its package; `encoders` are given for a task whose encoders are frozen.
    """
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    trial = TRIALS[trial_name]
    data = read(trial, data_dir, encoders)
    shared = {"vocab_size": len(data.processor.tokenizer), "image_size": trial.image_size, "encoders": encoders}
    make_one = partial(make, head=data.task.model_class, **shared, **data.fields)
    set_seed(seed)
    model = make_one(contestant)
    if trial.begins is not None and contestant not in FROM_PIXELS_ALONE:
        learned = HiViLTModel.from_pretrained(ROOT / trial.begins)
        learned.resize_token_embeddings(len(data.processor.tokenizer), mean_resizing=False)
        for part in ("vision_model", "text_model"):
            getattr(model.base_model, part).load_state_dict(getattr(learned, part).state_dict())
    cost, share = flops_per_image(model, data, epochs), 1.0
    if contestant in AT_EQUAL_FLOPS:
        share = flops_per_image(make_one(AT_EQUAL_FLOPS[contestant]), data, epochs) / cost
        if first_epochs := getattr(data.train, "first_epochs", 0):
            # The same part of fewer or more epochs.
            data = replace(data, train=copy(data.train))
            data.train.first_epochs = round(share * first_epochs)
    images = len(data.train.groups if isinstance(data.train, VQADataset) else data.train)
    flops = 3 * cost * images * epochs * share
    steps = math.ceil(math.ceil(images / trial.images) * epochs * share)
    with tempfile.TemporaryDirectory() as folder:
        settings = COMMON_DEFAULTS | data.task.args.defaults | trial.schedule(steps)
        settings |= {"num_train_epochs": epochs * share, "learning_rate": learning_rate, "seed": seed}
        settings |= {f"per_device_{kind}_batch_size": trial.images for kind in ("train", "eval")}
        settings |= {"eval_strategy": "steps", "eval_steps": 1 / trial.evaluations}
        settings |= {"save_strategy": "no", "load_best_model_at_end": False, "disable_tqdm": True}
        args = HiViLTTrainingArguments(**{**settings, "output_dir": folder})
        trainer = data.task.trainer_class(
            model=model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.validation,
            data_collator=data.collator,
            processing_class=data.processor,
            encoder_cache=None if encoders is None else EncoderCache(encoders.cache_dir),
            **data.task.trainer_arguments(),
        )
        trainer.remove_callback(PrinterCallback)
        if trial.evaluations == 1:
            args.eval_strategy = IntervalStrategy.NO
        if isinstance(model, ViltForPairs):
            # All pairs, which take too long to be scored more than once.
            trainer.rerank_k, args.eval_strategy = sys.maxsize, IntervalStrategy.NO
        start = time.perf_counter()
        trainer.train()
        trainer.evaluate()
        metric = f"eval_{args.metric_for_best_model}"
        curve = {log["step"]: log[metric] for log in trainer.state.log_history if metric in log}
        found = {
            "learning_rate": learning_rate,
            "seed": seed,
            "epochs": epochs,
            "seconds": time.perf_counter() - start,
            "steps": trainer.state.global_step,
            "flops": flops,
            "parameters": num_parameters(model),
            "curve": [[step / trainer.state.global_step, value] for step, value in curve.items()],
            "validation": curve[trainer.state.global_step],
            **{name: environment()[name] for name in ("device_name", "torch", "transformers")},
        }
        if tests:
            metrics = trainer.predict(data.test).metrics
            name = args.metric_for_best_model
            more = {family: metrics["test_by_family"][family] for family in trial.families}
            more |= {kind: metrics["test_by_kind"][kind][measure] for kind, measure in trial.kinds.items()}
            more |= {measure.replace("_", " "): metrics[f"test_{measure}"] for measure in trial.measures}
            found["test"] = {name.replace("_", " "): metrics[f"test_{name}"], **more}
    return found


def flops_per_image(model: torch.nn.Module, data: Data, epochs: float, sample: int = 8) -> float:
    """Of a forward pass over an image with its questions or captions: the mean of the first images, and of all epochs where
    the first ones have other statements.

    Frozen encoders are left out, and photographs, which differ in how much is asked of them, come from all over the split.
    """
    if not (first_epochs := min(epochs, getattr(data.train, "first_epochs", 0))):
        return flops_in_epoch(model, data, sample)
    stages = []
    for first_of_stage in (first_epochs, 0):  # the data is left as it begins
        data.train.set_epoch(math.ceil(first_of_stage))
        stages.append(flops_in_epoch(model, data, sample))
    later, earlier = stages
    return (first_epochs * earlier + (epochs - first_epochs) * later) / epochs


def flops_in_epoch(model: torch.nn.Module, data: Data, sample: int) -> float:
    """The same of the epoch that the data is in."""
    images = data.train.by_image() if isinstance(data.train, VQADataset) else data.train
    is_frozen = bool(getattr(model.base_model, "frozen_modules", ()))
    stride = max(1, len(images) // sample) if is_frozen else 1
    batches = [range(first, len(images), stride)[:sample] for first in range(min(sample, stride))]
    # torch counts nothing of its transformer layers where it takes its shortcut through them.
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    flops = 0
    for places in batches:
        inputs = data.collator([images[place] for place in places])
        inputs = {key: inputs[key] for key in inputs if key not in (data.task.trainer_class.place_name, "labels")}
        if isinstance(model, HiViLTForRetrieval):
            inputs["return_loss"] = True  # that of training, in which pairs are fused
        if is_frozen:
            texts = {key: inputs[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in inputs}
            with torch.no_grad():
                inputs["feature_maps"] = model.get_feature_maps(inputs.pop("pixel_values"))
                inputs["token_states"] = model.get_token_states(**texts)
        flops += count_flops(partial(model, **inputs))
    return flops / sum(map(len, batches))


def key(*parts: object) -> str:
    """By which a training is found again."""
    return " | ".join(map(str, parts))


def by_task(cells: Mapping[str, dict]) -> dict[str, dict[str, list[dict]]]:
    """Trainings, which `key` names by task, contestant and what else, for each task and contestant."""
    found: dict[str, dict[str, list[dict]]] = {}
    for name, cell in cells.items():
        task, contestant, _ = name.split(" | ")
        found.setdefault(task, {}).setdefault(contestant, []).append(cell)
    return found


def interval(values: list[float]) -> float:
    """Half the width of the 95 % confidence interval of a mean; `nan` for one value alone."""
    if len(values) < 2:
        return math.nan
    return T_95[len(values) - 2] * stdev(values) / math.sqrt(len(values))


def summary(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """For each task and contestant: test accuracy over the seeds, by column, and its difference to HiViLT's.

    Differences pair the seeds; those that only one of both has are left out.
    """
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for task, contestants in by_task(results["runs"]).items():
        ours = {run["seed"]: run for run in contestants.get("HiViLT", [])}
        table[task] = {}
        for contestant, runs in contestants.items():
            first = runs[0]
            row = {"parameters": first["parameters"], "flops": first["flops"], "accuracy": {}, "difference": {}}
            paired = [run for run in runs if run["seed"] in ours]
            for column in first["test"]:
                values = [run["test"][column] for run in runs]
                row["accuracy"][column] = {"mean": mean(values), "interval": interval(values)}
                if paired and contestant != "HiViLT":
                    differences = [run["test"][column] - ours[run["seed"]]["test"][column] for run in paired]
                    row["difference"][column] = {"mean": mean(differences), "interval": interval(differences)}
            table[task][contestant] = row
    return table


def table(results: Mapping[str, Any]) -> str:
    """Markdown: for each task a contestant a row, accuracies in percent with half their 95 % intervals."""
    parts = []
    for task, rows in summary(results).items():
        columns = list(next(iter(rows.values()))["accuracy"])
        # Where a benchmark has families of questions, theirs is shown.
        has_families = task in TRIALS and bool(TRIALS[task].families)
        shown = [column for column in columns if column != "accuracy" or not has_families]
        # Of many columns, the first alone, by which learning rates are chosen.
        compared = shown if len(shown) <= 3 else shown[:1]
        heads = [cell for column in shown for cell in (column, "beside HiViLT")[: 1 + (column in compared)]]
        lines = []
        for name, row in rows.items():
            cells = [name, f"{row['parameters'] / 1e6:.2f} M", f"{row['flops'] / 1e12:.1f}"]
            for column in shown:
                cells.append(_percent(row["accuracy"][column]))
                if column in compared:
                    cells.append(_percent(row["difference"][column], "+") if column in row["difference"] else "")
            lines.append(cells)
        parts += [f"**{task}**", markdown(f"| | parameters | training, TFLOP | {' | '.join(heads)} |", lines)]
    return "\n\n".join(parts)


def curves(results: Mapping[str, Any]) -> dict[str, dict[str, list[dict]]]:
    """What `plot_study` draws: the runs, and for a contestant that has none yet on a task the best of its search."""
    drawn = by_task(results["runs"])
    for task, contestants in by_task(results["searched"]).items():
        for contestant, tried in contestants.items():
            best = max(tried, key=lambda run: run["validation"])
            drawn.setdefault(task, {}).setdefault(contestant, [best])
    return drawn


def search_table(results: Mapping[str, Any]) -> str:
    """Markdown: for each task a contestant a row, held-out accuracy in percent at each learning rate, one seed."""
    parts = []
    for task, contestants in by_task(results["searched"]).items():
        rates = sorted({run["learning_rate"] for runs in contestants.values() for run in runs})
        lines = []
        for name in sorted(contestants, key=list(CONTESTANTS).index):
            reached = {run["learning_rate"]: f"{100 * run['validation']:.1f}" for run in contestants[name]}
            one = contestants[name][0]
            cost = [f"{one['steps']:,}", f"{one['flops'] / 1e12:.1f}"]
            lines.append([name, *cost, *(reached.get(rate, "") for rate in rates)])
        head = f"| | steps | training, TFLOP | {' | '.join(f'{rate:g}' for rate in rates)} |"
        parts += [f"**{task}**", markdown(head, lines)]
    return "\n\n".join(parts)


def _percent(value: Mapping[str, float], sign: str = "") -> str:
    text = f"{100 * value['mean']:{sign}.1f}"
    return text if math.isnan(value["interval"]) else f"{text} ± {100 * value['interval']:.1f}"


def directories(parser: argparse.ArgumentParser, pairs: Iterable[str]) -> dict[str, Path]:
    """Of `benchmark=folder` each, as `--data_dir` has them."""
    found = {}
    for pair in pairs:
        name, _, folder = pair.partition("=")
        if name not in BENCHMARKS or not folder:
            parser.error(f"data_dir: expected BENCHMARK=FOLDER with one of {', '.join(BENCHMARKS)}, got {pair!r}")
        found[name] = Path(folder)
    return found


def report(kind: str, cell: str, found: Mapping[str, Any], path: Path, results: Mapping[str, Any]) -> None:
    """Writes the results so far and says what was found."""
    # Whole or not at all, whenever the study is stopped.
    new = path.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    new.replace(path)
    shown = {"validation": found["validation"], **found.get("test", {})}
    numbers = ", ".join(f"{name} {100 * value:.1f}" for name, value in shown.items())
    print(f"{kind}: {cell}: {numbers} ({found['seconds']:.0f} s)", flush=True)


def main(argv: list[str] | None = None) -> dict:
    """Trains what the result file lacks; returns what it holds then."""
    parser = make_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TRIALS), default=list(TRIALS), metavar="TASK")
    names = list(CONTESTANTS)
    parser.add_argument("--contestants", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="none: learning rates alone are tried")
    parser.add_argument("--learning_rates", type=float, nargs="+", help="unset: the task's own grid; one: no search")
    parser.add_argument("--data_dir", nargs="+", default=[], metavar="BENCHMARK=FOLDER")
    parser.add_argument("--vision_model", default="outputs/encoders/mobilenet_v2", help="folder, on photographs")
    parser.add_argument("--text_model", default="outputs/encoders/minilm", help="that of the text encoder")
    parser.add_argument("--fusion", type=json.loads, default=FUSION, help="JSON: HiViLTConfig's fields on photographs")
    parser.add_argument("--cache_dir", type=Path, help="of encoders' states; unset: hivilt in Hugging Face's own cache")
    parser.add_argument("--epochs", type=float, help="of every training; unset: the task's own")
    parser.add_argument("--processes", type=int, default=1, help="trainings at once")
    args = parser.parse_args(argv)
    folders = directories(parser, args.data_dir)
    for task in map(TRIALS.__getitem__, args.tasks):
        benchmark = BENCHMARKS[task.benchmark]
        if task.benchmark not in folders and benchmark.read_package is None and not benchmark.hub:
            where = f"give {task.benchmark}=FOLDER"
            parser.error(f"data_dir: {benchmark.title} is in no package and not on the Hub; {where}")
    encoders = None
    if any(TRIALS[task].frozen for task in args.tasks):
        try:
            check_name("vision_model", args.vision_model)
            check_name("text_model", args.text_model)
        except OSError as error:
            parser.error(f"{error} python runs/encoders_without_hub.py makes the usual ones.")
        fusion = {"fusion_intermediate_size": FUSION["fusion_intermediate_size"], **args.fusion}
        encoders = Encoders(args.vision_model, args.text_model, fusion, cache_dir=args.cache_dir)

    waiting = [
        (task, name)
        for task in args.tasks
        for name in args.contestants
        if name in contestants_of(TRIALS[task].frozen, TRIALS[task].benchmark in REASONING_BENCHMARKS)
    ]
    if not waiting:
        parser.error(
            "contestants: those that read pixels are left out where encoders are frozen, and those that see some of several "
            "images but in pairs; name another."
        )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "fusion_study.json"
    results: dict[str, Any] = {"searched": {}, "runs": {}}
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))

    def found(kind: str, cell: str, epochs: float) -> dict[str, Any] | None:
        """What the cell's training gave, unless it was another length's."""
        one = results[kind].get(cell)
        return one if one is not None and math.isclose(one["epochs"], epochs) else None

    def start(contestant: tuple[str, str]) -> None:
        """What of it lacks and can be trained: each seed, once the learning rate is known, and before that its search."""
        task, name = contestant
        data_dir, epochs = folders.get(TRIALS[task].benchmark), args.epochs or TRIALS[task].epochs
        kind, share = "searched", TRIALS[task].search_share * epochs
        rates = args.learning_rates or TRIALS[task].learning_rates
        # Of one rate alone nothing is to be chosen.
        searched = {rate: found(kind, key(task, name, rate), share) for rate in rates if len(rates) > 1}
        cells = {key(task, name, rate): (rate, SEARCH_SEED, share, False) for rate in searched}
        if all(searched.values()):
            best = max(searched, key=lambda rate: searched[rate]["validation"], default=rates[0])
            kind, cells = "runs", {key(task, name, seed): (best, seed, epochs, True) for seed in args.seeds}
        for cell, how in cells.items():
            if not found(kind, cell, how[2]) and cell not in failed:
                given = (encoders,) if TRIALS[task].frozen else ()
                training[pool.submit(train, task, data_dir, name, *how, *given)] = kind, cell, contestant

    training: dict[Future, tuple[str, str, tuple[str, str]]] = {}
    failed: list[str] = []
    # CUDA wants processes spawned.
    spawned = partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn"))
    with (ThreadPoolExecutor if args.processes == 1 else spawned)(args.processes) as pool:
        while waiting or training:
            # One contestant after the other, so that what was begun is complete first.
            while waiting and len(training) < args.processes:
                start(waiting.pop(0))
            for done in wait(training, return_when=FIRST_COMPLETED).done:
                kind, cell, contestant = training.pop(done)
                if done.exception():
                    failed.append(cell)
                    print(f"{kind}: {cell}: {done.exception()!r}", flush=True)
                    continue
                results[kind][cell] = done.result()
                report(kind, cell, results[kind][cell], path, results)
                if kind == "searched" and contestant not in {other for _, _, other in training.values()}:
                    start(contestant)
    print(table(results))
    plot_study(curves(results), path.with_suffix(".png"))
    if failed:
        raise RuntimeError(f"{len(failed)} trainings failed and are left out: {'; '.join(failed)}")
    return results


if __name__ == "__main__":
    main()
