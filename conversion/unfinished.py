"""A folder that becomes the output when it is complete, and can be gone on with when a run was interrupted."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file

STATE = "conversion.json"  # what the folder is made from, and which of its shards are complete


class Unfinished:
    """
    The folder that becomes the output, and what is known about the shards in it.

    Shards of an earlier run are kept when they come from the same files with the same options.

    Raises:
        ValueError: on entering, when the folder holds what no conversion left there.
    """

    def __init__(self, folder: Path, made_from: str) -> None:
        self.folder, self.made_from = folder, made_from
        self.state_file = folder / STATE
        self.shards: dict[str, int] = {}

    def __enter__(self) -> "Unfinished":
        if self.folder.exists() and not self.state_file.exists() and any(self.folder.iterdir()):
            raise ValueError(
                f"{self.folder}: is where the conversion works, but holds files that no conversion left there: move "
                "them away, or choose another `--output`."
            )
        try:
            state = json.loads(self.state_file.read_text())
            if state["made_from"] == self.made_from:
                self.shards = dict(state["shards"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none, or damaged by whatever ended the earlier run: start over
        if not self.shards and self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(exist_ok=True)
        self._record()
        for file in self.folder.rglob("*"):
            # Everything else is made anew; halves of files, safetensors' own among them, must not stay.
            if file.is_file() and file != self.state_file and not self.has(file):
                file.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder.exists() and not self.shards:
            shutil.rmtree(self.folder)  # nothing worth keeping

    def has(self, file: Path) -> bool:
        """Whether a shard is there and whole."""
        name = file.relative_to(self.folder).as_posix()
        return file.is_file() and self.shards.get(name) == file.stat().st_size

    def write(self, file: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Write a shard; it appears, and is recorded, when it is on the disk."""
        partial = file.with_suffix(".partial")
        save_file(tensors, partial, metadata={"format": "pt"})
        shutil.copymode(file.with_name("config.json"), partial)  # safetensors lets only its owner read
        self._keep(partial, file)

    def copy(self, source: Path, file: Path) -> None:
        """Likewise, a copy of `source`, unless it is there."""
        if not self.has(file):
            file.parent.mkdir(exist_ok=True)
            self._keep(Path(shutil.copyfile(source, file.with_suffix(".partial"))), file)

    def _keep(self, written: Path, file: Path) -> None:
        _replace(written, file)
        self.shards[file.relative_to(self.folder).as_posix()] = file.stat().st_size
        self._record()

    def _record(self) -> None:
        state = self.state_file.with_suffix(".partial")
        state.write_text(json.dumps({"made_from": self.made_from, "shards": self.shards}))
        _replace(state, self.state_file)

    def finish(self, output: Path) -> None:
        """Give the folder its final name."""
        self.state_file.unlink(missing_ok=True)
        if output.exists():
            output.rmdir()  # empty, as checked at the start
        self.folder.replace(output)


def _replace(written: Path, target: Path) -> None:
    """Give a file its name once its bytes are on the disk."""
    with written.open("rb") as file:
        os.fsync(file.fileno())
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
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"{output}: another conversion is writing there; wait for it.") from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: who waits for it looks again
        lock.release()


def check_disk_space(needed: int, folder: Path) -> None:
    """Refuse when fewer than `needed` bytes are free, counting what `folder` holds already."""
    free = shutil.disk_usage(folder).free + sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    if needed > free:
        raise ValueError(f"{folder.parent}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free.")
