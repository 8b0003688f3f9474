"""Checks and conversion of one LoRA layer: its two matrices, bias, rank and alpha, from every storage format."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from .layers import PEFT_PREFIX, FileLayer, LoraFile

# Values of `init_lora_weights` that also change the weights of the model, so that the LoRA alone is incomplete.
CHANGES_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")


MAX_PATTERNS, MAX_PATTERN_LENGTH = 16, 200  # limits for patterns that are not plain names


def layer_matrices(layer: FileLayer, file: LoraFile) -> dict[str, torch.Tensor]:
    """Matrices and bias of a layer; a difference of weights becomes matrices. Empty if the layer changes nothing."""
    for kind, tensor in layer.tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"{file.source}: {layer.key} ({kind}) is {tensor.dtype}; LoRA weights are floating point."
            )
        bad = int((~torch.isfinite(tensor.float())).sum())
        if bad:
            raise ValueError(
                f"{file.source}: {layer.key} ({kind}) contains {bad} values that are NaN or infinite: its training "
                "diverged, or the file is damaged. Use another file."
            )
    found: dict[str, torch.Tensor] = {
        kind: layer.tensors[kind] for kind in ("A", "B", "bias") if kind in layer.tensors
    }
    base = layer.module.get_base_layer() if hasattr(layer.module, "get_base_layer") else layer.module
    differences = [layer.tensors[kind] for kind in ("diff", "diff_b") if kind in layer.tensors]
    if not found and all(not difference.any() for difference in differences):
        return {}  # tools for Wan write zeros for norm layers
    is_linear = hasattr(base, "in_features") and hasattr(base, "out_features")
    if not is_linear and not isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise ValueError(
            f"{file.source}: {layer.key} changes {layer.component}.{layer.name}, a {type(base).__name__}; LoRA is "
            "supported for linear and convolution layers."
        )
    if not found:
        found = _of_differences(layer, base) if is_linear else {}
    if ("diff" in layer.tensors and "A" in layer.tensors) or not {"A", "B"} <= found.keys():
        raise ValueError(
            f"{file.source}: {layer.key} must have both matrices of its LoRA and nothing else, got "
            f"{sorted(layer.tensors)}."
        )
    _check_shapes(layer, found, base, file)
    return found


def _of_differences(layer: FileLayer, base: Any) -> dict[str, torch.Tensor]:
    """Write a difference of weights as the product of two matrices; if only the bias differs, the product is zero."""
    if "diff" not in layer.tensors:
        bias = layer.tensors["diff_b"]
        return {"A": bias.new_zeros(1, base.in_features), "B": bias.new_zeros(base.out_features, 1)}
    difference = layer.tensors["diff"]
    identity = torch.eye(min(difference.shape), dtype=difference.dtype)
    if difference.shape[0] < difference.shape[1]:
        return {"A": difference, "B": identity}
    return {"A": identity, "B": difference}


def _check_shapes(layer: FileLayer, found: Mapping[str, torch.Tensor], base: Any, file: LoraFile) -> None:
    """Refuse matrices whose shapes do not fit the layer."""
    rank = found["A"].shape[0] if found["A"].ndim else 0
    if hasattr(base, "in_features"):
        shapes = {"A": (rank, base.in_features), "B": (base.out_features, rank), "bias": (base.out_features,)}
    else:
        ones = (1,) * len(base.kernel_size)
        inputs = (rank, base.in_channels // base.groups, *base.kernel_size)
        shapes = {"A": inputs, "B": (base.out_channels, rank, *ones), "bias": (base.out_channels,)}
    if "diff_b" in layer.tensors:
        found = {**found, "bias": layer.tensors["diff_b"]}
    for kind, tensor in found.items():
        if tuple(tensor.shape) != shapes[kind] or rank == 0:
            raise ValueError(
                f"{file.source}: {layer.key} ({kind}) is {tuple(tensor.shape)}, which does not fit {layer.component}."
                f"{layer.name} of this model, {shapes[kind]}: the LoRA was trained for a model of another size."
            )


def layer_alpha(layer: FileLayer, rank: int, file: LoraFile) -> float:
    """The alpha of a layer, whose scale is `alpha / rank`. Default: the rank, as in diffusers."""
    settings = file.peft_config
    if file.settings is not None:
        prefix = f"{layer.component}."
        settings = {key.removeprefix(prefix): value for key, value in file.settings.items() if key.startswith(prefix)}
    stored = None
    if "alpha" in layer.tensors:
        if layer.tensors["alpha"].numel() != 1:
            raise ValueError(f"{file.source}: {layer.key}.alpha must be one number.")
        stored = float(layer.tensors["alpha"])
    if not settings:
        return rank if stored is None else stored
    names = (layer.name, f"{layer.component}.{layer.name}", layer.key.removeprefix(PEFT_PREFIX))
    _check_settings(settings, file)
    said = _of_layer(settings, "rank_pattern", "r", names, file)
    if said != rank:
        raise ValueError(
            f"{file.source}: the file's settings give {layer.key} the rank {said:g}, but its matrices have {rank}."
        )
    alpha = _of_layer(settings, "alpha_pattern", "lora_alpha", names, file)
    if settings.get("use_rslora"):
        alpha *= math.sqrt(rank)
    if stored is not None and stored != alpha:
        raise ValueError(
            f"{file.source}: {layer.key} has the alpha {stored:g}, but the settings of the file give it {alpha:g}."
        )
    return int(alpha) if alpha == int(alpha) else alpha


def _check_settings(settings: Mapping[str, Any], file: LoraFile) -> None:
    """Refuse settings of peft other than two matrices and their scale."""
    kind = settings.get("init_lora_weights", True)
    if isinstance(kind, str) and kind.lower().startswith(CHANGES_THE_MODEL):
        raise ValueError(
            f"{file.source}: `init_lora_weights` is {kind!r}, which also changed the model's weights: convert the "
            "LoRA with peft's `save_pretrained(path_initial_model_for_weight_conversion=...)`."
        )
    for name in ("use_dora", "modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices"):
        if settings.get(name):
            raise ValueError(f"{file.source}: the setting `{name}` is {settings[name]!r}, which is not supported.")


def _of_layer(
    settings: Mapping[str, Any],
    patterns: Literal["rank_pattern", "alpha_pattern"],
    default: str,
    names: tuple[str, ...],
    file: LoraFile,
) -> float:
    """Rank or alpha of one layer: that of the first pattern that matches the end of its name, else the default."""
    table = settings.get(patterns) or {}
    value = settings.get(default)
    if not isinstance(table, dict):
        raise ValueError(f"{file.source}: `{patterns}` must map names to numbers, got {table!r}.")
    complex_patterns = 0
    for pattern, number in table.items():
        plain = pattern.removeprefix("^").replace("\\.", ".").replace("\\_", "_").replace("\\-", "-")
        if re.fullmatch(r"[\w.\-]+", plain):
            matches = plain in _endings(names) if not pattern.startswith("^") else plain in names
        else:
            complex_patterns += 1
            matches = complex_patterns <= MAX_PATTERNS and _matches(pattern, names, patterns, file)
        if complex_patterns > MAX_PATTERNS:
            raise ValueError(
                f"{file.source}: `{patterns}` has more than {MAX_PATTERNS} patterns that are not plain layer names."
            )
        if matches:
            value = number
            break
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{file.source}: the setting `{default}` must be a number, got {value!r}.")
    return value


def _endings(names: tuple[str, ...]) -> Iterator[str]:
    """Yield every name, and its part after each dot."""
    for name in names:
        yield name
        for position, letter in enumerate(name):
            if letter == ".":
                yield name[position + 1 :]


def _matches(pattern: str, names: tuple[str, ...], table: str, file: LoraFile) -> bool:
    """Whether a regular expression matches the end of a name; one whose matching may be endless is refused."""
    quantifiers = len(re.findall(r"[*+?{]", re.sub(r"\\.", "", pattern)))
    if len(pattern) > MAX_PATTERN_LENGTH or quantifiers > 2 or re.search(r"\)[*+?{]", pattern):
        raise ValueError(
            f"{file.source}: the pattern {pattern[:MAX_PATTERN_LENGTH]!r} in `{table}` is too complex to be "
            "matched safely: write the names of the layers."
        )
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{file.source}: {pattern!r} in `{table}` is not a regular expression: {error}.") from error
    return any(expression.fullmatch(ending) for ending in _endings(names))
