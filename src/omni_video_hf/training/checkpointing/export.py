"""`export_checkpoint`: write the pipeline of a checkpoint, without training."""

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
    Write the repository of a checkpoint: a copy of the base model's repository with the trained weights.

    If the run has a moving average of the weights, the average is written.

    Args:
        checkpoint: `output_dir/checkpoint-N`.
        folder: target folder, which must not exist or must be empty. For a LoRA, its folder `lora` contains the LoRA
            alone.
        base: folder or Hub repository of the base model. Default: the one in the checkpoint.
        revision: branch, tag or commit of the Hub repository. Default: the one in the checkpoint.
        dtype: dtype in which trained weights are stored, `float32` or `bfloat16`.

    Returns:
        `folder`.

    Raises:
        ValueError: for a folder that is not a complete checkpoint, for another base model, or an unfinished one.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    check_known("result_dtype", [dtype], ["float32", "bfloat16"])
    check_complete(checkpoint)
    if not (checkpoint / TRAINED_NAME).is_file():
        raise ValueError(
            f"{checkpoint} contains no {TRAINED_NAME}: checkpoints of FSDP and DeepSpeed are in shards. Resume the "
            "run with `--resume`; at its end it writes its pipeline."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: choose another one for the export.")
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
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the handle is not a dict
        write_pipeline(source, folder, weights, wanted, aliases=about.get("tied"))
    return folder


def _base_folder(checkpoint: Path, base: str | None, revision: str | None) -> Path:
    if not base:
        raise ValueError(f"{checkpoint} does not name the base model of its run: pass `--model`.")
    if Path(base).is_dir():
        check_finished(base)
        return Path(base)
    if not is_repository_name(str(base)):
        raise ValueError(f"`model` {base}, the base model of the run, is not a folder: pass its place with `--model`.")
    return Path(snapshot_download(base, revision=revision))


def _with_lora(checkpoint: Path, base: Path, about: dict[str, Any]) -> OmniVideoForConditionalGeneration:
    """Load the components of the base that the LoRA changes, with the LoRA layers of the checkpoint."""
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
