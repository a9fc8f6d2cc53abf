"""
How a borrowed encoder becomes what fusion reads: a vision encoder a pyramid of maps, a text encoder one state a token.

Everything that differs from one family of encoders to the next is in this file: which are taken and which refused, how
they are built, which hidden states there are and on which grid, where class and register tokens stand, which norm the
last map wants, how long a text may be. `docs/encoders.md` lists the families, as the tests do.

A family of transformers that is in neither table is refused, since nobody has seen it be right. An encoder that a
program registers itself (`AutoConfig.register`, `AutoModel.register`) is run once without weights, on the meta device,
and refused where it gives no maps or leaves parameters without a gradient.
"""

import copy
import inspect
import json
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import ModelOutput, logging

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class VisionFamily:
    """
    What is particular to a family of vision encoders.

    Args:
        states: how its hidden states lie. `"patches"`: one grid of `patch_size`. `"stages"`: one of `hidden_sizes` a
            stage, after the embeddings. `"merging"`: as Swin, which halves the grid after each stage but the last.
            `"run"`: nothing in the config says it, so the encoder is run once on the meta device.
        model: the class where `AutoModel` has none.
        last_norm: a norm that the encoder applies to its pooled output alone; here it normalises the last map.
        channels_last: its 4-dimensional states are `(images, height, width, channels)`.
        one_size: it takes images of no other size than the config names.
    """

    states: str = "patches"
    model: str | None = None
    last_norm: str | None = None
    channels_last: bool = False
    one_size: bool = False


@dataclass(frozen=True)
class TextFamily:
    """
    What is particular to a family of text encoders.

    Args:
        model: the class where the Auto classes have none.
        position_offset: it numbers positions from `pad_token_id + 1`, so its table holds fewer texts than it has rows.
        width: the field of the config that says how wide its token states are.
    """

    model: str | None = None
    position_offset: bool = False
    width: str = "hidden_size"


_BY_RUN = VisionFamily("run")

VISION_FAMILIES = {
    "aimv2_vision_model": VisionFamily(),
    "altclip_vision_model": VisionFamily(model="AltCLIPVisionModel", last_norm="post_layernorm"),
    "beit": VisionFamily(),
    "bit": _BY_RUN,
    "blip_vision_model": VisionFamily(model="BlipVisionModel"),
    "chinese_clip_vision_model": VisionFamily(last_norm="post_layernorm"),
    "clip_vision_model": VisionFamily(last_norm="post_layernorm"),
    "clipseg_vision_model": VisionFamily(model="CLIPSegVisionModel", last_norm="post_layernorm"),
    "convnext": VisionFamily("stages", last_norm="layernorm"),
    "convnextv2": VisionFamily("stages", last_norm="layernorm"),
    "cvt": _BY_RUN,
    "data2vec-vision": VisionFamily(),
    "deit": VisionFamily(),
    "dinov2": VisionFamily(),
    "dinov2_with_registers": VisionFamily(),
    "dinov3_convnext": _BY_RUN,
    "dinov3_vit": VisionFamily(),
    "donut-swin": VisionFamily("merging"),
    "efficientnet": _BY_RUN,
    "focalnet": _BY_RUN,
    "glpn": _BY_RUN,
    "hiera": VisionFamily("run", channels_last=True),
    "ijepa": VisionFamily(),
    "levit": VisionFamily("run", one_size=True),
    "metaclip_2_vision_model": VisionFamily(model="MetaClip2VisionModel", last_norm="post_layernorm"),
    "mlcd_vision_model": VisionFamily(last_norm="post_layernorm"),
    "mobilenet_v1": _BY_RUN,
    "mobilenet_v2": _BY_RUN,
    "mobilevit": _BY_RUN,
    "mobilevitv2": _BY_RUN,
    "poolformer": _BY_RUN,
    "pvt": _BY_RUN,
    "pvt_v2": _BY_RUN,
    "regnet": VisionFamily("stages"),
    "resnet": VisionFamily("stages"),
    "segformer": _BY_RUN,
    "siglip2_vision_model": VisionFamily(),
    "siglip_vision_model": VisionFamily(),
    "swiftformer": _BY_RUN,
    "swin": VisionFamily("merging"),
    "swinv2": VisionFamily("merging"),
    "textnet": _BY_RUN,
    "timm_wrapper": _BY_RUN,
    "vit": VisionFamily(),
    "vit_msn": VisionFamily(),
}

_OFFSET = TextFamily(position_offset=True)

TEXT_FAMILIES = {
    "albert": TextFamily(),
    "altclip_text_model": TextFamily("AltCLIPTextModel", position_offset=True, width="project_dim"),
    "bert": TextFamily(),
    "bert-generation": TextFamily(),
    "big_bird": TextFamily(),
    "blip_text_model": TextFamily("BlipTextModel"),
    "bloom": TextFamily(),
    "camembert": _OFFSET,
    "chinese_clip_text_model": TextFamily("ChineseCLIPTextModel"),
    "clip_text_model": TextFamily(),
    "clipseg_text_model": TextFamily("CLIPSegTextModel"),
    "data2vec-text": _OFFSET,
    "deberta": TextFamily(),
    "deberta-v2": TextFamily(),
    "distilbert": TextFamily(),
    "electra": TextFamily(),
    "ernie": TextFamily(),
    "eurobert": TextFamily(),
    "flaubert": TextFamily(),
    "gemma": TextFamily(),
    "gemma2": TextFamily(),
    "gemma3_text": TextFamily(),
    "gpt2": TextFamily(),
    "gpt_neox": TextFamily(),
    "gte": TextFamily(),
    "ibert": _OFFSET,
    "jina_embeddings_v3": TextFamily(),
    "llama": TextFamily(),
    "megatron-bert": TextFamily(),
    "metaclip_2_text_model": TextFamily("MetaClip2TextModel"),
    "mistral": TextFamily(),
    "modernbert": TextFamily(),
    "mpnet": _OFFSET,
    "mt5": TextFamily(),
    "nomic_bert": TextFamily(),
    "olmo2": TextFamily(),
    "openai-gpt": TextFamily(),
    "opt": TextFamily(width="word_embed_proj_dim"),
    "phi": TextFamily(),
    "qwen2": TextFamily(),
    "qwen3": TextFamily(),
    "rembert": TextFamily(),
    "roberta": _OFFSET,
    "roberta-prelayernorm": _OFFSET,
    "roformer": TextFamily(),
    "siglip2_text_model": TextFamily("Siglip2TextModel"),
    "siglip_text_model": TextFamily("SiglipTextModel"),
    "smollm3": TextFamily(),
    "t5": TextFamily(),
    "umt5": TextFamily(),
    "xlm": TextFamily(),
    "xlm-roberta": _OFFSET,
    "xlm-roberta-xl": _OFFSET,
}

_PADDING = "padding changes what it makes of a text"
_UNTRAINED = "some of its parameters would never get a gradient"

# Families of which it is known why they cannot be right here.
REFUSED_FAMILIES = {
    "canine": _PADDING,
    "convbert": _PADDING,
    "fnet": f"it takes no attention mask, so {_PADDING}",
    "lilt": _UNTRAINED,
    "longformer": f"{_UNTRAINED}: those of its global attention, which no token has",
    "luke": _UNTRAINED,
    "markuplm": _UNTRAINED,
    "mobilebert": _PADDING,
    "mra": _UNTRAINED,
    "nystromformer": _PADDING,
    "roc_bert": f"{_UNTRAINED}: those of shapes and pronunciations, which tokens here do not have",
    "squeezebert": _UNTRAINED,
    "timm_backbone": "it has no last hidden state; `TimmWrapperConfig(architecture=...)` takes the same models of timm",
    "vit_mae": (
        "it drops random patches, in evaluation too. Its weights are those of a `vit`: save them once by "
        "`ViTModel.from_pretrained(name).save_pretrained(folder)`, and name that folder"
    ),
    "yolos": "its detection tokens leave no grid of patches",
    "yoso": _PADDING,
}


def check_encoder(name: str, config: PreTrainedConfig) -> None:
    """
    Refuses what cannot be, or is not known to be, right as an encoder.

    Args:
        name (`str`): the field, `"vision_config"` or `"text_config"`.
        config (`PreTrainedConfig`): of the encoder.

    Raises:
        ValueError: names the field, the family, why not, and the way out.
    """
    families = VISION_FAMILIES if name == "vision_config" else TEXT_FAMILIES
    kind = name.removesuffix("_config")
    family = config.model_type
    if family in families and family != "timm_wrapper":
        return
    tower = getattr(config, name, None)
    if tower is not None:
        why = f"it is of a whole model: give its `{name}`, or `HiViLTConfig.from_vision_text_configs`, which takes it"
    elif family in REFUSED_FAMILIES:
        why = REFUSED_FAMILIES[family]
    elif type(config).__module__.startswith("transformers.") and family != "timm_wrapper":
        why = f"it is not among the {kind} encoders that are tested"
    else:
        why = _foreign_fault(name, config)
    if why is not None:
        raise ValueError(
            f"`{name}`: a `{family}` cannot be the {kind} encoder: {why}. Those that can: {', '.join(families)}."
        )


def without_unread_parts(config: PreTrainedConfig) -> PreTrainedConfig:
    """
    The config with those parts switched off that nothing here reads, so that no weight is left without a gradient, and
    without its own classes and the path of the folder it came from: a copy, since the config that was handed in may belong
    to a model of its own.
    """
    switches = {"add_cross_attention": False, "use_mask_token": False}
    # An encoder's own classes, 1,000 of ImageNet's, give way to the two that transformers fills in.
    switches |= {"id2label": {0: "LABEL_0", 1: "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    if config.model_type in ("siglip_vision_model", "siglip2_vision_model"):
        # The model asks for its switch even where its config, in older versions, has no such field.
        switches["vision_use_head"] = False
    elif config.model_type == "aimv2_vision_model":
        switches["use_head"] = False
    elif config.model_type == "blip_text_model":
        switches["is_decoder"] = False  # has cross-attention
    elif config.model_type == "big_bird":
        # What it falls back to for texts of up to about 700 tokens; sparse blocks are drawn at random.
        switches["attention_type"] = "original_full"
    origin = Path(str(config.name_or_path))
    if origin.is_absolute():
        # Of a folder its name: the rest of the path is of one machine, and a checkpoint is shared.
        switches["_name_or_path"] = origin.name
    for field, value in switches.items():
        if getattr(config, field, field == "vision_use_head") != value:
            config = copy.deepcopy(config)
            setattr(config, field, value)
    return config


# Building


def build_encoder(config: PreTrainedConfig) -> "PreTrainedModel":
    """
    The encoder of a config, without the parts that only its own pooled output or pre-training reads.

    An attention implementation that it does not have leaves it with its own, and is warned of once.
    """
    family = VISION_FAMILIES.get(config.model_type) or TEXT_FAMILIES.get(config.model_type)
    # By way of the package, which imports its models when they are asked for: a config alone needs none of them.
    is_text = type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
    auto_class = transformers.AutoModelForTextEncoding if is_text else transformers.AutoModel
    if family is not None and family.model is not None:
        build = model_class = getattr(transformers, family.model)
    else:
        build, model_class = auto_class.from_config, auto_class._model_mapping.get(type(config), None)
    without = {}
    if model_class is not None and "add_pooling_layer" in inspect.signature(model_class).parameters:
        without = {"add_pooling_layer": False}
    wanted = config._attn_implementation
    try:
        encoder = build(config, **without)
    except ValueError:
        if wanted in (None, "eager"):
            raise
        config._attn_implementation = None
        encoder = build(config, **without)
        _warn_of_attention(encoder, wanted)

    if isinstance(getattr(encoder, "head", None), nn.Linear):
        encoder.head = nn.Identity()
    embeddings = getattr(encoder, "embeddings", None)
    if getattr(embeddings, "mask_token", None) is not None:
        # A buffer is neither trained nor saved, and DINOv3's initialisation still finds it.
        mask_token = embeddings.mask_token.detach()
        del embeddings.mask_token
        embeddings.register_buffer("mask_token", mask_token, persistent=False)
    return encoder


def _warn_of_attention(encoder: "PreTrainedModel", wanted: str) -> None:
    own = encoder.config._attn_implementation
    logger.warning_once(f"{type(encoder).__name__} has no `attn_implementation={wanted!r}`; it keeps {own!r}, its own.")


def attention_for(encoder: "PreTrainedModel", wanted: str) -> str:
    """The attention implementation that is asked for, or, with a warning, the one that the encoder keeps."""
    own = encoder.config._attn_implementation
    if wanted == own:
        return own
    try:
        if encoder._can_set_attn_implementation():
            return encoder.get_correct_attn_implementation(wanted)
    except ValueError:
        pass
    _warn_of_attention(encoder, wanted)
    return own


# Vision: hidden states become maps


@dataclass(frozen=True)
class VisionState:
    """
    One hidden state of a vision encoder.

    Args:
        channels: its width.
        side: cells a side at the size that the config names, which orders states from fine to coarse.
        others: tokens before those of the grid, where that is known.
    """

    channels: int
    side: int
    others: int = 0


def vision_states(config: PreTrainedConfig) -> list[VisionState]:
    """
    What the hidden states of a vision encoder are, the embeddings' output first. Where the last hidden state is a map of
    its own (MobileNet, EfficientNet, MobileViT), it comes as one more.

    Raises:
        ValueError: the encoder gives no maps; the message says what it gives.
    """
    family = VISION_FAMILIES.get(config.model_type, _BY_RUN)
    if family.states == "patches":
        return [VisionState(config.hidden_size, 1)] * (config.num_hidden_layers + 1)
    if family.states == "merging":
        # States are taken after a stage's merging, so the last two share one grid.
        coarsest = len(config.depths) - 1
        merged = [min(stage, coarsest) for stage in range(coarsest + 2)]
        return [VisionState(config.embed_dim * 2**times, 2 ** (coarsest - times)) for times in merged]
    if family.states == "stages":
        sizes = config.hidden_sizes
        first = VisionState(getattr(config, "embedding_size", sizes[0]), 2 ** (len(sizes) - 1))
        return [first] + [VisionState(size, 2 ** (len(sizes) - 1 - stage)) for stage, size in enumerate(sizes)]
    return list(_run_once(config))


def default_levels(states: list[VisionState]) -> list[int]:
    """The last state of each grid, fine to coarse: each stage of an encoder that coarsens by itself."""
    following = [*states[1:], None]
    return [
        i
        for i, (own, other) in enumerate(zip(states, following, strict=True))
        if other is None or other.side < own.side
    ]


_RUNS = {}


def _run_once(config: PreTrainedConfig) -> tuple[VisionState, ...]:
    """The states of a vision encoder, from a run without weights on the meta device; each config is run once."""
    fields = {k: v for k, v in config.to_dict().items() if k not in ("dtype", "id2label", "label2id", "_name_or_path")}
    key = json.dumps(fields, sort_keys=True, default=str)
    if key not in _RUNS:
        with torch.no_grad():
            states = _run(config)[1]
        _RUNS[key] = tuple(_describe(config, state) for state in states)
    return _RUNS[key]


def _run(config: PreTrainedConfig) -> "tuple[PreTrainedModel, list[torch.Tensor]]":
    """A vision encoder without weights, and the states that it gives for two images."""
    config = copy.deepcopy(config)
    config.dtype, config._attn_implementation = torch.float32, None
    size = image_size(config) or (224, 224)
    try:
        # What is drawn on the meta device must not move the random numbers of who asks.
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            encoder = build_encoder(config).eval()
            inputs = image_inputs(config, torch.zeros(2, getattr(config, "num_channels", 3), *size))
            return encoder, image_states(config, encoder(**inputs, output_hidden_states=True, return_dict=True))
    except (ImportError, TypeError, AttributeError, IndexError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"a `{config.model_type}` gives no hidden states for images: {error}") from error


def _describe(config: PreTrainedConfig, state: torch.Tensor) -> VisionState:
    height, width = image_size(config) or (224, 224)
    if state.dim() == 4:
        channels, side, others = state.shape[3], state.shape[1], 0
        is_map = state.shape[1] * width == state.shape[2] * height
    else:
        channels, side = state.shape[2], math.isqrt(state.shape[1])
        others = state.shape[1] - side**2
        # Class and register tokens; more than these, and it is no grid.
        is_map = height == width and others <= 16
    if state.shape[0] != 2 or not is_map:
        raise ValueError(f"a `{config.model_type}` gives a hidden state of shape {tuple(state.shape)}, which is no map")
    return VisionState(channels, side, others)


def _foreign_fault(name: str, config: PreTrainedConfig) -> str | None:
    """Why an encoder that transformers does not bring along cannot be one here; `None` if nothing is found."""
    if name == "vision_config":
        try:
            _run_once(config)
            with torch.enable_grad():
                encoder, states = _run(config)
                sum(state.float().sum() for state in states).backward()
        except ValueError as error:
            return str(error)
        unread = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
        return f"{len(unread)} parameters get no gradient, the first being {unread[0]!r}" if unread else None
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        takes = inspect.signature(build_encoder(copy.deepcopy(config)).forward).parameters
    missing = [argument for argument in ("input_ids", "attention_mask") if argument not in takes]
    return f"its forward takes no `{missing[0]}`" if missing else None


def image_size(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Height and width that a vision encoder was made for; `None` where its config names none."""
    size = getattr(config, "image_size", None)
    if config.model_type == "siglip2_vision_model":
        size = math.isqrt(config.num_patches) * config.patch_size
    if size is None:
        return None
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def takes_one_size(config: PreTrainedConfig) -> bool:
    """Whether images of another size than [`image_size`] are an error in any case."""
    return VISION_FAMILIES.get(config.model_type, _BY_RUN).one_size


def image_inputs(config: PreTrainedConfig, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """The arguments of a vision encoder for images `(B_i, channels, height, width)`: patches for SigLIP 2."""
    if config.model_type != "siglip2_vision_model":
        return {"pixel_values": pixel_values}
    patch = config.patch_size
    grid = (pixel_values.shape[2] // patch, pixel_values.shape[3] // patch)
    pixel_values = pixel_values[:, :, : grid[0] * patch, : grid[1] * patch]
    # (B_i, channels, height, width) -> (B_i, channels, rows, patch, columns, patch) -> (B_i, patches, patch * patch * channels)
    patches = pixel_values.unflatten(3, (grid[1], patch)).unflatten(2, (grid[0], patch))
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device),
        "spatial_shapes": torch.tensor([grid] * len(patches)),
    }


def image_states(config: PreTrainedConfig, outputs: ModelOutput) -> list[torch.Tensor]:
    """
    All hidden states, maps as `(B_i, height, width, channels)`, rows of tokens as they are. The last hidden state, which
    is after the final norm, takes the place of the last one, or, where it is another map, follows it.
    """
    family = VISION_FAMILIES.get(config.model_type, _BY_RUN)
    spatial = outputs.get("reshaped_hidden_states")
    states = list(spatial if spatial is not None else outputs.hidden_states)
    last = outputs.last_hidden_state
    if not family.channels_last:
        states = [state.permute(0, 2, 3, 1) if state.dim() == 4 else state for state in states]
        last = last.permute(0, 2, 3, 1) if last.dim() == 4 else last
    if last.dim() == 3 and states[-1].dim() == 4:
        height, width = states[-1].shape[1:3]
        last = last[:, last.shape[1] - height * width :].unflatten(1, (height, width))
    return states[:-1] + [last] if last.shape == states[-1].shape else states + [last]


def image_maps(
    config: PreTrainedConfig,
    outputs: ModelOutput,
    pixel_values: torch.Tensor,
    states: list[VisionState],
    indices: list[int],
) -> list[torch.Tensor]:
    """
    The hidden states of these indices as maps `(B_i, height, width, channels)`.

    Args:
        states: what [`vision_states`] says of them.

    Raises:
        ValueError: a state is missing, or its tokens do not fill the images' grid.
    """
    found = image_states(config, outputs)
    maps = []
    for index in indices:
        if index >= len(found):
            raise ValueError(
                f"This `{config.model_type}` encoder gave {len(found)} hidden states, but level {index} is asked for."
            )
        state = found[index]
        if state.dim() == 3:
            grid = _grid(config, pixel_values, state, states[index])
            # Class and register tokens come first and have no place on the grid.
            state = state[:, state.shape[1] - grid[0] * grid[1] :].unflatten(1, grid)
        maps.append(state)
    return maps


def _grid(
    config: PreTrainedConfig, pixel_values: torch.Tensor, tokens: torch.Tensor, state: VisionState
) -> tuple[int, int]:
    """Rows and columns that the tokens `(B_i, N, channels)` of images lie on."""
    height, width = pixel_values.shape[2:]
    if VISION_FAMILIES.get(config.model_type, _BY_RUN).states == "patches":
        patch = config.patch_size
        patch_height, patch_width = patch if isinstance(patch, (list, tuple)) else (patch, patch)
        grid = (height // patch_height, width // patch_width)
        if grid[0] * grid[1] <= tokens.shape[1]:
            return grid
    else:
        # A convolution rounds up or down where the size is no multiple of its stride.
        own_height, own_width = image_size(config) or (224, 224)
        for rounded in (math.floor, math.ceil):
            grid = (rounded(height * state.side / own_height), rounded(width * state.side / own_width))
            if grid[0] * grid[1] + state.others == tokens.shape[1]:
                return grid
    raise ValueError(
        f"This `{config.model_type}` encoder gave {tokens.shape[1]} tokens for images of {height} by {width} pixels, "
        f"which fill no grid; give images of {image_size(config) or 'a multiple of its stride'}."
    )


def vision_norm(encoder: "PreTrainedModel") -> nn.Module | None:
    """The norm that the last map wants and has not had, if there is one."""
    family = VISION_FAMILIES.get(encoder.config.model_type, _BY_RUN)
    return getattr(encoder, family.last_norm) if family.last_norm is not None else None


# Text: one state a token


def text_width(config: PreTrainedConfig) -> int:
    """How wide the token states of a text encoder are."""
    return getattr(config, TEXT_FAMILIES.get(config.model_type, TextFamily()).width)


def max_text_length(config: PreTrainedConfig) -> int | None:
    """Most tokens that a text encoder takes; `None` where positions are relative (T5) and there is no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and TEXT_FAMILIES.get(config.model_type, TextFamily()).position_offset:
        return positions - config.pad_token_id - 1
    return positions


def places_without_gaps(attention_mask: torch.Tensor) -> torch.LongTensor | None:
    """
    For each token of `(B_t, N_t)` where it goes if all that count come first, in their order, and padding after them;
    `None` if they do. Encoders number positions from the first column on, padding or not: only so is a text padded on the
    left the same text.
    """
    counts = attention_mask.bool()
    # A graph may not ask what the mask holds, and on the meta device it holds nothing.
    may_ask = not torch.compiler.is_compiling() and counts.device.type != "meta"
    if may_ask and not (counts[:, 1:] & ~counts[:, :-1]).any():
        return None
    behind = counts.sum(dim=1, keepdim=True) + (~counts).cumsum(dim=1) - 1
    return torch.where(counts, counts.cumsum(dim=1) - 1, behind)


def move_tokens(tokens: torch.Tensor, places: torch.LongTensor | None) -> torch.Tensor:
    """Tokens `(B_t, N_t)` or their states `(B_t, N_t, width)`, each moved to its place."""
    if places is None:
        return tokens
    if tokens.dim() == 3:
        places = places.unsqueeze(-1).expand_as(tokens)
    return torch.empty_like(tokens).scatter(1, places, tokens)


def fetch_tokens(states: torch.Tensor, places: torch.LongTensor | None, dim: int = 1) -> torch.Tensor:
    """The reverse of [`move_tokens`], along a dimension of `N_t` of states `(B_t, ...)`."""
    if places is None:
        return states
    shape = [places.shape[0], *[1] * (states.dim() - 1)]
    shape[dim] = places.shape[1]
    return states.gather(dim, places.view(shape).expand_as(states))


# Order of computation


def layers_of(encoder: "PreTrainedModel") -> list[nn.Module]:
    """
    The layers of an encoder in the order of computation. Of an encoder in stages (Swin, ConvNeXt, ResNet) these are the
    blocks of all its stages, one after the other.
    """
    in_stages = encoder.main_input_name == "pixel_values"

    def outermost(module: nn.Module) -> list[nn.ModuleList]:
        lists = []
        for child in module.children():
            lists += [child] if isinstance(child, nn.ModuleList) else outermost(child)
        return lists

    def blocks(item: nn.Module) -> list[nn.Module]:
        inner = dict(item.named_children())
        if isinstance(item, nn.ModuleList):
            return [block for child in item for block in blocks(child)]
        for name in ("blocks", "layers", "layer") if in_stages else ():
            is_stage = isinstance(inner.get(name), nn.ModuleList) or type(item).__name__.endswith("Stage")
            if is_stage and isinstance(inner.get(name), (nn.ModuleList, nn.Sequential)):
                return [block for child in inner[name] for block in blocks(child)]
        return [item]

    return max((blocks(items) for items in outermost(encoder)), key=len, default=[])


def first_layers(encoder: "PreTrainedModel", num_layers: int) -> tuple[list[nn.Parameter], list[str]]:
    """
    What an encoder computes before its layer number `num_layers` begins: embeddings, the layers before that one, and
    what lies between their stages. It runs once, on an empty input, to see its order.

    Returns:
        The parameters, and the names of the modules that are through by then.
    """
    layers = layers_of(encoder)
    began, ended, order = {}, {}, []

    def begin(module, *_):
        order.append(module)
        began.setdefault(module, len(order))

    def end(module, *_):
        order.append(module)
        ended[module] = len(order)

    training = {module: module.training for module in encoder.modules()}
    with ExitStack() as hooks, torch.no_grad():
        for module in encoder.eval().modules():
            hooks.enter_context(module.register_forward_pre_hook(begin))
            hooks.enter_context(module.register_forward_hook(end))
        if encoder.main_input_name == "pixel_values":
            size = image_size(encoder.config) or (224, 224)
            shape = (1, getattr(encoder.config, "num_channels", 3), *size)
            pixel_values = torch.zeros(shape, dtype=encoder.dtype, device=encoder.device)
            encoder(**image_inputs(encoder.config, pixel_values))
        else:
            input_ids = torch.full((1, 2), 1, device=encoder.device)
            encoder(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    for module, mode in training.items():
        module.training = mode

    limit = began[layers[num_layers]] if num_layers < len(layers) else ended[layers[-1]] + 1
    parameters = {}
    for name, module in encoder.named_modules():
        # A module that is not called itself has its parameters used by the one around it.
        parts = name.split(".")
        around = (encoder.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1))
        caller = next(other for other in around if other in began)
        if began[caller] < limit:
            parameters |= {id(p): p for p in module.parameters(recurse=False)}
    through = [name for name, module in encoder.named_modules() if ended.get(module, limit) < limit]
    return list(parameters.values()), through


def word_embeddings(encoder: "PreTrainedModel") -> nn.Module:
    """The embeddings that a text encoder runs: T5's own stand beside the ones of its stack, which have their weights."""
    own = encoder.get_input_embeddings()
    inner = encoder.get_encoder()
    if inner is not encoder and isinstance(inner, transformers.PreTrainedModel):
        return inner.get_input_embeddings()
    return own
