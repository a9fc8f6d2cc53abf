"""What transformers, safetensors or PEFT should do themselves for a model of two borrowed encoders. Each method says
what goes wrong without it; when upstream mends that, the method goes.
"""

import copy
import inspect
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .configuration_hivilt import code_in_place
from .encoders_hivilt import attention_for


class UpstreamMixin:
    """Loading, saving, attention and adapters as in [`PreTrainedModel`], before which it stands, but for what follows."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """`False`, so that weights that a checkpoint lacks are drawn as each encoder draws them: in custom code a module
        without parameters of its own counts as drawn to transformers, but T5 and CLIP draw their layers' from above.
        """
        return False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args, **kwargs):
        """As [`PreTrainedModel.from_pretrained`]; an `OSError` names the folder of weights that were cut off or damaged."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"{pretrained_model_name_or_path}: its weights are cut off or damaged ({error}); copy or download them again."
            ) from error

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Saves weights, config and all the code that opens them, also into the folder that this code runs from."""
        self.config.custom_pipelines = dict(self._custom_pipelines)
        with code_in_place(self, save_directory):
            super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True) and not self._hf_peft_config_loaded:
            _remove_stale_weights(Path(save_directory))

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """Loads the weights of a checkpoint's file, too, as Trainer hands them over. There some encoders (ViT, DINOv2,
        Swin) have older names, which `from_pretrained` translates, and tied weights have one name only.
        """
        if not state_dict.keys() <= self.state_dict().keys():
            translated, loading = type(self).from_pretrained(
                None, config=self.config, state_dict=state_dict, dtype=self.dtype, output_loading_info=True
            )
            loaded = {k: v for k, v in translated.state_dict().items() if k not in loading["missing_keys"]}
            state_dict = loaded | {name: state_dict[name] for name in loading["unexpected_keys"]}
        # Trainer would report tied weights (T5's) as missing under their other name.
        tied = {name: state_dict[kept] for name, kept in self.all_tied_weights_keys.items() if kept in state_dict}
        return super().load_state_dict(tied | dict(state_dict), strict, assign)

    def enable_input_require_grads(self):
        """As in transformers, but for all borrowed models, and for embeddings that return more than a tensor (Swin's)."""
        embeddings = [self.get_input_embeddings()]
        for name, model in self.borrowed_models().items():
            with suppress(NotImplementedError):  # ConvNeXt names no embeddings
                if name != "text_config":
                    embeddings.append(model.get_input_embeddings())
        # timm's are None
        self._require_grads_hooks = [e.register_forward_hook(_require_grad) for e in embeddings if e is not None]

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs):
        """As [`PreTrainedModel.set_attn_implementation`]; a part without the one asked for keeps its own, and warns."""
        borrowed, parts = self.borrowed_models(), attn_implementation
        parts = dict(parts) if isinstance(parts, dict) else dict.fromkeys(("", *borrowed), parts)
        for name, model in borrowed.items():
            if isinstance(parts.get(name), str):
                parts[name] = attention_for(model, parts[name])
        super().set_attn_implementation(parts, **kwargs)


def _require_grad(module: nn.Module, inputs: tuple, output) -> None:
    """A hook, and not a closure: a model that has it can be pickled."""
    (output[0] if isinstance(output, tuple) else output).requires_grad_(True)


def _remove_stale_weights(folder: Path) -> None:
    """Of weights in one file and in shards, removes those of an earlier save: transformers opens the file, if any is left."""
    whole, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if whole.exists() and index.exists():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        stale = whole if all((folder / shard).exists() for shard in shards) else index  # old shards are removed already
        stale.unlink()


class SubfolderMixin:
    """Loading as in [`GenerationMixin`], before which it stands, but for what follows."""

    def adjust_generation_fn(self, *args, **kwargs) -> None:
        """Reads the generation config of the subfolder; transformers reads the config of the folder above, without a word, where
        that is named relative to the working directory."""
        call = inspect.signature(super().adjust_generation_fn).bind(*args, **kwargs)
        folder, subfolder = (call.arguments[name] for name in ("pretrained_model_name_or_path", "subfolder"))
        if subfolder and folder is not None and os.path.isdir(folder):
            call.arguments |= {"pretrained_model_name_or_path": os.path.join(folder, subfolder), "subfolder": ""}
        super().adjust_generation_fn(*call.args, **call.kwargs)


class RecordingMixin:
    """For a model that holds borrowed ones: hooks by which transformers records their states, from the beginning on."""

    # The attributes that hold them.
    _recorded_models = ()

    def install_capturing_hooks(self) -> None:
        for name in self._recorded_models:
            # transformers does it in the first call, which then cannot be compiled or exported.
            maybe_install_capturing_hooks(getattr(self, name))

    def __getstate__(self) -> dict:
        """What pickle and `torch.save` store: all but those hooks, which are functions without a name."""
        state = {**self.__dict__, "_modules": dict(self._modules)}
        # Tensors and configs are not copied, only the modules around them.
        configs = [getattr(self, name).config for name in self._recorded_models]
        memo = {id(value): value for value in (*self.parameters(), *self.buffers(), *configs)}
        for name in self._recorded_models:
            model = state["_modules"][name] = copy.deepcopy(self._modules[name], memo)
            for module in model.modules():
                for key, hook in list(module._forward_hooks.items()):
                    if getattr(hook, "__module__", None) == maybe_install_capturing_hooks.__module__:
                        del module._forward_hooks[key]
                module.__dict__.pop("_output_capturing_hooks_installed", None)
        return state

    def __setstate__(self, state: dict):
        super().__setstate__(state)
        self.install_capturing_hooks()
