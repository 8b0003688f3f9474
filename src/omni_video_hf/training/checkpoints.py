"""
Checkpoints that are whole or not there.

A checkpoint is written in a folder of another name and gets its own by one rename, so that a run killed at any moment
leaves the checkpoints it had. It holds what trains, not the frozen parts: `trained.safetensors` beside transformers'
files of optimiser, scheduler and state. The name differs from a model's on purpose: `from_pretrained` would otherwise
open a checkpoint and make up the missing parts.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

WRITING_FOLDER = ".writing"
TRAINED_NAME = "trained.safetensors"
EMA_NAME = "ema.safetensors"


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint, `None` without one."""
    return get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None


def promote(written: Path, final: Path) -> None:
    """
    Give a complete checkpoint its name.

    A checkpoint of that name, left by a run that went on from an older one, is moved out of the way first: a kill
    between the two leaves the older ones.
    """
    if final.exists():
        replaced = written.with_name(f"replaced-{final.name}")
        final.rename(replaced)
    written.rename(final)
    shutil.rmtree(written.parent)


def save_trained(path: Path, parameters: Mapping[str, torch.Tensor], metadata: Mapping[str, object]) -> None:
    """Write named tensors, and what they are, into one safetensors file."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in parameters.items()}
    save_file(tensors, path, {key: json.dumps(value) for key, value in metadata.items()})


@torch.no_grad()
def load_trained(path: Path, parameters: Mapping[str, torch.Tensor], stage: str) -> None:
    """
    Fill parameters from a file of [`save_trained`].

    Raises:
        ValueError: when the file is missing, comes from another stage, or holds other parameters than train.
    """
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file. `resume_from_checkpoint` must be a `{PREFIX_CHECKPOINT_DIR}-N` folder of this "
            "trainer, written by the same kind of launch (checkpoints of FSDP and DeepSpeed are another format)."
        )
    with safe_open(path, "pt") as file:
        metadata, names = file.metadata() or {}, set(file.keys())
        written = json.loads(metadata.get("stage", "null"))
        if written != stage:
            raise ValueError(
                f"{path} was written in the stage {written!r}, this run's `stage` is {stage!r}. A run is resumed "
                "within its stage; a new stage starts from the model that the last one saved."
            )
        if names != set(parameters):
            differing = sorted(names ^ set(parameters))
            raise ValueError(
                f"{path} holds {len(names)} parameters, {len(parameters)} train; {len(differing)} are in one only, "
                f"first {differing[0]}. Resume with the settings and the base model the run began with."
            )
        for name, parameter in parameters.items():
            tensor = file.get_tensor(name)
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"{path}: {name} is {tuple(tensor.shape)}, the model's is {tuple(parameter.shape)}. Resume with "
                    "the base model the run began with."
                )
            parameter.copy_(tensor)


def save_ema(path: Path, ema: EMAModel, names: list[str]) -> None:
    """Write the averaged parameters by name, and the average's counters."""
    state = ema.state_dict()
    shadow = dict(zip(names, state.pop("shadow_params"), strict=True))
    save_trained(path, shadow, state)


def load_ema(path: Path, ema: EMAModel, names: list[str]) -> None:
    """
    Take up an average where [`save_ema`] left it.

    Raises:
        ValueError: when the checkpoint has none.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file, but `ema_decay` is set: the run began without an average.")
    with safe_open(path, "pt") as file:
        state = {key: json.loads(value) for key, value in file.metadata().items()}
        shadow = [file.get_tensor(name) for name in names]
    devices = [parameter.device for parameter in ema.shadow_params]
    ema.load_state_dict(state | {"shadow_params": shadow})
    ema.shadow_params = [value.to(device) for value, device in zip(ema.shadow_params, devices, strict=True)]


def clear(writing: Path) -> None:
    """
    Remove what a killed run left unfinished.

    A checkpoint that was being replaced when the run was killed between two renames stands there whole; it goes as
    well, since an older one of the run it continued is complete.
    """
    if writing.exists():
        shutil.rmtree(writing)
