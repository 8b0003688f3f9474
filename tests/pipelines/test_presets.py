import copy
import math

import numpy as np
import pytest

from omni_video_hf.pipelines.presets import (
    PRESETS,
    GenerationSettings,
    LatentGrid,
    SizeError,
    check_num_frames,
    check_positions,
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


@pytest.mark.parametrize(
    ("spatial", "patch", "source_patch", "alone", "with_source"),
    [(8, (1, 2, 2), (1, 3, 3), 16, 48), (8, (1, 6, 4), (1, 9, 10), 96, 1440), (16, (1, 3, 3), (1, 3, 3), 48, 48)],
)
def test_a_size_is_whole_tokens_of_decoder_and_source(spatial, patch, source_patch, alone, with_source):
    grid = LatentGrid(spatial, 4, patch, source_patch)  # patches that are no powers of two
    assert grid.multiple(with_source=False) == alone
    assert grid.multiple(with_source=True) == with_source
    small = {"height": alone, "width": 2 * alone}
    assert resolve_size(grid, alone, 2 * alone, small) == (alone, 2 * alone, [])
    kept = (with_source, 2 * with_source)
    assert resolve_size(grid, None, None, small, kept) == (*kept, [])
    with pytest.raises(ValueError, match=f"multiple of {with_source}"):
        resolve_size(grid, with_source // 2, with_source, small, kept)


def test_size_without_source_is_the_presets():
    assert resolve_size(GRID, None, None, PRESET) == (352, 640, [])
    assert resolve_size(GRID, 16, 48, PRESET) == (16, 48, [])


def test_an_edit_keeps_the_size_of_its_source_and_notes_when_it_cannot():
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
        check_source_fits(GRID, 480, 832, 81, room, 2560, PRESET)
    message = str(error.value)
    assert "8190" in message
    assert "height=192, width=352, num_frames=81" in message
    assert "height=480, width=832, num_frames=9" in message
    check_source_fits(GRID, 192, 352, 81, room, 2560)
    check_source_fits(GRID, 480, 832, 9, room, 2560)
    with pytest.raises(ValueError):
        check_source_fits(GRID, 480, 832, 13, room, 2560)
    check_source_fits(GRID, 480, 832, 81, 8190, 10000)


def random_grids():
    """Grids, sizes and limits of all kinds, from a seed."""
    rng = np.random.default_rng(0)

    def choose(values):
        return values[rng.integers(len(values))]

    for _ in range(400):
        grid = LatentGrid(
            spatial=choose([8, 16]),
            temporal=4,
            patch=(1, 2, 2),
            source_patch=(1, *choose([(2, 2), (4, 4), (3, 3)])),
            positions=choose([24, 64, 1024]),
        )
        multiple = grid.multiple(with_source=True)
        preset = choose(list(PRESETS.values())) | {"num_frames": 81}
        height, width = (multiple * int(rng.integers(1, 120)) for _ in range(2))
        yield grid, preset, height, width, int(rng.integers(1, 600)), int(rng.integers(-5, 4000))


def test_what_is_proposed_passes_the_checks_and_is_nothing_that_was_refused():
    refused = nothing = 0
    for grid, preset, height, width, num_frames, room in random_grids():
        try:
            check_source_fits(grid, height, width, num_frames, room, 5000, preset)
            check_positions(grid, height, width, num_frames, preset, True, room)
        except SizeError as error:
            refused += 1
            nothing += not error.proposals
            assert len(error.proposals) <= 3
            for proposal in error.proposals:
                size = (proposal.height, proposal.width)
                assert resolve_size(grid, *size, preset, size) == (*size, [])
                check_num_frames(grid, proposal.num_frames)
                check_source_fits(grid, *size, proposal.num_frames, room, 5000, preset)
                check_positions(grid, *size, proposal.num_frames, preset, True, room)
                assert proposal.num_frames <= num_frames
                assert proposal.height <= height
                assert f"height={proposal.height}, width={proposal.width}" in str(error)
                assert f"--size {proposal.width}x{proposal.height}" in error.for_command_line()
            if not error.proposals:  # then not even the smallest size works
                smallest = grid.multiple(with_source=True)
                long = max(smallest * round(max(height, width) / min(height, width)), smallest)
                assert grid.source_tokens(smallest, smallest, 1) > room or long > smallest
    assert refused > 100
    assert refused - nothing > 80


def test_fewer_frames_at_the_presets_size_come_before_a_tiny_size():
    grid = LatentGrid(8, 4, (1, 2, 2), (1, 2, 2), positions=64)
    preset = {"height": 64, "width": 64, "num_frames": 17}
    with pytest.raises(SizeError) as error:  # a clip of ten seconds and the small checkpoint
        check_source_fits(grid, 480, 848, 301, 120, 192, preset)
    first = error.value.proposals[0]
    assert (first.height, first.width) == (48, 80)
    assert first.num_frames == 29
    assert all(proposal.height >= 32 for proposal in error.value.proposals)


@pytest.mark.parametrize(
    ("height", "width", "frames", "problem", "works"),
    [
        (64, 1040, 5, "4 rows, 65 columns and 2 frames of tokens", (48, 1024, 5)),
        (16, 16, 257, "1 rows, 1 columns and 65 frames of tokens", (16, 16, 253)),
        (1040, 64, 1, "65 rows, 4 columns and 1 frames of tokens", (1024, 48, 1)),
    ],
)
def test_sizes_and_lengths_without_positions_are_refused(height, width, frames, problem, works):
    grid = LatentGrid(8, 4, (1, 2, 2), (1, 2, 2), positions=64)
    with pytest.raises(SizeError, match="positions for 64 of each") as error:
        check_positions(grid, height, width, frames, {"height": 64, "width": 64})
    assert problem in str(error.value)
    proposals = [(p.height, p.width, p.num_frames) for p in error.value.proposals]
    assert any(p[2] == works[2] and abs(p[0] - works[0]) <= 16 and abs(p[1] - works[1]) <= 16 for p in proposals)
    for proposal in proposals:
        check_positions(grid, *proposal)
    assert ("num_frames" in str(error.value)) == (frames > 1)
    assert ("--frames" in error.value.for_command_line()) == (frames > 1)


def test_the_error_travels_between_processes():
    grid = LatentGrid(8, 4, (1, 2, 2), (1, 2, 2), positions=64)
    with pytest.raises(SizeError) as error:
        check_source_fits(grid, 480, 848, 301, 120, 192, {"height": 64, "width": 64})
    again = copy.copy(error.value)
    assert str(again) == str(error.value)
    assert again.for_command_line() == error.value.for_command_line()
    assert "--max-context-length" in again.for_command_line()
    assert "truncate" not in again.for_command_line()


@pytest.mark.parametrize(
    "name", ["height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale", "flow_shift"]
)
def test_settings_are_numbers_within_their_range(name):
    values = PRESETS["t2v"] | {"task": "t2v"}
    assert GenerationSettings(**values).to_dict() == values
    whole = name in ("height", "width", "num_frames", "num_inference_steps")
    kept = getattr(GenerationSettings(**(values | {name: (np.int64 if whole else np.float32)(4)})), name)
    assert kept == 4
    assert type(kept) in (int, float)
    bad = ["4", True, math.nan, math.inf, -1, None if name != "fps" else "", *([4.5, 0] if whole else [])]
    bad += [0] if name in ("fps", "flow_shift") else []
    for value in bad:
        with pytest.raises(ValueError, match=f"`{name}` must be a (whole|finite) number"):
            GenerationSettings(**(values | {name: value}))
