"""
What a run leaves: the repository it began with, and in it the weights that were trained.

Files are read and written tensor by tensor, and no model is made. So what was not trained stays as it is stored, bit
for bit, and what was trained keeps the precision it was trained in, whatever format its neighbours have.
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

# Component folder -> what its weights are called in the whole model.
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
    Write the repository `base` with trained weights in place of its own.

    Args:
        base: folder of a pipeline's repository.
        folder: gets the new one; made if need be.
        weights: by the whole model's names.
        dtype: in which they are stored.
        deltas: what is added to weights of the repository, in float32, such as merged low-rank matrices. The sums are
            stored in `dtype` as well.
        aliases: other names of tied weights, see [`tied_names`].

    Raises:
        ValueError: for a weight that the repository does not have in this shape.
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
    """What an adapter adds to the weights of a model, in float32 and by their names."""
    deltas = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and adapter_name in getattr(module, "lora_A", {}):
            deltas[f"{name}.weight"] = module.get_delta_weight(adapter_name).detach().float()
    return deltas


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """All names of every parameter that has more than one, by its first; a file stores it under any of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {group[0]: group for group in names.values() if len(group) > 1}


# Name in the files -> (name in the model, value, whether it is added to what is stored).
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
    """A component's folder with some weights changed; its code is written anew when the repository is completed."""
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
                tensors[name] = value.to("cpu", dtype, copy=True).contiguous()  # tied weights are stored apart
        save_file(tensors, target / file.name, metadata)
    for index in source.glob("*.safetensors.index.json"):
        content = json.loads(index.read_text(encoding="utf-8"))
        if set(content["weight_map"].values()) <= {file.name for file in files}:
            size = sum(entry[2] for file in files for entry in read_header(target / file.name).values())
            content["metadata"] = content.get("metadata", {}) | {"total_size": size}
            (target / index.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _no_such_weight(base: Path, name: str, value: torch.Tensor) -> ValueError:
    return ValueError(f"{base}: no weight {name!r} of {tuple(value.shape)}: not the model the run began with.")


__all__ = ["lora_deltas", "tied_names", "write_pipeline"]
