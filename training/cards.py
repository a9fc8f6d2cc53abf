"""The model card of a checkpoint, its README.md: `card_template.md`, filled with what a run measured and nothing else, and the
task's own paragraphs in `tasks/`."""

import inspect
import json
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hivilt.data.benchmarks import HUB_DATASETS
from hivilt.data.captions import OPENMOJI_CREDIT
from hivilt.data.tables import ImageRecord, TableImage
from hivilt.tasks.task import Task
from hivilt.training.arguments import TaskArguments
from hivilt.training.flags import flags_in_file, is_settings_file
from hivilt.training.names import is_path
from hivilt.training.results import without_place
from hivilt.training.trainer import HiViLTTrainer

# A task's own template, beside its file, fills the blocks of the one that all share; a name it does not know is an error.
TEMPLATES = Environment(
    loader=FileSystemLoader([Path(__file__).parent, Path(inspect.getfile(Task)).parent]),
    undefined=StrictUndefined,
    autoescape=False,
)

_COCO_IMAGES = "the images are MS-COCO's (https://cocodataset.org), under Flickr's terms."
# What the built-in data sets want said of them, by the names of `--benchmark`.
CREDITS = {
    "easy-vqa": "The data is easy-VQA (https://github.com/vzhou842/easy-VQA), MIT.",
    "vqav2": f"The questions are VQAv2's (https://visualqa.org), CC BY 4.0; {_COCO_IMAGES}",
    "gqa": "The data is GQA (https://cs.stanford.edu/people/dorarad/gqa); the images are Visual Genome's and MS-COCO's.",
    "vizwiz": "The data is VizWiz-VQA (https://vizwiz.org), CC BY 4.0.",
    "textvqa": "The questions are TextVQA's (https://textvqa.org), CC BY 4.0; the images are of Open Images, CC BY 2.0.",
    "ok-vqa": f"The questions are OK-VQA's (https://okvqa.allenai.org), license not stated; {_COCO_IMAGES}",
    "vqa-rad": "The data is VQA-RAD (https://osf.io/89kps), CC0.",
    "clevr": "The data is CLEVR (https://cs.stanford.edu/people/jcjohns/clevr), CC BY 4.0.",
    "sort-of-clevr": "The data is drawn after Sort-of-CLEVR (Santoro et al. 2017, https://arxiv.org/abs/1706.01427).",
    "daquar": "The data is DAQUAR (Malinowski and Fritz 2014, https://arxiv.org/abs/1410.0210), for research only; the images "
    "are NYU Depth V2's.",
    "openmoji": OPENMOJI_CREDIT,
    "flickr30k": "The data is Flickr30k (https://shannon.cs.illinois.edu/DenotationGraph), for research only.",
    "coco": f"The captions are MS-COCO's, CC BY 4.0; {_COCO_IMAGES}",
    "flickr8k": "The data is Flickr8k, for research only.",
    "textcaps": "The captions are TextCaps' (https://textvqa.org/textcaps), CC BY 4.0; the images are of Open Images, CC BY 2.0.",
    "vizwiz-captions": "The data is VizWiz-Captions (https://vizwiz.org), CC BY 4.0.",
    "scenes": "The images are drawn and the expressions made by rules, by `hivilt.data.scenes`.",
    "pairs": "The images are drawn and the statements made by rules, by `hivilt.data.drawn_pairs`.",
    "flickr8k-pairs": "The images are Flickr8k's, for research only; statements were made of its captions by rules, by "
    "`hivilt.data.flickr8k_pairs`.",
    "nlvr2": "The statements are NLVR2's (https://lil.nlp.cornell.edu/nlvr), CC BY 4.0; the images are the web's.",
    "nlvr": "The data is NLVR (https://lil.nlp.cornell.edu/nlvr), CC BY 4.0.",
    "refcoco": f"The expressions are RefCOCO's (https://github.com/lichengunc/refer); {_COCO_IMAGES}",
    "refcoco+": f"The expressions are RefCOCO+'s (https://github.com/lichengunc/refer); {_COCO_IMAGES}",
    "refcocog": f"The expressions are RefCOCOg's (https://github.com/lichengunc/refer); {_COCO_IMAGES}",
    "grefcoco": f"The expressions are gRefCOCO's (https://github.com/henghuiding/gRefCOCO); {_COCO_IMAGES}",
    "flickr30k-entities": "The boxes are Flickr30k Entities' (https://github.com/BryanPlummer/flickr30k_entities), the images and "
    "captions Flickr30k's, for research only.",
    "daquar-grounding": "The images are NYU Depth V2's, of DAQUAR (Malinowski and Fritz 2014, https://arxiv.org/abs/1410.0210), "
    "for research only.",
}
# Arguments that tell a reader nothing about the model; columns besides.
_NO_SETTINGS = {
    "license",
    "language",
    "num_threads",
    "on_bad_image",
    "trust_remote_code",
    "top_k",
    "index_factory",
    "states_gb",
}


def write_model_card(
    trainer: HiViLTTrainer,
    args: TaskArguments,
    results: Mapping[str, Any],
    splits: Mapping[str, Sequence[ImageRecord]],
    *,
    task: Task,
    argv: Sequence[str] | None,
    metrics: Mapping[str, str],
    metric_ids: Sequence[str],
    tags: Sequence[str] = (),
    image: str,
    measured: str | None = None,
    **facts: Any,
) -> None:
    """Writes `README.md` into the `output_dir` of a run that trained.

    Args:
        results: as `results.json` has it; `validation` and `test` where they were measured.
        argv: the flags; `None`: those of the command line.
        metrics: the headline metrics of the `model-index`, `{key in results: how to call it}`, of the test split if it
            was measured, else of validation; `metric_ids` are what the Hub calls them.
        image: Markdown that shows what the model did on the test split; left out if there was none.
        measured: the results as Markdown; unset, a table of all numbers of `validation` and `test`.
        **facts: what the template of this task says, the file beside it that ends in `.md`.
    """
    results = json.loads(json.dumps(results))  # enums and tuples as results.json has them
    data_name, train = _line(results["data"]["name"]) or "unnamed data", results["data"]["train"]
    title = f"HiViLT for {task.name}, trained on {data_name}"
    found = _eval_results(args, results, splits, metrics, task=task, dataset_name=data_name)
    bases = [name for name in (args.model_name_or_path, args.vision_model, args.text_model) if _is_on_hub(name)]
    card_data = ModelCardData(
        library_name="transformers",
        license=args.license,
        language=args.language,
        datasets=_datasets_read(args, splits["train"]) or None,
        base_model=bases or None,
        base_model_relation="finetune" if bases else None,
        # Only model-index has a place for a name.
        model_name=title if found else None,
        eval_results=found or None,
        metrics=list(metric_ids) if found else None,
        pipeline_tag=task.pipeline_tag,
        tags=["custom_code", "hivilt", "vision-language", *tags],
    )
    metric, folder = trainer.args.metric_for_best_model.removeprefix("eval_"), Path(trainer.args.output_dir)
    measures = {"eval_loss", f"eval_{metric}"}
    said = {
        "card_data": card_data.to_yaml(),
        "title": _escape(title),
        "data_name": _escape(data_name),
        # Where a reader finds it: on the Hub, or in a folder, not where this machine keeps that.
        "model": python_literal(trainer.hub_model_id or trainer.args.hub_model_id or without_place(folder.as_posix())),
        "texts": train[trainer.unit] - train.get("dropped_questions", 0),
        "images": train["images"],
        "unit": trainer.unit,
        "measured": measured or [split for split in ("validation", "test") if split in results],
        "image": image if "test" in results else None,
        "credit": CREDITS.get(args.benchmark),
        "metric": metric,
        # By step: the last line may repeat an earlier one, when the best checkpoint is evaluated once more.
        "course": {one["step"]: one for one in reversed(trainer.state.log_history) if measures <= one.keys()},
        "shown_settings": _shown_settings(results["settings"]),
        "command": _command(task.script, argv, results["settings"]["world_size"]),
    }
    optional = dict.fromkeys(("validation", "test", "calibration", "familiarity"))
    card = TEMPLATES.get_template(task.card_template).render(optional | results | said | facts)
    ModelCard(card).save(folder / "README.md")


def python_literal(value: str | list[str]) -> str:
    """Source code for it, with the double quotes of the rest of the snippet."""
    return json.dumps(value, ensure_ascii=False)  # Python would read JSON's escape of an emoji as two halves


def _is_on_hub(name: str | None) -> bool:
    """Whether a name is one on the Hub; a folder or file of this machine is of no use to a reader."""
    return name is not None and not is_path(name) and not Path(name).exists()


def _datasets_read(args: TaskArguments, examples: Iterable[ImageRecord]) -> list[str]:
    """Names on the Hub of what the examples were read from; none for files and folders."""
    names = [args.dataset_name]
    if args.benchmark and not (args.dataset_name or args.data_dir):
        # Of several copies the first that could be read was; its table knows.
        images = (image for one in examples for image in one.images if isinstance(image, TableImage))
        tables = {id(image.table): image.table for image in images}
        pages = sorted({table.info.homepage or "" for table in tables.values()})
        names = [page.removeprefix(HUB_DATASETS) for page in pages if page.startswith(HUB_DATASETS)]
    return [name for name in names if _is_on_hub(name)]


def _eval_results(args, results, splits, metrics, *, task: Task, dataset_name: str) -> list[EvalResult]:
    split = "test" if metrics.keys() & results.get("test", {}).keys() else "validation"
    slug = re.sub(r"[^a-z0-9]+", "-", (args.benchmark or dataset_name).lower()).strip("-")
    official = args.test_split or (task.benchmarks[args.benchmark].splits["test"] if args.benchmark else "test")
    limit = {"test": args.max_predict_samples, "validation": args.max_eval_samples}[split]
    return [
        EvalResult(
            task_type=task.pipeline_tag,
            dataset_type=next(iter(_datasets_read(args, splits[split])), slug or "custom"),
            dataset_name=dataset_name,
            dataset_config=args.dataset_config_name,
            dataset_split=official if split == "test" else split,
            # Whoever compares should know that it is not the whole split.
            dataset_args=None if limit is None else {"max_samples": limit},
            metric_type=key.replace("@", "_at_").replace(".", "_"),
            metric_name=name,
            metric_value=round(results[split][key], 6),
        )
        for key, name in metrics.items()
        if key in results.get(split, {})
    ]


def _shown_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    hidden = set(_NO_SETTINGS)
    if settings["max_steps"] > 0:
        hidden.add("num_train_epochs")  # which it overrides
    return {
        name: "yes" if value is True else value
        for name, value in settings.items()
        if name not in hidden and not name.endswith("_column") and value not in (None, "", [], {}, -1)
        if value is not False  # and not 0, which equals it
    }


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _line(text: str) -> str:
    """One line of what can be seen."""
    return "".join(filter(str.isprintable, " ".join(text.split())))


def _escape(text: str) -> str:
    """One line in which Markdown finds no markup and no end of a table's cell."""
    return re.sub(r"([\\`*<\[|])", r"\\\1", _line(text))


TEMPLATES.globals["shown"] = _shown
TEMPLATES.filters["cell"] = lambda value: _escape(_shown(value))


def _command(script: str, argv: Sequence[str] | None, world_size: int) -> str:
    """The command line, a flag a line, without secrets, places of this machine, and where the model was pushed."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) == 1 and is_settings_file(argv[0]):
        argv = flags_in_file(Path(argv[0]))
    flags: list[list[str]] = []
    for part in argv:
        if part.startswith("--"):
            name, equals, value = part.partition("=")
            flags.append([name + equals + without_place(value)])
        elif flags:
            flags[-1].append(without_place(part))
    start = "python" if world_size == 1 else f"accelerate launch --multi_gpu --num_processes {world_size}"
    kept = [flag for flag in flags if not re.search("hub|token", flag[0].partition("=")[0])]
    return " \\\n    ".join(map(shlex.join, [[*start.split(), script], *kept]))
