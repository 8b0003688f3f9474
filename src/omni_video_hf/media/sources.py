"""`Source`: the videos or images that the pipeline edits or answers questions about, one per prompt."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from .clip import VideoClip
from .download import MediaFile
from .images import load_image
from .video_loading import load_video


@dataclass
class Source:
    """The videos or images of one call, one per prompt; empty for a task without a source."""

    videos: list[Any] | None = None  # as the caller passed them; `VideoClip`s after `load`
    images: list[Image.Image] | None = None

    @classmethod
    def of(cls, video: Any, image: Any, batch_size: int) -> "Source":
        """
        Create a source with one entry per prompt; a single video or image is repeated for all prompts.

        Raises:
            ValueError: if the number of entries is neither one nor `batch_size`.
        """
        if video is not None:
            return cls(videos=_opened_once(_as_batch(video, _is_clip, batch_size, "video")))
        if image is not None:
            return cls(images=[load_image(entry) for entry in _as_batch(image, _is_image, batch_size, "image")])
        return cls()

    def load(self, num_frames: int | None = None, fps: float | None = None) -> "Source":
        """Read the selected frames of the videos, see [`load_video`]; images were read by [`of`]."""
        if self.videos is None:
            return self
        clips = {id(video): _load_clip(video, num_frames, fps) for video in {id(v): v for v in self.videos}.values()}
        return Source(videos=[clips[id(video)] for video in self.videos])

    @property
    def kind(self) -> Literal["image", "video"] | None:
        """Kind of the entries; `None` if there are none."""
        if self.videos is not None:
            return "video"
        return "image" if self.images is not None else None

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """`(height, width)` of every video or image; videos must be loaded."""
        if self.videos is not None:
            return [clip.frames.shape[1:3] for clip in self.videos]
        return [image.size[::-1] for image in self.images or ()]

    def check_equal(self, height: int | None, num_frames: int | None, fps: float | None) -> None:
        """
        Refuse entries that differ in size, length or frame rate, unless the caller determines the value.

        Raises:
            ValueError: for different values; the message names the argument that determines them.
        """
        differing: list[tuple[str, str, set[Any]]] = []
        if height is None:
            differing.append(("size", "`height` and `width`", {f"{width}x{height}" for height, width in self.sizes}))
        if num_frames is None:
            differing.append(("number of frames", "`num_frames`", {len(clip.frames) for clip in self.videos or ()}))
        if fps is None or num_frames is None:
            differing.append(("frame rate", "`fps`", {clip.fps for clip in self.videos or ()}))
        for what, argument, values in differing:
            if len(values) > 1:
                raise ValueError(
                    f"The sources of one call must have the same {what}, got {sorted(map(str, values))}: pass "
                    f"{argument}, or make one call per source."
                )


def _opened_once(videos: list[Any]) -> list[Any]:
    """Make one [`MediaFile`] of each path or URL, so that checks and readers of one call share the open file."""
    files = {video: MediaFile(video) for video in videos if isinstance(video, (str, Path))}
    return [
        video if isinstance(video, MediaFile) or not isinstance(video, (str, Path)) else files[video]
        for video in videos
    ]


def _load_clip(clip: Any, num_frames: int | None, fps: float | None) -> VideoClip:
    """Load one video of any form; `fps` is the frame rate of bare frames, which have none."""
    if isinstance(clip, (str, Path, VideoClip)):
        return load_video(clip, num_frames=num_frames, fps=fps)
    return load_video(clip, num_frames=num_frames, source_fps=fps)


def _is_clip(value: Any) -> bool:
    """Whether `value` is one video rather than a list of videos."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim == 4
    if isinstance(value, (list, tuple)) and value:
        return isinstance(value[0], Image.Image) or (
            isinstance(value[0], (np.ndarray, torch.Tensor)) and value[0].ndim == 3
        )
    return True


def _is_image(value: Any) -> bool:
    """Whether `value` is one image rather than a list of images."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim <= 3
    return not isinstance(value, (list, tuple))


def _as_batch(value: Any, is_single: Callable[[Any], bool], batch_size: int, name: str) -> list[Any]:
    """A list with one entry per prompt; a single entry is repeated."""
    entries = [value] * batch_size if is_single(value) else list(value)
    if len(entries) != batch_size:
        raise ValueError(f"`{name}` has {len(entries)} entries for {batch_size} prompts: pass one, or one per prompt.")
    return entries


__all__ = ["Source"]
