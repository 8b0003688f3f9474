"""The steps of the pipeline that run encoders and the VAE: prompt, instruction, source, pixels."""

from typing import Any, Literal

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils import is_ftfy_available
from PIL import Image

from ..media.sources import Source
from ..models.connectors import ContextOverflow
from ..utils.modules import Host
from ..utils.turns import in_turn
from .presets import (
    GenerationSettings,
)
from .request_checks import check_result, check_tensors


class OmniVideoEncodersMixin(Host):
    """Public steps of [`OmniVideoPipeline`] between inputs and latents."""

    @in_turn("text_encoder", "tokenizer")
    def encode_prompt(
        self, prompt: str | list[str], max_sequence_length: int = 512, context_overflow: ContextOverflow = "error"
    ) -> list[torch.Tensor]:
        """
        Encode prompts with the text encoder, after cleaning them as the authors' code does; without padding tokens.

        Returns:
            One `[length, width]` per prompt.

        Raises:
            ValueError: for a prompt longer than `max_sequence_length` tokens, unless `context_overflow="truncate"`.

        Example:
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> embeds = pipe.encode_prompt(["a red circle", "a blue square"])
            >>> len(embeds), embeds[0].shape[-1]
            (2, 128)
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("This pipeline was loaded without text encoder: pass `prompt_embeds`.")
        if not is_ftfy_available():
            raise ImportError(
                "The package ftfy is missing, which cleans prompts as in the training: run `pip install ftfy`."
            )
        prompts = [prompt_clean(text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
        tokens = self.tokenizer(prompts, padding=True, return_attention_mask=True, return_tensors="pt")
        lengths = tokens.attention_mask.sum(dim=1)
        if int(lengths.max()) > max_sequence_length:
            if context_overflow == "error":
                raise ValueError(
                    f"`prompt` has {int(lengths.max())} tokens for the text encoder, more than `max_sequence_length` "
                    f"{max_sequence_length}: shorten it, or pass `context_overflow='truncate'` to cut its end."
                )
            tokens = self.tokenizer(
                prompts, padding=True, truncation=True, max_length=max_sequence_length, return_tensors="pt"
            )
        tokens = tokens.to(self._execution_device)
        states = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return [row[mask.bool()] for row, mask in zip(states, tokens.attention_mask, strict=True)]

    @in_turn("processor", "mllm")
    def encode_instruction(
        self,
        task: str,
        prompt: str | list[str] | None,
        source: Source | None = None,
        mllm_hidden_states: torch.Tensor | list[torch.Tensor] | None = None,
        mllm_frames: Literal["first", "all"] | None = None,
        allow_empty: bool = False,
    ) -> torch.Tensor:
        """
        Visual tokens of an instruction: one pass of the MLLM, teacher-forced over prompt and answer, and vision head.

        Args:
            task: name of the task.
            prompt: one instruction or a list.
            source: videos or images of the instruction, already loaded.
            mllm_hidden_states: `[batch, length, width]` or one `[length, width]` per sample, instead of the MLLM.
            mllm_frames: see the pipeline's call.
            allow_empty: allow an empty instruction, such as a negative prompt.

        Returns:
            `[batch, num_query_tokens, vision width]`

        Example:
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> pipe.encode_instruction("t2i", "a red circle").shape[-1]
            128
        """
        if mllm_hidden_states is not None:
            return self.mllm(mllm_hidden_states=mllm_hidden_states, output_vision_tokens=True).vision_tokens
        source = source or Source()
        inputs = self.processor.apply_task_template(
            task,
            prompt,
            images=source.images,
            videos=source.videos,
            mllm_frames=mllm_frames,
            allow_empty=allow_empty,
            return_tensors="pt",
        ).to(self._execution_device)
        return self.mllm(**inputs, logits_to_keep=1, output_vision_tokens=True).vision_tokens

    @in_turn("vae")
    def encode_source(self, source: Source, settings: GenerationSettings) -> torch.Tensor:
        """Normalised latents `[batch, channels, frames, height, width]` of the source at the output's size."""
        self._require("vae")
        if source.videos is not None:
            videos = [[Image.fromarray(frame) for frame in clip.frames] for clip in source.videos]
        else:
            videos = [[image] for image in source.images or ()]
        pixels = self.video_processor.preprocess_video(videos, height=settings.height, width=settings.width)
        pixels = pixels.to(self._execution_device, self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.mode().float()
        mean, std = self._latent_statistics(latents)
        return (latents - mean) / std

    @in_turn("processor", "mllm")
    def encode_null_instruction(
        self,
        task: str,
        negative_prompt: str | list[str] | None,
        batch_size: int,
        source: Source,
        negative_mllm_hidden_states: torch.Tensor | list[torch.Tensor] | None = None,
        mllm_frames: Literal["first", "all"] | None = None,
    ) -> torch.Tensor:
        """
        Visual tokens of the unconditional branch, from the stored states of the checkpoint or from a negative prompt.

        Returns:
            `[1 or batch, num_query_tokens, vision width]`
        """
        if negative_prompt is None and negative_mllm_hidden_states is None:
            return self.mllm(output_vision_tokens=True).vision_tokens
        negatives = None if negative_prompt is None else per_prompt(negative_prompt, batch_size)
        return self.encode_instruction(
            task, negatives, source, negative_mllm_hidden_states, mllm_frames, allow_empty=True
        )

    @in_turn("adapter")
    def encode_null_context(
        self,
        null_vision_tokens: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | list[torch.Tensor] | None,
        batch_size: int,
        num_videos_per_prompt: int,
        **arguments: Any,
    ) -> torch.Tensor:
        """
        Context of an unconditional branch, `[batch_size * num_videos_per_prompt, length, text_dim]`.

        Args:
            null_vision_tokens: of [`encode_null_instruction`].
            negative_prompt_embeds: of a negative prompt; `None` for the stored embedding of the empty prompt.
            batch_size, num_videos_per_prompt: prompts, and samples of each.
            arguments: the other arguments of [`OmniVideoAdapter.forward`], the source among them.

        Example:
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> null = pipe.mllm(output_vision_tokens=True).vision_tokens
            >>> pipe.encode_null_context(null, None, 2, 1, output_kind="image").shape[0]
            2
        """
        context = self.adapter(null_vision_tokens, negative_prompt_embeds, **arguments)
        context = check_result(context, "The unconditional branch (MLLM to adapter)")
        return context.expand(batch_size, -1, -1).repeat_interleave(num_videos_per_prompt, dim=0)

    @in_turn("vae")
    def decode(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Decode normalised latents to frames, see [`OmniVideoPipelineOutput`] for the formats."""
        self._require("vae")
        mean, std = self._latent_statistics(latents)
        check_tensors(latents=latents)
        pixels = self.vae.decode((latents * std + mean).to(self.vae.dtype), return_dict=False)[0]
        check_result(pixels, "The VAE's decoder")
        return self.video_processor.postprocess_video(pixels, output_type=output_type)

    def _latent_statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = (
            torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        return mean, std


def per_prompt(value: str | list[str], batch_size: int) -> list[str]:
    return [value] * batch_size if isinstance(value, str) else value


__all__ = ["OmniVideoEncodersMixin"]
