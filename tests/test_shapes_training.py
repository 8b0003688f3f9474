"""The whole training of the small checkpoint in a few steps: every stage feeds the next, and resumes exactly."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file

from omni_video_hf import OmniVideoPipeline
from omni_video_hf.shapes import assemble, configuration, latents, train_stage, train_text_to_video
from omni_video_hf.shapes.latents import ScenePairs
from omni_video_hf.shapes.stage_data import StageSamples
from omni_video_hf.shapes.train_text_to_video import CaptionedBatches

STAGES = ("align", "connect", "joint")
SHORT = {"max_steps": 2, "save_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 2, "warmup_steps": 0}


def words(**settings):
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Untrained VAE and MLLM, latents of three pairs of each kind, decoder and text encoder after two steps."""
    folder = tmp_path_factory.mktemp("shapes")
    torch.manual_seed(0)
    configuration.vae().save_pretrained(folder / "vae")
    configuration.model(adapter_config=None, decoder_config=None).mllm.save_pretrained(folder / "mllm")
    latents.main(folder / "vae", folder / "latents", videos=3, images=3)
    text_to_video(folder / "text_to_video", folder)
    assemble.given(folder / "vae", folder / "text_to_video", folder / "mllm", folder / "given")
    return folder


def text_to_video(output, folder):
    train_text_to_video.train(
        folder / "vae",
        folder / "latents",
        output,
        image_steps=2,
        image_batch_size=3,
        steps=2,
        batch_size=2,
        save_steps=1,
        eval_clips=1,
    )


@pytest.fixture(scope="module")
def stages(built):
    """The three stages, each from what the one before wrote."""
    model = built / "given"
    for stage in STAGES:
        model = run_stage(built, stage, model, built / stage)
    return built


def run_stage(built, stage, model, output):
    return train_stage.train(stage, words(model=model, data=built / "latents", output_dir=output, **SHORT))


def test_latents_are_written_once_and_normalised_pairs(built):
    before = {path: path.stat().st_mtime_ns for path in (built / "latents").glob("*.safetensors")}
    latents.main(built / "vae", built / "latents", videos=3, images=3)
    assert before == {path: path.stat().st_mtime_ns for path in (built / "latents").glob("*.safetensors")}
    pairs = ScenePairs(built / "latents", "video")
    assert pairs.latents.shape == (3, 2, 16, 5, 8, 8)
    assert [example.task for example in pairs.examples] == ["v2v"] * 3
    with pytest.raises(typer.BadParameter, match="began with videos 3, not 4"):
        latents.main(built / "vae", built / "latents", videos=4, images=3)


def test_batches_of_captions_show_both_kinds(built):
    pairs = {kind: ScenePairs(built / "latents", kind) for kind in ("video", "image")}
    batches = CaptionedBatches(pairs, 20, {"video": 3, "image": 4}, video_share=0.5, seed=0)
    shapes = {tuple(batches[index]["latents"].shape) for index in range(20)}
    assert shapes == {(3, 16, 5, 8, 8), (4, 16, 1, 8, 8)}
    assert all(torch.equal(batches[4][name], value) for name, value in batches[4].items())


@pytest.mark.parametrize("phase", ["images", "clips"])
def test_text_to_video_resumes_as_if_it_had_not_stopped(built, tmp_path, phase):
    whole, stopped = built / "text_to_video", tmp_path / "stopped"
    shutil.copytree(whole / phase / "checkpoint-1", stopped / phase / "checkpoint-1")
    if phase == "clips":
        shutil.copytree(whole / "images" / "checkpoint-2", stopped / "images" / "checkpoint-2")
    text_to_video(stopped, built)
    for part in ("transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        first, second = (load_file(folder / part) for folder in (whole, stopped))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_null_states_are_what_the_parts_say_of_nothing(built):
    pipe = OmniVideoPipeline.from_pretrained(built / "given")
    assert torch.equal(pipe.adapter.null_prompt_embeds()[None], pipe.encode_prompt([""])[0].reshape(1, 1, -1))
    assert pipe.mllm.vision_head.null_hidden_states().std() > 0.1


def test_samples_of_every_stream(built):
    pipe = OmniVideoPipeline.from_pretrained(built / "given")
    pairs = {kind: ScenePairs(built / "latents", kind) for kind in ("video", "image")}
    samples = StageSamples(pairs, pipe.processor, 4, seed=0)
    drawn = {bucket.task for bucket in samples.buckets}
    assert drawn == {"t2v", "t2i", "v2v", "i2i", "understand"}
    for index in range(len(samples)):
        sample = samples[index]
        said = pipe.processor.tokenizer.decode(sample["labels"][sample["labels"] != -100])
        assert said.endswith("<|end_of_text|>")
        if sample["task"] != "understand":
            assert ("source_latents" in sample) == sample["task"].endswith(("i2i", "v2v"))
            assert said.startswith("[GEN_IMG]" if sample["task"].endswith("i") else "[GEN_VID]")
    asked = {bucket.shapes[0][0] for bucket in samples.buckets if bucket.task == "understand"}
    assert asked == {"image question", "video question", "t2i", "t2v", "i2i", "v2v"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_resumes_as_if_it_had_not_stopped(stages, tmp_path, stage):
    model = stages / "given" if stage == "align" else stages / STAGES[STAGES.index(stage) - 1] / "pipeline"
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    shutil.copytree(stages / stage / "checkpoint-1", stopped / "checkpoint-1")
    run_stage(stages, stage, model, stopped)
    first, second = (
        load_file(folder / "checkpoint-2" / "trained.safetensors") for folder in (stages / stage, stopped)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_finished_repository_is_small_and_works(stages, tmp_path):
    assemble.finished(stages / "joint" / "pipeline", tmp_path / "omni-video-shapes")
    pipe = OmniVideoPipeline.from_pretrained(tmp_path / "omni-video-shapes")
    frames = pipe("a red circle", task="t2i", num_inference_steps=1, output_type="np").frames
    assert frames.shape == (1, 1, 64, 64, 3)


def test_make_knows_every_file_that_the_scripts_write_last(stages):
    """`make shapes` would begin again with what it does not find."""
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    made = re.findall(r"^\$\(SHAPES\)/(\S+): ", makefile, flags=re.MULTILINE)
    assert {"latents/latents.json", "text_to_video/text_to_video.json", "joint/stage.json"} < set(made)
    missing = [name for name in made if not (stages / name).exists()]
    # Trained in tests of their own: tests/test_shapes_train_vae.py and so on.
    assert sorted(missing) == [
        "mllm/mllm.json",
        "omni-video-shapes/README.md",
        "omni-video-shapes/model_index.json",
        "scores/scores.json",
        "vae/vae.json",
    ]
