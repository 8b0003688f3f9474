"""Files that the commands write: checked and opened before the work, never lost after it."""

import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Literal

from .console import UsageProblem

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4",)
DEFAULT_STEM = "output"
PARTIAL = ".omni-video-{pid}-{random}.partial"  # of a process that is gone, it can be removed
NAME_BYTES = 255  # the longest name of a file that file systems take

Kind = Literal["image", "video"]


class UnwrittenError(OSError):
    """The result could not be written where it was wanted; the message says where it is instead."""


def output_kind(path: Path) -> Kind:
    """
    Whether a file is to be an image or a video, by its suffix.

    Raises:
        UsageProblem: for another suffix.
    """
    suffix = path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
        raise UsageProblem(
            f"`--output {path}`: the suffix must be one of {', '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)}."
        )
    return "image" if suffix in IMAGE_SUFFIXES else "video"


def numbered(path: Path) -> Iterator[Path]:
    """`name.mp4`, `name-1.mp4`, `name-2.mp4` and so on; a stem that is too long for a number loses its end."""
    yield path
    number = 0
    while True:
        number += 1
        end = f"-{number}{path.suffix}"
        stem = path.stem
        while len(os.fsencode(stem + end)) > NAME_BYTES:
            stem = stem[:-1]
        yield path.with_name(stem + end)


class OutputFile:
    """
    One file to write: its folder is known to take it before the work, and what was made is never thrown away.

    [`open`] makes a file under a name of its own, `.omni-video-PID-....partial`. [`write`] fills it and gives it its
    final name, which never holds half a file. Without `path` the name is `output.mp4` or `output.png`, and a name that
    is taken counts up: `output-1.mp4`, also where another process took it since.

    Args:
        path: the wanted file; `None` for the default name in the current folder.
        overwrite: replace a file that exists.

    Raises:
        UsageProblem: for a name that cannot be written, and one that is taken; by [`open`], for a folder that takes no
            file.
    """

    def __init__(self, path: Path | None, overwrite: bool = False) -> None:
        self.path, self.overwrite = path, overwrite
        self.partial: Path | None = None
        if path is not None:
            self._check_name(path)

    @property
    def kind(self) -> Kind | None:
        """What it is to be; `None` where the model decides."""
        return None if self.path is None else output_kind(self.path)

    def open(self) -> "OutputFile":
        """Make sure that the folder takes a file; see the class. Without effect when that was done already."""
        self._opened()
        return self

    def _opened(self) -> Path:
        """The file that holds the place of the result, see [`open`]."""
        if self.partial is None:
            self.partial = self._open_partial(Path() if self.path is None else self.path.parent)
        return self.partial

    def __enter__(self) -> "OutputFile":
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_name(self, path: Path) -> None:
        output_kind(path)
        try:
            found = path.lstat()
        except FileNotFoundError:
            found = None
        except OSError as error:  # such as a name that is too long
            raise UsageProblem(f"`--output {path}`: {error.strerror}. Choose another name.") from error
        if found is not None and not (stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)):
            what = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
            raise UsageProblem(f"`--output {path}` is {what}: choose the name of a file.")
        if found is not None and path.is_dir():
            raise UsageProblem(f"`--output {path}` is a link to a folder: choose the name of a file.")
        if found is not None and not self.overwrite:
            raise UsageProblem(f"`--output {path}` exists already: choose another name, or pass `--overwrite`.")
        if not path.parent.is_dir():
            raise UsageProblem(f"`--output {path}`: the folder {path.parent} does not exist.")

    def _open_partial(self, folder: Path) -> Path:
        """An empty file of this process; a name that somebody has planted is never opened."""
        while True:
            partial = folder / PARTIAL.format(pid=os.getpid(), random=secrets.token_hex(6))
            try:
                os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            except FileExistsError:
                continue
            except OSError as error:
                named = "the current folder" if self.path is None else f"`--output {self.path}`: the folder {folder}"
                raise UsageProblem(
                    f"{named} takes no new file ({error.strerror}). Choose a file in another folder with `--output`."
                ) from error
            return partial

    def write(self, write: Callable[[Path], None], kind: Kind) -> Path:
        """
        Write the result and give it its name.

        Args:
            write: writes a file of the name it is given, which has the right suffix.
            kind: decides the suffix where no name was asked for.

        Returns:
            Where it is. It is another name than the wanted one where that was taken meanwhile.

        Raises:
            UnwrittenError: when the folder cannot take it any more. The result lies in a temporary folder then, which
                the message names.
        """
        suffix = {"image": ".png", "video": ".mp4"}[kind] if self.path is None else self.path.suffix
        wanted = self.path or Path(f"{DEFAULT_STEM}{suffix}")
        filled = self._opened().with_suffix(f".partial{suffix}")
        try:
            write(filled)
            return self._give_name(filled, wanted)
        except Exception as error:  # FFmpeg's own are no OSError, a full disk included
            raise self._rescued(write, wanted, error) from error
        finally:
            _remove(filled)
            self.close()

    def _give_name(self, filled: Path, wanted: Path) -> Path:
        if self.overwrite:
            filled.replace(wanted)
            return wanted
        for path in numbered(wanted):
            try:
                os.link(filled, path)  # unlike renaming, it never replaces a file
            except FileExistsError:
                continue
            except OSError:  # a file system without hard links
                try:
                    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
                except FileExistsError:
                    continue
                filled.replace(path)
            return path
        raise AssertionError("the names never end")

    def _rescued(self, write: Callable[[Path], None], wanted: Path, reason: Exception) -> Exception:
        """Write the result to the first folder that takes it, and say where it is."""
        for folder in (None, Path.home(), Path("/dev/shm")):  # noqa: S108 - a folder of its own is made in it
            try:
                place = Path(tempfile.mkdtemp(prefix="omni-video-", dir=folder))
            except OSError:
                continue
            path = place / (wanted.name if len(os.fsencode(wanted.name)) < NAME_BYTES else f"output{wanted.suffix}")
            try:
                write(path)
            except Exception:  # the next folder may do
                shutil.rmtree(place, ignore_errors=True)  # made just above
                continue
            return UnwrittenError(f"{wanted} could not be written ({reason}). The result is in {path}: move it.")
        return reason

    def close(self) -> None:
        """Remove the file that was opened; without effect after [`write`]."""
        if self.partial is not None:
            _remove(self.partial)
            self.partial = None


def planned_outputs(path: Path | None, number: int, overwrite: bool) -> list[OutputFile]:
    """
    The files of `number` results, `name.mp4`, `name-1.mp4` and so on, the first of them opened.

    Raises:
        UsageProblem: as [`OutputFile`], for any of them.
    """
    if path is None:
        outputs = [OutputFile(None) for _ in range(number)]
    else:
        outputs = [OutputFile(name, overwrite) for name in islice(numbered(path), number)]
    outputs[0].open()
    return outputs


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


__all__ = ["OutputFile", "UnwrittenError", "output_kind", "planned_outputs"]
