"""Loading of videos from files, URLs, frames, arrays and tensors, resampled to a frame rate or length."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..utils.read_budget import current_budget, how_to_raise
from .animation import picture_format
from .clip import VideoClip
from .download import MediaError, MediaFile, opened
from .frame_sampling import sample_frames, sample_indices
from .images import load_image, stack_frames
from .video_reader import VideoIndex, VideoInfo, decode_frames, read_index


def load_video(
    source: Any,
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    max_frames: int | None = None,
    source_fps: float | None = None,
) -> VideoClip:
    """
    Load a video, or selected frames of it. Only the selected frames are kept in memory.

    Args:
        source: path, URL, [`VideoClip`], list of PIL images or arrays, or an array or tensor
            `[frames, height, width, 3]` or `[frames, 3, height, width]`, uint8 or float in 0..1.
        fps: frame rate to resample to: for each point in time the frame that is shown then, by time stamps.
        num_frames: number of frames. Alone: frames at equal distances from the first to the last, with a frame rate
            that preserves the duration. With `fps`: frames from the start.
        max_frames: maximum number of frames; a longer result is refused before decoding.
        source_fps: frame rate of frames that have none, such as arrays.

    Returns:
        The video. With neither `fps` nor `num_frames` it has all frames; a file with a variable frame rate is
        resampled to a constant one (its most common rate, or its average if there is none), which a note reports.

    Raises:
        MediaError: for a file that is unreadable, damaged, cut short or not a video, or a video that is too short.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from omni_video_hf.media import load_video, save_video
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_video(np.zeros((9, 64, 64, 3), np.uint8), f"{folder}/video.mp4", fps=8)
        ...     len(load_video(f"{folder}/video.mp4", num_frames=5).frames)
        5
    """
    wishes = {"fps": fps, "num_frames": num_frames, "max_frames": max_frames, "source_fps": source_fps}
    for name, value in wishes.items():
        if value is not None and not 0 < value < np.inf:
            raise MediaError(f"`{name}` must be positive, got {value}.")
    if isinstance(source, (str, Path)):
        with opened(source) as path:
            return _load_file(path, fps, num_frames, max_frames)
    clip = source if isinstance(source, VideoClip) else VideoClip(stack_frames(source), source_fps)
    total, rate = len(clip.frames), clip.fps
    if fps is not None and rate is None:
        raise MediaError(
            f"`fps` {fps:g}: frames without a frame rate cannot be resampled. Pass a file or a VideoClip."
        )
    times = np.arange(total) / (rate or 1.0)
    numbers, new_rate = _select(times, total / (rate or 1.0), rate or 1.0, 1e-6, fps, num_frames, "the clip")
    _check_number(len(numbers), max_frames)
    return VideoClip(clip.frames[numbers], None if rate is None else new_rate, clip.notes)


def probe_frames(path: str | Path, fps: float | None = None, num_frames: int | None = None) -> tuple[VideoInfo, int]:
    """
    Properties of a video file, and the number of frames that [`load_video`] returns for the same arguments.

    No frames are decoded for the number.

    Raises:
        MediaError: see [`load_video`].
    """
    index = read_index(path)
    return index.info, _plan(index, fps, num_frames)[0]


def _load_file(path: MediaFile, fps: float | None, num_frames: int | None, max_frames: int | None) -> VideoClip:
    index = read_index(path)
    number, fps, notes = _plan(index, fps, num_frames)
    _check_number(number, max_frames)
    check_bytes(index, number)  # before a list of so many numbers is created
    info = index.info
    numbers, rate = _select(index.times, info.duration, info.fps, index.slack, fps, num_frames, str(path))
    return VideoClip(decoded_frames(index, numbers), rate, notes)


def _plan(index: VideoIndex, fps: float | None, num_frames: int | None) -> tuple[int, float | None, tuple[str, ...]]:
    """Number of frames to load, frame rate to resample to (`None`: that of the file), and notes."""
    info, notes = index.info, index.info.notes
    if info.is_variable_frame_rate and fps is None and num_frames is None:
        fps = _steady_rate(index.times) or info.fps
        notes += (f"The frame rate varies; the video was resampled to a constant {fps:.4g} frames per second.",)
    if num_frames is not None:
        return num_frames, fps, notes
    return info.num_frames if fps is None else _available(info.duration, index.slack, fps), fps, notes


def _available(duration: float, slack: float, fps: float) -> int:
    """Number of frames in `duration` seconds at a frame rate."""
    return max(1, int(np.ceil((duration - slack) * fps - 1e-6)))


def _steady_rate(times: np.ndarray) -> float | None:
    """Frame rate of a file in which nearly all frames have equal distances (a few may be missing); else `None`."""
    steps = np.diff(times)
    usual = float(np.median(steps))
    return 1 / usual if usual > 0 and (np.abs(steps - usual) < 0.02 * usual).mean() >= 0.8 else None


def load_sampled_video(source: Any, strategy: str, num_frames: int) -> np.ndarray:
    """
    Load the frames of a video that a named strategy of [`FRAME_SAMPLING`] selects; of a file only these are decoded.

    Returns:
        uint8 `[frames, height, width, 3]`
    """
    if not isinstance(source, (str, Path)):
        return sample_frames(load_video(source).frames, strategy, num_frames)
    with opened(source) as path:
        index = read_index(path)
        return decoded_frames(index, sample_indices(strategy, index.info.num_frames, num_frames))


def load_chosen_frames(source: Any, choose: Callable[[int], Sequence[int]]) -> tuple[VideoClip, int]:
    """
    Load the frames of a video whose numbers a function chooses; of a file only these are decoded.

    Args:
        source: as of [`load_video`].
        choose: gets the number of frames in the video, and gives the numbers of those to load, in any order.

    Returns:
        The chosen frames, with the frame rate of the whole video, and the number of its frames.
    """
    if not isinstance(source, (str, Path)):
        clip = load_video(source)
        return VideoClip(clip.frames[list(choose(len(clip.frames)))], clip.fps, clip.notes), len(clip.frames)
    with opened(source) as path:
        index = read_index(path)
        frames = decoded_frames(index, choose(index.info.num_frames))
        return VideoClip(frames, index.info.fps, index.info.notes), index.info.num_frames


def decoded_frames(index: VideoIndex, numbers: Sequence[int]) -> np.ndarray:
    """Decode the frames with these numbers, repeated ones once; uint8 `[frames, height, width, 3]`."""
    check_bytes(index, len(numbers))
    rows: dict[int, list[int]] = {}
    for row, number in enumerate(numbers):
        rows.setdefault(int(number), []).append(row)
    frames = np.empty((len(numbers), index.info.height, index.info.width, 3), np.uint8)
    for number, frame in decode_frames(index, list(rows)):
        frames[rows[number]] = frame
    return frames


def _select(
    times: np.ndarray,
    duration: float,
    rate: float,
    slack: float,
    fps: float | None,
    num_frames: int | None,
    name: str,
) -> tuple[list[int], float]:
    """Numbers of the selected frames, and their frame rate. `times` are seconds from the first frame."""
    total = len(times)
    if fps is None:
        if num_frames is None:
            return list(range(total)), rate
        if num_frames > total:
            raise MediaError(f"{name}: has {total} frames, {num_frames} were asked for.")
        if num_frames == 1:
            return [0], rate
        # Select by time: selection by number would change the speed of a video with a variable frame rate.
        instants = np.linspace(0, times[-1], num_frames)
        numbers = np.interp(instants, times, np.arange(total)).round(6).round().astype(int)
        return numbers.tolist(), (num_frames - 1) / float(times[-1])
    available = _available(duration, slack, fps)
    if num_frames is not None and num_frames > available:
        raise MediaError(
            f"{name}: {duration:.3g} seconds give {available} frames at {fps:g} per second, {num_frames} were asked "
            "for."
        )
    instants = np.arange(num_frames or available) / fps
    numbers = np.searchsorted(times, instants + slack + 1e-9, side="right") - 1
    return numbers.clip(0, total - 1).tolist(), fps


def _check_number(number: int, max_frames: int | None) -> None:
    if max_frames is not None and number > max_frames:
        raise MediaError(
            f"The video has {number} frames at this rate, more than {max_frames}: pass `num_frames` or a lower `fps`."
        )


def check_bytes(index: VideoIndex, number: int) -> None:
    """Refuse more frames than the read budget allows, before decoding."""
    info, limit = index.info, current_budget().max_bytes
    if number * info.width * info.height * 3 > limit:
        raise MediaError(
            f"{index.path}: {number:,} frames of {info.width}x{info.height} need more than {limit:,} bytes of memory. "
            f"Pass `num_frames` or a lower `fps`. {how_to_raise('max_bytes')}"
        )


def open_media(source: str | Path) -> tuple[Literal["image", "video"], Any]:
    """
    Open a file as image or video, depending on its content.

    Returns:
        `("image", PIL image)` or `("video", path)`; a video is read later by [`load_video`].

    Raises:
        MediaError: if the file is neither of the two.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from omni_video_hf.media import open_media, save_video
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_video(np.zeros((9, 64, 64, 3), np.uint8), f"{folder}/video.mp4", fps=8)
        ...     open_media(f"{folder}/video.mp4")[0]
        'video'
    """
    with opened(source) as path:
        found = picture_format(path)
        if found is not None and found[1] == 1:
            return "image", load_image(path)
        read_index(path)
    return "video", source


__all__ = ["load_chosen_frames", "load_sampled_video", "load_video", "open_media", "probe_frames"]
