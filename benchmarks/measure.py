"""Timing side by side, and peak memory of a process of its own."""

import gc
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.progress import Progress


@dataclass(frozen=True)
class Timing:
    """Seconds of one path over several repetitions."""

    median: float
    fastest: float
    slowest: float
    repetitions: int

    def to_dict(self) -> dict[str, float]:
        """As plain values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.fastest:.2f}-{self.slowest:.2f})"


def interleaved(
    paths: Mapping[str, Callable[[], object]], repetitions: int, progress: Progress | None = None
) -> dict[str, Timing]:
    """
    Time several paths in turn, so that what else the machine does falls on all of them alike.

    Every path runs once before, unmeasured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    task = progress.add_task("  repetitions", total=(repetitions + 1) * len(paths)) if progress else None
    for repetition in range(repetitions + 1):
        for name, function in paths.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            if repetition:
                seconds[name].append(time.perf_counter() - start)
            if progress:
                progress.advance(task)
    if progress:
        progress.remove_task(task)
    return {
        name: Timing(statistics.median(values), min(values), max(values), repetitions)
        for name, values in seconds.items()
    }


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_own_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a function returns in a fresh process, whose peak memory is its alone."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def resident() -> int:
    """Bytes of main memory this process holds now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_resident() -> int:
    """Most bytes of main memory this process has held since it started."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def collect() -> None:
    """Let go of what nobody uses."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
