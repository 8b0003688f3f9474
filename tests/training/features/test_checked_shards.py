import json
import os

import pytest
import torch
from raw_data import write_pickle
from safetensors.torch import load_file, save_file

from omni_video_hf.training.data.bad_data import BadDataError
from omni_video_hf.training.features.cache import FeatureCache
from omni_video_hf.training.features.cache_files import only_run
from omni_video_hf.training.features.import_features import import_features


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        write_pickle(tmp_path / "pickles" / f"t2v_{number}.pkl", number)
    import_features([tmp_path / "pickles"], tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch):
    """Counts the samples that are read."""
    counted = []
    own = FeatureCache.__getitem__
    monkeypatch.setattr(FeatureCache, "__getitem__", lambda cache, index: counted.append(index) or own(cache, index))
    return counted


def check(folder):
    return FeatureCache(folder).check(progress=False)


def spoil(folder):
    (shard,) = (folder / "shards").iterdir()
    tensors = {name: value.clone() for name, value in load_file(shard).items()}
    tensors["1.latents"][0, 0, 0, 0] = float("nan")
    save_file(tensors, shard, {"written_by": "a test"})


def test_a_checked_cache_is_not_read_again(folder, reads):
    assert len(check(folder)) == 3
    assert len(reads) == 3
    assert len(check(folder)) == 3
    assert len(reads) == 3
    assert (folder / "manifest.json").stat().st_mode == next(folder.glob("index-*")).stat().st_mode
    names = sorted(path.name for path in folder.iterdir() if path.name not in (".lock", "parts"))
    assert names[1:] == ["manifest.json", "shards"]


def test_a_changed_shard_is_read_again_and_a_bad_cache_is_never_good(folder, reads):
    check(folder)
    spoil(folder)
    for _ in range(2):
        with pytest.raises(BadDataError, match="1 values that are NaN or infinite"):
            check(folder)
    assert len(reads) == 9


def test_times_and_another_index_count(folder, reads, tmp_path):
    check(folder)
    (shard,) = (folder / "shards").iterdir()
    os.utime(shard, ns=(1, 1))
    check(folder)
    assert len(reads) == 6
    write_pickle(tmp_path / "pickles" / "t2v_9.pkl", 9)
    import_features([tmp_path / "pickles"], folder)
    assert "checked" not in json.loads((folder / "manifest.json").read_text())
    check(folder)
    assert len(reads) == 10


def test_nothing_is_written_beside_a_running_build(folder, reads):
    before = (folder / "manifest.json").read_bytes()
    with only_run(folder):
        check(folder)
    assert (folder / "manifest.json").read_bytes() == before
    assert len(reads) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kind_of_value_that_is_not_finite_is_found(folder, value, dtype):
    (shard,) = (folder / "shards").iterdir()
    tensors = {name: value.clone().to(dtype) for name, value in load_file(shard).items()}
    save_file(tensors, shard)
    check(folder)
    tensors["0.prompt_embeds"][-1, -1] = value
    save_file(tensors, shard)
    os.utime(shard, ns=(2, 2))
    with pytest.raises(BadDataError, match="`prompt_embeds` contains 1 values"):
        check(folder)
