import numpy as np
import pytest
import torch
from PIL import Image

from omni_video_hf.media.clip import VideoClip
from omni_video_hf.media.sources import Source
from omni_video_hf.media.video_writer import save_video

FRAMES = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3), dtype=np.uint8)
PICTURES = [Image.fromarray(frame) for frame in FRAMES]


@pytest.mark.parametrize(
    "clip",
    [FRAMES, torch.from_numpy(FRAMES), PICTURES, list(FRAMES), VideoClip(FRAMES, 8)],
    ids=lambda c: type(c).__name__,
)
def test_a_single_video_serves_all_prompts(clip):
    source = Source.of(clip, None, 3).load()
    assert source.kind == "video"
    assert source.sizes == [(32, 48)] * 3
    assert [loaded.frames.shape for loaded in source.videos] == [(5, 32, 48, 3)] * 3


@pytest.mark.parametrize(
    "clips",
    [np.stack([FRAMES, FRAMES]), torch.from_numpy(np.stack([FRAMES, FRAMES])), [PICTURES, PICTURES], [FRAMES, FRAMES]],
    ids=["5d array", "5d tensor", "lists of pictures", "list of arrays"],
)
def test_one_video_per_prompt(clips):
    assert len(Source.of(clips, None, 2).load().videos) == 2
    with pytest.raises(ValueError, match="2 entries for 3 prompts"):
        Source.of(clips, None, 3)


def test_files_are_read_when_they_are_needed(tmp_path):
    save_video(FRAMES, tmp_path / "clip.mp4", fps=8)
    source = Source.of(tmp_path / "clip.mp4", None, 1)
    assert source.videos == [str(tmp_path / "clip.mp4")]
    assert source.load(num_frames=3).videos[0].frames.shape[0] == 3


def test_images():
    for image in (PICTURES[0], FRAMES[0], torch.from_numpy(FRAMES[0])):
        source = Source.of(None, image, 2).load(num_frames=3)
        assert source.kind == "image"
        assert source.sizes == [(32, 48)] * 2
        assert len(source.images) == 2
    assert len(Source.of(None, PICTURES, 5).images) == 5
    with pytest.raises(ValueError, match="5 entries for 2 prompts"):
        Source.of(None, PICTURES, 2)


def test_rates():
    assert Source.of(FRAMES, None, 1).load(fps=12).videos[0].fps == 12  # states the rate of bare frames
    assert len(Source.of(VideoClip(FRAMES, 8), None, 1).load(fps=4).videos[0].frames) == 3  # resamples a clip
    assert Source.of(None, None, 1).kind is None
    assert Source.of(None, None, 1).sizes == []


def test_sources_of_one_call_must_agree():
    def clip(length=5, height=32, fps=8):
        return VideoClip(np.zeros((length, height, 48, 3), np.uint8), fps)

    Source.of([clip(), clip()], None, 2).check_equal(None, None, None)
    for other, message in (
        (clip(height=64), "48x32.*48x64"),
        (clip(length=9), "'5', '9'"),
        (clip(fps=12), "frame rate"),
    ):
        with pytest.raises(ValueError, match=message):
            Source.of([clip(), other], None, 2).check_equal(None, None, None)
    Source.of([clip(), clip(height=64)], None, 2).check_equal(32, None, None)
    with pytest.raises(ValueError, match="the same size"):
        Source.of(None, [PICTURES[0], PICTURES[0].resize((8, 8))], 2).check_equal(None, None, None)
