"""The steps of Omni-Video 2's pipeline that run the MLLM, the text encoder, the VAE and the adapters."""

from collections.abc import Sequence
from typing import Any

import torch

from ...models.connectors import ContextOverflow
from ...models.connectors_2 import get_mllm_states
from ...utils.turns import in_turn
from ..encoders import OmniVideoEncodersMixin, per_prompt
from ..presets import GenerationSettings
from ..request_checks import check_result
from ..shared.thought import OmniVideoThought
from .denoising import ExpertContexts
from .edit_source import EditVideo, cropped_pixels
from .prompts import FEATURE_PIXELS


class OmniVideo2EncodersMixin(OmniVideoEncodersMixin):
    """Public steps of [`OmniVideo2Pipeline`] between inputs and contexts."""

    @in_turn("processor", "mllm")
    def encode_instruction(
        self, prompt: str | list[str], videos: list[EditVideo] | None = None, mllm_source_size: str | None = None
    ) -> list[torch.Tensor]:
        """
        States of the MLLM over the user's turn, of video and instruction.

        Args:
            prompt: one instruction or a list.
            videos: loaded sources, one per prompt.
            mllm_source_size: `"as_released"`, a thumbnail of 32x32, or `"full"`. Default: setting of the pipeline.

        Returns:
            One float32 `[length, mllm width]` per prompt, without the tokens of the system prompt.

        Raises:
            ValueError: for an unknown `mllm_source_size`.
        """
        pixels = FEATURE_PIXELS[check_source_size(mllm_source_size or self.config.mllm_source_size)]
        states = []
        for number, text in enumerate(per_prompt(prompt, 1)):
            video = None if videos is None else videos[number].mllm
            inputs, dropped = self.processor.chat_inputs(self.config.prompts["features"], text, video, pixels)
            inputs = {name: tensor.to(self._execution_device) for name, tensor in inputs.items()}
            if "pixel_values_videos" in inputs:
                inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(self.mllm.dtype)
            found = get_mllm_states(self.mllm, self.adapter.config.mllm_states, inputs)
            states.append(found[0, dropped:].float())
        return states

    def encode_texts(
        self,
        prompts: list[str],
        thoughts: list[OmniVideoThought] | None,
        is_edit: bool,
        max_sequence_length: int = 512,
        context_overflow: ContextOverflow = "error",
    ) -> list[torch.Tensor]:
        """
        Text embeddings of the conditional branch: of the thought, and of the instruction behind it for an edit.

        Args:
            prompts: prompts or instructions.
            thoughts: one per prompt; `None` for the prompts alone.
            is_edit: whether there is a source.
            max_sequence_length: maximum length of each of the two texts, in tokens.
            context_overflow: what to do with a longer one, see [`encode_prompt`].

        Returns:
            One `[length, width]` per prompt.
        """
        if thoughts is None:
            return self.encode_prompt(prompts, max_sequence_length, context_overflow)
        targets = self.encode_prompt([thought.prompt for thought in thoughts], max_sequence_length, context_overflow)
        if not is_edit:
            return targets
        instructions = self.encode_prompt(prompts, max_sequence_length, context_overflow)
        return [torch.cat(pair) for pair in zip(targets, instructions, strict=True)]

    @in_turn("vae")
    def encode_videos(self, videos: list[EditVideo], settings: GenerationSettings) -> torch.Tensor:
        """Normalised latents `[batch, channels, frames, height, width]` of sources at the output's size."""
        self._require("vae")
        pixels = torch.stack([cropped_pixels(video.frames, settings.height, settings.width) for video in videos])
        pixels = pixels.to(self._execution_device, self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.mode().float()
        mean, std = self._latent_statistics(latents)
        return (latents - mean) / std

    @in_turn("adapter", "adapter_2")
    def encode_contexts(
        self,
        mllm_hidden_states: Sequence[torch.Tensor] | torch.Tensor,
        prompt_embeds: Sequence[torch.Tensor] | torch.Tensor,
        negative_mllm_hidden_states: Sequence[torch.Tensor] | torch.Tensor | None = None,
        negative_prompt_embeds: Sequence[torch.Tensor] | torch.Tensor | None = None,
        source_latents: torch.Tensor | None = None,
        with_no_source: bool = False,
        num_videos_per_prompt: int = 1,
        **arguments: Any,
    ) -> tuple[ExpertContexts, ExpertContexts | None]:
        """
        Contexts of all branches for each expert; each adapter builds them from its own weights.

        Args:
            mllm_hidden_states: of the instructions, `[batch, length, width]` or one `[length, width]` per prompt.
            prompt_embeds: result of [`encode_texts`].
            negative_mllm_hidden_states: of the unconditional branch. Default: constants, see
                [`OmniVideo2Adapter.null_states`].
            negative_prompt_embeds: text embeddings of the unconditional branch; `None` for no such branch.
            source_latents: of the source, which both branches get.
            with_no_source: whether to build the branch without source as well.
            num_videos_per_prompt: samples of each prompt.
            arguments: `context_overflow` and `max_context_length` of [`OmniVideo2Adapter.forward`].

        Returns:
            Contexts for `transformer`, and for `transformer_2` if there is one.
        """
        batch = len(prompt_embeds)

        def contexts_of(adapter: Any, name: str) -> ExpertContexts:
            def built(states: Any, texts: Any, source: torch.Tensor | None) -> torch.Tensor:
                context = check_result(adapter(states, texts, source_latents=source, **arguments), f"The {name}")
                return context.expand(batch, -1, -1).repeat_interleave(num_videos_per_prompt, dim=0)

            context = built(mllm_hidden_states, prompt_embeds, source_latents)
            if negative_prompt_embeds is None:
                return ExpertContexts(context)
            null_states = negative_mllm_hidden_states
            if null_states is None:  # with sequential offloading, the adapter itself knows no device
                null_states = adapter.null_states(self._execution_device)[None]
            nulls = null_states, negative_prompt_embeds
            no_source = built(*nulls, None) if with_no_source else None
            return ExpertContexts(context, built(*nulls, source_latents), no_source)

        first = contexts_of(self.adapter, "adapter")
        if self.transformer_2 is None:
            return first, None
        return first, first if self.adapter_2 is None else contexts_of(self.adapter_2, "adapter_2")


def check_source_size(mllm_source_size: str) -> str:
    """Refuse an unknown `mllm_source_size`."""
    if mllm_source_size not in FEATURE_PIXELS:
        raise ValueError(
            f"`mllm_source_size` must be one of {', '.join(map(repr, FEATURE_PIXELS))}, got {mllm_source_size!r}."
        )
    return mllm_source_size


__all__ = ["OmniVideo2EncodersMixin", "check_source_size"]
