"""Formats, codecs and quality of written videos, and the writer that takes frames one by one."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from omni_video_hf.media.images import load_image
from omni_video_hf.media.record import read_media_record
from omni_video_hf.media.video_loading import load_video
from omni_video_hf.media.video_reader import MediaError, probe_video, read_index
from omni_video_hf.media.video_writer import VideoWriter, save_video
from omni_video_hf.media.writing import formats
from omni_video_hf.media.writing.encoding import Colours, colours_of

SHADES = [10, 60, 110, 160, 210]
FRAMES = np.stack([np.full((32, 48, 3), shade, np.uint8) for shade in SHADES])


def shades(path):
    return load_video(path).frames.mean((1, 2, 3)).round().astype(int).tolist()


@pytest.mark.parametrize(
    ("name", "codec", "found"),
    [
        ("a.mp4", None, "h264"),
        ("a.mp4", "vp9", "vp9"),
        ("a.mov", None, "h264"),
        ("a.mov", "prores", "prores"),
        ("a.mkv", None, "h264"),
        ("a.webm", None, "vp9"),
        ("a.gif", None, "gif"),
        ("a.webp", None, "webp"),
    ],
)
def test_formats(tmp_path, name, codec, found):
    save_video(FRAMES, tmp_path / name, 10, codec=codec)
    info = probe_video(tmp_path / name)
    assert (info.width, info.height, info.num_frames, info.codec) == (48, 32, 5, found)
    assert info.fps == pytest.approx(10)
    assert np.abs(np.array(shades(tmp_path / name)) - SHADES).max() <= 3
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_hevc(tmp_path):
    frames = np.stack([np.full((64, 64, 3), shade, np.uint8) for shade in SHADES[:2]])
    save_video(frames, tmp_path / "a.mp4", 10, codec="hevc")
    assert probe_video(tmp_path / "a.mp4").codec == "hevc"
    with pytest.raises(MediaError, match="libx265 needs at least 64 pixels a side, the frames are 48x32"):
        save_video(FRAMES, tmp_path / "b.mp4", 10, codec="hevc")
    assert b"hvc1" in (tmp_path / "a.mp4").read_bytes()


def test_gifs_and_webps_keep_odd_sizes_and_colours(tmp_path):
    frames = np.random.default_rng(0).integers(0, 8, (3, 5, 7, 3), dtype=np.uint8).repeat(7, 1).repeat(5, 2) * 32
    for name in ("a.gif", "a.webp"):
        save_video(frames, tmp_path / name, 10, quality=100 if name == "a.webp" else None)
        assert np.array_equal(load_video(tmp_path / name).frames, frames)


@pytest.mark.parametrize("name", ["frames", "frame-%03d.png"])
def test_pictures(tmp_path, name):
    save_video(FRAMES, tmp_path / name, 10, metadata={"seed": 7})
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    first = "frames/0001.png" if name == "frames" else "frame-001.png"
    assert files[0] == tmp_path / first and len(files) == 5
    assert [np.asarray(load_image(file))[0, 0, 0] for file in files] == SHADES
    assert read_media_record(files[4]) == {"seed": 7}
    before = files[0].read_bytes()
    with pytest.raises(MediaError, match="exists already"):
        save_video(FRAMES[::-1], tmp_path / name, 10)
    assert files[0].read_bytes() == before


def test_pictures_replace_nothing(tmp_path):
    (tmp_path / "003.png").write_text("mine")
    with pytest.raises(MediaError, match=r"003\.png: exists already"):
        save_video(FRAMES, tmp_path / "%03d.png", 10)
    assert [path.name for path in tmp_path.iterdir()] == ["003.png"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.mp4", {"codec": "theora"}, r"can be written with h264, hevc"),
        ("a.webm", {"codec": "h264"}, r"the format does not take it: \.webm can be written with vp9"),
        ("a.mp4", {"quality": 101}, "`quality` must be 0 to 100, got 101"),
        ("a.mp4", {"quality": 50, "crf": 18}, "pass one of them"),
        ("a.mp4", {"crf": 52}, "`crf` must be 0 to 51"),
        ("a.gif", {"quality": 50}, "no scale of quality"),
        ("a.webp", {"crf": 5}, "have no CRF"),
        ("a.avi", {}, r"one of \.mp4, \.mov, \.mkv, \.webm, \.gif, \.webp"),
        ("none/%04d.png", {}, "does not exist"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, name, options, message):
    with pytest.raises(MediaError, match=message), VideoWriter(tmp_path / name, 8, **options):
        pass
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "has_encoder", lambda name: name == "libx264")
    with pytest.raises(MediaError, match=r"no encoder for it: \.mp4 can be written with h264"):
        VideoWriter(tmp_path / "a.mp4", 8, codec="av1")


@pytest.mark.parametrize("suffix", ["mp4", "webm", "webp"])
def test_quality_changes_the_size(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    sizes = []
    for quality in (20, 65, 90):
        save_video(noise, tmp_path / f"a.{suffix}", 8, quality=quality)
        sizes.append((tmp_path / f"a.{suffix}").stat().st_size)
    assert sizes == sorted(set(sizes))


def test_the_default_quality_is_crf_18(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    for name, options in (("a", {}), ("b", {"crf": 18}), ("c", {"quality": 65})):
        save_video(noise, tmp_path / f"{name}.mp4", 8, **options)
    assert len({(tmp_path / f"{name}.mp4").read_bytes() for name in "abc"}) == 1


def test_the_file_appears_when_it_is_complete(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 8) as writer:
        for frame in FRAMES:
            writer.add(Image.fromarray(frame))
            assert not (tmp_path / "a.mp4").exists()
    assert probe_video(tmp_path / "a.mp4").num_frames == 5
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "b.mp4", 8) as writer:
        writer.add(FRAMES[0])
        raise RuntimeError
    with pytest.raises(MediaError, match=r"same size, got \[\(48, 32\), \(32, 48\)\]"):
        save_video([FRAMES[0], FRAMES[0].transpose(1, 0, 2)], tmp_path / "b.mp4", 8)
    with pytest.raises(MediaError, match="no frames"), VideoWriter(tmp_path / "b.mp4", 8):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm", "gif", "webp"])
def test_times_of_a_variable_rate(tmp_path, suffix):
    times = [0, 0.1, 0.2, 0.5, 0.6]
    with VideoWriter(tmp_path / f"a.{suffix}", 8) as writer:
        for frame, time in zip(FRAMES, times, strict=True):
            writer.add(frame, time, 0.2)
    index = read_index(tmp_path / f"a.{suffix}")
    assert index.times.tolist() == pytest.approx(times, abs=2e-3)
    assert index.info.is_variable_frame_rate
    if suffix not in ("gif",):
        assert index.info.duration == pytest.approx(0.8, abs=2e-3)
    with pytest.raises(MediaError, match="must grow"), VideoWriter(tmp_path / "b.mp4", 8) as writer:
        writer.add(FRAMES[0], 1.0)
        writer.add(FRAMES[0], 1.0)


@pytest.mark.parametrize("colours", [Colours(1, 1, 1, 1), Colours(6, 6, 6, 1), Colours(1, 1, 1, 2)])
def test_colours_are_tagged_and_meant(tmp_path, colours):
    frames = np.stack([np.full((32, 48, 3), (200, 30, 90), np.uint8)] * 2)
    with VideoWriter(tmp_path / "a.mp4", 8, colours=colours) as writer:
        for frame in frames:
            writer.add(frame)
    assert colours_of(tmp_path / "a.mp4") == colours
    assert np.abs(load_video(tmp_path / "a.mp4").frames.astype(int) - frames).max() < 6


def test_colours_without_tags_are_bt709(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=Fraction(8))
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for frame in FRAMES:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode())
    assert colours_of(tmp_path / "a.mp4") == Colours(1, 1, 1, 1)
