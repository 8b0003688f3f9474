"""`Sound`: the sound of a source video, copied or encoded again into a written video."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import is_av_available

from ..video_reader import open_video
from .formats import Container

if is_av_available():
    pass


@dataclass(frozen=True)
class Sound:
    """
    A span of the sound of a video file.

    Args:
        source: file with the sound: path, URL or [`MediaFile`].
        start: seconds from the first picture of the file at which the span begins.
        duration: seconds; by default as long as the written pictures.

    Example:
        >>> from omni_video_hf.media import Sound
        >>> Sound("holiday.mp4", start=2.0).start
        2.0
    """

    source: str | Path
    start: float = 0.0
    duration: float | None = None


class SoundTracks:
    """
    All tracks of sound of a source, on their way into a container that is written.

    Sound is copied without decoding where the container takes its codec, so that it loses nothing; its cut is then at
    the next packet, some 20 milliseconds. Other sound is decoded and encoded.

    Args:
        sound: source and span.
        container: open container to write to, before its first packet.
        kind: format of that container.
    """

    def __init__(self, sound: Sound, container: Any, kind: Container) -> None:
        self.sound, self.container, self.notes = sound, container, list[str]()
        self._stack = ExitStack()
        opened, video = self._stack.enter_context(open_video(sound.source))
        tracks = [stream for stream in opened.streams.audio if stream.codec_context is not None]
        self._origin = float((video.start_time or 0) * video.time_base) + sound.start
        self._targets: dict[int, tuple[Any, bool]] = {}
        if tracks and kind.sound_encoder is None:
            self.notes.append(f"The sound was left out: a {kind.name.upper()} file has none.")
            tracks = []
        for stream in tracks:
            name = stream.codec_context.name
            is_copied = kind.sounds is None or name in kind.sounds
            if is_copied:
                target = container.add_stream_from_template(stream)
            else:
                target = self._encoder(stream, str(kind.sound_encoder))
                self.notes.append(f"The sound ({name}) was encoded again, because {kind.name} files cannot have it.")
            if stream.metadata.get("language"):
                target.metadata["language"] = stream.metadata["language"]
            self._targets[stream.index] = target, is_copied
        self._packets = self._read(opened, tracks) if tracks else iter(())
        self._next = next(self._packets, None)

    def _encoder(self, stream: Any, encoder: str) -> Any:
        context = stream.codec_context
        channels = context.layout.nb_channels
        layout = {1: "mono", 2: "stereo"}.get(channels, context.layout.name if encoder == "aac" else "stereo")
        rate = 48000 if encoder == "libopus" else context.sample_rate
        return self.container.add_stream(encoder, rate=rate, layout=layout)

    def _read(self, opened: Any, tracks: list[Any]) -> Iterator[tuple[float, Any]]:
        """Time from the start of the span, and packet, of all packets in the span."""
        for packet in opened.demux(tracks):
            if packet.pts is None or packet.size == 0:
                continue
            time = float(packet.pts * packet.time_base) - self._origin
            # The first packets of a file are before its start: decoders need them and drop their sound.
            if time >= -1e-6 or (self.sound.start == 0 and time > -1):
                yield time, packet

    def write_until(self, time: float) -> None:
        """Write the sound before `time`, in seconds from the start of the span; call it with growing times."""
        limit = time if self.sound.duration is None else min(time, self.sound.duration)
        while self._next is not None and self._next[0] < limit - 1e-6:
            packet = self._next[1]
            target, is_copied = self._targets[packet.stream.index]
            if is_copied:
                offset = round(self._origin / packet.time_base)
                packet.pts, packet.dts = packet.pts - offset, (packet.dts or packet.pts) - offset
                packet.stream = target
                self.container.mux(packet)
            else:
                self._encode(packet, target)
            self._next = next(self._packets, None)

    def _encode(self, packet: Any, target: Any) -> None:
        for frame in packet.decode():
            if frame.pts is not None:
                frame.pts = max(0, frame.pts - round(self._origin / frame.time_base))
            self.container.mux(target.encode(frame))

    def finish(self) -> None:
        """Write what the encoders still hold, and close the source."""
        for target, is_copied in self._targets.values():
            if not is_copied:
                self.container.mux(target.encode(None))
        self.close()

    def close(self) -> None:
        """Close the source."""
        self._next, self._packets = None, iter(())
        self._stack.close()


__all__ = ["Sound", "SoundTracks"]
