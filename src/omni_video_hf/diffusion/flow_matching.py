"""
Flow matching as upstream trains and samples it, as pure functions; and solving without waiting.

Convention: `sigma` is 1 for pure noise and 0 for data, `x_sigma = (1 - sigma) * x + sigma * noise`, the velocity to
predict is `noise - x`, and the decoder's timestep is `1000 * sigma`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

NUM_TRAIN_TIMESTEPS = 1000


def shift_sigmas(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """Move sigmas in 0..1 towards noise: `shift * s / (1 + (shift - 1) * s)`; 1 leaves them as they are."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def training_sigmas(shift: float = 3.0) -> torch.Tensor:
    """The table of 1000 sigmas, from 1 downwards, from which training draws uniformly (as upstream)."""
    return shift_sigmas(torch.linspace(1, 0, NUM_TRAIN_TIMESTEPS + 1, dtype=torch.float32)[:-1], shift)


def training_weights(timesteps: torch.Tensor) -> torch.Tensor:
    """
    Loss weight of every entry of a table of timesteps in 0..1000: a bell around 500, its minimum over the table
    subtracted, scaled to sum to 1000 (as upstream).
    """
    bell = torch.exp(-2 * ((timesteps - NUM_TRAIN_TIMESTEPS / 2) / NUM_TRAIN_TIMESTEPS) ** 2)
    bell = bell - bell.min()
    return bell * (NUM_TRAIN_TIMESTEPS / bell.sum())


def add_noise(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """
    `(1 - sigma) * latents + sigma * noise`.

    Args:
        latents, noise: `[batch, channels, frames, height, width]`.
        sigmas: `[batch]`, or `[batch, frames]` where every latent frame has its own (diffusion forcing,
            arXiv 2407.01392).
    """
    sigmas = _beside(latents, sigmas)
    return (1 - sigmas) * latents + sigmas * noise


def velocity_target(latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What the decoder learns to predict: `noise - latents`."""
    return noise - latents


def flow_matching_loss(velocity: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean over everything of `weight * (velocity - target) ** 2`, in float32; `weights` shaped as sigmas are."""
    error = (velocity.float() - target.float()) ** 2
    return (_beside(error, weights) * error).mean()


def token_timesteps(timesteps: torch.Tensor, latents: torch.Tensor, patch_size: Sequence[int]) -> torch.Tensor:
    """
    Timesteps of latent frames as the decoder takes them, one for each of its tokens.

    Args:
        timesteps: `[batch, frames]`.
        latents: `[batch, channels, frames, height, width]`.
        patch_size: of the decoder, `(frames, height, width)`.

    Returns:
        `[batch, tokens]`

    Raises:
        ValueError: when there is not one timestep a frame, or a token covers several frames.
    """
    frames, height, width = latents.shape[2:]
    if timesteps.shape != (len(latents), frames) or patch_size[0] != 1:
        raise ValueError(
            f"`timesteps` of frames must be {(len(latents), frames)}, [batch, frames], and tokens of one frame; got "
            f"{tuple(timesteps.shape)} and tokens of {patch_size[0]}. Pass one timestep a sample, `[batch]`."
        )
    return timesteps.repeat_interleave((height // patch_size[1]) * (width // patch_size[2]), dim=1)


def _beside(latents: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values of samples `[batch]`, or of their frames `[batch, frames]`, so that they multiply `[batch, ...]`."""
    if values.ndim == 2:
        values = values[:, None]
    return values.to(latents).view(*values.shape, *[1] * (latents.ndim - values.ndim))


def sampling_sigmas(num_inference_steps: int) -> np.ndarray:
    """
    Upstream's base sigmas for `scheduler.set_timesteps(sigmas=...)`, before the scheduler applies its shift:
    `linspace(0.999, 0, steps + 1)` without its end.
    """
    return np.linspace(1 - 1 / NUM_TRAIN_TIMESTEPS, 0, num_inference_steps + 1)[:-1]


class UncheckedSolve(TorchFunctionMode):
    """
    `torch.linalg.solve` without a look at its error code, for which the host would wait for the device.

    UniPC's corrector solves a system of two equations, never singular, in every step.
    """

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """As the function called, except for `torch.linalg.solve`."""
        if function is torch.linalg.solve:
            return torch.linalg.solve_ex(*args, **(kwargs or {}))[0]
        return function(*args, **(kwargs or {}))


__all__ = [
    "UncheckedSolve",
    "add_noise",
    "flow_matching_loss",
    "sampling_sigmas",
    "shift_sigmas",
    "token_timesteps",
    "training_sigmas",
    "training_weights",
    "velocity_target",
]
