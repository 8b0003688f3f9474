import json
import shutil

import numpy as np
import pytest
import torch
import typer
from diffusers import AutoencoderKLWan

from examples.shapes import configuration
from examples.shapes.training.train_vae import (
    RecoloredClips,
    VaeObjective,
    close_branches,
    evaluate,
    foreground_mask,
    set_latent_statistics,
    to_frames,
    to_pixels,
    train,
)
from omni_video_hf.shapes import Scene, ShapesDataset, render
from omni_video_hf.shapes.scene import COLORS, HELD_OUT


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return configuration.vae()


def clips(count=2, frames=5):
    items = list(ShapesDataset("t2v", "train", count))
    return torch.from_numpy(np.stack([item["target"][:frames] for item in items]))


def test_pixels_and_back():
    frames = clips()
    pixels = to_pixels(frames)
    assert pixels.shape == (2, 3, 5, 64, 64)
    assert -1 <= pixels.min() < pixels.max() <= 1
    assert (to_frames(pixels) == frames.numpy()).all()


def test_recolored_clips_keep_everything_but_colors_and_never_show_what_is_held_out():
    plain, any_colors, half = (
        ShapesDataset("t2v", "train", 60, 3),
        *(RecoloredClips(60, 3, share) for share in (1, 0.5)),
    )
    kept = [(half[index]["target"] == plain[index]["target"]).all() for index in range(60)]
    assert 15 < sum(kept) < 45
    backgrounds = 0
    for index in range(60):
        scene, clip = plain.example(index).target, any_colors[index]["target"]
        assert (any_colors[index]["target"] == clip).all()
        x, y = scene.centers()[0].astype(int)
        color = clip[0, y, x].astype(float)
        for held_out, shape in HELD_OUT:
            assert shape != scene.shape or np.linalg.norm(color - COLORS[held_out]) > 90
        assert (clip[0, y, x] == clip[0, y + 1, x]).all()
        backgrounds += (clip[0, 0, 0] == plain[index]["target"][0, 0, 0]).all()
        same = [(frames != frames[:, :1, :1]).any(-1) for frames in (clip, plain[index]["target"])]
        assert (same[0] != same[1]).mean() < 0.02  # the faintest pixels of an edge may round away
    assert 15 < backgrounds < 45
    with pytest.raises(ValueError, match=r"got 1\.5"):
        RecoloredClips(1, 0, 1.5)


def test_the_foreground_is_the_shape_and_its_edge():
    scene = Scene("yellow", "square", "small", "white", center=(30, 34))
    found = foreground_mask(to_pixels(torch.from_numpy(render(scene, 1))[None]))[0, 0]
    expected = torch.zeros(64, 64, dtype=torch.bool)
    expected[34 - 10 : 34 + 10, 30 - 10 : 30 + 10] = True  # radius 8 and 2 pixels
    assert (found == expected).all()


@torch.no_grad()
def test_shape_and_background_count_the_same(vae):
    objective, frames = VaeObjective(vae, noise_steps=10, kl_weight=0.0, num_frames=5).eval(), clips()
    pixels = to_pixels(frames)
    error = vae(pixels).sample - pixels
    error = (error.abs() + error.square()).mean(1)
    mask = foreground_mask(pixels)
    assert mask.float().mean() < 0.3
    torch.testing.assert_close(objective(frames)["loss"], error[mask].mean() + error[~mask].mean())


@torch.no_grad()
def test_latents_begin_as_the_mode_and_become_noisy(vae):
    objective, frames = VaeObjective(vae, noise_steps=10, kl_weight=1.0, num_frames=5), clips()
    assert objective.eval()(frames)["loss"] == objective(frames)["loss"]
    assert objective.steps == 0
    objective.train()(frames)
    assert objective.steps == 1
    objective.eval().steps.fill_(10)
    first, second = (objective(frames) for _ in range(2))
    assert first["reconstruction"] != second["reconstruction"]
    assert first["kl"] == second["kl"]
    torch.testing.assert_close(first["loss"], first["reconstruction"] + first["kl"])
    posterior = vae.encode(to_pixels(frames)).latent_dist
    # diffusers sums over all but the last dimension
    torch.testing.assert_close(first["kl"] * posterior.mean[0, ..., 0].numel(), posterior.kl().mean())


@torch.no_grad()
def test_at_the_start_only_shortcuts_are_open(vae):
    close_branches(vae)
    video = torch.randn(1, 32, 4, 4, 4)
    for block in (*vae.encoder.mid_block.resnets, *vae.decoder.mid_block.resnets):
        assert torch.equal(block(video), video)
    assert torch.equal(vae.decoder.mid_block.attentions[0](video), video)
    (halving,) = (down.downsampler for down in vae.encoder.down_blocks[1:2])
    half = halving.time_conv(video)
    assert torch.equal(half, video[:, :, 1::2]) or torch.equal(half, video[:, :, 2::2])
    doubling = vae.decoder.up_blocks[0].upsampler.time_conv
    assert torch.equal(doubling(video), video.repeat(1, 2, 1, 1, 1))


@torch.no_grad()
def test_clips_are_cut_anywhere(vae):
    """Losses of a part of a clip are those of one of its parts, and of more than one over several calls."""
    frames = clips(1, 17)
    parts = {
        VaeObjective(vae, 10, 0.0, num_frames=5)(frames[:, start : start + 5])["loss"].item() for start in range(13)
    }
    objective = VaeObjective(vae, 10, 0.0, num_frames=5).eval()
    torch.manual_seed(0)
    found = {objective(frames)["loss"].item() for _ in range(6)}
    assert found < parts
    assert len(found) > 2


@torch.no_grad()
def test_normalised_latents_have_unit_scale(vae):
    frames = clips(6)
    set_latent_statistics(vae, frames)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    normalised = ((vae.encode(to_pixels(frames)).latent_dist.mode() - mean) / std).movedim(1, 0).flatten(1)
    torch.testing.assert_close(normalised.mean(1), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalised.std(1), torch.ones(16), atol=1e-4, rtol=0)


def test_an_untrained_vae_is_not_judged_right(vae):
    score = evaluate(vae, "t2i", "composition", 9, seed=0)
    assert (score.line, score.split) == ("t2i", "composition")
    assert (score.counts["all"].right, score.counts["all"].total) == (0, 9)


@torch.no_grad()
def test_noise_is_relative_to_the_latents(vae):
    objective = VaeObjective(vae, noise_steps=10, kl_weight=0.0, num_frames=5, latent_noise=0.8)
    scales = torch.tensor([0.1, 1.0, 10.0]).view(1, 3, 1, 1, 1)
    latents = scales * torch.randn(512, 3, 2, 8, 8)
    strengths = (objective._latent_noise(latents) / scales).std(dim=(2, 3, 4))
    assert strengths.max() < 1.0
    torch.testing.assert_close(strengths.mean(0), torch.full((3,), 0.4), atol=0.05, rtol=0)
    quiet = VaeObjective(vae, noise_steps=10, kl_weight=0.0, num_frames=5).eval()
    frames = clips()
    assert objective.eval()(frames)["loss"] != objective(frames)["loss"]
    assert quiet(frames)["loss"] == quiet(frames)["loss"]


PHASES = ("images", "clips", "noisy")


@pytest.mark.parametrize("phase", PHASES)
def test_training_resumes_as_if_it_had_not_stopped(tmp_path, phase):
    settings = {"steps": 4, "batch_size": 2, "num_frames": 5, "noise_steps": 2, "save_steps": 2, "eval_clips": 1}
    settings |= {"image_steps": 4, "image_batch_size": 2, "noisy_steps": 4, "learning_rate": 1e-3, "seed": 3}
    whole, stopped = tmp_path / "whole", tmp_path / f"stopped_in_{phase}"
    train(whole, **settings)
    shutil.copytree(whole / phase / "checkpoint-2", stopped / phase / "checkpoint-2")
    for before in PHASES[: PHASES.index(phase)]:
        shutil.copytree(whole / before / "checkpoint-4", stopped / before / "checkpoint-4")
    train(stopped, **settings)
    first, second = (AutoencoderKLWan.from_pretrained(folder / "vae") for folder in (whole, stopped))
    assert first.config.latents_mean == pytest.approx(second.config.latents_mean)
    for (name, one), two in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    results = json.loads((whole / "vae.json").read_text())
    assert results["settings"]["steps"] == 4
    assert [(score["line"], score["split"]) for score in results["scores"]] == [
        ("t2v", "seen"),
        ("t2v", "composition"),
        ("t2i", "seen"),
        ("t2i", "composition"),
    ]
    names = ["clips", "images", "noisy", "settings.json", "vae", "vae.json"]
    assert sorted(path.name for path in whole.iterdir()) == names
    with pytest.raises(typer.BadParameter, match=r"began with learning_rate 0\.001, not 0\.1"):
        train(whole, **(settings | {"learning_rate": 0.1}))


def test_a_length_the_vae_cannot_encode_is_refused(tmp_path):
    with pytest.raises(typer.BadParameter, match="must be 4n\\+1, got 8"):
        train(tmp_path, num_frames=8)
    assert not list(tmp_path.iterdir())
