"""Text encoder, tokenizer and VAE from a repository of Wan in diffusers' format."""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from .components import check_files, load_component
from .original_checkpoint import read_json

PATTERNS = ("*.json", "*.safetensors", "*.model")  # of each folder; no pickles


def find_wan(wan_repo: str, folders: list[str]) -> Path:
    """The wanted folders of a Wan repository in diffusers' format, on this machine."""
    source = Path(wan_repo)
    if not source.is_dir():
        patterns = [f"{folder}/{pattern}" for folder in folders for pattern in PATTERNS]
        source = Path(snapshot_download(wan_repo, allow_patterns=patterns))
    for folder in folders:
        if not (source / folder).is_dir():
            raise ValueError(f"`--wan-repo {wan_repo}` has no folder {folder!r}; give one in diffusers' format.")
    return source


def wan_files(source: Path, name: str) -> list[Path]:
    """The files of one component of a Wan repository."""
    return sorted(file for pattern in PATTERNS for file in (source / name).glob(pattern))


def load_wan_component(name: str, source: Path) -> torch.nn.Module:
    """A component of a Wan repository on the meta device; its files must fit it."""
    read_json(source / name / "config.json")
    try:
        model = load_component(name, source / name)
    except Exception as error:  # values of any kind, checked by the libraries
        raise ValueError(f"{source / name / 'config.json'}: makes no {name} ({error}).") from error
    check_files(model, source / name)
    return model
