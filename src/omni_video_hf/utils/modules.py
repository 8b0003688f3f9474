"""Helpers for torch modules and configurations: find LoRA layers, set the dtype of nested configurations."""

import torch
from torch import nn
from transformers import PreTrainedConfig


def has_lora(module: nn.Module) -> bool:
    """Whether a layer of the module has a LoRA adapter of peft."""
    return any(hasattr(child, "base_layer") and hasattr(child, "lora_A") for child in module.modules())


def set_dtype(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """
    Set `dtype` on a configuration and on all nested configurations.

    transformers sets it one level deep only; deeper configurations would keep the dtype of their checkpoint.
    """
    config.dtype = dtype
    for name in config.sub_configs:
        if getattr(config, name) is not None:
            set_dtype(getattr(config, name), dtype)


__all__ = ["has_lora", "set_dtype"]
