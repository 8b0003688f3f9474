"""Classifier-free guidance: which branches of the decoder run in which step, and how their velocities are combined."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.hooks.faster_cache import FasterCacheBlockHook, FasterCacheDenoiserHook
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig, TaylorSeerCacheHook
from diffusers.utils import logging
from torch.nn.utils.rnn import pad_sequence

from ..tasks import get_task

logger = logging.get_logger(__name__)

# Layers of Wan's decoder for `TaylorSeerCacheConfig(cache_identifiers=...)`; diffusers' own patterns fit none of them.
TAYLORSEER_LAYERS = (r"blocks\.\d+\.(attn[12]|ffn)",)
COND, UNCOND, NO_SOURCE, BOTH = "cond", "uncond", "no_source", "cond_uncond"


@dataclass(frozen=True)
class Guidance:
    """
    Settings of classifier-free guidance: steps and passes of the unconditional branch.

    Args:
        interval: fractions `(start, stop)` of the steps with guidance; `None` for all steps.
        batched: one pass for both branches, over twice the samples, instead of two.
        fixed: every step runs the same branches, even when a callback turns guidance off.
        source_scale: scale of the source, which needs a third branch without it; `None` for no such branch.

    Raises:
        ValueError: for an interval that is not within 0..1 or is empty.
    """

    interval: tuple[float, float] | None = None
    batched: bool = False
    fixed: bool = False
    source_scale: float | None = None

    def __post_init__(self) -> None:
        if self.interval is None:
            return
        if len(self.interval) != 2 or not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ValueError(
                f"`guidance_interval` must be (start, stop) with 0 <= start < stop <= 1, fractions of the steps, got "
                f"{self.interval!r}. For no guidance at all pass `guidance_scale=1`."
            )

    def with_source_scale(self, source_scale: float | None, task: str, guidance_scale: float) -> "Guidance":
        """
        Guidance that also holds on to the source.

        Raises:
            ValueError: for a task without source, or a call without guidance.
        """
        if source_scale is None or source_scale == 1:
            return self
        if get_task(task).latents is None:
            raise ValueError(
                f"`source_guidance_scale` is {source_scale}, but task {task!r} has no source: leave it out."
            )
        if guidance_scale <= 1:
            raise ValueError(
                f"`source_guidance_scale` is {source_scale}, but `guidance_scale` is {guidance_scale}, which turns "
                "guidance off: pass a `guidance_scale` above 1 as well."
            )
        return replace(self, source_scale=source_scale)

    def contexts(
        self,
        context: torch.Tensor,
        null_context: torch.Tensor | None,
        no_source_context: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Contexts by branch, `[batch, tokens, width]`.

        Batched, the branch without source comes first, then the unconditional one, as in diffusers; shorter contexts
        end in zeros, which is how contexts are padded anyway.
        """
        if null_context is None:
            return {COND: context}
        others = {UNCOND: null_context}
        if no_source_context is not None:
            others[NO_SOURCE] = no_source_context
        if not self.batched:
            return {COND: context, **others}
        rows = [row for states in reversed(others.values()) for row in states]
        return {COND: context, BOTH: pad_sequence([*rows, *context], batch_first=True)}

    def branches(
        self, step: int, num_steps: int, contexts: dict[str, torch.Tensor], scale: float = math.inf
    ) -> tuple[str, ...]:
        """The branches of a step: those with a context, while guidance is on and `scale` above 1."""
        if self.fixed and len(contexts) > 1:
            return (BOTH,)
        start, stop = (0.0, 1.0) if self.interval is None else self.interval
        if len(contexts) == 1 or scale <= 1 or not int(start * num_steps) <= step < int(stop * num_steps):
            return (COND,)
        return (BOTH,) if self.batched else tuple(contexts)

    def combine(self, velocities: Sequence[torch.Tensor], scale: float) -> torch.Tensor:
        """
        Combine the velocities of the branches: `uncond + scale * (cond - uncond)`.

        With a branch without source it is `no_source + source_scale * (uncond - no_source) + scale * (cond - uncond)`.

        Args:
            velocities: of the conditional branch, then of the unconditional branch and of the branch without source,
                if these ran in this step.
            scale: guidance scale; up to 1, the result is the conditional velocity.
        """
        if len(velocities) == 1 or scale <= 1:
            return velocities[0]
        cond, uncond, *no_source = velocities
        guided = scale * (cond - uncond)
        if not no_source or self.source_scale is None:
            return uncond + guided
        return no_source[0] + self.source_scale * (uncond - no_source[0]) + guided

    def with_caches(self, transformer: torch.nn.Module, has_null_branch: bool, num_windows: int = 1) -> "Guidance":
        """
        Adapt guidance to the step caches of a decoder.

        FasterCache and PyramidAttentionBroadcast of diffusers have one state for all passes, so that a branch would
        use the state of the other one. With them, both branches run in one pass in every step.

        Raises:
            ValueError: for an interval or several windows together with one of these caches, or a cache without what
                it needs.
        """
        caches = {_CACHES[type(hook)]: hook for hook in _hooks(transformer) if type(hook) in _CACHES}
        if not caches:
            return self
        name, hook = next(iter(caches.items()))
        if hook.current_timestep_callback is None:
            raise ValueError(
                f"{name} needs the timestep of a step: create its configuration with "
                "`current_timestep_callback=lambda: pipe.current_timestep`."
            )
        if num_windows > 1:
            raise ValueError(
                f"`long_video='windows'` needs {num_windows} windows, but {name} is enabled, which has one state for "
                "all passes: disable it, or use a cache with a state per pass, such as FirstBlockCache."
            )
        if self.source_scale is not None and name == "FasterCache":
            raise ValueError(
                f"`source_guidance_scale` is {self.source_scale}, but FasterCache knows two branches and not three: "
                "leave one of the two out."
            )
        if self.interval is not None:
            raise ValueError(
                f"`guidance_interval` is {self.interval}, but {name} is enabled, which needs the same branches in "
                "every step: leave one of the two out."
            )
        if not has_null_branch and not getattr(hook, "is_guidance_distilled", True):
            raise ValueError(
                f"`guidance_scale` is at most 1, so there is no unconditional branch, which {name} needs: create its "
                "configuration with `is_guidance_distilled=True`."
            )
        return replace(self, batched=True, fixed=True) if has_null_branch else self


_CACHES = {
    FasterCacheDenoiserHook: "FasterCache",
    FasterCacheBlockHook: "FasterCache",
    PyramidAttentionBroadcastHook: "PyramidAttentionBroadcast",
}


def warn_of_idle_cache(transformer: torch.nn.Module) -> None:
    """Warn of a step cache that was enabled and skips nothing, because its patterns match no layer."""
    config = getattr(transformer, "_cache_config", None)
    if isinstance(config, TaylorSeerCacheConfig) and not any(
        isinstance(hook, TaylorSeerCacheHook) for hook in _hooks(transformer)
    ):
        patterns = (
            "the default patterns of TaylorSeerCacheConfig"
            if config.cache_identifiers is None
            else (f"`cache_identifiers={config.cache_identifiers}`")
        )
        logger.warning(
            f"TaylorSeer is enabled but skips nothing: {patterns} match no layer of the decoder. Call "
            f"`disable_cache()`, and enable it with `cache_identifiers={list(TAYLORSEER_LAYERS)}`."
        )


def _hooks(transformer: torch.nn.Module) -> list[Any]:
    """The diffusers hooks of a model and its layers."""
    registries = (getattr(module, "_diffusers_hook", None) for module in transformer.modules())
    return [hook for registry in registries if registry is not None for hook in registry.hooks.values()]


__all__ = ["TAYLORSEER_LAYERS", "Guidance", "warn_of_idle_cache"]
