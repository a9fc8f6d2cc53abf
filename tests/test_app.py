"""The page: what its functions answer, the page itself through a client, and what it refuses."""

import importlib.util
import json
import socket
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import gradio as gr
import numpy as np
import pytest
from gradio_client import Client, handle_file
from PIL import Image, ImageOps

from hivilt import HiViLTForQuestionAnswering, HiViLTForRetrieval, app
from hivilt.data.vqa import VQAExample
from hivilt.evaluation.plots import draw_attention
from hivilt.search import ImageIndex
from hivilt.trainers import answer_and_look
from hivilt.training import load_checkpoint
from processes import free_port
from tiny import make_model, make_picture, make_processor

# Gradio's statistics use what pandas 4 will no longer have.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio.queueing")

COLORS = ("red", "blue", "green", "white", "gray", "yellow", "black", "orange", "pink", "brown", "cyan", "purple")
QUESTION = "what color is the circle"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a checkpoint of each head, twelve pictures, and two files that are none."""
    folder = tmp_path_factory.mktemp("place")
    for name, model_class in {"answers": HiViLTForQuestionAnswering, "retrieval": HiViLTForRetrieval}.items():
        make_model(model_class, weight_scale=8).save_pretrained(folder / name)
        make_processor().save_pretrained(folder / name)
    (folder / "pictures").mkdir()
    for color in COLORS:
        make_picture(color).save(folder / "pictures" / f"{color}.png")
    (folder / "no picture <b>.png").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "pictures" / "red.png").read_bytes()[:60])
    return folder


@pytest.fixture(scope="module")
def checkpoint(place) -> tuple:
    return load_checkpoint("--model", str(place / "answers"), HiViLTForQuestionAnswering)


@pytest.fixture
def answerer(checkpoint) -> app.Answerer:
    return app.Answerer(*checkpoint)


@pytest.fixture
def encoded(checkpoint, monkeypatch) -> list[int]:
    """How many pictures each call of `encode_images` was given."""
    model, counts = checkpoint[0].model, []
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda x, *args, **kwargs: counts.append(len(x)) or encode(x, **kwargs))
    return counts


@pytest.fixture(scope="module")
def page(place, tmp_path_factory):
    """The page as the command line starts it, in this process, whatever the environment says about sharing it."""
    kept = []
    flags = {"model": "answers", "retrieval": "retrieval", "index": "index", "pictures": "pictures"}
    argv = [word for flag, name in flags.items() for word in (f"--{flag}", str(place / name))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_SHARE", "true")
        patch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        patch.setattr(gr.networking, "setup_tunnel", lambda **kwargs: "https://everywhere")
        patch.setattr(gr.Blocks, "block_thread", lambda page: kept.append(page))
        app.main([*argv, "--port", str(free_port())])
        yield kept[0]
        kept[0].close(verbose=False)


@pytest.fixture(scope="module")
def client(page, tmp_path_factory) -> Client:
    downloads = tmp_path_factory.mktemp("downloads")
    quiet = {"verbose": False, "analytics_enabled": False}
    # By default an answer must begin within five seconds, however much else the machine has to do.
    return Client(page.local_url, download_files=downloads, httpx_kwargs={"timeout": 600}, **quiet)


def uploaded(path: Path) -> dict:
    return handle_file(str(path))


def test_says_what_the_model_answers_and_shows_where_it_looked(answerer, checkpoint, place):
    picture = str(place / "pictures" / "red.png")
    answers, looked, note = answerer.ask(picture, QUESTION)
    (expected,) = answer_and_look(*checkpoint, [VQAExample("", picture, picture, QUESTION, ())], 5)
    assert answers == pytest.approx({one["answer"]: one["score"] for one in expected.predictions}, abs=1e-5)
    assert len(answers) == 5
    assert sum(answers.values()) == pytest.approx(1)
    # A small picture is enlarged, so that the cells of its grid blend smoothly.
    assert looked.size == (512, 380)
    overlay = draw_attention(ImageOps.contain(make_picture("red"), (512, 512)), expected.attention)
    assert np.abs(np.asarray(looked, dtype=float) - np.asarray(overlay)).max() <= 2
    assert note.startswith("Picture encoded in ")


def test_a_picture_is_encoded_once_for_all_its_questions(answerer, encoded, place):
    red, blue = (str(place / "pictures" / f"{color}.png") for color in ("red", "blue"))
    notes = [answerer.ask(red, question)[2] for question in (QUESTION, "is there a red square", "what shape")]
    assert encoded == [1]
    assert ["encoded before" in note for note in notes] == [False, True, True]
    answers = [answerer.ask(picture, QUESTION)[0] for picture in (blue, red)]
    assert encoded == [1, 1]
    assert answers[0] != answers[1]


def test_without_local_fusion_there_is_nothing_to_see(place):
    blind = make_model(HiViLTForQuestionAnswering, use_local_fusion=False)
    answers, looked, _ = app.Answerer(blind, make_processor()).ask(str(place / "pictures" / "red.png"), QUESTION)
    assert looked is None
    assert len(answers) == 5


def test_the_page_answers_and_goes_on_after_what_it_refuses(client, answerer, place):
    red = place / "pictures" / "red.png"
    expected, overlay, _ = answerer.ask(str(red), QUESTION)
    for picture, question, message in [
        (None, QUESTION, "no picture yet"),
        (uploaded(red), "  ", "no question yet"),
        (uploaded(place / "cut.png"), QUESTION, r"^'cut\.png' is not a readable picture"),
        (uploaded(place / "no picture <b>.png"), QUESTION, r"^'no picture b\.png' is not a readable picture"),
    ]:
        with pytest.raises(gr.exceptions.AppError, match=message):
            client.predict(picture, question, api_name="/ask")
        label, looked, _ = client.predict(uploaded(red), QUESTION, api_name="/ask")
        found = {one["label"]: one["confidence"] for one in label["confidences"]}
        assert found == pytest.approx(expected, abs=1e-5)
        with Image.open(looked) as shown:
            assert shown.format == "PNG"
            assert shown.size == overlay.size


def test_the_page_reads_only_what_was_uploaded(page, place):
    outside = {"path": str(place / "pictures" / "red.png"), "meta": {"_type": "gradio.FileData"}}
    for picture in (outside, {"path": outside["path"]}, outside["path"]):
        data = json.dumps({"data": [picture, QUESTION]}).encode()
        call = f"{page.local_url}gradio_api/call/ask"
        with urlopen(Request(call, data, {"Content-Type": "application/json"})) as response:
            event = json.load(response)["event_id"]
        with urlopen(f"{call}/{event}") as response:
            assert response.read().startswith(b"event: error")


def test_the_page_searches_by_words_and_by_picture(client, place):
    index = ImageIndex.load(
        place / "index", *load_checkpoint("--retrieval", str(place / "retrieval"), HiViLTForRetrieval)
    )
    like = place / "pictures" / "green.png"
    for words, picture, rerank, hits in [
        ("red circle", None, False, index.search("red circle", 10)),
        ("red circle", None, True, index.search("red circle", 10, rerank_k=32)),
        ("", like, True, index.search(like, 10)),
    ]:
        found = client.predict(words, picture and uploaded(picture), rerank, api_name="/search")
        assert [one["caption"] for one in found] == [f"{hit.score:.3f} {hit.path.stem}" for hit in hits]
        assert len(found) == 10
        with Image.open(found[0]["image"]) as shown, Image.open(hits[0].path) as best:
            assert shown.getpixel((400, 300)) == best.getpixel((24, 18))
    assert found[0]["caption"] == "1.000 green"

    for words, picture in [(" ", None), ("red", like)]:
        with pytest.raises(gr.exceptions.AppError, match="one of the two"):
            client.predict(words, picture and uploaded(picture), False, api_name="/search")


def test_the_page_is_for_this_machine_alone(page):
    assert page.local_url.startswith("http://127.0.0.1:")
    assert page.share_url is None
    assert not page.analytics_enabled
    with urlopen(page.local_url) as response:
        text = response.read().decode()
    assert "fonts.googleapis" not in text
    assert '"share"' not in json.dumps([component["props"].get("buttons") for component in page.config["components"]])


def test_without_an_index_the_page_says_how_to_make_one(checkpoint):
    page = app.build_page(*checkpoint)
    values = [component["props"].get("value") for component in page.config["components"]]
    assert app.NO_INDEX in values
    assert [fn.api_name for fn in page.fns.values() if fn.api_visibility == "public"] == ["ask"]


def test_examples_are_offered_with_their_picture(checkpoint):
    page = app.build_page(*checkpoint, examples=app.EXAMPLES)
    (samples,) = [c["props"]["samples"] for c in page.config["components"] if c["type"] == "dataset"]
    assert [question for _, question in samples] == list(app.QUESTIONS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--model": "retrieval"}, "--model: .*retrieval is a checkpoint of HiViLTForRetrieval, expected HiViLTForQ"),
        (
            {"--model": "answers", "--retrieval": "answers", "--index": "index"},
            "--retrieval: .*is a checkpoint of HiViLTForQuestionAnswering, expected HiViLTForR",
        ),
        ({"--model": "answers", "--pictures": "pictures"}, "--pictures needs --index"),
        ({"--model": "answers", "--pictures": "picture", "--index": "index"}, "--pictures: .*did you mean .*pictures"),
        ({"--model": "answers", "--retrieval": "retrieval", "--index": "nowhere"}, "does not hold an index"),
        ({"--model": "nowhere"}, "--model: there is no folder .*nowhere"),
        ({"--model": "answer"}, "--model: there is no folder .*; did you mean .*answers"),
        ({"--model": "pictures"}, "--model: the folder .*pictures has no config.json"),
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
        (["--port", "70000"], "^--port: expected a number from 1 to 65535, got 70000"),
        (["--host", "256.0.0.1"], "^--host: '256.0.0.1' is no address"),
    ],
)
def test_a_wrong_flag_is_named_before_a_model_is_loaded(flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        app.main([*flags, "--model", "nowhere/at/all"] if "--port" in flags or "--host" in flags else flags)


def test_a_busy_port_names_the_flag(capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match=f"^--port: {port} cannot be had .*give another, such as --port"):
            app.main(["--port", str(port)])
    app.check_address("127.0.0.1", port)


def test_without_gradio_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    spec = importlib.util.spec_from_file_location("app_without_gradio", app.__file__)
    with pytest.raises(ImportError, match=r"pip install 'hivilt\[app\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
