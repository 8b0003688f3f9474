"""Thinking before generating: by the MLLM or a function, kept in the output, taken back by another call."""

import numpy as np
import pytest
import tiny
import torch

from omni_video_hf import OmniVideoThought
from omni_video_hf.media import VideoClip

SIZE = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    made = tiny.pipeline()
    made.set_progress_bar_config(disable=True)
    return made


def answer(messages):
    """A thinker that says what it was asked."""
    texts = [part["text"] for part in messages[-1]["content"] if part["type"] == "text"]
    kinds = [part["type"] for part in messages[-1]["content"]]
    if texts[0].startswith("Describe"):
        return f"a {kinds[0]}"
    return f"{texts[0]} Prompt: gruen"


def run(pipe, prompt="rot", **arguments):
    return pipe(prompt, task="t2v", generator=torch.Generator().manual_seed(0), **(SIZE | arguments))


def test_a_function_thinks(pipe):
    thought = pipe.think("as grass", thinker=answer)
    assert thought.prompt == "gruen"
    assert "video: as grass" in thought.reasoning
    assert thought.source_caption is None
    clip = VideoClip(np.zeros((5, 32, 32, 3), np.uint8), fps=8)
    edit = pipe.think("as {caption} {prompt}", video=clip, thinker=answer)
    assert edit.source_caption == "a video"
    assert "as {caption} {prompt}" in edit.reasoning, "braces of a request stay"
    assert [entry.prompt for entry in pipe.think(["a", "b"], thinker=answer)] == ["gruen", "gruen"]


def test_the_mllm_thinks_and_a_thought_can_be_repeated(pipe):
    first = run(pipe, think=True, max_new_tokens=4)
    thought = first.settings["thought"]
    assert thought["prompt"]
    assert first.thought == [f"{thought['reasoning']} {thought['prompt']}".strip()]
    assert first.settings["prompt"] == "rot"
    again = run(pipe, thought=thought)
    assert torch.equal(first.frames, again.frames)
    assert torch.equal(run(pipe, thought["prompt"]).frames, again.frames), "it is generated from the thought's prompt"
    assert "thought" not in run(pipe).settings
    frames, text = run(pipe, thought="gruen", return_dict=False)
    assert text is None
    assert torch.equal(frames, run(pipe, "gruen").frames)


def test_sampled_thoughts_repeat_with_their_seed(pipe):
    sampled = pipe.think("rot", temperature=2.0, max_new_tokens=8)
    same = pipe.think("rot", temperature=2.0, max_new_tokens=8, seed=sampled.settings["seed"])
    assert sampled == same


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"thought": ["a", "b"]}, "2 entries for 1 prompts"),
        ({"thought": ""}, "not empty"),
        ({"think": True, "task": "understand"}, "a task that generates"),
    ],
)
def test_calls_that_cannot_think_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe("rot", **({"task": "t2v"} | SIZE | arguments))


def test_bad_answers_and_numbers_are_refused(pipe):
    with pytest.raises(ValueError, match="wrote no prompt"):
        pipe.think("rot", thinker=lambda messages: "Prompt:")
    with pytest.raises(TypeError, match="must return a text"):
        pipe.think("rot", thinker=lambda messages: None)
    with pytest.raises(ValueError, match="temperature"):
        pipe.think("rot", temperature=-1)
    with pytest.raises(ValueError, match="must be a text"):
        OmniVideoThought(prompt=" ")
