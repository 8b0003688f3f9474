"""`OmniVideoPipelineOutput`: frames or text, task, frame rate, settings and notes of a pipeline call."""

from dataclasses import dataclass, field
from typing import Any

from diffusers.utils import BaseOutput


@dataclass
class OmniVideoPipelineOutput(BaseOutput):
    """
    Output of [`OmniVideoPipeline`].

    Args:
        frames: generated videos: one list of PIL images per sample, or `[batch, frames, height, width, 3]` in 0..1
            (`"np"`), `[batch, frames, 3, height, width]` in 0..1 (`"pt"`), or latents. An image is a video of one
            frame. `None` for a text answer.
        text: text answers, one per prompt; `None` if images or videos were generated.
        task: the task of the call, chosen by the MLLM if the caller did not pass one.
        fps: frame rate of the videos; `None` for images and text answers.
        settings: all settings that were used.
        notes: decisions that were made for the caller, one sentence each, such as a rounded size.

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
