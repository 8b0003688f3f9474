import collections
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader

from omni_video_hf.training.data.batch_sampler import Bucket, OmniVideoBatchSampler


def bucket(task, frames=1):
    return Bucket(task, (("latents", (16, frames, 8, 4)),))


# 7 images, 10 short and 3 long clips, 5 questions
BUCKETS = [bucket("t2i")] * 7 + [bucket("t2v", 2)] * 10 + [bucket("t2v", 5)] * 3 + [Bucket("understand")] * 5


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def batches(epoch=0, buckets=BUCKETS, **settings):
    sampler = OmniVideoBatchSampler(buckets, **({"batch_size": 2} | settings))
    sampler.set_epoch(epoch)
    result = list(sampler)
    assert len(result) == len(sampler)
    return result


def test_batches_have_one_bucket_and_every_sample_comes_once():
    for batch in batches():
        assert len({BUCKETS[index] for index in batch}) == 1
        assert 1 <= len(batch) <= 2
    assert sorted(flat(batches())) == list(range(len(BUCKETS)))


def test_the_order_is_a_function_of_seed_and_epoch():
    assert batches(epoch=3, seed=7) == batches(epoch=3, seed=7)
    orders = [batches(epoch, seed=seed) for epoch in (0, 1) for seed in (0, 1)]
    assert len({str(order) for order in orders}) == 4
    sampler = OmniVideoBatchSampler(BUCKETS, 2)
    first = list(sampler)
    assert list(sampler) == first  # iterating leaves nothing behind
    sampler.set_epoch(1)
    list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first


@pytest.mark.parametrize("processes", [2, 3])
def test_rounds_are_of_one_bucket_and_size_and_no_sample_comes_twice(processes):
    result = batches(num_processes=processes)
    assert len(result) % processes == 0
    for start in range(0, len(result), processes):
        round_ = result[start : start + processes]
        assert len({BUCKETS[index] for batch in round_ for index in batch}) == 1
        assert len({len(batch) for batch in round_}) == 1
    seen = flat(result)
    assert len(seen) == len(set(seen))
    left_out = collections.Counter(BUCKETS[index] for index in set(range(len(BUCKETS))) - set(seen))
    assert all(number < processes for number in left_out.values())
    others = {tuple(sorted(flat(batches(epoch, num_processes=processes)))) for epoch in range(10)}
    assert len(others) > 1  # not always the same ones are left out


def test_weights_give_shares_of_the_batches():
    buckets = [bucket("t2i")] * 100 + [bucket("t2v", 2)] * 40 + [Bucket("understand")] * 60
    weights = {"t2i": 1, "t2v": 2, "understand": 1}

    def tasks(**settings):
        counts = collections.Counter(buckets[batch[0]].task for batch in batches(buckets=buckets, **settings))
        return dict(counts)

    assert tasks(weights=weights) == {"t2i": 10, "t2v": 20, "understand": 10}
    everything = batches(buckets=buckets, weights=weights, stopping_strategy="all_exhausted")
    assert set(flat(everything)) == set(range(200))
    assert tasks(weights=weights, stopping_strategy="all_exhausted") == {"t2i": 50, "t2v": 100, "understand": 50}
    assert tasks(weights={"t2i": 0, "t2v": 1, "understand": 1.5}) == {"t2v": 20, "understand": 30}
    seen = flat(batches(buckets=buckets, weights=weights))
    assert len(seen) == len(set(seen))
    unlike = [set(flat(batches(epoch, buckets, weights=weights))) for epoch in (0, 1)]
    assert unlike[0] != unlike[1]


def test_accelerate_deals_rounds_out_and_resume_skips_exactly():
    def loaders(epoch, skip=0):
        for rank in range(2):
            sampler = OmniVideoBatchSampler(BUCKETS, 2, num_processes=2)
            loader = DataLoader(range(len(BUCKETS)), batch_sampler=sampler, collate_fn=list)
            loader = prepare_data_loader(loader, num_processes=2, process_index=rank)
            loader.set_epoch(epoch)
            yield list(skip_first_batches(loader, skip)) if skip else list(loader)

    for epoch in (0, 1):
        first, second = loaders(epoch)
        assert len(first) == len(second)
        assert [batch for pair in zip(first, second, strict=True) for batch in pair] == batches(epoch, num_processes=2)
        assert list(loaders(epoch, skip=3)) == [first[3:], second[3:]]


def test_drop_last_gives_full_batches_only():
    buckets = [bucket("t2i")] * 7 + [bucket("t2v", 2)] * 10
    assert {len(batch) for batch in batches(buckets=buckets, drop_last=True)} == {2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"num_processes": 4}, r"1 buckets have fewer than 4 samples .*t2v \(latents 16x5x8x4\): 3"),
        ({"drop_last": True, "batch_size": 4}, "fewer than 4 samples"),
        ({"weights": {"t2w": 1}}, r"unknown 't2w' \(did you mean 't2v'\?\)"),
        ({"weights": {"t2v": 1}}, "`weights` has no entry for t2i, understand"),
        ({"weights": {"t2v": 1, "t2i": -1, "understand": 0}}, "t2i must be 0 or more, got -1"),
        ({"weights": {"t2v": 0, "t2i": 0, "understand": 0}}, "all weights are 0"),
        ({"weights": {"t2v": 1, "t2i": 1, "understand": 1, "v2v": 1}}, "no sample of this task"),
        ({"stopping_strategy": "never"}, "`stopping_strategy`: unknown 'never'"),
    ],
)
def test_what_cannot_be_sampled_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OmniVideoBatchSampler(BUCKETS, **({"batch_size": 2} | settings))


def test_the_order_does_not_hang_on_the_process(tmp_path):
    script = tmp_path / "order.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_batch_sampler import batches\nprint(batches(epoch=5, seed=1, num_processes=2))\n"
    )
    for seed in ("0", "1"):  # of Python's string hashes
        result = subprocess.run(
            [sys.executable, script], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
            | {"PYTHONPATH": str(Path(__file__).parents[3] / "src")},
        )  # fmt: skip
        assert result.stdout.strip() == str(batches(epoch=5, seed=1, num_processes=2))
