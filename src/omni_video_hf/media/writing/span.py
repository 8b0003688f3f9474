"""`ClipSpan`: a part of a video file, with all that an edit of it keeps: times, size, colours and sound."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..clip import VideoClip
from ..download import MediaError, MediaFile, opened
from ..video_loading import check_bytes, decoded_frames
from ..video_reader import VideoIndex, read_index
from ..video_writer import VideoWriter, as_picture
from .encoding import Colours, colours_of
from .sound import Sound


@dataclass(frozen=True, eq=False)
class ClipSpan:
    """
    A part of a video file, chosen from its index; frames are decoded by [`read`].

    Args:
        file: the video file.
        numbers: numbers of the frames in the file, in order.
        times: seconds of every frame from the first one; `None` for a constant frame rate.
        last: seconds for which the last frame is shown.
        fps: frames per second; the average of a variable rate.
        start: seconds from the first frame of the file.
        duration: seconds from the first frame to the end of the last one.
        size: width and height in pixels, upright.
        notes: what the conversion to upright RGB changes.
    """

    file: MediaFile
    numbers: tuple[int, ...]
    times: tuple[float, ...] | None
    last: float
    fps: float
    start: float
    duration: float
    size: tuple[int, int]
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls, source: str | Path, start: float | None = None, duration: float | None = None, fps: float | None = None
    ) -> "ClipSpan":
        """
        Choose the frames that are shown from `start` on for `duration` seconds; by default all.

        Args:
            source: path, URL or [`MediaFile`].
            start: seconds from the first frame.
            duration: seconds.
            fps: constant frame rate to resample to; by default all frames, with their own times.

        Raises:
            MediaError: for a file that cannot be read, and a span that is not in it.
        """
        with opened(source) as file:
            index = read_index(file)
        begin, whole = start or 0.0, index.info.duration
        if not 0 <= begin < whole:
            raise MediaError(f"{source}: `start` is {begin:g} seconds, but the video is {whole:.3f} seconds long.")
        if duration is not None and not 0 < duration <= whole - begin + 0.5 / index.info.fps:
            raise MediaError(
                f"{source}: `duration` must be above 0 and at most {whole - begin:.3f} seconds from {begin:g} on, got "
                f"{duration:g}."
            )
        end = whole if duration is None else min(begin + duration, whole)
        numbers, times, last = _chosen(index, begin, end, fps)
        info = index.info
        return cls(
            file=file,
            numbers=tuple(numbers),
            times=times,
            last=last,
            fps=fps or info.fps,
            start=float(index.times[numbers[0]]) if fps is None else begin,
            duration=len(numbers) / (fps or info.fps) if times is None else times[-1] + last,
            size=(info.width, info.height),
            notes=info.notes,
        )

    def padded_length(self, step: int) -> int:
        """Number of frames, rounded up to `step * n + 1`."""
        return -(-(len(self.numbers) - 1) // step) * step + 1

    def read(self, step: int = 1) -> VideoClip:
        """
        Decode the frames.

        Args:
            step: the last frame is repeated until there are `step * n + 1` frames.
        """
        index = read_index(self.file)
        count = self.padded_length(step)
        check_bytes(index, count)
        frames = decoded_frames(index, [*self.numbers, *[self.numbers[-1]] * (count - len(self.numbers))])
        return VideoClip(frames, self.fps, self.notes)

    def write(
        self,
        frames: Iterable[Any],
        path: Path,
        metadata: Mapping[str, Any] | None = None,
        size: tuple[int, int] | None = None,
        **options: Any,
    ) -> list[str]:
        """
        Write an edit of the frames: with their times, the colour tags of the file and its sound.

        Args:
            frames: edited frames, also as they come; what [`read`] added at the end is left out.
            path: file to write, see [`VideoWriter`].
            metadata: record of how the video was generated.
            size: width and height to resize the frames to; by default that of the frames.
            options: `codec`, `quality` and `crf` of [`VideoWriter`].

        Returns:
            Notes of the writer.
        """
        sound = Sound(self.file, self.start, self.duration)
        colours: Colours = colours_of(self.file)
        writer = VideoWriter(path, self.fps, metadata=metadata, sound=sound, colours=colours, **options)
        with writer:
            for number, frame in enumerate(islice(frames, len(self.numbers))):
                picture = Image.fromarray(as_picture(frame))
                if size is not None and picture.size != size:
                    picture = picture.resize(size, Image.Resampling.LANCZOS)
                if self.times is None:
                    writer.add(picture)
                else:
                    following = self.times[number + 1] if number + 1 < len(self.times) else None
                    shown = self.last if following is None else following - self.times[number]
                    writer.add(picture, self.times[number], shown)
        return writer.notes


def _chosen(
    index: VideoIndex, begin: float, end: float, fps: float | None
) -> tuple[list[int], tuple[float, ...] | None, float]:
    """Frame numbers, their times if the rate varies, and the time that the last one is shown."""
    tolerance = index.slack + 1e-6
    if fps is not None:
        count = max(1, int(np.ceil((end - begin - index.slack) * fps - 1e-6)))
        instants = begin + np.arange(count) / fps
        found = np.searchsorted(index.times, instants + tolerance, side="right") - 1
        return found.clip(0, len(index.times) - 1).tolist(), None, 1 / fps
    first = int(np.searchsorted(index.times, begin + tolerance, side="right")) - 1
    after = int(np.searchsorted(index.times, end - tolerance, side="left"))
    numbers = list(range(max(0, first), max(first + 1, after)))
    if not index.info.is_variable_frame_rate:
        return numbers, None, 1 / index.info.fps
    times = index.times[numbers] - index.times[numbers[0]]
    shown_until = index.times[numbers[-1] + 1] if numbers[-1] + 1 < len(index.times) else index.info.duration
    return numbers, tuple(times.tolist()), float(min(shown_until, end) - index.times[numbers[-1]]) or 1e-3


__all__ = ["ClipSpan"]
