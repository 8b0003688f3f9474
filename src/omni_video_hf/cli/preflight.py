"""What can be said about a generation from a repository's configurations, before a weight is loaded."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

from ..hub.staging import check_finished
from ..media.sources import Source
from ..models.configuration_omni_video import OmniVideoConfig
from ..models.connectors import OmniVideoAdapter
from ..models.modeling_omni_video import OmniVideoForConditionalGeneration
from ..pipelines.pipeline_omni_video import OmniVideoPipeline
from ..pipelines.presets import check_num_frames
from ..tasks import find_task, get_task
from .checks import Drawing, Loading
from .console import UsageProblem, as_usage

MAX_PROMPT_TOKENS = 512  # of the text encoder, the default of the pipeline's `max_sequence_length`
_SMALL_FILES = ["model_index.json", "*/*config.json", "tokenizer/*"]


@dataclass(frozen=True)
class Outline:
    """
    A repository without its weights.

    Args:
        pipe: a pipeline whose models have no layers and lie nowhere: it checks arguments, and computes nothing.
        revision: commit of a Hub repository.
    """

    pipe: OmniVideoPipeline
    revision: str | None

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
            raise ValueError(f"{loading.model}: has no model_index.json, so it is no complete pipeline.")
        index = json.loads(index_file.read_text(encoding="utf-8"))
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

    def check(self, task: str | None, prompts: Sequence[str], drawing: Drawing, media: dict[str, Any]) -> None:
        """
        Refuse what the pipeline would refuse, and what would fail later.

        Args:
            task: `None` where the model decides.
            prompts: every text that is to be encoded, the negative prompt too.
            drawing: the numbers.
            media: `image` or `video` that is edited.

        Raises:
            UsageProblem: names the argument, its value and what is allowed.
        """
        with as_usage():
            self._check_prompts(prompts)
            if drawing.frames is not None:
                check_num_frames(self.pipe.grid, drawing.frames)
            if task is not None and get_task(task).output == "image" and drawing.frames not in (None, 1):
                raise UsageProblem(f"`--frames {drawing.frames}`: the output is one image; leave `--frames` out.")
            for name in [task] if task is not None else [find_task(None, "image"), find_task(None, "video")]:
                self._check_settings(name, drawing, media)

    def _check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            length = len(self.pipe.tokenizer(prompt_clean(prompt)).input_ids)
            if length > MAX_PROMPT_TOKENS:
                raise UsageProblem(
                    f"The prompt {prompt[:40]!r}... has {length} tokens for the text encoder, which takes "
                    f"{MAX_PROMPT_TOKENS}: shorten it."
                )

    def _check_settings(self, task: str, drawing: Drawing, media: dict[str, Any]) -> None:
        values = drawing.settings()
        del values["negative_prompt"]
        source = Source.of(media.get("video"), media.get("image"), 1)
        if source.videos is None:
            self.pipe.prepare_settings(task, source, **values)
            return
        self.pipe._guidance_scale = drawing.guidance_scale or 0.0
        numbers = {name: values[name] for name in ("height", "width", "num_frames", "fps")}
        self.pipe.check_videos_fit(source, **numbers, max_context_length=drawing.max_context_length)


_MODELS = {"adapter": OmniVideoAdapter, "transformer": WanTransformer3DModel, "vae": AutoencoderKLWan}


def _read_config(cls: Any, folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: has no config.json, so the repository is no complete pipeline.")
    return cls.load_config(folder)


def _without_layers(config: OmniVideoConfig) -> OmniVideoConfig:
    """The configuration with its MLLM's layers left out, which would take time to make."""
    for part in ("text_config", "vision_config"):
        with suppress(AttributeError):
            getattr(config.mllm_config, part).num_hidden_layers = 0
    return config


__all__ = ["Outline"]
