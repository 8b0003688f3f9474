"""
The training losses of Omni-Video as pure functions, their options, and the sampling of timesteps.

The total loss is the weighted sum `answer + alignment + text alignment + flow matching`.
[`OmniVideoForConditionalGeneration.forward`] computes those whose inputs a batch contains.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import nn

from .flow_matching import NUM_TRAIN_TIMESTEPS, training_sigmas, training_weights

LOSS_NAMES = ("answer", "alignment", "text_alignment", "flow_matching")

Alignment = Literal["cosine", "squared_l2"]
TimestepSampling = Literal["uniform", "logit_normal", "mode"]
TimestepWeighting = Literal["bell", "none", "sigma_sqrt", "cosmap"]
Generators = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True)
class OmniVideoLossConfig:
    """
    Weights and options of the training losses. The defaults are those of the authors' code.

    Args:
        answer_weight: Weight of the cross-entropy of `labels`. A loss with weight 0 is not computed, and inputs that
            only this loss needs are ignored.
        alignment_weight: Weight of the alignment loss between visual tokens and target features.
        text_alignment_weight: Weight of the alignment loss between adapter tokens and embeddings of the prompt or
            of a text about the target: the first half of the paper's stage 2. Off by default, because the authors'
            code does not contain it.
        flow_matching_weight: Weight of the flow matching loss of the decoder's velocity.
        alignment: Distance of the alignment losses: `"cosine"`, `1 - cos` as in the authors' code, or `"squared_l2"`,
            `|a - b|^2` as in the paper.
        timestep_sampling: `"uniform"` over the table of timesteps, or `"logit_normal"` or `"mode"` of diffusers.
        logit_mean, logit_std: Parameters of `"logit_normal"`.
        mode_scale: Parameter of `"mode"`.
        timestep_shift: Shift of the sigmas of the table towards noise.
        timestep_weighting: Loss weight of a timestep: `"bell"`, the weight of the authors' code, highest at timestep
            500; or `"none"`, `"sigma_sqrt"` or `"cosmap"` of diffusers.

    Raises:
        ValueError: for an unknown name, or a number out of range.

    Example:
        >>> from omni_video_hf import OmniVideoLossConfig
        >>> OmniVideoLossConfig(answer_weight=0.5).answer_weight
        0.5
    """

    answer_weight: float = 1.0
    alignment_weight: float = 1.0
    text_alignment_weight: float = 0.0
    flow_matching_weight: float = 1.0
    alignment: Alignment = "cosine"
    timestep_sampling: TimestepSampling = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    timestep_shift: float = 3.0
    timestep_weighting: TimestepWeighting = "bell"

    def __post_init__(self) -> None:
        choices = {
            "alignment": Alignment,
            "timestep_sampling": TimestepSampling,
            "timestep_weighting": TimestepWeighting,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"`{name}` must be one of {', '.join(get_args(allowed))}, got {getattr(self, name)!r}."
                )
        for name in LOSS_NAMES:
            if self.weight(name) < 0:
                raise ValueError(
                    f"`{name}_weight` must be 0 (the loss is not computed) or more, got {self.weight(name)}."
                )
        for name in ("timestep_shift", "logit_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be more than 0, got {getattr(self, name)}.")

    def weight(self, name: str) -> float:
        """
        The weight of a loss; `name` is one of `LOSS_NAMES`.

        Example:
            >>> from omni_video_hf import OmniVideoLossConfig
            >>> OmniVideoLossConfig(alignment_weight=0.25).weight("alignment")
            0.25
        """
        return getattr(self, f"{name}_weight")


def alignment_loss(features: torch.Tensor, target: torch.Tensor, kind: Alignment = "cosine") -> torch.Tensor:
    """
    Distance between `features` `[batch, width]` and `target` `[batch, width]` in float32, averaged over samples.

    `"cosine"` is `1 - cos`, as in the authors' code; `"squared_l2"` sums squared differences, as in the paper.

    Raises:
        ValueError: if the shapes differ.
    """
    if features.shape != target.shape:
        raise ValueError(
            f"The target of an alignment loss must be {tuple(features.shape)}, got {tuple(target.shape)}: pass one "
            "with the shape of the features."
        )
    features, target = features.float(), target.float()
    if kind == "cosine":
        return 1 - nn.functional.cosine_similarity(features, target).mean()
    return (features - target).square().sum(dim=-1).mean()


def mean_token(embeddings: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Average `[batch, length, width]` over the positions where `mask` `[batch, length]` is 1: `[batch, width]`."""
    if mask is None:
        return embeddings.float().mean(dim=1)
    mask = mask.to(embeddings.device, torch.float32)[..., None]
    return (embeddings.float() * mask).sum(dim=1) / mask.sum(dim=1)


def without_directions(features: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """
    Remove the components of features along given directions, in float32.

    Args:
        features: `[batch, width]`.
        directions: `[batch, number, width]`; rows must be orthonormal or zero, which is not checked.

    Returns:
        `[batch, width]`

    Raises:
        ValueError: if the shapes do not fit each other.
    """
    if directions.ndim != 3 or (len(directions), directions.shape[-1]) != tuple(features.shape):
        batch, width = features.shape
        raise ValueError(
            f"Directions to remove from features must have the shape [{batch}, number, {width}], got "
            f"{tuple(directions.shape)}."
        )
    directions, features = directions.to(features.device, torch.float32), features.float()
    # Without matrix products, because autocast would compute them in half precision.
    shares = (directions * features[:, None]).sum(dim=-1, keepdim=True)
    return features - (shares * directions).sum(dim=1)


def timestep_tables(config: OmniVideoLossConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The 1000 timesteps that training samples, descending from 1000, and the loss weight of each."""
    sigmas = training_sigmas(config.timestep_shift)
    timesteps = sigmas * NUM_TRAIN_TIMESTEPS
    if config.timestep_weighting == "bell":
        return timesteps, training_weights(timesteps)
    return timesteps, compute_loss_weighting_for_sd3(config.timestep_weighting, sigmas)


def draw_timestep_indices(
    batch_size: int, config: OmniVideoLossConfig, generator: Generators | None = None
) -> torch.Tensor:
    """
    Sample indices into the table of timesteps.

    Args:
        batch_size: number of indices.
        config: `timestep_sampling` and its parameters.
        generator: one generator for the batch, or one per sample, so that a sample's timestep does not depend on the
            other samples of the batch.

    Returns:
        `[batch_size]`, 0..999, on the CPU.
    """
    settings = {"logit_mean": config.logit_mean, "logit_std": config.logit_std, "mode_scale": config.mode_scale}
    if isinstance(generator, Sequence):
        rows = [
            compute_density_for_timestep_sampling(
                config.timestep_sampling, 1, generator=g, **settings, device=g.device
            )
            for g in generator
        ]
        uniform = torch.cat([row.cpu() for row in rows])
    else:
        device = "cpu" if generator is None else generator.device
        uniform = compute_density_for_timestep_sampling(
            config.timestep_sampling, batch_size, generator=generator, **settings, device=device
        )
    return (uniform.cpu() * NUM_TRAIN_TIMESTEPS).long().clamp(0, NUM_TRAIN_TIMESTEPS - 1)


__all__ = [
    "LOSS_NAMES",
    "OmniVideoLossConfig",
    "alignment_loss",
    "draw_timestep_indices",
    "mean_token",
    "timestep_tables",
    "without_directions",
]
