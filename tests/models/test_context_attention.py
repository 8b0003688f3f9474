import math

import pytest
import tiny
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import WanTransformer3DModel
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from golden import CORE_EXPECTED, TASKS, relative_error
from optimum.quanto import freeze, qfloat8, qint8, quantize
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from omni_video_hf.models.attention_backends import attention_with_padding
from omni_video_hf.models.context_attention import _biases, constant_context, fold_padding, folded_context

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
    with constant.enter(branch) as states:
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
                    with constant.enter(branch) as states:
                        latents = CORE_EXPECTED[f"{case}.latents"][None]
                        velocity = converted_decoder(latents, CORE_EXPECTED["timestep"], states).sample
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


@torch.no_grad()
def test_branches_share_the_first_self_attention(decoder):
    def step(constant, time):
        constant.begin_step(passes=2)
        return [saved(decoder, constant, branch, time) for branch in CONTEXTS]

    wanted = {time: [plain(decoder, CONTEXTS[branch], 40, time) for branch in CONTEXTS] for time in TIMES}
    calls = []
    hook = decoder.blocks[0].attn1.to_q.register_forward_hook(lambda *_: calls.append(1))
    with constant_context(decoder, CONTEXTS, 40) as constant:
        for time, velocities in wanted.items():
            for velocity, expected in zip(step(constant, time), velocities, strict=True):
                assert relative_error(velocity, expected) < 1e-5
            assert constant.first.output is None  # nothing is held when a step is over
    hook.remove()
    assert len(calls) == len(TIMES)


@torch.no_grad()
def test_nothing_is_shared_with_a_step_that_broke_off(decoder):
    other = LATENTS.flip(0)
    with constant_context(decoder, CONTEXTS, 40) as constant:
        constant.begin_step(passes=2)
        saved(decoder, constant, "cond", 900.0)
        constant.begin_step(passes=2)
        with constant.enter("cond") as states:
            velocity = decoder(other, torch.tensor([500.0, 500.0]), states).sample
    padded = torch.nn.functional.pad(CONTEXTS["cond"], (0, 0, 0, 31))
    assert relative_error(velocity, decoder(other, torch.tensor([500.0, 500.0]), padded).sample) < 1e-5


def test_blocks_that_a_cache_skips_get_their_keys_later(decoder):
    """A pass that leaves blocks out must not be taken for the one that fills them."""
    wanted = plain_outside(decoder, CONTEXTS["cond"])
    with torch.no_grad(), constant_context(decoder, CONTEXTS, 40) as constant:
        last, decoder.blocks = decoder.blocks, decoder.blocks[:1]
        saved(decoder, constant, "cond", 500.0)
        decoder.blocks = last
        assert relative_error(saved(decoder, constant, "cond", 20.0), wanted) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["int8", "float8"])
def test_quantised_layers(decoder, dtype):
    quantize(decoder, weights={"int8": qint8, "float8": qfloat8}[dtype], exclude=["proj_out", "patch_embedding"])
    freeze(decoder)
    assert type(decoder.blocks[0].attn2.to_k).__name__ == "QLinear"
    check(decoder)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["model", "sequential", "leaf_level", "block_level"])
def test_offloading(decoder, kind):
    """On the CPU nothing moves, but weights that accelerate's hooks do not bring in are on the meta device."""
    wanted = {branch: plain(decoder, context, 40, 500.0) for branch, context in CONTEXTS.items()}
    if kind == "model":
        cpu_offload_with_hook(decoder, torch.device("cpu"))
    elif kind == "sequential":
        cpu_offload(decoder, torch.device("cpu"), offload_buffers=True)
    else:
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        decoder.enable_group_offload(onload_device=torch.device("cpu"), offload_type=kind, **blocks)
    with constant_context(decoder, CONTEXTS, 40) as constant:
        for _ in range(2):
            constant.begin_step(passes=2)
            for branch, expected in wanted.items():
                assert relative_error(saved(decoder, constant, branch, 500.0), expected) < 1e-5


@torch.no_grad()
def test_lora_that_is_switched_between_calls(decoder):
    decoder.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    with_lora = plain(decoder, CONTEXTS["cond"], 40, 500.0)
    decoder.disable_lora()
    without = plain(decoder, CONTEXTS["cond"], 40, 500.0)
    assert relative_error(with_lora, without) > 1e-2
    for expected, switch in ((without, decoder.enable_lora), (with_lora, decoder.disable_lora)):
        with constant_context(decoder, CONTEXTS, 40) as constant:
            for _ in range(2):
                assert relative_error(saved(decoder, constant, "cond", 500.0), expected) < 1e-5
        switch()


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


@pytest.fixture
def use():
    """Sets the backend of a decoder, and puts back the process's default, which that changes."""
    with attention_backend("native"):
        yield lambda decoder, backend: decoder.set_attention_backend(backend) or decoder


def test_native_flash_folds_by_the_log_sum_exp(decoder, use):
    use(decoder, "_native_flash")
    for length in (9, 10, 40, 2560):
        check(decoder, length=length)
    with torch.no_grad(), constant_context(decoder, CONTEXTS, 40) as constant:
        assert {branch: states.shape[1] for branch, states in constant.contexts.items()} == {"cond": 10, "uncond": 6}
        assert set(constant.biases.values()) == {None}  # which would shut the fast kernel out
    rows = CONTEXTS["cond"].clone()
    rows[1, 4:] = 0
    check(decoder, {"cond": rows})


def test_native_flash_in_half_precision(decoder, use):
    use(decoder, "_native_flash")
    test_half_precision(decoder)


def test_backends_without_bias_and_log_sum_exp_leave_cross_attention_to_torch(decoder, use):
    use(decoder, "flex")
    check(decoder)
    with torch.no_grad(), constant_context(decoder, CONTEXTS, 40) as constant:
        assert constant.contexts["cond"].shape[1] == 10
        assert decoder.blocks[0].attn1.processor.own._attention_backend == "flex"
        assert all(processor.bias_backend == "native" for processor in constant.processors)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["_native_flash", "flex"])
def test_training_folds_on_every_backend(decoder, use, backend, checkpointing):
    """With a bias on torch's own backend: the log-sum-exp has no gradients."""
    use(decoder, "_native_flash")
    if checkpointing:
        decoder.enable_gradient_checkpointing()
    decoder.train()
    context = CONTEXTS["cond"].clone().requires_grad_()
    plain(decoder, context, 40, 500.0).square().sum().backward()
    for block in decoder.blocks:  # flex has no gradients on a CPU, so cross-attention would fail with it
        block.attn2.processor._attention_backend = AttentionBackendName(backend)
    wanted = [context.grad, *(weight.grad.clone() for weight in decoder.parameters())]
    decoder.zero_grad()
    context.grad = None
    with folded_context(decoder, context, 40) as states:
        assert states.shape[1] == 10
        decoder(LATENTS, torch.tensor([500.0, 500.0]), states).sample.square().sum().backward()
    found = [context.grad, *(weight.grad for weight in decoder.parameters())]
    assert all(relative_error(ours, theirs) < 1e-4 for ours, theirs in zip(found, wanted, strict=True))


def reference(query, key, value, scale):
    """Attention of `[batch, tokens, heads, width]`, and its log-sum-exp `[batch, heads, queries]`."""
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key).float() * scale
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1).to(value.dtype), value), logits.logsumexp(-1)


def flash_attn(q, k, v, softmax_scale, return_attn_probs=False, **_):
    """The signature and results of `flash_attn_func`, of versions 2 and 3: documented at their repository."""
    output, log_sum = reference(q, k, v, softmax_scale)
    return (output, log_sum, None) if return_attn_probs else output


def flash_attn_3(q, k, v, softmax_scale, **_):
    """diffusers' operator around version 3, which moves the heads to the end."""
    output, log_sum = reference(q, k, v, softmax_scale)
    return output, log_sum.permute(0, 2, 1)


@pytest.mark.parametrize("backend", ["flash", "flash_hub", "_flash_3", "_flash_3_hub"])
def test_the_log_sum_exp_of_packages(backend, monkeypatch):
    """diffusers calls the packages, which need a GPU; here with their documented results computed by torch."""
    monkeypatch.setattr(attention_dispatch, "flash_attn_func", flash_attn)
    name = AttentionBackendName(backend)
    if name in attention_dispatch._HUB_KERNELS_REGISTRY:
        monkeypatch.setattr(attention_dispatch._HUB_KERNELS_REGISTRY[name], "kernel_fn", flash_attn)
    monkeypatch.setattr(attention_dispatch, "_wrapped_flash_attn_3", flash_attn_3)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 3, 8, generator=generator)  # as many queries as heads: layouts cannot be told apart
    key, value = torch.randn(2, 2, 5, 3, 8, generator=generator)
    padded = [torch.cat([states, states[:, -1:].expand(-1, 6, -1, -1)], dim=1) for states in (key, value)]
    wanted, _ = reference(query, *padded, 8**-0.5)
    ours = attention_with_padding(query, key, value, torch.tensor(7.0).log(), backend)
    assert relative_error(ours, wanted) < 1e-5


def test_the_log_sum_exp_gives_no_gradients_in_silence():
    query, key, value = torch.randn(3, 1, 5, 2, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="no gradients"):
        attention_with_padding(query, key, value, torch.tensor(0.0), "_native_flash")


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
