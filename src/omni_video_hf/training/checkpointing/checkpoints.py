"""
Checkpoints that are whole or not there.

A checkpoint is written in a folder of another name and gets its own by one rename, so that a run killed at any moment
leaves the checkpoints it had. It holds what trains, not the frozen parts: `trained.safetensors` beside transformers'
files of optimiser, scheduler and state. The name differs from a model's on purpose: `from_pretrained` would otherwise
open a checkpoint and make up the missing parts.

`checkpoint.json` is written last and lists every file with its size, and the run that wrote them. It tells a
checkpoint that was copied in part, or damaged, from a whole one. A run removes the checkpoints that it wrote, and no
others.
"""

import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

WRITING_FOLDER = ".writing"
MANIFEST_NAME = "checkpoint.json"
TRAINED_NAME = "trained.safetensors"
EMA_NAME = "ema.safetensors"
STATE_NAME = "trainer_state.json"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_UNFINISHED = re.compile(rf"((replaced|rotated)-)?{PREFIX_CHECKPOINT_DIR}-\d+")


# --- which are there ------------------------------------------------------------------------------------------------


def numbered(output_dir: str | Path) -> list[Path]:
    """All folders with the name of a checkpoint, the oldest first, whoever wrote them and whether or not complete."""
    folders = Path(output_dir).iterdir() if Path(output_dir).is_dir() else ()
    found = [(int(match[1]), path) for path in folders if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found)]


def problem_of(checkpoint: Path) -> str | None:
    """
    What keeps a checkpoint from being complete, `None` for a complete one.

    Files of a checkpoint without `checkpoint.json`, as earlier versions wrote them, are looked into.
    """
    manifest = _read_manifest(checkpoint)
    if manifest is not None:
        for name, size in manifest["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
        return None
    return f"{MANIFEST_NAME} is damaged" if (checkpoint / MANIFEST_NAME).exists() else _problem_of_files(checkpoint)


def _problem_of_files(checkpoint: Path) -> str | None:
    """Likewise by what is in the files."""
    try:
        json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
        if (checkpoint / TRAINED_NAME).is_file():
            with safe_open(checkpoint / TRAINED_NAME, "pt"):
                pass
            damaged = [name for name in ("optimizer.pt", "scheduler.pt") if not zipfile.is_zipfile(checkpoint / name)]
            return f"{', '.join(damaged)} is missing or damaged" if damaged else None
    except (OSError, ValueError, SafetensorError) as error:
        return f"it has no {MANIFEST_NAME}, and its files are missing or damaged ({error})"
    sharded = ("pytorch_model_fsdp*", "optimizer_*", "global_step*")
    return None if any(any(checkpoint.glob(name)) for name in sharded) else f"it holds no {TRAINED_NAME}"


def last_checkpoint(output_dir: str | Path) -> str | None:
    """
    The newest complete checkpoint, `None` where there is no checkpoint; every incomplete one is warned of.

    Raises:
        ValueError: when there are checkpoints and none is complete: a run would silently begin anew.
    """
    folders, complete = numbered(output_dir), None
    problems = {folder: problem_of(folder) for folder in folders}
    for folder, problem in problems.items():
        if problem is None:
            complete = folder
        else:
            logger.warning("%s is not complete and not resumed from: %s.", folder, problem)
    if folders and complete is None:
        listed = "; ".join(f"{folder.name}: {problem}" for folder, problem in problems.items())
        raise ValueError(
            f"{output_dir}: none of its checkpoints is complete ({listed}). Copy them again, or remove them to begin "
            "anew."
        )
    return None if complete is None else str(complete)


def check_complete(checkpoint: str | Path) -> None:
    """
    Refuse what is no complete checkpoint.

    Raises:
        ValueError: says what is wrong, and which checkpoints beside or in the folder are complete.
    """
    checkpoint = Path(checkpoint)
    problem = problem_of(checkpoint) if checkpoint.is_dir() else "there is no such folder"
    if problem is None:
        return
    near = {folder for place in (checkpoint, checkpoint.parent) for folder in numbered(place)}
    readable = [
        str(folder) for folder in sorted(near, key=lambda f: int(f.name.split("-")[1])) if not problem_of(folder)
    ]
    listed = f"Complete are: {', '.join(readable)}." if readable else "There is no complete one beside or in it."
    raise ValueError(f"{checkpoint} is no complete checkpoint: {problem}. {listed}")


def run_of(checkpoint: Path) -> str | None:
    """The run that wrote a checkpoint, `None` where that is not known."""
    manifest = _read_manifest(checkpoint)
    return None if manifest is None else manifest["run"]


def _read_manifest(checkpoint: Path) -> dict | None:
    try:
        manifest = json.loads((checkpoint / MANIFEST_NAME).read_text(encoding="utf-8"))
        return manifest if isinstance(manifest["files"], dict) and isinstance(manifest["run"], str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- writing, replacing, removing -----------------------------------------------------------------------------------


def seal(written: Path, run: str) -> None:
    """Say that a checkpoint is complete: all its files, which lie on the disk now, and the run that wrote them."""
    files = sorted(path for path in written.rglob("*") if path.is_file())
    for path in files:
        _to_disk(path)
    content = {"run": run, "files": {path.relative_to(written).as_posix(): path.stat().st_size for path in files}}
    (written / MANIFEST_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _to_disk(written / MANIFEST_NAME)


def promote(written: Path, final: Path) -> None:
    """
    Give a complete checkpoint its name.

    A checkpoint of that name that the same run left, before it went on from an older one, is moved out of the way
    first: a kill between the two leaves the older ones. Anything else of that name is kept under another one.
    """
    if final.exists() or final.is_symlink():
        if not final.is_symlink() and run_of(final) is not None and run_of(final) == run_of(written):
            final.rename(written.with_name(f"replaced-{final.name}"))
        else:
            kept = _free_name(final)
            final.rename(kept)
            logger.warning("%s was there and not written by this run: it is now %s.", final, kept.name)
    written.rename(final)
    _to_disk(final.parent)
    clear(written.parent)


def rotate(run_folder: Path, limit: int | None, run: str, kept: Collection[Path]) -> None:
    """
    Remove the oldest checkpoints of a run beyond `limit`; no others.

    Args:
        run_folder: with the checkpoints.
        limit: how many to keep, `None` or 0 for all.
        run: what wrote them.
        kept: those that stay in any case.
    """
    if not limit or limit < 0:
        return
    ours = [folder for folder in numbered(run_folder) if not folder.is_symlink() and run_of(folder) == run]
    removable = [folder for folder in ours if folder not in kept]
    excess = len(ours) - max(limit, len(ours) - len(removable))
    writing = run_folder / WRITING_FOLDER
    for folder in removable[: max(excess, 0)]:
        # Under another name first: a kill while files go must not leave half a checkpoint under its own.
        writing.mkdir(exist_ok=True)
        folder.rename(writing / f"rotated-{folder.name}")
    clear(writing)


def clear(writing: Path) -> None:
    """
    Remove what a killed run left unfinished.

    A checkpoint that was being replaced when the run was killed between two renames stands there whole; it goes as
    well, since an older one of the run it continued is complete.

    Raises:
        ValueError: when something lies there that no run wrote.
    """
    if not writing.exists() and not writing.is_symlink():
        return
    others = (
        [] if writing.is_symlink() else [path for path in writing.iterdir() if not _UNFINISHED.fullmatch(path.name)]
    )
    if writing.is_symlink() or others:
        what = others[0].name if others else "is a link"
        raise ValueError(
            f"{writing}: unfinished checkpoints are written and removed there, but it holds what this package does "
            f"not write ({what}): move it elsewhere."
        )
    shutil.rmtree(writing)


def _free_name(final: Path) -> Path:
    number = 1
    while (kept := final.with_name(f"earlier-{number}-{final.name}")).exists():
        number += 1
    return kept


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- weights and average --------------------------------------------------------------------------------------------


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
