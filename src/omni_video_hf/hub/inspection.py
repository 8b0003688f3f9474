"""Looking into a repository without loading it; torch is imported for the memory it needs alone."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..utils.files import visible_files
from .staging import check_finished

Header = Mapping[str, tuple[str, tuple[int, ...], int]]  # weight -> format, shape, bytes
MAX_HEADER_BYTES = 10**8  # as in safetensors
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
    groups: dict[str, list[tuple[str, int, int]]] = {}
    files: dict[str, set[str]] = {}
    for file, header in repository_headers(repository, revision, token).items():
        folder = file.rpartition("/")[0]
        for name, (dtype, shape, num_bytes) in header.items():
            part = name.split(".")[0] if folder == "mllm" else folder or name.split(".")[0]
            groups.setdefault(part, []).append((dtype, math.prod(shape), num_bytes))
            files.setdefault(part, set()).add(file)
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
    table = Table(title=escape(title))
    table.add_column("part")
    for column in ("parameters", "dtype", "bytes", "files"):
        table.add_column(column, justify="right")
    for part in parts:
        dtypes = ", ".join(sorted(part.dtypes, key=lambda name: part.dtypes[name], reverse=True))
        table.add_row(escape(part.name), f"{part.parameters:,}", dtypes, f"{part.num_bytes:,}", str(part.num_files))
    table.add_section()
    total = sum(part.parameters for part in parts), sum(part.num_bytes for part in parts)
    table.add_row("total", f"{total[0]:,}", "", f"{total[1]:,}", "")
    return table


def record_table(record: Mapping[str, Any], title: str) -> Table:
    """How a file was made, as [`read_media_record`] gives it, as a table for the terminal."""
    table = Table(title=escape(title), show_header=False)
    settings = record.get("settings")
    rows = [(name, value) for name, value in record.items() if name != "settings"]
    rows += [(name, value) for name, value in dict(settings or {}).items() if name not in record]
    for name, value in rows:
        table.add_row(escape(name), escape(str(value)))
    return table


def repository_headers(
    repository: str | Path, revision: str | None = None, token: str | None = None
) -> dict[str, Header]:
    """
    Headers of all weights of a local folder or a Hub repository, by file. No weight is read.

    Raises:
        ValueError: when there are no weights.
    """
    if Path(repository).is_dir():
        headers = _local_headers(Path(repository))
    else:
        headers = _hub_headers(str(repository), revision, token)
    if not any(headers.values()):
        raise ValueError(f"{repository}: holds no .safetensors files.")
    return headers


def _local_headers(folder: Path) -> dict[str, Header]:
    check_finished(folder)
    files = visible_files(folder, "*.safetensors")
    return {file.relative_to(folder).as_posix(): _read_header(file) for file in files}


def _read_header(file: Path) -> Header:
    """As `read_header` in `hub.repository`, by the format's own description: reading it needs no torch."""
    try:
        with file.open("rb") as handle:
            size = file.stat().st_size
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise ValueError("incomplete header")
            entries = json.loads(handle.read(length))
        entries.pop("__metadata__", None)
        header = {
            name: (entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in entries.items()
        }
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if end != size - 8 - length:
            raise ValueError(f"{size} bytes instead of {8 + length + end}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"{file}: not a complete safetensors file ({error}). Download it again.") from error
    return header


def _hub_headers(repository: str, revision: str | None, token: str | None) -> dict[str, Header]:
    api = import_module("huggingface_hub").HfApi(token=token)
    files = [file for file in api.list_repo_files(repository, revision=revision) if file.endswith(".safetensors")]
    headers: dict[str, Header] = {}
    for file in files:
        metadata = api.parse_safetensors_file_metadata(repository, file, revision=revision)
        headers[file] = {
            name: (info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0])
            for name, info in metadata.tensors.items()
        }
    return headers


__all__ = [
    "RepositoryPart",
    "record_table",
    "repository_headers",
    "repository_parts",
    "repository_table",
]
