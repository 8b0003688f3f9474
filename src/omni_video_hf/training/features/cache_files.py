"""
The files of a feature cache: their format, reading them with checks, and finding files that may be removed.

A cache may come from an unknown source. Names in it must refer to files of the cache, and an error names a damaged
file. A run removes a file of the output folder only if the file itself, or a list of the cache, says that a run wrote
it for a cache.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from ...hub.repository import link_root
from ...tasks import TASKS
from ...utils.files import only_writer, workspaces, write_text
from ..data.collator import PADDED, STACKED, TENSORS

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
BEGUN = "begun.json"  # in a folder that a run computes a new cache into, until its manifest is there
LOCK = ".lock"
WRITTEN_BY = {"written_by": "omni_video_hf feature cache"}  # metadata of every shard, part and index
SHARD_NAME = re.compile(r"\d{5,}-\d{2,}")
INDEX_NAME = re.compile(r"index-[0-9a-f]{16}\.parquet")

# Everything the features of an entry depend on; a field that does not apply is null.
PROVENANCE = {
    "task": pa.string(),
    "text": pa.string(),  # prompt or question
    "answer": pa.string(),
    "media_sha256": pa.string(),
    "source_sha256": pa.string(),
    "width": pa.int32(),  # pixels
    "height": pa.int32(),
    "num_frames": pa.int32(),
    "fps": pa.float64(),
    "crop": pa.list_(pa.int32()),  # left, top, right, bottom in the file's pixels
    "source_crop": pa.list_(pa.int32()),
    "vae": pa.string(),  # hash of weights and configuration, as for the components below
    "vae_dtype": pa.string(),
    "mllm": pa.string(),
    "mllm_dtype": pa.string(),
    "text_encoder": pa.string(),
    "text_encoder_dtype": pa.string(),
    "target_encoder": pa.string(),
    "target_encoder_dtype": pa.string(),
    "template": pa.string(),  # hash of chat template, the task's prompt, tokenizers and image processing
    "instruction": pa.string(),  # "states" or "tokens"
    "mllm_frames": pa.string(),
    "code_version": pa.int32(),
}
PLACE = {"key": pa.string(), "shard": pa.string(), "number": pa.int32()}
SCHEMA = pa.schema({**PLACE, **PROVENANCE, **{f"{name}_shape": pa.list_(pa.int32()) for name in TENSORS}})
SCHEMA = SCHEMA.with_metadata(WRITTEN_BY)
Record = dict[str, Any]  # a row of SCHEMA


# --- reading --------------------------------------------------------------------------------------------------------


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read the manifest of a cache; a `ValueError` says what is wrong with it."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder}: contains no {MANIFEST}, so it is not a feature cache, or an unfinished one: create it with "
            "`omni-video precompute` or `omni-video import-features`."
        )
    check_inside(folder, path)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({_line(error)}): copy the cache again.") from error
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        found = manifest.get("format_version") if isinstance(manifest, dict) else type(manifest).__name__
        raise ValueError(
            f"{path}: has the format {found!r}, this version reads {FORMAT_VERSION}: update the package, or compute "
            "the features again."
        )
    index = manifest.get("index")
    if not isinstance(index, str) or not INDEX_NAME.fullmatch(index):
        raise ValueError(
            f"{path}: its `index` {index!r} must be the name of a file beside it, index-<16 digits>.parquet: compute "
            "the features again."
        )
    return manifest


def read_index(folder: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries that a cache's index lists; a `ValueError` names the file and what is wrong with it."""
    return read_table(index_path(folder, manifest))


def read_table(path: Path) -> list[dict[str, Any]]:
    """The entries in an index or part; a `ValueError` names the file and what is wrong with it."""
    try:
        rows = pq.read_table(path, schema=SCHEMA, partitioning=None).to_pylist()
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is damaged or no table of a cache ({_line(error)}): copy it again.") from error
    seen: set[str] = set()
    for number, row in enumerate(rows):
        problem = _row_problem(row) or (f"the `key` {row['key']!r} comes twice" if row["key"] in seen else None)
        if problem:
            raise ValueError(f"{path}: row {number}: {problem}. Copy the cache again, or compute the features again.")
        seen.add(row["key"])
    return rows


def _row_problem(row: dict[str, Any]) -> str | None:
    """Describe what is wrong with an entry of an index; `None` for a valid one."""
    wrong = {
        f"`key` is {row['key']!r}": not row["key"],
        f"unknown task {row['task']!r}; known: {', '.join(TASKS)}": row["task"] not in TASKS,
        f"`shard` {row['shard']!r} must be the name of a file in `shards`, such as 00000-00": (
            not isinstance(row["shard"], str) or not SHARD_NAME.fullmatch(row["shard"])
        ),
        f"`number` is {row['number']!r}": row["number"] is None or row["number"] < 0,
    }
    shapes = {name: row[f"{name}_shape"] for name in TENSORS if row[f"{name}_shape"] is not None}
    wrong["no tensor has a shape"] = not shapes
    for name, shape in shapes.items():
        is_wrong = len(shape) != dimensions(name) or any(size is None or size < 1 for size in shape)
        wrong[f"`{name}_shape` is {shape}, which must be {dimensions(name)} numbers above 0"] = is_wrong
    return next((problem for problem, is_wrong in wrong.items() if is_wrong), None)


def dimensions(name: str) -> int:
    """Number of dimensions of a sample's tensor."""
    return {"target_features": 1, "pixel_values": 4}.get(name, 2 if name in PADDED else 4 if name in STACKED else 1)


def index_path(folder: Path, manifest: dict[str, Any]) -> Path:
    """The index that counts; a `ValueError` if it is missing or lies outside of the cache."""
    path = folder / manifest["index"]
    if not path.is_file():
        raise ValueError(f"{path}: is missing, but {MANIFEST} names it: copy the cache again.")
    check_inside(folder, path)
    return path


def check_inside(folder: Path, path: Path) -> None:
    """
    Refuse a file that a link puts outside its cache.

    Links into the Hub's own cache are what a download consists of, and stay allowed there.
    """
    root = link_root(folder).resolve()
    if not path.resolve().is_relative_to(root):
        raise ValueError(
            f"{path}: is a link to {path.resolve()}, outside of the cache {folder}: put the file in its place."
        )


@contextmanager
def one_error(path: Path) -> Iterator[None]:
    """Turn what damaged or foreign shards raise into one error with the file's name."""
    try:
        yield
    except (SafetensorError, OSError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged ({_line(error)}): copy the cache again.") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# --- what a run may write to and remove -----------------------------------------------------------------------------


def check_output(folder: str | Path) -> None:
    """
    Refuse a folder that holds anything but a feature cache.

    Raises:
        ValueError: when `folder` is a file, or neither absent, empty, nor a cache; when the folders in a cache are
            links.
    """
    folder = Path(folder)
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file; `--output` must be a folder.")
    is_ours = (folder / MANIFEST).is_file() or _has_begun(folder)
    if (folder / MANIFEST).is_file():
        try:
            read_manifest(folder)
        except ValueError as error:
            raise ValueError(f"{error} Or choose another `--output`.") from error
    own = {LOCK, *(path.name for path in workspaces(None, folder))}
    others = sorted(path.name for path in folder.iterdir() if path.name not in own)
    if others and not is_ours:
        raise ValueError(
            f"{folder}: is not empty ({', '.join(others[:3])}{' ...' if len(others) > 3 else ''}) and contains no "
            f"{MANIFEST} of a feature cache: choose an empty folder for `--output`. Nothing was changed."
        )
    for name in ("shards", "parts"):
        path = folder / name
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise ValueError(f"{path}: must be a folder, not a link or file: move the cache as a whole.")


def begin(folder: Path) -> None:
    """Mark an empty folder as a cache that is being computed; see [`check_output`]."""
    if not (folder / MANIFEST).is_file():
        write_text(folder / BEGUN, json.dumps({"format_version": FORMAT_VERSION} | WRITTEN_BY) + "\n")


def _has_begun(folder: Path) -> bool:
    path = folder / BEGUN
    if path.is_symlink() or not path.is_file():
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and WRITTEN_BY.items() <= content.items()


def only_run(folder: Path) -> Any:
    """Hold the lock of a cache, or refuse."""
    message = f"{folder}: another run computes features into this cache: wait until it ends, or stop it."
    return only_writer(folder / LOCK, message)


def is_written_here(path: Path) -> bool:
    """Whether a file says of itself that it is a shard, part or index of a feature cache."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        if path.suffix == ".parquet":
            metadata = pq.read_schema(path).metadata or {}
            return all(metadata.get(name.encode()) == value.encode() for name, value in WRITTEN_BY.items())
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return WRITTEN_BY.items() <= (file.metadata() or {}).items()
    except (pa.ArrowException, SafetensorError, OSError, ValueError):
        return False
    return path.name == BEGUN and _has_begun(path.parent)


def remove_unused(folder: Path, index: str, used: Sequence[str], listed: Sequence[str]) -> None:
    """
    Remove what runs wrote to a cache and what its index does not use; every other file stays.

    Args:
        folder: the cache.
        index: name of the index that counts.
        used: names of the shards in it.
        listed: names of shards and indices that the earlier index, manifest or parts list.
    """
    shards, parts = folder / "shards", folder / "parts"
    keep = {shards / f"{name}.safetensors" for name in used} | {folder / index}
    candidates = [*parts.glob("*.parquet"), *shards.glob("*.safetensors"), *folder.glob("index-*.parquet")]
    for path in [*candidates, folder / BEGUN]:
        is_listed = (path.stem in listed and path.parent == shards) or (path.name in listed and path.parent == folder)
        if path not in keep and (is_written_here(path) or (is_listed and not path.is_dir())):
            path.unlink(missing_ok=True)


__all__ = [
    "BEGUN",
    "FORMAT_VERSION",
    "MANIFEST",
    "PROVENANCE",
    "SCHEMA",
    "WRITTEN_BY",
    "begin",
    "check_inside",
    "check_output",
    "dimensions",
    "index_path",
    "is_written_here",
    "one_error",
    "only_run",
    "read_index",
    "read_manifest",
    "read_table",
    "remove_unused",
]
