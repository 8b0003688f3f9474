"""Checks of the numbers and tensors of a request, before any work is done, and of what the parts compute from them."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

import torch

from ..utils.modules import dtype_name

# Numbers of a generation: whether they are whole, the least value, and whether that value itself is allowed.
NUMBERS: dict[str, tuple[bool, float, bool]] = {
    "height": (True, 1, True),
    "width": (True, 1, True),
    "num_frames": (True, 1, True),
    "fps": (False, 0, False),
    "num_inference_steps": (True, 1, True),
    "guidance_scale": (False, 0, True),
    "flow_shift": (False, 0, False),
    "num_videos_per_prompt": (True, 1, True),
    "max_new_tokens": (True, 1, True),
    "max_sequence_length": (True, 1, True),
    "max_context_length": (True, 1, True),
    "scale": (False, -math.inf, False),  # of LoRA, in `attention_kwargs`
}

Result = TypeVar("Result", torch.Tensor, list[torch.Tensor])


class NotFiniteError(ValueError):
    """A part of the model computed NaN or infinite values from finite ones."""


def check_number(name: str, value: Any) -> int | float:
    """
    A number of a generation as Python's own; numpy's are taken, booleans and strings are not.

    Args:
        name: one of `NUMBERS`.
        value: what the caller passed.

    Raises:
        ValueError: for another type, NaN, infinity, and values out of range.
    """
    whole, least, included = NUMBERS[name]
    allowed = "a whole number" if whole else "a finite number"
    if math.isfinite(least):
        allowed += f" {'of at least' if included else 'greater than'} {least}"
    kind: Any = Integral if whole else Real
    if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")
    if value < least or (value == least and not included):
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")
    if isinstance(value, (int, float)) and type(value) in (int, float):
        return value
    return int(value) if whole else float(value)


def check_numbers(**numbers: Any) -> dict[str, int | float | None]:
    """Check those of the numbers that are given, see [`check_number`]; `None` means that the preset decides."""
    return {name: None if value is None else check_number(name, value) for name, value in numbers.items()}


def check_tensors(**tensors: torch.Tensor | Sequence[torch.Tensor] | None) -> None:
    """
    Refuse tensors of the caller that are no floating point tensors or hold NaN or infinite values.

    Args:
        tensors: by argument; each a tensor, a list with one per prompt, or `None`.
    """
    for name, given in tensors.items():
        for tensor in () if given is None else [given] if isinstance(given, torch.Tensor) else given:
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise ValueError(f"`{name}` must be a floating point tensor or a list of them, got {kind}.")
            bad = _not_finite(tensor)
            if bad:
                raise ValueError(
                    f"`{name}` holds {bad} values of {tensor.numel()} that are NaN or infinite: every frame would be "
                    "black. Look at where it was computed."
                )


def check_result(result: Result, part: str) -> Result:
    """
    Refuse a result that is not finite, and return it otherwise.

    Args:
        result: what a part of the model computed.
        part: the part, for the message, such as "The VAE's decoder".
    """
    tensors = [result] if isinstance(result, torch.Tensor) else list(result)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        bad, total = sum(map(_not_finite, tensors)), sum(tensor.numel() for tensor in tensors)
        formats = ", ".join(sorted({dtype_name(tensor.dtype) for tensor in tensors}))
        raise NotFiniteError(
            f"{part} computed {bad} values of {total} that are NaN or infinite ({formats}), from finite ones: every "
            "frame would be black. Values overflow easily in float16: load the part in bfloat16 or float32. Otherwise "
            "its weights, or a LoRA, are damaged."
        )
    return result


class FiniteSteps:
    """Notes after every denoising step whether the latents are finite, without waiting for the device."""

    def __init__(self) -> None:
        self._flags: list[tuple[int, str, torch.Tensor]] = []

    def add(self, step: int, latents: torch.Tensor, changed_by: str = "the decoder") -> None:
        """
        Args:
            step: number of the step, from 0.
            latents: after it.
            changed_by: what changed them last, for the message.
        """
        self._flags.append((step, changed_by, torch.isfinite(latents).all()))

    def check(self, num_steps: int) -> None:
        """Refuse latents that are not finite, by the first step after which they were not."""
        if not self._flags or bool(torch.stack([flag for *_, flag in self._flags]).all()):
            return
        step, part, _ = next(entry for entry in self._flags if not bool(entry[2]))
        raise NotFiniteError(
            f"{part[0].upper()}{part[1:]} made the latents NaN or infinite in step {step + 1} of {num_steps}: every "
            "frame would be black. Values overflow easily in float16: load the decoder in bfloat16 or float32. "
            "Otherwise look at `guidance_scale`, at a LoRA's scale, and at what a callback changes."
        )


def _not_finite(tensor: torch.Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())


__all__ = [
    "NUMBERS",
    "FiniteSteps",
    "NotFiniteError",
    "check_number",
    "check_numbers",
    "check_result",
    "check_tensors",
]
