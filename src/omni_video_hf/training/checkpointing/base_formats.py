"""The number formats of the repository that a run began with, for a model that is saved out of the memory."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from ...hub.repository import read_header, weight_files
from .result import PREFIXES

logger = logging.getLogger(__name__)

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def in_formats_of_base(
    weights: Mapping[str, torch.Tensor],
    base: str | Path | None,
    revision: str | None,
    trained: Collection[str],
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """
    Weights as they are to be stored: a training loads everything in float32, also what the base stores in half of it.

    A weight that was not trained gets the base's format where that loses nothing: the values of one that was changed
    by hand stay.

    Args:
        weights: of the whole model, by its names.
        base: folder or Hub repository that the model was loaded from. One that is not on this machine is not asked
            for: its formats are unknown then, which a warning says.
        revision: of a Hub repository.
        trained: names of the weights that were trained.
        dtype: in which those are stored.
    """
    formats = _stored_formats(base, revision)
    if not formats:
        logger.warning(
            "%s is not on this machine, so its number formats are unknown: what was not trained is stored as it is in "
            "memory.",
            base or "The repository that the model began with",
        )
    stored = {}
    for name, value in weights.items():
        wanted = dtype if name in trained else formats.get(name, value.dtype)
        if value.is_floating_point() and not value.is_meta and wanted != value.dtype:
            converted = value.to(wanted)
            if name in trained or torch.equal(converted.to(value.dtype), value):
                value = converted  # noqa: PLW2901
        stored[name] = value
    return stored


def _stored_formats(base: str | Path | None, revision: str | None) -> dict[str, torch.dtype]:
    """Format of every weight of a repository, by the whole model's names, from the headers of its files."""
    folder = _local_folder(base, revision)
    if folder is None:
        return {}
    places = [(folder / name, prefix) for name, prefix in PREFIXES.items()]
    if not any(weight_files(place) for place, _ in places):
        places = [(folder, "")]  # of a model without adapter and decoder, which has no folders
    return {
        prefix + name: _DTYPES[dtype]
        for place, prefix in places
        for file in weight_files(place)
        for name, (dtype, _, _) in read_header(file).items()
        if dtype in _DTYPES
    }


def _local_folder(base: str | Path | None, revision: str | None) -> Path | None:
    if not base or Path(base).is_dir():
        return Path(base) if base else None
    try:
        return Path(snapshot_download(str(base), revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


__all__ = ["in_formats_of_base"]
