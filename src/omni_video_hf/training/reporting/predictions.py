"""What `compute_metrics` and `predict` get: logits and labels of answers."""

from collections.abc import Callable, Mapping
from typing import Any

from ...diffusion.losses import OmniVideoLossConfig


def check_metrics(
    compute_metrics: Callable[..., Any] | None, losses: OmniVideoLossConfig, stage: str, only_loss: bool, data: Any
) -> None:
    """
    Refuse metrics that would never be computed.

    Args:
        compute_metrics: the Trainer's argument.
        losses: of the stage.
        stage: for the error.
        only_loss: the setting `prediction_loss_only`.
        data: what the Trainer evaluates on; with `buckets` its tasks are known.

    Raises:
        ValueError: where no answers are learned or evaluated.
    """
    if compute_metrics is None:
        return
    if losses.answer_weight == 0:
        raise ValueError(
            f"`compute_metrics` gets logits and labels of answers, but the stage {stage!r} learns none "
            "(`losses.answer_weight` is 0): use `stage='understand'`, or leave `compute_metrics` out."
        )
    if only_loss:
        raise ValueError("`compute_metrics` is set, and `prediction_loss_only` would never call it: leave one out.")
    drawn = sorted({bucket.task for bucket in getattr(data, "buckets", ())} - {"understand"})
    if drawn:
        raise ValueError(
            f"`compute_metrics` gets logits and labels of the task 'understand', but `eval_dataset` holds samples of "
            f"{', '.join(drawn)}: evaluate those without it, in a Trainer of their own."
        )


def check_predictable(inputs: Mapping[str, Any]) -> None:
    """
    Refuse to predict for a batch that has no answers.

    Raises:
        ValueError: unless the batch is of the task `understand` and brings `labels`.
    """
    task = inputs.get("task", "understand")
    if task != "understand" or inputs.get("labels") is None:
        raise ValueError(
            f"`predict` and `compute_metrics` give logits of answers, so a batch must be of the task 'understand' and "
            f"bring `labels`; this one is of {task!r} and brings {', '.join(sorted(set(inputs) - {'task'}))}. Use "
            "`evaluate` without `compute_metrics` for losses, or the pipeline to draw."
        )


__all__ = ["check_metrics", "check_predictable"]
