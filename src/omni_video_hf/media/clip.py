"""A video in memory."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class VideoClip:
    """
    A video in memory.

    Args:
        frames: uint8 `[frames, height, width, 3]`, RGB.
        fps: frames per second; `None` where nobody said.
        notes: one sentence for each thing that was decided while reading.
    """

    frames: np.ndarray
    fps: float | None
    notes: tuple[str, ...] = ()


__all__ = ["VideoClip"]
