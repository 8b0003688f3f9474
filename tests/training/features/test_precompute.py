import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import training
from golden import DATA
from PIL import Image
from raw_data import datasets_cache, make_clip, make_image, write_jsonl  # noqa: F401 - a fixture
from safetensors.torch import save_file
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from typer.testing import CliRunner

from omni_video_hf.cli.main import app
from omni_video_hf.media.video_loading import load_video
from omni_video_hf.training.data.bad_data import BadDataError
from omni_video_hf.training.data.batch_sampler import OmniVideoBatchSampler
from omni_video_hf.training.data.collator import OmniVideoDataCollator
from omni_video_hf.training.data.framing import Framing, FramingRules
from omni_video_hf.training.data.media_table import Media, load_media_table
from omni_video_hf.training.features import known_files
from omni_video_hf.training.features.cache import FeatureCache, read_records
from omni_video_hf.training.features.cache_files import WRITTEN_BY
from omni_video_hf.training.features.encoder import FeatureEncoder, PrecomputeSettings, load_encoders
from omni_video_hf.training.features.precompute import precompute
from omni_video_hf.utils.files import read_mark

CLIP = DATA / "bigbuckbunny.mp4"
SOURCES = Path(__file__).parents[3] / "src"


@pytest.fixture(scope="module")
def pipeline():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def repository(tmp_path_factory, pipeline):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    """A row of every task, the real clip among them."""
    make_clip(tmp_path / "target.mp4", frames=17, seed=1)
    make_clip(tmp_path / "source.mp4", frames=17, seed=2)
    make_image(tmp_path / "a.png")
    make_image(tmp_path / "b.png", (64, 48))
    return write_jsonl(
        tmp_path / "data.jsonl",
        {"task": "t2v", "prompt": "a bunny", "media": str(CLIP)},
        {"task": "t2i", "prompt": "red", "media": "a.png"},
        {"task": "v2v", "prompt": "more noise", "media": "target.mp4", "source": "source.mp4"},
        {"task": "i2i", "prompt": "more red", "media": "a.png", "source": "b.png"},
        {"task": "i2v", "prompt": "move", "media": "target.mp4", "source": "a.png"},
        {"task": "understand", "question": "what is it?", "answer": "a bunny", "media": str(CLIP)},
        {"task": "understand", "question": "one and one?", "answer": "two"},
    )


def encoder(pipeline, rules=None, target_encoder=None, **settings):
    return FeatureEncoder(pipeline, PrecomputeSettings(rules or FramingRules(), **settings), target_encoder)


def by_task(cache):
    samples = [cache[number] for number in range(len(cache))]
    return {sample["task"]: sample for sample in samples if sample["task"] != "understand" or "pixel_values" in sample}


def test_every_task_gets_what_the_pipeline_would_compute(data, pipeline, tmp_path):
    report = precompute(load_media_table(data), encoder(pipeline), tmp_path / "cache")
    assert (len(report.computed), report.kept, report.total) == (7, 0, 7)
    cache = FeatureCache(tmp_path / "cache").check(progress=False)
    samples = by_task(cache)
    shapes = {task: {name: list(t.shape) for name, t in s.items() if name != "task"} for task, s in samples.items()}
    assert shapes["t2v"] == {"latents": [16, 2, 4, 8], "mllm_hidden_states": shapes["t2v"]["mllm_hidden_states"]} | {
        "prompt_embeds": shapes["t2v"]["prompt_embeds"]
    }
    assert shapes["v2v"]["source_latents"] == shapes["v2v"]["latents"] == [16, 2, 4, 8]
    assert shapes["i2i"]["source_latents"] == shapes["i2i"]["latents"] == [16, 1, 4, 8]
    assert shapes["i2v"]["reference_latents"] == [16, 1, 4, 8]
    assert shapes["understand"]["pixel_values"] == [8, 3, 42, 42]

    # The real clip by hand: frames at 8 of 25 per second, the middle in the shape of the bucket, VAE, statistics.
    frames = load_video(CLIP, fps=8, num_frames=5).frames[:, 40:680]
    video = pipeline.video_processor.preprocess_video([Image.fromarray(frame) for frame in frames], 32, 64)
    mean, std = (torch.tensor(values)[:, None, None, None] for values in
                 (pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std))  # fmt: skip
    with torch.no_grad():
        expected = (pipeline.vae.encode(video).latent_dist.mode()[0] - mean) / std
        states = pipeline.mllm.get_mllm_hidden_states(
            **pipeline.processor.apply_task_template("t2v", "a bunny", return_tensors="pt")
        )
        prompt_embeds = pipeline.encode_prompt("a bunny")[0]
    assert torch.equal(samples["t2v"]["latents"], expected)
    assert torch.equal(samples["t2v"]["mllm_hidden_states"], states[0])
    assert torch.equal(samples["t2v"]["prompt_embeds"], prompt_embeds)


def test_cached_features_generate_what_the_pipeline_generates(data, pipeline, tmp_path):
    """An edit from cached features is the edit from the files."""
    precompute(load_media_table(data), encoder(pipeline), tmp_path / "cache")
    sample = by_task(FeatureCache(tmp_path / "cache"))["v2v"]
    frames = load_video(tmp_path / "source.mp4", fps=8, num_frames=5).frames[:, 8:40]
    common = {"task": "v2v", "output_type": "latent", "num_inference_steps": 2, "max_context_length": 300}
    direct = pipeline(
        "more noise", video=frames, fps=8, generator=torch.Generator().manual_seed(0), **common
    ).frames  # fmt: skip
    cached = pipeline(
        prompt_embeds=sample["prompt_embeds"][None],
        mllm_hidden_states=sample["mllm_hidden_states"][None],
        source_latents=sample["source_latents"][None],
        generator=torch.Generator().manual_seed(0),
        **common,
    ).frames
    torch.testing.assert_close(cached, direct)


def test_tokens_teach_the_mllm_to_ask(data, pipeline, tmp_path):
    precompute(load_media_table(data), encoder(pipeline, instruction="tokens"), tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache")
    assert not cache.is_precomputed
    samples = by_task(cache)
    assert "mllm_hidden_states" not in samples["i2v"]
    assert samples["i2v"]["labels"][-2:].tolist() == [99, 97]
    assert samples["i2v"]["pixel_values"].shape == (1, 3, 42, 42)
    # What the states would have been, the model computes from the tokens.
    precompute(load_media_table(data), encoder(pipeline), tmp_path / "states")
    states = by_task(FeatureCache(tmp_path / "states"))["i2v"]["mllm_hidden_states"]
    inputs = {name: samples["i2v"][name] for name in ("input_ids", "attention_mask")}
    inputs = {name: tensor[None] for name, tensor in inputs.items()}
    with torch.no_grad():
        computed = pipeline.mllm.get_mllm_hidden_states(**inputs, pixel_values=samples["i2v"]["pixel_values"])[0]
    torch.testing.assert_close(computed, states)


def test_frames_of_an_edit_that_the_mllm_sees(data, pipeline, tmp_path):
    lengths = {}
    for frames in ("first", "all"):
        precompute(load_media_table(data), encoder(pipeline, mllm_frames=frames), tmp_path / frames)
        lengths[frames] = len(by_task(FeatureCache(tmp_path / frames))["v2v"]["mllm_hidden_states"])
    # 7 more frames, each 4 tokens and a line end
    assert lengths["all"] - lengths["first"] == 7 * 5


def test_target_features_are_the_mean_of_pooled_frames(data, pipeline, tmp_path):
    torch.manual_seed(0)
    model = SiglipVisionModel(SiglipVisionConfig(**tiny.VISION)).eval()
    tiny.randomize(model)
    model.save_pretrained(tmp_path / "siglip")
    processor = SiglipImageProcessorPil(size={"height": 42, "width": 42})
    processor.save_pretrained(tmp_path / "siglip")
    built = encoder(pipeline, target_encoder=tmp_path / "siglip")
    precompute(load_media_table(data), built, tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache")
    records = cache.records
    frames = load_video(CLIP, fps=8, num_frames=5).frames[:, 40:680]
    with torch.no_grad():
        pooled = model(**processor([Image.fromarray(frame) for frame in frames], return_tensors="pt")).pooler_output
    torch.testing.assert_close(by_task(cache)["t2v"]["target_features"], pooled.mean(dim=0))
    assert records[0]["target_encoder"] == built.provenance["target_encoder"]
    assert all(record["target_encoder"] is None for record in records if record["task"] == "understand")
    built.target_processor.do_normalize = False
    assert precompute(load_media_table(data), built, tmp_path / "cache").changed == {
        record["key"]: ["template"] for record in records if record["task"] != "understand"
    }


def test_training_runs_on_precomputed_clips(data, pipeline, tmp_path):
    precompute(load_media_table(data), encoder(pipeline), tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache").check(progress=False)
    sampler = OmniVideoBatchSampler(cache.buckets, 1)
    model = tiny.model(adapter_config=tiny.ADAPTER | {"max_context_length": 300})
    once = {"num_train_epochs": 1, "max_steps": -1}
    run = training.trainer(tmp_path / "run", [], model, sampler, stage="joint", **once)
    run.train_dataset, run.data_collator = cache, OmniVideoDataCollator()
    result = run.train()
    assert result.global_step == 7
    assert np.isfinite(result.training_loss)


# --- stale entries --------------------------------------------------------------------------------------------------


def changed(data, pipeline, folder, rules=None, **settings):
    report = precompute(load_media_table(data), encoder(pipeline, rules, **settings), folder)
    assert report.kept + len(report.changed) + len(report.computed) == report.total
    return report.changed


def test_only_what_changed_is_computed_again_and_the_field_is_named(data, pipeline, tmp_path):
    cache = tmp_path / "cache"
    assert changed(data, pipeline, cache) == {}
    assert changed(data, pipeline, cache) == {}
    kept = {record["key"]: record["shard"] for record in FeatureCache(cache).records}

    text = data.read_text()
    data.write_text(text.replace("a bunny", "two bunnies", 1))
    assert changed(data, pipeline, cache) == {f"t2v:{CLIP}": ["text"]}
    data.write_text(data.read_text().replace('"answer": "two"', '"answer": "three"'))
    assert changed(data, pipeline, cache) == {"understand:-": ["answer"]}
    make_image(tmp_path / "b.png", (32, 24))
    make_image(tmp_path / "a.png", (32, 24))
    assert changed(data, pipeline, cache) == {
        "t2i:a.png": ["media_sha256", "crop"],
        "i2i:a.png": ["media_sha256", "source_sha256", "crop", "source_crop"],
        "i2v:target.mp4": ["source_sha256", "source_crop"],
    }
    now = {record["key"]: record["shard"] for record in FeatureCache(cache).records}
    assert now["v2v:target.mp4"] == kept["v2v:target.mp4"]
    assert now["t2i:a.png"] != kept["t2i:a.png"]


def test_nothing_to_do_opens_no_file(data, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(known_files, "SETTLED", -1)
    first = precompute(load_media_table(data), encoder(pipeline), tmp_path / "cache")
    before = (tmp_path / "cache" / "manifest.json").read_bytes()

    def fail(*_):
        raise AssertionError("a file is opened")

    templates = []
    template = FeatureEncoder._template
    monkeypatch.setattr(FeatureEncoder, "_template", lambda self, task: templates.append(task) or template(self, task))
    for owner, name in ((known_files, "probe"), (Media, "sha256"), (Media, "open"), (Framing, "load")):
        monkeypatch.setattr(owner, name, fail)
    second = precompute(load_media_table(data), encoder(pipeline), tmp_path / "cache")
    assert second.kept == second.total == first.total == len(first.computed)
    assert (tmp_path / "cache" / "manifest.json").read_bytes() == before
    assert len(templates) == len(set(templates)) > 1  # of whole tokenizers: once a task, not once a row
    FeatureCache(tmp_path / "cache").check(progress=False)


def test_files_are_decoded_beside_the_encoders(data, pipeline, tmp_path, monkeypatch):
    threads = {"decode": set(), "encode": set()}
    load, encode = Framing.load, FeatureEncoder.encode

    def note(kind, own):
        return lambda *arguments: threads[kind].add(threading.current_thread().name) or own(*arguments)

    monkeypatch.setattr(Framing, "load", note("decode", load))
    monkeypatch.setattr(FeatureEncoder, "encode", note("encode", encode))
    precompute(load_media_table(data), encoder(pipeline), tmp_path / "cache")
    assert threads["encode"] == {threading.main_thread().name}
    assert threads["decode"]
    assert not threads["decode"] & threads["encode"]


def test_what_was_not_asked_to_change_stays_bit_by_bit(data, pipeline, tmp_path):
    changed(data, pipeline, tmp_path / "cache")
    before = by_task(FeatureCache(tmp_path / "cache"))
    before = {task: {name: value.clone() for name, value in sample.items() if name != "task"}
              for task, sample in before.items()}  # fmt: skip
    data.write_text(data.read_text().replace("a bunny", "two bunnies", 1))
    changed(data, pipeline, tmp_path / "cache")
    after = by_task(FeatureCache(tmp_path / "cache"))
    assert torch.equal(before["t2v"]["latents"], after["t2v"]["latents"])
    assert before["t2v"]["prompt_embeds"].shape != after["t2v"]["prompt_embeds"].shape
    for task in ("t2i", "v2v", "i2i", "i2v", "understand"):
        assert all(torch.equal(value, after[task][name]) for name, value in before[task].items())


def test_settings_and_weights_count(data, tmp_path):
    cache, pipeline = tmp_path / "cache", tiny.pipeline()
    drawn = {f"t2v:{CLIP}", "t2i:a.png", "v2v:target.mp4", "i2i:a.png", "i2v:target.mp4"}
    videos = {f"t2v:{CLIP}", "v2v:target.mp4", "i2v:target.mp4"}
    changed(data, pipeline, cache)

    def fields(**settings):
        found = changed(data, pipeline, cache, **settings)
        return set(found), {name for names in found.values() for name in names}

    sized = {"rules": FramingRules([(32, 32)])}
    sizes = {"width", "crop", "source_crop"}
    assert fields(**sized) == (drawn, sizes)
    slower = {"rules": FramingRules([(32, 32)], fps=4)}
    assert fields(**slower) == (videos, {"fps"})
    shorter = {"rules": FramingRules([(32, 32)], [1], fps=4)}
    assert fields(**shorter) == (videos, {"num_frames"})
    assert fields(**shorter, mllm_frames="all") == ({"v2v:target.mp4"}, {"mllm_frames"})
    pipeline.processor.mllm_frames = "all"  # what the model says is what counts where nothing is asked for
    assert fields(**shorter) == (set(), set())
    with torch.no_grad():
        pipeline.vae.post_quant_conv.bias += 1
    assert fields(**shorter) == (drawn, {"vae"})
    pipeline.text_encoder.to(torch.bfloat16)
    assert fields(**shorter) == (drawn, {"text_encoder", "text_encoder_dtype"})
    with torch.no_grad():
        pipeline.mllm.vision_head.query_transformer.query_tokens += 1  # no feature depends on it
    assert fields(**shorter) == (set(), set())
    with torch.no_grad():
        pipeline.mllm.mllm.lm_head.weight += 1
    assert fields(**shorter) == (drawn, {"mllm"})  # questions are kept as tokens
    pipeline.processor.num_frames = 4
    everything = {*drawn, f"understand:{CLIP}", "understand:-"}
    assert fields(**shorter) == (everything, {"template"})
    assert fields(**shorter, instruction="tokens") == (drawn, {"mllm", "mllm_dtype", "instruction"})


# --- bad data -------------------------------------------------------------------------------------------------------


def spoil(path, start):
    """Noise in the middle of a file: its packets are all there, but do not decode."""
    content = bytearray(path.read_bytes())
    content[start : start + 4000] = np.random.default_rng(0).bytes(4000)
    path.write_bytes(bytes(content))


def test_bad_data_stop_before_anything_is_computed(data, pipeline, tmp_path):
    rows = data.read_text()
    make_clip(tmp_path / "short.mp4", frames=3)
    make_clip(tmp_path / "large.mp4", size=(96, 64))
    write_jsonl(
        tmp_path / "bad.jsonl",
        {"task": "t2v", "prompt": "x", "media": "nowhere.mp4"},
        {"task": "t2v", "prompt": "x", "media": "short.mp4"},
        {"task": "v2v", "prompt": "x", "media": "target.mp4", "source": "large.mp4"},
        {"task": "v2v", "prompt": "", "media": "large.mp4", "source": "short.mp4"},
    )
    data.write_text(rows + (tmp_path / "bad.jsonl").read_text())
    with pytest.raises(BadDataError) as caught:
        precompute(load_media_table(data), encoder(pipeline), tmp_path / "cache")
    found = {offender.sample: offender.problem for offender in caught.value.offenders}
    assert found.keys() == {"t2v:nowhere.mp4", "t2v:short.mp4", "v2v:target.mp4#2", "v2v:large.mp4"}
    assert "has 3 frames at 8 per second, fewer than 5" in found["t2v:short.mp4"]
    assert "must have one size, got 96x64 and 64x48" in found["v2v:target.mp4#2"]
    assert not (tmp_path / "cache").exists()
    report = precompute(load_media_table(data), encoder(pipeline), tmp_path / "cache", on_bad_data="skip")
    assert {offender.sample for offender in report.skipped} == set(found)
    assert len(FeatureCache(tmp_path / "cache")) == 7


def test_faults_that_only_decoding_finds_are_listed_after_the_rest_is_computed(data, pipeline, tmp_path):
    for name in ("one", "two"):
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(CLIP.read_bytes())
        spoil(path, 60_000)
    rows = [{"task": "t2v", "prompt": "x", "media": f"{name}.mp4"} for name in ("one", "two")]
    extra = write_jsonl(tmp_path / "extra.jsonl", *rows).read_text()
    data.write_text(extra + data.read_text())
    rules = FramingRules(frames=[25], fps="source")
    rows = [row for row in data.read_text().splitlines() if "target.mp4" not in row]
    data.write_text("\n".join(rows) + "\n")
    with pytest.raises(BadDataError) as caught:
        precompute(load_media_table(data), encoder(pipeline, rules), tmp_path / "cache")
    assert {offender.sample for offender in caught.value.offenders} == {"t2v:one.mp4", "t2v:two.mp4"}
    report = precompute(load_media_table(data), encoder(pipeline, rules), tmp_path / "cache", on_bad_data="skip")
    assert (report.computed, report.kept) == ([], 5)
    assert len(FeatureCache(tmp_path / "cache")) == 5


def test_sizes_off_the_grid_are_refused(pipeline):
    with pytest.raises(ValueError, match="multiples of 32 pixels, got 50x32"):
        encoder(pipeline, FramingRules([(50, 32)]))
    with pytest.raises(ValueError, match=r"unknown 'stats' \(did you mean 'states'\?\)"):
        encoder(pipeline, instruction="stats")


# --- the command, kills, several processes --------------------------------------------------------------------------


def command(data, repository, cache, *extra, launcher=("-m",)):
    arguments = ["precompute", data, "-m", repository, "-o", cache, "--size", "64x32", "--frames", 5, *extra]
    return [sys.executable, *launcher, "omni_video_hf.cli.main", *map(str, arguments)]


ENVIRONMENT = {"PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture
def one_thread():
    """As the processes above have it: sums of several threads differ from those of one in their last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def equal(first, second):
    first, second = FeatureCache(first), FeatureCache(second)
    assert [record["key"] for record in first.records] == [record["key"] for record in second.records]
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(value, b[name]) for name, value in a.items() if name != "task")
    return True


@pytest.fixture
def many(tmp_path):
    for number in range(12):
        make_clip(tmp_path / f"{number}.mp4", seed=number)
    rows = [{"task": "t2v", "prompt": f"number {number}", "media": f"{number}.mp4"} for number in range(12)]
    return write_jsonl(tmp_path / "many.jsonl", *rows)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_goes_on_where_it_stopped(many, repository, pipeline, tmp_path):
    cache, parts = tmp_path / "cache", tmp_path / "cache" / "parts"
    with subprocess.Popen(
        command(many, repository, cache, "--shard-entries", 1),
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while len(list(parts.glob("*.parquet"))) < 3 and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    done = set(read_records(cache))
    assert 3 <= len(done) < 12
    with pytest.raises(ValueError, match=r"contains no manifest\.json"):
        FeatureCache(cache)

    rules = FramingRules([(64, 32)], [5])
    # What a kill between two renames leaves: a shard without its part.
    save_file({"0.latents": torch.zeros(1)}, cache / "shards" / "00090-00.safetensors", WRITTEN_BY)
    report = precompute(load_media_table(many), encoder(load_encoders(repository), rules), cache, shard_entries=5)
    assert (report.kept, len(report.computed)) == (len(done), 12 - len(done))
    assert set(report.computed).isdisjoint(done)
    # A workspace that the kill hit before its mark is removed a minute later at the earliest.
    assert not [path for path in parts.iterdir() if path.is_file() or read_mark(path) is not None]
    assert {path.stem for path in (cache / "shards").iterdir()} == {r["shard"] for r in FeatureCache(cache).records}
    precompute(load_media_table(many), encoder(pipeline, rules), tmp_path / "whole")
    assert equal(cache, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_share_the_work_and_the_blame(many, repository, pipeline, tmp_path):
    cache = tmp_path / "cache"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
    launch = command(many, repository, cache, "--shard-entries", 2, launcher=launcher)
    result = subprocess.run(launch, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "12 computed, 0 computed again, 0 kept, 0 skipped" in result.stderr
    assert {path.stem[-2:] for path in (cache / "shards").iterdir()} == {"00", "01"}
    precompute(load_media_table(many), encoder(pipeline, FramingRules([(64, 32)], [5])), tmp_path / "whole")
    assert equal(cache, tmp_path / "whole")

    for number in (2, 3):  # one for each process
        (tmp_path / f"{number}.mp4").unlink()
    result = subprocess.run(launch, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "2 problems in 12 samples" in result.stderr
    assert all(f"t2v:{number}.mp4" in result.stderr for number in (2, 3))
    assert len(FeatureCache(cache)) == 12


def test_the_command_names_what_differs(data, repository, tmp_path):
    def run(*extra):
        return CliRunner().invoke(app, list(map(str, command(data, repository, tmp_path / "cache", *extra)[3:])))

    result = run()
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "cache")
    assert "7 computed, 0 computed again, 0 kept, 0 skipped" in result.stderr
    data.write_text(data.read_text().replace("more red", "less red"))
    result = run()
    assert "Changed and computed again: 1" in " ".join(result.stderr.split())
    assert any("i2i:a.png" in line and "text" in line for line in result.stderr.splitlines())
    for arguments, message in (
        (("--size", "64"), "must be WIDTHxHEIGHT"),
        (("--fps", "fast"), "must be a number or `source`"),
        (("--column", "prompt"), "must be NAME=YOURS"),
        (("--column", "prompt=caption"), "unknown 'caption'"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert message in result.stderr


@pytest.mark.parametrize("tag", [b"zzzz", b"\0\0\0\0", b"text"])
def test_one_video_of_an_unknown_codec_is_skipped_and_reported(pipeline, tmp_path, tag):
    make_clip(tmp_path / "good.mp4")
    data = make_clip(tmp_path / "odd.mp4").read_bytes()
    head, _, tail = data.rpartition(b"avc1")
    (tmp_path / "odd.mp4").write_bytes(head + tag + tail)
    rows = [{"task": "t2v", "prompt": "noise", "media": f"{name}.mp4"} for name in ("good", "odd")]
    table = load_media_table(write_jsonl(tmp_path / "data.jsonl", *rows))
    report = precompute(table, encoder(pipeline), tmp_path / "cache", on_bad_data="skip")
    (offender,) = report.skipped
    assert offender.sample == "t2v:odd.mp4"
    assert "odd.mp4: this FFmpeg does not know its codec; convert the file to H.264" in offender.problem
    assert len(FeatureCache(tmp_path / "cache")) == 1


def test_two_runs_do_not_work_on_one_cache(data, pipeline, tmp_path):
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom huggingface_hub.utils import WeakFileLock\n"
        "with WeakFileLock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(600)\n"
    )
    (tmp_path / "cache").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "cache" / ".lock"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(ValueError, match=r"another run computes features into this cache"):
            precompute(load_media_table(data), encoder(pipeline), tmp_path / "cache")
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert len(precompute(load_media_table(data), encoder(pipeline), tmp_path / "cache").computed) == 7


def test_what_encodes_is_loaded_without_the_decoder(repository, pipeline):
    loaded = load_encoders(repository)
    assert not loaded.transformer.blocks
    assert loaded.grid == pipeline.grid
    for name in ("vae", "text_encoder", "mllm"):
        expected = getattr(pipeline, name).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in getattr(loaded, name).state_dict().items())


def test_the_vae_stays_in_float32(repository):
    loaded = load_encoders(repository, torch.bfloat16)
    dtypes = {name: getattr(loaded, name).dtype for name in ("vae", "text_encoder", "mllm")}
    assert dtypes == {"vae": torch.float32, "text_encoder": torch.bfloat16, "mllm": torch.bfloat16}
