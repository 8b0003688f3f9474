"""
Which shards of a cache are there, and which have been checked: the manifest remembers that their tensors were read.

The memory holds as long as size and time of every shard are those of the check. Copying a cache changes the times, so
that the copy is checked once more.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...utils.files import complete_or_absent
from .cache_files import MANIFEST, check_inside, only_run, read_manifest

_ENTRY = "checked"  # in the manifest: index, number of shards, and a hash of their names, sizes and times


def missing_shards(folder: Path, names: Sequence[str]) -> list[str]:
    """
    Names of shards that are no files in the cache.

    Raises:
        ValueError: for a link that puts a shard outside of the cache.
    """
    shards = folder / "shards"
    check_inside(folder, shards)
    wanted, there = set(names), set[str]()
    if shards.is_dir():
        with os.scandir(shards) as entries:
            for entry in entries:
                name = entry.name.removesuffix(".safetensors")
                if name not in wanted or name == entry.name:
                    continue
                if entry.is_symlink():
                    check_inside(folder, Path(entry.path))
                if entry.is_file():
                    there.add(name)
    return sorted(wanted - there)


def shards_stamp(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Names, sizes and times of shards as one hash; it changes with every shard."""
    digest = hashlib.sha256()
    for name in sorted(names):
        found = (folder / "shards" / f"{name}.safetensors").stat()
        digest.update(f"{name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return {"shards": len(names), "hash": digest.hexdigest()[:32]}


def is_checked(manifest: dict[str, Any], stamp: dict[str, Any]) -> bool:
    """Whether the manifest says that shards with this stamp hold what its index says."""
    return manifest.get(_ENTRY) == {"index": manifest["index"], **stamp}


def remember_check(folder: Path, manifest: dict[str, Any], stamp: dict[str, Any]) -> None:
    """
    Write into the manifest that the shards were read and are good.

    Nothing is written where that cannot be done safely: in a folder that cannot be written, in one whose files are
    links, as in the Hub's cache, and while a run changes the cache. The check is then made again the next time.
    """
    path = folder / MANIFEST
    if path.is_symlink() or not os.access(folder, os.W_OK):
        return
    try:
        with only_run(folder):
            now = read_manifest(folder)
            if now["index"] != manifest["index"]:
                return
            now[_ENTRY] = {"index": now["index"], **stamp}
            with complete_or_absent(path) as partial:
                partial.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
            manifest[_ENTRY] = now[_ENTRY]
    except (ValueError, OSError):  # another run has the lock, or the disk is full
        return


__all__ = ["is_checked", "missing_shards", "remember_check", "shards_stamp"]
