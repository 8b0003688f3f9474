import pytest

from omni_video_hf.settings_omni_video import (
    PRESETS,
    LatentGrid,
    check_num_frames,
    check_source_fits,
    resolve_size,
    trim_num_frames,
)

GRID = LatentGrid(spatial=8, temporal=4, patch=(1, 2, 2), source_patch=(1, 4, 4))
PRESET = PRESETS["v2v"]


def test_presets_are_upstreams_with_guidance_in_diffusers_convention():
    assert PRESETS["t2v"] == {
        "height": 480,
        "width": 832,
        "num_frames": 81,
        "fps": 16,
        "num_inference_steps": 50,
        "guidance_scale": 6.0,
        "flow_shift": 5.0,
    }
    assert PRESETS["v2v"]["guidance_scale"] == 4.0
    assert {preset["flow_shift"] for preset in PRESETS.values()} == {5.0}


def test_source_tokens_of_upstreams_examples():
    assert GRID.source_tokens(480, 832, 81) == 8190
    assert GRID.source_tokens(352, 640, 17) == 1100


def test_size_without_source_is_the_presets():
    assert resolve_size(GRID, None, None, PRESET) == (352, 640, [])
    assert resolve_size(GRID, 16, 48, PRESET) == (16, 48, [])


def test_an_edit_keeps_its_sources_size_and_says_when_it_cannot():
    assert resolve_size(GRID, None, None, PRESET, (480, 832)) == (480, 832, [])
    height, width, notes = resolve_size(GRID, None, None, PRESET, (1080, 1920))
    assert (height, width) == (1088, 1920)
    assert len(notes) == 1
    assert "1920x1080" in notes[0]
    assert "1920x1088" in notes[0]


def test_a_video_from_an_image_keeps_its_shape_at_the_presets_area():
    height, width, notes = resolve_size(GRID, None, None, PRESET, (1000, 1000), keep_source_size=False)
    assert height == width == 480
    assert notes


@pytest.mark.parametrize(
    ("height", "width", "source", "message"),
    [
        (480, None, None, "together"),
        (481, 832, None, "480 is the nearest"),
        (480, 840, None, "832 is the nearest"),
        (16, 16, (64, 64), "32 is the nearest"),
        (0, 16, None, "16 is the nearest"),
    ],
)
def test_sizes_off_the_grid_are_refused(height, width, source, message):
    with pytest.raises(ValueError, match=message):
        resolve_size(GRID, height, width, PRESET, source)


def test_frames():
    for frames in (1, 5, 81):
        check_num_frames(GRID, frames)
    with pytest.raises(ValueError, match="13 and 17"):
        check_num_frames(GRID, 16)
    with pytest.raises(ValueError, match="1 and 5"):
        check_num_frames(GRID, 0)
    assert trim_num_frames(GRID, 17) == (17, [])
    kept, notes = trim_num_frames(GRID, 20)
    assert kept == 17
    assert "3 were left out" in notes[0]


def test_a_source_that_does_not_fit_is_refused_with_the_largest_that_do():
    room = 2560 - 1024 - 6 - 20
    with pytest.raises(ValueError) as error:
        check_source_fits(GRID, 480, 832, 81, room, 2560)
    message = str(error.value)
    assert "8190" in message
    assert "352x192 with 81 frames" in message
    assert "832x480 with 9 frames" in message
    check_source_fits(GRID, 192, 352, 81, room, 2560)
    check_source_fits(GRID, 480, 832, 9, room, 2560)
    with pytest.raises(ValueError):
        check_source_fits(GRID, 480, 832, 13, room, 2560)
    check_source_fits(GRID, 480, 832, 81, 8190, 10000)
