"""Presets of every task, and the arithmetic of sizes, frames and context room, as pure functions."""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakKeyDictionary

from ..tasks import TASKS
from .request_checks import check_number

# Settings of the released model, for repositories that store none of their own.
PRESETS: dict[str, dict[str, Any]] = {
    name: dict(task.preset) for name, task in TASKS.items() if task.preset is not None
}


@dataclass(frozen=True)
class GenerationSettings:
    """
    Every number a generation used; part of the pipeline's output.

    Raises:
        ValueError: for a number that is none, not finite, or out of range.
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
        """The settings as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class LatentGrid:
    """How pixels become latents and tokens, read off the components' configurations."""

    spatial: int  # pixels per latent, each way
    temporal: int  # frames per latent frame, the first frame alone
    patch: tuple[int, int, int]  # latents per decoder token
    source_patch: tuple[int, int, int]  # latents per context token of a source
    positions: int | None = None  # rows, columns and frames of decoder tokens that it has positions for; None: any

    def multiple(self, with_source: bool) -> int:
        """Height and width must be multiples of this many pixels."""
        patches = self.patch[1:] + (self.source_patch[1:] if with_source else ())
        return self.spatial * math.lcm(*patches)

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a video of `num_frames` frames."""
        return (num_frames - 1) // self.temporal + 1

    def source_tokens(self, height: int, width: int, num_frames: int) -> int:
        """Context tokens a source takes."""
        frames, rows, columns = self.source_patch
        rows, columns = rows * self.spatial, columns * self.spatial
        return (self.latent_frames(num_frames) // frames) * (height // rows) * (width // columns)

    def tokens_of_latents(self, shape: Sequence[int]) -> int:
        """Context tokens that latents of a shape (frames, height, width) take."""
        return math.prod(size // patch for size, patch in zip(shape, self.source_patch, strict=True))

    def decoder_tokens(self, height: int, width: int, num_frames: int) -> tuple[int, int, int]:
        """Frames, rows and columns of decoder tokens, each of which needs a position."""
        frames, rows, columns = self.patch
        spatial = self.spatial
        return self.latent_frames(num_frames) // frames, height // (rows * spatial), width // (columns * spatial)

    def has_positions(self, height: int, width: int, num_frames: int) -> bool:
        """Whether the decoder has a position for every token of this size and length."""
        return self.positions is None or max(self.decoder_tokens(height, width, num_frames)) <= self.positions


def resolve_size(
    grid: LatentGrid,
    height: int | None,
    width: int | None,
    preset: Mapping[str, Any],
    source_size: tuple[int, int] | None = None,
    keep_source_size: bool = True,
) -> tuple[int, int, list[str]]:
    """
    Height and width of the output, and what to tell the user about them.

    A size that is given must fit the grid. An edit takes its source's size, rounded to the grid; a video from an image
    (`keep_source_size=False`) takes the preset's area in the image's shape; everything else takes the preset.

    Args:
        source_size: (height, width) of the source in pixels.

    Raises:
        ValueError: for one of the two without the other, or a size off the grid.
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
            + (f", the nearest multiples of {multiple}." if keep_source_size else ", the preset's area in its shape.")
        )
    return resolved[0], resolved[1], notes


def check_num_frames(grid: LatentGrid, num_frames: int) -> None:
    """A number of frames must be `temporal * n + 1`; a `ValueError` names the neighbours."""
    if num_frames < 1 or (num_frames - 1) % grid.temporal:
        below = max(1, (num_frames - 1) // grid.temporal * grid.temporal + 1)
        raise ValueError(
            f"`num_frames` must be {grid.temporal}n+1, got {num_frames}: {below} and {below + grid.temporal} are the "
            "nearest."
        )


def trim_num_frames(grid: LatentGrid, num_frames: int) -> tuple[int, list[str]]:
    """The longest `temporal * n + 1` within a source of `num_frames` frames, and the note that says so."""
    kept = (num_frames - 1) // grid.temporal * grid.temporal + 1
    if kept == num_frames:
        return kept, []
    return kept, [
        f"The source has {num_frames} frames; the last {num_frames - kept} were left out, since the VAE needs "
        f"{grid.temporal}n+1."
    ]


@dataclass(frozen=True)
class Proposal:
    """A size and length that work."""

    height: int
    width: int
    num_frames: int

    def arguments(self, with_frames: bool) -> str:
        """In the words of the pipeline's call."""
        return f"`height={self.height}, width={self.width}" + (
            f", num_frames={self.num_frames}`" if with_frames else "`"
        )

    def flags(self, with_frames: bool) -> str:
        """In the words of the command line."""
        return f"`--size {self.width}x{self.height}" + (f" --frames {self.num_frames}`" if with_frames else "`")


class SizeError(ValueError):
    """
    A size or length that the model cannot do, and some that it can.

    Attributes:
        height, width, num_frames: what was asked for.
        problem: what is wrong, without the words of an entry point.
        proposals: what works; may be empty.
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
        """The message in the words of the command line."""
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
    """A [`SizeError`] from another process, with its messages as they were."""
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
) -> None:
    """
    Refuse a size or length for which the decoder has no positions.

    Args:
        preset: of the task, for what is proposed instead.
        with_source: whether the size is also that of a source.
        room: context tokens for the source; what is proposed fits into them.

    Raises:
        SizeError: with sizes and lengths that work.
    """
    if grid.has_positions(height, width, num_frames):
        return
    frames, rows, columns = grid.decoder_tokens(height, width, num_frames)
    problem = (
        f"{_described(height, width, num_frames)} has {rows} rows, {columns} columns and {frames} frames of tokens, "
        f"but the decoder has positions for {grid.positions} of each."
    )
    proposals = propose_sizes(grid, height, width, num_frames, preset, with_source, room)
    raise SizeError(problem, (height, width, num_frames), proposals)


def check_source_fits(
    grid: LatentGrid,
    height: int,
    width: int,
    num_frames: int,
    room: int,
    max_context_length: int,
    preset: Mapping[str, Any] | None = None,
) -> None:
    """
    Refuse a source that takes more than `room` context tokens, with sizes and lengths that fit.

    Args:
        room: tokens of the context that the prompt, the visual tokens and the boundary embeddings leave free.
        max_context_length: the whole context, for the message.
        preset: of the task, for what is proposed instead.

    Raises:
        SizeError: with sizes and lengths that work.
    """
    tokens = grid.source_tokens(height, width, num_frames)
    if tokens <= room:
        return
    proposals = propose_sizes(grid, height, width, num_frames, preset, True, room)
    raise SizeError(
        f"{_described(height, width, num_frames)} as a source takes {tokens} context tokens, but {max(room, 0)} are "
        f"free of {max_context_length}.",
        (height, width, num_frames),
        proposals,
        "Raise `max_context_length` to encode it whole, or pass `context_overflow='truncate'` to cut the context's "
        "end as upstream does, the prompt first.",
        "Raise `--max-context-length` to encode it whole.",
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
    At most three sizes and lengths that work in place of one that does not, the better one first.

    Fewer frames at the size that was asked for, or at the preset's area in its shape; all frames at a smaller size,
    unless that is less than a quarter of the preset's area. Only where none of these works, the largest size of the
    same shape with one frame.

    Args:
        height, width, num_frames: what was asked for.
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
        """The most frames that work at a size, 0 for none."""
        steps = range((num_frames - 1) // grid.temporal + 1)
        count = bisect_left(steps, True, key=lambda step: not works(size, step * grid.temporal + 1))
        return (count - 1) * grid.temporal + 1 if count else 0

    def largest(frames: int) -> tuple[int, int] | None:
        """The largest size of the same shape that works with a number of frames."""
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


def _described(height: int, width: int, num_frames: int) -> str:
    if num_frames == 1:
        return f"An image of {width}x{height}"
    return f"A video of {width}x{height} with {num_frames} frames"


def _within_positions(grid: LatentGrid, height: int, width: int, multiple: int) -> tuple[int, int]:
    """Height and width on the grid, each no more than the decoder has positions for."""
    limits = [
        math.inf if grid.positions is None else grid.positions * grid.spatial * patch for patch in grid.patch[1:]
    ]
    return _below(min(height, limits[0]), multiple), _below(min(width, limits[1]), multiple)


def _below(value: float, multiple: int) -> int:
    """The multiple at or below a value, at least one."""
    return max(multiple, int(value + 1e-6) // multiple * multiple)


def _nearest(value: float, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)


# --- presets go along with the components ------------------------------------------------------------------------

# The adapter's configuration keeps them when it is saved by itself. A processor goes from pipeline to pipeline where
# the adapter is another one, as of a fine-tune.
_ENTRY = "_presets"
_OF_PROCESSOR: "WeakKeyDictionary[Any, dict[str, Any]]" = WeakKeyDictionary()


def keep_presets(
    presets: dict[str, dict[str, Any]], scheduler_shift: float | None, adapter: Any, processor: Any
) -> None:
    """
    Let a pipeline's components remember its presets, for a pipeline that is made of them.

    Args:
        presets: of every task.
        scheduler_shift: of the scheduler that they belong to.
        adapter, processor: the components.
    """
    kept = {"presets": presets, "scheduler_shift": scheduler_shift}
    if adapter is not None:
        adapter.register_to_config(**{_ENTRY: kept})
    if processor is not None:
        _OF_PROCESSOR[processor] = kept


def find_presets(adapter: Any, processor: Any) -> tuple[dict[str, dict[str, Any]], float | None]:
    """The presets that components remember, and the shift of their scheduler; upstream's where there are none."""
    kept = None if adapter is None else adapter.config.get(_ENTRY)
    kept = kept or (None if processor is None else _OF_PROCESSOR.get(processor)) or {"presets": PRESETS}
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
