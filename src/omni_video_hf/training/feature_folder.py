"""
Training data in their simplest form: a folder with one safetensors file per sample.

A file holds the tensors of one sample under the names of the model's arguments, without batch dimension, and the
metadata `task`.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.utils.data import Dataset

from .meter import TASKS
from .randomness import derive_seed

# Names a sample may hold, with the number of dimensions of each.
SAMPLE_TENSORS = {
    "input_ids": 1,
    "attention_mask": 1,
    "labels": 1,
    "pixel_values": 4,
    "mllm_hidden_states": 2,
    "mllm_attention_mask": 1,
    "prompt_embeds": 2,
    "prompt_embeds_mask": 1,
    "latents": 4,
    "source_latents": 4,
    "reference_latents": 4,
    "target_features": 1,
}
SHOWN_OFFENDERS = 20


class FeatureFolder(Dataset):
    """
    Samples of a folder of safetensors files; tensors are read when they are asked for.

    Raises:
        ValueError: with every file that is not a sample, and why, before anything is trained.
    """

    def __init__(self, folder: str | Path) -> None:
        self.files = sorted(Path(folder).glob("*.safetensors"))
        if not self.files:
            raise ValueError(f"{folder}: no *.safetensors files. Every sample is one file.")
        self.tasks: list[str] = []
        self.shapes: list[dict[str, tuple[int, ...]]] = []
        offenders = []
        for file in self.files:
            try:
                with safe_open(file, "pt") as handle:
                    task = (handle.metadata() or {}).get("task")
                    shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
            except SafetensorError as error:
                offenders.append(f"{file.name}: {error}")
                continue
            if fault := _fault(task, shapes):
                offenders.append(f"{file.name}: {fault}")
            self.tasks.append(task)
            self.shapes.append(shapes)
        if offenders:
            more = len(offenders) - SHOWN_OFFENDERS
            listed = offenders[:SHOWN_OFFENDERS] + ([f"and {more} more"] if more > 0 else [])
            raise ValueError(
                f"{folder}: {len(offenders)} of {len(self.files)} files are no samples: {'; '.join(listed)}"
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tensors = load_file(self.files[index])
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ValueError(f"{self.files[index]}: `{name}` holds numbers that are not finite.")
        return {"task": self.tasks[index]} | tensors

    @property
    def is_precomputed(self) -> bool:
        """Whether every sample brings the MLLM's states, so that the MLLM itself is not needed to draw."""
        return all("mllm_hidden_states" in shapes for shapes in self.shapes)


def _fault(task: str | None, shapes: dict[str, tuple[int, ...]]) -> str | None:
    if task not in TASKS:
        return f"the task is {task!r}, not one of {', '.join(TASKS)}"
    for name, shape in shapes.items():
        if name not in SAMPLE_TENSORS:
            return f"unknown tensor {name!r}"
        if len(shape) != SAMPLE_TENSORS[name] or 0 in shape:
            return f"`{name}` is {shape}, not {SAMPLE_TENSORS[name]} dimensions"
    if not {"input_ids", "mllm_hidden_states"} & set(shapes):
        return "neither `input_ids` nor `mllm_hidden_states`"
    return None


class SameShapeBatches:
    """
    A batch sampler of one task and one set of shapes per batch; the order is a function of seed and epoch.

    The batches come in rounds, one per process, and those of a round are of one task and shape, so that sharded
    processes run the same modules. The last round of a shape has smaller batches; samples that do not suffice for one
    each wait for another epoch's shuffle.

    Raises:
        ValueError: when a shape has fewer samples than there are processes, and so would never train.
    """

    def __init__(self, data: FeatureFolder, batch_size: int, seed: int, num_processes: int = 1) -> None:
        self.batch_size, self.seed, self.num_processes, self.epoch = batch_size, seed, num_processes, 0
        buckets = defaultdict(list)
        for index, (task, shapes) in enumerate(zip(data.tasks, data.shapes, strict=True)):
            buckets[task, tuple(sorted(shapes.items()))].append(index)
        for (task, shapes), bucket in buckets.items():
            if len(bucket) < num_processes:
                raise ValueError(
                    f"{len(bucket)} samples of {task} have the shapes {dict(shapes)} (first "
                    f"{data.files[bucket[0]].name}), fewer than the {num_processes} processes: add samples of these "
                    "shapes, or take these out."
                )
        self.buckets = list(buckets.values())

    def __len__(self) -> int:
        return sum(len(self._rounds(bucket)) for bucket in self.buckets) * self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        rounds = []
        for bucket in self.buckets:
            rounds += self._rounds([bucket[i] for i in torch.randperm(len(bucket), generator=generator)])
        for index in torch.randperm(len(rounds), generator=generator):
            samples = rounds[index]
            for process in range(self.num_processes):
                yield samples[process :: self.num_processes]

    def _rounds(self, samples: list[int]) -> list[list[int]]:
        size = self.batch_size * self.num_processes
        rounds = [samples[start : start + size] for start in range(0, len(samples), size)]
        return rounds if len(rounds[-1]) >= self.num_processes else rounds[:-1]

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for this epoch."""
        self.epoch = epoch


def stack_samples(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    A batch from samples of one task and size; pictures of the MLLM are concatenated, as its processor does.

    Raises:
        ValueError: when the samples differ.
    """
    kinds = {(s["task"], *((name, tuple(s[name].shape)) for name in sorted(s) if name != "task")) for s in samples}
    if len(kinds) > 1:
        raise ValueError(
            f"Samples of one batch must be of one task and size, got {sorted(map(str, kinds))}. Use a batch sampler "
            "such as `SameShapeBatches`, or batches of one (`per_device_eval_batch_size: 1`)."
        )
    batch = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if name == "task":
            batch[name] = values[0]
        else:
            batch[name] = torch.cat(values) if name == "pixel_values" else torch.stack(values)
    return batch
