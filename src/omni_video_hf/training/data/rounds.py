"""Batches of a step, dealt out so that every process has as many."""

from collections.abc import Iterator
from typing import Any


class RoundsOfBatches:
    """
    A batch sampler for several processes: whole rounds only, so that none of them waits for a batch that never comes.

    accelerate deals the batches out, one per process and round.
    """

    batch_size = None
    drop_last = True

    def __init__(self, batches: Any, num_processes: int) -> None:
        self.batches = batches
        self.num_processes = num_processes

    def __len__(self) -> int:
        return len(self.batches) // self.num_processes * self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        for _, batch in zip(range(len(self)), self.batches, strict=False):
            yield batch
