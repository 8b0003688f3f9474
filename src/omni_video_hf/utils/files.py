"""
Atomic writing of files, workspaces, and locks between processes.

A file is written in a workspace: a hidden folder with a mark file of this module and a lock. One rename then moves the
file to its final name. When a process is killed, its workspace keeps the mark and loses the lock, so that the next
write to the same target finds and removes it. Nothing else is ever removed, and links are never followed.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
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
    Yield a temporary path to write to; after the block the file is synced to disk and renamed to `path`.

    If the block raises, `path` is not touched. The temporary path is new and in a folder of this process, so that no
    link is followed. If `path` is a link, the link is replaced, and its target is not changed.

    Args:
        path: final path of the file; its folder is created if it does not exist.
    """
    path = Path(path)
    around = next((parent for parent in path.absolute().parents if parent.name.endswith(WORKSPACE_SUFFIX)), None)
    if around is not None and read_mark(around) is not None:  # not visible before the workspace is moved
        path.unlink(missing_ok=True)
        yield path
        path.chmod((around / MARK).stat().st_mode)
        return
    with workspace(path) as folder:
        partial = folder / path.name
        yield partial
        partial.chmod((folder / MARK).stat().st_mode)  # safetensors writes files that only their owner can read
        sync_file(partial)
        partial.replace(path)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file atomically; a file that already contains this text is not touched."""
    path = Path(path)
    if path.is_file() and not path.is_symlink() and path.read_bytes() == text.encode():
        return
    with complete_or_absent(path) as partial:
        partial.write_bytes(text.encode())


def read_json(path: str | Path) -> Any:
    """
    What a JSON file holds.

    Raises:
        ValueError: names the file, when it is damaged, nested too deeply to be read, or has endless numbers.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path}: cannot be read as JSON ({reason}).") from error


def write_json(path: str | Path, content: Any, sort_keys: bool = False) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2, sort_keys=sort_keys) + "\n")


def is_plain_name(name: str) -> bool:
    """Whether a file name in an index is a relative path without `..`, below the folder of the index."""
    parts = name.replace("\\", "/").split("/")
    return not Path(name).is_absolute() and not PureWindowsPath(name).drive and not {"", ".", ".."} & set(parts)


def visible_files(directory: Path, name: str) -> list[Path]:
    """Files that match a name or pattern at any depth, except in hidden folders."""
    found = sorted(directory.rglob(name))
    return [path for path in found if not any(part[0] == "." for part in path.relative_to(directory).parts[:-1])]


def sync_file(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


# --- workspaces -----------------------------------------------------------------------------------------------------


@contextmanager
def workspace(target: str | Path, parent: str | Path | None = None) -> Iterator[Path]:
    """
    Create a hidden folder to write in and remove it after the block.

    Workspaces for the same target that killed processes left are removed first.

    Args:
        target: file or folder that will be written; the name of the workspace is derived from it.
        parent: folder of the workspace, by default that of `target`; created if it does not exist.
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


@contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """
    A new folder among the system's temporary files, for copies of weights: those that killed processes left go first.

    Args:
        name: of the kind of work; all folders of one name are looked at.
    """
    with workspace(name, tempfile.gettempdir()) as folder:
        content = folder / "content"
        content.mkdir()
        yield content


def remove_abandoned(target: str | Path | None, parent: str | Path) -> None:
    """Remove what killed processes of this user left in `parent` for `target`, or for any target if it is `None`."""
    for folder in workspaces(target, parent, _is_of_this_user):
        with unlocked(folder) as is_free:
            # A mark with a list of files belongs to a save that is moving them, see `hub.staging`.
            is_left = is_free and "files" not in (read_mark(folder) or ())
            if is_left:
                empty(folder)
        if is_left:
            remove_empty(folder)


def workspaces(
    target: str | Path | None, parent: str | Path, wanted: Callable[[Path], bool] = Path.exists
) -> list[Path]:
    """All workspaces in `parent`, in use or left by killed processes, for `target`, or for any target if `None`."""
    name, parent = None if target is None else Path(target).name, Path(parent)
    prefix = "." if target is None else _prefix(Path(target))
    found = []
    for folder in sorted(parent.iterdir()) if parent.is_dir() else []:
        if folder.name.startswith(prefix) and folder.name.endswith(WORKSPACE_SUFFIX) and wanted(folder):
            mark = read_mark(folder)
            if (mark is None and _killed_before_mark(folder)) or (mark is not None and name in (None, mark["target"])):
                found.append(folder)
    return found


def _is_of_this_user(folder: Path) -> bool:
    """Nobody else can put a link in its place in a shared folder, and others' cannot be read."""
    try:
        return not hasattr(os, "geteuid") or folder.lstat().st_uid == os.geteuid()
    except FileNotFoundError:  # removed a moment ago
        return False


@contextmanager
def unlocked(folder: Path) -> Iterator[bool]:
    """Yield whether the process of a workspace has ended; if so, the block holds the workspace's lock."""
    was_killed_before_mark = _killed_before_mark(folder)  # the lock changes the folder's time
    try:
        lock = WeakFileLock(folder / LOCK, timeout=0.05)
        lock.__enter__()
    except (Timeout, OSError):  # in use, or removed a moment ago
        yield False
        return
    try:
        yield read_mark(folder) is not None or was_killed_before_mark
    finally:
        lock.__exit__(None, None, None)


def read_mark(folder: Path) -> dict[str, Any] | None:
    """Content of the mark file of a workspace; `None` for any other folder, and for a link."""
    path = folder / MARK
    if folder.is_symlink() or path.is_symlink() or not path.is_file() or (folder / LOCK).is_symlink():
        return None
    try:
        mark = read_json(path)
    except ValueError:
        return None
    is_ours = isinstance(mark, dict) and mark.get("written_by") == WRITER and isinstance(mark.get("target"), str)
    return mark if is_ours else None


def _killed_before_mark(folder: Path) -> bool:
    """Whether a process was killed before it marked its workspace: no mark, and older than a minute."""
    if folder.is_symlink() or not folder.is_dir() or time.time() - folder.stat().st_mtime < 60:
        return False
    return all(path.name in (LOCK, f"{MARK}.new") for path in folder.iterdir())


def write_mark(folder: Path, content: dict[str, Any]) -> None:
    """Replace the content of the mark file of a workspace."""
    new = folder / f"{MARK}.new"
    new.write_text(json.dumps({"written_by": WRITER, **content}), encoding="utf-8")
    if "files" in content:
        sync_file(new)
    new.replace(folder / MARK)


def _prefix(target: Path) -> str:
    """Prefix of the names of a target's workspaces; short enough for any file system."""
    return f".{target.name.encode()[:100].decode(errors='ignore')}."


def empty(folder: Path) -> None:
    """Empty a workspace whose lock is held. The mark is removed last, so that a later write finds what is left."""
    for path in folder.iterdir():
        if path.name not in (MARK, LOCK):
            remove_entry(path)
    (folder / MARK).unlink(missing_ok=True)


def remove_empty(folder: Path) -> None:
    """Remove an emptied workspace after its lock was released."""
    with suppress(OSError):  # another process may remove it too, or a reader on Windows may have a file open
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


def remove_entry(path: Path) -> None:
    """Remove a file, a folder or a link; the target of a link is not touched."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- locks ----------------------------------------------------------------------------------------------------------


@contextmanager
def only_writer(lock_file: Path, message: str) -> Iterator[None]:
    """
    Hold the lock of a file during the block. The lock is released when the process ends, also when it is killed.

    Args:
        lock_file: an empty file; created if it does not exist, and never written to.
        message: message of the error when another process holds the lock.

    Raises:
        ValueError: if another process holds the lock, or if the file is a link or has content.
    """
    if lock_file.is_symlink() or (lock_file.exists() and (not lock_file.is_file() or lock_file.stat().st_size)):
        raise ValueError(
            f"{lock_file}: a lock file of this name is needed, but this is a link or has content: move it away."
        )
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
    "temporary_folder",
    "unlocked",
    "visible_files",
    "workspace",
    "workspaces",
    "write_json",
    "write_mark",
    "write_text",
]
