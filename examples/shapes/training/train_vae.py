"""
Trains the VAE of Omni-Video Shapes: `python -m examples.shapes.training.train_vae --output FOLDER`, resumable.

What runs on two cores taught: a plain L1 leaves the shape out, since it is a twentieth of the pixels, and is slow;
with the square of the error beside it 70 % of images were read right after 1,500 steps, without it 8 %. A stochastic
latent from the start collapses. All 17 frames must be trained on: a VAE that had seen 9 was wrong by 3.5 of 255 in
these and by 33 in the 17th. But images first, from a start with closed branches: 4 minutes of clips then did more than
an hour without. Half the clips are recolored (see recolor.py).
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResample, WanResidualBlock
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.utils.data import Dataset
from transformers import set_seed

from omni_video_hf.shapes.dataset import ShapesDataset
from omni_video_hf.shapes.scene import NUM_FRAMES, render
from omni_video_hf.shapes.scores import Score, check_generation, score_table

from .. import configuration
from ..recolor import any_colors
from .runs import check_settings, fit, save_folder, write_json

LATENT_STATISTICS_SEED = 2  # training clips that are not the first ones trained on
NEVER = 10**9
RECOLORED = 0.5  # share of the clips trained on
KL_WEIGHT = 1e-4
# The strongest noise on latents at the end of the training, since what draws latents is never exact. Of a VAE that saw
# none, the judge read all images right, but with noise of 0.3 on their latents 27 %, with 0.5 none.
LATENT_NOISE = 0.8
CLIPS_AT_ONCE = 8
RECONSTRUCTED = "Reconstructions read as what they show, %"


class RecoloredClips(Dataset):
    """
    The training clips, a share of them in any colours instead of the data set's.

    Args:
        length, seed: as in [`ShapesDataset`].
        share: of the clips that are drawn in other colours; half of these keep their background.
    """

    def __init__(self, length: int, seed: int, share: float) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"`share` must be in 0..1, got {share}.")
        self.clips, self.share = ShapesDataset("t2v", "train", length, seed), share

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        scene = self.clips.example(index).target
        rng = np.random.default_rng((self.clips.seed, range(len(self))[index]))
        if rng.random() >= self.share:
            return {"target": render(scene)}
        return {"target": render(scene, **any_colors(rng, scene, background=rng.random() >= 0.5))}


@torch.no_grad()
def close_branches(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """
    Start an untrained VAE as its shortcuts alone: the branches beside them give zero until they have learned.

    In time, what halves the frames begins as keeping the newer of two and what doubles them as repeating, so that a
    VAE which has learned images is not far from clips that stand still.
    """
    for module in vae.modules():
        last = None
        if isinstance(module, WanResidualBlock):
            last = module.conv2
        elif isinstance(module, WanAttentionBlock):
            last = module.proj
        elif isinstance(module, WanResample):
            last = module.resample[1]
            kernel = module.time_conv.weight  # [out, in, 3, 1, 1]; the last of the three is the newest frame
            kernel.zero_()
            kernel[:, :, -1, 0, 0] = torch.eye(kernel.shape[1]).repeat(len(kernel) // kernel.shape[1], 1)
            module.time_conv.bias.zero_()
        if last is not None:
            last.weight.zero_()
            last.bias.zero_()
    return vae


class VaeObjective(nn.Module):
    """
    Reconstruction and KL loss of a VAE.

    Args:
        vae: the model to train.
        noise_steps: training steps over which the latent goes from the mode to a sample of the posterior.
        kl_weight: of the KL divergence per latent value, beside the absolute and squared error of pixels in -1..1.
        num_frames: frames of a clip it is trained on, from anywhere in the clips it is given.
        latent_noise: standard deviation, in those of the latent channels, of the strongest noise that is added to
            latents beside the posterior's.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        noise_steps: int,
        kl_weight: float,
        num_frames: int,
        latent_noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.vae, self.noise_steps, self.kl_weight, self.num_frames = vae, noise_steps, kl_weight, num_frames
        self.latent_noise = latent_noise
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))  # saved, so that training resumes exactly

    def forward(self, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses of uint8 clips `[batch, frames, height, width, 3]`."""
        # Cut here and not by the data loader, which runs a batch ahead: training would not resume exactly.
        start = int(torch.randint(target.shape[1] - self.num_frames + 1, ()))
        pixels = to_pixels(target[:, start : start + self.num_frames])
        posterior = self.vae.encode(pixels).latent_dist
        noise_share = (self.steps / self.noise_steps).clamp(max=1.0)
        if self.training:
            self.steps += 1
        latents = posterior.mean + noise_share * posterior.std * torch.randn_like(posterior.mean)
        if self.latent_noise > 0:
            latents = latents + self._latent_noise(posterior.mean)
        error = self.vae.decode(latents).sample - pixels
        error = (error.abs() + error.square()).mean(dim=1)
        foreground = foreground_mask(pixels)
        # The shape and what surrounds it count the same, however small the shape is.
        reconstruction = error[foreground].mean() + error[~foreground].mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
        return {
            "loss": reconstruction + noise_share * self.kl_weight * kl,
            "reconstruction": reconstruction.detach(),
            "kl": kl.detach(),
        }

    def _latent_noise(self, latents: torch.Tensor) -> torch.Tensor:
        """From none to the strongest, relative to each channel, so that larger latents do not escape it."""
        strength = self.latent_noise * torch.rand(len(latents), 1, 1, 1, 1, device=latents.device)
        return strength * latents.std(dim=(0, 2, 3, 4), keepdim=True) * torch.randn_like(latents)


def to_pixels(frames: torch.Tensor) -> torch.Tensor:
    """uint8 `[batch, frames, height, width, 3]` -> `[batch, 3, frames, height, width]` in -1..1."""
    return frames.movedim(-1, 1).float() / 127.5 - 1


def to_frames(pixels: torch.Tensor) -> np.ndarray:
    """The inverse of [`to_pixels`]."""
    return ((pixels.movedim(1, -1) + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()


def foreground_mask(pixels: torch.Tensor) -> torch.Tensor:
    """Where clips `[batch, 3, frames, height, width]` differ from their corner, and 2 pixels around: the edge too."""
    differs = (pixels - pixels[..., :1, :1]).abs().amax(dim=1, keepdim=True) > 0.1
    return nn.functional.max_pool3d(differs.float(), (1, 5, 5), stride=1, padding=(0, 2, 2))[:, 0] > 0


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The clips `[batch, frames, height, width, 3]` of the data set's items."""
    return {"target": torch.from_numpy(np.stack([item["target"] for item in items]))}


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKLWan, clips: torch.Tensor) -> None:
    """Write mean and standard deviation of each latent channel over uint8 clips into the VAE's configuration."""
    modes = [_mode(vae, batch) for batch in clips.split(CLIPS_AT_ONCE)]
    latents = torch.cat(modes).movedim(1, 0).flatten(1).double()
    vae.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())


@torch.no_grad()
def evaluate(vae: AutoencoderKLWan, task: str, split: str, count: int, seed: int) -> Score:
    """Whether the judge reads reconstructions of `count` clips (`t2v`) or images (`t2i`) as what they show."""
    dataset = ShapesDataset(task, split, count, seed)
    verdicts = []
    for start in track(
        range(0, count, CLIPS_AT_ONCE), f"Reconstructing {task}, {split}", console=Console(stderr=True)
    ):
        numbers = range(start, min(start + CLIPS_AT_ONCE, count))
        clips = torch.from_numpy(np.stack([dataset[number]["target"] for number in numbers]))
        frames = to_frames(vae.decode(_mode(vae, clips)).sample)
        verdicts += [
            check_generation(dataset.example(number), clip) for number, clip in zip(numbers, frames, strict=True)
        ]
    return Score.of(task, split, verdicts)


def _mode(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    return vae.encode(to_pixels(clips).to(vae.device, vae.dtype)).latent_dist.mode()


def train(
    output: Annotated[Path, typer.Option(help="Folder of checkpoints; the VAE comes to its sub-folder vae.")],
    image_steps: Annotated[int, typer.Option(min=1, help="Steps on images alone, before clips.")] = 2500,
    image_batch_size: Annotated[int, typer.Option(min=1)] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Steps on clips.")] = 1000,
    noisy_steps: Annotated[int, typer.Option(min=1, help="Steps on clips whose latents are noisy, the last.")] = 2000,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    num_frames: Annotated[
        int, typer.Option(min=1, max=NUM_FRAMES, help="Frames of a training clip, 4n+1.")
    ] = NUM_FRAMES,
    learning_rate: float = 2e-3,
    noise_steps: Annotated[
        int, typer.Option(min=1, help="Steps on clips until the latent is a sample of the posterior.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 250,
    eval_clips: Annotated[int, typer.Option(min=1, help="Clips, and images, of each split judged at the end.")] = 200,
) -> None:
    """Train the VAE, from the last checkpoint where there is one, and judge its reconstructions."""
    if num_frames % 4 != 1:
        raise typer.BadParameter(f"`--num-frames` must be 4n+1, got {num_frames}: 9, 13 or 17 are of use.")
    settings = {"image_steps": image_steps, "image_batch_size": image_batch_size, "steps": steps}
    settings |= {"batch_size": batch_size, "num_frames": num_frames, "learning_rate": learning_rate}
    settings |= {"noise_steps": noise_steps, "noisy_steps": noisy_steps, "latent_noise": LATENT_NOISE}
    settings |= {"kl_weight": KL_WEIGHT, "seed": seed, "save_steps": save_steps}
    check_settings(settings, output)
    set_seed(seed)
    vae = close_branches(configuration.vae())
    # Images show the VAE no later frame, so nothing of their latents is noisy: that begins with the clips.
    for number, (phase, frames, phase_steps, phase_batch, noisy_after, noise) in enumerate(
        (
            ("images", 1, image_steps, image_batch_size, NEVER, 0.0),
            ("clips", num_frames, steps, batch_size, noise_steps, 0.0),
            ("noisy", num_frames, noisy_steps, batch_size, 1, LATENT_NOISE),
        )
    ):
        fit(
            VaeObjective(vae, noisy_after, KL_WEIGHT, frames, noise),
            # Other scenes in each, or the clips would begin with the images' own.
            RecoloredClips(phase_steps * phase_batch, seed + number, RECOLORED),
            collate,
            output / phase,
            phase_steps,
            learning_rate,
            save_steps,
            seed,
            per_device_train_batch_size=phase_batch,
        )

    vae.eval()
    dataset = ShapesDataset("t2v", "train", eval_clips, LATENT_STATISTICS_SEED)
    set_latent_statistics(vae, collate(list(dataset))["target"])
    scores = [
        evaluate(vae, task, split, eval_clips, seed) for task in ("t2v", "t2i") for split in ("seen", "composition")
    ]
    Console().print(score_table(scores, RECONSTRUCTED))
    save_folder(vae.save_pretrained, output / "vae")
    write_json({"settings": settings, "scores": [score.to_dict() for score in scores]}, output / "vae.json")


if __name__ == "__main__":
    typer.run(train)
