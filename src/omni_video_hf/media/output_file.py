"""Output files of `save_image` and `save_video`: atomic writing, and the text of their metadata."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..utils.files import complete_or_absent
from .video_reader import MediaError

METADATA_KEY = "omni_video"  # key of the JSON record that says how a file was generated


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
