"""`import hivilt`: what it costs, and what it makes known."""

import subprocess
import sys
from pathlib import Path

import pytest

import hivilt

ROOT = Path(hivilt.__file__).parent
# Each takes a second or more to import, and is needed by none but who uses a model, or trains.
COSTLY = ("transformers.modeling_utils", "transformers.processing_utils", "transformers.trainer", "torch._dynamo")
COSTLY += ("scipy", "sklearn", "matplotlib", "faiss", "datasets", "pandas", "accelerate", "gradio")
KNOWN = """
from transformers import AutoConfig, AutoModel, AutoModelForVisualQuestionAnswering, AutoProcessor
found = [
    AutoConfig.from_pretrained(folder),
    AutoModel.from_pretrained(folder),
    AutoModelForVisualQuestionAnswering.from_pretrained(folder),
    AutoProcessor.from_pretrained(folder),
    hivilt.HiViLTProcessor.from_pretrained(folder),
]
from transformers import pipeline
found.append(pipeline("visual-question-answering", model=found[2], processor=found[3]))
print(*(f"{type(one).__module__}.{type(one).__name__}" for one in found), sep="\\n")
"""
# As pytest's importlib mode runs the file of a root that is a package.
TWICE = """
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("again", hivilt.__file__)
spec.loader.exec_module(module_from_spec(spec))
"""
FOUND = [
    "hivilt.configuration_hivilt.HiViLTConfig",
    "hivilt.modeling_hivilt.HiViLTModel",
    "hivilt.modeling_hivilt.HiViLTForQuestionAnswering",
    "hivilt.processing_hivilt.HiViLTProcessor",
    "hivilt.processing_hivilt.HiViLTProcessor",
    "hivilt.pipeline_hivilt.HiViLTVisualQuestionAnsweringPipeline",
]


@pytest.mark.parametrize(
    "first",
    [
        f"import hivilt, sys; costly = sorted({set(COSTLY)} & set(sys.modules)); assert not costly, costly\n{TWICE}\n"
        "from hivilt import HiViLTForVisualGrounding",
        pytest.param("import hivilt.fusion_hivilt", marks=pytest.mark.slow),
        pytest.param("import hivilt; from transformers import BertModel", marks=pytest.mark.slow),
        pytest.param(
            "from transformers import AutoModel, AutoProcessor, pipeline; import hivilt", marks=pytest.mark.slow
        ),
    ],
    ids=["twice-before-transformers", "fusion-alone", "before-a-model", "after-transformers"],
)
def test_auto_classes_know_hivilt_whatever_is_imported_first_and_alone_it_imports_little(first):
    """Without `trust_remote_code`, and without a question to answer: nothing can be typed here."""
    done = subprocess.run(
        [sys.executable, "-c", f"{first}\nfolder = {str(ROOT / 'vqa')!r}\n{KNOWN}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == FOUND


def test_all_names_are_there_and_no_others():
    assert set(hivilt.__all__) <= set(dir(hivilt))
    for name in hivilt.__all__:
        assert getattr(hivilt, name).__name__ == name
    shown = {"HiViLTConfig"}  # to type checkers
    for part in ("modeling", "generation", "grounding", "reasoning", "processing", "pipeline"):
        name = f"{part}_hivilt"
        assert getattr(hivilt, name).__name__ == f"hivilt.{name}"
        shown.update(getattr(hivilt, name).__all__)
    assert shown == set(hivilt.__all__)
    with pytest.raises(AttributeError, match="module 'hivilt' has no attribute 'HiViLT'"):
        hivilt.HiViLT  # noqa: B018
