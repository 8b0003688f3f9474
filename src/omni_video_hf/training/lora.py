"""LoRA training: add LoRA layers of peft to components of the model, and save them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig

from ..models.modeling_omni_video import OmniVideoForConditionalGeneration
from ..pipelines.lora.files import METADATA_KEY
from ..pipelines.lora.loader import collect_lora_layers
from ..pipelines.pipeline_omni_video import OmniVideoPipeline
from ..utils.names import check_known
from .arguments import LORA_PARTS, LORA_SETTINGS

ADAPTER_NAME = "default"
# Projections of attention and feed-forward layers, by component; not in the vision tower of the MLLM.
TARGETS = {
    "mllm": r"mllm\.(?!.*vision).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    "vision_head": r"vision_head\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
    "adapter": r"adapter\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
    "decoder": r"decoder\..*\.(to_q|to_k|to_v|to_out\.0|ffn\.net\.0\.proj|ffn\.net\.2)",
}
PATCH_EMBEDDING = r"decoder\.patch_embedding"
DEFAULTS = {"r": 16, "lora_alpha": 16}


def add_lora(model: OmniVideoForConditionalGeneration, settings: Mapping[str, Any] | None = None) -> None:
    """
    Add LoRA layers to a model and freeze all other weights.

    Args:
        model: the model, changed in place.
        settings: fields of [`LoraConfig`] of peft, and `parts`: those of `mllm`, `vision_head`, `adapter`, `decoder`
            that get LoRA layers. Default: all that the model has. `target_modules` is a pattern for names in the whole
            model. Without it, a decoder with source channels also trains its patch embedding, by LoRA layers of full
            rank that can express every change of its weights.

    Raises:
        ValueError: for unknown settings, and for parts that are unknown or that the model does not have.
    """
    settings = dict(settings or {})
    check_known("lora", settings, LORA_SETTINGS)
    present = [part for part in LORA_PARTS if getattr(model, part) is not None]
    parts = settings.pop("parts", present)
    check_known("lora.parts", parts, LORA_PARTS)
    missing = [part for part in parts if part not in present]
    if missing:
        raise ValueError(f"`lora.parts` has {', '.join(missing)}, but this model has only {present}.")
    if "target_modules" not in settings:
        settings["target_modules"] = "|".join(TARGETS[part] for part in parts)
        if "decoder" in parts and model.adapter is not None and model.adapter.takes_source_in_channels:
            settings |= _whole_patch_embedding(model, settings["target_modules"])
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(**(DEFAULTS | settings)), adapter_name=ADAPTER_NAME)


def _whole_patch_embedding(model: OmniVideoForConditionalGeneration, targets: str) -> dict[str, Any]:
    """Settings with which the decoder's patch embedding gets matrices that any change of it is a product of."""
    weight = model.decoder.patch_embedding.weight
    rank = min(weight.shape[0], weight[0].numel())
    return {
        "target_modules": rf"{targets}|{PATCH_EMBEDDING}",
        "rank_pattern": {PATCH_EMBEDDING: rank},
        "alpha_pattern": {PATCH_EMBEDDING: rank},
    }


def checkpoint_metadata(model: OmniVideoForConditionalGeneration) -> dict[str, Any]:
    """Metadata for a checkpoint of the `lora` stage with rank and alpha, so that `load_lora_weights` can read it."""
    layers = collect_lora_layers(model, ADAPTER_NAME)
    settings: dict[str, Any] = {}
    for name, values in layers.items():
        component, is_settings, _ = name.partition("_lora_adapter_metadata")
        settings |= {f"{component}.{key}": value for key, value in values.items()} if is_settings else {}
    return {METADATA_KEY: settings}


def save_lora(model: OmniVideoForConditionalGeneration, folder: Path) -> None:
    """Save the LoRA layers of all components in one file, for `OmniVideoPipeline.load_lora_weights`."""
    OmniVideoPipeline.save_lora_weights(folder, **collect_lora_layers(model, ADAPTER_NAME))
