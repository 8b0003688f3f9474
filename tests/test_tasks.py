"""The table of tasks: one row is all that a new task needs."""

import pytest
import tiny
from PIL import Image

from omni_video_hf.tasks import TASKS, VIDEO_GENERATION_TOKEN, Task, find_task, get_task

SMALL = {"height": 32, "width": 32, "num_frames": 5, "fps": 4, "num_inference_steps": 2, "guidance_scale": 3.0}
ANIMATE = Task(
    "Let it move:\n{prompt}",
    VIDEO_GENERATION_TOKEN,
    source="image",
    output="video",
    latents="source_latents",
    preset=SMALL | {"flow_shift": 5.0},
)


def test_a_task_is_added_by_one_row(monkeypatch):
    pipe = tiny.pipeline()
    monkeypatch.setitem(TASKS, "animate", ANIMATE)
    assert "Let it move:\nrot" in pipe.processor.build_prompt("animate", "rot")
    output = pipe("rot", image=Image.new("RGB", (32, 32), "red"), task="animate", output_type="np")
    assert output.task == "animate"
    assert output.frames.shape == (1, 5, 32, 32, 3)
    assert (output.fps, output.settings["guidance_scale"]) == (4, 3.0)
    with pytest.raises(ValueError, match="needs a source: pass `image`"):
        pipe("rot", task="animate")


def test_an_unknown_task_names_the_known_ones():
    with pytest.raises(ValueError, match="t2i, t2v, i2i, v2v, i2v, understand, got 'v2a'"):
        get_task("v2a")


@pytest.mark.parametrize(
    ("source", "output", "task"),
    [
        (None, "image", "t2i"),
        (None, "video", "t2v"),
        (None, "text", "understand"),
        ("image", "image", "i2i"),
        ("image", "video", "i2i"),
        ("video", "image", "v2v"),
    ],
)
def test_the_source_decides_what_is_edited(source, output, task):
    """Upstream takes either of the two tokens of the MLLM for an edit of the source's own kind."""
    assert find_task(source, output) == task


def test_every_task_that_generates_has_a_complete_preset():
    for name, task in TASKS.items():
        assert (task.preset is None) == task.answers_in_text, name
        assert (task.source is None) == (task.latents is None), name
        if task.preset is not None:
            assert task.preset.keys() == SMALL.keys() | {"flow_shift"}, name
