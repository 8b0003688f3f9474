"""`LossMeter`: mean of every loss, in total and by task, over all processes."""

import torch
from accelerate import Accelerator

from ...diffusion.losses import LOSS_NAMES
from ...models.outputs import OmniVideoOutput
from ...tasks import TASKS

TASK_NAMES = tuple(TASKS)


class LossMeter:
    """
    Sums losses on the device, so that steps do not wait for it, and computes means on request.

    Every process has a table of the same shape, so that processes with different tasks can be summed.
    """

    def __init__(self, device: torch.device) -> None:
        self.seen: set[str] = set()  # losses that were computed for any batch of this process
        # [loss, total and each task, (sum over samples, number of samples)]
        self.table = torch.zeros(len(LOSS_NAMES), 1 + len(TASK_NAMES), 2, device=device)

    def add(self, output: OmniVideoOutput, task: str | None, batch_size: int) -> None:
        """Add the losses of one batch."""
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
        Means over all processes since the last call: `flow_matching_loss`, `flow_matching_loss_t2v` ...

        Every process must call this.
        """
        table = accelerator.reduce(self.table, reduction="sum").tolist()
        self.table = torch.zeros_like(self.table)
        means = {}
        for name, row in zip(LOSS_NAMES, table, strict=True):
            for suffix, (total, count) in zip(("", *(f"_{task}" for task in TASK_NAMES)), row, strict=True):
                if count:
                    means[f"{prefix}{name}_loss{suffix}"] = total / count
        return means
