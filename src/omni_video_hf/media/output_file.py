"""How outputs are opened and described: under their name only when complete."""

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .video_reader import MediaError

METADATA_KEY = "omni_video"  # under which files say how they were made, as JSON


def metadata_text(metadata: Mapping[str, Any]) -> str:
    """The metadata as one line of ASCII, which every format keeps."""
    try:
        return json.dumps({METADATA_KEY: dict(metadata)}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise MediaError(f"`metadata` must hold plain values that JSON has ({error}).") from error


@contextmanager
def complete_output(path: Path) -> Iterator[Path]:
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
