"""
Data of a million samples: opening a feature cache, reading a table, checking values; against the plain way.

The plain way has a dictionary for every row, resolves the path of every file, and asks of every value whether it is
finite. It is measured with a tenth of the rows and multiplied by ten. Every measurement of memory has a process of its
own, and counts what the process takes beyond what it has after its imports.
"""

import csv
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.progress import Progress

from omni_video_hf.training.data.collator import bucket_of
from omni_video_hf.training.data.media_table import load_media_table
from omni_video_hf.training.data.table_files import read_csv
from omni_video_hf.training.features.cache import FeatureCache, _is_finite, stored_shapes
from omni_video_hf.training.features.cache_files import FORMAT_VERSION, MANIFEST, SCHEMA, read_table

from .measure import in_own_process, interleaved, peak_resident, resident

ROWS, PART = 1_000_000, 10  # the plain way has ROWS / PART
SHARD_ENTRIES = 64
INDEX = "index-0123456789abcdef.parquet"
CHECKED, REPETITIONS = 2**24, 5  # values of a tensor, of which every one is checked
TITLE = "Data of a million samples"
COLUMNS = {
    "what": lambda row: row["what"],
    "plain, s": lambda row: f"{row['plain_seconds']:.2f}",
    "ours, s": lambda row: f"{row['seconds']:.2f}",
    "ours / plain": lambda row: f"{row['seconds'] / row['plain_seconds']:.3f}",
    "plain, MB": lambda row: f"{row['plain_bytes'] / 1e6:.0f}" if row["plain_bytes"] else "-",
    "ours, MB": lambda row: f"{row['bytes'] / 1e6:.0f}" if row["bytes"] else "-",
}


def measure(progress: Progress) -> list[dict[str, Any]]:
    """One row per piece of work; seconds of processor time."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (write, ours, plain) in WORK.items():
            progress.console.print(f"data: {name} ...")
            whole, part = Path(folder) / f"{write.__name__}-whole", Path(folder) / f"{write.__name__}-part"
            for place, count in ((whole, ROWS), (part, ROWS // PART)):
                place.mkdir(exist_ok=True)
                write(place, count)
            row = in_own_process(spent, ours, whole)
            usual = in_own_process(spent, plain, part)
            row |= {"what": f"{name}, {ROWS:,} entries"}
            rows.append(row | {f"plain_{key}": PART * value for key, value in usual.items()})
    return [*rows, check_values()]


def spent(work: Any, place: Path) -> dict[str, float]:
    """Processor time and memory of a piece of work, in this process."""
    before, start = resident(), time.process_time()
    kept = work(place)
    seconds = time.process_time() - start
    del kept
    return {"seconds": seconds, "bytes": max(0, peak_resident() - before)}


def check_values() -> dict[str, Any]:
    """Seconds to check a gigabyte of finite values."""
    values = torch.randn(CHECKED)
    paths = {"ours": lambda: _is_finite(values), "plain": lambda: bool(torch.isfinite(values).all())}
    timings = interleaved(paths, REPETITIONS)
    scale = 1e9 / values.nbytes
    seconds = {name: (timing.processor or 0) * scale for name, timing in timings.items()}
    row = {"what": "check that values are finite, a gigabyte", "bytes": 0, "plain_bytes": 0}
    return row | {"seconds": seconds["ours"], "plain_seconds": seconds["plain"]}


# --- a cache ---------------------------------------------------------------------------------------------------------


def write_cache(folder: Path, count: int) -> None:
    """A cache with an index of `count` entries, and shards without content."""
    chance = np.random.default_rng(0)
    shards = [f"{number:05d}-00" for number in range(-(-count // SHARD_ENTRIES))]
    (folder / "shards").mkdir()
    for name in shards:
        (folder / "shards" / f"{name}.safetensors").touch()
    frames, lengths = chance.choice([1, 5, 21], count), chance.integers(5, 200, count)
    shapes = {
        "latents": [np.full(count, 16), frames, np.full(count, 60), np.full(count, 104)],
        "prompt_embeds": [lengths, np.full(count, 4096)],
        "mllm_hidden_states": [lengths + 150, np.full(count, 4096)],
    }
    columns: dict[str, Any] = {f"{name}_shape": _lists(sizes) for name, sizes in shapes.items()}
    columns |= {
        "key": pa.array([f"t2v:videos/{number // 1000:04d}/{number:07d}.mp4" for number in range(count)]),
        "shard": pa.array(np.repeat(shards, SHARD_ENTRIES)[:count]),
        "number": pa.array(np.arange(count) % SHARD_ENTRIES, pa.int32()),
        "task": pa.array(np.where(frames == 1, "t2i", "t2v")),
        "text": pa.array([f"a video of number {number}, which moves slowly to the left" for number in range(count)]),
        "instruction": pa.array(["states"] * count),
    }
    arrays = [columns.get(name, pa.nulls(count, kind)) for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True)]
    arrays = [array.cast(kind) for array, kind in zip(arrays, SCHEMA.types, strict=True)]
    pq.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), folder / INDEX)
    manifest = {"format_version": FORMAT_VERSION, "index": INDEX, "entries": count}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _lists(sizes: list[np.ndarray]) -> pa.ListArray:
    values = np.stack(sizes, axis=1).astype(np.int32)
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1)))


def open_cache(folder: Path) -> Any:
    """Our way."""
    return FeatureCache(folder)


def open_cache_plainly(folder: Path) -> Any:
    """A dictionary for every entry, and a real path for every shard."""
    records = read_table(folder / INDEX)
    shards = sorted({record["shard"] for record in records})
    assert all((folder / "shards" / f"{name}.safetensors").resolve().is_file() for name in shards)  # noqa: S101
    return records, [bucket_of(record["task"], stored_shapes(record)) for record in records]


# --- a table ---------------------------------------------------------------------------------------------------------


def write_table(folder: Path, count: int) -> None:
    """A CSV file of `count` videos."""
    with (folder / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "media", "prompt"])
        for number in range(count):
            media = f"{folder}/videos/{number // 1000:04d}/{number:07d}.mp4"
            writer.writerow(["t2v", media, f"a video of number {number}, which moves slowly to the left"])


def load_table(folder: Path) -> Any:
    """Our way."""
    return load_media_table(folder / "data.csv")


def load_table_plainly(folder: Path) -> Any:
    """A dictionary for every row, and a real path for every file; reading the file is the same."""
    rows, root = read_csv(folder / "data.csv"), folder.resolve()
    counts: Counter[str] = Counter()
    names = []
    for values in rows.select_columns(["task", "media"]):
        path = Path(values["media"]).resolve()
        name = f"{values['task']}:{path.relative_to(root).as_posix() if path.is_relative_to(root) else path}"
        counts[name] += 1
        names.append(name if counts[name] == 1 else f"{name}#{counts[name]}")
    return rows, names


WORK = {
    "open a cache": (write_cache, open_cache, open_cache_plainly),
    "read a table": (write_table, load_table, load_table_plainly),
}
