"""Each benchmark in its official layout and in that of its copy on the Hub, and what its official numbers are."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hivilt.data.tables import TableImage, check_images, open_image
from hivilt.data.vqa import VQAExample, read_answers_file
from hivilt.data.vqa_benchmarks import MAX_OCR_TOKENS, OCR_SEPARATOR, VQA_BENCHMARKS
from hivilt.tasks.arguments import VQAArguments
from miniatures import make_hub_copy, make_vqa_miniature, write_hub_copy
from tiny import make_image

NAMES = list(VQA_BENCHMARKS)
TEN_YES = ("yes",) * 5 + ("", "dark yes", "dark yes", "shape", "no idea")
TEN_RED = tuple(answer.replace("yes", "red") for answer in TEN_YES)
RED, YES_NO = "is the shape red?", {"answer_type": "yes/no", "question_type": "is the"}

# The second question about the first image, in full; of VizWiz, which asks one an image, the first.
EXAMPLES = {
    "easy-vqa": VQAExample("train-1", "train/0.png", "data/train/images/0.png", RED, ("yes",)),
    "vqav2": VQAExample("100001", "100", "train2014/COCO_train2014_000000000100.jpg", RED, TEN_YES, YES_NO),
    "gqa": VQAExample(
        "010", "230", "images/230.jpg", RED, ("yes",), {"structural": "verify", "semantic": "attr", "detailed": "which"}
    ),
    "vizwiz": VQAExample(
        "VizWiz_train_00000000.jpg",
        "VizWiz_train_00000000.jpg",
        "train/VizWiz_train_00000000.jpg",
        "what color is the shape?",
        TEN_RED,
        {"answer_type": "other", "answerable": "yes"},
    ),
    "textvqa": VQAExample(
        "34603", "train000000000000", "train_images/train000000000000.jpg", f"{RED} OCR: STOP exit 5", TEN_YES
    ),
    "ok-vqa": VQAExample("100001", "100", "train2014/COCO_train2014_000000000100.jpg", RED, TEN_YES, YES_NO),
    "vqa-rad": VQAExample(
        "1",
        "synpic0.jpg",
        "VQA_RAD Image Folder/synpic0.jpg",
        RED,
        ("Yes",),
        {"answer_type": "CLOSED", "question_type": "PRES"},
        "linked-0",
    ),
    "clevr": VQAExample(
        "1",
        "CLEVR_train_000000.png",
        "CLEVR_v1.0/images/train/CLEVR_train_000000.png",
        RED,
        ("yes",),
        {"family": "exist"},
    ),
    "sort-of-clevr": VQAExample(
        "train-1", "train_00000.png", "images/train_00000.png", RED, ("yes",), {"family": "non-relational"}
    ),
    "daquar": VQAExample("train-1", "image3", "images/image3.png", "is the shape red ?", ("yes",)),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def folder(name, tmp_path):
    make_vqa_miniature(name, tmp_path / name)
    return tmp_path / name


def only(name, folder, split="train", **where):
    """A benchmark read from its miniature, for tests of one alone."""
    make_vqa_miniature(name, folder)
    return VQA_BENCHMARKS[name].read(split, folder, **where)


def change(path, edit):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(edit(content) or content))


# Official files


def test_an_example_in_full(name, folder):
    expected = EXAMPLES[name]
    example = VQA_BENCHMARKS[name].read("train", folder)[0 if name == "vizwiz" else 1]
    assert example == expected._replace(image=str(folder / expected.image))
    assert open_image(example.image).getpixel((30, 22))[0] > 200


def test_every_split_of_the_official_files(name, folder):
    benchmark, seen, splits = VQA_BENCHMARKS[name], {}, {}
    for split in benchmark.official_splits:
        examples = splits[split] = benchmark.read(split, folder)
        assert len({one.question_id for one in examples}) == len(examples)
        assert all(Path(one.image).is_file() for one in examples)
        assert all(bool(one.answers) == (split not in benchmark.hidden) for one in examples)
        # One id, one image, whatever the split.
        assert all(seen.setdefault(one.image_id, one.image) == one.image for one in examples)
    assert len(set(seen.values())) == len(seen)
    sizes = {ours: len(splits[official]) for ours, official in benchmark.splits.items()}
    assert sizes in ({"train": 12, "validation": 6, "test": 6}, {"train": 12, "test": 6})
    first, last = benchmark.splits["train"], benchmark.splits["test"]
    assert benchmark.read(f"{first}+{last}", folder) == splits[first] + splits[last]


def test_an_unknown_split(name, folder):
    official = ", ".join(map(repr, VQA_BENCHMARKS[name].official_splits))
    with pytest.raises(ValueError, match=f"the official splits {official}, got 'validation'"):
        VQA_BENCHMARKS[name].read("validation", folder)


def test_missing_files_are_named(name, tmp_path):
    file = {
        "easy-vqa": "test/questions.json",
        "vqav2": "v2_OpenEnded_mscoco_test2015_questions.json",
        "gqa": "testdev_balanced_questions.json",
        "vizwiz": "test.json",
        "textvqa": "TextVQA_0.5.1_test.json",
        "ok-vqa": "OpenEnded_mscoco_val2014_questions.json",
        "vqa-rad": "VQA_RAD Dataset Public.json or vqa_rad.json",
        "clevr": "questions/CLEVR_test_questions.json",
        "sort-of-clevr": "sort_of_clevr_test.json",
        "daquar": "qa.894.raw.test.txt or all_qa_pairs.txt or qa.37.raw.test.txt",
    }[name]
    with pytest.raises(FileNotFoundError, match=f"data_dir: .* lacks .*{file}"):
        VQA_BENCHMARKS[name].read(VQA_BENCHMARKS[name].splits["test"], tmp_path)


def test_images_may_lie_elsewhere(name, folder, tmp_path):
    """Right in the folder that is named, or below it as in the official one."""
    example = VQA_BENCHMARKS[name].read("train", folder)[0]
    below = {"easy-vqa": "train/images", "clevr": "images/train"}.get(name, Path(example.image).parent.name)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(Path(example.image).parent, elsewhere / below)
    for image_dir in (elsewhere, str(elsewhere), elsewhere / below):
        moved = VQA_BENCHMARKS[name].read("train", folder, image_dir=image_dir)[0]
        assert Path(moved.image) == elsewhere / below / Path(example.image).name
        assert moved._replace(image="") == example._replace(image="")


def test_a_missing_answer(name, folder):
    """Of VQAv2 and OK-VQA an annotation."""
    drop_annotation = lambda one: one["annotations"].pop(0)
    where = {
        "easy-vqa": ("data/train/questions.json", lambda rows: rows[3].__setitem__(1, "")),
        "vqav2": ("v2_mscoco_train2014_annotations.json", drop_annotation),
        "gqa": ("train_balanced_questions.json", lambda one: one["030"].pop("answer")),
        "vizwiz": ("Annotations/train.json", lambda rows: rows[3].pop("answers")),
        "textvqa": ("TextVQA_0.5.1_train.json", lambda one: one["data"][3].update(answers=[])),
        "ok-vqa": ("mscoco_train2014_annotations.json", drop_annotation),
        "vqa-rad": ("VQA_RAD Dataset Public.json", lambda rows: rows[3].pop("answer")),
        "clevr": ("CLEVR_v1.0/questions/CLEVR_train_questions.json", lambda one: one["questions"][3].pop("answer")),
        "sort-of-clevr": ("sort_of_clevr_train.json", lambda rows: rows[3].pop("answer")),
    }
    if name == "daquar":
        lines = (folder / "all_qa_pairs.txt").read_text().split("\n")
        # 6 questions about the test images come first.
        lines[2 * 6 + 7] = ""
        (folder / "all_qa_pairs.txt").write_text("\n".join(lines))
    else:
        file, edit = where[name]
        change(folder / file, lambda content: edit(content) and None)
    with pytest.raises(ValueError, match=r"train, row \d+: 'answers?' is empty"):
        VQA_BENCHMARKS[name].read("train", folder)


def test_easy_vqa_comes_with_its_package():
    examples = VQA_BENCHMARKS["easy-vqa"].read("test")
    assert len(examples) == 9673 and len({one.image_id for one in examples}) == 1000
    assert examples[0].question_id == "test-0" and examples[0].image.endswith("/data/test/images/0.png")


def test_easy_vqa_of_a_folder_data(tmp_path):
    examples = only("easy-vqa", tmp_path)
    assert VQA_BENCHMARKS["easy-vqa"].read("train", tmp_path / "data") == examples


def test_vqav2_test_dev_is_about_the_images_of_test(tmp_path):
    example = only("vqav2", tmp_path, "test-dev")[0]
    assert Path(example.image).relative_to(tmp_path).as_posix() == "test2015/COCO_test2015_000000000300.jpg"


def test_coco_images_in_a_folder_images(tmp_path):
    only("vqav2", tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "train2014").rename(tmp_path / "images" / "train2014")
    assert Path(VQA_BENCHMARKS["vqav2"].read("train", tmp_path)[0].image).is_file()


def test_vqa_rad_of_other_names_and_its_dirt(tmp_path):
    examples = only("vqa-rad", tmp_path)
    # A number in JSON is an answer like any other, 0 too.
    assert examples[3].answers == ("0",)
    assert Counter(one.types["answer_type"] for one in examples) == {"OPEN": 8, "CLOSED": 4}
    (tmp_path / "VQA_RAD Dataset Public.json").rename(tmp_path / "vqa_rad.json")
    (tmp_path / "VQA_RAD Image Folder").rename(tmp_path / "images")
    renamed = VQA_BENCHMARKS["vqa-rad"].read("train", tmp_path)
    assert [one._replace(image="") for one in renamed] == [one._replace(image="") for one in examples]
    assert Path(renamed[0].image).is_file()


def test_vizwiz_unanswerable_questions_and_another_layout(tmp_path):
    examples = only("vizwiz", tmp_path, "val")
    assert [one.types["answerable"] for one in examples] == ["yes", "yes", "no", "yes", "no", "yes"]
    shutil.move(tmp_path / "Annotations" / "val.json", tmp_path / "val.json")
    (tmp_path / "val").rename(tmp_path / "images")
    moved = VQA_BENCHMARKS["vizwiz"].read("val", tmp_path)[2]
    assert moved.types == {"answer_type": "unanswerable", "answerable": "no"} and Path(moved.image).is_file()


def test_textvqa_words_come_from_rosetta_else_from_the_questions(tmp_path):
    examples = only("textvqa", tmp_path)
    assert [OCR_SEPARATOR in one.question for one in examples] == [True] * 9 + [False] * 3
    change(
        tmp_path / "TextVQA_0.5.1_train.json",
        lambda one: one["data"][0].update(ocr_tokens=[f"word{n}" for n in range(MAX_OCR_TOKENS + 9)]),
    )
    assert VQA_BENCHMARKS["textvqa"].read("train", tmp_path) == examples
    (tmp_path / "TextVQA_Rosetta_OCR_v0.2_train.json").unlink()
    first, second, *_ = VQA_BENCHMARKS["textvqa"].read("train", tmp_path)
    question, words = first.question.split(OCR_SEPARATOR)
    assert question == "what color is the shape?"
    assert words.split() == [f"word{n}" for n in range(MAX_OCR_TOKENS)]
    assert second.question == RED


@pytest.mark.parametrize(
    ("function", "family"),
    [
        ("less_than", "compare_integer"),
        ("equal_integer", "compare_integer"),
        ("query_size", "query_attribute"),
        ("equal_shape", "compare_attribute"),
    ],
)
def test_clevr_families(tmp_path, function, family):
    make_vqa_miniature("clevr", tmp_path)
    file = tmp_path / "CLEVR_v1.0" / "questions" / "CLEVR_val_questions.json"
    change(file, lambda one: one["questions"][0]["program"].append({"function": function}))
    # The folder itself will do as well as the one it was unpacked in.
    example, *others = VQA_BENCHMARKS["clevr"].read("val", tmp_path / "CLEVR_v1.0")
    assert example.types == {"family": family}
    assert [one.types["family"] for one in others[:3]] == ["exist", "count", "query_attribute"]


def test_clevr_questions_without_an_index_go_by_their_place(tmp_path):
    only("clevr", tmp_path, "val")
    file = tmp_path / "CLEVR_v1.0" / "questions" / "CLEVR_val_questions.json"
    change(file, lambda one: [question.pop("question_index") for question in one["questions"]] and None)
    assert [one.question_id for one in VQA_BENCHMARKS["clevr"].read("val", tmp_path)] == list("012345")


DAQUAR_LINES = [
    "what is on the left side of the bed in the image3 ?",
    "night_stand",
    "what is to the right of the image3 ?",
    "lamp, table",
    "how many pictures are in image14 ?",
    "2",
    "what is behind the image14 on the wall in the image14 ?",
    "mirror",
]


def daquar(folder, files, split="train"):
    for name, lines in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(lines))
    return VQA_BENCHMARKS["daquar"].read(split, folder)


def test_daquar_questions_do_not_give_their_image_away(tmp_path):
    examples = daquar(tmp_path, {"qa.894.raw.train.txt": [*DAQUAR_LINES, ""]})
    assert [(one.image_id, one.question, one.answers) for one in examples] == [
        ("image3", "what is on the left side of the bed ?", ("night_stand",)),
        ("image3", "what is to the right of the image ?", ("lamp, table",)),
        ("image14", "how many pictures are in image ?", ("2",)),
        ("image14", "what is behind the image on the wall ?", ("mirror",)),
    ]
    # PNG as released; a copy may have JPEG, in another folder.
    assert [Path(one.image).name for one in examples] == ["image3.png"] * 2 + ["image14.png"] * 2
    make_image("red").save(_made(tmp_path / "nyu_depth_images" / "image3.jpg"))
    examples = daquar(tmp_path, {})
    assert Path(examples[0].image) == tmp_path / "nyu_depth_images/image3.jpg"
    assert check_images(examples, "skip")[1] == ["image14"]


def _made(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_daquar_takes_all_classes_before_the_reduced_ones(tmp_path):
    reduced, every, other = (["what is it in the image1 ?", answer] for answer in ("reduced", "every", "other"))
    lists = {"train_images_list.txt": ["image1"], "test_images_list.txt": ["image2"]}
    own = {"data_train.csv": ["question,answer,image_id", "what is it,own,image1"]}
    given = {}
    for files, answer in [
        (own, "own"),
        ({"qa.37.raw.train.txt": reduced}, "reduced"),
        ({"all_qa_pairs.txt": other, **lists}, "other"),
        ({"qa.894.raw.train.txt": every}, "every"),
    ]:
        given |= files
        (example,) = daquar(tmp_path, given)
        assert example.answers == (answer,)
    # The other half of a form is never filled up from another form.
    with pytest.raises(FileNotFoundError, match=r"lacks qa\.894\.raw\.test\.txt; is it"):
        VQA_BENCHMARKS["daquar"].read("test", tmp_path)
    (tmp_path / "qa.894.raw.train.txt").unlink()
    (tmp_path / "test_images_list.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks test_images_list\.txt; is it"):
        VQA_BENCHMARKS["daquar"].read("test", tmp_path)


def test_daquar_of_a_copy_with_a_split_of_its_own_says_so(tmp_path, caplog):
    files = {
        "data_train.csv": ["question,answer,image_id", 'what is on the desk,"cup, book",image7'],
        "data_eval.csv": ["question,answer,image_id", "what is on the shelf,cup,image7"],
    }
    (example,) = daquar(tmp_path, files, "test")
    assert (example.image_id, example.question, example.answers) == ("image7", "what is on the shelf", ("cup",))
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "DAQUAR, test: data_eval.csv is not of the official split: data_train.csv and"
    )
    (example,) = daquar(tmp_path, {}, "train")
    assert example.answers == ("book, cup",)


def test_daquar_lists_in_any_order_are_one_class(tmp_path):
    lists = ["table, chair", "chair,table", "chair , table", "2", "picture, lamp, picture"]
    lines = [line for answer in lists for line in ("what is in the image1 ?", answer)]
    examples = daquar(tmp_path, {"qa.894.raw.train.txt": lines})
    # An item that is there twice stays: WUPS counts it twice.
    assert [one.answers[0] for one in examples] == [*["chair, table"] * 3, "2", "lamp, picture, picture"]


@pytest.mark.parametrize("lines", [DAQUAR_LINES[:3], [DAQUAR_LINES[0], *DAQUAR_LINES[2:5]], ["what is it ?", "cup"]])
def test_daquar_lines_that_do_not_take_turns(tmp_path, lines):
    with pytest.raises(ValueError, match="DAQUAR, train, is not laid out as expected"):
        daquar(tmp_path, {"qa.894.raw.train.txt": lines})


# The Hub

# Images without an id go by their bytes.
WITHOUT_IMAGE_ID = ("ok-vqa", "vqa-rad")


@pytest.mark.parametrize("name", ["vqav2", "gqa", "vizwiz", "textvqa", "ok-vqa", "vqa-rad"])
def test_copies_on_the_hub_hold_the_same(name, folder, tmp_path):
    make_hub_copy(name, tmp_path / "copy")
    benchmark, count = VQA_BENCHMARKS[name], 0
    for split in benchmark.hub:
        if (name, split) == ("ok-vqa", "train"):
            continue  # a repository of its own, below
        official = benchmark.read(split, folder)
        copied = benchmark.read(split, dataset_name=str(tmp_path / "copy"))
        if name == "vqa-rad":
            official = [
                one._replace(
                    question_id=str(place),
                    answers=(one.answers[0].lower(),),
                    types={"answer_type": "CLOSED" if one.answers[0].lower() in ("yes", "no") else "OPEN"},
                    group=None,
                )
                for place, one in enumerate(official)
            ]
        left_out = {"image": ""} | ({"image_id": ""} if name in WITHOUT_IMAGE_ID else {})
        assert [one._replace(**left_out) for one in copied] == [one._replace(**left_out) for one in official]
        # The same questions share an image, and it is the right one: JPEG moves colors a little.
        for one, other in zip(official, copied, strict=True):
            assert isinstance(other.image, TableImage)
            colors = zip(*(open_image(e.image).getpixel((30, 22)) for e in (one, other)), strict=True)
            assert all(abs(a - b) < 40 for a, b in colors)
        pairs = {(one.image_id, other.image_id) for one, other in zip(official, copied, strict=True)}
        assert len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs})
        count += len(copied)
    assert count > 0


def test_hub_tables_are_tried_in_their_order(monkeypatch):
    tried = []

    def load_dataset(dataset, config=None, split=None, revision=None):
        tried.append((dataset, config, split, revision))
        raise RuntimeError("Dataset scripts are no longer supported, but found it.py")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for name, split in [("vqav2", "train"), ("gqa", "testdev"), ("textvqa", "val"), ("ok-vqa", "val")]:
        with pytest.raises(ValueError, match="scripts are no longer supported"):
            VQA_BENCHMARKS[name].read(split)
    assert tried == [
        ("pingzhili/vqa_v2", None, "train", None),
        ("Multimodal-Fatima/VQAv2_train", None, "train", None),
        ("lmms-lab-encoder/GQA", "testdev_balanced_instructions", "testdev", None),
        ("lmms-lab/GQA", "testdev_balanced_instructions", "testdev", None),
        ("Mineru/GQA", None, "testdev_balanced", None),
        ("lmms-lab-encoder/textvqa", None, "validation", None),
        ("lmms-lab/textvqa", None, "validation", None),
        ("facebook/textvqa", None, "validation", "refs/convert/parquet"),
        ("lmms-lab-encoder/OK-VQA", None, "val2014", None),
        ("lmms-lab/OK-VQA", None, "val2014", None),
        ("Multimodal-Fatima/OK-VQA_test", None, "test", None),
    ]


@pytest.mark.parametrize("name", ["vqav2", "ok-vqa"])
def test_a_copy_with_answers_of_models_besides(name, tmp_path):
    row = {
        "question_id": 7,
        "id_image": 3,
        "question": RED,
        "answers": ["as a model has it"],
        "answers_original": [{"answer": "yes", "raw_answer": "Yes!"}, {"answer": "no", "raw_answer": "No!"}],
        "answer_type": "other",
        "question_type": "one",
        "blip_caption": "a shape",
        "image": make_image(),
    }
    write_hub_copy(tmp_path / "copy", {"train": [row]})
    (example,) = VQA_BENCHMARKS[name].read("train", dataset_name=str(tmp_path / "copy"))
    types = {"answer_type": "other", "question_type": "one"}
    assert example == VQAExample("7", "3", example.image, RED, ("yes", "no"), types)


@pytest.mark.parametrize("hidden", [None, [], [""] * 10])
def test_hidden_answers_of_a_copy(tmp_path, hidden):
    row = {"question_id": 7, "image_id": "x", "question": RED, "ocr_tokens": None, "image": make_image()}
    write_hub_copy(tmp_path / "copy", {"test": [row | {"answers": hidden}]})
    (example,) = VQA_BENCHMARKS["textvqa"].read("test", dataset_name=str(tmp_path / "copy"))
    assert example == VQAExample("7", "x", example.image, RED, ())


def test_a_flat_copy_of_gqa(tmp_path):
    rows = [
        {"question_id": f"0{n}", "question": RED, "answer": "yes", "image": make_image(color)}
        for n, color in enumerate(("red", "red", "blue"))
    ]
    write_hub_copy(tmp_path / "copy", {"testdev_balanced": rows})
    examples = VQA_BENCHMARKS["gqa"].read("testdev", dataset_name=str(tmp_path / "copy"))
    assert [one.question_id for one in examples] == ["00", "01", "02"]
    assert examples[0].image_id == examples[1].image_id != examples[2].image_id
    assert examples[0].answers == ("yes",) and examples[0].types == {}


def test_a_copy_of_clevr_in_one_table(tmp_path):
    rows = [{"question": RED, "answer": "yes", "image": make_image(color)} for color in ("red", "blue")]
    write_hub_copy(tmp_path / "copy", {"train": rows})
    examples = VQA_BENCHMARKS["clevr"].read("train", dataset_name=str(tmp_path / "copy"))
    assert [(one.question_id, one.answers, one.types) for one in examples] == [("0", ("yes",), {}), ("1", ("yes",), {})]
    with pytest.raises(ValueError, match=r"CLEVR has no 'train' split with images on the Hub.*--data_dir"):
        VQA_BENCHMARKS["clevr"].read("train")


def test_wrong_columns_of_a_copy(tmp_path):
    write_hub_copy(tmp_path / "copy", {"train": [{"photo": make_image(), "question": RED, "response": "yes"}]})
    with pytest.raises(ValueError, match="expected columns 'image', 'answer', it has 'photo', 'question', 'response'"):
        VQA_BENCHMARKS["vqa-rad"].read("train", dataset_name=str(tmp_path / "copy"))


def test_a_missing_answer_of_a_copy(tmp_path):
    rows = [{"question": RED, "answer": answer, "image": make_image()} for answer in ("yes", "")]
    write_hub_copy(tmp_path / "copy", {"test": rows})
    with pytest.raises(ValueError, match=r"copy, test, row 2: 'answer' is empty or missing"):
        VQA_BENCHMARKS["vqa-rad"].read("test", dataset_name=str(tmp_path / "copy"))


# Official metrics


def answer_all(examples, answer=lambda one: one.answers[0] if one.answers else "red", watched=None):
    """What a model would predict; of `answer` it is sure."""
    best = [[{"answer": answer(one), "score": 0.75}, {"answer": "shape", "score": 0.25}] for one in examples]
    return [
        given + ([{"answer": "unanswerable", "score": watched(one)}] if watched else [])
        for given, one in zip(best, examples, strict=True)
    ]


def test_right_and_wrong_answers_are_told_apart(name, folder):
    benchmark = VQA_BENCHMARKS[name]
    examples = benchmark.read("train", folder)
    right = benchmark.official_metrics(answer_all(examples), examples)
    wrong = benchmark.official_metrics(answer_all(examples, lambda one: "zebra"), examples)
    metric = VQAArguments.benchmark_defaults[name].get("metric_for_best_model", "accuracy")
    assert right[metric] == 1 and wrong[metric] == 0
    half = benchmark.official_metrics(
        answer_all(examples, lambda one: one.answers[0] if one in examples[:6] else "zebra"), examples
    )
    assert half[metric] == 0.5


def test_kinds_of_questions(name, folder):
    by_type = {
        "easy-vqa": {},
        "vqav2": {"by_answer_type": {"other", "yes/no"}, "by_question_type": {"what color", "is the", "what is"}},
        "gqa": {"by_structural": {"query", "verify"}, "by_semantic": {"attr"}, "by_detailed": {"which"}},
        "vizwiz": {"by_answer_type": {"other", "unanswerable"}},
        "textvqa": {},
        "ok-vqa": {"by_answer_type": {"other", "yes/no"}, "by_question_type": {"what color", "is the", "what is"}},
        "vqa-rad": {},
        "clevr": {"by_family": {"query_attribute", "exist", "count"}},
        "sort-of-clevr": {"by_family": {"relational", "non-relational"}},
        "daquar": {},
    }[name]
    benchmark = VQA_BENCHMARKS[name]
    examples = benchmark.read("train", folder)
    metrics = benchmark.official_metrics(answer_all(examples), examples)
    assert {key: set(value) for key, value in metrics.items() if isinstance(value, dict)} == by_type
    if name == "vqa-rad":
        assert (metrics["num_open"], metrics["num_closed"], metrics["closed_accuracy"]) == (8, 4, 1)


def test_hidden_answers_give_no_metrics(name, folder):
    benchmark = VQA_BENCHMARKS[name]
    for split in benchmark.hidden:
        examples = benchmark.read(split, folder)
        assert benchmark.official_metrics(answer_all(examples, watched=lambda one: 0.5), examples) == {}
    assert benchmark.official_metrics([], []) == {}


@settings(max_examples=30, deadline=None)
@given(known=st.lists(st.booleans(), min_size=1, max_size=9), name=st.sampled_from(NAMES))
def test_questions_without_an_answer_are_left_out(known, name):
    types = {"answer_type": "OPEN", "family": "count", "structural": "query", "answerable": "yes"}
    examples = [
        VQAExample(str(n), "a", "a.png", "?", ("red",) if known_one else (), types if known_one else {})
        for n, known_one in enumerate(known)
    ]
    predictions = answer_all(examples, lambda one: ("red", "blue")[int(one.question_id) % 2], lambda one: 0.25)
    measure = VQA_BENCHMARKS[name].official_metrics
    kept = [place for place, one in enumerate(known) if one]
    assert measure(predictions, examples) == measure([predictions[n] for n in kept], [examples[n] for n in kept])


def test_answerability_of_vizwiz(tmp_path):
    examples = only("vizwiz", tmp_path, "val")
    measure = VQA_BENCHMARKS["vizwiz"].official_metrics
    certain = answer_all(examples, watched=lambda one: 0.9 if one.types["answerable"] == "no" else 0.1)
    assert measure(certain, examples)["answerability_average_precision"] == 1
    assert measure(certain, examples)["answerability_f1"] == 1
    shy = answer_all(examples, watched=lambda one: 0.1)
    assert measure(shy, examples)["answerability_f1"] == 0
    # A model without that answer, or a file without these flags, has none of it.
    unaware = measure(answer_all(examples, lambda one: "red"), examples)
    assert not any(key.startswith("answerability") for key in unaware) and "answerable_vqa_accuracy" in unaware
    unflagged = [one._replace(types={}) for one in examples]
    assert measure(certain, unflagged) == {"vqa_accuracy": 1}


# Submissions


def test_submissions(name, folder):
    benchmark = VQA_BENCHMARKS[name]
    if benchmark.submissions is None:
        assert name in ("easy-vqa", "ok-vqa", "vqa-rad", "clevr", "sort-of-clevr", "daquar")
        return
    examples = benchmark.read(benchmark.hidden[0], folder)
    files = benchmark.submissions(answer_all(examples, watched=lambda one: 0.25), examples)
    first = {
        "vqav2": {"question_id": 300000, "answer": "red"},
        "gqa": {"questionId": "003", "prediction": "red"},
        "vizwiz": {"image": "VizWiz_test_00000000.jpg", "answer": "red"},
        "textvqa": {"question_id": 34802, "answer": "red"},
    }[name]
    assert files["submission.json"][0] == first
    assert [len(rows) for rows in files.values()] == [6, 6][: len(files)]
    if name == "vizwiz":
        answerability = {"image": "VizWiz_test_00000000.jpg", "answerable": 0.75}
        assert files["submission_answerability.json"][0] == answerability
        assert set(benchmark.submissions(answer_all(examples), examples)) == {"submission.json"}
    else:
        assert set(files) == {"submission.json"}


# Answers to choose from


@pytest.mark.parametrize(("name", "size", "first"), [("vqav2", 3129, ""), ("gqa", 1842, "cat food")])
def test_answer_files(name, size, first):
    answers = read_answers_file(VQA_BENCHMARKS[name].answer_file)
    assert len(set(answers)) == len(answers) == size and answers[0] == first
    assert {"yes", "no", "red"} <= set(answers)


def test_all_others_take_the_answers_of_the_training_data():
    assert {name for name, one in VQA_BENCHMARKS.items() if one.answer_file is None} == set(NAMES) - {"vqav2", "gqa"}
