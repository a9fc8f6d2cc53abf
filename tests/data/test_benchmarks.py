"""The frame of named benchmarks: official files, or a copy on the Hub, for which folders of Parquet files stand."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from hivilt.data.benchmarks import Benchmark, HubTable, find_file, find_folder, read_json
from hivilt.data.tables import TableImage, open_image
from miniatures import write_hub_copy
from tiny import make_image


class Record(NamedTuple):
    image_id: str
    image: str | TableImage
    text: str | None
    values: dict


def read_folder(folder, split, image_dir):
    rows = read_json(find_file(folder, f"{split}.json"))["rows"]
    return [{**row, "image": str((image_dir or folder) / row["image"])} for row in rows]


def make_benchmark(**more):
    settings = {
        "title": "Toy",
        "splits": {"train": "train+extra", "test": "test"},
        "read_folder": read_folder,
        "read_rows": lambda rows: [Record(r.image_id, r.image, r.values.get("text"), dict(r.values)) for r in rows],
        "columns": ("image", "number"),
        "image_id_column": "id",
        "answer_column": "text",
        "hidden": ("test",),
    }
    return Benchmark(**(settings | more))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """Official files."""
    for split, texts in {"train": ["a", "b"], "extra": ["c"], "test": [None]}.items():
        rows = [{"image": f"{split}{n}.png", "id": n, "number": n, "text": text} for n, text in enumerate(texts)]
        (tmp_path / f"{split}.json").write_text(json.dumps({"rows": rows}))
    return tmp_path


def hub_rows(**columns):
    """Two rows with images, red and blue; a column is given by its two values."""
    return [
        {"image": make_image(color), **{name: values[place] for name, values in columns.items()}}
        for place, color in enumerate(("red", "blue"))
    ]


def color_of(record):
    return open_image(record.image).getpixel((30, 22))


# Official files


def test_official_files(folder):
    (first, second) = make_benchmark().read("train", folder)
    assert first == Record("0", str(folder / "train0.png"), "a", first.values)
    assert second.text == "b"
    assert make_benchmark().read("test", str(folder))[0].text is None
    assert make_benchmark().read("train", folder, Path("elsewhere"))[0].image == "elsewhere/train0.png"


def test_splits_join(folder):
    assert [one.text for one in make_benchmark().read("train+extra", folder)] == ["a", "b", "c"]


@pytest.mark.parametrize("split", ["validation", "train+dev", ""])
def test_an_unknown_split_is_told_the_official_ones(folder, split):
    with pytest.raises(ValueError, match=r"Toy has the official splits 'train', 'extra', 'test', got '"):
        make_benchmark().read(split, folder)


def test_other_official_splits_count_too():
    benchmark = make_benchmark(hidden=("test", "challenge"), hub={"dev": []})
    assert benchmark.official_splits == ["train", "extra", "test", "challenge", "dev"]


def test_a_missing_answer_is_an_error_unless_answers_are_hidden(folder):
    (folder / "extra.json").write_text((folder / "test.json").read_text())
    with pytest.raises(ValueError, match=r"Toy, extra, row 1: 'text' is empty.*'test'"):
        make_benchmark().read("train+extra", folder)
    assert make_benchmark(answer_column=None).read("extra", folder)[0].text is None


@pytest.mark.parametrize("content", ['{"questions": []}', "[1]", '{"rows": [{"photo": "a.png"}]}', '{"rows": 3}'])
def test_other_content_in_an_official_file(folder, content):
    (folder / "train.json").write_text(content)
    with pytest.raises(ValueError, match=r"data_dir: an official file of Toy, train, is not laid out as expected"):
        make_benchmark().read("train", folder)


def test_an_empty_official_file(folder):
    (folder / "train.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="Toy, train: has no rows"):
        make_benchmark().read("train", folder)


def test_files_are_found_in_the_folder_or_one_below(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "b.json").write_text('{"x": 1}')
    assert find_file(tmp_path, "a.json", "b.json") == tmp_path / "below" / "b.json"
    (tmp_path / "b.json").write_text("{")
    assert find_file(tmp_path, "a.json", "b.json") == tmp_path / "b.json"
    with pytest.raises(ValueError, match=r"b\.json: is not JSON"):
        read_json(tmp_path / "b.json")
    with pytest.raises(FileNotFoundError, match=r"data_dir: .* lacks a\.json or below; is it"):
        find_file(tmp_path, "a.json", "below")


def test_folders_are_found_in_the_folder_or_one_below(tmp_path):
    assert find_folder(tmp_path, "images", "photos") == tmp_path / "images"
    (tmp_path / "below" / "photos").mkdir(parents=True)
    assert find_folder(tmp_path, "images", "photos") == tmp_path / "below" / "photos"
    (tmp_path / "below" / "images").mkdir()
    assert find_folder(tmp_path, "images", "photos") == tmp_path / "below" / "images"


def test_of_folders_unpacked_into_each_other_the_one_with_images_is_found(tmp_path):
    # zips of macOS bring `__MACOSX/images/._a.jpg`, and sort before names in lower case.
    for folder in ("__MACOSX/images", "images/images", "below/photos"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "__MACOSX/images/._a.jpg").touch()
    assert find_folder(tmp_path, "images", "photos") == tmp_path / "images"
    (tmp_path / "below/photos/a.JPG").touch()
    assert find_folder(tmp_path, "images", "photos") == tmp_path / "below/photos"
    (tmp_path / "images/images/a.png").touch()
    assert find_folder(tmp_path, "images", "photos") == tmp_path / "images/images"
    assert find_folder(tmp_path, "nowhere", ".") == tmp_path


def test_json_objects_can_be_shortened_as_they_are_read(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": {"b": 1}}, {"c": 2}]')
    assert read_json(tmp_path / "a.json", lambda one: one.get("b", one)) == [{"a": 1}, {"c": 2}]


# Packages


def test_a_package_is_read_unless_a_place_is_named(folder):
    benchmark = make_benchmark(read_package=lambda split: [f"packaged {split}"])
    assert benchmark.read("train+test") == ["packaged train", "packaged test"]
    assert benchmark.read("train", folder)[0].text == "a"
    with pytest.raises(ValueError, match="no copy on the Hub"):
        benchmark.read("train", dataset_name=str(folder / "none"))


# The Hub


def test_columns_and_splits_go_by_the_names_of_the_copy(tmp_path):
    rows = hub_rows(number=[1, 2], key=["x", "y"], caption=["a", "b"], text=["model's", "own"], big=[[0] * 9] * 2)
    write_hub_copy(tmp_path / "copy", {"dev": rows})
    table = HubTable(str(tmp_path / "copy"), "dev", columns={"id": "key", "text": "caption"})
    benchmark = make_benchmark(hub={"train": [table]}, other_columns=("kind",))
    first, second = benchmark.read("train")
    assert (first.image_id, first.text, color_of(second)) == ("x", "a", (0, 0, 255))
    assert set(first.values) == {"id", "number", "text"}


def test_images_of_a_copy_without_ids_are_told_apart_by_their_bytes(tmp_path):
    write_hub_copy(tmp_path / "copy", {"train": 2 * hub_rows(number=[1, 2], text=["a", "b"])})
    table = HubTable(str(tmp_path / "copy"), "train", columns={"id": None})
    ids = [one.image_id for one in make_benchmark(hub={"train": [table]}).read("train")]
    assert ids[:2] == ids[2:] and ids[0] != ids[1]


def test_copies_are_tried_in_order(tmp_path, caplog):
    write_hub_copy(tmp_path / "odd", {"train": hub_rows(number=[1, 2], label=["a", "b"])})
    write_hub_copy(tmp_path / "good", {"train": hub_rows(number=[1, 2], id=[1, 2], text=["a", "b"])})
    write_hub_copy(tmp_path / "late", {"train": hub_rows(number=[1, 2], id=[1, 2], text=["never", "read"])})
    names = ("gone", "odd", "good", "late")
    benchmark = make_benchmark(hub={"train": [HubTable(str(tmp_path / name), "train") for name in names]})
    assert [one.text for one in benchmark.read("train")] == ["a", "b"]
    assert [Path(line.split("cannot read ")[1].split(", train:")[0]).name for line in caplog.messages] == [
        "gone",
        "odd",
    ]


def test_all_copies_are_named_if_none_can_be_read(tmp_path):
    write_hub_copy(tmp_path / "odd", {"train": hub_rows(number=[1, 2], label=["a", "b"])})
    tables = [
        HubTable("nobody/nothing", "train"),
        HubTable(str(tmp_path / "odd"), "validation"),
        HubTable(str(tmp_path / "odd"), "train", columns={"id": "image_id"}),
        HubTable(str(tmp_path / "odd"), "train", where=("split", "train")),
        HubTable(str(tmp_path / "odd"), "train", config="small"),
    ]
    with pytest.raises(ValueError) as error:
        make_benchmark(hub={"train": tables}).read("train")
    lines = str(error.value).splitlines()
    assert lines[0] == "Toy, train: no copy on the Hub could be read."
    assert lines[1].startswith("- nobody/nothing, train: ")
    assert "validation" in lines[2]
    assert "expected columns 'image_id', 'text', it has 'image', 'number', 'label'" in lines[3]
    assert "expected columns 'split', it has" in lines[4]
    assert "odd, small, train: " in lines[5] and "small" in lines[5]
    assert "--dataset_name" in lines[-1] and "--data_dir" in lines[-1]


def test_a_broken_copy_is_passed_over(tmp_path):
    write_hub_copy(tmp_path / "good", {"train": hub_rows(number=[1, 2], id=[1, 2], text=["a", "b"])})
    write_hub_copy(tmp_path / "broken", {"train": hub_rows(number=[1, 2], id=[1, 2], text=["never", "read"])})
    (tmp_path / "broken" / "data" / "validation-00000-of-00001.parquet").write_text("not Parquet")
    tables = [HubTable(str(tmp_path / name), "train") for name in ("broken", "good")]
    assert [one.text for one in make_benchmark(hub={"train": tables}).read("train")] == ["a", "b"]


def test_hidden_answers_may_be_absent_from_a_copy(tmp_path):
    write_hub_copy(tmp_path / "copy", {"test": hub_rows(number=[1, 2], id=[1, 2])})
    benchmark = make_benchmark(hub={"test": [HubTable(str(tmp_path / "copy"), "test")]})
    assert [one.text for one in benchmark.read("test")] == [None, None]


def test_a_split_within_a_table(tmp_path):
    write_hub_copy(tmp_path / "copy", {"whole": hub_rows(number=[1, 2], id=[1, 2], text=["a", "b"], part=["x", "y"])})
    table = HubTable(str(tmp_path / "copy"), "whole", where=("part", "y"))
    (only,) = make_benchmark(hub={"train": [table]}).read("train")
    assert only.text == "b" and color_of(only) == (0, 0, 255)


def test_a_part_that_a_table_does_not_have(tmp_path):
    write_hub_copy(tmp_path / "copy", {"whole": hub_rows(id=[1, 2], number=[3, 4], text=["a", "b"], part=["x", "y"])})
    table = HubTable(str(tmp_path / "copy"), "whole", where=("part", "restval"))
    with pytest.raises(ValueError, match="no row has 'restval' in column 'part', there are 'x', 'y'"):
        make_benchmark(hub={"train": [table]}).read("train")


def test_another_copy_is_read_like_the_known_ones_or_with_our_columns(tmp_path):
    write_hub_copy(tmp_path / "alike", {"dev": hub_rows(number=[1, 2], key=[1, 2], text=["a", "b"])})
    write_hub_copy(tmp_path / "plain", {"train": hub_rows(number=[1, 2], text=["c", "d"])})
    known = [HubTable("known/one", "dev", columns={"id": "key"}), HubTable("known/two", "dev", columns={"id": "key"})]
    benchmark = make_benchmark(hub={"train": known})
    assert [one.image_id for one in benchmark.read("train", dataset_name=str(tmp_path / "alike"))] == ["1", "2"]
    assert benchmark.read("train", dataset_name=str(tmp_path / "plain"))[1].text == "d"
    with pytest.raises(ValueError) as error:
        benchmark.read("train", dataset_name="my/own")
    # The two known ones are laid out alike, so that is tried once.
    assert str(error.value).count("- my/own") == 2
    with pytest.raises(ValueError) as error:
        benchmark.read("train", dataset_name="known/two")
    assert str(error.value).count("\n- ") == 1


def test_a_config_can_be_named(tmp_path):
    tables = {f"{name}/train": hub_rows(number=[1, 2], id=[1, 2], text=[name, name]) for name in ("small", "large")}
    write_hub_copy(tmp_path / "copy", tables)
    benchmark = make_benchmark(hub={"train": [HubTable(str(tmp_path / "copy"), "train", "large")]})
    assert benchmark.read("train")[0].text == "large"
    assert benchmark.read("train", dataset_config_name="small")[0].text == "small"


def test_a_split_without_a_copy_says_which_have_one():
    benchmark = make_benchmark(hub={"extra": [HubTable("known/one", "extra")]})
    with pytest.raises(ValueError, match=r"Toy has no 'train' split with images on the Hub.*'extra'.*--data_dir"):
        benchmark.read("train")


def test_images_in_a_config_of_their_own(tmp_path):
    texts = [{"number": n, "id": name, "text": name} for n, name in enumerate("yxy")]
    images = [{"id": name, "image": make_image(color)} for name, color in (("x", "red"), ("y", "blue"))]
    write_hub_copy(tmp_path / "copy", {"texts/train": texts, "images/train": images})
    table = HubTable(str(tmp_path / "copy"), "train", "texts", images_config="images")
    examples = make_benchmark(hub={"train": [table]}).read("train")
    assert [one.image_id for one in examples] == ["y", "x", "y"]
    assert [color_of(one) for one in examples] == [(0, 0, 255), (255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([{"id": "x", "image": "red"}], "images lacks 2 images, 'y' first"),
        ([{"name": "x", "image": "red"}], "expected columns 'id', 'image', it has 'name', 'image'"),
    ],
)
def test_a_config_of_images_that_does_not_fit(tmp_path, images, message):
    texts = [{"number": n, "id": name, "text": name} for n, name in enumerate("yxy")]
    images = [one | {"image": make_image(one["image"])} for one in images]
    write_hub_copy(tmp_path / "copy", {"texts/train": texts, "images/train": images})
    table = HubTable(str(tmp_path / "copy"), "train", "texts", images_config="images")
    with pytest.raises(ValueError, match=message):
        make_benchmark(hub={"train": [table]}).read("train")
