"""Schedulers: checks that a scheduler fits the model, the choice of its shift, and a copy for every call."""

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin

from ..diffusion.flow_matching import NUM_TRAIN_TIMESTEPS, sampling_sigmas

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


def check_schedule(
    scheduler: SchedulerMixin | None,
    num_inference_steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
) -> int | None:
    """
    Check the sigmas or timesteps of a call.

    Args:
        scheduler: scheduler of the pipeline.
        num_inference_steps: number of steps of the call; may be left out when there are sigmas or timesteps.
        sigmas: noise levels of the steps before the scheduler's shift, descending, greater than 0 and at most 1.
        timesteps: timesteps of the steps as the decoder gets them, descending, greater than 0 and at most 1000.

    Returns:
        The number of steps; `None` when the preset decides.

    Raises:
        ValueError: for both of them, values out of range or order, another number of steps, or a scheduler that
            accepts no sigmas.
    """
    if sigmas is not None and timesteps is not None:
        raise ValueError("`sigmas` and `timesteps` both say at which noise levels the steps are: pass one of them.")
    name, given, limit = ("sigmas", sigmas, 1) if timesteps is None else ("timesteps", timesteps, NUM_TRAIN_TIMESTEPS)
    if given is None:
        return num_inference_steps
    try:
        values = [float(value) for value in given]
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must be a list of numbers, got {given!r}.") from error
    descending = all(first > second for first, second in itertools.pairwise(values))
    if not values or not descending or not (values[0] <= limit and values[-1] > 0):
        raise ValueError(
            f"`{name}` must be descending numbers, the first at most {limit} and the last greater than 0, got "
            f"{values}. The end, 0, is not one of them."
        )
    if num_inference_steps not in (None, len(values)):
        raise ValueError(
            f"`num_inference_steps` is {num_inference_steps}, but `{name}` has {len(values)} values, one per step: "
            "leave `num_inference_steps` out."
        )
    if scheduler is not None and "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(
            f"`{name}` needs a scheduler that accepts sigmas; {type(scheduler).__name__} does not. Use e.g. "
            "UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler or FlowMatchLCMScheduler."
        )
    return len(values)


def given_levels(sigmas: Sequence[float] | None, timesteps: Sequence[float] | None) -> dict[str, list[float]]:
    """The noise levels that a call gave, by the name of the argument, as plain numbers for a record."""
    given = {"sigmas": sigmas, "timesteps": timesteps}
    return {name: [float(value) for value in values] for name, values in given.items() if values is not None}


def prepare_scheduler(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    flow_shift: float,
    device: torch.device | None = None,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
) -> SchedulerMixin:
    """
    Copy a scheduler and set the timesteps of the copy; `scheduler` itself is not changed.

    Without `sigmas` and `timesteps`, see [`check_schedule`], the sigmas are those of the authors' code if
    `set_timesteps` accepts sigmas. The scheduler shifts sigmas, but not timesteps.
    """
    check_scheduler(scheduler)
    check_schedule(scheduler, num_inference_steps, sigmas, timesteps)
    shift = {name: flow_shift for name in [_shift_name(scheduler)] if name is not None}
    own = type(scheduler).from_config(scheduler.config, **shift)
    if "sigmas" not in inspect.signature(own.set_timesteps).parameters:
        own.set_timesteps(num_inference_steps, device=device)
        return own
    levels = sampling_sigmas(num_inference_steps)
    if timesteps is not None:
        shifted = np.asarray([float(value) for value in timesteps]) / NUM_TRAIN_TIMESTEPS
        levels = shifted / (flow_shift - (flow_shift - 1) * shifted)  # which the scheduler's shift undoes
    elif sigmas is not None:
        levels = np.asarray([float(value) for value in sigmas])
    own.set_timesteps(sigmas=levels, device=device)
    if timesteps is not None:  # some schedulers round down to whole numbers
        own.timesteps = torch.tensor([float(value) for value in timesteps], device=device)
    return own


def _shift_name(scheduler: SchedulerMixin) -> str | None:
    parameters = inspect.signature(type(scheduler).__init__).parameters
    return next((name for name in _SHIFTS if name in parameters), None)


__all__ = [
    "check_schedule",
    "check_scheduler",
    "chosen_shift",
    "given_levels",
    "prepare_scheduler",
    "preset_shift",
    "scheduler_shift",
]
