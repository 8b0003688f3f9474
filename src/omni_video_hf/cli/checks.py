"""What can be said about arguments of the command line by looking at them alone; nothing heavy is imported here."""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ..shapes import CHECKPOINT, CHECKPOINT_NAME
from ..utils.masking import clean_token
from ..utils.names import is_repository_name
from .console import UsageProblem

SHAPES = str(CHECKPOINT)  # what there is to try without weights of one's own
FPS_RANGE = (0.01, 1000.0)  # as in `media.video_writer`
MAX_SEED = 2**64 - 1
MAX_SIDE = {".webp": 16383, ".jpg": 65500, ".jpeg": 65500, ".mp4": 16384}  # pixels that formats and encoders take


def width_and_height(size: str) -> tuple[int, int]:
    """
    Both numbers of a `--size`.

    Raises:
        UsageProblem: for anything but WIDTHxHEIGHT in whole pixels of at least 1.
    """
    width, _, height = size.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise UsageProblem(f"`--size {size}` must be WIDTHxHEIGHT in pixels, such as 832x480.")
    return int(width), int(height)


@dataclass(frozen=True)
class Loading:
    """Where the model comes from, and how it is loaded; one field a flag."""

    model: str
    dtype: str | None = None
    device: str | None = None
    cpu_offload: str | None = None
    memory: str | None = None
    attention_backend: str | None = None
    lora: str | None = None
    revision: str | None = None
    token: str | None = None

    def __post_init__(self) -> None:
        check_repository(self.model)
        if self.memory is not None and self.cpu_offload is not None:
            raise UsageProblem(f"`--memory {self.memory}` chooses the offloading itself: leave `--cpu-offload` out.")
        self.lora_arguments()

    @property
    def place(self) -> str:
        """Folder or Hub repository; the shipped checkpoint goes by its name, too."""
        return place_of(self.model)

    def lora_arguments(self) -> dict[str, Any] | None:
        """Arguments of `load_lora_weights`; a [`UsageProblem`] for a file that is not there and for broken JSON."""
        if self.lora is None:
            return None
        given: Any = {"path": self.lora}
        if self.lora.lstrip().startswith("{"):
            try:
                given = json.loads(self.lora)
            except ValueError as error:
                raise UsageProblem(f'`--lora`: not JSON ({error}), such as \'{{"path": "fox-lora"}}\'.') from error
        path = given.pop("path", None)
        path = given.pop("pretrained_model_name_or_path_or_dict", path)
        if not isinstance(path, str) or not path:
            raise UsageProblem('`--lora`: the JSON must have a "path", a file, folder or Hub repository.')
        if path.endswith(".safetensors") and not Path(path).is_file():
            raise UsageProblem(f"`--lora {path}`: no such file.")
        if not Path(path).exists():
            check_repository(path, "--lora ")
        return given | {"pretrained_model_name_or_path_or_dict": path}


@dataclass(frozen=True)
class Drawing:
    """Numbers of what is generated; one field a flag."""

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

    def __post_init__(self) -> None:
        if self.fps is not None and not FPS_RANGE[0] <= self.fps <= FPS_RANGE[1]:
            raise UsageProblem(f"`--fps {self.fps:g}` must be {FPS_RANGE[0]:g} to {FPS_RANGE[1]:g} frames per second.")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise UsageProblem(f"`--guidance-scale {self.guidance_scale:g}` must be a finite number; 1 turns it off.")
        if self.flow_shift is not None and not 0 < self.flow_shift < math.inf:
            raise UsageProblem(f"`--flow-shift {self.flow_shift:g}` must be a finite number above 0.")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED - self.count:
            raise UsageProblem(f"`--seed {self.seed}` must be 0 to {MAX_SEED - self.count}.")
        self.height_and_width()

    def height_and_width(self) -> tuple[int | None, int | None]:
        """Of `--size`; `None` both where it was not given."""
        if self.size is None:
            return None, None
        width, height = width_and_height(self.size)
        return height, width

    def settings(self) -> dict[str, Any]:
        """Arguments of the pipeline's call, without its seed."""
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
        """Refuse a size that the format of `path` does not take."""
        side = max(filter(None, self.height_and_width()), default=0)
        limit = math.inf if path is None else MAX_SIDE.get(path.suffix.lower(), math.inf)
        if path is not None and side > limit:
            raise UsageProblem(f"`--size {self.size}`: a {path.suffix} file takes up to {limit} pixels a side.")


def place_of(model: str) -> str:
    """Folder or Hub repository behind the name of a model; the shipped checkpoint goes by its name alone."""
    return SHAPES if model == CHECKPOINT_NAME and not Path(model).exists() else model


def check_repository(name: str, flag: str = "") -> None:
    """
    Refuse what can be neither a folder nor a Hub repository, before the Hub is asked.

    Raises:
        UsageProblem: for another name, and for a folder that is not there though the folder around it is.
    """
    place = Path(place_of(name))
    if place.is_dir():
        return
    if place.is_file():
        raise UsageProblem(f"`{flag}{name}` is a file: give the folder of a repository, or `owner/name` on the Hub.")
    if not is_repository_name(name):
        missing = "; there is no such folder" if "/" in name else ""
        raise UsageProblem(f"{flag}{name}: is neither a folder nor a Hub repository (`owner/name`){missing}.")
    if place.parent.is_dir():
        raise UsageProblem(
            f"{flag}{name}: there is a folder {place.parent} here, but no {place.name} in it. If the Hub's repository "
            "of that name is meant, run the command in another folder."
        )


def checked_token(token: str | None) -> str | None:
    """The callback of `--token`: strips it, and refuses one that no request can carry without repeating it."""
    try:
        return clean_token(token)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def read_prompts(prompts: Sequence[str] | None, file: str | None) -> list[str]:
    """
    All prompts of a call, in order.

    Args:
        prompts: as they were given; `-` stands for the lines of stdin.
        file: one prompt a line, `-` for stdin; empty lines are left out.

    Raises:
        UsageProblem: without any prompt, for an empty one, and for a file that cannot be read.
    """
    found: list[str] = []
    for prompt in prompts or ():
        found += _lines("-") if prompt == "-" else [prompt]
    if file is not None:
        found += _lines(file)
    if not found:
        raise UsageProblem("`PROMPT` is missing: give one or several, - for the lines of stdin, or `--prompts-file`.")
    for prompt in found:
        check_text("PROMPT", prompt)
    return found


def check_text(name: str, text: str) -> None:
    """Refuse an empty text of an argument called `name`."""
    if not text.strip():
        raise UsageProblem(f"`{name}` must be a non-empty text.")


def _lines(file: str) -> list[str]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UsageProblem(f"`--prompts-file {file}`: cannot be read, {reason}.") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UsageProblem(f"{'stdin' if file == '-' else f'`--prompts-file {file}`'} holds no prompt.")
    return lines


def check_sources(sources: Iterable[str]) -> None:
    """Refuse files that are not there; what is in them is looked at later."""
    for source in sources:
        if not source.startswith(("http://", "https://")) and not Path(source).exists():
            raise UsageProblem(f"{source}: no such file.")


__all__ = [
    "SHAPES",
    "Drawing",
    "Loading",
    "check_repository",
    "check_sources",
    "check_text",
    "checked_token",
    "place_of",
    "read_prompts",
]
