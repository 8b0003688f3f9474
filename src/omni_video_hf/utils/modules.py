"""Small questions about torch modules and configurations."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

# Base of a mixin: a type checker does not know the class that it is mixed into. At runtime it is nothing.
Host: Any = object


def has_lora(module: nn.Module) -> bool:
    """Whether any layer of a module carries a LoRA adapter of peft."""
    return any(hasattr(child, "base_layer") and hasattr(child, "lora_A") for child in module.modules())


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype of a name such as `"bfloat16"`."""
    return getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype, such as `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")


def set_dtype(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """
    Set `dtype` on a configuration and on all configurations nested in it.

    transformers sets it on the configurations directly inside ours only; deeper ones would go on naming the dtype that
    their checkpoint was stored in.
    """
    config.dtype = dtype
    for name in config.sub_configs:
        if getattr(config, name) is not None:
            set_dtype(getattr(config, name), dtype)


__all__ = ["Host", "dtype_name", "dtype_of", "has_lora", "set_dtype"]
