"""Low-rank matrices in every part of the model, by peft."""

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
# Projections of attention and feed-forward layers, part by part; not the MLLM's vision tower.
TARGETS = {
    "mllm": r"mllm\.(?!.*vision).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    "vision_head": r"vision_head\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
    "adapter": r"adapter\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
    "decoder": r"decoder\..*\.(to_q|to_k|to_v|to_out\.0|ffn\.net\.0\.proj|ffn\.net\.2)",
}
DEFAULTS = {"r": 16, "lora_alpha": 16}


def add_lora(model: OmniVideoForConditionalGeneration, settings: Mapping[str, Any] | None = None) -> None:
    """
    Put low-rank matrices into a model; they train, and nothing else does.

    Args:
        settings: fields of peft's [`LoraConfig`], and `parts`: which of `mllm`, `vision_head`, `adapter`, `decoder`
            get matrices, by default all that the model has. `target_modules` is a pattern over the whole model's
            names.

    Raises:
        ValueError: for unknown settings, and parts that are unknown or not there.
    """
    settings = dict(settings or {})
    check_known("lora", settings, LORA_SETTINGS)
    present = [part for part in LORA_PARTS if getattr(model, part) is not None]
    parts = settings.pop("parts", present)
    check_known("lora.parts", parts, LORA_PARTS)
    missing = [part for part in parts if part not in present]
    if missing:
        raise ValueError(f"`lora.parts` names {', '.join(missing)}, which this model does not have ({present}).")
    settings.setdefault("target_modules", "|".join(TARGETS[part] for part in parts))
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(**(DEFAULTS | settings)), adapter_name=ADAPTER_NAME)


def checkpoint_metadata(model: OmniVideoForConditionalGeneration) -> dict[str, Any]:
    """What a checkpoint of the `lora` stage says of its layers, so that `load_lora_weights` reads it, too."""
    layers = collect_lora_layers(model, ADAPTER_NAME)
    settings: dict[str, Any] = {}
    for name, values in layers.items():
        component, is_settings, _ = name.partition("_lora_adapter_metadata")
        settings |= {f"{component}.{key}": value for key, value in values.items()} if is_settings else {}
    return {METADATA_KEY: settings}


def save_lora(model: OmniVideoForConditionalGeneration, folder: Path) -> None:
    """Write the matrices of every part into one file, which `OmniVideoPipeline.load_lora_weights` reads."""
    OmniVideoPipeline.save_lora_weights(folder, **collect_lora_layers(model, ADAPTER_NAME))
