"""Scenes of Omni-Video Shapes: one anti-aliased shape on a plain background, standing still or moving steadily."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

SIDE = 64  # pixels, both ways
NUM_FRAMES = 17
FPS = 8
TRAVEL = 24.0  # pixels from the first frame to the last
MARGIN = 2.0  # pixels of background that stay visible on every side

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 190),
    "orange": (245, 140, 40),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128)}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 8.0, "large": 13.0}  # radius in pixels: half the side of the box that the shape fills
MOTIONS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y downwards

# What a scene can be asked for, and the values there are.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "background": tuple(BACKGROUNDS),
    "motion": tuple(MOTIONS),
}
# How much of the pixels around (x, y), from the middle of a shape's box, something covers, 0..1.
Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]
# (color, shape) that no training example shows or names: the test of composition.
HELD_OUT = frozenset({("red", "triangle"), ("blue", "square"), ("green", "circle")})


@dataclass(frozen=True)
class Scene:
    """
    One shape on a background.

    Args:
        color, shape, size, background, motion: one of [`ATTRIBUTES`] each.
        center: (x, y) of the middle of the shape's box halfway through the clip, in pixels from the upper left corner.

    Raises:
        ValueError: for an unknown value, or a shape that comes closer than `MARGIN` to the frame's edge.

    Example:
        >>> from omni_video_hf.shapes import Scene
        >>> scene = Scene("red", "circle", "large", "white", motion="right")
        >>> scene.is_held_out
        False
    """

    color: str
    shape: str
    size: str
    background: str
    motion: str = "still"
    center: tuple[float, float] = (SIDE / 2, SIDE / 2)

    def __post_init__(self) -> None:
        for name, values in ATTRIBUTES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` must be one of {', '.join(values)}, got {getattr(self, name)!r}.")
        for axis, place, (low, high) in zip("xy", self.center, room(self.size, self.motion), strict=True):
            if not low <= place <= high:
                raise ValueError(
                    f"`center` has {axis}={place:g}: a {self.size} shape ({self.motion}) leaves the frame unless "
                    f"{axis} is in {low:g}..{high:g}."
                )

    @property
    def is_held_out(self) -> bool:
        """Whether this colour of this shape is never trained on."""
        return (self.color, self.shape) in HELD_OUT

    def centers(self, num_frames: int = NUM_FRAMES) -> np.ndarray:
        """
        (x, y) of the box's middle in every frame, float64 `[num_frames, 2]`; a single frame is the middle one.

        Example:
            >>> from omni_video_hf.shapes import Scene
            >>> scene = Scene("red", "circle", "large", "white", motion="right")
            >>> scene.centers(num_frames=1).tolist()
            [[32.0, 32.0]]
        """
        path = np.linspace(-0.5, 0.5, num_frames) if num_frames > 1 else np.zeros(1)
        return np.asarray(self.center) + path[:, None] * TRAVEL * np.asarray(MOTIONS[self.motion])


def room(size: str, motion: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Lowest and highest `center` along x and along y with which such a scene stays inside the frame."""
    edges = [MARGIN + SIZES[size] + abs(step) * TRAVEL / 2 for step in MOTIONS[motion]]
    return (edges[0], SIDE - edges[0]), (edges[1], SIDE - edges[1])


def depth(shape: str, radius: np.ndarray | float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """
    How far inside a shape's nearest side points lie, in pixels; negative outside.

    Every shape fills a box of twice its radius: the circle touches its sides, the square is the box, the triangle
    points up from its lower side.

    Args:
        shape: one of [`SHAPES`].
        radius: pixels.
        x, y: pixels from the middle of the box, y downwards; they broadcast against each other and the radius.
    """
    if shape == "circle":
        return radius - np.sqrt(x * x + y * y)
    if shape == "square":
        return np.minimum(radius - np.abs(x), radius - np.abs(y))
    if shape == "triangle":
        return np.minimum((radius + y - 2 * np.abs(x)) / np.sqrt(5), radius - y)
    raise ValueError(f"`shape` must be one of {', '.join(SHAPES)}, got {shape!r}.")


def coverage(shape: str, radius: np.ndarray | float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How much of the pixels around (x, y) a shape covers, 0..1; arguments as in [`depth`]."""
    if shape == "square":  # the exact share, corners included
        return (radius + 0.5 - np.abs(x)).clip(0, 1) * (radius + 0.5 - np.abs(y)).clip(0, 1)
    return (depth(shape, radius, x, y) + 0.5).clip(0, 1)


def render(
    scene: Scene,
    num_frames: int = NUM_FRAMES,
    color: Sequence[int] | None = None,
    background: Sequence[int] | None = None,
    outline: Outline | None = None,
) -> np.ndarray:
    """
    Draw a scene: a clip, or with `num_frames=1` its middle frame as an image.

    Only a window around the shape is computed, and colours are looked up among 256 mixtures of the two.

    Args:
        scene: what to draw.
        num_frames: at least 1.
        color, background: RGB in 0..255 to draw with in place of the scene's.
        outline: what to draw in place of the scene's shape; nothing of it is drawn outside the shape's box.

    Returns:
        uint8 `[num_frames, 64, 64, 3]`, RGB.

    Example:
        >>> from omni_video_hf.shapes import Scene, render
        >>> scene = Scene("red", "circle", "large", "white", motion="right")
        >>> render(scene, num_frames=9).shape
        (9, 64, 64, 3)
    """
    if num_frames < 1:
        raise ValueError(f"`num_frames` must be at least 1, got {num_frames}.")
    behind = np.array(BACKGROUNDS[scene.background] if background is None else background)
    difference = np.array(COLORS[scene.color] if color is None else color) - behind
    mixtures = np.rint(behind + np.linspace(0, 1, 256)[:, None] * difference).astype(np.uint8)

    frames = np.empty((num_frames, SIDE, SIDE, 3), np.uint8)
    frames.reshape(-1, SIDE * 3)[:] = np.tile(mixtures[0], SIDE)
    drawn = 1 if scene.motion == "still" else num_frames
    radius, centers = SIZES[scene.size], scene.centers(num_frames)[:drawn]
    reach = int(radius) + 1
    corners = np.floor(centers).astype(int) - reach
    steps = np.arange(2 * reach + 1) + 0.5
    x, y = ((corners[:, axis, None] + steps - centers[:, axis, None]).astype(np.float32) for axis in (0, 1))
    x, y = x[:, None, :], y[:, :, None]
    shares = coverage(scene.shape, np.asarray(radius, np.float32), x, y) if outline is None else outline(x, y)
    windows = mixtures[(shares * 255 + 0.5).astype(np.uint8)]
    for frame, window, (left, top) in zip(frames, windows, corners.tolist(), strict=False):
        frame[top : top + len(steps), left : left + len(steps)] = window
    frames[drawn:] = frames[0]
    return frames


__all__ = [
    "ATTRIBUTES",
    "BACKGROUNDS",
    "COLORS",
    "FPS",
    "HELD_OUT",
    "MARGIN",
    "MOTIONS",
    "NUM_FRAMES",
    "SHAPES",
    "SIDE",
    "SIZES",
    "TRAVEL",
    "Outline",
    "Scene",
    "coverage",
    "depth",
    "render",
    "room",
]
