"""
What visual tokens say, without a decoder: `python -m omni_video_hf.shapes.visual_tokens --model FOLDER`.

The adapter's tokens are to lie where a text on the target lies. The text encoder learned to say every attribute along
directions of its own (see [`MeaningObjective`]); here visual tokens are read along them. That takes half a minute,
and tells a stage that went wrong before hours of a decoder's training do.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..pipeline_omni_video import OmniVideoPipeline
from ..processing_omni_video import TASKS
from ..source_omni_video import Source
from .dataset import ShapesDataset
from .evaluate import media_of
from .scene import ATTRIBUTES
from .scores import ALL, SHOWN_SPLITS, Count
from .train_text_encoder import MeaningObjective

DRAWING = ("t2v", "t2i", "v2v", "i2i")
READ_AT_ONCE = 20


@torch.no_grad()
def read_visual_tokens(pipe: OmniVideoPipeline, task: str, split: str, count: int, seed: int) -> dict[str, Count]:
    """
    Of how many examples visual tokens say what is to be drawn: each attribute (motion of videos only), and `"all"`.

    Args:
        pipe: its decoder is not run.
        task: one that draws.
        split: as in [`ShapesDataset`].
        count: examples.
        seed: of the examples.
    """
    dataset, objective = ShapesDataset(task, split, count, seed), MeaningObjective(pipe.text_encoder)
    names = [name for name in ATTRIBUTES if name != "motion" or dataset.kind == "video"]
    right = dict.fromkeys([*names, ALL], 0)
    for start in range(0, count, READ_AT_ONCE):
        numbers = range(start, min(start + READ_AT_ONCE, count))
        items = [dataset[number] for number in numbers]
        media = media_of(dataset, items)
        source = Source.of(media.get("video"), media.get("image"), len(items))
        if source.videos is not None:
            source = source.load(None, media["fps"])
        tokens = pipe.encode_instruction(task, [item["prompt"] for item in items], source)
        said = objective.read_mean(pipe.adapter.adapt_vision_tokens(tokens, TASKS[task].output).mean(dim=1))
        for row, number in enumerate(numbers):
            target = dataset.example(number).target
            found = {name: _value(name, logits[row]) == getattr(target, name) for name, logits in said.items()}
            for name in names:
                right[name] += found[name]
            right[ALL] += all(found[name] for name in names)
    return {name: Count(number, count) for name, number in right.items()}


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
    table = Table("task", "split", *ATTRIBUTES, ALL, title="What visual tokens say right, %")
    for task in DRAWING:
        for split in SHOWN_SPLITS:
            counts = read_visual_tokens(pipe, task, split, count, seed)
            cells = [f"{100 * counts[name].rate:.1f}" if name in counts else "" for name in (*ATTRIBUTES, ALL)]
            table.add_row(task, split, *cells, end_section=split == SHOWN_SPLITS[-1])
    Console().print(table)


__all__ = ["read_visual_tokens"]


if __name__ == "__main__":
    typer.run(main)
