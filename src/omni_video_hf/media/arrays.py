"""Conversion of arrays and tensors of any layout and range to 8-bit RGB."""

import numpy as np
import torch

from .animation import over_background
from .download import MediaError


def to_uint8_rgb(values: np.ndarray | torch.Tensor, name: str, ndim: int) -> np.ndarray:
    """
    Convert an array or tensor to uint8 RGB with channels last.

    Args:
        values: channels first or last, or no channels; uint8, or float in 0..1.
        name: `image` or `video`, for messages.
        ndim: number of dimensions without the channels.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float().numpy() if values.is_floating_point() else values.numpy()
    array = values
    shape = tuple(array.shape)
    if array.ndim == ndim:
        array = array[..., None]
    elif array.ndim == ndim + 1 and array.shape[-1] not in (1, 3, 4) and array.shape[ndim - 2] in (1, 3, 4):
        array = np.moveaxis(array, ndim - 2, -1)
    if array.ndim != ndim + 1 or array.shape[-1] not in (1, 3, 4) or 0 in shape:
        raise MediaError(f"The {name} has shape {shape}; it must have height, width and 1, 3 or 4 channels.")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min() < -1e-3 or array.max() > 1 + 1e-3:
            raise MediaError(
                f"The {name} has float values from {array.min():.3g} to {array.max():.3g}; they must be finite and in "
                "0..1."
            )
        array = (array.clip(0, 1) * 255).round().astype(np.uint8)
    elif array.dtype != np.uint8:
        raise MediaError(f"The {name} has values of type {array.dtype}; they must be uint8, or float in 0..1.")
    if array.shape[-1] == 4:
        return over_background(array)
    return np.ascontiguousarray(np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array)
