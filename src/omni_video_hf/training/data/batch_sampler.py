"""`OmniVideoBatchSampler`: batches of one bucket (task and shapes), tasks mixed by weight, reproducible order."""

import math
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from ...tasks import TASKS
from ...utils.names import check_known

STOPPING_STRATEGIES = ("first_exhausted", "all_exhausted")  # names as in `datasets.interleave_datasets`


class Bucket(NamedTuple):
    """
    Task and shapes that all samples of a batch have in common.

    Args:
        task: one of `TASKS`.
        shapes: name and shape of every input that is stacked, and `()` as the shape of inputs that are padded, because
            samples with and without an input cannot be in the same batch.
    """

    task: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __str__(self) -> str:
        sizes = [f"{name} {'x'.join(map(str, shape))}" for name, shape in self.shapes if shape]
        pictures = [name for name, _ in self.shapes if name == "pixel_values"]
        return f"{self.task} ({', '.join(sizes + pictures)})" if sizes + pictures else self.task


class OmniVideoBatchSampler:
    """
    Batch sampler whose batches each contain samples of one [`Bucket`], for one process or several.

    The order depends only on `seed` and the epoch, so that a resumed run can skip the batches it has used. Each round
    of `num_processes` consecutive batches has one bucket and one batch size: accelerate gives one batch of a round to
    every process, and all processes run the same components on equal shapes. No sample is used twice in an epoch,
    except with `"all_exhausted"`. The last round of a bucket may be smaller than `batch_size`; up to
    `num_processes - 1` of its samples, different ones in every epoch, are left out, so that all processes get the same
    number.

    Args:
        buckets: the bucket of every sample, such as `dataset.buckets`.
        batch_size: samples per process and step.
        num_processes: number of processes that share the batches.
        weights: share of the batches by task, e.g. `{"t2v": 2, "understand": 1}`; a weight of 0 leaves the task out.
            Default: every sample is used once per epoch.
        stopping_strategy: with `weights`, `"first_exhausted"` ends the epoch when all samples of one task were used,
            and uses a different random part of the other tasks in each epoch; `"all_exhausted"` ends it when all
            samples of every task were used, and repeats samples of the other tasks.
        drop_last: leave out rounds that are smaller than `batch_size`.
        seed: seed of the order.

    Raises:
        ValueError: for a task without samples or weight, or a bucket with too few samples for the processes.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        batch_size: int,
        num_processes: int = 1,
        weights: Mapping[str, float] | None = None,
        stopping_strategy: str = "first_exhausted",
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("num_processes", num_processes)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        check_known("stopping_strategy", [stopping_strategy], STOPPING_STRATEGIES)
        self.samples_per_batch, self.num_processes, self.drop_last = batch_size, num_processes, drop_last
        self.seed, self.epoch = seed, 0
        numbers: dict[Bucket, array[int]] = defaultdict(lambda: array("q"))
        for index, bucket in enumerate(buckets):
            numbers[bucket].append(index)
        self._members: dict[str, dict[Bucket, np.ndarray]] = defaultdict(dict)
        for bucket, indices in numbers.items():
            self._members[bucket.task][bucket] = np.asarray(indices)
        if weights is not None:
            self._check_weights(weights)
            self._members = {task: self._members[task] for task in weights if weights[task] > 0}
        self._check_bucket_sizes()
        rounds = {task: sum(map(self._rounds_of, members.values())) for task, members in self._members.items()}
        self._rounds = rounds if weights is None else _mix(rounds, weights, stopping_strategy)

    # accelerate reads these two: batches have different sizes, and their number is a multiple of the processes.
    batch_size = None

    @property
    def sampler(self) -> "OmniVideoBatchSampler":
        """The object on which accelerate calls `set_epoch`, an attribute of batch samplers in torch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, 0 or more, which determines the next order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self._rounds.values()) * self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        chance = np.random.default_rng((self.seed, self.epoch))
        chosen: list[list[np.ndarray]] = []
        for task, members in self._members.items():
            wanted = self._rounds[task]
            rounds: list[list[np.ndarray]] = []
            while len(rounds) < wanted:  # repeats only with `all_exhausted`
                again = [part for indices in members.values() for part in self._deal(indices, chance)]
                rounds += [again[number] for number in chance.permutation(len(again))]
            chosen += rounds[:wanted]
        for number in chance.permutation(len(chosen)):
            yield from (part.tolist() for part in chosen[number])

    def describe(self) -> list[tuple[Bucket, int]]:
        """Every bucket and its number of samples, largest first."""
        sizes = [(bucket, len(indices)) for members in self._members.values() for bucket, indices in members.items()]
        return sorted(sizes, key=lambda entry: -entry[1])

    def _rounds_of(self, indices: np.ndarray) -> int:
        each = len(indices) // self.num_processes
        return each // self.samples_per_batch if self.drop_last else math.ceil(each / self.samples_per_batch)

    def _deal(self, indices: np.ndarray, chance: np.random.Generator) -> Iterator[list[np.ndarray]]:
        """Yield the rounds of one bucket in one epoch: each is a list of equally large batches, one per process."""
        shuffled = indices[chance.permutation(len(indices))]
        each = len(shuffled) // self.num_processes
        hands = [shuffled[rank * each : (rank + 1) * each] for rank in range(self.num_processes)]
        for number in range(self._rounds_of(indices)):
            part = slice(number * self.samples_per_batch, (number + 1) * self.samples_per_batch)
            yield [hand[part] for hand in hands]

    def _check_weights(self, weights: Mapping[str, float]) -> None:
        check_known("weights", weights, TASKS)
        for task, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"`weights`: the weight of {task} must be 0 or more, got {weight}.")
            if weight > 0 and task not in self._members:
                raise ValueError(
                    f"`weights`: {task} has the weight {weight}, but the data have no sample of this task: add some, "
                    "or use the weight 0."
                )
        if not any(weights.values()):
            raise ValueError("`weights`: all weights are 0, so that no batch would remain: set one above 0.")
        missing = sorted(set(self._members) - set(weights))
        if missing:
            raise ValueError(f"`weights` has no entry for {', '.join(missing)}: add one; 0 leaves a task out.")

    def _check_bucket_sizes(self) -> None:
        needed = self.num_processes * (self.samples_per_batch if self.drop_last else 1)
        small = [(bucket, size) for bucket, size in self.describe() if size < needed]
        if small:
            listed = "; ".join(f"{bucket}: {size}" for bucket, size in small[:8])
            more = f"; and {len(small) - 8} more" if len(small) > 8 else ""
            raise ValueError(
                f"{len(small)} buckets have fewer than {needed} samples and would never be used ({listed}{more}): add "
                "samples of these sizes, remove them, or use fewer processes"
                + (" or `drop_last=False`." if self.drop_last else ".")
            )


def _mix(available: Mapping[str, int], weights: Mapping[str, float], stopping_strategy: str) -> dict[str, int]:
    """Number of rounds of each task in an epoch, in the proportion of `weights`, at least one."""
    # Exact fractions, because the number of batches must not depend on the rounding of a float.
    lengths = {task: Fraction(available[task]) / Fraction(weights[task]) for task in available}
    length = min(lengths.values()) if stopping_strategy == "first_exhausted" else max(lengths.values())
    return {task: max(1, round(length * Fraction(weights[task]))) for task in available}


__all__ = ["STOPPING_STRATEGIES", "Bucket", "OmniVideoBatchSampler"]
