"""What a visitor of the demo page asks for, checked before a call of the pipeline waits for its turn."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..media.video_loading import open_media
from ..tasks import TASKS, find_task, get_task

SEEDS = 2**32  # random seeds lie below this number, as those of the command line
MAX_SEED = 2**53 - 1  # the largest integer that a number field of a browser represents exactly

MODEL, QUICK, CAREFUL = "Model's own", "Quick: half the steps", "Careful: twice the steps"
PRESETS: Mapping[str, float] = MappingProxyType({MODEL: 1.0, QUICK: 0.5, CAREFUL: 2.0})  # factor of the steps

# Settings of the drawer, by the argument of the pipeline's call, and whether they are whole numbers.
NUMBERS = {
    "num_inference_steps": True,
    "guidance_scale": False,
    "flow_shift": False,
    "height": True,
    "width": True,
    "num_frames": True,
    "fps": False,
}


@dataclass(frozen=True)
class Request:
    """
    One call of the pipeline.

    Args:
        prompt: prompt, instruction or question.
        task: a name of [`TASKS`]; `None` lets the MLLM decide.
        seed: seed of noise and sampled answers.
        media: `{"image": PIL image}` or `{"video": path}` for a call with a source.
        source: path of the source, if there is one.
        settings: further arguments of the pipeline's call.
    """

    prompt: str
    task: str | None
    seed: int
    media: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def make_request(
    way: str,
    prompt: str | None,
    kind: str | None = None,
    source: str | None = None,
    seed: float | None = None,
    form: Mapping[str, Any] | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Request:
    """
    Check what a form contains and turn it into a call.

    Args:
        way: `"create"`, `"edit"`, `"ask"` or `"chat"`.
        kind: kind of the result of `"create"`, `"image"` or `"video"`; `None` lets the model decide.
        source: path of the image or video of the other ways; a chat may begin without one.
        seed: `None` for a random one.
        form: values of the drawer by name, `None` for the model's own; `preset` is a name of [`PRESETS`].
        presets: settings of the model by task.

    Raises:
        ValueError: for an empty text, a missing source, or a number that is out of range.
    """
    names = {"create": "prompt", "edit": "instruction", "ask": "question", "chat": "message"}
    if not prompt or not prompt.strip():
        raise ValueError(f"The {names[way]} is empty: write what you want.")
    if source is None and way in ("edit", "ask"):
        raise ValueError("There is no source: choose an image or a video file, or use a result of the gallery.")
    media = {} if source is None else dict([open_media(source)])
    task = _task(way, kind, next(iter(media), None))
    return Request(
        prompt=prompt.strip(),
        task=task,
        seed=_seed(seed),
        media=media,
        source=source,
        settings=_settings(task, media, form or {}, presets or {}),
    )


def _task(way: str, kind: str | None, source_kind: str | None) -> str | None:
    if way == "ask":
        return find_task(None, "text")
    if way == "edit":
        return find_task(source_kind, source_kind or "")
    return find_task(None, kind) if way == "create" and kind is not None else None


def _seed(seed: float | None) -> int:
    if seed is None:
        return secrets.randbelow(SEEDS)
    if seed != int(seed) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"The seed must be a whole number from 0 to {MAX_SEED}, got {seed:g}.")
    return int(seed)


def _settings(
    task: str | None,
    media: Mapping[str, Any],
    form: Mapping[str, Any],
    presets: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """
    Arguments of the call. What the pipeline checks itself, such as the size, is left to it.

    Without a task the result may be an image: settings of videos are left out then, unless the source is a video.
    """
    if task is not None and get_task(task).answers_in_text:
        return {}
    settings: dict[str, Any] = {}
    for name, is_whole in NUMBERS.items():
        value = _number(name, form.get(name), is_whole)
        if value is not None:
            settings[name] = value
    output = get_task(task).output if task is not None else "video" if "video" in media else "image"
    if output == "image":
        settings.pop("num_frames", None)
        settings.pop("fps", None)
    if negative := (form.get("negative_prompt") or "").strip():
        settings["negative_prompt"] = negative
    preset = form.get("preset") or MODEL
    if preset not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(map(repr, PRESETS))}, got {preset!r}.")
    factor = PRESETS[preset]
    if factor != 1 and "num_inference_steps" not in settings:
        likely = task or find_task(next(iter(media), None), output)
        own = (presets.get(likely) or TASKS[likely].preset or {})["num_inference_steps"]
        settings["num_inference_steps"] = max(1, round(own * factor))
    return settings


def _number(name: str, value: Any, is_whole: bool) -> float | None:
    """The number in a field of the form, which contains a text; `None` for an empty one."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` must be a number, got {value!r}. Leave it empty for the model's own.") from None
    if not is_whole:
        return number
    if not number.is_integer():
        raise ValueError(f"`{name}` must be a whole number, got {value}.")
    return int(number)


__all__ = ["CAREFUL", "MAX_SEED", "MODEL", "NUMBERS", "PRESETS", "QUICK", "Request", "make_request"]
