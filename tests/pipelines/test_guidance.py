import numpy as np
import pytest
import tiny
import torch
from golden import relative_error

from omni_video_hf.media.clip import VideoClip
from omni_video_hf.pipelines.guidance import Guidance

ARGUMENTS = {"task": "t2v", "num_inference_steps": 6, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, prompt="a cat", **arguments):
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **(ARGUMENTS | arguments)).frames


def decoder_passes(pipe, **arguments):
    """Batch sizes of the decoder's passes."""
    sizes = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        latents = run(pipe, **arguments)
    finally:
        hook.remove()
    return sizes, latents


def test_the_whole_interval_is_the_default_to_the_bit(pipe):
    wanted = run(pipe)
    assert torch.equal(run(pipe, guidance_interval=None, batch_guidance=False), wanted)
    assert torch.equal(run(pipe, guidance_interval=(0.0, 1.0)), wanted)
    assert not torch.allclose(run(pipe, guidance_interval=(0.0, 0.5)), wanted, atol=1e-2)


@pytest.mark.parametrize(
    ("interval", "passes"),
    [((0.0, 0.5), [2, 2, 2, 1, 1, 1]), ((0.5, 1.0), [1, 1, 1, 2, 2, 2]), ((0.4, 0.45), [1] * 6)],
)
def test_outside_the_interval_one_branch_runs(pipe, interval, passes):
    per_step = [0]
    hook = pipe.transformer.register_forward_hook(lambda *_: per_step.__setitem__(-1, per_step[-1] + 1))
    try:
        latents = run(pipe, guidance_interval=interval, callback_on_step_end=lambda *_: per_step.append(0) or {})
    finally:
        hook.remove()
    assert per_step[:-1] == passes
    if 2 not in passes:
        assert torch.equal(latents, run(pipe, guidance_scale=1.0))


def test_an_interval_equals_a_scale_of_one_elsewhere(pipe):
    def switch(running, step, timestep, tensors):
        running._guidance_scale = 3.0 if step < 2 else 1.0
        return {}

    switched = run(pipe, callback_on_step_end=switch)
    assert relative_error(run(pipe, guidance_interval=(0.0, 0.5)), switched) < 1e-5


@pytest.mark.parametrize("task", ["t2i", "t2v", "v2v"])
def test_batched_equals_unbatched(pipe, task):
    arguments = {"task": task, "num_inference_steps": 3, "max_context_length": 160}
    if task == "v2v":
        arguments["video"] = VideoClip(np.random.default_rng(0).integers(0, 255, (5, 32, 64, 3), dtype=np.uint8), 12.0)
    sizes, batched = decoder_passes(pipe, batch_guidance=True, **arguments)
    assert sizes == [2, 2, 2]
    assert relative_error(batched, run(pipe, **arguments)) < 1e-5


def test_batched_with_several_samples_and_an_interval(pipe):
    arguments = {
        "prompt": ["a cat", "a much longer prompt"],
        "negative_prompt": "ugly",
        "guidance_interval": (0.0, 0.5),
    }
    sizes, batched = decoder_passes(pipe, batch_guidance=True, **arguments)
    assert sizes == [4, 4, 4, 2, 2, 2]
    assert relative_error(batched, run(pipe, **arguments)) < 1e-5


@pytest.mark.parametrize("batched", [False, True])
def test_contexts_that_a_callback_changes(pipe, batched):
    def change(running, step, timestep, tensors):
        return {"null_context": tensors["null_context"] * 0} if step == 1 else {}

    arguments = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["latents", "null_context"]}
    changed = run(pipe, **arguments)
    assert not torch.allclose(changed, run(pipe), atol=1e-2)
    assert relative_error(run(pipe, batch_guidance=batched, **arguments), changed) < 1e-5


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.8, 0.2), (-0.1, 1.0), (0.0, 1.5), (0.1,)])
def test_intervals_that_are_none_are_refused(pipe, interval):
    with pytest.raises(ValueError, match="0 <= start < stop <= 1"):
        run(pipe, guidance_interval=interval)


def test_settings_name_what_was_asked_for(pipe):
    output = pipe("a cat", task="t2i", guidance_interval=(0.1, 0.9), batch_guidance=True, output_type="latent")
    assert output.settings["guidance_interval"] == (0.1, 0.9)
    assert output.settings["batch_guidance"] is True


def test_guidance_alone_without_a_null_context():
    guidance = Guidance(batched=True)
    contexts = guidance.contexts(torch.zeros(2, 3, 4), None)
    assert list(contexts) == ["cond"]
    assert guidance.branches(0, 10, contexts) == ("cond",)
