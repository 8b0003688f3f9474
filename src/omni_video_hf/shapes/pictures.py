"""Contact sheets of results: what was asked for, the source where there is one, and what came out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..media.video_loading import load_video

FRAMES_PER_CLIP = 5
SCALE = 1.5  # of the frames, which are small
MARGIN = 8  # pixels around everything
GAP = 3  # between frames
ARROW = 28  # between a source and what became of it
FONT_SIZE = 15


@dataclass(frozen=True)
class Shown:
    """
    One result.

    Args:
        caption: what was asked for; for a question, its answer too.
        source: frames of the clip or image that was given, as in [`load_video`].
        result: frames of what was drawn.

    Raises:
        ValueError: without both pictures.
    """

    caption: str
    source: Any = None
    result: Any = None

    def __post_init__(self) -> None:
        if self.source is None and self.result is None:
            raise ValueError(f"`source` and `result` of {self.caption!r} must not both be missing.")


def results_sheet(rows: Sequence[Shown]) -> Image.Image:
    """
    A row per result: its caption, and below it frames of the source, an arrow and frames of the result.

    Raises:
        ValueError: without rows.
    """
    if not rows:
        raise ValueError("`rows` must hold at least one result, got none.")
    drawn = [_row(row) for row in rows]
    width = max(picture.width for picture in drawn)
    sheet = Image.new("RGB", (width + 2 * MARGIN, sum(p.height + MARGIN for p in drawn) + MARGIN), "white")
    top = MARGIN
    for picture in drawn:
        sheet.paste(picture, (MARGIN, top))
        top += picture.height + MARGIN
    return sheet


def _row(shown: Shown) -> Image.Image:
    groups = [_frames(clip) for clip in (shown.source, shown.result) if clip is not None]
    side = groups[0][0].height
    font = ImageFont.load_default(FONT_SIZE)
    left, _, right, bottom = map(int, font.getbbox(shown.caption))
    width = sum(len(group) * (side + GAP) - GAP for group in groups) + ARROW * (len(groups) - 1)
    picture = Image.new("RGB", (max(width, right - left), bottom + GAP + side), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((0, 0), shown.caption, fill="black", font=font)
    x, y = 0, bottom + GAP
    for number, group in enumerate(groups):
        if number:
            middle = y + side // 2
            draw.line((x + 6, middle, x + ARROW - 8, middle), fill="black", width=2)
            draw.polygon(
                [(x + ARROW - 6, middle), (x + ARROW - 13, middle - 5), (x + ARROW - 13, middle + 5)], "black"
            )
            x += ARROW
        for frame in group:
            picture.paste(frame, (x, y))
            # White and grey frames need an edge on white paper.
            draw.rectangle((x, y, x + side - 1, y + side - 1), outline=(200, 200, 200))
            x += side + GAP
        x -= GAP
    return picture


def _frames(clip: Any) -> list[Image.Image]:
    frames = load_video(clip).frames
    chosen = np.linspace(0, len(frames) - 1, min(FRAMES_PER_CLIP, len(frames))).round().astype(int)
    size = (round(frames.shape[2] * SCALE), round(frames.shape[1] * SCALE))
    return [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in frames[chosen]]


__all__ = ["Shown", "results_sheet"]
