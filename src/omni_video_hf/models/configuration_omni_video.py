"""Configurations of Omni-Video: MLLM, vision head, adapter and decoder, with a check that their widths fit."""

from dataclasses import field
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from ..hub.hub_calls import HubCallsMixin
from .configuration_vila import VilaConfig

# Wan2.1-T2V-1.3B as arguments of `WanTransformer3DModel`.
WAN_2_1_T2V_1_3B = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
}


class _MllmSpec(SubConfigSpec):
    """
    Any image-text-to-text configuration, VILA by default.

    VILA is a sibling of this file and found as such: code loaded from one repository must not depend on what another
    repository registered under the same name.
    """

    def get_config_class(self, model_type: str | None = None) -> type[PreTrainedConfig]:
        return VilaConfig if model_type == VilaConfig.model_type else super().get_config_class(model_type)


# How the latents of a source reach the decoder.
SOURCE_CONDITIONINGS = ("context", "channels", "both")


def _check_heads(owner: str, hidden_size: int, num_attention_heads: int) -> None:
    if hidden_size % num_attention_heads:
        raise ValueError(
            f"{owner}: `hidden_size` ({hidden_size}) must be a multiple of `num_attention_heads` "
            f"({num_attention_heads})."
        )


def check_source_channels(source_conditioning: str, in_channels: int, out_channels: int) -> None:
    """
    Refuse a decoder whose input channels do not fit `source_conditioning`.

    Args:
        source_conditioning: setting of the adapter.
        in_channels, out_channels: numbers of channels of the decoder.

    Raises:
        ValueError: unless the decoder takes `out_channels`, or twice as many for `"channels"` and `"both"`.
    """
    wanted = out_channels * (1 if source_conditioning == "context" else 2)
    if in_channels != wanted:
        raise ValueError(
            f"The adapter's `source_conditioning` is {source_conditioning!r}, for which the decoder must take "
            f"{wanted} input channels ({out_channels} of the noisy latents"
            f"{'' if source_conditioning == 'context' else ' and as many of the source'}), but its `in_channels` is "
            f"{in_channels}. `omni-video add-source-channels` gives a repository both."
        )


@strict
class OmniVideoVisionHeadConfig(HubCallsMixin, PreTrainedConfig):
    r"""
    Configuration of [`OmniVideoVisionHead`], which turns MLLM hidden states into continuous visual tokens.

    Args:
        mllm_hidden_size (`int`, defaults to 4096): Width of the MLLM's hidden states.
        hidden_size (`int`, defaults to 1152): Width of the visual tokens.
        intermediate_size (`int`, defaults to 4608): Width of the feed-forward layers.
        num_encoder_layers (`int`, defaults to 4): Layers of the encoder, which processes the hidden states.
        num_decoder_layers (`int`, defaults to 4): Layers that update the queries.
        num_attention_heads (`int`, defaults to 8): Heads of every attention.
        num_query_tokens (`int`, defaults to 4): Visual tokens per sample.
        null_length (`int`, defaults to 164): Length of the stored MLLM hidden states of the empty instruction.
        hidden_act (`str`, defaults to `"relu"`): Activation of the feed-forward layers.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of every LayerNorm.

    Example:
        >>> from omni_video_hf import OmniVideoVisionHeadConfig
        >>> OmniVideoVisionHeadConfig(num_query_tokens=8).num_query_tokens
        8
    """

    model_type = "omni_video_vision_head"
    base_config_key = "vision_head_config"

    mllm_hidden_size: int = 4096
    hidden_size: int = 1152
    intermediate_size: int = 4608
    num_encoder_layers: int = 4
    num_decoder_layers: int = 4
    num_attention_heads: int = 8
    num_query_tokens: int = 4
    null_length: int = 164
    hidden_act: str = "relu"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        _check_heads("vision_head_config", self.hidden_size, self.num_attention_heads)


@strict
class OmniVideoAdapterConfig(HubCallsMixin, PreTrainedConfig):
    r"""
    Configuration of [`OmniVideoAdapter`], which projects visual tokens, source latents and the prompt into the
    decoder's condition space.

    Args:
        vision_hidden_size (`int`, defaults to 1152): Width of the incoming visual tokens.
        hidden_size (`int`, defaults to 4096): Width of the context, the decoder's `text_dim`.
        intermediate_size (`int`, defaults to 16384): Width of the feed-forward layers.
        num_encoder_layers (`int`, defaults to 4): Layers of the encoder, which processes a visual token.
        num_decoder_layers (`int`, defaults to 4): Layers that update the queries.
        num_attention_heads (`int`, defaults to 8): Heads of every attention.
        num_query_tokens (`int`, defaults to 256): Context tokens per visual token.
        num_image_vision_tokens (`int`, defaults to 1): Visual tokens that condition an image; a video takes all.
        latent_channels (`int`, defaults to 16): Channels of the source latents.
        visual_context_size (`int`, defaults to 1536): Width of the source tokens before their projection.
        visual_context_patch_size (`tuple`, defaults to `(1, 4, 4)`): Frames, rows and columns of latents per token.
        use_markers (`bool`, defaults to `True`): Whether boundary embeddings enclose each part of the context.
        null_prompt_length (`int`, defaults to 1): Length of the stored text embedding of the empty prompt.
        max_context_length (`int`, defaults to 2560): Tokens the decoder attends to; shorter contexts are zero-padded.
        hidden_act (`str`, defaults to `"relu"`): Activation of the feed-forward layers.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of the LayerNorms of the query transformer.
        source_conditioning (`str`, defaults to `"context"`): How source and reference latents reach the decoder:
            `"context"`, as tokens of the context (the released model); `"channels"`, as input channels beside the
            noisy latents, which keeps the place of everything; or `"both"`. The last two need a decoder with twice
            the input channels, see [`add_source_channels`].

    Raises:
        ValueError: for an unknown `source_conditioning`, or widths that do not divide into heads.

    Example:
        >>> from omni_video_hf import OmniVideoAdapterConfig
        >>> OmniVideoAdapterConfig(num_query_tokens=64).num_query_tokens
        64
    """

    model_type = "omni_video_adapter"
    base_config_key = "adapter_config"

    vision_hidden_size: int = 1152
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_encoder_layers: int = 4
    num_decoder_layers: int = 4
    num_attention_heads: int = 8
    num_query_tokens: int = 256
    num_image_vision_tokens: int = 1
    latent_channels: int = 16
    visual_context_size: int = 1536
    visual_context_patch_size: list[int] | tuple[int, ...] = (1, 4, 4)  # stored as a list
    use_markers: bool = True
    null_prompt_length: int = 1
    max_context_length: int = 2560
    hidden_act: str = "relu"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    source_conditioning: str = "context"

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        self.visual_context_patch_size = list(self.visual_context_patch_size)
        _check_heads("adapter_config", self.hidden_size, self.num_attention_heads)
        if self.source_conditioning not in SOURCE_CONDITIONINGS:
            raise ValueError(
                f"`source_conditioning` must be one of {', '.join(map(repr, SOURCE_CONDITIONINGS))}, got "
                f"{self.source_conditioning!r}."
            )

    def adapter_kwargs(self) -> dict[str, object]:
        """
        Constructor arguments of [`OmniVideoAdapter`], which is a diffusers model and keeps them as its config.

        Example:
            >>> from omni_video_hf import OmniVideoAdapterConfig
            >>> OmniVideoAdapterConfig().adapter_kwargs()["hidden_size"]
            4096
        """
        return {name: getattr(self, name) for name in OmniVideoAdapterConfig.__annotations__}


@strict
class OmniVideoConfig(HubCallsMixin, PreTrainedConfig):
    r"""
    Configuration of [`OmniVideoForConditionalGeneration`]. The defaults are the released 11B model.

    Args:
        mllm_config (`dict` or `PreTrainedConfig`, *optional*, defaults to [`VilaConfig`]):
            Configuration of any image-text-to-text model; a `dict` without `model_type` is a [`VilaConfig`].
        vision_head_config (`dict` or [`OmniVideoVisionHeadConfig`], *optional*):
            Configuration of the vision head.
        adapter_config (`dict` or [`OmniVideoAdapterConfig`], *optional*):
            Configuration of the adapter; `None` leaves it out, as in the `mllm` component of a pipeline.
        decoder_config (`dict`, *optional*, defaults to Wan2.1-T2V-1.3B):
            Arguments of diffusers' `WanTransformer3DModel`; `None` leaves the decoder out.
        enable_mllm (`bool`, defaults to `True`):
            Whether the model has the MLLM. `False` leaves it out, for training on precomputed hidden states, whose
            width `mllm_config` still determines.
        image_generation_token_id (`int`, defaults to 128002):
            Id of `[GEN_IMG]`, the MLLM's answer that requests an image.
        video_generation_token_id (`int`, defaults to 128003):
            Id of `[GEN_VID]`, the MLLM's answer that requests a video.

    Raises:
        ValueError: if the widths of connected components differ.

    Example:
        >>> from omni_video_hf import OmniVideoConfig
        >>> OmniVideoConfig(decoder_config=None).adapter_config.hidden_size
        4096
    """

    model_type = "omni_video"
    # Predictions and metrics of the Trainer use only the logits.
    keys_to_ignore_at_inference = [  # noqa: RUF012 - read by transformers on the class
        "answer_loss",
        "alignment_loss",
        "text_alignment_loss",
        "flow_matching_loss",
        "past_key_values",
        "hidden_states",
        "attentions",
        "vision_tokens",
        "velocity",
    ]
    sub_configs_defaults: ClassVar[Any] = {
        "mllm_config": _MllmSpec(config_class=AutoConfig, model_type=VilaConfig.model_type),
        "vision_head_config": OmniVideoVisionHeadConfig,
        "adapter_config": SubConfigSpec(config_class=OmniVideoAdapterConfig, optional=True),
    }

    if TYPE_CHECKING:  # given as a dictionary or not, a part is a configuration once this one is made
        mllm_config: Any = None
        vision_head_config: Any = None
        adapter_config: Any = field(default_factory=dict)
    else:
        mllm_config: dict | PreTrainedConfig | None = None
        vision_head_config: dict | PreTrainedConfig | None = None
        adapter_config: dict | PreTrainedConfig | None = field(default_factory=dict)
    decoder_config: dict | None = field(default_factory=lambda: dict(WAN_2_1_T2V_1_3B))
    enable_mllm: bool = True
    image_generation_token_id: int = 128002
    video_generation_token_id: int = 128003
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        self._check_widths()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        As in transformers.

        Raises:
            ValueError: for the configuration of another model, such as of a VILA alone; transformers only warns and
                fills the rest with the sizes of the released model.

        Example:
            >>> from omni_video_hf import OmniVideoConfig
            >>> OmniVideoConfig.from_dict({"adapter_config": None}).adapter_config is None
            True
        """
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"The configuration is of a model of type {found!r}, not {cls.model_type!r}: load it with the class "
                "of that model, or pass a repository of Omni-Video."
            )
        return super().from_dict(config_dict, **kwargs)

    def _check_widths(self) -> None:
        def check(left: str, left_value: int, right: str, right_value: int) -> None:
            if left_value != right_value:
                raise ValueError(f"`{left}` is {left_value} but `{right}` is {right_value}: they must be equal.")

        head, adapter, decoder = self.vision_head_config, self.adapter_config, self.decoder_config
        text_width = self.mllm_config.get_text_config().hidden_size
        check("vision_head_config.mllm_hidden_size", head.mllm_hidden_size, "the MLLM's hidden_size", text_width)
        if adapter is not None:
            check(
                "adapter_config.vision_hidden_size",
                adapter.vision_hidden_size,
                "vision_head_config.hidden_size",
                head.hidden_size,
            )
            if adapter.num_image_vision_tokens > head.num_query_tokens:
                raise ValueError(
                    f"`adapter_config.num_image_vision_tokens` is {adapter.num_image_vision_tokens}, but the vision "
                    f"head gives only {head.num_query_tokens} (`vision_head_config.num_query_tokens`)."
                )
        if adapter is not None and decoder is not None:
            defaults = WAN_2_1_T2V_1_3B
            text_dim = decoder.get("text_dim", defaults["text_dim"])
            check("adapter_config.hidden_size", adapter.hidden_size, "decoder_config['text_dim']", text_dim)
            in_channels = decoder.get("in_channels", defaults["in_channels"])
            out_channels = decoder.get("out_channels", defaults["out_channels"]) or in_channels
            check_source_channels(adapter.source_conditioning, in_channels, out_channels)

    @property
    def vision_config(self) -> PreTrainedConfig:
        """Configuration of the MLLM's vision tower, an attribute that tools for vision-language models read."""
        return self.mllm_config.vision_config

    @property
    def image_token_id(self) -> int:
        """Id of the MLLM's image placeholder, an attribute that `generate` reads."""
        return self.mllm_config.image_token_id

    @property
    def video_token_id(self) -> int:
        """Id of the MLLM's video placeholder, for MLLMs that have one."""
        return self.mllm_config.video_token_id

    def get_text_config(self, *args: object, **kwargs: object) -> PreTrainedConfig:
        """Configuration of the language model in the MLLM, from which `generate` reads cache sizes."""
        return self.mllm_config.get_text_config(*args, **kwargs)


__all__ = [
    "SOURCE_CONDITIONINGS",
    "WAN_2_1_T2V_1_3B",
    "OmniVideoAdapterConfig",
    "OmniVideoConfig",
    "OmniVideoVisionHeadConfig",
    "check_source_channels",
]
