"""Checks of the numbers and tensors of a request before the work, and of computed values for NaN and infinity."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from transformers import LogitsProcessor

from ..utils.modules import dtype_name

# Numbers of a generation: whether they must be integers, the minimum, and whether the minimum itself is allowed.
NUMBERS: dict[str, tuple[bool, float, bool]] = {
    "height": (True, 1, True),
    "width": (True, 1, True),
    "num_frames": (True, 1, True),
    "fps": (False, 0, False),
    "window_frames": (True, 1, True),
    "window_overlap": (True, 1, True),
    "num_inference_steps": (True, 1, True),
    "guidance_scale": (False, 0, True),
    "source_guidance_scale": (False, 0, True),
    "flow_shift": (False, 0, False),
    "num_videos_per_prompt": (True, 1, True),
    "frame_stride": (True, 1, True),
    "temperature": (False, 0, True),
    "max_new_tokens": (True, 1, True),
    "max_sequence_length": (True, 1, True),
    "max_context_length": (True, 1, True),
    "scale": (False, -math.inf, False),  # scale of LoRA, in `attention_kwargs`
}

Result = TypeVar("Result", torch.Tensor, list[torch.Tensor])


class NotFiniteError(ValueError):
    """A component of the model computed NaN or infinite values from finite values."""


def check_number(name: str, value: Any) -> int | float:
    """
    Check a number and convert it to a Python number. Numbers of numpy are allowed, booleans and strings are not.

    Args:
        name: name of the argument, a key of `NUMBERS`.
        value: value from the caller.

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
    """Check all numbers that are not `None`, see [`check_number`]; for `None` the preset is used."""
    return {name: None if value is None else check_number(name, value) for name, value in numbers.items()}


def check_tensors(**tensors: torch.Tensor | Sequence[torch.Tensor] | None) -> None:
    """
    Refuse tensors of the caller that are not floating point tensors or contain NaN or infinite values.

    Args:
        tensors: tensors by argument name; each is a tensor, a list with one tensor per prompt, or `None`.

    Raises:
        ValueError: for such a tensor; the message names the argument.
    """
    for name, given in tensors.items():
        for tensor in () if given is None else [given] if isinstance(given, torch.Tensor) else given:
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise ValueError(f"`{name}` must be a floating point tensor or a list of them, got {kind}.")
            bad = _not_finite(tensor)
            if bad:
                raise ValueError(
                    f"`{name}` contains {bad} NaN or infinite values of {tensor.numel()}, which would make every "
                    "frame black: check the code that computed it."
                )


def check_result(result: Result, part: str) -> Result:
    """
    Return a result if all its values are finite.

    Args:
        result: tensor or tensors that a component computed.
        part: name of the component for the message, such as "The VAE's decoder".

    Raises:
        NotFiniteError: for NaN or infinite values.
    """
    tensors = [result] if isinstance(result, torch.Tensor) else list(result)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        bad, total = sum(map(_not_finite, tensors)), sum(tensor.numel() for tensor in tensors)
        formats = ", ".join(sorted({dtype_name(tensor.dtype) for tensor in tensors}))
        raise NotFiniteError(
            f"{part} computed {bad} NaN or infinite values of {total} ({formats}) from finite ones, which would make "
            "every frame black. float16 overflows easily: load this component in bfloat16 or float32. If it is not "
            "float16, its weights or a LoRA are damaged."
        )
    return result


class FiniteLogits(LogitsProcessor):
    """Ends an answer whose logits are not finite, from which any token could come."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`scores` as they are; those of tokens that are ruled out are -inf, so the largest of each row counts."""
        if not bool(torch.isfinite(scores.amax(dim=-1)).all()):
            dtype = dtype_name(scores.dtype)
            raise NotFiniteError(
                f"The MLLM computed logits that are NaN or infinite ({dtype}) after "
                f"{input_ids.shape[1]} tokens: its answer would be any text. Values overflow easily in float16: load "
                "the MLLM in bfloat16 or float32. Otherwise its weights, or a LoRA, are damaged."
            )
        return scores


class FiniteSteps:
    """Records after every denoising step whether the latents are finite, without waiting for the device."""

    def __init__(self) -> None:
        self._flags: list[tuple[int, str, torch.Tensor]] = []

    def add(self, step: int, latents: torch.Tensor, changed_by: str = "the decoder") -> None:
        """
        Record the latents of a step.

        Args:
            step: number of the step, from 0.
            latents: latents after the step.
            changed_by: component that changed them last, for the message.
        """
        self._flags.append((step, changed_by, torch.isfinite(latents).all()))

    def check(self, num_steps: int) -> None:
        """Raise a [`NotFiniteError`] that names the first step after which latents were not finite."""
        if not self._flags or bool(torch.stack([flag for *_, flag in self._flags]).all()):
            return
        step, part, _ = next(entry for entry in self._flags if not bool(entry[2]))
        raise NotFiniteError(
            f"{part[0].upper()}{part[1:]} made the latents NaN or infinite in step {step + 1} of {num_steps}, which "
            "would make every frame black. float16 overflows easily: load the decoder in bfloat16 or float32. If it "
            "is not float16, check `guidance_scale`, the scale of a LoRA, and the changes of a callback."
        )


def _not_finite(tensor: torch.Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())


__all__ = [
    "NUMBERS",
    "FiniteLogits",
    "FiniteSteps",
    "NotFiniteError",
    "check_number",
    "check_numbers",
    "check_result",
    "check_tensors",
]
