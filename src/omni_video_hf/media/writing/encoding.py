"""Encoding of frames into a container with PyAV: colours, time stamps, sound, palettes and the record."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.utils import is_av_available

from ..video_reader import open_video
from .record import add_gif_comment, add_webp_exif, set_last_duration
from .sound import SoundTracks

if TYPE_CHECKING:
    from ..video_writer import VideoWriter

if is_av_available():
    import av
    from av.video.reformatter import ColorRange, Colorspace

BT709, BT601_PAL, BT601_NTSC = 1, 5, 6  # codes of ITU-T H.273; older PyAV has no names for some of them
LIMITED, FULL = 1, 2  # codes of colour ranges in FFmpeg
FINE_TICK = Fraction(1, 90_000)  # seconds; time stamps of a variable frame rate


@dataclass(frozen=True)
class Colours:
    """Tags of a video's colours, as codes of ITU-T H.273, and its range (1 limited, 2 full)."""

    matrix: int
    primaries: int
    transfer: int
    range: int


BT709_COLOURS = Colours(BT709, BT709, BT709, LIMITED)


def colours_of(path: str | Path) -> Colours:
    """
    Colour tags of a video file that a copy of it can have; those of BT.709 for a file without tags.

    HDR and rare matrices become BT.709, because frames are read as 8-bit RGB.
    """
    with open_video(path) as (_, stream):
        context = stream.codec_context
        found = [int(getattr(context, name)) for name in ("colorspace", "color_primaries", "color_trc")]
        matrix, primaries, transfer = found
        is_full = int(context.color_range) == FULL
    if matrix not in (BT709, BT601_PAL, BT601_NTSC) or not 1 <= primaries <= 7 or transfer not in (1, 4, 5, 6, 7, 13):
        return BT709_COLOURS
    return Colours(matrix, primaries, transfer, FULL if is_full else LIMITED)


class ContainerEncoder:
    """
    An open container with one video stream, and the sound of a source.

    Args:
        writer: settings of the file.
        path: file to write to.
        size: width and height of the frames in pixels.
        has_times: whether frames come with times, for a variable frame rate.
    """

    def __init__(self, writer: "VideoWriter", path: Path, size: tuple[int, int], has_times: bool) -> None:
        self.writer, self.path, self.has_times = writer, path, has_times
        self.count, self.end = 0, 0.0
        self._durations: dict[int, int] = {}  # ticks, by time stamp; encoders forget them
        self._stack = ExitStack()
        self.is_subsampled = "420" in writer.codec.pixels or "422" in writer.codec.pixels
        self.odd = (size[1] % 2, size[0] % 2) if self.is_subsampled else (0, 0)
        self.size = (size[0] + self.odd[1], size[1] + self.odd[0])
        self.sound: SoundTracks | None = None

    def __enter__(self) -> "ContainerEncoder":
        writer = self.writer
        self.container: Any = self._stack.enter_context(
            av.open(str(self.path), "w", format=writer.container.name, options=writer.container.options)
        )
        if writer.comment is not None:
            self.container.metadata["comment"] = writer.comment
        self.stream = stream = self._new_stream()
        stream.width, stream.height = self.size
        stream.pix_fmt = writer.codec.pixels
        stream.options = writer.options
        if writer.codec.tag is not None and writer.container.name in ("mp4", "mov"):
            stream.codec_context.codec_tag = writer.codec.tag
        if self.has_times:
            stream.codec_context.time_base = self._tick()
        if self.is_subsampled:
            self._set_colours(stream.codec_context)
        self.graph = _palette_graph(self.size) if writer.codec.pixels == "pal8" else None
        if writer.sound is not None:
            self.sound = SoundTracks(writer.sound, self.container, writer.container)
            self._stack.callback(self.sound.close)
            writer.notes += self.sound.notes
        return self

    def _new_stream(self) -> Any:
        return self.container.add_stream(self.writer.codec.encoder, rate=self.writer.rate)

    def _tick(self) -> Fraction:
        return {"gif": Fraction(1, 100), "webp": Fraction(1, 1000)}.get(self.writer.container.name, FINE_TICK)

    def _set_colours(self, context: Any) -> None:
        colours = self.writer.colours
        context.color_range = ColorRange.JPEG if colours.range == FULL else ColorRange.MPEG
        context.colorspace = colours.matrix
        context.color_primaries, context.color_trc = colours.primaries, colours.transfer

    def add(self, picture: np.ndarray, time: float | None, duration: float | None) -> None:
        """Encode a picture, uint8 `[height, width, 3]`, and the sound before it."""
        frame = self._frame(picture)
        if time is None:
            frame.pts, frame.time_base = self.count, 1 / self.writer.rate
            self.end = float((self.count + 1) / self.writer.rate)
        else:
            tick = self._tick()
            frame.pts, frame.time_base = round(time / tick), tick
            self._shown = shown = duration or float(1 / self.writer.rate)
            self._durations[frame.pts] = max(1, round(shown / tick))
            self.end = time + shown
        self.count += 1
        for ready in [frame] if self.graph is None else _through(self.graph, frame):
            self._encode(ready)
        if self.sound is not None:
            self.sound.write_until(self.end)

    def _encode(self, frame: Any) -> None:
        for packet in self.stream.encode(frame):
            packet.duration = self._durations.pop(packet.pts, packet.duration)
            self.container.mux(packet)

    def _frame(self, picture: np.ndarray) -> Any:
        if any(self.odd):
            picture = np.pad(picture, ((0, self.odd[0]), (0, self.odd[1]), (0, 0)), "edge")
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        if not self.is_subsampled:
            return frame if self.graph is not None else frame.reformat(format=self.writer.codec.pixels)
        colours = self.writer.colours
        return frame.reformat(
            format=self.writer.codec.pixels,
            dst_colorspace=Colorspace.ITU709 if colours.matrix == BT709 else Colorspace.ITU601,
            dst_color_range=ColorRange.JPEG if colours.range == FULL else ColorRange.MPEG,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with self._stack:
                self._finish()
            if self.has_times and self.writer.container.name == "webp":
                set_last_duration(self.path, self._shown)
            if self.writer.comment is not None:
                record = {"gif": add_gif_comment, "webp": add_webp_exif}.get(self.writer.container.name)
                if record is not None:
                    record(self.path, self.writer.comment)
        else:
            self._stack.__exit__(kind, error, trace)

    def _finish(self) -> None:
        if self.graph is not None:
            for frame in _through(self.graph, None):
                self._encode(frame)
        self._encode(None)
        if self.sound is not None:
            self.sound.write_until(self.end)
            self.sound.finish()


def _palette_graph(size: tuple[int, int]) -> Any:
    """Filters that give every frame of a GIF its own palette of 256 colours."""
    graph: Any = av.filter.Graph()
    source = graph.add_buffer(width=size[0], height=size[1], format="rgb24", time_base=Fraction(1, 100))
    split, palette = graph.add("split"), graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
    use, sink = graph.add("paletteuse", "new=1:dither=sierra2_4a"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph


def _through(graph: Any, frame: Any) -> Iterator[Any]:
    """Push a frame, or the end, into a graph of filters, and yield what comes out."""
    if frame is not None:
        frame.pts, frame.time_base = round(frame.pts * frame.time_base * 100), Fraction(1, 100)
    graph.push(frame)
    while True:
        try:
            yield graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return


__all__ = ["BT709_COLOURS", "Colours", "ContainerEncoder", "colours_of"]
