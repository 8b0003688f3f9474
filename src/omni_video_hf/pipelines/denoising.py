"""The denoising loop of the pipeline, with guidance, callbacks and step caches."""

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..diffusion.flow_matching import UncheckedSolve
from ..models.configuration_omni_video import check_source_channels
from ..models.context_attention import ConstantContext, check_not_denoising, constant_context
from ..utils.modules import Host
from ..utils.turns import has_turn, in_turn, turn
from .guidance import NO_SOURCE, Guidance
from .request_checks import FiniteSteps


def whole_call(method: Callable) -> Callable:
    """Decorate the pipeline's call: it locks its components and restores their state at its end."""

    @wraps(method)
    def call(self: "OmniVideoDenoisingMixin", *args: Any, **kwargs: Any) -> Any:
        parts = [part for name, part in self.components.items() if name != "scheduler"]
        with torch.no_grad(), turn(*parts, alone=[part for part in (self, self.transformer) if part is not None]):
            try:
                return method(self, *args, **kwargs)
            except BaseException:
                if hasattr(self.vae, "clear_cache"):
                    self.vae.clear_cache()
                raise
            finally:
                self._current_timestep = None
                self.maybe_free_model_hooks()

    return call


class OmniVideoDenoisingMixin(Host):
    """The sampling loop of [`OmniVideoPipeline`], and the state of the running call."""

    # The last two are the names that diffusers' own callbacks know the two before by.
    _callback_tensor_inputs = [  # noqa: RUF012
        "latents", "context", "null_context", "prompt_embeds", "negative_prompt_embeds",
    ]  # fmt: skip

    def _begin_call(self, guidance_scale: float = 0.0, attention_kwargs: dict[str, Any] | None = None) -> None:
        """Reset the state of the last call that callbacks can read."""
        self._guidance_scale, self._attention_kwargs = guidance_scale, attention_kwargs
        self._interrupt, self._num_timesteps, self._current_timestep = False, 0, None

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the running call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call has an unconditional branch."""
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the running call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """Timestep of the running step, for diffusers' step caches; `None` outside of the loop."""
        return self._current_timestep

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """`attention_kwargs` of the running call."""
        return self._attention_kwargs

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to skip the remaining steps."""
        return self._interrupt

    @property
    def _decoder(self) -> Any:
        """The decoder that denoises; a pipeline with several returns that of the running step."""
        return self.transformer

    @in_turn("transformer")
    def denoise(
        self,
        latents: torch.Tensor,
        scheduler: SchedulerMixin,
        context: torch.Tensor,
        null_context: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance: Guidance | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        no_source_context: torch.Tensor | None = None,
        source_channels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Integrate from noise to latents.

        Args:
            latents: `[batch, channels, frames, height, width]`, noise.
            scheduler: with its timesteps set.
            context: `[batch, length, text_dim]`, not padded.
            null_context: `[batch, length, text_dim]` of the unconditional branch, not padded; `None` turns guidance
                off.
            guidance: steps and passes of the unconditional branch. Default: every step, in a separate pass.
            guidance_scale: guidance scale, required with `null_context`.
            generator: generator for schedulers that add noise in every step.
            no_source_context: `[batch, length, text_dim]` of the branch without source, for `guidance.source_scale`.
            source_channels: `[batch, channels, frames, height, width]`, result of [`prepare_source_channels`], for a
                decoder with source channels. Default: zeros, which stand for no source.

        Raises:
            ValueError: for `null_context` without a scale, a decoder that does not fit the adapter's
                `source_conditioning`, or a callback that returns tensors of another batch size.
        """
        self._require("transformer")
        check_not_denoising(self.transformer)
        if null_context is not None and guidance_scale is None:
            raise ValueError("`null_context` is given, but `guidance_scale` is None: pass both, or neither.")
        if not has_turn(self):  # called by itself
            self._begin_call(attention_kwargs=attention_kwargs)
        self._guidance_scale = guidance_scale or 0.0
        has_null_branch = null_context is not None and self.do_classifier_free_guidance
        guidance = (guidance or Guidance()).with_caches(self.transformer, has_null_branch)
        tensors: dict[str, Any] = {"latents": latents, "context": context, "null_context": null_context}
        tensors["no_source_context"] = no_source_context
        config = self.transformer.config
        check_source_channels(self.adapter.config.source_conditioning, config.in_channels, config.out_channels)
        if source_channels is None:
            source_channels = self.prepare_source_channels(latents)
        self.transformer._reset_stateful_cache()  # a direct call of the decoder may have left states in it
        scheduler.set_begin_index(0)
        scheduler.sigmas = scheduler.sigmas.to(latents.device)  # otherwise UniPC copies three of them in every step
        timesteps, finite = scheduler.timesteps, FiniteSteps()
        self._num_timesteps = len(timesteps)
        step_kwargs: dict[str, Any] = {"return_dict": False}
        if "generator" in inspect.signature(scheduler.step).parameters:
            step_kwargs["generator"] = generator
        length = self.adapter.config.max_context_length
        try:
            with (
                constant_context(self.transformer, self._branch_contexts(tensors, guidance), length) as constant,
                self.progress_bar(total=len(timesteps)) as progress_bar,
            ):
                for step, timestep in enumerate(timesteps):
                    if self._interrupt:
                        continue
                    self._current_timestep = timestep
                    velocity = self._predict_velocity(
                        step, tensors["latents"], source_channels, timestep, constant, guidance, attention_kwargs
                    )
                    with UncheckedSolve():
                        latents = scheduler.step(velocity, timestep, tensors["latents"], **step_kwargs)[0]
                    tensors["latents"] = latents
                    finite.add(step, latents)
                    if callback_on_step_end is not None:
                        given = {
                            name: tensors[CONTEXT_ALIASES.get(name, name)]
                            for name in callback_on_step_end_tensor_inputs
                        }
                        changed = changed_tensors(
                            callback_on_step_end(self, step, timestep, dict(given)), given, tensors
                        )
                        tensors |= changed
                        finite.add(step, tensors["latents"], "`callback_on_step_end`")
                        if changed.keys() & {"context", "null_context"}:
                            for branch, states in self._branch_contexts(tensors, guidance).items():
                                constant.set(branch, states)
                    progress_bar.update()
        finally:
            self._current_timestep = None
            self.transformer._reset_stateful_cache()
        finite.check(len(timesteps))
        return tensors["latents"]

    def _branch_contexts(self, tensors: dict[str, Any], guidance: Guidance) -> dict[str, torch.Tensor]:
        """Contexts of the branches in the decoder's format."""
        contexts = guidance.contexts(tensors["context"], tensors["null_context"], tensors["no_source_context"])
        return {branch: states.to(self._decoder.dtype) for branch, states in contexts.items()}

    def _predict_velocity(
        self,
        step: int,
        latents: torch.Tensor,
        channels: torch.Tensor | None,
        timestep: torch.Tensor,
        constant: ConstantContext,
        guidance: Guidance,
        attention_kwargs: dict[str, Any] | None,
    ) -> torch.Tensor:
        """The velocity of one step, guided."""
        branches = guidance.branches(step, self._num_timesteps, constant.contexts, self._guidance_scale)
        # With source channels the branch without source, which is the last, gets other inputs than those before it.
        constant.begin_step(sum(channels is None or branch != NO_SOURCE for branch in branches))
        velocities = [
            velocity
            for branch in branches
            for velocity in self._predict_velocities(branch, latents, channels, timestep, constant, attention_kwargs)
        ]
        return guidance.combine(velocities, self._guidance_scale)

    def _predict_velocities(
        self,
        branch: str,
        latents: torch.Tensor,
        channels: torch.Tensor | None,
        timestep: torch.Tensor,
        constant: ConstantContext,
        attention_kwargs: dict[str, Any] | None,
    ) -> tuple[torch.Tensor, ...]:
        """The decoder's velocity of a branch, or of each part of a batched one, conditional first, in float32."""
        parts = len(constant.contexts[branch]) // len(latents)
        states = torch.cat([latents] * parts)
        if channels is not None:
            nothing = torch.zeros_like(channels)
            has_source = [False, True, True][-parts:] if branch != NO_SOURCE else [False]
            states = torch.cat([states, torch.cat([channels if has else nothing for has in has_source])], dim=1)
        states = states.to(self._decoder.dtype)
        with self._decoder.cache_context(branch), constant.enter(branch) as context:
            velocity = self._decoder(
                hidden_states=states,
                timestep=timestep.expand(len(states)),
                encoder_hidden_states=context,
                attention_kwargs=attention_kwargs,
                return_dict=False,
            )[0]
        return velocity.float().chunk(parts)[::-1]


CONTEXT_ALIASES = {"prompt_embeds": "context", "negative_prompt_embeds": "null_context"}


def changed_tensors(
    returned: Any, given: dict[str, torch.Tensor | None], tensors: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The tensors that a callback changed, by their names in the denoising loop."""
    if not isinstance(returned, dict):
        raise TypeError(f"`callback_on_step_end` must return a dictionary of what it changes, got {returned!r}.")
    changed: dict[str, torch.Tensor] = {}
    # Of two names for one tensor, the one that it was changed under counts.
    for name in sorted(returned, key=lambda name: returned[name] is not given.get(name)):
        own, tensor = CONTEXT_ALIASES.get(name, name), returned[name]
        if own not in tensors or tensors[own] is None:
            continue
        if tensor.shape[0] != tensors[own].shape[0]:
            raise ValueError(
                f"`callback_on_step_end` returned `{name}` of {tensor.shape[0]} samples, but the call has "
                f"{tensors[own].shape[0]}: return one row per sample. To turn guidance off, set "
                "`pipe._guidance_scale = 1.0`."
            )
        changed[own] = tensor
    return changed


def callback_inputs(
    callback: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None, names: Sequence[str]
) -> Sequence[str]:
    """Names of the tensors that a callback gets: those that it asks for itself, or those that the caller named."""
    return callback.tensor_inputs if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)) else names


def register_with_cache_dit(pipeline: type) -> None:
    """Let `cache_dit.enable_cache(pipe)` know a pipeline's class, where that library is imported already."""
    cache_dit: Any = sys.modules.get("cache_dit")
    register = getattr(cache_dit, "BlockAdapterRegister", None)
    if register is None or pipeline.__name__ in register._adapters:
        return

    @register.register(pipeline.__name__)
    def adapter(pipe: Any, **kwargs: Any) -> Any:
        pattern = cache_dit.ForwardPattern.Pattern_2  # hidden states and context in, hidden states out
        second = getattr(pipe, "transformer_2", None)
        experts = [pipe.transformer] if second is None else [pipe.transformer, second]
        single = len(experts) == 1  # for two, the library takes lists
        return cache_dit.BlockAdapter(
            pipe=pipe,
            transformer=experts[0] if single else experts,
            blocks=experts[0].blocks if single else [expert.blocks for expert in experts],
            forward_pattern=pattern if single else [pattern] * len(experts),
            has_separate_cfg=True,  # conditional and null branch run in turn
            **kwargs,
        )


__all__ = [
    "OmniVideoDenoisingMixin",
    "callback_inputs",
    "changed_tensors",
    "register_with_cache_dit",
    "whole_call",
]
