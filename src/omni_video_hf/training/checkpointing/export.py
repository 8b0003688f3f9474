"""A pipeline's repository out of a checkpoint, without training on."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

from ...hub.staging import check_finished
from ...models.configuration_omni_video import OmniVideoConfig
from ...models.modeling_omni_video import OmniVideoForConditionalGeneration
from ...utils.modules import dtype_of
from ...utils.names import check_known, is_repository_name
from ..lora import ADAPTER_NAME, add_lora, save_lora
from ..stages import get_stage
from .checkpoints import EMA_NAME, TRAINED_NAME, check_complete, load_trained
from .result import lora_deltas, write_pipeline

LORA_FOLDER = "lora"


def export_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    base: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
) -> Path:
    """
    Write what a run had learned at a checkpoint: the repository it began with, and in it the trained weights.

    Where the run keeps a moving average of the weights, it is what is written.

    Args:
        checkpoint: `output_dir/checkpoint-N`.
        folder: gets the repository; for a LoRA, its `lora` gets the matrices alone. Must not exist, or be empty.
        base: folder or Hub repository that the run began with; by default the one that the checkpoint names.
        revision: of a Hub repository, likewise.
        dtype: `float32` or `bfloat16`, in which trained weights are stored.

    Returns:
        `folder`.

    Raises:
        ValueError: for what is no complete checkpoint, saying which are; and for another base, or an
            unfinished one.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    check_known("result_dtype", [dtype], ["float32", "bfloat16"])
    check_complete(checkpoint)
    if not (checkpoint / TRAINED_NAME).is_file():
        raise ValueError(
            f"{checkpoint} holds no {TRAINED_NAME}: checkpoints of FSDP and DeepSpeed are in shards. Resume the run "
            "at its end with `--resume`, which writes its pipeline."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: choose another one to export to.")
    with safe_open(checkpoint / TRAINED_NAME, "pt") as file:
        about = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    source = _base_folder(checkpoint, base or about.get("base_model"), revision or about.get("base_revision"))
    wanted = dtype_of(dtype)
    averaged = checkpoint / EMA_NAME
    if get_stage(about["stage"]).lora:
        model = _with_lora(checkpoint, source, about)
        deltas = lora_deltas(model, ADAPTER_NAME)
        write_pipeline(source, folder, {}, wanted, deltas=deltas)
        save_lora(model, folder / LORA_FOLDER)
    else:
        with safe_open(averaged if averaged.is_file() else checkpoint / TRAINED_NAME, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the handle is no dict
        write_pipeline(source, folder, weights, wanted, aliases=about.get("tied"))
    return folder


def _base_folder(checkpoint: Path, base: str | None, revision: str | None) -> Path:
    if not base:
        raise ValueError(f"{checkpoint} does not say which model its run began with: pass `--model`.")
    if Path(base).is_dir():
        check_finished(base)
        return Path(base)
    if not is_repository_name(str(base)):
        raise ValueError(f"`model` {base}, which the run began with, is no folder: pass `--model` to say where it is.")
    return Path(snapshot_download(base, revision=revision))


def _with_lora(checkpoint: Path, base: Path, about: dict[str, Any]) -> OmniVideoForConditionalGeneration:
    """The parts of the base that have matrices, with those of the checkpoint."""
    average = checkpoint / EMA_NAME
    with safe_open(checkpoint / TRAINED_NAME, "pt") as file:
        names = list(file.keys())
    parts = sorted({name.split(".", 1)[0] for name in names})
    config = OmniVideoConfig.from_pretrained(base)
    config.enable_mllm = "mllm" in parts
    config.adapter_config = config.adapter_config if "adapter" in parts else None
    config.decoder_config = config.decoder_config if "decoder" in parts else None
    model = OmniVideoForConditionalGeneration.from_pretrained(base, config=config, dtype=torch.float32)
    add_lora(model, (about.get("lora") or {}) | {"parts": parts})
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    load_trained(checkpoint / TRAINED_NAME, trained, about["stage"])
    if average.is_file():
        with safe_open(average, "pt") as file, torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(file.get_tensor(name))
    return model.eval()


__all__ = ["export_checkpoint"]
