"""The page: what its functions answer, the page itself through a client, and what it refuses."""

import importlib.util
import json
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch
from PIL import Image

from hivilt import (
    HiViLTForConditionalGeneration,
    HiViLTForQuestionAnswering,
    HiViLTForRetrieval,
    HiViLTForVisualGrounding,
)
from hivilt.evaluation.familiarity import features_of_images, measure_familiarity
from hivilt.search import ImageIndex
from hivilt.training.models import load_checkpoint
from processes import free_port
from tiny import make_captioner, make_image, make_model, make_processor

# Gradio's statistics use what pandas 4 will no longer have.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio.queueing")

COLORS = ("red", "blue", "green", "white", "gray", "yellow", "black", "orange", "pink", "brown", "cyan", "purple")
QUESTION = "what color is the circle"
MORE = (QUESTION, "is there a red square", "what shape")
EXPRESSIONS = ("the red square", "a circle in the image", "blue")
RESULTS = {
    "data": {
        "name": "Flickr8k <1>",
        "train": {"images": 6000, "captions": 30000, "questions": 7000},
        "test": {"images": 1000},
    },
    "test": {
        **{"embedding_text_to_image_recall@1": 0.314, "embedding_text_to_image_recall@10": 0.7},
        **{"accuracy": 0.5, "vqa_accuracy": 0.625, "num_questions": 1234},
    },
    "settings": {"metric_for_best_model": "vqa_accuracy"},
}


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Gradio takes seconds to import: only where these tests run, and not where they are collected."""
    global Client, app, gr, handle_file
    import gradio as gr
    from gradio_client import Client, handle_file

    from hivilt import app


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a checkpoint of each head, one with its results, twelve images, two others, and two files that are none."""
    folder = tmp_path_factory.mktemp("place")
    for name, model_class in {"answers": HiViLTForQuestionAnswering, "retrieval": HiViLTForRetrieval}.items():
        make_model(model_class, weight_scale=8).save_pretrained(folder / name)
        make_processor().save_pretrained(folder / name)
    finder = make_model(HiViLTForVisualGrounding, weight_scale=8)
    with torch.no_grad():
        weight = finder.row_head.box_regressor[-1].weight
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        finder.row_head.classifier.bias.zero_()
    finder.save_pretrained(folder / "boxes")
    make_processor().save_pretrained(folder / "boxes")
    (folder / "boxes" / "results.json").write_text(json.dumps(RESULTS | {"settings": {"threshold": 0.25}}))
    for name, colors in {"images": COLORS, "others": ("red", "blue")}.items():
        (folder / name).mkdir()
        for color in colors:
            make_image(color).save(folder / name / f"{color}.png")
    captioner = make_captioner()
    captioner.generation_config.update(max_new_tokens=5, num_beams=2)
    captioner.save_pretrained(folder / "captions")
    make_processor().save_pretrained(folder / "captions")
    (folder / "empty").mkdir()
    (folder / "no image <b>.png").write_text("no image")
    (folder / "cut.png").write_bytes((folder / "images" / "red.png").read_bytes()[:60])
    return folder


@pytest.fixture(scope="module")
def checkpoint(place) -> tuple:
    return load_checkpoint("--model", str(place / "answers"), HiViLTForQuestionAnswering)


@pytest.fixture(scope="module")
def searching(place) -> tuple:
    return load_checkpoint("--retrieval", str(place / "retrieval"), HiViLTForRetrieval)


@pytest.fixture(scope="module")
def captioning(place) -> tuple:
    return load_checkpoint("--captioning", str(place / "captions"), HiViLTForConditionalGeneration)


@pytest.fixture(scope="module")
def grounding(place) -> tuple:
    return load_checkpoint("--grounding", str(place / "boxes"), HiViLTForVisualGrounding)


@pytest.fixture
def answerer(checkpoint) -> "app.Answerer":
    return app.Answerer(*checkpoint)


@pytest.fixture
def encoded(checkpoint) -> Iterator[list[int]]:
    """How many images each run of the vision encoder gave something of."""
    counts = []
    hook = checkpoint[0].model.vision_model.register_forward_hook(
        lambda _, inputs, output: counts.append(len(output[0]))
    )
    yield counts
    hook.remove()


@pytest.fixture(scope="module")
def page(place, tmp_path_factory):
    """The page as the command line starts it, in this process, whatever the environment says about sharing it."""
    kept = []
    flags = {"model": ["answers"], "retrieval": ["retrieval"], "index": ["index"], "images": ["images", "others"]}
    flags |= {"grounding": ["boxes"], "captioning": ["captions"]}
    argv = [word for flag, names in flags.items() for word in (f"--{flag}", *(str(place / name) for name in names))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_SHARE", "true")
        patch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        patch.setattr(gr.networking, "setup_tunnel", lambda **kwargs: "https://everywhere")
        patch.setattr(gr.Blocks, "block_thread", lambda page: kept.append(page))
        app.main([*argv, "--ask_all", "--port", str(free_port())])
        yield kept[0]
        kept[0].close(verbose=False)


@pytest.fixture
def client(page, tmp_path) -> "Client":
    """Someone who has just opened the page."""
    quiet = {"verbose": False, "analytics_enabled": False}
    # By default an answer must begin within five seconds, however much else the machine has to do.
    return Client(page.local_url, download_files=tmp_path, httpx_kwargs={"timeout": 600}, **quiet)


def uploaded(path: Path) -> dict:
    return handle_file(str(path))


def is_untouched(output) -> bool:
    """Whether an event leaves an output as it was."""
    return isinstance(output, dict) and output.get("__type__") == "update" and "value" not in output


def test_several_questions_have_an_answer_each_with_its_probability(answerer, checkpoint, place):
    image = str(place / "images" / "red.png")
    answers, _, note = answerer.ask(image, f"\n{MORE[0]}\n\n  {MORE[1]}  \n{MORE[2]}\n{MORE[0]}")
    assert list(answers) == list(MORE)
    model, processor = checkpoint
    for question, found in answers.items():
        with torch.no_grad():
            logits = model(**processor(images=image, text=question, return_tensors="pt")).logits
        (expected,) = processor.post_process_question_answering(logits, top_k=3, id2label=model.config.id2label)
        assert [one["answer"] for one in found] == [one["answer"] for one in expected]
        assert [one["score"] for one in found] == pytest.approx([one["score"] for one in expected], abs=1e-5)
    assert re.fullmatch(r"Image encoded in \d+ ms, 3 questions answered in \d+ ms\.", note)


def test_an_image_is_encoded_once_for_all_its_questions(answerer, encoded, place):
    red, blue = (str(place / "images" / f"{color}.png") for color in ("red", "blue"))
    notes = [answerer.ask(red, question)[2] for question in MORE]
    assert encoded == [1]
    assert ["encoded before" in note for note in notes] == [False, True, True]
    answers = [answerer.ask(image, QUESTION)[0] for image in (blue, red)]
    assert encoded == [1, 1]
    assert answers[0] != answers[1]


def test_of_an_image_unlike_those_of_training_it_says_so(checkpoint, place):
    colors = features_of_images(*checkpoint, [make_image(color) for color in COLORS] * 3)
    familiarity = measure_familiarity(colors, colors)
    asked = app.Answerer(*checkpoint, familiarity)
    assert asked.ask(str(place / "images" / "red.png"), QUESTION)[1]
    Image.effect_noise((48, 36), 200).save(place / "noise.png")
    answers, familiar, _ = asked.ask(str(place / "noise.png"), QUESTION)
    assert not familiar
    # It is asked all the same, and without a measure nothing is said.
    unknown, familiar, _ = app.Answerer(*checkpoint).ask(str(place / "noise.png"), QUESTION)
    assert familiar and unknown == answers


def test_the_page_warns_beside_the_answer_of_an_image_unlike_those_of_training(checkpoint, place):
    colors = features_of_images(*checkpoint, [make_image(color) for color in COLORS] * 3)
    for familiarity, warned in {None: False, 0.001: True, 1000.0: False}.items():
        measured = familiarity and {**measure_familiarity(colors, colors), "limit": familiarity}
        page = app.build_page(checkpoint, {}, familiarity=measured)
        (ask,) = [one.fn for one in page.fns.values() if one.api_name == "ask"]
        _, shown, *_ = ask(str(place / "images" / "red.png"), QUESTION, [])
        assert (app.UNFAMILIAR in shown) == warned and QUESTION in shown


def events_of(page: "gr.Blocks", target: str) -> Iterator:
    """What the page does when someone uploads an image ("input") or selects a result ("select")."""
    for event in page.fns.values():
        if any(name == target for _, name in event.targets):
            yield event


def output_of(event, elem_id: str) -> int:
    return [output.elem_id for output in event.outputs].index(elem_id)


def test_an_opened_image_shows_its_caption_once_written(checkpoint, captioning, searching, place, tmp_path):
    index = ImageIndex.build(place / "others", *searching, tmp_path)
    page = app.build_page(checkpoint, {"others": index}, captioning=captioning)
    (opened,) = [one for one in events_of(page, "input") if "caption" in [out.elem_id for out in one.outputs]]
    (selected,) = events_of(page, "select")
    model, processor = captioning
    captions = []
    for color in ("red", "blue"):
        path = str(place / "others" / f"{color}.png")
        written = model.generate(**processor(images=path, return_tensors="pt"))
        captions.append(processor.batch_decode(written, skip_special_tokens=True)[0].strip())
        shown = opened.fn(path, None)[output_of(opened, "caption")]
        assert shown == app.note_of(f"Caption: {captions[-1]}")
    assert captions[0] != captions[1]

    counts = []
    hook = model.model.vision_model.register_forward_hook(lambda _, inputs, output: counts.append(1))
    paths = [str(place / "others" / f"{color}.png") for color in ("blue", "red")]
    found = selected.fn(paths, gr.SelectData(None, {"index": 1, "value": None}))
    assert found[output_of(selected, "caption")] == app.note_of(f"Caption: {captions[0]}")
    hook.remove()
    assert counts == []

    # A file of the same name that is another image has a caption of its own.
    folder = tmp_path / "others"
    shutil.copytree(place / "others", folder)
    paths = [str(folder / f"{color}.png") for color in ("blue", "red")]
    for caption in captions:
        found = selected.fn(paths, gr.SelectData(None, {"index": 1, "value": None}))
        assert found[output_of(selected, "caption")] == app.note_of(f"Caption: {caption}")
        shutil.copy(paths[0], paths[1])

    # What cannot be read leaves the image before it, and its caption; without an image there is none.
    note, image, *_, caption = opened.fn(str(place / "cut.png"), "the one before")
    assert "cut.png" in note and image == "the one before" and is_untouched(caption)
    assert opened.fn(None, None)[output_of(opened, "caption")] == ""


def test_without_a_captioning_checkpoint_no_caption_is_shown(checkpoint, place):
    page = app.build_page(checkpoint, {})
    (opened,) = [one for one in events_of(page, "input") if "caption" in [out.elem_id for out in one.outputs]]
    assert opened.fn(str(place / "images" / "red.png"), None)[output_of(opened, "caption")] == ""


def test_expressions_on_lines_or_between_semicolons_have_boxes_each_of_one_encoded_image(grounding, place):
    grounder, (model, processor) = app.Grounder(*grounding), grounding
    red, blue = (str(place / "images" / f"{color}.png") for color in ("red", "blue"))
    with torch.no_grad():  # with which some boxes are found
        logits = model(**processor(images=red, text=EXPRESSIONS[1], return_tensors="pt")).logits
    threshold, counts = logits.sigmoid().median().item(), []
    hook = model.model.vision_model.register_forward_hook(lambda _, inputs, output: counts.append(len(output[0])))
    text = f" {EXPRESSIONS[0]} ;{EXPRESSIONS[1]};\n\n{EXPRESSIONS[2]}\n{EXPRESSIONS[0]}"
    found, note = grounder.find(red, text, threshold)
    assert re.fullmatch(r"Image encoded in \d+ ms, 3 expressions looked for in \d+ ms\.", note)
    assert list(found) == list(EXPRESSIONS)
    (again, note), (none, _) = (grounder.find(red, EXPRESSIONS[1], least) for least in (0.0, 1.0))
    assert counts == [1] and "encoded before, 1 expression looked for" in note
    assert none == {EXPRESSIONS[1]: {"scores": [], "boxes": []}}
    assert len(again[EXPRESSIONS[1]]["boxes"]) > len(found[EXPRESSIONS[1]]["boxes"]) > 0
    assert grounder.find(blue, EXPRESSIONS[1], 0.0)[0] != again and counts == [1, 1]
    hook.remove()
    for expression, one in found.items():
        with torch.no_grad():
            outputs = model(**processor(images=red, text=expression, return_tensors="pt"))
        (expected,) = processor.post_process_grounding(outputs, threshold=threshold)
        torch.testing.assert_close(torch.tensor(one["boxes"]).view(-1, 4), expected["boxes"], atol=1e-4, rtol=1e-4)
        assert one["scores"] == pytest.approx(expected["scores"].tolist(), abs=1e-4)


def test_boxes_are_drawn_at_their_place_each_expression_in_its_color():
    box = {"scores": [0.875], "boxes": [[0.25, 0.5, 0.75, 1.0]]}
    found = {"<nothing>": {"scores": [], "boxes": []}, "the <cup>": box}
    drawn = app.with_boxes(Image.new("RGB", (600, 400), "black"), found)
    assert drawn.size == (600, 400)
    color = tuple(bytes.fromhex(app.BOX_COLORS[1][1:]))
    for place in ((148, 300), (451, 300), (300, 198), (300, 398)):
        assert drawn.getpixel(place) == color, place
    for place, expected in {(145, 300): 255, (142, 300): 0, (150, 300): 0, (449, 300): 0}.items():
        assert drawn.getpixel(place) == (expected,) * 3, place
    # A box thinner than a pixel is drawn as one, and a small image is enlarged.
    thin = {"a line": {"scores": [1.0], "boxes": [[0.5, 0.5, 0.5, 0.5]]}}
    assert app.with_boxes(Image.new("RGB", (64, 48)), thin).size == (512, 384)

    shown = app.show_boxes(found)
    assert " ".join(re.sub("<[^>]*>", " ", shown).split()) == (
        "&lt;nothing&gt; nothing of that is in the image the &lt;cup&gt; 0.88"
    )
    assert f"background: {app.BOX_COLORS[1]}" in shown and f"background: {app.BOX_COLORS[0]}" not in shown


def test_the_page_draws_boxes_and_what_it_refuses_leaves_them(client, grounding, place):
    red = place / "images" / "red.png"
    found, _ = app.Grounder(*grounding).find(str(red), "blue; a circle in the image", 0.5)
    note, marked, scores = client.predict(uploaded(red), "blue; a circle in the image", 0.5, api_name="/locate")
    assert "2 expressions looked for" in note and scores == app.show_boxes(found)
    with Image.open(marked) as shown:
        assert shown.convert("RGB").tobytes() == app.with_boxes(app.opened(str(red)), found).tobytes()
    for image, text, least, message in [
        (None, "blue", 0.5, "no image yet"),
        (uploaded(red), " ;\n", 0.5, "nothing to look for yet"),
        (uploaded(red), ";".join(map(str, range(9))), 0.5, "9 expressions are too many at once; look for up to 8"),
        (uploaded(red), "blue", 2, "`threshold` must be a number in [0, 1], got 2"),
        (uploaded(place / "cut.png"), "blue", 0.5, "&#x27;cut.png&#x27; is not a readable"),
    ]:
        note, *others = client.predict(image, text, least, api_name="/locate")
        assert message in note and "note error" in note and all(map(is_untouched, others))


def test_a_new_image_takes_boxes_away_and_an_example_brings_its_own(checkpoint, grounding, searching, place, tmp_path):
    index = ImageIndex.build(place / "others", *searching, tmp_path)
    page = app.build_page(checkpoint, {"others": index}, grounding=grounding, scenes=app.SCENE)
    red = str(place / "others" / "red.png")
    (selected,) = events_of(page, "select")
    (uploads,) = [one for one in events_of(page, "input") if "boxes" in [out.elem_id for out in one.outputs]]
    opened = selected.fn([red], gr.SelectData(None, {"index": 0, "value": None}))
    for event, shown in ((selected, opened), (uploads, uploads.fn(red, None))):
        assert shown[output_of(event, "located")].size == make_image("red").size
        assert shown[output_of(event, "boxes")] is None and shown[output_of(event, "scores")] == ""
    note, image, last, boxes, scores = uploads.fn(str(place / "cut.png"), "the one before")
    assert "cut.png" in note and image == last == "the one before" and is_untouched(boxes) and is_untouched(scores)

    # A scene is offered, with what to look for in it.
    (offered,) = [one for one in events_of(page, "click") if "located" in [out.elem_id for out in one.outputs]]
    example = offered.fn(0, 0.0)
    ((path, text),) = app.SCENE
    assert all(expression in example[output_of(offered, "scores")] for expression in text.splitlines())
    assert example[output_of(offered, "located")].size == Image.open(path).size


def test_too_many_questions_are_refused_by_their_number(answerer, place):
    lines = "\n".join(f"what is {number}" for number in range(33))
    with pytest.raises(ValueError, match="33 questions are too many at once; ask up to 32"):
        answerer.ask(str(place / "images" / "red.png"), lines)


def test_a_list_of_answers_shows_the_best_then_the_others_and_never_certainty():
    predictions = [{"answer": "a<b", "score": 0.996}, {"answer": "no", "score": 0.004}]
    shown = app.show_answers([("is <it>?", predictions, "")], all_answers=True)
    assert " ".join(re.sub("<[^>]*>", " ", shown).split()) == "is &lt;it&gt;? a&lt;b &gt; 99 % or no &lt; 1 %"
    assert "or no" not in app.show_answers([("is it?", predictions, "")], all_answers=False)
    assert [app.percent(share) for share in (1, 0.5, 0.01, 0)] == ["> 99 %", "50 %", "1 %", "< 1 %"]
    assert app.show_answers([], all_answers=True) == ""


def test_the_page_answers_and_what_it_refuses_leaves_answers_and_history(client, answerer, place):
    red = place / "images" / "red.png"
    answered, _, _ = answerer.ask(str(red), QUESTION)
    expected = app.show_answers([(*one, "") for one in answered.items()], all_answers=True)
    for count, (image, question, message) in enumerate(
        [
            (None, QUESTION, "no image yet"),
            (uploaded(red), "  ", "no question yet"),
            (uploaded(place / "cut.png"), QUESTION, "&#x27;cut.png&#x27; is not a readable"),
            (uploaded(place / "no image <b>.png"), QUESTION, "&#x27;no image b.png&#x27; is not a readable"),
        ]
    ):
        note, *others = client.predict(image, question, api_name="/ask")
        assert message in note and "note error" in note
        assert len(others) == 2 and all(map(is_untouched, others))
        note, answers, history = client.predict(uploaded(red), QUESTION, api_name="/ask")
        assert "1 question answered" in note
        assert answers == expected
        # The newest first, each with its image; what was refused is not among them.
        assert history.count(f'<span class="question">{QUESTION}</span>') == count + 1
        assert history.count('<img src="data:image/jpeg;base64,') == count + 1


def test_the_history_is_of_one_visitor(page, place, tmp_path):
    for _ in range(2):
        client = Client(page.local_url, download_files=tmp_path, verbose=False, analytics_enabled=False)
        _, _, history = client.predict(uploaded(place / "images" / "red.png"), QUESTION, api_name="/ask")
        assert history.count("<li>") == 1


def test_the_page_reads_only_what_was_uploaded(page, place):
    outside = {"path": str(place / "images" / "red.png"), "meta": {"_type": "gradio.FileData"}}
    for image in (outside, {"path": outside["path"]}, outside["path"]):
        data = json.dumps({"data": [image, QUESTION, None], "session_hash": "somebody"}).encode()
        call = f"{page.local_url}gradio_api/call/ask"
        with urlopen(Request(call, data, {"Content-Type": "application/json"})) as response:
            event = json.load(response)["event_id"]
        with urlopen(f"{call}/{event}") as response:
            text = response.read().decode()
        assert text.startswith("event: error") or "Only images that were uploaded are read." in text
        assert "best" not in text


def test_the_page_searches_by_words_and_by_image(client, searching, place):
    index = ImageIndex.build(place / "images", *searching, place / "again")
    like = place / "images" / "green.png"
    for words, image, rerank, hits in [
        ("red circle", None, False, index.search("red circle", 10)),
        ("red circle", None, True, index.search("red circle", 10, rerank_k=32)),
        ("", like, True, index.search(like, 10)),
    ]:
        note, found = client.predict("images", words, image and uploaded(image), rerank, api_name="/search")
        assert [one["caption"] for one in found] == [f"{hit.path.stem} {hit.score:.2f}" for hit in hits]
        assert len(found) == 10
        assert "The 10 nearest of 12 images" in note and "no probability" in note
        with Image.open(found[0]["image"]) as shown, Image.open(hits[0].path) as best:
            assert shown.getpixel((400, 300)) == pytest.approx(best.getpixel((24, 18)), abs=3)
    assert found[0]["caption"] == "green 1.00"

    note, found = client.predict("images", "red", uploaded(like), False, api_name="/search")
    assert "one of the two" in note and is_untouched(found)


def test_the_page_asks_all_images_of_a_folder_from_what_it_keeps_of_them(client, checkpoint, place, encoded):
    index = ImageIndex.build(place / "images", *checkpoint, place / "all")
    encoded.clear()
    for answer in ("", "answer 2"):
        note, found = client.predict("images", QUESTION, answer, api_name="/ask_all")
        wanted = index.ask(QUESTION, answer=answer or None)
        assert [one["caption"] for one in found] == [f"{one.answer} {app.percent(one.score)}" for one in wanted]
        with Image.open(found[0]["image"]) as shown, Image.open(wanted[0].path) as best:
            assert shown.getpixel((400, 300)) == pytest.approx(best.getpixel((24, 18)), abs=3)
        assert "12 images asked in " in note and "without encoding any" in note
    assert encoded == []
    assert len(list((place / "index").glob("answers-*/index.json"))) == 2  # of two folders, and the next start is fast
    for question, answer, said in (
        (" ", "", "the text is empty"),
        (QUESTION, "zebra", "the 5 answers that the model chooses from: answer 0, "),
    ):
        note, found = client.predict("images", question, answer, api_name="/ask_all")
        assert said in note and is_untouched(found)
    note, found = client.predict("others", QUESTION, "", api_name="/ask_all")
    assert len(found) == 2


def test_the_page_tells_that_images_have_changed_since(checkpoint, place, tmp_path):
    folder = shutil.copytree(place / "images", tmp_path / "images")
    index = ImageIndex.build(folder, *checkpoint, tmp_path / "index")
    assert "changed" not in app.ask_all(index, QUESTION, "")[0]
    changed = next(folder.rglob("*.png"))
    Image.new("RGB", (9, 9)).save(changed)
    assert f"1 of them, such as {changed.name}, changed or went since" in app.ask_all(index, QUESTION, "")[0]


def test_without_words_all_of_the_chosen_folder_is_shown(client):
    for folder, names in {"images": sorted(COLORS), "others": ["blue", "red"]}.items():
        note, found = client.predict(folder, " ", None, False, api_name="/search")
        assert [one["caption"] for one in found] == names
        assert f"{len(names)} images to search. Open one to ask about it." in note


def test_an_image_that_is_gone_hides_no_other(checkpoint, searching, place, tmp_path):
    folder = shutil.copytree(place / "images", tmp_path / "images")
    page = app.build_page(checkpoint, {"mine": ImageIndex.build(folder, *searching, tmp_path / "index")})
    (look,) = [one.fn for one in page.fns.values() if one.api_name == "search"]
    (folder / "red.png").unlink()
    (folder / "blue.png").write_text("no image")
    for words, count in {"": 12, "a red circle": 10}.items():
        note, shown, paths = look("mine", words, None, False)
        gone = note.count("can no longer be read")
        assert len(shown) == len(paths) == count - gone and set(map(type, paths)) == {str}
        assert not {"red", "blue"} & {Path(path).stem for path in paths}
    note, *_ = look("mine", "", None, False)
    assert "red.png can no longer be read." in note and "blue.png can no longer be read." in note


@pytest.mark.parametrize("folder", ["empty", "/", "..", "", None])
def test_no_folder_is_searched_but_those_named_at_the_start(client, folder):
    note, found = client.predict(folder, "red", None, False, api_name="/search")
    assert "no such folder" in note and is_untouched(found)


def test_of_a_large_folder_the_first_are_shown(searching, place, monkeypatch):
    index = ImageIndex.build(place / "images", *searching, place / "again")
    monkeypatch.setattr(app, "BROWSED", 5)
    note, shown = app.search(index, "", None, False)
    assert [path.stem for path, _ in shown] == sorted(COLORS)[:5]
    assert note.startswith("12 images to search, the first 5 of them below.")


@pytest.mark.parametrize("place", [-1, 3, 1.0, "0", None, [0, 1]])
def test_a_result_is_opened_by_its_place_alone(place):
    with pytest.raises(ValueError, match="no longer there"):
        app.checked(place, ["a", "b", "c"])
    assert app.checked(2, ["a", "b", "c"]) == 2


def test_a_large_image_is_shown_smaller_and_a_small_one_as_it_is(tmp_path):
    for size, shown in {(3000, 1500): (1024, 512), (64, 48): (64, 48)}.items():
        Image.new("RGB", size).save(tmp_path / "image.tiff")
        assert app.opened(str(tmp_path / "image.tiff")).size == shown


def test_the_page_says_what_its_models_know():
    search = app.describe_search("someone/finder", RESULTS)
    assert search == (
        '<p class="about">The model someone/finder was trained on Flickr8k &lt;1&gt;, 6,000 images with 30,000 captions. Of 1,000 '
        "test images it found a caption&#x27;s own first in 31.4%, and among the first ten in 70.0%.</p>"
    )
    answers = app.describe_answers("someone/asked", RESULTS, [f"answer {number}" for number in range(20)])
    assert "was trained on Flickr8k &lt;1&gt;, 6,000 images with 7,000 questions." in answers
    assert "Its vqa accuracy on 1,234 test questions was 62.5%." in answers
    assert "It knows 20 answers and no others: answer 0, answer 1," in answers
    assert "answer 12, ..." in answers and "answer 13" not in answers
    assert "calibrated" not in answers
    known = {**RESULTS["test"], "majority_answer": "no", "vqa_accuracy_of_majority_answer": 0.25}
    more = app.describe_answers("it", {**RESULTS, "test": known, "calibration": {"temperature": 1.5}}, ["no"])
    assert "test questions was 62.5%; that of always &#x27;no&#x27; is 25.0%." in more
    assert "Its probabilities were calibrated on validation questions." in more


def test_the_page_says_how_well_boxes_are_known():
    test = {"accuracy@0.5": 0.97, "num_single_target": 6000}
    results = {"data": {"name": "scenes", "train": {"images": 5000, "expressions": 40000}}, "test": test}
    said = app.describe_boxes("it", results)
    assert "was trained on scenes, 5,000 images with 40,000 expressions." in said
    assert "Of 6,000 test expressions that mean one thing its best box was right for 97.0%." in said
    assert "it may answer with a box whatever is written" in said
    test |= {"no_target_accuracy": 0.985, "num_no_target": 1000}
    assert "Of 1,000 that mean nothing in the image it gave no box to 98.5%." in app.describe_boxes("it", results)


@pytest.mark.parametrize("text", [None, "", "no JSON", "[1]", '{"data": null, "test": 3}', '{"data": {"name": 5}}'])
def test_of_a_checkpoint_without_results_nothing_is_claimed(tmp_path, text):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    results = app.read_results(str(tmp_path))
    about = [describe(str(tmp_path), results) for describe in (app.describe_search, app.describe_boxes)]
    for said in (*about, app.describe_answers(str(tmp_path), results, ["no"])):
        assert "so what it was trained on is not known" in said
        assert "%" not in said
    assert "It knows 1 answers and no others: no." in said


def test_of_a_checkpoint_on_the_hub_without_results_nothing_is_claimed_either():
    assert app.read_results("someone/without-results") == {}


def test_results_are_those_beside_the_checkpoint(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    assert app.read_results(str(tmp_path)) == RESULTS


def test_the_page_is_for_this_machine_alone(page):
    assert page.local_url.startswith("http://127.0.0.1:")
    assert page.share_url is None
    assert not page.analytics_enabled
    with urlopen(page.local_url) as response:
        text = response.read().decode()
    assert "fonts.googleapis" not in text
    assert '"share"' not in json.dumps([component["props"].get("buttons") for component in page.config["components"]])


def test_the_page_opens_with_search_and_says_what_answers(page):
    tabs = [component["props"]["label"] for component in page.config["components"] if component["type"] == "tabitem"]
    assert tabs == ["Search", "Ask", "Locate"]
    said = {c["props"].get("elem_id"): c["props"].get("value") for c in page.config["components"]}
    assert "The model in retrieval has no results.json" in said["about-search"]
    assert "The model in answers has no results.json" in said["about-answers"]
    assert "It knows 5 answers and no others" in said["about-answers"]
    assert "The model in boxes was trained on Flickr8k" in said["about-boxes"] and said["threshold"] == 0.25


def test_without_images_the_page_says_how_to_name_them(checkpoint):
    page = app.build_page(checkpoint, {})
    values = [component["props"].get("value") for component in page.config["components"]]
    assert app.NO_INDEX in values
    assert [fn.api_name for fn in page.fns.values() if fn.api_visibility == "public"] == ["ask"]


def test_examples_are_offered_with_their_image(checkpoint):
    page = app.build_page(checkpoint, {}, examples=app.EXAMPLES)
    (samples,) = [c["props"]["samples"] for c in page.config["components"] if c["props"].get("elem_id") == "examples"]
    assert [question for _, question in samples] == list(app.QUESTIONS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--model": "retrieval"}, "--model: .*retrieval is a checkpoint of HiViLTForRetrieval, expected HiViLTForQ"),
        (
            {"--model": "answers", "--retrieval": "answers", "--index": "index"},
            "--retrieval: .*is a checkpoint of HiViLTForQuestionAnswering, expected HiViLTForR",
        ),
        (
            {"--model": "answers", "--captioning": "answers"},
            "--captioning: .*is a checkpoint of HiViLTForQuestionAnswering, expected HiViLTForConditionalGeneration",
        ),
        (
            {"--model": "answers", "--captioning": "captions", "--grounding": "answers"},
            "--grounding: .*is a checkpoint of HiViLTForQuestionAnswering, expected HiViLTForVisualGrounding",
        ),
        ({"--model": "answers", "--images": "image"}, "--images: .*did you mean .*images"),
        ({"--model": "answers", "--pictures": "image"}, "--images: .*did you mean .*images"),
        (
            {"--model": "answers", "--retrieval": "retrieval", "--images": "empty"},
            "--images: .*empty cannot be searched",
        ),
        ({"--model": "answers", "--retrieval": "retrieval", "--index": "nowhere"}, "does not hold an index"),
        ({"--model": "nowhere"}, "--model: there is no folder .*nowhere"),
        ({"--model": "answer"}, "--model: there is no folder .*; did you mean .*answers"),
        ({"--model": "images"}, "--model: the folder .*images has no config.json"),
    ],
)
def test_the_command_line_says_what_is_wrong(place, flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        app.main([word for flag, name in flags.items() for word in (flag, str(place / name))])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prot", "7000"], "^--prot is no flag; did you mean --port"),
        (["--port", "http"], "^--port: invalid int value: 'http'"),
        (["--port", "70000"], "^--host, --port: the page cannot be at 127.0.0.1:70000 .*; give another"),
        (["--host", "256.0.0.1"], "^--host, --port: the page cannot be at 256.0.0.1:7860"),
    ],
)
def test_a_wrong_flag_is_named_before_a_model_is_loaded(flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        app.main([*flags, "--model", "nowhere/at/all"] if "--port" in flags or "--host" in flags else flags)


def test_a_busy_port_names_the_flag(capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match=f"^--host, --port: the page cannot be at .*:{port} .*in use"):
            app.main(["--port", str(port)])
    app.check_address("127.0.0.1", port)


def test_folders_of_the_same_name_are_told_apart_by_their_paths(searching, place, tmp_path):
    other = shutil.copytree(place / "others", tmp_path / "images")
    indexes = app.open_indexes(
        [str(place / "images"), str(other), str(other)], None, searching, str(tmp_path / "scratch")
    )
    assert {name: len(index) for name, index in indexes.items()} == {str(place / "images"): 12, str(other): 2}


def test_an_index_alone_is_searched_as_it_is(searching, place, tmp_path):
    ImageIndex.build(place / "others", *searching, tmp_path)
    indexes = app.open_indexes([], str(tmp_path), searching, "")
    assert {name: len(index) for name, index in indexes.items()} == {"others": 2}
    # One folder goes where run_retrieval.py --index puts it, so what is embedded is not embedded again.
    indexes = app.open_indexes([str(place / "others")], str(tmp_path), searching, "")
    assert not list(tmp_path.glob("others*")) and len(indexes["others"]) == 2


def test_without_gradio_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    spec = importlib.util.spec_from_file_location("app_without_gradio", app.__file__)
    with pytest.raises(ImportError, match=r"pip install 'hivilt\[app\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
