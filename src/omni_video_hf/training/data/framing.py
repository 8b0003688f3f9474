"""Framing of training data: assign an image or video to a bucket of size and frames, with its crop and frame rate."""

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
    The part of an image or video that is used.

    Args:
        width: width in pixels, after the crop was resized.
        height: height in pixels, after the crop was resized.
        num_frames: number of frames, 1 for an image.
        fps: frames per second; `None` for an image.
        crop: left, top, right, bottom in pixels of the upright image or video.
    """

    width: int
    height: int
    num_frames: int
    fps: float | None
    crop: tuple[int, int, int, int]

    def load(self, media: Media) -> VideoClip:
        """Load the frames `[frames, crop height, crop width, 3]`, cropped but not resized; an image has one frame."""
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
    Rules that assign images and videos to buckets of size and frame number.

    Args:
        sizes: `(width, height)` of the buckets in pixels. A file is assigned to the nearest aspect ratio, and among
            equal ones to the largest size. Empty: the preset of the task.
        frames: numbers of frames of the buckets. A video is assigned to the largest number that it has; its first
            frames are used. Empty: the preset of the task.
        fps: frame rate to which videos are resampled, at most their own; `"source"` keeps the rate of each video.
            `None`: the preset of the task.
    """

    sizes: Sequence[tuple[int, int]] = ()
    frames: Sequence[int] = ()
    fps: float | Literal["source"] | None = None

    def check(self, grid: LatentGrid) -> None:
        """
        Check the buckets against the model.

        Raises:
            ValueError: for sizes and frame numbers that do not fit the grid of latents and source tokens, or for which
                the decoder has no position embeddings.
        """
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
        Determine the part of an image or video that is used.

        Args:
            info: properties of the file.
            preset: size, frame number and frame rate of the task.

        Raises:
            ValueError: for a video that is too short for all buckets, or whose frame rate is too low.
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
                f"has {own:.4g} frames per second; at {fps:.4g}, frames would be repeated: lower `fps`, or keep the "
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
    """The largest centred crop `(left, top, right, bottom)` with the aspect ratio width / height, in whole pixels."""
    wide = max(1, min(width, round(height * ratio)))
    high = max(1, min(height, round(width / ratio)))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


__all__ = ["Framing", "FramingRules", "centre_crop"]
