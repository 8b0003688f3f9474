"""Edits through a decoder with source channels: the pipeline's guidance, limits and offers."""

import numpy as np
import pytest
import tiny
import torch
from diffusers import FasterCacheConfig

from omni_video_hf.models.source_channels import add_source_channels

CLIP = (np.arange(5 * 32 * 64 * 3) % 251).reshape(5, 32, 64, 3).astype(np.uint8)


def pipeline(source_conditioning, **adapter):
    """With random weights for the source channels."""
    pipe = tiny.pipeline(**adapter)
    pipe.set_progress_bar_config(disable=True)
    wide = add_source_channels(pipe.transformer)
    with torch.no_grad():
        wide.patch_embedding.weight[:, 16:].normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    pipe.register_modules(transformer=wide)
    pipe.adapter.register_to_config(source_conditioning=source_conditioning)
    return pipe


@pytest.fixture(scope="module", params=["channels", "both"])
def pipe(request):
    return pipeline(request.param)


def edit(pipe, prompt="a cat", **arguments):
    given = {"task": "v2v", "video": CLIP, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipe(prompt, **(given | arguments)).frames


def decoder_passes(pipe, **arguments):
    """Inputs and outputs of the decoder's passes."""
    seen = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs["hidden_states"], output[0])), with_kwargs=True
    )
    try:
        edit(pipe, **arguments)
    finally:
        hook.remove()
    return seen


def test_the_source_changes_the_result(pipe):
    assert not torch.allclose(edit(pipe), edit(pipe, video=255 - CLIP), atol=1e-2)


def test_branches_in_one_pass_give_the_same(pipe):
    torch.testing.assert_close(edit(pipe, batch_guidance=True), edit(pipe), atol=1e-4, rtol=1e-4)
    given = {"source_guidance_scale": 1.5}
    torch.testing.assert_close(edit(pipe, batch_guidance=True, **given), edit(pipe, **given), atol=1e-4, rtol=1e-4)


def test_a_batch_gives_what_its_samples_give_alone(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    clips = [CLIP, 255 - CLIP]
    together = edit(pipe, ["a cat", "a dog"], video=clips, generator=generators)
    alone = [
        edit(pipe, prompt, video=clip, generator=torch.Generator().manual_seed(seed))
        for seed, (prompt, clip) in enumerate(zip(("a cat", "a dog"), clips, strict=True))
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_several_samples_of_a_prompt_see_the_source_of_their_prompt(pipe):
    clips = [CLIP, 255 - CLIP]
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1, 2, 3)]
    four = edit(pipe, ["a cat", "a dog"], video=clips, num_videos_per_prompt=2, generator=generators)
    second = edit(pipe, "a dog", video=clips[1], generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(four[2:3], second, atol=1e-4, rtol=1e-4)


def test_source_guidance_is_the_formula(pipe, monkeypatch):
    """`v(none) + s_S (v(source) - v(none)) + s_T (v(source, text) - v(source))`, in the one step that is taken."""
    given = {}
    combine = type(pipe)._predict_velocity

    def keep(self, *args):
        given["velocity"] = combine(self, *args)
        return given["velocity"]

    monkeypatch.setattr(type(pipe), "_predict_velocity", keep)
    seen = decoder_passes(pipe, num_inference_steps=1, guidance_scale=3.0, source_guidance_scale=1.5)
    (cond_in, cond), (uncond_in, uncond), (none_in, none) = seen
    assert cond_in[:, 16:].any()
    assert torch.equal(cond_in, uncond_in)
    assert not none_in[:, 16:].any()
    wanted = none + 1.5 * (uncond - none) + 3.0 * (cond - uncond)
    torch.testing.assert_close(given["velocity"], wanted.float())


def test_a_source_scale_of_one_is_no_source_guidance_to_the_bit(pipe):
    assert torch.equal(edit(pipe, source_guidance_scale=1.0), edit(pipe))
    assert not torch.allclose(edit(pipe, source_guidance_scale=2.0), edit(pipe), atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": 1.0, "source_guidance_scale": 2.0}, "`guidance_scale` above 1"),
        ({"task": "t2v", "video": None, "source_guidance_scale": 2.0}, "'t2v' has no source"),
        ({"source_guidance_scale": float("nan")}, "`source_guidance_scale` must be a finite number"),
        ({"source_guidance_scale": -1.0}, "`source_guidance_scale` must be a finite number"),
    ],
)
def test_source_guidance_is_refused_where_it_cannot_work(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        edit(pipe, **arguments)


def test_source_guidance_and_faster_cache_are_refused_together(pipe):
    pipe.transformer.enable_cache(FasterCacheConfig(current_timestep_callback=lambda: pipe.current_timestep))
    try:
        with pytest.raises(ValueError, match="FasterCache knows two branches"):
            edit(pipe, source_guidance_scale=2.0)
    finally:
        pipe.transformer.disable_cache()


def test_an_image_goes_into_the_first_latent_frame(pipe):
    states, _ = decoder_passes(pipe, task="i2v", video=None, image=CLIP[0])[0]
    assert states[:, 16:, 0].any()
    assert not states[:, 16:, 1:].any()


def test_with_channels_alone_length_and_size_are_bounded_by_the_decoder_only(tmp_path):
    pipe = pipeline("channels", max_context_length=40)  # 33 of them taken without any source
    assert pipe.grid.source_tokens(32, 64, 5) == 0
    assert pipe.grid.multiple(with_source=True) == 16
    assert edit(pipe, video=np.concatenate([CLIP] * 5)[:21], num_inference_steps=1).shape[2] == 6
    both = pipeline("both", max_context_length=40)
    with pytest.raises(ValueError, match="context tokens"):
        edit(both, video=np.concatenate([CLIP] * 5)[:21])


def test_a_decoder_that_does_not_fit_the_adapter_is_refused():
    pipe = tiny.pipeline()
    pipe.adapter.register_to_config(source_conditioning="both")
    with pytest.raises(ValueError, match="omni-video add-source-channels"):
        edit(pipe)
