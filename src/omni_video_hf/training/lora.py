"""Low-rank matrices in every part of the model, by peft."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file

from ..modeling_omni_video import OmniVideoForConditionalGeneration
from .arguments import LORA_PARTS
from .names import check_known

ADAPTER_NAME = "default"
METADATA_KEY = "lora_adapter_metadata"  # as diffusers
# Projections of attention and feed-forward layers, part by part; not the MLLM's vision tower.
TARGETS = {
    "mllm": r"mllm\.(?!.*vision).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    "vision_head": r"vision_head\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
    "adapter": r"adapter\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
    "decoder": r"decoder\..*\.(to_q|to_k|to_v|to_out\.0|ffn\.net\.0\.proj|ffn\.net\.2)",
}
DEFAULTS = {"r": 16, "lora_alpha": 16}
# Settings of peft's LoraConfig that make sense here.
KNOWN = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "target_modules", "parts")


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
    check_known("lora", settings, KNOWN)
    present = [part for part in LORA_PARTS if getattr(model, part) is not None]
    parts = settings.pop("parts", present)
    check_known("lora.parts", parts, LORA_PARTS)
    missing = [part for part in parts if part not in present]
    if missing:
        raise ValueError(f"`lora.parts` names {', '.join(missing)}, which this model does not have ({present}).")
    settings.setdefault("target_modules", "|".join(TARGETS[part] for part in parts))
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(**(DEFAULTS | settings)), adapter_name=ADAPTER_NAME)


def save_lora(model: OmniVideoForConditionalGeneration, path: Path) -> None:
    """
    Write the matrices, and rank, alpha and all else that is needed to apply them, into one safetensors file.

    Its keys begin with `mllm.`, `vision_head.`, `adapter.` or `transformer.`, the pipeline's names.
    """
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME)
    tensors = {_pipeline_name(name): value.detach().cpu().contiguous() for name, value in state.items()}
    config = model.peft_config[ADAPTER_NAME].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, {"format": "pt", METADATA_KEY: json.dumps(config, default=str)})
    partial.replace(path)


def load_lora(model: OmniVideoForConditionalGeneration, path: Path) -> None:
    """
    Apply a file of [`save_lora`].

    Raises:
        ValueError: when it has no metadata, or its matrices do not fit the model's one by one.
    """
    with safe_open(path, "pt") as file:
        metadata = (file.metadata() or {}).get(METADATA_KEY)
        state = {_model_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata is None:
        raise ValueError(f"{path}: no {METADATA_KEY!r} in its metadata: rank and alpha are unknown.")
    config = json.loads(metadata)
    model.add_adapter(LoraConfig(**{key: config[key] for key in KNOWN if key in config}), adapter_name=ADAPTER_NAME)
    expected = set(get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME))
    if expected != set(state):
        differing = sorted(expected ^ set(state))
        raise ValueError(
            f"{path} holds {len(state)} matrices, the model takes {len(expected)}; {len(differing)} are in one only, "
            f"first {differing[0]}."
        )
    set_peft_model_state_dict(model, state, adapter_name=ADAPTER_NAME)


@torch.no_grad()
def merged_weights(model: OmniVideoForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The weights with the matrices merged into them, under the names of a model without matrices."""
    return {
        f"{name}.weight": layer.base_layer.weight + layer.get_delta_weight(ADAPTER_NAME)
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def _pipeline_name(name: str) -> str:
    return "transformer." + name.removeprefix("decoder.") if name.startswith("decoder.") else name


def _model_name(name: str) -> str:
    return "decoder." + name.removeprefix("transformer.") if name.startswith("transformer.") else name
