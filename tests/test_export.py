"""Compiled, exported and as ONNX: graphs for deployment give what the model gives, for batches of any size."""

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

from hivilt import (
    HiViLTForImagesAndTextClassification,
    HiViLTForQuestionAnswering,
    HiViLTForRetrieval,
    HiViLTForVisualGrounding,
)
from hivilt.modeling_hivilt import HiViLTPreTrainedModel
from tiny import HEAD_FACTS, IMAGE_SIZE, make_batch, make_model

# Images, texts, tokens. An example to export from needs two of each at least; what was exported takes one, too.
EXAMPLE = (3, 5, 7)
OTHERS = [(1, 1, 1), (1, 4, 22), (4, 2, 3), (6, 6, 9)]

DYNAMIC = torch.export.Dim.DYNAMIC
SHAPES = {
    "input_ids": {0: DYNAMIC, 1: DYNAMIC},
    "attention_mask": {0: DYNAMIC, 1: DYNAMIC},
    "pixel_values": {0: DYNAMIC},
    "image_index": {0: DYNAMIC},
}


class Part(torch.nn.Module):
    """One step of a model as a module, which is what `torch.export` and `torch.onnx` take."""

    def __init__(self, model: HiViLTPreTrainedModel, step: str):
        super().__init__()
        self.model = model
        self.forward = getattr(model, step)


@pytest.fixture(autouse=True)
def as_deployed():
    """Without gradients, which SDPA of encoders with learned attention biases (Swin, T5) cannot carry into ONNX."""
    torch.compiler.reset()
    with torch.no_grad():
        yield


def make_inputs(model: HiViLTPreTrainedModel, num_images: int, num_texts: int, num_tokens: int) -> dict:
    """What the model answers or embeds; each text has another amount of padding, up to the length of all texts."""
    generator = torch.Generator().manual_seed(num_tokens)
    lengths = torch.arange(num_texts) % num_tokens + 1
    inputs = {
        "input_ids": torch.randint(5, 61, (num_texts, num_tokens), generator=generator),
        "attention_mask": (torch.arange(num_tokens) < lengths[:, None]).long(),
        "pixel_values": torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
    }
    if isinstance(model, HiViLTForRetrieval):
        return inputs
    image_index = torch.arange(num_texts) % num_images
    if isinstance(model, HiViLTForImagesAndTextClassification):
        image_index = torch.stack([image_index, image_index.flip(0)], dim=1)
    return inputs | {"image_index": image_index}


def encode(model: HiViLTPreTrainedModel, *sizes: int) -> dict:
    """What fusion takes: both sides encoded, and an image for each text."""
    inputs = make_inputs(model, *sizes)
    return {
        "image_states": model.encode_images(inputs["pixel_values"]),
        "text_states": model.encode_texts(inputs["input_ids"], inputs["attention_mask"]),
        "image_index": torch.arange(sizes[1]) % sizes[0],
    }


def export(model: torch.nn.Module, inputs: dict) -> torch.export.ExportedProgram:
    return torch.export.export(
        model, (), inputs, dynamic_shapes={name: shape for name, shape in SHAPES.items() if name in inputs}
    )


@cache
def exported(model_class, vision: str, text: str) -> tuple[HiViLTPreTrainedModel, torch.export.ExportedProgram]:
    """A model and its program, which give plain tuples: a class of outputs would have to be known where it runs."""
    model = make_model(model_class, weight_scale=4.0, vision=vision, text=text, fusion_top_k=3)
    model.config.return_dict = False
    return model, export(model, make_inputs(model, *EXAMPLE))


def run_onnx(path: Path, inputs: dict) -> list[torch.Tensor]:
    """What onnxruntime gives for inputs in their order."""
    session = onnxruntime.InferenceSession(path)
    values = [value.numpy() for value in tree_leaves(inputs) if isinstance(value, torch.Tensor)]
    names = [node.name for node in session.get_inputs()]
    return [torch.from_numpy(output) for output in session.run(None, dict(zip(names, values, strict=True)))]


def assert_same(found, expected, atol: float = 1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


# torch.compile


@pytest.mark.slow
@pytest.mark.checklist("12")
@pytest.mark.parametrize(
    ("model_class", "top_k"),
    [
        (HiViLTForQuestionAnswering, None),
        (HiViLTForQuestionAnswering, 3),
        (HiViLTForRetrieval, 3),
        (HiViLTForVisualGrounding, None),
        (HiViLTForImagesAndTextClassification, None),
    ],
)
def test_compiled_without_a_graph_break_it_gives_the_same(model_class, top_k):
    model = make_model(model_class, weight_scale=8.0, fusion_top_k=top_k)
    inputs = make_inputs(model, *EXAMPLE)
    with_states = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with_states["image_states"] = model.encode_images(inputs["pixel_values"])
    calls = [(model, inputs), (model, with_states)]
    if model_class is HiViLTForRetrieval:
        calls.append((model.score, encode(model, *EXAMPLE)))
    for function, given in calls:
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        expected = function(**given)
        assert_same(compiled(**given), expected)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_same(compiled(**given), expected)


@pytest.mark.slow
@pytest.mark.checklist("12")
@pytest.mark.parametrize(
    ("top_k", "make"), [(3, make_inputs), (None, encode)], ids=["sparse from images", "dense from states"]
)
def test_compiled_with_dynamic_shapes_it_takes_batches_of_any_size(top_k, make):
    model = make_model(HiViLTForQuestionAnswering, weight_scale=8.0, fusion_top_k=top_k)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    # torch takes sizes that are equal in the first call for equal in all: neither 3 channels nor a grid of 5 by 5.
    compiled(**make(model, 4, 6, 7))
    with torch.compiler.set_stance("fail_on_recompile"):
        for sizes in ((2, 3, 9), (3, 8, 22), (5, 5, 2)):
            inputs = make(model, *sizes)
            assert_same(compiled(**inputs), model(**inputs))


@pytest.mark.slow
@pytest.mark.checklist("12")
def test_compiled_to_machine_code_fusion_gives_the_same():
    # The encoders are transformers' own; without them it is half the code to compile.
    model = make_model(HiViLTForQuestionAnswering, weight_scale=8.0, fusion_top_k=3, num_fusion_stages=1)
    # Inductor, the default, needs a C++ compiler; elsewhere the same graph runs operation by operation.
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if shutil.which("g++") else "aot_eager")
    inputs = encode(model, *EXAMPLE)
    assert_same(compiled(**inputs), model(**inputs))


@pytest.mark.checklist("12")
@pytest.mark.parametrize(
    ("model_class", "given"),
    [
        (HiViLTForQuestionAnswering, {"labels": torch.arange(5)}),
        pytest.param(HiViLTForQuestionAnswering, {"labels": torch.eye(5)}, marks=pytest.mark.slow),
        pytest.param(HiViLTForRetrieval, {"return_loss": True}, marks=pytest.mark.slow),
        *(
            pytest.param(head, HEAD_FACTS[head].wishes, marks=pytest.mark.slow)
            for head in (HiViLTForVisualGrounding, HiViLTForImagesAndTextClassification)
        ),
    ],
    ids=["answers", "scores", "retrieval", "grounding", "reasoning"],
)
def test_compiled_without_a_graph_break_it_has_the_same_loss(model_class, given):
    # Of one stage, since what a loss adds comes after fusion.
    model = make_model(model_class, weight_scale=8.0, auxiliary_loss_weight=1.0, num_fusion_stages=1)
    given = make_batch() | given
    expected = model(**given)
    read_as = model.config.problem_type
    model.config.problem_type = None
    assert_same(torch.compile(model, fullgraph=True, backend="aot_eager")(**given), expected)
    assert model.config.problem_type == read_as


# torch.export and ONNX


@pytest.mark.checklist("12")
@pytest.mark.slow
@pytest.mark.parametrize(
    "model_class",
    [
        HiViLTForQuestionAnswering,
        HiViLTForRetrieval,
        HiViLTForVisualGrounding,
        HiViLTForImagesAndTextClassification,
    ],
)
def test_transformers_own_exporter_takes_it_with_dynamic_shapes(model_class):
    model = make_model(model_class, weight_scale=8.0)
    inputs = make_inputs(model, *EXAMPLE)
    shapes = {name: shape for name, shape in SHAPES.items() if name in inputs}
    program = DynamoExporter().export(model, dict(inputs), config=DynamoConfig(dynamic=True, dynamic_shapes=shapes))
    # Older versions give torch's program, newer ones what runs it.
    run = program.module() if isinstance(program, torch.export.ExportedProgram) else program
    for sizes in OTHERS:
        inputs = make_inputs(model, *sizes)
        assert_same(dict(run(**inputs)), dict(model(**inputs)))


@pytest.mark.checklist("12")
@pytest.mark.parametrize(
    ("model_class", "vision", "text"),
    [
        pytest.param(HiViLTForQuestionAnswering, "vit", "bert", marks=pytest.mark.slow),
        pytest.param(HiViLTForVisualGrounding, "vit", "bert", marks=pytest.mark.slow),
        pytest.param(HiViLTForImagesAndTextClassification, "vit", "bert", marks=pytest.mark.slow),
        # Encoders alone, since embeddings need no fusion.
        pytest.param(HiViLTForRetrieval, "swin", "t5", marks=pytest.mark.slow),
        pytest.param(HiViLTForRetrieval, "clip", "clip", marks=pytest.mark.slow),
        pytest.param(HiViLTForRetrieval, "siglip", "roberta", marks=pytest.mark.slow),
        pytest.param(HiViLTForRetrieval, "convnext", "distilbert", marks=pytest.mark.slow),
    ],
)
def test_exported_it_gives_the_same_for_batches_of_any_size_as_onnx_too(model_class, vision, text, tmp_path):
    model, program = exported(model_class, vision, text)
    torch.onnx.export(program, (), tmp_path / "model.onnx", verbose=False)
    for sizes in (EXAMPLE, *OTHERS):
        inputs = make_inputs(model, *sizes)
        expected = model(**inputs)
        assert_same(program.module()(**inputs), expected)
        assert_same(run_onnx(tmp_path / "model.onnx", inputs), tree_leaves(expected), atol=1e-4)


@pytest.mark.slow
@pytest.mark.checklist("12")
@pytest.mark.parametrize(("model_class", "top_k"), [(HiViLTForQuestionAnswering, None), (HiViLTForRetrieval, 3)])
def test_exported_in_three_parts_it_gives_the_same_as_onnx_too(model_class, top_k, tmp_path):
    model = make_model(model_class, weight_scale=8.0, fusion_top_k=top_k)
    inputs = make_inputs(model, *EXAMPLE)
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    encode_images = export(Part(model, "encode_images"), {"pixel_values": inputs["pixel_values"]}).module()
    encode_texts = export(Part(model, "encode_texts"), texts).module()
    # A second example says which sizes of the states vary.
    others = torch.export.AdditionalInputs()
    others.add((), encode(model, 2, 4, 9))
    rest = Part(model, "score") if model_class is HiViLTForRetrieval else model
    program = torch.export.export(rest, (), encode(model, *EXAMPLE), dynamic_shapes=others)
    torch.onnx.export(program, (), tmp_path / "rest.onnx", verbose=False)
    for sizes in (EXAMPLE, *OTHERS):
        inputs, states = make_inputs(model, *sizes), encode(model, *sizes)
        expected = rest(**states)
        found = {
            "image_states": encode_images(pixel_values=inputs["pixel_values"]),
            "text_states": encode_texts(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]),
            "image_index": states["image_index"],
        }
        assert_same(program.module()(**found), expected)
        assert_same(run_onnx(tmp_path / "rest.onnx", found), tree_leaves(expected), atol=1e-4)


@pytest.mark.slow
@pytest.mark.checklist("12")
def test_saved_program_runs_where_there_is_no_hivilt(tmp_path):
    model, program = exported(HiViLTForQuestionAnswering, "vit", "bert")
    batch = make_batch()
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save(batch, tmp_path / "batch.pt")
    code = (
        "import json, sys, torch\n"
        'program, batch = torch.export.load("model.pt2"), torch.load("batch.pt")\n'
        "(logits,) = program.module()(**batch)\n"
        'print(json.dumps([logits.tolist(), [name for name in ("hivilt", "transformers") if name in sys.modules]]))'
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits, imported = json.loads(done.stdout)
    assert_same(torch.tensor(logits), model(**batch)[0])
    assert imported == []
