"""Presets of every task, and pure functions that compute and check sizes, frame numbers and context tokens."""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakKeyDictionary

from ..diffusion.window_plan import Window, plan_windows
from ..tasks import TASKS
from .request_checks import check_number

# Settings of the released model, for repositories without presets.
PRESETS: dict[str, dict[str, Any]] = {
    name: dict(task.preset) for name, task in TASKS.items() if task.preset is not None
}


@dataclass(frozen=True)
class GenerationSettings:
    """
    All numeric settings of a generation; part of the pipeline's output.

    Raises:
        ValueError: for a value that is not a number, not finite, or out of range.
    """

    task: str
    height: int  # pixels
    width: int  # pixels
    num_frames: int
    fps: float | None  # None for images
    num_inference_steps: int
    guidance_scale: float  # uncond + scale * (cond - uncond)
    flow_shift: float

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "flow_shift"):
            object.__setattr__(self, name, check_number(name, getattr(self, name)))
        if self.fps is not None:
            object.__setattr__(self, "fps", check_number("fps", self.fps))

    def to_dict(self) -> dict[str, Any]:
        """The settings as a dict of plain values."""
        return asdict(self)


@dataclass(frozen=True)
class LatentGrid:
    """Sizes of latents and tokens in pixels and frames, from the configurations of the components."""

    spatial: int  # pixels per latent in height and in width
    temporal: int  # frames per latent frame, except the first one, which stands for one frame
    patch: tuple[int, int, int]  # latents (frames, height, width) per token of the decoder
    source_patch: tuple[int, int, int] | None  # latents per context token of a source; None: it has no tokens
    positions: int | None = None  # maximum rows, columns and frames of decoder tokens; None: no limit

    def multiple(self, with_source: bool) -> int:
        """Number of pixels of which height and width must be multiples."""
        patches = self.patch[1:] + (self.source_patch[1:] if with_source and self.source_patch else ())
        return self.spatial * math.lcm(*patches)

    def latent_frames(self, num_frames: int) -> int:
        """Number of latent frames of a video with `num_frames` frames."""
        return (num_frames - 1) // self.temporal + 1

    def source_tokens(self, height: int, width: int, num_frames: int) -> int:
        """Number of context tokens of a source."""
        if self.source_patch is None:
            return 0
        frames, rows, columns = self.source_patch
        rows, columns = rows * self.spatial, columns * self.spatial
        return (self.latent_frames(num_frames) // frames) * (height // rows) * (width // columns)

    def tokens_of_latents(self, shape: Sequence[int]) -> int:
        """Number of context tokens of latents with the shape `(frames, height, width)`."""
        if self.source_patch is None:
            return 0
        return math.prod(size // patch for size, patch in zip(shape, self.source_patch, strict=True))

    def decoder_tokens(self, height: int, width: int, num_frames: int) -> tuple[int, int, int]:
        """Number of frames, rows and columns of decoder tokens."""
        frames, rows, columns = self.patch
        spatial = self.spatial
        return self.latent_frames(num_frames) // frames, height // (rows * spatial), width // (columns * spatial)

    def has_positions(self, height: int, width: int, num_frames: int) -> bool:
        """Whether the decoder has position embeddings for all tokens of this size and length."""
        return self.positions is None or max(self.decoder_tokens(height, width, num_frames)) <= self.positions


@dataclass(frozen=True)
class LongVideo:
    """
    How a video is generated that is longer than what the decoder was trained on.

    Args:
        mode: `"windows"`, overlapping windows that are denoised together, or `"chunks"`, one after the other.
        window_frames: frames of a window or chunk.
        window_overlap: frames that two neighbours share, in whole latent frames; the lead-in of the second is not
            counted.
    """

    mode: str
    window_frames: int
    window_overlap: int

    @classmethod
    def of(
        cls,
        grid: LatentGrid,
        mode: str | None,
        window_frames: int | None,
        window_overlap: int | None,
        trained_frames: int,
    ) -> "LongVideo | None":
        """
        The settings of the caller, with defaults for what is `None`; `None` without a `mode`.

        Args:
            grid: sizes of latents.
            trained_frames: frames of the videos in the training, the default of `window_frames`.

        Raises:
            ValueError: for values that are not on the grid or too small, and numbers without a `mode`.
        """
        for name, value in (("window_frames", window_frames), ("window_overlap", window_overlap)):
            if mode is None and value is not None:
                raise ValueError(
                    f"`{name}` is {value}, but `long_video` is None, so there are no windows: pass "
                    "`long_video='windows'` or 'chunks', or leave it out."
                )
        if mode is None:
            return None
        if mode not in ("windows", "chunks"):
            raise ValueError(f"`long_video` must be 'windows', 'chunks' or None, got {mode!r}.")
        step = grid.temporal
        frames = max(trained_frames, 2 * step + 1) if window_frames is None else window_frames
        if frames < 2 * step + 1 or (frames - 1) % step:
            raise ValueError(
                f"`window_frames` must be {step}n+1 and at least {2 * step + 1}, got {frames}: the model was trained "
                f"with {trained_frames}."
            )
        most = frames - 1 - step
        overlap = (frames - 1) // 2 // step * step if window_overlap is None else window_overlap
        if overlap < step or overlap > most or overlap % step:
            raise ValueError(
                f"`window_overlap` must be a multiple of {step} in {step}..{most} for windows of {frames} frames, got "
                f"{overlap}."
            )
        return cls(mode, frames, overlap)

    def plan(self, grid: LatentGrid, num_frames: int) -> tuple[Window, ...]:
        """The windows, or chunks, of a video of `num_frames` frames."""
        window, overlap = grid.latent_frames(self.window_frames), self.window_overlap // grid.temporal
        return plan_windows(grid.latent_frames(num_frames), window, overlap)


def resolve_size(
    grid: LatentGrid,
    height: int | None,
    width: int | None,
    preset: Mapping[str, Any],
    source_size: tuple[int, int] | None = None,
    keep_source_size: bool = True,
) -> tuple[int, int, list[str]]:
    """
    Height and width of the output, and notes for the user about them.

    A size that is passed must fit the grid. An edit has the size of its source, rounded to the grid. A video from an
    image (`keep_source_size=False`) has the area of the preset and the aspect ratio of the image. Everything else has
    the size of the preset.

    Args:
        source_size: `(height, width)` of the source in pixels.

    Raises:
        ValueError: for height without width or the reverse, or a size that does not fit the grid.
    """
    multiple = grid.multiple(with_source=source_size is not None)
    if (height is None) != (width is None):
        raise ValueError(f"Pass `height` and `width` together, got height={height} and width={width}.")
    if height is not None and width is not None:
        for name, value in (("height", height), ("width", width)):
            if value < multiple or value % multiple:
                raise ValueError(
                    f"`{name}` must be a multiple of {multiple} pixels, got {value}: "
                    f"{_nearest(value, multiple)} is the nearest."
                )
        return height, width, []
    if source_size is None:
        return preset["height"], preset["width"], []
    scale = 1.0
    if not keep_source_size:
        scale = math.sqrt(preset["height"] * preset["width"] / (source_size[0] * source_size[1]))
    resolved = [_nearest(value * scale, multiple) for value in source_size]
    notes = []
    if tuple(resolved) != tuple(source_size):
        notes.append(
            f"The source is {source_size[1]}x{source_size[0]}; it was resized to {resolved[1]}x{resolved[0]}"
            + (
                f", the nearest multiples of {multiple}."
                if keep_source_size
                else ", the area of the preset in the aspect ratio of the source."
            )
        )
    return resolved[0], resolved[1], notes


def check_num_frames(grid: LatentGrid, num_frames: int) -> None:
    """Raise a `ValueError` that names the nearest values, unless the number of frames is `temporal * n + 1`."""
    if num_frames < 1 or (num_frames - 1) % grid.temporal:
        below = max(1, (num_frames - 1) // grid.temporal * grid.temporal + 1)
        raise ValueError(
            f"`num_frames` must be {grid.temporal}n+1, got {num_frames}: {below} and {below + grid.temporal} are the "
            "nearest."
        )


def trim_num_frames(grid: LatentGrid, num_frames: int) -> tuple[int, list[str]]:
    """The largest `temporal * n + 1` up to `num_frames`, and a note for the user if frames are left out."""
    kept = (num_frames - 1) // grid.temporal * grid.temporal + 1
    if kept == num_frames:
        return kept, []
    return kept, [
        f"The source has {num_frames} frames; the last {num_frames - kept} were left out, because the VAE needs "
        f"{grid.temporal}n+1 frames."
    ]


@dataclass(frozen=True)
class Proposal:
    """A size and length that work."""

    height: int
    width: int
    num_frames: int

    def arguments(self, with_frames: bool) -> str:
        """The proposal as arguments of the pipeline's call."""
        return f"`height={self.height}, width={self.width}" + (
            f", num_frames={self.num_frames}`" if with_frames else "`"
        )

    def flags(self, with_frames: bool) -> str:
        """The proposal as flags of the command line."""
        return f"`--size {self.width}x{self.height}" + (f" --frames {self.num_frames}`" if with_frames else "`")


class SizeError(ValueError):
    """
    A size or length that the model does not support, with proposals that it supports.

    Attributes:
        height, width, num_frames: requested size and length.
        problem: description of the problem, without names of arguments or flags.
        proposals: sizes and lengths that work; may be empty.
    """

    def __init__(
        self,
        problem: str,
        size: tuple[int, int, int],
        proposals: Sequence[Proposal],
        advice: str = "",
        advice_of_command_line: str = "",
    ) -> None:
        self.problem, self.proposals = problem, tuple(proposals)
        self.height, self.width, self.num_frames = size
        self._command_line = self._sentence(Proposal.flags, advice_of_command_line)
        super().__init__(self._sentence(Proposal.arguments, advice))

    def for_command_line(self) -> str:
        """The message with flags of the command line."""
        return self._command_line

    def __reduce__(self) -> tuple[Any, ...]:
        size = (self.height, self.width, self.num_frames)
        return _rebuilt_size_error, (self.problem, size, self.proposals, str(self), self._command_line)

    def _sentence(self, words: Callable[[Proposal, bool], str], advice: str) -> str:
        options = [words(proposal, self.num_frames > 1) for proposal in self.proposals]
        works = f" What works: {', or '.join(options)}." if options else " No size is small enough."
        return " ".join(filter(None, (self.problem + works, advice)))


def _rebuilt_size_error(
    problem: str, size: tuple[int, int, int], proposals: Sequence[Proposal], text: str, command_line: str
) -> SizeError:
    """Create a [`SizeError`] from its pickled messages."""
    error = SizeError(problem, size, proposals)
    error.args, error._command_line = (text,), command_line
    return error


def check_positions(
    grid: LatentGrid,
    height: int,
    width: int,
    num_frames: int,
    preset: Mapping[str, Any] | None = None,
    with_source: bool = False,
    room: int | None = None,
    in_window: bool = False,
) -> None:
    """
    Refuse a size or length for which the decoder has no position embeddings.

    Args:
        preset: preset of the task, for the proposals.
        with_source: whether a source has the same size.
        room: number of context tokens for the source, which limits the proposals.
        in_window: whether the frames are those of one window of a longer video.

    Raises:
        SizeError: for such a size; the message proposes sizes and lengths that work.
    """
    if grid.has_positions(height, width, num_frames):
        return
    frames, rows, columns = grid.decoder_tokens(height, width, num_frames)
    problem = (
        f"{_described(height, width, num_frames, in_window)} has {rows} rows, {columns} columns and {frames} frames "
        f"of tokens, but the decoder has positions for {grid.positions} of each."
    )
    proposals = propose_sizes(grid, height, width, num_frames, preset, with_source, room)
    advice = _advice_of_windows(grid, height, width, num_frames, preset, room, in_window)
    raise SizeError(problem, (height, width, num_frames), proposals, advice)


def check_source_fits(
    grid: LatentGrid,
    height: int,
    width: int,
    num_frames: int,
    room: int,
    max_context_length: int,
    preset: Mapping[str, Any] | None = None,
    in_window: bool = False,
) -> None:
    """
    Refuse a source that needs more than `room` context tokens.

    Args:
        room: number of context tokens that prompt, visual tokens and boundary embeddings leave free.
        max_context_length: maximum length of the context, for the message.
        preset: preset of the task, for the proposals.
        in_window: whether the frames are those of one window of a longer video.

    Raises:
        SizeError: for such a source; the message proposes sizes and lengths that fit.
    """
    tokens = grid.source_tokens(height, width, num_frames)
    if grid.source_patch is None or tokens <= room:
        return
    proposals = propose_sizes(grid, height, width, num_frames, preset, True, room)
    advice = _advice_of_windows(grid, height, width, num_frames, preset, room, in_window)
    raise SizeError(
        f"{_described(height, width, num_frames, in_window)} as a source takes {tokens} context tokens, but "
        f"{max(room, 0)} are free of {max_context_length}.",
        (height, width, num_frames),
        proposals,
        f"{advice} ".lstrip() + "Raise `max_context_length` to encode all of it, or pass "
        "`context_overflow='truncate'` to cut the end of the context as the authors' code does, the prompt first.",
        "Raise `--max-context-length` to encode all of it.",
    )


def propose_sizes(
    grid: LatentGrid,
    height: int,
    width: int,
    num_frames: int,
    preset: Mapping[str, Any] | None = None,
    with_source: bool = False,
    room: int | None = None,
) -> list[Proposal]:
    """
    Propose up to three sizes and lengths that work, the best one first.

    Proposals are: fewer frames at the requested size, or at the area of the preset with the same aspect ratio; and all
    frames at a smaller size of at least a quarter of the preset's area. If none of these works, the proposal is one
    frame at the largest size with the same aspect ratio.

    Args:
        height, width, num_frames: requested size and length.
        preset, with_source, room: see [`check_positions`].
    """
    multiple = grid.multiple(with_source)
    area = preset["height"] * preset["width"] if preset else height * width
    scale = min(1.0, math.sqrt(area / (height * width)))
    smaller = _below(height * scale, multiple), _below(width * scale, multiple)

    def works(size: tuple[int, int], frames: int) -> bool:
        fits = room is None or grid.source_tokens(*size, frames) <= room
        return fits and grid.has_positions(*size, frames)

    def longest(size: tuple[int, int]) -> int:
        """The largest number of frames that works at a size, 0 for none."""
        steps = range((num_frames - 1) // grid.temporal + 1)
        count = bisect_left(steps, True, key=lambda step: not works(size, step * grid.temporal + 1))
        return (count - 1) * grid.temporal + 1 if count else 0

    def largest(frames: int) -> tuple[int, int] | None:
        """The largest size with the same aspect ratio that works with a number of frames."""
        scales = {step / side for side in (height, width) for step in range(multiple, side + 1, multiple)}
        for scale in sorted(scales, reverse=True):
            size = _below(height * scale, multiple), _below(width * scale, multiple)
            if works(size, frames):
                return size
        return None

    asked = _within_positions(grid, height, width, multiple)
    shape = (asked[1] / asked[0]) / (width / height)
    sizes = [asked, smaller] if not with_source or 0.9 < shape < 1.1 else [smaller]
    every = (num_frames - 1) // grid.temporal * grid.temporal + 1
    found = []
    for size in sizes:
        frames = longest(size)
        if frames > 1 or frames == every:
            found.append((size, frames))
        if frames == every:
            break
    else:
        whole = largest(every)
        if whole is not None and 4 * whole[0] * whole[1] >= min(area, height * width):
            found.append((whole, every))
    if not found:
        one = largest(1)
        found = [] if one is None else [(one, longest(one))]
    proposals = [Proposal(*size, frames) for size, frames in found]
    return list(dict.fromkeys(proposals))[:3]


def _described(height: int, width: int, num_frames: int, in_window: bool = False) -> str:
    if num_frames == 1:
        return f"An image of {width}x{height}"
    return f"A {'window' if in_window else 'video'} of {width}x{height} with {num_frames} frames"


def _advice_of_windows(
    grid: LatentGrid,
    height: int,
    width: int,
    num_frames: int,
    preset: Mapping[str, Any] | None,
    room: int | None,
    in_window: bool,
) -> str:
    """A sentence about windows where they are a way out: when a window of the trained length works at this size."""
    if in_window:
        return "Shorter windows are another way: pass a smaller `window_frames`."
    trained = (preset or {}).get("num_frames") or 1
    fits = room is None or grid.source_tokens(height, width, trained) <= room
    if not 1 < trained < num_frames or not fits or not grid.has_positions(height, width, trained):
        return ""
    return f"Pass `long_video='windows'` to keep the size and all frames, in windows of {trained} frames."


def _within_positions(grid: LatentGrid, height: int, width: int, multiple: int) -> tuple[int, int]:
    """Round height and width to the grid, limited by the position embeddings of the decoder."""
    limits = [
        math.inf if grid.positions is None else grid.positions * grid.spatial * patch for patch in grid.patch[1:]
    ]
    return _below(min(height, limits[0]), multiple), _below(min(width, limits[1]), multiple)


def _below(value: float, multiple: int) -> int:
    """The largest multiple that is not above a value, at least `multiple` itself."""
    return max(multiple, int(value + 1e-6) // multiple * multiple)


def _nearest(value: float, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)


# --- presets stored in components --------------------------------------------------------------------------------

# The adapter's configuration keeps presets when the adapter is saved alone. The processor keeps them for pipelines
# that get another adapter, such as that of a fine-tuned model.
_ENTRY = "_presets"
_OF_PROCESSOR: "WeakKeyDictionary[Any, dict[str, Any]]" = WeakKeyDictionary()


def keep_presets(
    presets: dict[str, dict[str, Any]], scheduler_shift: float | None, adapter: Any, processor: Any
) -> None:
    """
    Store the presets of a pipeline in its components, for other pipelines that are created from these components.

    Args:
        presets: settings by task.
        scheduler_shift: shift of the scheduler to which the presets belong.
        adapter, processor: the components.
    """
    kept = {"presets": presets, "scheduler_shift": scheduler_shift}
    if adapter is not None:
        adapter.register_to_config(**{_ENTRY: kept})
    if processor is not None:
        _OF_PROCESSOR[processor] = kept


def find_presets(
    adapter: Any, processor: Any, default: dict[str, dict[str, Any]] | None = None
) -> tuple[dict[str, dict[str, Any]], float | None]:
    """Presets and scheduler shift stored in components; without them `default`, by default the released model's."""
    kept = None if adapter is None else adapter.config.get(_ENTRY)
    kept = kept or (None if processor is None else _OF_PROCESSOR.get(processor)) or {"presets": default or PRESETS}
    return kept["presets"], kept.get("scheduler_shift")


__all__ = [
    "PRESETS",
    "GenerationSettings",
    "LatentGrid",
    "Proposal",
    "SizeError",
    "check_num_frames",
    "check_positions",
    "check_source_fits",
    "find_presets",
    "keep_presets",
    "propose_sizes",
    "resolve_size",
    "trim_num_frames",
]
