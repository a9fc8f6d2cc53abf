"""The benchmarks of visual question answering: official files or a copy on the Hub, official splits and metrics.

`docs/data.md` has a table of their files, copies and licences; `VQA_BENCHMARKS` below says which split is what. Without a
split for validation, training images are held out.
"""

import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hivilt.data.benchmarks import Benchmark, HubTable, find_file, find_folder, has_file, lmms_copies, read_json
from hivilt.data.cells import read_csv, read_text, split_lines
from hivilt.data.easy_vqa import reword
from hivilt.data.tables import TableRow
from hivilt.data.vqa import VQAExample, read_answers, read_question
from hivilt.evaluation import vqa_benchmarks as official
from hivilt.evaluation.submissions import submission
from hivilt.evaluation.vqa import canonical_answer
from hivilt.evaluation.wups import answer_items, wordnet_similarity

logger = logging.getLogger(__name__)

# For each question the answers of a model, best first: {"answer": str, "score": float}.
Predictions = Sequence[Sequence[Mapping[str, Any]]]
Metrics = Callable[[Predictions, Sequence[VQAExample]], dict[str, Any]]
Types = Callable[[Mapping[str, Any]], Mapping[str, Any]]

# A classifier cannot read: TextVQA's questions carry the words that were recognized in the image, as many as M4C
# (arXiv:1911.06258) takes, and at the end, so that a text that is too long loses these first.
OCR_SEPARATOR = " OCR: "
MAX_OCR_TOKENS = 50

_VQA_TYPES = ("answer_type", "question_type")
_GQA_TYPES = ("structural", "semantic", "detailed")
_ANSWERS = Path(__file__).parent / "answers"


@dataclass(frozen=True, kw_only=True)
class VQABenchmark(Benchmark[VQAExample]):
    """A data set of questions about images with its official splits, and how the field evaluates on it.

    Attributes:
        answer_file: the answers that the field's classifiers choose from; `None`: those of the training data.
        official_metrics: the official metrics, given for each question the answers of a model and the example.
            Questions without a known answer are left out; if there are no others, it gives {}.
        submissions: what the server of the hidden splits takes, {file name: rows}, given the same; `None`: no server.
        watched_answer: an answer whose score is wanted for every question; it comes last if it is not among the best.
        reword: exchanges a share of the training questions for others in other words, by a seed; `None`: it has none.
    """

    columns: tuple[str, ...] = ("image", "question", "question_id")
    image_id_column: str | None = "image_id"
    answer_column: str | None = "answers"
    answer_file: Path | None = None
    official_metrics: Metrics
    submissions: Metrics | None = None
    watched_answer: str | None = None
    reword: Callable[[Sequence[VQAExample], float, int], list[VQAExample]] | None = None


def _images(folder: Path, image_dir: Path | None, *names: str) -> Path:
    return find_folder(folder, *names) if image_dir is None else find_folder(image_dir, *names, ".")


def _keep(key: str, *others: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """An `object_hook` that leaves objects with `key` only these fields: large files take many GB in full."""
    return lambda row: {name: row[name] for name in (key, *others) if name in row} if key in row else row


def _text_of_answer(said: dict[str, Any]) -> dict[str, Any] | str:
    """An `object_hook` for what a person said with which confidence: millions of objects, few different texts."""
    return sys.intern(str(said["answer"])) if "answer_confidence" in said else said


def _row(
    row: Mapping[str, Any], images: Path, file: str, question_id: Any, image_id: str | None = None
) -> dict[str, Any]:
    """A row of an official file with its ids and its image; without an id of its own the image goes by its file's name."""
    return {**row, "question_id": question_id, "image_id": image_id or file, "image": images / file}


def _easy_vqa_rows(folder: Path, split: str, image_dir: Path | None) -> list[dict[str, Any]]:
    path = find_file(folder, f"{split}/questions.json", f"data/{split}/questions.json")
    images = _images(path.parent.parent, image_dir, f"{split}/images")
    return [
        _row({"question": question, "answer": answer}, images, f"{name}.png", f"{split}-{n}", f"{split}/{name}.png")
        for n, (question, answer, name) in enumerate(read_json(path))
    ]


def _easy_vqa_package(split: str) -> list[VQAExample]:
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("easy-VQA without data_dir needs the package easy-vqa: pip install easy-vqa") from error
    return VQA_BENCHMARKS["easy-vqa"].read(split, Path(easy_vqa.__file__).parent)


def _coco_rows(folder: Path, split: str, image_dir: Path | None, version: str) -> list[dict[str, Any]]:
    """VQAv2 and OK-VQA, which ask about COCO's images."""
    part = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}[split]
    year = part.replace("-dev", "")
    images = _images(folder, image_dir, year)
    questions = read_json(find_file(folder, f"{version}OpenEnded_mscoco_{part}_questions.json"))["questions"]
    annotations = {}
    if not split.startswith("test"):
        path = find_file(folder, f"{version}mscoco_{part}_annotations.json")
        annotations = {row["question_id"]: row for row in read_json(path, _text_of_answer)["annotations"]}
    return [
        {**annotations.get(row["question_id"], {}), **row, "image": images / f"COCO_{year}_{row['image_id']:012d}.jpg"}
        for row in questions
    ]


def _gqa_rows(folder: Path, split: str, image_dir: Path | None) -> list[dict[str, Any]]:
    path = find_file(folder, f"{split}_balanced_questions.json")
    images = _images(folder, image_dir, "images")
    questions = read_json(path, _keep("imageId", "question", "answer", "types"))
    return [_row(row, images, f"{row['imageId']}.jpg", name, row["imageId"]) for name, row in questions.items()]


def _vizwiz_rows(folder: Path, split: str, image_dir: Path | None) -> list[dict[str, Any]]:
    path = find_file(folder, f"{split}.json")
    images = _images(folder, image_dir, split, "images")
    return [_row(row, images, row["image"], row["image"]) for row in read_json(path, _text_of_answer)]


def _textvqa_rows(folder: Path, split: str, image_dir: Path | None) -> list[dict[str, Any]]:
    path = find_file(folder, f"TextVQA_0.5.1_{split}.json")
    images = _images(folder, image_dir, "test_images" if split == "test" else "train_images")
    try:
        words = read_json(find_file(folder, f"TextVQA_Rosetta_OCR_v0.2_{split}.json"), _keep("ocr_tokens", "image_id"))
    except FileNotFoundError:
        words = {"data": []}  # some releases have them beside the questions
    words = {row["image_id"]: {"ocr_tokens": row["ocr_tokens"]} for row in words["data"]}
    return [
        {**row, **words.get(row["image_id"], {}), "image": images / f"{row['image_id']}.jpg"}
        for row in read_json(path)["data"]
    ]


def _vqa_rad_rows(folder: Path, split: str, image_dir: Path | None) -> list[dict[str, Any]]:
    path = find_file(folder, "VQA_RAD Dataset Public.json", "vqa_rad.json")
    images = _images(folder, image_dir, "VQA_RAD Image Folder", "images")
    return [
        _row({**row, "group": row["qid_linked_id"]}, images, row["image_name"], row["qid"])
        for row in read_json(path)
        if row["phrase_type"].startswith("test") == (split == "test")
    ]


def _clevr_rows(folder: Path, split: str, image_dir: Path | None) -> list[dict[str, Any]]:
    path = find_file(folder, f"questions/CLEVR_{split}_questions.json")
    images = _images(path.parent.parent, image_dir, f"images/{split}", split)
    # Programs are most of the file, and only their last step is looked at.
    content = read_json(path, lambda row: row | {"program": row["program"][-1:]} if row.get("program") else row)
    return [_row(row, images, row["image_filename"], row.get("question_index")) for row in content["questions"]]


def _sort_of_clevr_rows(folder: Path, split: str, image_dir: Path | None) -> list[dict[str, Any]]:
    path = find_file(folder, f"sort_of_clevr_{split}.json")
    images = _images(path.parent, image_dir, "images")
    return [_row(row, images, row["image_filename"], f"{split}-{number}") for number, row in enumerate(read_json(path))]


def _daquar_rows(folder: Path, split: str, image_dir: Path | None) -> list[dict[str, Any]]:
    images = _images(folder, image_dir, "images", "nyu_depth_images")
    endings = (".png", ".jpg", ".jpeg")
    files = {path.stem: path.name for path in images.glob("image*.*") if path.suffix.lower() in endings}
    rows = []
    for number, (image, question, answer) in enumerate(_daquar_pairs(folder, split)):
        # The metrics take a list as a set: one class for all orders. The release has PNG files.
        row = {"question": question, "answer": ", ".join(sorted(answer_items(answer)))}
        rows.append(_row(row, images, files.get(image, f"{image}.png"), f"{split}-{number}", image))
    return rows


def _daquar_pairs(folder: Path, split: str) -> list[tuple[str, str, str]]:
    """Name of the image, question and answer, of the first form that is there: with all classes of things, with 37 of them,
    or the copy that has a split of its own."""
    everything, reduced = ([f"qa.{classes}.raw.{part}.txt" for part in _TRAIN_AND_TEST] for classes in (894, 37))
    if has_file(folder, *everything):
        return _read_daquar(find_file(folder, f"qa.894.raw.{split}.txt"))
    if has_file(folder, "all_qa_pairs.txt"):
        listed = set(read_text(find_file(folder, f"{split}_images_list.txt")).split())
        return [pair for pair in _read_daquar(find_file(folder, "all_qa_pairs.txt")) if pair[0] in listed]
    own = {"train": "data_train.csv", "test": "data_eval.csv"}
    if has_file(folder, *own.values()) and not has_file(folder, *reduced):
        path = find_file(folder, own[split])
        logger.warning(
            f"DAQUAR, {split}: {path.name} is not of the official split: {own['train']} and {own['test']} share their "
            "images, and results do not compare with published ones. For the official split put all_qa_pairs.txt, "
            "train_images_list.txt and test_images_list.txt beside it."
        )
        return [(row["image_id"].strip(), row["question"], row["answer"].strip()) for row in read_csv(path)]
    return _read_daquar(find_file(folder, f"qa.894.raw.{split}.txt", "all_qa_pairs.txt", f"qa.37.raw.{split}.txt"))


def _read_daquar(path: Path) -> list[tuple[str, str, str]]:
    """Of lines that are a question, "what is red in the image1 ?", and its answer by turns."""
    lines, pairs = split_lines(read_text(path).rstrip()), []
    for place in range(0, len(lines), 2):
        image = re.findall(r"\bimage\d+\b", lines[place])[-1]
        # The number would give the image away; "in the image" at the end is in nearly all, and says nothing.
        question = re.sub(r" in the image\d+(?=\s*\?*\s*$)", "", lines[place])
        pairs.append((image, re.sub(r"\bimage\d+\b", "image", question), lines[place + 1].strip()))
    return pairs


def _columns(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: values.get(name) or None for name in names}


_no_types = partial(_columns, names=())


def _examples(rows: Iterable[TableRow], answer_column: str = "answers", types: Types = _no_types) -> list[VQAExample]:
    """Examples of rows, whether of official files or of the Hub; `types` tells the kinds of a row, `None`: unknown."""
    examples = []
    for place, row in enumerate(rows):
        question_id = row.values.get("question_id")
        question = read_question(row.values.get("question"), "question", row.where)
        if words := row.values.get("ocr_tokens"):
            question += OCR_SEPARATOR + " ".join(words[:MAX_OCR_TOKENS])
        # One of several may be empty: it is one of ten all the same.
        answers = read_answers(row.values.get(answer_column), answer_column, row.where)
        answers = answers if any(answers) else ()
        kinds = {name: str(kind).strip() for name, kind in types(row.values).items() if kind is not None}
        question_id, group = str(place if question_id is None else question_id), row.values.get("group")
        examples.append(VQAExample(question_id, row.image_id, row.image, question, answers, kinds, group))
    return examples


def _gqa_types(values: Mapping[str, Any]) -> dict[str, Any]:
    return _columns(values.get("types") or {}, _GQA_TYPES)


def _vizwiz_types(values: Mapping[str, Any]) -> dict[str, Any]:
    kind, answerable = values.get("answer_type"), values.get("answerable")
    if answerable is None and kind:
        # The copies on the Hub lack the flag.
        answerable = kind != "unanswerable"
    flag = None if answerable is None else "yes" if int(answerable) else "no"
    return {"answer_type": kind or None, "answerable": flag}


def _vizwiz_examples(rows: Iterable[TableRow]) -> list[VQAExample]:
    """A question goes by its image's file name; on the Hub without its ending."""
    examples = _examples(rows, types=_vizwiz_types)
    names = [example.question_id.removesuffix(".jpg") + ".jpg" for example in examples]
    return [example._replace(question_id=name, image_id=name) for example, name in zip(examples, names, strict=True)]


def _vqa_rad_types(values: Mapping[str, Any]) -> dict[str, Any]:
    # The copy on the Hub has no types. This finds 251 of the 272 closed test questions: not "left or right?".
    kind = "CLOSED" if canonical_answer(str(values.get("answer"))) in ("yes", "no") else "OPEN"
    return {"answer_type": values.get("answer_type") or kind, "question_type": values.get("question_type")}


def _clevr_types(values: Mapping[str, Any]) -> dict[str, Any]:
    """The five kinds that papers report, from the last step of the program; test questions have none."""
    program = values.get("program")
    if not program:
        return {}
    step = program[-1]["function"]
    if step in ("equal_integer", "less_than", "greater_than"):
        return {"family": "compare_integer"}
    families = {"exist": "exist", "count": "count", "query": "query_attribute", "equal": "compare_attribute"}
    return {"family": families.get(step.split("_")[0])}


def _measured(measure: Callable[..., dict[str, Any]], single: bool = False, **types: str) -> Metrics:
    """`measure` of the first predictions; `single`: questions have one answer; `types`: {its argument: our type}."""

    def metrics(predictions: Predictions, examples: Sequence[VQAExample]) -> dict[str, Any]:
        known = [(given[0]["answer"], e) for given, e in zip(predictions, examples, strict=True) if e.answers]
        if not known:
            return {}
        best, examples = zip(*known, strict=True)
        answers = [example.answers[0] if single else example.answers for example in examples]
        kinds = {argument: [example.types.get(name) for example in examples] for argument, name in types.items()}
        return measure(list(best), answers, **{argument: of for argument, of in kinds.items() if any(of)})

    return metrics


def _daquar_metrics(predictions: Predictions, examples: Sequence[VQAExample]) -> dict[str, Any]:
    measure = partial(official.daquar_metrics, similarity=wordnet_similarity())
    return _measured(measure, single=True)(predictions, examples)


def _vizwiz_metrics(predictions: Predictions, examples: Sequence[VQAExample]) -> dict[str, Any]:
    known = [(given, example) for given, example in zip(predictions, examples, strict=True) if example.answers]
    answerable = [example.types.get("answerable") for _, example in known]
    given = {}
    if known and None not in answerable:
        scores = _unanswerable_scores([given for given, _ in known])
        given = {"answerable": [kind == "yes" for kind in answerable], "unanswerable_scores": scores}
    return _measured(partial(official.vizwiz_metrics, **given), answer_types="answer_type")(predictions, examples)


def _unanswerable_scores(predictions: Predictions) -> list[float] | None:
    """The score of "unanswerable" for each question; `None` from a model that does not know this answer."""
    scores = [{a["answer"]: a["score"] for a in given}.get("unanswerable") for given in predictions]
    return None if None in scores else scores


def _submissions(server: str, predictions: Predictions, examples: Sequence[VQAExample]) -> dict[str, Any]:
    """What a server takes; VizWiz's also which questions can be answered, from a model that has an answer for those others."""
    ids = [example.question_id for example in examples]
    files = {"submission.json": submission(server, ids, [given[0]["answer"] for given in predictions])}
    if server == "vizwiz" and (scores := _unanswerable_scores(predictions)) is not None:
        answerable = [1 - score for score in scores]
        files["submission_answerability.json"] = submission("vizwiz_answerability", ids, answerable)
    return files


def _fatima(name: str, split: str) -> HubTable:
    return HubTable(f"Multimodal-Fatima/{name}", split, columns={"image_id": "id_image", "answers": "answers_original"})


def _gqa_copies(split: str) -> list[HubTable]:
    columns = {"question_id": "id", "image_id": "imageId"}
    config, images = f"{split}_balanced_instructions", f"{split}_balanced_images"
    flat = HubTable("Mineru/GQA", f"{split}_balanced", columns={"image_id": None})
    copies = lmms_copies("GQA", split, config=config, images_config=images, columns=columns)
    return [*copies, flat] if split in ("train", "val", "testdev") else copies


_vqa_metrics = _measured(official.vqav2_metrics, answer_types="answer_type", question_types="question_type")
_TRAIN_AND_TEST = {"train": "train", "test": "test"}


def _one_answer(types: Types = _no_types, others: tuple[str, ...] = (), **fields: Any) -> VQABenchmark:
    """A benchmark with one answer a question, whose questions may lack an id and have these other columns."""
    return VQABenchmark(
        read_rows=partial(_examples, answer_column="answer", types=types),
        columns=("image", "question"),
        other_columns=("question_id", *others),
        answer_column="answer",
        **fields,
    )


VQA_BENCHMARKS: dict[str, VQABenchmark] = {
    "easy-vqa": _one_answer(
        title="easy-VQA",
        splits=_TRAIN_AND_TEST,
        read_folder=_easy_vqa_rows,
        read_package=_easy_vqa_package,
        official_metrics=_measured(official.clevr_metrics, single=True),
        reword=reword,
    ),
    "vqav2": VQABenchmark(
        title="VQAv2",
        hidden=("test", "test-dev"),
        read_folder=partial(_coco_rows, version="v2_"),
        read_rows=partial(_examples, types=partial(_columns, names=_VQA_TYPES)),
        other_columns=_VQA_TYPES,
        hub={
            "train": [HubTable("pingzhili/vqa_v2", "train"), _fatima("VQAv2_train", "train")],
            "val": [*lmms_copies("VQAv2", "validation"), HubTable("pingzhili/vqa_v2", "validation")],
            "test": lmms_copies("VQAv2", "test"),
            "test-dev": lmms_copies("VQAv2", "testdev"),
        },
        answer_file=_ANSWERS / "vqav2_3129.txt",
        official_metrics=_vqa_metrics,
        submissions=partial(_submissions, "vqa"),
    ),
    "gqa": VQABenchmark(
        title="GQA",
        splits={"train": "train", "validation": "val", "test": "testdev"},
        hidden=("test", "challenge"),
        read_folder=_gqa_rows,
        read_rows=partial(_examples, answer_column="answer", types=_gqa_types),
        other_columns=("types",),
        answer_column="answer",
        hub={split: _gqa_copies(split) for split in ("train", "val", "testdev", "test", "challenge")},
        answer_file=_ANSWERS / "gqa_1842.txt",
        official_metrics=_measured(official.gqa_metrics, single=True, **{kind: kind for kind in _GQA_TYPES}),
        submissions=partial(_submissions, "gqa"),
    ),
    "vizwiz": VQABenchmark(
        title="VizWiz-VQA",
        hidden=("test",),
        read_folder=_vizwiz_rows,
        read_rows=_vizwiz_examples,
        other_columns=("answer_type", "answerable"),
        image_id_column="question_id",
        hub={split: lmms_copies("VizWiz-VQA", split, columns={"answer_type": "category"}) for split in ("val", "test")},
        official_metrics=_vizwiz_metrics,
        submissions=partial(_submissions, "vizwiz"),
        watched_answer="unanswerable",
    ),
    "textvqa": VQABenchmark(
        title="TextVQA",
        hidden=("test",),
        read_folder=_textvqa_rows,
        read_rows=_examples,
        other_columns=("ocr_tokens",),
        hub={
            ours: [
                *lmms_copies("textvqa", theirs),
                HubTable("facebook/textvqa", theirs, revision="refs/convert/parquet"),
            ]
            for ours, theirs in {"train": "train", "val": "validation", "test": "test"}.items()
        },
        official_metrics=_measured(official.textvqa_metrics),
        submissions=partial(_submissions, "vqa"),
    ),
    "ok-vqa": VQABenchmark(
        title="OK-VQA",
        splits={"train": "train", "test": "val"},
        read_folder=partial(_coco_rows, version=""),
        read_rows=partial(_examples, types=partial(_columns, names=_VQA_TYPES)),
        other_columns=_VQA_TYPES,
        hub={
            "train": [_fatima("OK-VQA_train", "train")],
            "val": [*lmms_copies("OK-VQA", "val2014", columns={"image_id": None}), _fatima("OK-VQA_test", "test")],
        },
        official_metrics=_vqa_metrics,
    ),
    "vqa-rad": _one_answer(
        _vqa_rad_types,
        _VQA_TYPES,
        title="VQA-RAD",
        splits=_TRAIN_AND_TEST,
        read_folder=_vqa_rad_rows,
        hub={s: [HubTable("flaviagiammarino/vqa-rad", s, columns={"image_id": None})] for s in ("train", "test")},
        official_metrics=_measured(official.vqa_rad_metrics, single=True, answer_types="answer_type"),
        # Its test split asks about training images, but nothing that training asks in other words.
        hold_out_by=lambda example: (example.group or example.question_id,),
    ),
    "clevr": _one_answer(
        _clevr_types,
        ("program",),
        title="CLEVR",
        hidden=("test",),
        read_folder=_clevr_rows,
        official_metrics=_measured(official.clevr_metrics, single=True, families="family"),
    ),
    "sort-of-clevr": _one_answer(
        partial(_columns, names=("family",)),
        ("family",),
        title="Sort-of-CLEVR",
        splits=_TRAIN_AND_TEST,
        read_folder=_sort_of_clevr_rows,
        official_metrics=_measured(official.clevr_metrics, single=True, families="family"),
    ),
    "daquar": _one_answer(
        title="DAQUAR", splits=_TRAIN_AND_TEST, read_folder=_daquar_rows, official_metrics=_daquar_metrics
    ),
}
