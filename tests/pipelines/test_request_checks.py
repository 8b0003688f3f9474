"""Numbers and tensors of a request are checked where they come in; what a part computes, where it comes out."""

import math

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig
from PIL import Image

from omni_video_hf.cli.console import one_line
from omni_video_hf.media.clip import VideoClip
from omni_video_hf.media.sources import Source
from omni_video_hf.media.video_writer import save_video
from omni_video_hf.pipelines.presets import SizeError
from omni_video_hf.pipelines.request_checks import FiniteLogits, FiniteSteps, NotFiniteError, check_number
from omni_video_hf.training.data.framing import FramingRules

RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny.pipeline(max_context_length=160)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, **arguments):
    given = {"task": "t2v", "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2} | arguments
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **({"output_type": "latent"} | given))


BAD_NUMBERS = [
    ("flow_shift", 0),
    ("flow_shift", -1.0),
    ("flow_shift", math.nan),
    ("guidance_scale", math.inf),
    ("guidance_scale", math.nan),
    ("guidance_scale", -1),
    ("fps", 0),
    ("fps", -5),
    ("fps", "8"),
    ("num_inference_steps", 0),
    ("num_inference_steps", 2.5),
    ("height", "480"),
    ("width", -16),
    ("num_frames", True),
    ("num_videos_per_prompt", 0),
    ("max_new_tokens", 0),
    ("max_sequence_length", -1),
    ("max_context_length", 0),
]


@pytest.mark.parametrize(("name", "value"), BAD_NUMBERS)
def test_numbers_that_cannot_be_meant_are_refused_before_any_work(pipe, name, value):
    calls = []
    hook = pipe.mllm.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        for task in ("t2v", None):
            with pytest.raises(ValueError, match=rf"`{name}` must be a (whole|finite) number.*got {value!r}"):
                generate(pipe, **{"task": task, name: value})
    finally:
        hook.remove()
    assert not calls


def test_numbers_of_numpy_are_numbers(pipe):
    given = {"num_frames": np.int64(5), "guidance_scale": np.float32(3), "flow_shift": np.float64(5)}
    settings = generate(pipe, **given, num_inference_steps=np.int32(1)).settings
    assert settings["num_frames"] == 5
    assert {type(settings[name]) for name in given} == {int, float}
    assert check_number("scale", -0.5) == -0.5


def test_the_public_steps_check_their_numbers(pipe):
    for arguments in ((0, 5.0), (2, 0.0), (2, math.nan), ("2", 5.0)):
        with pytest.raises(ValueError, match=r"`(num_inference_steps|flow_shift)` must be"):
            pipe.prepare_scheduler(*arguments)
    with pytest.raises(ValueError, match="`fps` must be"):
        pipe.prepare_settings("t2v", Source(), None, None, None, 0, None, None, None)
    with pytest.raises(ValueError, match="`latents` contains 1 NaN or infinite values of"):
        pipe.decode(spoiled(torch.zeros(1, 16, 1, 2, 2)))


def spoiled(tensor, value=math.nan):
    tensor = tensor.clone()
    tensor.view(-1)[0] = value
    return tensor


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize(
    ("name", "shape", "arguments"),
    [
        ("latents", (1, 16, 2, 4, 4), {}),
        ("prompt_embeds", (1, 4, 32), {}),
        ("negative_prompt_embeds", (1, 4, 32), {}),
        ("mllm_hidden_states", (1, 4, 48), {}),
        ("negative_mllm_hidden_states", (1, 4, 48), {}),
        ("source_latents", (1, 16, 2, 4, 4), {"task": "v2v", "height": None, "width": None}),
        ("reference_latents", (1, 16, 1, 4, 4), {"task": "i2v", "height": None, "width": None}),
    ],
)
def test_one_value_that_is_not_finite_is_refused_by_the_name_of_its_argument(pipe, name, shape, arguments, value):
    tensor = spoiled(torch.zeros(shape), value)
    for given in (tensor, list(tensor)) if name.endswith(("embeds", "states")) else (tensor,):
        with pytest.raises(ValueError, match=f"`{name}` contains 1 NaN or infinite values of"):
            generate(pipe, **arguments, **{name: given})
    with pytest.raises(ValueError, match=f"`{name}` must be a floating point tensor.*got torch.int64"):
        generate(pipe, **arguments, **{name: torch.zeros(shape, dtype=torch.int64)})


PARTS = {
    "The MLLM or vision head": lambda pipe: pipe.mllm.vision_head,
    "The text encoder": lambda pipe: pipe.text_encoder.encoder.final_layer_norm,
    "The VAE's encoder": lambda pipe: pipe.vae.quant_conv,
    "The adapter": lambda pipe: pipe.adapter.query_transformer.decoder_layers[-1].mlp.fc2,
    "The decoder made the latents NaN or infinite in step 2 of 3": lambda pipe: pipe.transformer.proj_out,
    "The VAE's decoder": lambda pipe: pipe.vae.post_quant_conv,
}


@pytest.mark.parametrize("part", PARTS)
def test_a_result_that_is_not_finite_names_the_part_in_which_it_began(pipe, part):
    passes = []

    def spoil(_module, _inputs, output):
        passes.append(1)
        if "step 2" in part and len(passes) != 3:  # two branches a step; the third pass is the second step's first
            return None
        if isinstance(output, torch.Tensor):
            return spoiled(output)
        return output

    image = Image.fromarray(RANDOM.integers(0, 255, (32, 32, 3), dtype=np.uint8))
    hook = PARTS[part](pipe).register_forward_hook(spoil)
    try:
        with pytest.raises(NotFiniteError, match=part):
            pipe("a cat", image=image, task="i2i", num_inference_steps=3, output_type="np")
    finally:
        hook.remove()
    assert passes


def test_a_callback_that_spoils_the_latents_is_named(pipe):
    def callback(_pipe, step, _timestep, tensors):
        return {"latents": spoiled(tensors["latents"])} if step == 0 else {}

    with pytest.raises(
        NotFiniteError, match=r"`callback_on_step_end` made the latents NaN or infinite in step 1 of 2"
    ):
        generate(pipe, callback_on_step_end=callback)


def test_steps_are_noted_without_a_look_at_their_values():
    steps = FiniteSteps()
    with torch.device("meta"):
        steps.add(0, torch.zeros(2))  # a value of this device cannot be read: nothing waits for it
    good = FiniteSteps()
    good.add(0, torch.zeros(2))
    good.check(1)


# --- sizes and lengths --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{"width": 1040}, {"height": 1040}, {"num_frames": 257}])
def test_what_the_decoder_has_no_positions_for_is_refused_with_what_works(pipe, arguments):
    with pytest.raises(SizeError) as error:
        generate(pipe, **arguments)
    proposal = error.value.proposals[0]
    pipe.prepare_settings("t2v", Source(), proposal.height, proposal.width, proposal.num_frames, *[None] * 4)
    assert f"height={proposal.height}, width={proposal.width}, num_frames={proposal.num_frames}" in str(error.value)


@pytest.mark.parametrize("prompt", ["a cat", "a cat that has much more to say about itself, and takes room"])
def test_the_proposal_for_a_long_clip_works_whatever_the_prompt(pipe, tmp_path, prompt):
    frames = np.repeat(RANDOM.integers(0, 255, (27, 96, 160, 3), dtype=np.uint8), 3, axis=0)
    save_video(frames, tmp_path / "long.mp4", fps=16)
    for video in (VideoClip(frames, 16.0), tmp_path / "long.mp4"):
        with pytest.raises(SizeError) as error:
            pipe(prompt, video=video, task="v2v", negative_prompt="blurred, of bad quality")
        for proposal in error.value.proposals:
            size = {"height": proposal.height, "width": proposal.width, "num_frames": proposal.num_frames}
            output = pipe(
                prompt, video=video, task="v2v", negative_prompt="blurred, of bad quality", num_inference_steps=1,
                output_type="latent", **size,
            )  # fmt: skip
            assert output.frames.shape[3:] == (proposal.height // 8, proposal.width // 8)
            assert output.settings["num_frames"] == proposal.num_frames


def test_what_truncation_cuts_is_in_the_notes(pipe):
    output = generate(pipe, context_overflow="truncate", max_sequence_length=3)
    (note,) = output.notes
    count = len(pipe.tokenizer("a cat").input_ids)
    assert f"`prompt` has {count} tokens for the text encoder; the last {count - 3} were left out" in note
    clip = VideoClip(RANDOM.integers(0, 255, (81, 64, 96, 3), dtype=np.uint8), 16.0)
    settings = {"num_inference_steps": 1, "output_type": "latent", "context_overflow": "truncate"}
    output = pipe("a cat", task="v2v", video=clip, **settings)
    (note,) = output.notes
    context = pipe.adapter.config.num_query_tokens * pipe.mllm.config.vision_head_config.num_query_tokens + 6 + count
    assert f"The context has {context + 21 * 6} tokens; the last {context + 21 * 6 - 160}" in note
    assert generate(pipe, context_overflow="truncate").notes == []


# --- LoRA scale ---------------------------------------------------------------------------------------------------


@pytest.fixture
def with_lora():
    pipe = tiny.pipeline(max_context_length=160)
    pipe.set_progress_bar_config(disable=True)
    for name, target in (("mllm", r".*\.(q_proj|fc1)"), ("adapter", r".*v_proj"), ("transformer", r".*\.to_k")):
        torch.manual_seed(0)
        module = getattr(pipe, name)
        module.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=target, init_lora_weights=False), "style")
    return pipe


def test_the_scale_of_a_call_reaches_every_part_and_is_exactly_as_before_after_it(with_lora):
    pipe = with_lora
    plain = generate(tiny.pipeline(max_context_length=160)).frames
    seen = {"mllm": pipe.mllm, "adapter": pipe.adapter, "transformer": pipe.transformer}

    def scales():
        return [
            layer.scaling["style"] for part in seen.values() for layer in part.modules() if hasattr(layer, "lora_A")
        ]

    for name in seen:  # every part alone changes the frames
        pipe.set_adapters("style", {part: 1.0 if part == name else 0.0 for part in seen})
        assert not torch.equal(generate(pipe).frames, plain), name
    pipe.set_adapters("style", 0.7)
    before = scales()
    full = generate(pipe).frames
    torch.testing.assert_close(generate(pipe, attention_kwargs={"scale": 0}).frames, plain)
    assert scales() == before
    half = generate(pipe, attention_kwargs={"scale": 0.3}).frames
    assert scales() == before
    assert not torch.allclose(half, full, atol=1e-3)

    def fails(*_):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        generate(pipe, attention_kwargs={"scale": 0.3}, callback_on_step_end=fails)
    assert scales() == before
    pipe.set_adapters("style", 0.7 * 0.3)
    torch.testing.assert_close(generate(pipe).frames, half)
    for scale in ("0.5", math.nan, True):
        with pytest.raises(ValueError, match="`scale` must be a finite number"):
            generate(pipe, attention_kwargs={"scale": scale})


# --- other entry points -------------------------------------------------------------------------------------------


def test_the_command_line_proposes_its_own_flags(pipe):
    with pytest.raises(SizeError) as error:
        generate(pipe, width=1040)
    line = one_line(error.value)
    assert "`--size 1024x32 --frames 5`" in line
    assert "width=" not in line


def test_precomputed_sizes_have_positions(pipe):
    FramingRules([(1024, 32)], [5]).check(pipe.grid)
    with pytest.raises(SizeError, match="positions for 64 of each"):
        FramingRules([(1056, 32)], [5]).check(pipe.grid)
    with pytest.raises(SizeError, match="positions for 64 of each"):
        FramingRules([(64, 32)], [5, 257]).check(pipe.grid)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("task", ["understand", None])
def test_an_answer_from_logits_that_are_not_finite_is_an_error(pipe, value, task):
    def spoil(_module, _arguments, output):
        return torch.full_like(output, value)

    hook = pipe.mllm.get_output_embeddings().register_forward_hook(spoil)
    try:
        with pytest.raises(NotFiniteError, match="The MLLM computed logits that are NaN or infinite"):
            pipe("what is it?", task=task, max_new_tokens=2)
    finally:
        hook.remove()
    assert pipe("what is it?", task="understand", max_new_tokens=2).text is not None


def test_tokens_that_are_ruled_out_do_not_count():
    scores = torch.tensor([[-math.inf, 1.0], [0.0, -math.inf]])
    assert FiniteLogits()(torch.zeros(2, 3, dtype=torch.long), scores) is scores
