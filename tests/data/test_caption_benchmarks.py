"""Each benchmark from a miniature of its official files, and from a folder laid out as its copy on the Hub."""

import csv
import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from caption_miniatures import captions_of, make_caption_miniature, make_karpathy
from hivilt.data.caption_benchmarks import CAPTION_BENCHMARKS
from hivilt.data.captions import KARPATHY_SPLITS, CaptionedImage, read_karpathy, read_openmoji
from hivilt.data.tables import TableImage, check_images, open_image

NAMES = ["openmoji", "flickr30k", "coco", "flickr8k", "textcaps", "vizwiz-captions"]


@pytest.fixture
def miniature(tmp_path):
    """Writes the official files of a benchmark and gives their folder."""

    def make(name):
        make_caption_miniature(name, tmp_path / name)
        return tmp_path / name

    return make


def read_splits(name, **source):
    """What "train", "validation" and "test" are by default."""
    benchmark = CAPTION_BENCHMARKS[name]
    return {split: benchmark.read(official, **source) for split, official in benchmark.splits.items()}


def karpathy_images(folder, image_dir="."):
    """What a Karpathy file says of its images, with their paths."""
    (path,) = folder.glob("dataset_*.json")
    images = json.loads(path.read_text())["images"]
    return [{**one, "image": str(folder / image_dir / one.get("filepath", "") / one["filename"])} for one in images]


def without_images(examples):
    return [(one.image_id, one.captions) for one in examples]


def assert_same_images(table, files):
    assert len(table) == len(files)
    for stored, file in zip(table, files, strict=True):
        assert isinstance(stored.image, TableImage)
        assert open_image(stored.image).tobytes() == open_image(file.image).tobytes()


# All of them


@pytest.mark.parametrize("name", NAMES)
def test_official_files(miniature, name):
    splits = read_splits(name, data_dir=miniature(name))
    sizes = {split: len(examples) for split, examples in splits.items()}
    assert sizes == {"train": 10 if name == "coco" else 8, "validation": 4, "test": 4} or (
        sizes == {"train": 8, "test": 4} and "validation" not in CAPTION_BENCHMARKS[name].splits
    )
    ids = [one.image_id for examples in splits.values() for one in examples]
    assert len(set(ids)) == len(ids)
    for examples in splits.values():
        assert check_images(examples, "skip") == (examples, [])
        if name != "openmoji":
            # Repeated captions count.
            assert {len(one.captions) for one in examples} == {5}
            assert [len(set(one.captions)) for one in examples[:4]] == [4, 5, 5, 5]


@pytest.mark.parametrize("name", NAMES)
def test_images_may_lie_elsewhere(miniature, tmp_path, name):
    folder, elsewhere = miniature(name), tmp_path / "elsewhere"
    usual = CAPTION_BENCHMARKS[name].read("test", data_dir=folder)
    images = {"flickr30k": "flickr30k-images", "flickr8k": "Flicker8k_Dataset", "textcaps": "test_images"}
    images = (images | {"vizwiz-captions": "test"}).get(name, ".")
    (folder / images).resolve().rename(elsewhere)
    folder.mkdir(exist_ok=True)
    if name == "coco":
        (elsewhere / "dataset_coco.json").rename(folder / "dataset_coco.json")
    read = CAPTION_BENCHMARKS[name].read("test", data_dir=folder, image_dir=elsewhere)
    assert without_images(read) == without_images(usual)
    check_images(read)
    assert all(one.image.startswith(str(elsewhere)) for one in read)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_the_files_is_named(tmp_path, name):
    expected = {
        "openmoji": "has no drawing of the 'test' split of OpenMoji, expected PNG files such as 1F600.png",
        "flickr8k": "lacks dataset_flickr8k.json or Flickr8k.token.txt or captions.txt",
        "textcaps": "lacks TextCaps_0.1_test.json",
        "vizwiz-captions": "lacks annotations/test.json or test.json",
    }
    message = expected.get(name, f"lacks dataset_{name}.json")
    with pytest.raises(FileNotFoundError, match=f"data_dir: {tmp_path} {message}"):
        CAPTION_BENCHMARKS[name].read("test", data_dir=tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_other_splits_are_refused(miniature, name):
    official = ", ".join(map(repr, CAPTION_BENCHMARKS[name].official_splits))
    with pytest.raises(ValueError, match=f"has the official splits {official}, got 'dev'"):
        CAPTION_BENCHMARKS[name].read("dev", data_dir=miniature(name))


# OpenMoji


def test_openmoji_in_full(tmp_path):
    folder = tmp_path / "openmoji-72x72-color"
    folder.mkdir()
    for name in ("2639", "263A-FE0F", "not-an-emoji"):
        Image.new("RGBA", (72, 72)).save(folder / f"{name}.png")
    # The names of files have the request for colour or not; emoji that are not drawn are left out.
    read = CAPTION_BENCHMARKS["openmoji"].read("test", data_dir=tmp_path)
    assert read == [
        CaptionedImage("2639", str(folder / "2639.png"), ("frowning face", "white frowning face")),
        CaptionedImage("263A-FE0F", str(folder / "263A-FE0F.png"), ("smiling face", "relaxed")),
    ]
    assert open_image(read[0].image).getpixel((0, 0)) == (255, 255, 255)
    assert CAPTION_BENCHMARKS["openmoji"].read("test", data_dir=folder) == read


def test_openmoji_release_and_package_agree(miniature, monkeypatch):
    monkeypatch.setattr("hivilt.data.captions.rasterize", lambda drawings, folder, size: None)
    for split, examples in read_splits("openmoji", data_dir=miniature("openmoji")).items():
        packaged = CAPTION_BENCHMARKS["openmoji"].read(split)
        assert packaged == read_openmoji(split)
        assert set(without_images(examples)) < set(without_images(packaged))
        assert [one.image_id for one in examples] == sorted(one.image_id for one in examples)


# Flickr30k


def flickr30k_rows(folder, split):
    return [
        {
            "image": one["image"],
            "caption": [sentence["raw"] for sentence in one["sentences"]],
            "sentids": list(map(str, one["sentids"])),
            "split": one["split"],
            "img_id": str(one["imgid"]),
            "filename": one["filename"],
        }
        for one in karpathy_images(folder, "flickr30k-images")
        if split in (None, one["split"])
    ]


def test_flickr30k_in_full(miniature):
    folder = miniature("flickr30k")
    (first, *_) = CAPTION_BENCHMARKS["flickr30k"].read("val", data_dir=folder)
    assert first == CaptionedImage(
        image_id="8",
        image=str(folder / "flickr30k-images/1000092803.jpg"),
        captions=(
            "This square is red, not green.",
            "The image is red and has a dark corner.",
            "Number 8 is red.",
            "There is no green in the red image.",
            "This square is red, not green.",
        ),
    )
    for split, examples in read_splits("flickr30k", data_dir=folder).items():
        assert examples == read_karpathy(folder / "dataset_flickr30k.json", split, folder / "flickr30k-images")


@pytest.mark.parametrize("images", ["flickr30k_images", "."])
def test_flickr30k_images_in_other_folders(tmp_path, images):
    make_karpathy(tmp_path, "dataset_flickr30k.json", images)
    check_images(CAPTION_BENCHMARKS["flickr30k"].read("test", data_dir=tmp_path))


def test_flickr30k_on_the_hub(miniature, hub):
    # umaru97/flickr30k_train_val_test
    folder = miniature("flickr30k")
    for split in ("train", "val", "test"):
        name = hub(split, flickr30k_rows(folder, split))
    files = read_splits("flickr30k", data_dir=folder)
    for split, examples in read_splits("flickr30k", dataset_name=name).items():
        assert without_images(examples) == without_images(files[split])
        assert_same_images(examples, files[split])


def test_flickr30k_with_all_splits_in_one_table(miniature, hub):
    # nlphuji/flickr30k
    folder = miniature("flickr30k")
    name = hub("test", flickr30k_rows(folder, None))
    Path(name, "README.md").write_text(
        "---\nconfigs:\n- config_name: TEST\n  data_files:\n  - split: test\n    path: data/test-*\n---\n"
    )
    files = read_splits("flickr30k", data_dir=folder)
    for split, examples in read_splits("flickr30k", dataset_name=name).items():
        assert without_images(examples) == without_images(files[split])


def test_flickr30k_without_its_splits_is_refused(miniature, hub):
    # lmms-lab/flickr30k calls everything "test", and does not say which images are.
    rows = flickr30k_rows(miniature("flickr30k"), None)
    name = hub("test", [{key: row[key] for key in row if key != "split"} for row in rows])
    with pytest.raises(ValueError, match="expected columns 'split', it has 'image', 'caption', 'sentids', 'img_id'"):
        CAPTION_BENCHMARKS["flickr30k"].read("test", dataset_name=name)


def test_a_caption_that_is_missing_is_named(miniature, hub):
    rows = flickr30k_rows(miniature("flickr30k"), "test")
    rows[2]["caption"][3] = " "
    name = hub("test", rows)
    with pytest.raises(ValueError, match=f"{name}, test, row 3, column 'caption': the caption is empty"):
        CAPTION_BENCHMARKS["flickr30k"].read("test", dataset_name=name)
    with pytest.raises(ValueError, match="no copy on the Hub could be read.*\n.*val: Unknown split"):
        CAPTION_BENCHMARKS["flickr30k"].read("val", dataset_name=name)


# MS-COCO


def test_coco_in_full(miniature):
    folder = miniature("coco")
    benchmark = CAPTION_BENCHMARKS["coco"]
    (first, _) = benchmark.read("restval", data_dir=folder)
    assert first == CaptionedImage(
        image_id="265",
        image=str(folder / "val2014/COCO_val2014_000000000265.jpg"),
        captions=(
            "This square is red, not white.",
            "The image is red and has a dark corner.",
            "Number 16 is red.",
            "There is no white in the red image.",
            "This square is red, not white.",
        ),
    )
    assert len(benchmark.read("train", data_dir=folder)) == 8
    for split, examples in read_splits("coco", data_dir=folder).items():
        assert sorted(examples) == sorted(read_karpathy(folder / "dataset_coco.json", split))


def test_coco_on_the_hub(miniature, hub):
    # bitmind/MS-COCO: one row a caption, `sentences` is one of Karpathy's, restval is in train
    folder = miniature("coco")
    rows = [{**one, "sentences": sentence} for one in karpathy_images(folder) for sentence in one["sentences"]]
    for split, official in KARPATHY_SPLITS.items():
        name = hub(split, [row for row in rows if row["split"] in official])
    files = read_splits("coco", data_dir=folder)
    for split, examples in read_splits("coco", dataset_name=name).items():
        assert without_images(examples) == without_images(files[split])
        assert_same_images(examples, files[split])
    with pytest.raises(
        ValueError, match="MS-COCO has the official splits 'train', 'restval', 'val', 'test', got 'dev'"
    ):
        CAPTION_BENCHMARKS["coco"].read("dev", dataset_name=name)


def test_a_split_that_a_karpathy_file_lacks_is_named(miniature):
    folder = miniature("coco")
    content = json.loads((folder / "dataset_coco.json").read_text())
    content["images"] = [one for one in content["images"] if one["split"] != "restval"]
    (folder / "dataset_coco.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="dataset_coco.json has no 'restval'; its splits are 'train', 'val', 'test'"):
        CAPTION_BENCHMARKS["coco"].read("train+restval", data_dir=folder)
    (folder / "dataset_coco.json").write_text("{")
    with pytest.raises(ValueError, match="dataset_coco.json: is not JSON"):
        CAPTION_BENCHMARKS["coco"].read("test", data_dir=folder)


# TextCaps and VizWiz-Captions


def test_textcaps_in_full(miniature):
    folder, benchmark = miniature("textcaps"), CAPTION_BENCHMARKS["textcaps"]
    (first, *_) = benchmark.read("val", data_dir=folder)
    assert first == CaptionedImage(
        image_id="000000000024c2b0",
        image=str(folder / "train_images/000000000024c2b0.jpg"),
        captions=(
            "This square is red, not green.",
            "The image is red and has a dark corner.",
            "Number 8 is red.",
            "There is no green in the red image.",
            "This square is red, not green.",
        ),
    )
    (hidden, *_) = benchmark.read("test", data_dir=folder)
    assert hidden == CaptionedImage("000000000024c2b4", str(folder / "test_images/000000000024c2b4.jpg"), ())


def test_vizwiz_captions_in_full(miniature):
    """Without the captions that were rejected or say that nothing can be seen, and images that have no others."""
    folder, benchmark = miniature("vizwiz-captions"), CAPTION_BENCHMARKS["vizwiz-captions"]
    (first, *_) = benchmark.read("val", data_dir=folder)
    assert first == CaptionedImage(
        image_id="23439",
        image=str(folder / "val/VizWiz_val_00000000.jpg"),
        captions=(
            "This square is red, not green.",
            "The image is red and has a dark corner.",
            "Number 8 is red.",
            "There is no green in the red image.",
            "This square is red, not green.",
        ),
    )
    assert "99" not in [one.image_id for one in benchmark.read("train", data_dir=folder)]
    (hidden, *_) = benchmark.read("test", data_dir=folder)
    assert hidden == CaptionedImage("23443", str(folder / "test/VizWiz_test_00000000.jpg"), ())
    # The annotations beside the images, as some unpack them.
    for path in (folder / "annotations").iterdir():
        path.rename(folder / path.name)
    assert benchmark.read("val", data_dir=folder)[0] == first


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize(("name", "column"), [("textcaps", "reference_strs"), ("vizwiz-captions", "caption")])
def test_textcaps_and_vizwiz_captions_on_the_hub(miniature, hub, name, column, split):
    # lmms-lab/TextCaps and lmms-lab/VizWiz-Caps
    benchmark = CAPTION_BENCHMARKS[name]
    files = benchmark.read(split, data_dir=miniature(name))
    rows = [{"image": one.image, "image_id": one.image_id, column: list(one.captions)} for one in files]
    read = benchmark.read(split, dataset_name=hub(split, rows))
    assert without_images(read) == without_images(files)
    assert_same_images(read, files)


def test_captions_that_are_public_must_be_there(miniature):
    folder = miniature("textcaps")
    path = folder / "TextCaps_0.1_val.json"
    content = json.loads(path.read_text())
    for row in content["data"][:5]:
        del row["caption_str"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="row 1: 'captions' is empty or missing; splits without.* are 'test'"):
        CAPTION_BENCHMARKS["textcaps"].read("val", data_dir=folder)


# Flickr8k


def test_flickr8k_in_full(miniature):
    folder = miniature("flickr8k")
    (first, *_) = CAPTION_BENCHMARKS["flickr8k"].read("val", data_dir=folder)
    assert first == CaptionedImage(
        image_id="1000268209_0000000008.jpg",
        image=str(folder / "Flicker8k_Dataset/1000268209_0000000008.jpg"),
        captions=(
            "This square is red, not green.",
            "The image is red and has a dark corner.",
            "Number 8 is red.",
            "There is no green in the red image.",
            "This square is red, not green.",
        ),
    )


def test_flickr8k_of_karpathy(miniature, tmp_path):
    lists = read_splits("flickr8k", data_dir=miniature("flickr8k"))
    make_karpathy(tmp_path / "flickr8k", "dataset_flickr8k.json", "Images")
    # The JSON file goes first.
    (tmp_path / "flickr8k/Flicker8k_Dataset").rename(tmp_path / "away")
    read = read_splits("flickr8k", data_dir=tmp_path / "flickr8k")
    for split, examples in read.items():
        assert [one.captions for one in examples] == [one.captions for one in lists[split]]
        check_images(examples)
    assert read["train"][0].image_id == "1000092795.jpg"


def test_flickr8k_on_the_hub(miniature, hub):
    # jxie/flickr8k knows neither names nor ids
    files = read_splits("flickr8k", data_dir=miniature("flickr8k"))
    for split, examples in files.items():
        # The same image twice, as two with their own captions.
        examples.append(examples[0]._replace(captions=tuple(captions_of(30, False))))
        captions = [{f"caption_{n}": text for n, text in enumerate(one.captions)} for one in examples]
        rows = [{"image": one.image, **row} for one, row in zip(examples, captions, strict=True)]
        name = hub(split, rows)
    for split, examples in read_splits("flickr8k", dataset_name=name).items():
        assert [one.captions for one in examples] == [one.captions for one in files[split]]
        assert_same_images(examples, files[split])
        assert len({one.image_id for one in examples}) == len(examples) - 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("#1\t", "#1 ", "Flickr8k.token.txt, line 2: expected 'name.jpg#0', a tab, a caption, got '1000268201"),
        ("1000268202_0000000001.jpg#4", "x.jpg#4", "expected 5 captions of 1000268202_0000000001.jpg, got 4"),
        ("Number 0 is red.", "", "Flickr8k, train, row 1, column 'caption_2': the caption is empty"),
    ],
)
def test_flickr8k_errors(miniature, old, new, message):
    folder = miniature("flickr8k")
    path = folder / "Flickr8k.token.txt"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        CAPTION_BENCHMARKS["flickr8k"].read("train", data_dir=folder)
    (folder / "Flickr_8k.devImages.txt").unlink()
    with pytest.raises(FileNotFoundError, match="lacks Flickr_8k.devImages.txt"):
        CAPTION_BENCHMARKS["flickr8k"].read("val", data_dir=folder)


def as_kaggle(folder, lists):
    """The same captions as `captions.txt`, and the images in `Images`; with the official lists beside them, or not."""
    rows = [line.split("\t") for line in (folder / "Flickr8k.token.txt").read_text().splitlines()]
    rows = [(name.split("#")[0], caption) for name, caption in rows if not name.startswith("2258277193")]
    with open(folder / "captions.txt", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("image", "caption"), *rows])
    (folder / "Flickr8k.token.txt").unlink()
    (folder / "Flicker8k_Dataset").rename(folder / "Images")
    for path in folder.glob("Flickr_8k.*Images.txt"):
        if not lists:
            path.unlink()
    return folder


def test_flickr8k_of_kaggle_takes_the_official_lists_beside_it(miniature, caplog):
    folder = miniature("flickr8k")
    official = read_splits("flickr8k", data_dir=folder)
    as_kaggle(folder, lists=True)
    assert '"This square is red, not blue."' in (folder / "captions.txt").read_text()
    for split, examples in read_splits("flickr8k", data_dir=folder).items():
        assert without_images(examples) == without_images(official[split])
        assert check_images(examples) == (examples, [])
        assert {Path(one.image).parent.name for one in examples} == {"Images"}
    assert not caplog.records


def test_flickr8k_of_kaggle_without_lists_is_split_by_image_and_says_so(miniature, caplog):
    folder = as_kaggle(miniature("flickr8k"), lists=False)
    with caplog.at_level(logging.WARNING):
        splits = read_splits("flickr8k", data_dir=folder)
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 12, "validation": 2, "test": 2}
    ids = [one.image_id for examples in splits.values() for one in examples]
    assert sorted(ids) == sorted(path.name for path in (folder / "Images").iterdir())
    assert {len(one.captions) for examples in splits.values() for one in examples} == {5}
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(":")[0] for text in said] == ["Flickr8k, train", "Flickr8k, val", "Flickr8k, test"]
    assert all(
        "has no official split" in text and "12 to train on, 2 to choose and 2 to test with" in text for text in said
    )
    assert all(
        "put Flickr_8k.trainImages.txt, Flickr_8k.devImages.txt, Flickr_8k.testImages.txt" in text for text in said
    )

    # The order of the rows does not matter.
    header, *rows = (folder / "captions.txt").read_text().splitlines()
    (folder / "captions.txt").write_text("\n".join([header, *rows[::-1]]))
    again = read_splits("flickr8k", data_dir=folder)
    for split, examples in splits.items():
        assert [one.image_id for one in again[split]] == [one.image_id for one in examples]


def test_flickr8k_of_kaggle_reads_commas_quotes_and_line_breaks_as_written(miniature):
    folder = as_kaggle(miniature("flickr8k"), lists=True)
    content = (folder / "captions.txt").read_text()
    old = '"This square is red, not blue."'
    assert content.index(old) < content.index("1000268202")
    for new, caption in [
        ('"A sign says ""STOP, now"" , in red ."', 'A sign says "STOP, now" , in red .'),
        ('A man and a "dog" ?', 'A man and a "dog" ?'),
        ('"""Hello"" , he says"', '"Hello" , he says'),
    ]:
        (folder / "captions.txt").write_text(content.replace(old, new, 1))
        (first, *_) = CAPTION_BENCHMARKS["flickr8k"].read("train", data_dir=folder)
        assert first.captions[0] == caption


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "image,caption",
            "image_name,comment",
            r"Flickr8k, train, is not laid out as expected \(KeyError\('image'\)\)",
        ),
        (
            "1000268202_0000000001.jpg,",
            "x.jpg,",
            "captions.txt: expected 5 captions of 1000268202_0000000001.jpg, got 4",
        ),
        (
            '"This square is red, not blue."',
            "This square, red",
            "captions.txt, line 2: has 3 cells, but the header names 2",
        ),
    ],
)
def test_flickr8k_of_kaggle_errors(miniature, old, new, message):
    folder = as_kaggle(miniature("flickr8k"), lists=True)
    content = (folder / "captions.txt").read_text()
    assert old in content
    (folder / "captions.txt").write_text(content.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        CAPTION_BENCHMARKS["flickr8k"].read("train", data_dir=folder)


def test_flickr8k_of_kaggle_with_some_lists_wants_the_one_of_the_split(miniature):
    folder = as_kaggle(miniature("flickr8k"), lists=True)
    (folder / "Flickr_8k.devImages.txt").unlink()
    assert len(CAPTION_BENCHMARKS["flickr8k"].read("test", data_dir=folder)) == 4
    with pytest.raises(FileNotFoundError, match="lacks Flickr_8k.devImages.txt"):
        CAPTION_BENCHMARKS["flickr8k"].read("val", data_dir=folder)


@pytest.mark.parametrize(
    "place",
    [
        *("images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "."),
        *("Flicker8k_Dataset/Flicker8k_Dataset", "Flickr8k_Dataset/Flicker8k_Dataset", "archive/Images"),
    ],
)
def test_flickr8k_as_people_unpack_it(miniature, tmp_path, place):
    folder, images = miniature("flickr8k"), tmp_path / "images"
    official = read_splits("flickr8k", data_dir=folder)
    (folder / "Flicker8k_Dataset").rename(images)
    (folder / "Flickr8k_text").mkdir()
    for path in folder.glob("*.txt"):
        path.rename(folder / "Flickr8k_text" / path.name)
    (folder / place).mkdir(parents=True, exist_ok=True)
    for path in images.iterdir():
        path.rename(folder / place / path.name)
    for split, examples in read_splits("flickr8k", data_dir=folder).items():
        assert without_images(examples) == without_images(official[split])
        assert check_images(examples) == (examples, [])
    # A folder of its own for the images is looked through in the same way.
    texts = folder.rename(tmp_path / "texts")
    assert check_images(CAPTION_BENCHMARKS["flickr8k"].read("test", data_dir=texts, image_dir=texts))[1] == []
