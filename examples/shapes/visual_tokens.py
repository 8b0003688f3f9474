"""
What visual tokens say, without a decoder: `python -m examples.shapes.visual_tokens --model FOLDER`.

The adapter's tokens are to lie where a text on the target lies. The text encoder learned to say every attribute along
directions of its own (see [`MeaningObjective`]); here visual tokens are read along them. That takes half a minute,
and tells a stage that went wrong before hours of a decoder's training do.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from omni_video_hf.media.sources import Source
from omni_video_hf.pipelines.pipeline_omni_video import OmniVideoPipeline
from omni_video_hf.shapes.dataset import ShapesDataset
from omni_video_hf.shapes.evaluate import media_of
from omni_video_hf.shapes.scene import ATTRIBUTES
from omni_video_hf.shapes.scores import ALL, SHOWN_SPLITS, Score, score_table
from omni_video_hf.tasks import TASKS

from .training.train_text_encoder import MeaningObjective

DRAWING = ("t2v", "t2i", "v2v", "i2i")
READ_AT_ONCE = 20


@torch.no_grad()
def read_visual_tokens(pipe: OmniVideoPipeline, task: str, split: str, count: int, seed: int) -> Score:
    """
    Whether visual tokens say what is to be drawn: each attribute (motion of videos only), and `"all"`.

    Args:
        pipe: its decoder is not run.
        task: one that draws.
        split: as in [`ShapesDataset`].
        count: examples.
        seed: of the examples.
    """
    dataset, objective = ShapesDataset(task, split, count, seed), MeaningObjective(pipe.text_encoder)
    verdicts = []
    for start in range(0, count, READ_AT_ONCE):
        numbers = range(start, min(start + READ_AT_ONCE, count))
        items = [dataset[number] for number in numbers]
        media = media_of(dataset, items)
        source = Source.of(media.get("video"), media.get("image"), len(items))
        if source.videos is not None:
            source = source.load(None, media["fps"])
        tokens = pipe.encode_instruction(task, [item["prompt"] for item in items], source)
        logits = objective.read_mean(pipe.adapter.adapt_vision_tokens(tokens, TASKS[task].output).mean(dim=1))
        for row, number in enumerate(numbers):
            target = dataset.example(number).target
            right = {name: _value(name, values[row]) == getattr(target, name) for name, values in logits.items()}
            if dataset.kind == "image":
                del right["motion"]
            verdicts.append(right | {ALL: all(right.values())})
    return Score.of(task, split, verdicts)


def _value(name: str, logits: torch.Tensor) -> str | None:
    """What is said of an attribute, `None` for nothing (label 0)."""
    return (None, *ATTRIBUTES[name])[int(logits.argmax())]


def main(
    model: Annotated[Path, typer.Option(help="Folder of a repository of Omni-Video Shapes.")],
    count: Annotated[int, typer.Option(min=1, help="Examples of each task and split.")] = 200,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Show what visual tokens say of each attribute, in percent of the examples."""
    pipe = OmniVideoPipeline.from_pretrained(model)
    scores = [read_visual_tokens(pipe, task, split, count, seed) for task in DRAWING for split in SHOWN_SPLITS]
    Console().print(score_table(scores, "What visual tokens say right, %"))


__all__ = ["read_visual_tokens"]


if __name__ == "__main__":
    typer.run(main)
