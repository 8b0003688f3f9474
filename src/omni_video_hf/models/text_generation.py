"""
What transformers asks of a model that generates text, answered by the MLLM that a larger model holds.

`generate` is GenerationMixin's own and runs through `forward`, where hooks of device maps and offloading sit.
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
    """Embeddings, decoder, image features and steps of `generate`, for a model with an MLLM under `mllm`."""

    # --- the MLLM's parts under the names that transformers and trainers look for ---------------------------------

    @property
    def model(self) -> nn.Module:
        """
        The MLLM without its language-modelling head: `base_model`, whose output has a `last_hidden_state`.

        Raises:
            AttributeError: in a model without MLLM, which is then its own `base_model`.
        """
        if self.mllm is None:
            raise AttributeError("This model has no mllm (`config.enable_mllm` is False).")
        return self.mllm.base_model

    def get_decoder(self) -> nn.Module:
        """The MLLM's language model; `decoder` is the video decoder, which has no tokens."""
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
            pixel_values: as the MLLM's image processor gives them; `kwargs` are those of the MLLM's own method.

        Returns:
            `pooler_output`, one `[tokens, hidden]` an image, is what takes the place of the placeholders.
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
        """See the MLLM's method; written out, for transformers reads from the signature what `generate` takes."""
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
        # Images are encoded ahead of `forward`, and a hook that brings the weights to the device sits there.
        hook = getattr(self, "_hf_hook", None)
        if isinstance(hook, CpuOffload):
            hook.pre_forward(self)
        return self.mllm._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)

    # --- labels ---------------------------------------------------------------------------------------------------

    def _placeholder_ids(self) -> tuple[int, ...]:
        if isinstance(self.mllm, PlaceholderLabelsMixin):
            return self.mllm._placeholder_ids()
        # Another MLLM may have a row for its placeholders, and learns from them what its own class lets it learn.
        config, size = self.config.mllm_config, self.config.get_text_config().vocab_size
        ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id", "audio_token_id"))
        return tuple(token for token in ids if isinstance(token, int) and token >= size)


__all__ = ["OmniVideoTextMixin"]
