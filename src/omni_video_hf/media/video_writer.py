"""`save_video` and `VideoWriter`: write videos with tagged colours, sound, and a record of how they were generated."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image
from transformers.utils import is_av_available

from .download import MediaError
from .images import load_image, metadata_text, output_file
from .video_loading import load_video
from .video_reader import check_pyav
from .writing.encoding import BT709_COLOURS, Colours, ContainerEncoder
from .writing.formats import PICTURES, codec_of, container_of, encoder_options
from .writing.pictures import PictureFiles
from .writing.sound import Sound

if is_av_available():
    pass

FPS_RANGE = (0.01, 1000.0)  # frame rates that mp4 files and their players represent exactly


class VideoWriter:
    """
    Write a video frame by frame; the file appears under its final name when it is complete.

    Use it in a `with` block. If the block raises, nothing is written. Only the frames that the encoder still needs
    are in memory.

    Args:
        path: file to write: .mp4, .mov, .mkv, .webm, .gif, animated .webp; a pattern such as `frame-%04d.png`, or a
            folder that does not exist, which PNG files are written to.
        fps: frames per second, 0.01 to 1000.
        codec: `h264` (.mp4 .mov .mkv), `hevc`, `av1`, `vp9` (.webm), `prores` (.mov). Default: the first that the
            format takes.
        quality: 0, the smallest file, to 100, lossless or nearly; 65 by default, which looks like the original. For
            codecs with a CRF it stands for `(100 - quality) / 100` of the largest one: 65 is 18 of 51 for H.264.
        crf: CRF of the encoder, instead of `quality`: 0 to 51, for av1 and vp9 to 63.
        metadata: record of how the video was generated, see [`save_video`].
        sound: sound to copy from a file, cut to the length of the pictures.
        colours: tags of matrix, range, primaries and transfer. BT.709 in limited range by default.

    Attributes:
        notes: one sentence for each decision of the writer, such as sound that was encoded again.

    Raises:
        MediaError: for a format, codec, rate or quality that cannot be written, before any frame is added.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from omni_video_hf.media import VideoWriter, probe_video
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with VideoWriter(f"{folder}/video.mp4", fps=8) as writer:
        ...         for number in range(9):
        ...             writer.add(np.full((64, 64, 3), 20 * number, np.uint8))
        ...     probe_video(f"{folder}/video.mp4").num_frames
        9
    """

    def __init__(
        self,
        path: str | Path,
        fps: float,
        *,
        codec: str | None = None,
        quality: float | None = None,
        crf: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        sound: Sound | None = None,
        colours: Colours | None = None,
    ) -> None:
        check_pyav()
        self.path, self.notes, self.sound = Path(path), list[str](), sound
        self.container, self.codec = container_of(self.path), codec_of(self.path, codec)
        self.options = encoder_options(self.path, self.codec, quality, crf)
        if not FPS_RANGE[0] <= fps <= FPS_RANGE[1]:
            raise MediaError(f"`fps` must be {FPS_RANGE[0]:g} to {FPS_RANGE[1]:g} frames per second, got {fps}.")
        self.rate = Fraction(fps).limit_denominator(100_000)
        self.comment = None if metadata is None else metadata_text(metadata)
        self.colours = colours or BT709_COLOURS
        self.size: tuple[int, int] | None = None
        self._encoder: ContainerEncoder | PictureFiles | None = None
        self._stack = ExitStack()
        self._last: float | None = None

    def __enter__(self) -> "VideoWriter":
        if self.container is PICTURES:
            self._encoder = self._stack.enter_context(PictureFiles(self.path, self.comment))
            if self.sound is not None:
                self.notes.append("The sound was left out: PNG files have none.")
        else:
            self._partial = self._stack.enter_context(output_file(self.path))
        return self

    def add(self, frame: Any, time: float | None = None, duration: float | None = None) -> None:
        """
        Add the next frame.

        Args:
            frame: picture as in [`load_image`]; all of one video have the same size.
            time: seconds from the first frame, for a variable frame rate; give it for all frames or for none.
            duration: seconds for which the frame is shown, with `time`; counts for the last frame, except in a GIF.

        Raises:
            MediaError: for another size, or a time that is not after the last one.

        Example:
            >>> import tempfile
            >>> import numpy as np
            >>> from omni_video_hf.media import VideoWriter, probe_video
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     with VideoWriter(f"{folder}/video.mp4", fps=8) as writer:
            ...         for time in (0.0, 0.125, 0.5):
            ...             writer.add(np.zeros((64, 64, 3), np.uint8), time)
            ...     probe_video(f"{folder}/video.mp4").num_frames
            3
        """
        picture = as_picture(frame)
        size = picture.shape[1], picture.shape[0]
        if self.size not in (None, size):
            raise MediaError(
                f"The frames of a video must all have the same size, got {[self.size, size]} (width, height)."
            )
        if min(size) < self.codec.min_side:
            raise MediaError(
                f"{self.path}: {self.codec.encoder} needs at least {self.codec.min_side} pixels a side, the frames "
                f"are {size[0]}x{size[1]}: choose another `codec`."
            )
        if time is not None and self._last is not None and time <= self._last:
            raise MediaError(f"`time` must grow from frame to frame, got {time:g} after {self._last:g} seconds.")
        self._last = time
        if self._encoder is None:
            self._encoder = self._stack.enter_context(ContainerEncoder(self, self._partial, size, time is not None))
        self.size = size
        self._encoder.add(picture, time, duration)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self.size is None:
            error = MediaError("The video has no frames.")
            self._stack.__exit__(MediaError, error, None)
            raise error
        self._stack.__exit__(kind, error, trace)


def as_picture(frame: Any) -> np.ndarray:
    """Any picture as uint8 `[height, width, 3]`, without a copy where it is RGB already."""
    if isinstance(frame, np.ndarray) and frame.ndim == 3 and frame.shape[2] == 3 and frame.dtype == np.uint8:
        return np.ascontiguousarray(frame)
    if isinstance(frame, Image.Image) and frame.mode == "RGB" and not frame.info and not frame.getexif():
        return np.asarray(frame)
    return np.asarray(load_image(frame))


def save_video(
    frames: Any,
    path: str | Path,
    fps: float | None = None,
    *,
    crf: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    codec: str | None = None,
    quality: float | None = None,
    sound: Sound | None = None,
) -> None:
    """
    Write a video atomically, by default an H.264 mp4 that common players can play.

    `encode_video` of diffusers is not used: it does not tag the colours, which players then guess, and it is not
    atomic. If width or height is odd, which most codecs do not support, the last row or column is repeated.

    Args:
        frames: frames as in [`load_video`].
        path: file to write, see [`VideoWriter`]: .mp4, .mov, .mkv, .webm, .gif, .webp, `%04d.png` or a new folder.
        fps: frames per second, 0.01 to 1000; required unless `frames` is a [`VideoClip`] with a rate.
        crf: quality as CRF, 0 (lossless) to 51 (lowest); 18 by default.
        metadata: record of how the video was generated, such as `settings` of the pipeline's output; plain values. It
            is stored as JSON in the comment of the file, in the EXIF of a WebP, in every PNG.
        codec, quality, sound: see [`VideoWriter`].

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
    container_of(Path(path))
    is_list = isinstance(frames, (list, tuple)) and len(frames) > 0
    clip = None if is_list else load_video(frames, source_fps=fps)
    pictures: Iterable[Any] = frames if clip is None else clip.frames
    rate = fps or (None if clip is None else clip.fps)
    if rate is None:
        raise MediaError("`fps` is missing: frames without a frame rate need it.")
    with VideoWriter(path, rate, codec=codec, quality=quality, crf=crf, metadata=metadata, sound=sound) as writer:
        for picture in pictures:
            writer.add(picture)


__all__ = ["Sound", "VideoWriter", "save_video"]
