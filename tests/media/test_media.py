import os
import struct
import time
import tracemalloc
import wave
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange
from PIL import Image

from omni_video_hf.media import download, video_loading, video_reader
from omni_video_hf.media.clip import VideoClip
from omni_video_hf.media.frame_sampling import FRAME_SAMPLING, sample_indices
from omni_video_hf.media.images import contact_sheet, load_image, save_image
from omni_video_hf.media.record import read_media_record
from omni_video_hf.media.video_loading import load_sampled_video, load_video, open_media, probe_frames
from omni_video_hf.media.video_reader import MediaError, decode_frames, over_background, probe_video, read_index
from omni_video_hf.media.video_writer import save_video
from omni_video_hf.utils.read_budget import Stopwatch, current_budget, read_budget

BT709, BT601, BT2020 = 1, 5, 9  # colour matrices in ITU-T H.273
LUMA = {BT709: (0.2126, 0.0722), BT601: (0.299, 0.114), BT2020: (0.2627, 0.0593)}  # shares of red and blue
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
FLAT = [RED, GREEN, BLUE, (255, 255, 0), (0, 255, 255), (255, 0, 255), (0, 0, 0), WHITE, (200, 30, 90)]


def flat(colour, height=32, width=48):
    return np.full((height, width, len(colour)), colour, np.uint8)


def numbered(count, height=32, width=48):
    """Frames of even grey whose brightness is their number times four."""
    return np.stack([flat((4 * number,) * 3, height, width) for number in range(count)])


def numbers(frames):
    return (frames.mean((1, 2, 3)) / 4).round().astype(int).tolist()


def quadrants():
    """Red top left, green top right, blue bottom left, white bottom right; 48 wide and 32 high."""
    frame = flat(WHITE)
    frame[:16, :24], frame[:16, 24:], frame[16:, :24] = RED, GREEN, BLUE
    return frame


def corners(frame):
    """Names of the colours top left, top right, bottom left, bottom right."""
    names = {RED: "r", GREEN: "g", BLUE: "b", WHITE: "w"}
    found = ""
    for pixel in (frame[4, 4], frame[4, -5], frame[-5, 4], frame[-5, -5]):
        found += names[tuple(((pixel > 127) * 255).tolist())]
    return found


def luma_and_chroma(picture, red, blue):
    """The three planes of an RGB picture in limited range, by the definition and not by what reads them back."""
    rgb = picture / 255
    luma = rgb @ (red, 1 - red - blue, blue)
    chroma = [(rgb[..., 2] - luma) / (1 - blue) / 2, (rgb[..., 0] - luma) / (1 - red) / 2]
    return np.stack([16 + 219 * luma, *(128 + 224 * plane for plane in chroma)]).round().astype(np.uint8)


def write(
    path,
    frames,
    codec="libx264",
    pixels="yuv420p",
    rate=24,
    stamps=None,
    time_base=None,
    source="rgb24",
    setup=None,
    matrix=None,
    container=None,
    **options,
):
    if codec == "libx264":
        options = {"sc_threshold": 0} | options  # key frames where `g` says, not at every change of colour
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate, options={key: str(value) for key, value in options.items()})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        if setup:
            setup(stream)
        if time_base:
            stream.codec_context.time_base = time_base
        for number, picture in enumerate(frames):
            if matrix:
                frame = av.VideoFrame.from_ndarray(luma_and_chroma(picture, *LUMA[matrix]), format="yuv444p")
            else:
                frame = av.VideoFrame.from_ndarray(picture, format=source)
            if stamps is not None:
                frame.pts, frame.time_base = stamps[number], time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def turn(path, a, b, c, d):
    """Give an MP4 file the display matrix (a b; c d), as phones do instead of turning the pixels."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    data[start : start + 36] = struct.pack(">9i", *(round(65536 * x) for x in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
    path.write_bytes(data)
    return path


def error_of(call, *args, **kwargs):
    """The one line of the `MediaError` that the call must raise."""
    with pytest.raises(MediaError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    return write(tmp_path_factory.mktemp("media") / "steady.mp4", numbered(48), g=8, bf=2)


@pytest.fixture(scope="module")
def varying(tmp_path_factory):
    """Frames 0..9 are shown 1/10 s each, 10..19 1/20 s, 20..28 2/10 s, and the last 1/10 s: 3.4 s in all."""
    path = tmp_path_factory.mktemp("media") / "varying.mp4"
    steps = [100] * 10 + [50] * 10 + [200] * 10
    stamps = np.concatenate([[0], np.cumsum(steps)[:-1]]).tolist()
    return write(path, numbered(30), stamps=stamps, time_base=Fraction(1, 1000), rate=10, bf=0)


class TestReading:
    def test_every_frame_in_order(self, steady):
        clip = load_video(steady)
        assert clip.frames.shape == (48, 32, 48, 3) and clip.frames.dtype == np.uint8
        assert (clip.fps, clip.notes) == (24, ())
        assert numbers(clip.frames) == list(range(48))

    def test_probe(self, steady):
        info = probe_video(steady)
        assert (info.width, info.height, info.fps, info.num_frames, info.duration) == (48, 32, 24, 48, 2)
        assert (info.rotation, info.is_variable_frame_rate, info.color_transfer) == (0, False, "sdr")

    @pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.ts", "a.mpg", "a.flv", "a.mov"])
    def test_containers(self, tmp_path, name):
        codec = {".avi": "mpeg4", ".mpg": "mpeg2video"}.get(name[-4:], "libx264")
        clip = load_video(write(tmp_path / name, numbered(20), codec=codec, rate=25, b=4_000_000, g=1))
        assert numbers(clip.frames) == list(range(20))
        assert clip.fps == pytest.approx(25)

    def test_ntsc_rate_survives_millisecond_stamps(self, tmp_path):
        path = write(tmp_path / "a.mkv", numbered(30), rate=Fraction(24000, 1001))
        assert load_video(path).fps == pytest.approx(24000 / 1001, abs=1e-6)

    def test_one_frame(self, tmp_path):
        clip = load_video(write(tmp_path / "one.mp4", numbered(1)))
        assert clip.frames.shape == (1, 32, 48, 3)
        assert clip.fps == pytest.approx(24)

    def test_odd_size(self, tmp_path):
        picture = flat(BLUE, 35, 63)
        clip = load_video(write(tmp_path / "odd.mp4", [picture] * 3, pixels="yuv444p"))
        assert clip.frames.shape == (3, 35, 63, 3)
        assert np.abs(clip.frames[0].astype(int) - picture).mean() < 3

    def test_grey(self, tmp_path):
        clip = load_video(write(tmp_path / "grey.mkv", numbered(5), codec="ffv1", pixels="gray"))
        assert numbers(clip.frames) == list(range(5))

    def test_animated_gif(self, tmp_path):
        path = tmp_path / "a.gif"
        pictures = [Image.fromarray(frame) for frame in numbered(6) * 8]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
        clip = load_video(path)
        assert numbers(clip.frames) == [0, 8, 16, 24, 32, 40]
        assert clip.fps == pytest.approx(10)

    def test_only_wanted_frames_are_converted(self, steady, monkeypatch):
        seen = []
        convert = video_loading.decode_frames
        monkeypatch.setattr(
            video_loading,
            "decode_frames",
            lambda index, wanted: seen.append(list(wanted)) or convert(index, wanted),
        )
        assert numbers(load_video(steady, num_frames=3).frames) == [0, 24, 47]
        assert seen == [[0, 24, 47]]

    @pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
    def test_jumping_finds_what_reading_through_finds(self, tmp_path, name):
        rng = np.random.default_rng(0)
        noise = np.kron(rng.integers(0, 255, (90, 4, 6, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
        path = write(tmp_path / name, noise, g=10, bf=3)
        everything = load_video(path).frames
        for number in (0, 29, 30, 31, 58, 89):
            found = dict(decode_frames(read_index(path), [number, 89]))
            assert (found[number] == everything[number]).all()

    def test_trimmed_without_encoding(self, tmp_path):
        """An edit list hides the first half second, as phones write it; the header still counts all frames."""
        source = write(tmp_path / "whole.mp4", numbered(48), g=6, bf=0)
        path = tmp_path / "trimmed.mp4"
        with av.open(str(source)) as whole, av.open(str(path), "w") as trimmed:
            stream = trimmed.add_stream_from_template(whole.streams.video[0])
            for packet in whole.demux(video=0):
                if packet.dts is not None:
                    half = round(Fraction(1, 2) / packet.time_base)
                    packet.pts, packet.dts, packet.stream = packet.pts - half, packet.dts - half, stream
                    trimmed.mux(packet)
        assert probe_video(path).num_frames == 36
        assert numbers(load_video(path).frames) == list(range(12, 48))
        assert numbers(load_video(path, num_frames=2).frames) == [12, 47]


class TestGeometry:
    @pytest.mark.parametrize(
        ("degrees", "matrix", "size", "seen"),
        [
            (90, (0, -1, 1, 0), (32, 48), "gwrb"),
            (270, (0, 1, -1, 0), (32, 48), "brwg"),
            (180, (-1, 0, 0, -1), (48, 32), "wbgr"),
        ],
    )
    def test_rotation(self, tmp_path, degrees, matrix, size, seen):
        path = turn(write(tmp_path / "a.mp4", [quadrants()] * 3, crf=5), *matrix)
        info = probe_video(path)
        assert (info.width, info.height) == size
        assert info.rotation == degrees and not info.is_mirrored
        clip = load_video(path)
        assert clip.frames.shape[1:3] == size[::-1]
        assert corners(clip.frames[0]) == seen
        assert "turned" in clip.notes[0]

    def test_mirrored(self, tmp_path):
        path = turn(write(tmp_path / "a.mp4", [quadrants()] * 2), -1, 0, 0, 1)
        assert probe_video(path).is_mirrored
        assert corners(load_video(path).frames[0]) == "grwb"

    def test_slanted_is_refused(self, tmp_path):
        path = turn(write(tmp_path / "a.mp4", [quadrants()] * 2), 0.7071, 0.7071, -0.7071, 0.7071)
        assert "45" in error_of(load_video, path)

    def test_oblong_pixels(self, tmp_path):
        def setup(stream):
            stream.codec_context.sample_aspect_ratio = Fraction(4, 3)

        clip = load_video(write(tmp_path / "a.mp4", [quadrants()] * 2, setup=setup))
        assert clip.frames.shape == (2, 32, 64, 3)
        assert corners(clip.frames[0]) == "rgbw"
        assert "64x32" in clip.notes[0]

    def test_interlaced_is_noted(self, tmp_path):
        path = write(tmp_path / "a.mpg", [quadrants()] * 3, codec="mpeg2video", rate=25, flags="+ilme+ildct")
        assert "interlaced" in load_video(path).notes[0]


class TestColour:
    @pytest.mark.parametrize("matrix", LUMA)
    def test_tagged_matrix_is_followed(self, tmp_path, matrix):
        def setup(stream):
            stream.codec_context.colorspace, stream.codec_context.color_range = matrix, ColorRange.MPEG

        path = write(tmp_path / "a.mp4", [flat(colour) for colour in FLAT], setup=setup, matrix=matrix, crf=5)
        seen = load_video(path).frames.mean((1, 2))
        assert np.abs(seen - FLAT).max() < 4

    @pytest.mark.parametrize(("code", "name"), [(16, "PQ"), (18, "HLG")])
    def test_hdr(self, tmp_path, code, name):
        def setup(stream):
            context = stream.codec_context
            context.colorspace, context.color_primaries, context.color_trc = BT2020, 9, code
            context.color_range = ColorRange.MPEG

        frames = [flat(colour) for colour in FLAT]
        path = write(tmp_path / "a.mp4", frames, pixels="yuv420p10le", setup=setup, matrix=BT2020, crf=5)
        clip = load_video(path)
        assert np.abs(clip.frames.mean((1, 2)) - FLAT).max() < 4
        assert name in clip.notes[0] and "tone mapping" in clip.notes[0]
        assert probe_video(path).color_transfer == name.lower()

    @pytest.mark.parametrize(("name", "codec"), [("a.mkv", "ffv1"), ("a.webm", "libvpx-vp9")])
    def test_transparent_parts_are_white(self, tmp_path, name, codec):
        picture = flat((255, 0, 0, 255))
        picture[:, 24:] = (0, 0, 0, 0)
        options = {"deadline": "realtime", "cpu-used": 8} if codec == "libvpx-vp9" else {}
        clip = load_video(write(tmp_path / name, [picture] * 3, codec, "yuva420p", source="rgba", **options))
        assert np.abs(clip.frames[:, 10, 5].astype(int) - RED).max() < 6
        assert np.abs(clip.frames[:, 10, 43].astype(int) - WHITE).max() < 6
        assert "over white" in clip.notes[0]

    def test_saturated_colours_survive_a_round_trip(self, tmp_path):
        frames = np.stack([flat(colour) for colour in FLAT])
        save_video(frames, tmp_path / "a.mp4", 8)
        seen = load_video(tmp_path / "a.mp4").frames
        assert np.abs(seen.astype(int) - frames).mean((1, 2, 3)).max() < 3
        with av.open(str(tmp_path / "a.mp4")) as file:
            context = file.streams.video[0].codec_context
            assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (
                1,
                1,
                1,
                1,
            )


class TestSelection:
    def test_rate(self, steady):
        clip = load_video(steady, fps=12)
        assert clip.fps == 12
        assert numbers(clip.frames) == list(range(0, 48, 2))
        assert numbers(load_video(steady, fps=48).frames) == [number // 2 for number in range(96)]

    def test_number_keeps_duration(self, steady):
        clip = load_video(steady, num_frames=5)
        assert numbers(clip.frames) == [0, 12, 24, 35, 47]
        assert (5 - 1) / clip.fps == pytest.approx(47 / 24)
        assert numbers(load_video(steady, num_frames=1).frames) == [0]

    def test_rate_and_number_start_at_the_start(self, steady):
        clip = load_video(steady, fps=8, num_frames=4)
        assert (numbers(clip.frames), clip.fps) == ([0, 3, 6, 9], 8)

    def test_varying_rate_goes_by_time(self, varying):
        info = probe_video(varying)
        assert info.is_variable_frame_rate
        assert (info.num_frames, info.duration) == (30, pytest.approx(3.4))
        clip = load_video(varying, fps=10)
        assert numbers(clip.frames)[:15] == [*range(10), 10, 12, 14, 16, 18]
        assert numbers(clip.frames)[15:] == [*(number for number in range(20, 29) for _ in range(2)), 29]

    def test_varying_rate_by_number_goes_by_time(self, varying):
        clip = load_video(varying, num_frames=12)  # 0.3 s apart
        assert numbers(clip.frames) == [0, 3, 6, 9, 14, 20, 22, 23, 24, 26, 28, 29]
        assert clip.fps == pytest.approx(1 / 0.3)

    def test_varying_rate_alone_is_made_steady_and_noted(self, varying):
        clip = load_video(varying)
        assert len(clip.frames) / clip.fps == pytest.approx(3.4, abs=0.1)
        assert any("frame rate varies" in note for note in clip.notes)

    def test_dropped_frame_is_repeated(self, tmp_path):
        stamps = [number for number in range(21) if number != 10]
        path = write(tmp_path / "a.mp4", numbered(21)[stamps], stamps=stamps, time_base=Fraction(1, 20), rate=20)
        clip = load_video(path)
        assert clip.fps == pytest.approx(20)
        assert numbers(clip.frames) == [*range(10), 9, *range(11, 21)]

    def test_too_many_frames(self, steady):
        message = error_of(load_video, steady, num_frames=49)
        assert "48" in message and "49" in message and "steady.mp4" in message
        message = error_of(load_video, steady, num_frames=17, fps=8)
        assert "16" in message and "17" in message

    def test_longest_result_is_checked_before_decoding(self, steady, monkeypatch):
        monkeypatch.setattr(video_loading, "decode_frames", lambda *_: pytest.fail("decoded"))
        message = error_of(load_video, steady, max_frames=17)
        assert "48" in message and "17" in message

    @pytest.mark.parametrize("name", ["fps", "num_frames", "max_frames", "source_fps"])
    @pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
    def test_unusable_arguments(self, name, value):
        assert name in error_of(load_video, numbered(3), **{name: value})


class TestFramesInMemory:
    @pytest.mark.parametrize(
        "make",
        [
            lambda frames: frames,
            lambda frames: frames.transpose(0, 3, 1, 2),
            lambda frames: (frames / 255).astype(np.float32),
            list,
            lambda frames: [Image.fromarray(frame) for frame in frames],
            lambda frames: torch.from_numpy(frames).permute(0, 3, 1, 2),
            lambda frames: torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255,
            lambda frames: (torch.from_numpy(frames).double() / 255).bfloat16(),
            lambda frames: VideoClip(frames, None),
        ],
    )
    def test_every_form(self, make):
        frames = numbered(7)
        assert np.abs(load_video(make(frames)).frames.astype(int) - frames).max() <= 1

    def test_rate(self):
        assert load_video(numbered(8)).fps is None
        clip = load_video(numbered(8), source_fps=8, fps=4)
        assert (numbers(clip.frames), clip.fps) == ([0, 2, 4, 6], 4)
        assert load_video(clip, num_frames=2).fps == pytest.approx(4 / 3)
        assert "`fps` 4: frames without a frame rate" in error_of(load_video, numbered(8), fps=4)

    @pytest.mark.parametrize(
        ("frames", "word"),
        [
            (np.full((2, 8, 8, 3), -0.5), "0..1"),
            (np.full((2, 8, 8, 3), np.nan), "0..1"),
            (np.full((2, 8, 8, 3), 200.0), "0..1"),
            (np.zeros((2, 8, 8, 3), np.int64), "int64"),
            (np.zeros((8, 8), np.uint8), "shape"),
            (np.zeros((8, 8, 8, 5), np.uint8), "shape"),
            (np.zeros((1, 2, 8, 8, 3), np.uint8), "shape"),
            (np.zeros((0, 8, 8, 3), np.uint8), "shape"),
            ([], "no frames"),
            ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], "the same size"),
            (Image.new("RGB", (8, 8)), "Image"),
            (7, "int"),
        ],
    )
    def test_refused(self, frames, word):
        assert word in error_of(load_video, frames)


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    noise = np.random.default_rng(0).integers(0, 255, (16, 80, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    frames = [noise[:, 4 * number : 4 * number + 96] for number in range(50)]
    return write(tmp_path_factory.mktemp("media") / "moving.mp4", frames, g=25, bf=3)


class TestSkipping:
    """On the way to a selected frame, frames that no other frame refers to are not decoded."""

    @pytest.mark.parametrize("wanted", [[49], [3, 24, 25, 26], [7, 8, 30, 44], list(range(0, 50, 7))])
    def test_the_selected_frames_are_those_of_a_full_decode(self, moving, wanted):
        index = read_index(moving)
        everything = dict(decode_frames(index, range(50)))
        selected = dict(decode_frames(index, wanted))
        assert sorted(selected) == wanted
        assert all(np.array_equal(selected[number], everything[number]) for number in wanted)

    def test_less_is_decoded(self, moving):
        index = read_index(moving)
        decoded = [list(video_reader._decode(index, [(0, [24])], may_skip)) for may_skip in (False, True)]
        assert len(decoded[1]) < 0.7 * len(decoded[0])


class TestBrokenFiles:
    @pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
    @pytest.mark.parametrize("name", ["moov_last.mp4", "moov_first.mp4", "a.mkv", "a.gif", "a.flv"])
    def test_cut_short(self, tmp_path, name, share):
        rng = np.random.default_rng(0)
        noise = rng.integers(0, 255, (24, 32, 48, 3), dtype=np.uint8)
        whole = tmp_path / name
        if name == "a.gif":
            pictures = [Image.fromarray(frame) for frame in noise[:6]]
            pictures[0].save(whole, save_all=True, append_images=pictures[1:], duration=100)
        else:
            options = {"movflags": "+faststart"} if name == "moov_first.mp4" else None
            write(whole, noise, container=options)
        load_video(whole)
        cut = tmp_path / f"cut_{name}"
        cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
        message = error_of(load_video, cut, num_frames=1)
        assert cut.name in message and "cut short" in message

    def test_gif_that_ffmpeg_miscounts(self, tmp_path):
        """Two pictures without a time between them come out as one: refused, but not called cut short."""
        noise = np.random.default_rng(0).integers(0, 255, (6, 32, 48, 3), dtype=np.uint8)
        pictures = [Image.fromarray(frame) for frame in noise]
        pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:])
        message = error_of(load_video, tmp_path / "a.gif")
        assert "5 of the 6 frames of the GIF" in message and "MP4" in message

    def test_the_message_contains_both_numbers(self, tmp_path):
        path = write(tmp_path / "a.mp4", numbered(48), container={"movflags": "+faststart"}, bf=0, g=1)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.7)])
        message = error_of(probe_video, path)
        assert "promises 48 frames but only" in message

    def test_damage_in_the_middle(self, tmp_path):
        rng = np.random.default_rng(0)
        path = write(tmp_path / "a.mkv", rng.integers(0, 255, (12, 32, 48, 3), dtype=np.uint8), codec="ffv1", g=1)
        data = bytearray(path.read_bytes())
        middle = len(data) // 2
        data[middle : middle + 3000] = bytes(3000)
        path.write_bytes(data)
        assert "a.mkv" in error_of(load_video, path)

    def test_starts_between_key_frames(self, tmp_path):
        source = write(tmp_path / "whole.mp4", numbered(30), g=10, bf=0)
        path = tmp_path / "headless.mkv"
        with av.open(str(source)) as whole, av.open(str(path), "w") as headless:
            stream = headless.add_stream_from_template(whole.streams.video[0])
            for packet in list(whole.demux(video=0))[4:-1]:
                packet.stream = stream
                headless.mux(packet)
        assert "26 frames but only" in error_of(load_video, path)

    def test_sound_only(self, tmp_path):
        with wave.open(str(tmp_path / "a.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(bytes(16000))
        assert "no video stream (found: audio)" in error_of(load_video, tmp_path / "a.wav")

    @pytest.mark.parametrize("suffix", [".jpg", ".png", ".mp4"])
    def test_picture(self, tmp_path, suffix):
        Image.new("RGB", (8, 8)).save(tmp_path / f"a{suffix}", format="PNG" if suffix == ".mp4" else None)
        assert "image task" in error_of(load_video, tmp_path / f"a{suffix}")

    @pytest.mark.parametrize(
        ("name", "content", "word"),
        [
            ("empty.mp4", b"", "0 bytes"),
            ("text.mp4", b"hello\n" * 500, "not a video"),
            ("text.txt", b"hello\n" * 500, "not a video"),
            ("list.m3u8", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", "not a video"),
            ("list.ffconcat", b"ffconcat version 1.0\nfile steady.mp4\n", "not a video"),
        ],
    )
    def test_no_video(self, tmp_path, name, content, word):
        (tmp_path / name).write_bytes(content)
        message = error_of(load_video, tmp_path / name)
        assert word in message and name in message

    def test_missing_and_folder(self, tmp_path):
        assert "no such file" in error_of(load_video, tmp_path / "a.mp4")
        assert "folder" in error_of(load_video, str(tmp_path))
        assert "no such file" in error_of(load_image, tmp_path / "a.png")
        assert "folder" in error_of(load_image, tmp_path)


class TestImages:
    @pytest.mark.parametrize(
        ("mode", "colour", "seen"),
        [
            ("L", 80, (80, 80, 80)),
            ("1", 1, WHITE),
            ("LA", (0, 0), WHITE),
            ("RGBA", (*RED, 255), RED),
            ("RGBA", (0, 0, 0, 0), WHITE),
            ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
            ("CMYK", (0, 255, 255, 0), RED),
            ("I;16", 32896, (128, 128, 128)),
            ("I;16", 200, (1, 1, 1)),
            ("F", 0.5, (128, 128, 128)),
        ],
    )
    def test_modes(self, mode, colour, seen):
        picture = load_image(Image.new(mode, (6, 4), colour))
        assert (picture.mode, picture.size) == ("RGB", (6, 4))
        assert picture.getpixel((0, 0)) == pytest.approx(seen, abs=1)

    def test_palette_with_transparency(self, tmp_path):
        picture = Image.new("P", (4, 4), 1)
        picture.putpalette([255, 0, 0, 0, 0, 0])
        picture.putpixel((0, 0), 0)
        picture.save(tmp_path / "a.png", transparency=1)
        seen = load_image(tmp_path / "a.png")
        assert (seen.getpixel((0, 0)), seen.getpixel((3, 3))) == (RED, WHITE)

    def test_sixteen_bit_file(self, tmp_path):
        Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "a.png")
        assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (156, 156, 156)

    def test_phone_orientation(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # show turned by 90 degrees clockwise
        Image.fromarray(quadrants()).save(tmp_path / "a.jpg", exif=exif, quality=95)
        seen = load_image(tmp_path / "a.jpg")
        assert seen.size == (32, 48)
        assert corners(np.asarray(seen)) == "brwg"
        save_image(seen, tmp_path / "b.jpg")
        assert load_image(tmp_path / "b.jpg").size == (32, 48)

    @pytest.mark.parametrize(
        "make",
        [
            lambda picture: picture,
            lambda picture: picture.transpose(2, 0, 1),
            lambda picture: torch.from_numpy(picture).permute(2, 0, 1) / 255,
            lambda picture: np.dstack([picture, np.full((32, 48), 255, np.uint8)]),
        ],
    )
    def test_arrays(self, make):
        assert (np.asarray(load_image(make(quadrants()))) == quadrants()).all()

    def test_grey_array(self):
        assert load_image(np.full((4, 6), 0.2)).getpixel((0, 0)) == (51, 51, 51)

    def test_refused(self, tmp_path, steady):
        assert "0..1" in error_of(load_image, np.linspace(-1, 1, 48).reshape(4, 4, 3))
        assert "shape" in error_of(load_image, np.zeros((0, 4, 3), np.uint8))
        assert "NoneType" in error_of(load_image, None)
        assert "not an image" in error_of(load_image, steady)
        (tmp_path / "empty.png").touch()
        assert "0 bytes" in error_of(load_image, tmp_path / "empty.png")

    @pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
    def test_cut_short(self, tmp_path, name):
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        for share in (0.3, 0.9):
            (tmp_path / name).write_bytes(data[: int(len(data) * share)])
            assert name in error_of(load_image, tmp_path / name)

    def test_animation(self, tmp_path):
        pictures = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
        pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:])
        assert "2 images" in error_of(load_image, tmp_path / "a.gif")


class TestOpening:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [("a.jpeg", "JPEG"), ("a.PNG", "PNG"), ("noname", "WEBP"), ("a.mp4", "PNG"), ("b.gif", "GIF")],
    )
    def test_picture_by_content(self, tmp_path, name, kind):
        Image.new("RGB", (9, 7), RED).save(tmp_path / name, format=kind)
        kind, picture = open_media(tmp_path / name)
        assert (kind, picture.size) == ("image", (9, 7))

    @pytest.mark.parametrize("name", ["noname", "a.jpg", "a.MP4"])
    def test_video_by_content(self, tmp_path, steady, name):
        (tmp_path / name).write_bytes(steady.read_bytes())
        assert open_media(tmp_path / name) == ("video", tmp_path / name)
        assert len(load_video(tmp_path / name).frames) == 48

    def test_neither(self, tmp_path):
        (tmp_path / "a.mp4").write_text("hello")
        assert "a.mp4" in error_of(open_media, tmp_path / "a.mp4")


class TestAddresses:
    @pytest.fixture
    def served(self, monkeypatch):
        """Answers of a stand-in for the Hub's HTTP session, by address."""
        answers = {}

        class Response:
            def __init__(self, content):
                self.content = content

            def raise_for_status(self):
                if self.content is None:
                    raise OSError("404 Not Found")

            def iter_bytes(self):
                yield from (self.content[start : start + 1000] for start in range(0, len(self.content), 1000))

        class Session:
            @contextmanager
            def stream(self, method, url, follow_redirects, timeout):
                assert (method, follow_redirects) == ("GET", True) and timeout > 0
                yield Response(answers.get(url))

        monkeypatch.setattr(download, "get_session", Session)
        return answers

    def test_image_and_video(self, served, tmp_path, steady):
        Image.new("RGB", (9, 7)).save(tmp_path / "a.png")
        served.update({"https://x.org/a": (tmp_path / "a.png").read_bytes(), "https://x.org/b": steady.read_bytes()})
        assert load_image("https://x.org/a").size == (9, 7)
        assert len(load_video("https://x.org/b", num_frames=3).frames) == 3
        assert open_media("https://x.org/b") == ("video", "https://x.org/b")

    def test_errors_name_the_address(self, served):
        assert "https://x.org/none: could not be downloaded (404" in error_of(load_video, "https://x.org/none")
        served["https://x.org/text"] = b"hello" * 1000
        for call in (load_video, load_image, open_media):
            assert error_of(call, "https://x.org/text").startswith("https://x.org/text: is not a")
        with read_budget(max_bytes=2000):
            assert "larger than 2,000 bytes" in error_of(load_video, "https://x.org/text")


def animation(width, height, frames=10):
    """A GIF of about 20 bytes a frame: one pixel changes on a canvas of any size."""
    data = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"\x21\xf9\4\0\x0a\0\0\0\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2\x44\1\0"
    return data + frame * frames + b"\x3b"


class TestBudget:
    @pytest.mark.parametrize("side", [12000, 16000])  # Pillow's own limit lies between the two
    @pytest.mark.parametrize("call", [open_media, load_image, load_video, probe_video])
    def test_a_small_file_with_a_giant_picture(self, tmp_path, call, side):
        path = tmp_path / "a.gif"
        path.write_bytes(animation(side, side))
        message = error_of(call, path)
        assert "a.gif: " in message and "memory" in message and "OMNI_VIDEO_READ_MAX_PIXELS" in message
        assert "damaged" not in message

    def test_the_limit_is_the_callers(self, tmp_path, steady, monkeypatch):
        path = tmp_path / "a.png"
        Image.new("RGB", (30, 20)).save(path)
        with read_budget(max_pixels=599):
            message = error_of(load_image, path)
            assert "a.png: has 30x20 pixels, more than 599" in message and "damaged" not in message
            assert "has 48x32 pixels" in error_of(load_video, steady)
            with read_budget(max_pixels=600):
                assert load_image(path).size == (30, 20)
        monkeypatch.setenv("OMNI_VIDEO_READ_MAX_PIXELS", "599")
        assert "more than 599" in error_of(load_image, path)
        with read_budget(max_bytes=10**6):
            assert "more than 599" in error_of(load_image, path)
        with read_budget(max_pixels=1000):
            assert load_image(path).size == (30, 20)

    def test_unusable_limits(self, monkeypatch):
        for limits, word in (
            ({"max_pixels": 0}, "max_pixels"),
            ({"pixels": 1}, "pixels"),
            ({"max_bytes": "1"}, "'1'"),
        ):
            with pytest.raises(ValueError, match=word), read_budget(**limits):
                pass
        monkeypatch.setenv("OMNI_VIDEO_READ_MAX_SECONDS", "soon")
        with pytest.raises(ValueError, match="OMNI_VIDEO_READ_MAX_SECONDS must be a positive number, got 'soon'"):
            current_budget()

    def test_a_frame_that_grows_in_the_stream(self, tmp_path):
        """The decoder itself knows the limit: what the container says of the size may be wrong."""
        small, large = write(tmp_path / "a.ts", numbered(8)), write(tmp_path / "b.ts", numbered(8, 64, 96))
        path = tmp_path / "c.ts"
        path.write_bytes(small.read_bytes() + large.read_bytes())
        with read_budget(max_pixels=48 * 32):
            assert "c.ts" in error_of(load_video, path)

    def test_oblong_pixels_count_as_they_are_shown(self, tmp_path):
        def setup(stream):
            stream.codec_context.sample_aspect_ratio = Fraction(4, 1)

        path = write(tmp_path / "a.mp4", numbered(4), setup=setup)
        with read_budget(max_pixels=48 * 32 * 2):
            assert "has 192x32 pixels" in error_of(probe_video, path)

    @pytest.mark.parametrize("arguments", [{}, {"fps": 7}, {"num_frames": 5}, {"fps": 5, "num_frames": 4}])
    @pytest.mark.parametrize("name", ["steady", "varying"])
    def test_the_number_of_frames_is_known_before_decoding(self, name, arguments, request, monkeypatch):
        path = request.getfixturevalue(name)
        expected = len(load_video(path, **arguments).frames)
        assert probe_frames(path, **arguments)[1] == expected
        monkeypatch.setattr(video_loading, "decode_frames", lambda *_: pytest.fail("decoded"))
        with read_budget(max_bytes=expected * 48 * 32 * 3 - 1):
            message = error_of(load_video, path, **arguments)
        assert f"{expected} frames of 48x32" in message and "num_frames" in message

    @pytest.mark.parametrize("call", [open_media, load_video, probe_video])
    def test_an_unknown_codec(self, tmp_path, call):
        path = write(tmp_path / "a.mkv", numbered(4))
        path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/XYZ"))
        assert "a.mkv: this FFmpeg does not know its codec" in error_of(call, path)

    def test_a_clip_that_stands_still(self, tmp_path, monkeypatch):
        """Ten frames, the last of them five minutes late: at a steady rate they are thousands."""
        stamps = [*range(9), 3040]
        path = write(tmp_path / "a.mp4", numbered(10), stamps=stamps, time_base=Fraction(1, 10), rate=10, bf=0)
        info, number = probe_frames(path)
        assert (info.num_frames, number) == (10, 3041)

    def test_an_endless_reader_is_stopped(self, steady):
        with read_budget(max_seconds=1e-9):
            message = error_of(load_video, steady)
        assert "takes longer than 1e-09 seconds" in message and "OMNI_VIDEO_READ_MAX_SECONDS" in message

    def test_the_callers_own_time_does_not_count(self):
        watch = Stopwatch(MediaError)
        watch.limit = 0.5
        start = time.monotonic()
        for _ in watch.each(range(3)):
            time.sleep(0.2)
        assert time.monotonic() - start > watch.limit

    @pytest.mark.parametrize("call", [open_media, load_image, load_video, probe_video])
    def test_a_pipe_is_not_waited_for(self, tmp_path, call):
        os.mkfifo(tmp_path / "pipe.mp4")
        assert "is a pipe or a device" in error_of(call, tmp_path / "pipe.mp4")

    def test_a_large_picture_is_converted_in_strips(self):
        """At once, the products of colours and transparency alone would take five times the picture."""
        picture = np.random.default_rng(0).integers(0, 256, (1024, 1024, 4), np.uint8)
        whole = picture.astype(np.int64)
        expected = (whole[..., :3] * whole[..., 3:] + 255 * (255 - whole[..., 3:]) + 127) // 255
        tracemalloc.start()
        result = over_background(picture)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert np.array_equal(result, expected)
        assert peak < 2 * picture.nbytes
        file = Image.fromarray(picture)
        assert np.array_equal(np.asarray(load_image(file)), expected)


class TestSampling:
    def test_upstream_understand(self):
        assert sample_indices("upstream_understand", 81, 8) == [0, 11, 22, 34, 45, 57, 68, 80]
        assert sample_indices("upstream_understand", 250, 6) == [0, 49, 99, 149, 199, 249]
        assert sample_indices("upstream_understand", 5, 8) == [0, 1, 2, 3, 4]
        assert sample_indices("upstream_understand", 1, 8) == [0]

    def test_upstream_edit(self):
        assert sample_indices("upstream_edit", 81, 8) == [0, 11, 22, 33, 45, 56, 67, 79]
        assert sample_indices("upstream_edit", 9, 8) == list(range(8))
        assert sample_indices("upstream_edit", 5, 8) == [0, 0, 0, 1, 1, 2, 2, 3]
        assert sample_indices("upstream_edit", 1, 8) == [0] * 8

    def test_others(self):
        assert sample_indices("uniform", 12, 3) == [2, 6, 10]
        assert sample_indices("first", 12, 3) == [0, 1, 2]
        assert sample_indices("all", 4, 8) == [0, 1, 2, 3]

    @pytest.mark.parametrize("strategy", FRAME_SAMPLING)
    @pytest.mark.parametrize("total", [1, 2, 3, 8, 9, 100])
    def test_within_the_clip(self, strategy, total):
        for wanted in (1, 2, 8):
            found = sample_indices(strategy, total, wanted)
            assert found and found == sorted(found) and found[0] >= 0 and found[-1] < total

    def test_unknown(self):
        message = error_of(sample_indices, "random", 8, 2)
        assert all(name in message for name in FRAME_SAMPLING)
        assert "num_frames" in error_of(sample_indices, "all", 8, 0)

    def test_of_a_file(self, steady):
        assert numbers(load_sampled_video(steady, "upstream_edit", 3)) == [0, 23, 46]
        assert numbers(load_sampled_video(load_video(steady), "uniform", 2)) == [12, 36]


class TestWriting:
    @pytest.mark.parametrize("fps", [24, 16.0, 23.976, 0.5, 24000 / 1001])
    def test_rate(self, tmp_path, fps):
        save_video(numbered(9), tmp_path / "a.mp4", fps)
        clip = load_video(tmp_path / "a.mp4")
        assert numbers(clip.frames) == list(range(9))
        assert clip.fps == pytest.approx(fps, rel=1e-5)

    def test_clip_brings_its_rate(self, tmp_path, steady):
        save_video(load_video(steady), tmp_path / "a.mp4")
        assert load_video(tmp_path / "a.mp4").fps == 24

    def test_odd_size_gains_an_edge(self, tmp_path):
        save_video(np.stack([flat(BLUE, 35, 63)] * 2), tmp_path / "a.mp4", 8)
        frames = load_video(tmp_path / "a.mp4").frames
        assert frames.shape == (2, 36, 64, 3)
        assert np.abs(frames[:, -1, -1].astype(int) - BLUE).max() < 6

    def test_index_comes_first(self, tmp_path):
        save_video(numbered(3), tmp_path / "a.mp4", 8)
        data = (tmp_path / "a.mp4").read_bytes()
        assert data.index(b"moov") < data.index(b"mdat")
        with av.open(str(tmp_path / "a.mp4")) as file:
            assert file.streams.video[0].codec_context.pix_fmt == "yuv420p"

    @pytest.mark.parametrize(
        ("frames", "name", "fps", "word"),
        [
            (numbered(2), "a.avi", 8, ".mp4"),
            (numbered(2), "none/a.mp4", 8, "does not exist"),
            (numbered(2), "a.mp4", None, "fps"),
            (numbered(2), "a.mp4", 0, "fps"),
            (numbered(2), "a.mp4", 1e-6, "fps"),
            (numbered(2), "a.mp4", 1e9, "fps"),
            (numbered(2), "a.mp4", float("nan"), "fps"),
            (np.full((2, 8, 8, 3), np.nan), "a.mp4", 8, "0..1"),
            ([], "a.mp4", 8, "no frames"),
        ],
    )
    def test_refused(self, tmp_path, frames, name, fps, word):
        assert word in error_of(save_video, frames, tmp_path / name, fps)
        assert not list(tmp_path.iterdir())

    def test_failure_leaves_nothing_and_keeps_the_old(self, tmp_path, monkeypatch):
        (tmp_path / "a.mp4").write_text("old")

        def fail(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(av.VideoFrame, "from_ndarray", fail)
        with pytest.raises(KeyboardInterrupt):
            save_video(numbered(2), tmp_path / "a.mp4", 8)
        assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]

    @pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.jpeg", "a.webp"])
    def test_image(self, tmp_path, name):
        save_image(flat(RED), tmp_path / name)
        seen = np.asarray(load_image(tmp_path / name)).astype(int)
        assert np.abs(seen - RED).max() < 6
        assert [path.name for path in tmp_path.iterdir()] == [name]

    @pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.mkv", "a.gif", "a.png", "a.jpg", "a.webp"])
    def test_a_file_says_how_it_was_made(self, tmp_path, name):
        made = {"prompt": "[b]ein Fuchs[/b] 狐\n'\"", "seed": 2**64 - 1, "settings": {"fps": 8.5, "x": [None, True]}}
        if name in ("a.mp4", "a.webm", "a.mkv", "a.gif"):
            save_video(numbered(2), tmp_path / name, 8, metadata=made)
            assert numbers(load_video(tmp_path / name).frames) == [0, 1]
        else:
            save_image(flat(RED), tmp_path / name, metadata=made)
            assert np.abs(np.asarray(load_image(tmp_path / name)).astype(int) - RED).max() < 6
        assert read_media_record(tmp_path / name) == made

    def test_a_file_that_does_not_say_it(self, tmp_path, steady):
        save_image(flat(RED), tmp_path / "a.png")
        (tmp_path / "text.mp4").write_text("hello")
        for path in (tmp_path / "a.png", steady):
            with pytest.raises(ValueError, match="contains no record of how it was generated"):
                read_media_record(path)
        for name in ("text.mp4", "nothing.mp4", "."):
            with pytest.raises(ValueError, match="cannot be read as an image or video"):
                read_media_record(tmp_path / name)

    @pytest.mark.parametrize("metadata", [{"x": object()}, {"x": float("nan")}, {"x": "y" * 70_000}])
    def test_metadata_that_no_file_takes(self, tmp_path, metadata):
        assert "metadata" in error_of(save_image, flat(RED), tmp_path / "a.jpg", metadata)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("suffix", [".mp4", ".png"])
    def test_names_that_are_long_or_taken_by_a_planted_link(self, tmp_path, suffix):
        def write(path):
            save_video(numbered(2), path, 8) if suffix == ".mp4" else save_image(flat(RED), path)

        (tmp_path / "victim").write_text("mine")
        (tmp_path / f".a{suffix}.partial").symlink_to("victim")
        write(tmp_path / f"a{suffix}")
        write(tmp_path / ("x" * 251 + suffix))
        assert (tmp_path / "victim").read_text() == "mine"
        assert sorted(len(path.name) for path in tmp_path.iterdir()) == [5, 6, 14, 255]
        mode = (tmp_path / "victim").stat().st_mode
        assert (tmp_path / f"a{suffix}").stat().st_mode == mode
        (tmp_path / f"folder{suffix}").mkdir()
        assert "is a folder" in error_of(write, tmp_path / f"folder{suffix}")

    def test_image_suffix(self, tmp_path):
        assert ".png" in error_of(save_image, flat(RED), tmp_path / "a.tga")

    def test_contact_sheet(self):
        sheet = contact_sheet(numbered(20), columns=4, max_frames=7)
        assert sheet.size == (4 * 50 - 2, 2 * 34 - 2)
        assert [sheet.getpixel((50 * column, 0))[0] // 4 for column in range(4)] == [0, 3, 6, 10]
        assert contact_sheet(VideoClip(numbered(3), 8)).size == (3 * 50 - 2, 32)
