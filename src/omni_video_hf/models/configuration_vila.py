"""Configuration of VILA, the multimodal LLM of the released Omni-Video weights."""

from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from ..hub.hub_calls import HubCallsMixin

# Llama-3-8B with the `[PAD]` row that the authors' training adds, and SigLIP so400m/14 at 384 pixels.
_LLAMA_3_8B = {
    "vocab_size": 128257,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "pad_token_id": 128256,
    "tie_word_embeddings": False,
}
_SIGLIP_SO400M_384 = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}


@strict
class VilaConfig(HubCallsMixin, PreTrainedConfig):
    r"""
    Configuration of [`VilaForConditionalGeneration`]: SigLIP, a 2x2-merging projector and a causal language model.

    Args:
        text_config (`dict` or `PreTrainedConfig`, *optional*, defaults to Llama-3-8B):
            Configuration of the language model.
        vision_config (`dict` or `PreTrainedConfig`, *optional*, defaults to SigLIP so400m/14 at 384 pixels):
            Configuration of the published vision tower, with all its layers. Its pooling head is not used.
        vision_feature_layer (`int`, defaults to -2):
            Index of the tower's hidden state that the projector gets, as in `hidden_states` (0 is the embedding
            output). Later layers are not created.
        projector_layer_norm_eps (`float`, defaults to 1e-5):
            Epsilon of the projector's LayerNorm.
        image_token_id (`int`, defaults to 128257):
            Id of the `<image>` placeholder. It needs no row in the embedding table, because features replace it.

    Raises:
        ValueError: if `vision_feature_layer` is not the index of a hidden state of the tower.

    Example:
        >>> from omni_video_hf import VilaConfig
        >>> VilaConfig(vision_feature_layer=-2).image_seq_length
        196
    """

    model_type = "vila"
    sub_configs_defaults = {  # noqa: RUF012 - read by transformers on the class
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama", init_kwargs=_LLAMA_3_8B),
        "vision_config": SubConfigSpec(
            config_class=AutoConfig, model_type="siglip_vision_model", init_kwargs=_SIGLIP_SO400M_384
        ),
    }

    if TYPE_CHECKING:  # given as a dictionary or not, a part is a configuration once this one is made
        text_config: Any = None
        vision_config: Any = None
    else:
        text_config: dict | PreTrainedConfig | None = None
        vision_config: dict | PreTrainedConfig | None = None
    vision_feature_layer: int = -2
    projector_layer_norm_eps: float = 1e-5
    image_token_id: int = 128257
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        self.vision_config.vision_use_head = False
        if not 0 <= self.num_vision_layers <= self.vision_config.num_hidden_layers:
            raise ValueError(
                f"`vision_feature_layer` is {self.vision_feature_layer}, but a tower of "
                f"{self.vision_config.num_hidden_layers} layers has hidden states "
                f"-{self.vision_config.num_hidden_layers + 1} to {self.vision_config.num_hidden_layers}."
            )

    @property
    def num_vision_layers(self) -> int:
        """Number of layers of the tower before the selected hidden state."""
        if self.vision_feature_layer >= 0:
            return self.vision_feature_layer
        return self.vision_config.num_hidden_layers + 1 + self.vision_feature_layer

    @property
    def image_seq_length(self) -> int:
        """Number of tokens per image in the language model: a patch grid of side g becomes ceil(g / 2) squared."""
        grid = self.vision_config.image_size // self.vision_config.patch_size
        return ((grid + 1) // 2) ** 2


__all__ = ["VilaConfig"]
