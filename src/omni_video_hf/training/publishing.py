"""What a run knows about its result, for the model card, and pushing it as a complete repository."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..losses_omni_video import LOSS_NAMES
from ..model_card_omni_video import TrainingSummary, write_model_card

if TYPE_CHECKING:
    from .trainer import OmniVideoTrainer

_PREVIEW = re.compile(r"step-(\d+)-(\d+)\.mp4")


def summarize(trainer: "OmniVideoTrainer", datasets: list[str] | None = None) -> TrainingSummary:
    """
    The facts of a run.

    Args:
        trainer: during or after training.
        datasets: names of the data; only the caller knows them.
    """
    args, state = trainer.args, trainer.state
    names = {f"{name}_loss{suffix}" for name in LOSS_NAMES for suffix in ("", *_TASK_SUFFIXES)}
    logged: dict[str, Any] = {name: value for entry in state.log_history for name, value in entry.items()}
    losses = {name: value for name, value in logged.items() if name.removeprefix("eval_") in names}
    dataset = trainer.train_dataset
    return TrainingSummary(
        stage=args.stage,
        base_model=trainer.model.config._name_or_path or None,
        datasets=datasets or [],
        num_samples=len(dataset) if hasattr(dataset, "__len__") else None,
        steps=state.global_step,
        batch_size=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        learning_rate=({"others": args.learning_rate} | args.part_learning_rates)
        if args.part_learning_rates
        else args.learning_rate,
        losses=losses or ({"loss": logged["loss"]} if "loss" in logged else {}),
        dtype="bfloat16" if args.bf16 else "float16" if args.fp16 else str(trainer.model.dtype).removeprefix("torch."),
        hardware=_hardware(args.world_size),
        peak_memory=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        seconds=logged.get("train_runtime"),
        seed=args.seed,
        samples=_last_previews(Path(args.output_dir), args.previews or []),
    )


def write_card(trainer: "OmniVideoTrainer", datasets: list[str] | None = None) -> None:
    """Leave the summary and the card in the output folder; a card that a person edited stays."""
    summary, folder = summarize(trainer, datasets), Path(trainer.args.output_dir)
    summary.save(folder)
    name = trainer.hub_model_id if getattr(trainer, "hub_model_id", None) else folder.absolute().name
    write_model_card(folder, name)


_TASK_SUFFIXES = tuple(f"_{task}" for task in ("t2i", "t2v", "i2i", "v2v", "i2v", "understand"))


def _hardware(world_size: int) -> str:
    if torch.cuda.is_available():
        return f"{world_size} x {torch.cuda.get_device_name()}"
    return f"{world_size} x CPU"


def _last_previews(folder: Path, previews: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Clips of the last preview, with their prompts, where they lie in the repository."""
    clips = [(path, _PREVIEW.fullmatch(path.name)) for path in (folder / "previews").glob("step-*.mp4")]
    found = [(int(match[1]), int(match[2]), path) for path, match in clips if match]
    last = max((step for step, _, _ in found), default=None)
    return [
        {"prompt": str(previews[number]["prompt"]), "file": path.relative_to(folder).as_posix()}
        for step, number, path in sorted(found)
        if step == last and number < len(previews) and "prompt" in previews[number]
    ]
