"""Reading and writing of images, and contact sheets of videos."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from ..utils.files import complete_or_absent
from .animation import BACKGROUND, STRIP, open_picture, over_background, picture_format
from .arrays import to_uint8_rgb
from .clip import VideoClip
from .download import MediaError, check_file, opened

IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


METADATA_KEY = "omni_video"  # key of the JSON record that says how a file was generated
MAX_EXIF_BYTES = 60_000  # JPEG allows 64 kB; PNG, WebP and mp4 can store more


def load_image(source: Any) -> Image.Image:
    """
    Load an image as upright RGB.

    Args:
        source: path, URL, PIL image of any mode, or an array or tensor `[height, width]`, `[height, width, 1, 3 or 4]`
            or `[1, 3 or 4, height, width]`, uint8 or float in 0..1. Transparent parts become white.

    Raises:
        MediaError: if the source cannot be read as one image.

    Example:
        >>> import numpy as np
        >>> from omni_video_hf.media import load_image
        >>> load_image(np.zeros((48, 64, 3), np.uint8)).size
        (64, 48)
    """
    if isinstance(source, Image.Image):
        return _without_alpha(ImageOps.exif_transpose(source))
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return Image.fromarray(to_uint8_rgb(source, "image", 2))
    if not isinstance(source, (str, Path)):
        raise MediaError(f"An image must be a path, URL, PIL image, array or tensor, got {type(source).__name__}.")
    with opened(source) as path:
        check_file(path)
        found = picture_format(path)
        if found is None:
            raise MediaError(f"{source}: is not an image that can be read (PNG, JPEG, WebP, GIF, BMP, TIFF ...).")
        if found[1] > 1:
            raise MediaError(f"{source}: contains {found[1]} images; pass a single image, or use it as a video.")
        try:
            with open_picture(path) as image:
                ImageOps.exif_transpose(image, in_place=True)
                return _without_alpha(image)
        except Exception as error:  # the readers of Pillow can raise any error on damaged files
            raise MediaError(
                f"{source}: the image is damaged or cut short ({error}). Download or export it again."
            ) from error


def save_image(
    image: Image.Image | np.ndarray | torch.Tensor, path: str | Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """
    Write an image atomically.

    Args:
        image: image as in [`load_image`].
        path: file to write; its suffix (.png .jpg .jpeg .webp) determines the format.
        metadata: record of how the image was generated, such as `settings` of the pipeline's output; plain values. It
            is stored as text in a PNG and as EXIF description in other formats; a JPEG stores up to 60,000 bytes.

    Raises:
        MediaError: for another suffix, values that are not an image, or metadata that are too long or not JSON.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from omni_video_hf.media import load_image, save_image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_image(Image.new("RGB", (64, 48)), f"{folder}/image.png")
        ...     load_image(f"{folder}/image.png").size
        (64, 48)
    """
    path = Path(path)
    if path.suffix.lower() not in IMAGE_FORMATS:
        raise MediaError(f"{path}: the suffix of an image must be one of {', '.join(IMAGE_FORMATS)}.")
    picture, kind = load_image(image), IMAGE_FORMATS[path.suffix.lower()]
    options: dict[str, Any] = {"quality": 95}
    if metadata is not None:
        text = metadata_text(metadata)
        if kind == "JPEG" and len(text) > MAX_EXIF_BYTES:
            raise MediaError(
                f"{path}: `metadata` has {len(text)} bytes, but a JPEG stores up to {MAX_EXIF_BYTES}. Write a PNG."
            )
        if kind == "PNG":
            options["pnginfo"] = PngImagePlugin.PngInfo()
            options["pnginfo"].add_itxt(METADATA_KEY, text)
        else:
            options["exif"] = Image.Exif()
            options["exif"][ExifTags.Base.ImageDescription] = text
    with output_file(path) as partial:
        picture.save(partial, format=kind, **options)


def _without_alpha(image: Image.Image) -> Image.Image:
    """Convert an upright image of any mode to RGB."""
    if image.mode == "F":
        return Image.fromarray(to_uint8_rgb(np.asarray(image), "image", 2))
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
        for upper in range(0, image.height, rows):
            part = image.crop((0, upper, image.width, min(upper + rows, image.height))).convert("RGBA")
            shown.paste(Image.fromarray(over_background(np.asarray(part))), (0, upper))
        return shown
    return image.convert("RGB")


def metadata_text(metadata: Mapping[str, Any]) -> str:
    """Encode metadata as one line of ASCII, which every format preserves."""
    try:
        return json.dumps({METADATA_KEY: dict(metadata)}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise MediaError(f"`metadata` must contain only values that JSON can represent ({error}).") from error


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path for an output file, see [`complete_or_absent`]; the folder of `path` must exist."""
    if not path.parent.is_dir():
        raise MediaError(f"{path}: the folder {path.parent} does not exist.")
    if path.is_dir():
        raise MediaError(f"{path}: is a folder; pass the path of a file.")
    with complete_or_absent(path) as partial:
        yield partial


def contact_sheet(frames: Any, columns: int | None = None, max_frames: int = 8) -> Image.Image:
    """
    Arrange frames of a video in a grid.

    Args:
        frames: a [`VideoClip`], or frames as in [`load_video`].
        columns: number of columns; by default all frames are in one row.
        max_frames: maximum number of frames, selected at equal distances.

    Example:
        >>> import numpy as np
        >>> from omni_video_hf.media import contact_sheet
        >>> contact_sheet(np.zeros((4, 64, 64, 3), np.uint8), columns=2).size
        (130, 130)
    """
    pictures = stack_frames(frames.frames if isinstance(frames, VideoClip) else frames)
    chosen = pictures[np.linspace(0, len(pictures) - 1, min(max_frames, len(pictures))).round().astype(int)]
    columns = columns or len(chosen)
    rows = -(-len(chosen) // columns)
    height, width = chosen.shape[1:3]
    sheet = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), BACKGROUND)
    for number, picture in enumerate(chosen):
        row, column = divmod(number, columns)
        sheet.paste(Image.fromarray(picture), (column * (width + 2), row * (height + 2)))
    return sheet


def stack_frames(frames: Any) -> np.ndarray:
    """Convert frames of any form to uint8 `[frames, height, width, 3]`."""
    if isinstance(frames, (np.ndarray, torch.Tensor)):
        stacked = to_uint8_rgb(frames, "video", 3)
    elif isinstance(frames, (list, tuple)):
        pictures = [np.asarray(load_image(frame)) for frame in frames]
        shapes = {picture.shape for picture in pictures}
        if len(shapes) > 1:
            raise MediaError(
                f"The frames of a video must all have the same size, got {sorted(shape[1::-1] for shape in shapes)}."
            )
        stacked = np.stack(pictures) if pictures else np.empty((0, 1, 1, 3), np.uint8)
    else:
        raise MediaError(
            f"A video must be a path, URL, VideoClip, list of frames, array or tensor, got {type(frames).__name__}."
        )
    if len(stacked) == 0:
        raise MediaError("The video has no frames.")
    return stacked


__all__ = ["contact_sheet", "load_image", "save_image"]
