"""
Latents of the training scenes, computed once.

`python -m examples.shapes.training.latents --vae FOLDER --output FOLDER`.

Before and after of an edit are two training scenes that differ in one attribute, so the pairs of `v2v` and `i2i` serve
`t2v` and `t2i` too. What is said about them is drawn anew whenever they are trained on; only pixels cost time.
"""

import itertools
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKLWan
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file

from omni_video_hf.shapes.dataset import Example, ShapesDataset
from omni_video_hf.shapes.scene import BACKGROUNDS, render
from omni_video_hf.utils.files import complete_or_absent

from ..recolor import MIN_CONTRAST, any_colors
from .runs import check_settings, write_json
from .train_vae import to_pixels

EDITS = {"video": "v2v", "image": "i2i"}
RECOLORED_SEED = 5  # of scenes that no other training begins with
SHARD_PAIRS = 100  # what a kill costs at most
CLIPS_AT_ONCE = {"cpu": 8, "cuda": 200}


class ScenePairs:
    """
    Pairs of training scenes, before and after an edit, as the VAE sees them.

    Args:
        folder: written by this module.
        kind: `"video"` or `"image"`.
        recolored: those whose shapes have any colours (see recolor.py), which no prompt names.

    Attributes:
        examples: the edits, with both scenes.
        colors: RGB of each pair's shape, or `None` where it has the scenes' own.
        latents: float16 `[pairs, 2, channels, frames, height, width]`, normalised; before and after.

    Raises:
        ValueError: when pairs are missing.
    """

    def __init__(self, folder: Path, kind: str, recolored: bool = False) -> None:
        name = _name(kind, recolored)
        files = sorted(folder.glob(f"{name}-*.safetensors"))
        if not files:
            raise ValueError(f"{folder}: no latents of {name}: compute them with examples.shapes.training.latents.")
        self.kind, self.recolored = kind, recolored
        self.latents = torch.cat([load_file(file)["latents"] for file in files])
        self.examples, self.colors = zip(*drawn(kind, len(self.latents), recolored), strict=True)

    def render(self, row: int, side: int) -> np.ndarray:
        """The clip or image of a pair before (`side` 0) or after (1) the edit, as [`render`] gives it."""
        example = self.examples[row]
        return render((example.source, example.target)[side], example.num_frames, color=self.colors[row])


Pairs = dict[tuple[str, bool], ScenePairs]


def read_pairs(folder: Path) -> Pairs:
    """All pairs of scenes that this module wrote, by kind and whether they are recolored."""
    return {key: ScenePairs(folder, *key) for key in itertools.product(EDITS, (False, True))}


def drawn(kind: str, count: int, recolored: bool) -> list[tuple[Example, np.ndarray | None]]:
    """The edits that are encoded, and the colours, RGB, that their shapes have instead of their own."""
    if not recolored:
        dataset = ShapesDataset(EDITS[kind], "train", count)
        return [(dataset.example(index), None) for index in range(count)]
    examples = map(ShapesDataset(EDITS[kind], "train", sys.maxsize, RECOLORED_SEED).example, itertools.count())
    others = (example for example in examples if example.attribute != "color")
    rng = np.random.default_rng(RECOLORED_SEED)
    return [(example, _any_color(rng, example)) for example in itertools.islice(others, count)]


def _any_color(rng: np.random.Generator, example: Example) -> np.ndarray:
    """A colour that is near none that is held out, and is seen before both backgrounds."""
    after = np.array(BACKGROUNDS[example.target.background])
    while True:
        color = any_colors(rng, example.source, background=False, tells_shape=False)["color"]
        if np.linalg.norm(color - after) > MIN_CONTRAST:
            return color


def _name(kind: str, recolored: bool) -> str:
    return f"recolored-{EDITS[kind]}" if recolored else EDITS[kind]


@torch.no_grad()
def encode_pairs(vae: AutoencoderKLWan, kind: str, count: int, folder: Path, recolored: bool = False) -> None:
    """Write what is missing of `count` pairs, in shards that come to their names when they are complete."""
    pairs, name = drawn(kind, count, recolored), _name(kind, recolored)
    for start in track(range(0, count, SHARD_PAIRS), f"Encoding {name}", console=Console(stderr=True), transient=True):
        path = folder / f"{name}-{start:06d}.safetensors"
        if path.exists():
            continue
        clips = [
            render(scene, example.num_frames, color=color)
            for example, color in pairs[start : start + SHARD_PAIRS]
            for scene in (example.source, example.target)
        ]
        latents = _encode(vae, torch.from_numpy(np.stack(clips))).unflatten(0, (-1, 2))
        with complete_or_absent(path) as partial:
            save_file({"latents": latents.contiguous()}, partial)


def _encode(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """uint8 clips -> normalised float16 latents."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    batches = clips.split(CLIPS_AT_ONCE[vae.device.type])
    modes = [vae.encode(to_pixels(batch.to(vae.device))).latent_dist.mode().cpu() for batch in batches]
    return ((torch.cat(modes) - mean) / std).half()


def main(
    vae: Annotated[Path, typer.Option(help="Folder of the trained VAE.")],
    output: Annotated[Path, typer.Option(help="Folder for the latents.")],
    videos: Annotated[int, typer.Option(min=1, help="Pairs of clips.")] = 6000,
    images: Annotated[int, typer.Option(min=1, help="Pairs of images.")] = 6000,
    recolored_videos: Annotated[int, typer.Option(min=1, help="Pairs of clips in any colours.")] = 2500,
    recolored_images: Annotated[int, typer.Option(min=1, help="Pairs of images in any colours.")] = 3000,
) -> None:
    """Encode pairs of training scenes, and recolored ones; goes on where it was stopped."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoencoderKLWan.from_pretrained(vae, torch_dtype=torch.float32).eval().to(device)
    counts = {"videos": videos, "images": images}
    counts |= {"recolored_videos": recolored_videos, "recolored_images": recolored_images}
    check_settings(counts, output, vae)
    for kind in ("image", "video"):
        encode_pairs(model, kind, counts[f"{kind}s"], output)
        encode_pairs(model, kind, counts[f"recolored_{kind}s"], output, recolored=True)
    write_json(counts, output / "latents.json")


__all__ = ["Pairs", "ScenePairs", "encode_pairs", "read_pairs"]


if __name__ == "__main__":
    typer.run(main)
