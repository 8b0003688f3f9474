"""What users of diffusers may expect of any pipeline, in our words: see docs/conventions.md."""

import inspect

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    DiffusionPipeline,
    FasterCacheConfig,
    PyramidAttentionBroadcastConfig,
    apply_pyramid_attention_broadcast,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from golden import relative_error
from PIL import Image

from omni_video_hf import OmniVideoPipeline
from omni_video_hf.media.sources import Source
from omni_video_hf.pipelines.shared import repository_mixin

STEPS = 8
ARGUMENTS = {"task": "t2v", "num_inference_steps": 2, "output_type": "latent"}
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
WEIGHTED = ("mllm", "adapter", "transformer", "text_encoder", "vae")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipe():
    return made()


def made(**adapter):
    pipe = tiny.pipeline(max_context_length=160, **adapter)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, prompt="a cat", **arguments):
    return pipe(prompt, generator=seeded(), **(ARGUMENTS | arguments)).frames


def loaded_from(folder, **arguments):
    pipe = OmniVideoPipeline.from_pretrained(folder, **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- components -----------------------------------------------------------------------------------------------------


def test_components_are_those_of_the_signature(pipe):
    parameters = inspect.signature(OmniVideoPipeline.__init__).parameters
    assert set(pipe.components) == set(parameters) - {"self", "presets", "scheduler_shift"}
    again = OmniVideoPipeline(**pipe.components)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(run(again), run(pipe))
    from_pipe = OmniVideoPipeline.from_pipe(pipe)
    from_pipe.set_progress_bar_config(disable=True)
    assert torch.equal(run(from_pipe), run(pipe))


def test_a_pipeline_for_encoding_alone(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "whole")
    encoder = loaded_from(tmp_path / "whole", transformer=None, vae=None)
    assert torch.equal(encoder.encode_prompt("a cat")[0], pipe.encode_prompt("a cat")[0])
    assert torch.equal(encoder.encode_instruction("t2v", "a cat"), pipe.encode_instruction("t2v", "a cat"))
    answer = {"task": "understand", "max_new_tokens": 3, "image": IMAGE}
    assert encoder("what?", **answer).text == pipe("what?", **answer).text
    encoder.save_pretrained(tmp_path / "encoder")
    again = loaded_from(tmp_path / "encoder")
    assert again.transformer is again.vae is None
    assert again.config.presets == pipe.config.presets
    assert torch.equal(again.encode_prompt("a cat")[0], pipe.encode_prompt("a cat")[0])
    again.register_modules(transformer=pipe.transformer, vae=pipe.vae)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(run(again), run(pipe))


@pytest.mark.parametrize("missing", ["transformer", "vae"])
def test_a_call_that_needs_a_missing_part_names_it(pipe, missing):
    pipe.register_modules(**{missing: None})
    runs = []
    pipe.mllm.register_forward_hook(lambda *_: runs.append(1))
    for call in (lambda: run(pipe), lambda: run(pipe, num_frames=5), lambda: pipe.grid):
        with pytest.raises(ValueError, match=f"without `{missing}`"):
            call()
    assert not runs
    if missing == "vae":
        with pytest.raises(ValueError, match="without `vae`"):
            pipe.decode(torch.zeros(1, 16, 1, 2, 2))
        with pytest.raises(ValueError, match="without `vae`"):
            pipe.encode_source(Source(images=[IMAGE]), None)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_half_precision_and_variants_are_kept(pipe, tmp_path, variant):
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(tmp_path, variant=variant)
    names = [path.name for path in (tmp_path / "transformer").glob("*.safetensors")]
    assert names
    assert all((".fp16." in name) == (variant == "fp16") for name in names)
    loaded = loaded_from(tmp_path, dtype=torch.float16, variant=variant)
    for name in WEIGHTED:
        ours, theirs = getattr(pipe, name).state_dict(), getattr(loaded, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key].float(), theirs[key].float()) for key in ours), name
    assert loaded.text_encoder.dtype == loaded.vae.dtype == torch.float16


@pytest.mark.parametrize("dtype", [None, "auto"])
@pytest.mark.parametrize("variant", [None, "bf16"])
def test_parts_load_as_stored_and_the_vae_in_float32(pipe, tmp_path, monkeypatch, dtype, variant):
    """Without a dtype on a machine with an accelerator, and with "auto" on every machine."""
    pipe.to(dtype=torch.bfloat16)
    pipe.transformer.scale_shift_table.data = pipe.transformer.scale_shift_table.data.float()  # as Wan stores it
    pipe.save_pretrained(tmp_path, variant=variant)
    if dtype is None:
        on_cpu = loaded_from(tmp_path, variant=variant)
        assert on_cpu.transformer.dtype == on_cpu.adapter.dtype == on_cpu.vae.dtype == torch.float32
        monkeypatch.setattr(repository_mixin, "get_device", lambda: "cuda")
    loaded = loaded_from(tmp_path, dtype=dtype, variant=variant)
    dtypes = {name: getattr(loaded, name).dtype for name in WEIGHTED}
    assert dtypes == dict.fromkeys(WEIGHTED, torch.bfloat16) | {"vae": torch.float32}
    assert torch.isfinite(run(loaded)).all()
    given = loaded_from(tmp_path, dtype=dtype, variant=variant, transformer=pipe.transformer, vae=None)
    assert given.transformer is pipe.transformer
    assert loaded_from(tmp_path, dtype=torch.float32, variant=variant).adapter.dtype == torch.float32


def test_dtypes_of_a_hub_repository_come_from_its_download(pipe, tmp_path, monkeypatch):
    pipe.to(dtype=torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    calls = []
    download = classmethod(lambda cls, name, **options: calls.append((name, options)) or str(tmp_path))
    monkeypatch.setattr(OmniVideoPipeline, "download", download)
    options = {"token": "secret", "force_download": True, "vae": None}
    found = OmniVideoPipeline._with_dtypes("owner/name", {"dtype": "auto", **options})
    assert calls == [("owner/name", options)]
    assert found.keys() == {"token", "vae", "dtype"}  # what was downloaded is not downloaded again
    assert {found["dtype"][name] for name in ("mllm", "text_encoder", "adapter", "transformer")} == {torch.bfloat16}
    assert found["dtype"]["vae"] == torch.float32


def test_rounding_of_stored_float32_weights_is_said(pipe, tmp_path, monkeypatch):
    pipe.mllm.mllm.to(torch.bfloat16)  # a trained vision head in float32 beside an MLLM in bfloat16
    pipe.save_pretrained(tmp_path)
    warnings = []
    monkeypatch.setattr(repository_mixin.logger, "warning", warnings.append)
    assert loaded_from(tmp_path, dtype="auto").mllm.dtype == torch.bfloat16
    values = sum(tensor.numel() for tensor in pipe.mllm.vision_head.state_dict().values())
    (warning,) = warnings
    assert warning.startswith(f"`mllm`: {values:,} values are stored in float32")
    assert "dtype={'mllm': torch.float32" in warning


def test_to_changes_every_part(pipe):
    pipe.to(dtype=torch.bfloat16)
    assert {getattr(pipe, name).dtype for name in WEIGHTED} == {torch.bfloat16}
    assert run(pipe).dtype == torch.float32  # the noise is integrated in float32
    assert np.isfinite(run(pipe, output_type="np")).all()
    pipe.to("cpu", torch.float32)
    assert {getattr(pipe, name).dtype for name in WEIGHTED} == {torch.float32}


# --- calls ----------------------------------------------------------------------------------------------------------


def test_tuples_hold_what_the_output_holds(pipe):
    output = pipe("a cat", generator=seeded(), **ARGUMENTS)
    frames, text = pipe("a cat", generator=seeded(), return_dict=False, **ARGUMENTS)
    assert torch.equal(frames, output.frames)
    assert text is output.text is None
    assert torch.equal(output[0], output["frames"])


@pytest.mark.parametrize("batch", [2, 3])
def test_a_batch_equals_its_samples(pipe, batch):
    prompts = ["a cat", "a much longer prompt about a dog", "x"][:batch]
    together = pipe(prompts, generator=[seeded(place) for place in range(batch)], **ARGUMENTS).frames
    for place, prompt in enumerate(prompts):
        alone = pipe(prompt, generator=seeded(place), **ARGUMENTS).frames
        assert relative_error(together[place], alone[0]) < 1e-4


@pytest.mark.parametrize(("prompts", "each"), [("a cat", 3), (["a cat", "a dog"], 2)])
def test_several_videos_per_prompt(pipe, prompts, each):
    count = each * (1 if isinstance(prompts, str) else len(prompts))
    arguments = ARGUMENTS | {"num_inference_steps": 1, "output_type": "pt"}
    assert len(pipe(prompts, num_videos_per_prompt=each, **arguments).frames) == count


def test_encoding_in_isolation_gives_the_same(pipe):
    """Embeddings that another pipeline, or an earlier call, made."""
    wanted = run(pipe, negative_prompt="ugly")
    given = {
        "prompt_embeds": pipe.encode_prompt("a cat"),
        "negative_prompt_embeds": pipe.encode_prompt("ugly"),
        "mllm_hidden_states": states(pipe, "a cat"),
        "negative_mllm_hidden_states": states(pipe, "ugly"),
    }
    pipe.register_modules(text_encoder=None, tokenizer=None)
    assert torch.equal(run(pipe, None, **given), wanted)


def states(pipe, prompt):
    with torch.no_grad():
        return pipe.mllm.get_mllm_hidden_states(
            **pipe.processor.apply_task_template("t2v", prompt, return_tensors="pt")
        )


def test_public_steps_build_no_graph(pipe):
    settings = pipe.prepare_settings("i2i", Source(images=[IMAGE]), *[None] * 7)[0]
    results = [
        *pipe.encode_prompt("a cat"),
        pipe.encode_instruction("t2v", "a cat"),
        pipe.encode_null_instruction("t2v", None, 1, Source()),
        pipe.encode_source(Source(images=[IMAGE]), settings),
        pipe.decode(torch.zeros(1, 16, 1, 2, 2), "pt"),
        pipe.denoise(torch.zeros(1, 16, 1, 2, 2), pipe.prepare_scheduler(1, 5.0), torch.ones(1, 3, 32)),
    ]
    assert torch.is_grad_enabled()
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("negative", ["", [""]])
def test_an_empty_negative_prompt_is_a_prompt(pipe, negative):
    prompts = "a cat" if isinstance(negative, str) else ["a cat"]
    empty = run(pipe, prompts, negative_prompt=negative, guidance_scale=4.0)
    stored = run(pipe, prompts, guidance_scale=4.0)  # what the checkpoint has for none
    ugly = run(pipe, prompts, negative_prompt="ugly", guidance_scale=4.0)
    assert not torch.equal(empty, stored)
    assert not torch.equal(empty, ugly)
    text = pipe.encode_prompt([""])
    given = {"negative_prompt_embeds": text, "negative_mllm_hidden_states": empty_states(pipe)}
    assert torch.equal(run(pipe, prompts, guidance_scale=4.0, **given), empty)
    with pytest.raises(ValueError, match="non-empty"):
        run(pipe, "")


def empty_states(pipe):
    inputs = pipe.processor.apply_task_template("t2v", "", allow_empty=True, return_tensors="pt")
    with torch.no_grad():
        return pipe.mllm.get_mllm_hidden_states(**inputs)


# --- callbacks ------------------------------------------------------------------------------------------------------


def test_callbacks_get_what_they_ask_for_and_nothing_else(pipe):
    names = pipe._callback_tensor_inputs
    assert {"prompt_embeds", "negative_prompt_embeds", "latents"} <= set(names)
    seen = []

    def note(running, step, timestep, tensors):
        seen.append(
            (set(tensors), running.current_timestep == timestep, running.attention_kwargs, running.num_timesteps)
        )
        assert running.guidance_scale == 3.0
        assert running.do_classifier_free_guidance
        assert tensors["prompt_embeds"] is tensors["context"]
        assert tensors["negative_prompt_embeds"] is tensors["null_context"]
        return tensors

    kwargs = {"scale": 1.0}
    wanted = run(pipe)
    changed = run(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=names, attention_kwargs=kwargs)
    assert seen == [(set(names), True, kwargs, 2)] * 2
    assert torch.equal(changed, wanted)
    assert pipe.current_timestep is None


@pytest.mark.parametrize("batched", [False, True])
def test_diffusers_callback_turns_guidance_off(pipe, batched):
    """It sets the scale to 0, which is no guidance, and not the null branch alone."""
    arguments = {"num_inference_steps": 4, "batch_guidance": batched}
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    assert torch.equal(
        run(pipe, callback_on_step_end=cutoff, **arguments), run(pipe, guidance_interval=(0.0, 0.5), **arguments)
    )
    several = MultiPipelineCallbacks([SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1), Zeros()])
    assert not run(pipe, callback_on_step_end=several, **arguments).any()
    with pytest.raises(ValueError, match="returned `prompt_embeds` of 1 samples, but the call has 2"):
        pipe(["a cat", "a dog"], callback_on_step_end=cutoff, **(ARGUMENTS | arguments))


class Zeros(PipelineCallback):
    """Ends in nothing."""

    tensor_inputs = ["latents"]  # noqa: RUF012 - as in diffusers

    def __init__(self):
        super().__init__(cutoff_step_ratio=1.0, cutoff_step_index=None)

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        return callback_kwargs | {"latents": callback_kwargs["latents"] * (step_index < pipeline.num_timesteps - 1)}


@pytest.mark.parametrize("name", ["prompt_embeds", "context"])
def test_a_changed_prompt_counts_under_both_names(pipe, name):
    def change(running, step, timestep, tensors):
        return tensors | {name: tensors[name] * 0}

    names = ["latents", "context", "prompt_embeds"]
    ours = run(pipe, callback_on_step_end=change, callback_on_step_end_tensor_inputs=names)
    assert not torch.equal(ours, run(pipe))
    other = run(pipe, callback_on_step_end=change, callback_on_step_end_tensor_inputs=[name])
    assert torch.equal(ours, other)


def test_a_callback_that_returns_nothing_is_told_so(pipe):
    with pytest.raises(TypeError, match="must return a dictionary"):
        run(pipe, callback_on_step_end=lambda *_: None)


# --- savings --------------------------------------------------------------------------------------------------------


def broadcast(pipe, **arguments):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1001),
        cross_attention_block_skip_range=3,
        cross_attention_timestep_skip_range=(0, 1001),
        **({"current_timestep_callback": lambda: pipe.current_timestep} | arguments),
    )


def faster(pipe, **arguments):
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        unconditional_batch_skip_range=3,
        unconditional_batch_timestep_skip_range=(-1, 1001),
        attention_weight_callback=lambda _: 0.3,
        **(
            {
                "current_timestep_callback": lambda: pipe.current_timestep,
                "spatial_attention_timestep_skip_range": (-1, 1001),
            }
            | arguments
        ),
    )


def attention_runs(pipe, **arguments):
    """Rows that the last block's attentions computed, and the result."""
    rows = {"attn1": [], "attn2": []}
    hooks = [
        getattr(pipe.transformer.blocks[-1], name).to_q.register_forward_hook(
            lambda layer, inputs, output, name=name: rows[name].append(len(output))
        )
        for name in rows
    ]
    try:
        return run(pipe, num_inference_steps=STEPS, **arguments), rows
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("by", ["enable_cache", "hooks"])
def test_pyramid_attention_broadcast(pipe, by):
    exact = run(pipe, num_inference_steps=STEPS)
    if by == "enable_cache":
        pipe.transformer.enable_cache(broadcast(pipe))
    else:
        apply_pyramid_attention_broadcast(pipe.transformer, broadcast(pipe))
    output = pipe("a cat", generator=seeded(), **(ARGUMENTS | {"num_inference_steps": STEPS}))
    assert output.settings["batch_guidance"]  # its cache does not tell branches apart
    cached, rows = attention_runs(pipe)
    assert rows == {"attn1": [2] * 4, "attn2": [2] * 3}
    assert torch.equal(output.frames, cached)
    assert 1e-4 < relative_error(cached, exact) < 0.5
    alone = run(pipe, num_inference_steps=STEPS, guidance_scale=1.0)
    assert torch.isfinite(alone).all()
    cutoff = run(
        pipe,
        num_inference_steps=STEPS,
        callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1),
    )
    assert torch.isfinite(cutoff).all()
    with pytest.raises(ValueError, match="`guidance_interval`"):
        run(pipe, guidance_interval=(0.0, 0.5))
    if by == "enable_cache":
        pipe.transformer.disable_cache()
        assert torch.equal(run(pipe, num_inference_steps=STEPS), exact)


def test_faster_cache(pipe):
    exact = run(pipe, num_inference_steps=STEPS)
    pipe.transformer.enable_cache(faster(pipe))
    cached, rows = attention_runs(pipe)
    assert rows["attn2"] == [2, 1, 1, 2, 1, 1, 2, 1]  # the null branch runs in every third step
    assert len(rows["attn1"]) < STEPS
    assert 1e-4 < relative_error(cached, exact) < 1.0
    assert torch.nn.functional.cosine_similarity(cached.flatten(), exact.flatten(), dim=0) > 0.7
    assert torch.equal(attention_runs(pipe)[0], cached)
    two = pipe(["a cat", "a cat"], generator=[seeded(), seeded()], **(ARGUMENTS | {"num_inference_steps": STEPS}))
    assert relative_error(two.frames[1], cached[0]) < 1e-3
    with pytest.raises(ValueError, match="is_guidance_distilled=True"):
        run(pipe, guidance_scale=1.0)
    pipe.transformer.disable_cache()
    assert torch.equal(run(pipe, num_inference_steps=STEPS), exact)
    after_the_first_step = {"spatial_attention_timestep_skip_range": (-1, 900)}
    pipe.transformer.enable_cache(faster(pipe, is_guidance_distilled=True, **after_the_first_step))
    assert torch.isfinite(run(pipe, num_inference_steps=STEPS, guidance_scale=1.0)).all()
    assert torch.isfinite(run(pipe, num_inference_steps=STEPS)).all()


def test_a_cache_that_does_not_know_the_step_is_refused(pipe):
    pipe.transformer.enable_cache(faster(pipe, current_timestep_callback=None))
    with pytest.raises(ValueError, match="current_timestep_callback=lambda"):
        run(pipe)


def test_cache_dit_knows_the_pipeline():
    cache_dit = pytest.importorskip("cache_dit", reason="cache-dit is not among the requirements")
    pipe = made()
    exact = run(pipe, num_inference_steps=STEPS)
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2, residual_diff_threshold=1.0
    )
    cache_dit.enable_cache(pipe, cache_config=config)
    cached, rows = attention_runs(pipe)
    assert rows["attn2"] == [1] * 4  # two steps of both branches
    assert torch.equal(attention_runs(pipe)[0], cached)
    assert 1e-4 < relative_error(cached, exact) < 1.0
    cache_dit.disable_cache(pipe)
    assert torch.equal(run(pipe, num_inference_steps=STEPS), exact)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading_changes_nothing(pipe, kind):
    wanted = run(pipe)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    for name in ("transformer", "vae", "adapter"):
        getattr(pipe, name).enable_group_offload(onload_device=torch.device("cpu"), offload_type=kind, **blocks)
    assert torch.equal(run(pipe), wanted)
    assert torch.equal(run(pipe, output_type="pt"), made_again(wanted))


def made_again(latents):
    return made().decode(latents, "pt")


def test_layerwise_casting_of_the_decoder(pipe):
    wanted = run(pipe)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert 0 < relative_error(run(pipe), wanted) < 0.5


def test_attention_slicing_and_vae_switches(pipe):
    wanted = run(pipe, output_type="pt")
    pipe.vae.enable_slicing()
    assert relative_error(run(pipe, output_type="pt"), wanted) < 1e-5
    pipe.vae.disable_slicing()
    assert torch.equal(run(pipe, output_type="pt"), wanted)


def test_diffusers_finds_the_class_and_its_signature(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    config = DiffusionPipeline.load_config(tmp_path)
    assert config["_class_name"][1] == "OmniVideoPipeline"
    parameters = inspect.signature(pipe.__call__).parameters
    for name in (
        "prompt", "negative_prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale",
        "num_videos_per_prompt", "generator", "latents", "prompt_embeds", "negative_prompt_embeds", "output_type",
        "return_dict", "attention_kwargs", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
        "max_sequence_length",
    ):  # fmt: skip
        assert name in parameters, name
