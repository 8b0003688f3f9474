"""
The connector of Omni-Video 2 (arXiv 2602.08820): it projects states of a frozen MLLM and the source into the condition
space of one decoder, and joins them with the prompt. Each of two decoders (experts) has a connector of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from ..hub.hub_calls import WeightsFromHubMixin
from .configuration_omni_video import OmniVideoAdapterConfig
from .connectors import (
    ContextLayoutMixin,
    ContextOverflow,
    Embeddings,
    OmniVideoStoredEmbeddings,
    OmniVideoVisualContextAdapter,
    check_context_overflow,
    input_dtype,
    rows_without_padding,
)

MllmStates = Literal["before_final_norm", "final_norm"]
MLLM_STATES: tuple[MllmStates, ...] = ("before_final_norm", "final_norm")
# Rows of `OmniVideo2Adapter.marker_embeds`: `<img_st> <img_ed> <prp_st> <prp_ed>` as upstream.
_SOURCE_MARKERS, _PROMPT_MARKERS = 0, 2
# The MLLM's states of the unconditional branch: upstream passes two tokens of this value instead of running the MLLM.
NULL_STATE_LENGTH, NULL_STATE_VALUE = 2, 1e-6


class OmniVideo2StateNorm(nn.Module):
    """RMSNorm of the MLLM's states, computed in float32: states before the final norm have a wide range."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`[..., width]` -> the same, in the dtype of the weight."""
        normed = nn.functional.rms_norm(states.float(), (states.shape[-1],), None, self.eps)
        return normed.to(self.weight.dtype) * self.weight


class OmniVideo2Adapter(ContextLayoutMixin, WeightsFromHubMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    Builds the context of one decoder of Omni-Video 2: states of the MLLM, prompt, source, in this order.

    Args:
        mllm_hidden_size (`int`, defaults to 2048): Width of the MLLM's states.
        hidden_size (`int`, defaults to 4096): Width of the context, the decoder's `text_dim`.
        latent_channels (`int`, defaults to 16): Channels of the source latents.
        visual_context_size (`int`, defaults to 5120): Width of the source tokens before their projection.
        visual_context_patch_size (`tuple`, defaults to `(1, 4, 4)`): Frames, rows and columns of latents per token.
        use_markers (`bool`, defaults to `True`): Whether boundary embeddings enclose prompt and source.
        max_context_length (`int`, defaults to 6144): Tokens the decoder attends to; shorter contexts are zero-padded.
        norm_eps (`float`, defaults to 1e-6): Epsilon of the norm of the MLLM's states.
        mllm_states (`str`, defaults to `"before_final_norm"`): Which states of the MLLM the weights were trained on:
            those before the language model's last norm (the released model), or `"final_norm"`, those behind it.

    Raises:
        ValueError: for an unknown `mllm_states`.

    Example:
        >>> import torch
        >>> from omni_video_hf import OmniVideo2Adapter
        >>> adapter = OmniVideo2Adapter(mllm_hidden_size=8, hidden_size=16, visual_context_size=8)
        >>> adapter(torch.zeros(1, 5, 8), torch.zeros(1, 3, 16)).shape
        torch.Size([1, 10, 16])
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["OmniVideoVisualContextAdapter"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["norm", "patch_embedding"]  # noqa: RUF012
    # Sources of this model are tokens of the context and never input channels of the decoder.
    takes_source_in_context = True
    takes_source_in_channels = False
    _cut_first = "the source"

    @register_to_config
    def __init__(
        self,
        mllm_hidden_size: int = 2048,
        hidden_size: int = 4096,
        latent_channels: int = 16,
        visual_context_size: int = 5120,
        visual_context_patch_size: Sequence[int] = (1, 4, 4),
        use_markers: bool = True,
        max_context_length: int = 6144,
        norm_eps: float = 1e-6,
        mllm_states: str = "before_final_norm",
    ) -> None:
        super().__init__()
        if mllm_states not in MLLM_STATES:
            raise ValueError(f"`mllm_states` must be one of {', '.join(map(repr, MLLM_STATES))}, got {mllm_states!r}.")
        self.mllm_norm = OmniVideo2StateNorm(mllm_hidden_size, norm_eps)
        self.mllm_proj = nn.Linear(mllm_hidden_size, hidden_size)
        self.visual_context_adapter = OmniVideoVisualContextAdapter(
            OmniVideoAdapterConfig(
                hidden_size=hidden_size,
                num_attention_heads=1,
                latent_channels=latent_channels,
                visual_context_size=visual_context_size,
                visual_context_patch_size=tuple(visual_context_patch_size),
            )
        )
        self.marker_embeds = OmniVideoStoredEmbeddings(4, hidden_size) if use_markers else None

    def forward(
        self,
        mllm_hidden_states: Embeddings | None = None,
        prompt_embeds: Embeddings | None = None,
        source_latents: torch.Tensor | None = None,
        mllm_attention_mask: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        context_overflow: ContextOverflow = "error",
        max_context_length: int | None = None,
        drop_source: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> torch.Tensor | tuple[torch.Tensor]:
        """
        Build the context of every sample: states of the MLLM, prompt, source, each only where it exists.

        Args:
            mllm_hidden_states: `[batch, length, mllm_hidden_size]` or one `[length, mllm_hidden_size]` per sample, in
                the kind that `mllm_states` names; `None` stands for the unconditional branch, see [`null_states`].
            prompt_embeds: `[batch, length, hidden_size]` real text tokens, or one `[length, hidden_size]` per sample;
                `None` leaves the prompt out.
            source_latents: `[batch, channels, frames, height, width]`, normalised latents of the source of an edit.
            mllm_attention_mask, prompt_embeds_mask: `[batch, length]`, 0 at padding.
            context_overflow: `"error"` refuses a context longer than `max_context_length`; `"truncate"` cuts its end
                as upstream does, the source first.
            max_context_length: maximum context length of this call, which can be more than the configured one.
            drop_source: `[batch]`, true for samples whose context is built as if they had no source (source dropout).
            return_dict: `False` gives a tuple that holds the context, as of other models of diffusers.

        Returns:
            `[batch, longest, hidden_size]`; shorter samples end in zeros, which is how the decoder's context is padded
            anyway (see [`pad_context`]).

        Raises:
            ValueError: for an unknown `context_overflow`, or a context that does not fit.

        Example:
            >>> import torch
            >>> from omni_video_hf import OmniVideo2Adapter
            >>> adapter = OmniVideo2Adapter(mllm_hidden_size=8, hidden_size=16, visual_context_size=8)
            >>> adapter(source_latents=torch.zeros(1, 16, 1, 8, 8)).shape  # 2 states, 4 tokens between 2 markers
            torch.Size([1, 8, 16])
        """
        check_context_overflow(context_overflow)
        if mllm_hidden_states is None:
            mllm_hidden_states = self.null_states()[None]
        states = rows_without_padding(mllm_hidden_states, mllm_attention_mask, "mllm_hidden_states")
        visual = [self.adapt_states(row) for row in states]  # each [length, hidden_size]
        parts: list[Any] = [visual]
        if prompt_embeds is not None:
            prompts = rows_without_padding(prompt_embeds, prompt_embeds_mask, "prompt_embeds")
            parts.append([self._between_markers(_PROMPT_MARKERS, row[None], like=visual[0])[0] for row in prompts])
        number = len(parts)
        if source_latents is not None:
            tokens = self.visual_context_adapter(source_latents)
            parts.append(self._between_markers(_SOURCE_MARKERS, tokens, like=visual[0]))
        contexts = self._joined(parts, parts[:number], drop_source)
        context = self._fitted(contexts, context_overflow, max_context_length, source_latents)
        return context if return_dict else (context,)

    def adapt_states(self, mllm_hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Norm and projection of the MLLM's states, `[..., mllm_hidden_size]` -> `[..., hidden_size]`.

        Example:
            >>> import torch
            >>> from omni_video_hf import OmniVideo2Adapter
            >>> OmniVideo2Adapter(mllm_hidden_size=8, hidden_size=16).adapt_states(torch.zeros(5, 8)).shape
            torch.Size([5, 16])
        """
        normed = self.mllm_norm(mllm_hidden_states)
        return self.mllm_proj(normed.to(input_dtype(self.mllm_proj, normed.dtype)))

    def null_states(self, device: torch.device | None = None) -> torch.Tensor:
        """
        States of the MLLM in the unconditional branch, `[2, mllm_hidden_size]`: constants of upstream's code.

        Args:
            device: device of the result. Default: that of the weights.

        Example:
            >>> from omni_video_hf import OmniVideo2Adapter
            >>> OmniVideo2Adapter(mllm_hidden_size=8, hidden_size=16).null_states().shape
            torch.Size([2, 8])
        """
        shape = NULL_STATE_LENGTH, self.config.mllm_hidden_size
        return torch.full(shape, NULL_STATE_VALUE, device=device or self.device)


def get_mllm_states(mllm: nn.Module, kind: MllmStates, inputs: Mapping[str, Any]) -> torch.Tensor:
    """
    States of a stock MLLM over all its tokens, from one pass.

    Args:
        mllm: an image-text-to-text model of transformers whose language model ends in a module named `norm`.
        kind: `"before_final_norm"`, what goes into the last norm, or `"final_norm"`, what comes out of it. What
            `hidden_states[-1]` holds depends on the version of transformers, so it is not used.
        inputs: arguments of the model, such as `input_ids`.

    Returns:
        `[batch, length, width]`

    Raises:
        ValueError: for an unknown kind, or an MLLM without such a norm.
    """
    if kind not in MLLM_STATES:
        raise ValueError(f"`mllm_states` must be one of {', '.join(map(repr, MLLM_STATES))}, got {kind!r}.")
    norm = getattr(language_model(mllm), "norm", None)
    if not isinstance(norm, nn.Module):
        raise ValueError(f"The `mllm` is a {type(mllm).__name__}, whose language model has no last layer `norm`.")
    found: list[torch.Tensor] = []

    def keep(_: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found.append(given[0] if kind == "before_final_norm" else output)

    hook = norm.register_forward_hook(keep)
    try:
        mllm(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return found[-1]


def language_model(mllm: Any) -> Any:
    """The language model in a stock image-text-to-text model."""
    base = getattr(mllm, "model", mllm)
    return getattr(base, "language_model", base)


__all__ = ["MLLM_STATES", "OmniVideo2Adapter", "get_mllm_states"]
