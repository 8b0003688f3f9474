"""What the training scripts of Omni-Video Shapes share: settings that stay, exact resuming, results that are whole."""

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from omni_video_hf.utils.files import workspace, write_text

from .muon import MuonFactory, multiplies_bfloat16

WRITTEN_MARK = ".written_by_omni_video_hf"  # in every folder of `save_folder`


def check_settings(settings: dict[str, Any], output: Path, *begins_from: Path) -> None:
    """
    Refuse to go on with a training that began otherwise; write down how a new one begins.

    Args:
        settings: of the training.
        output: its folder.
        begins_from: folders of weights or latents. Checkpoints of what other ones became are no way on from these.
    """
    settings = settings | {f"the weights in {folder.name}": _digest(folder) for folder in begins_from}
    path = output / "settings.json"
    if not path.exists():
        output.mkdir(parents=True, exist_ok=True)
        write_json(settings, path)
        return
    stored = json.loads(path.read_text(encoding="utf-8"))
    for name in sorted(stored.keys() | settings.keys()):
        if stored.get(name) != settings.get(name):
            raise typer.BadParameter(
                f"{output}: this training began with {name} {stored.get(name)}, not {settings.get(name)}. Go on with "
                "that, or begin another in an empty folder."
            )


def _digest(folder: Path) -> str:
    """Of names and contents of all its weights."""
    digest, files = hashlib.sha256(), sorted(folder.rglob("*.safetensors"))
    if not files:
        raise typer.BadParameter(f"{folder}: there are no weights to begin from.")
    for path in files:
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def fit(
    objective: nn.Module,
    dataset: Dataset,
    collate: Callable[[list[Any]], dict[str, Any]],
    output: Path,
    steps: int,
    learning_rate: float,
    save_steps: int,
    seed: int,
    **overrides: Any,
) -> None:
    """
    Train `objective`, whose `forward` gives a dict with its `loss`, from the last checkpoint of `output` if any.

    Args:
        dataset: one item a sample, `steps` times `per_device_train_batch_size` of them.
        overrides: other [`TrainingArguments`].
    """
    arguments = {
        "max_steps": steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(50, steps),
        "max_grad_norm": 1.0,
        "logging_steps": min(50, save_steps, steps),
        "save_steps": save_steps,
        "save_total_limit": 2,
        "seed": seed,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),  # for bf16, which transformers does not take for granted there
    }
    settings = TrainingArguments(output_dir=str(output), **(arguments | overrides))
    optimizer = (MuonFactory, {"lr": learning_rate, "weight_decay": settings.weight_decay})
    trainer = Trainer(
        objective, settings, train_dataset=dataset, data_collator=collate, optimizer_cls_and_kwargs=optimizer
    )
    with plain_attention_on_cpu():
        trainer.train(resume_from_checkpoint=get_last_checkpoint(output))


def plain_attention_on_cpu() -> AbstractContextManager[Any]:
    """
    Attention as matrix products where there is no GPU.

    torch's flash attention for CPUs spends 38 % of a step of the decoder in its backward pass; without it a step of
    32 clips takes 1.0 instead of 1.85 seconds of one core.
    """
    return nullcontext() if torch.cuda.is_available() else sdpa_kernel(SDPBackend.MATH)


def the_batch(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The one item of a data set of batches."""
    (item,) = items
    return dict(item)


def save_folder(write: Callable[[Path], Any], folder: Path) -> None:
    """
    Let `write` fill a folder, which comes to its name when it is complete and replaces an older one.

    Raises:
        ValueError: before anything is written, when `folder` is a link or holds what no call of this wrote.
    """
    mark = folder / WRITTEN_MARK
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder}: must be a folder, not a link or a file: move it away.")
    if folder.is_dir() and any(folder.iterdir()) and not (mark.is_file() and not mark.is_symlink()):
        raise ValueError(f"{folder}: is not empty, and no training of these wrote it: move it away.")
    with workspace(folder) as work:
        new = work / "new"
        write(new)
        (new / WRITTEN_MARK).touch()
        if folder.exists():
            folder.rename(work / "old")
        new.rename(folder)


def write_json(values: dict[str, Any], path: Path) -> None:
    """Write a file that comes to its name when it is complete."""
    write_text(path, json.dumps(values, indent=2) + "\n")


__all__ = [
    "check_settings",
    "fit",
    "multiplies_bfloat16",
    "plain_attention_on_cpu",
    "save_folder",
    "the_batch",
    "write_json",
]
