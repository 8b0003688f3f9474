"""The output of a call: images, files with records, and what a notebook shows."""

import base64
import io
import re

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import omni_video_hf
from omni_video_hf import OmniVideoPipelineOutput
from omni_video_hf.hub.remote_code import __version__
from omni_video_hf.media import load_image, load_video, read_media_record, save_video
from omni_video_hf.pipelines import output as module

SETTINGS = {"prompt": ["a fox", "a <b>wolf</b>"], "seed": [3, 4], "width": 32, "negative_prompt": None}


def samples(kind, frames=5, count=2):
    values = np.random.default_rng(0).random((count, frames, 16, 32, 3), dtype=np.float32)
    if kind == "pt":
        return torch.from_numpy(values).movedim(-1, 2)
    if kind == "np":
        return values
    return [[Image.fromarray((frame * 255).astype(np.uint8)) for frame in sample] for sample in values]


def of_videos(kind="pil", **fields):
    return OmniVideoPipelineOutput(frames=samples(kind), task="t2v", fps=8, settings=SETTINGS, **fields)


def of_images(kind="pil", **fields):
    return OmniVideoPipelineOutput(frames=samples(kind, frames=1), task="t2i", settings=SETTINGS, **fields)


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_images_of_every_format(kind):
    images = of_images(kind).images
    assert [image.size for image in images] == [(32, 16), (32, 16)]
    assert np.abs(np.asarray(images[1], int) - np.asarray(samples("pil", frames=1)[1][0], int)).max() <= 1


@pytest.mark.parametrize(
    ("output", "words"),
    [(of_videos(), "videos, which `frames`"), (OmniVideoPipelineOutput(text=["red"]), "text answer, which `text`")],
)
def test_an_output_without_images_names_the_field_that_has_the_result(output, words):
    with pytest.raises(AttributeError, match=words):
        _ = output.images
    assert not hasattr(output, "images")


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_videos_are_saved_one_file_a_sample_with_its_record(tmp_path, kind):
    paths = of_videos(kind).save(tmp_path / "fox.mp4")
    assert [path.name for path in paths] == ["fox.mp4", "fox-1.mp4"]
    assert [read_media_record(path)["prompt"] for path in paths] == SETTINGS["prompt"]
    assert [read_media_record(path)["seed"] for path in paths] == [3, 4]
    record = read_media_record(paths[1])
    assert (record["sample"], record["task"], record["version"]) == (1, "t2v", __version__)
    assert "negative_prompt" not in record["settings"]
    clip = load_video(paths[0])
    assert (clip.frames.shape, clip.fps) == ((5, 16, 32, 3), 8)


def test_images_are_saved_and_the_prompts_of_several_samples_belong_to_them(tmp_path):
    output = OmniVideoPipelineOutput(frames=samples("np", 1, count=4), task="t2i", settings=SETTINGS | {"seed": 9})
    paths = output.save(f"{tmp_path}/fox.webp")
    assert [read_media_record(path)["prompt"] for path in paths] == [SETTINGS["prompt"][i] for i in (0, 0, 1, 1)]
    assert {read_media_record(path)["seed"] for path in paths} == {9}
    assert load_image(paths[3]).size == (32, 16)


@pytest.mark.parametrize(
    ("output", "name", "words"),
    [
        (of_videos(), "fox.png", "contains videos: its suffix must be .mp4"),
        (of_images(), "fox.mp4", "contains images: its suffix must be .png"),
        (of_images(), "missing/fox.png", "does not exist"),
        (OmniVideoPipelineOutput(text=["red"]), "fox.txt", "`output.text`"),
        (OmniVideoPipelineOutput(frames=torch.zeros(1, 16, 2, 4, 4), fps=8), "fox.mp4", "are latents"),
        (OmniVideoPipelineOutput(frames=torch.randn(1, 16, 3, 4, 4), fps=8), "fox.mp4", "are latents"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_nothing_is_written(tmp_path, output, name, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        output.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def embedded(html, kind):
    return [base64.b64decode(data) for data in re.findall(rf"data:{kind};base64,([^\"]+)", html)]


def test_a_notebook_shows_videos_thought_notes_and_settings():
    html = of_videos(notes=["Rounded & <cut>."], thought=["I draw a fox.", ""])._repr_html_()
    clips = embedded(html, "video/mp4")
    assert len(clips) == 2
    assert len(load_video_bytes(clips[0]).frames) == 5
    for words in (
        "Thought: I draw a fox.",
        "Rounded &amp; &lt;cut&gt;.",
        "a &lt;b&gt;wolf&lt;/b&gt;",
        "<summary>Settings",
    ):
        assert words in html
    assert "<b>wolf" not in html
    assert html.count("Thought:") == 1


def load_video_bytes(data):
    import tempfile  # noqa: PLC0415

    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(data)
        file.flush()
        return load_video(file.name)


def test_a_notebook_shows_images_and_answers():
    (first, _) = embedded(of_images()._repr_html_(), "image/png")
    assert Image.open(io.BytesIO(first)).size == (32, 16)
    html = OmniVideoPipelineOutput(text=["a <b>", ""], task="understand", settings={"seed": 1})._repr_html_()
    assert "<blockquote>a &lt;b&gt;</blockquote>" in html
    assert "(an empty answer)" in html


def test_a_notebook_names_latents_and_shows_frames_where_videos_cannot_be_written(monkeypatch):
    assert (
        "Latents of the shape [1, 16, 2, 4, 4]"
        in OmniVideoPipelineOutput(frames=torch.zeros(1, 16, 2, 4, 4))._repr_html_()
    )

    def without_pyav(*args, **kwargs):
        raise ImportError("PyAV is missing")

    monkeypatch.setattr(module, "save_video", without_pyav)
    (sheet, _) = embedded(of_videos()._repr_html_(), "image/png")
    assert Image.open(io.BytesIO(sheet)).width > 5 * 32


def test_the_pipeline_keeps_what_the_mllm_wrote_when_it_chose_the_task(monkeypatch):
    pipe = tiny.pipeline(max_context_length=160)
    pipe.set_progress_bar_config(disable=True)
    small = {"height": 16, "width": 16, "num_inference_steps": 1}
    assert pipe("a fox", task="t2i", **small).thought is None
    monkeypatch.setattr(pipe, "answer", lambda prompts, *rest: ("t2i", ["I draw a fox."]))
    assert pipe("a fox", **small).thought == ["I draw a fox."]


def test_the_package_offers_what_a_notebook_needs():
    assert omni_video_hf.save_video is save_video
    assert omni_video_hf.load_video is load_video
    assert {"load_video", "save_video"} <= set(omni_video_hf.__all__)
