"""Files are opened once and addresses are fetched once, by all readers of one call together."""

import gc
import sys
from contextlib import contextmanager

import av
import numpy as np
import pytest

from omni_video_hf.media import download
from omni_video_hf.media.download import MediaError, MediaFile
from omni_video_hf.media.images import load_image, save_image
from omni_video_hf.media.sources import Source
from omni_video_hf.media.video_loading import load_sampled_video, load_video, open_media, probe_frames
from omni_video_hf.media.video_reader import probe_video
from omni_video_hf.media.video_writer import save_video

FRAMES = np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), dtype=np.uint8)
opens: list[str] = []
sys.addaudithook(lambda event, args: opens.append(str(args[0])) if event == "open" else None)


@pytest.fixture
def count(monkeypatch):
    """How often a file is opened in a call. FFmpeg opens nothing itself: it gets open files alone."""
    open_container = av.open

    def checked(file, *args, **kwargs):
        assert hasattr(file, "read"), file
        return open_container(file, *args, **kwargs)

    def counted(path, call):
        monkeypatch.setattr(av, "open", checked)
        opens.clear()
        call()
        monkeypatch.setattr(av, "open", open_container)
        return opens.count(str(path))

    return counted


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("media") / "clip.mp4"
    save_video(FRAMES, path, fps=8)
    return path


@pytest.mark.parametrize(
    "call",
    [
        load_video,
        probe_video,
        open_media,
        lambda path: load_video(path, num_frames=3),
        lambda path: probe_frames(path, fps=4),
        lambda path: load_sampled_video(path, "uniform", 3),
    ],
)
def test_a_video_is_opened_once(clip, count, call):
    assert count(clip, lambda: call(clip)) == 1


@pytest.mark.parametrize("name", ["a.webm", "a.mkv", "a.gif"])
def test_other_containers_are_opened_once(tmp_path, count, name):
    with av.open(str(tmp_path / name), "w") as file:
        stream = file.add_stream({"a.webm": "libvpx-vp9", "a.mkv": "libx264", "a.gif": "gif"}[name], rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "rgb8" if name == "a.gif" else "yuv420p"
        for frame in FRAMES:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame).reformat(format=stream.pix_fmt)))
        file.mux(stream.encode())
    assert count(tmp_path / name, lambda: load_video(tmp_path / name)) == 1


def test_an_image_is_opened_once(tmp_path, count):
    save_image(FRAMES[0], tmp_path / "a.png")
    assert count(tmp_path / "a.png", lambda: load_image(tmp_path / "a.png")) == 1
    assert count(tmp_path / "a.png", lambda: open_media(tmp_path / "a.png")) == 1


def test_the_checks_and_the_reading_of_one_call_share_the_file(clip, count):
    def one_call():
        source = Source.of(str(clip), None, 3)
        for video in source.videos:
            probe_frames(video, None, 5)
        clips = source.load(num_frames=5).videos
        assert clips[0] is clips[2]

    assert count(clip, one_call) == 1


def test_a_file_is_closed_when_nobody_needs_it(clip):
    with MediaFile(clip) as file:
        load_video(file)
        stream = file._stream
        assert not stream.closed
    assert stream.closed
    assert len(load_video(file).frames) == 9  # opened again
    file = MediaFile(clip)
    load_video(file)
    stream = file._stream
    del file
    gc.collect()
    assert stream.closed


def test_two_readers_at_a_time(clip):
    with MediaFile(clip) as file, file.reading() as first:
        head = first.read(8)
        with file.reading() as second:
            assert second.read(8) == head
        assert file.ends(8)[0] == head
        assert first.tell() == 8


def test_an_address_is_fetched_once(clip, monkeypatch):
    asked = []

    class Response:
        def raise_for_status(self):
            pass

        def iter_bytes(self):
            yield clip.read_bytes()

    class Session:
        @contextmanager
        def stream(self, method, url, **_):
            asked.append(url)
            yield Response()

    monkeypatch.setattr(download, "get_session", Session)
    with MediaFile("https://x.org/clip") as file:
        assert open_media(file)[0] == "video"
        source = Source.of(file, None, 2)
        assert probe_frames(source.videos[0], None, 3)[1] == 3
        assert np.array_equal(source.load().videos[1].frames, load_video(clip).frames)
        folder = file.path.parent
        assert asked == ["https://x.org/clip"]
    assert not folder.exists()


def test_a_missing_file_is_named():
    with pytest.raises(MediaError, match=r"^nothing\.mp4: no such file"):
        load_video("nothing.mp4")
