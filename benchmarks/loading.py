"""
Loading from the disk: time against reading the files' bytes, peak memory against the weights.

Files are taken out of the page cache before every repetition, every repetition has a process of its own, and all
weights are touched, so that none can stay behind in a file that is only mapped.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from omni_video_hf import OmniVideoForConditionalGeneration, OmniVideoPipeline
from omni_video_hf.hub.repository import MODEL_FOLDERS, weight_files
from omni_video_hf.pipelines.memory.profiles import COMPONENTS, DTYPES

from .measure import Timing, in_own_process, peak_resident, resident, spread
from .synthetic_checkpoint import SMALL, fill, write_checkpoint

REPETITIONS = 6
ROOT = Path(__file__).parents[1]
PAGE = 4096
TITLE = "Loading"
COLUMNS = {
    "what": lambda row: row["what"],
    "weights, MB": lambda row: f"{row['weights'] / 1e6:.0f}",
    "reading the files, s": lambda row: spread(row["reading"]),
    "loading, s": lambda row: spread(row["loading"]),
    "loading / reading": lambda row: f"{row['time_ratio']:.2f}",
    "peak / weights": lambda row: f"{row['memory_ratio']:.2f}",
}


def measure(progress: Progress) -> list[dict[str, Any]]:
    """One row per way to load."""
    with tempfile.TemporaryDirectory() as scratch:
        original, folder = Path(scratch) / "omni_ckpts", Path(scratch) / "omni-video"
        progress.console.print("loading: writing and converting a checkpoint ...")
        write_checkpoint(original, SMALL)
        command = [sys.executable, "-m", "conversion", "--original", str(original), "--output", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)  # noqa: S603
        fill(folder)
        return [_compare(load, folders, folder, progress) for load, folders in WAYS.items()]


def load_pipeline(folder: Path) -> list[torch.nn.Module]:
    """The pipeline, in the formats its weights are stored in."""
    pipe = OmniVideoPipeline.from_pretrained(folder, dtype=dict(DTYPES))
    return [getattr(pipe, name) for name in COMPONENTS]


def load_model(folder: Path) -> list[torch.nn.Module]:
    """The whole model as one module."""
    return [OmniVideoForConditionalGeneration.from_pretrained(folder, dtype="auto")]


WAYS = {load_pipeline: COMPONENTS, load_model: MODEL_FOLDERS}


def _compare(
    load: Callable[[Path], list[torch.nn.Module]], folders: tuple[str, ...], folder: Path, progress: Progress
) -> dict[str, Any]:
    files = [file for name in folders for file in weight_files(folder / name)]
    weights = sum(file.stat().st_size for file in files)
    seconds: dict[str, list[float]] = {"reading": [], "loading": []}
    peaks = []
    for repetition in progress.track(range(REPETITIONS), description=f"  {load.__name__}"):
        # Who comes second finds the files in caches that a process cannot empty, such as the disk's own: take turns.
        for what in ("reading", "loading") if repetition % 2 else ("loading", "reading"):
            if what == "reading":
                found = in_own_process(_read, files)
            else:
                found = in_own_process(_load, load, folder, files)
                peaks.append(found["peak"])
            seconds[what].append(found["seconds"])
    reading, loading = (Timing.of(values) for values in seconds.values())
    return {
        "what": load.__name__.replace("_", " "),
        "weights": weights,
        "reading": reading.to_dict(),
        "loading": loading.to_dict(),
        "time_ratio": loading.median / reading.median,
        "memory_ratio": statistics.median(peaks) / weights,
    }


def _read(files: list[Path]) -> dict[str, float]:
    """Seconds to have all bytes of the files in memory."""
    _forget(files)
    start = time.perf_counter()
    content = [file.read_bytes() for file in files]
    return {"seconds": time.perf_counter() - start, "bytes": sum(map(len, content))}


def _load(load: Callable[[Path], list[torch.nn.Module]], folder: Path, files: list[Path]) -> dict[str, float]:
    """Seconds to have all weights in memory, and the most bytes taken meanwhile."""
    torch.set_num_threads(1)
    _forget(files)
    before, start = resident(), time.perf_counter()
    modules = load(folder)
    for tensor in (tensor for module in modules for tensor in module.state_dict().values()):
        tensor.flatten()[:: PAGE // tensor.itemsize].sum()
    return {"seconds": time.perf_counter() - start, "peak": peak_resident() - before}


def _forget(files: list[Path]) -> None:
    """Take files out of the page cache."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
