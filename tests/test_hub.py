"""
Checkpoints up to a Hub and down again, with the real client, against the server of hub.py.

What the clients do is in hub_client.py: one process with hivilt trains and pushes, two without hivilt load
by name into empty caches, one of them where things go wrong; one more stays offline, and two find the Hub gone.
"""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file, save_file
from transformers import pipeline

import hivilt
from caption_miniatures import make_caption_miniature
from elsewhere import outputs, tensors
from fresh import finish_elsewhere, run_elsewhere, start_elsewhere
from hivilt import HiViLTForQuestionAnswering, HiViLTForRetrieval, HiViLTProcessor
from hub import Fault, Hub
from hub_client import (
    LABELS,
    QUESTION,
    ask_nobody,
    find_it_gone,
    publish,
    stay_home,
    stumble,
    visit,
)
from miniatures import TWO_STEPS, make_vqa_miniature
from processes import free_port
from tiny import make_batch, make_config, make_image, make_model, make_processor

ROOT = Path(hivilt.__file__).resolve().parent
CODE = [path.name for path in ROOT.glob("*_hivilt.py")]
CHECKPOINT = ["config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"]
REPOSITORIES = "hivilt", "versions", "broken", "sharded", "cut", "half", "adapter", "root", "run", "found", "rest"
TOKEN = "hf_good_on_this_machine_only"
EDITION = {"configuration": "HiViLTConfig", "modeling": "HiViLTForQuestionAnswering", "processing": "HiViLTProcessor"}


def flags(benchmark: str, data: Path, out: Path, repo: str) -> list[str]:
    """A run of two steps that pushes what it leaves."""
    return [
        *("--benchmark", benchmark, "--data_dir", str(data), "--output_dir", str(out), *TWO_STEPS),
        *("--push_to_hub", "--hub_model_id", repo, "--hub_token", TOKEN),
    ]


@pytest.fixture(scope="module")
def hub():
    with Hub(tokens={TOKEN: "me"}) as hub:
        yield hub


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    found = {name: make_model(HiViLTForQuestionAnswering, seed, 4.0) for seed, name in enumerate(("first", "second"))}
    # The client asks for the rest of a download only if it has 10 MiB of it.
    config = make_config()
    config.text_config.vocab_size = 170_000
    return found | {"large": HiViLTForQuestionAnswering(config).eval()}


@pytest.fixture(scope="module")
def work(tmp_path_factory, models) -> Path:
    """Two versions of a checkpoint, the second with other code, this repository as a model, an image and a batch."""
    work = tmp_path_factory.mktemp("hub")
    for folder in ("checkpoints", "results/me"):
        (work / folder).mkdir(parents=True)
    for name, model in models.items():
        model.save_pretrained(work / "checkpoints" / name)
        make_processor().save_pretrained(work / "checkpoints" / name)
    for file, name in EDITION.items():
        with Path(work, f"checkpoints/second/{file}_hivilt.py").open("a", encoding="utf-8") as code:
            code.write(f'\n\n{name}.EDITION = "second"\n')
    for file in (*CODE, *CHECKPOINT, "README.md"):
        (work / "checkpoints/root").mkdir(exist_ok=True)
        shutil.copyfile(ROOT / file, work / "checkpoints/root" / file)
    shutil.copytree(ROOT / "vqa", work / "checkpoints/root/vqa")
    make_image().save(work / "image.png")
    save_file(make_batch(), work / "batch.safetensors")
    return work


@pytest.fixture(scope="module")
def given(work) -> dict[str, Path]:
    """What most clients need."""
    return {"batch": work / "batch.safetensors", "results": work / "results"}


@pytest.fixture(scope="module")
def published(work, hub, given) -> dict[str, str]:
    """Everything is on the Hub after this; the commits of the versions."""
    make_vqa_miniature("easy-vqa", work / "questions")
    make_caption_miniature("flickr8k", work / "captions")
    publishing = start_elsewhere(
        publish,
        work / "publishing",
        hub.environment(),
        has_hivilt=True,
        checkpoints=work / "checkpoints",
        question_answering=flags("easy-vqa", work / "questions", work / "run", "me/run"),
        retrieval=flags("flickr8k", work / "captions", work / "found", "me/found"),
        token=TOKEN,
        **given,
    )
    return finish_elsewhere(publishing)


@pytest.fixture(scope="module")
def visiting(work, hub, given, published) -> dict:
    """What a process found that loads by name."""
    environment = hub.environment() | {"HF_TOKEN": TOKEN}
    return run_elsewhere(
        visit, work / "visiting", environment=environment, commits=published, image=work / "image.png", **given
    )


@pytest.fixture(scope="module")
def stumbling(work, hub, given, published) -> dict:
    """What a process found that loads by name where things go wrong, and what there was before."""
    shards = {path: content for path, content in hub.files("me/cut").items() if path.endswith(".safetensors")}
    largest = max(shards, key=lambda path: len(shards[path]))
    hub.faults += [
        Fault("PUT", "me/broken.git/lfs", status=500),
        Fault("PUT", "me/broken.git/lfs", status=507),
        Fault("POST", "api/models/me/broken/commit", status=500),
        Fault("GET", f"me/cut/resolve/.*{largest}", cut=11 * 1024**2),
        Fault("GET", f"me/cut/resolve/.*{largest}", status=503),
        Fault("GET", f"me/cut/resolve/.*{largest}", cut=11 * 1024**2),
    ]
    held = []

    def watch(request):
        """Keeps what the cache holds whenever a client asks for the weights that are cut off."""
        if request.method == "GET" and request.path.endswith(largest):
            held.append(cached(work / "stumbling", "me/cut"))

    hub.on_request = watch
    found = {"before": hub.repositories["me/broken"].find("main"), "largest": largest, "held": held}
    given = {"checkpoint": work / "checkpoints/first", "results": given["results"]}
    environment = hub.environment() | {"HF_TOKEN": TOKEN}
    return found | {"errors": run_elsewhere(stumble, work / "stumbling", environment=environment, **given)}


@pytest.fixture(scope="module")
def offline(work, given, published, visiting) -> dict:
    """What a process found with the first client's cache that is told to stay offline."""
    with Hub() as unasked:
        environment = unasked.environment() | {"HF_HUB_OFFLINE": "1"}
        seen = {"first": published["first"], "image": work / "image.png"}
        found = run_elsewhere(stay_home, work / "visiting", environment=environment, **seen, **given)
    return found | {"asked": [*unasked.log, *unasked.outside]}


@pytest.fixture(scope="module")
def gone(work, hub, given, visiting) -> dict[str, list[str]]:
    """What two processes find that reach no Hub: one has the first client's cache, one has nothing, and waits half a
    minute before it believes so."""
    environment = hub.environment() | {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    nobody = start_elsewhere(ask_nobody, work / "nobody", environment)
    environment["HF_TOKEN"] = TOKEN
    found = run_elsewhere(find_it_gone, work / "visiting", environment=environment, results=given["results"])
    return found | finish_elsewhere(nobody)


def cached(home: Path, repo: str) -> list[str]:
    """The files of a repository that a client's cache holds."""
    folder = home / "hf/hub" / f"models--{repo.replace('/', '--')}"
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def left(work: Path, name: str) -> dict[str, torch.Tensor]:
    """Weights, buffers and outputs that a client left."""
    return load_file(work / "results" / f"{name}.safetensors")


def assert_left(work: Path, name: str, model: torch.nn.Module, with_outputs: bool = True):
    found, expected = left(work, name), tensors(model)
    given = {key.removeprefix("output "): found.pop(key) for key in list(found) if key.startswith("output ")}
    assert set(found) == set(expected)
    assert not [key for key in expected if not torch.equal(found[key], expected[key])]
    assert bool(given) == with_outputs
    if with_outputs:
        torch.testing.assert_close(given, outputs(model, make_batch()), rtol=0, atol=1e-6)


# Up


def test_what_is_pushed_is_complete(hub, published, work):
    files = hub.files("me/hivilt")
    assert set(files) == {*CODE, *CHECKPOINT, "README.md", ".gitattributes"}
    assert all(files[name] == (ROOT / name).read_bytes() for name in CODE)
    assert files["model.safetensors"] == (work / "checkpoints/first/model.safetensors").read_bytes()
    assert hub.repositories["me/hivilt"].private
    assert not hub.repositories["me/versions"].private


def test_pushing_what_is_there_changes_nothing(hub, published):
    assert published["unchanged"] == published["second"] == hub.repositories["me/versions"].find("main").id
    assert len(hub.repositories["me/versions"].history()) == 4  # its creation, model, processor, second version


def test_shards_bfloat16_and_adapters_go_up(hub, published):
    shards = [name for name in hub.files("me/sharded") if name.endswith(".safetensors")]
    index = json.loads(hub.files("me/sharded")["model.safetensors.index.json"])
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == set(shards)
    assert {weight.dtype for weight in load(hub.files("me/half")["model.safetensors"]).values()} == {torch.bfloat16}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(hub.files("me/adapter"))
    assert json.loads(hub.files("me/adapter")["adapter_config.json"])["base_model_name_or_path"] == "me/hivilt"


@pytest.mark.parametrize(
    ("repo", "folder", "number_of_runs", "image"),
    [("me/run", "run", 2, "predictions.png"), ("me/found", "found", 1, "retrieval.png")],
)
def test_a_run_goes_up_whole(hub, published, work, repo, folder, number_of_runs, image):
    history = hub.repositories[repo].history()
    assert len(history) == 1 + number_of_runs
    for commit in history[:-1]:
        promised = {*CODE, *CHECKPOINT, "README.md", "results.json", "predictions.jsonl", "training.png", image}
        assert promised <= set(commit.files)
        assert not [path for path in commit.files if "/" in path]
    # As the script left it, card and all, not as Trainer would have it.
    for name, content in hub.files(repo).items():
        assert name == ".gitattributes" or content == (work / folder / name).read_bytes()
    card = ModelCard(hub.files(repo)["README.md"].decode())
    assert card.data.eval_results
    assert f'model="{repo}"' in card.text


def test_neither_a_pickle_nor_the_token_goes_up(hub, published, visiting):
    states = [commit for repository in hub.repositories.values() for commit in repository.commits.values()]
    for path, blob in {(path, blob) for commit in states for path, blob in commit.files.items()}:
        assert Path(path).suffix not in (".bin", ".pt", ".pth", ".pkl", ".ckpt")
        assert TOKEN.encode() not in blob.content
    assert not [content for content in hub.large_files.values() if TOKEN.encode() in content]


def test_the_rest_of_the_hub(published):
    """That hub.py itself is right where no model goes."""
    rest = published["rest"]
    assert rest["user"] == "me"
    assert re.search("409.*already created", rest["again"][1], re.DOTALL)
    assert re.search("412.*commit has happened since", rest["late"][1], re.DOTALL)
    assert rest["tree"] == {
        "None False": ["a", ".gitattributes", "one.txt"],
        "None True": ["a", "a/b", ".gitattributes", "a/b/three.txt", "a/two.txt", "one.txt"],
        "a False": ["a/b", "a/two.txt"],
        "a True": ["a/b", "a/b/three.txt", "a/two.txt"],
        "a/b False": ["a/b/three.txt"],
        "a/b True": ["a/b/three.txt"],
    }
    assert rest["paths"] == [["a/two.txt", 4]]
    assert rest["refs"] == [["main", "draft"], ["half done"]]
    assert rest["files"] == [[".gitattributes"], [".gitattributes", "a/two.txt"], [".gitattributes", "a/two.txt"]]
    assert rest["titles"][-1] == "initial commit"
    assert len(rest["titles"]) == 6


# Down


def test_a_new_process_loads_by_name(visiting, work, models):
    assert visiting["me/hivilt"] == ["HiViLTForQuestionAnswering", "transformers_modules"]
    assert visiting["processor"] == "HiViLTProcessor"
    assert_left(work, "me/hivilt", models["first"])


def test_pipelines_find_their_task(visiting, work):
    folder = str(work / "checkpoints/first")
    answer = pipeline("visual-question-answering", model=folder, trust_remote_code=True)
    expected = answer(make_image(), QUESTION, top_k=2)
    for task in (None, "visual-question-answering"):
        found = visiting[f"pipeline {task}"]
        assert [one["answer"] for one in found] == [one["answer"] for one in expected]
        assert [one["score"] for one in found] == pytest.approx([one["score"] for one in expected], abs=1e-6)
    assert len(visiting["me/run"]) == 5
    # This one's is in no config, but in its card, of which the Hub tells.
    assert {one["label"] for one in visiting["me/found"]} == set(LABELS)


def test_nothing_comes_down_twice(visiting, hub):
    asked = [one.path for one in hub.requests("GET", "me/(sharded|root|run|found|half|adapter)/resolve/")]
    assert len(asked) == len(set(asked)) > 20
    # Two versions have one weights file each, whichever revisions, tags and code went with it.
    assert len(hub.requests("GET", "me/versions/resolve/.*safetensors")) == 2


@pytest.mark.parametrize(
    ("name", "weights", "code", "config"),
    [
        ("default", "second", "second", "second"),
        ("first", "first", "first", "first"),
        ("tag", "first", "first", "first"),
        ("second weights, first code", "second", "first", "first"),
        ("first weights, second code", "first", "second", "second"),
    ],
)
def test_revisions_of_weights_and_code(visiting, work, models, name, weights, code, config):
    assert_left(work, name, models[weights], with_outputs=False)
    assert visiting[name] == {"model": code, "config": code, "processor": code}


def test_shards_bfloat16_and_adapters_come_down(visiting, work, models):
    assert_left(work, "me/sharded", models["first"])
    assert_left(work, "me/half", copy.deepcopy(models["first"]).bfloat16(), with_outputs=False)
    adapted = left(work, "adapted")["logits"]
    assert not torch.allclose(adapted, outputs(models["first"], make_batch())["logits"], atol=1e-3)
    for name in ("PeftModel", "me/adapter"):
        torch.testing.assert_close(left(work, name)["output logits"], adapted, rtol=0, atol=1e-6)


def test_this_repository_is_a_model_repository(visiting, work, hub):
    assert visiting["vqa"] == ["HiViLTForQuestionAnswering", "transformers_modules"]
    assert_left(work, "me/root", HiViLTForRetrieval.from_pretrained(ROOT), with_outputs=False)
    assert_left(work, "vqa", HiViLTForQuestionAnswering.from_pretrained(ROOT, subfolder="vqa"), with_outputs=False)
    vocabularies = [len(HiViLTProcessor.from_pretrained(folder).tokenizer) for folder in (ROOT, ROOT / "vqa")]
    assert visiting["vocabularies"] == vocabularies
    assert vocabularies[0] != vocabularies[1]
    assert {one["label"] for one in visiting["me/root"]} == set(LABELS)


def test_cards_are_valid(visiting):
    assert visiting["cards"] == {
        "me/root": ["zero-shot-image-classification", "transformers"],
        "me/run": ["visual-question-answering", "transformers"],
        "me/found": ["zero-shot-image-classification", "transformers"],
    }


# What goes wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("wrong token", "OSError", "401.*Invalid credentials"),
        ("no token", "OSError", "me/hivilt is not .* a valid model identifier.*private repository.*token"),
        ("no repository", "OSError", "me/nothing is not .* a valid model identifier"),
        ("no repository, processor", "OSError", "me/nothing is not .* a valid model identifier"),
        ("no revision", "OSError", "v9 is not a valid git identifier"),
        ("no code revision", "OSError", "v9 is not a valid git identifier"),
        ("whoami, wrong token", "HfHubHTTPError", "Invalid user token"),
        ("card", "ValueError", "pipeline_tag.*must be a string"),
        ("push, wrong token", "HfHubHTTPError", "401.*Invalid credentials"),
        ("push, not mine", "HfHubHTTPError", "403.*namespace of you/hivilt"),
        ("push, upload refused", "RuntimeError", "Error while uploading 'model.safetensors'"),
        ("push, commit refused", "HfHubHTTPError", "500.*me/broken/commit/main"),
        ("cut off", "OSError", "connection error .*me/cut.*503"),
    ],
)
def test_errors_say_what_is_wrong(stumbling, case, error, words):
    found = stumbling["errors"][case]
    assert found[0] == error
    assert re.search(words, found[1], re.DOTALL)


@pytest.mark.slow
def test_a_push_that_fails_leaves_the_repository_as_it_was(stumbling, hub, work, models):
    assert set(hub.repositories) == {f"me/{name}" for name in REPOSITORIES}
    # The third push is the first commit since; the weights were taken in before, by the second.
    pushed, before, *_ = hub.repositories["me/broken"].history()
    assert before == stumbling["before"]
    assert [one.status for one in hub.requests("PUT", "me/broken")][-3:] == [500, 507, 200]
    changed = load(pushed.files["model.safetensors"].content)
    assert torch.equal(changed["classifier.bias"], models["first"].classifier.bias + 1)


@pytest.mark.slow
def test_a_download_that_is_cut_off_goes_on(stumbling, hub, work, models):
    # The client writes what it has in pieces of 10 MiB, asks for the rest, and begins anew only if it cannot have it.
    asked = [one for one in hub.requests("GET", "me/cut/resolve/") if one.path.endswith(stumbling["largest"])]
    rest = f"bytes={10 * 1024**2}-"
    assert [(one.range, one.status) for one in asked] == [(None, 200), (rest, 503), (None, 200), (rest, 206)]
    assert_left(work, "second attempt", models["large"], with_outputs=False)
    # The other shards were there, and stayed.
    assert len(hub.requests("GET", "me/cut/resolve/.*safetensors$")) == len(asked) + 1


@pytest.mark.slow
def test_what_is_half_there_is_never_taken_for_whole(stumbling, hub):
    whole = hub.repositories["me/cut"].find("main").files[stumbling["largest"]].sha256
    assert len(stumbling["held"]) == 4
    for held in stumbling["held"]:
        assert not [path for path in held if path.endswith((stumbling["largest"], whole))]
        assert len([path for path in held if re.search(f"{whole}.*incomplete", path)]) == 1


# Older versions of transformers only say what they want.
NO_HUB = "couldn't connect to 'http://127.0.0.1:.*couldn't find them in the cached files|Can't load the config"


def test_what_was_loaded_once_loads_offline(offline, visiting, work, models):
    assert_left(work, "offline", models["first"])
    assert_left(work, "offline, first", models["first"], with_outputs=False)
    assert offline["processor"] == "HiViLTProcessor"
    assert offline["pipeline"] == visiting["pipeline None"]
    assert offline["unknown"][0] == "OSError" and re.search(NO_HUB, offline["unknown"][1])
    assert offline["asked"] == []


@pytest.mark.slow
def test_what_was_loaded_once_loads_where_the_hub_is_gone(gone, work, models):
    assert_left(work, "gone", models["first"], with_outputs=False)
    assert gone["load"][0] == "OSError" and re.search(NO_HUB, gone["load"][1])
    assert gone["push"][0] == "ConnectError" and "refused" in gone["push"][1]
    assert cached(work / "nobody", "me/hivilt") == []


def test_no_client_asks_anybody_else(hub, visiting):
    assert hub.outside == []
