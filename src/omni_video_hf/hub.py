"""
The layout of a repository (one copy of the weights, two front doors), and looking into one without loading it.

    model_index.json                  for diffusers: the pipeline and its components
    config.json, *.index.json         for transformers: the whole model, over the weights of the component folders
    mllm/ adapter/ transformer/ ...   the components
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from rich.table import Table
from safetensors import SafetensorError, safe_open

from .configuration_omni_video import OmniVideoAdapterConfig, OmniVideoConfig

INDEX_NAME = "model.safetensors.index.json"
# Folders whose weights make up the whole model, in the order of the figure.
MODEL_FOLDERS = ("mllm", "adapter", "transformer")
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


def write_root_index(directory: str | Path) -> None:
    """
    Write the root `config.json`, `generation_config.json` and weight index over the component folders.

    The index names weights as the components store them; loading gives them their prefix
    (see `modeling_omni_video`). Nothing is copied.

    Args:
        directory: with the folders `mllm`, `adapter` and `transformer`.

    Raises:
        ValueError: when two folders hold a weight of the same name.
    """
    directory = Path(directory)
    weight_map: dict[str, str] = {}
    total_size = 0
    for folder in MODEL_FOLDERS:
        for file in sorted((directory / folder).glob("*.safetensors")):
            for name, (_, shape, num_bytes) in read_header(file).items():
                if name in weight_map:
                    raise ValueError(f"{file}: the weight {name!r} {shape} is also in {weight_map[name]}.")
                weight_map[name] = f"{folder}/{file.name}"
                total_size += num_bytes
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")

    config = OmniVideoConfig.from_pretrained(directory / "mllm")
    adapter = json.loads((directory / "adapter" / "config.json").read_text())
    decoder = json.loads((directory / "transformer" / "config.json").read_text())
    fields = OmniVideoAdapterConfig.__annotations__
    whole = OmniVideoConfig(
        mllm_config=config.mllm_config,
        vision_head_config=config.vision_head_config,
        adapter_config={key: value for key, value in adapter.items() if key in fields},
        decoder_config={key: value for key, value in decoder.items() if not key.startswith("_")},
        image_generation_token_id=config.image_generation_token_id,
        video_generation_token_id=config.video_generation_token_id,
        architectures=["OmniVideoForConditionalGeneration"],
        dtype=config.dtype,
    )
    whole.save_pretrained(directory)
    generation = directory / "mllm" / "generation_config.json"
    (directory / generation.name).write_text(generation.read_text())


def read_header(file: str | Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """
    Names of the tensors in a safetensors file, with format, shape and size in bytes. No tensor is read.

    Raises:
        ValueError: when the file is not a complete safetensors file.
    """
    header = {}
    try:
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - the handle is no dict
                part = handle.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                header[name] = (dtype, shape, _num_values(shape) * _bits(dtype) // 8)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a complete safetensors file ({error}). Download it again.") from error
    return header


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
            groups.setdefault(part, []).append((dtype, _num_values(shape), num_bytes))
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


def _num_values(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def _bits(dtype: str) -> int:
    """Bits of one value: the digits at the end of its format's name, `BOOL` being a byte."""
    digits = "".join(character for character in dtype.split("_", maxsplit=1)[0] if character.isdigit())
    return int(digits) if digits else 8


__all__ = ["RepositoryPart", "read_header", "repository_parts", "repository_table", "write_root_index"]
