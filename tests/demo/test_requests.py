"""What a form of the page asks for."""

import numpy as np
import pytest

from omni_video_hf.demo.requests import CAREFUL, MAX_SEED, QUICK, make_request
from omni_video_hf.media import save_image, save_video
from omni_video_hf.pipelines.presets import PRESETS


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    save_video(np.zeros((5, 32, 32, 3), np.uint8), folder / "clip.mp4", fps=8)
    save_image(np.zeros((32, 32, 3), np.uint8), folder / "image.png")
    return {"video": str(folder / "clip.mp4"), "image": str(folder / "image.png")}


@pytest.mark.parametrize(
    ("way", "kind", "source", "task"),
    [
        ("create", "video", None, "t2v"),
        ("create", "image", None, "t2i"),
        ("create", None, None, None),
        ("edit", None, "video", "v2v"),
        ("edit", None, "image", "i2i"),
        ("ask", None, "video", "understand"),
        ("chat", None, None, None),
        ("chat", None, "video", None),
    ],
)
def test_a_way_and_its_source_determine_the_task(files, way, kind, source, task):
    request = make_request(way, " a fox ", kind=kind, source=source and files[source], seed=3)
    assert (request.task, request.prompt, request.seed) == (task, "a fox", 3)
    assert list(request.media) == ([source] if source else [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"way": "create", "prompt": "  "}, "The prompt is empty"),
        ({"way": "ask", "prompt": None}, "The question is empty"),
        ({"way": "edit", "prompt": "make it blue"}, "There is no source"),
        ({"way": "create", "prompt": "a fox", "seed": 0.5}, "whole number from 0"),
        ({"way": "create", "prompt": "a fox", "seed": MAX_SEED + 1}, "whole number from 0"),
        ({"way": "create", "prompt": "a fox", "form": {"num_frames": 4.5}}, "`num_frames` must be a whole number"),
        ({"way": "create", "prompt": "a fox", "form": {"width": "big"}}, "`width` must be a number, got 'big'"),
        ({"way": "create", "prompt": "a fox", "form": {"width": "nan"}}, "`width` must be a whole number, got nan"),
        ({"way": "create", "prompt": "a fox", "form": {"preset": "fast"}}, "`preset` must be one of"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(arguments, words):
    with pytest.raises(ValueError, match=words):
        make_request(**arguments)


def test_without_a_seed_every_request_has_another_one():
    assert len({make_request("create", "a fox").seed for _ in range(8)}) > 1


def test_empty_fields_are_left_to_the_model():
    form = {
        "num_inference_steps": None,
        "width": "64",
        "fps": " ",
        "guidance_scale": 3,
        "negative_prompt": " ",
        "preset": None,
    }
    assert make_request("create", "a fox", kind="video", form=form).settings == {"width": 64, "guidance_scale": 3.0}


def test_images_and_answers_have_no_settings_of_videos(files):
    form = {"num_frames": 5, "fps": 8, "flow_shift": 2}
    assert make_request("create", "a fox", kind="image", form=form).settings == {"flow_shift": 2.0}
    assert make_request("ask", "what is it?", source=files["video"], form=form).settings == {}
    assert make_request("chat", "make it blue", source=files["video"], form=form).settings["num_frames"] == 5


@pytest.mark.parametrize(("preset", "steps"), [(QUICK, 25), (CAREFUL, 100)])
def test_a_preset_multiplies_the_steps_of_the_model(preset, steps):
    request = make_request("create", "a fox", kind="video", form={"preset": preset}, presets=PRESETS)
    assert request.settings == {"num_inference_steps": steps}
    form = {"preset": preset, "num_inference_steps": 7}
    assert make_request("create", "a fox", kind="video", form=form).settings == {"num_inference_steps": 7}
