"""Results of the page: their records, comparisons, and what goes when a visitor leaves."""

import numpy as np
import pytest
from PIL import Image

from omni_video_hf import OmniVideoPipelineOutput
from omni_video_hf.demo.files import GAIN, SessionFiles, kind_of
from omni_video_hf.media import load_image, load_video, read_media_record, save_image, save_video


def clip(value, frames=9, size=32):
    return np.full((frames, size, size, 3), value, np.uint8)


@pytest.fixture
def files():
    return SessionFiles("omni-video-shapes")


def output(frames, fps):
    return OmniVideoPipelineOutput(frames=[frames], task="t2v", fps=fps, settings={"prompt": "a fox", "seed": 7})


@pytest.mark.parametrize(("fps", "suffix"), [(8, ".mp4"), (None, ".png")])
def test_a_file_records_how_it_was_made(files, fps, suffix):
    frames = [Image.fromarray(frame) for frame in clip(200, 5 if fps else 1)]
    path = files.save(output(frames, fps), "anna", source="/uploads/fox.mp4")
    assert path.name == f"omni-video-t2v-7{suffix}"
    assert kind_of(path) == ("video" if fps else "image")
    record = read_media_record(path)
    assert (record["prompt"], record["seed"], record["model"]) == ("a fox", 7, "omni-video-shapes")
    assert record["source"] == "fox.mp4"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.mp4", "video"), ("a.MOV", "video"), ("a.webm", "video"), ("a.png", "image"), ("a.gif", "image")],
)
def test_uploads_of_all_formats_are_shown(name, kind):
    assert kind_of(name) == kind


def test_a_clip_is_compared_with_the_frames_that_the_pipeline_read(files, tmp_path):
    save_video(np.concatenate([clip(100, 8), clip(140, 12)]), tmp_path / "source.mp4", fps=8)
    save_video(clip(120, 9, size=48), tmp_path / "result.mp4", fps=4)
    compared = files.compare(
        str(tmp_path / "source.mp4"), tmp_path / "result.mp4", "anna", {"num_frames": 9, "fps": 4}
    )
    source, difference = load_video(compared.source), load_video(compared.difference)
    assert (source.frames.shape, source.fps) == ((9, 48, 48, 3), 4)
    assert difference.frames.shape == source.frames.shape
    assert abs(float(source.frames[0].mean()) - 100) < 4
    assert abs(float(source.frames[8].mean()) - 140) < 4
    assert abs(float(difference.frames.mean()) - 20 * GAIN) < 6


def test_an_image_is_compared_at_the_size_of_its_edit(files, tmp_path):
    save_image(clip(10, 1, size=64)[0], tmp_path / "source.png")
    save_image(clip(40, 1)[0], tmp_path / "result.png")
    compared = files.compare(str(tmp_path / "source.png"), tmp_path / "result.png", "anna")
    assert compared.kind == "image"
    assert load_image(compared.source).size == (32, 32)
    assert np.asarray(load_image(compared.difference)).max() == 30 * GAIN


def test_who_leaves_takes_their_files_and_nobody_elses(files):
    frames = [Image.fromarray(clip(0, 1)[0])]
    mine, other = files.save(output(frames, None), "anna"), files.save(output(frames, None), "ben")
    files.forget("anna")
    assert not mine.exists()
    assert other.exists()


@pytest.mark.parametrize("session", ["../..", "/etc", ".", ""])
def test_the_name_of_a_session_is_never_a_path(files, session):
    path = files.save(output([Image.fromarray(clip(0, 1)[0])], None), session)
    assert path.is_relative_to(files.folder)
    assert len(path.relative_to(files.folder).parts) == 3
    files.forget(session)
    assert files.folder.is_dir()
