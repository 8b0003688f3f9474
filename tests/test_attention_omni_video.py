import math

import pytest
import tiny
import torch
from diffusers import WanTransformer3DModel
from golden import CORE_EXPECTED, TASKS, relative_error
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from omni_video_hf.attention_omni_video import ConstantContext, _biases, constant_context, fold_padding

LATENTS = torch.randn(2, 16, 2, 8, 4, generator=torch.Generator().manual_seed(1))
CONTEXTS = {
    "cond": torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2)),
    "uncond": torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3)),
}
TIMES = (900.0, 500.0, 20.0)


@pytest.fixture
def decoder():
    return tiny.decoder()


def plain(decoder, context, length, time):
    padded = torch.nn.functional.pad(context, (0, 0, 0, length - context.shape[1]))
    return decoder(LATENTS.to(context.dtype), torch.tensor([time, time]), padded).sample


def saved(decoder, constant, branch, time):
    states = constant.enter(branch)
    return decoder(LATENTS.to(states.dtype), torch.tensor([time, time]), states).sample


@torch.no_grad()
def check(decoder, contexts=CONTEXTS, length=40, tolerance=1e-5):
    wanted = {(branch, time): plain(decoder, contexts[branch], length, time) for branch in contexts for time in TIMES}
    with constant_context(decoder, contexts, length) as constant:
        for (branch, time), expected in wanted.items():
            assert relative_error(saved(decoder, constant, branch, time), expected) < tolerance


def test_every_step_and_branch_equals_the_plain_path(decoder):
    for length in (9, 10, 40, 2560):
        check(decoder, length=length)


def test_longer_contexts_than_the_trained_length_are_not_touched(decoder):
    folded, bias = fold_padding(CONTEXTS["cond"], 7)
    assert bias is None
    assert folded is CONTEXTS["cond"]


def test_unequal_rows_end_in_zeros(decoder):
    rows = CONTEXTS["cond"].clone()
    rows[1, 4:] = 0
    check(decoder, {"cond": rows})


@torch.no_grad()
def test_upstreams_decoder_gives_upstreams_numbers(converted_decoder):
    for case in TASKS:
        for branch, name in (("cond", "mixed_context"), ("uncond", "mixed_context_uncond")):
            context = CORE_EXPECTED[f"{case}.{name}"][None]
            with constant_context(converted_decoder, {branch: context}, 64) as constant:
                for _ in range(2):
                    velocity = converted_decoder(
                        CORE_EXPECTED[f"{case}.latents"][None], CORE_EXPECTED["timestep"], constant.enter(branch)
                    ).sample
                    assert relative_error(velocity[0], CORE_EXPECTED[f"{case}.noise_pred_{branch}"]) < 1e-5


@pytest.fixture(scope="module")
def converted_decoder(converted):
    return WanTransformer3DModel.from_pretrained(converted, subfolder="transformer").eval()


@pytest.mark.parametrize("count", [1, 2, 3, 100, 1531, 2559])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folded_keys_weigh_as_much_as_the_padding(count, dtype):
    biases = _biases(count, dtype)
    assert len(biases) <= 2
    assert all(float(torch.tensor(bias, dtype=dtype)) == pytest.approx(bias, rel=1e-6) for bias in biases)
    assert sum(math.exp(bias) for bias in biases) == pytest.approx(count, rel=2e-4)


def test_half_precision(decoder):
    half = {branch: context.bfloat16() for branch, context in CONTEXTS.items()}
    exact = plain(decoder, half["cond"].float(), 2560, 500.0)
    decoder.to(torch.bfloat16)
    with torch.no_grad(), constant_context(decoder, half, 2560) as constant:
        ours = saved(decoder, constant, "cond", 500.0)
    with torch.no_grad():
        reference = plain(decoder, half["cond"], 2560, 500.0)
    # as close to the exact result as the plain path in the same format
    assert relative_error(ours.float(), exact) < 1.5 * relative_error(reference.float(), exact) + 1e-3


def test_lora(decoder):
    decoder.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v", "to_q"], init_lora_weights=False))
    check(decoder)
    decoder.disable_lora()
    check(decoder)


def test_fused_projections(decoder):
    for block in decoder.blocks:
        block.attn2.fuse_projections()
    check(decoder)


def test_processors_come_back_whatever_happens(decoder):
    before = dict(decoder.attn_processors)
    with constant_context(decoder, CONTEXTS, 40):
        assert dict(decoder.attn_processors) != before
    assert dict(decoder.attn_processors) == before
    with pytest.raises(RuntimeError, match="mid-call"), constant_context(decoder, CONTEXTS, 40):
        raise RuntimeError("mid-call")
    assert dict(decoder.attn_processors) == before


def test_a_new_context_replaces_what_was_kept(decoder):
    other = CONTEXTS["cond"] * 2
    with torch.no_grad(), constant_context(decoder, CONTEXTS, 40) as constant:
        saved(decoder, constant, "cond", 500.0)
        constant.set("cond", other)
        assert relative_error(saved(decoder, constant, "cond", 20.0), plain_outside(decoder, other)) < 1e-5


def plain_outside(decoder, context):
    twin = tiny.decoder()
    with torch.no_grad():
        return plain(twin, context, 40, 20.0)


def test_backends_without_masks_keep_the_padding(decoder):
    constant = ConstantContext(40, can_fold=False)
    constant.set("cond", CONTEXTS["cond"])
    assert constant.enter("cond").shape[1] == 40
    assert constant.biases["cond"] is None


def test_later_steps_do_less(decoder):
    def count(function):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function()
        return counter.get_total_flops()

    reference = count(lambda: plain(decoder, CONTEXTS["cond"], 2560, 500.0))
    with constant_context(decoder, CONTEXTS, 2560) as constant:
        first = count(lambda: saved(decoder, constant, "cond", 500.0))
        later = count(lambda: saved(decoder, constant, "cond", 400.0))
    assert later < first < 0.2 * reference
