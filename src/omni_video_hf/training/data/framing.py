"""Which part of an image or video is used: its bucket of size and frames, the crop, and the frames at a rate."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...media.clip import VideoClip
from ...media.images import load_image
from ...media.video_loading import load_video
from ...pipelines.presets import LatentGrid, check_num_frames, check_positions
from .media_table import Media, MediaInfo


@dataclass(frozen=True)
class Framing:
    """
    What is taken of a file.

    Args:
        width: pixels, after the crop is resized.
        height: likewise.
        num_frames: 1 for an image.
        fps: frames per second; `None` for an image.
        crop: left, top, right, bottom in pixels of the upright file.
    """

    width: int
    height: int
    num_frames: int
    fps: float | None
    crop: tuple[int, int, int, int]

    def load(self, media: Media) -> VideoClip:
        """The frames `[frames, crop height, crop width, 3]`, cropped and not resized yet; an image has one."""
        left, top, right, bottom = self.crop
        with media.open() as path:
            if self.fps is None:
                clip = load_video([load_image(path)])
            else:
                clip = load_video(path, fps=self.fps, num_frames=self.num_frames)
        return replace(clip, frames=clip.frames[:, top:bottom, left:right])


@dataclass(frozen=True)
class FramingRules:
    """
    Buckets of sizes and numbers of frames, and the rate.

    Args:
        sizes: (width, height) in pixels; a file goes where the shape is nearest, and of these to the largest. Empty:
            the preset of its task.
        frames: numbers of frames of videos; a video goes to the largest it fills, from its start. Empty: the preset of
            its task.
        fps: frames per second that videos are resampled to, never above their own; `"source"` keeps each one's own.
            `None`: the preset of its task.
    """

    sizes: Sequence[tuple[int, int]] = ()
    frames: Sequence[int] = ()
    fps: float | Literal["source"] | None = None

    def check(self, grid: LatentGrid) -> None:
        """Refuse sizes and numbers of frames off the grid of latents and source tokens, or without positions."""
        multiple = grid.multiple(with_source=True)
        for width, height in self.sizes:
            if min(width, height) < multiple or width % multiple or height % multiple:
                raise ValueError(f"`sizes` must be multiples of {multiple} pixels, got {width}x{height}.")
        for number in self.frames:
            check_num_frames(grid, number)
        for width, height in self.sizes:
            check_positions(grid, height, width, max(self.frames, default=1), with_source=True)
        if self.fps is not None and self.fps != "source" and not 0 < self.fps < math.inf:
            raise ValueError(f"`fps` must be positive or 'source', got {self.fps!r}.")

    def frame(self, info: MediaInfo, preset: Mapping[str, Any]) -> Framing:
        """
        What to take of a file.

        Args:
            info: what it holds.
            preset: size, frames and rate of its task.

        Raises:
            ValueError: for a video that is too short for every number of frames, or slower than the rate.
        """
        sizes = self.sizes or [(preset["width"], preset["height"])]
        ratio = math.log(info.width / info.height)
        width, height = min(
            sizes, key=lambda size: (round(abs(math.log(size[0] / size[1]) - ratio), 6), -size[0] * size[1])
        )
        crop = centre_crop(info.width, info.height, width / height)
        if info.video is None:
            return Framing(width, height, 1, None, crop)
        own = info.video.fps
        fps = own if self.fps == "source" else float(self.fps or preset["fps"])
        if fps > own * 1.01:
            raise ValueError(
                f"has {own:.4g} frames per second; at {fps:.4g} frames would come twice: lower `fps`, or keep the "
                "rate with 'source'."
            )
        available = max(1, int(info.video.duration * fps + 1e-6))
        wanted = self.frames or [preset["num_frames"]]
        fitting = [number for number in wanted if number <= available]
        if not fitting:
            raise ValueError(
                f"has {available} frames at {fps:.4g} per second, fewer than {min(wanted)}: add a smaller number to "
                "`frames`, raise `fps`, or leave the video out."
            )
        return Framing(width, height, max(fitting), fps, crop)


def centre_crop(width: int, height: int, ratio: float) -> tuple[int, int, int, int]:
    """The largest centred (left, top, right, bottom) of the shape `ratio`, width by height, in whole pixels."""
    wide = max(1, min(width, round(height * ratio)))
    high = max(1, min(height, round(width / ratio)))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


__all__ = ["Framing", "FramingRules", "centre_crop"]
