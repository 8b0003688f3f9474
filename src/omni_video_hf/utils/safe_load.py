"""
Safe loading of torch and pickle files: `load_checkpoint` reads tensors and plain values and runs no code of the file.

Archives of a current `torch.save` are read by torch's weights-only loader, memory-mapped. Older files, and plain
pickles of tensors, whose bytes contain a nested torch stream, are read by an unpickler that can only create
containers, numbers, strings and tensors.

A small file can also cause endless work: if each of 40 nested lists contains the next one ten times, a walk through
them visits 10^40 entries. The pickle of an archive is therefore checked before torch runs it, and every result is
checked against the read budget.
"""

import io
import mmap
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch

from .read_budget import current_budget, how_to_raise

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_NESTING = 2  # a pickled tensor contains one torch stream, which contains no other

STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Opcodes that create objects of classes, or look up code in registries; tensors need none of them.
PLAIN_KEYS = (str, bytes, int, float, bool, type(None))
MAX_INTEGER_KEY = 2**48  # larger than any address; a file can contain millions of larger integers whose hashes collide
HASHING = {("builtins", "set"), ("builtins", "frozenset"), ("collections", "Counter"), ("collections", "OrderedDict")}
REFUSED_OPCODES = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}


class UnsafeCheckpointError(ValueError):
    """The file refers to code to be run. None of it was run."""


class CorruptCheckpointError(ValueError):
    """The file is missing, empty, truncated, damaged, or not a torch or pickle file."""


def load_checkpoint(path: str | Path) -> Any:
    """
    Load tensors and plain values from a `.pt`, `.pth`, `.bin` or `.pkl` file. Its content determines the format.

    Tensors are memory-mapped if the format allows it, so that bytes are read when they are used.

    Args:
        path: the file.

    Returns:
        The saved value: nested dicts, lists and tuples of tensors, numbers and strings.

    Raises:
        UnsafeCheckpointError: for a file that needs anything but tensors and plain values. No code of it was run.
        CorruptCheckpointError: for a file that is missing, empty, truncated, of another format, or larger when loaded
            than the read budget allows.
    """
    path = Path(path)
    if not path.is_file():
        raise CorruptCheckpointError(f"{path}: {'is a folder' if path.is_dir() else 'does not exist'}.")
    if path.stat().st_size == 0:
        raise CorruptCheckpointError(f"{path}: the file is empty. Download it again.")
    with path.open("rb") as file:
        head = file.read(64)
        if head.startswith(b"version https://git-lfs"):
            raise CorruptCheckpointError(f"{path}: is a Git LFS pointer, not the file itself. Run `git lfs pull`.")
        if head.startswith(b"PK\x03\x04"):
            return _checked_tree(path, _load_archive(path))
        # A private mapping is writable, as torch requires, and never changes the file.
        buffer = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    try:
        value = _with_tensors(_load_stream(buffer, _Allowance(MAX_NESTING * len(buffer))), {})
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(f"{path}: {error} Nothing in it was run.") from None
    except Exception as error:  # malicious bytes can raise any error, also MemoryError and RecursionError
        raise CorruptCheckpointError(
            f"{path}: not a readable torch or pickle file ({type(error).__name__}: {error}). Download it again."
        ) from error
    return _checked_tree(path, value)


def _checked_tree(path: Path, value: Any) -> Any:
    """Return the value if its entries and its tensors are within the read budget."""
    budget, size = current_budget(), path.stat().st_size
    try:
        nodes, largest = _measure(value, {})
    except (RecursionError, ValueError) as error:
        raise CorruptCheckpointError(f"{path}: its values are nested without end ({error}).") from None
    if nodes > max(budget.max_steps, size):  # without repetitions, every node takes at least one byte of the file
        raise CorruptCheckpointError(
            f"{path}: its {size:,} bytes repeat the same values so often that they have more than "
            f"{budget.max_steps:,} entries. {how_to_raise('max_steps')}"
        )
    if largest > max(budget.max_bytes, size):
        raise CorruptCheckpointError(
            f"{path}: a tensor repeats its values and would take {largest:,} bytes, more than {budget.max_bytes:,}. "
            f"{how_to_raise('max_bytes')}"
        )
    return value


def _measure(value: Any, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Number of nodes of `value` as a tree, and bytes of its largest tensor; every object is visited once."""
    if isinstance(value, torch.Tensor):
        return 1, value.numel() * value.element_size()
    if not isinstance(value, (dict, list, tuple)):
        return 1, 0
    if id(value) not in known:
        known[id(value)] = None
        children = [_measure(entry, known) for entry in (value.values() if isinstance(value, dict) else value)]
        nodes = 1 + len(value) * isinstance(value, dict) + sum(number for number, _ in children)
        known[id(value)] = nodes, max((largest for _, largest in children), default=0)
    measured = known[id(value)]
    if measured is None:
        raise ValueError("a container contains itself")
    return measured


def _load_archive(path: Path) -> Any:
    """Load a zip archive of `torch.save` with torch's weights-only loader."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise UnsafeCheckpointError("contains TorchScript code; only tensors are read.")
            _dry_run(path, archive)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(f"{path}: {error} Nothing in it was run.") from None
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n\n")[-1].split("\n")[0]
        if "GLOBAL" in str(error) or "global" in str(error):
            raise UnsafeCheckpointError(
                f"{path}: refers to something other than tensors ({_named_global(str(error))}). Nothing in it was run."
            ) from None
        raise CorruptCheckpointError(f"{path}: not a readable torch archive ({reason}).") from error
    except Exception as error:  # malicious bytes can raise any error
        reason = str(error).split("\n")[0]
        raise CorruptCheckpointError(
            f"{path}: not a readable torch archive ({type(error).__name__}: {reason}). Download it again."
        ) from error


def _dry_run(path: Path, archive: zipfile.ZipFile) -> None:
    """
    Go through the pickle of an archive without creating any object of it.

    Raises:
        ValueError: for compressed or overlapping records, which `torch.save` never writes, and for keys whose hash
            cannot be computed in reasonable time.
    """
    records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("contains compressed records, which `torch.save` never writes")
    if sum(record.file_size for record in records) > path.stat().st_size:
        raise ValueError("its records overlap")
    with path.open("rb") as file:
        for record in records:
            if record.filename.endswith("data.pkl"):
                file.seek(record.header_offset + 26)
                name_length, extra_length = struct.unpack("<HH", file.read(4))
                file.seek(name_length + extra_length, io.SEEK_CUR)
                _DryRun(io.BytesIO(file.read(record.file_size))).load()


def _named_global(message: str) -> str:
    """The name of the class or function that torch refused, from its long message."""
    words = [word for word in message.replace("`", " ").split() if "." in word and word[0].isalpha()]
    return next((word.strip(".,") for word in words if not word.startswith("torch.load")), "an unknown global")


# --- streams: legacy torch files and pickles ------------------------------------------------------------------------


class _Frozen:
    """Base class of the objects that a pickle can create here. A pickle cannot set attributes on them."""

    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> None:
        raise UnsafeCheckpointError(f"sets the attribute {name!r} of a {_type_name(self)}.")


class _Storage(_Frozen):
    """The flat memory of tensors; `memory` is set once it is found in the file."""

    __slots__ = ("dtype", "memory", "numel")
    dtype: torch.dtype
    memory: Any
    numel: int

    def __init__(self, dtype: torch.dtype, numel: int) -> None:
        for name, value in (("dtype", dtype), ("numel", numel), ("memory", None)):
            object.__setattr__(self, name, value)


class _Tensor(_Frozen):
    """A view of a storage, whose numbers are checked before torch gets them."""

    __slots__ = ("offset", "size", "storage", "stride")
    offset: int
    size: tuple[int, ...]
    storage: _Storage
    stride: tuple[int, ...]

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> None:
        if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
            raise ValueError("a tensor is malformed")
        numbers = [offset, *size, *stride]
        if len(size) != len(stride) or any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError("a tensor's offset, size or stride is malformed")
        for name, value in (("storage", storage), ("offset", offset), ("size", size), ("stride", stride)):
            object.__setattr__(self, name, value)

    def build(self) -> torch.Tensor:
        """Create the tensor, which shares memory with the file."""
        storage, size, stride = self.storage, self.size, self.stride
        if storage.memory is None:
            raise ValueError("a tensor has no storage")
        if 0 in size:
            return torch.empty(size, dtype=storage.dtype)
        last = self.offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if last >= storage.numel:
            raise ValueError(f"a tensor of size {size} reaches beyond its storage of {storage.numel} elements")
        flat = torch.frombuffer(storage.memory, dtype=storage.dtype, count=storage.numel)
        return flat.as_strided(size, stride, self.offset)


class _Function(_Frozen):
    """A function that a pickle may call."""

    __slots__ = ("call",)
    call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "call", call)

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


def _type_name(value: _Frozen) -> str:
    return type(value).__name__.lstrip("_").lower()


def _with_tensors(value: Any, built: dict[int, Any]) -> Any:
    """Replace every [`_Tensor`] in `value` by a torch tensor; an object that occurs twice is created once."""
    if isinstance(value, _Frozen) and not isinstance(value, _Tensor):
        raise UnsafeCheckpointError(f"contains a bare {_type_name(value)}.")
    if not isinstance(value, (_Tensor, dict, list, tuple)):
        return value
    if id(value) not in built:
        built[id(value)] = _Tensor  # marks a container that is not complete
        if isinstance(value, _Tensor):
            built[id(value)] = value.build()
        elif isinstance(value, dict):
            built[id(value)] = {key: _with_tensors(entry, built) for key, entry in value.items()}
        else:
            built[id(value)] = type(value)([_with_tensors(entry, built) for entry in value])
    if built[id(value)] is _Tensor:
        raise ValueError("a container contains itself")
    return built[id(value)]


def _check_keys(keys: Iterable[Any]) -> None:
    """
    Refuse keys that are not plain values.

    The hash of a nested tuple visits all its entries in one call that cannot be interrupted.
    """
    for key in keys:
        for part in key if isinstance(key, tuple) else (key,):
            if not isinstance(part, PLAIN_KEYS) or (isinstance(part, int) and abs(part) > MAX_INTEGER_KEY):
                raise ValueError(f"a key is a {type(key).__name__} that is not a plain value")


_PythonUnpickler: Any = pickle._Unpickler  # its stack and its methods are not in the library's annotations


class _GuardedUnpickler(_PythonUnpickler):  # the unpickler in C has no hook before it hashes keys
    """The unpickler in Python, restricted to containers with plain keys."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def _load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def _load_setitems(self) -> None:
        _check_keys(self.stack[::2])
        super().load_setitems()

    def _load_dict(self) -> None:
        _check_keys(self.stack[::2])
        super().load_dict()

    def _load_additems(self) -> None:
        _check_keys(self.stack)
        super().load_additems()

    def _load_frozenset(self) -> None:
        _check_keys(self.stack)
        super().load_frozenset()

    dispatch[pickle.SETITEM[0]] = _load_setitem
    dispatch[pickle.SETITEMS[0]] = _load_setitems
    dispatch[pickle.DICT[0]] = _load_dict
    dispatch[pickle.ADDITEMS[0]] = _load_additems
    dispatch[pickle.FROZENSET[0]] = _load_frozenset


class _Unpickler(_GuardedUnpickler):
    """Creates containers, numbers, strings and tensors; refuses every other class and function."""

    def __init__(
        self, file: io.BytesIO, allowance: "_Allowance", nesting: int, storages: dict[str, _Storage] | None = None
    ) -> None:
        super().__init__(file)
        self.storages = {} if storages is None else storages
        self.known = {
            ("torch._utils", "_rebuild_tensor_v2"): _Function(_Tensor),
            ("torch._utils", "_rebuild_parameter"): _Function(lambda data, *_: data),
            ("torch.storage", "_load_from_bytes"): _Function(lambda data: _load_storage(data, allowance, nesting + 1)),
            ("collections", "OrderedDict"): _Function(_ordered_dict),
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.known:
            return self.known[module, name]
        if module == "torch" and name in STORAGE_TYPES:
            return _Storage(STORAGE_TYPES[name], -1)  # stands for the type in the persistent id that follows
        raise UnsafeCheckpointError(f"refers to {module}.{name}; only tensors and plain values are read.")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, numel, view = pid
        if kind != "storage" or view is not None or not isinstance(key, str) or not isinstance(numel, int):
            raise ValueError(f"a storage reference is malformed: {kind!r}")
        if key not in self.storages:
            self.storages[key] = _Storage(storage_type.dtype, numel)
        return self.storages[key]


def _ordered_dict(*pairs: Any) -> OrderedDict:
    """Create an `OrderedDict` after checking its keys."""
    for entries in pairs:
        _check_keys(entries if isinstance(entries, dict) else [key for key, _ in entries])
    return OrderedDict(*pairs)


class _Anything:
    """Placeholder for every object that is neither a container nor a plain value, see [`_DryRun`]."""

    def __init__(self, name: tuple[str, str] | None = None) -> None:
        self.name = name

    def __call__(self, *args: Any) -> Any:
        if self.name == ("collections", "OrderedDict"):
            return _ordered_dict(*args)
        if self.name in HASHING and args:
            _check_keys(args[0])
        if self.name == ("builtins", "bytearray") and args and isinstance(args[0], int):
            raise ValueError("allocates an empty array of bytes")
        return _Anything()

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Ignore a value, with the interface of a list."""

    def add(self, value: Any) -> None:
        """Ignore a value, with the interface of a set."""


class _DryRun(_GuardedUnpickler):
    """Goes through a pickle of any classes without importing one of them."""

    dispatch: ClassVar[dict[int, Any]] = dict(_GuardedUnpickler.dispatch)

    def find_class(self, module: str, name: str) -> _Anything:
        return _Anything((module, name))

    def persistent_load(self, pid: Any) -> _Anything:  # noqa: ARG002
        return _Anything()

    def get_extension(self, code: int) -> None:
        raise ValueError(f"refers to the registered extension {code}")

    def _load_object(self) -> None:
        """Opcodes INST and OBJ: replace everything down to the mark by one placeholder."""
        self.pop_mark()
        self.append(_Anything())

    def _load_inst(self) -> None:
        self.readline(), self.readline()
        self._load_object()

    def _load_newobj(self) -> None:
        del self.stack[-2:]
        self.append(_Anything())

    def _load_newobj_ex(self) -> None:
        del self.stack[-3:]
        self.append(_Anything())

    def _load_build(self) -> None:
        del self.stack[-1:]

    dispatch[pickle.INST[0]] = _load_inst
    dispatch[pickle.OBJ[0]] = _load_object
    dispatch[pickle.NEWOBJ[0]] = _load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = _load_newobj_ex
    dispatch[pickle.BUILD[0]] = _load_build


class _Allowance:
    """Limit of the bytes of all nested streams: a file contains each once, but can refer to it many times."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, number: int) -> None:
        """Subtract `number` bytes; raise a `ValueError` if fewer are left."""
        self.left -= number
        if self.left < 0:
            raise ValueError("the stream of a tensor is used too often")


def _load_stream(buffer: memoryview, allowance: _Allowance, nesting: int = 0) -> Any:
    """Load one pickle or legacy torch stream: magic number, protocol, system, object, keys, bytes of the storages."""
    if nesting > MAX_NESTING:
        raise ValueError("streams are nested too deep")
    first, position = _unpickle(buffer, 0, allowance, nesting)
    if first != LEGACY_MAGIC:
        if position != len(buffer):
            raise ValueError(f"{len(buffer) - position} bytes follow the end of the pickle")
        return first
    protocol, position = _unpickle(buffer, position, allowance, nesting)
    system, position = _unpickle(buffer, position, allowance, nesting)
    if protocol != LEGACY_PROTOCOL or not system["little_endian"]:
        raise ValueError(f"torch stream of protocol {protocol}, system {system}")
    storages: dict[str, _Storage] = {}
    value, position = _unpickle(buffer, position, allowance, nesting, storages)
    keys, position = _unpickle(buffer, position, allowance, nesting)
    if sorted(keys) != sorted(storages):
        raise ValueError("the list of storages does not fit the tensors")
    for key in keys:
        storage = storages[key]
        size = storage.numel * storage.dtype.itemsize
        stored = int.from_bytes(buffer[position : position + 8], "little", signed=True)
        position += 8
        if stored != storage.numel or storage.numel < 0 or position + size > len(buffer):
            raise ValueError(f"storage {key} of {storage.numel} elements is cut short")
        object.__setattr__(storage, "memory", buffer[position : position + size])
        position += size
    if position != len(buffer):
        raise ValueError(f"{len(buffer) - position} bytes follow the last tensor")
    return value


def _unpickle(
    buffer: memoryview,
    position: int,
    allowance: _Allowance,
    nesting: int,
    storages: dict[str, _Storage] | None = None,
) -> tuple[Any, int]:
    """The object of the pickle at `position`, and the end of the pickle. All opcodes are checked before any is run."""
    end = position + _checked_length(_Reader(buffer[position:]))
    value = _Unpickler(io.BytesIO(buffer[position:end]), allowance, nesting, storages).load()
    return value, end


class _Reader(io.RawIOBase):
    """Reads a buffer without copying it first."""

    def __init__(self, buffer: memoryview) -> None:
        super().__init__()
        self.buffer, self.position = buffer, 0

    def read(self, size: int = -1) -> bytes:
        end = len(self.buffer) if size < 0 else self.position + size
        data = bytes(self.buffer[self.position : end])
        self.position += len(data)
        return data

    def readline(self, size: int | None = -1) -> bytes:  # noqa: ARG002
        chunk = bytes(self.buffer[self.position : self.position + 4096])
        line = chunk[: chunk.find(b"\n") + 1] or chunk
        self.position += len(line)
        return line

    def tell(self) -> int:
        return self.position


def _checked_length(reader: _Reader) -> int:
    """Length of the pickle in `reader`, whose opcodes must be harmless."""
    file: Any = reader  # of `IO[bytes]`, only `read`, `readline` and `tell` are used
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in REFUSED_OPCODES:
            raise UnsafeCheckpointError(f"uses the pickle opcode {opcode.name}, which creates objects.")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET") and (
            int(argument or 0) > len(reader.buffer)
        ):
            raise ValueError("a memo index is larger than the file")  # the unpickler would allocate that much
    return reader.tell()


def _load_storage(data: Any, allowance: _Allowance, nesting: int) -> _Storage:
    """The storage in the torch stream of a pickled tensor."""
    if not isinstance(data, (bytes, bytearray)):
        raise ValueError("the stream of a tensor is not bytes")
    allowance.take(len(data))
    storage = _load_stream(memoryview(bytearray(data)), allowance, nesting)
    if not isinstance(storage, _Storage) or storage.memory is None:
        raise ValueError("the stream of a tensor does not contain a storage")
    return storage


__all__ = ["CorruptCheckpointError", "UnsafeCheckpointError", "load_checkpoint"]
