"""Training summary, model card and push of a training run's result."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import CommitInfo

from ...diffusion.losses import LOSS_NAMES
from ...hub.model_card import TrainingSummary, write_model_card
from ...hub.push import push_completed, push_repository
from .callbacks import RunClock

if TYPE_CHECKING:
    from ..arguments import OmniVideoTrainingArguments
    from ..trainer import OmniVideoTrainer

_PREVIEW = re.compile(r"step-(\d+)-(\d+)\.mp4")


def summarize(trainer: "OmniVideoTrainer", datasets: list[str] | None = None) -> TrainingSummary:
    """
    Summarise a run up to now.

    Args:
        trainer: trainer of the run.
        datasets: Hub names or descriptions of the data.
    """
    args, history, data = trainer.args, trainer.state.log_history, trainer.train_dataset
    logged: dict[str, Any] = {name: value for entry in history for name, value in entry.items()}
    is_cuda = args.device.type == "cuda"
    device = torch.cuda.get_device_name(args.device) if is_cuda else "CPU"
    rates = {"others": args.learning_rate} | (args.part_learning_rates or {})
    return TrainingSummary(
        stage=args.stage,
        description=args.training_stage.about,
        base_model=trainer.model.config._name_or_path or None,
        datasets=datasets or [],
        num_samples=len(data) if hasattr(data, "__len__") else None,
        steps=trainer.state.global_step,
        batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        learning_rate=rates if args.part_learning_rates else args.learning_rate,
        losses={name: value for name, value in logged.items() if name == "loss" or name in _loss_names()},
        scores={name: value for name, value in logged.items() if name.startswith("eval_") and "loss" in name},
        dtype=_precision(args),
        hardware=f"{args.world_size} x {device}",
        peak_memory=torch.cuda.max_memory_allocated(args.device) if is_cuda else None,
        seconds=RunClock.of(trainer).seconds or None,
        seed=args.seed,
        samples=_last_previews(Path(args.output_dir), args.previews or []),
    )


def write_card(trainer: "OmniVideoTrainer", datasets: list[str] | None = None) -> None:
    """Write summary and model card to `output_dir`; a card that a person wrote or edited is not replaced."""
    folder = Path(trainer.args.output_dir)
    summarize(trainer, datasets).save(folder)
    write_model_card(folder, trainer.hub_model_id or folder.absolute().name)


def push(trainer: "OmniVideoTrainer", folder: Path, base: str | Path | None = None, **settings: Any) -> CommitInfo:
    """
    Push the result of a run to `args.hub_model_id` in one commit, as a complete repository or a LoRA.

    Args:
        trainer: trainer of the run.
        folder: folder of a LoRA, a model, or a complete repository.
        base: repository with the components that a model lacks. Default: the base model of the run.
        settings: arguments of [`push_repository`], which replace the `hub_...` arguments of the run.
    """
    args, base = trainer.args, base or trainer.model.config._name_or_path
    settings = {name: value for name, value in settings.items() if value is not None}
    defaults = {"token": args.hub_token, "private": args.hub_private_repo, "revision": args.hub_revision}
    if args.training_stage.lora:
        return push_repository(folder, trainer.hub_model_id, base_model=base, **(defaults | settings))
    return push_completed(folder, trainer.hub_model_id, base, **(defaults | settings))


def _precision(args: "OmniVideoTrainingArguments") -> str:
    """Description of the dtypes of the computation and of the stored trained weights."""
    computed = "bfloat16 over float32" if args.bf16 else "float16 over float32" if args.fp16 else "float32"
    return f"{computed}; trained weights are stored in {args.result_dtype}, the others as in the base"


def _loss_names() -> list[str]:
    return [f"{name}_loss" for name in LOSS_NAMES]


def _last_previews(folder: Path, previews: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Videos of the last preview, with their prompts and paths in the repository."""
    clips = [(path, _PREVIEW.fullmatch(path.name)) for path in (folder / "previews").glob("step-*.mp4")]
    found = [(int(match[1]), int(match[2]), path) for path, match in clips if match]
    last = max((step for step, _, _ in found), default=None)
    return [
        {"prompt": str(previews[number]["prompt"]), "file": path.relative_to(folder).as_posix()}
        for step, number, path in sorted(found)
        if step == last and number < len(previews) and "prompt" in previews[number]
    ]
