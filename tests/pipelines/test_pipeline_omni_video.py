from unittest.mock import patch

import golden
import numpy as np
import pytest
import tiny
import torch
from accelerate import cpu_offload
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from golden import CORE_EXPECTED, kind, relative_error
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from omni_video_hf import OmniVideoForConditionalGeneration, OmniVideoPipeline, OmniVideoPipelineOutput
from omni_video_hf.media.clip import VideoClip
from omni_video_hf.media.sources import Source
from omni_video_hf.media.video_writer import save_video

RANDOM = np.random.default_rng(0)
CLIP = VideoClip(RANDOM.integers(0, 255, (5, 32, 64, 3), dtype=np.uint8), 12.0)
IMAGE = Image.fromarray(RANDOM.integers(0, 255, (64, 32, 3), dtype=np.uint8))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny.pipeline(max_context_length=160)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def converted_pipe(converted):
    pipe = OmniVideoPipeline.from_pretrained(converted, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- upstream's numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["t2v", "t2i", "v2v"])
def test_the_whole_loop_gives_upstreams_latents(converted_pipe, case):
    width, height, frames, steps, shift, scale = CORE_EXPECTED[f"sample.{case}_unipc.settings"].tolist()
    output = converted_pipe(
        task=case,
        prompt_embeds=CORE_EXPECTED["text_embeds"][None],
        mllm_hidden_states=CORE_EXPECTED[f"mllm_hidden_{kind(case)}"],
        source_latents=CORE_EXPECTED["source_latent_video"][None] if case == "v2v" else None,
        latents=CORE_EXPECTED[f"sample.{case}_unipc.noise"][None],
        height=None if case == "v2v" else int(height),
        width=None if case == "v2v" else int(width),
        num_frames=None if case == "v2v" else int(frames),
        num_inference_steps=int(steps),
        flow_shift=shift,
        guidance_scale=scale + 1,
        output_type="latent",
    )
    assert relative_error(output.frames[0], CORE_EXPECTED[f"sample.{case}_unipc.latents"]) < 1e-3
    assert output.settings["guidance_scale"] == scale + 1
    assert (output.settings["width"], output.settings["height"]) == (width, height)
    assert output.settings["num_frames"] == frames


@torch.no_grad()
def test_vae_gives_upstreams_numbers(converted_pipe):
    """The golden VAE has statistics of its own; the released one has Wan's, which are diffusers' defaults."""
    video, expected = CORE_EXPECTED["vae_video"], CORE_EXPECTED["vae_latent"]
    mean, std = (CORE_EXPECTED[f"vae_{name}"].view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    latents = converted_pipe.vae.encode(video).latent_dist.mode()
    assert relative_error((latents - mean) / std, expected) < 1e-4
    decoded = converted_pipe.vae.decode(expected * std + mean).sample
    assert relative_error(decoded, CORE_EXPECTED["vae_decoded"]) < 1e-4


@torch.no_grad()
def test_pixels_go_to_latents_and_back_with_the_vaes_statistics(pipe):
    pipe.vae.register_to_config(latents_mean=[0.5] * 16, latents_std=[2.0] * 16)
    latents = pipe.encode_source(
        Source(videos=[CLIP]), pipe.prepare_settings("v2v", Source(videos=[CLIP]), *[None] * 7)[0]
    )
    pixels = torch.from_numpy(CLIP.frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
    assert torch.allclose(latents, (pipe.vae.encode(pixels).latent_dist.mode() - 0.5) / 2, atol=1e-4)
    decoded = pipe.vae.decode(latents * 2 + 0.5).sample
    assert torch.allclose(pipe.decode(latents, "pt")[0].transpose(0, 1), (decoded[0] / 2 + 0.5).clamp(0, 1), atol=1e-5)


@torch.no_grad()
def test_text_encoder_gives_upstreams_numbers(converted_pipe):
    ids, mask = CORE_EXPECTED["t5_input_ids"], CORE_EXPECTED["t5_attention_mask"]
    states = converted_pipe.text_encoder(ids, mask).last_hidden_state[0, mask[0].bool()]
    assert relative_error(states, CORE_EXPECTED["text_embeds"]) < 1e-4


def test_null_branch_is_the_stored_one(converted_pipe):
    tokens = converted_pipe.mllm(output_vision_tokens=True).vision_tokens
    context = converted_pipe.adapter(tokens, None, CORE_EXPECTED["source_latent_video"][None])
    assert relative_error(context[0], CORE_EXPECTED["v2v.mixed_context_uncond"]) < 1e-4


# --- tasks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "media", "size", "frames"),
    [
        ("t2i", {}, (64, 32), 1),
        ("t2v", {}, (64, 32), 5),
        ("i2i", {"image": IMAGE}, (32, 64), 1),
        ("v2v", {"video": CLIP}, (64, 32), 5),
        ("i2v", {"image": IMAGE}, (32, 64), 5),
    ],
)
def test_every_task_generates(pipe, task, media, size, frames):
    output = pipe("a red hat", task=task, generator=seeded(), **media)
    assert isinstance(output, OmniVideoPipelineOutput)
    assert output.text is None
    assert len(output.frames) == 1
    assert len(output.frames[0]) == frames
    assert {frame.size for frame in output.frames[0]} == {size}
    assert output.task == output.settings["task"] == task
    assert output.fps == {"t2v": 8, "v2v": 12.0, "i2v": 8}.get(task)
    assert output.settings["scheduler"] == "UniPCMultistepScheduler"


@pytest.mark.parametrize("media", [{}, {"image": IMAGE}, {"video": CLIP}])
def test_understanding_answers(pipe, media):
    output = pipe("what is it?", task="understand", max_new_tokens=5, generator=seeded(), **media)
    assert output.frames is None
    assert len(output.text) == 1
    assert output.text == pipe("what is it?", task="understand", max_new_tokens=5, generator=seeded(), **media).text
    both = pipe(["what is it?", "and where?"], task="understand", max_new_tokens=5, generator=seeded(), **media)
    assert len(both.text) == 2


@pytest.mark.parametrize(
    ("token", "media", "task"),
    [
        ("[GEN_VID]", {}, "t2v"),
        ("[GEN_IMG]", {}, "t2i"),
        ("[GEN_VID]", {"video": CLIP}, "v2v"),
        ("[GEN_VID]", {"image": IMAGE}, "i2i"),  # the source decides, as upstream
        ("a", {}, "understand"),
    ],
)
def test_the_mllm_decides_where_the_task_is_left_open(pipe, token, media, task):
    token_id = pipe.processor.tokenizer.convert_tokens_to_ids(token)
    head = pipe.mllm.mllm.lm_head
    head.bias = torch.nn.Parameter(torch.zeros(160))
    with torch.no_grad():
        head.bias[token_id] = 1e4
    try:
        output = pipe("a red hat", max_new_tokens=2, generator=seeded(), **media)
    finally:
        head.bias = None
    assert output.task == task
    assert (output.text is None) == (task != "understand")


def test_source_is_read_from_a_file(pipe, tmp_path):
    save_video(CLIP.frames, tmp_path / "clip.mp4", fps=12)
    output = pipe("a red hat", video=tmp_path / "clip.mp4", task="v2v", generator=seeded(), output_type="np")
    assert output.frames.shape == (1, 5, 32, 64, 3)
    assert output.fps == 12
    shorter = pipe("a red hat", video=str(tmp_path / "clip.mp4"), task="v2v", num_frames=1, output_type="np")
    assert shorter.frames.shape == (1, 1, 32, 64, 3)


def test_edits_keep_size_and_rate_of_their_source_and_note_what_they_cannot_keep(pipe):
    clip = VideoClip(RANDOM.integers(0, 255, (7, 40, 70, 3), dtype=np.uint8), 24.0)
    output = pipe("a red hat", video=clip, task="v2v", generator=seeded())
    assert output.frames[0][0].size == (64, 32)
    assert len(output.frames[0]) == 5
    assert output.fps == 24.0
    assert any("70x40" in note and "64x32" in note for note in output.notes)
    assert any("last 2 were left out" in note for note in output.notes)


def test_source_size_can_be_chosen(pipe):
    output = pipe("a red hat", video=CLIP, task="v2v", height=32, width=32, generator=seeded(), output_type="np")
    assert output.frames.shape == (1, 5, 32, 32, 3)


def test_batches_of_sources(pipe):
    other = VideoClip(CLIP.frames[::-1].copy(), 12.0)
    arguments = {"task": "v2v", "output_type": "latent"}
    both = pipe(["a hat", "a hat"], video=[CLIP, other], generator=[seeded(), seeded()], **arguments).frames
    for index, clip in enumerate((CLIP, other)):
        alone = pipe("a hat", video=clip, generator=seeded(), **arguments).frames
        assert torch.allclose(both[index], alone[0], atol=1e-3)
    twice = pipe("a hat", video=CLIP, num_videos_per_prompt=2, generator=[seeded(), seeded()], **arguments).frames
    assert torch.allclose(twice[0], twice[1], atol=1e-4)
    with pytest.raises(ValueError, match="the same number of frames"):
        pipe(["a hat", "a hat"], video=[CLIP, VideoClip(CLIP.frames[:1], 12.0)], **arguments)
    with pytest.raises(ValueError, match="leave them out"):
        pipe("a hat", source_latents=torch.zeros(1, 16, 2, 4, 8), height=64, width=64, **arguments)


def test_mllm_frames_all_changes_what_the_mllm_sees(pipe):
    arguments = {"video": CLIP, "task": "v2v", "output_type": "latent"}
    first = pipe("a hat", generator=seeded(), **arguments).frames
    every = pipe("a hat", generator=seeded(), mllm_frames="all", **arguments).frames
    assert not torch.equal(every, first)
    with patch.object(pipe.processor, "mllm_frames", "all"):
        assert torch.equal(pipe("a hat", generator=seeded(), **arguments).frames, every)


# --- one call, many samples -----------------------------------------------------------------------------------------


def test_batches_equal_single_calls(pipe):
    prompts = ["a cat", "a much longer prompt about a dog"]
    together = pipe(prompts, task="t2v", generator=[seeded(0), seeded(1)], output_type="latent").frames
    for index, prompt in enumerate(prompts):
        alone = pipe(prompt, task="t2v", generator=seeded(index), output_type="latent").frames
        assert torch.allclose(together[index], alone[0], atol=1e-3)


def test_several_samples_per_prompt(pipe):
    generators = [seeded(seed) for seed in range(4)]
    arguments = {"task": "t2i", "output_type": "latent"}
    many = pipe(["a cat", "a dog"], num_videos_per_prompt=2, generator=generators, **arguments).frames
    assert many.shape[0] == 4
    third = pipe("a dog", generator=seeded(2), **arguments).frames
    assert torch.allclose(many[2], third[0], atol=1e-3)
    with pytest.raises(ValueError, match="2 entries for 4 samples"):
        pipe(["a cat", "a dog"], num_videos_per_prompt=2, generator=generators[:2], **arguments)


def test_same_seed_same_result_and_another_seed_another(pipe):
    first = pipe("a cat", task="t2i", generator=seeded(0), output_type="latent").frames
    assert torch.equal(pipe("a cat", task="t2i", generator=seeded(0), output_type="latent").frames, first)
    assert not torch.equal(pipe("a cat", task="t2i", generator=seeded(1), output_type="latent").frames, first)
    assert not torch.equal(pipe("a dog", task="t2i", generator=seeded(0), output_type="latent").frames, first)


def test_a_random_seed_is_chosen_and_reported_where_none_is_given(pipe):
    arguments = {"task": "t2i", "num_inference_steps": 1, "output_type": "pt"}
    first, second = (pipe("a hat", **arguments) for _ in range(2))
    assert first.settings["seed"] != second.settings["seed"]
    assert not torch.equal(first.frames, second.frames)
    again = pipe("a hat", generator=seeded(first.settings["seed"]), **arguments)
    assert torch.equal(again.frames, first.frames)
    assert again.settings == first.settings
    torch.manual_seed(5)
    third = pipe("a hat", **arguments).settings["seed"]
    torch.manual_seed(5)
    assert pipe("a hat", **arguments).settings["seed"] == third
    answer = pipe("what?", task="understand", max_new_tokens=5)
    same = pipe("what?", task="understand", max_new_tokens=5, generator=seeded(answer.settings["seed"]))
    assert (answer.text, answer.settings) == (same.text, same.settings)


def test_the_seed_of_a_given_generator_is_named_where_it_repeats_the_call(pipe):
    arguments = {"task": "t2i", "num_inference_steps": 1, "output_type": "latent"}
    used = seeded(3)
    assert pipe("a hat", generator=used, **arguments).settings["seed"] == 3
    assert pipe("a hat", generator=used, **arguments).settings["seed"] is None
    both = pipe(["a hat", "a cat"], generator=[seeded(4), seeded(5)], **arguments)
    assert both.settings["seed"] == [4, 5]
    assert pipe(["a hat", "a cat"], generator=[seeded(4), used], **arguments).settings["seed"] is None


def test_encoders_run_once_per_call_whatever_the_steps(pipe):
    calls = []
    parts = {
        "text_encoder": pipe.text_encoder,
        "mllm": pipe.mllm,
        "adapter": pipe.adapter,
        "decoder": pipe.transformer,
    }
    hooks = [part.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, part in parts.items()]
    try:
        pipe("a cat", task="t2v", num_inference_steps=4, generator=seeded())
    finally:
        for hook in hooks:
            hook.remove()
    # the MLLM component and the adapter once per branch, the decoder once per branch and step
    assert {name: calls.count(name) for name in parts} == {"text_encoder": 1, "mllm": 2, "adapter": 2, "decoder": 8}


def test_guidance(pipe):
    arguments = {"task": "t2i", "num_inference_steps": 1, "output_type": "latent"}
    latents = {w: pipe("a cat", guidance_scale=w, generator=seeded(), **arguments).frames for w in (1.0, 2.0, 3.0)}
    # one step is linear in the velocity, which is linear in the scale
    assert torch.allclose(latents[3.0] - latents[2.0], latents[2.0] - latents[1.0], atol=1e-3)
    assert not torch.allclose(latents[2.0], latents[1.0], atol=1e-3)
    negative = pipe("a cat", guidance_scale=2.0, negative_prompt="ugly", generator=seeded(), **arguments).frames
    assert not torch.allclose(negative, latents[2.0], atol=1e-3)


def test_precomputed_inputs_equal_raw_ones(pipe):
    arguments = {"task": "v2v", "output_type": "latent"}
    raw = pipe("a cat", video=CLIP, generator=seeded(), **arguments).frames
    inputs = pipe.processor.apply_task_template("v2v", "a cat", videos=[CLIP], return_tensors="pt")
    source = Source.of(CLIP, None, 1).load()
    settings, source = pipe.prepare_settings("v2v", source, None, None, None, None, None, None, None)
    precomputed = pipe(
        prompt_embeds=pipe.encode_prompt("a cat"),
        mllm_hidden_states=pipe.mllm.get_mllm_hidden_states(**inputs),
        source_latents=pipe.encode_source(source, settings),
        generator=seeded(),
        **arguments,
    ).frames
    assert torch.allclose(precomputed, raw, atol=1e-4)


@pytest.mark.parametrize(
    ("output_type", "shape"), [("np", (1, 5, 32, 64, 3)), ("pt", (1, 5, 3, 32, 64)), ("latent", (1, 16, 2, 4, 8))]
)
def test_output_types(pipe, output_type, shape):
    frames = pipe("a cat", task="t2v", output_type=output_type, generator=seeded()).frames
    assert tuple(frames.shape) == shape
    as_tuple = pipe("a cat", task="t2v", output_type=output_type, generator=seeded(), return_dict=False)
    assert as_tuple[1] is None
    assert bool((torch.as_tensor(as_tuple[0]) == torch.as_tensor(frames)).all())


def test_callbacks_see_and_change_every_step(pipe):
    seen = []

    def callback(running, step, timestep, tensors):
        seen.append((step, int(timestep), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    latents = pipe(
        "a cat",
        task="t2i",
        num_inference_steps=3,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "context"],
        output_type="latent",
    ).frames
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert seen[0][1] > seen[1][1] > seen[2][1]
    assert seen[0][2] == ["context", "latents"]
    assert not latents.any()


def test_interrupt_skips_the_remaining_steps(pipe):
    steps = []

    def stop(running, step, timestep, tensors):
        steps.append(step)
        running._interrupt = True
        return {}

    pipe("a cat", task="t2i", num_inference_steps=5, callback_on_step_end=stop)
    assert steps == [0]
    pipe("a cat", task="t2i", num_inference_steps=2, callback_on_step_end=lambda *_: {})
    assert not pipe.interrupt


# --- schedulers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
)
def test_other_flow_schedulers_swap_in(pipe, scheduler):
    own, pipe.scheduler = pipe.scheduler, scheduler
    try:
        output = pipe("a cat", task="t2i", num_inference_steps=8, generator=seeded(), output_type="latent")
    finally:
        pipe.scheduler = own
    assert output.settings["scheduler"] == type(scheduler).__name__
    reference = pipe("a cat", task="t2i", num_inference_steps=8, generator=seeded(), output_type="latent").frames
    assert torch.nn.functional.cosine_similarity(output.frames.flatten(), reference.flatten(), dim=0) > 0.9


def test_schedulers_of_other_kinds_are_refused(pipe):
    own, pipe.scheduler = pipe.scheduler, EulerDiscreteScheduler()
    try:
        with pytest.raises(ValueError, match="flow-matching scheduler"):
            pipe("a cat", task="t2i")
    finally:
        pipe.scheduler = own


def test_a_call_leaves_the_scheduler_as_it_was(pipe):
    before = dict(pipe.scheduler.config)
    pipe("a cat", task="t2i", flow_shift=9.0, num_inference_steps=3)
    assert dict(pipe.scheduler.config) == before
    assert pipe.scheduler.num_inference_steps is None


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "Pass `prompt`"),
        ({"prompt": ""}, "non-empty"),
        ({"prompt": []}, "non-empty"),
        ({"task": "x2v"}, "must be one of t2i"),
        ({"task": "t2v", "video": CLIP}, "has no source"),
        ({"task": "v2v"}, "needs a source: pass `video`"),
        ({"task": "i2i", "video": CLIP}, "needs a source: pass `image`"),
        ({"task": "v2v", "video": CLIP, "image": IMAGE}, "not both"),
        ({"task": "t2v", "num_frames": 6}, "5 and 9"),
        ({"task": "t2i", "num_frames": 5}, "generates one image"),
        ({"task": "t2v", "height": 32}, "together"),
        ({"task": "t2v", "height": 40, "width": 64}, "multiple of 16"),
        ({"task": "i2i", "image": IMAGE, "height": 48, "width": 64}, "multiple of 32"),
        ({"task": "t2v", "output_type": "gif"}, "'pil'"),
        ({"task": "t2v", "num_videos_per_prompt": 0}, "at least 1"),
        ({"task": "t2v", "negative_prompt": ["a", "b"]}, "one string"),
        ({"task": "t2v", "callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
        ({"task": "t2v", "latents": torch.zeros(1, 16, 2, 2, 2)}, r"must be \(1, 16, 2, 4, 8\)"),
        ({"task": "i2i", "image": [IMAGE, IMAGE]}, "2 entries for 1 prompts"),
        ({"prompt": "x" * 600, "task": "t2v"}, "more than `max_sequence_length` 512"),
        ({"task": "t2v", "prompt": "<|eot_id|>"}, "control token"),
    ],
)
def test_inputs_that_do_not_go_together_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**({"prompt": "a cat"} | arguments))


def test_a_source_that_does_not_fit_is_refused_before_it_is_decoded(pipe, tmp_path):
    clip = VideoClip(RANDOM.integers(0, 255, (81, 64, 96, 3), dtype=np.uint8), 16.0)
    save_video(clip.frames, tmp_path / "long.mp4", fps=16)
    for video in (clip, tmp_path / "long.mp4"):
        with pytest.raises(ValueError) as error:
            pipe("a cat", video=video, task="v2v")
        assert "What works: " in str(error.value)
        assert "num_frames" in str(error.value)
    whole = pipe("a cat", video=clip, task="v2v", max_context_length=400, num_inference_steps=1, output_type="latent")
    assert whole.frames.shape == (1, 16, 21, 8, 12)
    cut = pipe(
        "a cat", video=clip, task="v2v", context_overflow="truncate", num_inference_steps=1, output_type="latent"
    )
    assert cut.frames.shape == whole.frames.shape


# --- saving, casting, offloading ------------------------------------------------------------------------------------


def test_save_and_load_every_component_bit_equal(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = OmniVideoPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.presets == pipe.config.presets == tiny.PRESETS
    for name in ("mllm", "adapter", "transformer", "text_encoder", "vae"):
        ours, theirs = getattr(pipe, name), getattr(loaded, name)
        for kind_of in ("named_parameters", "named_buffers"):
            values = dict(getattr(theirs, kind_of)())
            assert set(values) == set(dict(getattr(ours, kind_of)()))
            assert all(torch.equal(value, values[key]) for key, value in getattr(ours, kind_of)()), (name, kind_of)
    arguments = {"task": "v2v", "video": CLIP, "output_type": "latent"}
    frames = pipe("a cat", generator=seeded(), **arguments).frames
    assert torch.equal(loaded("a cat", generator=seeded(), **arguments).frames, frames)


def test_bfloat16(tmp_path, pipe):
    pipe.save_pretrained(tmp_path)
    half = OmniVideoPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.transformer.dtype == half.mllm.dtype == half.adapter.dtype == torch.bfloat16
    assert half.transformer.scale_shift_table.dtype == torch.float32
    for task, media in (("t2v", {}), ("v2v", {"video": CLIP})):
        arguments = {"task": task, "output_type": "latent", "num_inference_steps": 1, **media}
        reference = pipe("a cat", generator=seeded(), **arguments).frames
        assert relative_error(half("a cat", generator=seeded(), **arguments).frames, reference) < 0.1


def test_components_can_be_shared_with_the_whole_model(pipe):
    whole = OmniVideoForConditionalGeneration(tiny.config()).eval()
    tiny.randomize(whole)
    other = OmniVideoPipeline(**(pipe.components | {"adapter": whole.adapter, "transformer": whole.decoder}))
    other.set_progress_bar_config(disable=True)
    assert other("a cat", task="t2i").frames is not None


def test_golden_settings_are_in_upstreams_convention():
    assert {key for key in CORE_EXPECTED if key.endswith("unipc.settings")} == {
        f"sample.{case}_unipc.settings" for case in ("t2v", "t2i", "v2v")
    }
    assert golden.DIMS["ctx"] == 64


@pytest.mark.parametrize("kind_of", ["sequential", "group"])
def test_offloading_enters_every_part_through_its_forward(pipe, kind_of):
    """On the CPU nothing moves, but weights that a hook does not bring in are on the meta device and would fail."""
    arguments = {"task": "v2v", "video": CLIP, "output_type": "latent"}
    wanted = tiny_latents(**arguments)
    other = tiny.pipeline(max_context_length=160)
    other.set_progress_bar_config(disable=True)
    if kind_of == "group":
        other.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    else:
        for name in ("text_encoder", "mllm", "adapter", "transformer", "vae"):
            cpu_offload(getattr(other, name), torch.device("cpu"), offload_buffers=True)
        assert next(other.adapter.parameters()).device.type == "meta"
    assert torch.equal(other("a cat", generator=seeded(), **arguments).frames, wanted)
    assert other("what?", video=CLIP, task="understand", max_new_tokens=3).text


def tiny_latents(**arguments):
    fresh = tiny.pipeline(max_context_length=160)
    fresh.set_progress_bar_config(disable=True)
    return fresh("a cat", generator=seeded(), **arguments).frames


def test_lora_of_the_decoder(tmp_path):
    arguments = {"task": "t2i", "output_type": "latent"}
    trained = tiny.pipeline()
    trained.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    )
    wanted = trained("a cat", generator=seeded(), **arguments).frames
    trained.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(trained.transformer),
        transformer_lora_adapter_metadata=trained.transformer.peft_config["default"].to_dict(),
    )
    loaded = tiny.pipeline()
    plain = loaded("a cat", generator=seeded(), **arguments).frames
    loaded.load_lora_weights(tmp_path)
    assert not torch.allclose(wanted, plain, atol=1e-2)
    assert torch.allclose(loaded("a cat", generator=seeded(), **arguments).frames, wanted, atol=1e-4)
    loaded.fuse_lora()
    loaded.unload_lora_weights()
    assert torch.allclose(loaded("a cat", generator=seeded(), **arguments).frames, wanted, atol=1e-3)
