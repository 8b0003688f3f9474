"""
Flow matching, as the released model is trained and sampled: noise, targets, loss, sigmas, timesteps of tokens.

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
    """Shift sigmas in 0..1 towards noise: `shift * s / (1 + (shift - 1) * s)`. A shift of 1 changes nothing."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def training_sigmas(shift: float = 3.0) -> torch.Tensor:
    """The 1000 sigmas of training, descending from 1; training samples them uniformly, as the authors' code does."""
    return shift_sigmas(torch.linspace(1, 0, NUM_TRAIN_TIMESTEPS + 1, dtype=torch.float32)[:-1], shift)


def training_weights(timesteps: torch.Tensor) -> torch.Tensor:
    """
    Loss weight of each timestep in 0..1000: a bell curve around 500, minus its minimum over the table, scaled to a sum
    of 1000, as in the authors' code.
    """
    bell = torch.exp(-2 * ((timesteps - NUM_TRAIN_TIMESTEPS / 2) / NUM_TRAIN_TIMESTEPS) ** 2)
    bell = bell - bell.min()
    return bell * (NUM_TRAIN_TIMESTEPS / bell.sum())


def add_noise(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """
    Mix latents and noise: `(1 - sigma) * latents + sigma * noise`.

    Args:
        latents, noise: `[batch, channels, frames, height, width]`.
        sigmas: `[batch]`, or `[batch, frames]` if every latent frame has its own sigma (diffusion forcing,
            arXiv 2407.01392).
    """
    sigmas = _broadcastable(latents, sigmas)
    return (1 - sigmas) * latents + sigmas * noise


def velocity_target(latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The velocity that the decoder learns to predict: `noise - latents`."""
    return noise - latents


def flow_matching_loss(velocity: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    Mean of `weight * (velocity - target) ** 2` over all values, in float32.

    Args:
        velocity, target: `[batch, channels, frames, height, width]`.
        weights: `[batch]` or `[batch, frames]`, as the sigmas.
    """
    error = (velocity.float() - target.float()) ** 2
    return (_broadcastable(error, weights) * error).mean()


def token_timesteps(timesteps: torch.Tensor, latents: torch.Tensor, patch_size: Sequence[int]) -> torch.Tensor:
    """
    Expand timesteps of latent frames to one timestep for each token of the decoder.

    Args:
        timesteps: `[batch, frames]`.
        latents: `[batch, channels, frames, height, width]`.
        patch_size: patch size of the decoder, `(frames, height, width)`.

    Returns:
        `[batch, tokens]`

    Raises:
        ValueError: if there is not one timestep per frame, or if a token covers several frames.
    """
    frames, height, width = latents.shape[2:]
    if timesteps.shape != (len(latents), frames) or patch_size[0] != 1:
        raise ValueError(
            f"`timesteps` of frames must be {(len(latents), frames)}, [batch, frames], with tokens of 1 frame; got "
            f"{tuple(timesteps.shape)} and tokens of {patch_size[0]} frames. Pass one timestep per sample, `[batch]`."
        )
    return timesteps.repeat_interleave((height // patch_size[1]) * (width // patch_size[2]), dim=1)


def _broadcastable(latents: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Reshape values `[batch]` or `[batch, frames]` so that they broadcast with `[batch, channels, frames, ...]`."""
    if values.ndim == 2:
        values = values[:, None]
    return values.to(latents).view(*values.shape, *[1] * (latents.ndim - values.ndim))


def sampling_sigmas(num_inference_steps: int) -> np.ndarray:
    """
    Base sigmas for `scheduler.set_timesteps(sigmas=...)`, before the scheduler applies its shift.

    They are `linspace(0.999, 0, steps + 1)` without the last value, as in the authors' code.
    """
    return np.linspace(1 - 1 / NUM_TRAIN_TIMESTEPS, 0, num_inference_steps + 1)[:-1]


class UncheckedSolve(TorchFunctionMode):
    """
    Replace `torch.linalg.solve` by `solve_ex`, which does not check for errors, so that the host does not wait for the
    device.

    The corrector of UniPC solves a system of two equations in every step; it is never singular.
    """

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function; `torch.linalg.solve` is replaced."""
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
