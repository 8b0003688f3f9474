"""
What the vision tower of the MLLM learns before any question is asked: to see.

SigLIP comes pretrained to a VILA. Here its tower reads shape, size, colours and place off images through one linear
layer, which is dropped afterwards. All of a picture is learned from at once, where an answer is on one attribute:
in 5 minutes of one core shapes are told apart that 10 minutes of answers had not taught it.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers.models.siglip.modeling_siglip import SiglipVisionModel

from omni_video_hf.shapes.dataset import ShapesDataset
from omni_video_hf.shapes.scene import BACKGROUNDS, COLORS, HELD_OUT, SHAPES, SIDE, SIZES, render

from ..recolor import any_colors

# Colours of the data set that come with two shapes only; in these, no shape is learned.
SPEAKING_COLORS = frozenset(color for color, _ in HELD_OUT)
RECOLORED = 0.7
NOT_LEARNED = -100
WIDTHS = {"shape": len(SHAPES), "size": len(SIZES), "color": 3, "background": 3, "center": 2}


class SeenImages(Dataset):
    """
    Images and what they show.

    Args:
        length: number of images.
        seed: image `index` is a function of it and `index` alone.

    Items hold `pixel_values` `[3, height, width]` as the image processor gives them, in -1..1, `shape` and `size` as
    numbers, `color` and `background` in -1..1, and `center`, x and y, from -1 to 1 across the frame.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.images = ShapesDataset("t2i", "train", length, seed)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.images.example(index).target
        rng = np.random.default_rng((self.images.seed, range(len(self))[index]))
        colors = {"color": np.array(COLORS[scene.color]), "background": np.array(BACKGROUNDS[scene.background])}
        shape = NOT_LEARNED if scene.color in SPEAKING_COLORS else SHAPES.index(scene.shape)
        if rng.random() < RECOLORED:
            colors, shape = any_colors(rng, scene, tells_shape=False), SHAPES.index(scene.shape)
        pixels = torch.from_numpy(render(scene, 1, **colors)[0]).movedim(-1, 0)
        return {
            "pixel_values": pixels.float() / 127.5 - 1,
            "shape": shape,
            "size": list(SIZES).index(scene.size),
            "center": torch.tensor(scene.center, dtype=torch.float32) / (SIDE / 2) - 1,
        } | {name: torch.from_numpy(color).float() / 127.5 - 1 for name, color in colors.items()}


class SeeingObjective(nn.Module):
    """
    Cross-entropy of shapes and sizes and squared errors of colours and places, read off the mean of the features.

    Args:
        tower: the vision tower, whose last hidden state is what the MLLM takes.
    """

    def __init__(self, tower: SiglipVisionModel) -> None:
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(tower.config.hidden_size, sum(WIDTHS.values()))

    def forward(self, pixel_values: torch.Tensor, **targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss of images `[batch, 3, height, width]` with what [`SeenImages`] says of them."""
        states = self.tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states[-1]
        read = self.head(states.mean(dim=1)).float().split(list(WIDTHS.values()), dim=1)
        loss = torch.zeros((), device=pixel_values.device)
        for name, values in zip(WIDTHS, read, strict=True):
            if targets[name].ndim > 1:
                loss = loss + nn.functional.mse_loss(values, targets[name])
            elif (targets[name] != NOT_LEARNED).any():
                loss = loss + nn.functional.cross_entropy(values, targets[name], ignore_index=NOT_LEARNED)
        return {"loss": loss}


__all__ = ["SPEAKING_COLORS", "SeeingObjective", "SeenImages"]
