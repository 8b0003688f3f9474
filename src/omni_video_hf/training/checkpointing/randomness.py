"""
Per-step random generators: resuming and sharding do not change results.

All random numbers of a step depend only on the seed of the run, the step, and the position of the sample in the step.
A resumed run therefore uses the same numbers as an uninterrupted one, and so does a step of four samples on one
process, on two processes, or accumulated from four batches of one sample.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*key: int) -> int:
    """Derive a seed of 63 bits from integers of 0 or more, with `SeedSequence` of numpy."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def sample_generators(seed: int, step: int, first: int, batch_size: int, stride: int) -> list[torch.Generator]:
    """
    One generator per sample of a batch, on the CPU, so that all devices give the same numbers.

    Args:
        seed: seed of the run.
        step: number of optimiser steps before this one; another number for other purposes, such as evaluation.
        first: number of the batch within its step.
        batch_size: number of samples in the batch.
        stride: usual batch size; sample `i < stride` of the batch is number `first * stride + i` of its step.
    """
    return [
        torch.Generator().manual_seed(derive_seed(seed, step, first * stride + index % stride, index // stride))
        for index in range(batch_size)
    ]


def draw_dropouts(
    generators: Sequence[torch.Generator], both: float, instruction: float, prompt: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Sample which conditions are dropped; `both`, `instruction` and `prompt` are probabilities per sample.

    Returns:
        Two boolean tensors `[batch]`: instruction dropped, prompt dropped.
    """
    numbers = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    drops_both = numbers < both
    drops_instruction = (numbers >= both) & (numbers < both + instruction)
    drops_prompt = (numbers >= both + instruction) & (numbers < both + instruction + prompt)
    return drops_both | drops_instruction, drops_both | drops_prompt


def draw_source_dropout(generators: Sequence[torch.Generator], probability: float) -> torch.Tensor:
    """Decide per sample whether its source is dropped, boolean `[batch]`; drawn after [`draw_dropouts`]."""
    return torch.cat([torch.rand(1, generator=generator) for generator in generators]) < probability


@contextmanager
def kept_chance() -> Iterator[None]:
    """Restore the global generators of Python, numpy and torch (on every device) after the block."""
    python, numbers = random.getstate(), np.random.get_state()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = [] if accelerator is None else list(range(torch.accelerator.device_count()))
    with torch.random.fork_rng(devices, device_type="cuda" if accelerator is None else accelerator.type):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)
