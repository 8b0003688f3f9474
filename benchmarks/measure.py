"""Timing side by side, and peak memory of a process of its own."""

import gc
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress


@dataclass(frozen=True)
class Timing:
    """
    Seconds of one path over several repetitions.

    `processor` is the median of the time that the processor worked for this process, which other processes on the
    machine hardly disturb.
    """

    median: float
    fastest: float
    slowest: float
    repetitions: int
    processor: float | None = None

    @classmethod
    def of(cls, seconds: list[float], processor: list[float] | None = None) -> "Timing":
        """From all repetitions."""
        worked = statistics.median(processor) if processor else None
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds), worked)

    def to_dict(self) -> dict[str, float]:
        """As plain values."""
        return asdict(self)


def interleaved(
    paths: Mapping[str, Callable[[], object]], repetitions: int, progress: Progress | None = None
) -> dict[str, Timing]:
    """
    Time several paths in turn, so that what else the machine does falls on all of them alike.

    Every path runs once before, unmeasured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    processor: dict[str, list[float]] = {name: [] for name in paths}
    task = progress.add_task("  repetitions", total=(repetitions + 1) * len(paths)) if progress else None
    for repetition in range(repetitions + 1):
        for name, function in paths.items():
            synchronize()
            start, worked = time.perf_counter(), time.process_time()
            function()
            synchronize()
            if repetition:
                seconds[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - worked)
            if progress:
                progress.advance(task)
    if progress:
        progress.remove_task(task)
    return {name: Timing.of(seconds[name], processor[name]) for name in paths}


def spread(timing: Mapping[str, float]) -> str:
    """Median, fastest and slowest for a table."""
    return f"{timing['median']:.2f} ({timing['fastest']:.2f}-{timing['slowest']:.2f})"


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
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def peak_resident() -> int:
    """Most bytes of main memory this process has held since it started."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def collect() -> None:
    """Let go of what nobody uses."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
