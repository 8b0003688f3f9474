"""The work behind the page, without gradio: sessions of visitors, their results, and sentences for errors."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..pipelines.output import OmniVideoPipelineOutput
from ..utils.masking import mask_tokens
from .files import SessionFiles
from .requests import Request, make_request
from .runner import Cancelled, Done, Event, Runner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """A generated image or video. Args: path: its file; title: prompt and seed."""

    path: Path
    title: str


@dataclass
class Session:
    """What the page remembers of a visitor. Args: results: all images and videos; latest: what a chat is about."""

    results: list[Result] = field(default_factory=list)
    latest: str | None = None


@dataclass(frozen=True)
class Finished:
    """
    A call that ended well.

    Args:
        request: the call.
        output: what the pipeline returned.
        seconds: duration.
        path: file with the result; `None` for a text answer.
    """

    request: Request
    output: OmniVideoPipelineOutput
    seconds: float
    path: Path | None


class Workshop:
    """
    Runs the calls of all visitors, and keeps their results until they leave.

    Args:
        runner: runs the calls.
        files: keeps the files.
        on_gpu: decorator of the one function that needs the GPU, such as `spaces.GPU` of the Hub's Spaces.
    """

    def __init__(
        self,
        runner: Runner,
        files: SessionFiles,
        on_gpu: Callable[[Callable[..., Iterator[Event]]], Callable[..., Iterator[Event]]] | None = None,
    ) -> None:
        self.runner, self.files = runner, files
        self._run_call = runner.run if on_gpu is None else on_gpu(runner.run)
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    @property
    def presets(self) -> Mapping[str, Mapping[str, Any]]:
        """Settings of the model by task."""
        return self.runner.pipe.config.presets

    def session(self, name: str) -> Session:
        """What is remembered of a visitor."""
        with self._lock:
            return self._sessions.setdefault(name, Session())

    def request(self, way: str, prompt: str | None, **arguments: Any) -> Request:
        """Check a form, see [`make_request`]."""
        return make_request(way, prompt, presets=self.presets, **arguments)

    def run(self, request: Request, session: str) -> Iterator[Event | Finished]:
        """Run a call, and yield its events; instead of a [`Done`], the last one is a [`Finished`] or [`Cancelled`]."""
        for event in self._run_call(request, session):
            if not isinstance(event, Done):
                yield event
                continue
            path = None
            if event.output.frames is not None:
                path = self.files.save(event.output, session, request.source)
                title = f"{request.prompt} (seed {request.seed})"
                self.session(session).results.append(Result(path, title))
            yield Finished(request, event.output, event.seconds, path)

    def finish(self, request: Request, session: str) -> Finished:
        """
        Run a call to its end.

        Raises:
            ValueError: if it was cancelled.
        """
        for event in self.run(request, session):
            if isinstance(event, Finished):
                return event
            if isinstance(event, Cancelled):
                raise ValueError("The call was cancelled.")
        raise RuntimeError("The call ended without a result.")

    def leave(self, session: str) -> None:
        """Cancel the calls of a visitor who left, and remove the files."""
        self.runner.cancel(session)
        with self._lock:
            self._sessions.pop(session, None)
        self.files.forget(session)


def sentence(error: Exception) -> str:
    """
    An error in one sentence for visitors. The errors of the pipeline are such sentences.

    The traceback of any other error goes to the log of the server only.
    """
    words = mask_tokens(" ".join(str(error).split()))
    if isinstance(error, torch.OutOfMemoryError):
        return f"The device does not have enough memory: choose a smaller size or fewer frames. ({words})"
    if isinstance(error, (ValueError, OSError, ImportError)) and words:
        return words
    logger.error("A call failed.", exc_info=error)
    return f"The call failed with {type(error).__name__}: {words}" if words else f"The call failed: {error!r}"


def thought(finished: Finished) -> str:
    """What the MLLM decided in a chat, and what it wrote when it did."""
    tasks = {
        "t2i": "It asked for an image, from the message alone",
        "t2v": "It asked for a video, from the message alone",
        "i2i": "It asked for an image or a video; the source is an image, so the task is an edit of the image",
        "v2v": "It asked for an image or a video; the source is a video, so the task is an edit of the video",
        "understand": "It answered in text, without a request for an image or a video",
    }
    output = finished.output
    words = " ".join(text for text in output.thought or () if text)
    said = f" It wrote: {words}" if words else ""
    return f"{tasks.get(output.task or '', 'It chose a task')} (`{output.task}`).{said}"


__all__ = ["Finished", "Result", "Session", "Workshop", "sentence", "thought"]
