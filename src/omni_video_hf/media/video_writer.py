"""`save_video`: write H.264 videos with BT.709 colours and a record of how they were generated."""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import is_av_available

from .images import metadata_text, output_file
from .video_loading import load_video
from .video_reader import MediaError, check_pyav

if is_av_available():
    import av
    from av.video.reformatter import ColorRange, Colorspace


BT709 = 1  # code of the primaries and of the transfer in ITU-T H.273; older PyAV has no names for them
FPS_RANGE = (0.01, 1000.0)  # frame rates that mp4 files and their players represent exactly


def save_video(
    frames: Any,
    path: str | Path,
    fps: float | None = None,
    *,
    crf: int = 18,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """
    Write an H.264 mp4 that common players can play, atomically.

    `encode_video` of diffusers is not used: it does not tag the colours, which players then guess, and it is not
    atomic. If width or height is odd, which H.264 players do not support, the last row or column is repeated.

    Args:
        frames: frames as in [`load_video`].
        path: file to write; its suffix must be .mp4.
        fps: frames per second, 0.01 to 1000; required unless `frames` is a [`VideoClip`] with a rate.
        crf: quality, 0 (lossless) to 51 (lowest).
        metadata: record of how the video was generated, such as `settings` of the pipeline's output; plain values. It
            is stored as JSON in the comment of the file.

    Raises:
        MediaError: for another suffix, no frames, no frame rate, or values that are not images.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from omni_video_hf.media import probe_video, save_video
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_video(np.zeros((9, 64, 64, 3), np.uint8), f"{folder}/video.mp4", fps=8)
        ...     probe_video(f"{folder}/video.mp4").fps
        8.0
    """
    check_pyav()
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise MediaError(f"{path}: the suffix of a video must be .mp4.")
    clip = load_video(frames, source_fps=fps)
    rate = fps or clip.fps
    if rate is None:
        raise MediaError("`fps` is missing: frames without a frame rate need it.")
    if not FPS_RANGE[0] <= rate <= FPS_RANGE[1]:
        raise MediaError(f"`fps` must be {FPS_RANGE[0]:g} to {FPS_RANGE[1]:g} frames per second, got {rate}.")
    comment = None if metadata is None else metadata_text(metadata)
    odd_rows, odd_columns = clip.frames.shape[1] % 2, clip.frames.shape[2] % 2
    options = {"movflags": "+faststart"}  # index at the start of the file, so that browsers play during the download
    with output_file(path) as partial, av.open(str(partial), "w", format="mp4", options=options) as container:
        if comment is not None:
            container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(100_000))
        stream.height, stream.width = clip.frames.shape[1] + odd_rows, clip.frames.shape[2] + odd_columns
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf)}
        context = stream.codec_context
        context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
        context.color_primaries = context.color_trc = BT709
        for picture in clip.frames:
            padded = np.pad(picture, ((0, odd_rows), (0, odd_columns), (0, 0)), "edge")
            frame = av.VideoFrame.from_ndarray(padded, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


__all__ = ["save_video"]
