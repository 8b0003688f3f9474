"""How connectors of both versions put a decoder's context together: boundary embeddings, joining, length."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..utils.modules import Host

ContextOverflow = Literal["error", "truncate"]
Embeddings = torch.Tensor | Sequence[torch.Tensor]


def pad_embeddings(
    embeddings: Embeddings, mask: torch.Tensor | None, argument: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Bring embeddings of unequal length into one batch.

    Args:
        embeddings: `[batch, length, width]`, or one `[length, width]` or `[1, length, width]` per sample.
        mask: `[batch, length]`, 1 at real positions; only with a tensor.
        argument: name of the argument for messages.

    Returns:
        `[batch, longest, width]` zero-padded at the end, and its mask, `None` where every position is real.
    """
    if isinstance(embeddings, torch.Tensor):
        if embeddings.ndim != 3:
            raise ValueError(f"`{argument}` must be [batch, length, width], got {tuple(embeddings.shape)}.")
        if mask is None:
            return embeddings, None
        if mask.shape != embeddings.shape[:2]:
            raise ValueError(
                f"The mask of `{argument}` must be {tuple(embeddings.shape[:2])}, got {tuple(mask.shape)}."
            )
        mask = mask.to(embeddings.device)
        return embeddings, None if bool(mask.all()) else mask
    if mask is not None:
        raise ValueError(f"`{argument}` is a list, so its lengths are known: leave its mask out.")
    rows = [row.squeeze(0) if row.ndim == 3 else row for row in embeddings]
    lengths = torch.tensor([row.shape[0] for row in rows])
    padded = pad_sequence(rows, batch_first=True)
    if bool((lengths == lengths[0]).all()):
        return padded, None
    return padded, (torch.arange(padded.shape[1]) < lengths[:, None]).long().to(padded.device)


def rows_without_padding(embeddings: Embeddings, mask: torch.Tensor | None, argument: str) -> list[torch.Tensor]:
    """One `[length, width]` per sample, without its padding; arguments as of [`pad_embeddings`]."""
    padded, mask = pad_embeddings(embeddings, mask, argument)
    return list(padded) if mask is None else [row[keep.bool()] for row, keep in zip(padded, mask, strict=True)]


def input_dtype(layer: nn.Module, given: torch.dtype) -> torch.dtype:
    """
    The dtype in which a layer needs its input.

    It is the dtype of its weights, or with layerwise casting its compute dtype. With quantised weights (integers, or
    floats of one byte) it is `given`, the dtype of the input.
    """
    dtype = get_parameter_dtype(layer)
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else given


def check_context_overflow(context_overflow: str) -> None:
    """Refuse an unknown `context_overflow`."""
    if context_overflow not in ("error", "truncate"):
        raise ValueError(f"`context_overflow` must be 'error' or 'truncate', got {context_overflow!r}.")


class ContextLayoutMixin(Host):
    """
    Methods of a connector that put the parts of a context together.

    The connector has `config.max_context_length`, `marker_embeds` (or `None`) and `visual_context_adapter`.
    """

    # What the end of a context holds, which `context_overflow="truncate"` cuts first.
    _cut_first = "the text"

    def pad_context(self, context: torch.Tensor) -> torch.Tensor:
        """
        Zero-pad `[batch, length, hidden_size]` to `max_context_length`, as the decoder was trained: the zeros pass its
        text projection and are attended to without a mask. A longer context stays as it is.

        Example:
            >>> import torch
            >>> from omni_video_hf import OmniVideoAdapter
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> adapter = OmniVideoAdapter.from_pretrained(CHECKPOINT, subfolder="adapter")
            >>> adapter.pad_context(torch.zeros(1, 20, 128)).shape
            torch.Size([1, 192, 128])
        """
        return nn.functional.pad(context, (0, 0, 0, max(0, self.config.max_context_length - context.shape[1])))

    def _between_markers(self, marker: int, tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Enclose `tokens` `[batch, length, hidden_size]` in boundary embeddings, if the adapter has them."""
        tokens = tokens.to(like)
        if self.marker_embeds is None:
            return tokens
        edges = self.marker_embeds()[marker : marker + 2].to(like)
        start, end = edges[:, None, None].expand(-1, len(tokens), -1, -1)
        return torch.cat([start, tokens, end], dim=1)

    def _joined(
        self, parts: Sequence[Any], without_source: Sequence[Any], drop_source: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """
        The context of every sample, `[length, hidden_size]` each.

        Args:
            parts: parts of the context in their order, each with one entry per sample, or one for all samples.
            without_source: the parts of a sample whose source is dropped.
            drop_source: `[batch]`, true for those samples.
        """
        batch = max(len(part) for part in parts)
        dropped = [False] * batch if drop_source is None else drop_source.tolist()
        if any(len(part) not in (1, batch) for part in parts):
            raise ValueError(
                f"Parts of the context must have one batch size or 1, got {[len(part) for part in parts]}."
            )
        return [
            torch.cat([part[index % len(part)] for part in (without_source if dropped[index] else parts)])
            for index in range(batch)
        ]

    def _fitted(
        self,
        contexts: list[torch.Tensor],
        context_overflow: ContextOverflow,
        max_context_length: int | None,
        source_latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """One batch of contexts that are not longer than the limit; shorter ones end in zeros."""
        limit = max_context_length or self.config.max_context_length
        longest = max(len(context) for context in contexts)
        if longest > limit:
            if context_overflow == "error":
                self._refuse_overflow(longest, limit, source_latents)
            contexts = [context[:limit] for context in contexts]
        return pad_sequence(contexts, batch_first=True)

    def _refuse_overflow(self, length: int, limit: int, source_latents: torch.Tensor | None) -> None:
        message = f"The context has {length} tokens, but the decoder takes {limit} (`max_context_length`). "
        if source_latents is None:
            message += "Shorten the prompt or pass a smaller reference image."
        else:
            frames, height, width = source_latents.shape[2:]
            patch = self.visual_context_adapter.patch_size
            source = (frames // patch[0]) * (height // patch[1]) * (width // patch[2])
            room = max(0, limit - (length - source))
            shrink = (room / source) ** 0.5
            message += (
                f"The source takes {source} of them and {room} are free for it: at most "
                f"{room * patch[0] // ((height // patch[1]) * (width // patch[2]))} latent frames of this size, or "
                f"{int(height * shrink) // patch[1] * patch[1]}x{int(width * shrink) // patch[2] * patch[2]} latents "
                f"(height x width) at {frames} frames. Pass a shorter or smaller source, or raise "
                "`max_context_length` to encode it whole."
            )
        raise ValueError(
            message + " `context_overflow='truncate'` cuts the end as upstream does, " + self._cut_first + " first."
        )


__all__ = [
    "ContextLayoutMixin",
    "ContextOverflow",
    "Embeddings",
    "check_context_overflow",
    "input_dtype",
    "pad_embeddings",
    "rows_without_padding",
]
