"""
What a process does that has nothing but a checkpoint's folder: no installed hivilt, no network, an empty module cache.

    tests/elsewhere.py FUNCTION ARGUMENTS.json RESULT.json

`run_elsewhere` of fresh.py starts such a process and hands its result back.
"""

import contextlib
import functools
import importlib
import io
import json
import os
import sys
from collections.abc import Collection
from pathlib import Path

if __name__ == "__mp_main__":
    # In a worker that spawns from here an installed hivilt, editable or not, must be as good as absent, too.
    sys.modules["hivilt"] = None

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    logging,
    pipeline,
    set_seed,
)

# What both sides do


def tensors(model) -> dict[str, torch.Tensor]:
    """Every parameter and every buffer, also those that are not saved."""
    named = [*model.named_parameters(), *((f"buffer {name}", buffer) for name, buffer in model.named_buffers())]
    return {name: tensor.detach().clone().contiguous() for name, tensor in named}


def outputs(model, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What each class computes for a batch."""
    if "Generation" in type(model).__name__:
        batch = batch | {"decoder_input_ids": batch["input_ids"]}  # it reads anything
    if "ImagesAndText" in type(model).__name__:
        batch = batch | {"image_index": torch.stack([batch["image_index"], batch["image_index"].flip(0)], dim=1)}
    with torch.no_grad():
        result = model(**batch)
        if "Retrieval" in type(model).__name__:
            images = model.encode_images(batch["pixel_values"])
            texts = model.encode_texts(batch["input_ids"], batch["attention_mask"])
            result["score"] = model.score(images, texts, batch["image_index"])
    kept = (
        "logits",
        "pred_boxes",
        "global_fusion_state",
        "local_fusion_state",
        "logits_per_image",
        "text_embeds",
        "score",
    )
    return {name: result[name].contiguous() for name in kept if name in result}


def fine_tune(model, processor, output_dir: Path, resume_from: Path | None = None) -> list[float]:
    """Four steps with a checkpoint after each two, dropout and all; the loss of each step."""
    from transformers import Trainer, TrainingArguments  # a second, which those that do not train save

    generator = torch.Generator().manual_seed(0)
    examples = [
        {
            "input_ids": torch.randint(5, 25, (7,), generator=generator),
            "pixel_values": torch.randn(3, 20, 20, generator=generator),
            "labels": torch.tensor(index % 5),
        }
        for index in range(10)
    ]
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        remove_unused_columns=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, processing_class=processor)
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    trainer.save_model()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


# What runs elsewhere: it returns facts, and leaves tensors behind in files


def _import_hivilt() -> str:
    try:
        return importlib.import_module("hivilt").__file__
    except ImportError as error:
        return type(error).__name__


def _dirty_the_allocator():
    # A buffer that loading forgot holds what was in its memory before: let that not be zeros by chance.
    dirt = [torch.full((size,), 77) for size in range(1, 400) for _ in range(3)]
    del dirt


def _open(auto_class, folder, **kwargs):
    _dirty_the_allocator()
    return auto_class.from_pretrained(folder, trust_remote_code=True, **kwargs)


def classes_to_open(architecture: str, names: Collection[str]) -> list[str]:
    """Of the names of all classes those that a checkpoint is opened as: its own, the base model's, and the next one."""
    after = sorted(names)[(sorted(names).index(architecture) + 1) % len(names)]
    return [name for name in names if name in (architecture, "HiViLTModel", after)]


def load_all(checkpoints: str, results: str, again: str, with_others: bool = False) -> dict:
    """Opens each of `checkpoints` with its own auto class, or `with_others` too, and saves what fits it best to `again`."""
    facts = {}
    batch = load_file(Path(checkpoints, "batch.safetensors"))
    for folder in sorted(path for path in Path(checkpoints).iterdir() if path.is_dir()):
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (architecture,) = saved["architectures"]
        of_models = {auto: ours for auto, ours in saved["auto_map"].items() if auto.startswith("AutoModel")}
        opened = classes_to_open(architecture, [ours.split(".")[1] for ours in of_models.values()])
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        facts[folder.name] = {"AutoConfig": type(config).__name__, "AutoProcessor": type(processor).__name__}
        facts[folder.name]["modules"] = [type(config).__module__, type(processor).__module__]
        for auto_class, name in ((getattr(transformers, auto), ours.split(".")[1]) for auto, ours in of_models.items()):
            if name not in (opened if with_others else [architecture]):
                continue
            model, loading = _open(auto_class, folder, output_loading_info=True)
            facts[folder.name][auto_class.__name__] = {
                "class": type(model).__name__,
                **{kind: sorted(loading[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")},
            }
            facts[folder.name]["modules"].append(type(model).__module__)
            if name == architecture:
                save_file(outputs(model, batch), Path(results, f"{folder.name}.outputs.safetensors"))
                save_file(tensors(model), Path(results, f"{folder.name}.tensors.safetensors"))
                model.save_pretrained(Path(again, folder.name))
                processor.save_pretrained(Path(again, folder.name))
                with torch.device("meta"):
                    built = type(model)(config)
                facts[folder.name]["on meta"] = all(parameter.is_meta for parameter in built.parameters())
    save_file(batch, Path(again, "batch.safetensors"))
    return facts


def first_process(checkpoints: str, place: str, results: str, again: str, trained: str) -> dict:
    """All that can be done with what the testing process saved."""
    facts = {"hivilt": _import_hivilt()}
    facts["loaded"] = load_all(checkpoints, results, again, with_others=True)
    batch = load_file(Path(checkpoints, "batch.safetensors"))
    folder = Path(checkpoints, "HiViLTForRetrieval")

    half = _open(AutoModelForZeroShotImageClassification, folder, dtype=torch.bfloat16)
    save_file(tensors(half), Path(results, "bfloat16.safetensors"))
    mapped = _open(AutoModelForZeroShotImageClassification, folder, device_map={"": "cpu"})
    save_file(tensors(mapped), Path(results, "device_map.safetensors"))
    on_disk = {name: "cpu" for name in [*half._parameters, *half._modules, "model.vision_model"] if name != "model"}
    on_disk |= {"model.text_model": "disk", "model.fusion": "disk"}
    offloaded = _open(
        AutoModelForZeroShotImageClassification, folder, device_map=on_disk, offload_folder=Path(results, "offloaded")
    )
    facts["offloaded"] = any(parameter.is_meta for parameter in offloaded.parameters())
    save_file(outputs(offloaded, batch), Path(results, "offloaded.safetensors"))

    # Saving to "." while the code of "." runs.
    os.chdir(place)
    model = _open(AutoModelForVisualQuestionAnswering, ".")
    model.save_pretrained(".")
    AutoProcessor.from_pretrained(".", trust_remote_code=True).save_pretrained(".")
    reopened = _open(AutoModelForVisualQuestionAnswering, ".")
    save_file(outputs(reopened, batch), Path(results, "place.safetensors"))

    processor = AutoProcessor.from_pretrained(place, trust_remote_code=True)

    def fresh_model():
        return _open(AutoModelForVisualQuestionAnswering, place, dtype=torch.float32)

    set_seed(0)
    facts["losses"] = fine_tune(fresh_model(), processor, Path(trained))
    facts["losses, resumed"] = fine_tune(
        fresh_model(), processor, Path(trained, "resumed"), Path(trained, "checkpoint-2")
    )
    return facts


def collate_in_a_spawned_worker(place: str) -> dict:
    """Batches that a processor makes in another process, which imports everything anew, and in this one."""
    processor = AutoProcessor.from_pretrained(place, trust_remote_code=True)
    images = [(Image.new("RGB", (9, 13), color), f"is it {color}") for color in ("red", "blue", "lime")]
    collate = functools.partial(_collate, processor)
    spawned = DataLoader(images, batch_size=2, num_workers=1, multiprocessing_context="spawn", collate_fn=collate)
    here = [collate(images[start : start + 2]) for start in (0, 2)]
    return {
        name: [{name: value.tolist() for name, value in batch.items()} for batch in batches]
        for name, batches in {"spawned": spawned, "not spawned": here}.items()
    }


def _collate(processor, examples: list) -> dict:
    images, questions = zip(*examples, strict=True)
    return dict(processor(images=list(images), text=list(questions), return_tensors="pt", padding="max_length"))


def second_process(checkpoints: str, trained: str, results: str, again: str) -> dict:
    """The same with what the first process saved, and what it trained."""
    facts = {"hivilt": _import_hivilt()}
    facts["loaded"] = load_all(checkpoints, results, again)
    image = Image.new("RGB", (31, 23), "red")
    for folder in Path(trained), Path(trained, "checkpoint-2"), Path(trained, "resumed"):
        answer = pipeline("visual-question-answering", model=str(folder), trust_remote_code=True)
        facts[f"pipeline {folder.name}"] = answer(image, "what color is it", top_k=2)
        facts[f"AutoModel {folder.name}"] = type(_open(AutoModel, folder)).__name__
    return facts


def answer_everywhere(
    qa: str, retrieval: str, image: str, again: str, grounding: str | None = None, reasoning: str | None = None
) -> dict:
    """What the pipelines of two to four checkpoints say, the first of them also after it was saved from here."""
    questions = ["what color is the circle", "is there a square"]
    vqa = pipeline("visual-question-answering", model=qa, trust_remote_code=True)
    vqa.save_pretrained(again)
    half = pipeline(model=qa, trust_remote_code=True, dtype="bfloat16", top_k=1)
    labels = ["red", "blue circle", "three"]
    found = {}
    if grounding is not None:
        find = pipeline("zero-shot-object-detection", model=grounding, trust_remote_code=True)
        found["class of boxes"] = [type(find).__name__, type(find.model).__module__.split(".")[0]]
        found["boxes"] = find(image, candidate_labels=labels)
        found["boxes, inferred"] = pipeline(model=grounding, trust_remote_code=True)(image, labels, top_k=2)
    if reasoning is not None:
        judge = pipeline("images-and-text-classification", model=reasoning, trust_remote_code=True)
        requests = [{"images": [image, Image.new("RGB", (31, 23), "blue")], "text": ["is it red", "two"]}]
        found["class of labels"] = [type(judge).__name__, type(judge.model).__module__.split(".")[0]]
        found["labels"] = judge(requests)
        found["labels, inferred"] = pipeline(model=reasoning, trust_remote_code=True)(requests, top_k=1)
    return found | {
        "class": [type(vqa).__name__, type(vqa.processor).__name__, type(vqa.model).__module__.split(".")[0]],
        "task": vqa(image, questions),
        "inferred": pipeline(model=qa, trust_remote_code=True)(image, questions),
        "saved again": pipeline(model=again, trust_remote_code=True)(image, questions),
        "half": [half.dtype == torch.bfloat16, half(image, questions)],
        "zero-shot": pipeline("zero-shot-image-classification", model=retrieval, trust_remote_code=True)(
            image, candidate_labels=labels, hypothesis_template="{}"
        ),
    }


def open_and_answer(opening: dict[str, str], answering: dict[str, str]) -> dict:
    """Both in one process, which imports everything once."""
    return {"opened": load_all(**opening), "answered": answer_everywhere(**answering)}


def run_code(folder: str, code: str) -> dict:
    """Runs code as if typed in a folder: what it printed, whom it called, and what it wrote outside of the caches."""
    os.chdir(folder)
    called, written = [], []
    mine = (os.environ["HOME"], sys.prefix, os.devnull)

    def watch(event: str, arguments: tuple) -> None:
        if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.fork"):
            called.append(f"{event} {arguments}")
        # A number is a file that was opened, and seen, before.
        elif event == "open" and not isinstance(arguments[0], int):
            path, _, flags = arguments
            if (flags or 0) & (os.O_WRONLY | os.O_RDWR) and not os.path.abspath(os.fsdecode(path)).startswith(mine):
                written.append(os.fsdecode(path))

    sys.addaudithook(watch)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {"__name__": "__main__"})
    return {"printed": printed.getvalue(), "called": called, "written": written}


def open_from_folder_and_hub(checkpoint: str, repository: str, results: str) -> dict:
    """Opens a folder, and a repository of the Hub that is in the cache; saves what the latter gave."""
    facts = {}
    batch = load_file(Path(checkpoint).parent / "batch.safetensors")
    for name in (checkpoint, repository):
        model = _open(AutoModelForVisualQuestionAnswering, name)
        facts[name] = [type(model).__name__, type(AutoProcessor.from_pretrained(name, trust_remote_code=True)).__name__]
        facts[f"logits {name}"] = outputs(model, batch)["logits"].tolist()
    model.save_pretrained(results)
    return facts


def answer_request(functions: dict) -> None:
    """What such a process is there for: runs the function that its command line names, and leaves what it gives."""
    name, request, result = sys.argv[1:]
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    returned = functions[name](**json.loads(Path(request).read_text(encoding="utf-8")))
    Path(result).write_text(json.dumps(returned), encoding="utf-8")


if __name__ == "__main__":
    answer_request(globals())
