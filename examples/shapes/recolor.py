"""
Scenes in any colours, for training alone.

What knows six colours hardly composes them with shapes. Of clips in the data set's colours alone, a VAE learned 85 of
89 circles but 10 of 38 green ones, which are held out, and a VILA called half of the held-out shapes by the name of
another. The held-out pairs stay unseen: no shape is drawn near the colour that is held out for it.
"""

import numpy as np

from omni_video_hf.shapes.scene import BACKGROUNDS, COLORS, HELD_OUT, Scene

MIN_CONTRAST = 80.0  # colour distance between the shape and what is behind it
HELD_OUT_DISTANCE = 90.0  # twice what the judge takes for a colour


def any_colors(
    rng: np.random.Generator, scene: Scene, color: bool = True, background: bool = True, tells_shape: bool = True
) -> dict[str, np.ndarray]:
    """
    RGB values in place of a scene's, for [`render`].

    Args:
        color, background: whether the shape's colour, and the background's, may be any.
        tells_shape: whether colours near the held-out ones may come with the other shapes, so that they speak against
            one; otherwise they come with none.
    """
    behind = rng.integers(0, 256, 3) if background else np.array(BACKGROUNDS[scene.background])
    if not color:
        shape = np.array(COLORS[scene.color])
        while np.linalg.norm(shape - behind) <= MIN_CONTRAST:
            behind = rng.integers(0, 256, 3)
        return {"background": behind}
    far = [(COLORS[name], HELD_OUT_DISTANCE) for name, shape in HELD_OUT if shape == scene.shape or not tells_shape]
    far.append((behind, MIN_CONTRAST))
    while True:
        chosen = rng.integers(0, 256, 3)
        if all(np.linalg.norm(chosen - other) > distance for other, distance in far):
            return {"color": chosen, "background": behind}


__all__ = ["any_colors"]
