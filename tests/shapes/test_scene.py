import numpy as np
import pytest

from omni_video_hf.shapes.scene import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLORS,
    MOTIONS,
    SHAPES,
    SIZES,
    Scene,
    coverage,
    render,
    room,
)

SCENE = Scene("red", "circle", "large", "black", "left")
AREA = {"circle": np.pi, "square": 4.0, "triangle": 2.0}  # of radius 1


def shares(scene, frames):
    """How much of each pixel has the shape's colour, from the channel that differs most."""
    background, color = np.array(BACKGROUNDS[scene.background]), np.array(COLORS[scene.color])
    channel = np.abs(color - background).argmax()
    return (frames[..., channel] - background[channel]) / (color - background)[channel]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_a_shape_fills_its_box_and_has_its_area(shape, size):
    radius = SIZES[size]
    share = shares(SCENE, render(Scene("red", shape, size, "black", center=(30.0, 33.0)), 1))[0]
    rows, columns = np.flatnonzero(share.max(1) > 0.1), np.flatnonzero(share.max(0) > 0.1)
    assert (columns[0], columns[-1] + 1) == (30 - radius, 30 + radius)
    assert rows[-1] + 1 == 33 + radius
    assert abs(rows[0] - (33 - radius)) <= (1 if shape == "triangle" else 0)  # the tip is thinner than a pixel
    assert share.sum() == pytest.approx(AREA[shape] * radius**2, rel=0.015)


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_smooth_wherever_the_shape_stands(shape):
    """Area and centre of mass follow the position to a small part of a pixel."""
    lower = {"triangle": 8 / 3}.get(shape, 0.0)
    for x in np.linspace(28, 29, 7):
        share = shares(SCENE, render(Scene("red", shape, "small", "black", center=(x, 30.3)), 1))[0]
        pixels = np.arange(64) + 0.5
        assert (share.sum(0) @ pixels) / share.sum() == pytest.approx(x, abs=0.06)
        assert (share.sum(1) @ pixels) / share.sum() == pytest.approx(30.3 + lower, abs=0.06)


@pytest.mark.parametrize("motion", MOTIONS)
def test_motion_is_steady_and_24_pixels_long(motion):
    scene = Scene("blue", "circle", "small", "white", motion)
    share = shares(scene, render(scene))
    pixels = np.arange(64) + 0.5
    path = np.stack([share.sum(1) @ pixels, share.sum(2) @ pixels], 1) / share.sum((1, 2))[:, None]
    np.testing.assert_allclose(np.diff(path, axis=0), np.tile(np.array(MOTIONS[motion]) * 1.5, (16, 1)), atol=0.05)
    np.testing.assert_allclose(path[8], (32, 32), atol=0.05)


def test_colors_are_exact_and_nothing_else_is_drawn():
    for color, rgb in COLORS.items():
        for background, behind in BACKGROUNDS.items():
            frame = render(Scene(color, "square", "small", background), 1)[0]
            assert frame.shape == (64, 64, 3)
            assert frame.dtype == np.uint8
            assert (frame[24:40, 24:40] == rgb).all()
            frame[24:40, 24:40] = behind
            assert (frame == behind).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("motion", MOTIONS)
def test_a_shape_never_touches_the_edge(size, motion):
    for corner in np.array(np.meshgrid(*room(size, motion))).reshape(2, -1).T:
        frames = render(Scene("red", "square", size, "black", motion, tuple(corner)))
        inner = frames[:, 2:-2, 2:-2].copy()
        assert inner.any(axis=(1, 2, 3)).all()
        frames[:, 2:-2, 2:-2] = 0
        assert not frames.any()


def test_an_image_is_the_middle_of_the_clip():
    assert (render(SCENE, 1)[0] == render(SCENE)[8]).all()
    assert (render(SCENE, 9) == render(SCENE)[::2]).all()


def test_frames_can_be_written_to():
    frames = render(Scene("red", "circle", "large", "black"))
    frames[1] = 0
    assert frames[0].any()
    assert frames[2].any()


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_unknown_values_are_refused(attribute):
    values = {name: allowed[0] for name, allowed in ATTRIBUTES.items()} | {attribute: "pink"}
    with pytest.raises(ValueError, match=f"`{attribute}` must be one of {ATTRIBUTES[attribute][0]}.*'pink'"):
        Scene(**values)


@pytest.mark.parametrize("center", [(26.9, 32), (37.1, 32), (32, 14.9), (32, 49.1), (float("nan"), 32)])
def test_shapes_that_would_leave_the_frame_are_refused(center):
    with pytest.raises(ValueError, match="leaves the frame"):
        Scene("red", "circle", "large", "black", "left", center)


def test_other_refusals():
    with pytest.raises(ValueError, match="num_frames"):
        render(SCENE, 0)
    with pytest.raises(ValueError, match="'star'"):
        coverage("star", 8.0, np.zeros(1), np.zeros(1))
