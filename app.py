"""A page to try HiViLT in the browser: find photographs by words or by an image, ask them questions, and see where in them
things are.

    python app.py                                               the photographs of this repository
    python app.py --images ~/Pictures ~/Scans                   folders of your own; the page lets you choose one
    python app.py --images ~/Pictures --index outputs/index     keeps what it embeds, so that the next start is fast
    python app.py --index outputs/index                         searches what was embedded before
    python app.py --images ~/Pictures --ask_all                 asks all of them a question, too
    python app.py --model outputs/mine                          another question answering checkpoint
    python app.py --captioning outputs/mine                     another one that writes captions
    python app.py --grounding outputs/mine                      another one that draws boxes

Open the address that it prints. Nothing leaves this machine, and only this machine sees the page unless --host says so.
"""

import argparse
import functools
import hashlib
import html
import json
import re
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageOps
from transformers.utils import ModelOutput, cached_file

from hivilt import (
    HiViLTForConditionalGeneration,
    HiViLTForQuestionAnswering,
    HiViLTForRetrieval,
    HiViLTForVisualGrounding,
    HiViLTProcessor,
)
from hivilt.data.tables import file_stamp, open_image
from hivilt.evaluation.familiarity import is_familiar
from hivilt.fusion_hivilt import HiViLTImageStates
from hivilt.modeling_hivilt import HiViLTPreTrainedModel
from hivilt.search import ImageIndex
from hivilt.training.command import end_with, run_command
from hivilt.training.flags import Parser
from hivilt.training.models import load_checkpoint
from hivilt.training.names import missing_place

try:
    import gradio as gr
except ImportError as error:
    missing = ImportError("The page needs Gradio: pip install 'hivilt[app]', in a clone -e '.[app]'")
    if __name__ == "__main__":
        end_with(missing)
    raise missing from error

ROOT = Path(__file__).resolve().parent
# The checkpoints that are used unless others are named.
RETRIEVAL, ANSWERING, CAPTIONING, GROUNDING = ROOT, ROOT / "vqa", ROOT / "captioning", ROOT / "grounding"
PHOTOGRAPHS = ROOT / "docs" / "photographs"
QUESTIONS = ("what shape is in the image?", "what color is the shape?", "is there a blue shape?")
EXAMPLES = [(ROOT / "docs" / "drawing.png", question) for question in QUESTIONS]
SCENE = [
    (
        ROOT / "docs" / "scene.png",
        "the leftmost large blue shape\nall small crosses below the large circle\nthe purple circle",
    )
]
NO_INDEX = 'There are no images to search: start with `make app ARGS="--images ~/Pictures"`.'
NO_IMAGE = "There is no image yet: open one in Search, upload one, or take an example."
NOTHING = "nothing of that is in the image"
UNFAMILIAR = "This image is unlike all that the model was trained on: its answers mean little, however sure they look."

TOP_ANSWERS, TOP_IMAGES, RERANKED, BROWSED = 3, 10, 32, 20
MOST_QUESTIONS, KEPT_QUESTIONS, NAMED_ANSWERS = 32, 100, 13
REMEMBERED = 16  # images whose states stay in memory
# Of each expression another one, by Okabe and Ito, which all eyes tell apart.
BOX_COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")
THRESHOLD = 0.5  # where the checkpoint does not say which one it was measured with
# Pixels that an image is scaled to fit: among others, by itself, and in the history.
SMALL, LARGE, THUMB = (512, 512), (1024, 1024), (96, 96)
CSS = """
#image img, #like img, #located img, #boxes img { width: 100%; height: 100%; object-fit: contain }
#found .grid-wrap { min-height: 0; max-height: none; overflow: visible }
#examples .container { width: 2.5rem; height: 2.5rem }
.html-container { padding: 0 !important }
.about, .note { margin: 0 }
.about, .asked .question, .asked .others { opacity: .75 }
.note.error { padding: .5rem .75rem; border-left: 4px solid #dc2626 }
.asked { list-style: none; margin: 0; padding: 0 }
.asked li { display: flex; gap: .75rem; margin: 0; padding: .5rem 0; border-bottom: 1px solid var(--border-color-primary) }
.asked div { flex: 1; min-width: 0; overflow-wrap: anywhere }
.asked img { width: 48px; height: 48px; object-fit: contain; flex: none; margin: 0 }
.asked .best { font-size: var(--text-xl); font-weight: 600 }
.asked .color { width: 1.25rem; flex: none }
#history .best { font-size: inherit }
@media (max-width: 640px) {
  .gradio-container { padding: var(--size-3) !important }
  .about { font-size: var(--text-sm) }
  #image, #located { height: 220px !important }
  #found .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important }
  button { min-width: 40px !important; min-height: 40px !important }
  input:not([type=checkbox]), #rerank label { min-height: 40px }
  .tab-container { height: 41px !important }
  #more .label-wrap { align-items: center }
}
"""
# Gradio would take most of these from the environment. Nothing is shared, recorded or handed to other programs.
LAUNCH = dict.fromkeys(("share", "run_history", "enable_monitoring", "mcp_server", "ssr_mode"), False)
LAUNCH |= {"footer_links": [], "css": CSS, "quiet": True, "prevent_thread_lock": True}
TO_TOP = "() => window.scrollTo({top: 0})"
# On a phone they may be below the edge of the screen.
TO_FOUND = """() => setTimeout(() => {
  if (innerWidth <= 640) document.getElementById("found-note").scrollIntoView()
}, 100)"""
TO_ANSWERS = """() => setTimeout(() => {
  for (const id of ["answers", "note"]) document.getElementById(id)?.scrollIntoView({block: "nearest"})
}, 100)"""
TO_BOXES = """() => setTimeout(() => document.getElementById("boxes")?.scrollIntoView({block: "nearest"}), 100)"""


def read_results(name: str) -> dict[str, Any]:
    """What the run that made a checkpoint measured: the `results.json` in its folder or on the Hub; empty without one."""
    try:
        results = json.loads(Path(cached_file(name, "results.json")).read_text(encoding="utf-8"))
        return results if isinstance(results["data"]["name"], str) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def number(results: Mapping[str, Any], *keys: str) -> float | None:
    for key in keys:
        results = results.get(key) if isinstance(results, Mapping) else None
    return results if isinstance(results, int | float) else None


def describe_training(name: str, results: Mapping[str, Any], unit: str) -> str:
    model = f"The model in {Path(name).resolve().name}" if Path(name).is_dir() else f"The model {name}"
    if not results:
        return f"{model} has no results.json beside it, so what it was trained on is not known."
    counts = {what: number(results, "data", "train", what) for what in ("images", unit)}
    known = " with ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    return f"{model} was trained on {results['data']['name']}{known and f', {known}'}."


def describe_search(name: str, results: Mapping[str, Any]) -> str:
    """What a retrieval checkpoint was trained on and how well it finds, in HTML."""
    sentences = [describe_training(name, results, "captions")]
    for split in ("test", "validation"):
        first, ten = (number(results, split, f"embedding_text_to_image_recall@{k}") for k in (1, 10))
        images = number(results, "data", split, "images")
        if images and first is not None and ten is not None:
            shares = f"first in {first:.1%}, and among the first ten in {ten:.1%}"
            sentences.append(f"Of {images:,} {split} images it found a caption's own {shares}.")
            break
    return about(sentences)


def describe_answers(name: str, results: Mapping[str, Any], answers: Sequence[str]) -> str:
    """What a question answering checkpoint was trained on, how often it was right, and what it can answer, in HTML."""
    sentences = [describe_training(name, results, "questions")]
    metric = str(results.get("settings", {}).get("metric_for_best_model")).removeprefix("eval_")
    metric = "accuracy" if metric in ("None", "loss") else metric
    for split in ("test", "validation"):
        share, questions = number(results, split, metric), number(results, split, "num_questions")
        if share is not None and questions:
            said = f"Its {metric.replace('_', ' ')} on {questions:,} {split} questions was {share:.1%}"
            baseline = number(results, split, f"{metric}_of_majority_answer")
            if baseline is not None:
                said += f"; that of always {results[split]['majority_answer']!r} is {baseline:.1%}"
            sentences.append(f"{said}.")
            break
    if number(results, "calibration", "temperature") is not None:
        sentences.append("Its probabilities were calibrated on validation questions.")
    named = ", ".join(answers[:NAMED_ANSWERS]) + (", ..." if len(answers) > NAMED_ANSWERS else "")
    sentences.append(f"It knows {len(answers):,} answers and no others: {named}.")
    return about(sentences)


def describe_boxes(name: str, results: Mapping[str, Any]) -> str:
    """What a grounding checkpoint was trained on, and how often its boxes were right, in HTML."""
    sentences = [describe_training(name, results, "expressions")]
    for split in ("test", "validation"):
        share, expressions = (number(results, split, key) for key in ("accuracy@0.5", "num_single_target"))
        if share is None or not expressions:
            continue
        sentences.append(
            f"Of {expressions:,} {split} expressions that mean one thing its best box was right for {share:.1%}."
        )
        refused, nothing = (number(results, split, key) for key in ("no_target_accuracy", "num_no_target"))
        if refused is not None and nothing:
            sentences.append(f"Of {nothing:,} that mean nothing in the image it gave no box to {refused:.1%}.")
        else:
            sentences.append(
                "None of them meant nothing in the image, so it may answer with a box whatever is written."
            )
        break
    return about(sentences)


def about(sentences: Sequence[str]) -> str:
    return f'<p class="about">{html.escape(" ".join(sentences))}</p>'


class _Asker:
    """Runs a checkpoint, its model in evaluation mode, on texts about images; encodes each image once. `familiarity` is what
    `measure_familiarity` gave for it; `None`: every image counts as familiar."""

    def __init__(self, model: HiViLTPreTrainedModel, processor: HiViLTProcessor, familiarity: Mapping | None = None):
        self.model, self.processor, self.familiarity = model, processor, familiarity
        # By path, which tells images apart: Gradio names what is uploaded by a hash of its contents.
        self.encode = functools.lru_cache(REMEMBERED)(self._encode)

    @torch.no_grad()
    def _encode(self, image: str) -> tuple[HiViLTImageStates, bool]:
        """The image's states, and whether it is like those of training."""
        pixel_values = self.processor(images=image, return_tensors="pt")["pixel_values"].to(self.model.device)
        maps = self.model.get_feature_maps(pixel_values)
        familiar = self.familiarity is None or bool(is_familiar(self.familiarity, maps))
        return self.model.encode_images(feature_maps=maps), familiar

    @torch.no_grad()
    def _run(
        self, image: str, texts: Sequence[str], unit: str, done: str, read: Callable[[ModelOutput], Sequence]
    ) -> tuple[dict[str, Any], bool, str]:
        """What `read` makes of the model's outputs, by text; whether the image is like those of training; and a line that says
        how long it took until so many of a `unit` were `done`."""
        misses, start = self.encode.cache_info().misses, time.perf_counter()
        states, familiar = self.encode(image)
        encoded = time.perf_counter()
        inputs = self.processor(text=texts, return_tensors="pt").to(self.model.device)
        image_index = torch.zeros(len(texts), dtype=torch.long, device=self.model.device)
        found = read(self.model(**inputs, image_states=states, image_index=image_index))
        end = time.perf_counter()

        is_new = self.encode.cache_info().misses > misses
        first = f"encoded in {1000 * (encoded - start):.0f} ms" if is_new else "encoded before"
        count = f"1 {unit}" if len(texts) == 1 else f"{len(texts)} {unit}s"
        note = f"Image {first}, {count} {done} in {1000 * (end - encoded):.0f} ms."
        return dict(zip(texts, found, strict=True)), familiar, note


class Answerer(_Asker):
    """Answers questions about images with a checkpoint of [`HiViLTForQuestionAnswering`]."""

    def ask(self, image: str | None, text: str) -> tuple[dict[str, list[dict[str, Any]]], bool, str]:
        """The best answers to each question with their probabilities; whether the image is like those of training; and a
        line that says how long it took.

        The questions in `text` are one a line; empty lines and repetitions are left out.
        """
        if image is None:
            raise ValueError(NO_IMAGE)
        questions = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
        if not questions:
            raise ValueError("There is no question yet: write one below the image.")
        if len(questions) > MOST_QUESTIONS:
            raise ValueError(f"{len(questions)} questions are too many at once; ask up to {MOST_QUESTIONS}.")
        answers = lambda outputs: self.processor.post_process_question_answering(
            outputs.logits, TOP_ANSWERS, config=self.model.config
        )
        return self._run(image, questions, "question", "answered", answers)


class Captioner:
    """Writes a caption of an image with a checkpoint, its model in evaluation mode; once for each image."""

    def __init__(self, model: HiViLTForConditionalGeneration, processor: HiViLTProcessor):
        self.model, self.processor = model, processor
        # A file of a folder may change.
        self._written = functools.lru_cache(KEPT_QUESTIONS)(lambda image, stamp: self._caption(image))

    def caption(self, image: str) -> str:
        return self._written(image, file_stamp(image))

    def _caption(self, image: str) -> str:
        written = self.model.generate(**self.processor(images=image, return_tensors="pt").to(self.model.device))
        return self.processor.batch_decode(written, skip_special_tokens=True)[0].strip()


class Grounder(_Asker):
    """Finds in images what expressions mean with a checkpoint of [`HiViLTForVisualGrounding`].

    Raises:
        ValueError: the image processor does not show whole images, see [`HiViLTProcessor.check_whole_images`].
    """

    def __init__(self, model: HiViLTForVisualGrounding, processor: HiViLTProcessor):
        processor.check_whole_images()
        super().__init__(model, processor)

    def find(self, image: str | None, text: str, threshold: float) -> tuple[dict[str, dict[str, list]], str]:
        """For each expression the `scores` of what it means, the best first, all above `threshold`, and the `boxes`: left,
        top, right and bottom in parts of the image. And a line that says how long it took.

        The expressions in `text` are one a line, or between semicolons; empty ones and repetitions are left out.
        """
        if image is None:
            raise ValueError(NO_IMAGE)
        expressions = list(dict.fromkeys(one.strip() for one in re.split("[\n;]", text) if one.strip()))
        if not expressions:
            raise ValueError("There is nothing to look for yet: write below the image what it is.")
        if len(expressions) > len(BOX_COLORS):
            raise ValueError(f"{len(expressions)} expressions are too many at once; look for up to {len(BOX_COLORS)}.")

        def boxes(outputs: ModelOutput) -> list[dict[str, list]]:
            found = self.processor.post_process_grounding(outputs, threshold=threshold)
            return [{name: values.tolist() for name, values in one.items()} for one in found]

        found, _, note = self._run(image, expressions, "expression", "looked for", boxes)
        return found, note


def with_boxes(image: Image.Image, found: Mapping[str, Mapping[str, list]]) -> Image.Image:
    """An image with the boxes of each expression in its color, in a frame of white that shows on dark images; a small image
    is enlarged, so that lines stay thin."""
    factor = max(1, min(SMALL) // max(image.size))
    image = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    brush, width = ImageDraw.Draw(image), max(1, max(image.size) // 200)
    for color, one in zip(BOX_COLORS, found.values(), strict=False):
        for box in one["boxes"]:
            left, top, right, bottom = (edge * side for edge, side in zip(box, image.size * 2, strict=True))
            # Around it, so that nothing of the thing is hidden, but within the image; PIL's last pixel is inside.
            line = [max(left - width, 0), max(top - width, 0)]
            line += [min(right - 1 + width, image.width - 1), min(bottom - 1 + width, image.height - 1)]
            line[2:] = max(line[0], line[2]), max(line[1], line[3])
            around = (line[0] - width, line[1] - width, line[2] + width, line[3] + width)
            brush.rectangle(around, outline="white", width=width)
            brush.rectangle(line, outline=color, width=width)
    return image


def show_boxes(found: Mapping[str, Mapping[str, list]]) -> str:
    """A list in HTML of expressions with the color and the scores of their boxes."""
    rows = []
    for color, (expression, one) in zip(BOX_COLORS, found.items(), strict=False):
        best = ", ".join(f"{score:.2f}" for score in one["scores"]) or NOTHING
        row = f'<span class="question">{html.escape(expression)}</span><br><span class="best">{best}</span>'
        background = f"background: {color}" if one["scores"] else f"border: 1px solid {color}"
        rows.append(f'<li><span class="color" style="{background}"></span><div>{row}</div></li>')
    return f'<ul class="asked">{"".join(rows)}</ul>'


def percent(share: float) -> str:
    """A probability in words that never say that something is certain."""
    return "> 99 %" if share > 0.99 else "< 1 %" if share < 0.01 else f"{100 * share:.0f} %"


def show_answers(asked: Sequence[tuple[str, list[dict[str, Any]], str]], all_answers: bool) -> str:
    """A list in HTML of questions, their predictions (only the best, or all) and small images (sources, "" for none)."""
    rows = []
    for question, predictions, thumb in asked:
        best, *others = [html.escape(f"{answer['answer']} {percent(answer['score'])}") for answer in predictions]
        row = f'<span class="question">{html.escape(question)}</span><br><span class="best">{best}</span>'
        if all_answers and others:
            row += f'<br><span class="others">or {", ".join(others)}</span>'
        image = f'<img src="{thumb}" alt="">' if thumb else ""
        rows.append(f"<li>{image}<div>{row}</div></li>")
    return f'<ul class="asked">{"".join(rows)}</ul>' if rows else ""


def search(index: ImageIndex, words: str, image: str | None, rerank: bool) -> tuple[str, list[tuple[Path, str]]]:
    """What to say of a search for words or for images like one, and the best images with a caption each; without either
    the first images of the folder."""
    words = words.strip()
    if words and image is not None:
        raise ValueError("Give words to look for, or an image to find others like it: one of the two.")
    count = f"{len(index):,} images" if len(index) > 1 else "1 image"
    if not words and image is None:
        shown = [index.folder / name for name in index.dataset[:BROWSED]["image"]]
        first = "" if len(shown) == len(index) else f", the first {len(shown)} of them below"
        return f"{count} to search{first}. Open one to ask about it.", [(path, path.stem) for path in shown]
    what, query = (f"“{words}”", words) if image is None else ("the image", Path(image))
    hits = index.search(query, TOP_IMAGES, rerank_k=RERANKED if rerank and words else 0)
    note = f"The {len(hits)} nearest of {count} to {what}, with their similarity, from -1 to 1 and no probability."
    return f"{note}{told_of_changed(index)} Open one to ask about it.", [
        (hit.path, f"{hit.path.stem} {hit.score:.2f}") for hit in hits
    ]


def ask_all(index: ImageIndex, question: str, answer: str) -> tuple[str, list[tuple[Path, str]]]:
    """What to say of a question about every image of a folder, and the first of them with their answers; sorted by the
    probability of each one's best answer, or of one that is named."""
    start, answer = time.perf_counter(), answer.strip()
    answers = index.ask(question, BROWSED, answer or None)
    took = 1000 * (time.perf_counter() - start)
    count = f"{len(index):,} images" if len(index) > 1 else "1 image"
    first = "" if len(answers) == len(index) else f", the first {len(answers)} of them below"
    note = f"{count} asked in {took:.0f} ms, without encoding any of them again{first}.{told_of_changed(index)}"
    return f"{note} Open one to ask about it.", [(one.path, f"{one.answer} {percent(one.score)}") for one in answers]


def told_of_changed(index: ImageIndex) -> str:
    """What to say of images that are no longer those that were encoded; nothing of none."""
    changed = index.changed()
    if not changed:
        return ""
    return f" {len(changed)} of them, such as {changed[0].name}, changed or went since: results are of what they were. Start the page anew."


def note_of(text: str, kind: str = "note") -> str:
    return f'<p class="{kind}" role="status">{html.escape(text)}</p>'


def error_note(error: Exception, uploads: Path) -> str:
    """What went wrong, without the names that Gradio gives to folders."""
    return note_of(re.sub(rf"{re.escape(str(uploads))}\S*[/\\]", "", str(error)), "note error")


def reporting_errors(function: Callable, uploads: Path, outputs: int) -> Callable:
    """For events with `preprocess=False`: gives a function images by path, and what it refuses to the first output.

    Gradio would open images itself, report in its own terms those that it cannot open, and draw its errors over every
    output. Here the `outputs - 1` others stay as they are.
    """

    @functools.wraps(function)
    def wrapped(*values):
        images = [value for value in values if isinstance(value, dict) and value["path"]]
        try:
            # Gradio itself does not look, where a request leaves out that it means an upload.
            if not all(Path(image["path"]).resolve().is_relative_to(uploads) for image in images):
                raise ValueError("Only images that were uploaded are read.")
            return function(*(value["path"] if isinstance(value, dict) else value for value in values))
        except (ValueError, TypeError, OSError) as error:
            return error_note(error, uploads), *[gr.skip()] * (outputs - 1)

    return wrapped


def opened(path: str, size: tuple[int, int] = LARGE) -> Image.Image:
    """An image as the page shows it, scaled down to `size`; `ValueError` or `OSError` if it cannot be read."""
    image = open_image(path)
    image.thumbnail(size)
    return image


def checked(place: Any, things: Sequence) -> int:
    """A place in a list that a browser named; `ValueError` if there is none."""
    if not isinstance(place, int) or not 0 <= place < len(things):
        raise ValueError("That is no longer there: search again.")
    return place


def build_page(
    answering: tuple[HiViLTForQuestionAnswering, HiViLTProcessor],
    indexes: Mapping[str, ImageIndex],
    about_search: str = "",
    about_answers: str = "",
    captioning: tuple[HiViLTForConditionalGeneration, HiViLTProcessor] | None = None,
    examples: Sequence[tuple[Path, str]] = (),
    familiarity: Mapping[str, Any] | None = None,
    grounding: tuple[HiViLTForVisualGrounding, HiViLTProcessor] | None = None,
    about_boxes: str = "",
    threshold: float = THRESHOLD,
    scenes: Sequence[tuple[Path, str]] = (),
    asked: Mapping[str, ImageIndex] | None = None,
) -> gr.Blocks:
    """The page, to be launched with `LAUNCH`.

    Args:
        answering, familiarity: as `Answerer` takes them.
        indexes: folders to search, by the name to choose them by; empty: the page says how to name one.
        about_search, about_answers, about_boxes: HTML that says what the models know.
        captioning: a model in evaluation mode that says below an opened image what it shows, and its processor; `None`: none.
        examples, scenes: image files with questions, or with expressions to look for, to begin with.
        grounding: a model in evaluation mode that draws boxes, and its processor; `None`: the page has no place for that.
        threshold: score that a box must be above, until the page is told another.
        asked: of the same folders the indexes of the answering model, to ask all of their images; `None`: no place for that.
    """
    answerer = Answerer(*answering, familiarity)
    captioner = None if captioning is None else Captioner(*captioning)
    grounder = None if grounding is None else Grounder(*grounding)
    samples, drawn = ([[str(path), text] for path, text in pairs] for pairs in (examples, scenes))
    # Of Gradio's buttons "share" is left out: it sends images away.
    upload = {"sources": ["upload", "clipboard"], "buttons": ["fullscreen"], "format": "png"}
    with gr.Blocks(title="HiViLT", analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True) as page:
        gr.Markdown("# HiViLT\nFind photographs by words, and ask them questions.")
        with gr.Tabs() as tabs:
            with gr.Tab("Search", id="search"):
                gr.HTML(about_search, elem_id="about-search")
                gr.Markdown(NO_INDEX, visible=not indexes)
                with gr.Row(visible=bool(indexes)):
                    with gr.Column(scale=1):
                        choice = {"choices": list(indexes), "visible": len(indexes) > 1, "filterable": False}
                        folder = gr.Dropdown(label="Folder", elem_id="folder", **choice)
                        words = gr.Textbox(label="Words", placeholder="a cat", elem_id="words")
                        find = gr.Button("Search", variant="primary", elem_id="search")
                        with gr.Accordion("More ways to search", open=False, elem_id="more"):
                            rerank = gr.Checkbox(label="Re-rank by fusion (words only)", elem_id="rerank")
                            like = gr.Image(label="By an image, without words", elem_id="like", height=220, **upload)
                        with gr.Accordion("Ask all images", open=False, visible=bool(asked), elem_id="all"):
                            about_all = gr.Textbox(label="Question", placeholder=QUESTIONS[0], elem_id="about-all")
                            sort_by = gr.Textbox(label="Sort by the answer", placeholder="yes", elem_id="sort-by")
                            ask_of_all = gr.Button("Ask all", elem_id="ask-all")
                    with gr.Column(scale=3):
                        search_note = gr.HTML(elem_id="found-note")
                        gallery = gr.Gallery(
                            show_label=False, elem_id="found", columns=5, height="auto", object_fit="cover",
                            format="jpeg", interactive=False, allow_preview=False, buttons=[],
                        )  # fmt: skip
            with gr.Tab("Ask", id="ask"):
                gr.HTML(about_answers, elem_id="about-answers")
                with gr.Row():
                    with gr.Column():
                        shown_image = gr.Image(label="Image", elem_id="image", height=320, **upload)
                        caption = gr.HTML(elem_id="caption")
                        asking = {"label": "Questions, one a line", "placeholder": QUESTIONS[0], "lines": 2}
                        question = gr.Textbox(elem_id="question", **asking)
                        button = gr.Button("Ask", variant="primary", elem_id="ask")
                        note = gr.HTML(elem_id="note")
                    with gr.Column():
                        answers = gr.HTML(elem_id="answers")
                        offered = gr.Dataset(
                            label="Examples", components=[shown_image, question], samples=samples, type="index",
                            elem_id="examples", visible=bool(samples),
                        )  # fmt: skip
                        with gr.Column(visible=False, elem_id="asked") as asked_before:
                            gr.Markdown("### History")
                            history = gr.HTML(elem_id="history")
                            clear = gr.Button("Clear the history", elem_id="clear")

            with gr.Tab("Locate", id="locate", visible=grounder is not None):
                gr.HTML(about_boxes, elem_id="about-boxes")
                with gr.Row():
                    with gr.Column():
                        located = gr.Image(label="Image", elem_id="located", height=320, **upload)
                        looking = {"label": "What to look for, one a line", "placeholder": "the red circle", "lines": 2}
                        expressions = gr.Textbox(elem_id="expressions", **looking)
                        least = gr.Slider(0, 1, threshold, step=0.01, label="Lowest score", elem_id="threshold")
                        locate = gr.Button("Locate", variant="primary", elem_id="locate")
                        located_note = gr.HTML(elem_id="located-note")
                    with gr.Column():
                        marked = gr.Image(
                            label="Boxes", elem_id="boxes", interactive=False, format="png", buttons=["fullscreen"]
                        )
                        scores = gr.HTML(elem_id="scores")
                        offered_scene = gr.Dataset(
                            label="Examples", components=[located, expressions], samples=drawn, type="index",
                            elem_id="scenes", visible=bool(drawn),
                        )  # fmt: skip

        uploads = Path(page.GRADIO_CACHE).resolve()
        # What was asked, newest first; the last image that could be read; which files the results are.
        kept, last, last_like, results = gr.State([]), gr.State(), gr.State(), gr.State([])
        last_located = gr.State()

        def on(events: list, function: Callable, inputs: list, outputs: list, name: str = "", js: str = "") -> None:
            """Has events call a function, and the browser run `js` after it; with a name it is public."""
            # One call of each at a time: re-ranking fills the index's memory. Gradio's own progress would cover the outputs.
            how = {"api_name": name} if name else {"api_visibility": "private"}
            how |= {"concurrency_limit": 1, "show_progress": "minimal", "show_progress_on": outputs[0]}
            reporting = reporting_errors(function, uploads, len(outputs))
            done = gr.on(events, reporting, inputs, outputs, preprocess=False, **how)
            if js:
                done.then(None, js=js, api_visibility="private")

        def ask(image: str | None, text: str, before: list):
            answered, familiar, said = answerer.ask(image, text)
            thumb = gr.image_utils.encode_image_to_base64(opened(image, THUMB))
            now = [*((asked, predictions, thumb) for asked, predictions in answered.items()), *before][:KEPT_QUESTIONS]
            shown = "" if familiar else note_of(UNFAMILIAR, "note error")
            shown += show_answers([(*pair, "") for pair in answered.items()], all_answers=True)
            return note_of(said), shown, show_answers(now, all_answers=False), now, gr.Column(visible=True)

        def captioned(path: str | None) -> str:
            return "" if captioner is None or path is None else note_of(f"Caption: {captioner.caption(path)}")

        def show_image(path: str | None, before: Image.Image | None):
            # Drawn anew, since browsers show fewer formats than are read. What cannot be read gives way to the one before.
            if path is None:
                return "", gr.skip(), None
            try:
                image = opened(path)
            except (ValueError, OSError) as error:
                return error_note(error, uploads), before, before
            return "", image, image

        def show_and_caption(path: str | None, before: Image.Image | None):
            said, *images = show_image(path, before)
            if said:
                return said, *images, gr.skip(), gr.skip()
            return said, *images, "", captioned(path)

        def ask_example(number: int, before: list):
            path, text = samples[checked(number, samples)]
            image = opened(path)
            return *ask(path, text, before), image, image, text, ""

        def find_boxes(image: str | None, text: str, above: float):
            found, said = grounder.find(image, text, above)
            return note_of(said), with_boxes(opened(image), found), show_boxes(found)

        def show_located(path: str | None, before: Image.Image | None):
            said, *images = show_image(path, before)
            return said, *images, *((gr.skip(), gr.skip()) if said else (None, ""))

        def find_example(number: int, above: float):
            path, text = drawn[checked(number, drawn)]
            image = opened(path)
            return *find_boxes(path, text, above), image, image, text

        outputs = [note, answers, history, kept, asked_before]
        on([button.click, question.submit], ask, [shown_image, question, kept], outputs, "ask", js=TO_ANSWERS)
        shown = [note, shown_image, last, answers, caption]
        on([shown_image.input], show_and_caption, [shown_image, last], shown, js=TO_ANSWERS)
        of_example = [*outputs, shown_image, last, question, caption]
        on([offered.click], ask_example, [offered, kept], of_example, js=TO_ANSWERS)
        clear.click(
            lambda: ("", [], gr.Column(visible=False)), None, [history, kept, asked_before], api_visibility="private"
        )
        if grounder is not None:
            outputs = [located_note, marked, scores]
            events = [locate.click, expressions.submit, least.release]
            on(events, find_boxes, [located, expressions, least], outputs, "locate", js=TO_BOXES)
            new = [located_note, located, last_located, marked, scores]
            on([located.input], show_located, [located, last_located], new)
            of_scene = [*outputs, located, last_located, expressions]
            on([offered_scene.click], find_example, [offered_scene, least], of_scene, js=TO_BOXES)
        if not indexes:
            return page

        def show_results(name: str, text: str = "", image: str | None = None, fuse: bool = False):
            if name not in indexes:
                raise ValueError("There is no such folder to search.")
            return show_found(*search(indexes[name], text, image, fuse))

        def show_answers_of_all(name: str, text: str, answer: str):
            if name not in asked:
                raise ValueError("There is no such folder to ask.")
            return show_found(*ask_all(asked[name], text, answer))

        def show_found(said: str, hits: list[tuple[Path, str]]):
            shown, paths = [], []
            for path, caption in hits:
                try:
                    shown.append((ImageOps.contain(open_image(str(path)), SMALL), caption))
                    paths.append(str(path))
                except (ValueError, OSError):  # since it was embedded
                    said += f" {path.name} can no longer be read."
            return note_of(said), shown, paths

        def open_result(paths: list, event: gr.SelectData):
            path = paths[checked(event.index, paths)]
            image = opened(path)
            return "", image, image, "", captioned(path), "", image, image, None, "", gr.Tabs(selected="ask")

        outputs = [search_note, gallery, results]
        on([find.click, words.submit], show_results, [folder, words, like, rerank], outputs, "search", js=TO_FOUND)
        on([page.load, folder.input], show_results, [folder], outputs)
        if asked:
            events = [ask_of_all.click, about_all.submit, sort_by.submit]
            on(events, show_answers_of_all, [folder, about_all, sort_by], outputs, "ask_all", js=TO_FOUND)
        on([like.input], show_image, [like, last_like], [search_note, like, last_like])
        new = [located_note, located, last_located, marked, scores]
        on([gallery.select], open_result, [results], [*shown, *new, tabs], js=TO_TOP)
    return page


def check_address(host: str, port: int) -> None:
    """Refuses an address where the page cannot be served, before models are loaded and images embedded."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        raise OSError(f"--host, --port: the page cannot be at {host}:{port} ({error}); give another.") from error


def open_indexes(
    folders: Sequence[str], index: str | None, searching: tuple[HiViLTForRetrieval, HiViLTProcessor], scratch: str
) -> dict[str, ImageIndex]:
    """Folders to search, by the names that tell them apart: their own, or their paths where two have the same.

    Without `folders` the `index` is searched as it is. The embeddings of one folder stay in `index` itself, of several each
    in a folder below it; without it in `scratch`.
    """
    if not folders:
        loaded = ImageIndex.load(index, *searching)
        return {loaded.folder.name: loaded}
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    names = [path.name for path in paths]
    indexes = {}
    for path in paths:
        place = Path(index or scratch)
        if not index or len(paths) > 1:
            place /= f"{path.name}-{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
        name = path.name if names.count(path.name) == 1 else str(path)
        try:
            indexes[name] = ImageIndex.build(path, *searching, place, on_bad_image="skip")
        except ValueError as error:
            raise ValueError(f"--images: {path} cannot be searched. {error}") from error
    return indexes


def open_answering(
    indexes: Mapping[str, ImageIndex], place: str, answering: tuple[HiViLTForQuestionAnswering, HiViLTProcessor]
) -> dict[str, ImageIndex]:
    """Of the same folders what the answering model keeps of their images, each in a folder below `place`."""
    opened = {}
    for name, index in indexes.items():
        below = f"answers-{hashlib.blake2b(str(index.folder).encode(), digest_size=4).hexdigest()}"
        opened[name] = ImageIndex.build(index.folder, *answering, Path(place, below), on_bad_image="skip")
    return opened


def main(argv: list[str] | None = None) -> None:
    """Serves the page as the flags ask (`argv`; unset, the command line) until it is stopped."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ANSWERING), help="question answering checkpoint, a folder or a Hub name")
    captions, boxes = (str(folder) if folder.is_dir() else None for folder in (CAPTIONING, GROUNDING))
    parser.add_argument("--captioning", default=captions, help="checkpoint that captions an opened image, likewise")
    parser.add_argument("--grounding", default=boxes, help="checkpoint that draws boxes of what is written, likewise")
    parser.add_argument("--retrieval", default=str(RETRIEVAL), help="retrieval checkpoint, likewise")
    shown = "folders of images to search, embedded where they are new"
    parser.add_argument("--images", "--pictures", nargs="+", default=[], help=shown)
    parser.add_argument("--index", help="folder where embeddings stay, as run_retrieval.py --index makes it too")
    for_all = "encode those images by the answering model, too, so that all of them can be asked a question"
    parser.add_argument("--ask_all", action="store_true", help=for_all)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: anyone may ask")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    args = parser.parse_args(argv)
    for folder in args.images:
        if not Path(folder).is_dir():
            raise missing_place("--images", folder)
    check_address(args.host, args.port)
    folders = args.images or ([] if args.index or not PHOTOGRAPHS.is_dir() else [str(PHOTOGRAPHS)])
    answering, captioning = load_checkpoint("--model", args.model, HiViLTForQuestionAnswering), None
    if args.captioning:
        captioning = load_checkpoint("--captioning", args.captioning, HiViLTForConditionalGeneration)
    locating = {}
    if args.grounding:
        measured = read_results(args.grounding)
        threshold = number(measured, "settings", "threshold")
        locating = {
            "grounding": load_checkpoint("--grounding", args.grounding, HiViLTForVisualGrounding),
            "about_boxes": describe_boxes(args.grounding, measured),
            "threshold": THRESHOLD if threshold is None else threshold,
            "scenes": SCENE if args.grounding == str(GROUNDING) else (),
        }
    with tempfile.TemporaryDirectory(prefix="hivilt-") as scratch:
        indexes, about_search, asked = {}, "", {}
        if folders or args.index:
            searching = load_checkpoint("--retrieval", args.retrieval, HiViLTForRetrieval)
            indexes = open_indexes(folders, args.index, searching, scratch)
            about_search = describe_search(args.retrieval, read_results(args.retrieval))
            if args.ask_all:
                asked = open_answering(indexes, args.index or scratch, answering)
        results = read_results(args.model)
        answers = [answer for _, answer in sorted(answering[0].config.id2label.items())]
        about_answers = describe_answers(args.model, results, answers)
        examples = EXAMPLES if args.model == str(ANSWERING) else ()
        familiarity = results.get("familiarity")
        known = (about_search, about_answers, captioning, examples, familiarity)
        page = build_page(answering, indexes, *known, **locating, asked=asked)
        page.launch(server_name=args.host, server_port=args.port, **LAUNCH)
        print(f"The page is at {page.local_url} until Ctrl+C.", flush=True)
        page.block_thread()


if __name__ == "__main__":
    run_command(main)
