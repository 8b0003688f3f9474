"""The diffusers pipeline of Omni-Video: generate, edit and understand videos and images with one object."""

from collections.abc import Callable, Sequence, Sized
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, SchedulerMixin, WanTransformer3DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import logging
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, UMT5EncoderModel

from ..media.sources import Source
from ..models.connectors import ContextOverflow, OmniVideoAdapter
from ..models.modeling_omni_video import OmniVideoForConditionalGeneration
from ..processing.processing_omni_video import OmniVideoProcessor
from ..tasks import find_task, get_task
from ..utils.turns import OwnRandomNumbers, in_turn
from .denoising import OmniVideoDenoisingMixin, callback_inputs, register_with_cache_dit, whole_call
from .encoders import OmniVideoEncodersMixin, per_prompt
from .guidance import Guidance
from .lora.loader import OmniVideoLoraLoaderMixin, with_lora_scale, without_lora_scale
from .presets import (
    LatentGrid,
    find_presets,
    keep_presets,
)
from .request import OmniVideoRequestMixin, rows_of
from .request_checks import FiniteLogits, check_result
from .scheduling import check_schedule, given_levels, preset_shift
from .shared.output import OmniVideoPipelineOutput
from .shared.repository_mixin import OmniVideoRepositoryMixin
from .shared.steps import OmniVideoStepsMixin, seeded_generator
from .shared.streaming import OmniVideoStreamMixin, chunks_joined
from .shared.thinking import OmniVideoThinkingMixin, thinks_first

logger = logging.get_logger(__name__)


class OmniVideoPipeline(
    OmniVideoRequestMixin,
    OmniVideoEncodersMixin,
    OmniVideoThinkingMixin,
    OmniVideoRepositoryMixin,
    OmniVideoDenoisingMixin,
    OmniVideoStreamMixin,
    OmniVideoStepsMixin,
    DiffusionPipeline,
    OmniVideoLoraLoaderMixin,
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

    Example:
        >>> from omni_video_hf import OmniVideoPipeline
        >>> from omni_video_hf.shapes import CHECKPOINT
        >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
        >>> sorted(pipe.config.presets)
        ['i2i', 'i2v', 't2i', 't2v', 'v2v']
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
        """Set the configuration, as in diffusers; presets are also stored in the components for other pipelines."""
        if kwargs.get("presets"):
            if kwargs.get("scheduler_shift") is None:
                kwargs["scheduler_shift"] = preset_shift(kwargs["presets"], self.scheduler)
            keep_presets(kwargs["presets"], kwargs["scheduler_shift"], self.adapter, self.processor)
        super().register_to_config(**kwargs)

    @property
    def grid(self) -> LatentGrid:
        """Sizes of latents and tokens, from the configurations of the components."""
        self._require("vae", "transformer")
        return LatentGrid(
            spatial=self.vae.config.scale_factor_spatial,
            temporal=self.vae.config.scale_factor_temporal,
            patch=tuple(self.transformer.config.patch_size),
            source_patch=tuple(self.adapter.config.visual_context_patch_size)
            if self.adapter.takes_source_in_context
            else None,
            positions=self.transformer.config.rope_max_seq_len,
        )

    # --- the call ---------------------------------------------------------------------------------------------------

    @thinks_first
    @chunks_joined
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
        source_guidance_scale: float | None = None,
        flow_shift: float | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
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
        long_video: Literal["windows", "chunks"] | None = None,
        window_frames: int | None = None,
        window_overlap: int | None = None,
        first_frames: torch.Tensor | None = None,
        think: bool = False,  # noqa: ARG002 - `thinks_first` uses it
        thought: Any = None,  # noqa: ARG002 - `thinks_first` uses it
        callback_on_step_end: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> OmniVideoPipelineOutput | tuple:
        r"""
        Generate, edit or answer.

        Args:
            prompt (`str` or `list[str]`): Prompt, edit instruction, or question.
            video: Video to edit or ask about: path, URL, `VideoClip`, list of PIL images or arrays, or
                `[frames, height, width, 3]` array or `[frames, 3, height, width]` tensor; or a list of videos, one per
                prompt. A single video is used for all prompts.
            image: Image to edit, animate or ask about, or a list, one per prompt.
            task (`str`, *optional*): `t2i`, `t2v`, `i2i`, `v2v`, `i2v` or `understand`. By default the MLLM decides:
                it answers in text, or requests a generation; a source image then means `i2i`, a source video `v2v`.
            negative_prompt (`str` or `list[str]`, *optional*): Prompt of text encoder and MLLM in the unconditional
                branch, may be empty. By default the stored unconditional branch of the checkpoint is used. Both
                contain the source.
            height, width (`int`, *optional*): Size in pixels. Edits keep the size of their source, rounded to the
                latent grid; `i2v` has the aspect ratio of its image and the area of the preset; all other tasks use
                the size of the preset.
            num_frames (`int`, *optional*): Number of frames, `4n+1` with Wan's VAE. With a source video: that many
                frames at equal distances, or, together with `fps`, from its start.
            fps (`float`, *optional*): Frames per second of the output; a source video is resampled to it. For frames
                without a rate, such as a list of images, it is their rate.
            num_inference_steps (`int`, *optional*): Number of denoising steps.
            guidance_scale (`float`, *optional*): `uncond + scale * (cond - uncond)`, upstream's scale plus one. At
                most 1 turns guidance off.
            guidance_interval (`tuple[float, float]`, *optional*): Fractions of the steps between which guidance is
                on, e.g. `(0.1, 0.8)`; outside, one branch runs instead of two. All steps by default.
            batch_guidance (`bool`, defaults to `False`): Run both branches in one pass of twice the batch: the same
                numbers up to rounding, more memory, faster where a pass leaves the device idle.
            source_guidance_scale (`float`, *optional*): Above 1, the result stays closer to the source: a third branch
                without source and instruction runs in every guided step, and the velocity is `v(none) +
                source_guidance_scale * (v(source) - v(none)) + guidance_scale * (v(source, instruction) - v(source))`
                (InstructPix2Pix, arXiv 2211.09800, section 3.2.1). Off by default, which is the same as 1. It needs
                a model that was trained with source dropout, a task with a source, and guidance.
            flow_shift (`float`, *optional*): Shift of the scheduler's sigmas towards noise. By default the one that
                the scheduler was given, see [`OmniVideoPipeline`], or else the preset's.
            sigmas, timesteps (`list[float]`, *optional*): Noise levels of the steps, one of the two: sigmas in 0..1
                before the shift, or timesteps in 0..1000 that are used as they are, e.g. of a few-step model.
            num_videos_per_prompt (`int`, defaults to 1): Samples per prompt.
            generator (`torch.Generator` or list, *optional*): One for all samples, or one per sample. Answers of the
                MLLM are sampled from the first one's seed. By default one with a new seed, which `settings["seed"]`
                of the output names: `torch.Generator().manual_seed(seed)` repeats the call bit by bit.
            latents (`torch.Tensor`, *optional*): `[batch, channels, frames, height, width]` initial noise.
            prompt_embeds, negative_prompt_embeds (*optional*): Text embeddings, `[batch, length, width]` or one
                `[length, width]` per prompt, instead of running the text encoder.
            mllm_hidden_states, negative_mllm_hidden_states (*optional*): Hidden states of the MLLM,
                `[batch, length, width]` or one `[length, width]` per prompt, instead of running it. Need `task`.
            source_latents, reference_latents (`torch.Tensor`, *optional*): Normalised latents
                `[batch, channels, frames, height, width]` instead of encoding `video` or `image`.
            mllm_frames (`str`, *optional*): Frames of a `v2v` source for the MLLM: `"first"`, the first frame only, as
                in the authors' code, or `"all"`, as many as the processor samples. Default: setting of the processor.
            max_new_tokens (`int`, defaults to 512): Maximum length of an answer of the MLLM, in tokens.
            max_sequence_length (`int`, defaults to 512): Maximum length of a prompt for the text encoder, in tokens.
            context_overflow (`str`, defaults to `"error"`): What to do with a context or prompt that is too long:
                `"error"`, or `"truncate"` to cut its end as upstream does.
            max_context_length (`int`, *optional*): Maximum length of the context; raise it above that of the training
                for larger or longer sources.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): Whether to return an [`OmniVideoPipelineOutput`] or a tuple
                `(frames, text)`.
            attention_kwargs (`dict`, *optional*): Passed to the decoder's attention processors; `scale` multiplies the
                LoRA of all parts during the call.
            long_video (`str`, *optional*): How a video is generated that is longer than a window: `"windows"` denoises
                overlapping windows together, each with its own part of the source; `"chunks"` generates chunks one
                after the other, each beginning with the end of the last, see [`stream`]. Default: all at once.
            window_frames (`int`, *optional*): Frames of a window or chunk, `4n+1`. Default: those of the preset, which
                the model was trained with. A video that fits one window is generated as without `long_video`.
            window_overlap (`int`, *optional*): Frames that two neighbours share, a multiple of 4. Default: about
                half of a window.
            first_frames (`torch.Tensor`, *optional*): `[batch, frames, 3, height, width]` in 0..1, `4n+1` frames that
                the result begins with, such as the end of another video. The result shows them as the VAE does.
            think (`bool`, defaults to `False`): Whether the MLLM first says plainly what the prompt asks for, see
                [`think`]; the video is then generated from that, and `settings["thought"]` of the output keeps it.
            thought (`OmniVideoThought`, `str`, `dict` or list, *optional*): A thought instead of a new one, one or one
                per prompt, such as that of another call.
            callback_on_step_end (*optional*): Called as `callback(pipe, step, timestep, tensors)` after every step.
                The pipeline's components can be used in it, but no other call can begin on the pipeline or decoder.
            callback_on_step_end_tensor_inputs: Tensors it gets: `latents`, `context`, `null_context`; the latter two
                as `prompt_embeds` and `negative_prompt_embeds` as well.

        Returns:
            [`OmniVideoPipelineOutput`]

        Raises:
            ValueError: for inputs that do not go together, sizes off the latent grid, or a source too long for the
                context. Nothing is cut, resized or replaced without a note or a warning.

        Example:
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> output = pipe("a big red circle on a white background", task="t2i", num_inference_steps=2)
            >>> output.frames[0][0].size
            (64, 64)
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
                "source_guidance_scale": source_guidance_scale,
                "flow_shift": flow_shift,
                "max_new_tokens": max_new_tokens,
                "max_sequence_length": max_sequence_length,
                "max_context_length": max_context_length,
                "window_frames": window_frames,
                "window_overlap": window_overlap,
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
        long = self.resolve_long_video(task, long_video, window_frames, window_overlap)
        num_inference_steps = check_schedule(self.scheduler, num_inference_steps, sigmas, timesteps)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        batch_size = len(prompts) if prompts is not None else len(cast("Sized", mllm_hidden_states))
        notes, answers, (generator, seed) = list[str](), None, seeded_generator(generator)

        # 2. Source and task. For an answer only the frames that the MLLM sees are decoded.
        source = Source.of(video, image, batch_size)
        if task is None or get_task(task).answers_in_text:
            task, answers = self.answer(prompts, source, task, max_new_tokens, generator)
            if get_task(task).answers_in_text:
                asked = {"task": task, "max_new_tokens": max_new_tokens, "seed": seed}
                return self._output(return_dict, text=answers, task=task, settings=asked)
            self._check_can_generate(task)
            long = self.resolve_long_video(task, long_video, window_frames, window_overlap)
        room = self._source_room(
            task, prompts, negative_prompt, prompt_embeds, negative_prompt_embeds, guidance_scale, max_sequence_length,
            max_context_length,
        ) if source.kind is not None and context_overflow == "error" else None  # fmt: skip
        if source.videos is not None:
            self.check_videos_fit(
                source, height, width, num_frames, fps, context_overflow, max_context_length, room, long
            )
            source = source.load(num_frames, fps)

        # 3. Settings
        settings, source = self.prepare_settings(
            task, source, height, width, num_frames, fps, num_inference_steps, guidance_scale, flow_shift,
            source_latents if source_latents is not None else reference_latents, notes, room, max_context_length, long,
        )  # fmt: skip
        windows = self.plan_windows(settings, long, source_latents, callback_on_step_end_tensor_inputs)
        self._check_first_frames(first_frames, settings, batch_size * num_videos_per_prompt)
        self._guidance_scale = settings.guidance_scale
        guidance = guidance.with_source_scale(source_guidance_scale, task, settings.guidance_scale).with_caches(
            self.transformer, self.do_classifier_free_guidance, len(windows)
        )

        # 4. MLLM and vision head, text encoder, source: once per call and one after the other, both branches together,
        # so that with `enable_model_cpu_offload` only one of them is on the device
        device, output_kind = self._execution_device, get_task(task).output
        vision_tokens = check_result(
            self.encode_instruction(task, prompts, source, mllm_hidden_states, mllm_frames), "The MLLM or vision head"
        )
        null_vision_tokens = None
        if self.do_classifier_free_guidance:
            null_vision_tokens = self.encode_null_instruction(
                task, negative_prompt, batch_size, source, negative_mllm_hidden_states, mllm_frames
            )
        if prompt_embeds is None:
            prompt_embeds = check_result(
                self.encode_prompt(prompts, max_sequence_length, context_overflow), "The text encoder"
            )
        if self.do_classifier_free_guidance and negative_prompt is not None:
            negatives = per_prompt(negative_prompt, batch_size)
            negative_prompt_embeds = self.encode_prompt(negatives, max_sequence_length, context_overflow)
        sources = self.encode_sources(task, source, settings, windows, source_latents, reference_latents)

        if context_overflow == "truncate":
            condition = next((latents for latents in sources[0].values() if latents is not None), None)
            notes += self._notes_of_overflow(
                prompts, negative_prompt if self.do_classifier_free_guidance else None,
                [*prompt_embeds, *rows_of(negative_prompt_embeds)],
                0 if condition is None else self.grid.tokens_of_latents(condition.shape[2:]),
                max_sequence_length, max_context_length, output_kind,
            )  # fmt: skip

        # 5. Contexts of all branches; without negative prompt, the adapter takes the stored empty one
        others = {
            "output_kind": output_kind,
            "context_overflow": context_overflow,
            "max_context_length": max_context_length,
        }
        contexts = self.encode_contexts(
            (vision_tokens, prompt_embeds), (null_vision_tokens, negative_prompt_embeds), sources, batch_size,
            num_videos_per_prompt, bool(guidance.source_scale), **others,
        )  # fmt: skip

        # 6. Latents and schedule
        scheduler = self.prepare_scheduler(
            settings.num_inference_steps, settings.flow_shift, device, sigmas, timesteps
        )
        latents = self.prepare_latents(
            batch_size * num_videos_per_prompt, settings, generator, latents, device, windows
        )
        joint = self.prepare_windows(latents, windows, contexts, sources, generator)
        # 7. Denoise
        latents = self.denoise(
            latents, scheduler, contexts["context"][0], contexts.get("null_context", [None])[0],
            without_lora_scale(attention_kwargs), callback_on_step_end, callback_on_step_end_tensor_inputs, guidance,
            settings.guidance_scale, generator, contexts.get("no_source_context", [None])[0], joint=joint,
            first_latents=None if first_frames is None else self._encode_first_frames(first_frames, latents),
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
            | {"guidance_interval": guidance_interval, "batch_guidance": guidance.batched, "seed": seed}
            | {"source_guidance_scale": source_guidance_scale, "long_video": long_video}
            | {name: None if long is None else getattr(long, name) for name in ("window_frames", "window_overlap")}
            | given_levels(sigmas, timesteps),
            notes=notes,
            thought=answers,
        )

    # --- 2. source and task -----------------------------------------------------------------------------------------

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
        Let the MLLM answer, and determine the task from its answer.

        Returns:
            The task, and the answers without special tokens. With `task=None` a `[GEN_VID]` in the answer means a
            video, a `[GEN_IMG]` an image, neither means that the answer is the output (as upstream); the kind of the
            source decides between its two edit tasks.

        Raises:
            ValueError: if the MLLM chooses different tasks for the prompts of one batch.
        """
        inputs = self.processor.apply_task_template(
            task or find_task(None, "text"), prompts, images=source.images, videos=source.videos, return_tensors="pt"
        ).to(self._execution_device)
        seeded = generator[0] if isinstance(generator, list) else generator
        with nullcontext() if seeded is None else OwnRandomNumbers(seeded.initial_seed()):
            ids = self.mllm.generate(
                **inputs, max_new_tokens=max_new_tokens, logits_processor=LogitsProcessorList([FiniteLogits()])
            )[:, inputs["input_ids"].shape[1] :]
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
        """The task that an answer of the MLLM requests."""
        wants_video = bool((ids == self.mllm.config.video_generation_token_id).any())
        wants_image = bool((ids == self.mllm.config.image_generation_token_id).any())
        if not wants_video and not wants_image:
            return find_task(None, "text")
        return find_task(source_kind, "video" if wants_video else "image")


__all__ = ["OmniVideoPipeline"]
