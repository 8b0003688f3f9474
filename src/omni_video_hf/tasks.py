"""
The table of tasks. A task is added by one row: every other module asks the table.

Messages to the MLLM and forced answers must match the released model: it was trained with them, word for word.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

IMAGE_GENERATION_TOKEN = "[GEN_IMG]"
VIDEO_GENERATION_TOKEN = "[GEN_VID]"


@dataclass(frozen=True)
class Task:
    """
    What goes into a task and what comes out.

    Args:
        user: message of the user to the MLLM; `{prompt}` stands for the prompt.
        answer: answer of the MLLM, which is forced in all tasks that generate; `None` lets the MLLM answer in text.
        source: kind of the source, or `None` for a task without one.
        output: kind of the result.
        latents: argument of the adapter that takes the latents of the source.
        keeps_size: whether the result has the size of its source.
        mllm_sees_first_frame: whether the MLLM may be shown the first frame of a video only (`mllm_frames`).
        preset: default settings of the released model, in diffusers' convention of guidance.
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
        """Whether the MLLM's answer is the result, so that nothing is generated."""
        return self.output == "text"

    @property
    def fingerprint(self) -> str:
        """What features that are computed for this task depend on; part of every feature cache."""
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


# Upstream has no defaults for i2v: those of t2v.
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
    The row of a task.

    Raises:
        ValueError: for an unknown name.
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}.")
    return TASKS[task]


def find_task(source: str | None, output: str) -> str:
    """
    The first task of the table that turns a source of one kind into an output of another.

    With a source, the MLLM asks for an edit (a result of the source's own kind) with either of its two tokens, as in
    upstream.
    """
    kind = output if source is None else source
    return next(name for name, task in TASKS.items() if (task.source, task.output) == (source, kind))


__all__ = ["IMAGE_GENERATION_TOKEN", "TASKS", "VIDEO_GENERATION_TOKEN", "Task", "find_task", "get_task"]
