"""Whose settings apply: the call's, the scheduler's, the presets'."""

import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

from omni_video_hf import OmniVideoAdapter, OmniVideoPipeline
from omni_video_hf.pipelines.presets import PRESETS
from omni_video_hf.pipelines.scheduling import chosen_shift, prepare_scheduler, preset_shift

ARGUMENTS = {"task": "t2i", "num_inference_steps": 3, "output_type": "latent"}
MIXED = {task: preset | {"flow_shift": 2.0 if task == "t2i" else 5.0} for task, preset in tiny.PRESETS.items()}


@pytest.fixture
def pipe():
    pipe = tiny.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, **arguments):
    output = pipe("a cat", generator=torch.Generator().manual_seed(0), **(ARGUMENTS | arguments))
    return output.frames, output.settings["flow_shift"]


def changed_config(pipe):
    pipe.scheduler.register_to_config(flow_shift=8.0)


def exchanged(pipe):
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=8.0)


def other_class(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=8.0)


def other_class_of_a_changed_one(pipe):
    exchanged(pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)


def set_shift(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.set_shift(8.0)


CHANGES = [changed_config, exchanged, other_class, other_class_of_a_changed_one, set_shift]


@pytest.mark.parametrize("presets", [tiny.PRESETS, MIXED], ids=["one shift", "one for each task"])
@pytest.mark.parametrize(
    "change",
    [changed_config, exchanged, other_class, other_class_of_a_changed_one, set_shift],
    ids=lambda f: f.__name__,
)
def test_a_shift_that_the_caller_set_on_the_scheduler_counts(pipe, change, presets):
    pipe.register_to_config(presets=presets)
    preset = presets["t2i"]["flow_shift"]
    assert run(pipe)[1] == preset
    change(pipe)
    ours, used = run(pipe)
    assert used == 8.0
    assert torch.equal(ours, run(pipe, flow_shift=8.0)[0])
    assert not torch.equal(ours, run(pipe, flow_shift=preset)[0])
    assert run(pipe, flow_shift=3.0)[1] == 3.0  # the call's own comes before either


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_scheduler_without_a_shift_of_its_own_takes_the_presets(pipe, name):
    cls = {cls.__name__: cls for cls in (FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler)}[name]
    pipe.register_to_config(presets=MIXED)
    wanted = cls.from_config(pipe.scheduler.config).__class__
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    frames, used = run(pipe)
    assert used == 2.0
    assert torch.equal(frames, run(pipe, flow_shift=2.0)[0])
    assert not torch.equal(frames, run(pipe, flow_shift=6.0)[0])
    assert isinstance(pipe.scheduler, wanted)


def test_the_shift_in_use_is_the_one_that_was_asked_for(pipe):
    """A scheduler made from another class's configuration keeps that class's entry, and does not read it."""
    euler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert euler.config["flow_shift"] == 5.0
    sigmas = {shift: prepare_scheduler(euler, 4, shift).sigmas for shift in (1.0, 3.0)}
    assert torch.allclose(sigmas[3.0], 3 * sigmas[1.0] / (1 + 2 * sigmas[1.0]))
    assert euler.shift == 1.0


def test_shifts_survive_saving_and_loading(pipe, tmp_path):
    pipe.register_to_config(presets=MIXED)
    pipe.save_pretrained(tmp_path / "own")
    exchanged(pipe)
    pipe.save_pretrained(tmp_path / "exchanged")
    for name, used in (("own", 2.0), ("exchanged", 8.0)):
        loaded = OmniVideoPipeline.from_pretrained(tmp_path / name)
        loaded.set_progress_bar_config(disable=True)
        assert run(loaded)[1] == used
        assert loaded.config.presets == MIXED
    callers = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=7.0)
    loaded = OmniVideoPipeline.from_pretrained(tmp_path / "own", scheduler=callers)
    loaded.set_progress_bar_config(disable=True)
    assert run(loaded)[1] == 7.0


def test_repositories_that_do_not_know_their_schedulers_shift():
    scheduler = tiny.scheduler()
    assert preset_shift(tiny.PRESETS, scheduler) == preset_shift(MIXED, scheduler) == 5.0
    assert preset_shift(tiny.PRESETS, UniPCMultistepScheduler.from_config(scheduler.config, flow_shift=8.0)) == 5.0
    assert chosen_shift(scheduler, 5.0) is None
    assert chosen_shift(UniPCMultistepScheduler(), 5.0) is None
    assert chosen_shift(UniPCMultistepScheduler(flow_shift=1.0), 5.0) == 1.0


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(), "DDIMScheduler has neither"),
        (UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0), "prediction_type"),
        (UniPCMultistepScheduler(prediction_type="flow_prediction", flow_shift=5.0), "use_flow_sigmas"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting"),
        (
            DPMSolverMultistepInverseScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            "DPMSolverMultistepInverseScheduler, whose `step` needs more than",
        ),
        (None, "without `scheduler`"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_schedulers_that_cannot_be_used_are_refused_before_any_work(pipe, scheduler, message):
    runs = []
    pipe.text_encoder.register_forward_hook(lambda *_: runs.append(1))
    pipe.mllm.register_forward_hook(lambda *_: runs.append(1))
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        run(pipe)
    assert not runs


@pytest.mark.parametrize("cls", [FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler])
def test_schedulers_that_need_more_steps_or_noise(pipe, cls):
    pipe.scheduler = cls(shift=5.0)
    first, second = run(pipe)[0], run(pipe)[0]
    assert torch.equal(first, second)  # the noise of every step comes from the call's generator
    assert torch.isfinite(first).all()
    assert first.std() > 0.05


# --- presets go where the components go -----------------------------------------------------------------------------


def test_a_pipeline_of_the_same_components_has_the_same_presets(pipe, tmp_path):
    assert OmniVideoPipeline(**pipe.components).config.presets == tiny.PRESETS
    assert OmniVideoPipeline.from_pipe(pipe).config.presets == tiny.PRESETS
    pipe.register_to_config(presets=MIXED)
    assert OmniVideoPipeline(**pipe.components).config.presets == MIXED
    exchanged(pipe)
    again = OmniVideoPipeline(**pipe.components)
    again.set_progress_bar_config(disable=True)
    assert run(again)[1] == 8.0
    # an adapter of a fine-tune, and one that was saved and loaded by itself
    assert OmniVideoPipeline(**(pipe.components | {"adapter": tiny.model().adapter})).config.presets == MIXED
    pipe.adapter.save_pretrained(tmp_path)
    loaded = OmniVideoAdapter.from_pretrained(tmp_path)
    parts = pipe.components | {"adapter": loaded, "processor": tiny.processor()}
    assert OmniVideoPipeline(**parts).config.presets == MIXED


def test_components_without_presets_have_upstreams(pipe):
    parts = pipe.components | {"adapter": tiny.model().adapter, "processor": tiny.processor()}
    assert OmniVideoPipeline(**parts).config.presets == PRESETS
