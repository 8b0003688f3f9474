"""
Attention backends: their names in transformers and diffusers, their packages, and attention to a folded padding.

N equal keys act as one key whose logit is raised by ln N. A backend that takes a mask of floats gets ln N in it. Fast
kernels take no such mask, but return the log of the sum of exponentials of the logits (log-sum-exp), with which the
padding can be added after them. All other backends leave this attention to torch's own.
"""

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

# transformers' names of attention implementations -> diffusers' names of attention backends.
ATTENTION_BACKENDS = {
    "eager": "native",
    "sdpa": "native",
    "flash_attention_2": "flash",
    "flash_attention_3": "_flash_3",
    "flash_attention_4": "flash_4_hub",
    "flex_attention": "flex",
    "kernels-community/flash-attn": "flash_hub",
    "kernels-community/flash-attn2": "flash_hub",
    "kernels-community/flash-attn3": "_flash_3_hub",
    "kernels-community/vllm-flash-attn3": "_flash_3_hub",
}

# Backends that take a mask of floats, which carries ln N.
BACKENDS_WITH_BIAS = {
    AttentionBackendName.NATIVE,
    AttentionBackendName._NATIVE_MATH,
    AttentionBackendName._NATIVE_EFFICIENT,
}
# Backends that return the log-sum-exp through diffusers -> the argument that asks for it, and whether the heads come
# before the queries in it.
_WITH_LOG_SUM_EXP = {
    AttentionBackendName.FLASH: ("return_lse", True),
    AttentionBackendName.FLASH_HUB: ("return_lse", True),
    AttentionBackendName._FLASH_3: ("return_lse", False),
    AttentionBackendName._FLASH_3_HUB: ("return_attn_probs", True),
}
BACKENDS_WITH_LOG_SUM_EXP = {
    *_WITH_LOG_SUM_EXP,
    AttentionBackendName._NATIVE_FLASH,
    AttentionBackendName._NATIVE_CUDNN,
}

ATTENTION_PACKAGES = {
    "flash_attention_2": "flash-attn",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
}


def missing_package(error: ImportError, attn_implementation: str | None) -> ImportError:
    """
    The error of an attention implementation whose package is not installed, with the package's name.

    Args:
        error: what transformers raised.
        attn_implementation: the implementation that was asked for.
    """
    package = ATTENTION_PACKAGES.get(str(attn_implementation), "kernels")
    return ImportError(
        f"`attn_implementation={attn_implementation!r}` needs the package `{package}` (`pip install {package}`), or "
        f"use 'sdpa'. {error}"
    )


def attention_with_padding(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_count: torch.Tensor, backend: Any
) -> torch.Tensor:
    """
    Attention to keys of which the last one stands for several equal ones, by a backend that takes no mask.

    The kernel attends to all other keys; the last one is added by its share of the sum of exponentials, in float32.

    Args:
        query: `[batch, queries, heads, width]`.
        key, value: `[batch, keys, heads, width]`, at least two keys.
        log_count: ln of the number of keys that the last one stands for, float32, without dimensions.
        backend: one of [`BACKENDS_WITH_LOG_SUM_EXP`].

    Returns:
        `[batch, queries, heads, width]`.

    Raises:
        RuntimeError: where gradients are wanted: kernels do not return those of the log-sum-exp.

    Example:
        >>> import torch
        >>> from omni_video_hf.models.attention_backends import attention_with_padding
        >>> query, key, value = torch.randn(3, 1, 5, 2, 8)
        >>> same = [torch.cat([states, states[:, -1:]], dim=1) for states in (key, value)]  # the last key twice
        >>> wanted = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, *same)))
        >>> folded = attention_with_padding(query, key, value, torch.tensor(2.0).log(), "_native_flash")
        >>> torch.allclose(folded, wanted.transpose(1, 2), atol=1e-5)
        True
    """
    if torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value)):
        raise RuntimeError("Padding that is folded by the log-sum-exp has no gradients: use `torch.no_grad()`.")
    name = backend if isinstance(backend, AttentionBackendName) else AttentionBackendName(backend)
    scale = query.shape[-1] ** -0.5
    output, log_sum = _attention_and_log_sum_exp(query, key[:, :-1], value[:, :-1], scale, name)
    logit = _logits(query, key[:, -1:]) * scale + log_count.to(query.device)
    share = torch.sigmoid(logit - log_sum.float())
    return torch.lerp(output, value[:, -1:].to(output.dtype), share.to(output.dtype)[..., None])


def _logits(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Products of queries with one key, `[batch, queries, heads]` in float32."""
    if query.dtype == torch.float32:
        return torch.einsum("bqhd,bhd->bqh", query, key[:, 0])
    return (query * key).sum(dim=-1, dtype=torch.float32)  # a product of matrices would round the sum


def _attention_and_log_sum_exp(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, backend: AttentionBackendName
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[batch, queries, heads, width]`, and the log-sum-exp `[batch, queries, heads]`."""
    if backend in _WITH_LOG_SUM_EXP:
        argument, heads_first = _WITH_LOG_SUM_EXP[backend]
        output, log_sum = dispatch_attention_fn(
            query, key, value, scale=scale, attention_kwargs={argument: True}, backend=backend
        )
        return output, log_sum.transpose(1, 2) if heads_first else log_sum
    # diffusers asks these two for it only where the attention is distributed.
    states = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    if backend == AttentionBackendName._NATIVE_CUDNN:
        states = [tensor.contiguous() for tensor in states]
        output, log_sum = torch.ops.aten._scaled_dot_product_cudnn_attention(*states, None, True, scale=scale)[:2]
        log_sum = log_sum.squeeze(-1) if log_sum.ndim == 4 else log_sum
    elif query.device.type == "cpu":
        output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*states, scale=scale)
    else:
        width = query.shape[-1]
        states = [torch.nn.functional.pad(tensor, (0, -width % 8)) for tensor in states] if width % 8 else states
        output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention(*states, scale=scale)[:2]
        output = output[..., :width]
    return output.transpose(1, 2), log_sum.transpose(1, 2)


__all__ = [
    "ATTENTION_BACKENDS",
    "BACKENDS_WITH_BIAS",
    "BACKENDS_WITH_LOG_SUM_EXP",
    "attention_with_padding",
    "missing_package",
]
