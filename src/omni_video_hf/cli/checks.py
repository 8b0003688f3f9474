"""Checks of command-line arguments that need no model; this module imports nothing slow."""

import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import typer

from ..shapes import CHECKPOINT, CHECKPOINT_NAME
from ..utils.masking import clean_token
from ..utils.names import is_repository_name
from .console import UsageProblem

SHAPES = str(CHECKPOINT)  # default model of the commands
FPS_RANGE = (0.01, 1000.0)  # as in `media.video_writer`
MAX_SEED = 2**64 - 1
# Limits of formats and encoders, in pixels.
MAX_SIDE = {".webp": 16383, ".jpg": 65500, ".jpeg": 65500, ".gif": 65535} | dict.fromkeys(
    (".mp4", ".mov", ".mkv", ".webm"), 16384
)


def width_and_height(size: str) -> tuple[int, int]:
    """
    Parse a `--size`.

    Returns:
        Width and height in pixels.

    Raises:
        UsageProblem: if `size` is not WIDTHxHEIGHT, in integers of at least 1.
    """
    width, _, height = size.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise UsageProblem(f"`--size {size}` must be WIDTHxHEIGHT in pixels, such as 832x480.")
    return int(width), int(height)


@dataclass(frozen=True)
class Loading:
    """Options that say where the model is and how it is loaded, one field per flag."""

    model: str
    dtype: str | None = None
    device: str | None = None
    cpu_offload: str | None = None
    memory: str | None = None
    attention_backend: str | None = None
    lora: str | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_repository(self.model)
        if self.memory is not None and self.cpu_offload is not None:
            raise UsageProblem(
                f"`--memory {self.memory}` chooses the offloading, so it excludes `--cpu-offload {self.cpu_offload}`: "
                "leave one of them out."
            )
        self.lora_arguments()

    @property
    def place(self) -> str:
        """Folder or Hub repository of the model; the name of the default checkpoint becomes its folder."""
        return place_of(self.model)

    def lora_arguments(self) -> dict[str, Any] | None:
        """
        Arguments of `load_lora_weights`, or `None` without `--lora`.

        Raises:
            UsageProblem: for a missing file, broken JSON, or JSON without a path.
        """
        if self.lora is None:
            return None
        given: Any = {"path": self.lora}
        if self.lora.lstrip().startswith("{"):
            try:
                given = json.loads(self.lora)
            except ValueError as error:
                raise UsageProblem(
                    f'`--lora {self.lora}`: not JSON ({error}). Write it as in \'{{"path": "fox-lora"}}\'.'
                ) from error
        path = given.pop("path", None)
        path = given.pop("pretrained_model_name_or_path_or_dict", path)
        if not isinstance(path, str) or not path:
            raise UsageProblem(
                f'`--lora {self.lora}`: the JSON must have the key "path", with a file, folder or Hub repository.'
            )
        if path.endswith(".safetensors") and not Path(path).is_file():
            raise UsageProblem(f"`--lora {path}`: no such file.")
        if not Path(path).exists():
            check_repository(path, "--lora ")
        return given | {"pretrained_model_name_or_path_or_dict": path}


@dataclass(frozen=True)
class GenerationOptions:
    """Options of what is generated, one field per flag."""

    size: str | None = None
    frames: int | None = None
    fps: float | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    flow_shift: float | None = None
    max_context_length: int | None = None
    seed: int | None = None
    count: int = 1
    negative_prompt: str | None = None
    source_guidance_scale: float | None = None

    def __post_init__(self) -> None:
        if self.fps is not None and not FPS_RANGE[0] <= self.fps <= FPS_RANGE[1]:
            raise UsageProblem(f"`--fps {self.fps:g}` must be {FPS_RANGE[0]:g} to {FPS_RANGE[1]:g} frames per second.")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise UsageProblem(
                f"`--guidance-scale {self.guidance_scale:g}` must be a finite number; 1 turns guidance off."
            )
        if self.source_guidance_scale is not None and not 0 <= self.source_guidance_scale < math.inf:
            raise UsageProblem(
                f"`--source-guidance-scale {self.source_guidance_scale:g}` must be a finite number of at least 0."
            )
        if (
            self.source_guidance_scale not in (None, 1)
            and self.guidance_scale is not None
            and self.guidance_scale <= 1
        ):
            raise UsageProblem(
                f"`--source-guidance-scale {self.source_guidance_scale:g}` needs guidance, but `--guidance-scale "
                f"{self.guidance_scale:g}` turns it off: pass a value above 1."
            )
        if self.flow_shift is not None and not 0 < self.flow_shift < math.inf:
            raise UsageProblem(f"`--flow-shift {self.flow_shift:g}` must be a finite number above 0.")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED - self.count:
            raise UsageProblem(f"`--seed {self.seed}` must be 0 to {MAX_SEED - self.count}.")
        self.height_and_width()

    def height_and_width(self) -> tuple[int | None, int | None]:
        """Height and width in pixels from `--size`; `None` and `None` without it."""
        if self.size is None:
            return None, None
        width, height = width_and_height(self.size)
        return height, width

    def settings(self) -> dict[str, Any]:
        """The options as arguments of the pipeline's call, without the seed."""
        height, width = self.height_and_width()
        return {
            "height": height,
            "width": width,
            "num_frames": self.frames,
            "fps": self.fps,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "flow_shift": self.flow_shift,
            "negative_prompt": self.negative_prompt,
        }

    def check_format(self, path: Path | None) -> None:
        """Refuse a size that is too large for the file format of `path`."""
        side = max(filter(None, self.height_and_width()), default=0)
        limit = math.inf if path is None else MAX_SIDE.get(path.suffix.lower(), math.inf)
        if path is not None and side > limit:
            raise UsageProblem(
                f"`--size {self.size}`: a {path.suffix} file has up to {limit} pixels per side. Choose a smaller size."
            )


@dataclass(frozen=True)
class ClipOptions:
    """Options of the part of a source that is edited, and of the video file that is written, one field per flag."""

    start: str | None = None
    duration: str | None = None
    long_video: str | None = None
    window_frames: int | None = None
    window_overlap: int | None = None
    codec: str | None = None
    quality: float | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("start", "duration"):
            if getattr(self, name) is not None:
                seconds_of(f"--{name}", getattr(self, name))

    @property
    def span(self) -> tuple[float | None, float | None]:
        """Start and duration in seconds."""
        start, duration = (
            None if text is None else seconds_of(f"--{name}", text)
            for name, text in (("start", self.start), ("duration", self.duration))
        )
        return start, duration

    @property
    def writing(self) -> dict[str, Any]:
        """Arguments of the writer of videos."""
        return {"codec": self.codec, "quality": self.quality}

    def check_resume(self, output: Path | None, number: int) -> None:
        """Refuse `--resume` without a name for the steps, and for several results."""
        if self.resume and output is None:
            raise UsageProblem("`--resume` keeps its steps beside the output: pass `--output`.")
        if self.resume and number > 1:
            raise UsageProblem(f"`--resume` is for one result, but {number} are asked for: run one command for each.")

    def check_with(self, options: GenerationOptions, source: str, kind: str) -> None:
        """Refuse a span together with `--frames`, which chooses frames itself, and for a source that is an image."""
        for name, value in (("start", self.start), ("duration", self.duration)):
            if value is not None and options.frames is not None:
                raise UsageProblem(
                    f"`--{name} {value}` and `--frames {options.frames}` choose frames in two ways: leave one of them "
                    "out."
                )
            if value is not None and kind == "image":
                raise UsageProblem(f"`--{name} {value}`: the source {source} is an image: leave it out.")


def seconds_of(flag: str, text: str) -> float:
    """
    Parse a time such as `12.5`, `1:30` or `1:02:03.5`.

    Raises:
        UsageProblem: for any other text.
    """
    parts = text.strip().split(":")
    if (
        len(parts) > 3
        or not all(re.fullmatch(r"\d+", part) for part in parts[:-1])
        or not re.fullmatch(r"\d+(\.\d*)?|\.\d+", parts[-1])
        or (len(parts) > 1 and any(float(part) >= 60 for part in parts[1:]))
    ):
        raise UsageProblem(f"`{flag} {text}` must be seconds, mm:ss or hh:mm:ss, such as 12.5 or 1:30.")
    total = 0.0
    for part in parts:
        total = total * 60 + float(part)
    return total


def place_of(model: str) -> str:
    """Folder or Hub repository of a model; the name of the default checkpoint becomes its folder."""
    return SHAPES if model == CHECKPOINT_NAME and not Path(model).exists() else model


def check_repository(name: str, flag: str = "") -> None:
    """
    Refuse a name that can be neither a folder nor a Hub repository, before any request to the Hub.

    Args:
        name: folder, or `owner/name` on the Hub.
        flag: text before the name in the message, such as `--lora `.

    Raises:
        UsageProblem: for any other name, and for a missing folder whose parent folder exists.
    """
    place = Path(place_of(name))
    if place.is_dir():
        return
    if place.is_file():
        raise UsageProblem(f"`{flag}{name}` is a file: pass the folder of a repository, or `owner/name` on the Hub.")
    if not is_repository_name(name):
        missing = "; there is no such folder" if "/" in name else ""
        raise UsageProblem(f"{flag}{name}: is neither a folder nor a Hub repository (`owner/name`){missing}.")
    if place.parent.is_dir():
        raise UsageProblem(
            f"{flag}{name}: the folder {place.parent} exists here, but there is no {place.name} in it. To use the "
            "Hub repository of that name, run the command in another folder."
        )


def checked_token(token: str | None) -> str | None:
    """Callback of `--token`: strip white space; refuse a malformed token without printing it."""
    try:
        return cast("str | None", clean_token(token))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def read_prompts(prompts: Sequence[str] | None, file: str | None) -> list[str]:
    """
    Read all prompts of a command, in order.

    Args:
        prompts: prompts on the command line; `-` stands for the lines of stdin.
        file: file with one prompt per line, `-` for stdin; empty lines are ignored.

    Raises:
        UsageProblem: if there is no prompt, if one is empty, and for a file that cannot be read.
    """
    found: list[str] = []
    for prompt in prompts or ():
        found += _lines("-") if prompt == "-" else [prompt]
    if file is not None:
        found += _lines(file)
    if not found:
        raise UsageProblem("`PROMPT` is missing: pass prompts, - to read them from stdin, or `--prompts-file FILE`.")
    for prompt in found:
        check_text("PROMPT", prompt)
    return found


def check_text(name: str, text: str) -> None:
    """Refuse an empty text of an argument called `name`."""
    if not text.strip():
        raise UsageProblem(f"`{name}` must be a non-empty text, got {text!r}.")


def _lines(file: str) -> list[str]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageProblem(f"`--prompts-file {file}`: cannot be read, {reason}.") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UsageProblem(
            f"{'stdin' if file == '-' else f'`--prompts-file {file}`'} contains no prompt: write one prompt per line."
        )
    return lines


def check_sources(sources: Iterable[str]) -> None:
    """Refuse files that do not exist; their content is checked later."""
    for source in sources:
        if not source.startswith(("http://", "https://")) and not Path(source).exists():
            raise UsageProblem(f"`SOURCE` {source}: no such file. Pass an existing file or an http(s) URL.")


__all__ = [
    "SHAPES",
    "ClipOptions",
    "GenerationOptions",
    "Loading",
    "check_repository",
    "check_sources",
    "check_text",
    "checked_token",
    "place_of",
    "read_prompts",
]
