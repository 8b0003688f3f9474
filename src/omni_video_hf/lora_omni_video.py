"""
LoRA for every trained part, in one file.

    transformer.*            the decoder, as every Wan LoRA has it: other tools can read that part
    adapter.*                the adapter
    mllm.*, vision_head.*    the parts of the pipeline's `mllm`

Rank and alpha of every layer are in the file's metadata, as diffusers writes them.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.utils import is_peft_available
from torch import nn
from transformers import PreTrainedModel

from .lora_metadata_omni_video import check_lora_metadata
from .repository_omni_video import staged

# Component of the pipeline -> first parts of its keys in the file. Those of `mllm` are the names of its children.
PREFIXES = {"transformer": ("transformer",), "adapter": ("adapter",), "mllm": ("mllm", "vision_head")}


class OmniVideoLoraLoaderMixin(WanLoraLoaderMixin):
    """
    Loads and saves LoRA of decoder, adapter, vision head and MLLM.

    `set_adapters`, `delete_adapters`, `enable_lora`, `disable_lora` and `unload_lora_weights` are diffusers' and reach
    all three components.
    """

    _lora_loadable_modules = ["transformer", "adapter", "mllm"]  # noqa: RUF012 - as in diffusers

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Load a LoRA: ours, or any format of Wan's that diffusers reads.

        Args:
            pretrained_model_name_or_path_or_dict: file, folder, Hub repository, or state dict.
            adapter_name: by default `default_0`, `default_1` and so on.
            hotswap: exchange the weights of an adapter that is loaded; decoder and adapter only.
            kwargs: as in diffusers, e.g. `weight_name`, `revision`, `token`.

        Raises:
            ValueError: when a layer of the file is not in the model, or nothing matches; nothing is loaded then.
        """
        if not is_peft_available():
            raise ImportError("LoRA needs the package `peft`: `pip install peft`.")
        given = pretrained_model_name_or_path_or_dict
        given = str(given) if isinstance(given, Path) else given
        low_cpu_mem_usage = kwargs.pop("low_cpu_mem_usage", True)
        kwargs.setdefault("use_safetensors", True)  # a pickle is not opened by itself
        state_dict, metadata = self.lora_state_dict(given, **kwargs, return_lora_metadata=True)
        source = given if isinstance(given, str) else "the state dict"
        check_lora_metadata(metadata, source)
        parts = self._split_lora(state_dict, source)
        if adapter_name is None:
            names = {name for names in self.get_list_adapters().values() for name in names}
            adapter_name = next(f"default_{i}" for i in range(len(names) + 1) if f"default_{i}" not in names)
        for component in parts.keys() - {"mllm"}:
            getattr(self, component).load_lora_adapter(
                parts[component],
                prefix=None,
                adapter_name=adapter_name,
                metadata=_metadata_of(metadata, component),
                _pipeline=self,
                low_cpu_mem_usage=low_cpu_mem_usage,
                hotswap=hotswap,
            )
        if "mllm" in parts:
            if hotswap:
                raise ValueError("`hotswap=True` cannot exchange LoRA layers of the MLLM: load them under a new name.")
            self._load_lora_into_mllm(parts["mllm"], adapter_name, _metadata_of(metadata, "mllm"))

    def _split_lora(self, state_dict: dict[str, torch.Tensor], source: str) -> dict[str, dict[str, torch.Tensor]]:
        """The layers of every component, by their names in it; refuses a file that does not fit."""
        of_prefix = {prefix: component for component, prefixes in PREFIXES.items() for prefix in prefixes}
        parts: dict[str, dict[str, torch.Tensor]] = {}
        unmatched = []
        modules = {component: dict(getattr(self, component).named_modules()) for component in PREFIXES}
        for key, tensor in state_dict.items():
            prefix, _, rest = key.partition(".")
            component = of_prefix.get(prefix)
            name = key if component == "mllm" else rest
            layer = name.partition(".lora")[0]
            if component is None or ".lora" not in name or layer not in modules[component]:
                unmatched.append(key)
            elif not _fits(name, tensor, modules[component][layer]):
                raise ValueError(
                    f"{source}: {key} is {tuple(tensor.shape)}, which does not fit the layer "
                    f"{modules[component][layer]}: the adapter was made for a model of other sizes."
                )
            else:
                parts.setdefault(component, {})[name] = tensor
        if unmatched:
            prefixes = ", ".join(f"{prefix}." for prefix in of_prefix)
            raise ValueError(
                f"{source}: {len(unmatched)} of {len(state_dict)} LoRA weights match no layer of this model, such as "
                f"{unmatched[0]!r}. Names begin with {prefixes}; the adapter was made for another model."
            )
        if not parts:
            raise ValueError(f"{source}: holds no LoRA weights.")
        return parts

    def _load_lora_into_mllm(
        self, state_dict: dict[str, torch.Tensor], adapter_name: str, metadata: dict[str, Any] | None
    ) -> None:
        """What diffusers' `load_lora_adapter` does for its own models."""
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict  # noqa: PLC0415 - optional

        if adapter_name in getattr(self.mllm, "peft_config", {}):
            raise ValueError(f"`adapter_name` {adapter_name!r} is in use already: choose another.")
        if metadata is None:
            ranks = {name.partition(".lora_B")[0]: t.shape[1] for name, t in state_dict.items() if ".lora_B" in name}
            metadata = _lora_settings({name: (rank, rank) for name, rank in ranks.items()})
        model_offload, sequential_offload, _ = self._optionally_disable_offloading(self)
        inject_adapter_in_model(LoraConfig(**metadata), self.mllm, adapter_name=adapter_name, state_dict=state_dict)
        set_peft_model_state_dict(self.mllm, state_dict, adapter_name)
        self.mllm._hf_peft_config_loaded = True  # so that removing an adapter also removes its settings
        if model_offload:
            self.enable_model_cpu_offload()
        elif sequential_offload:
            self.enable_sequential_cpu_offload()

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        transformer_lora_layers: dict[str, torch.Tensor] | None = None,
        adapter_lora_layers: dict[str, torch.Tensor] | None = None,
        mllm_lora_layers: dict[str, torch.Tensor] | None = None,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        adapter_lora_adapter_metadata: dict[str, Any] | None = None,
        mllm_lora_adapter_metadata: dict[str, Any] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
    ) -> None:
        """
        Write one safetensors file. [`collect_lora_layers`] gives the arguments for a trained model or a pipeline.

        Args:
            save_directory: folder.
            transformer_lora_layers, adapter_lora_layers, mllm_lora_layers: LoRA weights by their names in the
                component.
            transformer_lora_adapter_metadata, adapter_lora_adapter_metadata, mllm_lora_adapter_metadata: arguments of
                peft's `LoraConfig`; without them alpha is lost and taken for the rank when the file is loaded.
            is_main_process: only the main process writes.
            weight_name: `pytorch_lora_weights.safetensors` by default.
        """
        layers = {"transformer": transformer_lora_layers, "adapter": adapter_lora_layers}
        metadata = {
            "transformer": transformer_lora_adapter_metadata,
            "adapter": adapter_lora_adapter_metadata,
            "mllm": mllm_lora_adapter_metadata,
        }
        for prefix in PREFIXES["mllm"]:
            layers[prefix] = {
                name.removeprefix(f"{prefix}."): tensor
                for name, tensor in (mllm_lora_layers or {}).items()
                if name.startswith(f"{prefix}.")
            }
        layers = {prefix: tensors for prefix, tensors in layers.items() if tensors}
        if not layers:
            raise ValueError("There are no LoRA layers to save.")
        if is_main_process:
            with staged(save_directory) as staging:
                cls._save_lora_weights(
                    save_directory=staging, lora_layers=layers, lora_metadata=metadata, weight_name=weight_name
                )

    def fuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Add the LoRA to the weights; by default in every component that has one. Arguments are diffusers'."""
        super().fuse_lora(components=components or list(self.get_list_adapters()), **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Take it out again."""
        super().unfuse_lora(components=components or list(self.get_list_adapters()), **kwargs)


def collect_lora_layers(model: Any, adapter_name: str = "default") -> dict[str, Any]:
    """
    Arguments of [`OmniVideoLoraLoaderMixin.save_lora_weights`] for the LoRA layers a model carries.

    Args:
        model: an [`OmniVideoForConditionalGeneration`] with all parts, or a pipeline. How the layers came in (peft,
            transformers' `add_adapter`, diffusers') does not matter.
        adapter_name: the adapter to collect.

    Raises:
        ValueError: when there are no LoRA layers of that name.
    """
    components = model.pipeline_components() if isinstance(model, PreTrainedModel) else model.components
    arguments: dict[str, Any] = {}
    for component in PREFIXES:
        layers, settings = _lora_layers(components[component], adapter_name) if components.get(component) else ({}, {})
        if layers:
            arguments[f"{component}_lora_layers"] = layers
            arguments[f"{component}_lora_adapter_metadata"] = _lora_settings(settings)
    if not arguments:
        raise ValueError(f"The model has no LoRA layers of the adapter {adapter_name!r}.")
    return arguments


def has_lora(module: nn.Module) -> bool:
    """Whether any layer carries an adapter of peft's."""
    return any(hasattr(child, "base_layer") and hasattr(child, "lora_A") for child in module.modules())


def _lora_layers(module: nn.Module, adapter_name: str) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, float]]]:
    """LoRA weights of one component, and rank and alpha of every layer."""
    layers: dict[str, torch.Tensor] = {}
    settings: dict[str, tuple[int, float]] = {}
    for name, child in module.named_modules():
        if adapter_name not in getattr(child, "lora_A", {}):
            continue
        for matrix in ("lora_A", "lora_B"):
            linear = getattr(child, matrix)[adapter_name]
            layers |= {f"{name}.{matrix}.{key}": value.detach() for key, value in linear.state_dict().items()}
        rank = child.r[adapter_name]
        settings[name] = (rank, child.scaling[adapter_name] * rank)
    return layers, settings


def _lora_settings(layers: dict[str, tuple[int, float]]) -> dict[str, Any]:
    """Arguments of `LoraConfig` that give every layer its rank and alpha."""
    (rank, alpha), _ = Counter(layers.values()).most_common(1)[0]
    others = {name: values for name, values in layers.items() if values != (rank, alpha)}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": values[0] for name, values in others.items()},
        "alpha_pattern": {f"^{name}": values[1] for name, values in others.items()},
        "target_modules": sorted(layers),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _fits(name: str, tensor: torch.Tensor, layer: nn.Module) -> bool:
    """Whether a LoRA matrix has the widths of a linear layer; of other layers its library decides."""
    if ".lora_A." in name and hasattr(layer, "in_features"):
        return tensor.shape[-1] == layer.in_features
    if ".lora_B.weight" in name and hasattr(layer, "out_features"):
        return tensor.shape[0] == layer.out_features
    return True


def _metadata_of(metadata: dict[str, Any] | None, component: str) -> dict[str, Any] | None:
    """The settings of one component, `None` where the file has none."""
    prefix = f"{component}."
    settings = {key.removeprefix(prefix): value for key, value in (metadata or {}).items() if key.startswith(prefix)}
    return settings or None


__all__ = ["OmniVideoLoraLoaderMixin", "collect_lora_layers", "has_lora"]
