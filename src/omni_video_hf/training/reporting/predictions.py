"""What `compute_metrics` and `predict` get: logits and labels of answers."""

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
    tasks = sorted({bucket.task for bucket in getattr(data, "buckets", ())})
    drawn = [task for task in tasks if not get_task(task).answers_in_text]
    if drawn:
        raise ValueError(
            f"`compute_metrics` gets logits and labels of {_answering()}, but `eval_dataset` holds samples of "
            f"{', '.join(drawn)}: evaluate those without it, in a Trainer of their own."
        )


def check_predictable(inputs: Mapping[str, Any]) -> None:
    """
    Refuse to predict for a batch that has no answers.

    Raises:
        ValueError: unless the batch is of a task that is answered in text and brings `labels`.
    """
    task = inputs.get("task")
    is_answer = task is None or get_task(task).answers_in_text
    if not is_answer or inputs.get("labels") is None:
        brings = ", ".join(sorted(set(inputs) - {"task"}))
        raise ValueError(
            f"`predict` and `compute_metrics` give logits of answers, so a batch must be of {_answering()} and "
            f"bring `labels`; this one{'' if task is None else f' is of {task!r} and'} brings {brings}. "
            "Use `evaluate` without `compute_metrics` for losses, or the pipeline to draw."
        )


def _answering() -> str:
    return f"the task {' or '.join(repr(name) for name, task in TASKS.items() if task.answers_in_text)}"


__all__ = ["check_metrics", "check_predictable"]
