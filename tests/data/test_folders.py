"""Folders whose splits `datasets` finds, with cells as they are written."""

import csv
import json

import datasets
import pytest

from hivilt.data.folders import read_folder
from hivilt.data.vqa import Columns, read_table
from tiny import make_image

# What pandas and Arrow make something else of.
CELLS = ["None", "n/a", "NA", "null", "nan", "007", "1.50", "TRUE", "2026-11-28", "1e3", "-", "red"]


@pytest.fixture
def folder(tmp_path):
    """An image in the folder of each split."""
    for split in ("train", "test"):
        (tmp_path / split / "below").mkdir(parents=True)
        make_image("red").save(tmp_path / split / "a.png")
        make_image("blue").save(tmp_path / split / "below" / "b.png")
    return tmp_path


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\ufeff" + "\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=";" if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    return path


def examples(found):
    return read_table(found[0], source="toy", folder=found[1])


def test_a_folder_of_images_may_be_named_from_where_one_is(folder, monkeypatch):
    write(folder / "train" / "metadata.csv", [{"file_name": "a.png", "question": "q", "answer": "red"}])
    monkeypatch.chdir(folder)
    for name in ("train", "./train", "test/../train"):
        (one,) = examples(read_folder(None, data_dir=name)["train"])
        assert (one.image_id, one.answers) == ("a.png", ("red",))


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_cells_of_an_image_folder_are_read_as_those_of_a_file(folder, kind):
    rows = [{"file_name": "a.png", "question": f"q{n}", "answer": cell} for n, cell in enumerate(CELLS)]
    for split in ("train", "test"):
        path = write(folder / split / f"metadata{kind}", rows[: 3 if split == "test" else None])
    found = read_folder(None, data_dir=str(folder))
    assert found.keys() == {"train", "test"}
    assert [one.answers for one in examples(found["train"])] == [(cell,) for cell in CELLS]
    assert [one.answers for one in examples(found["test"])] == [(cell,) for cell in CELLS[:3]]
    assert {(one.image_id, one.image) for one in examples(found["train"])} == {
        ("train/a.png", str(folder / "train" / "a.png"))
    }
    as_a_file = read_table(path, Columns(image="file_name"))
    assert [one[3:] for one in as_a_file] == [one[3:] for one in examples(found["test"])]
    # The folder itself, named as a data set.
    assert [one.answers for one in examples(read_folder(str(folder))["train"])] == [(cell,) for cell in CELLS]


def test_each_folder_of_a_split_may_have_its_metadata(folder):
    write(folder / "train" / "metadata.csv", [{"file_name": "a.png", "question": "q", "answer": "007"}])
    write(folder / "train" / "below" / "metadata.csv", [{"file_name": "b.png", "question": "q", "answer": "NA"}])
    found = examples(read_folder(None, data_dir=str(folder), splits=["train"])["train"])
    assert {(one.image_id, one.answers) for one in found} == {
        ("train/a.png", ("007",)),
        ("train/below/b.png", ("NA",)),
    }


def test_images_may_lie_below_the_metadata_and_have_columns_of_other_names(folder):
    rows = [{"photo_file_name": "below/b.png", "question": "q", "answer": "NA", "file_names": ["x"]}]
    write(folder / "train" / "metadata.jsonl", rows)
    (found,) = read_folder(None, data_dir=str(folder), splits=["train"]).values()
    assert read_table(found[0], Columns(image="photo"), folder=found[1])[0].image_id == "train/below/b.png"


@pytest.mark.parametrize(
    ("place", "row", "message"),
    [
        ("train", {"name": "a.png"}, "metadata.csv: has no column 'file_name'"),
        ("train", {"file_name": "../test/a.png"}, "row 1: column 'file_name' should hold a path below the folder"),
        ("train", {"file_name": "/etc/a.png"}, "row 1: column 'file_name' should hold a path below the folder"),
        ("train", {"file_name": "file://a.png"}, "row 1: column 'file_name' should hold a path below the folder"),
        (".", {"file_name": "train/a.png"}, "metadata.csv lies above the folders of the splits .train, test."),
    ],
)
def test_metadata_that_would_lose_rows_is_refused(folder, place, row, message):
    write(folder / place / "metadata.csv", [row | {"question": "q", "answer": "a"}])
    with pytest.raises(ValueError, match=message):
        read_folder(None, data_dir=str(folder), splits=["train"])


def test_a_split_without_metadata_has_no_rows(folder):
    write(folder / "test" / "metadata.csv", [{"file_name": "a.png", "question": "q", "answer": "a"}])
    with pytest.raises(ValueError, match="has no rows"):
        examples(read_folder(None, data_dir=str(folder))["train"])


def test_two_files_of_metadata_about_the_same_images_are_refused(folder):
    for kind in (".csv", ".jsonl"):
        write(folder / "train" / f"metadata{kind}", [{"file_name": "a.png", "question": "q", "answer": "a"}])
    with pytest.raises(ValueError, match="train has several of metadata.csv, metadata.jsonl, .*; drop all but one"):
        read_folder(None, data_dir=str(folder), splits=["train"])


def test_an_archive_in_an_image_folder_is_refused(folder):
    (folder / "train" / "more.zip").write_bytes(b"")
    with pytest.raises(ValueError, match="more.zip is an archive; unpack it"):
        read_folder(None, data_dir=str(folder))


def test_an_image_folder_without_metadata_has_its_folders_as_classes(tmp_path):
    for color in ("red", "blue"):
        (tmp_path / color).mkdir()
        make_image(color).save(tmp_path / color / "a.png")
    rows = [{"question": "which color?", **row} for row in read_folder(None, data_dir=str(tmp_path))["train"][0]]
    assert sorted(row["label"] for row in rows) == [0, 1]
    table = read_folder(None, data_dir=str(tmp_path))["train"][0].add_column("question", ["which?"] * 2)
    assert sorted(one.answers[0] for one in read_table(table, Columns(answer="label"))) == ["blue", "red"]


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".json"])
def test_cells_of_a_folder_of_files_are_read_as_those_of_a_file(tmp_path, kind):
    (tmp_path / "images").mkdir()
    make_image("red").save(tmp_path / "images" / "a.png")
    rows = [{"image": "images/a.png", "question": f"q{n}", "answer": cell} for n, cell in enumerate(CELLS)]
    for split in ("train", "test"):
        path = tmp_path / f"{split}{kind}"
        write(path, rows) if kind != ".json" else path.write_text(json.dumps(rows))
    found = read_folder(str(tmp_path))
    assert found.keys() == {"train", "test"}
    for split in found:
        assert [one.answers for one in examples(found[split])] == [(cell,) for cell in CELLS]
        assert examples(found[split])[0].image == str(tmp_path / "images" / "a.png")


def test_a_folder_of_parquet_files_has_paths_that_start_there(tmp_path):
    make_image("red").save(tmp_path / "a.png")
    rows = {"image": [{"bytes": None, "path": "a.png"}], "question": ["q"], "answer": ["007"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    (one,) = examples(read_folder(str(tmp_path))["train"])
    assert (one.image, one.answers) == (str(tmp_path / "a.png"), ("007",))


def test_a_split_in_several_folders_is_refused(tmp_path):
    for part in ("a", "b"):
        (tmp_path / "train" / part).mkdir(parents=True)
        write(tmp_path / "train" / part / "rows.csv", [{"image": "a.png", "question": "q", "answer": "a"}])
    with pytest.raises(ValueError, match="the files of one split lie in 2 folders"):
        read_folder(str(tmp_path))
