"""The source of an edit as Omni-Video 2 takes it: a few frames for the MLLM, and the frames that the VAE encodes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...media.sources import Source
from ...media.video_loading import load_chosen_frames, load_video, probe_frames
from ...processing.processing_omni_video_2 import MllmFrames

ASSUMED_FPS = 24.0  # of frames without a frame rate, as in Qwen3-VL


@dataclass(frozen=True)
class EditVideo:
    """
    One source video.

    Args:
        mllm: frames for the MLLM, spread over the whole video.
        frames: uint8 `[frames, height, width, 3]`, the frames to edit.
        fps: frames per second of `frames`.
        notes: decisions that were made for the caller, one sentence each.
    """

    mllm: MllmFrames
    frames: np.ndarray
    fps: float
    notes: tuple[str, ...] = ()

    def cut(self, num_frames: int) -> "EditVideo":
        """The video with the first `num_frames` frames to edit."""
        return replace(self, frames=self.frames[:num_frames])


def load_edit_videos(
    video: Any,
    batch_size: int,
    frame_numbers: Callable[[int], Sequence[int]],
    num_frames: int,
    fps: float | None,
    stride: int,
) -> list[EditVideo]:
    """
    Load source videos, one per prompt; a single video is used for all prompts and read once.

    Args:
        video: one video or a list, as in the pipeline's call.
        batch_size: number of prompts.
        frame_numbers: numbers of the frames for the MLLM, from the number of frames of a video.
        num_frames: frames to edit; a shorter video gives fewer.
        fps: `None` to take every `stride`-th frame; or the rate to which files and clips are resampled, and the rate
            of frames that have none.
        stride: distance of the frames to edit; less for a video that is too short.

    Raises:
        MediaError: for a video that cannot be read.
        ValueError: for another number of videos than prompts.
    """
    entries = Source.of(video, None, batch_size).videos or []
    loaded: dict[int, EditVideo] = {}
    for entry in entries:
        if id(entry) not in loaded:
            loaded[id(entry)] = _load(entry, frame_numbers, num_frames, fps, stride)
    return [loaded[id(entry)] for entry in entries]


def _load(
    entry: Any, frame_numbers: Callable[[int], Sequence[int]], num_frames: int, fps: float | None, stride: int
) -> EditVideo:
    def choose(total: int) -> list[int]:
        edited = [] if resampled is not None else strided_numbers(total, num_frames, stride)
        return sorted({*frame_numbers(total), *edited})

    notes: list[str] = []
    resampled = None if fps is None or not _has_rate(entry) else _resampled(entry, fps, num_frames)
    clip, total = load_chosen_frames(entry, choose)
    rate = clip.fps or fps
    if rate is None:
        rate = ASSUMED_FPS
        notes.append(f"The source frames have no frame rate; {rate:g} per second were assumed: pass `fps` to set it.")
    position = {number: row for row, number in enumerate(choose(total))}
    seen = frame_numbers(total)
    mllm = MllmFrames(clip.frames[[position[n] for n in seen]], tuple(n / rate for n in seen))
    if resampled is not None:
        return EditVideo(mllm, resampled.frames, resampled.fps or rate, (*notes, *resampled.notes))
    edited = strided_numbers(total, num_frames, stride)
    step = edited[1] - edited[0] if len(edited) > 1 else 1
    if step != stride or len(edited) < num_frames:
        notes.append(
            f"The source has {total} frames, fewer than {num_frames} at a distance of {stride}: {len(edited)} frames "
            f"at a distance of {step} were taken."
        )
    return EditVideo(mllm, clip.frames[[position[n] for n in edited]], rate / step, (*notes, *clip.notes))


def strided_numbers(total: int, num_frames: int, stride: int) -> list[int]:
    """Every `stride`-th frame from the start, nearer ones in a video that is too short for that; rule of upstream."""
    while stride > 1 and num_frames * stride > total:
        stride -= 1
    return list(range(0, total, stride))[:num_frames]


def _has_rate(entry: Any) -> bool:
    """Whether a video has a frame rate of its own; bare frames have none."""
    return isinstance(entry, str) or hasattr(entry, "fps") or hasattr(entry, "__fspath__")


def _resampled(entry: Any, fps: float, num_frames: int) -> Any:
    """A video at another frame rate, by time, cut to `num_frames`."""
    if isinstance(entry, (str, Path)) and "://" not in str(entry):  # only the frames that are kept are decoded
        num_frames = min(num_frames, probe_frames(entry, fps)[1])
        return load_video(entry, fps=fps, num_frames=num_frames)
    clip = load_video(entry, fps=fps)
    return replace(clip, frames=clip.frames[:num_frames])


def cropped_pixels(frames: np.ndarray, height: int, width: int) -> torch.Tensor:
    """
    Frames at the size of the output: their centre in its shape, resized with PIL's bilinear filter, as upstream.

    Args:
        frames: uint8 `[frames, height, width, 3]`.
        height, width: of the output, in pixels.

    Returns:
        `[channels, frames, height, width]` in -1..1
    """
    rows, columns = frames.shape[1:3]
    box = crop_box(rows, columns, height, width)
    resized = [
        np.asarray(Image.fromarray(frame).crop(box).resize((width, height), Image.Resampling.BILINEAR))
        for frame in frames
    ]
    return torch.from_numpy(np.stack(resized)).permute(3, 0, 1, 2).float() / 127.5 - 1.0


def crop_box(rows: int, columns: int, height: int, width: int) -> tuple[int, int, int, int]:
    """The largest part around the centre that has the shape of the output: left, top, right, bottom in pixels."""
    if columns * height > rows * width:
        kept = rows * width // height
        left = round((columns - kept) / 2)
        return left, 0, left + kept, rows
    kept = columns * height // width
    top = round((rows - kept) / 2)
    return 0, top, columns, top + kept


__all__ = ["EditVideo", "cropped_pixels", "load_edit_videos"]
