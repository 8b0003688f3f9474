"""Gives a repository source channels, file by file: its decoder then takes the source beside the noisy latents."""

import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file

from ..utils.files import read_json, write_json
from ..utils.tokens import hub_call
from .push import repository_files
from .remote_code import is_written_code
from .repository import check_indices, finalize_repository, read_header
from .staging import check_finished, commit, is_weight_file, staging

PATCH_EMBEDDING = "patch_embedding.weight"
CONDITIONINGS = ("channels", "both")  # what a repository can be given


@hub_call
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
        revision: branch, tag or commit of a Hub repository.
        token: token for the Hub.

    Returns:
        `output`

    Raises:
        ValueError: before anything is written, for an unknown `source_conditioning`, an `output` that is not empty,
            and a repository without these parts, with source channels already, or with links or weight indices that
            lead out of it.
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
    check_indices(folder)
    files, _ = repository_files(folder)
    files = {name: file for name, file in files.items() if not is_written_code(file)}  # it is written anew
    configs = _configs(folder, repository)
    configs["adapter"]["source_conditioning"] = source_conditioning
    configs["transformer"]["in_channels"] *= 2
    with staging(output) as work:
        new = work / "new"
        for name, file in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, new / name)
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
    configs = {name: read_json(file) for name, file in files.items()}
    channels = configs["transformer"].get("in_channels")
    if not isinstance(channels, int):
        raise ValueError(f"{repository}: transformer/config.json must have whole `in_channels`, got {channels!r}.")
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


def _widen(file: Path) -> None:
    """Give the patch embedding in a weight file twice the input channels, those of the source zero."""
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata() or {"format": "pt"}
        state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - the handle is no dict
    weight = state[PATCH_EMBEDDING]
    state[PATCH_EMBEDDING] = torch.cat([weight, torch.zeros_like(weight)], dim=1)
    wide = file.with_suffix(".wide")  # the tensors above are views of `file`
    save_file(state, wide, metadata)
    shutil.copymode(file, wide)  # safetensors lets only its owner read
    wide.replace(file)


def _update_size(index: Path) -> None:
    """Write the bytes of all weights into an index of them."""
    content = read_json(index)
    files = {index.parent / name for name in content["weight_map"].values() if is_weight_file(name)}
    size = sum(num_bytes for file in files for _, _, num_bytes in read_header(file).values())
    write_json(index, content | {"metadata": content.get("metadata", {}) | {"total_size": size}})


__all__ = ["CONDITIONINGS", "add_source_channels_to"]
