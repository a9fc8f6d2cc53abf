"""How a borrowed encoder becomes what fusion reads: of images a pyramid of maps, of texts one state a token.

Everything that differs from one family of encoders to the next is in this file, and what a borrowed decoder must be.
`docs/encoders.md` lists the families. One of transformers that is in no table is refused, since it is not tested. An
encoder that a program registers itself (`AutoConfig.register`, `AutoModel.register`) is run once without weights, on the
meta device, and refused where it gives no maps or leaves parameters without a gradient.
"""

import copy
import inspect
import itertools
import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import ModelOutput, logging

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class VisionFamily:
    """What is particular to a family of vision encoders."""

    # How its hidden states lie. "patches": one grid of `patch_size`. "stages": one of `hidden_sizes` a stage, after the
    # embeddings. "merging": as Swin, which halves the grid after each stage but the last. "run": the config does not say,
    # so the encoder is run once on the meta device.
    states: str = "patches"
    last_norm: str | None = None  # applied to its pooled output alone there; here it normalises the last map
    channels_last: bool = False  # its 4-dimensional states are (images, height, width, channels)
    one_size: bool = False  # it accepts images of no other size than the config names


@dataclass(frozen=True)
class TextFamily:
    """What is particular to a family of text encoders."""

    position_offset: bool = False  # it numbers positions from `pad_token_id + 1`: its longest text is shorter by that
    width: str = "hidden_size"  # the field of the config that says how wide its token states are


_BY_RUN = VisionFamily("run")

_PATCHES = """aimv2_vision_model beit blip_vision_model data2vec-vision deit dinov2 dinov2_with_registers dinov3_vit
    ijepa siglip2_vision_model siglip_vision_model vit vit_msn"""
_CLIP = """altclip_vision_model chinese_clip_vision_model clip_vision_model clipseg_vision_model
    metaclip_2_vision_model mlcd_vision_model"""
_RUN = """bit cvt dinov3_convnext efficientnet focalnet glpn mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 poolformer
    pvt pvt_v2 segformer swiftformer textnet timm_wrapper"""
VISION_FAMILIES = {
    **dict.fromkeys(_PATCHES.split(), VisionFamily()),
    **dict.fromkeys(_CLIP.split(), VisionFamily(last_norm="post_layernorm")),
    **dict.fromkeys(("regnet", "resnet"), VisionFamily("stages")),
    **dict.fromkeys(("convnext", "convnextv2"), VisionFamily("stages", last_norm="layernorm")),
    **dict.fromkeys(("donut-swin", "swin", "swinv2"), VisionFamily("merging")),
    **dict.fromkeys(_RUN.split(), _BY_RUN),
    "hiera": VisionFamily("run", channels_last=True),
    "levit": VisionFamily("run", one_size=True),
}

_PLAIN_TEXT = """albert bert bert-generation big_bird blip_text_model bloom chinese_clip_text_model clip_text_model
    clipseg_text_model deberta deberta-v2 distilbert electra ernie eurobert flaubert gemma gemma2 gemma3_text gpt2
    gpt_neox gte jina_embeddings_v3 llama megatron-bert metaclip_2_text_model mistral modernbert mt5 nomic_bert olmo2
    openai-gpt phi qwen2 qwen3 rembert roformer siglip2_text_model siglip_text_model smollm3 t5 umt5 xlm"""
_OFFSET = "camembert data2vec-text ibert mpnet roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl"
TEXT_FAMILIES = {
    **dict.fromkeys(_PLAIN_TEXT.split(), TextFamily()),
    **dict.fromkeys(_OFFSET.split(), TextFamily(position_offset=True)),
    "altclip_text_model": TextFamily(position_offset=True, width="project_dim"),
    "opt": TextFamily(width="word_embed_proj_dim"),
}

# Families that cannot be right here, and what to take in their place.
REFUSED_FAMILIES = {
    "timm_backbone": "it has no last hidden state; `TimmWrapperConfig(architecture=...)` takes the same models of timm",
    "vit_mae": (
        "it drops random patches, in evaluation too. Its weights are those of a `vit`: save them once by "
        "`ViTModel.from_pretrained(name).save_pretrained(folder)`, and name that folder"
    ),
}

# Causal language models of transformers with cross-attention.
DECODER_FAMILIES = (
    *("bart", "bert", "bert-generation", "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert"),
    *("data2vec-text", "electra", "ernie", "gpt2", "marian", "mbart", "mvp", "pegasus", "plbart", "rembert", "roberta"),
    *("roberta-prelayernorm", "roc_bert", "roformer", "trocr", "xglm", "xlm-roberta", "xlm-roberta-xl"),
)

# Fields that switch off what nothing here reads of a family.
_SWITCHES = {
    "aimv2_vision_model": {"use_head": False},
    "big_bird": {"attention_type": "original_full"},  # as it is for short texts; sparse blocks are drawn at random
    "blip_text_model": {"is_decoder": False},  # which has cross-attention
    "siglip_vision_model": {"vision_use_head": False},
    "siglip2_vision_model": {"vision_use_head": False},
}


def check_encoder(name: str, config: PreTrainedConfig) -> None:
    """Refuses (`ValueError`) a `"vision_config"` or `"text_config"` that is not known to be right as an encoder."""
    families = VISION_FAMILIES if name == "vision_config" else TEXT_FAMILIES
    kind, family = name.removesuffix("_config"), config.model_type
    if family in families and family != "timm_wrapper":
        return
    if getattr(config, name, None) is not None:
        why = f"it is of a whole model: give its `{name}`, or `HiViLTConfig.from_vision_text_configs`, which takes it"
    elif family in REFUSED_FAMILIES:
        why = REFUSED_FAMILIES[family]
    elif type(config).__module__.startswith("transformers.") and family != "timm_wrapper":
        why = f"it is not among the {kind} encoders that are tested"
    else:
        why = _foreign_fault(name, config)
    if why is not None:
        raise ValueError(
            f"`{name}`: a `{family}` cannot be the {kind} encoder: {why}. Those that can: {', '.join(sorted(families))}."
        )


def without_unread_parts(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with those parts switched off that nothing here reads, so that every weight gets a gradient, and
    without its own classes and the path of its folder: a copy, since the config may belong to another model.
    """
    switches = {"add_cross_attention": False, "use_mask_token": False, **_SWITCHES.get(config.model_type, {})}
    # An encoder's own classes, 1,000 of ImageNet's, give way to the two that transformers fills in.
    switches |= {"id2label": {0: "LABEL_0", 1: "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    origin = Path(str(config.name_or_path))
    if origin.is_absolute():
        switches["_name_or_path"] = origin.name  # the rest of the path is of one machine, and a checkpoint is shared
    for field, value in switches.items():
        # SigLIP's model asks for its switch even where its config, in older versions, has no such field.
        if getattr(config, field, field == "vision_use_head") != value:
            config = copy.deepcopy(config)
            setattr(config, field, value)
    return config


def build_encoder(config: PreTrainedConfig) -> "PreTrainedModel":
    """The encoder of a config, without the parts that only its own pooled output or pre-training reads. An attention
    implementation that it does not have leaves it with its own, and is warned of once.
    """
    # By way of the package, which imports its models when they are asked for: a config alone needs none of them.
    is_text = type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
    auto_class = transformers.AutoModelForTextEncoding if is_text else transformers.AutoModel
    build, model_class = auto_class.from_config, auto_class._model_mapping.get(type(config), None)
    own_class = getattr(transformers, type(config).__name__.replace("Config", "Model"), None)
    if model_class is None and own_class is not None:
        build = model_class = own_class  # the Auto classes lack the towers of some CLIP-like models
    has_pooler = model_class is not None and "add_pooling_layer" in inspect.signature(model_class).parameters
    without = {"add_pooling_layer": False} if has_pooler else {}
    encoder = _built(build, config, **without)

    if isinstance(getattr(encoder, "head", None), nn.Linear):
        encoder.head = nn.Identity()
    embeddings = getattr(encoder, "embeddings", None)
    if getattr(embeddings, "mask_token", None) is not None:
        # A buffer is neither trained nor saved, and DINOv3's initialisation still finds it.
        mask_token = embeddings.mask_token.detach()
        del embeddings.mask_token
        embeddings.register_buffer("mask_token", mask_token, persistent=False)
    return encoder


def _built(build: Callable, config: PreTrainedConfig, **kwargs) -> "PreTrainedModel":
    """What `build` makes of a config, with the attention that it asks for, or, with a warning, the model's own."""
    wanted = config._attn_implementation
    try:
        return build(config, **kwargs)
    except ValueError:
        if wanted in (None, "eager"):
            raise
        config._attn_implementation = None
        model = build(config, **kwargs)
        _warn_of_attention(model, wanted)
        return model


def _warn_of_attention(encoder: "PreTrainedModel", wanted: str) -> None:
    own = encoder.config._attn_implementation
    logger.warning_once(f"{type(encoder).__name__} has no `attn_implementation={wanted!r}`; it keeps {own!r}, its own.")


def attention_for(encoder: "PreTrainedModel", wanted: str) -> str:
    """The attention implementation that is asked for, or, with a warning, the one that the encoder keeps."""
    own = encoder.config._attn_implementation
    if wanted == own:
        return own
    with suppress(ValueError):
        if encoder._can_set_attn_implementation():
            return encoder.get_correct_attn_implementation(wanted)
    _warn_of_attention(encoder, wanted)
    return own


# Vision: hidden states become maps


@dataclass(frozen=True)
class VisionState:
    """One hidden state of a vision encoder."""

    channels: int
    side: int  # cells a side at the size that the config names; it orders states from fine to coarse
    others: int = 0  # tokens before those of the grid, where that is known


def vision_states(config: PreTrainedConfig) -> list[VisionState]:
    """What the hidden states of a vision encoder are, the embeddings' output first. Where the last hidden state is a
    map of its own (MobileNet, EfficientNet, MobileViT), it comes as one more.

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


def is_hierarchical(states: list[VisionState]) -> bool:
    """Whether an encoder coarsens by itself: its hidden states lie on several grids."""
    return len({state.side for state in states}) > 1


def default_levels(states: list[VisionState], count: int) -> list[int]:
    """Evenly spaced states that end with the last one; of a hierarchical encoder the last of each of its coarsest grids."""
    if is_hierarchical(states):
        sides = [state.side for state in states] + [0]
        return [index for index in range(len(states)) if sides[index + 1] < sides[index]][-count:]
    return [(len(states) - 1) * (stage + 1) // count for stage in range(count)]


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
    try:
        # What is drawn on the meta device must not move the random numbers of who asks.
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            encoder = build_encoder(config).eval()
            outputs = encoder(**_blank_images(encoder, 2), output_hidden_states=True, return_dict=True)
            return encoder, image_states(config, outputs)
    except (ImportError, TypeError, AttributeError, IndexError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"a `{config.model_type}` gives no hidden states for images: {error}") from error


def _blank_images(encoder: "PreTrainedModel", count: int) -> dict[str, torch.Tensor]:
    shape = (count, getattr(encoder.config, "num_channels", 3), *(image_size(encoder.config) or (224, 224)))
    return image_inputs(encoder.config, torch.zeros(shape, dtype=encoder.dtype, device=encoder.device))


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
    return None if size is None else _both_sides(size)


def _both_sides(size) -> tuple[int, int]:
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def takes_one_size(config: PreTrainedConfig) -> bool:
    """Whether images of another size than [`image_size`] are an error in any case."""
    return VISION_FAMILIES.get(config.model_type, _BY_RUN).one_size


def image_inputs(config: PreTrainedConfig, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """The arguments of a vision encoder for images `(B_i, channels, height, width)`: patches for SigLIP 2."""
    if config.model_type != "siglip2_vision_model":
        return {"pixel_values": pixel_values}
    patch = config.patch_size
    # (B_i, channels, height, width) -> (B_i, channels, rows, columns, patch, patch) -> (B_i, patches, patch * patch * channels)
    patches = pixel_values.unfold(2, patch, patch).unfold(3, patch, patch)
    grid = tuple(patches.shape[2:4])
    patches = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device),
        "spatial_shapes": torch.tensor([grid] * len(patches)),
    }


def image_states(config: PreTrainedConfig, outputs: ModelOutput) -> list[torch.Tensor]:
    """All hidden states, maps as `(B_i, height, width, channels)`, rows of tokens as they are. The last hidden state,
    which is after the final norm, takes the place of the last one, or, where it is another map, follows it.
    """
    family = VISION_FAMILIES.get(config.model_type, _BY_RUN)
    spatial = outputs.get("reshaped_hidden_states")
    states = [*(spatial if spatial is not None else outputs.hidden_states), outputs.last_hidden_state]
    if not family.channels_last:
        states = [state.permute(0, 2, 3, 1) if state.dim() == 4 else state for state in states]
    *states, last = states
    if last.dim() == 3 and states[-1].dim() == 4:
        height, width = states[-1].shape[1:3]
        last = last[:, last.shape[1] - height * width :].unflatten(1, (height, width))
    return states[:-1] + [last] if last.shape == states[-1].shape else states + [last]


def image_maps(
    encoder: "PreTrainedModel",
    outputs: ModelOutput,
    pixel_values: torch.Tensor,
    states: list[VisionState],
    indices: list[int],
) -> list[torch.Tensor]:
    """The hidden states of these indices as maps `(B_i, height, width, channels)`; `states` are of [`vision_states`].

    The last one is normalised where the encoder normalises only its pooled output.

    Raises:
        ValueError: the tokens of a state do not fill the images' grid.
    """
    config = encoder.config
    given = image_states(config, outputs)
    maps = []
    for index in indices:
        state = given[index]
        if state.dim() == 3:
            grid = _grid(config, pixel_values, state, states[index])
            # Class and register tokens come first and have no place on the grid.
            state = state[:, state.shape[1] - grid[0] * grid[1] :].unflatten(1, grid)
        maps.append(state)
    last_norm = VISION_FAMILIES.get(config.model_type, _BY_RUN).last_norm
    if last_norm is not None:
        maps[-1] = getattr(encoder, last_norm)(maps[-1])
    return maps


def _grid(config: PreTrainedConfig, pixel_values: torch.Tensor, tokens: torch.Tensor, state: VisionState):
    """Rows and columns that the tokens `(B_i, N, channels)` of images lie on."""
    height, width = pixel_values.shape[2:]
    if VISION_FAMILIES.get(config.model_type, _BY_RUN).states == "patches":
        patch_height, patch_width = _both_sides(config.patch_size)
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


# Text: one state a token


# How often values on a GPU are looked at in training, which waits for it: in the first steps of a model, about.
MOST_LOOKS = 20
_looks = itertools.count()


def look_anew() -> None:
    """Begins to count looks anew: a model that was just made may meet other data."""
    global _looks
    _looks = itertools.count()


def has_values(tensor: torch.Tensor, always_alike: bool = False) -> bool:
    """Whether its values may be asked for: not in a graph, nor on the meta device, where it has none, and on a GPU with
    gradients `MOST_LOOKS` times alone, as what is wrong with a data set mostly is so in its first batches, too. Then never if
    the answer is to be `always_alike`, as where it decides what is computed: a checkpoint computes it a second time.
    """
    if torch.compiler.is_compiling() or tensor.device.type == "meta":
        return False
    if tensor.device.type == "cpu" or not torch.is_grad_enabled():
        return True
    return not always_alike and next(_looks) < MOST_LOOKS


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
    """Where each token of `(B_t, N_t)` goes so that padding comes last; `None` if it does. Encoders number positions
    from the first column on, padding or not: only so is a text padded on the left the same text.
    """
    counts = attention_mask.bool()
    if has_values(counts, always_alike=True) and not (counts[:, 1:] & ~counts[:, :-1]).any():
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
    """The layers of an encoder in the order of computation; of one in stages (Swin, ResNet) the blocks of all its stages."""
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
    """What an encoder computes before its layer number `num_layers` begins: embeddings, the layers before that one, and
    what lies between their stages. It runs once, on an empty input, to see its order.

    Returns:
        The parameters, and the names of the modules that are through by then.
    """
    layers = layers_of(encoder)
    began, ended, clock = {}, {}, itertools.count()

    def begin(module, *_):
        began.setdefault(module, next(clock))

    def end(module, *_):
        ended[module] = next(clock)

    training = {module: module.training for module in encoder.modules()}
    encoder.eval()
    with register_module_forward_pre_hook(begin), register_module_forward_hook(end), torch.no_grad():
        if encoder.main_input_name == "pixel_values":
            encoder(**_blank_images(encoder, 1))
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
    inner = encoder.get_encoder()
    return (inner if isinstance(inner, transformers.PreTrainedModel) else encoder).get_input_embeddings()


def as_decoder(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a causal language model as that of a decoder with cross-attention: a copy, with no special token
    that its vocabulary lacks (GPT-2's, of a smaller vocabulary) and without the path of its folder.

    Raises:
        ValueError: there is no causal language model of the family, it has no cross-attention, or it is not tested.
    """
    family = config.model_type
    if family not in DECODER_FAMILIES:
        causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        if type(config) not in causal:
            why = "transformers has no causal language model of it, whose decoder could stand without its own encoder"
        elif "encoder_hidden_states" not in inspect.signature(causal[type(config)].forward).parameters:
            why = "it has no cross-attention, by which a decoder reads what image and text were encoded to"
        else:
            why = "it has cross-attention, but has not been tested here"
        raise ValueError(
            f"`decoder_config`: a `{family}` cannot be the decoder: {why}. Give one of {', '.join(DECODER_FAMILIES)}."
        )
    config = copy.deepcopy(config)
    config.is_decoder, config.is_encoder_decoder, config.add_cross_attention = True, False, True
    config.dtype = None  # that of the whole model, whatever the checkpoint's was
    if getattr(config, "decoder_layers", None) is not None:
        # Of BART and its like caches count the encoder's, which is not there.
        config.num_hidden_layers, config.num_attention_heads = config.decoder_layers, config.decoder_attention_heads
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, int) and not 0 <= token < config.vocab_size:
            setattr(config, name, None)
    origin = Path(str(config.name_or_path))
    if origin.is_absolute():
        config.name_or_path = origin.name
    return config


def decoder_width(config: PreTrainedConfig) -> int:
    """How wide the states are that a decoder attends to."""
    return getattr(config, "cross_attention_hidden_size", None) or config.hidden_size


def end_token(tokenizer) -> int | None:
    """The token that ends what a decoder writes, `eos`, else `sep`; `None` where the tokenizer has neither."""
    return tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def build_decoder(config: PreTrainedConfig) -> "PreTrainedModel":
    """The decoder of a config of [`as_decoder`]; attention as [`build_encoder`]."""
    return _built(transformers.AutoModelForCausalLM.from_config, config)


def new_in_decoder(config: PreTrainedConfig) -> set[str]:
    """The weights that cross-attention adds to a causal language model, by their names; none where it always has them."""
    plain = copy.deepcopy(config)
    plain.add_cross_attention = False
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        decoders = [transformers.AutoModelForCausalLM.from_config(one) for one in (copy.deepcopy(config), plain)]
    return decoders[0].state_dict().keys() - decoders[1].state_dict().keys()
