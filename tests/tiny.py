"""Tiny models and inputs, all from seeds. Sizes are odd so that swapped axes cannot pass."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
    AutoModelForZeroShotObjectDetection,
    BartConfig,
    BertConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    ConvNextV2Config,
    Dinov2Config,
    DINOv3ViTConfig,
    DistilBertConfig,
    GPT2Config,
    PreTrainedTokenizerFast,
    RobertaConfig,
    SiglipVisionConfig,
    SwinConfig,
    T5Config,
    ViTConfig,
    ViTImageProcessor,
)

import hivilt
from hivilt import (
    HiViLTConfig,
    HiViLTForConditionalGeneration,
    HiViLTForImagesAndTextClassification,
    HiViLTForQuestionAnswering,
    HiViLTForRetrieval,
    HiViLTForVisualGrounding,
    HiViLTModel,
    HiViLTProcessor,
)
from hivilt.modeling_hivilt import HiViLTPreTrainedModel
from hivilt.tasks.captioning import Captioning
from hivilt.tasks.grounding import Grounding
from hivilt.tasks.question_answering import QuestionAnswering
from hivilt.tasks.reasoning import Reasoning
from hivilt.tasks.retrieval import Retrieval
from hivilt.tasks.task import Task

IMAGE_SIZE = 20
NUM_ANSWERS = 5
WORDS = ["what", "color", "shape", "is", "the", "in", "image", "a", "there", "red", "blue"]
WORDS += ["circle", "square", "yes", "no", "not", "of", "and", "two", "three"]

_ISOTROPIC = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 37,
    "image_size": IMAGE_SIZE,
    "patch_size": 4,
}
_STAGED = {"hidden_sizes": [6, 10, 14], "depths": [1, 1, 1], "num_stages": 3, "patch_size": 2}
_TEXT = {
    "vocab_size": 61,
    "hidden_size": 18,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 29,
    "max_position_embeddings": 24,
}

VISION_CONFIGS = {
    "vit": lambda: ViTConfig(**_ISOTROPIC),
    "dinov2": lambda: Dinov2Config(**_ISOTROPIC),
    "dinov3": lambda: DINOv3ViTConfig(**_ISOTROPIC, num_register_tokens=2),
    "clip": lambda: CLIPVisionConfig(**_ISOTROPIC),
    "siglip": lambda: SiglipVisionConfig(**_ISOTROPIC),
    "swin": lambda: SwinConfig(
        image_size=IMAGE_SIZE, patch_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 2], window_size=3
    ),
    "convnext": lambda: ConvNextConfig(**_STAGED),
    "convnextv2": lambda: ConvNextV2Config(**_STAGED),
}
TEXT_CONFIGS = {
    "bert": lambda: BertConfig(**_TEXT),
    "roberta": lambda: RobertaConfig(**_TEXT),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=61, dim=18, n_layers=2, n_heads=2, hidden_dim=29, max_position_embeddings=24
    ),
    "t5": lambda: T5Config(vocab_size=61, d_model=18, d_kv=9, d_ff=29, num_layers=2, num_heads=2),
    "clip": lambda: CLIPTextConfig(**_TEXT, eos_token_id=2, bos_token_id=1, pad_token_id=0),
}
# Deeper than the text encoder, and BART's deeper than its own.
DECODER_CONFIGS = {
    "gpt2": lambda: GPT2Config(vocab_size=61, n_embd=16, n_layer=3, n_head=2, n_positions=24),
    "bert": lambda: BertConfig(**(_TEXT | {"hidden_size": 16, "num_hidden_layers": 3})),
    "bart": lambda: BartConfig(
        **{"vocab_size": 61, "d_model": 16, "encoder_layers": 1, "decoder_layers": 3, "decoder_attention_heads": 2},
        **{"decoder_ffn_dim": 20, "max_position_embeddings": 24},
        **{"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
    ),
}
# The modules that draw.
PLOTTING = [
    "hivilt.tasks.captioning",
    "hivilt.tasks.grounding",
    "hivilt.tasks.question_answering",
    "hivilt.tasks.retrieval",
    "hivilt.training.main",
]


class HeadFacts(NamedTuple):
    """What the tests that go over all classes know of one.

    Args:
        auto_class: the class of transformers that opens its checkpoints.
        task: what trains it, and knows its script and pipeline; `None`: nothing.
        scores: the output to compare models by.
        wishes: what a call takes beside `make_batch`, or in place of its parts, to give a loss.
        layers: those of its own that are trained beside an adapter.
        parameters: how the names of those begin that the base model lacks.
        reads_fusion: whether its outputs come from F_global, which retrieval computes for its losses alone.
        records_fusion: whether its outputs hold what fusion records.
        encoders: other ones for each class, chosen for their buffers: position ids, token types, relative position tables.
    """

    auto_class: type
    task: type[Task] | None = None
    scores: str = "global_fusion_state"
    wishes: dict[str, Any] = {}
    layers: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    reads_fusion: bool = True
    records_fusion: bool = True
    encoders: dict[str, Any] = {}


_EMBEDDING = ("visual_projection", "text_projection")
# What the five texts of `make_batch` mean: a part of the image, all of it, nothing, two things, something smaller than a cell.
BOXES = [
    [[0.3, 0.6, 0.5, 0.3]],
    [[0.5, 0.5, 1.0, 1.0]],
    [],
    [[0.2, 0.3, 0.3, 0.5], [0.8, 0.6, 0.3, 0.4]],
    [[0.55, 0.45, 0.02, 0.03]],
]
# The two images that each of these texts is about, if it is about two.
PAIRS = torch.tensor([[0, 1], [1, 0], [1, 2], [2, 2], [0, 2]])
# A new head is a row here.
HEAD_FACTS = {
    HiViLTModel: HeadFacts(AutoModel, encoders={"vision": "swin", "text": "roberta"}),
    HiViLTForQuestionAnswering: HeadFacts(
        AutoModelForVisualQuestionAnswering,
        QuestionAnswering,
        "logits",
        wishes={"labels": torch.tensor([0, 4, 2, 1, 3])},
        layers=("classifier",),
        parameters=("classifier.", "logit_scale", *_EMBEDDING),
        encoders={"vision": "vit", "text": "bert", "auxiliary_loss_weight": 0.5},
    ),
    HiViLTForRetrieval: HeadFacts(
        AutoModelForZeroShotImageClassification,
        Retrieval,
        "text_embeds",
        wishes={"return_loss": True},
        layers=_EMBEDDING,
        parameters=("logit_scale", "matching_logit_scale", *_EMBEDDING),
        reads_fusion=False,
        records_fusion=False,
        encoders={"vision": "clip", "text": "clip"},
    ),
    HiViLTForConditionalGeneration: HeadFacts(
        AutoModelForImageTextToText,
        Captioning,
        "logits",
        wishes={"labels": torch.arange(20).view(5, 4) + 5},
        layers=("memory",),
        parameters=("memory.", "decoder."),
        reads_fusion=False,
        records_fusion=False,
        encoders={"vision": "vit", "text": "bert"},
    ),
    HiViLTForVisualGrounding: HeadFacts(
        AutoModelForZeroShotObjectDetection,
        Grounding,
        "logits",
        wishes={"labels": [{"boxes": torch.tensor(boxes).view(-1, 4)} for boxes in BOXES]},
        layers=("feature_pyramid", "row_head"),
        parameters=("feature_pyramid.", "row_head."),
        reads_fusion=False,
        encoders={"vision": "swin", "text": "roberta"},
    ),
    HiViLTForImagesAndTextClassification: HeadFacts(
        AutoModelForSequenceClassification,
        Reasoning,
        "logits",
        wishes={"labels": torch.tensor([0, 4, 2, 1, 3]), "image_index": PAIRS},
        layers=("joint_projection", "joint_classifier"),
        parameters=("joint_projection.", "joint_classifier."),
        encoders={"vision": "clip", "text": "roberta"},
    ),
}
MODEL_CLASSES = list(HEAD_FACTS)
AUTO_CLASSES = {model_class.__name__: facts.auto_class for model_class, facts in HEAD_FACTS.items()}
# Those that `make_batch` is enough for; another one reads captions, too, and another several images for each text.
OF_A_BATCH = [HiViLTModel, HiViLTForQuestionAnswering, HiViLTForRetrieval, HiViLTForVisualGrounding]

# The files that travel with every checkpoint.
CODE = sorted(path.name for path in Path(hivilt.__file__).parent.glob("*_hivilt.py"))


def make_config(vision: str = "vit", text: str = "bert", **fusion) -> HiViLTConfig:
    """A tiny config; any field of [`HiViLTConfig`] overrides the defaults here."""
    defaults = {
        "hidden_size": 20,
        "num_attention_heads": 4,
        "num_fusion_stages": 2,
        "fusion_intermediate_size": 22,
        "projection_dim": 9,
        "initializer_range": 0.02,
        "id2label": {index: f"answer {index}" for index in range(NUM_ANSWERS)},
    }
    return HiViLTConfig.from_vision_text_configs(VISION_CONFIGS[vision](), TEXT_CONFIGS[text](), **(defaults | fusion))


def make_model(model_class: type, seed: int = 0, weight_scale: float = 1.0, **config):
    """A seeded tiny model in evaluation mode; `weight_scale` enlarges the weights so that attention is not uniform."""
    torch.manual_seed(seed)
    model = model_class(make_config(**config)).eval()
    if model_class is HiViLTForConditionalGeneration:
        model.set_decoder_tokens(make_tokenizer())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(weight_scale)
    return model


def make_captioner(decoder: str = "gpt2", seed: int = 0, **config) -> HiViLTForConditionalGeneration:
    """A seeded tiny model with weights so large that it writes another text about each pair of [`make_batch`]."""
    config = {"decoder_config": DECODER_CONFIGS[decoder](), "prompt_ids": [2, 5, 6, 3]} | config
    model = make_model(HiViLTForConditionalGeneration, seed, weight_scale=6.0, **config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if parameter.dim() > 1:
                attends_to_memory = any(part in name for part in ("crossattention", "encoder_attn"))
                std = 1.6 if attends_to_memory else 0.4
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def with_dropout(model: HiViLTPreTrainedModel, p: float) -> HiViLTPreTrainedModel:
    """The model with this probability at every dropout, those inside attention included."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p
        for name in ("attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, p)
    model.config.dropout = p
    return model


def make_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Three images, five texts of 7, 4, 7, 2 and 6 tokens, padded on the right; the second image has two texts."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([7, 4, 7, 2, 6])
    attention_mask = (torch.arange(7)[None, :] < lengths[:, None]).long()
    input_ids = torch.randint(5, 61, (5, 7), generator=generator) * attention_mask
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        "image_index": torch.tensor([0, 1, 1, 2, 0]),
    }


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, BERT's special tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(special + WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=24,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_processor() -> HiViLTProcessor:
    """Images resized to the tiny models' size, words of `WORDS`."""
    return HiViLTProcessor(ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}), make_tokenizer())


def make_image(color: str = "red", size: tuple[int, int] = (31, 23)) -> Image.Image:
    """An image of one colour with a dark corner, so that a turned one can be told."""
    pixels = np.array(Image.new("RGB", size, color))
    pixels[: size[1] // 3, : size[0] // 3] = 10
    return Image.fromarray(pixels)


def read_lines(path: str | Path) -> list[Any]:
    """Of a file of JSON lines."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def draw_with(patch: pytest.MonkeyPatch, choose: Callable[[str], Callable]) -> None:
    """Has the runs of this process draw with what `choose` gives for the name of a plotting function."""
    # Scripts import these only once they have read their flags.
    for module in map(importlib.import_module, PLOTTING):
        for name in [name for name in vars(module) if name.startswith("plot_")]:
            patch.setattr(module, name, choose(name))


def draw_blank(_, path: Path, *args, **kwargs) -> None:
    """In place of any plotting function: an image of one pixel."""
    Image.new("RGB", (1, 1)).save(path)


def losses_and_gradients(model, **inputs):
    """The loss of a batch and the gradient of every parameter."""
    model.zero_grad()
    outputs = model(**inputs, return_loss=True)
    outputs.loss.backward()
    return outputs.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Every way to fuse that a config can ask for.
FUSIONS = {
    "dense": {},
    "three stages": {"num_fusion_stages": 3},
    "one stage": {"num_fusion_stages": 1},
    "sparse": {"fusion_top_k": 3},
    "sparse, three stages": {"fusion_top_k": 2, "num_fusion_stages": 3},
    "without local": {"use_local_fusion": False},
    "without global": {"use_global_fusion": False},
    "without either": {"use_local_fusion": False, "use_global_fusion": False},
    "own levels": {"vision_levels": [1, 1], "vision_strides": [2, 3]},
}
