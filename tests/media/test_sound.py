"""Sound of a source in a written video: copied or encoded again, cut, and in step with the pictures."""

import av
import numpy as np
import pytest

from omni_video_hf.media.video_reader import MediaError
from omni_video_hf.media.video_writer import Sound, VideoWriter

RATE, FPS = 48000, 25
CLICKS = [0.5, 1.1, 1.9, 2.4]  # seconds


def source(path, codec="aac", seconds=3.0, sound_seconds=3.0, tracks=1):
    """A video with clicks in its sound."""
    clicks = np.zeros((1, int(RATE * sound_seconds)), np.float32)
    for time in CLICKS:
        start = int(time * RATE)
        burst = 0.8 * np.sin(np.arange(480) * 0.4).astype(np.float32)
        part = clicks[0, start : start + 480]
        part += burst[: len(part)]
    with av.open(str(path), "w") as file:
        video = file.add_stream("libvpx-vp9" if path.suffix == ".webm" else "libx264", rate=FPS)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        sounds = [file.add_stream(codec, rate=RATE, layout="mono") for _ in range(tracks)]
        for _ in range(int(FPS * seconds)):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8), format="rgb24")
            file.mux(video.encode(frame))
        file.mux(video.encode())
        for sound in sounds:
            for start in range(0, clicks.shape[1], 960):
                block = clicks[:, start : start + 960]
                frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
                frame.rate, frame.pts = RATE, start
                file.mux(sound.encode(frame))
            file.mux(sound.encode())
    return path


def write(path, sound, seconds=2.0):
    with VideoWriter(path, FPS, sound=sound) as writer:
        for _ in range(int(FPS * seconds)):
            writer.add(np.zeros((32, 48, 3), np.uint8))
    return writer.notes


def waves(path):
    """The sound of every track, from the start of the pictures, as samples at RATE."""
    found = []
    with av.open(str(path)) as file:
        video = file.streams.video[0]
        origin = float((video.start_time or 0) * video.time_base)
        number = len(file.streams.audio)
    for track in range(number):
        with av.open(str(path)) as file:
            wave = np.zeros(RATE * 10, np.float32)
            resampler = av.AudioResampler("fltp", "mono", RATE)
            for frame in file.decode(audio=track):
                start = round((float(frame.pts * frame.time_base) - origin) * RATE)
                samples = np.concatenate([part.to_ndarray()[0] for part in resampler.resample(frame)])
                if start < 0:
                    samples, start = samples[-start:], 0
                wave[start : start + len(samples)] = samples
            found.append(wave)
    return found


def click_times(wave):
    loud = np.flatnonzero(np.abs(wave) > 0.3) / RATE
    return [float(time) for time, step in zip(loud, np.diff(loud, prepend=-1), strict=True) if step > 0.1]


@pytest.mark.parametrize("start", [0.0, 0.8])
@pytest.mark.parametrize(
    ("given", "codec", "written", "is_copied"),
    [
        ("in.mp4", "aac", "out.mp4", True),
        ("in.mov", "aac", "out.mkv", True),
        ("in.webm", "libopus", "out.webm", True),
        ("in.mkv", "libopus", "out.mov", False),
        ("in.mp4", "aac", "out.webm", False),
    ],
)
def test_clicks_stay_in_step(tmp_path, given, codec, written, is_copied, start):
    notes = write(tmp_path / written, Sound(source(tmp_path / given, codec), start))
    assert bool(notes) != is_copied
    (wave,) = waves(tmp_path / written)
    expected = [time - start for time in CLICKS if 0 <= time - start < 2]
    found = click_times(wave)
    assert len(found) == len(expected)
    assert np.abs(np.array(found) - expected).max() < 1 / FPS


def test_sound_is_cut_to_the_pictures(tmp_path):
    path = source(tmp_path / "in.mp4", sound_seconds=6.0)
    write(tmp_path / "out.mp4", Sound(path), seconds=1.0)
    with av.open(str(tmp_path / "out.mp4")) as file:
        audio = file.streams.audio[0]
        assert float(audio.duration * audio.time_base) == pytest.approx(1.0, abs=0.05)


def test_sound_that_is_shorter(tmp_path):
    path = source(tmp_path / "in.mp4", sound_seconds=1.0)
    write(tmp_path / "out.mp4", Sound(path), seconds=2.0)
    assert click_times(waves(tmp_path / "out.mp4")[0]) == pytest.approx([0.5], abs=1 / FPS)
    with av.open(str(tmp_path / "out.mp4")) as file:
        assert file.streams.video[0].frames == 50


def test_two_tracks_and_none(tmp_path):
    write(tmp_path / "two.mp4", Sound(source(tmp_path / "in.mp4", tracks=2)))
    assert [len(click_times(wave)) for wave in waves(tmp_path / "two.mp4")] == [3, 3]
    assert not write(tmp_path / "none.mp4", Sound(source(tmp_path / "in0.mp4", tracks=0)))
    assert not waves(tmp_path / "none.mp4")


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "frames"])
def test_formats_without_sound_say_so(tmp_path, name):
    assert "sound was left out" in write(tmp_path / name, Sound(source(tmp_path / "in.mp4")), 0.2)[0]


def test_a_copy_is_not_decoded(tmp_path):
    path = source(tmp_path / "in.mp4")
    write(tmp_path / "out.mp4", Sound(path), seconds=3.0)

    def packets(name):
        with av.open(str(tmp_path / name)) as file:
            return [bytes(packet) for packet in file.demux(file.streams.audio[0]) if packet.size]

    copied = packets("out.mp4")
    assert len(copied) > 100
    assert copied == packets("in.mp4")[: len(copied)]


def test_a_missing_source(tmp_path):
    with pytest.raises(MediaError, match="no such file"):
        write(tmp_path / "out.mp4", Sound(tmp_path / "in.mp4"))
    assert not list(tmp_path.iterdir())
