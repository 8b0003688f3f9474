"""
Omni-Video as one transformers model: MLLM, vision head, adapter, decoder and all losses.

Data flow (figure of the paper):

    prompt, source -> MLLM -> text head   -> answer
                         `--> vision head -> adapter -.
    prompt -> text encoder -----------------------------> context -> decoder -> velocity
    source -> VAE --+-----> visual context adapter ---'
                    `-> source channels, beside the noisy latents -> decoder

Text encoder and VAE are not trained and belong to the pipeline; their outputs come in as tensors.
"""

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import attention_backend
from diffusers.utils.torch_utils import randn_tensor
from transformers import (
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.utils import can_return_tuple

from ..diffusion.flow_matching import (
    NUM_TRAIN_TIMESTEPS,
    add_noise,
    flow_matching_loss,
    token_timesteps,
    velocity_target,
)
from ..diffusion.losses import (
    LOSS_NAMES,
    Generators,
    OmniVideoLossConfig,
    alignment_loss,
    draw_timestep_indices,
    mean_token,
    timestep_tables,
    without_directions,
)
from ..hub.saving import OmniVideoSavingMixin
from ..utils.modules import set_dtype
from .attention_backends import ATTENTION_BACKENDS, missing_package
from .configuration_omni_video import OmniVideoConfig
from .configuration_vila import VilaConfig
from .connectors import (
    ContextOverflow,
    Embeddings,
    OmniVideoAdapter,
    OmniVideoQueryTransformer,
    OmniVideoStoredEmbeddings,
    OmniVideoVisionHead,
    OutputKind,
    pad_embeddings,
)
from .context_attention import folded_context
from .modeling_vila import VilaForConditionalGeneration
from .outputs import OmniVideoOutput
from .source_channels import with_source_channels
from .text_generation import OmniVideoTextMixin

# Component folders of a repository store keys without the prefixes that components have in the whole model.
register_checkpoint_conversion_mapping(
    OmniVideoConfig.model_type,
    [
        WeightRenaming(
            r"^(blocks|condition_embedder|patch_embedding|proj_out|scale_shift_table)(?=$|\.)", r"decoder.\1"
        ),
        WeightRenaming(
            r"^(query_transformer|visual_context_adapter|marker_embeds|null_prompt_embeds)(?=$|\.)", r"adapter.\1"
        ),
    ],
    overwrite=True,
)


class OmniVideoPreTrainedModel(PreTrainedModel):
    """Weight initialisation and capabilities of Omni-Video."""

    config: OmniVideoConfig
    config_class = OmniVideoConfig
    # The MLLM without its head, where trainers look for hidden states: see the property.
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "video", "text")
    output_modalities = ("text",)
    supports_gradient_checkpointing = True
    # A diffusion loss is a mean over samples, so Trainer must not rescale it by token counts.
    accepts_loss_kwargs = False
    _no_split_modules = (
        "OmniVideoEncoderLayer",
        "OmniVideoDecoderLayer",
        "OmniVideoVisualContextAdapter",
        "WanTransformerBlock",
    )
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        std = self.config.vision_head_config.initializer_range
        name = type(module).__name__
        if isinstance(module, OmniVideoQueryTransformer):
            init.normal_(module.query_tokens, std=std)
        elif isinstance(module, OmniVideoStoredEmbeddings):
            init.normal_(module.weight, std=std)
        elif name in ("WanTransformerBlock", "WanTransformer3DModel"):
            init.normal_(module.scale_shift_table, std=module.scale_shift_table.shape[-1] ** -0.5)
        elif name == "WanRotaryPosEmbed":
            # Non-persistent tables, created on the meta device by `from_pretrained`, must be filled here.
            with torch.device("cpu"):
                fresh = type(module)(module.attention_head_dim, module.patch_size, module.max_seq_len)
            for buffer_name, buffer in fresh.named_buffers():
                init.copy_(getattr(module, buffer_name), buffer)

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel, state_dict: Any, checkpoint_files: list[str] | None, load_config: Any, **kwargs: Any
    ) -> Any:
        # For weights that stay on the disk, transformers looks for all files of an index in the folder of the first
        # one. Ours are in several folders, so the index gets full paths.
        if checkpoint_files and load_config.sharded_metadata:
            weight_map = load_config.sharded_metadata["weight_map"]
            paths = {
                name: file for name in set(weight_map.values()) for file in checkpoint_files if file.endswith(name)
            }
            weight_map.update({name: paths[file] for name, file in weight_map.items()})
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, **kwargs)


class OmniVideoForConditionalGeneration(
    OmniVideoTextMixin, OmniVideoSavingMixin, OmniVideoPreTrainedModel, GenerationMixin
):
    """
    MLLM, vision head, adapter and decoder.

    With a configuration without adapter and decoder, the model is the `mllm` component of a pipeline: it answers
    questions and encodes instructions as visual tokens.
    """

    mllm: Any  # of any image-text-to-text class; one of the three that the configuration leaves out is `None`
    adapter: Any
    decoder: Any

    def __init__(self, config: OmniVideoConfig) -> None:
        try:
            super().__init__(config)
        except ImportError as error:
            raise missing_package(error, config._attn_implementation) from error
        set_dtype(config.mllm_config, torch.get_default_dtype())
        if config.tie_word_embeddings:  # said of the whole model, it concerns the MLLM's embedding and head
            config.mllm_config.tie_word_embeddings = True
        if not config.enable_mllm:
            self.mllm = None
        elif isinstance(config.mllm_config, VilaConfig):
            self.mllm = VilaForConditionalGeneration(config.mllm_config)
        else:
            self.mllm = AutoModelForImageTextToText.from_config(config.mllm_config)
        for bridge in (config.vision_head_config, config.adapter_config):
            if bridge is not None and bridge._attn_implementation is None:
                bridge._attn_implementation = config._attn_implementation
        self.vision_head = OmniVideoVisionHead(config.vision_head_config)
        has_adapter, has_decoder = config.adapter_config is not None, config.decoder_config is not None
        decoder: Any = config.decoder_config
        self.adapter = OmniVideoAdapter(**config.adapter_config.adapter_kwargs()) if has_adapter else None
        self.decoder = WanTransformer3DModel(**decoder) if has_decoder else None
        self._pass_on_attn_implementation()
        self.post_init()
        # Weights of components that the configuration leaves out cause no warning.
        left_out = [name for name in ("mllm", "adapter", "decoder") if getattr(self, name) is None]
        self._keys_to_ignore_on_load_unexpected |= {rf"^{name}\." for name in left_out}
        if has_decoder:
            # The decoder's float32 modules by their full names: bare, "norm1" would also match the MLLM's.
            names = set(WanTransformer3DModel._keep_in_fp32_modules)
            self._keep_in_fp32_modules -= names
            self._keep_in_fp32_modules_strict |= {f"decoder.*{name}" for name in names}

    # --- the parts, in the order of the figure ------------------------------------------------------------------

    def get_mllm_hidden_states(self, input_ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """
        Last-layer hidden states of the MLLM over prompt and answer, from one pass.

        Args:
            input_ids: `[batch, length]`; `inputs` are the other outputs of the processor.

        Returns:
            `[batch, length, mllm width]`, behind the final norm.
        """
        outputs = self(input_ids, **inputs, use_cache=False, output_hidden_states=True, logits_to_keep=1)
        return outputs.hidden_states[-1]

    def encode_condition(
        self,
        mllm_hidden_states: Embeddings | None = None,
        prompt_embeds: Embeddings | None = None,
        source_latents: torch.Tensor | None = None,
        reference_latents: torch.Tensor | None = None,
        output_kind: OutputKind = "video",
        context_overflow: ContextOverflow = "error",
        mllm_attention_mask: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        max_context_length: int | None = None,
    ) -> torch.Tensor:
        """
        Build the decoder's context from outputs of the MLLM, the text encoder and the VAE.

        Args:
            mllm_hidden_states: `[batch, length, mllm width]` or a list of `[length, mllm width]`; `None` selects the
                stored states of the empty instruction (unconditional branch).
            prompt_embeds: `[batch, length, text_dim]` or a list of `[length, text_dim]`, real tokens of the text
                encoder; `None` stands for the stored embedding of the empty prompt.
            source_latents: `[batch, channels, frames, height, width]`, normalised latents of the source of an edit.
            reference_latents: `[batch, channels, frames, height, width]`, normalised latents of a reference image.
            output_kind: `"image"` or `"video"`, kind of the output.
            context_overflow: `"error"` or `"truncate"`, see [`OmniVideoAdapter.forward`].
            mllm_attention_mask: `[batch, length]`, 0 at padding of `mllm_hidden_states`.
            prompt_embeds_mask: `[batch, length]`, 0 at padding of `prompt_embeds`.
            max_context_length: limit of this call instead of the configured one.

        Returns:
            `[batch, length, text_dim]`, not padded to `max_context_length`; in a batch of unequal lengths the shorter
            samples end in zeros.

        Raises:
            ValueError: without an adapter, or when the context does not fit.
        """
        self._require("adapter")
        vision_tokens = self.vision_head(mllm_hidden_states, mllm_attention_mask)
        return self.adapter(
            vision_tokens,
            prompt_embeds,
            source_latents=source_latents,
            reference_latents=reference_latents,
            output_kind=output_kind,
            prompt_embeds_mask=prompt_embeds_mask,
            context_overflow=context_overflow,
            max_context_length=max_context_length,
        )

    def predict_velocity(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        source_latents: torch.Tensor | None = None,
        reference_latents: torch.Tensor | None = None,
        drop_source: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        One pass of the decoder.

        Args:
            latents: `[batch, channels, frames, height, width]`, noisy.
            timesteps: `[batch]`, 0..1000, or `[batch, frames]`, one for each latent frame.
            context: `[batch, length, text_dim]` from [`encode_condition`].
            source_latents, reference_latents, drop_source: for a decoder with source channels, see
                [`with_source_channels`]; others do not look at them.

        Returns:
            `[batch, channels, frames, height, width]`

        Raises:
            ValueError: without a decoder, or when latents of the source do not fit `latents`.
        """
        self._require("decoder")
        if self.adapter.takes_source_in_channels:
            latents = with_source_channels(latents, source_latents, reference_latents, drop_source)
        dtype = self.decoder.patch_embedding.weight.dtype
        if timesteps.ndim == 2:
            timesteps = token_timesteps(timesteps, latents, self.decoder.config.patch_size)
        with folded_context(self.decoder, context.to(dtype), self.adapter.config.max_context_length) as folded:
            return self.decoder(latents.to(dtype), timesteps, folded, return_dict=False)[0]

    # --- training -------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mllm_hidden_states: Embeddings | None = None,
        mllm_attention_mask: torch.Tensor | None = None,
        vision_embeds: torch.Tensor | None = None,
        target_features: torch.Tensor | None = None,
        target_prompt_embeds: Embeddings | None = None,
        target_prompt_embeds_mask: torch.Tensor | None = None,
        target_prompt_unsaid: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: Embeddings | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        source_latents: torch.Tensor | None = None,
        reference_latents: torch.Tensor | None = None,
        output_kind: OutputKind | None = None,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        generator: Generators | None = None,
        drop_instruction: torch.Tensor | None = None,
        drop_prompt: torch.Tensor | None = None,
        drop_source: torch.Tensor | None = None,
        loss_config: OmniVideoLossConfig | None = None,
        output_vision_tokens: bool = False,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **mllm_kwargs: object,
    ) -> OmniVideoOutput:
        """
        Compute every loss whose inputs are passed, and their weighted sum.

        Args:
            input_ids: `[batch, length]`, or `inputs_embeds`; runs the MLLM. `attention_mask`, `pixel_values`,
                `position_ids`, `past_key_values`, `logits_to_keep`, `mm_encoder_outputs` (images that
                `get_image_features` has encoded, for `generate`) and `mllm_kwargs` go to it; `labels`
                `[batch, length]`, -100 where nothing is to be learned, give `answer_loss`. Placeholders count as -100.
            mllm_hidden_states: precomputed instead of `input_ids`, with `mllm_attention_mask` `[batch, length]`.
            vision_embeds: `[batch, tokens, text_dim]`, precomputed output of the adapter's `adapt_vision_tokens`, for
                training the decoder with frozen connectors: neither vision head nor adapter runs for a sample.
            target_features: `[batch, vision width]`, features of the target image or video; give `alignment_loss`.
            target_prompt_embeds: `[batch, length, text_dim]` or a list, a text that says what the target shows; give
                `text_alignment_loss`, with `target_prompt_embeds_mask` `[batch, length]`. By default `prompt_embeds`,
                which say that where nothing is edited.
            target_prompt_unsaid: `[batch, directions, text_dim]`, orthonormal rows, rows of zeros where a sample has
                fewer: directions that are projected out before the text alignment loss, for attributes that the text
                does not contain.
            latents: `[batch, channels, frames, height, width]`, normalised latents of the target; give
                `flow_matching_loss`, with `prompt_embeds`, `prompt_embeds_mask`, `source_latents` and
                `reference_latents` as in [`encode_condition`].
            output_kind: kind of the output. Default: `"image"` for latents of one frame, else `"video"`.
            noise: same shape as `latents`. Default: sampled.
            timesteps: `[batch]`, 0..1000, rounded to the nearest timestep of the training table; or `[batch, frames]`,
                one per latent frame. With little noise in the first frame and much in the others, the model learns
                motion from a prompt. Default: sampled.
            generator: generator for noise and timesteps; with one per sample, they do not depend on other samples.
            drop_instruction: `[batch]`, true for samples whose visual tokens are replaced by the stored ones of the
                empty instruction (condition dropout). Alignment losses still use the sample's own tokens.
            drop_prompt: `[batch]`, true for samples whose prompt is replaced by the stored empty one.
            drop_source: `[batch]`, true for samples whose source is left out, in the context and in the channels.
            loss_config: weights and options of the losses. Default: those of the authors' code.
            output_vision_tokens: compute `vision_tokens` even if no loss needs them; with neither `input_ids` nor
                `mllm_hidden_states` those of the empty instruction (unconditional branch).

        Raises:
            ValueError: if the inputs need a component that the model does not have, or do not fit each other.
        """
        config = loss_config or OmniVideoLossConfig()
        draws = latents is not None and config.flow_matching_weight > 0
        aligns = target_features is not None and config.alignment_weight > 0
        if target_prompt_embeds is None:
            target_prompt_embeds, target_prompt_embeds_mask = prompt_embeds, prompt_embeds_mask
        aligns_text = target_prompt_embeds is not None and config.text_alignment_weight > 0
        needs_vision_tokens = output_vision_tokens or aligns or aligns_text or (draws and vision_embeds is None)
        has_states = not (mllm_hidden_states is None and input_ids is None and inputs_embeds is None)
        if vision_embeds is not None and (aligns or aligns_text) and not has_states:
            raise ValueError(
                "Alignment losses need the tokens of the vision head, which `vision_embeds` replaces: pass "
                "`mllm_hidden_states` as well, or set `alignment_weight` and `text_alignment_weight` to 0."
            )
        if output_kind is None:
            output_kind = "image" if latents is not None and latents.shape[2] == 1 else "video"

        mllm_outputs, vision_tokens, velocity = ModelOutput(), None, None
        if input_ids is not None or inputs_embeds is not None:
            self._require("mllm")
            if needs_vision_tokens:
                mllm_kwargs.update(output_hidden_states=True, use_cache=False)
            if mm_encoder_outputs is not None:
                mllm_kwargs["mm_encoder_outputs"] = mm_encoder_outputs
            mllm_outputs = self.mllm(
                input_ids=input_ids,
                attention_mask=attention_mask,
                pixel_values=pixel_values,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=None if labels is None or config.answer_weight == 0 else self.without_placeholders(labels),
                logits_to_keep=logits_to_keep,
                return_dict=True,
                **mllm_kwargs,
            )
            if needs_vision_tokens:
                mllm_hidden_states, mllm_attention_mask = mllm_outputs.hidden_states[-1], attention_mask
        if needs_vision_tokens:
            vision_tokens = self.vision_head(mllm_hidden_states, mllm_attention_mask)

        losses: dict[str, Any] = {"answer": mllm_outputs.get("loss")}
        if aligns:
            losses["alignment"] = alignment_loss(mean_token(vision_tokens), target_features, config.alignment)  # type: ignore[arg-type]  # both are there
        if aligns_text:
            self._require("adapter")
            adapted = self.adapter.adapt_vision_tokens(vision_tokens, output_kind)
            losses["text_alignment"] = _text_alignment(
                adapted, target_prompt_embeds, target_prompt_embeds_mask, target_prompt_unsaid, config
            )
            vision_embeds = adapted if vision_embeds is None else vision_embeds
        if draws:
            context = self._training_context(
                vision_tokens,
                prompt_embeds,
                prompt_embeds_mask,
                drop_instruction,
                drop_prompt,
                vision_embeds=vision_embeds,
                source_latents=source_latents,
                reference_latents=reference_latents,
                drop_source=drop_source,
                output_kind=output_kind,
            )
            sources = {"source_latents": source_latents, "reference_latents": reference_latents}
            losses["flow_matching"], velocity = self._flow_matching(
                latents, context, noise, timesteps, generator, config, drop_source=drop_source, **sources
            )

        terms = [config.weight(name) * loss for name in LOSS_NAMES if (loss := losses.get(name)) is not None]
        return OmniVideoOutput(
            loss=sum(terms) if terms else None,
            answer_loss=losses["answer"],
            alignment_loss=losses.get("alignment"),
            text_alignment_loss=losses.get("text_alignment"),
            flow_matching_loss=losses.get("flow_matching"),
            logits=mllm_outputs.get("logits"),
            past_key_values=mllm_outputs.get("past_key_values"),
            hidden_states=mllm_outputs.get("hidden_states"),
            attentions=mllm_outputs.get("attentions"),
            vision_tokens=vision_tokens,
            velocity=velocity,
        )

    def _training_context(
        self,
        vision_tokens: torch.Tensor | None,
        prompt_embeds: Embeddings | None,
        prompt_embeds_mask: torch.Tensor | None,
        drop_instruction: torch.Tensor | None,
        drop_prompt: torch.Tensor | None,
        vision_embeds: torch.Tensor | None,
        output_kind: OutputKind,
        **sources: torch.Tensor | None,
    ) -> torch.Tensor:
        """The context with the stored null states in place of what is dropped."""
        self._require("adapter")
        if drop_instruction is not None:
            # Computed whether or not a sample of this batch is dropped: with sharded weights every process must run
            # the same modules.
            null = self.vision_head()
            if vision_embeds is None:
                vision_tokens = _where(drop_instruction, null, vision_tokens)  # type: ignore[arg-type]  # the other is there
            else:
                vision_embeds = _where(
                    drop_instruction, self.adapter.adapt_vision_tokens(null, output_kind), vision_embeds
                )
        if drop_prompt is not None and prompt_embeds is not None:
            prompts, mask = pad_embeddings(prompt_embeds, prompt_embeds_mask, "prompt_embeds")
            rows = prompts if mask is None else [row[keep.bool()] for row, keep in zip(prompts, mask, strict=True)]
            null_prompt = self.adapter.null_prompt_embeds().to(prompts)
            prompt_embeds = [
                null_prompt if drop else row for row, drop in zip(rows, drop_prompt.tolist(), strict=True)
            ]
            prompt_embeds_mask = None
        return self.adapter(
            vision_tokens if vision_embeds is None else None,
            prompt_embeds,
            prompt_embeds_mask=prompt_embeds_mask,
            vision_embeds=vision_embeds,
            output_kind=output_kind,
            **sources,
        )

    def _flow_matching(
        self,
        latents: Any,
        context: torch.Tensor,
        noise: torch.Tensor | None,
        timesteps: torch.Tensor | None,
        generator: Generators | None,
        config: OmniVideoLossConfig,
        **sources: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and velocity of noised `latents` under `context`; `sources` as in [`predict_velocity`]."""
        table, weights = (values.to(latents.device) for values in timestep_tables(config))
        if timesteps is None:
            indices = draw_timestep_indices(len(latents), config, generator).to(latents.device)
        else:
            indices = (table - timesteps.to(table)[..., None]).abs().argmin(dim=-1)
        if noise is None:
            noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        timesteps = table[indices]
        noisy = add_noise(latents, noise, timesteps / NUM_TRAIN_TIMESTEPS)
        velocity = self.predict_velocity(noisy, timesteps, context, **sources)
        return flow_matching_loss(velocity, velocity_target(latents, noise), weights[indices]), velocity

    # --- attention implementations --------------------------------------------------------------------------------

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], **kwargs: object) -> None:
        """
        Switch the attention of MLLM, vision head and adapter, and the decoder's backend of the same kind.

        Raises:
            ImportError: when a package is missing; the message names it.
        """
        wanted: Any = attn_implementation
        if isinstance(attn_implementation, dict):
            wanted = attn_implementation.get("mllm_config", self.config.mllm_config._attn_implementation)
        if self.mllm is not None:
            try:
                self.mllm.set_attn_implementation(wanted, **kwargs)
            except ImportError as error:
                raise missing_package(error, wanted) from error
        self.config._attn_implementation = attn_implementation
        self._pass_on_attn_implementation()

    def _pass_on_attn_implementation(self) -> None:
        """The adapter and the decoder are diffusers models: transformers does not reach them by itself."""
        if self.adapter is not None:
            self.adapter.set_attn_implementation(self.config.adapter_config._attn_implementation)
        if self.decoder is not None:
            name = self.config._attn_implementation
            if name not in ATTENTION_BACKENDS:
                raise ValueError(
                    f"`attn_implementation` {name!r} has no counterpart among diffusers' attention backends for the "
                    f"decoder. Use one of {', '.join(ATTENTION_BACKENDS)}."
                )
            backend = ATTENTION_BACKENDS[name]
            if backend == "native" and all(
                p._attention_backend is None for p in self.decoder.attn_processors.values()
            ):
                return  # what diffusers does by itself
            # diffusers also makes the backend the default of the whole process; the context manager puts that back.
            with attention_backend("native"):
                self.decoder.set_attention_backend(backend)

    def _require(self, part: str) -> None:
        if getattr(self, part) is not None:
            return
        if part == "mllm":
            raise ValueError(
                "This model has no mllm (`config.enable_mllm` is False). Pass `mllm_hidden_states`, or load the whole "
                "model."
            )
        raise ValueError(
            f"This model has no {part} (`config.{part}_config` is None): it is the `mllm` component of a pipeline."
            " Load the root of the repository for the whole model."
        )


def _text_alignment(
    adapted: torch.Tensor,
    target_prompt_embeds: Any,
    target_prompt_embeds_mask: torch.Tensor | None,
    target_prompt_unsaid: torch.Tensor | None,
    config: OmniVideoLossConfig,
) -> torch.Tensor:
    """
    Distance between the adapter's tokens and the text embeddings (paper, stage 2).

    The paper does not say how 256 tokens per visual token are compared with a text of any length. Their means are
    compared, as for the visual tokens and the features of the target.
    """
    texts, mask = pad_embeddings(target_prompt_embeds, target_prompt_embeds_mask, "target_prompt_embeds")
    said, wanted = mean_token(adapted), mean_token(texts, mask)
    if target_prompt_unsaid is not None:
        said, wanted = (without_directions(means, target_prompt_unsaid) for means in (said, wanted))
    return alignment_loss(said, wanted, config.alignment)


def _where(dropped: torch.Tensor, null: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """`kept` `[batch, tokens, width]`, and `null` in the place of the samples that are dropped."""
    return torch.where(dropped.to(kept.device)[:, None, None], null.to(kept), kept)


__all__ = ["OmniVideoForConditionalGeneration", "OmniVideoPreTrainedModel"]
