"""`read_media_record`: read the record of how an image or video was generated from its metadata; needs no torch."""

import json
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

KEY = "omni_video"  # as `METADATA_KEY` in `media.images`
_IMAGE_DESCRIPTION = 0x010E  # in EXIF
MAX_BYTES = 10**6  # maximum length of a record; longer texts were not written by this package


def read_media_record(path: str | Path) -> dict[str, Any]:
    """
    Read prompt, seed, settings, model and revision with which a file was generated.

    Args:
        path: image or video that this package wrote.

    Raises:
        ValueError: for a file without such a record, or that cannot be read.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from omni_video_hf.media import read_media_record, save_image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_image(Image.new("RGB", (64, 48)), f"{folder}/image.png", {"seed": 7})
        ...     read_media_record(f"{folder}/image.png")["seed"]
        7
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(12)
        container = "mov" if head[4:8] == b"ftyp" else "matroska" if head[:4] == b"\x1a\x45\xdf\xa3" else None
        texts = _of_image(path) if container is None else _of_video(path, container)
    except Exception as error:  # errors of PyAV and Pillow, and files that cannot be opened
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: cannot be read as an image or video ({reason}).") from error
    for text in texts:
        with suppress(ValueError, RecursionError):
            found = json.loads(text) if isinstance(text, str) and len(text) <= MAX_BYTES else None
            if isinstance(found, dict) and isinstance(found.get(KEY), dict):
                return found[KEY]
    raise ValueError(
        f"{path}: contains no record of how it was generated. Files that `generate` and `edit` wrote contain one, "
        "unless another program saved them again."
    )


def _of_image(path: Path) -> list[Any]:
    with import_module("PIL.Image").open(path) as image:
        exif = image.getexif()
        comment = image.info.get("comment")  # of a GIF
        comment = comment.decode(errors="replace") if isinstance(comment, bytes) else comment
        return [image.info.get(KEY), exif.get(_IMAGE_DESCRIPTION), comment]


def _of_video(path: Path, kind: str) -> list[Any]:
    with import_module("av").open(str(path), format=kind) as container:
        return [container.metadata.get("comment"), container.metadata.get("COMMENT")]


__all__ = ["read_media_record"]
