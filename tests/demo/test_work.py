"""Sessions of visitors, and sentences for errors."""

import logging

import pytest
import tiny
import torch

from omni_video_hf import OmniVideoPipelineOutput
from omni_video_hf.demo.files import SessionFiles
from omni_video_hf.demo.requests import Request
from omni_video_hf.demo.runner import Runner
from omni_video_hf.demo.work import Finished, Workshop, sentence, thought
from omni_video_hf.media import read_media_record

SMALL = {"height": 16, "width": 16, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def runner():
    pipe = tiny.pipeline(max_context_length=160)
    pipe.set_progress_bar_config(disable=True)
    return Runner(pipe)


@pytest.fixture
def workshop(runner):
    return Workshop(runner, SessionFiles("tiny"))


def test_results_belong_to_the_session_that_asked_for_them(workshop):
    finished = workshop.finish(Request("a fox", "t2i", 5, settings=SMALL), "anna")
    workshop.finish(Request("a wolf", "t2i", 6, settings=SMALL), "ben")
    assert [result.title for result in workshop.session("anna").results] == ["a fox (seed 5)"]
    assert read_media_record(finished.path)["model"] == "tiny"
    workshop.leave("anna")
    assert not finished.path.exists()
    assert not workshop.session("anna").results
    assert workshop.session("ben").results[0].path.exists()


def test_the_decorator_of_a_space_wraps_every_call(runner):
    calls = []

    def on_gpu(function):
        def run(*args):
            calls.append(args[1])
            yield from function(*args)

        return run

    workshop = Workshop(runner, SessionFiles("tiny"), on_gpu)
    workshop.finish(Request("a fox", "t2i", 5, settings=SMALL), "anna")
    assert calls == ["anna"]


def test_errors_become_sentences_and_unexpected_ones_are_logged(caplog):
    assert sentence(ValueError("`width` must be\n a multiple of 16.")) == "`width` must be a multiple of 16."
    secret = "hf_" + "a" * 34
    assert secret not in sentence(OSError(f"401 for {secret}"))
    assert "smaller size" in sentence(torch.OutOfMemoryError("CUDA out of memory"))
    assert not caplog.records
    with caplog.at_level(logging.ERROR):
        assert sentence(KeyError("x")) == "The call failed with KeyError: 'x'"
    assert caplog.records[0].exc_info


def test_a_thought_says_what_the_mllm_chose():
    output = OmniVideoPipelineOutput(frames=[[]], task="v2v", thought=["I see a fox."])
    words = thought(Finished(Request("x", None, 0), output, 1.0, None))
    assert "edit of the video" in words
    assert words.endswith("It wrote: I see a fox.")
    answer = OmniVideoPipelineOutput(text=["blue"], task="understand")
    assert "answered in text" in thought(Finished(Request("x", None, 0), answer, 1.0, None))
