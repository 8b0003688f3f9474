from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from omni_video_hf.shapes import Scene, ShapesDataset, read_scene, render
from omni_video_hf.shapes.judge import find_centers
from omni_video_hf.shapes.scene import ATTRIBUTES, BACKGROUNDS, COLORS, SHAPES, coverage

SCENE = Scene("red", "circle", "large", "black", "left")
SHAPE_ATTRIBUTES = ("color", "shape", "size", "motion")


def blur(frames, sigma):
    steps = np.arange(-5, 6)
    kernel = np.exp(-0.5 * (steps / sigma) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(frames.astype(np.float64), ((0, 0), (5, 5), (5, 5), (0, 0)), "edge")
    rows = sum(weight * padded[:, 5 + step : 69 + step] for weight, step in zip(kernel, steps, strict=True))
    return sum(weight * rows[:, :, 5 + step : 69 + step] for weight, step in zip(kernel, steps, strict=True))


def like_a_vae(frames, rng):
    """A shift of colour, soft edges, shades of 8 pixels that change from frame to frame, and ghosts of the past."""
    shades = rng.normal(0, 10, (len(frames), 8, 8, 3)).repeat(8, 1).repeat(8, 2)
    soft = blur(frames, 0.9) + rng.uniform(-12, 12, 3) + blur(shades, 3.0)
    return np.concatenate([soft[:1], 0.85 * soft[1:] + 0.15 * soft[:-1]])


DAMAGE = {
    "none": lambda frames, rng: frames,
    "blur": lambda frames, rng: blur(frames, 1.2),
    "noise": lambda frames, rng: frames + rng.normal(0, 12, frames.shape),
    "blur and noise": lambda frames, rng: blur(frames, 1.2) + rng.normal(0, 12, frames.shape),
    "vae": like_a_vae,
}


def damaged(name, frames, rng):
    return DAMAGE[name](frames, rng).round().clip(0, 255).astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("task", "count"), [("t2i", 500), ("t2v", 30)])
def test_scenes_are_read_exactly(damage, task, count):
    """Twice `count` scenes; at least 99.5 % right in each attribute and in all together."""
    rng, right = np.random.default_rng(3), []
    for split in ("seen", "composition"):
        dataset = ShapesDataset(task, split, count, seed=11)
        for example in map(dataset.example, range(count)):
            reading = read_scene(damaged(damage, render(example.target, example.num_frames), rng))
            found = reading.right(example.target)
            if task == "t2i":
                assert reading.motion is None
                del found["motion"]
            right.append([*found.values(), all(found.values())])
    assert (np.mean(right, axis=0) >= 0.995).all(), np.mean(right, axis=0)


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_color_on_every_background(color, background):
    for shape in SHAPES:
        scene = Scene(color, shape, "small", background, "down")
        reading = read_scene(render(scene))
        assert all(reading.right(scene).values())
        assert not reading.reasons


def test_forms_of_input():
    frames = render(SCENE)
    assert read_scene(frames / 255) == read_scene(frames) == read_scene(list(frames))
    image = read_scene(frames[8])
    assert image == replace(read_scene(frames), motion=None)
    with pytest.raises(ValueError, match="64x64 pixels, got 32x64"):
        read_scene(frames[:, :, :32])
    with pytest.raises(ValueError, match=r"in 0\.\.1"):
        read_scene(frames.astype(np.float32))


# --- what must not be taken for right -------------------------------------------------------------------------------


def draw(*parts, background="black"):
    """An image from (color, share of every pixel) pairs, one over the other."""
    picture = np.tile(np.array(BACKGROUNDS[background], float), (64, 64, 1))
    for color, share in parts:
        picture += share[..., None] * (np.array(COLORS.get(color, color)) - picture)
    return picture.round().astype(np.uint8)


def share(shape, radius, x=32.0, y=32.0, squash=1.0):
    pixels = np.arange(64) + 0.5
    return coverage(shape, radius, (pixels[None] - x) * squash, pixels[:, None] - y)


def diamond(reach):
    pixels = np.abs(np.arange(64) + 0.5 - 32)
    return (reach + 0.5 - pixels[None] - pixels[:, None]).clip(0, 1)


def tilted(shares, degrees):
    picture = Image.fromarray((shares * 255).astype(np.uint8))
    return np.asarray(picture.rotate(degrees, Image.Resampling.BILINEAR)) / 255


HALF = {
    "left": (slice(None), slice(32, None)),
    "right": (slice(None), slice(None, 32)),
    "top": (slice(32, None), slice(None)),
    "bottom": (slice(None, 32), slice(None)),
}


def half(shape, radius, side):
    kept = share(shape, radius)
    kept[HALF[side]] = 0
    return kept


NO_SHAPES = {
    "nothing": draw(),
    "a faint shape": draw(((30, 10, 10), share("circle", 13))),
    "a speck": draw(("red", share("square", 2))),
    "a full frame": draw(("red", np.ones((64, 64)))),
    "two shapes of one color": draw(("red", share("circle", 8, 18)), ("red", share("circle", 8, 46))),
    "two shapes of two colors": draw(("red", share("circle", 13, 18)), ("blue", share("square", 8, 48))),
    "two shapes that touch": draw(("red", share("circle", 8, 24)), ("red", share("circle", 8, 40))),
    "two shapes that overlap": draw(("red", share("circle", 13, 27)), ("green", share("square", 8, 40))),
    "one shape within another": draw(("red", share("circle", 13)), ("blue", share("square", 5))),
    "a ring": draw(("red", share("circle", 13) - share("circle", 6))),
    "two colors in one shape": draw(("red", share("circle", 13)), ("blue", half("circle", 13, "left"))),
    "an ellipse": draw(("red", share("circle", 13, squash=1.6))),
    "a bar": draw(("red", share("square", 10, squash=2.0))),
    "a small diamond": draw(("red", diamond(11))),
    "a large diamond": draw(("red", diamond(18))),
    "a tilted square": draw(("red", tilted(share("square", 12), 25))),
    "a cross": draw(("red", np.maximum(share("square", 13, squash=3), share("square", 13, squash=3).T))),
    "a shape that leaves the frame": draw(("red", share("square", 13, 58))),
    "a shape half out of the frame": draw(("red", share("circle", 13, 64))),
    "noise": np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8),
    "a ramp": np.repeat(np.linspace(0, 255, 64).astype(np.uint8), 64 * 3).reshape(64, 64, 3),
    "a triangle upside down": draw(("red", share("triangle", 13)[::-1])),
    **{
        f"the {side} half of a {size:g} {shape}": draw(("red", half(shape, size, side)))
        for side in HALF
        for size in (8, 13)
        for shape in SHAPES
        if (side, shape) != ("top", "triangle")  # which is a smaller triangle
    },
}


@pytest.mark.parametrize("name", NO_SHAPES)
def test_what_is_no_shape_is_not_read(name):
    for frames in (NO_SHAPES[name], np.tile(NO_SHAPES[name], (17, 1, 1, 1))):
        reading = read_scene(frames)
        assert [getattr(reading, attribute) for attribute in SHAPE_ATTRIBUTES] == [None] * 4
        assert reading.reasons


def test_the_background_is_read_without_a_shape():
    assert read_scene(NO_SHAPES["nothing"]).background == "black"
    assert read_scene(draw(background="white")).background == "white"
    assert read_scene(NO_SHAPES["a ramp"]).background is None


def test_a_background_in_two_colors_is_not_read():
    image = draw(("red", share("circle", 13)))
    image[:16] = 255
    assert read_scene(image).background is None


def test_values_between_those_of_the_data_set_are_not_read():
    assert read_scene(draw(("red", share("circle", 10.3)))).size is None
    assert read_scene(draw(("red", share("circle", 17)))).size is None
    assert read_scene(draw(("red", half("triangle", 13, "top")))).size is None
    for color in ((240, 175, 40), (255, 255, 255), (120, 120, 120), (135, 90, 130)):
        reading = read_scene(draw((color, share("circle", 13))))
        assert reading.color is None
        assert reading.shape == "circle"
    image = draw(("red", share("circle", 13)))
    image[image.sum(-1) == 0] = 70
    assert read_scene(image).background is None


FRAMES = render(SCENE)
STILL = render(replace(SCENE, motion="still"))


def with_frame(frames, scene, number=6):
    """`frames` with one from another scene."""
    changed = frames.copy()
    changed[number] = render(scene)[number]
    return changed


@pytest.mark.parametrize("attribute", ["color", "shape", "size", "background"])
@pytest.mark.parametrize("number", [0, 6, 16])
@pytest.mark.parametrize("motion", ["still", "left"])
def test_one_frame_that_differs_is_noticed(attribute, number, motion):
    scene = replace(SCENE, motion=motion)
    for value in ATTRIBUTES[attribute]:
        if value != getattr(scene, attribute):
            frames = with_frame(render(scene), replace(scene, **{attribute: value}), number)
            assert getattr(read_scene(frames), attribute) is None


def test_a_shape_that_vanishes_for_a_frame_is_not_read():
    frames = FRAMES.copy()
    frames[6] = 0
    assert [getattr(read_scene(frames), attribute) for attribute in SHAPE_ATTRIBUTES] == [None] * 4


BAD_MOTION = {
    "jumps halfway": np.where(np.arange(17) < 9, 0, 24),
    "moves and stops": np.minimum(np.arange(17) * 3.0, 24),
    "moves there and back": 12 - np.abs(np.arange(17) - 8) * 1.5,
    "stutters": np.arange(17) // 4 * 6.0,
    "moves half as far": np.arange(17) * 0.75,
    "moves half as far again": np.arange(17) * 2.25,
    "trembles": np.where(np.arange(17) % 2, 2.0, -2.0),
    "jumps for one frame": np.where(np.arange(17) == 8, 5.0, 0.0),
    "creeps": np.arange(17) * 0.3,
}


@pytest.mark.parametrize("name", BAD_MOTION)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_motion_that_is_not_steady_is_not_read(name, shape):
    path = BAD_MOTION[name] - BAD_MOTION[name].mean()
    reading = read_scene(np.stack([draw(("red", share(shape, 8, 32 + step))) for step in path]))
    assert reading.motion is None
    assert (reading.color, reading.shape, reading.size) == ("red", shape, "small")
    assert "steadily" in reading.reasons[-1]


def test_a_slanted_motion_is_not_read():
    frames = np.stack([draw(("red", share("circle", 8, 20 + step * 1.5, 20 + step * 1.5))) for step in range(17)])
    assert read_scene(frames).motion is None


@pytest.mark.parametrize(("motion", "opposite"), [("left", "right"), ("up", "down")])
def test_a_clip_played_backwards_moves_the_other_way(motion, opposite):
    assert read_scene(render(replace(SCENE, motion=motion))[::-1]).motion == opposite


def test_a_shape_that_grows_has_no_size():
    frames = np.stack([draw(("red", share("circle", radius))) for radius in np.linspace(8, 13, 17)])
    reading = read_scene(frames)
    assert reading.size is None
    assert (reading.color, reading.shape, reading.motion) == ("red", "circle", "still")


# --- the place ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("task", ["i2i", "v2v"])
def test_places_are_found_in_damaged_frames(damage, task):
    """Within half a pixel for the most part, within a pixel always, compared with undamaged frames."""
    rng, dataset, distances = np.random.default_rng(3), ShapesDataset(task, "seen", 20, seed=11), []
    for example in map(dataset.example, range(20)):
        frames = render(example.target, example.num_frames)
        found, wanted = find_centers(damaged(damage, frames, rng)), find_centers(frames)
        assert found.shape == (example.num_frames, 2)
        distances.append(np.linalg.norm(found - wanted, axis=1))
    distances = np.concatenate(distances)
    assert np.median(distances) <= 0.4
    assert distances.max() <= 1.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", [(0.3, 0.0), (0.0, -0.7), (5.0, 9.25), (-15.0, 3.5)])
def test_a_shape_that_moved_is_as_far_as_it_moved(shape, step):
    here, there = draw(("red", share(shape, 8))), draw(("red", share(shape, 8, 32 + step[0], 32 + step[1])))
    np.testing.assert_allclose(find_centers(there)[0] - find_centers(here)[0], step, atol=0.2)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_place_of_another_shape_is_nearly_the_same(shape):
    found = find_centers(draw(("red", share(shape, 13))))[0]
    np.testing.assert_allclose(found, (32, 32), atol=2.2 if shape == "triangle" else 0.1)


def test_a_shape_that_is_partly_cut_off_has_a_place():
    """That of what is visible, 26 pixels less the 7 that lie outside."""
    found = find_centers(draw(("red", share("square", 13, 58))))[0]
    np.testing.assert_allclose(found, (45 + 19 / 2, 32), atol=0.2)


def test_a_few_stray_pixels_do_not_move_the_place():
    image = draw(("red", share("circle", 13)))
    stray = image.copy()
    stray[5, 5:8] = image[32, 32]
    assert np.linalg.norm(find_centers(stray) - find_centers(image)) < 0.3


@pytest.mark.parametrize(
    "name", ["nothing", "a faint shape", "a speck", "two shapes of one color", "a full frame", "noise"]
)
def test_without_a_single_shape_the_place_is_infinite(name):
    assert np.isinf(find_centers(NO_SHAPES[name])).all()


def test_the_place_is_told_for_each_frame_by_itself():
    frames = FRAMES.copy()
    frames[6] = 0
    assert np.isinf(find_centers(frames)).all(axis=1).tolist() == [number == 6 for number in range(17)]
