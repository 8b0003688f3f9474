"""
A second renderer of scenes, of another program: PIL draws them enlarged, and its resampling makes them smaller again.

Edges, antialiasing and sizes differ from [`scene.render`], which all training examples come from: shapes are `WIDER`
pixels wider and higher, so they also come a pixel nearer to the frame's edge than any of training.
"""

import numpy as np
from PIL import Image, ImageDraw

from .scene import BACKGROUNDS, COLORS, NUM_FRAMES, SIDE, SIZES, Scene

WIDER = 2.0  # pixels, of both sides of a shape's box; the judge still reads the size
SUPERSAMPLING = 8


def render_otherwise(scene: Scene, num_frames: int = NUM_FRAMES) -> np.ndarray:
    """
    Draw a scene with PIL.

    Returns:
        uint8 `[num_frames, 64, 64, 3]`, RGB.
    """
    return np.stack([_frame(scene, x, y) for x, y in scene.centers(num_frames).tolist()])


def _frame(scene: Scene, x: float, y: float) -> np.ndarray:
    picture = Image.new("RGB", (SIDE * SUPERSAMPLING,) * 2, BACKGROUNDS[scene.background])
    draw, color, radius = ImageDraw.Draw(picture), COLORS[scene.color], SIZES[scene.size] + WIDER / 2
    left, top, right, bottom = (SUPERSAMPLING * side for side in (x - radius, y - radius, x + radius, y + radius))
    # The last pixel of PIL's boxes belongs to them.
    if scene.shape == "circle":
        draw.ellipse((left, top, right - 1, bottom - 1), color)
    elif scene.shape == "square":
        draw.rectangle((left, top, right - 1, bottom - 1), color)
    else:
        draw.polygon([(left, bottom - 1), (right - 1, bottom - 1), ((left + right - 1) / 2, top)], color)
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


__all__ = ["WIDER", "render_otherwise"]
