"""Headers of safetensors files: equal to what the library reads, and hostile ones refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from omni_video_hf.hub import headers
from omni_video_hf.hub.headers import read_header

GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def write(path, header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_a_header_is_what_the_library_reads(tmp_path):
    tensors = {
        "b": torch.zeros(2, 3, dtype=torch.bfloat16),
        "a": torch.ones(4),
        "mask": torch.ones(3, dtype=torch.bool),
        "none": torch.zeros(0, 5),
        "scalar": torch.tensor(1, dtype=torch.int64),
        "small": torch.zeros(2, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as handle:
        assert set(found) == set(handle.keys())
        for name, (dtype, shape, num_bytes) in found.items():
            part = handle.get_slice(name)
            assert (dtype, list(shape)) == (part.get_dtype(), part.get_shape())
            assert num_bytes == tensors[name].numel() * tensors[name].element_size()


HOSTILE = {
    "no header": (b"", {}),
    "a length of exabytes": (GOOD, {"length": 2**62}),
    "deep": (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", {}),
    "a list": ([1, 2], {}),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, {}),
    "a giant shape": ({"a": GOOD["a"] | {"shape": [10**30]}}, {}),
    "a negative shape": ({"a": GOOD["a"] | {"shape": [-1, -2]}}, {}),
    "a shape of texts": ({"a": GOOD["a"] | {"shape": ["2"]}}, {}),
    "overlap": ({"a": GOOD["a"], "b": GOOD["a"]}, {}),
    "a gap": ({"a": GOOD["a"] | {"data_offsets": [4, 12]}}, {"data": b"\0" * 12}),
    "a rest": (GOOD, {"data": b"\0" * 9}),
    "cut short": (GOOD, {"data": b"\0" * 7}),
    "a number without end": (b'{"a": ' + b"9" * 10_000 + b"}", {}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_damaged_or_hostile_header_is_one_error(tmp_path, kind):
    header, options = HOSTILE[kind]
    path = write(tmp_path / "x.safetensors", header, **options)
    with pytest.raises(ValueError, match="not a complete safetensors file") as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_header_is_not_read_beyond_its_limit(tmp_path, monkeypatch):
    path = write(tmp_path / "x.safetensors", GOOD)
    assert read_header(path) == {"a": ("F32", (2,), 8)}
    monkeypatch.setattr(headers, "MAX_HEADER_BYTES", 16)
    with pytest.raises(ValueError, match="at most 16 are read"):
        read_header(path)
