"""
Pairs of clips and images before and after an edit, as the decoder learns edits from them: encoded once.

`python -m examples.shapes.training.edit_pairs --model FOLDER --output FOLDER`.

A pair holds the latents of source and target, the adapter's tokens of the instruction and the embeddings of the
prompt: MLLM, adapter, text encoder and VAE do not change while the decoder learns edits. The streams, `STREAMS`:

- `edits` are the edits of the data set.
- `others` have sources of any colour, outline, size and background, so that the decoder copies from the source what
  nobody asked to change, instead of guessing it from the prompt.
- `keep` ask for nothing new: source and target are equal.
- `texts` have no source: they keep generation as it is.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file

from omni_video_hf.media.sources import Source
from omni_video_hf.pipelines.pipeline_omni_video import OmniVideoPipeline
from omni_video_hf.shapes.dataset import Example, ShapesDataset
from omni_video_hf.shapes.prompts import edit_prompt
from omni_video_hf.shapes.scene import BACKGROUNDS, COLORS, SIDE, SIZES, Outline, Scene, coverage
from omni_video_hf.utils.files import complete_or_absent

from ..outlines import any_outline
from ..recolor import MIN_CONTRAST, any_colors
from .latents import EDITS
from .runs import check_settings, write_json

STREAMS = ("edits", "others", "keep", "texts")
PAIRS = {
    "image": {"edits": 4000, "others": 3000, "keep": 600, "texts": 3000},
    "video": {"edits": 3000, "others": 2200, "keep": 450, "texts": 1500},
}
SEEDS = {"edits": 61, "others": 62, "keep": 63, "texts": 64}  # of scenes that no other training begins with
LONGEST_PROMPT = 24  # tokens of the text encoder
SHARD_PAIRS = 50  # what a kill costs at most
ANY_COLOR, ANY_OUTLINE, ANY_BACKGROUND = 0.5, 0.4, 0.25  # shares of the sources of `others` and `keep`
RADIUS = (-1.5, 2.5)  # pixels that their radius differs from the scene's size
TEXTURES = 0.5  # share of `keep` that are no shapes
KEEP_PROMPTS = (
    "keep it as it is",
    "leave it as it is",
    "do not change it",
    "change nothing",
    "keep the {kind} as it is",
    "leave the {kind} as it is",
    "make no change",
    "it should not change",
)


@dataclass(frozen=True)
class Look:
    """
    How a scene is drawn in place of its own values.

    Args:
        color, background: RGB.
        radius: pixels.
        outline: drawn instead of the scene's shape.
    """

    color: np.ndarray
    background: np.ndarray
    radius: float
    outline: Outline | None = None


def draw(scene: Scene, num_frames: int, look: Look) -> np.ndarray:
    """A scene with another look, uint8 `[frames, 64, 64, 3]`; with `num_frames=1` its middle frame."""
    outline = look.outline or partial(coverage, scene.shape, look.radius)
    pixels = np.arange(SIDE) + 0.5
    centers = scene.centers(num_frames)
    share = outline(pixels[None, None] - centers[:, :1, None], pixels[None, :, None] - centers[:, 1:, None])
    colors = look.background + share[..., None] * (look.color - look.background)
    return np.rint(np.broadcast_to(colors, (num_frames, SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Pair:
    """A prompt, and the clips or images before and after it; without `source` for generation."""

    prompt: str
    source: np.ndarray | None
    target: np.ndarray


def make_pair(stream: str, kind: str, index: int) -> Pair:
    """Pair `index` of a stream, a function of its arguments alone."""
    rng = np.random.default_rng((SEEDS[stream], kind == "video", index))
    if stream == "texts":
        task = {"video": "t2v", "image": "t2i"}[kind]
        item = ShapesDataset(task, "train", sys.maxsize, SEEDS[stream])[index]
        return Pair(item["prompt"], None, item["target"])
    dataset = ShapesDataset(EDITS[kind], "train", sys.maxsize, SEEDS[stream])
    example = dataset.example(index)
    if stream == "edits":
        item = dataset[index]
        return Pair(item["prompt"], item["source"], item["target"])
    if stream == "keep":
        return _kept(rng, example)
    before, after = _looks(rng, example)
    return Pair(
        example.prompt,
        draw(example.source, example.num_frames, before),
        draw(example.target, example.num_frames, after),
    )


def _looks(rng: np.random.Generator, example: Example) -> tuple[Look, Look]:
    """Any look of the source, and the same of the target but for what the edit changes."""
    source, target, changed = example.source, example.target, example.attribute
    while True:
        looks = any_colors(rng, source, background=rng.random() < ANY_BACKGROUND, tells_shape=False)
        color = looks["color"] if rng.random() < ANY_COLOR else np.array(COLORS[source.color])
        background = looks["background"]
        after_color = np.array(COLORS[target.color]) if changed == "color" else color
        after_background = np.array(BACKGROUNDS[target.background]) if changed == "background" else background
        contrasts = [np.linalg.norm(color - background), np.linalg.norm(after_color - after_background)]
        if min(contrasts) > MIN_CONTRAST:
            break
    outlines: tuple[Outline | None, Outline | None] = (None, None)
    radius = SIZES[source.size] + rng.uniform(*RADIUS)
    if rng.random() < ANY_OUTLINE:
        drawn = int(rng.integers(2**31))  # the same outline, of the size of the scene
        outlines = any_outline(np.random.default_rng(drawn), source), any_outline(np.random.default_rng(drawn), target)
        if changed == "shape":
            outlines = outlines[0], None
    after_radius = SIZES[target.size] if changed == "size" else radius
    return Look(color, background, radius, outlines[0]), Look(after_color, after_background, after_radius, outlines[1])


def _kept(rng: np.random.Generator, example: Example) -> Pair:
    """A pair whose target is its source: the prompt asks for what the source shows already, or for nothing."""
    kind = example.kind
    prompt = KEEP_PROMPTS[rng.integers(len(KEEP_PROMPTS))].format(kind=kind)
    if rng.random() < TEXTURES:
        clip = texture(rng, example.num_frames)
        return Pair(prompt, clip, clip)
    scene = example.target
    if rng.random() < 0.5:
        attribute = str(example.attribute)
        prompt = edit_prompt(rng, scene, attribute, getattr(scene, attribute))
        look = Look(
            np.array(COLORS[scene.color]),
            np.array(BACKGROUNDS[scene.background]),
            SIZES[scene.size] + rng.uniform(*RADIUS) * (attribute != "size"),
        )
    else:
        example = Example(example.task, kind, prompt, source=scene, target=scene, attribute="motion")
        look, _ = _looks(rng, example)
    clip = draw(scene, example.num_frames, look)
    return Pair(prompt, clip, clip)


def texture(rng: np.random.Generator, num_frames: int) -> np.ndarray:
    """A picture of soft and hard edges in many colours, that moves slowly in a clip."""
    side, octaves = SIDE + 32, []
    for cells in (2, 4, 8, 16):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        resample = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)[rng.integers(3)]
        octaves.append(np.asarray(noise.resize((side, side), resample), np.float32))
    weights = rng.dirichlet(np.ones(len(octaves)) * 0.7)
    picture = sum(weight * octave for weight, octave in zip(weights, octaves, strict=True))
    picture = (picture - picture.mean()) * rng.uniform(0.8, 2.0) + rng.uniform(40, 215)
    start, step = rng.uniform(8, 24, 2), rng.uniform(-0.5, 0.5, 2) * (rng.random() < 0.6)
    corners = [np.rint(start + step * frame).astype(int) for frame in range(num_frames)]
    frames = [picture[top : top + SIDE, left : left + SIDE] for top, left in corners]
    return np.stack(frames).clip(0, 255).astype(np.uint8)


class EditFeatures:
    """
    What [`encode_pairs`] wrote, as tensors.

    Args:
        folder: written by this module.
        stream: one of `STREAMS`.
        kind: `"video"` or `"image"`.

    Raises:
        ValueError: when some are missing.
    """

    def __init__(self, folder: Path, stream: str, kind: str) -> None:
        if not (folder / f"{kind}s.json").exists():
            raise ValueError(f"{folder}: pairs of {kind}s are missing: run examples.shapes.training.edit_pairs.")
        files = sorted(folder.glob(f"{stream}-{kind}-*.safetensors"))
        shards = [load_file(file) for file in files]
        self.stream, self.kind = stream, kind
        self.tensors = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}

    def __len__(self) -> int:
        return len(self.tensors["target"])


@torch.no_grad()
def encode_pairs(pipe: OmniVideoPipeline, stream: str, kind: str, count: int, folder: Path) -> None:
    """Write what is missing of `count` pairs, in shards that come to their names when they are complete."""
    name = f"{stream}-{kind}"
    for start in track(range(0, count, SHARD_PAIRS), f"Encoding {name}", console=Console(stderr=True), transient=True):
        path = folder / f"{name}-{start:06d}.safetensors"
        if path.exists():
            continue
        pairs = [make_pair(stream, kind, index) for index in range(start, min(start + SHARD_PAIRS, count))]
        with complete_or_absent(path) as partial_file:
            save_file(_features(pipe, kind, pairs), partial_file)


def _features(pipe: OmniVideoPipeline, kind: str, pairs: list[Pair]) -> dict[str, torch.Tensor]:
    prompts = [pair.prompt for pair in pairs]
    features = {"target": encode(pipe, [pair.target for pair in pairs])}
    source, task = None, {"video": "t2v", "image": "t2i"}[kind]
    if pairs[0].source is not None:
        clips = [pair.source for pair in pairs]
        features["source"], task = encode(pipe, clips), EDITS[kind]
        media = clips if kind == "video" else [Image.fromarray(clip[0]) for clip in clips]
        source = Source.of(media, None, len(pairs)) if kind == "video" else Source.of(None, media, len(pairs))
    vision = pipe.encode_instruction(task, prompts, source)
    texts = pipe.encode_prompt(prompts)
    features["vision_embeds"] = pipe.adapter.adapt_vision_tokens(vision, kind)
    features["prompt_embeds"] = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    padding = LONGEST_PROMPT - features["prompt_embeds"].shape[1]
    if padding < 0:
        raise ValueError(f"A prompt has more than {LONGEST_PROMPT} tokens (`LONGEST_PROMPT`).")
    features["prompt_embeds"] = torch.nn.functional.pad(features["prompt_embeds"], (0, 0, 0, padding))
    features = {name: tensor.half().contiguous() for name, tensor in features.items()}
    return features | {"prompt_length": torch.tensor([len(text) for text in texts])}


def encode(pipe: OmniVideoPipeline, clips: list[np.ndarray]) -> torch.Tensor:
    """uint8 clips -> normalised latents."""
    config = pipe.vae.config
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    pixels = torch.from_numpy(np.stack(clips)).float().permute(0, 4, 1, 2, 3) / 127.5 - 1
    modes = [pipe.vae.encode(batch).latent_dist.mode() for batch in pixels.split(8)]
    return (torch.cat(modes) - mean) / std


def main(
    model: Annotated[Path, typer.Option(help="Folder of the pipeline whose decoder is to learn edits.")],
    output: Annotated[Path, typer.Option(help="Folder for the features.")],
    kinds: Annotated[str, typer.Option(help="image, video or both with a comma.")] = "image,video",
    shorten: Annotated[int, typer.Option(min=1, help="Divides the number of pairs, for a trial.")] = 1,
) -> None:
    """Encode pairs of edits; continues where it was stopped."""
    check_settings({"pairs": PAIRS, "shorten": shorten}, output, model)
    pipe = OmniVideoPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for kind in kinds.split(","):
        for stream, count in PAIRS[kind].items():
            encode_pairs(pipe, stream, kind, max(1, count // shorten), output)
        write_json(PAIRS[kind], output / f"{kind}s.json")


__all__ = ["STREAMS", "EditFeatures", "Pair", "draw", "encode_pairs", "make_pair"]


if __name__ == "__main__":
    typer.run(main)
