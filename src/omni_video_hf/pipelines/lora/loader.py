"""
`load_lora_weights`, `save_lora_weights`, scale, fusing and hot-swapping: LoRA of all components in one file.

    transformer.*            the decoder, in the naming of every Wan LoRA, so that other tools can read it
    adapter.*                the adapter
    mllm.*, vision_head.*    MLLM and vision head, which are the pipeline's component `mllm`

The metadata of the file contain rank and alpha of every layer, as in diffusers.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders import PeftAdapterMixin, WanLoraLoaderMixin
from diffusers.utils import is_peft_available, logging
from torch import nn
from transformers import PreTrainedModel

from ...hub.repository import staged
from ...utils.tokens import hub_call
from ...utils.turns import turn
from ..request_checks import check_number
from .files import PREFIXES, lora_settings, read_lora_file, split_lora
from .layers import LoraPart
from .metadata import check_lora_metadata

logger = logging.get_logger(__name__)

FILE_ARGUMENTS = ("weight_name", "subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")


def with_lora_scale(call: Callable) -> Callable:
    """
    Decorate a pipeline's call so that `attention_kwargs={"scale": ...}` scales the LoRA of all components.

    diffusers scales only the decoder, in each of its passes, and loses the weights of `set_adapters` after a scale of
    0. Here the scale applies to every component during the whole call, and its own scale is restored exactly. The
    decoder must get [`without_lora_scale`] of the arguments.
    """
    position = list(signature(call).parameters).index("attention_kwargs")

    @wraps(call)
    def scaled(self: "OmniVideoLoraLoaderMixin", *args: Any, **kwargs: Any) -> Any:
        given = args[position - 1] if len(args) >= position else kwargs.get("attention_kwargs")
        if not isinstance(given, Mapping) or "scale" not in given:
            return call(self, *args, **kwargs)
        scale = check_number("scale", given["scale"])
        with ExitStack() as stack:
            for component in self._lora_loadable_modules:
                stack.enter_context(_scaled(getattr(self, component, None), scale))
            return call(self, *args, **kwargs)

    return scaled


def while_nobody_generates(method: Callable) -> Callable:
    """Run a method that changes LoRA layers while no other thread uses the components that may carry them."""

    @wraps(method)
    def run(self: "OmniVideoLoraLoaderMixin", *args: Any, **kwargs: Any) -> Any:
        with turn(*(getattr(self, component, None) for component in self._lora_loadable_modules)):
            return method(self, *args, **kwargs)

    return run


def without_lora_scale(attention_kwargs: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """`attention_kwargs` for the decoder, without the scale that [`with_lora_scale`] has applied."""
    return {name: value for name, value in (attention_kwargs or {}).items() if name != "scale"} or None


@contextmanager
def _scaled(model: nn.Module | None, scale: float) -> Iterator[None]:
    """Multiply the scale of the active LoRA layers of a component."""
    layers = [] if model is None else [layer for _, layer in _lora_modules(model)]
    before = [
        {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in layer.scaling.items()}
        for layer in layers
    ]
    try:
        for layer in layers:
            for name in layer.active_adapters:
                if name in layer.scaling:
                    layer.scaling[name] *= scale
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            for name, value in values.items():
                if isinstance(value, torch.Tensor):  # a compiled model refers to this tensor
                    layer.scaling[name].copy_(value)
                else:
                    layer.scaling[name] = value


class OmniVideoLoraLoaderMixin(WanLoraLoaderMixin):
    """
    Loading and saving of LoRA for decoder, adapter, vision head and MLLM.

    `set_adapters`, `enable_lora`, `disable_lora` and `unload_lora_weights` are those of diffusers and apply to all
    three components.
    """

    _lora_loadable_modules = ["transformer", "adapter", "mllm"]  # noqa: RUF012 - as in diffusers

    @hub_call
    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Load a LoRA of this package, a checkpoint of a LoRA training, a LoRA of PEFT, or a LoRA for Wan from diffusers,
        DiffSynth, ComfyUI, kohya or musubi-tuner.

        Args:
            pretrained_model_name_or_path_or_dict: `.safetensors` file, folder, Hub repository, or state dict.
            adapter_name: name of the adapter. Default: `default_0`, `default_1` and so on.
            hotswap: replace the weights of a loaded adapter; for decoder and adapter only.
            kwargs: location of the file: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`,
                `force_download`, `local_files_only`; and `low_cpu_mem_usage` as in diffusers.

        Raises:
            ValueError: if a part of the file does not fit the model: an unknown layer, a wrong shape, a matrix without
                its partner, a value that is not finite, a name in use. After any error, nothing of the file is loaded.
        """
        if not is_peft_available():
            raise ImportError("LoRA needs the package `peft`: run `pip install peft`.")
        low_cpu_mem_usage = kwargs.pop("low_cpu_mem_usage", True)
        if kwargs.pop("use_safetensors", True) is False:
            raise ValueError(
                "`use_safetensors=False`: pickles are not opened because they can run code: convert the file to "
                "safetensors."
            )
        unknown = sorted(kwargs.keys() - set(FILE_ARGUMENTS))
        if unknown:
            raise TypeError(f"`load_lora_weights` has no arguments {unknown}; allowed are {FILE_ARGUMENTS}.")
        components: dict[str, Any] = {name: getattr(self, name, None) for name in PREFIXES}
        parts = self._read_parts(pretrained_model_name_or_path_or_dict, components, **kwargs)
        with turn(*components.values()):
            adapter_name = self._adapter_name(adapter_name, parts, hotswap)
            touched = {name: components[name] for name in parts}
            with self._without_offload(), _nothing_on_failure(touched, adapter_name):
                for component, part in parts.items():
                    _load_part(components[component], part, adapter_name, hotswap, low_cpu_mem_usage)

    def _read_parts(self, given: Any, components: Mapping[str, Any], **kwargs: Any) -> dict[str, LoraPart]:
        """The LoRA of each component in a file, checked; no layer is loaded."""
        file = read_lora_file(given, **kwargs)
        check_lora_metadata(file.settings or file.peft_config, file.source)
        return split_lora(file, components)

    @while_nobody_generates
    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """Remove every adapter, as in diffusers."""
        super().unload_lora_weights(*args, **kwargs)

    @while_nobody_generates
    def set_adapters(self, *args: Any, **kwargs: Any) -> None:
        """Choose the adapters that are active, and their weights, as in diffusers."""
        super().set_adapters(*args, **kwargs)

    @while_nobody_generates
    def enable_lora(self) -> None:
        """Let the adapters take part, as in diffusers."""
        super().enable_lora()

    @while_nobody_generates
    def disable_lora(self) -> None:
        """Leave the adapters out, as in diffusers."""
        super().disable_lora()

    def _adapter_name(self, adapter_name: str | None, parts: Mapping[str, LoraPart], hotswap: bool) -> str:
        """Check the adapter's name: a new one, or with `hotswap` that of a loaded adapter."""
        listed = self.get_list_adapters()
        names = {name for entries in listed.values() for name in entries}
        if hotswap:
            if "mllm" in parts:
                raise ValueError(
                    "`hotswap=True` cannot replace LoRA layers of the MLLM: load them with a new `adapter_name`."
                )
            holders = {component for component, entries in listed.items() if adapter_name in entries}
            if adapter_name is None or holders != set(parts):
                raise ValueError(
                    f"`hotswap=True` replaces the adapter `adapter_name` {adapter_name!r} in the components that have "
                    f"it, {sorted(holders)}, but this file is for {sorted(parts)}: load it with a new name."
                )
            return adapter_name
        if adapter_name is None:
            return next(f"default_{i}" for i in range(len(names) + 1) if f"default_{i}" not in names)
        if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
            raise ValueError(f"`adapter_name` must be a name without a dot, got {adapter_name!r}.")
        if adapter_name in names:
            raise ValueError(f"`adapter_name` {adapter_name!r} is already in use: choose another, or delete that one.")
        return adapter_name

    @contextmanager
    def _without_offload(self) -> Iterator[None]:
        """Remove hooks of model and sequential offloading during the block, and add them again after it."""
        model_offload, sequential_offload, group_offload = self._optionally_disable_offloading(self)
        try:
            yield
        finally:
            if model_offload:
                self.enable_model_cpu_offload()
            elif sequential_offload:
                self.enable_sequential_cpu_offload()
            elif group_offload:
                for component in self.components.values():
                    if isinstance(component, nn.Module):
                        _maybe_remove_and_reapply_group_offloading(component)

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
        safe_serialization: bool = True,
    ) -> None:
        """
        Save LoRA layers in one safetensors file.

        [`collect_lora_layers`] collects the arguments from a trained model or a pipeline.

        Args:
            save_directory: target folder.
            transformer_lora_layers, adapter_lora_layers, mllm_lora_layers: LoRA weights by their names in the
                component.
            transformer_lora_adapter_metadata, adapter_lora_adapter_metadata, mllm_lora_adapter_metadata: arguments of
                `LoraConfig` of peft; without them alpha is not saved, and loading uses the rank instead.
            is_main_process: `False` for processes that write nothing.
            weight_name: file name. Default: `pytorch_lora_weights.safetensors`.
            safe_serialization: must be `True`; pickles are not written.
        """
        if not safe_serialization:
            raise ValueError("`safe_serialization=False` would write pickles, which can run code: pass `True`.")
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
            raise ValueError("There are no LoRA layers to save: pass `transformer_lora_layers` or others.")
        if is_main_process:
            with staged(save_directory) as staging:
                cls._save_lora_weights(
                    save_directory=staging, lora_layers=layers, lora_metadata=metadata, weight_name=weight_name
                )

    @while_nobody_generates
    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """
        Remove adapters from all components. A component without adapters is restored to its state before LoRA.

        Args:
            adapter_names: one or several names.

        Raises:
            ValueError: for a name that is not loaded in any component.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        listed = self.get_list_adapters()
        unknown = sorted(set(names) - {name for entries in listed.values() for name in entries})
        if unknown:
            raise ValueError(f"`adapter_names` {unknown} are not in the list of present adapters: {listed}.")
        super().delete_adapters(names)
        for component in listed:
            model = getattr(self, component)
            if not getattr(model, "peft_config", None):
                for name, layer in list(_lora_modules(model)):
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, layer.get_base_layer())
                if hasattr(model, "peft_config"):
                    del model.peft_config
                model._hf_peft_config_loaded = False

    @while_nobody_generates
    def fuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """
        Merge the LoRA into the weights, by default in every component that has one; arguments as in diffusers.

        A `lora_scale` applies until [`unfuse_lora`], which restores the scale of the layers.
        """
        components = components or list(self.get_list_adapters())
        for layer in self._lora_layers_of(components):
            if not layer.merged:
                layer.scaling_before_fusing = dict(layer.scaling)
        super().fuse_lora(components=components, **kwargs)

    @while_nobody_generates
    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Remove a merged LoRA from the weights, see [`fuse_lora`]."""
        components = components or list(self.get_list_adapters())
        super().unfuse_lora(components=components, **kwargs)
        for layer in self._lora_layers_of(components):
            layer.scaling.update(layer.__dict__.pop("scaling_before_fusing", {}))

    def _lora_layers_of(self, components: list[str]) -> list[Any]:
        models = [getattr(self, component, None) for component in components]
        return [layer for model in models if model is not None for _, layer in _lora_modules(model)]


def collect_lora_layers(model: Any, adapter_name: str = "default") -> dict[str, Any]:
    """
    Collect the LoRA layers of a model as arguments of [`OmniVideoLoraLoaderMixin.save_lora_weights`].

    Args:
        model: an [`OmniVideoForConditionalGeneration`] with all components, or a pipeline; the layers may come from
            peft, or from `add_adapter` of transformers or diffusers.
        adapter_name: name of the adapter to collect.

    Raises:
        ValueError: if there are no LoRA layers of that name.
    """
    components = model.pipeline_components() if isinstance(model, PreTrainedModel) else model.components
    arguments: dict[str, Any] = {}
    for component in PREFIXES:
        layers, settings = _lora_layers(components[component], adapter_name) if components.get(component) else ({}, {})
        if layers:
            arguments[f"{component}_lora_layers"] = layers
            arguments[f"{component}_lora_adapter_metadata"] = lora_settings(settings)
    if not arguments:
        raise ValueError(f"The model has no LoRA layers of the adapter {adapter_name!r} (`adapter_name`).")
    return arguments


def _lora_layers(module: nn.Module, adapter_name: str) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, float]]]:
    """LoRA weights of one component, with rank and alpha of every layer."""
    layers: dict[str, torch.Tensor] = {}
    settings: dict[str, tuple[int, float]] = {}
    for name, child in module.named_modules():
        if adapter_name not in getattr(child, "lora_A", {}):
            continue
        for matrix in ("lora_A", "lora_B"):
            linear = getattr(child, matrix)[adapter_name]
            layers |= {f"{name}.{matrix}.{key}": value.detach() for key, value in linear.state_dict().items()}
        rank = child.lora_A[adapter_name].weight.shape[0]
        settings[name] = (rank, _trained_scale(child, adapter_name) * rank)
    return layers, settings


def _trained_scale(layer: Any, adapter_name: str) -> float:
    """The scale of a LoRA layer, without the weight from `set_adapters`."""
    rank = layer.r[adapter_name]
    return layer.lora_alpha[adapter_name] / (rank**0.5 if layer.use_rslora.get(adapter_name, False) else rank)


def _load_part(model: Any, part: LoraPart, adapter_name: str, hotswap: bool, low_cpu_mem_usage: bool) -> None:
    """Load the LoRA of one component: with the method of diffusers, or with the same steps for the MLLM."""
    if isinstance(model, PeftAdapterMixin):
        settings = dict(part.settings)
        if hotswap:  # peft requires equal patterns, although it does not use them
            old = model.peft_config[adapter_name]
            settings |= {"rank_pattern": old.rank_pattern, "alpha_pattern": old.alpha_pattern}
        model.load_lora_adapter(
            part.tensors,
            prefix=None,
            adapter_name=adapter_name,
            metadata=settings,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
        )
        if hotswap:
            _set_scales(model, part, adapter_name)
        return
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict  # noqa: PLC0415 - optional

    memory = {"low_cpu_mem_usage": low_cpu_mem_usage}
    config = LoraConfig(**part.settings)
    inject_adapter_in_model(config, model, adapter_name=adapter_name, state_dict=part.tensors, **memory)
    set_peft_model_state_dict(model, part.tensors, adapter_name, **memory)
    model._hf_peft_config_loaded = True  # so that removing an adapter also removes its settings


def _set_scales(model: nn.Module, part: LoraPart, adapter_name: str) -> None:
    """Set the alpha of every layer after a hot-swap, because peft assumes the same alpha for all layers."""
    layers = dict(_lora_modules(model))
    for name, (rank, alpha) in part.scales.items():
        layer = layers[name]
        layer.r[adapter_name], layer.lora_alpha[adapter_name] = rank, alpha
        scale = layer.scaling[adapter_name]
        if isinstance(scale, torch.Tensor):  # after `enable_lora_hotswap`, for compiled models
            scale.fill_(alpha / rank)
        else:
            layer.scaling[adapter_name] = alpha / rank


@contextmanager
def _nothing_on_failure(components: Mapping[str, nn.Module], adapter_name: str) -> Iterator[None]:
    """Restore all components if loading an adapter into them fails."""
    before = {name: _LoraState(module, adapter_name) for name, module in components.items()}
    try:
        yield
    except BaseException:
        for name, module in components.items():
            before[name].restore(module)
        raise


class _LoraState:
    """The LoRA layers of a component, the active adapters, and the values of an adapter that will be replaced."""

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self.adapter_name = adapter_name
        self.configs = dict(getattr(model, "peft_config", {}))
        self.had_configs = hasattr(model, "peft_config")
        self.loaded = getattr(model, "_hf_peft_config_loaded", False)
        self.hotswap = getattr(model, "_prepare_lora_hotswap_kwargs", None)
        self.active = {name: list(layer.active_adapters) for name, layer in _lora_modules(model)}
        self.tables = {
            name: {table: dict(getattr(layer, table).items()) for table in _tables(layer)}
            for name, layer in _lora_modules(model)
        }
        self.values = {
            name: value.detach().clone() for name, value in model.named_parameters() if _is_of(name, adapter_name)
        }

    @torch.no_grad()
    def restore(self, model: Any) -> None:
        """Remove everything that was added since."""
        for name, layer in list(_lora_modules(model)):
            if name not in self.active:
                parent = model.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], layer.get_base_layer())
                continue
            for table, entries in self.tables[name].items():
                current = getattr(layer, table)
                for adapter in set(current.keys()) - entries.keys():
                    del current[adapter]
                for adapter, entry in entries.items():
                    current[adapter] = entry
            if list(layer.active_adapters) != self.active[name]:
                layer.set_adapter(self.active[name])
        for name, value in model.named_parameters():
            if name in self.values and value.shape == self.values[name].shape:
                value.copy_(self.values[name])
        if self.had_configs:
            model.peft_config = self.configs
        elif hasattr(model, "peft_config"):
            del model.peft_config
        model._hf_peft_config_loaded = self.loaded
        if hasattr(model, "_prepare_lora_hotswap_kwargs"):
            model._prepare_lora_hotswap_kwargs = self.hotswap


def _tables(layer: Any) -> list[str]:
    """Attributes of a peft layer that have an entry for every adapter."""
    names = (*layer.adapter_layer_names, *layer.other_param_names, "use_rslora", "use_dora", "lora_bias")
    return [name for name in dict.fromkeys(names) if hasattr(getattr(layer, name, None), "keys")]


def _is_of(name: str, adapter_name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".lora_" in name and f".{adapter_name}." in name


def _lora_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers that peft has wrapped, by name."""
    for name, layer in model.named_modules():
        if hasattr(layer, "base_layer") and hasattr(layer, "lora_A"):
            yield name, layer


__all__ = ["OmniVideoLoraLoaderMixin", "collect_lora_layers"]
