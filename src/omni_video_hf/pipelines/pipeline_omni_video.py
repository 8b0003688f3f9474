"""The diffusers pipeline of Omni-Video: generate, edit and understand videos and images with one object."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
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

from .denoising import OmniVideoDenoisingMixin, callback_inputs, register_with_cache_dit, whole_call
from .guidance import Guidance
from .lora.loader import OmniVideoLoraLoaderMixin, with_lora_scale
from ..media.media import probe_frames
from ..models.modeling_omni_video import OmniVideoForConditionalGeneration
from ..models.connectors import ContextOverflow, OmniVideoAdapter
from .repository_mixin import OmniVideoRepositoryMixin
from ..processing.processing_omni_video import OmniVideoProcessor, get_task
from .request_checks import check_numbers, check_result, check_tensors
from .scheduling import check_scheduler, chosen_shift, prepare_scheduler, preset_shift
from .presets import (
    GenerationSettings,
    LatentGrid,
    check_num_frames,
    check_positions,
    check_source_fits,
    find_presets,
    keep_presets,
    resolve_size,
    trim_num_frames,
)
from ..media.sources import Source
from ..utils.turns import OwnRandomNumbers, in_turn

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


class OmniVideoPipeline(
    OmniVideoRepositoryMixin, OmniVideoDenoisingMixin, DiffusionPipeline, OmniVideoLoraLoaderMixin
):
    r"""
    Generates videos and images from text, edits them by instruction, and answers questions about them.

    Calls from several threads take turns, on one pipeline and on all that share a component, see [`turn`].

    Args:
        processor ([`OmniVideoProcessor`]): Prompts, images and frames for the MLLM.
        mllm ([`OmniVideoForConditionalGeneration`]): MLLM and vision head, without adapter and decoder.
        adapter ([`OmniVideoAdapter`]): Builds the decoder's context.
        transformer (`WanTransformer3DModel`, *optional*): The decoder. Without it or the VAE the pipeline encodes and
            answers.
        text_encoder (`UMT5EncoderModel`, *optional*): Text encoder of the decoder.
        tokenizer (`PreTrainedTokenizerFast`, *optional*): Its tokenizer.
        vae (`AutoencoderKLWan`, *optional*): Wan's VAE, of 2.1 or 2.2.
        scheduler (`UniPCMultistepScheduler`): Or any flow-matching scheduler of diffusers. A shift that it was given
            wins over the presets'.
        presets (`dict`, *optional*): Default settings of every task, saved with the pipeline. By default those that
            the components came with, or upstream's.
        scheduler_shift (`float`, *optional*): Shift of the scheduler that the presets belong to: with another one the
            scheduler's counts. By default the presets' own, or the scheduler's where they differ by task.
    """

    model_cpu_offload_seq = "mllm->text_encoder->adapter->transformer->vae"
    _optional_components = ["transformer", "text_encoder", "tokenizer", "vae"]  # noqa: RUF012

    def __init__(
        self,
        processor: OmniVideoProcessor,
        mllm: OmniVideoForConditionalGeneration,
        adapter: OmniVideoAdapter,
        transformer: WanTransformer3DModel | None,
        text_encoder: UMT5EncoderModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        vae: AutoencoderKLWan | None,
        scheduler: SchedulerMixin,
        presets: dict[str, dict[str, Any]] | None = None,
        scheduler_shift: float | None = None,
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
        if not presets:
            presets, scheduler_shift = find_presets(adapter, processor)
        self.register_to_config(presets=presets, scheduler_shift=scheduler_shift)
        self._begin_call()
        register_with_cache_dit(type(self))

    def register_to_config(self, **kwargs: Any) -> None:
        """As in diffusers; presets also stay with the components, for another pipeline over them."""
        if kwargs.get("presets"):
            if kwargs.get("scheduler_shift") is None:
                kwargs["scheduler_shift"] = preset_shift(kwargs["presets"], self.scheduler)
            keep_presets(kwargs["presets"], kwargs["scheduler_shift"], self.adapter, self.processor)
        super().register_to_config(**kwargs)

    @property
    def grid(self) -> LatentGrid:
        """How pixels become latents and tokens."""
        self._require("vae", "transformer")
        return LatentGrid(
            spatial=self.vae.config.scale_factor_spatial,
            temporal=self.vae.config.scale_factor_temporal,
            patch=tuple(self.transformer.config.patch_size),
            source_patch=tuple(self.adapter.config.visual_context_patch_size),
            positions=self.transformer.config.rope_max_seq_len,
        )

    @property
    def video_processor(self) -> VideoProcessor:
        """Turns frames into the VAE's pixels and back."""
        self._require("vae")
        return VideoProcessor(vae_scale_factor=self.vae.config.scale_factor_spatial)

    def _require(self, *names: str) -> None:
        """Refuse what needs a component that this pipeline was made without."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"This pipeline was made without `{'` and `'.join(missing)}`: it encodes and answers, but cannot do "
                f"this. Load it with all parts, or add them with `pipe.register_modules({missing[0]}=...)`."
            )

    # --- the call ---------------------------------------------------------------------------------------------------

    @whole_call
    @with_lora_scale
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
            negative_prompt (`str` or `list[str]`, *optional*): Read by text encoder and MLLM in the null branch, an
                empty one too. By default the null branch is the one stored in the checkpoint. A source stays in it
                either way.
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
            flow_shift (`float`, *optional*): Shift of the scheduler's sigmas towards noise. By default the one that
                the scheduler was given, see [`OmniVideoPipeline`], or else the preset's.
            num_videos_per_prompt (`int`, defaults to 1): Samples per prompt.
            generator (`torch.Generator` or list, *optional*): One for all samples, or one per sample. Answers of the
                MLLM are sampled from the first one's seed. By default one with a new seed, which `settings["seed"]`
                of the output names: `torch.Generator().manual_seed(seed)` repeats the call bit by bit.
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
            attention_kwargs (`dict`, *optional*): Passed to the decoder's attention processors; `scale` multiplies the
                LoRA of all parts during the call.
            callback_on_step_end (*optional*): Called as `callback(pipe, step, timestep, tensors)` after every step.
                The pipeline's components can be used in it, but no other call can begin on the pipeline or decoder.
            callback_on_step_end_tensor_inputs: Tensors it gets: `latents`, `context`, `null_context`; the latter two
                as `prompt_embeds` and `negative_prompt_embeds` as well.

        Returns:
            [`OmniVideoPipelineOutput`]

        Raises:
            ValueError: for inputs that do not go together, sizes off the latent grid, or a source too long for the
                context. Nothing is cut, resized or replaced without a note or a warning.
        """
        # 1. Inputs
        self._begin_call(guidance_scale or 0.0, attention_kwargs)
        guidance = Guidance(guidance_interval, batch_guidance)
        self._check_can_generate(task)
        callback_on_step_end_tensor_inputs = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(
            prompt=prompt,
            video=video,
            image=image,
            task=task,
            negative_prompt=negative_prompt,
            num_frames=num_frames,
            numbers={
                "height": height,
                "width": width,
                "fps": fps,
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "flow_shift": flow_shift,
                "max_new_tokens": max_new_tokens,
                "max_sequence_length": max_sequence_length,
                "max_context_length": max_context_length,
            },
            latents=latents,
            negative_mllm_hidden_states=negative_mllm_hidden_states,
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
        notes, (generator, seed) = [], seeded_generator(generator)

        # 2. Source and task. For an answer only the frames that the MLLM sees are decoded.
        source = Source.of(video, image, batch_size)
        if task is None or task == "understand":
            task, answers = self.answer(prompts, source, task, max_new_tokens, generator)
            if task == "understand":
                settings = {"task": task, "max_new_tokens": max_new_tokens, "seed": seed}
                return self._output(return_dict, text=answers, task=task, settings=settings)
            self._check_can_generate(task)
        room = self._source_room(
            task, prompts, negative_prompt, prompt_embeds, negative_prompt_embeds, guidance_scale, max_sequence_length,
            max_context_length,
        ) if source.kind is not None and context_overflow == "error" else None  # fmt: skip
        if source.videos is not None:
            self.check_videos_fit(source, height, width, num_frames, fps, context_overflow, max_context_length, room)
            source = source.load(num_frames, fps)

        # 3. Settings
        settings, source = self.prepare_settings(
            task, source, height, width, num_frames, fps, num_inference_steps, guidance_scale, flow_shift,
            source_latents if source_latents is not None else reference_latents, notes, room, max_context_length,
        )  # fmt: skip
        self._guidance_scale = settings.guidance_scale
        guidance = guidance.with_caches(self.transformer, self.do_classifier_free_guidance)

        # 4. MLLM and vision head, text encoder, source: once per call and one after the other, both branches together,
        # so that with `enable_model_cpu_offload` only one of them is on the device
        device, output_kind = self._execution_device, get_task(task).output
        vision_tokens = check_result(
            self.encode_instruction(task, prompts, source, mllm_hidden_states, mllm_frames), "The MLLM or vision head"
        )
        if self.do_classifier_free_guidance:
            null_vision_tokens = self.encode_null_instruction(
                task, negative_prompt, batch_size, source, negative_mllm_hidden_states, mllm_frames
            )
        if prompt_embeds is None:
            prompt_embeds = check_result(
                self.encode_prompt(prompts, max_sequence_length, context_overflow), "The text encoder"
            )
        if self.do_classifier_free_guidance and negative_prompt is not None:
            negatives = _per_prompt(negative_prompt, batch_size)
            negative_prompt_embeds = self.encode_prompt(negatives, max_sequence_length, context_overflow)
        if source.kind is not None:
            encoded = check_result(self.encode_source(source, settings), "The VAE's encoder")
            source_latents, reference_latents = (None, encoded) if task == "i2v" else (encoded, None)

        if context_overflow == "truncate":
            condition = source_latents if source_latents is not None else reference_latents
            notes += self._notes_of_overflow(
                prompts, negative_prompt if self.do_classifier_free_guidance else None,
                [*prompt_embeds, *_rows(negative_prompt_embeds)],
                0 if condition is None else self.grid.tokens_of_latents(condition.shape[2:]),
                max_sequence_length, max_context_length, output_kind,
            )  # fmt: skip

        # 5. Contexts of both branches; without negative prompt, the adapter takes the stored empty one
        context_arguments = {
            "source_latents": source_latents,
            "reference_latents": reference_latents,
            "output_kind": output_kind,
            "context_overflow": context_overflow,
            "max_context_length": max_context_length,
        }
        context = check_result(self.adapter(vision_tokens, prompt_embeds, **context_arguments), "The adapter")
        null_context = None
        if self.do_classifier_free_guidance:
            null_context = self.adapter(null_vision_tokens, negative_prompt_embeds, **context_arguments)
            null_context = check_result(null_context, "The unconditional branch (MLLM to adapter)")
            null_context = null_context.expand(batch_size, -1, -1).repeat_interleave(num_videos_per_prompt, dim=0)
        context = context.repeat_interleave(num_videos_per_prompt, dim=0)

        # 6. Latents and schedule
        scheduler = self.prepare_scheduler(settings.num_inference_steps, settings.flow_shift, device)
        latents = self.prepare_latents(batch_size * num_videos_per_prompt, settings, generator, latents, device)

        # 7. Denoise
        latents = self.denoise(
            latents, scheduler, context, null_context, attention_kwargs, callback_on_step_end,
            callback_on_step_end_tensor_inputs, guidance, settings.guidance_scale, generator,
        )  # fmt: skip

        # 8. Pixels
        frames = latents if output_type == "latent" else self.decode(latents, output_type)
        for note in notes:
            logger.warning(note)
        return self._output(
            return_dict,
            frames=frames,
            task=task,
            fps=settings.fps,
            settings=settings.to_dict()
            | {"scheduler": type(scheduler).__name__, "negative_prompt": negative_prompt, "prompt": prompt}
            | {"guidance_interval": guidance_interval, "batch_guidance": guidance.batched, "seed": seed},
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
                raise ValueError(f"Task {task!r} draws one image, but `num_frames` is {num_frames}.")
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

    def _check_can_generate(self, task: str | None) -> None:
        """Refuse to generate without the parts for it, or with a scheduler that does not fit."""
        if task not in (None, "understand"):
            self._require("transformer", "vae", "scheduler")
            check_scheduler(self.scheduler)

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
        room: int | None = None,
    ) -> None:
        """
        Refuse files that fit neither the context nor the decoder's positions before a single frame is decoded.

        Args:
            room: context tokens that are free for the source; by default as many as without any text.
        """
        limit = max_context_length or self.adapter.config.max_context_length
        if context_overflow != "error":
            room = None
        elif room is None:
            room = limit - self._context_length([torch.empty(1, 0)], "video")
        preset = self.config.presets["v2v"]
        for video in source.videos:
            if isinstance(video, (str, Path)) and "://" not in str(video):
                info, frames = probe_frames(video, fps, num_frames)
                size = (info.height, info.width)
                rows, columns, _ = resolve_size(self.grid, height, width, preset, size)
                if room is not None:
                    check_source_fits(self.grid, rows, columns, frames, room, limit, preset)
                check_positions(self.grid, rows, columns, frames, preset, True, room)

    @in_turn("processor", "mllm")
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
        with nullcontext() if seeded is None else OwnRandomNumbers(seeded.initial_seed()):
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
        room: int | None = None,
        max_context_length: int | None = None,
    ) -> tuple[GenerationSettings, Source]:
        """
        Every number of the generation: the caller's, else the source's, else the preset's of the task.

        Args:
            room: context tokens that are free for the source; `None` for as many as it takes.
            max_context_length: the whole context, for the message; the adapter's by default.

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
            flow_shift=chosen(
                "flow_shift",
                flow_shift if flow_shift is not None else chosen_shift(self.scheduler, self.config.scheduler_shift),
            ),
        )
        if source.kind is not None and room is not None:
            frames = settings.num_frames if source.videos is not None else 1
            limit = max_context_length or self.adapter.config.max_context_length
            check_source_fits(self.grid, height, width, frames, room, limit, preset)
        room = room if source.videos is not None or settings.num_frames == 1 else None
        check_positions(
            self.grid, settings.height, settings.width, settings.num_frames, preset, source_size is not None, room
        )
        return settings, source

    # --- 4. encoders ------------------------------------------------------------------------------------------------

    @in_turn("text_encoder", "tokenizer")
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
            source: what it is about, already read.
            mllm_hidden_states: `[batch, length, width]` or one `[length, width]` per sample, instead of the MLLM.
            mllm_frames: as in the call.
            allow_empty: take an empty instruction, as a negative prompt may be.

        Returns:
            `[batch, num_query_tokens, vision width]`
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
            videos = [[image] for image in source.images]
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
        Visual tokens of the null branch: from the checkpoint's stored states, or from those of a negative prompt.

        Returns:
            `[1 or batch, num_query_tokens, vision width]`
        """
        if negative_prompt is None and negative_mllm_hidden_states is None:
            return self.mllm(output_vision_tokens=True).vision_tokens
        negatives = None if negative_prompt is None else _per_prompt(negative_prompt, batch_size)
        return self.encode_instruction(
            task, negatives, source, negative_mllm_hidden_states, mllm_frames, allow_empty=True
        )

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
        check_numbers(num_inference_steps=num_inference_steps, flow_shift=flow_shift)
        return prepare_scheduler(self.scheduler, num_inference_steps, flow_shift, device)

    # --- 8. pixels --------------------------------------------------------------------------------------------------

    @in_turn("vae")
    def decode(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Frames of normalised latents, as [`OmniVideoPipelineOutput`] describes."""
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

    # --- helpers ----------------------------------------------------------------------------------------------------

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
        scale = self.config.presets[task]["guidance_scale"] if guidance_scale is None else guidance_scale
        lengths = self._text_lengths(prompts) if prompt_embeds is None else [len(row) for row in prompt_embeds]
        if scale > 1:
            lengths += [len(row) for row in _rows(negative_prompt_embeds)]
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
        """What `context_overflow="truncate"` cuts: of the prompts for the text encoder, and of the context."""
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


def seeded_generator(
    generator: torch.Generator | list[torch.Generator] | None,
) -> tuple[torch.Generator | list[torch.Generator], int | list[int] | None]:
    """
    A generator, and the seed that repeats what it gives.

    Returns:
        The given one, or without it one with a seed below 2^32 that torch's global generator gives. The seed is `None`
        for a generator that was used before, which no seed alone repeats; a list has one for each.
    """
    if generator is None:
        seed = int(torch.randint(2**32, ()))
        return torch.Generator("cpu").manual_seed(seed), seed
    seeds = [
        entry.initial_seed()
        for entry in (generator if isinstance(generator, list) else [generator])
        if torch.equal(entry.get_state(), torch.Generator(entry.device).manual_seed(entry.initial_seed()).get_state())
    ]
    if isinstance(generator, list):
        return generator, seeds if len(seeds) == len(generator) else None
    return generator, seeds[0] if seeds else None


def _rows(embeds: torch.Tensor | Sequence[torch.Tensor] | None) -> Sequence[torch.Tensor]:
    """Embeddings prompt by prompt; none of `None`."""
    return () if embeds is None else list(embeds)


def _per_prompt(value: str | list[str], batch_size: int) -> list[str]:
    return [value] * batch_size if isinstance(value, str) else value


__all__ = ["OmniVideoPipeline", "OmniVideoPipelineOutput"]
