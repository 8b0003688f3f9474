"""Savings that the user asks for, through diffusers' own switches, and what a call must not do."""

import pytest
import tiny
import torch
from absent_device import DEVICE, Synchronisations
from diffusers import (
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    MagCacheConfig,
    TaylorSeerCacheConfig,
)
from golden import relative_error

from omni_video_hf.pipelines import guidance
from omni_video_hf.pipelines.request_checks import FiniteSteps

STEPS = 6
CACHES = {
    "first block": FirstBlockCacheConfig(threshold=1e3),
    "magnitude": MagCacheConfig(threshold=10.0, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS, max_skip_steps=2),
    "taylor": TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, cache_identifiers=list(guidance.TAYLORSEER_LAYERS)
    ),
    "taylor lite": TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2, use_lite_mode=True),
}
ARGUMENTS = {"task": "t2v", "num_inference_steps": STEPS, "output_type": "latent"}


@pytest.fixture
def pipe():
    pipe = tiny.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, prompt="a cat", **arguments):
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **(ARGUMENTS | arguments)).frames


def attention_runs(pipe, **arguments):
    """How often the last block's cross-attention computes, and the result."""
    calls = []
    hook = pipe.transformer.blocks[-1].attn2.to_q.register_forward_hook(lambda *_: calls.append(1))
    try:
        latents = run(pipe, **arguments)
    finally:
        hook.remove()
    return len(calls), latents


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", CACHES)
def test_step_caches_skip_work_and_leave_nothing_behind(pipe, name, batched):
    arguments = {"batch_guidance": batched}
    all_runs, exact = attention_runs(pipe, **arguments)
    assert all_runs == STEPS * (1 if batched else 2)
    pipe.transformer.enable_cache(CACHES[name])
    runs, cached = attention_runs(pipe, **arguments)
    assert 0 < runs <= 2 / 3 * all_runs
    assert torch.isfinite(cached).all()
    assert not torch.equal(cached, exact)
    assert torch.nn.functional.cosine_similarity(cached.flatten(), exact.flatten(), dim=0) > 0.5
    again = attention_runs(pipe, **arguments)
    assert again[0] == runs
    assert torch.equal(again[1], cached)
    pipe.transformer.disable_cache()
    assert torch.equal(run(pipe, **arguments), exact)


def test_a_cache_that_skips_nothing_is_warned_of(pipe, monkeypatch):
    """diffusers' own patterns for TaylorSeer match no layer of Wan's decoder."""
    warnings = []
    monkeypatch.setattr(guidance.logger, "warning", warnings.append)
    for name in ("taylor", "taylor lite"):
        pipe.transformer.enable_cache(CACHES[name])
        run(pipe)
        pipe.transformer.disable_cache()
    assert not warnings
    exact = run(pipe)
    for patterns in (None, ["blocks.9"]):
        pipe.transformer.enable_cache(TaylorSeerCacheConfig(cache_interval=2, cache_identifiers=patterns))
        assert torch.equal(run(pipe), exact)
        pipe.transformer.disable_cache()
    defaults, own = warnings
    assert "TaylorSeer is enabled but skips nothing: the default patterns" in defaults
    assert "`cache_identifiers=['blocks.9']` match no layer" in own
    assert str(list(guidance.TAYLORSEER_LAYERS)) in own


def test_cond_and_uncond_have_caches_of_their_own(pipe):
    """With one cache for both, the velocities would be equal in a skipped step and the scale would not matter."""
    pipe.transformer.enable_cache(CACHES["magnitude"])
    assert not torch.allclose(run(pipe, guidance_scale=2.0), run(pipe, guidance_scale=6.0), atol=1e-2)


@pytest.mark.parametrize("name", CACHES)
def test_a_call_that_breaks_off_does_not_disturb_the_next(pipe, name):
    exact = run(pipe)
    processors = dict(pipe.transformer.attn_processors)
    pipe.transformer.enable_cache(CACHES[name])
    cached = run(pipe)

    def fail(running, step, timestep, tensors):
        if step == 2:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run(pipe, "a dog", callback_on_step_end=fail)
    assert dict(pipe.transformer.attn_processors) == processors
    assert torch.equal(run(pipe), cached)
    pipe.transformer.disable_cache()
    assert torch.equal(run(pipe), exact)


def test_layerwise_casting(pipe):
    exact = run(pipe)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    block = pipe.transformer.blocks[0]
    assert block.ffn.net[2].weight.dtype == torch.float8_e4m3fn
    assert block.norm2.weight.dtype == torch.float32
    error = relative_error(run(pipe), exact)
    assert 0 < error < 0.3
    # the keys that are kept are those of the stored weights: the plain path agrees
    context = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1))
    latents = torch.randn(1, 16, 2, 4, 8, generator=torch.Generator().manual_seed(2))
    padded = pipe.adapter.pad_context(context)
    with torch.no_grad():
        wanted = pipe.transformer(latents, torch.tensor([500.0]), padded).sample
        scheduler = pipe.prepare_scheduler(1, 5.0)
        scheduler.timesteps[:] = 500
        velocities = []
        scheduler.step = lambda velocity, *_, **__: velocities.append(velocity) or (latents,)
        pipe.denoise(latents, scheduler, context)
    assert relative_error(velocities[0], wanted) < 1e-5


def test_vae_tiling_and_slicing(pipe):
    arguments = {"output_type": "pt", "num_inference_steps": 1, "height": 64, "width": 96, "num_videos_per_prompt": 2}
    exact = run(pipe, **arguments)
    pipe.vae.enable_slicing()
    assert relative_error(run(pipe, **arguments), exact) < 1e-5
    pipe.vae.enable_tiling(
        tile_sample_min_height=32, tile_sample_min_width=48, tile_sample_stride_height=24, tile_sample_stride_width=32
    )
    tiled = run(pipe, **arguments)
    assert tiled.shape == exact.shape
    assert 0 < relative_error(tiled, exact) < 0.5  # blended seams
    pipe.vae.disable_tiling()
    pipe.vae.disable_slicing()
    assert torch.equal(run(pipe, **arguments), exact)


SCHEDULERS = {
    "UniPC": tiny.scheduler(),
    "Euler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "DPM": DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
}


@torch.no_grad()
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_host_never_waits_for_the_device_inside_the_loop(pipe, name, monkeypatch):
    pipe.scheduler = SCHEDULERS[name]
    pipe.transformer.to(DEVICE)
    latents = torch.empty(1, 16, 2, 4, 8, device=DEVICE)
    contexts = [torch.empty(1, length, 32, device=DEVICE) for length in (9, 5)]
    per_step, checked_after = [], []
    monkeypatch.setattr(FiniteSteps, "check", lambda *_: checked_after.append(len(per_step)))  # it reads values

    def note(running, step, timestep, tensors):
        per_step.append(sum(synchronisations.counts.values()))
        return {}

    with Synchronisations() as synchronisations:
        # what is copied before the loop comes along once per call
        pipe.denoise(
            latents, pipe.prepare_scheduler(6, 5.0, DEVICE), *contexts, callback_on_step_end=note, guidance_scale=3.0
        )
    assert len(per_step) == 6
    assert checked_after == [6]
    assert set(per_step) == {per_step[0]}


def test_synchronisations_are_noticed():
    there = torch.empty(2, 2, device=DEVICE)
    with Synchronisations() as synchronisations:
        torch.linalg.solve(there, there[0])
        torch.ones(2).to(DEVICE)
    assert sum(synchronisations.counts.values()) == 2
    for read in (torch.Tensor.item, torch.Tensor.cpu):
        with pytest.raises((RuntimeError, NotImplementedError)), Synchronisations():
            read(there[0, 0])
