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
from .recolor import any_colors
from .runs import check_settings, write_json
from .scene import NUM_FRAMES, Scene, render
from .train_vae import to_pixels

EDITS = {"video": "v2v", "image": "i2i"}
GENERATIONS = {"video": "t2v", "image": "t2i"}
RECOLORED_SEED = 5  # of scenes that no other training begins with
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


class RecoloredScenes:
    """
    Training scenes whose shapes have any colours (see recolor.py), as the VAE sees them.

    Args:
        folder: written by this module.
        kind: `"video"` or `"image"`.

    Attributes:
        scenes: what is shown, but for the colour.
        latents: float16 `[scenes, channels, frames, height, width]`, normalised.

    Raises:
        ValueError: when scenes are missing.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        path = folder / f"recolored-{kind}.safetensors"
        if not path.exists():
            raise ValueError(f"{path}: is missing: compute it with omni_video_hf.shapes.latents.")
        self.kind, self.latents = kind, load_file(path)["latents"]
        self.scenes = [scene for scene, _ in recolored(kind, len(self.latents))]


def recolored(kind: str, count: int) -> list[tuple[Scene, np.ndarray]]:
    """Scenes and the colours, RGB, that their shapes have instead; none near those that are held out."""
    dataset = ShapesDataset(GENERATIONS[kind], "train", count, RECOLORED_SEED)
    scenes = [dataset.example(index).target for index in range(count)]
    rng = np.random.default_rng(RECOLORED_SEED)
    return [(scene, any_colors(rng, scene, background=False, tells_shape=False)["color"]) for scene in scenes]


def edits(kind: str, count: int) -> ShapesDataset:
    """The edits that are encoded."""
    return ShapesDataset(EDITS[kind], "train", count)


@torch.no_grad()
def encode_pairs(vae: AutoencoderKLWan, kind: str, count: int, folder: Path) -> None:
    """Write what is missing of `count` pairs, in shards that come to their names when they are complete."""
    dataset = edits(kind, count)
    for start in track(
        range(0, count, SHARD_PAIRS), f"Encoding pairs of {kind}s", console=Console(stderr=True), transient=True
    ):
        path = folder / f"{EDITS[kind]}-{start:06d}.safetensors"
        if path.exists():
            continue
        items = [dataset[index] for index in range(start, min(start + SHARD_PAIRS, count))]
        clips = torch.from_numpy(np.stack([item[name] for item in items for name in ("source", "target")]))
        _save(_encode(vae, clips).unflatten(0, (-1, 2)), path)


@torch.no_grad()
def encode_recolored(vae: AutoencoderKLWan, kind: str, count: int, folder: Path) -> None:
    """Write [`RecoloredScenes`] if they are not there."""
    path, num_frames = folder / f"recolored-{kind}.safetensors", NUM_FRAMES if kind == "video" else 1
    if path.exists():
        return
    drawn, latents = recolored(kind, count), []
    for start in track(
        range(0, count, SHARD_PAIRS), f"Encoding recolored {kind}s", console=Console(stderr=True), transient=True
    ):
        clips = [render(scene, num_frames, color=color) for scene, color in drawn[start : start + SHARD_PAIRS]]
        latents.append(_encode(vae, torch.from_numpy(np.stack(clips))))
    _save(torch.cat(latents), path)


def _encode(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """uint8 clips -> normalised float16 latents."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    modes = [vae.encode(to_pixels(batch)).latent_dist.mode() for batch in clips.split(CLIPS_AT_ONCE)]
    return ((torch.cat(modes) - mean) / std).half()


def _save(latents: torch.Tensor, path: Path) -> None:
    """Write latents under a name that they come to when they are complete."""
    partial = path.with_suffix(".partial")
    save_file({"latents": latents.contiguous()}, partial)
    partial.replace(path)


def main(
    vae: Annotated[Path, typer.Option(help="Folder of the trained VAE.")],
    output: Annotated[Path, typer.Option(help="Folder for the latents.")],
    videos: Annotated[int, typer.Option(min=1, help="Pairs of clips.")] = 4000,
    images: Annotated[int, typer.Option(min=1, help="Pairs of images.")] = 5000,
    recolored_videos: Annotated[int, typer.Option(min=1, help="Clips in any colours.")] = 1500,
    recolored_images: Annotated[int, typer.Option(min=1, help="Images in any colours.")] = 3000,
) -> None:
    """Encode pairs of training scenes, and recolored ones; goes on where it was stopped."""
    model = AutoencoderKLWan.from_pretrained(vae).eval()
    counts = {"videos": videos, "images": images}
    counts |= {"recolored_videos": recolored_videos, "recolored_images": recolored_images}
    # Statistics differ with the last digit of any weight, and are there to be compared.
    check_settings(counts | {"latents_mean": model.config.latents_mean}, output)
    for kind in ("image", "video"):
        encode_pairs(model, kind, counts[f"{kind}s"], output)
        encode_recolored(model, kind, counts[f"recolored_{kind}s"], output)
    write_json(counts, output / "latents.json")


__all__ = ["RecoloredScenes", "ScenePairs", "encode_pairs", "encode_recolored"]


if __name__ == "__main__":
    typer.run(main)
