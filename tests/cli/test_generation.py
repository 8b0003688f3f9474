"""Whole clips: what an edit keeps of its source, and the formats of results."""

import inspect
from fractions import Fraction

import av
import numpy as np
import pytest
from typer.testing import CliRunner

from omni_video_hf.cli.checks import seconds_of
from omni_video_hf.cli.console import UsageProblem
from omni_video_hf.cli.main import app
from omni_video_hf.media.images import load_image
from omni_video_hf.media.record import read_media_record
from omni_video_hf.media.video_loading import load_video
from omni_video_hf.media.video_reader import read_index
from omni_video_hf.media.writing.encoding import Colours, colours_of
from omni_video_hf.media.writing.span import ClipSpan
from omni_video_hf.pipelines.pipeline_omni_video import OmniVideoPipeline
from omni_video_hf.utils.kept_steps import KeptSteps

FAST = ["--steps", "1", "--seed", "0", "--device", "cpu", "--guidance-scale", "1", "--max-context-length", "900"]
HAS_WINDOWS = "long_video" in inspect.signature(OmniVideoPipeline.__call__).parameters


@pytest.fixture
def run(converted, tmp_path, monkeypatch):
    """Run the command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments):
        result = CliRunner().invoke(app, [*map(str, arguments), "--model", str(converted)])
        assert result.exit_code == 0, result.output
        return result

    return invoke


def source(path, stamps, size=(64, 32), sound=True):
    """A clip of a phone: variable frame rate, BT.601 colours, sound; frame number n has the shade 20 n, modulo 256."""
    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        context = video.codec_context
        context.time_base = Fraction(1, 1000)
        context.colorspace, context.color_primaries, context.color_trc, context.color_range = 6, 6, 6, 1
        audio = file.add_stream("aac", rate=48000, layout="mono") if sound else None
        for number, stamp in enumerate(stamps):
            picture = np.full((size[1], size[0], 3), 20 * number % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            file.mux(video.encode(frame))
        file.mux(video.encode())
        for start in range(0, 48000 if audio else 0, 1024):
            noise = np.random.default_rng(start).normal(0, 0.1, (1, 1024)).astype(np.float32)
            block = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
            block.rate, block.pts = 48000, start
            file.mux(audio.encode(block))
        if audio:
            file.mux(audio.encode())
    return path


VARYING = [0, 100, 200, 400, 500, 700]


def packets_of_sound(path):
    with av.open(str(path)) as file:
        return [bytes(packet) for packet in file.demux(file.streams.audio[0]) if packet.size]


def test_the_clip_stays_the_clip(run, tmp_path):
    source(tmp_path / "in.mp4", VARYING, (70, 50))
    result = run("edit", "in.mp4", "more red", "-o", "out.mp4", *FAST)
    index = read_index(tmp_path / "out.mp4")
    assert index.times.tolist() == pytest.approx([stamp / 1000 for stamp in VARYING], abs=1e-4)
    assert (index.info.width, index.info.height) == (70, 50)
    assert "back to the size of the source" in result.stderr
    assert colours_of(tmp_path / "out.mp4") == Colours(6, 6, 6, 1)
    copied = packets_of_sound(tmp_path / "out.mp4")
    assert len(copied) > 30
    assert copied == packets_of_sound(tmp_path / "in.mp4")[: len(copied)]
    made = read_media_record(tmp_path / "out.mp4")
    assert (made["start"], made["settings"]["num_frames"]) == (0, 9)  # the last frame was repeated three times


def test_a_part_of_a_clip(run, tmp_path):
    source(tmp_path / "in.mp4", range(0, 1000, 100))
    run("edit", "in.mp4", "more red", "-o", "out.webm", "--start", "0.25", "--duration", "00:00.5", *FAST)
    index = read_index(tmp_path / "out.webm")
    assert index.info.num_frames == 6  # the frame that is shown at 0.25 s, and those up to 0.75 s
    assert index.info.fps == pytest.approx(10)
    with av.open(str(tmp_path / "out.webm")) as file:
        assert [stream.type for stream in file.streams] == ["video", "audio"]


def test_numbered_pictures(run, tmp_path):
    (tmp_path / "frames").mkdir()
    run("generate", "a fox", "-o", "frames/%04d.png", "--size", "64x32", "--frames", 5, *FAST[:6])
    assert sorted(path.name for path in (tmp_path / "frames").iterdir()) == [f"000{n}.png" for n in range(1, 6)]
    assert load_image(tmp_path / "frames" / "0005.png").size == (64, 32)


def test_an_interrupted_command_goes_on(run, converted, tmp_path, monkeypatch):
    arguments = ["generate", "a fox", "--size", "64x32", "--frames", 5, "--steps", 3, "--device", "cpu"]
    end_step = KeptSteps.end_step

    def interrupted(steps):
        end_step(steps)
        if steps._number == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(KeptSteps, "end_step", interrupted)
    with pytest.raises((AssertionError, KeyboardInterrupt)):
        run(*arguments, "-o", "out.mp4", "--resume")
    assert not (tmp_path / "out.mp4").exists()
    assert (tmp_path / "out.mp4.partial" / "step-00001.safetensors").is_file()
    monkeypatch.setattr(KeptSteps, "end_step", end_step)
    refused = CliRunner().invoke(
        app, [*map(str, arguments), "-o", "out.mp4", "--resume", "--flow-shift", "4", "--model", str(converted)]
    )
    assert refused.exit_code and "holds steps of other settings" in refused.output
    result = run(*arguments, "-o", "out.mp4", "--resume")
    assert "2 finished steps are used" in result.stderr
    seed = read_media_record(tmp_path / "out.mp4")["seed"]
    run(*arguments, "-o", "whole.mp4", "--seed", seed)
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert not (tmp_path / "out.mp4.partial").exists()


@pytest.mark.skipif(not HAS_WINDOWS, reason="the pipeline has no windows")
def test_a_long_clip_is_edited_in_windows_and_says_so(run, tmp_path):
    source(tmp_path / "in.mp4", range(0, 2100, 100), sound=False)
    arguments = ["--steps", "1", "--seed", "0", "--device", "cpu", "--window-frames", "9"]
    result = run("edit", "in.mp4", "more red", "-o", "out.mp4", *arguments)
    assert "21 frames (2.10 s) are edited in" in " ".join(result.stderr.split())
    assert "windows of 9 frames" in " ".join(result.stderr.split())
    assert read_index(tmp_path / "out.mp4").info.num_frames == 21


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0), ("12.5", 12.5), (".5", 0.5), ("1:30", 90), ("1:02:03.5", 3723.5), ("75", 75)]
)
def test_times(text, seconds):
    assert seconds_of("--start", text) == seconds


@pytest.mark.parametrize("text", ["", "-1", "1:60", "a", "1:2:3:4", "1e3", "1.5:30", "nan", "inf"])
def test_what_is_no_time(text):
    with pytest.raises(UsageProblem, match="must be seconds, mm:ss or hh:mm:ss"):
        seconds_of("--start", text)


def test_spans(tmp_path):
    path = source(tmp_path / "in.mp4", VARYING, sound=False)
    span = ClipSpan.of(path, 0.15, 0.3)
    assert span.numbers == (1, 2, 3)
    assert span.times == pytest.approx((0, 0.1, 0.3))
    assert span.start == pytest.approx(0.1)
    assert span.last == pytest.approx(0.05, abs=1e-3)
    clip = span.read(4)
    assert clip.frames.shape == (5, 32, 64, 3)
    assert (clip.frames[:, 0, 0, 0] / 20).round().tolist() == [1, 2, 3, 3, 3]
    steady = ClipSpan.of(path, fps=10)
    assert steady.times is None
    assert np.array_equal(steady.read().frames, load_video(path, fps=10).frames)
