"""
Trains the decoder to take the source in its input channels, so that edits keep what nobody asked to change.

`python -m examples.shapes.training.train_edit --model FOLDER --pairs FOLDER --output FOLDER`, resumable; `--pairs` is
what `edit_pairs` wrote. Images come first: they take a fifth of the time and teach all but motions.

A part of every batch are prompts without a source. There the decoder learns the velocities of the decoder that it
began from, so that generation stays as it is. Only new weights train, see `wide_decoder`.
"""

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import WanTransformer3DModel
from torch import nn
from torch.utils.data import Dataset
from transformers import set_seed

from omni_video_hf.diffusion.flow_matching import NUM_TRAIN_TIMESTEPS, add_noise, velocity_target
from omni_video_hf.models.connectors import OmniVideoAdapter
from omni_video_hf.models.context_attention import folded_context
from omni_video_hf.pipelines.pipeline_omni_video import OmniVideoPipeline

from ..configuration import SOURCE_CONDITIONING
from .edit_pairs import STREAMS, EditFeatures
from .runs import check_settings, fit, multiplies_bfloat16, save_folder, the_batch, write_json
from .wide_decoder import merge, widen

EDIT_STREAMS = {"edits": 0.50, "others": 0.43, "keep": 0.07}  # shares of the edits
TEXTS = 0.25  # share of a batch that has no source
# Shares of the samples that lose a part of their condition. Visual tokens of another sample teach that prompt and
# source decide: visual tokens are wrong about one in ten of the edits to combinations that training never shows.
NO_INSTRUCTION, OTHER_INSTRUCTION, NO_PROMPT, NEITHER = 0.15, 0.25, 0.08, 0.08
OTHER_INSTRUCTION_OF_TEXTS = 0.08
NO_SOURCE = 0.02  # of those that lose both, for guidance by the source
SHIFT = 3.0  # of the timesteps, as in sampling
NEURONS = 480  # more in every block: the checkpoint stays below 25 MB


@dataclass(frozen=True)
class Phase:
    """
    A part of the training, with a schedule of its own.

    Args:
        steps: batches.
        learning_rate: the highest.
        video_share: share of the batches that are videos; the others are images.
        scheduler: transformers' name of the schedule.
        generation_weight: of the loss that keeps generation as it is; that of the edits is 1.
        video_batch_size, image_batch_size: samples of a batch.
    """

    steps: int
    learning_rate: float
    video_share: float
    scheduler: str = "cosine"
    generation_weight: float = 1.0
    video_batch_size: int = 32
    image_batch_size: int = 64


PHASES = {
    "images": Phase(steps=300, learning_rate=4e-3, video_share=0.0, scheduler="constant_with_warmup"),
    "clips": Phase(steps=1700, learning_rate=4e-3, video_share=0.7, generation_weight=2.0),
}


class EditBatches(Dataset):
    """
    Whole batches, each of one kind.

    Args:
        features: by stream and kind.
        phase: how many batches there are, and of what.
        seed: batch `index` is a function of it and `index` alone.
    """

    def __init__(self, features: dict[tuple[str, str], EditFeatures], phase: Phase, seed: int) -> None:
        self.features, self.phase, self.seed = features, phase, seed

    def __len__(self) -> int:
        return self.phase.steps

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.seed, index))
        is_video = rng.random() < self.phase.video_share
        kind = "video" if is_video else "image"
        size = self.phase.video_batch_size if is_video else self.phase.image_batch_size
        texts = round(size * TEXTS)
        parts = [self._rows("texts", kind, texts, rng)]
        counts = rng.multinomial(size - texts, list(EDIT_STREAMS.values()))
        parts += [self._rows(s, kind, count, rng) for s, count in zip(EDIT_STREAMS, counts, strict=True) if count]
        batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        batch["has_source"] = torch.arange(size) >= texts
        batch["draws"] = torch.from_numpy(rng.random((size, 3))).float()
        others = [
            first + (np.arange(count) + rng.integers(1, max(2, count))) % count
            for first, count in ((0, texts), (texts, size - texts))
        ]
        batch["other"] = torch.from_numpy(np.concatenate(others))  # within texts, and within edits
        return batch

    def _rows(self, stream: str, kind: str, count: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        features = self.features[stream, kind]
        rows = torch.from_numpy(rng.integers(len(features), size=count))
        found = {name: tensor[rows] for name, tensor in features.tensors.items()}
        if "source" not in found:
            found["source"] = torch.zeros_like(found["target"])
        return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}


class EditObjective(nn.Module):
    """
    Flow matching of a decoder with source channels.

    Args:
        decoder: with source channels.
        teacher: the decoder before this training; the trained one keeps its velocities for samples without a source.
        adapter: adapter of the same model, which does not train.
        null_vision_embeds: `[1, tokens, width]` by kind of output, of the empty instruction.
        phase: of the training; its mix, and the weight of generation.
    """

    def __init__(
        self,
        decoder: WanTransformer3DModel,
        teacher: WanTransformer3DModel,
        adapter: OmniVideoAdapter,
        null_vision_embeds: dict[str, torch.Tensor],
        phase: Phase,
    ) -> None:
        super().__init__()
        self.decoder, self.phase = decoder, phase
        self._frozen = (teacher.requires_grad_(False).eval(), adapter.requires_grad_(False).eval())  # in no checkpoint
        self.null_vision_embeds = null_vision_embeds

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss of a batch of [`EditBatches`], whose first samples have no source."""
        teacher, adapter = self._frozen
        target, draws = batch["target"], batch["draws"]
        texts = int((~batch["has_source"]).sum())
        context = self._context(batch, adapter)
        u = torch.rand(len(target), device=target.device)
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        noise = torch.randn_like(target)
        noisy = add_noise(target, noise, sigma)
        timesteps = sigma * NUM_TRAIN_TIMESTEPS
        source = batch["source"] * (draws[:, 2] <= 1 - NO_SOURCE).view(-1, 1, 1, 1, 1)
        wanted = velocity_target(target, noise)
        length = adapter.config.max_context_length
        with torch.no_grad(), folded_context(teacher, context[:texts], length) as folded:
            kept = teacher(noisy[:texts], timesteps[:texts], folded, return_dict=False)[0]
        with folded_context(self.decoder, context, length) as folded:
            velocity = self.decoder(torch.cat([noisy, source], 1), timesteps, folded, return_dict=False)[0]
        edits = nn.functional.mse_loss(velocity[texts:].float(), wanted[texts:].float())
        generation = nn.functional.mse_loss(velocity[:texts].float(), kept.float())
        return {"loss": edits + self.phase.generation_weight * generation}

    @torch.no_grad()
    def _context(self, batch: dict[str, torch.Tensor], adapter: OmniVideoAdapter) -> torch.Tensor:
        """Contexts of all samples, with the null states in place of the conditions that a sample loses."""
        kind = "image" if batch["target"].shape[2] == 1 else "video"
        draws, has_source, embeds = batch["draws"], batch["has_source"], batch["vision_embeds"]
        neither = draws[:, 2] > 1 - NEITHER
        null = (draws[:, 0] < NO_INSTRUCTION) | neither
        other = torch.where(has_source, OTHER_INSTRUCTION, OTHER_INSTRUCTION_OF_TEXTS)
        swapped = (draws[:, 0] > 1 - other) & ~null
        vision = torch.where(swapped[:, None, None], embeds[batch["other"]], embeds)
        vision = torch.where(null[:, None, None], self.null_vision_embeds[kind].to(vision), vision)
        no_prompt = ((draws[:, 1] < NO_PROMPT) | neither).tolist()
        null_prompt = adapter.null_prompt_embeds().to(batch["prompt_embeds"])
        prompts = [
            null_prompt if drop else row[:length]
            for row, length, drop in zip(
                batch["prompt_embeds"], batch["prompt_length"].tolist(), no_prompt, strict=True
            )
        ]
        return adapter(
            vision_embeds=vision,
            prompt_embeds=prompts,
            output_kind=kind,
            source_latents=batch["source"],
            drop_source=~has_source,
        )


def train(
    model: Annotated[Path, typer.Option(help="Folder of the pipeline whose decoder is to learn edits.")],
    pairs: Annotated[Path, typer.Option(help="Folder of examples.shapes.training.edit_pairs.")],
    output: Annotated[Path, typer.Option(help="For checkpoints; the result comes to its sub-folder transformer.")],
    shorten: Annotated[int, typer.Option(min=1, help="Divides the steps of every phase, for a trial.")] = 1,
    seed: Annotated[int, typer.Option(min=0)] = 21,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 250,
) -> None:
    """
    Train source channels and new neurons of the decoder, from the last checkpoint where there is one.

    Raises:
        ValueError: for a model that has source channels already.
    """
    settings = {"phases": {name: asdict(phase) for name, phase in PHASES.items()}, "shorten": shorten, "seed": seed}
    check_settings(settings, output, model)
    set_seed(seed)
    pipe = OmniVideoPipeline.from_pretrained(model, torch_dtype=torch.float32)
    with torch.no_grad():
        tokens = pipe.mllm(output_vision_tokens=True).vision_tokens
        nulls = {kind: pipe.adapter.adapt_vision_tokens(tokens, kind) for kind in ("image", "video")}
    if pipe.adapter.takes_source_in_channels:
        raise ValueError(
            f"{model}: has source channels already; begin from the model without, and resume by running again."
        )
    decoder = widen(copy.deepcopy(pipe.transformer), NEURONS)
    pipe.adapter.register_to_config(source_conditioning=SOURCE_CONDITIONING)
    for number, (name, phase) in enumerate(PHASES.items()):
        kinds = ("image",) if phase.video_share == 0 else ("image", "video")
        features = {(stream, kind): EditFeatures(pairs, stream, kind) for stream in STREAMS for kind in kinds}
        steps = max(1, phase.steps // shorten)
        fit(
            EditObjective(decoder, pipe.transformer, pipe.adapter, nulls, phase),
            EditBatches(features, phase, seed + number),
            the_batch,
            output / name,
            steps,
            phase.learning_rate,
            save_steps,
            seed + number,
            weight_decay=0.05,
            lr_scheduler_type=phase.scheduler,
            per_device_train_batch_size=1,  # an item is a batch
            bf16=multiplies_bfloat16(),
        )
    save_folder(merge(decoder.eval().to("cpu")).save_pretrained, output / "transformer")
    write_json({"settings": settings}, output / "edit.json")


__all__ = ["EditBatches", "EditObjective", "Phase", "train"]


if __name__ == "__main__":
    typer.run(train)
