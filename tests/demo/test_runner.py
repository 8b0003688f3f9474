"""Calls of several visitors: their order, cancelling, errors and previews."""

import threading

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from omni_video_hf.demo.requests import Request
from omni_video_hf.demo.runner import Cancelled, Done, Runner, Started, Step, Waiting

WAIT = 900  # seconds after which a test that hangs fails
SMALL = {"height": 16, "width": 16, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def runner():
    pipe = tiny.pipeline(max_context_length=160)
    pipe.set_progress_bar_config(disable=True)
    return Runner(pipe)


def request(seed=0, **settings):
    return Request("a fox", "t2i", seed, settings=SMALL | settings)


def collect(events, into, reached=None):
    """Consume events in a thread; `reached` is set at the first step."""

    def consume():
        for event in events:
            into.append(event)
            if reached is not None and isinstance(event, Step):
                reached.set()

    thread = threading.Thread(target=consume)
    thread.start()
    return thread


def test_a_call_reports_its_steps_previews_and_result(runner):
    events = list(runner.run(request(), "anna"))
    assert isinstance(events[0], Started)
    steps = [event for event in events if isinstance(event, Step)]
    assert [(step.number, step.total) for step in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert steps[0].seconds_left is None
    assert steps[1].seconds_left > 0
    assert steps[-1].seconds_left == 0
    assert isinstance(steps[2].preview, Image.Image)
    assert isinstance(events[-1], Done)
    again = runner.pipe("a fox", task="t2i", generator=torch.Generator().manual_seed(0), **SMALL)
    assert np.array_equal(events[-1].output.images[0], again.images[0])


def test_others_wait_in_order_and_everyone_cancels_only_their_own(runner, monkeypatch):
    go, pipe_call = threading.Event(), runner.pipe.__call__

    class Slow:
        """The pipeline, whose first step ends when the test says so."""

        scheduler, vae, config = runner.pipe.scheduler, runner.pipe.vae, runner.pipe.config

        def __call__(self, *args, callback_on_step_end, **kwargs):
            def callback(pipe, step, timestep, tensors):
                assert go.wait(WAIT)
                return callback_on_step_end(pipe, step, timestep, tensors)

            return pipe_call(*args, callback_on_step_end=callback, **kwargs)

    monkeypatch.setattr(runner, "pipe", Slow())
    events = {name: [] for name in ("anna", "ben", "cleo")}
    threads, waiting = [], threading.Event()
    for number, name in enumerate(events):
        threads.append(collect(runner.run(request(number), name), events[name]))
        while len(runner._line) <= number:
            waiting.wait(0.01)
    while not all(any(isinstance(event, Waiting) for event in events[name]) for name in ("ben", "cleo")):
        waiting.wait(0.01)
    assert events["ben"][0] == Waiting(1)
    assert events["cleo"][0] == Waiting(2)
    assert runner.cancel("ben") == 1
    threads[1].join(WAIT)
    assert events["ben"][-1] == Cancelled(0)
    assert runner.cancel("dora") == 0
    go.set()
    for thread in threads:
        thread.join(WAIT)
    assert isinstance(events["anna"][-1], Done)
    assert isinstance(events["cleo"][-1], Done)
    assert runner._line == []
    assert [events[name][-1].output.settings["seed"] for name in ("anna", "cleo")] == [0, 2]


def test_a_running_call_ends_between_two_steps_and_leaves_the_pipeline_usable(runner):
    events, reached = [], threading.Event()
    thread = collect(runner.run(request(num_inference_steps=1000), "anna"), events, reached)
    assert reached.wait(WAIT)
    assert runner.cancel("anna") == 1
    thread.join(WAIT)
    assert isinstance(events[-1], Cancelled)
    assert 0 < events[-1].steps < 1000
    assert isinstance(list(runner.run(request(), "anna"))[-1], Done)


def test_a_visitor_who_stops_to_listen_cancels_the_call(runner):
    events = runner.run(request(num_inference_steps=1000), "anna")
    while not isinstance(next(events), Step):
        pass
    events.close()
    assert isinstance(list(runner.run(request(), "ben"))[-1], Done)


def test_an_error_of_the_pipeline_reaches_its_caller_only(runner):
    with pytest.raises(ValueError, match="multiple of"):
        list(runner.run(request(height=17), "anna"))
    assert isinstance(list(runner.run(request(), "ben"))[-1], Done)


def test_a_forked_process_begins_with_an_empty_line(runner, monkeypatch):
    runner._line.append("a call of the parent")
    monkeypatch.setattr(runner, "_process", -1)
    assert isinstance(list(runner.run(request(), "anna"))[-1], Done)
