"""
Trains the decoder as a plain text-to-video and text-to-image model, which the paper takes as given.

`python -m examples.shapes.training.train_text_to_video --vae FOLDER --text-encoder FOLDER --latents FOLDER --output
FOLDER`, resumable, in the phases of [`PHASES`]: each teaches what the next takes for granted. The text encoder stays.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.utils.data import Dataset
from transformers import UMT5EncoderModel, set_seed

from omni_video_hf.diffusion.flow_matching import NUM_TRAIN_TIMESTEPS, add_noise, token_timesteps, velocity_target
from omni_video_hf.diffusion.losses import draw_timestep_indices, timestep_tables
from omni_video_hf.models.context_attention import folded_context
from omni_video_hf.shapes.dataset import ShapesDataset
from omni_video_hf.shapes.prompts import generation_prompt
from omni_video_hf.shapes.scores import SHOWN_SPLITS, Score, check_generation, score_table

from .. import configuration
from ..tokenizers import text_tokenizer
from .latents import Pairs, read_pairs
from .noise import LOSSES, uneven_timesteps
from .runs import check_settings, fit, multiplies_bfloat16, save_folder, the_batch, write_json
from .train_text_encoder import SECOND_NAME, drop_second_name

PROMPT_DROPOUT = 0.1
DRAWN_AT_ONCE = 20


@dataclass(frozen=True)
class Phase:
    """
    A part of the training, with a schedule of its own.

    Args:
        steps: batches.
        learning_rate: the highest, after a short rise; a cosine leads to nothing.
        video_share: of the batches; the others are images.
        uneven: share of the batches of clips whose frames have a noise level each.
        only_first: share of these clips of which the first frame alone has little noise.
        recolored: share of the batches whose shapes have any colours, which their prompts leave open.
        weight_decay: of matrices.
    """

    steps: int
    learning_rate: float = 1e-2
    video_share: float = 0.0
    uneven: float = 0.0
    only_first: float = 0.0
    recolored: float = 0.0
    weight_decay: float = 0.0


PHASES = {
    # Words, shapes and colours are the same as in clips, and a fifth of the tokens teach them.
    "images": Phase(steps=1200),
    # A frame of little noise says where from, and words alone where to; with even noise words for motions explain too
    # little to be learned. By now matrices have grown, and decay keeps them from growing out of the steps' reach; from
    # the start it kept the words out.
    "clips": Phase(steps=3000, video_share=0.9, uneven=0.5, only_first=0.6, weight_decay=0.1),
    # By now clips move as asked, and nearly all that is wrong are outlines too blunt to be read: what is missing is
    # steps. Of so many, colours would come to speak for shapes.
    "outlines": Phase(steps=4000, video_share=0.85, uneven=0.3, only_first=0.6, recolored=1 / 3, weight_decay=0.1),
}


class CaptionedBatches(Dataset):
    """
    Whole batches, each of one kind: latents of scenes and ids of newly drawn prompts.

    Args:
        pairs: what there is of each kind, and recolored.
        phase: how many batches there are, and of what.
        batch_sizes: samples of a batch, by kind.
        seed: batch `index` is a function of it and `index` alone.
    """

    def __init__(self, pairs: Pairs, phase: Phase, batch_sizes: dict[str, int], seed: int) -> None:
        self.pairs, self.phase, self.batch_sizes, self.seed = pairs, phase, batch_sizes, seed
        self.tokenizer = text_tokenizer()

    def __len__(self) -> int:
        return self.phase.steps

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.seed, index))
        kind = "video" if rng.random() < self.phase.video_share else "image"
        pairs = self.pairs[kind, rng.random() < self.phase.recolored]
        size = self.batch_sizes[kind]
        rows, sides = rng.integers(len(pairs.latents), size=size), rng.integers(2, size=size)
        examples = [pairs.examples[row] for row in rows]
        scenes = [(example.source, example.target)[side] for example, side in zip(examples, sides, strict=True)]
        prompts = [generation_prompt(rng, scene, kind, names_color=not pairs.recolored) for scene in scenes]
        tokens = self.tokenizer(prompts, padding=True, return_tensors="pt")
        return {"latents": pairs.latents[rows, sides].float(), **tokens}


class TextToVideoObjective(nn.Module):
    """
    Flow matching of a decoder on the embeddings of prompts.

    Args:
        text_encoder: stays as it is.
        transformer: the decoder.
        context_length: tokens of zeros that contexts act as padded to, as later among visual tokens.
        prompt_dropout: share of the samples that see the empty prompt, for guidance.

    `phase` says which noise clips have.
    """

    phase = PHASES["images"]

    def __init__(
        self,
        text_encoder: UMT5EncoderModel,
        transformer: WanTransformer3DModel,
        context_length: int,
        prompt_dropout: float,
    ) -> None:
        super().__init__()
        self.text_encoder, self.transformer = text_encoder.requires_grad_(False), transformer
        self.context_length, self.prompt_dropout = context_length, prompt_dropout
        self.register_state_dict_post_hook(drop_second_name)
        self._keys_to_ignore_on_save = [SECOND_NAME]

    def train(self, mode: bool = True) -> "TextToVideoObjective":
        """The text encoder is without dropout, as it is when the decoder draws."""
        super().train(mode)
        self.text_encoder.eval()
        return self

    def tie_weights(self) -> None:
        """Called when a checkpoint is loaded: the two names are one tensor already."""

    def forward(
        self, latents: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The loss of latents `[batch, channels, frames, height, width]` under prompts `[batch, length]`."""
        config, device = self.text_encoder.config, latents.device
        dropped = torch.rand(len(latents), 1, device=device) < self.prompt_dropout
        is_first = torch.arange(input_ids.shape[1], device=device) == 0
        empty = torch.where(is_first, config.eos_token_id, config.pad_token_id)
        input_ids = torch.where(dropped, empty, input_ids)
        attention_mask = torch.where(dropped, is_first.long(), attention_mask)
        context = self.text_encoder(input_ids, attention_mask).last_hidden_state * attention_mask[..., None]
        noise, timesteps = torch.randn_like(latents), self._timesteps(latents)
        noisy = add_noise(latents, noise, timesteps / NUM_TRAIN_TIMESTEPS)
        if timesteps.ndim == 2:
            timesteps = token_timesteps(timesteps, latents, self.transformer.config.patch_size)
        with folded_context(self.transformer, context, self.context_length) as folded:
            velocity = self.transformer(noisy, timesteps, folded, return_dict=False)[0]
        return {"loss": nn.functional.mse_loss(velocity.float(), velocity_target(latents, noise).float())}

    def _timesteps(self, latents: torch.Tensor) -> torch.Tensor:
        """Timesteps `[batch]`, or in an uneven batch `[batch, frames]`."""
        count, frames = latents.shape[0], latents.shape[2]
        if frames == 1 or torch.rand(()).item() >= self.phase.uneven:
            timesteps = timestep_tables(LOSSES)[0][draw_timestep_indices(count, LOSSES)]
        else:
            timesteps = torch.stack([uneven_timesteps(frames, self.phase.only_first) for _ in range(count)])
        return timesteps.to(latents.device)


@torch.no_grad()
def evaluate(pipe: WanPipeline, task: str, split: str, count: int, seed: int) -> Score:
    """Whether the judge reads `count` clips (`t2v`) or images (`t2i`) as what was asked for; the text alone speaks."""
    dataset, preset = ShapesDataset(task, split, count, seed), configuration.PRESETS[task]
    names = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
    verdicts = []
    for start in track(range(0, count, DRAWN_AT_ONCE), f"Drawing {task}, {split}", console=Console(stderr=True)):
        examples = [dataset.example(number) for number in range(start, min(start + DRAWN_AT_ONCE, count))]
        frames = pipe(
            [example.prompt for example in examples],
            negative_prompt="",
            max_sequence_length=configuration.ADAPTER["max_context_length"],
            generator=[torch.Generator().manual_seed(seed + start + number) for number in range(len(examples))],
            output_type="np",
            **{name: preset[name] for name in names},
        ).frames
        clips = (frames * 255).round().astype(np.uint8)
        verdicts += [check_generation(example, clip) for example, clip in zip(examples, clips, strict=True)]
    return Score.of(task, split, verdicts)


def train(
    vae: Annotated[Path, typer.Option(help="Folder of the trained VAE.")],
    text_encoder: Annotated[Path, typer.Option(help="Folder of the trained text encoder.")],
    latents: Annotated[Path, typer.Option(help="Folder of examples.shapes.training.latents.")],
    output: Annotated[Path, typer.Option(help="For checkpoints; the result comes to its sub-folder transformer.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Clips of a batch.")] = 32,
    image_batch_size: Annotated[int, typer.Option(min=1)] = 128,
    shorten: Annotated[int, typer.Option(min=1, help="Divides the steps of every phase, for a trial.")] = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 250,
    eval_clips: Annotated[int, typer.Option(min=1, help="Clips, and images, of each split drawn at the end.")] = 100,
) -> None:
    """Train the decoder, from the last checkpoint where there is one."""
    phases = {name: replace(phase, steps=max(1, phase.steps // shorten)) for name, phase in PHASES.items()}
    settings = {"phases": {name: asdict(phase) for name, phase in phases.items()}, "prompt_dropout": PROMPT_DROPOUT}
    settings |= {"batch_size": batch_size, "image_batch_size": image_batch_size, "seed": seed}
    check_settings(settings | {"save_steps": save_steps}, output, text_encoder, latents)
    set_seed(seed)
    pairs = read_pairs(latents)
    model = configuration.model()
    objective = TextToVideoObjective(
        UMT5EncoderModel.from_pretrained(text_encoder),
        model.decoder,
        model.adapter.config.max_context_length,
        PROMPT_DROPOUT,
    )
    batch_sizes = {"video": batch_size, "image": image_batch_size}
    for number, (name, phase) in enumerate(phases.items()):
        objective.phase = phase
        fit(
            objective,
            CaptionedBatches(pairs, phase, batch_sizes, seed + number),
            the_batch,
            output / name,
            phase.steps,
            phase.learning_rate,
            save_steps,
            seed + number,
            weight_decay=phase.weight_decay,
            per_device_train_batch_size=1,  # an item is a batch
            bf16=multiplies_bfloat16(),
        )
    objective.eval().to("cpu")
    save_folder(objective.transformer.save_pretrained, output / "transformer")
    pipe = WanPipeline(
        text_tokenizer(),
        objective.text_encoder,
        AutoencoderKLWan.from_pretrained(vae),
        configuration.scheduler(),
        objective.transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    lines = [(task, split) for task in ("t2v", "t2i") for split in SHOWN_SPLITS]
    scores = [evaluate(pipe, *line, eval_clips, seed) for line in lines]
    Console().print(score_table(scores, "Drawn as asked for, by the text alone, %"))
    results = {"settings": settings, "scores": [score.to_dict() for score in scores]}
    write_json(results, output / "text_to_video.json")


if __name__ == "__main__":
    typer.run(train)
