"""The diffusers pipeline of Omni-Video 2: generate videos from text and edit them, with one decoder or two experts."""

from collections.abc import Callable, Sequence, Sized
from typing import Any, Literal, cast

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, SchedulerMixin, WanTransformer3DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import logging
from transformers import PreTrainedModel, PreTrainedTokenizerBase, UMT5EncoderModel

from ...models.connectors import ContextOverflow
from ...models.connectors_2 import OmniVideo2Adapter
from ...processing.processing_omni_video_2 import OmniVideo2Processor
from ...tasks import get_task
from ..denoising import callback_inputs, register_with_cache_dit, whole_call
from ..guidance import Guidance
from ..lora.loader import with_lora_scale, without_lora_scale
from ..presets import LatentGrid, find_presets, keep_presets
from ..request_checks import check_numbers, check_result
from ..scheduling import preset_shift
from ..shared.output import OmniVideoPipelineOutput
from ..shared.repository_mixin import OmniVideoRepositoryMixin
from ..shared.steps import OmniVideoStepsMixin, seeded_generator
from ..shared.thought import as_thoughts, plain_thoughts
from .denoising import OmniVideo2DenoisingMixin
from .edit_source import load_edit_videos
from .encoders import OmniVideo2EncodersMixin, check_source_size
from .experts_lora import OmniVideo2LoraLoaderMixin
from .prompts import FRAME_STRIDE, OMNI_VIDEO_2_PRESETS, complete_prompts
from .request import OmniVideo2RequestMixin
from .thinking import OmniVideo2ThinkingMixin

logger = logging.get_logger(__name__)


class OmniVideo2Pipeline(
    OmniVideo2RequestMixin,
    OmniVideo2EncodersMixin,
    OmniVideo2ThinkingMixin,
    OmniVideoRepositoryMixin,
    OmniVideo2DenoisingMixin,
    OmniVideoStepsMixin,
    DiffusionPipeline,
    OmniVideo2LoraLoaderMixin,
):
    r"""
    Generates videos from text and edits them by instruction.

    Calls from several threads take turns, on one pipeline and on all that share a component, see [`turn`].

    Args:
        processor ([`OmniVideo2Processor`]): Prompts and frames for the MLLM.
        mllm (`Qwen3VLForConditionalGeneration` or `Qwen3VLMoeForConditionalGeneration`): The frozen MLLM.
        adapter ([`OmniVideo2Adapter`]): Builds the context of `transformer`.
        transformer (`WanTransformer3DModel`, *optional*): The decoder, or the expert for high noise. Without it or the
            VAE the pipeline encodes and thinks.
        text_encoder (`UMT5EncoderModel`, *optional*): Text encoder of the decoder.
        tokenizer (`PreTrainedTokenizerFast`, *optional*): Its tokenizer.
        vae (`AutoencoderKLWan`, *optional*): Wan's VAE.
        scheduler (`UniPCMultistepScheduler`): Or any flow-matching scheduler of diffusers. A shift that it was given
            wins over the presets'.
        adapter_2 ([`OmniVideo2Adapter`], *optional*): Builds the context of `transformer_2`. Default: `adapter`.
        transformer_2 (`WanTransformer3DModel`, *optional*): The expert for low noise.
        boundary_ratio (`float`, *optional*): `transformer` runs at timesteps of at least 1000 times this number,
            `transformer_2` below, as in diffusers' Wan 2.2; `None` for one decoder.
        presets (`dict`, *optional*): Default settings of every task. By default those that the components came with,
            or upstream's.
        scheduler_shift (`float`, *optional*): Shift of the scheduler that the presets belong to.
        prompts (`dict`, *optional*): System prompts `source_caption`, `target_caption` and `features`, and the text
            `negative` of the unconditional branch. Default: the project's own; a converted repository has those of
            its authors.
        mllm_source_size (`str`, defaults to `"as_released"`): Size of a source for the MLLM's states: a thumbnail of
            32x32 as in the released model, or `"full"`, as for its captions.
        frame_stride (`int`, defaults to 3): Distance of the frames of a source that are edited.

    Raises:
        ValueError: for unknown settings, or one of `transformer_2` and `boundary_ratio` without the other.
    """

    model_cpu_offload_seq = "mllm->text_encoder->adapter->adapter_2->transformer->transformer_2->vae"
    _optional_components = [  # noqa: RUF012
        "transformer", "text_encoder", "tokenizer", "vae", "adapter_2", "transformer_2",
    ]  # fmt: skip

    def __init__(
        self,
        processor: OmniVideo2Processor,
        mllm: PreTrainedModel,
        adapter: OmniVideo2Adapter,
        transformer: WanTransformer3DModel | None,
        text_encoder: UMT5EncoderModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        vae: AutoencoderKLWan | None,
        scheduler: SchedulerMixin,
        adapter_2: OmniVideo2Adapter | None = None,
        transformer_2: WanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        presets: dict[str, dict[str, Any]] | None = None,
        scheduler_shift: float | None = None,
        prompts: dict[str, str] | None = None,
        mllm_source_size: str = "as_released",
        frame_stride: int = FRAME_STRIDE,
    ) -> None:
        super().__init__()
        if boundary_ratio is not None and not 0 < boundary_ratio < 1:
            raise ValueError(f"`boundary_ratio` must be between 0 and 1, got {boundary_ratio!r}.")
        if transformer_2 is not None and boundary_ratio is None:
            raise ValueError(
                "`transformer_2` is given, but `boundary_ratio` is None, so it would never run: pass both, such as "
                "`boundary_ratio=0.875`."
            )
        check_numbers(frame_stride=frame_stride)
        self.register_modules(
            processor=processor,
            mllm=mllm,
            adapter=adapter,
            transformer=transformer,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            vae=vae,
            scheduler=scheduler,
            adapter_2=adapter_2,
            transformer_2=transformer_2,
        )
        if not presets:
            presets, scheduler_shift = find_presets(adapter, processor, OMNI_VIDEO_2_PRESETS)
        self.register_to_config(presets=presets, scheduler_shift=scheduler_shift)
        self.register_to_config(
            boundary_ratio=boundary_ratio,
            prompts=complete_prompts(prompts),
            mllm_source_size=check_source_size(mllm_source_size),
            frame_stride=frame_stride,
        )
        self._begin_call()
        register_with_cache_dit(type(self))

    def register_to_config(self, **kwargs: Any) -> None:
        """Set the configuration, as in diffusers; presets are also stored in the components for other pipelines."""
        if kwargs.get("presets"):
            if kwargs.get("scheduler_shift") is None:
                kwargs["scheduler_shift"] = preset_shift(kwargs["presets"], self.scheduler)
            for adapter in (self.adapter, self.adapter_2):
                keep_presets(kwargs["presets"], kwargs["scheduler_shift"], adapter, self.processor)
        super().register_to_config(**kwargs)

    @property
    def grid(self) -> LatentGrid:
        """Sizes of latents and tokens, from the configurations of the components."""
        self._require("vae", "transformer")
        return LatentGrid(
            spatial=self.vae.config.scale_factor_spatial,
            temporal=self.vae.config.scale_factor_temporal,
            patch=tuple(self.transformer.config.patch_size),
            source_patch=tuple(self.adapter.config.visual_context_patch_size),
            positions=self.transformer.config.rope_max_seq_len,
        )

    def _check_can_generate(self, task: str | None) -> None:
        """Refuse to generate without the parts for it, or with a scheduler that does not fit."""
        super()._check_can_generate(task)
        if task != "understand" and self.config.boundary_ratio is not None:
            self._require("transformer_2")

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
        think: bool = True,
        thought: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        batch_guidance: bool = False,
        source_guidance_scale: float | None = None,
        flow_shift: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | list[torch.Tensor] | None = None,
        negative_prompt_embeds: torch.Tensor | list[torch.Tensor] | None = None,
        mllm_hidden_states: torch.Tensor | list[torch.Tensor] | None = None,
        negative_mllm_hidden_states: torch.Tensor | list[torch.Tensor] | None = None,
        source_latents: torch.Tensor | None = None,
        mllm_source_size: str | None = None,
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
        Generate or edit.

        Args:
            prompt (`str` or `list[str]`): Prompt or edit instruction.
            video: Video to edit: path, URL, `VideoClip`, list of PIL images or arrays, or an array or tensor; or a
                list of videos, one per prompt. A single video is used for all prompts.
            image: refused: this model takes videos.
            task (`str`, *optional*): `t2v`, `v2v`, or `understand`, in which the MLLM answers the prompt in text. By
                default `v2v` with a source, else `t2v`.
            negative_prompt (`str` or `list[str]`, *optional*): Text of the unconditional branch. By default the text
                `negative` of the pipeline's `prompts`. Both branches contain the source.
            think (`bool`, defaults to `True`): Whether the MLLM first writes a description of the video, as the
                released model does, see [`think`]; its text embedding is a part of the context.
            thought (`OmniVideoThought`, `str`, `dict` or list, *optional*): A description instead of a new one, one
                or one per prompt.
            height, width (`int`, *optional*): Size in pixels. By default that of the preset, turned for a portrait
                source. The centre of the source is cropped to this shape.
            num_frames (`int`, *optional*): Number of frames, `4n+1` with Wan's VAE.
            fps (`float`, *optional*): Frames per second of the output; a source is resampled to it. By default every
                `frame_stride`-th frame of a source is edited, and the rate is the source's divided by that.
            num_inference_steps (`int`, *optional*): Number of denoising steps.
            guidance_scale (`float`, *optional*): `uncond + scale * (cond - uncond)`, which is also upstream's scale.
                At most 1 turns guidance off.
            guidance_interval, batch_guidance, source_guidance_scale: as in [`OmniVideoPipeline`].
            flow_shift (`float`, *optional*): Shift of the scheduler's sigmas towards noise.
            num_videos_per_prompt (`int`, defaults to 1): Samples per prompt.
            generator (`torch.Generator` or list, *optional*): One for all samples, or one per sample.
            latents (`torch.Tensor`, *optional*): `[batch, channels, frames, height, width]` initial noise.
            prompt_embeds, negative_prompt_embeds (*optional*): Text embeddings, `[batch, length, width]` or one
                `[length, width]` per prompt, instead of running the text encoder; nothing is thought then.
            mllm_hidden_states, negative_mllm_hidden_states (*optional*): States of the MLLM, `[batch, length, width]`
                or one `[length, width]` per prompt, instead of running it.
            source_latents (`torch.Tensor`, *optional*): Normalised latents `[batch, channels, frames, height, width]`
                of the source, instead of encoding `video`.
            mllm_source_size (`str`, *optional*): Size of the source for the MLLM in this call, see the class.
            max_new_tokens (`int`, defaults to 512): Maximum length of each text of a thought, in tokens.
            max_sequence_length (`int`, defaults to 512): Maximum length of a text for the text encoder, in tokens.
            context_overflow (`str`, defaults to `"error"`): What to do with a context or text that is too long:
                `"error"`, or `"truncate"` to cut its end as upstream does, the source first.
            max_context_length (`int`, *optional*): Maximum length of the context.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): Whether to return an [`OmniVideoPipelineOutput`] or a tuple.
            attention_kwargs (`dict`, *optional*): Passed to the decoder's attention processors; `scale` multiplies the
                LoRA of all parts during the call.
            callback_on_step_end (*optional*): Called as `callback(pipe, step, timestep, tensors)` after every step.
            callback_on_step_end_tensor_inputs: Tensors it gets: `latents`, and `context` and `null_context` of the
                running expert.

        Returns:
            [`OmniVideoPipelineOutput`]; `settings["thought"]` holds the thoughts.

        Raises:
            ValueError: for inputs that do not go together, sizes off the latent grid, or a source too long for the
                context. Nothing is cut, resized or replaced without a note or a warning.
        """
        # 1. Checks, before anything runs
        if image is not None:
            raise ValueError("`image` is given, but Omni-Video 2 takes videos only: pass `video`.")
        task = self._check_task(task, video, source_latents)
        self._begin_call(attention_kwargs=attention_kwargs)
        guidance = Guidance(guidance_interval, batch_guidance)
        self._check_can_generate(task)
        check_source_size(mllm_source_size or self.config.mllm_source_size)
        callback_on_step_end_tensor_inputs = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(
            prompt=prompt,
            video=video,
            image=None,
            task=task,
            negative_prompt=negative_prompt,
            num_frames=num_frames,
            numbers={
                "height": height,
                "width": width,
                "fps": fps,
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "source_guidance_scale": source_guidance_scale,
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
            reference_latents=None,
            num_videos_per_prompt=num_videos_per_prompt,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        prompts = [prompt] if isinstance(prompt, str) else prompt
        batch_size = len(prompts) if prompts is not None else len(cast("Sized", mllm_hidden_states))
        thoughts = None if thought is None else as_thoughts(thought, batch_size)
        notes, (generator, seed) = list[str](), seeded_generator(generator)

        # 2. Source and settings
        if get_task(task).answers_in_text:
            if prompts is None:
                raise ValueError(f"Task {task!r} needs `prompt`, the question.")
            answers = self.answer(prompts, video, max_new_tokens)
            asked = {"task": task, "max_new_tokens": max_new_tokens, "seed": seed}
            return self._output(return_dict, text=answers, task=task, settings=asked)
        room = self._least_source_room(max_context_length) if context_overflow == "error" else None
        videos = None
        if video is not None:
            frames = num_frames or self._preset(task)["num_frames"]
            numbers = self.processor.frame_numbers
            videos = load_edit_videos(video, batch_size, numbers, frames, fps, self.config.frame_stride)
        settings, videos = self.prepare_video_settings(
            task, videos, height, width, num_frames, fps, num_inference_steps, guidance_scale, flow_shift,
            source_latents, notes, room, max_context_length,
        )  # fmt: skip
        self._guidance_scale = settings.guidance_scale
        guidance = guidance.with_source_scale(source_guidance_scale, task, settings.guidance_scale)

        # 3. MLLM, text encoder, source: one after the other, so that with `enable_model_cpu_offload` only one of them
        # is on the device
        if think and thoughts is None and prompt_embeds is None:
            thoughts = self._think(cast("list[str]", prompts), videos, max_new_tokens=max_new_tokens)
        if mllm_hidden_states is None:
            mllm_hidden_states = check_result(self.encode_instruction(prompts, videos, mllm_source_size), "The MLLM")
        if prompt_embeds is None:
            texts = self.encode_texts(
                cast("list[str]", prompts), thoughts, task == "v2v", max_sequence_length, context_overflow
            )
            prompt_embeds = check_result(texts, "The text encoder")
        if self.do_classifier_free_guidance and negative_prompt_embeds is None:
            negative = self.config.prompts["negative"] if negative_prompt is None else negative_prompt
            negatives = [negative] if isinstance(negative, str) else negative
            negative_prompt_embeds = self.encode_prompt(negatives, max_sequence_length, context_overflow)
        if videos is not None and source_latents is None:
            source_latents = check_result(self.encode_videos(videos, settings), "The VAE's encoder")
        if context_overflow == "truncate":
            notes += self._note_of_cut(mllm_hidden_states, prompt_embeds, source_latents, max_context_length)

        # 4. Contexts of all branches, for each expert from its own adapter
        contexts, contexts_2 = self.encode_contexts(
            mllm_hidden_states,
            prompt_embeds,
            negative_mllm_hidden_states,
            negative_prompt_embeds if self.do_classifier_free_guidance else None,
            source_latents,
            with_no_source=bool(guidance.source_scale),
            num_videos_per_prompt=num_videos_per_prompt,
            context_overflow=context_overflow,
            max_context_length=max_context_length,
        )

        # 5. Noise and schedule, denoise
        device = self._execution_device
        scheduler = self.prepare_scheduler(settings.num_inference_steps, settings.flow_shift, device)
        latents = self.prepare_latents(batch_size * num_videos_per_prompt, settings, generator, latents, device)
        latents = self.denoise(
            latents, scheduler, contexts, contexts_2, without_lora_scale(attention_kwargs), callback_on_step_end,
            callback_on_step_end_tensor_inputs, guidance, settings.guidance_scale, generator,
        )  # fmt: skip

        # 6. Pixels
        pixels = latents if output_type == "latent" else self.decode(latents, output_type)
        for note in notes:
            logger.warning(note)
        return self._output(
            return_dict,
            frames=pixels,
            task=task,
            fps=settings.fps,
            settings=settings.to_dict()
            | {"scheduler": type(scheduler).__name__, "negative_prompt": negative_prompt, "prompt": prompt}
            | {"guidance_interval": guidance_interval, "batch_guidance": guidance.batched, "seed": seed}
            | {"source_guidance_scale": source_guidance_scale}
            | {"mllm_source_size": mllm_source_size or self.config.mllm_source_size}
            | {"thought": None if thoughts is None else plain_thoughts(thoughts, isinstance(prompt, str))},
            notes=notes,
            thought=None if thoughts is None else [thought.text for thought in thoughts],
        )


__all__ = ["OmniVideo2Pipeline"]
