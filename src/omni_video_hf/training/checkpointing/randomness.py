"""
Per-step random generators: resuming and sharding do not change results.

Everything a step draws is a function of the run's seed, the step and the sample's place in the step. So a resumed run
draws what the uninterrupted one would have, and a step of four samples draws the same on one process, on two, or
accumulated from four batches of one.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*key: int) -> int:
    """A seed of 63 bits from integers of 0 or more, by numpy's `SeedSequence`."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def sample_generators(seed: int, step: int, first: int, batch_size: int, stride: int) -> list[torch.Generator]:
    """
    One generator per sample of a batch, on the CPU, so that devices do not differ.

    Args:
        step: optimiser steps done; another number for other purposes, such as evaluation.
        first: number of the batch within its step.
        stride: the usual batch size, by which batches of a step number their samples.
    """
    return [
        torch.Generator().manual_seed(derive_seed(seed, step, first * stride + index % stride, index // stride))
        for index in range(batch_size)
    ]


def draw_dropouts(
    generators: Sequence[torch.Generator], both: float, instruction: float, prompt: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Decide per sample which conditions are dropped; `both`, `instruction` and `prompt` are the probabilities.

    Returns:
        Two boolean `[batch]`: instruction dropped, prompt dropped.
    """
    draws = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    drops_both = draws < both
    drops_instruction = (draws >= both) & (draws < both + instruction)
    drops_prompt = (draws >= both + instruction) & (draws < both + instruction + prompt)
    return drops_both | drops_instruction, drops_both | drops_prompt


def draw_source_dropout(generators: Sequence[torch.Generator], probability: float) -> torch.Tensor:
    """Decide per sample whether its source is dropped, boolean `[batch]`; drawn after [`draw_dropouts`]."""
    return torch.cat([torch.rand(1, generator=generator) for generator in generators]) < probability


@contextmanager
def kept_chance() -> Iterator[None]:
    """Leave the global generators of Python, numpy and torch, on every device, as they were before the block."""
    python, numbers = random.getstate(), np.random.get_state()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = [] if accelerator is None else list(range(torch.accelerator.device_count()))
    with torch.random.fork_rng(devices, device_type="cuda" if accelerator is None else accelerator.type):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)
