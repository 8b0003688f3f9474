"""
Time of one cross-attention to a padded context: all keys, the padding folded by a bias, and by the log-sum-exp.

Folding by the log-sum-exp runs on a backend that takes no bias, here `_native_flash`. All three run at the shapes of a
decoder's block at a quarter of the released widths, with the keys and values of the context given.
"""

from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from rich.progress import Progress

from omni_video_hf.models.attention_backends import attention_with_padding
from omni_video_hf.models.context_attention import fold_padding

from .measure import interleaved

LENGTH = 2560  # of the padded context
CASES = {"t2i 480x480": (900, 322), "t2v 832x480x17": (7800, 1088)}  # queries, tokens of the context
HEADS, WIDTH, REPETITIONS, CALLS = 3, 128, 5, 3
TITLE = "Folding the padding in cross-attention, on `_native_flash`"
COLUMNS = {
    "setting": lambda row: f"{row['setting']}, {row['device']}",
    "padded, ms": lambda row: f"{row['padded']:.1f}",
    "by a bias, ms": lambda row: f"{row['bias']:.1f}",
    "by log-sum-exp, ms": lambda row: f"{row['log_sum_exp']:.1f}",
    "log-sum-exp / bias": lambda row: f"{row['ratio']:.2f}",
    "log-sum-exp / padded": lambda row: f"{row['log_sum_exp'] / row['padded']:.2f}",
    "error": lambda row: f"{row['error']:.0e}",
}


def measure(progress: Progress) -> list[dict[str, Any]]:
    """One row per setting; milliseconds of processor time, or of the clock on a GPU."""
    return [measure_case(name, *sizes, progress) for name, sizes in CASES.items()]


@torch.no_grad()
def measure_case(name: str, queries: int, tokens: int, progress: Progress | None = None) -> dict[str, Any]:
    """Times and the relative error of the result against that with all keys."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    paths = attention_paths(queries, tokens, device, dtype)
    wanted = paths["padded"]().float()
    error = float((paths["log_sum_exp"]().float() - wanted).norm() / wanted.norm())
    repeated = {path: partial(_repeat, function) for path, function in paths.items()}
    timings = interleaved(repeated, REPETITIONS, progress)
    spent = {path: timing.median if device == "cuda" else timing.processor for path, timing in timings.items()}
    row: dict[str, Any] = {path: 1e3 * (seconds or 0) / CALLS for path, seconds in spent.items()}
    return row | {"setting": name, "device": device, "error": error, "ratio": row["log_sum_exp"] / row["bias"]}


def attention_paths(queries: int, tokens: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The three ways, as functions without arguments."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> torch.Tensor:
        return torch.randn(1, length, HEADS, WIDTH, generator=generator).to(device, dtype)

    def extended(states: torch.Tensor, padding: torch.Tensor, count: int) -> torch.Tensor:
        return torch.cat([states, padding.expand(-1, count, -1, -1)], dim=1).contiguous()

    query, key, value, pad_key, pad_value = draw(queries), draw(tokens), draw(tokens), draw(1), draw(1)
    folded_context, bias = fold_padding(torch.zeros(1, tokens, 1, device=device, dtype=dtype), LENGTH)
    folded = [
        (extended(key, pad_key, count), extended(value, pad_value, count))
        for count in (LENGTH - tokens, folded_context.shape[1] - tokens, 1)
    ]
    log_count = torch.tensor(float(LENGTH - tokens), device=device).log()
    flash, native = AttentionBackendName._NATIVE_FLASH, AttentionBackendName.NATIVE
    return {
        "padded": lambda: dispatch_attention_fn(query, *folded[0], backend=flash),
        "bias": lambda: dispatch_attention_fn(query, *folded[1], attn_mask=bias, backend=native),
        "log_sum_exp": lambda: attention_with_padding(query, *folded[2], log_count, flash),
    }


def _repeat(function: Any) -> None:
    for _ in range(CALLS):
        function()
