"""The diffusers pipeline of Omni-Video: generate, edit and understand videos and images with one object."""

from collections.abc import Callable, Sequence, Sized
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, SchedulerMixin, WanTransformer3DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, UMT5EncoderModel

from ..media.sources import Source
from ..models.connectors import ContextOverflow, OmniVideoAdapter
from ..models.modeling_omni_video import OmniVideoForConditionalGeneration
from ..models.source_channels import with_source_channels
from ..processing.processing_omni_video import OmniVideoProcessor
from ..tasks import find_task, get_task
from ..utils.turns import OwnRandomNumbers, in_turn
from .denoising import OmniVideoDenoisingMixin, callback_inputs, register_with_cache_dit, whole_call
from .encoders import OmniVideoEncodersMixin, per_prompt
from .guidance import Guidance
from .lora.loader import OmniVideoLoraLoaderMixin, with_lora_scale, without_lora_scale
from .output import OmniVideoPipelineOutput
from .presets import (
    GenerationSettings,
    LatentGrid,
    find_presets,
    keep_presets,
)
from .repository_mixin import OmniVideoRepositoryMixin
from .request import OmniVideoRequestMixin, rows_of
from .request_checks import FiniteLogits, check_numbers, check_result
from .scheduling import prepare_scheduler, preset_shift

logger = logging.get_logger(__name__)


class OmniVideoPipeline(
    OmniVideoRequestMixin,
    OmniVideoEncodersMixin,
    OmniVideoRepositoryMixin,
    OmniVideoDenoisingMixin,
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

    @property
    def video_processor(self) -> VideoProcessor:
        """Converts frames to inputs of the VAE, and its outputs to frames."""
        self._require("vae")
        return VideoProcessor(vae_scale_factor=self.vae.config.scale_factor_spatial)

    def _require(self, *names: str) -> None:
        """Refuse what needs a component that this pipeline was made without."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"This pipeline was created without `{'` and `'.join(missing)}`, so it can only encode and answer. "
                f"Load it with all components, or add them with `pipe.register_modules({missing[0]}=...)`."
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
        guidance = guidance.with_source_scale(source_guidance_scale, task, settings.guidance_scale).with_caches(
            self.transformer, self.do_classifier_free_guidance
        )

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
            negatives = per_prompt(negative_prompt, batch_size)
            negative_prompt_embeds = self.encode_prompt(negatives, max_sequence_length, context_overflow)
        if source.kind is not None:
            encoded = check_result(self.encode_source(source, settings), "The VAE's encoder")
            source_latents, reference_latents = (
                (None, encoded) if get_task(task).latents == "reference_latents" else (encoded, None)
            )

        if context_overflow == "truncate":
            condition = source_latents if source_latents is not None else reference_latents
            notes += self._notes_of_overflow(
                prompts, negative_prompt if self.do_classifier_free_guidance else None,
                [*prompt_embeds, *rows_of(negative_prompt_embeds)],
                0 if condition is None else self.grid.tokens_of_latents(condition.shape[2:]),
                max_sequence_length, max_context_length, output_kind,
            )  # fmt: skip

        # 5. Contexts of all branches; without negative prompt, the adapter takes the stored empty one
        sources = {"source_latents": source_latents, "reference_latents": reference_latents}
        others = {
            "output_kind": output_kind,
            "context_overflow": context_overflow,
            "max_context_length": max_context_length,
        }
        context = check_result(
            self.adapter(vision_tokens, prompt_embeds, **sources, **others), "The adapter"
        ).repeat_interleave(num_videos_per_prompt, dim=0)
        null_context = no_source_context = None
        if self.do_classifier_free_guidance:
            nulls = (null_vision_tokens, negative_prompt_embeds, batch_size, num_videos_per_prompt)
            null_context = self.encode_null_context(*nulls, **sources, **others)
            no_source_context = self.encode_null_context(*nulls, **others) if guidance.source_scale else None

        # 6. Latents and schedule
        scheduler = self.prepare_scheduler(settings.num_inference_steps, settings.flow_shift, device)
        latents = self.prepare_latents(batch_size * num_videos_per_prompt, settings, generator, latents, device)
        # 7. Denoise
        latents = self.denoise(
            latents, scheduler, context, null_context, without_lora_scale(attention_kwargs), callback_on_step_end,
            callback_on_step_end_tensor_inputs, guidance, settings.guidance_scale, generator, no_source_context,
            self.prepare_source_channels(latents, **sources),
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
            | {"source_guidance_scale": source_guidance_scale},
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
            self.transformer.config.out_channels,
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

    def prepare_source_channels(
        self,
        latents: torch.Tensor,
        source_latents: torch.Tensor | None = None,
        reference_latents: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """
        What the decoder takes beside the noisy latents, see [`with_source_channels`].

        Args:
            latents: `[batch, channels, frames, height, width]`, the initial noise.
            source_latents, reference_latents: normalised latents of the source; `latents` may have several samples of
                each.

        Returns:
            `[batch, channels, frames, height, width]`, zeros without a source; `None` for a decoder without source
            channels.

        Raises:
            ValueError: when latents of the source do not fit `latents`.

        Example:
            >>> import torch
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> pipe.prepare_source_channels(torch.zeros(1, 16, 1, 8, 8)) is None  # it takes sources in the context
            True
        """
        if not self.adapter.takes_source_in_channels:
            return None
        source_latents, reference_latents = (
            None if given is None else given.repeat_interleave(max(1, len(latents) // len(given)), dim=0)
            for given in (source_latents, reference_latents)
        )
        return with_source_channels(latents, source_latents, reference_latents)[:, latents.shape[1] :]

    def prepare_scheduler(
        self, num_inference_steps: int, flow_shift: float, device: torch.device | None = None
    ) -> SchedulerMixin:
        """
        Create a scheduler for one call, with the sigmas of the authors' code if its `set_timesteps` accepts sigmas.

        The scheduler of the pipeline is not changed.

        Example:
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> len(pipe.prepare_scheduler(num_inference_steps=4, flow_shift=3.0).timesteps)
            4
        """
        check_numbers(num_inference_steps=num_inference_steps, flow_shift=flow_shift)
        return prepare_scheduler(self.scheduler, num_inference_steps, flow_shift, device)

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _output(self, return_dict: bool, **fields: Any) -> OmniVideoPipelineOutput | tuple:
        output = OmniVideoPipelineOutput(**fields)
        return output if return_dict else (output.frames, output.text)


def seeded_generator(
    generator: torch.Generator | list[torch.Generator] | None,
) -> tuple[torch.Generator | list[torch.Generator], int | list[int] | None]:
    """
    A generator, and the seed that reproduces its numbers.

    Returns:
        The given generator, or a new one with a seed below 2^32 from torch's global generator. The seed is `None` for
        a generator that was used before; a list of generators has a list of seeds.
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


__all__ = ["OmniVideoPipeline"]
