"""Names of a table's rows: files of its media column, real paths, and names that occur several times."""

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def media_names(column: pa.ChunkedArray) -> list[str | None]:
    """
    Name of the file in every row: its path, or "bytes" for content without a path; `None` without a file.

    Args:
        column: texts, or structures with `path` and `bytes`, whose bytes are not copied.
    """
    if not pa.types.is_struct(column.type):
        return [None if value is None else str(value) for value in column.to_pylist()]
    fields = {column.type.field(number).name for number in range(column.type.num_fields)}
    nothing = pa.nulls(len(column))
    paths = pc.struct_field(column, "path") if "path" in fields else nothing
    sizes = pc.binary_length(pc.struct_field(column, "bytes")) if "bytes" in fields else nothing
    without = ["bytes" if size else None for size in sizes.to_pylist()]
    return [str(path) if path else other for path, other in zip(paths.to_pylist(), without, strict=True)]


class Places:
    """Real paths of many files: the path of a folder is looked up once for all of its files."""

    def __init__(self) -> None:
        self._folder = lru_cache(4096)(os.path.realpath)

    def __reduce__(self) -> tuple[Any, ...]:
        return Places, ()

    def real_path(self, path: str) -> str:
        """The absolute path without links; the file need not exist."""
        folder, name = os.path.split(path)
        if name in ("", ".", ".."):
            return os.path.realpath(path)
        found = os.path.join(self._folder(folder), name)  # noqa: PTH118 - a Path takes ten times as long
        return os.path.realpath(found) if os.path.islink(found) else found  # noqa: PTH114


def repeated(names: Sequence[str]) -> Iterator[int]:
    """The rows, in order, whose name another row has as well."""
    hashes = np.fromiter(map(hash, names), np.int64, len(names))
    ordered = np.sort(hashes)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    rows = np.flatnonzero(np.isin(hashes, twice)).tolist() if len(twice) else []
    counts: dict[str, int] = {}
    for row in rows:  # few; unequal names may have the same hash
        counts[names[row]] = counts.get(names[row], 0) + 1
    yield from [row for row in rows if counts[names[row]] > 1]


__all__ = ["Places", "media_names", "repeated"]
