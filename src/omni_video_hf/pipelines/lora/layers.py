"""What a LoRA file holds, by file, component and layer."""

from dataclasses import dataclass, field
from typing import Any

import torch

PEFT_PREFIX = "base_model.model."


@dataclass
class LoraFile:
    """Weights as a file names them, and what the file says about them."""

    tensors: dict[str, torch.Tensor]
    source: str  # for messages
    settings: dict[str, Any] | None = None  # arguments of `LoraConfig`, each after `component.`, as diffusers writes
    peft_config: dict[str, Any] | None = None  # of `adapter_config.json`, for all layers


@dataclass
class LoraPart:
    """The LoRA of one component: weights by peft's names in it, arguments of `LoraConfig`, rank and alpha by layer."""

    tensors: dict[str, torch.Tensor]
    settings: dict[str, Any]
    scales: dict[str, tuple[int, float]]


@dataclass
class FileLayer:
    """What a file holds for one layer."""

    key: str  # as the file names the layer
    weights: list[str] = field(default_factory=list)  # its keys in the file
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)  # by kind: A, B, bias, alpha, diff, diff_b
    component: str = ""
    name: str = ""
    module: Any = None  # the layer itself, once it is found


__all__ = ["FileLayer", "LoraFile", "LoraPart"]
