"""`OmniVideoPipelineOutput`: frames or text, task, frame rate, settings and notes of a pipeline call."""

import base64
import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from diffusers.utils import BaseOutput
from PIL import Image

from ..hub.remote_code import __version__
from ..media.images import IMAGE_FORMATS, contact_sheet, load_image, save_image
from ..media.video_reader import MediaError
from ..media.video_writer import save_video

MIN_SHOWN_WIDTH = 256  # CSS pixels; smaller results are enlarged in a notebook


@dataclass
class OmniVideoPipelineOutput(BaseOutput):
    """
    Output of [`OmniVideoPipeline`]. As the last line of a notebook cell it shows itself: clip, image or answer.

    Args:
        frames: generated videos: one list of PIL images per sample, or `[batch, frames, height, width, 3]` in 0..1
            (`"np"`), `[batch, frames, 3, height, width]` in 0..1 (`"pt"`), or latents. An image is a video of one
            frame. `None` for a text answer.
        text: text answers, one per prompt; `None` if images or videos were generated.
        task: the task of the call, chosen by the MLLM if the caller did not pass one.
        fps: frame rate of the videos; `None` for images and text answers.
        settings: all settings that were used.
        notes: decisions that were made for the caller, one sentence each, such as a rounded size.
        thought: what the MLLM wrote when it chose the task, one text per prompt, without special tokens; `None` if the
            caller passed the task.

    Example:
        >>> from omni_video_hf import OmniVideoPipelineOutput
        >>> OmniVideoPipelineOutput(text=["red"], task="understand").text
        ['red']
    """

    frames: Any = None
    text: list[str] | None = None
    task: str | None = None
    fps: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    thought: list[str] | None = None

    @property
    def images(self) -> list[Image.Image]:
        """
        The generated images, one per sample.

        Raises:
            AttributeError: for an output without images; the message names the field that has the result.

        Example:
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> pipe("a big red circle on white", task="t2i", num_inference_steps=2).images[0].size
            (64, 64)
        """
        if self.frames is None or self.fps is not None:
            name, kind = ("text", "a text answer") if self.frames is None else ("frames", "videos")
            raise AttributeError(f"This output has no `images`: it is {kind}, which `{name}` contains.")
        self._refuse_latents("images")
        return [load_image(sample[0]) for sample in self.frames]

    def save(self, path: str | Path) -> list[Path]:
        """
        Write the results into files, which record how they were generated, see [`read_media_record`].

        Args:
            path: file to write: .mp4 for videos; .png, .jpg, .jpeg or .webp for images. An existing file is replaced,
                as by [`save_video`]. Several samples are numbered: fox.mp4, fox-1.mp4 ...

        Returns:
            The paths of the files, one per sample.

        Raises:
            ValueError: for a text answer, latents, a suffix of another kind, or a folder that does not exist, before
                any file is written.

        Example:
            >>> import tempfile
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.media import read_media_record
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> output = pipe("a big red circle on white", task="t2i", num_inference_steps=2)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     (path,) = output.save(f"{folder}/circle.png")
            ...     read_media_record(path)["prompt"]
            'a big red circle on white'
        """
        path = Path(path)
        if self.frames is None:
            raise ValueError(f"{path}: the output is a text answer, which has no file format: write `output.text`.")
        self._refuse_latents("save")
        suffixes = list(IMAGE_FORMATS) if self.fps is None else [".mp4"]
        if path.suffix.lower() not in suffixes:
            kind = "images" if self.fps is None else "videos"
            raise ValueError(f"{path}: the output contains {kind}: its suffix must be {', '.join(suffixes)}.")
        paths = [
            path.with_name(f"{path.stem}-{index}{path.suffix}") if index else path for index in range(len(self.frames))
        ]
        for index, file in enumerate(paths):
            if self.fps is None:
                save_image(self.images[index], file, metadata=self.record(index))
            else:
                save_video(self.frames[index], file, fps=self.fps, metadata=self.record(index))
        return paths

    def record(self, index: int = 0) -> dict[str, Any]:
        """
        How a sample was generated, as plain values: prompt, seed, task, settings and version of this package.

        With `num_videos_per_prompt`, or one generator for several samples, `sample` is the number of the sample among
        those of the call.

        Example:
            >>> from omni_video_hf import OmniVideoPipelineOutput
            >>> OmniVideoPipelineOutput(frames=[[None]], task="t2i", settings={"seed": 7}).record()["seed"]
            7
        """
        count = 1 if self.frames is None else len(self.frames)
        prompt, seed = self.settings.get("prompt"), self.settings.get("seed")
        if isinstance(prompt, list) and prompt:
            prompt = prompt[index * len(prompt) // count]
        if isinstance(seed, list) and len(seed) == count:
            seed = seed[index]
        record = {
            "prompt": prompt,
            "seed": seed,
            "task": self.task,
            "sample": index if count > 1 else None,
            "settings": {name: value for name, value in self.settings.items() if value is not None},
            "version": __version__,
        }
        return json.loads(
            json.dumps({name: value for name, value in record.items() if value is not None}, default=str)
        )

    def _refuse_latents(self, use: str) -> None:
        """Refuse what needs pixels when the frames are latents, as of `output_type="latent"`."""
        shape = tuple(getattr(self.frames, "shape", ()))
        if shape and (3 not in (shape[2], shape[-1]) or float(self.frames.min()) < -1e-3):  # pixels are in 0..1
            raise ValueError(
                f"`{use}` needs pixels, but `frames` of the shape {list(shape)} are latents: call the pipeline with "
                "`output_type='pil'`, or decode them with `pipe.decode(output.frames, 'pil')`."
            )

    # --- notebooks --------------------------------------------------------------------------------------------------

    def _repr_html_(self) -> str:
        """What a notebook shows: the results, what the MLLM thought, notes, and the settings on demand."""
        parts = [f"<blockquote>{escape(text) or '(an empty answer)'}</blockquote>" for text in self.text or ()]
        parts += [f"<p><em>Thought: {escape(text)}</em></p>" for text in self.thought or () if text]
        if self.frames is not None:
            parts.append("".join(self._shown_samples()))
        parts += [f"<p>Note: {escape(note)}</p>" for note in self.notes]
        rows = {"task": self.task, "fps": self.fps} | self.settings
        table = "".join(
            f"<tr><th style='text-align:left'>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
            for name, value in rows.items()
            if value is not None
        )
        return f"<div>{''.join(parts)}<details><summary>Settings</summary><table>{table}</table></details></div>"

    def _shown_samples(self) -> Iterator[str]:
        """An HTML element for every sample; latents are only named."""
        try:
            self._refuse_latents("show")
        except ValueError:
            yield f"<p>Latents of the shape {list(self.frames.shape)}.</p>"
            return
        prompts = self.settings.get("prompt")
        for index, sample in enumerate(self.frames):
            label = escape(str(self.record(index).get("prompt", self.task)) if prompts else str(self.task), quote=True)
            if self.fps is None:
                yield _image_element(load_image(sample[0]), label)
                continue
            try:
                with tempfile.TemporaryDirectory() as folder:
                    save_video(sample, Path(folder) / "clip.mp4", fps=self.fps)
                    data = base64.b64encode((Path(folder) / "clip.mp4").read_bytes()).decode()
            except (ImportError, MediaError):  # without PyAV, frames side by side still show the result
                yield _image_element(contact_sheet(sample), label)
                continue
            style = _element_style(load_image(sample[0]).width)
            yield (
                f'<video src="data:video/mp4;base64,{data}" aria-label="{label}" style="{style}" '
                "controls loop autoplay muted playsinline></video>"
            )


def _image_element(image: Image.Image, label: str) -> str:
    """An `<img>` that contains the image itself, as PNG."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{label}" style="{_element_style(image.width)}">'


def _element_style(width: int) -> str:
    """Enlarge small results without blur; a larger one keeps its size, up to the width of the cell."""
    if width < MIN_SHOWN_WIDTH:
        return f"width:{MIN_SHOWN_WIDTH}px;image-rendering:pixelated"
    return "max-width:100%"


__all__ = ["OmniVideoPipelineOutput"]
