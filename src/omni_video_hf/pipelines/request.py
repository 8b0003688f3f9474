"""Request of a pipeline call: checks of its arguments, the fit of its source, and all its settings."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from ..diffusion.window_plan import Window
from ..media.sources import Source
from ..media.video_loading import probe_frames
from ..models.connectors import ContextOverflow
from ..tasks import find_task, get_task
from ..utils.modules import Host
from .presets import (
    GenerationSettings,
    LongVideo,
    check_num_frames,
    check_positions,
    check_source_fits,
    resolve_size,
    trim_num_frames,
)
from .request_checks import check_numbers, check_tensors
from .scheduling import check_scheduler, chosen_shift


class OmniVideoRequestMixin(Host):
    """Methods of [`OmniVideoPipeline`] that check the arguments of a call and determine its settings."""

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        video: Any,
        image: Any,
        task: str | None,
        negative_prompt: str | list[str] | None,
        num_frames: int | None,
        prompt_embeds: Any,
        negative_prompt_embeds: Any,
        mllm_hidden_states: Any,
        source_latents: torch.Tensor | None,
        reference_latents: torch.Tensor | None,
        num_videos_per_prompt: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
        numbers: dict[str, Any] | None = None,
        latents: torch.Tensor | None = None,
        negative_mllm_hidden_states: Any = None,
    ) -> None:
        """Refuse inputs that do not go together; every error names the argument, its value and what is allowed."""
        check_numbers(num_frames=num_frames, num_videos_per_prompt=num_videos_per_prompt, **(numbers or {}))
        check_tensors(
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            mllm_hidden_states=mllm_hidden_states,
            negative_mllm_hidden_states=negative_mllm_hidden_states,
            source_latents=source_latents,
            reference_latents=reference_latents,
        )
        if prompt is None and (prompt_embeds is None or mllm_hidden_states is None):
            raise ValueError("Pass `prompt`, or both `prompt_embeds` and `mllm_hidden_states`.")
        if prompt is not None and (not isinstance(prompt, (str, list)) or len(prompt) == 0):
            raise ValueError(f"`prompt` must be a non-empty string or list of strings, got {prompt!r}.")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("Pass `negative_prompt` or `negative_prompt_embeds`, not both.")
        if isinstance(negative_prompt, list) and (
            isinstance(prompt, str) or len(negative_prompt) != len(prompt or [])
        ):
            raise ValueError("`negative_prompt` must be one string, or a list with one entry per `prompt`.")
        if video is not None and image is not None:
            raise ValueError("Pass `video` or `image`, not both.")
        if task is None and (prompt is None or source_latents is not None or reference_latents is not None):
            raise ValueError("Without `prompt`, or with precomputed source latents, `task` must be given.")
        if task is not None:
            self._check_task_source(task, video, image, source_latents, reference_latents)
        if num_frames is not None:
            check_num_frames(self.grid, num_frames)
            if task is not None and get_task(task).output == "image" and num_frames != 1:
                raise ValueError(f"Task {task!r} generates one image, but `num_frames` is {num_frames}: leave it out.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may have {self._callback_tensor_inputs}, got {sorted(unknown)}."
            )

    def _check_task_source(
        self,
        task: str,
        video: Any,
        image: Any,
        source_latents: torch.Tensor | None,
        reference_latents: torch.Tensor | None,
    ) -> None:
        spec = get_task(task)
        if spec.answers_in_text:
            return
        latents = reference_latents if spec.latents == "reference_latents" else source_latents
        given = {"image": image is not None or latents is not None, "video": video is not None or latents is not None}
        if spec.source is None:
            if video is not None or image is not None or source_latents is not None or reference_latents is not None:
                raise ValueError(
                    f"Task {task!r} has no source: leave `video` and `image` out, or choose an edit task."
                )
        elif not given[spec.source]:
            raise ValueError(f"Task {task!r} needs a source: pass `{spec.source}`.")
        elif (video if spec.source == "image" else image) is not None:
            raise ValueError(f"Task {task!r} takes `{spec.source}`, not the other kind of source.")

    def _check_can_generate(self, task: str | None) -> None:
        """Refuse to generate without the parts for it, or with a scheduler that does not fit."""
        if task is not None and not get_task(task).answers_in_text:
            self._require("transformer", "vae", "scheduler")
            check_scheduler(self.scheduler)

    def check_videos_fit(
        self,
        source: Source,
        height: int | None,
        width: int | None,
        num_frames: int | None,
        fps: float | None,
        context_overflow: ContextOverflow = "error",
        max_context_length: int | None = None,
        room: int | None = None,
        long_video: LongVideo | None = None,
    ) -> None:
        """
        Refuse files that fit neither the context nor the decoder's positions before a single frame is decoded.

        Args:
            room: number of free context tokens for the source. Default: the number without any text.
            long_video: windows or chunks, each of which must fit instead of the whole video.
        """
        limit = max_context_length or self.adapter.config.max_context_length
        if context_overflow != "error":
            room = None
        elif room is None:
            room = limit - self._context_length([torch.empty(1, 0)], "video")
        preset = self._preset(find_task("video", "video"))
        for video in source.videos or ():
            if isinstance(video, (str, Path)) and "://" not in str(video):
                info, frames = probe_frames(video, fps, num_frames)
                size = (info.height, info.width)
                rows, columns, _ = resolve_size(self.grid, height, width, preset, size)
                frames, in_window = _frames_at_once(frames, long_video)
                if room is not None:
                    check_source_fits(self.grid, rows, columns, frames, room, limit, preset, in_window)
                check_positions(self.grid, rows, columns, frames, preset, True, room, in_window)

    def resolve_long_video(
        self,
        task: str | None,
        long_video: str | None,
        window_frames: int | None = None,
        window_overlap: int | None = None,
    ) -> LongVideo | None:
        """
        Windows or chunks of a call, see the arguments of the pipeline's call; `None` without them.

        Raises:
            ValueError: for values that are not allowed, or numbers without `long_video`.

        Example:
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> pipe.resolve_long_video("v2v", "windows")
            LongVideo(mode='windows', window_frames=17, window_overlap=8)
        """
        if long_video is window_frames is window_overlap is None:
            return None
        trained = self._preset(task or find_task(None, "video")).get("num_frames") or 1
        return LongVideo.of(self.grid, long_video, window_frames, window_overlap, trained)

    def plan_windows(
        self,
        settings: GenerationSettings,
        long_video: LongVideo | None,
        source_latents: torch.Tensor | None = None,
        callback_inputs: Sequence[str] = (),
    ) -> tuple[Window, ...]:
        """
        The windows of a call: one, unless the video is longer than a window and `long_video` asks for windows.

        Args:
            settings: settings of the call.
            long_video: of [`resolve_long_video`].
            source_latents: latents of the source, if the caller passed them.
            callback_inputs: names of the tensors that `callback_on_step_end` gets.

        Raises:
            ValueError: for several windows together with what is made for one.

        Example:
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.media.sources import Source
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> settings, _ = pipe.prepare_settings("t2v", Source(), None, None, 65, *[None] * 4)
            >>> len(pipe.plan_windows(settings, pipe.resolve_long_video("t2v", "windows")))
            7
        """
        whole = (Window(0, self.grid.latent_frames(settings.num_frames)),)
        windows = whole if long_video is None else long_video.plan(self.grid, settings.num_frames)
        if len(windows) == 1:
            return whole
        if source_latents is not None:
            raise ValueError(
                f"`source_latents` are those of {settings.num_frames} frames, but every window encodes its own frames "
                "with `long_video='windows'`: pass `video` instead."
            )
        asked = set(callback_inputs) - {"latents"}
        if asked and get_task(settings.task).latents == "source_latents" and self.adapter.takes_source_in_context:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {sorted(asked)}, but with `long_video='windows'` each of "
                f"the {len(windows)} windows has a context of its own: ask for 'latents' only."
            )
        return windows

    def _check_first_frames(
        self, first_frames: torch.Tensor | None, settings: GenerationSettings, num_samples: int
    ) -> None:
        """Refuse `first_frames` of the call that are no frames of this size, or more than the video has."""
        if first_frames is None:
            return
        check_tensors(first_frames=first_frames)
        size = (3, settings.height, settings.width)
        given = tuple(first_frames.shape)
        count = given[1] if len(given) == 5 else 0
        fits = given[2:] == size and num_samples % max(1, given[0]) == 0 and 0 < count <= settings.num_frames
        if not fits or (count - 1) % self.grid.temporal or first_frames.min() < 0 or first_frames.max() > 1:
            raise ValueError(
                f"`first_frames` must be [batch, frames, {', '.join(map(str, size))}] in 0..1, with 1 or "
                f"{num_samples} samples, {self.grid.temporal}n+1 frames, at most {settings.num_frames}, got {given}."
            )

    def prepare_settings(
        self,
        task: str,
        source: Source,
        height: int | None,
        width: int | None,
        num_frames: int | None,
        fps: float | None,
        num_inference_steps: int | None,
        guidance_scale: float | None,
        flow_shift: float | None,
        condition_latents: torch.Tensor | None = None,
        notes: list[str] | None = None,
        room: int | None = None,
        max_context_length: int | None = None,
        long_video: LongVideo | None = None,
    ) -> tuple[GenerationSettings, Source]:
        """
        All settings of the generation: those of the caller, else of the source, else of the task's preset.

        Args:
            room: number of free context tokens for the source; `None` for no limit.
            max_context_length: maximum length of the context, for messages. Default: that of the adapter.
            long_video: windows or chunks, each of which must fit instead of the whole video.

        Returns:
            The settings, and the source cut to their number of frames. Roundings go to `notes`.

        Raises:
            ValueError: for numbers that are out of range or do not go together.
            SizeError: for a source that does not fit the context, and sizes and lengths for which the decoder has no
                positions.
        """
        check_numbers(
            height=height,
            width=width,
            num_frames=num_frames,
            fps=fps,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            flow_shift=flow_shift,
        )
        preset, notes = self._preset(task), [] if notes is None else notes
        source.check_equal(height, num_frames, fps)
        source_size = source.sizes[0] if source.sizes else None
        if condition_latents is not None:
            source_size = tuple(size * self.grid.spatial for size in condition_latents.shape[3:])
            if height is not None and (height, width) != source_size:
                raise ValueError(
                    f"`height` and `width` are {height} and {width}, but the latents of the source are those of "
                    f"{source_size[0]} and {source_size[1]} pixels: leave them out."
                )
        keeps_size = get_task(task).keeps_size or condition_latents is not None
        height, width, size_notes = resolve_size(self.grid, height, width, preset, source_size, keeps_size)
        notes += size_notes
        if source.videos is not None:
            notes += dict.fromkeys(note for clip in source.videos for note in clip.notes)
            num_frames, frame_notes = trim_num_frames(self.grid, len(source.videos[0].frames))
            notes += frame_notes
            fps = source.videos[0].fps
            source = Source(videos=[replace(clip, frames=clip.frames[:num_frames]) for clip in source.videos])
        elif get_task(task).source == "video":
            if condition_latents is None:
                raise ValueError(f"Task {task!r} needs `video`, or its latents in `source_latents`.")
            frames_of_latents = (condition_latents.shape[2] - 1) * self.grid.temporal + 1
            if num_frames not in (None, frames_of_latents):
                raise ValueError(
                    f"`num_frames` is {num_frames}, but the latents of the source are those of {frames_of_latents}."
                )
            num_frames, fps = frames_of_latents, fps or preset["fps"]
        elif get_task(task).output == "image":
            num_frames, fps = 1, None
        else:
            num_frames, fps = num_frames or preset["num_frames"], fps or preset["fps"]

        def chosen(name: str, value: float | None) -> Any:
            return preset[name] if value is None else value

        settings = GenerationSettings(
            task=task,
            height=height,
            width=width,
            num_frames=num_frames,
            fps=fps or preset["fps"],
            num_inference_steps=chosen("num_inference_steps", num_inference_steps),
            guidance_scale=chosen("guidance_scale", guidance_scale),
            flow_shift=chosen(
                "flow_shift",
                flow_shift if flow_shift is not None else chosen_shift(self.scheduler, self.config.scheduler_shift),
            ),
        )
        frames, in_window = _frames_at_once(settings.num_frames, long_video)
        if source.kind is not None and room is not None:
            limit = max_context_length or self.adapter.config.max_context_length
            of_source = frames if source.videos is not None else 1
            check_source_fits(self.grid, height, width, of_source, room, limit, preset, in_window and of_source > 1)
        room = room if source.videos is not None or settings.num_frames == 1 else None
        check_positions(
            self.grid, settings.height, settings.width, frames, preset, source_size is not None, room, in_window
        )
        return settings, source

    def _preset(self, task: str) -> Mapping[str, Any]:
        """Default settings of a task: those of the repository, or else those of the released model."""
        return self.config.presets.get(task) or get_task(task).preset or {}

    def _source_room(
        self,
        task: str,
        prompts: list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | list[torch.Tensor] | None,
        negative_prompt_embeds: torch.Tensor | list[torch.Tensor] | None,
        guidance_scale: float | None,
        max_sequence_length: int,
        max_context_length: int | None,
    ) -> int:
        """Context tokens that are free for the source, counted before anything is encoded."""
        scale = self._preset(task)["guidance_scale"] if guidance_scale is None else guidance_scale
        lengths = self._text_lengths(prompts) if prompt_embeds is None else [len(row) for row in prompt_embeds]
        if scale > 1:
            lengths += [len(row) for row in rows_of(negative_prompt_embeds)]
            lengths += [*self._text_lengths(negative_prompt), self.adapter.config.null_prompt_length]
        text = torch.empty(1, min(max(lengths, default=0), max_sequence_length), 0)
        limit = max_context_length or self.adapter.config.max_context_length
        return limit - self._context_length(text, get_task(task).output)

    def _text_lengths(self, prompts: str | list[str] | None) -> list[int]:
        """Tokens of every prompt for the text encoder."""
        if prompts is None or self.tokenizer is None:
            return []
        cleaned = [prompt_clean(text) for text in ([prompts] if isinstance(prompts, str) else prompts)]
        return [len(ids) for ids in self.tokenizer(cleaned).input_ids]

    def _notes_of_overflow(
        self,
        prompts: list[str] | None,
        negative_prompt: str | list[str] | None,
        embeds: Sequence[torch.Tensor],
        source_tokens: int,
        max_sequence_length: int,
        max_context_length: int | None,
        output_kind: str,
    ) -> list[str]:
        """Notes about what `context_overflow="truncate"` cuts from the text encoder's prompts and the context."""
        notes = []
        for name, texts in (("prompt", prompts), ("negative_prompt", negative_prompt)):
            longest = max(self._text_lengths(texts), default=0)
            if longest > max_sequence_length:
                notes.append(
                    f"`{name}` has {longest} tokens for the text encoder; the last {longest - max_sequence_length} "
                    f"were left out (`max_sequence_length` {max_sequence_length})."
                )
        limit = max_context_length or self.adapter.config.max_context_length
        length = self._context_length(embeds, output_kind) + source_tokens
        if length > limit:
            notes.append(
                f"The context has {length} tokens; the last {length - limit}, the prompt first, were left out "
                f"(`max_context_length` {limit})."
            )
        return notes

    def _context_length(self, prompt_embeds: torch.Tensor | Sequence[torch.Tensor], output_kind: str) -> int:
        """Number of context tokens without the source, including its boundary embeddings."""
        config = self.adapter.config
        vision_tokens = (
            config.num_image_vision_tokens
            if output_kind == "image"
            else self.mllm.config.vision_head_config.num_query_tokens
        )
        text = max(embeds.shape[-2] for embeds in prompt_embeds)
        if self.do_classifier_free_guidance:
            text = max(text, config.null_prompt_length)
        return vision_tokens * config.num_query_tokens + text + (6 if config.use_markers else 0)


def _frames_at_once(num_frames: int, long_video: LongVideo | None) -> tuple[int, bool]:
    """Frames that the decoder sees in one pass, and whether they are one window of a longer video."""
    if long_video is None or num_frames <= long_video.window_frames:
        return num_frames, False
    return long_video.window_frames, True


def rows_of(embeds: torch.Tensor | Sequence[torch.Tensor] | None) -> Sequence[torch.Tensor]:
    """Embeddings as a list with one entry per prompt; empty for `None`."""
    return () if embeds is None else list(embeds)


__all__ = ["OmniVideoRequestMixin", "rows_of"]
