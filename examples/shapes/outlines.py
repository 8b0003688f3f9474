"""
Things that are no circle, square or triangle, for training alone.

A model that sees a colour with two of three shapes only takes the colour for one of the two, and the third shape for
another colour. Things without a name come in every colour.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from omni_video_hf.shapes.scene import SIZES, Outline, Scene


def any_outline(rng: np.random.Generator, scene: Scene) -> Outline:
    """A bar, cross, flower or half disc of the scene's size, turned as it comes, for [`render`]."""
    depth = (_bar, _cross, _flower, _half_disc)[rng.integers(4)]
    return partial(_turned, depth, SIZES[scene.size], rng.uniform(0, 2 * np.pi), rng.random())


def _turned(
    depth: Callable[..., np.ndarray], radius: float, angle: float, form: float, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """What a thing covers, one pixel of its edge smooth; `form` in 0..1 is how wide or many its parts are."""
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return (depth(radius, form, u, v) + 0.5).clip(0, 1)


def _bar(radius: float, form: float, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    half_width = 0.2 + 0.2 * form
    half_length = (1 - half_width**2) ** 0.5  # its corners are on the circle
    return np.minimum(radius * half_length - np.abs(u), radius * half_width - np.abs(v))


def _cross(radius: float, form: float, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(_bar(radius, form, u, v), _bar(radius, form, v, u))


def _flower(radius: float, form: float, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    petals = 4 + int(3 * form)
    return radius * (0.62 + 0.38 * np.cos(petals * np.arctan2(v, u))) - np.hypot(u, v)


def _half_disc(radius: float, form: float, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(radius - np.hypot(u, v), u + radius * (0.4 * form - 0.1))


__all__ = ["any_outline"]
