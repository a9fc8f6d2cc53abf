"""What README and the pages of docs promise of this folder as it is cloned: examples, weights, measured numbers, links."""

import io
import json
import re
import shlex
import shutil
from contextlib import redirect_stdout
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from PIL import Image, ImageChops, ImageDraw
from transformers import TrainingArguments

import hivilt
from elsewhere import run_code
from fresh import run_elsewhere
from hivilt import (
    HiViLTForConditionalGeneration,
    HiViLTForImagesAndTextClassification,
    HiViLTForQuestionAnswering,
    HiViLTForRetrieval,
    HiViLTForVisualGrounding,
    run_retrieval,
    run_vqa,
)
from hivilt.data.scenes import scenes
from hivilt.data.tables import open_image
from hivilt.evaluation.grounding import match_boxes
from hivilt.tasks import grounding, reasoning
from hivilt.tasks.question_answering import QuestionAnswering, summary_of
from hivilt.tasks.retrieval import tables_of
from scene_reader import seen
from tiny import make_model, make_processor

ROOT = Path(hivilt.__file__).resolve().parent
PATHS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
README, BENCHMARKS, USAGE = PAGES["README.md"], PAGES["docs/benchmarks.md"], PAGES["docs/usage.md"]
RESULTS = {
    name: json.loads((ROOT / name / "results.json").read_text(encoding="utf-8"))
    for name in (".", "vqa", "captioning", "grounding", "reasoning")
}

# Blocks that ask the Hub, by what they ask it for: the only ones that no test runs.
NEEDS_HUB = ("openai/clip-vit-base-patch16", "me/hivilt")
# What holds after the blocks of a section that runs in another process.
CHECKS = {"Auto classes": "assert outputs.logits.shape == (3, 13) and len(states.global_state) == 2"}
LINE = "-" * 80
EXPORT = "Compile and export"  # takes longer than all other sections together


class Section(NamedTuple):
    """Part of a page below one heading."""

    title: str
    blocks: list[tuple[str, str]]  # fenced ones, each with its language

    @property
    def python(self) -> list[str]:
        return [code for language, code in self.blocks if language == "python"]

    @property
    def needs_hub(self) -> bool:
        return any(name in code for name in NEEDS_HUB for code in self.python)

    @property
    def is_remote(self) -> bool:
        """Whether it is for people who have a checkpoint's folder and no hivilt."""
        code = "\n".join(self.python)
        return "trust_remote_code" in code and not re.search(r"^(from|import) hivilt\b", code, re.MULTILINE)


class Ran(NamedTuple):
    """What happened to a section: what each of its Python blocks printed, and, in this process, the names after each."""

    printed: list[str]
    names: list[dict[str, Any]]


def sections(text: str) -> list[Section]:
    """A page's sections, in order."""
    found, language, lines = [Section("", [])], None, []
    for line in text.splitlines():
        if line.startswith("```") and language is None:
            language, lines = line[3:], []
        elif line == "```":
            found[-1].blocks.append((language, "".join(f"{one}\n" for one in lines)))
            language = None
        elif language is not None:
            lines.append(line)
        elif heading := re.fullmatch(r"#+ (.*)", line):
            found.append(Section(heading[1], []))
    assert language is None
    return found


def blocks(language: str, title: str, page: str = "README.md") -> list[str]:
    (section,) = (one for one in sections(PAGES[page]) if one.title == title)
    return [code for one, code in section.blocks if one == language]


def words(text: str) -> str:
    """A text without its line breaks."""
    return " ".join(text.split())


def furnish(place: Path) -> dict[str, str]:
    """Makes the files of a reader's own that blocks name; gives what to write in place of each name."""
    (place / "images").mkdir(parents=True)
    (place / "my_images").mkdir()
    for name in ("cat", "coffee", "boats"):
        shutil.copy(ROOT / "docs" / "photographs" / f"{name}.jpg", place / "my_images")
    (rows,) = blocks("json", "Train on your own data")
    (place / "train.jsonl").write_text(rows, encoding="utf-8")
    for row in map(json.loads, rows.splitlines()):
        shutil.copy(ROOT / "docs" / "photographs" / Path(row["image"]).name, place / row["image"])
    for name in ("a.png", "b.png"):
        shutil.copy(ROOT / "docs" / "drawing.png", place / name)
    writer = make_model(HiViLTForConditionalGeneration, num_labels=2)
    writer.config.prompt_ids = make_processor().tokenizer("a image of").input_ids
    for one in (writer, make_processor()):
        one.save_pretrained(place / "outputs" / "captioning")
    named = ("a.png", "b.png", "my_images", "train.jsonl", "hivilt.onnx")
    return {f'"{name}"': repr(str(place / name)) for name in named} | {'"outputs/': f'"{place}/outputs/'}


def run_here(section: list[str]) -> Ran:
    """Runs blocks one after another in the folder, with what a person's machine may have and a test may not left out: an
    accelerator, services to report to."""
    names, ran = {"__name__": "readme"}, Ran([], [])
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(transformers, "TrainingArguments", partial(TrainingArguments, **quiet))
        for block in section:
            with redirect_stdout(io.StringIO()) as printed:
                exec(block, names)
            ran.printed.append(printed.getvalue())
            ran.names.append(dict(names))
    return ran


def run_remote(found: dict[str, list[str]], folder: Path) -> dict[str, Ran]:
    """Runs the blocks of these sections, one section after another, in a process without hivilt."""
    code = f"""
for title, section in {found!r}.items():
    names = {{'__name__': '__main__'}}
    for block in section:
        exec(block, names)
        print({LINE!r})
    exec({CHECKS!r}.get(title, ''), names)
"""
    said = run_elsewhere(run_code, folder, folder=ROOT, code=code)
    # Remote code calls nobody and leaves the folder that it came from as it was; an example may save what it drew.
    assert said["called"] == [] and set(said["written"]) <= {f"{folder}/outputs/found.png"}
    printed = said["printed"].split(f"{LINE}\n")
    return {title: Ran([printed.pop(0) for _ in section], []) for title, section in found.items()}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Runs all sections of a page, once, each from nothing, or the one on exports; gives by their titles what happened. Those
    for people without hivilt run in one process, of all pages together."""
    place = tmp_path_factory.mktemp("reader")
    instead = furnish(place)

    def written(page: str, exports: bool, is_remote: bool) -> dict[str, list[str]]:
        found = {}
        for section in sections(PAGES[page]):
            wanted = section.python and not section.needs_hub and section.is_remote == is_remote
            if wanted and exports == (section.title == EXPORT):
                assert section.title not in found
                found[section.title] = []
                for code in section.python:
                    for name, own in instead.items():
                        code = code.replace(name, own)
                    found[section.title].append(code)
        return found

    @cache
    def remote(exports: bool) -> dict[str, Ran]:
        found = [written(page, exports, is_remote=True) for page in PAGES]
        joined = {title: section for page in found for title, section in page.items()}
        assert len(joined) == sum(map(len, found))
        return run_remote(joined, place)

    @cache
    def run(page: str, exports: bool = False) -> dict[str, Ran]:
        done = {title: remote(exports)[title] for title in written(page, exports, is_remote=True)}
        return done | {title: run_here(found) for title, found in written(page, exports, is_remote=False).items()}

    return run


# Examples


@pytest.mark.parametrize(
    ("page", "exports"),
    [
        *((page, False) for page, text in PAGES.items() if "```python" in text),
        pytest.param("docs/usage.md", True, marks=pytest.mark.slow),
    ],
)
def test_blocks_of_a_page_run_and_print_what_is_shown(ran, page, exports):
    done = ran(page, exports)
    for section in [section for section in sections(PAGES[page]) if section.title in done]:
        printed = iter(done[section.title].printed)
        for place, (language, code) in enumerate(section.blocks):
            if language != "python":
                continue
            said = next(printed)
            if section.blocks[place + 1 : place + 2] and section.blocks[place + 1][0] == "text":
                assert said == section.blocks[place + 1][1]
            elif told := re.search(r"^print\(.*\)  # (.*)\n\Z", code, re.MULTILINE):
                assert said.splitlines()[-1] == told[1]


def test_every_block_is_run_but_those_that_ask_the_hub():
    left = [code for text in PAGES.values() for one in sections(text) if one.needs_hub for code in one.python]
    assert len(left) == len(NEEDS_HUB)
    shown = [one for text in PAGES.values() for section in sections(text) for one in section.blocks]
    assert sum(language == "text" for language, _ in shown) == 5
    assert {language for language, _ in shown} <= {"python", "text", "bash", "json", ""}


def test_a_reader_sees_first_what_it_is_then_a_drawing_then_numbers_then_an_example():
    assert len(README.splitlines()) < 200
    body = ModelCard(README).content.split("\n---\n", 1)[1]
    parts = [
        "in both directions",
        "make install",
        "docs/architecture.svg",
        "| shipped model |",
        "goals_table -->",
        "**What the models know.**",
    ]
    parts += ["non-commercial research", "ImageIndex.build"]
    places = [body.index(part) for part in parts]
    assert places == sorted(places)
    assert body.index("```python") < places[-1] < body.index("```text")


def test_first_command_finds_the_cat(tmp_path):
    command = shlex.split(re.search(r"^```bash\n(.*?)\n```", README, re.DOTALL | re.MULTILINE)[1])
    assert command[:2] == [".venv/bin/python", "run_retrieval.py"] and README.index("```bash") < README.index(
        "architecture.svg"
    )
    places = {
        ".": str(ROOT),
        "docs/photographs": str(ROOT / "docs/photographs"),
        "outputs/index": str(tmp_path / "index"),
    }
    (hits,) = run_retrieval.main([places.get(word, word) for word in command[2:]])
    assert hits[0].path.name == "cat.jpg"


def test_first_example_finds_the_photographs_that_are_shown_below_it():
    (shown,) = blocks("text", "Find your own images in a few lines")
    # The photographs go by what they show.
    for query, file in (line.split(" -> ") for line in shown.splitlines()):
        assert Path(file).stem[:8] in query and (ROOT / "docs/photographs" / file).is_file()


def test_boxes_that_are_shown_are_around_what_is_meant_in_the_scene_that_is_drawn():
    *_, scene = scenes("test", 2, image_size=256)
    image, found = open_image(scene.image), {}
    assert not ImageChops.difference(image, Image.open(ROOT / "docs/scene.png").convert("RGB")).getbbox()
    (shown,) = blocks("text", "Find where it is")
    for line in shown.splitlines():
        expression, *box = re.fullmatch(r"(.+) [01]\.\d\d (\d+) (\d+) (\d+) (\d+)", line).groups()
        found.setdefault(expression, []).append(list(map(int, box)))
        ImageDraw.Draw(image).rectangle(found[expression][-1], outline="black", width=2)
    assert not ImageChops.difference(image, Image.open(ROOT / "docs/found.png").convert("RGB")).getbbox()

    meant = dict(zip(scene.expressions, scene.boxes, strict=True))
    (asked,) = re.findall(r"expressions = (\[.*\])\n", README)
    assert set(found) == {expression for expression in json.loads(asked) if meant[expression]} < set(json.loads(asked))
    for expression, boxes in found.items():
        true = [[256 * edge for edge in box] for box in meant[expression]]
        assert sorted(match_boxes(boxes, true)) == list(range(len(true)))


def test_questions_that_are_shown_are_answered_right():
    # docs/drawing.png is a red triangle.
    right = [
        "what shape is it? triangle",
        "what color is the triangle? red",
        "is there a blue circle? no",
    ]
    (shown,) = blocks("text", "Answer questions")
    assert [line.rsplit(" ", 1)[0] for line in shown.splitlines()] == right


def test_sentences_about_a_pair_are_judged_right():
    """By what a reader of pixels sees in both images: four yellow shapes on the left and two on the right, and no red one."""
    (shown,) = blocks("text", "Judge", "docs/reasoning.md")
    things = [seen(Image.open(ROOT / f"docs/pair_{side}.png").convert("RGB")) for side in ("left", "right")]
    left, right = ([words for words, _ in own] for own in things)
    number = lambda own, *named: sum(set(named) <= words for words in own)
    right_labels = [
        number(left, "yellow") > number(right, "yellow"),
        number(left, "yellow", "square") > 0 and number(right, "yellow", "square") > 0,
        (number(left, "cross") > 0) != (number(right, "cross") > 0),
        number(left + right, "red") == 0,
    ]
    assert [line.split()[0] for line in shown.splitlines()] == [str(label) for label in right_labels]
    assert len(set(right_labels)) == 2


def test_the_captions_that_are_shown_are_those_that_are_spoken_of():
    (shown,) = blocks("text", "Write captions")
    _, mountain, sheep = shown.splitlines()
    assert "on a mountain" in mountain and "two dogs" in sheep
    assert "Nobody is on the mountain, and the dogs are sheep" in words(README)


@pytest.mark.slow
def test_the_root_fails_where_it_is_said_to(ran):
    names = ran("README.md")["Find your own images in a few lines"].names[-1]
    assert '"a house" finds a brick wall first and "an airplane in the sky" finds boats' in words(README)
    first = {
        query: names["index"].search(query, top_k=1)[0].path.name for query in ("a house", "an airplane in the sky")
    }
    assert first == {"a house": "bricks.jpg", "an airplane in the sky": "boats.jpg"}
    assert 'it says "a man" rather than "a woman"' in words(README)
    image = str(ROOT / "docs/photographs/astronaut.jpg")
    asked = names["processor"](images=image, text=[["a man", "a woman"]], return_tensors="pt")
    with torch.no_grad():
        man, woman = names["model"](**asked).logits_per_image[0]
    assert man > woman
    assert len(list((ROOT / "docs/photographs").glob("*.jpg"))) == 17 and "the seventeen photographs" in words(README)


@pytest.mark.slow
def test_ones_own_trainer_predicts_one_row_a_question(ran):
    plain, several, cached = ran("docs/training.md")["Your own Trainer"].names
    assert "pixel_values" not in cached["batch"] and cached["model"].classifier.weight.grad.any()
    untrained = HiViLTForQuestionAnswering.from_pretrained(ROOT / "vqa").classifier.weight
    rows = plain["rows"].with_transform(plain["encode"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        predictions = plain["Trainer"](plain["model"], plain["args"]).predict(rows).predictions
    assert predictions.shape == (2, 13) and not torch.equal(plain["model"].classifier.weight, untrained)
    # Several questions an image, of images with more and fewer of them, in any order: with the second block's collator, by
    # a plain Trainer, and by the trainer that the block shows.
    order = [0, 1, 1, 0, 1, 0, 0]
    images = [str(ROOT / "docs" / name) for name in ("drawing.png", "photographs/cat.jpg")]
    asked = [{"image": images[image], "question": f"what color is the {place}?"} for place, image in enumerate(order)]
    dataset = several["VQADataset"](several["read_table"](asked, answers_needed=False))
    for kind in ("Trainer", "QuestionAnsweringTrainer"):
        given = (several["model"], several["args"], several["collator"])
        trainer = several[kind](*given, processing_class=several["processor"])
        assert len(trainer.predict(dataset).predictions) == len(order)


def test_a_file_of_ones_own_is_trained_on_and_saved(ran):
    names = ran("docs/training.md")["A file, from Python"].names[-1]
    rows = [json.loads(row) for row in blocks("json", "Train on your own data")[0].splitlines()]
    saved = HiViLTForQuestionAnswering.from_pretrained(names["args"].output_dir)
    assert set(saved.config.label2id) == {row["answer"] for row in rows}
    given = (names["model"], names["args"], names["collator"])
    trainer = names["QuestionAnsweringTrainer"](*given, processing_class=names["processor"])
    predictions = trainer.predict(names["VQADataset"](names["examples"])).predictions
    assert len(predictions) == len(rows) and {one["answer"] for one in predictions[0]} <= set(saved.config.label2id)


def test_the_command_for_training_takes_the_file_that_is_shown(tmp_path):
    furnish(tmp_path)
    (line,) = blocks("bash", "Train on your own data")
    python, script, *flags = shlex.split(line)
    assert (python, script) == (".venv/bin/python", "run_vqa.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        run_vqa.main([*flags, "--max_steps", "1", "--use_cpu", "--disable_tqdm", "true"])
    left = {path.name for path in (tmp_path / "outputs/mine").iterdir()}
    assert {"model.safetensors", "modeling_hivilt.py", "results.json", "training.png", "README.md"} <= left


def test_a_loop_of_ones_own_keeps_what_encoders_gave(ran):
    names = ran("docs/training.md")["Frozen encoders run once"].names[-1]
    image = str(ROOT / "docs/drawing.png")
    asked = names["processor"](images=image, text="what color is the triangle?", return_tensors="pt")
    kept = {"feature_maps": names["maps"], "token_states": names["states"], "attention_mask": asked["attention_mask"]}
    torch.testing.assert_close(names["model"](**kept).logits, names["model"](**asked).logits)


def test_a_folder_is_indexed_and_searched(ran):
    index = ran("docs/search.md")["In Python"].names[-1]["index"]
    assert sorted(hit.path.stem for hit in index.search("a cat", top_k=3, rerank_k=3)) == ["boats", "cat", "coffee"]


# Links


def anchors(text: str) -> set[str]:
    """What a page's headings are linked by."""
    return {re.sub(r"[^\w\- ]", "", one.title.lower()).replace(" ", "-") for one in sections(text)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    ):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert path.exists() and path.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


def test_every_page_of_docs_is_linked_from_readme():
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= set(
        re.findall(r"\(([^)#]+)[^)]*\)", README)
    )


# The weights and their numbers


@pytest.mark.parametrize(
    ("folder", "model_class"),
    [
        (".", HiViLTForRetrieval),
        ("vqa", HiViLTForQuestionAnswering),
        ("captioning", HiViLTForConditionalGeneration),
        ("grounding", HiViLTForVisualGrounding),
        ("reasoning", HiViLTForImagesAndTextClassification),
    ],
)
def test_weights_are_safetensors_of_at_most_64_megabytes_float32_on_loading_and_nothing_is_pickled(folder, model_class):
    assert (ROOT / folder / "model.safetensors").stat().st_size < (15e6 if folder == "vqa" else 64e6)
    model = model_class.from_pretrained(ROOT / folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == RESULTS[folder]["parameters"]["all"]
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.float32}
    assert not [path for path in (ROOT / folder).iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]


@pytest.mark.slow
def test_weights_answer_the_test_questions_as_often_as_is_said(tmp_path):
    flags = ["--model_name_or_path", str(ROOT / "vqa"), "--do_predict", "--output_dir", str(tmp_path)]
    found, said = run_vqa.main(flags)["test"], RESULTS["vqa"]["test"]
    assert found["num_questions"] == said["num_questions"]
    # Another processor may round otherwise, and turn an answer that hung in the balance.
    assert found["accuracy"] == pytest.approx(said["accuracy"], abs=3e-4)


def test_the_table_of_models_is_what_their_results_say():
    row = {line.split(" | ")[0]: line for line in README.splitlines() if line.startswith("| ")}
    vqa, retrieval, captioning = RESULTS["vqa"], RESULTS["."], RESULTS["captioning"]
    finding, found = RESULTS["grounding"], row["| `grounding/`"]
    judging, judged = RESULTS["reasoning"], row["| `reasoning/`"]
    lines = [row["| root"], row["| `vqa/`"], row["| `captioning/`"], found, judged]
    for results, line in zip((retrieval, vqa, captioning, finding, judging), lines, strict=True):
        assert f"| {results['parameters']['all']:,} |" in line
        assert f"{results['data']['name']}: {results['data']['train']['images']:,} images" in line
    test = retrieval["test"]
    assert f"{retrieval['data']['train']['captions']:,} captions" in row["| root"]
    shares = [100 * test[f"embedding_text_to_image_recall@{k}"] for k in (1, 10)]
    assert f"R@1 {shares[0]:.1f} %, R@10 {shares[1]:.1f} %" in row["| root"]
    written = captioning["test"]
    scores = f"BLEU-4 {written['bleu_4']:.3f}, CIDEr-D {written['cider_d']:.3f}"
    assert f"{captioning['data']['train']['captions']:,} captions | {scores} |" in row["| `captioning/`"]
    shares = [f"{100 * finding['test'][name]:.1f} %" for name in ("accuracy@0.5", "no_target_accuracy")]
    scores = f"Acc@0.5 {shares[0]}, nothing where nothing is meant {shares[1]}"
    assert f"{finding['data']['train']['expressions']:,} expressions | {scores} |" in found
    told = grounding.summary_of(finding["test"], "test", "accuracy@0.5")
    assert all(f"    {line}\n" in PAGES["docs/grounding.md"] for line in told.splitlines())
    assert f"in {finding['wall_seconds'] / 60:.0f} minutes" in words(PAGES["docs/grounding.md"])
    told = reasoning.summary_of(judging["test"], "test", "accuracy").splitlines()
    assert f"{judging['data']['train']['statements']:,} statements | {told[0].removeprefix('test: ')} |" in judged
    assert all(f"    {line}\n" in PAGES["docs/reasoning.md"] for line in told)
    assert f"in {judging['wall_seconds'] / 60:.0f} minutes" in words(PAGES["docs/reasoning.md"])
    assert f"{vqa['data']['train']['questions']:,} questions" in row["| `vqa/`"]
    assert summary_of(vqa, "test", "accuracy").splitlines()[0] == (
        "test " + re.search(r"(accuracy) (0.\d+ on [\d,]+ questions)", row["| `vqa/`"]).expand(r"\1: \2")
    )


def test_numbers_are_those_of_the_committed_results():
    vqa, retrieval = RESULTS["vqa"], RESULTS["."]
    assert summary_of(vqa, "test", "accuracy").splitlines()[0] in BENCHMARKS
    assert f"{vqa['parameters']['all']:,} parameters" in BENCHMARKS
    assert tables_of(retrieval)["test"] in BENCHMARKS
    assert f"{retrieval['parameters']['all']:,} parameters" in BENCHMARKS
    assert f"{retrieval['parameters']['training']:,} of them trained" in words(BENCHMARKS)
    for found in (vqa, retrieval):
        assert f"{found['wall_seconds'] / 60:.1f} minutes" in BENCHMARKS
        assert f"{found['peak_memory_bytes'] / 2**30:.1f} GiB" in BENCHMARKS
    assert len(results := ModelCard(README).data.eval_results) == 6
    for result in results:
        assert result.metric_value == round(retrieval["test"][result.metric_type.replace("_at_", "@")], 6)
    (seeds,) = (ROOT / "benchmarks/results").glob("retrieval_seeds-*.json")
    emoji = json.loads(seeds.read_text(encoding="utf-8"))["runs"][0]
    ways = [f"{way}_recall@1" for way in ("image_to_text", "text_to_image")]
    alone, fused = ([100 * emoji["test"][f"{stage}{way}"] for way in ways] for stage in ("embedding_", ""))
    said = words(BENCHMARKS)
    assert f"{alone[0]:.1f} % (image to text) and {alone[1]:.1f} % (text to image) first" in said
    assert f"{fused[0]:.1f} and {fused[1]:.1f} % re-ranked" in said
    assert f"twelve epochs in {emoji['wall_seconds'] / 60:.1f} minutes" in said
    reworded = json.loads((ROOT / "benchmarks/results/rewordings.json").read_text(encoding="utf-8"))
    assert f"{100 * reworded['accuracy']:.1f} % are answered right" in said


def test_what_the_root_model_knows_is_what_its_results_say():
    results, said = RESULTS["."], words(BENCHMARKS)
    data, test = results["data"], results["test"]
    assert (
        f"trained on {data['name']}, {data['train']['images']:,} images with {data['train']['captions']:,} captions"
        in said
    )
    shares = [100 * test[f"{stage}text_to_image_recall@{k}"] for stage, k in (("embedding_", 1), ("", 1), ("", 10))]
    assert f"Of {data['test']['images']:,} test images it found a caption's own first in {shares[0]:.1f} %" in said
    assert f"{shares[1]:.1f} % re-ranked, and among the first ten in {shares[2]:.1f} %" in said
    found = results["calibration"]
    assert (
        f"divided by one temperature, {found['temperature']:.4g}, fitted on {found['num']:,} validation captions"
        in said
    )
    assert "trained on images for non-commercial research" in words(README)


def test_settings_are_the_defaults_of_the_scripts():
    settings, (_, usual) = RESULTS["vqa"]["settings"], QuestionAnswering.arguments.parse(["--use_cpu"])
    assert settings["seed"] == 42 and settings["max_train_samples"] is None
    for name in ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "weight_decay"):
        assert settings[name] == getattr(usual, name)


@pytest.mark.parametrize(
    "encoders",
    [("vit", "bert"), ("clip", "t5"), ("swin", "clip"), ("siglip", "roberta"), ("vit", "distilbert")],
    ids="-".join,
)
def test_expressions_for_lora_pick_the_linear_layers_of_their_part(encoders):
    model = make_model(HiViLTForQuestionAnswering, vision=encoders[0], text=encoders[1])
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    expressions = re.findall(r'r"(model\\[^"]+)"', USAGE)
    parts = ["model.fusion.", "model.vision_model.", "model.text_model."]
    assert len(expressions) == len(parts)
    for part, expression in zip(parts, expressions, strict=True):
        picked = {name for name, _ in model.named_modules() if re.fullmatch(expression, name)}
        assert picked and picked <= {name for name in linear if name.startswith(part)}
