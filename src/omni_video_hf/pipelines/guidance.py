"""Classifier-free guidance: which branches of the decoder run in which step, and how their velocities are combined."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.hooks.faster_cache import FasterCacheBlockHook, FasterCacheDenoiserHook
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook
from torch.nn.utils.rnn import pad_sequence

COND, UNCOND, BOTH = "cond", "uncond", "cond_uncond"


@dataclass(frozen=True)
class Guidance:
    """
    How the null branch takes part.

    Args:
        interval: fractions `(start, stop)` of the steps in which it does; `None` for all of them.
        batched: one pass for both branches, over twice the samples, instead of two.
        fixed: every step runs the same branches, even when a callback turns guidance off.

    Raises:
        ValueError: for an interval that is not within 0..1 or is empty.
    """

    interval: tuple[float, float] | None = None
    batched: bool = False
    fixed: bool = False

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

        Batched, the null branch comes first, as in diffusers, and the shorter of the two ends in zeros, which is how
        contexts are padded anyway.
        """
        if null_context is None:
            return {COND: context}
        if not self.batched:
            return {COND: context, UNCOND: null_context}
        return {COND: context, BOTH: pad_sequence([*null_context, *context], batch_first=True)}

    def branches(
        self, step: int, num_steps: int, contexts: dict[str, torch.Tensor], scale: float = math.inf
    ) -> tuple[str, ...]:
        """The branches of a step: those with a context, while guidance is on and `scale` above 1."""
        if self.fixed and len(contexts) == 2:
            return (BOTH,)
        start, stop = (0.0, 1.0) if self.interval is None else self.interval
        if len(contexts) == 1 or scale <= 1 or not int(start * num_steps) <= step < int(stop * num_steps):
            return (COND,)
        return (BOTH,) if self.batched else (COND, UNCOND)

    @staticmethod
    def combine(velocities: Sequence[torch.Tensor], scale: float) -> torch.Tensor:
        """
        `uncond + scale * (cond - uncond)` of the branches' velocities, conditional first; without guidance, `scale` at
        most 1, the first.
        """
        if len(velocities) == 1 or scale <= 1:
            return velocities[0]
        cond, uncond = velocities
        return uncond + scale * (cond - uncond)

    def with_caches(self, transformer: torch.nn.Module, has_null_branch: bool) -> "Guidance":
        """
        Guidance that the step caches of a decoder allow.

        diffusers' FasterCache and PyramidAttentionBroadcast keep one state for whatever runs: in passes of their own,
        each branch would get what the other one left. Both branches then run in one pass in every step.

        Raises:
            ValueError: for an interval together with one of these caches, or a cache without what it needs.
        """
        caches = {_CACHES[type(hook)]: hook for hook in _hooks(transformer) if type(hook) in _CACHES}
        if not caches:
            return self
        name, hook = next(iter(caches.items()))
        if hook.current_timestep_callback is None:
            raise ValueError(
                f"{name} needs to know the step: make its configuration with "
                "`current_timestep_callback=lambda: pipe.current_timestep`."
            )
        if self.interval is not None:
            raise ValueError(
                f"`guidance_interval` is {self.interval}, but {name} is enabled, which needs the same branches in "
                "every step: leave one of the two out."
            )
        if not has_null_branch and not getattr(hook, "is_guidance_distilled", True):
            raise ValueError(
                f"`guidance_scale` is at most 1, so that there is no second branch for {name} to save: make its "
                "configuration with `is_guidance_distilled=True`."
            )
        return replace(self, batched=True, fixed=True) if has_null_branch else self


_CACHES = {
    FasterCacheDenoiserHook: "FasterCache",
    FasterCacheBlockHook: "FasterCache",
    PyramidAttentionBroadcastHook: "PyramidAttentionBroadcast",
}


def _hooks(transformer: torch.nn.Module) -> list[Any]:
    """diffusers' hooks of a model and its layers."""
    registries = (getattr(module, "_diffusers_hook", None) for module in transformer.modules())
    return [hook for registry in registries if registry is not None for hook in registry.hooks.values()]


__all__ = ["Guidance"]
