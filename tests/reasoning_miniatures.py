"""The benchmarks of `hivilt.data.reasoning_benchmarks` in the layout of their official files, with a few plain images."""

import json
from pathlib import Path
from typing import Any

from tiny import make_image

COLORS = ("red", "blue", "green", "yellow")
# Sets of NLVR2, by split; each has two pairs of images, and two sentences, the first of both pairs, the second of the first.
SETS = {"train": 4, "dev": 2, "test1": 2}
# Examples of NLVR, by split; each has six images.
EXAMPLES = {"train": 6, "dev": 3, "test": 2}
KINDS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


def make_reasoning_miniature(name: str, folder: Path) -> None:
    """Writes the official files of a benchmark into a folder."""
    {"nlvr2": _make_nlvr2, "nlvr": _make_nlvr, "winoground": _make_winoground, "sugarcrepe": _make_sugarcrepe}[name](
        folder
    )


def nlvr2_rows(split: str) -> list[dict[str, Any]]:
    """What the official file of a split says; the left image is red in pairs where the first sentence is true."""
    rows = []
    for one in range(SETS[split]):
        for pair, sentence in ((0, 0), (1, 0), (0, 1)):
            said = ("The left image is red.", "One image is blue.")[sentence]
            row = {
                "sentence": said,
                "left_url": "http://example.org/left.jpg",
                "right_url": "http://example.org/right.jpg",
                "label": str(bool(sentence) or pair == one % 2),
                "identifier": f"{split}-{10 + one}-{pair}-{sentence}",
                "writer": "3",
                "validation": {"5": "True"},
                "synset": "dog",
                "query": "two dogs2",
            }
            if split == "train":  # two sets in a folder
                row["directory"] = one // 2 + 7
            else:
                row["extra_validations"] = {"6": "True"}
            rows.append(row)
    return rows


def nlvr2_images(split: str) -> dict[str, str]:
    """The colors of the images of a split, by their names without ending."""
    colors = {}
    for row in nlvr2_rows(split):
        pair = row["identifier"].rpartition("-")[0]
        if row["identifier"].endswith("-0"):
            colors |= {f"{pair}-img0": "red" if row["label"] == "True" else "green", f"{pair}-img1": "blue"}
    return colors


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _save(path: Path, color: str, size: tuple[int, int] = (31, 23)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image(color, size).save(path, format="JPEG" if path.name.endswith("img1.png") else None, quality=95)


def _make_nlvr2(folder: Path) -> None:
    for split in SETS:
        rows = nlvr2_rows(split)
        _lines(folder / "data" / f"{split}.json", rows)
        home = folder / ("images/train" if split == "train" else split)
        places = {row["identifier"].rpartition("-")[0]: str(row.get("directory", "")) for row in rows}
        for name, color in nlvr2_images(split).items():
            _save(home / places[name.rpartition("-")[0]] / f"{name}.png", color)
    _lines(folder / "data" / "balanced" / "balanced_dev.json", nlvr2_rows("dev")[:2])


def _make_nlvr(folder: Path) -> None:
    for split, count in EXAMPLES.items():
        rows = []
        for example in range(count):
            identifier, directory = f"{20 + example // 2}-{example % 2}", str(example // 4)
            box = [{"x_loc": 10, "y_loc": 10, "size": 20, "color": "Yellow", "type": "circle"}]
            row = {"sentence": f"There is a box with {COLORS[example % 4]}.", "identifier": identifier}
            row |= {"label": ("true", "false")[example % 2], "directory": directory, "evals": {"r0": "true"}}
            rows.append(row | {"structured_rep": [box, box, []]})
            for order in range(6):
                path = folder / split / "images" / directory / f"{split}-{identifier}-{order}.png"
                _save(path, COLORS[example % 4], (40, 10))
        _lines(folder / split / f"{split}.json", rows)


def _make_winoground(folder: Path) -> None:
    rows = []
    for example in range(2):
        images = [f"ex_{example}_img_{place}" for place in (0, 1)]
        for image, color in zip(images, COLORS, strict=False):
            _save(folder / "images" / f"{image}.png", color)
        rows.append(
            {
                "id": example,
                **{f"image_{place}": image for place, image in enumerate(images)},
                **{"caption_0": "red before blue", "caption_1": "blue before red"},
                **{"tag": "Object", "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": "Object"},
            }
        )
    _lines(folder / "examples.jsonl", rows)


def _make_sugarcrepe(folder: Path) -> None:
    for number, kind in enumerate(KINDS):
        rows = {}
        for example in range(2):
            file = f"{(number + example) % 4:012d}.jpg"
            _save(folder / "val2017" / file, COLORS[(number + example) % 4])
            rows[str(example)] = {"filename": file, "caption": f"a {kind} shape", "negative_caption": "no shape"}
        (folder / f"{kind}.json").write_text(json.dumps(rows))
