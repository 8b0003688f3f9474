"""`RoundsOfBatches`: give every process the same number of batches of any batch sampler."""

from collections.abc import Iterator
from typing import Any


class RoundsOfBatches:
    """
    A batch sampler for several processes that yields complete rounds, so that no process waits for a missing batch.

    A round has one batch for each process; accelerate distributes them.
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
