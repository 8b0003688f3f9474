"""
The read budget: limits of memory and time for reading images, videos, checkpoints, LoRA files and chat templates.

A file of a few hundred bytes can require gigabytes of memory or hours of work. Every reader checks the limits before
it does the work, or during the work if the cost is not known before. The error names the limit.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

T = TypeVar("T")
VARIABLE = "OMNI_VIDEO_READ_{name}"  # environment variable of a limit, such as OMNI_VIDEO_READ_MAX_PIXELS


@dataclass(frozen=True)
class ReadBudget:
    """
    Limits for reading one file.

    Args:
        max_bytes: bytes of memory for the frames of a video or for a tensor, and bytes of a download.
        max_pixels: pixels of one image or of one frame of a video.
        max_seconds: seconds for one pass over a video file, or for rendering a chat template.
        max_steps: entries of a pickle that refers to the same values several times, lines that a chat template runs,
            steps of a regular expression in a LoRA file.
    """

    max_bytes: int = 2**33  # 8 GiB: 46 seconds of 1920x1080 at 30 frames per second
    max_pixels: int = 2**27  # 134 million: 15360x8640; photos of phones have up to 108 million
    max_seconds: float = 300.0
    max_steps: int = 1_000_000

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"`{entry.name}` must be a positive number, got {value!r}.")


_chosen: ContextVar[ReadBudget | None] = ContextVar("read_budget", default=None)


def current_budget() -> ReadBudget:
    """
    The budget of this thread: the innermost [`read_budget`], else the environment variables, else the defaults.

    Raises:
        ValueError: for an environment variable that is not a positive number.
    """
    return _chosen.get() or _of_environment()


@contextmanager
def read_budget(**limits: float) -> Iterator[ReadBudget]:
    """
    Change the read limits within a `with` block: `with read_budget(max_pixels=500_000_000): load_image(path)`.

    Args:
        limits: arguments of [`ReadBudget`]; other limits do not change.

    Raises:
        ValueError: for an unknown limit, or a value that is not a positive number.

    Example:
        >>> from omni_video_hf import read_budget
        >>> with read_budget(max_pixels=500_000_000) as budget:
        ...     budget.max_pixels
        500000000
    """
    known = [entry.name for entry in fields(ReadBudget)]
    if unknown := sorted(limits.keys() - set(known)):
        raise ValueError(f"Unknown read limit {', '.join(unknown)}; allowed are {', '.join(known)}.")
    chosen: dict[str, Any] = limits
    token = _chosen.set(replace(current_budget(), **chosen))
    try:
        yield current_budget()
    finally:
        _chosen.reset(token)


def how_to_raise(name: str) -> str:
    """A sentence for error messages that explains how to raise a limit of the budget."""
    variable = VARIABLE.format(name=name.upper())
    return (
        f"If you trust the file, raise the limit: `with read_budget({name}=...)` (`from omni_video_hf import "
        f"read_budget`), or set {variable}."
    )


def _of_environment() -> ReadBudget:
    limits: dict[str, Any] = {}
    for entry in fields(ReadBudget):
        variable = VARIABLE.format(name=entry.name.upper())
        text = os.environ.get(variable)
        if not text:
            continue
        try:
            limits[entry.name] = (float if isinstance(entry.default, float) else int)(text)
            ReadBudget(**{entry.name: limits[entry.name]})
        except ValueError:
            raise ValueError(f"The environment variable {variable} must be a positive number, got {text!r}.") from None
    return ReadBudget(**limits)


class Stopwatch:
    """
    Measures the seconds that a reader works, without the time in which the caller uses the results.

    Args:
        overrun: creates the error from a sentence that says what happened and what to do.
    """

    def __init__(self, overrun: Callable[[str], Exception]) -> None:
        self.limit, self.used, self.overrun = current_budget().max_seconds, 0.0, overrun

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function and count its time."""
        start = time.monotonic()
        try:
            return function(*args)
        finally:
            self.used += time.monotonic() - start
            self._check()

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """Iterate over `items` and count the time that each one takes to be produced."""
        end = object()
        iterator = iter(items)
        while (item := self.call(next, iterator, end)) is not end:
            yield item

    def overrun_error(self) -> Exception:
        """The error for a file whose reading takes too long."""
        return self.overrun(f"reading takes longer than {self.limit:g} seconds. {how_to_raise('max_seconds')}")

    def _check(self) -> None:
        if self.used > self.limit:
            raise self.overrun_error()


__all__ = ["ReadBudget", "Stopwatch", "current_budget", "how_to_raise", "read_budget"]
