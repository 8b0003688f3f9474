"""Examples of the page: what the default checkpoint was trained on, or plain ones for any other model."""

from dataclasses import dataclass
from pathlib import Path

from ..media.images import save_image
from ..media.video_writer import save_video
from ..shapes.scene import FPS, Scene, render

SHAPES_HINT = (
    "It is the smallest model of its kind: one circle, square or triangle of 64x64 pixels, in six colours, small or "
    "large, moving or standing still, on white, black or grey."
)


@dataclass(frozen=True)
class Examples:
    """
    What the page proposes.

    Args:
        hint: a sentence about the model.
        create: prompts, and labels of the kind of result.
        edit: sources and instructions.
        ask: sources and questions.
        chat: messages of one conversation, in order.
    """

    hint: str
    create: list[tuple[str, str]]
    edit: list[tuple[str, str]]
    ask: list[tuple[str, str]]
    chat: list[str]
    prompts: list[str]
    instructions: list[str]
    questions: list[str]


def shapes_examples(folder: Path) -> Examples:
    """
    Examples for Omni-Video Shapes, with sources that are rendered into a folder.

    Args:
        folder: an existing folder that the page may serve.
    """
    clip, image = folder / "red-circle.mp4", folder / "yellow-square.png"
    save_video(render(Scene("red", "circle", "large", "black", motion="left")), clip, fps=FPS)
    save_image(render(Scene("yellow", "square", "small", "grey"), num_frames=1)[0], image)
    prompts = ["a large red circle moving left on a black background", "a small blue triangle moving up on white"]
    instructions, questions = ["make it blue", "turn it into a circle"], ["describe the video", "what color is it?"]
    return Examples(
        hint=SHAPES_HINT,
        create=[
            (prompts[0], "Video"),
            (prompts[1], "Video"),
            ("a small yellow square on grey", "Image"),
            ("draw a large purple circle on white", "The model decides"),
        ],
        edit=[(str(clip), instructions[0]), (str(clip), "make the background white"), (str(image), instructions[1])],
        ask=[(str(clip), questions[0]), (str(clip), "how does it move?"), (str(image), questions[1])],
        chat=[prompts[0], instructions[0], questions[0]],
        prompts=prompts,
        instructions=instructions,
        questions=questions,
    )


def plain_examples() -> Examples:
    """Examples for any model, without sources."""
    prompts = ["a red fox runs through fresh snow", "a lighthouse at dusk, waves against the rocks"]
    instructions, questions = ["make it autumn"], ["What happens in the video?"]
    return Examples(
        hint="",
        create=[(prompts[0], "Video"), (prompts[1], "Video"), ("a bowl of ripe apricots, oil painting", "Image")],
        edit=[],
        ask=[],
        chat=[prompts[0], instructions[0], questions[0]],
        prompts=prompts,
        instructions=instructions,
        questions=questions,
    )


__all__ = ["Examples", "plain_examples", "shapes_examples"]
