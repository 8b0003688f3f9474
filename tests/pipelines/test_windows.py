"""Long videos in windows that are denoised together."""

import numpy as np
import pytest
import tiny
import torch
from accelerate import cpu_offload
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
)
from golden import CORE_EXPECTED, relative_error

from omni_video_hf import OmniVideoPipeline
from omni_video_hf.diffusion.window_plan import Window, plan_windows
from omni_video_hf.media.clip import VideoClip
from omni_video_hf.media.sources import Source
from omni_video_hf.models import context_attention
from omni_video_hf.models.source_channels import add_source_channels
from omni_video_hf.pipelines.guidance import Guidance
from omni_video_hf.pipelines.presets import SizeError

RANDOM = np.random.default_rng(0)
CLIP = RANDOM.integers(0, 255, (17, 32, 64, 3), dtype=np.uint8)
IMAGE = CLIP[0]
# 17 frames are 5 latent frames: three windows of three, the later two with a lead-in
WINDOWS = {"long_video": "windows", "window_frames": 9, "window_overlap": 4}
PLAN = (Window(0, 3), Window(2, 4, 0), Window(3, 5, 1))
TASKS = {"v2v": {"video": CLIP}, "t2v": {"num_frames": 17}, "i2v": {"image": IMAGE, "num_frames": 17}}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def made(source_conditioning):
    pipe = tiny.pipeline(max_context_length=160)
    pipe.set_progress_bar_config(disable=True)
    if source_conditioning != "context":
        wide = add_source_channels(pipe.transformer)
        with torch.no_grad():
            wide.patch_embedding.weight[:, 16:].normal_(generator=seeded(1)).mul_(0.1)
        pipe.register_modules(transformer=wide)
        pipe.adapter.register_to_config(source_conditioning=source_conditioning)
    return pipe


@pytest.fixture(scope="module", params=["context", "channels"])
def pipe(request):
    return made(request.param)


@pytest.fixture(scope="module")
def in_context():
    return made("context")


def generate(pipe, task="v2v", prompt="a cat", **arguments):
    given = {"task": task, "output_type": "latent", "generator": seeded()} | TASKS[task]
    return pipe(prompt, **(given | arguments))


def decoder_inputs(pipe, **arguments):
    """What the decoder gets in every pass."""
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["hidden_states"], kwargs["encoder_hidden_states"])),
        with_kwargs=True,
    )
    try:
        generate(pipe, **arguments)
    finally:
        hook.remove()
    return seen


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_a_video_that_fits_one_window_is_the_same_to_the_bit(pipe, task):
    short = {name: value[:9] if name == "video" else value for name, value in TASKS[task].items()}
    short |= {} if task == "v2v" else {"num_frames": 9}
    assert torch.equal(generate(pipe, task, **short, **WINDOWS).frames, generate(pipe, task, **short).frames)
    assert pipe.num_windows == 1


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_all_frames_and_says_how(pipe, task):
    output = generate(pipe, task, **WINDOWS)
    assert output.frames.shape[2] == 5
    assert pipe.num_windows == 3
    assert {name: output.settings[name] for name in WINDOWS} == WINDOWS
    assert not torch.equal(output.frames, generate(pipe, task).frames)
    assert generate(pipe, task).settings["window_frames"] is None


def test_the_decoder_sees_windows_of_the_trained_length_with_their_own_source(pipe):
    settings, source = pipe.prepare_settings("v2v", Source(videos=[VideoClip(CLIP, 8.0)]), *[None] * 7)
    passes = decoder_inputs(pipe, guidance_scale=1.0, num_inference_steps=1, **WINDOWS)
    assert len(passes) == len(PLAN)
    own = [pipe.encode_source(source, settings, frames) for frames in ((0, 9), (4, 13), (8, 17))]
    clip = pipe.encode_source(Source(videos=[VideoClip(CLIP[8:17], 8.0)]), settings)
    assert torch.equal(own[2], clip)  # as a clip of its own
    contexts = [context for _, context in passes]
    for number, (states, _) in enumerate(passes):
        assert states.shape[2] == 3
        if pipe.adapter.takes_source_in_channels:
            assert torch.equal(states[:, 16:], own[number])
    if pipe.adapter.takes_source_in_context:
        assert contexts[0].shape == contexts[1].shape
        assert not torch.equal(contexts[0], contexts[1])
        assert torch.equal(contexts[0][:, 8:], contexts[1][:, 8:])  # beside 6 source tokens and their markers


@pytest.mark.parametrize("batched", [False, True])
def test_the_loop_is_the_blend_of_plain_passes(in_context, batched):
    """Two steps of Euler by hand: pyramid weights, one step of the whole clip, lead-ins with a state of their own."""
    pipe, generator = in_context, seeded(5)
    assert plan_windows(5, 3, 1) == PLAN
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    noise, lead_ins = (
        torch.randn(1, 16, 5, 4, 8, generator=generator),
        torch.randn(1, 16, 2, 4, 8, generator=generator),
    )
    vision = torch.randn(1, 4, 24, generator=generator)
    text, null = torch.randn(1, 5, 32, generator=generator), torch.randn(1, 4, 24, generator=generator)
    sources = [{"source_latents": torch.randn(1, 16, 3, 4, 8, generator=generator)} for _ in PLAN]
    contexts = pipe.encode_contexts((vision, text), (null, None), sources, 1, 1)
    joint = pipe.prepare_windows(noise, PLAN, contexts, sources)
    object.__setattr__(joint, "lead_ins", lead_ins)
    own = scheduler.from_config(scheduler.config)
    own.set_timesteps(2)
    found = pipe.denoise(
        noise, own, contexts["context"][0], contexts["null_context"][0], guidance=Guidance(batched=batched),
        guidance_scale=3.0,
        joint=joint,
    )  # fmt: skip

    own = scheduler.from_config(scheduler.config)
    own.set_timesteps(2)
    clip, weights = noise, torch.tensor([[1, 1, 0.5, 0, 0], [0, 0, 0.5, 0.5, 0], [0, 0, 0, 0.5, 1]])
    for timestep, sigma, following in zip(own.timesteps, own.sigmas, own.sigmas[1:], strict=False):
        change, lead_change = torch.zeros_like(clip), torch.zeros_like(lead_ins)
        for number, window in enumerate(PLAN):
            states = clip[:, :, window.start : window.stop]
            if number:
                states = torch.cat([lead_ins[:, :, number - 1 : number], states], dim=2)
            cond, uncond = (
                plain(pipe, states, timestep, contexts[name][number]) for name in ("context", "null_context")
            )
            velocity = uncond + 3.0 * (cond - uncond)
            if number:
                lead_change[:, :, number - 1] = velocity[:, :, 0]
                velocity = velocity[:, :, 1:]
            weight = weights[number, window.start : window.stop].view(1, 1, -1, 1, 1)
            change[:, :, window.start : window.stop] += weight * velocity
        clip, lead_ins = clip + (following - sigma) * change, lead_ins + (following - sigma) * lead_change
    assert relative_error(found, clip) < 1e-4


@torch.no_grad()
def plain(pipe, states, timestep, context):
    return pipe.transformer(states, timestep[None], pipe.adapter.pad_context(context)).sample


@pytest.mark.parametrize("arguments", [{"batch_guidance": True}, {"source_guidance_scale": 1.5}])
def test_branches_in_one_pass_give_the_same(pipe, arguments):
    both = {"batch_guidance": True} | arguments
    found = generate(pipe, **both, **WINDOWS).frames
    torch.testing.assert_close(
        found, generate(pipe, **(both | {"batch_guidance": False}), **WINDOWS).frames, atol=1e-4, rtol=1e-4
    )


def test_a_batch_gives_what_its_samples_give_alone(pipe):
    clips = [CLIP, 255 - CLIP]
    together = generate(pipe, prompt=["a cat", "a dog"], video=clips, generator=[seeded(0), seeded(1)], **WINDOWS)
    alone = [
        generate(pipe, prompt=prompt, video=clip, generator=seeded(seed), **WINDOWS).frames
        for seed, (prompt, clip) in enumerate(zip(("a cat", "a dog"), clips, strict=True))
    ]
    torch.testing.assert_close(together.frames, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_an_image_begins_the_video_and_no_later_window():
    pipe = made("channels")
    passes = decoder_inputs(pipe, task="i2v", guidance_scale=1.0, num_inference_steps=1, **WINDOWS)
    assert [bool(states[:, 16:].any()) for states, _ in passes] == [True, False, False]


def test_keys_and_values_of_later_windows_are_kept_within_a_limit(in_context, monkeypatch):
    """Both ways give the same numbers; beyond the limit the projections run in every step."""

    def projections():
        calls = []
        hook = in_context.transformer.blocks[0].attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
        try:
            return generate(in_context, num_inference_steps=3, **WINDOWS).frames, len(calls)
        finally:
            hook.remove()

    kept, count = projections()
    assert count == 3 * 2  # windows and branches, once
    monkeypatch.setattr(context_attention, "KEPT_BYTES", 0)
    found, count = projections()
    assert count == 2 + 3 * 2 * 2  # the first window once, the later ones in each of three steps
    torch.testing.assert_close(found, kept, atol=1e-5, rtol=1e-5)


# --- golden ---------------------------------------------------------------------------------------------------------


def test_windows_keep_what_upstreams_context_loses(converted):
    """
    A 41-frame edit: the source fills upstream's single context, which ends before the text.

    The golden sizes are those of the release divided by 40: windows of four latent frames fill 62 of 64 tokens.
    """
    pipe = OmniVideoPipeline.from_pretrained(converted, dtype=torch.float32)
    golden = CORE_EXPECTED["source_latent_video"][None]
    clip = torch.cat([golden] * 4, dim=2)[:, :, :11]
    tokens = pipe.mllm(mllm_hidden_states=CORE_EXPECTED["mllm_hidden_video"], output_vision_tokens=True).vision_tokens
    given = (tokens, CORE_EXPECTED["text_embeds"][None]), (pipe.mllm(output_vision_tokens=True).vision_tokens, None)
    (cut,) = pipe.encode_contexts(*given, [{"source_latents": clip}], 1, 1, context_overflow="truncate")["context"]
    tail = CORE_EXPECTED["v2v.mixed_context"][20:]  # upstream's visual tokens and text, after 18 tokens of its source
    null_tail = CORE_EXPECTED["v2v.mixed_context_uncond"][20:]
    assert cut.shape[1] == 64
    assert not any(torch.allclose(row, tail[-2], atol=1e-4) for row in cut[0])  # the last token of the text

    windows = plan_windows(11, 4, 1)
    lead_ins = golden[:, :, :1].expand(-1, -1, len(windows) - 1, -1, -1)
    sources = [{"source_latents": window.take(clip, lead_ins)} for window in windows]
    contexts = pipe.encode_contexts(*given, sources, 1, 1)
    assert len(contexts["context"]) == len(windows) > 3
    for context, null in zip(contexts["context"], contexts["null_context"], strict=True):
        assert relative_error(context[0, -len(tail) :], tail) < 1e-4
        assert relative_error(null[0, -len(null_tail) :], null_tail) < 1e-4


@torch.no_grad()
def test_windows_keep_text_and_visual_tokens_at_the_released_context_length():
    """640x352 in 2560 tokens, as released: 41 frames take 2420 of them, a window of 17 frames 1100."""
    pipe = tiny.pipeline(num_query_tokens=256, max_context_length=2560)
    clip, text = torch.randn(1, 16, 11, 44, 80, generator=seeded()), torch.randn(1, 20, 32, generator=seeded(1))
    given = (torch.randn(1, 4, 24, generator=seeded(2)), text), (None, None)
    (free,) = pipe.encode_contexts(*given, [{}], 1, 1)["context"]
    (cut,) = pipe.encode_contexts(*given, [{"source_latents": clip}], 1, 1, context_overflow="truncate")["context"]
    assert not torch.isclose(cut[0, :, None], text[0, None], atol=1e-5).all(-1).any()
    windows = pipe.resolve_long_video("v2v", "windows", 17).plan(pipe.grid, 41)
    sources = [{"source_latents": window.take(clip, clip[:, :, -len(windows) + 1 :])} for window in windows]
    for context in pipe.encode_contexts(*given, sources, 1, 1)["context"]:
        assert context.shape[1] == 1102 + 1026 + 22
        assert torch.equal(context[:, 1102:], free)


# --- the rest of a call ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [FasterCacheConfig, PyramidAttentionBroadcastConfig])
def test_caches_with_one_state_for_all_passes_are_refused(in_context, config):
    in_context.transformer.enable_cache(config(current_timestep_callback=lambda: in_context.current_timestep))
    try:
        with pytest.raises(ValueError, match=r"needs 3 windows, but .* has one state for all passes"):
            generate(in_context, **WINDOWS)
    finally:
        in_context.transformer.disable_cache()


def test_other_caches_have_a_state_per_window(in_context):
    """With one state for all windows, MagCache would count every pass as a step, and skip at other ones."""
    runs = []
    steps = {"num_inference_steps": 6}
    in_context.transformer.enable_cache(
        MagCacheConfig(threshold=10.0, num_inference_steps=6, mag_ratios=[1.0] * 6, max_skip_steps=2)
    )
    hook = in_context.transformer.blocks[-1].attn2.to_q.register_forward_hook(lambda *_: runs.append(1))
    try:
        generate(in_context, video=CLIP[:9], **steps)
        single = len(runs)
        generate(in_context, **steps, **WINDOWS)
    finally:
        hook.remove()
        in_context.transformer.disable_cache()
    assert single < 12
    assert len(runs) - single == 3 * single


def test_a_cache_that_skips_nothing_changes_nothing(in_context):
    exact = generate(in_context, **WINDOWS).frames
    in_context.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    try:
        assert relative_error(generate(in_context, **WINDOWS).frames, exact) < 1e-5
    finally:
        in_context.transformer.disable_cache()


def test_callbacks_get_and_change_the_whole_clip(pipe):
    shapes = []

    def zero(running, step, timestep, tensors):
        shapes.append(tuple(tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])}

    output = generate(pipe, callback_on_step_end=zero, **WINDOWS)
    assert shapes == [(1, 16, 5, 4, 8)] * 2
    assert not output.frames.any()


def test_contexts_of_windows_are_not_given_to_callbacks(in_context):
    with pytest.raises(ValueError, match="each of the 3 windows has a context of its own"):
        generate(in_context, callback_on_step_end_tensor_inputs=["latents", "context"], **WINDOWS)
    with pytest.raises(ValueError, match="returned `context`, but with `long_video='windows'`"):
        generate(
            in_context, callback_on_step_end=lambda *_: {"context": torch.zeros(1, 3, 32)}, **WINDOWS
        )  # fmt: skip
    given = ["latents", "prompt_embeds"]
    generate(in_context, "t2v", callback_on_step_end_tensor_inputs=given, **WINDOWS)  # one context for all windows


def test_a_call_can_be_interrupted_between_two_windows(pipe):
    passes = []

    def interrupt(module, args):
        passes.append(1)
        pipe._interrupt = len(passes) == 4  # in the second step

    first = []
    arguments = {"guidance_scale": 1.0, "callback_on_step_end": lambda *all: first.append(all[3]["latents"]) or {}}
    hook = pipe.transformer.blocks[0].register_forward_pre_hook(interrupt)
    try:
        output = generate(pipe, **arguments, **WINDOWS)
    finally:
        hook.remove()
    assert len(passes) == 4
    assert len(first) == 1
    assert torch.equal(output.frames, first[0])


def test_offloading_changes_nothing(in_context):
    """Weights that a hook does not bring in are on the meta device, and would fail."""
    other = made("context")
    for name in ("text_encoder", "mllm", "adapter", "transformer", "vae"):
        cpu_offload(getattr(other, name), torch.device("cpu"), offload_buffers=True)
    found = generate(other, output_type="pt", **WINDOWS).frames
    assert torch.equal(found, generate(in_context, output_type="pt", **WINDOWS).frames)


def test_the_progress_bar_counts_windows(pipe, capsys):
    pipe.set_progress_bar_config(disable=False, mininterval=0, ncols=200)
    try:
        generate(pipe, **WINDOWS)
    finally:
        pipe.set_progress_bar_config(disable=True)
    shown = capsys.readouterr().err
    assert "6/6" in shown
    assert "step 2/2, window 3/3" in shown


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"long_video": "loop"}, "`long_video` must be 'windows', 'chunks' or None, got 'loop'"),
        ({"window_frames": 9}, "`window_frames` is 9, but `long_video` is None"),
        ({"window_overlap": 4}, "`window_overlap` is 4, but `long_video` is None"),
        ({"long_video": "windows", "window_frames": 10}, "`window_frames` must be 4n"),
        ({"long_video": "windows", "window_frames": 5}, "at least 9, got 5"),
        ({"long_video": "windows", "window_frames": 13, "window_overlap": 6}, "multiple of 4 in 4..8"),
        ({"long_video": "windows", "window_frames": 13, "window_overlap": 12}, "multiple of 4 in 4..8"),
        ({"long_video": "windows", "window_frames": 9.5}, "`window_frames` must be a whole number"),
    ],
)
def test_windows_that_cannot_be_are_refused_before_anything_runs(in_context, arguments, message):
    hook = in_context.mllm.register_forward_pre_hook(lambda *_: pytest.fail("the MLLM ran"))
    try:
        with pytest.raises(ValueError, match=message):
            generate(in_context, **arguments)
    finally:
        hook.remove()


def test_latents_of_a_source_cannot_be_cut_into_windows(in_context):
    latents = torch.zeros(1, 16, 5, 4, 8)
    with pytest.raises(ValueError, match="every window encodes its own frames"):
        generate(in_context, video=None, source_latents=latents, **WINDOWS)


def test_what_is_too_long_for_the_context_names_windows_and_fits_in_them():
    pipe = made("context")
    presets = {task: preset | {"num_frames": 9 if task.endswith("v") else 1} for task, preset in tiny.PRESETS.items()}
    pipe.register_to_config(presets=presets)
    free = pipe._source_room("v2v", ["a cat"], None, None, None, None, 512, 1000)
    limit = {"max_context_length": 1000 - free + 7}  # 5 latent frames take 10 tokens, 3 take 6
    with pytest.raises(
        SizeError, match="Pass `long_video='windows'` to keep the size and all frames, in windows of 9"
    ):
        generate(pipe, **limit)
    assert generate(pipe, long_video="windows", **limit).frames.shape[2] == 5
    with pytest.raises(SizeError, match=r"A window of 64x32 with 13 frames .* smaller `window_frames`"):
        generate(pipe, long_video="windows", window_frames=13, **limit)


def test_what_the_decoder_has_no_positions_for_fits_in_windows(in_context):
    settings, _ = in_context.prepare_settings(
        "t2v", Source(), None, None, 257, *[None] * 4, long_video=in_context.resolve_long_video("t2v", "windows")
    )
    assert settings.num_frames == 257
