"""Wan's VAE in pieces: the same numbers as whole clips, and nothing of one clip in another."""

import pytest
import tiny
import torch
from diffusers import AutoencoderKLWan

from omni_video_hf.models.causal_vae import decode_pieces, encode_pieces
from omni_video_hf.shapes import CHECKPOINT


@pytest.fixture(scope="module", params=["2.1", "2.2"])
def vae(request):
    """Wan 2.1's, and one with patches and residual blocks as Wan 2.2's."""
    return tiny.vae() if request.param == "2.1" else AutoencoderKLWan.from_pretrained(CHECKPOINT, subfolder="vae")


def clip(frames, seed=0, batch=2):
    return torch.rand(batch, 3, frames, 32, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 13])
def test_pieces_are_the_whole_clip_to_the_bit(vae, frames):
    pixels = clip(frames)
    latents = vae.encode(pixels).latent_dist.mode()
    split = [1] + [4] * (frames // 4)
    assert torch.equal(encode_pieces(vae, pixels.split(split, dim=2)), latents)
    pieces = list(decode_pieces(vae, latents))
    assert [piece.shape[2] for piece in pieces] == split
    assert torch.equal(torch.cat(pieces, dim=2), vae.decode(latents).sample)


@torch.no_grad()
def test_two_clips_can_be_decoded_in_turn(vae):
    both = [vae.encode(clip(9, seed)).latent_dist.mode() for seed in (0, 1)]
    wanted = [vae.decode(latents).sample for latents in both]
    pieces = zip(*(decode_pieces(vae, latents) for latents in both), strict=True)
    found = [torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True)]
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


@torch.no_grad()
@pytest.mark.parametrize("switch", ["tiling", "slicing"])
def test_tiling_and_slicing_give_what_the_vae_gives(switch):
    vae = tiny.vae()
    getattr(vae, f"enable_{switch}")()
    vae.tile_sample_min_height = vae.tile_sample_min_width = 32
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 16
    pixels = clip(5)
    latents = vae.encode(pixels).latent_dist.mode()
    assert torch.equal(encode_pieces(vae, pixels.split([1, 4], dim=2)), latents)
    assert torch.equal(torch.cat(list(decode_pieces(vae, latents)), dim=2), vae.decode(latents).sample)
