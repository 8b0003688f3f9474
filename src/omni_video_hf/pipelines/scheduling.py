"""Schedulers: checks that a scheduler fits the model, the choice of its shift, and a copy for every call."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import SchedulerMixin

from ..diffusion.flow_matching import sampling_sigmas

_SHIFTS = ("flow_shift", "shift")  # names of the shift in the classes of diffusers


def check_scheduler(scheduler: Any) -> None:
    """
    Refuse a scheduler that cannot integrate the velocities of this model.

    Raises:
        ValueError: for such a scheduler; the message names its class and the entry of its configuration.
    """
    name = type(scheduler).__name__
    parameters = inspect.signature(type(scheduler).__init__).parameters
    if not isinstance(scheduler, SchedulerMixin) or not any(shift in parameters for shift in _SHIFTS):
        raise ValueError(
            f"`scheduler` must be a flow-matching scheduler, with `flow_shift` or `shift` in its configuration; "
            f"{name} has neither. Use e.g. UniPCMultistepScheduler or FlowMatchEulerDiscreteScheduler."
        )
    config = scheduler.config
    # A class without these settings keeps them from the class it was converted from, but does not use them.
    found = {entry: config[entry] for entry in _NEEDED if entry in parameters and config[entry] != _NEEDED[entry][0]}
    for entry, value in found.items():
        needed, reason = _NEEDED[entry]
        raise ValueError(
            f"`scheduler.config.{entry}` of the {name} must be {needed!r}, got {value!r}: {reason}. Create it with "
            f"`{name}.from_config(scheduler.config, {entry}={needed!r})`."
        )
    step = inspect.signature(scheduler.step).parameters.values()
    more = [entry.name for entry in step if entry.default is entry.empty and entry.kind is entry.POSITIONAL_OR_KEYWORD]
    if len(more) != 3 or not hasattr(scheduler, "set_begin_index"):
        raise ValueError(
            f"`scheduler` is a {name}, whose `step` needs more than velocity, timestep and latents. Use e.g. "
            "UniPCMultistepScheduler or FlowMatchEulerDiscreteScheduler."
        )


_NEEDED = {
    "prediction_type": ("flow_prediction", "the decoder predicts a velocity"),
    "use_flow_sigmas": (True, "the decoder was trained on the sigmas of flow matching"),
    "use_dynamic_shifting": (False, "the shift is one number, `flow_shift`"),
}


def scheduler_shift(scheduler: SchedulerMixin) -> float | None:
    """The shift that a scheduler was created with or set to; `None` for the default of its class, or no shift."""
    parameters = inspect.signature(type(scheduler).__init__).parameters
    name = _shift_name(scheduler)
    if name is None:
        return None
    value = scheduler.config[name]
    if isinstance(getattr(type(scheduler), "shift", None), property):  # `set_shift` changes it
        value = scheduler.shift
    if value != parameters[name].default or name not in scheduler.config.get("_use_default_values", ()):
        return value
    # Created from the configuration of another class, which uses the other name.
    return next((scheduler.config[other] for other in _SHIFTS if other != name and other in scheduler.config), None)


def preset_shift(presets: Mapping[str, Mapping[str, Any]], scheduler: SchedulerMixin | None) -> float | None:
    """The shift of the scheduler to which presets belong: that of the presets if all agree, else of `scheduler`."""
    shifts = {preset["flow_shift"] for preset in presets.values() if "flow_shift" in preset}
    if len(shifts) == 1:
        return shifts.pop()
    return None if scheduler is None else scheduler_shift(scheduler)


def chosen_shift(scheduler: SchedulerMixin, preset_scheduler_shift: float | None) -> float | None:
    """
    The shift that the caller chose by changing or replacing the scheduler; `None` if presets decide.

    Args:
        scheduler: scheduler of the pipeline.
        preset_scheduler_shift: shift of the scheduler to which the presets belong, see [`preset_shift`].
    """
    shift = scheduler_shift(scheduler)
    return None if shift == preset_scheduler_shift else shift


def prepare_scheduler(
    scheduler: SchedulerMixin, num_inference_steps: int, flow_shift: float, device: torch.device | None = None
) -> SchedulerMixin:
    """
    Copy a scheduler and set the timesteps of the copy; `scheduler` itself is not changed.

    The sigmas are those of the authors' code if `set_timesteps` accepts sigmas.
    """
    check_scheduler(scheduler)
    shift = {name: flow_shift for name in [_shift_name(scheduler)] if name is not None}
    own = type(scheduler).from_config(scheduler.config, **shift)
    if "sigmas" in inspect.signature(own.set_timesteps).parameters:
        own.set_timesteps(sigmas=sampling_sigmas(num_inference_steps), device=device)
    else:
        own.set_timesteps(num_inference_steps, device=device)
    return own


def _shift_name(scheduler: SchedulerMixin) -> str | None:
    parameters = inspect.signature(type(scheduler).__init__).parameters
    return next((name for name in _SHIFTS if name in parameters), None)


__all__ = ["check_scheduler", "chosen_shift", "prepare_scheduler", "preset_shift", "scheduler_shift"]
