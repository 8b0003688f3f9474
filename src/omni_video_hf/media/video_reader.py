"""Reads video files with PyAV: what a file holds, and chosen frames of it as upright 8-bit RGB.

A file is read in two passes. The first takes only the compressed packets: their number and time stamps are the facts
everything else rests on, headers being often wrong, and a file that is cut short is refused here. The second decodes,
jumping to the key frame before each wanted frame where that saves work, and holds one frame at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.utils import is_av_available

from ..utils.read_budget import Stopwatch, current_budget, how_to_raise

if is_av_available():
    import av

# Transparent parts of pictures and videos are shown over this colour. White is what most viewers and papers do;
# dropping the alpha channel would bring up whatever lies under it, often black.
BACKGROUND = (255, 255, 255)

# Demuxers that may be opened. Without a list, FFmpeg also takes text, still pictures and playlists, and a playlist can
# make it read other files and addresses. The last four hold sound only: they are here for a clear error.
VIDEO_CONTAINERS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,gif,apng,asf,ogg,nut,mxf,ivf,h264,hevc,m4v,yuv4mpegpipe,"
    "wav,mp3,flac,aac"
)
PICTURE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
PICTURE_BRANDS = ("avif", "heic", "heix", "mif1")  # pictures in the container of MP4

TRANSFERS = {16: "pq", 18: "hlg"}  # codes of ITU-T H.273; all others are standard dynamic range
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own VP8 and VP9 decoders drop the alpha channel
STRIP = 2**18  # pixels converted at a time, so that a large picture is not held in several formats at once
SEEK_GAP = 16  # frames; a shorter way to the next key frame is decoded through, since a jump restarts the decoder


class MediaError(ValueError):
    """A picture or video cannot be read, written or used as asked; one line says what was found and what to do."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds. Sizes are those of the upright picture with square pixels."""

    width: int  # pixels, after rotation and with square pixels
    height: int  # pixels
    fps: float  # frames per second; the average when the rate varies
    num_frames: int  # counted packets that are shown, not the header's number
    duration: float  # seconds, first frame's start to last frame's end
    rotation: int  # 0, 90, 180 or 270 degrees counterclockwise, already applied to width and height
    is_mirrored: bool  # the file asks for a mirrored picture (some front cameras)
    is_variable_frame_rate: bool
    is_interlaced: bool
    has_alpha: bool
    sample_aspect_ratio: Fraction  # width / height of one stored pixel
    bit_depth: int  # of one colour channel
    color_transfer: str  # "sdr", "pq" or "hlg"
    codec: str
    pixel_format: str

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for each thing that reading the file as upright 8-bit RGB changes."""
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

    path: Path
    info: VideoInfo
    stamps: np.ndarray  # int64 [T], presentation stamps in the stream's time base
    times: np.ndarray  # float64 [T], seconds from the first frame
    slack: float  # seconds by which `times` may be late because stamps are rounded
    keyframes: np.ndarray  # int64 [K], ascending frame numbers where decoding can start; the first is 0
    has_exact_stamps: bool  # decoded frames can be told by their stamp
    is_seekable: bool
    orientation: tuple[bool, bool, bool]  # swap axes, then mirror x, then mirror y
    stored_size: tuple[int, int]  # width, height as coded


def probe_video(path: str | Path) -> VideoInfo:
    """Say what a video file holds: one pass over its packets and one decoded frame.

    Raises:
        MediaError: the file is missing, empty, a folder, cut short, damaged, a picture, or has no video stream.

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
    """Count and time all frames of a video file and learn their geometry; errors as `probe_video`."""
    path = Path(path)
    with open_video(path) as (container, stream):
        _check_ending(path, container.format.name)
        packets = _read_packets(path, container, stream, _stopwatch(path))
        is_seekable = "mov" in container.format.name or "matroska" in container.format.name
        average, tick = stream.average_rate or stream.guessed_rate, float(stream.time_base or 0)
    has_stamps = all(packet[0] is not None for packet in packets)
    if not has_stamps:  # bare streams carry no times: one tick a frame
        tick = float(1 / (average or 25))
        packets = [(number, 1, is_key) for number, (_, _, is_key) in enumerate(packets)]
    packets.sort(key=lambda packet: packet[0] or 0)
    stamps = np.array([packet[0] for packet in packets], np.int64)
    timing = _timing(stamps, packets[-1][1], tick, float(average or 0))
    times, slack = _times(stamps, tick, timing)
    has_exact_stamps = has_stamps and len(np.unique(stamps)) == len(stamps)
    info, orientation, stored_size = _look_at_first_frame(path, len(stamps), timing)
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


def decode_frames(index: VideoIndex, wanted: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield `(number, frame)` once for each wanted frame number; frame is uint8 [H, W, 3], upright RGB.

    Numbers nearly always come in ascending order, but a caller must not count on it.

    Raises:
        MediaError: a wanted frame does not decode or is damaged. No frame is ever made up or left out.
    """
    missing = sorted(set(wanted))
    jumps = _groups(index, missing)
    decoded = 0
    # A jump can land badly in unusual streams; what it did not find is looked for again from the beginning.
    for groups in [jumps, None] if jumps[0][0] or len(jumps) > 1 else [None]:
        if not missing:
            return
        found = set()
        decoded = 0
        for number, frame in _decode(index, groups or [(0, missing)]):
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


def picture_format(path: Path) -> tuple[str, int] | None:
    """Return the format and number of frames of a picture file, judged by its content; None if it is no picture.

    Raises:
        MediaError: the picture has more pixels than the read budget allows.
    """
    try:
        with open_picture(path) as image:
            # The further pictures in a phone's MPO are depth maps and the like.
            return image.format or "", 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except MediaError:
        raise
    except Exception:  # Pillow's readers raise anything on damaged files
        return None


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """Open a picture of a known format whose pixels the read budget allows; nothing is decoded yet."""
    Image.init()
    try:
        image = Image.open(path, formats=[name for name in PICTURE_FORMATS if name in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise MediaError(f"{path}: {_too_large(error)}") from error
    with image:
        check_pixels(path, *image.size)  # counting the frames of an animation decodes them
        yield image


def check_pixels(path: Path, width: int, height: int) -> None:
    """Raise `MediaError` for a picture or frame with more pixels than the read budget allows."""
    limit = current_budget().max_pixels
    if width * height > limit:
        raise MediaError(
            f"{path}: has {width}x{height} pixels, more than {limit:,}: it takes too much memory. Save it smaller. "
            f"{how_to_raise('max_pixels')}"
        )


def _too_large(error: Exception) -> str:
    """Pillow's own refusal, which comes with the budget's default only from 179 million pixels on."""
    found = str(error).partition(", could be")[0]
    reason = found[:1].lower() + found[1:]
    return (
        f"{reason}: it takes too much memory. Save it smaller. {how_to_raise('max_pixels')} Pillow has a limit of its "
        "own, `PIL.Image.MAX_IMAGE_PIXELS`, which must be raised, too."
    )


def _stopwatch(path: Path) -> Stopwatch:
    return Stopwatch(lambda reason: MediaError(f"{path}: {reason}"))


def check_file(path: Path) -> None:
    """Raise `MediaError` unless `path` is a file with something in it."""
    if path.is_dir():
        raise MediaError(f"{path}: is a folder; give the path of one picture or video file.")
    if not path.exists():
        raise MediaError(f"{path}: no such file.")
    if not path.is_file():  # opening a pipe waits for its writer, and a device may never end
        raise MediaError(f"{path}: is a pipe or a device; save its content as a file first.")
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: the file is empty (0 bytes); download or export it again.")


def check_pyav() -> None:
    """Refuse to go on without PyAV, or with one that converts HD colours wrongly."""
    if not is_av_available():
        raise ImportError("Videos are read and written with the package PyAV, which is missing: `pip install av`.")
    if int(av.__version__.split(".")[0]) < 17:
        raise ImportError(
            f"PyAV 17 or later is needed, found {av.__version__}, which converts HD colours wrongly: "
            "`pip install --upgrade av`."
        )


def over_background(rgba: np.ndarray) -> np.ndarray:
    """Composite uint8 [..., 4] RGBA over `BACKGROUND`; returns uint8 [..., 3]."""
    flat = rgba.reshape(-1, 4)
    rgb = np.empty((len(flat), 3), np.uint8)
    below = np.array(BACKGROUND, np.uint16)
    for start in range(0, len(flat), STRIP):  # the products take twice the memory of the picture
        strip = flat[start : start + STRIP]
        if (strip[:, 3] == 255).all():
            rgb[start : start + STRIP] = strip[:, :3]
            continue
        alpha = strip[:, 3:].astype(np.uint16)  # 255 * 255 + 127 fits
        rgb[start : start + STRIP] = (strip[:, :3] * alpha + below * (255 - alpha) + 127) // 255
    return rgb.reshape(*rgba.shape[:-1], 3)


@contextmanager
def open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a local video file; yields `(container, stream)` and turns FFmpeg's errors into `MediaError`."""
    check_pyav()
    check_file(path)
    budget = current_budget()
    options = {"format_whitelist": VIDEO_CONTAINERS, "protocol_whitelist": "file"}
    # FFmpeg decodes a frame to learn what the header does not say: the decoder must know the limit by then.
    options_of_decoders = {"max_pixels": str(int(budget.max_pixels))}
    try:
        container = av.open(
            f"file:{path}",
            options=options_of_decoders,
            container_options=options,
            metadata_errors="replace",
            timeout=float(budget.max_seconds),
        )
    except av.error.ExitError as error:  # FFmpeg looked at the time while it read
        raise _stopwatch(path).overrun_error() from error
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{path}: {_why_not_opened(path, error)}") from error
    with container:
        streams = [stream for stream in container.streams.video if "attached_pic" not in _disposition(stream)]
        if not streams:
            found = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            raise MediaError(f"{path}: has no video stream (found: {found}); give a file with pictures in it.")
        if streams[0].codec_context is None:
            raise MediaError(f"{path}: its codec is not known to this FFmpeg; convert it to H.264 in MP4.")
        if container.metadata.get("major_brand") in PICTURE_BRANDS:
            raise MediaError(
                f"{path}: is a still picture (HEIC or AVIF); save it as PNG or JPEG and load it as image."
            )
        stream = streams[0]
        check_pixels(path, stream.codec_context.width, stream.codec_context.height)
        stream.thread_type = "AUTO"
        stream.codec_context.options = options_of_decoders
        try:
            yield container, stream
        except av.error.ExitError as error:
            raise _stopwatch(path).overrun_error() from error
        except (av.FFmpegError, MemoryError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            if not stream.codec_context.width:  # unknown: no frame was decoded, perhaps because of its size
                picture_format(path)  # says so of animations
                reason += f", or a frame has more than {budget.max_pixels:,} pixels"
            raise MediaError(f"{path}: the file is damaged or cut short; the decoder stopped ({reason}).") from error


def _disposition(stream: Any) -> str:
    return str(getattr(stream.disposition, "name", None) or stream.disposition).lower()


def _why_not_opened(path: Path, error: Exception) -> str:
    picture = picture_format(path)
    if picture is not None and picture[1] == 1:
        return f"is a still picture ({picture[0]}), not a video; use an image task or `load_image`."
    if picture is not None:
        return f"animated {picture[0]} with {picture[1]} frames cannot be read as a video; convert it to MP4 or GIF."
    reason = getattr(error, "strerror", None) or error
    return (
        f"is not a video this reader knows, or it is cut short or damaged ({reason}); "
        "play the file to check it, then export it as MP4."
    )


def _check_ending(path: Path, container: str) -> None:
    """Refuse a Matroska, WebM or GIF file that is shorter than it says, which their demuxers pass over in silence."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if "matroska" in container:
            promised = _matroska_size(file.read(4096))
            if promised is not None and size < promised:
                raise MediaError(f"{path}: cut short: {promised} bytes are promised, {size} are there; get it again.")
        elif container == "gif":
            file.seek(-1, 2)
            if file.read(1) not in (b"\x3b", b"\x00"):  # the trailer, which some writers pad with a zero
                raise MediaError(
                    f"{path}: cut short: the GIF's closing byte is missing after {size} bytes; get it again."
                )


def _matroska_size(head: bytes) -> int | None:
    """Return the file size that an EBML header and Segment promise; None when unknown (a live recording)."""

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


def _read_packets(path: Path, container: Any, stream: Any, watch: Stopwatch) -> list[tuple[int | None, int, bool]]:
    """Return (stamp, duration, is key) of each packet that is shown; refuse a file with fewer than it promises."""
    shown, seen, broken = [], 0, 0
    for packet in watch.each(container.demux(stream)):
        if packet.size == 0 and packet.dts is None:  # PyAV's mark of the end
            continue
        seen += 1
        broken += packet.is_corrupt
        if packet.size and not packet.is_discard:
            stamp = packet.dts if packet.pts is None else packet.pts
            shown.append((stamp, packet.duration or 0, packet.is_keyframe))
    if "mov" in container.format.name:  # noqa: SIM108
        # The header's own count also holds frames that an edit list (a trim on a phone) has cut away.
        promised = len(getattr(stream, "index_entries", ()))
    else:
        promised = stream.frames
    promised = max(promised, seen)
    if container.format.name == "gif" and seen < promised:  # FFmpeg joins pictures that have no time of their own
        raise MediaError(
            f"{path}: only {seen} of the GIF's {promised} frames can be read: some have no duration, or damage. "
            "Save it again with durations, or as MP4."
        )
    if seen - broken < promised:
        raise MediaError(
            f"{path}: the container promises {promised} frames but only {seen - broken} are whole. "
            "The file is cut short or damaged; get it again."
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
    """Rate and duration from stamps (int64 [T], ticks of `tick` seconds); nominal is the header's rate or 0."""
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
    # Stamps in milliseconds give 23.98 for 24000/1001: the header's rate is the better one where both agree.
    fps = nominal if nominal and abs(measured / nominal - 1) < 1.5 / span + 1e-3 else measured
    return _Timing(fps=fps, duration=len(stamps) / fps, is_variable=False)


def _times(stamps: np.ndarray, tick: float, timing: _Timing) -> tuple[np.ndarray, float]:
    """Each frame's time in seconds (float64 [T]), and by how much it may be late; a constant rate is made exact."""
    if not timing.is_variable:
        return np.arange(len(stamps)) / timing.fps, 0.01 / timing.fps
    return (stamps - stamps[0]) * tick, min(tick, 0.25 / timing.fps)


def _look_at_first_frame(
    path: Path, num_frames: int, timing: _Timing
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


def _orientation(path: Path, frame: Any) -> tuple[bool, bool, bool]:
    """Read the display matrix as (swap axes, then mirror x, then mirror y); only right angles are allowed."""
    data = next((bytes(item) for item in frame.side_data if item.type.name == "DISPLAYMATRIX"), None)
    if data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()  # x' = a x + c y, y' = b x + d y, y pointing down
    swap = abs(b) > abs(a)
    across, x, y = (max(abs(a), abs(d)), c, b) if swap else (max(abs(b), abs(c)), a, d)
    if across > 0.02 * max(abs(x), abs(y), 1):
        raise MediaError(
            f"{path}: is to be shown turned by {frame.rotation} degrees; only 0, 90, 180 and 270 are read. "
            "Re-encode it."
        )
    return swap, x < 0, y < 0


def _has_alpha(frame: Any) -> bool:
    return frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)


def _decoder(stream: Any) -> Any:
    """Return the stream's decoder, or one that keeps the alpha channel of a WebM."""
    context = stream.codec_context
    if stream.metadata.get("alpha_mode") != "1" or context.name not in ALPHA_DECODERS:
        return context
    decoder = av.CodecContext.create(ALPHA_DECODERS[context.name], "r")
    decoder.extradata = context.extradata
    decoder.options = context.options
    return decoder


def _frames(container: Any, stream: Any, decoder: Any, watch: Stopwatch) -> Iterator[Any]:
    for packet in watch.each(container.demux(stream)):
        yield from watch.call(decoder.decode, packet)


def _groups(index: VideoIndex, wanted: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Split ascending frame numbers into runs `(frame to start decoding at, numbers)`, a jump before each."""
    starts = index.keyframes[np.searchsorted(index.keyframes, wanted, side="right") - 1]
    groups: list[tuple[int, list[int]]] = [(0, [])]
    position = 0  # the frame the decoder has reached
    for number, start in zip(wanted, starts.tolist(), strict=True):
        if index.is_seekable and start > position + SEEK_GAP:
            groups.append((start, []))
        groups[-1][1].append(number)
        position = number
    return [group for group in groups if group[1]]


def _decode(index: VideoIndex, groups: list[tuple[int, list[int]]]) -> Iterator[tuple[int, np.ndarray | None]]:
    """Yield every decoded frame's number, with its RGB (uint8 [H, W, 3]) where wanted and None elsewhere."""
    numbers = {int(stamp): number for number, stamp in enumerate(index.stamps)} if index.has_exact_stamps else None
    with open_video(index.path) as (container, stream):
        decoder, watch = _decoder(stream), _stopwatch(index.path)
        for start, group in groups:
            if start:
                container.seek(int(index.stamps[start]), stream=stream)
                decoder.flush_buffers()
            left = set(group)
            for count, frame in enumerate(_frames(container, stream, decoder, watch)):
                number = numbers.get(frame.pts, -1) if numbers else count
                yield number, _upright_rgb(index, number, frame) if number in left else None
                left.discard(number)
                if not left:
                    break


def _upright_rgb(index: VideoIndex, number: int, frame: Any) -> np.ndarray:
    """Return one decoded frame as uint8 [H, W, 3] RGB: square pixels, upright, over the background."""
    if frame.is_corrupt:
        raise MediaError(f"{index.path}: frame {number} is damaged; get the file again.")
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
        # FFmpeg follows the matrix and range in the frame; without a tag it takes BT.601, as most Python tools write.
        pixels = frame.reformat(width=width, format="rgba" if has_alpha else "rgb24", interpolation="BICUBIC")
        pixels = pixels.to_ndarray()
    except av.FFmpegError as error:
        raise MediaError(
            f"{index.path}: colours of the kind {frame.format.name}, matrix {int(frame.colorspace)}, cannot be "
            "converted to RGB; re-encode as H.264 with BT.709 colours."
        ) from error
    if has_alpha:
        pixels = over_background(pixels)
    if swap:
        pixels = pixels.transpose(1, 0, 2)
    return pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
