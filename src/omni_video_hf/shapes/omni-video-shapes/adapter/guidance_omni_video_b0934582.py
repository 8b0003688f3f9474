# omni_video_hf 0.1.0, guidance_omni_video.py, sha256 2cf2f67e5ac8fe7c. Written when saving; edits get lost.
"""Classifier-free guidance: which branches of the decoder run in which step, and how their velocities are combined."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

COND, UNCOND, BOTH = "cond", "uncond", "cond_uncond"


@dataclass(frozen=True)
class Guidance:
    """
    How the null branch takes part.

    Args:
        interval: fractions `(start, stop)` of the steps in which it does; `None` for all of them.
        batched: one pass for both branches, over twice the samples, instead of two.

    Raises:
        ValueError: for an interval that is not within 0..1 or is empty.
    """

    interval: tuple[float, float] | None = None
    batched: bool = False

    def __post_init__(self) -> None:
        if self.interval is None:
            return
        if len(self.interval) != 2 or not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ValueError(
                f"`guidance_interval` must be (start, stop) with 0 <= start < stop <= 1, fractions of the steps, got "
                f"{self.interval!r}. For no guidance at all pass `guidance_scale=1`."
            )

    def contexts(self, context: torch.Tensor, null_context: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """
        Contexts by branch, `[batch, tokens, width]`.

        Batched, the shorter of the two ends in zeros, which is how contexts are padded anyway.
        """
        if null_context is None:
            return {COND: context}
        if not self.batched:
            return {COND: context, UNCOND: null_context}
        return {COND: context, BOTH: pad_sequence([*context, *null_context], batch_first=True)}

    def branches(self, step: int, num_steps: int, contexts: dict[str, torch.Tensor]) -> tuple[str, ...]:
        """The branches of a step: those with a context, while guidance is on."""
        start, stop = (0.0, 1.0) if self.interval is None else self.interval
        if len(contexts) == 1 or not int(start * num_steps) <= step < int(stop * num_steps):
            return (COND,)
        return (BOTH,) if self.batched else (COND, UNCOND)

    @staticmethod
    def combine(velocities: Sequence[torch.Tensor], scale: float) -> torch.Tensor:
        """`uncond + scale * (cond - uncond)` of the branches' velocities, conditional first; one alone as it is."""
        if len(velocities) == 1:
            return velocities[0]
        cond, uncond = velocities
        return uncond + scale * (cond - uncond)


__all__ = ["Guidance"]
