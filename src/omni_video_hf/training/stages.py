"""The table of training stages: trained components, losses, and required components (paper, section 3)."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from ..diffusion.losses import LOSS_NAMES, OmniVideoLossConfig
from ..models.configuration_omni_video import OmniVideoConfig
from ..models.modeling_omni_video import OmniVideoForConditionalGeneration
from ..utils.names import check_known

# Components that can be trained, in the order of the data flow.
PARTS = ("text_head", "vision_head", "adapter", "visual_context_adapter", "decoder")
# Losses that train a component. If the weights of all of them are 0, it stays frozen and may be missing.
LOSSES_OF = {
    "text_head": ("answer",),
    "vision_head": ("alignment", "text_alignment", "flow_matching"),
    "adapter": ("text_alignment", "flow_matching"),
    "visual_context_adapter": ("flow_matching",),
    "decoder": ("flow_matching",),
}


@dataclass(frozen=True)
class Stage:
    """
    A stage of training.

    Args:
        trains: trained components, names of `PARTS`; all others are frozen.
        losses: minimised losses, names of `LOSS_NAMES`; all others have weight 0.
        lora: train LoRA layers instead of weights.
        about: one sentence that describes the stage.

    Example:
        >>> from omni_video_hf.training import STAGES
        >>> STAGES["lora"].lora
        True
    """

    trains: tuple[str, ...]
    losses: tuple[str, ...]
    about: str
    lora: bool = False

    def loss_config(self, options: Mapping[str, Any] | None = None) -> OmniVideoLossConfig:
        """
        The losses of this stage, with `options` (fields of [`OmniVideoLossConfig`]) in place of its defaults.

        Example:
            >>> from omni_video_hf.training import STAGES
            >>> STAGES["align"].loss_config().flow_matching_weight
            0.0
        """
        options = dict(options or {})
        check_known("losses", options, [field.name for field in fields(OmniVideoLossConfig)])
        weights = {f"{name}_weight": float(name in self.losses) for name in LOSS_NAMES}
        return OmniVideoLossConfig(**(weights | options))


STAGES = {
    "align": Stage(
        trains=("text_head", "vision_head"),
        losses=("answer", "alignment"),
        about="Paper, stage 1: the MLLM learns to request images, and its visual tokens to describe them.",
    ),
    "connect": Stage(
        trains=("adapter",),
        losses=("flow_matching",),
        about="Paper, stage 2: the adapter learns to project visual tokens into the decoder's condition space.",
    ),
    "joint": Stage(
        trains=("text_head", "vision_head", "adapter", "decoder"),
        losses=("answer", "alignment", "flow_matching"),
        about="Paper, stage 3: everything but the body of the MLLM, on better data.",
    ),
    "decoder": Stage(
        trains=("visual_context_adapter", "decoder"),
        losses=("flow_matching",),
        about="The authors' released fine-tuning: decoder and visual context adapter.",
    ),
    "understand": Stage(
        trains=("text_head",),
        losses=("answer",),
        about="Questions with answers only: the text head of the MLLM learns to answer; nothing is generated.",
    ),
    "lora": Stage(
        trains=(),
        losses=("answer", "alignment", "flow_matching"),
        about="LoRA layers in MLLM, vision head, adapter and decoder.",
        lora=True,
    ),
}


def get_stage(name: str) -> Stage:
    """Look a stage of `STAGES` up by its name; a `ValueError` proposes the nearest name."""
    check_known("stage", [name], STAGES)
    return STAGES[name]


def stage_config(config: OmniVideoConfig, losses: OmniVideoLossConfig, precomputed: bool) -> OmniVideoConfig:
    """
    Remove the components that no loss uses from the configuration, so that they are not loaded.

    Args:
        precomputed: whether the data contain `mllm_hidden_states`, so that only text answers need the MLLM.
    """
    config = copy.deepcopy(config)
    config.enable_mllm = not precomputed or losses.answer_weight > 0
    if losses.flow_matching_weight == 0:
        config.decoder_config = None
        if losses.text_alignment_weight == 0:
            config.adapter_config = None
    return config


def part_modules(model: OmniVideoForConditionalGeneration) -> dict[str, nn.Module | None]:
    """The modules behind the names of `PARTS`; `None` for one that the model does not have."""
    return {
        "text_head": model.get_output_embeddings(),
        "vision_head": model.vision_head,
        "adapter": model.adapter,
        "visual_context_adapter": None if model.adapter is None else model.adapter.visual_context_adapter,
        "decoder": model.decoder,
    }


def freeze_all_but(model: OmniVideoForConditionalGeneration, stage: Stage, losses: OmniVideoLossConfig) -> list[str]:
    """
    Freeze all parameters except those of the stage.

    A component that no loss uses stays frozen: the text head without answers, the decoder without flow matching. With
    tied embeddings the text head is also the token embedding. A LoRA stage trains the existing LoRA layers (see
    `lora.add_lora`). The visual context adapter stays frozen if sources reach the decoder only in its
    channels.

    Returns:
        Names of the trained parameters.

    Raises:
        ValueError: if the model lacks a component of the stage, or if no parameter would be trained.
    """
    if not stage.lora:
        model.requires_grad_(False)
        modules = part_modules(model)
        for name in stage.trains:
            if not _is_reached(name, losses):
                continue
            module = modules[name]
            if module is None:
                raise ValueError(
                    f"The stage trains the {name}, which this model does not have: load it whole, or choose another "
                    f"`stage` ({', '.join(STAGES)})."
                )
            module.requires_grad_(True)
        is_used = model.adapter is None or model.adapter.takes_source_in_context
        if model.adapter is not None and not (is_used and _is_reached("visual_context_adapter", losses)):
            model.adapter.visual_context_adapter.requires_grad_(False)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(
            "Nothing would train: "
            + ("add LoRA layers first (`add_lora`)." if stage.lora else "the weights of all its losses are 0.")
        )
    return trained


def _is_reached(part: str, losses: OmniVideoLossConfig) -> bool:
    return any(losses.weight(name) > 0 for name in LOSSES_OF[part])


def cast_frozen(model: OmniVideoForConditionalGeneration, dtype: torch.dtype) -> None:
    """
    Cast frozen weights to another dtype, except modules that the decoder needs in float32.

    Trained weights stay in float32, because bf16 would lose small updates, as with a learning rate of 3e-6.
    """
    kept = () if model.decoder is None else tuple(model.decoder._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        is_kept = name.startswith("decoder.") and any(part in name for part in kept)
        if not parameter.requires_grad and not is_kept:
            parameter.data = parameter.data.to(dtype)


def part_of(name: str) -> str:
    """The component in `PARTS` (or `"mllm"`) of the parameter `name`, for learning rates."""
    if name.startswith("adapter.visual_context_adapter."):
        return "visual_context_adapter"
    part = name.split(".", 1)[0]
    return part
