"""
Checkpoints of a training run: atomic writing, completeness checks, rotation, and loading of weights and averages.

A checkpoint is written in a temporary folder and renamed, so that a run that is killed at any moment leaves only
complete checkpoints. It contains the trained weights, not the frozen ones, in `trained.safetensors`, and the files of
transformers for optimiser, scheduler and state. The file name differs from that of a model, because `from_pretrained`
would otherwise load a checkpoint and initialise the missing weights.

`checkpoint.json` is written last. It lists every file with its size, and the run that wrote them, so that a damaged or
partly copied checkpoint is detected. A run removes only checkpoints that it wrote.
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


# --- finding and checking -------------------------------------------------------------------------------------------


def numbered(output_dir: str | Path) -> list[Path]:
    """All folders with the name of a checkpoint, oldest first, complete or not, and written by any run."""
    folders = Path(output_dir).iterdir() if Path(output_dir).is_dir() else ()
    found = [(int(match[1]), path) for path in folders if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found)]


def problem_of(checkpoint: Path) -> str | None:
    """
    Describe why a checkpoint is not complete; `None` for a complete one.

    For a checkpoint without `checkpoint.json`, which earlier versions wrote, the content of its files is checked.
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
    """Describe why a checkpoint without `checkpoint.json` is not complete, from the content of its files."""
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
    return None if any(any(checkpoint.glob(name)) for name in sharded) else f"it contains no {TRAINED_NAME}"


def last_checkpoint(output_dir: str | Path) -> str | None:
    """
    The newest complete checkpoint, `None` if there is no checkpoint. A warning names every incomplete one.

    Raises:
        ValueError: if there are checkpoints but none is complete, because a run would start again without notice.
    """
    folders, complete = numbered(output_dir), None
    problems = {folder: problem_of(folder) for folder in folders}
    for folder, problem in problems.items():
        if problem is None:
            complete = folder
        else:
            logger.warning("%s is not complete, so it is not used to resume: %s.", folder, problem)
    if folders and complete is None:
        listed = "; ".join(f"{folder.name}: {problem}" for folder, problem in problems.items())
        raise ValueError(
            f"{output_dir}: none of its checkpoints is complete ({listed}). Copy them again, or remove them to start "
            "from the beginning."
        )
    return None if complete is None else str(complete)


def check_complete(checkpoint: str | Path) -> None:
    """
    Refuse a folder that is not a complete checkpoint.

    Raises:
        ValueError: for such a folder; the message lists complete checkpoints beside it or in it.
    """
    checkpoint = Path(checkpoint)
    problem = problem_of(checkpoint) if checkpoint.is_dir() else "there is no such folder"
    if problem is None:
        return
    near = {folder for place in (checkpoint, checkpoint.parent) for folder in numbered(place)}
    readable = [
        str(folder) for folder in sorted(near, key=lambda f: int(f.name.split("-")[1])) if not problem_of(folder)
    ]
    listed = f"Complete are: {', '.join(readable)}." if readable else "There is no complete one beside it or in it."
    raise ValueError(f"{checkpoint} is not a complete checkpoint: {problem}. {listed}")


def run_of(checkpoint: Path) -> str | None:
    """The run that wrote a checkpoint, `None` if it is unknown."""
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
    """Mark a checkpoint as complete: write the list of its files, which are synced to disk, and the run."""
    files = sorted(path for path in written.rglob("*") if path.is_file())
    for path in files:
        _to_disk(path)
    content = {"run": run, "files": {path.relative_to(written).as_posix(): path.stat().st_size for path in files}}
    (written / MANIFEST_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _to_disk(written / MANIFEST_NAME)


def promote(written: Path, final: Path) -> None:
    """
    Rename a complete checkpoint to its final name.

    If the same run wrote a checkpoint of this name before it was resumed from an older one, that checkpoint is moved
    away first; a kill between the two steps leaves the older checkpoints. Any other folder of this name is kept under
    a new name.
    """
    if final.exists() or final.is_symlink():
        if not final.is_symlink() and run_of(final) is not None and run_of(final) == run_of(written):
            final.rename(written.with_name(f"replaced-{final.name}"))
        else:
            kept = _free_name(final)
            final.rename(kept)
            logger.warning("%s already existed and was not written by this run: renamed to %s.", final, kept.name)
    written.rename(final)
    _to_disk(final.parent)
    clear(written.parent)


def rotate(run_folder: Path, limit: int | None, run: str, kept: Collection[Path]) -> None:
    """
    Remove the oldest checkpoints of a run, so that `limit` remain. Checkpoints of other runs are not removed.

    Args:
        run_folder: folder of the checkpoints.
        limit: number of checkpoints to keep; `None` or 0 keeps all.
        run: identifier of the run that wrote them.
        kept: checkpoints that are never removed.
    """
    if not limit or limit < 0:
        return
    ours = [folder for folder in numbered(run_folder) if not folder.is_symlink() and run_of(folder) == run]
    removable = [folder for folder in ours if folder not in kept]
    excess = len(ours) - max(limit, len(ours) - len(removable))
    writing = run_folder / WRITING_FOLDER
    for folder in removable[: max(excess, 0)]:
        # Rename it first, so that a kill during the removal leaves no incomplete checkpoint under its name.
        writing.mkdir(exist_ok=True)
        folder.rename(writing / f"rotated-{folder.name}")
    clear(writing)


def clear(writing: Path) -> None:
    """
    Remove unfinished checkpoints of a killed run.

    A complete checkpoint that was being replaced when the run was killed is removed as well, because the older
    checkpoint from which the run was resumed is complete.

    Raises:
        ValueError: if the folder contains files that no run wrote.
    """
    if not writing.exists() and not writing.is_symlink():
        return
    others = (
        [] if writing.is_symlink() else [path for path in writing.iterdir() if not _UNFINISHED.fullmatch(path.name)]
    )
    if writing.is_symlink() or others:
        what = others[0].name if others else "is a link"
        raise ValueError(
            f"{writing}: this folder is for unfinished checkpoints, which are removed, but it contains what this "
            f"package does not write ({what}): move it elsewhere."
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
    """Write named tensors and metadata into one safetensors file."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in parameters.items()}
    save_file(tensors, path, {key: json.dumps(value) for key, value in metadata.items()})


@torch.no_grad()
def load_trained(path: Path, parameters: Mapping[str, torch.Tensor], stage: str) -> None:
    """
    Load parameters from a file of [`save_trained`].

    Raises:
        ValueError: if the file is missing, was written in another stage, or contains other parameters.
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
                f"{path} was written in the stage {written!r}, but the `stage` of this run is {stage!r}. Resume a run "
                "in its own stage; start a new stage from the model that the last stage saved."
            )
        if names != set(parameters):
            differing = sorted(names ^ set(parameters))
            raise ValueError(
                f"{path} contains {len(names)} parameters, but {len(parameters)} are trained; {len(differing)} are in "
                f"only one of the two, such as {differing[0]}. Resume with the settings and base model of the run."
            )
        for name, parameter in parameters.items():
            tensor = file.get_tensor(name)
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"{path}: {name} is {tuple(tensor.shape)}, but {tuple(parameter.shape)} in the model. Resume with "
                    "the base model of the run."
                )
            parameter.copy_(tensor)


def save_ema(path: Path, ema: EMAModel, names: list[str]) -> None:
    """Write the averaged parameters by name, and the counters of the average."""
    state = ema.state_dict()
    shadow = dict(zip(names, state.pop("shadow_params"), strict=True))
    save_trained(path, shadow, state)


def load_ema(path: Path, ema: EMAModel, names: list[str]) -> None:
    """
    Load an average that [`save_ema`] wrote.

    Raises:
        ValueError: if the checkpoint has none.
    """
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file, but `ema_decay` is set. The run was started without it: leave `ema_decay` out."
        )
    with safe_open(path, "pt") as file:
        state = {key: json.loads(value) for key, value in file.metadata().items()}
        shadow = [file.get_tensor(name) for name in names]
    devices = [parameter.device for parameter in ema.shadow_params]
    ema.load_state_dict(state | {"shadow_params": shadow})
    ema.shadow_params = [value.to(device) for value, device in zip(ema.shadow_params, devices, strict=True)]
