"""HiViLT: a hierarchical vision-language transformer for Hugging Face Transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    pipelines,
)

from hivilt.configuration_hivilt import HiViLTConfig
from hivilt.modeling_hivilt import HiViLTForQuestionAnswering, HiViLTForRetrieval, HiViLTModel
from hivilt.pipeline_hivilt import HiViLTVisualQuestionAnsweringPipeline
from hivilt.processing_hivilt import HiViLTProcessor

# Here and not in the remote-code files: there, the first checkpoint loaded would lend its code to the next one.
AutoConfig.register("hivilt", HiViLTConfig, exist_ok=True)
AutoModel.register(HiViLTConfig, HiViLTModel, exist_ok=True)
AutoModelForVisualQuestionAnswering.register(HiViLTConfig, HiViLTForQuestionAnswering, exist_ok=True)
AutoModelForZeroShotImageClassification.register(HiViLTConfig, HiViLTForRetrieval, exist_ok=True)
AutoProcessor.register(HiViLTConfig, HiViLTProcessor, exist_ok=True)

# For models in memory; a folder brings its own code. transformers 5 has removed the task, and refuses it by name before it
# asks who registered it anew.
getattr(pipelines, "REMOVED_TASKS", {}).pop("visual-question-answering", None)
pipelines.PIPELINE_REGISTRY.supported_tasks["visual-question-answering"] = {
    "impl": HiViLTVisualQuestionAnsweringPipeline,
    "pt": (AutoModelForVisualQuestionAnswering,),
    "type": "multimodal",
}

__version__ = "0.1.0"

__all__ = [
    "HiViLTConfig",
    "HiViLTForQuestionAnswering",
    "HiViLTForRetrieval",
    "HiViLTModel",
    "HiViLTProcessor",
    "HiViLTVisualQuestionAnsweringPipeline",
]
