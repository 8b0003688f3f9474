"""
What an edit kept: the place of the shape, everything around it, and the attributes that nobody asked to change.

An edit is compared with the rendered target, which differs from the source in what was asked for only.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..media.video_loading import load_video
from .dataset import Example
from .judge import find_centers, read_scene
from .scene import SIDE, SIZES, Scene, depth, render

MAX_DISTANCE = 2.0  # pixels between a frame's shape and the target's, in an edit that keeps the place
MAX_OUTSIDE_ERROR = 4.0  # of 255, mean absolute difference of the pixels outside both shapes
OUTLINE = 2.0  # pixels around both shapes that are left out: antialiasing, and the blur of a VAE


@dataclass(frozen=True)
class EditReading:
    """
    One edit compared with its target.

    Args:
        asked: the attribute that was to change.
        right: of each attribute (motion of clips only), whether it is read as the target's.
        distances: pixels from the shape's centre to the target's, one per frame; infinite where no shape is found.
        outside_error: mean absolute difference from the target outside of the shapes of source and target, in 0..255.
    """

    asked: str
    right: dict[str, bool]
    distances: tuple[float, ...]
    outside_error: float

    @property
    def verdicts(self) -> dict[str, bool]:
        """
        Every verdict by name; `"all"` is "everything kept", all of them together.

        `"attributes right"` (`"changed"` and `"attributes kept"`) was the whole score before places were measured.
        """
        changed = self.right[self.asked]
        kept = all(right for name, right in self.right.items() if name != self.asked)
        place = max(self.distances) <= MAX_DISTANCE
        outside = self.outside_error <= MAX_OUTSIDE_ERROR
        return {
            "changed": changed,
            "attributes kept": kept,
            "attributes right": changed and kept,
            "place kept": place,
            "outside kept": outside,
            f"changed {self.asked}": changed,
            "all": changed and kept and place and outside,
        }


def read_edit(example: Example, frames: Any, target: np.ndarray | None = None, wider: float = 0.0) -> EditReading:
    """
    Compare an edit with its target.

    Args:
        example: an edit.
        frames: what was generated, as in [`read_scene`].
        target: its rendered target, uint8 `[frames, 64, 64, 3]`; by default what the data set renders.
        wider: by how many pixels the shapes of source and target are wider than their sizes say (see
            [`shapes.other_renderer`]).

    Raises:
        ValueError: unless the example is an edit, and `frames` as many as its target's.
    """
    if example.source is None or example.target is None or example.attribute is None:
        raise ValueError(f"`example` must be an edit, got one of task {example.task!r}.")
    generated = _frames(frames)
    if target is None:
        target = render(example.target, example.num_frames)
    if len(generated) != len(target):
        expected = "one image" if example.kind == "image" else f"a clip of {len(target)} frames"
        raise ValueError(f"`frames` must be {expected}, got {len(generated)}.")
    reading = read_scene(generated).right(example.target)  # refuses other sizes of frames
    right = {name: value for name, value in reading.items() if example.kind == "video" or name != "motion"}
    outside = ~(_reach(example.source, len(target), wider) | _reach(example.target, len(target), wider))
    error = np.abs(generated.astype(np.float32) - target)[outside].mean()
    distances = _distances(find_centers(generated), find_centers(target))
    return EditReading(example.attribute, right, tuple(distances.tolist()), float(error))


def _reach(scene: Scene, num_frames: int, wider: float) -> np.ndarray:
    """The pixels `[num_frames, 64, 64]` within `OUTLINE` of a scene's shape."""
    pixels = np.arange(SIDE) + 0.5
    x, y = (pixels - scene.centers(num_frames)[:, axis, None] for axis in (0, 1))
    return depth(scene.shape, SIZES[scene.size] + wider / 2, x[:, None, :], y[:, :, None]) >= -OUTLINE


def _distances(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Distance of `[frames, 2]`; where nothing was found it is infinite."""
    if not np.isfinite(wanted).all():
        raise ValueError("`target` must show one shape in every frame, found a frame without.")
    return np.linalg.norm(found - wanted, axis=1)


def _frames(clip: Any) -> np.ndarray:
    """uint8 `[frames, height, width, 3]` of a clip or of one image."""
    return load_video([clip] if getattr(clip, "ndim", 4) == 3 else clip).frames


def psnr(frames: Any, reference: Any) -> float:
    """
    Peak signal-to-noise ratio of a clip or image against another, in dB; infinite where they are equal.

    To see what an edit keeps of any clip, let the instruction ask for nothing new and take the source as reference:

        clip = load_video("clip.mp4").frames  # as many frames, and as large, as the model generates
        edited = pipe("make the background black", video=clip, task="v2v", output_type="np").frames[0]
        psnr(edited, clip)

    Args:
        frames, reference: as in [`load_video`], or one image `[height, width, 3]`; of equal sizes.

    Raises:
        ValueError: for different numbers of frames, or different sizes.
    """
    pair = [_frames(clip).astype(np.float64) for clip in (frames, reference)]
    if pair[0].shape != pair[1].shape:
        sizes = ["{0} frames of {2}x{1}".format(*clip.shape) for clip in pair]
        raise ValueError(f"`frames` must have the size of `reference`, {sizes[1]}, got {sizes[0]}.")
    error = ((pair[0] - pair[1]) ** 2).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


__all__ = ["EditReading", "psnr", "read_edit"]
