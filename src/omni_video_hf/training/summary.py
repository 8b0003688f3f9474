"""What a run knows about its result, for the model card."""

from typing import TYPE_CHECKING

import torch

from ..losses_omni_video import LOSS_NAMES
from ..model_card_omni_video import TrainingSummary

if TYPE_CHECKING:
    from .trainer import OmniVideoTrainer


def summarise(trainer: "OmniVideoTrainer", datasets: list[str] | None = None) -> TrainingSummary:
    """
    Summary of a run as far as it has come.

    Args:
        datasets: Hub names or descriptions of the data.
    """
    args, history = trainer.args, trainer.state.log_history
    losses = {name: entry[name] for entry in history for name in ("loss", *_loss_names()) if name in entry}
    scores = {name: value for entry in history for name, value in entry.items() if name.startswith("eval_")}
    is_cuda = args.device.type == "cuda"
    device = torch.cuda.get_device_name(args.device) if is_cuda else "CPU"
    return TrainingSummary(
        stage=args.stage,
        description=args.training_stage.about,
        base_model=trainer.model.config._name_or_path or None,
        datasets=datasets or [],
        num_samples=None if trainer.train_dataset is None else len(trainer.train_dataset),
        steps=trainer.state.global_step,
        batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        learning_rate={"others": args.learning_rate} | args.part_learning_rates
        if args.part_learning_rates
        else args.learning_rate,
        losses=losses,
        scores={name: value for name, value in scores.items() if "loss" in name},
        dtype="bfloat16 over float32" if args.bf16 else "float32",
        hardware=f"{args.world_size} x {device}",
        peak_memory=torch.cuda.max_memory_allocated(args.device) if is_cuda else None,
        seconds=next((entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry), None),
        seed=args.seed,
    )


def _loss_names() -> list[str]:
    return [f"{name}_loss" for name in LOSS_NAMES]
