"""Reading of video files with PyAV: properties of a file, and selected frames as upright 8-bit RGB.

A file is opened once and read in two passes. The first pass reads only the compressed packets, whose number and time
stamps are reliable, unlike many headers; it refuses files that are cut short. The second pass decodes frames one at a
time. It seeks to the key frame before a selected frame if that saves work, and leaves out frames on the way that no
other frame needs. Animated WebP, which FFmpeg cannot read, is read with Pillow in the same two passes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import is_av_available

from ..utils.read_budget import Stopwatch, current_budget
from .animation import check_pixels, is_animated_webp, over_background, picture_format, webp_frames, webp_header
from .download import MediaError, MediaFile, check_file, opened

if is_av_available():
    import av

# Demuxers that may be opened. Without a list, FFmpeg also opens text, still images and playlists, and a playlist can
# make it read other files and addresses. The last four contain only sound; they are listed for a clear error.
VIDEO_CONTAINERS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,gif,apng,asf,ogg,nut,mxf,ivf,h264,hevc,m4v,yuv4mpegpipe,"
    "wav,mp3,flac,aac"
)
PICTURE_BRANDS = ("avif", "heic", "heix", "mif1")  # still images in an MP4 container

TRANSFERS = {16: "pq", 18: "hlg"}  # codes of ITU-T H.273; all others are standard dynamic range
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own VP8 and VP9 decoders drop the alpha channel
# Codecs whose decoders leave out a frame that no other frame refers to without changing any other frame.
SKIPPING_CODECS = ("h264", "hevc")
SEEK_GAP = 16  # frames; a shorter distance to the next key frame is decoded, because a seek restarts the decoder


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video file. Sizes are those of the upright video with square pixels."""

    width: int  # pixels, after rotation and with square pixels
    height: int  # pixels
    fps: float  # frames per second; the average when the rate varies
    num_frames: int  # counted packets that are shown, not the header's number
    duration: float  # seconds, first frame's start to last frame's end
    rotation: int  # 0, 90, 180 or 270 degrees counterclockwise, already applied to width and height
    is_mirrored: bool  # the display matrix mirrors the image (some front cameras)
    is_variable_frame_rate: bool
    is_interlaced: bool
    has_alpha: bool
    sample_aspect_ratio: Fraction  # width / height of one stored pixel
    bit_depth: int  # bits of one colour channel
    color_transfer: str  # "sdr", "pq" or "hlg"
    codec: str
    pixel_format: str

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for each change that the conversion to upright 8-bit RGB makes."""
        notes = []
        if self.rotation or self.is_mirrored:
            mirrored = " and mirrored" if self.is_mirrored else ""
            notes.append(f"turned {self.rotation} degrees counterclockwise{mirrored}, as the file asks")
        if self.sample_aspect_ratio != 1:
            notes.append(f"{self.sample_aspect_ratio} pixels were resampled to square: {self.width}x{self.height}")
        if self.color_transfer != "sdr":
            name = self.color_transfer.upper()
            notes.append(f"HDR ({name}) video was converted to 8-bit RGB without tone mapping; it may look flat")
        elif self.bit_depth > 8:
            notes.append(f"{self.bit_depth}-bit colours were reduced to 8 bits")
        if self.is_interlaced:
            notes.append("interlaced video was not deinterlaced: moving edges may show combs")
        if self.has_alpha:
            notes.append("transparent parts are shown over white")
        return tuple(notes)


@dataclass(frozen=True, eq=False)
class VideoIndex:
    """A video file's frames in order of presentation, from its packets alone."""

    path: MediaFile
    info: VideoInfo
    stamps: np.ndarray  # int64 [T], presentation stamps in the stream's time base
    times: np.ndarray  # float64 [T], seconds from the first frame
    slack: float  # seconds by which `times` may be late because time stamps are rounded
    keyframes: np.ndarray  # int64 [K], ascending frame numbers where decoding can start; the first is 0
    has_exact_stamps: bool  # decoded frames can be identified by their time stamp
    is_seekable: bool
    orientation: tuple[bool, bool, bool]  # swap axes, then mirror x, then mirror y
    stored_size: tuple[int, int]  # width, height as coded


def probe_video(path: str | Path) -> VideoInfo:
    """Read the properties of a video file, in one pass over its packets and with one decoded frame.

    Raises:
        MediaError: for a file that is missing, empty, a folder, cut short, damaged, an image, or has no video stream.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from omni_video_hf.media import probe_video, save_video
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_video(np.zeros((9, 64, 64, 3), np.uint8), f"{folder}/video.mp4", fps=8)
        ...     probe_video(f"{folder}/video.mp4").num_frames
        9
    """
    return read_index(path).info


def read_index(path: str | Path) -> VideoIndex:
    """Read number, times and geometry of all frames of a video file; for errors see `probe_video`."""
    with opened(path) as file:
        if file.index is None:
            if not file.lower().endswith(".webp"):  # which Pillow reads
                check_pyav()
            check_file(file)
            file.index = _webp_index(file) if is_animated_webp(file) else _read_index(file)
        return file.index


def _read_index(path: MediaFile) -> VideoIndex:
    with open_video(path) as (container, stream):
        _check_ending(path, container.format.name)
        packets = _read_packets(path, container, stream, _stopwatch(path))
        is_seekable = "mov" in container.format.name or "matroska" in container.format.name
        average, tick = stream.average_rate or stream.guessed_rate, float(stream.time_base or 0)
    has_stamps = all(packet[0] is not None for packet in packets)
    if not has_stamps:  # bare streams have no time stamps: one tick per frame
        tick = float(1 / (average or 25))
        packets = [(number, 1, is_key) for number, (_, _, is_key) in enumerate(packets)]
    packets.sort(key=lambda packet: packet[0] or 0)
    stamps = np.array([packet[0] for packet in packets], np.int64)
    timing = _timing(stamps, packets[-1][1], tick, float(average or 0))
    times, slack = _times(stamps, tick, timing)
    has_exact_stamps = has_stamps and len(np.unique(stamps)) == len(stamps)
    info, orientation, stored_size = _probe_first_frame(path, len(stamps), timing)
    keyframes = np.union1d([0], [number for number, packet in enumerate(packets) if packet[2]]).astype(np.int64)
    return VideoIndex(
        path=path,
        info=info,
        stamps=stamps,
        times=times,
        slack=slack,
        keyframes=keyframes,
        has_exact_stamps=has_exact_stamps,
        is_seekable=is_seekable and has_exact_stamps,
        orientation=orientation,
        stored_size=stored_size,
    )


def _webp_index(path: MediaFile) -> VideoIndex:
    """Index of an animated WebP, from the headers of its frames."""
    starts, last, (width, height), has_alpha = webp_header(path)
    stamps = np.array(starts, np.int64)
    timing = _timing(stamps, last, 1e-3, 0.0)
    times, slack = _times(stamps, 1e-3, timing)
    info = VideoInfo(
        width=width,
        height=height,
        fps=timing.fps,
        num_frames=len(starts),
        duration=timing.duration,
        rotation=0,
        is_mirrored=False,
        is_variable_frame_rate=timing.is_variable,
        is_interlaced=False,
        has_alpha=has_alpha,
        sample_aspect_ratio=Fraction(1),
        bit_depth=8,
        color_transfer="sdr",
        codec="webp",
        pixel_format="rgba" if has_alpha else "rgb24",
    )
    return VideoIndex(
        path=path,
        info=info,
        stamps=stamps,
        times=times,
        slack=slack,
        keyframes=np.zeros(1, np.int64),
        has_exact_stamps=False,
        is_seekable=False,
        orientation=(False, False, False),
        stored_size=(width, height),
    )


def decode_frames(index: VideoIndex, wanted: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield `(number, frame)` once for each number in `wanted`; frames are uint8 `[height, width, 3]`, upright RGB.

    The order is nearly always ascending, but callers must not rely on it.

    Raises:
        MediaError: if a selected frame cannot be decoded or is damaged. No frame is replaced or omitted.
    """
    missing = sorted(set(wanted))
    if index.info.codec == "webp":
        yield from webp_frames(index.path, set(missing), _stopwatch(index.path))
        return
    jumps = _groups(index, missing)
    decoded = 0
    # A seek can fail in unusual streams; frames that were not found are decoded again from the beginning.
    # The second pass leaves nothing out, so that its message counts every frame.
    for groups in [jumps, None]:
        if not missing:
            return
        found = set()
        decoded = 0
        for number, frame in _decode(index, groups or [(0, missing)], groups is not None):
            decoded += 1
            if frame is not None:
                found.add(number)
                yield number, frame
        missing = [number for number in missing if number not in found]
    if missing:
        raise MediaError(
            f"{index.path}: the container promises {index.info.num_frames} frames but only {decoded} decode "
            f"(frame {missing[0]} is missing). The file is damaged or starts between key frames; re-encode it."
        )


def _stopwatch(path: str | Path) -> Stopwatch:
    return Stopwatch(lambda reason: MediaError(f"{path}: {reason}"))


def check_pyav() -> None:
    """Raise `ImportError` if PyAV is missing, or is a version that converts HD colours wrongly."""
    if not is_av_available():
        raise ImportError("The package PyAV, which reads and writes videos, is missing: run `pip install av`.")
    if int(av.__version__.split(".")[0]) < 17:
        raise ImportError(
            f"PyAV 17 or later is needed, found {av.__version__}, which converts HD colours wrongly: run "
            "`pip install --upgrade av`."
        )


@contextmanager
def open_video(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """Open a video file and yield `(container, stream)`; errors of FFmpeg become `MediaError`."""
    check_pyav()
    budget = current_budget()
    options = {"format_whitelist": VIDEO_CONTAINERS, "protocol_whitelist": "file"}
    # FFmpeg decodes a frame if the header is incomplete, so the decoder must know the limit before.
    options_of_decoders = {"max_pixels": str(int(budget.max_pixels))}
    with opened(path) as file, file.reading() as source:
        try:
            container = av.open(
                source,
                options=options_of_decoders,
                container_options=options,
                metadata_errors="replace",
                timeout=float(budget.max_seconds),
            )
        except av.error.ExitError as error:  # FFmpeg stopped because of the time limit
            raise _stopwatch(path).overrun_error() from error
        except (av.FFmpegError, OSError, ValueError) as error:
            raise MediaError(f"{path}: {_why_not_opened(path, error)}") from error
        with _errors_of_decoding(path, container) as stream:
            stream.codec_context.options = options_of_decoders
            yield container, stream


@contextmanager
def _errors_of_decoding(path: str | Path, container: Any) -> Iterator[Any]:
    """Yield the video stream of an open container and close it; errors of FFmpeg become `MediaError`."""
    with container:
        streams = [stream for stream in container.streams.video if "attached_pic" not in _disposition(stream)]
        if not streams:
            found = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            raise MediaError(f"{path}: has no video stream (found: {found}); pass a video file.")
        if streams[0].codec_context is None:
            raise MediaError(f"{path}: this FFmpeg does not know its codec; convert the file to H.264 in MP4.")
        if container.metadata.get("major_brand") in PICTURE_BRANDS:
            raise MediaError(
                f"{path}: is a still image (HEIC or AVIF); save it as PNG or JPEG and load it as an image."
            )
        stream = streams[0]
        check_pixels(path, stream.codec_context.width, stream.codec_context.height)
        stream.thread_type = "AUTO"
        try:
            yield stream
        except av.error.ExitError as error:
            raise _stopwatch(path).overrun_error() from error
        except (av.FFmpegError, MemoryError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            if not stream.codec_context.width:  # no frame was decoded, perhaps because of its size
                picture_format(path)  # raises an error for an animation that is too large
                reason += f", or a frame has more than {current_budget().max_pixels:,} pixels"
            raise MediaError(f"{path}: the file is damaged or cut short; the decoder stopped ({reason}).") from error


def _disposition(stream: Any) -> str:
    return str(getattr(stream.disposition, "name", None) or stream.disposition).lower()


def _why_not_opened(path: str | Path, error: Exception) -> str:
    picture = picture_format(path)
    if picture is not None and picture[1] == 1:
        return f"is a still image ({picture[0]}), not a video; use an image task or `load_image`."
    if picture is not None:
        return (
            f"an animated {picture[0]} with {picture[1]} frames cannot be read as a video; convert it to MP4 or GIF."
        )
    reason = getattr(error, "strerror", None) or error
    return (
        f"is not a video of a known format, or is cut short or damaged ({reason}); "
        "play the file to check it, then export it as MP4."
    )


def _check_ending(path: MediaFile, container: str) -> None:
    """Refuse a truncated Matroska, WebM or GIF file, because their demuxers do not report that."""
    head, tail, size = path.ends(4096)
    if "matroska" in container:
        promised = _matroska_size(head)
        if promised is not None and size < promised:
            raise MediaError(
                f"{path}: cut short: the header promises {promised} bytes, the file has {size}; download it again."
            )
    elif container == "gif" and tail[-1:] not in (b"\x3b", b"\x00"):  # the trailer, padded with a zero by some
        raise MediaError(
            f"{path}: cut short: the closing byte of the GIF is missing after {size} bytes; download it again."
        )


def _matroska_size(head: bytes) -> int | None:
    """Return the file size in the EBML header and Segment; `None` if it is unknown (a live recording)."""

    def number(start: int) -> tuple[int | None, int]:  # a variable-length integer and the position after it
        length = 9 - head[start].bit_length()
        value = int.from_bytes(head[start : start + length], "big") & ((1 << 7 * length) - 1)
        return (None if value == (1 << 7 * length) - 1 else value), start + length

    if head[:4] != b"\x1a\x45\xdf\xa3":
        return None
    header, position = number(4)
    position += header or 0
    if head[position : position + 4] != b"\x18\x53\x80\x67" or position + 12 > len(head):
        return None
    segment, position = number(position + 4)
    return None if segment is None else position + segment


def _read_packets(path: str, container: Any, stream: Any, watch: Stopwatch) -> list[tuple[int | None, int, bool]]:
    """Return `(stamp, duration, is_key)` of each shown packet; refuse a file with fewer than its header promises."""
    shown, seen, broken = [], 0, 0
    for packet in watch.each(container.demux(stream)):
        if packet.size == 0 and packet.dts is None:  # the packet with which PyAV marks the end
            continue
        seen += 1
        broken += packet.is_corrupt
        if packet.size and not packet.is_discard:
            stamp = packet.dts if packet.pts is None else packet.pts
            shown.append((stamp, packet.duration or 0, packet.is_keyframe))
    if "mov" in container.format.name:  # noqa: SIM108
        # The number in the header includes frames that an edit list (a trim on a phone) removes.
        promised = len(getattr(stream, "index_entries", ()))
    else:
        promised = stream.frames
    promised = max(promised, seen)
    if container.format.name == "gif" and seen < promised:  # FFmpeg merges images without a duration
        raise MediaError(
            f"{path}: only {seen} of the {promised} frames of the GIF can be read: some are damaged or have no "
            "duration. Save it again with durations, or as MP4."
        )
    if seen - broken < promised:
        raise MediaError(
            f"{path}: the container promises {promised} frames but only {seen - broken} are whole. "
            "The file is cut short or damaged; download it again."
        )
    if not shown:
        raise MediaError(f"{path}: the video stream has no frames.")
    return shown


@dataclass(frozen=True)
class _Timing:
    fps: float
    duration: float  # seconds
    is_variable: bool


def _timing(stamps: np.ndarray, last_duration: int, tick: float, nominal: float) -> _Timing:
    """Frame rate and duration from stamps (int64 `[T]`, ticks of `tick` seconds); `nominal`: header's rate or 0."""
    steps = len(stamps) - 1
    span = int(stamps[-1] - stamps[0])
    if steps == 0 or span == 0:
        duration = last_duration * tick or (1 / nominal if nominal else 1.0)
        return _Timing(fps=len(stamps) / duration, duration=duration, is_variable=False)
    interval = span / steps  # ticks
    off_grid = np.abs(stamps - stamps[0] - interval * np.arange(steps + 1)).max()
    if off_grid > max(1.5, 0.25 * interval):
        duration = (span + (last_duration or float(np.median(np.diff(stamps))))) * tick
        return _Timing(fps=len(stamps) / duration, duration=duration, is_variable=True)
    measured = 1 / (interval * tick)
    # Stamps in milliseconds give 23.98 for 24000/1001: use the more exact rate of the header if both agree.
    fps = nominal if nominal and abs(measured / nominal - 1) < 1.5 / span + 1e-3 else measured
    return _Timing(fps=fps, duration=len(stamps) / fps, is_variable=False)


def _times(stamps: np.ndarray, tick: float, timing: _Timing) -> tuple[np.ndarray, float]:
    """Time of each frame in seconds (float64 `[T]`), exact for a constant rate, and by how much it may be late."""
    if not timing.is_variable:
        return np.arange(len(stamps)) / timing.fps, 0.01 / timing.fps
    return (stamps - stamps[0]) * tick, min(tick, 0.25 / timing.fps)


def _probe_first_frame(
    path: MediaFile, num_frames: int, timing: _Timing
) -> tuple[VideoInfo, tuple[bool, bool, bool], tuple[int, int]]:
    with open_video(path) as (container, stream):
        context = stream.codec_context
        frame = next(_frames(container, stream, _decoder(stream), _stopwatch(path)), None)
        if frame is None:
            raise MediaError(f"{path}: the container promises {num_frames} frames but 0 decode; re-encode the file.")
        orientation = _orientation(path, frame)
        shape = stream.sample_aspect_ratio or Fraction(1)
        width, height = max(1, round(frame.width * shape)), frame.height
        check_pixels(path, width, height)
        if orientation[0]:
            width, height = height, width
        # Mirroring in x after a quarter turn or in both axes is a pure turn; other odd combinations mirror.
        swap, flip_x, flip_y = orientation
        info = VideoInfo(
            width=width,
            height=height,
            fps=timing.fps,
            num_frames=num_frames,
            duration=timing.duration,
            rotation=int(round(frame.rotation / 90) * 90) % 360,
            is_mirrored=swap ^ flip_x ^ flip_y,
            is_variable_frame_rate=timing.is_variable,
            is_interlaced=bool(frame.interlaced_frame),
            has_alpha=_has_alpha(frame),
            sample_aspect_ratio=shape,
            bit_depth=max(component.bits for component in frame.format.components),
            color_transfer=TRANSFERS.get(int(context.color_trc or 0), "sdr"),
            codec=context.name,
            pixel_format=frame.format.name,
        )
        return info, orientation, (frame.width, frame.height)


def _orientation(path: str, frame: Any) -> tuple[bool, bool, bool]:
    """Read the display matrix as (swap axes, then mirror x, then mirror y); only right angles are allowed."""
    data = next((bytes(item) for item in frame.side_data if item.type.name == "DISPLAYMATRIX"), None)
    if data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()  # x' = a x + c y, y' = b x + d y, y pointing down
    swap = abs(b) > abs(a)
    across, x, y = (max(abs(a), abs(d)), c, b) if swap else (max(abs(b), abs(c)), a, d)
    if across > 0.02 * max(abs(x), abs(y), 1):
        raise MediaError(
            f"{path}: its display matrix turns the video by {frame.rotation} degrees; only 0, 90, 180 and 270 are "
            "supported. Re-encode it."
        )
    return swap, x < 0, y < 0


def _has_alpha(frame: Any) -> bool:
    return frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)


def _decoder(stream: Any) -> Any:
    """Return the decoder of the stream, or another one that keeps the alpha channel of a WebM."""
    context = stream.codec_context
    if stream.metadata.get("alpha_mode") != "1" or context.name not in ALPHA_DECODERS:
        return context
    decoder = av.CodecContext.create(ALPHA_DECODERS[context.name], "r")
    decoder.extradata = context.extradata
    decoder.options = context.options
    return decoder


def _frames(
    container: Any, stream: Any, decoder: Any, watch: Stopwatch, needed: set[int] | None = None
) -> Iterator[Any]:
    """Decode frames; with `needed` stamps, others are left out where no frame refers to them."""
    for packet in watch.each(container.demux(stream)):
        if needed is not None:
            decoder.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in needed else "NONREF"
        yield from watch.call(decoder.decode, packet)


def _groups(index: VideoIndex, wanted: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Split ascending frame numbers into groups `(first frame to decode, numbers)` with a seek before each group."""
    starts = index.keyframes[np.searchsorted(index.keyframes, wanted, side="right") - 1]
    groups: list[tuple[int, list[int]]] = [(0, [])]
    position = 0  # the frame the decoder has reached
    for number, start in zip(wanted, starts.tolist(), strict=True):
        if index.is_seekable and start > position + SEEK_GAP:
            groups.append((start, []))
        groups[-1][1].append(number)
        position = number
    return [group for group in groups if group[1]]


def _decode(
    index: VideoIndex, groups: list[tuple[int, list[int]]], may_skip: bool
) -> Iterator[tuple[int, np.ndarray | None]]:
    """Yield the number of every decoded frame, with its RGB (uint8 `[H, W, 3]`) if it is selected, else `None`."""
    numbers = {int(stamp): number for number, stamp in enumerate(index.stamps)} if index.has_exact_stamps else None
    with open_video(index.path) as (container, stream):
        decoder, watch = _decoder(stream), _stopwatch(index.path)
        can_skip = may_skip and index.is_seekable and decoder.name in SKIPPING_CODECS
        for start, group in groups:
            if start:
                container.seek(int(index.stamps[start]), stream=stream)
                decoder.flush_buffers()
            left = set(group)
            needed = {int(index.stamps[number]) for number in group} if can_skip else None
            for count, frame in enumerate(_frames(container, stream, decoder, watch, needed)):
                number = numbers.get(frame.pts, -1) if numbers else count
                yield number, _upright_rgb(index, number, frame) if number in left else None
                left.discard(number)
                if not left:
                    break


def _upright_rgb(index: VideoIndex, number: int, frame: Any) -> np.ndarray:
    """Convert a decoded frame to uint8 `[H, W, 3]` RGB: square pixels, upright, over the background colour."""
    if frame.is_corrupt:
        raise MediaError(f"{index.path}: frame {number} is damaged; download the file again.")
    if (frame.width, frame.height) != index.stored_size:
        before = "x".join(map(str, index.stored_size))
        raise MediaError(
            f"{index.path}: the size changes from {before} to {frame.width}x{frame.height} at frame {number}; "
            "re-encode it at one size."
        )
    swap, flip_x, flip_y = index.orientation
    width = index.info.height if swap else index.info.width
    has_alpha = _has_alpha(frame)
    try:
        # FFmpeg uses matrix and range of the frame; without a tag it assumes BT.601, which most Python tools write.
        pixels = frame.reformat(width=width, format="rgba" if has_alpha else "rgb24", interpolation="BICUBIC")
        pixels = pixels.to_ndarray()
    except av.FFmpegError as error:
        raise MediaError(
            f"{index.path}: colours of the format {frame.format.name}, matrix {int(frame.colorspace)}, cannot be "
            "converted to RGB; re-encode the file as H.264 with BT.709 colours."
        ) from error
    if has_alpha:
        pixels = over_background(pixels)
    if swap:
        pixels = pixels.transpose(1, 0, 2)
    return pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


__all__ = [
    "MediaError",
    "VideoIndex",
    "VideoInfo",
    "check_file",
    "check_pyav",
    "decode_frames",
    "open_video",
    "over_background",
    "picture_format",
    "probe_video",
    "read_index",
]
