"""Calls of the pipeline for many visitors: one runs, the others wait in line, and everyone can cancel their own."""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from ..pipelines.pipeline_omni_video import OmniVideoPipeline
from ..pipelines.shared.output import OmniVideoPipelineOutput
from .previews import Preview, PreviewDecoder
from .requests import Request

POLL = 0.25  # seconds between two looks at the line
PREVIEW_SHARE = 0.2  # of the time of a call that previews may take


@dataclass(frozen=True)
class Waiting:
    """Other calls run first. Args: ahead: their number."""

    ahead: int


@dataclass(frozen=True)
class Started:
    """The pipeline works on the call. Without steps yet, it encodes the prompt and the source, or answers."""


@dataclass(frozen=True)
class Step:
    """
    A denoising step is done.

    Args:
        number, total: steps that are done, and all of them.
        seconds_left: estimate for the remaining steps; `None` after the first step.
        preview: what the result will look like; `None` without a new preview.
    """

    number: int
    total: int
    seconds_left: float | None = None
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Done:
    """The result of the call, and how many seconds it took after its turn had come."""

    output: OmniVideoPipelineOutput
    seconds: float


@dataclass(frozen=True)
class Cancelled:
    """The visitor cancelled the call. Args: steps: steps that were done before."""

    steps: int


Event = Waiting | Started | Step | Done | Cancelled


class _Stop(Exception):  # noqa: N818 - it is no error
    """Ends a call between two steps; the pipeline then restores its state, as after any exception."""


@dataclass(eq=False)
class _Call:
    request: Request
    owner: str
    events: "queue.SimpleQueue[Event | Exception]" = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)


class Runner:
    """
    Runs calls one after the other, in the order of their arrival.

    Args:
        pipe: the pipeline.
    """

    def __init__(self, pipe: OmniVideoPipeline) -> None:
        self.pipe = pipe
        self.decoder = PreviewDecoder(pipe)
        self._begin()

    def _begin(self) -> None:
        """An empty line. A forked process, such as ZeroGPU's, has none of the threads and calls of its parent."""
        self._line: list[_Call] = []  # the first one runs
        self._changed = threading.Condition()
        self._process = os.getpid()

    def run(self, request: Request, owner: str) -> Iterator[Event]:
        """
        Run a call, and yield what happens to it; the last event is a [`Done`] or a [`Cancelled`].

        A caller that stops to iterate, such as a closed browser tab, cancels the call.

        Args:
            owner: session of the visitor, for [`cancel`].

        Raises:
            Exception: what the pipeline raised.
        """
        if self._process != os.getpid():
            self._begin()
        call = _Call(request, owner)
        with self._changed:
            self._line.append(call)
        threading.Thread(target=self._run, args=(call,), name="omni-video call", daemon=True).start()
        ahead = 0
        try:
            while True:
                try:
                    event = call.events.get(timeout=POLL)
                except queue.Empty:
                    now = self._calls_ahead(call)
                    if now and now != ahead:
                        yield Waiting(now)
                    ahead = now
                    continue
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, (Done, Cancelled)):
                    return
        finally:
            self._stop(call)

    def cancel(self, owner: str) -> int:
        """Cancel all calls of a visitor, and no others. Returns their number."""
        with self._changed:
            calls = [call for call in self._line if call.owner == owner and not call.cancelled.is_set()]
        for call in calls:
            self._stop(call)
        return len(calls)

    def _stop(self, call: _Call) -> None:
        call.cancelled.set()
        with self._changed:
            self._changed.notify_all()

    def _calls_ahead(self, call: _Call) -> int:
        with self._changed:
            return self._line.index(call) if call in self._line else 0

    def _run(self, call: _Call) -> None:
        """Wait for the turn of a call, and run it. This is the body of its thread."""
        try:
            with self._changed:
                while self._line[0] is not call and not call.cancelled.is_set():
                    self._changed.wait()
            call.events.put(Cancelled(0) if call.cancelled.is_set() else self._result(call))
        except Exception as error:
            call.events.put(error)
        finally:
            with self._changed:
                self._line.remove(call)
                self._changed.notify_all()

    def _result(self, call: _Call) -> Event:
        call.events.put(Started())
        start = time.monotonic()
        steps = _Steps(call, self.decoder)
        request = call.request
        try:
            output = self.pipe(
                request.prompt,
                **request.media,
                task=request.task,
                generator=torch.Generator("cpu").manual_seed(request.seed),
                callback_on_step_end=steps,
                **request.settings,
            )
        except _Stop:
            return Cancelled(steps.done)
        if call.cancelled.is_set():  # a text answer, or the last moment of a generation
            return Cancelled(steps.done)
        return Done(output, time.monotonic() - start)


class _Steps:
    """The callback of one call: it reports the steps, and ends the call when it is cancelled."""

    def __init__(self, call: _Call, decoder: PreviewDecoder) -> None:
        self.call, self.preview = call, Preview(decoder)
        self.done = 0
        self.times: list[float] = []
        self.preview_seconds = 0.0
        self.start = time.monotonic()

    def __call__(
        self, pipe: OmniVideoPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        if self.call.cancelled.is_set():
            pipe._interrupt = True  # for whoever looks at the pipeline; the exception saves the decoding
            raise _Stop
        now = time.monotonic()
        self.times.append(now)
        self.done, total = step + 1, pipe.num_timesteps
        image = None
        self.preview.add(tensors["latents"], float(timestep))
        if self.done < total and self.preview_seconds <= PREVIEW_SHARE * (now - self.start):
            image = self.preview.image()
            self.preview_seconds += time.monotonic() - now
        self.call.events.put(Step(self.done, total, self.seconds_left(total), image))
        return {}

    def seconds_left(self, total: int) -> float | None:
        """Estimate from the steps after the first one, which is often slower."""
        if len(self.times) < 2:
            return None
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1) * (total - len(self.times))


def last_event(events: Iterator[Event], on_event: Callable[[Event], None] | None = None) -> Event:
    """Consume the events of a call, and return the last one."""
    event: Event = Started()
    for event in events:
        if on_event is not None:
            on_event(event)
    return event


__all__ = ["Cancelled", "Done", "Event", "Runner", "Started", "Step", "Waiting", "last_event"]
