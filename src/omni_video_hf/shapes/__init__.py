"""Omni-Video Shapes: a data set that is drawn on the fly, a judge that reads it off the pixels, and the scores."""

from .dataset import Example, ShapesDataset
from .judge import Reading, read_scene
from .scene import Scene, render

__all__ = ["Example", "Reading", "Scene", "ShapesDataset", "read_scene", "render"]
