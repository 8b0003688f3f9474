"""Files of the demo page: results with their records, and what an edit is compared with."""

import hashlib
import mimetypes
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
from PIL import Image

from ..media.images import load_image, save_image
from ..media.video_loading import load_video, open_media
from ..media.video_writer import save_video
from ..pipelines.output import OmniVideoPipelineOutput

GAIN = 2  # of the difference view, so that a change that is hard to see is visible there

Kind = Literal["image", "video"]


@dataclass(frozen=True)
class Comparison:
    """
    An edit beside its source.

    Args:
        source: what the pipeline made of the source: its frames, at the size of the result.
        result: the edit.
        difference: absolute difference of the two, times `GAIN`.
        kind: kind of all three.
    """

    source: Path
    result: Path
    difference: Path
    kind: Kind


class SessionFiles:
    """
    The files of all visitors, in one temporary folder, which is removed with this object or the process.

    The name of a file contains a random number, so that only the visitor whose page shows the file can read it.

    Args:
        model: name of the model for the records.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self._folder = tempfile.TemporaryDirectory(prefix="omni-video-demo-")

    @property
    def folder(self) -> Path:
        """The folder that contains the folders of the sessions."""
        return Path(self._folder.name)

    def save(self, output: OmniVideoPipelineOutput, session: str, source: str | None = None) -> Path:
        """Write a result and its record, and return its path."""
        suffix = ".png" if output.fps is None else ".mp4"
        seed = output.settings.get("seed")
        path = self._new(session) / f"omni-video-{output.task}-{seed}{suffix}"
        record = {"model": self.model} | output.record()
        if source is not None:
            record["source"] = Path(source).name
        frames = output.frames[0]
        if output.fps is None:
            save_image(frames[0], path, metadata=record)
        else:
            save_video(frames, path, fps=output.fps, metadata=record)
        return path

    def compare(
        self, source: str, result: Path, session: str, settings: Mapping[str, Any] | None = None
    ) -> Comparison:
        """
        Put an edit beside its source.

        Args:
            source: path of the source.
            result: path of the edit.
            session: session of the visitor.
            settings: arguments of the call; `num_frames` and `fps` select frames of the source.
        """
        kind, opened = open_media(source)
        folder = self._new(session)
        if kind == "image":
            after = load_image(result)
            before = load_image(opened).resize(after.size, Image.Resampling.LANCZOS)
            difference = _difference(np.asarray(before), np.asarray(after))
            paths = folder / "source.png", folder / "difference.png"
            save_image(before, paths[0])
            save_image(difference, paths[1])
            return Comparison(paths[0], result, paths[1], kind)
        wanted = {name: (settings or {}).get(name) for name in ("num_frames", "fps")}
        clip, edited = load_video(source, **wanted), load_video(result)
        size = edited.frames.shape[2], edited.frames.shape[1]
        kept = clip.frames[: len(edited.frames)]
        if kept.shape[1:3] != edited.frames.shape[1:3]:
            resized = [Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in kept]
            kept = np.stack([np.asarray(frame) for frame in resized])
        paths = folder / "source.mp4", folder / "difference.mp4"
        save_video(kept, paths[0], fps=edited.fps)
        save_video(_difference(kept, edited.frames[: len(kept)]), paths[1], fps=edited.fps)
        return Comparison(paths[0], result, paths[1], kind)

    def forget(self, session: str) -> None:
        """Remove the files of a session."""
        shutil.rmtree(self._folder_of(session), ignore_errors=True)

    def _folder_of(self, session: str) -> Path:
        """Folder of a session. A browser chooses the name of its session, which therefore cannot be a path."""
        return self.folder / hashlib.sha256(session.encode()).hexdigest()[:32]

    def _new(self, session: str) -> Path:
        """A new folder of a session, so that a file keeps a name that is good to read."""
        folder = self._folder_of(session) / uuid4().hex
        folder.mkdir(parents=True)
        return folder


def kind_of(path: str | Path) -> Kind:
    """How a browser shows a file, from its suffix: an animated GIF is an image there."""
    return "video" if (mimetypes.guess_type(path)[0] or "").startswith("video/") else "image"


def _difference(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Absolute difference of uint8 pixels, times `GAIN`."""
    difference = np.abs(before.astype(np.int16) - after.astype(np.int16)) * GAIN
    return difference.clip(0, 255).astype(np.uint8)


__all__ = ["GAIN", "Comparison", "Kind", "SessionFiles", "kind_of"]
