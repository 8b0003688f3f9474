"""Batches of datasets that have no length and no index, such as `datasets` in streaming mode."""

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
    Lists of samples that share a task and a shape, in the order in which the stream fills them.

    Every process reads the whole stream and takes its part of each round of `num_processes` batches, so all of them
    run the same parts of the model. Samples wait until their bucket has a round: at most `batch_size * num_processes`
    of every task and shape are in memory. What waits at the end of the stream makes smaller batches; up to
    `num_processes - 1` samples of a bucket are left out.

    Args:
        samples: the stream; it is read again when it ends, with `set_epoch` called first where it has one.
        batch_size: samples per process and step.
        num_processes: how many processes share the batches.
        process_index: which one this is.
        endless: begin the stream anew when it ends.

    Raises:
        ValueError: for a stream that gives no batch, and for a sample that is none.
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
                f"`dataloader_num_workers` is {worker.num_workers}, but a stream is read by one: set it to 1 or 0."
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
                    f"The streamed dataset gave no batch for {self.num_processes} processes: is it empty, or was it "
                    "read to its end before?"
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
        raise ValueError(f"Sample {number} of the stream is no mapping of inputs by name but {type(sample).__name__}.")
    for name in TENSORS:
        if name in sample and not isinstance(sample[name], torch.Tensor):
            raise ValueError(
                f"Sample {number} of the stream: `{name}` is {type(sample[name]).__name__}, no tensor: use "
                "`dataset.with_format('torch')`, or make tensors in `map`."
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
    Batches of a stream for this process.

    Args:
        samples: see [`StreamOfBatches`].
        collate: makes a batch of a list of samples.
        args: sizes of batches and settings of the loader.
        accelerator: says which process this is.
        training: whether the stream is to begin anew when it ends.
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
    # The batches are dealt out already: for accelerate there is one process.
    return prepare_data_loader(
        loader, device=accelerator.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )


__all__ = ["StreamOfBatches", "stream_loader"]
