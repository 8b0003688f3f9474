"""The plan of windows, their weights and their noise, as pure functions."""

import itertools

import pytest
import torch

from omni_video_hf.diffusion.window_plan import Window, blend_windows, plan_windows, pyramid_weights, shuffled_noise

SIZES = [(5, 5, 1), (6, 5, 1), (9, 5, 1), (17, 5, 1), (17, 5, 3), (18, 5, 2), (81, 11, 2), (33, 3, 1)]


@pytest.mark.parametrize(("count", "length", "overlap"), SIZES)
def test_windows_cover_the_clip_at_the_trained_length(count, length, overlap):
    windows = plan_windows(count, length, overlap)
    assert windows[0] == Window(0, min(count, length))
    assert windows[-1].stop == count
    assert [window.lead_in for window in windows] == [None, *range(len(windows) - 1)]
    for before, after in itertools.pairwise(windows):
        assert after.stop - after.start == length - 1  # and the lead-in
        assert before.start < after.start
        assert before.stop - after.start >= overlap
        assert after.start >= 1  # there is a frame before it for the lead-in


def test_no_window_more_than_needed():
    assert len(plan_windows(17, 5, 1)) == 5  # 5 latent frames, then 3 new ones each
    assert len(plan_windows(17, 5, 3)) == 13


@pytest.mark.parametrize(("count", "length", "overlap"), [(0, 5, 1), (9, 2, 1), (9, 5, 0), (9, 5, 4)])
def test_plans_that_cannot_be_are_refused(count, length, overlap):
    with pytest.raises(ValueError, match="`overlap` in 1"):
        plan_windows(count, length, overlap)


@pytest.mark.parametrize(("count", "length", "overlap"), SIZES)
def test_the_frames_of_a_window_are_those_of_its_latents(count, length, overlap):
    """Latent frame 0 stands for frame 0, latent frame n for frames 4n-3 to 4n; a lead-in for the frame before."""
    for window in plan_windows(count, length, overlap):
        first, stop = window.frames(temporal=4)
        assert stop == 4 * (window.stop - 1) + 1
        assert first == (0 if window.lead_in is None else 4 * window.start - 3 - 1)
        assert (stop - first - 1) % 4 == 0  # a clip that the VAE takes
        assert (stop - first - 1) // 4 + 1 == min(count, length)


@pytest.mark.parametrize(("count", "length", "overlap"), SIZES)
def test_weights_sum_to_one_and_fall_towards_the_borders(count, length, overlap):
    windows = plan_windows(count, length, overlap)
    total = torch.zeros(count)
    for window, weights in zip(windows, pyramid_weights(windows), strict=True):
        total[window.start : window.stop] += weights
    torch.testing.assert_close(total, torch.ones(count))
    for before, after in itertools.pairwise(windows):
        left, right = (pyramid_weights(windows)[windows.index(window)] for window in (before, after))
        assert left[-1] <= right[len(left) - 1 - after.start + before.start]
        assert right[0] <= left[after.start - before.start]


def test_blending_what_agrees_changes_nothing_and_leaves_lead_ins_out():
    clip = torch.randn(2, 3, 9, 4, 4)
    windows = plan_windows(9, 5, 1)
    lead_ins = torch.randn(2, 3, 2, 4, 4)
    parts = [window.take(clip, lead_ins) for window in windows]
    assert [part.shape[2] for part in parts] == [5, 5, 5]
    whole, back = blend_windows(parts, windows, pyramid_weights(windows))
    torch.testing.assert_close(whole, clip)
    assert torch.equal(back, lead_ins)


def test_one_window_is_the_clip_to_the_bit():
    clip = torch.randn(1, 2, 3, 4, 4)
    (window,) = plan_windows(3, 5, 1)
    whole, lead_ins = blend_windows([window.take(clip, clip[:, :, :0])], (window,), pyramid_weights((window,)))
    assert torch.equal(whole, clip)
    assert lead_ins.shape[2] == 0


def test_later_noise_is_the_first_windows_in_another_order():
    noise = torch.randn(2, 1, 5, 1, 1)
    windows = plan_windows(17, 5, 1)
    shuffled = shuffled_noise(noise, windows, torch.Generator().manual_seed(0))
    assert shuffled.shape[2] == 17
    assert torch.equal(shuffled[:, :, :5], noise)
    later = shuffled[:, :, 5:].unfold(2, 4, 4).sort(dim=-1).values  # every four frames
    assert torch.equal(later, noise[:, :, 1:].movedim(2, -1).sort(dim=-1).values[:, :, None].expand_as(later))
    assert not torch.equal(shuffled[:, :, 5:9], noise[:, :, 1:])


def test_each_sample_is_shuffled_by_its_own_generator():
    noise = torch.randn(1, 1, 5, 1, 1).expand(2, -1, -1, -1, -1)
    windows = plan_windows(33, 5, 1)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    first, second = shuffled_noise(noise, windows, generators)
    assert not torch.equal(first, second)
    assert torch.equal(first, shuffled_noise(noise[:1], windows, torch.Generator().manual_seed(0))[0])
