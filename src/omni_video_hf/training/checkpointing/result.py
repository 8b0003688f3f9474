"""
The result of a training run: a copy of the base model's repository with the trained weights.

Files are copied tensor by tensor, without creating a model. Weights that were not trained are stored bit for bit as
before, and trained weights keep their own dtype, which may differ from that of the others.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ...hub.repository import (
    MODEL_FOLDERS,
    complete_repository,
    is_weight_file,
    read_header,
    staged,
    weight_files,
)

# Component folder -> prefix of its weights in the whole model.
PREFIXES = dict(zip(MODEL_FOLDERS, ("", "adapter.", "decoder."), strict=True))


def write_pipeline(
    base: str | Path,
    folder: str | Path,
    weights: Mapping[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
    deltas: Mapping[str, torch.Tensor] | None = None,
    aliases: Mapping[str, list[str]] | None = None,
) -> None:
    """
    Write a copy of the repository `base` with trained weights.

    Args:
        base: folder of a pipeline's repository.
        folder: target folder; created if it does not exist.
        weights: trained weights by their names in the whole model.
        dtype: dtype in which trained weights are stored.
        deltas: float32 tensors that are added to weights of the repository, such as merged LoRA layers. The sums are
            stored in `dtype` too.
        aliases: other names of tied weights, see [`tied_names`].

    Raises:
        ValueError: for a weight whose name and shape the repository does not have.
    """
    base, changes = Path(base), _by_stored_name(weights, deltas or {}, aliases or {})
    unknown = set(weights) | set(deltas or {})
    with staged(folder, folders=["", *MODEL_FOLDERS]) as staging:
        for component, prefix in PREFIXES.items():
            files = weight_files(base / component)
            stored = {prefix + name: shape for file in files for name, (_, shape, _) in read_header(file).items()}
            found = {name: change for name, change in changes.items() if name in stored}
            for name, (source, value, _) in found.items():
                if tuple(value.shape) != stored[name]:
                    raise _no_such_weight(base, source, value)
                unknown.discard(source)
            if found:
                _write_component(base / component, staging / component, prefix, found, dtype)
        if unknown:
            name = min(unknown)
            raise _no_such_weight(base, name, (weights if name in weights else deltas or {})[name])
        complete_repository(staging, base)


def lora_deltas(model: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """The differences that a LoRA adapter adds to the weights of a model, in float32, by the names of the weights."""
    deltas = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and adapter_name in getattr(module, "lora_A", {}):
            deltas[f"{name}.weight"] = module.get_delta_weight(adapter_name).detach().float()
    return deltas


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """All names of every tied parameter, by its first name; a file may use any of these names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {group[0]: group for group in names.values() if len(group) > 1}


# Name in the files -> (name in the model, value, whether the value is added to the stored one).
_Changes = dict[str, tuple[str, torch.Tensor, bool]]


def _by_stored_name(
    weights: Mapping[str, torch.Tensor], deltas: Mapping[str, torch.Tensor], aliases: Mapping[str, list[str]]
) -> _Changes:
    changes: _Changes = {}
    for values, is_added in ((weights, False), (deltas, True)):
        for name, value in values.items():
            changes |= dict.fromkeys(aliases.get(name, [name]), (name, value, is_added))
    return changes


def _write_component(source: Path, target: Path, prefix: str, changes: _Changes, dtype: torch.dtype) -> None:
    """Copy the folder of a component with changed weights; completing the repository writes its code again."""
    target.mkdir()
    files = weight_files(source)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix != ".py" and not is_weight_file(path.name):
            shutil.copyfile(path, target / path.name)
    for file in files:
        kept = {name: prefix + name for name in read_header(file)}
        if not any(name in changes for name in kept.values()):
            shutil.copyfile(file, target / file.name)
            continue
        with safe_open(file, "pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in kept}
            metadata = handle.metadata()
        for name, full in kept.items():
            if full in changes:
                _, value, is_added = changes[full]
                value = tensors[name].float() + value.cpu() if is_added else value.detach()
                tensors[name] = value.to("cpu", dtype, copy=True).contiguous()  # tied weights are stored separately
        save_file(tensors, target / file.name, metadata)
    for index in source.glob("*.safetensors.index.json"):
        content = json.loads(index.read_text(encoding="utf-8"))
        if set(content["weight_map"].values()) <= {file.name for file in files}:
            size = sum(entry[2] for file in files for entry in read_header(target / file.name).values())
            content["metadata"] = content.get("metadata", {}) | {"total_size": size}
            (target / index.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _no_such_weight(base: Path, name: str, value: torch.Tensor) -> ValueError:
    return ValueError(
        f"{base}: has no weight {name!r} of shape {tuple(value.shape)}, so it is not the base model of the run."
    )


__all__ = ["lora_deltas", "tied_names", "write_pipeline"]
