"""The benchmarks of `hivilt.data.grounding_benchmarks` in the layout of their official files, with a few tiny images.

Each image is white with two squares, one left and one right, in two colours.
"""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLORS = ("red", "blue", "green", "yellow", "purple", "orange", "cyan", "black")
# Left, top, right and bottom of the squares, relative to the image.
LEFT, RIGHT = (0.1, 0.2, 0.4, 0.8), (0.55, 0.3, 0.95, 0.7)
# How many images each official split has.
SIZES = {
    **dict.fromkeys(("refcoco", "refcoco+", "grefcoco"), {"train": 8, "val": 4, "testA": 2, "testB": 2}),
    **dict.fromkeys(("refcocog", "flickr30k-entities", "daquar-grounding"), {"train": 8, "val": 4, "test": 4}),
}
# Numbers of images, by which DAQUAR is split: neighbours are together.
ROOMS = {"train": (1, 3, 11, 13, 21, 23, 41, 43), "val": (111, 113, 211, 213), "test": (31, 33, 61, 63)}


def make_grounding_miniature(name: str, folder: Path) -> None:
    """Writes the official files of a benchmark into a folder.

    There are 8 images to train on, 4 to choose and 4 to test with. RefCOCO, RefCOCO+ and RefCOCOg have four expressions an
    image, two of each square, and splits of Google's that share images; gRefCOCO has three, of one square, of both and of
    none. Flickr30k Entities has three phrases with boxes an image, one of them twice; DAQUAR has two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if name in ("refcoco", "refcoco+", "refcocog", "grefcoco"):
        _make_refer(name, folder)
    elif name == "flickr30k-entities":
        _make_entities(folder)
    elif name == "daquar-grounding":
        _make_daquar(folder)
    else:
        raise ValueError(f"name: there is no miniature of {name!r}.")


def colors_of(number: int) -> tuple[str, str]:
    """The colours of the left and of the right square."""
    return COLORS[number % len(COLORS)], COLORS[(number + 1 + number // len(COLORS)) % len(COLORS)]


def size_of(number: int) -> tuple[int, int]:
    """Width and height."""
    return (40, 30) if number % 2 else (20, 50)


def coco_box(box: Sequence[float], size: tuple[int, int]) -> list[float]:
    """Left, top, width and height in pixels."""
    (left, top, right, bottom), (width, height) = box, size
    return [left * width, top * height, (right - left) * width, (bottom - top) * height]


def python_2_pickle(value: Any) -> bytes:
    """What Python 2 pickles of lists, dicts, numbers and of texts, which are bytes to it, with protocol 2."""
    return b"\x80\x02" + _opcodes(value) + b"."


def _opcodes(value: Any) -> bytes:
    if isinstance(value, dict):
        return b"}(" + b"".join(_opcodes(part) for pair in value.items() for part in pair) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_opcodes, value)) + b"e"
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode("latin1")
    return b"J" + struct.pack("<i", value)


def _draw(number: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size_of(number)
    image = Image.new("RGB", (width, height), "white")
    for color, (left, top, right, bottom) in zip(colors_of(number), (LEFT, RIGHT), strict=True):
        ImageDraw.Draw(image).rectangle(
            (left * width, top * height, right * width - 1, bottom * height - 1), fill=color
        )
    image.save(path, quality=95)


def _make_refer(name: str, folder: Path) -> None:
    splits = [split for split, size in SIZES[name].items() for _ in range(size)]
    images, annotations, refs, google = [], [], [], []
    for number, split in enumerate(splits):
        image, size = 9 + 16 * number, size_of(number)
        file = f"COCO_train2014_{image:012d}.jpg"
        _draw(number, folder / "train2014" / file)
        images.append({"license": 3, "file_name": file, "height": size[1], "width": size[0], "id": image})
        ids = [1000 + 2 * number, 1001 + 2 * number]
        for one, box in zip(ids, (LEFT, RIGHT), strict=True):
            its = {"segmentation": [[1.5, 2.5, 3.5, 2.5, 3.5, 4.5]], "area": 99.5, "iscrowd": 0, "category_id": 18}
            annotations.append({**its, "image_id": image, "bbox": coco_box(box, size), "id": one})
        ref = {"image_id": image, "split": split, "file_name": file.replace(".jpg", f"_{ids[0]}.jpg")}
        if name == "grefcoco":
            left, right = colors_of(number)
            for meant, text in ((ids[:1], f"{left} square"), (ids, f"{left} and {right}"), ([-1], "white circle")):
                category = [-1 if one == -1 else 18 for one in meant]
                its = {"ann_id": meant, "category_id": category, "ref_id": len(refs)}
                refs.append({**ref, **its, "sentences": [_sentence(text)], "sent_ids": [1]})
            continue
        for place, (one, color) in enumerate(zip(ids, colors_of(number), strict=True)):
            texts = (f"The {color.upper()} square!", f"{('left', 'right')[place]} one, {color}")
            its = {"ann_id": one, "category_id": 18, "ref_id": len(refs), "sent_ids": [1, 2]}
            refs.append({**ref, **its, "sentences": [_sentence(text) for text in texts]})
            # By object: the left one of an image to train on, the right one, of every second image, to choose by.
            google.append({**refs[-1], "split": "val" if place and number % 2 else "train"})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 18, "name": "square"}]}
    (folder / "instances.json").write_text(json.dumps(content))
    if name == "grefcoco":
        (folder / "grefs(unc).json").write_text(json.dumps(refs))
        return
    (folder / f"refs({'umd' if name == 'refcocog' else 'unc'}).p").write_bytes(python_2_pickle(refs))
    if name != "refcoco+":
        (folder / "refs(google).p").write_bytes(python_2_pickle(google))


def _sentence(raw: str) -> dict[str, Any]:
    sent = "".join(sign for sign in raw.lower() if sign not in "!,")
    return {"tokens": sent.split(), "raw": raw, "sent_id": 1, "sent": sent}


def _make_entities(folder: Path) -> None:
    number = 0
    (folder / "Sentences").mkdir()
    (folder / "Annotations").mkdir()
    for split, size in SIZES["flickr30k-entities"].items():
        names = [str(1000092795 + number + place) for place in range(size)]
        (folder / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            _draw(number, folder / "flickr30k-images" / f"{name}.jpg")
            left, right = colors_of(number)
            lines = [
                f"[/EN#1/other A {left} square] beside [/EN#2/other a {right} one] on [/EN#3/scene a wall] .",
                "[/EN#0/notvisual It] shows [/EN#4/other/people two squares] in [/EN#5/other peace] .",
                f"[/EN#1/other A {left} square] .",
                "Nothing else .",
                "[/EN#0/notvisual This] is [/EN#9/other art] .",
            ]
            (folder / "Sentences" / f"{name}.txt").write_text("\n".join(lines) + "\n")
            (folder / "Annotations" / f"{name}.xml").write_text(_annotation(name, size_of(number)))
            number += 1


def _annotation(name: str, size: tuple[int, int]) -> str:
    things = []
    for chains, box in ((("1", "4"), LEFT), (("2", "4"), RIGHT)):
        left, top, width, height = map(round, coco_box(box, size))
        # Pixels count from 1, and the last one is inside.
        box = {"xmin": left + 1, "ymin": top + 1, "xmax": left + width, "ymax": top + height}
        things.append((chains, {"bndbox": "".join(f"<{key}>{value}</{key}>" for key, value in box.items())}))
    things += [(("3",), {"scene": 1, "nobndbox": 0}), (("5",), {"scene": 0, "nobndbox": 1})]
    objects = "".join(
        "\t<object>\n"
        + "".join(f"\t\t<name>{chain}</name>\n" for chain in chains)
        + "".join(f"\t\t<{key}>{value}</{key}>\n" for key, value in content.items())
        + "\t</object>\n"
        for chains, content in things
    )
    shape = f"<width>{size[0]}</width><height>{size[1]}</height><depth>3</depth>"
    return f"<annotation>\n\t<filename>{name}.jpg</filename>\n\t<size>{shape}</size>\n{objects}</annotation>\n"


def _make_daquar(folder: Path) -> None:
    boxes, expressions = [], []
    for number in sorted(sum(ROOMS.values(), ())):
        image = f"image{number}.jpg"
        _draw(number, folder / "images" / image)
        for text, box in (("the leftmost table", LEFT), ("the rightmost table", RIGHT), ("the sofa", LEFT)):
            box = [round(edge) for edge in coco_box(box, (337, 256))]
            boxes.append({"image": image, "label": text.split()[-1], "box": box, "area": box[2] * box[3]})
            if not (text == "the sofa" and number % 3):
                expressions.append({"image": image, "expression": text, "box": box})
    content = {"boxes": boxes, "expressions_templated": expressions, "box": "x,y,w,h in pixels of images/*.jpg"}
    (folder / "grounding_nyu13.json").write_text(json.dumps(content))
