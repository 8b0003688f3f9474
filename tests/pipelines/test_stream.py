"""Long videos chunk by chunk, and frames that a result begins with."""

import numpy as np
import pytest
import tiny
import torch
from golden import relative_error
from PIL import Image

from omni_video_hf.media.clip import VideoClip

RANDOM = np.random.default_rng(0)
CLIP = RANDOM.integers(0, 255, (17, 32, 64, 3), dtype=np.uint8)
CHUNKS = {"window_frames": 9, "window_overlap": 4}
TASKS = {"v2v": {"video": CLIP}, "t2v": {"num_frames": 17}, "i2v": {"image": CLIP[0], "num_frames": 17}}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny.pipeline(max_context_length=160)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(task, **others):
    return {"prompt": "a cat", "task": task, "output_type": "pt", "generator": seeded()} | TASKS[task] | others


# --- frames that a result begins with -------------------------------------------------------------------------------


def test_the_result_begins_with_the_frames_that_were_given(pipe):
    first = torch.rand(1, 5, 3, 32, 64, generator=seeded(1))
    latents = pipe(**arguments("t2v", num_frames=9, first_frames=first, output_type="latent")).frames
    free = pipe(**arguments("t2v", num_frames=9, output_type="latent")).frames
    wanted = pipe.encode_frames(first)
    torch.testing.assert_close(latents[:, :, :2], wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(latents[:, :, 2:], free[:, :, 2:], atol=1e-2)  # the rest sees them


def test_each_step_sees_them_at_its_own_noise(pipe):
    first, noise = torch.rand(1, 5, 3, 32, 64, generator=seeded(1)), torch.randn(1, 16, 3, 4, 8, generator=seeded(2))
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["timestep"], kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        pipe(**arguments("t2v", num_frames=9, first_frames=first, latents=noise, guidance_scale=1.0))
    finally:
        hook.remove()
    clean = pipe.encode_frames(first)
    assert len(seen) == 2
    for timestep, states in seen:
        sigma = timestep / 1000
        assert relative_error(states[:, :, :2], (1 - sigma) * clean + sigma * noise[:, :, :2]) < 2e-3


@pytest.mark.parametrize(
    "first",
    [
        torch.zeros(1, 4, 3, 32, 64),
        torch.zeros(1, 5, 3, 64, 32),
        torch.zeros(1, 13, 3, 32, 64),
        torch.zeros(5, 3, 32, 64),
        torch.full((1, 5, 3, 32, 64), 255.0),
    ],
)
def test_frames_that_do_not_fit_are_refused(pipe, first):
    with pytest.raises(ValueError, match="`first_frames` must be"):
        pipe(**arguments("t2v", num_frames=9, first_frames=first))


# --- chunks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_chunks_are_the_calls_of_their_frames(pipe, task):
    """9 frames, then 4 new ones twice; each chunk begins with the last 5 frames of the one before it."""
    chunks = list(pipe.stream(**arguments(task, **CHUNKS)))
    assert [chunk.frames.shape[1] for chunk in chunks] == [9, 4, 4]
    generator, ready = seeded(), None
    for number, chunk in enumerate(chunks):
        media = {"num_frames": 9}
        if task == "v2v":
            media = {"video": VideoClip(CLIP[4 * number : 4 * number + 9], None)}
        elif task == "i2v":
            last = CLIP[0] if ready is None else ready[0, 4].movedim(0, -1).mul(255).round().to(torch.uint8).numpy()
            media["image"] = Image.fromarray(last)
        first = None if ready is None else ready[:, 4:]
        given = arguments(task, generator=generator, first_frames=first) | media
        ready = pipe(**given | {"height": 32, "width": 64}).frames
        assert torch.equal(chunk.frames, ready[:, -chunk.frames.shape[1] :])


@pytest.mark.parametrize("given", [{"think": True}, {"thought": "a fox"}])
def test_a_stream_does_not_think_once_a_chunk(pipe, given):
    with pytest.raises(ValueError, match="would be used again for every chunk"):
        pipe.stream(**arguments("t2v", **CHUNKS), **given)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_the_call_joins_the_chunks(pipe, output_type):
    output = pipe(**arguments("v2v", output_type=output_type, long_video="chunks", **CHUNKS))
    parts = [chunk.frames for chunk in pipe.stream(**arguments("v2v", output_type=output_type, **CHUNKS))]
    settings = {name: output.settings[name] for name in ("num_frames", "long_video", *CHUNKS)}
    assert settings == {"num_frames": 17, "long_video": "chunks", **CHUNKS}
    assert output.settings["seed"] == 0
    if output_type == "pil":
        assert output.frames[0] == [frame for part in parts for frame in part[0]]
    else:
        joined = np.concatenate([np.asarray(part) for part in parts], axis=1)
        assert np.array_equal(np.asarray(output.frames), joined)


@pytest.mark.parametrize("task", TASKS)
def test_a_video_of_one_chunk_is_the_same_to_the_bit(pipe, task):
    short = {"video": CLIP[:9]} if task == "v2v" else {"num_frames": 9}
    chunked = pipe(**arguments(task, long_video="chunks", **short, **CHUNKS)).frames
    assert torch.equal(chunked, pipe(**arguments(task, **short)).frames)


def test_a_batch_gives_what_its_samples_give_alone(pipe):
    clips = [CLIP, 255 - CLIP]
    both = arguments("v2v", prompt=["a cat", "a dog"], video=clips, generator=[seeded(0), seeded(1)])
    together = pipe(**both, long_video="chunks", **CHUNKS).frames
    for number, prompt in enumerate(("a cat", "a dog")):
        given = arguments("v2v", prompt=prompt, video=clips[number], generator=seeded(number))
        alone = pipe(**given, long_video="chunks", **CHUNKS).frames
        torch.testing.assert_close(together[number : number + 1], alone, atol=1e-3, rtol=1e-3)


def test_frames_can_come_from_a_file_that_is_not_read_at_once(pipe, tmp_path):
    np.save(tmp_path / "clip.npy", CLIP)
    lazy = VideoClip(np.load(tmp_path / "clip.npy", mmap_mode="r"), 8.0)
    found = [chunk.frames for chunk in pipe.stream(**arguments("v2v", video=lazy, **CHUNKS))]
    wanted = [chunk.frames for chunk in pipe.stream(**arguments("v2v", video=VideoClip(CLIP, 8.0), **CHUNKS))]
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_an_interrupted_chunk_is_the_last(pipe):
    def interrupt(running, step, timestep, tensors):
        running._interrupt = True
        return {}

    assert len(list(pipe.stream(**arguments("v2v", callback_on_step_end=interrupt, **CHUNKS)))) == 1


def test_the_pipeline_is_free_between_two_chunks(pipe):
    chunks = pipe.stream(**arguments("v2v", **CHUNKS))
    next(chunks)
    pipe(**arguments("t2v", num_frames=5))
    assert len(list(chunks)) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"output_type": "latent"}, "`output_type` must be 'pil', 'np' or 'pt' for chunks"),
        ({"num_videos_per_prompt": 2}, "`num_videos_per_prompt` must be 1 for chunks, got 2"),
        ({"latents": torch.zeros(1, 16, 5, 4, 8)}, "`latents` are those of one clip"),
        ({"window_frames": 10}, "`window_frames` must be 4n"),
        ({"window_frames": 9, "window_overlap": 8}, "`window_overlap` must be a multiple of 4 in 4..4"),
        ({"num_frames": 16}, "`num_frames` must be 4n"),
        ({"num_frames": 2.5}, "`num_frames` must be a whole number"),
    ],
)
def test_what_belongs_to_one_chunk_is_refused_at_once(pipe, wrong, message):
    with pytest.raises(ValueError, match=message):
        pipe.stream(**arguments("t2v", **wrong))
    with pytest.raises(ValueError, match=message):
        pipe(**arguments("t2v", **wrong, long_video="chunks"))


# --- frames as they are decoded -------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_decoded_frames_come_as_they_are_complete(pipe, output_type):
    latents = torch.randn(2, 16, 3, 4, 8, generator=seeded())
    whole = pipe.decode(latents, output_type)
    parts = list(pipe.decode_frames(latents, output_type))
    assert [len(part[0]) for part in parts] == [1, 4, 4]
    statistics = (
        torch.tensor(getattr(pipe.vae.config, f"latents_{name}")).view(1, -1, 1, 1, 1) for name in ("mean", "std")
    )
    mean, std = statistics
    with torch.no_grad():
        pixels = pipe.vae.decode(latents * std + mean).sample
    wanted = pipe.video_processor.postprocess_video(pixels, output_type=output_type)
    if output_type == "pil":
        assert [[frame for part in parts for frame in part[sample]] for sample in (0, 1)] == whole == wanted
    else:
        joined = np.concatenate([np.asarray(part) for part in parts], axis=1)
        assert np.array_equal(joined, np.asarray(whole))
        assert np.array_equal(joined, np.asarray(wanted))


def test_latents_that_are_not_finite_are_refused(pipe):
    with pytest.raises(ValueError, match="`latents` contains"):
        list(pipe.decode_frames(torch.full((1, 16, 1, 4, 8), torch.nan)))
