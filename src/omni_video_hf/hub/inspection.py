"""Components, dtypes and sizes of a repository from the headers of its weights, without loading them."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..utils.files import read_json, visible_files
from ..utils.tokens import hub_call
from .headers import Header, read_header
from .staging import check_finished

DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "U8": "uint8"}


@dataclass
class RepositoryPart:
    """One component of a repository: number of parameters, dtypes and sizes, from the headers of its files."""

    name: str
    parameters: int
    dtypes: dict[str, int]  # name of the dtype -> number of values
    num_bytes: int
    num_files: int
    source_conditioning: str | None = None  # of the adapter: how the decoder takes the source of an edit

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict of plain values; `source_conditioning` only of the adapter."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@hub_call
def repository_parts(
    repository: str | Path, revision: str | None = None, token: str | None = None
) -> list[RepositoryPart]:
    """
    List the components of a local folder or Hub repository, from the headers of its weights.

    Raises:
        ValueError: if there are no weights.
    """
    groups: dict[str, list[tuple[str, int, int]]] = {}
    files: dict[str, set[str]] = {}
    for file, header in repository_headers(repository, revision, token).items():
        folder = file.rpartition("/")[0]
        for name, (dtype, shape, num_bytes) in header.items():
            part = folder or name.split(".")[0]
            if folder == "mllm" and name.startswith(("mllm.", "vision_head.")):  # MLLM and vision head of version 1
                part = name.split(".")[0]
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
        if name == "adapter":
            parts[-1].source_conditioning = _source_conditioning(repository, revision, token)
    return parts


def _source_conditioning(repository: str | Path, revision: str | None, token: str | None) -> str | None:
    """`source_conditioning` in the adapter's configuration; `None` for a repository without an adapter."""
    path = Path(repository) / "adapter" / "config.json"
    if not Path(repository).is_dir():
        hub = import_module("huggingface_hub")
        try:
            path = Path(
                hub.hf_hub_download(
                    str(repository), "config.json", subfolder="adapter", revision=revision, token=token
                )
            )
        except hub.errors.EntryNotFoundError:
            return None
    if not path.is_file():
        return None
    return read_json(path).get("source_conditioning", "context")


def repository_table(parts: list[RepositoryPart], title: str) -> Table:
    """The components as a table for the terminal, with a total."""
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
    table.caption = next(
        (f"source conditioning: {p.source_conditioning}" for p in parts if p.source_conditioning), None
    )
    return table


def record_table(record: Mapping[str, Any], title: str) -> Table:
    """The record of how a file was generated, from [`read_media_record`], as a table for the terminal."""
    table = Table(title=escape(title), show_header=False)
    settings = record.get("settings")
    rows = [(name, value) for name, value in record.items() if name != "settings"]
    rows += [(name, value) for name, value in dict(settings or {}).items() if name not in record]
    for name, value in rows:
        table.add_row(escape(name), escape(str(value)))
    return table


@hub_call
def repository_headers(
    repository: str | Path, revision: str | None = None, token: str | None = None
) -> dict[str, Header]:
    """
    Read the headers of all weight files of a local folder or Hub repository, by file name. No weights are read.

    Raises:
        ValueError: if there are no weights.
    """
    if Path(repository).is_dir():
        headers = _local_headers(Path(repository))
    else:
        headers = _hub_headers(str(repository), revision, token)
    if not any(headers.values()):
        raise ValueError(f"{repository}: contains no .safetensors files, so it is not a model.")
    return headers


def _local_headers(folder: Path) -> dict[str, Header]:
    check_finished(folder)
    files = visible_files(folder, "*.safetensors")
    return {file.relative_to(folder).as_posix(): read_header(file) for file in files}


def _hub_headers(repository: str, revision: str | None, token: str | None) -> dict[str, Header]:
    api = import_module("huggingface_hub").HfApi(token=token)
    SafetensorsParsingError = import_module("huggingface_hub.errors").SafetensorsParsingError  # noqa: N806
    files = [file for file in api.list_repo_files(repository, revision=revision) if file.endswith(".safetensors")]
    headers: dict[str, Header] = {}
    for file in files:
        try:
            metadata = api.parse_safetensors_file_metadata(repository, file, revision=revision)
            headers[file] = {
                name: (info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0])
                for name, info in metadata.tensors.items()
            }
        except (SafetensorsParsingError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(f"{repository}, {file}: not a complete safetensors file ({error}).") from error
    return headers


__all__ = [
    "RepositoryPart",
    "record_table",
    "repository_headers",
    "repository_parts",
    "repository_table",
]
