"""Looking into a repository without loading it."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from rich.table import Table

from .repository_omni_video import read_header

DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "U8": "uint8"}


@dataclass
class RepositoryPart:
    """What one part of a repository holds, from the headers of its files."""

    name: str
    parameters: int
    dtypes: dict[str, int]  # name of the format -> number of values
    num_bytes: int
    num_files: int

    def to_dict(self) -> dict[str, Any]:
        """The part as plain values."""
        return asdict(self)


def repository_parts(
    repository: str | Path, revision: str | None = None, token: str | None = None
) -> list[RepositoryPart]:
    """
    The parts of a local folder or a Hub repository, read off the headers of its weights.

    Raises:
        ValueError: when there are no weights.
    """
    headers = _local_headers(Path(repository)) if Path(repository).is_dir() else None
    if headers is None:
        headers = _hub_headers(str(repository), revision, token)
    groups: dict[str, list[tuple[str, int, int]]] = {}
    files: dict[str, set[str]] = {}
    for file, header in headers.items():
        folder = file.rpartition("/")[0]
        for name, (dtype, shape, num_bytes) in header.items():
            part = name.split(".")[0] if folder == "mllm" else folder or name.split(".")[0]
            groups.setdefault(part, []).append((dtype, math.prod(shape), num_bytes))
            files.setdefault(part, set()).add(file)
    if not groups:
        raise ValueError(f"{repository}: holds no .safetensors files.")
    parts = []
    for name, tensors in groups.items():
        dtypes: Counter[str] = Counter()
        for dtype, values, _ in tensors:
            dtypes[DTYPE_NAMES.get(dtype, dtype)] += values
        parts.append(
            RepositoryPart(
                name=name,
                parameters=sum(values for _, values, _ in tensors),
                dtypes=dict(dtypes),
                num_bytes=sum(num_bytes for _, _, num_bytes in tensors),
                num_files=len(files[name]),
            )
        )
    return parts


def repository_table(parts: list[RepositoryPart], title: str) -> Table:
    """The parts as a table for the terminal, with their sum."""
    table = Table(title=title)
    table.add_column("part")
    for column in ("parameters", "dtype", "bytes", "files"):
        table.add_column(column, justify="right")
    for part in parts:
        dtypes = ", ".join(sorted(part.dtypes, key=part.dtypes.get, reverse=True))
        table.add_row(part.name, f"{part.parameters:,}", dtypes, f"{part.num_bytes:,}", str(part.num_files))
    table.add_section()
    total = sum(part.parameters for part in parts), sum(part.num_bytes for part in parts)
    table.add_row("total", f"{total[0]:,}", "", f"{total[1]:,}", "")
    return table


Header = Mapping[str, tuple[str, tuple[int, ...], int]]


def _local_headers(folder: Path) -> dict[str, Header]:
    files = sorted(folder.rglob("*.safetensors"))
    return {file.relative_to(folder).as_posix(): read_header(file) for file in files}


def _hub_headers(repository: str, revision: str | None, token: str | None) -> dict[str, Header]:
    api = HfApi(token=token)
    files = [file for file in api.list_repo_files(repository, revision=revision) if file.endswith(".safetensors")]
    headers = {}
    for file in files:
        metadata = api.parse_safetensors_file_metadata(repository, file, revision=revision)
        headers[file] = {
            name: (info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0])
            for name, info in metadata.tensors.items()
        }
    return headers


__all__ = ["RepositoryPart", "repository_parts", "repository_table"]
