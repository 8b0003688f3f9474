"""The denoising loop of Omni-Video 2: one expert for high noise, one for low noise, each with contexts of its own."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin

from ...diffusion.flow_matching import NUM_TRAIN_TIMESTEPS, UncheckedSolve
from ...models.context_attention import ConstantContext, check_not_denoising, constant_context
from ...utils.turns import has_turn, in_turn
from ..denoising import CONTEXT_ALIASES, OmniVideoDenoisingMixin, changed_tensors
from ..guidance import Guidance
from ..request_checks import FiniteSteps


@dataclass(frozen=True)
class ExpertContexts:
    """
    Contexts of one expert by branch of guidance, `[batch, length, text_dim]`, not padded.

    Args:
        context: of the conditional branch.
        null_context: of the unconditional branch; `None` turns guidance off.
        no_source_context: of the branch without source, for `source_guidance_scale`.
    """

    context: torch.Tensor
    null_context: torch.Tensor | None = None
    no_source_context: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """The contexts by their names in callbacks."""
        return {
            "context": self.context,
            "null_context": self.null_context,
            "no_source_context": self.no_source_context,
        }


class OmniVideo2DenoisingMixin(OmniVideoDenoisingMixin):
    """The sampling loop of [`OmniVideo2Pipeline`]."""

    _running_decoder: Any = None

    @property
    def _decoder(self) -> Any:
        """The expert of the running step."""
        return self.transformer if self._running_decoder is None else self._running_decoder

    @property
    def boundary_timestep(self) -> float | None:
        """Timestep from which on, upwards, the expert for high noise runs; `None` with one decoder."""
        ratio = self.config.boundary_ratio
        return None if self.transformer_2 is None or ratio is None else ratio * NUM_TRAIN_TIMESTEPS

    @in_turn("transformer", "transformer_2")
    def denoise(
        self,
        latents: torch.Tensor,
        scheduler: SchedulerMixin,
        contexts: ExpertContexts,
        contexts_2: ExpertContexts | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance: Guidance | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """
        Integrate from noise to latents.

        Args:
            latents: `[batch, channels, frames, height, width]`, noise.
            scheduler: with its timesteps set.
            contexts: of `adapter`, for `transformer`.
            contexts_2: of `adapter_2`, for `transformer_2`; needed where its steps are reached.
            guidance: steps and passes of the unconditional branch. Default: every step, in a separate pass.
            guidance_scale: guidance scale, required with a `null_context`.
            generator: generator for schedulers that add noise in every step.

        Raises:
            ValueError: for a `null_context` without a scale, missing `contexts_2`, or a callback that returns tensors
                of another batch size.
        """
        self._require("transformer")
        if contexts.null_context is not None and guidance_scale is None:
            raise ValueError("`null_context` is given, but `guidance_scale` is None: pass both, or neither.")
        if not has_turn(self):  # called by itself
            self._begin_call(attention_kwargs=attention_kwargs)
        self._guidance_scale = guidance_scale or 0.0
        scheduler.set_begin_index(0)
        scheduler.sigmas = scheduler.sigmas.to(latents.device)  # otherwise UniPC copies three of them in every step
        self._num_timesteps, finite = len(scheduler.timesteps), FiniteSteps()
        step_kwargs: dict[str, Any] = {"return_dict": False}
        if "generator" in inspect.signature(scheduler.step).parameters:
            step_kwargs["generator"] = generator
        stages = self._stages(scheduler.timesteps, contexts, contexts_2)
        tensors: dict[str, Any] = {"latents": latents}
        try:
            with self.progress_bar(total=self._num_timesteps) as progress_bar:
                for decoder, adapter, expert, steps in stages:
                    self._running_decoder = decoder
                    check_not_denoising(decoder)
                    decoder._reset_stateful_cache()  # a direct call of the decoder may have left states in it
                    tensors |= expert.tensors()
                    own = (guidance or Guidance()).with_caches(
                        decoder, expert.null_context is not None and self.do_classifier_free_guidance
                    )
                    length = adapter.config.max_context_length
                    with constant_context(decoder, self._branch_contexts(tensors, own), length) as constant:
                        for step in steps:
                            if self._interrupt:
                                continue
                            self._step(
                                step, tensors, scheduler, constant, own, attention_kwargs, callback_on_step_end,
                                callback_on_step_end_tensor_inputs, finite, step_kwargs,
                            )  # fmt: skip
                            progress_bar.update()
        finally:
            self._running_decoder = self._current_timestep = None
            for decoder, *_ in stages:
                decoder._reset_stateful_cache()
        finite.check(self._num_timesteps)
        return tensors["latents"]

    def _step(
        self,
        step: int,
        tensors: dict[str, Any],
        scheduler: Any,
        constant: ConstantContext,
        guidance: Guidance,
        attention_kwargs: dict[str, Any] | None,
        callback: Callable[..., dict[str, Any]] | None,
        callback_inputs: Sequence[str],
        finite: FiniteSteps,
        step_kwargs: dict[str, Any],
    ) -> None:
        """One step of the loop: velocity, solver, callback. `tensors` are changed in place."""
        timestep = self._current_timestep = scheduler.timesteps[step]
        velocity = self._predict_velocity(
            step, tensors["latents"], None, timestep, constant, guidance, attention_kwargs
        )
        with UncheckedSolve():
            tensors["latents"] = scheduler.step(velocity, timestep, tensors["latents"], **step_kwargs)[0]
        finite.add(step, tensors["latents"])
        if callback is None:
            return
        given = {name: tensors[CONTEXT_ALIASES.get(name, name)] for name in callback_inputs}
        changed = changed_tensors(callback(self, step, timestep, dict(given)), given, tensors)
        tensors |= changed
        finite.add(step, tensors["latents"], "`callback_on_step_end`")
        if changed.keys() & {"context", "null_context"}:
            for branch, states in self._branch_contexts(tensors, guidance).items():
                constant.set(branch, states)

    def _stages(
        self, timesteps: torch.Tensor, contexts: ExpertContexts, contexts_2: ExpertContexts | None
    ) -> list[tuple[Any, Any, ExpertContexts, list[int]]]:
        """Decoder, adapter, contexts and numbers of the steps of each expert that runs."""
        boundary, steps = self.boundary_timestep, range(len(timesteps))
        if boundary is None:
            return [(self.transformer, self.adapter, contexts, list(steps))]
        high = [step for step in steps if float(timesteps[step]) >= boundary]
        low = [step for step in steps if float(timesteps[step]) < boundary]
        if low and contexts_2 is None:
            raise ValueError(
                f"{len(low)} of the steps are below the boundary of {boundary:g}, where `transformer_2` runs: pass "
                "`contexts_2`, the contexts of `adapter_2`."
            )
        stages = [(self.transformer, self.adapter, contexts, high)]
        if contexts_2 is not None:
            stages.append((self.transformer_2, self.adapter_2 or self.adapter, contexts_2, low))
        return [stage for stage in stages if stage[-1]]


__all__ = ["ExpertContexts", "OmniVideo2DenoisingMixin"]
