"""The benchmarks as their official files lay them out, and as the Hub has them, with a handful of plain images.

Every split asks three questions about each image, VizWiz only one, as it does. Some answers are in the field's answer
lists ("red", "yes") and some are not ("red zigzag").
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from tiny import make_image

TRAIN_COLORS = ("red", "blue", "green", "yellow")
SPLITS = {"train": TRAIN_COLORS, "val": ("red", "blue"), "test": ("green", "red"), "test-dev": ("green",)}
# Flags of a run over such data, as short as one that evaluates and saves can be.
TWO_STEPS = [
    *("--fusion", '{"hidden_size": 16, "num_attention_heads": 2, "fusion_intermediate_size": 16}'),
    *("--image_size", "32", "--use_cpu", "--disable_tqdm", "true", "--max_steps", "2", "--logging_steps", "1"),
    *("--per_device_train_batch_size", "4", "--eval_strategy", "steps", "--eval_steps", "1"),
    *("--save_strategy", "steps", "--save_steps", "1"),
]
WORDS_ON_IMAGES = ["STOP", "exit", "5"]


def _questions(colors: tuple[str, ...], each: int = 3) -> Iterator[tuple[int, str, str, str, str]]:
    """For each question the place of its image, the image's color, the question, its answer, and its kind."""
    for image, color in enumerate(colors):
        asked = [
            ("what color is the shape?", color, "other"),
            ("is the shape red?", "yes" if color == "red" else "no", "yes/no"),
            # Every second one has an answer that others share and that no answer list has.
            ("what is in the image?", f"{color} zigzag" if image % 2 else "two zigzags", "other"),
        ]
        for question, answer, kind in asked[:each]:
            yield image, color, question, answer, kind


def _ten(answer: str) -> list[str]:
    """What ten people said; the sixth left it open."""
    return [answer] * 5 + ["", f"dark {answer}", f"dark {answer}", "shape", "no idea"]


def _people(answer: str, **more: str) -> list[dict[str, Any]]:
    return [{"answer": said, "answer_confidence": "maybe", **more} for said in _ten(answer)]


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _save(path: Path, color: str, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image(color).convert(mode).save(path)


# Official files


def _easy_vqa(folder: Path) -> None:
    for split, colors in (("train", TRAIN_COLORS), ("test", SPLITS["test"])):
        rows = [[question, answer, image] for image, _, question, answer, _ in _questions(colors)]
        _write(folder / "data" / split / "questions.json", rows)
        for image, color in enumerate(colors):
            _save(folder / "data" / split / "images" / f"{image}.png", color)


_COCO = {"train": ("train2014", 100), "val": ("val2014", 200), "test": ("test2015", 300), "test-dev": ("test2015", 300)}


def _coco_rows(split: str) -> list[dict[str, Any]]:
    """Questions with their annotations, as VQAv2 numbers them."""
    start = _COCO[split][1]
    return [
        {
            "image_id": start + image,
            "question_id": (start + image) * 1000 + place % 3,
            "question": question,
            "question_type": " ".join(question.split()[:2]),
            "answer_type": kind,
            "multiple_choice_answer": answer,
            "answers": [{**one, "answer_id": number} for number, one in enumerate(_people(answer), 1)],
        }
        for place, (image, _, question, answer, kind) in enumerate(_questions(SPLITS[split]))
    ]


def _coco(folder: Path, version: str, splits: tuple[str, ...]) -> None:
    for split in splits:
        part, start = _COCO[split]
        rows = _coco_rows(split)
        questions = [{name: row[name] for name in ("image_id", "question", "question_id")} for row in rows]
        named = part.replace("test", "test-dev") if split == "test-dev" else part
        _write(folder / f"{version}OpenEnded_mscoco_{named}_questions.json", {"info": {}, "questions": questions})
        if not split.startswith("test"):
            annotations = [{name: row[name] for name in row if name != "question"} for row in rows]
            _write(folder / f"{version}mscoco_{part}_annotations.json", {"annotations": annotations[::-1]})
        for image, color in enumerate(SPLITS[split]):
            _save(folder / part / f"COCO_{part}_{start + image:012d}.jpg", color)


_GQA = {"train": "train", "val": "val", "testdev": "test", "test": "test", "challenge": "test"}


def _gqa_rows(split: str) -> list[dict[str, Any]]:
    # Ids of Visual Genome are numbers, those of COCO's test images begin with n.
    ids = {"train": "23{}", "val": "24{}"}.get(split, "n{}")
    return [
        {
            "id": f"0{place}{list(_GQA).index(split)}",
            "imageId": ids.format(image),
            "question": question,
            "isBalanced": True,
            "answer": answer,
            "fullAnswer": f"It is {answer}.",
            "types": {"structural": "verify" if kind == "yes/no" else "query", "semantic": "attr", "detailed": "which"},
            "semantic": [{"operation": "select", "dependencies": [], "argument": "shape (1)"}],
        }
        for place, (image, _, question, answer, kind) in enumerate(_questions(SPLITS[_GQA[split]]))
    ]


def _gqa(folder: Path) -> None:
    for split, ours in _GQA.items():
        rows = _gqa_rows(split)
        known = {"imageId", "question", "isBalanced"} | (set() if split in ("test", "challenge") else set(rows[0]))
        questions = {row["id"]: {name: row[name] for name in row if name in known and name != "id"} for row in rows}
        _write(folder / f"{split}_balanced_questions.json", questions)
        for row, (_, color, *_) in zip(rows, _questions(SPLITS[ours]), strict=True):
            _save(folder / "images" / f"{row['imageId']}.jpg", color)


_VIZWIZ = {"train": TRAIN_COLORS * 3, "val": ("red", "blue") * 3, "test": ("green", "red") * 3}


def _vizwiz_rows(split: str) -> list[dict[str, Any]]:
    # The third and every second one after it cannot be answered.
    asked = [
        (image, question, *(("unanswerable", "unanswerable") if image > 1 and image % 2 == 0 else (answer, kind)))
        for image, _, question, answer, kind in _questions(_VIZWIZ[split], each=1)
    ]
    return [
        {
            "image": f"VizWiz_{split}_{image:08d}.jpg",
            "question": question,
            "answers": _people(answer),
            "answer_type": kind,
            "answerable": int(kind != "unanswerable"),
        }
        for image, question, answer, kind in asked
    ]


def _vizwiz(folder: Path) -> None:
    for split, colors in _VIZWIZ.items():
        rows = _vizwiz_rows(split)
        known = ("image", "question") if split == "test" else tuple(rows[0])
        _write(folder / "Annotations" / f"{split}.json", [{name: row[name] for name in known} for row in rows])
        for row, color in zip(rows, colors, strict=True):
            _save(folder / split / row["image"], color)


def _textvqa_rows(split: str) -> list[dict[str, Any]]:
    return [
        {
            "image_id": f"{split}{image:012x}",
            "question_id": 34602 + list(SPLITS).index(split) * 100 + place,
            "question": question,
            "question_tokens": question.rstrip("?").split(),
            "image_width": 31,
            "set_name": split,
            "answers": _ten(answer),
            # The last image has no words on it.
            "ocr_tokens": WORDS_ON_IMAGES if image < len(SPLITS[split]) - 1 else [],
        }
        for place, (image, _, question, answer, _) in enumerate(_questions(SPLITS[split]))
    ]


def _textvqa(folder: Path) -> None:
    for split in ("train", "val", "test"):
        rows = _textvqa_rows(split)
        left_out = {"ocr_tokens"} | ({"answers"} if split == "test" else set())
        questions = [{name: row[name] for name in row if name not in left_out} for row in rows]
        _write(folder / f"TextVQA_0.5.1_{split}.json", {"dataset_name": "textvqa", "data": questions})
        words = {row["image_id"]: row["ocr_tokens"] for row in rows}
        words = [{"image_id": name, "ocr_tokens": found, "ocr_info": [{"word": "?"}]} for name, found in words.items()]
        _write(folder / f"TextVQA_Rosetta_OCR_v0.2_{split}.json", {"dataset_name": "textvqa", "data": words})
        for row, (_, color, *_) in zip(rows, _questions(SPLITS[split]), strict=True):
            _save(folder / ("test_images" if split == "test" else "train_images") / f"{row['image_id']}.jpg", color)


def _vqa_rad_rows() -> list[dict[str, Any]]:
    """Both splits in one list, with the dirt of the release: a number for an answer, a blank after a type."""
    rows = [
        {
            "qid": str(place),
            "qid_linked_id": f"linked-{place // 2}",
            "phrase_type": f"test_{phrase}" if place >= 12 else phrase,
            "image_name": f"synpic{image}.jpg",
            "question": question,
            "question_type": "PRES" if kind == "yes/no" else "ATRIB",
            "answer": answer.capitalize(),
            "answer_type": "CLOSED " if kind == "yes/no" else "OPEN",
        }
        for place, (image, _, question, answer, kind) in enumerate(_questions(TRAIN_COLORS + SPLITS["test"]))
        for phrase in ["freeform" if place % 2 else "para"]
    ]
    rows[3] |= {"question": "how many shapes are there?", "answer": 0}
    return rows


def _vqa_rad(folder: Path) -> None:
    _write(folder / "VQA_RAD Dataset Public.json", _vqa_rad_rows())
    for image, color in enumerate(TRAIN_COLORS + SPLITS["test"]):
        _save(folder / "VQA_RAD Image Folder" / f"synpic{image}.jpg", color)


def _clevr_rows(split: str) -> list[dict[str, Any]]:
    def step(function: str) -> dict[str, Any]:
        return {"function": function, "inputs": [], "value_inputs": []}

    last = {"what color is the shape?": "query_color", "is the shape red?": "exist", "what is in the image?": "count"}
    return [
        {
            "split": split,
            "image_index": image,
            "image_filename": f"CLEVR_{split}_{image:06d}.png",
            "question_index": place,
            "question": question,
            "answer": answer,
            "program": [step("scene"), step(last[question])],
            "question_family_index": 7,
        }
        for place, (image, _, question, answer, _) in enumerate(_questions(SPLITS[split]))
    ]


def _clevr(folder: Path) -> None:
    for split in ("train", "val", "test"):
        rows = _clevr_rows(split)
        left_out = {"answer", "program", "question_family_index"} if split == "test" else set()
        questions = [{name: row[name] for name in row if name not in left_out} for row in rows]
        path = folder / "CLEVR_v1.0" / "questions" / f"CLEVR_{split}_questions.json"
        _write(path, {"info": {"split": split}, "questions": questions})
        for image, color in enumerate(SPLITS[split]):
            name = f"CLEVR_{split}_{image:06d}.png"
            _save(folder / "CLEVR_v1.0" / "images" / split / name, color, mode="RGBA")


def _sort_of_clevr(folder: Path) -> None:
    for split in ("train", "test"):
        rows = [
            {
                "image_filename": f"{split}_{image:05d}.png",
                "question": question,
                "answer": answer,
                "family": "relational" if kind == "other" else "non-relational",
            }
            for image, _, question, answer, kind in _questions(SPLITS[split])
        ]
        _write(folder / f"sort_of_clevr_{split}.json", rows)
        for image, color in enumerate(SPLITS[split]):
            _save(folder / "images" / f"{split}_{image:05d}.png", color)


def _daquar(folder: Path) -> None:
    """All questions in one file, by turns with their answers, test images first; a list of images for each split."""
    lines = []
    for split, start in (("test", 1), ("train", 3)):
        names = [f"image{start + image}" for image in range(len(SPLITS[split]))]
        for image, _, question, answer, _ in _questions(SPLITS[split]):
            # "red, zigzag" is a list, "two_zigzags" a word.
            answer = answer.replace(" ", "_" if answer.startswith("two") else ", ")
            lines += [question.replace("?", f" in the {names[image]} ?"), answer]
        for name, color in zip(names, SPLITS[split], strict=True):
            _save(folder / "images" / f"{name}.png", color)
        (folder / f"{split}_images_list.txt").write_text("\n".join(names), encoding="utf-8")
    (folder / "all_qa_pairs.txt").write_text("\n".join(lines), encoding="utf-8")


_MAKERS = {
    "easy-vqa": _easy_vqa,
    "vqav2": lambda folder: _coco(folder, "v2_", ("train", "val", "test", "test-dev")),
    "gqa": _gqa,
    "vizwiz": _vizwiz,
    "textvqa": _textvqa,
    "ok-vqa": lambda folder: _coco(folder, "", ("train", "val")),
    "vqa-rad": _vqa_rad,
    "clevr": _clevr,
    "sort-of-clevr": _sort_of_clevr,
    "daquar": _daquar,
}


def make_vqa_miniature(name: str, folder: Path) -> None:
    """Writes 12 training, 6 validation and 6 test questions of a VQA benchmark in its official layout."""
    _MAKERS[name](folder)


# The Hub


def write_hub_copy(folder: Path, tables: dict[str, list[dict[str, Any]]]) -> None:
    """A dataset as on the Hub: Parquet with images inside. Keys are splits, or "config/split" where it has configs.

    The splits of a config have the columns of its first; those that a split's rows lack are null.
    """
    configs: dict[str, list[str]] = {}
    features: dict[str, datasets.Features] = {}
    for key, rows in tables.items():
        config, _, split = key.rpartition("/")
        path = f"{config or 'data'}/{split}-00000-of-00001.parquet"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        names = features.get(config, rows[0])
        table = datasets.Dataset.from_dict(
            {name: [row.get(name) for row in rows] for name in names}, features.get(config)
        )
        features[config] = table.features
        table.to_parquet(str(folder / path))
        configs.setdefault(config, []).append(f"  - split: {split}\n    path: {path}")
    if "" not in configs:
        entries = [f"- config_name: {name}\n  data_files:\n" + "\n".join(files) for name, files in configs.items()]
        (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(entries) + "\n---\n", encoding="utf-8")


def _shown(rows: list[dict[str, Any]], colors: tuple[str, ...], without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Rows with the images they ask about, and without some columns."""
    each = len(rows) // len(colors)
    images: dict[str, Image.Image] = {color: make_image(color) for color in colors}
    return [
        {name: row[name] for name in row if name not in without} | {"image": images[colors[place // each]]}
        for place, row in enumerate(rows)
    ]


def _vizwiz_hub(split: str) -> list[dict[str, Any]]:
    hidden = split == "test"
    rows = [
        {
            "question_id": row["image"].removesuffix(".jpg"),
            "question": row["question"],
            "answers": [] if hidden else [one["answer"] for one in row["answers"]],
            "category": "" if hidden else row["answer_type"],
        }
        for row in _vizwiz_rows(split)
    ]
    return _shown(rows, _VIZWIZ[split])


def _gqa_hub() -> dict[str, list[dict[str, Any]]]:
    tables = {}
    for split, ours in _GQA.items():
        without = ("answer", "fullAnswer", "types", "semantic") if split in ("test", "challenge") else ()
        rows = _shown(_gqa_rows(split), SPLITS[ours], without)
        images = {row["imageId"]: {"id": row["imageId"], "image": row.pop("image")} for row in rows}
        tables[f"{split}_balanced_instructions/{split}"] = rows
        # Not in the order of the questions.
        tables[f"{split}_balanced_images/{split}"] = list(images.values())[::-1]
    return tables


def _vqav2_hub() -> dict[str, list[dict[str, Any]]]:
    hidden = ("question_type", "answer_type", "multiple_choice_answer", "answers")
    return {
        "train": _shown(_coco_rows("train"), SPLITS["train"]),
        "validation": _shown(_coco_rows("val"), SPLITS["val"]),
        "testdev": _shown(_coco_rows("test-dev"), SPLITS["test-dev"], hidden),
        "test": _shown(_coco_rows("test"), SPLITS["test"], hidden),
    }


def _ok_vqa_hub() -> dict[str, list[dict[str, Any]]]:
    rows = [
        row | {"question_id": str(row["question_id"]), "answers": [one["answer"] for one in row["answers"]]}
        for row in _coco_rows("val")
    ]
    return {"val2014": _shown(rows, SPLITS["val"], ("image_id", "multiple_choice_answer"))}


def _vqa_rad_hub() -> dict[str, list[dict[str, Any]]]:
    rows = [{"question": row["question"], "answer": str(row["answer"]).lower()} for row in _vqa_rad_rows()]
    return {"train": _shown(rows[:12], TRAIN_COLORS), "test": _shown(rows[12:], SPLITS["test"])}


_HUB_MAKERS = {
    "vqav2": _vqav2_hub,
    "gqa": _gqa_hub,
    "vizwiz": lambda: {split: _vizwiz_hub(split) for split in ("val", "test")},
    "textvqa": lambda: {
        theirs: _shown(_textvqa_rows(ours), SPLITS[ours], ("answers",) if ours == "test" else ())
        for ours, theirs in {"train": "train", "val": "validation", "test": "test"}.items()
    },
    "ok-vqa": _ok_vqa_hub,
    "vqa-rad": _vqa_rad_hub,
}


def make_hub_copy(name: str, folder: Path) -> None:
    """Writes the same questions as the best copy on the Hub has them, for `dataset_name`."""
    write_hub_copy(folder, _HUB_MAKERS[name]())
