"""
Trains decoder and text encoder as a plain text-to-video and text-to-image model, which the paper takes as given.

`python -m omni_video_hf.shapes.train_text_to_video --latents FOLDER --output FOLDER`, resumable. Images come first:
words, shapes and colours are the same as in clips, and a fifth of the tokens teach them.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.utils.data import Dataset
from transformers import UMT5EncoderModel, set_seed

from ..attention_omni_video import folded_context
from ..flow_matching_omni_video import NUM_TRAIN_TIMESTEPS, add_noise, flow_matching_loss, velocity_target
from ..losses_omni_video import OmniVideoLossConfig, draw_timestep_indices, timestep_tables
from . import configuration
from .dataset import ShapesDataset
from .latents import ScenePairs
from .prompts import generation_prompt
from .runs import check_settings, fit, save_folder, the_batch, write_json
from .scores import SHOWN_SPLITS, Score, check_generation
from .tokenizers import text_tokenizer
from .train_vae import score_table

# Colour and shape are decided where there is most noise, to which upstream's weights give nothing.
LOSSES = OmniVideoLossConfig(timestep_weighting="none")
VIDEO_SHARE = 0.8  # of the batches once clips have come
PROMPT_DROPOUT = 0.1
DRAWN_AT_ONCE = 20
SECOND_NAME = "text_encoder.encoder.embed_tokens.weight"


class CaptionedBatches(Dataset):
    """
    Whole batches, each of one kind: latents of scenes and ids of newly drawn prompts.

    Args:
        pairs: what there is of each kind.
        steps: number of batches.
        batch_sizes: samples of a batch, by kind.
        video_share: of the batches.
        seed: batch `index` is a function of it and `index` alone.
    """

    def __init__(
        self, pairs: dict[str, ScenePairs], steps: int, batch_sizes: dict[str, int], video_share: float, seed: int
    ) -> None:
        self.pairs, self.steps, self.batch_sizes = pairs, steps, batch_sizes
        self.video_share, self.seed = video_share, seed
        self.tokenizer = text_tokenizer()

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.seed, index))
        pairs = self.pairs["video" if rng.random() < self.video_share else "image"]
        size = self.batch_sizes[pairs.kind]
        rows, sides = rng.integers(len(pairs.latents), size=size), rng.integers(2, size=size)
        examples = [pairs.examples[row] for row in rows]
        scenes = [(example.source, example.target)[side] for example, side in zip(examples, sides, strict=True)]
        prompts = [generation_prompt(rng, scene, pairs.kind) for scene in scenes]
        tokens = self.tokenizer(prompts, padding=True, return_tensors="pt")
        return {"latents": pairs.latents[rows, sides].float(), **tokens}


class TextToVideoObjective(nn.Module):
    """
    Flow matching of a decoder on the embeddings of prompts.

    Args:
        text_encoder: trained as well.
        transformer: the decoder.
        context_length: tokens of zeros that contexts act as padded to, as later among visual tokens.
        prompt_dropout: share of the samples that see the empty prompt, for guidance.
    """

    def __init__(
        self,
        text_encoder: UMT5EncoderModel,
        transformer: WanTransformer3DModel,
        context_length: int,
        prompt_dropout: float,
    ) -> None:
        super().__init__()
        self.text_encoder, self.transformer = text_encoder, transformer
        self.context_length, self.prompt_dropout = context_length, prompt_dropout
        self.register_state_dict_post_hook(drop_second_name)
        self._keys_to_ignore_on_save = [SECOND_NAME]

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
        table, weights = (values.to(device) for values in timestep_tables(LOSSES))
        indices = draw_timestep_indices(len(latents), LOSSES).to(device)
        noise = torch.randn_like(latents)
        noisy = add_noise(latents, noise, table[indices] / NUM_TRAIN_TIMESTEPS)
        with folded_context(self.transformer, context, self.context_length) as folded:
            velocity = self.transformer(noisy, table[indices], folded, return_dict=False)[0]
        return {"loss": flow_matching_loss(velocity, velocity_target(latents, noise), weights[indices])}


@torch.no_grad()
def evaluate(pipe: WanPipeline, task: str, split: str, count: int, seed: int, steps: int) -> Score:
    """Whether the judge reads `count` clips (`t2v`) or images (`t2i`) as what was asked for; the text alone speaks."""
    dataset, preset = ShapesDataset(task, split, count, seed), configuration.PRESETS[task]
    names = ("height", "width", "num_frames", "guidance_scale")
    verdicts = []
    for start in track(range(0, count, DRAWN_AT_ONCE), f"Drawing {task}, {split}", console=Console(stderr=True)):
        examples = [dataset.example(number) for number in range(start, min(start + DRAWN_AT_ONCE, count))]
        frames = pipe(
            [example.prompt for example in examples],
            negative_prompt="",
            max_sequence_length=configuration.ADAPTER["max_context_length"],
            generator=[torch.Generator().manual_seed(seed + start + number) for number in range(len(examples))],
            num_inference_steps=steps,
            output_type="np",
            **{name: preset[name] for name in names},
        ).frames
        clips = (frames * 255).round().astype(np.uint8)
        verdicts += [check_generation(example, clip) for example, clip in zip(examples, clips, strict=True)]
    return Score.of(task, split, verdicts)


def drop_second_name(module: nn.Module, state: dict[str, torch.Tensor], *_: Any) -> None:  # noqa: ARG001
    """UmT5 has one embedding under two names, of which a file of safetensors takes one."""
    state.pop(SECOND_NAME, None)


def train(
    vae: Annotated[Path, typer.Option(help="Folder of the trained VAE.")],
    latents: Annotated[Path, typer.Option(help="Folder of omni_video_hf.shapes.latents.")],
    output: Annotated[Path, typer.Option(help="For checkpoints, and the results: transformer and text_encoder.")],
    image_steps: Annotated[int, typer.Option(min=1, help="Steps on images alone, before clips.")] = 3000,
    image_batch_size: Annotated[int, typer.Option(min=1)] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Steps on clips and images.")] = 4000,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips of a batch.")] = 32,
    learning_rate: float = 1e-2,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 250,
    eval_clips: Annotated[int, typer.Option(min=1, help="Clips, and images, of each split drawn at the end.")] = 100,
    eval_steps: Annotated[int, typer.Option(min=1, help="Denoising steps of these.")] = 20,
) -> None:
    """Train decoder and text encoder, from the last checkpoint where there is one."""
    settings = {"image_steps": image_steps, "image_batch_size": image_batch_size, "steps": steps}
    settings |= {"batch_size": batch_size, "video_share": VIDEO_SHARE, "seed": seed}
    settings |= {"learning_rate": learning_rate, "prompt_dropout": PROMPT_DROPOUT, "save_steps": save_steps}
    check_settings(settings, output)
    set_seed(seed)
    pairs = {kind: ScenePairs(latents, kind) for kind in ("video", "image")}
    model = configuration.model()
    objective = TextToVideoObjective(
        configuration.text_encoder(), model.decoder, model.adapter.config.max_context_length, PROMPT_DROPOUT
    )
    batch_sizes = {"video": batch_size, "image": image_batch_size}
    for number, (phase, phase_steps, share) in enumerate(
        (("images", image_steps, 0.0), ("clips", steps, VIDEO_SHARE))
    ):
        fit(
            objective,
            CaptionedBatches(pairs, phase_steps, batch_sizes, share, seed + number),
            the_batch,
            output / phase,
            phase_steps,
            learning_rate,
            save_steps,
            seed,
            per_device_train_batch_size=1,  # an item is a batch
            bf16=True,
        )
    objective.eval().to("cpu")
    pipe = WanPipeline(
        text_tokenizer(),
        objective.text_encoder,
        AutoencoderKLWan.from_pretrained(vae),
        configuration.scheduler(),
        objective.transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    lines = [(task, split) for task in ("t2v", "t2i") for split in SHOWN_SPLITS]
    scores = [evaluate(pipe, *line, eval_clips, seed, eval_steps) for line in lines]
    Console().print(score_table(scores, "Drawn as asked for, by the text alone, %"))
    for name in ("transformer", "text_encoder"):
        save_folder(getattr(objective, name).save_pretrained, output / name)
    results = {"settings": settings, "scores": [score.to_dict() for score in scores]}
    write_json(results, output / "text_to_video.json")


if __name__ == "__main__":
    typer.run(train)
