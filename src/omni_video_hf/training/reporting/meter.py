"""Means of every loss, over all and by task, across processes."""

import torch
from accelerate import Accelerator

from ...diffusion.losses import LOSS_NAMES
from ...models.outputs import OmniVideoOutput
from ...tasks import TASKS

TASK_NAMES = tuple(TASKS)


class LossMeter:
    """
    Sums losses on the device, so that a step waits for nothing, and gives their means when asked.

    Every process keeps the same table, so processes with different tasks can add theirs up.
    """

    def __init__(self, device: torch.device) -> None:
        self.seen: set[str] = set()  # losses that any batch of this process allowed
        # [loss, all and each task, (sum over samples, number of samples)]
        self.table = torch.zeros(len(LOSS_NAMES), 1 + len(TASK_NAMES), 2, device=device)

    def add(self, output: OmniVideoOutput, task: str | None, batch_size: int) -> None:
        """Count the losses of one batch."""
        for row, name in enumerate(LOSS_NAMES):
            loss = getattr(output, f"{name}_loss")
            if loss is None:
                continue
            self.seen.add(name)
            entry = torch.stack([loss.detach().float() * batch_size, loss.new_full((), batch_size).float()])
            for column in (0, *([] if task is None else [1 + TASK_NAMES.index(task)])):
                self.table[row, column] += entry

    def means(self, accelerator: Accelerator, prefix: str = "") -> dict[str, float]:
        """
        Means since the last call, over all processes: `flow_matching_loss`, `flow_matching_loss_t2v` ...

        Every process must call.
        """
        table = accelerator.reduce(self.table, reduction="sum").tolist()
        self.table = torch.zeros_like(self.table)
        means = {}
        for name, row in zip(LOSS_NAMES, table, strict=True):
            for suffix, (total, count) in zip(("", *(f"_{task}" for task in TASK_NAMES)), row, strict=True):
                if count:
                    means[f"{prefix}{name}_loss{suffix}"] = total / count
        return means
