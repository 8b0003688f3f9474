"""What a call of the pipeline returns."""

from dataclasses import dataclass, field
from typing import Any

from diffusers.utils import BaseOutput


@dataclass
class OmniVideoPipelineOutput(BaseOutput):
    """
    Output of [`OmniVideoPipeline`].

    Args:
        frames: generated videos, one list of PIL images per sample, or `[batch, frames, height, width, 3]` in 0..1
            (`"np"`), `[batch, frames, 3, height, width]` in 0..1 (`"pt"`), or latents. An image is a video of one
            frame. `None` for an answer.
        text: answers, one per prompt; `None` when something was drawn.
        task: the task that was done, chosen by the MLLM where the caller left it open.
        fps: frames per second to play the videos at; `None` for images and answers.
        settings: every setting used.
        notes: what had to be decided for the caller, one sentence each, such as a rounded size.

    Example:
        >>> from omni_video_hf import OmniVideoPipelineOutput
        >>> OmniVideoPipelineOutput(text=["red"], task="understand").text
        ['red']
    """

    frames: Any = None
    text: list[str] | None = None
    task: str | None = None
    fps: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


__all__ = ["OmniVideoPipelineOutput"]
