"""Omni-Video Shapes: a data set drawn on the fly, a judge that reads it off the pixels, scores, and a checkpoint."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .dataset import Example, ShapesDataset
    from .judge import Reading, read_scene
    from .scene import Scene, render

CHECKPOINT = Path(__file__).parents[1] / "default_checkpoint"  # installed with the package; `make shapes` trains it
CHECKPOINT_NAME = "omni-video-shapes"

_HOMES = {
    "Example": "dataset",
    "Reading": "judge",
    "Scene": "scene",
    "ShapesDataset": "dataset",
    "read_scene": "judge",
    "render": "scene",
}


def __getattr__(name: str) -> object:
    """Import torch when a part that needs it is asked for: the command line needs only the checkpoint's place."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


__all__ = ["CHECKPOINT", "CHECKPOINT_NAME", "Example", "Reading", "Scene", "ShapesDataset", "read_scene", "render"]
