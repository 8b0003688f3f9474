"""Animated WebP, which FFmpeg cannot read."""

import numpy as np
import pytest
from PIL import Image

from omni_video_hf.media.video_loading import load_video, open_media
from omni_video_hf.media.video_reader import MediaError, probe_video
from omni_video_hf.utils.read_budget import read_budget

SHADES = [0, 30, 60, 90, 120]


def animation(path, durations=100, mode="RGB", **options):
    pictures = [Image.new("RGB", (48, 32), (shade,) * 3).convert(mode) for shade in SHADES]
    if mode == "RGBA":
        for picture in pictures:
            picture.putalpha(Image.new("L", (48, 32), 255).point(lambda _: 0))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, lossless=True, **options)
    return path


def test_frames_rate_and_size(tmp_path):
    path = animation(tmp_path / "a.webp")
    info, clip = probe_video(path), load_video(path)
    assert (info.width, info.height, info.num_frames, info.fps, info.codec) == (48, 32, 5, 10, "webp")
    assert not info.is_variable_frame_rate
    assert clip.frames.shape == (5, 32, 48, 3) and clip.fps == 10
    assert clip.frames.mean((1, 2, 3)).round().tolist() == SHADES
    assert load_video(path, num_frames=3).frames[:, 0, 0, 0].tolist() == [0, 60, 120]
    assert open_media(path) == ("video", path)


def test_times_vary(tmp_path):
    info = probe_video(animation(tmp_path / "a.webp", [100, 100, 300, 100, 50]))
    assert info.is_variable_frame_rate
    assert info.duration == pytest.approx(0.65)


def test_transparent_parts_are_white(tmp_path):
    path = animation(tmp_path / "a.webp", mode="RGBA", exact=True, minimize_size=False)
    assert (load_video(path).frames == 255).all()
    assert any("transparent" in note for note in load_video(path).notes)


@pytest.mark.parametrize("part", [0.5, 0.9, 0.99])
def test_cut_short(tmp_path, part):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)) for _ in range(4)]
    pictures[0].save(tmp_path / "a.webp", save_all=True, append_images=pictures[1:], duration=100)
    data = (tmp_path / "a.webp").read_bytes()
    (tmp_path / "a.webp").write_bytes(data[: int(len(data) * part)])
    with pytest.raises(MediaError, match=r"a\.webp: cut short or damaged"):
        load_video(tmp_path / "a.webp")


def test_damaged_in_the_middle(tmp_path):
    path = animation(tmp_path / "a.webp")
    data = bytearray(path.read_bytes())
    start = data.rindex(b"VP8L") + 8
    data[start : start + 8] = bytes(8)
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"a\.webp: .*damaged"):
        load_video(path)


def test_too_large(tmp_path):
    path = animation(tmp_path / "a.webp")
    with read_budget(max_pixels=1000), pytest.raises(MediaError, match="48x32 pixels, more than 1,000"):
        load_video(path)
