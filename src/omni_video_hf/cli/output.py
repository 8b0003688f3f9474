"""Output files of the commands: names and folders are checked before the work, results are never lost after it."""

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import Literal

from .console import UsageProblem

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".gif")
PATTERN = re.compile(r"%0?\d*d")  # number of a picture in a name, as in `media.writing.formats`
DEFAULT_STEM = "output"
WORKSPACE = "omni-video-output"  # one name for all outputs: a run removes what any killed run left in the folder
NAME_BYTES = 255  # maximum length of a file name in usual file systems

Kind = Literal["image", "video"]


class UnwrittenError(OSError):
    """The result could not be written to the requested file; the message names the file that contains it instead."""


def is_pictures(path: Path) -> bool:
    """
    Whether an output is numbered PNG files, a pattern such as `%04d.png`.

    A name without a suffix, which Python's `VideoWriter` takes for a folder, is refused here: it may be another
    argument at the wrong place.
    """
    return path.suffix.lower() == ".png" and PATTERN.search(path.name) is not None


def output_kind(path: Path) -> Kind:
    """
    The kind of an output file, image or video, from its suffix. Numbered PNG files are a video.

    Raises:
        UsageProblem: for any other suffix.
    """
    suffix = path.suffix.lower()
    if is_pictures(path):
        return "video"
    if suffix not in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
        raise UsageProblem(
            f"`--output {path}`: the suffix must be one of {', '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)}; "
            "numbered PNG files have a pattern such as frame-%04d.png."
        )
    return "image" if suffix in IMAGE_SUFFIXES else "video"


def numbered(path: Path) -> Iterator[Path]:
    """Yield `name.mp4`, `name-1.mp4`, `name-2.mp4` and so on; a stem that is too long for a number is shortened."""
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
    One file to write. Its folder is checked before the work, and a finished result is never discarded.

    [`open`] creates a workspace in the folder, `.omni-video-output.*.unfinished`, and removes those that killed
    processes left. [`write`] writes there and renames the file to its final name, so that no file under a final name
    is incomplete. Without `path` the name is `output.mp4` or `output.png`. If the name is taken, also by another
    process during the work, a number is added: `output-1.mp4`.

    Args:
        path: the requested file; `None` for the default name in the current folder.
        overwrite: replace an existing file.

    Raises:
        UsageProblem: for a name that cannot be written and for a file that exists; from [`open`], for a folder in
            which no file can be created.
    """

    def __init__(self, path: Path | None, overwrite: bool = False) -> None:
        self.path, self.overwrite = path, overwrite
        self._workspace: Path | None = None
        self._stack = ExitStack()
        if path is not None:
            self._check_name(path)

    @property
    def kind(self) -> Kind | None:
        """Kind of the file, image or video; `None` if the model decides."""
        return None if self.path is None else output_kind(self.path)

    def open(self) -> "OutputFile":
        """Create the workspace, to check that the folder can be written to. A second call does nothing."""
        self._opened()
        return self

    def _opened(self) -> Path:
        """The workspace, which is created if there is none, see [`open`]."""
        if self._workspace is None:
            self._workspace = self._open_workspace(Path() if self.path is None else self.path.parent)
        return self._workspace

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

    def _open_workspace(self, folder: Path) -> Path:
        """A folder of this process, which the next run removes when this one is killed."""
        from ..utils.files import workspace  # noqa: PLC0415 - not for `--help`

        try:
            return self._stack.enter_context(workspace(WORKSPACE, folder))
        except OSError as error:
            named = "the current folder" if self.path is None else f"`--output {self.path}`: the folder {folder}"
            raise UsageProblem(
                f"{named} cannot be written to ({error.strerror}). Choose another folder with `--output`."
            ) from error

    def write(self, write: Callable[[Path], None], kind: Kind) -> Path:
        """
        Write the result and rename it to its final name.

        Args:
            write: function that writes the result to the path it gets; the path has the right suffix.
            kind: kind of the result, which determines the suffix if no name was requested.

        Returns:
            Path of the file. It differs from the requested one if another process took that name meanwhile.

        Raises:
            UnwrittenError: if the folder cannot be written to any more. The result is then in a temporary folder,
                which the message names.
        """
        suffix = {"image": ".png", "video": ".mp4"}[kind] if self.path is None else self.path.suffix
        wanted = self.path or Path(f"{DEFAULT_STEM}{suffix}")
        filled = self._opened() / f"result{suffix}"
        try:
            write(filled)
            return self._give_name(filled, wanted)
        except Exception as error:  # errors of FFmpeg, such as a full disk, are not all OSErrors
            raise self._rescued(write, wanted, error) from error
        finally:
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
        """Write the result to the first folder that can be written to, and return an error that names the file."""
        for folder in (None, Path.home(), Path("/dev/shm")):  # noqa: S108 - a new folder is created in it
            try:
                place = Path(tempfile.mkdtemp(prefix="omni-video-", dir=folder))
            except OSError:
                continue
            path = place / (wanted.name if len(os.fsencode(wanted.name)) < NAME_BYTES else f"output{wanted.suffix}")
            try:
                write(path)
            except Exception:  # try the next folder
                shutil.rmtree(place, ignore_errors=True)  # created a few lines above
                continue
            return UnwrittenError(f"{wanted} could not be written ({reason}). The result is in {path}: move it away.")
        return reason

    def close(self) -> None:
        """Remove the workspace; does nothing after [`write`]."""
        self._workspace = None
        with suppress(OSError):  # the folder may be gone
            self._stack.close()


class PictureOutput(OutputFile):
    """
    Numbered PNG files of a video under a pattern; the writer names them when all are complete.

    Args:
        path: the pattern.
        overwrite: refused, because the files of an earlier, longer video would stay between the new ones.
    """

    def _check_name(self, path: Path) -> None:
        if self.overwrite:
            raise UsageProblem(f"`--output {path}` are several files, which `--overwrite` does not replace.")
        first = path.with_name(path.name % 1)
        if first.exists() or first.is_symlink():
            raise UsageProblem(f"`--output {path}`: {first} exists already: choose another name.")
        if not path.parent.is_dir():
            raise UsageProblem(f"`--output {path}`: the folder {path.parent} does not exist.")

    def open(self) -> "PictureOutput":
        """Do nothing: the writer creates its own workspace."""
        return self

    def write(self, write: Callable[[Path], None], kind: Kind) -> Path:
        """Write the files; see [`OutputFile.write`]."""
        if self.path is None or kind != "video":
            raise UsageProblem(
                f"`--output {self.path}`: numbered PNG files are a video, the result is of kind {kind}."
            )
        write(self.path)
        return self.path


def planned_outputs(path: Path | None, number: int, overwrite: bool) -> list[OutputFile]:
    """
    The output files of `number` results, `name.mp4`, `name-1.mp4` and so on. The first one is opened.

    Raises:
        UsageProblem: for any file that cannot be written, see [`OutputFile`].
    """
    if path is None:
        outputs = [OutputFile(None) for _ in range(number)]
    else:
        cls = PictureOutput if is_pictures(path) else OutputFile
        outputs = [cls(name, overwrite) for name in islice(numbered(path), number)]
    outputs[0].open()
    return outputs


__all__ = ["OutputFile", "UnwrittenError", "output_kind", "planned_outputs"]
