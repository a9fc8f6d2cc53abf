"""Each benchmark from a miniature of its official files, and from a folder laid out as its copy on the Hub."""

import json
import re
import shutil
from pathlib import Path

import pytest

from hivilt.data.reasoning import ReasoningDataset, Statement, label_ids, read_statements
from hivilt.data.reasoning_benchmarks import MATCHING_BENCHMARKS, REASONING_BENCHMARKS, Matching
from hivilt.data.tables import check_images, hold_out, open_image
from miniatures import write_hub_copy
from reasoning_miniatures import EXAMPLES, SETS, make_reasoning_miniature, nlvr2_images, nlvr2_rows
from tiny import make_image

TRUTH = {"False": 0, "True": 1}
SIZES = {
    "nlvr2": {split: 3 * count for split, count in SETS.items()},
    "nlvr": {split: 6 * count for split, count in EXAMPLES.items()},
    "winoground": {"test": 2},
    "sugarcrepe": {"test": 14},
}
BENCHMARKS = REASONING_BENCHMARKS | MATCHING_BENCHMARKS


@pytest.fixture
def miniature(tmp_path):
    """Writes the official files of a benchmark and gives their folder."""

    def make(name):
        make_reasoning_miniature(name, tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def read(name, split, folder, **where):
    return BENCHMARKS[name].read(split, data_dir=folder, **where)


def color_of(image):
    """The name of the color of an image, which JPEG may have changed a little."""
    pixel = open_image(image).getpixel((30, 8))
    colors = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 128, 0), "yellow": (255, 255, 0)}
    return min(colors, key=lambda name: sum(abs(a - b) for a, b in zip(colors[name], pixel, strict=True)))


# All of them


@pytest.mark.parametrize("name", SIZES)
def test_official_files(miniature, name):
    folder = miniature(name)
    splits = {split: read(name, split, folder) for split in SIZES[name]}
    assert {split: len(examples) for split, examples in splits.items()} == SIZES[name]
    assert set(SIZES[name]) == set(BENCHMARKS[name].splits.values())
    for examples in splits.values():
        assert check_images(examples, "skip") == (examples, [])
        assert {len(one.images) for one in examples} == {1 if name in ("nlvr", "sugarcrepe") else 2}
    ids = [{image for one in examples for image in one.image_ids} for examples in splits.values()]
    assert len(set.union(*ids)) == sum(map(len, ids))


@pytest.mark.parametrize("name", SIZES)
def test_a_folder_without_the_files_is_named(tmp_path, name):
    lacks = {"nlvr2": "test1.json or data/test1.json", "nlvr": "test.json or test/test.json"}
    lacks |= {"winoground": "examples.jsonl or data/examples.jsonl", "sugarcrepe": "add_att.json"}
    with pytest.raises(FileNotFoundError, match=f"data_dir: {tmp_path} lacks {lacks[name]}"):
        read(name, BENCHMARKS[name].splits["test"], tmp_path)


@pytest.mark.parametrize("name", SIZES)
def test_missing_images_are_counted_and_named(miniature, name):
    folder, split = miniature(name), BENCHMARKS[name].splits["test"]
    usual = read(name, split, folder)
    Path(usual[0].images[0]).unlink()
    examples = read(name, split, folder)
    assert examples == usual
    with pytest.raises(ValueError, match=f"1 of .* images are missing or unreadable: {re.escape(usual[0].images[0])}"):
        check_images(examples)
    kept, bad = check_images(examples, "skip")
    assert bad == [usual[0].image_ids[0]]
    assert kept == [one for one in usual if usual[0].image_ids[0] not in one.image_ids]


# NLVR2


def test_an_example_of_nlvr2_in_full(miniature):
    folder = miniature("nlvr2")
    first, second, third, fourth, *_ = read("nlvr2", "train", folder)
    home = folder / "images" / "train" / "7"
    assert first == Statement(
        statement_id="train-10-0-0",
        images=(str(home / "train-10-0-img0.png"), str(home / "train-10-0-img1.png")),
        image_ids=("7/train-10-0-img0", "7/train-10-0-img1"),
        sentence="The left image is red.",
        label="True",
        group="train-10-0",
    )
    # The same sentence of the other pair, and another of the first one.
    assert (second.label, second.group) == ("False", "train-10-0") and second.image_ids[0] == "7/train-10-1-img0"
    assert third.group == "train-10-1" and third.image_ids == first.image_ids and fourth.group == "train-11-0"
    assert (color_of(first.images[0]), color_of(first.images[1]), color_of(second.images[0])) == (
        "red",
        "blue",
        "green",
    )
    assert label_ids([first, second, third], TRUTH) == [1, 0, 1]
    dev = read("nlvr2", "dev", folder)[0]
    assert dev.image_ids[0] == "dev-10-0-img0" and dev.images[0] == str(folder / "dev" / "dev-10-0-img0.png")
    # A pair is an item, with all that is said of it.
    assert [len(group) for group in ReasoningDataset(read("nlvr2", "test1", folder)).groups] == [2, 1, 2, 1]


@pytest.mark.parametrize("layout", ["in folders", "in one folder", "train_img", "elsewhere", "among others"])
def test_layouts_of_nlvr2(miniature, tmp_path, layout):
    folder, where = miniature("nlvr2"), {}
    usual, dev = read("nlvr2", "train", folder), read("nlvr2", "dev", folder)
    home = folder / "images" / "train"
    if layout == "in folders":
        shutil.copy(home / "7" / "train-10-0-img0.png", folder / "logo.png")  # no reason to look there
        shutil.copytree(folder / "dev", folder / "images" / "dev")
    elif layout == "train_img":
        home.rename(folder / "train_img")
    else:
        if layout in ("in one folder", "among others"):
            for path in home.glob("*/*.png"):
                path.rename(home / path.name)
        if layout == "among others":
            for path in (*home.glob("*.png"), *(folder / "dev").glob("*.png")):
                path.rename(folder / "images" / path.name)
            shutil.rmtree(home)
            shutil.rmtree(folder / "dev")
        if layout == "elsewhere":
            (folder / "images").rename(tmp_path / "elsewhere")
            where = {"image_dir": tmp_path / "elsewhere"}
    for split, before in (("train", usual), ("dev", dev if layout != "elsewhere" else [])):
        examples = read("nlvr2", split, folder, **where) if before else []
        assert [one._replace(images=()) for one in examples] == [one._replace(images=()) for one in before]
        if before:
            assert check_images(examples, "skip") == (examples, [])
    with pytest.raises(ValueError, match="images are missing"):
        shutil.rmtree(where.get("image_dir", folder / ("train_img" if layout == "train_img" else "images")))
        check_images(read("nlvr2", "train", folder, **where))


def test_the_first_images_may_be_missing(miniature):
    folder = miniature("nlvr2")
    for path in (folder / "images" / "train" / "7").glob("*.png"):
        path.unlink()
    examples = read("nlvr2", "train", folder)
    kept, bad = check_images(examples, "skip")
    assert len(kept) == 6 and len(bad) == 8 and {one.image_ids[0].split("/")[0] for one in kept} == {"8"}


def test_other_splits_of_nlvr2(miniature):
    folder = miniature("nlvr2")
    assert [one.statement_id for one in read("nlvr2", "balanced_dev", folder)] == ["dev-10-0-0", "dev-10-1-0"]
    (folder / "data" / "dev.json").rename(folder / "dev.json")
    assert len(read("nlvr2", "dev", folder)) == 6
    with pytest.raises(
        ValueError, match="NLVR2 has the official splits 'train', 'dev', 'test1', .*'test2', got 'test'"
    ):
        read("nlvr2", "test", folder)


def test_other_numbers_than_the_published_are_warned_of(miniature, caplog):
    read("nlvr2", "dev", miniature("nlvr2"))
    assert caplog.messages == [
        "NLVR2, dev: has 6 statements, officially 6,982; results do not compare with published ones."
    ]


def test_nlvr2_and_nlvr_are_told_apart(miniature):
    first, second = miniature("nlvr"), miniature("nlvr2")
    with pytest.raises(ValueError, match="the identifier '20-0'; NLVR2's are such as .*--benchmark nlvr"):
        read("nlvr2", "dev", first / "dev")
    with pytest.raises(ValueError, match="dev.json has the identifier 'dev-10-0-0'; NLVR's are such as .*nlvr2"):
        read("nlvr", "dev", second / "data")


@pytest.mark.parametrize("name", ["nlvr2", "nlvr"])
def test_what_is_held_out_is_a_folder(miniature, name):
    folder, benchmark = miniature(name), BENCHMARKS[name]
    train, held_out = hold_out(read(name, "train", folder), by=benchmark.hold_out_by)
    folders = [{image.split("/")[0] for one in part for image in one.image_ids} for part in (train, held_out)]
    assert [len(found) for found in folders] == [1, 1] and not folders[0] & folders[1]
    if name == "nlvr2":  # without folders the set of eight images
        bare = [
            one._replace(image_ids=tuple(image.split("/")[1] for image in one.image_ids)) for one in train + held_out
        ]
        train, held_out = hold_out(bare, by=benchmark.hold_out_by)
        sets = [{one.statement_id.split("-")[1] for one in part} for part in (train, held_out)]
        assert len(sets[1]) == 1 and not sets[0] & sets[1]
        unnamed = [one._replace(statement_id=str(n)) for n, one in enumerate(bare)]
        train, held_out = hold_out(unnamed, by=benchmark.hold_out_by)
        images = [{image for one in part for image in one.image_ids} for part in (train, held_out)]
        assert held_out and not images[0] & images[1]


def hub_images(split):
    """The rows of a split as the official file has them, with the colors of both images."""
    colors = nlvr2_images(split)
    for row in nlvr2_rows(split):
        pair = row["identifier"].rpartition("-")[0]
        yield row, [make_image(colors[f"{pair}-img{side}"], (31 + len(pair), 23 + int(pair[-3:-2]))) for side in (0, 1)]


@pytest.mark.parametrize("id_column", ["question_id", "identifier", None])
def test_a_copy_with_two_columns_of_images(tmp_path, id_column):
    rows = [
        {
            **({id_column: row["identifier"]} if id_column else {}),
            **{"question": row["sentence"], "answer": row["label"], "left_url": row["left_url"], "writer": "1"},
            **{"left_image": left, "right_image": right},
        }
        for row, (left, right) in hub_images("dev")
    ]
    write_hub_copy(tmp_path / "copy", {"balanced_dev": rows})
    found = BENCHMARKS["nlvr2"].read("balanced_dev", dataset_name=str(tmp_path / "copy"))
    official = nlvr2_rows("dev")
    assert [(one.sentence, one.label) for one in found] == [(row["sentence"], row["label"]) for row in official]
    assert [color_of(image) for image in found[0].images] == ["red", "blue"]
    assert found[2].image_ids == found[0].image_ids != found[1].image_ids and found[2].images == found[0].images
    if id_column:
        assert [one.statement_id for one in found] == [row["identifier"] for row in official]
        assert found[0].group == found[1].group == "dev-10-0" and found[2].group == "dev-10-1"
    else:
        assert {one.group for one in found} == {None} and found[3].statement_id == "3"


ASKED = (
    "Here is a statement describing 2 images: {} Is it true or false?",
    "Given these 2 images, <image> and <image>. Here is a statement describing them: {} Is it true or false?\nOptions:",
)


def test_a_copy_with_options(tmp_path):
    rows = []
    for place, (row, images) in enumerate(hub_images("test1")):
        options = ["(A) True", "(B) False"] if place % 2 else ["(A) False", "(B) True"]
        answer = "AB"[[option.endswith(row["label"]) for option in options].index(True)]
        asked = ASKED[place % 2].format(row["sentence"])
        rows.append(
            {"id": row["identifier"], "question": asked, "images": images, "options": options, "answer": answer}
        )
    write_hub_copy(tmp_path / "copy", {"nlvr2/test": rows})
    found = BENCHMARKS["nlvr2"].read("test1", dataset_name=str(tmp_path / "copy"))
    official = nlvr2_rows("test1")
    assert [(one.sentence, one.label) for one in found] == [(row["sentence"], row["label"]) for row in official]
    assert [one.statement_id for one in found] == [row["identifier"] for row in official]
    assert [color_of(image) for image in found[1].images] == ["green", "blue"]
    assert found[2].image_ids == found[0].image_ids
    rows[1]["question"] = "Which image is red?"
    write_hub_copy(tmp_path / "other", {"nlvr2/test": rows})
    with pytest.raises(ValueError, match="row 2: expected a question such as .*got 'Which image is red"):
        BENCHMARKS["nlvr2"].read("test1", dataset_name=str(tmp_path / "other"))


def test_a_copy_without_images_is_passed_over(tmp_path):
    rows = [{"question": row["sentence"], "answer": row["label"]} for row in nlvr2_rows("dev")]
    write_hub_copy(tmp_path / "copy", {"balanced_dev": rows})
    with pytest.raises(ValueError, match="(?s)no copy on the Hub could be read.*expected columns 'images'"):
        BENCHMARKS["nlvr2"].read("balanced_dev", dataset_name=str(tmp_path / "copy"))


def test_a_file_as_other_programs_write_it(miniature):
    """BLIP's: a list of objects with paths of both images."""
    folder = miniature("nlvr2")
    rows = [
        {"images": list(one.images), "sentence": one.sentence, "label": one.label}
        for one in read("nlvr2", "dev", folder)
    ]
    (folder / "nlvr_dev.json").write_text(json.dumps(rows))
    assert [one.images for one in read_statements(folder / "nlvr_dev.json")] == [tuple(row["images"]) for row in rows]


# NLVR


def test_an_example_of_nlvr_is_six_images(miniature):
    folder = miniature("nlvr")
    found = read("nlvr", "train", folder)
    image = folder / "train" / "images" / "0" / "train-20-1-2.png"
    assert found[8] == Statement(
        statement_id="20-1-2",
        images=(str(image),),
        image_ids=("0/train-20-1-2",),
        sentence="There is a box with blue.",
        label="false",
        group="20",
    )
    assert len({one.image_ids for one in found}) == 36 and {one.group for one in found} == {"20", "21", "22"}
    assert label_ids(found[:7], TRUTH) == [1] * 6 + [0]
    (folder / "train" / "images").rename(folder / "photographs")
    elsewhere = read("nlvr", "train", folder, image_dir=folder / "photographs")
    assert check_images(elsewhere, "skip") == (elsewhere, [])


# Matching


def test_an_example_of_winoground_in_full(miniature):
    folder = miniature("winoground")
    first, second = read("winoground", "test", folder)
    assert second == Matching(
        images=tuple(str(folder / "images" / f"ex_1_img_{place}.png") for place in (0, 1)),
        image_ids=("ex_1_img_0", "ex_1_img_1"),
        texts=("red before blue", "blue before red"),
        kind="Object",
    )


def test_a_copy_of_winoground(tmp_path):
    rows = [
        {
            **{
                "id": n,
                "image_0": make_image("red"),
                "image_1": make_image("blue"),
                "tag": "x",
                "collapsed_tag": "Both",
            },
            **{"caption_0": "red", "caption_1": "blue", "num_main_preds": 1},
        }
        for n in range(2)
    ]
    write_hub_copy(tmp_path / "copy", {"test": rows})
    first, second = MATCHING_BENCHMARKS["winoground"].read("test", dataset_name=str(tmp_path / "copy"))
    assert first.texts == ("red", "blue") and first.kind == "Both"
    assert [color_of(image) for image in second.images] == ["red", "blue"]


def test_an_example_of_sugarcrepe_in_full(miniature):
    folder = miniature("sugarcrepe")
    found = read("sugarcrepe", "test", folder)
    file = f"{1:012d}.jpg"
    assert found[1] == Matching((str(folder / "val2017" / file),), (file,), ("a add_att shape", "no shape"), "add_att")
    assert [one.kind for one in found[::2]] == sorted({one.kind for one in found})
    assert len({one.image_ids for one in found}) == 4


# Drawn pairs


def test_drawn_pairs_have_no_files(tmp_path):
    pairs = REASONING_BENCHMARKS["pairs"]
    assert len(pairs.read("validation")) == 1008
    with pytest.raises(ValueError, match="data_dir: pairs are drawn"):
        pairs.read("validation", data_dir=tmp_path)
