"""Each benchmark from a miniature of its official files, and from a folder laid out as its copy on the Hub."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grounding_miniatures import (
    LEFT,
    RIGHT,
    ROOMS,
    SIZES,
    make_grounding_miniature,
    python_2_pickle,
    size_of,
)
from hivilt.data.grounding import GroundedImage
from hivilt.data.grounding_benchmarks import GROUNDING_BENCHMARKS
from hivilt.data.tables import TableImage, check_images, open_image

NAMES = list(SIZES)
IMAGES = {"flickr30k-entities": "flickr30k-images", "daquar-grounding": "images"}


@pytest.fixture
def miniature(tmp_path):
    """Writes the official files of a benchmark and gives their folder."""

    def make(name):
        make_grounding_miniature(name, tmp_path / name)
        return tmp_path / name

    return make


def read(name, split, folder, **where):
    return GROUNDING_BENCHMARKS[name].read(split, data_dir=folder, **where)


def without_images(examples):
    return [(one.image_id, one.expressions, one.boxes, one.kinds) for one in examples]


def rounded(boxes):
    return tuple(tuple(tuple(round(edge, 6) for edge in box) for box in its) for its in boxes)


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# All of them


@pytest.mark.parametrize("name", NAMES)
def test_official_files(miniature, name):
    folder = miniature(name)
    splits = {split: read(name, split, folder) for split in SIZES[name]}
    assert {split: len(examples) for split, examples in splits.items()} == SIZES[name]
    assert set(SIZES[name]) == {one for names in GROUNDING_BENCHMARKS[name].splits.values() for one in names.split("+")}
    ids = [one.image_id for examples in splits.values() for one in examples]
    assert len(set(ids)) == len(ids)
    for examples in splits.values():
        assert check_images(examples, "skip") == (examples, [])
        for one in examples:
            assert len(one.expressions) == len(one.boxes) and len(one.kinds) in (0, len(one.boxes))
            assert set(sum(rounded(one.boxes), ())) <= {LEFT, RIGHT} or name == "daquar-grounding"


@pytest.mark.parametrize("name", NAMES)
def test_images_may_lie_elsewhere(miniature, tmp_path, name):
    folder, elsewhere = miniature(name), tmp_path / "elsewhere"
    usual = read(name, "val", folder)
    (folder / IMAGES.get(name, "train2014")).rename(elsewhere)
    examples = read(name, "val", folder, image_dir=elsewhere)
    assert without_images(examples) == without_images(usual)
    assert check_images(examples) == (examples, [])
    assert all(one.image.startswith(str(elsewhere)) for one in examples)


@pytest.mark.parametrize("name", NAMES)
def test_missing_images_are_counted_and_named(miniature, name):
    folder = miniature(name)
    usual = read(name, "val", folder)
    Path(usual[1].image).unlink()
    examples = read(name, "val", folder)
    assert examples == usual
    with pytest.raises(ValueError, match=re.escape(f"1 of 4 images are missing or unreadable: {usual[1].image}")):
        check_images(examples)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_the_files_is_named(tmp_path, name):
    lacks = {
        "refcocog": r"refs\(umd\).json or refs\(umd\).p.* issues 14, 23 and 26 of github.com/lichengunc/refer name copies",
        "grefcoco": r"grefs\(unc\).json or grefs\(unc\).p.* github.com/henghuiding/gRefCOCO says where it is",
        "flickr30k-entities": "val.txt",
        "daquar-grounding": "grounding_nyu13.json",
    }
    with pytest.raises(FileNotFoundError, match=f"data_dir: {tmp_path} lacks {lacks.get(name, r'refs.unc')}"):
        read(name, "val", tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_other_splits_are_refused(miniature, name):
    official = ", ".join(map(repr, GROUNDING_BENCHMARKS[name].official_splits))
    with pytest.raises(ValueError, match=f"has the official splits {official}, got 'dev'"):
        read(name, "dev", miniature(name))


def test_other_numbers_of_expressions_than_the_published_are_warned_of(miniature, caplog):
    folder = miniature("refcoco")
    read("refcoco", "val", folder)
    assert [record.getMessage() for record in caplog.records] == [
        "RefCOCO, val: has 16 expressions, officially 10,834; results do not compare with published ones."
    ]
    caplog.clear()
    read("grefcoco", "val", miniature("grefcoco"))  # not published
    assert not caplog.records


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_lie_in_the_image_as_it_is_shown(miniature, orientation):
    """The right square of the stored image, wherever the tag of EXIF turns it to."""
    folder = miniature("refcoco")
    path = folder / "train2014" / f"COCO_train2014_{9 + 16 * 8:012d}.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(path) as image:
        image.load()
    image.save(path, exif=exif, quality=95)
    (one, *_) = read("refcoco", "val", folder)
    shown, color = open_image(one.image), np.array(image.getpixel((15, 25)), float)
    assert (shown.size == image.size) == (orientation < 5)
    ((left, top, right, bottom),) = one.boxes[2]
    alike = np.abs(np.array(shown, float) - color).max(axis=2) < 60
    inside = np.zeros_like(alike)
    rows = slice(round(top * shown.height), round(bottom * shown.height))
    inside[rows, round(left * shown.width) : round(right * shown.width)] = True
    assert inside.sum() == 8 * 20 and (alike == inside).mean() > 0.97


def test_boxes_of_the_size_of_the_shown_image_are_not_turned(miniature):
    folder = miniature("refcoco")
    path = folder / "train2014" / f"COCO_train2014_{9 + 16 * 8:012d}.jpg"
    usual = read("refcoco", "val", folder)[0].boxes
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    assert open_image(str(path)).size == size_of(8)
    assert read("refcoco", "val", folder)[0].boxes == usual


# RefCOCO, RefCOCO+, RefCOCOg


@pytest.mark.parametrize("name", ["refcoco", "refcoco+", "refcocog"])
def test_refcoco_in_full(miniature, name):
    folder = miniature(name)
    (first, *_) = read(name, "val", folder)
    # 20 x 50 pixels: [2.0, 10.0, 6.0, 30.0] and [11.0, 15.0, 8.0, 20.0]; `sent`, not "The RED square!"
    assert (first.image, first.image_id) == (str(folder / "train2014/COCO_train2014_000000000137.jpg"), "137")
    assert first.expressions == ("the red square", "left one red", "the green square", "right one green")
    assert rounded(first.boxes) == ((LEFT,), (LEFT,), (RIGHT,), (RIGHT,))
    assert first.kinds == ()


def test_joined_splits_are_told_apart_by_kind(miniature):
    folder = miniature("refcoco")
    joined = read("refcoco", GROUNDING_BENCHMARKS["refcoco"].splits["test"], folder)
    assert [one.kinds for one in joined] == [("testA",) * 4] * 2 + [("testB",) * 4] * 2
    assert without_images(read("refcoco", "testA", folder)) == [(*one[:3], ()) for one in without_images(joined[:2])]


def test_a_sentence_of_which_nothing_is_left_is_as_it_was_written(miniature):
    folder = miniature("grefcoco")
    edit_json(folder / "grefs(unc).json", lambda refs: refs[0]["sentences"][0].update(sent=" ", raw="?"))
    assert read("grefcoco", "train", folder)[0].expressions[0] == "?"


@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_json_in_place_of_the_pickle(miniature, lines):
    folder = miniature("refcoco")
    usual = read("refcoco", "val", folder)
    refs = pickle.loads((folder / "refs(unc).p").read_bytes(), encoding="latin1")
    (folder / "refs(unc).p").unlink()
    content = "\n".join(map(json.dumps, refs)) if lines else json.dumps(refs)
    (folder / "refs(unc).json").write_text(content)
    assert read("refcoco", "val", folder) == usual


def test_python_2_texts_are_latin_1(miniature):
    folder = miniature("refcoco")
    refs = pickle.loads((folder / "refs(unc).p").read_bytes(), encoding="latin1")
    refs[0]["sentences"][0]["sent"] = "caf\xe9"
    (folder / "refs(unc).p").write_bytes(python_2_pickle(refs))
    assert b"caf\xe9" in (folder / "refs(unc).p").read_bytes()
    assert read("refcoco", "train", folder)[0].expressions[0] == "caf\xe9"


class Trap:
    """What makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_never_runs_anything(miniature, tmp_path, protocol):
    folder, path = miniature("refcoco"), str(tmp_path / "made")
    (folder / "refs(unc).p").write_bytes(pickle.dumps([{"split": "val", "extra": Trap(path)}], protocol))
    with pytest.raises(
        ValueError, match=r"refs\(unc\).p: is not read as a pickle of lists.*\(it names \w+.mkdir, which"
    ):
        read("refcoco", "val", folder)
    assert not os.path.exists(path)
    pickle.loads((folder / "refs(unc).p").read_bytes())
    assert os.path.isdir(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "is not read as a pickle"),
        (b"", "Ran out of input"),
        (python_2_pickle([{"split": "val"}])[:-4], "is not read as a pickle"),
        (pickle.dumps([np.float64(0.5)], 2), "it names numpy"),
        (python_2_pickle({"refs": 5}), "is not laid out as expected"),
        (python_2_pickle([{"split": "val"}]), r"is not laid out as expected \(KeyError\('image_id'\)\)"),
        (python_2_pickle([{"split": "train"}]), r"refs\(unc\).p has no 'val'; its splits are 'train'"),
    ],
)
def test_other_pickles_are_refused(miniature, content, message):
    folder = miniature("refcoco")
    (folder / "refs(unc).p").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read("refcoco", "val", folder)


def test_folders_of_several_sets_beside_each_other(tmp_path):
    for name in ("refcoco", "refcoco+", "refcocog"):
        make_grounding_miniature(name, tmp_path / name)
    images = tmp_path / "images/mscoco/images"
    images.mkdir(parents=True)
    (tmp_path / "refcoco/train2014").rename(images / "train2014")
    shutil.rmtree(tmp_path / "refcocog/train2014")
    shutil.rmtree(tmp_path / "refcoco+/train2014")
    path = tmp_path / "refcoco+/refs(unc).p"
    path.write_bytes(path.read_bytes().replace(b"square", b"sphere"))
    for name, text in (("refcoco", "the red square"), ("refcoco+", "the red sphere"), ("refcocog", "the red square")):
        examples = read(name, "val", tmp_path)
        assert examples[0].expressions[0] == text
        assert check_images(examples) == (examples, [])
    # Both are called refs(unc).p.
    shutil.rmtree(tmp_path / "refcoco+")
    with pytest.raises(
        FileNotFoundError, match="is in the folder of 'refcoco', whose files have the same names as.*'refcoco"
    ):
        read("refcoco+", "val", tmp_path)


def test_annotations_of_coco_itself(miniature):
    folder = miniature("refcoco")
    usual = read("refcoco", "val", folder)
    (folder / "annotations").mkdir()
    (folder / "instances.json").rename(folder / "annotations/instances_train2014.json")
    assert read("refcoco", "val", folder) == usual


def test_references_to_what_is_not_annotated_are_counted(miniature):
    folder = miniature("refcoco")
    edit_json(folder / "instances.json", lambda content: content["annotations"].pop(17))
    with pytest.raises(
        ValueError, match=r"instances.json lacks .* of 1 references of refs\(unc\).p, first of image 137, anno"
    ):
        read("refcoco", "val", folder)
    assert len(read("refcoco", "train", folder)) == 8
    # An annotation with this number, but of another image.
    edit_json(folder / "instances.json", lambda content: content["annotations"][0].update(image_id=25))
    with pytest.raises(ValueError, match="first of image 9, annotation 1000; are both of the same data set"):
        read("refcoco", "train", folder)


@pytest.mark.parametrize("box", [[-0.5, -1, 21.5, 51.5], [0, 0, 20, 50]])
def test_a_box_is_cut_at_the_edge_of_its_image(miniature, caplog, box):
    folder = miniature("refcoco")
    edit_json(folder / "instances.json", lambda content: content["annotations"][16].update(bbox=box))
    assert read("refcoco", "val", folder)[0].boxes[0] == ((0, 0, 1, 1),)
    assert not any("boxes reach over" in text for text in caplog.messages)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        # Right and bottom in place of width and height.
        (
            [11, 15, 19, 35],
            r"2 of 16 boxes reach over the edge .* first RefCOCO, val, row 1, image 137, 'the red square', \[11,",
        ),
        ([-2, 0, 5, 5], "; are they left, top, width and height in pixels of that image"),
        ([25, 3, 5, 5], "RefCOCO, val, row 1, image 137, 'the red square', box 1"),
        ([3, 3, 0, 5], "RefCOCO, val, row 1, image 137, 'the red square', box 1"),
        ([3, 3, 5, float("nan")], "RefCOCO, val, row 1, image 137, 'the red square', box 1"),
    ],
)
def test_boxes_that_are_not_in_their_images_are_refused(miniature, box, message):
    folder = miniature("refcoco")
    edit_json(folder / "instances.json", lambda content: content["annotations"][16].update(bbox=box))
    with pytest.raises(ValueError, match=message):
        read("refcoco", "val", folder)


def test_one_box_of_many_may_reach_over_the_edge(miniature, caplog):
    folder = miniature("grefcoco")
    edit_json(folder / "grefs(unc).json", lambda refs: refs[3]["sentences"].extend(refs[3]["sentences"] * 200))
    # Of the second square of the first image, which is in one of its expressions.
    edit_json(folder / "instances.json", lambda content: content["annotations"][1].update(bbox=[11, 15, 19, 20]))
    assert rounded(read("grefcoco", "train", folder)[0].boxes)[1] == (LEFT, (0.55, 0.3, 1, 0.7))
    (told,) = caplog.messages
    assert told == (
        "1 of 224 boxes reach over the edge of their image by more than a pixel, first gRefCOCO, train, row 1, image 9, "
        "'red and blue', [11, 15, 19, 20] of 20 x 50; they are cut there."
    )


@pytest.mark.parametrize("name", ["refcoco", "refcocog"])
def test_the_split_of_google_says_that_it_shares_images(miniature, caplog, name):
    folder = miniature(name)
    examples = read(name, "google-val", folder)
    assert [one.expressions[0].split()[0] for one in examples] == ["the"] * 8
    assert {rounded(one.boxes) for one in examples} == {((RIGHT,), (RIGHT,))}
    assert (
        sum("refs(google).p, val: 8 of its 8 images are images to train on, too" in text for text in caplog.messages)
        == 1
    )
    caplog.clear()
    assert len(read(name, "google-train", folder)) == 16
    read(name, "val", folder)
    assert not any("images to train on" in text for text in caplog.messages)


def benchmark_copy(folder, refs_file, split):
    """Rows of jxu124/refcoco-benchmark: one an image."""
    instances = json.loads((folder / "instances.json").read_text())
    annotations = {row["id"]: row for row in instances["annotations"]}
    rows = {}
    for ref in pickle.loads((folder / refs_file).read_bytes(), encoding="latin1"):
        if ref["split"] == split:
            info = next(row for row in instances["images"] if row["id"] == ref["image_id"])
            row = {"image": folder / "train2014" / info["file_name"], "image_info": info, "ref_list": []}
            its = {"ann_info": annotations[ref["ann_id"]], "ref_info": ref}
            rows.setdefault(ref["image_id"], row)["ref_list"].append(its)
    return list(rows.values())


def lmms_copy(folder, refs_file, split):
    """Rows of lmms-lab/RefCOCO: one an object."""
    return [
        {
            "question_id": str(ref["ref_info"]["ref_id"]),
            "image": row["image"],
            "question": "Please carefully observe the area ...",
            "answer": [sentence["sent"] for sentence in ref["ref_info"]["sentences"]],
            "bbox": ref["ann_info"]["bbox"],
            "file_name": ref["ref_info"]["file_name"],
        }
        for row in benchmark_copy(folder, refs_file, split)
        for ref in row["ref_list"]
    ]


@pytest.mark.parametrize(
    ("name", "split", "official", "theirs"),
    [
        ("refcoco", "val", "val", "refcoco_unc_val"),
        ("refcoco", "testB", "testB", "refcoco_unc_testB"),
        ("refcoco", "google-val", "val", "refcoco_google_val"),
        ("refcoco+", "testA", "testA", "refcoco_plus_unc_testA"),
        ("refcocog", "test", "test", "refcocog_umd_test"),
    ],
)
def test_the_copy_by_image_on_the_hub(miniature, hub, name, split, official, theirs):
    folder, file = miniature(name), f"refs({theirs.split('_')[-2]}).p"
    files = read(name, split, folder)
    copy = GROUNDING_BENCHMARKS[name].read(split, dataset_name=hub(theirs, benchmark_copy(folder, file, official)))
    assert_same(copy, files)
    (table, *_) = GROUNDING_BENCHMARKS[name].hub[split]
    assert table.split == theirs


@pytest.mark.parametrize(("name", "split"), [("refcoco", "testA"), ("refcoco+", "val"), ("refcocog", "test")])
def test_the_copy_by_object_on_the_hub(miniature, hub, name, split):
    folder, file = miniature(name), f"refs({'umd' if name == 'refcocog' else 'unc'}).p"
    files = read(name, split, folder)
    copy = GROUNDING_BENCHMARKS[name].read(split, dataset_name=hub(split, lmms_copy(folder, file, split)))
    assert_same(copy, files)


def assert_same(copy, files):
    assert [(one.image_id, one.expressions, rounded(one.boxes), one.kinds) for one in copy] == [
        (one.image_id, one.expressions, rounded(one.boxes), one.kinds) for one in files
    ]
    for stored, file in zip(copy, files, strict=True):
        assert isinstance(stored.image, TableImage)
        assert open_image(stored.image).tobytes() == open_image(file.image).tobytes()


@pytest.mark.parametrize(("name", "splits"), [("refcoco", ("val",)), ("refcocog", ("val",)), ("refcoco+", ())])
def test_copies_that_mix_the_splits_of_two_are_not_used(name, splits):
    # lmms-lab/RefCOCO and RefCOCOg have the objects of Google's split in their val, too.
    for split, tables in GROUNDING_BENCHMARKS[name].hub.items():
        others = [table for table in tables if table.dataset != "jxu124/refcoco-benchmark"]
        assert bool(others) == (split not in splits and not split.startswith("google"))


def test_the_hub_has_nothing_to_train_on():
    with pytest.raises(
        ValueError, match="RefCOCO has no 'train' split with images on the Hub; those that have are 'val', 'te"
    ):
        GROUNDING_BENCHMARKS["refcoco"].read("train")


# gRefCOCO


def test_grefcoco_in_full(miniature):
    folder = miniature("grefcoco")
    (first, *_) = read("grefcoco", "val", folder)
    assert (first.image, first.image_id) == (str(folder / "train2014/COCO_train2014_000000000137.jpg"), "137")
    assert first.expressions == ("red square", "red and green", "white circle")
    assert rounded(first.boxes) == ((LEFT,), (LEFT, RIGHT), ())


def test_grefcoco_as_a_pickle(miniature):
    folder = miniature("grefcoco")
    usual = read("grefcoco", "testB", folder)
    path = folder / "grefs(unc).json"
    (folder / "grefs(unc).p").write_bytes(python_2_pickle(json.loads(path.read_text())))
    path.unlink()
    assert read("grefcoco", "testB", folder) == usual


def test_nothing_and_something_at_once_is_refused(miniature):
    folder = miniature("grefcoco")
    edit_json(folder / "grefs(unc).json", lambda refs: refs[0].update(ann_id=[1000, -1]))
    with pytest.raises(ValueError, match=r"first of image 9, annotation \[1000, -1\]"):
        read("grefcoco", "train", folder)


# Flickr30k Entities


def test_flickr30k_entities_in_full(miniature):
    """Phrases of all five captions, repeated ones too, but for those without a box."""
    folder = miniature("flickr30k-entities")
    (first, *_) = read("flickr30k-entities", "val", folder)
    assert first == GroundedImage(
        image=str(folder / "flickr30k-images/1000092803.jpg"),
        image_id="1000092803",
        expressions=("A red square", "a green one", "two squares", "A red square"),
        boxes=((LEFT,), (RIGHT,), (LEFT, RIGHT), (LEFT,)),
        kinds=("other",) * 4,
    )


def test_pixels_of_flickr30k_entities_count_from_1_to_the_last(miniature):
    folder = miniature("flickr30k-entities")
    path = folder / "Annotations/1000092803.xml"
    box = "<xmin>3</xmin><ymin>11</ymin><xmax>8</xmax><ymax>40</ymax>"
    assert box in path.read_text() and "<width>20</width><height>50</height>" in path.read_text()
    for new, expected in [
        ("<xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>50</ymax>", (0, 0, 1, 1)),
        ("<xmin>20</xmin><ymin>50</ymin><xmax>20</xmax><ymax>50</ymax>", (0.95, 0.98, 1, 1)),
        ("<xmin>0</xmin><ymin>0</ymin><xmax>10</xmax><ymax>10</ymax>", (0, 0, 0.5, 0.2)),
    ]:
        path.write_text(path.read_text().replace(box, new))
        assert read("flickr30k-entities", "val", folder)[0].boxes[0] == (expected,)
        box = new


@pytest.mark.parametrize(
    ("line", "expressions", "kinds"),
    [
        (
            "[/EN#2/vehicles/scene the  subway] [/EN#1/people A man [sic] here] .",
            ("the subway", "A man [sic"),
            "vehicles people",
        ),
        ("[/EN#1/people Man].", (), ""),
        ("( [/EN#1/bodyparts o'clock (shadow)]\t)", ("o'clock (shadow)",), "bodyparts"),
    ],
)
def test_phrases_of_flickr30k_entities(miniature, line, expressions, kinds):
    """A phrase ends where a word ends with a bracket, as for the official reader."""
    folder = miniature("flickr30k-entities")
    (folder / "Sentences/1000092803.txt").write_text(f"{line}\n[/EN#1/other end]\n")
    (first, *_) = read("flickr30k-entities", "val", folder)
    assert (first.expressions, first.kinds) == ((*expressions, "end"), (*kinds.split(), "other"))


def test_chain_0_is_no_thing_even_with_a_box(miniature):
    folder = miniature("flickr30k-entities")
    path = folder / "Annotations/1000092803.xml"
    path.write_text(path.read_text().replace("<name>1</name>", "<name>0</name>"))
    assert read("flickr30k-entities", "val", folder)[0].expressions == ("a green one", "two squares")


def test_an_image_without_a_phrase_that_has_a_box_is_left_out(miniature):
    folder = miniature("flickr30k-entities")
    (folder / "Sentences/1000092803.txt").write_text("[/EN#3/scene a wall] .\n")
    assert [one.image_id for one in read("flickr30k-entities", "val", folder)] == [
        "1000092804",
        "1000092805",
        "1000092806",
    ]


def test_annotations_of_flickr30k_entities_in_a_folder_of_their_own(miniature):
    folder = miniature("flickr30k-entities")
    usual = read("flickr30k-entities", "val", folder)
    (folder / "annotations").mkdir()
    for name in ("Sentences", "Annotations"):
        (folder / name).rename(folder / "annotations" / name)
    assert read("flickr30k-entities", "val", folder) == usual


def test_missing_annotations_of_flickr30k_entities_are_counted(miniature):
    folder = miniature("flickr30k-entities")
    (folder / "Annotations/1000092804.xml").unlink()
    (folder / "Sentences/1000092805.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match="2 of the files of the 4 images in val.txt are missing, .*1000092804.xml first"
    ):
        read("flickr30k-entities", "val", folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<annotation>", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>', "declares a document type"),
        ("</annotation>", "", r"is not XML with .* \(no element found"),
        ("<width>20</width>", "", "is not XML with a size and boxes"),
        ("<xmax>8</xmax>", "<xmax>eight</xmax>", "is not XML with .* 'eight'"),
        ("<xmax>8</xmax>", "<xmax>2</xmax>", "row 1, image 1000092803, 'A red square', box 1"),
    ],
)
def test_other_annotations_of_flickr30k_entities_are_refused(miniature, old, new, message):
    folder = miniature("flickr30k-entities")
    path = folder / "Annotations/1000092803.xml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        read("flickr30k-entities", "val", folder)


# DAQUAR


def test_daquar_in_full(miniature):
    folder = miniature("daquar-grounding")
    (first, second, *_) = read("daquar-grounding", "val", folder)
    # [34, 51, 101, 154] and [185, 77, 135, 102] of 337 x 256 pixels, whatever the size of the image.
    assert first == GroundedImage(
        image=str(folder / "images/image111.jpg"),
        image_id="image111",
        expressions=("the leftmost table", "the rightmost table", "the sofa"),
        boxes=(
            ((34 / 337, 51 / 256, 135 / 337, 205 / 256),),
            ((185 / 337, 77 / 256, 320 / 337, 179 / 256),),
            ((34 / 337, 51 / 256, 135 / 337, 205 / 256),),
        ),
        kinds=("leftmost", "rightmost", "only"),
    )
    assert second.kinds == ("leftmost", "rightmost")
    assert "templated" in GROUNDING_BENCHMARKS["daquar-grounding"].title


def test_daquar_is_split_by_room(miniature):
    """Below 20 test, below 30 val: the SHA-256 of "image111.jpg", modulo 100, is 20."""
    folder = miniature("daquar-grounding")
    for split, numbers in ROOMS.items():
        examples = read("daquar-grounding", split, folder)
        assert [one.image_id for one in examples] == [f"image{number}" for number in numbers]
    # "image115.jpg" alone would be one to train on.
    path = folder / "grounding_nyu13.json"
    content = path.read_text()
    for number, split in ((115, "val"), (116, "test")):
        path.write_text(content.replace("image113.jpg", f"image{number}.jpg"))
        assert f"image{number}" in [one.image_id for one in read("daquar-grounding", split, folder)]


def test_daquar_with_the_png_files_of_the_release(miniature):
    folder = miniature("daquar-grounding")
    usual = read("daquar-grounding", "test", folder)
    for path in (folder / "images").iterdir():
        with Image.open(path) as image:
            image.resize((56, 42)).save(path.with_suffix(".png"))
        path.unlink()
    examples = read("daquar-grounding", "test", folder)
    assert without_images(examples) == without_images(usual)
    assert check_images(examples) == (examples, [])
