"""
The connectors of Omni-Video (paper, section 3): the vision head computes continuous visual tokens from MLLM hidden
states, the adapter projects them, the source and the prompt into the decoder's condition space.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.siglip.modeling_siglip import eager_attention_forward
from transformers.utils import logging

from ..hub.hub_calls import WeightsFromHubMixin
from ..utils.modules import Host
from .configuration_omni_video import OmniVideoAdapterConfig, OmniVideoVisionHeadConfig

logger = logging.get_logger(__name__)

OutputKind = Literal["image", "video"]

ContextOverflow = Literal["error", "truncate"]
Embeddings = torch.Tensor | Sequence[torch.Tensor]

# Rows of `OmniVideoAdapter.marker_embeds`: `<img_st> <img_ed> <ipl_st> <ipl_ed> <prp_st> <prp_ed>` as upstream.
_SOURCE, _VISION, _PROMPT = 0, 2, 4

FLASH_ATTENTION_MAX_HEAD_DIM = 256


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


class OmniVideoStoredEmbeddings(nn.Module):
    """
    Embeddings that are stored with the weights and never trained.

    They are a separate module, so that device maps and offloading handle them like other modules.
    """

    weight: torch.Tensor

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(length, width))

    def forward(self) -> torch.Tensor:
        """`[length, width]`."""
        return self.weight


class OmniVideoAttention(nn.Module):
    """Multi-head attention with separate projections, through transformers' attention interface."""

    is_causal = False

    def __init__(self, config: OmniVideoVisionHeadConfig | OmniVideoAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, memory: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`hidden_states` `[batch, queries, width]` attend to `memory` `[batch, keys, width]`."""

        def heads(x: torch.Tensor) -> torch.Tensor:  # [batch, heads, length, head_dim]
            return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        output, _ = self._attention_function()(
            self,
            heads(self.q_proj(hidden_states)),
            heads(self.k_proj(memory)),
            heads(self.v_proj(memory)),
            attention_mask,
            scaling=self.head_dim**-0.5,
            dropout=0.0,
            is_causal=False,
        )
        return self.out_proj(output.flatten(2))

    def _attention_function(self) -> Any:
        name = self.config._attn_implementation
        if "flash" in name and self.head_dim > FLASH_ATTENTION_MAX_HEAD_DIM:
            # The released adapter has heads of width 512, which no flash attention kernel supports.
            logger.warning_once(
                f"Heads of {self.head_dim} are too wide for `{name}` (at most {FLASH_ATTENTION_MAX_HEAD_DIM}): "
                "this module uses `sdpa`."
            )
            return sdpa_attention_forward
        return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)


class OmniVideoMLP(nn.Module):
    """Feed-forward network of the connectors."""

    def __init__(self, config: OmniVideoVisionHeadConfig | OmniVideoAdapterConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., width]` -> `[..., width]`."""
        return self.fc2(self.act(self.fc1(hidden_states)))


class OmniVideoEncoderLayer(GradientCheckpointingLayer):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, config: OmniVideoVisionHeadConfig | OmniVideoAdapterConfig) -> None:
        super().__init__()
        self.self_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = OmniVideoAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = OmniVideoMLP(config)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`[batch, length, width]` -> the same."""
        normed = self.self_attn_norm(hidden_states)
        hidden_states = hidden_states + self.self_attn(normed, normed, attention_mask)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class OmniVideoDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm self-attention over the queries, cross-attention to the memory, and feed-forward."""

    def __init__(self, config: OmniVideoVisionHeadConfig | OmniVideoAdapterConfig) -> None:
        super().__init__()
        self.self_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = OmniVideoAttention(config)
        self.cross_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attn = OmniVideoAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = OmniVideoMLP(config)

    def forward(
        self, hidden_states: torch.Tensor, memory: torch.Tensor, memory_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Queries `[batch, queries, width]` and memory `[batch, length, width]` -> queries."""
        normed = self.self_attn_norm(hidden_states)
        hidden_states = hidden_states + self.self_attn(normed, normed)
        hidden_states = hidden_states + self.cross_attn(self.cross_attn_norm(hidden_states), memory, memory_mask)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class OmniVideoQueryTransformer(nn.Module):
    """
    Encoder-decoder without positions: the encoder processes a projected sequence, learned queries attend to it.

    Both connectors use it. The authors' code uses `torch.nn.Transformer` (pre-norm, final norms, no dropout).
    """

    def __init__(self, config: OmniVideoVisionHeadConfig | OmniVideoAdapterConfig, input_size: int) -> None:
        super().__init__()
        self.config = config
        if config._attn_implementation is None:  # built alone, so no model has chosen one
            config._attn_implementation = "sdpa"
        self.input_proj_1 = nn.Linear(input_size, config.hidden_size)
        self.input_proj_2 = nn.Linear(config.hidden_size, config.hidden_size)
        self.encoder_layers = nn.ModuleList(OmniVideoEncoderLayer(config) for _ in range(config.num_encoder_layers))
        self.encoder_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.query_tokens = nn.Parameter(
            torch.randn(1, config.num_query_tokens, config.hidden_size) * config.initializer_range
        )
        self.decoder_layers = nn.ModuleList(OmniVideoDecoderLayer(config) for _ in range(config.num_decoder_layers))
        self.decoder_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, inputs: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`inputs` `[batch, length, input width]`, mask `[batch, length]` -> `[batch, queries, width]`."""
        memory = self.input_proj_2(nn.functional.gelu(self.input_proj_1(inputs)))
        queries = self.query_tokens.to(memory.device, memory.dtype).expand(memory.shape[0], -1, -1)
        memory_mask = None
        if attention_mask is not None:
            memory_mask = create_bidirectional_mask(self.config, queries, attention_mask, encoder_hidden_states=memory)
            attention_mask = create_bidirectional_mask(self.config, memory, attention_mask)

        for layer in self.encoder_layers:
            memory = layer(memory, attention_mask)
        memory = self.encoder_norm(memory)
        for layer in self.decoder_layers:
            queries = layer(queries, memory, memory_mask)
        return self.decoder_norm(queries)


class OmniVideoVisionHead(nn.Module):
    """
    Computes a few visual tokens from all last-layer hidden states of the MLLM, of prompt and answer.

    Example:
        >>> from omni_video_hf import OmniVideoVisionHead, OmniVideoVisionHeadConfig
        >>> config = OmniVideoVisionHeadConfig(mllm_hidden_size=32, hidden_size=16, null_length=3)
        >>> config._attn_implementation = "sdpa"
        >>> OmniVideoVisionHead(config).null_hidden_states().shape
        torch.Size([3, 32])
    """

    def __init__(self, config: OmniVideoVisionHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.query_transformer = OmniVideoQueryTransformer(config, config.mllm_hidden_size)
        # MLLM states of the empty instruction, stored with the weights, for the unconditional branch of guidance.
        self.null_hidden_states = OmniVideoStoredEmbeddings(config.null_length, config.mllm_hidden_size)

    def forward(
        self, mllm_hidden_states: Embeddings | None = None, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Compute visual tokens.

        Args:
            mllm_hidden_states: `[batch, length, mllm width]` or one `[length, mllm width]` per sample. `None` stands
                for the stored states of the empty instruction, as a batch of one.
            attention_mask: `[batch, length]`, 0 at padding.

        Returns:
            `[batch, num_query_tokens, hidden_size]`

        Example:
            >>> import torch
            >>> from omni_video_hf import OmniVideoVisionHead, OmniVideoVisionHeadConfig
            >>> config = OmniVideoVisionHeadConfig(mllm_hidden_size=32, hidden_size=16, intermediate_size=16)
            >>> config._attn_implementation = "sdpa"
            >>> OmniVideoVisionHead(config)(torch.zeros(1, 7, 32)).shape
            torch.Size([1, 4, 16])
        """
        if mllm_hidden_states is None:
            mllm_hidden_states = self.null_hidden_states()[None]
        hidden_states, attention_mask = pad_embeddings(mllm_hidden_states, attention_mask, "mllm_hidden_states")
        dtype = input_dtype(self.query_transformer.input_proj_1, hidden_states.dtype)
        return self.query_transformer(hidden_states.to(dtype), attention_mask)


class OmniVideoVisualContextAdapter(nn.Module):
    """Computes context tokens from VAE latents of the source."""

    def __init__(self, config: OmniVideoAdapterConfig) -> None:
        super().__init__()
        frames, rows, columns = config.visual_context_patch_size
        self.patch_size = frames, rows, columns
        width = config.visual_context_size
        self.patch_embedding = nn.Conv3d(
            config.latent_channels, width, kernel_size=self.patch_size, stride=self.patch_size
        )
        self.patch_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.proj = nn.Linear(width, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-6, elementwise_affine=False)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """
        `latents` `[batch, channels, frames, height, width]` -> `[batch, tokens, hidden_size]`, frame by frame, row by
        row.

        Raises:
            ValueError: if the latents do not divide into patches; the authors' code would drop the rest silently.
        """
        if latents.ndim != 5 or any(
            size % patch for size, patch in zip(latents.shape[2:], self.patch_size, strict=True)
        ):
            raise ValueError(
                f"Source latents must be [batch, channels, frames, height, width] with the last three divisible by "
                f"{self.patch_size}, got {tuple(latents.shape)}."
            )
        latents = latents.to(input_dtype(self.patch_embedding, latents.dtype))
        tokens = self.patch_embedding(latents).flatten(2).transpose(1, 2)
        return self.norm(self.proj(self.patch_norm(tokens)))


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


class OmniVideoAdapter(ContextLayoutMixin, WeightsFromHubMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    Builds the decoder's context: source, reference, visual tokens and prompt, between boundary embeddings.

    Arguments are the fields of [`OmniVideoAdapterConfig`].

    Example:
        >>> import torch
        >>> from omni_video_hf import OmniVideoAdapter
        >>> from omni_video_hf.shapes import CHECKPOINT
        >>> adapter = OmniVideoAdapter.from_pretrained(CHECKPOINT, subfolder="adapter")
        >>> adapter.config.hidden_size
        128
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["OmniVideoEncoderLayer", "OmniVideoDecoderLayer", "OmniVideoVisualContextAdapter"]  # noqa: RUF012
    _repeated_blocks = ["OmniVideoEncoderLayer", "OmniVideoDecoderLayer"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["norm", "patch_embedding", "query_tokens"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        vision_hidden_size: int = 1152,
        hidden_size: int = 4096,
        intermediate_size: int = 16384,
        num_encoder_layers: int = 4,
        num_decoder_layers: int = 4,
        num_attention_heads: int = 8,
        num_query_tokens: int = 256,
        num_image_vision_tokens: int = 1,
        latent_channels: int = 16,
        visual_context_size: int = 1536,
        visual_context_patch_size: Sequence[int] = (1, 4, 4),
        use_markers: bool = True,
        null_prompt_length: int = 1,
        max_context_length: int = 2560,
        hidden_act: str = "relu",
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        source_conditioning: str = "context",
    ) -> None:
        super().__init__()
        config = OmniVideoAdapterConfig(**{key: value for key, value in self.config.items() if key[0] != "_"})
        self.attention_config = config
        self.query_transformer = OmniVideoQueryTransformer(config, vision_hidden_size)
        self.visual_context_adapter = OmniVideoVisualContextAdapter(config)
        self.marker_embeds = OmniVideoStoredEmbeddings(6, hidden_size) if use_markers else None
        # Text embedding of the empty prompt, stored with the weights, for the unconditional branch of guidance.
        self.null_prompt_embeds = OmniVideoStoredEmbeddings(null_prompt_length, hidden_size)

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Choose one of transformers' attention implementations, e.g. `"sdpa"`, `"eager"`, `"flash_attention_2"`."""
        self.attention_config._attn_implementation = attn_implementation

    @property
    def takes_source_in_context(self) -> bool:
        """Whether source and reference latents become tokens of the context."""
        return self.config.source_conditioning != "channels"

    @property
    def takes_source_in_channels(self) -> bool:
        """Whether the decoder takes source and reference latents beside the noisy latents."""
        return self.config.source_conditioning != "context"

    def forward(
        self,
        vision_tokens: torch.Tensor | None = None,
        prompt_embeds: Embeddings | None = None,
        source_latents: torch.Tensor | None = None,
        reference_latents: torch.Tensor | None = None,
        output_kind: OutputKind = "video",
        prompt_embeds_mask: torch.Tensor | None = None,
        context_overflow: ContextOverflow = "error",
        max_context_length: int | None = None,
        vision_embeds: torch.Tensor | None = None,
        drop_source: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> torch.Tensor | tuple[torch.Tensor]:
        """
        Build the context of every sample: source, reference, visual tokens, prompt, each only where it exists.

        Args:
            vision_tokens: `[batch, num_query_tokens, vision_hidden_size]` from the vision head; a batch of one serves
                all samples.
            prompt_embeds: `[batch, length, hidden_size]` real text tokens, or one `[length, hidden_size]` per sample;
                `None` stands for the stored embedding of the empty prompt.
            source_latents: `[batch, channels, frames, height, width]`, normalised latents of the source of an edit.
                With `source_conditioning="channels"` they take no tokens.
            reference_latents: `[batch, channels, 1, height, width]`, normalised latents of a reference image.
            output_kind: kind of the output; an image is conditioned by the first visual token(s) only.
            prompt_embeds_mask: `[batch, length]`, 0 at padding.
            context_overflow: `"error"` refuses a context longer than `max_context_length`; `"truncate"` cuts its end
                as upstream does, text first.
            max_context_length: maximum context length of this call, which can be more than the configured one.
            vision_embeds: precomputed output of [`adapt_vision_tokens`], instead of `vision_tokens`.
            drop_source: `[batch]`, true for samples whose context is built as if they had no source (source dropout).
            return_dict: `False` gives a tuple that holds the context, as of other models of diffusers.

        Returns:
            `[batch, longest, hidden_size]`; shorter samples end in zeros, which is how the decoder's context is padded
            anyway (see [`pad_context`]).

        Raises:
            ValueError: for an unknown `output_kind` or `context_overflow`, a context that does not fit, or both or
                neither of `vision_tokens` and `vision_embeds`.

        Example:
            >>> import torch
            >>> from omni_video_hf import OmniVideoAdapter
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> adapter = OmniVideoAdapter.from_pretrained(CHECKPOINT, subfolder="adapter")
            >>> tokens = torch.zeros(1, 1, adapter.config.vision_hidden_size)
            >>> context = adapter(tokens, torch.zeros(1, 5, 128), output_kind="image")
            >>> context.shape[-1]
            128
        """
        if (vision_tokens is None) == (vision_embeds is None):
            raise ValueError("Pass exactly one of the two: `vision_tokens` or `vision_embeds`.")
        if output_kind not in ("image", "video"):
            raise ValueError(f"`output_kind` must be 'image' or 'video', got {output_kind!r}.")
        check_context_overflow(context_overflow)
        if prompt_embeds is None:
            prompt_embeds = self.null_prompt_embeds()[None]
        prompts = rows_without_padding(prompt_embeds, prompt_embeds_mask, "prompt_embeds")

        if vision_tokens is not None:
            visual = self.adapt_vision_tokens(vision_tokens, output_kind)  # [batch, 256 or 1024, hidden_size]
        else:
            visual = cast("torch.Tensor", vision_embeds).to(self.dtype)
        sources: list[Any] = [
            self._between_markers(_SOURCE, self.visual_context_adapter(latents), like=visual)
            for latents in (source_latents, reference_latents)
            if latents is not None and self.takes_source_in_context
        ]
        parts = list(sources)
        parts.append(self._between_markers(_VISION, visual, like=visual))
        parts.append([self._between_markers(_PROMPT, prompt[None], like=visual)[0] for prompt in prompts])
        in_context = source_latents if self.takes_source_in_context else None
        contexts = self._joined(parts, parts[len(sources) :], drop_source)
        context = self._fitted(contexts, context_overflow, max_context_length, in_context)
        return context if return_dict else (context,)

    def adapt_vision_tokens(self, vision_tokens: torch.Tensor, output_kind: OutputKind = "video") -> torch.Tensor:
        """
        Project visual tokens into the condition space; the query transformer processes each token separately.

        `[batch, tokens, vision_hidden_size]` -> `[batch, tokens * num_query_tokens, hidden_size]`, token-major; for an
        image only the first `num_image_vision_tokens` tokens.

        Example:
            >>> import torch
            >>> from omni_video_hf import OmniVideoAdapter
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> adapter = OmniVideoAdapter.from_pretrained(CHECKPOINT, subfolder="adapter")
            >>> adapter.adapt_vision_tokens(torch.zeros(1, 2, adapter.config.vision_hidden_size)).shape
            torch.Size([1, 32, 128])
        """
        if output_kind == "image":
            vision_tokens = vision_tokens[:, : self.config.num_image_vision_tokens]
        dtype = input_dtype(self.query_transformer.input_proj_1, vision_tokens.dtype)
        batch, count = vision_tokens.shape[:2]
        adapted = self.query_transformer(vision_tokens.to(dtype).flatten(0, 1)[:, None])
        return adapted.unflatten(0, (batch, count)).flatten(1, 2)


__all__ = ["OmniVideoAdapter", "OmniVideoVisionHead"]
