"""Frame sampling: named strategies that select frames of a video, those of the released model among them."""

from collections.abc import Callable

import numpy as np

from .download import MediaError


def _upstream_edit(total: int, num_frames: int) -> list[int]:
    if total == 1:
        return [0] * num_frames
    return np.linspace(0, total - 2, num_frames).astype(int).tolist()


def _upstream_understand(total: int, num_frames: int) -> list[int]:
    return np.linspace(0, total - 1, num_frames).astype(int).tolist() if total >= num_frames else list(range(total))


def _uniform(total: int, num_frames: int) -> list[int]:
    return ((np.arange(num_frames) + 0.5) * total / num_frames).astype(int).tolist()


# (number of frames in the video, number of frames to select) -> frame numbers
FRAME_SAMPLING: dict[str, Callable[[int, int], list[int]]] = {
    "upstream_edit": _upstream_edit,  # never the last frame; repeats frames of short videos
    "upstream_understand": _upstream_understand,  # from first to last; all frames of a shorter video
    "uniform": _uniform,  # the middles of equally long parts
    "first": lambda total, num_frames: list(range(min(total, num_frames))),
    "all": lambda total, _: list(range(total)),
}


def sample_indices(strategy: str, total: int, num_frames: int) -> list[int]:
    """
    Select frame numbers with a named strategy.

    Args:
        strategy: a name in [`FRAME_SAMPLING`].
        total: number of frames in the video.
        num_frames: number of frames to select.

    Raises:
        MediaError: for an unknown strategy, whose message lists the names, or a number below 1.
    """
    if strategy not in FRAME_SAMPLING:
        raise MediaError(f"`frame_sampling` must be one of {', '.join(FRAME_SAMPLING)}, got {strategy!r}.")
    if num_frames < 1 or total < 1:
        raise MediaError(f"`num_frames` must be at least 1, got {num_frames} of {total} frames.")
    return FRAME_SAMPLING[strategy](total, num_frames)


def sample_frames(frames: np.ndarray, strategy: str, num_frames: int) -> np.ndarray:
    """Select frames of `[frames, height, width, 3]` with a named strategy of [`FRAME_SAMPLING`]."""
    return frames[sample_indices(strategy, len(frames), num_frames)]


__all__ = ["FRAME_SAMPLING", "sample_frames", "sample_indices"]
