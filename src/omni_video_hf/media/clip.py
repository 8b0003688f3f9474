"""`VideoClip`: a video in memory, with its frame rate."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class VideoClip:
    """
    A video in memory.

    Args:
        frames: uint8 `[frames, height, width, 3]`, RGB.
        fps: frames per second; `None` if the rate is unknown.
        notes: one sentence for each decision that the reader made, such as a resampling.

    Example:
        >>> import numpy as np
        >>> from omni_video_hf.media import VideoClip
        >>> VideoClip(np.zeros((9, 64, 64, 3), np.uint8), fps=8).frames.shape
        (9, 64, 64, 3)
    """

    frames: np.ndarray
    fps: float | None
    notes: tuple[str, ...] = ()


__all__ = ["VideoClip"]
