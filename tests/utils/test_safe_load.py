import collections
import io
import os
import pickle
import struct
import zipfile

import pytest
import torch

from omni_video_hf.utils.read_budget import read_budget
from omni_video_hf.utils.safe_load import CorruptCheckpointError, UnsafeCheckpointError, load_checkpoint

REFUSALS = (UnsafeCheckpointError, CorruptCheckpointError)


class Payload:
    """Runs a command when unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Stream:
    """A pickled tensor whose nested stream is `data`."""

    def __init__(self, data):
        self.data = data

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.data,)


def contents():
    base = torch.randn(10)
    return {
        "transposed": torch.randn(3, 4).t(),
        "integers": torch.arange(5),
        "half": torch.randn(3).half(),
        "scalar": torch.tensor(2.0).bfloat16(),
        "empty": torch.zeros(0, 3),
        "flags": [torch.ones(2, dtype=torch.bool)],
        "shared": (base[2:5], base[::2]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "step": 3,
        "name": "x",
    }


def equal(left, right):
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


def legacy_bytes(value):
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".pkl", ""])
@pytest.mark.parametrize("kind", ["archive", "legacy", "pickle"])
def test_good_files_are_told_apart_by_content(tmp_path, kind, suffix):
    path, value = tmp_path / f"file{suffix}", contents()
    if kind == "pickle":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=kind == "archive")
    assert equal(load_checkpoint(path), value)


@pytest.mark.parametrize("zipped", [True, False])
def test_state_dicts_with_metadata(tmp_path, zipped):
    value = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict()
    torch.save({"model_state_dict": value, "epoch": 1}, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    assert equal(load_checkpoint(tmp_path / "m.pt")["model_state_dict"], dict(value))


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(legacy_bytes(torch.zeros(4)))
    before = path.read_bytes()
    load_checkpoint(path).fill_(7)
    assert path.read_bytes() == before


def hostile_files(marker):
    payload = Payload(marker)
    plain = pickle.dumps(payload)
    legacy = legacy_bytes({"weight": torch.zeros(2), "x": payload})
    archive = io.BytesIO()
    torch.save({"weight": torch.zeros(2), "x": payload}, archive)
    yield "plain", plain
    yield "in a dict", pickle.dumps({"<img_st>": torch.zeros(1, 2), "x": payload})
    yield "nested plain", pickle.dumps({"x": Stream(plain)})
    yield "nested legacy", pickle.dumps({"x": Stream(legacy)})
    yield "nested twice", pickle.dumps({"x": Stream(pickle.dumps(Stream(plain)))})
    yield "legacy", legacy
    yield "archive", archive.getvalue()
    for protocol in (0, 1, 2, 4, 5):
        yield f"protocol {protocol}", pickle.dumps([payload], protocol=protocol)
    command = f"touch {marker}".encode()
    short = b"\x8c" + bytes([len(command)]) + command
    for module, name in (
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "__import__"),
        ("torch", "_utils.os.system"),
        ("torch", "serialization.os.system"),
        ("torch._utils", "os.system"),
        ("torch.storage", "_load_from_bytes.__globals__"),
        ("collections", "OrderedDict.__init_subclass__"),
    ):
        names = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
        yield f"{module}.{name}", b"\x80\x04" + names + b"\x93" + short + b"\x85R."
    yield "INST", b"(S'" + command + b"'\niposix\nsystem\n."
    yield "OBJ", b"(cposix\nsystem\nS'" + command + b"'\no."
    yield "EXT", b"\x80\x02\x82\x01."
    yield "persistent id", b"\x80\x02cposix\nsystem\nQ."
    yield (
        "attribute of a function",
        (b"\x80\x04\x8c\x0ctorch._utils\x8c\x12_rebuild_tensor_v2\x93N}\x8c\x04callN\x73\x86b."),
    )


HOSTILE = [name for name, _ in hostile_files("/nowhere")]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("suffix", [".pkl", ".pt", ".bin"])
def test_hostile_files_are_refused_by_name_and_nothing_runs(tmp_path, name, suffix):
    marker, path = tmp_path / "ran", tmp_path / f"hostile{suffix}"
    path.write_bytes(dict(hostile_files(marker))[name])
    with pytest.raises(REFUSALS) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["plain", "legacy", "archive"])
def test_the_crafted_files_are_really_hostile(tmp_path, name):
    """A test of the tests: opened naively, they run."""
    marker, path = tmp_path / "ran", tmp_path / "file"
    path.write_bytes(dict(hostile_files(marker))[name])
    if name == "plain":
        pickle.loads(path.read_bytes())  # noqa: S301
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("kind", ["archive", "legacy", "pickle"])
def test_files_cut_anywhere_are_refused(tmp_path, kind):
    value = {"a": torch.arange(3.0), "b": [torch.zeros(2, dtype=torch.int64), "text"]}
    path = tmp_path / "cut.pt"
    if kind == "pickle":
        whole = pickle.dumps(value)
    elif kind == "legacy":
        whole = legacy_bytes(value)
    else:
        torch.save(value, path)
        whole = path.read_bytes()
    step = 1 if kind != "archive" else 7
    for length in range(0, len(whole), step):
        path.write_bytes(whole[:length])
        with pytest.raises(REFUSALS, match=r"cut\.pt"):
            load_checkpoint(path)
    if kind != "archive":
        path.write_bytes(whole + b"more")
        with pytest.raises(CorruptCheckpointError, match="4 bytes follow"):
            load_checkpoint(path)


@pytest.mark.parametrize("kind", ["legacy", "pickle"])
def test_flipped_bytes_never_do_harm(tmp_path, kind):
    value = {"a": torch.arange(3.0), "b": [torch.zeros(2, dtype=torch.int64), "text"]}
    whole = legacy_bytes(value) if kind == "legacy" else pickle.dumps(value)
    path = tmp_path / "flipped.pt"
    for position in range(len(whole)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(whole)
            damaged[position] ^= flip
            path.write_bytes(damaged)
            try:
                loaded = load_checkpoint(path)
            except REFUSALS:
                continue
            assert isinstance(loaded, (dict, list, str, int, type(None), tuple, torch.Tensor))


def tensor_pickle(size, stride, offset=0, numel=4):
    memory = torch.zeros(numel).untyped_storage()
    stream = legacy_bytes(torch.storage.TypedStorage(wrap_storage=memory, dtype=torch.float32))

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (
                Stream(stream),
                offset,
                size,
                stride,
                False,
                collections.OrderedDict(),
            )

    return pickle.dumps(Tensor())


def test_views_are_checked_against_their_storage(tmp_path):
    path = tmp_path / "view.pkl"
    path.write_bytes(tensor_pickle((2, 2), (2, 1)))
    assert load_checkpoint(path).shape == (2, 2)
    for size, stride, offset in (
        ((5,), (1,), 0),
        ((4,), (1,), 1),
        ((2,), (2**62,), 0),
        ((2**62, 2**62), (1, 1), 0),
        ((-1,), (1,), 0),
        ((2,), (-1,), 3),
        ((2,), (1,), -1),
        ((2,), (1, 1), 0),
        ((True,), (1,), 0),
    ):
        path.write_bytes(tensor_pickle(size, stride, offset))
        with pytest.raises(CorruptCheckpointError, match=r"view\.pkl"):
            load_checkpoint(path)


def test_claimed_sizes_are_not_allocated(tmp_path):
    path = tmp_path / "bomb.pkl"
    for data in (
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",  # bytes of a terabyte
        b"\x80\x04N\x72" + struct.pack("<I", 2**31) + b".",  # a memo of two billion entries
    ):
        path.write_bytes(data)
        with pytest.raises(CorruptCheckpointError):
            load_checkpoint(path)
    stream = bytearray(legacy_bytes(torch.zeros(4)))
    position = bytes(stream).rindex(struct.pack("<q", 4))
    stream[position : position + 8] = struct.pack("<q", 2**60)
    path.write_bytes(stream)
    with pytest.raises(CorruptCheckpointError, match="cut short"):
        load_checkpoint(path)


def test_other_kinds_of_files(tmp_path):
    cases = {
        "empty.pt": (b"", "empty"),
        "pointer.pt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        "page.bin": (b"<!DOCTYPE html><html></html>", "not a readable"),
        "text.pkl": (b"hello", "not a readable"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CorruptCheckpointError, match=message):
            load_checkpoint(tmp_path / name)
    with pytest.raises(CorruptCheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(CorruptCheckpointError, match="is a folder"):
        load_checkpoint(tmp_path)
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CorruptCheckpointError, match=r"other\.pt"):
        load_checkpoint(tmp_path / "other.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(UnsafeCheckpointError, match="TorchScript"):
        load_checkpoint(tmp_path / "script.pt")


def test_archives_are_memory_mapped(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pt")
    tensor = load_checkpoint(tmp_path / "a.pt")["a"]
    with open("/proc/self/maps") as maps:  # noqa: PTH123
        assert str(tmp_path / "a.pt") in maps.read()
    assert tensor.sum() == 0


# --- files that ask for more than they hold -------------------------------------------------------------------------


def shared(make, depth=40, width=10):
    """A container that names the one before `width` times, `depth` deep: 10^40 entries to walk through."""
    value = make([1])
    for _ in range(depth):
        value = make([value] * width)
    return value


def tuples_as_key(opcode):
    """A pickle that puts a tuple of shared tuples where its hash is needed."""
    value = pickle.dumps(shared(tuple), protocol=2)[:-1]  # without the end
    if opcode == "SETITEM":
        return b"\x80\x02}" + value[2:] + b"K\x01s."
    if opcode == "SETITEMS":
        return b"\x80\x02}(" + value[2:] + b"K\x01u."
    if opcode == "DICT":
        return b"\x80\x02(" + value[2:] + b"K\x01d."
    if opcode == "ADDITEMS":
        return b"\x80\x04\x8f(" + value[2:] + b"\x90."
    if opcode == "FROZENSET":
        return b"\x80\x04(" + value[2:] + b"\x91."
    return b"\x80\x02ccollections\nOrderedDict\n" + value[2:] + b"K\x01\x86\x85\x85R."


def in_archive(data, **settings):
    """`data` as the pickle of a torch archive."""
    saved, changed = io.BytesIO(), io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, saved)
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(changed, "w", **settings) as new:
        for record in old.infolist():
            new.writestr(record.filename, data if record.filename.endswith("data.pkl") else old.read(record))
    return changed.getvalue()


KEYS = ["SETITEM", "SETITEMS", "DICT", "ADDITEMS", "FROZENSET", "REDUCE"]


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize("opcode", KEYS)
def test_keys_that_take_for_ever_to_hash(tmp_path, opcode, archived):
    data = tuples_as_key(opcode)
    path = tmp_path / "x.pt"
    path.write_bytes(in_archive(data) if archived else data)
    with pytest.raises(CorruptCheckpointError, match=r"x\.pt.*a key is a tuple"):
        load_checkpoint(path)


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize("make", [list, tuple, lambda entries: dict(enumerate(entries))])
def test_shared_containers_without_end(tmp_path, make, archived):
    data = pickle.dumps(shared(make), protocol=2)
    path = tmp_path / "x.pt"
    path.write_bytes(in_archive(data) if archived else data)
    with pytest.raises(CorruptCheckpointError, match=r"x\.pt.*more than 1,000,000 entries.*OMNI_VIDEO_READ_MAX_STEPS"):
        load_checkpoint(path)


@pytest.mark.parametrize("archived", [False, True])
def test_a_container_that_holds_itself(tmp_path, archived):
    value = []
    value.append(value)
    data = pickle.dumps({"x": value}, protocol=2)
    path = tmp_path / "x.pt"
    path.write_bytes(in_archive(data) if archived else data)
    with pytest.raises(CorruptCheckpointError, match="contains itself"):
        load_checkpoint(path)


def test_a_little_sharing_is_read_and_stays_shared(tmp_path):
    tensor = torch.arange(4.0)
    part = [tensor, "name", (1, 2)]
    value = {"first": part, "second": part, ("a", 1): tensor}
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(value))
    read = load_checkpoint(path)
    assert equal(read["first"], part)
    assert read["second"] is read["first"]
    assert read["first"][0] is read["a", 1]


def test_a_large_file_may_have_as_many_entries_as_bytes(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(list(range(3000))))
    with read_budget(max_steps=10):
        assert load_checkpoint(path) == list(range(3000))


@pytest.mark.parametrize("kind", ["archive", "legacy", "pickle"])
def test_a_tensor_that_repeats_its_values_without_end(tmp_path, kind):
    path, value = tmp_path / "x.pt", torch.zeros(1).expand(10**9, 10**9)
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"x": value}))
    else:
        torch.save({"x": value}, path, _use_new_zipfile_serialization=kind == "archive")
    with pytest.raises(CorruptCheckpointError, match=r"would take 4,000,000,000,000,000,000 bytes.*MAX_BYTES"):
        load_checkpoint(path)


def test_one_stream_named_many_times(tmp_path):
    """A pickle of 100 kB that would copy its 50 kB of tensor 5000 times."""
    data = legacy_bytes(torch.storage.TypedStorage(12_000, dtype=torch.float32))
    call = b"ctorch.storage\n_load_from_bytes\nq\x01B" + struct.pack("<I", len(data)) + data + b"q\x02\x85R0"
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x03" + call + b"h\x01h\x02\x85R0" * 5000 + b"N.")
    with pytest.raises(CorruptCheckpointError, match="used too often"):
        load_checkpoint(path)


def test_a_compressed_archive(tmp_path):
    """A megabyte of it may be a gigabyte of zeros."""
    path = tmp_path / "x.pt"
    path.write_bytes(in_archive(pickle.dumps("a" * 10**6, protocol=2), compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(CorruptCheckpointError, match="compressed"):
        load_checkpoint(path)


def test_integers_made_to_collide(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({number * (2**61 - 1): 0 for number in range(5)}))
    with pytest.raises(CorruptCheckpointError, match="not a plain value"):
        load_checkpoint(path)
