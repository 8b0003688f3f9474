"""Presets of every task, and the arithmetic of sizes, frames and context room, as pure functions."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakKeyDictionary

# Upstream's defaults (guidance in diffusers' convention: upstream's scale plus one). i2v has none there: t2v's.
PRESETS: dict[str, dict[str, Any]] = {
    "t2i": {
        "height": 480,
        "width": 480,
        "num_frames": 1,
        "fps": None,
        "num_inference_steps": 50,
        "guidance_scale": 6.0,
    },
    "t2v": {
        "height": 480,
        "width": 832,
        "num_frames": 81,
        "fps": 16,
        "num_inference_steps": 50,
        "guidance_scale": 6.0,
    },
    "i2i": {
        "height": 480,
        "width": 480,
        "num_frames": 1,
        "fps": None,
        "num_inference_steps": 40,
        "guidance_scale": 4.0,
    },
    "v2v": {"height": 352, "width": 640, "num_frames": 17, "fps": 8, "num_inference_steps": 40, "guidance_scale": 4.0},
    "i2v": {
        "height": 480,
        "width": 832,
        "num_frames": 81,
        "fps": 16,
        "num_inference_steps": 50,
        "guidance_scale": 6.0,
    },
}
for _preset in PRESETS.values():
    _preset["flow_shift"] = 5.0


@dataclass(frozen=True)
class GenerationSettings:
    """Every number a generation used; part of the pipeline's output."""

    task: str
    height: int  # pixels
    width: int  # pixels
    num_frames: int
    fps: float | None  # None for images
    num_inference_steps: int
    guidance_scale: float  # uncond + scale * (cond - uncond)
    flow_shift: float

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
    if height is not None:
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


def check_source_fits(
    grid: LatentGrid, height: int, width: int, num_frames: int, room: int, max_context_length: int
) -> None:
    """
    Refuse a source that takes more than `room` context tokens, with the largest ones that fit.

    Args:
        room: tokens of the context that the prompt, the visual tokens and the markers leave free.
    """
    tokens = grid.source_tokens(height, width, num_frames)
    if tokens <= room:
        return
    multiple = grid.multiple(with_source=True)
    options = []
    shrink = math.sqrt(max(room, 0) / tokens)
    smaller = [max(multiple, int(value * shrink) // multiple * multiple) for value in (height, width)]
    if grid.source_tokens(*smaller, num_frames) <= room:
        options.append(f"{smaller[1]}x{smaller[0]} with {num_frames} frames (`height`, `width`)")
    latent_frames = room // max(1, grid.source_tokens(height, width, 1))
    if num_frames > 1 and latent_frames >= 1:
        options.append(f"{width}x{height} with {(latent_frames - 1) * grid.temporal + 1} frames (`num_frames`)")
    fits = f" The largest that fit: {', or '.join(options)}." if options else ""
    raise ValueError(
        f"A source of {width}x{height} with {num_frames} frames takes {tokens} context tokens, but {max(room, 0)} are "
        f"free of {max_context_length}.{fits} Raise `max_context_length` to encode it whole, or pass "
        "`context_overflow='truncate'` to cut the context's end as upstream does, the prompt first."
    )


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
    "check_num_frames",
    "check_source_fits",
    "find_presets",
    "keep_presets",
    "resolve_size",
    "trim_num_frames",
]
