import shutil

import numpy as np
import pytest
import torch
import typer
from diffusers import AutoencoderKLWan

from examples.shapes import configuration
from examples.shapes.training.train_vae_decoder import VaeDecoderObjective, train
from omni_video_hf.shapes import Scene, render


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return configuration.vae()


def test_every_clip_counts_the_same_however_small_its_shape(vae):
    scenes = [Scene("red", "square", "large", "black"), Scene("blue", "triangle", "small", "white")]
    clips = [torch.from_numpy(np.stack([render(scene, 5)])) for scene in scenes]
    objective = VaeDecoderObjective(vae, 0.0)
    with torch.no_grad():
        alone = [objective(clip)["loss"] for clip in clips]
        together = objective(torch.cat(clips))["loss"]
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2)
    assert abs(alone[0] - alone[1]) > 1e-2


def test_noise_is_in_the_scale_of_the_latents(vae):
    clip = torch.from_numpy(np.stack([render(Scene("red", "square", "large", "black"), 5)]))
    losses = []
    for std in (1e-6, 1.0):
        vae.register_to_config(latents_std=[std] * vae.config.z_dim)
        torch.manual_seed(0)
        with torch.no_grad():
            losses.append(VaeDecoderObjective(vae, 0.5)(clip)["loss"])
    with torch.no_grad():
        quiet = VaeDecoderObjective(vae, 0.0)(clip)["loss"]
    torch.testing.assert_close(losses[0], quiet, rtol=1e-3, atol=1e-5)
    assert abs(losses[1] - quiet) > 1e-3


def test_it_resumes_exactly_and_latents_stay_what_they_are(vae, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    settings = {"steps": 4, "batch_size": 2, "save_steps": 2, "eval_clips": 1}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(tmp_path / "vae", whole, **settings)
    shutil.copytree(whole / "clips" / "checkpoint-2", stopped / "clips" / "checkpoint-2")
    train(tmp_path / "vae", stopped, **settings)
    first, second = (AutoencoderKLWan.from_pretrained(folder / "vae").state_dict() for folder in (whole, stopped))
    assert all(torch.equal(first[name], second[name]) for name in first)
    changed = {name for name, value in vae.state_dict().items() if not torch.equal(value, first[name])}
    assert changed
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    second["encoder.conv_in.bias"] += 1
    vae.load_state_dict(second)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(typer.BadParameter, match="began with the weights in vae"):
        train(tmp_path / "vae", stopped, **settings)
