"""
Training the decoder behind frozen bridges, as the released fine-tune: our step against upstream's way, same loss.

Upstream's way reads one pickle per sample, runs vision head and adapter for it, pads the context to its full length,
and runs every block twice to save memory (gradient checkpointing). Ours reads the adapter output, computed once, from
safetensors, folds the padding, and runs every block once. Which part of the gain is due to what, the variants tell.
"""

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file

from omni_video_hf import OmniVideoForConditionalGeneration, OmniVideoLossConfig

from .measure import interleaved, spread
from .proportional import whole_model

DIVISOR, BATCH, STEPS, REPETITIONS = 4, 2, 1, 5
PROMPT_TOKENS, MLLM_TOKENS, LATENTS = 60 // DIVISOR, 164 // DIVISOR, (16, 1, 30, 30)  # an image of 240x240
LOSSES = OmniVideoLossConfig(alignment_weight=0.0)
TITLE = "Training the decoder on images, samples per second"
COLUMNS = {
    "way": lambda row: row["way"],
    "samples / s": lambda row: f"{row['samples_per_second']:.2f}",
    "a step, s": lambda row: spread(row["step"]),
    "faster than upstream's": lambda row: f"{row['speedup']:.2f}",
    "in processor time": lambda row: f"{row['processor_speedup']:.2f}",
    "loss": lambda row: f"{row['loss']:.6f}",
}


def measure(progress: Progress) -> list[dict[str, Any]]:
    """One row per way."""
    model = whole_model(DIVISOR).requires_grad_(False)
    model.decoder.requires_grad_(True)
    model.train()
    with tempfile.TemporaryDirectory() as folder:
        _write_samples(model, Path(folder))
        ways = {
            "upstream's": _way(model, Path(folder), upstream=True, checkpointing=True),
            "upstream's, blocks once": _way(model, Path(folder), upstream=True, checkpointing=False),
            "ours, blocks twice": _way(model, Path(folder), upstream=False, checkpointing=True),
            "ours": _way(model, Path(folder), upstream=False, checkpointing=False),
        }
        losses = {name: way(learn=False) for name, way in ways.items()}
        timings = interleaved(ways, REPETITIONS, progress)
    first = timings["upstream's"]
    return [
        {
            "way": name,
            "samples_per_second": BATCH * STEPS / timing.median,
            "step": timing.to_dict() | {key: getattr(timing, key) / STEPS for key in ("median", "fastest", "slowest")},
            "speedup": first.median / timing.median,
            "processor_speedup": first.processor / timing.processor,
            "loss": losses[name],
        }
        for name, timing in timings.items()
    ]


def _write_samples(model: OmniVideoForConditionalGeneration, folder: Path) -> None:
    """Every sample as upstream's pickle and as our file."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    for index in range(BATCH * STEPS):
        states = torch.randn(MLLM_TOKENS, config.vision_head_config.mllm_hidden_size, generator=generator)
        sample = {
            "prompt_embeds": torch.randn(PROMPT_TOKENS, config.adapter_config.hidden_size, generator=generator),
            "latents": torch.randn(LATENTS, generator=generator),
        }
        with (folder / f"{index}.pkl").open("wb") as file:
            pickle.dump(sample | {"mllm_hidden_states": states}, file)
        with torch.no_grad():
            embeds = model.adapter.adapt_vision_tokens(model.vision_head(states[None]), "image")[0]
        save_file(sample | {"vision_embeds": embeds}, folder / f"{index}.safetensors")


def _way(
    model: OmniVideoForConditionalGeneration, folder: Path, upstream: bool, checkpointing: bool
) -> Callable[..., float]:
    """A function that trains for some steps and gives the mean loss; `learn=False` leaves the weights alone."""
    # A rate of zero: the same work, and every way meets the same weights.
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=0.0)

    def train(learn: bool = True) -> float:
        if checkpointing:
            model.decoder.enable_gradient_checkpointing()
        else:
            model.decoder.disable_gradient_checkpointing()
        losses = []
        for step in range(STEPS):
            read = _read_pickle if upstream else load_file
            suffix = "pkl" if upstream else "safetensors"
            samples = [read(folder / f"{step * BATCH + index}.{suffix}") for index in range(BATCH)]
            batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
            # Upstream pads to the full length: the blocks are given a context that is that long already.
            loss = _loss(model, batch, padded=upstream, seed=step)
            if learn:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return sum(losses) / STEPS

    return train


def _loss(
    model: OmniVideoForConditionalGeneration, batch: dict[str, torch.Tensor], padded: bool, seed: int
) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(BATCH * seed + index) for index in range(BATCH)]
    if not padded:
        return model(**batch, generator=generators, loss_config=LOSSES).loss
    predict = model.predict_velocity

    class Padded(type(model)):
        """The same model without folding."""

        def predict_velocity(
            self, latents: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, **sources: torch.Tensor | None
        ) -> torch.Tensor:
            return predict(latents, timesteps, self.adapter.pad_context(context), **sources)

    own, model.__class__ = model.__class__, Padded
    try:
        return model(**batch, generator=generators, loss_config=LOSSES).loss
    finally:
        model.__class__ = own


def _read_pickle(file: Path) -> dict[str, torch.Tensor]:
    with file.open("rb") as stream:
        return pickle.load(stream)  # noqa: S301 - written above
