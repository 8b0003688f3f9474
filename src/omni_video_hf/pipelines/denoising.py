"""The denoising loop of the pipeline, with guidance, callbacks and step caches."""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor

from ..diffusion.flow_matching import NUM_TRAIN_TIMESTEPS, UncheckedSolve, add_noise
from ..diffusion.window_plan import Window, blend_windows, pyramid_weights
from ..models.configuration_omni_video import check_source_channels
from ..models.context_attention import ConstantContext, check_not_denoising, constant_context
from ..models.source_channels import with_source_channels
from ..utils.modules import Host
from ..utils.turns import has_turn, in_turn, turn
from .guidance import NO_SOURCE, Guidance, warn_of_idle_cache
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


@dataclass(frozen=True)
class JointWindows:
    """
    Windows of a long video that are denoised together, and what each of them is conditioned by.

    Args:
        windows: plan of the windows, see [`plan_windows`].
        lead_ins: `[batch, channels, windows - 1, height, width]`, noise of their lead-ins.
        contexts: `context`, and where there are such branches `null_context` and `no_source_context`: of each one
            context `[batch, length, text_dim]` per window, or a single one for all windows.
        source_channels: source channels per window, or a single entry for all; see [`OmniVideoPipeline.denoise`].
    """

    windows: tuple[Window, ...]
    lead_ins: torch.Tensor
    contexts: dict[str, list[torch.Tensor]]
    source_channels: list[torch.Tensor | None]

    @property
    def shares_contexts(self) -> bool:
        """Whether one context serves all windows."""
        return all(len(contexts) == 1 for contexts in self.contexts.values())


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
        self._num_windows = 1

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
    def num_windows(self) -> int:
        """Windows of the running call; 1 unless a long video is generated in windows."""
        return self._num_windows

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

    def prepare_source_channels(
        self,
        latents: torch.Tensor,
        source_latents: torch.Tensor | None = None,
        reference_latents: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """
        What the decoder takes beside the noisy latents, see [`with_source_channels`].

        Args:
            latents: `[batch, channels, frames, height, width]`, the initial noise.
            source_latents, reference_latents: normalised latents of the source; `latents` may have several samples of
                each.

        Returns:
            `[batch, channels, frames, height, width]`, zeros without a source; `None` for a decoder without source
            channels.

        Raises:
            ValueError: when latents of the source do not fit `latents`.

        Example:
            >>> import torch
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> pipe.prepare_source_channels(torch.zeros(1, 16, 1, 8, 8)) is None  # it takes sources in the context
            True
        """
        if not self.adapter.takes_source_in_channels:
            return None
        source_latents, reference_latents = (
            None if given is None else given.repeat_interleave(max(1, len(latents) // len(given)), dim=0)
            for given in (source_latents, reference_latents)
        )
        return with_source_channels(latents, source_latents, reference_latents)[:, latents.shape[1] :]

    def prepare_windows(
        self,
        latents: torch.Tensor,
        windows: tuple[Window, ...],
        contexts: dict[str, list[torch.Tensor]],
        sources: list[dict[str, torch.Tensor | None]],
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> JointWindows:
        """
        The windows of a call for [`denoise`], with noise for their lead-ins.

        Args:
            latents: `[batch, channels, frames, height, width]`, the initial noise.
            windows: the plan; one window for a video that is generated at once.
            contexts: see [`JointWindows`].
            sources: `source_latents` and `reference_latents` of every window, or of the first one alone: a reference
                image belongs to the first frame of the video.
            generator: one per sample, or one for all.

        Example:
            >>> import torch
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.diffusion.window_plan import plan_windows
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> joint = pipe.prepare_windows(torch.zeros(1, 16, 9, 8, 8), plan_windows(9, 5, 1), {}, [{}])
            >>> joint.lead_ins.shape
            torch.Size([1, 16, 2, 8, 8])
        """
        shape = (*latents.shape[:2], len(windows) - 1, *latents.shape[3:])
        lead_ins = latents[:, :, :0]
        if len(windows) > 1:
            lead_ins = randn_tensor(shape, generator=generator, device=latents.device, dtype=latents.dtype)
        own = [*sources, *([{}] * (len(windows) - len(sources)))]
        channels = [
            self.prepare_source_channels(window.take(latents, lead_ins), **given)
            for window, given in zip(windows, own, strict=True)
        ]
        return JointWindows(windows, lead_ins, contexts, channels)

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
        joint: JointWindows | None = None,
        first_latents: torch.Tensor | None = None,
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
            joint: windows of a long video, which the decoder sees one after the other in every step; their velocities
                are blended, and the scheduler takes one step with the whole clip. `context`, `null_context`,
                `no_source_context` and `source_channels` are then those of the first window.
            first_latents: `[batch, channels, frames, height, width]`, latents that the result begins with. They are
                noised to each step and written over the first frames of `latents`.

        Raises:
            ValueError: for `null_context` without a scale, a decoder that does not fit the adapter's
                `source_conditioning`, or a callback that returns tensors of another batch size, or changes the context
                while every window has its own.
        """
        self._check_can_denoise(null_context, guidance_scale)
        if not has_turn(self):  # called by itself
            self._begin_call(attention_kwargs=attention_kwargs)
        self._guidance_scale = guidance_scale or 0.0
        has_null_branch = null_context is not None and self.do_classifier_free_guidance
        guidance = (guidance or Guidance()).with_caches(self.transformer, has_null_branch)
        tensors: dict[str, Any] = {"latents": latents, "context": context, "null_context": null_context}
        tensors["no_source_context"] = no_source_context
        config = self.transformer.config
        check_source_channels(self.adapter.config.source_conditioning, config.in_channels, config.out_channels)
        if source_channels is None and joint is None:
            source_channels = self.prepare_source_channels(latents)
        joint = joint or JointWindows((Window(0, latents.shape[2]),), latents[:, :, :0], {}, [source_channels])
        count, lead_ins = latents.shape[2], joint.lead_ins.to(latents)
        known = None if first_latents is None else (first_latents.to(latents), latents[:, :, : first_latents.shape[2]])
        self.transformer._reset_stateful_cache()  # a direct call of the decoder may have left states in it
        scheduler.set_begin_index(0)
        scheduler.sigmas = scheduler.sigmas.to(latents.device)  # otherwise UniPC copies three of them in every step
        timesteps, finite = scheduler.timesteps, FiniteSteps()
        self._num_timesteps, self._num_windows = len(timesteps), len(joint.windows)
        draws_noise = "generator" in inspect.signature(scheduler.step).parameters
        step_kwargs: dict[str, Any] = {"return_dict": False} | ({"generator": generator} if draws_noise else {})
        try:
            with (
                constant_context(
                    self.transformer, self._branch_contexts(tensors, guidance), self.adapter.config.max_context_length
                ) as constant,
                self.progress_bar(total=len(timesteps) * self._num_windows) as progress_bar,
            ):
                self._set_window_contexts(constant, joint, guidance)
                for step, timestep in enumerate(timesteps):
                    self._current_timestep = timestep
                    if known is not None:
                        tensors["latents"] = _begun_with(tensors["latents"], *known, _sigma(scheduler, step))
                    velocities = self._predict_windows(
                        step, tensors["latents"], lead_ins, joint, timestep, constant, guidance, attention_kwargs,
                        progress_bar,
                    )  # fmt: skip
                    if velocities is None:  # interrupted
                        break
                    with UncheckedSolve():
                        joined = _joined(tensors["latents"], lead_ins)
                        joined = scheduler.step(_joined(*velocities), timestep, joined, **step_kwargs)[0]
                    tensors["latents"], lead_ins = joined[:, :, :count], joined[:, :, count:]
                    finite.add(step, tensors["latents"])
                    if callback_on_step_end is not None:
                        given = {
                            name: tensors[CONTEXT_ALIASES.get(name, name)]
                            for name in callback_on_step_end_tensor_inputs
                        }
                        returned = callback_on_step_end(self, step, timestep, dict(given))
                        tensors |= (changed := changed_tensors(returned, given, tensors))
                        finite.add(step, tensors["latents"], "`callback_on_step_end`")
                        self._set_changed_contexts(constant, joint, guidance, tensors, changed)
        finally:
            self._current_timestep = None
            self.transformer._reset_stateful_cache()
        finite.check(len(timesteps))
        return tensors["latents"] if known is None else _begun_with(tensors["latents"], *known, torch.zeros(()))

    def _check_can_denoise(self, null_context: torch.Tensor | None, guidance_scale: float | None) -> None:
        """Refuse what cannot begin, and warn of caches that would skip nothing."""
        self._require("transformer")
        check_not_denoising(self.transformer)
        warn_of_idle_cache(self.transformer)
        if null_context is not None and guidance_scale is None:
            raise ValueError("`null_context` is given, but `guidance_scale` is None: pass both, or neither.")

    def _branch_contexts(self, tensors: dict[str, Any], guidance: Guidance) -> dict[str, torch.Tensor]:
        """Contexts of the branches in the decoder's format."""
        contexts = guidance.contexts(tensors["context"], tensors["null_context"], tensors["no_source_context"])
        return {branch: states.to(self._decoder.dtype) for branch, states in contexts.items()}

    def _set_window_contexts(self, constant: ConstantContext, joint: JointWindows, guidance: Guidance) -> None:
        """Contexts of the later windows, where each has its own."""
        if joint.shares_contexts:
            return
        for number in range(1, len(joint.windows)):
            tensors = {
                name: given[number % len(given)] if (given := joint.contexts.get(name)) else None for name in _CONTEXTS
            }
            for branch, states in self._branch_contexts(tensors, guidance).items():
                constant.set(_of_window(branch, number), states, always_kept=False)

    def _set_changed_contexts(
        self,
        constant: ConstantContext,
        joint: JointWindows,
        guidance: Guidance,
        tensors: dict[str, Any],
        changed: dict[str, torch.Tensor],
    ) -> None:
        """Use the contexts that a callback changed; where every window has its own, it may not change them."""
        names = sorted(changed.keys() & {"context", "null_context"})
        if names and not joint.shares_contexts:
            raise ValueError(
                f"`callback_on_step_end` returned `{names[0]}`, but with `long_video='windows'` every window has a "
                "context of its own: let the callback change `latents` only."
            )
        for branch, states in self._branch_contexts(tensors, guidance).items() if names else ():
            constant.set(branch, states)

    def _predict_windows(
        self,
        step: int,
        latents: torch.Tensor,
        lead_ins: torch.Tensor,
        joint: JointWindows,
        timestep: torch.Tensor,
        constant: ConstantContext,
        guidance: Guidance,
        attention_kwargs: dict[str, Any] | None,
        progress_bar: Any,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The guided velocities of one step, of the clip and of the lead-ins; `None` if the call was interrupted."""
        parts = []
        for number, window in enumerate(joint.windows):
            if self._interrupt:
                return None
            if len(joint.windows) > 1:
                progress_bar.set_postfix_str(
                    f"step {step + 1}/{self._num_timesteps}, window {number + 1}/{len(joint.windows)}", refresh=False
                )
            channels = joint.source_channels[number % len(joint.source_channels)]
            parts.append(
                self._predict_velocity(
                    step, window.take(latents, lead_ins), channels, timestep, constant, guidance, attention_kwargs,
                    (number, joint.shares_contexts),
                )
            )  # fmt: skip
            progress_bar.update()
        return blend_windows(parts, joint.windows, pyramid_weights(joint.windows))

    def _predict_velocity(
        self,
        step: int,
        latents: torch.Tensor,
        channels: torch.Tensor | None,
        timestep: torch.Tensor,
        constant: ConstantContext,
        guidance: Guidance,
        attention_kwargs: dict[str, Any] | None,
        window: tuple[int, bool] = (0, True),
    ) -> torch.Tensor:
        """The velocity of one step, guided; `window` is the number of the window, and whether it shares contexts."""
        own = constant.contexts_of_first_window
        branches = guidance.branches(step, self._num_timesteps, own, self._guidance_scale)
        # With source channels the branch without source, which is the last, gets other inputs than those before it.
        constant.begin_step(sum(channels is None or branch != NO_SOURCE for branch in branches))
        velocities = [
            velocity
            for branch in branches
            for velocity in self._predict_velocities(
                branch, latents, channels, timestep, constant, attention_kwargs, window
            )
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
        window: tuple[int, bool] = (0, True),
    ) -> tuple[torch.Tensor, ...]:
        """The decoder's velocity of a branch, or of each part of a batched one, conditional first, in float32."""
        number, shares_context = window
        of_window = _of_window(branch, number)  # step caches keep states of every window, as of every branch
        name = branch if shares_context else of_window
        parts = len(constant.contexts[name]) // len(latents)
        states = torch.cat([latents] * parts)
        if channels is not None:
            nothing = torch.zeros_like(channels)
            has_source = [False, True, True][-parts:] if branch != NO_SOURCE else [False]
            states = torch.cat([states, torch.cat([channels if has else nothing for has in has_source])], dim=1)
        states = states.to(self._decoder.dtype)
        with self._decoder.cache_context(of_window), constant.enter(name) as context:
            velocity = self._decoder(
                hidden_states=states,
                timestep=timestep.expand(len(states)),
                encoder_hidden_states=context,
                attention_kwargs=attention_kwargs,
                return_dict=False,
            )[0]
        return velocity.float().chunk(parts)[::-1]


_CONTEXTS = ("context", "null_context", "no_source_context")


def _of_window(branch: str, number: int) -> str:
    """Name of a branch in a window; in the first window it is the branch's own."""
    return f"{branch}, window {number + 1}" if number else branch


def _joined(latents: torch.Tensor, lead_ins: torch.Tensor) -> torch.Tensor:
    """Latents of the clip and its lead-ins as one tensor, for the scheduler; without lead-ins the clip as it is."""
    return torch.cat([latents, lead_ins], dim=2) if lead_ins.shape[2] else latents


def _sigma(scheduler: SchedulerMixin, step: int) -> torch.Tensor:
    """Noise level before a step, in 0..1, without waiting for the device."""
    if len(scheduler.sigmas) == len(scheduler.timesteps) + 1:
        return scheduler.sigmas[step]
    return scheduler.timesteps[step] / NUM_TRAIN_TIMESTEPS


def _begun_with(latents: torch.Tensor, known: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Latents whose first frames are `known` with noise of the level `sigma`."""
    first = add_noise(known, noise, sigma.to(latents).expand(len(latents)))
    return torch.cat([first, latents[:, :, first.shape[2] :]], dim=2)


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
    "JointWindows",
    "OmniVideoDenoisingMixin",
    "callback_inputs",
    "changed_tensors",
    "register_with_cache_dit",
    "whole_call",
]
