"""LoRA for the two experts of Omni-Video 2: a pair of files, or one file for both or for one of them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...hub.repository import staged
from ..lora.layers import LoraPart
from ..lora.loader import OmniVideoLoraLoaderMixin

# Which part of a file for one decoder goes into which component.
_OF_EXPERT = {
    "high_noise": {"transformer": "transformer", "adapter": "adapter"},
    "low_noise": {"transformer": "transformer_2", "adapter": "adapter_2"},
}


class OmniVideo2LoraLoaderMixin(OmniVideoLoraLoaderMixin):
    """Loading and saving of LoRA for decoders and adapters of Omni-Video 2, whose MLLM is stock and frozen."""

    _lora_loadable_modules = ["transformer", "transformer_2", "adapter", "adapter_2"]  # noqa: RUF012 - as in diffusers

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        hotswap: bool = False,
        expert: str | None = None,
        load_into_transformer_2: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Load a LoRA, see [`OmniVideoLoraLoaderMixin.load_lora_weights`].

        Args:
            pretrained_model_name_or_path_or_dict: a file, folder, Hub repository or state dict; or a pair of them,
                `(high_noise, low_noise)`.
            adapter_name: name of the adapter, the same in both experts.
            hotswap: replace the weights of a loaded adapter.
            expert: `"high_noise"` or `"low_noise"`, the decoder for which a file is. By default a file that names
                `transformer_2` goes where it says, and any other file goes into both decoders.
            load_into_transformer_2: as in diffusers, the same as `expert="low_noise"`.
            kwargs: location of the file; and `low_cpu_mem_usage` as in diffusers.

        Raises:
            ValueError: for an unknown `expert`, or a file that does not fit the model. After any error, nothing is
                loaded.
        """
        if expert is not None and expert not in _OF_EXPERT:
            raise ValueError(f"`expert` must be one of {', '.join(map(repr, _OF_EXPERT))}, got {expert!r}.")
        if load_into_transformer_2:
            if expert == "high_noise":
                raise ValueError("`load_into_transformer_2=True` and `expert='high_noise'` exclude each other.")
            expert = "low_noise"
        self._expert_of_file = expert
        try:
            super().load_lora_weights(pretrained_model_name_or_path_or_dict, adapter_name, hotswap, **kwargs)
        finally:
            self._expert_of_file = None

    _expert_of_file: str | None = None

    def _read_parts(self, given: Any, components: Mapping[str, Any], **kwargs: Any) -> dict[str, LoraPart]:
        """The LoRA of each component in a file or a pair of files, checked; no layer is loaded."""
        expert = self._expert_of_file
        if isinstance(given, (tuple, list)):
            if len(given) != 2 or expert is not None:
                raise ValueError(
                    f"A list of LoRA must be the pair (high_noise, low_noise) without `expert`, got {len(given)} "
                    f"entries and `expert` {expert!r}."
                )
            parts: dict[str, LoraPart] = {}
            for one, name in zip(given, _OF_EXPERT, strict=True):
                parts |= self._of_one_expert(one, components, name, **kwargs)
            return parts
        if expert is not None:
            return self._of_one_expert(given, components, expert, **kwargs)
        own = {name: part for name, part in components.items() if name != "mllm"}
        parts = super()._read_parts(given, own, **kwargs)
        if self.transformer_2 is None or any(name.endswith("_2") for name in parts):
            return parts
        return parts | self._of_one_expert(given, components, "low_noise", **kwargs)

    def _of_one_expert(
        self, given: Any, components: Mapping[str, Any], expert: str, **kwargs: Any
    ) -> dict[str, LoraPart]:
        """The LoRA in a file for one decoder, by the components of an expert."""
        names = _OF_EXPERT[expert]
        if components.get(names["transformer"]) is None:
            raise ValueError(
                f"This pipeline has no `{names['transformer']}`, for which a LoRA is given: leave it out."
            )
        own = {part: components.get(component) for part, component in names.items()}
        found = super()._read_parts(given, own, **kwargs)
        return {names[part]: replace(lora, tensors=_copies(lora.tensors)) for part, lora in found.items()}

    @classmethod
    def save_lora_weights(  # type: ignore[override]  # other components have other arguments
        cls,
        save_directory: str | Path,
        transformer_lora_layers: dict[str, torch.Tensor] | None = None,
        adapter_lora_layers: dict[str, torch.Tensor] | None = None,
        transformer_2_lora_layers: dict[str, torch.Tensor] | None = None,
        adapter_2_lora_layers: dict[str, torch.Tensor] | None = None,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        adapter_lora_adapter_metadata: dict[str, Any] | None = None,
        transformer_2_lora_adapter_metadata: dict[str, Any] | None = None,
        adapter_2_lora_adapter_metadata: dict[str, Any] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """
        Save LoRA layers of both experts in one safetensors file, with arguments from [`collect_lora_layers`].

        Args:
            save_directory: target folder.
            transformer_lora_layers, adapter_lora_layers, transformer_2_lora_layers, adapter_2_lora_layers: LoRA
                weights by their names in the component.
            transformer_lora_adapter_metadata, adapter_lora_adapter_metadata, transformer_2_lora_adapter_metadata,
                adapter_2_lora_adapter_metadata: arguments of `LoraConfig` of peft.
            is_main_process: `False` for processes that write nothing.
            weight_name: file name. Default: `pytorch_lora_weights.safetensors`.
            safe_serialization: must be `True`; pickles are not written.
        """
        if not safe_serialization:
            raise ValueError("`safe_serialization=False` would write pickles, which can run code: pass `True`.")
        layers = {
            "transformer": transformer_lora_layers,
            "adapter": adapter_lora_layers,
            "transformer_2": transformer_2_lora_layers,
            "adapter_2": adapter_2_lora_layers,
        }
        metadata = {
            "transformer": transformer_lora_adapter_metadata,
            "adapter": adapter_lora_adapter_metadata,
            "transformer_2": transformer_2_lora_adapter_metadata,
            "adapter_2": adapter_2_lora_adapter_metadata,
        }
        layers = {prefix: tensors for prefix, tensors in layers.items() if tensors}
        if not layers:
            raise ValueError("There are no LoRA layers to save: pass `transformer_lora_layers` or others.")
        if is_main_process:
            with staged(save_directory) as staging:
                cls._save_lora_weights(
                    save_directory=staging,
                    lora_layers=layers,
                    lora_metadata={name: metadata[name] for name in layers},
                    weight_name=weight_name,
                )


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies: of a file for both experts, layers in memory would otherwise be one and the same in both."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


__all__ = ["OmniVideo2LoraLoaderMixin"]
