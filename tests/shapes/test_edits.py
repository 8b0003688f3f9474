from dataclasses import replace

import numpy as np
import pytest
import torch

from omni_video_hf import OmniVideoPipeline
from omni_video_hf.shapes import CHECKPOINT, Example, Scene, ShapesDataset, render
from omni_video_hf.shapes.edits import EditReading, psnr, read_edit
from omni_video_hf.shapes.other_renderer import WIDER, render_otherwise
from omni_video_hf.shapes.scores import check_edit

SOURCE = Scene("red", "circle", "small", "black", "left")
COLOR = Example("v2v", "video", "make it yellow", SOURCE, replace(SOURCE, color="yellow"), attribute="color")
TARGET = render(COLOR.target)


def moved(scene, x, y):
    return replace(scene, center=(scene.center[0] + x, scene.center[1] + y))


@pytest.mark.parametrize(("task", "count"), [("i2i", 10), ("v2v", 2)])
@pytest.mark.parametrize("split", ["seen", "composition"])
def test_reconstructions_of_targets_keep_everything(task, count, split):
    """What the default checkpoint's VAE makes of rendered targets: no edit can be judged better than these."""
    vae = OmniVideoPipeline.from_pretrained(CHECKPOINT).vae.float()
    dataset = ShapesDataset(task, split, count, seed=31)
    targets = np.stack([dataset[number]["target"] for number in range(count)])
    pixels = torch.from_numpy(targets).float().permute(0, 4, 1, 2, 3) / 127.5 - 1
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    clips = ((decoded.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 4, 1).numpy().astype(np.uint8)
    edits = [read_edit(dataset.example(number), clip) for number, clip in enumerate(clips)]
    assert max(max(edit.distances) for edit in edits) <= 1.0
    assert sum(edit.verdicts["all"] for edit in edits) >= 0.9 * count


@pytest.mark.parametrize(("x", "y"), [(1.5, 0.0), (0.0, -1.5), (1.0, 1.0)])
def test_a_place_nearby_is_kept(x, y):
    assert check_edit(COLOR, render(moved(COLOR.target, x, y)))["all"]


@pytest.mark.parametrize(("x", "y"), [(2.5, 0.0), (0.0, -3.0), (2.0, 2.0), (9.0, 18.0)])
def test_another_place_is_not_kept_although_every_attribute_is_right(x, y):
    edit = read_edit(COLOR, render(moved(COLOR.target, x, y)))
    assert edit.verdicts["attributes right"]
    assert not edit.verdicts["place kept"]
    assert not edit.verdicts["all"]
    np.testing.assert_allclose(edit.distances, np.hypot(x, y), atol=0.2)


def test_one_frame_at_another_place_is_not_kept():
    frames = TARGET.copy()
    frames[16] = render(moved(COLOR.target, 0, 4))[16]
    edit = read_edit(COLOR, frames)
    assert np.argmax(edit.distances) == 16
    assert not edit.verdicts["place kept"]


def test_a_frame_without_a_shape_is_infinitely_far():
    frames = TARGET.copy()
    frames[3] = 0
    edit = read_edit(COLOR, frames)
    assert [number for number, distance in enumerate(edit.distances) if np.isinf(distance)] == [3]
    assert not edit.verdicts["place kept"]


@pytest.mark.parametrize(("shade", "kept"), [(3, True), (6, False)])
def test_what_lies_outside_of_both_shapes_is_compared(shade, kept):
    frames = TARGET.copy()
    frames[frames.sum(-1) == 0] = shade
    edit = read_edit(COLOR, frames)
    assert edit.outside_error == pytest.approx(shade)
    assert edit.verdicts["outside kept"] == edit.verdicts["all"] == kept
    assert edit.verdicts["attributes right"]


def test_outlines_of_source_and_target_are_left_out():
    """A target that moves otherwise than its source: both paths are left out, nothing else is."""
    example = replace(COLOR, target=replace(SOURCE, motion="up"), attribute="motion")
    target, source = render(example.target), render(SOURCE)
    assert read_edit(example, np.maximum(target, source)).outside_error == 0
    assert read_edit(example, render(replace(example.target, size="large"))).outside_error > 0


def test_targets_of_another_renderer_are_compared_with_their_own():
    target = render_otherwise(COLOR.target)
    edit = read_edit(COLOR, target, target, WIDER)
    assert max(edit.distances) == edit.outside_error == 0
    assert edit.verdicts["all"]


def test_verdicts_need_everything():
    right = {"color": True, "shape": True}
    best = EditReading("color", right, (0.0, 2.0), 4.0)
    assert all(best.verdicts.values())
    for change in (
        {"right": {**right, "color": False}},
        {"right": {**right, "shape": False}},
        {"distances": (0.0, 2.01)},
        {"outside_error": 4.01},
    ):
        assert not replace(best, **change).verdicts["all"]


def test_misuse_is_refused():
    with pytest.raises(ValueError, match=r"an edit.*'t2v'"):
        read_edit(Example("t2v", "video", "a circle", target=SOURCE), TARGET)
    with pytest.raises(ValueError, match="must be a clip of 17 frames, got 16"):
        read_edit(COLOR, TARGET[:16])
    with pytest.raises(ValueError, match="must show one shape in every frame"):
        read_edit(COLOR, TARGET, np.zeros_like(TARGET))
    with pytest.raises(ValueError, match=r"size of `reference`, 17 frames of 64x64, got 1 frames of 64x64"):
        psnr(TARGET[0], TARGET)


def test_psnr():
    grey = np.full((2, 8, 8, 3), 100, np.uint8)
    assert psnr(grey, grey) == np.inf
    assert psnr(grey + np.uint8(1), grey) == pytest.approx(48.1308, abs=1e-4)  # 20 log10(255)
    assert psnr(grey[0] / 255, grey[0] + np.uint8(10)) == pytest.approx(28.1308, abs=1e-4)
