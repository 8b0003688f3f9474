"""The whole training of the small checkpoint in a few steps: every stage feeds the next, and resumes exactly."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from examples.shapes import assemble, card, configuration
from examples.shapes.outlines import any_outline
from examples.shapes.recolor import HELD_OUT_DISTANCE, MIN_CONTRAST
from examples.shapes.training import latents, noise, stage_data, train_stage, train_text_encoder, train_text_to_video
from examples.shapes.training.latents import ScenePairs, drawn, read_pairs
from examples.shapes.training.runs import multiplies_bfloat16
from examples.shapes.training.stage_data import StageCollator, StageSamples
from examples.shapes.training.train_text_encoder import NOT_SAID, PromptBatches
from examples.shapes.training.train_text_to_video import PHASES, CaptionedBatches, Phase, TextToVideoObjective
from omni_video_hf import OmniVideoForConditionalGeneration, OmniVideoPipeline
from omni_video_hf.diffusion.losses import OmniVideoLossConfig
from omni_video_hf.shapes.dataset import ShapesDataset
from omni_video_hf.shapes.judge import read_scene
from omni_video_hf.shapes.scene import BACKGROUNDS, COLORS, HELD_OUT, SIZES, render

STAGES = tuple(train_stage.MIXES)
SHORT = {"max_steps": 2, "save_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 2, "warmup_steps": 0}


def words(**settings):
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Untrained VAE and MLLM, latents of a few pairs of each kind, text encoder and decoder after two steps each."""
    folder = tmp_path_factory.mktemp("shapes")
    torch.manual_seed(0)
    configuration.vae().save_pretrained(folder / "vae")
    configuration.model(adapter_config=None, decoder_config=None).mllm.save_pretrained(folder / "mllm")
    encode(folder)
    text_encoder(folder / "text_encoder")
    text_to_video(folder / "text_to_video", folder)
    parts = (folder / "text_encoder" / "text_encoder", folder / "text_to_video" / "transformer")
    assemble.given(folder / "vae", *parts, folder / "mllm", folder / "given")
    return folder


def encode(folder, videos=12):  # the twelfth is the first edit of a colour
    latents.main(folder / "vae", folder / "latents", videos, images=3, recolored_videos=3, recolored_images=3)


def text_encoder(output):
    train_text_encoder.train(output, steps=2, batch_size=4, save_steps=1, eval_texts=8)


def text_to_video(output, folder):
    """Two steps of every phase."""
    with patch.dict(PHASES, {name: replace(phase, steps=2) for name, phase in PHASES.items()}):
        train_text_to_video.train(
            folder / "vae",
            folder / "text_encoder" / "text_encoder",
            folder / "latents",
            output,
            batch_size=2,
            image_batch_size=3,
            save_steps=1,
            eval_clips=1,
        )


@pytest.fixture(scope="module")
def stages(built):
    """The stages, each from what the one before wrote."""
    model = built / "given"
    for stage in STAGES:
        model = run_stage(built, stage, model, built / stage)
    return built


def run_stage(built, stage, model, output):
    return train_stage.train(stage, words(model=model, data=built / "latents", output_dir=output, **SHORT))


def test_latents_are_written_once_and_normalised_pairs(built, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (built / "latents").glob("*.safetensors")}
    encode(built)
    assert before == {path: path.stat().st_mtime_ns for path in (built / "latents").glob("*.safetensors")}
    pairs = ScenePairs(built / "latents", "video")
    assert pairs.latents.shape == (12, 2, 16, 5, 8, 8)
    assert [example.task for example in pairs.examples] == ["v2v"] * 12
    with pytest.raises(typer.BadParameter, match="began with videos 12, not 13"):
        encode(built, videos=13)
    torch.manual_seed(1)
    configuration.vae().save_pretrained(tmp_path / "vae")
    with pytest.raises(typer.BadParameter, match="began with the weights in vae"):
        latents.main(tmp_path / "vae", built / "latents", 12, images=3, recolored_videos=3, recolored_images=3)


@pytest.mark.parametrize(("kind", "frames"), [("video", 5), ("image", 1)])
def test_recolored_pairs_are_seen_and_never_near_what_is_held_out(built, kind, frames):
    pairs = ScenePairs(built / "latents", kind, recolored=True)
    assert pairs.latents.shape == (3, 2, 16, frames, 8, 8)
    examples, colors = zip(*drawn(kind, 300, recolored=True), strict=True)
    assert pairs.examples == examples[:3]
    assert "color" not in {example.attribute for example in examples}
    colors = np.array(colors)
    held_out = np.array([COLORS[color] for color, _ in HELD_OUT])
    assert np.linalg.norm(colors[:, None] - held_out, axis=-1).min() > HELD_OUT_DISTANCE
    for side in ("source", "target"):
        behind = np.array([BACKGROUNDS[getattr(example, side).background] for example in examples])
        assert np.linalg.norm(colors - behind, axis=-1).min() > MIN_CONTRAST
    before, after = pairs.render(0, 0), pairs.render(0, 1)
    assert before.shape == after.shape == (17 if kind == "video" else 1, 64, 64, 3)
    assert not np.array_equal(before, after)
    assert all((picture.reshape(-1, 3) == colors[0]).all(axis=1).any() for picture in (before, after))


def test_batches_of_captions_are_of_what_the_phase_says(built):
    phase = Phase(steps=40, video_share=0.5, recolored=0.5)
    batches = CaptionedBatches(read_pairs(built / "latents"), phase, {"video": 3, "image": 4}, seed=0)
    assert len(batches) == 40
    found = set()
    for index in range(40):
        texts = batches.tokenizer.batch_decode(batches[index]["input_ids"], skip_special_tokens=True)
        names = [any(color in text.lower() for color in COLORS) for text in texts]
        assert len(set(names)) == 1
        found.add((tuple(batches[index]["latents"].shape), names[0]))
    assert found == {(shape, name) for shape in ((3, 16, 5, 8, 8), (4, 16, 1, 8, 8)) for name in (True, False)}
    assert all(torch.equal(batches[4][name], value) for name, value in batches[4].items())


@pytest.mark.parametrize("phase", list(PHASES))
def test_text_to_video_resumes_as_if_it_had_not_stopped(built, tmp_path, phase):
    whole, stopped = built / "text_to_video", tmp_path / "stopped"
    names = list(PHASES)
    for before in names[: names.index(phase)]:
        shutil.copytree(whole / before / "checkpoint-2", stopped / before / "checkpoint-2")
    shutil.copytree(whole / phase / "checkpoint-1", stopped / phase / "checkpoint-1")
    text_to_video(stopped, built)
    first, second = (
        load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors") for folder in (whole, stopped)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_text_to_video_refuses_other_phases_than_it_began_with(built):
    with pytest.raises(typer.BadParameter, match="this training began with phases"):
        train_text_to_video.train(
            built / "vae",
            built / "text_encoder" / "text_encoder",
            built / "latents",
            built / "text_to_video",
            batch_size=2,
            image_batch_size=3,
            save_steps=1,
        )


def test_a_clip_has_noise_as_its_phase_says():
    """Even noise, a level for each frame, or one frame that is seen and says where from."""
    torch.manual_seed(0)
    objective = TextToVideoObjective(configuration.text_encoder(), configuration.model().decoder, 192, 0.0)
    latents = torch.zeros(200, 16, 5, 8, 8)
    seen = noise.SEEN_SIGMA * 1000

    objective.phase = Phase(steps=1)
    assert objective._timesteps(latents).shape == (200,)

    objective.phase = Phase(steps=1, uneven=0.5)
    assert 0 < sum(objective._timesteps(latents).ndim == 2 for _ in range(20)) < 20
    assert objective._timesteps(latents[:, :, :1]).shape == (200,)

    objective.phase = Phase(steps=1, uneven=1.0, only_first=1.0)
    timesteps = objective._timesteps(latents)
    assert (timesteps[:, 0] <= seen).all()
    assert (timesteps[:, 1:].median(dim=0).values > 930).all()


def test_a_decoder_takes_a_timestep_for_each_token(built):
    """The same noise level said of every token is the same as said once."""
    torch.manual_seed(0)
    pairs = read_pairs(built / "latents")
    batch = CaptionedBatches(pairs, Phase(steps=1, video_share=1.0), {"video": 2, "image": 2}, seed=0)[0]
    objective = TextToVideoObjective(configuration.text_encoder(), configuration.model().decoder, 192, 0.0).eval()
    losses = []
    for timesteps in (torch.full((2,), 700), torch.full((2, 5), 700)):
        torch.manual_seed(1)
        with torch.no_grad(), patch.object(objective, "_timesteps", return_value=timesteps):
            losses.append(objective(**batch)["loss"])
    torch.testing.assert_close(*losses)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU multiplies in bfloat16")
@pytest.mark.parametrize("capabilities", [{}, {"avx512_bf16": False}, {"avx512_bf16": True}, {"amx_bf16": True}])
def test_processors_without_bfloat16_train_in_float32(capabilities):
    with patch.object(torch.cpu, "get_capabilities", return_value=capabilities):
        assert multiplies_bfloat16() == any(capabilities.values())


def test_what_texts_say():
    batches = PromptBatches("train", 3, 8, seed=0)
    batch = batches[2]
    assert all(torch.equal(batches[2][name], value) for name, value in batch.items())
    said = batch["said"] != NOT_SAID  # colour, shape, size, background, motion; t2v, t2i, v2v, i2i in turn
    assert said[0::4].all()
    assert (said[1::4] == torch.tensor([True, True, True, True, False])).all()
    assert (said[2::4].sum(dim=1) == 1).all()
    assert (said[3::4].sum(dim=1) == 1).all()


def test_the_text_encoder_resumes_as_if_it_had_not_stopped(built, tmp_path):
    shutil.copytree(built / "text_encoder" / "meaning" / "checkpoint-1", tmp_path / "meaning" / "checkpoint-1")
    text_encoder(tmp_path)
    first, second = (
        load_file(folder / "text_encoder" / "model.safetensors") for folder in (built / "text_encoder", tmp_path)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    rates = json.loads((tmp_path / "text_encoder.json").read_text())["rates"]
    assert set(rates["composition"]) == {"color", "shape", "size", "background", "motion", "all"}


def test_null_states_are_what_the_parts_say_of_nothing(built):
    pipe = OmniVideoPipeline.from_pretrained(built / "given")
    assert torch.equal(pipe.adapter.null_prompt_embeds()[None], pipe.encode_prompt([""])[0].reshape(1, 1, -1))
    assert pipe.mllm.vision_head.null_hidden_states().std() > 0.1


def test_samples_of_every_stream(built):
    pipe = OmniVideoPipeline.from_pretrained(built / "given")
    samples = StageSamples(read_pairs(built / "latents"), pipe.processor, 4, seed=0)
    streams = {(bucket.task, bucket.shapes[0][0]) for bucket in samples.buckets}
    drawn_streams = {(task, about) for task in ("t2i", "t2v", "i2i", "v2v") for about in ("even", "recolored")}
    asked = {("understand", about) for about in ("image question", "video question", "t2i", "t2v", "i2i", "v2v")}
    assert streams == drawn_streams | {("t2v", "uneven"), ("v2v", "uneven")} | asked
    for index in range(len(samples)):
        sample, about = samples[index], samples.buckets[index].shapes[0][0]
        said = pipe.processor.tokenizer.decode(sample["labels"][sample["labels"] != -100])
        assert said.endswith("<|end_of_text|>")
        if sample["task"] != "understand":
            assert ("source_latents" in sample) == sample["task"].endswith(("i2i", "v2v"))
            assert said.startswith("[GEN_IMG]" if sample["task"].endswith("i") else "[GEN_VID]")
            assert ("timesteps" in sample) == (about == "uneven")
            assert about != "uneven" or (sample["timesteps"].shape == (5,) and len(sample["timesteps"].unique()) > 1)
            text = sample.get("target_prompt", sample["prompt"]).lower()
            assert any(color in text for color in COLORS) == (about != "recolored")
            assert sample.get("unsaid") is None


def test_edits_come_with_a_text_on_what_there_will_be_to_see(built):
    pipe = OmniVideoPipeline.from_pretrained(built / "given")
    samples = StageSamples(read_pairs(built / "latents"), pipe.processor, 4, seed=0)
    edits = [number for number, bucket in enumerate(samples.buckets) if bucket.task in ("v2v", "i2i")]
    assert len(edits) == 28
    for number in edits:
        sample = samples[number]
        text, asked = sample["target_prompt"].lower(), pipe.processor.tokenizer.decode(sample["input_ids"])
        assert any(word in text for word in BACKGROUNDS)
        assert text not in asked.lower()
        assert sample["prompt"].lower() in asked
        # Of a clip the MLLM sees as many frames as tell its motion.
        assert len(sample["pixel_values"]) == (4 if sample["task"] == "v2v" else 1)


@pytest.mark.parametrize(("length", "processes"), [(0, 2), (1, 2), (7, 3), (8, 1)])
def test_the_shares_of_processes_are_the_whole_in_order(length, processes):
    shares = [stage_data.own_share(range(length), rank, processes) for rank in range(processes)]
    assert [number for share in shares for number in share] == list(range(length))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_phrases_say_one_attribute_and_come_with_nothing_to_draw(built):
    pipe = OmniVideoPipeline.from_pretrained(built / "given")
    samples = StageSamples(read_pairs(built / "latents"), pipe.processor, 4, seed=0, phrases=True)
    numbers = [number for number, bucket in enumerate(samples.buckets) if bucket.shapes[0][0] == "phrase"]
    assert {samples.buckets[number].task for number in numbers} == {"t2i", "t2v", "i2i", "v2v"}
    for sample in (samples[number] for number in numbers):
        is_edit = sample["task"] in ("i2i", "v2v")
        pictures = {"pixel_values"} if is_edit else set()
        assert set(sample) == {"task", "prompt", "input_ids", "attention_mask", "labels"} | pictures
        assert not is_edit or sample["pixel_values"].flatten(2).std(dim=2).max() < 1e-6
        named = [any(value in sample["prompt"].lower() for value in values) for values in (COLORS, BACKGROUNDS)]
        assert sum(named) <= 1


class PairsInWords:
    """Pairs of scenes as `ScenePairs` has them, for streams that draw nothing: no latents."""

    def __init__(self, kind, count=60):
        self.kind, self.recolored = kind, False
        self.examples, self.colors = zip(*drawn(kind, count, recolored=False), strict=True)


def test_too_few_pairs_to_disguise_are_refused():
    pairs = {(kind, recolored): PairsInWords(kind, 11) for kind in latents.EDITS for recolored in (False, True)}
    with pytest.raises(ValueError, match="no edits of the colour to disguise"):
        StageSamples(pairs, configuration.processor(), 1, seed=0, disguises=True)


@pytest.fixture(scope="module")
def disguised(built):
    """For each task and stream of disguised edits, samples, and what was rendered for them."""
    pipe = OmniVideoPipeline.from_pretrained(built / "given")
    pairs = {(kind, recolored): PairsInWords(kind) for kind in latents.EDITS for recolored in (False, True)}
    samples = StageSamples(pairs, pipe.processor, 40, seed=0, disguises=True)
    found = {}
    for number, bucket in enumerate(samples.buckets):
        about = bucket.shapes[0][0]
        if about in stage_data.DISGUISED:
            with patch.object(stage_data, "render", wraps=stage_data.render) as rendered:
                sample = samples[number]
            found.setdefault((bucket.task, about), []).append((sample, rendered.call_args))
    return pipe, pairs, found


@pytest.mark.parametrize("task", ["v2v", "i2i"])
@pytest.mark.parametrize(("about", "hidden"), stage_data.DISGUISED.items())
def test_disguised_sources_show_something_else_than_the_text_says(disguised, task, about, hidden):
    _, pairs, found = disguised
    edits = {example.source: example for example in pairs[latents_kind(task), False].examples}
    attributes = []
    for sample, rendered in found[task, about]:
        scene, looks = rendered.args[0], rendered.kwargs
        example = edits[scene]
        attributes.append(example.attribute)
        assert sample["unsaid"] == (None if example.attribute == hidden else hidden)  # what is asked for is said
        assert example.target.color in sample["target_prompt"].lower()
        assert "latents" not in sample
        shown = stage_data.render(scene, example.num_frames, **looks)
        assert not np.array_equal(shown, stage_data.render(scene, example.num_frames))
        if hidden == "color":
            held_out = np.array([COLORS[color] for color, _ in HELD_OUT])
            assert np.linalg.norm(looks["color"] - held_out, axis=-1).min() > HELD_OUT_DISTANCE
        else:
            assert (scene.color, scene.shape) not in HELD_OUT
            assert set(looks) == {"outline"}
    assert len(attributes) == 40
    assert {"color", hidden} < set(attributes)
    assert 0.45 < attributes.count("color") / len(attributes) < 0.85  # half of them, and by chance


def latents_kind(task):
    return {name: kind for kind, name in latents.EDITS.items()}[task]


def test_batches_of_disguised_edits_bring_the_directions_of_what_is_hidden(disguised):
    pipe, _, found = disguised
    collate = StageCollator(pipe.processor, pipe.tokenizer, pipe.text_encoder)
    for (_, about), drawn_samples in found.items():
        chosen = [sample for sample, _ in drawn_samples[:8]]
        directions = collate.directions[stage_data.DISGUISED[about]]
        unsaid = collate(chosen)["target_prompt_unsaid"]
        assert {sample["unsaid"] is None for sample in chosen} == {True, False}
        for sample, left_out in zip(chosen, unsaid, strict=True):
            assert torch.equal(left_out, directions if sample["unsaid"] else torch.zeros_like(directions))


def test_what_a_disguise_hides_teaches_nothing(disguised, built):
    """Another word for what the source does not show leaves the loss of the whole model as it is, others do not."""
    pipe, _, found = disguised
    model = OmniVideoForConditionalGeneration.from_pretrained(built / "given").train()
    config = OmniVideoLossConfig(alignment_weight=0.0, text_alignment_weight=1.0, flow_matching_weight=0.0)
    collate = StageCollator(pipe.processor, pipe.tokenizer, pipe.text_encoder)
    sample = next(sample for sample, _ in found["i2i", "other color"] if sample["unsaid"])

    def text_loss(shift):
        batch = collate([sample])
        batch = {name: value for name, value in batch.items() if name != "task"}
        batch["target_prompt_embeds"] = batch["target_prompt_embeds"] + shift
        output = model(**batch, loss_config=config)
        output.loss.backward()
        return output.text_alignment_loss.detach()

    plain, hidden, said = (
        text_loss(shift) for shift in (0.0, 3 * collate.directions["color"][1], 3 * collate.directions["shape"][1])
    )
    torch.testing.assert_close(hidden, plain)
    assert (said - plain).abs() > 1e-3
    assert model.vision_head.query_transformer.query_tokens.grad.abs().max() > 0


@pytest.mark.parametrize("size", SIZES)
def test_other_outlines_stay_in_the_circle_and_are_no_shape_to_the_judge(size):
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-16:17, -16:17]
    for color, shape in HELD_OUT:
        scene = replace(ShapesDataset("t2i", "train", 1).example(0).target, color=color, shape=shape, size=size)
        for _ in range(40):
            outline = any_outline(rng, scene)
            covered = outline(x, y)
            assert covered.min() == 0
            assert covered.max() == 1
            assert covered[np.hypot(x, y) > SIZES[size] + 1].max() == 0
            assert read_scene(render(scene, 1, outline=outline)).shape is None


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


def test_a_stage_does_not_go_on_from_other_weights(stages, tmp_path):
    """`make` comes back to a stage whenever what it begins from is newer."""
    command = words(model=tmp_path / "pipeline", data=stages / "latents", output_dir=tmp_path / "run", **SHORT)
    with pytest.raises(typer.BadParameter, match="no weights to begin from"):
        train_stage.train("connect", command)
    assert not (tmp_path / "run").exists()
    shutil.copytree(stages / "align_texts" / "pipeline", tmp_path / "pipeline")
    stopped = patch.object(train_stage, "load_for_stage", side_effect=InterruptedError)
    for _ in range(2):  # written down, and found to be the same
        with stopped, pytest.raises(InterruptedError):
            train_stage.train("connect", command)
    path = tmp_path / "pipeline" / "adapter" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, path, {"format": "pt"})
    with stopped, pytest.raises(typer.BadParameter, match="began with the weights in pipeline"):
        train_stage.train("connect", command)


def test_what_is_asked_for_goes_before_what_suits_the_machine(built, tmp_path):
    asked = {"model": built / "given", "data": built / "latents", "output_dir": tmp_path, "dataloader_num_workers": 1}
    # As on a GPU, but for where it trains and its kind of float32.
    on_gpu = ["--use_cpu", "--bf16", "false", "--dataloader_num_workers", "14"]
    stopped = patch.object(train_stage, "load_for_stage", side_effect=InterruptedError)
    suited = patch.object(train_stage, "_settings_of_the_machine", return_value=on_gpu)
    with suited, stopped as load, pytest.raises(InterruptedError):
        train_stage.train("connect", words(**asked, **SHORT))
    _, args, *_ = load.call_args.args
    assert (args.dataloader_num_workers, args.bf16) == (1, False)


def test_two_processes_share_a_batch(built, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--module"]
    command += ["examples.shapes.training.train_stage", "align"]
    command += words(model=built / "given", data=built / "latents", output_dir=tmp_path, **SHORT)
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "stage.json").read_text())
    assert written["processes"] == 2
    assert [entry["step"] for entry in written["log"] if "loss" in entry] == [1, 2]
    before, after = (OmniVideoPipeline.from_pretrained(path) for path in (built / "given", tmp_path / "pipeline"))
    assert after.processor.mllm_frames == "all"
    trained = dict(after.mllm.vision_head.named_parameters())
    for name, parameter in before.mllm.vision_head.named_parameters():
        assert parameter.ndim < 2 or not torch.equal(parameter, trained[name]), name
    with pytest.raises(typer.BadParameter, match="began with processes 2, not 1"):
        run_stage(built, "align", built / "given", tmp_path)
    with pytest.raises(ValueError, match="batch of 3 cannot be shared among 2 processes"):
        train_stage._share(3, 2)


def test_the_finished_repository_is_small_and_works(stages, tmp_path):
    assemble.finished(stages / STAGES[-1] / "pipeline", tmp_path / "omni-video-shapes")
    pipe = OmniVideoPipeline.from_pretrained(tmp_path / "omni-video-shapes")
    frames = pipe("a red circle", task="t2i", num_inference_steps=1, output_type="np").frames
    assert frames.shape == (1, 1, 64, 64, 3)


def test_make_knows_every_file_that_the_scripts_write_last(stages):
    """`make shapes` would begin again with what it does not find."""
    makefile = (Path(__file__).parents[3] / "Makefile").read_text()
    made = re.findall(r"^\$\(SHAPES\)/(\S+): ", makefile, flags=re.MULTILINE)
    assert {"text_encoder/text_encoder.json", "text_to_video/text_to_video.json"} < set(made)
    order = [name for name in made if name.endswith("stage.json")]
    assert order == [f"{stage}/stage.json" for stage in STAGES]
    for before, stage in pairwise(STAGES):
        assert f"$(SHAPES)/{stage}/stage.json: $(SHAPES)/{before}/stage.json" in makefile
    assert [name for name in card.RUNS if name in STAGES] == list(STAGES)
    missing = [name for name in made if not (stages / name).exists()]
    # Trained in tests of their own: tests/examples/shapes/test_train_vae.py and so on.
    assert sorted(missing) == [
        "edit/edit.json",
        "edit_pairs/videos.json",
        "mllm/mllm.json",
        "omni-video-shapes-edit/model_index.json",
        "omni-video-shapes/README.md",
        "omni-video-shapes/model_index.json",
        "scores/scores.json",
        "vae/vae.json",
        "vae_decoder/vae.json",
    ]
