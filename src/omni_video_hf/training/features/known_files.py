"""
`KnownFiles`: what earlier runs found in media files, so that a file that did not change costs one `stat`.

Beside the index of a cache lies `files.parquet`, with a hash of every file's path, its size and times, the hash of its
content, and its properties. It only saves work: a file whose size or times differ is read again, and without the
table, or with one that is damaged, every file is.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...media.video_reader import VideoInfo
from ...utils.files import complete_or_absent
from ..data.media_table import Media, MediaInfo, probe
from .cache_files import WRITTEN_BY

FILES = "files.parquet"
SETTLED = 2 * 10**9  # nanoseconds: a file that changed more recently may change again within one tick of its clock
FORMAT = 1  # of the properties; another one is not read
SCHEMA = pa.schema(
    {
        "path": pa.uint64(),  # hash: a cache that is shared does not tell where its data were
        "size": pa.int64(),
        "mtime": pa.int64(),  # nanoseconds
        "ctime": pa.int64(),
        "sha256": pa.string(),
        "info": pa.dictionary(pa.int32(), pa.string()),
    }
).with_metadata({**WRITTEN_BY, "files_format": str(FORMAT)})
Stamp = tuple[int, int, int]  # size, time of content, time of any change


@dataclass(slots=True)
class _Known:
    """What is known of one file."""

    stamp: Stamp
    is_settled: bool
    sha256: str | None = None
    info: MediaInfo | None = None


class KnownFiles:
    """
    Properties and hashes of media files, remembered by path, size and times.

    Args:
        folder: the cache whose table is read and written; `None` remembers within this run only.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.path = None if folder is None else Path(folder) / FILES
        self._seen: dict[int, _Known] = {}
        self._table = _read(self.path)
        self._paths = np.zeros(0, np.uint64) if self._table is None else self._table["path"].to_numpy()
        self._order = np.argsort(self._paths)
        self._paths = self._paths[self._order]

    def info(self, media: Media) -> MediaInfo:
        """Properties of a file, see [`probe`], which raises for a bad one."""
        known = self._known(media)
        if known is None:
            return probe(media)
        if known.info is None:
            known.info = probe(media)
        return known.info

    def sha256(self, media: Media) -> str:
        """SHA-256 hash of a file's content."""
        known = self._known(media)
        if known is None:
            return media.sha256()
        if known.sha256 is None:
            known.sha256 = media.sha256()
        return known.sha256

    def check_unchanged(self, media: Media | None) -> None:
        """
        Refuse a file that changed since it was first looked at in this run.

        Raises:
            ValueError: for such a file.
        """
        if media is None or media.path is None:
            return
        seen = self._seen.get(_hash(media.path))
        if seen is not None and _stamp(media.path) != seen.stamp:
            raise ValueError(f"{media.name}: changed while its features were computed: run the command again.")

    def found(self) -> list[tuple[Any, ...]]:
        """Rows of the table for all files that were looked at, in plain values."""
        return [
            (path, *known.stamp, known.sha256, _written(known.info))
            for path, known in self._seen.items()
            if known.is_settled and known.sha256 is not None
        ]

    def save(self, rows: Iterable[tuple[Any, ...]]) -> None:
        """Write the table of `rows`, from [`found`] of all processes, unless the folder cannot be written."""
        columns = list(zip(*{row[0]: row for row in rows}.values(), strict=True))
        if self.path is None or not columns:
            return
        arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        try:
            with complete_or_absent(self.path) as partial:
                pq.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), partial)
        except OSError:
            return

    def _known(self, media: Media) -> _Known | None:
        """What is known of a file, perhaps only its size and times; `None` for bytes and what is no file."""
        if media.path is None:
            return None
        path = _hash(media.path)
        known = self._seen.get(path)
        if known is None:
            stamp = _stamp(media.path)
            if stamp is None:
                return None
            is_settled = time.time_ns() - max(stamp[1:]) > SETTLED
            known = self._stored(path, stamp) or _Known(stamp, is_settled)
            self._seen[path] = known
        return known

    def _stored(self, path: int, stamp: Stamp) -> _Known | None:
        place = int(np.searchsorted(self._paths, np.uint64(path)))
        if self._table is None or place == len(self._paths) or int(self._paths[place]) != path:
            return None
        row = {name: self._table[name][int(self._order[place])].as_py() for name in SCHEMA.names}
        if (row["size"], row["mtime"], row["ctime"]) != stamp:
            return None
        return _Known(stamp, True, row["sha256"], _read_info(row["info"]))


def _hash(path: Path) -> int:
    return int.from_bytes(hashlib.blake2b(os.path.abspath(path).encode(), digest_size=8).digest())  # noqa: PTH100


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None  # `probe` says what is wrong
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read(path: Path | None) -> pa.Table | None:
    if path is None or path.is_symlink() or not path.is_file():
        return None
    try:
        table = pq.read_table(path, partitioning=None)
        is_ours = table.schema.equals(SCHEMA, check_metadata=False) and table.schema.metadata == SCHEMA.metadata
    except (pa.ArrowException, OSError, ValueError):
        return None
    return table.combine_chunks() if is_ours else None


def _written(info: MediaInfo | None) -> str | None:
    return None if info is None else json.dumps(asdict(info), default=str)


def _read_info(text: str | None) -> MediaInfo | None:
    if text is None:
        return None
    try:
        values = json.loads(text)
        video = values.pop("video")
        if video is not None:
            video = VideoInfo(**video | {"sample_aspect_ratio": Fraction(video["sample_aspect_ratio"])})
        return MediaInfo(**values, video=video)
    except (ValueError, TypeError, KeyError, ZeroDivisionError):
        return None


__all__ = ["FILES", "KnownFiles"]
