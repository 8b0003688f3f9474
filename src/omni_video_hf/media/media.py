"""Reads and writes videos and images: files, URLs, PIL images, arrays and tensors in, upright 8-bit RGB out."""

import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub.utils import get_session
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from transformers.utils import is_av_available

from .video_reader import (
    BACKGROUND,
    STRIP,
    MediaError,
    VideoIndex,
    VideoInfo,
    check_file,
    check_pyav,
    decode_frames,
    open_picture,
    over_background,
    picture_format,
    probe_video,
    read_index,
)
from ..utils.read_budget import current_budget, how_to_raise

if is_av_available():
    import av
    from av.video.reformatter import ColorRange, Colorspace

BT709 = 1  # as primaries and as transfer, in ITU-T H.273; older PyAV has no names for them
DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer; the session's own default is to wait for ever
IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
FPS_RANGE = (0.01, 1000.0)  # what mp4 files and their players keep exactly
METADATA_KEY = "omni_video"  # under which files say how they were made, as JSON
MAX_EXIF_BYTES = 60_000  # JPEG has room for 64 kB; what is longer is kept in PNG, WebP and mp4 alone


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


# --- images ---------------------------------------------------------------------------------------------------------


def load_image(source: Any) -> Image.Image:
    """
    An upright RGB image.

    Args:
        source: path, URL, PIL image of any mode, or an array or tensor `[height, width]`, `[height, width, 1, 3 or 4]`
            or `[1, 3 or 4, height, width]`, uint8 or float in 0..1. Transparent parts are shown over white.

    Raises:
        MediaError: nothing that can be read as one image.
    """
    if isinstance(source, Image.Image):
        return _without_alpha(ImageOps.exif_transpose(source))
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return Image.fromarray(_to_uint8_rgb(source, "image", 2))
    if not isinstance(source, (str, Path)):
        raise MediaError(f"An image must be a path, URL, PIL image, array or tensor, got {type(source).__name__}.")
    with _local_file(source) as path:
        check_file(path)
        found = picture_format(path)
        if found is None:
            raise MediaError(f"{source}: is not an image that can be read (PNG, JPEG, WebP, GIF, BMP, TIFF ...).")
        if found[1] > 1:
            raise MediaError(f"{source}: has {found[1]} pictures; give one image, or use it as a video.")
        try:
            with open_picture(path) as image:
                ImageOps.exif_transpose(image, in_place=True)
                return _without_alpha(image)
        except Exception as error:  # Pillow's readers raise anything on damaged files
            raise MediaError(f"{source}: the image is damaged or cut short ({error}).") from error


def save_image(
    image: Image.Image | np.ndarray | torch.Tensor, path: str | Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """
    Write one image; its format follows from the suffix (.png .jpg .webp). The file appears when it is complete.

    Args:
        image: as in [`load_image`].
        path: its suffix names the format.
        metadata: what the file is to say about how it was made, such as a pipeline's `settings`; plain values. It is
            text in a PNG and the EXIF description elsewhere; a JPEG takes 60,000 bytes of it.

    Raises:
        MediaError: for another suffix, values that are no image, or metadata that are too long or not JSON.
    """
    path = Path(path)
    if path.suffix.lower() not in IMAGE_FORMATS:
        raise MediaError(f"{path}: the suffix of an image must be one of {', '.join(IMAGE_FORMATS)}.")
    picture, kind = load_image(image), IMAGE_FORMATS[path.suffix.lower()]
    options: dict[str, Any] = {"quality": 95}
    if metadata is not None:
        text = _metadata_text(metadata)
        if kind == "JPEG" and len(text) > MAX_EXIF_BYTES:
            raise MediaError(f"{path}: `metadata` has {len(text)} bytes, a JPEG takes {MAX_EXIF_BYTES}. Write a PNG.")
        if kind == "PNG":
            options["pnginfo"] = PngImagePlugin.PngInfo()
            options["pnginfo"].add_itxt(METADATA_KEY, text)
        else:
            options["exif"] = Image.Exif()
            options["exif"][ExifTags.Base.ImageDescription] = text
    with _complete_or_absent(path) as partial:
        picture.save(partial, format=kind, **options)


def _without_alpha(image: Image.Image) -> Image.Image:
    """RGB of an upright image of any mode."""
    if image.mode == "F":
        return Image.fromarray(_to_uint8_rgb(np.asarray(image), "image", 2))
    if image.mode.startswith("I"):  # 16 bits and more: Pillow would clip instead of scaling
        values = np.asarray(image)
        top = 65535.0 if values.max() > 255 or image.mode.startswith("I;16") else 255.0
        grey = np.empty(values.shape, np.uint8)
        rows = max(1, STRIP // values.shape[1])
        for start in range(0, len(values), rows):
            strip = values[start : start + rows].astype(np.float64)
            grey[start : start + rows] = (strip / top * 255).round().clip(0, 255)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        shown = Image.new("RGB", image.size)
        rows = max(1, STRIP // image.width)
        for top in range(0, image.height, rows):
            strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
            shown.paste(Image.fromarray(over_background(np.asarray(strip))), (0, top))
        return shown
    return image.convert("RGB")


# --- videos ---------------------------------------------------------------------------------------------------------


def load_video(
    source: Any,
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    max_frames: int | None = None,
    source_fps: float | None = None,
) -> VideoClip:
    """
    A clip, or a selection of its frames. Only frames that are kept are held in memory.

    Args:
        source: path, URL, [`VideoClip`], list of PIL images or arrays, or an array or tensor
            `[frames, height, width, 3]` or `[frames, 3, height, width]`, uint8 or float in 0..1.
        fps: resample to this rate by time stamps: for every instant the frame shown then.
        num_frames: alone, that many frames evenly spread from the first to the last, the returned rate scaled so that
            the duration stays; with `fps`, that many from the start.
        max_frames: refuse a longer result before decoding.
        source_fps: rate of frames that carry none.

    Returns:
        The clip. With neither `fps` nor `num_frames`, every frame; a file of variable rate is resampled to a steady
        one (its commonest, or its average where there is none), and a note says so.

    Raises:
        MediaError: unreadable, damaged, cut short, too short for what is asked, or no video.
    """
    wishes = {"fps": fps, "num_frames": num_frames, "max_frames": max_frames, "source_fps": source_fps}
    for name, value in wishes.items():
        if value is not None and not 0 < value < np.inf:
            raise MediaError(f"`{name}` must be positive, got {value}.")
    if isinstance(source, (str, Path)):
        with _local_file(source) as path:
            return _load_file(path, fps, num_frames, max_frames)
    clip = source if isinstance(source, VideoClip) else VideoClip(_stack_frames(source), source_fps)
    total, rate = len(clip.frames), clip.fps
    if fps is not None and rate is None:
        raise MediaError("`fps` cannot be changed: these frames have no rate. Pass a file or a VideoClip.")
    times = np.arange(total) / (rate or 1.0)
    numbers, new_rate = _select(times, total / (rate or 1.0), rate or 1.0, 1e-6, fps, num_frames, "the clip")
    _check_number(len(numbers), max_frames)
    return VideoClip(clip.frames[numbers], None if rate is None else new_rate, clip.notes)


def probe_frames(path: str | Path, fps: float | None = None, num_frames: int | None = None) -> tuple[VideoInfo, int]:
    """
    What a video file holds, and how many frames [`load_video`] gives for these wishes; nothing is decoded for it.

    Raises:
        MediaError: as [`load_video`].
    """
    index = read_index(path)
    return index.info, _plan(index, fps, num_frames)[0]


def _load_file(path: Path, fps: float | None, num_frames: int | None, max_frames: int | None) -> VideoClip:
    index = read_index(path)
    number, fps, notes = _plan(index, fps, num_frames)
    _check_number(number, max_frames)
    _check_bytes(index, number)  # before as many numbers are made
    info = index.info
    numbers, rate = _select(index.times, info.duration, info.fps, index.slack, fps, num_frames, str(path))
    return VideoClip(_decode(index, numbers), rate, notes)


def _plan(index: VideoIndex, fps: float | None, num_frames: int | None) -> tuple[int, float | None, tuple[str, ...]]:
    """How many frames there will be, the rate to take them at where it is not the file's own, and notes."""
    info, notes = index.info, index.info.notes
    if info.is_variable_frame_rate and fps is None and num_frames is None:
        fps = _steady_rate(index.times) or info.fps
        notes += (f"The frame rate varies; frames were taken at a steady {fps:.4g} per second.",)
    if num_frames is not None:
        return num_frames, fps, notes
    return info.num_frames if fps is None else _available(info.duration, index.slack, fps), fps, notes


def _available(duration: float, slack: float, fps: float) -> int:
    """Number of frames that `duration` seconds give at a rate."""
    return max(1, int(np.ceil((duration - slack) * fps - 1e-6)))


def _steady_rate(times: np.ndarray) -> float | None:
    """The rate of a file whose frames nearly all lie equally far apart (a few may be dropped); else `None`."""
    steps = np.diff(times)
    usual = float(np.median(steps))
    return 1 / usual if usual > 0 and (np.abs(steps - usual) < 0.02 * usual).mean() >= 0.8 else None


def load_sampled_video(source: Any, strategy: str, num_frames: int) -> np.ndarray:
    """
    Frames of a video by a named strategy of [`FRAME_SAMPLING`]; from a file only these are decoded.

    Returns:
        uint8 `[frames, height, width, 3]`
    """
    if not isinstance(source, (str, Path)):
        return sample_frames(load_video(source).frames, strategy, num_frames)
    with _local_file(source) as path:
        index = read_index(path)
        return _decode(index, sample_indices(strategy, index.info.num_frames, num_frames))


def _decode(index: VideoIndex, numbers: Sequence[int]) -> np.ndarray:
    _check_bytes(index, len(numbers))
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
    """Numbers of the wanted frames, and their rate. `times` are the frames' seconds from the first."""
    total = len(times)
    if fps is None:
        if num_frames is None:
            return list(range(total)), rate
        if num_frames > total:
            raise MediaError(f"{name}: has {total} frames, {num_frames} were asked for.")
        if num_frames == 1:
            return [0], rate
        # The frame nearest to each instant: by number alone, a varying rate would play now too fast, now too slow.
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
            f"The video gives {number} frames, more than {max_frames}: pass `num_frames` or a lower `fps`."
        )


def _check_bytes(index: VideoIndex, number: int) -> None:
    """Refuse more frames than the read budget allows, before any is decoded."""
    info, limit = index.info, current_budget().max_bytes
    if number * info.width * info.height * 3 > limit:
        raise MediaError(
            f"{index.path}: {number:,} frames of {info.width}x{info.height} take more than {limit:,} bytes of memory. "
            f"Pass `num_frames` or a lower `fps`. {how_to_raise('max_bytes')}"
        )


def open_media(source: str | Path) -> tuple[Literal["image", "video"], Any]:
    """
    Tell by content whether a file is an image or a video.

    Returns:
        `("image", the image)` or `("video", the path)`: a video is left for [`load_video`], which reads what is asked.

    Raises:
        MediaError: neither of the two.
    """
    with _local_file(source) as path:
        check_file(path)
        found = picture_format(path)
        if found is not None and found[1] == 1:
            return "image", load_image(path)
        probe_video(path)
    return "video", source


# --- sampling -------------------------------------------------------------------------------------------------------


def _upstream_edit(total: int, num_frames: int) -> list[int]:
    if total == 1:
        return [0] * num_frames
    return np.linspace(0, total - 2, num_frames).astype(int).tolist()


def _upstream_understand(total: int, num_frames: int) -> list[int]:
    return np.linspace(0, total - 1, num_frames).astype(int).tolist() if total >= num_frames else list(range(total))


def _uniform(total: int, num_frames: int) -> list[int]:
    return ((np.arange(num_frames) + 0.5) * total / num_frames).astype(int).tolist()


# (number of frames there are, number wanted) -> frame numbers
FRAME_SAMPLING: dict[str, Callable[[int, int], list[int]]] = {
    "upstream_edit": _upstream_edit,  # never the last frame; repeats in short clips
    "upstream_understand": _upstream_understand,  # first to last; all of a shorter clip
    "uniform": _uniform,  # the middles of equal parts
    "first": lambda total, num_frames: list(range(min(total, num_frames))),
    "all": lambda total, _: list(range(total)),
}


def sample_indices(strategy: str, total: int, num_frames: int) -> list[int]:
    """Frame numbers by a named strategy; a `MediaError` lists the names there are."""
    if strategy not in FRAME_SAMPLING:
        raise MediaError(f"`frame_sampling` must be one of {', '.join(FRAME_SAMPLING)}, got {strategy!r}.")
    if num_frames < 1 or total < 1:
        raise MediaError(f"`num_frames` must be at least 1, got {num_frames} of {total} frames.")
    return FRAME_SAMPLING[strategy](total, num_frames)


def sample_frames(frames: np.ndarray, strategy: str, num_frames: int) -> np.ndarray:
    """`frames` `[frames, height, width, 3]` by a named strategy of [`FRAME_SAMPLING`]."""
    return frames[sample_indices(strategy, len(frames), num_frames)]


# --- writing --------------------------------------------------------------------------------------------------------


def save_video(
    frames: Any,
    path: str | Path,
    fps: float | None = None,
    *,
    crf: int = 18,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """
    Write an H.264 mp4 that plays everywhere. The file appears under its name when it is complete.

    Own code and not diffusers' `encode_video`, which leaves colours untagged (players then guess, and shift them) and
    writes under the final name. An odd width or height, which H.264 players do not take, gains a repeated edge.

    Args:
        frames: as in [`load_video`].
        path: ends in .mp4.
        fps: frames per second, 0.01 to 1000; needed unless `frames` is a [`VideoClip`].
        crf: quality, 0 (lossless) to 51.
        metadata: what the file is to say about how it was made, such as a pipeline's `settings`; plain values, in the
            file's comment as JSON.

    Raises:
        MediaError: for another suffix, no frames, no rate, or values that are no pictures.
    """
    check_pyav()
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise MediaError(f"{path}: the suffix of a video must be .mp4.")
    clip = load_video(frames, source_fps=fps)
    rate = fps or clip.fps
    if rate is None:
        raise MediaError("`fps` must be given for frames that carry no rate.")
    if not FPS_RANGE[0] <= rate <= FPS_RANGE[1]:
        raise MediaError(f"`fps` must be {FPS_RANGE[0]:g} to {FPS_RANGE[1]:g} frames per second, got {rate}.")
    comment = None if metadata is None else _metadata_text(metadata)
    odd_rows, odd_columns = clip.frames.shape[1] % 2, clip.frames.shape[2] % 2
    options = {"movflags": "+faststart"}  # the index first: browsers play while they load
    with _complete_or_absent(path) as partial, av.open(str(partial), "w", format="mp4", options=options) as container:
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


def contact_sheet(frames: Any, columns: int | None = None, max_frames: int = 8) -> Image.Image:
    """A grid of up to `max_frames` frames, evenly chosen, in one row unless `columns` says otherwise."""
    pictures = _stack_frames(frames.frames if isinstance(frames, VideoClip) else frames)
    chosen = pictures[np.linspace(0, len(pictures) - 1, min(max_frames, len(pictures))).round().astype(int)]
    columns = columns or len(chosen)
    rows = -(-len(chosen) // columns)
    height, width = chosen.shape[1:3]
    sheet = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), BACKGROUND)
    for number, picture in enumerate(chosen):
        row, column = divmod(number, columns)
        sheet.paste(Image.fromarray(picture), (column * (width + 2), row * (height + 2)))
    return sheet


# --- pieces ---------------------------------------------------------------------------------------------------------


def _stack_frames(frames: Any) -> np.ndarray:
    """uint8 `[frames, height, width, 3]` of frames in any form."""
    if isinstance(frames, (np.ndarray, torch.Tensor)):
        stacked = _to_uint8_rgb(frames, "video", 3)
    elif isinstance(frames, (list, tuple)):
        pictures = [np.asarray(load_image(frame)) for frame in frames]
        shapes = {picture.shape for picture in pictures}
        if len(shapes) > 1:
            raise MediaError(
                f"Frames of one video must have one size, got {sorted(shape[1::-1] for shape in shapes)}."
            )
        stacked = np.stack(pictures) if pictures else np.empty((0, 1, 1, 3), np.uint8)
    else:
        raise MediaError(
            f"A video must be a path, URL, VideoClip, list of frames, array or tensor, got {type(frames).__name__}."
        )
    if len(stacked) == 0:
        raise MediaError("The video has no frames.")
    return stacked


def _to_uint8_rgb(values: np.ndarray | torch.Tensor, name: str, ndim: int) -> np.ndarray:
    """uint8 RGB with channels last; `ndim` is the number of dimensions without channels."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float().numpy() if values.is_floating_point() else values.numpy()
    array = values
    shape = tuple(array.shape)
    if array.ndim == ndim:
        array = array[..., None]
    elif array.ndim == ndim + 1 and array.shape[-1] not in (1, 3, 4) and array.shape[ndim - 2] in (1, 3, 4):
        array = np.moveaxis(array, ndim - 2, -1)
    if array.ndim != ndim + 1 or array.shape[-1] not in (1, 3, 4) or 0 in shape:
        raise MediaError(f"The {name} has shape {shape}; wanted are height, width and 1, 3 or 4 channels.")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min() < -1e-3 or array.max() > 1 + 1e-3:
            raise MediaError(
                f"The {name} has float values from {array.min():.3g} to {array.max():.3g}; wanted are finite ones in "
                "0..1."
            )
        array = (array.clip(0, 1) * 255).round().astype(np.uint8)
    elif array.dtype != np.uint8:
        raise MediaError(f"The {name} has values of type {array.dtype}; wanted is uint8, or float in 0..1.")
    if array.shape[-1] == 4:
        return over_background(array)
    return np.ascontiguousarray(np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array)


@contextmanager
def _local_file(source: str | Path) -> Iterator[Path]:
    """The file itself, or a download of a URL that is gone afterwards."""
    if not str(source).startswith(("http://", "https://")):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "download"
        try:
            request = get_session().stream("GET", str(source), follow_redirects=True, timeout=DOWNLOAD_TIMEOUT)
            with request as response, path.open("wb") as file:
                response.raise_for_status()
                limit = current_budget().max_bytes
                for chunk in response.iter_bytes():
                    file.write(chunk)
                    if file.tell() > limit:
                        raise MediaError(f"{source}: is larger than {limit:,} bytes. {how_to_raise('max_bytes')}")
        except MediaError:
            raise
        except Exception as error:  # the HTTP library's own errors, whichever it is
            raise MediaError(f"{source}: could not be downloaded ({error}).") from error
        try:
            yield path
        except MediaError as error:  # it names the download's temporary file, which tells the caller nothing
            raise MediaError(str(error).replace(str(path), str(source))) from error


def _metadata_text(metadata: Mapping[str, Any]) -> str:
    """The metadata as one line of ASCII, which every format keeps."""
    try:
        return json.dumps({METADATA_KEY: dict(metadata)}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise MediaError(f"`metadata` must hold plain values that JSON has ({error}).") from error


@contextmanager
def _complete_or_absent(path: Path) -> Iterator[Path]:
    """
    A name to write under; it becomes `path` when the block ends well, and is removed otherwise.

    The name is random, so that it is short enough beside any other and nobody can put a link in its place before; the
    number in it is that of the process.
    """
    if not path.parent.is_dir():
        raise MediaError(f"{path}: the folder {path.parent} does not exist.")
    if path.is_dir():
        raise MediaError(f"{path}: is a folder; a file is to be written.")
    partial = path.with_name(f".omni-video-{os.getpid()}-{secrets.token_hex(6)}.partial")
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


__all__ = [
    "FRAME_SAMPLING",
    "MediaError",
    "VideoClip",
    "VideoInfo",
    "contact_sheet",
    "load_image",
    "load_sampled_video",
    "load_video",
    "open_media",
    "probe_frames",
    "probe_video",
    "sample_frames",
    "sample_indices",
    "save_image",
    "save_video",
]
