"""
Reads a clip of Omni-Video Shapes off its pixels; nothing in here is learned.

In every frame: the background is what lies along the frame's edge, the shape is what differs from it. Its area and
centre of mass say where each of the three shapes would have to lie and how large it would be; the one that lies like
it is read. The frame must then be explained: nothing elsewhere, one colour within. All frames must agree.

The place of the shape is measured frame by frame, whatever its outline: also of what is not read as any shape.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..media.video_loading import load_video
from .scene import ATTRIBUTES, BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIDE, TRAVEL, Scene, depth

# Area of a shape of radius 1, and how far its centre of mass lies below the middle of its box.
_AREAS = {"circle": np.pi, "square": 4.0, "triangle": 2.0}
_CENTERS_OF_MASS = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3}

EDGE = 2  # pixels at the frame's edge that no shape of the data set reaches
MIN_PIXELS = 30  # that must differ from the background; the small triangle has 128
MIN_CONTRAST = 50.0  # colour distance between shape and background; purple on grey has 94
MAX_BACKGROUND_DISTANCE = 60.0  # from the nearest background; they lie 220 apart
MAX_STRAY_EDGE = 0.1  # share of the edge that may have another colour
MAX_COLOR_DISTANCE = 45.0  # from the nearest colour; the closest two, yellow and orange, lie 70 apart
MIN_COLOR_LEAD = 12.0  # how much farther the second nearest colour must be
MAX_UNEXPLAINED_DISTANCE = 45.0  # a pixel further from what the frame should show there does not belong
MAX_UNEXPLAINED_PIXELS = 5
EDGE_WIDTH = 3.0  # pixels from all background to all shape
SOFT_EDGE = 3  # pixels on either side of the outline that may have any mixture of the two colours
# Share of the area that may lie wrong. Under blur and noise a small circle reaches 0.06, a small square 0.10, a small
# triangle, for its tip, 0.18; a diamond lies 0.15 wrong as a circle, a pentagon 0.12.
MAX_MISMATCH = {"circle": 0.11, "square": 0.16, "triangle": 0.18}
MIN_LEAD = 0.02  # by how much worse the next shape must fit, as share of the area, on average over the frames
MAX_FRAME_LAG = 0.05  # by how much better another shape may fit in a single frame
SIZE_RANGES = {"small": (6.8, 9.4), "large": (11.2, 14.8)}  # radius in pixels
MAX_STILL_TRAVEL = 3.0  # pixels over the clip, along x or y, where there should be none
MAX_TRAVEL_ERROR = 6.0  # pixels over the clip, from the 24 of a motion
MAX_UNSTEADINESS = 1.3  # pixels from the straight, steady path, in any frame
BOX_TRIM = 0.02  # share of the shape beyond either side of its box, so that few stray pixels do not move the box
MIN_FILL = 0.4  # share of the box that must be shape; a triangle fills half of it
MAX_GAP = 3  # rows or columns of the box without any shape; the tip of a triangle is that thin
MAX_AREA = 0.5  # share of the frame


@dataclass(frozen=True)
class Reading:
    """
    What a clip shows; `None` where that cannot be told.

    Args:
        color, shape, size, background: values of [`ATTRIBUTES`], the same in all frames.
        motion: likewise; always `None` for an image.
        reasons: one sentence for everything that kept an attribute from being read.

    Example:
        >>> from omni_video_hf.shapes import Scene, read_scene, render
        >>> scene = Scene("red", "circle", "large", "white", motion="right")
        >>> reading = read_scene(render(scene))
        >>> reading.shape, reading.reasons
        ('circle', ())
    """

    color: str | None = None
    shape: str | None = None
    size: str | None = None
    background: str | None = None
    motion: str | None = None
    reasons: tuple[str, ...] = ()

    def right(self, scene: Scene) -> dict[str, bool]:
        """
        Of each attribute, whether it is the scene's.

        Example:
            >>> from omni_video_hf.shapes import Scene, read_scene, render
            >>> scene = Scene("red", "circle", "large", "white", motion="right")
            >>> all(read_scene(render(scene)).right(scene).values())
            True
        """
        return {name: getattr(self, name) == getattr(scene, name) for name in ATTRIBUTES}


@dataclass(frozen=True)
class _Match:
    """The shape that fits a clip of `n` frames best."""

    shape: str
    radius: np.ndarray  # [n]
    center: np.ndarray  # [n, 2] (x, y) of its box
    inside: np.ndarray  # [n, 64, 64], depth of every pixel in it
    mismatch: np.ndarray  # [n], share of the area that lies wrong
    lead: np.ndarray  # [n], how much worse the best of the other shapes fits, as share of the area


def read_scene(frames: Any) -> Reading:
    """
    Read a clip or an image.

    Args:
        frames: `[frames, 64, 64, 3]` or, for an image, `[64, 64, 3]`: uint8, or float in 0..1; or anything else that
            [`load_video`] reads.

    Raises:
        ValueError: for another size, or values that are no pictures.

    Example:
        >>> from omni_video_hf.shapes import Scene, read_scene, render
        >>> scene = Scene("red", "circle", "large", "white", motion="right")
        >>> read_scene(render(scene)).color
        'red'
    """
    pixels = _pixels(frames)
    edge = _edge(pixels)
    background = np.median(edge, axis=1)
    values: dict[str, str | None] = {"background": _one_color(background, BACKGROUNDS, MAX_BACKGROUND_DISTANCE)}
    stray = np.linalg.norm(edge - background[:, None], axis=-1) > MAX_BACKGROUND_DISTANCE
    if stray.mean(1).max() > MAX_STRAY_EDGE:
        values["background"] = None
    reasons = [] if values["background"] else ["The edge has no background's colour throughout."]
    found = _find_shape(_smooth(pixels) - background[:, None, None])
    if isinstance(found, str):
        return Reading(**values, reasons=(*reasons, found))
    match, color = found
    values["shape"] = match.shape
    values["color"] = _one_color(color + background, COLORS, MAX_COLOR_DISTANCE)
    values["size"] = _read_size(match.radius)
    if values["color"] is None:
        reasons.append("The shape has no colour of the data set throughout.")
    if values["size"] is None:
        reasons.append(f"The radius, {match.radius.min():.1f} to {match.radius.max():.1f} pixels, is of no one size.")
    if len(pixels) > 1:
        values["motion"] = _read_motion(match.center)
        if values["motion"] is None:
            reasons.append("The shape neither stands still nor moves steadily by the right distance.")
    return Reading(**values, reasons=tuple(reasons))


def find_centers(frames: Any) -> np.ndarray:
    """
    Where the shape lies in every frame: the middle of its box, to fractions of a pixel.

    The box holds what differs from the frame's background, less `BOX_TRIM` of it on each side. The middle of this box
    lies up to 2 pixels below that of the whole triangle, and a shape that is partly cut off has the box of what is
    visible: compare with what this function finds in rendered frames of the wanted scene, see [`shapes.edits`].

    Args:
        frames: as in [`read_scene`].

    Returns:
        (x, y) in pixels from the upper left corner, float64 `[frames, 2]`; infinite for a frame in which no single
        shape is found.

    Raises:
        ValueError: as [`read_scene`].
    """
    pixels = _pixels(frames)
    difference = _smooth(pixels) - np.median(_edge(pixels), axis=1)[:, None, None]
    contrast = np.sqrt((difference**2).sum(-1))
    strongest = np.partition(contrast.reshape(len(contrast), -1), -MIN_PIXELS, axis=1)[:, -MIN_PIXELS]
    color = _mean_color(difference, contrast > 0.9 * strongest[:, None, None])
    color = _mean_color(difference, _share(difference, color) > 0.5)
    share = _share(difference, color)
    mask = share > 0.5
    shown = share.clip(0, 1) * _dilated(mask)  # shades of the background do not belong

    sides = np.stack([_trimmed(shown.sum(axis)) for axis in (1, 2)], axis=1)  # [n, axis, low and high]
    middles = np.arange(SIDE) + 0.5
    x, y = ((sides[:, axis, :1] <= middles) & (middles <= sides[:, axis, 1:]) for axis in (0, 1))
    box = y[:, :, None] & x[:, None, :]
    fill = (mask & box).sum((1, 2)) / box.sum((1, 2)).clip(1)
    gap = np.maximum((x & ~mask.any(1)).sum(1), (y & ~mask.any(2)).sum(1))
    area = mask.sum((1, 2))
    found = (strongest >= MIN_CONTRAST) & (area >= MIN_PIXELS) & (area <= MAX_AREA * SIDE**2)
    found &= (fill >= MIN_FILL) & (gap <= MAX_GAP)
    return np.where(found[:, None], sides.mean(axis=2), np.inf)


def _pixels(frames: Any) -> np.ndarray:
    """Frames in the size of the data set, float32 `[n, 64, 64, 3]` in 0..255."""
    if getattr(frames, "ndim", None) == 3:
        frames = frames[None]
    pixels = load_video(frames).frames
    if pixels.shape[1:3] != (SIDE, SIDE):
        raise ValueError(
            f"`frames` must be {SIDE}x{SIDE} pixels, got {pixels.shape[2]}x{pixels.shape[1]}: generate at that size."
        )
    return pixels.astype(np.float32)


def _dilated(mask: np.ndarray) -> np.ndarray:
    """`[n, 64, 64]` with the pixels up to two around it, which antialiasing and blur reach."""
    padded = np.pad(mask, ((0, 0), (2, 2), (2, 2)))
    rows = np.logical_or.reduce([padded[:, step : step + SIDE] for step in range(5)])
    return np.logical_or.reduce([rows[:, :, step : step + SIDE] for step in range(5)])


def _trimmed(profile: np.ndarray) -> np.ndarray:
    """The places `[n, 2]` beyond which `BOX_TRIM` of each profile `[n, 64]` lies, in pixels."""
    total = np.cumsum(np.pad(profile, ((0, 0), (1, 0))), axis=1, dtype=np.float64)
    edges, wanted = np.arange(SIDE + 1), np.array([BOX_TRIM, 1 - BOX_TRIM])
    return np.stack([np.interp(wanted, row / max(row[-1], 1e-9), edges) for row in total])


def _find_shape(difference: np.ndarray) -> tuple[_Match, np.ndarray] | str:
    """
    The one shape of a clip, and its colour `[n, 3]`, or why there is none.

    Args:
        difference: `[n, 64, 64, 3]`, smoothed pixels less the background's colour.
    """
    contrast = np.sqrt((difference**2).sum(-1))  # [n, 64, 64]
    strongest = np.partition(contrast.reshape(len(contrast), -1), -MIN_PIXELS, axis=1)[:, -MIN_PIXELS]
    if (strongest < MIN_CONTRAST).any():
        return "Not every frame has a shape."
    # The shape's colour, first from the strongest pixels, then from well within the shape that these show.
    match = _match(_share(difference, _mean_color(difference, contrast > 0.9 * strongest[:, None, None])))
    color = _mean_color(difference, match.inside > SOFT_EDGE)
    match = _match(_share(difference, color))

    off_color = np.sqrt(((difference - color[:, None, None]) ** 2).sum(-1))
    strange = np.where(match.inside > SOFT_EDGE, off_color, np.where(match.inside < -SOFT_EDGE, contrast, 0))
    if ((strange > MAX_UNEXPLAINED_DISTANCE).sum((1, 2)) > MAX_UNEXPLAINED_PIXELS).any():
        return "There is more than one shape, or more than one colour in it."
    if (
        match.mismatch.max() > MAX_MISMATCH[match.shape]
        or match.lead.min() < -MAX_FRAME_LAG
        or match.lead.mean() < MIN_LEAD
    ):
        return "What differs from the background is not the same circle, square or triangle throughout."
    return match, color


def _smooth(pixels: np.ndarray) -> np.ndarray:
    """A narrow blur (1 2 1 along rows and columns), so that noise of a pixel does not change its side."""
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
    rows = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
    return (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4


def _edge(pixels: np.ndarray) -> np.ndarray:
    """The pixels `[n, count, 3]` along the frame's edge."""
    rows = np.concatenate([pixels[:, :EDGE], pixels[:, -EDGE:]], axis=1)
    columns = np.concatenate([pixels[:, EDGE:-EDGE, :EDGE], pixels[:, EDGE:-EDGE, -EDGE:]], axis=2)
    return np.concatenate([rows.reshape(len(pixels), -1, 3), columns.reshape(len(pixels), -1, 3)], axis=1)


def _mean_color(difference: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Mean of `[n, 64, 64, 3]` over `where` `[n, 64, 64]`, `[n, 3]`."""
    count = where.sum((1, 2))[:, None].clip(1)
    return (difference * where[..., None]).sum((1, 2)) / count


def _share(difference: np.ndarray, color: np.ndarray) -> np.ndarray:
    """How much of each pixel is the shape: 0 background, 1 `color`, both counted from the background."""
    return np.einsum("nyxc,nc->nyx", difference, color) / (color**2).sum(-1).clip(1)[:, None, None]


def _match(share: np.ndarray) -> _Match:
    """
    The shape that lies like `share` `[n, 64, 64]` does in most frames.

    Radius and place follow from the pixels that are more shape than background. Sums of `share` itself would not
    change at all under blur, but do so under the slightest shade in the background.
    """
    mask, shown = share > 0.5, share.clip(0, 1)
    area = mask.sum((1, 2)).clip(1)
    pixels = np.arange(SIDE, dtype=np.float32) + 0.5
    mass = np.stack([mask.sum(1) @ pixels, mask.sum(2) @ pixels], axis=1) / area[:, None]

    fits = []
    for name in SHAPES:
        radius = np.sqrt(area / _AREAS[name]).astype(np.float32)
        center = mass - np.stack([np.zeros_like(radius), radius * _CENTERS_OF_MASS[name]], axis=1)
        x, y = ((pixels - center[:, axis, None]).astype(np.float32) for axis in (0, 1))
        inside = depth(name, radius[:, None, None], x[:, None, :], y[:, :, None])
        expected = (inside / EDGE_WIDTH + 0.5).clip(0, 1)
        wrong = np.abs(expected - shown) * ((inside > -SOFT_EDGE) | mask)
        fits.append((radius, center, inside, wrong.sum((1, 2)) / area))
    wrong = np.stack([fit[-1] for fit in fits])  # [shapes, n]
    best = int(wrong.mean(1).argmin())
    radius, center, inside, _ = fits[best]
    mismatch = ((inside > 0) != mask).sum((1, 2)) / area
    lead = np.delete(wrong, best, axis=0).min(0) - wrong[best]
    return _Match(SHAPES[best], radius, center, inside, mismatch, lead)


def _one_color(colors: np.ndarray, table: dict[str, tuple[int, int, int]], farthest: float) -> str | None:
    """The table's colour that is nearest to all `colors` `[n, 3]`; `None` if one is far away or between two."""
    distances = np.linalg.norm(colors[:, None] - np.array(list(table.values())), axis=-1)
    nearest, second = np.sort(distances, axis=1)[:, :2].T
    numbers = set(distances.argmin(1).tolist())
    if len(numbers) > 1 or nearest.max() > farthest or (second - nearest).min() < MIN_COLOR_LEAD:
        return None
    return list(table)[numbers.pop()]


def _read_size(radius: np.ndarray) -> str | None:
    """The size whose range holds all radii `[n]`."""
    for name, (low, high) in SIZE_RANGES.items():
        if low <= radius.min() and radius.max() <= high:
            return name
    return None


def _read_motion(centers: np.ndarray) -> str | None:
    """The motion of a path `[n, 2]`, `None` unless it is a straight and steady one of the right length."""
    times = np.linspace(-0.5, 0.5, len(centers))
    travel = times @ (centers - centers.mean(0)) / (times @ times)  # least squares, (x, y) over the clip
    path = centers.mean(0) + times[:, None] * travel
    if np.abs(centers - path).max() > MAX_UNSTEADINESS:
        return None
    for name, direction in MOTIONS.items():
        along = np.array(direction) * TRAVEL
        allowed = np.where(along != 0, MAX_TRAVEL_ERROR, MAX_STILL_TRAVEL)
        if (np.abs(travel - along) <= allowed).all():
            return name
    return None


__all__ = ["Reading", "find_centers", "read_scene"]
