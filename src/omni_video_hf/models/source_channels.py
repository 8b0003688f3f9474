"""Source channels: a decoder that takes the latents of the source beside the noisy latents, channel by channel."""

import torch
from diffusers import WanTransformer3DModel


def with_source_channels(
    latents: torch.Tensor,
    source_latents: torch.Tensor | None = None,
    reference_latents: torch.Tensor | None = None,
    drop_source: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Concatenate the source to noisy latents, channel by channel.

    A sample without source gets zeros. That is no picture: latents are normalised, so that zero is their mean over a
    whole data set, and no frame, a black one neither, has it in all channels and places.

    Args:
        latents: `[batch, channels, frames, height, width]`, noisy.
        source_latents: normalised latents of what is edited, of the same shape or with a batch of one.
        reference_latents: `[batch, channels, 1, height, width]` of a reference image, which goes into the first frame;
            the other frames get zeros.
        drop_source: `[batch]`, true for samples that get zeros although they have a source.

    Returns:
        `[batch, 2 * channels, frames, height, width]`

    Raises:
        ValueError: when latents of the source have another shape than `latents`, or both kinds are given.
    """
    channels = torch.zeros_like(latents)
    if source_latents is not None and reference_latents is not None:
        raise ValueError("Source channels take `source_latents` or `reference_latents`, not both.")
    for name, given, frames in (
        ("source_latents", source_latents, latents.shape[2]),
        ("reference_latents", reference_latents, 1),
    ):
        if given is None:
            continue
        wanted = (latents.shape[1], frames, *latents.shape[3:])
        if tuple(given.shape[1:]) != wanted or len(given) not in (1, len(latents)):
            raise ValueError(
                f"`{name}` must be {(len(latents), *wanted)} for source channels, as the latents to generate are "
                f"{tuple(latents.shape)}, got {tuple(given.shape)}: bring source and result to one size and length."
            )
        channels[:, :, :frames] = given.to(latents)
    if drop_source is not None:
        channels[drop_source.to(latents.device)] = 0
    return torch.cat([latents, channels], dim=1)


@torch.no_grad()
def add_source_channels(decoder: WanTransformer3DModel) -> WanTransformer3DModel:
    """
    A copy of a decoder with twice the input channels, whose weights for the new half are zero.

    Before training its velocities are bit for bit those of `decoder`, whatever the source is.

    Args:
        decoder: `in_channels` equal to its `out_channels`.

    Raises:
        ValueError: when `decoder` has other input channels, as one with source channels has.
    """
    channels = decoder.config.in_channels
    if channels != decoder.config.out_channels:
        raise ValueError(
            f"`decoder` must have as many input channels as output channels ({decoder.config.out_channels}) to get "
            f"source channels, got {channels}: it may have them already."
        )
    arguments = {name: value for name, value in decoder.config.items() if not name.startswith("_")}
    with torch.device("meta"):
        wide = WanTransformer3DModel(**arguments | {"in_channels": 2 * channels})
    state = decoder.state_dict()
    weight = state["patch_embedding.weight"]
    state["patch_embedding.weight"] = torch.cat([weight, torch.zeros_like(weight)], dim=1)
    wide.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    wide.rope = decoder.rope
    return wide.train(decoder.training)


__all__ = ["add_source_channels", "with_source_channels"]
