"""
The table of tasks (t2i, t2v, i2i, v2v, i2v, understand). Add a task by adding one row: other modules read this table.

The messages to the MLLM and the forced answers must match the released model, which was trained with exactly these.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

IMAGE_GENERATION_TOKEN = "[GEN_IMG]"
VIDEO_GENERATION_TOKEN = "[GEN_VID]"


@dataclass(frozen=True)
class Task:
    """
    One task: its message to the MLLM, its inputs, its output and its default settings.

    Args:
        user: message of the user to the MLLM; `{prompt}` is replaced by the prompt.
        answer: forced answer of the MLLM, for every task that generates; `None` lets the MLLM answer in text.
        source: kind of the source, `None` for a task without one.
        output: kind of the result.
        latents: argument of the adapter that gets the latents of the source.
        keeps_size: whether the result has the size of its source.
        mllm_sees_first_frame: whether `mllm_frames` may restrict the MLLM to the first frame of a video.
        preset: default settings of the released model; `guidance_scale` follows the convention of diffusers.
    """

    user: str
    answer: str | None
    source: Literal["image", "video"] | None
    output: Literal["image", "video", "text"]
    latents: Literal["source_latents", "reference_latents"] | None = None
    keeps_size: bool = False
    mllm_sees_first_frame: bool = False
    preset: Mapping[str, Any] | None = None

    @property
    def answers_in_text(self) -> bool:
        """Whether the result is the text answer of the MLLM, so that no image or video is generated."""
        return self.output == "text"

    @property
    def fingerprint(self) -> str:
        """Text that changes when cached features of this task become stale; stored in every feature cache."""
        return f"Task(user={self.user!r}, answer={self.answer!r}, source={self.source!r}, output={self.output!r})"


def _preset(
    width: int, height: int, num_frames: int, fps: float | None, steps: int, guidance_scale: float
) -> dict[str, Any]:
    return {
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "fps": fps,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "flow_shift": 5.0,
    }


# The authors' code has no defaults for i2v, so those of t2v are used.
TASKS: dict[str, Task] = {
    "t2i": Task(
        "Generate an image about:\n{prompt}",
        IMAGE_GENERATION_TOKEN,
        source=None,
        output="image",
        preset=_preset(480, 480, 1, None, 50, 6.0),
    ),
    "t2v": Task(
        "Generate a video about:\n{prompt}",
        VIDEO_GENERATION_TOKEN,
        source=None,
        output="video",
        preset=_preset(832, 480, 81, 16, 50, 6.0),
    ),
    "i2i": Task(
        "{prompt}",
        IMAGE_GENERATION_TOKEN,
        source="image",
        output="image",
        latents="source_latents",
        keeps_size=True,
        preset=_preset(480, 480, 1, None, 40, 4.0),
    ),
    "v2v": Task(
        "<video>\n{prompt}",  # `<video>` is plain text
        VIDEO_GENERATION_TOKEN,
        source="video",
        output="video",
        latents="source_latents",
        keeps_size=True,
        mllm_sees_first_frame=True,
        preset=_preset(640, 352, 17, 8, 40, 4.0),
    ),
    "i2v": Task(
        "Generate a video from the reference image with the following prompt:\n{prompt}",
        VIDEO_GENERATION_TOKEN,
        source="image",
        output="video",
        latents="reference_latents",
        preset=_preset(832, 480, 81, 16, 50, 6.0),
    ),
    "understand": Task("{prompt}", answer=None, source=None, output="text"),  # with or without images or a video
}


def get_task(task: str) -> Task:
    """
    Look a task up by its name.

    Raises:
        ValueError: for an unknown name.
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}.")
    return TASKS[task]


def find_task(source: str | None, output: str) -> str:
    """
    Find the task for the kind of the source and the kind of the output: the first fitting row of the table.

    With a source, the task is the edit whose result has the kind of the source, whichever of its two generation
    tokens the MLLM emits, as in the authors' code.
    """
    kind = output if source is None else source
    return next(name for name, task in TASKS.items() if (task.source, task.output) == (source, kind))


__all__ = ["IMAGE_GENERATION_TOKEN", "TASKS", "VIDEO_GENERATION_TOKEN", "Task", "find_task", "get_task"]
