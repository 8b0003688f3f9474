"""
Files that are complete or absent, and folders that may be removed because they are known to be written here.

Everything is written in a workspace: a hidden folder that holds a mark of this module and a lock. A file gets its name
by one rename out of it. A workspace whose process was killed keeps its mark and loses its lock, so the next write to
the same target finds it and removes it. Nothing else is ever removed, and nothing through a link.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PureWindowsPath
from typing import Any

from filelock import Timeout
from huggingface_hub.utils import WeakFileLock

WORKSPACE_SUFFIX = ".unfinished"
MARK, LOCK = "workspace.json", "workspace.lock"
WRITER = "omni_video_hf"


@contextmanager
def complete_or_absent(path: str | Path) -> Iterator[Path]:
    """
    A name to write under; the file gets its own name when the block ends well and it lies on the disk.

    The name to write under is new, in a folder that nobody else writes to, so that no planted link is followed. A link
    at `path` itself is replaced by the file; what it leads to stays as it is.

    Args:
        path: of the file; its folder is made if need be.
    """
    path = Path(path)
    around = next((parent for parent in path.absolute().parents if parent.name.endswith(WORKSPACE_SUFFIX)), None)
    if around is not None and read_mark(around) is not None:  # nobody sees it before the workspace is moved
        path.unlink(missing_ok=True)
        yield path
        path.chmod((around / MARK).stat().st_mode)
        return
    with workspace(path) as folder:
        partial = folder / path.name
        yield partial
        partial.chmod((folder / MARK).stat().st_mode)  # safetensors writes files that nobody else may read
        sync_file(partial)
        partial.replace(path)


def write_text(path: str | Path, text: str) -> None:
    """Write a file of UTF-8 that comes to its name when it is complete; one that is there with this text stays."""
    path = Path(path)
    if path.is_file() and not path.is_symlink() and path.read_bytes() == text.encode():
        return
    with complete_or_absent(path) as partial:
        partial.write_bytes(text.encode())


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; `None` where there is no such file."""
    return json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else None


def write_json(path: str | Path, content: Any, sort_keys: bool = False) -> None:
    """Write a JSON file, complete or not at all."""
    write_text(path, json.dumps(content, indent=2, sort_keys=sort_keys) + "\n")


def is_plain_name(name: str) -> bool:
    """Whether a name in an index leads down from where the index lies: relative, and nowhere up."""
    parts = name.replace("\\", "/").split("/")
    return not Path(name).is_absolute() and not PureWindowsPath(name).drive and not {"", ".", ".."} & set(parts)


def visible_files(directory: Path, name: str) -> list[Path]:
    """Files of a name, or pattern, at any depth, none of them in a hidden folder."""
    found = sorted(directory.rglob(name))
    return [path for path in found if not any(part[0] == "." for part in path.relative_to(directory).parts[:-1])]


def sync_file(path: Path) -> None:
    """Wait until a file's bytes lie on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


# --- workspaces -----------------------------------------------------------------------------------------------------


@contextmanager
def workspace(target: str | Path, parent: str | Path | None = None) -> Iterator[Path]:
    """
    A new hidden folder to write in, removed when the block ends; those that killed processes left go first.

    Args:
        target: what is to be written; the folder's name says so.
        parent: where the folder lies, by default beside `target`; made if need be.
    """
    target = Path(target)
    parent = target.parent if parent is None else Path(parent)
    parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target, parent)
    folder = Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=WORKSPACE_SUFFIX, dir=parent))
    try:
        with WeakFileLock(folder / LOCK):
            write_mark(folder, {"target": target.name})
            try:
                yield folder
            finally:
                empty(folder)
    finally:
        remove_empty(folder)


def remove_abandoned(target: str | Path | None, parent: str | Path) -> None:
    """Remove the workspaces for `target`, or for anything, in a folder whose processes were killed."""
    for folder in workspaces(target, parent):
        with unlocked(folder) as is_free:
            # One with a list of files is moving them, see `hub.staging`.
            is_left = is_free and "files" not in (read_mark(folder) or ())
            if is_left:
                empty(folder)
        if is_left:
            remove_empty(folder)


def workspaces(target: str | Path | None, parent: str | Path) -> list[Path]:
    """Workspaces for `target`, or for anything, in a folder; in use or left by killed processes."""
    name, parent = None if target is None else Path(target).name, Path(parent)
    prefix = "." if target is None else _prefix(Path(target))
    found = []
    for folder in sorted(parent.iterdir()) if parent.is_dir() else []:
        if folder.name.startswith(prefix) and folder.name.endswith(WORKSPACE_SUFFIX):
            mark = read_mark(folder)
            if (mark is None and _has_just_begun(folder)) or (mark is not None and name in (None, mark["target"])):
                found.append(folder)
    return found


@contextmanager
def unlocked(folder: Path) -> Iterator[bool]:
    """Whether the process that made a workspace has ended; if so, nobody else takes it within the block."""
    has_just_begun = _has_just_begun(folder)  # the lock changes the folder's time
    try:
        lock = WeakFileLock(folder / LOCK, timeout=0.05)
        lock.__enter__()
    except (Timeout, OSError):  # in use, or removed a moment ago
        yield False
        return
    try:
        yield read_mark(folder) is not None or has_just_begun
    finally:
        lock.__exit__(None, None, None)


def read_mark(folder: Path) -> dict[str, Any] | None:
    """What a workspace says of itself; `None` for any other folder, and for a link to one."""
    path = folder / MARK
    if folder.is_symlink() or path.is_symlink() or not path.is_file() or (folder / LOCK).is_symlink():
        return None
    try:
        mark = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    is_ours = isinstance(mark, dict) and mark.get("written_by") == WRITER and isinstance(mark.get("target"), str)
    return mark if is_ours else None


def _has_just_begun(folder: Path) -> bool:
    """Whether a process was killed before it marked a workspace, which takes far less than a minute."""
    if folder.is_symlink() or not folder.is_dir() or time.time() - folder.stat().st_mtime < 60:
        return False
    return all(path.name in (LOCK, f"{MARK}.new") for path in folder.iterdir())


def write_mark(folder: Path, content: dict[str, Any]) -> None:
    """Replace what a workspace says of itself."""
    new = folder / f"{MARK}.new"
    new.write_text(json.dumps({"written_by": WRITER, **content}), encoding="utf-8")
    if "files" in content:
        sync_file(new)
    new.replace(folder / MARK)


def _prefix(target: Path) -> str:
    """Beginning of the names of a target's workspaces; short enough for any file system."""
    return f".{target.name.encode()[:100].decode(errors='ignore')}."


def empty(folder: Path) -> None:
    """Remove what is in a workspace whose lock is held; its mark goes last, so that the next write finds a rest."""
    for path in folder.iterdir():
        if path.name not in (MARK, LOCK):
            remove_entry(path)
    (folder / MARK).unlink(missing_ok=True)


def remove_empty(folder: Path) -> None:
    """Remove an emptied workspace, whose lock nobody holds any more."""
    with suppress(OSError):  # another process removes it, too, or a reader on Windows has a file of it open
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


def remove_entry(path: Path) -> None:
    """Remove a file, a folder or a link; of a link only the link itself."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- locks ----------------------------------------------------------------------------------------------------------


@contextmanager
def only_writer(lock_file: Path, message: str) -> Iterator[None]:
    """
    Hold a lock file, or refuse; the lock goes with the process that holds it.

    Args:
        lock_file: an empty file; made if need be, and never written to.
        message: of the error when another process holds it.

    Raises:
        ValueError: when another process holds the lock, or the file is a link or has contents.
    """
    if lock_file.is_symlink() or (lock_file.exists() and (not lock_file.is_file() or lock_file.stat().st_size)):
        raise ValueError(f"{lock_file}: is in the place of a lock file, but no lock file: move it away.")
    try:
        lock = WeakFileLock(lock_file, timeout=0.1)
        lock.__enter__()
    except Timeout:
        raise ValueError(message) from None
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


__all__ = [
    "complete_or_absent",
    "empty",
    "is_plain_name",
    "only_writer",
    "read_json",
    "read_mark",
    "remove_abandoned",
    "remove_empty",
    "remove_entry",
    "sync_file",
    "unlocked",
    "visible_files",
    "workspace",
    "workspaces",
    "write_json",
    "write_mark",
    "write_text",
]
