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
from omni_video_hf.diffusion.flow_matching import sampling_sigmas
from omni_video_hf.pipelines.presets import PRESETS
from omni_video_hf.pipelines.scheduling import check_schedule, chosen_shift, prepare_scheduler, preset_shift

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


# --- noise levels of the call ---------------------------------------------------------------------------------------

LEVELS = (1000.0, 937.5, 500, 250)
TAKE_SIGMAS = [
    tiny.scheduler(),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
    FlowMatchLCMScheduler(shift=3.0),
]


@pytest.mark.parametrize("scheduler", TAKE_SIGMAS, ids=lambda scheduler: type(scheduler).__name__)
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_sigmas_are_shifted_and_timesteps_are_not(scheduler, shift):
    base = torch.tensor([1.0, 0.75, 0.5])
    used = prepare_scheduler(scheduler, 3, shift, sigmas=base)
    assert torch.allclose(used.sigmas[:3].float(), shift * base / (1 + (shift - 1) * base), atol=1e-5)
    used = prepare_scheduler(scheduler, 4, shift, timesteps=LEVELS)
    assert used.timesteps.tolist() == list(LEVELS)
    assert torch.allclose(1000 * used.sigmas[:4].float(), torch.tensor(LEVELS), atol=2e-3)
    assert used.sigmas[4] == 0


def test_a_call_uses_and_records_its_noise_levels(pipe):
    frames = run(pipe)[0]
    output = pipe("a cat", generator=torch.Generator().manual_seed(0), **(
        ARGUMENTS | {"num_inference_steps": None, "sigmas": sampling_sigmas(3)}
    ))  # fmt: skip
    assert torch.equal(output.frames, frames)
    assert output.settings["num_inference_steps"] == 3
    assert output.settings["sigmas"] == list(sampling_sigmas(3))
    times = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: times.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    few = pipe("a cat", task="t2i", timesteps=LEVELS, guidance_scale=1.0, output_type="latent")
    assert times == list(LEVELS)
    assert few.settings["timesteps"] == list(LEVELS)
    assert "sigmas" not in few.settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigmas": [1.0], "timesteps": [1000]}, "`sigmas` and `timesteps` both"),
        ({"sigmas": [1.0, 0.5], "num_inference_steps": 3}, "`num_inference_steps` is 3, but `sigmas` has 2 values"),
        ({"sigmas": []}, "`sigmas` must be descending"),
        ({"sigmas": [1.0, 1.0]}, "`sigmas` must be descending"),
        ({"sigmas": [1.5, 0.5]}, "first at most 1 "),
        ({"sigmas": [1.0, 0.0]}, "last greater than 0"),
        ({"sigmas": [1.0, float("nan")]}, "`sigmas` must be descending"),
        ({"timesteps": [1001, 2]}, "`timesteps` must be descending numbers, the first at most 1000"),
        ({"timesteps": 4}, "`timesteps` must be a list of numbers, got 4"),
        ({"timesteps": ["a"]}, "`timesteps` must be a list of numbers"),
    ],
)
def test_noise_levels_that_make_no_schedule_are_refused(pipe, arguments, message):
    runs = []
    pipe.mllm.register_forward_hook(lambda *_: runs.append(1))
    with pytest.raises(ValueError, match=message):
        pipe("a cat", task="t2i", **arguments)
    assert not runs
    heun = FlowMatchHeunDiscreteScheduler(shift=5.0)
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler does not"):
        check_schedule(heun, None, [1.0, 0.5])


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
