"""Helpers for torch modules and configurations: find LoRA layers, set the dtype of nested configurations."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

# Base of a mixin: a type checker does not know the class that it is mixed into. At runtime it is nothing.
Host: Any = object


def has_lora(module: nn.Module) -> bool:
    """Whether a layer of the module has a LoRA adapter of peft."""
    return any(hasattr(child, "base_layer") and hasattr(child, "lora_A") for child in module.modules())


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype of a name such as `"bfloat16"`."""
    return getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype, such as `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")


def set_dtype(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """
    Set `dtype` on a configuration and on all nested configurations.

    transformers sets it one level deep only; deeper configurations would keep the dtype of their checkpoint.
    """
    config.dtype = dtype
    for name in config.sub_configs:
        if getattr(config, name) is not None:
            set_dtype(getattr(config, name), dtype)


__all__ = ["Host", "dtype_name", "dtype_of", "has_lora", "set_dtype"]
