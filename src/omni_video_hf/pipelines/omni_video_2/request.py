"""Settings of a call of Omni-Video 2's pipeline, from the caller, the source and the preset of the task."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..presets import GenerationSettings, check_positions, check_source_fits, resolve_size, trim_num_frames
from ..request import OmniVideoRequestMixin, rows_of
from ..request_checks import check_numbers
from ..scheduling import chosen_shift
from .edit_source import EditVideo, crop_box

VIDEO_TASKS = ("t2v", "v2v", "understand")
MARKERS_OF_TEXT_AND_SOURCE = 4


class OmniVideo2RequestMixin(OmniVideoRequestMixin):
    """Methods of [`OmniVideo2Pipeline`] that check the arguments of a call and determine its settings."""

    def _check_task(self, task: str | None, video: Any, source_latents: torch.Tensor | None = None) -> str:
        """The task of a call: `v2v` with a source, else `t2v`."""
        if task is None:
            return "t2v" if video is None and source_latents is None else "v2v"
        if task not in VIDEO_TASKS:
            raise ValueError(
                f"`task` must be one of {', '.join(map(repr, VIDEO_TASKS))} for Omni-Video 2, got {task!r}: it was "
                "trained for videos only."
            )
        return task

    def prepare_video_settings(
        self,
        task: str,
        videos: list[EditVideo] | None,
        height: int | None,
        width: int | None,
        num_frames: int | None,
        fps: float | None,
        num_inference_steps: int | None,
        guidance_scale: float | None,
        flow_shift: float | None,
        source_latents: torch.Tensor | None = None,
        notes: list[str] | None = None,
        room: int | None = None,
        max_context_length: int | None = None,
    ) -> tuple[GenerationSettings, list[EditVideo] | None]:
        """
        All settings of the generation: those of the caller, else of the source, else of the task's preset.

        Args:
            videos: loaded sources of an edit.
            source_latents: latents of the source, which determine size and length.
            notes: list to which decisions are added, such as a crop.
            room: number of free context tokens for the source; `None` for no limit.
            max_context_length: maximum length of the context, for messages. Default: that of the adapter.

        Returns:
            The settings, and the sources cut to their number of frames.

        Raises:
            ValueError: for numbers that are out of range or do not go together.
            SizeError: for a source that does not fit the context, and sizes and lengths for which the decoder has no
                positions.
        """
        check_numbers(height=height, width=width, num_frames=num_frames, fps=fps, flow_shift=flow_shift)
        check_numbers(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        preset, notes = self._preset(task), [] if notes is None else notes
        size = None
        if videos is not None:
            preset, size = self._in_orientation(preset, videos, height, notes), (preset["height"], preset["width"])
        elif source_latents is not None:
            size = tuple(side * self.grid.spatial for side in source_latents.shape[3:])
            if height is not None and (height, width) != size:
                raise ValueError(
                    f"`height` and `width` are {height} and {width}, but the latents of the source are those of "
                    f"{size[0]} and {size[1]} pixels: leave them out."
                )
            height, width = size
        rows, columns = (preset["height"], preset["width"]) if height is None else (height, width)
        rows, columns, _ = resolve_size(self.grid, rows, columns if width is None else width, preset, size)
        if videos is not None:
            videos, num_frames, fps = self._equal_videos(videos, rows, columns, notes)
        elif source_latents is not None:
            frames = (source_latents.shape[2] - 1) * self.grid.temporal + 1
            if num_frames not in (None, frames):
                raise ValueError(f"`num_frames` is {num_frames}, but the latents of the source are those of {frames}.")
            num_frames = frames

        def chosen(name: str, value: float | None) -> Any:
            return preset[name] if value is None else value

        shift = flow_shift if flow_shift is not None else chosen_shift(self.scheduler, self.config.scheduler_shift)
        settings = GenerationSettings(
            task=task,
            height=rows,
            width=columns,
            num_frames=chosen("num_frames", num_frames),
            fps=chosen("fps", fps),
            num_inference_steps=chosen("num_inference_steps", num_inference_steps),
            guidance_scale=chosen("guidance_scale", guidance_scale),
            flow_shift=chosen("flow_shift", shift),
        )
        has_source = videos is not None or source_latents is not None
        if has_source and room is not None:
            limit = max_context_length or self.adapter.config.max_context_length
            check_source_fits(self.grid, rows, columns, settings.num_frames, room, limit, preset)
        check_positions(
            self.grid, rows, columns, settings.num_frames, preset, has_source, room if has_source else None
        )
        return settings, videos

    def _in_orientation(
        self, preset: Mapping[str, Any], videos: list[EditVideo], height: int | None, notes: list[str]
    ) -> Mapping[str, Any]:
        """The preset with height and width swapped for a portrait source of a landscape preset, or the reverse."""
        rows, columns = videos[0].frames.shape[1:3]
        if height is not None or (rows > columns) == (preset["height"] > preset["width"]) or rows == columns:
            return preset
        swapped = dict(preset) | {"height": preset["width"], "width": preset["height"]}
        notes.append(
            f"The source is {columns}x{rows}, so the size of the preset was turned to "
            f"{swapped['width']}x{swapped['height']}: pass `height` and `width` for another size."
        )
        return swapped

    def _equal_videos(
        self, videos: list[EditVideo], height: int, width: int, notes: list[str]
    ) -> tuple[list[EditVideo], int, float]:
        """The sources cut to one number of frames, this number, and their frame rate."""
        for what, found in (
            ("number of frames", {len(video.frames) for video in videos}),
            ("frame rate", {video.fps for video in videos}),
        ):
            if len(found) > 1:
                raise ValueError(
                    f"The sources of one call must have the same {what}, got {sorted(map(str, found))}: pass `fps` "
                    "and `num_frames`, or make one call per source."
                )
        notes += dict.fromkeys(note for video in videos for note in video.notes)
        num_frames, more = trim_num_frames(self.grid, len(videos[0].frames))
        notes += more
        for rows, columns in dict.fromkeys(video.frames.shape[1:3] for video in videos):
            left, top, right, bottom = crop_box(rows, columns, height, width)
            if (right - left, bottom - top) != (columns, rows):
                notes.append(
                    f"The source is {columns}x{rows}; its centre of {right - left}x{bottom - top} was resized to "
                    f"{width}x{height}."
                )
        return [video.cut(num_frames) for video in videos], num_frames, videos[0].fps

    def _least_source_room(self, max_context_length: int | None) -> int:
        """Context tokens for the source if text and MLLM took none; a source that needs more never fits."""
        return (max_context_length or self.adapter.config.max_context_length) - MARKERS_OF_TEXT_AND_SOURCE

    def _note_of_cut(
        self,
        states: torch.Tensor | Sequence[torch.Tensor],
        embeds: torch.Tensor | Sequence[torch.Tensor],
        source_latents: torch.Tensor | None,
        max_context_length: int | None,
    ) -> list[str]:
        """A note about what `context_overflow="truncate"` cuts from the context."""
        limit = max_context_length or self.adapter.config.max_context_length
        source = 0 if source_latents is None else self.grid.tokens_of_latents(source_latents.shape[2:])
        texts = [len(row) + len(text) for row, text in zip(rows_of(states), rows_of(embeds), strict=True)]
        markers = 0 if not self.adapter.config.use_markers else 4 if source else 2
        length = max(texts) + source + markers
        if length <= limit:
            return []
        return [
            f"The context has {length} tokens; the last {length - limit}, the source first, were left out "
            f"(`max_context_length` {limit})."
        ]


__all__ = ["VIDEO_TASKS", "OmniVideo2RequestMixin"]
