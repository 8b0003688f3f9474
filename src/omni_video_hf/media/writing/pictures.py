"""A video as numbered PNG files, in a new folder or under a pattern such as `frame-%04d.png`."""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image, PngImagePlugin

from ...utils.files import workspace
from ..download import MediaError
from ..images import METADATA_KEY
from .formats import is_pattern

DEFAULT_NAME = "%04d.png"


class PictureFiles:
    """
    PNG files, numbered from 1. They are written in a hidden folder and get their names when all are complete.

    Args:
        path: folder that does not exist, or a pattern.
        comment: record of how they were generated, as text.

    Raises:
        MediaError: for a folder or files that exist already.
    """

    def __init__(self, path: Path, comment: str | None) -> None:
        self.path, self.count = path, 0
        self.is_pattern = is_pattern(path)
        self.folder = path.parent if self.is_pattern else path
        self.pattern = path.name if self.is_pattern else DEFAULT_NAME
        self.info = PngImagePlugin.PngInfo()
        if comment is not None:
            self.info.add_itxt(METADATA_KEY, comment)
        self._stack = ExitStack()

    def __enter__(self) -> "PictureFiles":
        if not self.folder.parent.is_dir() or (self.is_pattern and not self.folder.is_dir()):
            missing = self.folder if self.is_pattern else self.folder.parent
            raise MediaError(f"{self.path}: the folder {missing} does not exist.")
        if not self.is_pattern and (self.folder.exists() or self.folder.is_symlink()):
            raise MediaError(f"{self.path}: exists already; choose a folder that does not exist.")
        self._check_free(1)
        self.workspace = self._stack.enter_context(workspace(self.folder / "frames", self.folder.parent))
        self.content = self.workspace / "frames"
        self.content.mkdir()
        return self

    def _name(self, number: int) -> str:
        return self.pattern % number

    def _check_free(self, number: int) -> None:
        place = self.folder / self._name(number)
        if place.exists() or place.is_symlink():
            raise MediaError(f"{place}: exists already; choose another pattern, or move the files away.")

    def add(self, picture: np.ndarray, *_: object) -> None:
        """Write the next picture, uint8 `[height, width, 3]`; PNG files have no times."""
        self.count += 1
        self._check_free(self.count)
        path = self.content / self._name(self.count)
        Image.fromarray(picture).save(path, format="PNG", pnginfo=self.info, compress_level=3)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if error is not None or not self.count:
                return
            if not self.is_pattern:
                self.content.rename(self.folder)
                return
            for number in range(1, self.count + 1):
                self._check_free(number)
            for number in range(1, self.count + 1):
                (self.content / self._name(number)).rename(self.folder / self._name(number))


__all__ = ["PictureFiles"]
