"""
`KeptSteps`: what a model computed in the steps of a long call, kept in a folder for a repetition of the call.

The outputs of the model are kept in the order of its calls. When the same call is made again, they are returned
instead of being computed, until they are used up. All else runs as before, the scheduler and the random numbers among
it, so that the result is the same bit by bit, whatever the scheduler remembers.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .files import WRITER, complete_or_absent, read_json, remove_abandoned, write_json

STATE, LOCK = "state.json", "state.lock"
STEP = re.compile(r"step-\d{5}\.safetensors")


class KeptSteps:
    """
    A folder with the steps of one call.

    Args:
        folder: folder of the steps; created if it does not exist. It holds `state.json` and one file a step.
        settings: everything that the result depends on, as plain values.

    Raises:
        ValueError: for a folder that holds anything else, steps of other settings, or that another process uses.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, json.loads(json.dumps(dict(settings), default=str))
        self._kept: Iterator[torch.Tensor] = iter(())  # outputs of finished steps that are still to be returned
        self._new: list[torch.Tensor] = []  # of the step at work
        self.found = self._number = 0

    @contextmanager
    def used(self) -> Iterator["KeptSteps"]:
        """Open the folder for a block; after the block the steps are removed, unless it raised."""
        self.check()
        self.folder.mkdir(exist_ok=True)
        lock = WeakFileLock(self.folder / LOCK, timeout=0.05)
        try:
            lock.__enter__()
        except Timeout as error:
            raise ValueError(f"{self.folder}: another process uses these steps; wait for its end.") from error
        try:
            if not (self.folder / STATE).exists():
                write_json(self.folder / STATE, {"written_by": WRITER, "settings": self.settings})
            self._load()
            yield self
        except BaseException:
            lock.__exit__(None, None, None)
            raise
        lock.__exit__(None, None, None)
        self._remove()

    def check(self) -> None:
        """Refuse a folder that is not ours, or has steps of other settings."""
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise ValueError(f"{self.folder}: is no folder of steps; move it away.")
        if not self.folder.exists():
            return
        if (self.folder / STATE).is_file():
            remove_abandoned(None, self.folder)
        names = {path.name for path in self.folder.iterdir()}
        if not names - {LOCK}:
            return
        state = read_json(self.folder / STATE) if STATE in names else None
        others = sorted(name for name in names if name not in (STATE, LOCK) and not STEP.fullmatch(name))
        if others or not isinstance(state, dict) or state.get("written_by") != WRITER:
            raise ValueError(
                f"{self.folder}: holds {', '.join(others) or 'no state of steps'}, which this command did not write; "
                "move it away."
            )
        kept = state.get("settings") or {}
        keys = sorted(kept.keys() | self.settings.keys())
        differing = ", ".join(
            f"{name}: {kept.get(name)!r} there, {self.settings.get(name)!r} here"
            for name in keys
            if kept.get(name) != self.settings.get(name)
        )
        if differing:
            raise ValueError(
                f"{self.folder}: holds steps of other settings ({differing}). Repeat the command as it was, or remove "
                "the folder."
            )

    def _load(self) -> None:
        self.found = self._number = len(list(self.folder.glob("step-*.safetensors")))
        for number in range(self.found):
            try:
                with safe_open(self._path(number), "pt"):  # reads the header, and compares the size
                    pass
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{self._path(number)}: is missing or damaged ({error}). Remove the folder to start again."
                ) from error
        self._kept = self._read()

    def _path(self, number: int) -> Path:
        return self.folder / f"step-{number:05d}.safetensors"

    def _read(self) -> Iterator[torch.Tensor]:
        """The outputs of the finished steps, one step in memory at a time."""
        for number in range(self.found):
            tensors = load_file(self._path(number))
            yield from (tensors[str(place)] for place in range(len(tensors)))

    @contextmanager
    def recording(self, model: torch.nn.Module) -> Iterator[None]:
        """Return kept outputs of a model, in the order of its calls, and remember the others, within a block."""
        forward: Callable[..., Any] = model.forward
        had_own = "forward" in vars(model)

        def replayed(*args: Any, **kwargs: Any) -> Any:
            output = next(self._kept, None)
            if output is not None:
                states = kwargs.get("hidden_states", args[0] if args else output)
                return (output.to(states.device),)
            found = forward(*args, **kwargs)
            if not isinstance(found, tuple) or len(found) != 1:
                raise TypeError(f"{type(model).__name__} returned {type(found).__name__}; steps of it cannot be kept.")
            self._new.append(found[0].detach().to("cpu", copy=True).contiguous())
            return found

        model.forward = replayed
        try:
            yield
        finally:
            if had_own:
                model.forward = forward
            else:
                del model.forward

    def end_step(self) -> None:
        """Keep the outputs since the last step; a step whose outputs were all kept before is passed over."""
        if not self._new:
            return
        path = self._path(self._number)
        with complete_or_absent(path) as partial:
            save_file({str(place): tensor for place, tensor in enumerate(self._new)}, partial)
        self._number += 1
        self._new = []

    def _remove(self) -> None:
        """Remove our own files; the folder stays if it holds any other."""
        for path in self.folder.iterdir():
            if STEP.fullmatch(path.name) or path.name in (STATE, LOCK):
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def fingerprint(path: Path) -> str:
    """SHA-256 of a file; for a folder, of the names, sizes and times of all its files."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file():
                found = file.stat()
                digest.update(f"{file.relative_to(path)} {found.st_size} {found.st_mtime_ns}{os.linesep}".encode())
        return digest.hexdigest()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def kept_settings(folder: Path) -> dict[str, Any]:
    """Settings of the steps in a folder; empty for a folder without steps."""
    path = folder / STATE
    state = read_json(path) if path.is_file() and not folder.is_symlink() else None
    found = state.get("settings") if isinstance(state, dict) and state.get("written_by") == WRITER else None
    return found if isinstance(found, dict) else {}


__all__ = ["KeptSteps", "fingerprint", "kept_settings"]
