"""A page to try HiViLT in the browser: ask a picture questions, and search pictures by words or by a picture.

    python app.py                                                  this repository's own weights
    python app.py --model outputs/mine                             another question answering checkpoint
    python app.py --index outputs/index --pictures ~/Pictures      embeds these pictures first, then searches them
    python app.py --index outputs/index                            searches what was embedded before

Open the address that it prints. Nothing leaves this machine, and only this machine sees the page unless --host says so.
"""

import argparse
import errno
import functools
import html
import re
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps

from hivilt import HiViLTForQuestionAnswering, HiViLTForRetrieval, HiViLTProcessor
from hivilt.data.tables import open_picture
from hivilt.data.vqa import VQAExample
from hivilt.evaluation.plots import draw_attention
from hivilt.flags import Parser
from hivilt.modeling_hivilt import HiViLTImageStates
from hivilt.search import ImageIndex
from hivilt.trainers import answer_and_look
from hivilt.training import end_with, load_checkpoint, missing_place, run_command

try:
    import gradio as gr
except ImportError as error:
    missing = ImportError("The page needs Gradio: pip install 'hivilt[app]', in a clone -e '.[app]'")
    if __name__ == "__main__":
        end_with(missing)
    raise missing from error

ROOT = Path(__file__).resolve().parent
QUESTIONS = ("what shape is in the image?", "what color is the shape?", "is there a blue shape?")
EXAMPLES = [(ROOT / "docs" / "picture.png", question) for question in QUESTIONS]
NO_INDEX = "There are no pictures to search: start with `python app.py --index outputs/index --pictures ~/Pictures`."

TOP_ANSWERS, TOP_PICTURES, RERANKED = 5, 10, 32
REMEMBERED = 16  # pictures whose states stay in memory
SHOWN = (512, 512)  # pixels that a picture is scaled to fit, small or large
CSS = """
#picture img, #looked img { width: 100%; height: 100%; object-fit: contain }
#examples .container { width: 2.5rem; height: 2.5rem }
"""
# Gradio would take most of these from the environment. Nothing is shared, recorded or handed to other programs.
LAUNCH = {
    **{"share": False, "run_history": False, "enable_monitoring": False, "mcp_server": False, "ssr_mode": False},
    **{"footer_links": [], "css": CSS, "quiet": True, "prevent_thread_lock": True},
}


def told(function: Callable, uploads: Path) -> Callable:
    """For events with `preprocess=False`: gives a function pictures by path, and shows on the page what it refuses.

    Gradio would open them itself, and where it cannot, speak of its own inner workings.
    """

    def path_of(picture: dict) -> str | None:
        # Gradio itself does not look, where a request leaves out that it means an upload.
        if picture["path"] and not Path(picture["path"]).resolve().is_relative_to(uploads):
            raise ValueError("Only pictures that were uploaded are read.")
        return picture["path"]

    def wrapped(*values):
        try:
            return function(*(path_of(value) if isinstance(value, dict) else value for value in values))
        except (ValueError, TypeError, OSError) as error:
            message = re.sub(rf"{re.escape(str(uploads))}\S*[/\\]", "", str(error))
            # Gradio takes messages for HTML.
            raise gr.Error(html.escape(message, quote=False), print_exception=False) from error

    return wrapped


class Answerer:
    """Answers questions about pictures with a checkpoint. Each picture is encoded once, however many it is asked."""

    def __init__(self, model: HiViLTForQuestionAnswering, processor: HiViLTProcessor) -> None:
        self.model = model
        self.processor = processor
        # By path, which tells pictures apart: Gradio names what is uploaded by a hash of its contents.
        self.encode = functools.lru_cache(REMEMBERED)(self._encode)

    @torch.no_grad()
    def _encode(self, picture: str) -> HiViLTImageStates:
        pixel_values = self.processor(images=picture, return_tensors="pt")["pixel_values"]
        return self.model.encode_images(pixel_values.to(self.model.device))

    def ask(self, picture: str | None, question: str) -> tuple[dict[str, float], Image.Image | None, str]:
        """The best answers with their probabilities, where the model looked, and how long it took.

        Raises:
            ValueError: there is no picture (its path) or no question, or the picture cannot be read.
            FileNotFoundError: the picture is gone.
        """
        if picture is None:
            raise ValueError("There is no picture yet: drop one on the left, or take an example.")
        if not question.strip():
            raise ValueError("There is no question yet: write one below the picture.")
        misses, start = self.encode.cache_info().misses, time.perf_counter()
        states = self.encode(picture)
        encoded = time.perf_counter()
        example = VQAExample("", picture, picture, question, ())
        (answered,) = answer_and_look(self.model, self.processor, [example], TOP_ANSWERS, states)
        done = time.perf_counter()

        looked = None
        if answered.attention is not None:
            looked = draw_attention(ImageOps.contain(answered.image, SHOWN), answered.attention)
        is_new = self.encode.cache_info().misses > misses
        first = f"encoded in {1000 * (encoded - start):.0f} ms" if is_new else "encoded before"
        note = f"Picture {first}, question answered in {1000 * (done - encoded):.0f} ms."
        return {one["answer"]: one["score"] for one in answered.predictions}, looked, note


def search(index: ImageIndex, words: str, picture: str | None, rerank: bool) -> list[tuple[Image.Image, str]]:
    """The best pictures of an index for words or for a picture (its path), each with its score and name.

    Raises:
        ValueError: there is nothing to look for, or both words and a picture, or a picture cannot be read.
        FileNotFoundError: a picture is gone.
    """
    if bool(words.strip()) == (picture is not None):
        raise ValueError("Give words to look for, or a picture to find others like it: one of the two.")
    query = words if picture is None else Path(picture)
    hits = index.search(query, TOP_PICTURES, rerank_k=RERANKED if rerank and picture is None else 0)
    return [(ImageOps.contain(open_picture(str(hit.path)), SHOWN), f"{hit.score:.3f} {hit.path.stem}") for hit in hits]


def build_page(
    model: HiViLTForQuestionAnswering,
    processor: HiViLTProcessor,
    index: ImageIndex | None = None,
    examples: Sequence[tuple[Path, str]] = (),
) -> gr.Blocks:
    """The page, to be launched with `LAUNCH`.

    Args:
        model, processor: a question answering checkpoint, `model` in evaluation mode.
        index: pictures to search; `None`: the page says how to make one.
        examples: picture files with questions to begin with.
    """
    # Of Gradio's buttons "share" is left out: it sends pictures away.
    upload = {"sources": ["upload", "clipboard"], "buttons": ["fullscreen"]}
    shown = {"format": "png", "interactive": False, "buttons": ["fullscreen", "download"]}
    with gr.Blocks(title="HiViLT", analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True) as page:
        gr.Markdown("# HiViLT\nAsk pictures questions, and find pictures by words or by a picture.")
        with gr.Tab("Ask"), gr.Row():
            with gr.Column():
                picture = gr.Image(label="Picture", elem_id="picture", height=360, **upload)
                question = gr.Textbox(label="Question", placeholder="what shape is in the image?", elem_id="question")
                button = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column():
                looked = gr.Image(label="Where the model looked", elem_id="looked", height=320, **shown)
                note = gr.Markdown(elem_id="note")
            with gr.Column():
                answers = gr.Label(label="Answers", num_top_classes=TOP_ANSWERS, elem_id="answers")
                if examples:
                    rows = [[str(path), text] for path, text in examples]
                    gr.Examples(rows, [picture, question], elem_id="examples")
        with gr.Tab("Search"):
            if index is None:
                gr.Markdown(NO_INDEX)
            else:
                with gr.Row():
                    with gr.Column(scale=1):
                        words = gr.Textbox(label="Words", placeholder="red heart", elem_id="words")
                        like = gr.Image(label="or a picture", elem_id="like", height=220, **upload)
                        rerank = gr.Checkbox(label="re-rank by fusion (words only)", elem_id="rerank")
                        find = gr.Button("Search", variant="primary", elem_id="search")
                    grid = {"columns": 5, "height": "auto", "object_fit": "contain"}
                    label = f"The best of {len(index):,} pictures, with their scores"
                    found = gr.Gallery(label=label, elem_id="found", scale=3, **grid, **shown)

        # One call of each at a time: looking switches the model's attention meanwhile, re-ranking fills the index's memory.
        uploads = Path(page.GRADIO_CACHE).resolve()
        one = {"preprocess": False, "concurrency_limit": 1}
        ask, outputs = told(Answerer(model, processor).ask, uploads), [answers, looked, note]
        gr.on([button.click, question.submit], ask, [picture, question], outputs, api_name="ask", **one)
        # Beside another picture the old answer would mislead.
        picture.change(lambda: (None, None, ""), None, outputs, api_visibility="private")
        if index is not None:
            look, inputs = told(functools.partial(search, index), uploads), [words, like, rerank]
            gr.on([find.click, words.submit], look, inputs, found, api_name="search", **one)
    return page


def check_address(host: str, port: int) -> None:
    """Looks whether the page can be served there; Gradio would say so after the models are loaded, in names of its own.

    Raises:
        ValueError: the port is none.
        OSError: it is taken, or not for this user, or the host is not this machine's; names the flag.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"--port: expected a number from 1 to 65535, got {port}.")
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise OSError(f"--host: {host!r} is no address ({error.strerror}).") from error
    with socket.socket(family, kind) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise OSError(f"--host: {host!r} is no address of this machine.") from error
            another = port + 1 if 1024 <= port < 65535 else 7861
            raise OSError(
                f"--port: {port} cannot be had ({error.strerror}); give another, such as --port {another}."
            ) from error


def main(argv: list[str] | None = None) -> None:
    """Serves the page as the flags ask (`argv`; unset, the command line) until it is stopped.

    Raises:
        ValueError, OSError: a flag is wrong; names it.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT), help="question answering checkpoint, a folder or a Hub name")
    parser.add_argument("--retrieval", default=str(ROOT / "retrieval"), help="retrieval checkpoint, likewise")
    parser.add_argument("--index", help="folder of the index to search, as run_retrieval.py --index makes it too")
    parser.add_argument("--pictures", help="folder of pictures to embed into --index first; only what is new is")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: anyone may ask")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    args = parser.parse_args(argv)
    if args.pictures and not args.index:
        raise ValueError("--pictures needs --index, the folder where their embeddings go")
    if args.pictures and not Path(args.pictures).is_dir():
        raise missing_place("--pictures", args.pictures)
    check_address(args.host, args.port)
    model, processor = load_checkpoint("--model", args.model, HiViLTForQuestionAnswering)
    index = None
    if args.index:
        searching = load_checkpoint("--retrieval", args.retrieval, HiViLTForRetrieval)
        if args.pictures:
            index = ImageIndex.build(args.pictures, *searching, args.index, on_bad_image="skip")
        else:
            index = ImageIndex.load(args.index, *searching)
    page = build_page(model, processor, index, EXAMPLES if args.model == str(ROOT) else ())
    page.launch(server_name=args.host, server_port=args.port, **LAUNCH)
    print(f"The page is at {page.local_url} until Ctrl+C.", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_command(main)
