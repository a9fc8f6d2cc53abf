"""HiViLT: a hierarchical vision-language transformer for Hugging Face Transformers."""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from hivilt.configuration_hivilt import HiViLTConfig

if TYPE_CHECKING:
    from hivilt.modeling_hivilt import HiViLTForQuestionAnswering, HiViLTForRetrieval, HiViLTModel
    from hivilt.pipeline_hivilt import HiViLTVisualQuestionAnsweringPipeline
    from hivilt.processing_hivilt import HiViLTProcessor

__version__ = "0.1.0"

__all__ = ["HiViLTConfig", "HiViLTForQuestionAnswering", "HiViLTForRetrieval", "HiViLTModel"]
__all__ += ["HiViLTProcessor", "HiViLTVisualQuestionAnsweringPipeline"]

# Imported when they are asked for: what they need of transformers takes longer to import than transformers itself.
_HOMES = {
    "HiViLTForQuestionAnswering": "modeling_hivilt",
    "HiViLTForRetrieval": "modeling_hivilt",
    "HiViLTModel": "modeling_hivilt",
    "HiViLTProcessor": "processing_hivilt",
    "HiViLTVisualQuestionAnsweringPipeline": "pipeline_hivilt",
}
# The files of transformers that have the Auto classes and the pipelines, and ours of the classes that go into them.
_AUTO = {
    "transformers.pipelines": "hivilt.pipeline_hivilt",
    "transformers.models.auto.modeling_auto": "hivilt.modeling_hivilt",
    "transformers.modeling_layers": "hivilt.modeling_hivilt",  # imports that one midway, too early for ours
    "transformers.models.auto.processing_auto": "hivilt.processing_hivilt",
}


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
    if name == "hivilt.modeling_hivilt":
        from transformers import AutoModel, AutoModelForVisualQuestionAnswering, AutoModelForZeroShotImageClassification

        ours = sys.modules[name]
        AutoModel.register(HiViLTConfig, ours.HiViLTModel, exist_ok=True)
        AutoModelForVisualQuestionAnswering.register(HiViLTConfig, ours.HiViLTForQuestionAnswering, exist_ok=True)
        AutoModelForZeroShotImageClassification.register(HiViLTConfig, ours.HiViLTForRetrieval, exist_ok=True)
    elif name == "hivilt.processing_hivilt":
        from transformers import AutoProcessor

        AutoProcessor.register(HiViLTConfig, sys.modules[name].HiViLTProcessor, exist_ok=True)
    else:
        from transformers import AutoModelForVisualQuestionAnswering, pipelines

        # For models in memory; a folder brings its own code. transformers 5 has removed the task, and refuses it by name
        # before it asks who registered it anew.
        getattr(pipelines, "REMOVED_TASKS", {}).pop("visual-question-answering", None)
        pipelines.PIPELINE_REGISTRY.supported_tasks["visual-question-answering"] = {
            "impl": sys.modules[name].HiViLTVisualQuestionAnsweringPipeline,
            "pt": (AutoModelForVisualQuestionAnswering,),
            "type": "multimodal",
        }


class _RegisterWhenImported(MetaPathFinder):
    """Whoever imports an Auto class or a pipeline after hivilt finds our classes there, and nobody else waits for them.

    When a file of `_AUTO` has been imported, ours is; when ours has been, by whomever, its classes are registered.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        watched = fullname in _AUTO or fullname in _AUTO.values()
        spec = PathFinder.find_spec(fullname, path, target) if watched else None
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                layers = sys.modules.get("transformers.modeling_layers")
                if fullname not in _AUTO:
                    _register(fullname)
                elif layers is None or hasattr(layers, "GradientCheckpointingLayer"):  # else it is being imported
                    importlib.import_module(_AUTO[fullname])

            spec.loader.exec_module = exec_module
        return spec


AutoConfig.register("hivilt", HiViLTConfig, exist_ok=True)
sys.meta_path.insert(0, _RegisterWhenImported())
for _auto, _ours in _AUTO.items():
    if _auto in sys.modules:
        importlib.import_module(_ours)
