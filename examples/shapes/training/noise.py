"""
The noise that clips are trained with, so that they learn to move.

With the same noise in all frames, words for motions explain hardly any of the error: where nothing is known of a clip,
every place is as likely. With little noise in one frame and much in the others (diffusion forcing, arXiv 2407.01392)
the one says where from, and the condition alone says where to.
"""

import torch

from omni_video_hf.diffusion.flow_matching import NUM_TRAIN_TIMESTEPS
from omni_video_hf.diffusion.losses import OmniVideoLossConfig, draw_timestep_indices, timestep_tables

# Colour and shape are decided where there is most noise, to which upstream's weights give nothing.
LOSSES = OmniVideoLossConfig(timestep_weighting="none")
# Of the frames that are hidden: half have more noise than 0.95.
HIDDEN = OmniVideoLossConfig(timestep_weighting="none", timestep_shift=20.0)
SEEN_FRAMES, SEEN_SIGMA = 0.35, 0.9  # share of the frames with little noise, and the most they can have


def uneven_timesteps(num_frames: int, only_first: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """
    Timesteps `[frames]` of a clip's latent frames: little noise in some, much in the others.

    Args:
        num_frames: latent frames.
        only_first: chance that the first frame alone has little noise.
        generator: on the CPU.
    """
    is_seen = torch.rand(num_frames, generator=generator) < SEEN_FRAMES
    if torch.rand((), generator=generator) < only_first:
        is_seen = torch.arange(num_frames) == 0
    seen = torch.rand(num_frames, generator=generator) * SEEN_SIGMA * NUM_TRAIN_TIMESTEPS
    hidden = timestep_tables(HIDDEN)[0][draw_timestep_indices(num_frames, HIDDEN, generator)]
    return torch.where(is_seen, seen, hidden)


__all__ = ["LOSSES", "uneven_timesteps"]
