"""How outputs are opened and described: under their name only when complete."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..utils.files import complete_or_absent
from .video_reader import MediaError

METADATA_KEY = "omni_video"  # under which files say how they were made, as JSON


def _metadata_text(metadata: Mapping[str, Any]) -> str:
    """The metadata as one line of ASCII, which every format keeps."""
    try:
        return json.dumps({METADATA_KEY: dict(metadata)}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise MediaError(f"`metadata` must hold plain values that JSON has ({error}).") from error


@contextmanager
def _complete_or_absent(path: Path) -> Iterator[Path]:
    """A name to write under, see [`complete_or_absent`]; the folder of `path` must be there."""
    if not path.parent.is_dir():
        raise MediaError(f"{path}: the folder {path.parent} does not exist.")
    if path.is_dir():
        raise MediaError(f"{path}: is a folder; a file is to be written.")
    with complete_or_absent(path) as partial:
        yield partial
