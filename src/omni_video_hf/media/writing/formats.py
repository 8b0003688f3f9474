"""Formats of video files that can be written: containers, codecs and the scale of quality."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers.utils import is_av_available

from ..download import MediaError

if is_av_available():
    import av

DEFAULT_QUALITY = 65  # CRF 18 of H.264, which hardly anybody tells from the original
PATTERN = re.compile(r"%0?\d*d")  # number of a picture in a name, as in FFmpeg


@dataclass(frozen=True)
class Codec:
    """
    A video codec.

    Args:
        encoder: name of FFmpeg's encoder.
        pixels: pixel format.
        options: options of the encoder for a quality of 0 to 100.
        top_crf: largest CRF, which stands for quality 0; `None` for a codec without CRF.
        tag: code of the codec in MP4 and MOV that players expect.
        min_side: smallest width and height in pixels; the encoder x265 damages memory with smaller frames.
    """

    encoder: str
    pixels: str
    options: Callable[[float], dict[str, str]]
    top_crf: int | None = None
    tag: str | None = None
    min_side: int = 1


@dataclass(frozen=True)
class Container:
    """
    A file format.

    Args:
        name: name of FFmpeg's muxer.
        codecs: names of its video codecs; the first is the default.
        sounds: codecs of sound that are copied; `None` for all.
        sound_encoder: encoder for other sound; `None` for a format without sound.
        options: options of the muxer.
    """

    name: str
    codecs: tuple[str, ...]
    sounds: tuple[str, ...] | None = ()
    sound_encoder: str | None = None
    options: dict[str, str] = field(default_factory=dict)


def _crf(top: int, others: dict[str, str], quality: float) -> dict[str, str]:
    return {"crf": str(round(top * (1 - quality / 100))), **others}


def _prores(quality: float) -> dict[str, str]:
    """Profiles proxy, LT, standard and HQ."""
    return {"profile": str(sum(quality >= limit for limit in (40, 60, 80)))}


def _webp(quality: float) -> dict[str, str]:
    """A scale that gives 65 about the errors of H.264 at 65; 100 is lossless."""
    own = 100 * (1 - (1 - quality / 100) ** 2)
    return {"loop": "0", "lossless": "1"} if quality == 100 else {"loop": "0", "quality": f"{own:.1f}"}


CODECS = {
    "h264": Codec("libx264", "yuv420p", partial(_crf, 51, {}), 51),
    "hevc": Codec("libx265", "yuv420p", partial(_crf, 51, {"x265-params": "log-level=error"}), 51, "hvc1", 64),
    "av1": Codec("libsvtav1", "yuv420p", partial(_crf, 63, {"preset": "8"}), 63),
    "vp9": Codec("libvpx-vp9", "yuv420p", partial(_crf, 63, {"b": "0", "cpu-used": "4", "row-mt": "1"}), 63),
    "prores": Codec("prores_ks", "yuv422p10le", _prores),
    "webp": Codec("libwebp_anim", "bgra", _webp),
    "gif": Codec("gif", "pal8", lambda _: {}),
    "png": Codec("png", "rgb24", lambda _: {}),
}
_MP4_SOUNDS = ("aac", "mp3", "ac3", "eac3", "alac", "opus", "flac")
_MOV_SOUNDS = ("aac", "mp3", "ac3", "alac", "pcm_s16le", "pcm_s16be", "pcm_s24le")
# The index stands at the start of the file, so that browsers play during the download.
_AT_START = {"movflags": "+faststart"}
CONTAINERS = {
    ".mp4": Container("mp4", ("h264", "hevc", "av1", "vp9"), _MP4_SOUNDS, "aac", _AT_START),
    ".mov": Container("mov", ("h264", "hevc", "prores"), _MOV_SOUNDS, "aac", _AT_START),
    ".mkv": Container("matroska", ("h264", "hevc", "av1", "vp9"), None, "libopus"),
    ".webm": Container("webm", ("vp9", "av1"), ("opus", "vorbis"), "libopus"),
    ".gif": Container("gif", ("gif",)),
    ".webp": Container("webp", ("webp",)),
}
PICTURES = Container("png", ("png",))
VIDEO_SUFFIXES = tuple(CONTAINERS)


def is_pattern(path: Path) -> bool:
    """Whether a path is a pattern of numbered PNG files, such as `frame-%04d.png`."""
    return path.suffix.lower() == ".png" and PATTERN.search(path.name) is not None


def container_of(path: Path) -> Container:
    """
    Format of a path: of its suffix; a pattern such as `%04d.png`, or a name without a suffix, are PNG files.

    Raises:
        MediaError: for another suffix.
    """
    if is_pattern(path) or not path.suffix:
        return PICTURES
    if path.suffix.lower() not in CONTAINERS:
        raise MediaError(
            f"{path}: the suffix of a video must be one of {', '.join(CONTAINERS)}; a pattern such as frame-%04d.png "
            "or the name of a new folder write PNG files."
        )
    return CONTAINERS[path.suffix.lower()]


def codec_of(path: Path, codec: str | None = None) -> Codec:
    """
    The codec for a path, by default the first of its format.

    Raises:
        MediaError: for a codec that the format does not take or this PyAV has no encoder for; the message lists the
            available ones.
    """
    container = container_of(path)
    available = [name for name in container.codecs if has_encoder(CODECS[name].encoder)]
    name = container.codecs[0] if codec is None else codec.lower()
    if name not in available:
        why = "this PyAV has no encoder for it" if name in container.codecs else "the format does not take it"
        raise MediaError(
            f"`codec` is {name!r}, but {why}: {path.suffix or 'a folder'} can be written with "
            f"{', '.join(available) or 'nothing here'}."
        )
    return CODECS[name]


def has_encoder(name: str) -> bool:
    """Whether this PyAV has an encoder."""
    try:
        av.codec.Codec(name, "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def encoder_options(path: Path, codec: Codec, quality: float | None, crf: int | None) -> dict[str, str]:
    """
    Options of the encoder.

    Args:
        path: file, for messages.
        codec: of [`codec_of`].
        quality: 0, the smallest file, to 100, lossless or nearly. 65 by default.
        crf: CRF of the encoder instead of `quality`.

    Raises:
        MediaError: for both, a value out of range, and a codec that has no such scale.
    """
    if quality is not None and crf is not None:
        raise MediaError(f"`quality` {quality} and `crf` {crf} set the same thing: pass one of them.")
    if crf is not None:
        if codec.top_crf is None:
            raise MediaError(f"`crf` {crf}: {path.suffix or 'PNG'} files with {codec.encoder} have no CRF.")
        if not 0 <= crf <= codec.top_crf:
            raise MediaError(f"`crf` must be 0 to {codec.top_crf} for {codec.encoder}, got {crf}.")
        return {**codec.options(DEFAULT_QUALITY), "crf": str(crf)}
    if quality is not None and not codec.options(DEFAULT_QUALITY):
        raise MediaError(
            f"`quality` {quality}: {codec.encoder} has no scale of quality, every file has the same: leave it out."
        )
    if quality is not None and not 0 <= quality <= 100:
        raise MediaError(f"`quality` must be 0 to 100, got {quality}.")
    return codec.options(DEFAULT_QUALITY if quality is None else quality)


__all__ = ["DEFAULT_QUALITY", "VIDEO_SUFFIXES", "Codec", "Container", "codec_of", "container_of", "encoder_options"]
