"""
Sharpens what the VAE draws: its decoder learns on, behind an encoder that stays, so latents stay what they are.

`python -m examples.shapes.training.train_vae_decoder --vae FOLDER --output FOLDER`, resumable, beside whatever is
trained on the latents meanwhile. What train_vae.py leaves draws small triangles too blunt: they have few of the pixels
of shapes, so here every clip counts the same.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKLWan
from rich.console import Console
from torch import nn
from transformers import set_seed

from omni_video_hf.shapes.scores import SHOWN_SPLITS, score_table

from .runs import check_settings, fit, save_folder, write_json
from .train_vae import RECOLORED, RECONSTRUCTED, RecoloredClips, collate, evaluate, foreground_mask, to_pixels

# The strongest noise on normalised latents: half of what train_vae.py ends with, for sharper outlines.
LATENT_NOISE = 0.4


class VaeDecoderObjective(nn.Module):
    """
    Reconstruction loss of a VAE whose encoder is frozen.

    Args:
        vae: its decoder trains.
        latent_noise: standard deviation of the strongest noise on latents, in those of the latent channels.
    """

    def __init__(self, vae: AutoencoderKLWan, latent_noise: float) -> None:
        super().__init__()
        self.vae, self.latent_noise = vae, latent_noise
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        std = torch.tensor(vae.config.latents_std)[:, None, None, None]
        self.register_buffer("std", std, persistent=False)

    def forward(self, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss of uint8 clips `[batch, frames, height, width, 3]`."""
        pixels = to_pixels(target)
        with torch.no_grad():
            latents = self.vae.encode(pixels).latent_dist.mean
        strength = self.latent_noise * torch.rand(len(latents), 1, 1, 1, 1, device=latents.device)
        latents = latents + strength * self.std * torch.randn_like(latents)
        error = self.vae.decode(latents).sample - pixels
        error = (error.abs() + error.square()).mean(dim=1).flatten(1)
        # The shape and what surrounds it count the same in every clip, however small the shape is.
        shape = foreground_mask(pixels).flatten(1).float()
        means = [(error * mask).sum(dim=1) / mask.sum(dim=1) for mask in (shape, 1 - shape)]
        return {"loss": (means[0] + means[1]).mean()}


def train(
    vae: Annotated[Path, typer.Option(help="Folder of the trained VAE.")],
    output: Annotated[Path, typer.Option(help="Folder of checkpoints; the VAE comes to its sub-folder vae.")],
    steps: Annotated[int, typer.Option(min=1)] = 1500,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    learning_rate: float = 1e-3,
    seed: Annotated[int, typer.Option(min=0)] = 3,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 250,
    eval_clips: Annotated[int, typer.Option(min=1, help="Clips, and images, of each split judged at the end.")] = 200,
) -> None:
    """Train the decoder of the VAE, from the last checkpoint where there is one, and judge reconstructions."""
    settings = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    settings |= {"latent_noise": LATENT_NOISE, "seed": seed, "save_steps": save_steps}
    check_settings(settings, output, vae)
    set_seed(seed)
    model = AutoencoderKLWan.from_pretrained(vae)
    fit(
        VaeDecoderObjective(model, LATENT_NOISE),
        RecoloredClips(steps * batch_size, seed, RECOLORED),
        collate,
        output / "clips",
        steps,
        learning_rate,
        save_steps,
        seed,
        per_device_train_batch_size=batch_size,
    )
    model.eval().to("cpu")
    scores = [evaluate(model, task, split, eval_clips, 0) for task in ("t2v", "t2i") for split in SHOWN_SPLITS]
    Console().print(score_table(scores, RECONSTRUCTED))
    save_folder(model.save_pretrained, output / "vae")
    write_json({"settings": settings, "scores": [score.to_dict() for score in scores]}, output / "vae.json")


if __name__ == "__main__":
    typer.run(train)
