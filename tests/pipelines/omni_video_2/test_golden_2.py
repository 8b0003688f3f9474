"""Omni-Video 2 against its authors' code: ids, pixels, states, captions, text, contexts and whole loops."""

import pytest
import torch
from golden_2 import EXPECTED, LOOPS, MLLMS, NEW_TOKENS, expected, instruction, mllm_frames, turns, videos

from omni_video_hf import OmniVideo2Pipeline, OmniVideoThought
from omni_video_hf.pipelines.omni_video_2.edit_source import cropped_pixels
from omni_video_hf.pipelines.omni_video_2.prompts import CAPTION_PIXELS, FEATURE_PIXELS

CASES = ("landscape", "portrait", "t2v")


@pytest.fixture(scope="module")
def pipes(converted_2):
    made = {layout: OmniVideo2Pipeline.from_pretrained(folder) for layout, folder in converted_2.items()}
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


def close(actual, wanted, atol=1e-4):
    torch.testing.assert_close(actual.float(), wanted.float(), rtol=0, atol=atol)


@pytest.mark.parametrize("case", CASES[:2])
@pytest.mark.parametrize("step", ["features", "source_caption"])
def test_pixels_and_grid(pipes, case, step):
    budget = FEATURE_PIXELS["as_released"] if step == "features" else CAPTION_PIXELS
    pixels, grid = pipes["A14B"].processor.video_pixels(mllm_frames(case).frames, budget)
    assert torch.equal(grid, expected(f"qwen3_vl.{case}.{step}.video_grid_thw"))
    if step == "source_caption":
        pixels = pixels[:: len(pixels) // 8]
    stored = {name: tensor for name, tensor in EXPECTED.items() if name.startswith(f"pixels.{case}.{step}")}
    (wanted,) = stored.values()
    close(pixels, wanted.float() / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", MLLMS)
def test_ids_of_every_step(pipes, layout, case):
    name, processor = MLLMS[layout].name, pipes[layout].processor
    video = None if case == "t2v" else mllm_frames(case)
    for step in ("features", "target_caption", *(["source_caption"] if video else [])):
        system, user = turns(name, case, step)
        given = None if step == "target_caption" else video
        budget = FEATURE_PIXELS["as_released"] if step == "features" else CAPTION_PIXELS
        inputs, dropped = processor.chat_inputs(system, user, given, budget)
        wanted = expected(f"{name}.{case}.{step}.input_ids")
        assert torch.equal(inputs["input_ids"], wanted), step
        if step == "features":
            states = expected(f"{name}.{case}.vlm_last_hidden_states")
            assert wanted.shape[1] - dropped == len(states)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", MLLMS)
def test_states_before_the_final_norm(pipes, layout, case):
    (states,) = pipes[layout].encode_instruction(instruction(case), videos(case))
    wanted = expected(f"{MLLMS[layout].name}.{case}.vlm_last_hidden_states")
    close(states, wanted)
    assert wanted.abs().max() > 10  # behind the norm they are smaller


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", MLLMS)
def test_captions(pipes, layout, case):
    name, pipe = MLLMS[layout].name, pipes[layout]
    (thought,) = pipe._think([instruction(case)], videos(case), max_new_tokens=NEW_TOKENS)
    for text, step in ((thought.source_caption, "source_caption"), (thought.prompt, "target_caption")):
        if text is not None:
            ids = expected(f"{name}.{case}.{step}.generated_ids")[0]
            assert text == pipe.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def text_of(pipe, layout, case):
    ids = expected(f"{MLLMS[layout].name}.{case}.target_caption.generated_ids")[0]
    return pipe.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("loop", ["v2v", "portrait", "t2v", "1.3B"])
def test_text_embeddings(pipes, loop):
    name, layout, case, _ = LOOPS[loop]
    pipe = pipes[layout]
    thoughts = [OmniVideoThought(text_of(pipe, layout, case))]
    (embeds,) = pipe.encode_texts([instruction(case)], thoughts, is_edit=case != "t2v")
    close(embeds, expected(f"{name}.prompt_embeds"))


def test_source_frames_are_cropped_as_upstream_does():
    pixels = cropped_pixels(mllm_frames("landscape").frames[:2], 64, 96)
    wanted = EXPECTED["A14B.v2v.source_pixels.of_0_6"].float() / 127.5 - 1
    close(pixels.permute(1, 0, 2, 3), wanted, atol=1e-6)


@pytest.mark.parametrize("loop", LOOPS)
def test_contexts_predictions_and_latents_of_a_whole_loop(pipes, loop):
    name, layout, case, length = LOOPS[loop]
    pipe, seen, velocities = pipes[layout], [], []
    adapters = [adapter for adapter in (pipe.adapter, pipe.adapter_2) if adapter is not None]
    decoders = [decoder for decoder in (pipe.transformer, pipe.transformer_2) if decoder is not None]
    before = adapters[0].config.max_context_length
    for adapter in adapters:
        adapter.register_to_config(max_context_length=length)
    hooks = [
        decoder.register_forward_hook(lambda module, _, output: velocities.append((module, output[0][0].clone())))
        for decoder in decoders
    ]
    try:
        output = pipe(
            instruction(case),
            task="t2v" if case == "t2v" else "v2v",
            latents=expected(f"{name}.noise")[None],
            source_latents=None if case == "t2v" else expected(f"{name}.source_latent"),
            mllm_hidden_states=expected(f"{MLLMS[layout].name}.{case}.vlm_last_hidden_states")[None],
            prompt_embeds=expected(f"{name}.prompt_embeds")[None],
            negative_prompt_embeds=expected("negative_prompt_embeds")[None],
            num_inference_steps=6,
            context_overflow="truncate",
            output_type="latent",
            callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(tensors) or {},
            callback_on_step_end_tensor_inputs=["context", "null_context"],
            **({"height": 64, "width": 96, "num_frames": 9} if case == "t2v" else {}),
        )
    finally:
        for adapter in adapters:
            adapter.register_to_config(max_context_length=before)
        for hook in hooks:
            hook.remove()
    for tensors, suffix in ((seen[0], ""), (seen[-1], "_low" if len(decoders) > 1 else "")):
        for kind, branch in (("context", "cond"), ("null_context", "uncond")):
            if f"{name}.context_{branch}{suffix}" in EXPECTED:
                close(tensors[kind][0], expected(f"{name}.context_{branch}{suffix}"))
    assert [module for module, _ in velocities] == [
        decoder for decoder in decoders for _ in range(12 // len(decoders))
    ], "each expert runs three of the six steps, both branches"
    for place, (cond, uncond) in (("first", (0, 1)), ("last", (-2, -1))):
        for branch, index in (("cond", cond), ("uncond", uncond)):
            if f"{name}.{place}.noise_pred_{branch}" in EXPECTED:
                close(velocities[index][1], expected(f"{name}.{place}.noise_pred_{branch}"), atol=1e-3)
    close(output.frames[0], expected(f"{name}.latents"), atol=1e-3)


def test_contexts_of_the_experts_differ():
    assert (expected("A14B.v2v.context_cond") - expected("A14B.v2v.context_cond_low")).abs().max() > 1
