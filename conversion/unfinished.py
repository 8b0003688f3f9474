"""A folder that becomes the output when it is complete, and can be gone on with when a run was interrupted."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file

from omni_video_hf.hub.remote_code import is_written_code
from omni_video_hf.utils.files import is_plain_name, remove_abandoned, sync_file

STATE = "conversion.json"  # what the folder is made from, which files the conversion wrote, which shards are complete
WRITING = ".writing"  # folder for files that are not complete yet


class Unfinished:
    """
    The folder that becomes the output, and what is known about the files in it.

    Shards of an earlier run are kept when they come from the same files with the same options. Its other files are
    removed as far as the record lists them: every file is listed before it gets its name.

    Raises:
        ValueError: on entering, when the folder holds what no conversion left there.
    """

    def __init__(self, folder: Path, made_from: str) -> None:
        self.folder, self.made_from = folder, made_from
        self.state_file, self.writing = folder / STATE, folder / WRITING
        self.shards: dict[str, int] = {}
        self.files: set[str] = set()

    def __enter__(self) -> "Unfinished":
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise ValueError(f"{self.folder}: must be a folder, not a link or a file: move it away.")
        self._read_state()
        for folder in (self.folder, *self.folder.glob("*/")):
            remove_abandoned(None, folder)
        self._check_foreign()
        self.folder.mkdir(exist_ok=True)
        self._remove([name for name in self.files if name not in self.shards or not self.has(self.folder / name)])
        self.files &= self.shards.keys()
        self._record()
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder.exists() and not self.shards:  # nothing worth keeping
            self._remove(self.files)
            self.state_file.unlink(missing_ok=True)
            with suppress(OSError):  # somebody put something there meanwhile
                self.folder.rmdir()

    def _read_state(self) -> None:
        try:
            state = json.loads(self.state_file.read_text())
            shards, files = dict(state["shards"]), set(state["files"])
            if not all(isinstance(name, str) and is_plain_name(name) for name in files | shards.keys()):
                raise ValueError("names files outside of its folder")
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.state_file}: is damaged, or of another version ({error}), so what lies beside it is not known "
                f"to be left by a conversion: remove or move {self.folder} to start over."
            ) from None
        self.files = files | shards.keys()
        self.shards = shards if state["made_from"] == self.made_from else {}

    def _check_foreign(self) -> None:
        """Refuse what the record does not list, and links, which removing and writing would follow."""
        known = {STATE, f"{WRITING}/{STATE}", *self.files}
        for folder, subfolders, names in os.walk(self.folder):
            place = Path(folder).relative_to(self.folder)
            found = [name for name in subfolders if (Path(folder) / name).is_symlink()]
            if place == Path() and WRITING in subfolders and self.state_file.exists():
                subfolders.remove(WRITING)
            found += [
                name
                for name in names
                if (place / name).as_posix() not in known and not is_written_code(Path(folder) / name)
            ]
            if found:
                raise ValueError(
                    f"{self.folder}: is where the conversion works, but holds files that no conversion left there "
                    f"({(place / found[0]).as_posix()}): move them away, or choose another `--output`."
                )

    def _remove(self, names: Iterable[str]) -> None:
        if self.writing.is_dir() and not self.writing.is_symlink():
            shutil.rmtree(self.writing)
        for name in sorted(names):
            (self.folder / name).unlink(missing_ok=True)
            self.shards.pop(name, None)
        folders = {parent for name in names for parent in Path(name).parents} - {Path()}
        for folder in sorted(folders, reverse=True):
            with suppress(OSError):  # not empty, or not there
                (self.folder / folder).rmdir()

    def has(self, file: Path) -> bool:
        """Whether a shard is there and whole."""
        name = file.relative_to(self.folder).as_posix()
        return file.is_file() and not file.is_symlink() and self.shards.get(name) == file.stat().st_size

    def write(self, file: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Write a shard; it appears, and is recorded, when it is on the disk."""
        partial = self._partial(file)
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.chmod(self.state_file.stat().st_mode)  # safetensors lets only its owner read
        self._keep(partial, file)

    def copy(self, source: Path, file: Path) -> None:
        """Likewise, a copy of `source`, unless it is there."""
        if not self.has(file):
            self._keep(Path(shutil.copyfile(source, self._partial(file))), file)

    def add(self, write: Callable[[Path], Any], place: Path | None = None) -> None:
        """
        Let `write` fill a folder, and bring its files into `place`, by default the output itself.

        Files that are there already are replaced.
        """
        place = self.folder if place is None else place
        new = self._partial(self.writing / "new")
        new.mkdir()
        write(new)
        written = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
        self.claim((place / path).relative_to(self.folder).as_posix() for path in written)
        for path in written:
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            _replace(new / path, place / path)
        shutil.rmtree(new)

    def claim(self, names: Iterable[str]) -> None:
        """
        List files that are about to be written to the output.

        Raises:
            ValueError: when somebody else has put one of them there.
        """
        names = set(names) - self.files
        for name in sorted(names):
            if (self.folder / name).exists() or (self.folder / name).is_symlink():
                raise ValueError(f"{self.folder / name}: was put there by somebody else: move it away.")
        self.files |= names
        self._record()

    def _partial(self, file: Path) -> Path:
        """Where to write a file before it gets its name."""
        self.writing.mkdir(exist_ok=True)
        return self.writing / file.name

    def _keep(self, written: Path, file: Path) -> None:
        name = file.relative_to(self.folder).as_posix()
        self.claim([name])
        file.parent.mkdir(exist_ok=True)
        _replace(written, file)
        self.shards[name] = file.stat().st_size
        self._record()

    def _record(self) -> None:
        state = self._partial(self.state_file)
        content = {"made_from": self.made_from, "files": sorted(self.files), "shards": self.shards}
        state.write_text(json.dumps(content))
        _replace(state, self.state_file)

    def finish(self, output: Path) -> None:
        """Give the folder its final name."""
        shutil.rmtree(self.writing)
        if output.exists():
            output.rmdir()  # empty, as checked at the start
        self.folder.replace(output)
        forget(output)


def forget(output: Path) -> None:
    """Remove the record from an output that has its final name."""
    if is_record(output / STATE):
        (output / STATE).unlink()


def is_record(path: Path) -> bool:
    """Whether a file is the record of a conversion."""
    try:
        state = json.loads(path.read_text()) if path.is_file() and not path.is_symlink() else None
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and state.keys() == {"made_from", "files", "shards"}


def _replace(written: Path, target: Path) -> None:
    """Give a file its name once its bytes are on the disk."""
    sync_file(written)
    written.replace(target)


def fingerprint(original: Path, options: dict[str, Any]) -> str:
    """What a conversion is made from: options, and size and time of change of every source file."""
    stats = {path.relative_to(original).as_posix(): path.stat() for path in original.rglob("*") if path.is_file()}
    files = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in sorted(stats.items())}
    facts = [options, str(original.resolve()), files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Refuse to run twice at once on the same output."""
    lock = FileLock(output.with_name(f"{output.name}.lock"), timeout=0)
    path = Path(lock.lock_file)
    if path.is_symlink() or (path.exists() and (not path.is_file() or path.stat().st_size)):
        raise ValueError(f"{path}: is in the place of a lock file, but no lock file: move it away.")
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"{output}: another conversion is writing there; wait for it.") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who waits for it looks again
        lock.release()


def check_disk_space(needed: int, folder: Path) -> None:
    """Refuse when fewer than `needed` bytes are free, counting what `folder` holds already."""
    free = shutil.disk_usage(folder).free + sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    if needed > free:
        raise ValueError(f"{folder.parent}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free.")
