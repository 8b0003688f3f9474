import numpy as np
import pytest

from omni_video_hf.shapes import ShapesDataset, read_scene, render
from omni_video_hf.shapes.judge import find_centers
from omni_video_hf.shapes.other_renderer import WIDER, render_otherwise
from omni_video_hf.shapes.scene import SHAPES, Scene


@pytest.mark.parametrize("task", ["i2i", "v2v"])
@pytest.mark.parametrize("split", ["seen", "composition"])
def test_it_draws_the_same_scenes_in_other_pixels(task, split):
    dataset = ShapesDataset(task, split, 20, seed=4)
    for example in map(dataset.example, range(20)):
        own, other = (draw(example.source, example.num_frames) for draw in (render, render_otherwise))
        assert (other.shape, other.dtype) == (own.shape, own.dtype)
        assert (other != own).any()
        right = read_scene(other).right(example.source)
        assert all(right[name] for name in right if task == "v2v" or name != "motion")
        assert np.linalg.norm(find_centers(other) - find_centers(own), axis=1).max() < 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_its_shapes_are_wider_and_higher(shape):
    scene = Scene("red", shape, "large", "black")
    for axis in (0, 1):
        own, other = ((draw(scene, 1)[0, ..., 0] > 110).any(axis).sum() for draw in (render, render_otherwise))
        # The tip of the triangle is thinner than a pixel.
        assert abs(int(other) - int(own) - WIDER) <= (1 if shape == "triangle" else 0)
