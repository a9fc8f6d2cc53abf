"""
What transformers, safetensors or PEFT should do themselves for a model of two borrowed encoders. Each method says what goes
wrong without it; when upstream mends that, the method goes.
"""

import copy
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
        """
        `False`, so that weights that a checkpoint lacks are drawn as each encoder draws them: of custom code transformers
        takes a module that has no parameters of its own for drawn, and T5 and CLIP draw their layers' from above. Our
        `_init_weights` leaves what was loaded alone, as transformers' own do.
        """
        return False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args, **kwargs):
        """As [`PreTrainedModel.from_pretrained`]; weights that were cut off or tampered with are refused by the name of
        their folder (`OSError`)."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"{pretrained_model_name_or_path}: its weights are cut off or damaged ({error}); copy or download them again."
            ) from error

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """
        Saves weights, config and all the code that opens them: modeling, configuration, processing, pipeline. Also
        into the folder that this very code runs from.
        """
        self.config.custom_pipelines = dict(self._custom_pipelines)
        with code_in_place(self, save_directory):
            super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True) and not self._hf_peft_config_loaded:
            _remove_stale_weights(Path(save_directory))

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """
        Takes the weights of a checkpoint's file, too. Some encoders (ViT, DINOv2, Swin) go by older names there, which
        `from_pretrained` translates, and tied weights by one name only; Trainer, when it resumes or returns to the best
        checkpoint, leaves both as they are.
        """
        if not state_dict.keys() <= self.state_dict().keys():
            translated, loading = type(self).from_pretrained(
                None, config=self.config, state_dict=state_dict, dtype=self.dtype, output_loading_info=True
            )
            found = {k: v for k, v in translated.state_dict().items() if k not in loading["missing_keys"]}
            state_dict = found | {name: state_dict[name] for name in loading["unexpected_keys"]}
        # Tied weights are saved under one of their names (T5), which Trainer would report as missing under the other.
        tied = {name: state_dict[kept] for name, kept in self.all_tied_weights_keys.items() if kept in state_dict}
        state_dict = tied | dict(state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def enable_input_require_grads(self):
        """
        Lets gradients begin at the encoders' embeddings even where these are frozen, as adapters under gradient
        checkpointing need it. As in transformers, but for embeddings that return more than a tensor (Swin's).
        """

        embeddings = [self.get_input_embeddings()]
        with suppress(NotImplementedError):  # ConvNeXt names no embeddings
            embeddings.append(self.base_model.vision_model.get_input_embeddings())
        # timm's are None
        self._require_grads_hooks = [e.register_forward_hook(_require_grad) for e in embeddings if e is not None]

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs):
        """
        As [`PreTrainedModel.set_attn_implementation`]; an encoder that does not have the one asked for keeps its own,
        with one warning.
        """
        parts = attn_implementation if isinstance(attn_implementation, dict) else {"": attn_implementation}
        parts = dict(parts)
        encoders = {"vision_config": self.base_model.vision_model, "text_config": self.base_model.text_model}
        for name, encoder in encoders.items():
            wanted = parts.get(name, None if isinstance(attn_implementation, dict) else attn_implementation)
            if isinstance(wanted, str):
                parts[name] = attention_for(encoder, wanted)
        super().set_attn_implementation(parts, **kwargs)


def _require_grad(module: nn.Module, inputs: tuple, output) -> None:
    """A hook, and not a closure: a model that has it can be pickled."""
    (output[0] if isinstance(output, tuple) else output).requires_grad_(True)


def _remove_stale_weights(folder: Path) -> None:
    """
    Of weights in one file and weights in shards, removes those of an earlier save: transformers opens the one file
    wherever there is one, and leaves it when it writes shards; when it writes the file, it removes old shards.
    """
    whole, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if whole.exists() and index.exists():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        stale = whole if all((folder / shard).exists() for shard in shards) else index
        stale.unlink()


class RecordingEncodersMixin:
    """For the model that holds the encoders: hooks by which transformers records their states, from the beginning on."""

    def install_capturing_hooks(self) -> None:
        for encoder in (self.vision_model, self.text_model):
            # transformers would do it in the first call, which cannot be compiled or exported then.
            maybe_install_capturing_hooks(encoder)

    def __getstate__(self) -> dict:
        """What pickle and `torch.save` take: all but those hooks of the encoders, which are functions without a name."""
        state = {**self.__dict__, "_modules": dict(self._modules)}
        # Tensors and configs are not copied, only the modules around them.
        shared = (*self.parameters(), *self.buffers(), self.config.vision_config, self.config.text_config)
        memo = {id(value): value for value in shared}
        for name in ("vision_model", "text_model"):
            encoder = state["_modules"][name] = copy.deepcopy(self._modules[name], memo)
            for module in encoder.modules():
                hooks = module._forward_hooks
                for key in [
                    key
                    for key, hook in hooks.items()
                    if getattr(hook, "__module__", None) == maybe_install_capturing_hooks.__module__
                ]:
                    del hooks[key]
                module.__dict__.pop("_output_capturing_hooks_installed", None)
        return state

    def __setstate__(self, state: dict):
        super().__setstate__(state)
        self.install_capturing_hooks()
