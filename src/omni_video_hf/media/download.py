"""Temporary downloads of videos and images from URLs."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.utils import get_session

from ..utils.read_budget import current_budget, how_to_raise
from .video_reader import MediaError

DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer; by default, the session waits without a limit


@contextmanager
def local_file(source: str | Path) -> Iterator[Path]:
    """Yield the path of a local file, or of a download that is removed after the block."""
    if not str(source).startswith(("http://", "https://")):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "download"
        try:
            request = get_session().stream("GET", str(source), follow_redirects=True, timeout=DOWNLOAD_TIMEOUT)
            with request as response, path.open("wb") as file:
                response.raise_for_status()
                limit = current_budget().max_bytes
                for chunk in response.iter_bytes():
                    file.write(chunk)
                    if file.tell() > limit:
                        raise MediaError(f"{source}: is larger than {limit:,} bytes. {how_to_raise('max_bytes')}")
        except MediaError:
            raise
        except Exception as error:  # errors of the HTTP library
            raise MediaError(f"{source}: could not be downloaded ({error}). Check the address.") from error
        try:
            yield path
        except MediaError as error:  # it names the temporary file: name the URL instead
            raise MediaError(str(error).replace(str(path), str(source))) from error
