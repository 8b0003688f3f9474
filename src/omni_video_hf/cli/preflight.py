"""Checks of a generation request against the configurations of a repository, before any weights are loaded."""

import inspect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

from ..hub.remote_code import pipeline_class
from ..hub.staging import check_finished
from ..media.sources import Source
from ..models.configuration_omni_video import OmniVideoConfig
from ..models.connectors import OmniVideoAdapter
from ..models.connectors_2 import OmniVideo2Adapter
from ..models.modeling_omni_video import OmniVideoForConditionalGeneration
from ..pipelines.guidance import Guidance
from ..pipelines.omni_video_2.pipeline_omni_video_2 import OmniVideo2Pipeline
from ..pipelines.pipeline_omni_video import OmniVideoPipeline
from ..pipelines.presets import check_num_frames, check_source_fits
from ..tasks import find_task, get_task
from ..utils.files import read_json
from .checks import ClipOptions, GenerationOptions, Loading
from .console import UsageProblem, as_usage

MAX_PROMPT_TOKENS = 512  # limit of the text encoder, the default of the pipeline's `max_sequence_length`
_SMALL_FILES = ["model_index.json", "*/*config.json", "tokenizer/*"]


@dataclass(frozen=True)
class Windows:
    """
    How a video is generated.

    Args:
        arguments: of the pipeline's call.
        count: number of windows or chunks.
        frames: frames of each.
    """

    arguments: dict[str, Any]
    count: int
    frames: int


@dataclass(frozen=True)
class Outline:
    """
    A repository without its weights, for checking arguments.

    Args:
        pipe: pipeline whose models have no layers and are on the meta device; it checks arguments only.
        revision: commit of a Hub repository, `None` for a folder.
    """

    pipe: OmniVideoPipeline
    revision: str | None
    keeps_whole_clips: ClassVar[bool] = True  # an edit has all frames of its source

    @classmethod
    def of(cls, loading: Loading) -> "Outline":
        """Read the configurations of a folder or Hub repository."""
        place, revision = Path(loading.place), None
        if not place.is_dir():
            place = Path(
                snapshot_download(
                    loading.place, revision=loading.revision, token=loading.token, allow_patterns=_SMALL_FILES
                )
            )
            revision = place.name
        index_file = place / "model_index.json"
        check_finished(place)
        if not index_file.is_file():
            raise ValueError(
                f"{loading.model}: has no model_index.json, so it is not a complete pipeline. `--model` must be one."
            )
        index = read_json(index_file)
        if pipeline_class(place) == OmniVideo2Pipeline.__name__:
            return Outline2(_outline_2(place, index), revision)
        parts = {name: _read_config(cls_, place / name) for name, cls_ in _MODELS.items()}
        mllm = _without_layers(OmniVideoConfig.from_pretrained(place / "mllm"))
        left_out: Any = None  # nothing is tokenized for the MLLM, and nothing is denoised
        with torch.device("meta"):
            pipe = OmniVideoPipeline(
                processor=left_out,
                mllm=OmniVideoForConditionalGeneration(mllm),
                adapter=OmniVideoAdapter.from_config(parts["adapter"], num_encoder_layers=0, num_decoder_layers=0),
                transformer=WanTransformer3DModel.from_config(parts["transformer"], num_layers=0),
                text_encoder=None,
                tokenizer=AutoTokenizer.from_pretrained(place / "tokenizer"),
                vae=AutoencoderKLWan.from_config(parts["vae"]),
                scheduler=left_out,
                presets=index.get("presets"),
            )
        return cls(pipe, revision)

    def check(
        self,
        task: str | None,
        prompts: Sequence[str],
        options: GenerationOptions,
        media: dict[str, Any],
        num_frames: int | None = None,
        long_video: dict[str, Any] | None = None,
    ) -> None:
        """
        Refuse a request that the pipeline would refuse, or that would fail later.

        Args:
            task: task of the request; `None` if the model decides.
            prompts: all texts that the text encoder gets, including the negative prompt.
            options: options of what is generated.
            media: `image` or `video` to edit, as arguments of the pipeline.
            num_frames: frames of the part of a video that is edited; by default those of `options`, or all.
            long_video: arguments of the pipeline about windows.

        Raises:
            UsageProblem: for a value that is not allowed; the message names the argument, its value and what is
                allowed.
        """
        with as_usage():
            self._check_prompts(prompts)
            if options.frames is not None:
                check_num_frames(self.pipe.grid, options.frames)
            if task is not None and get_task(task).output == "image" and options.frames not in (None, 1):
                raise UsageProblem(f"`--frames {options.frames}`: the output is one image: leave `--frames` out.")
            for name in [task] if task is not None else [find_task(None, "image"), find_task(None, "video")]:
                self._check_settings(name, prompts, options, media, num_frames, long_video or {})

    def _check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            length = len(self.pipe.tokenizer(prompt_clean(prompt)).input_ids)
            if length > MAX_PROMPT_TOKENS:
                raise UsageProblem(
                    f"The prompt {prompt[:40]!r}... has {length} tokens for the text encoder, whose limit is "
                    f"{MAX_PROMPT_TOKENS}: shorten it."
                )

    def _check_settings(
        self,
        task: str,
        prompts: Sequence[str],
        options: GenerationOptions,
        media: dict[str, Any],
        num_frames: int | None,
        long_video: dict[str, Any],
    ) -> None:
        values, limit = options.settings(), options.max_context_length
        negative = values.pop("negative_prompt")
        scale = options.guidance_scale
        scale = self.pipe._preset(task)["guidance_scale"] if scale is None else scale
        Guidance().with_source_scale(options.source_guidance_scale, task, scale)
        source = Source.of(media.get("video"), media.get("image"), 1)
        room = None
        if source.kind is not None:
            self.pipe._guidance_scale = options.guidance_scale or 0.0
            texts = [text for text in prompts if text != negative] or list(prompts)
            room = self.pipe._source_room(
                task, texts, negative, None, None, options.guidance_scale, MAX_PROMPT_TOKENS, limit
            )
        if source.videos is None:
            self.pipe.prepare_settings(task, source, **values, room=room, max_context_length=limit)
            return
        numbers = {name: values[name] for name in ("height", "width", "num_frames", "fps")}
        numbers["num_frames"] = num_frames or numbers["num_frames"]
        windows = self._resolve(task, **long_video) if long_video else None
        self.pipe.check_videos_fit(source, **numbers, max_context_length=limit, room=room, long_video=windows)

    def _resolve(self, task: str, **arguments: Any) -> Any:
        """Windows or chunks of the pipeline, if it has them."""
        resolve: Any = getattr(self.pipe, "resolve_long_video", None)
        return None if resolve is None else resolve(task, **arguments)

    def choose_windows(self, task: str, num_frames: int, options: GenerationOptions, clip: ClipOptions) -> "Windows":
        """
        Choose how a video of `num_frames` frames is generated: at once if the model was trained on so many, else in
        windows. Flags of the caller win.

        Raises:
            UsageProblem: for windows with a pipeline that has none.
        """
        known = "long_video" in inspect.signature(type(self.pipe).__call__).parameters
        trained = self.pipe._preset(task).get("num_frames") or 1
        limit = clip.window_frames or trained
        mode = clip.long_video
        if mode in (None, "auto"):
            wants_windows = clip.window_frames is not None or clip.window_overlap is not None
            raised = options.max_context_length is not None and not wants_windows
            mode = "windows" if known and num_frames > limit and not raised else None
        elif mode == "off":
            mode = None
        if mode is None:
            return Windows({}, 1, num_frames)
        if not known:
            raise UsageProblem(f"`--long-video {mode}`: this version of the pipeline has no windows: leave it out.")
        arguments: dict[str, Any] = {
            "long_video": mode,
            "window_frames": clip.window_frames,
            "window_overlap": clip.window_overlap,
        }
        with as_usage():
            long = self._resolve(task, **arguments)
            return Windows(arguments, len(long.plan(self.pipe.grid, num_frames)), long.window_frames)


class Outline2(Outline):
    """The same for a repository of Omni-Video 2, whose pipeline chooses the frames of a source itself."""

    keeps_whole_clips = False

    def check(
        self,
        task: str | None,
        prompts: Sequence[str],
        options: GenerationOptions,
        media: dict[str, Any],
        num_frames: int | None = None,  # noqa: ARG002 - frames are chosen by the pipeline
        long_video: dict[str, Any] | None = None,  # noqa: ARG002 - there are no windows
    ) -> None:
        """As of [`Outline`]; the size of a source is checked when it is read."""
        with as_usage():
            if media.get("image") is not None:
                raise UsageProblem("Omni-Video 2 edits videos only, but the source is an image: pass a video.")
            pipe: Any = self.pipe
            task = pipe._check_task(task, media.get("video"))
            self._check_prompts(prompts)
            values = options.settings()
            values.pop("negative_prompt")
            if options.frames is not None:
                check_num_frames(pipe.grid, options.frames)
            scale = options.guidance_scale
            scale = pipe._preset(task)["guidance_scale"] if scale is None else scale
            Guidance().with_source_scale(options.source_guidance_scale, task, scale)
            settings, _ = pipe.prepare_video_settings(task, None, **values)
            if media.get("video") is not None:
                room = pipe._least_source_room(options.max_context_length)
                size = settings.height, settings.width, settings.num_frames
                check_source_fits(pipe.grid, *size, room, room, pipe._preset(task))


def _outline_2(place: Path, index: dict[str, Any]) -> Any:
    """The pipeline of Omni-Video 2 without layers, processor and MLLM."""
    models: dict[str, Any] = {
        "adapter": OmniVideo2Adapter,
        "transformer": WanTransformer3DModel,
        "vae": AutoencoderKLWan,
    }
    parts = {name: _read_config(kind, place / name) for name, kind in models.items()}
    left_out: Any = None
    with torch.device("meta"):
        return OmniVideo2Pipeline(
            processor=left_out,
            mllm=left_out,
            adapter=OmniVideo2Adapter.from_config(parts["adapter"]),
            transformer=WanTransformer3DModel.from_config(parts["transformer"], num_layers=0),
            text_encoder=None,
            tokenizer=AutoTokenizer.from_pretrained(place / "tokenizer"),
            vae=AutoencoderKLWan.from_config(parts["vae"]),
            scheduler=left_out,
            presets=index.get("presets"),
        )


_MODELS = {"adapter": OmniVideoAdapter, "transformer": WanTransformer3DModel, "vae": AutoencoderKLWan}


def _read_config(cls: Any, folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: has no config.json, so the repository is not a complete pipeline. Download or save it again."
        )
    return cls.load_config(folder)


def _without_layers(config: OmniVideoConfig) -> OmniVideoConfig:
    """The configuration with an MLLM without layers, because creating them takes time."""
    for part in ("text_config", "vision_config"):
        with suppress(AttributeError):
            getattr(config.mllm_config, part).num_hidden_layers = 0
    return config


__all__ = ["Outline", "Windows"]
