"""A long video in chunks, one after the other: `OmniVideoPipeline.stream`."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from typing import Any, cast

import numpy as np
import torch
from diffusers.video_processor import VideoProcessor

from ...media.sources import Source
from ...tasks import find_task, get_task
from ...utils.modules import Host
from ..presets import LongVideo, check_num_frames, trim_num_frames
from ..request_checks import check_numbers
from .output import OmniVideoPipelineOutput
from .steps import seeded_generator


def chunks_joined(call: Callable) -> Callable:
    """Decorate the pipeline's call: with `long_video="chunks"` it returns the chunks of [`stream`] as one video."""

    @wraps(call)
    def run(self: "OmniVideoStreamMixin", *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(call).bind(self, *args, **kwargs).arguments
        if given.pop("long_video", None) != "chunks":
            return call(self, *args, **kwargs)
        del given["self"]
        return_dict, outputs = given.pop("return_dict", True), list(self.stream(**given))
        whole = outputs[0]
        whole.notes = list(dict.fromkeys(note for output in outputs for note in output.notes))
        if whole.frames is not None and len(outputs) > 1:
            whole.frames = _joined_frames([output.frames for output in outputs])
        return whole if return_dict else (whole.frames, whole.text)

    return run


class OmniVideoStreamMixin(Host):
    """Long videos of [`OmniVideoPipeline`] chunk by chunk."""

    def stream(
        self,
        prompt: str | list[str] | None = None,
        video: Any = None,
        image: Any = None,
        task: str | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        window_frames: int | None = None,
        window_overlap: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        **arguments: Any,
    ) -> Iterator[OmniVideoPipelineOutput]:
        r"""
        Generate a video of any length in chunks, and give the frames of every chunk when they are complete.

        Every chunk is a call of its own, which begins with the last frames of the chunk before it: these are encoded,
        noised to each step and written over the latents (`first_frames` of the call). A chunk sees its own part of a
        source video, or, for `i2v`, a finished frame as its image. Errors add up from chunk to chunk; windows do not
        have this drift (`long_video="windows"`), but need the latents of the whole video at once.

        Args:
            prompt, video, image, task, num_frames, fps, generator: see the pipeline's call. The frames of a
                `VideoClip` may be a `numpy.memmap`, of which each chunk reads its part.
            window_frames (`int`, *optional*): Frames of a chunk, `4n+1`. Default: those of the preset.
            window_overlap (`int`, *optional*): Frames that a chunk takes over from the one before it, besides the
                first: a multiple of 4. Default: about half of a chunk.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"`.
            arguments: the other arguments of the call, the same for all chunks.

        Returns:
            An iterator with an [`OmniVideoPipelineOutput`] per chunk, whose `frames` are those that follow the
            last ones. The settings are those of the whole video.

        Raises:
            ValueError: as the call, and for arguments that belong to a single chunk.

        Example:
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> chunks = pipe.stream("a red circle moves right", task="t2v", num_frames=29, num_inference_steps=1)
            >>> [len(chunk.frames[0]) for chunk in chunks]
            [17, 8, 4]
        """
        check_numbers(num_frames=num_frames, fps=fps, window_frames=window_frames, window_overlap=window_overlap)
        if num_frames is not None:
            check_num_frames(self.grid, num_frames)
        long = self.resolve_long_video(task, "chunks", window_frames, window_overlap)
        _check_chunk_arguments(output_type, arguments)
        generator, seed = seeded_generator(generator)
        given = {"prompt": prompt, "generator": generator, **arguments}
        if get_task(task or find_task(None, "video")).output == "video":
            source = self._source_of_chunks(video, image, given, num_frames, fps, long)
            return self._chunks(source, task, num_frames, fps, long, output_type, seed, given)
        media = {"video": video, "image": image, "num_frames": num_frames, "fps": fps}
        return iter([self(task=task, output_type=output_type, **given, **media)])

    def _chunks(
        self,
        source: Source,
        task: str | None,
        num_frames: int | None,
        fps: float | None,
        long: LongVideo,
        output_type: str,
        seed: int | list[int] | None,
        given: dict[str, Any],
    ) -> Iterator[OmniVideoPipelineOutput]:
        """The calls of [`stream`], one after the other."""
        notes = list(dict.fromkeys(note for clip in source.videos or () for note in clip.notes))
        if source.videos is not None:
            source.check_equal(1, None, None)
            num_frames, cut = trim_num_frames(self.grid, len(source.videos[0].frames))
            notes += cut
        elif num_frames is None:
            num_frames = self._preset(task or find_task(source.kind, "video")).get("num_frames") or 1
        plan, ready = long.plan(self.grid, num_frames), None
        for number, chunk in enumerate(plan):
            first, stop = chunk.frames(self.grid.temporal)
            known = 0 if ready is None else plan[number - 1].frames(self.grid.temporal)[1] - first
            media = _media_of_chunk(source, first, stop, None if ready is None else ready[:, -known:])
            if source.videos is None:
                media |= {"num_frames": stop - first, "fps": fps}
            output = self._call_for_chunk(number, len(plan), given | {"task": task, "output_type": "pt"} | media)
            task = cast("str", output.task)
            given |= {name: output.settings[name] for name in ("height", "width") if name in output.settings}
            if output.frames is None:  # the MLLM answers in text
                yield output
                return
            ready = output.frames
            output.frames = _converted(ready[:, known:], output_type)
            output.settings |= {"num_frames": num_frames, "seed": seed, "long_video": "chunks"}
            output.settings |= {"window_frames": long.window_frames, "window_overlap": long.window_overlap}
            output.notes = list(dict.fromkeys([*notes, *output.notes]))
            yield output
            if self._interrupt or get_task(task).output != "video":
                return

    def _source_of_chunks(
        self,
        video: Any,
        image: Any,
        given: dict[str, Any],
        num_frames: int | None,
        fps: float | None,
        long: LongVideo,
    ) -> Source:
        """The source of all chunks, read after the check that a chunk of it fits."""
        prompts = given["prompt"] if given["prompt"] is not None else given.get("mllm_hidden_states")
        count = 1 if prompts is None or isinstance(prompts, str) else len(prompts)
        source = Source.of(video, image, count)
        if source.videos is not None:
            numbers = {name: given.get(name) for name in ("height", "width", "max_context_length")}
            overflow = given.get("context_overflow", "error")
            self.check_videos_fit(
                source, num_frames=num_frames, fps=fps, context_overflow=overflow, long_video=long, **numbers
            )
        return source.load(num_frames, fps)

    def _call_for_chunk(self, number: int, count: int, given: dict[str, Any]) -> OmniVideoPipelineOutput:
        """One call, whose progress bar says which chunk it is."""
        shown = getattr(self, "_progress_bar_config", {})
        if count > 1:
            self.set_progress_bar_config(**{"desc": f"chunk {number + 1}/{count}"} | shown)
        try:
            return self(**given)
        finally:
            self.set_progress_bar_config(**shown)


def _check_chunk_arguments(output_type: str, arguments: dict[str, Any]) -> None:
    """Refuse arguments that belong to a single chunk."""
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(
            f"`output_type` must be 'pil', 'np' or 'pt' for chunks, got {output_type!r}: the latents of a chunk are "
            "those of a clip of its own. `long_video='windows'` returns the latents of the whole video."
        )
    if arguments.get("num_videos_per_prompt", 1) != 1:
        raise ValueError(
            f"`num_videos_per_prompt` must be 1 for chunks, got {arguments['num_videos_per_prompt']}: pass the prompt "
            "as often as you want samples."
        )
    if arguments.get("think") or arguments.get("thought") is not None:
        raise ValueError(
            "`think` and `thought` would be used again for every chunk: call `pipe.think` once and pass the `prompt` "
            "of its thought, or pass `long_video='chunks'` to the call."
        )
    for name in ("latents", "source_latents", "reference_latents"):
        if arguments.get(name) is not None:
            raise ValueError(
                f"`{name}` are those of one clip, but chunks are several: leave `{name}` out, and pass a source as "
                "`video` or `image`."
            )


def _media_of_chunk(source: Source, first: int, stop: int, known: torch.Tensor | None) -> dict[str, Any]:
    """
    The source of a chunk and the frames that it begins with, as arguments of the call.

    Args:
        source: source of the whole video; an image is that of its first frame.
        first, stop: first frame of the chunk, and the frame after its last.
        known: `[batch, frames, 3, height, width]` in 0..1, the finished frames; `None` for the first chunk.
    """
    media: dict[str, Any] = {} if known is None else {"first_frames": known}
    if source.videos is not None:
        media["video"] = [
            replace(clip, frames=np.asarray(clip.frames[first:stop]), notes=()) for clip in source.videos
        ]
    elif source.images is not None:
        media["image"] = source.images if known is None else [clip[0] for clip in _converted(known[:, :1], "pil")]
    return media


def _converted(frames: torch.Tensor, output_type: str) -> Any:
    """Frames `[batch, frames, 3, height, width]` in 0..1 in the format of the output."""
    if output_type == "pt":
        return frames
    arrays = VideoProcessor.pt_to_numpy(frames.flatten(0, 1)).reshape(*frames.shape[:2], *frames.shape[3:], 3)
    return arrays if output_type == "np" else [VideoProcessor.numpy_to_pil(clip) for clip in arrays]


def _joined_frames(parts: list[Any]) -> Any:
    """The frames of all chunks as one video per sample."""
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts, dim=1)
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, axis=1)
    return [[frame for part in clip for frame in part] for clip in zip(*parts, strict=True)]


__all__ = ["OmniVideoPipelineOutput", "OmniVideoStreamMixin", "chunks_joined"]
