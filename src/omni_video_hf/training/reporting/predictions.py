"""Checks for `compute_metrics` and `predict`, which get logits and labels of text answers."""

from collections.abc import Callable, Mapping
from typing import Any

from ...diffusion.losses import OmniVideoLossConfig
from ...tasks import TASKS, get_task


def check_metrics(
    compute_metrics: Callable[..., Any] | None, losses: OmniVideoLossConfig, stage: str, only_loss: bool, data: Any
) -> None:
    """
    Refuse metrics that would never be computed.

    Args:
        compute_metrics: argument of the Trainer.
        losses: losses of the stage.
        stage: name of the stage for messages.
        only_loss: the setting `prediction_loss_only`.
        data: evaluation data of the Trainer; `buckets` give their tasks.

    Raises:
        ValueError: if no text answers are trained or evaluated.
    """
    if compute_metrics is None:
        return
    if losses.answer_weight == 0:
        raise ValueError(
            f"`compute_metrics` gets logits and labels of text answers, but the stage {stage!r} trains none "
            "(`losses.answer_weight` is 0): use `stage='understand'`, or leave `compute_metrics` out."
        )
    if only_loss:
        raise ValueError("`compute_metrics` is never called with `prediction_loss_only=True`: leave one of them out.")
    tasks = sorted({bucket.task for bucket in getattr(data, "buckets", ())})
    generating = [task for task in tasks if not get_task(task).answers_in_text]
    if generating:
        raise ValueError(
            f"`compute_metrics` gets logits and labels of {_answering()}, but `eval_dataset` contains samples of "
            f"{', '.join(generating)}: evaluate these in another Trainer without `compute_metrics`."
        )


def check_predictable(inputs: Mapping[str, Any]) -> None:
    """
    Refuse to predict for a batch without text answers.

    Raises:
        ValueError: unless the task of the batch is answered in text and the batch has `labels`.
    """
    task = inputs.get("task")
    is_answer = task is None or get_task(task).answers_in_text
    if not is_answer or inputs.get("labels") is None:
        brings = ", ".join(sorted(set(inputs) - {"task"}))
        raise ValueError(
            f"`predict` and `compute_metrics` give logits of text answers, so a batch must be of {_answering()} and "
            f"have `labels`; this one{'' if task is None else f' is of {task!r} and'} has {brings}. "
            "Use `evaluate` without `compute_metrics` for losses, or the pipeline to generate."
        )


def _answering() -> str:
    return f"the task {' or '.join(repr(name) for name, task in TASKS.items() if task.answers_in_text)}"


__all__ = ["check_metrics", "check_predictable"]
