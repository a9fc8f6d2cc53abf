"""HiViLT: a hierarchical vision-language transformer for Hugging Face Transformers."""

import importlib
import sys
from collections.abc import Iterable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING, Any

import transformers
from transformers import AutoConfig

from hivilt.configuration_hivilt import AUTO_MAP, HiViLTConfig

if TYPE_CHECKING:
    from hivilt.generation_hivilt import *  # noqa: F403
    from hivilt.grounding_hivilt import *  # noqa: F403
    from hivilt.modeling_hivilt import *  # noqa: F403
    from hivilt.pipeline_hivilt import *  # noqa: F403
    from hivilt.processing_hivilt import *  # noqa: F403
    from hivilt.reasoning_hivilt import *  # noqa: F403

__version__ = "0.1.0"

# Imported when they are asked for: what they need of transformers takes longer to import than transformers itself.
_HOMES = {name: home for home, name in (path.split(".") for path in AUTO_MAP.values())}
_PIPELINES = ("VisualQuestionAnswering", "ZeroShotObjectDetection", "ImagesAndTextClassification")
_HOMES |= {f"HiViLT{name}Pipeline": "pipeline_hivilt" for name in _PIPELINES}

__all__ = list(_HOMES)

# The files of transformers that have the Auto classes and the pipelines, and ours of the classes that go into them.
_MODELS = tuple(f"hivilt.{name}_hivilt" for name in ("modeling", "generation", "grounding", "reasoning"))
_AUTO = {
    "transformers.pipelines": ("hivilt.pipeline_hivilt",),
    "transformers.models.auto.modeling_auto": _MODELS,
    "transformers.modeling_layers": _MODELS,  # imports that one midway, too early for ours
    "transformers.models.auto.processing_auto": ("hivilt.processing_hivilt",),
}
# Files of ours that are being imported, of which some import one of those midway.
_begun: list[str] = []


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"hivilt.{_HOMES[name]}"), name)
    if name in _HOMES.values():
        return importlib.import_module(f"hivilt.{name}")
    raise AttributeError(f"module 'hivilt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Here and not in the remote-code files: there, the first checkpoint loaded would lend its code to the next one.
def _register(name: str) -> None:
    ours = sys.modules[name]
    for auto, path in AUTO_MAP.items():
        home, model_class = path.split(".")
        if name == f"hivilt.{home}" and auto != "AutoConfig":
            getattr(transformers, auto).register(HiViLTConfig, getattr(ours, model_class), exist_ok=True)
    if name == "hivilt.pipeline_hivilt":
        from transformers import pipelines

        # For models in memory; a folder brings its own code. transformers 5 has removed the task, and refuses it by name
        # before it asks who registered it anew.
        getattr(pipelines, "REMOVED_TASKS", {}).pop("visual-question-answering", None)
        for task, impl, auto in (
            ("visual-question-answering", "VisualQuestionAnswering", "VisualQuestionAnswering"),
            ("images-and-text-classification", "ImagesAndTextClassification", "SequenceClassification"),
        ):
            pipelines.PIPELINE_REGISTRY.supported_tasks[task] = {
                "impl": getattr(ours, f"HiViLT{impl}Pipeline"),
                "pt": (getattr(pipelines, f"AutoModelFor{auto}"),),
                "type": "multimodal",
            }


def _import_for(autos: Iterable[str]) -> None:
    """Imports ours for those that are imported."""
    layers = sys.modules.get("transformers.modeling_layers")
    is_ready = layers is None or hasattr(layers, "GradientCheckpointingLayer")  # else it is being imported
    if is_ready and not _begun:
        for ours in dict.fromkeys(ours for auto in autos if auto in sys.modules for ours in _AUTO[auto]):
            importlib.import_module(ours)


class _RegisterWhenImported(MetaPathFinder):
    """Whoever imports an Auto class or a pipeline after hivilt finds our classes there, and nobody else waits for them.

    When a file of `_AUTO` has been imported, ours is; when ours has been, by whomever, its classes are registered.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        is_ours = fullname.startswith("hivilt.") and fullname.endswith("_hivilt")
        spec = PathFinder.find_spec(fullname, path, target) if is_ours or fullname in _AUTO else None
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                if not is_ours:
                    execute(module)
                    _import_for([fullname])
                    return
                _begun.append(fullname)
                try:
                    execute(module)
                    _register(fullname)
                finally:
                    _begun.remove(fullname)
                _import_for(_AUTO)

            spec.loader.exec_module = exec_module
        return spec


AutoConfig.register("hivilt", HiViLTConfig, exist_ok=True)
sys.meta_path.insert(0, _RegisterWhenImported())
_import_for(_AUTO)
