"""
Columns of a cache's index, for reading samples: about 100 bytes an entry, where rows as dictionaries take 1,800.

An index of a million entries is read in pieces, straight into arrays, and checked as arrays. Only if that finds
something wrong, it is read again row by row, for an error that names the row.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...tasks import TASKS
from ..data.batch_sampler import Bucket
from ..data.collator import STACKED, TENSORS, bucket_of
from .cache_files import SCHEMA, SHARD_NAME, dimensions, read_table

PIECE = 65536  # rows that are decoded at a time
_WORDS = ("shard", "task", "instruction")  # columns with few different values


class IndexColumns:
    """
    The entries of an index as columns.

    Args:
        keys: key of every entry.
        numbers: `[entries]`, number within the shard.
        words: by name (`shard`, `task`, `instruction`) the different values, and `[entries]` which of them.
        shapes: by name of the tensor `[entries, dimensions]`; zeros for an entry without it.
    """

    def __init__(
        self,
        keys: pa.Array,
        numbers: np.ndarray,
        words: dict[str, tuple[list[Any], np.ndarray]],
        shapes: dict[str, np.ndarray],
    ) -> None:
        self.keys, self.numbers, self.words, self.shapes = keys, numbers, words, shapes

    @classmethod
    def read(cls, path: Path) -> "IndexColumns":
        """
        Read and check an index.

        Raises:
            ValueError: for a file that is damaged, no index, or has a row that is not valid.
        """
        try:
            with pq.ParquetFile(path) as file:
                columns = _of_file(file) if file.schema_arrow.equals(SCHEMA) else None
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
            columns = None
        if columns is None:  # another file, or one with something wrong in it, which this names
            columns = _of_batches(_batches_of(read_table(path)))
        if columns is None:
            raise ValueError(f"{path}: is damaged: copy the cache again.")
        return columns

    def __len__(self) -> int:
        return len(self.numbers)

    def key(self, row: int) -> str:
        """Key of an entry."""
        return self.keys[row].as_py()

    def word(self, name: str, row: int) -> Any:
        """`shard`, `task` or `instruction` of an entry."""
        values, codes = self.words[name]
        return values[codes[row]]

    def shapes_of(self, row: int) -> dict[str, list[int]]:
        """Name and shape of every tensor of an entry."""
        return {name: shape[row].tolist() for name, shape in self.shapes.items() if shape[row, 0] > 0}

    def values(self, name: str) -> list[Any]:
        """The values of `shard`, `task` or `instruction` that entries have."""
        values, codes = self.words[name]
        return [values[code] for code in np.unique(codes)]

    def take(self, rows: np.ndarray) -> "IndexColumns":
        """The entries of some rows, in their order."""
        return IndexColumns(
            self.keys.take(pa.array(rows)),
            self.numbers[rows],
            {name: (values, codes[rows]) for name, (values, codes) in self.words.items()},
            {name: shape[rows] for name, shape in self.shapes.items()},
        )

    def with_tasks(self, tasks: Sequence[str]) -> "IndexColumns":
        """The entries of some tasks."""
        values, codes = self.words["task"]
        return self.take(
            np.flatnonzero(np.isin(codes, [number for number, task in enumerate(values) if task in tasks]))
        )

    def buckets(self) -> list[Bucket]:
        """The bucket of every entry, see [`bucket_of`]; entries of one bucket have the same object."""
        columns = [self.words["task"][1]]
        for name, shape in self.shapes.items():
            columns += list(shape.T) if name in STACKED else [shape[:, 0] > 0]
        codes, first = _group(columns, len(self))
        found = [bucket_of(self.word("task", row), self.shapes_of(row)) for row in first.tolist()]
        return [found[code] for code in codes.tolist()]

    def widths(self, name: str, axis: int) -> np.ndarray:
        """`[entries]`: one axis of a tensor's shapes, 0 for entries without it."""
        return self.shapes[name][:, axis] if name in self.shapes else np.zeros(len(self), np.int32)


def _group(columns: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """A number for every row, the same for equal rows of the columns, and the first row of every number."""
    codes = np.zeros(length, np.int64)
    for column in columns:
        if length and (column == column[0]).all():
            continue
        encoded = pa.array(column).dictionary_encode()
        codes = codes * len(encoded.dictionary) + encoded.indices.to_numpy()
        codes = pa.array(codes).dictionary_encode().indices.to_numpy().astype(np.int64)
    _, first, numbers = np.unique(codes, return_index=True, return_inverse=True)
    return numbers, first


def _of_file(file: pq.ParquetFile) -> "IndexColumns | None":
    names = ["key", "number", *_WORDS, *(f"{name}_shape" for name in TENSORS)]
    return _of_batches(file.iter_batches(PIECE, columns=names))


def _batches_of(records: Sequence[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(records), PIECE):
        yield pa.RecordBatch.from_pylist(list(records[start : start + PIECE]), SCHEMA)


def _of_batches(batches: Iterator[pa.RecordBatch]) -> IndexColumns | None:
    """Columns of an index that is read in pieces; `None` if a row is not valid."""
    keys: list[pa.Array] = []
    numbers: list[np.ndarray] = []
    values: dict[str, dict[Any, int]] = {name: {} for name in _WORDS}
    codes: dict[str, list[np.ndarray]] = {name: [] for name in _WORDS}
    shapes: dict[str, list[np.ndarray]] = {name: [] for name in TENSORS}
    for batch in batches:
        key, number = batch.column("key"), batch.column("number")
        if key.null_count or number.null_count or pc.any(pc.equal(pc.binary_length(key), 0)).as_py():
            return None
        keys.append(key)
        numbers.append(number.to_numpy())
        for name in _WORDS:
            codes[name].append(_codes(batch.column(name), values[name]))
        any_tensor = np.zeros(len(batch), bool)
        for name in TENSORS:
            found = _shapes(batch.column(f"{name}_shape"), dimensions(name))
            if found is None:
                return None
            shapes[name].append(found)
            any_tensor |= found[:, 0] > 0
        if not any_tensor.all() or (numbers[-1] < 0).any():
            return None
    if not keys:
        return IndexColumns(pa.array([], pa.string()), np.zeros(0, np.int32), {}, {})
    valid = all(task in TASKS for task in values["task"])
    valid &= all(isinstance(name, str) and bool(SHARD_NAME.fullmatch(name)) for name in values["shard"])
    all_keys = pa.chunked_array(keys)
    if not valid or pc.count_distinct(all_keys).as_py() < len(all_keys):
        return None
    joined = {name: np.concatenate(parts) for name, parts in shapes.items()}
    return IndexColumns(
        all_keys.combine_chunks(),
        np.concatenate(numbers),
        {name: (list(values[name]), np.concatenate(codes[name])) for name in _WORDS},
        {name: shape for name, shape in joined.items() if shape[:, 0].any()},
    )


def _codes(column: pa.Array, known: dict[Any, int]) -> np.ndarray:
    """Which of the known values every value of a column is; new ones become known."""
    encoded = column.dictionary_encode(null_encoding="encode")
    places = [known.setdefault(value, len(known)) for value in encoded.dictionary.to_pylist()]
    return np.asarray(places, np.int32)[encoded.indices.to_numpy()]


def _shapes(column: pa.ListArray, length: int) -> np.ndarray | None:
    """`[rows, length]` from lists of sizes, zeros where there is no list; `None` for lists of another kind."""
    found = np.zeros((len(column), length), np.int32)
    if column.null_count == len(column):
        return found
    lengths = pc.list_value_length(column).drop_null().to_numpy()
    sizes = column.flatten()
    if sizes.null_count or (lengths != length).any():
        return None
    flat = sizes.to_numpy().reshape(-1, length)
    if (flat < 1).any():
        return None
    found[column.is_valid().to_numpy(zero_copy_only=False)] = flat
    return found


__all__ = ["IndexColumns"]
