"""
Cross-attention to a context that does not change between denoising steps: same numbers, less work.

Two facts about this model are used. The decoder attends without a mask to a context that is zero-padded to a fixed
length, so all padding keys are equal, and N equal keys act exactly as one whose logit is raised by ln N. And the
context is the same in every step, so its keys and values need to be projected only once per call and branch.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

# Backends that take a mask of floats, which carries ln N. On the others the context stays padded.
BACKENDS_WITH_BIAS = {
    None,
    AttentionBackendName.NATIVE,
    AttentionBackendName._NATIVE_MATH,
    AttentionBackendName._NATIVE_EFFICIENT,
}


def fold_padding(context: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Replace the padding of a context by as few keys as carry its weight.

    Args:
        context: `[batch, tokens, width]`, not padded.
        length: tokens it is to act like.

    Returns:
        `[batch, tokens + k, width]`, and the logits to add to its keys, `[1, 1, 1, tokens + k]`, or `None` when there
        is nothing to add.
    """
    missing = length - context.shape[1]
    if missing <= 0:
        return context, None
    biases = _biases(missing, context.dtype)
    folded = torch.nn.functional.pad(context, (0, 0, 0, len(biases)))
    logits = folded.new_zeros(folded.shape[1])
    logits[-len(biases) :] = torch.tensor(biases, dtype=logits.dtype)
    return folded, logits[None, None, None]


def _biases(count: int, dtype: torch.dtype) -> list[float]:
    """
    Logits whose exponentials sum to `count`, each exact in `dtype`.

    One number of bfloat16 is off by up to 1.6 %; a second one, for the rest, brings that below 1e-4.
    """
    step = torch.finfo(dtype).eps
    first = math.log(count)
    if step < 1e-6 or count == 1:
        return [first]
    first = float(torch.tensor(first, dtype=dtype))
    while math.exp(first) >= count:  # the next number below
        first = float(torch.nextafter(torch.tensor(first, dtype=dtype), torch.tensor(0.0, dtype=dtype)))
    return [first, float(torch.tensor(math.log(count - math.exp(first)), dtype=dtype))]


class ConstantContext:
    """Contexts of the branches of guidance, and the keys and values that the decoder's blocks made of them."""

    def __init__(self, length: int, can_fold: bool) -> None:
        self.length, self.can_fold = length, can_fold
        self.branch = ""
        self.contexts: dict[str, torch.Tensor] = {}
        self.biases: dict[str, torch.Tensor | None] = {}
        self.projected: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def set(self, branch: str, context: torch.Tensor) -> None:
        """Give a branch its context, `[batch, tokens, width]`, not padded; what was made of an earlier one goes."""
        if self.can_fold:
            self.contexts[branch], self.biases[branch] = fold_padding(context, self.length)
        else:
            missing = max(0, self.length - context.shape[1])
            self.contexts[branch], self.biases[branch] = torch.nn.functional.pad(context, (0, 0, 0, missing)), None
        self.projected = {key: value for key, value in self.projected.items() if key[0] != branch}

    def enter(self, branch: str) -> torch.Tensor:
        """
        Make a branch the current one.

        Returns:
            What to pass to the decoder: the context, or, once every block has its keys and values, a single token of
            it, since nobody looks at it any more.
        """
        self.branch = branch
        known = any(key[0] == branch for key in self.projected)
        return self.contexts[branch][:, :1] if known else self.contexts[branch]


class ConstantContextAttnProcessor:
    """Attention processor of a block's cross-attention while a [`ConstantContext`] is in force."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, context: ConstantContext, index: int) -> None:
        self.context, self.index = context, index

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """As `WanAttnProcessor`; `attention_mask` and `rotary_emb` are `None` in cross-attention."""
        del attention_mask, rotary_emb
        place = (self.context.branch, self.index)
        if place not in self.context.projected:
            self.context.projected[place] = _project(attn, encoder_hidden_states)
        key, value = self.context.projected[place]
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        output = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=self.context.biases[self.context.branch],
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
        )
        output = output.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](output))


def _project(attn: torch.nn.Module, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[batch, tokens, heads, width]` of the context."""
    if getattr(attn, "fused_projections", False):
        key, value = attn.to_kv(states).chunk(2, dim=-1)
    else:
        key, value = attn.to_k(states), attn.to_v(states)
    return attn.norm_k(key).unflatten(2, (attn.heads, -1)), value.unflatten(2, (attn.heads, -1))


@contextmanager
def constant_context(
    transformer: WanTransformer3DModel, contexts: Mapping[str, torch.Tensor], length: int
) -> Iterator[ConstantContext]:
    """
    Let a decoder's cross-attention keep what it makes of each branch's context.

    The blocks get processors of their own for as long as the block of code runs, and the ones they had back
    afterwards, whatever happens.

    Args:
        transformer: the decoder.
        contexts: name of the branch -> `[batch, tokens, width]`, not padded.
        length: tokens a context acts like.
    """
    own = {block.attn2: block.attn2.processor for block in transformer.blocks}
    backends = {getattr(processor, "_attention_backend", None) for processor in own.values()}
    constant = ConstantContext(length, can_fold=backends <= BACKENDS_WITH_BIAS)
    for branch, context in contexts.items():
        constant.set(branch, context)
    try:
        for index, (attn, processor) in enumerate(own.items()):
            replacement = ConstantContextAttnProcessor(constant, index)
            replacement._attention_backend = getattr(processor, "_attention_backend", None)
            attn.set_processor(replacement)
        yield constant
    finally:
        for attn, processor in own.items():
            attn.set_processor(processor)


__all__ = ["ConstantContext", "ConstantContextAttnProcessor", "constant_context", "fold_padding"]
