"""VILA, the MLLM of the released Omni-Video weights, built from SigLIP and a causal language model of transformers."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.import_utils import is_tracing, torch_compilable_check

from ..hub.hub_calls import WeightsFromHubMixin
from ..utils.modules import Host
from .configuration_vila import VilaConfig


@dataclass
class VilaModelOutputWithPast(BaseModelOutputWithPast):
    """Output of [`VilaModel`]; `image_hidden_states` `[images, tokens, hidden]` are the projected image features."""

    image_hidden_states: torch.Tensor | None = None


@dataclass
class VilaCausalLMOutputWithPast(ModelOutput):
    """Output of [`VilaForConditionalGeneration`], in the fields of every transformers vision-language model."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None


IGNORED_LABEL = -100


class PlaceholderLabelsMixin(Host):
    """
    Replaces image placeholders in `labels` by -100.

    Most trainers use `labels = input_ids.clone()`. A placeholder is never an answer, and its id may be outside the
    vocabulary, where the cross-entropy fails with an index error, or on CUDA with a device assert.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run `forward` with such labels; trainers that replace `forward` by their own loss get them too."""
        for name in ("labels", "shift_labels"):
            if kwargs.get(name) is not None:
                kwargs[name] = self.without_placeholders(kwargs[name])
        return super().__call__(*args, **kwargs)

    def without_placeholders(self, labels: torch.Tensor) -> torch.Tensor:
        """
        Replace placeholders in `labels` `[batch, length]` by -100.

        Raises:
            ValueError: for any other id outside the vocabulary. Labels on a GPU are not checked, because every step
                would wait for the device.
        """
        for token in self._placeholder_ids():
            labels = labels.masked_fill(labels == token, IGNORED_LABEL)
        if labels.device.type == "cpu" and not is_tracing(labels):
            size = self.config.get_text_config().vocab_size
            outside = labels[((labels < 0) & (labels != IGNORED_LABEL)) | (labels >= size)]
            if len(outside):
                raise ValueError(
                    f"`labels` contain {outside[0].item()}, but the vocabulary has the ids 0 to {size - 1}: use "
                    f"{IGNORED_LABEL} for positions without a loss."
                )
        return labels

    def _placeholder_ids(self) -> tuple[int, ...]:
        return (self.config.image_token_id,)


def merge_patches(features: torch.Tensor) -> torch.Tensor:
    """
    Merge blocks of 2x2 patch features into one token each, in the order of the authors' code.

    Tokens are ordered column by column (the column block is the slow index). A token consists of its upper left, upper
    right, lower left and lower right patch. A grid of odd side is first padded with a row and a column of zeros.

    Args:
        features: `[images, side * side, channels]`, patches row by row.

    Returns:
        `[images, ceil(side / 2) ** 2, 4 * channels]`
    """
    num_images, num_patches, channels = features.shape
    side = round(num_patches**0.5)
    if side * side != num_patches:
        raise ValueError(f"`features` has {num_patches} patches; the 2x2 merge needs a square number of patches.")
    grid = features.reshape(num_images, side, side, channels)
    grid = nn.functional.pad(grid, (0, 0, 0, side % 2, 0, side % 2))
    blocks = (side + 1) // 2
    grid = grid.reshape(num_images, blocks, 2, blocks, 2, channels)
    # [images, row block, row, column block, column, channels] -> column block outermost
    return grid.permute(0, 3, 1, 2, 4, 5).reshape(num_images, blocks * blocks, 4 * channels)


class VilaMultiModalProjector(nn.Module):
    """2x2 merge, LayerNorm, and two linear layers with an exact GELU between them (`mlp_downsample` of VILA)."""

    def __init__(self, config: VilaConfig) -> None:
        super().__init__()
        merged = 4 * config.vision_config.hidden_size
        hidden_size = config.text_config.hidden_size
        self.norm = nn.LayerNorm(merged, eps=config.projector_layer_norm_eps)
        self.linear_1 = nn.Linear(merged, hidden_size)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """`[images, patches, vision hidden]` -> `[images, tokens, text hidden]`."""
        hidden_states = self.norm(merge_patches(image_features))
        return self.linear_2(self.act(self.linear_1(hidden_states)))


class VilaPreTrainedModel(WeightsFromHubMixin, PreTrainedModel):
    """Base class of the VILA models: weight initialisation and capabilities."""

    config: VilaConfig
    config_class = VilaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ("past_key_values",)
    _no_split_modules = ("VilaMultiModalProjector",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class VilaModel(VilaPreTrainedModel):
    """Vision tower, projector and language model, without the language-modelling head."""

    def __init__(self, config: VilaConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        # The tower ends at the selected hidden state: later layers would not be used.
        self.vision_tower.encoder.layers = self.vision_tower.encoder.layers[: config.num_vision_layers]
        self.multi_modal_projector = VilaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding of the language model."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding of the language model."""
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """
        Encode images.

        Args:
            pixel_values: `[images, 3, size, size]`, normalised by the image processor.

        Returns:
            `last_hidden_state` `[images, patches, vision hidden]`, the selected hidden state of the tower;
            `pooler_output` `[images, tokens, text hidden]`, its projection; and on request `attentions` and
            `hidden_states`, of which the last one is `last_hidden_state`.
        """
        wants_states = kwargs.pop("output_hidden_states", None)
        if wants_states is None:
            wants_states = self.config.vision_config.output_hidden_states
        outputs = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True, **kwargs)
        selected = outputs.hidden_states[-1]  # before post_layernorm
        return BaseModelOutputWithPooling(
            last_hidden_state=selected,
            pooler_output=self.multi_modal_projector(selected),
            hidden_states=outputs.hidden_states if wants_states else None,
            attentions=outputs.attentions,
        )

    def get_placeholder_mask(self, input_ids: torch.Tensor, image_features: torch.Tensor) -> torch.Tensor:
        """
        Positions of the image features in the text.

        Returns:
            `[batch, length]` bool, true at `config.image_token_id`.

        Raises:
            ValueError: if the numbers of placeholders and features differ; the message contains both.
        """
        mask = input_ids == self.config.image_token_id
        num_images, length = image_features.shape[:2]
        torch_compilable_check(
            mask.sum() == num_images * length,
            lambda: (
                f"Image features and image tokens do not match: `input_ids` contain {int(mask.sum())} tokens of id "
                f"{self.config.image_token_id}, but `pixel_values` ({num_images} images of {length} tokens) give "
                f"{num_images * length} features. Use the processor for both."
            ),
        )
        return mask

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VilaModelOutputWithPast:
        """
        Run the language model over text and images.

        Args:
            input_ids: `[batch, length]`, in which every image has `config.image_seq_length` placeholders.
            pixel_values: `[images, 3, size, size]`, the images of the whole batch in order.
            attention_mask: `[batch, length]`, 0 at positions to ignore.
            position_ids: `[batch, length]`. Default: 0 to length - 1. With images, masked positions are not counted,
                because the authors' code removes them before it inserts images.
            past_key_values: cache of earlier positions.
            inputs_embeds: `[batch, length, hidden]` instead of `input_ids`, without images.
            mm_encoder_outputs: `{"image": output of get_image_features}` instead of `pixel_values`.

        Raises:
            ValueError: without exactly one of `input_ids` and `inputs_embeds`, with both `pixel_values` and
                `mm_encoder_outputs`, or if the numbers of images and placeholders differ.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        encoded = (mm_encoder_outputs or {}).get("image")
        if encoded is not None and pixel_values is not None:
            raise ValueError("Pass `pixel_values` or `mm_encoder_outputs`, not both.")
        if input_ids is None and not (encoded is None and pixel_values is None):
            raise ValueError(
                "`pixel_values` need `input_ids`, which contain the positions of the images. To use `inputs_embeds`, "
                "insert the features (`get_image_features(pixel_values).pooler_output`) yourself and pass no images."
            )

        if input_ids is not None:
            # The placeholder has no row in the embedding table.
            is_image = torch.eq(input_ids, self.config.image_token_id)
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))

        image_features = None
        if pixel_values is not None:
            encoded = self.get_image_features(pixel_values, return_dict=True)
        if encoded is not None and input_ids is not None and inputs_embeds is not None:
            image_features = encoded.pooler_output.to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, image_features)[..., None].to(inputs_embeds.device)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)
            if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
                position_ids = cast("torch.LongTensor", (attention_mask.long().cumsum(-1) - 1).clamp(min=0))
        elif input_ids is not None and input_ids.shape[1] > 1 and _is_prefill(past_key_values):
            torch_compilable_check(
                ~is_image.any(),
                lambda: (
                    f"`input_ids` contain {int(is_image.sum())} image tokens, but there are no `pixel_values` "
                    "(0 features): pass the images, or a text without placeholders."
                ),
            )

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return VilaModelOutputWithPast(**outputs, image_hidden_states=image_features)


def _is_prefill(past_key_values: Cache | None) -> bool:
    """Whether these are the first positions; `generate` encodes images only for them."""
    return past_key_values is None or int(past_key_values.get_seq_length()) == 0


class VilaForConditionalGeneration(PlaceholderLabelsMixin, VilaPreTrainedModel, GenerationMixin):
    """VILA with its language-modelling head: answers about images, and hidden states for the vision head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: VilaConfig) -> None:
        super().__init__(config)
        self.model = VilaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding of the language model."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding of the language model."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language modelling head."""
        return self.lm_head

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """See [`VilaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VilaCausalLMOutputWithPast:
        """
        Compute next-token logits, and the cross-entropy if `labels` are passed.

        Args:
            labels: `[batch, length]`, -100 at positions without a loss; image placeholders count as -100.
            logits_to_keep: number of positions at the end for which logits are computed, 0 for all; or the positions.

        The other arguments are those of [`VilaModel.forward`].
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            answers, vocab_size = self.without_placeholders(labels), self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=answers, vocab_size=vocab_size, **kwargs)
        return VilaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


__all__ = ["PlaceholderLabelsMixin", "VilaForConditionalGeneration", "VilaModel", "VilaPreTrainedModel"]
