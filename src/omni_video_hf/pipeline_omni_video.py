"""The diffusers pipeline of Omni-Video: generate, edit and understand videos and images with one object."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, SchedulerMixin, WanTransformer3DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils import BaseOutput, is_ftfy_available, logging
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from PIL import Image
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from .attention_omni_video import ConstantContext, constant_context
from .flow_matching_omni_video import UncheckedSolve, sampling_sigmas
from .guidance_omni_video import Guidance
from .lora_omni_video import OmniVideoLoraLoaderMixin
from .media_omni_video import probe_frames
from .modeling_omni_video import OmniVideoForConditionalGeneration
from .modeling_omni_video_connectors import ContextOverflow, OmniVideoAdapter
from .pipeline_loading_omni_video import OmniVideoRepositoryMixin
from .processing_omni_video import OmniVideoProcessor, get_task
from .settings_omni_video import (
    PRESETS,
    GenerationSettings,
    LatentGrid,
    check_num_frames,
    check_source_fits,
    resolve_size,
    trim_num_frames,
)
from .source_omni_video import Source

logger = logging.get_logger(__name__)


@dataclass
class OmniVideoPipelineOutput(BaseOutput):
    """
    Output of [`OmniVideoPipeline`].

    Args:
        frames: generated videos, one list of PIL images per sample, or `[batch, frames, height, width, 3]` in 0..1
            (`"np"`), `[batch, frames, 3, height, width]` in 0..1 (`"pt"`), or latents. An image is a video of one
            frame. `None` for an answer.
        text: answers, one per prompt; `None` when something was drawn.
        task: the task that was done, chosen by the MLLM where the caller left it open.
        fps: frames per second to play the videos at; `None` for images and answers.
        settings: every setting used.
        notes: what had to be decided for the caller, one sentence each, such as a rounded size.
    """

    frames: Any = None
    text: list[str] | None = None
    task: str | None = None
    fps: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class OmniVideoPipeline(OmniVideoRepositoryMixin, DiffusionPipeline, OmniVideoLoraLoaderMixin):
    r"""
    Generates videos and images from text, edits them by instruction, and answers questions about them.

    Args:
        processor ([`OmniVideoProcessor`]): Prompts, images and frames for the MLLM.
        mllm ([`OmniVideoForConditionalGeneration`]): MLLM and vision head, without adapter and decoder.
        adapter ([`OmniVideoAdapter`]): Builds the decoder's context.
        transformer (`WanTransformer3DModel`): The decoder.
        text_encoder (`UMT5EncoderModel`): Text encoder of the decoder.
        tokenizer (`PreTrainedTokenizerFast`): Its tokenizer.
        vae (`AutoencoderKLWan`): Wan's VAE, of 2.1 or 2.2.
        scheduler (`UniPCMultistepScheduler`): Or any flow-matching scheduler of diffusers.
        presets (`dict`, *optional*): Default settings of every task, saved with the pipeline; upstream's by default.
    """

    model_cpu_offload_seq = "mllm->text_encoder->adapter->transformer->vae"
    _callback_tensor_inputs = ["latents", "context", "null_context"]  # noqa: RUF012
    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012

    def __init__(
        self,
        processor: OmniVideoProcessor,
        mllm: OmniVideoForConditionalGeneration,
        adapter: OmniVideoAdapter,
        transformer: WanTransformer3DModel,
        text_encoder: UMT5EncoderModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        vae: AutoencoderKLWan,
        scheduler: SchedulerMixin,
        presets: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            processor=processor,
            mllm=mllm,
            adapter=adapter,
            transformer=transformer,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            vae=vae,
            scheduler=scheduler,
        )
        self.register_to_config(presets=presets or PRESETS)
        self.grid = LatentGrid(
            spatial=vae.config.scale_factor_spatial,
            temporal=vae.config.scale_factor_temporal,
            patch=tuple(transformer.config.patch_size),
            source_patch=tuple(adapter.config.visual_context_patch_size),
        )
        self.video_processor = VideoProcessor(vae_scale_factor=self.grid.spatial)

    # --- what the caller may look at while a call runs ------------------------------------------------------------

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the running call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call has a null branch."""
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the running call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to skip the remaining steps."""
        return self._interrupt

    # --- the call ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        video: Any = None,
        image: Any = None,
        task: str | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        batch_guidance: bool = False,
        flow_shift: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | list[torch.Tensor] | None = None,
        negative_prompt_embeds: torch.Tensor | list[torch.Tensor] | None = None,
        mllm_hidden_states: torch.Tensor | list[torch.Tensor] | None = None,
        negative_mllm_hidden_states: torch.Tensor | list[torch.Tensor] | None = None,
        source_latents: torch.Tensor | None = None,
        reference_latents: torch.Tensor | None = None,
        mllm_frames: Literal["first", "all"] | None = None,
        max_new_tokens: int = 512,
        max_sequence_length: int = 512,
        context_overflow: ContextOverflow = "error",
        max_context_length: int | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> OmniVideoPipelineOutput | tuple:
        r"""
        Generate, edit or answer.

        Args:
            prompt (`str` or `list[str]`): What to draw, how to edit, or what to answer.
            video: Clip to edit or ask about: path, URL, `VideoClip`, list of PIL images or arrays, or
                `[frames, height, width, 3]` array or `[frames, 3, height, width]` tensor; or a list of clips, one per
                prompt. A single clip serves all prompts.
            image: Image to edit, animate or ask about, or a list, one per prompt.
            task (`str`, *optional*): `t2i`, `t2v`, `i2i`, `v2v`, `i2v` or `understand`. By default the MLLM decides:
                it answers in text, or asks to draw; a source image then means `i2i`, a source video `v2v`.
            negative_prompt (`str` or `list[str]`, *optional*): Read by text encoder and MLLM in the null branch. By
                default the null branch is the one stored in the checkpoint. A source stays in it either way.
            height, width (`int`, *optional*): Pixels. Edits keep their source's size, rounded to the latent grid;
                `i2v` keeps its image's shape at the preset's area; everything else has the task's preset.
            num_frames (`int`, *optional*): `4n+1` with Wan's VAE. With a source video: that many frames spread evenly
                over it, or, together with `fps`, from its start.
            fps (`float`, *optional*): Frames per second of the output; a source video is resampled to it. For frames
                without a rate, such as a list of images, it states their rate.
            num_inference_steps (`int`, *optional*): Denoising steps.
            guidance_scale (`float`, *optional*): `uncond + scale * (cond - uncond)`, upstream's scale plus one. At
                most 1 turns guidance off.
            guidance_interval (`tuple[float, float]`, *optional*): Fractions of the steps between which guidance is
                on, e.g. `(0.1, 0.8)`; outside, one branch runs instead of two. All steps by default.
            batch_guidance (`bool`, defaults to `False`): Run both branches in one pass of twice the batch: the same
                numbers up to rounding, more memory, faster where a pass leaves the device idle.
            flow_shift (`float`, *optional*): Shift of the scheduler's sigmas towards noise.
            num_videos_per_prompt (`int`, defaults to 1): Samples per prompt.
            generator (`torch.Generator` or list, *optional*): One for all samples, or one per sample. Answers of the
                MLLM are sampled from the first one's seed.
            latents (`torch.Tensor`, *optional*): `[batch, channels, frames, height, width]` initial noise.
            prompt_embeds, negative_prompt_embeds (*optional*): Text embeddings, `[batch, length, width]` or one
                `[length, width]` per prompt, instead of running the text encoder.
            mllm_hidden_states, negative_mllm_hidden_states (*optional*): Likewise, of the MLLM. Need `task`.
            source_latents, reference_latents (`torch.Tensor`, *optional*): Normalised latents
                `[batch, channels, frames, height, width]` instead of encoding `video` or `image`.
            mllm_frames (`str`, *optional*): For `v2v`, the MLLM sees the `"first"` frame only, as upstream's does, or
                `"all"`: as many frames as the processor samples. By default what the processor says.
            max_new_tokens (`int`, defaults to 512): Longest answer of the MLLM.
            max_sequence_length (`int`, defaults to 512): Longest prompt for the text encoder, in tokens.
            context_overflow (`str`, defaults to `"error"`): What to do with a context or prompt that is too long:
                `"error"`, or `"truncate"` to cut its end as upstream does.
            max_context_length (`int`, *optional*): Let a longer context in than the decoder was trained with.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): Whether to return an [`OmniVideoPipelineOutput`] or a tuple
                `(frames, text)`.
            attention_kwargs (`dict`, *optional*): Passed to the decoder's attention processors.
            callback_on_step_end (*optional*): Called as `callback(pipe, step, timestep, tensors)` after every step.
            callback_on_step_end_tensor_inputs: Tensors it gets: `latents`, `context`, `null_context`.

        Returns:
            [`OmniVideoPipelineOutput`]

        Raises:
            ValueError: for inputs that do not go together, sizes off the latent grid, or a source too long for the
                context. Nothing is cut, resized or replaced without a note or a warning.
        """
        # 1. Inputs
        guidance = Guidance(guidance_interval, batch_guidance)
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            prompt=prompt,
            video=video,
            image=image,
            task=task,
            negative_prompt=negative_prompt,
            num_frames=num_frames,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            mllm_hidden_states=mllm_hidden_states,
            source_latents=source_latents,
            reference_latents=reference_latents,
            num_videos_per_prompt=num_videos_per_prompt,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        prompts = [prompt] if isinstance(prompt, str) else prompt
        batch_size = len(prompts) if prompts is not None else len(mllm_hidden_states)
        notes: list[str] = []
        self._guidance_scale, self._interrupt, self._num_timesteps = guidance_scale or 0.0, False, 0

        # 2. Source and task. For an answer only the frames that the MLLM sees are decoded.
        source = Source.of(video, image, batch_size)
        if task is None or task == "understand":
            task, answers = self.answer(prompts, source, task, max_new_tokens, generator)
            if task == "understand":
                self.maybe_free_model_hooks()
                settings = {"task": task, "max_new_tokens": max_new_tokens}
                return self._output(return_dict, text=answers, task=task, settings=settings)
        if source.videos is not None:
            self.check_videos_fit(source, height, width, num_frames, fps, context_overflow, max_context_length)
            source = source.load(num_frames, fps)

        # 3. Settings
        settings, source = self.prepare_settings(
            task, source, height, width, num_frames, fps, num_inference_steps, guidance_scale, flow_shift,
            source_latents if source_latents is not None else reference_latents, notes,
        )  # fmt: skip
        self._guidance_scale = settings.guidance_scale

        # 4. MLLM and vision head, text encoder, source: once per call and one after the other, both branches together,
        # so that with `enable_model_cpu_offload` only one of them is on the device
        device, output_kind = self._execution_device, get_task(task).output
        vision_tokens = self.encode_instruction(task, prompts, source, mllm_hidden_states, mllm_frames)
        if self.do_classifier_free_guidance:
            null_vision_tokens = self.encode_null_instruction(
                task, negative_prompt, batch_size, source, negative_mllm_hidden_states, mllm_frames
            )
        if prompt_embeds is None:
            prompt_embeds = self.encode_prompt(prompts, max_sequence_length, context_overflow)
        if self.do_classifier_free_guidance and negative_prompt is not None:
            negatives = _per_prompt(negative_prompt, batch_size)
            negative_prompt_embeds = self.encode_prompt(negatives, max_sequence_length, context_overflow)
        if source.kind is not None and context_overflow == "error":
            used = self._context_length(prompt_embeds, output_kind)
            limit = max_context_length or self.adapter.config.max_context_length
            check_source_fits(
                self.grid,
                settings.height,
                settings.width,
                settings.num_frames if source.videos else 1,
                limit - used,
                limit,
            )
        if source.kind is not None:
            encoded = self.encode_source(source, settings)
            source_latents, reference_latents = (None, encoded) if task == "i2v" else (encoded, None)

        # 5. Contexts of both branches; without negative prompt, the adapter takes the stored empty one
        context_arguments = {
            "source_latents": source_latents,
            "reference_latents": reference_latents,
            "output_kind": output_kind,
            "context_overflow": context_overflow,
            "max_context_length": max_context_length,
        }
        context = self.adapter(vision_tokens, prompt_embeds, **context_arguments)
        null_context = None
        if self.do_classifier_free_guidance:
            null_context = self.adapter(null_vision_tokens, negative_prompt_embeds, **context_arguments)
            null_context = null_context.expand(batch_size, -1, -1).repeat_interleave(num_videos_per_prompt, dim=0)
        context = context.repeat_interleave(num_videos_per_prompt, dim=0)

        # 6. Latents and schedule
        scheduler = self.prepare_scheduler(settings.num_inference_steps, settings.flow_shift, device)
        latents = self.prepare_latents(batch_size * num_videos_per_prompt, settings, generator, latents, device)

        # 7. Denoise
        latents = self.denoise(
            latents, scheduler, context, null_context, attention_kwargs, callback_on_step_end,
            callback_on_step_end_tensor_inputs, guidance,
        )  # fmt: skip

        # 8. Pixels
        frames = latents if output_type == "latent" else self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        for note in notes:
            logger.warning(note)
        return self._output(
            return_dict,
            frames=frames,
            task=task,
            fps=settings.fps,
            settings=settings.to_dict()
            | {"scheduler": type(scheduler).__name__, "negative_prompt": negative_prompt, "prompt": prompt}
            | {"guidance_interval": guidance_interval, "batch_guidance": batch_guidance},
            notes=notes,
        )

    # --- 1. inputs --------------------------------------------------------------------------------------------------

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
    ) -> None:
        """Refuse inputs that do not go together; every error names the argument, its value and what is allowed."""
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
                raise ValueError(f"Task {task!r} draws one image, but `num_frames` is {num_frames}.")
        if num_videos_per_prompt < 1:
            raise ValueError(f"`num_videos_per_prompt` must be at least 1, got {num_videos_per_prompt}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may hold {self._callback_tensor_inputs}, got {sorted(unknown)}."
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
        if task == "understand":
            return
        given = {
            "image": image is not None or (source_latents if task != "i2v" else reference_latents) is not None,
            "video": video is not None or source_latents is not None,
        }
        if spec.source is None:
            if video is not None or image is not None or source_latents is not None or reference_latents is not None:
                raise ValueError(
                    f"Task {task!r} has no source: leave `video` and `image` out, or choose an edit task."
                )
        elif not given[spec.source]:
            raise ValueError(f"Task {task!r} needs `{spec.source}`.")
        elif (video if spec.source == "image" else image) is not None:
            raise ValueError(f"Task {task!r} takes `{spec.source}`, not the other kind of source.")

    # --- 2. source and task -----------------------------------------------------------------------------------------

    def check_videos_fit(
        self,
        source: Source,
        height: int | None,
        width: int | None,
        num_frames: int | None,
        fps: float | None,
        context_overflow: ContextOverflow = "error",
        max_context_length: int | None = None,
    ) -> None:
        """Refuse files that cannot fit the context before a single frame is decoded, by a lower bound of the text."""
        if context_overflow != "error":
            return
        limit = max_context_length or self.adapter.config.max_context_length
        room = limit - self._context_length([torch.empty(1, 0)], "video")
        for video in source.videos:
            if isinstance(video, (str, Path)) and "://" not in str(video):
                info, frames = probe_frames(video, fps, num_frames)
                size = (info.height, info.width)
                rows, columns, _ = resolve_size(self.grid, height, width, self.config.presets["v2v"], size)
                check_source_fits(self.grid, rows, columns, frames, room, limit)

    def answer(
        self,
        prompts: list[str],
        source: Source,
        task: str | None,
        max_new_tokens: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> tuple[str, list[str]]:
        """
        Let the MLLM answer, and find out what it wants to do.

        Returns:
            The task, and the answers without special tokens. With `task=None` a `[GEN_VID]` in the answer means a
            video, a `[GEN_IMG]` an image, neither means that the answer is the output (as upstream); the kind of the
            source decides between its two edit tasks.

        Raises:
            ValueError: when the MLLM wants different tasks for the prompts of one batch.
        """
        inputs = self.processor.apply_task_template(
            "understand", prompts, images=source.images, videos=source.videos, return_tensors="pt"
        ).to(self._execution_device)
        seeded = generator[0] if isinstance(generator, list) else generator
        with torch.random.fork_rng(enabled=seeded is not None):
            if seeded is not None:
                torch.manual_seed(seeded.initial_seed())
            ids = self.mllm.generate(**inputs, max_new_tokens=max_new_tokens)[:, inputs["input_ids"].shape[1] :]
        answers = [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]
        if task is not None:
            return task, answers
        chosen = {self._task_of(row, source.kind) for row in ids}
        if len(chosen) > 1:
            raise ValueError(
                f"The MLLM chose {sorted(chosen)} for this batch of prompts: pass `task`, or call one by one."
            )
        return chosen.pop(), answers

    def _task_of(self, ids: torch.Tensor, source_kind: str | None) -> str:
        """The task an answer asks for."""
        wants_video = bool((ids == self.mllm.config.video_generation_token_id).any())
        wants_image = bool((ids == self.mllm.config.image_generation_token_id).any())
        if not wants_video and not wants_image:
            return "understand"
        if source_kind is not None:
            return "i2i" if source_kind == "image" else "v2v"
        return "t2v" if wants_video else "t2i"

    # --- 3. settings ------------------------------------------------------------------------------------------------

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
    ) -> tuple[GenerationSettings, Source]:
        """
        Every number of the generation: the caller's, else the source's, else the preset's of the task.

        Returns:
            The settings, and the source cut to their number of frames. Roundings go to `notes`.
        """
        preset, notes = self.config.presets[task], [] if notes is None else notes
        source.check_equal(height, num_frames, fps)
        source_size = source.sizes[0] if source.sizes else None
        if condition_latents is not None:
            source_size = tuple(size * self.grid.spatial for size in condition_latents.shape[3:])
            if height is not None and (height, width) != source_size:
                raise ValueError(
                    f"`height` and `width` are {height} and {width}, but the latents of the source are those of "
                    f"{source_size[0]} and {source_size[1]} pixels: leave them out."
                )
        keeps_size = task != "i2v" or condition_latents is not None
        height, width, size_notes = resolve_size(self.grid, height, width, preset, source_size, keeps_size)
        notes += size_notes
        if source.videos is not None:
            notes += dict.fromkeys(note for clip in source.videos for note in clip.notes)
            num_frames, frame_notes = trim_num_frames(self.grid, len(source.videos[0].frames))
            notes += frame_notes
            fps = source.videos[0].fps
            source = Source(videos=[replace(clip, frames=clip.frames[:num_frames]) for clip in source.videos])
        elif task == "v2v":
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

        def chosen(name: str, value: float | None) -> float:
            return preset[name] if value is None else value

        settings = GenerationSettings(
            task=task,
            height=height,
            width=width,
            num_frames=num_frames,
            fps=fps or preset["fps"],
            num_inference_steps=chosen("num_inference_steps", num_inference_steps),
            guidance_scale=chosen("guidance_scale", guidance_scale),
            flow_shift=chosen("flow_shift", flow_shift),
        )
        return settings, source

    # --- 4. encoders ------------------------------------------------------------------------------------------------

    def encode_prompt(
        self, prompt: str | list[str], max_sequence_length: int = 512, context_overflow: ContextOverflow = "error"
    ) -> list[torch.Tensor]:
        """
        Text embeddings of bare prompts, cleaned as upstream does, real tokens only.

        Returns:
            One `[length, width]` per prompt.

        Raises:
            ValueError: for a prompt longer than `max_sequence_length` tokens, unless `context_overflow="truncate"`.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("This pipeline was loaded without text encoder: pass `prompt_embeds`.")
        if not is_ftfy_available():
            raise ImportError("Prompts are cleaned with ftfy, as the model was trained: `pip install ftfy`.")
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

    def encode_instruction(
        self,
        task: str,
        prompt: str | list[str] | None,
        source: Source | None = None,
        mllm_hidden_states: torch.Tensor | list[torch.Tensor] | None = None,
        mllm_frames: Literal["first", "all"] | None = None,
    ) -> torch.Tensor:
        """
        Visual tokens of an instruction: one pass of the MLLM, teacher-forced over prompt and answer, and vision head.

        Returns:
            `[batch, num_query_tokens, vision width]`
        """
        if mllm_hidden_states is not None:
            return self.mllm(mllm_hidden_states=mllm_hidden_states, output_vision_tokens=True).vision_tokens
        source = source or Source()
        inputs = self.processor.apply_task_template(
            task, prompt, images=source.images, videos=source.videos, mllm_frames=mllm_frames, return_tensors="pt"
        ).to(self._execution_device)
        return self.mllm(**inputs, logits_to_keep=1, output_vision_tokens=True).vision_tokens

    def encode_source(self, source: Source, settings: GenerationSettings) -> torch.Tensor:
        """Normalised latents `[batch, channels, frames, height, width]` of the source at the output's size."""
        if source.videos is not None:
            videos = [[Image.fromarray(frame) for frame in clip.frames] for clip in source.videos]
        else:
            videos = [[image] for image in source.images]
        pixels = self.video_processor.preprocess_video(videos, height=settings.height, width=settings.width)
        pixels = pixels.to(self._execution_device, self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.mode().float()
        mean, std = self._latent_statistics(latents)
        return (latents - mean) / std

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
        Visual tokens of the null branch: from the checkpoint's stored states, or from those of a negative prompt.

        Returns:
            `[1 or batch, num_query_tokens, vision width]`
        """
        if negative_prompt is None and negative_mllm_hidden_states is None:
            return self.mllm(output_vision_tokens=True).vision_tokens
        negatives = None if negative_prompt is None else _per_prompt(negative_prompt, batch_size)
        return self.encode_instruction(task, negatives, source, negative_mllm_hidden_states, mllm_frames)

    # --- 6. latents and schedule ------------------------------------------------------------------------------------

    def prepare_latents(
        self,
        batch_size: int,
        settings: GenerationSettings,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """Initial noise `[batch, channels, frames, height, width]` in float32; one generator per sample or for all."""
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` has {len(generator)} entries for {batch_size} samples: pass one per sample."
            )
        shape = (
            batch_size,
            self.transformer.config.in_channels,
            self.grid.latent_frames(settings.num_frames),
            settings.height // self.grid.spatial,
            settings.width // self.grid.spatial,
        )
        device = device or self._execution_device
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must be {shape} for these settings, got {tuple(latents.shape)}.")
        return latents.to(device, torch.float32)

    def prepare_scheduler(
        self, num_inference_steps: int, flow_shift: float, device: torch.device | None = None
    ) -> SchedulerMixin:
        """
        A scheduler for one call, on upstream's sigmas where its `set_timesteps` takes sigmas.

        The pipeline's own scheduler is not touched: calls do not leave state behind.
        """
        config = self.scheduler.config
        if "flow_shift" not in config and "shift" not in config:
            raise ValueError(
                f"`scheduler` must be a flow-matching scheduler, with `flow_shift` or `shift` in its configuration; "
                f"{type(self.scheduler).__name__} has neither."
            )
        if config.get("prediction_type", "flow_prediction") != "flow_prediction":
            raise ValueError(
                f"`scheduler.config.prediction_type` must be 'flow_prediction', got {config.prediction_type!r}: the "
                "decoder predicts a velocity."
            )
        shift = {"flow_shift" if "flow_shift" in config else "shift": flow_shift}
        scheduler = type(self.scheduler).from_config(config, **shift)
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(sigmas=sampling_sigmas(num_inference_steps), device=device)
        else:
            scheduler.set_timesteps(num_inference_steps, device=device)
        return scheduler

    # --- 7. denoise -------------------------------------------------------------------------------------------------

    def denoise(
        self,
        latents: torch.Tensor,
        scheduler: SchedulerMixin,
        context: torch.Tensor,
        null_context: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance: Guidance | None = None,
    ) -> torch.Tensor:
        """
        Integrate from noise to latents.

        Args:
            latents: `[batch, channels, frames, height, width]`, noise.
            scheduler: with its timesteps set.
            context: `[batch, length, text_dim]`, not padded.
            null_context: likewise, of the null branch; `None` turns guidance off.
            guidance: when and how the null branch runs; in every step, in a pass of its own by default.
        """
        guidance = guidance or Guidance()

        def cast_contexts() -> dict[str, torch.Tensor]:
            contexts = guidance.contexts(context, null_context)
            return {branch: states.to(self.transformer.dtype) for branch, states in contexts.items()}

        contexts = cast_contexts()
        if self.transformer.is_cache_enabled:  # a call that broke off may have left something behind
            self.transformer._reset_stateful_cache()
        scheduler.set_begin_index(0)
        scheduler.sigmas = scheduler.sigmas.to(latents.device)  # else UniPC copies them over, three in every step
        timesteps = scheduler.timesteps
        self._num_timesteps = len(timesteps)
        length = self.adapter.config.max_context_length
        with (
            constant_context(self.transformer, contexts, length) as constant,
            self.progress_bar(total=len(timesteps)) as progress_bar,
        ):
            for step, timestep in enumerate(timesteps):
                if self._interrupt:
                    continue
                branches = guidance.branches(step, len(timesteps), contexts)
                constant.begin_step(passes=len(branches))
                velocities = [
                    velocity
                    for branch in branches
                    for velocity in self._predict_velocities(branch, latents, timestep, constant, attention_kwargs)
                ]
                velocity = guidance.combine(velocities, self._guidance_scale)
                with UncheckedSolve():
                    latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "context": context, "null_context": null_context}
                    tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, step, timestep, tensors)
                    latents = changed.pop("latents", latents)
                    if "context" in changed or (null_context is not None and "null_context" in changed):
                        context = changed.get("context", context)
                        null_context = changed.get("null_context", null_context)
                        for branch, states in cast_contexts().items():
                            constant.set(branch, states)
                progress_bar.update()
        return latents

    def _predict_velocities(
        self,
        branch: str,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        constant: ConstantContext,
        attention_kwargs: dict[str, Any] | None,
    ) -> tuple[torch.Tensor, ...]:
        """The decoder's velocity of a branch, or of each half of a batched one, in float32."""
        halves = len(constant.contexts[branch]) // len(latents)
        states = torch.cat([latents] * halves).to(self.transformer.dtype)
        with self.transformer.cache_context(branch), constant.enter(branch) as context:
            velocity = self.transformer(
                hidden_states=states,
                timestep=timestep.expand(len(states)),
                encoder_hidden_states=context,
                attention_kwargs=attention_kwargs,
                return_dict=False,
            )[0]
        return velocity.float().chunk(halves)

    # --- 8. pixels --------------------------------------------------------------------------------------------------

    def decode(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Frames of normalised latents, as [`OmniVideoPipelineOutput`] describes."""
        mean, std = self._latent_statistics(latents)
        pixels = self.vae.decode((latents * std + mean).to(self.vae.dtype), return_dict=False)[0]
        return self.video_processor.postprocess_video(pixels, output_type=output_type)

    def _latent_statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = (
            torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        return mean, std

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _context_length(self, prompt_embeds: torch.Tensor | list[torch.Tensor], output_kind: str) -> int:
        """Context tokens of everything but the source, its markers included."""
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

    def _output(self, return_dict: bool, **fields: Any) -> OmniVideoPipelineOutput | tuple:
        output = OmniVideoPipelineOutput(**fields)
        return output if return_dict else (output.frames, output.text)


def _per_prompt(value: str | list[str], batch_size: int) -> list[str]:
    return [value] * batch_size if isinstance(value, str) else value


__all__ = ["OmniVideoPipeline", "OmniVideoPipelineOutput"]
