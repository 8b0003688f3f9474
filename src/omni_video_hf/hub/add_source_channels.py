"""Gives a repository source channels, file by file: its decoder then takes the source beside the noisy latents."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file

from ..utils.files import write_json
from .remote_code import is_written_code
from .repository import finalize_repository, read_header
from .staging import check_finished, commit, is_weight_file, staging

PATCH_EMBEDDING = "patch_embedding.weight"
CONDITIONINGS = ("channels", "both")  # what a repository can be given


def add_source_channels_to(
    repository: str | Path,
    output: str | Path,
    source_conditioning: str = "both",
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """
    Write a copy of a repository whose decoder has source channels, with weights of zero.

    One weight file is in memory at a time, and only those that hold the decoder's patch embedding; all others are
    copied. With `"both"` the new repository generates bit for bit what the old one does, until it is trained.

    Args:
        repository: folder or Hub repository with `adapter` and `transformer`.
        output: folder to write; it must not exist, or be empty.
        source_conditioning: `"both"`, or `"channels"`, with which sources take no tokens of the context: then edits
            are wrong until the decoder is trained.
        revision: of a Hub repository.
        token: for the Hub.

    Returns:
        `output`

    Raises:
        ValueError: before anything is written, for an unknown `source_conditioning`, an `output` that is not empty,
            and a repository without these parts or with source channels already.
    """
    if source_conditioning not in CONDITIONINGS:
        raise ValueError(
            f"`source_conditioning` must be {' or '.join(map(repr, CONDITIONINGS))}, got {source_conditioning!r}."
        )
    output = Path(output)
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise ValueError(f"{output}: exists and is not an empty folder: choose another one.")
    folder = Path(repository)
    if not folder.is_dir():
        ignored = ["*.py", "README.md"]
        folder = Path(snapshot_download(str(repository), revision=revision, token=token, ignore_patterns=ignored))
    check_finished(folder)
    configs = _configs(folder, repository)
    configs["adapter"]["source_conditioning"] = source_conditioning
    configs["transformer"]["in_channels"] *= 2
    with staging(output) as work:
        new = work / "new"
        shutil.copytree(folder, new, ignore=_left_out, dirs_exist_ok=True)
        for file in sorted((new / "transformer").glob("*.safetensors")):
            if PATCH_EMBEDDING in read_header(file):
                _widen(file)
        for index in (new / "transformer").glob("*.index*.json"):
            _update_size(index)
        for name, config in configs.items():
            write_json(new / name / "config.json", config)
        finalize_repository(new)
        commit(work, output)
    return output


def _configs(folder: Path, repository: str | Path) -> dict[str, dict[str, Any]]:
    """Configurations of adapter and decoder, of a repository that can get source channels."""
    files = {name: folder / name / "config.json" for name in ("adapter", "transformer")}
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        raise ValueError(f"{repository}: lacks {', '.join(f'{name}/config.json' for name in missing)}.")
    configs = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()}
    channels = configs["transformer"].get("in_channels")
    wanted = configs["transformer"].get("out_channels") or channels
    conditioning = configs["adapter"].get("source_conditioning", "context")
    if conditioning != "context" or channels != wanted:
        raise ValueError(
            f"{repository}: has source channels already, or another decoder than Wan's for text "
            f"(`source_conditioning` is {conditioning!r}, the decoder takes {channels} channels and gives {wanted})."
        )
    if not any(
        PATCH_EMBEDDING in read_header(file) for file in sorted((folder / "transformer").glob("*.safetensors"))
    ):
        raise ValueError(f"{repository}: no file of transformer/ holds {PATCH_EMBEDDING}.")
    return configs


def _left_out(folder: str, names: list[str]) -> set[str]:
    """Code that this package wrote, which is written anew, and hidden folders of the Hub's cache and of git."""
    return {name for name in names if name.startswith(".") or is_written_code(Path(folder) / name)}


def _widen(file: Path) -> None:
    """Give the patch embedding in a weight file twice the input channels, those of the source zero."""
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata() or {"format": "pt"}
        state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - the handle is no dict
    weight = state[PATCH_EMBEDDING]
    state[PATCH_EMBEDDING] = torch.cat([weight, torch.zeros_like(weight)], dim=1)
    mode = file.stat().st_mode
    save_file(state, file, metadata)
    file.chmod(mode)  # safetensors lets only its owner read


def _update_size(index: Path) -> None:
    """Write the bytes of all weights into an index of them."""
    content = json.loads(index.read_text(encoding="utf-8"))
    files = {index.parent / name for name in content["weight_map"].values() if is_weight_file(name)}
    size = sum(num_bytes for file in files for _, _, num_bytes in read_header(file).values())
    write_json(index, content | {"metadata": content.get("metadata", {}) | {"total_size": size}})


__all__ = ["CONDITIONINGS", "add_source_channels_to"]
