"""Data classes for the content of a LoRA file, its components and its layers."""

from dataclasses import dataclass, field
from typing import Any

import torch

PEFT_PREFIX = "base_model.model."


@dataclass
class LoraFile:
    """The weights of a LoRA file by their names in the file, and its settings."""

    tensors: dict[str, torch.Tensor]
    source: str  # name for messages
    settings: dict[str, Any] | None = None  # arguments of `LoraConfig` as `component.argument`, as in diffusers
    peft_config: dict[str, Any] | None = None  # content of `adapter_config.json`, for all layers


@dataclass
class LoraPart:
    """The LoRA of one component: weights by their names in peft, `LoraConfig` arguments, rank and alpha by layer."""

    tensors: dict[str, torch.Tensor]
    settings: dict[str, Any]
    scales: dict[str, tuple[int, float]]


@dataclass
class FileLayer:
    """The weights of one layer in a file."""

    key: str  # name of the layer in the file
    weights: list[str] = field(default_factory=list)  # keys of its weights in the file
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)  # by kind: A, B, bias, alpha, diff, diff_b
    component: str = ""
    name: str = ""
    module: Any = None  # the layer itself, once it is found


__all__ = ["FileLayer", "LoraFile", "LoraPart"]
