"""The estimate of the clean latents, and how it becomes pixels."""

from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from omni_video_hf import OmniVideoPipeline
from omni_video_hf.demo import previews
from omni_video_hf.demo.previews import Preview, PreviewDecoder
from omni_video_hf.media.sources import Source
from omni_video_hf.pipelines.presets import GenerationSettings
from omni_video_hf.shapes import CHECKPOINT


@pytest.fixture(scope="module")
def shapes():
    return OmniVideoPipeline.from_pretrained(CHECKPOINT)


def test_on_a_straight_path_the_estimate_is_exact_and_one_step_late():
    noise, clean = torch.randn(2, 1, 16, 3, 4, 4)
    decoder = PreviewDecoder(tiny.pipeline())
    preview = Preview(decoder)
    levels = [1.0, 0.8, 0.5, 0.1, 0.0]
    for step, (before, after) in enumerate(pairwise(levels)):
        preview.add(clean + after * (noise - clean), before * 1000)
        estimate = preview.clean_latents()
        assert (estimate is None) == (step < 2)
        if estimate is not None:
            assert estimate.shape == (1, 16, 1, 4, 4)
            torch.testing.assert_close(estimate, clean[:, :, :1], rtol=1e-4, atol=1e-4)


def test_a_repeated_noise_level_gives_no_estimate():
    preview = Preview(PreviewDecoder(tiny.pipeline()))
    for timestep in (900.0, 800.0, 800.0):
        preview.add(torch.randn(1, 16, 1, 4, 4), timestep)
    assert preview.clean_latents() is None


def test_a_small_vae_decodes_itself(shapes):
    decoder = PreviewDecoder(shapes)
    assert decoder.uses_vae
    latents = torch.zeros(1, 16, 1, 8, 8)
    assert np.array_equal(decoder.decode(latents), shapes.decode(latents, "pil")[0][0])


def test_the_linear_map_of_a_large_vae_finds_its_colours(shapes, monkeypatch):
    monkeypatch.setattr(previews, "MAX_VAE_PARAMETERS", 0)
    decoder = PreviewDecoder(shapes)
    assert not decoder.uses_vae
    red = np.zeros((64, 64, 3), np.uint8)
    red[..., 0] = 220
    settings = GenerationSettings("t2i", 64, 64, 1, None, 1, 1.0, 1.0)
    latents = shapes.encode_source(Source(images=[Image.fromarray(red)]), settings)
    image = np.asarray(decoder.decode(latents))
    assert image.shape == (256, 256, 3)
    middle = image[96:160, 96:160].reshape(-1, 3).mean(0)
    assert middle[0] > 140
    assert middle[1:].max() < 90
