"""`MediaFile`: a local file or a download that is opened once, by whatever reads it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub.utils import get_session

from ..utils.read_budget import current_budget, how_to_raise

DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer; by default, the session waits without a limit


class MediaError(ValueError):
    """An image or video cannot be read, written or used as requested; one line says what was found and what to do."""


class MediaFile(str):
    """
    The path or URL of an image or video, whose file is opened once and whose URL is fetched once.

    It is a text, so that every function that takes a path or URL takes it too. Functions that get the same object
    share the open file, and the index of a video. Close it, or use it in a `with` block.

    Args:
        source: path or http(s) URL.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from omni_video_hf.media import MediaFile, load_video, open_media, save_video
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_video(np.zeros((9, 64, 64, 3), np.uint8), f"{folder}/video.mp4", fps=8)
        ...     with MediaFile(f"{folder}/video.mp4") as file:
        ...         kind, _ = open_media(file)
        ...         print(kind, len(load_video(file).frames))
        video 9
    """

    def __new__(cls, source: str | Path) -> "MediaFile":
        """Create it; nothing is opened yet."""
        file = super().__new__(cls, source)
        file.index = None
        file._stream, file._folder, file._is_used = None, None, False
        return file

    index: Any  # of `video_reader.read_index`, kept for the next reader
    _stream: BinaryIO | None
    _folder: tempfile.TemporaryDirectory[str] | None
    _is_used: bool

    @property
    def path(self) -> Path:
        """Path of the local file, or of the download, which is made at the first use."""
        if not self.startswith(("http://", "https://")):
            return Path(self)
        if self._folder is None:
            folder = tempfile.TemporaryDirectory()
            try:
                _download(self, Path(folder.name) / "download")
            except BaseException:
                folder.cleanup()
                raise
            self._folder = folder
        return Path(self._folder.name) / "download"

    @contextmanager
    def reading(self) -> Iterator[BinaryIO]:
        """
        Yield the open file at its beginning. If another block is reading it, the file is opened once more.

        Raises:
            MediaError: unless it is a regular file that is not empty.

        Example:
            >>> import tempfile
            >>> from pathlib import Path
            >>> from omni_video_hf.media import MediaFile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = Path(folder) / "text"
            ...     _ = path.write_bytes(b"some bytes")
            ...     with MediaFile(path).reading() as stream:
            ...         stream.read(4)
            b'some'
        """
        if self._is_used:
            with self.path.open("rb") as other:
                yield other
            return
        if self._stream is None:
            check_file(self)
            self._stream = self.path.open("rb")
        self._is_used = True
        try:
            self._stream.seek(0)
            yield self._stream
        finally:
            self._is_used = False

    def ends(self, count: int) -> tuple[bytes, bytes, int]:
        """
        First and last `count` bytes, and the number of all bytes; a reader that is at work does not notice.

        Example:
            >>> import tempfile
            >>> from pathlib import Path
            >>> from omni_video_hf.media import MediaFile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = Path(folder) / "text"
            ...     _ = path.write_bytes(b"some bytes")
            ...     with MediaFile(path) as file:
            ...         file.ends(4)
            (b'some', b'ytes', 10)
        """
        with self.path.open("rb") if self._stream is None else nullcontext(self._stream) as stream:
            position, size = stream.tell(), stream.seek(0, 2)
            stream.seek(0)
            first = stream.read(count)
            stream.seek(max(0, size - count))
            last = stream.read(count)
            stream.seek(position)
        return first, last, size

    def close(self) -> None:
        """
        Close the file. A download stays until the end of the object; a later reader opens the file again.

        Example:
            >>> import tempfile
            >>> from pathlib import Path
            >>> from omni_video_hf.media import MediaFile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = Path(folder) / "text"
            ...     _ = path.write_bytes(b"some bytes")
            ...     file = MediaFile(path)
            ...     size = file.ends(1)[2]
            ...     file.close()
            >>> size
            10
        """
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def __enter__(self) -> "MediaFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self.index = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __del__(self) -> None:
        self.close()


@contextmanager
def opened(source: str | Path) -> Iterator[MediaFile]:
    """Yield a [`MediaFile`]; one that was made here is closed after the block, the caller's stays open."""
    if isinstance(source, MediaFile):
        yield source
        return
    with MediaFile(source) as file:
        yield file


def check_file(path: str | Path) -> None:
    """Raise `MediaError` unless `path` is a regular file that is not empty."""
    place = path.path if isinstance(path, MediaFile) else Path(path)
    if place.is_dir():
        raise MediaError(f"{path}: is a folder; pass the path of one image or video file.")
    if not place.exists():
        raise MediaError(f"{path}: no such file.")
    if not place.is_file():  # opening a pipe waits for its writer, and a device may never end
        raise MediaError(f"{path}: is a pipe or a device; save its content as a file first.")
    if place.stat().st_size == 0:
        raise MediaError(f"{path}: the file is empty (0 bytes); download or export it again.")


def _download(source: str, path: Path) -> None:
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


__all__ = ["MediaError", "MediaFile", "check_file", "opened"]
