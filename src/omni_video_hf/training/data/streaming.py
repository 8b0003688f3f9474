"""Batches from streamed datasets without length and index, such as `datasets` in streaming mode."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..arguments import OmniVideoTrainingArguments
from .batch_sampler import Bucket
from .collator import TENSORS, bucket_of


class StreamOfBatches(IterableDataset):
    """
    Batches (lists of samples) of one bucket each, in the order in which the stream completes them.

    Every process reads the whole stream and uses its batch of each round of `num_processes` batches, so that all
    processes run the same components. Samples wait until their bucket has a complete round: at most
    `batch_size * num_processes` samples per bucket are in memory. At the end of the stream, the waiting samples form
    smaller batches; up to `num_processes - 1` samples of a bucket are left out.

    Args:
        samples: the stream. Before it is read again, `set_epoch` is called, if it has that method.
        batch_size: samples per process and step.
        num_processes: number of processes that share the batches.
        process_index: index of this process.
        endless: read the stream again when it ends.

    Raises:
        ValueError: for a stream without a batch, and for a sample that is not a mapping of tensors.
    """

    def __init__(
        self,
        samples: Iterable[Mapping[str, Any]],
        batch_size: int,
        num_processes: int,
        process_index: int,
        endless: bool,
    ) -> None:
        self.samples, self.batch_size, self.endless = samples, batch_size, endless
        self.num_processes, self.process_index = num_processes, process_index

    def __iter__(self) -> Iterator[list[Mapping[str, Any]]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"`dataloader_num_workers` is {worker.num_workers}, but a stream needs a single worker: set it to 1 "
                "or 0."
            )
        for epoch in count() if self.endless else range(1):
            if hasattr(self.samples, "set_epoch"):
                self.samples.set_epoch(epoch)
            is_empty = True
            for batch in self._one_pass():
                is_empty = False
                yield batch
            if is_empty:
                raise ValueError(
                    f"The streamed dataset gave no batch for {self.num_processes} processes. It is empty, too short, "
                    "or can be read only once: pass a dataset that can be read again."
                )

    def _one_pass(self) -> Iterator[list[Mapping[str, Any]]]:
        waiting: dict[Bucket, list[Mapping[str, Any]]] = {}
        for number, sample in enumerate(self.samples):
            bucket = _bucket(sample, number)
            group = waiting.setdefault(bucket, [])
            group.append(sample)
            if len(group) == self.batch_size * self.num_processes:
                yield self._share(waiting.pop(bucket))
        for group in waiting.values():
            if len(group) >= self.num_processes:
                yield self._share(group)

    def _share(self, group: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        size = len(group) // self.num_processes
        return group[self.process_index * size : (self.process_index + 1) * size]


def _bucket(sample: Any, number: int) -> Bucket:
    if not isinstance(sample, Mapping):
        raise ValueError(
            f"Sample {number} of the stream must be a mapping of inputs by name, got {type(sample).__name__}."
        )
    for name in TENSORS:
        if name in sample and not isinstance(sample[name], torch.Tensor):
            raise ValueError(
                f"Sample {number} of the stream: `{name}` must be a tensor, got {type(sample[name]).__name__}: use "
                "`dataset.with_format('torch')`, or create tensors in `map`."
            )
    return bucket_of(sample.get("task"), {name: sample[name].shape for name in TENSORS if name in sample})


def stream_loader(
    samples: Iterable[Mapping[str, Any]],
    collate: Callable[[list[Mapping[str, Any]]], dict[str, Any]],
    args: OmniVideoTrainingArguments,
    accelerator: Accelerator,
    training: bool,
) -> DataLoader:
    """
    Create the data loader of a stream for this process.

    Args:
        samples: see [`StreamOfBatches`].
        collate: function that creates a batch from a list of samples.
        args: batch sizes and settings of the data loader.
        accelerator: accelerator with the number and index of the process.
        training: read the stream again when it ends.
    """
    batch_size = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
    batches = StreamOfBatches(samples, batch_size, accelerator.num_processes, accelerator.process_index, training)
    loader = DataLoader(
        batches,
        batch_size=None,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    # The batches are already distributed: prepare the loader as for a single process.
    return prepare_data_loader(
        loader, device=accelerator.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )


__all__ = ["StreamOfBatches", "stream_loader"]
