"""Pictures with Pillow: still images, their limits, and frames of animated WebP files, which FFmpeg cannot read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from ..utils.read_budget import Stopwatch, current_budget, how_to_raise
from .download import MediaError, opened

# Colour behind transparent parts of images and videos. Most viewers and papers use white; without a background, the
# hidden colour of transparent pixels would appear, which is often black.
BACKGROUND = (255, 255, 255)

PICTURE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
STRIP = 2**18  # pixels converted at a time, so that a large image is not in memory in several formats at once


def picture_format(path: str | Path) -> tuple[str, int] | None:
    """Return format and number of frames of an image file, from its content; `None` if it is not an image.

    Raises:
        MediaError: if the image has more pixels than the read budget allows.
    """
    try:
        with open_picture(path) as image:
            # The other images in an MPO file of a phone are depth maps and similar data.
            return image.format or "", 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except MediaError:
        raise
    except Exception:  # the readers of Pillow can raise any error on damaged files
        return None


@contextmanager
def open_picture(path: str | Path) -> Iterator[Image.Image]:
    """Open an image of a known format, without decoding it, if the read budget allows its size."""
    Image.init()
    formats = [name for name in PICTURE_FORMATS if name in Image.OPEN]
    with opened(path) as file, file.reading() as stream:
        try:
            image = Image.open(stream, formats=formats)
        except Image.DecompressionBombError as error:
            raise MediaError(f"{path}: {_too_large(error)}") from error
        with image:
            check_pixels(path, *image.size)  # counting the frames of an animation decodes them
            yield image


def check_pixels(path: str | Path, width: int, height: int) -> None:
    """Raise `MediaError` for an image or frame with more pixels than the read budget allows."""
    limit = current_budget().max_pixels
    if width * height > limit:
        raise MediaError(
            f"{path}: has {width}x{height} pixels, more than {limit:,}, and would take too much memory. Save it with "
            "fewer pixels. "
            f"{how_to_raise('max_pixels')}"
        )


def _too_large(error: Exception) -> str:
    """Message for the error of Pillow, which has its own limit of 179 million pixels."""
    found = str(error).partition(", could be")[0]
    reason = found[:1].lower() + found[1:]
    return (
        f"{reason}: it would take too much memory. Save it with fewer pixels. {how_to_raise('max_pixels')} The limit "
        "of Pillow, `PIL.Image.MAX_IMAGE_PIXELS`, must be raised as well."
    )


def over_background(rgba: np.ndarray) -> np.ndarray:
    """Composite uint8 `[..., 4]` RGBA over `BACKGROUND`; returns uint8 `[..., 3]`."""
    flat = rgba.reshape(-1, 4)
    rgb = np.empty((len(flat), 3), np.uint8)
    below = np.array(BACKGROUND, np.uint16)
    for start in range(0, len(flat), STRIP):  # in strips, because the products need twice the memory of the image
        strip = flat[start : start + STRIP]
        if (strip[:, 3] == 255).all():
            rgb[start : start + STRIP] = strip[:, :3]
            continue
        alpha = strip[:, 3:].astype(np.uint16)  # 255 * 255 + 127 fits
        rgb[start : start + STRIP] = (strip[:, :3] * alpha + below * (255 - alpha) + 127) // 255
    return rgb.reshape(*rgba.shape[:-1], 3)


def is_animated_webp(path: str | Path) -> bool:
    """Whether a file is an animated WebP, from its header alone."""
    with opened(path) as file, file.reading() as stream:
        head = stream.read(21)
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and len(head) > 20 and bool(head[20] & 2)


def webp_header(path: str | Path) -> tuple[list[int], int, tuple[int, int], bool]:
    """
    Start of every frame in milliseconds, duration of the last one, size, and whether there are transparent parts.

    Only the headers of the parts are read.

    Raises:
        MediaError: for a file that is damaged or cut short, or has too many pixels.
    """
    stamps, clock, duration, has_alpha = list[int](), 0, 0, False
    size = (0, 0)
    with opened(path) as file, file.reading() as stream:
        end = 8 + int.from_bytes(stream.read(12)[4:8], "little")
        while (position := stream.tell()) + 8 <= end:
            head = stream.read(8)
            length = int.from_bytes(head[4:8], "little")
            body = stream.read(min(length, 16))
            if head[:4] == b"VP8X" and len(body) >= 10:
                width, height = (1 + int.from_bytes(body[start : start + 3], "little") for start in (4, 7))
                size = (width, height)
                has_alpha = bool(body[0] & 16)
                check_pixels(path, *size)
            elif head[:4] == b"ANMF" and len(body) == 16:
                stamps.append(clock)
                duration = int.from_bytes(body[12:15], "little")
                clock += duration
            stream.seek(position + 8 + length + length % 2)
        found = stream.seek(0, 2)
        if found < end or not stamps or not all(size):
            raise MediaError(
                f"{path}: cut short or damaged: the header promises {end} bytes and frames, the file has {found} "
                f"bytes and {len(stamps)} frames; download it again."
            )
    return stamps, duration, size, has_alpha


def webp_frames(path: str | Path, wanted: set[int], watch: Stopwatch) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the wanted frames, ascending, as `(number, uint8 [height, width, 3])` over the background colour."""
    try:
        with open_picture(path) as image:
            for number in range(max(wanted) + 1):  # every frame is drawn over the one before
                watch.call(image.seek, number)
                if number in wanted:
                    yield number, over_background(np.asarray(watch.call(image.convert, "RGBA")))
    except MediaError:
        raise
    except (OSError, EOFError, SyntaxError, ValueError) as error:
        raise MediaError(
            f"{path}: the animated WebP is damaged ({' '.join(str(error).split())}); download it again."
        ) from error
