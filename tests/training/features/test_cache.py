import json
import os
import pickle
import stat

import pyarrow.parquet as pq
import pytest
import tiny
import torch
import training
from raw_data import write_pickle
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from omni_video_hf.cli.main import app
from omni_video_hf.training.data.bad_data import BadDataError
from omni_video_hf.training.data.batch_sampler import OmniVideoBatchSampler
from omni_video_hf.training.data.collator import OmniVideoDataCollator
from omni_video_hf.training.features.cache import FeatureCache, complete_or_absent
from omni_video_hf.training.features.import_features import import_features


@pytest.fixture
def pickles(tmp_path):
    """One file of every task that latents determine, twice."""
    folder = tmp_path / "pickles"
    for number in range(2):
        write_pickle(folder / f"t2v_{number}.pkl", number)
        write_pickle(folder / f"t2i_{number}.pkl", number, frames=1, frame_num=None)
        write_pickle(folder / f"v2v_{number}.pkl", number, source=True)
        write_pickle(folder / "edits" / f"i2i_{number}.pkl", number, frames=1, source=True)
    return folder


def test_import_keeps_numbers_and_formats(pickles, tmp_path):
    content = write_pickle(pickles / "t2v_0.pkl")
    report = import_features([pickles], tmp_path / "cache")
    assert (len(report.computed), report.kept, report.skipped) == (8, 0, [])
    cache = FeatureCache(tmp_path / "cache")
    assert sorted(bucket.task for bucket in cache.buckets) == sorted(["t2v", "t2i", "v2v", "i2i"] * 2)
    keys = [record["key"] for record in cache.records]
    assert keys == sorted(keys)
    sample = cache[keys.index("t2v_0.pkl")]
    assert sample["task"] == "t2v"
    for name, expected in {
        "latents": content["latent_feature_tgt"],
        "prompt_embeds": content["t5_emb"][0],
        "mllm_hidden_states": content["vlm_last_hidden_states"][0],
        "target_features": content["siglip2_img_pooled_output_tgt"][0],
    }.items():
        assert sample[name].dtype == expected.dtype
        assert torch.equal(sample[name], expected)
    assert "source_latents" in cache[keys.index("v2v_1.pkl")]
    record = cache.records[keys.index("t2v_0.pkl")]
    assert (record["text"], record["num_frames"], record["latents_shape"]) == ("sample 0", 5, [16, 2, 8, 4])
    assert cache.is_precomputed


def test_upstreams_older_names_are_read(tmp_path):
    content = write_pickle(
        tmp_path / "a.pkl", latent_feature_tgt=None, t5_emb=None, siglip2_img_pooled_output_tgt=None
    )
    old = {"latent_feature": torch.randn(16, 2, 8, 4), "text_emb": torch.randn(4, 32)}
    with (tmp_path / "a.pkl").open("wb") as file:
        pickle.dump(content | old, file)
    import_features([tmp_path / "a.pkl"], tmp_path / "cache")
    sample = FeatureCache(tmp_path / "cache")[0]
    assert sample["task"] == "t2v"
    assert torch.equal(sample["latents"], old["latent_feature"])
    assert torch.equal(sample["prompt_embeds"], old["text_emb"])


def test_a_task_that_latents_do_not_determine(tmp_path):
    write_pickle(tmp_path / "a.pkl", source=True, latent_feature=torch.randn(16, 1, 8, 4))
    import_features([tmp_path / "a.pkl"], tmp_path / "cache", task="i2v")
    sample = FeatureCache(tmp_path / "cache")[0]
    assert sample["task"] == "i2v"
    assert sample["reference_latents"].shape == (16, 1, 8, 4)
    with pytest.raises(BadDataError, match="has a source, which does not fit the task 't2v'"):
        import_features([tmp_path / "a.pkl"], tmp_path / "other", task="t2v")


def test_only_what_changed_is_imported_again(pickles, tmp_path):
    cache = tmp_path / "cache"
    import_features([pickles], cache)
    assert import_features([pickles], cache).kept == 8
    before = FeatureCache(cache)[0]["latents"].clone()
    write_pickle(pickles / "t2v_1.pkl", 1, prompt="another")
    (pickles / "t2v_0.pkl").unlink()
    write_pickle(pickles / "t2v_9.pkl", 3)
    report = import_features([pickles], cache)
    assert report.changed == {"t2v_1.pkl": ["text", "media_sha256"]}
    assert (report.computed, report.kept) == (["t2v_9.pkl"], 6)
    after = FeatureCache(cache)
    assert len(after) == 8
    assert torch.equal(after[0]["latents"], before)
    texts = {record["key"]: record["text"] for record in after.records}
    assert "t2v_0.pkl" not in texts
    assert texts["t2v_1.pkl"] == "another"
    assert len(list(cache.glob("index-*.parquet"))) == 1


BAD = {
    "nan.pkl": ({"latent_feature_tgt": torch.full((16, 2, 8, 4), float("nan"))}, "1024 values that are NaN"),
    "infinite.pkl": ({"vlm_last_hidden_states": torch.full((1, 7, 48), float("inf"))}, "NaN or infinite"),
    "empty_prompt.pkl": ({"prompt": " "}, "`prompt` is empty (' ')"),
    "flat.pkl": ({"latent_feature_tgt": torch.zeros(16, 8, 4)}, "`latent_feature_tgt` must have 4 dimensions"),
    "no_states.pkl": ({"vlm_last_hidden_states": None}, "`vlm_last_hidden_states` must be a tensor, got NoneType"),
    "two_states.pkl": ({"vlm_last_hidden_states": torch.zeros(2, 7, 48)}, "must be of one sample"),
    "whole_numbers.pkl": ({"t5_emb": torch.ones(4, 32, dtype=torch.int64)}, "`t5_emb` must contain floats"),
    "no_text.pkl": ({"prompt": ["x"]}, "`prompt` must be a text, got list"),
    "no_number.pkl": ({"frame_num": "17"}, "`frame_num` must be a whole number, got str"),
    "frames.pkl": ({"frame_num": 17}, "`frame_num` is 17, but the latents have 2 frames"),
    "unequal.pkl": ({"latent_feature": torch.zeros(16, 2, 4, 4)}, "`source_latents` [16, 2, 4, 4] and `latents`"),
    "channels.pkl": ({"latent_feature_tgt": torch.zeros(12, 2, 8, 4)}, "`latents` has channels 12, 9 other entries"),
    "width.pkl": ({"t5_emb": torch.zeros(4, 30)}, "`prompt_embeds` has width 30, 9 other entries have 32"),
}


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_all_bad_files_are_listed_at_once(pickles, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, (changes, _) in BAD.items():
        write_pickle(pickles / name, **changes)
    (pickles / "cut.pkl").write_bytes((pickles / "t2v_0.pkl").read_bytes()[:3000])
    (pickles / "evil.pkl").write_bytes(pickle.dumps({"prompt": Evil()}))
    with pytest.raises(BadDataError) as caught:
        import_features([pickles], tmp_path / "cache")
    found = {offender.sample: offender.problem for offender in caught.value.offenders}
    assert set(found) == {*BAD, "cut.pkl", "evil.pkl"}
    for name, (_, problem) in BAD.items():
        assert problem in found[name]
    assert "Nothing in it was run" in found["evil.pkl"]
    assert not (tmp_path / "evil").exists()
    assert str(caught.value).startswith("15 problems in 23 samples")
    with pytest.raises(ValueError, match=r"contains no manifest.json"):
        FeatureCache(tmp_path / "cache")

    report = import_features([pickles], tmp_path / "cache", on_bad_data="skip")
    assert {offender.sample for offender in report.skipped} == set(found)
    assert len(FeatureCache(tmp_path / "cache")) == 8


def test_nothing_is_left_of_bad_data_alone(tmp_path):
    write_pickle(tmp_path / "a.pkl", prompt="")
    with pytest.raises(BadDataError, match="1 problem in 1 sample"):
        import_features([tmp_path / "a.pkl"], tmp_path / "cache", on_bad_data="skip")


def test_sources_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        import_features([tmp_path / "nowhere"], tmp_path / "cache")
    with pytest.raises(ValueError, match="contains no feature files"):
        import_features([tmp_path], tmp_path / "cache")
    for folder in ("a", "b"):
        write_pickle(tmp_path / folder / "x.pkl")
    with pytest.raises(ValueError, match="have the same name"):
        import_features([tmp_path / "a", tmp_path / "b"], tmp_path / "cache")
    with pytest.raises(ValueError, match="unknown 't2w'"):
        import_features([tmp_path / "a"], tmp_path / "cache", task="t2w")


@pytest.fixture
def cache(pickles, tmp_path):
    import_features([pickles], tmp_path / "cache")
    return tmp_path / "cache"


def damage(cache, change):
    """Rewrite the one shard."""
    shard = next((cache / "shards").iterdir())
    tensors = load_file(shard)
    tensors = {name: value.clone() for name, value in tensors.items()}
    change(tensors)
    save_file(tensors, shard)


def test_a_cache_from_elsewhere_is_checked_as_a_whole(cache):
    assert len(FeatureCache(cache).check(progress=False)) == 8

    def change(tensors):
        tensors["0.latents"][0, 0, 0, 0] = float("nan")
        tensors["3.latents"] = tensors["3.latents"][:, :, :4].contiguous()
        del tensors["5.prompt_embeds"]

    damage(cache, change)
    with pytest.raises(BadDataError) as caught:
        FeatureCache(cache).check(progress=False)
    records = FeatureCache(cache).records
    bad = {records[number]["key"] for number in (0, 3, 5)}
    assert {offender.sample for offender in caught.value.offenders} == bad
    for problem in ("1 values that are NaN or infinite, of", "the index says [16,", "damaged"):
        assert problem in str(caught.value)
    kept = FeatureCache(cache).check(on_bad_data="skip", progress=False)
    assert len(kept) == len(kept.buckets) == 5
    assert not bad & {record["key"] for record in kept.records}


def test_a_cache_that_is_not_whole_is_refused(cache, tmp_path):
    shard = next((cache / "shards").iterdir())
    moved = shard.rename(tmp_path / "shard")
    with pytest.raises(ValueError, match=r"1 shards are missing \(00000-00\)"):
        FeatureCache(cache)
    moved.rename(shard)
    (cache / "parts" / "00001-00.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="did not finish"):
        FeatureCache(cache)
    (cache / "parts" / "00001-00.parquet").unlink()
    with pytest.raises(ValueError, match="has no entry of the tasks understand"):
        FeatureCache(cache, ["understand"])
    assert {bucket.task for bucket in FeatureCache(cache, ["t2v", "v2v"]).buckets} == {"t2v", "v2v"}
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(ValueError, match="has the format 99, this version reads 1"):
        FeatureCache(cache)


def test_others_may_read_what_is_written(cache, tmp_path):
    (tmp_path / "usual").touch()
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in cache.rglob("*.*") if path.name != ".lock"} == {usual}


def test_a_file_that_fails_halfway_leaves_the_old_one(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), complete_or_absent(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_are_memory_mapped_and_workers_open_their_own(cache):
    data = FeatureCache(cache)
    shard = next((cache / "shards").iterdir())
    data[0]
    with open("/proc/self/maps") as maps:  # noqa: PTH123
        assert str(shard) in maps.read()
    loader = DataLoader(
        data, batch_sampler=OmniVideoBatchSampler(data.buckets, 2), collate_fn=OmniVideoDataCollator(), num_workers=2
    )
    assert sorted(batch["task"] for batch in loader) == ["i2i", "t2i", "t2v", "v2v"]


def test_training_runs_on_imported_features(cache, tmp_path):
    data = FeatureCache(cache).check(progress=False)
    sampler = OmniVideoBatchSampler(data.buckets, 2)
    run = training.trainer(
        tmp_path / "run", [], tiny.model(enable_mllm=False), sampler, num_train_epochs=1, max_steps=-1
    )
    run.train_dataset, run.data_collator = data, OmniVideoDataCollator()
    result = run.train()
    assert result.global_step == 4
    assert torch.isfinite(torch.tensor(result.training_loss))


def test_the_index_reads_as_a_plain_table(cache):
    table = pq.read_table(next(cache.glob("index-*.parquet"))).to_pandas()
    assert set(table["task"]) == {"t2v", "t2i", "v2v", "i2i"}
    assert table["media_sha256"].str.len().eq(64).all()


def test_import_command(pickles, tmp_path):
    run = CliRunner().invoke(app, ["import-features", str(pickles), "-o", str(tmp_path / "cache")])
    assert run.exit_code == 0, run.output
    assert "8 computed, 0 computed again, 0 kept, 0 skipped" in run.stderr
    assert run.stdout.strip() == str(tmp_path / "cache")
    write_pickle(pickles / "t2v_0.pkl", prompt="")
    write_pickle(pickles / "t2v_1.pkl", 1, prompt="new")
    run = CliRunner().invoke(app, ["import-features", str(pickles), "-o", str(tmp_path / "cache")])
    assert run.exit_code == 1
    assert "`prompt` is empty" in run.stderr
    assert "error: 1 problem in 8 samples: repair or remove the samples, or pass `--on-bad-data skip`." in run.stderr
    run = CliRunner().invoke(
        app, ["import-features", str(pickles), "-o", str(tmp_path / "cache"), "--on-bad-data", "skip"]
    )
    assert run.exit_code == 0, run.output
    assert "1 skipped" in run.stderr


def test_a_resumed_run_sees_the_samples_it_would_have_seen(cache, tmp_path):
    """Into the second epoch, with buckets of several sizes: parameters bit by bit."""

    def run(folder, resume=None, **settings):
        data = FeatureCache(cache)
        sampler = OmniVideoBatchSampler(data.buckets, 1, seed=3)
        model = tiny.model(enable_mllm=False)
        trainer = training.trainer(tmp_path / folder, [], model, sampler, max_steps=13, **settings)
        seen = []

        def collate(samples):
            seen.append(samples[0]["latents"])
            return OmniVideoDataCollator()(samples)

        trainer.train_dataset, trainer.data_collator = data, collate
        trainer.train(resume_from_checkpoint=resume)
        return seen, dict(model.named_parameters())

    seen, parameters = run("whole", save_strategy="steps", save_steps=11)
    seen_again, resumed = run("resumed", resume=str(tmp_path / "whole" / "checkpoint-11"))
    assert len(seen_again) == len(seen[11:]) >= 2
    assert all(torch.equal(a, b) for a, b in zip(seen[11:], seen_again, strict=True))
    assert all(torch.equal(value, resumed[name]) for name, value in parameters.items())
