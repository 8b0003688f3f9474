"""
Wan's VAE in causal pieces: a clip is encoded and decoded a few frames at a time, with the numbers of the whole clip.

Encoder and decoder see earlier frames through a cache of features alone, and `AutoencoderKLWan` already loops over
pieces of four frames. Here the loop is a generator, so that neither all pixels nor all results are in memory at once.
"""

from collections.abc import Iterable, Iterator

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from diffusers.utils.accelerate_utils import apply_forward_hook


def encode_pieces(vae: AutoencoderKLWan, pieces: Iterable[torch.Tensor]) -> torch.Tensor:
    """
    Encode a clip that comes in pieces: bit for bit `vae.encode(clip).latent_dist.mode()`.

    Args:
        vae: Wan's VAE.
        pieces: pixels `[batch, 3, frames, height, width]` in -1..1: first one frame, then four at a time. With tiling
            or slicing turned on they are put together first, as tiles are encoded over all frames.

    Returns:
        `[batch, channels, latent frames, height, width]`, not normalised.

    Example:
        >>> import torch
        >>> from diffusers import AutoencoderKLWan
        >>> from omni_video_hf.models.causal_vae import encode_pieces
        >>> vae = AutoencoderKLWan(base_dim=4, num_res_blocks=1)
        >>> with torch.no_grad():
        ...     encode_pieces(vae, torch.zeros(1, 3, 9, 16, 16).split([1, 4, 4], dim=2)).shape
        torch.Size([1, 16, 3, 2, 2])
    """
    if vae.use_tiling or vae.use_slicing:
        return vae.encode(torch.cat(list(pieces), dim=2)).latent_dist.mode()
    cache = _empty_cache(vae.encoder)
    parts = [_encode_piece(vae, piece, cache) for piece in pieces]
    return _moments(vae, torch.cat(parts, dim=2)).chunk(2, dim=1)[0]


def decode_pieces(vae: AutoencoderKLWan, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    """
    Decode latents piece by piece: put together, bit for bit `vae.decode(latents).sample`.

    Args:
        vae: Wan's VAE. With tiling, or slicing of several samples, there is one piece, the whole clip.
        latents: `[batch, channels, latent frames, height, width]`, not normalised.

    Yields:
        Pixels `[batch, 3, frames, height, width]` in -1..1: first one frame, then four at a time.

    Example:
        >>> import torch
        >>> from diffusers import AutoencoderKLWan
        >>> from omni_video_hf.models.causal_vae import decode_pieces
        >>> vae = AutoencoderKLWan(base_dim=4, num_res_blocks=1)
        >>> with torch.no_grad():
        ...     [piece.shape[2] for piece in decode_pieces(vae, torch.zeros(1, 16, 3, 2, 2))]
        [1, 4, 4]
    """
    if vae.use_tiling or (vae.use_slicing and len(latents) > 1):
        yield vae.decode(latents, return_dict=False)[0]
        return
    # The convolution with a kernel of one latent frame runs over the whole clip, as in diffusers: it is small.
    states, cache = _before_decoder(vae, latents), _empty_cache(vae.decoder)
    for number, state in enumerate(states.split(1, dim=2)):
        yield _decode_piece(vae, state, cache, number == 0)


# Offloading of whole components moves the VAE to its device in these calls, as in those of `encode` and `decode`.


@apply_forward_hook
def _encode_piece(vae: AutoencoderKLWan, pixels: torch.Tensor, cache: list) -> torch.Tensor:
    if vae.config.patch_size is not None:
        pixels = patchify(pixels, patch_size=vae.config.patch_size)
    return vae.encoder(pixels, feat_cache=cache, feat_idx=[0])


@apply_forward_hook
def _moments(vae: AutoencoderKLWan, states: torch.Tensor) -> torch.Tensor:
    return vae.quant_conv(states)


@apply_forward_hook
def _before_decoder(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    return vae.post_quant_conv(latents)


@apply_forward_hook
def _decode_piece(vae: AutoencoderKLWan, state: torch.Tensor, cache: list, is_first: bool) -> torch.Tensor:
    pixels = vae.decoder(state, feat_cache=cache, feat_idx=[0], first_chunk=is_first)
    if vae.config.patch_size is not None:
        pixels = unpatchify(pixels, patch_size=vae.config.patch_size)
    return torch.clamp(pixels, min=-1.0, max=1.0)


def _empty_cache(part: torch.nn.Module) -> list:
    """A cache of features of this clip alone, so that two clips can be decoded in turn."""
    return [None] * sum(isinstance(module, WanCausalConv3d) for module in part.modules())


__all__ = ["decode_pieces", "encode_pieces"]
