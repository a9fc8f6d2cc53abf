"""
What a process does that talks to the Hub of hub.py, with transformers, peft and huggingface_hub as they are.

    tests/hub_client.py FUNCTION ARGUMENTS.json RESULT.json

`start_elsewhere` of fresh.py starts such a process, and `finish_elsewhere` hands its result back.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

import torch
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    pipeline,
)

from elsewhere import answer_request, outputs, tensors

FUSION = r"model\.fusion\..*(q|k|v|o)_proj|model\.fusion\..*fc[12]"
QUESTION = "what shape is in the image"
LABELS = ["red", "blue circle", "three"]


def _keep(results: str, name: str, model, batch: dict[str, torch.Tensor] | None = None) -> list[str]:
    """Leaves weights, buffers and logits in a file; gives the class and the module it came from."""
    kept = tensors(model) | ({} if batch is None else {f"output {k}": v for k, v in outputs(model, batch).items()})
    save_file(kept, Path(results, f"{name}.safetensors"))
    return [type(model).__name__, type(model).__module__.split(".")[0]]


def _error(function: Callable, *args, **kwargs) -> list[str]:
    """The class and the words of the error that a call ends in; empty if it does not."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["", ""]


# With hivilt: what goes up


def publish(
    checkpoints: str, results: str, batch: str, question_answering: list[str], retrieval: list[str], token: str
) -> dict:
    """Runs the scripts, which push with the token among their flags; then, with one that is set, pushes models and
    processors with HiViLT's classes, and folders as they are."""
    import pytest
    from peft import LoraConfig, get_peft_model

    from hivilt import HiViLTForQuestionAnswering, HiViLTProcessor, run_retrieval, run_vqa
    from tiny import draw_blank, draw_with

    draw_with(pytest.MonkeyPatch(), lambda name: draw_blank)

    for main, flags in (
        (run_vqa.main, question_answering),
        (run_retrieval.main, retrieval),
        (run_vqa.main, [*question_answering, "--overwrite_output_dir"]),
    ):
        main(flags)
    os.environ["HF_TOKEN"] = token
    api, folder, batch = HfApi(), Path(checkpoints), load_file(batch)
    model = HiViLTForQuestionAnswering.from_pretrained(folder / "first")
    processor = HiViLTProcessor.from_pretrained(folder / "first")
    for repo, private in (("me/hivilt", True), ("me/versions", False), ("me/broken", False)):
        model.push_to_hub(repo, private=private)
        processor.push_to_hub(repo)
    facts = {"first": api.repo_info("me/versions").sha}
    api.create_tag("me/versions", tag="v1")
    facts["second"] = api.upload_folder(repo_id="me/versions", folder_path=folder / "second").oid
    facts["unchanged"] = api.upload_folder(repo_id="me/versions", folder_path=folder / "second").oid

    model.push_to_hub("me/sharded", max_shard_size="40KB")
    HiViLTForQuestionAnswering.from_pretrained(folder / "large").push_to_hub("me/cut", max_shard_size="1MB")
    HiViLTForQuestionAnswering.from_pretrained(folder / "first", dtype=torch.bfloat16).push_to_hub("me/half")
    base = HiViLTForQuestionAnswering.from_pretrained("me/hivilt")
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(target_modules=FUSION, r=2, init_lora_weights=False)).eval()
    adapted.push_to_hub("me/adapter")
    save_file({"logits": outputs(adapted, batch)["logits"]}, Path(results, "adapted.safetensors"))
    facts["rest"] = use_the_rest("me/rest")
    api.create_repo("me/root")
    api.upload_folder(repo_id="me/root", folder_path=folder / "root")
    return facts


def use_the_rest(repo: str) -> dict:
    """What tools do with a repository that neither transformers nor peft does."""
    api, file = HfApi(), {"path_or_fileobj": b"text", "repo_id": repo}
    start = api.create_repo(repo).repo_id and api.repo_info(repo).sha
    facts = {"user": api.whoami()["name"], "again": _error(api.create_repo, repo)}
    api.create_branch(repo, branch="draft", exist_ok=True)
    for path in ("one.txt", "a/two.txt", "a/b/three.txt"):
        api.upload_file(**file, path_in_repo=path, revision="draft")
    facts["late"] = _error(api.upload_file, **file, path_in_repo="x.txt", revision="draft", parent_commit=start)
    facts["tree"] = {
        f"{folder} {recursive}": [
            entry.path for entry in api.list_repo_tree(repo, folder, recursive=recursive, revision="draft")
        ]
        for folder in (None, "a", "a/b")
        for recursive in (False, True)
    }
    facts["paths"] = [[one.path, one.size] for one in api.get_paths_info(repo, ["a/two.txt", "none"], revision="draft")]
    api.delete_file("one.txt", repo, revision="draft")
    api.delete_folder("a/b", repo, revision="draft")
    api.create_tag(repo, tag="half done", revision="draft")
    refs = api.list_repo_refs(repo)
    facts["refs"] = [[ref.name for ref in refs.branches], [ref.name for ref in refs.tags]]
    facts["files"] = [api.list_repo_files(repo, revision=name) for name in ("main", "draft", "half done")]
    facts["titles"] = [commit.title for commit in api.list_repo_commits(repo, revision="draft")]
    return facts


# Without: what comes down


def visit(commits: dict[str, str], image: str, batch: str, results: str) -> dict:
    """Loads it all by name into an empty cache."""
    from peft import PeftModel

    batch, image, remote = load_file(batch), Image.open(image), {"trust_remote_code": True}
    load = AutoModelForVisualQuestionAnswering.from_pretrained
    facts = {"me/hivilt": _keep(results, "me/hivilt", load("me/hivilt", **remote), batch)}
    facts["processor"] = type(AutoProcessor.from_pretrained("me/hivilt", **remote)).__name__
    for task in (None, "visual-question-answering"):
        facts[f"pipeline {task}"] = pipeline(task, model="me/hivilt", **remote)(image, QUESTION, top_k=2)

    first, second = commits["first"], commits["second"]
    for name, revisions in {
        "default": {},
        "first": {"revision": first},
        "tag": {"revision": "v1"},
        "second weights, first code": {"code_revision": first},
        "first weights, second code": {"revision": first, "code_revision": second},
    }.items():
        model = load("me/versions", **remote, **revisions)
        processor = AutoProcessor.from_pretrained("me/versions", **remote, **revisions)
        _keep(results, name, model)
        parts = {"model": model, "config": model.config, "processor": processor}
        facts[name] = {part: vars(type(one)).get("EDITION", "first") for part, one in parts.items()}

    _keep(results, "me/sharded", load("me/sharded", **remote), batch)
    _keep(results, "me/half", load("me/half", **remote))
    _keep(results, "PeftModel", PeftModel.from_pretrained(load("me/hivilt", **remote), "me/adapter"), batch)
    _keep(results, "me/adapter", load("me/adapter", **remote), batch)

    facts["vqa"] = _keep(results, "vqa", load("me/root", subfolder="vqa", **remote))
    load = AutoModelForZeroShotImageClassification.from_pretrained
    _keep(results, "me/root", load("me/root", **remote))
    processors = [AutoProcessor.from_pretrained("me/root", subfolder=name, **remote) for name in ("", "vqa")]
    facts["vocabularies"] = [len(processor.tokenizer) for processor in processors]
    facts["me/run"] = pipeline(model="me/run", **remote)(image, QUESTION)
    for repo in ("me/root", "me/found"):
        facts[repo] = pipeline(model=repo, **remote)(image, candidate_labels=LABELS)

    cards = {repo: ModelCard.load(repo) for repo in ("me/root", "me/run", "me/found")}
    for repo, card in cards.items():
        # Not `card.validate()`: with huggingface_hub 1.x that asks huggingface.co, whatever HF_ENDPOINT says.
        HfApi().upload_file(path_or_fileobj=card.content.encode(), path_in_repo="README.md", repo_id=repo)
    facts["cards"] = {repo: [card.data.pipeline_tag, card.data.library_name] for repo, card in cards.items()}
    return facts


def stumble(checkpoint: str, results: str) -> dict:
    """Meets everything that goes wrong while the Hub is there."""
    facts, api = {}, HfApi()
    remote = {"trust_remote_code": True}
    load = AutoModelForVisualQuestionAnswering.from_pretrained
    facts["wrong token"] = _error(load, "me/hivilt", token="hf_wrong", **remote)
    facts["no token"] = _error(load, "me/hivilt", token=False, **remote)
    facts["no repository"] = _error(load, "me/nothing", **remote)
    facts["no repository, processor"] = _error(AutoProcessor.from_pretrained, "me/nothing", **remote)
    facts["no revision"] = _error(load, "me/versions", revision="v9", **remote)
    facts["no code revision"] = _error(load, "me/versions", code_revision="v9", **remote)
    facts["whoami, wrong token"] = _error(api.whoami, token="hf_wrong")
    card = {"path_or_fileobj": b"---\npipeline_tag: [one, two]\n---\n", "path_in_repo": "README.md"}
    facts["card"] = _error(api.upload_file, **card, repo_id="me/broken")

    model = load(checkpoint, **remote)
    facts["push, wrong token"] = _error(model.push_to_hub, "me/new", token="hf_wrong")
    facts["push, not mine"] = _error(model.push_to_hub, "you/hivilt")
    with torch.no_grad():
        model.classifier.bias += 1
    facts["push, upload refused"] = _error(model.push_to_hub, "me/broken")
    facts["push, commit refused"] = _error(model.push_to_hub, "me/broken")
    model.push_to_hub("me/broken")

    facts["cut off"] = _error(load, "me/cut", **remote)
    _keep(results, "second attempt", load("me/cut", **remote))
    return facts


def stay_home(results: str, first: str, image: str, batch: str) -> dict:
    """Loads offline what an earlier process has seen, and what none has."""
    load, remote = AutoModelForVisualQuestionAnswering.from_pretrained, {"trust_remote_code": True}
    _keep(results, "offline", load("me/hivilt", **remote), load_file(batch))
    _keep(results, "offline, first", load("me/versions", revision=first, **remote))
    return {
        "processor": type(AutoProcessor.from_pretrained("me/hivilt", **remote)).__name__,
        "pipeline": pipeline(model="me/hivilt", **remote)(Image.open(image), QUESTION, top_k=2),
        "unknown": _error(load, "me/unknown", **remote),
    }


def find_it_gone(results: str) -> dict:
    """Loads what is in the cache, without a Hub, and tries to push."""
    model = AutoModelForVisualQuestionAnswering.from_pretrained("me/hivilt", trust_remote_code=True)
    _keep(results, "gone", model)
    return {"push": _error(model.push_to_hub, "me/hivilt")}


def ask_nobody() -> dict:
    """Loads with nothing in the cache and no Hub; a config, for the client waits for each file it wants."""
    return {"load": _error(AutoConfig.from_pretrained, "me/hivilt", trust_remote_code=True)}


if __name__ == "__main__":
    answer_request(globals())
