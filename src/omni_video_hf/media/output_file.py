"""Output files of `save_image` and `save_video`: atomic writing, and the text of their metadata."""

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .video_reader import MediaError

METADATA_KEY = "omni_video"  # key of the JSON record that says how a file was generated


def _metadata_text(metadata: Mapping[str, Any]) -> str:
    """Encode metadata as one line of ASCII, which every format preserves."""
    try:
        return json.dumps({METADATA_KEY: dict(metadata)}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise MediaError(f"`metadata` must contain only values that JSON can represent ({error}).") from error


@contextmanager
def _complete_or_absent(path: Path) -> Iterator[Path]:
    """
    Yield a temporary path to write to; it is renamed to `path` after the block, and removed if the block raises.

    The name is random, so that nobody can put a link in its place; it contains the process number. It is short enough
    for any file system.
    """
    if not path.parent.is_dir():
        raise MediaError(f"{path}: the folder {path.parent} does not exist.")
    if path.is_dir():
        raise MediaError(f"{path}: is a folder; pass the path of a file.")
    partial = path.with_name(f".omni-video-{os.getpid()}-{secrets.token_hex(6)}.partial")
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
