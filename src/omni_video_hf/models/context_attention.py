"""
Faster cross-attention of the decoder with equal results: fold the padding of the context, keep its keys and values.

Three properties of this model are used. The decoder attends without a mask to a context that is zero-padded to a
fixed length, so all padding keys are equal, and N equal keys act exactly as one key whose logit is raised by ln N. The
context is the same in every step, so its keys and values are projected only once per call and branch. And the first
self-attention of the decoder does not depend on the context, so it is the same for all branches of a step.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.utils.torch_utils import is_compiled_module
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from ..utils.turns import turn
from .attention_backends import BACKENDS_WITH_BIAS, BACKENDS_WITH_LOG_SUM_EXP, attention_with_padding

# Keys and values of later windows of a long video that are kept from step to step, in bytes.
KEPT_BYTES = 64 * 2**20

_STANCE = threading.RLock()


def fold_padding(context: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Replace the padding of a context by a few keys with the same weight in the attention.

    Args:
        context: `[batch, tokens, width]`, not padded.
        length: number of tokens of the padded context.

    Returns:
        `[batch, tokens + k, width]`, and the logits to add to its keys, `[1, 1, 1, tokens + k]`, or `None` when there
        is nothing to add.
    """
    missing = length - context.shape[1]
    if missing <= 0:
        return context, None
    biases = _biases(missing, _attention_dtype(context))
    folded = torch.nn.functional.pad(context, (0, 0, 0, len(biases)))
    logits = folded.new_zeros(folded.shape[1])
    for place, bias in enumerate(reversed(biases), start=1):
        logits[-place] = bias
    return folded, logits[None, None, None]


def _attention_dtype(context: torch.Tensor) -> torch.dtype:
    """The dtype of the attention to a context, which autocast may change."""
    kind = context.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casts else context.dtype


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


class ConstantContextAttnProcessor:
    """
    Attention processor of a block's cross-attention while a [`ConstantContext`] is in force.

    What a pass reads are plain attributes, equal in kind for all blocks: one compiled graph serves them all.
    """

    _attention_backend = None
    _parallel_config = None
    bias_backend: AttentionBackendName | None = None  # with a bias, instead of a backend that takes none

    def __init__(self) -> None:
        self.projected: tuple[torch.Tensor, torch.Tensor] | None = None  # keys and values of the current branch
        self.bias: torch.Tensor | None = None  # logits that are added to those of the keys
        self.log_count: torch.Tensor | None = None  # or ln of the number of keys that the last one stands for
        self.keeps = False  # outside of a branch's pass, as in a callback, a context is one like any other

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """As `WanAttnProcessor`; `attention_mask` and `rotary_emb` are `None` in cross-attention."""
        del attention_mask, rotary_emb
        projected = self.projected
        if projected is None:
            projected = _project(attn, encoder_hidden_states)
            if self.keeps:
                self.projected = projected
        key, value = projected
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        if len(key) == 2 * len(query):  # FasterCache runs the conditional half of a batch alone, the second one
            key, value = key[len(query) :], value[len(query) :]
        output = self._attend(query, key, value).flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](output))

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        backend = self._attention_backend
        if self.log_count is not None:
            default, _ = _AttentionBackendRegistry.get_active_backend()
            return attention_with_padding(query, key, value, self.log_count, backend or default)
        if self.bias is not None and self.bias_backend is not None:
            backend = self.bias_backend
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=None if self.bias is None else self.bias.to(query.device),  # blocks may lie on several
            dropout_p=0.0,
            is_causal=False,
            backend=backend,
        )


class SharedSelfAttnProcessor:
    """
    Attention processor of the first block's self-attention: it has not seen the context yet, so branches share it.

    Args:
        own: the processor that computes it.
    """

    def __init__(self, own: Callable[..., torch.Tensor]) -> None:
        self.own = own
        self.passes = 0  # passes left in this step
        self.output: torch.Tensor | None = None

    def __call__(self, attn: torch.nn.Module, *args: object, **kwargs: object) -> torch.Tensor:
        """As `own`, once per step; the output is dropped with the step's last pass."""
        output = self.own(attn, *args, **kwargs) if self.output is None else self.output
        self.passes -= 1
        self.output = output if self.passes > 0 else None
        return output


class ConstantContext:
    """
    Contexts of the branches of guidance, with their keys and values in the decoder's blocks.

    Args:
        processors: processors of the blocks' cross-attention.
        first: processor of the first block's self-attention, `None` if branches do not share it.
        length: number of tokens of the padded contexts.
        by_log_sum_exp: the padding is folded by [`attention_with_padding`], else by a bias.
        compiled: blocks are compiled; see [`enter`].
    """

    def __init__(
        self,
        processors: list[ConstantContextAttnProcessor],
        first: SharedSelfAttnProcessor | None,
        length: int,
        by_log_sum_exp: bool,
        compiled: bool = False,
    ) -> None:
        self.processors, self.first = processors, first
        self.length, self.by_log_sum_exp, self.compiled = length, by_log_sum_exp, compiled
        self.contexts: dict[str, torch.Tensor] = {}
        self.biases: dict[str, torch.Tensor | None] = {}
        self.log_counts: dict[str, torch.Tensor | None] = {}
        self.projected: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.limited: set[str] = set()  # branches of later windows, whose keys and values are kept if there is room

    @property
    def contexts_of_first_window(self) -> dict[str, torch.Tensor]:
        """Contexts by branch, without those of later windows of a long video."""
        return {branch: context for branch, context in self.contexts.items() if branch not in self.limited}

    def set(self, branch: str, context: torch.Tensor, always_kept: bool = True) -> None:
        """
        Set the context of a branch, `[batch, tokens, width]`, not padded; old keys and values are removed.

        Args:
            always_kept: `False` keeps its keys and values only within [`KEPT_BYTES`], so that memory does not grow
                with the number of windows; otherwise they are computed in every pass.
        """
        if not always_kept:
            self.limited.add(branch)
        missing = self.length - context.shape[1]
        self.biases[branch] = self.log_counts[branch] = None
        if not self.by_log_sum_exp:
            context, self.biases[branch] = fold_padding(context, self.length)
        elif missing > 0:
            self.log_counts[branch] = torch.tensor(math.log(missing), device=context.device)
            context = torch.nn.functional.pad(context, (0, 0, 0, 1))
        self.contexts[branch] = context
        self.projected.pop(branch, None)

    def begin_step(self, passes: int) -> None:
        """
        Announce `passes` passes of the decoder, one per branch, with the same latents, source and timestep.

        The self-attention of the first block then runs once for all of them.
        """
        if self.first is not None:
            self.first.passes, self.first.output = passes, None

    @contextmanager
    def enter(self, branch: str) -> Iterator[torch.Tensor]:
        """
        Make a branch the current one, for one pass of the decoder.

        The first pass makes the keys and values. Compiled blocks run uncompiled in it, so that they are compiled once,
        for all the passes that follow.

        Yields:
            The context for the decoder: all of it, or, once every block has its keys and values, a single token,
            because the rest is not used any more.
        """
        known = self.projected.get(branch, [None] * len(self.processors))
        is_first = branch not in self.projected
        for processor, projected in zip(self.processors, known, strict=True):
            processor.projected, processor.keeps = projected, True
            processor.bias, processor.log_count = self.biases[branch], self.log_counts[branch]
        try:
            with _uncompiled() if is_first and self.compiled else nullcontext():
                yield self.contexts[branch] if is_first else self.contexts[branch][:, :1]
            made = [processor.projected for processor in self.processors if processor.projected is not None]
            if is_first and len(made) == len(self.processors) and self._has_room(branch, made):
                self.projected[branch] = made
                if self.compiled:
                    self._let_lengths_vary(branch)
        finally:
            for processor in self.processors:
                processor.projected = processor.bias = processor.log_count = None
                processor.keeps = False

    def _has_room(self, branch: str, made: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
        """Whether keys and values of a branch are kept; in compiled blocks always, which would need a second graph."""
        if branch not in self.limited or self.compiled:
            return True
        kept = (self.projected[other] for other in self.limited if other in self.projected)
        tensors = chain.from_iterable(chain(made, *kept))
        return sum(tensor.nbytes for tensor in tensors) <= KEPT_BYTES

    def _let_lengths_vary(self, branch: str) -> None:
        """Branches and prompts differ in length: compile for all lengths from the start."""
        for tensor in chain.from_iterable(self.projected[branch]):
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        if self.biases[branch] is not None:
            torch._dynamo.maybe_mark_dynamic(self.biases[branch], 3)


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Run compiled modules as they were written; how torch runs them is a setting of the whole process."""
    with _STANCE, torch.compiler.set_stance("force_eager"):
        yield


def _project(attn: Any, states: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
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
    Let the cross-attention of a decoder keep keys and values of each branch's context.

    During the `with` block the blocks of the decoder have special attention processors; afterwards, also after an
    error, they get their own ones back. Other threads wait for the decoder.

    Args:
        transformer: the decoder.
        contexts: name of the branch -> `[batch, tokens, width]`, not padded.
        length: number of tokens of the padded contexts.

    Raises:
        RuntimeError: if the decoder is already in such a block, e.g. in a callback of a call.
    """
    with turn(transformer), _replaced_processors(transformer, contexts, length) as constant:
        yield constant


def check_not_denoising(transformer: WanTransformer3DModel) -> None:
    """Refuse to denoise with a decoder in the middle of doing so, from a callback or between two steps."""
    if any(isinstance(block.attn2.processor, ConstantContextAttnProcessor) for block in transformer.blocks):
        raise RuntimeError(
            "The decoder is denoising already: a callback, or code between two steps, started to denoise with it "
            "again. Do this after the call, or with another decoder."
        )


@contextmanager
def _replaced_processors(
    transformer: WanTransformer3DModel, contexts: Mapping[str, torch.Tensor], length: int
) -> Iterator[ConstantContext]:
    """[`constant_context`], for the thread whose turn it is."""
    check_not_denoising(transformer)
    own = {block.attn2: block.attn2.processor for block in transformer.blocks}
    # Kernels do not return the gradients of the log-sum-exp.
    by_log_sum_exp = _backends(transformer) <= BACKENDS_WITH_LOG_SUM_EXP and not torch.is_grad_enabled()
    replacements: dict[Any, Any] = {attn: _replacement(processor) for attn, processor in own.items()}
    constant = ConstantContext(list(replacements.values()), None, length, by_log_sum_exp, is_compiled(transformer))
    if not constant.compiled:  # a second graph of one block would cost more than its self-attention
        attn = transformer.blocks[0].attn1
        own[attn] = attn.processor
        replacements[attn] = constant.first = SharedSelfAttnProcessor(attn.processor)
    for branch, context in contexts.items():
        constant.set(branch, context)
    try:
        for attn, replacement in replacements.items():
            attn.set_processor(replacement)
        yield constant
    finally:
        for attn, processor in own.items():
            attn.set_processor(processor)


@contextmanager
def folded_context(transformer: WanTransformer3DModel, context: torch.Tensor, length: int) -> Iterator[torch.Tensor]:
    """
    Fold the padding of a context for one pass of the decoder, backward included: for training, where keys and values
    change with every step and nothing is kept.

    With gradient checkpointing each block gets its processor anew whenever it runs, in the backward pass as well.
    Where a wrapper of torch's runs blocks again, as accelerate puts around them, or blocks are compiled, the context
    is padded.

    Args:
        transformer: the decoder.
        context: `[batch, tokens, width]`, not padded.
        length: tokens it is to act like.

    Yields:
        What to pass to the decoder.
    """
    wrapped = torch.is_grad_enabled() and any(isinstance(part, CheckpointWrapper) for part in transformer.modules())
    if wrapped or is_compiled(transformer):
        yield torch.nn.functional.pad(context, (0, 0, 0, max(0, length - context.shape[1])))
    elif torch.is_grad_enabled() and transformer.gradient_checkpointing:
        folded, bias = fold_padding(context, length)
        with _checkpointed_with_bias(transformer, bias):
            yield folded
    else:
        with constant_context(transformer, {"only": context}, length) as constant, constant.enter("only") as folded:
            yield folded


@contextmanager
def _checkpointed_with_bias(transformer: WanTransformer3DModel, bias: torch.Tensor | None) -> Iterator[None]:
    """Let checkpointed blocks add `bias` to the logits of the context, in this pass and when they run again for it."""
    own = transformer._gradient_checkpointing_func

    def run(block: Any, *args: torch.Tensor) -> torch.Tensor:
        processor = block.attn2.processor
        replacement = _replacement(processor)
        replacement.bias = bias
        block.attn2.set_processor(replacement)
        try:
            return block(*args)
        finally:
            block.attn2.set_processor(processor)

    transformer.enable_gradient_checkpointing(lambda block, *args: own(partial(run, block), *args))
    try:
        yield
    finally:
        transformer.enable_gradient_checkpointing(own)


def _replacement(own: Any) -> ConstantContextAttnProcessor:
    """The processor that stands in for a block's own one."""
    made = ConstantContextAttnProcessor()
    made._attention_backend = getattr(own, "_attention_backend", None)
    default, _ = _AttentionBackendRegistry.get_active_backend()
    if (made._attention_backend or default) not in BACKENDS_WITH_BIAS:
        made.bias_backend = AttentionBackendName.NATIVE
    return made


def _backends(transformer: WanTransformer3DModel) -> set[AttentionBackendName]:
    """Attention backends of the decoder's cross-attention."""
    default, _ = _AttentionBackendRegistry.get_active_backend()
    return {getattr(block.attn2.processor, "_attention_backend", None) or default for block in transformer.blocks}


def is_compiled(transformer: WanTransformer3DModel) -> bool:
    """Whether the decoder, or its blocks, are compiled."""
    modules = [transformer, *transformer.blocks]
    return is_compiled_module(transformer) or any(module._compiled_call_impl is not None for module in modules)


__all__ = [
    "ConstantContext",
    "ConstantContextAttnProcessor",
    "SharedSelfAttnProcessor",
    "check_not_denoising",
    "constant_context",
    "fold_padding",
    "folded_context",
    "is_compiled",
]
