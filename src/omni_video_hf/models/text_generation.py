"""
Text generation of the whole model: methods that transformers needs for `generate`, delegated to the MLLM.

`generate` is that of `GenerationMixin`. It calls `forward`, so that hooks of device maps and offloading run.
"""

from typing import Any

import torch
from accelerate.hooks import CpuOffload
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .modeling_vila import PlaceholderLabelsMixin


class OmniVideoTextMixin(PlaceholderLabelsMixin):
    """Embeddings, decoder, image features and steps of `generate`, for a model with an MLLM as attribute `mllm`."""

    # --- modules of the MLLM under the names that transformers and trainers use -----------------------------------

    @property
    def model(self) -> nn.Module:
        """
        The MLLM without its language modelling head: the `base_model`, whose output has a `last_hidden_state`.

        Raises:
            AttributeError: in a model without MLLM, which is its own `base_model`.
        """
        if self.mllm is None:
            raise AttributeError("This model has no MLLM (`config.enable_mllm` is False).")
        return self.mllm.base_model

    def get_decoder(self) -> nn.Module:
        """The language model of the MLLM (the attribute `decoder` is the video decoder)."""
        self._require("mllm")
        return self.mllm.get_decoder()

    def set_decoder(self, decoder: nn.Module) -> None:
        """Replace the MLLM's language model."""
        self._require("mllm")
        self.mllm.set_decoder(decoder)

    def get_input_embeddings(self) -> nn.Module | None:
        """The MLLM's token embedding; `None` in a model without MLLM."""
        return None if self.mllm is None else self.mllm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the MLLM's token embedding."""
        self.mllm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The MLLM's language-modelling head; `None` in a model without MLLM."""
        return None if self.mllm is None else self.mllm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the MLLM's language-modelling head."""
        self.mllm.set_output_embeddings(value)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """
        Encode images with the MLLM's vision tower and projector.

        Args:
            pixel_values: output of the MLLM's image processor.
            kwargs: other arguments of the MLLM's `get_image_features`.

        Returns:
            The output of the MLLM's method; `pooler_output`, one `[tokens, hidden]` per image, replaces placeholders.
        """
        self._require("mllm")
        return self.mllm.get_image_features(pixel_values, **kwargs, return_dict=True)

    # --- generate -------------------------------------------------------------------------------------------------

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """See the method of the MLLM. Arguments are listed because transformers inspects this signature."""
        return self.mllm.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.mllm._prepare_position_ids_for_generation(*args, **kwargs)

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> tuple:
        return self.mllm._expand_inputs_for_generation(*args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        self._require("mllm")
        self.mllm._validate_model_kwargs(model_kwargs)

    def _supports_mm_encoder_outputs(self) -> bool:
        return self.mllm._supports_mm_encoder_outputs()

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        # Images are encoded before `forward`, whose hook would move the weights to the device.
        hook = getattr(self, "_hf_hook", None)
        if isinstance(hook, CpuOffload):
            hook.pre_forward(self)
        return self.mllm._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)

    # --- labels ---------------------------------------------------------------------------------------------------

    def _placeholder_ids(self) -> tuple[int, ...]:
        if isinstance(self.mllm, PlaceholderLabelsMixin):
            return self.mllm._placeholder_ids()
        # Another MLLM may have embeddings for its placeholders; its own class handles their labels.
        config, size = self.config.mllm_config, self.config.get_text_config().vocab_size
        ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id", "audio_token_id"))
        return tuple(token for token in ids if isinstance(token, int) and token >= size)


__all__ = ["OmniVideoTextMixin"]
