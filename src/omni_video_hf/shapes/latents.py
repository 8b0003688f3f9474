"""
Latents of the training scenes, computed once: `python -m omni_video_hf.shapes.latents --vae FOLDER --output FOLDER`.

Before and after of an edit are two training scenes that differ in one attribute, so the pairs of `v2v` and `i2i` serve
`t2v` and `t2i` too. What is said about them is drawn anew whenever they are trained on; only pixels cost time.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKLWan
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file

from .dataset import Example, ShapesDataset
from .runs import check_settings, write_json
from .train_vae import to_pixels

EDITS = {"video": "v2v", "image": "i2i"}
SHARD_PAIRS = 100  # what a kill costs at most
CLIPS_AT_ONCE = 8


class ScenePairs:
    """
    Pairs of training scenes, before and after an edit, as the VAE sees them.

    Args:
        folder: written by this module.
        kind: `"video"` or `"image"`.

    Attributes:
        examples: the edits, with both scenes.
        latents: float16 `[pairs, 2, channels, frames, height, width]`, normalised; before and after.

    Raises:
        ValueError: when pairs are missing.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        files = sorted(folder.glob(f"{EDITS[kind]}-*.safetensors"))
        if not files:
            raise ValueError(f"{folder}: no latents of {EDITS[kind]}: compute them with omni_video_hf.shapes.latents.")
        self.kind = kind
        self.latents = torch.cat([load_file(file)["latents"] for file in files])
        dataset = edits(kind, len(self.latents))
        self.examples: list[Example] = [dataset.example(index) for index in range(len(dataset))]


def edits(kind: str, count: int) -> ShapesDataset:
    """The edits that are encoded."""
    return ShapesDataset(EDITS[kind], "train", count)


@torch.no_grad()
def encode_pairs(vae: AutoencoderKLWan, kind: str, count: int, folder: Path) -> None:
    """Write what is missing of `count` pairs, in shards that come to their names when they are complete."""
    dataset = edits(kind, count)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    for start in track(
        range(0, count, SHARD_PAIRS), f"Encoding pairs of {kind}s", console=Console(stderr=True), transient=True
    ):
        path = folder / f"{EDITS[kind]}-{start:06d}.safetensors"
        if path.exists():
            continue
        items = [dataset[index] for index in range(start, min(start + SHARD_PAIRS, count))]
        clips = torch.from_numpy(np.stack([item[name] for item in items for name in ("source", "target")]))
        modes = [vae.encode(to_pixels(batch)).latent_dist.mode() for batch in clips.split(CLIPS_AT_ONCE)]
        latents = ((torch.cat(modes) - mean) / std).half().unflatten(0, (-1, 2))
        partial = path.with_suffix(".partial")
        save_file({"latents": latents.contiguous()}, partial)
        partial.replace(path)


def main(
    vae: Annotated[Path, typer.Option(help="Folder of the trained VAE.")],
    output: Annotated[Path, typer.Option(help="Folder for the latents.")],
    videos: Annotated[int, typer.Option(min=1, help="Pairs of clips.")] = 4000,
    images: Annotated[int, typer.Option(min=1, help="Pairs of images.")] = 5000,
) -> None:
    """Encode pairs of training scenes; goes on where it was stopped."""
    model = AutoencoderKLWan.from_pretrained(vae).eval()
    # Statistics differ with the last digit of any weight, and are there to be compared.
    check_settings({"videos": videos, "images": images, "latents_mean": model.config.latents_mean}, output)
    for kind, count in (("image", images), ("video", videos)):
        encode_pairs(model, kind, count, output)
    write_json({"videos": videos, "images": images}, output / "latents.json")


__all__ = ["ScenePairs", "encode_pairs"]


if __name__ == "__main__":
    typer.run(main)
