"""Reads the headers of safetensors files, by the format's own description: neither torch nor a weight is loaded."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Header = dict[str, tuple[str, tuple[int, ...], int]]  # weight -> format, shape, bytes
MAX_HEADER_BYTES = 25 * 10**6  # as on the Hub; the header of a model with 10,000 weights has 1.5 MB
_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError)


def read_header(file: str | Path) -> Header:
    """
    Names of the tensors in a safetensors file, with format, shape and size in bytes. No tensor is read.

    Raises:
        ValueError: when the file is not a complete safetensors file: other sizes than its header says, gaps, tensors
            that overlap, or a header of more than `MAX_HEADER_BYTES`.
    """
    file = Path(file)
    try:
        with file.open("rb") as handle:
            size = file.stat().st_size
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("incomplete header")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length:,} bytes, at most {MAX_HEADER_BYTES:,} are read")
            entries = json.loads(handle.read(length))
        return _checked(entries, size - 8 - length)
    except _ERRORS as error:
        reason = "its header is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{file}: not a complete safetensors file ({reason}). Download it again.") from error


def _checked(entries: Mapping[str, Any], num_bytes: int) -> Header:
    """The tensors of a header whose data has `num_bytes`, laid out without gaps."""
    found = {name: entry for name, entry in entries.items() if name != "__metadata__"}
    header, end = {}, 0
    for name, entry in sorted(found.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
            raise ValueError(f"the entry of {name!r} is damaged")
        if start != end or (stop - start) * 8 != math.prod(shape) * _bits(dtype):
            raise ValueError(f"{name!r} has {stop - start} bytes from {start}, which does not fit {dtype} {shape}")
        header[name], end = (dtype, shape, stop - start), stop
    if end != num_bytes:
        raise ValueError(f"{num_bytes} bytes of data instead of {end}")
    return {name: header[name] for name in sorted(header)}


def _bits(dtype: str) -> int:
    """Bits of one value: the digits at the end of its format's name, `BOOL` being a byte."""
    digits = "".join(character for character in dtype.split("_", maxsplit=1)[0] if character.isdigit())
    return int(digits) if digits else 8


__all__ = ["MAX_HEADER_BYTES", "Header", "read_header"]
