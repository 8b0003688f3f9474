"""Calls from several threads, from callbacks, and calls that break off."""

import copy
import pickle
import threading

import pytest
import tiny
import torch
from diffusers import FirstBlockCacheConfig
from PIL import Image

from omni_video_hf import OmniVideoPipeline
from omni_video_hf.models.context_attention import (
    ConstantContextAttnProcessor,
    SharedSelfAttnProcessor,
    constant_context,
)
from omni_video_hf.utils.turns import _OWNERS, _WAITING, OwnRandomNumbers, turn

SMALL = {"height": 16, "width": 16, "num_inference_steps": 2, "task": "t2i", "output_type": "latent"}
WAIT = 900  # seconds after which a test that hangs fails


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny.pipeline(max_context_length=160)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def nothing_left_behind(pipe):
    processors = dict(pipe.transformer.attn_processors)
    yield
    assert dict(pipe.transformer.attn_processors) == processors
    assert not {ConstantContextAttnProcessor, SharedSelfAttnProcessor} & {type(each) for each in processors.values()}
    assert not _OWNERS
    assert not _WAITING
    assert pipe.current_timestep is None


def sibling(pipe):
    other = OmniVideoPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return other


def in_threads(jobs, count=4):
    """Results of jobs that `count` threads do, in the order of the jobs."""
    results, places = [None] * len(jobs), iter(range(len(jobs)))

    def work():
        for place in places:
            try:
                results[place] = jobs[place]()
            except Exception as error:  # it is the result
                results[place] = error

    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive(), "a thread waits without end"
    return results


def same(ours, theirs):
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.mark.parametrize("count", [45, pytest.param(200, marks=pytest.mark.slow)])
def test_calls_from_4_threads_equal_the_same_calls_alone(pipe, count):
    pipes = [pipe, sibling(pipe)]
    image = Image.new("RGB", (32, 32), "red")
    prompts = ["a cat", "a much longer prompt about a dog"]

    def drawn(pipe, prompt, scale):
        arguments = SMALL | {"guidance_scale": scale, "num_inference_steps": 1}
        return lambda: pipe(prompt, generator=seeded(len(prompt)), **arguments).frames

    def edited(pipe, prompt):
        arguments = SMALL | {"task": "i2i", "height": 32, "width": 32, "output_type": "pt", "num_inference_steps": 1}
        return lambda: pipe(prompt, image=image, generator=seeded(), **arguments).frames

    def answered(pipe, prompt):
        return lambda: pipe(prompt, task="understand", max_new_tokens=2, generator=seeded()).text

    def encoded(pipe, prompt):
        return lambda: pipe.encode_prompt([prompt, "x"])[0]

    kinds = [
        *(drawn(pipe, prompt, scale) for pipe in pipes for prompt in prompts for scale in (1.0, 3.0)),
        *(edited(pipes[0], prompt) for prompt in prompts[:1]),
        *(answered(pipes[1], prompt) for prompt in prompts),
        *(encoded(pipe, prompt) for pipe in pipes for prompt in prompts),
    ]
    alone = [kind() for kind in kinds]
    numbers = [(7 * place) % len(kinds) for place in range(count)]
    results = in_threads([kinds[number] for number in numbers])
    wrong = [
        (number, result) for number, result in zip(numbers, results, strict=True) if isinstance(result, Exception)
    ]
    assert not wrong
    assert all(same(result, alone[number]) for number, result in zip(numbers, results, strict=True))


def test_turns_come_in_the_order_of_their_requests(pipe):
    """Else the thread that just had its turn takes the next one as well, for as long as it calls in a loop."""
    order = []

    def other():
        with turn(pipe.transformer, pipe.vae):
            order.append("other")

    thread = threading.Thread(target=other, daemon=True)
    with turn(pipe.transformer):
        thread.start()
        while not _WAITING:
            thread.join(0.01)
            assert thread.is_alive()
    with turn(pipe.vae):
        order.append("this")
    thread.join(WAIT)
    assert order == ["other", "this"]


def test_a_call_waits_for_a_component_that_another_thread_has(pipe):
    wanted = pipe("a cat", generator=seeded(), **SMALL).frames
    with turn(pipe.transformer):
        thread = threading.Thread(
            target=lambda: results.append(pipe("a cat", generator=seeded(), **SMALL).frames), daemon=True
        )
        results = []
        thread.start()
        while not _WAITING:
            thread.join(0.01)
            assert thread.is_alive()
        assert not results
    thread.join(WAIT)
    assert torch.equal(results[0], wanted)


def test_calls_in_a_callback_on_the_same_decoder_are_refused(pipe):
    calls = {
        "call": lambda: pipe("a dog", **SMALL),
        "other pipeline": lambda: sibling(pipe)("a dog", **SMALL),
        "denoise": lambda: pipe.denoise(
            torch.zeros(1, 16, 1, 2, 2), pipe.prepare_scheduler(1, 5.0), torch.ones(1, 3, 32)
        ),
        "context": lambda: constant_context(pipe.transformer, {"only": torch.ones(1, 3, 32)}, 9).__enter__(),
    }
    wanted = pipe("a cat", generator=seeded(), **SMALL).frames
    for call in calls.values():
        refused = []

        def begin(running, step, timestep, tensors, call=call, refused=refused):
            with pytest.raises(RuntimeError, match=r"still running|denoising already") as error:
                call()
            refused.append(error)
            return {}

        latents = pipe("a cat", generator=seeded(), callback_on_step_end=begin, **SMALL).frames
        assert len(refused) == 2
        assert torch.equal(latents, wanted)


def test_a_callback_may_use_the_components_and_another_decoder(pipe):
    other = tiny.pipeline(1, max_context_length=160)
    other.register_modules(vae=pipe.vae, mllm=pipe.mllm)
    other.set_progress_bar_config(disable=True)
    context = torch.randn(1, 7, 32, generator=seeded(3))
    wanted = pipe("a cat", generator=seeded(), **SMALL).frames
    with torch.no_grad():
        alone = [
            pipe.decode(wanted, "pt"),
            pipe.encode_prompt("a dog")[0],
            other("a dog", generator=seeded(1), **SMALL).frames,
            pipe.transformer(wanted, torch.tensor([500.0]), context).sample,
        ]

    def use(running, step, timestep, tensors):
        for _ in range(2):
            seen.append(
                [
                    running.decode(wanted, "pt"),
                    running.encode_prompt("a dog")[0],
                    other("a dog", generator=seeded(1), **SMALL).frames,
                    running.transformer(wanted, torch.tensor([500.0]), context).sample,
                ]
            )
        return {}

    seen = []
    assert torch.equal(pipe("a cat", generator=seeded(), callback_on_step_end=use, **SMALL).frames, wanted)
    assert len(seen) == 4
    assert all(torch.equal(ours, theirs) for step in seen for ours, theirs in zip(step, alone, strict=True))


def test_calls_that_would_wait_for_each_other_are_refused():
    pipes = [tiny.pipeline(seed) for seed in (0, 1)]
    both_run = threading.Barrier(2)

    def crossing(first, second):
        def begin(running, step, timestep, tensors):
            if step == 0:
                both_run.wait(WAIT)
                second("a dog", **SMALL)
            return {}

        return lambda: first("a cat", callback_on_step_end=begin, **SMALL).task

    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    results = in_threads([crossing(*pipes), crossing(*pipes[::-1])], count=2)
    refused = [result for result in results if isinstance(result, RuntimeError)]
    assert len(refused) == 1
    assert "wait for each other" in str(refused[0])
    assert "t2i" in results  # the other one went on


@pytest.mark.parametrize("error", [ValueError("mid-call"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["callback", "vae", "text encoder"])
def test_a_call_that_breaks_off_leaves_nothing_behind(pipe, error, place):
    arguments = SMALL | {"output_type": "pt"}
    wanted = pipe("a cat", generator=seeded(), **arguments).frames
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e3))
    cached = pipe("a cat", generator=seeded(), **arguments).frames

    def fail(*_):
        raise error

    if place == "callback":
        broken = arguments | {"callback_on_step_end": fail}
    else:
        broken = arguments
        part = pipe.vae.decoder.conv_out if place == "vae" else pipe.text_encoder
        hook = part.register_forward_pre_hook(fail)
    with pytest.raises(type(error)):
        pipe("a dog", generator=seeded(1), **broken)
    if place != "callback":
        hook.remove()
    assert not any(entry is not None for entry in getattr(pipe.vae, "_feat_map", ()))
    states = [hook.state_manager._state_cache for hook in block_hooks(pipe)]
    assert states
    assert not any(states)
    assert torch.equal(pipe("a cat", generator=seeded(), **arguments).frames, cached)
    pipe.transformer.disable_cache()
    assert torch.equal(pipe("a cat", generator=seeded(), **arguments).frames, wanted)


def block_hooks(pipe):
    registries = [block._diffusers_hook for block in pipe.transformer.blocks]
    return [hook for registry in registries for hook in registry.hooks.values() if hasattr(hook, "state_manager")]


def test_an_unfinished_generator_gives_its_turn_back_when_it_is_closed(pipe):
    def denoising():
        with constant_context(pipe.transformer, {"only": torch.ones(1, 3, 32)}, 9) as constant:
            yield constant

    generator = denoising()
    next(generator)
    with pytest.raises(RuntimeError, match="denoising already"):
        pipe.denoise(torch.zeros(1, 16, 1, 2, 2), pipe.prepare_scheduler(1, 5.0), torch.ones(1, 3, 32))
    generator.close()
    assert pipe("a cat", **SMALL).frames is not None


@torch.no_grad()
def test_denoise_alone_does_not_depend_on_the_last_call(pipe):
    def interrupt(running, *_):
        running._interrupt = True
        return {}

    def alone(pipe):
        contexts = [torch.ones(1, length, 32) for length in (7, 3)]
        return pipe.denoise(torch.ones(1, 16, 1, 2, 2), pipe.prepare_scheduler(2, 5.0), *contexts, guidance_scale=3.0)

    fresh = sibling(pipe)
    wanted = alone(fresh)
    pipe("a cat", guidance_scale=7.0, callback_on_step_end=interrupt, **SMALL)
    assert torch.equal(alone(pipe), wanted)
    with pytest.raises(ValueError, match="`guidance_scale` is None"):
        pipe.denoise(torch.ones(1, 16, 1, 2, 2), pipe.prepare_scheduler(2, 5.0), *[torch.ones(1, 3, 32)] * 2)


def test_another_thread_may_interrupt_the_call(pipe):
    steps = []

    def wait(running, step, *_):
        steps.append(step)
        thread = threading.Thread(target=lambda: setattr(pipe, "_interrupt", True))
        thread.start()
        thread.join(WAIT)
        return {}

    pipe("a cat", callback_on_step_end=wait, **(SMALL | {"num_inference_steps": 4}))
    assert steps == [0]


def test_seeded_answers_do_not_touch_the_random_numbers_of_others(pipe):
    """In threads, numbers of the process would be everybody's: another call would get the seeded ones."""
    arguments = {"task": "understand", "max_new_tokens": 8}
    settings = pipe.mllm.generation_config
    before = settings.do_sample
    settings.do_sample = True
    try:
        answers = [pipe("what is it?", generator=seeded(seed), **arguments).text for seed in (0, 1, 0)]
        state = torch.get_rng_state()
        assert answers[0] == answers[2] != answers[1]
        pipe("what is it?", generator=seeded(5), **arguments)
        assert torch.equal(torch.get_rng_state(), state)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            output = pipe("what is it?", **arguments)  # from a seed that the process gives, and the output names
            torch.manual_seed(0)
            assert pipe("what is it?", **arguments).text == output.text
        assert pipe("what is it?", generator=seeded(output.settings["seed"]), **arguments).text == output.text
    finally:
        settings.do_sample = before


def test_own_random_numbers_are_those_after_the_seed():
    weights = torch.rand(3, 50)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        wanted = [torch.multinomial(weights, 5), weights.multinomial(2)]
    with OwnRandomNumbers(4):
        ours = [torch.multinomial(weights, 5), weights.multinomial(2)]
    assert all(torch.equal(*pair) for pair in zip(ours, wanted, strict=True))


def test_turns_lie_outside_of_the_components(pipe, tmp_path):
    with turn(pipe.transformer):
        assert torch.equal(
            pickle.loads(pickle.dumps(pipe.adapter)).query_transformer.query_tokens,  # noqa: S301 - made here
            pipe.adapter.query_transformer.query_tokens,
        )
        twin = copy.deepcopy(pipe.transformer)
        assert in_threads([lambda: has_taken(twin)], count=1) == [True]
        pipe.transformer.save_pretrained(tmp_path)


def has_taken(component):
    with turn(component):
        return True
