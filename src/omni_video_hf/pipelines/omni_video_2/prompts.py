"""Prompts, presets and named settings of Omni-Video 2; a converted repository keeps its authors' prompts instead."""

from collections.abc import Mapping
from typing import Any

from ...processing.processing_omni_video_2 import PixelBudget
from ...tasks import TASKS

# Prompts of this project. The released model was trained and evaluated with the prompts in its authors' configuration,
# which the conversion reads from there. Keys: system prompts of the MLLM by the step that uses them, and the text of
# the unconditional branch.
DEFAULT_PROMPTS = {
    "source_caption": (
        "You describe videos for people who cannot see them. Name the subjects with their colors, sizes and places, "
        "what they do and in which order, the background, the light, the style and the camera. Write one paragraph, "
        "and mention only what the video shows."
    ),
    "target_caption": (
        "You write the description of a video that does not exist yet. You get a short request, or the description "
        "of a video and an edit of it. Write one paragraph in the present tense with the subjects, their colors, "
        "places and motion, the background, the light, the style and the camera of the new video. Keep all that the "
        "edit does not concern. Answer with the description alone."
    ),
    "features": (
        "Look at the video, if there is one, and read the request. Represent subjects, colors, shapes, places, "
        "motion, background, light and camera, and what the request adds to them or changes, for a model that "
        "generates the video."
    ),
    "negative": (
        "blurred, low resolution, compression artifacts, noise, flat or oversaturated colors, motionless picture, "
        "text, logo, watermark, deformed bodies, extra fingers, unnatural faces, flicker"
    ),
}
# Texts of the user in the steps of the prompt reasoner, as in the authors' code.
CAPTION_REQUEST = "Please provide a detailed, fine-grained caption for this video."
EDIT_REQUEST = (
    "Source video: {caption}\n\nEdit: {prompt}\n\nNow directly describe the edited video (do not mention what was "
    "changed, just describe the final video):"
)
EXPAND_REQUEST = "Expand this short prompt into a detailed, descriptive video caption: {prompt}"

ANSWER_SYSTEM_PROMPT = "You are a helpful assistant."  # of `task="understand"`, which the authors' code does not have

# Pixels of the frames that the MLLM sees, all frames together. The authors' code passes 480 and 1920 as if they were
# sides; Qwen3-VL reads them as pixels, so a source of any size becomes a thumbnail of 32x32.
CAPTION_PIXELS: PixelBudget = (230_400, 921_600)
FEATURE_PIXELS: dict[str, PixelBudget] = {"as_released": (480, 1920), "full": CAPTION_PIXELS}

BOUNDARY_RATIO = 0.875  # the expert for high noise runs at timesteps of at least 875
FRAME_STRIDE = 3  # every third frame of a source, as in the authors' code
# Released settings; `guidance_scale` is as in diffusers, which is upstream's own scale here.
OMNI_VIDEO_2_PRESETS: dict[str, dict[str, Any]] = {
    "t2v": dict(TASKS["t2v"].preset or {}) | {"guidance_scale": 3.0},
    "v2v": {
        "height": 480,
        "width": 832,
        "num_frames": 41,
        "fps": 8,
        "num_inference_steps": 40,
        "guidance_scale": 3.0,
        "flow_shift": 5.0,
    },
}


def complete_prompts(prompts: Mapping[str, str] | None) -> dict[str, str]:
    """
    Prompts of a pipeline: the given ones, and the project's own for the rest.

    Raises:
        ValueError: for an unknown key, or a prompt that is no text.
    """
    given = dict(prompts or {})
    unknown = sorted(given.keys() - DEFAULT_PROMPTS.keys())
    if unknown:
        raise ValueError(f"`prompts` has unknown keys {unknown}; allowed are {sorted(DEFAULT_PROMPTS)}.")
    wrong = sorted(name for name, text in given.items() if not isinstance(text, str) or not text.strip())
    if wrong:
        raise ValueError(f"`prompts` must hold texts, but {wrong} are empty or no strings.")
    return DEFAULT_PROMPTS | given


__all__ = ["DEFAULT_PROMPTS", "OMNI_VIDEO_2_PRESETS", "complete_prompts"]
