"""The steps of the pipeline that run encoders and the VAE: prompt, instruction, source, pixels."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils import is_ftfy_available
from PIL import Image

from ..diffusion.window_plan import Window
from ..media.sources import Source
from ..models.causal_vae import decode_pieces, encode_pieces
from ..models.connectors import ContextOverflow
from ..tasks import get_task
from ..utils.modules import Host
from ..utils.turns import in_turn
from .presets import (
    GenerationSettings,
    check_num_frames,
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
    def encode_source(
        self, source: Source, settings: GenerationSettings, frames: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """
        Normalised latents of the source at the output's size.

        Args:
            source: videos or images, already loaded.
            settings: size of the output.
            frames: first frame of the part to encode as a clip of its own, and the frame after its last. Default: all.

        Returns:
            `[batch, channels, frames, height, width]`; the frames are encoded a few at a time.
        """
        self._require("vae")
        if source.videos is not None:
            clips = [clip.frames[slice(*(frames or (None,)))] for clip in source.videos]
            videos = [[Image.fromarray(frame) for frame in clip] for clip in clips]
        else:
            videos = [[image] for image in source.images or ()]
        pieces = (
            self.video_processor.preprocess_video(
                [video[first:stop] for video in videos], height=settings.height, width=settings.width
            ).to(self._execution_device, self.vae.dtype)
            for first, stop in _pieces(len(videos[0]), self.grid.temporal)
        )
        return self._normalised(encode_pieces(self.vae, pieces))

    def encode_sources(
        self,
        task: str,
        source: Source,
        settings: GenerationSettings,
        windows: Sequence[Window],
        source_latents: torch.Tensor | None = None,
        reference_latents: torch.Tensor | None = None,
    ) -> list[dict[str, torch.Tensor | None]]:
        """
        Latents of the source as the adapter takes them, for every window of a video.

        The frames of a later window are encoded as a clip of its own, which begins with the frame of its lead-in.

        Args:
            task: name of the task.
            source: videos or images, already loaded.
            settings: size of the output.
            windows: plan of the windows.
            source_latents, reference_latents: latents of the caller for a call with one window, instead of `source`.

        Returns:
            `source_latents` and `reference_latents`, one entry per window; a single entry if all windows share them.

        Example:
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.media.sources import Source
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> settings, source = pipe.prepare_settings("t2v", Source(), *[None] * 7)
            >>> pipe.encode_sources("t2v", source, settings, pipe.plan_windows(settings, None))
            [{'source_latents': None, 'reference_latents': None}]
        """
        if source.kind is None:
            return [{"source_latents": source_latents, "reference_latents": reference_latents}]
        parts: list[Any] = [None]
        if len(windows) > 1 and source.videos is not None:
            parts = [window.frames(self.grid.temporal) for window in windows]
        encoded = [check_result(self.encode_source(source, settings, part), "The VAE's encoder") for part in parts]
        if get_task(task).latents == "reference_latents":
            return [{"source_latents": None, "reference_latents": latents} for latents in encoded]
        return [{"source_latents": latents, "reference_latents": None} for latents in encoded]

    def _encode_first_frames(self, first_frames: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Latents of `first_frames` of the pipeline's call, for every sample of the noise `latents`."""
        encoded = check_result(self.encode_frames(first_frames), "The VAE's encoder")
        return encoded.repeat_interleave(len(latents) // len(encoded), dim=0)

    @in_turn("vae")
    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """
        Normalised latents `[batch, channels, latent frames, height, width]` of generated frames.

        Args:
            frames: `[batch, frames, 3, height, width]` in 0..1, such as frames of `output_type="pt"`; `4n+1` of them
                with Wan's VAE.

        Example:
            >>> import torch
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> pipe.encode_frames(torch.zeros(1, 5, 3, 64, 64)).shape
            torch.Size([1, 16, 2, 8, 8])
        """
        self._require("vae")
        check_num_frames(self.grid, frames.shape[1])
        pixels = (2.0 * frames - 1.0).movedim(2, 1).to(self._execution_device, self.vae.dtype)
        pieces = (pixels[:, :, first:stop] for first, stop in _pieces(frames.shape[1], self.grid.temporal))
        return self._normalised(encode_pieces(self.vae, pieces))

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
    def encode_contexts(
        self,
        conditions: tuple[torch.Tensor, Any],
        null_conditions: tuple[torch.Tensor | None, Any],
        sources: Sequence[dict[str, torch.Tensor | None]],
        batch_size: int,
        num_videos_per_prompt: int,
        without_source: bool = False,
        **arguments: Any,
    ) -> dict[str, list[torch.Tensor]]:
        """
        Contexts of all branches of guidance, for every window that has its own source in the context.

        Args:
            conditions: visual tokens and text embeddings.
            null_conditions: those of the unconditional branch; the first is `None` without guidance.
            sources: result of [`encode_sources`].
            batch_size, num_videos_per_prompt: prompts, and samples of each.
            without_source: add the branch that has neither source nor instruction.
            arguments: the other arguments of [`OmniVideoAdapter.forward`].

        Returns:
            `contexts` of [`JointWindows`].

        Example:
            >>> import torch
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> given = (torch.zeros(1, 4, 128), torch.zeros(1, 6, 128))
            >>> list(pipe.encode_contexts(given, (None, None), [{}], 1, 1))
            ['context']
        """
        own = list(sources) if self.adapter.takes_source_in_context else list(sources[:1])
        made = [check_result(self.adapter(*conditions, **source, **arguments), "The adapter") for source in own]
        contexts = {"context": [context.repeat_interleave(num_videos_per_prompt, dim=0) for context in made]}
        vision_tokens, prompt_embeds = null_conditions
        if vision_tokens is None:
            return contexts
        nulls = (vision_tokens, prompt_embeds, batch_size, num_videos_per_prompt)
        contexts["null_context"] = [self.encode_null_context(*nulls, **source, **arguments) for source in own]
        if without_source:
            contexts["no_source_context"] = [self.encode_null_context(*nulls, **arguments)]
        return contexts

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
        pieces = list(self.decode_frames(latents, output_type))
        if len(pieces) == 1:
            return pieces[0]
        if output_type == "pil":
            return [[frame for piece in clip for frame in piece] for clip in zip(*pieces, strict=True)]
        return torch.cat(pieces, dim=1) if output_type == "pt" else np.concatenate(pieces, axis=1)

    def decode_frames(self, latents: torch.Tensor, output_type: str = "pil") -> Iterator[Any]:
        """
        Decode normalised latents and give the frames as they come: first one of every clip, then four at a time.

        Memory does not grow with the clip. With `pipe.vae.enable_tiling()` there is one piece, the whole clip.

        Args:
            latents: `[batch, channels, latent frames, height, width]`, as of `output_type="latent"`.
            output_type: `"pil"`, `"np"` or `"pt"`.

        Yields:
            The next frames of every clip, in the formats of [`OmniVideoPipelineOutput`].

        Raises:
            ValueError: for latents or frames that are not finite.

        Example:
            >>> import torch
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> [frames.shape[1] for frames in pipe.decode_frames(torch.zeros(1, 16, 3, 8, 8), output_type="np")]
            [1, 4, 4]
        """
        self._require("vae")
        check_tensors(latents=latents)
        mean, std = self._latent_statistics(latents)
        pieces = decode_pieces(self.vae, (latents * std + mean).to(self.vae.dtype))
        while (pixels := self._next_piece(pieces)) is not None:
            check_result(pixels, "The VAE's decoder")
            yield self.video_processor.postprocess_video(pixels, output_type=output_type)

    @in_turn("vae")
    def _next_piece(self, pieces: Iterator[torch.Tensor]) -> torch.Tensor | None:
        """The VAE is locked while it decodes, and free while the caller uses the frames."""
        return next(pieces, None)

    def _normalised(self, latents: torch.Tensor) -> torch.Tensor:
        latents = latents.float()
        mean, std = self._latent_statistics(latents)
        return (latents - mean) / std

    def _latent_statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = (
            torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        return mean, std


def _pieces(num_frames: int, temporal: int) -> list[tuple[int, int]]:
    """The frames of each causal piece: one, then `temporal` at a time."""
    return [(0, 1), *((start, start + temporal) for start in range(1, num_frames - temporal + 1, temporal))]


def per_prompt(value: str | list[str], batch_size: int) -> list[str]:
    return [value] * batch_size if isinstance(value, str) else value


__all__ = ["OmniVideoEncodersMixin"]
