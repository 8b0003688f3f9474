import numpy as np
import pytest

from omni_video_hf.shapes import Scene, render
from omni_video_hf.shapes.pictures import ARROW, GAP, MARGIN, Shown, results_sheet

SIDE = 96  # 64 pixels, one and a half times as large
RED, BLUE = (Scene(color, "square", "large", "black") for color in ("red", "blue"))


def colors(sheet, box):
    left, top, right, bottom = box
    return {tuple(pixel) for pixel in np.asarray(sheet)[top:bottom, left:right].reshape(-1, 3).tolist()}


def test_a_row_shows_source_arrow_and_result_below_a_caption():
    sheet = results_sheet([Shown("make it blue", render(RED), render(BLUE))])
    clip = 5 * (SIDE + GAP) - GAP
    assert sheet.width == 2 * MARGIN + 2 * clip + ARROW
    assert sheet.height > SIDE + 2 * MARGIN
    frames_top = sheet.height - MARGIN - SIDE
    bottom = sheet.height - MARGIN
    source = (MARGIN, frames_top, MARGIN + clip, bottom)
    result = (MARGIN + clip + ARROW, frames_top, sheet.width - MARGIN, bottom)
    assert (220, 40, 40) in colors(sheet, source) and (80, 80, 220) not in colors(sheet, source)
    assert (50, 80, 220) in colors(sheet, result) and (220, 40, 40) not in colors(sheet, result)
    assert (0, 0, 0) in colors(sheet, (0, 0, sheet.width, frames_top))  # the caption
    assert (0, 0, 0) in colors(sheet, (MARGIN + clip, frames_top, MARGIN + clip + ARROW, bottom))  # the arrow


def test_rows_of_all_kinds_share_a_sheet():
    image = render(RED, 1)
    rows = [Shown("what color is it?  -  red", render(RED)), Shown("a square", result=image), Shown("x", image, image)]
    heights = [results_sheet([row]).height - 2 * MARGIN for row in rows]
    sheet = results_sheet(rows)
    assert sheet.height == sum(heights) + 4 * MARGIN
    assert sheet.width == results_sheet(rows[:1]).width
    narrow = results_sheet([Shown("a caption that is much longer than the picture is wide", result=image)])
    assert narrow.width > SIDE + 2 * MARGIN + 100


def test_nothing_to_show_is_refused():
    with pytest.raises(ValueError, match="at least one result"):
        results_sheet([])
    with pytest.raises(ValueError, match="'nothing' must not both be missing"):
        Shown("nothing")
