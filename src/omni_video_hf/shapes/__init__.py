"""Omni-Video Shapes: a data set drawn on the fly, a judge that reads it off the pixels, scores, and a checkpoint."""

from pathlib import Path

from .dataset import Example, ShapesDataset
from .judge import Reading, read_scene
from .scene import Scene, render

CHECKPOINT = Path(__file__).parent / "omni-video-shapes"  # comes with the package; `make shapes` trains it

__all__ = ["CHECKPOINT", "Example", "Reading", "Scene", "ShapesDataset", "read_scene", "render"]
