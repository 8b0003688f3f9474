"""
`FeatureCache`: a dataset of latents, embeddings and MLLM states that are computed once; and the writing of its shards.

    cache/
      manifest.json                 what the cache is, and which index counts: its rename is the commit
      index-<hash>.parquet          one row an entry: task, prompt, shapes, and everything its features depend on
      shards/00000-00.safetensors   tensors `<number>.<name>`; the names are arguments of the model's `forward`
      parts/00000-00.parquet        rows of a shard that no index has yet; only while features are being computed

A shard is written before its part, both under another name first, so a part vouches for a complete shard. A run that
is killed leaves shards and parts from which the next one goes on; a reader sees the old index, or refuses.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, tqdm
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset

from ...tasks import TASKS, get_task
from ...utils.files import complete_or_absent, remove_abandoned
from ..data.bad_data import BadDataError, Offender, stop_or_count
from ..data.collator import PADDED, STACKED, TENSORS
from .cache_files import (
    FORMAT_VERSION,
    MANIFEST,
    PROVENANCE,
    SCHEMA,
    SHARD_NAME,
    WRITTEN_BY,
    check_inside,
    index_path,
    one_error,
    read_index,
    read_manifest,
    read_table,
    remove_unused,
)
from .checked_shards import is_checked, missing_shards, remember_check, shards_stamp
from .index_columns import IndexColumns

OPEN_SHARDS = 64  # memory-mapped at a time by one process
Record = dict[str, Any]  # a row of SCHEMA


# --- reading --------------------------------------------------------------------------------------------------------


class FeatureCache(Dataset):
    """
    Samples out of a cache, memory-mapped; a dataset for the Trainer.

    Args:
        folder: the cache.
        tasks: only these; all by default.

    `buckets` has the bucket of every sample, for [`OmniVideoBatchSampler`]; `records` everything the index says.

    Raises:
        ValueError: for a folder that is not a cache, or a cache that is unfinished, damaged or incomplete, or that
            names files outside its folder.
    """

    def __init__(self, folder: str | Path, tasks: Sequence[str] | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        left = sorted((self.folder / "parts").glob("*.parquet"))
        if left:
            raise ValueError(
                f"{self.folder}: the run that computes these features did not finish ({len(left)} shards are not in "
                "the index): run the same command again to resume it."
            )
        everything = IndexColumns.read(index_path(self.folder, self.manifest))
        self._columns = everything if tasks is None else everything.with_tasks(tasks)
        if not len(self._columns):
            raise ValueError(f"{self.folder}: has no entry" + (f" of the tasks {', '.join(tasks)}." if tasks else "."))
        missing = missing_shards(self.folder, self._columns.values("shard"))
        if missing:
            raise ValueError(
                f"{self.folder}: {len(missing)} shards are missing ({', '.join(missing[:8])}): copy the cache again, "
                "or compute the features again."
            )
        self.buckets = self._columns.buckets()
        self._open_handles()

    def __len__(self) -> int:
        return len(self._columns)

    def __getitem__(self, index: int) -> dict[str, Any]:
        columns = self._columns
        name, number = columns.word("shard", index), columns.numbers[index]
        with one_error(self._shard_path(name)):
            shard = self._open(name)
            tensors = {name: shard.get_tensor(f"{number}.{name}") for name in columns.shapes_of(index)}
        return {"task": columns.word("task", index)} | tensors

    @property
    def records(self) -> list[Record]:
        """Everything the index says of the samples, read from the disk: a million take minutes and gigabytes."""
        wanted = dict.fromkeys(self._columns.keys.to_pylist())
        return [record for record in read_index(self.folder, self.manifest) if record["key"] in wanted]

    @property
    def is_precomputed(self) -> bool:
        """Whether all samples of generation tasks have MLLM states, so that only text answers need the MLLM."""
        asking = [task for task in self._columns.values("task") if get_task(task).answers_in_text]
        tasks, numbers = self._columns.words["task"]
        answers = np.isin(numbers, [number for number, task in enumerate(tasks) if task in asking])
        values, codes = self._columns.words["instruction"]
        return bool((answers | np.isin(codes, [code for code, value in enumerate(values) if value == "states"])).all())

    def check(self, on_bad_data: str = "stop", progress: bool = True) -> "FeatureCache":
        """
        Read every tensor once: shapes as promised, one number of channels and one width throughout, no NaN.

        The processes of a run share the reading. The manifest records which entries of which shards were found good,
        by size and time of the files; what it vouches for is not read again.

        Args:
            on_bad_data: `"stop"` or `"skip"`, see [`stop_or_count`].
            progress: whether to show a bar.

        Returns:
            The cache; with `"skip"`, without the bad entries.

        Raises:
            BadDataError: with all bad entries.
        """
        state, columns = PartialState(), self._columns
        offenders = list(_unequal_widths(columns))
        stamp = shards_stamp(self.folder, columns.values("shard"))
        if not is_checked(self.manifest, stamp):
            shards = columns.words["shard"][1]
            mine = np.flatnonzero(shards % state.num_processes == state.process_index)
            mine = mine[np.argsort(shards[mine], kind="stable")]  # one shard after the other
            found = [
                (int(row), problem)
                for row in tqdm(mine, desc="Checking features", disable=not progress)
                for problem in self._problems(int(row))
            ]
            found = sorted(gather_object(found))
            offenders += [Offender(columns.key(row), problem) for row, problem in found]
            if not found and state.is_main_process:
                remember_check(self.folder, self.manifest, stamp)
        left_out = stop_or_count(offenders, len(self), on_bad_data)
        if left_out:
            rows = [row for row, key in enumerate(columns.keys.to_pylist()) if key not in left_out]
            self._columns = columns.take(np.asarray(rows))
            self.buckets = [self.buckets[row] for row in rows]
        return self

    def _problems(self, index: int) -> list[str]:
        try:
            sample = self[index]
        except ValueError as error:
            return [str(error)]
        found = [
            f"`{name}` is {list(sample[name].shape)}, the index says {shape}"
            for name, shape in self._columns.shapes_of(index).items()
            if list(sample[name].shape) != shape
        ]
        return [*found, *tensor_problems(sample.pop("task"), sample)]

    def _shard_path(self, name: str) -> Path:
        return self.folder / "shards" / f"{name}.safetensors"

    def _open_handles(self) -> None:
        def open_shard(name: str) -> Any:
            return safe_open(self._shard_path(name), framework="pt")

        self._open = functools.lru_cache(OPEN_SHARDS)(open_shard)

    def __getstate__(self) -> dict[str, Any]:  # for the workers of a DataLoader
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_handles()


def stored_shapes(record: Record) -> dict[str, list[int]]:
    """Name and shape of every tensor of an entry."""
    return {name: record[f"{name}_shape"] for name in TENSORS if record[f"{name}_shape"] is not None}


# --- checking -------------------------------------------------------------------------------------------------------


def tensor_problems(task: str, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """
    What is wrong with the tensors of one entry: dimensions, emptiness, NaN, source and target of unequal shape.

    Args:
        task: its task.
        tensors: tensors of the entry, by names of `TENSORS`.
    """
    dimensions = {"target_features": 1, "pixel_values": 4} | dict.fromkeys(PADDED, 2)
    for name, tensor in tensors.items():
        wanted = dimensions.get(name, 4 if name in STACKED else 1)
        if tensor.ndim != wanted or 0 in tensor.shape:
            yield f"`{name}` must have {wanted} dimensions, none of them 0, got {list(tensor.shape)}"
        if tensor.is_floating_point() and not _is_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            yield f"`{name}` contains {bad} values that are NaN or infinite, of {tensor.numel()}"
        if tensor.is_floating_point() == (name in ("input_ids", "attention_mask", "labels")):
            yield f"`{name}` has the type {tensor.dtype}"
    latents, source = tensors.get("latents"), tensors.get("source_latents")
    if latents is not None and source is not None and latents.shape != source.shape:
        yield f"`source_latents` {list(source.shape)} and `latents` {list(latents.shape)} differ"
    output = TASKS[task].output
    if latents is not None and latents.ndim == 4 and output == "image" and latents.shape[1] != 1:
        yield f"`latents` have {latents.shape[1]} frames; the task {task!r} generates one image"


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; without a tensor of the answers, at the speed of the memory."""
    if not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())  # NaN comes through


def _unequal_widths(columns: IndexColumns) -> Iterator[Offender]:
    """[`unequal_widths`] of columns."""
    for name in (*STACKED, *PADDED):
        axis = -1 if name in (*PADDED, "target_features") else 0
        widths = columns.widths(name, axis)
        values, counts = np.unique(widths[widths > 0], return_counts=True)
        if len(values) > 1:
            usual, most = values[counts.argmax()], counts.max()
            what = "channels" if axis == 0 else "width"
            for row in np.flatnonzero((widths > 0) & (widths != usual)).tolist():
                problem = f"`{name}` has {what} {widths[row]}, {most} other entries have {usual}"
                yield Offender(columns.key(row), problem)


def unequal_widths(records: Sequence[Record]) -> Iterator[Offender]:
    """Entries whose channels or widths differ from what most entries have: one model cannot train on both."""
    for name in (*STACKED, *PADDED):
        axis = -1 if name in (*PADDED, "target_features") else 0
        widths = [(record, shape[axis]) for record in records if (shape := record[f"{name}_shape"])]
        counts: dict[int, int] = {}
        for _, width in widths:
            counts[width] = counts.get(width, 0) + 1
        if len(counts) > 1:
            usual = max(counts, key=lambda width: counts[width])
            what = "channels" if axis == 0 else "width"
            for record, width in widths:
                if width != usual:
                    problem = f"`{name}` has {what} {width}, {counts[usual]} other entries have {usual}"
                    yield Offender(record["key"], problem)


# --- writing --------------------------------------------------------------------------------------------------------


class ShardWriter:
    """
    Writes entries of one process into shards, each complete or absent.

    Args:
        folder: the cache.
        rank: number of the process; no two write under one name.
        first: number of the first shard; larger than any that is there.
        shard_bytes: a shard is closed when it is larger.
        shard_entries: or has so many entries: what a kill costs at most.
    """

    def __init__(
        self, folder: Path, rank: int, first: int, shard_bytes: int = 512 * 2**20, shard_entries: int = 64
    ) -> None:
        self.folder, self.rank, self.next = folder, rank, first
        self.shard_bytes, self.shard_entries = shard_bytes, shard_entries
        self._records: list[Record] = []
        self._tensors: dict[str, torch.Tensor] = {}

    def add(self, key: str, provenance: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Take one entry; it is on the disk after [`flush`], or when the shard is full."""
        number = len(self._records)
        shapes = {f"{name}_shape": list(tensor.shape) for name, tensor in tensors.items()}
        self._records.append({"key": key, "shard": self._name, "number": number, **provenance, **shapes})
        self._tensors |= {
            f"{number}.{name}": tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()
        }
        size = sum(tensor.nbytes for tensor in self._tensors.values())
        if size >= self.shard_bytes or len(self._records) >= self.shard_entries:
            self.flush()

    def flush(self) -> None:
        """Write what was taken: the shard, then the part that vouches for it."""
        if not self._records:
            return
        with complete_or_absent(self.folder / "shards" / f"{self._name}.safetensors") as partial:
            save_file(self._tensors, partial, WRITTEN_BY)
        with complete_or_absent(self.folder / "parts" / f"{self._name}.parquet") as partial:
            pq.write_table(pa.Table.from_pylist(self._records, SCHEMA), partial)
        self._records, self._tensors, self.next = [], {}, self.next + 1

    @property
    def _name(self) -> str:
        return f"{self.next:05d}-{self.rank:02d}"


def read_records(folder: Path) -> dict[str, Record]:
    """Entries of a cache by key, finished or not; of two with one key, the one computed last."""
    records: list[Record] = []
    if (folder / MANIFEST).is_file():
        records += read_index(folder, read_manifest(folder))
    for part in sorted((folder / "parts").glob("*.parquet")):
        check_inside(folder, part)
        records += read_table(part)
    there = {path.stem for path in (folder / "shards").glob("*.safetensors")}
    return {record["key"]: record for record in records if record["shard"] in there}


def next_shard(folder: Path) -> int:
    """The smallest number larger than that of every shard."""
    names = [path.stem for path in (folder / "shards").glob("*.safetensors")]
    return 1 + max((int(name.split("-")[0]) for name in names if SHARD_NAME.fullmatch(name)), default=-1)


def commit(folder: Path, records: Sequence[Record], about: Mapping[str, Any]) -> None:
    """
    Make `records` what the cache holds, and remove what runs wrote and they do not use; other files stay.

    Args:
        folder: the cache.
        records: in the order in which readers number them.
        about: further entries of the manifest.
    """
    offenders = list(unequal_widths(records))
    if offenders:
        raise BadDataError(offenders, len(records))
    listed: list[str] = []  # what is there by the word of the cache itself
    if (folder / MANIFEST).is_file():
        earlier = read_manifest(folder)
        listed = [earlier["index"], *(record["shard"] for record in read_index(folder, earlier))]
    listed += [record["shard"] for part in (folder / "parts").glob("*.parquet") for record in read_table(part)]
    table = pa.Table.from_pylist(list(records), SCHEMA)
    digest = hashlib.sha256(json.dumps(table.to_pylist()).encode()).hexdigest()[:16]
    name = f"index-{digest}.parquet"
    with complete_or_absent(folder / name) as partial:
        pq.write_table(table, partial)
    tasks = [record["task"] for record in records]
    manifest = {
        "format_version": FORMAT_VERSION,
        "index": name,
        "entries": len(records),
        "tasks": {task: tasks.count(task) for task in TASKS if task in tasks},
        **about,
    }
    with complete_or_absent(folder / MANIFEST) as partial:
        partial.write_text(json.dumps(manifest, indent=2) + "\n")
    # Committed: the rest is tidying up, and does no harm if it is cut short.
    remove_unused(folder, name, used=sorted({record["shard"] for record in records}), listed=listed)
    for place in (folder, folder / "shards", folder / "parts"):
        remove_abandoned(None, place)


__all__ = [
    "FORMAT_VERSION",
    "PROVENANCE",
    "SCHEMA",
    "FeatureCache",
    "Record",
    "ShardWriter",
    "commit",
    "complete_or_absent",
    "next_shard",
    "read_manifest",
    "read_records",
    "stored_shapes",
    "tensor_problems",
    "unequal_widths",
]
