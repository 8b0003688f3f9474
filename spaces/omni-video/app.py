"""The page of `omni-video demo` as a Space of the Hub. Written by `omni-video push-space`."""

import os
from pathlib import Path

try:
    import spaces  # of ZeroGPU hardware; it must be imported before torch
except ImportError:
    spaces = None

import torch

from omni_video_hf import OmniVideoPipeline
from omni_video_hf.demo.launch import make_demo
from omni_video_hf.shapes import CHECKPOINT, CHECKPOINT_NAME

GPU_SECONDS = 180  # that a call on ZeroGPU hardware may take
NAMED = Path(__file__).with_name("model.txt")


def on_gpu(function):
    """Mark the one function that needs the GPU; without ZeroGPU hardware it stays as it is."""
    return function if spaces is None else spaces.GPU(duration=GPU_SECONDS)(function)


def model_name() -> str:
    """Name of the model: the variable of the Space, else the file, else the default checkpoint."""
    named = NAMED.read_text(encoding="utf-8").strip() if NAMED.is_file() else ""
    return os.environ.get("OMNI_VIDEO_MODEL") or named or CHECKPOINT_NAME


def load(name: str) -> OmniVideoPipeline:
    """Load the pipeline onto the GPU, if there is one."""
    place = CHECKPOINT if name == CHECKPOINT_NAME else name
    if not torch.cuda.is_available():
        return OmniVideoPipeline.from_pretrained(place)
    return OmniVideoPipeline.from_pretrained(place, dtype=torch.bfloat16).to("cuda")


demo = make_demo(load(model_name()), model_name(), on_gpu)

if __name__ == "__main__":
    demo.launch(server_name="0.0.0.0", ssr_mode=False)
